"""How a large ledger reads and travels: 2,000 and 20,000 trials, 50 points of a curve each.

    python benchmarks/ledger.py [--trials 20000] [--folder FOLDER]

Generates ledgers of the real layout (a file a trial, two pieces of a curve a trial), and runs every
command on them in a process of its own, first as they are and then after `sweep compact`. Prints
seconds of CPU, of the clock, and memory; then one JSON object a line for each bar, in seconds of
CPU. "first" is a command that reads every file and makes the cache.

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
import shlex
import shutil
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

    cpu: float
    """Seconds of the processor, of all threads."""
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
            "metrics": [None] * len(steps),
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


def ran(*command: str, folder: Path) -> Ran:
    """Run a command with this interpreter."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}: {said}")
    return Ran(usage.ru_utime + usage.ru_stime, seconds, usage.ru_maxrss * 1024)


CURVES_QUERY = "SELECT split, step, avg(loss) FROM curves GROUP BY ALL ORDER BY ALL"
TRIALS_QUERY = "SELECT task_parameters, avg(test_accuracy) FROM trials GROUP BY ALL"
READ = "import pandas; assert len(pandas.read_parquet('results/trials')) == {trials}"

SORT = """
import time
from mlflow import MlflowClient
client = MlflowClient("sqlite:///results/mlflow.db")
experiment = client.get_experiment_by_name("fpt-sweep/large").experiment_id
began = time.process_time()
found = client.search_runs([experiment], order_by=["metrics.`test_accuracy` DESC"], max_results=100)
print(len(found), time.process_time() - began)
"""
"""What MLflow's pages ask for when a column is clicked."""

STEPS: tuple[tuple[str, str], ...] = (
    ("plan, first", "plan large.yaml"),
    ("plan", "plan large.yaml"),
    ("query of curves, first", f"query '{CURVES_QUERY}'"),
    ("query of curves", f"query '{CURVES_QUERY}'"),
    ("query of trials", f"query '{TRIALS_QUERY}'"),
    ("table", "table large.yaml --format md"),
    ("export", "export large.yaml -o bundle.zip"),
    ("merge with its bundle", "merge results bundle.zip --into merged"),
    ("merge again", "merge results bundle.zip --into merged"),
    ("diff", "diff results merged large.yaml"),
    ("upgrade", "upgrade results --into upgraded"),
    ("compact", "compact"),
    ("plan, compacted", "plan large.yaml"),
    ("query of curves, compacted", f"query '{CURVES_QUERY}'"),
    ("table, compacted", "table large.yaml --format md"),
    ("report, compacted", "report large.yaml -o report.html"),
    ("export, compacted", "export large.yaml -o bundle.zip"),
    ("merge, compacted", "merge results bundle.zip --into again"),
    ("pandas.read_parquet, compacted", READ),
    ("mirror", "mirror large.yaml"),
    ("mirror again", "mirror large.yaml"),
)
"""What is measured, in this order: a name, and a command or a program."""

MUSTS = {
    "plan, first": 5,
    "query of curves, first": 10,
    "merge with its bundle": 25,
    "merge again": 5,
    "diff": 10,
    "upgrade": 10,
    "export": 10,
    "table": 3,
    "query of trials": 2,
    "pandas.read_parquet, compacted": 2,
    "mirror": 200,
}
"""Seconds, at 20,000 trials."""
MEMORY = {"merge with its bundle": 400, "pandas.read_parquet, compacted": 300}
"""MB, likewise."""
LINEAR = ("plan, compacted", "table, compacted", "query of curves, compacted", "compact", "mirror")


def measure(folder: Path, trials: int) -> dict[str, Ran]:
    """Return what each step takes; what an earlier measurement left is removed."""
    for name in ("merged", "upgraded", "again", "results/cache"):
        shutil.rmtree(folder / name, ignore_errors=True)
    out = {}
    for name, words in STEPS:
        program = words.format(trials=trials) if name.startswith("pandas") else ""
        command = ["-c", program] if program else ["-m", "sweep", *shlex.split(words)]
        out[name] = ran(*command, folder=folder)
    return out


def sorting(folder: Path) -> float:
    """Return the seconds of CPU in which MLflow gives the first page of runs by a metric."""
    command = [sys.executable, "-c", SORT]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    found, seconds = done.stdout.split()
    assert int(found) == 100
    return float(seconds)


def inodes(folder: Path) -> int:
    """Return the files and folders of a ledger, without its cache."""
    return sum("cache" not in path.relative_to(folder).parts for path in folder.rglob("*"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="where generated ledgers are kept and found")
    given = parser.parse_args()
    sizes = [given.trials // 10, given.trials]
    found: dict[int, dict[str, Ran]] = {}
    files: dict[int, tuple[float, float]] = {}
    sorts: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        start = ran("-c", "pass", folder=Path(scratch)).cpu
        for size in sizes:
            kept = (given.folder or Path(scratch)) / str(size)
            if not (kept / "large.yaml").exists():
                began = time.perf_counter()
                kept.mkdir(parents=True)
                generate(kept, size)
                print(f"generated {size:,} trials in {time.perf_counter() - began:.0f} s")
            folder = Path(scratch) / f"measured-{size}"
            shutil.copytree(kept, folder)
            before = inodes(folder / "results") / size
            found[size] = measure(folder, size)
            sorts[size] = sorting(folder)
            files[size] = (before, inodes(folder / "results") / size)
            shutil.rmtree(folder)
    print(f"{'':<32} " + "".join(f"{size:>12,} trials   " for size in sizes))
    print(f"{'':<32} " + "   CPU s clock s    MB " * len(sizes))
    for name, _ in STEPS:
        line = "".join(
            f"{one.cpu:8.1f} {one.seconds:7.1f} {one.memory / 1e6:5.0f} "
            for one in (found[size][name] for size in sizes)
        )
        print(f"{name:<32} {line}")
    large = found[sizes[-1]]
    lines = [(f"CPU seconds for {n}", large[n].cpu, must) for n, must in MUSTS.items()]
    lines += [(f"memory of {n}, MB", large[n].memory / 1e6, must) for n, must in MEMORY.items()]
    lines.append(("CPU seconds for a sort by a metric in MLflow", sorts[sizes[-1]], 2))
    lines.append(("inodes a trial, before compaction", files[sizes[-1]][0], 5))
    lines.append(("inodes a trial, after it", files[sizes[-1]][1], 0.1))
    for name in LINEAR:
        # The slope in logarithms, less the start that all have: 1 is linear.
        small, big = (max(found[size][name].cpu - start, 1e-3) for size in sizes)
        slope = math.log(big / small) / math.log(sizes[-1] / sizes[0])
        lines.append((f"growth of {name} with trials, as a power", slope, 1.15))
    for bar, value, must in lines:
        line = {"bar": bar, "value": round(value, 3), "must": must, "better": "lower"}
        print(json.dumps(line | {"met": value <= must}))


if __name__ == "__main__":
    main()
