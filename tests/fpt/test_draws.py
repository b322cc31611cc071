"""Packs whose members have a backbone each, drawn by their seeds: the same bits as alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fpt.config import TrialConfig
from fpt.model import build_model
from fpt.pack_layers import MemberProduct, Product, SharedLinear
from fpt.packing import pack_key
from fpt.trainer import train
from tests.support import DRAWN, TABLE, assert_same, end, small


@pytest.fixture
def drawn(trial: Any) -> Any:
    """Make trials of seeds that draw a backbone each, of batches of 1, 2, 4, 2, ... examples."""

    def make(count: int, **fields: Any) -> list[TrialConfig]:
        each = [
            {"batch_size": (1, 2, 4, 2)[seed % 4], "dropout": (0.1, 0.0, 0.3)[seed % 3]}
            for seed in range(count)
        ]
        task = {"name": "bit-xor", "examples": 8}
        common = {"task": task, "backbone_seed": None, "steps": 8, "evaluation": {"every": 4}}
        return [trial(seed=seed, **common | own | fields) for seed, own in enumerate(each)]

    return make


@pytest.mark.parametrize("name", DRAWN)
def test_members_end_as_they_do_alone(name: str, drawn: Any) -> None:
    trials = drawn(4, backbone=small(name))
    pack = train(trials)
    assert pack.row_padding == 16
    assert any(isinstance(one, MemberProduct) for one in pack.model.modules())
    ends = end(pack)
    for k, one in enumerate(trials):
        assert_same(end(train([one]))[0], ends[k])
    assert len({outcome.backbone_digest for outcome in ends.values()}) == 4


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", DRAWN)
def test_values_that_differ_in_every_parameter_are_members_own(
    name: str, padded: bool, drawn: Any
) -> None:
    """As `statistics` draws them: norms, biases, token types and relative biases too."""
    trials = drawn(3, backbone=small(name), train=["input", "output"])
    torch.manual_seed(0)
    plain = build_model(trials[:1]).member(0)
    values = [{n: p.detach() + 0.02 * torch.randn_like(p) for n, p in plain.items()} for _ in "abc"]
    pack = build_model(trials, weights=values)
    x = torch.randn(12, 10, 1)
    lengths = torch.tensor([5, 9, 7, 10] * 3) if padded else None
    pack.members.rows = [4, 4, 4]
    together = pack.train()(x, lengths)
    together.square().sum().backward()
    for k, one in enumerate(trials):
        alone = build_model([one], weights=values[k]).train()
        own = slice(4 * k, 4 * k + 4)
        logits = alone(x[own], None if lengths is None else lengths[own])
        logits.square().sum().backward()
        assert torch.equal(logits, together[own])
        for parameter, value in alone.member(0).items():
            if value.requires_grad:
                assert torch.equal(pack.member(k)[parameter].grad, value.grad), parameter


@pytest.mark.parametrize("pretraining", ["statistics", "layer-statistics"])
def test_backbones_redrawn_from_a_pretrained_ones_statistics_pack(
    pretraining: str, drawn: Any
) -> None:
    trials = drawn(
        3, backbone={"name": "gpt2", "size": "tiny", "layers": 2}, pretraining=pretraining,
        train=["input", "output", "position"], steps=2,
    )  # fmt: skip
    ends = end(train(trials))
    for k, one in enumerate(trials):
        assert_same(end(train([one]))[0], ends[k])


def test_a_member_that_leaves_or_diverges_moves_no_other(drawn: Any) -> None:
    trials = drawn(4)
    trials[1] = trials[1].model_copy(update={"learning_rate": 1e30})
    training = train(trials)
    for record in training:
        if record.step == 4 and training.settled and 2 not in training.outcomes:
            left = training.states()[2]
            training.stop(2)
            break
    ends = end(training)
    assert set(ends) == {0, 1, 3}
    assert ends[1].outcome == "diverged"
    for k in (0, 1, 3):
        assert_same(end(train([trials[k]]))[0], ends[k])
    joined = end(train([trials[0], trials[2]], state=[None, left]))
    assert_same(end(train([trials[2]]))[0], joined[1])


def test_a_state_saved_in_a_pack_goes_on_alone_and_loads(drawn: Any) -> None:
    trials = drawn(2)
    training = train(trials)
    while not (next(training).step == 4 and training.settled):
        pass
    state = training.states()[1]
    assert not any("mlp" in name or "attn" in name for name in state.tensors)
    alone = end(train([trials[1]], state=[state]))[0]
    assert_same(alone, end(training)[1])
    # The frozen weights are the seed's own draw, read back by nobody's file.
    model = build_model([trials[1]], weights=alone.state.checkpoint())
    pack = build_model(trials)
    for name, parameter in model.member(0).items():
        if name not in alone.state.checkpoint():
            assert torch.equal(parameter, pack.member(1)[name]), name


def test_a_pack_of_one_draw_shares_it_and_a_fixed_one_is_another_kind(
    drawn: Any, trial: Any
) -> None:
    one, other = drawn(2)
    again = one.model_copy(update={"learning_rate": 0.01})
    assert pack_key(one) == pack_key(other) != pack_key(trial(seed=0))
    shared = build_model([one, again])
    own = build_model([one, other, again])
    assert {type(m) for m in shared.modules() if isinstance(m, Product)} == {SharedLinear}
    assert {type(m) for m in own.modules() if isinstance(m, Product)} == {MemberProduct}
    name = "backbone.h.0.mlp.c_fc.weight"
    assert own.member(0)[name].data_ptr() == own.member(2)[name].data_ptr()
    assert own.counts() == build_model([one]).counts()


@pytest.mark.parametrize("name", [n for n in TABLE if n not in DRAWN])
def test_backbones_with_parts_that_no_member_can_own_keep_seeds_apart(
    name: str, drawn: Any
) -> None:
    one, other = drawn(2, backbone=small(name))
    assert pack_key(one) != pack_key(other)


@pytest.mark.parametrize("numerics", ["fp32", "bf16"])
def test_a_product_of_members_is_each_ones_own(numerics: Any, drawn: Any) -> None:
    """Against the definition, in double precision."""
    model = build_model(drawn(3))
    product = next(one for one in model.modules() if isinstance(one, MemberProduct))
    product.numerics = numerics
    model.members.rows = [2, 0, 3]
    x = torch.randn(5, 4, 32, requires_grad=True)
    upstream = torch.randn(5, 4, 96)
    out = product(x)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    near: Any = {"rtol": 1e-5, "atol": 1e-5} if numerics == "fp32" else {"rtol": 0.02, "atol": 0.02}
    for k, rows in ((0, slice(0, 2)), (2, slice(2, 5))):
        weight = product.weight[k].double()
        expected = x[rows].double() @ weight + product.bias[k].double()
        torch.testing.assert_close(out[rows].double(), expected, **near)
        torch.testing.assert_close(
            gradient[rows].double(), upstream[rows].double() @ weight.T, **near
        )
