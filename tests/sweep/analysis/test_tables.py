from __future__ import annotations

import csv
import io
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from gguf import GGMLQuantizationType
from markdown_it import MarkdownIt
from rich.console import Console

import sweep as api
from sweep.analysis import typeset
from sweep.analysis.cells import grid
from sweep.analysis.tables import Table, build
from sweep.ledger.ledger import Ledger
from sweep.sweepfile.expansion import load
from sweep.sweepfile.schema import SweepFileError, TableSpec
from sweep.sweepfile.trials import Point, Sweep
from tests.fpt.backbones.test_dequantised import write as write_gguf
from tests.support import failure_row, trial_row

PAPER = """\
sweep: modality
trial: {protocol: paper, steps: 50000}
axes:
  pretraining: [language, random]
  task: [bit-xor, bit-memory]
  seed: [0, 1, 2]
table: {rows: pretraining, columns: task, reference: T2}
"""

Fill = Callable[[Point], dict[str, Any] | None]


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], tuple[Sweep, Ledger]]:
    def make(text: str) -> tuple[Sweep, Ledger]:
        file = tmp_path / "sweep.yaml"
        file.write_text(text)
        return load(file), Ledger(tmp_path / "results")

    return make


Make = Callable[[str], tuple[Sweep, Ledger]]


def commit(sweep: Sweep, ledger: Ledger, fill: Fill) -> None:
    for point in sweep.points:
        if (figures := fill(point)) is not None:
            ledger.commit(trial_row(point, **figures))


def seed(point: Point) -> int:
    return point.config.seed


def is_cell(point: Point, *labels: str) -> bool:
    return set(labels) <= set(point.labels.values())


def markdown_rows(text: str) -> list[list[str]]:
    """The cells of the one table, as a Markdown parser of others' reads them."""
    rows: list[list[str]] = []
    inside = False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "tr_open":
            rows.append([])
        if token.type in ("th_open", "td_open"):
            inside = True
        elif token.type == "inline" and inside:
            rows[-1].append("".join(child.content for child in token.children or []))
            inside = False
    return rows


def test_a_table_worked_out_by_hand(make: Make) -> None:
    sweep, ledger = make(PAPER)
    # bit-xor with language: 98, 99, 100; t(0.975, 2) = 4.302653, so 99 +- 4.302653 / sqrt(3).
    # bit-memory with random: 76, 76, 79: mean 77, deviation sqrt(3), so 77 +- 4.302653.
    # The others: 75 each.
    accuracies = {"languagebit-xor": [0.98, 0.99, 1.0], "randombit-memory": [0.76, 0.76, 0.79]}

    def fill(point: Point) -> dict[str, Any]:
        key = point.labels["pretraining"] + point.labels["task"]
        return {
            "test_accuracy": accuracies.get(key, [0.75] * 3)[seed(point)],
            "baseline_accuracy": 0.5 if is_cell(point, "bit-xor") else 0.752,
            "baseline_rule": "guess",
        }

    commit(sweep, ledger, fill)
    table = build(sweep, ledger)

    cell = table.cells["language", "bit-xor", "test_accuracy"]
    assert cell.values == (98, 99, 100)
    assert cell.interval is not None
    assert cell.interval.mean == pytest.approx(99)
    assert cell.interval.half_width == pytest.approx(2.484138, abs=1e-6)
    assert cell.difference == pytest.approx(-1)
    assert cell.state == "done"
    assert markdown_rows(table.to_markdown()) == [
        ["pretraining", "bit-xor", "bit-memory"],
        ["language", "99.0 ± 2.5", "75.0 ± 0.0"],
        ["paper, T2", "100 (-1.0 ≈)", "100 (-25.0 ≠)"],
        ["random", "75.0 ± 0.0", "77.0 ± 4.3"],
        ["paper, T2", "100 (-25.0 ≠)", "75.8 (+1.2 ≈)"],
        ["trivial baseline", "50.0 [a]", "75.2 [a]"],
    ]
    assert "*100 (-1.0 ≈)*" in table.to_markdown()
    assert "widened by 1 point and by their rounding; ≈ reproduced" in table.to_markdown()


def test_an_empty_ledger_gives_an_empty_table(make: Make) -> None:
    sweep, ledger = make(PAPER)

    table = build(sweep, ledger)

    assert {cell.state for cell in table.cells.values()} == {"missing"}
    assert markdown_rows(table.to_markdown())[1:3] == [
        ["language", "0/3", "0/3"],
        ["paper, T2", "100", "100"],
    ]
    assert table.to_frame()["mean"].isna().all()


def test_cells_tell_what_became_of_their_trials(make: Make) -> None:
    sweep, ledger = make(PAPER)
    done: dict[str, Any] = {"test_accuracy": 0.8}

    def fill(point: Point) -> dict[str, Any] | None:
        if is_cell(point, "language", "bit-xor"):  # one of them failed
            return done if seed(point) else None
        if is_cell(point, "language", "bit-memory"):  # one diverged, with a figure
            return done | ({"outcome": "diverged"} if seed(point) == 1 else {})
        if is_cell(point, "random", "bit-xor"):  # one diverged at once
            early = {"outcome": "diverged", "test_accuracy": None}
            return early if seed(point) == 1 else done
        return None

    commit(sweep, ledger, fill)
    lost = next(p for p in sweep.points if is_cell(p, "language", "bit-xor"))
    ledger.fail(failure_row(lost))
    ledger.put_state(
        next(p for p in sweep.points if is_cell(p, "random", "bit-memory")).trial_id, b"s"
    )
    table = build(sweep, ledger)

    cells = {(row, column): cell for (row, column, _), cell in table.cells.items()}
    assert {place: cell.state for place, cell in cells.items()} == {
        ("language", "bit-xor"): "provisional",
        ("language", "bit-memory"): "diverged",
        ("random", "bit-xor"): "diverged",
        ("random", "bit-memory"): "begun",
    }
    assert cells["language", "bit-xor"].failures == ("code, OverflowError",)
    assert [len(cell.values) for cell in cells.values()] == [2, 3, 2, 0]
    rows = markdown_rows(table.to_markdown())
    assert rows[1] == ["language", "80.0 ± 0.0 (2/3) [a]", "80.0 ± 0.0 [b]"]
    assert rows[3] == ["random", "80.0 ± 0.0 [c]", "begun (0/3)"]
    notes = dict(re.findall(r"- \[(\w)\] (.*)", table.to_markdown()))
    assert notes["a"].startswith("1 of 3 failed (code, OverflowError)")
    assert notes["b"] == "1 of 3 diverged: the last good figures before that count"
    assert notes["c"] == "1 of 3 diverged; without a figure, and left out: 1"


@pytest.mark.parametrize("cause", ["retried", "worker", "interrupted", "memory", "storage"])
def test_a_failure_that_waits_for_nobody_is_a_missing_trial(make: Make, cause: str) -> None:
    sweep, ledger = make(PAPER)
    point = sweep.points[0]
    ledger.fail(failure_row(point, attempt="a1"))
    later = failure_row(point)["at"].replace(year=2027)
    ledger.fail(failure_row(point, attempt="a2", cause=cause, at=later))

    cell = build(sweep, ledger).cells["language", "bit-xor", "test_accuracy"]

    assert cell.state == "missing"
    assert cell.counts["missing"] == 3


def test_a_mark_of_work_done_twice_hides_no_failure(make: Make) -> None:
    sweep, ledger = make(PAPER)
    point = sweep.points[0]
    ledger.fail(failure_row(point, attempt="a1"))
    later = failure_row(point)["at"].replace(year=2027)
    ledger.fail(failure_row(point, attempt="a2", cause="doubled", at=later))

    cell = build(sweep, ledger).cells["language", "bit-xor", "test_accuracy"]

    assert cell.failures == ("code, OverflowError",)
    assert cell.counts["failed"] == 1


def test_a_done_trial_did_not_fail(make: Make) -> None:
    sweep, ledger = make(PAPER)
    commit(sweep, ledger, lambda point: {} if point is sweep.points[0] else None)
    ledger.fail(failure_row(sweep.points[0]))

    cell = build(sweep, ledger).cells["language", "bit-xor", "test_accuracy"]

    assert (cell.counts["done"], cell.counts["failed"]) == (1, 0)


def test_no_difference_is_drawn_to_another_setting(make: Make) -> None:
    sweep, ledger = make(
        PAPER.replace("protocol: paper", "backbone: {name: gpt2, size: tiny}, protocol: sound")
    )
    commit(sweep, ledger, lambda point: {})
    table = build(sweep, ledger)

    assert all(cell.difference is None for cell in table.cells.values())
    assert markdown_rows(table.to_markdown())[2] == ["paper, T2", "100 [†]", "100 [†]"]
    note = table.to_markdown().partition("[†] not comparable: ")[2].splitlines()[0]
    assert note == (
        "another backbone size (4 layers of width 128, not 12 of width 768); "
        "another protocol (sound, not paper)"
    )


def test_a_reason_says_where_it_holds(make: Make) -> None:
    text = PAPER.replace("steps: 50000", "steps: 15000")
    sweep, ledger = make(text.replace("bit-memory]", "{name: bit-memory, strings: 3}]"))

    note = build(sweep, ledger).to_markdown().partition("[†] not comparable: ")[2].splitlines()[0]

    # T6: bit-xor took 500 and 20,000 steps, bit-memory 10,000 and 40,000.
    assert set(note.split("; ")) == {
        "bit-memory: another task size (strings 3)",
        "random: fewer steps than the paper's trials took to converge (T6)",
    }


def test_unverified_figures_are_marked_and_not_compared(make: Make) -> None:
    text = """\
sweep: lstm
trial: {protocol: paper, steps: 50000, pretraining: random}
axes:
  backbone: [gpt2, bert]
  task: [bit-xor]
  seed: [0, 1]
table:
  rows: backbone
  columns: task
  reference: T3
  labels: {backbone: {gpt2: transformer, bert: lstm}}
"""
    sweep, ledger = make(text)
    commit(sweep, ledger, lambda point: {"test_accuracy": 1.0})
    table = build(sweep, ledger)

    rows = markdown_rows(table.to_markdown())
    assert rows[2] == ["paper, T3", "100 (+0.0 ≈)"]
    assert rows[4] == ["paper, T3", "50.0 [?]"]
    assert "- [?] unverified" in table.to_markdown()
    # Greyer than a figure that can be relied upon, in every format that has greys.
    said = '<span class="said">, {}</span>'
    assert f"<td>100 (+0.0 ≈){said.format('reproduced')}</td>" in table.to_html()
    weak = f'<td class="weak">50.0{said.format("unverified")}<sup>?</sup></td>'
    assert weak in table.to_html()
    assert r"\textcolor{black!55}{100 (+0.0 $\approx$)}" in table.to_latex()
    assert r"\textcolor{black!40}{\textit{50.0\textsuperscript{?}}}" in table.to_latex()
    terminal = io.StringIO()
    Console(width=80, file=terminal, force_terminal=True, color_system="standard").print(
        table.to_rich()
    )
    styles = dict(
        re.findall(r"\x1b\[([\d;]+)m *(100 \(\+0\.0 ≈\)|50\.0 \[\?\])", terminal.getvalue())
    )
    assert styles == {"2": "100 (+0.0 ≈)", "2;3": "50.0 [?]"}
    lines = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert [line["published_trust"] for line in lines] == ["reported", "unverified"]
    assert [line["difference"] for line in lines] == ["0.0", ""]


# The paper's figure is 100, half a point of which is rounding; t(0.975, 2) = 4.302653, so that
# three seeds a deviation apart of 1 have an interval of +- 2.484.
@pytest.mark.parametrize(
    ("accuracies", "tolerance", "verdict"),
    [
        ([0.99, 0.99, 0.99], 1, "reproduced"),
        ([0.985, 0.985, 0.985], 1, "reproduced"),  # off by the tolerance and the rounding
        ([0.984, 0.984, 0.984], 1, "differs"),
        ([0.95, 0.96, 0.97], 1, "differs"),  # 96 + 2.48 + 1 + 0.5 < 100
        ([0.95, 0.96, 0.97], 2, "reproduced"),
        ([0.955, 0.965, 0.975], 1, "reproduced"),  # 96.5 + 2.48 + 1.5 > 100
        ([0.8, 0.9, 1.0], 1, "undecided"),  # +- 24.8 holds anything
        ([0.8, 0.9, 1.0], 5, "reproduced"),
        ([0.99, 0.99, None], 1, "undecided"),
        ([0.5, 0.5, None], 1, "undecided"),
        ([None, None, None], 1, None),
    ],
)
def test_a_verdict_on_the_published_figure(
    make: Make, accuracies: list[float | None], tolerance: float, verdict: str | None
) -> None:
    sweep, ledger = make(PAPER.replace("reference: T2", f"reference: T2, tolerance: {tolerance}"))

    def fill(point: Point) -> dict[str, Any] | None:
        value = accuracies[seed(point)] if is_cell(point, "language", "bit-xor") else None
        return None if value is None else {"test_accuracy": value}

    commit(sweep, ledger, fill)
    table = build(sweep, ledger)

    cell = table.cells["language", "bit-xor", "test_accuracy"]
    assert cell.verdict == cell.record()["verdict"] == verdict
    signs = {"reproduced": " ≈)", "differs": " ≠)"}
    shown = markdown_rows(table.to_markdown())[2][1]
    assert [sign for sign in signs.values() if sign in shown] == [
        sign for name, sign in signs.items() if name == verdict
    ]


def test_one_seed_decides_nothing(make: Make) -> None:
    sweep, ledger = make(PAPER.replace("seed: [0, 1, 2]", "seed: [0]"))
    commit(sweep, ledger, lambda point: {"test_accuracy": 1.0})

    verdicts = {cell.verdict for cell in build(sweep, ledger).cells.values()}

    assert verdicts == {"undecided"}


def test_counts_are_compared_by_a_part_of_the_published_one(make: Make) -> None:
    sweep, ledger = make(PAPER.replace("reference: T2", "reference: T6, value: steps_trained"))
    # 1 per cent of 20,000 is 200.
    at = {"bit-xor": 20_199, "bit-memory": 40_500}
    commit(sweep, ledger, lambda point: {"steps_trained": at[point.labels["task"]]})
    table = build(sweep, ledger)

    cells = {place[:2]: cell.verdict for place, cell in table.cells.items()}
    assert cells["random", "bit-xor"] == "reproduced"
    assert cells["random", "bit-memory"] == "differs"
    assert "widened by 1 % of theirs" in table.to_markdown()


def test_what_cannot_be_compared_has_no_other_verdict(make: Make) -> None:
    sweep, ledger = make(PAPER.replace("protocol: paper", "protocol: sound"))
    commit(sweep, ledger, lambda point: {"test_accuracy": 1.0})

    cells = build(sweep, ledger).cells.values()

    assert {cell.verdict for cell in cells} == {"not comparable"}


def test_batches_in_parts_and_smaller_sets_of_data_have_footnotes(make: Make) -> None:
    text = """\
sweep: notes
trial: {steps: 100, pretraining: random, backbone: {name: gpt2, size: tiny}}
axes:
  arm:
    - {label: usual, learning_rate: 1e-3}
    - {label: less, learning_rate: 1e-2, task.train: 1000, task.test: 100}
  length:
    - {label: short, task: {name: listops, min_length: 4, max_length: 32}}
    - {label: long, task: {name: listops, min_length: 4, max_length: 64}}
  seed: [0, 1]
table: {rows: arm, columns: length}
"""
    sweep, ledger = make(text)
    parts = {"usual/short/1": 4, "usual/short/0": None}  # None: of a ledger from before
    commit(sweep, ledger, lambda point: {"accumulation": parts.get(point.label, 1)})
    table = build(sweep, ledger)

    rows = markdown_rows(table.to_markdown())
    notes = dict(re.findall(r"- \[(\w)\] (.*)", table.to_markdown()))
    assert rows[1] == ["usual", "50.0 ± 0.0 [a]", "50.0 ± 0.0"]
    assert notes["a"].startswith("1 of 2 computed each batch in 4 parts")
    assert rows[2] == ["less [b]", "50.0 ± 0.0", "50.0 ± 0.0"]
    assert notes["b"] == (
        "a smaller set of data (train 1,000, not 96,000; test 100, not 2,000 examples)"
    )
    assert table.cells["usual", "short", "test_accuracy"].record()["accumulated"] == 1


def test_a_cell_of_two_kinds_of_device_has_a_footnote(make: Make) -> None:
    sweep, ledger = make(
        "sweep: two\ntrial: {task: bit-xor, pretraining: random, steps: 10}\n"
        "axes: {backbone: [{name: gpt2, size: tiny}], seed: [0, 1, 2]}\n"
        "table: {rows: backbone, value: [test_loss]}\n"
    )
    commit(sweep, ledger, lambda point: {"device": "cuda" if point.config.seed == 1 else "cpu"})

    table = build(sweep, ledger)

    (cell,) = table.cells.values()
    assert "(2 on cpu and 1 on cuda)" in table.to_markdown()
    assert cell.record()["devices"] == ["cpu", "cuda"]


def test_a_cell_that_mixes_configs_is_refused(make: Make) -> None:
    text = PAPER.replace("  seed:", "  learning_rate: [0.001, 0.01]\n  seed:")
    with pytest.raises(SweepFileError) as before:
        make(text)
    sweep, ledger = make(text[: text.index("table:")])

    # Of a table that a program asks for, the file says nothing.
    with pytest.raises(SweepFileError) as error:
        grid(sweep, TableSpec(rows="pretraining", columns="task"), ledger)

    for caught in (before, error):
        assert len(caught.value.problems) == 1
        assert "language / bit-xor holds 2 configs, by axis learning_rate;" in str(caught.value)
        assert "make learning_rate the rows or the columns" in str(caught.value)


def test_a_file_without_a_table_says_how_to_ask_for_one(make: Make) -> None:
    sweep, ledger = make(PAPER[: PAPER.index("table:")])

    with pytest.raises(SweepFileError, match=r"sweep\.yaml: table: missing; add one"):
        build(sweep, ledger)


def test_metrics_as_columns(make: Make) -> None:
    text = """\
sweep: size
trial: {task: bit-xor, steps: 100, pretraining: random}
axes:
  backbone:
    - {label: small, backbone: {name: gpt2, size: tiny}}
    - {label: base, backbone: gpt2}
  seed: [0, 1]
table: {rows: backbone, value: [test_accuracy, parameters, train_loss]}
"""
    sweep, ledger = make(text)
    commit(
        sweep, ledger, lambda point: {"parameters": 117_000_000, "train_loss": 0.5 + seed(point)}
    )

    rows = markdown_rows(build(sweep, ledger).to_markdown())

    assert rows[0] == ["backbone", "test accuracy", "parameters", "train loss"]
    # t(0.975, 1) = 12.7062, and the standard error of 0.5 and 1.5 is 0.5.
    assert rows[1] == ["small", "50.0 ± 0.0", "117,000,000", "1.00 ± 6.35"]
    assert rows[3] == ["trivial baseline", "50.0 [a]", "", ""]


def test_a_reference_in_steps_stands_beside_steps(make: Make) -> None:
    text = PAPER.replace("reference: T2", "reference: T6, value: steps_trained")
    sweep, ledger = make(text)
    commit(sweep, ledger, lambda point: {"steps_trained": 400 + 100 * seed(point)})

    rows = markdown_rows(build(sweep, ledger).to_markdown())

    assert rows[1][1] == "500 ± 248"
    assert rows[2][1] == "500 (+0)"
    assert rows[4][2] == "40,000 (-39,500 ≠)"
    assert [row[0] for row in rows[1:]] == ["language", "paper, T6", "random", "paper, T6"]


SIZES = """\
sweep: size
trial: {task: cifar10, steps: 500000, protocol: paper}
axes:
  size: [{label: base, backbone: gpt2}, {label: medium, backbone: {name: gpt2, size: medium}}]
  pretraining: [language, random]
  seed: [0, 1]
table:
  rows: size
  columns: pretraining
  value: [layers, parameters, parameters_trained, test_accuracy]
  reference: T8
"""


def test_a_fact_is_printed_once_beside_its_published_figure(make: Make) -> None:
    sweep, ledger = make(SIZES)
    counts = {"parameters": 85_000_000, "parameters_trained": 132_874}
    commit(
        sweep, ledger,
        lambda point: None if point.labels["size"] == "medium" and seed(point) else
        counts | {"test_accuracy": 0.682 if is_cell(point, "language") else 0.617},
    )  # fmt: skip
    table = build(sweep, ledger)

    rows = markdown_rows(table.to_markdown())

    assert rows[0] == ["size", "layers", "parameters", "parameters trained", "language", "random"]
    assert rows[1] == ["base", "12", "85,000,000", "132,874", "68.2 ± 0.0", "61.7 ± 0.0"]
    assert rows[2] == [
        "paper, T8", "12 (+0 ≈)", "117,000,000 [†]", "106,000 [†]", "68.2 (+0.0 ≈)", "61.7 (+0.0 ≈)"
    ]  # fmt: skip
    assert rows[3][1:] == [
        "24 (1/2)", "85,000,000 (1/2)", "132,874 (1/2)", "68.2 (1/2)", "61.7 (1/2)"
    ]  # fmt: skip
    text = table.to_markdown()
    assert "- test accuracy, per cent: mean ± half-width" in text
    note = text.partition("[†] not comparable: ")[2].splitlines()[0]
    assert {part.partition(" there")[0] for part in note.split("; ")} == {
        "base / language, base / random, medium / language, medium / random: counted otherwise"
    }
    assert len(table.cells) == 16  # CSV, JSON and frame hold them all


def test_facts_that_differ_between_columns_keep_their_labels(make: Make) -> None:
    sweep, ledger = make(SIZES)
    commit(
        sweep, ledger,
        lambda point: {"parameters": 1000 if is_cell(point, "random") else 2000},
    )  # fmt: skip

    rows = markdown_rows(build(sweep, ledger).to_markdown())

    assert rows[0] == [
        "size", "layers", "parameters trained", "language: parameters", "language",
        "random: parameters", "random",
    ]  # fmt: skip


def test_train_and_test_beside_each_other(make: Make) -> None:
    text = """\
sweep: fit
trial: {task: cifar10-lra, steps: 500000, protocol: paper, evaluation: {training_set: 100}}
axes:
  model: [{label: fpt, backbone: gpt2}, {label: vanilla-transformer, backbone: bert}]
  seed: [0, 1]
table:
  rows: model
  value: [layers, test_accuracy, training_set_accuracy, training_set_loss]
  reference: T7
"""
    sweep, ledger = make(text)
    fitted = {"training_set_accuracy": 0.4, "training_set_loss": 1.5, "test_accuracy": 0.386}
    commit(sweep, ledger, lambda point: fitted if is_cell(point, "fpt") else {})
    table = build(sweep, ledger)

    rows = markdown_rows(table.to_markdown())

    assert rows[0][1:] == ["layers", "test accuracy", "training set accuracy", "training set loss"]
    assert rows[1] == ["fpt", "12", "38.6 ± 0.0", "40.0 ± 0.0", "1.50 ± 0.00"]
    assert rows[2] == ["paper, T7", "12 (+0 ≈)", "38.6 (+0.0 ≈)", "38.5 (+1.5 ≠)", ""]
    # Trained without `evaluation.training_set`, or before there was one.
    assert rows[3][3:] == ["none", "none"]
    assert rows[4] == ["paper, T7", "3 [†]", "42 [†]", "70 [†]", ""]
    assert "figure of another model and code" in table.to_markdown()


CONVERGENCE = PAPER.replace(
    "reference: T2",
    "reference: T6, value: steps_to_convergence, convergence: {tolerance: 0.02, smoothing: 2}",
)


def curve(rises_at: int | None, split: str, last: int = 1000) -> list[dict[str, Any]]:
    """Evaluations every 100 steps: 0.5, and 0.9 from `rises_at` on; never a plateau if None."""
    return [
        {"step": step, "split": split, "loss": 1.0,
         "accuracy": step / 2000 if rises_at is None else 0.5 + 0.4 * (step >= rises_at)}
        for step in range(100, last + 1, 100)
    ]  # fmt: skip


def test_steps_to_convergence_come_from_the_curves_of_the_tables_trials(make: Make) -> None:
    sweep, ledger = make(CONVERGENCE)
    rises = {"languagebit-xor": [300, 400, 500], "languagebit-memory": [300, None, 600]}
    for point in sweep.points:
        rise = rises.get(point.labels["pretraining"] + point.labels["task"], [None] * 3)
        ledger.commit(trial_row(point))
        # Protocol paper: the test batches are the curve; other splits must not count.
        ledger.append_curve(point.trial_id, "a1", 0, curve(rise[seed(point)], "test"))
        ledger.append_curve(point.trial_id, "a1", 1, curve(100, "train"))
    table = build(sweep, ledger)

    rows = markdown_rows(table.to_markdown())

    # A window of two ends one evaluation after its own: no delay. Mean of 300, 400, 500.
    assert table.cells["language", "bit-xor", "steps_to_convergence"].values == (300, 400, 500)
    assert rows[1] == ["language", "400 ± 248", "450 ± 1,906 [a]"]
    assert rows[2] == ["paper, T6", "500 (-100)", "10,000 [†]"]
    assert rows[3] == ["random", "none [b]", "none [b]"]
    assert rows[4] == ["paper, T6", "20,000 [†]", "40,000 [†]"]
    text = table.to_markdown()
    left_out = "1 of 3 not converged in 1,000 steps: left out, so that the mean is too low"
    assert f"- [a] {left_out}" in text
    assert "- [b] 3 of 3 not converged in 1,000 steps: left out\n" in text
    assert "averaged over 2 evaluations, stays within 2 points of its plateau; the proto" in text
    assert "trials that did not converge are left out" in text
    record = table.cells["language", "bit-memory", "steps_to_convergence"].record()
    assert record["unconverged"] == ["not converged in 1,000 steps"]


def test_convergence_is_of_the_validation_split_where_there_is_one(make: Make) -> None:
    sweep, ledger = make(CONVERGENCE.replace("protocol: paper", "protocol: sound"))
    ended = sweep.points[:3]  # language / bit-xor
    for point in ended:
        diverged = seed(point) == 2
        ledger.commit(trial_row(point, outcome="diverged" if diverged else "done"))
        short = curve(200, "validation", last=300 if seed(point) == 1 else 1000)
        ledger.append_curve(point.trial_id, "a1", 0, short)
        ledger.append_curve(point.trial_id, "a1", 1, [{"step": 1000, "split": "test"}])
    table = build(sweep, ledger)

    cell = table.cells["language", "bit-xor", "steps_to_convergence"]
    assert cell.values == (200,)
    assert cell.unconverged == ("with fewer than 4 evaluations",)
    rows = markdown_rows(table.to_markdown())
    assert rows[1] == ["language", "200 [a,b]", "0/3"]
    text = table.to_markdown()
    assert "- [a] 1 of 3 diverged; without a figure, and left out: 1\n" in text
    assert "- [b] 1 of 3 with fewer than 4 evaluations: left out" in text
    assert "test batches" not in text


def test_baselines_stand_beside_rows_that_are_tasks(make: Make) -> None:
    sweep, ledger = make(
        PAPER.replace(
            "rows: pretraining, columns: task", "rows: task, columns: pretraining"
        ).replace("reference: T2", "value: test_accuracy")
    )
    commit(
        sweep, ledger,
        lambda point: {"baseline_accuracy": 0.5 if is_cell(point, "bit-xor") else 0.75},
    )  # fmt: skip

    rows = markdown_rows(build(sweep, ledger).to_markdown())

    assert rows[0] == ["task", "language", "random", "trivial baseline"]
    assert [row[3] for row in rows[1:]] == ["50.0 [a]", "75.0 [a]"]


def test_a_stronger_baseline_stands_below_the_trivial_one(make: Make) -> None:
    sweep, ledger = make(PAPER)
    commit(
        sweep, ledger,
        lambda point: {"baseline_accuracy": 0.5, "baseline_rule": "guess"}
        | ({"stronger_baseline_accuracy": 0.625, "stronger_baseline_rule": "trees"}
           if is_cell(point, "bit-xor") else {}),
    )  # fmt: skip
    table = build(sweep, ledger)

    rows = markdown_rows(table.to_markdown())

    xor = rows[0].index("bit-xor")
    below = {row[0]: row[xor] for row in rows[1:]}
    assert below["trivial baseline"].startswith("50.0")
    assert below["stronger baseline"].startswith("62.5")
    assert "stronger baseline: trees" in table.to_markdown()


def test_seeds_that_share_a_drawn_backbone_are_told(make: Make) -> None:
    sweep, ledger = make(PAPER.replace("steps: 50000", "steps: 50000, backbone_seed: 7"))
    table = build(sweep, ledger)

    rows = markdown_rows(table.to_markdown())
    assert rows[1][0] == "language"
    assert rows[3][0] == "random [a]"
    assert "- [a] its seeds share one drawn backbone (backbone_seed 7)" in table.to_markdown()


def test_quantised_weights_have_a_footnote(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FPT_SWEEP_CACHE", str(tmp_path / "cache"))
    write_gguf("llama", tmp_path / "own", tmp_path / "m.gguf", matrices=GGMLQuantizationType.Q8_0)
    sweep, ledger = make(
        "sweep: quantised\n"
        "trial: {steps: 2, backbone: {name: auto, weights: m.gguf}}\n"
        "axes: {pretraining: [language, random], task: [bit-xor], seed: [0, 1]}\n"
        "table: {rows: pretraining, columns: task}\n"
    )

    text = build(sweep, ledger).to_markdown()

    assert [row[0] for row in markdown_rows(text)[1:3]] == ["language [a]", "random"]
    assert "- [a] weights quantised to Q8_0, as their GGUF file has them" in text


def test_holes_and_uneven_cells(make: Make) -> None:
    text = PAPER.replace(
        "table:",
        "exclude:\n  - {pretraining: random, task: bit-memory}\n"
        "  - {pretraining: random, seed: 2}\ntable:",
    )
    sweep, ledger = make(text)
    commit(sweep, ledger, lambda point: {"test_accuracy": 0.9})

    rows = markdown_rows(build(sweep, ledger).to_markdown())

    assert rows[1] == ["language", "90.0 ± 0.0", "90.0 ± 0.0"]
    assert rows[3] == ["random", "90.0 ± 0.0 (2/2)", ""]


def filled(make: Make, *, shuffle: int = 0) -> Table:
    text = PAPER.replace("sweep: modality", "sweep: modality\ndescription: x").replace(
        "reference: T2}", 'reference: T2, title: "50 % & <b>|_x_ {all} #1 \\\\ ~"}'
    )
    sweep, ledger = make(text)
    points = list(sweep.points)
    random.Random(shuffle).shuffle(points)
    for point in points:
        ledger.commit(
            trial_row(
                point,
                test_accuracy=0.7 + 0.1 * seed(point),
                baseline_rule="a < b & c | *d*",
            )
        )
    return build(sweep, ledger)


def test_identical_ledgers_give_identical_bytes(make: Make, tmp_path: Path) -> None:
    first = filled(make)
    shutil.rmtree(tmp_path / "results")
    second = filled(make, shuffle=1)

    for form in ("to_markdown", "to_latex", "to_html", "to_csv"):
        assert getattr(first, form)() == getattr(second, form)()
    assert json.dumps(first.to_json()) == json.dumps(second.to_json())


def test_markdown_escapes_what_it_means_itself(make: Make) -> None:
    text = filled(make).to_markdown()

    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inlines = [token for token in tokens if token.type == "inline"]
    shown = ["".join(child.content for child in token.children or []) for token in inlines]
    assert shown[0] == "50 % & <b>|_x_ {all} #1 \\ ~"
    assert any(one.endswith("trivial baseline: a < b & c | *d*") for one in shown)
    assert {len(row) for row in markdown_rows(text)} == {3}


class Checker(HTMLParser):
    """Raises where an element is closed that is not open, or left open."""

    void = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.cells: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.cells.append(0)
        if tag in ("td", "th"):
            self.cells[-1] += 1
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_html_is_a_page_of_its_own(make: Make) -> None:
    page = filled(make).to_html()

    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert set(checker.cells) == {3}
    assert "50 % & <b>|_x_ {all} #1 \\ ~" in checker.text
    assert page.startswith("<!DOCTYPE html>")
    # Nothing is fetched from elsewhere.
    assert not re.search(r"(src|href|url|@import)\s*[=(\"']", page)
    assert '<tr class="reference"><th scope="row">paper, T2</th>' in page


def test_html_says_what_its_signs_mean_and_links_only_if_asked(make: Make) -> None:
    sweep, ledger = make(PAPER)
    commit(sweep, ledger, lambda p: {"test_accuracy": 1.0} if is_cell(p, "language") else None)
    table = build(sweep, ledger)

    plain, linked = typeset.fragment(table.sheet), typeset.fragment(table.sheet, linked=True)

    checker = Checker()
    checker.feed(linked)
    assert checker.open == []
    assert '<td>0/3<span class="said">, missing</span></td>' in plain
    assert '(+0.0 ≈)<span class="said">, reproduced</span></td>' in plain
    assert 'role="region" tabindex="0" aria-label="modality"' in plain
    assert "<a " not in plain
    cell = table.cells["language", "bit-xor", "test_accuracy"].points[0].cell_id
    assert f'<a href="#cell-{cell}">100.0 ± 0.0</a>' in linked


def test_csv_and_frame_have_a_line_for_each_cell(make: Make) -> None:
    table = filled(make)

    lines = list(csv.DictReader(io.StringIO(table.to_csv())))
    frame = table.to_frame()

    assert len(lines) == len(frame) == 4
    assert lines[0]["values"] == "70.0; 80.0; 90.0"
    assert float(lines[0]["mean"]) == frame["mean"][0] == 80
    assert [line["published"] for line in lines] == ["100.0", "100.0", "100.0", "75.8"]
    assert isinstance(frame, pd.DataFrame)
    trials = {trial for ids in frame["trials"] for trial in ids}
    assert len(trials) == 12


def test_json_holds_only_json(make: Make) -> None:
    table = filled(make)

    assert json.loads(json.dumps(table.to_json(), allow_nan=False)) == table.to_json()


def test_latex_has_its_rows_and_escapes(make: Make) -> None:
    text = filled(make).to_latex()

    assert r"\caption{50 \% \& \textless{}b\textgreater{}\textbar{}\_x\_ " in text
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    rows = re.findall(r"(.*) \\\\\n", body)
    assert len(rows) == 5
    assert {row.replace(r"\&", "").count("&") for row in rows} == {2}
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert r"($-$20.0)" in text


@pytest.mark.slow
def test_latex_compiles(make: Make, tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex on this machine")
    document = (
        "\\documentclass{article}\\usepackage{booktabs,xcolor}\\usepackage[T1]{fontenc}"
        f"\\begin{{document}}{filled(make).to_latex()}\\end{{document}}"
    )
    (tmp_path / "t.tex").write_text(document)

    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout[-2000:]


def test_a_terminal_of_100_columns_holds_four_tasks_and_five_rows(make: Make) -> None:
    text = """\
sweep: quick
trial: {steps: 400, backbone: {name: gpt2, size: tiny}, protocol: sound}
backbones:
  bit-memory: {task: bit-memory, seed: 0}
axes:
  pretraining: [language, statistics, random, bit-memory]
  task: [bit-xor, {name: bit-memory, strings: 3, bits: 50, patch: 10}, listops, digits]
  seed: [0, 1, 2]
table: {rows: pretraining, columns: task, reference: T2}
"""
    sweep, ledger = make(text)
    commit(sweep, ledger, lambda point: {"test_accuracy": 0.7} if seed(point) else None)
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(build(sweep, ledger).to_rich())

    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 100
    # Nothing is cut or wrapped: a row is one line, with all that Markdown says of it.
    squeezed = [re.sub(r"\s+", " ", line).strip() for line in lines]
    for row in markdown_rows(build(sweep, ledger).to_markdown())[1:]:
        assert " ".join(filter(None, row)) in squeezed


def test_a_sweep_with_no_trial_on_the_axes_prints(make: Make) -> None:
    sweep, ledger = make(PAPER)
    table = Table(sweep.name, build(sweep, ledger).spec, {}, 12)

    assert "no trial" in table.to_markdown()
    assert table.to_csv() == "row,column,metric\n"
    for form in (table.to_latex, table.to_html, table.to_json, table.to_frame, table.to_rich):
        assert form() is not None


def test_load_table_reads_file_and_ledger(make: Make, tmp_path: Path) -> None:
    sweep, ledger = make(PAPER)
    commit(sweep, ledger, lambda point: {})

    table = api.load_table(tmp_path / "sweep.yaml", tmp_path / "results")

    assert table.to_csv() == build(sweep, ledger).to_csv()


def test_tables_need_neither_torch_nor_ray() -> None:
    code = (
        "import sys, sweep.analysis.tables;"
        "print({'torch', 'ray', 'pandas', 'mlflow'} & set(sys.modules))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "set()"
