"""Published tables are what their rows say, of the sweep files as they are now."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

import sweep
from sweep.ledger.ledger import Ledger

ROOT = Path(__file__).parents[1]
PUBLISHED = sorted(folder for folder in (ROOT / "results/published").iterdir() if folder.is_dir())
FILES = {sweep.load(file).name: file for file in (ROOT / "experiments").rglob("*.yaml")}


def test_something_is_published() -> None:
    assert "quickstart" in [folder.name for folder in PUBLISHED]


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_a_published_table_follows_from_its_rows(folder: Path, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "results", write=True)
    for row in pq.read_table(folder / "trials.parquet").to_pylist():
        ledger.commit({name: v for name, v in row.items() if not name.startswith("axis.")})

    planned = sweep.plan(FILES[folder.name], ledger)
    table = sweep.load_table(FILES[folder.name], tmp_path / "results")

    assert set(planned.status.values()) <= {"done", "diverged"}  # else it is of another version
    assert table.to_markdown() == (folder / "table.md").read_text(encoding="utf-8")
    claims = folder / "claims.md"
    if claims.exists():
        judged = sweep.load_claims(FILES[folder.name], tmp_path / "results")
        assert judged.to_markdown() == claims.read_text(encoding="utf-8")
    assert not any(row["git_dirty"] for row in ledger.trials().to_pylist())


def test_readme_shows_the_published_quickstart() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("<!-- quickstart-table")[1].split("<!-- /quickstart-table -->")[0]
    published = (ROOT / "results/published/quickstart/table.md").read_text(encoding="utf-8")

    lines = [line for line in published.splitlines() if line.startswith("|")]
    assert lines == [line for line in block.splitlines() if line.startswith("|")]
