from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LongformerConfig,
    LongformerModel,
)

from fpt import groups, pack_layers
from fpt.backbones import BACKBONES, NOTHING
from fpt.backbones.weights import module_class
from fpt.config import TRAINABLE, BackboneConfig
from tests.support import TABLE

assert pack_layers.ATTENTION  # transformers' models ask for what this module registers


def three(name: str) -> BackboneConfig:
    heads = min(2, BACKBONES[name].sizes["tiny"].heads)
    return BackboneConfig(name=name, layers=3, width=8, heads=heads)


def whole(name: str) -> Any:
    """Three layers of 8: where published files hold token tables and heads, with these."""
    sizes: Any = {
        "num_hidden_layers": 3, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 5,
        "intermediate_size": 32,
    }  # fmt: skip
    if name == "gpt2":
        return GPT2Model(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=5))
    if name == "bert":
        return BertModel(BertConfig(**sizes))
    if name == "longformer":
        return LongformerModel(LongformerConfig(**sizes, attention_window=[8] * 3))
    return module_class(BACKBONES[name])(three(name), 10)


@pytest.mark.parametrize("name", TABLE)
def test_rules_take_every_parameter_and_every_rule_takes_one(name: str) -> None:
    names = [n for n, _ in whole(name).named_parameters()]
    found = groups.assign([groups.PREFIX + n for n in names], three(name))

    assert len(found) == len(names)
    for rule, group in BACKBONES[name].groups:
        taken = [n for n in names if re.search(rule, n) and found[groups.PREFIX + n] == group]
        assert taken, rule


@pytest.mark.parametrize("name", TABLE)
def test_every_layer_is_found_by_its_number(name: str) -> None:
    numbers = {
        int(found.group(1))
        for n, _ in whole(name).named_parameters()
        if (found := re.search(BACKBONES[name].layer, n))
    }

    assert numbers == {0, 1, 2}


@pytest.mark.parametrize(
    "name", [name for name in TABLE if BACKBONES[name].residual_outputs != NOTHING]
)
def test_two_projections_a_layer_write_into_the_residual_stream(name: str) -> None:
    rule = BACKBONES[name].residual_outputs

    assert sum(bool(re.search(rule, n)) for n, _ in whole(name).named_parameters()) == 2 * 3


# Name -> linear maps of an attention, tensors of a linear map or norm, further attention tensors.
PUBLISHED = {
    "gpt2": (2, 2, 0),
    "bert": (4, 2, 0),
    "t5": (4, 1, 1),  # no biases; one relative position bias, which the layers share
    "longformer": (7, 2, 0),  # and those of global attention
    "vit": (4, 2, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_groups_hold_the_tensors_that_an_architecture_has(name: str) -> None:
    """Counted from the architecture, of three layers."""
    model = whole(name)
    named = {groups.PREFIX + n: tuple(p.shape) for n, p in model.named_parameters()}
    found = groups.assign(named, three(name))
    table = groups.counts(found, named, set())
    attention, biases, extra = PUBLISHED[name]
    norms = 3 * 2 + 1  # and a final norm, or one of the embeddings

    assert table["attention"]["tensors"] == 3 * attention * biases + extra
    assert table["feedforward"]["tensors"] == 3 * 2 * biases
    assert table["norm"]["tensors"] == biases * norms
    assert table["norm"]["parameters"] == biases * 8 * norms
    assert table.get("position", {}).get("tensors") == (None if name == "t5" else 1)
    assert sum(row["parameters"] for row in table.values()) == sum(
        p.numel() for p in model.parameters()
    )


def test_a_parameter_without_a_rule_is_named() -> None:
    with pytest.raises(ValueError, match=r"no group for backbone.h.0.adapter.weight; add rule"):
        groups.assign(["backbone.h.0.adapter.weight", "backbone.wpe.weight"], three("gpt2"))


def test_a_group_that_a_backbone_lacks_is_refused_with_those_that_it_has() -> None:
    config = BackboneConfig(name="gpt2", layers=1, width=8, heads=2)
    found = groups.assign(["input.weight", "output.weight", "backbone.wpe.weight"], config)

    with pytest.raises(ValueError, match="no parameter in group 'norm'; it has input, output, pos"):
        groups.trained(found, ["norm"], config)


def test_the_trainable_groups_are_those_that_train_is_typed_for() -> None:
    assert tuple(sorted(TRAINABLE)) == TRAINABLE
