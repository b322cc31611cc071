from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from sweep.analysis.stats import (
    POWER,
    RESAMPLES,
    holm,
    interquartile_mean,
    paired,
    pairs_needed,
    stratified,
    t_interval,
)

values = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20)


@given(values, st.floats(0.5, 0.999))
def test_the_interval_is_scipys(sample: list[float], level: float) -> None:
    error = scipy_stats.sem(sample)
    if error == 0:
        low = high = float(np.mean(sample))
    else:
        low, high = scipy_stats.t.interval(level, len(sample) - 1, loc=np.mean(sample), scale=error)

    ours = t_interval(sample, level)

    assert ours.n == len(sample)
    assert ours.half_width is not None
    assert math.isclose(ours.mean - ours.half_width, low, rel_tol=1e-9, abs_tol=1e-6)
    assert math.isclose(ours.mean + ours.half_width, high, rel_tol=1e-9, abs_tol=1e-6)


def test_three_values_worked_out_by_hand() -> None:
    # Mean 2, deviation 1, t(0.975, 2) = 4.302653 of any printed table.
    ours = t_interval([1.0, 2.0, 3.0])

    assert ours.mean == 2.0
    assert ours.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_one_value_says_nothing_of_its_spread() -> None:
    assert t_interval([0.25]).half_width is None


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert t_interval([100.0] * 3).half_width == 0.0


def test_no_values_have_no_mean() -> None:
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])


# --- paired contrasts


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=12))
def test_a_paired_test_is_scipys(pairs: list[tuple[float, float]]) -> None:
    left, right = np.array(pairs).T
    if np.std(left - right) < 1e-6:
        return  # Rounding alone: scipy warns.
    theirs = scipy_stats.ttest_rel(left, right)
    low, high = theirs.confidence_interval(0.95)

    ours = paired(left - right)

    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9, abs=1e-15)
    assert ours.mean - ours.half_width == pytest.approx(low, rel=1e-9, abs=1e-9)
    assert ours.mean + ours.half_width == pytest.approx(high, rel=1e-9, abs=1e-9)


def test_many_tests_at_once_are_each_what_they_are_alone() -> None:
    differences = np.random.default_rng(0).normal(size=(3, 4, 5))

    together = paired(differences)

    assert together.p.shape == (3, 4)
    assert together.p[1, 2] == paired(differences[1, 2]).p


def test_a_spread_below_the_resolution_is_taken_for_it() -> None:
    # 0.2 three times, and a resolution of 0.1: t = 0.2 / (0.1 / sqrt(3)) = sqrt(12), for which
    # p = 1 - t / sqrt(2 + t * t) with two degrees of freedom.
    equal = paired(np.array([0.2, 0.2, 0.2]), 0.1)

    assert equal.deviation == 0.1
    assert equal.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert equal.half_width == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    wide = np.array([0.2, 0.9, -0.4])
    assert paired(wide, 0.1) == paired(wide)


@pytest.mark.parametrize(("value", "p"), [(0.0, 1.0), (3.0, 0.0), (-3.0, 0.0)])
def test_without_any_spread_all_but_nothing_is_certain(value: float, p: float) -> None:
    assert paired(np.full(3, value)).p == p


def test_a_pair_alone_is_no_test() -> None:
    with pytest.raises(ValueError, match="two differences at least"):
        paired(np.array([1.0]))


@settings(max_examples=15)  # It takes 0.1 s a call.
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_is_that_of_statsmodels(ps: list[float]) -> None:
    assert holm(ps) == pytest.approx(multipletests(ps, method="holm")[1])


def test_holm_corrects_each_family_of_many() -> None:
    ps = np.random.default_rng(0).random((5, 7))

    assert np.array_equal(holm(ps), np.stack([holm(row) for row in ps]))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=10), st.integers(0, 9), st.floats(0, 1))
def test_a_p_that_comes_later_takes_nothing_from_the_others(
    ps: list[float], which: int, p: float
) -> None:
    which %= len(ps)
    before, after = [*ps], [*ps]
    before[which], after[which] = 1.0, p

    assert (np.delete(holm(after) - holm(before), which) <= 1e-12).all()


@pytest.mark.parametrize("effect", [0.2, 0.5, -0.5, 1.0, 1.5])
@pytest.mark.parametrize("level", [0.05, 0.05 / 7])
def test_pairs_are_counted_as_statsmodels_does(effect: float, level: float) -> None:
    theirs = TTestPower().solve_power(
        abs(effect), alpha=level, power=POWER, alternative="two-sided"
    )

    assert pairs_needed(effect, level) == math.ceil(theirs)


def test_a_large_effect_needs_two_pairs_and_a_tiny_one_more_than_anybody_has() -> None:
    assert pairs_needed(200, 0.05) == 2
    assert pairs_needed(0.01, 0.05) is None


def test_as_many_pairs_as_were_counted_decide_as_often_as_promised() -> None:
    effect, level = 1.2, 0.05 / 4
    pairs = pairs_needed(effect, level)
    assert pairs is not None
    drawn = np.random.default_rng(0).normal(effect, 1, (20_000, pairs))

    share = float((paired(drawn).p < level).mean())

    assert POWER - 0.01 <= share <= POWER + 0.1  # The number of pairs is rounded up.


# --- over tasks


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40))
def test_the_interquartile_mean_is_scipys_trimmed_one(sample: list[float]) -> None:
    theirs = scipy_stats.trim_mean(sample, proportiontocut=0.25, axis=None)

    assert float(interquartile_mean(np.array(sample))) == pytest.approx(theirs, abs=1e-9)


def test_the_bootstrap_draws_within_each_task() -> None:
    # Two tasks without any spread: whatever is drawn, the middle half is the same.
    assert stratified([[10.0] * 3, [90.0] * 3]) == (50, 50, 50)
    mean, low, high = stratified([[10.0, 11, 12], [90.0, 91, 92]])
    assert 10 < low < mean == 51 < high < 92


def test_the_bootstraps_interval_is_scipys_of_one_task() -> None:
    runs = [1.0, 2.0, 4.0, 8.0, 16.0, 17.0, 18.0, 30.0]
    theirs = scipy_stats.bootstrap(
        (runs,),
        lambda x, axis: scipy_stats.trim_mean(x, 0.25, axis=axis),
        method="percentile",
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(1),
    ).confidence_interval

    _, low, high = stratified([runs])

    assert low == pytest.approx(theirs.low, abs=0.5)
    assert high == pytest.approx(theirs.high, abs=0.5)


def test_the_bootstrap_is_the_same_every_time_and_in_pieces() -> None:
    many = [list(np.random.default_rng(task).normal(size=400)) for task in range(8)]

    # 3,200 runs: at 2,000,000 values a piece, two pieces.
    assert stratified(many, 1_000) == stratified(many, 1_000)
