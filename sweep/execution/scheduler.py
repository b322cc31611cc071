"""What a run still has to do, and what comes next: dependencies, retries, when to give up.

Nothing of Ray is here. The driver asks for the next job and reports what came of each; whatever a
person may want to know of that is emitted as an event.

Where a pack fails as a whole, nobody knows which of its trials is to blame. It is cut in halves,
and these again, until the one that fails is alone: only then is it held against it. The others go
on from their states, in smaller packs. A worker may die of what is no trial's fault, so that its
pack is tried again as it is, unless it has died at the same place before.

What the first packs of a kind of trials show holds for the others: if one was too much for the
memory, they are cut before they start; if they were no quicker, the rest goes alone.

How often a trial is tried again is the sweep file's to say (`retry`), cause by cause. One that runs
out of memory by itself is tried at the end, each batch in more parts, with nothing beside it on its
device: a whole GPU, or all cores of a node. Other devices go on. What a device or a node failed is
tried on another node.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from sweep.execution.job import Job, Result
from sweep.ledger.causes import WAITS
from sweep.ledger.ledger import new_attempt
from sweep.planning.packing import ENOUGH, kind_of
from sweep.sweepfile.trials import Point

if TYPE_CHECKING:
    from sweep.planning.plan import Pack, Plan
    from sweep.sweepfile.schema import RetrySpec

SAME_FAILURE = 5
"""Configs that fail in the same way, with no success in between, for the sweep to stop early; of a
sweep that has fewer, so many trials."""

SAME_PLACE = (20, 0.1)
"""Steps, and the part of all steps so far, between two places that count as the same: what is heard
of a trial is a moment old."""


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

Claim = Callable[[Sequence[str]], Collection[str]]
"""Told trial ids, says which of them are ours to train now; another driver has the others."""


Follow = Callable[[str], "Plan | None"]
"""Told the id of a trial that has ended, gives a plan of what has become known by it."""

NoQuicker = Callable[[], Set[tuple[object, ...]]]
"""Gives the kinds of trials that are by now measured to be no quicker in packs."""


Decision = Literal["finish", "leave", "chance", "requeue", "split", "alone", "fail"]
"""What becomes of a trial whose attempt has ended.

finish: it has an outcome. leave: it was stopped, and stays open. chance: tried again with its pack,
held against nobody. requeue: tried again, and held against it. split: it, or another one of its
pack, is to blame, or together they are too much. alone: tried with a device to itself. fail: not
tried again."""


def decide(
    result: Result, pack: Job, failed: Mapping[str, Result], retry: RetrySpec, tries: int
) -> Decision:
    """Return what becomes of a trial whose attempt has ended.

    Args:
        result: What came of it.
        pack: The pack that it was in, as it began.
        failed: Those of the pack that failed, it included: trial id -> result.
        retry: The budgets of the sweep file.
        tries: Failures by the same cause in this run that are held against it already.
    """
    cause = result.cause or "worker"
    if result.status != "failed":
        return "finish"
    if cause == "interrupted":
        return "leave"  # what needs it is not tried either
    if result.undecided or (cause == "memory" and len(pack.points) > 1):
        return "split"
    if cause == "worker" and len(failed) > 1:
        return "chance" if _may_be_chance(pack, failed, retry.worker) else "split"
    if cause in WAITS:
        return "fail"
    budget: int | None = getattr(retry, cause)
    if budget is not None and tries >= budget:
        return "fail"
    if cause == "memory":
        fits = 2 * pack.accumulation <= pack.points[0].config.batch_size
        return "alone" if fits else "fail"
    return "requeue"


def _may_be_chance(pack: Job, failed: Mapping[str, Result], budget: int | None) -> bool:
    """Return whether the death of a worker may have nothing to do with what it trained."""
    if not pack.deaths:
        return True
    steps, part = SAME_PLACE
    same = all(
        abs(now - before) <= steps + part * max(now, before)
        for name, now in _died_at(failed).items()
        if (before := pack.died_at.get(name)) is not None
    )
    return not same and (budget is None or pack.deaths < budget)


def _died_at(failed: Mapping[str, Result]) -> dict[str, int]:
    """Return the step last heard of each trial whose worker died."""
    return {name: one.step or 0 for name, one in failed.items() if one.cause == "worker"}


class Scheduler:
    """The packs of a plan, in the plan's order, each one once what it needs has ended well."""

    def __init__(
        self,
        planned: Plan,
        failures: Mapping[str, int],
        emit: OnEvent,
        *,
        accumulation: Mapping[str, int] | None = None,
        device: Mapping[str, float] | None = None,
        claim: Claim | None = None,
        follow: Follow | None = None,
        no_quicker: NoQuicker | None = None,
    ) -> None:
        """Take a plan.

        Args:
            planned: What is to be done.
            failures: Trial id -> number of failed attempts in earlier runs.
            emit: Who is told.
            accumulation: Trial id -> parts of a batch, of those that were alone and out of memory
                in earlier runs.
            device: Resources of a whole device, for what has to be alone on one. Default: what any
                pack gets.
            claim: Asked before trials are handed out. Default: all are ours.
            follow: Called with the id of each trial that has ended with a row; gives a plan of the
                trials that have become known by it, if there are any.
            no_quicker: Called once enough trials of a kind have ended in packs; what it gives is
                no longer packed. Default: nothing.
        """
        self.emit = emit
        self.stopped: str | None = None
        """Why nothing more is handed out; None as long as something may be."""
        self.failed: dict[str, str] = {}
        """Trial id -> why it failed, or will not be tried."""
        self.running: dict[str, Job] = {}
        """Attempt -> its job."""
        self._device = device
        self._keep_states = planned.sweep.keep.trained
        self._keep_backbones = planned.sweep.keeps_backbones
        self._attempts = Counter(failures)
        self._retry = planned.sweep.spec.retry
        self._limits = planned.sweep.spec.limits
        self._claim: Claim = claim or (lambda ids: ids)
        self._follow: Follow = follow or (lambda trial_id: None)
        self._no_quicker: NoQuicker = no_quicker or frozenset
        self._most: dict[tuple[object, ...], int] = {}
        """Kind of trial -> the most of them in a pack, where packs have shown that."""
        self._packed: Counter[tuple[object, ...]] = Counter()
        """Kind of trial -> how many of them have ended in packs."""
        self._tries: Counter[tuple[str, str]] = Counter()
        """Trial id, cause -> failures in this run that are held against the trial."""
        self._packs = [self._job(pack) for pack in planned.packs]
        cells = {point.cell_id for pack in self._packs for point in pack.points}
        self._few = len(cells) < SAME_FAILURE
        self._pack_of: dict[str, int] = {}
        """Attempt -> its pack."""
        self._open = {point.trial_id for pack in self._packs for point in pack.points}
        """Trials that have not ended well yet."""
        self._ready: list[int] = []
        """A heap of packs, by their place in the plan."""
        self._last: list[int] = []
        """Those that are to be alone, in the order to try them."""
        self._elsewhere: deque[int] = deque()
        """Those that other drivers train."""
        self._asked: set[int] = set()
        """Those of them that are asked for anew."""
        self._users: dict[str, set[int]] = defaultdict(set)
        """Trial id -> the packs that wait for its backbone."""
        self._alike: dict[tuple[str | None, str | None], set[str]] = defaultdict(set)
        """Exception and message -> the configs (or trials) that it ended since the last success."""
        for index, pack in enumerate(self._packs):
            parts = max((accumulation or {}).get(p.trial_id, 1) for p in pack.points)
            if parts > 1 and len(pack.points) == 1:
                self._packs[index] = self._alone(pack, parts)
            self._enqueue(index)

    def _job(self, pack: Pack) -> Job:
        """Return a pack of a plan as a job that nobody has tried."""
        keep, limits = self._keep_states, self._limits
        return Job(pack.points, pack.resources, pack.extends, keep_states=keep, limits=limits)

    def _enqueue(self, index: int) -> None:
        needs = self._needs(index)
        for parent in needs:
            self._users[parent].add(index)
        if needs:
            return
        if self._packs[index].alone:
            self._last.append(index)
        else:
            heapq.heappush(self._ready, index)

    def _needs(self, index: int) -> set[str]:
        return {p.parent for p in self._packs[index].points if p.parent in self._open and p.parent}

    @property
    def finished(self) -> bool:
        """Whether nothing more will be handed out."""
        left = self._ready or self._last or self._elsewhere or self.running
        return self.stopped is not None or not left

    @property
    def claimed_elsewhere(self) -> tuple[str, ...]:
        """The trials that other drivers train; `retry_deferred` makes them be asked for anew."""
        # Other threads ask too, while this deque changes: `list` copies it in one go.
        return tuple(p.trial_id for i in list(self._elsewhere) for p in self._packs[i].points)

    def tries(self, most: int) -> dict[str, dict[str, int]]:
        """Trial id -> cause -> failures in this run, of trials that are not done; so many."""
        found: dict[str, dict[str, int]] = {}
        for (name, cause), number in list(self._tries.items()):
            if name in self._open and (name in found or len(found) < most):
                found.setdefault(name, {})[cause] = number
        return found

    def retry_deferred(self, most: int) -> None:
        """Take so many packs that other drivers had for ours, until the claim says otherwise.

        Not all of them: each one costs a request or two. For each that turns out to be ours `next`
        takes one more.
        """
        for _ in range(min(most, len(self._elsewhere))):
            index = self._elsewhere.popleft()
            self._asked.add(index)
            self._enqueue(index)

    def upcoming(self, most: int) -> tuple[str, ...]:
        """Return the trials of so many packs that are handed out next; any thread may ask."""
        ready = heapq.nsmallest(most, list(self._ready))
        return tuple(p.trial_id for index in ready for p in self._packs[index].points)

    def stop(self, why: str) -> None:
        """Hand out nothing more."""
        if self.stopped is None:
            self.stopped = why
            self.emit(Event("message", message=why))

    def next(self) -> Job | None:
        """Return the next job; None where nothing is left, or all that is left waits for a running
        one.
        """
        while (index := self._pop()) is not None:
            pack = self._packs[index] = self._no_larger_than_known(self._packs[index])
            claimed = set(self._claim([point.trial_id for point in pack.points]))
            ours = tuple(p for p in pack.points if p.trial_id in claimed)
            theirs = tuple(p for p in pack.points if p.trial_id not in claimed)
            asked = index in self._asked
            self._asked.discard(index)
            if not ours:
                self._elsewhere.append(index)
                continue
            if asked:
                self.retry_deferred(1)
            if theirs:
                pack = self._packs[index] = replace(pack, points=ours)
                self._packs.append(replace(pack, points=theirs))
                self._elsewhere.append(len(self._packs) - 1)
            return self._start(index, pack)
        return None

    def _pop(self) -> int | None:
        if self.stopped is not None:
            return None
        if self._ready:
            return heapq.heappop(self._ready)
        return self._last.pop(0) if self._last else None

    def _alone(self, pack: Job, parts: int) -> Job:
        """Return the pack, to be tried at the end, by itself on a device."""
        device = self._device or pack.resources
        return replace(pack, resources=device, accumulation=parts, alone=True)

    def _no_larger_than_known(self, pack: Job) -> Job:
        """Return the first part of a pack that another one like it has shown to be too large."""
        if not self._most or len(pack.points) == 1:
            return pack
        kinds = {kind_of(point.config) for point in pack.points}
        most = min(self._most.get(kind, len(pack.points)) for kind in kinds)
        if most >= len(pack.points):
            return pack
        for start in range(most, len(pack.points), most):
            self._packs.append(replace(pack, points=pack.points[start : start + most]))
            self._enqueue(len(self._packs) - 1)
        return replace(pack, points=pack.points[:most])

    def _learn(self, job: Job, results: Sequence[Result]) -> None:
        """Take in what a pack has shown of others like it."""
        if len(job.points) == 1:
            return
        kinds = Counter(kind_of(point.config) for point in job.points)
        if any(result.cause == "memory" for result in results):
            half = (len(job.points) + 1) // 2
            self._most |= {kind: min(half, self._most.get(kind, half)) for kind in kinds}
            return
        done = {result.trial_id for result in results if result.status != "failed"}
        ended = Counter(kind_of(p.config) for p in job.points if p.trial_id in done)
        new = {kind for kind in ended if self._packed[kind] < ENOUGH}
        self._packed += ended
        if any(self._packed[kind] >= ENOUGH for kind in new):
            self._most |= dict.fromkeys(kinds.keys() & self._no_quicker(), 1)

    def _start(self, index: int, pack: Job) -> Job:
        ids = [point.trial_id for point in pack.points]
        self._attempts.update(ids)
        job = replace(
            pack,
            attempt=new_attempt(),
            attempts={i: self._attempts[i] for i in ids},
            keep_backbones=tuple(self._keep_backbones.intersection(ids)),
            code={p.trial_id: p.config.own_code for p in pack.points if p.like.own_classes},
        )
        self.running[job.attempt] = job
        self._pack_of[job.attempt] = index
        return job

    def ended(self, attempt: str, results: Sequence[Result], node: str | None = None) -> None:
        """Take in what came of a job.

        Args:
            attempt: The job's attempt.
            results: What came of each of its trials.
            node: Ray's id of the node where it ran, as far as that is known.
        """
        job = self.running.pop(attempt)
        pack = self._packs[self._pack_of.pop(attempt)]
        points = {point.trial_id: point for point in job.points}
        self._learn(job, results)
        failed = {r.trial_id: r for r in results if r.status == "failed"}
        died = _died_at(failed)
        parts: dict[Decision, list[Point]] = defaultdict(list)
        for result in results:
            point = points[result.trial_id]
            cause = result.cause or "worker"
            tries = self._tries[point.trial_id, cause]
            decision = decide(result, pack, failed, self._retry, tries)
            if decision in ("requeue", "alone") or (decision == "fail" and cause not in WAITS):
                self._tries[point.trial_id, cause] += 1
            if decision == "finish":
                self._finished(point, result)
            elif decision == "alone":
                self._try_alone(pack, point, result)
            elif decision == "fail":
                self._failed(point, result)
            else:
                parts[decision].append(point)
        again = [*parts["chance"], *parts["requeue"]]
        halved = parts["split"]
        if node and any(one.cause in ("device", "node") for one in failed.values()):
            pack = replace(pack, avoid=pack.avoid | {node})
        if died:
            pack = replace(pack, deaths=pack.deaths + 1, died_at=died)
        if again:
            how = "tried again from its last state"
            self._append(replace(pack, points=tuple(again)), failed, how)
        half = (len(halved) + 1) // 2
        for part in filter(None, (halved[:half], halved[half:])):
            how = "tried in a smaller pack" if len(part) > 1 else "tried alone"
            self._append(replace(pack, points=tuple(part)), failed, how)

    def _try_alone(self, pack: Job, point: Point, result: Result) -> None:
        """Queue a trial that had its worker to itself for later, in smaller parts."""
        parts = 2 * pack.accumulation
        how = f"tried at the end, alone, each batch in {parts} parts"
        todo = self._alone(replace(pack, points=(point,)), parts)
        self._append(todo, {point.trial_id: result}, how)

    def _append(self, pack: Job, failed: Mapping[str, Result], how: str) -> None:
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
        if (more := self._follow(point.trial_id)) is not None:
            self._extend(more)
        if diverged:
            self._give_up_users(point, "diverged")
            return
        self._open.discard(point.trial_id)
        for index in self._users.pop(point.trial_id, ()):
            if not self._needs(index):
                self._enqueue(index)

    def _extend(self, planned: Plan) -> None:
        """Take in packs of trials that were not known before; some may have ended long ago."""
        self._keep_backbones |= planned.sweep.keeps_backbones
        for point in planned.sweep.points:
            if planned.status[point.trial_id] in ("done", "diverged"):
                there = "was there already"
                self.emit(Event("trial_done", point.trial_id, point.label, message=there))
        for pack in planned.packs:
            self._open.update(point.trial_id for point in pack.points)
            self._packs.append(self._job(pack))
            self._enqueue(len(self._packs) - 1)

    def _failed(self, point: Point, result: Result) -> None:
        why = f"{result.exception}: {result.message}"
        self._give_up(point, why)
        alike = self._alike[result.exception, result.message]
        alike.add(point.trial_id if self._few else point.cell_id)
        if len(alike) >= SAME_FAILURE:
            what = "trials" if self._few else "configs"
            self.stop(
                f"the sweep stops early: {len(alike)} {what} in a row failed in the same way "
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
