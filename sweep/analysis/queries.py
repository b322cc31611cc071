"""SQL over the ledger: DuckDB reads the tables `trials`, `curves`, `failures` and `cells`.

A query reads and does nothing else: it is one SELECT, in a database of its own in memory, which may
open neither a file nor the network. A table is looked at only if the query names it, and of
`trials` and `curves` only the columns that it asks for are read.

With a sweep file the tables hold its trials alone, with their labels as columns `axis.<name>` (in
SQL: "axis.task"), and `cells` is the table that the file asks for, a row a cell.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sweep.ledger.ledger import Ledger

if TYPE_CHECKING:
    import duckdb
    import pandas as pd
    import pyarrow as pa

    from sweep.sweepfile.trials import Sweep

T = TypeVar("T")
Stored = Literal["trials", "curves", "failures"]

STORED: tuple[Stored, ...] = ("trials", "curves", "failures")
"""Tables that the ledger has."""

TABLES = (*STORED, "cells")
"""All that a query may name."""

_LISTS = {
    "values": "double",
    "not_comparable": "string",
    "failures": "string",
    "unconverged": "string",
    "trials": "string",
}
# Columns of `cells` with several values -> the type of each. An empty list does not tell its own.


class QueryError(Exception):
    """A query cannot be answered; the message is for people."""


def query(
    sql: str,
    results: str | Path = "results",
    sweep: str | Path | Sweep | None = None,
) -> pd.DataFrame:
    """Return the answer to a query over the ledger.

    Args:
        sql: One SELECT over `trials`, `curves`, `failures` and, with a sweep, `cells`; in the SQL
            of DuckDB.
        results: The ledger: a folder, s3://, gs:// or az://.
        sweep: A sweep file: the tables hold only its trials, with columns `axis.<name>`.

    Raises:
        QueryError: If the query cannot be answered.
        LedgerError: If the ledger cannot be read.
        SweepFileError: If the sweep file is wrong.
    """
    return _answer(sql, results, sweep, _pandas)


def arrow(
    sql: str, results: str | Path = "results", sweep: str | Path | Sweep | None = None
) -> pa.Table:
    """As `query`, as a table of Arrow's, which needs no pandas."""
    return _answer(sql, results, sweep, lambda found: _tidy(found.to_arrow_table()))


def _answer(
    sql: str,
    results: str | Path,
    sweep: str | Path | Sweep | None,
    made: Callable[[duckdb.DuckDBPyRelation], T],
) -> T:
    import duckdb

    _check(sql)
    # Also a word that is none, as in a string: what is put in and not asked for is not read.
    named = [name for name in TABLES if re.search(rf"\b{name}\b", sql, re.IGNORECASE)]
    # Without a table, any place will do.
    ledger = Ledger.existing(results) if named else Ledger(results)
    expanded = None if sweep is None else _expanded(sweep, ledger)
    found = {name: _readable(ledger, name) for name in STORED if name in named}
    # Closed to everything but what is put into it: no other file, no extension, no variable of
    # ours.
    connection = duckdb.connect(
        ":memory:",
        config={
            "autoload_known_extensions": "false",
            "autoinstall_known_extensions": "false",
            "python_enable_replacements": "false",
        },
    )
    try:
        files = [str(one) for one in found.values() if isinstance(one, Path)]
        connection.execute("SET allowed_paths = ?", [files])
        connection.execute("SET enable_external_access = false")
        if expanded is None:
            for name, rows in found.items():
                _put(connection, name, rows)
        else:
            _register(connection, named, found, expanded, ledger)
        connection.execute("SET lock_configuration = true")
        return _interruptible(connection, lambda: made(connection.sql(sql)))
    except duckdb.Error as error:
        raise QueryError(_explained(error)) from None
    finally:
        connection.close()


def _interruptible(connection: duckdb.DuckDBPyConnection, ask: Callable[[], T]) -> T:
    # DuckDB computes without looking at signals, so that this thread is left free to.
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask)
        try:
            return answer.result()
        except KeyboardInterrupt:
            connection.interrupt()
            raise


def _expanded(sweep: str | Path | Sweep, ledger: Ledger) -> Sweep:
    # Imported here, since a query without a sweep is to answer at once.
    from sweep.planning.tuning import resolve
    from sweep.sweepfile.expansion import load

    return resolve(load(sweep) if isinstance(sweep, str | Path) else sweep, ledger)


def _readable(ledger: Ledger, name: Stored) -> Path | pa.Table:
    """Return the rows of a table: a Parquet file, of which DuckDB reads what it needs."""
    found = ledger.scan(name)
    # DuckDB takes a path with any of these for a pattern.
    if isinstance(found, Path) and set("*?[") & set(str(found)):
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(found).read().replace_schema_metadata()
    return found


def _put(connection: duckdb.DuckDBPyConnection, name: str, rows: Path | pa.Table) -> None:
    """Put in a table, with a column for each metric of a task's own."""
    if name.endswith("failures"):
        _put_stored(connection, name, rows)
        return
    stored = f"stored_{name}"
    _put_stored(connection, stored, rows)
    keys = f"SELECT DISTINCT unnest(json_keys(metrics)) FROM {stored} WHERE metrics IS NOT NULL"
    metrics = sorted(one for (one,) in connection.execute(keys).fetchall())
    # Names of metrics are letters, digits and underscores.
    own = "".join(f", CAST(metrics ->> '$.{one}' AS DOUBLE) AS {one}" for one in metrics)
    connection.execute(f"CREATE TEMP VIEW {name} AS SELECT *{own} FROM {stored}")


def _put_stored(connection: duckdb.DuckDBPyConnection, name: str, rows: Path | pa.Table) -> None:
    """Put in a table as it is stored."""
    if isinstance(rows, Path):
        file = str(rows).replace("'", "''")
        # A folder `a=b` on the way is no column.
        read = f"read_parquet('{file}', hive_partitioning = false)"
        connection.execute(f"CREATE TEMP VIEW {name} AS FROM {read}")
    else:
        connection.register(name, rows)


def _pandas(found: duckdb.DuckDBPyRelation) -> pd.DataFrame:
    frame: pd.DataFrame = found.df()
    return frame


def _tidy(table: pa.Table) -> pa.Table:
    """Each column with a name of its own, sums of whole numbers as such, spans in seconds."""
    import pyarrow as pa

    names: list[str] = []
    for name in table.column_names:
        own, number = name, 0
        while own in names:
            number += 1
            own = f"{name}_{number}"
        names.append(own)
    table = table.rename_columns(names)
    for place, field in enumerate(table.schema):
        # DuckDB sums in 128 bits, which Arrow has as a decimal alone.
        if pa.types.is_decimal(field.type) and field.type.scale == 0:
            with contextlib.suppress(pa.ArrowInvalid):  # Too large.
                table = table.set_column(place, field.name, table.column(place).cast(pa.int64()))
        elif pa.types.is_interval(field.type) or pa.types.is_duration(field.type):
            seconds = pa.array(map(_seconds, table.column(place).to_pylist()), pa.float64())
            table = table.set_column(place, field.name, seconds)
    return table


def _seconds(span: timedelta | pa.MonthDayNano | None) -> float | None:
    """Return a span in seconds, of months as DuckDB's `epoch` counts them: 30 days."""
    if span is None:
        return None
    if isinstance(span, timedelta):
        return span.total_seconds()
    seconds: float = (30 * span.months + span.days) * 86400 + span.nanoseconds / 1e9
    return seconds


def _check(sql: str) -> None:
    """Raise QueryError unless it is one SELECT."""
    import duckdb

    if not sql.isprintable() and any("\ud800" <= char <= "\udfff" for char in sql):
        raise QueryError("the query is no UTF-8: it was given in another encoding")
    try:
        kinds = [statement.type for statement in duckdb.extract_statements(sql)]
    except duckdb.Error as error:
        raise QueryError(_explained(error)) from None
    if kinds != [duckdb.StatementType.SELECT]:
        which = ", ".join(kind.name for kind in kinds) or "nothing"
        raise QueryError(f"a query is one SELECT; this is {which}")


def _explained(error: duckdb.Error) -> str:
    """Return what DuckDB says, in our words where it is about what a query may do."""
    import duckdb

    if isinstance(error, duckdb.PermissionException):
        first = str(error).partition("\n")[0].removeprefix("Permission Error: ")
        return f"{first}; a query reads the tables {', '.join(TABLES)} and nothing else"
    if isinstance(error, duckdb.CatalogException) and "Table with name" in str(error):
        first = str(error).partition("\n")[0].removeprefix("Catalog Error: ").rstrip("!")
        if "name cells " in first:
            return "cells: the table that a sweep file asks for; name such a file: --sweep FILE"
        return f"{first}; the tables are {', '.join(TABLES)}"
    return str(error).rstrip()


def _register(
    connection: duckdb.DuckDBPyConnection,
    named: list[str],
    found: Mapping[Stored, Path | pa.Table],
    sweep: Sweep,
    ledger: Ledger,
) -> None:
    """Put in the tables that are named, with the trials of a sweep alone."""
    connection.register("points", _points(sweep))
    if "cells" in named and sweep.table is not None:
        connection.register("cells", _cells(sweep, ledger))
    for name, rows in found.items():
        _put(connection, f"all_{name}", rows)
        connection.execute(
            f"CREATE TEMP VIEW {name} AS SELECT * FROM all_{name} JOIN points USING (trial_id)"
        )


def _points(sweep: Sweep) -> pa.Table:
    """Return the ids of a sweep's trials and their labels."""
    import pyarrow as pa

    nothing: Mapping[str, str] = {}
    points = dict.fromkeys((point.trial_id for point in sweep.all), nothing)
    points |= {point.trial_id: point.labels for point in sweep.points}
    columns = {"trial_id": pa.array(points, pa.string())}
    for axis in sweep.axes:
        labels = [own.get(axis) for own in points.values()]
        columns[f"axis.{axis}"] = pa.array(labels, pa.string())
    return pa.table(columns)


def _cells(sweep: Sweep, ledger: Ledger) -> pa.Table:
    """Return the cells of the sweep's table."""
    import pyarrow as pa

    from sweep.analysis.tables import build

    records: list[dict[str, Any]] = [cell.record() for cell in build(sweep, ledger).cells.values()]
    columns = {
        name: pa.array(
            [record[name] for record in records],
            pa.list_(pa.type_for_alias(_LISTS[name])) if name in _LISTS else None,
        )
        for name in (records[0] if records else {})
    }
    # A column of nothing but nulls has to be of some type.
    for name, column in columns.items():
        if pa.types.is_null(column.type):
            columns[name] = column.cast(pa.string() if name.endswith(_WORDS) else pa.float64())
    return pa.table(columns)


_WORDS = ("rule", "trust", "note", "verdict", "unit")
# How the names of those columns of `cells` end that hold words.
