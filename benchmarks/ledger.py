"""How a large ledger reads: 100,000 trials with 5,000,000 points of curves, and smaller ones.

    python benchmarks/ledger.py [--trials 100000] [--folder FOLDER]

Generates ledgers of the real layout (a file a trial, two pieces of a curve a trial), and runs every
command on them in a process of its own. Prints seconds and memory of the first run, which reads
every file and makes the cache, and of later ones; then one JSON object a line for each bar.

The files are made from templates, a hundred of them, by putting each trial's own ids, seeds and
figures in their places: a hundred times quicker than encoding each. For that they are neither
compressed nor do they bear checksums; otherwise they are as a worker writes them.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sweep.ledger.ledger import CURVES, TRIALS, Dataset
from sweep.sweepfile.expansion import load
from sweep.sweepfile.identity import IDENTITY_VERSION
from sweep.sweepfile.trials import Point

POINTS = 50
"""Points of a trial's curve, in two pieces."""
REPEATS = 3
FIRST_SEED = 1000
"""Seeds have four digits, so that the files of all trials of a cell are of one length."""
ATTEMPT = "20261122T000000.000000Z.abcdef"

FILE = """\
sweep: large
trial:
  backbone: {{name: gpt2, size: tiny}}
  steps: 2500
axes:
  pretraining:
  - language
  - statistics
  - random
  - {{label: scaled, pretraining: random, backbone.initialiser: scaled}}
  task: [{tasks}]
  seed: {seeds}
table: {{rows: pretraining, columns: task}}
claims:
  - {{that: language > random, axis: pretraining, on: test_accuracy, per: task, paired_by: seed}}
"""


class Ran(NamedTuple):
    """What a command took."""

    seconds: float
    """From the start of the interpreter to its end."""
    memory: int
    """Bytes, at most."""


def generate(folder: Path, trials: int) -> Path:
    """Make a sweep file and a ledger in which all its trials are done."""
    tasks = ", ".join(
        f"{{label: xor-{n}, task: {{name: bit-xor, bits: {n}}}}}" for n in range(5, 30)
    )
    seeds = list(range(FIRST_SEED, FIRST_SEED + trials // 100))
    text = FILE.format(tasks=tasks, seeds=seeds)
    file = folder / "large.yaml"
    file.write_text(text, encoding="utf-8")
    sweep = load(file)
    results = folder / "results"
    (results / "trials").mkdir(parents=True)
    (results / "curves").mkdir()
    cells: dict[tuple[str, ...], list[Point]] = {}
    for point in sweep.points:
        own = tuple(name for axis, name in point.labels.items() if axis != "seed")
        cells.setdefault(own, []).append(point)
    rng = np.random.default_rng(0)
    for number, points in enumerate(cells.values()):
        _cell(results, points, rng, 0.5 + 0.004 * number)
    return file


def _cell(results: Path, points: list[Point], rng: np.random.Generator, accuracy: float) -> None:
    first = points[0]
    seed = first.config.seed
    marks = {"test_accuracy": 0.123456789, "test_loss": 0.234567891, "seconds": 12.3456789}
    row = {**_row(first), **marks}
    whole = _encoded(TRIALS, {name: [row.get(name)] for name in TRIALS.schema.names})
    pieces = []
    for segment in range(2):
        steps = np.arange(POINTS // 2) + segment * POINTS // 2
        loss = rng.random(len(steps))
        columns = {
            "trial_id": [first.trial_id] * len(steps), "attempt": [ATTEMPT] * len(steps),
            "segment": [segment] * len(steps), "step": steps // 2 * 100,
            "split": [("train", "validation")[step % 2] for step in steps],
            "loss": loss, "accuracy": 1 - loss / 2, "seconds": steps / 7, "examples": steps * 1600,
        }  # fmt: skip
        pieces.append((_encoded(CURVES, columns), columns))
    for point in points:
        ids = (first.trial_id.encode(), point.trial_id.encode())
        own = whole.replace(*ids)
        assert first.cell_id == point.cell_id
        for old, new in (
            (f'seed":{seed}'.encode(), f'seed":{point.config.seed}'.encode()),
            (struct.pack("<q", seed), struct.pack("<q", point.config.seed)),
            *(
                (struct.pack("<d", marks[name]), struct.pack("<d", value))
                for name, value in zip(
                    marks,
                    (accuracy + rng.normal() / 50, rng.random(), rng.random() * 60),
                    strict=True,
                )
            ),
        ):
            own = own.replace(old, new)
        (results / "trials" / f"{point.trial_id}.parquet").write_bytes(own)
        curve = results / "curves" / point.trial_id
        curve.mkdir()
        for segment, (piece, columns) in enumerate(pieces):
            loss = rng.random(POINTS // 2)
            data = piece.replace(*ids)
            for name, value in (("loss", loss), ("accuracy", 1 - loss / 2)):
                data = data.replace(np.asarray(columns[name]).tobytes(), value.tobytes())
            (curve / f"{ATTEMPT}-{segment:06d}.parquet").write_bytes(data)


def _row(point: Point) -> dict[str, Any]:
    config, identity = point.config, point.config.identity()
    task = {k: v for k, v in identity["task"].items() if k not in ("name", "version")}
    started = dt.datetime(2026, 11, 22, tzinfo=dt.UTC)
    groups = {
        name: {"tensors": 16, "parameters": 264192, "trained": 0} for name in ("norm", "attention")
    }
    return {
        "trial_id": point.trial_id, "cell_id": point.cell_id,
        "identity_version": IDENTITY_VERSION, "task_version": config.task.version,
        "config": json.dumps(identity, sort_keys=True, separators=(",", ":")),
        "task": config.task.name,
        "task_parameters": json.dumps(task, sort_keys=True, separators=(",", ":")),
        "backbone": config.backbone.name, "layers": config.backbone.layers,
        "width": config.backbone.width, "heads": config.backbone.heads,
        "weights": identity["backbone"]["weights"],
        "initialiser": identity["backbone"]["initialiser"], "pretraining": config.pretraining,
        "backbone_seed": identity["backbone_seed"], "train": "+".join(config.train),
        "optimizer": json.dumps(identity["optimizer"]), "learning_rate": config.learning_rate,
        "batch_size": config.batch_size, "steps": config.steps, "stop": None,
        "dropout": config.dropout, "numerics": config.numerics, "protocol": config.protocol,
        "evaluate_every": config.evaluation.every, "seed": config.seed, "outcome": "done",
        "stopped": "steps", "steps_trained": config.steps, "best_step": config.steps,
        "train_loss": 0.25, "train_accuracy": 0.75, "validation_loss": 0.5,
        "validation_accuracy": 0.625, "baseline_accuracy": 0.5, "baseline_rule": "guess",
        "examples": config.steps * config.batch_size, "pack_size": 1, "attempts": 1,
        "attempt": ATTEMPT, "parameters": 800_000, "parameters_trained": 10_000,
        "groups": json.dumps(groups), "backbone_digest": "0" * 64, "git_commit": "0" * 40,
        "git_dirty": False, "version": "0.1.0",
        "versions": json.dumps({"numpy": "2.4.6", "python": "3.11.7", "torch": "2.13.0"}),
        "host": "host", "device": "cpu", "device_name": "a processor", "started_at": started,
        "finished_at": started + dt.timedelta(seconds=30),
    }  # fmt: skip


def _encoded(dataset: Dataset, columns: Mapping[str, Any]) -> bytes:
    arrays = [pa.array(columns[field.name], field.type) for field in dataset.schema]
    table = pa.table(arrays, schema=dataset.schema)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, table.schema, compression="none", use_dictionary=False, write_statistics=False,
        store_schema=False,
    ) as writer:  # fmt: skip
        writer.write_table(table)
        writer.add_key_value_metadata({"schema_version": str(dataset.version)})
    return bytes(sink.getvalue())


def ran(*command: str) -> Ran:
    """Run a command with this interpreter."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}")
    return Ran(seconds, usage.ru_maxrss * 1024)


COMMANDS: dict[str, list[str]] = {
    "table": ["table", "FILE", "--format", "md"],
    "query of trials": [
        "query",
        "SELECT task_parameters, pretraining, avg(test_accuracy) FROM trials GROUP BY ALL",
    ],
    "query of curves": [
        "query",
        "SELECT split, step, avg(loss) FROM curves GROUP BY ALL ORDER BY ALL",
    ],
    "plan": ["plan", "FILE"],
    "report": ["report", "FILE", "-o", "PAGE"],
}
FIRST = {"table": "trials", "query of curves": "curves"}
"""Commands that come upon a ledger without a cache of these."""


def measure(file: Path) -> dict[str, tuple[Ran | None, Ran]]:
    """What each command takes: the first time, where that makes a cache, and the best of later."""
    results = file.parent / "results"
    out = {}
    for name, words in COMMANDS.items():
        given = {"FILE": str(file), "PAGE": str(file.parent / "report.html")}
        command = ["-m", "sweep", *(given.get(word, word) for word in words)]
        command += ["--results", str(results)]
        cold = None
        if name in FIRST:
            (results / "cache" / f"{FIRST[name]}.parquet").unlink(missing_ok=True)
            cold = ran(*command)
        out[name] = (cold, min(ran(*command) for _ in range(REPEATS)))
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="where generated ledgers are kept and found")
    given = parser.parse_args()
    sizes = [given.trials // 10, given.trials // 5, given.trials]
    found: dict[int, dict[str, tuple[Ran | None, Ran]]] = {}
    start = min(ran("-c", "pass") for _ in range(REPEATS)).seconds
    with tempfile.TemporaryDirectory() as scratch:
        for size in sizes:
            folder = (given.folder or Path(scratch)) / str(size)
            file = folder / "large.yaml"
            if not file.exists():
                began = time.perf_counter()
                folder.mkdir(parents=True)
                generate(folder, size)
                print(f"generated {size:,} trials in {time.perf_counter() - began:.0f} s")
            found[size] = measure(file)
    print(f"\nthe interpreter's start takes {start:.2f} s of each")
    print(
        f"{'trials':>9} {'points':>10}  {'command':<16} "
        f"{'first s':>8} {'MB':>6} {'later s':>8} {'MB':>6}"
    )
    for size, commands in found.items():
        for name, (cold, warm) in commands.items():
            first = f"{cold.seconds:8.2f} {cold.memory / 1e6:6.0f}" if cold else " " * 15
            later = f"{warm.seconds:8.2f} {warm.memory / 1e6:6.0f}"
            print(f"{size:>9,} {size * POINTS:>10,}  {name:<16} {first} {later}")
    print()
    musts = {"table": 3, "query of trials": 2, "query of curves": 2, "report": 20}
    lines = [
        (f"seconds for {name}, {sizes[-1]:,} trials", found[sizes[-1]][name][1].seconds, must)
        for name, must in musts.items()
    ]
    all_ran = [one for pairs in found[sizes[-1]].values() for one in pairs if one]
    lines.append(("memory of any command, MB", max(one.memory for one in all_ran) / 1e6, 2000))
    for name in COMMANDS:
        # The slope in logarithms, less the start that all have: 1 is linear.
        seconds = [max(found[size][name][1].seconds - start, 1e-3) for size in sizes]
        slope = statistics.linear_regression(
            [math.log(size) for size in sizes], [math.log(one) for one in seconds]
        )
        lines.append((f"growth of {name} with trials, as a power", slope.slope, 1.15))
    for bar, value, must in lines:
        print(json.dumps({"bar": bar, "value": round(value, 3), "must": must, "better": "lower"}))


if __name__ == "__main__":
    main()
