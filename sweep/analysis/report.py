"""The report of a sweep: one page that needs nothing else, on whatever the ledger holds so far.

What was asked, the table, the claims with their verdicts, figures, cost, failures, provenance and,
at the end, the trials, to which every number is a link. The page is bounded whatever the size of
the sweep: what is too much for a page is counted, and the command that lists it is named. It says
no time and no place of its own, so that an unchanged ledger gives the same bytes.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from fpt.backbones.sources import TRIAL
from fpt.printable import printable
from sweep.analysis import typeset
from sweep.analysis.accounting import spent
from sweep.analysis.cells import Cell
from sweep.analysis.figures import Material, draw, gather, inline_svg
from sweep.analysis.tables import Table, build
from sweep.analysis.typeset import Sheet
from sweep.ledger.causes import MARKS, STOPS
from sweep.ledger.ledger import Ledger
from sweep.planning import tuning
from sweep.planning.estimates import compare, quote
from sweep.planning.plan import Plan, plan
from sweep.sweepfile.expansion import load
from sweep.sweepfile.metrics import is_accuracy
from sweep.sweepfile.trials import Point, Sweep

if TYPE_CHECKING:
    from markupsafe import Markup

    from sweep.analysis.claims import Judged

LINES = 200
"""Lines of a table that are shown, at most."""

LISTED = 1000
"""Trials that are listed, at most."""

GROUPS = 2000
"""Cells that are listed, at most."""

PAIRS = 50
"""Pairs that are listed behind a claim, at most."""

WORDS = 60
"""Points of an axis that are named, at most."""

FAILURES, EXAMPLES = 30, 3
"""Kinds of failures that are listed, and trials of each, at most."""

MESSAGE = 300
"""Letters of a failure's message, at most."""

FACTS = 12
"""Values of a fact of provenance that are listed, at most."""

_COLUMNS = (
    "trial_id", "steps_trained", "seconds", "attempts", "test_accuracy", "test_loss", "git_commit",
    "git_dirty", "version", "versions", "device", "device_name", "host", "numerics", "protocol",
    "task", "task_version", "data_digest", "pretraining", "backbone_digest", "started_at",
    "finished_at",
)  # fmt: skip


def write(file: str | Path, results: str | Path, output: str | Path) -> None:
    """Write the report of a sweep file.

    Args:
        file: The sweep file.
        results: The ledger: a folder, s3://, gs:// or az://.
        output: The page, made or overwritten.

    Raises:
        SweepFileError: If the sweep file is wrong.
        LedgerError: If the ledger cannot be read.
        OSError: If the page cannot be written.
    """
    page = render(load(file), Ledger(results), results=str(results))
    Path(output).write_text(page, encoding="utf-8")


def render(sweep: Sweep, ledger: Ledger, *, results: str = "results") -> str:
    """Return the page of a sweep, as HTML.

    Args:
        sweep: The sweep.
        ledger: The ledger.
        results: How the ledger is named in the commands that the page gives.

    Raises:
        SweepFileError: If a cell of the table would mix configs.
        LedgerError: If the ledger cannot be read.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # Labels, descriptions and messages are anybody's text.
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    environment.filters["thousands"] = "{:,}".format
    environment.filters["coded"] = _coded
    template = environment.get_template("report.html.jinja")
    return template.render(_content(sweep, ledger.snapshot(), results))


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it: 42 s, 3.5 min, 12.0 h, 1,234 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.1f} h"


def _content(sweep: Sweep, ledger: Ledger, results: str) -> dict[str, Any]:
    # What the template is given. `Markup` marks what is HTML already, and was escaped where it was
    # made.
    from markupsafe import Markup

    planned = plan(sweep, ledger)
    sweep = planned.sweep  # Tuned: with the trials that the ledger has decided on.
    rows = ledger.trials([point.trial_id for point in sweep.all], columns=_COLUMNS)
    table = build(sweep, ledger) if sweep.table else None
    material = gather(sweep, ledger)
    judged = material.judged if sweep.spec.claims else None
    groups = _groups(sweep, table)
    told = _told(groups, planned, rows, table)
    known = {row["id"] for group in told for row in group["rows"]}
    counts = planned.counts()
    option = "" if results == "results" else f" --results {shlex.quote(results)}"
    return {
        "sweep": sweep,
        "file": shlex.quote(str(sweep.file)),
        "option": option,
        "css": Markup(typeset.CSS),
        "counts": {name: number for name, number in counts.items() if number},
        "total": sum(counts.values()),
        "done": counts["done"] + counts["diverged"],
        "axes": _axes(sweep),
        "tuning": tuning.notes(sweep),
        "table": Markup(_table(table.sheet, groups[:GROUPS])) if table else None,
        "lines_left": max(0, len(table.sheet.lines) - LINES) if table else 0,
        "claims": [Markup(one) for one in _claims(judged)] if judged else None,
        "contrasts_left": max(0, len(judged.contrasts) - LINES) if judged else 0,
        "behind": list(_behind(judged, known)) if judged else [],
        "figures": list(_figures(material)),
        "spent": spent(sweep, ledger),
        "quote": quote(planned, ledger) if planned.packs else None,
        "compared": compare(sweep, ledger),
        "failures": _failures(planned, ledger, known),
        "provenance": _provenance(sweep, rows),
        "groups": told,
        "figure": _figure(groups[:GROUPS]),
        "groups_left": sum(len(group.points) for group in groups[GROUPS:]),
        "left": sum(group["left"] for group in told),
    }


def _shown(value: Any) -> Any:
    # What the template prints, as text that HTML can hold; `Markup` stays what it is.
    return type(value)(printable(value, keep="\n\t")) if isinstance(value, str) else value


def _coded(text: str) -> Markup:
    """HTML of a text with `code` in it."""
    from markupsafe import Markup, escape

    parts = enumerate(text.split("`"))
    return Markup().join(
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part)
        for number, part in parts
    )


# --- what was asked -----------------------------------------------------------------------------


def _axes(sweep: Sweep) -> list[dict[str, Any]]:
    out = []
    for axis in sweep.axes:
        labels = list(dict.fromkeys(p.labels[axis] for p in sweep.points if axis in p.labels))
        left = max(0, len(labels) - WORDS)
        out.append({"name": axis, "count": len(labels), "labels": labels[:WORDS], "left": left})
    return out


# --- table, claims, figures ---------------------------------------------------------------------


def _table(sheet: Sheet, listed: Iterable[_Group]) -> str:
    # The table, its numbers linked to the cells that are listed.
    anchors = {group.anchor for group in listed}
    lines = tuple(
        replace(
            line,
            entries=tuple(
                entry if entry.cell in anchors else replace(entry, cell="")
                for entry in line.entries
            ),
        )
        for line in sheet.lines[:LINES]
    )
    return typeset.fragment(replace(sheet, lines=lines), linked=True)


def _claims(judged: Judged) -> Iterator[str]:
    # The claims and what sums them up, the numbers linked to the pairs and runs behind them.
    for sheet, column, name in (
        (judged.sheet, "difference", "claim"),
        (judged.summary, "mean", "arm"),
        (judged.over_places, "", ""),
    ):
        if sheet is not None:
            lines = []
            for number, line in enumerate(sheet.lines[:LINES]):
                entries = list(line.entries)
                if column:
                    at = sheet.columns.index(column)
                    entries[at] = replace(entries[at], cell=f"{name}-{number + 1}")
                lines.append(replace(line, entries=tuple(entries)))
            yield typeset.fragment(replace(sheet, lines=tuple(lines)), linked=True)


def _behind(judged: Judged, known: Collection[str]) -> Iterator[dict[str, Any]]:
    # The trials of each claim and arm; those that are listed are links.
    def trials(ids: Iterable[str]) -> list[tuple[str, bool]]:
        return [(one, one in known) for one in ids]

    for number, contrast in enumerate(judged.contrasts[:LINES]):
        where = " / ".join(contrast.place.values())
        yield {
            "anchor": f"claim-{number + 1}",
            "name": ": ".join(filter(None, (where, contrast.claim))),
            "pairs": [trials(pair) for pair in contrast.trials[:PAIRS]],
            "left": max(0, len(contrast.trials) - PAIRS),
        }
    for number, arm in enumerate(judged.aggregates[:LINES]):
        yield {
            "anchor": f"arm-{number + 1}",
            "name": f"{arm.arm}, over {arm.over}",
            "pairs": [trials([one]) for one in arm.trials[:PAIRS]],
            "left": max(0, len(arm.trials) - PAIRS),
        }


def _figures(material: Material) -> Iterator[dict[str, Any]]:
    from markupsafe import Markup

    for drawing in draw(material):
        name = f"figure-{drawing.kind}"
        svg = Markup(inline_svg(drawing.chart, name)) if drawing.chart else ""
        yield {"name": name, "kind": drawing.kind, "why": drawing.why, "svg": svg} | (
            {"title": drawing.chart.title, "notes": drawing.chart.notes} if drawing.chart else {}
        )


# --- cost, failures, provenance -----------------------------------------------------------------


def _failures(planned: Plan, ledger: Ledger, known: Collection[str]) -> dict[str, Any]:
    # What went wrong, by cause and exception, the most frequent first.
    wanted = ["trial_id", "cause", "exception", "message", "at"]
    ids = {point.trial_id: point for point in planned.sweep.all}
    order = [("at", "descending"), ("trial_id", "ascending")]
    notes = ledger.failures(ids, columns=wanted).sort_by(order)
    kinds: dict[tuple[str, str], list[int]] = {}
    for number, (cause, exception) in enumerate(
        zip(notes["cause"].to_pylist(), notes["exception"].to_pylist(), strict=True)
    ):
        if cause not in (*MARKS, *STOPS):
            kinds.setdefault((cause, exception or ""), []).append(number)
    trials = notes["trial_id"].to_pylist()
    told = []
    for (cause, exception), numbers in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        own = dict.fromkeys(trials[number] for number in numbers)
        examples: list[dict[str, Any]] = []
        for number in numbers:
            trial = trials[number]
            if all(example["id"] != trial for example in examples):
                message = notes["message"][number].as_py() or ""
                examples.append(
                    {
                        "id": trial,
                        "linked": trial in known,
                        "label": ids[trial].label,
                        "message": message if len(message) <= MESSAGE else message[:MESSAGE] + " …",
                    }
                )
            if len(examples) == EXAMPLES:
                break
        told.append(
            {
                "cause": cause,
                "exception": exception,
                "attempts": len(numbers),
                "trials": len(own),
                "open": sum(planned.status[one] == "failed" for one in own),
                "examples": examples,
            }
        )
    return {"kinds": told[:FAILURES], "left": max(0, len(told) - FAILURES)}


def _provenance(sweep: Sweep, rows: pa.Table) -> list[dict[str, Any]]:
    # Fact -> its values, the most frequent first, each with its number of trials.
    own = {TRIAL + point.trial_id: point.label for point in sweep.pretrainings}
    facts: list[dict[str, Any]] = []

    def tell(name: str, values: Mapping[str, int]) -> None:
        ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
        left = max(0, len(ordered) - FACTS)
        facts.append({"name": name, "values": ordered[:FACTS], "left": left})

    def count(*columns: str) -> Iterator[tuple[list[Any], int]]:
        found = rows.select(columns).group_by(list(columns)).aggregate([([], "count_all")])
        for row in found.to_pylist():
            yield [row[column] for column in columns], row["count_all"]

    def gathered(*columns: str, words: Any) -> Counter[str]:
        out: Counter[str] = Counter()
        for values, number in count(*columns):
            if text := words(*values):
                out[text] += number
        return out

    tell("code", gathered("git_commit", "git_dirty", words=_commit))
    tell("fpt-sweep", gathered("version", words=lambda version: version or ""))
    tell("versions", gathered("versions", words=_versions))
    tell("devices", gathered("device", "device_name", words=_joined))
    tell("hosts", gathered("host", words=_joined))
    tell("numerics", gathered("numerics", words=_joined))
    tell("protocol", gathered("protocol", words=_joined))
    tell("task versions", gathered("task", "task_version", words=_joined))
    tell("data digests", gathered("task", "data_digest", words=_digest))
    backbones = gathered(
        "pretraining",
        "backbone_digest",
        words=lambda name, digest: _digest(own.get(name, name), digest),
    )
    tell("backbone digests", backbones)
    if rows.num_rows:
        began, ended = pc.min(rows["started_at"]).as_py(), pc.max(rows["finished_at"]).as_py()
        if began and ended:
            tell(
                "trained", {f"{began:%Y-%m-%d %H:%M} to {ended:%Y-%m-%d %H:%M} UTC": rows.num_rows}
            )
    return [fact for fact in facts if fact["values"]]


def _commit(commit: str | None, dirty: bool | None) -> str:
    if commit is None:
        return "no commit known"
    return f"commit {commit}{', with uncommitted changes' if dirty else ''}"


def _versions(text: str | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(json.loads(text or "{}").items()))


def _joined(*parts: object) -> str:
    return ", ".join(str(part) for part in parts if part is not None)


def _digest(of: str | None, digest: str | None) -> str:
    return f"{of}: {digest}" if digest else ""


# --- the trials ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Trials that are listed together: a cell, or the pretrainings, or what tuning took."""

    anchor: str
    name: str
    points: tuple[Point, ...]
    cells: tuple[Cell, ...] = ()
    """The cells of the table that they are in, one a metric."""


def _groups(sweep: Sweep, table: Table | None) -> list[_Group]:
    groups: dict[str, _Group] = {}
    cells: dict[str, list[Cell]] = {}
    for cell in table.cells.values() if table else ():
        cells.setdefault(cell.points[0].cell_id, []).append(cell)
    for cell_id, own in cells.items():
        name = " / ".join(filter(None, (own[0].row, own[0].column)))
        groups[cell_id] = _Group(f"cell-{cell_id}", name, own[0].points, tuple(own))
    inside = {point.trial_id for group in groups.values() for point in group.points}
    others: dict[str, list[Point]] = {}
    for point in sweep.all:
        if point.trial_id not in inside:
            # What a cell was tuned with may be trials of its own config, with other seeds.
            beside = "-beside" if point.cell_id in groups else ""
            others.setdefault(f"cell-{point.cell_id}{beside}", []).append(point)
    rest = []
    for anchor, points in others.items():
        first, *more = (point.labels for point in points)
        shared = [name for axis, name in first.items() if all(m.get(axis) == name for m in more)]
        rest.append(_Group(anchor, " / ".join(shared) or sweep.name, tuple(points)))
    return [*groups.values(), *rest]


def _has_classes(point: Point) -> bool:
    return bool(point.like.task.shape(point.like.protocol).classes)


def _figure(groups: Sequence[_Group]) -> str:
    # What the figure of a trial is: of numbers, there is no accuracy.
    classes = {_has_classes(group.points[0]) for group in groups}
    names = ["test accuracy, %"] * (classes != {False}) + ["test loss"] * (False in classes)
    return " or ".join(names)


def _told(
    groups: Sequence[_Group], planned: Plan, rows: pa.Table, table: Table | None
) -> list[dict[str, Any]]:
    # What the page says of each group; of the first ones, each trial.
    budget, share = LISTED, max(10, LISTED // max(len(groups), 1))
    listed: list[tuple[_Group, Sequence[Point]]] = []
    for group in groups[:GROUPS]:
        listed.append((group, group.points[: min(share, budget)]))
        budget -= len(listed[-1][1])
    wanted = {point.trial_id for _, points in listed for point in points}
    places = [n for n, name in enumerate(rows["trial_id"].to_pylist()) if name in wanted]
    listed_rows = rows.take(pa.array(places, pa.int64())).to_pylist()
    known = {row["trial_id"]: row for row in listed_rows}
    return [
        {
            "anchor": group.anchor,
            "name": group.name,
            "config": _summary(group.points[0], planned.sweep),
            "cells": [_mean(cell) for cell in group.cells],
            "trace": _trace(group.cells[0], table) if table and group.cells else "",
            "rows": [_row(point, planned, known.get(point.trial_id)) for point in points],
            "left": len(group.points) - len(points),
        }
        for group, points in listed
    ]


def _trace(cell: Cell, table: Table) -> str:
    # The arguments of `sweep trace` that name a cell.
    place = [cell.row, cell.column] if table.spec.columns else [cell.row, cell.metric]
    return " ".join(shlex.quote(one) for one in place)


def _mean(cell: Cell) -> str:
    unit = " %" if is_accuracy(cell.metric) else f" {cell.unit}".rstrip()
    mean = "none"
    if cell.interval:
        half = cell.interval.half_width
        mean = f"{cell.interval.mean:,.6g}" + (f" ± {half:,.3g}" if half is not None else "") + unit
    return f"{cell.metric.replace('_', ' ')} {mean}, {len(cell.values)} of {cell.expected} trials"


def _summary(point: Point, sweep: Sweep) -> str:
    # The config that the trials of a cell share, in a line.
    config = point.config
    own = {TRIAL + one.trial_id: one.label for one in sweep.pretrainings}
    pretraining = own.get(config.pretraining, config.pretraining)
    backbone = config.backbone
    rate = "being tuned" if point.undecided else f"{config.learning_rate:g}"
    return (
        f"task {config.task.name}; {backbone.name}, {backbone.layers} layers of {backbone.width}; "
        f"pretraining {pretraining}; trains {', '.join(config.train)}; learning rate "
        f"{rate}; batch {config.batch_size}; {config.steps:,} steps; protocol "
        f"{config.protocol}; {config.numerics}"
    )


def _row(point: Point, planned: Plan, row: Mapping[str, Any] | None) -> dict[str, Any]:
    name = point.trial_id
    out: dict[str, Any] = {
        "id": name,
        "label": point.label or name,
        "status": planned.status[name],
        "why": planned.why.get(name, "")[:MESSAGE],
        "accuracy": "",
        "steps": "",
        "time": "",
        "attempts": "",
        "device": "",
        "commit": "",
    }
    if row is not None:
        accuracy, loss = row["test_accuracy"], row["test_loss"]
        if accuracy is not None and math.isfinite(accuracy):
            out["accuracy"] = f"{100 * accuracy:.2f}"
        elif loss is not None and math.isfinite(loss) and not _has_classes(point):
            out["accuracy"] = f"loss {loss:.4g}"
        out["steps"] = f"{row['steps_trained']:,}" if row["steps_trained"] is not None else ""
        out["time"] = duration(row["seconds"]) if row["seconds"] is not None else ""
        out["attempts"] = row["attempts"] if row["attempts"] is not None else ""
        out["device"] = row["device"] or ""
        out["commit"] = (row["git_commit"] or "")[:8] + ("+" if row["git_dirty"] else "")
    return out
