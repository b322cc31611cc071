"""What `sweep query`, `table` and `claims` write, where to, and how they end."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support import Command

FILE = """\
sweep: asked
trial: {backbone: {name: gpt2, layers: 1, width: 8, heads: 1}, steps: 10}
axes: {pretraining: [random], task: [bit-xor], seed: [0, 1]}
table: {rows: pretraining, columns: task}
claims: [{that: fpt > all, axis: train}]
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("asked.yaml").write_text(FILE.replace("claims: [{that: fpt > all, axis: train}]\n", ""))


def test_values_of_every_type_are_printed_in_every_format(command: Command) -> None:
    sql = "SELECT * FROM test_all_types() UNION ALL BY NAME SELECT DATE '10000-01-01' AS date"
    for form in ("table", "csv", "json"):
        told = command("query", sql, "--format", form)
        assert told.code == 0, told.err
        assert "10000-01-01" in told.out
    json.loads(command("query", sql, "--format", "json").out)


def test_values_are_words_and_spans_are_seconds(command: Command) -> None:
    sql = (
        "SELECT chr(27) || ']0;title' || chr(7) || '[link=http://x]y[/link]' AS a, '=1+1' AS b, "
        "INTERVAL '1 day 2 seconds 5 milliseconds' AS c, "
        "TIMESTAMP '2026-01-02' - TIMESTAMP '2026-01-01' AS d"
    )
    shown = command("query", sql).out.splitlines()[1].split("  ")
    assert [text.strip() for text in shown if text] == [
        r"\x1b]0;title\x07[link=http://x]y[/link]", "=1+1", "86402", "86400",
    ]  # fmt: skip
    (row,) = csv.DictReader(io.StringIO(command("query", sql, "--format", "csv").out))
    assert list(row.values())[1:] == ["'=1+1", "86402.005", "86400.0"]
    assert "\x1b" not in row["a"]
    (row,) = json.loads(command("query", sql, "--format", "json").out)
    assert row["a"].startswith("\x1b]0;")  # JSON has a way of its own to hold it


@pytest.mark.parametrize(
    ("argv", "name", "first"),
    [
        (["query", "SELECT 1 AS a"], "x.csv", b"a\n1\n"),
        (["query", "SELECT 1 AS a"], "x.json", b"[\n"),
        (["query", "SELECT 1 AS a"], "x.PARQUET", b"PAR1"),
        (["query", "SELECT 1 AS a"], "x.txt", b"a  \n1  \n"),
        (["query", "SELECT 1 AS a", "--format", "csv"], "x.out", b"a\n1\n"),
        (["table", "asked.yaml"], "x.tex", b"% \\usepackage"),
        (["table", "asked.yaml"], "x.md", b"**asked**"),
        (["table", "asked.yaml"], "x.html", b"<!DOCTYPE html>"),
        (["table", "asked.yaml"], "x.csv", b"row,column"),
        (["table", "asked.yaml"], "x.json", b"{\n"),
        (["table", "asked.yaml"], "x", b"**asked**"),
    ],
)
def test_the_suffix_chooses(argv: list[str], name: str, first: bytes, command: Command) -> None:
    written = command(*argv, "-o", name)
    assert written.code == 0, written.err
    assert Path(name).read_bytes().startswith(first)


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["query", "SELECT 1", "--format", "csv"], "x.parquet"),
        (["query", "SELECT 1", "--format", "parquet"], "x.csv"),
        (["query", "SELECT 1"], "x.xlsx"),
        (["query", "SELECT 1"], "x.unheard"),
        (["table", "asked.yaml", "--format", "md"], "x.tex"),
        (["table", "asked.yaml"], "x.parquet"),
        (["table", "asked.yaml", "--json"], "x.csv"),
        (["table", "asked.yaml", "--json", "--format", "md"], "x.json"),
        (["claims", "asked.yaml"], "x.html"),
    ],
)
def test_a_suffix_that_says_something_else_is_refused_and_the_file_stays(
    argv: list[str], name: str, command: Command
) -> None:
    Path(name).write_text("kept")
    refused = command(*argv, "-o", name)
    assert refused.code == 2
    assert "contradicts" in refused.err or "no format goes by" in refused.err
    assert "Traceback" not in refused.err
    assert Path(name).read_text() == "kept"


def test_parquet_holds_what_was_asked(command: Command) -> None:
    assert command("query", "SELECT 1 AS a, 'b' AS c", "-o", "x.parquet").code == 0
    assert pq.read_table("x.parquet").to_pylist() == [{"a": 1, "c": "b"}]


def test_ctrl_c_ends_a_long_query_with_one_line() -> None:
    sql = "SELECT sum(a.range * b.range) FROM range(100000000) a, range(100000000) b"
    process = subprocess.Popen(
        [sys.executable, "-m", "sweep", "query", sql],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        # Once it computes, it has used more of a processor than starting takes.
        while process.poll() is None and _seconds_of(process.pid) < 4:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def _seconds_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("argv", [["query", "SELECT 1"], ["table", "asked.yaml"], ["schema"]])
def test_a_full_device_is_told_in_one_line(argv: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "sweep", *argv],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr == "output: cannot be written (No space left on device)\n"


@pytest.mark.parametrize(
    "variables",
    [
        {"LANG": "C", "LC_ALL": "C"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONUTF8": "0", "LC_ALL": "C"},
    ],
)
def test_a_pipe_gets_utf_8_whatever_the_locale(variables: dict[str, str]) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "sweep", "query", "SELECT chr(177) || chr(8224) || chr(38928) AS a"],
        capture_output=True, text=True, encoding="utf-8", check=False, env=os.environ | variables,
    )  # fmt: skip
    assert told.returncode == 0
    assert "±†預" in told.stdout
