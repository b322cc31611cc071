"""The trainer: what trains moves and nothing else does, resume to the bit, packs, ends, figures."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from fpt import random_streams
from fpt.backbones import BACKBONES
from fpt.checkpoints import State, load_model
from fpt.files import DataError
from fpt.model import Model, build_model
from fpt.trainer import Outcome, Record, Training, train
from fpt.training.features import FeatureCache
from fpt.training.feeding import inputs_of
from tests.support import PACKED, TABLE, small

SMALL_LISTOPS = {
    "name": "listops", "max_length": 12, "min_length": 3, "train": 64, "test": 16,
    "validation": 16, "max_depth": 2,
}  # fmt: skip


@pytest.fixture
def collector_off() -> Iterator[None]:
    """Nothing is freed but what nobody refers to."""
    gc.disable()
    yield
    gc.enable()


def finish(training: Training) -> Outcome:
    list(training)
    return training.outcomes[0]


def tensors_of(outcome: Outcome) -> dict[str, torch.Tensor]:
    return outcome.state.tensors


def assert_same(one: Outcome, other: Outcome) -> None:
    """Every figure and every bit of the state, clocks apart."""

    def figures(outcome: Outcome) -> dict[str, Any]:
        clocks = {"seconds": 0.0, "cpu_seconds": 0.0}
        plain = {k: v for k, v in vars(outcome).items() if k not in (*clocks, "state")}
        return plain | vars(replace(outcome.state.figures, **clocks))

    assert figures(one) == figures(other)
    mine, theirs = tensors_of(one), tensors_of(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


# Losses of the first five steps, pinned. A change here moves the numbers of every ledger: bump the
# task's or the identity's version, and say so in CHANGELOG.md.
GOLDEN = {
    "gpt2": [0.7099481, 0.6937811, 0.8141056, 0.6603136, 0.7336015],
    "bert": [0.732151, 0.6764076, 0.8032926, 0.7037442, 0.7100735],
    "t5": [0.7306048, 0.7782778, 0.7827636, 0.7926975, 0.6776239],
    "longformer": [0.7319119, 0.676572, 0.8028526, 0.7035008, 0.7097433],
    "vit": [0.7682747, 0.6396018, 0.7968748, 0.6632578, 0.6996248],
    "lstm": [0.8615031, 0.9084125, 0.8552114, 0.7537437, 0.7054873],
    "lstm-paper": [0.7120617, 0.725203, 0.7161503, 0.6965853, 0.6963151],
    "lstm-residual": [0.8827176, 0.6632127, 0.7725525, 0.728552, 0.6900408],
    "transformer": [0.6587773, 0.6524687, 0.7391299, 0.7143416, 0.727733],
    "linformer": [0.6714163, 0.7132709, 0.9823782, 0.7299131, 0.7655104],
    "mixer": [0.7987626, 0.70678, 0.6524319, 0.707383, 0.7824695],
}


@pytest.mark.parametrize("name", TABLE)
def test_losses_of_five_steps_are_the_pinned_ones(name: str, trial: Any) -> None:
    one = trial(backbone=small(name), steps=5)

    losses = [r.loss for r in train([one], log_every=1) if r.split == "train"]

    assert losses == pytest.approx(GOLDEN[name], abs=1e-5)


EACH_GROUP = [
    (name, group)
    for name in TABLE
    for group in (*BACKBONES[name].trainable, "attention:last")
    if group.partition(":")[0] in BACKBONES[name].trainable
]


@pytest.mark.parametrize(("name", "group"), EACH_GROUP)
def test_one_group_trains_and_no_other_parameter_moves(name: str, group: str, trial: Any) -> None:
    one = trial(backbone=small(name), train=[group], steps=1)
    before = {n: p.detach().clone() for n, p in build_model([one]).member(0).items()}
    training = train([one])
    finish(training)
    after = training.model.member(0)

    moved = {n for n in before if not torch.equal(before[n], after[n])}
    groups = training.model.groups
    assert moved
    assert {groups[n] for n in moved} == {group.partition(":")[0]}
    assert moved <= training.model.trained


@pytest.mark.parametrize("cut", [3, 10, 13, 29])
def test_a_state_between_records_loses_nothing_of_the_next_one(trial: Any, cut: int) -> None:
    one = trial(steps=40, evaluation={"every": 20})

    def curve(training: Training) -> list[tuple[int, str, float, float]]:
        return [(r.step, r.split, r.loss, r.accuracy) for r in training]

    whole = curve(train([one], log_every=10))
    first = train([one], log_every=10)
    seen = [record for _ in range(cut) for record in first.step()]
    rest = train([one], log_every=10, state=[first.states()[0]])

    assert [(r.step, r.split, r.loss, r.accuracy) for r in seen] + curve(rest) == whole


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("stop_after", [7, 10, 15])
def test_a_resumed_trial_ends_bit_for_bit_as_an_uninterrupted_one(
    dropout: float, stop_after: int, trial: Any
) -> None:
    one = trial(dropout=dropout, task=SMALL_LISTOPS, steps=25)
    whole = finish(train([one]))
    first = train([one], log_every=1)
    for record in first:
        if record.step == stop_after and first.settled:
            break
    data = first.states()[0].to_bytes()

    resumed = finish(train([one], state=[State.from_bytes(data)]))

    assert_same(whole, resumed)


def test_extended_steps_end_bit_for_bit_as_one_run(trial: Any) -> None:
    short = finish(train([trial(steps=10)]))
    state = State.from_bytes(short.state.to_bytes())

    extended = finish(train([trial(steps=30)], state=[state]))

    assert_same(finish(train([trial(steps=30)])), extended)


def test_logging_changes_no_figure_of_an_outcome(trial: Any) -> None:
    assert_same(finish(train([trial()])), finish(train([trial()], log_every=3)))


def test_an_evaluation_interval_changes_no_training_example_and_no_mask(trial: Any) -> None:
    def losses(every: int) -> list[float]:
        training = train([trial(evaluation={"every": every})], log_every=1)
        return [r.loss for r in training if r.split == "train"]

    assert losses(3) == losses(20)


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("name", PACKED)
def test_members_of_a_pack_end_bit_for_bit_as_alone(name: str, batch: int, trial: Any) -> None:
    backbone = small(name)
    trials = [
        trial(backbone=backbone, seed=0, batch_size=batch),
        trial(backbone=backbone, seed=1, batch_size=4, steps=10, dropout=0.0),
        trial(backbone=backbone, seed=2, batch_size=batch, learning_rate=3e-3, dropout=0.3),
    ]
    pack = train(trials)
    list(pack)

    for k, one in enumerate(trials):
        assert_same(finish(train([one])), pack.outcomes[k])


@pytest.mark.parametrize("name", PACKED)
def test_frozen_weights_that_change_end_the_pack_without_a_figure(name: str, trial: Any) -> None:
    training = train([trial(backbone=small(name))], log_every=1)
    next(training)
    model = training.model
    frozen = next(
        p for n, p in model.named_parameters() if model.groups[model.canonical(n)[0]] == "attention"
    )
    with torch.no_grad():
        frozen.flatten()[0] += 1e-3

    with pytest.raises(RuntimeError, match="frozen weights changed"):
        list(training)
    assert training.outcomes == {}


@pytest.mark.parametrize("name", ["gpt2", "longformer"])
def test_features_that_are_kept_change_no_bit(
    name: str, trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"backbone": small(name), "train": ["output"], "dropout": 0.0, "task": SMALL_LISTOPS}
    trials = [trial(**fields, seed=0, steps=40), trial(**fields, seed=1, batch_size=3, steps=10)]
    kept = train(trials)
    list(kept)
    rows: list[int] = []
    monkeypatch.setattr(
        Model,
        "features",
        lambda self, *a, real=Model.features: (rows.append(len(a[0])), real(self, *a))[1],
    )
    list(train(trials))
    with_features = sum(rows)
    monkeypatch.setattr("fpt.training.features.FEATURES_BYTES", 0)
    computed = train(trials)
    list(computed)

    for k in (0, 1):
        assert_same(computed.outcomes[k], kept.outcomes[k])
    assert with_features <= 2 * (64 + 16 + 16) < sum(rows) - with_features


@pytest.mark.parametrize("fields", [{"train": ["output"], "dropout": 0.0}, {}])
@pytest.mark.parametrize("steps", [3, None])
def test_a_model_goes_with_its_training(
    fields: dict[str, Any], steps: int | None, trial: Any, collector_off: None
) -> None:
    training = train([trial(**fields, task=SMALL_LISTOPS, steps=10)])
    if steps is None:
        list(training)
    else:
        for _ in range(steps):
            training.step()
    assert bool(training._features) == ("train" in fields)
    model = weakref.ref(training.model)
    del training
    assert model() is None


def test_features_are_not_kept_where_they_change(trial: Any) -> None:
    plain = {"train": ["output"], "dropout": 0.0, "task": SMALL_LISTOPS}
    for changes in ({"dropout": 0.1}, {"train": ["output", "norm"]}, {"task": "bit-xor"}):
        training = train([trial(**plain | changes)])
        member = training._members[0]
        assert FeatureCache(training.model).of(member, training._splits.train) is None


@pytest.mark.parametrize("protocol", ["sound", "paper"])
def test_the_training_set_is_measured_without_dropout(protocol: str, trial: Any) -> None:
    one = trial(
        task=SMALL_LISTOPS, protocol=protocol, dropout=0.5, learning_rate=1e-12,
        evaluation={"every": 10, "training_set": 1000},
    )  # fmt: skip
    training = train([one])
    outcome = finish(training)
    assert outcome.training_set_loss is not None
    examples = one.task.splits(protocol).train
    batch = examples.plain(np.arange(len(examples)))
    with torch.no_grad():
        logits = build_model([one]).eval()(*inputs_of([batch], torch.device("cpu"))).double()
    by_hand = -logits.log_softmax(-1)[np.arange(len(batch)), 0, batch.targets[:, 0]].mean()

    assert outcome.training_set_loss == pytest.approx(by_hand.item(), abs=1e-6)


def test_a_diverged_member_leaves_with_its_last_good_figures_and_the_others_go_on(
    trial: Any,
) -> None:
    good, bad = trial(seed=0), trial(seed=1)

    def poisoned(upto: int) -> Any:
        task = bad.task
        for step in itertools.count():
            batch = task.splits("sound").train.batch(1, random_streams.TRAINING, step, 4)
            yield replace(batch, inputs=batch.inputs * (np.nan if step >= upto else 1))

    def clean() -> Any:
        for step in itertools.count():
            yield good.task.splits("sound").train.batch(0, random_streams.TRAINING, step, 4)

    pack = train([good, bad], batches=[clean(), poisoned(15)])
    list(pack)
    diverged = pack.outcomes[1]

    assert (diverged.outcome, diverged.stopped, diverged.steps) == ("diverged", "diverged", 15)
    assert diverged.best_step == 10
    assert diverged.test_accuracy is not None
    assert all(t.isfinite().all() for t in tensors_of(diverged).values())
    assert_same(finish(train([good])), pack.outcomes[0])


def test_a_huge_learning_rate_is_an_outcome_and_no_exception(trial: Any) -> None:
    outcome = finish(train([trial(learning_rate=1e30, steps=50)]))

    assert outcome.outcome == "diverged"
    assert outcome.steps < 50


def test_the_end_of_a_plateau_is_an_end(trial: Any) -> None:
    config = trial(learning_rate=1e-12, steps=200, stop={"patience": 2, "tolerance": 1e-3})
    outcome = finish(train([config]))

    assert_same(
        finish(train([config], state=[State.from_bytes(outcome.state.to_bytes())])), outcome
    )


def test_a_plateau_stops_a_trial_that_no_longer_improves(trial: Any) -> None:
    outcome = finish(
        train([trial(learning_rate=1e-12, steps=200, stop={"patience": 2, "tolerance": 1e-3})])
    )

    assert (outcome.stopped, outcome.steps) == ("plateau", 30)


def test_sound_tests_once_with_the_checkpoint_that_validation_picked(trial: Any) -> None:
    one = trial(learning_rate=0.3, steps=60)  # jumps about: the last checkpoint is not the best
    training = train([one])
    records = list(training)
    outcome = training.outcomes[0]
    validation = [r for r in records if r.split == "validation"]
    best = max(validation, key=lambda r: (r.accuracy, -r.loss))

    assert [r.split for r in records].count("test") == 1
    assert outcome.best_step == best.step < 60
    assert outcome.validation_accuracy == best.accuracy
    model = build_model([one], weights=outcome.state.checkpoint()).eval()
    examples = one.task.splits("sound").test.examples
    with torch.no_grad():
        right = model(torch.from_numpy(examples.inputs)).argmax(-1).numpy() == examples.targets
    assert outcome.test_accuracy == pytest.approx(right.mean(), abs=1e-12)


def test_paper_reports_the_best_of_its_random_test_batches(trial: Any) -> None:
    one = trial(protocol="paper", evaluation={"every": 5, "batches": 3})
    training = train([one])
    records = [r for r in training if r.split == "test"]
    outcome = training.outcomes[0]

    assert len(records) == 4
    assert outcome.test_accuracy == max(r.accuracy for r in records)
    assert outcome.validation_accuracy is None


def test_records_count_examples_and_steps(trial: Any) -> None:
    records: list[Record] = list(train([trial(steps=7, batch_size=3)], log_every=2))

    assert [r.step for r in records if r.split == "train"] == [2, 4, 6, 7]
    assert all(r.examples == 3 * r.step for r in records)
    seconds = [r.seconds for r in records]
    assert seconds == sorted(seconds)


def test_batches_of_the_caller_are_trained_on(trial: Any) -> None:
    one = trial(steps=5, dropout=0.0)
    drawn = [
        one.task.splits("sound").train.batch(0, random_streams.TRAINING, s, 4) for s in range(5)
    ]

    own = train([one], batches=[[(b.inputs, b.targets) for b in drawn]])

    assert_same(finish(train([one])), finish(own))
    with pytest.raises(ValueError, match="end before step 3 of 5"):
        list(train([one], batches=[drawn[:2]]))


WRONG = [
    ({"targets": np.zeros(4, np.int64)}, r"targets of trial 0 are \(4,\); wanted \(4, 5\)"),
    ({"inputs": np.zeros((4, 9, 1), np.float32)}, r"inputs .* \(4, 9, 1\); wanted \(4, 10, 1\)"),
    ({"targets": np.full((4, 5), 2)}, "targets of trial 0 go from 2 to 2; wanted 0 to 1"),
    ({"lengths": np.zeros(4, np.int64)}, "lengths of trial 0 go from 0 to 0; wanted 1 to 10"),
    ({"hidden": np.zeros((4, 2, 2, 32))}, "hidden .* gpt2 begins with no hidden states"),
]


def test_cpu_time_is_shared_out_and_leaves_out_what_was_waited_for(trial: Any) -> None:
    before = time.process_time()
    training = train([trial(seed=seed, steps=6) for seed in (0, 1)])
    for _ in range(6):
        time.sleep(0.1)
        training.step()
    spent = time.process_time() - before
    first, second = training.outcomes.values()
    longer = finish(train([trial(seed=0, steps=7)], state=[first.state]))

    assert 0 < first.cpu_seconds + second.cpu_seconds <= spent
    assert first.seconds - first.cpu_seconds > 0.15
    assert longer.cpu_seconds > first.cpu_seconds


@pytest.mark.parametrize(("change", "what"), WRONG)
def test_batches_of_the_caller_that_do_not_fit_are_refused(
    change: Any, what: str, trial: Any
) -> None:
    one = trial(steps=1)
    batch = one.task.splits("sound").train.batch(0, random_streams.TRAINING, 0, 4)
    with pytest.raises(ValueError, match=what):
        list(train([one], batches=[[replace(batch, **change)]]))


def test_a_loss_by_hand_equals_the_record(trial: Any) -> None:
    """One step of Adam at a rate that moves nothing: the loss is that of the initial model."""
    one = trial(steps=1, dropout=0.0, learning_rate=1e-30)
    batch = one.task.splits("sound").train.batch(0, random_streams.TRAINING, 0, 4)
    with torch.no_grad():
        logits = build_model([one]).eval()(torch.from_numpy(batch.inputs)).double()
    picked = logits.log_softmax(-1).gather(-1, torch.from_numpy(batch.targets)[..., None])

    record = next(train([one], log_every=1))

    assert record.loss == pytest.approx(-picked.mean().item(), abs=1e-6)


def test_clipping_bounds_the_norm_of_the_whole_gradient(trial: Any) -> None:
    """With clip c and epsilon far above c, Adam's first step is about rate * gradient / epsilon."""
    rule = {"clip": 1e-4, "epsilon": 1e3}
    one = trial(steps=1, dropout=0.0, optimizer=rule, learning_rate=1e6)
    before = {n: p.detach().clone() for n, p in build_model([one]).member(0).items()}
    training = train([one])
    finish(training)
    after = training.model.member(0)

    moved = torch.stack([(after[n] - before[n]).norm() for n in training.model.trained]).norm()
    assert moved.item() == pytest.approx(1e6 / 1e3 * 1e-4, rel=0.01)


def test_cosine_falls_to_a_tenth_after_a_linear_warmup(trial: Any) -> None:
    one = trial(steps=30, optimizer={"schedule": "cosine", "warmup": 10}, learning_rate=1.0)
    member = train([one])._members[0]
    rates = []
    for step in range(30):
        member.figures.step = step
        rates.append(member.rate())

    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[20] == pytest.approx(0.55)
    assert 0.1 < rates[29] < 0.12


def test_state_of_a_gpt2_base_trial_is_below_a_hundredth_of_the_models_bytes(trial: Any) -> None:
    model_bytes = 4 * 124_439_808  # GPT-2 base as published
    for task in ("bit-xor", "bit-memory"):
        one = trial(
            task=task, backbone="gpt2", steps=1, batch_size=1, protocol="paper",
            evaluation={"batches": 1},
        )  # fmt: skip
        data = finish(train([one])).state.to_bytes()
        assert len(data) < 0.01 * model_bytes


def test_a_state_is_refused_where_it_does_not_belong(trial: Any) -> None:
    state = finish(train([trial(steps=1)])).state

    with pytest.raises(ValueError, match="trains other parameters"):
        train([trial(steps=2, train=["output"])], state=[state])
    with pytest.raises(ValueError, match="not the saved state"):
        State.from_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not the saved state"):
        State.from_bytes(state.to_bytes()[:-100])


def test_a_trained_model_comes_back_by_its_id(trial: Any, tmp_path: Path) -> None:
    one = trial()
    training = train([one])
    outcome = finish(training)
    (tmp_path / "states").mkdir()
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "0123456789ab.parquet").touch()
    (tmp_path / "states" / "0123456789ab.safetensors").write_bytes(outcome.state.to_bytes())

    model = load_model("0123456789ab", results=tmp_path)

    x = torch.randn(4, 10, 1)
    model_then = build_model([one], weights=outcome.state.checkpoint()).eval()
    assert torch.equal(model(x), model_then(x))
    with pytest.raises(DataError, match="no finished trial 000000000000"):
        load_model("000000000000", results=tmp_path)


def test_a_backbone_that_a_trial_trained_is_where_another_begins(
    trial: Any, tmp_path: Path
) -> None:
    parent = train([trial(train="all", steps=3)])
    finish(parent)
    file = tmp_path / "parent.safetensors"
    file.write_bytes(parent.backbone(0))
    child = trial(pretraining="trial:0123456789ab", task={"name": "bit-xor", "bits": 7})

    model = build_model([child], backbones={"0123456789ab": file})

    trained = parent.model.member(0)
    for name, parameter in model.member(0).items():
        if name.startswith("backbone.h."):
            assert torch.equal(parameter, trained[name])
    table = model.member(0)["backbone.wpe.weight"]
    assert torch.equal(table[:10], trained["backbone.wpe.weight"])
    with pytest.raises(DataError, match="run the trial that trains it first"):
        train([child])


def test_a_kept_backbone_is_that_of_the_picked_checkpoint(trial: Any) -> None:
    one = trial(train="all", learning_rate=0.1, steps=60)  # jumps about: the last is not the best
    training = train([one])
    outcome = finish(training)
    assert outcome.best_step is not None
    assert outcome.best_step < 60
    kept = load(training.backbone(0))
    picked = outcome.state.part("best")
    assert kept
    assert all(torch.equal(kept[n], picked[f"backbone.{n}"]) for n in kept)


def test_dropout_masks_are_functions_of_seed_step_and_place(trial: Any) -> None:
    model = build_model([trial(dropout=0.25, seed=s) for s in (0, 1)]).train()
    layer, rows = model.input_dropout, {0: 100, 1: 100}

    def mask(k: int, use: int = 0, rows: dict[int, int] = rows, **batch: Any) -> torch.Tensor:
        with model.members.batch(rows, **batch):
            return layer.masks([k], (200,), torch.device("cpu"), use)

    first = mask(0)
    assert torch.equal(first, mask(0))
    assert not torch.equal(first, mask(1))
    assert not torch.equal(first, mask(0, use=1))
    assert first.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert first.count_nonzero().item() / first.numel() == pytest.approx(0.75, abs=0.01)
    part = {"rows": {0: 20, 1: 20}, "part": {0: (40, 100), 1: (0, 100)}}
    assert torch.equal(first[40:60], mask(0, **part))
    assert not torch.equal(first[40:60], mask(0, **part, steps={0: 1}))


def test_a_trainer_in_another_process_gives_the_same_bits(trial: Any) -> None:
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from fpt import TrialConfig, train\n"
        f"one = TrialConfig.model_validate({trial().model_dump(mode='json')!r})\n"
        "print([r.loss.hex() for r in train([one])])"
    )

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert eval(out.stdout) == [r.loss.hex() for r in train([trial()])]


@pytest.mark.parametrize("backbone", ["gpt2", "lstm-paper"])
@pytest.mark.parametrize("parts", [2, 3, 64])
def test_a_batch_in_parts_trains_as_the_whole_batch_does(
    backbone: str, parts: int, trial: Any
) -> None:
    # With the same masks and hidden states, too: else losses would part by far more.
    fields = {"backbone": small(backbone), "dropout": 0.2, "steps": 4, "batch_size": 8}
    config = trial(**fields, evaluation={"every": 2})
    whole = list(train([config]))
    cut = list(train([config], accumulation=parts))
    assert [(r.step, r.split, r.examples) for r in cut] == [
        (r.step, r.split, r.examples) for r in whole
    ]
    for one, other in zip(cut, whole, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=2e-5)
        assert one.accuracy == pytest.approx(other.accuracy, abs=0.02)


def test_a_batch_cannot_come_in_no_parts(trial: Any) -> None:
    with pytest.raises(ValueError, match="accumulation: 0 parts of a batch; at least 1"):
        train([trial()], accumulation=0)
