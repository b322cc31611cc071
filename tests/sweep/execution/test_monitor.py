"""What is asked of a run, and when it stops: without Ray, by a clock of the tests' own."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from sweep.execution.interrupts import SIGNALS, Interrupts
from sweep.execution.liveness import Heartbeat
from sweep.execution.monitor import (
    END_SECONDS,
    STOP_SECONDS,
    TERM_SECONDS,
    Monitor,
    Phase,
    RunContext,
    stop_reason,
    watch_head,
)
from sweep.execution.scheduler import Event
from sweep.execution.tune_adapter import adapters
from sweep.sweepfile.schema import LimitsSpec
from tests.servers import free_port

REASONS: list[tuple[dict[str, Any], str, float]] = [
    *(
        ({"signals": number}, "running trials save their states", TERM_SECONDS)
        for number in sorted({*SIGNALS} - {signal.SIGINT})
    ),
    ({"signals": signal.SIGINT}, "Ctrl-C again kills them", STOP_SECONDS),
    ({"ended": ["raylet"]}, "raylet of our own Ray has ended", TERM_SECONDS),
    ({"ended": ["raylet", "gcs_server"]}, "raylet and gcs_server of our own Ray", TERM_SECONDS),
    ({"paused": True}, "somebody asked for a pause", END_SECONDS),
    ({"past_deadline": True}, "the time is up", END_SECONDS),
    ({"lease_lost": True}, "another driver has taken over this cluster", END_SECONDS),
    (
        {"storage_silent_for": 61.0, "storage_limit": 60.0, "storage": "s3://b/r"},
        "s3://b/r has not answered for 60 s",
        END_SECONDS,
    ),
]


@pytest.mark.parametrize(("asked", "why", "patience"), REASONS)
def test_each_reason_to_stop_is_told_and_has_its_patience(
    asked: dict[str, Any], why: str, patience: float
) -> None:
    stop = stop_reason(**asked)
    assert stop is not None
    assert stop.why.startswith("stopping: ")
    assert why in stop.why
    assert stop.patience == patience


PAIRS = [
    (one | other, min(first, second))
    for (one, _, first), (other, _, second) in itertools.combinations(REASONS, 2)
    if one.keys() != other.keys() and signal.SIGTERM not in one.values()
]


@pytest.mark.parametrize(("asked", "patience"), PAIRS)
def test_of_two_reasons_the_more_urgent_one_counts(asked: dict[str, Any], patience: float) -> None:
    stop = stop_reason(**asked)
    assert stop is not None
    assert stop.patience == patience


@pytest.mark.parametrize("silent", [0.0, 59.9, 60.0])
def test_without_a_reason_it_goes_on(silent: float) -> None:
    assert stop_reason() is None
    assert stop_reason(storage_silent_for=silent, storage_limit=60.0) is None


class Said:
    """The driver's end of a channel, at which a worker says what a test tells it to."""

    def __init__(self) -> None:
        self.said: list[list[Heartbeat]] = []
        self.halts: list[str | None] = []

    def poll(self) -> tuple[list[Event], list[Heartbeat]]:
        return [], self.said.pop(0) if self.said else []

    def halt(self, node: str | None = None) -> None:
        self.halts.append(node)

    def say(self, number: int, steps: int = 0, beats: int = 0) -> None:
        phase = "training" if beats else "preparing"
        recorded = {"t": steps} if steps else {}
        self.said.append([Heartbeat("a", number, "node", phase, beats, recorded, {})])


class Connection:
    """A Ray that says what a test has put here."""

    own = False

    def __init__(self) -> None:
        self.gone: list[str] = []
        self.draining: frozenset[str] = frozenset()

    def ended(self) -> list[str]:
        return self.gone

    def draining_nodes(self) -> frozenset[str]:
        return self.draining

    def abandon(self) -> None:
        pytest.fail("nothing was to be abandoned")


class Turns:
    """A run with one attempt under way, whose turns come when a test says so."""

    def __init__(self, slots: int) -> None:
        self.channel = Said()
        self.connection = Connection()
        self.now = 1000.0
        self.events: list[Event] = []
        self.interrupts = Interrupts()
        self.killed: list[Any] = []
        self.asked_to_pause = False
        job = SimpleNamespace(points=(), resources={"CPU": 1.0})
        scheduler: Any = SimpleNamespace(
            stopped=None, running={"a": job}, emit=self.events.append, ended=self._ended,
            elsewhere=(), tries=lambda most: {}, finished=False, retry_deferred=lambda most: None,
        )  # fmt: skip
        scheduler.stop = lambda why: setattr(scheduler, "stopped", scheduler.stopped or why)
        lease: Any = SimpleNamespace(held=True, lost=False, note={})
        limits = LimitsSpec(storage_seconds=600.0)
        sweep: Any = SimpleNamespace(name="small", spec=SimpleNamespace(limits=limits))
        reservations: Any = SimpleNamespace(release=lambda ids: None)
        notes = SimpleNamespace(paused=lambda name: self.asked_to_pause)
        ledger: Any = SimpleNamespace(uri="results", notes=notes)
        train: Any = None
        self.run = Monitor(
            RunContext(ledger, lease, self.interrupts, self.events.append, train),
            sweep,
            scheduler,
            slots=slots,
            channel=self.channel,
            connection=self.connection,
            reservations=reservations,
            kill=self.killed.append,
            clock=lambda: self.now,
        )

    def _ended(self, attempt: str, results: Any, node: str | None) -> None:
        del self.run.scheduler.running[attempt]

    def until_killed(self, most: float) -> float:
        """Turn for so many seconds, and say after how many it was killed."""
        began = self.now
        while self.now < began + most:
            try:
                self.run.poll()
            except KeyboardInterrupt:
                break
            self.now += 0.125
        return self.now - began


@pytest.fixture(params=[4, 500])
def turns(request: pytest.FixtureRequest) -> Turns:
    return Turns(request.param)


def test_who_has_made_steps_since_its_last_beat_is_not_killed_by_a_pause(turns: Turns) -> None:
    turns.channel.say(0)
    turns.run.poll()
    turns.run.paused = True
    turns.channel.say(1, beats=3)  # three slow steps, and no record yet

    assert turns.until_killed(200) == pytest.approx(END_SECONDS, abs=0.5)
    assert turns.channel.halts == [None]


def test_who_is_heard_of_a_beat_after_the_pause_is_not_killed_either(turns: Turns) -> None:
    turns.channel.say(0)
    turns.run.poll()
    turns.run.paused = True
    assert turns.until_killed(turns.run.interval) == turns.run.interval
    turns.channel.say(1, steps=500, beats=500)

    assert turns.until_killed(100) == 100
    turns.run.ended("a", ())
    assert turns.until_killed(10) == 0  # and nobody is waited for who has ended


def test_workers_that_only_import_are_not_waited_for(turns: Turns) -> None:
    turns.channel.say(0)
    turns.run.poll()
    turns.run.paused = True

    assert turns.until_killed(200) == pytest.approx(2 * turns.run.interval + 1.0, abs=0.5)


def test_nothing_is_made_of_beats_that_came_while_the_driver_stood_still(turns: Turns) -> None:
    turns.channel.say(0)
    turns.run.poll()
    turns.run.paused = True
    assert turns.until_killed(0.5) == 0.5
    turns.now += 60
    turns.channel.said.append([])
    assert turns.until_killed(0.5) == 0.5
    turns.channel.say(1, beats=3)

    assert turns.until_killed(30) == 30


@pytest.mark.parametrize(
    ("number", "seconds", "again"),
    [(signal.SIGINT, STOP_SECONDS, True), (signal.SIGTERM, TERM_SECONDS, False)],
)
def test_who_sends_sigterm_waits_longer_than_who_presses_ctrl_c(
    turns: Turns, number: int, seconds: float, again: bool
) -> None:
    turns.channel.say(0, steps=10, beats=10)
    turns.run.poll()
    with turns.interrupts:
        signal.raise_signal(number)

    assert turns.until_killed(200) == pytest.approx(seconds, abs=0.5)
    assert ("Ctrl-C again kills them" in (turns.run.scheduler.stopped or "")) == again


def test_a_run_is_running_then_draining_then_killed(turns: Turns) -> None:
    turns.channel.say(0, steps=10, beats=10)
    turns.run.poll()
    assert (turns.run.phase, turns.run.stopped) == (Phase.RUNNING, False)
    turns.connection.gone = ["gcs_server"]
    turns.run.check_from_outside()
    turns.run.poll()
    assert (turns.run.phase, turns.run.stopped) == (Phase.DRAINING, True)
    assert turns.until_killed(200) == pytest.approx(TERM_SECONDS, abs=0.5)
    assert turns.run.phase is Phase.KILLED
    assert turns.channel.halts == [None]


def test_a_node_that_is_about_to_go_is_told_once(turns: Turns) -> None:
    turns.connection.draining = frozenset({"a node"})
    for _ in range(3):
        turns.run.check_from_outside()
        turns.run.poll()
    assert turns.channel.halts == ["a node"]
    assert turns.run.phase is Phase.RUNNING


def test_a_note_that_cannot_be_made_costs_no_pause(turns: Turns) -> None:
    def fail(most: int) -> Any:
        raise RuntimeError("deque mutated during iteration")

    turns.run.scheduler.tries = fail  # type: ignore[method-assign]
    turns.asked_to_pause = True
    turns.run.check_from_outside()

    assert turns.run.paused


def test_what_hangs_is_ended_once(turns: Turns) -> None:
    worker: Any = "the worker"
    turns.channel.said.append([Heartbeat("a", 0, "node", "training", 1, {}, {}, actor=worker)])
    turns.run.poll()
    for _ in range(400):
        turns.now += 1
        turns.run.poll()

    assert turns.killed == [worker]
    assert "said nothing for" in turns.run.being_killed["a"]


def test_who_waits_for_a_worker_is_told_what_for(turns: Turns) -> None:
    for _ in range(65):
        turns.now += 1
        turns.run.poll()
    said = [event.message for event in turns.events if event.kind == "waiting"]
    assert said == ["no worker has begun yet: each asks the cluster for 1 CPU"] * 2


def test_a_head_that_is_gone_is_told_after_a_while() -> None:
    head, said = f"127.0.0.1:{free_port()}", list[str]()
    began = time.monotonic()
    watch_head(head, threading.Event(), said.append, most=0.4, every=0.05)

    assert time.monotonic() - began > 0.3
    assert said == [f"{head}: the head of the cluster has not answered for 0 s"]


def test_a_head_that_is_gone_when_the_run_has_ended_is_nobodys_business() -> None:
    ended, said = threading.Event(), list[str]()
    ended.set()
    watch_head(f"127.0.0.1:{free_port()}", ended, said.append, most=0.0, every=0.01)
    assert said == []


def test_a_fault_while_a_trial_ends_is_not_hidden_by_tune(turns: Turns) -> None:
    feed, watch = adapters(turns.run)
    job = SimpleNamespace(attempt="a")
    turns.run.next = lambda: job  # type: ignore[method-assign,assignment,return-value]
    assert feed.suggest("tune's") == {"job": job}

    def ended(attempt: str, results: Any, node: Any) -> None:
        raise ZeroDivisionError("of on_event")

    turns.run.scheduler.ended = ended  # type: ignore[method-assign]
    trial: Any = SimpleNamespace(trial_id="tune's", pickled_error_file=None)
    controller: Any = None

    feed.on_trial_complete("tune's", {"results": ()})
    watch.on_trial_error(controller, trial)  # Tune calls this, too, where the former fails

    with pytest.raises(ZeroDivisionError, match="of on_event"):
        turns.run.poll()
