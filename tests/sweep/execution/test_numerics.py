"""The numerics class in a sweep: part of a trial's identity, never mixed, and refused in time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sweep import cli
from sweep.analysis.tables import build
from sweep.execution import driver
from sweep.execution.driver import run
from sweep.ledger.ledger import Ledger
from sweep.planning.packing import Workers
from sweep.planning.plan import plan
from sweep.sweepfile import schema
from sweep.sweepfile.expansion import load
from sweep.sweepfile.identity import cell_id, trial_id
from sweep.sweepfile.schema import SweepFileError
from sweep.sweepfile.trials import Sweep
from tests.support import trial_row

FILE = """\
sweep: classes
trial:
  backbone: {name: gpt2, layers: 2, width: 32, heads: 2}
  task: bit-xor
  pretraining: random
  backbone_seed: 0
  steps: 10
axes:
  numerics: [fp32, bf16]
  learning_rate: [1e-3, 1e-2]
  seed: [0, 1]
"""


@pytest.fixture
def no_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without products in bfloat16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False})


def expand(folder: Path, more: str = "", text: str = FILE) -> Sweep:
    file = folder / "sweep.yaml"
    file.write_text(text + more)
    return load(file)


def test_the_class_is_part_of_trial_and_cell(tmp_path: Path) -> None:
    points = expand(tmp_path).points
    assert len({point.trial_id for point in points}) == len(points) == 8
    one = next(point.config for point in points if point.config.numerics == "bf16")
    other = one.model_copy(update={"numerics": "fp32"})
    assert trial_id(one) != trial_id(other)
    assert cell_id(one) != cell_id(other)
    assert one.identity()["numerics"] == "bf16"


def test_packs_are_of_one_class(tmp_path: Path) -> None:
    sweep = expand(tmp_path)
    planned = plan(sweep, Ledger(tmp_path / "results"), workers=Workers(1))
    assert [{point.config.numerics for point in pack.points} for pack in planned.packs] == [
        {"fp32"},
        {"bf16"},
    ]


# --- never mixed


@pytest.mark.parametrize(
    ("claim", "mixed"),
    [
        ("{that: fp32 > bf16, axis: numerics}", "fp32 (fp32) and bf16 (bf16)"),
        ("{that: 0.01 > 0.001, axis: learning_rate}", "fp32 (0.001) and bf16 (0.001)"),
        (
            "{that: 0.01 > 0.001, axis: learning_rate, per: seed, paired_by: numerics}",
            "classes, at 0: fp32 (0.001)",
        ),
    ],
)
def test_a_claim_that_mixes_classes_is_refused(claim: str, mixed: str, tmp_path: Path) -> None:
    with pytest.raises(SweepFileError) as caught:
        expand(tmp_path, f"claims: [{claim}]\n")
    (problem,) = caught.value.problems
    assert "12: claims[0].that: compares trials of two numerics classes" in problem
    assert mixed in problem


def test_a_claim_for_each_class_is_none_that_mixes(tmp_path: Path) -> None:
    claim = "claims: [{that: 0.01 > 0.001, axis: learning_rate, per: numerics}]\n"
    expand(tmp_path, claim)
    expand(tmp_path, claim, FILE.replace("numerics: [fp32, bf16]", "numerics: [bf16]"))


def test_a_cell_that_would_mix_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepFileError, match=r"holds 2 configs, by axis numerics; make numerics"):
        expand(tmp_path, "table: {rows: learning_rate, value: [test_accuracy, test_loss]}\n")


def test_a_table_says_which_figures_are_in_bf16(tmp_path: Path) -> None:
    sweep = expand(tmp_path, "table: {rows: numerics, columns: learning_rate}\n")
    ledger = Ledger(tmp_path / "results", write=True)
    for point in sweep.points:
        ledger.commit(trial_row(point))
    assert set(ledger.trials().column("numerics").to_pylist()) == {"fp32", "bf16"}

    by_row = build(sweep, ledger).to_markdown()
    axes = "table: {rows: learning_rate, columns: numerics}\n"
    by_column = build(expand(tmp_path, axes), ledger).to_markdown()

    # Of a row, once at its label, beside what all rows have; of a column, at each of its cells.
    assert "| fp32 [a] | 50.0 ± 0.0 | 50.0 ± 0.0 |" in by_row
    assert "| bf16 [a,b] | 50.0 ± 0.0 | 50.0 ± 0.0 |" in by_row
    assert "- [b] numerics bf16\n" in by_row
    assert "| 0.01 [a] | 50.0 ± 0.0 | 50.0 ± 0.0 [b] |" in by_column
    assert "- [b] numerics bf16\n" in by_column


def test_no_difference_is_drawn_to_a_figure_of_another_class(tmp_path: Path) -> None:
    text = (
        "sweep: modality\ntrial: {protocol: paper, steps: 50000, numerics: bf16}\n"
        "axes: {pretraining: [language], task: [bit-xor], seed: [0]}\n"
        "table: {rows: pretraining, columns: task, reference: T2}\n"
    )
    bf16 = expand(tmp_path, text=text)
    (cell,) = build(bf16, Ledger(tmp_path / "results")).cells.values()
    assert cell.differs == ("another numerics class (bf16, not fp32)",)
    (cell,) = build(
        expand(tmp_path, text=text.replace("bf16", "fp32")), Ledger(tmp_path / "results")
    ).cells.values()
    assert cell.comparable


# --- refused in time


def test_a_trial_without_frozen_products_is_told_in_its_file(tmp_path: Path) -> None:
    text = FILE.replace("  task: bit-xor\n", "  task: bit-xor\n  numerics: bf16\n  train: all\n")
    with pytest.raises(SweepFileError, match="gpt2 trains all of its own; use fp32"):
        expand(tmp_path, text=text.replace("  numerics: [fp32, bf16]\n", ""))


@pytest.mark.usefixtures("no_amx")
def test_plan_says_what_this_machine_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(tmp_path / "results", write=True)
    sweep = expand(tmp_path)
    monkeypatch.setattr("sys.argv", ["sweep", "plan", str(sweep.file), "--results", ledger.uri])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "not on this machine without a GPU: numerics bf16: needs" in capsys.readouterr().err
    (said,) = plan(sweep, ledger).refusals
    assert "one of amx_bf16, avx512_bf16" in said
    assert plan(sweep, ledger).to_json()["refusals"] == [said]
    for point in sweep.points:  # what is done needs no machine
        if point.config.numerics == "bf16":
            ledger.commit(trial_row(point))
    assert plan(sweep, ledger).refusals == ()


@pytest.mark.ray
@pytest.mark.usefixtures("no_amx")
def test_a_run_refuses_before_it_trains(tmp_path: Path) -> None:
    with pytest.raises(driver.ClusterError, match=r"sweep\.yaml: numerics bf16: needs a processor"):
        run(expand(tmp_path), results=tmp_path / "results", mirror=False)
    assert len(Ledger(tmp_path / "results").trials()) == 0


def test_the_schema_offers_both(tmp_path: Path) -> None:
    file = Path(schema.__file__).with_name("sweep-file.schema.json")
    assert '"bf16"' in json.dumps(json.loads(file.read_text()))
