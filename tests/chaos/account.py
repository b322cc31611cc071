"""What is to be true in the end: each trial once, with the figures and curve of a quiet run."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sweep.ledger.causes import MARKS
from sweep.ledger.ledger import Ledger
from sweep.sweepfile.trials import Sweep
from tests.chaos import machine
from tests.chaos.quiet import FIGURES

HERE = Path(__file__).parent

FILE = """
sweep: chaos
trial:
  task: {name: "paced:Paced", bits: 3, examples: 50}
  backbone: {name: gpt2, layers: 2, width: 16, heads: 2}
  backbone_seed: 0
  batch_size: 4
  steps: 40
  dropout: 0.1
  evaluation: {every: 4}
backbones:
  own: {seed: 0, steps: 20}
axes:
  pretraining: [own, random]
  seed: SEEDS
pack: 3
limits: {save_seconds: 1}
"""


def sweep_file(folder: Path, seeds: int = 30) -> Path:
    """A sweep of twice as many trials as seeds, and one pretraining, and the task that it names."""
    (folder / "paced.py").write_text((HERE / "paced.py").read_text())
    file = folder / "chaos.yaml"
    file.write_text(FILE.replace("SEEDS", str(list(range(seeds)))))
    return file


class Quiet:
    """The figures of a run that nothing disturbs, computed beside whatever else is done."""

    def __init__(self, file: Path) -> None:
        self._output = file.with_suffix(".json")
        self._process = subprocess.Popen(
            # -P: beside the script lies another module of the name of the sweep file's own.
            [sys.executable, "-P", "-W", "ignore", HERE / "quiet.py", file, self._output],
            env=machine.environment(
                OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MKL_CBWR="AUTO,STRICT"
            ),
        )

    def figures(self) -> dict[str, list[Any]]:
        """Trial id -> figures, and the curve."""
        assert self._process.wait(600) == 0
        return dict(json.loads(self._output.read_text()))


@dataclass
class Watch:
    """Looks at the rows of a ledger in a folder all the time: once there, a row stays as it is."""

    folder: Path
    tell: Callable[[int], None] = lambda done: None
    """Told again and again how many there are."""
    first: dict[str, tuple[int, int]] = field(default_factory=dict)
    """File -> its inode and time, as first seen."""
    changed: set[str] = field(default_factory=set)

    def look(self) -> None:
        now = {}
        if self.folder.is_dir():
            for path in self.folder.glob("*.parquet"):
                stat = path.stat()
                now[path.name] = (stat.st_ino, stat.st_mtime_ns)
        self.changed |= {name for name, seen in self.first.items() if now.get(name) != seen}
        self.first = now | self.first
        self.tell(len(now))

    @contextmanager
    def watching(self) -> Iterator[None]:
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.2):
                self.look()

        thread = threading.Thread(target=watch, name="watch-rows", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.look()


@dataclass(frozen=True)
class Account:
    """How a sweep came through."""

    trials: int
    done: int
    lost: int
    """Trials without a row, or whose row was once there and was another one later."""
    doubled: int
    """Trials with more than one row, or more than one run of MLflow's."""
    differ: int
    """Trials whose figures or curves are not those of the quiet run."""
    again: int
    """Trials that more than one attempt trained to the end: work done twice."""
    failures: dict[str, int]
    """Cause -> failed attempts that the ledger has."""

    def __str__(self) -> str:
        causes = ", ".join(f"{n} {cause}" for cause, n in sorted(self.failures.items())) or "none"
        return (
            f"trials {self.trials}, done {self.done}, lost {self.lost}, doubled {self.doubled}, "
            f"figures that differ {self.differ}, trained to the end twice {self.again}, "
            f"failed attempts: {causes}"
        )

    @property
    def perfect(self) -> bool:
        return self.done == self.trials and not (self.lost or self.doubled or self.differ)


def settle(
    sweep: Sweep,
    results: str,
    quiet: dict[str, list[Any]],
    *,
    watch: Watch | None = None,
    runs: dict[str, int] | None = None,
) -> Account:
    """Account for a sweep, by its ledger and, where given, by what MLflow has (trial -> runs)."""
    ledger = Ledger(results)
    notes = ledger.failures().to_pylist()
    ids = [point.trial_id for point in sweep.all]
    rows = [row for row in ledger.trials().to_pylist() if row["trial_id"] in ids]
    found = Counter(row["trial_id"] for row in rows)
    curves = _curves(ledger)
    figures = {
        row["trial_id"]: [*(row[name] for name in FIGURES), curves[row["trial_id"]]] for row in rows
    }
    doubled = {trial for trial, number in found.items() if number > 1}
    lost = set(ids) - found.keys()
    if watch is not None:
        lost |= {Path(name).stem for name in watch.changed}
    if runs is not None:
        lost |= set(ids) - runs.keys()
        doubled |= {trial for trial, number in runs.items() if number > 1}
    return Account(
        trials=len(ids),
        done=len(found),
        lost=len(lost),
        doubled=len(doubled),
        differ=sum(quiet[trial] != seen for trial, seen in figures.items()),
        again=len(
            {trial for trial, ends in _ends(ledger).items() if len(ends) > 1}
            | {note["trial_id"] for note in notes if note["cause"] == "doubled"}
        ),
        failures=Counter(note["cause"] for note in notes if note["cause"] not in MARKS),
    )


def _curves(ledger: Ledger) -> dict[str, list[list[Any]]]:
    """Trial -> split, step, loss and accuracy of each point."""
    curves: dict[str, list[list[Any]]] = defaultdict(list)
    for point in ledger.curves().to_pylist():
        values = [point[name] for name in ("split", "step", "loss", "accuracy")]
        curves[point["trial_id"]].append(values)
    return {trial: sorted(curve) for trial, curve in curves.items()}


def pieces(ledger: Ledger) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Yield trial, attempt and points of each piece of a curve that was written.

    The ledger itself shows only the last value of a step, whoever wrote it.
    """
    storage = ledger.storage
    for name in storage.list("curves"):
        data = storage.get(name)
        assert data is not None
        trial, piece = name.split("/")[1:]
        table = pq.read_table(io.BytesIO(data), columns=["split", "step"])
        yield trial, piece.partition("-")[0], table.to_pylist()


def _ends(ledger: Ledger) -> dict[str, set[str]]:
    """Trial -> the attempts that reached the test set, which is read once, at the end."""
    ends: dict[str, set[str]] = {}
    for trial, attempt, points in pieces(ledger):
        if any(point["split"] == "test" for point in points):
            ends.setdefault(trial, set()).add(attempt)
    return ends


def check(account: Account, log: str) -> None:
    """Fail with the log where a sweep did not come through."""
    if not account.perfect:
        pytest.fail(f"{account}\n{log}")
