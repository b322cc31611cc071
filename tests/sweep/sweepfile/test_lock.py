from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fpt import hub
from fpt.published import differences, references
from sweep.execution import driver
from sweep.ledger.ledger import Ledger
from sweep.planning.plan import plan
from sweep.sweepfile import lock
from sweep.sweepfile.expansion import load
from sweep.sweepfile.lock import Entry, Lock, LockedFile, LockError, Source
from sweep.sweepfile.schema import SweepFileError

COMMIT, OTHER = "a1" * 20, "b2" * 20
FILES = {"model.safetensors": LockedFile(size=3, sha256="0" * 64)}

TEXT = """\
sweep: demo
trial:
  backbone: {name: gpt2, layers: 1, width: 16, heads: 2, weights: "hub:some/model"}
  steps: 2
axes:
  pretraining: [language, random]
  task: [{name: bit-xor, bits: 2}]
  seed: [0, 1]
"""
HOMOLOGY = """\
sweep: demo
trial:
  task: remote-homology
  backbone: {name: gpt2, layers: 1, width: 16, heads: 2}
  pretraining: random
  steps: 2
  seed: 0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(TEXT)
    return path


def locked(file: Path, **kinds: dict[str, str]) -> Lock:
    """Write a lock: models or datasets, key -> commit."""
    entries = {
        kind: {key: Entry(revision=commit, files=FILES) for key, commit in keys.items()}
        for kind, keys in kinds.items()
    }
    out = Lock.model_validate(entries)
    lock.write(file, out)
    return out


# --- the file


def test_what_is_written_is_what_is_read(file: Path) -> None:
    written = locked(file, models={"b/b": COMMIT, "a/a@main": OTHER}, datasets={"c/c": COMMIT})

    assert lock.read(file) == written
    assert (file.parent / "demo.lock").is_file()


def test_the_same_content_has_the_same_bytes(file: Path) -> None:
    locked(file, models={"b/b": COMMIT, "a/a": OTHER})
    first = lock.lock_file(file).read_bytes()
    one, other = (Entry(revision=r, files=FILES) for r in (COMMIT, OTHER))

    assert not lock.write(file, Lock(models={"a/a": other, "b/b": one}))
    assert lock.lock_file(file).read_bytes() == first
    assert json.loads(first)["format"] == 1
    assert first.endswith(b"}\n")


def test_without_a_lock_nothing_is_locked(file: Path) -> None:
    assert lock.read(file) == Lock()


ENTRY: dict[str, Any] = {"revision": COMMIT, "files": {}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not a lock file"),
        ("<<<<<<< ours\n{}\n", "not a lock file"),
        ("[]", "valid dictionary"),
        (json.dumps({"format": 2}), "of format 2, which this version does not know"),
        (json.dumps({"modles": {}}), "modles: Extra inputs"),
        (json.dumps({"models": {"a/a": {"files": {}}}}), "models: a/a: revision: Field required"),
        (
            json.dumps({"models": {"a/a": ENTRY | {"revision": "main"}}}),
            "models: a/a: revision: String should match",
        ),
        (
            json.dumps({"models": {f"a/a@{OTHER}": ENTRY}}),
            f"a/a@{OTHER} is said to be of another revision, {COMMIT}",
        ),
        (
            json.dumps({"models": {"a/a": ENTRY | {"files": {"x": {"size": -1, "sha256": ""}}}}}),
            "models: a/a: files: x: size",
        ),
    ],
)
def test_a_lock_that_cannot_be_used_is_told_with_its_path(
    text: str, problem: str, file: Path
) -> None:
    path = lock.lock_file(file)
    path.write_text(text)

    with pytest.raises(LockError) as caught:
        lock.read(file)
    with pytest.raises(SweepFileError) as loaded:
        load(file)

    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)
    assert f"`sweep fetch --update {file}`" in str(caught.value)
    assert loaded.value.problems == (f"{file}: {caught.value}",)
    assert len(load(file, locked=False).points) == 4


def test_a_wrong_lock_and_a_wrong_sweep_file_are_told_together(file: Path) -> None:
    lock.lock_file(file).write_text("no")
    file.write_text(TEXT.replace("steps: 2", "steps: 2\n  dropout: 2"))

    with pytest.raises(SweepFileError) as caught:
        load(file)

    assert len(caught.value.problems) == 2


# --- what it does to trials


def test_the_commit_is_in_the_config_and_so_in_the_id(file: Path) -> None:
    before = load(file)
    locked(file, models={"some/model": COMMIT})

    after = load(file)

    weights = f"hub:some/model@{COMMIT}"
    assert [p.config.identity()["backbone"]["weights"] for p in after.points] == [
        *[weights] * 2,
        *[None] * 2,
    ]
    assert after.points[0].config.backbone.weights == weights
    # To random trials it makes no difference; to pretrained ones it does.
    same = [a.trial_id == b.trial_id for a, b in zip(after.points, before.points, strict=True)]
    assert same == [False, False, True, True]
    assert after.points[0].cell_id == after.points[1].cell_id != before.points[0].cell_id


def test_it_is_as_if_the_commit_had_been_written_out(file: Path, tmp_path: Path) -> None:
    written_out = tmp_path / "other.yaml"
    written_out.write_text(TEXT.replace("some/model", f"some/model@{COMMIT}"))
    locked(file, models={"some/model": COMMIT})

    ids = [[point.trial_id for point in load(one).points] for one in (file, written_out)]

    assert ids[0] == ids[1]


@pytest.mark.parametrize("revision", ["", "main", "v1.0"])
def test_a_branch_is_locked_by_its_own_name(revision: str, file: Path) -> None:
    key = "some/model" + (f"@{revision}" if revision else "")
    file.write_text(TEXT.replace("some/model", key))
    locked(file, models={key: COMMIT, "some/model@other": OTHER})

    assert load(file).points[0].config.backbone.weights == f"hub:some/model@{COMMIT}"


def test_what_the_file_pins_stays_as_it_is(file: Path) -> None:
    file.write_text(TEXT.replace("some/model", f"some/model@{OTHER}"))
    locked(file, models={"some/model": COMMIT, f"some/model@{OTHER}": OTHER})

    assert load(file).points[0].config.backbone.weights == f"hub:some/model@{OTHER}"


def test_weights_that_the_file_does_not_name_are_locked_too(file: Path) -> None:
    file.write_text("sweep: demo\ntrial: {task: bit-xor, steps: 2, seed: 0}\n")
    locked(file, models={"openai-community/gpt2": COMMIT})

    weights = load(file).points[0].config.backbone.weights
    assert weights == f"hub:openai-community/gpt2@{COMMIT}"


def test_a_commit_does_not_make_a_trial_another_than_the_published_ones(file: Path) -> None:
    file.write_text("sweep: demo\ntrial: {task: bit-xor, steps: 2, seed: 0}\n")
    locked(file, models={"openai-community/gpt2": COMMIT})
    (point,) = load(file).points

    found = differences(references()["T2"].figures["language", "bit-xor"], point.config)

    assert not [one for one in found if "weights" in one]


def test_a_pretraining_is_locked_before_what_takes_it_over(file: Path) -> None:
    file.write_text(
        TEXT.replace("[language, random]", "[own]")
        + "backbones: {own: {task: bit-xor, pretraining: language, seed: 0}}\n"
    )
    locked(file, models={"some/model": COMMIT})

    sweep = load(file)

    assert sweep.pretrainings[0].config.backbone.weights == f"hub:some/model@{COMMIT}"
    assert {point.parent for point in sweep.points} == {sweep.pretrainings[0].trial_id}


def test_a_task_gets_its_revision(file: Path) -> None:
    file.write_text(HOMOLOGY)
    locked(file, datasets={"proteinea/remote_homology@main": COMMIT})

    config = load(file).points[0].config

    assert config.identity()["task"]["revision"] == COMMIT
    assert lock.sources(config) == {
        Source("dataset", "proteinea/remote_homology", COMMIT): (
            "train.csv", "valid.csv", "test_fold_holdout.csv"
        )
    }  # fmt: skip
    assert config.task.splits.__name__ == "splits"  # still a task


def test_a_model_and_a_data_set_may_share_a_name(file: Path) -> None:
    locked(file, datasets={"some/model": COMMIT})

    assert load(file).points[0].config.backbone.weights == "hub:some/model"


# --- what is not pinned


def test_plan_says_what_is_not_pinned(file: Path, tmp_path: Path) -> None:
    unpinned = plan(file, tmp_path / "results")
    locked(file, models={"some/model": COMMIT})
    pinned = plan(file, tmp_path / "results")

    assert unpinned.unpinned == ("hub:some/model",)
    assert unpinned.to_json()["unpinned"] == ["hub:some/model"]
    assert pinned.unpinned == ()


def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_a_run_does_not_start_on_what_may_move(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch)
    with pytest.raises(SweepFileError) as caught:
        driver.run(file, results=tmp_path / "results")

    (problem,) = caught.value.problems
    assert problem.startswith(f"{file}: no commit is pinned of hub:some/model, ")
    assert f"`sweep fetch {file}`" in problem
    assert str(lock.lock_file(file)) in problem
    assert not Ledger(tmp_path / "results").failures().num_rows


def test_what_this_machine_cannot_have_does_not_stop_a_run(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    configs = [point.config for point in load(file).points]

    assert [str(one) for one in lock.unpinned(configs)] == ["hub:some/model"]
    assert lock.unpinned(configs, to_be_had=True) == ()

    snapshot = tmp_path / "cache" / "models--some--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"...")
    assert lock.unpinned(configs, to_be_had=True) == ()  # of an unknown branch
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    assert [str(one) for one in lock.unpinned(configs, to_be_had=True)] == ["hub:some/model"]


def test_local_weights_and_random_ones_are_no_sources(file: Path) -> None:
    file.write_text(TEXT.replace("[language, random]", "[random]"))
    assert lock.unpinned(point.config for point in load(file).points) == ()


@pytest.mark.parametrize(
    ("revision", "fixed"),
    [(None, False), ("main", False), (COMMIT, True), (COMMIT[:12], False), (COMMIT.upper(), False)],
)
def test_only_a_whole_commit_is_fixed(revision: str | None, fixed: bool) -> None:
    assert hub.is_fixed(revision) is fixed


def test_reading_a_lock_needs_neither_torch_nor_a_network(file: Path) -> None:
    locked(file, models={"some/model": COMMIT})
    code = (
        "import sys; from sweep.sweepfile.expansion import load; load(sys.argv[1]);"
        "print({'torch', 'ray', 'huggingface_hub', 'httpx2', 'datasets'} & sys.modules.keys())"
    )

    ran = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )

    assert ran.stdout.strip() == "set()"
