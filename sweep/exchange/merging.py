"""Ledgers united, and older ones written anew in the layout of today.

Both read and check everything before they write the first byte, write nothing over anything, and
are finished by the same call if they were killed: a trial's row is written last, as in training.
Rows go into segments (see `sweep.ledger.segments`), whatever they lay in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from fpt.tasks import TASKS
from sweep.exchange.bundle import opened
from sweep.exchange.diff import Conflict, Row, clash, rows
from sweep.ledger.ledger import Kept, Ledger, LedgerError
from sweep.ledger.parquet import take
from sweep.sweepfile.identity import IDENTITY_VERSION

TOGETHER = 2_500
"""Trials whose rows and curves are written at once."""

SHOWN = 20
"""Contradictions that one message names."""

BLOBS: tuple[Literal["states", "backbones"], ...] = ("states", "backbones")


class ContradictionError(LedgerError):
    """Ledgers that cannot be united as they are; the message names each contradiction."""


# ------------------------------------------------------------------------------------------ merge


@dataclass(frozen=True)
class Merged:
    """What a merge found and wrote."""

    trials: int
    """Finished trials that were copied."""
    begun: int
    """Trials that none had finished, copied with a state to go on from."""
    present: int
    """Finished trials of the sources that were there already."""
    doubled: int
    """Finished trials that several of the ledgers have, with the same figures."""
    left_out: tuple[Conflict, ...]
    """Rows that stayed behind, since those of the ledger that comes first were preferred."""
    failures: int
    """Notes of failed attempts that were copied."""


@dataclass(frozen=True, eq=False)
class _Source:
    name: str
    ledger: Ledger
    rows: Mapping[str, Row]
    """Trial -> its row: the columns that are compared."""
    notes: Mapping[tuple[str, str], Row]
    """(trial, attempt) -> its note of a failed attempt: when that was."""
    names: Mapping[Kept, Mapping[str, Sequence[str]]]
    """Kind -> trial -> the names of its own objects."""


@dataclass(frozen=True)
class _Choice:
    """Which ledgers a trial comes from."""

    source: _Source
    """Whose row it is."""
    peers: tuple[_Source, ...]
    """All that have the same figures, in the order in which they are asked for what is kept of the
    trial; `source` is the first."""


def merge(sources: Sequence[str | Path], into: str | Path, *, prefer_first: bool = False) -> Merged:
    """Unite ledgers: copy into one what it lacks. What it has already stays as it is.

    Of several rows of a trial with the same figures, the one that was finished first is taken, so
    that the order of the ledgers does not matter; its curve comes from the same ledger.

    Args:
        sources: Ledgers: folders, buckets, or bundles.
        into: The ledger that gets what the others have.
        prefer_first: Where figures differ and both may be right, keep those of the ledger that
            comes first, `into` before all. Else that is refused too.

    Raises:
        ContradictionError: If two ledgers have other figures for one trial. Nothing was written.
        LedgerError: If a ledger cannot be read, or holds damaged files; each is named, and nothing
            was written.
    """
    with ExitStack() as stack:
        target = _read(str(into), Ledger(into, write=True))
        others = [_read(str(name), stack.enter_context(opened(name))) for name in sources]
        every = [target, *others]
        choices, left_out = _choices(every, prefer_first=prefer_first)
        begun = _begun(every, choices)
        notes = _notes(target, others)
        blobs = [
            (source, name)
            for trial, choice in choices.items()
            for kind in BLOBS
            for source, name in _blob(kind, trial, choice, target)
        ]
        for source, name in blobs:
            source.ledger.copy(name)  # looks at all of it; the other kinds have been read
        for source, name in begun.values():
            source.ledger.copy(name)

        new = {t: one.source for t, one in choices.items() if one.source is not target}
        target.ledger.drop_leftovers()
        for trial in new:
            # What it has of an attempt that never ended would pass for what was trained.
            for kind in ("states", "curves"):
                if trial in target.names[kind]:
                    target.ledger.remove(kind, {trial})
        _copy(target, blobs)
        for trial, (source, state) in begun.items():
            curve = source.names["curves"].get(trial, ())
            _copy(target, [(source, name) for name in (*curve, state)])
        _import_failures(target, notes)
        _copy(target, [(one, name) for one in others for name in one.ledger.notes.names()])
        for trials in _batched(sorted(new)):
            _import_trials(target, {trial: new[trial] for trial in trials})
    return Merged(
        trials=len(new),
        begun=len(begun),
        present=len({trial for one in others for trial in one.rows} & target.rows.keys()),
        doubled=sum(len(one.peers) > 1 for one in choices.values()),
        left_out=tuple(left_out),
        failures=len(notes),
    )


def _read(name: str, ledger: Ledger) -> _Source:
    kinds: tuple[Literal["trials", "failures", "curves"], ...] = ("trials", "failures", "curves")
    if damage := [problem for kind in kinds for problem in ledger.damaged(kind)]:
        raise LedgerError("\n".join([f"{name}: holds damaged files; nothing was written", *damage]))
    noted = ledger.failures(columns=["trial_id", "attempt", "at"]).to_pylist()
    notes = {(one["trial_id"], one["attempt"]): one for one in noted}
    by_name: tuple[Kept, ...] = (*BLOBS, "curves")
    names = {kind: ledger.names(kind) for kind in by_name}
    return _Source(name, ledger, rows(ledger), notes, names)


def _choices(
    every: Sequence[_Source], *, prefer_first: bool
) -> tuple[dict[str, _Choice], list[Conflict]]:
    target = every[0]
    choices: dict[str, _Choice] = {}
    left_out: list[Conflict] = []
    contradictions: list[str] = []
    for trial in sorted({trial for one in every for trial in one.rows}):
        having = [one for one in every if trial in one.rows]
        if not prefer_first:
            having.sort(key=lambda one: (one is not target, *_finished(one.rows[trial])))
        first, peers = having[0], [having[0]]
        for other in having[1:]:
            found = clash(first.rows[trial], other.rows[trial])
            if found is None:
                peers.append(other)
            elif prefer_first and found.excuse:
                left_out.append(found)
            else:
                contradictions.append(f"{first.name} and {other.name}: {found}")
        peers.sort(key=lambda one: (one is not first, *_finished(one.rows[trial])))
        choices[trial] = _Choice(first, tuple(peers))
    if contradictions:
        raise ContradictionError(_told(contradictions))
    return choices, left_out


def _finished(row: Row) -> tuple[datetime, str]:
    return row["finished_at"] or datetime.max.replace(tzinfo=UTC), row["attempt"] or ""


def _told(contradictions: Sequence[str]) -> str:
    more = len(contradictions) - SHOWN
    lines = [
        f"{len(contradictions)} contradictions: one trial, other figures; nothing was written",
        *contradictions[:SHOWN],
        *([f"... and {more} more"] if more > 0 else []),
    ]
    advice = (
        "with a reason in brackets both may be right, and --prefer-first keeps those of the ledger "
        "that comes first; without one, one of them is wrong: `sweep run FILE --only TRIAL "
        "--results FRESH` shows which"
    )
    return "\n".join([*lines, advice])


def _begun(
    every: Sequence[_Source], finished: Mapping[str, object]
) -> dict[str, tuple[_Source, str]]:
    # Trial -> its furthest state, of those that nobody has finished.
    target = every[0]
    out: dict[str, tuple[_Source, str]] = {}
    for trial in sorted({trial for one in every for trial in one.names["states"]}):
        if trial not in finished and trial not in target.names["states"]:
            saved = [(one, name) for one in every for name in one.names["states"].get(trial, ())]
            # By step; an end whose row was never written comes last.
            out[trial] = max(saved, key=lambda own: own[1].removesuffix(".safetensors"))
    return out


def _notes(target: _Source, others: Sequence[_Source]) -> dict[tuple[str, str], _Source]:
    # A second note of an attempt takes the place of the first, so that of two the later one counts.
    latest: dict[tuple[str, str], _Source] = {}
    for one in others:
        for key, note in one.notes.items():
            if key in target.notes:
                continue
            if key not in latest or latest[key].notes[key]["at"] < note["at"]:
                latest[key] = one
    return latest


def _blob(
    kind: Literal["states", "backbones"], trial: str, choice: _Choice, target: _Source
) -> Iterator[tuple[_Source, str]]:
    # What is kept of a finished trial; a state of an attempt that never ended is none of that.
    name = f"{kind}/{trial}.safetensors"
    having = [one for one in choice.peers if name in one.names[kind].get(trial, ())]
    if having and target not in having:
        yield having[0], name


def _copy(target: _Source, objects: Sequence[tuple[_Source, str]]) -> None:
    for source, name in objects:
        target.ledger.import_object(name, source.ledger.copy(name))


def _batched(trials: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(trials), TOGETHER):
        yield trials[start : start + TOGETHER]


def _import_failures(target: _Source, notes: Mapping[tuple[str, str], _Source]) -> None:
    tables = []
    for source in dict.fromkeys(notes.values()):
        table = source.ledger.failures({trial for trial, _ in notes})
        keys = zip(
            *(table.column(name).to_pylist() for name in ("trial_id", "attempt")), strict=True
        )
        chosen = [number for number, key in enumerate(keys) if notes.get(key) is source]
        tables.append(take(table, np.array(chosen, dtype=np.int64)))
    if tables:
        target.ledger.import_rows("failures", pa.concat_tables(tables))


def _import_trials(target: _Source, sources: Mapping[str, _Source]) -> None:
    """Write curves and rows of trials from where they come: a segment of each, the rows last."""
    having = target.ledger.curves(sources, columns=["trial_id"]).column(0).unique().to_pylist()
    curves, ended = [], []
    for source in dict.fromkeys(sources.values()):
        own = [trial for trial, one in sources.items() if one is source]
        # Of a merge that was killed before it came to the rows.
        curves.append(source.ledger.curves(set(own).difference(having)))
        ended.append(source.ledger.trials(own))
    target.ledger.import_rows("curves", pa.concat_tables(curves))
    target.ledger.import_rows("trials", pa.concat_tables(ended))


# ---------------------------------------------------------------------------------------- upgrade


@dataclass(frozen=True)
class Upgraded:
    """What an upgrade found and wrote."""

    merged: Merged
    stale: tuple[str, ...]
    """Which rows no plan counts as done, and why."""


def upgrade(old: str | Path, into: str | Path) -> Upgraded:
    """Write a ledger anew in the layout of today. The old one stays as it is.

    No figure changes, and no id: what an older version of a task gave stays what it was, and is
    stale.

    Args:
        old: The ledger, or a bundle.
        into: Another one. What it has already stays.

    Raises:
        ContradictionError: If both have one trial, with other figures. Nothing was written.
        LedgerError: If a ledger cannot be read, or holds damaged files; each is named, and nothing
            was written.
    """
    with opened(old) as ledger:
        if Ledger(into).uri == ledger.uri:
            raise LedgerError(
                f"{into}: is the old ledger itself, whose rows are never rewritten; name a new one"
            )
        merged = merge([ledger.uri], into)
        return Upgraded(merged, tuple(_stale(rows(ledger).values())))


def _stale(found: Iterable[Row]) -> Iterator[str]:
    reasons: Counter[str] = Counter()
    for row in found:
        identity, version = row["identity_version"], row["task_version"]
        own = TASKS.get(row["task"])
        if identity != IDENTITY_VERSION:
            reasons[f"under identity version {identity}, which is {IDENTITY_VERSION} now"] += 1
        elif own is not None and version != own.version:
            task = row["task"]
            reasons[f"under version {version} of task {task}, which is {own.version} now"] += 1
    for reason, number in reasons.items():
        yield f"{number:,} trained {reason}: stale, `sweep run FILE --stale` trains anew"
