"""One policy for what fails for a while."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweep.ledger.retrying import doubling, retry


def failing(times: int) -> tuple[list[int], Callable[[], str]]:
    calls: list[int] = []

    def call() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise BlockingIOError(len(calls))
        return "answer"

    return calls, call


@given(st.floats(0.01, 5), st.integers(0, 12))
def test_pauses_double_up_to_the_longest(first: float, powers: int) -> None:
    longest = first * 2**powers
    found = list(islice(doubling(first, longest), powers + 3))
    assert found == [min(first * 2**n, longest) for n in range(powers + 3)]


@pytest.mark.parametrize("times", [0, 1, 3])
def test_what_fails_for_a_while_is_called_until_it_answers(times: int) -> None:
    calls, call = failing(times)
    assert retry(call, OSError, within=60, pauses=(0.001, 0.001)) == "answer"
    assert len(calls) == times + 1


def test_the_last_error_is_raised_after_the_limit() -> None:
    calls, call = failing(10_000)
    with pytest.raises(BlockingIOError) as raised:
        retry(call, OSError, within=0.02, pauses=(0.001, 0.002))
    assert raised.value.args == (len(calls),)
    assert len(calls) > 1


def test_another_error_passes() -> None:
    calls, call = failing(1)
    with pytest.raises(BlockingIOError):
        retry(call, KeyError, within=60)
    assert len(calls) == 1


def test_it_gives_up_when_told() -> None:
    calls, call = failing(10)
    with pytest.raises(BlockingIOError, match="3"):
        retry(
            call, OSError, within=60, pauses=(0.001, 0.001), gives_up=lambda one: one.args == (3,)
        )
    assert len(calls) == 3
