from __future__ import annotations

import itertools
from typing import cast

import numpy as np
import pytest
from scipy import stats as scipy_stats

from sweep.analysis.across import across, signed_rank


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
