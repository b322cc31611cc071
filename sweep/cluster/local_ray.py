"""A Ray of our own on this machine: its folder, its processes, what it needs, what it says.

All that Ray starts for us writes into one folder, by which it is known: at the end of a run what
is left of it is ended, and what a killed run left is ended and removed by the next one. Whoever is
killed cannot tidy up, so that nothing of this needs to have been told to anybody.
"""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from fpt.files import cache_folder

PREFIX = "fpt-sweep-"
"""What the names of the folders begin with."""

SHORT = 20
"""Characters that the path of the temporary folder may have: Ray puts sockets below it, whose paths
may have 107 (103 on macOS)."""

NOT_FOR_RAY = frozenset({signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
"""Signals that reach a whole process group and are meant for the driver alone: Ray's processes must
outlive them for as long as trials save their states. Ray itself keeps SIGINT from them."""

THREADS = (250, 4, 30)
"""Threads and processes that a Ray of our own takes: by itself, for each core, for each worker."""

ADDRESS_SPACE = 3 * 1024**3
"""Bytes of address space that a process of Ray's takes, with torch in it."""

KEPT_LOGS = 20
"""Files with what Ray itself has said; older ones are removed."""

NEEDED = ("raylet", "gcs_server")
"""Processes without which no trial trains. The others show and log, and a run goes on without."""


class LimitError(Exception):
    """A limit of this machine under which no Ray starts; the message says which."""


# ---------------------------------------------------------------------------------------- a folder


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a folder for Ray's files, removed at the end with all that still writes into it.

    What killed runs have left is ended and removed first.

    Raises:
        LimitError: If there is no temporary folder that can be written.
    """
    try:
        parent = Path(tempfile.gettempdir())
        if len(str(parent)) > SHORT:
            parent = Path("/tmp")
        _remove_remains(parent)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    except OSError as error:
        raise LimitError(f"no temporary folder can be made ({error}); set TMPDIR to one") from None
    with (folder / "new").open("w") as lock:
        # The kernel lets go of it when this process ends, however it ends. It gets the name that
        # others look for once it is locked.
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "new").rename(folder / "lock")
        try:
            yield folder
        finally:
            end_processes([folder])
            shutil.rmtree(folder, ignore_errors=True)


def _remove_remains(parent: Path) -> None:
    for old in parent.glob(f"{PREFIX}*/lock"):
        try:
            with old.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                end_processes([old.parent])
                shutil.rmtree(old.parent, ignore_errors=True)
        except OSError:
            continue  # it belongs to a running driver, or to somebody else


def processes_in(folder: Path) -> list[psutil.Process]:
    """Return this user's processes that write into a folder, but for this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.uids().real != os.getuid():
                continue
            # Who only reads there is somebody's `tail`. Not every system tells the two apart.
            if any(
                Path(one.path).is_relative_to(folder) and getattr(one, "mode", "w") != "r"
                for one in process.open_files()
            ):
                found.append(process)
    return found


def end_processes(folders: Iterable[Path], patience: float = 10.0) -> None:
    """Kill this user's processes that write into some folders, and wait for their ends."""
    for folder in folders:
        until = time.monotonic() + patience
        # Again, since one that is looked at may have started another.
        while (found := processes_in(folder)) and time.monotonic() < until:
            for process in found:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(found, timeout=1)


# --------------------------------------------------------------------------------- what it needs


def check_limits(workers: int) -> None:
    """Refuse limits of this process under which Ray would end in pages of traceback, or never.

    Args:
        workers: Worker processes that Ray starts.

    Raises:
        LimitError: If this user may have too few processes, or a process too little memory.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY and most < ADDRESS_SPACE:
        raise LimitError(
            f"ulimit -v: {most >> 20:,} MiB of address space for a process, and Ray with torch "
            f"takes {ADDRESS_SPACE >> 20:,}; raise it (ulimit -v unlimited)"
        )
    most, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if most == resource.RLIM_INFINITY or os.geteuid() == 0:  # nothing holds root
        return
    own, per_core, per_worker = THREADS
    needed = own + per_core * (os.cpu_count() or 1) + per_worker * workers
    if (used := _threads()) + needed > most:
        raise LimitError(
            f"ulimit -u: this user may have {most:,} processes and threads and has {used:,}, and a "
            f"Ray of {workers} workers takes about {needed:,}; raise it (ulimit -u), or let "
            "another machine train (--address)"
        )


def _threads() -> int:
    """Count this user's threads."""
    found = 0
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.uids().real == os.getuid():
                found += process.num_threads()
    return found


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Keep from processes that are started in this block the signals of `NOT_FOR_RAY`.

    What comes for this process meanwhile comes at the end of the block, to the handlers that were
    there before it: Ray takes SIGTERM for itself.
    """
    handlers = {number: signal.getsignal(number) for number in NOT_FOR_RAY}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_RAY)
    try:
        yield
    finally:
        with suppress(ValueError):  # outside the main thread nobody takes a signal
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---------------------------------------------------------------------------------- what it says


@contextmanager
def apart(label: str) -> Iterator[Path | None]:
    """Let what is no Python write its errors to a file: Ray's C++ writes between our lines.

    Gives the file; None where no file can be written, and then it goes nowhere. It is removed at
    the end where nothing was said.
    """
    folder = cache_folder() / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in sorted(folder.glob("ray-*.log"), key=lambda one: one.stat().st_mtime)[
            :-KEPT_LOGS
        ]:
            old.unlink(missing_ok=True)
        file: Path | None = folder / f"ray-{label}.log"
        log = os.open(str(file), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:
        file, log = None, os.open(os.devnull, os.O_WRONLY)
    before, ours = os.dup(2), sys.stderr
    with suppress(OSError, ValueError):
        ours.flush()
    try:
        # A notebook's, or a test's, is no file, or another one than the process's own.
        own = ours.fileno() == 2
    except (OSError, ValueError, AttributeError):
        own = False
    os.dup2(log, 2)
    os.close(log)
    if own:
        sys.stderr = open(  # noqa: SIM115
            before, "w", buffering=1, encoding=ours.encoding, errors=ours.errors, closefd=False
        )
    try:
        yield file
    finally:
        if own:
            with suppress(OSError):
                sys.stderr.flush()
            sys.stderr = ours
        os.dup2(before, 2)
        os.close(before)
        if file is not None and not file.stat().st_size:
            file.unlink()
