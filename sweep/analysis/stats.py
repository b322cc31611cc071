"""How sure figures over seeds are: intervals of means, paired contrasts, correction, aggregates.

The Student-t interval takes the seeds for a sample of independent, roughly normal draws; with three
seeds and accuracies near a bound it is a rough guide, which is why tables print n as well. What it
and the others cover in truth is measured by benchmarks/coverage.py.

A contrast is of differences, pair by pair, and tested by a t test on them. Figures come in steps:
an accuracy over N examples in steps of 1 / N, a number of steps in evaluations. With a few pairs it
happens that all differences are equal, and a t test of them is sure of anything. So a spread below
the resolution of a metric is taken for that resolution, in test and interval; above it, both are
the textbook's.

Over tasks, figures are summed up by their interquartile mean: the mean of the middle half of all
runs, which one task that is easy or hopeless does not move. Its interval is the percentile
bootstrap's, which draws runs anew within each task.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVEL = 0.95
"""Coverage of the intervals in tables; one minus it is the level of tests."""

POWER = 0.8
"""The chance of a decision for which pairs are counted."""

MOST_PAIRS = 1_000
"""Pairs up to which they are counted."""

RESAMPLES = 10_000
"""Draws of a bootstrap. They come from a fixed seed: the same figures give the same bytes."""

MOST_DRAWN = 10_000_000
"""Values that a bootstrap draws in all; over very many runs it makes fewer draws, 400 at least."""


@dataclass(frozen=True)
class Interval:
    """A mean and its two-sided confidence interval, in the unit of the values."""

    mean: float
    half_width: float | None
    """The interval is mean +- half_width; None for one value, which says nothing of its spread."""
    n: int
    """Values behind it."""


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean of independent values with its Student-t interval.

    Args:
        values: At least one finite value.
        level: Coverage, between 0 and 1.

    Raises:
        ValueError: If there is no value.
    """
    n = len(values)
    if n == 0:
        raise ValueError("t_interval: no values; a mean needs at least one")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Interval(mean, _quantile(n - 1, (1 + level) / 2) * math.sqrt(variance / n), n)


@dataclass(frozen=True)
class Tests:
    """Paired t tests of whether differences are zero on average; arrays of a shape, a test each."""

    mean: NDArray[np.float64]
    """Of the differences, in their unit."""
    deviation: NDArray[np.float64]
    """Of the differences, with n - 1; never below the resolution."""
    half_width: NDArray[np.float64]
    """The 95 % interval is mean +- half_width."""
    p: NDArray[np.float64]
    """Two-sided, uncorrected."""


def paired(differences: NDArray[np.float64], resolution: float = 0.0) -> Tests:
    """Test the differences of pairs.

    Args:
        differences: (..., pairs), finite, of at least two pairs.
        resolution: The step that the metric comes in; the module's docstring says what it is for.

    Raises:
        ValueError: If there are fewer than two pairs.
    """
    n = differences.shape[-1]
    if n < 2:
        raise ValueError("paired: a spread needs two differences at least")
    # Imported here: scipy.special takes a quarter of a second, and an empty table needs none of it.
    from scipy.special import stdtr

    mean = differences.mean(axis=-1)
    deviation = np.maximum(differences.std(axis=-1, ddof=1), resolution)
    error = deviation / math.sqrt(n)
    # Without any spread every difference but none is certain.
    t = np.divide(mean, error, out=np.where(mean == 0, 0.0, np.inf), where=error > 0)
    p = 2 * stdtr(n - 1, -np.abs(t))
    return Tests(mean, deviation, _quantile(n - 1, (1 + LEVEL) / 2) * error, p)


def holm(ps: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's adjusted p values, along the last axis: each is at most the level of the whole family.

    A p that is not known yet counts as 1, so that what the others are worth never shrinks when it
    comes.
    """
    values = np.asarray(ps, dtype=np.float64)
    count = values.shape[-1]
    order = np.argsort(values, axis=-1, kind="stable")
    steps = np.take_along_axis(values, order, axis=-1) * np.arange(count, 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(steps, axis=-1), 1.0)
    out = np.empty_like(adjusted)
    np.put_along_axis(out, order, adjusted, axis=-1)
    return out


def pairs_needed(effect: float, level: float) -> int | None:
    """How many pairs a two-sided paired t test needs, to decide with a chance of `POWER`.

    Args:
        effect: Mean over deviation of the differences, if the truth is as was seen.
        level: The level that it has to reach.

    Returns:
        At least 2; None if MOST_PAIRS are too few.
    """
    if _power(effect, MOST_PAIRS, level) < POWER:
        return None
    low, high = 1, MOST_PAIRS  # Too few, enough.
    while high - low > 1:
        middle = (low + high) // 2
        if _power(effect, middle, level) < POWER:
            low = middle
        else:
            high = middle
    return high


def _power(effect: float, n: int, level: float) -> float:
    # The tail on the side of the effect: a decision for the wrong side is none.
    from scipy.special import nctdtr

    return 1 - float(nctdtr(n - 1, abs(effect) * math.sqrt(n), _quantile(n - 1, 1 - level / 2)))


def interquartile_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of the middle half, along the last axis: a quarter is cut off at each end.

    Where a quarter is no whole number of values, it is rounded down.
    """
    count = values.shape[-1]
    cut = count // 4
    ordered = np.partition(values, (cut, count - cut - 1), axis=-1)
    middle: NDArray[np.float64] = ordered[..., cut : count - cut].mean(axis=-1)
    return middle


def stratified(
    strata: Sequence[Sequence[float]], resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """The interquartile mean over tasks and runs, with its 95 % percentile bootstrap interval.

    Args:
        strata: The runs of each task, at least one each; a task may have more than another.
        resamples: Draws of the bootstrap.

    Returns:
        The mean, and both ends of the interval.
    """
    rng = np.random.default_rng(0)
    runs = [np.asarray(one, dtype=np.float64) for one in strata]
    resamples = min(resamples, max(400, MOST_DRAWN // sum(map(len, runs))))
    # In pieces, so that a sweep of many seeds needs no more memory than one of few.
    piece = max(1, min(resamples, 2_000_000 // sum(map(len, runs))))
    means = []
    for first in range(0, resamples, piece):
        size = min(piece, resamples - first)
        drawn = [one[rng.integers(0, len(one), (size, len(one)))] for one in runs]
        means.append(interquartile_mean(np.concatenate(drawn, axis=1)))
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return float(interquartile_mean(np.concatenate(runs))), float(low), float(high)


@functools.cache
def _quantile(df: int, probability: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(df, probability))
