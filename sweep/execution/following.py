"""What follows a run along in a thread of its own, and catches up at its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def following(
    name: str,
    every: float,
    sync: Callable[[bool], object],
    *,
    waits: Callable[[], bool],
) -> Iterator[None]:
    """Call `sync` at once, every so often, and once more at the end.

    Args:
        name: Of the thread.
        every: Seconds between two calls.
        sync: Told whether this call is the last one. It must not raise.
        waits: Asked at the end, again and again, whether to wait on for the last call. What has
            not come to its end by then is left behind.
    """
    ended = threading.Event()

    def follow() -> None:
        sync(False)
        while not ended.wait(every):
            sync(False)
        if waits():
            sync(True)

    thread = threading.Thread(target=follow, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        while thread.is_alive() and waits():
            thread.join(0.1)
