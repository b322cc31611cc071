"""This machine as the tests of accidents use it: marked processes, network namespaces, small disks.

Whatever is started here bears in its environment the mark of the test process that owns it, and
whatever is mounted or made bears it in its name. So everything of a test can be found and ended,
and also what an earlier test process left behind that was itself killed. A process is only ever
ended by its id.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil

MARK = "FPT_SWEEP_CHAOS"
"""The environment variable that names the owner of a process."""
NODE = "FPT_SWEEP_CHAOS_NODE"
"""The one that names the node that it belongs to."""
PREFIX = "fpt-chaos-"
"""What the names of folders, disks and network namespaces begin with."""

_NUMBERS = itertools.count()


def _since(pid: int) -> str | None:
    """When a living process started; with its id it names a process for good."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


OWNER = f"{os.getpid()}.{_since(os.getpid())}"


def _is_dead(owner: str) -> bool:
    pid, _, since = owner.partition(".")
    return pid.isdigit() and _since(int(pid)) != since


# ------------------------------------------------------------------------------------- processes


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that a test starts."""
    return {**os.environ, MARK: OWNER, **more}


def _variables(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def processes(**wanted: str) -> list[psutil.Process]:
    """The living processes of this test process, with these variables."""
    wanted = {MARK: OWNER, **wanted}
    found = []
    for process in psutil.process_iter():
        if process.pid != os.getpid() and _variables(process).items() >= wanted.items():
            found.append(process)
    return [process for process in found if _since(process.pid) is not None]


def title(process: psutil.Process) -> str:
    """What a process calls itself; Ray's workers tell there what they run."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def end(found: Callable[[], Sequence[psutil.Process]], patience: float = 30.0) -> None:
    """Kill processes until none is left."""
    deadline = time.monotonic() + patience
    while some := found():
        for process in some:
            with contextlib.suppress(psutil.Error):
                process.kill()
        assert time.monotonic() < deadline, f"cannot be killed: {some}"
        time.sleep(0.05)


def wait(what: str, condition: Callable[[], object], patience: float, every: float = 0.1) -> float:
    """Wait until a condition holds; returns the seconds that it took."""
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        assert waited < patience, f"{what}: not within {patience:.0f} s"
        time.sleep(every)
    return time.monotonic() - began


# ------------------------------------------------------------------- folders, disks and namespaces


@contextmanager
def folder() -> Iterator[Path]:
    """A folder with a short path, since Ray puts sockets into it; removed at the end."""
    parent = Path(tempfile.gettempdir())
    path = parent / f"{PREFIX}{OWNER}-{next(_NUMBERS)}"
    if len(str(path)) > 45:
        path = Path("/tmp") / path.name
    path.mkdir()
    path.chmod(0o755)  # a database server is another user
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def disk(path: Path, megabytes: int) -> Iterator[None]:
    """A small disk, mounted at a path."""
    path.mkdir(exist_ok=True)
    source = f"{PREFIX}{OWNER}"
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", source, str(path)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=False)


def may_mount() -> bool:
    """Whether this process may mount a disk."""
    return os.geteuid() == 0 and _works("unshare", "--mount", "mount", "-t", "tmpfs", "x", "/mnt")


@cache
def has_namespaces() -> bool:
    """Whether this machine lets us have networks of our own."""
    if os.geteuid() or not (shutil.which("ip") and shutil.which("nsenter")):
        return False
    name = f"{PREFIX}{OWNER}-probe"
    inside = ("nsenter", f"--net=/run/netns/{name}", "ip", "link")
    try:
        return (
            _works("ip", "netns", "add", name)
            and _works(*inside, "add", "veth1", "type", "veth", "peer", "name", "veth2")
            and _works(*inside, "add", "bridge", "type", "bridge")
        )
    finally:
        _works("ip", "netns", "del", name)


def _works(*command: str) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


class Network:
    """A switch, and hosts that are plugged into it, each in a namespace of its own.

    Nothing of it is seen from outside. Two of them have different addresses all the same: drivers
    tell clusters apart by the address.
    """

    def __init__(self) -> None:
        number = next(_NUMBERS)
        self._name = f"{PREFIX}{OWNER}-{number}"
        self._net = f"10.77.{number % 256}"
        self._hosts: dict[str, int] = {}
        self._add("switch")
        self._ip("switch", "link", "add", "bridge", "type", "bridge")
        self._ip("switch", "link", "set", "bridge", "up")

    def plug(self, host: str) -> str:
        """Make a host; returns its address."""
        number = self._hosts[host] = len(self._hosts) + 1
        self._add(host)
        port, peer = f"port{number}", ["eth0", "netns", self._full(host)]
        self._ip("switch", "link", "add", port, "type", "veth", "peer", "name", *peer)
        self._ip("switch", "link", "set", port, "master", "bridge", "up")
        address = f"{self._net}.{number}"
        self._ip(host, "address", "add", f"{address}/24", "dev", "eth0")
        self._ip(host, "link", "set", "eth0", "up")
        return address

    def cut(self, host: str) -> None:
        """Pull the plug of a host."""
        self._ip("switch", "link", "set", f"port{self._hosts[host]}", "down")

    def mend(self, host: str) -> None:
        """Plug it in again."""
        self._ip("switch", "link", "set", f"port{self._hosts[host]}", "up")

    def inside(self, host: str) -> list[str]:
        """What to put before a command that is to run on a host."""
        return ["nsenter", f"--net=/run/netns/{self._full(host)}"]

    def remove(self) -> None:
        """End the hosts and the switch."""
        for host in [*self._hosts, "switch"]:
            _works("ip", "netns", "del", self._full(host))

    def _full(self, host: str) -> str:
        return f"{self._name}-{host}"

    def _add(self, host: str) -> None:
        subprocess.run(["ip", "netns", "add", self._full(host)], check=True)
        self._ip(host, "link", "set", "lo", "up")

    def _ip(self, host: str, *words: str) -> None:
        subprocess.run(["ip", "-n", self._full(host), *words], check=True)


def clear_leftovers() -> None:
    """End and remove what belongs to test processes that are gone."""

    def orphans() -> list[psutil.Process]:
        found = ((process, _variables(process).get(MARK)) for process in psutil.process_iter())
        return [p for p, owner in found if owner and _is_dead(owner) and _since(p.pid) is not None]

    end(orphans)
    for line in Path("/proc/mounts").read_text().splitlines():
        source, place = line.split()[:2]
        if source.startswith(PREFIX) and _is_dead(source.removeprefix(PREFIX)):
            _works("umount", "--lazy", place)
    for parent in {Path("/run/netns"), Path(tempfile.gettempdir()), Path("/tmp")}:
        for path in parent.glob(f"{PREFIX}*"):
            if _is_dead(path.name.removeprefix(PREFIX).partition("-")[0]):
                if parent.name == "netns":
                    _works("ip", "netns", "del", path.name)
                else:
                    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def clean() -> Iterator[None]:
    """Nothing of earlier tests before, nothing of this one after."""
    clear_leftovers()
    try:
        yield
    finally:
        for process in processes():  # a stopped process would not see its parent's end
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)
        end(processes)
