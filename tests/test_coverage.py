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


@pytest.mark.parametrize("outcome", ["normal", "skewed", "bounded", "all or nothing", "near 100"])
def test_a_family_of_claims_is_seldom_wrong(coverage: ModuleType, outcome: str) -> None:
    draw, _ = coverage.OUTCOMES[outcome]
    for seeds in (3, 5, 10):
        wrong, uncorrected = coverage.false_verdicts(draw, seeds, SWEEPS)
        assert wrong <= 0.06 + coverage.error(0.06, SWEEPS)
        # That the bar can be missed: without the correction, and near 100 without the resolution.
        if outcome == "normal":
            assert uncorrected > 0.2
        if (outcome, seeds) == ("near 100", 3):
            assert coverage.false_verdicts(draw, seeds, SWEEPS, 0.0)[0] > 0.06


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

    assert shares[0] < 0.2 < shares[1] < 0.9 < shares[2]
