"""MLflow's stores: where the runs of a ledger lie, and how they are found, added and deleted there.

A tracking server is asked through MLflow's client, a few runs at a time. A database is one of
MLflow's making, whose revision MLflow checks when it opens it. Whole runs go into it by the
hundred, in one transaction and through MLflow's own mapped tables, as `mlflow migrate-filestore`
writes them: by the client a run costs six transactions and ten times the processor.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fpt.files import cache_folder
from sweep.ledger.errors import without_password
from sweep.ledger.ledger import Ledger

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from sqlalchemy.orm import Session

PREFIX = "fpt-sweep/"
"""What the name of a sweep's experiment begins with."""
SWEEP, TRIAL = "fpt_sweep.sweep", "fpt_sweep.trial_id"
"""The tags by which a run is found. The parent has no trial."""
LEDGER = "fpt_sweep.ledger"
"""Likewise: which ledger a run is of."""
FAILURE = "fpt_sweep.failure"
"""The tag of a run FAILED: the attempt that it describes."""
STATE = "fpt_sweep.state"
"""The parent's tag by which an outdated description is known."""
ARTIFACTS = "fpt_sweep.artifacts"
"""Likewise of its claims, figures and report, which take seconds to make."""
PARENT = "mlflow.parentRunId"
"""The tag by which MLflow's UI folds children under a parent."""
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""An experiment's tag: the UI shows runs and curves, not traces of a language-model application."""

VIEW = "fpt-sweep"
"""The key of the experiment's shared view, in which the columns are chosen."""
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
"""The experiment's tag by which MLflow's UI finds that view."""


# MLflow reads these whenever it needs them; what the user has set stands. It would otherwise report
# usage, log migrations and tracebacks, print two lines a run, and retry for minutes with the
# sweep's end waiting for it, where a later sync does as well.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class MirrorError(Exception):
    """MLflow cannot do what was asked for; the message is for people."""


def tracking_uri(ledger: Ledger) -> str:
    """Return where MLflow keeps the runs: MLFLOW_TRACKING_URI, or an SQLite file of ours.

    The file is `mlflow.db` in the ledger's folder. SQLite needs a disk, so that for a ledger on
    object storage it lies in this machine's cache.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    return _sqlite(home(ledger) / "mlflow.db")


def _sqlite(database: Path) -> str:
    # SQLAlchemy decodes the path of a URI.
    return "sqlite:///" + str(database).replace("%", "%25").replace("?", "%3F")


def where(ledger: Ledger) -> str:
    """Return where the runs lie, for people: a path or a URI, without a password."""
    uri = tracking_uri(ledger)
    return str(home(ledger) / "mlflow.db") if is_ours() else without_password(uri)


def is_ours() -> bool:
    """Whether the runs lie in a file of ours, and not where MLFLOW_TRACKING_URI says."""
    return not os.environ.get("MLFLOW_TRACKING_URI")


def is_server(uri: str) -> bool:
    """Whether a URI names a tracking server, and not a database."""
    return uri.startswith(("http:", "https:", "databricks"))


def home(ledger: Ledger) -> Path:
    """Return the local folder for MLflow's files."""
    if ledger.local is not None:
        return ledger.local.absolute()
    return cache_folder() / "mlflow" / re.sub(r"[^A-Za-z0-9._-]+", "-", ledger.uri)


def artifacts_folder(ledger: Ledger) -> Path:
    """Return the local folder for MLflow's artifacts."""
    return home(ledger) / "mlflow-artifacts"


# ----------------------------------------------------------------------------------------- the runs


class Found(NamedTuple):
    """A run that a store has."""

    run_id: str
    status: str
    """Of MLflow's: RUNNING, FINISHED, FAILED."""
    end_time: int | None
    """Milliseconds since 1970."""
    tags: Mapping[str, str]
    """Of all its tags at least those of `TAGS`."""


class Child(NamedTuple):
    """The run of a finished trial, as MLflow is to have it."""

    trial: str
    name: str
    start: int
    """Milliseconds since 1970."""
    end: int
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Sequence[Metric]


TAGS = (SWEEP, LEDGER, TRIAL, FAILURE, STATE, ARTIFACTS, PARENT)
"""The tags that are read."""

AT_ONCE = 8
"""Runs that are written to a server at a time: it answers several, each by its own process."""
CACHE_KIB = 64 * 1024
"""SQLite's cache while runs are added; its own 2 MiB are less than the indexes of 1,000 runs."""
SQLITE_SECONDS = 20
"""How long SQLite waits for another writer; so does MLflow."""


class Store:
    """An experiment of an MLflow that is spoken to by its client."""

    def __init__(self, client: MlflowClient, experiment: str) -> None:
        """Take a client and the id of an experiment."""
        self.client = client
        self.experiment = experiment

    def runs(self, sweep: str, ledger: str) -> Iterator[Found]:
        """Yield all runs of a sweep of a ledger (its identity), the parent too."""
        wanted = f"tags.`{SWEEP}` = '{sweep}' AND tags.`{LEDGER}` = '{ledger}'"
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment], wanted, max_results=1000, page_token=token
            )
            for run in page:
                yield Found(run.info.run_id, run.info.status, run.info.end_time, run.data.tags)
            token = page.token
            if not token:
                return

    def add(self, children: Iterable[Child]) -> Iterator[Child]:
        """Create runs, and yield those which are whole.

        A run that was begun when this process ends is RUNNING, since its end is written last.
        """
        pending: set[Future[Child]] = set()
        with ThreadPoolExecutor(AT_ONCE, "mlflow") as pool:
            for child in children:
                pending.add(pool.submit(self._create, child))
                if len(pending) == AT_ONCE:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from [one.result() for one in done]
            yield from (one.result() for one in as_completed(pending))

    def _create(self, child: Child) -> Child:
        run = self.client.create_run(
            self.experiment, start_time=child.start, tags=dict(child.tags), run_name=child.name
        )
        self.complete(run.info.run_id, child, ())
        return child

    def complete(self, run_id: str, child: Child, there: Iterable[str]) -> None:
        """Give a run its metrics, params and end.

        Args:
            run_id: The run, which has its tags.
            child: What it is to have.
            there: Names of params that it has already; a param cannot be changed.
        """
        from mlflow.entities import Param

        params = [Param(*one) for one in child.params.items() if one[0] not in there]
        self.client.log_batch(run_id, child.metrics, params, synchronous=True)
        # A diverged trial has FINISHED too: it is a finding (see its tag `outcome`), and FAILED
        # would ask people to run it again.
        self.client.set_terminated(run_id, "FINISHED", child.end)

    def delete(self, run_ids: Iterable[str]) -> None:
        """Move runs to MLflow's trash."""
        for run_id in run_ids:
            self.client.delete_run(run_id)


class Database(Store):
    """An experiment in a database of MLflow's."""

    def runs(self, sweep: str, ledger: str) -> Iterator[Found]:
        """Yield all runs of a sweep of a ledger (its identity), the parent too."""
        from mlflow.store.tracking.dbmodels.models import SqlRun, SqlTag
        from sqlalchemy import select

        here = (SqlRun.experiment_id == int(self.experiment), SqlRun.lifecycle_stage == "active")
        with self._session() as session:
            runs: Sequence[Any] = session.execute(
                select(SqlRun.run_uuid, SqlRun.status, SqlRun.end_time).where(*here)
            ).all()
            read: Sequence[Any] = session.execute(
                select(SqlTag.run_uuid, SqlTag.key, SqlTag.value)
                .join(SqlRun, SqlRun.run_uuid == SqlTag.run_uuid)
                .where(*here, SqlTag.key.in_(TAGS))
            ).all()
        tags: dict[str, dict[str, str]] = {}
        for run_id, key, value in read:
            tags.setdefault(run_id, {})[key] = value
        for run_id, status, end_time in runs:
            own = tags.get(run_id, {})
            if (own.get(SWEEP), own.get(LEDGER)) == (sweep, ledger):
                yield Found(run_id, status, end_time, own)

    def add(self, children: Iterable[Child]) -> Iterator[Child]:
        """Create runs, all of them or none, and yield them."""
        from mlflow.store.tracking.dbmodels import models
        from sqlalchemy import insert

        added = list(children)
        if not added:
            return
        location = self.client.get_experiment(self.experiment).artifact_location
        rows: dict[Any, list[dict[str, Any]]] = {
            table: []
            for table in (
                models.SqlRun, models.SqlTag, models.SqlParam, models.SqlMetric,
                models.SqlLatestMetric,
            )
        }  # fmt: skip
        for child in added:
            for table, made in zip(rows.values(), self._rows(child, location), strict=True):
                table.extend(made)
        with self._session() as session:
            for table, made in rows.items():
                if made:
                    session.execute(insert(table.__table__), made)
            session.commit()
            if session.get_bind().dialect.name == "sqlite":
                # Without these figures it looks through all runs for each, to sort by a metric.
                session.connection().exec_driver_sql("PRAGMA analysis_limit = 1000")
                session.connection().exec_driver_sql("ANALYZE")
                session.commit()
        yield from added

    def _rows(self, child: Child, location: str) -> tuple[Iterable[dict[str, Any]], ...]:
        """Return a run's rows: of runs, tags, params, metrics and latest metrics."""
        from mlflow.entities import Param, RunTag
        from mlflow.utils.uri import append_to_uri_path
        from mlflow.utils.validation import _validate_batch_log_data

        # Ids that begin with the time go to the end of the indexes; what is random in them is as in
        # any of MLflow's.
        run_id = f"{time.time_ns() // 1_000_000:012x}{uuid.uuid4().hex[12:]}"
        metrics, params, tags = _validate_batch_log_data(  # type: ignore[no-untyped-call]
            child.metrics,
            [Param(*one) for one in child.params.items()],
            [RunTag(*one) for one in {**child.tags, "mlflow.runName": child.name}.items()],
        )
        artifacts = append_to_uri_path(location, run_id, "artifacts")  # type: ignore[no-untyped-call]
        run = {
            "run_uuid": run_id, "name": child.name, "experiment_id": int(self.experiment),
            "source_type": "UNKNOWN", "source_name": "", "entry_point_name": "",
            "source_version": "", "user_id": "unknown", "status": "FINISHED",
            "start_time": child.start, "end_time": child.end, "lifecycle_stage": "active",
            "artifact_uri": artifacts,
        }  # fmt: skip
        values = {
            (one.key, one.step, one.timestamp, one.value): {
                "run_uuid": run_id, "key": one.key, "value": one.value, "step": one.step,
                "timestamp": one.timestamp, "is_nan": False,
            }
            for one in metrics
        }  # fmt: skip
        # The latest is that of the highest step, time and value, in this order.
        latest = {values[identity]["key"]: values[identity] for identity in sorted(values)}
        texts = [
            [{"run_uuid": run_id, "key": one.key, "value": one.value} for one in some]
            for some in (tags, params)
        ]
        return [run], *texts, values.values(), latest.values()

    def delete(self, run_ids: Iterable[str]) -> None:
        """Move runs to MLflow's trash."""
        from mlflow.store.tracking.dbmodels.models import SqlRun
        from sqlalchemy import update

        now = time.time_ns() // 1_000_000
        doomed = [{"run_uuid": run_id} for run_id in run_ids]
        if not doomed:
            return
        with self._session() as session:
            session.execute(
                update(SqlRun),
                [one | {"lifecycle_stage": "deleted", "deleted_time": now} for one in doomed],
            )
            session.commit()

    @contextmanager
    def _session(self) -> Iterator[Session]:
        import sqlalchemy
        from sqlalchemy.orm import Session

        uri = self.client.tracking_uri
        lite = uri.startswith("sqlite")
        engine = sqlalchemy.create_engine(
            uri, connect_args={"timeout": SQLITE_SECONDS} if lite else {}
        )
        try:
            with Session(engine) as session:
                if lite:
                    session.connection().exec_driver_sql(f"PRAGMA cache_size = -{CACHE_KIB}")
                yield session
        finally:
            engine.dispose()


# -------------------------------------------------------------------------------------- connecting


def connect(ledger: Ledger, sweep: str) -> Store:
    """Return the store with a sweep's runs: it answers, its tables and the experiment are there."""
    client = _client(ledger)
    kind = Store if is_server(tracking_uri(ledger)) else Database
    return kind(client, _experiment(client, sweep, ledger))


def _client(ledger: Ledger) -> MlflowClient:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    uri = tracking_uri(ledger)
    if is_server(uri):
        return MlflowClient(uri, uri)
    # The first to open a database makes its tables. Several at once, each with a sweep of its own,
    # would spoil that.
    home(ledger).mkdir(parents=True, exist_ok=True)
    while (lease := ledger.lease("mlflow")) is None:
        time.sleep(0.1)
    with lease:
        import sqlalchemy

        if is_ours():
            _make_tables(home(ledger) / "mlflow.db")
        # MLflow asks a database that does not answer ten times, over two minutes; this asks once.
        engine = sqlalchemy.create_engine(uri)
        engine.connect().close()
        engine.dispose()
        return MlflowClient(uri, uri)


def _make_tables(database: Path) -> None:
    """MLflow's tables, in a file that gets its name once it is whole: where MLflow is killed half
    way, it never completes what it finds.
    """
    if database.exists() and database.stat().st_size:
        return
    import sqlalchemy
    from mlflow.store.db.utils import _initialize_tables

    aside = database.with_suffix(".new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    engine = sqlalchemy.create_engine(_sqlite(aside / database.name))
    _initialize_tables(engine)  # type: ignore[no-untyped-call]
    engine.dispose()
    # SQLite makes files of 0644 whatever the umask: who may write to the folder mirrors here too.
    (aside / database.name).chmod(database.parent.stat().st_mode & 0o666)
    (aside / database.name).replace(database)
    aside.rmdir()


def _experiment(client: MlflowClient, sweep: str, ledger: Ledger) -> str:
    """Return the id of a sweep's experiment, created unless it is there."""
    from mlflow.exceptions import MlflowException

    name = f"{PREFIX}{sweep}"
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # A server chooses where artifacts lie. With none, MLflow would choose ./mlruns.
        location = None if is_server(client.tracking_uri) else artifacts_folder(ledger).as_uri()
        with contextlib.suppress(MlflowException):  # another ledger's mirror was quicker
            return str(client.create_experiment(name, location, {SWEEP: sweep, **KIND}))
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            return str(client.create_experiment(name, location, {SWEEP: sweep, **KIND}))
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)
