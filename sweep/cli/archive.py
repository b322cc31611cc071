"""Commands about where figures come from, and what becomes of ledgers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sweep.cli.common import (
    AsJson,
    File,
    Only,
    Quiet,
    Results,
    UserError,
    app,
    count,
    counted,
    echo,
    note,
    say,
    show_json,
)

if TYPE_CHECKING:
    from sweep.analysis.tracing import Member, Trace
    from sweep.exchange.diff import CellChange, Difference, Match
    from sweep.exchange.merging import Merged
    from sweep.ledger.ledger import Ledger

Into = Annotated[
    str, typer.Option("--into", metavar="RESULTS", help="A folder, s3://, gs://, az://.")
]


@app.command(epilog="Example: sweep trace experiments/quickstart.yaml random bit-xor")
def trace(
    file: File,
    row: Annotated[str, typer.Argument(metavar="ROW", help="The label of a row of the table.")],
    column: Annotated[str, typer.Argument(metavar="COLUMN", help="The label of a column of it.")],
    metric: Annotated[
        str | None, typer.Option(metavar="NAME", help="One of several metrics; default: the first.")
    ] = None,
    results: Results = "results",
    as_json: AsJson = False,
) -> None:
    """Show what is behind a figure: its trials, configs, origin, cost, and how to run it again."""
    from sweep.analysis.tracing import trace as follow
    from sweep.ledger.ledger import Ledger
    from sweep.mirrors.mlflow_ui import runs_of
    from sweep.sweepfile.expansion import load

    sweep, ledger = load(file), Ledger.existing(results)
    found = follow(sweep, ledger, row, column, metric, runs_of=partial(runs_of, ledger, sweep.name))
    if as_json:
        show_json(found.record())
    else:
        _show_trace(found)


def _show_trace(found: Trace) -> None:
    from sweep.analysis.tracing import common
    from sweep.cli.progress import span

    cell = found.cell
    place = " / ".join(filter(None, (cell.row, cell.column, cell.metric)))
    echo(f"{place}: {cell.state}, {cell.finished} of {count(cell.expected, 'trial')}")
    if found.arithmetic:
        echo(f"  {found.arithmetic}")
    echo()
    everyone = (*found.members, *found.pretrainings)
    head = ("trial", "label", "status", "value", "attempts", "took", "ended", "why")
    lines = [head, *(tuple(_line(one)) for one in everyone)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        told = "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        echo(f"  {told}".rstrip())
    spent = found.spent
    cost = f"  took {span(spent.seconds)} of training in {count(spent.attempts, 'attempt')}"
    came = {"failed": spent.failed_attempts, "stopped": spent.stopped_attempts}
    if any(came.values()):
        cost += f" ({counted(came)})"
    if lost := sum(spent.lost.values()):
        cost += f"; {span(lost)} more were lost"
    echo(cost)
    everywhere: dict[str, Any] = {}
    for heading, records in (
        ("config", [one.config for one in found.members]),
        ("origin", [one.provenance for one in found.members]),
    ):
        shared, own = common(records)
        everywhere |= shared
        echo(f"\n{heading}, of all of them" if len(records) > 1 else f"\n{heading}")
        _show_pairs(shared)
        for name in dict.fromkeys(name for values in own for name in values):
            echo(f"  {name:<28} differs:")
            for member, values in zip(found.members, own, strict=True):
                echo(f"    {member.point.trial_id}  {_short(values.get(name))}")
    for one in found.pretrainings:
        echo(f"\npretraining {one.point.label} ({one.point.trial_id}), where it differs")
        own_values = (one.config | one.provenance).items()
        _show_pairs({k: v for k, v in own_values if (k, v) not in everywhere.items()})
    for one in everyone:
        for failure in one.failures:
            echo(
                f"\nfailed: {one.point.trial_id} at step {failure['step']} on {failure['host']}, "
                f"{failure['at']:%Y-%m-%d %H:%M}: {failure['cause']}: {failure['exception']}: "
                f"{(failure['message'] or '').partition(chr(10))[0]}"
            )
    if runs := [one for one in everyone if one.run]:
        echo("\nin MLflow (sweep ui, then after the address)")
        for one in runs:
            echo(f"  {one.point.trial_id}  /#/{one.run}")
    echo("\nto train just these anew, into a ledger of their own, and to compare")
    echo(f"  {found.again}\n  {found.compare}")


def _line(one: Member) -> Iterable[str]:
    from sweep.cli.progress import span

    row = one.row or {}
    yield one.point.trial_id
    yield one.point.label
    yield one.status
    yield "" if one.value is None else f"{one.value:.10g}"
    yield str(row.get("attempts") or len(one.failures) or "")
    yield span(row["seconds"]) if row.get("seconds") else ""
    yield f"{row['finished_at']:%Y-%m-%d %H:%M}" if row.get("finished_at") else ""
    yield one.why


def _show_pairs(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        echo(f"  {name:<28} {_short(value)}")


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


@app.command(epilog="Example: sweep diff results results-again experiments/quickstart.yaml")
def diff(
    before: Annotated[
        str, typer.Argument(metavar="LEDGER_A", help="A ledger, bundle or publication.")
    ],
    after: Annotated[str, typer.Argument(metavar="LEDGER_B", help="Another one.")],
    file: File,
    only: Only = None,
    by_row: Annotated[
        bool,
        typer.Option(
            "--rows",
            help="Row by row: equal to the bit, explained by another processor or library, or "
            "not. Exits 0 unless a row of LEDGER_A differs or is missing.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what another ledger has otherwise: cells, verdicts, trials. Exits 0 if nothing."""
    from sweep.exchange.bundle import opened
    from sweep.exchange.diff import diff as compare
    from sweep.exchange.diff import row_by_row
    from sweep.sweepfile.expansion import load

    sweep = load(file)
    part = sweep.only(only or ())
    if by_row:
        with opened(before) as one, opened(after) as other:
            matches = row_by_row(part, one, other)
        _show_matches(matches, as_json=as_json)
        raise typer.Exit(int(any(one.state in ("differs", "missing") for one in matches)))
    with opened(before) as one, opened(after) as other:
        found = compare(part, one, other, claims=part is sweep)
    if as_json:
        show_json(found.record())
    else:
        _show_difference(found, before, after)
    raise typer.Exit(0 if found.same else 1)


def _show_matches(matches: Sequence[Match], *, as_json: bool) -> None:
    counts = dict.fromkeys(("equal", "explained", "differs", "missing"), 0)
    counts |= Counter(one.state for one in matches)
    if as_json:
        show_json({"counts": counts, "rows": [vars(one) | {"clash": one.why} for one in matches]})
        return
    for one in matches:
        echo(f"{one.trial_id}  {one.state:<9}  {one.label}{one.why and f'  {one.why}'}")
    echo(f"rows: {counted(counts)}")


def _show_difference(found: Difference, before: str, after: str) -> None:
    wrong = [one for one in found.clashes if not one.excuse]
    if wrong:
        echo(f"{count(len(wrong), 'contradiction')}: one trial, other figures")
    for one in wrong:
        echo(f"  {one} {found.labels[one.trial_id]}")
    if moved := [one for one in found.clashes if one.excuse]:
        echo(f"{count(len(moved), 'trial')} with other figures, for a reason")
    for one in moved:
        echo(f"  {one} {found.labels[one.trial_id]}")
    for flip in found.flips:
        place = " / ".join(flip.place.values())
        echo(f"verdict: {flip.claim}, {place or flip.metric}: {flip.before} -> {flip.after}")
    for change in found.cells:
        echo(_changed(change))
    for trials, where in ((found.added, after), (found.removed, before)):
        if trials:
            echo(f"{count(len(trials), 'trial')} in {where} alone")
    echo(
        f"the same in both: {count(found.unchanged, 'cell')}"
        if found.cells or not found.same
        else f"no difference: {count(found.unchanged, 'cell')}, {count(len(found.labels), 'trial')}"
    )


def _changed(change: CellChange) -> str:
    place = " / ".join(filter(None, (change.after.row, change.after.column, change.after.metric)))
    said = []
    for cell in (change.before, change.after):
        interval = cell.interval
        width = f" ± {interval.half_width:.4g}" if interval and interval.half_width else ""
        said.append(f"{interval.mean:.6g}{width} (n {interval.n})" if interval else cell.state)
    return f"{change.what}: {place}: {said[0]} -> {said[1]}"


@app.command(epilog="Example: sweep export experiments/quickstart.yaml -o bundle.zip")
def export(
    file: File,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="ZIP", help="The bundle.")],
    states: Annotated[
        bool, typer.Option("--states", help="Also trained tensors and backbones: large.")
    ] = False,
    results: Results = "results",
    quiet: Quiet = False,
) -> None:
    """Put a sweep, its part of the ledger and its tables into one file, to be given away."""
    from sweep.exchange.bundle import export as write
    from sweep.ledger.ledger import Ledger
    from sweep.sweepfile.expansion import load

    bundle = write(load(file), Ledger.existing(results), output, states=states)
    note(
        f"{bundle.path}: {bundle.trials} of {count(bundle.expected, 'trial')}, "
        f"{count(bundle.members, 'file')}, {bundle.size / 1e6:,.1f} MB, sha256 {bundle.sha256}"
    )


@app.command(epilog="Example: sweep publish experiments/quickstart.yaml -o published")
def publish(
    file: File,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A folder.")],
    report: Annotated[bool, typer.Option("--report", help="Also the HTML report.")] = False,
    results: Results = "results",
    quiet: Quiet = False,
) -> None:
    """Write a sweep that has ended into a folder for a repository: table, claims, figures, rows."""
    from sweep.exchange.publication import publish as write
    from sweep.ledger.ledger import Ledger
    from sweep.sweepfile.expansion import load

    written = write(load(file), Ledger.existing(results), output, report=report)
    rows = count(written.trials, "row")
    note(f"{output}: {rows}, {written.size / 1e3:,.0f} kB; sweep merge takes it for a ledger")


@app.command(epilog="Example: sweep merge theirs.zip s3://bucket/results --into results")
def merge(
    ledgers: Annotated[
        list[str],
        typer.Argument(metavar="LEDGER...", help="Folders, buckets, bundles, or publications."),
    ],
    into: Into,
    prefer_first: Annotated[
        bool,
        typer.Option(
            "--prefer-first",
            help="Where figures differ for a reason, such as another device, keep the first ones.",
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Unite ledgers. One trial with two outcomes is refused before anything is written."""
    from sweep.exchange.merging import merge as unite

    _idle(into)
    merged = unite(ledgers, into, prefer_first=prefer_first)
    if as_json:
        show_json(_record(merged))
        return
    _show_merged(merged, into)


def _record(merged: Merged) -> dict[str, Any]:
    return {**vars(merged), "left_out": [one.record() for one in merged.left_out]}


def _show_merged(merged: Merged, into: str) -> None:
    counts = {
        "copied": merged.trials,
        "there already": merged.present,
        "in several ledgers with the same figures": merged.doubled,
        "left out": len(merged.left_out),
        "begun": merged.begun,
    }
    note(f"{into}: finished trials: {counted(counts)}")
    if merged.failures:
        note(f"  {count(merged.failures, 'note')} of failed attempts copied")
    for one in merged.left_out:
        say(f"  left out: {one}")


@app.command(epilog="Example: sweep upgrade old-results --into results")
def upgrade(
    old: Annotated[str, typer.Argument(metavar="OLD", help="A ledger, bundle or publication.")],
    into: Into,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write an older ledger anew in the layout of today. The old one stays as it is."""
    from sweep.exchange.merging import upgrade as renew

    _idle(into)
    done = renew(old, into)
    if as_json:
        show_json({**_record(done.merged), "stale": done.stale})
        return
    _show_merged(done.merged, into)
    for reason in done.stale:
        say(f"  {reason}")


def _idle(into: str) -> None:
    from sweep.execution.driver import DRIVER
    from sweep.ledger.ledger import Ledger

    ledger: Ledger = Ledger(into)
    if ledger.holders(DRIVER):
        raise UserError(
            f"{ledger.uri}: a run is under way; wait until it has ended, then try again"
        )
