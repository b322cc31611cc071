"""Two ledgers beside one another: what they say differently of a trial, and of a sweep.

A trial's id fixes its figures: two rows of one id that differ cannot both be right. Unless they
may: other libraries, another device, another way to sum a batch, the numerics class bf16 and, on a
GPU, the others of its pack move last bits, and from there a trajectory. A `Conflict` tells the one
from the other.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fpt.spec import JSON
from sweep.analysis import cells
from sweep.ledger.columns import FIGURES
from sweep.ledger.ledger import Ledger
from sweep.planning.tuning import resolve
from sweep.sweepfile.trials import Sweep

if TYPE_CHECKING:
    from sweep.analysis.cells import Cell

Row = Mapping[str, Any]

LIBRARIES = ("torch", "transformers", "numpy")
"""Packages of which another version may move last bits."""


# ---------------------------------------------------------------------------------------- two rows


@dataclass(frozen=True)
class Conflict:
    """One trial with two outcomes."""

    trial_id: str
    columns: Mapping[str, tuple[Any, Any]]
    """Column of `FIGURES` -> its two values."""
    excuse: str
    """Why both may be right: `torch 2.8.0 and 2.9.0`. Empty: one of them is wrong."""

    def __str__(self) -> str:
        told = ", ".join(f"{name} {_plain(a)} and {_plain(b)}" for name, (a, b) in self._few())
        more = len(self.columns) - len(self._few())
        told += f" and {more} more" if more else ""
        return f"trial {self.trial_id}: {told}" + (f" ({self.excuse})" if self.excuse else "")

    def _few(self) -> list[tuple[str, tuple[Any, Any]]]:
        # What people know a trial by comes first.
        order = ("test_accuracy", "test_loss", *FIGURES)
        return sorted(self.columns.items(), key=lambda item: order.index(item[0]))[:3]

    def record(self) -> JSON:
        """As JSON values."""
        columns = {name: list(map(_plain, pair)) for name, pair in self.columns.items()}
        return {"trial_id": self.trial_id, "columns": columns, "excuse": self.excuse or None}


def clash(one: Row, other: Row) -> Conflict | None:
    """Return what differs between two rows of one trial that its id should fix; None: nothing, to
    the bit.

    Args:
        one: A row of the ledger's trials.
        other: Another ledger's row of the same trial.
    """
    columns = {
        name: (one[name], other[name]) for name in FIGURES if repr(one[name]) != repr(other[name])
    }
    if not columns:
        return None
    return Conflict(one["trial_id"], columns, ", ".join(_excuses(one, other)))


def _excuses(one: Row, other: Row) -> Iterator[str]:
    if (numerics := one["numerics"]) not in ("fp32", None):
        yield f"numerics {numerics}"
    libraries = [json.loads(row["versions"] or "{}") for row in (one, other)]
    for name in LIBRARIES:
        a, b = (own.get(name) for own in libraries)
        if a != b:
            yield f"{name} {a} and {b}"
    for name in ("device", "device_name"):
        if one[name] != other[name]:
            yield f"{name.replace('_', ' ')} {one[name]} and {other[name]}"
            break
    a, b = (row["accumulation"] or 1 for row in (one, other))
    if a != b:
        yield f"batches in {a} and in {b} parts"
    # cuBLAS chooses a kernel by the number of rows, which is that of all members together. Which
    # these were, and when each left, no row tells: packs of as many may have been of others.
    a, b = (row["pack_size"] or 1 for row in (one, other))
    if "cuda" in (one["device"], other["device"]) and max(a, b) > 1:
        yield f"packs of {a} and of {b} on cuda"


def _plain(value: Any) -> Any:
    # JSON has no NaN.
    return repr(value) if isinstance(value, float) and value != value else value


COMPARED = (
    "trial_id", "cell_id", "attempt", "finished_at", "task", "task_version", "identity_version",
    "numerics", "versions", "device", "device_name", "accumulation", "pack_size", *FIGURES,
)  # fmt: skip
"""Columns of a trial that say what came of it, and why it may have come out otherwise."""


def rows(ledger: Ledger, ids: Collection[str] | None = None) -> dict[str, Row]:
    """Return trial -> its row, of those that have ended: the columns `COMPARED`."""
    table = ledger.trials(ids, columns=COMPARED)
    return {row["trial_id"]: row for row in table.to_pylist()}


# ------------------------------------------------------------------------------------- row by row


@dataclass(frozen=True)
class Match:
    """A trial of one ledger beside the same trial, trained anew."""

    trial_id: str
    label: str
    state: Literal["equal", "explained", "differs", "missing"]
    """equal: all figures, to the bit. explained: another processor or library moved last bits, and
    no further than seeds do. differs: else. missing: the other ledger has no such trial."""
    clash: Conflict | None = None

    @property
    def why(self) -> str:
        """What differs, for people; empty where nothing does."""
        return str(self.clash).partition(": ")[2] if self.clash else ""


def row_by_row(sweep: Sweep, one: Ledger, other: Ledger) -> list[Match]:
    """Say of each trial that a ledger has of a sweep whether another ledger has the same figures.

    Last bits that another processor or library moved grow along a trajectory, so that a trial comes
    out as another seed would: its test accuracy may lie as far off as the seeds of a cell of its
    task do in `one`, at most.

    Args:
        sweep: The sweep.
        one: What was published.
        other: What was trained anew.

    Raises:
        LedgerError: If a ledger cannot be read.
    """
    labels = {point.trial_id: point.label for point in resolve(sweep, one).all}
    before, after = rows(one, labels), rows(other, labels)
    spans = _spans(before.values())
    return [
        Match(name, labels[name], *_match(row, after.get(name), spans))
        for name in labels
        if (row := before.get(name)) is not None
    ]


def _match(
    row: Row, again: Row | None, spans: Mapping[str, float]
) -> tuple[Literal["equal", "explained", "differs", "missing"], Conflict | None]:
    if again is None:
        return "missing", None
    found = clash(row, again)
    if found is None:
        return "equal", None
    pair = [one["test_accuracy"] for one in (row, again)]
    near = None not in pair and abs(pair[0] - pair[1]) <= spans.get(row["task"], 0.0)
    return "explained" if found.excuse and near else "differs", found


def _spans(own: Iterable[Row]) -> dict[str, float]:
    # Task -> how far apart the test accuracies of the seeds of one cell lie, of its widest cell.
    cells_of: dict[tuple[str, str], list[float]] = {}
    for row in own:
        if row["test_accuracy"] is not None:
            cells_of.setdefault((row["task"], row["cell_id"]), []).append(row["test_accuracy"])
    out: dict[str, float] = {}
    for (task, _), values in cells_of.items():
        out[task] = max(out.get(task, 0.0), max(values) - min(values))
    return out


# ------------------------------------------------------------------------------------------- diff


@dataclass(frozen=True)
class CellChange:
    """A cell of the sweep's table that two ledgers fill differently."""

    what: Literal["added", "removed", "changed"]
    before: Cell
    after: Cell

    def record(self) -> JSON:
        """As JSON values."""
        out: JSON = {"what": self.what}
        out |= {name: getattr(self.after, name) for name in ("row", "column", "metric")}
        for name, cell in (("before", self.before), ("after", self.after)):
            interval = cell.interval
            out[name] = {
                "state": cell.state,
                "n": len(cell.values),
                "mean": interval.mean if interval else None,
                "half_width": interval.half_width if interval else None,
            }
        return out


@dataclass(frozen=True)
class Flip:
    """A claim whose verdict differs."""

    claim: str
    place: Mapping[str, str]
    metric: str
    before: str
    after: str

    def record(self) -> JSON:
        """As JSON values."""
        return {
            "claim": self.claim,
            "place": dict(self.place),
            "metric": self.metric,
            "before": self.before,
            "after": self.after,
        }


@dataclass(frozen=True)
class Difference:
    """What two ledgers say differently of one sweep."""

    clashes: tuple[Conflict, ...]
    """Trials that both have, with other figures."""
    labels: Mapping[str, str]
    """Trial -> label, of every trial of the sweep."""
    added: tuple[str, ...]
    """Trials that only the second one has."""
    removed: tuple[str, ...]
    """Trials that only the first one has."""
    cells: tuple[CellChange, ...]
    unchanged: int
    """Cells that are the same in both."""
    flips: tuple[Flip, ...]

    @property
    def same(self) -> bool:
        """Whether there is none."""
        return not (self.clashes or self.added or self.removed or self.cells or self.flips)

    def record(self) -> JSON:
        """As JSON values."""
        return {
            "same": self.same,
            "contradictions": [
                one.record() | {"label": self.labels[one.trial_id]} for one in self.clashes
            ],
            "verdicts": [one.record() for one in self.flips],
            "cells": [one.record() for one in self.cells],
            "cells_unchanged": self.unchanged,
            "trials_added": list(self.added),
            "trials_removed": list(self.removed),
        }


def diff(sweep: Sweep, one: Ledger, other: Ledger, *, claims: bool = True) -> Difference:
    """Return what another ledger says differently of a sweep.

    Args:
        sweep: The sweep.
        one: Before.
        other: After.
        claims: Whether the verdicts of its claims are compared; a part of a sweep has none.

    Raises:
        LedgerError: If a ledger cannot be read.
        SweepFileError: If the sweep's table would mix configs.
    """
    one, other = one.snapshot(), other.snapshot()
    # What was tuned may have come out otherwise, and then the trials are others.
    points = (point for ledger in (one, other) for point in resolve(sweep, ledger).all)
    labels = {point.trial_id: point.label for point in points}
    before, after = rows(one, labels), rows(other, labels)
    clashes = (
        clash(before[name], after[name]) for name in labels if name in before and name in after
    )
    found = [one for one in clashes if one is not None]
    changes, unchanged = _cells(sweep, one, other)
    return Difference(
        # What cannot be right comes before what may be.
        clashes=tuple(sorted(found, key=lambda one: bool(one.excuse))),
        labels=labels,
        added=tuple(name for name in labels if name in after and name not in before),
        removed=tuple(name for name in labels if name in before and name not in after),
        cells=tuple(changes),
        unchanged=unchanged,
        flips=tuple(_flips(sweep, one, other)) if claims else (),
    )


def _cells(sweep: Sweep, one: Ledger, other: Ledger) -> tuple[list[CellChange], int]:
    if sweep.table is None:
        return [], 0
    before, after = (cells.grid(sweep, sweep.table, ledger) for ledger in (one, other))
    changes: list[CellChange] = []
    for place, cell in before.items():
        now = after[place]
        if (cell.values, cell.counts) == (now.values, now.counts):
            continue
        what: Literal["added", "removed", "changed"] = "changed"
        if not cell.finished or not now.finished:
            what = "added" if now.finished else "removed" if cell.finished else "changed"
        changes.append(CellChange(what, cell, now))
    return changes, len(before) - len(changes)


def _flips(sweep: Sweep, one: Ledger, other: Ledger) -> Iterator[Flip]:
    if not sweep.spec.claims:
        return
    from sweep.analysis.claims import judge

    before, after = (judge(sweep, ledger).contrasts for ledger in (one, other))
    for was, now in zip(before, after, strict=True):
        if was.verdict != now.verdict:
            yield Flip(was.claim, was.place, was.metric, was.verdict, now.verdict)
