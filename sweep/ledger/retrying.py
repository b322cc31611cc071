"""One policy for what fails for a while: try again after pauses that double, up to a limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

PAUSES = (1.0, 30.0)
"""Seconds between two tries at storage that fails: the first, doubled up to the last."""


def doubling(first: float, longest: float) -> Iterator[float]:
    """Yield seconds to pause, without end: each twice the one before, up to the longest."""
    while True:
        yield first
        first = min(2 * first, longest)


def retry(
    call: Callable[[], T],
    on: type[Exception],
    *,
    within: float,
    pauses: tuple[float, float] | None = None,
    gives_up: Callable[[Exception], object] = lambda error: False,
) -> T:
    """Call until it no longer fails.

    Args:
        call: What may fail; a second call must do no harm.
        on: The error after which it is called again; others pass.
        within: Seconds after which the last error is raised.
        pauses: See `doubling`; None: those of `PAUSES`.
        gives_up: Asked after each such error; something true raises it at once.
    """
    until = time.monotonic() + within
    waits = doubling(*(pauses or PAUSES))
    while True:
        try:
            return call()
        except on as error:
            pause = next(waits)
            if time.monotonic() + pause > until or gives_up(error):
                raise
        time.sleep(pause)
