"""The ledger in a bucket, and a driver that is killed: nothing is lost, nothing twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import pytest

from sweep.ledger.ledger import Ledger
from sweep.sweepfile.expansion import load
from tests.chaos import account, machine
from tests.chaos.cluster import Cluster, Driver, Pace
from tests.servers import Ceph, Moto

pytestmark = pytest.mark.slow


def test_a_killed_driver_and_a_ledger_in_a_bucket(
    tell: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        folder = stack.enter_context(machine.folder())
        file = account.sweep_file(folder, seeds=10)
        sweep = load(file)
        quiet = account.Quiet(file)
        pace = Pace(folder, 0.1)
        results = "s3://ledgers/chaos"
        # On loopback addresses always: the server is seen from all of them and from here.
        cluster = Cluster(folder, pace=pace, apart=False)
        stack.enter_context(cluster)
        # The real one, where it is installed.
        kind = Moto if Ceph.missing() else Ceph
        server = kind(folder / "s3", env=machine.environment())
        stack.callback(server.stop)
        server.start()
        server.make_bucket("ledgers")
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)  # the nodes have them from the driver, or not at all
        driver = Driver(
            cluster,
            file,
            results,
            log=folder / "driver.log",
            FPT_SWEEP_CACHE=str(folder / "cache"),
            MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db",
        )
        ledger = Ledger(results)

        def reached(done: int) -> bool:
            assert not driver.tend(), "it ended too soon"
            return len(ledger.done()) >= done and bool(cluster.training())

        try:
            driver.start()
            for least in (1, 8):
                machine.wait("trials done", partial(reached, least), 300)
                driver.kill()
                time.sleep(1)
                driver.start()
            pace.set(0)
            machine.wait("the end", driver.tend, 600)
            found = account.settle(sweep, results, quiet.figures())
        except BaseException:
            tell(driver.tail())
            raise
        tell(
            f"a bucket of {kind.__name__}'s, and a driver killed twice: {found}; {driver.runs} runs"
        )
        account.check(found, driver.tail())
