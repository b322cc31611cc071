"""A claim over all of its places: whether one arm is better across tasks, and how much.

Scores are put between chance (0) and the best figure of the place (1) before places are pooled, so
that a task whose accuracies lie close together counts as much as one where they lie far apart. The
probability of improvement is that of a run of the one side beating a run of the other at a place,
ties half, on average over places (Agarwal et al. 2021). Whether the places agree is asked by the
signed-rank test of Wilcoxon over the places' mean differences (Demsar 2006), by enumeration: the
places are the sample, so that with fewer than six no p comes below 0.05, however many seeds there
are. How much the arms differ in all is the difference of the interquartile means of their scores,
with a bootstrap that draws runs anew within each place.

Of three arms and more, Friedman's test asks whether their ranks over places are alike, by
permutation of the ranks within each place; where they are not, two mean ranks differ by Nemenyi's
critical difference at least (Demsar 2006).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sweep.analysis.stats import LEVEL, stratified_difference

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_ENUMERATED = 16
"""Places up to which all signs are enumerated; beyond, they are drawn."""

DRAWN = 100_000
"""Signs, or orders, that are drawn then, from a fixed seed; so many orders are enumerated."""


@dataclass(frozen=True)
class Across:
    """Two arms over places."""

    places: int
    difference: float
    """Mean over places of the difference of means, between chance and the best."""
    improvement: float
    """The probability of improvement of the first arm over the second."""
    p: float
    """Of the signed-rank test over places, two-sided."""
    middle: float
    """The difference of the interquartile means of all runs, between chance and the best."""
    low: float
    high: float
    """Its 95 % bootstrap interval."""


def across(
    left: Sequence[Sequence[float]],
    right: Sequence[Sequence[float]],
    chances: Sequence[float],
    bests: Sequence[float],
) -> Across | None:
    """Compare two arms over places; None with fewer than two that can be scored.

    Args:
        left: The runs of the one arm, at least one a place.
        right: Those of the other, in the order of the same places.
        chances: What chance gives at each place, in the unit of the runs.
        bests: The best figure of any arm there.
    """
    differences, wins = [], []
    scored: tuple[list[list[float]], list[list[float]]] = ([], [])
    for one, other, chance, best in zip(left, right, chances, bests, strict=True):
        if best <= chance:
            continue  # Nobody is better than chance: nothing to score by.
        for runs, of in zip(scored, (one, other), strict=True):
            runs.append([(run - chance) / (best - chance) for run in of])
        differences.append(float(np.mean(scored[0][-1])) - float(np.mean(scored[1][-1])))
        pairs = np.sign(np.subtract.outer(np.asarray(one), np.asarray(other)))
        wins.append(float((pairs + 1).mean()) / 2)
    if len(differences) < 2:
        return None
    middle, low, high = stratified_difference(*scored)
    return Across(
        places=len(differences),
        difference=float(np.mean(differences)),
        improvement=float(np.mean(wins)),
        p=signed_rank(differences),
        middle=middle,
        low=low,
        high=high,
    )


@dataclass(frozen=True)
class Ranks:
    """Arms, ranked at each place."""

    mean: tuple[float, ...]
    """The mean rank of each arm, 1 the best; equals share theirs."""
    p: float
    """Of Friedman's test."""
    critical: float
    """Nemenyi's critical difference of two mean ranks at the level 0.05."""


def ranked(scores: Sequence[Sequence[float]]) -> Ranks:
    """Rank arms at each place, the greatest first, and test whether they are alike.

    Args:
        scores: A row a place, at least two; a figure of each arm, at least three.
    """
    ranks = np.array([_ranks(-np.asarray(row, dtype=np.float64)) for row in scores])
    return Ranks(
        mean=tuple(map(float, ranks.mean(axis=0))),
        p=_friedman(ranks),
        critical=nemenyi(ranks.shape[1], len(ranks)),
    )


def nemenyi(arms: int, places: int) -> float:
    """Return the difference of two mean ranks that is critical at the level 0.05."""
    return _studentized_range(arms) / math.sqrt(2) * math.sqrt(arms * (arms + 1) / (6 * places))


@functools.cache
def _studentized_range(arms: int) -> float:
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(LEVEL, arms, np.inf))


def _friedman(ranks: NDArray[np.float64]) -> float:
    # Under the null every order within a place is as likely; the first place's may be held fixed.
    places, arms = ranks.shape
    seen = float((ranks.sum(axis=0) ** 2).sum())
    orders = math.factorial(arms)
    if orders ** (places - 1) <= DRAWN:
        sums = ranks[:1]
        for row in ranks[1:]:
            each = np.array(list(itertools.permutations(row)))
            sums = (sums[:, None, :] + each[None]).reshape(-1, arms)
    else:
        rng = np.random.default_rng(0)
        sums = np.zeros((DRAWN, arms))
        for row in ranks:
            sums += rng.permuted(np.tile(row, (DRAWN, 1)), axis=1)
    return float(((sums**2).sum(axis=1) >= seen - 1e-9).mean())


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    # From the least on; equals have the mean of theirs.
    less = (values[:, None] > values).sum(axis=1)
    same = (values[:, None] == values).sum(axis=1)
    out: NDArray[np.float64] = less + (same + 1) / 2
    return out


def signed_rank(differences: Sequence[float]) -> float:
    """Return the two-sided p of the signed-rank test; zeros are left out, ties share ranks."""
    values = np.array([one for one in differences if one])
    if not len(values):
        return 1.0
    ranks = _ranks(np.abs(values))
    seen = abs(float((np.sign(values) * ranks).sum()))
    count = len(values)
    if count <= MOST_ENUMERATED:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    else:
        signs = np.random.default_rng(0).choice([-1, 1], (DRAWN, count))
    return float((np.abs(signs @ ranks) >= seen - 1e-9).mean())
