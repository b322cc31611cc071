"""Parquet files of rows: written whole and checked, read with suspicion.

A value is checked against its column when it is written, a file against its name when it is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from numbers import Integral, Real
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sweep.ledger.causes import CAUSES
from sweep.ledger.datasets import CURVES, DATASETS, TRIAL_ID, TRIALS, Dataset


class DamagedError(Exception):
    """A file of the ledger is not what it should be; the message goes without its path."""


def check_whole(name: str, data: bytes) -> None:
    """Look at all of an object.

    Raises:
        DamagedError: If it is not what it should be.
    """
    dataset = DATASETS.get(name.split("/")[0])
    if dataset is not None:
        decode(dataset, name, data)
        return
    if name.startswith("notes/"):
        try:
            sound = isinstance(json.loads(data), dict)
        except ValueError:
            sound = False
        if not sound:
            raise DamagedError("is no JSON object; delete it: a note on claims is lost with it")
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
        raise DamagedError("is no whole safetensors file; delete it, and the trial makes it again")


def encode(dataset: Dataset, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the Parquet file of rows, each checked against the schema.

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
    return one_file(dataset, pa.table(columns, schema=dataset.schema))


def one_file(dataset: Dataset, table: pa.Table) -> bytes:
    """Return the Parquet file of rows of one trial, which are checked already."""
    # Dictionaries and statistics would double the size of a file of one row.
    return to_parquet(dataset, table, {}, use_dictionary=False)


def _value(dataset: Dataset, field: pa.Field, value: Any) -> Any:
    """Return a value, if its column takes it: pyarrow would cut 1.5 to 1 and take True for 1.0."""
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


_ALLOWED = {
    "trial_id": TRIAL_ID,
    "cell_id": TRIAL_ID,
    "outcome": re.compile("done|diverged"),
    "stopped": re.compile("steps|plateau|diverged"),
    "cause": re.compile("|".join(CAUSES)),
    "split": re.compile("train|validation|test"),
    # No dash, which parts the names of files: so names sort as attempts do.
    "attempt": re.compile(r"[\w.]+", re.ASCII),
    "segment": re.compile(r"\d{1,6}"),
}
"""Columns that hold not just anything of their type."""


def to_parquet(
    dataset: Dataset,
    table: pa.Table,
    metadata: Mapping[str, str],
    *,
    use_dictionary: bool | list[str],
    described: bool = False,
) -> bytes:
    """Return the Parquet file of a table; described: with what its columns mean, some 4 kB."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        table.schema,
        use_dictionary=use_dictionary,
        write_statistics=False,
        write_page_checksum=True,
        # Parquet's own types say all.
        store_schema=described,
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"schema_version": str(dataset.version), **metadata})
    return bytes(sink.getvalue())


def decode(dataset: Dataset, name: str, data: bytes) -> pa.Table:
    """Return the rows of a file.

    Raises:
        DamagedError: If it is not what it should be.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        check_version(dataset, file)
        table = file.read(use_threads=False).replace_schema_metadata(None)
        columns = completed(dataset, table)
        if not table.num_rows or (dataset is TRIALS and table.num_rows > 1):
            raise ValueError(f"it holds {table.num_rows} rows")
        row = table.select(dataset.key).slice(0, 1).to_pylist()[0]
        if (path := dataset.path(row)) != name:
            raise ValueError(f"its content belongs in {path}")
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = str(error).split("\n", 1)[0].rstrip(".")
        raise DamagedError(f"cannot be read ({reason}); {dataset.lost}") from error
    return columns


def check_version(dataset: Dataset, file: pq.ParquetFile) -> None:
    """Look at the schema version that a file bears.

    Raises:
        DamagedError: If it is newer than ours.
        ValueError: If there is none.
    """
    version = int((file.metadata.metadata or {}).get(b"schema_version", 0))
    if version > dataset.version:
        raise DamagedError(
            f"its schema version {version} is newer than {dataset.version}, the newest that "
            "this fpt-sweep reads; upgrade fpt-sweep"
        )
    if version < 1:
        raise ValueError("it bears no schema version, so that fpt-sweep did not write it")


def completed(dataset: Dataset, table: pa.Table) -> pa.Table:
    """Return a table with the columns of a dataset; those that it lacks are null.

    Raises:
        ValueError: If it has others, or lacks one that every row has.
    """
    if table.schema.equals(dataset.schema):  # as nearly all are: reading is for many files
        return pa.table(table.columns, schema=dataset.schema)
    types = {one.name: one.type for one in dataset.schema}
    others = [one.name for one in table.schema if types.get(one.name) != one.type]
    lacking = types.keys() - set(table.column_names)
    required = [one.name for one in dataset.schema if not one.nullable]
    needed = [name for name in required if name in lacking or table.column(name).null_count]
    if others or needed:
        raise ValueError(f"its columns are not those of {dataset.name}: {(others + needed)[0]}")
    rows = table.num_rows
    columns = [
        pa.nulls(rows, kind) if name in lacking else table.column(name)
        for name, kind in types.items()
    ]
    return pa.table(columns, schema=dataset.schema)


def latest(curves: pa.Table) -> pa.Table:
    """Return the last row of each (trial_id, split, step), of rows as they were written."""
    if not curves.num_rows:
        return curves
    keys = [ranks(curves.column(name)) for name in CURVES.one]
    order = np.lexsort(keys[::-1])  # stable: among equals, the last row was written last
    return take(curves, order[_ends([key[order] for key in keys])])


def in_order(dataset: Dataset, table: pa.Table) -> pa.Table:
    """Return rows in the order of a segment; of rows alike in every key, as they came."""
    keys = [ranks(table.column(name)) for name in (*dataset.one, *dataset.later)]
    return take(table, np.lexsort(keys[::-1])) if table.num_rows else table


def settled(dataset: Dataset, table: pa.Table) -> pa.Table:
    """Return the rows that count, in order; of rows alike in every key, the last that came."""
    table = in_order(dataset, table)
    return take(table, np.flatnonzero(last_of_each(table, dataset.one)))


def last_of_each(table: pa.Table, columns: Sequence[str]) -> np.ndarray:
    """Return of each row whether the next one differs in one of the columns."""
    if not table.num_rows:
        return np.zeros(0, dtype=bool)
    return _ends([ranks(table.column(name)) for name in columns])


def _ends(keys: Sequence[np.ndarray]) -> np.ndarray:
    # Of each place whether the next one differs in one of the keys.
    return np.append(np.logical_or.reduce([key[1:] != key[:-1] for key in keys]), True)


def no_rows(dataset: Dataset) -> pa.Table:
    """Return a table of a dataset without rows."""
    return pa.Table.from_batches([], schema=dataset.schema)


def ranks(column: pa.ChunkedArray) -> np.ndarray:
    """Return the rank of each value among the different ones."""
    encoded = column.combine_chunks().dictionary_encode()
    values = encoded.dictionary.to_pylist()
    rank = np.empty(len(values), dtype=np.int64)
    rank[sorted(range(len(values)), key=values.__getitem__)] = np.arange(len(values))
    ranks: np.ndarray = rank[np.from_dlpack(encoded.indices)]
    return ranks


def take(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Return rows of a table, by their numbers."""
    # `pa.array`, `Table.filter` and `empty_table` import pandas, which costs half a second.
    buffer = pa.py_buffer(rows.astype(np.int64))
    return table.take(pa.Array.from_buffers(pa.int64(), len(rows), [None, buffer]))
