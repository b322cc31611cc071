"""Writing to storage that may fail for a while, in a thread that training never waits for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Self

from sweep.ledger import retrying
from sweep.ledger.storage import StorageError


class Writer:
    """Writes in a thread of its own what it is given, in that order; use as a context manager.

    What fails for want of storage is tried again, and what comes after it waits; so a write must do
    no harm when it is repeated. At the end of the block each write that is left is tried once.
    """

    def __init__(self) -> None:
        self._left: deque[Callable[[], None]] = deque()
        """What is to be written; the first one may be under way."""
        self._changed = threading.Condition()
        self._closing = False
        self._away: StorageError | None = None
        """What storage last raised, unless it has answered since."""
        self._error: BaseException | None = None
        """What a write raised else."""
        self._thread = threading.Thread(target=self._work, name="ledger writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def idle(self) -> bool:
        """Whether all that it was given is written."""
        return not self._left

    def put(self, write: Callable[[], None]) -> None:
        """Write this after what was given before; returns at once."""
        with self._changed:
            self._left.append(write)
            self._changed.notify_all()

    def drain(self, limit: float) -> None:
        """Wait until all is written.

        Args:
            limit: Seconds that storage may be away for.

        Raises:
            StorageError: If it is away for longer.
            BaseException: What a write raised else.
        """
        until = time.monotonic() + limit
        with self._changed:
            while self._left:
                self.check()
                left = until - time.monotonic()
                if self._away is not None and left <= 0:
                    raise self._away
                self._changed.wait(max(left, 0.0) or None)
            self.check()

    def check(self) -> None:
        """Raise what a write raised, if not for want of storage; nothing is written after it."""
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        pauses = retrying.doubling(*retrying.PAUSES)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._left or self._closing)
                if not self._left:
                    return
                write = self._left[0]
            try:
                write()
            except StorageError as error:
                with self._changed:
                    self._away = error
                    self._changed.notify_all()
                    if self._changed.wait_for(lambda: self._closing, next(pauses)):
                        return
                continue
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            pauses = retrying.doubling(*retrying.PAUSES)
            with self._changed:
                self._left.popleft()
                self._away = None
                self._changed.notify_all()
