"""From a figure to its trials, and the command that trains just these again."""

from __future__ import annotations

import datetime as dt
import shlex
from functools import partial
from pathlib import Path

import pytest
from scipy import stats

from sweep.analysis.tracing import Trace, common, trace
from sweep.ledger.ledger import Ledger
from sweep.mirrors import mlflow_runs, mlflow_stores, mlflow_ui
from sweep.planning.plan import plan
from sweep.sweepfile.expansion import load
from sweep.sweepfile.schema import SweepFileError
from sweep.sweepfile.trials import Sweep
from tests.support import STARTED, failure_row, trial_row

FILE = """\
sweep: traced
trial:
  backbone: {name: gpt2, layers: 1, width: 16, heads: 2}
  batch_size: 4
  steps: 4
  evaluation: {every: 2}
backbones:
  deep: {task: bit-memory, seed: 0}
  own: {task: bit-memory, pretraining: deep, seed: 0}
axes:
  pretraining: [random, own]
  task: [bit-xor, bit-memory]
  seed: [0, 1, 2]
table: {rows: pretraining, columns: task, value: [test_accuracy, test_loss]}
"""


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.chdir(tmp_path)
    Path("traced.yaml").write_text(FILE)
    return load("traced.yaml")


@pytest.fixture
def ledger(sweep: Sweep) -> Ledger:
    """All of it trained; accuracies are 0.5, 0.625, 0.875 by seed."""
    ledger = Ledger("results", write=True)
    for point in sweep.all:
        figures = {"test_accuracy": [0.5, 0.625, 0.875][point.config.seed], "attempts": 2}
        ledger.commit(trial_row(point, host=f"host{point.config.seed}", **figures))
        ledger.put_backbone(point.trial_id, b"weights")
    return ledger


def test_a_figure_worked_out_by_hand(sweep: Sweep, ledger: Ledger) -> None:
    found = trace(sweep, ledger, "own", "bit-xor")

    labels = [f"own/bit-xor/{seed}" for seed in range(3)]
    assert [one.point.label for one in found.members] == labels
    assert [one.value for one in found.members] == [50, 62.5, 87.5]
    # The mean of 50, 62.5, 87.5; their deviation is sqrt((16.67^2 + 4.17^2 + 20.83^2) / 2).
    quantile = stats.t.ppf(0.975, 2)
    assert found.arithmetic.startswith("mean of 3 values, per cent = 66.66666667; 95 % interval ± ")
    width, *factors = found.arithmetic.split("± ")[1].split(": ")[0].split(" = ")
    assert float(width) == pytest.approx(quantile * 19.094065 / 3**0.5, rel=1e-5)
    assert factors == [f"{quantile:.4g} * 19.0941 / sqrt(3)"]


def test_what_all_share_is_told_once(sweep: Sweep, ledger: Ledger) -> None:
    record = trace(sweep, ledger, "random", "bit-memory").record()

    assert record["config"]["task.name"] == "bit-memory"
    assert [one["config"] for one in record["trials"]] == [
        {"seed": seed, "backbone_seed": seed} for seed in range(3)
    ]
    assert record["provenance"]["device_name"] == "a processor"
    assert record["provenance"]["version of python"] == "3.11"
    assert [one["provenance"] for one in record["trials"]] == [
        {"host": f"host{seed}"} for seed in range(3)
    ]


def test_records_that_are_empty_have_no_say() -> None:
    assert common([{"a": 1, "b": 1}, {}, {"a": 1, "b": 2}]) == ({"a": 1}, [{"b": 1}, {}, {"b": 2}])
    assert common([{"a": None}, {"b": None}]) == ({}, [{"a": None}, {"b": None}])
    assert common([]) == ({}, [])


def test_pretrainings_come_along_nearest_first(sweep: Sweep, ledger: Ledger) -> None:
    assert trace(sweep, ledger, "random", "bit-xor").pretrainings == ()

    found = trace(sweep, ledger, "own", "bit-xor")

    assert [one.point.label for one in found.pretrainings] == ["own", "deep"]
    assert found.spent.trials == 5
    assert found.spent.seconds == pytest.approx(5 * 1.5)


def test_what_is_not_done_is_told_with_its_reason(sweep: Sweep) -> None:
    ledger = Ledger("results")
    done, failed, missing = (p for p in sweep.points if p.label.startswith("random/bit-xor"))
    ledger.commit(trial_row(done, test_accuracy=0.5))
    later = STARTED + dt.timedelta(hours=1)
    ledger.fail(failure_row(done, attempt="a0", cause="worker"))
    ledger.fail(failure_row(done, attempt="a9", cause="doubled", exception=None, at=later))
    ledger.fail(failure_row(failed, attempt="a2", at=later, message="second"))
    ledger.fail(failure_row(failed, attempt="a1", message="first"))

    found = trace(sweep, ledger, "random", "bit-xor")

    assert [one.status for one in found.members] == ["done", "failed", "missing"]
    assert [one.value for one in found.members] == [50, None, None]
    assert "OverflowError" in found.members[1].why
    assert [row["cause"] for row in found.members[0].failures] == ["worker"]
    assert [row["message"] for row in found.members[1].failures] == ["first", "second"]
    assert found.arithmetic.endswith("one value says nothing of its spread")
    assert found.record()["trials"][2]["row"] is None
    assert missing in sweep.only(again(found, "results-again")).points
    nothing = trace(sweep, ledger, "own", "bit-xor")
    assert nothing.arithmetic == ""
    assert nothing.members[0].why.startswith("after own")


def test_one_of_several_metrics(sweep: Sweep, ledger: Ledger) -> None:
    found = trace(sweep, ledger, "random", "bit-xor", "test loss")

    assert found.cell.metric == "test_loss"
    assert [one.value for one in found.members] == [0.5, 0.5, 0.5]
    # Three equal values have no deviation to tell.
    assert found.arithmetic == "mean of 3 values = 0.5; 95 % interval ± 0"


def test_columns_that_are_metrics(sweep: Sweep, ledger: Ledger) -> None:
    Path("metrics.yaml").write_text(
        FILE.replace("columns: task, ", "").replace("[bit-xor, bit-memory]", "[bit-xor]")
    )
    found = trace(load("metrics.yaml"), ledger, "random", "test accuracy")

    assert [one.value for one in found.members] == [50, 62.5, 87.5]
    with pytest.raises(SweepFileError, match="without --metric"):
        trace(load("metrics.yaml"), ledger, "random", "test_loss", "test_loss")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (("randm", "bit-xor"), "no row 'randm'; did you mean 'random'; rows: random, own"),
        (("own", "xor"), "no column 'xor'; did you mean 'bit-xor'; columns: bit-xor, bit-memory"),
        (("own", "bit-xor", "loss"), "no metric 'loss'; .*metrics: test_accuracy, test_loss"),
        (("7", "bit-xor"), "no row '7'; rows: random, own"),
    ],
)
def test_a_place_that_is_not_there(
    place: tuple[str, ...], said: str, sweep: Sweep, ledger: Ledger
) -> None:
    with pytest.raises(SweepFileError, match=f"^traced.yaml: table: {said}$"):
        trace(sweep, ledger, *place)


def test_no_table_and_no_trial(sweep: Sweep, ledger: Ledger) -> None:
    Path("none.yaml").write_text(FILE[: FILE.index("table:")])
    with pytest.raises(SweepFileError, match="table: missing"):
        trace(load("none.yaml"), ledger, "random", "bit-xor")
    Path("left.yaml").write_text(FILE + "exclude: [{pretraining: own, task: bit-xor}]\n")
    with pytest.raises(SweepFileError, match="the sweep leaves out own / bit-xor"):
        trace(load("left.yaml"), ledger, "own", "bit-xor")


def again(found: Trace, folder: str) -> list[str]:
    """The patterns of the command, after a look at the rest of it."""
    command, *arguments = shlex.split(found.again)[1:]
    assert (command, arguments[0], arguments[-2:]) == ("run", "traced.yaml", ["--results", folder])
    assert set(arguments[1:-2:2]) == {"--only"}
    compare = shlex.split(found.compare)
    assert compare[1:5] == ["diff", "results", folder, "traced.yaml"]
    assert compare[5:] == arguments[1:-2]
    return arguments[2:-2:2]


def test_the_command_trains_these_anew_and_what_they_need(sweep: Sweep, ledger: Ledger) -> None:
    found = trace(sweep, ledger, "own", "bit-xor")

    patterns = again(found, "results-again")
    planned = plan("traced.yaml", "results-again", only=patterns)

    assert patterns == ["own/bit-xor/*"]
    # A run of it is a run of the plan's sweep.
    labels = [point.label for pack in planned.packs for point in pack.points]
    assert labels == ["deep", "own", *(f"own/bit-xor/{seed}" for seed in range(3))]
    assert [point.label for point in planned.sweep.all] == labels
    # In the same ledger nothing of it would run.
    assert plan("traced.yaml", ledger, only=patterns).packs == ()
    Path("results-again").mkdir()
    assert again(trace(sweep, ledger, "own", "bit-xor"), "results-again2")


def test_the_command_means_these_trials_and_no_others(sweep: Sweep, ledger: Ledger) -> None:
    # A glob over this cell's labels would mean those of the other task, too.
    text = FILE.replace("[bit-xor, bit-memory]", "[bit-xor, {label: bit-xor/x, task: bit-memory}]")
    Path("traced.yaml").write_text(text)
    sweep = load("traced.yaml")
    found = trace(sweep, ledger, "random", "bit-xor")
    ids = [one.point.trial_id for one in found.members]
    assert {point.trial_id for point in sweep.only(again(found, "results-again")).points} == set(
        ids
    )


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["random/bit-xor/*"], 3),
        (["random/*", "*/bit-xor/0"], 6 + 1 + 2),  # own/bit-xor/0 needs two pretrainings
        (["own"], 2),
        ([], 14),
    ],
)
def test_a_part_of_a_sweep(patterns: list[str], expected: int, sweep: Sweep) -> None:
    part = sweep.only(patterns)

    assert len(part.all) == expected
    assert [point for point in sweep.all if point in part.all] == list(part.all)
    assert part.only([part.all[0].trial_id[:6]]).all == part.all[:1]


def test_a_pattern_that_matches_nothing(sweep: Sweep) -> None:
    with pytest.raises(SweepFileError, match="no trial matches 'nope'; labels look like 'deep'"):
        sweep.only(["random/*", "nope"])


@pytest.mark.slow
def test_runs_of_mlflow_are_found_without_it(
    sweep: Sweep, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = sweep.only(["random/bit-xor/*"])
    mlflow_runs.catch_up(part, ledger)
    # Another sweep may have the same trials.
    other = sweep.file.with_name("other.yaml")
    other.write_text(sweep.file.read_text().replace(f"sweep: {sweep.name}", "sweep: other"))
    mlflow_runs.catch_up(load(other), ledger)

    runs_of = partial(mlflow_ui.runs_of, ledger, sweep.name)
    found = trace(sweep, ledger, "random", "bit-xor", runs_of=runs_of)

    import mlflow

    client = mlflow.MlflowClient(mlflow_stores.tracking_uri(ledger))
    for one in found.members:
        assert one.run is not None
        path, _, kind = one.run.partition("?")
        assert kind == "workflowType=machine_learning"
        _, experiment, _, run = path.split("/")
        read = client.get_run(run)
        assert read.info.experiment_id == experiment
        assert read.data.tags[mlflow_stores.TRIAL] == one.point.trial_id
        assert read.data.tags[mlflow_stores.SWEEP] == sweep.name
    # What is none of MLflow's is as good as none.
    (Path("results") / "mlflow.db").write_bytes(b"no database")
    found = trace(sweep, ledger, "random", "bit-xor", runs_of=runs_of)
    assert found.members[0].run is None
