"""What the orchestration costs: 300 trials that do nothing, one Tune trial each, ledger on.

    python benchmarks/overhead.py [TRIALS]

The trials go the whole way (plan, lease, driver, worker, curve, state, row); only the training does
nothing. Beside them, in the same run and on the same Ray, bare Tune does nothing as often. Each
figure is wall time over the number of trials, with what comes once a run (attaching to Ray,
starting workers, the plan before and after) included; starting Ray itself is left out of all.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

FILE = """
sweep: overhead
trial:
  task: {{name: bit-xor, bits: 3}}
  backbone: {{name: gpt2, layers: 1, width: 8, heads: 1}}
  pretraining: random
  steps: 10
pack: off
axes:
  seed: {seeds}
"""

DEFAULT_TRIALS = 6
"""Trials of Tune's default, without reuse_actors: each starts a process."""


class Nothing:
    """A training of one record, whose outcome has every figure."""

    def __init__(self, trials: Any, **options: Any) -> None:
        self.trials = trials
        self.outcomes: dict[int, Any] = {}
        self.failures: dict[int, Exception] = {}

    def step(self) -> list[Any]:
        """Its record, once."""
        if self.outcomes:
            raise StopIteration
        state = SimpleNamespace(step=10, to_bytes=lambda: bytes(10_000))
        self.outcomes[0] = SimpleNamespace(
            outcome="done", stopped="steps", steps=10, best_step=10, train_loss=0.1,
            train_accuracy=0.9, training_set_loss=None, training_set_accuracy=None,
            validation_loss=0.2, validation_accuracy=0.8, test_loss=0.3, test_accuracy=0.7,
            seconds=0.1, examples=160, groups={}, backbone_digest="b" * 64, data_digest=None,
            state=state,
        )  # fmt: skip
        record = SimpleNamespace(
            trial=0, step=10, split="train", loss=0.1, accuracy=0.9, seconds=0.1, examples=160
        )
        return [record]

    def states(self) -> dict[int, Any]:
        """None: it has ended by the time that it is asked."""
        return {}


def bare(address: str, trials: int, folder: Path, *, reuse: bool) -> float:
    """Seconds a trial of Tune alone, without its loggers."""
    import ray
    from ray import tune

    os.environ.update(TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", RAY_AIR_NEW_OUTPUT="0")
    began = time.perf_counter()
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    tune.Tuner(
        tune.with_resources(lambda config: {"score": 0}, {"cpu": 1}),
        param_space={"seed": tune.grid_search(list(range(trials)))},
        tune_config=tune.TuneConfig(reuse_actors=reuse),
        run_config=tune.RunConfig(name=f"bare-{reuse}", storage_path=str(folder), verbose=0),
    ).fit()
    ray.shutdown()
    return (time.perf_counter() - began) / trials


def main(trials: int) -> None:
    """Measure and print."""
    from ray.cluster_utils import Cluster

    from sweep.execution.driver import run
    from sweep.ledger.ledger import Ledger
    from sweep.mirrors.mlflow_runs import Mirror
    from sweep.sweepfile.expansion import load

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": os.cpu_count()})
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        folder = Path(name)
        file = folder / "overhead.yaml"
        file.write_text(FILE.format(seeds=list(range(trials))))
        tune = bare(cluster.address, trials, folder, reuse=True)
        began = time.perf_counter()
        summary = run(
            file,
            results=folder / "results",
            address=cluster.address,
            mirror=False,
            train=Nothing,  # type: ignore[arg-type]
        )
        ours = (time.perf_counter() - began) / trials
        assert summary.done == trials, summary
        began = time.perf_counter()
        run(file, results=folder / "results", mirror=False)
        again = time.perf_counter() - began
        mirror = Mirror(load(file), Ledger(folder / "results"))
        began = time.perf_counter()
        mirror.prepare()
        prepared = time.perf_counter()
        mirrored = mirror.sync()
        synced = time.perf_counter()
        default = bare(cluster.address, DEFAULT_TRIALS, folder, reuse=False)
    cluster.shutdown()

    def each(seconds: float) -> str:
        return f"{1000 * seconds:8.1f} ms each"

    print(f"{trials} trials that do nothing")
    print(f"  sweep run, ledger on       {each(ours)}")
    print(f"  bare Tune, reuse_actors    {each(tune)}")
    print(f"  bare Tune, its default     {each(default)} ({DEFAULT_TRIALS} trials)")
    print(f"  the mirror, apart          {each((synced - prepared) / max(mirrored, 1))}")
    print(f"  the mirror, once           {prepared - began:8.2f} s")
    print(f"  sweep run again            {again:8.2f} s")
    for bar, value, must, aim in (
        ("orchestration, ms a trial", 1000 * ours, 60, 40),
        ("orchestration / bare Tune with reuse_actors", ours / tune, 2.0, 1.2),
    ):
        print(
            json.dumps(
                {"bar": bar, "value": round(value, 3), "must": must, "aim": aim, "better": "lower"}
            )
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
