"""The line between workers and the driver: reports and signs of life go up, `stop` comes down.

It is one actor beside the driver. A worker sends from a thread of its own, so that one whose
training hangs still says where, and one that says nothing is frozen or cut off. What the driver
heard of an attempt, and when, is its `Heard`: by that and the driver's own clock it judges.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sweep.execution.scheduler import Event
from sweep.execution.worker import Halt, Pulse
from sweep.sweepfile.schema import LimitsSpec
from sweep.sweepfile.trials import Point

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

    from fpt.trainer import Record

PREPARE_SECONDS = 3600.0
"""What an attempt may take before its first step, where nothing else is said: imports, data,
weights that are fetched, an evaluation's examples that are made."""

STEP_SECONDS = 600.0
"""What a step may take at least, where nothing else is said."""

SLOWEST = 50
"""Times the slowest step so far that a step may take, where that is more."""

SILENCE = (30.0, 300.0)
"""Seconds without a word after which a worker counts as hung: at least, and where nothing is said.
A library that is being loaded may keep a process's threads from running."""

MISSED = 3
"""Beats that may be late or lost before anything is made of it."""

STUCK_SECONDS = 10.0
"""Without a step, for a worker to say where it is."""

TELL_ACTOR = 10
"""Of so many beats one names the worker: the line may be lost with the first one."""


@dataclass(frozen=True)
class Beat:
    """A sign of life of an attempt."""

    attempt: str
    number: int
    """Counts the beats of the attempt: what waits for the line to start reaches it in any order."""
    node: str
    """Ray's id of the node."""
    phase: str
    beats: int
    """Rises with each step, see `sweep.execution.worker.Pulse`."""
    steps: Mapping[str, int]
    """Trial id -> the last step that was recorded."""
    unsaved: Mapping[str, float]
    """Trial id -> seconds of training that no saved state holds."""
    where: str | None = None
    """The line of code that it has been at for a while."""
    actor: ActorHandle[Any] | None = None
    """The worker, in the first beat and in some of the later ones."""


class Line:
    """The actor. It holds nothing that the driver cannot tell it again."""

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        """Another one after a restart."""
        self._events: list[tuple[int, Event]] = []
        """Each with the number of the beat that it came with."""
        self._beats: dict[str, Beat] = {}
        self._some = asyncio.Event()
        self._some.set()  # the first call of `take` tells the driver that this actor is new
        self._everywhere = False
        self._halts: dict[str, asyncio.Event] = {}
        """Node -> set when what runs there is to end."""
        self._entrusted: Mapping[str, str] = {}
        self._told = asyncio.Event()

    async def entrust(self, variables: Mapping[str, str]) -> None:
        """Keep what opens the Hub and buckets, for workers that lack it.

        Not given when this actor is made, since of that Ray keeps a record.
        """
        self._entrusted = variables
        self._told.set()

    async def entrusted(self) -> Mapping[str, str]:
        """What was entrusted, as soon as it was: a worker opens the ledger with it, and once."""
        await self._told.wait()
        return self._entrusted

    async def report(self, events: list[Event], beat: Beat) -> None:
        """Keep a worker's word until it is taken; of its beats the last one."""
        self._events += [(beat.number, event) for event in events]
        held = self._beats.get(beat.attempt, beat)
        last = max(held, beat, key=lambda one: one.number)
        self._beats[beat.attempt] = replace(last, actor=held.actor or beat.actor)
        self._some.set()

    async def take(self) -> tuple[str, list[Event], list[Beat]]:
        """This actor's name, and all that came since the last call, as soon as there is some."""
        await self._some.wait()
        self._some.clear()
        events, self._events = sorted(self._events, key=lambda one: one[0]), []
        beats, self._beats = list(self._beats.values()), {}
        return self.name, [event for _, event in events], beats

    async def halt(self, node: str | None = None) -> None:
        """End what runs on a node that is about to be taken away; None: everywhere, for good."""
        if node is None:
            self._everywhere = True
            for event in self._halts.values():
                event.set()
        else:
            self._halt(node).set()

    async def halted(self, node: str) -> Halt:
        """Returns when what runs on a node is to end."""
        if not self._everywhere:
            await self._halt(node).wait()
        return "interrupted" if self._everywhere else "preempted"

    def _halt(self, node: str) -> asyncio.Event:
        return self._halts.setdefault(node, asyncio.Event())


class Reports:
    """A worker's end of the line, for one attempt; use as a context manager."""

    def __init__(
        self, line: ActorHandle[Line], interval: float, attempt: str, pulse: Pulse
    ) -> None:
        import ray

        context = ray.get_runtime_context()
        self.node = context.get_node_id()
        self._line = line
        self._interval = interval
        self._attempt = attempt
        self._pulse = pulse
        self._actor = context.current_actor
        self._lock = threading.Lock()
        self._latest: dict[tuple[str, str], Event] = {}
        self._training = threading.get_ident()
        self._moved = (-1, time.monotonic())
        self._numbers = itertools.count()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._send_now_and_then, daemon=True)

    def __enter__(self) -> Self:
        self._send([])
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end.set()

    def start(self, point: Point, step: int) -> None:
        """Tell that a trial starts, or goes on from a step; at once."""
        steps = point.config.steps
        self._send([Event("trial_started", point.trial_id, point.label, step=step, steps=steps)])

    def record(self, point: Point, record: Record) -> None:
        """Tell a record with the next beat, unless a newer one has come by then."""
        event = Event(
            "record",
            point.trial_id,
            point.label,
            step=record.step,
            steps=point.config.steps,
            split=record.split,
            loss=record.loss,
            accuracy=record.accuracy,
        )
        with self._lock:
            self._latest[point.trial_id, record.split] = event

    def halted(self) -> Halt | None:
        """Why to end, if the driver has said so."""
        import ray

        pending = _halted(self._line, self.node)
        if not ray.wait([pending], timeout=0)[0]:
            return None
        try:
            return ray.get(pending)
        except ray.exceptions.RayError:  # the line, or its node, was lost: ask the next one
            _halted.cache_clear()
            return None

    def _send_now_and_then(self) -> None:
        while not self._end.wait(self._interval):
            with self._lock:
                events, self._latest = list(self._latest.values()), {}
            self._send(events)

    def _send(self, events: list[Event]) -> None:
        pulse, now = self._pulse, time.monotonic()
        number = next(self._numbers)
        beats = pulse.beats
        if beats != self._moved[0]:
            self._moved = (beats, now)
        stuck = now - self._moved[1] > STUCK_SECONDS
        beat = Beat(
            attempt=self._attempt,
            number=number,
            node=self.node,
            phase=pulse.phase,
            beats=beats,
            steps=dict(pulse.steps),
            unsaved=dict(pulse.unsaved),
            where=_where(self._training) if stuck else None,
            actor=None if number % TELL_ACTOR else self._actor,
        )
        self._line.report.remote(events, beat)


@functools.cache
def _halted(line: ActorHandle[Line], node: str) -> ObjectRef[Halt]:
    """One pending call a process: a look at whether it has returned asks nobody."""
    return line.halted.remote(node)


def _where(thread: int) -> str | None:
    """What a thread of this process is doing: its innermost line of code."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return None
    return f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"


@dataclass
class Heard:
    """What the driver has heard of an attempt, and when by its own clock."""

    beat: Beat
    at: float
    """When the last word came."""
    moved: float
    """When the last step was made, or the phase changed."""
    slowest: float = 0.0
    """Seconds of the slowest step so far."""
    actor: ActorHandle[Any] | None = None

    @classmethod
    def first(cls, beat: Beat, now: float) -> Heard:
        """The first beat."""
        return cls(beat, now, now, actor=beat.actor)

    def take(self, beat: Beat, now: float) -> None:
        """Take in another beat; one that was overtaken is late news."""
        self.actor = self.actor or beat.actor
        if beat.number < self.beat.number:
            return
        made = beat.beats - self.beat.beats
        if beat.phase != self.beat.phase or made:
            if beat.phase == self.beat.phase == "training" and made > 0:
                self.slowest = max(self.slowest, (now - self.moved) / made)
            self.moved = now
        self.beat, self.at = beat, now

    def wait(self, seconds: float) -> None:
        """Leave out a time in which the driver itself did not listen."""
        self.at += seconds
        self.moved += seconds

    def hung(self, limits: LimitsSpec, now: float, interval: float = 1.0) -> str | None:
        """Why it counts as hung; None: it does not.

        Args:
            limits: Of the sweep file.
            now: By the driver's clock.
            interval: Seconds between two beats.
        """
        own = limits.hang_seconds
        silence = max(SILENCE[0], own or SILENCE[1], MISSED * interval)
        if now - self.at > silence:
            return f"its worker said nothing for {now - self.at:.0f} s"
        least = {
            "preparing": PREPARE_SECONDS,
            "writing": limits.storage_seconds + (own or STEP_SECONDS),
        }
        allowed = least.get(self.beat.phase, own or max(STEP_SECONDS, SLOWEST * self.slowest))
        # A step is heard of with the next beat, and not before.
        if now - self.moved <= max(allowed, own or 0.0) + MISSED * interval:
            return None
        where = f", at {self.beat.where}" if self.beat.where else ""
        return f"no step for {now - self.moved:.0f} s while {self.beat.phase}{where}"
