"""Attention maps: what they must be whatever the weights, and what transformers' own are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from fpt.attention_maps import attention_maps, examples, fixed_points, tokens_held
from fpt.backbones import BACKBONES
from fpt.config import TrialConfig
from fpt.model import Model, build_model
from fpt.tasks.base import Batch
from fpt.tasks.bits import BitMemory, BitXor
from tests.fpt.conftest import MakeTrial

MEMORY = {"name": "bit-memory", "strings": 2, "bits": 6, "patch": 2}


def disturbed(config: TrialConfig) -> Model:
    """A model whose attention is not nearly uniform, as that of small random weights would be."""
    model = build_model([config])
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.member(0).items():
            if name.startswith("backbone.") and parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.3)
    return model


def batch_of(config: TrialConfig, size: int = 3) -> Batch:
    return config.task.draw(np.random.default_rng(5), size)  # type: ignore[attr-defined]


@pytest.mark.parametrize("backbone", ["gpt2", "bert", "vit", "t5"])
@pytest.mark.parametrize("task", ["bit-xor", MEMORY], ids=["bit-xor", "bit-memory"])
def test_each_row_is_a_distribution_over_the_tokens_that_it_may_see(
    trial: MakeTrial, backbone: str, task: Any
) -> None:
    config = trial(task=task, backbone={"name": backbone, "size": "tiny"}, train="fpt", dropout=0.5)
    model = disturbed(config)
    tokens = model.shape.tokens
    model.train()

    maps = attention_maps(model, batch_of(config))

    assert maps.shape == (4, 3, 4, tokens, tokens)
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)  # no dropout
    assert maps.min() >= 0
    above = np.triu(np.ones((tokens, tokens), bool), 1)
    assert bool(maps[..., above].any()) != BACKBONES[backbone].causal
    assert maps.std() > 0.01
    # As it was: in training mode, and no longer keeping maps.
    assert model.training
    assert model.members.maps is None


@pytest.mark.parametrize("backbone", ["gpt2", "bert"])
def test_they_are_those_of_transformers_own_eager_attention(
    trial: MakeTrial, backbone: str
) -> None:
    config = trial(backbone={"name": backbone, "layers": 2, "width": 32, "heads": 2})
    model = disturbed(config).eval()
    batch = batch_of(config)
    if backbone == "gpt2":
        theirs: Any = GPT2Model(
            GPT2Config(vocab_size=1, n_positions=10, n_embd=32, n_layer=2, n_head=2,
                       bos_token_id=None, eos_token_id=None, attn_implementation="eager")
        )  # fmt: skip
    else:
        theirs = BertModel(
            BertConfig(vocab_size=1, max_position_embeddings=10, hidden_size=32,
                       num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
                       pad_token_id=None, attn_implementation="eager"),
            add_pooling_layer=False,
        )  # fmt: skip
    inner = {
        name.removeprefix("backbone."): value.detach()
        for name, value in model.member(0).items()
        if name.startswith("backbone.")
    }
    theirs.eval().load_state_dict(inner, strict=False)
    missing = set(dict(theirs.named_parameters())) - set(inner)
    assert all("wte" in name or "word_embeddings" in name for name in missing)

    with torch.no_grad():
        own = model.member(0)
        embedded = torch.from_numpy(batch.inputs) @ own["input.weight"].T + own["input.bias"]
        expected = theirs(inputs_embeds=embedded, output_attentions=True).attentions

    maps = attention_maps(model, batch)
    np.testing.assert_allclose(maps, torch.stack(expected).numpy(), atol=1e-5)


def test_to_look_changes_no_number(trial: MakeTrial) -> None:
    config = trial()
    model = disturbed(config).eval()
    inputs = torch.from_numpy(batch_of(config).inputs)

    with torch.no_grad():
        before = model(inputs)
        attention_maps(model, batch_of(config, 7))
        after = model(inputs)

    assert torch.equal(before, after)


def test_padding_is_not_attended_to(trial: MakeTrial) -> None:
    task = {"name": "listops", "min_length": 4, "max_length": 16, "max_depth": 3, "train": 50,
            "validation": 10, "test": 10}  # fmt: skip
    config = trial(task=task)
    model = disturbed(config)
    batch = next(iter(config.task.splits("sound").test.chunks(4)))  # type: ignore[attr-defined]
    assert batch.lengths is not None

    maps = attention_maps(model, batch)

    for number, length in enumerate(batch.lengths):
        real = maps[:, number, :, :length]
        assert not real[..., length:].any()
        np.testing.assert_allclose(real.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("backbone", "why"),
    [
        ("lstm", "backbone lstm has no attention"),
        ("longformer", "backbone longformer computes its attention in a form that gives no maps"),
    ],
)
def test_backbones_without_maps_say_so(trial: MakeTrial, backbone: str, why: str) -> None:
    config = trial(backbone={"name": backbone, "size": "tiny"}, train="fpt")
    model = build_model([config])

    with pytest.raises(ValueError, match=why):
        attention_maps(model, batch_of(config))
    assert model.members.maps is None


def test_packs_are_refused(trial: MakeTrial) -> None:
    model = build_model([trial(seed=0), trial(seed=1)])

    with pytest.raises(ValueError, match="of one trial, not of a pack of 2"):
        attention_maps(model, batch_of(trial()))


def test_the_example_is_always_the_same() -> None:
    for task in (BitXor(), BitMemory(strings=2, bits=6, patch=2)):
        one, two = examples(task, 1), examples(task, 1)
        assert len(one) == 1
        np.testing.assert_array_equal(one.inputs, two.inputs)
    assert examples(BitXor(), 1).inputs.ravel().tolist() == [0, 1, 1, 0, 0, 0, 0, 1, 1, 0]


def mixture(weights: list[float], tokens: int) -> np.ndarray:
    """(1, 1, 1, tokens, tokens) maps whose rows hold these weights first, then nothing."""
    row = np.zeros(tokens, np.float32)
    row[: len(weights)] = weights
    return np.broadcast_to(row, (1, 1, 1, tokens, tokens))


@pytest.mark.parametrize(
    ("weights", "held", "kind"),
    [
        ([1.0], 1, "one pattern"),
        ([0.9, 0.1], 1, "one pattern"),
        ([0.89, 0.11], 2, "metastable"),
        ([0.25] * 4, 4, "metastable"),
        ([1 / 8] * 8, 8, "metastable"),  # half of 16 is not more than half
        ([1 / 16] * 16, 15, "global average"),
        ([1 / 10] * 10, 9, "global average"),
    ],
)
def test_the_kind_of_fixed_point_is_known_for_maps_made_by_hand(
    weights: list[float], held: int, kind: str
) -> None:
    maps = mixture(weights, 16)

    shares, kinds = fixed_points(maps, causal=False)

    assert (tokens_held(maps) == held).all()
    assert shares.shape == kinds.shape == (1, 1)
    assert shares[0, 0] == pytest.approx(held / 16)
    assert kinds[0, 0] == kind


def test_a_causal_head_is_measured_by_the_tokens_that_it_sees() -> None:
    uniform = np.tril(np.ones((12, 12), np.float32))
    uniform /= uniform.sum(-1, keepdims=True)
    itself = np.eye(12, dtype=np.float32)
    maps = np.stack([uniform, itself])[None, None]

    shares, kinds = fixed_points(maps, causal=True)

    assert kinds.tolist() == [["global average", "one pattern"]]
    assert shares[0, 0] > 0.9


def test_one_token_has_no_fixed_point() -> None:
    with pytest.raises(ValueError, match="one token"):
        fixed_points(np.ones((1, 1, 1, 1, 1), np.float32), causal=True)
