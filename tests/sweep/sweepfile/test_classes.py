"""A user's own classes in a sweep file: their fields are fields, and a name that misses is met."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from sweep.sweepfile.classes import meant, names_of
from sweep.sweepfile.expansion import find_modules, load
from sweep.sweepfile.json_schema import json_schema
from sweep.sweepfile.reading import load as read
from sweep.sweepfile.schema import SweepFileError

MODULE = """\
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from fpt import Shape, Task


class Ripple(Task):
    version: ClassVar[int] = 1
    name: str
    sigma: float = Field(default=0.1, gt=0)
    table: Path | None = None

    def shape(self, protocol):
        return Shape(tokens=4, inputs=2, embedded=False, classes=2)


class Other(Ripple):
    depth: int = 3
"""
FILE = """\
sweep: own
trial:
  task: {task}
  backbone: {{name: gpt2, size: tiny}}
  pretraining: random
  steps: 10
axes:
  {axis}
  seed: [0, 1]
"""


@pytest.fixture
def module(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """The name of a module beside the file; of its own in each test, for modules are read once."""
    name = f"own_{abs(hash(request.node.nodeid)):x}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    return name


def write(folder: Path, task: str, axis: str = "steps: [3]") -> Path:
    file = folder / "own.yaml"
    file.write_text(FILE.format(task=task, axis=axis))
    return file


def problems(file: Path) -> list[str]:
    with pytest.raises(SweepFileError) as caught:
        load(file)
    return [one.removeprefix(f"{file}:") for one in caught.value.problems]


@pytest.mark.parametrize(
    "axis",
    ["task.sigma: [0.1, 0.5]", "arm: [{label: a, task.sigma: 0.1}, {label: b, task.sigma: 0.5}]"],
)
def test_its_parameters_are_axes(tmp_path: Path, module: str, axis: str) -> None:
    file = write(tmp_path, f"{module}:Ripple", axis)
    with file.open("a") as stream:
        stream.write("exclude: [{task.sigma: 0.5, seed: 1}]\n")
        stream.write(f"defaults: {{task: {{'{module}:Ripple': {{dropout: 0}}}}}}\n")

    sweep = load(file)

    sigmas = [
        (point.config.task.model_dump()["sigma"], point.config.seed) for point in sweep.points
    ]
    assert sigmas == [(0.1, 0), (0.1, 1), (0.5, 0)]
    assert {point.config.dropout for point in sweep.points} == {0}


def test_its_relative_paths_begin_at_the_file(tmp_path: Path, module: str) -> None:
    (tmp_path / "x.csv").touch()
    sweep = load(write(tmp_path, f"{{name: '{module}:Ripple', table: x.csv}}"))

    assert sweep.points[0].config.task.model_dump()["table"] == tmp_path / "x.csv"


@pytest.mark.parametrize(
    ("task", "axis", "told"),
    [
        ("M:Ripple", "task.sigm: [1]", "8: axes.task.sigm: no such field (an axis of another"),
        ("M:Ripple", "task.sigm: [1]", "did you mean 'sigma'; allowed: name, sigma, table"),
        ("M:Ripple", "task.sigma: [-1]", "8: axes.task.sigma[0]: -1 should be greater than 0"),
        ("{name: 'M:Other', dept: 2}", "steps: [3]", "3: trial.task.dept: no such field; did you"),
        ("{name: 'M:Other', dept: 2}", "steps: [3]", "'depth'; allowed: name, sigma, table, depth"),
        ("M.Ripple", "steps: [3]", "'M.Ripple'; did you mean 'M:Ripple'; allowed: bit-memory"),
        ("ripple", "steps: [3]", "3: trial.task: no task is called 'ripple'; did you mean 'M:"),
        ("M:Ripples", "steps: [3]", "module M has no class Ripples; did you mean 'M:Ripple'"),
        ("Mx:Ripple", "steps: [3]", "3: trial.task: Mx:Ripple: there is no module Mx;"),
        ("{name: M.Other}", "steps: [3]", "3: trial.task.name: no task is called 'M.Other'; did"),
        ("some.where.Task", "steps: [3]", "'some.where.Task'; did you mean 'some.where:Task'"),
        ("bitxor", "steps: [3]", "no task is called 'bitxor'; did you mean 'bit-xor'"),
    ],
)  # fmt: skip
def test_a_mistake_names_what_was_meant(
    tmp_path: Path, module: str, task: str, axis: str, told: str
) -> None:
    file = write(tmp_path, task.replace("M", module), axis)

    (found,) = problems(file)

    assert told.replace("M", module) in found


def test_a_backbone_written_with_a_dot(tmp_path: Path, module: str) -> None:
    file = write(tmp_path, "bit-xor", "steps: [3]")
    file.write_text(file.read_text().replace("{name: gpt2, size: tiny}", f"{module}.Other"))

    (found,) = problems(file)

    assert "no backbone is called" in found
    assert f"did you mean '{module}:Other'" in found


def test_what_is_wrong_with_a_class_is_no_misspelling_of_it(tmp_path: Path, module: str) -> None:
    file = write(tmp_path, "bit-xor", "steps: [3]")
    own = f"{{name: '{module}:Other', layers: 1, width: 8, heads: 1}}"
    file.write_text(file.read_text().replace("{name: gpt2, size: tiny}", own))

    found = problems(file)

    assert any(f"{module}:Other: " in one for one in found)
    assert not any("did you mean" in one for one in found)


def test_the_json_schema_of_a_file_knows_its_classes(tmp_path: Path, module: str) -> None:
    file = write(tmp_path, f"{{name: '{module}:Ripple', sigma: 0.2}}", "task.depth: [1]")
    with file.open("a") as stream:
        stream.write(f"include: [{{trial: {{task: '{module}:Other'}}}}]\n")
    spec = read(file)
    find_modules(spec)

    validator = jsonschema.Draft202012Validator(json_schema(spec))

    content = YAML(typ="safe").load(file)
    validator.check_schema(validator.schema)
    assert [error.message for error in validator.iter_errors(content)] == []
    assert not jsonschema.Draft202012Validator(json_schema()).is_valid(content)
    content["trial"]["task"]["sigm"] = 1
    assert not validator.is_valid(content)
    content["trial"]["task"] = {"name": f"{module}:Ripple", "sigma": -1}
    assert not validator.is_valid(content)


def test_names_are_found_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "names.yaml"
    file.write_text(
        "sweep: x\ntrial: {task: {name: 'a:A'}, backbone.name: 'b:B', pretraining: 'no:Class'}\n"
        "axes:\n  task.name: ['c:C']\n  arm: [{label: 'no:Class', task: 'd:D'}]\n"
        "  backbone: [lstm]\n"
        "zip: [{task: [{name: 'e:E', label: 'no:Class'}]}]\n"
        "include: [{axes: {x: [{label: y, task: {name: f:F}}]}}]\n"
        "defaults: {seed: {0: {task: 'g:G'}}}\nbackbones: {own: {task: bit-xor}}\n"
    )

    found = names_of(read(file))

    assert sorted(found["task"]) == ["a:A", "bit-xor", "c:C", "d:D", "e:E", "f:F", "g:G"]
    assert sorted(found["backbone"]) == ["b:B", "lstm"]


def test_modules_are_looked_through_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text("raise SystemExit('run')\nclass Loud: ...\nclass _Own: ...\n")
    (tmp_path / "torn.py").write_text("class (\n")

    assert meant("loud.Loud", tmp_path) == "loud:Loud"
    assert meant("_Own", tmp_path) is None


@pytest.mark.parametrize(("task", "found"), [("bit-xor", False), ("lone:Ripple", True)])
def test_the_folder_is_on_the_path_only_of_files_that_name_a_class(
    tmp_path: Path, task: str, found: bool
) -> None:
    (tmp_path / "lone.py").write_text(MODULE)
    (tmp_path / "beside.py").write_text("")
    file = write(tmp_path, task, "steps: [3]")
    code = (
        "import importlib.util, sys; from sweep.sweepfile.expansion import load; load(sys.argv[1]);"
        "print(importlib.util.find_spec('beside') is not None)"
    )

    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(file)], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == str(found)
