"""What the claims of a file can find, before anything is trained.

For each contrast: the smallest difference that its plan decides with a chance of 0.8, and how many
seeds would find 1, 3 and 10 points, at the level that Holm's correction leaves at worst. The spread
over seeds is that of the contrast's own cells in the ledger, else of all rows of the task there,
else of the task's rows that this repository publishes, where it is at hand: other sizes and
budgets, and so a first guess. Without any there is no answer. Outcomes are taken for normal: where
they fall into groups, more is needed (`sweep.analysis.stats`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fpt.spec import JSON
from sweep.analysis import looks
from sweep.analysis.cells import display_value, is_number
from sweep.analysis.contrasts import LEAST_PAIRS
from sweep.analysis.stats import LEVEL, POWER, pairs_needed, power
from sweep.ledger.ledger import Ledger
from sweep.sweepfile import pairing
from sweep.sweepfile.metrics import is_accuracy
from sweep.sweepfile.schema import CONVERGENCE, ClaimSpec
from sweep.sweepfile.trials import Point, Sweep

POINTS = (10.0, 3.0, 1.0)
"""Differences of accuracies of which the seeds are counted, in points."""

PUBLISHED = Path(__file__).parents[2] / "results/published"
"""Rows that came with the repository; an installed package has none."""

ENOUGH = 3
"""Cells of a task with a spread, from which its usual one is taken."""


@dataclass(frozen=True)
class Foresight:
    """What a contrast can find."""

    claim: str
    place: Mapping[str, str]
    pairs: int
    """Pairs of its last reading."""
    level: float
    """The level of that reading."""
    spread: float | None
    """Deviation of a difference of two seeds, one of each side, in the unit of a table; None: the
    ledger has nothing to know it by."""
    known_by: str
    """What the spread is known by: its own cells, the task, or published rows of the task."""
    smallest: float | None
    """The smallest difference that is found with a chance of 0.8; None if it is not known."""
    seeds: Mapping[str, int | None]
    """Points of difference -> seeds of each side that find it; None: more than anybody has."""
    seconds: float | None
    """Seconds that a further seed takes, both sides together."""

    def record(self) -> JSON:
        """Return all of it as JSON values."""
        return asdict(self)


def foresee(
    sweep: Sweep, ledger: Ledger, published: Path | None = PUBLISHED
) -> tuple[Foresight, ...]:
    """Return what each contrast of a sweep can find, in the order of the file.

    Args:
        sweep: The sweep.
        ledger: Where the spread of its cells or tasks may be known from.
        published: A folder with folders of published rows, for what the ledger does not know; None:
            nothing is taken from there.

    Raises:
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    spots = [
        (claim, labels, place)
        for claim in sweep.spec.claims
        if claim.on != CONVERGENCE
        for labels, place in pairing.group_pairs(claim, sweep.points).items()
        if len(list(place.pairs)) >= LEAST_PAIRS
    ]
    if not spots:
        return ()
    metrics = list(dict.fromkeys(claim.on for claim, _, _ in spots))
    names = ["trial_id", "cell_id", "task", "seconds", *metrics]
    names = list(dict.fromkeys(names))
    rows = ledger.trials(columns=names, strict=False).to_pylist()
    others = _published(published, names) if published else []
    here = {metric: _Rows(rows, metric) for metric in metrics}
    elsewhere = {metric: _Rows(others, metric) for metric in metrics}
    return tuple(
        _foresight(claim, labels, place, here[claim.on], elsewhere[claim.on], len(spots))
        for claim, labels, place in spots
    )


def _published(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    # Rows of an older format may lack a column: then they say nothing of it.
    import pyarrow.parquet as pq

    out: list[dict[str, Any]] = []
    for file in sorted(folder.rglob("trials.parquet")):
        there = set(pq.read_schema(file).names)
        table = pq.read_table(file, columns=[name for name in names if name in there])
        out += [dict.fromkeys(names) | row for row in table.to_pylist()]
    return out


class _Rows:
    # Figures of one metric by cell, with the task of each.

    def __init__(self, rows: Iterable[Mapping[str, Any]], metric: str) -> None:
        self.values: dict[str, list[float]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.task: dict[str, str] = {}
        for row in rows:
            if is_number(row[metric]):
                cell = row["cell_id"]
                self.values.setdefault(cell, []).append(display_value(metric, row[metric]))
                self.seconds.setdefault(cell, []).append(row["seconds"] or 0.0)
                self.task[cell] = row["task"]

    def of_cell(self, cell: str) -> float | None:
        values = self.values.get(cell, [])
        return float(np.var(values, ddof=1)) if len(values) >= LEAST_PAIRS else None

    def of_task(self, task: str) -> float | None:
        # The usual variance of a cell: the median, which one arm that fails now and then leaves.
        own = [v for cell, of in self.task.items() if of == task and (v := self.of_cell(cell))]
        return float(np.median(own)) if len(own) >= ENOUGH else None


def _foresight(
    claim: ClaimSpec,
    labels: pairing.Labels,
    place: pairing.PairGroup,
    rows: _Rows,
    published: _Rows,
    family: int,
) -> Foresight:
    pairs = list(place.pairs)
    sides: list[Sequence[Point]] = [[left for _, left, _ in pairs], [right for *_, right in pairs]]
    own = [rows.of_cell(points[0].cell_id) for points in sides]
    tasks = [points[0].config.task.name for points in sides]
    usual = [rows.of_task(task) for task in tasks]
    known = [
        next((one for one in of if one is not None), None)
        for of in zip(own, usual, map(published.of_task, tasks), strict=True)
    ]
    known_by = "its own cells"
    if None in own:
        unmeasured = any(one is other is None for one, other in zip(own, usual, strict=True))
        known_by = "published rows of the task" if unmeasured else "the task"
    variances = [one for one in known if one is not None]
    level, number = (1 - LEVEL) / family, len(pairs)
    if claim.looks:
        level, number = looks.levels(claim.looks, level, claim.spending)[-1], claim.looks[-1]
    spread = None
    freedom = 1.0
    if len(variances) == 2 and sum(variances) > 0:
        spread = math.sqrt(sum(variances))
        if claim.by_arms:
            freedom = spread**4 / (variances[0] ** 2 + variances[1] ** 2)
    seconds = [
        float(np.mean(rows.seconds[points[0].cell_id]))
        for points in sides
        if points[0].cell_id in rows.seconds
    ]
    return Foresight(
        claim=claim.that,
        place=dict(zip(claim.places, labels, strict=True)),
        pairs=number,
        level=level,
        spread=spread,
        known_by=known_by if spread else "",
        smallest=None if spread is None else spread * _smallest(number, level, freedom),
        seeds={
            f"{points:g}": _seeds(points / spread, level, freedom)
            for points in POINTS
            if spread is not None and is_accuracy(claim.on)
        },
        seconds=sum(seconds) if len(seconds) == 2 else None,
    )


def _smallest(n: int, level: float, freedom: float) -> float:
    # In deviations of a difference.
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        if power(middle, n, level, freedom) < POWER:
            low = middle
        else:
            high = middle
    return high


def _seeds(effect: float, level: float, freedom: float) -> int | None:
    needed = pairs_needed(effect, level, freedom)
    return None if needed is None else max(needed, LEAST_PAIRS)
