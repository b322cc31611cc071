"""Segments: Parquet files of the rows of many trials, in order, written once.

    trials/segment-000001.parquet      curves/...      failures/...

They are numbered, and made by create-if-absent: who finds the next number taken has missed what
somebody else put into it. A segment holds no row that may ever be written over: those that code of
the user's own gave stay in files of their own. Nothing is ever added to one; only what somebody
forgets on purpose is taken out of it, by a file that takes its place whole.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sweep.ledger.datasets import CURVES, TRIALS, Dataset
from sweep.ledger.parquet import (
    DamagedError,
    check_version,
    completed,
    in_order,
    last_of_each,
    take,
    to_parquet,
)

DISTINCT = "distinct"
"""Key of a file's metadata: whether it has no row that a later one takes the place of."""


class Columns:
    """Columns of a table, or of a Parquet file, of which each is read when it is first wanted."""

    def __init__(self, source: pa.Table | pq.ParquetFile) -> None:
        self._file = source
        self._read: dict[str, pa.ChunkedArray] = {}

    def table(self, names: Sequence[str]) -> pa.Table:
        """Return some of them. Raises what pyarrow raises of a file that is damaged."""
        if isinstance(self._file, pa.Table):
            return self._file.select(names)
        if lacking := [name for name in names if name not in self._read]:
            read = self._file.read(columns=lacking)
            self._read |= dict(zip(read.column_names, read.columns, strict=True))
        return pa.table({name: self._read[name] for name in names}, schema=self._schema(names))

    def _schema(self, names: Sequence[str]) -> pa.Schema:
        schema = self._file.schema_arrow
        return pa.schema([schema.field(name) for name in names])


class Segment:
    """A segment that is read, as far as it is asked for."""

    def __init__(self, dataset: Dataset, source: str | pa.NativeFile) -> None:
        """Open it, and read whose rows it has.

        Raises:
            DamagedError: If it is not what it should be.
        """
        self.dataset = dataset
        try:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            check_version(dataset, file)
            self._columns = Columns(file)
            self._there = set(file.schema_arrow.names)
            # Looks at the names and types of all columns, which costs nothing without rows.
            completed(dataset, pa.Table.from_batches([], file.schema_arrow.remove_metadata()))
            meta = file.metadata.metadata or {}
            self.distinct = meta.get(DISTINCT.encode()) == b"1"
            """Whether each of its rows counts."""
            encoded = self._columns.table(["trial_id"]).column(0).combine_chunks()
            encoded = encoded.dictionary_encode()
            owners = encoded.dictionary.to_pylist()
            ranks = np.from_dlpack(encoded.indices)
            if not owners or owners != sorted(owners) or np.any(ranks[1:] < ranks[:-1]):
                raise ValueError("its rows are not in order")
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise _damaged(dataset, error) from error
        ends = np.cumsum(np.bincount(ranks)).tolist()
        starts = [0, *ends[:-1]]
        self.places = dict(zip(owners, zip(starts, ends, strict=True), strict=True))
        """Trial -> its first row, and the one after its last."""

    def rows(self, columns: Sequence[str], ids: Collection[str] | None = None) -> pa.Table:
        """Return the rows of some trials or of all, in order, whether they count or not.

        Raises:
            DamagedError: If it is not what it should be.
        """
        there = [name for name in columns if name in self._there]
        try:
            table = self._columns.table(there)
        except (OSError, pa.ArrowException) as error:
            raise _damaged(self.dataset, error) from error
        if ids is not None and not all(one in ids for one in self.places):
            spans = [self.places[one] for one in self.places if one in ids]
            rows = [np.arange(start, end) for start, end in spans]
            table = take(table, np.concatenate([np.zeros(0, dtype=np.int64), *rows]))
        if len(there) < len(columns):
            fields = [self.dataset.schema.field(name) for name in columns]
            table = pa.table(
                [
                    table.column(one.name)
                    if one.name in self._there
                    else pa.nulls(table.num_rows, one.type)
                    for one in fields
                ],
                schema=pa.schema(fields),
            )
        return table.replace_schema_metadata(None)

    def counted(self, columns: Sequence[str], ids: Collection[str] | None = None) -> pa.Table:
        """Return the rows of trials that count, in order.

        Raises:
            DamagedError: If it is not what it should be.
        """
        if self.distinct:
            return self.rows(columns, ids)
        table = self.rows(list(dict.fromkeys([*columns, *self.dataset.one])), ids)
        return take(table, np.flatnonzero(last_of_each(table, self.dataset.one))).select(columns)

    def check(self) -> None:
        """Look at all of it.

        Raises:
            DamagedError: If it is not what it should be.
        """
        self.rows(self.dataset.schema.names)


def _damaged(dataset: Dataset, error: Exception) -> DamagedError:
    reason = str(error).split("\n", 1)[0].rstrip(".")
    lost = {
        "trials": "all of its trials are trained anew by the next run",
        "failures": "only these notes of failed attempts are lost",
        "curves": "only these curves are lost",
    }[dataset.name]
    return DamagedError(
        f"cannot be read ({reason}); put a copy of it in its place, or delete it: {lost}"
    )


def packed(dataset: Dataset, table: pa.Table) -> bytes:
    """Return the file of a segment.

    Args:
        dataset: What the rows are of.
        table: The rows, at least one, in the order in which they came.

    Raises:
        ValueError: If one of them may be written over later on.
    """
    if dataset is TRIALS and table.column("own_code").null_count < table.num_rows:
        raise ValueError("trials: rows that own code gave stay in files of their own")
    table = in_order(dataset, table).combine_chunks()
    distinct = dataset is not CURVES or bool(last_of_each(table, dataset.one).all())
    words = [one.name for one in dataset.schema if pa.types.is_string(one.type)]
    meta = {DISTINCT: str(int(distinct))}
    return to_parquet(dataset, table, meta, use_dictionary=words, described=True)
