"""What follows a run along: called at once, now and then, and at the end."""

from __future__ import annotations

import threading
import time

import pytest

from sweep.execution.following import following


def test_it_is_called_at_once_now_and_then_and_at_the_end() -> None:
    calls: list[bool] = []
    some = threading.Event()

    def sync(last: bool) -> None:
        calls.append(last)
        if len(calls) >= 3:
            some.set()

    with following("f", 0.01, sync, waits=lambda: True):
        assert some.wait(10)
    assert calls == [False] * (len(calls) - 1) + [True]


def test_who_does_not_wait_leaves_the_last_call_out() -> None:
    calls: list[bool] = []
    with following("f", 100, calls.append, waits=lambda: False):
        pass
    time.sleep(0.1)
    assert True not in calls


def test_a_call_that_takes_too_long_is_left_behind() -> None:
    going, end = threading.Event(), threading.Event()
    until = time.monotonic() + 0.3

    def sync(last: bool) -> None:
        if last:
            going.set()
            end.wait(60)

    with following("f", 100, sync, waits=lambda: time.monotonic() < until):
        pass
    assert going.is_set()
    end.set()


def test_what_the_run_raises_is_raised() -> None:
    calls: list[bool] = []
    with pytest.raises(ZeroDivisionError), following("f", 1, calls.append, waits=lambda: True):
        raise ZeroDivisionError
    assert calls[-1]
