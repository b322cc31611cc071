"""The only file with Ray Tune: it hands packs to workers until nothing is left to do.

The ledger says what is missing, so that nothing of Ray is ever restored: a run is a new Tuner over
the difference, and to go on after any accident is to run again. What is left to do is an `Agenda`,
which knows dependencies and retries and nothing of Ray; a searcher feeds it to Tune pack by pack
and tells it what came of each. Workers write their results themselves (`sweep.worker`).
Besides them there is one actor, the line: what workers report goes up it, and `stop` comes down.

Ray is imported when there is something to run, and a second run of a finished sweep ends before.
"""

from __future__ import annotations

import asyncio
import fcntl
import functools
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fpt import extension
from sweep import lock, worker
from sweep.agenda import Agenda, OnEvent
from sweep.agenda import Event as Event
from sweep.document import SweepFileError
from sweep.ledger import Lease, Ledger, LedgerError
from sweep.packing import Workers
from sweep.planning import Plan, plan
from sweep.tracking import Mirror
from sweep.trials import Point, Sweep
from sweep.worker import Job, Result, Train

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.search import Searcher

    from fpt.trainer import Record

STOP_SECONDS = 5.0
"""What running trials have to save their states after Ctrl-C; then they are killed."""

WAVE = 1000
"""Packs a Tuner is given. Tune never forgets a trial: its memory and its own state file grow."""

REPORTS_A_SECOND = 50
"""Reports that the line should see in a second, all workers together."""

WAIT_SECONDS = 1.0
"""Between two looks at a lease that another driver holds."""

DRIVER = "driver-"
"""What the names of the drivers' leases begin with."""

MIRROR_SECONDS = 10.0
"""Between two calls of the mirror."""


@dataclass(frozen=True)
class Summary:
    """How a run ended. The counts are of the sweep's trials, pretrainings included."""

    done: int
    diverged: int
    failed: int
    """Failed in this run, or waiting for `sweep retry`, or in need of one that failed."""
    missing: int
    interrupted: bool
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
    mirror: bool = True,
    on_event: OnEvent | None = None,
    train: Train = worker.train_on_this_core,
) -> Summary:
    """Train what is missing of a sweep, and return when nothing is left to do.

    The first Ctrl-C stops: running trials save their states, and the same call goes on later. The
    second one kills.

    Args:
        file: A sweep file, or a sweep that is loaded already.
        results: The ledger: a folder, or s3://, gs://, az://.
        address: A Ray cluster. Default: that of RAY_ADDRESS, else a Ray of our own on this machine.
        max_concurrent: Most packs at once. Default: what the resources allow.
        gpus: GPUs that a pack gets, a fraction included. Default: 1 where there are any.
        stale: Also train trials whose only result belongs to an older version of their task.
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
    ledger = Ledger(results, write=True)
    planned = plan(file, ledger, stale=stale)
    _check_pinned(planned)
    emit = on_event or (lambda event: None)
    if mirror and not planned.packs and planned.counts()["done"] + planned.counts()["diverged"]:
        # Another sweep may have trained what this one shows, or a kill may have come between the
        # last row and its mirror.
        Mirror(planned.sweep, ledger).sync()
    failed: Mapping[str, str] = {}
    interrupted = False
    if planned.packs:
        with _Interrupts() as interrupts, ExitStack() as stack:
            lease, waited = _driver_lease(ledger, lease_name(address), interrupts, emit)
            if lease is not None:
                stack.enter_context(lease)
            if waited:  # and meanwhile the other driver may have trained all that is missing here
                planned = plan(planned.sweep, ledger, stale=stale)
            if lease is not None and planned.packs:
                if mirror:
                    stack.enter_context(_mirrored(planned.sweep, ledger, interrupts, emit))
                failed = _drive(
                    planned,
                    ledger,
                    interrupts,
                    lease,
                    emit,
                    address=address,
                    max_concurrent=max_concurrent,
                    gpus=gpus,
                    stale=stale,
                    train=train,
                )
                planned = plan(planned.sweep, ledger, stale=stale)
            interrupted = interrupts.count > 0
    return _summary(planned, failed, interrupted=interrupted, seconds=time.monotonic() - began)


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
    """The name of the lease that a driver holds: one a Ray cluster, this machine being one."""
    address = address or os.environ.get("RAY_ADDRESS") or socket.gethostname()
    return DRIVER + re.sub(r"[^A-Za-z0-9.]+", "-", address).strip("-").lower()


def _driver_lease(
    ledger: Ledger, name: str, interrupts: _Interrupts, emit: OnEvent
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
                message="another driver is running (host {}, process {}); this one goes on when it "
                "ends".format(holder.get("host", "unknown"), holder.get("pid", "unknown")),
            )
        )
        interrupts.first.wait(WAIT_SECONDS)
    return None, waited


class _Interrupts:
    """Ctrl-C (and SIGTERM): the first one is counted, the second one raises KeyboardInterrupt.

    Outside the main thread no signal can be caught, and nothing is interrupted.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.count = 0
        self.first = threading.Event()
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Interrupts:
        self.catch()
        return self

    def catch(self) -> None:
        """Take the signals; to be repeated once Ray has started, since it takes SIGTERM."""
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                old = signal.signal(number, self._handle)
                self._old.setdefault(number, old)

    def __exit__(self, *exception: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def _handle(self, number: int, frame: object) -> None:
        self.count += 1
        self.first.set()
        if self.count > 1:
            raise KeyboardInterrupt


@contextmanager
def _mirrored(
    sweep: Sweep, ledger: Ledger, interrupts: _Interrupts, emit: OnEvent
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
            mirror.sync()

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


# ---------------------------------------------------------------------------------------------- Ray


WORKERS = {
    # A core a worker.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # fp32 products whose bits do not depend on the number of threads.
    "MKL_CBWR": "AUTO,STRICT",
    # Relative paths of a sweep file mean what they mean to the driver.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
"""Environment variables of the workers."""

PASSED_ON = ("HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_HOME", "FPT_SWEEP_CACHE")
"""Variables that workers of another Ray get from the driver, where it has them; all jobs of a
cluster can read them, so that no secret may be among them."""

QUIET = {
    # Tune would write five files a trial, rewrite a file of its own over all trials every few
    # seconds, catch Ctrl-C, and print tables and tracebacks.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # Ray would report usage, and advise on a future version of itself.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment variables of the driver's process."""


class ClusterError(Exception):
    """A Ray cluster that cannot be used, or not so; the message says what to look at."""


def _reachable(address: str) -> None:
    """Ask the address for a connection: Ray itself would go on trying for minutes.

    Raises:
        ClusterError: If nothing answers there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto", which Ray resolves by itself
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"--address {address}: no Ray answers there ({error}); give the HOST:PORT that `ray "
            "start --head` printed, or leave it out to use this machine"
        ) from error


@contextmanager
def _ray(address: str | None, max_concurrent: int | None, scratch: Path) -> Iterator[None]:
    """A Ray to work with: the one at `address`, or one of our own that ends with this block."""
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any]
    if address is None:
        # Its workers inherit this process's variables, and so may be started ahead of time, which
        # Ray does not do for those that are given a runtime_env.
        variables = QUIET | WORKERS | _module_path()
        options = {
            "address": "local",
            "num_cpus": max(len(os.sched_getaffinity(0)), max_concurrent or 1),
            "include_dashboard": False,
            "object_store_memory": 100 * 1024**2,
            "_temp_dir": str(scratch),
        }
        if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            # A Ray of one's own asks for a token, and would leave one in the home folder. Kept to
            # the end of this process, since Ray reads it once.
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    else:
        _reachable(address)
        variables = QUIET
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        passed |= _module_path()
        options = {"address": address, "runtime_env": {"env_vars": WORKERS | passed}}
    with _environment(variables):
        import ray

        ray.init(**options, namespace="fpt-sweep", log_to_driver=False, logging_level=logging.ERROR)
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            ray.shutdown()


def _module_path() -> dict[str, str]:
    """Where workers find classes that a sweep file names."""
    own = [*extension.FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(own)} if own else {}


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for as long as the block lasts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for Ray's own files, removed at the end; those of killed drivers are removed too.

    Its path is short, since Ray puts sockets into it, whose paths may have 107 characters.
    """
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > 20:
        parent = Path("/tmp")
    for old in parent.glob("fpt-sweep-*/lock"):
        try:
            with old.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old.parent, ignore_errors=True)
        except OSError:
            continue  # it belongs to a running driver, or to somebody else
    folder = Path(tempfile.mkdtemp(prefix="fpt-sweep-", dir=parent))
    with (folder / "new").open("w") as lock:
        # The kernel lets go of it when this process ends, however it ends. It gets the name that
        # others look for once it is locked.
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "new").rename(folder / "lock")
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class _Line:
    """An actor between workers and driver: reports go up, `stop` comes down."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._some = asyncio.Event()
        self._halt = asyncio.Event()

    async def report(self, events: list[Event]) -> None:
        self._events += events
        self._some.set()

    async def take(self) -> list[Event]:
        """All events since the last call, as soon as there is one."""
        await self._some.wait()
        self._some.clear()
        events, self._events = self._events, []
        return events

    async def halt(self) -> None:
        self._halt.set()

    async def halted(self) -> None:
        """Returns when the sweep is to stop."""
        await self._halt.wait()


class _Reports:
    """A worker's end of the line."""

    def __init__(self, line: ActorHandle[_Line], interval: float) -> None:
        self._line = line
        self._interval = interval
        self._sent = time.monotonic()
        self._latest: dict[tuple[str, str], Event] = {}
        self._halted = _halted(line)

    def start(self, point: Point, step: int) -> None:
        event = Event(
            "trial_started", point.trial_id, point.label, step=step, steps=point.config.steps
        )
        self._line.report.remote([event])

    def record(self, point: Point, record: Record) -> None:
        self._latest[point.trial_id, record.split] = Event(
            "record",
            point.trial_id,
            point.label,
            step=record.step,
            steps=point.config.steps,
            split=record.split,
            loss=record.loss,
            accuracy=record.accuracy,
        )
        now = time.monotonic()
        if now - self._sent >= self._interval:
            self._line.report.remote(list(self._latest.values()))
            self._sent, self._latest = now, {}

    def halted(self) -> bool:
        import ray

        ready, _ = ray.wait([self._halted], timeout=0)
        return bool(ready)


@functools.cache
def _halted(line: ActorHandle[_Line]) -> ObjectRef[None]:
    """One pending call a process: a look at whether it has returned asks nobody."""
    return line.halted.remote()


@functools.cache
def _ledger(uri: str) -> Ledger:
    """The ledger, once a worker process."""
    return Ledger(uri)


def _trainable(
    line: ActorHandle[_Line], interval: float, uri: str, train: Train
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What Tune runs: it takes a job and returns results."""

    def pack(config: dict[str, Any]) -> dict[str, Any]:
        reports = _Reports(line, interval)
        results = worker.run_pack(
            config["job"],
            _ledger(uri),
            train=train,
            on_start=reports.start,
            on_record=reports.record,
            halted=reports.halted,
        )
        # With `done` in its result a trial takes one round trip to the driver; without, two.
        return {"results": results, "done": True}

    return pack


class WorkerDiedError(Exception):
    """A worker's process ended without a word."""

    def __init__(self) -> None:
        super().__init__(
            "the worker process ended: killed, out of the machine's memory, or its node was lost"
        )


def _drive(
    planned: Plan,
    ledger: Ledger,
    interrupts: _Interrupts,
    lease: Lease,
    emit: OnEvent,
    *,
    address: str | None,
    max_concurrent: int | None,
    gpus: float | None,
    stale: bool,
    train: Train,
) -> Mapping[str, str]:
    """Run a plan on Ray; returns the ids of the trials that failed, with the reasons."""
    with _scratch() as scratch, _ray(address, max_concurrent, scratch):
        import ray
        from ray import tune
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        interrupts.catch()
        have = ray.cluster_resources()  # type: ignore[no-untyped-call]
        if gpus is None:
            gpus = 1.0 if have.get("GPU") else 0.0
        if gpus > have.get("GPU", 0):
            raise ClusterError(
                f"gpus: {gpus:g} asked for a pack, and this Ray has {have.get('GPU', 0):g}; "
                "ask for fewer (a fraction shares one), or for 0 to train on the CPU"
            )
        # The workers of another Ray find out by themselves, and such trials fail by `data`.
        own = address is None and "RAY_ADDRESS" not in os.environ
        if own and not gpus and planned.refusals:
            raise ClusterError(f"{planned.sweep.file}: {'; '.join(planned.refusals)}")
        slots = max_concurrent or max(1, int(have.get("CPU", 1)))
        if gpus:
            slots = min(slots, max(1, int(have["GPU"] / gpus)))
        if (workers := Workers(slots, gpus)) != planned.workers:
            planned = plan(planned.sweep, ledger, stale=stale, workers=workers)
        before = Counter(
            row["trial_id"]
            for row in ledger.failures(planned.status).select(["trial_id", "cause"]).to_pylist()
            if row["cause"] != "retried"
        )
        agenda = Agenda(planned, before, emit)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(_Line).options(
            num_cpus=0, max_concurrency=100_000, scheduling_strategy=here
        )
        line = cast("ActorHandle[_Line]", actor.remote())
        trainable = tune.with_resources(
            _trainable(line, max(1.0, slots / REPORTS_A_SECOND), ledger.uri, train),
            lambda config: tune.PlacementGroupFactory([dict(config["job"].resources)]),
        )
        pending = {"TUNE_MAX_PENDING_TRIALS_PG": str(min(slots, 200))}
        try:
            with _environment(pending):
                while not (agenda.finished or interrupts.count):
                    search, schedule = _adapters(agenda, slots, line, ledger, interrupts, lease)
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
                            storage_path=str(scratch / "tune"),
                            verbose=0,
                        ),
                    ).fit()
        except KeyboardInterrupt:
            emit(Event("message", message="killed: running trials go on from their last states"))
        return agenda.failed


def _adapters(
    agenda: Agenda,
    slots: int,
    line: ActorHandle[_Line],
    ledger: Ledger,
    interrupts: _Interrupts,
    lease: Lease,
) -> tuple[Searcher, TrialScheduler]:
    """What Tune asks for the next trial, and what it calls at each turn of its loop.

    The latter is a scheduler that leaves the order alone. A callback of Tune's would do too, but
    with the first one Tune imports MLflow and all else that it could call back, for seconds.
    """
    import ray
    from ray import cloudpickle
    from ray.tune.schedulers import FIFOScheduler
    from ray.tune.search import Searcher

    attempts: dict[str, str] = {}
    """Tune's id of a trial -> our attempt."""

    class Feed(Searcher):
        given = 0

        def suggest(  # type: ignore[override]  # FINISHED is a string
            self, trial_id: str
        ) -> dict[str, Any] | str | None:
            if agenda.finished or self.given >= WAVE or interrupts.count:
                return Searcher.FINISHED
            job = agenda.next() if len(agenda.running) < slots else None
            if job is None:
                return None
            self.given += 1
            attempts[trial_id] = job.attempt
            return {"job": job}

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            if not error:
                agenda.ended(attempts.pop(trial_id), result["results"] if result else ())

        def save(self, checkpoint_path: str) -> None:
            pass  # nothing of Tune's is ever restored

        restore = save

        def __reduce__(self) -> tuple[type, tuple[()]]:
            return object, ()  # Tune keeps a copy of what it was given, for the same purpose

    class Watch(FIFOScheduler):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.coming: ObjectRef[list[Event]] | None = None
            self.kill_at: float | None = None
            self.halted = False
            self.training: set[str] = set()

        def choose_trial_to_run(self, tune_controller: Any) -> None:
            """Called at each turn; None leaves Tune's own order, and spares it a look at all."""
            if interrupts.count:
                agenda.stop("stopping: running trials save their states; Ctrl-C again kills them")
                self.kill_at = self.kill_at or time.monotonic() + STOP_SECONDS
            if not lease.held:
                agenda.stop("stopping: another driver has taken over this cluster")
            if agenda.stopped is not None and not self.halted:
                line.halt.remote()
                self.halted = True
            running = {p.trial_id for job in agenda.running.values() for p in job.points}
            # A trial without a record has nothing to save: its worker may be importing for long.
            if self.kill_at and (time.monotonic() > self.kill_at or not running & self.training):
                raise KeyboardInterrupt
            self.coming = self.coming or line.take.remote()
            if ray.wait([self.coming], timeout=0)[0]:
                for event in ray.get(self.coming):
                    # What a worker said of a trial may come later than the trial's end.
                    if event.trial_id in running:
                        agenda.emit(event)
                        if event.kind == "record":
                            self.training.add(event.trial_id)
                self.coming = None

        def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
            attempt = attempts.pop(trial.trial_id)
            with open(trial.pickled_error_file, "rb") as file:
                error = cloudpickle.load(file)
            agenda.ended(attempt, _lost(agenda.running[attempt], ledger, error))

        def __reduce__(self) -> tuple[type, tuple[()]]:
            return object, ()

    return Feed(), Watch()


def _lost(job: Job, ledger: Ledger, error: BaseException) -> tuple[Result, ...]:
    """What came of a job whose worker did not return."""
    from ray.exceptions import OutOfMemoryError, RayTaskError

    if isinstance(error, RayTaskError):
        # A pack raises after running out of memory; anything else that comes is a fault of ours.
        raised = error.cause or error
        if isinstance(raised, worker.EndWorkerError):
            return raised.results
        cause = worker.cause_of(raised)
    else:
        raised, cause = WorkerDiedError(), "worker"
        raised.__cause__ = error
        # Ray itself ends what takes too much of a machine: a pack is split, and a trial alone, for
        # whose neighbours it may have been, is tried again.
        if isinstance(error, OutOfMemoryError) and len(job.points) > 1:
            cause = "memory"
    ended: dict[str, Result] = {}
    with suppress(LedgerError):
        ended = worker.finished(job, ledger)
    return tuple(
        ended.get(point.trial_id) or worker.fail(ledger, job, point, cause, raised)
        for point in job.points
    )
