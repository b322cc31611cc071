from __future__ import annotations

import csv
import io
import itertools
import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats
from scipy.optimize import brentq
from statsmodels.stats.multitest import multipletests
from typer.testing import CliRunner

import sweep as api
from sweep.analysis import history
from sweep.analysis.claims import COVERAGE, Contrast, Judged, judge, show
from sweep.cli import app
from sweep.ledger.ledger import Ledger
from sweep.sweepfile.expansion import load
from sweep.sweepfile.schema import SweepFileError
from sweep.sweepfile.trials import Point, Sweep
from tests.support import failure_row, trial_row

FILE = """\
sweep: demo
trial: {steps: 100, backbone: {name: gpt2, size: tiny}}
axes:
  pretraining: [language, random, statistics]
  task: [bit-xor, bit-memory, listops]
  seed: [0, 1, 2, 3]
claims:
  - {that: language > random, axis: pretraining, per: task}
  - {that: statistics < random, axis: pretraining, per: task}
"""

Make = Callable[..., tuple[Sweep, Ledger]]
Accuracy = Callable[[Point], float]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(text: str = FILE) -> tuple[Sweep, Ledger]:
        file = tmp_path / "sweep.yaml"
        file.write_text(text)
        return load(file), Ledger(tmp_path / "results")

    return make


def problems_of(make: Make, text: str) -> list[str]:
    with pytest.raises(SweepFileError) as caught:
        make(text)
    return [one.partition("sweep.yaml:")[2] for one in caught.value.problems]


def drawn(number: int) -> Accuracy:
    """Accuracies of which language's are 6 points better on bit-xor, and statistics' nowhere."""
    rng = np.random.default_rng(number)
    values: dict[str, float] = {}

    def accuracy(point: Point) -> float:
        better = 0.06 * (point.label.startswith("language/bit-xor"))
        return values.setdefault(point.label, round(0.7 + better + rng.normal(0, 0.01), 4))

    return accuracy


def commit(sweep: Sweep, ledger: Ledger, accuracy: Accuracy) -> None:
    for point in sweep.points:
        ledger.commit(trial_row(point, test_accuracy=accuracy(point)))


def values(sweep: Sweep, accuracy: Accuracy, arm: str, task: str) -> list[float]:
    found = [p for p in sweep.points if (p.labels["pretraining"], p.labels["task"]) == (arm, task)]
    return [100 * accuracy(point) for point in found]


# --- statistics, against those of others


@pytest.mark.parametrize("number", range(3))
def test_contrasts_are_scipys_and_statsmodels(make: Make, number: int) -> None:
    sweep, ledger = make()
    accuracy = drawn(number)
    commit(sweep, ledger, accuracy)
    arms = [("language", "random"), ("statistics", "random")]
    tasks = ["bit-xor", "bit-memory", "listops"]
    sides = [
        (values(sweep, accuracy, left, task), values(sweep, accuracy, right, task))
        for (left, right), task in itertools.product(arms, tasks)
    ]
    theirs = [scipy_stats.ttest_ind(left, right, equal_var=False) for left, right in sides]
    corrected = multipletests([one.pvalue for one in theirs], method="holm")[1]

    judged = judge(sweep, ledger)

    assert [tuple(one.place.values()) for one in judged.contrasts] == [(t,) for t in tasks] * 2
    for ours, test, p, (left, right) in zip(
        judged.contrasts, theirs, corrected, sides, strict=True
    ):
        differences = np.subtract(left, right)
        low, high = test.confidence_interval()
        assert ours.difference == pytest.approx(differences.mean())
        assert (ours.low, ours.high) == pytest.approx((low, high))
        deviation = np.hypot(np.std(left, ddof=1), np.std(right, ddof=1))
        assert ours.effect == pytest.approx(differences.mean() / deviation)
        assert (ours.p, ours.p_holm) == pytest.approx((test.pvalue, p))
        assert (ours.pairs, ours.expected) == (4, 4)
    assert judged.contrasts[0].verdict == "supported"


def test_the_sign_decides_between_supported_and_contradicted(make: Make) -> None:
    sweep, ledger = make(FILE.replace("language > random", "language < random"))
    commit(sweep, ledger, drawn(0))

    first, *_ = judge(sweep, ledger).contrasts

    assert first.difference is not None
    assert first.difference > 4
    assert first.verdict == "contradicted"


def test_a_loss_is_compared_as_a_number(make: Make) -> None:
    sweep, ledger = make(
        FILE.replace("language > random, axis: p", "language > random, on: test_loss, axis: p")
    )
    for point in sweep.points:
        worse = point.labels["pretraining"] == "language"
        ledger.commit(trial_row(point, test_loss=1 + worse + 0.2 * point.config.seed))

    first, *_ = judge(sweep, ledger).contrasts

    assert first.verdict == "supported"
    assert first.difference == pytest.approx(1)


def simulated_power(effect: float, n: int, level: float) -> float:
    """How often Welch's test finds a difference of so many deviations of a difference."""
    rng = np.random.default_rng(n)
    left, right = rng.normal(0, 2**-0.5, (2, 20_000, n))
    found = scipy_stats.ttest_ind(left + effect, right, axis=-1, equal_var=False)
    return float((found.pvalue < level).mean())


def test_seeds_that_would_decide_are_counted(make: Make) -> None:
    # One contrast with a difference of about a deviation, five without any.
    sweep, ledger = make()
    spread = {0: 0.0, 1: 0.01, 2: 0.02, 3: 0.03}

    def accuracy(point: Point) -> float:
        own = point.label.startswith("language/listops")
        return 0.5 + spread[point.config.seed] + 0.02 * own

    commit(sweep, ledger, accuracy)

    contrasts = judge(sweep, ledger).contrasts

    one = contrasts[2]
    assert one.verdict == "undecided"
    assert one.effect == pytest.approx(0.02 / np.hypot(0.0129099, 0.0129099), rel=1e-4)
    assert one.more_seeds is not None
    assert one.edit == f"seed: {list(range(4 + one.more_seeds))}"
    assert one.plan == f"looks: [4, {4 + one.more_seeds}]"
    # This is the last reading of its plan: further ones have a tenth of the level.
    level = 0.05 / 6 / 10
    assert simulated_power(one.effect, 4 + one.more_seeds, level) == pytest.approx(0.8, abs=0.02)
    assert simulated_power(one.effect, 3 + one.more_seeds, level) < 0.81
    assert {c.verdict for c in contrasts if c is not one} == {"undecided"}
    assert all(c.more_seeds is c.edit is None for c in contrasts if c is not one)


def test_equal_differences_are_no_proof(make: Make) -> None:
    # Whatever their size: of a loss as well.
    text = FILE.replace("[0, 1, 2, 3]", "[0, 1, 2]")
    sweep, ledger = make(text.replace("language > random,", "language > random, on: test_loss,"))
    for point in sweep.points:
        better = point.label.startswith("language")
        ledger.commit(trial_row(point, test_accuracy=0.9, test_loss=2 - better))

    one, other, *_ = judge(sweep, ledger).contrasts

    assert (one.difference, one.verdict) == (-1.0, "undecided")
    # Two groups of three: one of twenty ways to share six outcomes out, and as many the other way.
    assert one.p == pytest.approx(0.1)
    assert one.more_seeds is not None
    assert other.verdict == "undecided"


def test_two_pairs_are_no_proof(make: Make) -> None:
    sweep, ledger = make()
    for point in sweep.points:
        if point.config.seed < 2:
            better = 0.01 * point.label.startswith("language")
            ledger.commit(trial_row(point, test_accuracy=0.9 + better + 1e-5 * point.config.seed))

    one, *_ = judge(sweep, ledger).contrasts

    assert (one.pairs, one.verdict, one.p_holm) == (2, "undecided", None)
    assert "no verdict from 2 pairs: 3 at least" in one.notes


def test_the_step_of_an_accuracy_is_that_of_its_own_test_set(make: Make) -> None:
    # 20 trees: 5 points each. One tree more in all seeds of one arm, and next to no spread.
    text = FILE.replace("[bit-xor, bit-memory, listops]", "[{name: listops, test: 20}]")
    sweep, ledger = make(text)
    for point in sweep.points:
        trees = 10 + point.label.startswith("language")
        ledger.commit(trial_row(point, test_accuracy=trees / 20 + 1e-4 * (point.config.seed == 0)))

    one, *_ = judge(sweep, ledger).contrasts

    # Five points over a spread of five, four times: t = 2.
    assert one.effect == pytest.approx(1)
    assert one.verdict == "undecided"


# --- with what there is so far


def test_an_empty_ledger_tests_nothing(make: Make) -> None:
    sweep, ledger = make()

    judged = judge(sweep, ledger)

    assert {one.verdict for one in judged.contrasts} == {"untested"}
    assert {(one.pairs, one.expected) for one in judged.contrasts} == {(0, 4)}
    assert judged.aggregates == ()
    assert "language: missing (seed 0, 1, 2, 3)" in judged.contrasts[0].notes
    assert "untested" in judged.to_markdown()


def test_a_verdict_is_not_undone_by_what_trains_later(make: Make) -> None:
    sweep, ledger = make()
    accuracy = drawn(2)
    supported = 0
    for point in sorted(sweep.points, key=lambda point: point.labels["task"] != "bit-xor"):
        ledger.commit(trial_row(point, test_accuracy=accuracy(point)))
        if point.config.seed == 3 and point.labels["pretraining"] != "language":
            now = judge(sweep, ledger).contrasts[0].verdict == "supported"
            assert now >= supported
            supported = now
    assert supported


def test_notes_say_what_became_of_a_pair(make: Make) -> None:
    sweep, ledger = make()
    fates: dict[str, dict[str, Any] | None] = {
        "language/bit-xor/0": None,
        "random/bit-xor/1": {"outcome": "diverged"},
        "random/bit-xor/2": {"outcome": "diverged", "test_accuracy": None},
        "random/bit-xor/3": {"accumulation": 2},
        "random/bit-memory/0": None,
    }
    for point in sweep.points:
        own = fates.get(point.label, {})
        if own is not None:
            ledger.commit(trial_row(point, **own))
    lost = next(point for point in sweep.points if point.label == "random/bit-memory/0")
    ledger.fail(failure_row(lost))

    one, other, *_ = judge(sweep, ledger).contrasts

    assert (one.pairs, one.expected, len(one.trials)) == (3, 4, 4)
    assert one.notes[:4] == (
        "language: missing (seed 0)",
        "random: diverged, the last good figures before that count (seed 1)",
        "random: diverged, without a figure, counted as the trivial baseline (seed 2)",
        "random: each batch in 2 parts, since it did not fit into memory (seed 3)",
    )
    assert other.notes[0] == "random: failed (code, OverflowError) (seed 0)"


def test_a_contrast_over_two_kinds_of_device_says_so(make: Make) -> None:
    sweep, ledger = make()
    for point in sweep.points:
        gpu = point.label in ("language/bit-xor/0", "language/bit-xor/2")
        ledger.commit(trial_row(point, device="cuda" if gpu else "cpu"))

    one, other, *_ = judge(sweep, ledger).contrasts

    assert one.notes[0] == (
        "trained on different devices: language on cuda (seed 0, 2); random on cpu "
        "(seed 0, 1, 2, 3); language on cpu (seed 1, 3)"
    )
    assert not any("device" in note for note in other.notes)


def test_pairs_that_are_still_to_come_may_decide(make: Make) -> None:
    sweep, ledger = make(FILE.replace("[0, 1, 2, 3]", str(list(range(40)))))
    for point in sweep.points:
        if point.config.seed < 3:
            better = 0.02 * point.label.startswith("language") * point.config.seed
            accuracy = 0.5 + better + 0.003 * point.config.seed
            ledger.commit(trial_row(point, test_accuracy=accuracy))

    one, *_ = judge(sweep, ledger).contrasts

    assert (one.verdict, one.more_seeds, one.edit) == ("undecided", 0, None)
    assert one.provisional

    # Those that have ended without a figure never will.
    for point in sweep.points:
        if point.config.seed >= 3:
            ledger.commit(trial_row(point, test_accuracy=None))
    one, *_ = judge(sweep, ledger).contrasts

    assert (one.verdict, one.pairs) == ("undecided", 3)
    assert one.more_seeds is not None
    assert one.more_seeds > 0


def test_steps_to_convergence_can_be_claimed(make: Make) -> None:
    sweep, ledger = make(
        FILE.replace("axis: pretraining,", "on: steps_to_convergence, axis: pretraining,")
    )
    for point in sweep.points:
        ledger.commit(trial_row(point))
        slow = point.labels["pretraining"] == "random"
        rises = (800 if slow else 300) + 100 * point.config.seed * slow
        stays = point.label != "random/bit-memory/0"
        curve = [
            {"step": step, "split": "validation", "loss": 1.0,
             "accuracy": 0.5 + 0.4 * (step >= rises) if stays else step / 4000}
            for step in range(100, 3000, 100)
        ]  # fmt: skip
        ledger.append_curve(point.trial_id, "a1", 0, curve)

    one, other, *_ = judge(sweep, ledger).contrasts

    assert one.verdict == "contradicted"  # it is faster: fewer steps
    assert one.difference == -650
    assert (other.pairs, other.expected) == (3, 4)
    assert other.notes[0] == "random: not converged in 2,900 steps, left out (seed 0)"


def test_arms_are_told_to_be_untuned_or_unlike(make: Make) -> None:
    text = """\
sweep: unlike
trial: {task: bit-xor, steps: 100, pretraining: random}
axes:
  system:
    - {label: gpt2, backbone: {name: gpt2, size: tiny}}
    - {label: lstm, backbone: {name: lstm, layers: 2, width: 32}, learning_rate: 3e-4, steps: 50}
  seed: [0, 1]
claims: [{that: gpt2 > lstm, axis: system}]
"""
    sweep, ledger = make(text.replace("width: 32}", "width: 32, heads: 1}"))

    (one,) = judge(sweep, ledger).contrasts

    assert one.notes[2:] == (
        "each arm at one learning rate (0.001, 0.0003), not tuned",
        "the arms differ in learning_rate, steps too",
    )


def test_an_answer_that_depends_on_the_learning_rate_is_flagged(make: Make) -> None:
    text = FILE.replace("  task: [bit-xor, bit-memory, listops]", "  task: [bit-xor]").replace(
        "  seed:", "  learning_rate: [0.001, 0.01]\n  seed:"
    )
    sweep, ledger = make(text.replace("per: task", "per: [task, learning_rate]"))
    for point in sweep.points:
        high = point.config.learning_rate > 0.005
        better = point.labels["pretraining"] == "language"
        accuracy = 0.6 + 0.03 * (better != high) + 0.002 * point.config.seed
        ledger.commit(trial_row(point, test_accuracy=accuracy))

    contrasts = judge(sweep, ledger).contrasts

    told = "the answer depends on the learning rate: supported at 0.001, contradicted at 0.01"
    assert [told in one.notes for one in contrasts] == [True, True, False, False]
    assert not any("not tuned" in note for one in contrasts for note in one.notes)


def test_an_answer_that_depends_on_the_budget_of_tuning_is_flagged(make: Make) -> None:
    text = """\
sweep: tuned
trial: {task: bit-xor, backbone: {name: gpt2, size: tiny}, steps: 40}
axes: {pretraining: [language, random], seed: [0, 1, 2]}
tune: {learning_rate: {values: [1.0e-3, 1.0e-2]}, seeds: [100]}
claims: [{that: language > random, axis: pretraining}]
"""
    # One point: 0.5 on average against 0.6. Both: 0.9 against 0.7.
    found = {"language": (0.1, 0.9), "random": (0.5, 0.7)}

    def judged(arms: dict[str, tuple[float, float]], name: str) -> Contrast:
        sweep, _ = make(text)
        ledger = Ledger(sweep.file.parent / name)
        for point in sweep.tunings:
            low, high = arms[point.labels["pretraining"]]
            value = high if point.config.learning_rate > 0.005 else low
            ledger.commit(trial_row(point, validation_accuracy=value))
        return judge(sweep, ledger).contrasts[0]

    told = (
        "which arm is ahead depends on the budget of tuning: by expected best of so many points "
        "language with 2, random with 1"
    )
    assert told in judged(found, "turned").notes
    same = judged(found | {"language": (0.65, 0.9)}, "same")
    assert not any("budget" in note for note in same.notes)


# --- over tasks


def test_arms_are_summed_up_over_tasks(make: Make) -> None:
    sweep, ledger = make()
    accuracy = drawn(0)
    commit(sweep, ledger, accuracy)
    tasks = ["bit-xor", "bit-memory", "listops"]

    judged = judge(sweep, ledger)

    assert [one.arm for one in judged.aggregates] == ["language", "random", "statistics"]
    assert all(one.even for one in judged.aggregates)
    for one in judged.aggregates:
        runs = [values(sweep, accuracy, one.arm, task) for task in tasks]
        assert one.mean == pytest.approx(scipy_stats.trim_mean(np.ravel(runs), 0.25))
        assert one.low is not None
        assert one.high is not None
        assert one.low < one.mean < one.high
        assert (one.places, one.of, one.runs) == (3, 3, 12)
        assert one.coverage == COVERAGE[3]
        assert len(one.trials) == 12


def test_arms_are_summed_up_where_all_of_them_ran(make: Make) -> None:
    sweep, ledger = make()
    for point in sweep.points:
        # listops of one arm is still to come, and bit-memory has two seeds.
        if point.label.startswith("random/listops"):
            continue
        if point.labels["task"] == "bit-memory" and point.config.seed > 1:
            continue
        ledger.commit(trial_row(point))

    judged = judge(sweep, ledger)

    assert {(one.places, one.of, one.runs) for one in judged.aggregates} == {(2, 3, 6)}
    # Two runs of a task: no interval is shown.
    assert {(one.low, one.high, one.coverage) for one in judged.aggregates} == {(None,) * 3}
    assert "over the 2 of 3 places at which every arm has a run" in judged.to_markdown()
    assert "more runs at some places than at others, which weigh more" in judged.to_markdown()


# --- groups of outcomes


def outcomes(make: Make, left: list[float], right: list[float], text: str = FILE) -> Judged:
    """The first claim with these accuracies on bit-xor; all else is alike, with a little spread."""
    seeds = list(range(len(left)))
    sweep, ledger = make(text.replace("[0, 1, 2, 3]", str(seeds)))
    given = {"language": left, "random": right}
    for point in sweep.points:
        arm, seed = point.labels["pretraining"], point.config.seed
        own = point.labels["task"] == "bit-xor" and arm in given
        value = given[arm][seed] if own else 0.7 + 0.01 * (seed % 3)
        ledger.commit(trial_row(point, test_accuracy=value, baseline_accuracy=0.5))
    return judge(sweep, ledger)


ALONE = FILE.replace("task: [bit-xor, bit-memory, listops]", "task: [bit-xor]").partition(
    "  - {that: statistics"
)[0]


def test_an_arm_in_two_groups_is_judged_by_the_share_that_solves_it(make: Make) -> None:
    left = [0.99, 0.991, 0.989, 0.99, 0.992, 0.99, 0.6, 0.99]
    right = [0.6, 0.601, 0.599, 0.99, 0.6, 0.602, 0.6, 0.6]

    (one,) = outcomes(make, left, right, ALONE).contrasts

    assert one.p == pytest.approx(scipy_stats.fisher_exact([[7, 1], [1, 7]]).pvalue)
    assert one.verdict == "supported"
    assert (one.low_family, one.high_family) == (None, None)
    assert one.notes[0].startswith(
        "outcomes fall into two groups, and 7 of 8 of language, 1 of 8 of random are in the upper"
    )


def test_a_steady_arm_beside_one_that_fails_now_and_then_has_no_verdict(make: Make) -> None:
    # Equal on average, if the left one fails one time in five; here it did not.
    left, right = [0.990, 0.988, 0.992], [0.912, 0.911, 0.913]
    assert scipy_stats.ttest_ind(left, right, equal_var=False).pvalue < 1e-4

    (one,) = outcomes(make, left, right, ALONE).contrasts

    # The worse arm could reach 100, the better one fall to chance: both shares make up 7.8 points.
    shares = np.linspace(0, 1, 2001)
    fall, rise = shares * 7.8 / (99 - 50), (1 - shares) * 7.8 / (100 - 91.2)
    unseen = 2 * (((1 - fall) * (1 - rise)) ** 3).max()
    assert one.p == pytest.approx(min(unseen, 1), rel=1e-2)
    assert one.verdict == "undecided"
    assert "each arm is a group of its own" in one.notes[0]
    assert one.more_seeds is not None

    # As many seeds as are asked for, if none of them fails.
    more = one.more_seeds + 3
    again = outcomes(make, (left * more)[:more], (right * more)[:more], ALONE)
    assert again.contrasts[0].verdict == "supported"


def test_groups_in_one_arm_make_wary_of_the_others(make: Make) -> None:
    steady = outcomes(make, [0.80, 0.82, 0.81], [0.72, 0.70, 0.71], ALONE).contrasts[0]
    assert steady.verdict == "supported"

    sweep, ledger = make(FILE.replace("[0, 1, 2, 3]", "[0, 1, 2]"))
    fails = {
        ("language", "bit-memory"): [0.99, 0.99, 0.5],
        ("random", "bit-memory"): [0.99] * 3,
        ("language", "bit-xor"): [0.80, 0.82, 0.81],
        ("random", "bit-xor"): [0.72, 0.70, 0.71],
    }
    for point in sweep.points:
        own = fails.get((point.labels["pretraining"], point.labels["task"]), [0.7, 0.71, 0.72])
        value = own[point.config.seed]
        ledger.commit(trial_row(point, test_accuracy=value, baseline_accuracy=0.5))

    one, other, *_ = judge(sweep, ledger).contrasts

    assert "other arms of this file have outcomes in two groups" in one.notes[0]
    assert one.p is not None
    assert steady.p is not None
    assert one.p > steady.p
    assert "2 of 3 of language, 3 of 3 of random" in other.notes[0]


# --- looks, extensions, changes


def noisy(number: int, better: float = 0.0) -> Accuracy:
    rng = np.random.default_rng(number)
    values: dict[str, float] = {}

    def accuracy(point: Point) -> float:
        more = better * point.label.startswith("language")
        return values.setdefault(point.label, float(0.7 + more + rng.normal(0, 0.01)))

    return accuracy


def seeds(number: int) -> str:
    return ALONE.replace("[0, 1, 2, 3]", str(list(range(number))))


def test_a_verdict_is_provisional_until_all_pairs_have_ended(make: Make) -> None:
    sweep, ledger = make(seeds(5))
    accuracy = noisy(0, better=0.2)
    for point in sweep.points:
        if point.config.seed < 4:
            ledger.commit(trial_row(point, test_accuracy=accuracy(point)))

    early = show(sweep, ledger)
    commit(sweep, ledger, accuracy)
    late = show(sweep, ledger)

    assert early.contrasts[0].provisional
    assert "(provisional)" in early.to_markdown()
    assert "(provisional)" in early.to_latex()
    assert early.final == ()
    assert not late.contrasts[0].provisional
    assert "provisional" not in late.to_markdown()
    (note,) = ledger.notes.on_claims("demo", "readings").values()
    assert note["contrasts"][0]["pairs"] == ["0", "1", "2", "3", "4"]
    assert note["contrasts"][0]["verdict"] == late.contrasts[0].verdict
    show(sweep, ledger)
    assert len(ledger.notes.on_claims("demo", "readings")) == 1  # no other reading


def test_looks_count_the_first_pairs_alone(make: Make) -> None:
    sweep, ledger = make(seeds(10).replace("per: task}", "per: task, looks: [3, 5, 10]}"))
    accuracy = noisy(1, better=0.01)
    for point in sweep.points:
        if point.config.seed < 7:
            ledger.commit(trial_row(point, test_accuracy=accuracy(point)))

    (one,) = judge(sweep, ledger).contrasts

    def p(pairs: int) -> float:
        own = [[accuracy(q) for q in sweep.points
                if q.labels["pretraining"] == arm and q.config.seed < pairs]
               for arm in ("language", "random")]  # fmt: skip
        return float(scipy_stats.ttest_ind(*own, equal_var=False).pvalue)

    assert (one.pairs, one.provisional) == (5, False)
    assert one.p == pytest.approx(p(5), rel=1e-4)
    assert "read at 3, 5, 10 pairs; this is look 2, 5 pairs count" in one.notes
    # The least total error at which the level of a look reaches its p, by O'Brien and Fleming's
    # spending function as Lan and DeMets give it.
    normal = scipy_stats.norm

    def spent(total: float, part: float) -> float:
        return float(2 * normal.sf(normal.isf(total / 2) / part**0.5))

    totals = [
        brentq(lambda total: spent(total, 0.3) - p(3), 1e-9, 0.999),
        brentq(lambda total: spent(total, 0.5) - spent(total, 0.3) - p(5), 1e-9, 0.3)
        if p(5) < spent(0.3, 0.5) - spent(0.3, 0.3) else 1.0,
    ]  # fmt: skip
    least = min(totals)
    assert one.p_holm == pytest.approx(least if least < 0.3 else 1.0, rel=1e-4)


def test_pairs_added_after_a_reading_cost(make: Make) -> None:
    accuracy = noisy(2, better=0.02)
    sweep, ledger = make(seeds(3))
    commit(sweep, ledger, accuracy)
    first = show(sweep, ledger).contrasts[0]
    assert first.verdict == "undecided"
    assert first.plan is not None

    sweep, ledger = make(seeds(6))
    commit(sweep, ledger, accuracy)
    second = show(sweep, ledger).contrasts[0]

    assert second.p_holm == pytest.approx(min(10 * (second.p or 0), first.p or 1))
    assert "extended after a final reading of 3 pairs: reading 2, its p times 10" in second.notes
    assert "reading 2, its p times 10" in judge(sweep, ledger).to_markdown()

    sweep, ledger = make(seeds(9))
    commit(sweep, ledger, accuracy)
    third = judge(sweep, ledger).contrasts[0]
    assert "extended after a final reading of 6 pairs: reading 3, its p times 30" in third.notes


def test_a_family_that_was_cut_after_results_says_so(make: Make) -> None:
    sweep, ledger = make(FILE)
    history.register(sweep, ledger)
    history.register(sweep, ledger)  # as every run does
    commit(sweep, ledger, drawn(0))
    whole = show(sweep, ledger)
    assert whole.changed is None
    assert whole.noted is not None

    cut, _ = make(FILE.partition("  - {that: statistics")[0].replace("language >", "language <"))
    judged = show(cut, ledger)

    told = "claims changed after results: 3 contrasts, at first 6"
    assert judged.changed == told
    for one, before in zip(judged.contrasts, whole.contrasts, strict=False):
        assert one.p_first == before.p_holm
        assert one.p_first is not None
        assert one.p_holm is not None
        assert one.p_holm <= one.p_first
        assert any(told in note for note in one.notes)
    assert told in judged.to_markdown()
    assert told in judged.to_latex()
    assert told in judged.to_csv()
    assert judged.record()["family"]["changed"] == told
    # A claim that is turned round is another list, too.
    turned, _ = make(FILE.replace("language >", "language <"))
    changed = judge(turned, ledger).changed
    assert changed == "claims changed after results: 6 contrasts, at first 6"
    # And back as it was.
    assert judge(sweep, ledger).changed is None


def test_seeds_that_were_cut_after_results_are_told(make: Make) -> None:
    sweep, ledger = make(FILE)
    history.register(sweep, ledger)
    commit(sweep, ledger, drawn(0))
    fewer, _ = make(FILE.replace("[0, 1, 2, 3]", "[0, 1, 2]"))

    assert judge(fewer, ledger).changed == (
        "claims changed after results: 6 contrasts, at first 6; seed: 3 points, at first 4"
    )


def test_a_list_that_came_after_results_is_not_the_first(make: Make) -> None:
    sweep, ledger = make(FILE)
    commit(sweep, ledger, drawn(0))
    assert "no list of claims was noted before these results" in judge(sweep, ledger).to_markdown()

    history.register(sweep, ledger)

    assert "was first noted when 36 trials had results" in judge(sweep, ledger).to_markdown()


def test_what_cannot_be_read_of_the_past_is_left_out(make: Make) -> None:
    sweep, ledger = make(FILE)
    commit(sweep, ledger, drawn(0))
    ledger.notes.put("demo", "families", "a", {"claims": 1})
    ledger.notes.put("demo", "readings", "a", {"contrasts": [{}, 3]})

    assert judge(sweep, ledger).unnoted


def test_a_diverged_trial_counts_as_chance_and_both_results_are_said(make: Make) -> None:
    sweep, ledger = make(seeds(4))
    accuracy = noisy(3, better=0.1)
    for point in sweep.points:
        gone = point.label == "language/bit-xor/0"
        how = {"outcome": "diverged", "test_accuracy": None} if gone else {}
        row = {"test_accuracy": accuracy(point), "baseline_accuracy": 0.5, **how}
        ledger.commit(trial_row(point, **row))

    (one,) = judge(sweep, ledger).contrasts

    left = [accuracy(p) for p in sweep.points if p.label.startswith("language")]
    right = [accuracy(p) for p in sweep.points if p.label.startswith("random")]
    assert one.difference == pytest.approx(100 * (np.mean([0.5, *left[1:]]) - np.mean(right)))
    alone = scipy_stats.ttest_ind(left[1:], right[1:], equal_var=False).pvalue
    (told,) = [note for note in one.notes if note.startswith("without those that diverged")]
    shown = "< 0.001" if alone < 0.001 else f"{alone:.3f}"
    assert f"p {shown}, with them" in told


# --- proven when the file is read


def test_an_exclusion_that_breaks_pairs_is_warned_about(make: Make) -> None:
    text = FILE + (
        "exclude:\n  - {pretraining: random, task: listops}\n"
        "  - {pretraining: language, seed: 3}\n  - {task: bit-memory, missing: nowhere}\n"
    )
    sweep, ledger = make(text)

    warnings = [one.partition("sweep.yaml:")[2] for one in sweep.warnings]

    assert warnings[0] == (
        "8: claims[0].that: language > random: 1 of 4 pairs are lost at bit-xor: "
        "exclude[1] (line 12) leaves out language"
    )
    assert any("at listops: exclude[0] (line 11) leaves out random" in one for one in warnings)
    gone = "all pairs are lost at bit-memory: exclude[2] (line 13) leaves out both sides"
    assert any(one.endswith(f"statistics < random: {gone}") for one in warnings)
    contrasts = judge(sweep, ledger).contrasts
    assert {one.expected for one in contrasts if one.place["task"] == "listops"} == {0}


def test_what_is_left_out_of_both_sides_on_purpose_is_no_loss(make: Make) -> None:
    sweep, _ = make(FILE + "exclude: [{task: listops}, {seed: 1}]\n")

    assert sweep.warnings == ()


EXCLUDED = "per: task}\nexclude: [{pretraining: language, seed: "


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("per: task}", EXCLUDED + "'*'}]",
         "claims[0].that: the sweep has no trial with pretraining language that could be paired"),
        ("per: task}", EXCLUDED + "[0, 1]}, {pretraining: random, seed: [2, 3]}]",
         "claims[0].that: no seed has a trial of both sides at any task; 2 of 4 pairs are lost"),
        (", per: task", "", "one for each point of axis task; make the claim `per: task`"),
        ("per: task", "per: seed", "claims[0]: 'seed' is named twice; axis, per and"),
        ("language > random", "random > random", "'random' is compared with itself"),
    ],
)  # fmt: skip
def test_a_claim_that_cannot_be_tested_is_an_error(
    make: Make, old: str, new: str, told: str
) -> None:
    alone = FILE.partition("  - {that: statistics")[0]

    (problem,) = problems_of(make, alone.replace(old, new))

    assert problem.startswith("8: ")
    assert told in problem


@pytest.mark.parametrize("sides", ["language", "[language, random]"])
def test_a_claim_whose_pairs_this_machine_lacks_is_warned_about(make: Make, sides: str) -> None:
    alone = FILE.partition("  - {that: statistics")[0]
    sweep, ledger = make(alone + f"exclude: [{{pretraining: {sides}, missing: no/such/folder}}]\n")

    (warning,) = sweep.warnings
    assert "claims[0].that: language > random: all pairs are lost at bit-xor" in warning
    contrasts = judge(sweep, ledger).contrasts
    assert sum(one.pairs for one in contrasts) == 0


def test_one_seed_is_warned_about(make: Make) -> None:
    sweep, _ = make(FILE.replace("[0, 1, 2, 3]", "[0]"))

    assert len(sweep.warnings) == 2
    assert (
        "one pair alone at bit-xor, bit-memory, listops, which shows no spread"
        in (sweep.warnings[0])
    )


def test_a_file_without_claims_says_how_to_make_one(make: Make) -> None:
    sweep, ledger = make(FILE.partition("claims:")[0])

    with pytest.raises(SweepFileError, match=r"sweep\.yaml: claims: missing; add some"):
        judge(sweep, ledger)


# --- as it is printed


def test_identical_ledgers_give_identical_bytes(make: Make, tmp_path: Path) -> None:
    outputs = []
    for number in range(2):
        shutil.rmtree(tmp_path / "results", ignore_errors=True)
        sweep, ledger = make()
        points = list(sweep.points)
        random.Random(number).shuffle(points)
        for point in points:
            accuracy = int(point.trial_id[:4], 16) / 2**16
            ledger.commit(trial_row(point, test_accuracy=accuracy))
        judged = judge(sweep, ledger)
        outputs.append(
            (judged.to_markdown(), judged.to_latex(), judged.to_csv(), json.dumps(judged.record()))
        )
    assert outputs[0] == outputs[1]


def test_the_record_is_json_and_the_csv_and_frame_have_a_line_a_contrast(make: Make) -> None:
    sweep, ledger = make()
    commit(sweep, ledger, drawn(0))
    judged = judge(sweep, ledger)

    lines = list(csv.DictReader(io.StringIO(judged.to_csv())))
    frame = judged.to_frame()

    assert json.loads(json.dumps(judged.record(), allow_nan=False)) == judged.record()
    assert len(lines) == len(frame) == 6
    assert list(frame["place.task"][:2]) == ["bit-xor", "bit-memory"]
    assert float(lines[0]["difference"]) == frame["difference"][0]
    first = judged.contrasts[0]
    assert lines[0]["trials"] == "; ".join("/".join(pair) for pair in first.trials)


def test_what_all_contrasts_share_is_said_once(make: Make) -> None:
    sweep, ledger = make()
    commit(sweep, ledger, drawn(0))

    text = judge(sweep, ledger).to_markdown()

    assert text.count("both arms at one learning rate (0.001), not tuned") == 1
    assert "over 4 pairs" in text
    assert "| pairs |" not in text
    assert "Holm over the 6 contrasts" in text
    assert re.search(r"\| language > random \| bit-xor \| \+\d+\.\d ± \d\.\d \|", text)
    assert f"{COVERAGE[3]} %" in text


def test_a_long_edit_is_cut_in_print_only(make: Make) -> None:
    sweep, ledger = make()
    rng = np.random.default_rng(0)
    noise = {p.label: rng.normal(0.002, 0.01) for p in sweep.points}
    commit(sweep, ledger, lambda point: 0.5 + noise[point.label])

    judged = judge(sweep, ledger)

    long: list[Contrast] = [one for one in judged.contrasts if (one.more_seeds or 0) > 20]
    assert long
    for one in long:
        assert one.edit is not None
        assert one.edit.endswith(f", {one.more_seeds + 3}]")
        told = f"add seed: [0, 1, 2, ... to {one.more_seeds + 3}], and to the claim {one.plan}"
        assert told in judged.to_markdown()


def test_the_command_and_the_library(make: Make, tmp_path: Path) -> None:
    sweep, ledger = make(FILE + "exclude: [{pretraining: random, task: listops}]\n")
    commit(sweep, ledger, drawn(0))
    where = ["--results", str(tmp_path / "results")]
    run = CliRunner().invoke

    shown = run(app, ["claims", str(sweep.file), *where])
    record = run(app, ["claims", str(sweep.file), "--json", *where])
    written = run(
        app, ["claims", str(sweep.file), "--format", "tex", "-o", str(tmp_path / "c.tex"), *where]
    )

    assert (shown.exit_code, record.exit_code, written.exit_code) == (0, 0, 0)
    assert "supported" in shown.stdout
    assert "warning: " in shown.stderr
    assert "exclude[0] (line 10) leaves out random" in shown.stderr
    judged = api.load_claims(sweep.file, tmp_path / "results")
    assert json.loads(record.stdout) == judged.record()
    assert (tmp_path / "c.tex").read_text() == judged.to_latex()
    assert "warning: " in run(app, ["validate", str(sweep.file)]).stderr
    planned = run(app, ["plan", str(sweep.file), "--json", *where])
    assert json.loads(planned.stdout)["warnings"] == list(sweep.warnings)


@pytest.mark.slow
def test_latex_compiles(make: Make, tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex on this machine")
    sweep, ledger = make()
    commit(sweep, ledger, drawn(0))
    text = judge(sweep, ledger).to_latex()
    document = (
        "\\documentclass{article}\\usepackage{booktabs,xcolor}\\usepackage[T1]{fontenc}"
        f"\\begin{{document}}{text}\\end{{document}}"
    )
    (tmp_path / "t.tex").write_text(document)

    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert text.count(r"\begin{table}") == 3
    assert r"\textgreater{}" in text
    assert done.returncode == 0, done.stdout[-2000:]
