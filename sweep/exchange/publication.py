"""A publication: what a sweep came to, in a folder for a repository.

    table.md, table.csv      the table
    claims.md, claims.csv    the claims with their verdicts, where the file has any
    figures/KIND.svg         what the sweep has figures for
    report.html              all of it on one page, if asked for
    trials.parquet           the rows behind it: those of the table, of tuning and of pretrainings
    curves.parquet           their curves
    failures.parquet         attempts that came to nothing, where there are any
    notes.json               claims in force before the first row, readings, generations

A file a row, as a ledger has them, is ten times as large. `restore` makes a ledger of these rows
again, so that a published trial is never trained twice: `sweep merge` and `sweep diff` take the
folder for a ledger.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sweep.ledger.datasets import DATASETS
from sweep.ledger.errors import unwritable
from sweep.ledger.ledger import Ledger, LedgerError
from sweep.ledger.notes import written
from sweep.planning.plan import plan
from sweep.planning.tuning import resolve
from sweep.sweepfile.trials import Sweep

TRIALS, CURVES, FAILURES, NOTES = (
    "trials.parquet",
    "curves.parquet",
    "failures.parquet",
    "notes.json",
)

FINISHED = ("done", "diverged")


class PublicationError(LedgerError):
    """A sweep that cannot be published, or a folder that is no publication; for people."""


@dataclass(frozen=True)
class Publication:
    """What was written."""

    folder: Path
    trials: int
    """Rows."""
    size: int
    """Bytes of the folder."""


def is_publication(path: Path) -> bool:
    """Return whether a folder holds the rows of a publication."""
    return (path / TRIALS).is_file()


def publish(sweep: Sweep, ledger: Ledger, folder: Path, *, report: bool = False) -> Publication:
    """Write a sweep that has ended into a folder; what was published there is replaced.

    Args:
        sweep: The sweep.
        ledger: Where its rows are.
        folder: Made where it is not there.
        report: Also the report, which is large.

    Raises:
        PublicationError: If a trial has no row yet, or the folder cannot be written.
        LedgerError: If the ledger cannot be read.
    """
    ledger = ledger.snapshot()
    status = plan(sweep, ledger).status
    if missing := [name for name, state in status.items() if state not in FINISHED]:
        raise PublicationError(
            f"{sweep.name}: {len(missing):,} of {len(status):,} trials have no row; a sweep is "
            f"published when all have ended: sweep run {sweep.file}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        texts = _texts(sweep, ledger, report=report)
        for name, text in texts.items():
            (folder / name).write_text(text.rstrip("\n") + "\n", encoding="utf-8")
        _draw(sweep, ledger, folder / "figures")
        _write_rows(resolve(sweep, ledger), ledger, folder)
    except OSError as error:
        raise PublicationError(unwritable(folder, error)) from error
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Publication(folder, pq.read_metadata(folder / TRIALS).num_rows, size)


def _texts(sweep: Sweep, ledger: Ledger, *, report: bool) -> dict[str, str]:
    from sweep.analysis import claims, tables
    from sweep.analysis.report import render

    out: dict[str, str] = {}
    if sweep.table is not None:
        table = tables.build(sweep, ledger)
        out |= {"table.md": table.to_markdown(), "table.csv": table.to_csv()}
    if sweep.spec.claims:
        judged = claims.show(sweep, ledger)
        out |= {"claims.md": judged.to_markdown(), "claims.csv": judged.to_csv()}
    if report:
        out["report.html"] = render(sweep, ledger)
    return out


def _draw(sweep: Sweep, ledger: Ledger, folder: Path) -> None:
    from sweep.analysis.figures import draw, gather, save

    for old in folder.glob("*.svg"):
        old.unlink()
    for drawing in draw(gather(sweep, ledger), []):
        if drawing.chart is not None:
            save(drawing.chart.figure, folder / drawing.kind, formats=["svg"])


def _write_rows(sweep: Sweep, ledger: Ledger, folder: Path) -> None:
    # After the texts: to show a final verdict is a reading, and is noted.
    ids = {point.trial_id for point in sweep.all}
    for name, rows in (
        (TRIALS, ledger.trials(ids)),
        (CURVES, ledger.curves(ids)),
        (FAILURES, ledger.failures(ids)),
    ):
        if rows.num_rows:
            pq.write_table(rows, folder / name, compression="zstd", compression_level=19)
        else:
            (folder / name).unlink(missing_ok=True)
    notes = {name: json.loads(ledger.copy(name)) for name in ledger.notes.names(sweep.name)}
    text = json.dumps(notes, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / NOTES).write_text(text + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------ reading


def restore(folder: Path, ledger: Ledger) -> None:
    """Write the rows of a publication into a ledger that has none of them.

    Raises:
        PublicationError: If they are damaged, or no rows of a ledger.
    """
    try:
        piece = DATASETS["curves"].key
        pieces = groupby(_rows(folder / CURVES), lambda row: tuple(row[name] for name in piece))
        for (trial_id, attempt, segment), rows in pieces:
            ledger.append_curve(trial_id, attempt, segment, list(rows))
        for failure in _rows(folder / FAILURES):
            ledger.fail(failure)
        notes = folder / NOTES
        for name, note in (json.loads(notes.read_bytes()) if notes.is_file() else {}).items():
            ledger.import_object(name, written(note))
        for row in _rows(folder / TRIALS):  # last, as in training
            ledger.commit(row)
    except (OSError, ValueError, KeyError, AttributeError, pa.ArrowException) as error:
        reason = str(error).split("\n", 1)[0]
        raise PublicationError(
            f"{folder}: no publication, or damaged ({reason}); get it once more"
        ) from error


def _rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    # What `load_trials` adds is of a sweep, not of a trial.
    rows: pa.Table = pq.read_table(file)
    own = [name for name in rows.column_names if not name.startswith("axis.")]
    return list(rows.select(own).to_pylist())
