"""How the orchestration grows: 100, 300 and 1,000 trials that do nothing, over eight logical nodes.

    python benchmarks/scale.py [TRIALS...]

The nodes are eight Rays on this machine with one slot each. The trials go the whole way (plan,
lease, driver, worker, curve, state, row), each number of them with a driver process of its own,
whose largest resident memory is measured too. What comes once (attaching to Ray, starting eight
workers) falls out of the differences between the numbers, which the bars are about.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drive"]:
        drive(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        main([int(number) for number in sys.argv[1:]] or [100, 300, 1000])
