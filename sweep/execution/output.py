"""What code prints in a worker, kept for people: stdout, stderr, warnings, logging.

A worker has no terminal. So what is printed while a pack trains goes into a log, which the ledger
keeps with each trial of the pack, and a forgotten `breakpoint()` fails at once.
"""

from __future__ import annotations

import functools
import io
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

KEPT = 200_000
"""Characters of a log that are kept: the last ones."""

TAIL = 20
"""Lines of it that a failure's note has."""


class BreakpointError(Exception):
    """A debugger that was called where nobody can answer it."""


class Log:
    """The last of what was printed."""

    def __init__(self) -> None:
        self._pieces: deque[str] = deque()
        self._kept = 0
        self.written = 0
        """Characters so far, with those that are no longer kept."""

    def write(self, text: str) -> None:
        """Take in another piece."""
        self._pieces.append(text[-KEPT:])
        self._kept += len(self._pieces[-1])
        self.written += len(text)
        while self._kept - len(self._pieces[0]) >= KEPT:
            self._kept -= len(self._pieces.popleft())

    def text(self) -> str:
        """Return what is kept."""
        # Other threads print meanwhile: `list` copies the pieces in one go.
        text = "".join(list(self._pieces))
        cut = self.written - len(text)
        return f"... {cut:,} characters before this ...\n{text}" if cut > 0 else text

    def tail(self) -> str:
        """Return the last lines."""
        return "\n".join(self.text().rstrip().splitlines()[-TAIL:])


_log: Log | None = None


class _Stream(io.TextIOBase):
    """A stream of this process that also writes to the log of the attempt at hand, if there is one.

    It outlives the attempt: a handler of `logging` may hold it.
    """

    def __init__(self, below: TextIO) -> None:
        self._below = below

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._below.encoding

    def fileno(self) -> int:
        return self._below.fileno()

    def isatty(self) -> bool:
        return False

    def write(self, text: str, /) -> int:
        if _log is not None:
            _log.write(text)
        return self._below.write(text)

    def flush(self) -> None:
        self._below.flush()


@functools.lru_cache(maxsize=4)
def _over(below: TextIO) -> _Stream:
    return _Stream(below)


def tail() -> str:
    """Return the last lines that the attempt at hand has printed."""
    return "" if _log is None else _log.tail()


@contextmanager
def recorded(label: str) -> Iterator[Log]:
    """Keep what this process prints, and refuse debuggers.

    Args:
        label: Of the trial that `sweep debug` is to be given.
    """
    global _log

    def refuse(*_: Any, **__: Any) -> None:
        frame = sys._getframe(1)
        raise BreakpointError(
            f"{frame.f_code.co_filename}:{frame.f_lineno}: breakpoint() in a worker, which has no "
            f"terminal; remove it, or stop there with `sweep debug FILE --only '{label}'`"
        )

    before = sys.stdout, sys.stderr, sys.breakpointhook
    sys.stdout, sys.stderr, sys.breakpointhook = _over(sys.stdout), _over(sys.stderr), refuse
    outer, _log = _log, Log()
    try:
        yield _log
    finally:
        _log = outer
        sys.stdout, sys.stderr, sys.breakpointhook = before
