"""What workers and the driver say to each other: reports and heartbeats go up, `halt` comes down.

Between them is one actor, beside the driver. A worker sends from a thread of its own, so that one
whose training hangs still says where, and one that says nothing is frozen or cut off.
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
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

from sweep.execution.job import Reporter
from sweep.execution.liveness import Heartbeat
from sweep.execution.scheduler import Event
from sweep.ledger.causes import Halt
from sweep.sweepfile.trials import Point

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

    from fpt.trainer import Record

STUCK_SECONDS = 10.0
"""Without a step, for a worker to say where it is."""

NAME_ACTOR_EVERY = 10
"""Of so many heartbeats one names the worker: the actor may be lost with the first one."""


class ReportingActor:
    """The actor between them. It holds nothing that the driver cannot tell it again."""

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        """Another one after a restart."""
        self._events: list[tuple[int, Event]] = []
        """Each with the number of the beat that it came with."""
        self._beats: dict[str, Heartbeat] = {}
        self._some = asyncio.Event()
        self._some.set()  # the first call of `take` tells the driver that this actor is new
        self._everywhere = False
        self._halts: dict[str, asyncio.Event] = {}
        """Node -> set when what runs there is to end."""
        self._secrets: Mapping[str, str] = {}
        self._has_secrets = asyncio.Event()

    async def set_secrets(self, variables: Mapping[str, str]) -> None:
        """Keep what opens the Hub and buckets, for workers that lack it.

        Not given when this actor is made, since of that Ray keeps a record.
        """
        self._secrets = variables
        self._has_secrets.set()

    async def secrets(self) -> Mapping[str, str]:
        """Return the secrets once they are here: a worker opens the ledger with them, and once."""
        await self._has_secrets.wait()
        return self._secrets

    async def report(self, events: list[Event], beat: Heartbeat) -> None:
        """Keep a worker's word until it is taken; of its beats the last one."""
        self._events += [(beat.number, event) for event in events]
        held = self._beats.get(beat.attempt, beat)
        last = max(held, beat, key=lambda one: one.number)
        self._beats[beat.attempt] = replace(last, actor=held.actor or beat.actor)
        self._some.set()

    async def take(self) -> tuple[str, list[Event], list[Heartbeat]]:
        """Return this actor's name, and all that came since the last call, once there is some."""
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
        """Return why what runs on a node is to end, once it is."""
        if not self._everywhere:
            await self._halt(node).wait()
        return "interrupted" if self._everywhere else "preempted"

    def _halt(self, node: str) -> asyncio.Event:
        return self._halts.setdefault(node, asyncio.Event())


class Channel:
    """The driver's end; it starts the actor, beside this process."""

    def __init__(self, secrets: Mapping[str, str]) -> None:
        """Start the actor.

        Args:
            secrets: Environment variables that workers get, from memory to memory.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(ReportingActor).options(
            num_cpus=0,
            max_concurrency=100_000,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=here,
        )
        self.actor = cast("ActorHandle[ReportingActor]", actor.remote())
        self._secrets = secrets
        self._name = ""
        self._halted: set[str | None] = set()
        self._coming: ObjectRef[tuple[str, list[Event], list[Heartbeat]]] | None = None

    def poll(self) -> tuple[list[Event], list[Heartbeat]]:
        """Return what workers have said since the last call; asks nobody, and never waits."""
        import ray

        self._coming = self._coming or self.actor.take.remote()
        if not ray.wait([self._coming], timeout=0)[0]:
            return [], []
        try:
            name, events, beats = ray.get(self._coming)
        except ray.exceptions.RayError:  # its process was killed: Ray starts another one
            return [], []
        finally:
            self._coming = None
        if name != self._name:
            self._name = name
            self.actor.set_secrets.remote(self._secrets)
            for node in self._halted:
                self.actor.halt.remote(node)
        return events, beats

    def halt(self, node: str | None = None) -> None:
        """End what runs on a node that is about to be taken away; None: everywhere, for good."""
        if node not in self._halted:
            self._halted.add(node)
            self.actor.halt.remote(node)


class HeartbeatSender(Reporter):
    """A worker's end, for one attempt; use as a context manager."""

    def __init__(self, actor: ActorHandle[ReportingActor], interval: float, attempt: str) -> None:
        super().__init__()
        import ray

        context = ray.get_runtime_context()
        self.node = context.get_node_id()
        self._channel = actor
        self._interval = interval
        self._attempt = attempt
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
        """Report that a trial starts, or goes on from a step; at once."""
        steps = point.config.steps
        self._send([Event("trial_started", point.trial_id, point.label, step=step, steps=steps)])

    def record(self, point: Point, record: Record) -> None:
        """Report a record with the next beat, unless a newer one has come by then."""
        super().record(point, record)
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
        """Return why to end, if the driver has said so."""
        import ray

        pending = _halted(self._channel, self.node)
        if not ray.wait([pending], timeout=0)[0]:
            return None
        try:
            return ray.get(pending)
        except ray.exceptions.RayError:  # the actor, or its node, was lost: ask the next one
            _halted.cache_clear()
            return None

    def _send_now_and_then(self) -> None:
        while not self._end.wait(self._interval):
            with self._lock:
                events, self._latest = list(self._latest.values()), {}
            self._send(events)

    def _send(self, events: list[Event]) -> None:
        now = time.monotonic()
        number = next(self._numbers)
        beats = self.beats
        if beats != self._moved[0]:
            self._moved = (beats, now)
        stuck = now - self._moved[1] > STUCK_SECONDS
        beat = Heartbeat(
            attempt=self._attempt,
            number=number,
            node=self.node,
            phase=self.phase,
            beats=beats,
            steps=dict(self.steps),
            unsaved=self.unsaved,
            where=_where(self._training) if stuck else None,
            actor=None if number % NAME_ACTOR_EVERY else self._actor,
        )
        self._channel.report.remote(events, beat)


@functools.cache
def _halted(actor: ActorHandle[ReportingActor], node: str) -> ObjectRef[Halt]:
    """One pending call a process: a look at whether it has returned asks nobody."""
    return actor.halted.remote(node)


def _where(thread: int) -> str | None:
    """Return what a thread of this process is doing: its innermost line of code."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return None
    return f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"
