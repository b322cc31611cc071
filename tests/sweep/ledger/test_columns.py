"""What the columns mean: said once, and found wherever people look."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from sweep.cli import app
from sweep.ledger.columns import TABLES, described
from sweep.ledger.ledger import CURVES, FAILURES, TRIALS, Ledger

DATASETS = {"trials": TRIALS, "curves": CURVES, "failures": FAILURES}


@pytest.mark.parametrize("name", TABLES)
def test_every_column_says_what_it_is(name: str) -> None:
    for field in DATASETS[name].schema:
        meaning = {key.decode(): text.decode() for key, text in (field.metadata or {}).items()}
        assert len(meaning["description"]) > 3
        if pa.types.is_floating(field.type) and field.name != "learning_rate":
            assert meaning["unit"], field.name
        if field.name.endswith("accuracy"):
            assert meaning["unit"] == "fraction, 0 to 1"
        if field.name.endswith("loss"):
            assert meaning["unit"] == "nats"


def test_files_of_many_rows_bear_the_meaning(tmp_path: Path) -> None:
    from sweep.sweepfile.expansion import load
    from tests.support import trial_row

    file = tmp_path / "s.yaml"
    file.write_text(
        "sweep: s\ntrial: {backbone: {name: gpt2, layers: 1, width: 8, heads: 1}, steps: 10, "
        "pretraining: random}\n"
        "axes: {task: [bit-xor], seed: [0, 1]}\n"
    )
    ledger = Ledger(tmp_path / "results")
    for point in load(file).points:
        ledger.commit(trial_row(point))
    ledger.trials()
    cache = pq.read_schema(tmp_path / "results/cache/trials.parquet").field("test_accuracy")
    assert cache.metadata[b"unit"] == b"fraction, 0 to 1"
    # A file of one row would grow by several kilobytes.
    (one, _) = (tmp_path / "results/trials").iterdir()
    assert b"unit" not in (pq.read_schema(one).field("test_accuracy").metadata or {})

    out = tmp_path / "x.parquet"
    asked = CliRunner().invoke(
        app,
        ["query", "SELECT test_accuracy, step FROM trials, (SELECT 1 AS step)", "-o", str(out),
         "--results", ledger.uri],
    )  # fmt: skip
    assert asked.exit_code == 0, asked.output
    written = pq.read_schema(out)
    assert written.field("test_accuracy").metadata[b"unit"] == b"fraction, 0 to 1"
    # Curves and failures have a `step` each, of another meaning.
    assert b"unit" not in (written.field("step").metadata or {})


def test_sweep_columns_lists_them() -> None:
    told = json.loads(CliRunner().invoke(app, ["columns", "--json"]).stdout)
    assert {(one["table"], one["column"]) for one in told} == {
        (table, name) for table, dataset in DATASETS.items() for name in dataset.schema.names
    }
    text = CliRunner().invoke(app, ["columns", "curves"]).stdout
    assert "nats" in text
    assert "test_accuracy" not in text


def test_describing_changes_no_value() -> None:
    table = pa.table({"test_loss": pa.array([1.5], pa.float64()), "other": ["x"]})
    assert described(table).equals(table)
