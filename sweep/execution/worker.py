"""What happens inside a worker: a pack is trained, and what comes of it is written to the ledger.

The order of writing is what makes a kill harmless. While a trial trains, its curve is written
before its state, once a minute: a killed trial goes on from its state and makes the later steps of
its curve again, and readers keep the last value of a step; no step is behind a state and nowhere.
When it ends, its backbone (if others need it), its curve and its state are written first and its
row last: the row is what makes it done. All of it is written by a thread of its own, in this order
and from copies, so that training waits for no storage; while storage fails, trials train on, and
what has ended waits for it.

Whatever goes wrong is given a cause, because the cause decides what happens next: `data` and `code`
wait for a person, all others are tried again. Ray does not appear here: the driver hands in how to
report and when to stop.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fpt import contract
from fpt.config import TrialConfig
from fpt.files import ContractError, DataError
from fpt.spec import JSON
from sweep.execution import output
from sweep.execution.job import EndWorkerError, Job, Reporter, Result
from sweep.execution.output import Log
from sweep.execution.rows import Progress, failure_row, trial_row
from sweep.execution.writing import Writer
from sweep.ledger import columns, provenance
from sweep.ledger.causes import ENDS_PROCESS, WAITS, Cause, Halt, NodeError, cause_of, ends_process
from sweep.ledger.ledger import Ledger, LedgerError, TakenBy
from sweep.ledger.retrying import retry
from sweep.ledger.storage import StorageError
from sweep.planning.plan import changed_files, trained_by_other_code
from sweep.sweepfile.identity import trial_id
from sweep.sweepfile.trials import Point

if TYPE_CHECKING:
    from fpt.checkpoints import State
    from fpt.trainer import Outcome, Record, Training

T = TypeVar("T")

Train = Callable[..., "Training"]
"""`fpt.train`, or what stands in for it where only the orchestration is measured."""

SHARED = (ContractError, output.BreakpointError)
"""Errors of code that all trials of a pack have in common."""

LOG_EVERY = 10
"""Steps between training records, at least."""

RECORDS = 500
"""Training records of a trial, at most: on a GPU each one waits for the device, and of more no plot
shows anything."""

HALT_SECONDS = 0.5
"""Between two looks at the stop flag, where no record comes sooner."""


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
    reporter: Reporter | None = None,
) -> tuple[Result, ...]:
    """Train a pack, write all that comes of it, and say what that was.

    Args:
        job: The attempt.
        ledger: Where everything is read and written.
        train: What trains.
        reporter: Where signs of life are left. Whether the attempt is to end it is asked after each
            record, and between them every `HALT_SECONDS`; then the states are saved.

    Raises:
        EndWorkerError: If this process must not train again: all is written.
    """
    if job.device == "cuda":
        gc.collect()  # it counts objects, and sees nothing of what they hold of a GPU
    reporter = reporter or Reporter()
    results: dict[str, Result] = {}
    raised: BaseException | None = None
    trials = [Progress(point, datetime.now(UTC)) for point in job.points]
    with output.recorded(job.points[0].label) as log:
        missing: list[Progress] = []
        try:
            results |= _patiently(lambda: finished(job, ledger), job, reporter)
            missing = [trial for trial in trials if trial.point.trial_id not in results]
            if missing:
                _Attempt(job, ledger, missing, results, reporter, log).run(train)
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


def finished(job: Job, ledger: Ledger) -> dict[str, Result]:
    """Return the trials of a job that have ended already, by whosever hand."""
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
    """Train a step and return its records; None once all trials have ended."""
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
        reporter: Reporter,
        log: Log,
    ) -> None:
        self.job = job
        self.ledger = ledger
        self.trials = trials
        self.results = results
        """What is written: trial id -> what came of it."""
        self.reporter = reporter
        self.log = log
        self.again: Collection[str] = ()
        """Trials that have a row, and train since the backbone that others need is gone."""
        self.outdated: Collection[str] = ()
        """Trials that have a row which other code of the user's gave: theirs takes its place."""
        self._newest: dict[str, object] = {}
        """Trial id -> the last that the writer was given of it: the step of a state, or its end."""

    def run(self, train: Train) -> None:
        """Train what has not ended yet, until all of it has or the attempt is to end."""
        self._refuse_what_differs()
        if not self.trials:
            return
        training = self._prepare(train)
        if training is None:
            self._run_one_at_a_time(train)
            return
        with Writer() as writer:
            halt: Halt | None = None
            try:
                halt = self._train(training, writer)
            except Exception as error:
                # At its end the trainer raises what made single trials leave; they are settled as
                # such.
                if not any(error is one for one in training.failures.values()):
                    raise
            self._drain(training, writer, halt)

    def _refuse_what_differs(self) -> None:
        """Fail the trials whose data or code is another one here, and keep the others."""
        for trial in self.trials:
            try:
                self._check_identity(trial.point)
            except DataError as error:
                self._fail(trial, "data", error)
        self.trials = [t for t in self.trials if t.point.trial_id not in self.results]
        # Those who train; the others were done, or cannot.
        self.job = replace(self.job, points=tuple(trial.point for trial in self.trials))

    def _prepare(self, train: Train) -> Training | None:
        """Read what the trials go on from, and return their training.

        Returns:
            None: packs are not exact here, so that they have to train one at a time.
        """
        job, points = self.job, self.job.points
        _check_device(job.resources)
        if job.keep_backbones:
            self.again = self._read(self.ledger.done) & {point.trial_id for point in points}
        for point in points:
            for doubt in contract.check_trial(point.config):
                warnings.warn(doubt, stacklevel=1)  # It goes to the trial's log.
        self.outdated = self._read(lambda: trained_by_other_code(points, self.ledger))
        states = [self._read(functools.partial(self._saved, trial)) for trial in self.trials]
        for trial, state in zip(self.trials, states, strict=True):
            if state is not None:
                trial.began = trial.seconds = state.figures.seconds
                self._note_saved(trial, trial.seconds)
        _keep_to_share(job.resources)
        training = train(
            [point.config for point in points],
            device=job.device,
            state=states,
            backbones=self._read(self._backbones),
            log_every=[log_every(point.config.steps) for point in points],
            **({"accumulation": job.accumulation} if job.accumulation > 1 else {}),
        )
        padding = getattr(training, "row_padding", None)
        if padding == 0 and len(points) > 1:
            return None
        for trial, state in zip(self.trials, states, strict=True):
            trial.row_padding = padding if trial.row_padding is None else trial.row_padding
            self.reporter.start(trial.point, 0 if state is None else state.step)
        self.reporter.follow(training)
        return training

    def _run_one_at_a_time(self, train: Train) -> None:
        """Train the members of a pack that would not end with the bits that they have alone."""
        _note_inexact()
        for trial in self.trials:
            trial.row_padding = 0
            if halt := self.reporter.halted():
                self._fail(trial, halt, InterruptedError("stopped before it began"))
                continue
            job = replace(self.job, points=(trial.point,))
            own = _Attempt(job, self.ledger, [trial], self.results, self.reporter, self.log)
            own.run(train)

    def _train(self, training: Training, writer: Writer) -> Halt | None:
        """Train until all trials have ended; return why to end before, if there is a reason."""
        flushed = looked = time.monotonic()
        while (records := _step(training)) is not None:
            self.reporter.phase = "training"
            self.reporter.beats += 1
            for record in records:
                self._take(record)
            if not records and time.monotonic() - looked < HALT_SECONDS:
                continue
            looked = time.monotonic()
            writer.check()
            self._settle(training, writer)
            if halt := self.reporter.halted():
                return halt
            # One that storage keeps waiting is worth no second copy of the states.
            if writer.idle and looked - flushed >= self.job.limits.save_seconds:
                self._save(training, writer)
                flushed = looked
        return None

    def _drain(self, training: Training, writer: Writer, halt: Halt | None) -> None:
        """Wait until all that there is to write is written.

        Raises:
            StorageError: If storage is away for longer than the sweep file allows.
        """
        self.reporter.phase = "writing"
        self._settle(training, writer)
        if halt:
            self._save(training, writer)
        writer.drain(self.job.limits.storage_seconds)
        for trial in self.trials:
            if halt and trial.point.trial_id not in self.results:
                error = InterruptedError(f"stopped at step {trial.step}, with its state saved")
                self._fail(trial, halt, error)

    def _read(self, call: Callable[[], T]) -> T:
        return _patiently(call, self.job, self.reporter)

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
        """Return the state to go on from: its own, else the end of a shorter training."""
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
        """Return the curve up to where a shorter training ended, which is the longer one's too.

        Its reading of the test set (protocol sound) is not: that is done once, at the end.
        """
        rows = self.ledger.curves([name]).to_pylist()
        return [
            {column: row[column] for column in columns.POINT}
            for row in rows
            if row["split"] != "test" or config.protocol == "paper"
        ]

    def _take(self, record: Record) -> None:
        trial = self.trials[record.trial]
        trial.step, trial.seconds = record.step, record.seconds
        trial.rows.append(columns.curve_row(record))
        self.reporter.record(trial.point, record)

    # ----------------------------------------------------------- what is handed to the writer

    def _save(self, training: Training, writer: Writer) -> None:
        """Hand over the states of the trials that train, each with its curve up to there."""
        for index, state in training.states().items():
            trial = self.trials[index]
            self._newest[trial.point.trial_id] = state.step
            writer.put(
                functools.partial(self._write_state, trial, state, trial.piece(), trial.seconds)
            )

    def _settle(self, training: Training, writer: Writer) -> None:
        """Hand over the trials that have ended or left since."""
        left: dict[int, Exception | Outcome] = {**training.outcomes, **training.failures}
        for index, ended in left.items():
            trial = self.trials[index]
            name = trial.point.trial_id
            if self._newest.get(name) is ended or name in self.results:
                continue
            self._newest[name] = ended
            if isinstance(ended, Exception):
                writer.put(functools.partial(self._fail, trial, cause_of(ended), ended))
                continue
            kept = name in self.job.keep_backbones and ended.outcome == "done"
            backbone = training.backbone(index) if kept else None
            writer.put(functools.partial(self._commit, trial, ended, backbone))

    # --------------------------------------------------------------------- in the writer's thread

    def _write_state(
        self, trial: Progress, state: State, piece: tuple[int, list[JSON]], seconds: float
    ) -> None:
        name, attempt = trial.point.trial_id, self.job.attempt
        self.ledger.append_curve(name, attempt, *piece)
        if self._newest[name] != state.step:
            return  # storage was away, and there is a later one by now
        self.ledger.save_state(name, state.to_bytes(), step=state.step, attempt=attempt)
        _keep_log(self.ledger, self.job, trial, self.log)
        self._note_saved(trial, seconds)

    def _note_saved(self, trial: Progress, seconds: float) -> None:
        trial.saved = self.reporter.saved[trial.point.trial_id] = seconds

    def _fail(self, trial: Progress, cause: Cause, error: BaseException) -> None:
        self.results[trial.point.trial_id] = _fail(self.ledger, self.job, trial, cause, error)

    def _commit(self, trial: Progress, outcome: Outcome, backbone: bytes | None) -> None:
        name, config = trial.point.trial_id, trial.point.config
        if backbone is not None:
            self.ledger.put_backbone(name, backbone)
        keeps = self.job.keep_states
        if keeps is None:
            keeps = not {"attention", "attention:last", "feedforward"} & set(config.train)
        keeps |= trial.point.goes_on
        anew = name in (*self.again, *self.outdated)
        first = anew or self.ledger.committed_by(name) in (None, self.job.attempt)
        if first:  # else the tensors are those of whoever wrote the row
            _write_curve(self.ledger, self.job, trial)
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


def _patiently(call: Callable[[], T], job: Job, reporter: Reporter) -> T:
    """Call again for as long as storage fails, the sweep file allows it and nobody halts it."""
    seconds = job.limits.storage_seconds
    return retry(call, StorageError, within=seconds, gives_up=lambda _: reporter.halted())


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
    """Write the records since the last piece of a curve; a second time writes the same piece."""
    if trial.rows:
        ledger.append_curve(trial.point.trial_id, job.attempt, trial.segment, trial.rows)
        trial.piece()


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
