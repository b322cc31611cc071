"""The mirror: what the ledger holds of a sweep, as MLflow runs.

A sweep is an experiment `fpt-sweep/NAME` with one parent run, and a finished trial of the sweep is
one child run of it. The mirror reads the ledger and writes MLflow, never the other way round:
nothing is read from MLflow but which children are there. So it may fail, be killed or be deleted,
and cost no trial; the next `Mirror.sync` catches up, and `catch_up` can make it all again.

Each (sweep, trial) of a ledger is mirrored exactly once. Runs are found by their tags
`fpt_sweep.sweep`, `fpt_sweep.ledger` and `fpt_sweep.trial_id`: several ledgers may share a server
and the name of a sweep, and none ever changes a run of another's. A trial that failed is a run
FAILED, with its cause, until it is done. One process at a time writes, by a lease of the ledger;
in a database a run is there whole or not at all, and on a server a child is terminated last, so
that one which was left RUNNING is completed rather than made again. Whatever is written is a
function of the ledger and the sweep file, timestamps included: writing it twice changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpt.printable import printable
from sweep.analysis import tables
from sweep.ledger.columns import METRICS, in_mlflow
from sweep.ledger.errors import in_one_line
from sweep.ledger.ledger import Ledger, LedgerError
from sweep.mirrors.mlflow_attachments import MAKERS, Maker, fonts
from sweep.mirrors.mlflow_stores import (
    ARTIFACTS,
    FAILURE,
    LEDGER,
    PARENT,
    PREFIX,
    STATE,
    SWEEP,
    TRIAL,
    VIEW_TAG,
    Child,
    Found,
    MirrorError,
    Store,
    connect,
    where,
)
from sweep.planning.tuning import resolve
from sweep.sweepfile.expansion import load
from sweep.sweepfile.schema import SweepFileError
from sweep.sweepfile.trials import Sweep

if TYPE_CHECKING:
    from mlflow.entities import Metric

    from sweep.ledger.ledger import Lease

Row = Mapping[str, Any]
"""A row of the ledger: a trial's, or a record of its curve."""

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

log = logging.getLogger(__name__)


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
        connect: Callable[[Ledger, str], Store] = connect,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take a sweep.

        Args:
            sweep: It, or a part of it.
            ledger: Where its rows are.
            makers: What makes artifacts of the parent run at the end, by name. Default: `MAKERS`.
            connect: Returns the store of a ledger and a sweep.
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
        self._connect = connect
        self._clock = clock
        self._wait_until = self._backoff = 0.0
        # What MLflow held when the lease was last ours; of no use once somebody else had it.
        self._epoch: int | None = None
        self._told_others = False
        self._store: Store
        self._parent = self._described = self._attached = ""
        self._failed: dict[str, str] = {}
        """Trial -> the failed attempt that its run describes."""
        self._open: dict[str, Found] = {}
        self._ended: dict[str, int] = {}
        self._wanted = 0

    @property
    def command(self) -> str:
        """The command that catches up, as it is typed in this folder."""
        default = self.ledger.uri == Ledger("results").uri
        where = "" if default else f" --results {shlex.quote(self.ledger.uri)}"
        return f"sweep mirror {shlex.quote(str(self.sweep.file))}{where}"

    @property
    def progress(self) -> tuple[int, int]:
        """How many trials are mirrored, and how many are to be, as far as that is known by now."""
        return len(self._ended), max(self._wanted, len(self._ended))

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
        missing = self._in_order(finished - self._ended.keys())
        self._wanted = len(self._ended) + len(missing)
        begun = [trial for trial in missing if trial in self._open]
        fresh = [trial for trial in missing if trial not in self._open]
        for row, curve in self._held(lease, begun):
            yield self._complete(self._child(row, curve))
        for start in range(0, len(fresh), BATCH):
            read = self._held(lease, fresh[start : start + BATCH])
            for child in self._store.add(self._child(*one) for one in read):
                self._ended[child.trial] = child.end
                yield child.trial
        if self._epoch is None:
            return
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

    def _in_order(self, trials: Collection[str]) -> list[str]:
        """Trials in the order in which they started, as MLflow shows them."""
        rows = self.ledger.trials(trials, columns=["trial_id", "started_at"]).to_pylist()
        return [row["trial_id"] for row in sorted(rows, key=lambda row: row["started_at"])]

    def _held(self, lease: Lease, ids: Sequence[str]) -> Iterator[tuple[Row, list[Row]]]:
        """Rows of trials, each with its curve, for as long as the lease is ours."""
        for start in range(0, len(ids), BATCH):
            for one in self._read(ids[start : start + BATCH]):
                if not lease.held:
                    # This process stood still for too long, and somebody else may have it.
                    self._epoch = None
                if self._epoch is None:
                    return
                yield one

    def _take_stock(self) -> None:
        """Find experiment and runs, and create the experiment and the parent if they are not there.

        Of several runs of one trial one is kept, a complete one if there is any: two can come about
        if a process stood still for longer than its lease.
        """
        store = self._store = self._connect(self.ledger, self.sweep.name)
        client = store.client
        client.set_experiment_tag(store.experiment, VIEW_TAG, self._view())
        self._tell_others()
        found: dict[str, list[Found]] = {}
        for run in store.runs(self.sweep.name, self.ledger.identity()):
            found.setdefault(run.tags.get(TRIAL, ""), []).append(run)
        runs, surplus = {}, []
        for trial, same in found.items():
            runs[trial], *others = sorted(same, key=lambda run: (_is_open(run), run.run_id))
            surplus += [run.run_id for run in others]
        store.delete(surplus)
        parent = runs.pop("", None)
        if parent is None:
            rows = self.ledger.trials(self._finished(), columns=["started_at"])
            self._parent = client.create_run(
                store.experiment,
                start_time=min(map(_milliseconds, rows["started_at"].to_pylist()), default=None),
                tags={
                    SWEEP: self.sweep.name,
                    LEDGER: self.ledger.identity(),
                    "mlflow.source.name": printable(self.sweep.file.name),
                },
                run_name=self.sweep.name,
            ).info.run_id
        else:
            self._parent = parent.run_id
        known = parent.tags if parent is not None else {}
        self._described, self._attached = known.get(STATE, ""), known.get(ARTIFACTS, "")
        for run in runs.values():
            if run.tags.get(PARENT) != self._parent:
                client.set_tag(run.run_id, PARENT, self._parent)
        self._open = {trial: run for trial, run in runs.items() if _is_open(run)}
        self._ended = {trial: run.end_time or 0 for trial, run in runs.items() if not _is_open(run)}
        tags = {trial: run.tags.get(FAILURE, "") for trial, run in self._open.items()}
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
        others = self._store.client.search_runs(
            [self._store.experiment],
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

    def _child(self, row: Row, curve: Iterable[Row]) -> Child:
        """Return the run of a finished trial."""
        return Child(
            row["trial_id"],
            printable(self._points[row["trial_id"]].label),
            _milliseconds(row["started_at"]),
            _milliseconds(row["finished_at"]),
            self._tags(row),
            self._params(row),
            list(_metrics(row, curve)),
        )

    def _complete(self, child: Child) -> str:
        """Complete the run of a finished trial that was begun, or that told of a failure."""
        from mlflow.entities import RunTag

        client, found = self._store.client, self._open.pop(child.trial)
        run = client.get_run(found.run_id)
        if self._failed.pop(child.trial, ""):
            # It failed before, and says so no longer.
            for name in (*_FAILURE_TAGS, FAILURE):
                if name in run.data.tags:
                    client.delete_tag(found.run_id, name)
            tags = [RunTag(name, value) for name, value in child.tags.items()]
            client.log_batch(found.run_id, tags=tags, synchronous=True)
        self._store.complete(found.run_id, child, run.data.params)
        self._ended[child.trial] = child.end
        return child.trial

    def _fail(self, trial: str, failure: Row) -> None:
        """Create or renew the run of a trial whose last attempt failed."""
        from mlflow.entities import RunTag

        client, at = self._store.client, _milliseconds(failure["at"])
        told = {name: failure[name] for name in _FAILURE_TAGS}
        own = _written(told | {"outcome": "failed", FAILURE: str(failure["at"])})
        tags = self._common_tags(trial) | own
        before = self._open.get(trial)
        if before is None:
            name = printable(self._points[trial].label)
            run = client.create_run(self._store.experiment, start_time=at, tags=tags, run_name=name)
            run_id = run.info.run_id
        else:
            run_id = before.run_id
            wanted = [RunTag(name, value) for name, value in tags.items()]
            client.log_batch(run_id, tags=wanted, synchronous=True)
        client.set_terminated(run_id, "FAILED", at)
        self._open[trial] = Found(run_id, "FAILED", at, tags)
        self._failed[trial] = own[FAILURE]

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
        client, parent, state = self._store.client, self._parent, self._state()
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
        with tempfile.TemporaryDirectory(prefix="fpt-sweep-") as folder, fonts():
            for what, make in self._makers.items():
                try:
                    make(self.sweep, still, Path(folder))
                except Exception as error:
                    # Whatever it is, the runs matter more; the command of its own tells all of it.
                    log.warning("MLflow mirror: no %s: %s", what, in_one_line(error))
                    log.debug("MLflow mirror", exc_info=True)
            self._store.client.log_artifacts(self._parent, folder)
        self._store.client.set_tag(self._parent, ARTIFACTS, state)
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
                store = connect(ledger, sweep.name)
                # The parent stays, for what people have written there, and is made anew.
                found = list(store.runs(sweep.name, ledger.identity()))
                store.delete(run.run_id for run in found if TRIAL in run.tags)
                for run in found:
                    if TRIAL not in run.tags:
                        store.client.set_tag(run.run_id, STATE, "")
                        store.client.set_tag(run.run_id, ARTIFACTS, "")
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


def _is_open(run: Found) -> bool:
    return run.status != "FINISHED"


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
    """Return values as MLflow keeps them: text, not too long, and nothing where there is none."""
    written = {
        name: printable(value, keep="\n\t") if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
        if value is not None
    }
    return {name: text[:NOTE_LIMIT] for name, text in written.items()}


def _milliseconds(moment: datetime) -> int:
    return round(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() * 1000)
