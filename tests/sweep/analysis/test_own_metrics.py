"""Metrics that a task declares, from the sweep file to tables, claims, tuning, figures, queries."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sweep as api
from sweep.analysis import claims, figures, report
from sweep.analysis.figures import tuned
from sweep.analysis.tables import build
from sweep.ledger.ledger import Ledger
from sweep.mirrors.mlflow_runs import _metrics
from sweep.planning import tuning
from sweep.planning.plan import plan
from sweep.sweepfile.expansion import load
from sweep.sweepfile.schema import SweepFileError
from sweep.sweepfile.trials import Point, Sweep
from tests.support import trial_row

TASKS = """\
import fpt
from fpt import metrics

class Ahead(fpt.Task):
    sigma: float = 0.1
    def shape(self, protocol):
        return fpt.Shape(tokens=4, inputs=1, embedded=False, loss="mse")
    def metrics(self, protocol):
        own = fpt.Metric("height", lambda outputs, targets: 0.0, better="lower", unit="mm")
        return (metrics.R2, own)

class Words(Ahead):
    def shape(self, protocol):
        return fpt.Shape(tokens=4, inputs=1, embedded=False, classes=3)
    def metrics(self, protocol):
        return (metrics.F1,)

class Feet(Words):
    def metrics(self, protocol):
        return (fpt.Metric("height", lambda outputs, targets: 0.0, better="lower", unit="ft"),)
"""

HEAD = """\
sweep: demo
trial: {steps: 100, pretraining: random, backbone: {name: gpt2, layers: 1, width: 8, heads: 2}}
axes: {train: [fpt, output], task: ["numbers_:Ahead"], seed: [0, 1, 2, 3, 4]}
"""

Make = Callable[[str], tuple[Sweep, Ledger]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(text: str) -> tuple[Sweep, Ledger]:
        (tmp_path / "numbers_.py").write_text(TASKS)
        file = tmp_path / "sweep.yaml"
        file.write_text(text)
        return load(file), Ledger(tmp_path / "results")

    return make


def problems(make: Make, text: str) -> list[str]:
    with pytest.raises(SweepFileError) as told:
        make(HEAD + text)
    return [one.rpartition("sweep.yaml:")[2] for one in told.value.problems]


NO_ACCURACY = {
    f"{split}_accuracy": None for split in ("train", "validation", "test", "training_set")
} | {"baseline_accuracy": None}


def row(point: Point, **figures: float | None) -> dict[str, Any]:
    given = figures | {"baseline_r2": 0.0, "baseline_loss": 4.0}
    return trial_row(
        point, **NO_ACCURACY, metrics=json.dumps(given), own_code=json.dumps(point.like.own_code)
    )


def fill(sweep: Sweep, ledger: Ledger) -> None:
    for point in sweep.points:
        seed = point.config.seed
        better = "norm" in point.config.train
        r2 = (0.8 if better else 0.5) + seed / 100
        ledger.commit(row(point, test_r2=r2, validation_r2=r2 - 0.1, test_height=12.5 + seed))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("table: {rows: train, value: [test_acuracy, test_r2]}",
         "4: table.value[0]: 'test_acuracy' is not known; did you mean 'test_r2'; allowed: test_l"),
        ("table: {rows: train, value: [test_r3]}",
         "4: table.value[0]: 'test_r3' is not known; did you mean 'test_r2'"),
        ("table: {rows: train, columns: task}",
         "4: table.value: test_accuracy is of classes, and the task's predictions are numbers"),
        ("table: {rows: train, value: [train_r2]}",
         "4: table.value[0]: 'train_r2' is not known; did you mean 'train_loss'"),
        ("table: {rows: train, value: [steps_to_convergence]}",
         "4: table.value[0]: steps_to_convergence is of classes"),
        ("claims: [{that: fpt > output, axis: train}]",
         "4: claims[0].on: test_accuracy is of classes"),
        ("claims: [{that: fpt > output, axis: train, on: test_f1}]",
         "4: claims[0].on: 'test_f1' is not known"),
        ("tune: {learning_rate: {log: [1e-4, 1e-2], points: 2}}",
         "4: tune.by: validation_accuracy is of classes"),
        ("tune: {learning_rate: {log: [1e-4, 1e-2], points: 2}, by: validation_r3}",
         "4: tune.by: 'validation_r3' is not known; did you mean 'validation_r2'; allowed: valid"),
        ("tune: {learning_rate: {log: [1e-4, 1e-2], points: 2}, by: test_r2}",
         "4: tune.by: 'test_r2' would choose by the test set"),
        ("tune: {learning_rate: {log: [1e-4, 1e-2], points: 2}, by: r2}",
         "4: tune.by: 'r2' is not known; allowed: validation_accuracy, validation_loss"),
    ],
)  # fmt: skip
def test_a_metric_that_no_trial_has_is_refused_at_its_line(
    make: Make, text: str, told: str
) -> None:
    found = problems(make, text + "\n")

    assert any(one.startswith(told) for one in found), found


def test_two_tasks_may_not_mean_two_things_by_one_metric(make: Make) -> None:
    with pytest.raises(SweepFileError, match="metric height: numbers_:Ahead and numbers_:Feet dif"):
        make(HEAD.replace('"numbers_:Ahead"', '"numbers_:Ahead", "numbers_:Feet"'))


def test_a_table_has_the_metrics_with_their_units_and_the_baseline(make: Make) -> None:
    sweep, ledger = make(HEAD + "table: {rows: train, value: [test_r2, test_height]}\n")
    fill(sweep, ledger)

    table = build(sweep, ledger)

    text = table.to_markdown()
    # Means over seeds 0 to 4: 0.82 and 14.5; half-width 2.776 x deviation / sqrt(5).
    assert "0.820 ± 0.020" in text
    assert "0.520 ± 0.020" in text
    assert "14.5 ± 2.0" in text
    assert "test height, mm" in text
    cell = table.cells["fpt", "", "test_height"]
    assert (cell.unit, cell.record()["unit"]) == ("mm", "mm")
    assert table.cells["fpt", "", "test_r2"].record()["baseline"] == 0.0
    assert "trivial baseline" in text


def test_a_claim_is_judged_on_a_metric(make: Make) -> None:
    sweep, ledger = make(
        HEAD
        + "claims: [{that: fpt > output, axis: train, on: test_r2},"
        + " {that: fpt < output, axis: train, on: test_height}]\n"
    )
    fill(sweep, ledger)

    first, second = claims.show(sweep, ledger).contrasts

    assert first.difference == pytest.approx(0.3)
    assert first.verdict == "supported"
    assert (first.unit, second.unit) == ("", "mm")
    assert second.difference == 0


def test_a_diverged_trial_counts_as_the_worst_figure(make: Make) -> None:
    claim = "claims: [{that: fpt > output, axis: train, on: test_NAME}]\n"
    for name, worst in (("r2", 0.5), ("height", 15.0)):
        sweep, ledger = make(HEAD + claim.replace("NAME", name))
        for point in sweep.points[1:]:
            better = "norm" in point.config.train
            values = {"test_r2": 0.8 if better else 0.5, "test_height": 12.0 if better else 15.0}
            ledger.commit(row(point, **values))
        diverged = sweep.points[0]
        ledger.commit(row(diverged) | {"outcome": "diverged", "stopped": "diverged"})

        (contrast,) = claims.show(sweep, ledger).contrasts

        other = {"r2": 0.5, "height": 15.0}[name]
        usual = {"r2": 0.8, "height": 12.0}[name]
        assert contrast.difference == pytest.approx((worst + 4 * usual) / 5 - other)
        assert any("counted as the worst figure" in note for note in contrast.notes)


@pytest.mark.parametrize(("metric", "chosen"), [("validation_r2", 1), ("validation_height", 0)])
def test_tuning_knows_which_figure_is_better(make: Make, metric: str, chosen: int) -> None:
    sweep, ledger = make(
        HEAD + f"tune: {{learning_rate: {{values: [0.001, 0.01]}}, by: {metric}}}\n"
    )
    for point in sweep.tunings:
        large = float(point.config.learning_rate > 0.005)
        ledger.commit(row(point, validation_r2=0.5 + large / 10, validation_height=5 + large))

    states = tuning.states(sweep, ledger)

    assert {state.chosen for state in states} == {[0.001, 0.01][chosen]}


def test_queries_and_frames_have_a_column_a_metric(make: Make) -> None:
    sweep, ledger = make(HEAD)
    fill(sweep, ledger)
    name = sweep.points[0].trial_id
    ledger.append_curve(
        name,
        "a1",
        0,
        [{"step": 10, "split": "validation", "loss": 1.0, "metrics": '{"r2":0.25,"height":null}'}],
    )

    sql = "SELECT avg(test_r2) AS mean, max(baseline_r2) AS least FROM trials"
    found = api.query(sql, ledger.uri)
    frame = api.load_trials(ledger.uri)
    curves = api.load_curves(ledger.uri)

    assert found.iloc[0].to_dict() == {"mean": pytest.approx(0.67), "least": 0.0}
    assert frame["test_r2"].mean() == pytest.approx(0.67)
    assert frame["test_height"].tolist().count(12.5) == 2
    assert (curves["r2"].tolist(), curves["height"].isna().all()) == ([0.25], True)
    assert api.query("SELECT r2 FROM curves", ledger.uri)["r2"].tolist() == [0.25]


def test_figures_draw_the_metric_of_the_table_else_the_first(make: Make) -> None:
    names = {
        "table: {rows: train, value: [test_height]}\n": "height",
        "table: {rows: train, value: [test_loss]}\n": "r2",
        "": "r2",
    }
    for text, name in names.items():
        sweep, ledger = make(HEAD + text)
        assert figures.gather(sweep, ledger).measure.name == name
    classes = HEAD.replace("Ahead", "Words")
    for text, name in {"": "accuracy", "table: {rows: train, value: [test_f1]}\n": "f1"}.items():
        sweep, ledger = make(classes + text)
        assert figures.gather(sweep, ledger).measure.name == name


@pytest.mark.parametrize(
    ("tasks", "heading"),
    [
        ('"numbers_:Ahead"', "test loss"),
        ("bit-xor", "test accuracy, %"),
        ('"numbers_:Ahead", bit-xor', "test accuracy, % or test loss"),
    ],
)
def test_the_report_heads_figures_of_numbers_as_losses(
    make: Make, tasks: str, heading: str
) -> None:
    sweep, ledger = make(HEAD.replace('"numbers_:Ahead"', tasks))
    for point in sweep.points:
        ledger.commit(trial_row(point) if point.config.task.name == "bit-xor" else row(point))

    page = report.render(sweep, ledger)

    heads = re.findall(r'<th scope="col" class="number">(test [^<]*)</th>', page)
    assert heads == [heading]


def test_points_tried_are_whole_numbers(make: Make) -> None:
    values = "{learning_rate: {values: [0.001, 0.01]}, by: validation_r2}"
    sweep, ledger = make(HEAD + f"tune: {values}\n")
    for point in sweep.tunings:
        ledger.commit(row(point, validation_r2=point.config.learning_rate))

    drawn = tuned.budget(figures.gather(sweep, ledger))

    ticks = drawn.figure.axes[0].get_xticks()
    assert all(float(tick).is_integer() for tick in ticks)
    assert {1.0, 2.0} <= set(ticks)


def test_mlflow_has_each_metric_and_its_curve(make: Make) -> None:
    sweep, ledger = make(HEAD)
    fill(sweep, ledger)
    (one,) = ledger.trials([sweep.points[0].trial_id]).to_pylist()
    curve = {"step": 10, "split": "validation", "loss": 1.0, "accuracy": None, "seconds": 1.0}

    logged = {m.key: m.value for m in _metrics(one, [curve | {"metrics": '{"r2":0.25}'}])}

    assert logged["test_r2"] == pytest.approx(0.8)
    assert logged["validation/r2"] == 0.25
    assert "test_accuracy" not in logged


def test_a_row_of_other_code_is_stale_and_not_missing(make: Make) -> None:
    sweep, ledger = make(HEAD + "table: {rows: train, value: [test_r2, test_height]}\n")
    for point in sweep.points:
        given = row(point, test_r2=0.5, test_height=1.0)
        ledger.commit(given | {"own_code": '{"numbers_.py": "0"}'})

    table = build(sweep, ledger)

    assert {cell.state for cell in table.cells.values()} == {"stale"}
    assert "5 of 5 stale: trained with another numbers_.py; `sweep run --stale` trains it" in (
        table.to_markdown().replace("\\", "")
    )
    assert set(plan(sweep, ledger).status.values()) == {"stale"}
