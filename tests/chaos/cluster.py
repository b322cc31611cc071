"""Real Ray nodes on one machine: each in a network namespace, or on a loopback address."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.chaos import machine
from tests.servers import free_port

START = 300.0
"""Seconds for a node to start, on a machine with other things to do."""
TRIES = 5
"""Times that it is tried: Ray gives a node 30 seconds."""

CHECKS = {
    # A node that is silent for five seconds is dead. For tests: on a busy machine this kills nodes
    # that are well, and they are started again.
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    # Nodes without their head give up sooner than after a minute.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
}
"""Environment of all nodes."""

FRESH = 10.0
"""Seconds since its last batch for which a process is taken to train."""

_ALIASES = itertools.count(2)


class Pace:
    """How long trials take to train (see `paced`)."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.file = folder / "pace"
        self.set(seconds)

    def set(self, seconds: float) -> None:
        """Let a batch of a trial take so long."""
        staged = self.file.with_name("pace-new")
        staged.write_text(str(seconds))
        staged.replace(self.file)


@dataclass
class Node:
    """A machine of the cluster."""

    name: str
    address: str
    inside: list[str]
    """What to put before a command that is to run there."""
    arguments: list[str]
    folder: Path
    wanted: bool = False
    """Whether it is to be started again when it ends by itself."""
    starts: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")


class Cluster:
    """A head that trains nothing, and workers with a few cores each. `with` watches over it.

    A worker node that ends by itself (Ray ends one that it took for dead) is started again, as
    whatever raises real clusters would do.
    """

    def __init__(
        self,
        folder: Path,
        *,
        pace: Pace,
        workers: int = 2,
        cores: int = 2,
        apart: bool = True,
        **variables: str,
    ) -> None:
        """Lay it out; nothing is started.

        Args:
            folder: For the nodes' files, with a short path.
            pace: Of the trials.
            workers: Nodes beside the head.
            cores: That a worker node says it has.
            apart: In network namespaces, where this machine allows it.
            variables: Environment of the nodes.
        """
        self.folder = folder
        self.pace = pace
        self.network = machine.Network() if apart and machine.has_namespaces() else None
        self.variables = CHECKS | {"FPT_SWEEP_CHAOS_PACE": str(pace.file)} | variables
        self.restarts = 0
        """Nodes that ended by themselves, and were started again."""
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self.nodes: dict[str, Node] = {}
        for name in ["head", *(f"worker{k}" for k in range(1, workers + 1))]:
            if self.network:
                address, inside = self.network.plug(name), self.network.inside(name)
            else:
                address, inside = f"127.0.0.{next(_ALIASES)}", []
            self.nodes[name] = Node(name, address, inside, [], folder / name)
        port = 6390 if self.network else free_port()
        self.head = self.nodes["head"]
        self.address = f"{self.head.address}:{port}"
        for node in self.nodes.values():
            node.arguments = [
                f"--node-ip-address={node.address}",
                f"--num-cpus={0 if node is self.head else cores}",
                "--num-gpus=0",
                "--object-store-memory=80000000",
                "--memory=4000000000",
            ]
            if node is self.head:
                head = ["--head", f"--port={port}", "--include-dashboard=false"]
                node.arguments += head
            else:
                node.arguments.append(f"--address={self.address}")
            if self.network or node is self.head:
                # Nodes that share a network share the head's folder.
                node.arguments.append(f"--temp-dir={node.folder}")

    @property
    def workers(self) -> list[Node]:
        return [node for node in self.nodes.values() if node is not self.head]

    def __enter__(self) -> Cluster:
        self.start_all()
        threading.Thread(target=self._watch, name="watch-nodes", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        with self._lock:
            for node in self.nodes.values():
                self.kill(node)
        if self.network:
            self.network.remove()

    def start_all(self) -> None:
        self.start(self.head)
        for node in self.workers:
            self.start(node, wait=False)
        for node in self.workers:
            self._started(node)

    def start(self, node: Node, *, wait: bool = True) -> None:
        with self._lock:
            self.kill(node)
            node.starts += 1
            command = [
                *node.inside, sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
                "--disable-usage-stats", *node.arguments,
            ]  # fmt: skip
            with node.log.open("wb") as log:
                node.process = subprocess.Popen(
                    command,
                    env=machine.environment(**{machine.NODE: str(node.folder)}, **self.variables),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            node.wanted = True
        if wait:
            self._started(node)

    def _started(self, node: Node) -> None:
        tries = node.starts + TRIES

        def started() -> bool:
            text = node.log.read_text()
            assert node.starts < tries, f"{node.name} does not start: {text[-3000:]}"
            self._start_again(node)
            return "Ray runtime started" in text

        machine.wait(f"{node.name} started", started, START)

    def _start_again(self, node: Node) -> None:
        """Start a node again that has ended by itself."""
        with self._lock:
            if node.wanted and node.process is not None and node.process.poll() is not None:
                self.restarts += 1
                self.start(node, wait=False)

    def kill(self, node: Node) -> None:
        """End all of a node at once, as a power cut would."""
        with self._lock:
            node.wanted = False
            machine.end(lambda: self.processes(node))
            if node.process is not None:
                node.process.wait()
                node.process = None

    def processes(self, node: Node) -> list[psutil.Process]:
        return machine.processes(**{machine.NODE: str(node.folder)})

    def training(self, nodes: Sequence[Node] | None = None) -> list[psutil.Process]:
        """The processes of these worker nodes, or of all, that train a trial."""
        now = time.time()
        fresh = {
            int(path.suffix.removeprefix("."))
            for path in self.pace.file.parent.glob(f"{self.pace.file.name}.*")
            if now - path.stat().st_mtime < FRESH
        }
        found = (p for node in nodes or self.workers for p in self.processes(node))
        return [process for process in found if process.pid in fresh]

    def busy(self) -> list[psutil.Process]:
        """The processes of worker nodes that have something to do, or someone to wait for."""
        found = (p for node in self.workers for p in self.processes(node))
        return [process for process in found if _is_busy(process)]

    @contextmanager
    def cut(self, node: Node) -> Iterator[None]:
        """Cut a node off. On loopback, where there is no plug to pull, it stands still instead."""
        if self.network:
            self.network.cut(node.name)
            try:
                yield
            finally:
                self.network.mend(node.name)
        else:
            stopped = self.processes(node)
            send(stopped, signal.SIGSTOP)
            try:
                yield
            finally:
                send(stopped, signal.SIGCONT)

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            for node in self.workers:
                self._start_again(node)


def send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)


def _is_busy(process: psutil.Process) -> bool:
    name = machine.title(process)
    return name.startswith("ray::") and not name.startswith(
        ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
    )


class Driver:
    """`sweep run FILE --address ADDR` on the head's machine, again and again until all is done."""

    def __init__(
        self, cluster: Cluster, file: Path, results: str, *, log: Path, **variables: str
    ) -> None:
        self.cluster = cluster
        self.file = file
        self.results = results
        self.log = log
        self.variables = variables
        self.runs = 0
        self.codes: list[int] = []
        """How its runs ended by themselves."""
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *words: str) -> list[str]:
        return [*self.cluster.head.inside, sys.executable, "-m", "sweep", *words]

    def environment(self) -> dict[str, str]:
        return machine.environment(**self.variables)

    def spawn(self) -> subprocess.Popen[bytes]:
        self.runs += 1
        with self.log.open("ab") as log:
            log.write(f"--- run {self.runs} at {time.strftime('%H:%M:%S')}\n".encode())
            log.flush()
            return subprocess.Popen(
                self.command(
                    "run", str(self.file), "--address", self.cluster.address,
                    "--results", self.results,
                ),
                env=self.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def start(self) -> None:
        self.process = self.spawn()

    def kill(self) -> None:
        """Kill it, and reap it."""
        assert self.process is not None
        leader = psutil.Process(self.process.pid)
        found = [leader, *leader.children(recursive=True)]
        send(found, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def tend(self) -> bool:
        """Start it again if it ended with something left to do; whether all is done."""
        if self.process is not None and (code := self.process.poll()) is not None:
            self.process = None
            self.codes.append(code)
            if code == 0:
                return True
        if self.process is None:
            assert self.runs < 40, f"the sweep does not end: {self.tail()}"
            self.start()
        return False

    def other(self, *words: str, patience: float = 300.0) -> str:
        """Another command on the same file and ledger."""
        done: Any = subprocess.run(
            self.command(*words, str(self.file), "--results", self.results),
            env=self.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=patience,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return str(done.stdout)

    def tail(self, characters: int = 6000) -> str:
        return self.log.read_text(errors="replace")[-characters:]
