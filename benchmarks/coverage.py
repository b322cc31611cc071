"""What intervals and verdicts are worth: simulated sweeps whose true answers are known.

    python benchmarks/coverage.py [--sweeps 20000]

Draws accuracies of 3, 5 and 10 seeds, per cent, normal and otherwise: skewed, bounded near 100 and
in steps of a test set of 500, all or nothing, and so good that most are equal. Prints how often the
95 % intervals hold the true mean, how often a family of claims without any true difference has one
that is called supported or contradicted, and how often a true difference is found; each with the
binomial error of the simulation, two of its deviations. Last a JSON object a line for each bar.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sweep.analysis.claims import ACCURACY_STEP, COVERAGE
from sweep.analysis.stats import LEVEL, holm, interquartile_mean, paired

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]

SEEDS = (3, 5, 10)
FAMILY = 7
"""Contrasts of a family: the paper's tasks."""

EXAMPLES = 500
"""Examples of the test set whose steps the bounded accuracies come in."""

RESAMPLES = 400
"""Of a bootstrap in a simulation; its ends then wobble by less than their coverage is known to."""


def _of_test_set(probability: Array, rng: np.random.Generator) -> Array:
    return 100 * rng.binomial(EXAMPLES, probability) / EXAMPLES


OUTCOMES: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, shape: rng.normal(80, 3, shape), 80.0),
    "skewed": (lambda rng, shape: 90 - rng.exponential(3, shape), 87.0),
    "bounded": (lambda rng, shape: _of_test_set(rng.beta(38, 2, shape), rng), 95.0),
    "all or nothing": (
        lambda rng, shape: _of_test_set(np.where(rng.random(shape) < 0.8, 0.99, 0.6), rng),
        100 * (0.8 * 0.99 + 0.2 * 0.6),
    ),
    "near 100": (lambda rng, shape: _of_test_set(rng.beta(1500, 1.5, shape), rng),
                 100 * 1500 / 1501.5),
}  # fmt: skip
"""Name -> how accuracies of seeds are drawn, and their true mean."""


def interval_coverage(draw: Draw, truth: float, seeds: int, sweeps: int) -> float:
    """How often the t interval over seeds holds the true mean."""
    values = draw(np.random.default_rng(seeds), (sweeps, seeds))
    found = paired(values)  # The interval of a mean is that of its differences from nothing.
    return float((np.abs(found.mean - truth) <= found.half_width).mean())


def bootstrap_coverage(draw: Draw, truth: float, seeds: int, sweeps: int) -> float:
    """How often the percentile bootstrap over seeds holds the true mean."""
    rng = np.random.default_rng(seeds)
    values = draw(rng, (sweeps, seeds))
    drawn = rng.integers(0, seeds, (RESAMPLES, seeds))
    means = values[:, drawn].mean(axis=-1)
    low, high = _ends(means)
    return float(((low <= truth) & (truth <= high)).mean())


def aggregate_coverage(draw: Draw, seeds: int, tasks: int, sweeps: int) -> float:
    """How often the bootstrap of the interquartile mean over tasks holds its true value.

    Tasks lie 0 to 5 points apart, a distance anew for each simulated sweep. The true value is what
    the interquartile mean of a sweep of that size is on average.
    """
    rng = np.random.default_rng(seeds)
    hit = 0
    for _ in range(sweeps):
        apart = rng.uniform(0, 5, (tasks, 1)) * np.arange(tasks)[:, None]
        many = (draw(rng, (RESAMPLES, tasks, seeds)) - apart).reshape(RESAMPLES, -1)
        runs = draw(rng, (tasks, seeds)) - apart
        drawn = rng.integers(0, seeds, (RESAMPLES, tasks, seeds))
        resampled = np.take_along_axis(runs[None], drawn, axis=2).reshape(RESAMPLES, -1)
        low, high = _ends(interquartile_mean(resampled))
        hit += bool(low <= interquartile_mean(many).mean() <= high)
    return hit / sweeps


def _ends(means: Array) -> tuple[Array, Array]:
    low, high = np.percentile(means, [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=-1)
    return low, high


def false_verdicts(
    draw: Draw, seeds: int, sweeps: int, resolution: float = ACCURACY_STEP
) -> tuple[float, float]:
    """How often a family without true differences has a verdict: as claims are judged, and raw.

    Returns:
        With Holm's correction, and with none.
    """
    rng = np.random.default_rng(seeds)
    shape = (sweeps, FAMILY, seeds)
    p = paired(draw(rng, shape) - draw(rng, shape), resolution).p
    return float((holm(p) < 1 - LEVEL).any(-1).mean()), float((p < 1 - LEVEL).any(-1).mean())


def found(effect: float, seeds: int, sweeps: int) -> float:
    """How often a true difference is found: `effect` deviations of normal differences.

    It is one of a family in which the others are without.
    """
    rng = np.random.default_rng(seeds)
    differences = rng.normal(0, 1, (sweeps, FAMILY, seeds))
    differences[:, 0] += effect
    return float((holm(paired(differences).p)[:, 0] < 1 - LEVEL).mean())


def error(share: float, sweeps: int) -> float:
    """Two deviations of a share that was seen in so many sweeps."""
    return 2 * math.sqrt(max(share * (1 - share), 1 / sweeps) / sweeps)


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", type=int, default=20_000)
    sweeps = parser.parse_args().sweeps

    def show(title: str, rows: dict[str, list[tuple[float, int]]]) -> None:
        print(f"\n{title}\n{'':<32}" + "".join(f"{n:>8} seeds" for n in SEEDS))
        for name, shares in rows.items():
            told = (f"{100 * one:.1f} ± {100 * error(one, of):.1f}" for one, of in shares)
            print(f"{name:<32}" + "".join(f"{text:>14}" for text in told))

    means = {
        name: [(interval_coverage(*outcome, n, sweeps), sweeps) for n in SEEDS]
        for name, outcome in OUTCOMES.items()
    }
    show("95 % t interval holds the true mean, per cent of sweeps", means)
    show(
        "95 % percentile bootstrap over the same seeds (not shown by any command)",
        {
            name: [(bootstrap_coverage(*outcome, n, sweeps // 4), sweeps // 4) for n in SEEDS]
            for name, outcome in OUTCOMES.items()
        },
    )
    aggregates = {
        f"{name}, {tasks} tasks": [
            (aggregate_coverage(draw, n, tasks, sweeps // 20), sweeps // 20) for n in SEEDS
        ]
        for name, (draw, _) in OUTCOMES.items()
        for tasks in (4, 7)
    }
    show("95 % stratified bootstrap of the interquartile mean over tasks", aggregates)
    false, raw, sharp = ({} for _ in range(3))
    for name, (draw, _) in OUTCOMES.items():
        both = [false_verdicts(draw, n, sweeps) for n in SEEDS]
        false[name] = [(one, sweeps) for one, _ in both]
        raw[name] = [(one, sweeps) for _, one in both]
        sharp[name] = [(false_verdicts(draw, n, sweeps, 0.0)[0], sweeps) for n in SEEDS]
    show(f"a false verdict among {FAMILY} claims without a true difference", false)
    show("the same without Holm's correction", raw)
    show("the same with it, but with spreads below the resolution taken as they are", sharp)
    show(
        f"a true difference found, among {FAMILY} claims (in deviations of the differences)",
        {f"{d} deviations": [(found(d, n, sweeps), sweeps) for n in SEEDS] for d in (1, 2, 4, 8)},
    )

    print()
    for n, (coverage, of) in zip(SEEDS, means["normal"], strict=True):
        off = abs(coverage - LEVEL) / error(LEVEL, of) * 2
        bar = f"t interval on normal outcomes, {n} seeds: deviations from 95 %"
        print(json.dumps({"bar": bar, "value": round(off, 2), "must": 3, "aim": 2,
                          "better": "lower"}))  # fmt: skip
    worst = max(share for shares in false.values() for share, _ in shares)
    bar = "false verdicts in a family of claims, the worst of all outcomes and seeds, per cent"
    print(json.dumps({"bar": bar, "value": round(100 * worst, 2), "must": 6.5, "aim": 5,
                      "better": "lower"}))  # fmt: skip
    for number, n in enumerate(SEEDS):
        share, of = min(shares[number] for shares in aggregates.values())
        above = (100 * share - COVERAGE[n]) / (100 * error(share, of)) * 2
        bar = f"what is printed of the bootstrap, {n} seeds: deviations that the worst lies above"
        print(json.dumps({"bar": bar, "value": round(above, 2), "must": -3, "aim": 0,
                          "better": "higher"}))  # fmt: skip


if __name__ == "__main__":
    main()
