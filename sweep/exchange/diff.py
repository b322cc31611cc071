"""Two ledgers beside one another: what they say differently of a trial, and of a sweep.

A trial's id fixes its figures: two rows of one id that differ cannot both be right. Unless they
may: other libraries, another device, another way to sum a batch, the numerics class bf16 and, on a
GPU, the others of its pack move last bits, and from there a trajectory. A `Clash` tells the one
from the other.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
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
class Clash:
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


def clash(one: Row, other: Row) -> Clash | None:
    """What differs between two rows of one trial that its id should fix; None: nothing, to the bit.

    Args:
        one: A row of the ledger's trials.
        other: Another ledger's row of the same trial.
    """
    columns = {
        name: (one[name], other[name]) for name in FIGURES if repr(one[name]) != repr(other[name])
    }
    if not columns:
        return None
    return Clash(one["trial_id"], columns, ", ".join(_excuses(one, other)))


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


def rows(ledger: Ledger, ids: Collection[str] | None = None) -> dict[str, Row]:
    """Trial -> its row, of those that have ended."""
    return {row["trial_id"]: row for row in ledger.trials(ids).to_pylist()}


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

    clashes: tuple[Clash, ...]
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
    """What another ledger says differently of a sweep.

    Args:
        sweep: The sweep.
        one: Before.
        other: After.
        claims: Whether the verdicts of its claims are compared; a part of a sweep has none.

    Raises:
        LedgerError: If a ledger cannot be read.
        SweepFileError: If the sweep's table would mix configs.
    """
    # What was tuned may have come out otherwise, and then the trials are others.
    points = (point for ledger in (one, other) for point in resolve(sweep, ledger).all)
    labels = {point.trial_id: point.label for point in points}
    before, after = rows(one, labels), rows(other, labels)
    clashes = (clash(before[name], after[name]) for name in labels if name in before.keys() & after)
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
