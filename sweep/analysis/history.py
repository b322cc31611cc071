"""What a ledger remembers of a sweep's claims: the list before the first row, and who read what.

A p value is worth what it says only if the question was there before the answer. So a run notes the
claims that are in force before it trains, with the time, and again whenever they have changed; and
every reading that shows a final verdict is noted with the pairs that it saw. Nothing is forbidden:
what came later is said wherever a verdict is shown.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from sweep.ledger.errors import in_one_line
from sweep.ledger.ledger import Ledger, LedgerError
from sweep.sweepfile import pairing
from sweep.sweepfile.reading import axis_labels
from sweep.sweepfile.schema import ClaimSpec
from sweep.sweepfile.trials import Sweep

Key = tuple[str, str, str, tuple[tuple[str, str], ...], tuple[str, ...]]
"""A contrast whichever way round it is claimed: axis, axis that pairs, metric, place, sides."""


def key(claim: ClaimSpec, place: Mapping[str, str]) -> Key:
    """Return what makes a contrast the same one, whatever is claimed of it."""
    at = tuple(sorted(place.items()))
    return claim.axis, claim.paired_by, claim.on, at, tuple(sorted(claim.sides))


@dataclass(frozen=True)
class Family:
    """A list of claims, as it was noted."""

    claims: tuple[ClaimSpec, ...]
    pairs: Mapping[str, int]
    """Axis that pairs -> its points."""
    at: str
    """When it was noted: ISO 8601, UTC."""
    digest: str
    results: int
    """Trials of the sweep that had a row by then."""


@dataclass(frozen=True)
class History:
    """What a ledger remembers of a sweep's claims."""

    families: tuple[Family, ...] = ()
    """The lists in the order of their times."""
    readings: Mapping[Key, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    """Contrast -> the pairs of each reading that was the last of its plan, the fewest first."""

    @property
    def first(self) -> Family | None:
        """The last list before there was any result; the earliest, if all came later."""
        before = [one for one in self.families if not one.results]
        return before[-1] if before else next(iter(self.families), None)

    def spent(self, contrast: Key, labels: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Return the pairs of each reading, the last of its plan, that saw a part of these."""
        earlier = self.readings.get(contrast, ())
        return tuple(one for one in earlier if set(one) < set(labels))


def digest_of(sweep: Sweep) -> str:
    """Return the digest of a sweep's list of claims and of the points that pair them."""
    return hashlib.sha256(_text(_listed(sweep)).encode()).hexdigest()[:12]


def read(sweep: Sweep, ledger: Ledger) -> History:
    """Return what a ledger remembers; a note that is not one is left out.

    Raises:
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    families = []
    for note in ledger.notes.on_claims(sweep.name, "families").values():
        try:
            families.append(
                Family(
                    claims=tuple(map(ClaimSpec.model_validate, note["claims"])),
                    pairs={str(axis): int(number) for axis, number in note["pairs"].items()},
                    at=str(note["at"]),
                    digest=str(note["digest"]),
                    results=int(note["results"]),
                )
            )
        except (KeyError, TypeError, ValueError, AttributeError, ValidationError):
            continue
    readings: dict[Key, set[tuple[str, ...]]] = {}
    for note in ledger.notes.on_claims(sweep.name, "readings").values():
        for one in note.get("contrasts", ()):
            try:
                if one["last"]:
                    place = tuple((str(a), str(b)) for a, b in one["place"])
                    of = (one["axis"], one["paired_by"], one["metric"], place, tuple(one["sides"]))
                    readings.setdefault(of, set()).add(tuple(map(str, one["pairs"])))
            except (KeyError, TypeError, ValueError):
                continue
    return History(
        tuple(sorted(families, key=lambda one: one.at)),
        {of: tuple(sorted(own, key=lambda one: (len(one), one))) for of, own in readings.items()},
    )


def change(sweep: Sweep, past: History) -> str | None:
    """Return in what the claims of a sweep differ from the list in force before the first row.

    Pairs that were added are no change: each contrast says what was read before.
    """
    first = past.first
    if first is None or first.digest == digest_of(sweep):
        return None
    axes = axis_labels(sweep.spec)
    fewer = [
        f"{axis}: {len(axes.get(axis, ()))} points, at first {number}"
        for axis, number in first.pairs.items()
        if len(axes.get(axis, ())) < number
    ]
    if first.claims == sweep.spec.claims and not fewer:
        return None
    now, then = (
        sum(len(pairing.group_pairs(claim, sweep.points)) for claim in claims)
        for claims in (sweep.spec.claims, first.claims)
    )
    when = "since they were first noted" if first.results else "after results"
    told = f"claims changed {when}: {now} contrast{'' if now == 1 else 's'}, at first {then}"
    return "; ".join([told, *fewer])


def register(sweep: Sweep, ledger: Ledger) -> None:
    """Note the claims in force, unless they are those that were noted last.

    Raises:
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read or written.
    """
    if not sweep.spec.claims:
        return
    listed, digest = _listed(sweep), digest_of(sweep)
    families = read(sweep, ledger).families
    if families and families[-1].digest == digest:
        return
    at = _now()
    results = len(ledger.done() & {point.trial_id for point in sweep.points})
    note = {**listed, "at": at, "digest": digest, "results": results}
    ledger.notes.put(sweep.name, "families", f"{at.replace(':', '')}-{digest}", note)


def note_reading(sweep: Sweep, ledger: Ledger, contrasts: Iterable[Mapping[str, Any]]) -> None:
    """Note a reading that shows final verdicts, unless the same one was noted before.

    Where nothing can be written (somebody else's bucket) it is not: who reads can do no more.

    Args:
        sweep: The sweep.
        ledger: The ledger that was read.
        contrasts: Of each that is final: axis, paired_by, metric, place, sides, pairs, last
            (whether its plan ends here), verdict and p.
    """
    shown = list(contrasts)
    if not shown:
        return
    seen = [
        {name: one[name] for name in ("axis", "metric", "place", "sides", "pairs")} for one in shown
    ]
    digest = hashlib.sha256(_text(seen).encode()).hexdigest()[:12]
    note = {"at": _now(), "family": digest_of(sweep), "contrasts": shown}
    try:
        ledger.notes.put(sweep.name, "readings", digest, note)
    except LedgerError as error:
        logging.getLogger(__name__).warning("this reading is not noted: %s", in_one_line(error))


def _listed(sweep: Sweep) -> dict[str, Any]:
    axes = axis_labels(sweep.spec)
    return {
        "claims": [claim.model_dump(mode="json") for claim in sweep.spec.claims],
        "pairs": {claim.paired_by: len(axes[claim.paired_by]) for claim in sweep.spec.claims},
    }


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
