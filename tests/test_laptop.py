"""Every laptop file, run to its end on a real Ray: its own axes and tasks, a few steps of each."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

import sweep
from fpt.spec import JSON
from sweep.sweepfile.expansion import load
from sweep.sweepfile.trials import Sweep
from tests.fpt.backbones import tiny

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "experiments/laptop").glob("*.yaml"))

pytestmark = [pytest.mark.slow, pytest.mark.ray]

STEPS = 2

FEW: dict[str, JSON] = {
    "bit-memory": {"examples": 8},
    "bit-xor": {"examples": 8},
    "listops": {"train": 64, "validation": 8, "test": 8},
    "digits": {"validation": 10},
    "mnist": {"validation": 10},
    "cifar10": {"validation": 10},
    "remote-homology": {"subset": True},
    "text": {"digest": None},
}
"""Parameters of each task under which it has next to no data."""


def made_up(folder: Path) -> None:
    """Folders of data where the files look for them: of the right shapes, of nothing else."""
    rng = np.random.default_rng(0)
    for name, shape in (("mnist", (28, 28)), ("cifar10", (32, 32, 3))):
        (folder / name).mkdir(parents=True)
        arrays = {}
        for split, images in (("train", 40), ("test", 20)):
            arrays[f"x_{split}"] = rng.integers(0, 256, (images, *shape), dtype=np.uint8)
            arrays[f"y_{split}"] = np.arange(images, dtype=np.uint8) % 10
        np.savez(folder / name / "images.npz", **arrays)
    (folder / "remote_homology").mkdir()
    for split in ("train", "valid", "test"):
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["seq", "label"])
        writer.writerows(["ACDEFGHIKLMNPQRSTVWY"[i:], i] for i in range(12))
        (folder / "remote_homology" / f"{split}.csv").write_text(text.getvalue())
    tiny.save("dinov2", folder / "weights/dinov2-saliency", num_hidden_layers=4)
    tiny.save("whisper", folder / "weights/whisper-tiny-en")
    (folder / "text/classic_books").mkdir(parents=True)
    words = " ".join(f"It was the {day} of times." for day in ("best", "worst") * 200)
    (folder / "text/classic_books/book.txt").write_text(words)


def shrunk(value: Any, key: str = "") -> Any:
    """A part of a sweep file: `STEPS` steps, an evaluation after each, one seed, one rate."""
    if key.endswith("steps"):
        return STEPS
    if key.endswith("every") or key == "smoothing":
        return 1
    if key.endswith("training_set"):
        return 8
    if isinstance(value, dict):
        return {name: shrunk(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        # Of rates one, the same in all files, so that what they share stays shared.
        few = {"seed": [0], "values": [1e-3]}
        return few[key] if key in few else [shrunk(one) for one in value]
    return value


def small_copy(file: Path, folder: Path) -> Path:
    """The same sweep file with next to no data, in `folder`."""
    content = shrunk(YAML(typ="safe").load(file.read_text(encoding="utf-8")))
    of_tasks = content.setdefault("defaults", {}).setdefault("task", {})
    for task in {point.config.task.name for point in load(file).all} | of_tasks.keys():
        fields = of_tasks.setdefault(task, {})
        own = fields.setdefault("task", {})
        for name, few in FEW[task].items():
            fields.pop(f"task.{name}", None)
            own[name] = few
    copy = folder / file.name
    copy.write_text(json.dumps(content), encoding="utf-8")  # which is YAML too
    return copy


def together(sweeps: list[Sweep]) -> Sweep:
    """One sweep with the trials of all, so that one Ray runs them."""
    points = {point.trial_id: point for one in sweeps for point in one.points}
    before = {point.trial_id: point for one in sweeps for point in one.pretrainings}
    tunings = {point.trial_id: point for one in sweeps for point in one.tunings}
    studies = {
        tuple(point.trial_id for point in study.points): study
        for one in sweeps
        for study in one.studies
    }
    return dataclasses.replace(
        sweeps[0],
        points=tuple(points.values()),
        pretrainings=tuple(before.values()),
        studies=tuple(studies.values()),
        tunings=tuple(tunings.values()),
    )


def test_every_laptop_file_runs_to_its_end(tmp_path: Path) -> None:
    made_up(tmp_path / "data")
    folder = tmp_path / "experiments/laptop"
    folder.mkdir(parents=True)
    copies = [small_copy(file, folder) for file in FILES]
    sweeps = [load(copy) for copy in copies]
    left_out = {some.why for one in sweeps for some in one.left_out}
    assert all(why.startswith("package:") for why in left_out), left_out
    for file, small in zip(FILES, sweeps, strict=True):
        whole = load(file)
        assert small.axes == whole.axes
        assert {p.labels.get("seed") for p in small.points} == {"0"}

    events: list[Any] = []
    summary = sweep.run(
        together(sweeps), results=tmp_path / "results", mirror=False, on_event=events.append
    )

    failures = [event for event in events if event.kind == "trial_failed"]
    assert summary.exit_code == 0, failures
    # A trial whose rate was tuned may turn out to be one of another file's.
    ended = sweep.plan(together(sweeps), tmp_path / "results").counts()
    assert summary.done + summary.diverged == sum(ended.values())
    assert ended["done"] + ended["diverged"] == sum(ended.values())
    assert any(one.studies for one in sweeps)
    for copy in copies:
        table = sweep.load_table(copy, tmp_path / "results")
        assert table.cells
        states = {place: cell.state for place, cell in table.cells.items()}
        assert set(states.values()) == {"done"}, {p: s for p, s in states.items() if s != "done"}
