"""A claim over all of its places: whether one arm is better across tasks, and how much.

Scores are put between chance (0) and the best figure of the place (1) before places are pooled, so
that a task whose accuracies lie close together counts as much as one where they lie far apart. The
probability of improvement is that of a run of the one side beating a run of the other at a place,
ties half, on average over places (Agarwal et al. 2021). Whether the places agree is asked by the
signed-rank test of Wilcoxon over the places' mean differences (Demsar 2006), by enumeration: the
places are the sample, so that with fewer than six no p comes below 0.05, however many seeds there
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_ENUMERATED = 16
"""Places up to which all signs are enumerated; beyond, they are drawn."""

DRAWN = 100_000
"""Signs that are drawn then, from a fixed seed."""


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
    for one, other, chance, best in zip(left, right, chances, bests, strict=True):
        if best <= chance:
            continue  # Nobody is better than chance: nothing to score by.
        differences.append((float(np.mean(one)) - float(np.mean(other))) / (best - chance))
        pairs = np.sign(np.subtract.outer(np.asarray(one), np.asarray(other)))
        wins.append(float((pairs + 1).mean()) / 2)
    if len(differences) < 2:
        return None
    return Across(
        places=len(differences),
        difference=float(np.mean(differences)),
        improvement=float(np.mean(wins)),
        p=signed_rank(differences),
    )


def signed_rank(differences: Sequence[float]) -> float:
    """Return the two-sided p of the signed-rank test; zeros are left out, ties share ranks."""
    values = np.array([one for one in differences if one])
    if not len(values):
        return 1.0
    size = np.abs(values)
    # The mean of the ranks of equals.
    ranks = (size[:, None] > size).sum(axis=1) + ((size[:, None] == size).sum(axis=1) + 1) / 2
    seen = abs(float((np.sign(values) * ranks).sum()))
    count = len(values)
    if count <= MOST_ENUMERATED:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    else:
        signs = np.random.default_rng(0).choice([-1, 1], (DRAWN, count))
    return float((np.abs(signs @ ranks) >= seen - 1e-9).mean())
