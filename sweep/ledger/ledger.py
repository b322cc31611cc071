"""The ledger: what was trained, with what outcome.

    results/trials/<trial>.parquet                      one row; there = the trial is done
    results/failures/<trial>-<attempt>.parquet          one row an attempt that failed
    results/curves/<trial>/<attempt>-<segment>.parquet  a piece of a curve
    results/.../segment-<number>.parquet                rows of many trials: see `compaction`
    results/states/<trial>/<step>-<attempt>.safetensors what a trial resumes from
    results/states/<trial>.safetensors                  its end, where its tensors are kept
    results/backbones/<trial>.safetensors               what a pretraining trained
    results/logs/<trial>/<attempt>.txt                  what an attempt at it printed
    results/identity.json                               which ledger it is, to others
    results/leases/<name>/<epoch>.json                  see `sweep.ledger.leases`
    results/cache/<dataset>.parquet                     derived; may be deleted at any time
    and notes on sweeps and their runs                  see `sweep.ledger.notes`

A row is committed by create-if-absent and is never rewritten: the first commit wins, until somebody
forgets it on purpose (`Ledger.forget`). How rows are read is `sweep.ledger.cache`'s.
"""

from __future__ import annotations

import contextlib
import copy
import json
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fpt.files import cache_folder
from sweep.ledger.cache import RowCache
from sweep.ledger.causes import MARKS, RESETS
from sweep.ledger.columns import METRICS, unfolded
from sweep.ledger.compaction import Compacted, add, compact, parts, take_out
from sweep.ledger.datasets import (
    CURVES,
    DATASETS,
    FAILURES,
    KEPT,
    KINDS,
    TRIALS,
    Dataset,
    Kept,
    Kind,
    Name,
    blob,
    checked,
    is_object,
    is_segment,
    owner,
    segment,
)
from sweep.ledger.leases import Lease, Leases
from sweep.ledger.notes import RunNotes
from sweep.ledger.parquet import DamagedError, check_whole, encode, one_file, take
from sweep.ledger.reservations import Reservations
from sweep.ledger.segments import packed
from sweep.ledger.storage import Entry, Folder, LedgerError, open_storage

__all__ = [
    "CURVES",
    "FAILURES",
    "TRIALS",
    "AlreadyOurs",
    "Committed",
    "Dataset",
    "Kept",
    "Kind",
    "Lease",
    "Ledger",
    "LedgerError",
    "TakenBy",
    "is_object",
    "new_attempt",
]

SHOWN = 20
"""Damaged files that one message names."""


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
    """Return a name for an attempt at a trial: unique, and sorted by time."""
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
        self.storage = open_storage(results)
        """The objects, without what they mean."""
        self._leases = Leases(self.storage)
        self._rows = {one.name: RowCache(self.storage, one) for one in DATASETS.values()}
        self.notes = RunNotes(self.storage)
        """On sweeps and their runs."""
        self._listed: dict[str, dict[str, Entry]] | None = None
        """Of a snapshot: folder -> its listing, once it was looked at."""
        if write:
            self.storage.check_writable()

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
        if not any(ledger.storage.holds(kind) for kind in (*KEPT, "leases")):
            folder = ledger.local
            meant = folder is not None and (folder / "results/trials").is_dir()
            hint = f"; did you mean {Path(results) / 'results'}?" if meant else ""
            raise LedgerError(
                f"{results}: no ledger: nothing was trained here{hint}; name a folder such as "
                "`results`, s3://, gs:// or az://"
            )
        if write:
            ledger.storage.check_writable()
        return ledger

    def snapshot(self) -> Ledger:
        """Return this ledger as it lies there when first looked at, only to be read.

        What is read of it several times agrees, and no folder is listed twice.
        """
        still = copy.copy(self)
        still._listed = {}
        still._rows = {name: rows.snapshot() for name, rows in self._rows.items()}
        return still

    def _list(self, prefix: str) -> dict[str, Entry]:
        if self._listed is None:
            return self.storage.list(prefix)
        if prefix not in self._listed:
            self._listed[prefix] = self.storage.list(prefix)
        return self._listed[prefix]

    @property
    def uri(self) -> str:
        """Absolute folder, or scheme://bucket/prefix: opens this ledger from anywhere."""
        return self.storage.uri

    @property
    def local(self) -> Path | None:
        """The folder, or None on object storage."""
        return self.storage.root if isinstance(self.storage, Folder) else None

    def identity(self) -> str:
        """Return what tells this ledger from all others, whatever it is called: 16 hex digits.

        It is made when it is first asked for. A copy of the folder has the same.

        Raises:
            LedgerError: If it can neither be read nor made.
        """
        name = "identity.json"
        data = self.storage.get(name)
        if data is None:
            self.storage.create(name, json.dumps({"ledger": secrets.token_hex(8)}).encode())
            data = self.storage.get(name) or b""
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return str(json.loads(data)["ledger"])
        raise LedgerError(
            f"{self.storage.where(name)}: damaged; delete it, and the ledger gets a new identity: "
            "`sweep mirror` then makes runs of its own"
        )

    def commit(self, row: Mapping[str, Any]) -> Commit:
        """Write the row of a trial that has ended, unless it has one; then the trial is done.

        Raises:
            ValueError: If the row does not fit the schema (a bug of the caller's).
        """
        name, data, trial = TRIALS.path(row), encode(TRIALS, [row]), row["trial_id"]
        while not self.storage.create(name, data):
            if (by := self._committed_by(trial)) is not None:  # else it was deleted since
                return AlreadyOurs() if by == row.get("attempt") else TakenBy(by)
        # Whoever compacts writes the segment before the file goes: where the file of an earlier row
        # was gone just now, its segment is there.
        segments, _ = self._rows["trials"].segments()
        if not any(trial in one.places for one in segments.values()):
            return Committed()
        by = self._committed_by(trial) or ""
        if by == row.get("attempt"):
            return AlreadyOurs()
        self.storage.delete([name])
        return TakenBy(by)

    def committed_by(self, trial_id: str) -> str | None:
        """Return the attempt that wrote the row of a trial; None: it has none."""
        return self._committed_by(trial_id) or None

    def _committed_by(self, trial_id: str) -> str | None:
        # "" of a row that does not say it.
        found: list[str | None] = self.trials([trial_id], columns=["attempt"])[
            "attempt"
        ].to_pylist()
        return (found[0] or "") if found else None

    def recommit(self, row: Mapping[str, Any]) -> None:
        """Write a row over the one that there is, of a trial that was trained anew on purpose.

        Raises:
            ValueError: If the row does not fit the schema (a bug of the caller's).
        """
        self.storage.put(TRIALS.path(row), encode(TRIALS, [row]))

    def done(self) -> set[str]:
        """Return the ids of the trials that have a row."""
        return set(self._rows["trials"].ids())

    def trials(
        self,
        ids: Collection[str] | None = None,
        *,
        columns: Sequence[str] | None = None,
        strict: bool = True,
    ) -> pa.Table:
        """Return the rows of trials that have ended, in the order of their ids.

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
        data = encode(FAILURES, [row])
        self.storage.put(FAILURES.path(row), data)

    def reset_failures(self, ids: Collection[str]) -> None:
        """Mark trials so that their failures up to now no longer count, and they run again."""
        self._mark(ids, "retried")

    def _mark(self, ids: Collection[str], cause: str, message: str | None = None) -> None:
        # What is noted of trials after all that is noted of them.
        if not ids:
            return
        noted = self.failures(ids, columns=["trial_id", "at"]).sort_by("at").to_pylist()
        last = {row["trial_id"]: row["at"] for row in noted}
        for trial_id in ids:
            at = datetime.now(UTC)
            if trial_id in last:  # by the clock of its node, which may be ahead of ours
                at = max(at, last[trial_id] + timedelta(microseconds=1))
            row = {"trial_id": trial_id, "attempt": new_attempt(), "cause": cause}
            self.fail({**row, "at": at, "message": message})

    def failures(
        self,
        ids: Collection[str] | None = None,
        *,
        columns: Sequence[str] | None = None,
        strict: bool = True,
    ) -> pa.Table:
        """Return all failed attempts, by trial and then time; arguments and errors as `trials`."""
        return self._read(FAILURES, ids, columns, strict=strict)

    def last_failures(self, ids: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
        """Return trial -> cause, exception, message of its last failure, if not forgiven since.

        Raises:
            LedgerError: As `failures`.
        """
        last = self.last_notes(ids)
        return {trial: row for trial, row in last.items() if row["cause"] not in MARKS}

    def last_notes(self, ids: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
        """Return trial -> cause, exception, message, at (a time in UTC) of the last that is noted
        of it and still counts: a failure, or the mark that its row was forgotten.

        Raises:
            LedgerError: As `failures`.
        """
        names = ["trial_id", "cause", "exception", "message", "at"]
        # By time, not by the names of attempts: a mark of `sweep retry` is named in its own way.
        rows = self.failures(ids, columns=names).sort_by("at").to_pylist()
        last: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row["cause"] == "forgotten" or row["cause"] not in MARKS:
                last[row["trial_id"]] = row
            elif row["cause"] in RESETS:
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
            rows: step, split, loss, accuracy, seconds, examples, metrics of each point; none is
                no piece.

        Raises:
            ValueError: If a row does not fit the schema (a bug of the caller's).
        """
        if rows:
            key = {"trial_id": trial_id, "attempt": attempt, "segment": segment}
            data = encode(CURVES, [{**row, **key} for row in rows])
            self.storage.put(CURVES.path(key), data)

    def curves(
        self,
        ids: Collection[str] | None = None,
        *,
        columns: Sequence[str] | None = None,
        strict: bool = True,
    ) -> pa.Table:
        """Return the curves of trials, by trial, split and step; arguments and errors as `trials`.

        Where attempts overlap, the last value of a (trial_id, split, step) counts.
        """
        return self._read(CURVES, ids, columns, strict=strict)

    def scan(self, name: Name) -> Path | pa.Table:
        """Return all rows of a dataset, for a reader that asks for columns itself.

        As `trials`, `failures` and `curves` give them: the Parquet file of the cache, where that
        holds just these rows.

        Raises:
            LedgerError: As `trials`.
        """
        file, problems = self._rows[name].file()
        _raise(problems)
        return file or self._read(DATASETS[name], None, None, strict=True)

    def damaged(self, name: Name = "trials") -> tuple[str, ...]:
        """Return what is wrong with files, and what to do; one message a file."""
        return self._rows[name].damaged()

    def put_state(self, trial_id: str, data: bytes) -> None:
        """Keep the end of a trial; what it could resume from is forgotten with it."""
        self.storage.put(blob("states", trial_id), data)
        self.storage.delete(self._saved(trial_id))

    def save_state(self, trial_id: str, data: bytes, *, step: int, attempt: str) -> None:
        """Save what a running trial resumes from.

        The furthest state counts, whoever wrote it: a worker that was cut off and comes back late
        takes nothing back.
        """
        name = f"states/{checked(trial_id)}/{step:012d}-{attempt}.safetensors"
        self.storage.put(name, data)
        self.storage.delete(one for one in self._saved(trial_id) if one < name)

    def saved_states(self, trial_id: str) -> Iterator[bytes]:
        """Yield the end of a trial, if it is kept, and what it saved on the way, furthest first."""
        before: list[str] = []
        while True:
            names, found = self._saved(trial_id), False
            for name in (blob("states", trial_id), *reversed(names)):
                if (data := self.storage.get(name)) is not None:
                    found = True
                    yield data
            # All that was listed is gone: somebody saved a further one, or the end, meanwhile.
            if found or names == before:
                return
            before = names

    def drop_state(self, trial_id: str) -> None:
        """Forget what a trial resumes from, and its end."""
        self.storage.delete([blob("states", trial_id), *self._saved(trial_id)])

    def _saved(self, trial_id: str) -> list[str]:
        """Return what a trial saved on the way, the furthest last."""
        return sorted(self.storage.list(f"states/{checked(trial_id)}"))

    def states(self) -> set[str]:
        """Return the ids of the trials that have a saved state."""
        return {owner(name) for name in self._list("states")}

    def put_backbone(self, trial_id: str, data: bytes) -> bool:
        """Keep the backbone that a trial trained. True if it was the first."""
        return self.storage.create(blob("backbones", trial_id), data)

    def backbones(self) -> set[str]:
        """Return the ids of the trials whose backbone is kept."""
        return {owner(name) for name in self._list("backbones")}

    def backbone_file(self, trial_id: str) -> Path:
        """Return a local file with the backbone that a trial trained; may be mapped, not written.

        On object storage it is fetched once for this machine, into FPT_SWEEP_CACHE (by default
        ~/.cache/fpt-sweep).

        Raises:
            LedgerError: If it is not kept, or there is no room for it.
        """
        name = blob("backbones", trial_id)
        path = self.storage.file(name, cache_folder() / "backbones")
        if path is None:
            raise LedgerError(
                f"{self.storage.where(name)}: missing; the trial {trial_id} has to train this "
                "backbone (again) first: run the sweep that names it under `backbones:`"
            )
        return path

    def names(self, kind: Kept) -> dict[str, list[str]]:
        """Return trial -> the names of its own objects in a folder, sorted: what `copy` takes."""
        out: dict[str, list[str]] = {}
        for name in self.storage.list(kind):
            if not is_object(name) or is_segment(name):
                continue
            out.setdefault(owner(name), []).append(name)
        return out

    def copy(self, name: str) -> bytes:
        """Return an object as it lies there, for another ledger to `import_object`.

        Raises:
            LedgerError: If it is not there, not whole, or of a newer schema.
        """
        data = self.storage.get(name)
        if data is None:
            raise LedgerError(f"{self.storage.where(name)}: missing; it was there a moment ago")
        try:
            check_whole(name, data)
        except DamagedError as error:
            raise LedgerError(f"{self.storage.where(name)}: {error}") from None
        return data

    def import_object(self, name: str, data: bytes) -> bool:
        """Write an object of another ledger, as `copy` gave it, unless there is one of its name.

        Returns:
            True if there was none.

        Raises:
            ValueError: If the name is none of a ledger's (a bug of the caller's).
        """
        if not is_object(name):
            raise ValueError(f"{name!r} is no object of a ledger")
        return self.storage.create(name, data)

    def import_rows(self, name: Name, table: pa.Table) -> None:
        """Write rows of another ledger, as `trials`, `failures` and `curves` give them.

        None of them may be there yet, of trials and of curves nothing of their trials. Those
        that may be written over go into files of their own (see `sweep.ledger.segments`).

        Raises:
            LedgerError: If the storage fails, or files of many trials are damaged.
        """
        dataset = DATASETS[name]
        if dataset is TRIALS:
            table, files = self._apart(table)
            for path, data in files.items():
                self.storage.create(path, data)
        for part in parts(dataset, table):
            add(self.storage, self._rows[name], part)

    def settled_objects(self, ids: Collection[str]) -> tuple[set[str], dict[str, bytes]]:
        """Return files of the rows of trials, as another ledger may hold them; the same ones from
        the same rows, however these lie here.

        Returns:
            The trials whose curves are among them: those that have ended. And name -> content of
            files of rows, of curves, and of notes of failures, which are those of all.

        Raises:
            LedgerError: If files are damaged.
        """
        rows = self.trials(ids)
        table, objects = self._apart(rows)
        settled = set(rows.column("trial_id").to_pylist())
        tables = (table, self.failures(ids), self.curves(settled))
        for dataset, one in zip((TRIALS, FAILURES, CURVES), tables, strict=True):
            objects |= {
                segment(dataset, number): packed(dataset, part)
                for number, part in enumerate(parts(dataset, one), 1)
            }
        return settled, objects

    def _apart(self, rows: pa.Table) -> tuple[pa.Table, dict[str, bytes]]:
        """Return rows of trials that go into segments, and the files of the others, by name."""
        codes = rows.column("own_code").to_pylist()
        alone = [number for number, code in enumerate(codes) if code is not None]
        kept = [number for number, code in enumerate(codes) if code is None]
        files = {}
        for number in alone:
            one = rows.slice(number, 1)
            files[TRIALS.path(one.select(["trial_id"]).to_pylist()[0])] = one_file(TRIALS, one)
        return take(rows, np.array(kept, dtype=np.int64)) if alone else rows, files

    def drop_leftovers(self) -> None:
        """Remove the curves of trials that were to come with rows, from a merge that was killed."""
        done = self.done()
        segments, _ = self._rows["curves"].segments()
        self.storage.delete(name for name, one in segments.items() if done.isdisjoint(one.places))

    def put_log(self, trial_id: str, attempt: str, text: str) -> None:
        """Keep what an attempt at a trial has printed so far; a second time takes its place."""
        self.storage.put(f"logs/{checked(trial_id)}/{attempt}.txt", text.encode())

    def logs(self, trial_id: str) -> dict[str, str]:
        """Return what attempts at a trial have printed, by attempt, the oldest first."""
        found: dict[str, str] = {}
        for name in self.storage.list(f"logs/{checked(trial_id)}"):
            if (data := self.storage.get(name)) is not None:
                found[name.rpartition("/")[2].removesuffix(".txt")] = data.decode(errors="replace")
        return found

    def lease(self, name: str, *, ttl: float = 30.0) -> Lease | None:
        """Take a lease, or None: somebody else holds it (see `sweep.ledger.leases`).

        Never waits. A holder that died elsewhere is known by its silence alone: ask this same
        object again until `ttl` seconds have passed.
        """
        return self._leases.acquire(name, ttl=ttl)

    def holder(self, name: str) -> dict[str, Any] | None:
        """Return who holds a lease: host, pid, since, epoch; None if nobody is known to."""
        return self._leases.holder(name)

    def holders(self, prefix: str) -> list[dict[str, Any]]:
        """Return who holds the leases whose names begin with a prefix."""
        names = {name.split("/")[1] for name in self.storage.list("leases")}
        found = (self._leases.holder(name) for name in sorted(names) if name.startswith(prefix))
        return [holder for holder in found if holder is not None]

    def reservations(self, lease: Lease) -> Reservations:
        """Return what a driver that holds a lease trains: others leave it to that one."""
        return Reservations(self.storage, self._leases, lease)

    def usage(self) -> dict[Kind, tuple[int, int]]:
        """Return the objects and bytes of each folder."""
        listings = {kind: self.storage.list(kind).values() for kind in KINDS}
        return {kind: (len(all_), sum(e.size for e in all_)) for kind, all_ in listings.items()}

    def compact(self, *, at_least: int = 0) -> Compacted:
        """Put what finished trials left in files of their own into few large ones.

        Readers see the same rows before, meanwhile and after; it may be killed at any time, and run
        beside drivers and other compactions. See `sweep.ledger.compaction`.

        Args:
            at_least: Trials for which it pays; of fewer, nothing is done.

        Raises:
            LedgerError: If the storage fails, or files of many trials are damaged.
        """
        return compact(self.storage, self._rows, at_least=at_least)

    def remove(self, kind: Kind, ids: Collection[str] | None = None) -> int:
        """Remove objects of a folder for good, and say how many.

        Args:
            kind: Any folder but `trials`: finished trials go one by one (`forget`).
            ids: Trials whose objects go (of leases: names); None for all.

        Raises:
            ValueError: If kind is `trials`.
        """
        if kind == "trials":
            raise ValueError("rows of finished trials go one by one: see forget")
        wanted = None if ids is None else set(ids)
        names = [
            name
            for name in self.storage.list(kind)
            if wanted is None or (name.split("/")[1] if kind == "leases" else owner(name)) in wanted
        ]
        self.storage.delete(names)
        return len(names)

    def forget(self, trial_id: str) -> bool:
        """Discard the row of a finished trial, its curve, state and backbone; True if it had one.

        A mark among its failures is written first and stays. The row goes last: who is killed
        before has it still, and the same call goes on. The next row of the trial counts as the
        first one did. No run and no compaction may be at work meanwhile.

        Raises:
            LedgerError: If the storage fails, files of many trials are damaged, or another process
                forgets a trial at this moment.
        """
        lease = self.lease("forget")
        if lease is None:
            raise LedgerError(f"{self.uri}: another process forgets a trial; wait until it has")
        with lease:
            found = self.trials([checked(trial_id)], columns=["attempt", "finished_at"]).to_pylist()
            if not found:
                return False
            what = f"row of attempt {found[0]['attempt']}, finished {found[0]['finished_at']}"
            self._mark([trial_id], "forgotten", what)
            self.drop_state(trial_id)  # else the next attempt would go on from it
            pieces = self.storage.list(CURVES.unit(trial_id))
            self.storage.delete([blob("backbones", trial_id), *pieces])
            take_out(self.storage, self._rows["curves"], trial_id)
            # Of a row in both, that of the segment counts.
            self.storage.delete([TRIALS.unit(trial_id)])
            take_out(self.storage, self._rows["trials"], trial_id)
        return True

    def _read(
        self,
        dataset: Dataset,
        ids: Collection[str] | None,
        columns: Sequence[str] | None,
        *,
        strict: bool,
    ) -> pa.Table:
        stored = columns
        if columns is not None and (own := set(columns) - set(dataset.schema.names)):
            # Metrics of a task's own, which one column holds.
            stored = [*dict.fromkeys((*(one for one in columns if one not in own), METRICS))]
        table, problems = self._rows[dataset.name].table(ids, stored)
        if strict:
            _raise(problems)
        return table if stored is columns else unfolded(table, columns)


def _raise(problems: Sequence[str]) -> None:
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise LedgerError("\n".join([*problems[:SHOWN], *more]))
