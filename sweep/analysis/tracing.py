"""From a printed figure back to its trials: what they are, how they ran, how to run them again.

A figure of a table is a mean over the seeds of one config. A `Trace` holds that arithmetic, each
trial with its row, its failures and its run in MLflow, and the pretrainings whose backbones they
take. What all have in common is said once; what differs, per trial.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fpt.spec import JSON
from sweep.analysis.accounting import Usage, spent_on
from sweep.analysis.cells import Cell, declared, grid
from sweep.ledger.causes import MARKS
from sweep.ledger.columns import ORIGIN
from sweep.ledger.ledger import Ledger
from sweep.planning.plan import Status, plan
from sweep.planning.tuning import resolve
from sweep.sweepfile.schema import SweepFileError, TableSpec
from sweep.sweepfile.trials import Point, Sweep


@dataclass(frozen=True)
class Member:
    """A trial behind a figure, or a pretraining behind that."""

    point: Point
    status: Status
    why: str
    """A short reason, where the status does not say all."""
    value: float | None
    """Its part in the figure, in the unit of the table; None if it has none."""
    row: Mapping[str, Any] | None
    """Its row of the ledger, once it has ended."""
    failures: tuple[Mapping[str, Any], ...]
    """Rows of its failed attempts, in the order of time."""
    run: str | None
    """`experiments/1/runs/<id>?...` in the MLflow of this ledger, where there is one."""

    @property
    def config(self) -> dict[str, Any]:
        """Its config: dotted path -> value, as it was trained."""
        identity = json.loads(self.row["config"]) if self.row else self.point.identity
        return dict(_leaves(identity))

    @property
    def provenance(self) -> dict[str, Any]:
        """Column of `ORIGIN` -> value; empty until it has ended."""
        if self.row is None:
            return {}
        found = {name: self.row[name] for name in ORIGIN if self.row[name] is not None}
        versions = json.loads(found.pop("versions", "{}"))
        return found | {f"version of {name}": value for name, value in versions.items()}

    def record(self) -> JSON:
        """As JSON values; a failure without its traceback."""
        left_out = ("config", "traceback", "trial_id")
        return {
            "trial_id": self.point.trial_id,
            "label": self.point.label,
            "seed": self.point.config.seed,
            "status": self.status,
            "why": self.why or None,
            "value": self.value,
            "row": None if self.row is None else _plain(self.row),
            "failures": [
                _plain({name: one for name, one in row.items() if name not in left_out})
                for row in self.failures
            ],
            "mlflow_run": self.run,
        }


@dataclass(frozen=True)
class Trace:
    """A figure, and all that is behind it."""

    cell: Cell
    members: tuple[Member, ...]
    """The trials of the cell."""
    pretrainings: tuple[Member, ...]
    """The trials whose backbones they take, nearest first."""
    spent: Usage
    """What all of these have cost."""
    again: str
    """The command that trains just these anew, into a ledger of their own."""
    compare: str
    """The command that tells whether the same came out."""

    @property
    def arithmetic(self) -> str:
        """How the figure comes about, in a line; empty if there is none."""
        interval, values = self.cell.interval, self.cell.values
        if interval is None:
            return ""
        n = len(values)
        unit = self.cell.record()["unit"]
        told = f"mean of {n} value{'' if n == 1 else 's'}{f', {unit}' if unit else ''}"
        told += f" = {interval.mean:.10g}"
        if interval.half_width is None:
            return f"{told}; one value says nothing of its spread"
        deviation = statistics.stdev(values)
        told += f"; 95 % interval ± {interval.half_width:.6g}"
        if deviation:
            quantile = interval.half_width * math.sqrt(n) / deviation
            told += (
                f" = {quantile:.4g} * {deviation:.6g} / sqrt({n}): the t quantile of {n - 1} "
                "degrees of freedom, the standard deviation, the number of values"
            )
        return told

    def record(self) -> JSON:
        """As JSON values."""
        config, configs = common([one.config for one in self.members])
        origin, origins = common([one.provenance for one in self.members])
        return {
            "cell": self.cell.record(),
            "arithmetic": self.arithmetic or None,
            "config": config,
            "provenance": origin,
            "trials": [
                one.record() | {"config": own, "provenance": theirs}
                for one, own, theirs in zip(self.members, configs, origins, strict=True)
            ],
            "pretrainings": [
                one.record() | {"config": one.config, "provenance": one.provenance}
                for one in self.pretrainings
            ],
            "spent": asdict(self.spent),
            "again": self.again,
            "compare": self.compare,
        }


def common(
    records: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what records have in common, and what each has besides; empty records have no say."""
    told = [one for one in records if one]
    first: Mapping[str, Any] = told[0] if told else {}
    shared = {
        name: value
        for name, value in first.items()
        if all(name in one and one[name] == value for one in told)
    }
    return shared, [{k: v for k, v in one.items() if k not in shared} for one in records]


def trace(
    sweep: Sweep,
    ledger: Ledger,
    row: str,
    column: str,
    metric: str | None = None,
    *,
    runs_of: Callable[[Sequence[str]], Mapping[str, str]] = lambda ids: {},
) -> Trace:
    """Return what is behind a figure of a sweep's table.

    Args:
        sweep: The sweep.
        ledger: Where its rows are.
        row: The label of the table's row.
        column: The label of its column; the metric, in a table whose columns are metrics alone.
        metric: Which metric of that column. Default: the first one.
        runs_of: Trial ids -> the MLflow run of each that has one.

    Raises:
        SweepFileError: If there is no table, no such row or column, or no trial at them.
        LedgerError: If the ledger cannot be read.
    """
    sweep = resolve(sweep, ledger)
    cell = _cell(sweep, ledger, row, column, metric)
    ids = [point.trial_id for point in cell.points]
    part = sweep.only(ids)
    planned = plan(part, ledger)
    # A pretraining may be a point of the axes too, so that the parents are followed by hand.
    points = {point.trial_id: point for point in part.all}
    behind = _behind(cell.points, points)
    known = [*ids, *(point.trial_id for point in behind)]
    rows = {own["trial_id"]: own for own in ledger.trials(known).to_pylist()}
    failures = ledger.failures(known).sort_by("at").to_pylist()
    runs = runs_of(known)

    def member(point: Point, value: float | None) -> Member:
        name = point.trial_id
        return Member(
            point=point,
            status=planned.status[name],
            why=planned.why.get(name, ""),
            value=value,
            row=rows.get(name),
            failures=tuple(
                one for one in failures if one["trial_id"] == name and one["cause"] not in MARKS
            ),
            run=runs.get(name),
        )

    values = _values(sweep, declared(sweep), ledger, cell)
    file, fresh = shlex.quote(str(sweep.file)), _fresh(ledger)
    only = " ".join(f"--only {shlex.quote(one)}" for one in _patterns(sweep, cell.points))
    return Trace(
        cell=cell,
        members=tuple(member(point, values.get(point.trial_id)) for point in cell.points),
        pretrainings=tuple(member(point, None) for point in behind),
        spent=spent_on(known, ledger),
        again=f"sweep run {file} {only} --results {fresh}",
        compare=f"sweep diff {shlex.quote(_shown(ledger))} {fresh} {file} {only}",
    )


def _cell(sweep: Sweep, ledger: Ledger, row: str, column: str, metric: str | None) -> Cell:
    spec = declared(sweep)
    metrics = spec.metrics
    axes = (spec.rows,) if spec.columns is None else (spec.rows, spec.columns)
    inside = [point for point in sweep.points if all(axis in point.labels for axis in axes)]
    place = [_chosen(sweep, "row", row, [point.labels[spec.rows] for point in inside])]
    if spec.columns is None:
        if metric is not None:
            problem = "the columns of this table are metrics; name one as COLUMN, without --metric"
            raise SweepFileError([f"{sweep.file}: table: {problem}"])
        metric = _chosen(sweep, "column", column.replace(" ", "_"), metrics)
    else:
        labels = [point.labels[spec.columns] for point in inside]
        place.append(_chosen(sweep, "column", column, labels))
        metric = _chosen(sweep, "metric", (metric or metrics[0]).replace(" ", "_"), metrics)
    there = [point for point in inside if [point.labels[axis] for axis in axes] == place]
    if not there:
        problem = f"the sweep leaves out {' / '.join(place)}, so that no trial is there"
        raise SweepFileError([f"{sweep.file}: table: {problem}"])
    return _of(sweep, spec, ledger, there, (place[0], "".join(place[1:]), metric))


def _of(
    sweep: Sweep,
    spec: TableSpec,
    ledger: Ledger,
    points: Iterable[Point],
    place: tuple[str, str, str],
) -> Cell:
    # A cell of the sweep as if it had no other trials.
    return grid(replace(sweep, points=tuple(points)), spec, ledger)[place]


def _values(sweep: Sweep, spec: TableSpec, ledger: Ledger, cell: Cell) -> dict[str, float]:
    # Trial -> its part in a cell, by the same rules.
    place = (cell.row, cell.column, cell.metric)
    alone = {p.trial_id: _of(sweep, spec, ledger, [p], place).values for p in cell.points}
    return {trial: values[0] for trial, values in alone.items() if values}


def _chosen(sweep: Sweep, what: str, given: str, allowed: Iterable[str]) -> str:
    names = list(dict.fromkeys(allowed))
    if given in names:
        return given
    close = difflib.get_close_matches(given, names, n=1)
    meant = f"did you mean {close[0]!r}; " if close else ""
    listed = ", ".join(names) or "none"
    problem = f"{sweep.file}: table: no {what} {given!r}; {meant}{what}s: {listed}"
    raise SweepFileError([problem])


def _behind(members: Iterable[Point], points: Mapping[str, Point]) -> tuple[Point, ...]:
    found: dict[str, Point] = {}
    nearest = list(members)
    while nearest:
        parents = dict.fromkeys(point.parent for point in nearest)
        nearest = [points[n] for n in parents if n is not None and n in points and n not in found]
        found |= {point.trial_id: point for point in nearest}
    return tuple(found.values())


def _patterns(sweep: Sweep, points: Sequence[Point]) -> list[str]:
    # What `--only` needs to mean these trials and no others: one glob, if that does. It holds in a
    # fresh ledger too, where the trials of what is tuned have yet to get their ids.
    columns = zip(*(point.labels.values() for point in points), strict=True)
    pattern = "/".join(glob.escape(own[0]) if len(set(own)) == 1 else "*" for own in columns)
    ids = [point.trial_id for point in points]
    with contextlib.suppress(SweepFileError):
        if {point.trial_id for point in sweep.matching(pattern)} == set(ids):
            return [pattern]
    return [point.label for point in points] if sweep.studies else ids


def _shown(ledger: Ledger) -> str:
    folder = ledger.local
    if folder is not None and folder.is_relative_to(Path.cwd()):
        return str(folder.relative_to(Path.cwd()))
    return ledger.uri


def _fresh(ledger: Ledger) -> str:
    # A folder that is not there yet: a trial that is done would not run again.
    name = _shown(ledger) if ledger.local else "results"
    number = 1
    while Path(fresh := f"{name}-again{number if number > 1 else ''}").exists():
        number += 1
    return shlex.quote(fresh)


def _leaves(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else name)
    else:
        yield path, value


def _plain(row: Mapping[str, Any]) -> JSON:
    # JSON has no NaN and no time.
    return {
        name: str(value)
        if hasattr(value, "isoformat") or (isinstance(value, float) and not math.isfinite(value))
        else value
        for name, value in row.items()
    }
