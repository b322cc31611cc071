"""What a judged claim holds: a contrast at a place, an arm over places, a claim over places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from fpt.spec import JSON
from sweep.analysis.cells import told

Verdict = Literal["supported", "contradicted", "undecided", "untested"]

LEAST_PAIRS = 3
"""Pairs of a verdict, at least."""


@dataclass(frozen=True)
class Contrast:
    """A claim at one place: a point of the axes under `per`, or everything."""

    claim: str
    """As the file has it: `language > random`."""
    axis: str
    metric: str
    place: Mapping[str, str]
    """Axis under `per` -> label."""
    left: str
    right: str
    """The labels of both sides."""
    pairs: int
    """Pairs of which both trials have a figure."""
    expected: int
    """Pairs that the sweep has."""
    difference: float | None
    """Mean of left minus right over the pairs, in the unit of a table."""
    low: float | None
    high: float | None
    """The 95 % t interval of the difference, for this contrast alone."""
    low_family: float | None
    high_family: float | None
    """The interval at the level that Holm's correction and the plan of looks leave this contrast;
    None where the t test is not what decides."""
    effect: float | None
    """The difference over the deviation of a difference between two seeds, one of each side."""
    p: float | None
    """Of the two-sided test, uncorrected, of the pairs that it counts."""
    p_holm: float | None
    """The same, corrected for looks, extensions and the family."""
    p_first: float | None
    """The same over the list of claims in force before the first row, with what was added to it;
    None if that is the list of today, or none was noted."""
    verdict: Verdict
    provisional: bool
    """Whether it is read before its plan says so: it may still change."""
    more_seeds: int | None
    """Further pairs that would decide it. None: it is decided, or nobody can tell. 0: those that
    are still to be trained would."""
    edit: str | None
    """The line of the sweep file that adds them."""
    plan: str | None
    """The line of the claim that makes them a plan."""
    notes: tuple[str, ...]
    """What is to be known of both sides: what is missing, diverged, untuned ..."""
    trials: tuple[tuple[str, str], ...]
    """(left, right) trial ids, of every pair that the sweep has."""
    unit: str = ""
    """What the difference is in; "per cent" of an accuracy, which differs by points."""

    def record(self) -> JSON:
        """Return all of it as JSON values."""
        return asdict(self) | {
            "notes": list(self.notes),
            "trials": [list(pair) for pair in self.trials],
            "unit": told(self.unit),
        }


@dataclass(frozen=True)
class Aggregate:
    """An arm of claims, summed up over the places that they are made at."""

    axis: str
    metric: str
    arm: str
    """A label of the axis."""
    over: str
    """The axes of the places: `task`."""
    places: int
    """Places at which every arm has a run; the others are left out for all."""
    of: int
    """Places that there are."""
    runs: int
    mean: float
    """The interquartile mean over all runs, in the unit of a table."""
    low: float | None
    high: float | None
    """Its 95 % bootstrap interval; None with fewer than three runs at a place."""
    coverage: int | None
    """Per cent of simulated sweeps in which such an interval held the true value."""
    trials: tuple[str, ...]
    even: bool = True
    """Whether it has as many runs at each place. If not, a place with more weighs more."""
    rank: float | None = None
    """Its mean rank over the places, 1 the best; None with fewer than three arms."""
    friedman: float | None = None
    """p of Friedman's test of the ranks of all arms, the same for each of them."""
    critical: float | None = None
    """Nemenyi's critical difference of two mean ranks."""

    def record(self) -> JSON:
        """Return all of it as JSON values."""
        return asdict(self) | {"trials": list(self.trials)}


@dataclass(frozen=True)
class Overall:
    """A claim on an accuracy over all the places that it is made at."""

    claim: str
    axis: str
    metric: str
    over: str
    """The axes of the places: `task`."""
    places: int
    """Places at which both sides have a run, and somebody is better than chance."""
    of: int
    """Places that there are."""
    difference: float
    """Mean difference of left minus right, where 0 is chance and 1 the best run of a place."""
    improvement: float
    """The probability that a run of the left side beats one of the right at a place."""
    p: float
    """Of the signed-rank test over places; of this claim alone."""
    middle: float
    """Difference of the interquartile means of both sides' scores."""
    low: float | None
    high: float | None
    """Its 95 % bootstrap interval; None with fewer than three runs at a place."""
    coverage: int | None
    """Per cent of simulated sweeps in which such an interval held the true value."""

    def record(self) -> JSON:
        """Return all of it as JSON values."""
        return asdict(self)


def p_text(value: float | None) -> str:
    """Return a p value for people."""
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
