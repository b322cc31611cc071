"""The command that asks the ledger in SQL."""

from __future__ import annotations

import csv
import json
import math
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table as Grid

from sweep.cli.common import Results, UserError, app, count, say, writing

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
    form: Annotated[Format, typer.Option("--format", help="How to write it.")] = Format.table,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PATH", help="A file to write it to.")
    ] = None,
    results: Results = "results",
) -> None:
    """Ask the ledger in SQL: tables trials, curves, failures, and cells of a sweep file."""
    from sweep.analysis.queries import arrow

    if form is Format.parquet and output is None:
        raise UserError("--format parquet: no text for a terminal; name a file: --output PATH")
    table = arrow(sql, results, sweep)
    if output is None:
        _write(table, form, sys.stdout)
        return
    with writing(output):
        if form is Format.parquet:
            import pyarrow.parquet

            pyarrow.parquet.write_table(table, output)
        else:
            with output.open("w", encoding="utf-8", newline="") as stream:
                _write(table, form, stream)
    say(f"{output}: {count(table.num_rows, 'row')} written")


def _write(table: pa.Table, form: Format, stream: TextIO) -> None:
    if form is Format.json:
        json.dump(_finite(table.to_pylist()), stream, indent=2, default=str)
        stream.write("\n")
    elif form is Format.csv:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(table.column_names)
        for batch in table.to_batches():
            columns = [column.to_pylist() for column in batch.columns]
            writer.writerows(list(map(_field, row)) for row in zip(*columns, strict=True))
    else:
        _print(table, stream)


def _finite(value: Any) -> Any:
    # JSON has no NaN, and no infinity.
    if isinstance(value, dict):
        return {name: _finite(own) for name, own in value.items()}
    if isinstance(value, list):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(table: pa.Table, stream: TextIO) -> None:
    """For people: numbers to the right, the first rows."""
    import pyarrow as pa

    grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for field in table.schema:
        number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        grid.add_column(field.name, justify="right" if number else "left", overflow="fold")
    for row in table.slice(0, SHOWN).to_pylist():
        grid.add_row(*(_shown(row[name]) for name in table.column_names))
    # A pipe has no width, and no line of a table is to be broken for it.
    console = Console(file=stream)
    console = console if stream.isatty() else Console(file=stream, width=10_000)
    console.print(grid, markup=False)
    if table.num_rows > SHOWN:
        more = count(table.num_rows - SHOWN, "more row")
        stream.write(f"... and {more} (--format csv has all)\n")


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(_field(value))


def _field(value: Any) -> Any:
    # What has several values is one field.
    return "; ".join(map(str, value)) if isinstance(value, list) else value
