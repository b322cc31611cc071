"""Several who share one ledger: each trial is committed once, and work done twice is counted."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from sweep.ledger.ledger import Ledger
from sweep.sweepfile.expansion import load
from tests.chaos import account, machine
from tests.chaos.cluster import Cluster, Driver, Pace

pytestmark = pytest.mark.slow

PROCESSES, TRIALS = 10, 200

LEASER = """
import random, sys, time
from sweep.ledger.ledger import Committed, Ledger
from sweep.sweepfile.expansion import load
from tests.support import trial_row

file, results, number = sys.argv[1:]
ledger = Ledger(results)
left = {point.trial_id: point for point in load(file).points}
with ledger.lease(f"driver-{number}") as lease:
    claims = ledger.reservations(lease)
    while left:
        trial = random.choice(list(left))
        if trial in ledger.done():
            del left[trial]
        elif claims.take([trial]):
            if trial not in ledger.done():
                time.sleep(0.02)
                row = trial_row(left.pop(trial), attempt=f"a{number}")
                committed = ledger.commit(row) == Committed()
                sys.stdout.write(f"{trial} {committed}\\n")  # at once: it may be killed
            claims.release([trial])
        else:
            time.sleep(0.01)
"""

FILE = """
sweep: shared
trial:
  task: {name: bit-xor, bits: 3}
  backbone: {name: gpt2, layers: 1, width: 8, heads: 1}
  pretraining: random
  steps: 20
axes: {seed: SEEDS}
"""


def test_ten_processes_share_200_trials(tmp_path: Path, tell: Callable[[str], None]) -> None:
    file = tmp_path / "shared.yaml"
    file.write_text(FILE.replace("SEEDS", str(list(range(TRIALS)))))
    results = tmp_path / "results"
    command = [sys.executable, "-u", "-W", "ignore", "-c", LEASER, str(file), str(results)]
    leasers = [
        subprocess.Popen(
            [*command, str(number)], env=machine.environment(), stdout=subprocess.PIPE, text=True
        )
        for number in range(PROCESSES)
    ]
    ledger = Ledger(results)

    def some_are_done() -> bool:
        assert not any(leaser.poll() for leaser in leasers), "a process ended"
        return len(ledger.done()) > TRIALS // 4

    machine.wait("some trials are done", some_are_done, 300, every=0.01)
    leasers[0].kill()
    said = [leaser.communicate(timeout=300)[0] for leaser in leasers]

    assert [leaser.returncode for leaser in leasers] == [-9] + [0] * (PROCESSES - 1)
    trained = [line.split() for text in said for line in text.splitlines()]
    again = {
        trial for trial, number in Counter(trial for trial, _ in trained).items() if number > 1
    }
    rows = ledger.trials().to_pylist()
    tell(
        f"{PROCESSES} processes, one of them killed, {TRIALS} trials: done {len(rows)}, "
        f"trained twice {len(again)}"
    )
    assert {row["trial_id"] for row in rows} == {point.trial_id for point in load(file).points}
    # What was said to be committed is in the ledger, by the one who said so.
    by = Counter(row["attempt"] for row in rows)
    told = [sum("True" in line for line in text.splitlines()) for text in said]
    assert [by[f"a{number}"] for number in range(1, PROCESSES)] == told[1:]
    assert told[0] <= by["a0"] <= told[0] + 1  # it may have been killed before it could say so
    # Each was claimed by one at a time, and the claims of the dead are not waited for.
    assert not again


def test_two_clusters_share_30_trials(tell: Callable[[str], None]) -> None:
    with ExitStack() as stack:
        folder = stack.enter_context(machine.folder())
        file = account.sweep_file(folder, seeds=15)
        sweep = load(file)
        quiet = account.Quiet(file)
        pace = Pace(folder, 0.02)
        drivers = []
        for name in ("one", "two"):
            (folder / name).mkdir()
            cluster = Cluster(folder / name, pace=pace, workers=1)
            stack.enter_context(cluster)
            drivers.append(
                Driver(
                    cluster,
                    file,
                    str(folder / "results"),
                    log=folder / f"{name}.log",
                    FPT_SWEEP_CACHE=str(folder / "cache"),
                    MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db",
                )
            )
        watch = account.Watch(folder / "results" / "trials")
        with watch.watching():
            for driver in drivers:
                driver.start()
            done = {id(driver): False for driver in drivers}
            end = time.monotonic() + 600
            while not all(done.values()):
                for driver in drivers:
                    done[id(driver)] = done[id(driver)] or driver.tend()
                assert time.monotonic() < end, "".join(driver.tail() for driver in drivers)
                time.sleep(0.2)
        found = account.settle(sweep, str(folder / "results"), quiet.figures(), watch=watch)
        begun = [driver.log.read_text().count("\nstarted ") for driver in drivers]
        tell(f"two clusters, which began {begun} trials: {found}")
        assert all(begun), "one cluster did it all"
        account.check(found, "".join(driver.tail() for driver in drivers))
