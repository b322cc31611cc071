"""Intervals of means, tests of contrasts, their correction, aggregates: how sure figures are.

The Student-t interval takes the seeds for a sample of independent, roughly normal draws; with three
seeds and accuracies near a bound it is a rough guide, which is why tables print n as well. What it
and the others cover in truth is measured by benchmarks/coverage.py.

A contrast over seeds is tested by Welch's t test: a seed pairs the order of data and the initial
values of two arms, and in our own rows that made their figures hardly more alike (LOG.md), so that
pairing costs degrees of freedom and buys nothing. A contrast over anything else is paired. Figures
come in steps: an accuracy over N predictions in steps of 1 / N, a number of steps in evaluations. A
spread below the step of a metric is taken for that step.

A t test is wrong where seeds fall into groups, such as those that solve a task and those that do
not: three seeds of three that solve it say little of how many do. `compare` looks for such groups,
and what it finds has another test:

- mixed: an arm has seeds in both groups. The shares in the upper one are compared, by Fisher's
  exact test.
- apart: each arm has a group to itself, more than `APART` deviations from the other's. A group that
  an arm has but did not show could make up for the difference: `unseen` says how likely it is that
  so many seeds did not show it. Both that and the t test have to be passed.

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

APART = 12
"""Deviations within groups that the gap between two of them has. It is so many that normal outcomes
that differ by up to four deviations of their differences are hardly ever taken for groups
(benchmarks/coverage.py: no less is found of these than by a paired t test)."""

SPLITS = 21
"""Ways to share a difference out between two unseen groups."""

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
    """t tests of whether differences are zero on average; arrays of a shape, a test each."""

    mean: NDArray[np.float64]
    """Of the differences, in their unit."""
    deviation: NDArray[np.float64]
    """Of the differences between two single outcomes, with n - 1; never below the resolution."""
    half_width: NDArray[np.float64]
    """The 95 % interval is mean +- half_width."""
    p: NDArray[np.float64]
    """Two-sided, uncorrected."""
    freedom: NDArray[np.float64]
    """Degrees of freedom."""

    def half_width_at(self, level: float) -> NDArray[np.float64]:
        """Return the half-width of the interval that corresponds to a test at another level."""
        from scipy.special import stdtrit

        usual = stdtrit(self.freedom, (1 + LEVEL) / 2)
        wider: NDArray[np.float64] = self.half_width / usual * stdtrit(self.freedom, 1 - level / 2)
        return wider


def paired(differences: NDArray[np.float64], resolution: float = 0.0) -> Tests:
    """Test the differences of pairs by Student's t.

    Args:
        differences: (..., pairs), finite, of at least two pairs.
        resolution: The step that the metric comes in; the module's docstring says what it is for.

    Raises:
        ValueError: If there are fewer than two pairs.
    """
    n = differences.shape[-1]
    if n < 2:
        raise ValueError("paired: a spread needs two differences at least")
    deviation = np.maximum(differences.std(axis=-1, ddof=1), resolution)
    return _t(differences.mean(axis=-1), deviation, n, np.full(deviation.shape, n - 1.0))


def welch(left: NDArray[np.float64], right: NDArray[np.float64], resolution: float = 0.0) -> Tests:
    """Test the difference of two arms by Welch's t.

    Args:
        left: (..., n), finite, n at least two.
        right: (..., n), likewise.
        resolution: The step that the metric comes in; the module's docstring says what it is for.

    Raises:
        ValueError: If there are fewer than two outcomes of each.
    """
    n = left.shape[-1]
    if n < 2:
        raise ValueError("welch: a spread needs two outcomes of each arm at least")
    one, other = left.var(axis=-1, ddof=1), right.var(axis=-1, ddof=1)
    both = one + other
    # One arm without spread leaves the freedom of the other; two without have the least.
    ratio = np.divide(both**2, one**2 + other**2, out=np.ones_like(both), where=both > 0)
    deviation = np.maximum(np.sqrt(both), resolution)
    return _t(left.mean(axis=-1) - right.mean(axis=-1), deviation, n, (n - 1) * ratio)


def _t(
    mean: NDArray[np.float64], deviation: NDArray[np.float64], n: int, freedom: NDArray[np.float64]
) -> Tests:
    # Imported here: scipy.special takes a quarter of a second, and an empty table needs none of it.
    from scipy.special import stdtr, stdtrit

    error = deviation / math.sqrt(n)
    # Without any spread every difference but none is certain.
    t = np.divide(mean, error, out=np.where(mean == 0, 0.0, np.inf), where=error > 0)
    half_width = stdtrit(freedom, (1 + LEVEL) / 2) * error
    return Tests(mean, deviation, half_width, 2 * stdtr(freedom, -np.abs(t)), freedom)


# --- outcomes in groups -------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two arms over seeds; arrays of a shape, a comparison each."""

    test: Tests
    """Welch's."""
    grouped: NDArray[np.bool_]
    """Whether the outcomes fall into two groups."""
    left_upper: NDArray[np.int64]
    """Outcomes of the left arm in the upper group."""
    right_upper: NDArray[np.int64]
    """Of the right one."""
    constant: NDArray[np.bool_]
    """Whether neither arm has any spread."""
    mixed: NDArray[np.bool_]
    """Whether there are groups, and an arm has outcomes in both."""
    unseen: NDArray[np.float64]
    """How likely a group that would make up for the difference stays unseen; where nobody knows
    where that could lie, the p of the shares."""
    share: NDArray[np.float64]
    """p of Fisher's exact test of the shares in the upper group, two-sided."""

    def p(self, wary: NDArray[np.bool_] | bool) -> NDArray[np.float64]:
        """Return the p of each contrast.

        Args:
            wary: Whether an arm of the family has shown groups, so that others may do so unseen.
        """
        apart = self.grouped & ~self.mixed
        p = np.where(apart | wary, np.maximum(self.test.p, self.unseen), self.test.p)
        p = np.where(self.constant & ~apart, 1.0, p)
        return np.where(self.mixed, self.share, p)


def compare(
    left: NDArray[np.float64],
    right: NDArray[np.float64],
    resolution: float = 0.0,
    bounds: tuple[NDArray[np.float64] | float, NDArray[np.float64] | float] | None = None,
) -> Comparison:
    """Compare two arms whose outcomes may fall into groups.

    Args:
        left: (..., n), finite, n at least two.
        right: (..., n), likewise.
        resolution: The step that the metric comes in.
        bounds: The least and the greatest that a group could lie at: chance and 100 per cent. None:
            not known.

    Raises:
        ValueError: If there are fewer than two outcomes of each.
    """
    n = left.shape[-1]
    test = welch(left, right, resolution)
    values = np.concatenate([left, right], axis=-1)
    order = np.argsort(values, axis=-1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=-1)
    gaps = np.diff(ordered, axis=-1)
    below = gaps.argmax(axis=-1)[..., None]
    upper = np.arange(2 * n) > below
    # The deviation within each arm's part of each group.
    inside, parts = np.zeros(test.mean.shape), np.zeros(test.mean.shape)
    for side in (order < n, order >= n):
        for group in (upper & side, ~upper & side):
            size = group.sum(axis=-1)
            middle = (ordered * group).sum(axis=-1) / np.maximum(size, 1)
            inside += (((ordered - middle[..., None]) * group) ** 2).sum(axis=-1)
            parts += size > 0
    within = np.sqrt(inside / np.maximum(2 * n - parts, 1))
    within = np.maximum(within, resolution / math.sqrt(2))
    grouped = gaps.max(axis=-1) > APART * within
    left_upper = (upper & (order < n)).sum(axis=-1)
    right_upper = (upper & (order >= n)).sum(axis=-1)
    share = _fisher(left_upper, right_upper, n)
    alone = ((left_upper == n) & (right_upper == 0)) | ((left_upper == 0) & (right_upper == n))
    return Comparison(
        test=test,
        grouped=grouped,
        left_upper=left_upper,
        right_upper=right_upper,
        constant=(np.ptp(left, axis=-1) == 0) & (np.ptp(right, axis=-1) == 0),
        mixed=grouped & ~alone,
        unseen=unseen(left.mean(axis=-1), right.mean(axis=-1), n, bounds) if bounds else share,
        share=share,
    )


def unseen(
    one: NDArray[np.float64],
    other: NDArray[np.float64],
    n: int,
    bounds: tuple[NDArray[np.float64] | float, NDArray[np.float64] | float],
) -> NDArray[np.float64]:
    """How likely `n` seeds of each arm hide a group that makes up for the difference of the arms.

    The better arm may have seeds that fall to the least bound, the worse one seeds that reach the
    greatest: shares f and g of them that make both means equal stay unseen with the probability
    ((1 - f) (1 - g))^n. Its greatest value over all such shares is doubled, since either arm might
    have come out as the better one.
    """
    low, high = bounds
    better, worse = np.maximum(one, other), np.minimum(one, other)
    difference = better - worse
    down, up = np.maximum(better - low, 1e-9), np.maximum(high - worse, 1e-9)
    parts = np.linspace(0, 1, SPLITS)[:, *([None] * one.ndim)]
    fall = np.clip(parts * difference / down, 0, 1)
    rise = np.clip((1 - parts) * difference / up, 0, 1)
    found: NDArray[np.float64] = np.minimum(2 * (((1 - fall) * (1 - rise)) ** n).max(axis=0), 1.0)
    return found


def seeds_unseen(
    better: float, worse: float, bounds: tuple[float, float], level: float
) -> int | None:
    """Return the seeds of each arm that `unseen` needs to come below a level; None: MOST_PAIRS do
    not do.
    """
    one, other = np.array(better), np.array(worse)
    for n in range(3, MOST_PAIRS + 1):
        if float(unseen(one, other, n, bounds)) < level:
            return n
    return None


def _fisher(left: NDArray[np.int64], right: NDArray[np.int64], n: int) -> NDArray[np.float64]:
    # Two-sided, of n outcomes each: the sum of all tables that are no likelier than this one.
    table = _fisher_table(n)
    out: NDArray[np.float64] = table[left, right]
    return out


@functools.cache
def _fisher_table(n: int) -> NDArray[np.float64]:
    from scipy.special import gammaln

    def log_choose(of: float, some: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = gammaln(of + 1) - gammaln(some + 1) - gammaln(of - some + 1)
        return found

    out = np.ones((n + 1, n + 1))
    for both in range(1, 2 * n):
        left = np.arange(max(0, both - n), min(n, both) + 1, dtype=np.float64)
        ways = log_choose(n, left) + log_choose(n, both - left)
        likely = np.exp(ways - log_choose(2 * n, np.array([float(both)])))
        for number, mass in zip(left.astype(int), likely, strict=True):
            out[number, both - number] = min(1.0, likely[likely <= mass * (1 + 1e-7)].sum())
    return out


# --- families -----------------------------------------------------------------------------------


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


def pairs_needed(effect: float, level: float, freedom: float = 1.0) -> int | None:
    """Return how many pairs a two-sided t test needs, to decide with a chance of `POWER`.

    Args:
        effect: Mean over deviation of the differences, if the truth is as was seen.
        level: The level that it has to reach.
        freedom: Degrees of freedom over n - 1: 1 of a paired test, 1 to 2 of Welch's.

    Returns:
        At least 2; None if MOST_PAIRS are too few.
    """
    if power(effect, MOST_PAIRS, level, freedom) < POWER:
        return None
    low, high = 1, MOST_PAIRS  # Too few, enough.
    while high - low > 1:
        middle = (low + high) // 2
        if power(effect, middle, level, freedom) < POWER:
            low = middle
        else:
            high = middle
    return high


def power(effect: float, n: int, level: float, freedom: float = 1.0) -> float:
    """Return the chance of a two-sided t test of `n` pairs to decide for the side of the effect;
    arguments as `pairs_needed`.
    """
    from scipy.special import nctdtr

    df = (n - 1) * freedom
    return 1 - float(nctdtr(df, abs(effect) * math.sqrt(n), _quantile(df, 1 - level / 2)))


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
    low, high = _ends(_drawn_anew(runs, rng, resamples))
    return float(interquartile_mean(np.concatenate(runs))), low, high


def stratified_difference(
    left: Sequence[Sequence[float]], right: Sequence[Sequence[float]], resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """The difference of two arms' interquartile means over tasks and runs, with its 95 % percentile
    bootstrap interval.

    Args:
        left: The runs of the one arm at each task, at least one each.
        right: Those of the other, in the order of the same tasks.
        resamples: Draws of the bootstrap.

    Returns:
        Left minus right, and both ends of the interval.
    """
    rng = np.random.default_rng(0)
    arms = [[np.asarray(one, dtype=np.float64) for one in arm] for arm in (left, right)]
    size = max(sum(map(len, arm)) for arm in arms)
    resamples = min(resamples, max(400, MOST_DRAWN // size))
    one, other = (_drawn_anew(arm, rng, resamples) for arm in arms)
    low, high = _ends(one - other)
    whole, less = (float(interquartile_mean(np.concatenate(arm))) for arm in arms)
    return whole - less, low, high


def _drawn_anew(
    runs: Sequence[NDArray[np.float64]], rng: np.random.Generator, resamples: int
) -> NDArray[np.float64]:
    # The interquartile means of runs that are drawn anew within each task.
    count = sum(map(len, runs))
    resamples = min(resamples, max(400, MOST_DRAWN // count))
    # In pieces, so that a sweep of many seeds needs no more memory than one of few.
    piece = max(1, min(resamples, 2_000_000 // count))
    means = []
    for first in range(0, resamples, piece):
        size = min(piece, resamples - first)
        drawn = [one[rng.integers(0, len(one), (size, len(one)))] for one in runs]
        means.append(interquartile_mean(np.concatenate(drawn, axis=1)))
    return np.concatenate(means)


def _ends(means: NDArray[np.float64]) -> tuple[float, float]:
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


@functools.cache
def _quantile(df: float, probability: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(df, probability))
