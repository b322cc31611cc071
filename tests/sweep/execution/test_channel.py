"""When an attempt counts as hung, by what the driver heard of it and by its own clock: no Ray."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sweep.execution.channel import NAME_ACTOR_EVERY, HeartbeatSender, ReportingActor
from sweep.execution.liveness import (
    MISSED,
    PREPARE_SECONDS,
    SLOWEST,
    STEP_SECONDS,
    AttemptHealth,
    Heartbeat,
)
from sweep.execution.scheduler import Event
from sweep.sweepfile.schema import LimitsSpec

NUMBERS = itertools.count()


def beat(beats: int, phase: str = "training", where: str | None = None) -> Heartbeat:
    return Heartbeat("a1", next(NUMBERS), "node", phase, beats, {}, {}, where)


def heard(seconds: float, every: float = 1.0, **how: Any) -> tuple[AttemptHealth, float]:
    """An attempt that makes a step every so often for a while, from time 0."""
    now, beats = 0.0, 0
    one = AttemptHealth.first(beat(0, **how), now)
    while now < seconds:
        now += every
        beats += 1
        one.take(beat(beats, **how), now)
    return one, now


def silent_steps(one: AttemptHealth, now: float, seconds: float) -> float:
    """The worker goes on to say that it lives, and makes no step."""
    end = now + seconds
    while now < end:
        now = min(now + 10, end)
        one.take(one.beat, now)
    return now


NOTHING_SAID = LimitsSpec()


def test_who_makes_steps_never_hangs() -> None:
    one, now = heard(seconds=5000, every=20.0)

    assert one.hung(LimitsSpec(hang_seconds=25), now) is None
    assert one.hung(NOTHING_SAID, now) is None


def test_the_limit_of_the_file_counts_while_it_trains() -> None:
    one, now = heard(seconds=10)
    limits = LimitsSpec(hang_seconds=100)

    assert one.hung(limits, silent_steps(one, now, 95)) is None
    now = silent_steps(one, now + 95, 10)
    assert one.hung(limits, now) == "no step for 105 s while training"


@pytest.mark.parametrize(("step", "allowed"), [(1.0, STEP_SECONDS), (60.0, SLOWEST * 60.0)])
def test_without_one_the_slowest_step_says_how_long_to_wait(step: float, allowed: float) -> None:
    one, now = heard(seconds=600, every=step)

    assert one.hung(NOTHING_SAID, silent_steps(one, now, allowed - 10)) is None
    now = silent_steps(one, now + allowed - 10, 20)
    assert "no step for" in (one.hung(NOTHING_SAID, now) or "")


def test_preparing_takes_as_long_as_it_takes_but_not_for_ever() -> None:
    one, now = heard(seconds=0, phase="preparing")
    limits = LimitsSpec(hang_seconds=30)

    now = silent_steps(one, now, PREPARE_SECONDS - 10)
    assert one.hung(limits, now) is None
    assert "while preparing" in (one.hung(limits, silent_steps(one, now, 20)) or "")


def test_who_waits_for_storage_does_not_hang() -> None:
    one, now = heard(seconds=10)
    one.take(beat(10, phase="writing"), now)
    limits = LimitsSpec(hang_seconds=20, storage_seconds=300)

    now = silent_steps(one, now, 310)
    assert one.hung(limits, now) is None
    assert "while writing" in (one.hung(limits, silent_steps(one, now, 20)) or "")


@pytest.mark.parametrize("phase", ["preparing", "training", "writing"])
def test_a_worker_that_says_nothing_is_frozen_or_cut_off(phase: str) -> None:
    one, now = heard(seconds=10, phase=phase)

    assert one.hung(LimitsSpec(hang_seconds=5), now + 4) is None
    assert one.hung(LimitsSpec(hang_seconds=5), now + 31) == "its worker said nothing for 31 s"
    assert one.hung(NOTHING_SAID, now + 290) is None
    assert one.hung(NOTHING_SAID, now + 301) == "its worker said nothing for 301 s"


def test_a_driver_that_stood_still_blames_nobody() -> None:
    one, now = heard(seconds=10)

    one.wait(10_000)

    assert one.hung(LimitsSpec(hang_seconds=20), now + 10_000) is None


@pytest.mark.parametrize("interval", [10.0, 30.0, 100.0])
def test_of_many_workers_each_one_is_heard_of_seldom(interval: float) -> None:
    limits = LimitsSpec(hang_seconds=5)
    one, now = heard(seconds=1000, every=interval)

    late = now + (MISSED - 0.5) * interval
    assert one.hung(limits, late, interval) is None
    one.take(replace(one.beat, number=next(NUMBERS)), late)  # a word, and no step with it
    assert one.hung(limits, late, interval) is None
    assert one.hung(limits, late + (MISSED + 1) * interval, interval) is not None


def test_where_it_hangs_is_told() -> None:
    one, now = heard(seconds=10)
    one.take(beat(10, where="Stream.read (data.py:12)"), now + 15)

    why = one.hung(LimitsSpec(hang_seconds=10), now + 15) or ""

    assert why.endswith("at Stream.read (data.py:12)")


def test_a_worker_waits_for_what_is_entrusted_and_a_new_line_says_that_it_is_new() -> None:
    async def talk() -> None:
        line = ReportingActor()
        worker = asyncio.ensure_future(line.secrets())

        name, events, beats = await asyncio.wait_for(line.take(), 5)  # before any report
        assert (name, events, beats) == (line.name, [], [])
        assert not worker.done()
        await line.set_secrets({"HF_TOKEN": "hf"})
        assert await asyncio.wait_for(worker, 5) == {"HF_TOKEN": "hf"}

        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(line.take(), 0.05)

    asyncio.run(talk())


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_what_waited_for_the_line_to_start_is_put_back_in_order(order: tuple[int, ...]) -> None:
    actor: Any = "the worker"
    first, second, third = (replace(beat(k), steps={"t": k} if k else {}) for k in range(3))
    reports: list[tuple[list[Event], Heartbeat]] = [
        ([], replace(first, actor=actor)),
        ([Event("trial_started", "t")], second),
        ([Event("record", "t", step=2)], third),
    ]

    async def talk() -> tuple[str, list[Event], list[Heartbeat]]:
        line = ReportingActor()
        await asyncio.gather(*(line.report(*reports[k]) for k in order))
        return await line.take()

    _, events, beats = asyncio.run(talk())

    assert [event.kind for event in events] == ["trial_started", "record"]
    assert beats == [replace(third, actor=actor)]


def test_a_beat_that_was_overtaken_takes_nothing_back() -> None:
    late, last = beat(1), replace(beat(2), steps={"t": 2})
    one = AttemptHealth.first(last, 10.0)

    one.take(late, 11.0)

    assert (one.beat, one.at, one.moved) == (last, 10.0, 10.0)


def test_who_it_is_a_worker_says_again_since_the_line_may_be_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = SimpleNamespace(get_node_id=lambda: "node", current_actor="the worker")
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    sent: list[Heartbeat] = []
    report = SimpleNamespace(remote=lambda events, beat: sent.append(beat))
    line: Any = SimpleNamespace(report=report)
    reports = HeartbeatSender(line, 1000.0, "a1")
    with reports:
        for _ in range(NAME_ACTOR_EVERY):
            reports._send([])
    first, *later = sent
    actor: Any = "the worker"

    one = AttemptHealth.first(later[0], 0.0)  # the first one was taken by a line that died
    assert one.actor is None
    for beat in later[1:]:
        one.take(beat, 1.0)

    assert (first.actor, one.actor) == (actor, actor)
    assert len([beat for beat in sent if beat.actor]) == 2
