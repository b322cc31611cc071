"""A pack from its job to the ledger, mostly with a stand-in for the trainer: no Ray."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import json
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fpt.checkpoints import Figures, State
from fpt.config import TrialConfig
from fpt.files import DataError
from fpt.spec import JSON
from sweep.execution import rows, worker
from sweep.execution.job import EndWorkerError, Job, Result
from sweep.execution.worker import run_pack
from sweep.ledger import retrying
from sweep.ledger.ledger import Committed, Ledger, LedgerError
from sweep.ledger.storage import StorageError
from sweep.sweepfile.identity import cell_id, trial_id
from sweep.sweepfile.schema import LimitsSpec
from sweep.sweepfile.trials import Point
from tests.support import Watching, job


def point(seed: int = 0, **fields: Any) -> Point:
    config = TrialConfig.model_validate(
        {
            "task": {"name": "bit-xor", "bits": 3},
            "backbone": {"name": "gpt2", "layers": 1, "width": 8, "heads": 1},
            "pretraining": "random",
            "steps": 30,
            "seed": seed,
            **fields,
        }
    )
    return Point(trial_id(config), cell_id(config), config, {"seed": str(seed)}, "file.yaml:1")


ALWAYS = LimitsSpec(save_seconds=1e-9)


class StandIn:
    """Records of split train every ten steps, then one of the test split, all at once."""

    def __init__(self, trials: Any, device: str, state: Any, backbones: Any, log_every: Any):
        self.trials, self.backbones, self.given = trials, backbones, state
        self.outcomes: dict[int, Any] = {}
        self.failures: dict[int, Exception] = {}
        self.at = dict.fromkeys(range(len(trials)), 0)
        self.outcome = "done"
        self._queue = [
            (k, step, "train")
            for step in range(log_every[0], trials[0].steps + 1, log_every[0])
            for k in range(len(trials))
        ]

    def step(self) -> list[Any]:
        if not self._queue:
            raise StopIteration
        k, step, split = self._queue.pop(0)
        self.at[k] = step
        if step == self.trials[k].steps:
            self.outcomes[k] = self._outcome(k)
        record = SimpleNamespace(
            trial=k, step=step, split=split, loss=1 / step, accuracy=0.5, seconds=step * 0.1,
            examples=step * 16, metrics={},
        )  # fmt: skip
        return [record]

    def _outcome(self, k: int) -> Any:
        return SimpleNamespace(
            outcome=self.outcome, stopped="steps", steps=self.at[k], best_step=self.at[k],
            train_loss=0.1, train_accuracy=0.9, training_set_loss=0.15,
            training_set_accuracy=0.85, validation_loss=0.2, validation_accuracy=0.8,
            test_loss=0.3, test_accuracy=0.7, seconds=self.at[k] * 0.1,
            cpu_seconds=self.at[k] * 0.1, examples=self.at[k] * 16,
            groups={
                "input": {"tensors": 2, "parameters": 20, "trained": 20},
                "attention": {"tensors": 4, "parameters": 100, "trained": 0},
            },
            backbone_digest="b" * 64, data_digest=None, state=self._state(k), metrics={},
        )  # fmt: skip

    def _state(self, k: int) -> Any:
        step = self.at[k]
        return SimpleNamespace(step=step, to_bytes=lambda: f"state at {step}".encode())

    def states(self) -> dict[int, Any]:
        return {k: self._state(k) for k in self.at if k not in self.outcomes}

    def backbone(self, k: int) -> bytes:
        return b"backbone of " + str(k).encode()


def run(ledger: Ledger, job: Job, train: Callable[..., Any] = StandIn, **options: Any) -> Result:
    (result,) = run_pack(job, ledger, train=train, **options)
    return result


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "results")


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_gone_when_its_job_has_ended(ledger: Ledger, fails: bool) -> None:
    models = []

    def train(*arguments: Any, **options: Any) -> Any:
        training = worker.train_on_this_core(*arguments, **options)
        models.append(weakref.ref(training.model))
        return training

    def on_record(*_: object) -> None:
        if fails:
            raise ZeroDivisionError

    gc.disable()
    try:
        result = run(ledger, job(point()), train, reporter=Watching(on_record))
        assert [model() for model in models] == [None]
    finally:
        gc.enable()
    assert result.status == ("failed" if fails else "done")


def test_a_trial_leaves_a_row_a_curve_and_a_state(ledger: Ledger) -> None:
    trial = point()
    attempt = job(trial)

    result = run(ledger, attempt)

    assert result == Result(trial.trial_id, "done", loss=0.3, accuracy=0.7)
    (row,) = ledger.trials().to_pylist()
    assert row["trial_id"] == trial.trial_id
    assert row["cell_id"] == trial.cell_id
    assert (row["task"], json.loads(row["task_parameters"])["bits"]) == ("bit-xor", 3)
    assert json.loads(row["config"]) == trial.config.identity()
    assert row["baseline_accuracy"] == trial.config.task.baseline("sound").accuracy
    assert (row["parameters"], row["parameters_trained"]) == (120, 20)
    assert (row["training_set_loss"], row["training_set_accuracy"]) == (0.15, 0.85)
    assert (row["attempt"], row["attempts"], row["pack_size"]) == (attempt.attempt, 1, 1)
    assert row["started_at"] <= row["finished_at"]
    assert all(row[name] is not None for name in ("host", "device_name", "version", "versions"))
    assert ledger.curves([trial.trial_id]).column("step").to_pylist() == [10, 20, 30]
    assert next(ledger.saved_states(trial.trial_id)) == b"state at 30"
    assert ledger.failures().num_rows == 0


def test_a_clock_that_is_set_back_makes_no_negative_duration(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SetBack(datetime):
        """A wall clock that goes back by two hours with each look."""

        looks = 0

        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            cls.looks += 1
            return datetime(2026, 11, 29, 12, tzinfo=tz) - timedelta(hours=2 * cls.looks)

    monkeypatch.setattr(worker, "datetime", SetBack)
    monkeypatch.setattr(rows, "datetime", SetBack)

    assert run(ledger, job(point())).status == "done"
    monkeypatch.undo()

    (row,) = ledger.trials().to_pylist()
    assert timedelta(0) < row["finished_at"] - row["started_at"] < timedelta(minutes=5)


def test_a_trial_that_has_a_row_is_not_trained_again(ledger: Ledger) -> None:
    run(ledger, job(point()))

    result = run(ledger, job(point()), train=lambda *_, **__: pytest.fail("trained again"))

    assert (result.status, result.accuracy) == ("done", 0.7)


@pytest.mark.parametrize(
    ("train", "trained", "kept"),
    [
        (["input", "norm"], None, True),
        (["input", "norm", "attention"], None, False),
        (["input", "attention:last"], None, False),
        (["input", "feedforward"], True, True),
        (["input", "norm"], False, False),
    ],
)
def test_states_are_kept_unless_large_or_unwanted(
    ledger: Ledger, train: list[str], trained: bool | None, kept: bool
) -> None:
    trial = point(train=train)
    ledger.put_state(trial.trial_id, b"of an earlier attempt, and not to be read")

    run(ledger, job(trial, keep_states=trained))

    assert bool(list(ledger.saved_states(trial.trial_id))) == kept


def test_a_pretraining_keeps_its_backbone_and_its_user_gets_it(ledger: Ledger) -> None:
    parent = point(train="all")
    user = point(pretraining=f"trial:{parent.trial_id}")
    given = {}

    def train(*trials: Any, backbones: Any, **options: Any) -> StandIn:
        given.update(backbones)
        return StandIn(*trials, backbones=backbones, **options)

    run(ledger, job(parent, keep_backbones=[parent.trial_id]), train)
    assert given == {}
    run(ledger, job(user, keep_backbones=[parent.trial_id]), train)

    assert ledger.backbones() == {parent.trial_id}
    assert given.keys() == {parent.trial_id}
    assert given[parent.trial_id].read_bytes() == b"backbone of 0"


def test_a_pretraining_without_its_backbone_is_trained_again(ledger: Ledger) -> None:
    parent = point(train="all")
    run(ledger, job(parent, keep_backbones=[parent.trial_id]))
    ledger.remove("backbones")

    run(ledger, job(parent, keep_backbones=[parent.trial_id]))

    assert ledger.backbones() == {parent.trial_id}


def test_a_diverged_trial_is_an_outcome_without_a_backbone(ledger: Ledger) -> None:
    def train(*trials: Any, **options: Any) -> StandIn:
        training = StandIn(*trials, **options)
        training.outcome = "diverged"
        return training

    trial = point(train="all")
    result = run(ledger, job(trial, keep_backbones=[trial.trial_id]), train)

    assert result.status == "diverged"
    assert ledger.trials().column("outcome").to_pylist() == ["diverged"]
    assert ledger.backbones() == set()
    assert ledger.failures().num_rows == 0


class NoMemoryError(MemoryError):
    pass


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (DataError("no data"), "data"),
        (ZeroDivisionError("a bug"), "code"),
        (LedgerError("gone"), "storage"),
        (OSError(errno.ENOSPC, "No space left on device"), "storage"),
        (FileNotFoundError(errno.ENOENT, "nothing there"), "code"),
    ],
)
def test_a_failure_is_written_with_its_cause_and_how_far_it_got(
    ledger: Ledger, error: Exception, cause: str
) -> None:
    def on_record(point: Point, record: Any) -> None:
        if record.step == 20:
            raise error

    trial = point()
    attempt = job(trial)
    result = run(ledger, attempt, reporter=Watching(on_record))

    assert (result.status, result.cause) == ("failed", cause)
    assert ledger.done() == set()
    (row,) = ledger.failures().to_pylist()
    assert (row["cause"], row["exception"]) == (cause, type(error).__name__)
    assert (row["step"], row["seconds"], row["attempt"]) == (20, 2.0, attempt.attempt)
    assert "on_record" in row["traceback"]
    assert json.loads(row["config"])["task"]["bits"] == 3


def test_out_of_memory_is_written_and_ends_the_worker(ledger: Ledger) -> None:
    def train(*_: Any, **__: Any) -> Any:
        raise NoMemoryError("too large")

    with pytest.raises(EndWorkerError) as raised:
        run(ledger, job(point()), train)

    (result,) = raised.value.results
    assert (result.status, result.cause) == ("failed", "memory")
    assert ledger.failures().column("cause").to_pylist() == ["memory"]


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "device"),
        (RuntimeError("CUDA error: device-side assert triggered"), "code"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "node"),
    ],
)
def test_a_process_that_is_broken_ends_with_all_written(
    ledger: Ledger, error: Exception, cause: str
) -> None:
    def train(*_: Any, **__: Any) -> Any:
        raise error

    with pytest.raises(EndWorkerError) as raised:
        run(ledger, job(point()), train)

    (result,) = raised.value.results
    assert result.cause == cause
    assert ledger.failures().column("cause").to_pylist() == [cause]


def test_a_member_that_leaves_for_want_of_memory_ends_the_process_after_the_others(
    ledger: Ledger,
) -> None:
    class Broken(StandIn):
        def step(self) -> list[Any]:
            (record,) = super().step()
            if record.step == 20:
                self.failures[1] = MemoryError("its batches")
            return [record]

    with pytest.raises(EndWorkerError) as raised:
        run_pack(job(point(0), point(1)), ledger, train=Broken)

    assert [r.status for r in raised.value.results] == ["failed", "done"]
    assert ledger.done() == {point(0).trial_id}


def test_a_gpu_that_is_reserved_and_not_there_is_the_nodes_failure(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    given = replace(job(point()), resources={"CPU": 1, "GPU": 1})

    with pytest.raises(EndWorkerError) as raised:
        run(ledger, given, lambda *_, **__: pytest.fail("trained on a core"))

    (result,) = raised.value.results
    assert (result.status, result.cause) == ("failed", "node")
    assert "finds no CUDA device there" in (result.message or "")
    (note,) = ledger.failures().to_pylist()
    assert (note["cause"], note["device"]) == ("node", "cuda")


def test_where_not_even_a_failure_can_be_written_both_reasons_are_told(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Ledger, row: Any) -> None:
        raise LedgerError("results: the disk is full")

    monkeypatch.setattr(Ledger, "fail", full)

    result = run(ledger, job(point()), train=lambda *_, **__: 1 / 0)

    assert result.cause == "storage"
    assert "division by zero" in (result.message or "")
    assert "disk is full" in (result.message or "")


def stopped(ledger: Ledger, trial: Point, *, after: int) -> tuple[Result, list[int]]:
    """Run a trial that is to stop once it has made so many records; also returns their steps."""
    steps: list[int] = []
    result = run(
        ledger,
        job(trial),
        reporter=Watching(
            lambda point, record: steps.append(record.step),
            lambda: "interrupted" if len(steps) == after else None,
        ),
    )
    return result, steps


def test_stopping_saves_the_curve_before_the_state(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    save, append = Ledger.save_state, Ledger.append_curve

    def saving(*arguments: Any, **more: Any) -> None:
        order.append("state")
        save(*arguments, **more)

    monkeypatch.setattr(Ledger, "save_state", saving)
    monkeypatch.setattr(Ledger, "append_curve", lambda *a: (order.append("curve"), append(*a))[1])
    trial = point()

    result, steps = stopped(ledger, trial, after=2)

    assert (result.status, result.cause) == ("failed", "interrupted")
    assert steps == [10, 20]
    assert order == ["curve", "state"]
    assert next(ledger.saved_states(trial.trial_id)) == b"state at 20"
    assert ledger.curves([trial.trial_id]).column("step").to_pylist() == [10, 20]
    assert ledger.failures().column("cause").to_pylist() == ["interrupted"]


class InStep(Watching):
    """Lets training wait, for a moment, until what it has handed over is saved."""

    def __init__(self, on_record: Callable[..., object] = lambda point, record: None) -> None:
        super().__init__(on_record)
        self.dead = threading.Event()
        """Set where nothing more will be saved."""
        self._last = (0, 0.0)

    def record(self, point: Point, record: Any) -> None:
        step, seconds = self._last
        until = time.monotonic() + 0.5
        while (
            record.step > step
            and self.saved.get(point.trial_id, 0.0) < seconds
            and not self.dead.is_set()
            and time.monotonic() < until
        ):
            time.sleep(0.001)
        self._last = record.step, record.seconds
        super().record(point, record)


class Killed(BaseException):
    """What no code catches."""


@pytest.mark.parametrize(
    ("method", "nth"),
    [
        ("append_curve", 1), ("save_state", 1), ("save_state", 2),
        ("append_curve", 5), ("put_state", 1), ("commit", 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fields", [{}, {"stop": {"patience": 1}, "learning_rate": 1e-2}])
def test_wherever_it_is_killed_a_trial_has_the_same_figures_and_its_whole_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, nth: int, fields: JSON
) -> None:
    trial = point(2, steps=80, batch_size=8, evaluation={"every": 20}, **fields)
    whole, ledger = Ledger(tmp_path / "whole"), Ledger(tmp_path / "killed")
    write, calls, reporter = getattr(Ledger, method), itertools.count(1), InStep()

    def killed_after_the_nth(self: Ledger, *arguments: Any, **options: Any) -> None:
        write(self, *arguments, **options)
        if next(calls) == nth:
            reporter.dead.set()
            raise Killed

    def attempt(ledger: Ledger, reporter: InStep) -> None:
        run(ledger, job(trial, limits=ALWAYS), worker.train_on_this_core, reporter=reporter)

    attempt(whole, InStep())
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, method, killed_after_the_nth)
        with pytest.raises(Killed):
            attempt(ledger, reporter)
    attempt(ledger, InStep())

    figures = ["trial_id", "stopped", "steps_trained", "best_step", "test_loss", "test_accuracy"]
    curve = ["step", "split", "loss", "accuracy", "examples"]
    assert ledger.trials(columns=figures) == whole.trials(columns=figures)
    assert ledger.curves().select(curve) == whole.curves().select(curve)
    assert whole.trials().column("stopped").to_pylist() == ["plateau" if fields else "steps"]


def test_a_trial_that_ended_while_storage_was_away_is_not_interrupted(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, calls = Ledger.commit, itertools.count()

    def away_at_first(self: Ledger, row: JSON) -> Any:
        if not next(calls):
            raise StorageError("no answer")
        return commit(self, row)

    monkeypatch.setattr(Ledger, "commit", away_at_first)
    trial = point()

    result, _ = stopped(ledger, trial, after=3)

    assert (result.status, ledger.done()) == ("done", {trial.trial_id})
    assert ledger.failures().num_rows == 0


def test_a_running_trial_is_saved_every_so_often(ledger: Ledger) -> None:
    trial = point()
    saved: list[Any] = []

    def on_record(point: Point, record: Any) -> None:
        saved.append(next(ledger.saved_states(point.trial_id), None))

    run(ledger, job(trial, limits=ALWAYS), reporter=InStep(on_record))

    assert saved[0] is None
    assert saved[-1] in (b"state at 10", b"state at 20")
    assert len(list((Path(ledger.uri) / "curves" / trial.trial_id).iterdir())) >= 2
    assert ledger.curves([trial.trial_id]).column("step").to_pylist() == [10, 20, 30]


def test_a_stop_that_comes_with_the_last_record_loses_no_result(ledger: Ledger) -> None:
    reporter = Watching(halted=lambda: "interrupted" if ledger.done() else None)

    result = run(ledger, job(point()), reporter=reporter)

    assert result.status == "done"
    assert ledger.failures().num_rows == 0


def test_a_saved_state_is_handed_to_the_trainer_and_told_to_those_who_watch(
    ledger: Ledger,
) -> None:
    trial = point()
    saved = State(trial.config.model_dump(mode="json"), Figures(step=20, seconds=2.0), {})
    ledger.save_state(trial.trial_id, saved.to_bytes(), step=20, attempt="a1")
    started: list[tuple[str, int]] = []
    given = []

    def train(*trials: Any, state: Any, **options: Any) -> StandIn:
        given.extend(state)
        return StandIn(*trials, state=state, **options)

    reporter = Watching(on_start=lambda p, step: started.append((p.trial_id, step)))
    run(ledger, job(trial), train, reporter=reporter)

    assert given == [saved]
    assert started == [(trial.trial_id, 20)]


def test_a_pack_settles_each_of_its_trials(ledger: Ledger) -> None:
    trials = [point(seed) for seed in range(3)]

    results = run_pack(job(*trials), ledger, train=StandIn)

    assert [r.status for r in results] == ["done"] * 3
    assert ledger.done() == {p.trial_id for p in trials}
    assert ledger.trials().column("pack_size").to_pylist() == [3, 3, 3]


def test_a_pack_that_raises_as_a_whole_is_no_members_failure_yet(ledger: Ledger) -> None:
    trials = [point(seed) for seed in range(3)]

    results = run_pack(job(*trials), ledger, train=lambda *_, **__: 1 / 0)  # type: ignore[arg-type]

    assert [(r.status, r.cause, r.undecided) for r in results] == [("failed", "code", True)] * 3
    assert results[0].message == "division by zero"
    assert ledger.failures().num_rows == 0  # it would wait for a person
    (result,) = run_pack(job(trials[0]), ledger, train=lambda *_, **__: 1 / 0)  # type: ignore[arg-type]
    assert not result.undecided
    assert ledger.failures().num_rows == 1


def test_data_that_is_missing_is_missing_to_every_member(ledger: Ledger) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise DataError("no such folder")

    results = run_pack(job(point(0), point(1)), ledger, train=missing)

    assert [(r.cause, r.undecided) for r in results] == [("data", False)] * 2
    assert ledger.failures().num_rows == 2


def test_what_the_environment_did_to_a_pack_is_noted_of_each_member(ledger: Ledger) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError("too large")

    with pytest.raises(EndWorkerError) as raised:
        run_pack(job(point(0), point(1)), ledger, train=full)

    assert [(r.cause, r.undecided) for r in raised.value.results] == [("memory", False)] * 2
    assert ledger.failures().column("cause").to_pylist() == ["memory"] * 2


@pytest.mark.parametrize(
    ("error", "cause"), [(DataError("row 7 is gone"), "data"), (KeyError("a bug"), "code")]
)
def test_a_member_whose_data_raises_fails_and_the_others_are_committed(
    ledger: Ledger, error: Exception, cause: str
) -> None:
    class Broken(StandIn):
        def step(self) -> list[Any]:
            self._queue = [one for one in self._queue if one[0] != 1 or one[1] < 20]
            if not self._queue:
                raise self.failures[1]
            (record,) = super().step()
            if record.step == 20:
                self.failures[1] = error
            return [record]

    trials = [point(seed) for seed in range(3)]

    results = {r.trial_id: r for r in run_pack(job(*trials), ledger, train=Broken)}

    assert [results[p.trial_id].status for p in trials] == ["done", "failed", "done"]
    (row,) = ledger.failures().to_pylist()
    assert (row["trial_id"], row["cause"], row["step"]) == (trials[1].trial_id, cause, 10)
    assert ledger.done() == {trials[0].trial_id, trials[2].trial_id}


def test_an_exception_that_is_no_members_is_the_packs(ledger: Ledger) -> None:
    class Broken(StandIn):
        def step(self) -> list[Any]:
            self.failures[1] = DataError("gone")
            if self.at[0] == 10:
                raise ZeroDivisionError("a bug")
            return super().step()

    trials = [point(seed) for seed in range(3)]

    results = {r.trial_id: r for r in run_pack(job(*trials), ledger, train=Broken)}

    assert [results[p.trial_id].undecided for p in trials] == [True, False, True]
    assert ledger.failures().column("trial_id").to_pylist() == [trials[1].trial_id]


def test_the_size_of_a_pack_is_that_of_those_who_trained(ledger: Ledger) -> None:
    trials = [point(seed) for seed in range(3)]
    run(ledger, job(trials[1]))

    results = run_pack(job(*trials), ledger, train=StandIn)

    assert {r.message for r in results if r.trial_id == trials[1].trial_id} == {
        "finished elsewhere"
    }
    size = {row["trial_id"]: row["pack_size"] for row in ledger.trials().to_pylist()}
    assert [size[p.trial_id] for p in trials] == [2, 1, 2]


class Inexact(StandIn):
    """A pack whose members would have other bits than alone; alone they are padded by 16."""

    @property
    def row_padding(self) -> int:
        return 16 if len(self.trials) == 1 else 0


def test_a_pack_that_is_not_exact_here_trains_one_at_a_time(
    ledger: Ledger, recwarn: pytest.WarningsRecorder
) -> None:
    trials, started, sizes = [point(seed) for seed in range(3)], [], []

    def train(configs: Any, **options: Any) -> StandIn:
        sizes.append(len(configs))
        return Inexact(configs, **options)

    reporter = Watching(on_start=lambda p, step: started.append(p.trial_id))
    results = run_pack(job(*trials), ledger, train=train, reporter=reporter)

    assert sizes == [3, 1, 1, 1]
    assert started == [p.trial_id for p in trials]
    assert [r.status for r in results] == ["done"] * 3
    rows = ledger.trials().select(["pack_size", "row_padding"]).to_pylist()
    assert rows == [{"pack_size": 1, "row_padding": 0}] * 3
    run(ledger, job(point(3)), train)
    run_pack(job(point(4), point(5)), ledger, train=train)
    (said,) = [str(one.message) for one in recwarn]
    assert "row_padding 0 in their rows" in said
    paddings = {row["seed"]: row["row_padding"] for row in ledger.trials().to_pylist()}
    assert paddings == {0: 0, 1: 0, 2: 0, 3: 16, 4: 0, 5: 0}


def test_a_stop_ends_what_trains_one_at_a_time(ledger: Ledger) -> None:
    trials, sizes = [point(seed) for seed in range(3)], []

    def train(configs: Any, **options: Any) -> StandIn:
        sizes.append(len(configs))
        return Inexact(configs, **options)

    reporter = Watching(halted=lambda: "interrupted" if sizes[1:] else None)
    results = run_pack(job(*trials), ledger, train=train, reporter=reporter)

    assert sizes == [3, 1]
    assert [r.cause for r in results] == ["interrupted"] * 3


def test_a_member_whose_data_differs_here_is_refused_and_the_others_train(ledger: Ledger) -> None:
    planned = replace(point(7), trial_id="0123456789ab")

    results = run_pack(job(point(0), planned, point(1)), ledger, train=StandIn)

    assert {r.trial_id: r.status for r in results} == {
        "0123456789ab": "failed", point(0).trial_id: "done", point(1).trial_id: "done",
    }  # fmt: skip
    assert set(ledger.trials().column("pack_size").to_pylist()) == {2}


def test_data_that_differs_on_a_worker_is_refused(ledger: Ledger) -> None:
    planned = replace(point(), trial_id="0123456789ab")

    result = run(ledger, job(planned))

    assert result.cause == "data"
    assert "planned as trial 0123456789ab" in (result.message or "")


def test_somebody_elses_commit_stands(ledger: Ledger) -> None:
    trial = point()
    theirs = job(trial)

    def train(*trials: Any, **options: Any) -> StandIn:
        run(ledger, theirs)
        return StandIn(*trials, **options)

    result = run(ledger, job(trial), train)

    assert result.status == "done"
    assert ledger.trials().column("attempt").to_pylist() == [theirs.attempt]


# ------------------------------------------------------------------ storage that fails for a while


def failing(monkeypatch: pytest.MonkeyPatch, method: str, times: int) -> list[int]:
    """Let a method of the ledger fail so many times, and count its calls."""
    monkeypatch.setattr(retrying, "PAUSES", (0.01, 0.02))
    calls: list[int] = []
    real = getattr(Ledger, method)

    def fails(self: Ledger, *arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) <= times:
            raise StorageError("results: cannot be written: no space left on device")
        return real(self, *arguments, **more)

    monkeypatch.setattr(Ledger, method, fails)
    return calls


@pytest.mark.parametrize(
    "method", ["commit", "put_state", "append_curve", "saved_states", "trials"]
)
def test_a_trial_waits_for_storage_and_loses_nothing(
    method: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = failing(monkeypatch, method, times=3)
    trial = point()

    assert run(ledger, job(trial)).status == "done"

    monkeypatch.undo()
    assert len(calls) > 3
    assert ledger.done() == {trial.trial_id}
    assert ledger.curves([trial.trial_id]).column("step").to_pylist() == [10, 20, 30]
    assert ledger.failures().num_rows == 0


def test_a_state_that_cannot_be_saved_does_not_stop_the_training(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = failing(monkeypatch, "save_state", times=10**9)
    steps: list[int] = []

    def on_record(point: Point, record: Any) -> None:
        steps.append(record.step)
        while record.step == 20 and not calls:
            time.sleep(0.001)  # the state at step 10 is being saved

    result = run(ledger, job(point(), limits=ALWAYS), reporter=Watching(on_record))

    assert (result.status, steps) == ("done", [10, 20, 30])


def test_storage_that_stays_away_fails_the_attempt_and_its_cause_is_storage(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "commit", times=10**9)

    result = run(ledger, job(point(), limits=LimitsSpec(storage_seconds=0.2)))

    assert (result.status, result.cause) == ("failed", "storage")
    assert ledger.done() == set()
    assert ledger.failures().column("cause").to_pylist() == ["storage"]


def test_a_full_disk_is_waited_for(
    small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrying, "PAUSES", (0.05, 0.05))
    disk = small_disk("size=256k")
    ledger = Ledger(disk / "results")
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb") as file:
        for _ in range(10**6):
            file.write(b"x" * 4096)
    threading.Timer(0.5, ballast.unlink).start()

    result = run(ledger, job(point()))

    assert result.status == "done"
    assert ledger.trials().column("outcome").to_pylist() == ["done"]


def test_a_row_whose_writing_was_told_to_have_failed_is_ours_all_the_same(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrying, "PAUSES", (0.01, 0.02))
    commit = Ledger.commit

    def lost_answer(self: Ledger, row: Any) -> None:
        assert commit(self, row) == Committed()
        monkeypatch.setattr(Ledger, "commit", commit)
        raise StorageError("results: the answer was lost")

    monkeypatch.setattr(Ledger, "commit", lost_answer)

    assert run(ledger, job(point())).status == "done"
    assert ledger.done() == {point().trial_id}
    assert "doubled" not in ledger.failures().column("cause").to_pylist()


# ---------------------------------------------------------------------- what is told of an attempt


def test_work_that_was_done_twice_is_counted(ledger: Ledger) -> None:
    trial = point()

    def train(*trials: Any, **options: Any) -> StandIn:
        run(ledger, job(trial))
        return StandIn(*trials, **options)

    run(ledger, job(trial), train)

    (note,) = ledger.failures().to_pylist()
    assert (note["cause"], note["lost"], note["pack_size"]) == ("doubled", 3.0, 1)


def test_what_an_attempt_lost_is_what_no_state_holds(ledger: Ledger) -> None:
    def on_record(point: Point, record: Any) -> None:
        if record.step == 20:
            raise ZeroDivisionError

    for limits in (LimitsSpec(), ALWAYS):
        attempt = job(point(), limits=limits, node="10.0.0.7/abc")
        run(ledger, attempt, reporter=Watching(on_record))

    notes = ledger.failures().to_pylist()
    assert [note["lost"] for note in notes] == [2.0, 1.0]
    assert {note["node"] for note in notes} == {"10.0.0.7/abc"}


def test_batches_in_parts_are_asked_of_the_trainer_and_stand_in_the_row(ledger: Ledger) -> None:
    asked: list[int] = []

    def train(*trials: Any, accumulation: int = 1, **options: Any) -> StandIn:
        asked.append(accumulation)
        return StandIn(*trials, **options)

    run(ledger, job(point(0)), train)
    run(ledger, job(point(1), accumulation=4), train)

    assert asked == [1, 4]
    rows = ledger.trials().select(["seed", "accumulation"]).to_pylist()
    assert {row["seed"]: row["accumulation"] for row in rows} == {0: 1, 1: 4}


@pytest.mark.parametrize(("gpus", "share"), [(0.25, [0.25]), (2, [1.0]), (0, [])])
def test_of_a_gpus_memory_a_worker_takes_its_share(
    gpus: float, share: list[float], ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", shares.append)

    given = replace(job(point()), resources={"CPU": 1, "GPU": gpus})

    assert run(ledger, given).status == "done"
    assert shares == share


def test_a_notice_of_preemption_saves_and_is_a_cause_of_its_own(ledger: Ledger) -> None:
    trial = point()

    result = run(ledger, job(trial), reporter=Watching(halted=lambda: "preempted"))

    assert (result.status, result.cause) == ("failed", "preempted")
    assert next(ledger.saved_states(trial.trial_id)) == b"state at 10"
    (note,) = ledger.failures().to_pylist()
    assert (note["cause"], note["lost"]) == ("preempted", 0.0)


def test_signs_of_life_rise_and_say_what_is_not_saved(ledger: Ledger) -> None:
    seen: list[tuple[int, dict[str, float]]] = []
    trial = point()

    reporter = Watching(lambda *_: seen.append((reporter.beats, reporter.unsaved)))
    run(ledger, job(trial), reporter=reporter)

    assert [beats for beats, _ in seen] == [1, 2, 3]
    assert [unsaved[trial.trial_id] for _, unsaved in seen] == [1.0, 2.0, 3.0]
    assert reporter.steps == {trial.trial_id: 30}


def test_a_long_evaluation_beats(ledger: Ledger) -> None:
    """Between two records lie ten steps here, and after the last one an evaluation."""
    trial = point(steps=20, evaluation={"every": 20}, task={"name": "digits"})
    seen: list[int] = []

    reporter = Watching(lambda *_: seen.append(reporter.beats))
    result = run(ledger, job(trial), worker.train_on_this_core, reporter=reporter)

    assert result.status == "done"
    assert seen[0] == 10
    assert seen[1] > seen[0] + 10  # ten more steps, and batches of an evaluation


@pytest.mark.parametrize(
    ("steps", "every"), [(1, 10), (5000, 10), (5001, 20), (50_000, 100), (123_456, 250)]
)
def test_a_trial_has_five_hundred_training_records_at_most(steps: int, every: int) -> None:
    assert worker.log_every(steps) == every
    assert steps // every <= worker.RECORDS


def test_a_stop_is_seen_between_two_records(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of so long a trial the first record comes after a hundred steps."""
    monkeypatch.setattr(worker, "HALT_SECONDS", 0.0)
    trial = point(steps=50_000, evaluation={"every": 1000})
    seen: list[Any] = []

    reporter = Watching(
        lambda _, record: seen.append(record),
        lambda: "interrupted" if reporter.beats >= 3 else None,
    )
    result = run(ledger, job(trial), worker.train_on_this_core, reporter=reporter)

    assert (result.cause, seen, reporter.beats) == ("interrupted", [], 3)
    (name,) = (Path(ledger.uri) / "states" / trial.trial_id).iterdir()
    assert name.name.startswith("000000000003-")
