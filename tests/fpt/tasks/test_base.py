"""Finite sets: how they are visited, and what is handed out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpt import random_streams
from fpt.tasks.base import Batch, Stored


def numbered(n: int) -> Stored:
    """A set whose examples are their own numbers."""
    index = np.arange(n, dtype=np.uint8)[:, None]
    return Stored(Batch(index, index))


@given(n=st.integers(1, 40), size=st.integers(1, 60), seed=st.integers(0, 9))
def test_each_epoch_visits_each_example_once(n: int, size: int, seed: int) -> None:
    source = numbered(n)
    steps = -(-3 * n // size)
    batches = [source.batch(seed, random_streams.TRAINING, step, size) for step in range(steps)]
    seen = np.concatenate([batch.targets[:, 0] for batch in batches])[: 3 * n]

    assert [sorted(epoch) for epoch in seen.reshape(3, n)] == [list(range(n))] * 3


def test_the_order_does_not_depend_on_the_batch_size() -> None:
    source = numbered(50)
    small = [source.batch(1, random_streams.TRAINING, step, 8).targets for step in range(15)]
    large = [source.batch(1, random_streams.TRAINING, step, 40).targets for step in range(3)]

    assert np.array_equal(np.concatenate(small), np.concatenate(large))


def test_each_epoch_has_another_order() -> None:
    source = numbered(50)
    first, second = (
        source.batch(1, random_streams.TRAINING, epoch, 50).targets for epoch in range(2)
    )

    assert not np.array_equal(first, second)


def test_a_late_step_costs_no_walk_through_the_earlier_ones() -> None:
    batch = numbered(7).batch(1, random_streams.TRAINING, 10**12, 3)

    assert len(batch) == 3


def test_only_training_is_augmented() -> None:
    given_generators = []

    def transform(rng: np.random.Generator | None, batch: Batch) -> Batch:
        given_generators.append(rng)
        return batch

    source = Stored(numbered(9).examples, transform)
    source.batch(1, random_streams.TRAINING, 0, 3)
    source.batch(1, random_streams.EVALUATION, 0, 3)
    list(source.chunks(9))

    assert [rng is not None for rng in given_generators] == [True, False, False]


@pytest.mark.parametrize(("stored", "wide"), [(np.uint8, np.int64), (np.float64, np.float32)])
def test_what_is_handed_out_is_as_wide_as_promised(stored: type, wide: type) -> None:
    lengths = np.array([1, 2], dtype=np.int16)
    source = Stored(Batch(np.ones((2, 3), stored), np.ones((2, 1), np.uint8), lengths))
    for batch in (source.batch(1, random_streams.TRAINING, 0, 2), *source.chunks(2)):
        assert batch.lengths is not None
        assert (batch.inputs.dtype, batch.targets.dtype) == (wide, np.int64)
        assert batch.lengths.dtype == np.int64


def test_a_part_of_a_batch_has_its_part_of_everything() -> None:
    rng = np.random.default_rng(1)
    whole = Batch(
        rng.normal(size=(5, 3, 2)),
        np.arange(5)[:, None],
        np.array([1, 2, 3, 2, 1]),
        rng.normal(size=(5, 2, 2, 4)).astype(np.float32),
    )
    part = whole.take(np.array([3, 0]))

    for name in ("inputs", "targets", "lengths", "hidden"):
        assert np.array_equal(getattr(part, name), getattr(whole, name)[[3, 0]])


def test_examples_are_copies() -> None:
    # A caller that writes into a batch must not change the set.
    source = Stored(Batch(np.zeros((4, 2), np.float32), np.zeros((4, 1), np.int64)))
    source.batch(1, random_streams.TRAINING, 0, 4).inputs[:] = 1

    assert not source.examples.inputs.any()
