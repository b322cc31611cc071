"""Notes on sweeps and their runs: pauses, quotes, lists of trials, and what claims said and when.

    leases/paused/<sweep>.json              whoever runs it is asked to stop
    quotes/<sweep>/<time>.json              what a run was expected to cost
    notes/<sweep>/<about>/<name>.json       its claims before the first row; readings; generations
    cache/sweep-<name>.json                 the trials that its last run had

None of them belongs to a trial, and none is needed to read a result.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any, Literal

from sweep.ledger.datasets import is_object
from sweep.ledger.storage import Storage

About = Literal["families", "readings", "generations"]
"""What notes on a sweep's claims are about. families: lists of claims in force; readings: verdicts
that were shown; generations: points that an adaptive sampler asked for."""


class RunNotes:
    """The notes of a ledger. Every method raises LedgerError where the storage fails."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def pause(self, sweep: str) -> None:
        """Ask whoever runs a sweep to stop; running trials save their states."""
        mark = {"token": secrets.token_hex(8)}
        self._storage.put(f"leases/paused/{sweep}.json", json.dumps(mark).encode())

    def paused(self, sweep: str) -> bool:
        """Return whether a sweep is to stop, or to stay stopped."""
        return self.pause_mark(sweep) is not None

    def pause_mark(self, sweep: str) -> str | None:
        """Return what tells the pause of a sweep from another one of it; None: it is not paused."""
        data = self._storage.get(f"leases/paused/{sweep}.json")
        return None if data is None else data.decode(errors="replace")

    def resume(self, sweep: str, mark: str | None = None) -> None:
        """Let a sweep run again; with a mark, only if nobody has asked for another pause since."""
        if mark is None or self.pause_mark(sweep) == mark:
            self._storage.delete([f"leases/paused/{sweep}.json"])

    def put_quote(self, sweep: str, name: str, quote: Mapping[str, Any]) -> None:
        """Keep what a run was expected to cost; names sort by time."""
        data = json.dumps(quote, separators=(",", ":")).encode()
        self._storage.create(f"quotes/{sweep}/{name}.json", data)

    def last_quote(self, sweep: str) -> dict[str, Any] | None:
        """Return the last quote of a sweep, or None: there is none, or none that can be read."""
        names = self._storage.list(f"quotes/{sweep}")
        data = self._storage.get(max(names)) if names else None
        try:
            return None if data is None else dict(json.loads(data))
        except ValueError:
            return None

    def save_trial_list(self, sweep: str, trials: Mapping[str, str]) -> None:
        """Note which trials a run of a sweep has: id -> label."""
        self._storage.put(f"cache/sweep-{sweep}.json", json.dumps(trials).encode())

    def trial_list(self, sweep: str) -> dict[str, str]:
        """Return what the last run of a sweep noted; nothing if there is no such note."""
        try:
            found = json.loads(self._storage.get(f"cache/sweep-{sweep}.json") or b"{}")
            return {str(name): str(label) for name, label in found.items()}
        except (ValueError, AttributeError):
            return {}

    def of_other_sweeps(self, sweep: str) -> set[str]:
        """Return the trials that other sweeps' last runs noted."""
        listed = self._storage.list("cache")
        notes = (re.fullmatch(r"cache/sweep-(.+)\.json", name) for name in listed)
        names = {note[1] for note in notes if note} - {sweep}
        return {trial for name in names for trial in self.trial_list(name)}

    def put(self, sweep: str, about: About, name: str, note: Mapping[str, Any]) -> bool:
        """Keep a note on a sweep's claims, unless there is one of its name; True: there was none.

        Args:
            sweep: The name of the sweep.
            about: See `About`.
            name: Letters, digits, dots and dashes.
            note: JSON values.
        """
        return self._storage.create(f"notes/{sweep}/{about}/{name}.json", written(note))

    def on_claims(self, sweep: str, about: About) -> dict[str, dict[str, Any]]:
        """Return name -> note on a sweep's claims, by name; one that cannot be read is left out."""
        out = {}
        for path in sorted(self._storage.list(f"notes/{sweep}/{about}")):
            try:
                note = json.loads(self._storage.get(path) or b"")
            except ValueError:
                continue
            if isinstance(note, dict):
                out[path.rsplit("/", 1)[1].removesuffix(".json")] = note
        return out

    def names(self, sweep: str | None = None) -> list[str]:
        """Return the names of the notes on a sweep's claims, or on those of all, as of objects."""
        listed = self._storage.list(f"notes/{sweep}" if sweep else "notes")
        return sorted(filter(is_object, listed))


def written(note: Mapping[str, Any]) -> bytes:
    """Return a note on a sweep's claims as it lies in a ledger."""
    return json.dumps(note, separators=(",", ":"), sort_keys=True).encode()
