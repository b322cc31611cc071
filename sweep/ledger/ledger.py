"""The ledger: what was trained, with what outcome. The only file that reads or writes Parquet.

    results/trials/<trial>.parquet                      one row; there = the trial is done
    results/failures/<trial>-<attempt>.parquet          one row an attempt that failed
    results/curves/<trial>/<attempt>-<segment>.parquet  a piece of a curve
    results/states/<trial>/<step>-<attempt>.safetensors what a trial resumes from
    results/states/<trial>.safetensors                  its end, where its tensors are kept
    results/backbones/<trial>.safetensors               what a pretraining trained
    results/logs/<trial>/<attempt>.txt                  what an attempt at it printed
    results/quotes/<sweep>/<time>.json                  what a run was expected to cost
    results/notes/<sweep>/<about>/<name>.json           its claims before the first row; readings
    results/identity.json                               which ledger it is, to others
    results/leases/<name>/<epoch>.json                  see `sweep.ledger.leases`
    results/cache/<dataset>.parquet                     derived; may be deleted at any time
    results/cache/sweep-<name>.json                     the trials that its last run had

A row is committed by create-if-absent and is never moved or rewritten: the first commit wins. Small
files are right for writing and slow to read, so that reading goes through the cache: rows with the
names and stamps of the units that they came from, a file each or, of curves, the folder of a trial.
A unit whose stamp differs is read again, one that is gone is forgotten; a cache that cannot be read
or written costs time and nothing else. Only those of its columns are read that are asked for.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fpt.files import cache_folder
from sweep.ledger.columns import schema_of
from sweep.ledger.leases import Claims, Lease, Leases
from sweep.ledger.storage import Entry, Folder, LedgerError, open_storage

__all__ = [
    "CAUSES",
    "CURVES",
    "FAILURES",
    "MARKS",
    "TRIALS",
    "AlreadyOurs",
    "Cause",
    "Committed",
    "Kind",
    "Lease",
    "Ledger",
    "LedgerError",
    "TakenBy",
    "new_attempt",
]

Kind = Literal["trials", "curves", "failures", "states", "backbones", "logs", "cache", "leases"]
"""The folders of a ledger."""

Kept = Literal["trials", "curves", "failures", "states", "backbones"]
"""The folders of what belongs to single trials, and cannot be made again but by training."""

Note = Literal["families", "readings", "generations"]
"""What notes on a sweep's claims are about."""

KEPT: tuple[Kept, ...] = ("trials", "curves", "failures", "states", "backbones")


KINDS: tuple[Kind, ...] = (
    "trials",
    "curves",
    "failures",
    "states",
    "backbones",
    "logs",
    "cache",
    "leases",
)

Cause = Literal[
    "data",
    "code",
    "memory",
    "device",
    "worker",
    "node",
    "storage",
    "hung",
    "preempted",
    "interrupted",
]
"""Why an attempt at a trial came to nothing."""

CAUSES = (*get_args(Cause), "doubled", "retried")
"""Why an attempt failed, or what a mark says that is no failure (see `MARKS`)."""

MARKS = ("doubled", "retried")
"""No failures. doubled: the attempt ended well, and somebody else's row was there first. retried:
failures before it no longer count."""

WAITS = ("code", "data")
"""Causes of failure that a run does not try again: nothing but a change can mend them."""

FEW = 32
"""Trials up to which their own files are read, rather than a cache of all."""

BATCH = 1000
"""Files that are read before their rows are put together."""

SHOWN = 20
"""Damaged files that one message names."""


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
        if version == self.version:
            return self.schema
        return pa.schema(one for one in self.schema if self.added.get(one.name, 1) <= version)

    def unit(self, trial_id: str) -> str:
        """What holds the rows of a trial: a file; of curves, a folder."""
        return f"curves/{trial_id}" if self.name == "curves" else self.path({"trial_id": trial_id})

    def path(self, row: Mapping[str, Any]) -> str:
        """The object that a row belongs in."""
        return self.pattern.format(**{name: row[name] for name in self.key})


TRIALS = Dataset(
    name="trials",
    version=5,
    added={
        "training_set_loss": 2,
        "training_set_accuracy": 2,
        "accumulation": 3,
        "row_padding": 4,
        "own_code": 5,
    },
    key=("trial_id",),
    pattern="trials/{trial_id}.parquet",
    lost="a row that is not whole cannot be trusted: delete the file and run the sweep again, "
    "which trains this trial anew and no other",
    schema=schema_of("trials"),
)

FAILURES = Dataset(
    name="failures",
    version=2,
    added={"node": 2, "lost": 2, "pack_size": 2, "accumulation": 2},
    key=("trial_id", "attempt"),
    pattern="failures/{trial_id}-{attempt}.parquet",
    lost="delete the file: only this note of a failed attempt is lost",
    schema=schema_of("failures"),
)

CURVES = Dataset(
    name="curves",
    version=1,
    key=("trial_id", "attempt", "segment"),
    pattern="curves/{trial_id}/{attempt}-{segment:06d}.parquet",
    lost="delete the file: only this piece of a curve is lost",
    schema=schema_of("curves"),
)


@dataclass(frozen=True)
class Committed:
    """The row was written: the trial had none."""


@dataclass(frozen=True)
class AlreadyOurs:
    """The same attempt wrote it before, although its writing was reported as failed."""


@dataclass(frozen=True)
class TakenBy:
    """Another attempt was first, and this row is not kept."""

    attempt: str


Commit = Committed | AlreadyOurs | TakenBy
"""What became of a row."""


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
        # Of a snapshot: folder -> its listing, dataset -> its units, once they were looked at.
        self._listed: dict[str, dict[str, Entry]] | None = None
        self._stamped: dict[str, dict[str, str]] | None = None
        if write:
            self._storage.check_writable()

    @classmethod
    def existing(cls, results: str | Path, *, write: bool = False) -> Ledger:
        """Open a ledger that is there, for what trains nothing: a mistyped place is no empty one.

        Args:
            results: See `Ledger`.
            write: Check now that it can be written.

        Raises:
            LedgerError: If there is none, or it cannot be written.
        """
        ledger = cls(results)
        if not any(ledger._storage.holds(kind) for kind in (*KEPT, "leases")):
            folder = ledger.local
            meant = folder is not None and (folder / "results/trials").is_dir()
            hint = f"; did you mean {Path(results) / 'results'}?" if meant else ""
            raise LedgerError(
                f"{results}: no ledger: nothing was trained here{hint}; name a folder such as "
                "`results`, s3://, gs:// or az://"
            )
        if write:
            ledger._storage.check_writable()
        return ledger

    def snapshot(self) -> Ledger:
        """This ledger as it lies there when first looked at: what is read of it several times
        agrees, and no folder is listed twice. Only to be read.
        """
        still = copy.copy(self)
        still._listed, still._stamped = {}, {}
        still._known = dict(self._known)
        return still

    def _list(self, prefix: str) -> dict[str, Entry]:
        if self._listed is None:
            return self._storage.list(prefix)
        if prefix not in self._listed:
            self._listed[prefix] = self._storage.list(prefix)
        return self._listed[prefix]

    @property
    def uri(self) -> str:
        """Absolute folder, or scheme://bucket/prefix: opens this ledger from anywhere."""
        return self._storage.uri

    @property
    def local(self) -> Path | None:
        """The folder, or None on object storage."""
        return self._storage.root if isinstance(self._storage, Folder) else None

    def identity(self) -> str:
        """Return what tells this ledger from all others, whatever it is called: 16 hex digits.

        It is made when it is first asked for. A copy of the folder has the same.

        Raises:
            LedgerError: If it can neither be read nor made.
        """
        name = "identity.json"
        data = self._storage.get(name)
        if data is None:
            self._storage.create(name, json.dumps({"ledger": secrets.token_hex(8)}).encode())
            data = self._storage.get(name) or b""
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return str(json.loads(data)["ledger"])
        raise LedgerError(
            f"{self._storage.where(name)}: damaged; delete it, and the ledger gets a new identity: "
            "`sweep mirror` then makes runs of its own"
        )

    def commit(self, row: Mapping[str, Any]) -> Commit:
        """Write the row of a trial that has ended, unless it has one; then the trial is done.

        Raises:
            ValueError: If the row does not fit the schema (a bug of the caller's).
        """
        name, data = TRIALS.path(row), _encode(TRIALS, [row])
        while not self._storage.create(name, data):
            by = self.committed_by(row["trial_id"])
            if by is not None:  # else it was deleted since
                return AlreadyOurs() if by == row["attempt"] else TakenBy(by)
        return Committed()

    def committed_by(self, trial_id: str) -> str | None:
        """Return the attempt that wrote the row of a trial; None: it has none."""
        attempts: list[str] = self.trials([trial_id], columns=["attempt"])["attempt"].to_pylist()
        return attempts[0] if attempts else None

    def recommit(self, row: Mapping[str, Any]) -> None:
        """Write a row over the one that there is, of a trial that was trained anew on purpose.

        Raises:
            ValueError: If the row does not fit the schema (a bug of the caller's).
        """
        self._storage.put(TRIALS.path(row), _encode(TRIALS, [row]))

    def done(self) -> set[str]:
        """The ids of the trials that have a row, without reading any."""
        return {name[7:19] for name in self._units(TRIALS)}

    def trials(
        self,
        ids: Collection[str] | None = None,
        *,
        columns: Sequence[str] | None = None,
        strict: bool = True,
    ) -> pa.Table:
        """The rows of trials that have ended, in the order of their ids.

        Args:
            ids: Only these; one that has no row is left out.
            columns: Only these, in this order, which is quicker.
            strict: Raise on damaged files. Else leave them out: `damaged` lists them.

        Raises:
            LedgerError: If a file is damaged or of a newer schema; names each, and what to do.
        """
        return self._read(TRIALS, ids, columns, strict=strict)

    def fail(self, row: Mapping[str, Any]) -> None:
        """Note that an attempt failed; a second note of one attempt takes the place of the first.

        Raises:
            ValueError: If the row does not fit the schema (a bug of the caller's).
        """
        data = _encode(FAILURES, [row])
        self._storage.put(FAILURES.path(row), data)

    def forgive(self, ids: Collection[str]) -> None:
        """Mark trials so that their failures up to now no longer count, and they run again."""
        if not ids:
            return
        noted = self.failures(ids, columns=["trial_id", "at"]).sort_by("at").to_pylist()
        last = {row["trial_id"]: row["at"] for row in noted}
        for trial_id in ids:
            at = datetime.now(UTC)
            if trial_id in last:  # by the clock of its node, which may be ahead of ours
                at = max(at, last[trial_id] + timedelta(microseconds=1))
            row = {"trial_id": trial_id, "attempt": new_attempt(), "cause": "retried"}
            self.fail({**row, "at": at})

    def failures(
        self,
        ids: Collection[str] | None = None,
        *,
        columns: Sequence[str] | None = None,
        strict: bool = True,
    ) -> pa.Table:
        """All failed attempts, by trial and then time; arguments and errors as `trials`."""
        return self._read(FAILURES, ids, columns, strict=strict)

    def last_failures(self, ids: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
        """Trial -> cause, exception and message of its last failure, unless it was forgiven since.

        Raises:
            LedgerError: As `failures`.
        """
        names = ["trial_id", "cause", "exception", "message", "at"]
        # By time, not by the names of attempts: a mark of `sweep retry` is named in its own way.
        rows = self.failures(ids, columns=names).sort_by("at").to_pylist()
        last: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row["cause"] not in MARKS:
                last[row["trial_id"]] = row
            elif row["cause"] == "retried":
                last.pop(row["trial_id"], None)
        return last

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

    def curves(
        self,
        ids: Collection[str] | None = None,
        *,
        columns: Sequence[str] | None = None,
        strict: bool = True,
    ) -> pa.Table:
        """The curves of trials, by trial, split and step; arguments and errors as `trials`.

        Where attempts overlap, the last value of a (trial_id, split, step) counts.
        """
        return self._read(CURVES, ids, columns, strict=strict)

    def scan(self, name: Literal["trials", "failures", "curves"]) -> Path | pa.Table:
        """All rows, as `trials`, `failures` and `curves` give them, for a reader that asks for
        columns itself: the Parquet file of the cache, where that holds just these rows.

        Raises:
            LedgerError: As `trials`.
        """
        dataset = _DATASETS[name]
        rows, problems = self._known_of(dataset, None)
        _raise(problems)
        if rows.saved and self.local is not None:
            return self.local / _cache(dataset)
        return self._read(dataset, None, None, strict=True)

    def damaged(self, name: Literal["trials", "failures", "curves"] = "trials") -> tuple[str, ...]:
        """What is wrong with files that cannot be read, and what to do; one message a file."""
        return tuple(self._known_of(_DATASETS[name], None)[1])

    def put_state(self, trial_id: str, data: bytes) -> None:
        """Keep the end of a trial; what it could resume from is forgotten with it."""
        self._storage.put(_blob("states", trial_id), data)
        self._storage.delete(self._saved(trial_id))

    def save_state(self, trial_id: str, data: bytes, *, step: int, attempt: str) -> None:
        """Save what a running trial resumes from.

        The furthest state counts, whoever wrote it: a worker that was cut off and comes back late
        takes nothing back.
        """
        name = f"states/{_checked(trial_id)}/{step:012d}-{attempt}.safetensors"
        self._storage.put(name, data)
        self._storage.delete(one for one in self._saved(trial_id) if one < name)

    def get_state(self, trial_id: str) -> bytes | None:
        """The end of a trial, else the furthest that it got, or None."""
        return next(self.saved_states(trial_id), None)

    def saved_states(self, trial_id: str) -> Iterator[bytes]:
        """The end of a trial, if it is kept, and then what it saved on the way, the furthest first.

        A ledger of the first release has states of running trials in the place of their ends.
        """
        before: list[str] = []
        while True:
            names, found = self._saved(trial_id), False
            for name in (_blob("states", trial_id), *reversed(names)):
                if (data := self._storage.get(name)) is not None:
                    found = True
                    yield data
            # All that was listed is gone: somebody saved a further one, or the end, meanwhile.
            if found or names == before:
                return
            before = names

    def drop_state(self, trial_id: str) -> None:
        """Forget what a trial resumes from, and its end."""
        self._storage.delete([_blob("states", trial_id), *self._saved(trial_id)])

    def _saved(self, trial_id: str) -> list[str]:
        """What a trial saved on the way, the furthest last."""
        return sorted(self._storage.list(f"states/{_checked(trial_id)}"))

    def states(self) -> set[str]:
        """The ids of the trials that have a saved state."""
        return {_owner(name) for name in self._list("states")}

    def put_backbone(self, trial_id: str, data: bytes) -> bool:
        """Keep the backbone that a trial trained. True if it was the first."""
        return self._storage.create(_blob("backbones", trial_id), data)

    def backbones(self) -> set[str]:
        """The ids of the trials whose backbone is kept."""
        return {_owner(name) for name in self._list("backbones")}

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

    def names(self, kind: Kept) -> dict[str, list[str]]:
        """Trial -> the names of its objects in a folder, sorted: what `copy` takes."""
        out: dict[str, list[str]] = {}
        for name in filter(is_object, self._storage.list(kind)):
            out.setdefault(_owner(name), []).append(name)
        return out

    def copy(self, name: str) -> bytes:
        """An object as it lies there, for another ledger to `adopt`.

        Raises:
            LedgerError: If it is not there, not whole, or of a newer schema.
        """
        data = self._storage.get(name)
        if data is None:
            raise LedgerError(f"{self._storage.where(name)}: missing; it was there a moment ago")
        try:
            _check_whole(name, data)
        except _DamagedError as error:
            raise LedgerError(f"{self._storage.where(name)}: {error}") from None
        return data

    def adopt(self, name: str, data: bytes) -> bool:
        """Write an object of another ledger, as `copy` gave it, unless there is one of its name.

        Returns:
            True if there was none.

        Raises:
            ValueError: If the name is none of a ledger's (a bug of the caller's).
        """
        if not is_object(name):
            raise ValueError(f"{name!r} is no object of a ledger")
        return self._storage.create(name, data)

    def put_log(self, trial_id: str, attempt: str, text: str) -> None:
        """Keep what an attempt at a trial has printed so far; a second time takes its place."""
        self._storage.put(f"logs/{_checked(trial_id)}/{attempt}.txt", text.encode())

    def logs(self, trial_id: str) -> dict[str, str]:
        """Return what attempts at a trial have printed, by attempt, the oldest first."""
        found: dict[str, str] = {}
        for name in self._storage.list(f"logs/{_checked(trial_id)}"):
            if (data := self._storage.get(name)) is not None:
                found[name.rpartition("/")[2].removesuffix(".txt")] = data.decode(errors="replace")
        return found

    def put_quote(self, sweep: str, name: str, quote: Mapping[str, Any]) -> None:
        """Keep what a run was expected to cost; names sort by time."""
        data = json.dumps(quote, separators=(",", ":")).encode()
        self._storage.create(f"quotes/{sweep}/{name}.json", data)

    def last_quote(self, sweep: str) -> dict[str, Any] | None:
        """The last quote of a sweep, or None: there is none, or none that can be read."""
        names = self._storage.list(f"quotes/{sweep}")
        data = self._storage.get(max(names)) if names else None
        try:
            return None if data is None else dict(json.loads(data))
        except ValueError:
            return None

    def put_note(self, sweep: str, about: Note, name: str, note: Mapping[str, Any]) -> bool:
        """Keep a note on a sweep's claims, unless there is one of its name; True if there was none.

        Args:
            sweep: The name of the sweep.
            about: families: lists of claims in force; readings: verdicts that were shown;
                generations: points that an adaptive sampler asked for.
            name: Letters, digits, dots and dashes.
            note: JSON values.
        """
        return self._storage.create(f"notes/{sweep}/{about}/{name}.json", written(note))

    def notes(self, sweep: str, about: Note) -> dict[str, dict[str, Any]]:
        """Name -> note on a sweep's claims, by name; one that cannot be read is left out."""
        out = {}
        for path in sorted(self._list(f"notes/{sweep}/{about}")):
            try:
                note = json.loads(self._storage.get(path) or b"")
            except ValueError:
                continue
            if isinstance(note, dict):
                out[path.rsplit("/", 1)[1].removesuffix(".json")] = note
        return out

    def note_names(self, sweep: str | None = None) -> list[str]:
        """The names of the notes on a sweep's claims, or on those of all: what `copy` takes."""
        names = self._storage.list(f"notes/{sweep}" if sweep else "notes")
        return sorted(filter(is_object, names))

    def lease(self, name: str, *, ttl: float = 30.0) -> Lease | None:
        """Take a lease, or None: somebody else holds it (see `sweep.ledger.leases`).

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

    def claims(self, lease: Lease) -> Claims:
        """What a driver that holds a lease trains, so that others leave it to that one."""
        return Claims(self._storage, self._leases, lease)

    def remember(self, sweep: str, trials: Mapping[str, str]) -> None:
        """Note which trials a run of a sweep has: id -> label."""
        self._storage.put(f"cache/sweep-{sweep}.json", json.dumps(trials).encode())

    def remembered(self, sweep: str) -> dict[str, str]:
        """What the last run of a sweep noted; nothing if there is no such note."""
        try:
            found = json.loads(self._storage.get(f"cache/sweep-{sweep}.json") or b"{}")
            return {str(name): str(label) for name, label in found.items()}
        except (ValueError, AttributeError):
            return {}

    def others(self, sweep: str) -> set[str]:
        """The trials that other sweeps' last runs noted."""
        notes = (re.fullmatch(r"cache/sweep-(.+)\.json", name) for name in self._list("cache"))
        names = {note[1] for note in notes if note} - {sweep}
        return {trial for name in names for trial in self.remembered(name)}

    def pause(self, sweep: str) -> None:
        """Ask whoever runs a sweep to stop; running trials save their states."""
        mark = {"token": secrets.token_hex(8)}
        self._storage.put(f"leases/paused/{sweep}.json", json.dumps(mark).encode())

    def paused(self, sweep: str) -> bool:
        """Whether a sweep is to stop, or to stay stopped."""
        return self.pause_mark(sweep) is not None

    def pause_mark(self, sweep: str) -> str | None:
        """What tells the pause of a sweep from another one of it; None if it is not paused."""
        data = self._storage.get(f"leases/paused/{sweep}.json")
        # The first releases' marks are all alike.
        return None if data is None else data.decode(errors="replace")

    def resume(self, sweep: str, mark: str | None = None) -> None:
        """Let a sweep run again; with a mark, only if nobody has asked for another pause since."""
        if mark is None or self.pause_mark(sweep) == mark:
            self._storage.delete([f"leases/paused/{sweep}.json"])

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
        listing = self._list(dataset.name)
        return {name: entry for name, entry in listing.items() if _OURS.fullmatch(name)}

    def _units(self, dataset: Dataset) -> dict[str, str]:
        """What the rows of a dataset come from, sorted by name, each with a stamp that changes with
        its content: files; of curves, the folders of trials.
        """
        still = self._stamped
        if still is not None and dataset.name in still:
            return still[dataset.name]
        stamps = self._storage.stamps(dataset.name)
        if stamps is not None:
            ours = (_FOLDER if dataset is CURVES else _OURS).fullmatch
            units = {name: stamp for name, stamp in stamps.items() if ours(name)}
        elif dataset is not CURVES:
            units = {name: f"{size}-{at}" for name, (size, at) in self._files(dataset).items()}
        else:
            files: dict[str, list[Entry]] = {}
            for name, entry in self._files(dataset).items():
                files.setdefault(name.rpartition("/")[0], []).append(entry)
            units = {name: _stamp(entries) for name, entries in files.items()}
        if still is not None:
            still[dataset.name] = units
        return units

    def _read(
        self,
        dataset: Dataset,
        ids: Collection[str] | None,
        columns: Sequence[str] | None,
        *,
        strict: bool,
    ) -> pa.Table:
        columns = dataset.schema.names if columns is None else columns
        if ids is not None and len(ids) <= FEW and dataset is not FAILURES:
            units = [dataset.unit(trial) for trial in sorted(set(ids))]
            read = self._fetch(dataset, units)
            problems = self._told(read)
            table = read.table.select(columns)
        else:
            chosen = None if ids is None else frozenset(ids)
            rows, problems = self._known_of(dataset, chosen)
            try:
                table = rows.table(columns, _units_of(rows, chosen))
            except (OSError, pa.ArrowException):
                self._forget(dataset)
                rows, problems = self._known_of(dataset, chosen)
                table = rows.table(columns, _units_of(rows, chosen))
        if strict:
            _raise(problems)
        return table

    def _known_of(
        self, dataset: Dataset, ids: Collection[str] | None
    ) -> tuple[_Rows, tuple[str, ...]]:
        """The rows of today, or at least those of some trials, and what is wrong with files."""
        units = self._units(dataset)
        known = self._known.get(dataset.name) or self._cached(dataset)
        known = known.only(units)
        new = [name for name in units if name not in known.places]
        read = self._fetch(dataset, [name for name in new if ids is None or _owner(name) in ids])
        full = known.plus(read, units)
        known = full.without(read.broken)
        # Rewriting the whole for each new row would cost more than it saves.
        if known.unsaved * 100 > len(known.places):
            try:
                known = self._save(dataset, known)
            except (OSError, pa.ArrowException):
                self._forget(dataset)
                return self._known_of(dataset, ids)
            full = full if read.broken else known
        self._known[dataset.name] = known
        return full, self._told(read)

    def _forget(self, dataset: Dataset) -> None:
        """Leave a cache aside that was damaged where nobody has looked before."""
        self._known[dataset.name] = _Rows.none(dataset)  # it may be there still, if it must stay
        with contextlib.suppress(LedgerError):
            self._storage.delete([_cache(dataset)])

    def _told(self, read: _Read) -> tuple[str, ...]:
        return tuple(f"{self._storage.where(name)}: {why}" for name, why in read.damaged.items())

    def _fetch(self, dataset: Dataset, units: Sequence[str]) -> _Read:
        """Read the files of units; one that has vanished is left out."""
        pairs = [(unit, unit) for unit in units]
        if dataset is CURVES:
            listed = ((unit, self._storage.list(unit)) for unit in units)
            pairs = [(unit, file) for unit, files in listed for file in files if is_object(file)]

        def attempt(pair: tuple[str, str]) -> pa.Table | str | None:
            try:
                data = self._storage.get(pair[1])
                return None if data is None else _decode(dataset, pair[1], data)
            except _DamagedError as error:
                return str(error)

        read = _Read(dataset)
        with ThreadPoolExecutor(self._storage.threads) as pool:
            for start in range(0, len(pairs), BATCH):
                batch = pairs[start : start + BATCH]
                read.add(zip(batch, pool.map(attempt, batch), strict=True))
        return read.whole()

    def _cached(self, dataset: Dataset) -> _Rows:
        try:
            if self.local is not None:
                return _Rows.from_file(dataset, str(self.local / _cache(dataset)))
            data = self._storage.get(_cache(dataset))
            return _Rows.from_file(dataset, pa.BufferReader(data)) if data else _Rows.none(dataset)
        except (LedgerError, OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            return _Rows.none(dataset)

    def _save(self, dataset: Dataset, rows: _Rows) -> _Rows:
        rows = rows.tidied(dataset)
        # A reader may have no right to write, or no room: it reads the files next time.
        with contextlib.suppress(LedgerError):
            self._storage.put(_cache(dataset), rows.to_bytes(dataset))
            return replace(rows, saved=True)
        return rows


class _DamagedError(Exception):
    """A file of the ledger is not what it should be; the message goes without its path."""


class _Read:
    """What was read of files. Tables of one row take forty times the room of their content, so
    that they are put together as they come.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.table = _no_rows(dataset)
        """The rows of the units, one after another."""
        self.counts: dict[str, int] = {}
        """Unit -> rows, of units of which a file at least was read."""
        self.damaged: dict[str, str] = {}
        """File -> what is wrong with it."""
        self.broken: set[str] = set()
        """Units with such files."""
        self._parts: list[pa.Table] = []

    def add(self, files: Iterable[tuple[tuple[str, str], pa.Table | str | None]]) -> None:
        """Add ((unit, file), its table or what is wrong with it), in the order of their names."""
        tables = []
        for (unit, file), answer in files:
            if isinstance(answer, str):
                self.damaged[file] = answer
                self.broken.add(unit)
            elif answer is not None:
                self.counts[unit] = self.counts.get(unit, 0) + answer.num_rows
                tables.append(answer)
        if tables:
            self._parts.append(pa.concat_tables(tables).combine_chunks())

    def whole(self) -> _Read:
        """All of it, as one table."""
        self.table = pa.concat_tables([self.table, *self._parts]).combine_chunks()
        self._parts = []
        if self.dataset is CURVES and self.counts:  # Some points may have been written twice.
            self.table = _latest(self.table)
            ranks = _ranks(self.table.column("trial_id"))
            self.counts = dict(zip(self.counts, np.bincount(ranks).tolist(), strict=True))
        return self


class _Columns:
    """Columns of a table, or of a Parquet file, of which each is read when it is first wanted."""

    def __init__(self, source: pa.Table | pq.ParquetFile) -> None:
        self._file = source
        self._read: dict[str, pa.ChunkedArray] = {}

    def table(self, names: Sequence[str]) -> pa.Table:
        """Some of them. Raises what pyarrow raises of a file that is damaged."""
        if isinstance(self._file, pa.Table):
            return self._file.select(names)
        if lacking := [name for name in names if name not in self._read]:
            read = self._file.read(columns=lacking)
            self._read |= dict(zip(read.column_names, read.columns, strict=True))
        return pa.table({name: self._read[name] for name in names}, schema=self._schema(names))

    def _schema(self, names: Sequence[str]) -> pa.Schema:
        schema = self._file.schema_arrow
        return pa.schema([schema.field(name) for name in names])


@dataclass(frozen=True)
class _Rows:
    """Rows with the units that they came from."""

    base: _Columns
    base_rows: int
    fresh: pa.Table
    """Rows that were read since: they are counted on from the base's."""
    stamps: dict[str, str]
    """Unit -> its stamp, when it was read."""
    places: dict[str, tuple[int, int]]
    """Unit -> its first row and how many it has. Rows may be left over that belong to none."""
    tidy: bool
    """Whether the base has just the rows of the index, in the order of the units' names."""
    saved: bool
    """Whether the cache holds just this."""
    unsaved: int = 0
    """Units that have come or gone since this was written to the cache."""

    @classmethod
    def none(cls, dataset: Dataset) -> _Rows:
        rows = _no_rows(dataset)
        return cls(_Columns(rows), 0, rows, {}, {}, tidy=True, saved=False)

    def only(self, units: Mapping[str, str]) -> _Rows:
        """The rows of units that are there and have not changed."""
        if self.stamps == units:
            return self
        gone = {name for name, stamp in self.stamps.items() if units.get(name) != stamp}
        return replace(self.without(gone), unsaved=self.unsaved + len(gone))

    def without(self, names: Collection[str]) -> _Rows:
        """The rows of other units."""
        if not names:
            return self
        stamps = {name: stamp for name, stamp in self.stamps.items() if name not in names}
        places = {name: self.places[name] for name in stamps}
        return replace(self, stamps=stamps, places=places, tidy=False, saved=False)

    def plus(self, read: _Read, units: Mapping[str, str]) -> _Rows:
        """These rows and those of units just read."""
        if not read.counts:
            return self
        start = self.base_rows + self.fresh.num_rows
        stamps, places = dict(self.stamps), dict(self.places)
        for name, rows in read.counts.items():
            stamps[name], places[name] = units[name], (start, rows)
            start += rows
        fresh = pa.concat_tables([self.fresh, read.table])
        unsaved = self.unsaved + len(read.counts.keys() - read.broken)
        return replace(
            self,
            fresh=fresh,
            stamps=stamps,
            places=places,
            tidy=False,
            saved=False,
            unsaved=unsaved,
        )

    def table(self, columns: Sequence[str], names: Collection[str] | None = None) -> pa.Table:
        """The rows of units, or of all, in the order of the units' names.

        Raises:
            OSError, pa.ArrowException: If the cache is damaged.
        """
        everything = names is None or len(names) == len(self.places)
        base = self.base.table(columns)
        if everything and self.tidy:
            return base
        units = [self.places[name] for name in sorted(self.places if names is None else names)]
        starts = np.array([start for start, _ in units], dtype=np.int64)
        counts = np.array([rows for _, rows in units], dtype=np.int64)
        ends = np.cumsum(counts)
        total = int(ends[-1]) if units else 0
        rows = np.arange(total) + np.repeat(starts - (ends - counts), counts)
        return _take(pa.concat_tables([base, self.fresh.select(columns)]), rows)

    def tidied(self, dataset: Dataset) -> _Rows:
        """The same rows, without any left over, in order."""
        table = self.table(dataset.schema.names).combine_chunks()
        stamps = {name: self.stamps[name] for name in sorted(self.stamps)}
        places = _places(stamps, [self.places[name][1] for name in stamps])
        base, none = _Columns(table), _no_rows(dataset)
        return _Rows(base, table.num_rows, none, stamps, places, tidy=True, saved=False)

    def to_bytes(self, dataset: Dataset) -> bytes:
        """The cache file, of rows that are tidy."""
        index = {
            "names": list(self.stamps),
            "stamps": list(self.stamps.values()),
            "rows": [rows for _, rows in self.places.values()],
        }
        words = [one.name for one in dataset.schema if pa.types.is_string(one.type)]
        table = self.base.table(dataset.schema.names)
        index_ = {"units": json.dumps(index)}
        return _parquet(dataset, table, index_, use_dictionary=words, described=True)

    @classmethod
    def from_file(cls, dataset: Dataset, source: str | pa.NativeFile) -> _Rows:
        """Back from `to_bytes`; raises whatever a file that is not one raises."""
        # Not mapped, which is no quicker: it is read for as long as the ledger is open, and where
        # another client of NFS has replaced it, a page that is gone would end the process (SIGBUS).
        file = pq.ParquetFile(source, page_checksum_verification=True)
        meta = file.metadata.metadata
        told = json.loads(meta[b"units"])
        stamps = dict(zip(told["names"], told["stamps"], strict=True))
        places = _places(stamps, told["rows"])
        rows = file.metadata.num_rows
        if sum(told["rows"]) != rows:
            raise ValueError("its index is not that of its rows")
        schema = file.schema_arrow.remove_metadata()
        if int(meta[b"schema_version"]) != dataset.version or schema != dataset.schema:
            raise ValueError("of another version")
        none = _no_rows(dataset)
        return cls(_Columns(file), rows, none, stamps, places, tidy=True, saved=True)


def _places(names: Iterable[str], counts: Sequence[int]) -> dict[str, tuple[int, int]]:
    """First rows and numbers of rows of units that lie one after another."""
    ends = itertools.accumulate(counts, initial=0)
    return dict(zip(names, zip(ends, counts, strict=False), strict=True))


def _units_of(rows: _Rows, ids: Collection[str] | None) -> list[str] | None:
    return None if ids is None else [name for name in rows.places if _owner(name) in ids]


def _raise(problems: Sequence[str]) -> None:
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise LedgerError("\n".join([*problems[:SHOWN], *more]))


def _cache(dataset: Dataset) -> str:
    return f"cache/{dataset.name}.parquet"


def _stamp(entries: Sequence[Entry]) -> str:
    """One stamp for many files."""
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:16]


_DATASETS: Mapping[str, Dataset] = {dataset.name: dataset for dataset in (TRIALS, FAILURES, CURVES)}
_OURS = re.compile(
    r"trials/[0-9a-f]{12}\.parquet"
    r"|failures/[0-9a-f]{12}-[\w.]+\.parquet"
    r"|curves/[0-9a-f]{12}/[\w.]+-\d{6}\.parquet",
    re.ASCII,
)
_FOLDER = re.compile("curves/[0-9a-f]{12}", re.ASCII)
_BLOB = re.compile(
    r"(?:states|backbones)/[0-9a-f]{12}\.safetensors"
    r"|states/[0-9a-f]{12}/\d{12}-[\w.]+\.safetensors",
    re.ASCII,
)


_NOTE = re.compile(
    r"notes/[a-z0-9][a-z0-9._-]*/(?:families|readings|generations)/[\w.-]+\.json", re.ASCII
)


def written(note: Mapping[str, Any]) -> bytes:
    """Return a note on a sweep's claims as it lies in a ledger."""
    return json.dumps(note, separators=(",", ":"), sort_keys=True).encode()


def is_object(name: str) -> bool:
    """Whether it is the name of an object of a ledger that belongs to a trial or to claims."""
    return bool(_OURS.fullmatch(name) or _BLOB.fullmatch(name) or _NOTE.fullmatch(name))


def upgraded(name: str, data: bytes) -> bytes:
    """A file of rows in the schema of today, in which columns that it lacks are empty.

    Anything else, and a file of that schema, comes back as it is.

    Args:
        name: Its name in the ledger.
        data: Its content, which is whole.
    """
    dataset = _DATASETS.get(name.split("/")[0])
    if dataset is None:
        return data
    version = pq.read_metadata(pa.BufferReader(data)).metadata[b"schema_version"]
    if int(version) == dataset.version:
        return data
    return _parquet(dataset, _decode(dataset, name, data), {}, use_dictionary=False)


def _check_whole(name: str, data: bytes) -> None:
    """Look at all of an object.

    Raises:
        _DamagedError: If it is not what it should be.
    """
    dataset = _DATASETS.get(name.split("/")[0])
    if dataset is not None:
        _decode(dataset, name, data)
        return
    if name.startswith("notes/"):
        try:
            sound = isinstance(json.loads(data), dict)
        except ValueError:
            sound = False
        if not sound:
            raise _DamagedError("is no JSON object; delete it: a note on claims is lost with it")
        return
    # safetensors: the length of a JSON header, the header, and then what it tells of.
    try:
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        ends = [one["data_offsets"][1] for key, one in header.items() if key != "__metadata__"]
        whole = len(data) == begin + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        whole = False
    if not whole:
        raise _DamagedError("is no whole safetensors file; delete it, and the trial makes it again")


def _owner(name: str) -> str:
    """The id of the trial that an object belongs to."""
    return name.split("/")[1][:12]


def _blob(kind: Literal["states", "backbones"], trial_id: str) -> str:
    return f"{kind}/{_checked(trial_id)}.safetensors"


def _checked(trial_id: str) -> str:
    if not _ID.fullmatch(trial_id):
        raise ValueError(f"{trial_id!r} is no trial id (12 hex digits)")
    return trial_id


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
    dataset: Dataset,
    table: pa.Table,
    metadata: Mapping[str, str],
    *,
    use_dictionary: bool | list[str],
    described: bool = False,
) -> bytes:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        table.schema,
        use_dictionary=use_dictionary,
        write_statistics=False,
        write_page_checksum=True,
        # Parquet's own types say all, and the copy would be 4 kB a file: it has what columns mean.
        store_schema=described,
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
    columns = [
        table.column(one.name)
        if dataset.added.get(one.name, 1) <= version
        else pa.nulls(table.num_rows, one.type)
        for one in dataset.schema
    ]
    return pa.table(columns, schema=dataset.schema)


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
