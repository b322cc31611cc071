"""Representations: against transformers' own hidden states, and CKA against its definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from fpt import representations
from fpt.backbones import BACKBONES
from fpt.model import build_model
from fpt.representations import cka, gram, hidden_states
from fpt.tasks.base import Batch
from tests.fpt.conftest import MakeTrial


def enumerated(one: np.ndarray, other: np.ndarray) -> float:
    """The unbiased estimate as the mean over all four distinct examples, by its definition."""
    terms = [
        one[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q])
        for i, j, q, r in itertools.permutations(range(len(one)), 4)
    ]
    return float(np.mean(terms))


def test_cka_is_that_of_the_enumeration() -> None:
    rng = np.random.default_rng(0)
    one, other = gram(rng.normal(size=(7, 3))), gram(rng.normal(size=(7, 20)))

    wanted = enumerated(one, other) / np.sqrt(enumerated(one, one) * enumerated(other, other))

    assert cka(one, other) == pytest.approx(wanted, abs=1e-12)


def test_cka_is_one_for_rotations_and_scales_and_symmetric() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(30, 8)), rng.normal(size=(30, 5))
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]

    assert cka(gram(x), gram(3.7 * x @ rotation + 5)) == pytest.approx(1, abs=1e-9)
    assert cka(gram(x), gram(y)) == pytest.approx(cka(gram(y), gram(x)), abs=1e-12)


def test_cka_of_a_half_shared_signal_is_known_in_closed_form() -> None:
    # x = (s, a), y = (s, b) with independent parts of equal variance: HSIC is that of s alone, and
    # each own HSIC twice that, so that CKA tends to 1/2.
    rng = np.random.default_rng(2)
    shared, a, b = (rng.normal(size=(1500, 2)) for _ in range(3))

    found = cka(gram(np.concatenate([shared, a], 1)), gram(np.concatenate([shared, b], 1)))

    assert found == pytest.approx(0.5, abs=0.03)


def test_cka_of_independent_wide_representations_is_not_biased_upward() -> None:
    rng = np.random.default_rng(3)
    found = [cka(*(gram(rng.normal(size=(20, 200))) for _ in range(2))) for _ in range(50)]

    assert np.mean(found) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize(
    ("states", "why"),
    [(np.ones((3, 2)), "3 examples"), (np.ones((6, 2)), "the same for all")],
)
def test_cka_of_too_little_is_refused(states: np.ndarray, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        cka(gram(states), gram(states))


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_states_are_those_of_transformers(trial: MakeTrial, name: str) -> None:
    model = build_model([trial(backbone={"name": name, "layers": 3, "width": 16, "heads": 2})])
    inputs = np.random.default_rng(0).integers(0, 2, (5, 10, 1)).astype(np.float32)
    given = {k: v for k, v in model.member(0).items() if k.startswith("backbone.")}
    own = {k.removeprefix("backbone."): v for k, v in given.items()}
    if name == "gpt2":
        small = GPT2Config(n_layer=3, n_embd=16, n_head=2, n_positions=10, vocab_size=1)
        theirs: torch.nn.Module = GPT2Model(small)
    else:
        little = BertConfig(
            num_hidden_layers=3, hidden_size=16, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=10, vocab_size=1,
        )  # fmt: skip
        theirs = BertModel(little, add_pooling_layer=False)
    theirs.load_state_dict(own, strict=False)
    embedded = model.input(torch.from_numpy(inputs))
    with torch.no_grad():
        wanted = theirs.eval()(inputs_embeds=embedded, output_hidden_states=True).hidden_states

    found = hidden_states(model, Batch(inputs, np.zeros((5, 5), np.int64)))

    assert found.shape == (4, 5, 10, 16)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "vit", "longformer", "transformer", "linformer", "mixer"])
def test_every_transformer_has_a_state_a_layer(trial: MakeTrial, name: str) -> None:
    model = build_model([trial(backbone={"name": name, "layers": 2, "width": 16, "heads": 2})])
    model.train()
    batch = Batch(np.ones((4, 10, 1), np.float32), np.zeros((4, 5), np.int64))

    found = hidden_states(model, batch)

    assert found.shape == (3, 4, 10, 16)
    assert np.isfinite(found).all()
    assert BACKBONES[name].layer
    assert model.training


def test_padding_is_zero(trial: MakeTrial) -> None:
    model = build_model([trial()])
    tokens, width = model.shape.tokens, model.trials[0].backbone.width
    inputs = np.random.default_rng(0).normal(size=(4, tokens, 1)).astype(np.float32)
    lengths = np.array([tokens, 6, 7, tokens], np.int64)

    found = hidden_states(model, Batch(inputs, np.zeros((4, 5), np.int64), lengths))

    assert found.shape[-1] == width
    assert not found[:, 1, 6:].any()
    assert found[:, 1, :6].any()


def test_the_examples_are_those_of_every_seed(trial: MakeTrial) -> None:
    one, other = (representations.evaluation_examples(trial(seed=seed), 8) for seed in (0, 5))

    np.testing.assert_array_equal(one.inputs, other.inputs)
    assert len(one) == 8


def test_a_pack_is_refused(trial: MakeTrial) -> None:
    model = build_model([trial(seed=0), trial(seed=1)])
    with pytest.raises(ValueError, match="pack of 2"):
        hidden_states(model, Batch(np.ones((4, 10, 1), np.float32), np.zeros((4, 5), np.int64)))
