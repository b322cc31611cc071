"""The example notebook, run from beginning to end on a ledger of the published rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pyarrow.parquet as pq
import pytest
from nbclient import NotebookClient

from sweep.ledger.ledger import Ledger
from sweep.sweepfile.expansion import load
from tests.support import trial_row

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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own, among themselves
@pytest.mark.parametrize(
    ("axes", "table"),
    [
        (
            "{batch_size: [2, 4], train: [fpt, all], seed: [0, 1]}",
            "rows: batch_size, columns: train",
        ),
        ("{seed: [0, 1]}", "rows: seed, value: [test_accuracy, test_loss]"),
    ],
)
def test_the_notebook_runs_on_any_sweep_with_parameters_as_papermill_sets_them(
    axes: str, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, ledger = tmp_path / "own.yaml", Ledger(tmp_path / "results")
    file.write_text(
        "sweep: own\ntrial: {backbone: {name: gpt2, layers: 1, width: 8, heads: 1}, steps: 10, "
        f"task: bit-xor, pretraining: random}}\naxes: {axes}\n"
        f"table: {{{table}}}\n"
    )
    for point in load(file).points:
        ledger.commit(trial_row(point))
        points = [{"step": 10, "split": "validation", "accuracy": 0.5}]
        ledger.append_curve(point.trial_id, "a1", 0, points)
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (at,) = (
        number
        for number, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", ())
    )
    given = f"RESULTS = {ledger.uri!r}\nSWEEP = {str(file)!r}"
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(given))
    where: Any = {"metadata": {"path": str(NOTEBOOK.parent)}}

    done = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()

    assert not [out for cell in done.cells for out in cell.get("outputs", ()) if "ename" in out]
