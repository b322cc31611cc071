"""What figures draw: the cells of a sweep, each in a panel, with the figures of its trials.

The panels are the points of the table's columns, the series those of its rows: a figure shows what
the table shows. A sweep without a table has a panel for each task.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fpt.config import TrialConfig
from sweep.analysis.figures.style import SERIES
from sweep.analysis.stats import Interval, t_interval
from sweep.ledger.ledger import Ledger
from sweep.planning.plan import trained_by_other_code
from sweep.planning.tuning import resolve
from sweep.sweepfile.metrics import declared
from sweep.sweepfile.trials import Point, Sweep

if TYPE_CHECKING:
    from sweep.analysis.claims import Judged

PANELS = 9
"""Panels of a figure, at most."""

SEEDS = 10
"""Trials of a cell whose curves are read, at most."""

_KEYS = ("trial_id", "split")
_COLUMNS = ("trial_id", "outcome", "parameters", "parameters_trained")


@dataclass(frozen=True)
class Measure:
    """What figures of a sweep show of its trials."""

    name: str
    """accuracy, loss, or a metric that the task declares."""
    unit: str
    """As axes have it: %, nats, or ""."""
    higher: bool
    """Whether more of it is better."""

    @property
    def scale(self) -> int:
        """What figures of the ledger are multiplied by."""
        return 100 if self.name == "accuracy" else 1

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest that there can be."""
        return (0, 100) if self.name == "accuracy" else (-math.inf, math.inf)

    @property
    def columns(self) -> tuple[str, str, str]:
        """Where the ledger has it: on the test split, the validation split, of the baseline."""
        return f"test_{self.name}", f"validation_{self.name}", f"baseline_{self.name}"

    def axis(self, words: str) -> str:
        """The words of an axis, with the unit."""
        return f"{words}, {self.unit}" if self.unit else words

    def told(self, value: float) -> str:
        """A figure as descriptions have it."""
        return f"{value:.1f}" if self.name == "accuracy" else f"{value:.3g}"


def measure(sweep: Sweep) -> Measure:
    """Return what figures of a sweep show: the metric of its table where a task declares that; else
    accuracy, if any task is of classes; else the first metric of its tasks, or the loss.
    """
    first = "" if sweep.table is None else sweep.table.metrics[0]
    configs = [point.like for point in sweep.points]
    own = next(filter(None, (declared(first, one) for one in configs)), None)
    classes = any(one.task.shape(one.protocol).classes for one in configs) or not configs
    if own is None and classes:
        return Measure("accuracy", "%", higher=True)
    if own is None:
        own = next((found for one in configs for found in one.task.metrics(one.protocol)), None)
    if own is not None:
        return Measure(own.name, own.unit, higher=own.better == "higher")
    return Measure("loss", "squared error", higher=False)


@dataclass(frozen=True)
class Arm:
    """A cell of the sweep: one config over its seeds."""

    panel: str
    series: str
    """What tells it from the other arms of its panel: labels."""
    points: tuple[Point, ...]

    @property
    def name(self) -> str:
        """Panel and series in one."""
        return " / ".join(filter(None, (self.panel, self.series)))

    @property
    def config(self) -> TrialConfig:
        """The config of the first of its trials."""
        return self.points[0].config


class Curves:
    """A figure along the curves of some trials, read once."""

    def __init__(self, ledger: Ledger, trials: Sequence[str], name: str = "accuracy") -> None:
        """Read the curves of trials, also of those that are still training."""
        table = ledger.curves(trials, columns=["trial_id", "split", "step", name])
        self._step = table.column("step").to_numpy()
        self._values = table.column(name).to_numpy()
        self._runs: dict[tuple[str, str], slice] = {}
        # Rows come by trial, then split, then step: where either changes a run begins.
        names = [table.column(name).combine_chunks().dictionary_encode() for name in _KEYS]
        codes = [name.indices.to_numpy(zero_copy_only=False) for name in names]
        changes = np.logical_or.reduce([code[1:] != code[:-1] for code in codes])
        bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), table.num_rows]
        words = [name.dictionary.to_pylist() for name in names]
        for begin, end in itertools.pairwise(bounds):
            if begin < end:
                key = (words[0][codes[0][begin]], words[1][codes[1][begin]])
                self._runs[key] = slice(begin, end)

    def of(self, trial: str, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps at which a trial has a finite figure, and these figures."""
        run = self._runs.get((trial, split), slice(0, 0))
        finite = np.isfinite(self._values[run])
        return self._step[run][finite], self._values[run][finite]


@dataclass(frozen=True)
class Material:
    """A sweep with what the ledger has of its trials, as far as figures need it."""

    sweep: Sweep
    ledger: Ledger
    across: str | None
    """The axis whose points are the panels."""
    along: tuple[str, ...]
    """The other axes on which cells differ: their labels name the series."""
    arms: tuple[Arm, ...] = ()
    """In the order of the sweep file."""

    def place(self, labels: Mapping[str, str]) -> tuple[str, str]:
        """Return the panel and the series of a cell, by its labels."""
        panel = labels.get(self.across, "") if self.across else ""
        series = " / ".join(labels[axis] for axis in self.along if axis in labels)
        return panel, series or self.sweep.name

    @functools.cached_property
    def rows(self) -> Mapping[str, Mapping[str, Any]]:
        """Trial -> some columns of its row; a trial without a row has not ended."""
        points = [point for arm in self.arms for point in arm.points]
        other = trained_by_other_code(points, self.ledger)  # as if they had no row
        ids = [point.trial_id for point in points if point.trial_id not in other]
        columns = dict.fromkeys((*_COLUMNS, *self.measure.columns))
        table = self.ledger.trials(ids, columns=list(columns))
        return {row["trial_id"]: row for row in table.to_pylist()}

    @functools.cached_property
    def measure(self) -> Measure:
        """What figures show."""
        return measure(self.sweep)

    @functools.cached_property
    def shown(self) -> tuple[Arm, ...]:
        """The arms of the first panels and series, each with its first trials."""
        panels = list(dict.fromkeys(arm.panel for arm in self.arms))[:PANELS]
        series = list(dict.fromkeys(arm.series for arm in self.arms))[:SERIES]
        return tuple(
            replace(arm, points=arm.points[:SEEDS])
            for arm in self.arms
            if arm.panel in panels and arm.series in series
        )

    @functools.cached_property
    def judged(self) -> Judged:
        """The claims of the sweep, judged to be shown."""
        from sweep.analysis.claims import show

        return show(self.sweep, self.ledger)

    @property
    def left_out(self) -> tuple[str, ...]:
        """What `shown` leaves out, in words."""
        arms = len(self.arms) - len(self.shown)
        seeds = sum(len(arm.points) > SEEDS for arm in self.arms)
        notes = [f"{arms:,} of {len(self.arms):,} cells are left out"] if arms else []
        return (*notes, *[f"of each cell the first {SEEDS} trials count"] * bool(seeds))

    @functools.cached_property
    def curves(self) -> Curves:
        """The curves of `shown`."""
        trials = [point.trial_id for arm in self.shown for point in arm.points]
        return Curves(self.ledger, trials, self.measure.name)

    def values(self, arm: Arm, metric: str) -> list[float]:
        """Return the finite values of a metric that the trials of an arm have."""
        found = (self.rows[p.trial_id][metric] for p in arm.points if p.trial_id in self.rows)
        return [value for value in found if value is not None and math.isfinite(value)]

    def interval(self, arm: Arm, metric: str) -> Interval | None:
        """Return the mean of the measure over an arm's trials, in its unit; None: none has one."""
        values = self.values(arm, metric)
        return t_interval([self.measure.scale * value for value in values]) if values else None

    def baseline(self, panel: str) -> float | None:
        """Return the trivial baseline of a panel, in the measure's unit, if it has just one."""
        found = {
            value
            for arm in self.arms
            if arm.panel == panel
            for value in self.values(arm, self.measure.columns[2])[:1]
        }
        return self.measure.scale * found.pop() if len(found) == 1 else None


def gather(sweep: Sweep, ledger: Ledger) -> Material:
    """Return the arms of a sweep; most of the ledger is read once something of it is asked for.

    Raises:
        LedgerError: If the ledger cannot be read.
    """
    sweep = resolve(sweep, ledger)
    cells: dict[str, list[Point]] = {}
    for point in sweep.points:
        cells.setdefault(point.cell_id, []).append(point)
    # An axis on which trials of one cell lie at different points is one of seeds, and one on which
    # all cells lie at the same point tells nothing.
    seeds = {
        axis
        for points in cells.values()
        for axis in sweep.axes
        if len({point.labels.get(axis) for point in points}) > 1
    }
    firsts = [points[0] for points in cells.values()]
    telling = [
        axis
        for axis in sweep.axes
        if axis not in seeds and len({point.labels.get(axis) for point in firsts}) > 1
    ]
    columns = None if sweep.table is None else sweep.table.columns
    across = next((axis for axis in (columns, "task") if axis in telling), None)
    material = Material(sweep, ledger, across, tuple(axis for axis in telling if axis != across))
    return replace(
        material,
        arms=tuple(
            Arm(*material.place(points[0].labels), tuple(points)) for points in cells.values()
        ),
    )
