"""What happens inside a worker: a pack is trained, and what comes of it is written to the ledger.

The order of writing is what makes a kill harmless. While a trial trains, its state is saved before
its curve, once a minute: a killed trial goes on from its state and writes the later steps of its
curve again, and readers keep the last value of a step. When it ends, its backbone (if others need
it), its state and its curve are written first and its row last: the row is what makes it done.

Whatever goes wrong is given a cause, because the cause decides what happens next: `data` and `code`
wait for a person, `memory`, `storage`, `worker` and `interrupted` are tried again. Ray does not
appear here: the driver hands in how to report and when to stop.
"""

from __future__ import annotations

import contextlib
import errno
import json
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from fpt.config import TrialConfig
from fpt.content import DataError
from fpt.spec import JSON
from fpt.tasks.base import Baseline
from sweep import provenance
from sweep.ledger import Ledger, LedgerError
from sweep.trials import IDENTITY_VERSION, Point, trial_id

if TYPE_CHECKING:
    from fpt.checkpoints import State
    from fpt.trainer import Outcome, Record, Training

Train = Callable[..., "Training"]
"""`fpt.train`, or what stands in for it where only the orchestration is measured."""

Cause = Literal["data", "code", "memory", "worker", "storage", "interrupted"]
"""Why an attempt at a trial came to nothing."""

FLUSH_SECONDS = 60.0
"""Between two saved states: what a kill can cost a running trial."""

CURVE = ("step", "split", "loss", "accuracy", "seconds", "examples")
"""What of a record goes into a curve, by the names of both."""

LOG_EVERY = 10
"""Steps between training records, hence between two looks at the stop flag. On a
GPU each one waits for the device."""


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
    undecided: bool = False
    """Of a failure by `code`: the pack failed as a whole, and which of its trials is to blame is
    not known. It is not in the ledger, where this cause waits for a person."""


class EndWorkerError(Exception):
    """Raised when everything is written, for Ray to end this process.

    After running out of memory, what an allocator keeps would fail the next trial too.
    """

    def __init__(self, results: tuple[Result, ...]) -> None:
        super().__init__(results)
        self.results = results


@dataclass
class Progress:
    """What is known here of a trial that is training."""

    point: Point
    started_at: datetime
    step: int | None = None
    """The last step heard of; None before the first record."""
    seconds: float = 0.0
    segment: int = 0
    extended_from: str | None = None
    rows: list[JSON] = field(default_factory=list)
    """Of the curve, since the last segment."""


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
    halted: Callable[[], bool] = lambda: False,
) -> tuple[Result, ...]:
    """Train a pack, write all that comes of it, and say what that was.

    Args:
        job: The attempt.
        ledger: Where everything is read and written.
        train: What trains.
        on_start: Called once a trial with the step that it starts from.
        on_record: Called with each record.
        halted: Asked after each record; True saves the states and ends the attempt.

    Raises:
        EndWorkerError: If memory ran out: all is written, and this process should end.
    """
    results: dict[str, Result] = {}
    trials = [Progress(point, datetime.now(UTC)) for point in job.points]
    try:
        results |= finished(job, ledger)
        missing = [trial for trial in trials if trial.point.trial_id not in results]
        if missing:
            _Attempt(job, ledger, missing, results, on_record).run(train, on_start, halted)
    except Exception as error:
        cause = cause_of(error)
        left = [trial for trial in trials if trial.point.trial_id not in results]
        for trial in left:
            # Data and weights that are missing are missing to all, since a pack shares them.
            results[trial.point.trial_id] = (
                _undecided(trial.point, error)
                if len(left) > 1 and cause == "code"
                else fail(
                    ledger, job, trial.point, cause, error, step=trial.step, seconds=trial.seconds
                )
            )
        if cause == "memory":
            raise EndWorkerError(tuple(results.values())) from error
    return tuple(results.values())


def finished(job: Job, ledger: Ledger) -> dict[str, Result]:
    """The trials of a job that have ended already, by whosever hand."""
    rows = ledger.trials([point.trial_id for point in job.points]).to_pylist()
    kept = ledger.backbones() if job.keep_backbones else set()
    return {
        row["trial_id"]: Result(
            row["trial_id"],
            row["outcome"],
            message=None if row["attempt"] == job.attempt else "finished elsewhere",
            loss=row["test_loss"],
            accuracy=row["test_accuracy"],
        )
        for row in rows
        if row["outcome"] == "diverged"
        or row["trial_id"] not in job.keep_backbones
        or row["trial_id"] in kept
    }


class _Attempt:
    """One call of the trainer, and the writing that goes with it."""

    def __init__(
        self,
        job: Job,
        ledger: Ledger,
        trials: Sequence[Progress],
        results: dict[str, Result],
        on_record: Callable[[Point, Record], None],
    ) -> None:
        self.job = job
        self.ledger = ledger
        self.trials = trials
        self.results = results
        self.on_record = on_record

    def run(
        self, train: Train, on_start: Callable[[Point, int], None], halted: Callable[[], bool]
    ) -> None:
        for trial in self.trials:
            try:
                self._check_identity(trial.point)
            except DataError as error:
                self._fail(trial, "data", error)
        self.trials = [t for t in self.trials if t.point.trial_id not in self.results]
        if not self.trials:
            return
        # Those who train; the others were done, or cannot.
        self.job = replace(self.job, points=tuple(trial.point for trial in self.trials))
        states = [self._saved(trial) for trial in self.trials]
        for trial, state in zip(self.trials, states, strict=True):
            on_start(trial.point, 0 if state is None else state.step)
        parents = {trial.point.parent for trial in self.trials} - {None}
        training = train(
            [trial.point.config for trial in self.trials],
            device=self.job.device,
            state=states,
            backbones={parent: self.ledger.backbone_file(parent) for parent in parents if parent},
            log_every=LOG_EVERY,
        )
        flushed = time.monotonic()
        try:
            for record in training:
                self._take(record)
                if not training.settled:
                    continue
                self._settle(training)
                stop = halted()
                if stop or time.monotonic() - flushed >= FLUSH_SECONDS:
                    self._save(training)
                    flushed = time.monotonic()
                if stop:
                    self._interrupt()
                    return
        except Exception as error:
            # At its end the trainer raises what made single trials leave; they are settled as such.
            if not any(error is one for one in training.failures.values()):
                raise
        self._settle(training)

    def _check_identity(self, point: Point) -> None:
        found = trial_id(point.config)
        if found != point.trial_id:
            raise DataError(
                f"{point.label}: was planned as trial {point.trial_id} and is {found} on "
                f"{provenance.host()}: its data or weights differ there; copy the same files, or "
                "install the same version of fpt-sweep"
            )

    def _saved(self, trial: Progress) -> State | None:
        """The state to go on from: its own, else the end of a shorter training of the trial."""
        own = trial.point.trial_id
        shorter = self.job.extends.get(own)
        for name in (own, shorter):
            data = None if name is None else self.ledger.get_state(name)
            if data is not None:
                from fpt.checkpoints import State

                # One that cannot be read costs the steps behind it, and no more.
                with contextlib.suppress(ValueError):
                    state = State.from_bytes(data)
                    trial.extended_from = shorter
                    if name is not None and name == shorter:
                        trial.rows = self._curve_of(name, trial.point.config)
                    return state
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
        trial.rows.append({column: getattr(record, column) for column in CURVE})
        self.on_record(trial.point, record)

    def _save(self, training: Training) -> None:
        for index, state in training.states().items():
            self.ledger.put_state(self.trials[index].point.trial_id, state.to_bytes())
            self._write_curve(self.trials[index])

    def _write_curve(self, trial: Progress) -> None:
        if trial.rows:
            self.ledger.append_curve(
                trial.point.trial_id, self.job.attempt, trial.segment, trial.rows
            )
            trial.segment += 1
            trial.rows = []

    def _interrupt(self) -> None:
        for trial in self.trials:
            if trial.point.trial_id not in self.results:
                error = InterruptedError(f"stopped at step {trial.step}, with its state saved")
                self._fail(trial, "interrupted", error)

    def _fail(self, trial: Progress, cause: Cause, error: BaseException) -> None:
        self.results[trial.point.trial_id] = fail(
            self.ledger, self.job, trial.point, cause, error, step=trial.step, seconds=trial.seconds
        )

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
        if keeps:
            self.ledger.put_state(name, outcome.state.to_bytes())
        self._write_curve(trial)
        row = trial_row(trial, outcome, self.job)
        first = self.ledger.commit(row)
        if not keeps:
            self.ledger.drop_state(name)
        self.results[name] = Result(
            name,
            "diverged" if outcome.outcome == "diverged" else "done",
            message=None if first else "another driver had finished it first",
            loss=outcome.test_loss,
            accuracy=outcome.test_accuracy,
        )


def cause_of(error: BaseException) -> Cause:
    """The cause of a failure, by its exception."""
    torch = sys.modules.get("torch")  # where torch was never imported, none of its errors is raised
    if isinstance(error, DataError):
        return "data"
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return "memory"
    full = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)
    if isinstance(error, LedgerError) or (isinstance(error, OSError) and error.errno in full):
        return "storage"
    return "code"


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
    seconds: float = 0.0,
) -> Result:
    """Write a failed attempt to the ledger, as far as the ledger can be written at all."""
    name = point.trial_id
    result = Result(name, "failed", cause, type(error).__name__, str(error) or repr(error))
    try:
        ledger.fail(
            {
                "trial_id": name,
                "attempt": job.attempt,
                "cause": cause,
                "exception": result.exception,
                "message": result.message,
                "traceback": "".join(traceback.format_exception(error)),
                "config": _json(point.config.model_dump(mode="json")),
                "step": step,
                "host": provenance.host(),
                "device": job.device,
                "seconds": seconds,
                "at": datetime.now(UTC),
            }
        )
    except LedgerError as unwritten:
        return Result(
            name, "failed", "storage", "LedgerError", f"{result.message}; and then {unwritten}"
        )
    return result


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
        "attempts": job.attempts[point.trial_id],
        "attempt": job.attempt,
        "extended_from": trial.extended_from,
        "parameters": sum(group["parameters"] for group in outcome.groups.values()),
        "parameters_trained": sum(group["trained"] for group in outcome.groups.values()),
        "groups": _json(outcome.groups),
        # Where it comes from.
        "backbone_digest": outcome.backbone_digest,
        "data_digest": outcome.data_digest,
        **provenance.code(),
        "versions": provenance.versions(),
        "host": provenance.host(),
        "device": job.device,
        "device_name": provenance.device_name(job.device),
        "started_at": trial.started_at,
        "finished_at": datetime.now(UTC),
    }


_BASELINES: dict[str, Baseline] = {}


def _baseline(config: TrialConfig) -> Baseline:
    """The task's trivial baseline, once a process: some are computed over the whole test set."""
    key = _json([config.protocol, config.task.model_dump(mode="json")])
    if key not in _BASELINES:
        _BASELINES[key] = config.task.baseline(config.protocol)
    return _BASELINES[key]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
