"""Where the time of a sweep went: into figures, into attempts that came to nothing, or twice.

A trial's row says how long it trained, over all its attempts. Each attempt that failed left a note
of the training that no saved state held, which is lost; one that ended after somebody else's row
was there left a note of work done twice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sweep.ledger.causes import MARKS, STOPS
from sweep.ledger.ledger import Ledger
from sweep.planning.tuning import resolve
from sweep.sweepfile.trials import Sweep


@dataclass(frozen=True)
class Usage:
    """What trials have cost so far. Seconds are of training, shared out among a pack's members."""

    trials: int
    """That have a row."""
    attempts: int
    """All of them: those that gave the rows, failed or were stopped, and those done twice."""
    failed_attempts: int
    stopped_attempts: int
    """Told to end, by a pause, a signal or a notice of preemption; no failures."""
    seconds: float
    """Behind the rows."""
    lost: Mapping[str, float]
    """Cause -> seconds of training that gave nothing. `doubled` is one of the causes."""
    by_device: Mapping[str, float]
    """`cpu` or `cuda` -> seconds behind the rows."""
    doubled: int
    """Trials that were finished more than once: a second row was refused."""


def spent(sweep: Sweep, ledger: Ledger) -> Usage:
    """Add up what a sweep's trials have cost.

    Raises:
        LedgerError: If the ledger cannot be read.
    """
    return spent_on([point.trial_id for point in resolve(sweep, ledger).all], ledger)


def spent_on(ids: Collection[str] | None, ledger: Ledger) -> Usage:
    """`spent`, of any trials; None: of all that the ledger knows."""
    rows = ledger.trials(ids, columns=["device", "seconds"]).to_pylist()
    by_device: dict[str, float] = defaultdict(float)
    for row in rows:
        by_device[row["device"] or "unknown"] += row["seconds"] or 0.0
    lost: dict[str, float] = defaultdict(float)
    notes = ledger.failures(ids, columns=["trial_id", "cause", "lost"]).to_pylist()
    causes = Counter(note["cause"] for note in notes)
    stopped = sum(causes[cause] for cause in STOPS)
    failed = causes.total() - stopped - sum(causes[mark] for mark in MARKS)
    twice: set[str] = set()
    for note in notes:
        if note["lost"]:
            lost[note["cause"]] += note["lost"]
        if note["cause"] == "doubled":
            twice.add(note["trial_id"])
    return Usage(
        trials=len(rows),
        attempts=len(rows) + failed + stopped + causes["doubled"],
        failed_attempts=failed,
        stopped_attempts=stopped,
        seconds=sum(by_device.values()),
        lost=dict(lost),
        by_device=dict(by_device),
        doubled=len(twice),
    )
