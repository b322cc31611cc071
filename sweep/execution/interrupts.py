"""Signals that stop a run: the first one lets running trials save their states, Ctrl-C again kills.

Besides Ctrl-C these are what tells a process that it is about to be ended: SIGTERM (Kubernetes,
Slurm, systemd), SIGHUP (a terminal that was closed, a connection that broke), and SIGUSR1 and
SIGUSR2 (`sbatch --signal=USR1@120`).
"""

from __future__ import annotations

import signal
import threading
import time
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What stops a run."""


class Interrupts:
    """Counts the signals that ask this process to stop; use as a context manager.

    Outside the main thread no signal can be caught, and nothing is interrupted.

    Raises:
        KeyboardInterrupt: On Ctrl-C after any other of them. Those that are no Ctrl-C never kill,
            however often they come: a terminal that is closed sends SIGHUP twice, and Slurm sends
            SIGTERM after the signal that was to announce it.
    """

    def __init__(self) -> None:
        self.count = 0
        self.first: int | None = None
        """The signal that came first."""
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self.catch()
        return self

    def catch(self) -> None:
        """Take the signals; to be repeated once Tune has started, since it takes SIGUSR1.

        A SIGHUP that this process was told to ignore (`nohup`) stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            old = signal.getsignal(number)
            if number == signal.SIGHUP and old is signal.SIG_IGN:
                continue
            signal.signal(number, self._handle)
            self._old.setdefault(number, old)

    def __exit__(self, *exception: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)

    def wait(self, seconds: float) -> None:
        """Return after so long, or soon after the first signal."""
        end = time.monotonic() + seconds
        while not self.count and time.monotonic() < end:
            time.sleep(min(0.1, seconds))

    def _handle(self, number: int, frame: object) -> None:
        # What it interrupts may hold any lock, that of an Event included: it must not need one.
        self.count += 1
        if self.first is None:
            self.first = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
