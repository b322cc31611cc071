from __future__ import annotations

import itertools
from typing import cast

import numpy as np
import pytest
from scipy import stats as scipy_stats

from sweep.analysis.across import across, nemenyi, ranked, signed_rank
from sweep.analysis.stats import interquartile_mean, stratified_difference


@pytest.mark.parametrize("count", [3, 5, 6, 8, 12])
def test_the_signed_rank_test_is_scipys(count: int) -> None:
    values = np.random.default_rng(count).normal(0.5, 1, count)

    theirs = scipy_stats.wilcoxon(values, method="exact").pvalue

    assert signed_rank(list(values)) == pytest.approx(theirs)


def test_ties_share_ranks_and_zeros_are_left_out() -> None:
    # Ranks 1.5, 1.5 and 3: of eight ways to sign them two are as far from zero as all of one sign.
    assert signed_rank([0.1, 0.0, 0.1, 0.5]) == 2 / 8
    assert signed_rank([0.0, 0.0]) == 1.0


def test_many_places_are_drawn_and_give_what_scipy_approximates() -> None:
    values = list(np.random.default_rng(3).normal(0.3, 1, 40))

    theirs = scipy_stats.wilcoxon(values, method="asymptotic").pvalue

    assert signed_rank(values) == pytest.approx(theirs, abs=0.01)
    assert signed_rank(values) == signed_rank(values)


def test_six_places_decide_at_the_earliest() -> None:
    assert signed_rank([1, 2, 3, 4, 5]) > 0.05
    assert signed_rank([1, 2, 3, 4, 5, 6]) < 0.05


def test_scores_lie_between_chance_and_the_best() -> None:
    left, right = [[90.0, 80.0], [30.0]], [[70.0, 80.0], [20.0, 30.0]]

    found = across(left, right, [50.0, 10.0], [90.0, 30.0])

    assert found is not None
    assert found.places == 2
    assert found.difference == pytest.approx(((85 - 75) / 40 + (30 - 25) / 20) / 2)
    wins = [
        np.mean([(a > b) + (a == b) / 2 for a, b in itertools.product(one, other)])
        for one, other in zip(left, right, strict=True)
    ]
    assert found.improvement == pytest.approx(float(np.mean(wins)))
    theirs = [
        scipy_stats.mannwhitneyu(one, other).statistic / (len(one) * len(other))
        for one, other in zip(left, right, strict=True)
    ]
    assert found.improvement == pytest.approx(np.mean(cast("list[float]", theirs)))


def test_a_place_where_nobody_beats_chance_has_no_score() -> None:
    assert across([[50.0], [60.0]], [[50.0], [50.0]], [50.0, 50.0], [50.0, 60.0]) is None


@pytest.mark.parametrize(("arms", "q"), [
    # Demsar 2006, table 5a: critical values at 0.05 of two to ten classifiers.
    (2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (10, 3.164),
])  # fmt: skip
def test_nemenyis_critical_values_are_those_in_print(arms: int, q: float) -> None:
    places = 14

    found = nemenyi(arms, places)

    assert found == pytest.approx(q * np.sqrt(arms * (arms + 1) / (6 * places)), rel=1e-3)


def test_friedmans_test_of_few_places_is_enumerated() -> None:
    rng = np.random.default_rng(5)
    scores = rng.normal([0.0, 0.7, 1.4], 1, (4, 3))
    seen = scipy_stats.friedmanchisquare(*scores.T).statistic
    orders = list(itertools.permutations(range(3)))
    as_far = [
        scipy_stats.friedmanchisquare(*np.array(rows).T).statistic >= seen - 1e-9
        for rows in itertools.product(orders, repeat=4)
    ]

    assert ranked(scores.tolist()).p == pytest.approx(np.mean(as_far))


def test_friedmans_test_of_many_places_is_about_scipys() -> None:
    scores = np.random.default_rng(2).normal(0, 1, (40, 5)) + np.linspace(0, 0.6, 5)

    found = ranked(scores.tolist())

    theirs = scipy_stats.friedmanchisquare(*scores.T).pvalue
    assert found.p == pytest.approx(theirs, abs=0.004)
    ranks = scipy_stats.rankdata(-scores, axis=1).mean(axis=0)
    assert found.mean == pytest.approx(tuple(ranks))


def test_equals_share_ranks_and_arms_that_are_alike_are_not_told_apart() -> None:
    found = ranked([[1.0, 1.0, 0.0], [0.5, 0.5, 0.5]])

    assert found.mean == (1.75, 1.75, 2.5)
    assert ranked([[1.0, 1.0, 1.0]] * 3).p == 1.0


def test_the_difference_of_aggregates_is_that_of_two_interquartile_means() -> None:
    rng = np.random.default_rng(1)
    left, right = rng.normal(0.7, 0.1, (3, 5)), rng.normal(0.6, 0.1, (3, 5))

    middle, low, high = stratified_difference(left.tolist(), right.tolist())

    trimmed = [scipy_stats.trim_mean(arm.ravel(), 3 / 15) for arm in (left, right)]
    assert middle == pytest.approx(trimmed[0] - trimmed[1])
    # Draws of our own, one after another.
    own = []
    for _ in range(4_000):
        arms = [[rng.choice(row, len(row)) for row in arm] for arm in (left, right)]
        one, other = (float(interquartile_mean(np.concatenate(arm))) for arm in arms)
        own.append(one - other)
    assert (low, high) == pytest.approx(np.percentile(own, [2.5, 97.5]), abs=0.01)
    found = across(left.tolist(), right.tolist(), [0.0] * 3, [1.0] * 3)
    assert found is not None
    assert (found.middle, found.low, found.high) == (middle, low, high)
