"""Queries: what they read, and that they can do nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import sweep
from sweep.analysis.queries import QueryError, arrow, query
from sweep.ledger.ledger import Ledger, LedgerError
from sweep.sweepfile.expansion import load
from sweep.sweepfile.schema import SweepFileError
from sweep.sweepfile.trials import Sweep
from tests.support import Command, failure_row, trial_row

TEXT = """\
sweep: asked
trial:
  backbone: {name: gpt2, layers: 1, width: 8, heads: 1}
  steps: 10
axes:
  pretraining: [random]
  task: [bit-xor, {label: long, task: {name: bit-xor, bits: 20}}]
  seed: [0, 1]
table: {rows: pretraining, columns: task}
"""


@pytest.fixture
def asked(tmp_path: Path) -> Sweep:
    """A sweep with a trial that failed, and one of another sweep beside it."""
    file = tmp_path / "asked.yaml"
    file.write_text(TEXT)
    expanded = load(file)
    ledger = Ledger(tmp_path / "results")
    for number, point in enumerate(expanded.points[:3]):
        ledger.commit(trial_row(point, test_accuracy=0.5 + number / 10))
        point_ = {"split": "train", "loss": 1.0}
        ledger.append_curve(point.trial_id, "a1", 0, [{**point_, "step": n} for n in range(3)])
        ledger.append_curve(point.trial_id, "a2", 0, [{**point_, "step": 2, "loss": 0.5}])
    ledger.fail(failure_row(expanded.points[3]))
    ledger.commit(trial_row(expanded.points[0], trial_id="0" * 12))
    return expanded


def rows(sql: str, asked: Sweep, *, of_sweep: bool = True) -> list[tuple[object, ...]]:
    results = asked.file.parent / "results"
    table = arrow(sql, results, asked if of_sweep else None)
    return [tuple(row.values()) for row in table.to_pylist()]


def test_the_tables_of_a_ledger(asked: Sweep) -> None:
    ask = lambda sql: rows(sql, asked, of_sweep=False)  # noqa: E731

    assert ask("SELECT count(*), max(test_accuracy) FROM trials") == [(4, 0.7)]
    assert ask("SELECT count(*), min(loss) FROM CURVES") == [(9, 0.5)]
    assert ask("SELECT cause FROM failures") == [("code",)]
    assert ask("FROM trials SELECT trial_id LIMIT 1") == [("0" * 12,)]
    assert ask(
        "WITH t AS (SELECT * FROM trials) SELECT count(*) FROM t JOIN curves USING (trial_id)"
    ) == [(9,)]


def test_with_a_sweep_file_only_its_trials_with_their_labels(asked: Sweep) -> None:
    by_task = 'SELECT "axis.task", count(*) FROM {} GROUP BY 1 ORDER BY 1'

    assert rows(by_task.format("trials"), asked) == [("bit-xor", 2), ("long", 1)]
    assert rows(by_task.format("curves"), asked) == [("bit-xor", 6), ("long", 3)]
    assert rows(by_task.format("failures"), asked) == [("long", 1)]
    cells = 'SELECT "column", state, n, mean, verdict, len("values") FROM cells'
    assert rows(cells, asked) == [
        ("bit-xor", "done", 2, 55.0, None, 2), ("long", "provisional", 1, 70.0, None, 1)
    ]  # fmt: skip


def test_columns_of_one_name_are_told_apart_and_whole_sums_are_whole(asked: Sweep) -> None:
    sql = "SELECT a.seed, b.seed, sum(a.seed) FROM trials a JOIN trials b ON a.seed < b.seed"
    table = arrow(f"{sql} GROUP BY 1, 2", asked.file.parent / "results", asked)

    assert table.to_pylist() == [{"seed": 0, "seed_1": 1, "sum(a.seed)": 0}]
    assert str(table.schema.field("sum(a.seed)").type) == "int64"


def test_the_answer_is_a_frame(asked: Sweep) -> None:
    frame = sweep.query("SELECT seed FROM trials", asked.file.parent / "results", asked.file)

    assert sorted(frame["seed"]) == [0, 0, 1]
    assert sweep.query is query


def test_a_ledger_without_rows_has_empty_tables_and_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "begun/states").mkdir(parents=True)
    (tmp_path / "begun/states/0123456789ab.safetensors").touch()
    for name in ("trials", "curves", "failures"):
        assert arrow(f"SELECT * FROM {name}", tmp_path / "begun").num_rows == 0
        with pytest.raises(LedgerError, match="none: no ledger: nothing was trained here"):
            arrow(f"SELECT * FROM {name}", tmp_path / "none")
    assert arrow("SELECT 1", tmp_path / "none").num_rows == 1
    assert not (tmp_path / "none").exists()


def test_columns_that_nobody_asks_for_are_not_read(
    asked: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned: list[str] = []
    scan = Ledger.scan

    def noted(self: Ledger, name: str) -> object:
        scanned.append(name)
        return scan(self, name)  # type: ignore[arg-type]

    monkeypatch.setattr(Ledger, "scan", noted)
    rows("SELECT count(*) FROM trials", asked, of_sweep=False)

    assert scanned == ["trials"]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('{secret}')",
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM '{secret}'",
        "SELECT * FROM glob('{secret}')",
        "SELECT * FROM trials UNION ALL BY NAME SELECT * FROM read_csv('{secret}')",
        "SELECT * FROM parquet_scan('http://127.0.0.1:9/x.parquet')",
        "SELECT getenv('HOME')",
        "COPY trials TO '{written}'",
        "COPY (SELECT 1) TO '{written}'",
        "EXPORT DATABASE '{written}'",
        "ATTACH '{written}'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "PRAGMA enable_profiling",
        "CREATE TABLE x AS SELECT 1",
        "DROP VIEW trials",
        "INSERT INTO trials VALUES (1)",
        "SELECT 1; COPY (SELECT 1) TO '{written}'",
        "SELECT * FROM secret",
        "",
        "SELEC 1",
        "SELECT nothing FROM trials",
        "SELECT CAST('x' AS INTEGER)",
    ],
)
def test_a_query_reads_the_ledger_and_does_nothing_else(asked: Sweep, sql: str) -> None:
    folder = asked.file.parent
    secret = folder / "secret.csv"
    secret.write_text("word\nhush\n")
    before = sorted(folder.rglob("*"))

    with pytest.raises(QueryError) as caught:
        rows(sql.format(secret=secret, written=folder / "written"), asked, of_sweep=False)

    assert "hush" not in str(caught.value)
    after = [path for path in sorted(folder.rglob("*")) if "cache" not in path.parts]
    assert after == [path for path in before if "cache" not in path.parts]


def test_what_is_wrong_is_told(asked: Sweep) -> None:
    for sql, said in {
        "SELECT * FROM trails": "tables are trials, curves, failures, cells",
        "SELECT test_acuracy FROM trials": "test_accuracy",
        "SELECT * FROM cells": "--sweep FILE",
        "DROP VIEW x": "one SELECT; this is DROP",
    }.items():
        with pytest.raises(QueryError, match=said):
            rows(sql, asked, of_sweep=False)
    with pytest.raises(SweepFileError):
        query("SELECT 1", "results", asked.file.parent / "none.yaml")


def test_the_command(asked: Sweep, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(asked.file.parent)
    where = ("--results", "results")

    cells = ('SELECT "column", "values" FROM cells', "--sweep", "asked.yaml", "--format", "csv")
    told = command("query", *cells, *where)
    assert told.out == "column,values\nbit-xor,50.0; 60.0\nlong,70.0\n"
    seeds = ("SELECT seed FROM trials", "--format", "parquet", "-o", "out.parquet")
    assert command("query", *seeds, *where).code == 0
    assert pq.read_table("out.parquet").num_rows == 4
    wrong = command("query", "SELECT", *where)
    assert (wrong.code, wrong.out) == (2, "")
    assert "Traceback" not in wrong.err


def test_how_an_answer_is_written(asked: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    from sweep.cli.query import Format
    from sweep.cli.query import query as command

    results = str(asked.file.parent / "results")
    sql = "SELECT task, test_accuracy AS t, finished_at, git_commit FROM trials ORDER BY t LIMIT 1"
    command(sql, None, Format.json, None, results)
    (record,) = json.loads(capsys.readouterr().out)
    command(sql, None, Format.table, None, results)
    lines = capsys.readouterr().out.splitlines()
    command("SELECT range AS n FROM range(500)", None, Format.table, None, results)
    many = capsys.readouterr().out.splitlines()

    command("SELECT 'nan'::DOUBLE AS n, [1, 'inf'::DOUBLE] AS l", None, Format.json, None, results)
    strict = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)

    assert strict == [{"n": None, "l": [1, None]}]
    assert record["t"] == 0.5
    assert record["git_commit"] is None
    assert lines[0].split() == ["task", "t", "finished_at", "git_commit"]
    assert lines[1].split()[:2] == ["bit-xor", "0.5"]
    assert len(many) == 202
    assert "300 more rows" in many[-1]
