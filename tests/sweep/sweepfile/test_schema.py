from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pyarrow.types as kinds
import pytest
from pydantic import BaseModel

from fpt.config import TrialConfig
from fpt.spec import DataPath, Spec
from fpt.tasks import TASKS
from sweep.ledger.ledger import TRIALS
from sweep.sweepfile import schema
from sweep.sweepfile.document import Document, Problems, SweepFileError
from sweep.sweepfile.fields import FieldNames
from sweep.sweepfile.json_schema import json_schema
from sweep.sweepfile.reading import axis_labels, load
from sweep.sweepfile.schema import CONVERGENCE, METRICS, OBJECTS, PATHS

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "experiments").rglob("*.yaml"))

GOOD = """\
sweep: demo
trial: {task: bit-xor, steps: 10}
axes:
  pretraining: [random, language]
  seed: [0, 1]
"""


def problems_of(folder: Path, text: str) -> list[str]:
    file = folder / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(SweepFileError) as caught:
        load(file)
    return [one.removeprefix(f"{file}:") for one in caught.value.problems]


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    table = "table: {rows: pretraining, columns: seed, reference: T2, labels: {}}\n"
    claim = "claims: [{that: language > random, axis: pretraining, on: test_loss}]\n"
    file.write_text(GOOD + table + claim + "keep: {trained: false}\n")
    spec = load(file)
    assert spec.sweep == "demo"
    assert spec.axes == {"pretraining": ["random", "language"], "seed": [0, 1]}
    assert spec.table is not None
    assert (spec.table.value, spec.table.reference) == ("test_accuracy", "T2")
    assert spec.claims[0].sides == ("language", "random")
    assert spec.claims[0].paired_by == "seed"
    assert spec.keep.trained is False
    assert spec.document.line(("axes", "seed", 1)) == 5


@pytest.mark.parametrize(
    ("addition", "told"),
    [
        ("tabel: {rows: seed}", "6: tabel: no such field; did you mean 'table'; allowed: "),
        ("table: 3", "6: table: 3 should be"),
        ("table: {columns: seed}", "6: table.rows: missing"),
        ("table: {rows: seed}", "6: table: columns: missing"),
        ("table: {rows: seed, columns: seed}", "6: table: rows and columns are both 'seed'"),
        ("table: {rows: pretrainin, columns: seed}",
         "6: table.rows: no axis is called 'pretrainin'; did you mean 'pretraining'; allowed: p"),
        ("table: {rows: seed, value: [test_loss], convergence: {tolerance: 1}}",
         "6: table.convergence.tolerance: 1 should be less than 1"),
        ("table: {rows: seed, value: [test_loss], convergence: {smooth: 1}}",
         "6: table.convergence.smooth: no such field; did you mean 'smoothing'; allowed: tol"),
        ("table: {rows: pretraining, value: [test_loss, 3]}", "6: table.value[1]: 3 is not known"),
        ("table: {rows: pretraining, columns: seed, reference: T99}",
         "6: table.reference: no published table is called 'T99'; did you mean 'T9'"),
        ("table: {rows: pretraining, columns: seed, labels: {task: {a: b}}}",
         "6: table.labels.task: neither rows nor columns are 'task'"),
        ("table: {rows: pretraining, columns: seed, labels: {pretraining: {langage: x}}}",
         "6: table.labels.pretraining.langage: axis pretraining has no point 'langage'; did you m"),
        ("table: {rows: pretraining, columns: seed, reference: T2, labels: {seed: {0: x}}}",
         "6: table.labels.seed.0: T2 has no 'x'; allowed: bit-memory"),
        ("claims: [{that: languag > random, axis: pretraining}]",
         "6: claims[0].that: axis pretraining has no point 'languag'; did you mean 'language'"),
        ("claims: [{that: language, axis: pretraining}]", "6: claims[0].that: 'language' is not"),
        ("claims: [{that: a > b, axis: pretrain}]", "6: claims[0].axis: no axis is called"),
        ("claims: [{that: random < language, axis: pretraining, per: [task]}]",
         "6: claims[0].per: no axis is called 'task'"),
        ("claims: [{that: random < language, axis: pretraining, paired_by: sed}]",
         "6: claims[0].paired_by: no axis is called 'sed'; did you mean 'seed'"),
        ("pack: on", "6: pack: 'on' is neither auto, off nor a number of trials from 1 on"),
        ("pack: 0", "6: pack: 0 is neither"),
        ("pack: true", "6: pack: true is neither"),
        ("pack: '4'", "6: pack: '4' is neither"),
        ("keep: {traned: true}", "6: keep.traned: no such field; did you mean 'trained'"),
        ("include: [{trail: {}}]", "6: include[0].trail: no such field; did you mean 'trial'"),
        ("zip: [{seed: []}]", "6: zip[0].seed: has no points"),
        ("exclude: {seed: 1}", "6: exclude: this should be"),
        ("description: 3", "6: description: 3 should be a valid string"),
        ("sweep: again", "6: sweep: given twice, first on line 1"),
    ],
)  # fmt: skip
def test_problems_with_the_structure(tmp_path: Path, addition: str, told: str) -> None:
    found = problems_of(tmp_path, GOOD + addition + "\n")
    assert len(found) == 1
    assert found[0].startswith(told)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("", "auto"), ("pack: off", "off"), ("pack: 4", 4), ("pack: auto", "auto")],
)
def test_packs_may_be_left_to_us(tmp_path: Path, written: str, meant: object) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(f"{GOOD}{written}\n")
    assert load(file).pack == meant  # `off` is a word in YAML 1.2


COMMANDS = ("two\nlines", "\t", "\x1b[31mred", "\x1b]0;title\x07", "\u202eback", "\u2066x", "\x85")


@pytest.mark.parametrize("text", COMMANDS)
@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("table.title", lambda text: {"table": {"rows": "seed", "columns": "task", "title": text}}),
        ("description", lambda text: {"description": text}),
        ("axes.arm[0]", lambda text: {"axes": {"arm": [{"label": text, "steps": 3}]}}),
        ("axes.pretraining[1]", lambda text: {"axes": {"pretraining": ["random", text]}}),
        ("zip[0].arm[0]", lambda text: {"zip": [{"arm": [{"label": text, "steps": 3}]}]}),
        ("include[0].axes.arm[0]",
         lambda text: {"include": [{"axes": {"arm": [{"label": [text, 1], "steps": 3}]}}]}),
        ("axes.{}", lambda text: {"axes": {f"arm{text}x": [{"label": "a", "steps": 3}]}}),
        ("backbones.{}", lambda text: {"backbones": {f"own{text}x": {"seed": 0}}}),
    ],
)  # fmt: skip
def test_control_characters_are_refused_where_they_would_be_printed(
    tmp_path: Path, text: str, place: str, change: Callable[[str], dict[str, Any]]
) -> None:
    if place == "description" and text == "two\nlines":
        return  # It may have paragraphs.
    file = tmp_path / "sweep.yaml"
    value = {"sweep": "x", "axes": {"seed": [0], "task": ["bit-xor"]}}
    changed = change(text)
    changed["axes"] = value["axes"] | changed.get("axes", {})
    file.write_text(json.dumps(value | changed))
    with pytest.raises(SweepFileError, match="holds a control character") as caught:
        load(file)
    assert all(one.isprintable() for one in caught.value.problems)
    start = spell_start(place)
    assert any(one.startswith(f"{file}:1: {start}") for one in caught.value.problems)


def spell_start(place: str) -> str:
    return place.partition("{}")[0]


def test_folded_words_are_words(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        """\
sweep: folded
description: |
  One.

  Two.
axes:
  arm:
  - label: >
      frozen English
    steps: 3
  - label: |
      random
    steps: 4
  - {label: ' c ', steps: 5}
  seed: [0]
table:
  rows: arm
  columns: seed
  title: >
    words
claims:
- that: >
    frozen English
    >  random
  axis: arm
- {that: c < random, axis: arm}
"""
    )
    spec = load(file)
    assert list(axis_labels(spec)["arm"]) == ["frozen English", "random", "c"]
    assert spec.claims[0].that == "frozen English > random"
    assert spec.description == "One.\n\nTwo."


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    text = (
        "sweep: A Name\ntabel: 1\naxes:\n  seed: []\n  task: bit-xor\n"
        "table: {rows: tsk, columns: seed, reference: T98}\nkeep: {x: 1}\n"
    )
    places = [one.split(": ")[:2] for one in problems_of(tmp_path, text)]
    assert places == [
        ["1", "sweep"], ["2", "tabel"], ["4", "axes.seed"], ["5", "axes.task"],
        ["6", "table.columns"], ["6", "table.reference"], ["6", "table.rows"], ["7", "keep.x"],
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "3\n"])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    assert "a sweep file is a mapping" in problems_of(tmp_path, text)[0]


def test_a_file_without_a_name(tmp_path: Path) -> None:
    assert problems_of(tmp_path, "axes: {seed: [0]}\n") == ["1: sweep: missing"]


def _specs(annotation: Any) -> set[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return {annotation}
    return {spec for inner in get_args(annotation) for spec in _specs(inner)}


def test_the_fields_with_fields_of_their_own_are_known() -> None:
    found = {name: _specs(field.annotation) for name, field in TrialConfig.model_fields.items()}
    assert {name: specs for name, specs in found.items() if specs} == {
        name: set(specs) for name, specs in OBJECTS.items()
    }


def test_every_path_field_of_a_task_is_known() -> None:
    validator = get_args(DataPath)[1]
    paths = {
        f"task.{name}"
        for task in TASKS.values()
        for name, field in task.model_fields.items()
        if validator in field.metadata or validator in get_args(field.annotation)
        or any(validator in get_args(inner) for inner in get_args(field.annotation))
    }  # fmt: skip
    assert paths == {path for path in PATHS if path.startswith("task.")}


def test_metrics_are_numeric_columns_of_a_trial() -> None:
    assert CONVERGENCE not in TRIALS.schema.names
    for name in set(METRICS) - {CONVERGENCE}:
        kind = TRIALS.schema.field(name).type
        assert kinds.is_floating(kind) or kinds.is_integer(kind)


@pytest.mark.parametrize("path", ["task", "seed", "task.bits", "backbone.size", "optimizer.clip"])
def test_fields(path: str) -> None:
    assert FieldNames().is_field(path)


@pytest.mark.parametrize("path", ["tsk", "", "seed.x", "task.bitz", "backbone.", ".seed", "a.b.c"])
def test_what_is_no_field(path: str) -> None:
    assert not FieldNames().is_field(path)


VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def test_the_json_schema_is_one() -> None:
    VALIDATOR.check_schema(json_schema())


def test_the_shipped_json_schema_is_this_one() -> None:
    """Else: sweep schema > sweep/sweepfile/sweep-file.schema.json."""
    file = Path(schema.__file__).with_name("sweep-file.schema.json")
    assert json.loads(file.read_text(encoding="utf-8")) == json_schema()


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_files_fit_the_json_schema_and_name_it(file: Path) -> None:
    content = Document(file).parse(Problems(file))
    assert [error.message for error in VALIDATOR.iter_errors(content)] == []
    first = file.read_text(encoding="utf-8").splitlines()[0]
    named = file.parent / first.removeprefix("# yaml-language-server: $schema=")
    assert named.resolve() == Path(schema.__file__).with_name("sweep-file.schema.json")


@pytest.mark.parametrize(
    "content",
    [
        {"sweep": "x", "trial": {"stepz": 1}},
        {"sweep": "x", "trial": {"backbone": {"nme": "gpt2"}}},
        {"sweep": "x", "axes": {"learning_rte": [1]}},
        {"sweep": "x", "axes": {"seed": []}},
        {"sweep": "x", "axes": {"task": ["bitxor"]}},
        {"sweep": "x", "tabel": {}},
        {"sweep": "X y"},
        {"axes": {"seed": [0]}},
        {"sweep": "x", "trial": {"learning_rate": -1}},
        {"sweep": "x", "exclude": [{"task": "mnist", "missing": 3}]},
        {"sweep": "x", "exclude": [{}]},
        {"sweep": "x", "table": {"rows": "task", "convergence": {"smoothing": 0}}},
    ],
)
def test_the_json_schema_refuses(content: Any) -> None:
    assert not VALIDATOR.is_valid(content)


@pytest.mark.parametrize(
    "content",
    [
        {"sweep": "x"},
        {"sweep": "x", "trial": {"task": "bit-xor", "train": "all", "backbone.size": "tiny"}},
        {"sweep": "x", "trial": {"task": {"bits": 3}, "train": ["norm", "input"], "stop": None}},
        {"sweep": "x", "axes": {"arm": [{"label": "a", "steps": 3}]}},
        {"sweep": "x", "axes": {"task": ["bit-xor", {"name": "bit-xor", "label": "l", "bits": 9}]}},
        {"sweep": "x", "axes": {"task.bits": [1], "pretraining": ["mine"]}},
        {"sweep": "x", "zip": [{"seed": [1], "steps": [2]}], "exclude": [{"seed": [1, 2]}]},
        {"sweep": "x", "defaults": {"task": {"bit-xor": {"steps": 3}}}},
        {"sweep": "x", "exclude": [{"task": "mnist", "missing": "../data"}, {"present": "x"}]},
        {"sweep": "x", "table": {"rows": "task", "value": ["test_loss"], "convergence": {}}},
    ],
)
def test_the_json_schema_accepts(content: Any) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(content)] == []


def test_every_field_is_described() -> None:
    models: list[type[BaseModel]] = [
        TrialConfig, schema.SweepFile, schema.Block, schema.TableSpec, schema.ClaimSpec,
        schema.KeepSpec, schema.ConvergenceSpec,
    ]  # fmt: skip
    for model in models:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
