"""Steps to convergence, against curves whose answer is known and an evaluator of its own."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweep.analysis.convergence import Convergence, convergence

THOUSANDTHS = st.lists(st.integers(0, 1000), max_size=40)


def by_definition(values: list[int], tolerance: int, smoothing: int) -> int | None:
    """The index, from the words of the definition, in whole thousandths: no rounding anywhere."""
    n = len(values)
    if n < 2 * smoothing:
        return None

    def smoothed(i: int) -> Fraction:
        start = i - (smoothing - 1) // 2
        start = 0 if start < 0 else n - smoothing if start + smoothing > n else start
        return Fraction(sum(values[start : start + smoothing]), smoothing)

    plateau = Fraction(sum(values[n - smoothing :]), smoothing)
    for i in range(n - 2 * smoothing + 1):
        if all(abs(smoothed(j) - plateau) <= tolerance for j in range(i, n)):
            return i
    return None


def found(values: list[int], tolerance: int, smoothing: int) -> Convergence:
    steps = [10 * (i + 1) for i in range(len(values))]
    return convergence(
        steps, [v / 1000 for v in values], tolerance=tolerance / 1000, smoothing=smoothing
    )


@given(THOUSANDTHS, st.integers(1, 300), st.integers(1, 8))
def test_it_is_what_the_definition_says(values: list[int], tolerance: int, smoothing: int) -> None:
    index = by_definition(values, tolerance, smoothing)

    assert found(values, tolerance, smoothing).step == (None if index is None else 10 * (index + 1))


@given(
    st.lists(st.integers(0, 600), max_size=15), st.lists(st.integers(600, 640), max_size=25),
    st.integers(1, 60), st.integers(0, 60), st.integers(1, 5),
)  # fmt: skip
def test_a_larger_tolerance_never_gives_a_later_step(
    rise: list[int], plateau: list[int], tolerance: int, more: int, smoothing: int
) -> None:
    strict = found(rise + plateau, tolerance, smoothing).step
    loose = found(rise + plateau, tolerance + more, smoothing).step

    assert strict is None or (loose is not None and loose <= strict)


@given(
    tau=st.floats(200, 3000), rise=st.floats(0.2, 0.5), noise=st.floats(0, 0.003),
    smoothing=st.integers(1, 7), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_an_exponential_rise_has_converged_when_its_formula_says(
    tau: float, rise: float, noise: float, smoothing: int, seed: int
) -> None:
    """0.95 - rise exp(-step / tau): within t of 0.95 from tau ln(rise / t) on."""
    every, tolerance = 100, 0.02
    steps = np.arange(every, int(12 * tau) + 20 * every * smoothing, every)
    jitter = np.random.default_rng(seed).uniform(-noise, noise, len(steps))
    curve = 0.95 - rise * np.exp(-steps / tau) + jitter

    step = convergence(steps.tolist(), curve.tolist(), tolerance=tolerance, smoothing=smoothing)

    # Noise moves a smoothed value and the plateau by at most `noise` each, the window by half its
    # length, and a mean of a convex rise by less than the rise over the window's half.
    half = every * (smoothing // 2 + 1)
    earliest = tau * math.log(rise / (tolerance + 2 * noise)) - half
    latest = tau * math.log(rise / (tolerance - 2 * noise)) + half
    assert step.step is not None
    assert earliest <= step.step <= latest + every


@given(st.integers(1, 6), st.floats(0.003, 0.01), st.integers(30, 80))
def test_what_still_rises_at_the_end_has_not_converged(
    smoothing: int, slope: float, evaluations: int
) -> None:
    curve = [0.1 + slope * i for i in range(evaluations)]
    # Within the last two windows it rises by more than the tolerance.
    tolerance = slope * (smoothing - 0.5)

    out = convergence(range(evaluations), curve, tolerance=tolerance, smoothing=smoothing)

    assert out == Convergence(None, f"not converged in {evaluations - 1} steps")


@pytest.mark.parametrize(
    ("curve", "step"),
    [
        ([0.5] * 10, 1),  # it never was elsewhere
        ([0.5] * 10 + [0.9] * 12, 11 + 2),  # half a window late
        ([0.9] * 10 + [0.5] * 12, 11 + 2),  # from above
        ([0.5] * 15 + [0.9] * 5, None),  # a plateau of one window is no plateau
        ([0.5, 0.9] * 10, None),  # jumps by more than the tolerance
        ([0.5] * 10 + [0.9] * 11 + [0.91], 11 + 2),  # one lucky evaluation at the end
        ([0.5] * 9, None),
    ],
)
def test_curves_worked_out_by_hand(curve: list[float], step: int | None) -> None:
    out = convergence(range(1, len(curve) + 1), curve, tolerance=0.01, smoothing=5)

    assert out.step == step
    assert bool(out.reason) == (step is None)


def test_reasons_say_what_was_too_little() -> None:
    short = convergence([1, 2], [0.5, 0.5], tolerance=0.01, smoothing=5)
    rising = convergence(range(0, 2000, 100), range(20), tolerance=0.01, smoothing=5)

    assert short == Convergence(None, "with fewer than 10 evaluations")
    assert rising == Convergence(None, "not converged in 1,900 steps")
