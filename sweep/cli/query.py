"""The commands that ask the ledger in SQL, and say what its columns mean."""

from __future__ import annotations

import contextlib
import json
import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.table import Table as Grid
from rich.text import Text

from fpt.printable import printable
from sweep.cli.common import (
    AsJson,
    Quiet,
    Results,
    SafeConsole,
    UserError,
    app,
    chosen_format,
    count,
    echo,
    note,
    show_json,
    stdout,
    writing,
)

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN = 200
"""Rows that are printed as a table for people; the other formats have all."""


class Format(StrEnum):
    """What `sweep query` writes."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


class Stored(StrEnum):
    """The ledger's tables."""

    trials = "trials"
    curves = "curves"
    failures = "failures"


@app.command(
    epilog='Example: sweep query "SELECT task, avg(test_accuracy) FROM trials GROUP BY task"'
)
def query(
    sql: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT, in DuckDB's SQL.")],
    sweep: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Only a sweep file's trials, with their labels; adds `cells`."
        ),
    ] = None,
    form: Annotated[
        Format | None,
        typer.Option("--format", help="How to write it; default: as PATH is named, or a table."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PATH", help="A file to write it to.")
    ] = None,
    results: Results = "results",
    quiet: Quiet = False,
) -> None:
    """Ask the ledger in SQL: tables trials, curves, failures, and cells of a sweep file."""
    from sweep.analysis.queries import arrow
    from sweep.ledger.columns import described

    chosen = chosen_format(form, output, [Format.csv, Format.json, Format.parquet], Format.table)
    if chosen is Format.parquet and output is None:
        raise UserError("--format parquet: no text for a terminal; name a file: --output PATH")
    table = arrow(sql, results, sweep)
    if output is None and chosen is Format.table:
        _print(table, stdout())
        return
    if output is None:
        echo(_written(table, chosen).rstrip("\n"))
        return
    with writing(output):
        if chosen is Format.parquet:
            import pyarrow.parquet

            pyarrow.parquet.write_table(described(table), output)
        else:
            with output.open("w", encoding="utf-8", newline="") as stream:
                if chosen is Format.table:
                    _print(table, stream)
                else:
                    stream.write(_written(table, chosen).rstrip("\n") + "\n")
    note(f"{output}: {count(table.num_rows, 'row')} written")


@app.command(epilog="Example: sweep columns trials")
def columns(
    table: Annotated[
        Stored | None, typer.Argument(metavar="[TABLE]", help="trials, curves or failures.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what the columns of the ledger's tables mean, in which unit. Accuracies are fractions."""
    from sweep.ledger.columns import TABLES

    names = [table.value] if table else list(TABLES)
    told = [
        {
            "table": name,
            "column": one.name,
            "type": str(one.type),
            "unit": one.unit,
            "description": one.description,
        }
        for name in names
        for one in TABLES[name]
    ]
    if as_json:
        show_json(told)
        return
    grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in told[0]:
        grid.add_column(head, overflow="fold", no_wrap=head in ("table", "column"))
    for row in told:
        grid.add_row(*row.values())
    SafeConsole(width=None if stdout().isatty() else 10_000).print(grid)


def _written(table: pa.Table, form: Format) -> str:
    from sweep.analysis.typeset import comma_separated

    columns = [_values(column) for column in table.columns]
    rows = [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]
    if form is Format.json:
        return json.dumps(_finite(rows), indent=2, default=str)
    return comma_separated(table.column_names, rows)


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Return the values of a column; dates that Python cannot hold are text."""
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError):
        return [_value(one) for one in column]


def _value(scalar: pa.Scalar) -> Any:
    import pyarrow as pa

    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        pass
    for kind in (pa.string(), pa.int64(), pa.int32()):  # a count since 1970, if nothing else
        with contextlib.suppress(pa.ArrowException):
            return str(scalar.cast(kind).as_py())
    return f"a value of {scalar.type} that has no text"


def _finite(value: Any) -> Any:
    # JSON has no NaN, and no infinity.
    if isinstance(value, dict):
        return {str(name): _finite(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(table: pa.Table, stream: TextIO) -> None:
    """Print the first rows for people, numbers to the right."""
    import pyarrow as pa

    grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for field in table.schema:
        number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        grid.add_column(Text(field.name), justify="right" if number else "left", overflow="fold")
    columns = [_values(column) for column in table.slice(0, SHOWN).columns]
    for row in zip(*columns, strict=True):
        grid.add_row(*(Text(_shown(value)) for value in row))
    # A pipe has no width, and no line of a table is to be broken for it.
    console = SafeConsole(file=stream)
    console = console if stream.isatty() else SafeConsole(file=stream, width=10_000)
    console.print(grid)
    if table.num_rows > SHOWN:
        more = count(table.num_rows - SHOWN, "more row")
        stream.write(f"... and {more} (--format csv has all)\n")


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        value = "; ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else printable(str(value))
