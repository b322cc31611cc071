"""Batches made on a device have the bits of the host's, whatever the task, the seeds and sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from fpt import random_streams
from fpt.device_draws import Stream, most_below, places_of
from fpt.tasks import base, listops
from fpt.tasks.base import Batch, Generated, Source, Stored
from fpt.tasks.bits import BitMemory, BitXor
from fpt.tasks.images import Cifar10, Cifar10Lra, Digits
from fpt.tasks.text import Text
from fpt.training import supply
from fpt.training.supply import Supply, supply_of

CPU = torch.device("cpu")

SEEDS = st.integers(0, 2**63 - 1)
STEPS = st.integers(0, 2**31)
MEMBERS = st.lists(st.tuples(SEEDS, STEPS, st.integers(1, 5)), min_size=1, max_size=4)
"""Of each its seed, its step and the examples of its batch."""


def made(own: Supply, members: list[tuple[int, int, int]]) -> Batch:
    """What a device makes for these."""
    parts = [own.given(*member) for member in members]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    arrays["step"] = np.array([step for _, step, _ in members])
    held = {name: torch.from_numpy(array) for name, array in arrays.items()}
    found = own.make(held, [size for *_, size in members])
    return Batch(*(None if one is None else one.numpy() for one in found))  # type: ignore[arg-type]


def assert_the_hosts(own: Supply, source: Source, members: list[tuple[int, int, int]]) -> None:
    """The same bits, and types, as the host's batches one after another."""
    theirs = [source.batch(seed, random_streams.TRAINING, *rest) for seed, *rest in members]
    found = made(own, members)
    for name in ("inputs", "targets", "lengths"):
        parts, mine = [getattr(batch, name) for batch in theirs], getattr(found, name)
        if parts[0] is None:
            assert mine is None
            continue
        wanted = np.concatenate(parts)
        assert (mine.dtype, mine.shape) == (wanted.dtype, wanted.shape)
        assert np.ascontiguousarray(mine).tobytes() == np.ascontiguousarray(wanted).tobytes()


@settings(max_examples=25, deadline=None)
@given(MEMBERS, st.integers(1, 40), st.integers(1, 3), st.integers(1, 7))
def test_bits_are_drawn_as_on_the_host(
    members: list[tuple[int, int, int]], bits: int, patches: int, strings: int
) -> None:
    for task in (BitXor(bits=bits), BitMemory(strings=strings, bits=bits * patches, patch=bits)):
        source = task.splits("sound").train
        own = supply_of(source, CPU)
        assert isinstance(own, supply.DrawnBits)
        assert_the_hosts(own, source, members)


@settings(max_examples=60, deadline=None)
@given(SEEDS, STEPS, st.integers(2, 2**31), st.integers(1, 60), st.integers(1, 9))
def test_numbers_below_a_bound_are_numpys_also_where_some_are_drawn_again(
    seed: int, step: int, bound: int, count: int, bits: int
) -> None:
    theirs = random_streams.generator(seed, 3, step)
    wanted = [
        theirs.integers(0, 2, bits, dtype=np.int8),
        theirs.integers(0, bound, count),
        theirs.integers(0, 2, bits, dtype=np.int8),
        theirs.integers(0, bound, count),
    ]

    numbers = 2 * most_below(bound, count) + 2 * -(-bits // 4)
    ours = Stream(torch.tensor([seed]), torch.tensor([step]), places_of(3, numbers, CPU))

    for theirs_, own in zip(
        wanted,
        (ours.bits(bits), ours.below(bound, count), ours.bits(bits), ours.below(bound, count)),
        strict=True,
    ):
        assert np.array_equal(own[0].numpy(), theirs_)


def test_more_numbers_are_looked_at_than_are_ever_refused() -> None:
    for bound in (3, 5, 9, 1000, 3 * 2**29, 2**30 + 1, 2**31 - 1, 2**31):
        for count in (1, 64, 10_000):
            most, refused = most_below(bound, count), (2**32 % bound) / 2**32
            assert binom.sf(most - count, most, refused) < 1e-12


def images(task: Any, channels: int, count: int = 9) -> Stored:
    draws = np.random.default_rng(count)
    pixels = draws.integers(0, 256, (count, task.height, task.width, channels), dtype=np.uint8)
    labels = draws.integers(0, 10, (count, 1), dtype=np.uint8)
    return Stored(Batch(pixels, labels), task.tokens, augments=getattr(task, "augment", False))


@pytest.mark.parametrize(
    ("task", "channels"),
    [(Cifar10(), 3), (Cifar10Lra(), 3), (Cifar10Lra(), 1), (Cifar10(patch=8), 3)],
)
def test_images_are_moved_as_on_the_host(task: Any, channels: int) -> None:
    source = images(task, channels)
    own = supply_of(source, CPU)
    assert isinstance(own, supply.MovedImages)
    draws = np.random.default_rng(channels)
    for _ in range(12):
        members = [
            (int(draws.integers(2**62)), int(draws.integers(2**31)), int(draws.integers(1, 9)))
            for _ in range(draws.integers(1, 4))
        ]
        assert_the_hosts(own, source, members)


TEXT = "".join(chr(33 + n * n % 90) for n in range(500))


def sources(folder: Path) -> dict[str, Source]:
    (folder / "a.txt").write_text(TEXT)
    numbers = np.arange(40)
    padded = Batch(
        np.tile(numbers[:11, None], (1, 6)).astype(np.uint16), numbers[:11, None] % 3,
        1 + numbers[:11].astype(np.int16) % 6,
    )  # fmt: skip
    return {
        "digits": Digits().splits("sound").train,
        "listops": listops.ListOps(
            max_length=12, min_length=3, train=20, test=4, validation=4, max_depth=2
        ).splits("sound").train,
        "text": Text(path=folder / "a.txt", tokens=7).splits("sound").train,
        "padding": Stored(padded),
        "wide": Stored(Batch(numbers.reshape(10, 4).astype(np.float64) / 3, numbers[:10, None])),
        "half": Stored(Batch(numbers.reshape(10, 2, 2).astype(np.float16), numbers[:10, None])),
        "truths": Stored(Batch(numbers.reshape(10, 4) % 2 == 0, numbers[:10, None] > 4)),
        "not augmented": images(Cifar10(augment=False), 3),
        "a transformation": Stored(padded, lambda _, b: Batch(b.inputs / 3, b.targets, b.lengths)),
    }  # fmt: skip


def test_sets_are_taken_from_as_on_the_host(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    for name, source in sources(tmp_path).items():
        own = supply_of(source, CPU)
        wanted = supply.TextWindows if name == "text" else supply.StoredSet
        assert isinstance(own, wanted), name
        for _ in range(10):
            sizes = draws.integers(1, 30, draws.integers(1, 4)).tolist()
            members = [(int(draws.integers(2**31)), int(draws.integers(50)), n) for n in sizes]
            assert_the_hosts(own, source, members)


def shuffled_within(rng: np.random.Generator | None, batch: Batch) -> Batch:
    """Looks at a batch as a whole."""
    return Batch(batch.inputs - batch.inputs.mean(), batch.targets)


def drawing(rng: np.random.Generator | None, batch: Batch) -> Batch:
    """Draws, and does not say so."""
    noise = 0 if rng is None else rng.random(batch.inputs.shape)
    return Batch(batch.inputs + noise, batch.targets)


def own_draw(rng: np.random.Generator, size: int) -> Batch:
    return BitXor().draw(rng, size)


class Halves(BitXor):
    """A task of a user's own that draws otherwise."""

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        batch = super().draw(rng, size)
        return Batch(batch.inputs / 2, batch.targets)


VECTORS = Batch(np.arange(24, dtype=np.float32).reshape(6, 2, 2), np.arange(6)[:, None])


@pytest.mark.parametrize(
    "source",
    [
        Stored(VECTORS, shuffled_within),
        Stored(VECTORS, drawing),
        Stored(VECTORS, drawing, augments=True),
        Generated(own_draw),
        Halves().splits("sound").train,
        Stored(Batch(VECTORS.inputs, VECTORS.targets, hidden=np.zeros((6, 1, 2, 4), np.float32))),
    ],
)
def test_what_is_in_no_table_is_made_on_the_host(source: Source) -> None:
    own = supply_of(source, CPU)
    assert isinstance(own, supply.HostBatches)
    if not isinstance(source, Stored) or source.examples.hidden is None:
        assert_the_hosts(own, source, [(3, 1, 2), (4, 5, 6)])


def test_sets_that_are_too_large_stay_on_the_host(tmp_path: Path) -> None:
    for name, source in sources(tmp_path).items():
        examples = source.text if name == "text" else source.examples.inputs  # type: ignore[attr-defined]
        assert isinstance(supply_of(source, CPU, most=examples.nbytes // 2), supply.HostBatches)
    source = images(Cifar10(), 3)
    numbers = 4 * source.examples.inputs.size
    assert isinstance(supply_of(source, CPU, most=numbers - 1), supply.HostBatches)
    assert isinstance(supply_of(source, CPU, most=numbers), supply.MovedImages)


def test_an_order_is_that_of_the_host_over_epochs() -> None:
    source = Stored(Batch(np.arange(7)[:, None], np.arange(7)[:, None]))
    own = supply_of(source, CPU)
    seen = [int(n) for step in range(7) for n in made(own, [(5, step, 2)]).targets[:, 0]]
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7))
    assert seen[:7] == base.epoch_order(5, random_streams.TRAINING, 0, 7).tolist()
