"""What can happen to a cluster, made to happen for real."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos import machine
from tests.chaos.cluster import Cluster, Driver, Node, send
from tests.servers import MlflowServer, Postgres

PARTITION = 20.0
"""Seconds for which a node is cut off."""
LEASE = 30.0
"""Seconds after which others may take a lease."""


@dataclass
class Scene:
    """A sweep under way, and all that it depends on."""

    cluster: Cluster
    driver: Driver
    database: Postgres
    server: MlflowServer
    disk: Path
    rng: random.Random

    def node(self) -> Node:
        """A worker node."""
        return self.rng.choice(self.cluster.workers)

    def some_time(self, least: float = 5.0, most: float = 10.0) -> None:
        """Let time pass, as much as the seed says."""
        time.sleep(self.rng.uniform(least, most))

    def until_training(self) -> list[psutil.Process]:
        """Wait until workers are at it; a driver that ended meanwhile is started again."""
        found: list[psutil.Process] = []

        def training() -> bool:
            assert not self.driver.tend(), "the sweep ended before all had happened to it"
            found[:] = self.cluster.training()
            return bool(found)

        machine.wait("a trial trains", training, 300, every=0.5)
        return found


def kill_a_worker(scene: Scene) -> None:
    send([scene.rng.choice(scene.until_training())], signal.SIGKILL)


def kill_a_node(scene: Scene) -> None:
    node = scene.node()
    scene.cluster.kill(node)
    scene.some_time()
    scene.cluster.start(node, wait=False)


def kill_the_driver(scene: Scene) -> None:
    scene.driver.kill()
    scene.some_time(0, 3)
    scene.driver.start()


def kill_the_head(scene: Scene) -> None:
    """The other nodes live on for a while, without a head; then there is a new cluster."""
    scene.cluster.kill(scene.cluster.head)
    scene.some_time(0, 5)
    for node in scene.cluster.workers:
        scene.cluster.kill(node)
    scene.cluster.start_all()
    driver = scene.driver.process
    if driver is not None and driver.poll() is None:
        # It has lost its cluster for good, and is not told by the new one.
        try:
            driver.wait(60)
        except subprocess.TimeoutExpired:
            scene.driver.kill()
    scene.driver.tend()


def cut_off_a_node(scene: Scene) -> None:
    with scene.cluster.cut(scene.node()):
        time.sleep(PARTITION)


def stop_a_worker_past_its_lease(scene: Scene) -> None:
    worker = [scene.rng.choice(scene.until_training())]
    send(worker, signal.SIGSTOP)
    time.sleep(LEASE + 5)
    send(worker, signal.SIGCONT)


def stop_the_driver_past_its_lease(scene: Scene) -> None:
    """Another one takes over meanwhile, so that there are two for a while."""
    first = scene.driver.process
    assert first is not None
    os.kill(first.pid, signal.SIGSTOP)
    scene.driver.start()
    time.sleep(LEASE + 10)
    os.kill(first.pid, signal.SIGCONT)
    try:
        first.wait(120)
    except subprocess.TimeoutExpired:
        first.kill()
        first.wait()
        raise AssertionError("a driver that lost its lease went on") from None


def stop_mlflow_and_its_database(scene: Scene) -> None:
    scene.database.stop()
    scene.some_time(0, 5)
    scene.server.stop()
    scene.some_time()
    scene.database.start()
    scene.server.start()


def storage_is_read_only(scene: Scene) -> None:
    remount(scene.disk, "ro")
    try:
        scene.some_time()
    finally:
        remount(scene.disk, "rw")


def storage_is_full(scene: Scene) -> None:
    with ballast(scene.disk):
        scene.some_time()


FAULTS: tuple[Callable[[Scene], None], ...] = (
    kill_a_worker,
    kill_a_node,
    kill_the_driver,
    kill_the_head,
    cut_off_a_node,
    stop_a_worker_past_its_lease,
    stop_the_driver_past_its_lease,
    stop_mlflow_and_its_database,
    storage_is_read_only,
    storage_is_full,
)


def remount(disk: Path, option: str) -> None:
    """Make a disk read-only, or writable again."""

    def done() -> bool:
        # Not while a file is open for writing, which is never for long.
        command = ["mount", "-o", f"remount,{option}", str(disk)]
        return subprocess.run(command, capture_output=True).returncode == 0

    machine.wait(f"the disk is {option}", done, 60, every=0.01)


@contextmanager
def ballast(disk: Path) -> Iterator[None]:
    """Leave no byte of a disk."""
    path = disk / "ballast"
    try:
        with path.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue
        yield
    finally:
        path.unlink(missing_ok=True)
