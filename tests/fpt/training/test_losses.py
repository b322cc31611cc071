"""Regression and a class a token: trained and measured as they say, against sums by hand."""

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import fpt
from fpt import metrics, random_streams
from fpt.checkpoints import State
from fpt.tasks.base import Batch, Shape
from fpt.training.losses import counted, mean_loss, of_each, per_token, right

RNG = np.random.default_rng(0)
X = RNG.standard_normal((60, 5, 2)).astype(np.float32)
LENGTHS = RNG.integers(1, 6, 60)


class Series(fpt.Task):
    """Two numbers of each sequence."""

    def shape(self, protocol: str) -> Any:
        return fpt.Shape(tokens=5, inputs=2, embedded=False, outputs=2, loss="mse")

    def targets(self) -> np.ndarray:
        return X.sum(1)

    def splits(self, protocol: str) -> Any:
        y = self.targets()
        parts = (
            fpt.Stored(fpt.Batch(X[rows], y[rows]))
            for rows in (slice(0, 30), slice(30, 45), slice(45, 60))
        )
        train, validation, test = parts
        return fpt.Splits(train=train, validation=validation, test=test)

    def metrics(self, protocol: str) -> Any:
        return (metrics.R2, metrics.MAE)

    def baseline(self, protocol: str) -> Any:
        return fpt.Baseline(None, "the mean", {"r2": 0.0})


class Tags(Series):
    """A class a token; what stands in padding is `filling`."""

    filling: int = 0

    def shape(self, protocol: str) -> Any:
        return fpt.Shape(tokens=5, inputs=2, embedded=False, classes=3, readout=5)

    def splits(self, protocol: str) -> Any:
        y = (X[..., 0] > 0).astype(np.int64) + (X[..., 1] > 0)
        y[np.arange(5) >= LENGTHS[:, None]] = self.filling
        parts = (
            fpt.Stored(fpt.Batch(X[rows], y[rows], LENGTHS[rows]))
            for rows in (slice(0, 30), slice(30, 45), slice(45, 60))
        )
        train, validation, test = parts
        return fpt.Splits(train=train, validation=validation, test=test)

    def metrics(self, protocol: str) -> Any:
        return (metrics.TOKEN_ACCURACY,)

    def baseline(self, protocol: str) -> Any:
        return fpt.Baseline(0.4, "guess")


class Unsure(Series):
    """Whose metric is sometimes none."""

    own: ClassVar[Any] = fpt.Metric("unsure", lambda outputs, targets: math.nan)

    def metrics(self, protocol: str) -> Any:
        return (self.own,)


def trial(name: str, seed: int = 0, **fields: Any) -> fpt.TrialConfig:
    backbone = {"name": "gpt2", "layers": 1, "width": 16, "heads": 2}
    return fpt.TrialConfig.model_validate(
        {
            "task": {"name": f"{__name__}:{name}"},
            "backbone": backbone,
            "pretraining": "random",
            "steps": 6,
            "batch_size": 8,
            "evaluation": {"every": 2, "training_set": 10},
            "seed": seed,
        }
        | fields
    )


def trained(*trials: fpt.TrialConfig, **how: Any) -> Any:
    training = fpt.train(trials, **how)
    records = list(training)
    return records, [training.outcomes[k] for k in range(len(trials))]


def predictions(config: fpt.TrialConfig, state: State) -> np.ndarray:
    model = fpt.build_model([config], weights=state.checkpoint()).eval()
    test = config.task.splits("sound").test.plain(np.arange(15))
    lengths = None if test.lengths is None else torch.from_numpy(test.lengths)
    with torch.no_grad():
        return model(torch.from_numpy(test.inputs), lengths).numpy()


def test_regression_ends_with_the_mean_squared_error_of_its_test_set() -> None:
    config = trial("Series")

    records, (outcome,) = trained(config, log_every=2)

    outputs, targets = predictions(config, outcome.state), X[45:].sum(1)
    assert outputs.shape == (15, 2, 1)
    errors = (outputs[..., 0].astype(float) - targets) ** 2
    spread = ((targets - targets.mean(0)) ** 2).sum(0)
    assert outcome.test_loss == pytest.approx(errors.mean(), rel=1e-5)
    assert outcome.metrics["test_r2"] == pytest.approx((1 - errors.sum(0) / spread).mean(), 1e-4)
    assert outcome.metrics["test_mae"] == pytest.approx(np.sqrt(errors).mean(), rel=1e-5)
    assert {one.accuracy for one in records} == {None}
    assert (outcome.train_accuracy, outcome.test_accuracy, outcome.validation_accuracy) == (
        None,
        None,
        None,
    )
    validation = [one for one in records if one.split == "validation"]
    best = min(validation, key=lambda one: one.loss)
    assert (outcome.best_step, outcome.validation_loss) == (best.step, best.loss)
    assert outcome.metrics["validation_r2"] == best.metrics["r2"]
    assert {name.rpartition("_")[0] for name in outcome.metrics} == set(metrics.SPLITS)


def test_the_gradient_of_a_regression_is_that_of_the_mean_squared_error() -> None:
    config = trial("Series", steps=1, dropout=0.0, optimizer={"clip": None})

    _, (outcome,) = trained(config)

    model = fpt.build_model([config]).train()
    batch = config.task.splits("sound").train.batch(0, random_streams.TRAINING, 0, 8)
    outputs = model(torch.from_numpy(batch.inputs))[..., 0]
    loss = ((outputs - torch.from_numpy(batch.targets)) ** 2).mean()
    loss.backward()
    moments = outcome.state.part("first")
    # Adam's first moment after a step is a tenth of the gradient.
    for name, parameter in model.member(0).items():
        if parameter.requires_grad:
            assert torch.allclose(moments[name] * 10, parameter.grad, rtol=1e-4, atol=1e-6), name
    assert outcome.train_loss == pytest.approx(loss.item(), rel=1e-6)


def test_of_a_class_a_token_padding_counts_for_nothing() -> None:
    config = trial("Tags")

    records, (outcome,) = trained(config, log_every=2)
    _, (other,) = trained(trial("Tags", task={"name": f"{__name__}:Tags", "filling": 2}))

    logits = predictions(config, outcome.state).astype(float)
    test = config.task.splits("sound").test.examples
    losses, hits = [], []
    for row, (length, targets) in enumerate(zip(test.lengths, test.targets, strict=True)):
        for token in range(length):
            own = logits[row, token]
            losses.append(math.log(sum(map(math.exp, own))) - own[targets[token]])
            hits.append(own.argmax() == targets[token])
    assert outcome.test_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert outcome.test_accuracy == pytest.approx(sum(hits) / len(hits))
    assert outcome.metrics["test_token_accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert records
    for name, tensor in outcome.state.tensors.items():
        assert torch.equal(tensor, other.state.tensors[name]), name


@pytest.mark.parametrize("task", ["Series", "Tags"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(task: str) -> None:
    config = trial(task, steps=1, evaluation={"every": 1}, dropout=0.0)

    _, (whole,) = trained(config)
    _, (parts,) = trained(config, accumulation=3)

    assert parts.train_loss == pytest.approx(whole.train_loss, rel=1e-5)
    for name, tensor in whole.state.part("first").items():
        assert torch.allclose(tensor, parts.state.part("first")[name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("task", ["Series", "Tags"])
def test_packs_and_resumes_change_no_bit(task: str) -> None:
    configs = [trial(task, seed, backbone_seed=0) for seed in (0, 1)]

    _, alone = trained(configs[0])
    _, pack = trained(*configs)
    training = fpt.train([configs[0]], log_every=1)
    for record in training:
        if record.step == 3 and training.settled:
            break
    state = State.from_bytes(training.states()[0].to_bytes())
    _, resumed = trained(configs[0], state=[state])

    for other in (pack[0], resumed[0]):
        assert other.metrics == alone[0].metrics
        assert other.test_loss == alone[0].test_loss
        for name, tensor in alone[0].state.tensors.items():
            assert torch.equal(tensor, other.state.tensors[name])


def test_a_metric_that_is_not_finite_is_none() -> None:
    _, (outcome,) = trained(trial("Unsure"))

    assert outcome.metrics["test_unsure"] is None


def test_the_parts_of_a_loss_agree() -> None:
    shape = Shape(tokens=4, inputs=1, embedded=False, classes=3, readout=4, outputs=2)
    outputs = torch.randn(5, 8, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(40).reshape(5, 8) % 3
    lengths = torch.tensor([1, 4, 2, 3, 4])

    counts = counted(shape, lengths)

    assert counts is not None
    assert counts.sum(1).tolist() == [2, 8, 4, 6, 8]
    each = of_each(shape, outputs, targets, counts)
    assert len(each) == len(right(shape, outputs, targets, counts)) == 28
    assert torch.equal(each.mean(), mean_loss(shape, outputs, targets, counts))
    kept = per_token(shape, outputs, targets, counts)
    assert (kept[0].shape, kept[1].shape) == ((14, 2, 3), (14, 2))
    assert torch.equal(kept[0][1:5].flatten(0, 1), outputs[1])
    assert counted(shape, None) is None


def test_a_callers_own_numbers_are_taken() -> None:
    config = trial("Series", steps=2)
    batches = [[Batch(X[:8], X[:8].sum(1))] * 2]

    _, (outcome,) = trained(config, batches=batches)

    assert outcome.train_loss > 0


@pytest.mark.parametrize("task", ["Series", "Tags"])
def test_the_device_path_computes_the_same(task: str) -> None:
    configs = [trial(task, seed, backbone_seed=0, dropout=0.0) for seed in (0, 1)]

    _, usual = trained(*configs)
    _, together = trained(*configs, device_path=True)

    for one, other in zip(usual, together, strict=True):
        assert other.test_loss == pytest.approx(one.test_loss, rel=1e-3)
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-3)
        assert other.metrics == pytest.approx(one.metrics, rel=1e-2)
