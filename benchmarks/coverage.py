"""What intervals and verdicts are worth: simulated sweeps whose true answers are known.

    python benchmarks/coverage.py [--sweeps 20000]

Draws accuracies of 3, 5 and 10 seeds, per cent, normal and otherwise: skewed, bounded near 100 and
in steps of a test set of 500, all or nothing, and so good that most are equal. Prints how often the
95 % intervals hold the true mean, how often a family of claims without any true difference has one
that is called supported or contradicted (arms of like and of unlike shape, coarse outcomes, missing
pairs, pairs added after a reading, readings while they come in), and how often a true difference is
found; each with the binomial error of the simulation, two of its deviations. Last a JSON object a
line for each bar. `LIMITS` are nulls that no test of so few seeds can tell from a difference: they
are printed, and are no bar.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sweep.analysis.claims import ACCURACY_STEP, COVERAGE, DIFFERENCE_COVERAGE
from sweep.analysis.looks import levels, penalty
from sweep.analysis.stats import (
    LEVEL,
    compare,
    holm,
    interquartile_mean,
    paired,
    stratified_difference,
)

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]

SEEDS = (3, 5, 10)
FAMILY = 7
"""Contrasts of a family: the paper's tasks."""

FAMILIES = (1, 2, 4, 7)

CHANCE = 50.0
"""The accuracy of a guess: what a seed that fails falls to at worst."""

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


def difference_coverage(draw: Draw, seeds: int, tasks: int, sweeps: int) -> float:
    """How often the bootstrap of the difference of two arms' interquartile means over tasks, scored
    between chance and the best run, holds the true one: none, since the arms are alike.
    """
    rng = np.random.default_rng(seeds)
    hit = 0
    for _ in range(sweeps):
        arms = draw(rng, (2, tasks, seeds))
        best = arms.max(axis=(0, 2), keepdims=True)
        left, right = ((arms - CHANCE) / (best - CHANCE)).tolist()
        _, low, high = stratified_difference(left, right, RESAMPLES)
        hit += low <= 0 <= high
    return hit / sweeps


def _ends(means: Array) -> tuple[Array, Array]:
    low, high = np.percentile(means, [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=-1)
    return low, high


Pairs = Callable[[np.random.Generator, tuple[int, ...]], tuple[Array, Array]]


def _steady(noise: float, share: float = 0.8) -> Pairs:
    # One arm is steady; the other is better, but for the seeds that fail: equal on average.
    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
        falls = np.where(rng.random(shape) < share, 99.0, 60.0)
        mean = 99 * share + 60 * (1 - share)
        return falls + rng.normal(0, noise, shape), rng.normal(mean, noise, shape)

    return draw


def _of_examples(number: int) -> Pairs:
    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
        return tuple(100 * rng.binomial(number, 0.9, shape) / number for _ in range(2))  # type: ignore[return-value]

    return draw


def _like(outcome: str) -> Pairs:
    draw, _ = OUTCOMES[outcome]
    return lambda rng, shape: (draw(rng, shape), draw(rng, shape))


def _either(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
    sides = [np.where(rng.random(shape) < 0.5, 100.0, 50.0) for _ in range(2)]
    return sides[0], sides[1]


def _wide(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
    return rng.normal(80, 0.5, shape), rng.normal(80, 5, shape)


NULLS: dict[str, tuple[Pairs, float]] = {
    **{name: (_like(name), 100 / EXAMPLES) for name in OUTCOMES},
    "one arm ten times as wide": (_wide, 0.01),
    "one arm steady, one failing": (_steady(0.3), 0.01),
    "both arms 100 or 50": (_either, 0.01),
    **{f"{n} test examples": (_of_examples(n), 100 / n) for n in (20, 50, 100, 500)},
}
"""Name -> two arms that are equal on average, and the step that their accuracies come in."""


def _skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
    return 90 - rng.exponential(3, shape), rng.normal(87, 0.5, shape)


def _binomial_steady(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
    better = np.where(rng.random(shape) < 0.8, 0.99, 0.6)
    even = np.full(shape, 0.8 * 0.99 + 0.2 * 0.6)
    return _of_test_set(better, rng), _of_test_set(even, rng)


LIMITS: dict[str, tuple[Pairs, float]] = {
    "one arm skewed, one steady": (_skewed, 0.01),
    "steady and failing, 500 examples": (_binomial_steady, 100 / EXAMPLES),
}
"""Nulls in which what was drawn looks, most of the time, like a difference between normal arms."""


def corrected(left: Array, right: Array, step: float) -> Array:
    """The corrected p of families, (sweeps, contrasts), as claims are judged."""
    return holm(uncorrected(left, right, step))


def uncorrected(left: Array, right: Array, step: float) -> Array:
    """The p of each contrast before Holm's correction; the last axis but one is the family."""
    found = compare(left, right, step, (CHANCE, 100.0))
    return found.p(found.mixed.any(-1, keepdims=True))


def wrong_families(name: str, family: int, seeds: int, sweeps: int) -> float:
    """How often a family of a null has a verdict, as claims are judged."""
    draw, step = (NULLS | LIMITS)[name]
    left, right = draw(np.random.default_rng(seeds), (sweeps, family, seeds))
    return float((corrected(left, right, step) < 1 - LEVEL).any(-1).mean())


def missing_pairs(family: int, seeds: int, sweeps: int) -> float:
    """How often a family of the normal null has a verdict, a third of its pairs missing."""
    rng = np.random.default_rng(seeds)
    ps = np.ones((sweeps, family))
    for there in range(3, seeds + 1):
        left, right = _like("normal")(rng, (sweeps, family, there))
        found = uncorrected(left, right, 100 / EXAMPLES)
        ps = np.where(rng.binomial(seeds, 2 / 3, (sweeps, family)) == there, found, ps)
    return float((holm(ps) < 1 - LEVEL).any(-1).mean())


def extended(family: int, times: int, sweeps: int) -> float:
    """How often a family of the normal null has a verdict at some time, if it is extended until it
    has one: from 3 seeds by 3 more at a time.
    """
    rng = np.random.default_rng(times)
    last = 3 + 3 * times
    left, right = _like("normal")(rng, (sweeps, family, last))
    ever = np.zeros(sweeps, dtype=bool)
    before = np.ones((sweeps, family))
    for number in range(times + 1):
        n = 3 + 3 * number
        p = uncorrected(left[..., :n], right[..., :n], 100 / EXAMPLES) * penalty(number)
        before = np.minimum(before, p)  # What an earlier reading decided stays decided.
        ever |= (holm(before) < 1 - LEVEL).any(-1)
    return float(ever.mean())


def looked_at(looks: tuple[int, ...], family: int, sweeps: int) -> float:
    """How often a family of the normal null has a verdict at one of its looks."""
    rng = np.random.default_rng(len(looks))
    left, right = _like("normal")(rng, (sweeps, family, looks[-1]))
    return float(_decided_at_looks(left, right, looks).any(-1).mean())


def found_at_looks(effect: float, looks: tuple[int, ...], family: int, sweeps: int) -> float:
    """How often a true difference is found at one of the looks."""
    left, right = _apart(effect, np.random.default_rng(len(looks)), (sweeps, family, looks[-1]))
    return float(_decided_at_looks(left, right, looks)[:, 0].mean())


def _decided_at_looks(left: Array, right: Array, looks: tuple[int, ...]) -> NDArray[np.bool_]:
    # Holm's correction of sequential p values, step by step: a contrast is decided at the level
    # that is left, if at some look its p is below what that level spends there.
    sweeps, family, _ = left.shape
    ps = np.stack([uncorrected(left[..., :n], right[..., :n], 0.2) for n in looks], axis=-1)
    decided = np.zeros((sweeps, family), dtype=bool)
    for _ in range(family):
        open_ = family - decided.sum(-1)
        for count in range(1, family + 1):
            level = np.array(levels(looks, (1 - LEVEL) / count))
            now = (ps < level).any(-1)
            decided |= now & (open_ == count)[:, None]
    return decided


def read_while_they_come(family: int, sweeps: int) -> float:
    """How often a family has a final verdict at some time, read after each of its 10 seeds: with
    its plan, the last reading alone is final.
    """
    left, right = _like("normal")(np.random.default_rng(10), (sweeps, family, 10))
    return float((corrected(left, right, 100 / EXAMPLES) < 1 - LEVEL).any(-1).mean())


def _apart(effect: float, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
    # Normal arms with a deviation of 2 points; the first contrast of a family has a difference, in
    # deviations of the difference of two outcomes.
    left, right = rng.normal(75, 2, shape), rng.normal(75, 2, shape)
    left[:, 0] += effect * 2 * math.sqrt(2)
    return left, right


def found(effect: float, seeds: int, sweeps: int, family: int = FAMILY) -> float:
    """How often a true difference is found: `effect` deviations of the differences of normal arms.

    It is one of a family in which the others are without.
    """
    left, right = _apart(effect, np.random.default_rng(seeds), (sweeps, family, seeds))
    return float((corrected(left, right, 0.2)[:, 0] < 1 - LEVEL).mean())


def found_by_pairs(effect: float, seeds: int, sweeps: int, family: int = FAMILY) -> float:
    """The same with the paired t test alone, whatever the shapes: what claims were judged by."""
    left, right = _apart(effect, np.random.default_rng(seeds), (sweeps, family, seeds))
    return float((holm(paired(left - right, ACCURACY_STEP).p)[:, 0] < 1 - LEVEL).mean())


def by_pairs(name: str, family: int, seeds: int, sweeps: int) -> float:
    """How often a family of a null has a verdict by the paired t test alone."""
    draw, _ = (NULLS | LIMITS)[name]
    left, right = draw(np.random.default_rng(seeds), (sweeps, family, seeds))
    p = holm(paired(left - right, ACCURACY_STEP).p)
    return float((p < 1 - LEVEL).any(-1).mean())


def moderated(left: Array, right: Array, step: float) -> Array:
    """The corrected p of families by limma's moderated t test (Smyth 2004), whose variances are
    drawn to what the contrasts of a family have in common. Claims are not judged by it: it errs
    where one contrast is wider than the others, and where seeds fall into groups.
    """
    from scipy.special import polygamma, psi, stdtr

    n = left.shape[-1]
    freedom = 2.0 * (n - 1)
    own = (left.var(axis=-1, ddof=1) + right.var(axis=-1, ddof=1)) / 2
    own = np.maximum(own, step**2 / 2)
    logs = np.log(own) - psi(freedom / 2) + np.log(freedom / 2)
    spread = logs.var(axis=-1, ddof=1, keepdims=True) - polygamma(1, freedom / 2)
    # The prior's degrees of freedom: trigamma(half of them) is the spread; Newton, as limma does.
    wanted = np.maximum(spread, 1e-4)
    half = 0.5 + 1 / wanted
    for _ in range(50):
        now = polygamma(1, half)
        half = np.maximum(half + now * (1 - now / wanted) / polygamma(2, half), 1e-8)
    prior = 2 * half
    common = np.exp(logs.mean(axis=-1, keepdims=True) + psi(half) - np.log(half))
    variance = (prior * common + freedom * own) / (prior + freedom)
    t = (left.mean(axis=-1) - right.mean(axis=-1)) / np.sqrt(2 * variance / n)
    return holm(2 * stdtr(prior + freedom, -np.abs(t)))


def _one_wide(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
    # The first contrast of a family is ten times as wide as the others.
    width = np.where(np.arange(shape[-2]) == 0, 5.0, 0.5)[:, None]
    return rng.normal(80, width, shape), rng.normal(80, width, shape)


MODERATED: dict[str, tuple[Pairs, float]] = {
    "one contrast ten times as wide": (_one_wide, 0.01),
    **{
        name: NULLS[name]
        for name in ("normal", "one arm ten times as wide", "one arm steady, one failing")
    },
}
"""Nulls by which the moderated variance is judged."""


def _heads() -> str:
    return "".join(f"{f'family of {m}':>12}" for m in FAMILIES)


def error(share: float, sweeps: int) -> float:
    """Two deviations of a share that was seen in so many sweeps."""
    return 2 * math.sqrt(max(share * (1 - share), 1 / sweeps) / sweeps)


def over_tasks(
    covers: Callable[[Draw, int, int, int], float], sweeps: int
) -> dict[str, list[tuple[float, int]]]:
    """How often an interval over tasks holds the truth: outcome and number of tasks -> by seeds."""
    return {
        f"{name}, {tasks} tasks": [(covers(draw, n, tasks, sweeps), sweeps) for n in SEEDS]
        for name, (draw, _) in OUTCOMES.items()
        for tasks in (4, 7)
    }


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
    aggregates = over_tasks(aggregate_coverage, sweeps // 20)
    show("95 % stratified bootstrap of the interquartile mean over tasks", aggregates)
    differences = over_tasks(difference_coverage, sweeps // 20)
    show("the same of the difference of two arms, between chance and the best", differences)
    every: dict[str, list[tuple[float, int]]] = {}
    for family in FAMILIES:
        rows = {
            name: [(wrong_families(name, family, n, sweeps), sweeps) for n in SEEDS]
            for name in NULLS
        }
        rows["missing pairs"] = [(missing_pairs(family, n, sweeps), sweeps) for n in SEEDS]
        show(f"a wrong verdict in a family of {family} without a true difference", rows)
        every |= {f"{name}, {family}": row for name, row in rows.items()}
        show(
            "the same by the paired t test alone",
            {name: [(by_pairs(name, family, n, sweeps), sweeps) for n in SEEDS] for name in NULLS},
        )
        show(
            "what no test of so few seeds can tell from a difference",
            {
                name: [(wrong_families(name, family, n, sweeps), sweeps) for n in SEEDS]
                for name in LIMITS
            },
        )
    print(f"\nread more than once: a verdict at some time\n{'':<40}" + _heads())
    readings = {
        "extended once, by 3 seeds": [extended(m, 1, sweeps) for m in FAMILIES],
        "extended four times": [extended(m, 4, sweeps) for m in FAMILIES],
        "looks at 3, 5, 10": [looked_at((3, 5, 10), m, sweeps) for m in FAMILIES],
        "looks at 5, 10, 20, 30": [looked_at((5, 10, 20, 30), m, sweeps) for m in FAMILIES],
        "read after each of 10 seeds, final": [read_while_they_come(m, sweeps) for m in FAMILIES],
    }
    for name, shares in readings.items():
        print(f"{name:<40}" + "".join(f"{100 * share:>12.1f}" for share in shares))
    show(
        f"a true difference found, among {FAMILY} claims (in deviations of the differences)",
        {f"{d} deviations": [(found(d, n, sweeps), sweeps) for n in SEEDS] for d in (1, 2, 4, 8)},
    )
    show(
        "the same by the paired t test alone",
        {f"{d} deviations": [(found_by_pairs(d, n, sweeps), sweeps) for n in SEEDS]
         for d in (1, 2, 4, 8)},
    )  # fmt: skip
    show(
        "the same read once at 5 and 10 seeds, and by looks at 3, 5 and 10",
        {f"{d} deviations, {m} claims": [(one, sweeps) for one in (
            found(d, 5, sweeps, m), found(d, 10, sweeps, m),
            found_at_looks(d, (3, 5, 10), m, sweeps))]
         for d in (0.5, 1, 2) for m in (1, FAMILY)},
    )  # fmt: skip

    for name, test in (("claims", corrected), ("the moderated t test", moderated)):
        show(
            f"a wrong verdict in a family of {FAMILY} by {name}",
            {
                null: [
                    (float((test(*draw(np.random.default_rng(n), (sweeps, FAMILY, n)), step)
                            < 1 - LEVEL).any(-1).mean()), sweeps)
                    for n in SEEDS
                ]
                for null, (draw, step) in MODERATED.items()
            },
        )  # fmt: skip
        show(
            f"a true difference found, among {FAMILY}, by {name}",
            {
                f"{d} deviations": [
                    (float((test(*_apart(d, np.random.default_rng(n), (sweeps, FAMILY, n)), 0.2)
                            [:, 0] < 1 - LEVEL).mean()), sweeps)
                    for n in SEEDS
                ]
                for d in (1, 2, 4)
            },
        )  # fmt: skip

    print()
    for n, (coverage, of) in zip(SEEDS, means["normal"], strict=True):
        off = abs(coverage - LEVEL) / error(LEVEL, of) * 2
        bar = f"t interval on normal outcomes, {n} seeds: deviations from 95 %"
        print(json.dumps({"bar": bar, "value": round(off, 2), "must": 3, "aim": 2,
                          "better": "lower"}))  # fmt: skip
    worst = max(share for shares in every.values() for share, _ in shares)
    worst = max(worst, *(share for shares in readings.values() for share in shares))
    bar = "wrong families of claims, the worst of all nulls, families and seeds, per cent"
    print(json.dumps({"bar": bar, "value": round(100 * worst, 2), "must": 6, "aim": 5,
                      "better": "lower"}))  # fmt: skip
    for d in (2, 4):
        for n in SEEDS:
            gain = found(d, n, sweeps) - found_by_pairs(d, n, sweeps)
            bar = f"found at {d} deviations, {n} seeds: points more than by the paired t test"
            print(json.dumps({"bar": bar, "value": round(100 * gain, 2), "must": 0, "aim": 0,
                              "better": "higher"}))  # fmt: skip
    for what, printed, measured in (
        ("of the bootstrap", COVERAGE, aggregates),
        ("of the difference's", DIFFERENCE_COVERAGE, differences),
    ):
        for number, n in enumerate(SEEDS):
            share, of = min(shares[number] for shares in measured.values())
            above = (100 * share - printed[n]) / (100 * error(share, of)) * 2
            bar = f"what is printed {what}, {n} seeds: deviations that the worst lies above"
            print(json.dumps({"bar": bar, "value": round(above, 2), "must": -3, "aim": 0,
                              "better": "higher"}))  # fmt: skip


if __name__ == "__main__":
    main()
