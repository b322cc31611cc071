"""Ranges of arms, conditions, Gaussian processes, successive halving and replicates of `tune:`."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sweep.analysis.cells import declared, grid
from sweep.analysis.claims import judge
from sweep.cli import app
from sweep.ledger.ledger import Ledger
from sweep.planning import tuning
from sweep.sweepfile.expansion import load
from sweep.sweepfile.schema import SweepFileError
from sweep.sweepfile.trials import Point, Sweep
from sweep.sweepfile.tuning_spec import HalvingSpec
from tests.support import trial_row

HEAD = """\
sweep: chosen
trial:
  task: {name: bit-xor, bits: 3}
  backbone: {name: gpt2, layers: 1, width: 8, heads: 1}
  steps: 100
  evaluation: {every: 10}
axes:
  pretraining: [random]
  train: [fpt, all]
  seed: [0, 1, 2]
table: {rows: train, columns: pretraining}
claims: [{that: all > fpt, axis: train, per: pretraining}]
"""


def tuned(folder: Path, tune: str, head: str = HEAD) -> Sweep:
    file = folder / "chosen.yaml"
    file.write_text(f"{head}tune: {tune}\n")
    return load(file)


def commit(ledger: Ledger, points: Iterable[Point], figure: Callable[[Point], float]) -> None:
    for point in points:
        value = figure(point)
        ledger.commit(trial_row(point, validation_accuracy=value, test_accuracy=value))


def work_off(sweep: Sweep, ledger: Ledger, figure: Callable[[Point], float], rng: random.Random,
             at_once: int = 3) -> list[Point]:  # fmt: skip
    """End the trials that are known, some at a time and in any order, as drivers that come and go
    do; return them.
    """
    out: list[Point] = []
    while True:
        tuning.note_asked(sweep, ledger)
        now = tuning.resolve(sweep, ledger)
        done = ledger.done()
        open_ = [p for p in now.all if not p.undecided and p.trial_id not in done]
        if not open_:
            return out
        rng.shuffle(open_)
        commit(ledger, open_[:at_once], figure)
        out += open_[:at_once]
        sweep, ledger = load(sweep.file), Ledger(ledger.uri)  # killed, and started again


# --- ranges of arms -----------------------------------------------------------------------------

ARMS = (
    "{learning_rate: {log: [1e-4, 1e-1]}, dropout: {uniform: [0, 0.3]}, sampler: qmc, points: 6, "
    "defaults: {train: {all: {learning_rate: {log: [1e-6, 1e-3]}}}}}"
)


def test_an_arm_may_have_a_range_of_its_own(tmp_path: Path) -> None:
    sweep = tuned(tmp_path, ARMS)

    rates = {
        arm: [p.config.learning_rate for p in sweep.tunings if p.labels["train"] == arm]
        for arm in ("fpt", "all")
    }
    assert [len(own) for own in rates.values()] == [6, 6]
    # The same places of another range: a hundredth of each.
    assert rates["all"] == pytest.approx([rate / 100 for rate in rates["fpt"]])
    others = [
        [p.config.dropout for p in sweep.tunings if p.labels["train"] == arm] for arm in rates
    ]
    assert others[0] == others[1]
    (note,) = tuning.notes(sweep)
    assert "of 6 points of sampler qmc: learning_rate (0.0001 to 0.1, logarithmic); " in note
    assert "for train all: learning_rate (1e-06 to 0.001, logarithmic)" in note


def test_a_task_may_have_a_range_of_its_own(tmp_path: Path) -> None:
    own = "{task: {bit-xor: {batch_size: {values: [8, 16]}}}}"
    tune = f"{{batch_size: {{values: [2, 4]}}, defaults: {own}}}"

    assert {p.config.batch_size for p in tuned(tmp_path, tune).tunings} == {8, 16}


@pytest.mark.parametrize(("defaults", "problem"), [
    ("train: {al: {dropout: {uniform: [0, 1e-3]}}}", "no cell has train 'al'; did you mean 'all'"),
    ("train: {all: {batch_size: {values: [1]}}}",
     "batch_size is tuned there alone; every cell tunes the same fields"),
    ("seed: {0: {dropout: {uniform: [0, 0.1]}}}", "has one choice for all of them"),
    ("train: {all: {dropout: {uniform: [0, 3.0]}}}", "dropout 3.0: 3.0 should be less than 1"),
])  # fmt: skip
def test_a_range_that_is_nobodys_is_refused(tmp_path: Path, defaults: str, problem: str) -> None:
    tune = "{dropout: {uniform: [0, 0.3]}, sampler: qmc, points: 4, defaults: {%s}}"

    with pytest.raises(SweepFileError) as caught:
        tuned(tmp_path, tune % defaults)

    assert problem in str(caught.value)


def test_arms_with_unlike_numbers_of_points_are_refused(tmp_path: Path) -> None:
    tune = "{batch_size: {values: [2, 4]}, defaults: {train: {all: {batch_size: {values: [8]}}}}}"

    with pytest.raises(SweepFileError, match="every cell tries as many points, but here are 2 of"):
        tuned(tmp_path, tune)


# --- conditions ---------------------------------------------------------------------------------

WHERE = (
    "{optimizer.schedule: {values: [constant, cosine]}, "
    "optimizer.warmup: {int: [1, 50], when: {optimizer.schedule: cosine}}%s}"
)


def schedules(points: Iterable[Point]) -> list[tuple[str, int]]:
    return [(p.config.optimizer.schedule, p.config.optimizer.warmup) for p in points]


def test_a_field_with_a_condition_is_tuned_there_alone(tmp_path: Path) -> None:
    tune = WHERE.replace("when", "points: 3, when") % ""
    grid = tuned(tmp_path, tune)
    assert schedules(grid.studies[0].first) == [
        ("constant", 0), ("cosine", 1), ("cosine", 25), ("cosine", 50),
    ]  # fmt: skip
    assert grid.studies[0].tune.budget == 4

    for sampler in ("qmc", "random", "tpe", "gp"):
        sweep = tuned(tmp_path, WHERE % f", sampler: {sampler}, points: 9, seeds: [100]")
        assert all((kind == "constant") == (warm == 0) for kind, warm in schedules(sweep.tunings))
        assert {kind for kind, _ in schedules(sweep.tunings)} == {"constant", "cosine"}
    (note, *_) = tuning.notes(sweep)
    assert "optimizer.warmup (1 to 50, whole, where optimizer.schedule is cosine)" in note


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_adaptive_samplers_keep_to_conditions_and_readers_to_gaps(
    tmp_path: Path, sampler: str
) -> None:
    sweep = tuned(tmp_path, WHERE % f", sampler: {sampler}, points: 8, generation: 2")
    ledger = Ledger(tmp_path / "results")

    work_off(sweep, ledger, lambda p: 0.5 + p.config.optimizer.warmup / 200, random.Random(1))

    now = tuning.resolve(sweep, ledger)
    assert all((kind == "constant") == (warm == 0) for kind, warm in schedules(now.tunings))
    for state in tuning.states(sweep, ledger):
        assert len(state.candidates) == 8
        assert state.importance() == {}  # one field alone is of every point
        best = max(state.candidates, key=lambda one: one.value or 0)
        assert state.setting == best.setting
    shown = CliRunner().invoke(app, ["studies", str(sweep.file), "--results", ledger.uri])
    assert shown.exit_code == 0, shown.output
    assert "constant" in shown.stdout


@pytest.mark.parametrize(("when", "problem"), [
    ("{dropout: 0.1}", "when: dropout is no other field that is tuned"),
    ("{optimizer.warmup: 1}", "when: optimizer.warmup is no other field that is tuned"),
    ("{optimizer.schedule: linear}", "when: optimizer.schedule is never linear"),
    ("{learning_rate: 1e-3}", "when: learning_rate needs `values` for a condition"),
])  # fmt: skip
def test_a_condition_that_cannot_hold_is_refused(tmp_path: Path, when: str, problem: str) -> None:
    tune = WHERE.replace("{optimizer.schedule: cosine}", when) % (
        ", learning_rate: {log: [1e-4, 1e-2]}, sampler: qmc, points: 4"
    )

    with pytest.raises(SweepFileError) as caught:
        tuned(tmp_path, tune)

    assert problem in str(caught.value)


# --- Gaussian processes -------------------------------------------------------------------------


def test_a_gaussian_process_finds_what_a_sequence_does_not(tmp_path: Path) -> None:
    def figure(point: Point) -> float:
        # A peak of height 1 at rate 10^-2.3 and dropout 0.21.
        rate, dropout = point.config.learning_rate, point.config.dropout
        import math

        return 1 / (1 + (math.log10(rate) + 2.3) ** 2 + (10 * (dropout - 0.21)) ** 2)

    found = {}
    for sampler in ("qmc", "gp"):
        (tmp_path / sampler).mkdir()
        tune = (
            "{learning_rate: {log: [1e-4, 1e-1]}, dropout: {uniform: [0, 0.3]}, points: 14, "
            f"generation: 2, sampler: {sampler}}}"
        )
        sweep = tuned(
            tmp_path / sampler,
            tune,
            HEAD.replace("[fpt, all]", "[fpt]").replace(
                "claims: [{that: all > fpt, axis: train, per: pretraining}]\n", ""
            ),
        )
        ledger = Ledger(tmp_path / sampler / "results")
        work_off(sweep, ledger, figure, random.Random(0))
        (state,) = tuning.states(sweep, ledger)
        found[sampler] = max(one.value for one in state.candidates if one.value is not None)
        assert len(state.candidates) == len({one.setting for one in state.candidates}) == 14
    assert found["gp"] > max(found["qmc"], 0.97)


def test_a_gaussian_process_asks_the_same_whoever_was_killed(tmp_path: Path) -> None:
    tune = "{learning_rate: {log: [1e-4, 1e-1]}, sampler: gp, points: 7, generation: 2}"
    asked = []
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        sweep = tuned(tmp_path / str(number), tune)
        ledger = Ledger(tmp_path / str(number) / "results")
        # One that diverged counts as the worst, and is no gap.
        work_off(sweep, ledger, lambda p: p.config.learning_rate % 0.007, random.Random(number),
                 at_once=number + 1)  # fmt: skip
        asked.append([one.setting for s in tuning.states(sweep, ledger) for one in s.candidates])
    assert asked[0] == asked[1] == asked[2]
    assert "sampler gp: which rates were tried depends on" in tuning.notes(sweep)[1]


# --- successive halving -------------------------------------------------------------------------

HALVING = (
    "{dropout: {uniform: [0, 0.3]}, sampler: qmc, points: 9, "
    "prune: {rungs: [0.1, 0.3], keep: 0.33}}"
)


@pytest.mark.parametrize(("keep", "points", "kept"), [
    (0.33, 9, 3), (0.33, 3, 1), (0.33, 12, 4), (0.1, 30, 3), (0.5, 5, 3), (0.01, 9, 1),
])  # fmt: skip
def test_how_many_go_on_is_counted_up(keep: float, points: int, kept: int) -> None:
    assert HalvingSpec(rungs=(0.5,), keep=keep).kept(points) == kept


def test_each_rung_keeps_the_best_and_each_arm_as_many(tmp_path: Path) -> None:
    runs = []
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        sweep = tuned(tmp_path / str(number), HALVING)
        ledger = Ledger(tmp_path / str(number) / "results")

        def figure(point: Point) -> float:
            # The order of points turns round between the rungs: only those that went on can win.
            sign = 1 if point.config.steps == 10 else -1
            return 0.5 + sign * point.config.dropout

        trained = work_off(sweep, ledger, figure, random.Random(number), at_once=1 + 2 * number)
        runs.append({point.trial_id for point in trained})
        assert len(trained) == len(runs[-1])  # none twice
        for state in tuning.states(sweep, ledger):
            by_steps = {
                steps: sorted(
                    dict(one.setting)["dropout"] for one in state.candidates
                    if any(p.config.steps == steps for p in (*one.early, *one.trials))
                )
                for steps in (10, 30, 100)
            }  # fmt: skip
            assert [len(own) for own in by_steps.values()] == [9, 3, 1]
            assert by_steps[30] == by_steps[10][-3:]
            assert by_steps[100] == by_steps[30][:1]
            assert state.setting == (("dropout", by_steps[100][0]),)
            assert [one.state for one in state.candidates].count("pruned") == 8
    assert runs[0] == runs[1] == runs[2]
    assert "after 10%, 30% of the steps" in tuning.notes(sweep)[1]
    shown = CliRunner().invoke(app, ["studies", str(sweep.file), "--results", ledger.uri])
    assert (shown.stdout.count("given up after 10 steps"), shown.exit_code) == (12, 0)
    assert shown.stdout.count("given up after 30 steps") == 4


def test_what_diverges_at_a_rung_makes_no_room_for_worse_ones_later(tmp_path: Path) -> None:
    sweep = tuned(tmp_path, HALVING)
    ledger = Ledger(tmp_path / "results")
    fpt = sweep.studies[0]
    for place, point in enumerate(fpt.first):
        diverged = place < 7
        ledger.commit(trial_row(
            point, outcome="diverged" if diverged else "done",
            validation_accuracy=None if diverged else 0.5 + place / 100,
        ))  # fmt: skip

    state = tuning.states(sweep, ledger)[0]

    assert [one.state for one in state.candidates] == ["diverged"] * 7 + ["open", "open"]
    for one in state.candidates[7:]:
        for point in one.trials:
            assert point.config.steps == 30
            value = 0.9 if one is state.candidates[7] else 0.1
            ledger.commit(trial_row(point, validation_accuracy=value))
    # One of three points goes on from the second rung, whatever happened at the first.
    after = tuning.states(sweep, ledger)[0]
    assert [one.state for one in after.candidates[7:]] == ["open", "pruned"]


def test_states_of_rungs_are_kept_whatever_the_file_keeps(tmp_path: Path) -> None:
    sweep = tuned(tmp_path, HALVING + "\nkeep: {trained: false}")
    ledger = Ledger(tmp_path / "results")
    work_off(sweep, ledger, lambda p: p.config.dropout, random.Random(0))

    now = tuning.resolve(sweep, ledger)

    for point in now.tunings:
        assert point.goes_on == (point.config.steps < 100)
    assert not any(point.goes_on for point in now.points)


@pytest.mark.parametrize(("prune", "problem"), [
    ("{rungs: [0.3, 0.1], keep: 0.5}", "[0.3, 0.1] does not rise"),
    ("{rungs: [0.1], keep: 1.5}", "prune.keep: 1.5 should be less than 1"),
    ("{rung: [0.1], keep: 0.5}", "prune.rung: no such field; did you mean 'rungs'"),
    ("{rungs: [], keep: 0.5}", "prune.rungs: has no points"),
    ("{rungs: [0.11, 0.19], keep: 0.5}", "prune: 0.11 of 100 steps, up to the next evaluation"),
    ("{rungs: [0.1, 0.95], keep: 0.5}", "is all of them"),
])  # fmt: skip
def test_rungs_that_cannot_be_are_refused(tmp_path: Path, prune: str, problem: str) -> None:
    with pytest.raises(SweepFileError) as caught:
        tuned(
            tmp_path, f"{{dropout: {{uniform: [0, 0.3]}}, points: 4, sampler: qmc, prune: {prune}}}"
        )

    assert problem in str(caught.value)


# --- replicates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["grid", "qmc", "random", "tpe"])
def test_each_choice_has_seeds_and_points_of_its_own(tmp_path: Path, sampler: str) -> None:
    points = "points: 6" if sampler != "grid" else "batch_size: {values: [2, 4, 8]}"
    space = "" if sampler == "grid" else "dropout: {uniform: [0, 0.3]}, "
    sweep = tuned(
        tmp_path, f"{{{space}{points}, sampler: {sampler}, seeds: [100, 102], replicates: 3}}"
    )
    once = tuned(tmp_path, f"{{{space}{points}, sampler: {sampler}, seeds: [100, 102]}}")

    assert len(sweep.studies) == 6
    seeds = [sorted({p.config.seed for p in study.first}) for study in sweep.studies[:3]]
    assert seeds == [[100, 102], [103, 105], [106, 108]]
    tried = [study.first_settings for study in sweep.studies[:3]]
    assert len(set(tried)) == (1 if sampler == "grid" else 3)
    # The first choice is the one that a file without replicates makes.
    assert [p.trial_id for p in sweep.studies[0].first] == [
        p.trial_id for p in once.studies[0].first
    ]
    assert [[p.config.seed for p in study.points] for study in sweep.studies[:3]] == [[0], [1], [2]]


def test_a_table_and_a_claim_hold_the_luck_of_tuning(tmp_path: Path) -> None:
    tune = "{dropout: {values: [0.1, 0.2]}, replicates: 3}"
    sweep = tuned(tmp_path, tune)
    ledger = Ledger(tmp_path / "results")

    def figure(point: Point) -> float:
        if point.config.seed >= 100:  # the second choice takes the other setting
            return 0.5 + (point.config.dropout == (0.2 if point.config.seed == 101 else 0.1)) / 4
        return point.config.dropout + (point.labels["train"] == "all") / 2

    work_off(sweep, ledger, figure, random.Random(0))

    now = tuning.resolve(sweep, ledger)
    assert [p.config.dropout for p in now.points] == [0.1, 0.2, 0.1] * 2
    cells = grid(now, declared(now), ledger)
    assert cells["all", "random", "test_accuracy"].values == pytest.approx((60, 70, 60))
    (one,) = judge(sweep, ledger).contrasts
    assert (one.pairs, one.difference) == (3, pytest.approx(50))
    said = "the whole choice made 3 times, each with seeds of its own: the spread between seeds"
    assert any(note.startswith(said) for note in one.notes)
    shown = CliRunner().invoke(app, ["studies", str(sweep.file), "--results", ledger.uri, "--json"])
    told = [record["cell"] for record in json.loads(shown.stdout)]
    assert told == [
        f"random/{arm}, choice {n}" for arm, n in itertools.product(("fpt", "all"), (1, 2, 3))
    ]


def test_seeds_that_share_a_choice_are_told(tmp_path: Path) -> None:
    sweep = tuned(tmp_path, "{dropout: {values: [0.1, 0.2]}, replicates: 2}")

    assert [len(study.points) for study in sweep.studies] == [2, 1, 2, 1]
    assert "up to 2 seeds share one" in tuning.notes(sweep)[-1]


@pytest.mark.parametrize(("tune", "problem"), [
    ("replicates: 4", "replicates: 4 choices for 3 seeds; each choice needs a seed"),
    ("seeds: [3], replicates: 0", "replicates: 0 should be greater than or equal to 1"),
])  # fmt: skip
def test_more_choices_than_seeds_are_refused(tmp_path: Path, tune: str, problem: str) -> None:
    with pytest.raises(SweepFileError) as caught:
        tuned(tmp_path, f"{{dropout: {{values: [0.1, 0.2]}}, {tune}}}")

    assert problem in str(caught.value)


def test_a_seed_that_a_later_choice_would_take_is_told(tmp_path: Path) -> None:
    head = HEAD.replace("seed: [0, 1, 2]", "seed: [99, 101, 102]")

    with pytest.raises(SweepFileError, match="moved on for each of 2 replicates, 101 is a seed"):
        tuned(tmp_path, "{dropout: {values: [0.1, 0.2]}, replicates: 2}", head)


def test_an_unlike_figure_is_a_number(tmp_path: Path) -> None:
    """What a ledger notes of a generation is read back as it was asked for."""
    sweep = tuned(tmp_path, "{batch_size: {int: [1, 64]}, sampler: tpe, points: 6}")
    ledger = Ledger(tmp_path / "results")
    work_off(sweep, ledger, lambda p: p.config.batch_size / 64, random.Random(3))

    notes: dict[str, Any] = ledger.notes.on_claims("chosen", "generations")
    (of_one, of_two) = (study.key for study in sweep.studies)
    assert len(notes) == 6
    assert {name.rpartition("-")[0] for name in notes} == {of_one, of_two}
