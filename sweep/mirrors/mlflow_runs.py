"""The mirror: what the ledger holds of a sweep, as MLflow runs. The only file with MLflow.

A sweep is an experiment `fpt-sweep/NAME` with one parent run, and a finished trial of the sweep is
one child run of it. The mirror reads the ledger and writes MLflow, never the other way round:
nothing is read from MLflow but which children are there. So it may fail, be killed or be deleted,
and cost no trial; the next `Mirror.sync` catches up, and `rebuild` makes it all again.

Each (sweep, trial) of a ledger is mirrored exactly once. Runs are found by their tags
`fpt_sweep.sweep`, `fpt_sweep.ledger` and `fpt_sweep.trial_id`: several ledgers may share a server
and the name of a sweep, and none ever changes a run of another's. A trial that failed is a run
FAILED, with its cause, until it is done. One process at a time writes, by a lease of the ledger;
and a child is terminated last, so that one which was left RUNNING is completed rather than made
again. Whatever is written is a function of the ledger and the sweep file, timestamps included:
writing it twice changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpt.files import cache_folder
from fpt.printable import printable
from sweep.analysis import tables
from sweep.ledger.columns import METRICS, in_mlflow
from sweep.ledger.errors import in_one_line, without_password
from sweep.ledger.ledger import Ledger, LedgerError
from sweep.planning.tuning import resolve
from sweep.sweepfile.expansion import load
from sweep.sweepfile.schema import SweepFileError
from sweep.sweepfile.trials import Sweep

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

    from sweep.ledger.ledger import Lease

Row = Mapping[str, Any]
"""A row of the ledger: a trial's, or a record of its curve."""

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

NESTED = {"task_parameters": "task", "optimizer": "optimizer", "stop": "stop"}
"""Columns that hold JSON objects -> what the names of their params begin with."""

BATCH = 200
"""Trials whose rows and curves are held in memory at a time."""
NOTE_LIMIT = 8000
"""Characters of a tag's value, and so of the description of a run."""
NOTE = "mlflow.note.content"
"""The tag that holds a run's description."""
BEGIN, END = "<!-- fpt-sweep writes from here -->", "<!-- to here; the rest is yours -->"
"""Around our part of a description."""
BACKOFF, LONGEST_BACKOFF = 5.0, 300.0
"""Seconds without a further try after a fault: at first, and at most."""

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

log = logging.getLogger(__name__)


class MirrorError(Exception):
    """MLflow cannot do what was asked for; the message is for people."""


# ------------------------------------------------------------------------------- where the runs lie


def tracking_uri(ledger: Ledger) -> str:
    """Return where MLflow keeps the runs: MLFLOW_TRACKING_URI, or an SQLite file of ours.

    The file is `mlflow.db` in the ledger's folder. SQLite needs a disk, so that for a ledger on
    object storage it lies in this machine's cache.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    return _sqlite(_home(ledger) / "mlflow.db")


def _sqlite(database: Path) -> str:
    # SQLAlchemy decodes the path of a URI.
    return "sqlite:///" + str(database).replace("%", "%25").replace("?", "%3F")


def where(ledger: Ledger) -> str:
    """Return where the runs lie, for people: a path or a URI, without a password."""
    uri = tracking_uri(ledger)
    return str(_home(ledger) / "mlflow.db") if _is_ours() else without_password(uri)


def _is_ours() -> bool:
    return not os.environ.get("MLFLOW_TRACKING_URI")


def _is_server(uri: str) -> bool:
    return uri.startswith(("http:", "https:", "databricks"))


def _home(ledger: Ledger) -> Path:
    """Return the local folder for MLflow's files."""
    if ledger.local is not None:
        return ledger.local.absolute()
    return cache_folder() / "mlflow" / re.sub(r"[^A-Za-z0-9._-]+", "-", ledger.uri)


def _artifacts(ledger: Ledger) -> Path:
    return _home(ledger) / "mlflow-artifacts"


# --------------------------------------------------------------------------------------- the mirror


class Mirror:
    """Mirrors one sweep. Its methods never raise for a fault of MLflow's: they log one line, and
    try again later. They may be called from any thread.
    """

    def __init__(
        self,
        sweep: Sweep,
        ledger: Ledger,
        *,
        makers: Mapping[str, Maker] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take a sweep.

        Args:
            sweep: It, or a part of it.
            ledger: Where its rows are.
            makers: What makes artifacts of the parent run at the end, by name. Default: `MAKERS`.
            clock: Gives the time, in seconds.
        """
        # A run may be of a part of the file; its parent run stands for all of it.
        sweep = _whole(sweep)
        self.sweep = sweep
        self.ledger = ledger
        self._points = {point.trial_id: point for point in sweep.all}
        self._pretrainings = {
            point.trial_id: point.labels.get("backbone", point.label)
            for point in sweep.pretrainings
        }
        self._busy = threading.Lock()
        self._makers = MAKERS if makers is None else makers
        self._clock = clock
        self._wait_until = self._backoff = 0.0
        # What MLflow held when the lease was last ours; of no use once somebody else had it.
        self._epoch: int | None = None
        self._told_others = False
        self._client: MlflowClient
        self._experiment = self._parent = self._described = self._attached = ""
        self._failed: dict[str, str] = {}
        """Trial -> the failed attempt that its run describes."""
        self._open: dict[str, Run] = {}
        self._ended: dict[str, int] = {}

    @property
    def command(self) -> str:
        """The command that catches up, as it is typed in this folder."""
        default = self.ledger.uri == Ledger("results").uri
        where = "" if default else f" --results {shlex.quote(self.ledger.uri)}"
        return f"sweep mirror {shlex.quote(str(self.sweep.file))}{where}"

    def prepare(self) -> bool:
        """Create database, experiment and parent run; True if that succeeded.

        To be called before the workers start: the first use of an SQLite file takes seconds, and
        several processes at it at once would race.
        """
        return self._guarded(self._leased(set())) is not None

    def sync(self, *, complete: bool = False, ended: Collection[str] | None = None) -> int:
        """Mirror the finished trials of the sweep that are not mirrored yet; returns how many.

        Does nothing while another process mirrors this sweep, and for a while after a fault.

        Args:
            complete: Also make claims, figures and report anew if there is something new to them.
                That takes seconds, and is for the end of a run.
            ended: Trials that are known to have ended; the ledger is not asked for others. Default:
                all that the ledger has.
        """
        return self._guarded(self._catch_up(complete=complete, ended=ended)) or 0

    def _guarded(self, work: Iterator[str]) -> int | None:
        # How many trials `work` mirrored; None if it met a fault before the first.
        with self._busy:
            if self._clock() < self._wait_until:
                return None
            count = 0
            try:
                for _ in work:
                    count += 1
            except Exception as error:
                # Of any kind: MLflow lets through what requests, SQLAlchemy and the system raise.
                self._backoff = min(max(BACKOFF, 2 * self._backoff), LONGEST_BACKOFF)
                self._wait_until = self._clock() + self._backoff
                self._epoch = None
                log.warning(
                    "MLflow mirror (%s): %s; no result is lost, the next try is in %.0f s or later"
                    "; `%s` catches up",
                    where(self.ledger), in_one_line(error), self._backoff, self.command,
                )  # fmt: skip
                log.debug("MLflow mirror", exc_info=True)
                return count or None
            self._wait_until = self._backoff = 0.0
            return count

    def _catch_up(self, *, complete: bool, ended: Collection[str] | None) -> Iterator[str]:
        finished = self._finished(ended)
        # While a run follows its own trials, their failures may be tried again: they are looked for
        # at its end.
        failed = self._failures() if ended is None or complete else self._failed
        made = (self._described, self._attached) if complete else (self._described,)
        stale = any(one != self._state() for one in made)
        fresh = finished - self._ended.keys() or failed.items() - self._failed.items()
        if self._epoch is None or fresh or stale:
            yield from self._leased(finished, complete=complete)

    def _finished(self, ended: Collection[str] | None = None) -> set[str]:
        if self.sweep.studies:
            # Trials become known while the sweep runs.
            self.sweep = resolve(self.sweep, self.ledger)
            self._points = {point.trial_id: point for point in self.sweep.all}
        return self._points.keys() & (self.ledger.done() if ended is None else ended)

    def _failures(self) -> dict[str, str]:
        """Trial -> its last failed attempt, of those that have not ended nor may try again."""
        last = self.ledger.last_failures(self._points.keys())
        done = self.ledger.done()
        return {name: str(row["at"]) for name, row in last.items() if name not in done}

    def _leased(self, finished: set[str], *, complete: bool = False) -> Iterator[str]:
        lease = self.ledger.lease(_lease_name(self.sweep))
        if lease is not None:
            with lease:
                yield from self._write(lease, finished, complete=complete)

    def _write(self, lease: Lease, finished: set[str], *, complete: bool = False) -> Iterator[str]:
        """Under the lease: mirror those of the finished trials that are not; yields their ids."""
        if self._epoch is None or lease.epoch != self._epoch + 1:
            self._take_stock()
        self._epoch = lease.epoch
        missing = sorted(finished - self._ended.keys())
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            for row, curve in self._read(batch):
                if not lease.held:
                    # This process stood still for too long, and somebody else may have it.
                    self._epoch = None
                    return
                self._child(row, curve)
                yield row["trial_id"]
        done = self.ledger.done()
        for trial, failure in self.ledger.last_failures(self._points.keys()).items():
            if trial in done or self._failed.get(trial) == str(failure["at"]):
                continue
            if not lease.held:
                self._epoch = None
                return
            self._fail(trial, failure)
        if self._described != self._state():
            self._describe()
        if complete and self._attached != self._state() and lease.held:
            self._attach()

    def _take_stock(self) -> None:
        """Find experiment and runs, and create the experiment and the parent if they are not there.

        Of several runs of one trial one is kept, a complete one if there is any: two can come about
        if a process stood still for longer than its lease.
        """
        client = self._client = _connect(self.ledger)
        self._experiment = _experiment(client, self.sweep.name, self.ledger)
        client.set_experiment_tag(self._experiment, VIEW_TAG, self._view())
        self._tell_others()
        found: dict[str, list[Run]] = {}
        for run in _runs(client, self._experiment, self.sweep.name, self.ledger):
            found.setdefault(run.data.tags.get(TRIAL, ""), []).append(run)
        runs = {}
        for trial, same in found.items():
            runs[trial], *surplus = sorted(same, key=lambda r: (_is_open(r), r.info.run_id))
            for run in surplus:
                client.delete_run(run.info.run_id)
        parent = runs.pop("", None)
        if parent is None:
            rows = self.ledger.trials(self._finished(), columns=["started_at"])
            parent = client.create_run(
                self._experiment,
                start_time=min(map(_milliseconds, rows["started_at"].to_pylist()), default=None),
                tags={
                    SWEEP: self.sweep.name,
                    LEDGER: self.ledger.identity(),
                    "mlflow.source.name": printable(self.sweep.file.name),
                },
                run_name=self.sweep.name,
            )
        self._parent = parent.info.run_id
        self._described = parent.data.tags.get(STATE, "")
        self._attached = parent.data.tags.get(ARTIFACTS, "")
        for run in runs.values():
            if run.data.tags.get(PARENT) != self._parent:
                client.set_tag(run.info.run_id, PARENT, self._parent)
        self._open = {trial: run for trial, run in runs.items() if _is_open(run)}
        self._ended = {trial: run.info.end_time for trial, run in runs.items() if not _is_open(run)}
        tags = {trial: run.data.tags.get(FAILURE, "") for trial, run in self._open.items()}
        self._failed = {trial: told for trial, told in tags.items() if told}

    def _view(self) -> str:
        """Return the view that `sweep ui` opens: the sweep's axes and its figure as columns."""
        shown = self.sweep.table.metrics if self.sweep.table is not None else ()
        figures = [name for name in shown if name in in_mlflow("metric")] or ["test_accuracy"]
        columns = [f"tags.`axis.{name}`" for name in self.sweep.axes]
        columns += [f"metrics.`{name}`" for name in figures]
        return json.dumps({"selectedColumns": columns})

    def _tell_others(self) -> None:
        """Warn, once, of runs of another ledger in the same experiment."""
        if self._told_others:
            return
        others = self._client.search_runs(
            [self._experiment],
            f"tags.`{SWEEP}` = '{self.sweep.name}' AND tags.`{LEDGER}` != "
            f"'{self.ledger.identity()}'",
            max_results=1,
        )
        if others:
            self._told_others = True
            log.warning(
                "MLflow mirror (%s): experiment %s%s has runs of another ledger's sweep of this "
                "name too; they stay as they are, and this ledger has a parent run of its own",
                where(self.ledger), PREFIX, self.sweep.name,
            )  # fmt: skip

    def _read(self, ids: Sequence[str]) -> Iterator[tuple[Row, list[Row]]]:
        """Rows of trials, each with its curve."""
        curves: dict[str, list[Row]] = {trial: [] for trial in ids}
        for record in self.ledger.curves(ids).to_pylist():
            curves[record["trial_id"]].append(record)
        for row in self.ledger.trials(ids).to_pylist():
            yield row, curves[row["trial_id"]]

    def _child(self, row: Row, curve: Iterable[Row]) -> None:
        """Create the run of a finished trial, or complete the one that was begun."""
        from mlflow.entities import Param, RunTag

        client, trial = self._client, row["trial_id"]
        run = self._open.pop(trial, None)
        if run is not None and self._failed.pop(trial, ""):
            # It failed before, and says so no longer.
            for name in (*_FAILURE_TAGS, FAILURE):
                if name in run.data.tags:
                    client.delete_tag(run.info.run_id, name)
            tags = [RunTag(name, value) for name, value in self._tags(row).items()]
            client.log_batch(run.info.run_id, tags=tags, synchronous=True)
        run = run or client.create_run(
            self._experiment,
            start_time=_milliseconds(row["started_at"]),
            tags=self._tags(row),
            run_name=printable(self._points[trial].label),
        )
        # A param cannot be changed: of a run that was begun, those that are there stay.
        params = [
            Param(name, value)
            for name, value in self._params(row).items()
            if name not in run.data.params
        ]
        client.log_batch(run.info.run_id, list(_metrics(row, curve)), params, synchronous=True)
        ended = _milliseconds(row["finished_at"])
        # A diverged trial has FINISHED too: it is a finding (see its tag `outcome`), and FAILED
        # would ask people to run it again.
        client.set_terminated(run.info.run_id, "FINISHED", ended)
        self._ended[trial] = ended

    def _fail(self, trial: str, failure: Row) -> None:
        """Create or renew the run of a trial whose last attempt failed."""
        from mlflow.entities import RunTag

        client, at = self._client, _milliseconds(failure["at"])
        told = {name: failure[name] for name in _FAILURE_TAGS}
        own = _written(told | {"outcome": "failed", FAILURE: str(failure["at"])})
        tags = self._common_tags(trial) | {name: text[:NOTE_LIMIT] for name, text in own.items()}
        run = self._open.get(trial)
        if run is None:
            name = printable(self._points[trial].label)
            run = client.create_run(self._experiment, start_time=at, tags=tags, run_name=name)
        else:
            wanted = [RunTag(name, value) for name, value in tags.items()]
            client.log_batch(run.info.run_id, tags=wanted, synchronous=True)
        client.set_terminated(run.info.run_id, "FAILED", at)
        self._open[trial], self._failed[trial] = client.get_run(run.info.run_id), own[FAILURE]

    def _pretraining(self, row: Row) -> str:
        """By name where the sweep file names it, and not as trial:ID."""
        pretraining = str(row["pretraining"])
        return self._pretrainings.get(pretraining.removeprefix("trial:"), pretraining)

    def _params(self, row: Row) -> dict[str, str]:
        values = {name: row[name] for name in in_mlflow("param")}
        values["pretraining"] = self._pretraining(row)
        for column, prefix in NESTED.items():
            fields = json.loads(row[column] or "{}") or {}
            values |= {f"{prefix}.{key}": value for key, value in fields.items() if key != "name"}
        return _written(values)

    def _common_tags(self, trial: str) -> dict[str, str]:
        """Return what the run of a trial bears, however the trial ended."""
        labels = {} if trial in self._pretrainings else self._points[trial].labels
        return _written(
            {f"axis.{axis}": label for axis, label in labels.items()}
            | {
                "trial_id": trial,
                "cell": "/".join(name for axis, name in labels.items() if axis != "seed") or None,
                SWEEP: self.sweep.name,
                LEDGER: self.ledger.identity(),
                TRIAL: trial,
                PARENT: self._parent,
                "mlflow.source.name": self.sweep.file.name,
            }
        )

    def _tags(self, row: Row) -> dict[str, str]:
        own = {name: row[name] for name in in_mlflow("tag")}
        own |= {
            "pretraining": self._pretraining(row),
            "mlflow.source.git.commit": row["git_commit"],
        }
        return self._common_tags(row["trial_id"]) | _written(own)

    def _state(self) -> str:
        """Return a digest of what the parent's description is made of."""
        done = sorted(self._ended.keys() & self._points.keys())
        failed = [f"{trial} {at}" for trial, at in sorted(self._failed.items())]
        parts = "\n".join([*self._points, "", *done, "", *failed, "", self.sweep.text])
        return hashlib.sha256(parts.encode()).hexdigest()[:12]

    def _describe(self) -> None:
        """Give the parent the sweep's text, its table and its state."""
        client, parent, state = self._client, self._parent, self._state()
        done = len(self._ended.keys() & self._points.keys())
        progress = f"{done} of {len(self._points)}"
        note = (
            f"Sweep `{self.sweep.name}` of `{self.sweep.file.name}`: {progress} trials are done"
            f"{f', {len(self._failed)} failed' if self._failed else ''}. "
            f"Ledger: `{self.ledger.uri}`."
        )
        client.log_text(parent, self.sweep.text, self.sweep.file.name)
        if self.sweep.table is not None:
            table = tables.build(self.sweep, self.ledger)
            client.log_text(parent, table.to_markdown(), "table.md")
            client.log_text(parent, table.to_html(), "table.html")
            client.log_text(parent, table.to_csv(), "table.csv")
            short, note = f"{note} Table: table.html.", f"{note}\n\n{table.to_markdown()}"
        else:
            short = note
        before = client.get_run(parent).data.tags.get(NOTE, "")
        client.set_tag(parent, NOTE, _with_ours(before, note, short))
        client.set_tag(parent, "trials", progress)
        client.set_tag(parent, "failed", str(len(self._failed)))
        if done == len(self._points):
            client.set_terminated(parent, "FINISHED", max(self._ended.values()))
        elif done + len(self._failed) == len(self._points):
            client.set_terminated(parent, "FAILED", _last(self._failed, self._ended))
        else:
            client.update_run(parent, "RUNNING")
        client.set_tag(parent, STATE, state)
        self._described = state

    def _attach(self) -> None:
        """Give the parent the sweep's claims, figures and report, as far as they can be made."""
        state, still = self._state(), self.ledger.snapshot()
        with tempfile.TemporaryDirectory(prefix="fpt-sweep-") as folder, _fonts():
            for what, make in self._makers.items():
                try:
                    make(self.sweep, still, Path(folder))
                except Exception as error:
                    # Whatever it is, the runs matter more; the command of its own tells all of it.
                    log.warning("MLflow mirror: no %s: %s", what, in_one_line(error))
                    log.debug("MLflow mirror", exc_info=True)
            self._client.log_artifacts(self._parent, folder)
        self._client.set_tag(self._parent, ARTIFACTS, state)
        self._attached = state


_FAILURE_TAGS = ("cause", "exception", "message")
# Tags of a run FAILED, besides what it has in common with others.


def _last(failed: Mapping[str, str], ended: Mapping[str, int]) -> int:
    moments = [_milliseconds(datetime.fromisoformat(at)) for at in failed.values()]
    return max([*moments, *ended.values()])


def _with_ours(note: str, ours: str, short: str) -> str:
    """Return a description with our part made anew, and all that a person wrote as it is."""
    before, begun, rest = note.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended):  # of a person's making, and nothing of ours in it
        before, after = (f"{note.rstrip()}\n\n" if note.strip() else ""), ""
    made = [f"{before}{BEGIN}\n{text}\n{END}{after}" for text in (ours, short)]
    fitting = [one for one in made if len(one) <= NOTE_LIMIT]
    return fitting[0] if fitting else note


@contextmanager
def _fonts() -> Iterator[None]:
    # matplotlib writes a list of fonts when it is first imported; a run leaves nothing in the home
    # folder.
    with tempfile.TemporaryDirectory(prefix="fpt-sweep-fonts-") as folder:
        ours = os.environ.setdefault("MPLCONFIGDIR", folder) == folder
        try:
            yield
        finally:
            if ours:
                del os.environ["MPLCONFIGDIR"]


def _claims(sweep: Sweep, ledger: Ledger, folder: Path) -> None:
    if sweep.spec.claims:
        from sweep.analysis.claims import show

        judged = show(sweep, ledger)
        (folder / "claims.md").write_text(judged.to_markdown(), encoding="utf-8")
        text = json.dumps(judged.record(), indent=2, default=str)
        (folder / "claims.json").write_text(text, encoding="utf-8")


def _figures(sweep: Sweep, ledger: Ledger, folder: Path) -> None:
    from sweep.analysis import figures

    for drawn in figures.draw(figures.gather(sweep, ledger)):
        if drawn.chart is not None:
            (folder / "figures").mkdir(exist_ok=True)
            figures.save(drawn.chart.figure, folder / "figures" / drawn.kind)


def _report(sweep: Sweep, ledger: Ledger, folder: Path) -> None:
    from sweep.analysis.report import render

    (folder / "report.html").write_text(render(sweep, ledger), encoding="utf-8")


Maker = Callable[[Sweep, Ledger, Path], None]
"""Writes files about a sweep into a folder."""

MAKERS: Mapping[str, Maker] = {"claims": _claims, "figures": _figures, "report": _report}
"""What the parent run carries at the end of a run, and what makes it."""


def _whole(sweep: Sweep) -> Sweep:
    """Return the sweep with all the trials of its file, unless the file has changed meanwhile."""
    try:
        whole = load(sweep.file)
    except SweepFileError:
        return sweep
    return whole if whole.text == sweep.text else sweep


def catch_up(
    sweep: Sweep,
    ledger: Ledger,
    *,
    rebuild: bool = False,
    mirrored: Callable[[int], None] = lambda number: None,
) -> int:
    """Mirror what is not mirrored yet, and tell of faults; returns how many trials.

    Args:
        sweep: The sweep.
        ledger: Its ledger.
        rebuild: Delete the sweep's runs first, and mirror all of it anew.
        mirrored: Called after each trial, with the number so far.

    Raises:
        LedgerError: If the ledger cannot be read.
        MirrorError: If MLflow does not do it, or another process is at it.
    """
    name = _lease_name(sweep)
    try:
        lease = ledger.lease(name)
        if lease is None:
            other = ledger.holder(name) or {}
            raise MirrorError(
                f"{sweep.name}: process {other.get('pid')} on {other.get('host')} is mirroring it; "
                "wait until it has ended"
            )
        with lease:
            if rebuild:
                client = _connect(ledger)
                experiment = _experiment(client, sweep.name, ledger)
                # A list, since a page would skip as many runs as the one before it lost. The parent
                # stays, for what people have written there, and is made anew.
                for run in list(_runs(client, experiment, sweep.name, ledger)):
                    if TRIAL in run.data.tags:
                        client.delete_run(run.info.run_id)
                    else:
                        client.set_tag(run.info.run_id, STATE, "")
                        client.set_tag(run.info.run_id, ARTIFACTS, "")
            mirror = Mirror(sweep, ledger)
            number = 0
            for number, _ in enumerate(mirror._write(lease, mirror._finished(), complete=True), 1):
                mirrored(number)
            return number
    except (LedgerError, MirrorError):
        raise
    except Exception as error:
        raise MirrorError(f"{where(ledger)}: {in_one_line(error)}") from error


def _lease_name(sweep: Sweep) -> str:
    return f"mlflow-{sweep.name}"


# ------------------------------------------------------------------------------------ MLflow's ways


def _connect(ledger: Ledger) -> MlflowClient:
    """Return a client of the store, which answers, and whose tables are there."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    uri = tracking_uri(ledger)
    if _is_server(uri):
        return MlflowClient(uri, uri)
    # The first to open a database makes its tables. Several at once, each with a sweep of its own,
    # would spoil that.
    _home(ledger).mkdir(parents=True, exist_ok=True)
    while (lease := ledger.lease("mlflow")) is None:
        time.sleep(0.1)
    with lease:
        import sqlalchemy

        if _is_ours():
            _make_tables(_home(ledger) / "mlflow.db")
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
        location = None if _is_server(client.tracking_uri) else _artifacts(ledger).as_uri()
        with contextlib.suppress(MlflowException):  # another ledger's mirror was quicker
            return str(client.create_experiment(name, location, {SWEEP: sweep, **KIND}))
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            return str(client.create_experiment(name, location, {SWEEP: sweep, **KIND}))
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def _runs(client: MlflowClient, experiment: str, sweep: str, ledger: Ledger) -> Iterator[Run]:
    """Yield all runs of a sweep of a ledger, the parent too."""
    wanted = f"tags.`{SWEEP}` = '{sweep}' AND tags.`{LEDGER}` = '{ledger.identity()}'"
    token = None
    while True:
        page = client.search_runs([experiment], wanted, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _is_open(run: Run) -> bool:
    return bool(run.info.status != "FINISHED")


def _metrics(row: Row, curve: Iterable[Row]) -> Iterator[Metric]:
    """Yield a trial's figures, at its last step, and its curve.

    What is not finite is left out: a database of MLflow's turns infinity into 1.8e308, which no
    chart survives. The tag `outcome` tells that a trial diverged.
    """
    from mlflow.entities import Metric

    start = _milliseconds(row["started_at"])
    for record in curve:
        at = start + round(1000 * (record["seconds"] or 0.0))
        found = {name: record[name] for name in ("loss", "accuracy")}
        for name, value in (found | json.loads(record[METRICS] or "{}")).items():
            if value is not None and math.isfinite(value):
                yield Metric(f"{record['split']}/{name}", value, at, record["step"])
    figures = {name: row[name] for name in in_mlflow("metric")}
    for name, value in (figures | json.loads(row[METRICS] or "{}")).items():
        if value is not None and math.isfinite(value):
            step = row["steps_trained"] or 0
            yield Metric(name, float(value), _milliseconds(row["finished_at"]), step)


def _written(values: Mapping[str, Any]) -> dict[str, str]:
    """Values as MLflow keeps them: text, and nothing where there is none."""
    return {
        name: printable(value, keep="\n\t") if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
        if value is not None
    }


def _milliseconds(moment: datetime) -> int:
    return round(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() * 1000)


def runs_of(ledger: Ledger, sweep: str, ids: Sequence[str]) -> dict[str, str]:
    """Return the runs of trials in our own MLflow: trial -> its page after the server's address.

    Read without MLflow, which takes seconds to import, and nothing where it cannot be read.
    """
    database = Path(where(ledger))
    if not database.is_file():
        return {}
    marks = ", ".join("?" * len(ids))
    query = (
        "SELECT trial.value, runs.experiment_id, runs.run_uuid FROM runs "
        "JOIN tags AS trial USING (run_uuid) JOIN tags AS sweep USING (run_uuid) "
        "WHERE sweep.key = ? AND sweep.value = ? AND runs.lifecycle_stage = 'active' "
        f"AND trial.key = ? AND trial.value IN ({marks})"
    )
    # It belongs to MLflow, which may have changed it or be writing to it.
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection,
    ):
        found = connection.execute(query, [SWEEP, sweep, TRIAL, *ids]).fetchall()
        # Without the last part MLflow shows it among its pages on language models.
        return {
            trial: f"experiments/{experiment}/runs/{run}?workflowType=machine_learning"
            for trial, experiment, run in found
        }
    return {}


# ------------------------------------------------------------------------------------------- the UI


def ui_command(ledger: Ledger, port: int = 5000) -> list[str]:
    """Return the command that serves MLflow's UI on a ledger's runs, on loopback: it has no
    password.
    """
    return [
        sys.executable, "-m", "mlflow", "server",
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", tracking_uri(ledger),
        "--artifacts-destination", str(_artifacts(ledger)),
    ]  # fmt: skip


def serve_ui(ledger: Ledger, port: int = 5000, *, ready: Callable[[str], None]) -> None:
    """Serve MLflow's UI until SIGINT or SIGTERM; must run in the main thread.

    Args:
        ledger: Whose runs are shown.
        port: The port on 127.0.0.1.
        ready: Called as soon as the UI answers, with its address and below it a line for the page
            of each sweep. If MLFLOW_TRACKING_URI names a server, that is the address, and nothing
            is started.

    Raises:
        MirrorError: If there is nothing to show, or the server does not start.
    """
    uri = tracking_uri(ledger)
    if _is_server(uri):
        ready(where(ledger))
        return
    if _is_ours() and not (_home(ledger) / "mlflow.db").exists():
        raise MirrorError(
            f"{where(ledger)}: no such file, so that there are no runs to show; `sweep run FILE` "
            "makes it, and for a ledger that is there already `sweep mirror FILE`"
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise MirrorError(
                f"port {port}: {error.strerror}; name another: --port {port + 1}"
            ) from error
    with tempfile.TemporaryFile("w+") as output, _interruptible():
        server = subprocess.Popen(
            ui_command(ledger, port),
            # Its job workers would be eight processes and a gigabyte.
            env=ENVIRONMENT | os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            while server.poll() is None:
                try:
                    pages = _pages(address)
                except OSError:
                    time.sleep(0.2)
                else:
                    ready("\n".join([address, *(f"{name}: {url}" for name, url in pages.items())]))
                    break
            if server.wait():
                output.seek(0)
                tail = "\n".join(output.read().splitlines()[-10:])
                raise MirrorError(f"MLflow's server ended with code {server.returncode}:\n{tail}")
        except KeyboardInterrupt:
            pass
        finally:
            _end(server)


@contextmanager
def _interruptible() -> Iterator[None]:
    # SIGTERM ends this process as Ctrl-C does, so that the server does not outlive it.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _pages(address: str) -> dict[str, str]:
    """Return the sweeps that an MLflow server has, the newest first: name -> address of its runs.

    Raises:
        OSError: If it does not answer.
    """
    request = urllib.request.Request(
        f"{address}/api/2.0/mlflow/experiments/search",
        json.dumps(
            {
                "filter": f"name LIKE '{PREFIX}%'",
                "max_results": 1000,
                "order_by": ["last_update_time DESC"],
            }
        ).encode(),
        {"Content-Type": "application/json"},
    )
    # Loopback is not reached through a proxy.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=20) as reply:
        found = json.load(reply).get("experiments", [])
    # Whoever comes by the list of experiments sees the UI for language-model applications, until
    # the switch to "Model training" was found.
    return {
        experiment["name"].removeprefix(PREFIX): f"{address}/#/experiments/"
        f"{experiment['experiment_id']}/runs?workflowType=machine_learning"
        f"{f'&viewStateShareKey={VIEW}' if _has_view(experiment) else ''}"
        for experiment in found
    }


def _has_view(experiment: Mapping[str, Any]) -> bool:
    # An experiment of an earlier version has none until it is mirrored again.
    return any(tag["key"] == VIEW_TAG for tag in experiment.get("tags", ()))


def _end(server: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and all that it started."""
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            server.poll()  # Reaps it; a zombie would keep its group alive.
            try:
                os.killpg(server.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
