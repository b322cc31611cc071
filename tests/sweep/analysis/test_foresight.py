from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats as scipy_stats
from typer.testing import CliRunner

from sweep.analysis.foresight import PUBLISHED, foresee
from sweep.cli import app
from sweep.ledger.ledger import Ledger
from sweep.sweepfile.expansion import load
from sweep.sweepfile.trials import Sweep
from tests.support import trial_row

FILE = """\
sweep: demo
trial: {steps: 100, backbone: {name: gpt2, size: tiny}}
axes:
  pretraining: [language, random]
  task: [bit-xor, bit-memory]
  seed: [0, 1, 2, 3, 4]
claims: [{that: language > random, axis: pretraining, per: task}]
"""


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "results", write=True)


def swept(tmp_path: Path, text: str = FILE) -> Sweep:
    (tmp_path / "demo.yaml").write_text(text)
    return load(tmp_path / "demo.yaml")


def found(left: float, right: float, difference: float, n: int, level: float) -> float:
    """How often Welch's test finds a difference of normal arms with these deviations."""
    rng = np.random.default_rng(0)
    arms = rng.normal(difference, left, (20_000, n)), rng.normal(0, right, (20_000, n))
    return float((scipy_stats.ttest_ind(*arms, axis=-1, equal_var=False).pvalue < level).mean())


def test_the_smallest_difference_is_found_four_times_of_five(
    tmp_path: Path, ledger: Ledger
) -> None:
    sweep = swept(tmp_path)
    # Deviations of 2 and 1 points: five values at -1.265, -0.632, 0, 0.632 and 1.265 of them.
    at = np.linspace(-1, 1, 5) / np.std(np.linspace(-1, 1, 5), ddof=1)
    for point in sweep.points:
        wide = 0.02 if point.labels["pretraining"] == "language" else 0.01
        accuracy = 0.7 + wide * float(at[point.config.seed])
        ledger.commit(trial_row(point, test_accuracy=accuracy, seconds=60.0))

    one, other = foresee(sweep, ledger)

    assert (one.place, other.place) == ({"task": "bit-xor"}, {"task": "bit-memory"})
    assert one.spread == pytest.approx(math.sqrt(5))
    assert (one.pairs, one.known_by, one.seconds) == (5, "its own cells", 120.0)
    assert one.level == pytest.approx(0.025)
    assert one.smallest is not None
    assert found(2, 1, one.smallest, 5, 0.025) == pytest.approx(0.8, abs=0.03)
    for points, seeds in one.seeds.items():
        assert seeds is not None
        assert found(2, 1, float(points), seeds, 0.025) > 0.77
        assert seeds == 3 or found(2, 1, float(points), seeds - 1, 0.025) < 0.83


def test_a_spread_that_is_not_measured_is_that_of_the_task(tmp_path: Path, ledger: Ledger) -> None:
    other = swept(tmp_path, FILE.replace("steps: 100", "steps: 50").replace(
        "[language, random]", "[language, random, statistics]"))  # fmt: skip
    for point in other.points:
        if point.labels["task"] == "bit-xor":
            ledger.commit(trial_row(point, test_accuracy=0.7 + 0.01 * point.config.seed))
    sweep = swept(tmp_path)

    one, unknown = foresee(sweep, ledger, published=None)

    assert one.known_by == "the task"
    assert one.spread == pytest.approx(math.sqrt(2 * 2.5))
    assert (unknown.spread, unknown.smallest, unknown.seeds) == (None, None, {})


def test_a_spread_that_the_ledger_does_not_know_is_that_of_published_rows(
    tmp_path: Path, ledger: Ledger
) -> None:
    sweep = swept(tmp_path)
    cells: dict[str, list[float]] = {}
    published = [pq.read_table(file) for file in PUBLISHED.rglob("trials.parquet")]
    for row in (row for table in published for row in table.to_pylist()):
        if row["task"] == "bit-xor" and row["test_accuracy"] is not None:
            cells.setdefault(row["cell_id"], []).append(100 * row["test_accuracy"])
    spreads = [statistics.variance(own) for own in cells.values() if len(own) > 2]
    usual = statistics.median(filter(None, spreads))

    one, _ = foresee(sweep, ledger)

    assert one.known_by == "published rows of the task"
    assert one.spread == pytest.approx(math.sqrt(2 * usual))
    # What was measured here comes before it.
    for point in sweep.points:
        ledger.commit(trial_row(point, test_accuracy=0.7 + 0.01 * point.config.seed))
    assert foresee(sweep, ledger)[0].known_by == "its own cells"


def test_looks_cost(tmp_path: Path, ledger: Ledger) -> None:
    sweep = swept(tmp_path, FILE.replace("per: task}", "per: task, looks: [3, 5]}"))
    for point in sweep.points:
        ledger.commit(trial_row(point, test_accuracy=0.7 + 0.01 * point.config.seed))

    one, _ = foresee(sweep, ledger)

    assert one.level < 0.025
    assert one.pairs == 5


def test_the_plan_says_what_claims_can_find(tmp_path: Path, ledger: Ledger) -> None:
    sweep = swept(tmp_path)
    command = ["plan", str(sweep.file), "--results", str(tmp_path / "results")]

    swept(tmp_path, FILE.replace("[bit-xor, bit-memory]", "[mnist]"))
    before = CliRunner().invoke(app, command)
    swept(tmp_path)
    for point in sweep.points:
        ledger.commit(trial_row(point, test_accuracy=0.7 + 0.01 * point.config.seed))
    after = CliRunner().invoke(app, command)

    assert "what they can find is not known" in before.stdout
    one, _ = foresee(sweep, ledger)
    assert f"bit-xor: language > random: {one.smallest:.2g} with 5 seeds" in after.stdout
    assert f"10: {one.seeds['10']}" in after.stdout
