"""Signals that stop a run: real ones, sent to this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from sweep.execution.interrupts import SIGNALS, Interrupts


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_stops_and_ctrl_c_after_it_kills(number: signal.Signals) -> None:
    with Interrupts() as interrupts:
        signal.raise_signal(number)
        assert (interrupts.count, interrupts.first) == (1, number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert interrupts.first == number


@pytest.mark.parametrize("number", sorted({*SIGNALS} - {signal.SIGINT}))
def test_other_signals_never_kill_however_often_they_come(number: signal.Signals) -> None:
    with Interrupts() as interrupts:
        for _ in range(3):
            signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
    assert (interrupts.count, interrupts.first) == (4, number)


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupts():
        assert all(
            signal.getsignal(number) != old for number, old in zip(SIGNALS, before, strict=True)
        )
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_what_another_library_took_is_taken_back() -> None:
    with Interrupts() as interrupts:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # it would end this process
        interrupts.catch()
        signal.raise_signal(signal.SIGUSR1)
    assert interrupts.first == signal.SIGUSR1


def test_under_nohup_a_closed_terminal_stops_nothing() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGHUP)
        assert interrupts.count == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_wait_ends_with_the_first_signal() -> None:
    with Interrupts() as interrupts:
        timer = threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR2))
        timer.start()
        interrupts.wait(60)
        timer.join()
    assert interrupts.first == signal.SIGUSR2


def test_outside_the_main_thread_nothing_is_taken() -> None:
    taken: list[bool] = []

    def enter() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with Interrupts():
            taken.append(signal.getsignal(signal.SIGTERM) != before)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert taken == [False]
