"""Prices: against the published rows, held out; and what is said where nothing is known."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweep.ledger import provenance
from sweep.ledger.ledger import Ledger
from sweep.planning import estimates
from sweep.planning.estimates import Quote, compare, keep, quote
from sweep.planning.packing import Workers, own_seconds
from sweep.planning.plan import Plan, in_turn, plan
from sweep.sweepfile.expansion import load
from sweep.sweepfile.trials import Sweep
from tests.support import trial_row

ROOT = Path(__file__).parents[3]
HERE = provenance.processor()
ROWS: list[dict[str, Any]] = [
    # As if they had been measured on this machine.
    {name: value for name, value in row.items() if not name.startswith("axis.")}
    | {"device_name": HERE}
    for row in pq.read_table(ROOT / "results/published/quickstart/trials.parquet").to_pylist()
]
FEW = Workers(2)
TUNED = """\
sweep: tuned
trial:
  task: {name: bit-xor, bits: 2}
  backbone: {name: gpt2, layers: 1, width: 16, heads: 2}
  pretraining: random
  steps: 10
tune: {learning_rate: {values: [1e-3, 1e-2]}, by: validation_accuracy, seeds: [9]}
axes: {seed: [0, 1]}
"""


@pytest.fixture(scope="module")
def quickstart() -> Sweep:
    return load(ROOT / "experiments/quickstart.yaml")


def priced(folder: Path, sweep: Sweep, known: list[dict[str, Any]]) -> tuple[Plan, Quote]:
    """A quote from some rows, for all other trials."""
    ledger = Ledger(folder)
    for row in known:
        ledger.commit(row)
        if row["train"].count("+") == 5:  # It trains a backbone for the others.
            ledger.put_backbone(row["trial_id"], b"")
    planned = plan(sweep, ledger, workers=FEW)
    return planned, quote(planned, ledger)


def inside(made: Quote) -> bool:
    took = sum(row["seconds"] for row in ROWS if row["trial_id"] in made.trials) / 3600
    assert made.low is not None
    assert made.high is not None
    return made.low <= took <= made.high


def test_half_of_the_published_rows_price_the_other_half(tmp_path: Path, quickstart: Sweep) -> None:
    rng = random.Random(0)
    hits = []
    for number in range(12):
        known = [row for row in ROWS if rng.random() < 0.5 or row["pretraining"] == "random"]
        _, made = priced(tmp_path / str(number), quickstart, known)
        assert made.measured + made.guessed == len(ROWS) - len(known) == len(made.trials)
        assert made.guessed == 0
        hits.append(inside(made))

    assert sum(hits) >= 10  # of 12, at nine in ten; nine or fewer are one chance in 40
    assert made.high / made.low < 2


SEEDS = """\
sweep: seeds
trial:
  task: {name: bit-xor, bits: 2}
  backbone: {name: gpt2, layers: 1, width: 16, heads: 2}
  pretraining: random
  steps: 10
axes: {seed: [0, 1, 2, 3, 4, 5, 6, 7]}
pack: off
"""


@given(
    wall=st.floats(0.5, 50),
    cpu=st.none() | st.floats(0.5, 50),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_seconds_of_a_core_are_those_that_the_trial_had_it(
    wall: float, cpu: float | None, device: str
) -> None:
    waited = device == "cpu" and cpu is not None and cpu < wall

    assert own_seconds(device, wall, cpu) == (cpu if waited else wall)


def test_a_run_beside_other_work_raises_no_price(tmp_path: Path) -> None:
    (tmp_path / "seeds.yaml").write_text(SEEDS)
    sweep = load(tmp_path / "seeds.yaml")
    quiet, busy = (
        [
            trial_row(point, seconds=wall, cpu_seconds=1.0, device_name=HERE)
            for point in sweep.points[:4]
        ]
        for wall in (1.0, 30.0)
    )

    _, alone = priced(tmp_path / "quiet", sweep, quiet)
    _, beside = priced(tmp_path / "busy", sweep, busy)

    assert (alone.hours, alone.low, alone.high) == (beside.hours, beside.low, beside.high)
    assert set(beside.trials.values()) == {1.0}


def test_seconds_are_those_of_the_same_model_of_device(tmp_path: Path) -> None:
    (tmp_path / "seeds.yaml").write_text(SEEDS)
    sweep = load(tmp_path / "seeds.yaml")
    here = [trial_row(point, seconds=1.0, device_name=HERE) for point in sweep.points[:3]]
    slow = [trial_row(point, seconds=9.0, device_name="slow") for point in sweep.points[3:6]]

    _, own = priced(tmp_path / "own", sweep, here)
    _, both = priced(tmp_path / "both", sweep, here + slow)
    _, other = priced(tmp_path / "other", sweep, slow)

    assert set(both.trials.values()) == set(own.trials.values()) == {1.0}
    assert set(other.trials.values()) == {9.0}
    assert both.high is not None
    assert other.high is not None
    assert both.high / both.low < 2 < other.high / other.low  # type: ignore[operator]
    assert "another model of device" in other.note
    assert "another model" not in both.note


def test_a_task_that_was_never_measured_is_priced_by_formula_from_the_others(
    tmp_path: Path, quickstart: Sweep
) -> None:
    for task in ("bit-xor", "listops", "digits"):
        known = [row for row in ROWS if row["task"] != task]
        _, made = priced(tmp_path / task, quickstart, known)

        assert (made.measured, made.guessed) == (0, 12)
        assert inside(made)
        assert "by formula" in made.note


def test_with_nothing_measured_a_core_has_a_wide_price_and_a_gpu_none(
    tmp_path: Path, quickstart: Sweep
) -> None:
    _, made = priced(tmp_path, quickstart, [])
    on_gpu = quote(plan(quickstart, tmp_path, workers=Workers(1, gpus=1)), Ledger(tmp_path))

    assert made.guessed == len(ROWS)
    assert inside(made)
    assert made.high / made.low > 5
    assert made.finish_hours > made.hours / 2
    assert on_gpu.device == "cuda"
    assert on_gpu.hours is on_gpu.low is on_gpu.high is on_gpu.finish_hours is None
    assert on_gpu.operations == made.operations > 1e12
    assert "without a price" in on_gpu.note


def test_nothing_to_train_costs_nothing(tmp_path: Path, quickstart: Sweep) -> None:
    ledger = Ledger(tmp_path)
    for row in ROWS:
        ledger.commit(row)
    ledger.put_backbone(quickstart.pretrainings[0].trial_id, b"")
    planned = plan(quickstart, ledger, workers=FEW)
    made = quote(planned, ledger)

    assert not planned.packs
    assert (made.hours, made.finish_hours, made.disk, made.memory) == (0, 0, 0, None)
    keep(made, planned, ledger)
    assert compare(quickstart, ledger) is None


def test_a_quote_is_set_against_what_its_trials_took(tmp_path: Path, quickstart: Sweep) -> None:
    known, rest = ROWS[:20], ROWS[20:]
    planned, made = priced(tmp_path, quickstart, known)
    ledger = Ledger(tmp_path, write=True)
    keep(made, planned, ledger)
    before = compare(quickstart, ledger)
    for row in rest[:5]:
        ledger.commit(row)

    after = compare(quickstart, Ledger(tmp_path))

    assert before is not None
    assert (before.trials, before.done, before.took) == (len(made.trials), 0, 0)
    assert after is not None
    assert after.done == 5
    assert after.took == pytest.approx(sum(row["seconds"] for row in rest[:5]) / 3600)
    assert after.quoted == pytest.approx(
        sum(made.trials[row["trial_id"]] for row in rest[:5]) / 3600, rel=1e-3
    )
    assert (after.hours, after.low, after.high) == (made.hours, made.low, made.high)


def test_a_quote_holds_for_what_it_could_not_name_yet(tmp_path: Path) -> None:
    file = tmp_path / "tuned.yaml"
    file.write_text(TUNED)
    planned = plan(load(file), ledger := Ledger(tmp_path / "results", write=True))
    keep(quote(planned, ledger), planned, ledger)
    for number, point in enumerate(planned.sweep.tunings):
        ledger.commit(trial_row(point, validation_accuracy=0.5 + 0.1 * number))
    resolved = plan(file, ledger).sweep
    for point in resolved.points:
        ledger.commit(trial_row(point))

    found = compare(resolved, ledger)

    assert len(planned.sweep.undecided) == 2
    assert not resolved.undecided
    assert found is not None
    assert (found.trials, found.done) == (4, 4)


def test_a_quote_says_how_many_trials_it_cannot_know_yet(tmp_path: Path) -> None:
    """Of 6 points two arms try 3 each before TPE is asked; then it asks for one more of each."""
    tune = "{learning_rate: {log: [1e-4, 1e-2]}, points: 6, sampler: tpe, seeds: [9]}"
    file = tmp_path / "adaptive.yaml"
    body, _, _ = TUNED.partition("tune:")
    file.write_text(f"{body}tune: {tune}\naxes: {{dropout: [0, 0.1], seed: [0, 1]}}\n")
    ledger = Ledger(tmp_path / "results")
    before = quote(plan(file, ledger), ledger)
    for point in load(file).tunings:
        ledger.commit(trial_row(point, validation_accuracy=int(point.trial_id, 16) % 10 / 10))

    after = quote(plan(file, ledger), ledger)

    assert "without 6 more that the sampler has yet to ask for" in before.note
    assert "without 4 more" in after.note


def test_a_quote_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "quotes/x").mkdir(parents=True)
    (tmp_path / "quotes/x/1.json").write_text("{")

    file = tmp_path / "x.yaml"
    file.write_text(TUNED.replace("sweep: tuned", "sweep: x"))

    assert compare(load(file), Ledger(tmp_path)) is None


def test_more_workers_end_sooner_and_packs_are_never_split_over_them() -> None:
    assert estimates._ends([3, 3, 3], 2) == 6
    assert estimates._ends([3, 3, 3], 3) == 3
    assert estimates._ends([10, 1, 1], 8) == 10


def test_a_pack_of_drawn_backbones_takes_their_memory(tmp_path: Path) -> None:
    file = tmp_path / "seeds.yaml"
    wide = SEEDS.replace("pack: off", "pack: 4")
    memory = {}
    for drawn in ("backbone_seed: 0", "backbone_seed: null"):
        file.write_text(wide.replace("steps: 10", f"steps: 10\n  {drawn}"))
        sweep = load(file)
        assert [len(pack.points) for pack in plan(sweep, tmp_path).packs] == [4, 4]
        memory[drawn] = priced(tmp_path / drawn[-1], sweep, [])[1].memory
    layers, width = sweep.points[0].config.backbone.layers, sweep.points[0].config.backbone.width
    assert memory["backbone_seed: null"] - memory["backbone_seed: 0"] == (
        3 * 4 * 12 * layers * width**2
    )


def of_seeds(folder: Path, text: str, *seeds: str) -> list[Path]:
    """Files of one sweep with other seeds."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"seeds-{number}.yaml" for number in range(len(seeds))]
    for file, own in zip(files, seeds, strict=True):
        axes = f"axes: {{seed: {own}}}"
        file.write_text(re.sub(r"axes: {seed: .*}", axes, text))
    return files


@pytest.mark.parametrize("text", [SEEDS, TUNED], ids=["given", "tuned"])
def test_files_that_share_trials_cost_what_one_file_of_all_trials_does(
    text: str, tmp_path: Path
) -> None:
    """Each pays for its start, and the rest is that of the file that has them all."""
    text = text.replace("  steps: 10", "  steps: 10\npack: off") if "tune" in text else text
    parts = of_seeds(tmp_path, text, "[0, 1, 2, 3]", "[2, 3, 4]", "[0, 5]", "[5, 0]")
    (whole,) = of_seeds(tmp_path / "whole", text, "[0, 1, 2, 3, 4, 5]")
    ledger = Ledger(tmp_path / "results", write=True)
    for number, point in enumerate(load(whole).all[:2]):
        ledger.commit(trial_row(point, seconds=10.0, validation_accuracy=number / 10))
    one = quote(plan(whole, ledger, workers=Workers(1)), ledger)

    plans = in_turn(plan(part, ledger, workers=Workers(1)) for part in parts)
    all_ = quote(plans[0], ledger, *plans[1:])

    assert plans[3].counts() == dict.fromkeys(plans[3].counts(), 0)
    assert all_.trials == one.trials
    assert len(one.trials) == 4 if text == SEEDS else 6
    assert (all_.hours, all_.low, all_.high) == pytest.approx((one.hours, one.low, one.high))
    assert all_.disk == one.disk
    runs = sum(bool(one.packs or one.sweep.undecided) for one in plans)
    start = (runs - 1) * estimates.START_SECONDS / 3600
    assert runs == 3
    assert all_.finish_hours == pytest.approx(one.finish_hours + start)


def test_cells_that_are_tuned_otherwise_share_no_trial_to_come(tmp_path: Path) -> None:
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text(TUNED)
    other.write_text(TUNED.replace("1e-3, 1e-2", "1e-3, 1e-1"))
    ledger = Ledger(tmp_path / "results")

    first, second = in_turn([plan(one, ledger), plan(other, ledger)])

    assert len(first.status) == 4
    # The rate that both try is tried once; which rate each cell takes may differ.
    assert [point.label for point in second.sweep.tunings] == ["9/rate 0.1"]
    assert len(second.sweep.undecided) == 2
