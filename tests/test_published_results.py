"""Published tables are what their rows say, of the sweep files as they are now."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats

import sweep
from sweep.analysis import claims, tables
from sweep.exchange.bundle import opened

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "results/published"
PUBLISHED = sorted(rows.parent for rows in FOLDER.rglob("trials.parquet"))


def test_something_is_published() -> None:
    assert "quickstart" in [folder.name for folder in PUBLISHED]


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_a_published_table_follows_from_its_rows(folder: Path) -> None:
    file = ROOT / "experiments" / folder.relative_to(FOLDER).with_suffix(".yaml")
    with opened(folder) as ledger:
        planned = sweep.plan(file, ledger)
        table = tables.build(planned.sweep, ledger)
        judged = claims.show(planned.sweep, ledger) if planned.sweep.spec.claims else None
        rows = ledger.trials(columns=["git_dirty"])

    assert set(planned.status.values()) <= {"done", "diverged"}  # else it is of another version
    assert not any(rows["git_dirty"].to_pylist())
    if planned.sweep.left_out:
        return  # the table has trials whose weights or data are not on this machine
    assert table.to_markdown() == (folder / "table.md").read_text(encoding="utf-8")
    if judged is not None:
        assert judged.to_markdown() == (folder / "claims.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "folder", [one for one in PUBLISHED if (one / "table.csv").is_file()], ids=lambda one: one.name
)
def test_each_published_cell_has_the_mean_and_interval_of_its_trials(folder: Path) -> None:
    rows = {row["trial_id"]: row for row in pq.read_table(folder / "trials.parquet").to_pylist()}
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        cells = [cell for cell in csv.DictReader(file) if cell["metric"] == "test_accuracy"]
    lines = (folder / "table.md").read_text(encoding="utf-8").splitlines()

    assert cells
    for cell in cells:
        if not cell["trials"]:  # a row of the paper's alone
            continue
        values = [100 * rows[one]["test_accuracy"] for one in cell["trials"].split("; ")]
        row = cell["row"]
        assert len(values) == int(cell["n"])
        assert float(cell["mean"]) == pytest.approx(np.mean(values))
        (line,) = [one for one in lines if one.startswith((f"| {row} |", f"| {row} ["))]
        assert f"{np.mean(values):.1f}" in line
        if len(values) > 1:
            half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
            assert float(cell["half_width"]) == pytest.approx(half, abs=1e-9)
            assert f"± {half:.1f}" in line


def test_what_is_published_beside_the_quickstart_is_small() -> None:
    files = list((FOLDER / "laptop").rglob("*.parquet"))

    assert sum(file.stat().st_size for file in files) < 8e6


def test_the_findings_are_what_the_published_tables_say() -> None:
    path = ROOT / "experiments/findings.py"
    spec = importlib.util.spec_from_file_location("findings", path)
    assert spec is not None
    assert spec.loader is not None
    findings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(findings)

    page = findings.page()

    assert page == (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if "](laptop/" in line]
    with_claims = [folder for folder in PUBLISHED if (folder / "claims.csv").is_file()]
    for folder in with_claims:  # what was found is not left out
        assert any(f"[{folder.name}](laptop/" in line for line in rows), folder


def made(*words: str) -> subprocess.CompletedProcess[str]:
    """What make would do, or say."""
    command = ["make", "--dry-run", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("table", "place"), [("quickstart", "quickstart"), ("t09-statistics", "laptop/t09-statistics")]
)
def test_make_publishes_and_reproduces_a_table_by_its_name(table: str, place: str) -> None:
    file, folder = f"experiments/{place}.yaml", f"results/published/{place}"

    publish, reproduce = (made(verb, f"TABLE={table}").stdout for verb in ("publish", "reproduce"))

    assert f"sweep publish {file} -o {folder}" in publish
    assert f"sweep run {file} --results build/reproduced/{table}" in reproduce
    assert f"sweep diff {folder} build/reproduced/{table} {file} --rows" in reproduce


@pytest.mark.parametrize("words", [(), ("TABLE=t99-nothing",)])
def test_make_says_that_there_is_no_such_table(words: tuple[str, ...]) -> None:
    done = made("publish", *words)

    assert done.returncode != 0
    assert "no such file in experiments/ or experiments/laptop/" in done.stderr


def test_readme_shows_the_published_quickstart() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("<!-- quickstart-table")[1].split("<!-- /quickstart-table -->")[0]
    published = (ROOT / "results/published/quickstart/table.md").read_text(encoding="utf-8")

    lines = [line for line in published.splitlines() if line.startswith("|")]
    assert lines == [line for line in block.splitlines() if line.startswith("|")]
