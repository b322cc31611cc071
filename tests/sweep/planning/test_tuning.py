"""Tuning: which rates are tried, what is chosen of them, and that no accident changes either."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sweep.analysis.claims import judge
from sweep.analysis.frames import load_trials
from sweep.analysis.tables import build
from sweep.cli import UserError, app
from sweep.execution.job import Result
from sweep.execution.scheduler import Scheduler
from sweep.ledger.ledger import Ledger
from sweep.mirrors import optuna_studies
from sweep.planning import tuning
from sweep.planning.packing import Workers
from sweep.planning.plan import IncrementalPlanner, plan
from sweep.sweepfile.expansion import load
from sweep.sweepfile.identity import cell_id, trial_id
from sweep.sweepfile.schema import SweepFileError
from sweep.sweepfile.trials import Point, Sweep
from sweep.sweepfile.tuning_spec import RangeSpec
from tests.support import trial_row

HEAD = """\
sweep: tuned
trial:
  task: {name: bit-xor, bits: 3}
  backbone: {name: gpt2, layers: 1, width: 8, heads: 1}
  steps: 40
  batch_size: 4
  evaluation: {every: 10}
axes:
  pretraining: [random]
  train: [fpt, all]
  seed: [0, 1]
table: {rows: train, columns: pretraining}
"""
FOUR = "{log: [1.0e-4, 1.0e-1], points: 4}"
RATES = (1e-4, 1e-3, 1e-2, 1e-1)


def tuned(folder: Path, tune: str = f"{{learning_rate: {FOUR}}}", head: str = HEAD) -> Sweep:
    file = folder / "tuned.yaml"
    file.write_text(f"{head}tune: {tune}\n")
    return load(file)


def problems_of(folder: Path, tune: str, head: str = HEAD) -> list[str]:
    with pytest.raises(SweepFileError) as caught:
        tuned(folder, tune, head)
    return [one.removeprefix(f"{folder / 'tuned.yaml'}:") for one in caught.value.problems]


def commit(ledger: Ledger, points: Iterable[Point], **columns: Any) -> None:
    for point in points:
        ledger.commit(trial_row(point, **columns))


def rates(points: Iterable[Point]) -> list[float]:
    return sorted({point.config.learning_rate for point in points})


def rates_in_order(sweep: Sweep) -> list[float]:
    return list(dict.fromkeys(point.config.learning_rate for point in sweep.tunings))


# --- which rates --------------------------------------------------------------------------------


def test_a_grid_has_its_ends_as_they_were_written_and_even_steps_between() -> None:
    assert RangeSpec(log=(1e-4, 1e-1), points=4).grid() == RATES
    assert RangeSpec(log=(1e-5, 1e-2), points=1).grid() == (0.0003162,)
    assert RangeSpec(values=(1e-2, 1e-3)).grid() == (1e-3, 1e-2)


@given(
    low=st.floats(1e-8, 1e-3), factor=st.floats(10, 1e6), points=st.integers(1, 60),
    more=st.integers(0, 60),
)  # fmt: skip
def test_quasi_random_rates_lie_inside_and_more_of_them_keep_the_first(
    low: float, factor: float, points: int, more: int
) -> None:
    few = RangeSpec(log=(low, low * factor), points=points).quasi_random()
    many = RangeSpec(log=(low, low * factor), points=points + more).quasi_random()

    assert many[:points] == few
    assert all(low * 0.999 <= rate <= low * factor * 1.001 for rate in many)
    assert all(float(f"{rate:.4g}") == rate for rate in many)
    # So many intervals of the range as there are points, and hardly one without a point.
    full = 2 ** int(math.log2(points + 1)) - 1
    places = [math.log(rate / low) / math.log(factor) for rate in few[:full]]
    assert len({round(place * (full + 1)) for place in places}) == full


def test_rates_are_known_without_optuna_torch_or_a_ledger(tmp_path: Path) -> None:
    sweep = tuned(tmp_path)

    assert rates(sweep.tunings) == list(RATES)
    assert {point.config.seed for point in sweep.tunings} == {100}
    for point in sweep.tunings:
        assert (trial_id(point.config), cell_id(point.config)) == (point.trial_id, point.cell_id)
    code = (
        "import sys; from sweep.planning.plan import plan; "
        f"p = plan({str(sweep.file)!r}, {str(tmp_path / 'results')!r}); "
        "print(*sorted(one.trial_id for one in p.sweep.tunings)); "
        "assert not {'optuna', 'torch', 'ray', 'scipy'} & sys.modules.keys()"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == sorted(point.trial_id for point in sweep.tunings)


@pytest.mark.parametrize("sampler", ["grid", "qmc"])
def test_every_arm_has_the_same_budget(tmp_path: Path, sampler: str) -> None:
    tune = f"{{learning_rate: {FOUR}, sampler: {sampler}, seeds: [100, 101], prune: 0.25}}"
    sweep = tuned(tmp_path, tune)

    budgets = {
        study.label: sorted(
            (p.config.learning_rate, p.config.seed, p.config.steps)
            for p in sweep.tunings
            if p.labels["train"] == study.labels["train"]
        )
        for study in sweep.studies
    }
    assert set(budgets) == {"random/fpt", "random/all"}
    assert budgets["random/fpt"] == budgets["random/all"]
    assert len(budgets["random/fpt"]) == 8


def test_the_trials_of_a_sweep_are_placeholders_until_their_rate_is_chosen(tmp_path: Path) -> None:
    sweep = tuned(tmp_path)

    assert [point.label for point in sweep.points] == [
        "random/fpt/0", "random/fpt/1", "random/all/0", "random/all/1",
    ]  # fmt: skip
    assert sweep.undecided == sweep.points
    assert len({point.trial_id for point in sweep.all}) == 12
    # No config has such an id: not even that of the default rate, which the placeholder holds.
    assert all(trial_id(point.config) != point.trial_id for point in sweep.points)
    assert len({point.cell_id for point in sweep.points}) == 2
    # Another range is about the same trials.
    other = tuned(tmp_path, "{learning_rate: {values: [1e-3]}}")
    assert [p.trial_id for p in other.points] == [p.trial_id for p in sweep.points]


def test_the_rates_of_a_cell_train_side_by_side(tmp_path: Path) -> None:
    sweep = tuned(tmp_path)

    planned = plan(sweep, tmp_path / "results", workers=Workers(1))

    packs = [[p.label for p in pack.points] for pack in planned.packs]
    assert [f"random/fpt/100/rate {rate:g}" for rate in RATES] in packs


# --- refusals -----------------------------------------------------------------------------------

MISTAKES = {
    "learning_rate: {log: [1e-4, 1e-1], point: 4}": (
        "13: tune.learning_rate.point: no such field; did you mean 'points'"
    ),
    "dropuot: {values: [0.1]}": (
        "13: tune.dropuot: no such field of a trial; did you mean 'dropout'"
    ),
    "dropout: {values: [0.1, 2.0]}": "dropout 2.0: 2.0 should be less than 1",
    "dropout: {uniform: [0.3, 0.1], points: 2}": "tune.dropout: uniform: 0.3 is not below 0.1",
    "dropout: {uniform: [0, 0.3]}": "`log` and `points` come together in a grid",
    "dropout: {uniform: [0, 0.3]}, sampler: qmc": "points: missing; it is the budget of every cell",
    "dropout: {values: [0.1]}, points: 4": "points: a grid has as many as its fields make",
    "protocol: {values: [paper, sound]}": "protocol cannot be tuned: it is what arms are compared",
    "learning_rate: null": "13: tune: names no field to tune",
    "learning_rate: {log: [1e-4, 1e-1], points: 4, values: [1e-3]}": (
        "either `log: [least, greatest]` and `points`, or `values`"
    ),
    "learning_rate: {log: [1e-4, 1e-1]}": "`log` and `points` come together",
    "learning_rate: {log: [1e-1, 1e-4], points: 4}": "log: 0.1 is not below 0.0001",
    "learning_rate: {log: [1.0e-3, 1.001e-3], points: 9}": "points: 9 do not fit, to 4 digits",
    "learning_rate: {values: [1e-3, 0.001]}": "values: names a value twice",
    "by: test_accuracy": "13: tune.by: 'test_accuracy' would choose by the test set",
    "scheduler: asha": (
        "13: tune.scheduler: 'asha' would end trials by how they compare with those of other arms; "
        "the stop rule of an ablation is the same for every arm: `stop: {patience: 5}`"
    ),
    "sampler: hyperband": "13: tune.sampler: 'hyperband' would end trials",
    "prune: ASHA": "13: tune.prune: 'ASHA' would end trials",
    "sampler: cmaes": "13: tune.sampler: 'cmaes' is not known; allowed: grid, qmc, random, tpe",
    "learning_rate: {values: [1e-3]}, sampler: qmc": "sampler qmc needs a range",
    "sampler: tpe, prune: 0.5": "prune: sampler tpe asks for its points one after another",
    "seeds: [1, 100]": "13: tune.seeds: 1 is a seed of the sweep's own; choose by others",
    "storage: 'sqlite:///x.db'": (
        "13: tune.storage: an SQLite file is not for several processes at once"
    ),
    "storage: 'postgresql://me:secret@host/db'": "13: tune.storage: holds a password",
    "storage: studies.log": "13: tune.storage: 'studies.log' is no URL of a database",
    "prune: 0.9": (
        "13: tune: random/fpt: prune: 0.9 of 40 steps, up to the next evaluation (every 10), is "
        "all of them (and 1 more cells)"
    ),
}
"""What may be written under `tune:` by mistake -> what is told of it."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_tuned_is_refused_with_its_place_and_reason(
    tmp_path: Path, mistake: str
) -> None:
    sound = "" if mistake.startswith("learning_rate") else f"learning_rate: {FOUR}, "

    (problem,) = problems_of(tmp_path, f"{{{sound}{mistake}}}")

    assert MISTAKES[mistake] in problem
    assert "secret" not in problem


def test_a_range_has_to_be_given(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, "{by: validation_loss}")

    assert problem.startswith("13: tune: names no field to tune; such as `learning_rate:")


def test_the_protocol_paper_has_nothing_to_tune_by(tmp_path: Path) -> None:
    head = HEAD.replace("  steps: 40", "  protocol: paper\n  steps: 40")

    (problem,) = problems_of(tmp_path, f"{{learning_rate: {FOUR}}}", head)

    assert problem.startswith("14: tune: random/fpt: the protocol paper has no validation split")
    assert "(and 1 more cells)" in problem


def test_a_rate_that_is_given_as_well_is_told_wherever_it_stands(tmp_path: Path) -> None:
    head = HEAD.replace("  steps: 40", "  learning_rate: 1e-3\n  steps: 40")
    point = "{label: a, train: all, learning_rate: 1}"
    head = head.replace("train: [fpt, all]", f"train: [fpt, {point}]")
    head += "defaults: {task: {bit-xor: {learning_rate: 2}}}\n"

    found = problems_of(tmp_path, f"{{learning_rate: {FOUR}}}", head)

    assert [one.partition(": never used, since `tune:`")[0] for one in found] == [
        "5: trial.learning_rate",
        "11: axes.train[1].learning_rate",
        "14: defaults.task.bit-xor.learning_rate",
    ]


def test_pruning_needs_a_beginning_that_can_go_on(tmp_path: Path) -> None:
    head = HEAD.replace("  steps: 40", "  optimizer: {schedule: cosine}\n  steps: 40")

    (problem,) = problems_of(tmp_path, f"{{learning_rate: {FOUR}, prune: 0.5}}", head)

    assert "prune: needs a constant schedule and no stop rule" in problem


def test_a_variable_that_is_not_set_is_told_before_anything_runs(tmp_path: Path) -> None:
    sweep = tuned(tmp_path, f"{{learning_rate: {FOUR}, storage: $NOT_SET_ANYWHERE}}")

    with pytest.raises(SweepFileError, match=r"13: tune.storage: .*NOT_SET_ANYWHERE is not set"):
        optuna_studies.where(sweep, Ledger(tmp_path / "results"))


# --- what is chosen -----------------------------------------------------------------------------


@settings(max_examples=6, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=12, max_size=12),
    order=st.permutations(range(12)),
    killed_at=st.integers(0, 12),
)
def test_the_same_points_and_the_same_choice_come_out_of_any_order_and_any_kill(
    values: list[float], order: list[int], killed_at: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tune = "{learning_rate: {values: [1e-4, 1e-3, 1e-2]}, seeds: [100, 101]}"
        sweep = tuned(Path(folder), tune)
        place = Path(folder) / "results"
        ledger = Ledger(place)
        for count, number in enumerate(order):
            if count == killed_at:  # a process that knows nothing but the file and the folder
                sweep, ledger = load(sweep.file), Ledger(place)
            commit(ledger, [sweep.tunings[number]], validation_accuracy=values[number])
            now = tuning.resolve(sweep, ledger)
            assert now.tunings == sweep.tunings
            for study, arm in zip(sweep.studies, ("fpt", "all"), strict=True):
                left = {p.trial_id for p in sweep.tunings if p.labels["train"] == arm}
                left -= ledger.done()
                own = [p for p in now.points if p.labels["train"] == arm]
                assert len(own) == len(study.points) == 2
                assert all(bool(point.undecided) == bool(left) for point in own)

        now = tuning.resolve(sweep, ledger)
        again = tuning.resolve(tuning.resolve(now, ledger), ledger)
        assert (again.points, again.tunings) == (now.points, now.tunings)
        for arm in ("fpt", "all"):
            means: dict[float, list[float]] = {}
            for point, value in zip(sweep.tunings, values, strict=True):
                if point.labels["train"] == arm:
                    means.setdefault(point.config.learning_rate, []).append(value)
            best = max(sum(one) for one in means.values())
            wanted = min(rate for rate, one in means.items() if sum(one) == best)
            own = [p for p in now.points if p.labels["train"] == arm]
            assert rates(own) == [wanted]
            assert [p.config.seed for p in own] == [0, 1]
            assert all(trial_id(p.config) == p.trial_id for p in own)
            assert len({p.cell_id for p in own}) == 1


def test_a_loss_is_chosen_by_its_least(tmp_path: Path) -> None:
    sweep = tuned(tmp_path, f"{{learning_rate: {FOUR}, by: validation_loss}}")
    ledger = Ledger(tmp_path / "results")
    for point in sweep.tunings:
        loss = abs(math.log10(point.config.learning_rate) + 2)
        commit(ledger, [point], validation_loss=loss, validation_accuracy=loss / 10)

    assert rates(tuning.resolve(sweep, ledger).points) == [1e-2]


def test_what_diverged_is_never_chosen_and_where_all_did_the_least_is(tmp_path: Path) -> None:
    sweep = tuned(tmp_path)
    ledger = Ledger(tmp_path / "results")
    for point in sweep.tunings:
        well = point.labels["train"] == "fpt" and point.config.learning_rate == 1e-3
        outcome = "done" if well else "diverged"
        commit(ledger, [point], outcome=outcome, validation_accuracy=0.1 if well else 0.9)

    chosen = {state.study.label: state for state in tuning.states(sweep, ledger)}

    assert chosen["random/fpt"].chosen == 1e-3
    assert chosen["random/all"].chosen == 1e-4
    assert [one.state for one in chosen["random/fpt"].candidates] == [
        "diverged", "done", "diverged", "diverged",
    ]  # fmt: skip


def test_a_choice_at_the_edge_is_flagged_where_it_is_read(tmp_path: Path) -> None:
    sweep = tuned(tmp_path)
    ledger = Ledger(tmp_path / "results")
    for point in sweep.tunings:
        best = 1e-1 if point.labels["train"] == "fpt" else 1e-2
        commit(ledger, [point], validation_accuracy=float(point.config.learning_rate == best))

    fpt, whole = tuning.states(sweep, ledger)
    commit(ledger, tuning.resolve(sweep, ledger).points)
    table = build(sweep, ledger).to_markdown()

    assert fpt.at_edge
    assert not whole.at_edge
    assert "its learning rate, 0.1, is the greatest that was tried" in table
    assert table.count("that was tried") == 1


def test_the_median_rule_gives_up_the_worse_half_inside_each_cell(tmp_path: Path) -> None:
    sweep = tuned(tmp_path, f"{{learning_rate: {FOUR}, prune: 0.3}}")
    ledger = Ledger(tmp_path / "results")
    assert {p.config.steps for p in sweep.tunings} == {20}  # 12, up to the next evaluation
    early = dict(zip(RATES, (0.4, 0.9, 0.8, 0.1), strict=True))
    for point in sweep.tunings:
        # The cells are worlds apart, and are compared with none but their own.
        scale = 1.0 if point.labels["train"] == "fpt" else 0.01
        value = scale * early[point.config.learning_rate]
        commit(ledger, [point], validation_accuracy=value)

    now = tuning.resolve(sweep, ledger)
    later = [p for p in now.tunings if p.config.steps == 40]
    for arm in ("fpt", "all"):
        assert rates(p for p in later if p.labels["train"] == arm) == [1e-3, 1e-2]
    assert now.undecided == now.points
    for state in tuning.states(now, ledger):
        assert [one.state for one in state.candidates] == ["pruned", "open", "open", "pruned"]
    # They go on from where they stopped.
    for point in sweep.tunings:
        ledger.put_state(point.trial_id, b"state")
    extends = [pack.extends for pack in plan(now, ledger).packs]
    shorter = {p.trial_id for p in sweep.tunings if p.config.learning_rate in (1e-3, 1e-2)}
    assert {name for one in extends for name in one.values()} == shorter

    for point in later:
        commit(ledger, [point], validation_accuracy=point.config.learning_rate)
    done = tuning.resolve(sweep, ledger)
    assert rates(done.points) == [1e-2]
    # What was given up is in the study, and in no table.
    optuna_studies.record(sweep, ledger)
    study = studies_of(sweep, ledger)["random/fpt"]
    told = {one.params["learning_rate"]: one for one in study.trials}
    assert told[1e-4].state.name == told[1e-1].state.name == "PRUNED"
    assert told[1e-4].intermediate_values == {20: 0.4}
    assert not {p.trial_id for p in done.points} & {p.trial_id for p in done.tunings}


def test_tpe_gives_the_same_points_again_and_says_what_it_depends_on(tmp_path: Path) -> None:
    tune = "{learning_rate: {log: [1.0e-5, 1.0e-1], points: 8}, sampler: tpe}"
    sweep = tuned(tmp_path, tune)

    def tried(name: str, order: random.Random) -> dict[str, list[float]]:
        ledger = Ledger(tmp_path / name)
        while (now := tuning.resolve(sweep, Ledger(tmp_path / name))).undecided:
            open_ = [p for p in now.tunings if p.trial_id not in ledger.done()]
            point = order.choice(open_)
            accuracy = 1 - abs(math.log10(point.config.learning_rate) + 3) / 10
            commit(ledger, [point], validation_accuracy=accuracy)
        return {
            state.study.label: [one.rate for one in state.candidates]
            for state in tuning.states(now, ledger)
        }

    one, other = (tried(name, random.Random(name)) for name in ("one", "other"))

    assert one == other
    for found in one.values():
        assert len(set(found)) == 8
        assert found[:4] == rates_in_order(sweep)
        # It looks where it is best, and not just anywhere.
        late = [abs(math.log10(rate) + 3) for rate in found[4:]]
        assert min(late) < 0.5
    assert "depends on the order and the results of those before" in tuning.notes(sweep)[-1]
    table = build(sweep, Ledger(tmp_path / "one")).to_markdown()
    assert "depends on the order and the results of those before" in table


# --- any field ----------------------------------------------------------------------------------

TWO = "{learning_rate: {log: [1.0e-5, 1.0e-1]}, dropout: {uniform: [0, 0.3]}, points: 10"


def set_to(point: Point) -> tuple[float, float]:
    return point.config.learning_rate, point.config.dropout


def good(point: Point) -> float:
    """Best at a rate of 1e-3 and a dropout of 0.1."""
    rate, dropout = set_to(point)
    return 0.9 - abs(math.log10(rate) + 3) / 10 - abs(dropout - 0.1)


def trained(folder: Path, tune: str, order: random.Random, kill_at: int = -1) -> list[Any]:
    """The points of both cells, in the order of asking, of a driver that may be killed."""
    sweep = tuned(folder, tune)
    place = folder / "results"
    count = 0
    while True:
        ledger = Ledger(place)
        tuning.note_asked(sweep, ledger)
        now = tuning.resolve(sweep, ledger)
        if not now.undecided:
            return [
                [one.setting for one in state.candidates] for state in tuning.states(now, ledger)
            ]
        open_ = [p for p in now.tunings if p.trial_id not in ledger.done()]
        order.shuffle(open_)
        for point in open_[: order.randint(1, 3)]:  # so many slots
            count += 1
            if count == kill_at:
                sweep = load(sweep.file)  # what ran is lost: nothing but the ledger stays
                break
            commit(ledger, [point], validation_accuracy=good(point))


@pytest.mark.parametrize("generation", [1, 3])
def test_tpe_killed_at_five_places_asks_for_the_same_points_to_the_bit(
    tmp_path: Path, generation: int
) -> None:
    tune = f"{TWO}, sampler: tpe, generation: {generation}}}"
    (tmp_path / "whole").mkdir()
    whole = trained(tmp_path / "whole", tune, random.Random(0))

    assert [len(one) for one in whole] == [10, 10]
    assert all(len(set(one)) == 10 for one in whole)
    for kill_at in (1, 6, 11, 13, 17):
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        assert trained(folder, tune, random.Random(kill_at), kill_at) == whole
    # The first half is quasi-random in both dimensions, bases 2 and 3.
    assert [dict(one)["dropout"] for one in whole[0][:3]] == [0.1, 0.2, 0.03333]
    assert [dict(one)["learning_rate"] for one in whole[0][:3]] == [1e-3, 1e-4, 1e-2]


def test_what_was_noted_is_what_trains(tmp_path: Path) -> None:
    # As if another release of Optuna, or another machine, had asked for it.
    sweep = tuned(tmp_path, f"{TWO}, sampler: tpe, generation: 5}}")
    ledger = Ledger(tmp_path / "results")
    for point in sweep.tunings:
        commit(ledger, [point], validation_accuracy=good(point))
    tuning.note_asked(sweep, ledger)
    notes = ledger.notes.on_claims("tuned", "generations")
    assert len(notes) == 10
    name = min(notes)
    (file,) = (tmp_path / "results/notes").rglob(f"{name}.json")
    note = json.loads(file.read_text())
    note["setting"] = [["learning_rate", 0.005], ["dropout", 0.25]]
    file.write_text(json.dumps(note))

    (state,) = (
        one
        for one in tuning.states(sweep, Ledger(tmp_path / "results"))
        if one.study.label == note["study"]
    )
    assert state.candidates[5].setting == (("learning_rate", 0.005), ("dropout", 0.25))
    # And noting it again changes nothing.
    tuning.note_asked(sweep, ledger)
    assert json.loads(file.read_text()) == note


def test_a_grid_of_several_fields_is_their_product(tmp_path: Path) -> None:
    sweep = tuned(
        tmp_path,
        "{learning_rate: {log: [1.0e-3, 1.0e-1], points: 3}, dropout: {values: [0.0, 0.1]}, "
        "optimizer.warmup: {int: [0, 10], points: 2}}",
    )

    own = [p for p in sweep.tunings if p.labels["train"] == "fpt"]
    wanted = set(itertools.product((1e-3, 1e-2, 1e-1), (0.0, 0.1), (0, 10)))
    assert {(*set_to(p), p.config.optimizer.warmup) for p in own} == wanted
    assert len(own) == 12
    assert all((trial_id(p.config), cell_id(p.config)) == (p.trial_id, p.cell_id) for p in own)
    (note,) = tuning.notes(sweep)
    assert note == (
        "chosen for each cell, of 12 points of sampler grid: learning_rate (0.001 to 0.1, "
        "logarithmic); dropout (0, 0.1); optimizer.warmup (0 to 10, whole); by validation accuracy "
        "with seed 100, apart from those of the figures"
    )


def test_random_points_are_each_cells_own_and_always_the_same(tmp_path: Path) -> None:
    tune = f"{TWO}, sampler: random}}"

    one, other = tuned(tmp_path, tune), tuned(tmp_path, tune)
    more = tuned(tmp_path, tune.replace("points: 10", "points: 12"))

    assert one.tunings == other.tunings
    assert {p.trial_id for p in one.tunings} < {p.trial_id for p in more.tunings}
    cells = [[set_to(p) for p in one.tunings if p.labels["train"] == arm] for arm in ("fpt", "all")]
    assert [len(set(cell)) for cell in cells] == [10, 10]
    assert not set(cells[0]) & set(cells[1])


def test_the_best_setting_of_a_cell_is_what_its_trials_take(tmp_path: Path) -> None:
    sweep = tuned(tmp_path, f"{TWO}, sampler: qmc}}")
    ledger = Ledger(tmp_path / "results")
    assert all(point.undecided for point in sweep.points)
    for point in sweep.tunings:
        commit(ledger, [point], validation_accuracy=good(point))

    now = tuning.resolve(sweep, ledger)

    best = max(sweep.tunings, key=good)
    assert {set_to(p) for p in now.points} == {set_to(best)}
    assert [p.config.seed for p in now.points] == [0, 1, 0, 1]
    assert all(trial_id(p.config) == p.trial_id for p in now.points)
    shown = CliRunner().invoke(app, ["studies", str(sweep.file), "--results", ledger.uri])
    assert shown.exit_code == 0
    assert "expected best of so many of its points: 1 " in shown.stdout
    assert "importance of its fields (PED-ANOVA): learning_rate " in shown.stdout
    told = CliRunner().invoke(app, ["studies", str(sweep.file), "--json", "--results", ledger.uri])
    first, _ = json.loads(told.stdout)
    assert first["setting"] == dict(zip(("learning_rate", "dropout"), set_to(best), strict=True))
    assert sum(first["importance"].values()) == pytest.approx(1)


def test_the_expected_best_is_the_mean_over_all_choices_of_so_many_points(tmp_path: Path) -> None:
    sweep = tuned(tmp_path, f"{TWO.replace('points: 10', 'points: 6')}, sampler: qmc}}")
    ledger = Ledger(tmp_path / "results")
    for point in sweep.tunings:
        commit(ledger, [point], validation_accuracy=good(point))

    state, _ = tuning.states(sweep, ledger)

    values = [one.value for one in state.candidates if one.value is not None]
    assert len(values) == 6
    for drawn, expected in enumerate(state.expected_best(), start=1):
        every = [max(some) for some in itertools.combinations(values, drawn)]
        assert expected == pytest.approx(sum(every) / len(every))


def test_a_field_that_is_given_as_well_is_told(tmp_path: Path) -> None:
    head = HEAD.replace("  steps: 40", "  optimizer: {warmup: 3}\n  steps: 40")

    (problem,) = problems_of(tmp_path, "{optimizer.warmup: {values: [0, 10]}}", head)

    told = "never used, since `tune:` chooses optimizer.warmup; leave it out"
    assert problem == f"5: trial.optimizer.warmup: {told}"


def test_notes_say_what_was_tried_and_by_what(tmp_path: Path) -> None:
    (note,) = tuning.notes(tuned(tmp_path))
    assert note == (
        "learning rate chosen for each cell, of 4 between 0.0001 and 0.1, by validation accuracy "
        "with seed 100, apart from those of the figures"
    )
    untuned = HEAD.replace("sweep: tuned", "sweep: plain")
    (tmp_path / "plain.yaml").write_text(untuned)
    plain = load(tmp_path / "plain.yaml")
    ledger = Ledger(tmp_path / "results")
    assert tuning.notes(plain) == ()
    assert tuning.resolve(plain, ledger) is plain
    assert optuna_studies.record(plain, ledger) == 0


# --- planning and running -----------------------------------------------------------------------


def test_a_plan_says_why_trials_wait_and_never_hands_one_out_untuned(tmp_path: Path) -> None:
    sweep = tuned(tmp_path)
    ledger = Ledger(tmp_path / "results")
    fpt = [point for point in sweep.tunings if point.labels["train"] == "fpt"]
    commit(ledger, fpt[:3])

    planned = plan(sweep.file, ledger)
    why = {point.label: planned.why.get(point.trial_id) for point in planned.sweep.points}
    assert why == {
        "random/fpt/0": "being tuned (3 of 4 points)",
        "random/fpt/1": "being tuned (3 of 4 points)",
        "random/all/0": "being tuned (0 of 4 points)",
        "random/all/1": "being tuned (0 of 4 points)",
    }
    assert planned.counts() | {"done": 3} == planned.counts()
    assert planned.counts()["blocked"] == 4

    commit(ledger, fpt[3:])
    planned = plan(sweep.file, ledger)
    to_run = {p.label for pack in planned.packs for p in pack.points}
    assert to_run == {"random/fpt/0", "random/fpt/1"} | {
        point.label for point in sweep.tunings if point.labels["train"] == "all"
    }
    table = build(load(sweep.file), ledger).to_markdown()
    assert "being tuned (0 of 4 points)" in table
    assert table.count("0/2") == 2


def test_the_trial_of_another_version_is_no_trial_of_a_placeholder(tmp_path: Path) -> None:
    sweep = tuned(tmp_path)
    ledger = Ledger(tmp_path / "results")
    stranger = sweep.tunings[0]
    row = trial_row(stranger, trial_id="0" * 12, task_version=0)
    row["config"] = json.dumps(sweep.points[0].config.identity())
    ledger.commit(row)

    assert "stale" not in {plan(sweep, ledger).status[p.trial_id] for p in sweep.points}


def test_only_some_trials_come_with_those_that_tune_them(tmp_path: Path) -> None:
    some = tuned(tmp_path).only(["random/fpt/0"])

    assert [point.label for point in some.points] == ["random/fpt/0"]
    assert {point.labels["train"] for point in some.tunings} == {"fpt"}
    ledger = Ledger(tmp_path / "results")
    commit(ledger, some.tunings)
    assert [p.undecided for p in tuning.resolve(some, ledger).points] == [""]
    # Of the trials that tune, one may be picked by itself.
    one = tuned(tmp_path).only(["random/fpt/100/rate 0.001"])
    assert (len(one.tunings), one.points, one.studies) == (1, (), ())


def worked_off(sweep: Sweep, ledger: Ledger, order: random.Random) -> list[str]:
    """The labels of a sweep's trials in the order that two workers train them."""
    planned = plan(sweep, ledger, workers=Workers(2))
    scheduler = Scheduler(
        planned, {}, lambda event: None, follow=IncrementalPlanner(planned, ledger)
    )
    labels: list[str] = []
    while not scheduler.finished:
        while len(scheduler.running) < 2 and (job := scheduler.next()) is not None:
            labels += [point.label for point in job.points]
        attempt = order.choice(sorted(scheduler.running))
        points = scheduler.running[attempt].points
        for point in points:
            better = point.labels["train"] == "all"
            rate = point.config.learning_rate
            accuracy = rate if better else 1 - rate
            commit(ledger, [point], validation_accuracy=accuracy)
        scheduler.ended(attempt, [Result(point.trial_id, "done") for point in points])
    return labels


@pytest.mark.parametrize("tune", [
    f"{{learning_rate: {FOUR}}}",
    f"{{learning_rate: {FOUR}, prune: 0.5}}",
    f"{{learning_rate: {FOUR}, sampler: tpe}}",
])  # fmt: skip
def test_a_run_trains_all_in_one_go_and_a_cell_waits_for_none_but_its_own(
    tmp_path: Path, tune: str
) -> None:
    sweep = tuned(tmp_path, tune)

    runs = {}
    for number in range(2):
        ledger = Ledger(tmp_path / f"results-{number}")
        labels = worked_off(sweep, ledger, random.Random(number))
        now = tuning.resolve(sweep, ledger)
        assert not now.undecided
        assert ledger.done() == {point.trial_id for point in now.all}
        assert max(Counter(labels).values()) == 1
        for arm in ("fpt", "all"):
            own = [label.split("/")[2] for label in labels if f"/{arm}/" in label]
            assert own[-2:] == ["0", "1"]  # after all that tune them
        assert plan(sweep, ledger).counts()["done"] == len(ledger.done())
        runs[number] = ledger.done()
    # In whatever order they ended.
    assert len(set(map(frozenset, runs.values()))) == 1


def test_no_worker_waits_for_the_last_cell_to_be_tuned(tmp_path: Path) -> None:
    sweep = tuned(tmp_path)
    ledger = Ledger(tmp_path / "results")
    planned = plan(sweep, ledger, workers=Workers(2))
    scheduler = Scheduler(
        planned, {}, lambda event: None, follow=IncrementalPlanner(planned, ledger)
    )
    jobs = [scheduler.next(), scheduler.next(), scheduler.next()]
    (fpt,) = [job for job in jobs if job and job.points[0].labels["train"] == "fpt"]

    commit(ledger, fpt.points)
    scheduler.ended(fpt.attempt, [Result(point.trial_id, "done") for point in fpt.points])

    started = []
    while (job := scheduler.next()) is not None:
        started += [point.label for point in job.points]
    assert {"random/fpt/0", "random/fpt/1"} < set(started)


def test_a_backbone_of_a_tuned_trial_is_kept_where_the_file_says_so(tmp_path: Path) -> None:
    sweep = tuned(tmp_path, f"{{learning_rate: {FOUR}}}\nkeep: {{backbones: true}}")
    ledger = Ledger(tmp_path / "results")
    planned = plan(sweep, ledger)
    scheduler = Scheduler(
        planned, {}, lambda event: None, follow=IncrementalPlanner(planned, ledger)
    )
    kept: set[str] = set()
    while (job := scheduler.next()) is not None:
        kept.update(job.keep_backbones)
        commit(ledger, job.points)
        scheduler.ended(job.attempt, [Result(point.trial_id, "done") for point in job.points])

    assert kept == {point.trial_id for point in tuning.resolve(sweep, ledger).all}


# --- readers ------------------------------------------------------------------------------------


def test_frames_have_the_tuned_trials_and_no_label_on_those_that_tuned(tmp_path: Path) -> None:
    sweep = tuned(tmp_path)
    ledger = Ledger(tmp_path / "results")
    commit(ledger, sweep.tunings)
    commit(ledger, tuning.resolve(sweep, ledger).points, test_accuracy=0.75)

    frame = load_trials(tmp_path / "results", sweep=sweep.file)

    assert len(frame) == 12
    own = frame[frame["axis.train"].notna()]
    assert own["test_accuracy"].tolist() == [0.75] * 4
    assert sorted(own["seed"]) == [0, 0, 1, 1]


def test_curves_tell_each_rate_its_figure_and_the_choice(tmp_path: Path) -> None:
    sweep = tuned(tmp_path, f"{{learning_rate: {FOUR}, seeds: [100, 101]}}")
    ledger = Ledger(tmp_path / "results")
    fpt = [point for point in sweep.tunings if point.labels["train"] == "fpt"]
    for point in fpt:
        commit(ledger, [point], validation_accuracy=1 - point.config.learning_rate)

    found = tuning.curves(sweep, ledger)

    assert len(found) == 16
    chosen = [(one.cell, one.rate, one.seed, one.value) for one in found if one.chosen]
    assert chosen == [("random/fpt", 1e-4, 100, 0.9999), ("random/fpt", 1e-4, 101, 0.9999)]
    assert {one.trial_id for one in found} == {point.trial_id for point in sweep.tunings}
    assert {one.value for one in found if one.cell == "random/all"} == {None}
    assert {one.labels["train"] for one in found} == {"fpt", "all"}


def test_the_command_shows_choices_and_rebuilds_studies(tmp_path: Path) -> None:
    sweep = tuned(tmp_path)
    place = str(tmp_path / "results")
    for point in sweep.tunings:
        value = float(point.config.learning_rate == 1e-3)
        commit(Ledger(place), [point], validation_accuracy=value)
    command = ["studies", str(sweep.file), "--results", place]

    shown = CliRunner().invoke(app, command)
    rebuilt = CliRunner().invoke(app, [*command, "--rebuild", "--json"])

    assert shown.exit_code == 0, shown.output
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert ["0.001", "100.00", "chosen"] in lines
    assert f"{place}/studies/tuned.log: 8 points of 2 cells" in rebuilt.stderr
    told = json.loads(rebuilt.stdout)
    assert [(one["cell"], one["chosen"], one["at_edge"]) for one in told] == [
        ("random/fpt", 0.001, False), ("random/all", 0.001, False),
    ]  # fmt: skip
    assert len(studies_of(sweep, Ledger(place))["random/all"].trials) == 4


def test_the_command_says_what_a_file_without_tuning_could_have(tmp_path: Path) -> None:
    file = tmp_path / "plain.yaml"
    file.write_text(HEAD)

    error = CliRunner().invoke(app, ["studies", str(file)]).exception

    assert isinstance(error, UserError)
    assert str(error).startswith(f"{file}: tune: missing; its learning rates are given. Try `tune")


def test_claims_wait_for_what_is_being_tuned(tmp_path: Path) -> None:
    claims = "claims: [{that: all > fpt, axis: train, per: pretraining}]"
    sweep = tuned(tmp_path, f"{{learning_rate: {FOUR}}}\n{claims}")
    ledger = Ledger(tmp_path / "results")
    commit(ledger, [point for point in sweep.tunings if point.labels["train"] == "fpt"])

    (waiting,) = judge(sweep, ledger).contrasts
    commit(ledger, sweep.tunings)
    for number, point in enumerate(tuning.resolve(sweep, ledger).points):
        commit(ledger, [point], test_accuracy=0.5 + number / 10)
    (whole,) = judge(sweep, ledger).contrasts

    # The config of a trial that waits has the default: no rate of its own.
    assert {point.identity["learning_rate"] for point in sweep.points} == {"tuned"}
    assert {point.identity["learning_rate"] for point in sweep.tunings} == set(RATES)
    assert (waiting.pairs, waiting.expected, waiting.verdict) == (0, 2, "untested")
    assert "being tuned (0 of 4 points)" in " ".join(waiting.notes)
    assert (whole.pairs, whole.expected) == (2, 2)
    assert whole.difference == pytest.approx(20)


def test_a_trial_without_a_rate_is_not_debugged(tmp_path: Path) -> None:
    sweep = tuned(tmp_path)
    command = ["debug", str(sweep.file), "--results", str(tmp_path / "results")]

    error = CliRunner().invoke(app, [*command, "--only", "random/fpt/0"]).exception

    assert isinstance(error, UserError)
    assert "random/fpt/0 has no learning rate yet: being tuned (0 of 4 points)" in str(error)


# --- Optuna's storage ---------------------------------------------------------------------------


def studies_of(sweep: Sweep, ledger: Ledger) -> dict[str, Any]:
    import optuna

    storage = optuna_studies._storage(optuna_studies.where(sweep, ledger))
    return {
        study.user_attrs["cell"]: optuna.load_study(study_name=study.study_name, storage=storage)
        for study in optuna.get_all_study_summaries(storage)
    }


def test_optuna_is_told_each_rate_once(tmp_path: Path) -> None:
    sweep = tuned(tmp_path)
    ledger = Ledger(tmp_path / "results")
    told = 0
    for point in sweep.tunings:
        commit(ledger, [point], validation_accuracy=point.config.learning_rate)
        told += optuna_studies.record(sweep, ledger)
        assert optuna_studies.record(sweep, Ledger(tmp_path / "results")) == 0

    assert told == 8
    for study in studies_of(sweep, ledger).values():
        assert [one.params["learning_rate"] for one in study.trials] == list(RATES)
        assert [one.value for one in study.trials] == list(RATES)
        assert study.best_params == {"learning_rate": 1e-1}


def test_what_others_tell_meanwhile_contradicts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna

    sweep = tuned(tmp_path)
    ledger, other = Ledger(tmp_path / "results"), Ledger(tmp_path / "results")
    commit(ledger, sweep.tunings[:2], validation_accuracy=0.5)
    lease, told = ledger.lease, []

    def after_others(name: str) -> Any:
        commit(other, sweep.tunings[2:], validation_accuracy=0.75)
        told.append(optuna_studies.record(sweep, other))
        return lease(name)

    def deleted(**_: Any) -> None:
        raise AssertionError("a study was deleted")

    monkeypatch.setattr(ledger, "lease", after_others)
    monkeypatch.setattr(optuna, "delete_study", deleted)

    assert optuna_studies.record(sweep, ledger) == 0
    assert told == [8]


def damage_nothing(journal: Path) -> None:
    pass


def damage_lose(journal: Path) -> None:
    journal.unlink()


def damage_cut(journal: Path) -> None:
    journal.write_bytes(journal.read_bytes()[:-30])


def damage_middle(journal: Path) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], b"\x00" * 50 + b"\n", *lines[3:]]))


def damage_lie(journal: Path) -> None:
    text = journal.read_text()
    assert '"value":0.01,' in text
    journal.write_text(text.replace('"value":0.01,', '"value":0.99,'))


@pytest.mark.parametrize(
    "damage", [damage_nothing, damage_lose, damage_cut, damage_middle, damage_lie]
)
def test_what_is_lost_or_wrong_in_a_journal_is_made_anew_from_the_ledger(
    tmp_path: Path, damage: Any
) -> None:
    sweep = tuned(tmp_path)
    ledger = Ledger(tmp_path / "results")
    for point in sweep.tunings:
        commit(ledger, [point], validation_accuracy=point.config.learning_rate)
    optuna_studies.record(sweep, ledger)
    journal = Path(optuna_studies.where(sweep, ledger))
    assert journal == tmp_path / "results/studies/tuned.log"

    damage(journal)
    again = optuna_studies.record(sweep, ledger)

    assert bool(again) == (damage is not damage_nothing)
    for study in studies_of(sweep, ledger).values():
        assert sorted(one.value for one in study.trials) == list(RATES)
    assert optuna_studies.record(sweep, ledger) == 0


def test_a_storage_that_fails_costs_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STUDIES_URL", "postgresql://me:secret@127.0.0.1:1/studies")
    sweep = tuned(tmp_path, f"{{learning_rate: {FOUR}, storage: $STUDIES_URL}}")
    ledger = Ledger(tmp_path / "results")
    commit(ledger, sweep.tunings)

    with pytest.raises(
        optuna_studies.StudiesError, match=r"^postgresql://127\.0\.0\.1:1/studies: "
    ):
        optuna_studies.record(sweep, ledger)
    follower = optuna_studies.Follower(sweep, ledger)
    follower.sync()
    follower.sync()

    assert "no result is lost" in caplog.text
    assert "secret" not in caplog.text
    assert not tuning.resolve(sweep, ledger).undecided


@pytest.mark.slow
def test_studies_may_lie_in_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.servers import Postgres, free_port

    # Another user's, who may not look into what pytest gives a test.
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    server = Postgres(folder / "postgres", free_port())
    server.start()
    try:
        monkeypatch.setenv(optuna_studies.STORAGE, server.uri)
        sweep = tuned(tmp_path)
        ledger = Ledger(tmp_path / "results")
        for point in sweep.tunings:
            commit(ledger, [point], validation_accuracy=point.config.learning_rate)
        assert optuna_studies.record(sweep, ledger) == 8
        assert optuna_studies.record(sweep, ledger) == 0
        assert optuna_studies.record(sweep, ledger, rebuild=True) == 8
        assert len(studies_of(sweep, ledger)["random/fpt"].trials) == 4
        assert not (tmp_path / "results/studies").exists()
    finally:
        server.stop()
        shutil.rmtree(folder)


# --- a real run ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(("prune", "pruned", "went_on"), [
    ("0.25", 2, 4), ("{rungs: [0.25, 0.5], keep: 0.5}", 3, 6),
])  # fmt: skip
def test_a_sweep_that_was_killed_while_it_tuned_ends_as_one_that_was_not(
    tmp_path: Path, prune: str, pruned: int, went_on: int
) -> None:
    file = tmp_path / "tuned.yaml"
    tune = f"{{learning_rate: {FOUR}, prune: {prune}}}\nkeep: {{trained: false}}"
    head = HEAD.replace("steps: 40", "steps: 400").replace("every: 10", "every: 100")
    file.write_text(f"{head}tune: {tune}\n")

    def start(place: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "sweep", "run", str(file), "--results", str(place)],
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(killed)
    while len(list(killed.glob("trials/*.parquet"))) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for place in (killed, whole):
        process = start(place)
        _, said = process.communicate()
        assert process.returncode == 0, said
    sweep = load(file)
    one, other = (tuning.resolve(sweep, Ledger(place)) for place in (killed, whole))

    assert [p.trial_id for p in one.all] == [p.trial_id for p in other.all]
    assert Ledger(killed).done() == Ledger(whole).done() == {p.trial_id for p in one.all}
    columns = ["trial_id", "validation_accuracy", "test_accuracy", "test_loss"]
    assert (
        Ledger(killed).trials().select(columns).to_pylist()
        == Ledger(whole).trials().select(columns).to_pylist()
    )
    # What was promoted went on from the end of its beginning, and nothing else was kept.
    for place in (killed, whole):
        extended = Ledger(place).trials(columns=["trial_id", "steps", "extended_from"]).to_pylist()
        assert sum(row["extended_from"] is not None for row in extended) == went_on
        assert Ledger(place).states() == {p.trial_id for p in one.tunings if p.goes_on}
    for study in studies_of(sweep, Ledger(killed)).values():
        assert Counter(trial.state.name for trial in study.trials)["PRUNED"] == pruned
        assert len(study.trials) == 4
    with sqlite3.connect(whole / "mlflow.db") as database:
        query = "SELECT value FROM tags WHERE key = 'axis.tuning'"
        tags = Counter(value for (value,) in database.execute(query))
    database.close()
    assert tags["rate 0.0001, 100 steps"] == 2
    assert sum(tags.values()) == len(one.tunings)
    assert not re.search("Traceback", said)


def test_what_others_ended_between_a_plan_and_its_run_is_no_loss(tmp_path: Path) -> None:
    sweep = tuned(tmp_path)
    ledger = Ledger(tmp_path / "results")
    planned = plan(sweep, ledger, workers=Workers(2))
    for point in sweep.tunings:
        commit(ledger, [point], validation_accuracy=point.config.learning_rate)

    planner = IncrementalPlanner(planned, ledger)
    told = [planner(point.trial_id) for point in sweep.tunings]

    packs = [pack for one in told if one is not None for pack in one.packs]
    own = [point for pack in packs for point in pack.points]
    assert {point.config.learning_rate for point in own} == {0.1}
    assert len(own) == len(sweep.points)
