"""The table that a sweep fills, as it is printed: at any time, with what there is so far.

Below a row's own figures stands the published one, plainly as somebody else's. Whatever a figure
cannot say for itself has a footnote: what a trivial baseline does, trials that diverged or failed,
seeds that share a backbone, batches that were computed in parts for want of memory, a smaller set
of data than in the rows beside, why no difference is drawn to a published figure.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fpt.published import ACCURACY, Reference, references
from fpt.spec import JSON
from sweep.analysis import history, typeset
from sweep.analysis.cells import (
    BEST_SEEN,
    FACTS,
    WIDEST,
    Cell,
    Grid,
    declared,
    grid,
    test_predictions,
    traits,
    words,
)
from sweep.analysis.stats import Interval
from sweep.analysis.typeset import Entry, Footnotes, Line, Sheet
from sweep.ledger.ledger import Ledger
from sweep.planning import tuning
from sweep.sweepfile.expansion import load
from sweep.sweepfile.metrics import is_accuracy
from sweep.sweepfile.schema import CONVERGENCE, TableSpec
from sweep.sweepfile.trials import Sweep

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Group


@dataclass(frozen=True)
class Table:
    """The table of a sweep, as the ledger fills it so far."""

    sweep: str
    """The name of the sweep."""
    spec: TableSpec
    """What the sweep file says of it."""
    cells: Grid
    outside: int
    """Trials of the sweep that lie on no point of the table's axes."""
    tuning: tuple[str, ...] = ()
    """How learning rates were chosen, where they were."""
    remarks: Mapping[str, str] = field(default_factory=dict)
    """Cell id -> what is to be known of the choice of its learning rate."""
    changed: str | None = None
    """In what the claims of the sweep differ from those in force before the first row."""

    @property
    def title(self) -> str:
        """What is printed above it."""
        return self.spec.title or self.sweep

    @functools.cached_property
    def rows(self) -> tuple[str, ...]:
        """The labels of its rows."""
        return tuple(dict.fromkeys(row for row, _, _ in self.cells))

    @functools.cached_property
    def columns(self) -> tuple[tuple[str, str], ...]:
        """(label, metric) of each column; the label is "" where the columns are metrics alone."""
        labels = dict.fromkeys(label for _, label, _ in self.cells)
        metrics = dict.fromkeys(metric for _, _, metric in self.cells)
        return tuple((label, metric) for label in labels for metric in metrics)

    @property
    def reference(self) -> Reference | None:
        """The published table beside it."""
        return references()[self.spec.reference] if self.spec.reference else None

    def to_markdown(self) -> str:
        """Return the table in GitHub's Markdown."""
        return typeset.markdown(self.sheet)

    def to_latex(self) -> str:
        """Return a `table` environment (packages booktabs, xcolor)."""
        return typeset.latex(self.sheet)

    def to_html(self) -> str:
        """Return a self-contained page."""
        return typeset.page(self.sheet)

    def to_rich(self) -> Group:
        """Return what `rich` prints."""
        return typeset.terminal(self.sheet)

    def to_csv(self) -> str:
        """Return a line for each cell, in full precision; what a cell has several of is in one
        field.
        """
        records = [cell.record() for cell in self.cells.values()]
        names = list(records[0]) if records else ["row", "column", "metric"]
        return typeset.comma_separated(names, records)

    def to_json(self) -> JSON:
        """Return a JSON object with all cells and notes."""
        return {
            "sweep": self.sweep,
            "title": self.title,
            "rows": self.spec.rows,
            "columns": self.spec.columns,
            "reference": self.spec.reference,
            "cells": [cell.record() for cell in self.cells.values()],
            "notes": [{"mark": mark, "text": text} for mark, text in self.sheet.notes],
        }

    def to_frame(self) -> pd.DataFrame:
        """Return a pandas row for each cell."""
        import pandas as pd

        return pd.DataFrame([cell.record() for cell in self.cells.values()])

    def _repr_html_(self) -> str:
        return f"<style>{typeset.CSS}</style>{typeset.fragment(self.sheet)}"

    @functools.cached_property
    def sheet(self) -> Sheet:
        """What is printed, in whatever format."""
        return _Printer(self).sheet()


def build(sweep: Sweep, ledger: Ledger) -> Table:
    """Return the table of a sweep, from what the ledger holds.

    Raises:
        SweepFileError: If the sweep file asks for no table, or for one whose cells would mix
            configs.
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    spec = declared(sweep)
    cells = grid(sweep, spec, ledger)
    metrics = len(spec.metrics)
    inside = sum(cell.expected for cell in cells.values()) // metrics
    return Table(
        sweep=sweep.name,
        spec=spec,
        cells=cells,
        outside=len(sweep.points) - inside,
        tuning=tuning.notes(sweep),
        remarks=tuning.remarks(sweep, ledger),
        changed=history.change(sweep, history.read(sweep, ledger)) if sweep.spec.claims else None,
    )


def load_table(file: str | Path, results: str | Path = "results") -> Table:
    """Return the table of a sweep file, with what there is so far.

    Raises:
        SweepFileError: If the file is wrong, or asks for no table.
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    return build(load(file), Ledger(results))


# --- from cells to what is printed --------------------------------------------------------------

_NOT_COMPARABLE = "†"
_UNVERIFIED = "?"
_SIGNS = {"reproduced": "≈", "differs": "≠"}

SIZES = ("train", "validation", "test", "examples")
"""Parameters of tasks that are numbers of examples; 0 is without end."""


@dataclass(frozen=True)
class _Column:
    # A column as it is printed.
    label: str
    metric: str
    cells: Mapping[str, Cell]
    # Row -> cell; a row that the sweep leaves out here is not in it.


class _Printer:
    # Makes a table's sheet, giving each footnote its letter as it comes up in reading order.

    def __init__(self, table: Table) -> None:
        self.table = table
        self.cells = table.cells.values()
        self.usual = statistics.mode([cell.expected for cell in self.cells] or [0])
        self.columns = tuple(_printed(table))
        metrics = tuple(dict.fromkeys(one.metric for one in self.columns))
        # Facts name themselves: a metric that is alone beside them is told in the notes.
        self.metrics = tuple(metric for metric in metrics if metric not in FACTS) or metrics
        self.several = len(self.metrics) > 1
        self.notes = Footnotes()
        self.data = _data(self.cells)

    def sheet(self) -> Sheet:
        table, columns = self.table, self.columns
        heads = [self._head(one.label, one.metric) for one in columns]
        # A trivial baseline is one of a task: it belongs to the columns, if these are tasks.
        tabulated = any(is_accuracy(one.metric) for one in columns) or any(
            cell.baseline for cell in self.cells
        )
        below = tabulated and self._one_task(lambda cell: cell.column)
        beside = tabulated and not below and self._one_task(lambda cell: cell.row)
        known = [cell for one in columns for cell in one.cells.values()]
        told = ["trivial", *["stronger"] * any(cell.stronger for cell in known)]
        lines: list[Line] = []
        for row in table.rows:
            cells = [column.cells.get(row) for column in columns]
            # What all of a row's cells have in common is said at its label, once.
            traits = [self._traits(cell) for cell in cells if cell and cell.metric not in FACTS]
            first = traits[0] if traits else ()
            common = [one for one in first if all(one in own for own in traits)]
            label = Entry(row, tuple(map(self.notes.mark, common)))
            entries = [self._ours(cell, common) for cell in cells]
            if beside:
                own = (one for one in cells if one and one.metric == self.metrics[0])
                shown = list(own if self.several else cells)
                entries += [self._baseline(shown, which) for which in told]
            lines.append(Line("ours", label, tuple(entries)))
            if table.reference and any(cell and cell.figure for cell in cells):
                label = Entry(f"{table.reference.source}, {table.reference.name}")
                theirs = [self._theirs(cell) for cell in cells]
                lines.append(Line("reference", label, (*theirs, *[Entry("")] * len(told) * beside)))
        if below and lines:
            for which in told:
                entries = [self._baseline(column.cells.values(), which) for column in columns]
                lines.append(Line("baseline", Entry(f"{which} baseline"), tuple(entries)))
        heads += [f"{which} baseline" for which in told if beside]
        notes = (*self._general_notes(), *self.notes.lettered(), *self._reference_notes())
        return Sheet(table.title, table.spec.rows, tuple(heads), tuple(lines), notes)

    def _head(self, label: str, metric: str) -> str:
        if label and (self.several or metric in FACTS):
            return f"{label}: {words(metric)}"
        return label or words(metric)

    def _one_task(self, key: Callable[[Cell], str]) -> bool:
        seen: dict[str, tuple[object, str]] = {}
        configs = [(key(cell), cell.points[0].config) for cell in self.cells]
        tasks = [(line, (config.task, config.protocol)) for line, config in configs]
        return all(seen.setdefault(line, task) == task for line, task in tasks)

    def _ours(self, cell: Cell | None, common: Collection[str]) -> Entry:
        if cell is None:
            return Entry("")
        so_far = f"{cell.finished}/{cell.expected}"
        if cell.state in ("missing", "stale"):
            text = so_far
        else:
            nothing = "none" if cell.state in ("done", "provisional") else cell.state
            text = _mean(cell, cell.interval) if cell.interval else nothing
            if cell.finished < cell.expected or cell.expected != self.usual:
                text += f" ({so_far})"
        notes = list(_fates(cell))
        if cell.metric not in FACTS:
            notes.extend(one for one in self._traits(cell) if one not in common)
        marks = tuple(self.notes.mark(note) for note in notes)
        said = cell.state if cell.state in ("missing", "stale", "provisional") else ""
        return Entry(text, marks, said=said, cell=f"cell-{cell.points[0].cell_id}")

    def _traits(self, cell: Cell) -> tuple[str, ...]:
        smaller = self.data.get((cell.row, cell.column))
        chosen = self.table.remarks.get(cell.points[0].cell_id)
        return (*traits(cell.points), *filter(None, (smaller, chosen)))

    def _theirs(self, cell: Cell | None) -> Entry:
        if cell is None or cell.figure is None:
            return Entry("")
        figure = cell.figure
        text = figure.value if figure.unit == ACCURACY else f"{figure.number:,.0f}"
        marks = [self.notes.mark(figure.note)] if figure.note else []
        if cell.difference is not None:
            digits = 1 if is_accuracy(cell.metric) else 0
            # Adding zero turns -0.0, which would print its sign, into 0.0.
            sign = _SIGNS.get(cell.verdict or "", "")
            text += f" ({round(cell.difference, digits) + 0.0:+,.{digits}f}{sign and ' ' + sign})"
        if not figure.verified:
            return Entry(text, (*marks, _UNVERIFIED), weak=True, said="unverified")
        if cell.differs:
            marks.append(_NOT_COMPARABLE)
        return Entry(text, tuple(marks), said=cell.verdict or "")

    def _baseline(self, cells: Iterable[Cell | None], which: str) -> Entry:
        for cell in filter(None, cells):
            if found := cell.stronger if which == "stronger" else cell.baseline:
                said = f"{which} baseline: {found.rule}"
                marks = (self.notes.mark(said),) if found.rule else ()
                decimals = (
                    1 if is_accuracy(cell.metric) else _decimals(found.figure, (found.figure,))
                )
                return Entry(f"{found.figure:,.{decimals}f}", marks)
        return Entry("")

    def _general_notes(self) -> Iterator[tuple[str, str]]:
        if not self.cells:
            yield "", "the sweep has no trial on the axes of this table"
            return
        metrics = self.metrics
        unit = {cell.metric: cell.unit for cell in self.cells}
        units = [f"{words(one)}, {unit[one]}" for one in metrics if unit.get(one)]
        what = "" if self.several else f"{(units or [words(*metrics)])[0]}: "
        seeds = f"mean ± half-width of the 95 % Student-t interval over {self.usual} seeds"
        seeds = seeds if self.usual > 1 else "one seed, hence no interval"
        yield "", "; ".join((what + seeds, *(units if self.several else ())))
        if any(cell.finished < cell.expected or cell.expected != self.usual for cell in self.cells):
            yield "", "n/N: trials of the cell that have ended, of those that there are to be"
        if CONVERGENCE in metrics:
            yield "", self._convergence()
        if "test_accuracy" in metrics:
            yield from (("", note) for note in _of_test_set(self.cells))
        for note in self.table.tuning:
            yield "", note
        if self.table.changed:
            yield "", self.table.changed
        if self.table.outside:
            yield "", f"trials of the sweep on no point of these axes: {self.table.outside}"

    def _convergence(self) -> str:
        rule = self.table.spec.convergence
        over = f", averaged over {rule.smoothing} evaluations," if rule.smoothing > 1 else ""
        text = (
            f"{words(CONVERGENCE)}: first evaluated step from which the validation accuracy{over} "
            f"stays within {100 * rule.tolerance:g} points of its plateau"
        )
        if any(cell.points[0].config.protocol == "paper" for cell in self.cells):
            text += "; the protocol paper has no validation split: there, of its test batches"
        return text

    def _reference_notes(self) -> Iterator[tuple[str, str]]:
        reference = self.table.reference
        figured = [cell for cell in self.cells if cell.figure]
        if reference is None or not figured:
            return
        if any(cell.figure and not cell.figure.verified for cell in figured):
            yield _UNVERIFIED, "unverified: one weak source, so that no difference is drawn"
        apart = [cell for cell in figured if cell.differs and cell.figure and cell.figure.verified]
        if apart:
            yield _NOT_COMPARABLE, f"not comparable: {'; '.join(_reasons(apart))}"
        cited = "arXiv 2103.05247, " if reference.source == "paper" else ""
        text = f"{reference.source}, {reference.name}: {cited}{reference.title}"
        if any(cell.difference is not None for cell in figured):
            text += "; in brackets ours minus theirs"
        yield "", text
        verdicts = {cell.verdict for cell in figured}
        if verdicts & {"reproduced", "differs", "undecided"}:
            yield "", self._verdicts(figured)

    def _verdicts(self, cells: Collection[Cell]) -> str:
        judged = [cell for cell in cells if cell.difference is not None]
        units = {is_accuracy(cell.metric): None for cell in judged}
        by = self.table.spec.tolerance
        tolerance = " or ".join(
            f"{by:g} point{'' if by == 1 else 's'}" if accuracy else f"{by:g} % of theirs"
            for accuracy in units
        )
        return (
            f"≠ differs: theirs lies outside our interval, widened by {tolerance} and by their "
            f"rounding; ≈ reproduced: inside, and our interval is at most {WIDEST} times that to "
            "either side; without a sign undecided"
        )


def _of_test_set(cells: Iterable[Cell]) -> Iterator[str]:
    # What is to be known of test accuracies: what they are of, and what their intervals leave out.
    own = [cell for cell in cells if cell.metric == "test_accuracy"]
    if any(cell.points[0].config.protocol == "paper" for cell in own):
        yield BEST_SEEN
    errors = []
    for cell in own:
        number = test_predictions(cell.points[0].like)
        if number and cell.interval:
            share = min(max(cell.interval.mean / 100, 0.0), 1.0)
            errors.append(100 * math.sqrt(share * (1 - share) / number))
    if errors:
        low, high = min(errors), max(errors)
        yield (
            "the intervals are over seeds alone: the test set's own binomial deviation is "
            + (f"{low:.1f} to {high:.1f} points" if f"{low:.1f}" < f"{high:.1f}" else f"{high:.1f}")
        )


def _printed(table: Table) -> Iterator[_Column]:
    # Facts that are the same under every label are printed once, before the rest.
    facts: dict[str, dict[str, list[Cell]]] = {}
    for (row, label, metric), cell in table.cells.items():
        if label and metric in FACTS:
            facts.setdefault(metric, {}).setdefault(row, []).append(cell)
    once = [
        metric
        for metric, rows in facts.items()
        if all(len({value for cell in own for value in cell.values}) < 2 for own in rows.values())
    ]
    for metric in once:
        fullest = {
            row: max(own, key=lambda one: one.finished) for row, own in facts[metric].items()
        }
        yield _Column("", metric, fullest)
    for label, metric in table.columns:
        if metric not in once:
            own = {row: table.cells.get((row, label, metric)) for row in table.rows}
            yield _Column(label, metric, {row: cell for row, cell in own.items() if cell})


def _reasons(cells: Sequence[Cell]) -> Iterator[str]:
    # Each reason once, with where it holds: everywhere, in some columns, in some rows, in cells.
    holds: dict[str, list[Cell]] = {}
    for cell in cells:
        for reason in cell.differs:
            holds.setdefault(reason, []).append(cell)
    for reason, own in sorted(holds.items(), key=lambda item: -len(item[1])):
        if len(own) == len(cells):
            yield reason
            continue
        columns = {cell.column: None for cell in own}
        rows = {cell.row: None for cell in own}
        if len(own) == sum(cell.column in columns for cell in cells):
            where = ", ".join(columns)
        elif len(own) == sum(cell.row in rows for cell in cells):
            where = ", ".join(rows)
        else:
            where = ", ".join(f"{cell.row} / {cell.column}" for cell in own)
        yield f"{where}: {reason}"


def _fates(cell: Cell) -> Iterator[str]:
    # Notes on the trials of a cell that did not simply end.
    yield from dict.fromkeys(point.undecided for point in cell.points if point.undecided)
    for parts, trials in sorted(cell.accumulated.items()):
        yield (
            f"{trials} of {cell.expected} computed each batch in {parts} parts, since it did not "
            "fit into memory: the same gradient but for rounding"
        )
    if len(cell.devices) > 1:
        where = " and ".join(f"{trials} on {name}" for name, trials in cell.devices.items())
        yield (
            f"trained on devices of two kinds ({where}): their figures agree on average, and not "
            "digit by digit"
        )
    for reason in dict.fromkeys(cell.stale):
        yield f"{cell.stale.count(reason)} of {cell.expected} stale: {reason}"
    if diverged := cell.counts["diverged"]:
        without = min(diverged, cell.finished - len(cell.values) - len(cell.unconverged))
        text = f"{diverged} of {cell.expected} diverged"
        if without < diverged:
            text += ": the last good figures before that count"
        yield text + (f"; without a figure, and left out: {without}" if without else "")
    for reason in dict.fromkeys(cell.unconverged):
        text = f"{cell.unconverged.count(reason)} of {cell.expected} {reason}: left out"
        yield text + (", so that the mean is too low" if cell.values else "")
    for failure in dict.fromkeys(cell.failures):
        count = f"{cell.failures.count(failure)} of {cell.expected}"
        yield f"{count} failed ({failure}): sweep show says why, sweep retry runs them again"


def _data(cells: Iterable[Cell]) -> dict[tuple[str, str], str]:
    # (row, column) -> in what its set of data is smaller than that of others whose figures it
    # stands beside: those of its column, or of its row where the rows are tasks.
    cells = tuple(cells)
    ways: tuple[Callable[[Cell], str], ...] = (lambda cell: cell.column, lambda cell: cell.row)
    lines: dict[str, list[Cell]] = {}
    for beside in ways:
        lines = {}
        for cell in cells:
            lines.setdefault(beside(cell), []).append(cell)
        if all(len({c.points[0].config.task.name for c in own}) == 1 for own in lines.values()):
            break
    else:
        return {}
    out = {}
    for own in lines.values():
        sizes = [_sizes(cell) for cell in own]
        most = {name: max(one.get(name, 0) for one in sizes) for one in sizes for name in one}
        for cell, one in zip(own, sizes, strict=True):
            less = [
                f"{name} {_examples(number)}, not {_examples(most[name])}"
                for name, number in one.items()
                if number < most[name]
            ]
            if less:
                out[cell.row, cell.column] = f"a smaller set of data ({'; '.join(less)} examples)"
    return out


def _sizes(cell: Cell) -> dict[str, float]:
    task = cell.points[0].config.task
    found = {name: getattr(task, name, None) for name in SIZES}
    return {n: one or math.inf for n, one in found.items() if isinstance(one, int)}


def _examples(number: float) -> str:
    return f"{number:,.0f}" if math.isfinite(number) else "without end"


def _decimals(mean: float, values: Iterable[float]) -> int:
    whole = abs(mean) >= 100 or all(value == round(value) for value in values)
    return 0 if whole else 2 - math.floor(math.log10(abs(mean) or 1))


def _mean(cell: Cell, interval: Interval) -> str:
    # Accuracies to a tenth of a per cent; counts whole; all else to three digits of the mean.
    decimals = 1 if is_accuracy(cell.metric) else _decimals(interval.mean, cell.values)
    fixed = cell.metric in FACTS and len(set(cell.values)) == 1
    numbers = [interval.mean, None if fixed else interval.half_width]
    return " ± ".join(f"{one:,.{decimals}f}" for one in numbers if one is not None)
