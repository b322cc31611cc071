"""The quickstart as a newcomer runs it: killed half way, run again, run once more, looked at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import sweep

ROOT = Path(__file__).parents[1]
FILE = ROOT / "experiments/quickstart.yaml"
COMMAND = [sys.executable, "-m", "sweep"]

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def mtimes(results: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (results / "trials").glob("*.parquet")}


def as_published(results: Path) -> None:
    """Where the processor computes what the one did that the table is of, it is the same table.

    Another processor sums in another order: then not even trials of few products are the same to
    the bit, and nothing is said of the others.
    """
    figures = ["train_loss", "validation_loss", "validation_accuracy", "test_loss", "test_accuracy"]
    ours = sweep.load_trials(results, sweep=FILE).set_index("trial_id")[figures].sort_index()
    theirs = pd.read_parquet(ROOT / "results/published/quickstart/trials.parquet")
    theirs = theirs.set_index("trial_id")
    frozen = theirs.index[theirs["pretraining"].isin(["language", "random"]) & ~trains_all(theirs)]
    theirs = theirs[figures].sort_index()
    assert list(ours.index) == list(theirs.index)
    if ours.loc[frozen].equals(theirs.loc[frozen]):
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


def trains_all(rows: pd.DataFrame) -> pd.Series[bool]:
    return rows["train"].str.contains("attention")


def means(results: Path) -> pd.DataFrame:
    frame = sweep.load_trials(results, sweep=FILE)
    frame = frame[frame["axis.pretraining"].notna()]
    return frame.pivot_table(
        index="axis.pretraining", columns="axis.task", values="test_accuracy", observed=True
    )


def test_the_quickstart_survives_a_kill_and_shows_what_it_should(tmp_path: Path) -> None:
    results = tmp_path / "results"
    run = [*COMMAND, "run", str(FILE), "--results", str(results)]
    first = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    while len(mtimes(results)) < 12:
        assert first.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.5)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = mtimes(results)

    second = subprocess.run(run, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    after = mtimes(results)
    assert len(after) == 49
    assert before == {name: after[name] for name in before}

    third = subprocess.run(run, capture_output=True, text=True, check=False)
    assert third.returncode == 0
    assert mtimes(results) == after

    as_published(results)
    accuracy = means(results)
    assert (accuracy.loc[["language", "statistics"], "bit-xor"] > 0.95).all()
    assert accuracy.loc["random", "bit-xor"] < 0.93
    assert accuracy.loc["language", "bit-memory"] > accuracy.loc["random", "bit-memory"] + 0.05
    assert (accuracy["digits"] > 0.5).all()

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{results}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'fpt-sweep/quickstart'")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    ids = [r.data.tags["fpt_sweep.trial_id"] for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert len(ids) == len(set(ids)) == 49
