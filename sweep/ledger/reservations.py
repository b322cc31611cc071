"""What drivers are about to train: each trial of it is reserved, by create-if-absent.

A reservation has no heartbeat of its own: it is worth as much as the lease of its driver.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from sweep.ledger.leases import Lease, Leases
from sweep.ledger.storage import Storage


class Reservations:
    """The trials that a driver trains: others leave them to it for as long as it has its lease.

    Each is `leases/trials/<trial>-<number>.json`. Who finds that of a driver that is gone makes
    the one with the next number. They spare work; what keeps results right is the commit.
    """

    def __init__(self, storage: Storage, leases: Leases, lease: Lease) -> None:
        self._storage = storage
        self._leases = leases
        self._held: dict[str, int] = {}
        """Trial id -> number of our reservation."""
        self._let_go: set[str] = set()
        """Of these the deletion is due, since storage failed."""
        self._mine = json.dumps({"lease": lease.name, "epoch": lease.epoch}).encode()

    def take(self, ids: Sequence[str]) -> set[str]:
        """Reserve trials, and return those that are ours to train.

        Raises:
            LedgerError: If the storage fails.
        """
        alive: dict[str, int | None] = {}
        """Lease -> the epoch in which somebody holds it, looked up once a call."""
        if len(ids) == 1:
            return {name for name in ids if self._take(name, alive)}
        with ThreadPoolExecutor(self._storage.threads) as pool:
            taken = pool.map(lambda name: self._take(name, alive), ids)
            return {name for name, ours in zip(ids, taken, strict=True) if ours}

    def _take(self, trial: str, alive: dict[str, int | None]) -> bool:
        # One that is to be deleted may be gone, although its deletion was told to have failed.
        if trial in self._held and trial not in self._let_go:
            return True
        number = 1
        while True:
            path = _path(trial, number)
            made = self._storage.create(path, self._mine)
            if (data := self._mine if made else self._storage.get(path)) is None:
                continue  # it was let go of just now
            if data == self._mine:  # made just now, or letting go of it had failed
                # What is left of ours beyond it is deleted with it.
                self._held[trial] = max(number, self._held.get(trial, 0))
                self._let_go.discard(trial)
                return True
            theirs = json.loads(data)
            name = theirs["lease"]
            if name not in alive:
                holder = self._leases.holder(name)
                alive[name] = None if holder is None else holder["epoch"]
            if alive[name] == theirs["epoch"]:
                return False
            number += 1

    def release(self, ids: Iterable[str]) -> None:
        """Let go of trials that have ended, or are not to be trained after all.

        Raises:
            LedgerError: If the storage fails.
        """
        again = frozenset(self._let_go)
        self._let_go.update(name for name in ids if name in self._held)
        paths = (
            (name, _path(name, number))
            for name in self._let_go
            for number in range(1, self._held[name] + 1)
        )
        # The second time, others may have taken what the first had deleted.
        self._storage.delete(
            path
            for name, path in paths
            if name not in again or self._storage.get(path) == self._mine
        )
        while self._let_go:
            del self._held[self._let_go.pop()]


def _path(trial: str, number: int) -> str:
    return f"leases/trials/{trial}-{number}.json"
