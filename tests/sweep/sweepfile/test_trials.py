from __future__ import annotations

import hashlib
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fpt.config import TrialConfig
from sweep.sweepfile import identity
from sweep.sweepfile.expansion import load
from sweep.sweepfile.identity import cell_id, hashed, trial_id
from sweep.sweepfile.schema import SweepFileError
from sweep.sweepfile.trials import Sweep

ROOT = Path(__file__).parents[3]

SMALL = {"name": "gpt2", "layers": 2, "width": 32, "heads": 2}
HEAD = """\
sweep: demo
trial:
  backbone: {name: gpt2, layers: 2, width: 32, heads: 2}
  pretraining: random
  steps: 10
"""


def expand(folder: Path, text: str) -> Sweep:
    file = folder / "sweep.yaml"
    file.write_text(text, encoding="utf-8")
    return load(file)


def expand_value(folder: Path, value: Any) -> Sweep:
    return expand(folder, json.dumps(value))  # JSON is YAML.


def problems_of(folder: Path, text: str) -> list[str]:
    with pytest.raises(SweepFileError) as caught:
        expand(folder, text)
    return [one.removeprefix(f"{folder / 'sweep.yaml'}:") for one in caught.value.problems]


def labels(sweep: Sweep) -> list[str]:
    return [point.label for point in sweep.points]


def config(**fields: Any) -> TrialConfig:
    base = {"task": "bit-xor", "backbone": SMALL, "pretraining": "random", "steps": 10, "seed": 0}
    return TrialConfig.model_validate(base | fields)


# --- identity


def test_ids_are_these() -> None:
    """Literals: a change of either needs a new IDENTITY_VERSION, and makes every ledger stale."""
    one = config()
    other = config(
        task={"name": "bit-memory", "bits": 50, "patch": 10},
        pretraining="trial:0123456789ab",
        train="all",
        protocol="paper",
        dropout=0,
        optimizer={"schedule": "cosine"},
    )
    assert (trial_id(one), cell_id(one)) == ("3396c56c8e1e", "c02f95e06f65")
    assert (trial_id(other), cell_id(other)) == ("811ecd279feb", "7397fe55bc03")


def test_an_id_is_a_digest_of_canonical_json() -> None:
    content = {"identity_version": 2, **hashed(config().identity())}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert trial_id(config()) == hashlib.sha256(text.encode()).hexdigest()[:12]


def test_ids_do_not_depend_on_the_process() -> None:
    code = (
        "from fpt import TrialConfig; from sweep.sweepfile.identity import trial_id, cell_id;"
        "c = TrialConfig(task='bit-xor', backbone='gpt2', pretraining='random', steps=9, seed=1);"
        "print(trial_id(c), cell_id(c))"
    )
    here = TrialConfig(task="bit-xor", backbone="gpt2", pretraining="random", steps=9, seed=1)  # type: ignore[arg-type]
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert done.stdout.split() == [trial_id(here), cell_id(here)]


SPELLINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"train": "all"}, {"train": ["position", "output", "norm", "input", "feedforward",
                                  "attention"]}),
    ({"train": ["norm", "input"]}, {"train": ["input", "norm"]}),
    ({"backbone": "gpt2"}, {"backbone": {"name": "gpt2", "size": "base"}}),
    ({"backbone": {"name": "gpt2", "size": "tiny"}},
     {"backbone": {"name": "gpt2", "layers": 4, "width": 128, "heads": 4}}),
    ({"dropout": 0}, {"dropout": 0.0}),
    ({"steps": 10}, {"steps": 1e1}),
    ({"learning_rate": 1}, {"learning_rate": 1.0}),
    ({"task": "bit-xor"}, {"task": {"name": "bit-xor", "bits": 5}}),
    ({}, {"backbone_seed": 0}),
    ({}, {"numerics": "fp32", "stop": None}),
    # The protocol sound evaluates on whole sets; weights that are not read do not matter.
    ({}, {"evaluation": {"batches": 3}}),
    ({}, {"backbone": {**SMALL, "weights": "hub:some/thing"}}),
    ({"pretraining": "trial:0123456789ab"},
     {"pretraining": "trial:0123456789ab", "backbone": {**SMALL, "initialiser": "scaled"}}),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), SPELLINGS)
def test_spellings_of_one_trial_have_one_id(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert trial_id(config(**one)) == trial_id(config(**other))


DIFFERENT: list[dict[str, Any]] = [
    {}, {"seed": 1}, {"steps": 11}, {"task": {"name": "bit-xor", "bits": 6}}, {"train": "all"},
    {"learning_rate": 2e-3}, {"protocol": "paper"}, {"backbone_seed": 1}, {"dropout": 0.2},
    {"pretraining": "trial:0123456789ab"}, {"pretraining": "trial:0123456789ac"},
    {"backbone": {**SMALL, "initialiser": "scaled"}}, {"batch_size": 8},
    {"evaluation": {"every": 5}}, {"protocol": "paper", "evaluation": {"batches": 3}},
    {"stop": {"patience": 3}}, {"optimizer": {"clip": None}}, {"task": "bit-memory"},
]  # fmt: skip


def test_whatever_changes_a_number_changes_the_id() -> None:
    ids = [trial_id(config(**fields)) for fields in DIFFERENT]
    assert len(set(ids)) == len(ids)


def test_a_version_of_the_task_or_of_the_identity_changes_the_id(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = trial_id(config())
    with monkeypatch.context() as patch:
        patch.setattr(type(config().task), "version", 99)
        assert trial_id(config()) != before
    with monkeypatch.context() as patch:
        patch.setattr(identity, "IDENTITY_VERSION", 99)
        assert trial_id(config()) != before


def test_a_field_added_later_keeps_old_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = TrialConfig.identity
    before = trial_id(config()), cell_id(config())

    def later(top: object, inner: object) -> None:
        def identity(self: TrialConfig) -> dict[str, Any]:
            old = ours(self)
            return {**old, "top": top, "optimizer": {**old["optimizer"], "inner": inner}}

        monkeypatch.setattr(TrialConfig, "identity", identity)

    monkeypatch.setitem(identity.ADDED_FIELDS, "top", None)
    monkeypatch.setitem(identity.ADDED_FIELDS, "optimizer.inner", 0.0)
    later(None, 0.0)
    assert (trial_id(config()), cell_id(config())) == before
    ids = {before[0]}
    for top, inner in ((1, 0.0), (None, 0.1), (None, None)):
        later(top, inner)
        ids.add(trial_id(config()))
    assert len(ids) == 4


def test_cells_leave_out_the_seed_and_a_draw_that_follows_it() -> None:
    follows = {cell_id(config(seed=seed)) for seed in range(3)}
    fixed = {cell_id(config(seed=seed, backbone_seed=0)) for seed in range(3)}
    assert len(follows) == len(fixed) == 1
    assert follows != fixed
    # A seed of a draw that is not made belongs to nothing.
    kept = {"pretraining": "trial:0123456789ab"}
    assert cell_id(config(**kept)) == cell_id(config(**kept, backbone_seed=3, seed=4))
    assert cell_id(config(steps=11)) != cell_id(config())


# --- expansion


def test_the_product_of_axes_in_order(tmp_path: Path) -> None:
    text = HEAD + (
        "axes:\n  pretraining: [random, bm]\n"
        "  task:\n  - bit-xor\n  - {label: xor-10, name: bit-xor, bits: 10}\n"
        "  seed: [0, 1]\n"
        "backbones:\n  bm: {task: bit-memory, seed: 0, steps: 1e2}\n"
    )
    sweep = expand(tmp_path, text)
    assert sweep.axes == ("pretraining", "task", "seed")
    assert labels(sweep) == [
        f"{source}/{task}/{seed}"
        for source in ("random", "bm")
        for task in ("bit-xor", "xor-10")
        for seed in (0, 1)
    ]
    (parent,) = sweep.pretrainings
    assert parent.labels == {"backbone": "bm"}
    assert parent.config.steps == 100
    assert parent.config.pretraining == "random"
    assert set(parent.config.train) == set(config(train="all").train)
    assert [point.parent for point in sweep.points] == [None] * 4 + [parent.trial_id] * 4
    assert [getattr(point.config.task, "bits") for point in sweep.points] == [5, 5, 10, 10] * 2  # noqa: B009
    assert sweep.all == (parent, *sweep.points)
    assert sweep.keeps_backbones == {parent.trial_id}
    assert sweep.points[0].where == f"{tmp_path / 'sweep.yaml'}:6"
    assert parent.where == f"{tmp_path / 'sweep.yaml'}:13"
    assert all(point.trial_id == trial_id(point.config) for point in sweep.all)
    assert all(point.cell_id == cell_id(point.config) for point in sweep.all)
    assert pickle.loads(pickle.dumps(sweep.points)) == sweep.points


def test_fields_under_one_label(tmp_path: Path) -> None:
    text = HEAD + (
        "axes:\n  task: [bit-xor]\n  seed: [0]\n"
        "  arm:\n  - {label: plain}\n  - {label: wide, backbone.width: 64, learning_rate: 1e-4}\n"
        "  - {label: 7, optimizer: {clip: null}}\n"
    )
    plain, wide, seven = expand(tmp_path, text).points
    assert [p.labels["arm"] for p in (plain, wide, seven)] == ["plain", "wide", "7"]
    assert plain.config == config()
    assert wide.config == config(backbone={**SMALL, "width": 64}, learning_rate=1e-4)
    assert seven.config == config(optimizer={"clip": None})


def test_layers_of_fields(tmp_path: Path) -> None:
    """`trial`, then `defaults`, then what a point says; names keep the rest of a mapping."""
    text = HEAD + (
        "  learning_rate: 1e-2\n  backbone.initialiser: scaled\n"
        "axes:\n  task:\n  - bit-xor\n  - {name: bit-xor, bits: 7, label: seven}\n  - bit-memory\n"
        "  seed: [0]\n"
        "defaults:\n  task:\n"
        "    bit-xor: {steps: 20, task.bits: 3}\n"
        "    seven: {steps: 21}\n"
        "    bit-memory: {task: {bits: 50, patch: 10}, learning_rate: 1e-4}\n"
    )
    found = [
        (p.labels["task"], p.config.steps, p.config.task.model_dump().get("bits"),
         p.config.learning_rate, p.config.backbone.initialiser)
        for p in expand(tmp_path, text).points
    ]  # fmt: skip
    assert found == [
        ("bit-xor", 20, 3, 1e-2, "scaled"),
        ("seven", 21, 7, 1e-2, "scaled"),
        ("bit-memory", 10, 50, 1e-4, "scaled"),
    ]


def test_a_null_takes_the_place_of_a_mapping_and_the_other_way_round(tmp_path: Path) -> None:
    text = HEAD + (
        "  stop: {patience: 3}\naxes:\n  task: [bit-xor]\n  seed: [0]\n"
        "  stop: [null, {patience: 5}]\n"
    )
    stops = [
        p.config.stop for p in expand(tmp_path, text.replace("  stop: {patience: 3}\n", "")).points
    ]
    assert [stop and stop.patience for stop in stops] == [None, 5]
    text = HEAD + (
        "  stop: {patience: 3}\naxes:\n  task: [bit-xor]\n  seed: [0]\n"
        "  arm: [{label: a}, {label: b, stop: null}, {label: c, stop.tolerance: 0.5}]\n"
    )
    stops = [p.config.stop for p in expand(tmp_path, text).points]
    assert [stop and (stop.patience, stop.tolerance) for stop in stops] == [(3, 0), None, (3, 0.5)]


def test_axes_in_step(tmp_path: Path) -> None:
    text = HEAD + (
        "axes: {task: [bit-xor], seed: [0, 1]}\n"
        "zip:\n- {learning_rate: [1e-3, 1e-4], batch_size: [8, 16]}\n"
    )
    sweep = expand(tmp_path, text)
    assert sweep.axes == ("task", "seed", "learning_rate", "batch_size")
    assert labels(sweep) == [
        "bit-xor/0/0.001/8", "bit-xor/0/0.0001/16", "bit-xor/1/0.001/8", "bit-xor/1/0.0001/16",
    ]  # fmt: skip


def test_further_blocks(tmp_path: Path) -> None:
    text = HEAD + (
        "axes:\n  task: [bit-xor, bit-memory]\n  arm: [{label: frozen}]\n  seed: [0, 1]\n"
        "exclude:\n- {task: bit-memory, seed: 1}\n"
        "include:\n"
        "- trial: {learning_rate: 1e-4}\n"
        "  axes:\n    arm: [{label: full, train: all}]\n    dropout: [0]\n"
        "  exclude: [{seed: 0}]\n"
    )
    sweep = expand(tmp_path, text)
    assert labels(sweep) == [
        "bit-xor/frozen/0", "bit-xor/frozen/1", "bit-memory/frozen/0", "bit-xor/full/1/0",
    ]  # fmt: skip
    assert sweep.axes == ("task", "arm", "seed", "dropout")
    assert sweep.points[-1].config == config(seed=1, train="all", dropout=0, learning_rate=1e-4)
    assert sweep.points[-1].where == f"{tmp_path / 'sweep.yaml'}:13"


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("{seed: 0}", {"a/bit-xor/1", "a/bit-memory/1", "b/bit-xor/1", "b/bit-memory/1"}),
        ("{seed: [0, 1], arm: a}", {f"b/{t}/{s}" for t in ("bit-xor", "bit-memory") for s in "01"}),
        ("{task: '*-xor'}", {f"{a}/bit-memory/{s}" for a in "ab" for s in "01"}),
        ("{task.name: bit-xor, arm: b, seed: 1}",
         {"a/bit-xor/0", "a/bit-xor/1", "a/bit-memory/0", "a/bit-memory/1", "b/bit-xor/0",
          "b/bit-memory/0", "b/bit-memory/1"}),
        ("{backbone.layers: 1}", {f"a/{t}/{s}" for t in ("bit-xor", "bit-memory") for s in "01"}),
        ("{dropout: 0.1, arm: a}", {f"b/{t}/{s}" for t in ("bit-xor", "bit-memory") for s in "01"}),
        ("{backbone.initialiser: plain, arm: a}",
         {f"b/{t}/{s}" for t in ("bit-xor", "bit-memory") for s in "01"}),
    ],
)  # fmt: skip
def test_patterns_leave_trials_out(tmp_path: Path, pattern: str, left: set[str]) -> None:
    text = HEAD + (
        "axes:\n  arm: [{label: a}, {label: b, backbone.layers: 1}]\n"
        f"  task: [bit-xor, bit-memory]\n  seed: [0, 1]\nexclude: [{pattern}]\n"
    )
    assert set(labels(expand(tmp_path, text))) == left


CONDITIONAL = HEAD + (
    "axes:\n  task: [bit-xor, {name: mnist, folder: data/mnist}, {label: d, task: digits}]\n"
    "  seed: [0, 1]\n"
    "exclude:\n"
    "- {task: mnist, missing: data/mnist}\n"
    "- {task: [d, nothing], present: data/mnist}\n"
)


def test_patterns_that_hold_where_a_path_is_missing_or_present(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = expand(tmp_path, CONDITIONAL)
    (tmp_path / "data/mnist").mkdir(parents=True)
    problems = problems_of(tmp_path, CONDITIONAL)  # the folder is empty, which is told now
    (tmp_path / "data/mnist").rmdir()
    (tmp_path / "elsewhere/mnist").mkdir(parents=True)
    (tmp_path / "elsewhere/digits").touch()
    monkeypatch.setenv("HERE", str(tmp_path / "elsewhere"))
    with_ = expand(
        tmp_path,
        CONDITIONAL.replace("{task: mnist, missing: data", "{task: mnist, missing: $THERE")
        .replace("present: data", "present: $HERE"),
    )  # fmt: skip

    assert labels(without) == ["bit-xor/0", "bit-xor/1", "d/0", "d/1"]
    assert [str(one) for one in without.left_out] == [
        "2 trials of task mnist: data/mnist is not there"
    ]
    assert all("mnist" in one for one in problems)
    assert labels(with_) == ["bit-xor/0", "bit-xor/1"]
    assert [str(one) for one in with_.left_out] == [
        "2 trials of task mnist: $THERE/mnist is not there",
        "2 trials of task d or nothing: $HERE/mnist is there",
    ]


def test_a_block_may_be_left_out_whole_and_an_unconditional_pattern_is_not_told(
    tmp_path: Path,
) -> None:
    text = HEAD + (
        "axes:\n  task: [bit-xor]\n  seed: [0, 1]\n"
        "include:\n- trial: {dropout: 0}\n  exclude: [{missing: there}, {seed: 0}]\n"
    )
    sweep = expand(tmp_path, text)
    assert labels(sweep) == ["bit-xor/0", "bit-xor/1"]
    assert [str(one) for one in sweep.left_out] == ["1 trial: there is not there"]
    (tmp_path / "there").touch()
    assert labels(expand(tmp_path, text)) == ["bit-xor/0", "bit-xor/1", "bit-xor/1"]


@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("package:fpt", True),
        ("package:fpt/shipped/english", True),
        ("package:fpt/shipped/klingon", False),
        ("package:fpt.tasks", True),
        ("package:no_such_package/model", False),
        ("package:no_such_package.inner", False),
        ("package:", False),
        (".", True),
        ("~", True),
        ("/nowhere/at/all", False),
    ],
)
def test_what_is_on_this_machine(tmp_path: Path, path: str, there: bool) -> None:
    text = HEAD + "axes:\n  task: [bit-xor]\n  seed: [0, 1]\n"
    sweep = expand(tmp_path, text + f"exclude: [{{seed: 0, missing: '{path}'}}]\n")
    assert labels(sweep) == ["bit-xor/0", "bit-xor/1"][not there :]


def test_what_would_be_wrong_may_be_left_out(tmp_path: Path) -> None:
    text = HEAD.replace("layers: 2, width: 32, heads: 2", "size: base") + (
        "axes:\n  backbone.name: [gpt2, bert]\n  task: [bit-xor, {name: text, path: .}]\n"
        "  seed: [0]\n"
    )
    assert "which bert can see" in "".join(problems_of(tmp_path, text))
    (tmp_path / "words.txt").write_text("words " * 1000)
    sweep = expand(tmp_path, text + "exclude: [{backbone.name: bert, task: text}]\n")
    assert labels(sweep) == ["gpt2/bit-xor/0", "gpt2/text/0", "bert/bit-xor/0"]


def test_files_without_axes(tmp_path: Path) -> None:
    (point,) = expand(tmp_path, HEAD + "  task: bit-xor\n  seed: 0\n").points
    assert (point.config, point.labels, point.label) == (config(), {}, "")
    only = expand(tmp_path, HEAD + "backbones:\n  one: {task: bit-xor, seed: 0}\n")
    assert only.points == ()
    assert [p.label for p in only.pretrainings] == ["one"]


def test_pretrainings_of_pretrainings_come_in_order(tmp_path: Path) -> None:
    text = HEAD + (
        "  task: bit-xor\n  seed: 0\nbackbones:\n  b: {pretraining: a, steps: 11}\n"
        "  c: {pretraining: b, steps: 12}\n  a: {steps: 13}\n"
        "axes: {pretraining: [c, a]}\n"
    )
    sweep = expand(tmp_path, text)
    assert [p.label for p in sweep.pretrainings] == ["a", "b", "c"]
    a, b, c = sweep.pretrainings
    assert [p.parent for p in (a, b, c)] == [None, a.trial_id, b.trial_id]
    assert [p.parent for p in sweep.points] == [c.trial_id, a.trial_id]


def test_a_trial_that_is_a_pretraining_too_is_run_once(tmp_path: Path) -> None:
    text = HEAD + (
        "  task: bit-xor\n  train: all\nbackbones:\n  a: {seed: 0}\naxes: {seed: [0, 1]}\n"
    )
    sweep = expand(tmp_path, text)
    assert sweep.points[0].trial_id == sweep.pretrainings[0].trial_id
    assert [p.label for p in sweep.all] == ["a", "1"]


def test_relative_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "words.txt").write_text("words " * 1000)
    (tmp_path / "elsewhere").mkdir()
    text = HEAD + "axes:\n  task: [{name: text, path: words.txt}]\n  seed: [0]\n"
    there = expand(tmp_path, text)
    monkeypatch.chdir(tmp_path / "elsewhere")
    (again,) = load("../sweep.yaml").points
    assert again.config == there.points[0].config
    assert getattr(again.config.task, "path") == tmp_path / "words.txt"  # noqa: B009
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WORDS", str(tmp_path))
    for spelled in ("~/words.txt", "$WORDS/words.txt", str(tmp_path / "words.txt")):
        (point,) = expand(tmp_path, text.replace("words.txt", spelled)).points
        assert point.trial_id == again.trial_id


def test_weights_in_a_folder_beside_the_file(tmp_path: Path) -> None:
    text = HEAD.replace("heads: 2", "heads: 2, weights: mine").replace("random", "language") + (
        "axes:\n  task: [bit-xor, bit-memory]\n  seed: [0]\n"
    )
    (told,) = problems_of(tmp_path, text)
    assert told.startswith(f"6: axes: bit-xor/0: {tmp_path}/mine/config.json: missing; ")
    assert told.endswith("(and 1 more trials)")
    (tmp_path / "mine").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "mine" / name).write_text("{}")
    here = expand(tmp_path, text)
    (tmp_path / "b").mkdir()
    (tmp_path / "mine").rename(tmp_path / "b" / "mine")
    there = expand(tmp_path / "b", text)
    assert [p.trial_id for p in here.points] == [p.trial_id for p in there.points]


# --- problems

BODY = "axes:\n  task: [bit-xor]\n  seed: [0]\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        # Fields: told once, where they are written.
        ("  stepz: 1\n" + BODY,
         ["6: trial.stepz: no such field; did you mean 'steps'; allowed: task, backbone, "]),
        ("  steps: 12\n" + BODY, ["6: trial.steps: given twice, first on line 5"]),
        ("  batch_size: many\n" + BODY, ["6: trial.batch_size: 'many' should be a valid integer"]),
        ("  batch_size: 0\n" + BODY, ["6: trial.batch_size: 0 should be greater than or equal"]),
        ("  dropout: .nan\n" + BODY, ["6: trial.dropout: nan should be"]),
        ("  backbone.size: tiny\n  backbone.layers: 3\n" + BODY,
         ["7: trial.backbone.layers: given twice in one place"]),
        ("  protocol: papr\n" + BODY,
         ["6: trial.protocol: 'papr' is not known; did you mean 'paper'; allowed: paper, sound"]),
        ("  train: [norm, atention]\n" + BODY,
         ["6: trial.train[1]: 'atention' is not known; did you mean 'attention'; allowed: "]),
        ("  train: [norm, norm]\n" + BODY, ["6: trial.train: names a group twice"]),
        ("  optimizer: {clipp: 1}\n" + BODY,
         ["6: trial.optimizer.clipp: no such field; did you mean 'clip'; allowed: name, beta1"]),
        ("  evaluation.evry: 1\n" + BODY,
         ["6: trial.evaluation.evry: no such field; did you mean 'every'"]),
        ("  stop: {patience: 1}\n  protocol: paper\n" + BODY,
         ["8: axes: bit-xor/0: stop: the protocol paper has no validation split"]),
        # Tasks and backbones.
        ("axes:\n  seed: [0]\n  task:\n  - bitxor\n  - {name: bit-xor, bitz: 3}",
         ["9: axes.task[0]: no task is called 'bitxor'; did you mean 'bit-xor'; allowed: bit-m",
          "10: axes.task[1].bitz: no such field; did you mean 'bits'; allowed: name, examples, b"]),
        ("axes:\n  task: [{bits: 3}]\n  seed: [0]\n",
         ["7: axes.task[0]: name: missing; allowed: bit-memory, "]),
        ("axes:\n  task: [{name: bit-memory, bits: 55}]\n  seed: [0]\n",
         ["7: axes.task[0]: bits 55 is not a multiple of patch 50"]),
        ("  task: {name: [1]}\naxes: {seed: [0]}\n",
         ["6: trial.task.name: no task is called [1]; allowed: "]),
        ("axes:\n  task: [bit-xor]\n  seed: [0]\n  backbone.name: [gpt3]\n",
         ["9: axes.backbone.name[0]: no backbone is called 'gpt3'; did you mean 'gpt2'"]),
        ("axes:\n  task: [bit-xor]\n  seed: [0]\n  backbone.size: [tinny]\n",
         ["9: axes.backbone.size[0]: gpt2 has no size 'tinny'; did you mean 'tiny'"]),
        ("  backbone.heads: 5\n" + BODY, ["6: trial.backbone.heads: given twice in one place"]),
        # Axes.
        ("axes:\n  task: [bit-xor]\n  seed: [0]\n  learning_rat: [1, 2]\n",
         ["9: axes.learning_rat: no such field (an axis of another name has points {label: ..., "]),
        ("axes:\n  task: [bit-xor]\n  seed: [0]\n  arm: [{steps: 1}]\n",
         ["9: axes.arm[0]: a point that sets several fields needs a label"]),
        ("axes:\n  task: [bit-xor]\n  seed:\n  - 0\n  - 1\n  - 0\n",
         ["11: axes.seed[2]: '0' is given twice, first on line 9"]),
        ("axes:\n  task: [bit-xor, {name: bit-xor, bits: 3}]\n  seed: [0]\n",
         ["7: axes.task[1]: 'bit-xor' is given twice, first on line 7; give each point a label"]),
        ("axes:\n  task: [bit-xor]\n  seed: [0]\n  steps: [1]\n  a: [{label: x, steps: 3}]\n",
         ["6: axes: the axes steps and a both set steps"]),
        (BODY + "include:\n- trial: {seed: 1}\n",
         ["10: include[0].trial.seed: never used, since every point of axis seed sets it; give t",
          "10: include[0]: this block and the one at "]),
        ("zip: [{seed: [0, 1], batch_size: [1]}]\naxes: {task: [bit-xor]}\n",
         ["6: zip[0]: axes that go in step have to be of one length; seed has 2, batch_si"]),
        ("zip: [{seed: [0, 1]}]\naxes: {task: [bit-xor], seed: [2]}\n",
         ["6: zip[0].seed: is an axis of this block already"]),
        # Points that are one trial.
        ("axes:\n  task: [bit-xor, {label: same, name: bit-xor, bits: 5}]\n  seed: [0, 1]\n",
         ["6: axes: points 'bit-xor' and 'same' of axis task make one and the same trial: "]),
        ("axes:\n  task: [bit-xor]\n  seed: [1, 1.0]\n",
         ["6: axes: points '1' and '1.0' of axis seed make one and the same trial: "]),
        (BODY + "include:\n- trial: {dropout: 0.1}\n",
         ["10: include[0]: this block and the one at "]),
        # Missing fields.
        ("axes: {seed: [0]}\n",
         ["2: trial.task: missing; give it under `trial:`, or as an axis"]),
        ("  task: bit-xor\n", ["2: trial.seed: missing; give it under `trial:`, or as an axis"]),
        ("backbones:\n  a: {task: bit-xor}\n",
         ["7: backbones.a.seed: missing; give it under `trial:`, or as an axis"]),
        # Defaults and patterns.
        (BODY + "defaults: {task: {bitxor: {steps: 3}}}\n",
         ["9: defaults.task.bitxor: no trial's task is 'bitxor'"]),
        (BODY + "defaults: {tusk: {bit-xor: {steps: 3}}}\n",
         ["9: defaults.tusk: neither a field of the trial nor an axis; did you mean 'task'"]),
        (BODY + "exclude: [{seed: 7}]\n", ["9: exclude[0]: leaves out nothing"]),
        (BODY + "exclude: [{seed: 7, missing: .}]\n", ["9: exclude[0]: leaves out nothing"]),
        (BODY + "exclude: [{seed: 7, missing: nowhere}]\n", ["9: exclude[0]: leaves out nothing"]),
        (BODY + "exclude: [{}]\n", ["9: exclude[0]: leaves out nothing"]),
        (BODY + "exclude: [{seed: 0, missing: 3}]\n",
         ["9: exclude[0].missing: has to be a path, from the sweep file's folder, or package:"]),
        (BODY + "exclude: [{seed: 0, missing: a, present: b}]\n",
         ["9: exclude[0]: missing and present in one pattern; give each a pattern of its own"]),
        (BODY + "exclude: [{sed: 0}]\n",
         ["9: exclude[0].sed: neither a field of the trial nor an axis; did you mean 'seed'"]),
        # Pretrainings.
        (BODY + "  pretraining: [bm]\nbackbones:\n  bmm: {task: bit-xor, seed: 1}\n",
         ["9: axes.pretraining[0]: no pretraining is called 'bm'; did you mean 'bmm'; allowed: l"]),
        ("backbones:\n  random: {task: bit-xor, seed: 1}\n" + BODY,
         ["7: backbones.random: is the name of a pretraining already"]),
        ("backbones:\n  a: {task: bit-xor, seed: 1, pretraining: b}\n"
         "  b: {task: bit-xor, seed: 1, pretraining: a}\n" + BODY,
         ["7: backbones.a: takes the backbone that it trains itself: a -> b -> a"]),
        ("backbones:\n  a: {task: bit-xor, seed: 1}\n  b: {task: bit-xor, seed: 1}\n" + BODY,
         ["8: backbones.b: is one and the same trial as backbones.a"]),
        ("backbones:\n  a: {task: bit-xor, seed: 1, backbone.layers: 1}\n" + BODY
         + "  source: [{label: a, pretraining: a}]\n",
         ["11: axes.source[0].pretraining: a trains gpt2 (1 layers of 32, 2 heads), which is n"]),
    ],
)  # fmt: skip
def test_problems_with_trials(tmp_path: Path, text: str, told: list[str]) -> None:
    found = problems_of(tmp_path, HEAD + text)
    assert [one[: len(start)] for one, start in zip(found, told, strict=True)] == told


def test_a_pretraining_may_be_deeper_than_who_takes_it_over(tmp_path: Path) -> None:
    text = HEAD + BODY + (
        "  source: [{label: a, pretraining: a}]\n"
        "backbones:\n  a: {task: bit-xor, seed: 1, backbone.layers: 3}\n"
    )  # fmt: skip
    (point,) = expand(tmp_path, text).points
    assert point.config.backbone.layers == 2


def test_one_problem_of_many_trials_is_told_once(tmp_path: Path) -> None:
    text = HEAD + f"  stepz: 1\naxes:\n  task: [bit-xor, bit-memory]\n  seed: {list(range(42))}\n"
    assert len(problems_of(tmp_path, text)) == 1


def test_problems_of_every_kind_are_told_together(tmp_path: Path) -> None:
    text = (
        "sweep: Bad Name\ntabel: 3\n"
        "trial:\n  backbone: {name: gpt2, size: tinny}\n  stepz: 10\n  steps: many\n  steps: 2\n"
        "axes:\n  pretraining: [random, languge]\n  learnin_rate: [1]\n  task: [bit-xor, bitxor]\n"
        "  seed: [0, 0]\n  empty: []\ntable: {rows: pretraning, columns: task, reference: T99}\n"
    )
    places = [one.split(": ")[1] for one in problems_of(tmp_path, text)]
    assert places == [
        "sweep", "tabel", "trial.backbone.size", "trial.stepz", "trial.steps", "trial.steps",
        "axes.pretraining[1]", "axes.learnin_rate", "axes.task[1]", "axes.seed[1]", "axes.empty",
        "table.reference", "table.rows",
    ]  # fmt: skip


def axes(*sizes: int) -> str:
    """Labelled axes of so many points each."""
    return "".join(
        f"  a{n}: [{', '.join(f'{{label: {i}}}' for i in range(size))}]\n"
        for n, size in enumerate(sizes)
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (axes(*[100] * 5), "axes: makes 10,000,000,000 trials; the most is 100,000, before"),
        (axes(1000, 1000), "axes: makes 1,000,000 trials; the most is"),
        (axes(1000, 1000) + "exclude: [{a0: '1*'}]\n", "axes: makes 1,000,000 trials"),
        (axes(1000) + "zip:\n-" + axes(101)[1:].replace("a0", "b"), "axes: makes 101,000 trials"),
        (axes(1000) + "include:\n- axes:\n  " + axes(100).replace("a0", "b"),
         "include[0]: makes 100,000 trials, the file 101,000; the most is"),
    ],
)  # fmt: skip
def test_too_many_trials_are_refused_before_they_are_made(
    tmp_path: Path, text: str, told: str
) -> None:
    (found,) = problems_of(tmp_path, HEAD + BODY + text)
    assert told in found


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        ("[{task: bit-xor}]", "exclude[0]: leaves out all 3 trials; a sweep has at least one"),
        ("[{task: bit-*, seed: [0, 1, 2]}]", "exclude[0]: leaves out all 3 trials;"),
        ("[{seed: 0}, {seed: [1, 2]}]",
         "exclude: exclude[0] (line 9) and exclude[1] (line 9) leave out all 3 trials;"),
        ("[{task: bit-xor, missing: nowhere}]",
         "exclude[0]: leaves out all 3 trials on this machine (nowhere is not there);"),
        ("[{seed: 0}, {seed: '*', present: .}]",
         "exclude: exclude[0] (line 9) and exclude[1] (line 9) leave out all 3 trials on this m"),
    ],
)  # fmt: skip
def test_a_sweep_without_a_trial_is_refused(tmp_path: Path, patterns: str, told: str) -> None:
    text = HEAD + "axes:\n  task: [bit-xor]\n  seed: [0, 1, 2]\n" + f"exclude: {patterns}\n"
    (found,) = problems_of(tmp_path, text)
    assert told in found


AXES_OF_THREE = (
    "axes:\n  task: [bit-xor, bit-memory]\n  train: [norm, output]\n  dropout: [0, 0.1]\n"
    "  seed: [0, 1]\n"
)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("{rows: task, columns: train}", "bit-xor / norm holds 2 configs, by axis dropout; make d"),
        ("{rows: task, columns: seed}", "bit-xor / 0 holds 4 configs, by axis train and axis drop"),
        ("{rows: dropout, value: [test_loss]}", "0 holds 4 configs, by axis task and axis train;"),
    ],
)
def test_a_table_that_mixes_configs_is_refused_before_training(
    tmp_path: Path, table: str, told: str
) -> None:
    (found,) = problems_of(tmp_path, HEAD + AXES_OF_THREE + f"table: {table}\n")
    assert found.startswith("11: table: a cell is one config over its seeds, but ")
    assert told in found


def test_a_table_whose_third_axis_has_one_point_is_one(tmp_path: Path) -> None:
    text = HEAD + AXES_OF_THREE.replace("[0, 0.1]", "[0]") + "table: {rows: task, columns: train}\n"
    assert len(expand(tmp_path, text).points) == 8
    # Of blocks that make one cell with two configs, no axis is to blame.
    blocks = (
        "trial: {task: bit-xor, pretraining: random, steps: 3}\n"
        "axes: {train: [norm], seed: [0]}\n"
        "include: [{trial: {dropout: 0.3}}]\ntable: {rows: train, columns: seed}\n"
    )
    (found,) = problems_of(tmp_path, f"sweep: x\n{blocks}")
    assert "norm / 0 holds 2 configs, by blocks of the file: " in found


def test_minus_zero_is_zero(tmp_path: Path) -> None:
    assert trial_id(config(dropout=-0.0)) == trial_id(config(dropout=0))
    assert trial_id(config(optimizer={"beta1": -0.0})) == trial_id(config(optimizer={"beta1": 0}))
    assert repr(config(dropout=-0.0).dropout) == "0.0"
    stops = "[{label: a, patience: 1, tolerance: 0}, {label: b, patience: 1, tolerance: -0e3}]"
    for field, points in (("dropout", "[0, -0.0]"), ("stop", stops)):
        (told,) = problems_of(tmp_path, HEAD + BODY + f"  {field}: {points}\n")
        assert "make one and the same trial" in told
    (told,) = problems_of(tmp_path, HEAD + BODY + "  optimizer.beta2: [-0.0, 0.0]\n")
    assert "'0.0' is given twice" in told


# --- properties

AXES: dict[str, st.SearchStrategy[list[Any]]] = {
    "seed": st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
    "task": st.lists(
        st.sampled_from(["bit-xor", "bit-memory", "digits"]), min_size=1, max_size=3, unique=True
    ),
    "learning_rate": st.lists(st.sampled_from([1e-4, 0.5]), min_size=1, unique=True),
    "batch_size": st.lists(st.integers(1, 8), min_size=1, max_size=2, unique=True),
    "pretraining": st.lists(st.sampled_from(["random", "own"]), min_size=1, unique=True),
    "train": st.lists(st.sampled_from(["all", "norm"]), min_size=1, unique=True),
}
quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(axes=st.fixed_dictionaries(AXES), data=st.data())
def test_expansion_is_the_product_without_what_is_excluded(
    tmp_path: Path, axes: dict[str, list[Any]], data: st.DataObject
) -> None:
    names = data.draw(st.permutations(list(axes)))
    axes = {name: axes[name] for name in names}
    product = 1
    for points in axes.values():
        product *= len(points)
    value: dict[str, Any] = {
        "sweep": "demo",
        "trial": {"backbone": SMALL, "steps": 10},
        "backbones": {"own": {"task": "bit-xor", "seed": 3}},
        "axes": axes,
    }
    pattern = {
        name: data.draw(st.lists(st.sampled_from(axes[name]), min_size=1, unique=True))
        for name in data.draw(st.sets(st.sampled_from(names), min_size=1))
    }
    fewer = product
    if data.draw(st.booleans()):
        value["exclude"] = [pattern]
        gone = 1
        for name, points in axes.items():
            gone *= len(pattern.get(name, points))
        fewer -= gone
    if not fewer:
        with pytest.raises(SweepFileError, match="a sweep has at least one"):
            expand_value(tmp_path, value)
        return
    sweep = expand_value(tmp_path, value)
    assert len(sweep.points) == fewer
    assert len({point.trial_id for point in sweep.points}) == fewer
    for point in sweep.points:
        assert list(point.labels) == names
        assert str(point.config.seed) == point.labels["seed"]
        assert point.config.task.name == point.labels["task"]
    cells = {tuple(n for a, n in p.labels.items() if a != "seed") for p in sweep.points}
    assert len({point.cell_id for point in sweep.points}) == len(cells)


def shuffled(value: Any, rng: random.Random) -> Any:
    """Every mapping in another order of its keys."""
    if isinstance(value, dict):
        keys = rng.sample(list(value), len(value))
        return {key: shuffled(value[key], rng) for key in keys}
    return value


@quick
@given(rng=st.randoms(use_true_random=False))
def test_ids_do_not_depend_on_order(tmp_path: Path, rng: random.Random) -> None:
    value = {
        "sweep": "demo",
        "trial": {"backbone": SMALL, "optimizer": {"beta1": 0.8, "clip": 2}, "steps": 10},
        "backbones": {
            "own": {"task": {"name": "bit-memory", "bits": 50, "patch": 10}, "seed": 3},
            "more": {"task": "bit-xor", "pretraining": "own", "seed": 4},
        },
        "axes": {"pretraining": ["more", "own", "random"], "task": ["bit-xor"], "seed": [0, 1]},
        "defaults": {"task": {"bit-xor": {"task.bits": 3, "steps": 12}}},
    }
    ids = {point.trial_id for point in expand_value(tmp_path, value).all}
    other = shuffled(value, rng)
    for name, points in other["axes"].items():
        other["axes"][name] = rng.sample(points, len(points))
    assert {point.trial_id for point in expand_value(tmp_path, other).all} == ids


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2**70)
    | st.floats()
    | st.sampled_from(
        ["gpt2", "bit-xor", "random", "all", "tiny", "$X", "~", "a\0b", "x" * 300, ""]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["name", "size", "bits", "path", "label", "weights", "a.b", ".", "every"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
FIELDS = [*TrialConfig.model_fields, "task.bits", "backbone.size", "backbone.weights", "task.path"]


@settings(quick, max_examples=200)
@given(
    trial=st.dictionaries(st.sampled_from(FIELDS), anything, max_size=3),
    axes=st.dictionaries(
        st.sampled_from([*FIELDS, "arm"]), st.lists(anything, max_size=3), max_size=3
    ),
    rest=st.dictionaries(
        st.sampled_from(
            ["defaults", "backbones", "exclude", "include", "zip", "table", "claims", "keep"]
        ),
        anything | st.dictionaries(st.sampled_from(FIELDS), anything, max_size=2)
        | st.lists(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=2), max_size=2),
        max_size=2,
    ),
)  # fmt: skip
def test_whatever_is_written_is_read_or_told(
    tmp_path: Path, trial: Any, axes: Any, rest: Any
) -> None:
    base = {"task": "bit-xor", "backbone": SMALL, "pretraining": "random", "steps": 3, "seed": 0}
    value = {"sweep": "x", "trial": base | trial, "axes": axes, **rest}
    problems: tuple[str, ...] = ()
    try:
        expand_value(tmp_path, value)
    except SweepFileError as error:
        problems = error.problems
    assert all(one.startswith(str(tmp_path)) for one in problems)


# --- what ships


def test_the_quickstart() -> None:
    sweep = load(ROOT / "experiments" / "quickstart.yaml")
    assert len(sweep.points) == 4 * 4 * 3
    assert sweep.axes == ("pretraining", "task", "seed")
    assert [point.label for point in sweep.pretrainings] == ["bit-memory"]
    assert sweep.table is not None
    assert sweep.table.reference == "T2"
    parent, *_ = sweep.pretrainings
    arm = next(point for point in sweep.points if point.label == "language/bit-memory/0")
    assert parent.config.task == arm.config.task


def test_planning_needs_neither_torch_nor_ray_nor_pandas() -> None:
    code = (
        "import sys, sweep.planning.plan, sweep.sweepfile.trials, sweep.sweepfile.schema;"
        "print([m for m in ('torch', 'ray', 'pandas', 'mlflow', 'scipy', 'sklearn', 'transformers')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
