"""The device path on a CPU: the host's figures and masks, no wait, an update as small for many."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fpt import device_draws, random_streams
from fpt.checkpoints import State
from fpt.model import build_model
from fpt.trainer import Record, Training, train
from tests.support import PACKED, TABLE, small

CPU = torch.device("cpu")

LISTOPS = {
    "name": "listops", "max_length": 12, "min_length": 3, "train": 64, "test": 16,
    "validation": 16, "max_depth": 2,
}  # fmt: skip

WORDS_63 = st.integers(0, 2**63 - 1)


@settings(max_examples=60, deadline=None)
@given(WORDS_63, st.integers(1, 9), WORDS_63, st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_words_on_a_device_are_numpys(
    seed: int, stream: int, step: int, site: int, blocks: int
) -> None:
    theirs = random_streams.philox(seed, stream, step, site).random_raw(4 * blocks)

    ours = device_draws.words(
        torch.tensor([step]),
        torch.tensor([seed]),
        torch.tensor([device_draws.stream_key(stream, site)]),
        torch.arange(blocks),
    )

    assert np.array_equal(ours[0].numpy().view(np.uint64), theirs)


def test_masks_on_a_device_are_the_hosts(trial: Any) -> None:
    draws = np.random.default_rng(0)
    for _ in range(40):
        seeds = draws.integers(0, 2**31, draws.integers(1, 5)).tolist()
        trials = [trial(seed=s, dropout=float(draws.choice([0, 0.1, 0.5, 0.999]))) for s in seeds]
        model = build_model(trials)
        layer: Any = model.input_dropout.train()
        whole = draws.integers(1, 6, len(seeds))
        part = {k: (int(draws.integers(0, n)), int(n)) for k, n in enumerate(whole)}
        rows = {k: int(draws.integers(1, n - first + 1)) for k, (first, n) in part.items()}
        inside = [(1,), (3, 5), (2, 7, 7)][draws.integers(3)]
        steps = {k: int(draws.integers(0, 2**40)) for k in rows}
        for parts in (None, part):
            with model.members.batch(rows, steps=steps, part=parts):
                model.members.device_path = False
                host = layer.masks(list(rows), inside, CPU, use=3)
                model.members.device_path = True
                assert torch.equal(layer.masks(list(rows), inside, CPU, use=3), host)


def curve(training: Training) -> list[Record]:
    return sorted(training, key=lambda record: (record.trial, record.step, record.split))


def assert_close(one: list[Record], other: list[Record]) -> None:
    places = [[(r.trial, r.step, r.split, r.examples) for r in each] for each in (one, other)]
    assert places[0] == places[1]
    for mine, theirs in zip(one, other, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-4, abs=1e-5)
        assert mine.accuracy == pytest.approx(theirs.accuracy, abs=0.02)


@pytest.mark.parametrize("name", TABLE)
def test_the_device_path_gives_the_hosts_figures(name: str, trial: Any) -> None:
    fields = {"backbone": small(name), "dropout": 0.1, "steps": 10}
    seeds = (0, 1, 2) if name in PACKED else (0,)
    trials = [trial(**fields, seed=s, evaluation={"every": 5}) for s in seeds]

    device = train(trials, device_path=True, log_every=1)

    assert_close(curve(device), curve(train(trials, log_every=1)))


def test_members_that_differ_are_each_trained_by_their_own_rule(trial: Any) -> None:
    trials = [
        trial(seed=0, dropout=0.0, batch_size=3, steps=9, evaluation={"every": 4}),
        trial(seed=1, dropout=0.3, learning_rate=1e-2, optimizer={"clip": None, "beta1": 0.5}),
        trial(seed=2, optimizer={"clip": 1e-2, "warmup": 5, "schedule": "cosine"}, steps=13),
        trial(seed=3, evaluation={"every": 20, "training_set": 50}),
    ]
    host, device = train(trials, log_every=3), train(trials, log_every=3, device_path=True)

    assert_close(curve(device), curve(host))
    for k in range(len(trials)):
        mine, theirs = device.outcomes[k], host.outcomes[k]
        assert (mine.steps, mine.stopped, mine.examples) == (
            theirs.steps, theirs.stopped, theirs.examples,
        )  # fmt: skip
        assert mine.test_loss == pytest.approx(theirs.test_loss, rel=1e-4)
        assert (mine.training_set_loss is None) == (theirs.training_set_loss is None)
        for name, tensor in mine.state.part("now").items():
            torch.testing.assert_close(tensor, theirs.state.part("now")[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("protocol", ["sound", "paper"])
def test_evaluation_reads_the_same_examples_in_few_forward_passes(
    protocol: str, trial: Any
) -> None:
    fields = {"task": LISTOPS, "protocol": protocol, "steps": 4, "dropout": 0.0}
    trials = [
        trial(**fields, seed=s, evaluation={"every": 4, "batches": 5}, batch_size=b)
        for s, b in ((0, 3), (1, 4))
    ]
    passes: Counter[bool] = Counter()

    def run(*, device_path: bool) -> list[Record]:
        training = train(trials, device_path=device_path)

        def count(module: torch.nn.Module, _: object) -> None:
            passes[device_path] += not module.training

        training.model.backbone.register_forward_pre_hook(count)
        return curve(training)

    assert_close(run(device_path=True), run(device_path=False))
    assert passes[True] < passes[False]
    assert passes[True] == (1 if protocol == "paper" else 2)


def test_a_state_goes_from_one_path_to_the_other_and_on(trial: Any) -> None:
    one = trial(steps=20, dropout=0.2)
    whole = train([one], device_path=True)
    list(whole)
    first = train([one], device_path=True)
    for _ in range(7):
        first.step()
    data = first.states()[0].to_bytes()

    resumed = train([one], state=[State.from_bytes(data)], device_path=True)
    on_host = train([one], state=[State.from_bytes(data)])

    list(resumed)
    list(on_host)
    ends = [t.outcomes[0].state.tensors for t in (whole, resumed, on_host)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    for name, tensor in ends[2].items():
        torch.testing.assert_close(tensor, ends[0][name], atol=1e-4, rtol=1e-3)


def test_a_member_that_diverges_or_leaves_moves_no_more(trial: Any) -> None:
    trials = [trial(seed=0), trial(seed=1, learning_rate=1e30), trial(seed=2)]
    pack = train(trials, device_path=True, log_every=1)
    for _ in range(10):
        pack.step()
    pack.stop(2)
    left = {name: p.detach().clone() for name, p in pack.model.member(2).items()}
    list(pack)

    assert pack.outcomes[1].outcome == "diverged"
    assert all(t.isfinite().all() for t in pack.outcomes[1].state.tensors.values())
    assert 2 not in pack.outcomes
    assert all(torch.equal(p, left[name]) for name, p in pack.model.member(2).items())
    alone = train([trials[0]], device_path=True)
    list(alone)
    assert pack.outcomes[0].test_loss == pytest.approx(alone.outcomes[0].test_loss, rel=1e-4)


class Watch(TorchDispatchMode):
    """Counts operations, and notes those that would make the host wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
    """Operations whose result, or its size, the host has to read."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.sizes: list[torch.Tensor] = []
        """Quotients of whole numbers, and what is made of them: shapes, which the host has."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, out = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        tensors = [one for one in args if isinstance(one, torch.Tensor)]
        made_of_sizes = tensors and all(any(one is s for s in self.sizes) for one in tensors)
        whole = name == "div" and all(one.dtype == torch.int64 for one in tensors)
        if whole or made_of_sizes:
            self.sizes.append(out)
        else:
            self.operations[name] += 1
        return out

    @property
    def waits(self) -> dict[str, int]:
        return {n: c for n, c in self.operations.items() if n.startswith(self.WAITS)}


def watched(trials: list[Any], steps: int = 1, **options: Any) -> Watch:
    """What a training step does, after one that has made all that is made once."""
    training = train(trials, device_path=True, **options)
    training.step()
    with Watch() as watch:
        for _ in range(steps):
            training.step()
    return watch


@pytest.mark.parametrize("name", TABLE)
def test_no_step_of_a_backbone_waits(name: str, trial: Any) -> None:
    seeds = (0, 1) if name in PACKED else (0,)
    assert watched([trial(backbone=small(name), dropout=0.1, seed=s) for s in seeds]).waits == {}


SMALL_TASKS: dict[str, Any] = {
    "bit-memory": {"name": "bit-memory", "strings": 2, "bits": 8, "patch": 4},
    "listops": LISTOPS,
}


@pytest.mark.parametrize("task", ["bit-xor", "bit-memory", "listops", "digits"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_step_of_a_task_waits(task: str, accumulation: int, trial: Any) -> None:
    own = trial(task=SMALL_TASKS.get(task, task), dropout=0.1)
    assert watched([own], accumulation=accumulation).waits == {}


def test_the_watch_sees_a_wait() -> None:
    with Watch() as watch:
        bool(torch.ones(()) > 0)
        torch.ones(3).nonzero()
    assert watch.waits == {"_local_scalar_dense": 1, "nonzero": 1}


def test_the_update_of_many_members_is_as_few_operations_as_that_of_two(trial: Any) -> None:
    def updates(count: int) -> int:
        update = train([trial(seed=s) for s in range(count)], device_path=True)
        for member in update._members:
            for parameter in member.trained.values():
                parameter.grad = torch.ones_like(parameter)
        with Watch() as watch:
            update._stepper._grouped.step(update._live, torch.ones(count))  # type: ignore[union-attr]
        views = ("view", "_unsafe_view", "alias", "unsqueeze", "expand", "detach")
        return sum(n for name, n in watch.operations.items() if name not in views)

    assert updates(2) == updates(5) <= 60
