"""Compaction: what finished trials left in files of their own goes into segments.

Of each dataset, again and again until nothing is left to do:

1. The files are listed, and after them the segments.
2. What a segment has already is deleted: somebody was killed between steps 5 and 6.
3. The rows of other files are read and put in order.
4. The segment is made, and checked before it is written.
5. It is written by create-if-absent, under the number after the highest that was seen in 1. Where
   that number is taken, somebody else has compacted meanwhile: on with 1.
6. It is read back, and only then the files whose rows it has are deleted.

So at any moment each row is in a file or in a segment, and after a kill in both at worst, of which
readers take one. No lease is needed: two compactions at once cannot write one row twice, since the
later one of two with the same number fails, and one with a later number has seen what the earlier
one wrote. No clock is read, and one that slept for a year may wake up and go on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from sweep.ledger.cache import RowCache
from sweep.ledger.datasets import SEGMENT, TRIALS, Dataset, Name, is_rows, owner, segment
from sweep.ledger.parquet import DamagedError, decode, in_order
from sweep.ledger.segments import Segment, packed
from sweep.ledger.storage import Entry, LedgerError, Storage

MOST = {"trials": 25_000, "failures": 100_000, "curves": 500_000}
"""Rows of a segment: those of the trial with which it has as many are the last. It is read whole
where a bucket holds it."""

BATCH = 500
"""Trials whose files are read before it is asked whether they fill a segment."""


@dataclass(frozen=True)
class Compacted:
    """What a compaction did."""

    trials: int = 0
    """Whose rows went into segments."""
    files: int = 0
    """That are gone."""
    segments: int = 0
    """That were written."""

    def __add__(self, other: Compacted) -> Compacted:
        return Compacted(
            self.trials + other.trials, self.files + other.files, self.segments + other.segments
        )


def compact(storage: Storage, rows: Mapping[Name, RowCache], *, at_least: int = 0) -> Compacted:
    """Put the rows, curves and notes of failures of finished trials into segments.

    Rows that code of the user's own gave may be written over, and stay with all that is theirs
    where they are; so do files that are damaged.

    Args:
        storage: Where the ledger lies.
        rows: The readers of its datasets.
        at_least: Finished trials with files of their own for which it pays; else nothing is done.

    Raises:
        LedgerError: If the storage fails, or a segment is damaged. What was done until then stays;
            another call goes on.
    """
    single = {owner(name) for name in storage.list(TRIALS.name) if is_rows(name)}
    if len(single) < at_least:
        return Compacted()
    table, _ = rows["trials"].table(None, ["trial_id", "own_code"])
    done = zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True)
    settled = {str(trial) for trial, code in done if code is None}
    if len(single & settled) < at_least:
        return Compacted()
    everything = Compacted()
    # Rows last, as in training: who is killed before has still what finds the others.
    for name in ("curves", "failures", "trials"):
        done_one = _compact(storage, rows[name], settled)
        counted = done_one.trials if name == "trials" else 0
        everything += Compacted(counted, done_one.files, done_one.segments)
    return everything


def _compact(storage: Storage, rows: RowCache, settled: Collection[str]) -> Compacted:
    dataset = rows.dataset
    total = Compacted()
    while True:
        listed = storage.list(dataset.name)
        files = {
            name: entry
            for name, entry in listed.items()
            if is_rows(name) and owner(name) in settled
        }
        segments = rows.sound_segments()
        covered, changed = _covered(storage, dataset, files, list(segments.values()))
        total += Compacted(files=_delete(storage, dataset, {n: files[n] for n in covered}))
        left = {name: entry for name, entry in files.items() if name not in covered | changed}
        if not left:
            return total
        number = max(map(_number, segments), default=0)
        complete = True
        for names, table in _gathered(storage, dataset, left):
            number += 1
            if not _write(storage, dataset, number, table):
                complete = False  # this number is somebody else's: look again
                break
            gone = _delete(storage, dataset, {name: left[name] for name in names})
            trials = len({owner(name) for name in names})
            total += Compacted(trials, gone, 1)
        if complete:
            return total


def _number(name: str) -> int:
    return int(name.rpartition(SEGMENT)[2].removesuffix(".parquet"))


def _covered(
    storage: Storage, dataset: Dataset, files: Mapping[str, Entry], segments: Sequence[Segment]
) -> tuple[set[str], set[str]]:
    """Return the files whose rows a segment has, and those that were written anew since."""
    suspects = [name for name in files if any(owner(name) in one.places for one in segments)]
    if dataset is TRIALS:
        # Another row of such a trial came too late to count: the first commit wins.
        return set(suspects), set()
    covered: set[str] = set()
    changed: set[str] = set()
    for name, table in _read(storage, dataset, suspects):
        key = table.select(dataset.key).slice(0, 1).to_pylist()[0]
        there = []
        for one in segments:
            if (place := one.places.get(owner(name))) is not None:
                start, end = place
                theirs = one.rows(dataset.schema.names).slice(start, end - start).to_pylist()
                there += [row for row in theirs if all(row[k] == v for k, v in key.items())]
        if there:
            ours = in_order(dataset, table).to_pylist()
            same = sorted(map(repr, there)) == sorted(map(repr, ours))
            (covered if same else changed).add(name)
    return covered, changed


def _read(
    storage: Storage, dataset: Dataset, names: Sequence[str]
) -> Iterator[tuple[str, pa.Table]]:
    """Yield files with their rows, but for those that are damaged, or gone meanwhile."""

    def attempt(name: str) -> pa.Table | None:
        data = storage.get(name)
        try:
            return None if data is None else decode(dataset, name, data)
        except DamagedError:
            return None  # whoever reads the rows says so

    with ThreadPoolExecutor(storage.threads) as pool:
        for name, table in zip(names, pool.map(attempt, names), strict=True):
            if table is not None:
                yield name, table


def _gathered(
    storage: Storage, dataset: Dataset, files: Mapping[str, Entry]
) -> Iterator[tuple[list[str], pa.Table]]:
    """Yield what makes a segment: the names of files, and their rows."""
    of: dict[str, list[str]] = {}
    for name in sorted(files):
        of.setdefault(owner(name), []).append(name)
    trials = sorted(of)
    names: list[str] = []
    tables: list[pa.Table] = []
    for start in range(0, len(trials), BATCH):
        batch = [name for trial in trials[start : start + BATCH] for name in of[trial]]
        read = list(_read(storage, dataset, batch))
        names += [name for name, _ in read]
        if read:  # tables of few rows take many times the room of their content
            tables.append(pa.concat_tables([table for _, table in read]).combine_chunks())
        if sum(table.num_rows for table in tables) >= MOST[dataset.name]:
            yield names, pa.concat_tables(tables)
            names, tables = [], []
    if tables:
        yield names, pa.concat_tables(tables)


def _write(storage: Storage, dataset: Dataset, number: int, table: pa.Table) -> bool:
    """Write a segment, unless somebody else has written one of its number.

    Raises:
        LedgerError: If it does not come back as it was written.
    """
    name = segment(dataset, number)
    data = _checked(storage, name, dataset, table)
    if not storage.create(name, data):
        return False
    if storage.get(name) != data:
        raise LedgerError(
            f"{storage.where(name)}: is not what was written there; nothing was deleted: delete "
            "it, and look to the disk"
        )
    return True


def _checked(storage: Storage, name: str, dataset: Dataset, table: pa.Table) -> bytes:
    """Return the file of a segment, which has just these rows.

    Raises:
        LedgerError: If it has not.
    """
    data = packed(dataset, table)
    written = Segment(dataset, pa.BufferReader(data)).rows(dataset.schema.names)
    if not same_rows(written, in_order(dataset, table)):
        raise LedgerError(f"{storage.where(name)}: would not hold what it should; nothing is lost")
    return data


def take_out(storage: Storage, rows: RowCache, trial_id: str) -> None:
    """Take the rows of a trial out of segments: each is replaced whole, or goes with its last row.

    Whoever is killed leaves a segment as it was or as it shall be, never the other trials' rows in
    two. Only one at a time may do it: of two, the later would bring back what the earlier took.

    Args:
        storage: Where the ledger lies.
        rows: The reader of a dataset.
        trial_id: The trial.

    Raises:
        LedgerError: If the storage fails, or a segment is damaged.
    """
    segments = rows.sound_segments()
    dataset = rows.dataset
    for name, one in segments.items():
        if trial_id not in one.places:
            continue
        if others := one.places.keys() - {trial_id}:
            left = one.rows(dataset.schema.names, others)
            storage.put(name, _checked(storage, name, dataset, left))
        else:
            storage.delete([name])


def parts(dataset: Dataset, table: pa.Table) -> Iterator[pa.Table]:
    """Yield rows, which are in order, in parts no larger than segments, cut between trials."""
    start = 0
    while start < table.num_rows:
        end = min(start + MOST[dataset.name], table.num_rows)
        trials = table.column("trial_id")
        while end < table.num_rows and trials[end] == trials[end - 1]:
            end += 1
        yield table.slice(start, end - start)
        start = end


def add(storage: Storage, rows: RowCache, table: pa.Table) -> None:
    """Write rows of trials that have none there yet into a segment.

    Args:
        storage: Where the ledger lies.
        rows: The reader of their dataset.
        table: The rows, at least one; see `sweep.ledger.segments.packed`.

    Raises:
        LedgerError: If the storage fails, or a segment is damaged.
    """
    while True:
        segments = rows.sound_segments()
        number = max(map(_number, segments), default=0) + 1
        if _write(storage, rows.dataset, number, table):
            return


def same_rows(one: pa.Table, other: pa.Table) -> bool:
    """Return whether two tables of the same columns are the same, to the bit."""
    return one.num_rows == other.num_rows and all(
        _bits(a).equals(_bits(b)) for a, b in zip(one.columns, other.columns, strict=True)
    )


def _bits(column: pa.ChunkedArray) -> pa.Array:
    # To Arrow, no NaN is like another.
    array = column.combine_chunks()
    return array.view(pa.int64()) if pa.types.is_floating(array.type) else array


def _delete(storage: Storage, dataset: Dataset, files: Mapping[str, Entry]) -> int:
    """Delete files that are as they were listed, and say how many."""
    if not files:
        return 0
    if dataset is not TRIALS:  # a row is written once, a note may have been written anew
        now = storage.list(dataset.name)
        files = {name: entry for name, entry in files.items() if now.get(name) == entry}
    storage.delete(files)
    return len(files)
