"""A run in progress: what is heard of its attempts, when it is to stop, and how it does.

Tune's thread calls `Monitor.poll` many times a second, which never waits. What may have to wait for
storage or for Ray is done in a thread beside it.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, Self

from sweep.execution.interrupts import Interrupts
from sweep.execution.job import Job, Result
from sweep.execution.liveness import AttemptHealth, Heartbeat
from sweep.execution.postmortem import results_of_lost_worker
from sweep.execution.reservations import ReservationsAhead
from sweep.execution.scheduler import Event, OnEvent, Scheduler
from sweep.execution.worker import Train
from sweep.ledger.ledger import Lease, Ledger, LedgerError
from sweep.sweepfile.trials import Sweep

if TYPE_CHECKING:
    from ray.actor import ActorHandle

STOP_SECONDS = 5.0
"""What running trials have to save their states after Ctrl-C; then they are killed."""

TERM_SECONDS = 25.0
"""What they have after any other signal: Slurm and Kubernetes kill 30 s after SIGTERM, and a Ray
job that is stopped has a minute (`sweep.cluster.submission.STOP_SECONDS`). Ray needs the rest."""

END_SECONDS = 120.0
"""What they have where nobody waits for it: at the end of a time budget, or in a pause."""

POLL_INTERVAL = 2.0
"""Seconds between two looks at what is asked of a running driver from elsewhere."""

LOOK_AGAIN_SECONDS = 3.0
"""Between two looks at the trials that other drivers train."""

LOOK_AGAIN_PACKS = 4
"""Packs that such a look asks for, a slot."""

WAIT_MESSAGE_AFTER = 30.0
"""Seconds with nothing running, after which a message says what is waited for."""

SHOWN = 100
"""Running trials that a driver describes to `sweep status`."""

REPORTS_A_SECOND = 50
"""Reports that the driver should get in a second, from all workers together."""

HEAD_AWAY = ("RAY_gcs_rpc_server_reconnect_timeout_s", 60.0)
"""How long Ray bears a head that is away, before it aborts the process with a stack trace."""


class Messages(Protocol):
    """The driver's end of `sweep.execution.channel`."""

    def poll(self) -> tuple[Sequence[Event], Sequence[Heartbeat]]:
        """Return what workers have said since the last call."""

    def halt(self, node: str | None = None) -> None:
        """End what runs on a node, or everywhere."""


class Connected(Protocol):
    """What of `sweep.cluster.connection.Connection` a run asks for."""

    @property
    def own(self) -> bool:
        """Whether it is a Ray of our own."""

    def ended(self) -> Sequence[str]:
        """Return the processes of our own Ray that have ended."""

    def draining_nodes(self) -> frozenset[str]:
        """Return the nodes that are about to be taken away."""

    def abandon(self) -> None:
        """Remove what is ours without asking Ray."""


@dataclass(frozen=True)
class RunContext:
    """What all parts of a run share."""

    ledger: Ledger
    lease: Lease
    interrupts: Interrupts
    emit: OnEvent
    train: Train
    address: str | None = None
    max_concurrent: int | None = None
    gpus: float | None = None
    stale: bool = False
    deadline: float | None = None
    """When the time budget ends, by the monotonic clock."""


class Phase(Enum):
    """How far a run is."""

    RUNNING = "running"
    DRAINING = "draining"
    """Nothing more is handed out; running trials save their states."""
    KILLED = "killed"
    """What still ran was killed."""


@dataclass(frozen=True)
class Stop:
    """Why a run is to stop."""

    why: str
    patience: float
    """Seconds that running trials have to save their states."""


def stop_reason(
    *,
    signals: int | None = None,
    ended: Sequence[str] = (),
    paused: bool = False,
    past_deadline: bool = False,
    lease_lost: bool = False,
    storage_silent_for: float = 0.0,
    storage_limit: float = float("inf"),
    storage: str = "storage",
) -> Stop | None:
    """Return why a run is to stop, the most urgent reason first; None: it goes on.

    Args:
        signals: The signal that came first, if one did.
        ended: Processes of a Ray of our own without which nothing trains.
        paused: Whether somebody asked for a pause.
        past_deadline: Whether the time budget is used up.
        lease_lost: Whether another driver has this one's lease, for good.
        storage_silent_for: Seconds for which the lease could not be renewed.
        storage_limit: `limits.storage_seconds` of the sweep file.
        storage: What the ledger calls itself.
    """
    saving = "running trials save their states"
    if signals == signal.SIGINT:
        return Stop(f"stopping: {saving}; Ctrl-C again kills them", STOP_SECONDS)
    if signals is not None:
        return Stop(f"stopping: {saving}", TERM_SECONDS)
    if ended:
        what = f"{' and '.join(ended)} of our own Ray has ended"
        return Stop(f"stopping: {what}; {saving}", TERM_SECONDS)
    if paused:
        return Stop(f"stopping: somebody asked for a pause; {saving}", END_SECONDS)
    if past_deadline:
        return Stop(f"stopping: the time is up; {saving}", END_SECONDS)
    if lease_lost:
        return Stop("stopping: another driver has taken over this cluster", END_SECONDS)
    if storage_silent_for > storage_limit:
        why = f"stopping: {storage} has not answered for {storage_limit:.0f} s"
        return Stop(why, END_SECONDS)
    return None


def go_on_command(sweep: Sweep, ledger: Ledger) -> str:
    """Return the command that goes on where a run stopped."""
    return shlex.join(["sweep", "run", str(sweep.file), "--results", ledger.uri])


class Monitor:
    """Hands out jobs, takes in what comes of them, and stops when it is time to.

    As a context manager it looks, in a thread of its own, at what may have to be waited for.
    """

    def __init__(
        self,
        context: RunContext,
        sweep: Sweep,
        scheduler: Scheduler,
        *,
        slots: int,
        channel: Messages,
        connection: Connected,
        reservations: ReservationsAhead,
        kill: Callable[[ActorHandle[Any]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take a run.

        Args:
            context: What all its parts share.
            sweep: What is run.
            scheduler: What is left of it to do.
            slots: Packs at once.
            channel: From and to the workers.
            connection: To Ray.
            reservations: Where those of ended trials are let go of.
            kill: Ends a worker. Default: Ray does.
            clock: Tells the time, in seconds.
        """
        self.context = context
        self.sweep = sweep
        self.scheduler = scheduler
        self.slots = slots
        self.interval = max(1.0, slots / REPORTS_A_SECOND)
        """Seconds between two heartbeats of a worker."""
        self.channel = channel
        self.connection = connection
        self.phase = Phase.RUNNING
        self.stopped = False
        """Whether it was stopped by somebody, or by its time."""
        self.paused = False
        """Whether somebody asked for a pause."""
        self.health: dict[str, AttemptHealth] = {}
        """Attempt -> what was heard of it; without an entry it has not begun."""
        self.being_killed: dict[str, str] = {}
        """Attempt -> why its worker is being ended."""
        self._reservations = reservations
        self._kill = kill or _kill
        self._clock = clock
        self._error: Exception | None = None
        self._kill_at: float | None = None
        self._quiet_at: float | None = None
        """When all that was trained before the halt has been heard of."""
        now = clock()
        self._polled = self._busy = self._held = now
        """When it was called, something ran, and the lease was held: last."""
        self._looked = self._judged = 0.0
        self._ended: Sequence[str] = ()
        self._draining: frozenset[str] = frozenset()
        self._halted: frozenset[str] = frozenset()
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        for name, work in (("checks", self._check_now_and_then), ("head", self._watch_head)):
            thread = threading.Thread(target=work, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._threads[0].join(POLL_INTERVAL)

    # ------------------------------------------------------------------------ beside Tune's thread

    def _watch_head(self) -> None:
        import ray

        watch_head(
            ray.get_runtime_context().gcs_address,
            self._end,
            self._leave,
            # It does not come back, if it is one of ours.
            most=TERM_SECONDS + STOP_SECONDS if self.connection.own else None,
        )

    def _leave(self, why: str) -> None:
        with suppress(LedgerError):
            self.context.lease.release()
        again = go_on_command(self.sweep, self.context.ledger)
        sys.stderr.write(
            f"\n{why}; rows and states are kept; once it is there, or another one, go on with:\n"
            f"  {again}\n"
        )
        sys.stderr.flush()
        self.connection.abandon()
        os._exit(1)

    def _check_now_and_then(self) -> None:
        while not self._end.wait(POLL_INTERVAL):
            self.check_from_outside()

    def check_from_outside(self) -> None:
        """Look at what is asked of this run from elsewhere; may wait for storage or Ray."""
        self._ended = self.connection.ended()
        with suppress(LedgerError):
            self.paused = self.context.ledger.notes.paused(self.sweep.name)
        with suppress(Exception):  # a head that is gone is noticed where it matters
            self._draining = self.connection.draining_nodes()
        # It tells of what Tune's thread changes meanwhile, and is for people alone: whatever
        # becomes of it, a pause has to be seen.
        with suppress(Exception):
            self.context.lease.note = self._note()

    def _note(self) -> Mapping[str, Any]:
        """Return what `sweep status` may want to know."""
        now = self._clock()
        running: dict[str, Any] = {}
        waiting = 0
        for attempt, job in list(self.scheduler.running.items()):
            health = self.health.get(attempt)
            if health is None:
                waiting += len(job.points)
                continue
            for point in job.points[: SHOWN - len(running)]:
                running[point.trial_id] = {
                    "step": health.beat.steps.get(point.trial_id),
                    "phase": health.beat.phase,
                    "seconds": round(now - health.moved),
                }
        return {
            "sweep": self.sweep.name,
            "running": running,
            "waiting": waiting,
            "elsewhere": list(self.scheduler.claimed_elsewhere[:SHOWN]),
            "tries": self.scheduler.tries(SHOWN),
        }

    # ---------------------------------------------------------------------------- in Tune's thread

    @property
    def finished(self) -> bool:
        """Whether nothing more will be handed out."""
        return self.scheduler.finished or self.context.interrupts.count > 0

    def next(self) -> Job | None:
        """Return the next job, if there is one and it may be handed out now."""
        now = self._clock()
        if now - self._looked >= LOOK_AGAIN_SECONDS:
            self._looked = now
            self.scheduler.retry_deferred(LOOK_AGAIN_PACKS * self.slots)
        if not self.context.lease.held or len(self.scheduler.running) >= self.slots:
            return None
        return self.scheduler.next()

    def ended(self, attempt: str, results: Sequence[Result]) -> None:
        """Take in what came of a job."""
        job = self.scheduler.running[attempt]
        health = self.health.pop(attempt, None)
        self.being_killed.pop(attempt, None)
        self.scheduler.ended(attempt, results, health.beat.node if health else None)
        self._reservations.release(point.trial_id for point in job.points)

    def lost(self, attempt: str, error: BaseException | None) -> None:
        """Take in that the worker of a job did not return."""
        job = self.scheduler.running[attempt]
        health, why = self.health.get(attempt), self.being_killed.get(attempt)
        self.ended(attempt, results_of_lost_worker(job, self.context.ledger, error, health, why))

    @contextmanager
    def capture_error(self) -> Iterator[None]:
        """Keep what is raised for `check`: Tune would take it for a failure of the trial."""
        try:
            yield
        except Exception as error:
            self._error = self._error or error

    def check(self) -> None:
        """Raise what Tune was spared: a fault of ours, or of `on_event`."""
        if self._error is not None:
            raise self._error

    def poll(self) -> None:
        """Listen, and do what is due; called many times a second.

        Raises:
            KeyboardInterrupt: If what still runs is to be killed.
        """
        self.check()
        now = self._clock()
        self._leave_out(now - self._polled)
        self._polled = now
        self._listen(now)
        self._drain_if_due(now)
        for node in self._draining - self._halted:
            self._halted |= {node}
            self.channel.halt(node)
        if now - self._judged >= 1:
            self._judged = now
            self._end_the_hung(now)

    def _leave_out(self, stood: float) -> None:
        """Hold against nobody a time in which it was this process that stood still."""
        if stood <= POLL_INTERVAL:
            return
        self._held += stood
        if self._quiet_at is not None:
            self._quiet_at += stood
        for health in self.health.values():
            health.wait(stood)

    def _listen(self, now: float) -> None:
        events, beats = self.channel.poll()
        for beat in beats:
            if beat.attempt in self.health:
                self.health[beat.attempt].take(beat, now)
            elif beat.attempt in self.scheduler.running:
                self.health[beat.attempt] = AttemptHealth.first(beat, now)
        if not events:
            return
        running = {p.trial_id for job in self.scheduler.running.values() for p in job.points}
        for event in events:
            # What a worker said of a trial may come later than the trial's end.
            if event.trial_id in running:
                self.scheduler.emit(event)

    def _drain_if_due(self, now: float) -> None:
        lease, deadline = self.context.lease, self.context.deadline
        if lease.held:
            self._held = now
        stop = stop_reason(
            signals=self.context.interrupts.first,
            ended=self._ended,
            paused=self.paused,
            past_deadline=deadline is not None and now > deadline,
            lease_lost=lease.lost,
            storage_silent_for=now - self._held,
            storage_limit=self.sweep.spec.limits.storage_seconds,
            storage=self.context.ledger.uri,
        )
        if stop is not None:
            self.stopped = True
            self.scheduler.stop(stop.why)
            end = now + stop.patience
            self._kill_at = end if self._kill_at is None else min(self._kill_at, end)
        if self.scheduler.stopped is not None and self.phase is Phase.RUNNING:
            self.phase = Phase.DRAINING
            self.channel.halt()
            # The last heartbeat may be as old as the interval, and the next one needs its way.
            self._quiet_at = now + 2 * self.interval + 1.0
        if self._kill_at is not None and (now > self._kill_at or self._idle(now)):
            self.phase = Phase.KILLED
            raise KeyboardInterrupt

    def _idle(self, now: float) -> bool:
        """Return whether nothing that runs has made a step that could be saved: workers may be
        importing for long. A step is known by its heartbeat, since records are few.
        """
        if not self.scheduler.running:
            return True
        if self._quiet_at is None or now <= self._quiet_at:
            return False
        return not any(health.beat.beats for health in self.health.values())

    def _end_the_hung(self, now: float) -> None:
        if self.health or not self.scheduler.running:
            self._busy = now
        elif now - self._busy > WAIT_MESSAGE_AFTER:
            wanted = next(iter(self.scheduler.running.values())).resources
            what = ", ".join(f"{number:g} {name}" for name, number in wanted.items())
            text = f"no worker has begun yet: each asks the cluster for {what}"
            self.scheduler.emit(Event("waiting", message=text))
            self._busy = now
        for attempt, health in self.health.items():
            why = health.hung(self.sweep.spec.limits, now, self.interval)
            if why and attempt not in self.being_killed and health.actor is not None:
                self.being_killed[attempt] = why
                self._kill(health.actor)


def _kill(actor: ActorHandle[Any]) -> None:
    import ray

    ray.kill(actor)


def watch_head(
    address: str,
    end: threading.Event,
    leave: Callable[[str], None],
    *,
    most: float | None = None,
    every: float = POLL_INTERVAL,
) -> None:
    """Call `leave` with a sentence once the head is away for long, before Ray aborts this process.

    For a thread of its own: what asks the head for anything waits inside Ray, out of reach of any
    exception.

    Args:
        address: HOST:PORT of the head.
        end: Set when the run has ended.
        leave: Is expected to end this process.
        most: Seconds to wait at most, where that is less than what Ray bears.
        every: Seconds between two looks.
    """
    host, _, port = address.rpartition(":")
    patience = 0.75 * float(os.environ.get(*map(str, HEAD_AWAY)))
    patience = patience if most is None else min(patience, most)
    away: float | None = None
    while not end.wait(every):
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            away = None
        except OSError:
            away = away or time.monotonic()
            if time.monotonic() - away >= patience and not end.is_set():
                leave(f"{address}: the head of the cluster has not answered for {patience:.0f} s")
                return
