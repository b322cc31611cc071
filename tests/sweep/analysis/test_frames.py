"""Frames: flat, typed columns, the same whatever the rows hold, and the labels of a sweep."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import sweep
from sweep.analysis.frames import load_curves, load_failures, load_trials
from sweep.ledger.columns import CATEGORIES
from sweep.ledger.ledger import CURVES, FAILURES, TRIALS, Ledger, LedgerError
from sweep.sweepfile.expansion import load
from sweep.sweepfile.trials import Point, Sweep
from tests.support import STARTED, failure_row, trial_row

TEXT = """\
sweep: frames
trial:
  backbone: {name: gpt2, layers: 1, width: 8, heads: 1}
  steps: 10
backbones:
  bits: {task: bit-xor, seed: 7}
axes:
  pretraining: [random, bits]
  task: [bit-xor, {label: long, task: {name: bit-xor, bits: 20}}]
  seed: [1, 0]
"""


@pytest.fixture
def expanded(tmp_path: Path) -> Sweep:
    file = tmp_path / "frames.yaml"
    file.write_text(TEXT)
    return load(file)


def types(frame: pd.DataFrame) -> dict[str, str]:
    return {str(name): str(kind) for name, kind in frame.dtypes.items()}


EXPECTED = {
    "trial_id": "str",
    "task": "category",
    "layers": "Int32",
    "best_step": "Int64",
    "test_accuracy": "float64",
    "git_dirty": "boolean",
    "git_commit": "category",
    "config": "str",
    "finished_at": "datetime64[us, UTC]",
}


def begun(folder: Path) -> Path:
    """A ledger in which a trial has begun, and none has ended."""
    Ledger(folder / "results").save_state("0" * 12, b"", step=1, attempt="a1")
    return folder / "results"


def test_columns_have_one_type_each_whatever_the_rows_hold(tmp_path: Path, expanded: Sweep) -> None:
    results = begun(tmp_path)
    none = load_trials(results)
    point = expanded.points[0]
    bare = dict.fromkeys(TRIALS.schema.names)
    ledger = Ledger(results)
    ledger.commit(bare | {"trial_id": point.trial_id, "cell_id": point.cell_id})
    missing = load_trials(results)
    ledger.commit(trial_row(expanded.points[1], git_dirty=True))
    both = load_trials(results)

    for frame in (none, missing, both):
        assert list(frame.columns) == TRIALS.schema.names
        assert types(frame) == types(both)
    assert EXPECTED.items() <= types(both).items()
    assert [len(frame) for frame in (none, missing, both)] == [0, 1, 2]
    assert both["finished_at"].max() == STARTED + pd.Timedelta(seconds=2)
    assert both["seed"].sum() == expanded.points[1].config.seed
    assert types(load_curves(results))["step"] == "Int64"
    assert list(load_curves(results).columns) == CURVES.schema.names


def test_categories_name_columns_that_there_are() -> None:
    assert set(CATEGORIES) <= {*TRIALS.schema.names, *CURVES.schema.names} | {
        *FAILURES.schema.names
    }


def test_a_sweep_has_its_trials_in_its_order_with_its_labels(
    tmp_path: Path, expanded: Sweep
) -> None:
    results = tmp_path / "results"
    ledger = Ledger(results)
    stranger = trial_row(expanded.points[0], trial_id="0" * 12)
    skipped = expanded.points[3].trial_id
    for row in (stranger, *map(trial_row, reversed(expanded.all))):
        if row["trial_id"] != skipped:
            ledger.commit(row)
            ledger.append_curve(row["trial_id"], "a1", 0, [{"step": 0, "split": "train"}])

    for given in (expanded, expanded.file, str(expanded.file)):
        frame = load_trials(results, given)

        assert list(frame["trial_id"]) == [
            point.trial_id for point in expanded.all if point.trial_id != skipped
        ]
        axes = [name for name in frame.columns if name.startswith("axis.")]
        assert axes == ["axis.pretraining", "axis.task", "axis.seed"]
        assert list(frame["axis.task"].cat.categories) == ["bit-xor", "long"]
        assert list(frame["axis.seed"].cat.categories) == ["1", "0"]
        labels = frame.set_index("trial_id")[axes].rename(columns=lambda name: name[5:])
        for point in expanded.points:
            if point.trial_id != skipped:
                assert labels.loc[point.trial_id].to_dict() == point.labels
        assert labels.loc[expanded.pretrainings[0].trial_id].isna().all()

    curves = load_curves(results, expanded.file)
    assert set(curves["trial_id"]) == set(frame["trial_id"])
    by_label = curves.groupby("axis.pretraining", observed=True).size()
    assert by_label.to_dict() == {"random": 4 - 1, "bits": 4}
    assert len(load_trials(results)) == len(frame) + 1


def test_a_sweep_without_results_has_empty_frames(tmp_path: Path, expanded: Sweep) -> None:
    results = begun(tmp_path)
    frame = load_trials(results, expanded)

    assert len(frame) == 0
    assert list(frame["axis.task"].cat.categories) == ["bit-xor", "long"]
    assert len(load_curves(results, expanded)) == 0


def test_a_mistake_in_the_sweep_file_is_told(tmp_path: Path) -> None:
    from sweep.sweepfile.schema import SweepFileError

    (tmp_path / "wrong.yaml").write_text("sweep: x\n")

    with pytest.raises(SweepFileError, match=r"wrong\.yaml"):
        load_trials(begun(tmp_path), tmp_path / "wrong.yaml")


def test_the_package_offers_them() -> None:
    assert sweep.load_trials is load_trials
    assert sweep.load_curves is load_curves


def test_failures_are_a_frame_that_joins_with_the_trials(tmp_path: Path) -> None:
    file = tmp_path / "frames.yaml"
    file.write_text(TEXT)
    expanded, ledger = load(file), Ledger(tmp_path / "results")
    first, second = expanded.points[:2]
    ledger.fail(failure_row(first, attempt="a1", cause="memory", exception="MemoryError"))
    ledger.fail(failure_row(first, attempt="a2", cause="retried", exception=None))
    ledger.fail(failure_row(second, trial_id="0" * 12))
    ledger.commit(trial_row(first))

    every = sweep.load_failures(ledger.uri)
    own = load_failures(ledger.uri, sweep=file)

    assert sorted(every["cause"]) == ["code", "memory"]
    assert own["cause"].tolist() == ["memory"]
    assert own["axis.task"].tolist() == [first.labels["task"]]
    joined = load_trials(ledger.uri).merge(own, on="trial_id", suffixes=("", "_failed"))
    assert joined["exception"].tolist() == ["MemoryError"]


@pytest.mark.parametrize("load_", [load_trials, load_curves, load_failures])
def test_a_mistyped_ledger_is_no_empty_one(load_: object, tmp_path: Path) -> None:
    Ledger(tmp_path / "results").commit(trial_row(_first(tmp_path)))
    with pytest.raises(LedgerError, match="nonexistent: no ledger: nothing was trained here; name"):
        load_(tmp_path / "nonexistent")  # type: ignore[operator]
    with pytest.raises(LedgerError, match=r"did you mean .*/results\?"):
        load_(tmp_path)  # type: ignore[operator]
    assert not (tmp_path / "nonexistent").exists()


def _first(folder: Path) -> Point:
    file = folder / "frames.yaml"
    file.write_text(TEXT)
    return load(file).points[0]
