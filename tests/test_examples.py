"""The example notebook, run from beginning to end on a ledger of the published rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pyarrow.parquet as pq
import pytest
from nbclient import NotebookClient

from sweep.ledger.ledger import Ledger

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples/results.ipynb"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A ledger with the rows of the published quickstart, and a curve each."""
    ledger = Ledger(tmp_path / "results")
    path = ROOT / "results/published/quickstart/trials.parquet"
    for row in pq.read_table(path).to_pylist():
        ledger.commit({name: one for name, one in row.items() if not name.startswith("axis.")})
        points = [{"step": n, "split": "validation", "accuracy": n / 400} for n in (200, 400)]
        ledger.append_curve(row["trial_id"], row["attempt"], 0, points)
    return tmp_path / "results"


def test_the_notebook_is_kept_without_outputs() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own, among themselves
def test_the_notebook_runs(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPT_SWEEP_RESULTS", str(published))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(published.parent / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where: Any = {"metadata": {"path": str(NOTEBOOK.parent)}}

    done = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()

    shown = [
        "".join(str(data) for out in cell.outputs for data in out.get("data", {}).values())
        for cell in done.cells
        if cell.cell_type == "code"
    ]
    assert "bit-memory" in shown[1]
    assert "92.8" in shown[2]  # language at bit-memory, as published
    assert "minutes" in shown[5]
    assert "validation" not in shown[6]
    assert "0.5" in shown[6]
    assert "48" not in shown[7]
    assert "bit-xor" in shown[7]
