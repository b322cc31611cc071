"""The cells of a sweep's table: what the ledger says of the trials at each row and column.

A cell is one config over its seeds. It says how many trials there are to be, how many there are,
what became of the others, the mean with its interval, the trivial baseline and, where the sweep
file names a reference, the published figure. A difference to that is drawn only where a trial's
config is the setting that the figure was measured in. The ledger stores fractions; accuracies in
cells are per cent.

Where the two may be compared, a cell has a verdict. It differs, if the published figure lies
outside our interval, widened by the table's tolerance and by the rounding of the figure as printed.
Else it is reproduced; but undecided while trials are still to come, with one seed, and where our
interval is wider than five tolerances to either side, which would agree with nearly anything. The
tolerance stands for what a published figure does not tell: its own seeds, and a last choice or two
of its authors.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

from fpt.backbones.sources import quantisation
from fpt.config import TrialConfig
from fpt.published import ACCURACY, Figure, Reference, differences, references
from fpt.spec import JSON
from sweep.analysis.convergence import Convergence, convergence, judged_split
from sweep.analysis.stats import Interval, t_interval
from sweep.ledger.causes import WAITS
from sweep.ledger.ledger import Ledger
from sweep.planning.plan import trained_by_other_code, trained_under_older_version
from sweep.planning.tuning import resolve
from sweep.sweepfile.metrics import is_accuracy, trivial, unit
from sweep.sweepfile.pairing import mixed_cell
from sweep.sweepfile.schema import CONVERGENCE, ConvergenceSpec, SweepFileError, TableSpec
from sweep.sweepfile.trials import Point, Sweep

State = Literal["done", "diverged", "provisional", "failed", "begun", "stale", "missing"]

Verdict = Literal["reproduced", "differs", "undecided", "not comparable"]

WIDEST = 5
"""Tolerances that the half-width of an interval may have for a figure to count as reproduced."""

STRONGER = "stronger_baseline_accuracy"
"""The column of what a learner gets that reads no order."""

BEST_SEEN = (
    "protocol paper: the best test accuracy that was seen in training, which lies above that of a "
    "checkpoint chosen without the test set, up to 12 points above a flat plateau"
)
"""What a reader of test accuracies under the paper's protocol has to know."""

FACTS = ("layers", "parameters", "parameters_trained")
"""Metrics that a trial's config fixes, whatever its seed and its pretraining."""

# Which of our metrics a published figure may stand beside, by its unit; and the columns that a
# reference whose columns are metrics has for ours.
_FITS: dict[str, tuple[str, ...]] = {
    ACCURACY: ("test_accuracy",),
    "gradient_steps": (CONVERGENCE, "steps_trained", "best_step"),
}
_PUBLISHED_METRICS = {
    "test_accuracy": "test",
    "training_set_accuracy": "train",
    "train_accuracy": "train",
    "layers": "layers",
    "parameters": "total_parameters",
    "parameters_trained": "trained_parameters",
}


def words(metric: str) -> str:
    """Return a metric as people write it: test accuracy."""
    return metric.replace("_", " ")


def test_predictions(config: TrialConfig) -> int | None:
    """Return the predictions that a test accuracy is a mean of; None if only the data tells."""
    if config.protocol == "paper":
        examples: int | None = config.evaluation.batches * config.batch_size
    else:
        examples = config.task.test_examples()
    return None if examples is None else examples * config.task.shape(config.protocol).positions


def display_value(metric: str, value: float) -> float:
    """Return a figure of the ledger in the unit of a table: accuracies per cent."""
    # Times 100 they end in a tail of binary digits: noise in a CSV, so it is rounded off.
    return round((100 if is_accuracy(metric) else 1) * value, 9)


@dataclass(frozen=True)
class Trivial:
    """What a rule that learns nothing has of a metric."""

    figure: float
    """In the unit of the table."""
    rule: str
    """The rule, in a few words."""


@dataclass(frozen=True)
class Cell:
    """The trials at one row and one column, and one metric of theirs."""

    row: str
    column: str
    """A label of the columns' axis; "" in a table whose columns are metrics alone."""
    metric: str
    points: tuple[Point, ...]
    """The trials that the sweep has here: one config, a seed each."""
    counts: Mapping[str, int]
    """Trials by what became of them: done, diverged, failed, begun (a state was saved), stale
    (trained by other code, or under another version), missing."""
    values: tuple[float, ...]
    """The metric of those that have it, in the unit of the table, in the order of `points`. A
    diverged trial's are its last good figures."""
    failures: tuple[str, ...]
    """What failed each failed trial: `code, OverflowError`."""
    stale: tuple[str, ...]
    """Why each stale trial is."""
    unconverged: tuple[str, ...]
    """Why each trial that is done and not converged has no steps to convergence; of other metrics,
    none."""
    baseline: Trivial | None
    """The trivial baseline; None if unknown or not of this metric."""
    stronger: Trivial | None
    """A learner that reads no order, likewise."""
    figure: Figure | None
    """The published figure that belongs here."""
    differs: tuple[str, ...]
    """In what the trials differ from the setting of the figure."""
    tolerance: float
    """How far from the published figure counts as reproduced: points of an accuracy, per cent of
    the figure of all else."""
    accumulated: Mapping[int, int]
    """Parts that a batch was computed in, for want of memory -> trials of which that holds."""
    devices: Mapping[str, int]
    """Device (cpu, cuda) -> trials that ended on it."""

    @property
    def unit(self) -> str:
        """What its figures are in: per cent, nats, or "" for what is a mere number."""
        return unit(self.metric, self.points[0].like)

    @property
    def expected(self) -> int:
        """N: the trials that the sweep has here."""
        return len(self.points)

    @property
    def finished(self) -> int:
        """Those that are done, or diverged."""
        return self.counts["done"] + self.counts["diverged"]

    @property
    def state(self) -> State:
        """One word for the cell."""
        if self.finished == self.expected:
            return "diverged" if self.counts["diverged"] else "done"
        if self.finished:
            return "provisional"
        open_: tuple[State, ...] = ("failed", "begun", "stale")
        return next((state for state in open_ if self.counts[state]), "missing")

    @functools.cached_property
    def interval(self) -> Interval | None:
        """Mean and 95 % interval over the values; None if there is none."""
        return t_interval(self.values) if self.values else None

    @property
    def comparable(self) -> bool:
        """Whether a difference to the published figure means anything."""
        return self.figure is not None and self.figure.verified and not self.differs

    @property
    def difference(self) -> float | None:
        """Our mean minus the published figure, in the unit of the table; None if not comparable."""
        if self.figure is None or self.interval is None or not self.comparable:
            return None
        return self.interval.mean - self.figure.number

    @property
    def verdict(self) -> Verdict | None:
        """What is to be said of the published figure; None without one, or with none of ours."""
        if self.figure is None:
            return None
        if not self.comparable:
            return "not comparable"
        interval, difference = self.interval, self.difference
        if interval is None or difference is None:
            return None
        if interval.half_width is None or self.finished < self.expected:
            return "undecided"
        tolerance = self.tolerance
        if not is_accuracy(self.metric):
            tolerance *= abs(self.figure.number) / 100
        if abs(difference) > interval.half_width + tolerance + self.figure.rounding:
            return "differs"
        return "reproduced" if interval.half_width <= WIDEST * tolerance else "undecided"

    def record(self) -> JSON:
        """Return all of it as flat JSON values, with lists where there is more than one."""
        interval, figure, baseline = self.interval, self.figure, self.baseline
        return {
            "row": self.row,
            "column": self.column,
            "metric": self.metric,
            "unit": told(self.unit),
            "state": self.state,
            "expected": self.expected,
            **self.counts,
            "n": len(self.values),
            "mean": interval.mean if interval else None,
            "half_width": interval.half_width if interval else None,
            "values": list(self.values),
            "baseline": baseline.figure if baseline else None,
            "baseline_rule": baseline.rule if baseline else None,
            "stronger_baseline": self.stronger.figure if self.stronger else None,
            "stronger_baseline_rule": self.stronger.rule if self.stronger else None,
            "published": figure.number if figure else None,
            "published_trust": figure.trust if figure else None,
            "published_note": figure.note or None if figure else None,
            "difference": self.difference,
            "verdict": self.verdict,
            "not_comparable": list(self.differs),
            "failures": list(self.failures),
            "unconverged": list(self.unconverged),
            "accumulated": sum(self.accumulated.values()),
            "devices": list(self.devices),
            "trials": [point.trial_id for point in self.points],
        }


def traits(points: Sequence[Point]) -> tuple[str, ...]:
    """Return what is to be known of the trials of one config, a seed each.

    What their seeds have in common, and so an interval leaves out; a numerics class other than the
    usual one; weights that were quantised.
    """
    config = points[0].config
    out = []
    if len(points) > 1 and config.parent:
        out.append(
            "its seeds share one pretrained backbone: the intervals leave out that pretraining"
        )
    elif len(points) > 1 and config.drawn_from is not None and config.backbone_seed is not None:
        out.append(
            f"its seeds share one drawn backbone (backbone_seed {config.backbone_seed}): the "
            "intervals leave out the draw"
        )
    if config.numerics != "fp32":
        out.append(f"numerics {config.numerics}")
    if config.reads_weights and (kind := quantisation(config.backbone.weights or "")):
        out.append(f"weights quantised to {kind}, as their GGUF file has them")
    return tuple(out)


Grid = Mapping[tuple[str, str, str], Cell]
"""(row, column, metric) -> cell, in the order of the sweep file; a combination that the sweep
leaves out is not in it."""


def declared(sweep: Sweep) -> TableSpec:
    """Return what the sweep file says of its table.

    Raises:
        SweepFileError: If it asks for none.
    """
    if sweep.table is None:
        example = "table: {rows: pretraining, columns: task}"
        raise SweepFileError(
            [f"{sweep.file}: table: missing; add one, such as `{example}`, over its axes"]
        )
    return sweep.table


def grid(sweep: Sweep, spec: TableSpec, ledger: Ledger) -> Grid:
    """Return the cells of a table over a sweep, from what the ledger holds.

    Raises:
        SweepFileError: If a cell would mix configs.
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    sweep = resolve(sweep, ledger)
    axes = (spec.rows,) if spec.columns is None else (spec.rows, spec.columns)
    places: dict[tuple[str, ...], list[Point]] = {}
    for point in sweep.points:
        place = tuple([point.labels[axis] for axis in axes if axis in point.labels])
        if len(place) == len(axes):
            places.setdefault(place, []).append(point)
    _check_places(sweep, axes, places)

    metrics = spec.metrics
    inside = [point for points in places.values() for point in points]
    found = TrialResults.read(ledger, inside, metrics, spec.convergence)
    reference = references()[spec.reference] if spec.reference else None
    out: dict[tuple[str, str, str], Cell] = {}
    for place, points in places.items():
        row, column = place[0], "".join(place[1:])
        names = [
            spec.labels.get(axis, {}).get(label, label)
            for axis, label in zip(axes, place, strict=True)
        ]
        for metric in metrics:
            figure = _figure(reference, names, metric)
            out[row, column, metric] = _cell(
                row, column, metric, points, figure, found, spec.tolerance
            )
    return out


def _check_places(
    sweep: Sweep, axes: Sequence[str], places: Mapping[tuple[str, ...], Sequence[Point]]
) -> None:
    # The choices of a cell's tuning may differ; what was chosen for is one cell all the same.
    tuned = {point.label: study.cell_id for study in sweep.studies for point in study.points}
    for place, points in places.items():
        own = points
        if tuned:
            own = [replace(one, cell_id=tuned.get(one.label, one.cell_id)) for one in points]
        if mixed := mixed_cell(place, own, axes, sweep.axes):
            raise SweepFileError([f"{sweep.file}: table: {mixed}"])


@dataclass(frozen=True)
class TrialResults:
    """What the ledger knows of trials, as far as their figures go."""

    rows: Mapping[str, int]
    """Trial -> the number of its row."""
    columns: Mapping[str, Sequence[Any]]
    """Name -> what the rows hold, as far as it is needed here."""
    failed: Mapping[str, str]
    """Trial -> what failed it: `code, OverflowError`."""
    begun: Collection[str]
    """Trials that have a saved state; of those that are not done."""
    stale: Mapping[str, str]
    """Trial -> why what was trained of it does not count, and how to train it anew."""
    converged: Mapping[str, Convergence]
    """Trial -> when it had converged; only of those that are done, where a table asks for it."""

    @classmethod
    def read(
        cls,
        ledger: Ledger,
        points: Sequence[Point],
        metrics: Sequence[str],
        rule: ConvergenceSpec,
    ) -> TrialResults:
        """Read what is known of some trials.

        Args:
            ledger: The ledger.
            points: The trials.
            metrics: What is asked for.
            rule: When a trial counts as converged.

        Raises:
            sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
        """
        columns = [metric for metric in metrics if metric != CONVERGENCE]
        names = ["trial_id", "outcome", "device", "accumulation", "baseline_rule"]
        names += [one for one in dict.fromkeys(map(trivial, metrics)) if one is not None]
        names += [STRONGER, "stronger_baseline_rule"]
        other = trained_by_other_code(points, ledger)  # as if they had no row
        ids = [point.trial_id for point in points if point.trial_id not in other]
        table = ledger.trials(ids, columns=[*names, *columns])
        own = table.to_pydict()
        rows = {trial_id: row for row, trial_id in enumerate(own["trial_id"])}
        converged: Mapping[str, Convergence] = {}
        if CONVERGENCE in metrics:
            ended = [point for point in points if point.trial_id in rows]
            done = [p for p in ended if own["outcome"][rows[p.trial_id]] == "done"]
            converged = _converged(ledger, done, rule)
        unfinished = [point.trial_id for point in points if point.trial_id not in rows]
        if not unfinished:
            return cls(rows, own, {}, (), {}, converged)
        failed = _waiting_failures(ledger, unfinished)
        open_ = {p.trial_id: p for p in points if p.trial_id not in rows and not p.undecided}
        others = [p for name, p in open_.items() if name not in failed and name not in other]
        stale = other | trained_under_older_version(others, ledger, ledger.done())
        return cls(rows, own, failed, ledger.states(), stale, converged)

    def value(self, trial_id: str, metric: str) -> float | None:
        """Return the metric of a trial that has ended, as the ledger has it; None: it has none."""
        if metric == CONVERGENCE:
            found = self.converged.get(trial_id)
            return None if found is None else found.step
        value: float | None = self.columns[metric][self.rows[trial_id]]
        return value

    def parts(self, trial_id: str) -> int:
        """Return the parts that each batch of a trial that has ended was computed in."""
        return self.columns["accumulation"][self.rows[trial_id]] or 1

    def device(self, trial_id: str) -> str | None:
        """Return where a trial that has ended was trained, cpu or cuda; None if its row is mute."""
        device: str | None = self.columns["device"][self.rows[trial_id]]
        return device

    def fate(self, trial_id: str) -> str:
        """Return what became of a trial: done, diverged, failed, stale, begun or missing."""
        if trial_id in self.rows:
            outcome = self.columns["outcome"][self.rows[trial_id]]
            return "diverged" if outcome == "diverged" else "done"
        if trial_id in self.failed:
            return "failed"
        if trial_id in self.stale:
            return "stale"
        return "begun" if trial_id in self.begun else "missing"


def _cell(
    row: str,
    column: str,
    metric: str,
    points: Sequence[Point],
    figure: Figure | None,
    found: TrialResults,
    tolerance: float,
) -> Cell:
    counts = dict.fromkeys(("done", "diverged", "failed", "begun", "stale", "missing"), 0)
    counts |= Counter(found.fate(point.trial_id) for point in points)
    ended = [p.trial_id for p in points if p.trial_id in found.rows]
    rows = [found.rows[trial_id] for trial_id in ended]
    measured = [found.value(trial_id, metric) for trial_id in ended]
    values = [display_value(metric, one) for one in measured if is_number(one)]
    baseline = _baseline(found, rows, metric, trivial(metric) or "", "baseline_rule")
    stronger = None
    if is_accuracy(metric):
        stronger = _baseline(found, rows, metric, STRONGER, "stronger_baseline_rule")
    open_ = [point.trial_id for point in points if point.trial_id not in found.rows]
    failures = [found.failed[trial_id] for trial_id in open_ if trial_id in found.failed]
    converged = [found.converged[i] for i in ended if i in found.converged]
    unconverged = [one.reason for one in converged if metric == CONVERGENCE and one.step is None]
    parts = Counter(parts for parts in map(found.parts, ended) if parts > 1)
    devices = Counter(sorted(filter(None, map(found.device, ended))))
    known = not points[0].undecided
    differs = differences(figure, points[0].config, rate_known=known) if figure else ()
    if figure and unconverged:
        differs = (*differs, "trials that did not converge are left out")
    return Cell(
        row=row,
        column=column,
        metric=metric,
        points=tuple(points),
        counts=counts,
        values=tuple(values),
        failures=tuple(failures),
        stale=tuple(found.stale[i] for i in open_ if found.fate(i) == "stale"),
        unconverged=tuple(unconverged),
        baseline=baseline,
        stronger=stronger,
        figure=figure,
        differs=differs,
        tolerance=tolerance,
        accumulated=parts,
        devices=devices,
    )


def _baseline(
    found: TrialResults, rows: Sequence[int], metric: str, column: str, rule: str
) -> Trivial | None:
    # The first that a row knows, in the unit of the metric.
    figures, rules = found.columns.get(column, ()), found.columns[rule]
    known = (row for row in (rows if figures else ()) if is_number(figures[row]))
    return next(
        (Trivial(display_value(metric, figures[row]), rules[row] or "") for row in known), None
    )


def told(unit_: str) -> str | None:
    """Return a unit as records name it: nats never were."""
    return None if unit_ in ("", "nats") else unit_


def is_number(value: float | None) -> TypeGuard[float]:
    """Return whether a figure is there, and finite."""
    return value is not None and math.isfinite(value)


def _converged(
    ledger: Ledger, points: Sequence[Point], rule: ConvergenceSpec
) -> dict[str, Convergence]:
    split = {p.trial_id: judged_split(p.like.protocol) for p in points}
    curves: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in split}
    names = ["trial_id", "split", "step", "accuracy"]
    read = ledger.curves(list(split), columns=names).to_pydict()  # by trial, split and step
    for trial_id, of, step, accuracy in zip(*(read[name] for name in names), strict=True):
        if of == split[trial_id] and is_number(accuracy):
            curves[trial_id][0].append(step)
            curves[trial_id][1].append(accuracy)
    return {
        name: convergence(*curve, tolerance=rule.tolerance, smoothing=rule.smoothing)
        for name, curve in curves.items()
    }


def _waiting_failures(ledger: Ledger, trial_ids: Collection[str]) -> dict[str, str]:
    # Trial -> `cause, exception` of those that wait for `sweep retry`. What the environment did
    # (memory, worker, storage, an interrupt) is run again anyway: such a trial is merely missing.
    return {
        trial: ", ".join(filter(None, (row["cause"], row["exception"])))
        for trial, row in ledger.last_failures(trial_ids).items()
        if row["cause"] in WAITS
    }


def _figure(reference: Reference | None, names: Sequence[str], metric: str) -> Figure | None:
    if reference is None:
        return None
    row, column = names[0], "".join(names[1:])
    figure = reference.figures.get((row, column))
    if figure is not None and metric in _FITS.get(figure.unit, ()):
        return figure
    return reference.figures.get((row, _PUBLISHED_METRICS.get(metric, "")))
