"""The only file with Ray Tune: it hands packs to workers until nothing is left to do.

The ledger says what is missing, so that nothing of Ray is ever restored: a run is a new Tuner over
the difference, and to go on after any accident is to run again. What is left to do is an `Agenda`,
which knows dependencies and retries and nothing of Ray; a searcher feeds it to Tune pack by pack
and tells it what came of each. Workers write their results themselves (`sweep.execution.worker`).
Besides them there is one actor, the line: what workers report goes up it, and `stop` comes down.

Ray is imported when there is something to run, and a second run of a finished sweep ends before.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fpt.files import ensure_home
from sweep.analysis import history
from sweep.cluster import preflight
from sweep.cluster.connection import ClusterError as ClusterError
from sweep.cluster.connection import Connection, cluster_id, connected, entrusted, environment
from sweep.execution import worker
from sweep.execution.causes import Cause, cause_of
from sweep.execution.channel import Beat, Heard, Line, Reports
from sweep.execution.interrupts import Interrupts
from sweep.execution.scheduler import Agenda, NoQuicker, OnEvent
from sweep.execution.scheduler import Event as Event
from sweep.execution.worker import Job, Result, Train
from sweep.ledger import provenance
from sweep.ledger.leases import Claims
from sweep.ledger.ledger import MARKS, Lease, Ledger, LedgerError
from sweep.mirrors.mlflow_runs import Mirror
from sweep.planning import estimates, packing, tuning
from sweep.planning.packing import Workers
from sweep.planning.plan import Plan, Unfolding, plan
from sweep.sweepfile import lock
from sweep.sweepfile.document import SweepFileError
from sweep.sweepfile.trials import Sweep

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle
    from ray.tune import PlacementGroupFactory
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.search import Searcher

STOP_SECONDS = 5.0
"""What running trials have to save their states after Ctrl-C; then they are killed."""

TERM_SECONDS = 25.0
"""What they have after SIGTERM: Slurm and Kubernetes kill 30 s after it, and a Ray job that is
stopped has a minute (`sweep.cluster.submission.STOP_SECONDS`). Ray needs the rest to end."""

END_SECONDS = 120.0
"""What they have where nobody waits for it: at the end of a time budget, or in a pause."""

CHORE_SECONDS = 2.0
"""Between two looks at what is asked of a running driver from elsewhere."""

HEED_SECONDS = 3 * CHORE_SECONDS
"""In which a driver sees that a pause is asked for, slow storage included."""

LOOK_AGAIN_SECONDS = 3.0
"""Between two looks at the trials that other drivers train."""

LOOK_AGAIN_PACKS = 4
"""Packs that such a look asks for, a slot."""

WORD_SECONDS = 30.0
"""With nothing running, after which people are told what is waited for."""

SHOWN = 100
"""Running trials that a driver tells `sweep status` of."""

WAVE = 250
"""Packs a Tuner is given. Until it ends a Tuner forgets no trial: its memory and its own state file
grow. Each wave starts its workers anew."""

REPORTS_A_SECOND = 50
"""Reports that the line should see in a second, all workers together."""

HEAD_AWAY = ("RAY_gcs_rpc_server_reconnect_timeout_s", 60.0)
"""How long Ray bears a head that is away, before it aborts the process with a stack trace."""

WAIT_SECONDS = 1.0
"""Between two looks at a lease that another driver holds."""

DRIVER = "driver-"
"""What the names of the drivers' leases begin with."""

MIRROR_SECONDS = 10.0
"""Between two calls of the mirror."""

STUDIES_SECONDS = 30.0
"""Between two looks at what Optuna's studies have not been told."""


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
    tuning.where(planned.sweep, ledger)  # which may name a variable that is not set
    emit = on_event or (lambda event: None)
    if mirror and not planned.packs and planned.counts()["done"] + planned.counts()["diverged"]:
        # Another sweep may have trained what this one shows, or a kill may have come between the
        # last row and its mirror.
        Mirror(planned.sweep, ledger).sync(complete=True)
    here = (address or os.environ.get("RAY_ADDRESS")) is None
    trains = planned.packs and train is worker.train_on_this_core
    if here and trains and (package := provenance.lacking()):
        raise ClusterError(provenance.lacks(package))
    failed: Mapping[str, str] = {}
    interrupted = False
    pause = ledger.pause_mark(planned.sweep.name)
    if not planned.packs:
        _resume(planned.sweep, ledger, pause)
    else:
        with Interrupts() as interrupts, ExitStack() as stack:
            lease, waited = _driver_lease(ledger, lease_name(address), interrupts, emit)
            if lease is not None:
                stack.enter_context(lease)
                if pause is not None and len(ledger.holders(DRIVER)) > 1:
                    interrupts.wait(HEED_SECONDS)  # it may be meant for those of other clusters
                if not interrupts.count:
                    _resume(planned.sweep, ledger, pause)
            if waited:  # and meanwhile the other driver may have trained all that is missing here
                planned = plan(planned.sweep, ledger, stale=stale)
            if lease is not None and planned.packs and ledger.paused(planned.sweep.name):
                interrupted = True
                emit(Event("message", message="not started: somebody asked for a pause"))
            elif lease is not None and planned.packs:
                if mirror:
                    stack.enter_context(_mirrored(planned.sweep, ledger, interrupts, emit))
                if planned.sweep.studies:
                    stack.enter_context(_studied(planned.sweep, ledger))
                known: set[str] = set()
                # Once more where a cell got its rate from others between a plan and its run.
                while not (failed or interrupted or interrupts.count) and _beyond(planned, known):
                    known.update(planned.status)
                    failed, interrupted = _drive(
                        planned,
                        ledger,
                        interrupts,
                        lease,
                        emit,
                        address=address,
                        max_concurrent=max_concurrent,
                        gpus=gpus,
                        stale=stale,
                        until=_until(planned.sweep, hours, began),
                        train=train,
                    )
                    try:
                        planned = plan(planned.sweep, ledger, stale=stale)
                    except LedgerError as error:  # what was trained stays; here it is not known
                        emit(Event("message", message=f"{error}; once that is mended, run again"))
                        break
            interrupted = interrupted or interrupts.count > 0
    return _summary(planned, failed, interrupted=interrupted, seconds=time.monotonic() - began)


def _resume(sweep: Sweep, ledger: Ledger, pause: str | None) -> None:
    """Take back a pause that was there when a run was asked for, and none that came since."""
    if pause is not None:
        ledger.resume(sweep.name, pause)


def _beyond(planned: Plan, known: Collection[str]) -> bool:
    """Whether a plan would train a trial that was not known before."""
    return any(point.trial_id not in known for pack in planned.packs for point in pack.points)


def _until(sweep: Sweep, hours: float | None, began: float) -> float | None:
    """When the time budget ends, by the monotonic clock."""
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
    """The name of the lease that a driver holds: one a Ray cluster, this machine being one.

    Raises:
        ClusterError: If there is no Ray at `address`, or it does not let us in.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    name = socket.gethostname() if address is None else cluster_id(address) or address
    return DRIVER + re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower()


def _driver_lease(
    ledger: Ledger, name: str, interrupts: Interrupts, emit: OnEvent
) -> tuple[Lease | None, bool]:
    """The lease, once no other driver holds it (None if Ctrl-C came first), and whether one did."""
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


@contextmanager
def _mirrored(
    sweep: Sweep, ledger: Ledger, interrupts: Interrupts, emit: OnEvent
) -> Iterator[None]:
    """Let MLflow follow along, in a thread of its own, and catch up at the end.

    After Ctrl-C nobody waits for that: another run catches up, or `sweep mirror`.
    """
    mirror = Mirror(sweep, ledger)
    ended = threading.Event()

    def follow() -> None:
        mirror.prepare()
        while not ended.wait(MIRROR_SECONDS):
            mirror.sync()
        if not interrupts.count:
            mirror.sync(complete=True)

    thread = threading.Thread(target=follow, name="mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        while thread.is_alive() and not interrupts.count:
            thread.join(0.1)
        if interrupts.count:
            emit(Event("message", message=f"MLflow may lag behind: sweep mirror {sweep.file}"))


@contextmanager
def _studied(sweep: Sweep, ledger: Ledger) -> Iterator[None]:
    """Let Optuna's storage follow along, in a thread of its own, and catch up at the end."""
    follower = tuning.Follower(sweep, ledger)
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(STUDIES_SECONDS):
            follower.sync()
        follower.sync()

    thread = threading.Thread(target=follow, name="studies", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(STUDIES_SECONDS)


# ---------------------------------------------------------------------------------------------- Ray


@functools.cache
def _ledger(uri: str, line: ActorHandle[Line]) -> Ledger:
    """The ledger, once a worker process, with what opens it."""
    import ray

    variables = cast("Mapping[str, str]", ray.get(line.entrusted.remote()))
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    return Ledger(uri)


def _trainable(
    line: ActorHandle[Line], interval: float, uri: str, train: Train
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What Tune runs: it takes a job and returns results."""

    def pack(config: dict[str, Any]) -> dict[str, Any]:
        import ray

        job, pulse = config["job"], worker.Pulse()
        ledger = _ledger(uri, line)
        with Reports(line, interval, job.attempt, pulse) as reports:
            address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            results = worker.run_pack(
                replace(job, node=f"{address}/{reports.node[:8]}"),
                ledger,
                train=train,
                on_start=reports.start,
                on_record=reports.record,
                halted=reports.halted,
                pulse=pulse,
            )
        if any(result.cause == "preempted" for result in results):
            raise worker.EndWorkerError(results)  # nothing more is to begin on this node
        # With `done` in its result a trial takes one round trip to the driver; without, two.
        return {"results": results, "done": True}

    return pack


class WorkerDiedError(Exception):
    """A worker's process ended without a word."""


class HungError(Exception):
    """A worker's process was ended, since nothing came of it any more."""


def _drive(
    planned: Plan,
    ledger: Ledger,
    interrupts: Interrupts,
    lease: Lease,
    emit: OnEvent,
    *,
    address: str | None,
    max_concurrent: int | None,
    gpus: float | None,
    stale: bool,
    until: float | None,
    train: Train,
) -> tuple[Mapping[str, str], bool]:
    """Run a plan on Ray.

    Returns:
        The ids of the trials that failed, with the reasons; and whether it was stopped.
    """
    with connected(address, max_concurrent) as connection:
        import ray
        from ray import tune
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes, groups = preflight.nodes(), preflight.autoscaled()
        have = preflight.capacity(nodes, groups)
        if gpus is None:
            gpus = 1.0 if have.get("GPU") else 0.0
        if gpus > have.get("GPU", 0):
            raise ClusterError(
                f"gpus: {gpus:g} asked for a pack, and this Ray has {have.get('GPU', 0):g}; "
                "ask for fewer (a fraction shares one), or for 0 to train on the CPU"
            )
        # Of another Ray the preflight asks each node.
        if connection.own and not gpus and planned.refusals:
            raise ClusterError(f"{planned.sweep.file}: {'; '.join(planned.refusals)}")
        slots = max_concurrent or max(1, int(have.get("CPU", 1)))
        if gpus:
            slots = min(slots, max(1, int(have["GPU"] / gpus)))
        planned = planned.packed_for(Workers(slots, gpus), ledger)
        if not connection.own or gpus:  # what its GPUs are, only they themselves can tell
            devices = preflight.check(
                planned,
                ledger,
                tell=lambda text: emit(Event("message", message=text)),
                halted=lambda: interrupts.count > 0,
            )
            planned = planned.packed_for(planned.workers.on(devices), ledger)
        estimates.keep(estimates.quote(planned, ledger), planned, ledger)
        history.register(planned.sweep, ledger)
        tuning.note_asked(planned.sweep, ledger)
        claims = ledger.claims(lease)
        before, accumulation = _earlier(ledger, planned)
        agenda = Agenda(
            planned,
            before,
            emit,
            accumulation=accumulation,
            device=preflight.whole_device(planned.workers.resources, nodes, groups),
            claim=_claimed(claims),
            follow=Unfolding(planned, ledger, stale=stale),
            no_quicker=_measured(planned, ledger),
        )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(Line).options(
            num_cpus=0,
            max_concurrency=100_000,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=here,
        )
        line = cast("ActorHandle[Line]", actor.remote())
        state = _Run(
            agenda, slots, line, ledger, interrupts, lease, claims,
            sweep=planned.sweep, until=until, connection=connection,
            entrusted={} if connection.own else entrusted(),
        )  # fmt: skip
        trainable = tune.with_resources(
            _trainable(line, state.interval, ledger.uri, train),
            lambda config: _reservation(config["job"]),
        )
        pending = {"TUNE_MAX_PENDING_TRIALS_PG": str(min(slots, 200))}
        try:
            with environment(pending), state:
                while not (agenda.finished or interrupts.count):
                    search, schedule = _adapters(state)
                    tune.Tuner(
                        trainable,
                        tune_config=tune.TuneConfig(
                            search_alg=search,
                            scheduler=schedule,
                            num_samples=-1,
                            reuse_actors=True,
                            trial_name_creator=lambda trial: trial.trial_id,
                            trial_dirname_creator=lambda trial: trial.trial_id,
                        ),
                        run_config=tune.RunConfig(
                            name=uuid.uuid4().hex[:8],
                            storage_path=str(connection.scratch / "tune"),
                            verbose=0,
                        ),
                    ).fit()
                    state.check()
        except KeyboardInterrupt:
            if agenda.running:
                text = "killed: running trials go on from their last states"
                emit(Event("message", message=text))
        if connection.log is not None and connection.log.stat().st_size:
            emit(Event("message", message=f"what Ray itself said: {connection.log}"))
        return agenda.failed, state.stopped


def _reservation(job: Job) -> PlacementGroupFactory:
    """What Ray reserves for a job."""
    from ray.tune import PlacementGroupFactory

    where = preflight.elsewhere(job.resources, job.avoid) if job.avoid else None
    options: dict[str, Any] = {"bundle_label_selector": [where]} if where else {}
    return PlacementGroupFactory([dict(job.resources)], **options)


def _earlier(ledger: Ledger, planned: Plan) -> tuple[Counter[str], dict[str, int]]:
    """Of each trial the failed attempts, and in how many parts to take its batches."""
    names = ["trial_id", "cause", "pack_size", "accumulation", "at"]
    rows = ledger.failures(planned.status).sort_by("at").select(names).to_pylist()
    parts: dict[str, int] = {}
    for row in rows:
        if row["cause"] == "memory" and row["pack_size"] == 1:
            parts[row["trial_id"]] = 2 * (row["accumulation"] or 1)
        elif row["cause"] == "retried":
            parts.pop(row["trial_id"], None)
    most = {point.trial_id: point.config.batch_size for point in planned.sweep.all}
    parts = {name: min(number, most[name]) for name, number in parts.items()}
    return Counter(row["trial_id"] for row in rows if row["cause"] not in MARKS), parts


def _claimed(claims: Claims) -> Callable[[Sequence[str]], Collection[str]]:
    def claim(ids: Sequence[str]) -> Collection[str]:
        try:
            return claims.take(ids)
        except LedgerError:
            return ()  # asked for again, once storage answers

    return claim


def _measured(planned: Plan, ledger: Ledger) -> NoQuicker | None:
    """What packs do not help by now, where the sweep leaves it to us to form them."""
    if planned.sweep.spec.pack != "auto":
        return None

    def no_quicker() -> frozenset[tuple[object, ...]]:
        try:
            device = planned.workers.device
            return packing.no_quicker(ledger, device) | packing.not_exact(ledger, device)
        except LedgerError:
            return frozenset()

    return no_quicker


class _Run:
    """A run in progress: what Tune's turns find out, and what is done between them.

    As a context manager it does, in a thread of its own, what may have to wait for storage or Ray.
    """

    def __init__(
        self,
        agenda: Agenda,
        slots: int,
        line: ActorHandle[Line],
        ledger: Ledger,
        interrupts: Interrupts,
        lease: Lease,
        claims: Claims,
        *,
        sweep: Sweep,
        until: float | None,
        entrusted: Mapping[str, str],
        connection: Connection,
    ) -> None:
        self.agenda = agenda
        self.slots = slots
        self.interval = max(1.0, slots / REPORTS_A_SECOND)
        """Seconds between two beats of a worker."""
        self.line = line
        self.ledger = ledger
        self.interrupts = interrupts
        self.lease = lease
        self.claims = claims
        self.sweep = sweep
        self.until = until
        self.entrusted = entrusted
        self.connection = connection
        self.heard: dict[str, Heard] = {}
        """Attempt -> what was heard of it; without an entry it has not begun."""
        self.condemned: dict[str, str] = {}
        """Attempt -> why its worker is being ended."""
        self.stopped = False
        """Whether it was stopped by somebody, or by its time."""
        self._line_name = ""
        self._coming: ObjectRef[tuple[str, list[Event], list[Beat]]] | None = None
        self._fault: Exception | None = None
        self._kill_at: float | None = None
        self._quiet_at: float | None = None
        """When all that was trained before `stop` has been heard of."""
        self._halted = False
        self._turned = time.monotonic()
        self._busy = self._turned
        """When something ran, last."""
        self._held = self._turned
        self._looked = self._judged = 0.0
        self._paused = False
        self._broken: list[str] = []
        """Processes of our own Ray that have ended."""
        self._draining: frozenset[str] = frozenset()
        self._told: set[str] = set()
        """Nodes whose workers were told that they are about to be taken away."""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._chores, name="chores", daemon=True)
        self._watch = threading.Thread(target=self._watch_head, name="head", daemon=True)

    @property
    def again(self) -> str:
        """The command that goes on where this run stopped."""
        return shlex.join(["sweep", "run", str(self.sweep.file), "--results", self.ledger.uri])

    def __enter__(self) -> _Run:
        self._thread.start()
        self._watch.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join(CHORE_SECONDS)

    def _watch_head(self) -> None:
        """End this process by a sentence, before Ray does it by an abort.

        A thread of its own, and no exception: what asks the head for anything waits inside Ray.
        """
        import ray

        address = ray.get_runtime_context().gcs_address
        host, _, port = address.rpartition(":")
        patience = 0.75 * float(os.environ.get(*map(str, HEAD_AWAY)))
        if self.connection.own:  # it does not come back
            patience = min(patience, TERM_SECONDS + STOP_SECONDS)
        away: float | None = None
        while not self._end.wait(CHORE_SECONDS):
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
                away = None
            except OSError:
                away = away or time.monotonic()
                if time.monotonic() - away < patience or self._end.is_set():
                    continue
                with suppress(LedgerError):
                    self.lease.release()
                sys.stderr.write(
                    f"\n{address}: the head of the cluster has not answered for {patience:.0f} s; "
                    "rows and states are kept; once it is there, or another one, go on with:\n"
                    f"  {self.again}\n"
                )
                sys.stderr.flush()
                self.connection.abandon()
                os._exit(1)

    def _chores(self) -> None:
        from ray._private.state import state  # Ray itself looks here, and offers nothing else

        while not self._end.wait(CHORE_SECONDS):
            self._broken = self.connection.ended()
            with suppress(LedgerError):
                self._paused = self.ledger.paused(self.sweep.name)
            with suppress(Exception):  # a head that is gone is noticed where it matters
                self._draining = frozenset(state.get_draining_nodes())
            # It tells of what the main thread changes meanwhile, and is for people alone: whatever
            # becomes of it, this thread has to see a pause.
            with suppress(Exception):
                self.lease.note = self._note()

    def _note(self) -> Mapping[str, Any]:
        """What `sweep status` may want to know."""
        now = time.monotonic()
        running: dict[str, Any] = {}
        waiting = 0
        for attempt, job in list(self.agenda.running.items()):
            heard = self.heard.get(attempt)
            if heard is None:
                waiting += len(job.points)
                continue
            for point in job.points[: SHOWN - len(running)]:
                running[point.trial_id] = {
                    "step": heard.beat.steps.get(point.trial_id),
                    "phase": heard.beat.phase,
                    "seconds": round(now - heard.moved),
                }
        return {
            "sweep": self.sweep.name,
            "running": running,
            "waiting": waiting,
            "elsewhere": list(self.agenda.elsewhere[:SHOWN]),
            "tries": self.agenda.tries(SHOWN),
        }

    def next(self) -> Job | None:
        """The next job, if there is one and it may be handed out now."""
        now = time.monotonic()
        if now - self._looked >= LOOK_AGAIN_SECONDS:
            self._looked = now
            self.agenda.look_again(LOOK_AGAIN_PACKS * self.slots)
        if not self.lease.held or len(self.agenda.running) >= self.slots:
            return None
        return self.agenda.next()

    def ended(self, attempt: str, results: Sequence[Result]) -> None:
        """Take in what came of a job."""
        job = self.agenda.running[attempt]
        heard = self.heard.pop(attempt, None)
        self.condemned.pop(attempt, None)
        self.agenda.ended(attempt, results, heard.beat.node if heard else None)
        with suppress(LedgerError):
            self.claims.release([point.trial_id for point in job.points])

    def lost(self, attempt: str, error: BaseException | None) -> None:
        """Take in that the worker of a job did not return."""
        job = self.agenda.running[attempt]
        heard, why = self.heard.get(attempt), self.condemned.get(attempt)
        self.ended(attempt, _lost(job, self.ledger, error, heard, why))

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Keep what is raised for `check`: Tune would take it for a failure of the trial."""
        try:
            yield
        except Exception as error:
            self._fault = self._fault or error

    def check(self) -> None:
        """Raise what Tune was spared: a fault of ours, or of `on_event`."""
        if self._fault is not None:
            raise self._fault

    def turn(self) -> None:
        """Listen, and do what is due; called many times a second.

        Raises:
            KeyboardInterrupt: If what still runs is to be killed.
        """
        self.check()
        now = time.monotonic()
        if (stood := now - self._turned) > CHORE_SECONDS:  # it was this process that stood still
            self._held += stood
            if self._quiet_at is not None:
                self._quiet_at += stood
            for heard in self.heard.values():
                heard.wait(stood)
        self._turned = now
        self._listen(now)
        self._stop_if_due(now)
        if self.agenda.stopped is not None and not self._halted:
            self.line.halt.remote()
            self._halted = True
            # The last beat may be as old as the interval, and the next one needs its way.
            self._quiet_at = now + 2 * self.interval + 1.0
        if self._kill_at and (now > self._kill_at or self._idle(now)):
            raise KeyboardInterrupt
        for node in self._draining - self._told:
            self._told |= {node}
            self.line.halt.remote(node)
        if now - self._judged >= 1:
            self._judged = now
            self._end_the_hung(now)

    def _idle(self, now: float) -> bool:
        """Whether nothing that runs has made a step that could be saved: workers may be importing
        for long. A step is known by its beat, since records are few.
        """
        if not self.agenda.running:
            return True
        if self._quiet_at is None or now <= self._quiet_at:
            return False
        return not any(heard.beat.beats for heard in self.heard.values())

    def _stop_if_due(self, now: float) -> None:
        limit = self.sweep.spec.limits.storage_seconds
        if self.lease.held:
            self._held = now
        why, patience = None, END_SECONDS
        if self.interrupts.count:
            why, patience = "stopping: running trials save their states", TERM_SECONDS
            if self.interrupts.first == signal.SIGINT:
                why, patience = f"{why}; Ctrl-C again kills them", STOP_SECONDS
        elif self._broken:
            names, patience = " and ".join(self._broken), TERM_SECONDS
            why = f"stopping: {names} of our own Ray has ended; running trials save their states"
        elif self._paused:
            why = "stopping: somebody asked for a pause; running trials save their states"
        elif self.until is not None and now > self.until:
            why = "stopping: the time is up; running trials save their states"
        elif self.lease.lost:
            why = "stopping: another driver has taken over this cluster"
        elif now - self._held > limit:
            why = f"stopping: {self.ledger.uri} has not answered for {limit:.0f} s"
        if why is None:
            return
        self.stopped = True
        self.agenda.stop(why)
        end = now + patience
        self._kill_at = end if self._kill_at is None else min(self._kill_at, end)

    def _listen(self, now: float) -> None:
        import ray

        self._coming = self._coming or self.line.take.remote()
        if not ray.wait([self._coming], timeout=0)[0]:
            return
        try:
            name, events, beats = ray.get(self._coming)
        except ray.exceptions.RayError:  # its process was killed: Ray starts another one
            return
        finally:
            self._coming = None
        if name != self._line_name:
            self._line_name, self._told = name, set()
            self.line.entrust.remote(self.entrusted)
            if self._halted:
                self.line.halt.remote()
        for beat in beats:
            if beat.attempt in self.heard:
                self.heard[beat.attempt].take(beat, now)
            elif beat.attempt in self.agenda.running:
                self.heard[beat.attempt] = Heard.first(beat, now)
        running = {p.trial_id for job in self.agenda.running.values() for p in job.points}
        for event in events:
            # What a worker said of a trial may come later than the trial's end.
            if event.trial_id in running:
                self.agenda.emit(event)

    def _end_the_hung(self, now: float) -> None:
        import ray

        if self.heard or not self.agenda.running:
            self._busy = now
        elif now - self._busy > WORD_SECONDS:
            wanted = next(iter(self.agenda.running.values())).resources
            what = ", ".join(f"{number:g} {name}" for name, number in wanted.items())
            text = f"no worker has begun yet: each asks the cluster for {what}"
            self.agenda.emit(Event("waiting", message=text))
            self._busy = now
        for attempt, heard in self.heard.items():
            why = heard.hung(self.sweep.spec.limits, now, self.interval)
            if why and attempt not in self.condemned and heard.actor is not None:
                self.condemned[attempt] = why
                ray.kill(heard.actor)


def _adapters(run: _Run) -> tuple[Searcher, TrialScheduler]:
    """What Tune asks for the next trial, and what it calls at each turn of its loop.

    The latter is a scheduler that leaves the order alone. A callback of Tune's would do too, but
    with the first one Tune imports MLflow and all else that it could call back, for seconds.
    """
    from ray import cloudpickle
    from ray.tune.schedulers import FIFOScheduler
    from ray.tune.search import Searcher

    attempts: dict[str, str] = {}
    """Tune's id of a trial -> our attempt."""

    class Feed(Searcher):
        given = 0
        begun = False

        def suggest(  # type: ignore[override]  # FINISHED is a string
            self, trial_id: str
        ) -> dict[str, Any] | str | None:
            # With nothing running Tune asks here and turns no further.
            if not self.begun:
                self.begun = True
                run.interrupts.catch()  # Tune takes SIGUSR1 at its start
            run.turn()
            if run.agenda.finished or self.given >= WAVE or run.interrupts.count:
                return Searcher.FINISHED
            job = run.next()
            if job is None:
                return None
            self.given += 1
            attempts[trial_id] = job.attempt
            return {"job": job}

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            if not error:
                with run.noticed():
                    run.ended(attempts.pop(trial_id), result["results"] if result else ())

        def save(self, checkpoint_path: str) -> None:
            pass  # nothing of Tune's is ever restored

        restore = save

        def __reduce__(self) -> tuple[type, tuple[()]]:
            return object, ()  # Tune keeps a copy of what it was given, for the same purpose

    class Watch(FIFOScheduler):
        def choose_trial_to_run(self, tune_controller: Any) -> None:
            """Called at each turn; None leaves Tune's own order, and spares it a look at all."""
            run.turn()

        def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
            error: BaseException | None = None
            # Not every exception survives being written and read.
            with suppress(Exception), open(trial.pickled_error_file, "rb") as file:
                error = cloudpickle.load(file)
            # Tune comes here, too, where its own handling of a trial that has ended fails.
            if (attempt := attempts.pop(trial.trial_id, None)) is not None:
                with run.noticed():
                    run.lost(attempt, error)

        def __reduce__(self) -> tuple[type, tuple[()]]:
            return object, ()

    return Feed(), Watch()  # type: ignore[no-untyped-call]


def _lost(
    job: Job,
    ledger: Ledger,
    error: BaseException | None,
    heard: Heard | None = None,
    hung: str | None = None,
) -> tuple[Result, ...]:
    """What came of a job whose worker did not return."""
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):
        # A pack raises after running out of memory; anything else that comes is a fault of ours.
        raised: BaseException = error.cause or error
        if isinstance(raised, worker.EndWorkerError):
            return raised.results
        cause = cause_of(raised)
    else:
        cause, raised = _death(error, heard, hung)
        raised.__cause__ = error
    if heard is not None:
        job = replace(job, node=_node_name(heard.beat.node))
    ended: dict[str, Result] = {}
    with suppress(LedgerError):
        ended = worker.finished(job, ledger)
    steps = heard.beat.steps if heard else {}
    lost = heard.beat.unsaved if heard else {}
    return tuple(
        ended.get(point.trial_id)
        or worker.fail(
            ledger,
            job,
            point,
            cause,
            raised,
            step=steps.get(point.trial_id),
            lost=lost.get(point.trial_id, 0.0),
        )
        for point in job.points
    )


def _death(
    error: BaseException | None, heard: Heard | None, hung: str | None
) -> tuple[Cause, Exception]:
    """Why a worker's process ended, and how to say so."""
    from ray.exceptions import OutOfMemoryError, RayActorError

    if hung is not None:
        return "hung", HungError(f"it hung: {hung}; its worker was ended")
    # Ray itself ends what takes too much of a machine.
    if isinstance(error, OutOfMemoryError):
        return "memory", WorkerDiedError("the machine had too little memory for it")
    if isinstance(error, RayActorError) and error.preempted:
        return "preempted", WorkerDiedError("the node was taken away")
    if heard is not None and not _alive(heard.beat.node):
        return "node", WorkerDiedError("the node was lost")
    return "worker", WorkerDiedError(
        "the worker process ended: killed, or out of the machine's memory"
    )


def _alive(node: str) -> bool:
    """Whether a node is there. Ray may not know yet, so that the node itself is asked too."""
    import ray

    for one in ray.nodes():  # type: ignore[no-untyped-call]
        if one["NodeID"] == node and one["Alive"]:
            with suppress(OSError):
                where = (one["NodeManagerAddress"], one["NodeManagerPort"])
                socket.create_connection(where, timeout=1).close()
                return True
    return False


def _node_name(node: str) -> str:
    import ray

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    address = next((one["NodeManagerAddress"] for one in nodes if one["NodeID"] == node), "")
    return f"{address}/{node[:8]}"
