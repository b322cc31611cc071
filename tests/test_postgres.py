"""The set-up for many users: MLflow's server on PostgreSQL, through restarts of both."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweep.ledger.ledger import Ledger
from sweep.mirrors import mlflow_runs
from sweep.sweepfile.expansion import load
from sweep.sweepfile.trials import Sweep
from tests.chaos import machine
from tests.servers import MlflowServer, Postgres, free_port
from tests.support import trial_row

pytestmark = pytest.mark.slow

FILE = """
sweep: shared
trial:
  task: {name: bit-xor, bits: 3}
  backbone: {name: gpt2, layers: 1, width: 8, heads: 1}
  pretraining: random
  steps: 20
axes: {seed: [SEEDS]}
"""


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Postgres, MlflowServer]]:
    with machine.clean(), machine.folder() as folder:
        database = Postgres(folder / "pg", free_port(), env=machine.environment())
        database.start()
        server = MlflowServer(
            folder / "mlflow", database.uri, free_port(), env=machine.environment()
        )
        server.start()
        yield database, server
        server.stop()
        database.stop()


class Shared:
    """A ledger that grows, and its mirror."""

    def __init__(self, folder: Path, name: str, trials: int) -> None:
        file = folder / "shared.yaml"
        seeds = ", ".join(map(str, range(trials)))
        file.write_text(FILE.replace("SEEDS", seeds).replace("sweep: shared", f"sweep: {name}"))
        self.sweep: Sweep = load(file)
        self.ledger = Ledger(folder / "results")

    def commit(self, first: int, last: int) -> None:
        for point in self.sweep.points[first:last]:
            row = trial_row(point)
            curve = [
                {"step": step, "split": "train", "loss": 1 / step, "accuracy": 0.5,
                 "seconds": step / 10, "examples": 4 * step}
                for step in range(1, 21)
            ]  # fmt: skip
            self.ledger.append_curve(point.trial_id, row["attempt"], 0, curve)
            self.ledger.commit(row)

    def once(self, last: int) -> dict[str, int]:
        return {point.trial_id: 1 for point in self.sweep.points[:last]}


@pytest.fixture
def shared(
    servers: tuple[Postgres, MlflowServer],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Shared:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", servers[1].uri)
    name = request.node.name.replace("_", "-")
    return Shared(tmp_path, name, 40)


def test_restarts_of_either_lose_and_double_no_run(
    shared: Shared, servers: tuple[Postgres, MlflowServer], caplog: pytest.LogCaptureFixture
) -> None:
    database, server = servers
    name = shared.sweep.name
    shared.commit(0, 5)
    mirror = mlflow_runs.Mirror(shared.sweep, shared.ledger)
    assert mirror.prepare()
    assert mirror.sync() == 5
    assert database.runs(name) == shared.once(5)

    for number, part in enumerate((database, server), start=1):
        part.stop()
        shared.commit(5 * number, 5 * number + 5)
        with caplog.at_level(logging.WARNING, "sweep.mirrors.mlflow_runs"):
            assert mlflow_runs.Mirror(shared.sweep, shared.ledger).sync() == 0
        assert "no result is lost" in caplog.text
        caplog.clear()
        with pytest.raises(mlflow_runs.MirrorError):
            mlflow_runs.catch_up(shared.sweep, shared.ledger)
        part.start()
        # The one that was there all along, with connections of before the restart.
        assert mirror.sync() == 5
        assert database.runs(name) == shared.once(5 * number + 5)

    assert mlflow_runs.catch_up(shared.sweep, shared.ledger) == 0
    assert mlflow_runs.catch_up(shared.sweep, shared.ledger, rebuild=True) == 15
    assert database.runs(name) == shared.once(15)


def test_restarts_in_the_middle_of_a_mirror_lose_and_double_no_run(
    shared: Shared, servers: tuple[Postgres, MlflowServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    database, server = servers
    monkeypatch.setattr(mlflow_runs, "BACKOFF", 0.5)
    monkeypatch.setattr(mlflow_runs, "LONGEST_BACKOFF", 0.5)
    shared.commit(0, 120)
    ended = threading.Event()
    faults = []

    def follow() -> None:
        mirror = mlflow_runs.Mirror(shared.sweep, shared.ledger)
        while not ended.wait(0.1):
            if mirror.sync() < 120 and mirror._backoff:
                faults.append(len(mirror._ended))

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        for part in (database, server, database):
            machine.wait("a few more runs", lambda: not ended.wait(1.5), 10)
            part.stop()
            part.start()
        finished = time.monotonic() + 300
        while database.runs(shared.sweep.name) != shared.once(120) and time.monotonic() < finished:
            time.sleep(0.5)
    finally:
        ended.set()
        thread.join()

    mlflow_runs.catch_up(shared.sweep, shared.ledger)
    assert faults, "no restart came while the mirror wrote"
    assert database.runs(shared.sweep.name) == shared.once(120)
