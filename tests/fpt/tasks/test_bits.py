"""The bit tasks against what their definitions say."""

from __future__ import annotations

import functools
import operator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fpt import random_streams
from fpt.tasks.base import Stored
from fpt.tasks.bits import BitMemory, BitXor


def rng(seed: int = 0) -> np.random.Generator:
    return random_streams.generator(seed, random_streams.TRAINING)


@given(bits=st.integers(1, 12), seed=st.integers(0, 99))
def test_xor_is_xor(bits: int, seed: int) -> None:
    batch = BitXor(bits=bits).draw(rng(seed), 8)
    for tokens, target in zip(batch.inputs[..., 0].astype(int), batch.targets, strict=True):
        pairs = zip(tokens[:bits].tolist(), tokens[bits:].tolist(), strict=True)

        assert target.tolist() == [functools.reduce(operator.xor, pair) for pair in pairs]


def test_xor_draws_every_pair_equally_often() -> None:
    batch = BitXor(bits=1).draw(rng(), 40_000)
    counts = np.bincount(batch.inputs[:, 0, 0].astype(int) * 2 + batch.inputs[:, 1, 0].astype(int))

    assert np.abs(counts - 10_000).max() < 5 * np.sqrt(40_000 * 0.25 * 0.75)


@given(strings=st.integers(1, 4), seed=st.integers(0, 99))
def test_memory_asks_for_a_string_that_was_shown(strings: int, seed: int) -> None:
    batch = BitMemory(strings=strings, bits=12, patch=4).draw(rng(seed), 6)
    for inputs, target in zip(batch.inputs, batch.targets, strict=True):
        shown = inputs.reshape(strings + 1, 12)
        bits = np.where(target == 1, 1.0, -1.0)

        assert set(np.unique(shown[:-1])) <= {-1.0, 1.0}
        assert (shown[:-1] == bits).all(axis=1).any()
        # What is visible of it agrees.
        assert ((shown[-1] == bits) | (shown[-1] == 0)).all()


def test_memory_masks_half_and_asks_for_each_string_equally_often() -> None:
    batch = BitMemory(strings=4, bits=20, patch=5).draw(rng(), 2_000)
    shown = batch.inputs.reshape(2_000, 5, 20)
    asked = (shown[:, :-1] == np.where(batch.targets == 1, 1, -1)[:, None]).all(axis=2)

    assert (shown[:, -1] == 0).mean() == pytest.approx(0.5, abs=0.01)
    assert asked.mean(axis=0) == pytest.approx(0.25, abs=0.05)


def test_baselines() -> None:
    assert BitMemory().baseline("sound").accuracy == pytest.approx(0.75, abs=0.02)
    assert BitXor().baseline("sound").accuracy == pytest.approx(0.5, abs=0.02)
    assert BitMemory().baseline("paper") == BitMemory().baseline("sound")


@pytest.mark.parametrize("task", [BitMemory(), BitXor(), BitXor(bits=3)], ids=str)
def test_fixed_sets_have_ten_thousand_bits(task: BitMemory | BitXor) -> None:
    splits = task.splits("sound")
    for stored in (splits.validation, splits.test):
        assert isinstance(stored, Stored)
        assert 10_000 <= stored.examples.targets.size < 10_000 + task.shape("sound").positions


def test_the_size_of_the_fixed_sets_is_written_out_in_the_identity() -> None:
    assert BitXor(examples=2_000).identity() == BitXor().identity()
    assert BitXor(examples=500).identity() != BitXor().identity()


def test_bits_have_to_be_whole_patches() -> None:
    with pytest.raises(ValidationError, match="bits 12 is not a multiple of patch 5"):
        BitMemory(bits=12, patch=5)
