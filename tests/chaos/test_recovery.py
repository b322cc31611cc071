"""How long it takes until a trial goes on elsewhere, where there is room for it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from sweep.ledger.ledger import Ledger
from sweep.sweepfile.expansion import load
from tests.chaos import account, machine
from tests.chaos.cluster import Cluster, Driver, Node, Pace

pytestmark = pytest.mark.slow

EVALUATED = 4
"""The step of the first record of a trial that starts anew."""
KILL, PARTITION = 20.0, 30.0
"""Seconds that it may take on a machine with nothing else to do."""
SLACK = 6.0
"""Times as long on one that is busy: most of it is the start of a process that imports torch."""
SETTLED = 5.0
"""Seconds without another process that begins to train, for all to have begun."""
HEALED = 30.0
"""Seconds after which a node that was cut off is back."""


def marks(cluster: Cluster) -> set[int]:
    """The processes that have trained: the task leaves a mark of each (see `paced`)."""
    return {int(path.suffix[1:]) for path in cluster.pace.file.parent.glob("pace.*")}


def settled(cluster: Cluster) -> bool:
    """Whether nobody has begun for a while: who begins after an accident does so because of it."""
    before = marks(cluster)
    time.sleep(SETTLED)
    return marks(cluster) == before


def until_another_trains(cluster: Cluster, lost: Node, patience: float) -> float:
    """Seconds until a trial is trained by a process that did none before, but on the lost node."""
    before = marks(cluster)

    def another() -> bool:
        new = marks(cluster) - before
        return bool(new) and bool(new - {process.pid for process in cluster.processes(lost)})

    return machine.wait("a trial goes on elsewhere", another, patience)


def test_trials_go_on_elsewhere_soon(tell: Callable[[str], None]) -> None:
    with ExitStack() as stack:
        folder = stack.enter_context(machine.folder())
        file = account.sweep_file(folder, seeds=2)
        sweep = load(file)
        quiet = account.Quiet(file)
        pace = Pace(folder, 0.2)
        cluster = Cluster(folder, pace=pace, cores=5)
        stack.enter_context(cluster)
        results = folder / "results"
        driver = Driver(
            cluster,
            file,
            str(results),
            log=folder / "driver.log",
            FPT_SWEEP_CACHE=str(folder / "cache"),
            MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db",
        )
        watch = account.Watch(results / "trials")
        stack.enter_context(watch.watching())
        ledger = Ledger(results)
        needed = {point.parent for point in sweep.points} - {None}
        try:
            driver.start()

            def training() -> Node | None:
                assert not driver.tend(), "it ended too soon"
                return next((n for n in cluster.workers if cluster.training([n])), None)

            machine.wait("a backbone", lambda: needed <= ledger.done(), 300)
            pace.set(2.0)
            trials = {point.trial_id for point in sweep.points}

            def behind_a_record() -> bool:
                # All of them: whichever is hit is then one that can go on.
                under_way = trials - ledger.done()
                seen = set(ledger.curves(under_way).column("trial_id").to_pylist())
                return bool(under_way) and under_way <= seen & ledger.states()

            def a_node_that_trains() -> Node:
                # With a state behind a record, so that going on is more than starting again.
                machine.wait("a state", behind_a_record, 300)
                machine.wait("the others have begun", lambda: settled(cluster), 300)
                node = None
                while node is None:
                    machine.wait("a trial trains", training, 300)
                    node = training()
                return node

            killed = a_node_that_trains()
            cluster.kill(killed)
            after_kill = until_another_trains(cluster, killed, SLACK * KILL)
            cluster.start(killed)
            lonely = a_node_that_trains()
            began = time.monotonic()
            with cluster.cut(lonely):
                after_cut = until_another_trains(cluster, lonely, SLACK * PARTITION)
                time.sleep(max(0.0, HEALED - (time.monotonic() - began)))
            pace.set(0)
            machine.wait("the end", driver.tend, 600)
            found = account.settle(sweep, str(results), quiet.figures(), watch=watch)
        except BaseException:
            tell(driver.tail())
            raise
        tell(
            f"a trial went on {after_kill:.1f} s after its node was killed and {after_cut:.1f} s "
            f"after its node was cut off; {found}"
        )
        account.check(found, driver.tail())
        steps = defaultdict[tuple[str, str], set[int]](set)
        for trial, attempt, points in account.pieces(ledger):
            if trial in trials:
                steps[trial, attempt] |= {point["step"] for point in points}
        first = {key: min(seen) for key, seen in steps.items()}
        assert max(first.values()) > EVALUATED, f"none went on from a state: {first}"
