"""The mirror against real MLflow stores, real processes and, marked slow, real servers."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from sweep.ledger.ledger import Committed, Ledger
from sweep.mirrors import mlflow_attachments, mlflow_runs, mlflow_stores, mlflow_ui
from sweep.mirrors.mlflow_runs import NOTE, Mirror, catch_up
from sweep.mirrors.mlflow_stores import LEDGER, PARENT, SWEEP, TRIAL, MirrorError, Store
from sweep.sweepfile.expansion import load
from sweep.sweepfile.trials import Point, Sweep
from tests.servers import free_port
from tests.support import failure_row, trial_row

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# MLflow's own use of SQLAlchemy and alembic.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(alembic|mlflow|sqlalchemy).*")

TEXT = """\
sweep: rates
trial:
  backbone: {name: gpt2, layers: 1, width: 8, heads: 1}
  pretraining: random
  steps: 20
  evaluation: {every: 10}
axes:
  task: [{label: bit-xor, task: bit-xor, task.bits: 3}, bit-memory]
  learning_rate: [0.001, 0.01]
  seed: [0, 1]
table: {rows: learning_rate, columns: task}
"""
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to make."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}")
    return file


@pytest.fixture
def place(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a sweep file, results with an empty database, and an empty `cwd` to be in."""
    (tmp_path / "rates.yaml").write_text(TEXT)
    (tmp_path / "results").mkdir()
    shutil.copy(empty_database, tmp_path / "results" / "mlflow.db")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


def opened(place: Path, *, write: bool = True) -> tuple[Sweep, Ledger]:
    return load(place / "rates.yaml"), Ledger(place / "results", write=write)


def records(last: int = 20, every: int = 10) -> list[dict[str, Any]]:
    return [
        {
            "step": step, "split": split, "loss": 1 / (1 + step), "accuracy": step / (1 + last),
            "seconds": step / 10, "examples": 16 * step,
        }
        for step in range(0, last + 1, every)
        for split in ("train", "validation")
    ]  # fmt: skip


def finish(ledger: Ledger, points: Sequence[Point], **overrides: Any) -> None:
    """Commit trials as a worker does: the curve, and then the row."""
    for number, point in enumerate(points):
        began = START + timedelta(minutes=number)
        times = {"started_at": began, "finished_at": began + timedelta(seconds=30)}
        row = trial_row(point, **{**times, **overrides})
        ledger.append_curve(point.trial_id, row["attempt"], 0, records())
        assert ledger.commit(row) == Committed()


def runs(uri: str, experiment: str = "fpt-sweep/rates") -> list[Run]:
    """The active runs of an experiment."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id], max_results=5000))


def children(uri: str) -> dict[str, Run]:
    """The child runs by trial id, each there once and under the one parent."""
    (parent,) = [run for run in runs(uri) if TRIAL not in run.data.tags]
    found = [run for run in runs(uri) if TRIAL in run.data.tags]
    by_trial = {run.data.tags[TRIAL]: run for run in found}

    assert len(found) == len(by_trial)
    assert {run.data.tags[PARENT] for run in found} <= {parent.info.run_id}
    return by_trial


def parent_of(uri: str) -> Run:
    (parent,) = [run for run in runs(uri) if TRIAL not in run.data.tags]
    return parent


def history(uri: str, run: Run, key: str) -> list[tuple[int, float, int]]:
    points = MlflowClient(uri).get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value, point.timestamp) for point in points)


def content(uri: str) -> dict[str, Any]:
    """All that the children say, but for the ids that MLflow makes up."""
    return {
        trial: (
            run.info.run_name, run.info.status, run.info.start_time, run.info.end_time,
            run.data.params, {k: v for k, v in run.data.tags.items() if k != PARENT},
            {key: history(uri, run, key) for key in run.data.metrics},
        )
        for trial, run in children(uri).items()
    }  # fmt: skip


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def by_calls(ledger: Ledger, sweep: str) -> Store:
    """A database that is written to as a server is."""
    store = mlflow_stores.connect(ledger, sweep)
    return Store(store.client, store.experiment)


SYNC = """
    import os, signal, sys
    from sweep.ledger.ledger import Ledger
    from sweep.mirrors.mlflow_runs import Mirror
    from sweep.mirrors.mlflow_stores import Store, connect
    from sweep.sweepfile.expansion import load
    mirror = Mirror(load(sys.argv[1]), Ledger(sys.argv[2], write=True))
"""


def test_a_sweep_is_a_parent_run_and_each_finished_trial_a_child(place: Path) -> None:
    sweep, ledger = opened(place)
    finish(ledger, sweep.points)
    mirrored = Mirror(sweep, ledger).sync()
    uri = mlflow_stores.tracking_uri(ledger)
    found, parent = children(uri), parent_of(uri)

    assert mirrored == len(sweep.points) == 8
    assert found.keys() == {point.trial_id for point in sweep.points}
    assert parent.info.run_name == "rates"
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["trials"] == "8 of 8"
    assert "bit-xor" in parent.data.tags["mlflow.note.content"]
    assert os.listdir() == [], "something of MLflow's landed in the working directory"


def test_a_child_says_in_peoples_words_what_the_trial_was(place: Path) -> None:
    sweep, ledger = opened(place)
    point = sweep.points[0]
    finish(ledger, [point], test_accuracy=0.75, git_commit="abc123", seconds=12.5)
    Mirror(sweep, ledger).sync()
    uri = mlflow_stores.tracking_uri(ledger)
    run = children(uri)[point.trial_id]

    assert run.info.run_name == point.label == "bit-xor/0.001/0"
    assert run.data.params.items() >= {
        "task": "bit-xor", "task.bits": "3", "pretraining": "random", "backbone": "gpt2",
        "layers": "1", "width": "8", "train": "input+norm+output+position",
        "learning_rate": "0.001", "batch_size": "16", "steps": "20", "dropout": "0.1",
        "protocol": "sound", "numerics": "fp32", "seed": "0", "optimizer.clip": "1.0",
    }.items()  # fmt: skip
    assert run.data.tags.items() >= {
        "task": "bit-xor", "pretraining": "random", "backbone": "gpt2", "seed": "0",
        "train": "input+norm+output+position", "cell_id": point.cell_id, "outcome": "done",
        "git_commit": "abc123", "mlflow.source.git.commit": "abc123", SWEEP: "rates",
        "axis.learning_rate": "0.001", "mlflow.source.name": "rates.yaml",
    }.items()  # fmt: skip
    assert run.data.metrics["test_accuracy"] == 0.75
    assert run.data.metrics["seconds"] == 12.5
    start = int(START.timestamp() * 1000)
    assert (run.info.start_time, run.info.end_time) == (start, start + 30_000)
    assert history(uri, run, "validation/loss") == [
        (0, 1.0, start), (10, 1 / 11, start + 1000), (20, 1 / 21, start + 2000),
    ]  # fmt: skip


def test_a_backbone_of_the_sweeps_own_is_called_by_its_name(place: Path) -> None:
    axis = "axes:\n  pretraining: [random, own]\n"
    own = "backbones:\n  own: {task: bit-memory, train: all, seed: 7}\n"
    text = TEXT.replace("axes:\n", own + axis).replace("  learning_rate: [0.001, 0.01]\n", "")
    (place / "rates.yaml").write_text(text.replace("rows: learning_rate", "rows: pretraining"))
    sweep, ledger = opened(place)
    finish(ledger, sweep.all)
    Mirror(sweep, ledger).sync()
    found = children(mlflow_stores.tracking_uri(ledger))
    (pretraining,) = sweep.pretrainings
    taught = next(point for point in sweep.points if point.parent)

    assert found.keys() == {point.trial_id for point in sweep.all}
    assert found[pretraining.trial_id].info.run_name == "own"
    assert found[taught.trial_id].data.params["pretraining"] == "own"
    assert found[taught.trial_id].data.tags["pretraining"] == "own"


def test_a_kill_while_mlflow_makes_its_tables_does_no_harm(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def half_way(engine: Any) -> None:
        initialise(engine)
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE alembic_version")
        raise Killed

    from mlflow.store.db import utils

    sweep, ledger = opened(place)
    database = place / "results" / "mlflow.db"
    database.unlink()
    initialise = utils._initialize_tables
    with monkeypatch.context() as patch:
        patch.setattr(utils, "_initialize_tables", half_way)
        with pytest.raises(Killed):
            Mirror(sweep, ledger).prepare()
    assert not database.exists()

    assert Mirror(sweep, ledger).prepare()
    assert parent_of(mlflow_stores.tracking_uri(ledger)).info.status == "RUNNING"
    assert not database.with_suffix(".new").exists()


def test_the_mirror_follows_a_sweep_and_then_rests(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sweep, ledger = opened(place)
    uri = mlflow_stores.tracking_uri(ledger)
    mirror = Mirror(sweep, ledger)

    assert mirror.prepare()
    assert parent_of(uri).info.status == "RUNNING"
    assert mirror.sync() == 0
    finish(ledger, sweep.points[:3])
    assert mirror.sync() == 3
    assert parent_of(uri).info.status == "RUNNING"
    assert parent_of(uri).data.tags["trials"] == "3 of 8"
    finish(ledger, sweep.points[3:])
    assert mirror.sync() == 5
    assert parent_of(uri).info.status == "FINISHED"
    before = content(uri)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "lease", lambda *_, **__: pytest.fail("it wrote again"))
        assert mirror.sync() == 0
    assert Mirror(sweep, ledger).sync() == 0
    assert content(uri) == before
    assert caplog.records == []


def test_a_sweep_that_grows_is_running_again(place: Path) -> None:
    sweep, ledger = opened(place)
    uri = mlflow_stores.tracking_uri(ledger)
    finish(ledger, sweep.points)
    Mirror(sweep, ledger).sync()
    (place / "rates.yaml").write_text(TEXT.replace("seed: [0, 1]", "seed: [0, 1, 2]"))
    grown = load(place / "rates.yaml")

    assert Mirror(grown, ledger).sync() == 0
    assert parent_of(uri).info.status == "RUNNING"
    assert parent_of(uri).data.tags["trials"] == "8 of 12"


def test_the_parent_carries_the_sweep_file_and_its_table(place: Path) -> None:
    sweep, ledger = opened(place)
    finish(ledger, sweep.points)
    Mirror(sweep, ledger).sync()
    uri = mlflow_stores.tracking_uri(ledger)
    client, parent = MlflowClient(uri), parent_of(uri).info.run_id
    names = {artifact.path for artifact in client.list_artifacts(parent)}
    text = Path(client.download_artifacts(parent, "rates.yaml")).read_text()

    assert names == {"rates.yaml", "table.md", "table.html", "table.csv"}
    assert text == TEXT
    assert parent_of(uri).info.artifact_uri.startswith((place / "results").as_uri())


def test_at_the_end_the_parent_carries_claims_figures_and_report(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (place / "rates.yaml").write_text(
        TEXT.replace("[0.001, 0.01]", "[0.001]")
        + "claims: [{that: bit-memory > bit-xor, axis: task, paired_by: seed}]\n"
    )
    sweep, ledger = opened(place)
    finish(ledger, sweep.points)
    mirror = Mirror(sweep, ledger)
    mirror.sync()
    uri = mlflow_stores.tracking_uri(ledger)
    client, parent = MlflowClient(uri), parent_of(uri).info.run_id

    def names(folder: str | None = None) -> set[str]:
        return {artifact.path for artifact in client.list_artifacts(parent, folder)}

    assert "report.html" not in names()
    assert mirror.sync(complete=True) == 0
    assert {"claims.md", "claims.json", "report.html", "figures"} <= names()
    assert any(name.endswith(".png") for name in names("figures"))
    report = Path(client.download_artifacts(parent, "report.html"))
    assert "rates" in report.read_text(encoding="utf-8")

    # What cannot be made costs the rest nothing.
    client.set_tag(parent, mlflow_stores.ARTIFACTS, "older")
    makers = {**mlflow_attachments.MAKERS, "report": lambda *_: 1 // 0}
    assert Mirror(sweep, ledger, makers=makers).sync(complete=True) == 0
    assert "no report: ZeroDivisionError" in caplog.text
    assert parent_of(uri).data.tags[mlflow_stores.ARTIFACTS] != "older"


def test_a_part_of_a_sweep_does_not_stand_for_the_whole(place: Path) -> None:
    sweep, ledger = opened(place)
    finish(ledger, sweep.points[:2])
    Mirror(sweep.only([sweep.points[0].label]), ledger).sync()
    parent = parent_of(mlflow_stores.tracking_uri(ledger))

    assert parent.data.tags["trials"] == "2 of 8"
    assert parent.info.status == "RUNNING"


def test_a_diverged_trial_is_finished_and_says_so(place: Path) -> None:
    sweep, ledger = opened(place)
    point = sweep.points[0]
    row = trial_row(point, outcome="diverged", stopped="diverged", test_accuracy=None)
    curve = records()
    curve[-1]["loss"], curve[-2]["loss"] = math.nan, math.inf
    ledger.append_curve(point.trial_id, row["attempt"], 0, curve)
    ledger.commit(row)
    Mirror(sweep, ledger).sync()
    uri = mlflow_stores.tracking_uri(ledger)
    run = children(uri)[point.trial_id]

    assert run.info.status == "FINISHED"
    assert run.data.tags["outcome"] == "diverged"
    assert "test_accuracy" not in run.data.metrics
    assert [step for step, _, _ in history(uri, run, "validation/loss")] == [0, 10]
    assert [step for step, _, _ in history(uri, run, "train/loss")] == [0, 10]


def test_a_curve_longer_than_a_batch_of_mlflows_arrives_whole(place: Path) -> None:
    sweep, ledger = opened(place)
    point = sweep.points[0]
    row = trial_row(point)
    ledger.append_curve(point.trial_id, row["attempt"], 0, records(last=699, every=1))
    ledger.commit(row)
    Mirror(sweep, ledger).sync()
    uri = mlflow_stores.tracking_uri(ledger)
    run = children(uri)[point.trial_id]

    for key in ("train/loss", "train/accuracy", "validation/loss", "validation/accuracy"):
        assert [step for step, _, _ in history(uri, run, key)] == list(range(700))


@pytest.mark.parametrize("before", ["log_batch", "set_terminated"])
def test_what_a_killed_process_began_is_completed_and_not_doubled(place: Path, before: str) -> None:
    sweep, ledger = opened(place)
    finish(ledger, sweep.points)
    killed = python(
        SYNC
        + """
    from mlflow import MlflowClient
    method, calls = getattr(MlflowClient, sys.argv[3]), []
    def deadly(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*arguments, **options)
    setattr(MlflowClient, sys.argv[3], deadly)
    def by_calls(ledger, sweep):
        store = connect(ledger, sweep)
        return Store(store.client, store.experiment)
    Mirror(mirror.sweep, mirror.ledger, connect=by_calls).sync()
    """,
        place / "rates.yaml", place / "results", before,
    )  # fmt: skip
    uri = mlflow_stores.tracking_uri(ledger)
    begun = [run for run in children(uri).values() if run.info.status == "RUNNING"]
    ended = [run for run in children(uri).values() if run.info.status == "FINISHED"]

    assert killed.returncode == -signal.SIGKILL
    assert begun
    assert Mirror(sweep, ledger).sync() == 8 - len(ended)
    assert {run.info.run_id for run in begun} <= {run.info.run_id for run in children(uri).values()}
    assert content(uri) == content(mlflow_stores.tracking_uri(undisturbed(place, sweep)))


@pytest.mark.parametrize("table", ["runs", "tags", "params", "metrics", "latest_metrics", "end"])
def test_a_kill_leaves_whole_runs_in_a_database_or_none(place: Path, table: str) -> None:
    sweep, ledger = opened(place)
    finish(ledger, sweep.points[:2])
    Mirror(sweep, ledger).sync()
    finish(ledger, sweep.points[2:])
    killed = python(
        SYNC
        + """
    import sqlalchemy
    from sqlalchemy import event
    start = f"INSERT INTO {sys.argv[3]} "
    def deadly(connection, cursor, statement, parameters, context, many):
        if statement.startswith(start) and len(parameters) > 3:
            event.listen(sqlalchemy.Engine, "after_cursor_execute", die)
        if statement.startswith("INSERT INTO latest_metrics ") and sys.argv[3] == "end":
            event.listen(sqlalchemy.Engine, "commit", die)
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    event.listen(sqlalchemy.Engine, "before_cursor_execute", deadly)
    mirror.sync()
    """,
        place / "rates.yaml", place / "results", table,
    )  # fmt: skip
    uri = mlflow_stores.tracking_uri(ledger)

    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(children(uri)) == 2
    assert Mirror(sweep, ledger).sync() == 6
    assert content(uri) == content(mlflow_stores.tracking_uri(undisturbed(place, sweep)))


def undisturbed(place: Path, sweep: Sweep) -> Ledger:
    """The same ledger, mirrored as if nothing had happened."""
    whole = place / "whole"
    shutil.copytree(place / "results", whole, ignore=shutil.ignore_patterns("mlflow*"))
    shutil.copy(place / "results" / "mlflow.db", whole)  # its tables; the runs are made anew
    ledger = Ledger(whole, write=True)
    assert catch_up(sweep, ledger, rebuild=True) == 8
    return ledger


def rows(database: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of MLflow's tables on active runs, with the trial's name for the run's id."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        names = dict(
            connection.execute(
                "SELECT run_uuid, name FROM runs WHERE lifecycle_stage = 'active' "
                "AND run_uuid IN (SELECT run_uuid FROM tags WHERE key = ?)",
                [TRIAL],
            )
        )
        out = {}
        for table in ("runs", "tags", "params", "metrics", "latest_metrics"):
            cursor = connection.execute(f"SELECT * FROM {table}")
            at = [column[0] for column in cursor.description].index("run_uuid")
            out[table] = sorted(
                repr(tuple(str(value).replace(row[at], names[row[at]]) for value in row))
                for row in cursor
                if row[at] in names and PARENT not in row
            )
    return out


def test_a_database_gets_the_rows_that_mlflows_client_writes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, ledger = opened(place)
    finish(ledger, sweep.points[:3], test_accuracy=-0.5)
    long = sweep.points[3]
    ledger.append_curve(long.trial_id, trial_row(long)["attempt"], 0, [
        *records(last=400, every=1),
        # A step that was evaluated twice, and figures that are none.
        {"step": 400, "split": "train", "loss": 0.25, "accuracy": 0.25, "seconds": 40.0},
        {"step": 401, "split": "train", "loss": math.nan, "accuracy": math.inf, "seconds": 41.0},
    ])  # fmt: skip
    ledger.commit(trial_row(long, test_loss=math.inf, host="h" * 9000))
    database = place / "results" / "mlflow.db"
    assert Mirror(sweep, ledger).sync() == 4
    in_bulk = rows(database)
    for run in children(f"sqlite:///{database}").values():
        MlflowClient(f"sqlite:///{database}").delete_run(run.info.run_id)
    assert Mirror(sweep, ledger, connect=by_calls).sync() == 4
    by_client = rows(database)

    assert [len(made) for made in in_bulk.values()] == [len(made) for made in by_client.values()]
    assert in_bulk == by_client


def test_processes_at_once_over_a_database_that_is_not_there_yet(place: Path) -> None:
    """Two mirror one sweep and a third another one: what each first use of MLflow would spoil."""
    (place / "results" / "mlflow.db").unlink()
    (place / "other.yaml").write_text(TEXT.replace("sweep: rates", "sweep: other"))
    sweep, ledger = opened(place)
    finish(ledger, sweep.points)
    code = textwrap.dedent(SYNC) + textwrap.dedent("""
        import time
        def all_done():
            if mirror.sync() or mirror.ledger.holder(f"mlflow-{mirror.sweep.name}"):
                return False
            return mirror._ended.keys() == mirror._points.keys()
        while not all_done():
            time.sleep(0.05)
    """)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(place / name), str(place / "results")],
            stderr=subprocess.PIPE, text=True,
        )
        for name in ("rates.yaml", "rates.yaml", "other.yaml")
    ]  # fmt: skip
    said = [process.communicate(timeout=600)[1] for process in processes]
    uri = mlflow_stores.tracking_uri(ledger)

    assert said == ["", "", ""]
    assert children(uri).keys() == {point.trial_id for point in sweep.points}
    assert len(runs(uri, "fpt-sweep/other")) == 9


def test_of_two_runs_of_one_trial_the_complete_one_stays(place: Path) -> None:
    sweep, ledger = opened(place)
    finish(ledger, sweep.points)
    Mirror(sweep, ledger).sync()
    uri = mlflow_stores.tracking_uri(ledger)
    before = content(uri)
    client = MlflowClient(uri)
    run = children(uri)[sweep.points[0].trial_id]
    client.create_run(run.info.experiment_id, tags=run.data.tags)

    assert Mirror(sweep, ledger).sync() == 0
    assert content(uri) == before


def test_runs_that_a_person_deleted_come_back(place: Path) -> None:
    sweep, ledger = opened(place)
    finish(ledger, sweep.points)
    Mirror(sweep, ledger).sync()
    uri = mlflow_stores.tracking_uri(ledger)
    before, client = content(uri), MlflowClient(uri)
    for run in (parent_of(uri), children(uri)[sweep.points[0].trial_id]):
        client.delete_run(run.info.run_id)

    assert Mirror(sweep, ledger).sync() == 1
    assert content(uri) == before

    client.delete_experiment(parent_of(uri).info.experiment_id)
    Mirror(sweep, ledger).sync()
    assert content(uri) == before


def test_rebuild_makes_equal_runs_from_the_ledger_alone(place: Path) -> None:
    sweep, ledger = opened(place)
    finish(ledger, sweep.points)
    Mirror(sweep, ledger).sync()
    before = content(mlflow_stores.tracking_uri(ledger))
    copy = place / "copy"
    shutil.copytree(place / "results", copy, ignore=shutil.ignore_patterns("mlflow*"))
    elsewhere = Ledger(copy, write=True)

    assert catch_up(sweep, ledger, rebuild=True) == 8
    assert content(mlflow_stores.tracking_uri(ledger)) == before
    assert catch_up(sweep, elsewhere, rebuild=True) == 8
    assert content(mlflow_stores.tracking_uri(elsewhere)) == before
    assert (copy / "mlflow-artifacts").is_dir()


@pytest.mark.parametrize("scheme", ["http://user:secret@", "postgresql://user:secret@"])
def test_without_mlflow_nothing_is_lost_but_a_line_of_warning(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, scheme: str
) -> None:
    sweep, ledger = opened(place)
    finish(ledger, sweep.points)
    now = [0.0]
    mirror = Mirror(sweep, ledger, clock=lambda: now[0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}127.0.0.1:{free_port()}/x")

    assert not mirror.prepare()
    assert mirror.sync() == 0, "within the pause after a fault"
    (warned,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "127.0.0.1" in warned
    assert f"`{mirror.command}` catches up" in warned
    assert "secret" not in warned
    assert "\n" not in warned
    for rebuild in (False, True):
        with pytest.raises(MirrorError, match=r"127\.0\.0\.1"):
            catch_up(sweep, ledger, rebuild=rebuild)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    now[0] += mlflow_runs.BACKOFF
    assert mirror.sync() == 8


def test_the_command_that_catches_up_names_the_ledger_unless_it_is_the_default(
    place: Path, tmp_path: Path
) -> None:
    sweep, ledger = opened(place)
    file, folder = sweep.file, ledger.uri

    words = shlex.split(Mirror(sweep, Ledger(tmp_path / "an other")).command)
    assert words == ["sweep", "mirror", str(file), "--results", f"{tmp_path}/an other"]
    assert shlex.split(Mirror(sweep, ledger).command)[3:] == ["--results", folder]
    assert shlex.split(Mirror(sweep, Ledger("results")).command) == words[:3]


def test_a_fault_half_way_costs_no_trial_and_doubles_none(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sweep, ledger = opened(place)
    finish(ledger, sweep.points)
    now = [0.0]
    mirror = Mirror(sweep, ledger, connect=by_calls, clock=lambda: now[0])
    log_batch, calls = MlflowClient.log_batch, []

    def unreliable(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise ConnectionResetError("the server went away\nand more lines")
        log_batch(*arguments, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", unreliable)
    mirrored = mirror.sync()
    assert mirrored < 8
    now[0] += mlflow_runs.BACKOFF
    assert mirror.sync() in range(1, 9 - mirrored)
    assert len(children(mlflow_stores.tracking_uri(ledger))) == 8
    assert len(caplog.records) == 1


def test_pauses_after_faults_grow_to_a_limit(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, tries = [0], []
    mirror = Mirror(*opened(place), clock=lambda: now[0])

    def broken(*_: object, **__: object) -> None:
        tries.append(now[0])
        raise ZeroDivisionError

    monkeypatch.setattr(Ledger, "done", broken)
    for now[0] in range(1216):
        mirror.sync()

    pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    assert len(caplog.records) == 10


def test_another_holder_of_the_lease_is_left_to_it(place: Path) -> None:
    sweep, ledger = opened(place)
    finish(ledger, sweep.points)
    mirror = Mirror(sweep, ledger)
    lease = Ledger(place / "results", write=True).lease("mlflow-rates")
    assert lease is not None
    with lease:
        assert mirror.sync() == 0
        with pytest.raises(MirrorError, match=str(os.getpid())):
            catch_up(sweep, ledger)
    assert catch_up(sweep, ledger) == 8


def test_a_folder_with_odd_characters(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "a b%20c?#é"
    results.mkdir()
    shutil.copy(empty_database, results / "mlflow.db")
    (tmp_path / "rates.yaml").write_text(TEXT)
    sweep, ledger = load(tmp_path / "rates.yaml"), Ledger(results, write=True)
    finish(ledger, sweep.points[:1])

    assert Mirror(sweep, ledger).sync() == 1
    assert len(children(mlflow_stores.tracking_uri(ledger))) == 1
    assert {path.name for path in results.iterdir()} >= {"mlflow.db", "mlflow-artifacts"}


def test_where_the_runs_of_a_ledger_on_object_storage_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FPT_SWEEP_CACHE", str(tmp_path))
    ledger = Ledger("s3://bucket/some/where")

    assert mlflow_stores.tracking_uri(ledger) == f"sqlite:///{mlflow_stores.where(ledger)}"
    assert Path(mlflow_stores.where(ledger)).is_relative_to(tmp_path)


def test_the_module_costs_no_import_of_mlflow() -> None:
    done = python("import sweep.mirrors.mlflow_runs, sys; assert 'mlflow' not in sys.modules")

    assert done.returncode == 0, done.stderr


def test_the_ui_has_nothing_to_show_before_the_first_run(tmp_path: Path) -> None:
    with pytest.raises(MirrorError, match="sweep run"):
        mlflow_ui.serve_ui(Ledger(tmp_path, write=True), ready=print)


def test_a_port_that_is_taken(place: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MirrorError, match=f"port {port}.*--port {port + 1}"):
            mlflow_ui.serve_ui(opened(place)[1], port, ready=print)


def test_a_tracking_server_of_the_users_is_the_ui(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    told: list[str] = []
    mlflow_ui.serve_ui(opened(place)[1], ready=told.append)

    assert told == ["https://mlflow.example.org"]


# ------------------------------------------------------------------------------------ real servers


def eventually(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    """A tracking server with a database and artifacts of its own."""
    process = subprocess.Popen(
        [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
            "--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/server.db",
            "--artifacts-destination", str(folder / "server-artifacts"),
        ],
        env=os.environ
        | mlflow_stores.ENVIRONMENT
        | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        eventually(lambda: answers(f"http://127.0.0.1:{port}/health"))
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.slow
def test_a_tracking_server_holds_the_runs_and_the_artifacts(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sweep, ledger = opened(place)
    finish(ledger, sweep.points[:4])
    local = mlflow_stores.tracking_uri(ledger)
    Mirror(sweep, ledger).sync()
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    now = [0.0]
    mirror = Mirror(sweep, ledger, clock=lambda: now[0])
    with server(place, port):
        assert mirror.sync() == 4
        assert content(uri) == content(local)
        client, parent = MlflowClient(uri), parent_of(uri)
        names = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
        assert names == {"rates.yaml", "table.md", "table.html", "table.csv"}
        assert parent.info.artifact_uri.startswith("mlflow-artifacts:")
    finish(ledger, sweep.points[4:])
    assert mirror.sync() == 0
    assert len(caplog.records) == 1
    with server(place, port):
        now[0] += mlflow_runs.BACKOFF
        assert mirror.sync() == 4
        assert children(uri).keys() == {point.trial_id for point in sweep.points}
    assert os.listdir() == []


@contextmanager
def user_interface(place: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process in `serve_ui`, and the page of the sweep that it told of."""
    code = """
        import sys
        from sweep.mirrors import mlflow_ui
        from sweep.ledger.ledger import Ledger
        ledger, port = Ledger(sys.argv[1]), int(sys.argv[2])
        mlflow_ui.serve_ui(ledger, port, ready=lambda text: print(text, flush=True))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(place / "results")]
    with subprocess.Popen([*command, str(free_port())], stdout=subprocess.PIPE, text=True) as ui:
        assert ui.stdout is not None
        address, page = ui.stdout.readline().strip(), ui.stdout.readline().strip()
        assert page.startswith(f"rates: {address}/#/experiments/")
        try:
            yield ui, page.removeprefix("rates: ")
        finally:
            ui.terminate()
            ui.wait(300)


@pytest.mark.slow
@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_the_ui_serves_until_it_is_interrupted_and_leaves_no_process(
    place: Path, signal_: signal.Signals
) -> None:
    Mirror(*opened(place)).prepare()
    with user_interface(place) as (ui, page):
        served = psutil.Process(ui.pid).children(recursive=True)
        with urllib.request.urlopen(page, timeout=120) as reply:
            assert b"MLflow" in reply.read()
        ui.send_signal(signal_)
        assert ui.wait(300) == 0
    assert served
    eventually(lambda: not any(process.is_running() for process in served), 10)


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_shows_the_sweep_folded_over_its_trials(place: Path, chromium: Browser) -> None:
    sweep, ledger = opened(place)
    finish(ledger, sweep.points)
    Mirror(sweep, ledger).sync()
    with user_interface(place) as (_, page):
        tab = chromium.new_page(viewport={"width": 2400, "height": 1100})
        tab.goto(page)
        tab.get_by_text("9 matching runs").wait_for(timeout=120_000)
        tab.get_by_text("rates", exact=True).first.wait_for()
        shown = tab.content()
        heads = {head.strip() for head in tab.get_by_role("columnheader").all_inner_texts()}
        tab.close()

    assert sweep.points[0].label not in shown, "not folded"
    assert {"axis.task", "axis.learning_rate", "axis.seed", "test_accuracy"} <= heads
    assert "Dataset" not in heads, "MLflow's own choice of columns"


def test_the_view_has_the_axes_and_the_tables_figures_as_columns(place: Path) -> None:
    sweep, ledger = opened(place)
    Mirror(sweep, ledger).prepare()
    client = MlflowClient(f"sqlite:///{place}/results/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'fpt-sweep/rates'")
    view = json.loads(experiment.tags["mlflow.sharedViewState.fpt-sweep"])
    axes = [f"tags.`axis.{name}`" for name in ("task", "learning_rate", "seed")]
    assert view == {"selectedColumns": [*axes, "metrics.`test_accuracy`"]}


def snapshot(uri: str, ledger: Ledger) -> dict[str, Any]:
    """All that MLflow holds of a ledger."""
    return {
        run.info.run_id: (run.info.status, run.info.lifecycle_stage, run.data.to_dictionary())
        for run in runs(uri)
        if run.data.tags[LEDGER] == ledger.identity()
    }


def test_ledgers_that_share_a_server_and_a_name_leave_each_other_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"sqlite:///{place}/results/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    sweep, one = opened(place)
    other = Ledger(place / "other", write=True)
    assert one.identity() == Ledger(one.uri).identity() != other.identity()
    finish(one, sweep.points[:3])
    finish(other, sweep.points[1:])
    with caplog.at_level(logging.WARNING):
        assert Mirror(sweep, one).sync() == 3
        assert "another ledger" not in caplog.text
        assert Mirror(sweep, other).sync() == 7
        assert "has runs of another ledger's sweep of this name" in caplog.text

    before = snapshot(uri, one)
    assert len(before) == 4
    assert len(snapshot(uri, other)) == 8
    assert catch_up(sweep, other, rebuild=True) == 7
    assert snapshot(uri, one) == before
    theirs = snapshot(uri, other)
    assert len(theirs) == 8
    assert catch_up(sweep, one, rebuild=True) == 3
    assert snapshot(uri, other) == theirs
    parents = [run for run in runs(uri) if TRIAL not in run.data.tags]
    assert len(parents) == 2
    for run in runs(uri):
        if TRIAL in run.data.tags:
            (parent,) = [one for one in parents if one.info.run_id == run.data.tags[PARENT]]
            assert parent.data.tags[LEDGER] == run.data.tags[LEDGER]


def test_a_failed_trial_is_a_failed_run_until_it_is_done(place: Path) -> None:
    sweep, ledger = opened(place)
    uri = mlflow_stores.tracking_uri(ledger)
    failed, *others = sweep.points
    finish(ledger, others)
    said = "no \x1b[31msuch file"
    ledger.fail(failure_row(failed, attempt="a1", cause="data", message=said, at=START))
    mirror = Mirror(sweep, ledger)
    mirror.sync()

    run = children(uri)[failed.trial_id]
    assert run.info.status == "FAILED"
    assert run.info.run_name == failed.label
    tags = run.data.tags
    assert (tags["cause"], tags["exception"]) == ("data", "OverflowError")
    assert tags["message"] == r"no \x1b[31msuch file"
    assert tags["axis.seed"] == failed.labels["seed"]
    assert parent_of(uri).info.status == "FAILED"
    assert "7 of 8 trials are done, 1 failed." in parent_of(uri).data.tags[NOTE]

    # Another attempt fails, and another mirror finds the run that is there.
    ledger.fail(failure_row(failed, attempt="a2", cause="code", at=START + timedelta(hours=1)))
    Mirror(sweep, ledger).sync()
    again = children(uri)[failed.trial_id]
    assert (again.info.run_id, again.data.tags["cause"]) == (run.info.run_id, "code")

    finish(ledger, [failed])
    assert mirror.sync() == 1
    done = children(uri)[failed.trial_id]
    assert (done.info.run_id, done.info.status) == (run.info.run_id, "FINISHED")
    assert done.data.tags["outcome"] == "done"
    assert not {"cause", "exception", "message", mlflow_stores.FAILURE} & done.data.tags.keys()
    assert done.data.metrics["test_accuracy"] == 0.5
    assert parent_of(uri).info.status == "FINISHED"


@pytest.mark.parametrize("theirs", ["before\n\n{}\n\nafter", "all *mine*", ""])
def test_what_a_person_wrote_in_a_description_stays(place: Path, theirs: str) -> None:
    sweep, ledger = opened(place)
    uri = mlflow_stores.tracking_uri(ledger)
    finish(ledger, sweep.points[:2])
    Mirror(sweep, ledger).sync()
    parent = parent_of(uri)
    written = theirs.replace("{}", parent.data.tags[NOTE])
    MlflowClient(uri).set_tag(parent.info.run_id, NOTE, written)

    finish(ledger, sweep.points[2:3])
    Mirror(sweep, ledger).sync()
    after = parent_of(uri).data.tags[NOTE]
    catch_up(sweep, ledger, rebuild=True)

    for text in (after, parent_of(uri).data.tags[NOTE]):
        assert text.count("3 of 8 trials are done") == 1
        assert "2 of 8" not in text
        for part in theirs.split("{}"):
            assert part.strip() in text
    assert after.startswith(theirs.partition("{}")[0].strip())


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_whoever_may_write_to_the_folder_may_mirror_there(
    tmp_path: Path, umask: int, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.store.db.utils

    def quick(engine: Any) -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql("CREATE TABLE t (a)")

    monkeypatch.setattr(mlflow.store.db.utils, "_initialize_tables", quick)
    before = os.umask(umask)
    try:
        (tmp_path / "results").mkdir()
        mlflow_stores._make_tables(tmp_path / "results/mlflow.db")
    finally:
        os.umask(before)
    assert (tmp_path / "results/mlflow.db").stat().st_mode & 0o777 == mode
