"""What lets a GPU replay a step as one graph, tried on a CPU: the same operations on the same
tensors, of which nothing moves, and to which nothing comes but what is copied in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fpt.tasks.base import Batch
from fpt.trainer import Training, train
from fpt.training.replay import DeviceStepper, StaticStep

LISTOPS = {
    "name": "listops", "max_length": 12, "min_length": 3, "train": 64, "test": 16,
    "validation": 16, "max_depth": 2,
}  # fmt: skip


def stepper(training: Training) -> DeviceStepper:
    assert isinstance(training._stepper, DeviceStepper)
    return training._stepper


def static(training: Training) -> StaticStep:
    found = stepper(training).static
    assert found is not None
    return found


class Sent(TorchDispatchMode):
    """Counts tensors made of what the host has: a graph would read them where they lay when it was
    captured."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ == "lift_fresh"
        return func(*args, **(kwargs or {}))


def test_what_is_sent_within_a_step_is_seen() -> None:
    there = torch.ones(3)
    with Sent() as sent:
        there + there.exp()
    assert sent.count == 0
    with Sent() as sent:
        there + torch.from_numpy(np.ones(3, np.float32))
        torch.tensor([1.0, 2.0]).to("cpu") + 1
    assert sent.count == 2


OWN_TASKS: dict[str, Any] = {
    "bit-memory": {"name": "bit-memory", "strings": 2, "bits": 8, "patch": 4},
    "listops": LISTOPS,
}


def assert_replays(trials: list[Any], **options: Any) -> None:
    """A step of these, after two that warm up, is a function of what it holds."""
    training = train(trials, device_path=True, **options)
    for _ in range(2):
        training.step()
    with Sent() as sent:
        static(training).compute()
    assert sent.count == 0


@pytest.mark.parametrize("task", ["bit-memory", "listops", "digits"])
def test_a_step_of_a_task_is_sent_nothing(task: str, trial: Any) -> None:
    own = OWN_TASKS.get(task, task)
    assert_replays([trial(task=own, seed=s, dropout=p) for s, p in ((0, 0.1), (1, 0.0))])


def test_a_step_whose_every_token_is_read_out_is_sent_nothing(trial: Any, tmp_path: Any) -> None:
    (tmp_path / "a.txt").write_text("a text of its own, " * 200)
    task = {"name": "text", "path": str(tmp_path), "tokens": 6}
    assert_replays([trial(task=task, seed=s, batch_size=3) for s in (0, 1)])


def test_a_step_of_members_that_left_or_differ_in_size_is_sent_nothing(trial: Any) -> None:
    trials = [trial(seed=s, dropout=0.1, batch_size=2 + s) for s in range(3)]
    training = train(trials, device_path=True)
    training.step()
    training.stop(1)
    for _ in range(2):
        training.step()
    with Sent() as sent:
        static(training).compute()
    assert sent.count == 0


def addresses(training: Training) -> dict[str, int]:
    """Where everything lies that a step reads or writes."""
    tensors: dict[str, torch.Tensor] = dict(training.model.named_parameters())
    tensors |= dict(training.model.named_buffers())
    for member in training._members:
        for name, (first, second) in member.optimizer.moments.items():
            tensors |= {
                f"{member.index} first {name}": first,
                f"{member.index} second {name}": second,
            }
        for name in ("window", "recent", "non_finite"):
            tensors[f"{member.index} {name}"] = getattr(member, name)
        tensors[f"{member.index} steps"] = member.optimizer.steps
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


@pytest.mark.parametrize("backbone_seed", [0, None])
def test_no_tensor_moves_from_step_to_step(backbone_seed: int | None, trial: Any) -> None:
    fields = {"backbone_seed": backbone_seed, "dropout": 0.1, "evaluation": {"every": 4}}
    steps = (8, 20, 20)
    trials = [trial(seed=s, steps=n, **fields) for s, n in enumerate(steps)]
    training = train(trials, device_path=True, log_every=3)
    training.step()
    there = addresses(training)
    held: list[StaticStep] = []
    for record in training:
        assert addresses(training) == there, record
        own = static(training)
        if own not in held:
            held.append(own)
            first = {name: tensor.data_ptr() for name, tensor in own.held.items()}
        assert {name: tensor.data_ptr() for name, tensor in own.held.items()} == first
    assert len(held) == 2  # of three members, and of two
    assert training.outcomes[0].best_step is not None


@pytest.mark.parametrize("numerics", ["fp32", "bf16"])
def test_a_step_run_again_on_the_same_tensors_is_as_one_on_new_ones(
    numerics: str, trial: Any
) -> None:
    fields = {"numerics": numerics, "steps": 10, "evaluation": {"every": 5}}
    trials = [
        trial(seed=0, dropout=0.1, **fields),
        trial(seed=1, optimizer={"warmup": 4, "schedule": "cosine"}, **fields),
        trial(seed=2, dropout=0.3, **{**fields, "steps": 5}),
    ]
    same, anew = train(trials, device_path=True, graphs=True), train(trials, device_path=True)
    list(same)
    while True:
        stepper(anew).static = None
        try:
            anew.step()
        except StopIteration:
            break
    for k in range(3):
        ours, theirs = same.outcomes[k].state.tensors, anew.outcomes[k].state.tensors
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert same.outcomes[k].test_loss == anew.outcomes[k].test_loss


def test_the_caller_s_batches_are_copied_in(trial: Any) -> None:
    draws = np.random.default_rng(0)

    def batches(count: int) -> list[Batch]:
        return [
            Batch(draws.random((4, 10, 1)), draws.integers(0, 2, (4, 5)).astype(np.int16))
            for _ in range(count)
        ]

    one = trial(steps=6, evaluation={"every": 6})
    given = batches(6)
    device = train([one], batches=[given], device_path=True)
    host = train([one], batches=[given])
    list(device)
    list(host)
    for name, tensor in device.outcomes[0].state.part("now").items():
        torch.testing.assert_close(tensor, host.outcomes[0].state.part("now")[name])


def test_own_batches_with_lengths_of_some_members_alone_are_refused(trial: Any) -> None:
    inputs, targets = np.ones((4, 10, 1), np.float32), np.zeros((4, 5), np.int64)
    own = [[(inputs, targets, np.full(4, 9))], [(inputs, targets)]]
    training = train([trial(seed=0), trial(seed=1)], batches=own, device_path=True)
    with pytest.raises(ValueError, match="lengths or hidden states, and others do not"):
        training.step()
