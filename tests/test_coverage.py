"""What README and the commands promise of intervals and verdicts is what simulations give."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from sweep.analysis.claims import COVERAGE
from sweep.analysis.stats import LEVEL, t_interval

ROOT = Path(__file__).parents[1]
SWEEPS = 4_000


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    file = ROOT / "benchmarks/coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_benchmark", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_t_interval_covers_what_it_says_on_normal_outcomes(
    coverage: ModuleType, seeds: int
) -> None:
    share = coverage.interval_coverage(*coverage.OUTCOMES["normal"], seeds, SWEEPS)

    # Within its binomial error: three deviations, since there are three of these.
    assert abs(share - LEVEL) <= 1.5 * coverage.error(LEVEL, SWEEPS)


def test_the_simulated_interval_is_the_tables(coverage: ModuleType) -> None:
    draw, truth = coverage.OUTCOMES["bounded"]
    values = draw(np.random.default_rng(5), (300, 5))
    cells = [t_interval(row.tolist()) for row in values]

    share = np.mean([abs(cell.mean - truth) <= (cell.half_width or 0) for cell in cells])

    assert coverage.interval_coverage(draw, truth, 5, 300) == share


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_a_family_of_claims_is_seldom_wrong_in_any_null(coverage: ModuleType, seeds: int) -> None:
    for name in coverage.NULLS:
        for family in (1, coverage.FAMILY):
            wrong = coverage.wrong_families(name, family, seeds, SWEEPS)
            assert wrong <= 0.06 + 0.5 * coverage.error(0.06, SWEEPS), (name, family)
    for family in (1, coverage.FAMILY):
        assert coverage.missing_pairs(family, seeds, SWEEPS) <= 0.06


def test_the_bar_of_wrong_families_can_be_missed(coverage: ModuleType) -> None:
    # By the paired t test alone, with the shapes that it is no test for.
    family = coverage.FAMILY
    assert coverage.by_pairs("one arm steady, one failing", 1, 3, SWEEPS) > 0.5
    assert coverage.by_pairs("one arm steady, one failing", family, 3, SWEEPS) > 0.98
    assert coverage.by_pairs("both arms 100 or 50", family, 3, SWEEPS) > 0.15
    assert coverage.by_pairs("20 test examples", family, 3, SWEEPS) > 0.09
    # And by what is used now, where nothing that was drawn shows what the arms are like.
    assert coverage.wrong_families("one arm skewed, one steady", 1, 3, SWEEPS) > 0.09


def test_readings_and_additions_stay_within_the_bar(coverage: ModuleType) -> None:
    for family in (1, coverage.FAMILY):
        for times in (1, 4):
            assert coverage.extended(family, times, SWEEPS) <= 0.06
        for looks in ((3, 5, 10), (5, 10, 20, 30)):
            assert coverage.looked_at(looks, family, SWEEPS) <= 0.06
        assert coverage.read_while_they_come(family, SWEEPS) <= 0.06


@pytest.mark.parametrize("effect", [2, 4])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_no_less_is_found_than_by_a_paired_test(
    coverage: ModuleType, effect: int, seeds: int
) -> None:
    for family in (1, coverage.FAMILY):
        ours = coverage.found(effect, seeds, SWEEPS, family)
        theirs = coverage.found_by_pairs(effect, seeds, SWEEPS, family)
        assert ours >= theirs - 0.01


def test_what_is_printed_beside_a_bootstrap_is_what_it_covers_at_worst(
    coverage: ModuleType,
) -> None:
    sweeps = 300
    for seeds, promised in COVERAGE.items():
        for outcome in ("normal", "all or nothing"):
            draw, _ = coverage.OUTCOMES[outcome]
            share = coverage.aggregate_coverage(draw, seeds, 4, sweeps)
            # Within three deviations.
            assert 100 * (share + 1.5 * coverage.error(share, sweeps)) >= promised


def test_a_bootstrap_over_three_seeds_is_worth_little(coverage: ModuleType) -> None:
    # Why none is shown beside the t interval of a contrast.
    share = coverage.bootstrap_coverage(*coverage.OUTCOMES["normal"], 3, 1_000)

    assert share < 0.8


def test_a_true_difference_is_found_more_often_with_more_seeds(coverage: ModuleType) -> None:
    shares = [coverage.found(2, seeds, SWEEPS) for seeds in (3, 5, 10)]

    assert shares[0] < 0.2 < 0.6 < shares[1] < 0.9 < shares[2]
