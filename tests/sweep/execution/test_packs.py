"""Packs with the trainer itself, in this process: no figure depends on who trains beside whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fpt.checkpoints import State
from sweep.execution import worker
from sweep.execution.worker import run_pack
from sweep.ledger.columns import FIGURES
from sweep.ledger.ledger import Ledger
from sweep.planning.packing import Workers
from sweep.planning.plan import plan
from sweep.sweepfile.expansion import load
from sweep.sweepfile.trials import Point
from tests.support import Watching, job

FILE = """\
sweep: packs
trial:
  task: {name: listops, max_depth: 2, min_length: 3, max_length: 12, train: 64, validation: 32, \
test: 32}
  backbone: {name: gpt2, layers: 2, width: 32, heads: 2}
  pretraining: random
  backbone_seed: 0
  batch_size: 4
  steps: 40
  dropout: 0.1
  evaluation: {every: 10, training_set: 16}
axes:
  learning_rate: [1e-3, 1e-2]
  seed: [0, 1]
"""

COLUMNS = (*FIGURES, "examples", "groups", "config")
"""Columns of a trial's row that depend on the trial alone."""


@pytest.fixture(autouse=True)
def _as_in_a_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(worker, "LOG_EVERY", 5)  # so that it can be stopped between evaluations
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def points(tmp_path: Path) -> tuple[Point, ...]:
    file = tmp_path / "packs.yaml"
    file.write_text(FILE)
    return load(file).points


def run(ledger: Ledger, points: Sequence[Point], **options: Any) -> list[str]:
    attempt = job(*points, extends=options.pop("extends", {}))
    return [result.cause or result.status for result in run_pack(attempt, ledger, **options)]


def assert_same(one: Ledger, other: Ledger) -> None:
    """Every figure, every point of a curve, every bit of a state; what it took may differ."""

    def rows(ledger: Ledger) -> dict[str, Any]:
        return {
            row["trial_id"]: [row[name] for name in COLUMNS] for row in ledger.trials().to_pylist()
        }

    def curves(ledger: Ledger) -> list[Any]:
        return ledger.curves().drop_columns(["attempt", "segment", "seconds"]).to_pylist()

    assert rows(one) == rows(other)
    assert curves(one) == curves(other)
    for name in one.done():
        mine, theirs = (
            State.from_bytes(next(at.saved_states(name), None) or b"") for at in (one, other)
        )
        assert mine.tensors.keys() == theirs.tensors.keys()
        assert all(torch.equal(mine.tensors[n], theirs.tensors[n]) for n in mine.tensors)


@pytest.fixture
def alone(tmp_path: Path, points: tuple[Point, ...]) -> Ledger:
    """The ledger of each trial by itself."""
    ledger = Ledger(tmp_path / "alone")
    for point in points:
        assert run(ledger, [point]) == ["done"]
    return ledger


def after(steps: int) -> dict[str, Any]:
    """Options of `run_pack` that stop it once each trial has come so far."""
    seen: set[bool] = set()
    return {
        "reporter": Watching(
            lambda point, record: seen.add(record.step >= steps),
            lambda: "interrupted" if True in seen else None,
        )
    }


def test_a_pack_leaves_the_figures_of_trials_alone(
    tmp_path: Path, points: tuple[Point, ...], alone: Ledger
) -> None:
    ledger = Ledger(tmp_path / "packed")

    assert run(ledger, points) == ["done"] * 4

    assert_same(alone, ledger)
    rows = ledger.trials()
    assert rows.column("pack_size").to_pylist() == [4] * 4
    assert all(seconds > 0 for seconds in rows.column("seconds").to_pylist())


@pytest.mark.parametrize("stop_at", [10, 25, 30])
def test_an_interrupted_pack_goes_on_in_other_company(
    stop_at: int, tmp_path: Path, points: tuple[Point, ...], alone: Ledger
) -> None:
    a, b, c, d = points
    ledger = Ledger(tmp_path / "packed")

    assert run(ledger, [a, b, c], **after(stop_at)) == ["interrupted"] * 3
    assert ledger.states() == {a.trial_id, b.trial_id, c.trial_id}
    assert run(ledger, [d, b], **after(stop_at)) == ["interrupted"] * 2  # b is ahead of d
    assert run(ledger, [a]) == ["done"]
    assert run(ledger, [d, c, b, a]) == ["done"] * 4

    rows = {row["trial_id"]: row["pack_size"] for row in ledger.trials().to_pylist()}
    assert [rows[p.trial_id] for p in points] == [1, 3, 3, 3]
    assert_same(alone, ledger)


def test_members_may_extend_shorter_trainings(tmp_path: Path, points: tuple[Point, ...]) -> None:
    file = tmp_path / "short.yaml"
    file.write_text(FILE.replace("steps: 40", "steps: 20").replace("[1e-3, 1e-2]", "[1e-3]"))
    ledger, whole = Ledger(tmp_path / "extended"), Ledger(tmp_path / "whole")
    assert run(ledger, load(file).points) == ["done"] * 2
    assert run(whole, points) == ["done"] * 4

    (pack,) = plan(tmp_path / "packs.yaml", ledger, workers=Workers(1)).packs
    assert len(pack.points) == 4
    assert len(pack.extends) == 2
    assert run(ledger, pack.points, extends=pack.extends) == ["done"] * 4

    for point in load(file).points:
        (Path(ledger.uri) / "trials" / f"{point.trial_id}.parquet").unlink()
        ledger.remove("curves", [point.trial_id])
        ledger.remove("states", [point.trial_id])
    assert_same(whole, Ledger(ledger.uri))
