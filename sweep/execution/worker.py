"""What happens inside a worker: a pack is trained, and what comes of it is written to the ledger.

The order of writing is what makes a kill harmless. While a trial trains, its curve is written
before its state, once a minute: a killed trial goes on from its state and makes the later steps of
its curve again, and readers keep the last value of a step; no step is behind a state and nowhere.
When it ends, its backbone (if others need it), its curve and its state are written first and its
row last: the row is what makes it done.
While storage fails, trials train on, and those that have ended wait for it.

Whatever goes wrong is given a cause, because the cause decides what happens next: `data` and `code`
wait for a person, all others are tried again. Ray does not appear here: the driver hands in how to
report and when to stop.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fpt import contract
from fpt.config import TrialConfig
from fpt.files import DataError
from fpt.spec import JSON
from fpt.tasks.base import Baseline
from sweep.execution import output
from sweep.execution.causes import ENDS_PROCESS, NodeError, cause_of, ends_process
from sweep.execution.output import Log
from sweep.ledger import provenance
from sweep.ledger.ledger import WAITS, Cause, Ledger, LedgerError, TakenBy
from sweep.ledger.storage import StorageError
from sweep.planning.plan import changed_files, trained_by_other_code
from sweep.sweepfile.identity import IDENTITY_VERSION, trial_id
from sweep.sweepfile.schema import LimitsSpec
from sweep.sweepfile.trials import Point

if TYPE_CHECKING:
    from torch.nn import Module

    from fpt.checkpoints import State
    from fpt.trainer import Outcome, Record, Training

T = TypeVar("T")

Train = Callable[..., "Training"]
"""`fpt.train`, or what stands in for it where only the orchestration is measured."""

Halt = Literal["interrupted", "preempted"]
"""Why an attempt is to end before its trials have."""

PAUSES = (1.0, 30.0)
"""Seconds between two tries at storage that fails: the first, doubled up to the last."""

SHARED = (contract.ContractError, output.BreakpointError)
"""Errors of code that all trials of a pack have in common."""

CURVE = ("step", "split", "loss", "accuracy", "seconds", "examples")
"""What of a record goes into a curve, by the names of both."""

LOG_EVERY = 10
"""Steps between training records, at least."""

RECORDS = 500
"""Training records of a trial, at most: on a GPU each one waits for the device, and of more no plot
shows anything."""

HALT_SECONDS = 0.5
"""Between two looks at the stop flag, where no record comes sooner."""


@dataclass(frozen=True)
class Job:
    """An attempt at a pack, as the driver hands it out."""

    points: tuple[Point, ...]
    resources: Mapping[str, float]
    """What Ray reserves for it: {"CPU": 1} or {"CPU": 1, "GPU": 1}."""
    attempt: str
    """The attempt's own name; segments of curves and failures bear it."""
    attempts: Mapping[str, int]
    """Trial id -> attempts at it so far, this one included."""
    keep_backbones: Collection[str] = ()
    """Ids of the trials whose backbones others take."""
    keep_states: bool | None = None
    """`keep.trained` of the sweep file."""
    extends: Mapping[str, str] = field(default_factory=dict)
    """Trial id -> id of a shorter training of it, from whose end it goes on."""
    accumulation: int = 1
    """Parts of a batch, for want of memory; of packs of one."""
    code: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Trial id -> digests of the user's own code, as the driver has read it."""
    limits: LimitsSpec = field(default_factory=LimitsSpec)
    avoid: Collection[str] = ()
    """Ray's ids of nodes where not to run it, as long as there are others."""
    node: str | None = None
    """Of the Ray cluster, where it runs; the worker knows it."""

    def __str__(self) -> str:
        return self.attempt  # Tune makes a tag of the text of whatever a trial gets

    @property
    def device(self) -> str:
        """Where it trains."""
        return "cuda" if self.resources.get("GPU") else "cpu"


@dataclass(frozen=True)
class Result:
    """What came of one trial of a pack."""

    trial_id: str
    status: Literal["done", "diverged", "failed"]
    cause: Cause | None = None
    """Of a failure."""
    exception: str | None = None
    message: str | None = None
    loss: float | None = None
    """Of the test split."""
    accuracy: float | None = None
    step: int | None = None
    """Of a failure: the last step heard of."""
    undecided: bool = False
    """Of a failure by `code`: the pack failed as a whole, and which of its trials is to blame is
    not known. It is not in the ledger, where this cause waits for a person."""


class EndWorkerError(Exception):
    """Raised when everything is written, for Ray to end this process (see `ENDS_PROCESS`)."""

    def __init__(self, results: tuple[Result, ...]) -> None:
        super().__init__(results)
        self.results = results


@dataclass
class Progress:
    """What is known here of a trial that is training."""

    point: Point
    started_at: datetime
    clock: float = field(default_factory=time.monotonic)
    """The monotonic clock at that time: the wall clock may be set while it trains."""
    step: int | None = None
    """The last step heard of; None before the first record."""
    seconds: float = 0.0
    """Of training, over all attempts, up to that step."""
    began: float = 0.0
    """What those seconds were when this attempt began."""
    saved: float = 0.0
    """What they were in the last saved state."""
    segment: int = 0
    extended_from: str | None = None
    row_padding: int | None = None
    """See `fpt.trainer.Training.row_padding`."""
    rows: list[JSON] = field(default_factory=list)
    """Of the curve, since the last segment."""
    logged: int = 0
    """Characters of the log that are written."""

    def now(self) -> datetime:
        """Return the time: when this attempt started, and what has passed since."""
        return self.started_at + timedelta(seconds=time.monotonic() - self.clock)


@dataclass
class Pulse:
    """Signs of life of an attempt, for another thread to read."""

    phase: Literal["preparing", "training", "writing"] = "preparing"
    """writing: what is left to do is to write, and storage fails."""
    beats: int = 0
    """Rises with each step, and with each batch of an evaluation."""
    steps: dict[str, int] = field(default_factory=dict)
    """Trial id -> the last step recorded."""
    unsaved: dict[str, float] = field(default_factory=dict)
    """Trial id -> seconds of training that no saved state holds."""

    def listen(self, training: Training) -> None:
        """Beat with the batches of evaluations; what stands in for a trainer may have none."""
        if (model := getattr(training, "model", None)) is not None:
            model.backbone.register_forward_pre_hook(self._beat)

    def _beat(self, backbone: Module, inputs: object) -> None:
        self.beats += not backbone.training


def train_on_this_core(trials: Sequence[TrialConfig], **options: Any) -> Training:
    """`fpt.train` at one thread: a worker a core beats one worker with threads.

    The number of threads belongs to a thread, and Ray gives each trial a thread of its own.
    """
    import torch

    from fpt.trainer import train

    torch.set_num_threads(1)
    return train(trials, **options)


def run_pack(
    job: Job,
    ledger: Ledger,
    *,
    train: Train = train_on_this_core,
    on_start: Callable[[Point, int], None] = lambda point, step: None,
    on_record: Callable[[Point, Record], None] = lambda point, record: None,
    halted: Callable[[], Halt | None] = lambda: None,
    pulse: Pulse | None = None,
) -> tuple[Result, ...]:
    """Train a pack, write all that comes of it, and say what that was.

    Args:
        job: The attempt.
        ledger: Where everything is read and written.
        train: What trains.
        on_start: Called once a trial with the step that it starts from.
        on_record: Called with each record.
        halted: Asked after each record, and between them every `HALT_SECONDS`; a reason saves the
            states and ends the attempt.
        pulse: Where signs of life are left.

    Raises:
        EndWorkerError: If this process must not train again: all is written.
    """
    if job.device == "cuda":
        gc.collect()  # it counts objects, and sees nothing of what they hold of a GPU
    results: dict[str, Result] = {}
    raised: BaseException | None = None
    trials = [Progress(point, datetime.now(UTC)) for point in job.points]
    with output.recorded(job.points[0].label) as log:
        missing: list[Progress] = []
        try:
            results |= patiently(lambda: finished(job, ledger), job, halted)
            missing = [trial for trial in trials if trial.point.trial_id not in results]
            if missing:
                attempt = _Attempt(
                    job, ledger, missing, results, on_record, halted, pulse or Pulse(), log
                )
                attempt.run(train, on_start)
        except Exception as error:
            cause, raised = cause_of(error), error
            left = [trial for trial in trials if trial.point.trial_id not in results]
            for trial in left:
                # A pack shares data, weights and the classes of both.
                results[trial.point.trial_id] = (
                    _undecided(trial.point, error)
                    if len(left) > 1 and cause == "code" and not isinstance(error, SHARED)
                    else _fail(ledger, job, trial, cause, error)
                )
            # Of the frames that it went through: they hold the model, and this one holds it.
            traceback.clear_frames(error.__traceback__)
        with contextlib.suppress(LedgerError):  # a log is worth no failure
            for trial in missing:
                _keep_log(ledger, job, trial, log)
    ended = tuple(results.values())
    if (raised and ends_process(raised)) or any(one.cause in ENDS_PROCESS for one in ended):
        raise EndWorkerError(ended) from raised
    return ended


def patiently(call: Callable[[], T], job: Job, halted: Callable[[], Halt | None]) -> T:
    """Call again for as long as storage fails, within the job's limit.

    Raises:
        StorageError: If it still fails then, or if the attempt is to end.
    """
    until = time.monotonic() + job.limits.storage_seconds
    pause, longest = PAUSES
    while True:
        try:
            return call()
        except StorageError:
            if time.monotonic() + pause > until or halted():
                raise
        time.sleep(pause)
        pause = min(2 * pause, longest)


def finished(job: Job, ledger: Ledger) -> dict[str, Result]:
    """The trials of a job that have ended already, by whosever hand."""
    rows = ledger.trials([point.trial_id for point in job.points]).to_pylist()
    kept = ledger.backbones() if job.keep_backbones else set()
    outdated = trained_by_other_code(job.points, ledger)
    return {
        row["trial_id"]: Result(
            row["trial_id"],
            row["outcome"],
            message=None if row["attempt"] == job.attempt else "finished elsewhere",
            loss=row["test_loss"],
            accuracy=row["test_accuracy"],
        )
        for row in rows
        if row["trial_id"] not in outdated
        and (
            row["outcome"] == "diverged"
            or row["trial_id"] not in job.keep_backbones
            or row["trial_id"] in kept
        )
    }


def log_every(steps: int) -> int:
    """Return the steps between two training records of a trial: ten, or as many more as make about
    `RECORDS` of them.
    """
    return LOG_EVERY * max(1, -(-steps // (LOG_EVERY * RECORDS)))


def _step(training: Training) -> list[Record] | None:
    """Train a step; None once all trials have ended."""
    try:
        return training.step()
    except StopIteration:
        return None


class _Attempt:
    """One call of the trainer, and the writing that goes with it."""

    def __init__(
        self,
        job: Job,
        ledger: Ledger,
        trials: Sequence[Progress],
        results: dict[str, Result],
        on_record: Callable[[Point, Record], None],
        halted: Callable[[], Halt | None],
        pulse: Pulse,
        log: Log,
    ) -> None:
        self.job = job
        self.ledger = ledger
        self.trials = trials
        self.results = results
        self.on_record = on_record
        self.halted = halted
        self.pulse = pulse
        self.log = log
        self.again: Collection[str] = ()
        """Trials that have a row, and train since the backbone that others need is gone."""
        self.outdated: Collection[str] = ()
        """Trials that have a row which other code of the user's gave: theirs takes its place."""
        self._pause = PAUSES[0]
        self._not_before = 0.0
        """Storage that failed is not tried again before."""

    def run(self, train: Train, on_start: Callable[[Point, int], None]) -> None:
        for trial in self.trials:
            try:
                self._check_identity(trial.point)
            except DataError as error:
                self._fail(trial, "data", error)
        self.trials = [t for t in self.trials if t.point.trial_id not in self.results]
        if not self.trials:
            return
        _check_device(self.job.resources)
        # Those who train; the others were done, or cannot.
        self.job = replace(self.job, points=tuple(trial.point for trial in self.trials))
        if self.job.keep_backbones:
            names = {trial.point.trial_id for trial in self.trials}
            self.again = patiently(self.ledger.done, self.job, self.halted) & names
        for trial in self.trials:
            contract.check_trial(trial.point.config)
        points = [trial.point for trial in self.trials]
        self.outdated = patiently(
            lambda: trained_by_other_code(points, self.ledger), self.job, self.halted
        )
        states = [
            patiently(functools.partial(self._saved, trial), self.job, self.halted)
            for trial in self.trials
        ]
        for trial, state in zip(self.trials, states, strict=True):
            if state is not None:
                trial.began = trial.seconds = trial.saved = state.figures.seconds
        _keep_to_share(self.job.resources)
        options: dict[str, Any] = {}
        if self.job.accumulation > 1:
            options["accumulation"] = self.job.accumulation
        training = train(
            [trial.point.config for trial in self.trials],
            device=self.job.device,
            state=states,
            backbones=patiently(self._backbones, self.job, self.halted),
            log_every=[log_every(trial.point.config.steps) for trial in self.trials],
            **options,
        )
        padding = getattr(training, "row_padding", None)
        if padding == 0 and len(self.trials) > 1:
            del training
            self._run_one_at_a_time(train, on_start)
            return
        for trial, state in zip(self.trials, states, strict=True):
            trial.row_padding = padding if trial.row_padding is None else trial.row_padding
            on_start(trial.point, 0 if state is None else state.step)
        self.pulse.listen(training)
        flushed = looked = time.monotonic()
        try:
            while (records := _step(training)) is not None:
                self.pulse.phase = "training"
                self.pulse.beats += 1
                for record in records:
                    self._take(record)
                if not records and time.monotonic() - looked < HALT_SECONDS:
                    continue
                looked = time.monotonic()
                self._if_storage_allows(training, self._settle)
                stop = self.halted()
                due = time.monotonic() - flushed >= self.job.limits.save_seconds
                if stop:
                    # Storage may have been away when a trial of the pack ended.
                    self._insist(training, self._settle)
                    self._insist(training, self._save)
                    self._halt(stop)
                    return
                if due and self._if_storage_allows(training, self._save):
                    flushed = time.monotonic()
        except Exception as error:
            # At its end the trainer raises what made single trials leave; they are settled as such.
            if not any(error is one for one in training.failures.values()):
                raise
        self._insist(training, self._settle)

    def _run_one_at_a_time(self, train: Train, on_start: Callable[[Point, int], None]) -> None:
        """Train the members of a pack that would not end with the bits that they have alone."""
        _note_inexact()
        for trial in self.trials:
            trial.row_padding = 0
            if stop := self.halted():
                self._fail(trial, stop, InterruptedError("stopped before it began"))
                continue
            job = replace(self.job, points=(trial.point,))
            own = _Attempt(
                job,
                self.ledger,
                [trial],
                self.results,
                self.on_record,
                self.halted,
                self.pulse,
                self.log,
            )
            own.run(train, on_start)

    def _if_storage_allows(self, training: Training, write: Callable[[Training], None]) -> bool:
        """Write, and say whether that went well. If not, trials train on, and it is tried later."""
        if time.monotonic() < self._not_before:
            return False
        try:
            write(training)
        except StorageError:
            self._not_before = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, PAUSES[1])
            return False
        self._pause = PAUSES[0]
        return True

    def _insist(self, training: Training, write: Callable[[Training], None]) -> None:
        """Write, within the limit of what storage may be away for.

        Raises:
            StorageError: If it is away for longer.
        """
        self.pulse.phase = "writing"
        patiently(lambda: write(training), self.job, lambda: None)

    def _backbones(self) -> dict[str, Path]:
        parents = {trial.point.parent for trial in self.trials} - {None}
        return {parent: self.ledger.backbone_file(parent) for parent in parents if parent}

    def _check_identity(self, point: Point) -> None:
        found = trial_id(point.config)
        if found != point.trial_id:
            raise DataError(
                f"{point.label}: was planned as trial {point.trial_id} and is {found} on "
                f"{provenance.host()}: its data or weights differ there; copy the same files, or "
                "install the same version of fpt-sweep"
            )
        planned = self.job.code.get(point.trial_id, {})
        if changed := changed_files(planned, point.config.own_code if planned else {}):
            raise DataError(
                f"{point.label}: {changed} differs on {provenance.host()} from what the driver has "
                "read; was it edited since the run began? run again, with the same files everywhere"
            )

    def _saved(self, trial: Progress) -> State | None:
        """The state to go on from: its own, else the end of a shorter training of the trial."""
        own = trial.point.trial_id
        shorter = self.job.extends.get(own)
        for name in filter(None, (own, shorter)):
            best: State | None = None
            for data in self.ledger.saved_states(name):
                from fpt.checkpoints import State

                # One that cannot be read costs the steps behind it, and no more.
                with contextlib.suppress(ValueError):
                    state = State.from_bytes(data)
                    if state.code != trial.point.config.own_code:
                        continue  # what other code has trained
                    best = state if best is None or state.step > best.step else best
            if best is not None:
                trial.extended_from = shorter
                if name == shorter:
                    trial.rows = self._curve_of(name, trial.point.config)
                return best
        return None

    def _curve_of(self, name: str, config: TrialConfig) -> list[JSON]:
        """The curve up to where a shorter training ended, which is the longer one's too.

        Its reading of the test set (protocol sound) is not: that is done once, at the end.
        """
        rows = self.ledger.curves([name]).to_pylist()
        return [
            {column: row[column] for column in CURVE}
            for row in rows
            if row["split"] != "test" or config.protocol == "paper"
        ]

    def _take(self, record: Record) -> None:
        trial = self.trials[record.trial]
        trial.step, trial.seconds = record.step, record.seconds
        self.pulse.steps[trial.point.trial_id] = record.step
        self.pulse.unsaved[trial.point.trial_id] = max(0.0, trial.seconds - trial.saved)
        trial.rows.append({column: getattr(record, column) for column in CURVE})
        self.on_record(trial.point, record)

    def _save(self, training: Training) -> None:
        for index, state in training.states().items():
            trial = self.trials[index]
            name = trial.point.trial_id
            self._write_curve(trial)
            self.ledger.save_state(
                name, state.to_bytes(), step=state.step, attempt=self.job.attempt
            )
            trial.saved, self.pulse.unsaved[name] = trial.seconds, 0.0
            _keep_log(self.ledger, self.job, trial, self.log)

    def _write_curve(self, trial: Progress) -> None:
        _write_curve(self.ledger, self.job, trial)

    def _halt(self, cause: Halt) -> None:
        for trial in self.trials:
            if trial.point.trial_id not in self.results:
                error = InterruptedError(f"stopped at step {trial.step}, with its state saved")
                self._fail(trial, cause, error)

    def _fail(self, trial: Progress, cause: Cause, error: BaseException) -> None:
        self.results[trial.point.trial_id] = _fail(self.ledger, self.job, trial, cause, error)

    def _settle(self, training: Training) -> None:
        """Write the trials that have ended or left since."""
        for index, error in training.failures.items():
            if self.trials[index].point.trial_id not in self.results:
                self._fail(self.trials[index], cause_of(error), error)
        for index, outcome in training.outcomes.items():
            trial = self.trials[index]
            if trial.point.trial_id not in self.results:
                if trial.point.trial_id in self.job.keep_backbones and outcome.outcome == "done":
                    self.ledger.put_backbone(trial.point.trial_id, training.backbone(index))
                self._commit(trial, outcome)

    def _commit(self, trial: Progress, outcome: Outcome) -> None:
        name, config = trial.point.trial_id, trial.point.config
        keeps = self.job.keep_states
        if keeps is None:
            keeps = not {"attention", "attention:last", "feedforward"} & set(config.train)
        anew = name in (*self.again, *self.outdated)
        first = anew or self.ledger.committed_by(name) in (None, self.job.attempt)
        if first:  # else the tensors are those of whoever wrote the row
            self._write_curve(trial)
            if keeps:
                self.ledger.put_state(name, outcome.state.to_bytes())
            row = trial_row(trial, outcome, self.job)
            if name in self.outdated:
                self.ledger.recommit(row)
            elif isinstance(self.ledger.commit(row), TakenBy):
                first = name in self.again
            if not keeps:
                self.ledger.drop_state(name)
        if not first:
            self._note_doubled(trial, outcome)
        self.results[name] = Result(
            name,
            "diverged" if outcome.outcome == "diverged" else "done",
            message=None if first else "another driver had finished it first",
            loss=outcome.test_loss,
            accuracy=outcome.test_accuracy,
        )

    def _note_doubled(self, trial: Progress, outcome: Outcome) -> None:
        """Work that was done twice is counted, and is no failure."""
        error = FileExistsError("another attempt had finished this trial first")
        trial.seconds, trial.saved = outcome.seconds, trial.began
        with contextlib.suppress(LedgerError):
            self.ledger.fail(failure_row(self.job, trial, "doubled", error))


@functools.cache
def _note_inexact() -> None:
    """Say once a process that packs are not exact here; each trial's row says it too."""
    warnings.warn(
        f"{provenance.processor()}: no padding of rows that was tried gives the trials of a "
        "pack the bits that they have alone, so that they train one at a time (row_padding 0 in "
        "their rows); later plans leave them alone",
        RuntimeWarning,
        stacklevel=2,
    )


def _check_device(resources: Mapping[str, float]) -> None:
    """Refuse to train on a core where a GPU is reserved.

    Raises:
        NodeError: If torch finds no CUDA device here.
    """
    if not resources.get("GPU"):
        return
    import torch

    if not torch.cuda.is_available():
        raise NodeError(
            f"{provenance.host()}: Ray reserved a GPU, and torch {torch.__version__} finds no CUDA "
            "device there: look at its driver (nvidia-smi) and at torch's build, or start its Ray "
            "with --num-gpus=0"
        )


def _keep_to_share(resources: Mapping[str, float]) -> None:
    """Of a GPU's memory let this process have the part that it has of the GPU: who takes more runs
    out of memory by itself, and not the one beside it.
    """
    if part := resources.get("GPU"):
        import torch

        torch.cuda.set_per_process_memory_fraction(min(part, 1.0))


def _write_curve(ledger: Ledger, job: Job, trial: Progress) -> None:
    """Write the records since the last piece of a curve."""
    if trial.rows:
        ledger.append_curve(trial.point.trial_id, job.attempt, trial.segment, trial.rows)
        trial.segment += 1
        trial.rows = []


def _keep_log(ledger: Ledger, job: Job, trial: Progress, log: Log) -> None:
    """Write what was printed, if that is more than last time."""
    if log.written > trial.logged:
        written = log.written
        ledger.put_log(trial.point.trial_id, job.attempt, log.text())
        trial.logged = written


def _undecided(point: Point, error: BaseException) -> Result:
    message = str(error) or repr(error)
    return Result(point.trial_id, "failed", "code", type(error).__name__, message, undecided=True)


def fail(
    ledger: Ledger,
    job: Job,
    point: Point,
    cause: Cause,
    error: BaseException,
    *,
    step: int | None = None,
    lost: float = 0.0,
) -> Result:
    """Write a failed attempt to the ledger, as far as the ledger can be written at all."""
    trial = Progress(point, datetime.now(UTC), step=step, seconds=lost)
    return _fail(ledger, job, trial, cause, error)


def _fail(ledger: Ledger, job: Job, trial: Progress, cause: Cause, error: BaseException) -> Result:
    name, step = trial.point.trial_id, trial.step
    message = str(error) or repr(error)
    try:
        _write_curve(ledger, job, trial)
        ledger.fail(failure_row(job, trial, cause, error))
    except LedgerError as unwritten:
        message = f"{message}; and then {unwritten}"
        # Only what is written waits for a person.
        kept = cause if cause not in WAITS else "storage"
        return Result(name, "failed", kept, "LedgerError", message, step=step)
    return Result(name, "failed", cause, type(error).__name__, message, step=step)


def failure_row(
    job: Job, trial: Progress, cause: Cause | Literal["doubled"], error: BaseException
) -> JSON:
    """The row of an attempt that failed: a value for each column of the ledger's failures."""
    last = output.tail()
    printed = f"\nprinted last:\n{last}\n" if last else ""
    return {
        "trial_id": trial.point.trial_id,
        "attempt": job.attempt,
        "cause": cause,
        "exception": type(error).__name__,
        "message": str(error) or repr(error),
        "traceback": "".join(traceback.format_exception(error)) + printed,
        "config": _json(trial.point.config.model_dump(mode="json")),
        "step": trial.step,
        "host": provenance.host(),
        "node": job.node,
        "device": job.device,
        "seconds": trial.seconds,
        "lost": max(0.0, trial.seconds - trial.saved),
        "pack_size": len(job.points),
        "accumulation": job.accumulation,
        "at": datetime.now(UTC),
    }


def trial_row(trial: Progress, outcome: Outcome, job: Job) -> JSON:
    """The row of a trial that has ended: a value for each column of the ledger's trials."""
    point, config = trial.point, trial.point.config
    identity = config.identity()
    task = dict(identity["task"])
    task_name, task_version = task.pop("name"), task.pop("version")
    backbone = identity["backbone"]
    baseline = _baseline(config)
    return {
        "trial_id": point.trial_id,
        "cell_id": point.cell_id,
        "identity_version": IDENTITY_VERSION,
        "task_version": task_version,
        "config": _json(identity),
        # What it was.
        "task": task_name,
        "task_parameters": _json(task),
        "backbone": config.backbone.name,
        "layers": config.backbone.layers,
        "width": config.backbone.width,
        "heads": config.backbone.heads,
        "weights": backbone["weights"],
        "initialiser": backbone["initialiser"],
        "pretraining": config.pretraining,
        "backbone_seed": identity["backbone_seed"],
        "train": "+".join(config.train),
        "optimizer": _json(identity["optimizer"]),
        "learning_rate": config.learning_rate,
        "batch_size": config.batch_size,
        "steps": config.steps,
        "stop": None if identity["stop"] is None else _json(identity["stop"]),
        "dropout": config.dropout,
        "numerics": config.numerics,
        "protocol": config.protocol,
        "evaluate_every": config.evaluation.every,
        "seed": config.seed,
        # What came of it.
        "outcome": outcome.outcome,
        "stopped": outcome.stopped,
        "steps_trained": outcome.steps,
        "best_step": outcome.best_step,
        "train_loss": outcome.train_loss,
        "train_accuracy": outcome.train_accuracy,
        "training_set_loss": outcome.training_set_loss,
        "training_set_accuracy": outcome.training_set_accuracy,
        "validation_loss": outcome.validation_loss,
        "validation_accuracy": outcome.validation_accuracy,
        "test_loss": outcome.test_loss,
        "test_accuracy": outcome.test_accuracy,
        "baseline_accuracy": baseline.accuracy,
        "baseline_rule": baseline.rule,
        # What it took.
        "seconds": outcome.seconds,
        "examples": outcome.examples,
        "pack_size": len(job.points),
        "accumulation": job.accumulation,
        "row_padding": trial.row_padding,
        "attempts": job.attempts[point.trial_id],
        "attempt": job.attempt,
        "extended_from": trial.extended_from,
        "parameters": sum(group["parameters"] for group in outcome.groups.values()),
        "parameters_trained": sum(group["trained"] for group in outcome.groups.values()),
        "groups": _json(outcome.groups),
        # Where it comes from.
        "backbone_digest": outcome.backbone_digest,
        "data_digest": outcome.data_digest,
        "own_code": _json(config.own_code) if config.own_classes else None,
        **provenance.code(),
        "versions": provenance.versions(),
        "host": provenance.host(),
        "device": job.device,
        "device_name": _model_of(job.device),
        "started_at": trial.started_at,
        "finished_at": trial.now(),
    }


@functools.cache
def _model_of(device: str) -> str:
    """The model of this machine's processor, or of the GPU that this process got."""
    if device == "cpu":
        return provenance.processor()
    import torch

    return torch.cuda.get_device_name(device)


_BASELINES: dict[str, Baseline] = {}


def _baseline(config: TrialConfig) -> Baseline:
    """The task's trivial baseline, once a process: some are computed over the whole test set."""
    key = _json([config.protocol, config.task.model_dump(mode="json")])
    if key not in _BASELINES:
        _BASELINES[key] = config.task.baseline(config.protocol)
    return _BASELINES[key]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
