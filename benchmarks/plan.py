"""How long it takes to plan: a sweep of 100,000 trials, and every file that ships.

    python benchmarks/plan.py [--trials 100000]

Prints a table, and one JSON object a line for each bar. A shipped file is timed in a process of its
own, less what the interpreter takes to start and end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPEATS = 3

FILE = """\
sweep: large
trial:
  backbone: {{name: gpt2, size: tiny}}
  steps: 100
backbones:
  own: {{task: bit-memory, seed: 0}}
axes:
  pretraining: [language, statistics, random, own]
  task: [bit-memory, bit-xor, {{label: bit-xor-10, name: bit-xor, bits: 10}}, listops, digits]
  learning_rate: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
  seed: {seeds}
defaults:
  task:
    bit-memory: {{task: {{strings: 3, bits: 50, patch: 10}}}}
    listops: {{task: {{min_length: 4, max_length: 32}}, steps: 200}}
exclude:
- {{pretraining: own, task: digits, learning_rate: 1e-4, seed: 0}}
table: {{rows: pretraining, columns: task}}
"""


def seconds_to_plan(trials: int) -> tuple[float, float]:
    """The best of a few plans of a file, in this process, of an empty ledger: wall, CPU."""
    from sweep.planning.plan import plan

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "large.yaml"
        seeds = list(range(trials // 100))
        file.write_text(FILE.format(seeds=seeds), encoding="utf-8")
        taken = []
        for _ in range(REPEATS):
            began = time.perf_counter(), time.process_time()
            planned = plan(file, Path(folder) / "results")
            taken.append((time.perf_counter() - began[0], time.process_time() - began[1]))
            assert len(planned.sweep.points) == 100 * len(seeds) - 1
    return min(taken)


def seconds_of(*command: str) -> float:
    """The best of a few runs of a command with this interpreter."""
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, *command],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=ROOT,
            env={"FPT_SWEEP_DATA": "/nowhere", **os.environ},
        )
        taken.append(time.perf_counter() - began)
    return min(taken)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100_000)
    trials = parser.parse_args().trials

    sizes = [trials // 4, trials // 2, trials]
    taken = [seconds_to_plan(size) for size in sizes]
    print(f"{'trials':>9}  {'seconds':>8}  {'of CPU':>8}  {'µs of CPU a trial':>18}")
    for size, (wall, cpu) in zip(sizes, taken, strict=True):
        print(f"{size:>9,}  {wall:>8.2f}  {cpu:>8.2f}  {cpu / size * 1e6:>18.0f}")
    # The slope in logarithms: 1 is linear. Of CPU time, which other programs disturb less.
    growth = statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(cpu) for _, cpu in taken]
    )

    start = seconds_of("-c", "pass")
    slowest = 0.0
    print(f"\nseconds after the interpreter's {start:.2f}")
    with tempfile.TemporaryDirectory() as results:
        for file in sorted((ROOT / "experiments").rglob("*.yaml")):
            name = str(file.relative_to(ROOT))
            for command in ("validate", "plan", "table"):
                where = [] if command == "validate" else ["--results", results]
                if command == "table" and "\ntable:" not in file.read_text(encoding="utf-8"):
                    continue
                seconds = seconds_of("-m", "sweep", command, name, *where) - start
                slowest = max(slowest, seconds)
                print(f"{seconds:6.2f}  sweep {command} {name}")

    bars = [
        ("seconds to plan 100,000 trials", taken[-1][0] * 100_000 / trials, 20, 10),
        ("growth of planning with trials, as a power", growth.slope, 1.15, 1.05),
        ("seconds to validate, plan or table a shipped file, after start", slowest, 1.0, 0.7),
    ]
    print()
    for bar, value, must, aim in bars:
        line = {"bar": bar, "value": round(value, 3), "must": must, "aim": aim, "better": "lower"}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
