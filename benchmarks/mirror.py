"""What the MLflow mirror costs a trial, with an SQLite store.

A ledger is generated: TRIALS trials, each with a curve of POINTS evaluations of two splits (four
metrics a point). It is mirrored by `Mirror.sync`, which runs in a thread of the driver, beside the
training and not in its way. The same runs are then written the way that MLflow's own callbacks
write, one value a call, for TRIALS / 10 of them.

    python benchmarks/mirror.py [--trials 300] [--points 20]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sweep.ledger.columns import in_mlflow
from sweep.ledger.ledger import Ledger
from sweep.mirrors import mlflow_stores
from sweep.mirrors.mlflow_runs import Mirror
from sweep.sweepfile.expansion import load
from sweep.sweepfile.trials import Point, Sweep

SWEEP = """\
sweep: mirror-benchmark
trial:
  backbone: {{name: gpt2, layers: 1, width: 8, heads: 1}}
  pretraining: random
  steps: {steps}
  evaluation: {{every: 10}}
axes:
  task:
    - bit-memory
    - bit-xor
    - {{label: short, task: bit-xor, task.bits: 3}}
  seed: [{seeds}]
table: {{rows: task, value: [test_accuracy]}}
"""
START = datetime(2026, 1, 1, tzinfo=UTC)


def main() -> None:
    """Generate, mirror, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--points", type=int, default=20)
    options = parser.parse_args()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    bars: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="fpt-sweep-mirror-") as folder:
        sweep, ledger = generate(Path(folder), options.trials, options.points)
        mirror = Mirror(sweep, ledger)
        bars["mirror: first use of a database, s"] = seconds(mirror.prepare)
        cpu = time.process_time()
        took = seconds(mirror.sync)
        cpu = time.process_time() - cpu
        bars["mirror: SQLite, ms a trial"] = 1000 * took / options.trials
        bars["mirror: SQLite, CPU ms a trial"] = 1000 * cpu / options.trials
        bars["mirror: nothing new, ms"] = 1000 * seconds(mirror.sync)
        bars["mirror: stock-taking of a new process, ms a trial"] = (
            1000 * seconds(Mirror(sweep, ledger).sync) / options.trials
        )
        some = list(ledger.done())[: max(1, options.trials // 10)]
        took = seconds(lambda: one_by_one(ledger, some))
        bars["value by value: SQLite, ms a trial"] = 1000 * took / len(some)
    metrics = 4 * options.points
    print(f"{options.trials} trials with {metrics} metric values each; 1-minute load and cores:")
    print(f"{os.getloadavg()[0]:.1f} on {os.cpu_count()}")
    for name, value in bars.items():
        bar = {"bar": name, "value": round(value, 3), "must": None, "aim": None, "better": "lower"}
        print(json.dumps(bar))


def seconds(work: Any) -> float:
    """The wall time of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def generate(folder: Path, trials: int, points: int) -> tuple[Sweep, Ledger]:
    """A sweep whose trials all are in a ledger."""
    file = folder / "mirror.yaml"
    seeds = ", ".join(str(seed) for seed in range(-(-trials // 3)))
    file.write_text(SWEEP.format(steps=10 * points, seeds=seeds))
    sweep, ledger = load(file), Ledger(folder / "results", write=True)
    for number, point in enumerate(sweep.points[:trials]):
        ledger.append_curve(point.trial_id, "a", 0, list(curve(points)))
        ledger.commit(row(point, START + timedelta(minutes=number)))
    return sweep, ledger


def curve(points: int) -> Iterator[dict[str, Any]]:
    """The records of a trial."""
    for step in range(10, 10 * points + 1, 10):
        for split in ("train", "validation"):
            yield {
                "step": step, "split": split, "loss": 1 / step, "accuracy": 1 - 1 / step,
                "seconds": step / 100, "examples": 16 * step,
            }  # fmt: skip


def row(point: Point, began: datetime) -> dict[str, Any]:
    """A trial's row, as a worker would write it."""
    config, identity = point.config, point.config.identity()
    return {
        "trial_id": point.trial_id, "cell_id": point.cell_id, "identity_version": 1,
        "task_version": 1, "config": json.dumps(identity), "task": config.task.name,
        "task_parameters": json.dumps(identity["task"]), "backbone": "gpt2", "layers": 1,
        "width": 8, "heads": 1, "weights": None, "initialiser": "plain", "pretraining": "random",
        "backbone_seed": config.seed, "train": "+".join(config.train),
        "optimizer": json.dumps(identity["optimizer"]), "learning_rate": config.learning_rate,
        "batch_size": config.batch_size, "steps": config.steps, "stop": None,
        "dropout": config.dropout, "numerics": "fp32", "protocol": "sound", "evaluate_every": 10,
        "seed": config.seed, "outcome": "done", "stopped": "steps", "steps_trained": config.steps,
        "best_step": config.steps, "train_loss": 0.1, "train_accuracy": 0.9,
        "validation_loss": 0.2, "validation_accuracy": 0.8, "test_loss": 0.2, "test_accuracy": 0.8,
        "baseline_accuracy": 0.5, "baseline_rule": "guess", "seconds": 2.0,
        "examples": 16 * config.steps, "pack_size": 1, "attempts": 1, "attempt": "a",
        "extended_from": None, "parameters": 1000, "parameters_trained": 100, "groups": "{}",
        "backbone_digest": "0" * 64, "data_digest": None, "git_commit": "0" * 40,
        "git_dirty": False, "version": "0", "versions": "{}", "host": "here", "device": "cpu",
        "device_name": "a processor", "started_at": began,
        "finished_at": began + timedelta(seconds=30),
    }  # fmt: skip


def one_by_one(ledger: Ledger, trials: list[str]) -> None:
    """Write runs as MLflow's own callbacks do: a call a value."""
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_stores.tracking_uri(ledger))
    location = Path(ledger.uri, "one-by-one").as_uri()
    experiment = client.create_experiment("one-by-one", artifact_location=location)
    curves: dict[str, list[dict[str, Any]]] = {trial: [] for trial in trials}
    for record in ledger.curves(trials).to_pylist():
        curves[record["trial_id"]].append(record)
    for trial in ledger.trials(trials).to_pylist():
        run = client.create_run(experiment).info.run_id
        for name in in_mlflow("param"):
            client.log_param(run, name, trial[name])
        for name in in_mlflow("tag"):
            client.set_tag(run, name, trial[name])
        for name in in_mlflow("metric"):
            client.log_metric(run, name, trial[name])
        for record in curves[trial["trial_id"]]:
            for name in ("loss", "accuracy"):
                key = f"{record['split']}/{name}"
                client.log_metric(run, key, record[name], step=record["step"])
        client.set_terminated(run)


if __name__ == "__main__":
    main()
