"""Random streams: pure functions of where they are used, apart from one another."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fpt import random_streams

STREAMS = (
    random_streams.INITIALISATION,
    random_streams.TRAINING,
    random_streams.EVALUATION,
    random_streams.DROPOUT,
    random_streams.BACKBONE,
    random_streams.AUGMENTATION,
    random_streams.SPLIT,
)


def draw(*place: int) -> tuple[int, ...]:
    return tuple(random_streams.generator(*place).integers(0, 2**63, 4).tolist())


def test_streams_have_numbers_of_their_own() -> None:
    assert len(set(STREAMS)) == len(STREAMS)


@given(
    seed=st.integers(0, 2**63 - 1),
    stream=st.sampled_from(STREAMS),
    step=st.integers(0, 2**64 - 1),
    site=st.integers(0, 2**32 - 1),
)
def test_numbers_are_a_function_of_the_place(seed: int, stream: int, step: int, site: int) -> None:
    assert draw(seed, stream, step, site) == draw(seed, stream, step, site)


def test_neighbouring_places_share_no_numbers() -> None:
    places = list(itertools.product((0, 1, 2**32), STREAMS, (0, 1, 2**32), (0, 1, 2**31)))

    assert len({draw(*place) for place in places}) == len(places)


def test_drawing_more_in_a_step_does_not_reach_the_next() -> None:
    long = random_streams.generator(3, random_streams.TRAINING, 5).integers(0, 2**63, 100_000)
    following = random_streams.generator(3, random_streams.TRAINING, 6).integers(0, 2**63, 1_000)

    assert not np.isin(following, long).any()


def test_numbers_are_those_of_every_other_machine() -> None:
    # Written down once: resumed trials and fresh clones rest on them.
    words = random_streams.philox(1, random_streams.DROPOUT, 2, 3).random_raw(2).tolist()

    assert words == [14330193228446935362, 18200314513672175834]
