"""How the orchestration grows: in trials on a real Ray, and in slots on a simulated one.

    python benchmarks/scale.py [TRIALS...]
    python benchmarks/scale.py --slots 256 [--sigma 0.3 1.0] [--packs 2500 10000] [--mean 8]

The first form runs 100, 300 and 1,000 trials that do nothing over eight logical nodes: eight Rays
on this machine with one slot each. The trials go the whole way (plan, lease, driver, worker, curve,
state, row), each number of them with a driver process of its own, whose largest resident memory is
measured too. What comes once (attaching to Ray, starting eight workers) falls out of the
differences between the numbers, which the bars are about.

The second form asks how full many slots are kept. Tune and its workers are simulated: a pack takes
a made-up time (lognormal, of a given sigma and mean) and ends. All else is the driver's own: plan,
scheduler, monitor, searcher, and reservations on a bucket of moto's, whose every request takes
40 ms more. Beside it stands list scheduling of the same times in the same order, which no driver
without foresight beats. CPU and memory are those of the driver's process without Ray.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import overhead
from overhead import FILE, Nothing

NODES = 8

LINEAR = 1.25
"""Cost of a further trial among the last ones over that among the first ones, up to which growth
counts as linear: two timings on a shared machine differ by as much."""


def drive(address: str, trials: int, folder: Path) -> None:
    """Run a sweep in this process and print seconds and bytes."""
    from ray import cloudpickle

    from sweep.execution.driver import run

    cloudpickle.register_pickle_by_value(overhead)  # workers cannot import it
    file = folder / "scale.yaml"
    file.write_text(FILE.format(seeds=list(range(trials))))
    began = time.perf_counter()
    summary = run(
        file,
        results=folder / "results",
        address=address,
        mirror=False,
        train=Nothing,  # type: ignore[arg-type]
    )
    seconds = time.perf_counter() - began
    assert summary.done == trials, summary
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "bytes": memory}))


def main(numbers: list[int]) -> None:
    """Measure and print."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(NODES - 1):
        cluster.add_node(num_cpus=1)
    seconds: dict[int, float] = {}
    memory: dict[int, float] = {}
    print(f"{NODES} logical nodes, one worker each; trials that do nothing")
    for trials in numbers:
        with tempfile.TemporaryDirectory(prefix="scale-") as folder:
            command = [sys.executable, __file__, "--drive", cluster.address, str(trials), folder]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        seconds[trials], memory[trials] = found["seconds"], found["bytes"]
        print(
            f"  {trials:5} trials  {seconds[trials]:7.1f} s  {trials / seconds[trials]:6.1f} a "
            f"second  driver {memory[trials] / 1e6:6.0f} MB",
            flush=True,
        )
    cluster.shutdown()
    few, some, many = numbers
    first = (seconds[some] - seconds[few]) / (some - few)
    last = (seconds[many] - seconds[some]) / (many - some)
    print(f"  a further trial {1000 * first:.0f} ms, then {1000 * last:.0f} ms")
    for bar, value, must in (
        ("time of a further trial, last over first", last / first, LINEAR),
        ("driver memory, KB a trial", (memory[many] - memory[few]) / (many - few) / 1e3, 150),
    ):
        print(json.dumps({"bar": bar, "value": round(value, 3), "must": must, "better": "lower"}))


# ------------------------------------------------------------------------------ simulated slots

LATENCY = 0.04
"""Seconds that each request to the bucket takes more."""

SHARE = 0.95
"""Of the busy share of list scheduling, what must be reached."""

CPU, MEMORY, REQUESTS = 30, 16, 3
"""Milliseconds and kilobytes of the driver, and requests to the bucket, of a trial, at most."""


def serve(port: int) -> None:
    """Be moto's S3, slower, and count requests; `/__counts` tells them."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    moto = DomainDispatcherApplication(create_backend_app)
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def app(environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] == "/__counts":
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(counts).encode()]
        with lock:
            counts[environ["REQUEST_METHOD"]] += 1
        time.sleep(LATENCY)
        return moto(environ, start_response)

    class Silent(WSGIRequestHandler):
        def log(self, *_: Any, **__: Any) -> None:
            pass

    make_server("127.0.0.1", port, app, threaded=True, request_handler=Silent).serve_forever()


@contextmanager
def bucket() -> Iterator[str]:
    """Serve a slow bucket, and give the URL that tells its counts."""
    import socket

    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    os.environ |= {
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server = subprocess.Popen([sys.executable, "-W", "ignore", __file__, "--serve", str(port)])
    try:
        until = time.monotonic() + 120
        while True:
            try:
                requests(url)
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < until, "the server does not answer"
                time.sleep(0.2)
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket="scale")
        yield url
    finally:
        server.kill()
        server.wait()


def requests(url: str) -> Counter[str]:
    """Ask the server for the requests so far, by method."""
    with urllib.request.urlopen(f"{url}/__counts", timeout=10) as answer:
        return Counter(json.load(answer))


class Silence:
    """A channel at whose other end nobody says anything, and a Ray that never ends."""

    own = False

    def poll(self) -> tuple[list[Any], list[Any]]:
        """Return nothing."""
        return [], []

    def halt(self, node: str | None = None) -> None:
        """Do nothing."""

    def ended(self) -> list[str]:
        """Return nothing."""
        return []

    def draining_nodes(self) -> frozenset[str]:
        """Return nothing."""
        return frozenset()

    def abandon(self) -> None:
        """Do nothing."""


def list_scheduling(seconds: Sequence[float], slots: int) -> float:
    """Return when the last of some packs ends, if each starts as soon as a slot is free."""
    free = [0.0] * slots
    for one in seconds:
        heapq.heapreplace(free, free[0] + one)
    return max(free)


def simulate(slots: int, packs: int, sigma: float, mean: float, url: str, folder: Path) -> None:
    """Run a sweep over simulated slots in this process, and print what was measured as JSON."""
    from sweep.execution.driver import AHEAD
    from sweep.execution.interrupts import Interrupts
    from sweep.execution.job import Result
    from sweep.execution.monitor import Monitor, RunContext
    from sweep.execution.reservations import ReservationsAhead
    from sweep.execution.scheduler import Scheduler
    from sweep.execution.tune_adapter import adapters
    from sweep.ledger.ledger import Ledger
    from sweep.planning.packing import Workers
    from sweep.planning.plan import plan

    draw = random.Random(7)
    # The mean of a lognormal is exp(mu + sigma**2 / 2).
    seconds = [mean * draw.lognormvariate(-(sigma**2) / 2, sigma) for _ in range(packs)]
    file = folder / "scale.yaml"
    file.write_text(FILE.format(seeds=list(range(packs))))
    ledger = Ledger(f"s3://scale/{packs}-{sigma}", write=True)
    planned = plan(file, ledger, workers=Workers(slots))
    assert len(planned.packs) == packs
    lease = ledger.lease("driver-here")
    assert lease is not None
    reserve: list[ReservationsAhead] = []
    scheduler = Scheduler(planned, {}, lambda event: None, claim=lambda ids: reserve[0](ids))
    claims, ahead = ledger.reservations(lease), 1 + slots // AHEAD
    reserve.append(ReservationsAhead(claims, scheduler.upcoming, ahead, at_first=slots))
    train: Any = None
    context = RunContext(ledger, lease, Interrupts(), lambda event: None, train)
    silence = Silence()
    monitor = Monitor(
        context, planned.sweep, scheduler, slots=slots, channel=silence, connection=silence,
        reservations=reserve[0],
    )  # fmt: skip
    feed, watch = adapters(monitor)
    # What Tune would be asked to forget.
    tune: Any = SimpleNamespace(
        get_trials=list, _trial_to_actor={}, _stopped_trials=set(), _failed_trials=set(),
        _live_trials=set(), _trials_to_cache=set(), _cached_trial_decisions={},
        _callbacks=SimpleNamespace(_callbacks=[]),
    )  # fmt: skip
    stop = threading.Event()

    def check() -> None:
        while not stop.wait(2.0):
            monitor.check_from_outside()

    checks = threading.Thread(target=check, daemon=True)
    before, cpu, memory = requests(url), time.process_time(), resident()
    began = time.monotonic()
    ends: list[tuple[float, str, str]] = []
    durations, names, busy = iter(seconds), map(str, itertools.count()), 0.0
    with lease, reserve[0]:
        checks.start()
        while not (monitor.finished and not ends):
            while len(ends) < slots and isinstance(got := feed.suggest(name := next(names)), dict):
                (point,) = got["job"].points
                took = next(durations)
                busy += took
                heapq.heappush(ends, (time.monotonic() + took, name, point.trial_id))
            watch.choose_trial_to_run(tune)
            now = time.monotonic()
            if ends and ends[0][0] <= now:
                _, name, trial = heapq.heappop(ends)  # one event a turn, as Tune has it
                result = Result(trial, "done", loss=0.3, accuracy=0.7)
                feed.on_trial_complete(name, {"results": (result,)})
            else:
                time.sleep(min(0.02, max(0.0, ends[0][0] - now)) if ends else 0.02)
        makespan = time.monotonic() - began
    stop.set()
    made = requests(url) - before
    ideal = list_scheduling(seconds, slots)
    found = {
        "slots": slots,
        "packs": packs,
        "sigma": sigma,
        "makespan": round(makespan, 1),
        "busy share": round(busy / (slots * makespan), 4),
        "of list scheduling's": round(ideal / makespan, 4),
        "CPU ms a trial": round(1000 * (time.process_time() - cpu) / packs, 2),
        "memory KB a trial": round((resident() - memory) / packs / 1e3, 2),
        "requests a trial": round(made.total() / packs, 2),
        "requests": dict(made),
    }
    print(json.dumps(found), flush=True)


def resident() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def simulated(slots: int, numbers: list[int], sigmas: list[float], mean: float) -> None:
    """Simulate each, in a process of its own, and print."""
    print(f"{slots} simulated slots, packs of {mean:g} s on average, {LATENCY:g} s more a request")
    with bucket() as url:
        for sigma, packs in itertools.product(sigmas, numbers):
            with tempfile.TemporaryDirectory(prefix="scale-") as folder:
                words = map(str, ("--simulate", slots, packs, sigma, mean, url, folder))
                output = subprocess.run(
                    [sys.executable, __file__, *words],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                ).stdout
            found = json.loads(output.splitlines()[-1])
            print("  " + ", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
            where = f"sigma {sigma:g}, {packs} packs"
            for name, figure, must, better in (
                ("busy share of list scheduling's", "of list scheduling's", SHARE, "higher"),
                ("driver CPU, ms a trial", "CPU ms a trial", CPU, "lower"),
                ("driver memory, KB a trial", "memory KB a trial", MEMORY, "lower"),
                ("requests a trial", "requests a trial", REQUESTS, "lower"),
            ):
                bar = {"bar": f"{name}, {where}", "value": found[figure], "must": must}
                print(json.dumps(bar | {"better": better}), flush=True)


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trials", nargs="*", type=int, default=[100, 300, 1000])
    parser.add_argument("--slots", type=int)
    parser.add_argument("--packs", nargs="+", type=int, default=[2500, 10_000])
    parser.add_argument("--sigma", nargs="+", type=float, default=[0.3, 1.0])
    parser.add_argument("--mean", type=float, default=8.0)
    return parser.parse_args()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--drive", address, trials, folder]:
            drive(address, int(trials), Path(folder))
        case ["--serve", port]:
            serve(int(port))
        case ["--simulate", slots, packs, sigma, mean, url, folder]:
            simulate(int(slots), int(packs), float(sigma), float(mean), url, Path(folder))
        case _:
            options = parsed()
            if options.slots:
                simulated(options.slots, options.packs, options.sigma, options.mean)
            else:
                main(options.trials or [100, 300, 1000])
