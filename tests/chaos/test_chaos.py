"""A sweep on a real cluster to which everything happens that can: nothing is lost, nothing twice.

`make chaos SEEDS=10` does it with ten seeds, one after another.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from sweep.sweepfile.expansion import load
from tests.chaos import account, faults, machine
from tests.chaos.cluster import Cluster, Driver, Pace
from tests.servers import MlflowServer, Postgres, free_port, postgres_binaries

pytestmark = pytest.mark.slow

SEEDS = int(os.environ.get("FPT_SWEEP_CHAOS_SEEDS", "1"))
PACES = (0.05, 0.25, 1.0)
"""Seconds that a batch of a trial takes, three batches a step, so that the sweep lasts as long as
something happens to it: where it lags behind, goes along, and is ahead."""
END = 600.0
"""Seconds to go on once nothing happens any more."""


@pytest.mark.parametrize("seed", range(1, SEEDS + 1))
def test_nothing_is_lost_and_nothing_twice(seed: int, tell: Callable[[str], None]) -> None:
    if not machine.may_mount():
        pytest.skip("this process may not mount a disk")
    postgres_binaries()
    rng = random.Random(seed)
    order = rng.sample(faults.FAULTS, len(faults.FAULTS))
    happened: list[str] = []

    with ExitStack() as stack:
        folder = stack.enter_context(machine.folder())
        disk = folder / "disk"
        stack.enter_context(machine.disk(disk, megabytes=32))
        file = account.sweep_file(folder)
        sweep = load(file)
        quiet = account.Quiet(file)
        pace = Pace(folder, PACES[1])
        cluster = Cluster(folder, pace=pace)
        stack.callback(cluster.__exit__)
        inside = cluster.head.inside
        database = Postgres(folder / "pg", free_port(), inside=inside, env=machine.environment())
        server = MlflowServer(
            folder / "mlflow", database.uri, free_port(), inside=inside, env=machine.environment()
        )
        stack.callback(server.stop)
        with ThreadPoolExecutor(1) as beside:
            served = beside.submit(lambda: (database.start(), server.start()))
            cluster.__enter__()
            served.result()
        driver = Driver(
            cluster,
            file,
            str(disk / "results"),
            log=folder / "driver.log",
            MLFLOW_TRACKING_URI=server.uri,
            FPT_SWEEP_CACHE=str(folder / "cache"),
        )

        def keep_pace(done: int) -> None:
            ahead = done / len(sweep.all) - (len(happened) + 0.5) / len(order)
            ahead_by = 0 if ahead < -0.2 else 1 if ahead < 0 else 2
            pace.set(0 if len(happened) == len(order) else PACES[ahead_by])

        watch = account.Watch(disk / "results" / "trials", keep_pace)
        stack.enter_context(watch.watching())
        scene = faults.Scene(cluster, driver, database, server, disk, rng)
        how = "network namespaces" if cluster.network else "loopback addresses"
        workers = len(cluster.workers)
        tell(f"seed {seed}: {len(sweep.all)} trials on a head and {workers} workers in {how}")
        try:
            driver.start()
            for fault in order:
                scene.until_training()
                scene.some_time(1, 4)
                scene.until_training()
                name = fault.__name__.replace("_", " ")
                tell(f"{len(watch.first)} trials done; {name}")
                fault(scene)
                happened.append(name)
            end = time.monotonic() + END
            while not driver.tend():
                assert time.monotonic() < end, "the sweep did not end"
                time.sleep(0.2)
            machine.wait("nobody trains any more", lambda: not cluster.busy(), 60)
            driver.other("mirror")
            runs = database.runs(sweep.name)
            found = account.settle(sweep, driver.results, quiet.figures(), watch=watch, runs=runs)
        except BaseException:
            tell(f"after {happened}:\n{driver.tail()}")
            raise
        tell(
            f"seed {seed}: {found}; {driver.runs} runs (exits {driver.codes}), "
            f"{cluster.restarts} nodes that ended by themselves"
        )
        account.check(found, driver.tail())
        assert len(happened) == len(faults.FAULTS)
        assert not watch.changed
        server.stop()
        database.stop()
        cluster.__exit__()
        left = machine.processes()
        assert not left, [machine.title(process) for process in left]
