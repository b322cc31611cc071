"""The ledger: what was trained, with what outcome. The only file that reads or writes Parquet.

    results/trials/<trial>.parquet                      one row; there = the trial is done
    results/failures/<trial>-<attempt>.parquet          one row an attempt that failed
    results/curves/<trial>/<attempt>-<segment>.parquet  a piece of a curve
    results/states/<trial>.safetensors                  what a trial resumes from
    results/backbones/<trial>.safetensors               what a pretraining trained
    results/leases/<name>/<epoch>.json                  see `sweep.leases`
    results/cache/<dataset>.parquet                     derived; may be deleted at any time

A row is committed by create-if-absent and is never moved or rewritten: the first commit wins. Small
files are right for writing and slow to read, so that reading goes through the cache: rows with the
names, sizes and stamps of the files that they came from. A file whose entry differs is read again,
one that is gone is forgotten; a cache that cannot be read or written costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fpt.content import cache_folder
from sweep.leases import Lease, Leases
from sweep.storage import Entry, Folder, LedgerError, open_storage

__all__ = [
    "CAUSES",
    "CURVES",
    "FAILURES",
    "TRIALS",
    "Kind",
    "Lease",
    "Ledger",
    "LedgerError",
    "new_attempt",
]

Kind = Literal["trials", "curves", "failures", "states", "backbones", "cache", "leases"]
"""The folders of a ledger."""

KINDS: tuple[Kind, ...] = (
    "trials",
    "curves",
    "failures",
    "states",
    "backbones",
    "cache",
    "leases",
)

CAUSES = ("data", "code", "memory", "worker", "storage", "interrupted", "retried")
"""Why an attempt failed. `retried` is no failure but a mark: those before it no longer count."""

WAITS = ("code", "data")
"""Causes of failure that a run does not try again: nothing but a change can mend them."""

FEW = 32
"""Trials up to which their own files are read, rather than a cache of all."""

SHOWN = 20
"""Damaged files that one message names."""

_TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class Dataset:
    """A folder of Parquet files of one schema."""

    name: Literal["trials", "failures", "curves"]
    version: int
    """Raised whenever a column comes, goes or changes its meaning; written into each file."""
    schema: pa.Schema
    key: tuple[str, ...]
    """The columns that name a row's file."""
    pattern: str
    """The name of the file of a row, with the key's columns in it."""
    lost: str
    """What is lost with a file that has to be deleted."""
    added: Mapping[str, int] = field(default_factory=dict)
    """Column -> the version that it came with, if not the first. A row of an older file has null
    there; such a file is never rewritten."""

    def at(self, version: int) -> pa.Schema:
        """The schema of files of a version."""
        return pa.schema(one for one in self.schema if self.added.get(one.name, 1) <= version)

    def path(self, row: Mapping[str, Any]) -> str:
        """The object that a row belongs in."""
        return self.pattern.format(**{name: row[name] for name in self.key})


TRIALS = Dataset(
    name="trials",
    version=2,
    added={"training_set_loss": 2, "training_set_accuracy": 2},
    key=("trial_id",),
    pattern="trials/{trial_id}.parquet",
    lost="a row that is not whole cannot be trusted: delete the file and run the sweep again, "
    "which trains this trial anew and no other",
    schema=pa.schema(
        [
            pa.field("trial_id", pa.string(), nullable=False),
            pa.field("cell_id", pa.string(), nullable=False),
            ("identity_version", pa.int32()),
            ("task_version", pa.int32()),
            ("config", pa.string()),  # canonical JSON: what the id is a hash of
            # The config, flat.
            ("task", pa.string()),
            ("task_parameters", pa.string()),  # JSON
            ("backbone", pa.string()),
            ("layers", pa.int32()),
            ("width", pa.int32()),
            ("heads", pa.int32()),
            ("weights", pa.string()),
            ("initialiser", pa.string()),
            ("pretraining", pa.string()),
            ("backbone_seed", pa.int64()),
            ("train", pa.string()),  # groups, joined by +
            ("optimizer", pa.string()),  # JSON
            ("learning_rate", pa.float64()),
            ("batch_size", pa.int32()),
            ("steps", pa.int64()),
            ("stop", pa.string()),  # JSON
            ("dropout", pa.float64()),
            ("numerics", pa.string()),
            ("protocol", pa.string()),
            ("evaluate_every", pa.int32()),
            ("seed", pa.int64()),
            # The outcome. Accuracies are fractions, losses nats, validation figures at best_step.
            ("outcome", pa.string()),  # done, diverged
            ("stopped", pa.string()),  # steps, plateau, diverged
            ("steps_trained", pa.int64()),
            ("best_step", pa.int64()),
            ("train_loss", pa.float64()),
            ("train_accuracy", pa.float64()),
            ("training_set_loss", pa.float64()),  # without dropout and augmentation
            ("training_set_accuracy", pa.float64()),
            ("validation_loss", pa.float64()),
            ("validation_accuracy", pa.float64()),
            ("test_loss", pa.float64()),
            ("test_accuracy", pa.float64()),
            ("baseline_accuracy", pa.float64()),
            ("baseline_rule", pa.string()),
            # What it took.
            ("seconds", pa.float64()),
            ("examples", pa.int64()),
            ("pack_size", pa.int32()),
            ("attempts", pa.int32()),
            ("attempt", pa.string()),
            ("extended_from", pa.string()),
            # What was trained, on what.
            ("parameters", pa.int64()),
            ("parameters_trained", pa.int64()),
            ("groups", pa.string()),  # JSON: group -> tensors, parameters, trained
            ("backbone_digest", pa.string()),
            ("data_digest", pa.string()),
            # Provenance.
            ("git_commit", pa.string()),
            ("git_dirty", pa.bool_()),
            ("version", pa.string()),
            ("versions", pa.string()),  # JSON
            ("host", pa.string()),
            ("device", pa.string()),
            ("device_name", pa.string()),
            ("started_at", _TIME),
            ("finished_at", _TIME),
        ]
    ),
)

FAILURES = Dataset(
    name="failures",
    version=1,
    key=("trial_id", "attempt"),
    pattern="failures/{trial_id}-{attempt}.parquet",
    lost="delete the file: only this note of a failed attempt is lost",
    schema=pa.schema(
        [
            pa.field("trial_id", pa.string(), nullable=False),
            pa.field("attempt", pa.string(), nullable=False),
            pa.field("cause", pa.string(), nullable=False),  # one of CAUSES
            ("exception", pa.string()),
            ("message", pa.string()),
            ("traceback", pa.string()),
            ("config", pa.string()),  # canonical JSON
            ("step", pa.int64()),
            ("host", pa.string()),
            ("device", pa.string()),
            ("seconds", pa.float64()),
            pa.field("at", _TIME, nullable=False),
        ]
    ),
)

CURVES = Dataset(
    name="curves",
    version=1,
    key=("trial_id", "attempt", "segment"),
    pattern="curves/{trial_id}/{attempt}-{segment:06d}.parquet",
    lost="delete the file: only this piece of a curve is lost",
    schema=pa.schema(
        [
            pa.field("trial_id", pa.string(), nullable=False),
            pa.field("attempt", pa.string(), nullable=False),
            pa.field("segment", pa.int32(), nullable=False),
            pa.field("step", pa.int64(), nullable=False),
            pa.field("split", pa.string(), nullable=False),  # train, validation, test
            ("loss", pa.float64()),
            ("accuracy", pa.float64()),
            ("seconds", pa.float64()),
            ("examples", pa.int64()),
        ]
    ),
)


def new_attempt() -> str:
    """A name for an attempt at a trial: unique, and sorted by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}.{secrets.token_hex(3)}"


class Ledger:
    """The ledger at a local path, s3://, gs:// or az:// URI.

    Every method raises LedgerError where the storage fails.
    """

    def __init__(self, results: str | Path, *, write: bool = False) -> None:
        """Open a ledger. Nothing is made until something is written.

        Args:
            results: A local path, or s3://, gs:// or az:// and bucket/prefix.
            write: Check now that it can be written.

        Raises:
            LedgerError: If it is no such place, or cannot be written.
        """
        self._storage = open_storage(results)
        self._leases = Leases(self._storage)
        self._known: dict[str, _Rows] = {}
        if write:
            self._storage.check_writable()

    @property
    def uri(self) -> str:
        """Absolute folder, or scheme://bucket/prefix: opens this ledger from anywhere."""
        return self._storage.uri

    @property
    def local(self) -> Path | None:
        """The folder, or None on object storage."""
        return self._storage.root if isinstance(self._storage, Folder) else None

    def commit(self, row: Mapping[str, Any]) -> bool:
        """Write the row of a trial that has ended; from then on the trial is done.

        Returns:
            True if this row was the first. False: the trial was done before, and this row is
            not kept.

        Raises:
            ValueError: If the row does not fit the schema (a bug of the caller's).
        """
        data = _encode(TRIALS, [row])
        return self._storage.create(TRIALS.path(row), data)

    def done(self) -> set[str]:
        """The ids of the trials that have a row, without reading any."""
        return {_owner(name) for name in self._files(TRIALS)}

    def trials(self, ids: Collection[str] | None = None, *, strict: bool = True) -> pa.Table:
        """The rows of trials that have ended, in the order of their ids.

        Args:
            ids: Only these; one that has no row is left out.
            strict: Raise on damaged files. Else leave them out: `damaged` lists them.

        Raises:
            LedgerError: If a file is damaged or of a newer schema; names each, and what to do.
        """
        return self._read(TRIALS, ids, strict=strict)

    def fail(self, row: Mapping[str, Any]) -> None:
        """Note that an attempt failed; a second note of one attempt takes the place of the first.

        Raises:
            ValueError: If the row does not fit the schema (a bug of the caller's).
        """
        data = _encode(FAILURES, [row])
        self._storage.put(FAILURES.path(row), data)

    def forgive(self, ids: Collection[str]) -> None:
        """Mark trials so that their failures up to now no longer count, and they run again."""
        for trial_id in ids:
            row = {"trial_id": trial_id, "attempt": new_attempt(), "cause": "retried"}
            self.fail({**row, "at": datetime.now(UTC)})

    def failures(self, ids: Collection[str] | None = None, *, strict: bool = True) -> pa.Table:
        """All failed attempts, by trial and then time; arguments and errors as `trials`."""
        return self._read(FAILURES, ids, strict=strict)

    def append_curve(
        self, trial_id: str, attempt: str, segment: int, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Write the next piece of a trial's curve.

        Args:
            trial_id: The trial.
            attempt: See `new_attempt`.
            segment: Number of the piece in this attempt, from 0.
            rows: step, split, loss, accuracy, seconds, examples of each point; none is no piece.

        Raises:
            ValueError: If a row does not fit the schema (a bug of the caller's).
        """
        if rows:
            key = {"trial_id": trial_id, "attempt": attempt, "segment": segment}
            data = _encode(CURVES, [{**row, **key} for row in rows])
            self._storage.put(CURVES.path(key), data)

    def curves(self, ids: Collection[str] | None = None, *, strict: bool = True) -> pa.Table:
        """The curves of trials, by trial, split and step; arguments and errors as `trials`.

        Where attempts overlap, the last value of a (trial_id, split, step) counts.
        """
        return _latest(self._read(CURVES, ids, strict=strict))

    def damaged(self, name: Literal["trials", "failures", "curves"] = "trials") -> tuple[str, ...]:
        """What is wrong with files that cannot be read, and what to do; one message a file."""
        return tuple(self._collect(_DATASETS[name], None)[1])

    def put_state(self, trial_id: str, data: bytes) -> None:
        """Save what a trial resumes from, in place of what was saved before."""
        self._storage.put(_blob("states", trial_id), data)

    def get_state(self, trial_id: str) -> bytes | None:
        """What a trial resumes from, or None."""
        return self._storage.get(_blob("states", trial_id))

    def drop_state(self, trial_id: str) -> None:
        """Forget what a trial resumes from."""
        self._storage.delete([_blob("states", trial_id)])

    def states(self) -> set[str]:
        """The ids of the trials that have a saved state."""
        return {_owner(name) for name in self._storage.list("states")}

    def put_backbone(self, trial_id: str, data: bytes) -> bool:
        """Keep the backbone that a trial trained. True if it was the first."""
        return self._storage.create(_blob("backbones", trial_id), data)

    def backbones(self) -> set[str]:
        """The ids of the trials whose backbone is kept."""
        return {_owner(name) for name in self._storage.list("backbones")}

    def backbone_file(self, trial_id: str) -> Path:
        """A local file with the backbone that a trial trained; may be mapped, not written.

        On object storage it is fetched once for this machine, into FPT_SWEEP_CACHE (by default
        ~/.cache/fpt-sweep).

        Raises:
            LedgerError: If it is not kept, or there is no room for it.
        """
        name = _blob("backbones", trial_id)
        path = self._storage.file(name, cache_folder() / "backbones")
        if path is None:
            raise LedgerError(
                f"{self._storage.where(name)}: missing; the trial {trial_id} has to train this "
                "backbone (again) first: run the sweep that names it under `backbones:`"
            )
        return path

    def lease(self, name: str, *, ttl: float = 30.0) -> Lease | None:
        """Take a lease, or None: somebody else holds it (see `sweep.leases`).

        Never waits. A holder that died elsewhere is known by its silence alone: ask this same
        object again until `ttl` seconds have passed.
        """
        return self._leases.acquire(name, ttl=ttl)

    def holder(self, name: str) -> dict[str, Any] | None:
        """Who holds a lease: host, pid, since, epoch; None if nobody is known to."""
        return self._leases.holder(name)

    def holders(self, prefix: str) -> list[dict[str, Any]]:
        """Who holds the leases whose names begin with a prefix."""
        names = {name.split("/")[1] for name in self._storage.list("leases")}
        found = (self._leases.holder(name) for name in sorted(names) if name.startswith(prefix))
        return [holder for holder in found if holder is not None]

    def usage(self) -> dict[Kind, tuple[int, int]]:
        """Objects and bytes of each folder."""
        listings = {kind: self._storage.list(kind).values() for kind in KINDS}
        return {kind: (len(all_), sum(e.size for e in all_)) for kind, all_ in listings.items()}

    def remove(self, kind: Kind, ids: Collection[str] | None = None) -> int:
        """Remove objects of a folder for good, and say how many.

        Args:
            kind: Any folder but `trials`: what has been finished is never removed by a program.
            ids: Trials whose objects go (of leases: names); None for all.

        Raises:
            ValueError: If kind is `trials`.
        """
        if kind == "trials":
            raise ValueError("rows of finished trials are not removed; delete their files by hand")
        wanted = None if ids is None else set(ids)
        names = [
            name
            for name in self._storage.list(kind)
            if wanted is None
            or (name.split("/")[1] if kind == "leases" else _owner(name)) in wanted
        ]
        self._storage.delete(names)
        return len(names)

    def _files(self, dataset: Dataset) -> dict[str, Entry]:
        """The listing of a dataset, without what is none of ours."""
        listing = self._storage.list(dataset.name)
        return {name: entry for name, entry in listing.items() if _OURS.fullmatch(name)}

    def _read(self, dataset: Dataset, ids: Collection[str] | None, *, strict: bool) -> pa.Table:
        table, problems = self._collect(dataset, ids)
        if problems and strict:
            more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            raise LedgerError("\n".join(problems[:SHOWN] + more))
        return table

    def _collect(self, dataset: Dataset, ids: Collection[str] | None) -> tuple[pa.Table, list[str]]:
        """Rows, sorted by the names of their files, and what is wrong with damaged files."""
        if ids is not None and len(ids) <= FEW and dataset is not FAILURES:
            if dataset is TRIALS:
                names = [TRIALS.path({"trial_id": trial}) for trial in ids]
            else:
                listed = (self._storage.list(f"curves/{trial}") for trial in ids)
                names = [name for entries in listed for name in entries if _OURS.fullmatch(name)]
            read, problems = self._fetch(dataset, sorted(names))
            return pa.concat_tables([_no_rows(dataset), *read.values()]), problems
        listing = self._files(dataset)
        wanted = listing
        if ids is not None:
            chosen = set(ids)
            wanted = {name: entry for name, entry in listing.items() if _owner(name) in chosen}
        known = self._known.get(dataset.name) or self._cached(dataset)
        known = known.only(listing)
        read, problems = self._fetch(dataset, [name for name in wanted if name not in known.files])
        known = known.plus(read, listing)
        # Rewriting the whole for each new row would cost more than it saves.
        if known.unsaved * 100 > len(known.files):
            known = self._save(dataset, known)
        self._known[dataset.name] = known
        return known.only(wanted).table, problems

    def _fetch(
        self, dataset: Dataset, names: Sequence[str]
    ) -> tuple[dict[str, pa.Table], list[str]]:
        """Read files, in order; one that has vanished is left out."""

        def read(name: str) -> pa.Table | None:
            data = self._storage.get(name)
            return None if data is None else _decode(dataset, name, data)

        def attempt(name: str) -> pa.Table | str | None:
            try:
                return read(name)
            except _DamagedError as error:
                return f"{self._storage.where(name)}: {error}"

        with ThreadPoolExecutor(self._storage.threads) as pool:
            answers = dict(zip(names, pool.map(attempt, names), strict=True))
        problems = [answer for answer in answers.values() if isinstance(answer, str)]
        return {n: a for n, a in answers.items() if isinstance(a, pa.Table)}, problems

    def _cached(self, dataset: Dataset) -> _Rows:
        try:
            data = self._storage.get(f"cache/{dataset.name}.parquet")
            return _Rows.from_bytes(dataset, data) if data else _Rows.none(dataset)
        except (LedgerError, OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            return _Rows.none(dataset)

    def _save(self, dataset: Dataset, rows: _Rows) -> _Rows:
        # A reader may have no right to write, or no room: it reads the files next time.
        with contextlib.suppress(LedgerError):
            self._storage.put(f"cache/{dataset.name}.parquet", rows.to_bytes(dataset))
        return replace(rows, unsaved=0)


class _DamagedError(Exception):
    """A file of the ledger is not what it should be; the message goes without its path."""


@dataclass(frozen=True)
class _Rows:
    """Rows with the files that they came from, in the order of the files' names."""

    table: pa.Table
    files: dict[str, tuple[Entry, int]]
    """Name -> entry as it was read, and number of rows."""
    unsaved: int = 0
    """Files that have come or gone since this was written to the cache."""

    @classmethod
    def none(cls, dataset: Dataset) -> _Rows:
        return cls(_no_rows(dataset), {})

    def only(self, listing: Mapping[str, Entry]) -> _Rows:
        """The rows of files that are listed and have not changed."""
        kept = {name: file for name, file in self.files.items() if listing.get(name) == file[0]}
        gone = len(self.files) - len(kept)
        if not gone:
            return self
        mask = np.repeat([name in kept for name in self.files], [n for _, n in self.files.values()])
        return _Rows(_take(self.table, np.flatnonzero(mask)), kept, self.unsaved + gone)

    def plus(self, read: Mapping[str, pa.Table], listing: Mapping[str, Entry]) -> _Rows:
        """These rows and those of files just read."""
        if not read:
            return self
        table = pa.concat_tables([self.table, *read.values()]).combine_chunks()
        files = self.files | {name: (listing[name], t.num_rows) for name, t in read.items()}
        order = sorted(files)
        if order != list(files):
            rank = {name: place for place, name in enumerate(order)}
            ranks = np.repeat([rank[name] for name in files], [n for _, n in files.values()])
            table = _take(table, np.argsort(ranks, kind="stable"))
            files = {name: files[name] for name in order}
        return _Rows(table, files, self.unsaved + len(read))

    def to_bytes(self, dataset: Dataset) -> bytes:
        """The cache file."""
        index = [(name, *entry, rows) for name, (entry, rows) in self.files.items()]
        return _parquet(dataset, self.table, {"files": json.dumps(index)}, use_dictionary=True)

    @classmethod
    def from_bytes(cls, dataset: Dataset, data: bytes) -> _Rows:
        """Back from `to_bytes`; raises whatever a file that is not one raises."""
        file = pq.ParquetFile(pa.BufferReader(data))
        meta = file.metadata.metadata
        table = file.read().replace_schema_metadata(None)
        files = {
            name: (Entry(size, stamp), n) for name, size, stamp, n in json.loads(meta[b"files"])
        }
        if sum(n for _, n in files.values()) != table.num_rows:
            raise ValueError("its index is not that of its rows")
        if int(meta[b"schema_version"]) != dataset.version or table.schema != dataset.schema:
            raise ValueError("of another version")
        return cls(table, files)


_DATASETS = {dataset.name: dataset for dataset in (TRIALS, FAILURES, CURVES)}
_OURS = re.compile(
    r"trials/[0-9a-f]{12}\.parquet"
    r"|failures/[0-9a-f]{12}-[\w.]+\.parquet"
    r"|curves/[0-9a-f]{12}/[\w.]+-\d{6}\.parquet",
    re.ASCII,
)


def _owner(name: str) -> str:
    """The id of the trial that an object belongs to."""
    return name.split("/")[1][:12]


def _blob(kind: Literal["states", "backbones"], trial_id: str) -> str:
    if not _ID.fullmatch(trial_id):
        raise ValueError(f"{trial_id!r} is no trial id (12 hex digits)")
    return f"{kind}/{trial_id}.safetensors"


def _encode(dataset: Dataset, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The Parquet file of rows, each checked against the schema.

    Raises:
        ValueError: If a row does not fit.
    """
    names = set(dataset.schema.names)
    for row in rows:
        if unknown := row.keys() - names:
            raise ValueError(f"{dataset.name}: no such column: {', '.join(sorted(unknown))}")
    columns = [
        pa.array([_value(dataset, field, row.get(field.name)) for row in rows], field.type)
        for field in dataset.schema
    ]
    # Dictionaries and statistics would double the size of a file of one row.
    table = pa.table(columns, schema=dataset.schema)
    return _parquet(dataset, table, {}, use_dictionary=False)


def _value(dataset: Dataset, field: pa.Field, value: Any) -> Any:
    """A value of a column, if it is one: pyarrow would cut 1.5 to 1 and take True for 1.0."""
    if value is None:
        if field.nullable:
            return None
        raise ValueError(f"{dataset.name}: {field.name} is missing")
    kind = field.type
    if pa.types.is_string(kind):
        fits = isinstance(value, str)
    elif pa.types.is_boolean(kind):
        fits = isinstance(value, bool)
    elif pa.types.is_integer(kind):
        fits = isinstance(value, Integral) and not isinstance(value, bool)
    elif pa.types.is_floating(kind):
        fits = isinstance(value, Real) and not isinstance(value, bool)
    else:
        fits = isinstance(value, datetime) and value.tzinfo is not None
    allowed = _ALLOWED.get(field.name)
    if not fits or (allowed is not None and not allowed.fullmatch(str(value))):
        what = f"{kind}" + (f" like {allowed.pattern}" if allowed else "")
        raise ValueError(f"{dataset.name}: {field.name} is {value!r}, which is no {what}")
    return value


_ID = re.compile(r"[0-9a-f]{12}")
_ALLOWED = {
    "trial_id": _ID,
    "cell_id": _ID,
    "outcome": re.compile("done|diverged"),
    "stopped": re.compile("steps|plateau|diverged"),
    "cause": re.compile("|".join(CAUSES)),
    "split": re.compile("train|validation|test"),
    # No dash, which parts the names of files: so names sort as attempts do.
    "attempt": re.compile(r"[\w.]+", re.ASCII),
    "segment": re.compile(r"\d{1,6}"),
}
"""Columns that hold not just anything of their type."""


def _parquet(
    dataset: Dataset, table: pa.Table, metadata: Mapping[str, str], *, use_dictionary: bool
) -> bytes:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        table.schema,
        use_dictionary=use_dictionary,
        write_statistics=False,
        write_page_checksum=True,
        store_schema=False,  # Parquet's own types say all; the copy would be 4 kB a file
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"schema_version": str(dataset.version), **metadata})
    return bytes(sink.getvalue())


def _decode(dataset: Dataset, name: str, data: bytes) -> pa.Table:
    """The rows of a file.

    Raises:
        _DamagedError: If it is not what it should be.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        version = int((file.metadata.metadata or {}).get(b"schema_version", 0))
        if version > dataset.version:
            raise _DamagedError(
                f"its schema version {version} is newer than {dataset.version}, the newest that "
                "this fpt-sweep reads; upgrade fpt-sweep"
            )
        if version < 1:
            raise ValueError("it bears no schema version, so that fpt-sweep did not write it")
        table = file.read(use_threads=False).replace_schema_metadata(None)
        if not table.schema.equals(dataset.at(version)):
            raise ValueError("its columns are not those of its schema version")
        if not table.num_rows or (dataset is TRIALS and table.num_rows > 1):
            raise ValueError(f"it holds {table.num_rows} rows")
        row = table.select(dataset.key).slice(0, 1).to_pylist()[0]
        if (path := dataset.path(row)) != name:
            raise ValueError(f"its content belongs in {path}")
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = str(error).split("\n", 1)[0].rstrip(".")
        raise _DamagedError(f"cannot be read ({reason}); {dataset.lost}") from error
    for place, column in enumerate(dataset.schema):
        if dataset.added.get(column.name, 1) > version:
            table = table.add_column(place, column, pa.nulls(table.num_rows, column.type))
    return table


def _latest(curves: pa.Table) -> pa.Table:
    """The last row of each (trial_id, split, step), of rows in the order of their writing."""
    if not curves.num_rows:
        return curves
    keys = [_ranks(curves.column(name)) for name in ("trial_id", "split", "step")]
    order = np.lexsort(keys[::-1])  # stable: among equals, the last row was written last
    differs = [key[order][1:] != key[order][:-1] for key in keys]
    last = np.append(np.logical_or.reduce(differs), True)
    return _take(curves, order[last])


def _no_rows(dataset: Dataset) -> pa.Table:
    return pa.Table.from_batches([], schema=dataset.schema)


def _ranks(column: pa.ChunkedArray) -> np.ndarray:
    """The rank of each value among the different ones."""
    encoded = column.combine_chunks().dictionary_encode()
    values = encoded.dictionary.to_pylist()
    rank = np.empty(len(values), dtype=np.int64)
    rank[sorted(range(len(values)), key=values.__getitem__)] = np.arange(len(values))
    ranks: np.ndarray = rank[np.from_dlpack(encoded.indices)]
    return ranks


def _take(table: pa.Table, rows: np.ndarray) -> pa.Table:
    # `pa.array`, `Table.filter` and `empty_table` import pandas, which costs half a second.
    buffer = pa.py_buffer(rows.astype(np.int64))
    return table.take(pa.Array.from_buffers(pa.int64(), len(rows), [None, buffer]))
