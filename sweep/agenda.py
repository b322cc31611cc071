"""What a run still has to do, and what comes next: dependencies, retries, when to give up.

Nothing of Ray is here. The driver asks for the next job and tells what came of each; whatever a
person may want to know of that is emitted as an event.

Where a pack fails as a whole, nobody knows which of its trials is to blame. It is cut in halves,
and these again, until the one that fails is alone: only then is it held against it. The others go
on from their states, in smaller packs. A worker may die of what is no trial's fault, so that its
pack is tried once more as it is first.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from sweep.ledger import new_attempt
from sweep.trials import Point
from sweep.worker import Job, Result

if TYPE_CHECKING:
    from sweep.planning import Pack, Plan

ATTEMPTS = 3
"""Attempts at a trial in one run, where the environment is to blame (worker, storage). Those that
ended with the worker of a pack are not counted."""

SAME_FAILURE = 5
"""Trials that fail in the same way, with no success in between, for the sweep to stop early."""


@dataclass(frozen=True)
class Event:
    """Something that a person who watches may want to know."""

    kind: Literal["trial_started", "record", "trial_done", "trial_failed", "waiting", "message"]
    trial_id: str | None = None
    label: str = ""
    step: int | None = None
    steps: int | None = None
    """The most steps that the trial may take."""
    split: str | None = None
    loss: float | None = None
    accuracy: float | None = None
    message: str | None = None


OnEvent = Callable[[Event], None]


class Agenda:
    """The packs of a plan, in the plan's order, each one once what it needs has ended well."""

    def __init__(self, planned: Plan, failures: Mapping[str, int], emit: OnEvent) -> None:
        """Take a plan, the number of earlier failed attempts by trial id, and who is told."""
        self.emit = emit
        self.stopped: str | None = None
        """Why nothing more is handed out; None as long as something may be."""
        self.failed: dict[str, str] = {}
        """Trial id -> why it failed, or will not be tried."""
        self.running: dict[str, Job] = {}
        """Attempt -> its job."""
        self._keep_states = planned.sweep.keep.trained
        self._keep_backbones = planned.sweep.keeps_backbones
        self._attempts = Counter(failures)
        self._tries: Counter[str] = Counter()
        """Trial id -> attempts in this run that count."""
        self._packs = list(planned.packs)
        self._pack_of: dict[str, int] = {}
        """Attempt -> its pack."""
        self._open = {point.trial_id for pack in self._packs for point in pack.points}
        """Trials that have not ended well yet."""
        self._ready: list[int] = []
        """A heap of packs, by their place in the plan."""
        self._users: dict[str, set[int]] = defaultdict(set)
        """Trial id -> the packs that wait for its backbone."""
        self._alike: dict[tuple[str | None, str | None], set[str]] = defaultdict(set)
        """Exception and message -> the trials that it ended since the last success."""
        for index in range(len(self._packs)):
            self._enqueue(index)

    def _enqueue(self, index: int) -> None:
        needs = self._needs(index)
        for parent in needs:
            self._users[parent].add(index)
        if not needs:
            heapq.heappush(self._ready, index)

    def _needs(self, index: int) -> set[str]:
        return {p.parent for p in self._packs[index].points if p.parent in self._open and p.parent}

    @property
    def finished(self) -> bool:
        """Whether nothing more will be handed out."""
        return self.stopped is not None or not (self._ready or self.running)

    def stop(self, why: str) -> None:
        """Hand out nothing more."""
        if self.stopped is None:
            self.stopped = why
            self.emit(Event("message", message=why))

    def next(self) -> Job | None:
        """The next job; None where nothing is left, or all that is left waits for a running one."""
        if self.stopped is not None or not self._ready:
            return None
        index = heapq.heappop(self._ready)
        pack = self._packs[index]
        ids = [point.trial_id for point in pack.points]
        self._attempts.update(ids)
        job = Job(
            points=pack.points,
            resources=pack.resources,
            attempt=new_attempt(),
            attempts={i: self._attempts[i] for i in ids},
            keep_backbones=tuple(self._keep_backbones.intersection(ids)),
            keep_states=self._keep_states,
            extends=pack.extends,
        )
        self.running[job.attempt] = job
        self._pack_of[job.attempt] = index
        return job

    def ended(self, attempt: str, results: Sequence[Result]) -> None:
        """Take in what came of a job."""
        job = self.running.pop(attempt)
        pack = self._packs[self._pack_of.pop(attempt)]
        points = {point.trial_id: point for point in job.points}
        failed = {r.trial_id: r for r in results if r.status == "failed"}
        again: list[Point] = []
        """To be tried once more, side by side as they are."""
        halved: list[Point] = []
        """One of these is to blame, or together they are too much."""
        for result in results:
            point = points[result.trial_id]
            shared = len(failed) > 1
            if result.status != "failed":
                self._finished(point, result)
            elif result.cause == "interrupted":
                continue  # it stays open: what needs it is not tried either
            elif result.undecided or (result.cause == "memory" and len(points) > 1):
                halved.append(point)
            elif result.cause == "worker" and shared:
                (halved if pack.deaths else again).append(point)
            elif result.cause in ("worker", "storage") and self._may_try_again(point):
                again.append(point)
            else:
                self._failed(point, result)
        deaths = pack.deaths + any(result.cause == "worker" for result in failed.values())
        if again:
            how = "tried again from its last state"
            self._append(replace(pack, points=tuple(again), deaths=deaths), failed, how)
        half = (len(halved) + 1) // 2
        for part in filter(None, (halved[:half], halved[half:])):
            how = "tried in a smaller pack" if len(part) > 1 else "tried alone"
            self._append(replace(pack, points=tuple(part), deaths=deaths), failed, how)

    def _may_try_again(self, point: Point) -> bool:
        """Count an attempt at a trial that failed; whether there may be another one."""
        self._tries[point.trial_id] += 1
        return self._tries[point.trial_id] < ATTEMPTS

    def _append(self, pack: Pack, failed: Mapping[str, Result], how: str) -> None:
        """Take in what is left of a pack, and say why."""
        first = pack.points[0]
        more = f" (and {len(pack.points) - 1:,} more trials)" if pack.points[1:] else ""
        why = f"{first.label}{more}: {failed[first.trial_id].message}; it is {how}"
        self.emit(Event("message", message=why))
        self._packs.append(pack)
        self._enqueue(len(self._packs) - 1)

    def _finished(self, point: Point, result: Result) -> None:
        self._alike.clear()
        diverged = result.status == "diverged"
        self.emit(
            Event(
                "trial_done",
                point.trial_id,
                point.label,
                split="test",
                loss=result.loss,
                accuracy=result.accuracy,
                message="diverged" if diverged else result.message,
            )
        )
        if diverged:
            self._give_up_users(point, "diverged")
            return
        self._open.discard(point.trial_id)
        for index in self._users.pop(point.trial_id, ()):
            if not self._needs(index):
                heapq.heappush(self._ready, index)

    def _failed(self, point: Point, result: Result) -> None:
        why = f"{result.exception}: {result.message}"
        self._give_up(point, why)
        alike = self._alike[result.exception, result.message]
        alike.add(point.trial_id)
        if len(alike) >= SAME_FAILURE:
            self.stop(
                f"the sweep stops early: {len(alike)} trials in a row failed in the same way "
                f"({why}); mend the cause, then sweep retry and sweep run"
            )

    def _give_up(self, point: Point, why: str) -> None:
        self.failed[point.trial_id] = why
        self.emit(Event("trial_failed", point.trial_id, point.label, message=why))
        self._give_up_users(point, "failed")

    def _give_up_users(self, point: Point, how: str) -> None:
        for index in self._users.pop(point.trial_id, ()):
            for user in self._packs[index].points:
                if user.trial_id not in self.failed:
                    self._give_up(user, f"{point.label}, whose backbone it takes, {how}")
