from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fpt.backbones import conversion, weights
from fpt.backbones.sources import SHIPPED
from fpt.files import DataError
from fpt.hub import HubData
from fpt.tasks.images import Mnist
from sweep import cli
from sweep.execution import worker
from sweep.ledger.ledger import Ledger
from sweep.sweepfile import fetching, lock
from sweep.sweepfile.expansion import load
from tests.hub import FakeHub, Files, serving
from tests.support import job

CONFIG = json.dumps({"n_layer": 1, "n_embd": 16, "n_head": 2}).encode()
WEIGHTS = bytes(range(256)) * 40
MODEL: Files = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "README.md": b"# a model"}
TEXT = """\
sweep: demo
trial:
  backbone: {name: gpt2, layers: 1, width: 16, heads: 2, weights: "hub:some/model"}
  task: {name: bit-xor, bits: 2}
  steps: 2
axes: {seed: [0, 1]}
"""
PROTEINS: Files = {
    "train.csv": b"primary,fold_label\nACD,0\nCDE,1\n",
    "valid.csv": b"primary,fold_label\nACD,0\n",
    "test_fold_holdout.csv": b"primary,fold_label\nEFG,1\n",
    "README.md": b"# proteins",
    "other.csv": b"not,wanted\n",
}
HOMOLOGY = """\
sweep: proteins
trial:
  backbone: {name: gpt2, layers: 1, width: 16, heads: 2}
  task: {name: remote-homology, subset: true, tokens: 16}
  pretraining: random
  steps: 2
  seed: 0
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def cache(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process's cache, empty; the Hub that it asks is the fake one."""
    from huggingface_hub import constants

    folder = tmp_path / "cache"
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("FPT_SWEEP_CACHE", str(tmp_path / "own"))
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(TEXT)
    return path


Fetch = Callable[..., tuple[fetching.Summary, str]]


@pytest.fixture
def fetch(cache: Path) -> Fetch:
    """Fetch, and what was said of it."""

    def run(*files: Path, update: bool = False) -> tuple[fetching.Summary, str]:
        said = io.StringIO()
        console = Console(file=said, width=200)
        return fetching.fetch(files, update=update, console=console), said.getvalue()

    return run


@pytest.fixture
def no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def cut() -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    return cut


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def snapshot(cache: Path, repository: str, commit: str) -> Path:
    return cache / repository.replace("/", "--") / "snapshots" / commit


# --- models


def test_a_model_is_fetched_and_locked(hub: FakeHub, cache: Path, file: Path, fetch: Fetch) -> None:
    commit = hub.put("some/model", MODEL)

    summary, said = fetch(file)

    assert (summary.exit_code, summary.good, summary.bad) == (0, 1, 0)
    assert summary.size == summary.downloaded == len(CONFIG) + len(WEIGHTS)
    assert f"hub:some/model: commit {commit}, 2 files" in said
    assert "checked against the Hub" in said
    written = json.loads((file.parent / "demo.lock").read_text())
    assert written == {
        "format": 1,
        "datasets": {},
        "models": {
            "some/model": {
                "revision": commit,
                "files": {
                    "config.json": {"size": len(CONFIG), "sha256": sha256(CONFIG)},
                    "model.safetensors": {"size": len(WEIGHTS), "sha256": sha256(WEIGHTS)},
                },
            }
        },
    }
    assert not (snapshot(cache, "models--some/model", commit) / "README.md").exists()


def test_a_terminal_shows_progress(hub: FakeHub, cache: Path, file: Path) -> None:
    hub.put("some/model", MODEL)
    shown = io.StringIO()

    fetching.fetch([file], console=Console(file=shown, force_terminal=True, width=150))

    assert "some/model/model.safetensors" in shown.getvalue()
    assert "checking model.safetensors" in shown.getvalue()
    assert "0.0/10.2 kB" in shown.getvalue()


def test_what_huggingface_hub_reports_moves_the_bar() -> None:
    moved: list[tuple[float, float | None]] = []
    kind = fetching._bar(lambda size, total=None: moved.append((size, total)))

    # As for a download that goes on, and as for one that hf_xet makes.
    with kind(desc="x", total=10, initial=2, unit="B", unit_scale=True) as bar:
        bar.update(3)
        bar.update_transfer(3)
        bar.set_transfer_postfix_str("1 MB/s", refresh=False)
        bar.set_postfix_str("1 MB/s", refresh=False)

    assert moved == [(2, 10), (3, None)]


def test_what_was_fetched_is_what_a_worker_reads(
    hub: FakeHub, file: Path, fetch: Fetch, no_network: Callable[[], None]
) -> None:
    hub.put("some/model", MODEL)
    fetch(file)
    no_network()

    config = load(file).points[0].config
    assert config.backbone.weights is not None

    assert weights.weights_file(config.backbone.weights).read_bytes() == WEIGHTS


def test_again_asks_nobody_and_checks(
    hub: FakeHub, file: Path, fetch: Fetch, no_network: Callable[[], None]
) -> None:
    hub.put("some/model", MODEL)
    fetch(file)
    before = lock.lock_file(file).read_bytes()
    hub.asked.clear()

    summary, said = fetch(file)

    assert (summary.exit_code, summary.downloaded) == (0, 0)
    assert not hub.asked
    assert "checked against the lock" in said
    no_network()
    assert fetch(file)[0].exit_code == 0
    assert lock.lock_file(file).read_bytes() == before


def test_a_locked_commit_stays_until_an_update_is_asked_for(
    hub: FakeHub, file: Path, fetch: Fetch
) -> None:
    old = hub.put("some/model", MODEL)
    fetch(file)
    new = hub.put("some/model", MODEL | {"model.safetensors": b"other"})

    fetch(file)
    assert lock.read(file).models["some/model"].revision == old
    fetch(file, update=True)
    assert lock.read(file).models["some/model"].revision == new


def test_another_machine_gets_the_locked_commit(
    hub: FakeHub, cache: Path, file: Path, fetch: Fetch
) -> None:
    hub.put("some/model", MODEL)
    fetch(file)
    before = lock.lock_file(file).read_bytes()
    hub.put("some/model", MODEL | {"model.safetensors": b"other"})
    shutil.rmtree(cache)

    summary, _ = fetch(file)

    assert (summary.exit_code, summary.downloaded) == (0, len(CONFIG) + len(WEIGHTS))
    assert lock.lock_file(file).read_bytes() == before


@pytest.mark.parametrize("kind", ["tag", "commit"])
def test_a_revision_that_the_file_names(kind: str, hub: FakeHub, file: Path, fetch: Fetch) -> None:
    commit = hub.put("some/model", MODEL, branch="v1")
    hub.put("some/model", {"model.safetensors": b"newer"})
    name = "v1" if kind == "tag" else commit
    file.write_text(TEXT.replace("some/model", f"some/model@{name}"))

    assert fetch(file)[0].exit_code == 0
    assert lock.read(file).models[f"some/model@{name}"].revision == commit
    assert load(file).points[0].config.backbone.weights == f"hub:some/model@{commit}"


def test_a_model_of_other_sizes_is_told(hub: FakeHub, file: Path, fetch: Fetch) -> None:
    wrong = json.dumps({"n_layer": 1, "n_embd": 16, "n_head": 4}).encode()
    hub.put("some/model", MODEL | {"config.json": wrong})

    summary, said = fetch(file)

    assert summary.exit_code == 2
    assert "hub:some/model has 4 heads, not 2" in said


def test_the_row_of_a_trial_says_which_commit_it_was_trained_on(
    hub: FakeHub, file: Path, fetch: Fetch, no_network: Callable[[], None], tmp_path: Path
) -> None:
    files = {name: (SHIPPED / "english" / name).read_bytes() for name in MODEL}
    commit = hub.put("some/english", files)
    file.write_text(
        "sweep: demo\n"
        "trial: {task: {name: bit-xor, bits: 2}, steps: 2, batch_size: 2, evaluation: {every: 2},\n"
        '  seed: 0, backbone: {name: gpt2, size: tiny, weights: "hub:some/english"}}\n'
    )
    assert fetch(file)[0].exit_code == 0
    no_network()
    (point,) = load(file).points
    ledger = Ledger(tmp_path / "results", write=True)

    (result,) = worker.run_pack(job(point), ledger)

    assert result.status == "done", result.message
    (row,) = ledger.trials([point.trial_id]).to_pylist()
    assert row["weights"] == f"hub:some/english@{commit}"
    assert json.loads(row["config"])["backbone"]["weights"] == row["weights"]


# --- older formats


def test_a_pickle_is_converted_once(
    hub: FakeHub, file: Path, fetch: Fetch, no_network: Callable[[], None], tmp_path: Path
) -> None:
    import torch

    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    stored = io.BytesIO()
    # Tied, and of a layout of its own.
    torch.save({"a.weight": tensor, "b.weight": tensor, "c.weight": tensor.t(), "n": 1}, stored)
    hub.put("some/model", {"config.json": CONFIG, "pytorch_model.bin": stored.getvalue()})

    assert fetch(file)[0].exit_code == 0
    made = list((tmp_path / "own" / "weights").glob("*.safetensors"))
    no_network()
    used = load(file).points[0].config.backbone.weights
    assert used is not None
    path = weights.weights_file(used)

    assert [path] == made
    read = weights.read_tensors(path)
    assert read.keys() == {"a.weight", "b.weight", "c.weight"}
    assert torch.equal(read["b.weight"], tensor)
    assert torch.equal(read["c.weight"], tensor.t())
    assert [one.suffix for one in path.parent.iterdir()].count(".part") == 0


def test_those_who_come_second_wait_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setenv("FPT_SWEEP_CACHE", str(tmp_path / "own"))
    stored = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(3)}, stored)
    reads: list[int] = []
    load = torch.load

    def slow(*arguments: Any, **options: Any) -> Any:
        reads.append(1)
        time.sleep(0.2)
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", slow)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(conversion.one_safetensors, [[stored]] * 4))

    assert len(paths) == len(reads) == 1


def test_a_pickle_that_runs_code_does_not(
    hub: FakeHub, file: Path, fetch: Fetch, tmp_path: Path
) -> None:
    import torch

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    stored = io.BytesIO()
    torch.save({"a": Evil()}, stored)
    hub.put("some/model", {"pytorch_model.bin": stored.getvalue()})

    summary, said = fetch(file)

    assert summary.exit_code == 2
    assert "pytorch_model.bin: cannot be read as weights" in said
    assert not (tmp_path / "harm").exists()


def shard(**tensors: float) -> bytes:
    import torch
    from safetensors.torch import save

    return save({name: torch.full((2,), value) for name, value in tensors.items()})


def sharded() -> Files:
    parts = {
        "model-00001-of-00002.safetensors": shard(a=1.0),
        "model-00002-of-00002.safetensors": shard(b=2.0),
    }
    index = {"weight_map": dict(zip("ab", parts, strict=True))}
    return parts | {"model.safetensors.index.json": json.dumps(index).encode()}


def test_shards_are_put_together(hub: FakeHub, file: Path, fetch: Fetch) -> None:
    hub.put("some/model", sharded())

    summary, _ = fetch(file)
    used = load(file).points[0].config.backbone.weights
    assert used is not None

    assert summary.exit_code == 0
    assert set(lock.read(file).models["some/model"].files) == set(sharded())
    read = weights.read_tensors(weights.weights_file(used))
    assert {name: one.tolist() for name, one in read.items()} == {"a": [1, 1], "b": [2, 2]}


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors", "x.bin", 3])
def test_an_index_names_files_beside_it_alone(
    name: Any, hub: FakeHub, file: Path, fetch: Fetch
) -> None:
    index = json.dumps({"weight_map": {"a": name}}).encode()
    hub.put("some/model", {"model.safetensors.index.json": index})

    summary, said = fetch(file)

    assert summary.exit_code == 2
    assert "which is no safetensors file beside it" in said


def test_a_missing_shard_is_named(hub: FakeHub, file: Path, fetch: Fetch) -> None:
    files = sharded()
    del files["model-00002-of-00002.safetensors"]
    hub.put("some/model", files)

    summary, said = fetch(file)

    assert summary.exit_code == 2
    assert "hub:some/model: model-00002-of-00002.safetensors: " in said


@pytest.mark.parametrize("form", ["shards", "pickle"])
def test_a_directory_may_hold_an_older_format(form: str, file: Path, fetch: Fetch) -> None:
    import torch

    folder = file.parent / "weights"
    folder.mkdir()
    (folder / "config.json").write_bytes(CONFIG)
    if form == "shards":
        for name, content in sharded().items():
            (folder / name).write_bytes(content)
    else:
        torch.save({"a": torch.ones(2), "b": torch.full((2,), 2.0)}, folder / "pytorch_model.bin")
    file.write_text(TEXT.replace("hub:some/model", "weights"))

    summary, said = fetch(file)
    read = weights.read_tensors(weights.weights_file(str(folder)))

    assert summary.exit_code == 0
    assert f"{folder}: sha256:" in said
    assert not lock.lock_file(file).exists()
    assert {name: one.tolist() for name, one in read.items()} == {"a": [1, 1], "b": [2, 2]}
    # All of the files are what the weights are.
    before = load(file).points[0].trial_id
    changed = folder / ("model-00002-of-00002.safetensors" if form == "shards" else "config.json")
    changed.write_bytes(shard(b=3.0) if form == "shards" else CONFIG + b" ")
    assert load(file).points[0].trial_id != before


def test_an_installed_package_may_hold_weights(
    file: Path, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site" / "some_weights" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "model.safetensors").write_bytes(shard(a=1.0))
    file.write_text(TEXT.replace("hub:some/model", "package:some_weights/model"))

    with pytest.raises(ValueError, match=r"`pip install some-weights --no-deps`"):
        load(file)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    summary, said = fetch(file)

    assert summary.exit_code == 0
    assert "package:some_weights/model: sha256:" in said
    same = tmp_path / "same.yaml"
    same.write_text(TEXT.replace("hub:some/model", str(folder)))
    assert load(file).points[0].trial_id == load(same).points[0].trial_id
    file.write_text(TEXT.replace("hub:some/model", "package:some_weights/modle"))
    with pytest.raises(ValueError, match=r"modle/config.json: missing"):
        load(file)


# --- data sets


def test_a_data_set_is_fetched_and_read_without_a_network(
    hub: FakeHub,
    file: Path,
    fetch: Fetch,
    no_network: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", file.parent / "arrow")
    commit = hub.put("datasets/proteinea/remote_homology", PROTEINS)
    file.write_text(HOMOLOGY)

    summary, said = fetch(file)

    assert summary.exit_code == 0
    assert f"data set proteinea/remote_homology@main: commit {commit}, 3 files" in said
    entry = lock.read(file).datasets["proteinea/remote_homology@main"]
    assert entry.files.keys() == {"train.csv", "valid.csv", "test_fold_holdout.csv"}
    task = load(file).points[0].config.task
    no_network()
    splits = task.splits("sound")
    assert splits.validation is not None
    assert len(splits.validation) == 1


def test_the_pinned_revision_is_read_whatever_was_read_last(
    hub: FakeHub, cache: Path, no_network: Callable[[], None], tmp_path: Path
) -> None:
    one = hub.put("datasets/some/data", {"train.csv": b"x\n1\n"})
    other = hub.put("datasets/some/data", {"train.csv": b"x\n2\n"})
    files = ("train.csv",)
    for commit in (one, other):
        HubData("some/data", commit, files).folder()
    no_network()

    read = [
        HubData("some/data", commit, files).load(cache_dir=str(tmp_path / "arrow"))["train"][0]["x"]
        for commit in (other, one)
    ]

    assert read == [2, 1]


def test_images_of_the_hub(
    hub: FakeHub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    images = {"train": 20, "test": 5}
    files = {"README.md": b"# MNIST"}
    for split, count in images.items():
        rows = {"image": [np.full((28, 28), n, np.uint8) for n in range(count)]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        made = datasets.Dataset.from_dict(rows | {"label": [0] * count}, features=features)
        stored = io.BytesIO()
        made.to_parquet(stored)
        files[f"mnist/{split}-00000-of-00001.parquet"] = stored.getvalue()
    commit = hub.put("datasets/ylecun/mnist", files)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")

    train, test = Mnist(revision=commit).published()

    assert train.pixels[:, 0, 0, 0].tolist() == list(range(20))
    assert test.pixels.shape == (5, 28, 28, 1)


def test_half_a_data_set_is_none(hub: FakeHub, cache: Path, no_network: Callable[[], None]) -> None:
    parts = {f"data/train-0000{n}-of-00003.parquet": b"..." for n in range(3)}
    commit = hub.put("datasets/some/data", parts)
    data = HubData("some/data", commit, ("data/train-*.parquet", "README.md"))

    assert data.lacking(list(parts)[:2]) == ["README.md", "data/train-00002-of-00003.parquet"]
    with pytest.raises(DataError, match=r"some/data: lacks README.md"):
        data.folder()
    no_network()
    whole = HubData("some/data", commit, ("data/train-*.parquet",))
    assert len(whole.among(str(p) for p in parts)) == 3
    folder = whole.folder()
    (folder / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match="some/data"):
        whole.folder()


# --- what goes wrong


def test_a_damaged_download_is_tried_once_more(hub: FakeHub, file: Path, fetch: Fetch) -> None:
    hub.put("some/model", MODEL)
    hub.damaged["model.safetensors"] = 1

    summary, _ = fetch(file)

    assert summary.exit_code == 0
    assert hub.sent["model.safetensors"] == 2 * len(WEIGHTS)


def test_a_wrong_checksum_is_told_and_nothing_of_it_stays(
    hub: FakeHub, cache: Path, file: Path, fetch: Fetch
) -> None:
    commit = hub.put("some/model", MODEL)
    hub.damaged["model.safetensors"] = 9

    summary, said = fetch(file)

    assert summary.exit_code == 2
    assert "hub:some/model: model.safetensors: its SHA-256 is" in said
    assert f"and should be {sha256(WEIGHTS)}" in said
    assert not (snapshot(cache, "models--some/model", commit) / "model.safetensors").exists()
    assert not lock.lock_file(file).exists()
    hub.damaged.clear()
    assert fetch(file)[0].exit_code == 0


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_was_damaged_on_this_disk_is_fetched_again(
    name: str, hub: FakeHub, cache: Path, file: Path, fetch: Fetch
) -> None:
    commit = hub.put("some/model", MODEL)
    fetch(file)
    (snapshot(cache, "models--some/model", commit) / name).resolve().write_bytes(b"x")

    summary, _ = fetch(file)

    assert (summary.exit_code, summary.downloaded) == (0, len(MODEL[name]))
    assert (snapshot(cache, "models--some/model", commit) / name).read_bytes() == MODEL[name]


def test_damage_is_found_without_a_lock_and_a_network(
    hub: FakeHub, cache: Path, file: Path, fetch: Fetch, no_network: Callable[[], None]
) -> None:
    commit = hub.put("some/model", MODEL)
    file.write_text(TEXT.replace("some/model", f"some/model@{commit}"))
    fetch(file)
    lock.lock_file(file).unlink()
    no_network()
    assert fetch(file)[0].exit_code == 0  # by the names of the files in the cache
    lock.lock_file(file).unlink()
    folder = snapshot(cache, "models--some/model", commit)
    (folder / "config.json").resolve().write_bytes(CONFIG + b" ")

    summary, said = fetch(file)

    assert summary.exit_code == 2
    assert "config.json: its git hash is" in said
    assert "HF_HUB_OFFLINE is set" in said


def test_a_lock_that_says_otherwise_than_the_hub(
    hub: FakeHub, cache: Path, file: Path, fetch: Fetch
) -> None:
    commit = hub.put("some/model", MODEL)
    fetch(file)
    path = lock.lock_file(file)
    path.write_text(path.read_text().replace(sha256(WEIGHTS), "0" * 64))

    summary, said = fetch(file)

    assert summary.exit_code == 2
    assert f"and should be {'0' * 64}, by the lock; `sweep fetch --update`" in said
    assert (snapshot(cache, "models--some/model", commit) / "model.safetensors").exists()
    assert fetch(file, update=True)[0].exit_code == 0


def test_a_dying_download_is_resumed(
    hub: FakeHub, file: Path, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)
    hub.put("some/model", MODEL)
    hub.dying["model.safetensors"] = 1

    summary, _ = fetch(file)

    assert summary.exit_code == 0
    assert hub.sent["model.safetensors"] == len(WEIGHTS)  # no byte twice


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (None, "hub:some/model: there is none of this name, or it is private"),
        ({"config.json": CONFIG}, "hub:some/model: has no model.safetensors nor "),
    ],
)
def test_what_the_hub_does_not_have(
    files: Files | None, problem: str, hub: FakeHub, file: Path, fetch: Fetch
) -> None:
    if files:
        hub.put("some/model", files)

    summary, said = fetch(file)

    assert summary.exit_code == 2
    assert problem in said
    assert not lock.lock_file(file).exists()


def test_a_revision_that_there_is_not(hub: FakeHub, file: Path, fetch: Fetch) -> None:
    hub.put("some/model", MODEL)
    file.write_text(TEXT.replace("some/model", "some/model@v9"))

    assert "hub:some/model@v9: has no revision v9" in fetch(file)[1]


def test_a_file_that_is_missing_from_the_data(hub: FakeHub, file: Path, fetch: Fetch) -> None:
    hub.put("datasets/proteinea/remote_homology", {"train.csv": b"x"})
    file.write_text(HOMOLOGY)

    _, said = fetch(file)

    assert "has no test_fold_holdout.csv, valid.csv at commit" in said


def test_one_source_that_fails_leaves_the_others(
    hub: FakeHub, file: Path, tmp_path: Path, fetch: Fetch
) -> None:
    hub.put("datasets/proteinea/remote_homology", PROTEINS)
    gpt2 = HOMOLOGY.replace("random", "language").replace(
        "layers: 1, width: 16, heads: 2", "size: base"
    )
    file.write_text(gpt2)  # whose weights are not there

    summary, said = fetch(file)

    assert (summary.exit_code, summary.good, summary.bad) == (1, 1, 1)
    assert "hub:openai-community/gpt2" in said
    assert "proteinea/remote_homology@main" in lock.read(file).datasets


def test_what_cannot_be_fetched_now_stays_locked(
    hub: FakeHub, cache: Path, file: Path, fetch: Fetch
) -> None:
    hub.put("some/model", MODEL)
    fetch(file)
    before = lock.lock_file(file).read_bytes()
    hub.repositories.clear()
    shutil.rmtree(cache)

    assert fetch(file)[0].exit_code == 2
    assert fetch(file, update=True)[0].exit_code == 2
    assert lock.lock_file(file).read_bytes() == before


def test_without_a_network_and_a_cache_it_is_said_what_to_do(
    hub: FakeHub, file: Path, fetch: Fetch, no_network: Callable[[], None]
) -> None:
    no_network()

    summary, said = fetch(file)

    assert summary.exit_code == 2
    assert "hub:some/model: not in the Hugging Face cache" in said
    assert "run where the Hub can be reached, or name a folder" in said
    assert not hub.asked


def test_a_hub_that_is_not_there(
    hub: FakeHub, file: Path, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")

    summary, said = fetch(file)

    assert summary.exit_code == 2
    assert "the Hub did not give it" in said
    assert "refused" in said


def test_an_unpinned_source_is_what_it_was_where_the_network_is_gone(
    hub: FakeHub, file: Path, fetch: Fetch, no_network: Callable[[], None]
) -> None:
    commit = hub.put("some/model", MODEL)
    for name in MODEL:
        weights.hub_files("hub:some/model")
        from fpt import hub as ours

        ours.file("some/model", name, revision=None)
    no_network()

    summary, said = fetch(file)

    assert summary.exit_code == 0
    assert "the cache, since the Hub was not reached" in said
    assert lock.read(file).models["some/model"].revision == commit
    lock.lock_file(file).unlink()
    assert fetch(file, update=True)[0].exit_code == 2  # to ask anew is to ask the Hub


def test_no_token_and_no_signature_is_ever_said(
    hub: FakeHub, file: Path, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fpt.hub import told

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in fetch(file)[1]
    with pytest.raises(DataError) as caught, told("model x", None):
        raise OSError("403 for url: https://cdn.example/x?X-Signature=hf_secret&Policy=hf_secret")
    assert "hf_secret" not in str(caught.value)
    assert "https://cdn.example/x" in str(caught.value)


# --- several files, and the command


def test_files_that_share_a_source_fetch_it_once(
    hub: FakeHub, file: Path, tmp_path: Path, fetch: Fetch
) -> None:
    hub.put("some/model", MODEL)
    other = tmp_path / "other.yaml"
    other.write_text(TEXT)

    summary, _ = fetch(file, other)

    assert summary.exit_code == 0
    assert lock.read(file) == lock.read(other) != lock.Lock()
    assert len([one for one in hub.asked if one.startswith("GET api/")]) == 1
    assert hub.sent["model.safetensors"] == len(WEIGHTS)


def test_a_wrong_sweep_file_leaves_the_others(
    hub: FakeHub, file: Path, tmp_path: Path, fetch: Fetch
) -> None:
    hub.put("some/model", MODEL)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(TEXT.replace("steps", "stepps"))

    summary, said = fetch(wrong, file)

    assert summary.exit_code == 1
    assert "stepps" in said
    assert lock.read(file).models


def test_what_no_trial_needs_any_longer_leaves_the_lock(
    hub: FakeHub, file: Path, fetch: Fetch
) -> None:
    hub.put("some/model", MODEL)
    fetch(file)
    ours = 'layers: 1, width: 16, heads: 2, weights: "hub:some/model"'
    file.write_text(TEXT.replace(ours, "size: tiny"))

    assert fetch(file)[0].exit_code == 0
    assert lock.read(file) == lock.Lock()


def test_a_lock_that_cannot_be_read_stops_a_fetch_but_not_an_update(
    hub: FakeHub, file: Path, fetch: Fetch
) -> None:
    hub.put("some/model", MODEL)
    lock.lock_file(file).write_text("<<<<<<< ours")

    summary, said = fetch(file)
    assert summary.exit_code == 2
    assert "demo.lock: not a lock file" in said
    assert not hub.asked
    assert fetch(file, update=True)[0].exit_code == 0
    assert lock.read(file).models


def test_nothing_to_fetch_is_no_failure(file: Path, fetch: Fetch) -> None:
    file.write_text(
        TEXT.replace('weights: "hub:some/model"', "").replace(
            "steps", "pretraining: random\n  steps"
        )
    )

    assert fetch(file)[0].exit_code == 0
    assert not lock.lock_file(file).exists()


def environment(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    return {**os.environ, **own, "FPT_SWEEP_CACHE": str(tmp_path / "own")}


def test_the_command(hub: FakeHub, file: Path, tmp_path: Path) -> None:
    commit = hub.put("some/model", MODEL)
    command = [sys.executable, "-m", "sweep", "fetch", str(file)]

    ran = subprocess.run(
        command, env=environment(hub, tmp_path), capture_output=True, text=True, timeout=600
    )

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""
    assert commit in ran.stderr
    assert re.search(r"1 source here.*0\.0 MB", ran.stderr)
    assert (tmp_path / "home" / "hub" / "models--some--model" / "snapshots" / commit).is_dir()


def test_killed_in_the_middle_then_again(hub: FakeHub, file: Path, tmp_path: Path) -> None:
    hub.put("some/model", MODEL)
    hub.stalling["model.safetensors"] = stalled = threading.Event()
    command = [sys.executable, "-m", "sweep", "fetch", str(file)]
    settings: dict[str, Any] = {"env": environment(hub, tmp_path), "stderr": subprocess.DEVNULL}

    first = subprocess.Popen(command, **settings)
    assert stalled.wait(120)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not lock.lock_file(file).exists()
    hub.stalling.clear()
    hub.sent.clear()
    assert subprocess.run(command, **settings, timeout=600).returncode == 0

    assert hub.sent["config.json"] == 0  # it was whole
    assert hub.sent["model.safetensors"] == len(WEIGHTS)
    (stored,) = (tmp_path / "home" / "hub").glob("models--*/snapshots/*/model.safetensors")
    assert stored.read_bytes() == WEIGHTS


def test_plan_says_what_to_fetch(
    file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["sweep", "plan", str(file)])
    with pytest.raises(SystemExit):
        cli.main()

    said = capfd.readouterr()
    assert "of no commit in particular: hub:some/model" in said.err
    assert f"`sweep fetch {shlex.quote(str(file))}`" in said.err
