"""Reservations of trials, taken ahead of time and let go of in bulk.

On object storage each one is a request, and Tune's own thread waits for none: a thread reserves
what will be handed out next, and lets go of what has ended.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import Self

from sweep.ledger.reservations import Reservations
from sweep.ledger.storage import LedgerError

EVERY = 1.0
"""Seconds between two looks at what to reserve and what to let go of."""

AT_ONCE = 64
"""Trials that are reserved in one go: who needs one at once waits no longer than that takes."""

REFUSED_SECONDS = 2.0
"""For which another driver is taken to have a trial, without being asked for again."""


class ReservationsAhead:
    """Reserves the trials that come next; use as a context manager, and call it with trial ids."""

    def __init__(
        self,
        reservations: Reservations,
        upcoming: Callable[[int], Sequence[str]],
        ahead: int,
        *,
        at_first: int = 0,
    ) -> None:
        """Take the reservations of a driver.

        Args:
            reservations: Where they are kept.
            upcoming: Gives the trials of so many packs that are handed out next; asked by a thread.
            ahead: Packs to reserve ahead. Others cannot train them meanwhile.
            at_first: Packs more that are handed out as soon as the block begins.
        """
        self._reservations = reservations
        self._upcoming = upcoming
        self._ahead = ahead
        self._at_first = at_first
        self._lock = threading.Lock()
        """Held by whoever asks `reservations`."""
        self._ours: set[str] = set()
        """Reserved, and not handed out."""
        self._refused: dict[str, float] = {}
        """Trial id -> when another driver had it."""
        self._ended: deque[str] = deque()
        self._some = threading.Event()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="reservations", daemon=True)

    def __enter__(self) -> Self:
        with suppress(LedgerError):  # asked for again, one by one
            self._take_ahead(self._at_first + self._ahead)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._some.set()
        self._thread.join()
        self._ended.extend(self._ours)
        with suppress(LedgerError):  # they are worth nothing without our lease
            self._let_go()

    def __call__(self, ids: Sequence[str]) -> Collection[str]:
        """Return those of some trials that are ours to train; they are to be released later."""
        now = time.monotonic()
        unknown = [
            name
            for name in ids
            if name not in self._ours and now - self._refused.get(name, -1e9) >= REFUSED_SECONDS
        ]
        if unknown:
            with suppress(LedgerError):  # asked for again, once storage answers
                self._take(unknown)
        ours = self._ours.intersection(ids)
        self._ours -= ours
        self._some.set()
        return ours

    def release(self, ids: Iterable[str]) -> None:
        """Let go of trials that have ended, within a second or so."""
        self._ended.extend(ids)

    def _work(self) -> None:
        let_go = time.monotonic()
        while not self._end.is_set():
            with suppress(LedgerError):  # tried again
                self._take_ahead(self._ahead)
                if time.monotonic() - let_go >= EVERY:  # for many to come together
                    let_go = time.monotonic()
                    self._let_go()
            self._some.wait(EVERY)
            self._some.clear()

    def _take_ahead(self, most: int) -> None:
        now = time.monotonic()
        self._refused = {
            name: at for name, at in self._refused.items() if now - at < REFUSED_SECONDS
        }
        wanted = [
            name
            for name in self._upcoming(most)
            if name not in self._ours and name not in self._refused
        ]
        for start in range(0, len(wanted), AT_ONCE):
            if self._end.is_set():
                return
            self._take(wanted[start : start + AT_ONCE])

    def _take(self, ids: Sequence[str]) -> None:
        with self._lock:
            left = [name for name in ids if name not in self._ours]
            taken = self._reservations.take(left) if left else set()
            self._ours |= taken
            now = time.monotonic()
            self._refused |= {name: now for name in left if name not in taken}

    def _let_go(self) -> None:
        if not (ended := [self._ended.popleft() for _ in range(len(self._ended))]):
            return
        try:
            with self._lock:
                self._reservations.release(ended)
        except LedgerError:
            self._ended.extend(ended)
            raise
