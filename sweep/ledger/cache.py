"""Reading rows. Small files are right for writing and slow to read: a cache holds what they held.

A cache is rows with the names and stamps of the units that they came from, a file each or, of
curves, the folder of a trial. A unit whose stamp differs is read again, one that is gone is
forgotten; a cache that cannot be read or written costs time and nothing else. Only those of its
columns are read that are asked for.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sweep.ledger.datasets import (
    CURVES,
    FAILURES,
    SEGMENT,
    TRIALS,
    Dataset,
    is_rows,
    is_segment,
    is_unit,
    owner,
)
from sweep.ledger.parquet import (
    DamagedError,
    decode,
    latest,
    no_rows,
    ranks,
    settled,
    take,
    to_parquet,
)
from sweep.ledger.segments import Columns, Segment
from sweep.ledger.storage import Entry, Folder, LedgerError, Storage

T = TypeVar("T")

FEW = 32
"""Trials up to which their own files are read, rather than a cache of all."""

BATCH = 1000
"""Files that are read before their rows are put together."""


class RowCache:
    """The rows of one dataset of a ledger, as they lie there at each call.

    They lie in files of one trial each, and in segments. Whoever moves rows from the one to the
    other writes the segment first; so here files are read first, and then segments are looked for.
    What is in both counts once: of trials what a segment has, which was there first, and of all
    else what a file has, which came later.
    """

    def __init__(self, storage: Storage, dataset: Dataset) -> None:
        self._storage = storage
        self.dataset = dataset
        self._name = f"cache/{dataset.name}.parquet"
        self._known: _Rows | None = None
        self._opened: dict[tuple[str, Entry], Segment] = {}
        self._still = False
        self._units_then: dict[str, str] | None = None
        self._ids_then: tuple[frozenset[str], tuple[str, ...]] | None = None
        """Of a snapshot: what was there when it was first looked at."""

    def snapshot(self) -> RowCache:
        """Return these rows as they lie there when first looked at."""
        still = copy.copy(self)
        still._still = True
        return still

    def ids(self) -> frozenset[str]:
        """Return the ids of the trials that have rows.

        Raises:
            LedgerError: If a segment is damaged, so that nobody knows.
        """
        ids, problems = self._ids()
        if problems:
            raise LedgerError("\n".join(problems))
        return ids

    def _ids(self) -> tuple[frozenset[str], tuple[str, ...]]:
        if self._ids_then is not None:
            return self._ids_then
        units = self._units()
        segments, problems = self.segments()
        trials = (one.places for one in segments.values())
        found = frozenset(map(owner, units)).union(*trials), problems
        if self._still:
            self._ids_then = found
        return found

    def table(
        self, ids: Collection[str] | None, columns: Sequence[str] | None
    ) -> tuple[pa.Table, tuple[str, ...]]:
        """Return the rows of some trials, or of all, and what is wrong with files.

        Args:
            ids: Only these; one that has no row is left out.
            columns: Only these, in this order.
        """
        columns = self.dataset.schema.names if columns is None else columns
        wanted = None if ids is None else frozenset(ids)
        if self._still:
            then, _ = self._ids()
            wanted = then if wanted is None else wanted & then
        if wanted is not None and len(wanted) <= FEW and self.dataset is not FAILURES:
            read = self._fetch([self.dataset.unit(trial) for trial in sorted(wanted)])
            there = frozenset(owner(unit) for unit in read.counts)
            return self._united(
                lambda names: read.table.select(names), there, wanted, columns, self._told(read)
            )
        return self._undamaged(lambda: self._chosen(wanted, columns))

    def file(self) -> tuple[Path | None, tuple[str, ...]]:
        """Return the Parquet file that holds just these rows, in their order, if there is one; and
        what is wrong with files.
        """
        rows, problems = self._undamaged(lambda: self._read(None))
        segments, damaged = self.segments()
        if not isinstance(self._storage, Folder) or self._still:
            return None, problems + damaged
        name = self._name if rows.saved and not segments else None
        if len(segments) == 1 and not rows.places:
            name = next((name for name, one in segments.items() if one.distinct), None)
        return None if name is None else self._storage.root / name, problems + damaged

    def damaged(self) -> tuple[str, ...]:
        """Return what is wrong with files that cannot be read, and what to do."""
        problems = self._undamaged(lambda: self._read(None))[1]
        segments, damaged = self.segments()
        return problems + damaged + self._problems(segments, lambda one: one.check())

    def segments(self) -> tuple[dict[str, Segment], tuple[str, ...]]:
        """Return the segments that there are, by name, and what is wrong with others."""
        found: dict[tuple[str, Entry], Segment] = {}
        problems = []
        for name, entry in self._storage.beginning(self.dataset.name, SEGMENT).items():
            if not is_segment(name):
                continue
            try:
                key = (name, entry)
                if (one := self._opened.get(key) or self._open(name)) is not None:
                    found[key] = one
            except DamagedError as error:
                problems.append(f"{self._storage.where(name)}: {error}")
        self._opened = found
        return {name: one for (name, _), one in found.items()}, tuple(problems)

    def sound_segments(self) -> dict[str, Segment]:
        """Return the segments that there are, by name.

        Raises:
            LedgerError: If one is damaged, or the storage fails.
        """
        segments, problems = self.segments()
        if problems:
            raise LedgerError("\n".join(problems))
        return segments

    def _open(self, name: str) -> Segment | None:
        if isinstance(self._storage, Folder):
            return Segment(self.dataset, str(self._storage.root / name))
        data = self._storage.get(name)
        return None if data is None else Segment(self.dataset, pa.BufferReader(data))

    def _problems(
        self, segments: Mapping[str, Segment], look: Callable[[Segment], object]
    ) -> tuple[str, ...]:
        """Look at segments, and return what is wrong with those that turn out to be damaged."""
        problems = []
        for name, one in segments.items():
            try:
                look(one)
            except DamagedError as error:
                problems.append(f"{self._storage.where(name)}: {error}")
        return tuple(problems)

    def _chosen(
        self, ids: frozenset[str] | None, columns: Sequence[str]
    ) -> tuple[pa.Table, tuple[str, ...]]:
        rows, problems = self._read(ids)
        units = _units_of(rows, ids)
        there = frozenset(owner(unit) for unit in (rows.places if units is None else units))
        return self._united(lambda names: rows.table(names, units), there, ids, columns, problems)

    def _united(
        self,
        files: Callable[[Sequence[str]], pa.Table],
        there: frozenset[str],
        ids: frozenset[str] | None,
        columns: Sequence[str],
        problems: tuple[str, ...],
    ) -> tuple[pa.Table, tuple[str, ...]]:
        """Return rows of files and of segments, in order, and what is wrong with either.

        Args:
            files: Gives columns of the rows of files.
            there: The trials that these are of.
            ids: The trials whose rows are wanted; None for all.
            columns: Those that are wanted.
            problems: What is wrong with files.
        """
        segments, damaged = self.segments()
        problems += damaged
        segments = {
            name: one
            for name, one in segments.items()
            if ids is None or any(trial in one.places for trial in ids)
        }
        if not segments:
            return files(columns), problems
        owners = [there, *(one.places for one in segments.values())]
        wanted = [[trial for trial in own if ids is None or trial in ids] for own in owners]
        shared = sum(map(len, wanted)) > len(frozenset().union(*wanted))
        more = (*self.dataset.one, *self.dataset.later) if shared else ("trial_id",)
        names = list(dict.fromkeys([*columns, *more]))
        tables: list[pa.Table] = []
        problems += self._problems(segments, lambda one: tables.append(one.counted(names, ids)))
        tables.append(files(names))
        if shared:
            # Of trials the first one written counts, of all else the last.
            ordered = tables[::-1] if self.dataset is TRIALS else tables
            return settled(self.dataset, pa.concat_tables(ordered)).select(columns), problems
        tables = [one for one in tables if one.num_rows] or tables[:1]
        spans = [(one["trial_id"][0].as_py(), one["trial_id"][-1].as_py()) for one in tables if one]
        if any(last > first for (_, last), (first, _) in itertools.pairwise(spans)):
            whole = pa.concat_tables(tables)
            order = np.argsort(ranks(whole.column("trial_id")), kind="stable")
            return take(whole, order).select(columns), problems
        return pa.concat_tables(tables).select(columns), problems

    def _undamaged(self, read: Callable[[], T]) -> T:
        """Read; where the cache turns out to be damaged, leave it aside and read once more."""
        try:
            return read()
        except (OSError, pa.ArrowException):
            self._known = _Rows.none(self.dataset)  # the file may have to stay
            with contextlib.suppress(LedgerError):
                self._storage.delete([self._name])
            return read()

    def _units(self) -> dict[str, str]:
        """Return what the rows come from, sorted by name, each with a stamp that changes with its
        content: files; of curves, the folders of trials.
        """
        if self._units_then is not None:
            return self._units_then
        name = self.dataset.name
        stamps = self._storage.stamps(name)
        if stamps is not None:
            units = {unit: stamp for unit, stamp in stamps.items() if is_unit(self.dataset, unit)}
        else:
            listed = self._storage.list(name).items()
            files = {file: entry for file, entry in listed if is_rows(file)}
            if self.dataset is not CURVES:
                units = {file: f"{size}-{at}" for file, (size, at) in files.items()}
            else:
                pieces: dict[str, list[Entry]] = {}
                for file, entry in files.items():
                    pieces.setdefault(file.rpartition("/")[0], []).append(entry)
                units = {unit: _stamp(entries) for unit, entries in pieces.items()}
        if self._still:
            self._units_then = units
        return units

    def _read(self, ids: Collection[str] | None) -> tuple[_Rows, tuple[str, ...]]:
        """Return the rows of today, or at least those of some trials, and what is wrong with files.

        Raises:
            OSError, pa.ArrowException: If the cache is damaged.
        """
        units = self._units()
        known = (self._known or self._cached()).only(units)
        new = [name for name in units if name not in known.places]
        read = self._fetch([name for name in new if ids is None or owner(name) in ids])
        full = known.plus(read, units)
        known = full.without(read.broken)
        # Rewriting the whole for each new row would cost more than it saves.
        if known.unsaved * 100 > len(known.places):
            known = self._saved(known)
            full = full if read.broken else known
        self._known = known
        return full, self._told(read)

    def _told(self, read: _Read) -> tuple[str, ...]:
        return tuple(f"{self._storage.where(name)}: {why}" for name, why in read.damaged.items())

    def _fetch(self, units: Sequence[str]) -> _Read:
        """Read the files of units; one that has vanished is left out."""
        dataset = self.dataset
        pairs = [(unit, unit) for unit in units]
        if dataset is CURVES:
            listed = ((unit, self._storage.list(unit)) for unit in units)
            pairs = [(unit, file) for unit, files in listed for file in files if is_rows(file)]

        def attempt(pair: tuple[str, str]) -> pa.Table | str | None:
            try:
                data = self._storage.get(pair[1])
                return None if data is None else decode(dataset, pair[1], data)
            except DamagedError as error:
                return str(error)

        read = _Read(dataset)
        with ThreadPoolExecutor(self._storage.threads) as pool:
            for start in range(0, len(pairs), BATCH):
                batch = pairs[start : start + BATCH]
                read.add(zip(batch, pool.map(attempt, batch), strict=True))
        return read.whole()

    def _cached(self) -> _Rows:
        dataset = self.dataset
        try:
            if isinstance(self._storage, Folder):
                return _Rows.from_file(dataset, str(self._storage.root / self._name))
            data = self._storage.get(self._name)
            return _Rows.from_file(dataset, pa.BufferReader(data)) if data else _Rows.none(dataset)
        except (LedgerError, OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            return _Rows.none(dataset)

    def _saved(self, rows: _Rows) -> _Rows:
        rows = rows.tidied(self.dataset)
        # A reader may have no right to write, or no room: it reads the files next time.
        with contextlib.suppress(LedgerError):
            self._storage.put(self._name, rows.to_bytes(self.dataset))
            return replace(rows, saved=True)
        return rows


class _Read:
    """What was read of files. Tables of one row take forty times the room of their content, so
    that they are put together as they come.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.table = no_rows(dataset)
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
        """Return all of it, as one table."""
        self.table = pa.concat_tables([self.table, *self._parts]).combine_chunks()
        self._parts = []
        if self.dataset is CURVES and self.counts:  # Some points may have been written twice.
            self.table = latest(self.table)
            rank = ranks(self.table.column("trial_id"))
            self.counts = dict(zip(self.counts, np.bincount(rank).tolist(), strict=True))
        return self


@dataclass(frozen=True)
class _Rows:
    """Rows with the units that they came from."""

    base: Columns
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
        rows = no_rows(dataset)
        return cls(Columns(rows), 0, rows, {}, {}, tidy=True, saved=False)

    def only(self, units: Mapping[str, str]) -> _Rows:
        """Return the rows of units that are there and have not changed."""
        if self.stamps == units:
            return self
        gone = {name for name, stamp in self.stamps.items() if units.get(name) != stamp}
        return replace(self.without(gone), unsaved=self.unsaved + len(gone))

    def without(self, names: Collection[str]) -> _Rows:
        """Return the rows of all other units."""
        if not names:
            return self
        stamps = {name: stamp for name, stamp in self.stamps.items() if name not in names}
        places = {name: self.places[name] for name in stamps}
        return replace(self, stamps=stamps, places=places, tidy=False, saved=False)

    def plus(self, read: _Read, units: Mapping[str, str]) -> _Rows:
        """Return these rows and those of units just read."""
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
        """Return the rows of units, or of all, in the order of the units' names.

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
        return take(pa.concat_tables([base, self.fresh.select(columns)]), rows)

    def tidied(self, dataset: Dataset) -> _Rows:
        """Return the same rows, without any left over, in order."""
        table = self.table(dataset.schema.names).combine_chunks()
        stamps = {name: self.stamps[name] for name in sorted(self.stamps)}
        places = _places(stamps, [self.places[name][1] for name in stamps])
        base, none = Columns(table), no_rows(dataset)
        return _Rows(base, table.num_rows, none, stamps, places, tidy=True, saved=False)

    def to_bytes(self, dataset: Dataset) -> bytes:
        """Return the content of the cache file; the rows have to be tidy."""
        index = {
            "names": list(self.stamps),
            "stamps": list(self.stamps.values()),
            "rows": [rows for _, rows in self.places.values()],
        }
        words = [one.name for one in dataset.schema if pa.types.is_string(one.type)]
        table = self.base.table(dataset.schema.names)
        index_ = {"units": json.dumps(index)}
        return to_parquet(dataset, table, index_, use_dictionary=words, described=True)

    @classmethod
    def from_file(cls, dataset: Dataset, source: str | pa.NativeFile) -> _Rows:
        """Load what `to_bytes` made; raises whatever another file raises."""
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
        none = no_rows(dataset)
        return cls(Columns(file), rows, none, stamps, places, tidy=True, saved=True)


def _places(names: Iterable[str], counts: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Return the first row and the number of rows of each unit, one after another."""
    ends = itertools.accumulate(counts, initial=0)
    return dict(zip(names, zip(ends, counts, strict=False), strict=True))


def _units_of(rows: _Rows, ids: Collection[str] | None) -> list[str] | None:
    return None if ids is None else [name for name in rows.places if owner(name) in ids]


def _stamp(entries: Sequence[Entry]) -> str:
    """Return one stamp for many files."""
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:16]
