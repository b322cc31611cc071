"""Runs on a real Ray, mostly with a stand-in for the trainer, and what accidents leave behind."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pty
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from sweep.cli import running
from sweep.execution import driver, tune_adapter
from sweep.execution.driver import Event, Summary, run
from sweep.execution.interrupts import SIGNALS, Interrupts
from sweep.ledger.columns import FIGURES
from sweep.ledger.ledger import Ledger
from sweep.mirrors import optuna_studies
from sweep.planning import tuning
from sweep.planning.packing import Workers
from sweep.planning.plan import plan
from sweep.sweepfile.expansion import load
from sweep.sweepfile.trials import Sweep
from tests.servers import free_port
from tests.support import signs, trial_row

pytestmark = pytest.mark.ray


FILE = """
sweep: small
trial:
  task: {name: bit-xor, bits: 3}
  backbone: {name: gpt2, layers: 1, width: 8, heads: 1}
  pretraining: random
  steps: STEPS
  batch_size: 4
  evaluation: {every: 100}
"""


def sweep_file(folder: Path, rest: str, steps: int = 20) -> Path:
    file = folder / "small.yaml"
    rest = textwrap.dedent(rest)
    alone = "" if "pack:" in rest else "\npack: off\n"
    file.write_text(FILE.replace("STEPS", str(steps)) + rest + alone)
    return file


class StandIn:
    """Ends at once, without torch; `misbehave` is called with each config first."""

    seconds = 2.0
    """That a trial takes, by its own account, wherever it trains."""

    def __init__(self, misbehave: Callable[[Any], None], trials: Any) -> None:
        self.trials = trials
        self.outcomes: dict[int, Any] = {}
        self.failures: dict[int, Exception] = {}
        self._misbehave = misbehave
        self._left = len(trials)

    def step(self) -> list[Any]:
        if not self._left:
            raise StopIteration
        self._left -= 1
        k, config = self._left, self.trials[self._left]
        self._misbehave(config)
        state = SimpleNamespace(step=config.steps, to_bytes=lambda: b"state")
        self.outcomes[k] = SimpleNamespace(
            outcome="done", stopped="steps", steps=config.steps, best_step=config.steps,
            train_loss=0.1, train_accuracy=0.9, training_set_loss=None,
            training_set_accuracy=None, validation_loss=0.2, validation_accuracy=0.8,
            test_loss=0.3, test_accuracy=0.7, seconds=self.seconds, cpu_seconds=self.seconds,
            examples=80, groups={},
            backbone_digest="b" * 64, data_digest=None, state=state, metrics={},
        )  # fmt: skip
        record = SimpleNamespace(
            trial=k, step=config.steps, split="train", loss=0.1, accuracy=0.9, seconds=0.1,
            examples=80, metrics={},
        )  # fmt: skip
        return [record]

    def states(self) -> dict[int, Any]:
        return {}

    def backbone(self, k: int) -> bytes:
        return b"backbone"


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray that all tests of this module share."""
    from ray import cloudpickle
    from ray.cluster_utils import Cluster

    # Workers cannot import this module.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    # Another Ray on this machine may have the dashboard's usual port.
    head = {"num_cpus": 2, "num_gpus": 0, "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster.address
    cluster.shutdown()


class Runs:
    """Runs a sweep file with a stand-in, and remembers the events."""

    def __init__(self, cluster: str, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.ledger = Ledger(folder / "results")
        self.events: list[Event] = []

    def sweep(self, rest: str) -> Sweep:
        return load(sweep_file(self.folder, rest))

    def __call__(
        self, sweep: Sweep, misbehave: Callable[[Any], None] = lambda config: None, **options: Any
    ) -> Summary:
        def train(trials: Any, **options: Any) -> StandIn:
            return StandIn(misbehave, trials)

        options = {"train": train, "on_event": self.events.append} | options
        return run(
            sweep,
            results=self.folder / "results",
            address=self.cluster,
            mirror=False,
            **options,
        )

    def of(self, kind: str) -> list[str]:
        return [event.label for event in self.events if event.kind == kind]


@pytest.fixture
def runs(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    # It has tests of its own, and costs a worker a run.
    monkeypatch.setattr("sweep.cluster.preflight.check", lambda *_, **__: None)
    return Runs(cluster, tmp_path)


def counts(summary: Summary) -> tuple[int, int, int, int]:
    return summary.done, summary.diverged, summary.failed, summary.missing


def test_a_failing_trial_and_one_that_was_done_hold_nobody_up(runs: Runs) -> None:
    first = runs.sweep("axes: {seed: [0]}\n")
    assert counts(runs(first)) == (1, 0, 0, 0)
    (row,) = (runs.folder / "results" / "trials").iterdir()
    written = row.stat().st_mtime_ns

    def misbehave(config: Any) -> None:
        if config.seed == 2:
            raise ZeroDivisionError("seed 2")

    grown = runs.sweep("axes: {seed: [0, 1, 2, 3]}\n")
    summary = runs(grown, misbehave)

    assert counts(summary) == (3, 0, 1, 0)
    assert summary.exit_code == 1
    assert row.stat().st_mtime_ns == written
    assert sorted(runs.of("trial_done")) == ["0", "1", "3"]
    assert runs.of("trial_failed") == ["2"]
    (failure,) = runs.ledger.failures().to_pylist()
    assert (failure["cause"], failure["message"]) == ("code", "seed 2")
    assert counts(runs(grown)) == (3, 0, 1, 0)  # it waits for `sweep retry`
    assert runs.ledger.failures().num_rows == 1


def no_ray(planned: Any, context: Any) -> Any:
    pytest.fail("Ray was started")


def test_a_finished_sweep_is_left_at_once_and_without_ray(runs: Runs) -> None:
    sweep = runs.sweep("axes: {seed: [0]}\n")
    runs(sweep)

    summary = runs(sweep, run_plan=no_ray)

    assert counts(summary) == (1, 0, 0, 0)
    assert summary.exit_code == 0


def test_what_another_sweep_trained_reaches_mlflow_without_ray(tmp_path: Path) -> None:
    sweep = load(sweep_file(tmp_path, "axes: {seed: [0, 1]}\n"))
    ledger = Ledger(tmp_path / "results")
    for point in sweep.points:
        ledger.commit(trial_row(point))

    for _ in range(2):
        summary = run(sweep, results=tmp_path / "results", run_plan=no_ray)
        assert counts(summary) == (2, 0, 0, 0)

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/results/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name LIKE 'fpt-sweep/%'")
    assert len(client.search_runs([experiment.experiment_id])) == 1 + 2


def test_a_finished_sweep_does_not_wait_for_mlflow_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sweep_file(tmp_path, "axes: {seed: [0, 1]}\n")
    sweep, ledger = load(file), Ledger(tmp_path / "results", write=True)
    for point in sweep.points:
        ledger.commit(trial_row(point))
    said: list[Event] = []
    monkeypatch.setattr(driver, "MIRROR_TELLS", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with socket.socket() as mute:  # a server that never answers
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mute.getsockname()[1]}")
        summary = run(file, results=tmp_path / "results", on_event=said.append)

    assert summary.exit_code == 0
    told = {event.message for event in said if event.kind == "message"}
    assert any("MLflow gets the runs" in str(message) for message in told)
    for word in ("`sweep mirror", "--no-mirror", "Ctrl-C"):
        assert all(word in str(message) for message in told), told


def test_users_of_a_pretraining_run_after_it(runs: Runs) -> None:
    sweep = runs.sweep(
        """
        backbones:
          own: {task: {name: bit-xor, bits: 2}, train: all, seed: 0}
        axes:
          pretraining: [own, random]
          seed: [0, 1]
        """
    )

    summary = runs(sweep)

    assert counts(summary) == (5, 0, 0, 0)
    order = runs.of("trial_done")
    assert order.index("own") < min(order.index("own/0"), order.index("own/1"))
    assert runs.ledger.backbones() == {sweep.pretrainings[0].trial_id}


def test_a_failed_pretraining_takes_its_users_along_and_nobody_else(runs: Runs) -> None:
    sweep = runs.sweep(
        """
        backbones:
          own: {task: {name: bit-xor, bits: 2}, train: all, seed: 0}
        axes:
          pretraining: [own, random]
          seed: [0, 1]
        """
    )

    def misbehave(config: Any) -> None:
        if "attention" in config.train:
            raise ZeroDivisionError

    summary = runs(sweep, misbehave)

    assert counts(summary) == (2, 0, 3, 0)
    assert sorted(runs.of("trial_failed")) == ["own", "own/0", "own/1"]


def test_a_killed_worker_is_noted_and_its_trial_is_tried_again(runs: Runs) -> None:
    marker = runs.folder / "killed"

    def misbehave(config: Any) -> None:
        if config.seed == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    summary = runs(runs.sweep("axes: {seed: [0, 1, 2]}\n"), misbehave)

    assert counts(summary) == (3, 0, 0, 0)
    (failure,) = runs.ledger.failures().to_pylist()
    assert (failure["cause"], failure["exception"]) == ("worker", "WorkerDiedError")
    attempts = {row["seed"]: row["attempts"] for row in runs.ledger.trials().to_pylist()}
    assert attempts == {0: 1, 1: 2, 2: 1}


def test_a_trial_that_kills_every_worker_fails_in_the_end(runs: Runs) -> None:
    def misbehave(config: Any) -> None:
        if config.seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    summary = runs(runs.sweep("axes: {seed: [0, 1, 2]}\nretry: {worker: 1}\n"), misbehave)

    assert counts(summary) == (2, 0, 1, 0)
    assert runs.ledger.failures().column("cause").to_pylist() == ["worker"] * 2


def test_running_out_of_memory_costs_the_worker_and_is_noted_once(runs: Runs) -> None:
    pids = runs.folder / "pids"

    def misbehave(config: Any) -> None:
        with pids.open("a") as file:
            file.write(f"{os.getpid()}\n")
        raise MemoryError("too large")

    summary = runs(runs.sweep("axes: {seed: [0, 1]}\nretry: {memory: 1}\n"), misbehave)

    assert counts(summary) == (0, 0, 2, 0)
    notes = runs.ledger.failures().to_pylist()
    assert {note["cause"] for note in notes} == {"memory"}
    # A batch of 4 is taken whole and then in 2 parts, each time by a new worker.
    assert [note["accumulation"] for note in notes] == [1, 2] * 2
    assert len(set(pids.read_text().split())) == 4
    assert plan(runs.sweep("axes: {seed: [0, 1]}\n"), runs.ledger).counts()["missing"] == 2


def test_gpus_that_are_not_there_are_refused_and_not_waited_for(runs: Runs) -> None:
    with pytest.raises(driver.ClusterError, match=r"gpus: 1 asked for a pack, and this Ray has 0"):
        run(
            runs.sweep("axes: {seed: [0]}\n"),
            results=runs.folder / "results",
            address=runs.cluster,
            mirror=False,
            gpus=1,
        )


def test_a_second_driver_waits_and_finds_everything_done(runs: Runs) -> None:
    sweep = runs.sweep("axes: {seed: [0]}\n")
    lease = runs.ledger.lease(driver.lease_name(runs.cluster))
    assert lease is not None

    def finish(event: Event) -> None:
        runs.events.append(event)
        if event.kind == "waiting":
            lease.release()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(runs, "events", [])
                runs(sweep)

    summary = run(
        sweep, results=runs.folder / "results", address=runs.cluster, mirror=False, on_event=finish
    )

    assert counts(summary) == (1, 0, 0, 0)
    assert [event.kind for event in runs.events] == ["waiting"]
    assert str(os.getpid()) in (runs.events[0].message or "")


# ------------------------------------------------------- what hangs, and what is asked from outside


class Slow(StandIn):
    """Makes a step every so often, for as long as `goes_on` says; then it ends."""

    def __init__(self, goes_on: Callable[[Any, int], bool], trials: Any) -> None:
        super().__init__(lambda config: None, trials)
        self._goes_on = goes_on
        self._step = 0

    def step(self) -> list[Any]:
        import time

        if self._left == len(self.trials) and self._goes_on(self.trials[0], self._step):
            time.sleep(0.1)
            self._step += 1
            record = SimpleNamespace(
                trial=0, step=self._step, split="train", loss=0.1, accuracy=0.9,
                seconds=0.1 * self._step, examples=80, metrics={},
            )  # fmt: skip
            return [record]
        return super().step()

    def states(self) -> dict[int, Any]:
        return {0: SimpleNamespace(step=self._step, to_bytes=lambda: b"state")}


def test_a_trial_that_hangs_is_ended_and_tried_again_and_those_beside_it_finish(
    runs: Runs,
) -> None:
    marker = runs.folder / "hung"
    sweep = runs.sweep("axes: {seed: [0, 1, 2]}\npack: off\nlimits: {hang_seconds: 10}\n")

    def goes_on(config: Any, step: int) -> bool:
        if config.seed == 1 and step == 3 and not marker.exists():
            marker.touch()
            threading.Event().wait(1000)
        return step < 5

    summary = runs(sweep, train=lambda trials, **_: Slow(goes_on, trials))

    assert counts(summary) == (3, 0, 0, 0)
    (note,) = runs.ledger.failures().to_pylist()
    assert (note["cause"], note["step"], note["exception"]) == ("hung", 3, "HungError")
    assert "no step for" in note["message"]
    assert note["lost"] == pytest.approx(0.3)
    assert re.fullmatch(r"[\d.]+/[0-9a-f]{8}", note["node"])


def test_a_pause_from_elsewhere_stops_a_run_within_seconds_and_the_next_one_goes_on(
    runs: Runs,
) -> None:
    sweep = runs.sweep("axes: {seed: [0]}\n")
    marker = runs.folder / "go on"

    def told(event: Event) -> None:
        if event.kind == "record":
            runs.ledger.notes.pause("small")

    train = lambda trials, **_: Slow(lambda config, step: not marker.exists(), trials)  # noqa: E731
    paused = runs(sweep, train=train, on_event=told)
    marker.touch()

    assert counts(paused) == (0, 0, 0, 1)
    assert paused.interrupted
    assert runs.ledger.states() == {sweep.points[0].trial_id}
    assert runs.ledger.failures().column("cause").to_pylist() == ["interrupted"]
    assert counts(runs(sweep, train=train)) == (1, 0, 0, 0)


def test_what_on_event_raises_at_the_end_of_a_trial_ends_the_run(runs: Runs) -> None:
    def told(event: Event) -> None:
        if event.kind == "trial_done":
            raise ZeroDivisionError("of on_event")

    with pytest.raises(ZeroDivisionError, match="of on_event"):
        runs(runs.sweep("axes: {seed: [0]}\n"), on_event=told)
    assert len(runs.ledger.done()) == 1


def test_a_run_ends_with_its_time(runs: Runs) -> None:
    sweep = runs.sweep("axes: {seed: [0]}\n")

    summary = runs(sweep, train=lambda trials, **_: Slow(lambda *_: True, trials), hours=5 / 3600)

    assert (summary.exit_code, summary.interrupted) == (1, True)
    assert "stopping: the time is up; running trials save their states" in [
        event.message for event in runs.events
    ]


def test_a_slow_trial_holds_no_other_slot_up_and_what_has_ended_is_forgotten(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.tune.experiment import Trial

    monkeypatch.setattr(tune_adapter, "FORGET_EVERY", 2)
    trials = 12
    pids, rows = runs.folder / "pids", runs.folder / "results/trials"

    def slow_first(config: Any) -> None:
        with pids.open("a") as file:
            file.write(f"{config.seed} {os.getpid()}\n")
        until = time.monotonic() + 120
        while config.seed == 0 and time.monotonic() < until:
            if rows.is_dir() and len(list(rows.iterdir())) == trials - 1:
                break
            time.sleep(0.05)

    def tune_trials() -> set[str]:
        gc.collect()
        return {one.trial_id for one in gc.get_objects() if type(one) is Trial}

    before, held = tune_trials(), list[int]()

    def told(event: Event) -> None:
        runs.events.append(event)
        if event.kind == "trial_done":
            held.append(len(tune_trials() - before))

    sweep = runs.sweep(f"axes: {{seed: {[*range(trials)]}}}\npack: off\n")
    assert counts(runs(sweep, slow_first, on_event=told)) == (trials, 0, 0, 0)

    assert runs.of("trial_done")[-1] == "0"
    workers = dict(line.split() for line in pids.read_text().splitlines())
    slow = workers.pop("0")
    # All the others ran in the other slot, by the worker that was there.
    assert len({*workers.values()}) == 1
    assert slow not in workers.values()
    # Of Tune's trials: two that run, the last ones that have ended, and one that Tune is about to.
    assert max(held) <= 2 + 2 + 2
    assert not list((runs.folder / "results/leases/trials").iterdir())


def test_what_another_driver_trains_is_left_to_it(runs: Runs) -> None:
    sweep = runs.sweep("axes: {seed: [0, 1]}\n")
    theirs, ours = sweep.points
    lease = runs.ledger.lease("driver-of-another-cluster")
    assert lease is not None
    claims = runs.ledger.reservations(lease)
    assert claims.take([theirs.trial_id])

    def finish(event: Event) -> None:
        runs.events.append(event)
        if event.kind == "trial_done" and event.trial_id == ours.trial_id:
            runs.ledger.commit(trial_row(theirs))
            claims.release([theirs.trial_id])

    with lease:
        summary = runs(sweep, on_event=finish)

    assert counts(summary) == (2, 0, 0, 0)
    done = {event.label: event.message for event in runs.events if event.kind == "trial_done"}
    assert done == {"0": "finished elsewhere", "1": None}
    assert "doubled" not in runs.ledger.failures().column("cause").to_pylist()


def test_what_opens_a_bucket_reaches_the_first_worker(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_OPENS_IT", "sesame")  # the cluster's nodes have no such variable
    found = runs.folder / "found"

    def look(config: Any) -> None:
        found.write_text(os.environ.get("AWS_OPENS_IT", "nothing"))

    summary = runs(runs.sweep("axes: {seed: [0]}\n"), look)

    assert counts(summary) == (1, 0, 0, 0)
    assert found.read_text() == "sesame"


def test_a_lease_is_named_after_the_cluster_and_not_after_its_address(runs: Runs) -> None:
    port = runs.cluster.rpartition(":")[2]

    names = {driver.lease_name(runs.cluster), driver.lease_name(f"localhost:{port}")}

    assert len(names) == 1
    assert port not in "".join(names).split("-")


class Planned:
    """Runs a sweep of one trial whose driver only notes whether it was paused when it began."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(driver, "WAIT_SECONDS", 0.01)
        monkeypatch.setattr(driver, "PAUSE_TIMEOUT", 0.01)
        self.sweep = load(sweep_file(folder, "axes: {seed: [0]}\n"))
        self.ledger = Ledger(folder / "results")
        self.began: list[bool] = []

    def begin(self, planned: Any, context: Any) -> tuple[dict[str, str], bool]:
        self.began.append(self.ledger.notes.paused("small"))
        return {}, False

    def __call__(self, on_event: Callable[[Event], None] = lambda event: None) -> Summary:
        return run(
            self.sweep,
            results=self.ledger.uri,
            mirror=False,
            on_event=on_event,
            run_plan=self.begin,
        )


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    return Planned(tmp_path, monkeypatch)


def test_a_run_puts_finished_trials_together_once_they_are_many(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = load(sweep_file(Path(planned.ledger.uri).parent, "axes: {seed: [1, 2]}\n"))
    for point in others.points:
        planned.ledger.commit(trial_row(point))
    folder = Path(planned.ledger.uri, "trials")
    planned()
    assert len(list(folder.iterdir())) == 2

    monkeypatch.setattr(driver, "COMPACT_AT", 2)
    planned()

    assert [path.name for path in folder.iterdir()] == ["segment-000001.parquet"]
    assert planned.ledger.done() == {point.trial_id for point in others.points}


def test_a_signal_amid_the_wait_for_another_driver_ends_it(planned: Planned) -> None:
    other = planned.ledger.lease(driver.lease_name())
    assert other is not None

    def told(event: Event) -> None:
        if event.kind == "waiting":
            signal.raise_signal(signal.SIGTERM)

    summary = planned(told)

    assert (summary.interrupted, summary.missing, planned.began) == (True, 1, [])


def test_a_pause_stays_until_the_driver_that_it_was_meant_for_has_ended(planned: Planned) -> None:
    other = planned.ledger.lease(driver.lease_name())
    assert other is not None
    planned.ledger.notes.pause("small")
    seen: list[bool] = []

    def told(event: Event) -> None:
        if event.kind == "waiting":
            seen.append(planned.ledger.notes.paused("small"))
            if len(seen) == 3:
                other.release()

    assert not planned(told).interrupted
    assert (seen, planned.began) == ([True] * 3, [False])


def test_a_pause_that_is_asked_for_while_a_run_waits_counts(planned: Planned) -> None:
    other = planned.ledger.lease(driver.lease_name())
    assert other is not None
    planned.ledger.notes.pause("small")
    said: list[str | None] = []

    def told(event: Event) -> None:
        said.append(event.message)
        if event.kind == "waiting":
            planned.ledger.notes.pause("small")
            other.release()

    summary = planned(told)

    assert (summary.interrupted, summary.missing, planned.began) == (True, 1, [])
    assert said[-1] == "not started: somebody asked for a pause"
    assert planned.ledger.notes.paused("small")
    assert not planned().interrupted
    assert planned.began == [False]


def test_the_driver_of_another_cluster_may_see_a_pause_before_it_is_taken_back(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert planned.ledger.lease("driver-of-another-cluster") is not None
    planned.ledger.notes.pause("small")
    seen: list[tuple[float, bool]] = []
    wait = lambda _, seconds: seen.append((seconds, planned.ledger.notes.paused("small")))  # noqa: E731
    monkeypatch.setattr(Interrupts, "wait", wait)

    planned()

    assert seen == [(driver.PAUSE_TIMEOUT, True)]
    assert planned.began == [False]


def test_a_run_with_nothing_to_do_takes_a_pause_back(planned: Planned) -> None:
    planned.ledger.commit(trial_row(planned.sweep.points[0]))
    planned.ledger.notes.pause("small")

    assert planned().done == 1
    assert not planned.ledger.notes.paused("small")


def test_what_is_pruned_leaves_other_sweeps_their_states(
    planned: Planned, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, ours, shared = planned.ledger, "0123456789ab", "0123456789cd"
    before = {ours: "old/0", shared: "old/1"}
    ledger.notes.save_trial_list("small", before)
    ledger.notes.save_trial_list("other", {shared: "b/0"})
    for name in before:
        ledger.save_state(name, b"state", step=10, attempt="a1")
    lease = ledger.lease("driver-here")
    assert lease is not None

    running._tell_removed(planned.sweep, ledger, prune=True)
    assert "a run is under way; --prune forgets them once it has ended" in capsys.readouterr().err
    assert ledger.states() == before.keys()
    lease.release()
    running._tell_removed(planned.sweep, ledger, prune=True)

    said = capsys.readouterr().err
    assert "2 trials forgotten" in said
    assert "1 of them: other sweeps have them too, so their states stay" in said
    assert ledger.states() == {shared}
    assert ledger.notes.trial_list("small").keys() == {planned.sweep.points[0].trial_id}


# ----------------------------------------------------------------- packs, with the trainer itself


PACKED = """
sweep: packed
trial:
  backbone: {name: gpt2, layers: 2, width: 32, heads: 2}
  pretraining: random
  backbone_seed: 0
  batch_size: 4
  steps: 20
  dropout: 0.1
  evaluation: {every: 10}
"""


def figures(ledger: Ledger) -> dict[str, Any]:
    rows = ledger.trials().to_pylist()
    return {row["trial_id"]: [row[name] for name in FIGURES] for row in rows}


POISON = signs("poison", "if seed == 2 and step == 7: __import__('os')._exit(1)")


@pytest.mark.slow
def test_who_kills_the_worker_of_a_pack_is_found_and_the_others_end_as_alone(
    tmp_path: Path, cluster: str
) -> None:
    (tmp_path / "poison.py").write_text(POISON)
    text = "retry: {worker: 0}\n" + PACKED + "  task: poison:Signs\n"
    file, healthy = tmp_path / "packed.yaml", tmp_path / "healthy.yaml"
    file.write_text(text + "axes: {seed: [0, 1, 2, 3]}\n")
    healthy.write_text(text + "axes: {seed: [0, 1, 3]}\npack: off\n")
    packed, alone = Ledger(tmp_path / "packed"), Ledger(tmp_path / "alone")
    (pack,) = plan(file, packed, workers=Workers(1)).packs
    bad = pack.points[2].trial_id

    options: dict[str, Any] = {"address": cluster, "mirror": False}
    summary = run(file, results=packed.uri, max_concurrent=1, **options)
    assert counts(run(healthy, results=alone.uri, **options)) == (3, 0, 0, 0)

    assert counts(summary) == (3, 0, 1, 0)
    deaths = Counter(row["trial_id"] for row in packed.failures().to_pylist())
    # Twice in the pack of four, once in that of two, and once alone.
    assert [deaths[point.trial_id] for point in pack.points] == [2, 2, 4, 3]
    assert deaths.total() == 11
    assert set(packed.failures().column("cause").to_pylist()) == {"worker"}
    assert figures(packed) == figures(alone)
    assert bad not in figures(packed)
    sizes = {row["trial_id"]: row["pack_size"] for row in packed.trials().to_pylist()}
    assert [sizes.get(point.trial_id) for point in pack.points] == [2, 2, None, 1]


@pytest.mark.slow
def test_packs_change_no_bit_of_a_figure(tmp_path: Path, cluster: str) -> None:
    rest = """\
backbones:
  own: {task: {name: bit-memory, strings: 2, bits: 20, patch: 10}, seed: 0}
axes:
  pretraining: [random, own]
  task: [{name: bit-xor, bits: 3}, {name: digits}]
  learning_rate: [1e-3, 1e-2]
  seed: [0, 1, 2]
"""
    ledgers = {}
    for rule in ("auto", "off"):
        file = tmp_path / f"{rule}.yaml"
        file.write_text(f"{PACKED}{rest}pack: {rule}\n")
        ledgers[rule] = Ledger(tmp_path / rule)
        summary = run(file, results=ledgers[rule].uri, address=cluster, mirror=False)
        assert counts(summary) == (25, 0, 0, 0)

    assert figures(ledgers["auto"]) == figures(ledgers["off"])
    sizes = {
        rule: ledger.trials().column("pack_size").to_pylist() for rule, ledger in ledgers.items()
    }
    assert set(sizes["off"]) == {1}
    # All but the pretraining are planned in packs; what turns out to be no quicker so may leave.
    assert sum(size > 1 for size in sizes["auto"]) >= 12


@pytest.mark.slow
def test_packs_that_are_no_quicker_are_given_up_within_the_run(runs: Runs) -> None:
    text = FILE.replace("STEPS", "20").replace("batch_size: 4", "batch_size: 25")
    text += "  backbone_seed: 0\n"
    alone, file = runs.folder / "alone.yaml", runs.folder / "packed.yaml"
    alone.write_text(text + "axes: {seed: [0, 1, 2]}\npack: off\n")
    file.write_text(f"{text}axes: {{seed: {[*range(3, 15)]}}}\n")
    assert counts(runs(load(alone))) == (3, 0, 0, 0)
    sweep = load(file)
    planned = plan(sweep, runs.ledger, workers=Workers(1))
    assert [len(pack.points) for pack in planned.packs] == [4, 4, 4]

    assert counts(runs(sweep, max_concurrent=1)) == (12, 0, 0, 0)

    sizes = {row["seed"]: row["pack_size"] for row in runs.ledger.trials().to_pylist()}
    assert [sizes[seed] for seed in range(15)] == [1] * 3 + [4] * 4 + [1] * 8


# ------------------------------------------------------------- accidents, with the trainer itself


DRIVER = """
import sys
from sweep.execution.driver import run

def told(event):
    print(event.kind, event.label, event.step, flush=True)

summary = run(sys.argv[1], results=sys.argv[2], on_event=told)
print("summary", summary.done, summary.missing, summary.interrupted, flush=True)
sys.exit(summary.exit_code)
"""


ALONE = """
import json
import sys
import torch
from fpt.trainer import train
from sweep.sweepfile.expansion import load

torch.set_num_threads(1)
figures = []
for point in load(sys.argv[1]).all:
    training = train([point.config])
    list(training)
    end = training.outcomes[0]
    figures.append([point.trial_id, end.train_loss, end.validation_loss, end.test_loss])
print(json.dumps(figures))
"""


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run. Who has ended may wait for the machine's first process to see it."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Driver:
    """A driver in a process of its own, in a session of its own as under a terminal."""

    def __init__(
        self, file: Path, scratch: Path, *, inside: Sequence[str] = (), **options: Any
    ) -> None:
        (scratch / "home").mkdir(exist_ok=True)
        environment = os.environ | {"HOME": str(scratch / "home"), "TMPDIR": str(scratch)}
        self.scratch = scratch
        # What Ray does without it depends on what earlier Rays left in the home folder.
        environment.pop("RAY_AUTH_MODE")
        self.process = subprocess.Popen(
            [*inside, sys.executable, "-c", DRIVER, str(file), str(file.parent / "results")],
            **{
                "stdout": subprocess.PIPE,
                "stderr": subprocess.STDOUT,
                "text": True,
                "env": environment,
                "start_new_session": True,
            }
            | options,
        )
        self.said: list[str] = []

    def until(self, word: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.strip())
            if line.startswith(word):
                return
        pytest.fail(f"the driver ended without {word!r}: {self.said}")

    def children(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.agents = set()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.name().endswith("Agent"):
                    self.agents.add(child.pid)
        return children

    def end(self, children: list[psutil.Process]) -> int:
        """Wait for the driver and for all that it started, and return its exit code."""
        code = self.process.wait(timeout=600)
        assert self.process.stdout is not None
        with self.process.stdout as rest:
            self.said += rest.read().splitlines()
        # Two idle agents of a killed Ray end by themselves, a minute later.
        working = [p for p in children if p.pid not in self.agents]
        _, alive = psutil.wait_procs(working, timeout=120)
        assert alive == []
        return code

    def ends_well(self, children: list[psutil.Process], seconds: float = 60) -> None:
        """Wait until it has stopped by itself, with nothing of it left and states kept."""
        assert self.process.wait(timeout=seconds) == 1
        assert alive(children) == []
        assert list(self.scratch.glob("fpt-sweep-*")) == []
        assert self.process.stdout is not None
        with self.process.stdout as rest:
            self.said += rest.read().splitlines()
        assert not [line for line in self.said if ".cc:" in line or "Traceback" in line]


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder with a path that is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.slow
def test_ctrl_c_and_kill_lose_no_result_and_change_no_figure(tmp_path: Path, scratch: Path) -> None:
    file = sweep_file(tmp_path, "axes: {seed: [0, 1, 2]}\n", steps=1500)
    ledger = Ledger(tmp_path / "results")

    # Ctrl-C reaches the whole process group, Ray and workers included.
    first = Driver(file, scratch)
    first.until("record")
    children = first.children()
    os.killpg(first.process.pid, signal.SIGINT)
    assert first.end(children) == 1
    (summary,) = [line for line in first.said if line.startswith("summary")]
    assert summary.endswith("True")
    assert ledger.states()
    assert ledger.failures().column("cause").to_pylist().count("interrupted") >= 1

    # A killed driver takes everything along that it started; its folder is swept up later.
    second = Driver(file, scratch)
    second.until("trial_done")
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "results" / "trials").iterdir()}
    assert done
    children = second.children()
    second.process.kill()
    second.end(children)
    assert list(scratch.glob("fpt-sweep-*"))

    third = Driver(file, scratch)
    third.until("trial_started")
    assert third.end(third.children()) == 0
    assert third.said[-1] == "summary 3 0 False"
    assert {p: p.stat().st_mtime_ns for p in done} == done
    assert list(scratch.glob("fpt-sweep-*")) == []
    assert list((scratch / "home").iterdir()) == []

    with contextlib.closing(sqlite3.connect(tmp_path / "results" / "mlflow.db")) as runs:
        mirrored = runs.execute("select value from tags where key = 'fpt_sweep.trial_id'")
        assert sorted(name for (name,) in mirrored) == sorted(ledger.done())

    # The figures are those of the trainer alone, uninterrupted, to the bit.
    env = os.environ | {"MKL_CBWR": "AUTO,STRICT", "OMP_NUM_THREADS": "1"}
    alone = subprocess.run(
        [sys.executable, "-c", ALONE, str(file)],
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )
    expected = {name: tuple(figures) for name, *figures in json.loads(alone.stdout)}
    rows = ledger.trials().to_pylist()
    assert {
        r["trial_id"]: (r["train_loss"], r["validation_loss"], r["test_loss"]) for r in rows
    } == (expected)


@pytest.fixture
def training(tmp_path: Path, scratch: Path) -> Iterator[Driver]:
    """A driver whose trials train for long, on a Ray of its own."""
    file = sweep_file(tmp_path, "axes: {seed: [0, 1]}\nlimits: {save_seconds: 1}\n", steps=10**6)
    one = Driver(file, scratch)
    one.until("record")
    yield one
    with contextlib.suppress(ProcessLookupError):
        os.killpg(one.process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("number", sorted({*SIGNALS} - {signal.SIGINT}))
def test_a_signal_to_all_of_a_run_saves_states_and_leaves_nothing(
    training: Driver, tmp_path: Path, number: signal.Signals
) -> None:
    children = training.children()
    os.killpg(training.process.pid, number)

    training.ends_well(children)
    ledger = Ledger(tmp_path / "results")
    assert training.said[-1] == "summary 0 2 True"
    # Each of those that had begun: by itself, and not by the death of its worker.
    causes = ledger.failures().column("cause").to_pylist()
    assert causes == ["interrupted"] * len(ledger.states())
    assert causes


@pytest.mark.slow
@pytest.mark.parametrize("part", ["raylet", "gcs_server", "DashboardAgent"])
def test_a_ray_of_ours_that_loses_a_part_ends_within_a_minute(
    training: Driver, tmp_path: Path, part: str
) -> None:
    states = tmp_path / "results/states"
    until = time.monotonic() + 120
    while not (states.is_dir() and any(states.iterdir())) and time.monotonic() < until:
        time.sleep(0.2)
    children = training.children()
    (victim,) = [child for child in children if part in child.name()]
    victim.kill()

    training.ends_well(children)
    again = f"sweep run {tmp_path / 'small.yaml'} --results {tmp_path / 'results'}"
    # Where Ray keeps this process in a call for ever, it is ended by a sentence.
    assert training.said[-1] in ("summary 0 2 True", f"  {again}")
    assert Ledger(tmp_path / "results").states()


@pytest.mark.slow
def test_a_run_goes_on_without_a_dashboard(training: Driver) -> None:
    children = training.children()
    (victim,) = [child for child in children if "dashboard.py" in " ".join(child.cmdline())]
    victim.kill()
    for _ in range(5):
        training.until("record")
    training.process.send_signal(signal.SIGTERM)
    training.ends_well(children)


@pytest.mark.slow
def test_a_closed_terminal_saves_states(tmp_path: Path, scratch: Path) -> None:
    file = sweep_file(tmp_path, "axes: {seed: [0, 1]}\n", steps=10**6)
    results = tmp_path / "results"
    terminal, other = pty.openpty()
    process = subprocess.Popen(
        # Who starts a session and opens a terminal controls it.
        ["setsid", "--ctty", sys.executable, "-m", "sweep", "run", str(file), "--results", results],
        **dict.fromkeys(["stdin", "stdout", "stderr"], other),
        env=os.environ | {"TMPDIR": str(scratch)},
    )
    os.close(other)
    text = b""
    while not re.search(rb"\d/1000000 +[\d.]+ ", text):  # a step, and its loss
        text += os.read(terminal, 10_000)
    children = psutil.Process(process.pid).children(recursive=True)
    os.close(terminal)

    assert process.wait(60) == 1
    assert alive(children) == []
    ledger = Ledger(results)
    assert ledger.states()
    assert set(ledger.failures().column("cause").to_pylist()) == {"interrupted"}


NOBODY = (
    "unshare",
    "--user",
    "--map-user=12345",
    "env",
    "-u",
    "HOME",
    "-u",
    "USER",
    "-u",
    "LOGNAME",
)
"""Runs a command as a user that no passwd knows, and that has no home."""


READ_ONLY = """
for name in sweep fpt; do
    mount --bind "$0/$name" "$0/$name" && mount -o remount,ro,bind "$0/$name"
done
exec "$@"
"""


def can(*command: str) -> bool:
    return bool(shutil.which(command[0])) and subprocess.run([*command, "true"]).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "inside",
    [
        NOBODY,
        ("env", "HOME=/proc/none"),
        ("unshare", "-m", "sh", "-c", READ_ONLY, str(Path(driver.__file__).parents[2])),
    ],
    ids=["nobody", "no home", "read-only"],
)
def test_a_bare_number_for_a_user_no_home_and_a_read_only_package_will_do(
    tmp_path: Path, scratch: Path, inside: tuple[str, ...]
) -> None:
    if not can(*inside):
        pytest.skip("namespaces are not allowed here")
    one = Driver(sweep_file(tmp_path, "axes: {seed: [0]}\n"), scratch, inside=inside)
    one.until("summary")
    assert one.end([]) == 0
    assert one.said[-1] == "summary 1 0 False"
    assert not [line for line in one.said if "Traceback" in line or "mirror" in line]
    assert (tmp_path / "results/mlflow.db").exists()


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["-u 40", "-u 150", "-v 2000000"])
def test_limits_under_which_no_ray_starts_are_a_sentence(
    tmp_path: Path, scratch: Path, limit: str
) -> None:
    nobody = NOBODY[:3]
    if not can(*nobody):
        pytest.skip("namespaces are not allowed here")
    file = sweep_file(tmp_path, "axes: {seed: [0]}\n")
    run_it = f'ulimit {limit}; exec "$0" -m sweep run "$1" --results "$2"'
    done = subprocess.run(
        [*nobody, "bash", "-c", run_it, sys.executable, file, tmp_path / "results"],
        env=os.environ | {"TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
    )
    first, said = done.stderr.splitlines()
    assert first == "small: 1 trial: 1 missing"
    assert said.startswith(f"ulimit {limit[:2]}: ")
    assert done.returncode == 2
    assert list(scratch.iterdir()) == []


def test_a_cell_is_tuned_and_then_trained_in_one_run_and_optuna_told(runs: Runs) -> None:
    sweep = runs.sweep(
        """\
        axes: {dropout: [0.0, 0.1], seed: [0, 1]}
        tune: {learning_rate: {values: [1e-2, 1e-3, 1e-4]}, seeds: [7]}
        pack: off
        """
    )

    begun = runs.folder / "a trial of the first cell is done"

    def told(event: Event) -> None:
        runs.events.append(event)
        if event.kind == "trial_done" and event.label == "0.0/0":
            begun.touch()

    def slow_second_cell(config: Any) -> None:
        if (config.dropout, config.seed, config.learning_rate) == (0.1, 7, 1e-2):
            until = time.monotonic() + 120
            while not begun.exists() and time.monotonic() < until:
                time.sleep(0.05)

    summary = runs(sweep, slow_second_cell, on_event=told)

    # Of equals, the least.
    assert counts(summary) == (10, 0, 0, 0)
    now = tuning.resolve(sweep, runs.ledger)
    assert {point.config.learning_rate for point in now.points} == {1e-4}
    assert runs.ledger.done() == {point.trial_id for point in now.all}
    # The first cell did not wait for the second one.
    ended = runs.of("trial_done")
    slow = [label for label in ended if label.startswith("0.1/7")]
    assert ended.index("0.0/0") < ended.index(slow[-1]) < ended.index("0.1/0")
    assert optuna_studies.record(sweep, runs.ledger) == 0
    assert (runs.folder / "results/studies/small.log").exists()
    assert runs(sweep).done == 10
