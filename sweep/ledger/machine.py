"""What this machine and its processes are, on Linux and on macOS.

psutil knows most of it. Linux tells more, in /proc, which is used where it is there: the boot's own
id, and the name space that process ids are counted in.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil

ENDED = ""
"""In place of a start time: the process has died, and nobody has waited for it."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # macOS binds no process to cores
        return len(process.cpu_affinity())
    return psutil.cpu_count() or 1


def pid_space() -> dict[str, str]:
    """Return what two processes share whose ids may be compared: host, boot, and name space of ids.

    Boot is empty where it cannot be told.
    """
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        # Containers of one machine may share host name and boot, but count ids apart.
        "pids": _pid_namespace(),
    }


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        # A time, which moves with the clock: ids are not compared then, which is safe.
        return str(int(psutil.boot_time()))


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def started(pid: int) -> str | None:
    """Return when a process of this machine started, in clock ticks since boot; `ENDED` if it has.

    With the id it names a process for good, where an id alone may be given anew. None: it cannot be
    seen, or this system counts by a clock that may be set, so that the time of one process changes.
    """
    try:
        if psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return ENDED
        if not psutil.LINUX:
            return None
        boot = None
        while boot != (boot := psutil.boot_time()):  # the clock was set in between
            created = psutil.Process(pid).create_time()
    except (psutil.Error, OSError):
        return None
    return str(round((created - boot) * os.sysconf("SC_CLK_TCK")))
