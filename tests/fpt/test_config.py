from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from fpt.config import TRAINABLE, TrialConfig
from fpt.files import DataError

BASE: dict[str, Any] = {
    "task": "bit-xor",
    "backbone": {"name": "gpt2", "layers": 2, "width": 32, "heads": 2},
    "pretraining": "random",
    "steps": 10,
    "seed": 3,
}


def make(**fields: Any) -> TrialConfig:
    return TrialConfig.model_validate(BASE | fields)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"task": "bit-xor"}, {"task": {"name": "bit-xor", "bits": 5}}),
        ({"train": "all"}, {"train": list(TRAINABLE)}),
        ({"train": ["norm", "input"]}, {"train": ["input", "norm"]}),
        ({"learning_rate": 1}, {"learning_rate": 1.0}),
        ({"backbone_seed": None}, {"backbone_seed": 3}),
        (
            {"backbone": {"name": "gpt2", "size": "base"}},
            {"backbone": {"name": "gpt2", "layers": 12, "width": 768, "heads": 12}},
        ),
        ({"evaluation": {"every": 100, "batches": 3}}, {"evaluation": {"every": 100}}),
    ],
)
def test_spellings_of_one_trial_have_one_identity(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert make(**one).identity() == make(**other).identity()


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 4},
        {"backbone_seed": 4},
        {"steps": 11},
        {"learning_rate": 2e-3},
        {"train": ["output"]},
        {"dropout": 0},
        {"protocol": "paper"},
        {"task": {"name": "bit-xor", "bits": 6}},
        {"backbone": {"name": "gpt2", "layers": 2, "width": 32, "heads": 4}},
        {"backbone": BASE["backbone"] | {"initialiser": "scaled"}},
        {"optimizer": {"clip": None}},
        {"stop": {"patience": 3}},
        {"pretraining": "trial:0123456789ab"},
    ],
)
def test_what_can_change_a_number_changes_the_identity(fields: dict[str, Any]) -> None:
    assert make(**fields).identity() != make().identity()


def test_the_shipped_backbone_enters_by_its_content() -> None:
    tiny = make(backbone={"name": "gpt2", "size": "tiny"}, pretraining="language")

    weights = tiny.identity()["backbone"]["weights"]

    assert weights.startswith("sha256:")
    assert len(weights) == len("sha256:") + 64


def test_weights_that_are_not_there_are_named() -> None:
    trial = make(backbone=BASE["backbone"] | {"weights": "no/such/folder"}, pretraining="language")

    with pytest.raises(DataError, match=r"no/such/folder.config\.json: missing"):
        trial.identity()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "bit_xor"}, "unknown task; tasks: bit-memory, bit-xor"),
        ({"backbone": "gpt3"}, "unknown backbone 'gpt3'; known: gpt2, bert"),
        ({"backbone": {"name": "gpt2", "size": "huge"}}, "has no size 'huge'; its sizes are tiny"),
        ({"backbone": BASE["backbone"] | {"heads": 3}}, "width 32 is not a multiple of heads 3"),
        ({"pretraining": "languages"}, "unknown pretraining 'languages'"),
        ({"pretraining": "language"}, "no pretrained gpt2 of this size is known"),
        (
            {"backbone": {"name": "gpt2", "size": "tiny"}, "pretraining": "protein"},
            "pretraining protein: gpt2 was pretrained on language",
        ),
        ({"backbone": "vit", "pretraining": "speech"}, "vit was pretrained on image"),
        ({"train": ["norm", "norm"]}, "names a group twice"),
        ({"train": ["attention", "attention:last"]}, "attention includes attention:last"),
        ({"train": ["token"]}, "Input should be"),
        ({"protocol": "paper", "stop": {"patience": 1}}, "no validation split to stop by"),
        ({"learning_rate": float("nan")}, "finite number"),
        ({"step": 5}, "Extra inputs are not permitted"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"dropout": 1}, "less than 1"),
        ({"train": []}, "at least 1 item"),
        ({"steps": True}, "should be a valid integer"),
        ({"steps": "2"}, "should be a valid integer"),
        ({"dropout": False}, "should be a valid number"),
        ({"backbone_seed": True}, "should be a valid integer"),
        ({"evaluation": {"every": 2**31}}, "less than 2147483648"),
        ({"backbone": {"name": "gpt2", "size": "tiny", "weights": "hub:"}}, "is not hub:ID"),
        (
            {"backbone": {"name": "gpt2", "size": "tiny", "heads": 2}, "pretraining": "language"},
            "no pretrained gpt2 of this size is known",
        ),
        (
            {
                "backbone": {
                    "name": "gpt2",
                    "layers": 4,
                    "width": 128,
                    "heads": 2,
                    "weights": "shipped:english",
                }
            },
            "shipped:english has 4 heads, not 2",
        ),
        (
            {
                "backbone": {
                    "name": "gpt2",
                    "size": "tiny",
                    "layers": 5,
                    "weights": "shipped:english",
                }
            },
            "shipped:english has 4 layers, not 5",
        ),
    ],
)
def test_a_wrong_field_is_refused_with_what_is_allowed(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        make(**fields)


def test_next_token_prediction_is_for_causal_backbones(tmp_path: Any) -> None:
    text = {"name": "text", "path": str(tmp_path)}

    with pytest.raises(ValidationError, match="use a causal backbone"):
        make(task=text, backbone={"name": "bert", "size": "tiny"})


def test_configs_need_no_torch() -> None:
    code = "import sys, fpt.config; print(sorted({'torch', 'transformers'} & set(sys.modules)))"

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert out.stdout.strip() == "[]"
