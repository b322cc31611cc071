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
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from typer.testing import CliRunner

import sweep as api
from sweep.analysis.claims import COVERAGE, Contrast, judge
from sweep.cli import app
from sweep.ledger.ledger import Ledger
from sweep.sweepfile.schema import SweepFileError
from sweep.sweepfile.trials import Point, Sweep, load
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
    """Accuracies of which language's are 10 points better on bit-xor, and statistics' nowhere."""
    rng = np.random.default_rng(number)
    values: dict[str, float] = {}

    def accuracy(point: Point) -> float:
        better = 0.1 * (point.label.startswith("language/bit-xor"))
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
    theirs = [scipy_stats.ttest_rel(left, right) for left, right in sides]
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
        assert ours.effect == pytest.approx(differences.mean() / differences.std(ddof=1))
        assert (ours.p, ours.p_holm) == pytest.approx((test.pvalue, p))
        assert (ours.pairs, ours.expected) == (4, 4)
    assert judged.contrasts[0].verdict == "supported"


def test_the_sign_decides_between_supported_and_contradicted(make: Make) -> None:
    sweep, ledger = make(FILE.replace("language > random", "language < random"))
    commit(sweep, ledger, drawn(0))

    first, *_ = judge(sweep, ledger).contrasts

    assert first.difference is not None
    assert first.difference > 5
    assert first.verdict == "contradicted"


def test_a_loss_is_compared_as_a_number(make: Make) -> None:
    sweep, ledger = make(
        FILE.replace("language > random, axis: p", "language > random, on: test_loss, axis: p")
    )
    for point in sweep.points:
        worse = point.labels["pretraining"] == "language"
        ledger.commit(trial_row(point, test_loss=1 + worse + 0.01 * point.config.seed**worse))

    first, *_ = judge(sweep, ledger).contrasts

    assert first.verdict == "supported"
    assert first.difference == pytest.approx(1, abs=0.02)


def test_seeds_that_would_decide_are_counted(make: Make) -> None:
    sweep, ledger = make()
    # One contrast with d near 1, five without any difference.
    away = {0: 0.0, 1: 0.01, 2: 0.03, 3: 0.02}

    def accuracy(point: Point) -> float:
        own = point.label.startswith("language/listops")
        return 0.5 + (away[point.config.seed] if own else 0)

    commit(sweep, ledger, accuracy)

    contrasts = judge(sweep, ledger).contrasts

    one = contrasts[2]
    needed = TTestPower().solve_power(one.effect, alpha=0.05 / 6, power=0.8)
    assert one.verdict == "undecided"
    assert one.more_seeds == int(np.ceil(needed)) - 4
    assert one.edit == f"seed: {list(range(4 + one.more_seeds))}"
    assert {c.verdict for c in contrasts if c is not one} == {"undecided"}
    assert all(c.more_seeds is c.edit is None for c in contrasts if c is not one)

    # As the edit says, with the same spread: decided, or nearly.
    sweep, ledger = make(FILE.replace("seed: [0, 1, 2, 3]", one.edit))
    again = np.resize(list(away.values()), len(sweep.points))
    for point in sweep.points:
        shift = again[point.config.seed] if point.label.startswith("language/listops") else 0
        ledger.commit(trial_row(point, test_accuracy=0.5 + shift))
    assert judge(sweep, ledger).contrasts[2].verdict == "supported"


def test_the_largest_p_that_counts_is_that_of_what_is_still_open(make: Make) -> None:
    # One of six is decided already: the others need 0.05 / 5.
    sweep, ledger = make()
    accuracy = drawn(1)
    commit(sweep, ledger, accuracy)

    contrasts = judge(sweep, ledger).contrasts

    assert [one.verdict for one in contrasts].count("undecided") == 5
    for one in contrasts[1:]:
        assert one.effect is not None
        needed = TTestPower().solve_power(abs(one.effect), alpha=0.05 / 5, power=0.8)
        if one.more_seeds is not None:
            assert one.more_seeds == int(np.ceil(needed)) - 4


def test_equal_differences_of_a_step_are_no_proof(make: Make) -> None:
    sweep, ledger = make(FILE.replace("[0, 1, 2, 3]", "[0, 1, 2]"))
    commit(sweep, ledger, lambda point: 0.9 + 0.001 * point.label.startswith("language"))

    one, *_ = judge(sweep, ledger).contrasts

    assert one.difference == pytest.approx(0.1)
    assert one.p is not None
    assert one.p > 0.05


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

    assert (one.pairs, one.expected, len(one.trials)) == (2, 4, 4)
    assert one.notes[:4] == (
        "language: missing (seed 0)",
        "random: diverged, the last good figures before that count (seed 1)",
        "random: diverged, without a figure, left out (seed 2)",
        "random: each batch in 2 parts, since it did not fit into memory (seed 3)",
    )
    assert other.notes[0] == "random: failed (code, OverflowError) (seed 0)"


def test_pairs_that_are_still_to_come_may_decide(make: Make) -> None:
    sweep, ledger = make(FILE.replace("[0, 1, 2, 3]", str(list(range(40)))))
    for point in sweep.points:
        if point.config.seed < 3:
            better = 0.02 * point.label.startswith("language") * point.config.seed
            ledger.commit(trial_row(point, test_accuracy=0.5 + better))

    one, *_ = judge(sweep, ledger).contrasts

    assert (one.verdict, one.more_seeds, one.edit) == ("undecided", 0, None)

    # Those that have ended without a figure never will.
    for point in sweep.points:
        if point.config.seed >= 3:
            ledger.commit(trial_row(point, outcome="diverged", test_accuracy=None))
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
        ledger.commit(trial_row(point, test_accuracy=0.6 + 0.2 * (better != high)))

    contrasts = judge(sweep, ledger).contrasts

    told = "the answer depends on the learning rate: supported at 0.001, contradicted at 0.01"
    assert [told in one.notes for one in contrasts] == [True, True, False, False]
    assert not any("not tuned" in note for one in contrasts for note in one.notes)


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
        assert f"add: seed: [0, 1, 2, ... to {one.more_seeds + 3}]" in judged.to_markdown()


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

    assert text.count(r"\begin{table}") == 2
    assert r"\textgreater{}" in text
    assert done.returncode == 0, done.stdout[-2000:]
