"""A run: what is missing is trained until nothing is left to do.

The ledger says what is missing, so that nothing of Ray is ever restored: a run is a new Tuner over
the difference, and to go on after any accident is to run again. What is left to do a `Scheduler`
knows, with dependencies and retries and nothing of Ray. A `Monitor` hands it out and hears what
becomes of it, `tune_adapter` lets Ray Tune run it, and workers write their results themselves.

Ray is imported when there is something to run, and a second run of a finished sweep ends before.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fpt.files import ensure_home
from sweep.analysis import history
from sweep.cluster import preflight, slots
from sweep.cluster.connection import ClusterError as ClusterError
from sweep.cluster.connection import (
    Connection,
    check_startable,
    cluster_id,
    connected,
    forwarded_secrets,
)
from sweep.execution import worker
from sweep.execution.channel import Channel
from sweep.execution.following import following
from sweep.execution.interrupts import Interrupts
from sweep.execution.monitor import POLL_INTERVAL, Monitor, RunContext
from sweep.execution.reservations import ReservationsAhead
from sweep.execution.scheduler import Event as Event
from sweep.execution.scheduler import NoQuicker, OnEvent, Scheduler
from sweep.execution.worker import Train
from sweep.ledger import provenance
from sweep.ledger.causes import MARKS, RESETS
from sweep.ledger.ledger import Lease, Ledger, LedgerError
from sweep.mirrors import optuna_studies
from sweep.mirrors.mlflow_runs import Mirror
from sweep.planning import estimates, packing, tuning
from sweep.planning.packing import Workers
from sweep.planning.plan import IncrementalPlanner, Plan, plan
from sweep.sweepfile import lock
from sweep.sweepfile.document import SweepFileError
from sweep.sweepfile.trials import Sweep

PAUSE_TIMEOUT = 3 * POLL_INTERVAL
"""Seconds in which a driver sees that a pause is asked for, slow storage included."""

WAIT_SECONDS = 1.0
"""Between two looks at a lease that another driver holds."""

DRIVER = "driver-"
"""What the names of the drivers' leases begin with."""

MIRROR_SECONDS = 10.0
"""Between two calls of the mirror."""

MIRROR_PATIENCE = 30.0
"""Seconds that the end of a run waits for MLflow."""

MIRROR_TELLS = 5.0
"""Between two lines on how far MLflow is, while somebody waits for it."""

COMPACTION_SECONDS = 600.0
"""Between two looks at whether finished trials are many enough to be put together."""

COMPACT_AT = 1000
"""Finished trials with files of their own that are many enough."""

COMPACTION_PATIENCE = 60.0
"""Seconds that the end of a run waits for that."""

STUDIES_SECONDS = 30.0
"""Between two looks at what Optuna's studies have not been told."""

RunPlan = Callable[[Plan, RunContext], tuple[Mapping[str, str], bool]]
"""Runs a plan; gives the ids of the trials that failed, with the reasons, and whether it was
stopped."""

AHEAD = 2
"""Of so many slots one more pack is reserved than is running."""


@dataclass(frozen=True)
class Summary:
    """How a run ended. The counts are of the sweep's trials, pretrainings included."""

    done: int
    diverged: int
    failed: int
    """Failed in this run, or waiting for `sweep retry`, or in need of one that failed."""
    missing: int
    interrupted: bool
    """Whether it was stopped, by whatever, before all was done: the same command goes on."""
    seconds: float

    @property
    def exit_code(self) -> int:
        """0: every trial is done (diverged counts as done). 1: some are not."""
        return 1 if self.failed or self.missing else 0


# -------------------------------------------------------------------------------------------- a run


def run(
    file: str | Path | Sweep,
    *,
    results: str | Path = "results",
    address: str | None = None,
    max_concurrent: int | None = None,
    gpus: float | None = None,
    stale: bool = False,
    hours: float | None = None,
    mirror: bool = True,
    on_event: OnEvent | None = None,
    train: Train = worker.train_on_this_core,
    run_plan: RunPlan | None = None,
) -> Summary:
    """Train what is missing of a sweep, and return when nothing is left to do.

    The first Ctrl-C stops: running trials save their states, and the same call goes on later. The
    second one kills. A pause that was asked for before this call ends with it, once other drivers
    have seen it; one that is asked for later stops this call too.

    Args:
        file: A sweep file, or a sweep that is loaded already.
        results: The ledger: a folder, or s3://, gs://, az://.
        address: A Ray cluster. Default: that of RAY_ADDRESS, else a Ray of our own on this machine.
        max_concurrent: Most packs at once. Default: what the resources allow.
        gpus: GPUs that a pack gets, a fraction included. Default: 1 where there are any.
        stale: Also train trials whose only result belongs to an older version of their task.
        hours: Stop after so long, as after Ctrl-C. Default: `limits.hours` of the sweep file.
        mirror: Whether MLflow gets the runs.
        on_event: Called with each event, never by two threads at once.
        train: What trains; anything but the default measures or tests the orchestration.
        run_plan: What runs a plan, likewise. Default: `run_on_ray`.

    Raises:
        SweepFileError: If the file is wrong; nothing was started.
        LedgerError: If the ledger cannot be read or written; nothing was started.
        ClusterError: If there is no Ray at `address`, if it has fewer GPUs than a pack asks for, or
            if this machine cannot train in a numerics class; nothing was trained.
    """
    began = time.monotonic()
    ensure_home()
    ledger = Ledger(results, write=True)
    planned = plan(file, ledger, stale=stale)
    _check_pinned(planned)
    optuna_studies.where(planned.sweep, ledger)  # which may name a variable that is not set
    emit = on_event or (lambda event: None)
    if mirror and not planned.packs and planned.counts()["done"] + planned.counts()["diverged"]:
        # Another sweep may have trained what this one shows, or a kill may have come between the
        # last row and its mirror.
        _catch_up(planned.sweep, ledger, emit)
    here = (address or os.environ.get("RAY_ADDRESS")) is None
    trains = planned.packs and train is worker.train_on_this_core
    if here and trains and (package := provenance.lacking()):
        raise ClusterError(provenance.lacks(package))
    pause = ledger.notes.pause_mark(planned.sweep.name)
    if not planned.packs:
        _resume(planned.sweep, ledger, pause)
        return _summary(planned, {}, interrupted=False, seconds=time.monotonic() - began)
    check_startable(address, max_concurrent)
    failed: Mapping[str, str] = {}
    interrupted = False
    with Interrupts() as interrupts, ExitStack() as stack:
        lease, waited = _driver_lease(ledger, lease_name(address), interrupts, emit)
        if lease is not None:
            stack.enter_context(lease)
            if pause is not None and len(ledger.holders(DRIVER)) > 1:
                interrupts.wait(PAUSE_TIMEOUT)  # it may be meant for those of other clusters
            if not interrupts.count:
                _resume(planned.sweep, ledger, pause)
        if waited:  # and meanwhile the other driver may have trained all that is missing here
            planned = plan(planned.sweep, ledger, stale=stale)
        if lease is not None and planned.packs and ledger.notes.paused(planned.sweep.name):
            interrupted = True
            emit(Event("message", message="not started: somebody asked for a pause"))
        elif lease is not None and planned.packs:
            context = RunContext(
                ledger,
                lease,
                interrupts,
                emit,
                train,
                address=address,
                max_concurrent=max_concurrent,
                gpus=gpus,
                stale=stale,
                deadline=_deadline(planned.sweep, hours, began),
            )
            planned, failed, interrupted = _run_with_mirrors(
                planned, context, run_plan or run_on_ray, mirror=mirror
            )
        interrupted = interrupted or interrupts.count > 0
    return _summary(planned, failed, interrupted=interrupted, seconds=time.monotonic() - began)


def _run_with_mirrors(
    planned: Plan, context: RunContext, run_plan: RunPlan, *, mirror: bool
) -> tuple[Plan, Mapping[str, str], bool]:
    """Run a plan, and what becomes known by it, with MLflow and Optuna following along.

    Returns:
        What is planned after it, the trials that failed and why, and whether it was stopped.
    """
    failed: Mapping[str, str] = {}
    interrupted = False
    with ExitStack() as stack:
        if mirror:
            context, mirrored = _mirrored(planned.sweep, context)
            stack.enter_context(mirrored)
        stack.enter_context(_compacted(context))
        if planned.sweep.studies:
            stack.enter_context(_studied(planned.sweep, context.ledger))
        known: set[str] = set()
        # Once more where a cell got its rate from others between a plan and its run.
        while not (failed or interrupted or context.interrupts.count) and _beyond(planned, known):
            known.update(planned.status)
            failed, interrupted = run_plan(planned, context)
            try:
                planned = plan(planned.sweep, context.ledger, stale=context.stale)
            except LedgerError as error:  # what was trained stays; here it is not known
                context.emit(Event("message", message=f"{error}; once that is mended, run again"))
                break
    return planned, failed, interrupted


def _resume(sweep: Sweep, ledger: Ledger, pause: str | None) -> None:
    """Take back a pause that was there when a run was asked for, and none that came since."""
    if pause is not None:
        ledger.notes.resume(sweep.name, pause)


def _beyond(planned: Plan, known: Collection[str]) -> bool:
    """Return whether a plan would train a trial that was not known before."""
    return any(point.trial_id not in known for pack in planned.packs for point in pack.points)


def _deadline(sweep: Sweep, hours: float | None, began: float) -> float | None:
    """Return when the time budget ends, by the monotonic clock."""
    hours = sweep.spec.limits.hours if hours is None else hours
    return None if hours is None else began + 3600 * hours


def _check_pinned(planned: Plan) -> None:
    """Refuse to train on what may be something else tomorrow.

    Raises:
        SweepFileError: If a trial that would run reads the Hub at no commit in particular.
    """
    file = planned.sweep.file
    configs = (point.config for pack in planned.packs for point in pack.points)
    if found := lock.unpinned(configs, to_be_had=True):
        problem = (
            f"{file}: no commit is pinned of {', '.join(map(str, found))}, so that what trials "
            f"read may change under their ids; `sweep fetch {file}` finds the commits and writes "
            f"them into {lock.lock_file(file)}"
        )
        raise SweepFileError([problem])


def _summary(
    planned: Plan, failed: Mapping[str, str], *, interrupted: bool, seconds: float
) -> Summary:
    counts = Counter(
        "failed" if status not in ("done", "diverged") and name in failed else status
        for name, status in planned.status.items()
    )
    done, diverged, failures = counts["done"], counts["diverged"], counts["failed"]
    return Summary(
        done=done,
        diverged=diverged,
        failed=failures,
        missing=counts.total() - done - diverged - failures,
        interrupted=interrupted,
        seconds=seconds,
    )


def lease_name(address: str | None = None) -> str:
    """Return the name of the lease that a driver holds: one a Ray cluster, as this machine is one.

    Raises:
        ClusterError: If there is no Ray at `address`, or it does not let us in.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    name = socket.gethostname() if address is None else cluster_id(address) or address
    return DRIVER + re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower()


def _driver_lease(
    ledger: Ledger, name: str, interrupts: Interrupts, emit: OnEvent
) -> tuple[Lease | None, bool]:
    """Return the lease once no other driver holds it (None after a signal), and whether one did."""
    waited = False
    while not interrupts.count:
        if (lease := ledger.lease(name)) is not None:
            return lease, waited
        waited = True
        holder = ledger.holder(name) or {}
        emit(
            Event(
                "waiting",
                message="another driver is running (host {}, process {}, since {}); this one goes "
                "on when it ends".format(
                    *(holder.get(key, "unknown") for key in ("host", "pid", "since"))
                ),
            )
        )
        interrupts.wait(WAIT_SECONDS)
    return None, waited


def _mirrored(sweep: Sweep, context: RunContext) -> tuple[RunContext, AbstractContextManager[None]]:
    """Let MLflow follow along by what this driver hears of, and catch up at the end.

    After Ctrl-C nobody waits for that, and else not for long: another run catches up, or `sweep
    mirror`.

    Returns:
        The context in which trials end that MLflow is to get, and a block for the run.
    """
    mirror = Mirror(sweep, context.ledger)
    ended: set[str] = set()
    told: set[str] = set()

    def emit(event: Event) -> None:
        if event.kind == "trial_done" and event.trial_id is not None:
            ended.add(event.trial_id)
        context.emit(event)

    def sync(last: bool) -> None:
        if last:
            mirror.sync(complete=True)
            behind.clear()
        elif (now := frozenset(ended)) - told or not told:
            mirror.sync(ended=now)
            told.update(now or {""})

    behind = [f"MLflow may lag behind: {mirror.command}"]

    @contextmanager
    def block() -> Iterator[None]:
        patience = _patience(MIRROR_PATIENCE, context.interrupts)
        waits = _telling(mirror, context.emit, patience)
        with following("mirror", MIRROR_SECONDS, sync, waits=waits):
            yield
        if behind:
            context.emit(Event("message", message=behind[0]))

    return replace(context, emit=emit), block()


def _catch_up(sweep: Sweep, ledger: Ledger, emit: Callable[[Event], None]) -> None:
    """Let MLflow have all of a finished sweep, unless Ctrl-C ends the wait."""
    mirror = Mirror(sweep, ledger)
    with Interrupts() as interrupts:
        waits = _telling(mirror, emit, lambda: not interrupts.count)

        def sync(last: bool) -> None:
            if last:
                mirror.sync(complete=True)

        with following("mirror", MIRROR_SECONDS, sync, waits=waits):
            pass


def _telling(
    mirror: Mirror, emit: Callable[[Event], None], waits: Callable[[], bool]
) -> Callable[[], bool]:
    """Return `waits`, which now and then tells whoever waits how far MLflow is."""
    due: list[float] = []

    def tells() -> bool:
        now = time.monotonic()
        if not due:
            due.append(now + MIRROR_TELLS)
        elif now >= due[0]:
            due[0] = now + MIRROR_TELLS
            done, of = mirror.progress
            far = f"{done:,} of {of:,} trials so far" if of else "no trial so far"
            emit(
                Event(
                    "message",
                    message=f"MLflow gets the runs: {far}; Ctrl-C ends the wait, `{mirror.command}`"
                    " catches up, and --no-mirror leaves MLflow out",
                )
            )
        return waits()

    return tells


def _compacted(context: RunContext) -> AbstractContextManager[None]:
    """Let finished trials be put together now and then, and at the end.

    It may be cut off anywhere: another run goes on, or `sweep compact`.
    """
    ledger = Ledger(context.ledger.uri)  # of a thread of its own

    def compact(last: bool) -> None:
        with suppress(LedgerError):  # what is damaged, or cannot be written, others say
            ledger.compact(at_least=COMPACT_AT)

    waits = _patience(COMPACTION_PATIENCE, context.interrupts)
    return following("compaction", COMPACTION_SECONDS, compact, waits=waits)


def _patience(seconds: float, interrupts: Interrupts | None = None) -> Callable[[], bool]:
    """Return what says whether to wait on: so long from the first question, not after Ctrl-C."""
    until: list[float] = []

    def waits() -> bool:
        if not until:
            until.append(time.monotonic() + seconds)
        interrupted = interrupts is not None and interrupts.count > 0
        return not interrupted and time.monotonic() < until[0]

    return waits


def _studied(sweep: Sweep, ledger: Ledger) -> AbstractContextManager[None]:
    """Let Optuna's storage follow along, and catch up at the end."""
    follower = optuna_studies.Follower(sweep, ledger)
    waits = _patience(STUDIES_SECONDS)
    return following("studies", STUDIES_SECONDS, lambda last: follower.sync(), waits=waits)


# ---------------------------------------------------------------------------------------------- Ray


def run_on_ray(planned: Plan, context: RunContext) -> tuple[Mapping[str, str], bool]:
    """Run a plan on Ray.

    Returns:
        The ids of the trials that failed, with the reasons; and whether it was stopped.
    """
    ledger, emit = context.ledger, context.emit
    with connected(context.address, context.max_concurrent) as connection:
        from sweep.execution.tune_adapter import run_packs

        nodes, groups = preflight.nodes(), preflight.autoscaled()
        planned = _fitted(planned, context, connection, nodes, groups)
        if not connection.own or planned.workers.gpus:  # only its GPUs can tell what they are
            devices = preflight.check(
                planned,
                ledger,
                tell=lambda text: emit(Event("message", message=text)),
                halted=lambda: context.interrupts.count > 0,
            )
            planned = planned.packed_for(planned.workers.on(devices), ledger)
        estimates.keep(estimates.quote(planned, ledger), planned, ledger)
        history.register(planned.sweep, ledger)
        tuning.note_asked(planned.sweep, ledger)
        before, accumulation = _earlier(ledger, planned)
        reserve: list[ReservationsAhead] = []
        scheduler = Scheduler(
            planned,
            before,
            emit,
            accumulation=accumulation,
            device=preflight.whole_device(planned.workers.resources, nodes, groups),
            claim=lambda ids: reserve[0](ids),
            follow=IncrementalPlanner(planned, ledger, stale=context.stale),
            no_quicker=_measured(planned, ledger),
        )
        reserve.append(
            ReservationsAhead(
                ledger.reservations(context.lease),
                scheduler.upcoming,
                1 + planned.workers.count // AHEAD,
                at_first=planned.workers.count,
            )
        )
        channel = Channel({} if connection.own else forwarded_secrets())
        monitor = Monitor(
            context,
            planned.sweep,
            scheduler,
            slots=planned.workers.count,
            channel=channel,
            connection=connection,
            reservations=reserve[0],
        )
        try:
            with reserve[0], monitor:
                run_packs(monitor, channel.actor, ledger.uri, context.train, connection.scratch)
        except KeyboardInterrupt:
            if scheduler.running:
                text = "killed: running trials go on from their last states"
                emit(Event("message", message=text))
        if connection.log is not None and connection.log.stat().st_size:
            emit(Event("message", message=f"what Ray itself said: {connection.log}"))
        return scheduler.failed, monitor.stopped


def _fitted(
    planned: Plan,
    context: RunContext,
    connection: Connection,
    nodes: Sequence[preflight.Node],
    groups: Sequence[preflight.Group],
) -> Plan:
    """Return the plan for the workers that this Ray has room for.

    Raises:
        ClusterError: If it has fewer GPUs than a pack asks for, or this machine cannot train in a
            numerics class.
    """
    have = preflight.capacity(nodes, groups).get("GPU", 0)
    gpus = (1.0 if have else 0.0) if context.gpus is None else context.gpus
    if gpus > have:
        raise ClusterError(
            f"gpus: {gpus:g} asked for a pack, and this Ray has {have:g}; "
            "ask for fewer (a fraction shares one), or for 0 to train on the CPU"
        )
    # Of another Ray the preflight asks each node.
    if connection.own and not gpus and planned.refusals:
        raise ClusterError(f"{planned.sweep.file}: {'; '.join(planned.refusals)}")
    count = slots.count_slots(gpus, nodes, groups)
    if context.max_concurrent is not None:
        # More packs than cores may be asked for, more than GPUs there are no room for.
        most = context.max_concurrent
        count = min(count, most) if gpus else most
    if (idle := slots.left_out(gpus, nodes)) is not None:
        context.emit(Event("message", message=idle))
    return planned.packed_for(Workers(count, gpus), context.ledger)


def _earlier(ledger: Ledger, planned: Plan) -> tuple[Counter[str], dict[str, int]]:
    """Return of each trial the failed attempts, and in how many parts to take its batches."""
    names = ["trial_id", "cause", "pack_size", "accumulation", "at"]
    rows = ledger.failures(planned.status).sort_by("at").select(names).to_pylist()
    parts: dict[str, int] = {}
    for row in rows:
        if row["cause"] == "memory" and row["pack_size"] == 1:
            parts[row["trial_id"]] = 2 * (row["accumulation"] or 1)
        elif row["cause"] in RESETS:
            parts.pop(row["trial_id"], None)
    most = {point.trial_id: point.config.batch_size for point in planned.sweep.all}
    parts = {name: min(number, most[name]) for name, number in parts.items()}
    return Counter(row["trial_id"] for row in rows if row["cause"] not in MARKS), parts


def _measured(planned: Plan, ledger: Ledger) -> NoQuicker | None:
    """Return what packs do not help by now, where the sweep leaves it to us to form them."""
    if planned.sweep.spec.pack != "auto":
        return None

    def no_quicker() -> frozenset[tuple[object, ...]]:
        try:
            device = planned.workers.device
            return packing.no_quicker(ledger, device) | packing.not_exact(ledger, device)
        except LedgerError:
            return frozenset()

    return no_quicker
