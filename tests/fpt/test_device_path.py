"""The device path on a CPU: the host's figures and masks, no wait, a step as small for many."""

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
from fpt.model import Model, build_model
from fpt.pack_layers import MemberProduct
from fpt.trainer import Outcome, Record, Training, train
from tests.support import DRAWN, PACKED, TABLE, end, small

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


@pytest.mark.parametrize("name", DRAWN)
def test_members_that_draw_a_backbone_each_have_the_hosts_figures(name: str, trial: Any) -> None:
    # The first and the third draw the same one.
    fields = {"backbone": small(name), "backbone_seed": None, "steps": 8, "dropout": 0.1}
    trials = [
        trial(**fields, seed=s, learning_rate=rate, evaluation={"every": 4})
        for s, rate in ((0, 1e-3), (1, 1e-3), (0, 1e-2))
    ]
    host, device = train(trials, log_every=1), train(trials, log_every=1, device_path=True)
    assert_close(curve(device), curve(host))
    for k, outcome in device.outcomes.items():
        assert outcome.backbone_digest == host.outcomes[k].backbone_digest


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


@pytest.mark.parametrize(
    ("backbone_seed", "numerics"), [(0, "fp32"), (None, "fp32"), (None, "bf16")]
)
def test_members_that_leave_join_or_diverge_change_no_other(
    backbone_seed: int | None, numerics: str, trial: Any
) -> None:
    fields = {"backbone_seed": backbone_seed, "numerics": numerics, "dropout": 0.1, "steps": 12}
    trials = [
        trial(seed=s, **fields, learning_rate=1e30 if s == 3 else 1e-3, evaluation={"every": 4})
        for s in range(5)
    ]
    near: Any = {"rtol": 1e-3, "atol": 1e-4} if numerics == "fp32" else {"rtol": 0.1, "atol": 0.01}

    def check(mine: Outcome, k: int) -> None:
        theirs = end(train([trials[k]]))[0]
        assert (mine.outcome, mine.steps) == (theirs.outcome, theirs.steps)
        if mine.outcome != "diverged":
            assert mine.test_loss == pytest.approx(theirs.test_loss, rel=near["rtol"])
            for name, tensor in mine.state.part("now").items():
                torch.testing.assert_close(tensor, theirs.state.part("now")[name], **near)

    pack = train(trials, device_path=True)
    for record in pack:
        if record.step == 4 and pack.settled:
            left = pack.states()[1]
            pack.stop(1)
            break
    outcomes = end(pack)

    assert set(outcomes) == {0, 2, 3, 4}
    assert outcomes[3].outcome == "diverged"
    for k, outcome in outcomes.items():
        check(outcome, k)
    joined = end(train([trials[4], trials[1]], state=[None, left], device_path=True))
    check(joined[1], 1)


def test_weights_that_members_draw_are_there_once_whoever_leaves(trial: Any) -> None:
    trials = [
        trial(seed=s, backbone_seed=None, steps=12, learning_rate=rate)
        for s, rate in ((0, 1e-3), (1, 1e-3), (2, 1e-3), (1, 1e-2))
    ]
    pack = train(trials, device_path=True)
    first = pack.model.member(0)
    before = {name: [pack.model.member(k)[name].clone() for k in range(4)] for name in first}
    pack.step()
    products = [module for module in pack.model.modules() if isinstance(module, MemberProduct)]
    assert products

    def storages() -> list[tuple[int, int]]:
        for one in products:
            assert len({w.untyped_storage().data_ptr() for w in one.weight}) == 1
        kept = [one.weight[0].untyped_storage() for one in products]
        return [(storage.data_ptr(), storage.nbytes()) for storage in kept]

    there = storages()
    assert [n for _, n in there] == [3 * one.weight[0].nbytes for one in products]
    for gone in (1, 0):
        pack.stop(gone)
        pack.step()
        assert storages() == there
    for name, values in before.items():
        for k, value in enumerate(values):
            kept = pack.model.member(k)[name]
            assert kept.requires_grad or torch.equal(kept, value)


def test_a_pack_that_draws_goes_from_one_path_to_the_other(trial: Any) -> None:
    trials = [trial(seed=s, backbone_seed=None, steps=12, dropout=0.2) for s in range(3)]
    wholes = [end(train(trials, device_path=path)) for path in (True, False)]
    for path in (True, False):
        first = train(trials, device_path=path)
        for _ in range(5):
            first.step()
        state = [State.from_bytes(first.states()[k].to_bytes()) for k in range(3)]
        for k, outcome in end(train(trials, state=state, device_path=not path)).items():
            for whole in wholes:
                assert outcome.test_loss == pytest.approx(whole[k].test_loss, rel=1e-4)
                for name, tensor in whole[k].state.part("now").items():
                    torch.testing.assert_close(
                        outcome.state.part("now")[name], tensor, atol=1e-4, rtol=1e-3
                    )


def values_and_gradients(
    model: Model, x: torch.Tensor, lengths: torch.Tensor | None, *, device_path: bool
) -> dict[str, torch.Tensor]:
    model.members.device_path = device_path
    model.zero_grad(set_to_none=True)
    logits = model.train()(x, lengths)
    torch.autograd.backward(logits, logits.detach())
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | gradients


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("name", "draws"), [(name, False) for name in PACKED] + [(name, True) for name in DRAWN]
)
def test_stacked_layers_give_the_hosts_logits_and_gradients(
    name: str, draws: bool, padded: bool, trial: Any
) -> None:
    """With other values in every parameter of a member's own, for whoever is present."""
    trials = [
        trial(seed=s, backbone=small(name), backbone_seed=None if draws else 0, dropout=p)
        for s, p in enumerate((0.1, 0.0, 0.3))
    ]
    model = build_model(trials)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad or draws:
            parameter.data = parameter.detach() + 0.02 * torch.randn_like(parameter)
    for rows in ([2, 2, 2], [2, 0, 2], [0, 3, 0], [1, 3, 2]):
        x = torch.randn(sum(rows), 10, 1)
        lengths = torch.randint(5, 11, (sum(rows),)) if padded else None
        with model.members.batch(dict(enumerate(rows)), steps={0: 4, 1: 9, 2: 4}):
            host = values_and_gradients(model, x, lengths, device_path=False)
            device = values_and_gradients(model, x, lengths, device_path=True)
            assert model.members.stacked == (0 if rows == [1, 3, 2] else len(model.members.present))
        assert device.keys() == host.keys()
        for part, tensor in host.items():
            torch.testing.assert_close(device[part], tensor, rtol=1e-3, atol=1e-4, msg=part)


@pytest.mark.parametrize("numerics", ["fp32", "bf16"])
def test_products_of_members_are_each_ones_own(numerics: Any, trial: Any) -> None:
    """Against the definition, in double precision."""
    model = build_model([trial(seed=s, backbone_seed=None) for s in (0, 1, 0, 2, 3)])
    model.members.device_path = True
    product = next(one for one in model.modules() if isinstance(one, MemberProduct))
    product.numerics = numerics
    near: Any = {"rtol": 1e-5, "atol": 1e-5} if numerics == "fp32" else {"rtol": 0.02, "atol": 0.02}
    torch.manual_seed(0)
    for rows in (
        [2, 2, 2, 2, 2],
        [2, 0, 2, 2, 0],
        [0, 1, 0, 0, 1],
        [0, 0, 2, 0, 0],
        [1, 2, 0, 3, 2],
    ):
        # Values that come later count too.
        product.weight[3].data = 0.1 * torch.randn_like(product.weight[3])
        product.bias[1].data = torch.randn_like(product.bias[1])
        model.members.rows = rows
        x = torch.randn(sum(rows), 4, 32, requires_grad=True)
        upstream = torch.randn(sum(rows), 4, 96)
        out = product(x)
        (gradient,) = torch.autograd.grad(out, x, upstream)
        for (k, own), back, mine, up in zip(
            model.members.pieces(x.detach()),
            *(torch.split(t, [n for n in rows if n]) for t in (gradient, out, upstream)),
            strict=True,
        ):
            weight = product.weight[k].double()
            expected = own.double() @ weight + product.bias[k].double()
            torch.testing.assert_close(mine.double(), expected, **near)
            torch.testing.assert_close(back.double(), up.double() @ weight.T, **near)


VIEWS = {
    "view", "_unsafe_view", "alias", "unsqueeze", "squeeze", "expand", "detach", "t", "transpose",
    "permute", "split", "split_with_sizes", "slice", "select", "unbind", "as_strided",
    "lift_fresh",
    "empty", "empty_like", "new_empty",
}  # fmt: skip
"""Operations that compute nothing."""


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
    def computed(self) -> int:
        """Operations other than another look at the same numbers."""
        return sum(n for name, n in self.operations.items() if name not in VIEWS)

    @property
    def waits(self) -> dict[str, int]:
        return {n: c for n, c in self.operations.items() if n.startswith(self.WAITS)}


def watched(trials: list[Any], steps: int = 1, **options: Any) -> Watch:
    """What a training step does, after one that has made all that is made once; between what is
    copied in and its end, it is sent nothing that a graph would miss.
    """
    training = train(trials, device_path=True, **options)
    training.step()
    with Watch() as watch:
        for _ in range(steps):
            training.step()
    with Watch() as inside:
        training._stepper.static.compute()  # type: ignore[union-attr]
    assert inside.operations["lift_fresh"] == 0
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
        training = train([trial(seed=s) for s in range(count)], device_path=True)
        for member in training._members:
            for parameter in member.trained.values():
                parameter.grad = torch.ones_like(parameter)
        update = training._stepper._update  # type: ignore[union-attr]
        rates = torch.from_numpy(update.rates(training._live))
        with Watch() as watch:
            update.step(training._live, torch.ones(count), rates)
        return watch.computed

    assert updates(2) == updates(5) <= 60


@pytest.mark.parametrize(("backbone_seed", "most"), [(0, 500), (None, 550)])
def test_a_step_of_sixteen_members_is_as_few_operations_as_that_of_two(
    backbone_seed: int | None, most: int, trial: Any
) -> None:
    backbone = {"name": "gpt2", "layers": 12, "width": 24, "heads": 12}
    fields = {"backbone": backbone, "backbone_seed": backbone_seed, "dropout": 0.0}
    two, sixteen = (watched([trial(**fields, seed=s) for s in range(n)]).computed for n in (2, 16))
    assert two == sixteen <= most


@pytest.mark.parametrize(
    ("name", "draws"), [(name, False) for name in PACKED] + [(name, True) for name in DRAWN]
)
def test_the_operations_of_a_step_do_not_grow_with_the_pack(
    name: str, draws: bool, trial: Any
) -> None:
    fields = {"backbone": small(name), "backbone_seed": None if draws else 0, "dropout": 0.1}
    few, more = (watched([trial(**fields, seed=s) for s in range(n)]).computed for n in (2, 5))
    assert few == more
