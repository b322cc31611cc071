"""A contrast as its plan has it read: which of its pairs count, what they say, its family.

`Reading` knows the plan of looks and what was read before; `Family` corrects the readings of a file
together (Holm).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fpt.spec import JSON
from sweep.analysis import history, looks
from sweep.analysis.cells import TrialResults, display_value, is_number, test_predictions
from sweep.analysis.contrasts import LEAST_PAIRS, Contrast
from sweep.analysis.stats import LEVEL, Comparison, Tests, compare, holm, paired
from sweep.sweepfile import pairing
from sweep.sweepfile.metrics import declared, is_accuracy
from sweep.sweepfile.schema import CONVERGENCE, ClaimSpec, MetricName
from sweep.sweepfile.trials import Point, Sweep

ACCURACY_STEP = 0.1
"""The step of accuracies of a test set whose size is not known, in points: what a table prints."""


@dataclass(frozen=True)
class Spot:
    """A claim at a place."""

    claim: ClaimSpec
    labels: pairing.Labels
    place: pairing.PairGroup

    @property
    def at(self) -> dict[str, str]:
        """The place: axis under `per` -> label."""
        return dict(zip(self.claim.places, self.labels, strict=True))

    @property
    def key(self) -> history.Key:
        """What the contrast is known by in the ledger's notes."""
        return history.key(self.claim, self.at)


Made = list[tuple[ClaimSpec, list[Spot]]]


def at_places(claims: Sequence[ClaimSpec], sweep: Sweep) -> Made:
    """Return each claim with the places that it is made at."""
    return [
        (claim, [Spot(claim, *one) for one in pairing.group_pairs(claim, sweep.points).items()])
        for claim in claims
    ]


@dataclass(frozen=True)
class Outcome:
    """A pair, with what its trials came to, in the unit of a table; None: nothing (yet)."""

    label: str
    left: float | None
    right: float | None
    ended: bool
    """Whether both trials have a row."""
    given: bool
    """Whether one of them diverged without a figure, and has been given one."""


@dataclass(frozen=True)
class PairTest:
    """The test of some of a contrast's pairs."""

    pairs: int
    result: Tests
    groups: Comparison | None
    constant: bool

    @property
    def mixed(self) -> bool:
        """Whether an arm has outcomes in both groups."""
        return self.groups is not None and bool(self.groups.mixed)

    def apart(self, wary: bool) -> bool:
        """Return whether a group that was not seen is reckoned with."""
        return self.groups is not None and not self.mixed and (bool(self.groups.grouped) or wary)

    def p(self, wary: bool) -> float:
        """Return the p of the test that decides, uncorrected."""
        if self.groups is not None:
            return float(self.groups.p(wary))
        return 1.0 if self.constant else float(self.result.p)

    @property
    def positive(self) -> bool:
        """Whether the left side has more: of seeds in the upper group, or on average."""
        if self.mixed:
            assert self.groups is not None
            return bool(self.groups.left_upper > self.groups.right_upper)
        return bool(self.result.mean > 0)


class Reading:
    """A contrast as its plan has it read: which of its pairs count, and what they say."""

    def __init__(self, spot: Spot, found: TrialResults, past: history.History) -> None:
        claim = spot.claim
        self.spot, self.claim, self.found = spot, claim, found
        self.outcomes = tuple(outcomes_of(spot, found))
        self.expected = len(self.outcomes)
        ended = [one.ended for one in self.outcomes]
        steady = ended.index(False) if False in ended else len(ended)
        every = tuple(one.label for one in self.outcomes)
        self.step = _step(claim.on, [left for _, left, _ in spot.place.pairs])
        self.bounds = bounds_of(spot)
        # The plans that have ended before this one: each spent its error on the pairs it saw.
        self.before = tuple(self.test(labels) for labels in past.spent(spot.key, every[:steady]))
        self.before_pairs = max(
            (len(one) for one in past.spent(spot.key, every[:steady])), default=0
        )
        self.looks = tuple(look for look in claim.looks if look > self.before_pairs)
        reached = [look for look in self.looks if look <= steady]
        self.final = bool(reached) if self.looks else bool(ended) and all(ended)
        self.last = self.final and (not self.looks or reached[-1] == self.looks[-1])
        self.reached = len(reached)
        self.counted = every[: reached[-1]] if reached else every
        self.tests = tuple(self.test(every[:look]) for look in reached) or (
            self.test(self.counted),
        )
        self.now = self.tests[-1]

    def test(self, labels: Collection[str], *, given: bool = True) -> PairTest | None:
        """Return the test of some pairs; None with fewer than two that have figures.

        Args:
            labels: Those of the pairs.
            given: Whether what diverged without a figure counts.
        """
        pairs = [
            (one.left, one.right)
            for one in self.outcomes
            if one.label in labels and (given or not one.given)
            and one.left is not None and one.right is not None
        ]  # fmt: skip
        if len(pairs) < 2:
            return None
        left, right = np.array(pairs, dtype=np.float64).T
        differences = np.round(left - right, 9)
        if not self.claim.by_arms:
            result = paired(differences, self.step)
            return PairTest(len(pairs), result, None, bool(np.ptp(differences) == 0))
        groups = compare(left, right, self.step, self.bounds)
        return PairTest(len(pairs), groups.test, groups, bool(groups.constant))

    @property
    def wary(self) -> bool:
        """Whether an arm has shown groups."""
        return any(test is not None and test.mixed for test in self.tests)

    @property
    def counts(self) -> bool:
        """Whether it is one of the family."""
        return self.expected >= LEAST_PAIRS

    def p(self, wary: bool) -> float:
        """Return the p, corrected for looks and extensions, and not for the family yet."""
        if self.now is None or self.now.pairs < LEAST_PAIRS:
            return 1.0
        if self.reached:
            ps = [1.0 if test is None else test.p(wary) for test in self.tests]
            own = looks.sequential(ps, self.looks, self.claim.spending)
        else:
            own = self.now.p(wary)
        found = [own * looks.penalty(len(self.before))]
        found += [
            test.p(wary) * looks.penalty(number)
            for number, test in enumerate(self.before)
            if test is not None and test.pairs >= LEAST_PAIRS and test.positive == self.now.positive
        ]
        return min(*found, 1.0)

    def level(self, total: float) -> float:
        """Return the level of the test that is read now, where the plan may err so often."""
        total /= looks.penalty(len(self.before))
        if not self.reached:
            return total
        return looks.levels(self.looks, total, self.claim.spending)[self.reached - 1]

    def note(self, one: Contrast) -> JSON:
        """Return what the ledger notes of this reading."""
        return {
            "axis": self.claim.axis,
            "paired_by": self.claim.paired_by,
            "metric": self.claim.on,
            "place": sorted([axis, label] for axis, label in self.spot.at.items()),
            "sides": sorted(self.claim.sides),
            "pairs": list(self.counted),
            "last": self.last,
            "verdict": one.verdict,
            "p": one.p_holm,
        }


class Family:
    """Contrasts that are corrected together."""

    def __init__(self, reads: Sequence[Reading]) -> None:
        self.reads = tuple(reads)
        # Where one arm has shown groups, others of this metric may do so unseen.
        self._wary = {read.claim.on for read in reads if read.wary}
        members = [read for read in reads if read.counts]
        corrected = holm(np.array([read.p(self.wary(read)) for read in members]))
        self.size = len(members)
        self.p = dict(zip(members, map(float, corrected), strict=True))
        # Holm's level for the largest p that would still be rejected, and so for any that is not.
        self.open = max(sum(p >= 1 - LEVEL for p in self.p.values()), 1)
        ordered = sorted(self.p, key=lambda read: read.p(self.wary(read)))
        self._rank = {read: self.size - number for number, read in enumerate(ordered)}

    def wary(self, read: Reading) -> bool:
        """Return whether an arm of the same metric has shown groups."""
        return read.claim.on in self._wary

    def level(self, read: Reading) -> float:
        """Return the level that Holm's correction leaves a contrast."""
        decided = self.p.get(read, 1.0) < 1 - LEVEL
        return (1 - LEVEL) / (self._rank[read] if decided else self.open)


def outcomes_of(spot: Spot, found: TrialResults) -> Iterator[Outcome]:
    """Yield what each pair of a contrast came to."""
    claim = spot.claim
    pairs = list(spot.place.pairs)
    measured = [
        display_value(claim.on, value)
        for _, *both in pairs
        for point in both
        if is_number(value := value_of(found, point, claim.on))
    ]
    for label, *both in pairs:
        values: list[float | None] = []
        given = False
        for point in both:
            value = value_of(found, point, claim.on)
            if is_number(value):
                values.append(display_value(claim.on, value))
            else:
                worst = _worst(found, point, claim.on, measured)
                given |= worst is not None
                values.append(worst)
        left, right = values
        yield Outcome(label, left, right, all(p.trial_id in found.rows for p in both), given)


def _worst(
    found: TrialResults, point: Point, metric: MetricName, measured: Sequence[float]
) -> float | None:
    # What a trial counts as that diverged without a figure.
    if point.trial_id not in found.rows or found.fate(point.trial_id) != "diverged":
        return None
    if (own := declared(metric, point.like)) is not None:
        return (min if own.better == "higher" else max)(measured, default=None)
    if is_accuracy(metric):
        chance = found.columns["baseline_accuracy"][found.rows[point.trial_id]]
        if is_number(chance):
            return min(display_value(metric, chance), *measured)
        return min(measured, default=None)
    return max(measured, default=None) if metric.endswith("_loss") else None


def bounds_of(spot: Spot) -> tuple[float, float] | None:
    """Return where outcomes of an accuracy could lie that were not seen: from chance to all right.

    A trivial baseline may be a whole classifier's, which a seed that fails falls far below.
    """
    configs = [point.like for _, *both in spot.place.pairs for point in both]
    if not is_accuracy(spot.claim.on) or not configs:
        return None
    classes = max(one.task.shape(one.protocol).classes for one in configs)
    return (100 / classes, 100.0) if classes else None


def value_of(found: TrialResults, point: Point, metric: MetricName) -> float | None:
    """Return the figure of a trial as the ledger has it; None without one."""
    return found.value(point.trial_id, metric) if point.trial_id in found.rows else None


def _step(metric: MetricName, points: Sequence[Point]) -> float:
    # The resolution of a metric; 0 where it has none to speak of.
    if metric == "test_accuracy":
        return max((_accuracy_step(point) for point in points), default=ACCURACY_STEP)
    if is_accuracy(metric):
        return ACCURACY_STEP
    if metric in (CONVERGENCE, "best_step", "steps_trained"):
        return max((point.config.evaluation.every for point in points), default=0)
    return 0.0


def _accuracy_step(point: Point) -> float:
    # A prediction more or less, in points.
    number = test_predictions(point.like)
    return ACCURACY_STEP if number is None else 100 / number
