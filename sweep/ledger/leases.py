"""Leases: one holder at a time, on storage that knows only create-if-absent.

A lease has epochs, one object each: who creates `leases/<name>/<epoch>.json` first holds the lease
in that epoch. The holder keeps overwriting `<epoch>.beat`; a released lease says so there. Whoever
wants it watches the beat: unchanged for the holder's `ttl`, by the watcher's own monotonic clock,
and the next epoch may be created. So no two clocks are ever compared, and a holder that slept finds
a higher epoch and knows that it has lost. On the holder's own machine a dead process is seen at
once. The highest epoch's object stays for good, so that epochs only rise: an epoch is a fencing
token.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self

from sweep.ledger import machine
from sweep.ledger.storage import LedgerError, Storage

_RELEASED = b"released"


class Leases:
    """The leases of a ledger, as one watcher sees them."""

    def __init__(self, storage: Storage, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage = storage
        self._clock = clock
        self._seen: dict[str, tuple[int, bytes | None, float]] = {}
        """Name -> epoch, beat, and when this watcher first saw the two together."""

    def acquire(self, name: str, *, ttl: float = 30.0) -> Lease | None:
        """Take the lease, or learn that somebody else holds it; never waits.

        A holder on another machine that died is only known by its beat: ask again until `ttl`
        seconds have passed, with the same object.

        Raises:
            LedgerError: If the storage fails.
            ValueError: If the name is not made of letters, digits, dots, dashes and underscores.
        """
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"lease name {name!r}: letters, digits, '.', '-' and '_' are allowed")
        before, holder = self._look(name)
        if holder is not None:
            return None
        # The very next epoch, not the highest by now: others may have taken that one meanwhile.
        epoch = before + 1
        info = machine.pid_space() | {
            "pid": os.getpid(),
            "started": machine.started(os.getpid()),
            "ttl": ttl,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "nonce": secrets.token_hex(8),
        }
        path = f"leases/{name}/{epoch}.json"
        if not self._storage.create(path, json.dumps(info).encode()):
            return None
        others = self._storage.list(f"leases/{name}").keys() - {path}
        if max(map(_epoch, others), default=0) > epoch:
            # Others took, and tidied away, this epoch while we were about to.
            self._storage.delete([path])
            return None
        self._storage.delete(others)
        return Lease(self._storage, name, epoch, ttl, clock=self._clock)

    def holder(self, name: str) -> dict[str, Any] | None:
        """Return who holds the lease, as far as is known here: host, pid, since, epoch and more.

        Raises:
            LedgerError: If the storage fails.
        """
        return self._look(name)[1]

    def _look(self, name: str) -> tuple[int, dict[str, Any] | None]:
        """Return the highest epoch, and its holder unless that one is known to be gone."""
        epoch = _highest(self._storage, name)
        data = self._storage.get(f"leases/{name}/{epoch}.json")
        beat = self._storage.get(f"leases/{name}/{epoch}.beat")
        if data is None or beat == _RELEASED:
            return epoch, None
        try:
            info: dict[str, Any] = {"epoch": epoch, **json.loads(data)}
            _, _, note = (beat or b"").partition(b"\n")
            info["note"] = json.loads(note) if note else {}
            ttl = float(info["ttl"])
            dead = _died_here(info)
        except (ValueError, KeyError, TypeError):
            where = self._storage.where(f"leases/{name}")
            raise LedgerError(f"{where}: holds no lease of ours; delete this folder") from None
        if self._seen.get(name, ())[:2] != (epoch, beat):
            self._seen[name] = (epoch, beat, self._clock())
        expired = self._clock() - self._seen[name][2] >= ttl
        return epoch, None if dead or expired else info


@dataclass
class Lease:
    """A lease that was taken. `with lease:` keeps it alive in the background, then frees it."""

    storage: Storage
    name: str
    epoch: int
    """Rises with each holder: a fencing token."""
    ttl: float
    """Seconds without a heartbeat after which others may take it."""
    clock: Callable[[], float] = time.monotonic
    note: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that go with the next heartbeat, for whoever asks for the holder."""
    _beats: int = 0
    _lost: bool = False
    _renewed: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self._renewed = self.clock()

    @property
    def held(self) -> bool:
        """False once somebody else has it, or may have it since no heartbeat got through."""
        return not self._lost and self.clock() - self._renewed < self.ttl

    @property
    def lost(self) -> bool:
        """True once somebody else has it, for good."""
        return self._lost

    def renew(self) -> bool:
        """Send a heartbeat. False: the lease is lost for good, stop working under it.

        Raises:
            LedgerError: If the storage fails (the lease may still be kept by a later call).
        """
        now = self.clock()
        if self._lost or _highest(self.storage, self.name) != self.epoch:
            self._lost = True
            return False
        self._beats += 1
        beat = f"{self._beats}\n{json.dumps(self.note)}"
        self.storage.put(f"leases/{self.name}/{self.epoch}.beat", beat.encode())
        self._renewed = now
        return True

    def release(self) -> None:
        """Give the lease back, so that the next one need not wait.

        Raises:
            LedgerError: If the storage fails.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if not self._lost:
            self._lost = True
            self.storage.put(f"leases/{self.name}/{self.epoch}.beat", _RELEASED)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(
            target=self._heartbeat, name=f"lease-{self.name}", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Where it cannot be given back, on a full disk, the next one knows by our silence.
        with contextlib.suppress(LedgerError):
            self.release()

    def _heartbeat(self) -> None:
        while not self._stop.wait(self.ttl / 3):
            try:
                if not self.renew():
                    return
            except LedgerError:
                continue  # `held` tells when this has lasted too long


def _epoch(path: str) -> int:
    """Return the epoch of an object's name; 0 where it is a heartbeat."""
    found = re.search(r"/(\d+)\.json$", path)
    return int(found[1]) if found else 0


def _highest(storage: Storage, name: str) -> int:
    return max(map(_epoch, storage.list(f"leases/{name}")), default=0)


def _died_here(info: dict[str, Any]) -> bool:
    """Return whether the holder was a process of this machine that is gone."""
    here = machine.pid_space()
    if not here["boot"] or any(info.get(key) != value for key, value in here.items()):
        return False
    pid, began = int(info["pid"]), info["started"]
    if (started := machine.started(pid)) == machine.ENDED:
        return True
    if started is not None and began is not None:
        return started != str(began)
    # Gone, or hidden: where /proc is mounted with `hidepid`, those of other users are.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False  # it is there: its beat decides
