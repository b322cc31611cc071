"""The formula against torch's own counter, on tiny models; and what can be worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fpt import TrialConfig, build_model
from fpt.flops import evaluation_examples, training_flops
from tests.fpt.backbones import tiny

BATCH = 16  # rows that are read out then need no filling up
BITS = {"name": "bit-memory", "strings": 3, "bits": 160, "patch": 10}  # 64 tokens of 10
TREES = {
    "name": "listops", "max_depth": 4, "max_arguments": 5, "min_length": 4, "max_length": 32
}  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"layers": 3, "width": 32, "heads": 4},
    "bert": {"layers": 2, "width": 32, "heads": 4},
    "t5": {"layers": 2, "width": 32, "heads": 4},
    "vit": {"layers": 2, "width": 32, "heads": 4},
    "longformer": {"layers": 2, "width": 32, "heads": 4},
    "transformer": {"layers": 3, "width": 32, "heads": 4},
    "linformer": {"layers": 3, "width": 32, "heads": 4},
    "mixer": {"layers": 3, "width": 32, "heads": 1},
    "lstm-paper": {"layers": 3, "width": 32, "heads": 1},
}


def trial(name: str = "gpt2", **fields: Any) -> TrialConfig:
    """One step of one batch; its only evaluation is counted apart."""
    standard = {
        "task": BITS,
        "backbone": {"name": name, **SHAPES[name]},
        "pretraining": "random",
        "batch_size": BATCH,
        "steps": 1,
        "dropout": 0,
        "seed": 0,
    }
    return TrialConfig.model_validate(standard | fields)


def counted(config: TrialConfig) -> float:
    """A training step as torch counts it, and the evaluations' forward passes."""
    model = build_model([config])
    shape = config.task.shape(config.protocol)
    rng = np.random.default_rng(0)
    drawn: list[torch.Tensor | None] = [
        torch.from_numpy(rng.integers(0, shape.inputs, (BATCH, shape.tokens)))
        if shape.embedded
        else torch.from_numpy(rng.random((BATCH, shape.tokens, shape.inputs), np.float32))
    ]
    if config.backbone.name == "lstm-paper":
        states = (BATCH, config.backbone.layers, 2, config.backbone.width)
        drawn += [None, torch.from_numpy(rng.random(states, np.float32))]
    counter = FlopCounterMode(display=False)
    # The plain kernel: the fused one computes the scores once more in the backward pass.
    with sdpa_kernel(SDPBackend.MATH):
        with counter:
            model(*drawn)
        forward = counter.get_total_flops()
        with counter:
            loss: torch.Tensor = model(*drawn).logsumexp(-1).mean()
            loss.backward()  # type: ignore[no-untyped-call]
    return counter.get_total_flops() + evaluation_examples(config) * forward / BATCH


@pytest.mark.parametrize("train", ["fpt", "all", "output"])
@pytest.mark.parametrize("backbone", SHAPES)
def test_what_torch_counts(backbone: str, train: str) -> None:
    config = trial(backbone, train=train)

    # Longformer masks with a product of its own, of width 1. A cell of lstm-paper knows its initial
    # state, so that the first of its tokens needs one product less.
    tolerance = {"longformer": 0.03, "lstm-paper": 0.01}.get(backbone, 1e-9)
    assert training_flops(config) == pytest.approx(counted(config), rel=tolerance)


@pytest.mark.parametrize(
    "train",
    [
        ["norm", "output"],
        ["input", "output"],
        ["output", "position"],
        ["attention", "output"],
        ["feedforward", "output"],
        ["attention:last", "output"],
        ["attention:last", "feedforward", "input", "norm", "output", "position"],
    ],
    ids="+".join,
)
@pytest.mark.parametrize("task", [BITS, TREES], ids=lambda task: task["name"])
def test_what_torch_counts_where_little_trains(task: dict[str, Any], train: list[str]) -> None:
    config = trial(task=task, train=train)

    assert training_flops(config) == pytest.approx(counted(config), rel=1e-9)


OF_WEIGHTS: dict[str, dict[str, Any]] = {
    "llama": {},  # a gate, and two heads of keys
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "phi": {},
    "bert": {},
    "distilbert": {"hidden_dim": 40},
    "opt": {"ffn_dim": 72},
    "modernbert": {},
    "t5": {"feed_forward_proj": "gated-gelu", "d_kv": 16},
    "bart": {},
    "dinov2": {"mlp_ratio": 3},
    "dinov2_with_registers": {"use_swiglu_ffn": True},
    "whisper": {},
    "esm": {},
    "gptj": {"n_inner": 40},
    "perceiver": {"qk_channels": None, "v_channels": None, "self_attention_widening_factor": 2},
}
"""Families whose inner width is not four times the outer one, with changes to their config."""


@pytest.mark.parametrize("kind", OF_WEIGHTS)
def test_what_torch_counts_by_the_config_of_weights(kind: str, tmp_path: Path) -> None:
    tiny.save(kind, tmp_path, **OF_WEIGHTS[kind])
    backbone = {"name": "auto", "weights": str(tmp_path)}
    short = {"name": "bit-xor", "examples": 1, "bits": 8}

    for train in ("fpt", "all"):
        config = trial(task=short, backbone=backbone, train=train)
        # Rotary positions are a product of width 1.
        assert training_flops(config) == pytest.approx(counted(config), rel=2e-3), train


def test_a_frozen_product_goes_backward_once_and_a_trained_one_twice() -> None:
    # Of a wide backbone nearly all is in its products, which Kaplan et al. count as 6 N a token.
    wide = {"name": "gpt2", "layers": 2, "width": 1024, "heads": 16}
    # Half of the tokens are read out: behind its attention the last layer computes these alone.
    weights = (12 + 3 + 9 / 2) * 1024**2
    tokens = 10 * BATCH

    def once(train: Any) -> float:
        common = {"task": {"name": "bit-xor", "examples": 1}, "backbone": wide, "train": train}
        return training_flops(trial(**common)) / (tokens * weights)

    # Forward is 2, and 10 + 10 more tokens are the validation and the test example's.
    evaluation = 2 * 2 / BATCH
    assert once("all") == pytest.approx(6 + evaluation, rel=5e-3)
    assert once("fpt") == pytest.approx(4 + evaluation, rel=5e-3)
    assert once(["output"]) == pytest.approx(2 + evaluation, rel=5e-3)


def test_evaluations_read_whole_sets_or_random_batches() -> None:
    digits = {"task": "digits", "steps": 450, "evaluation": {"every": 100, "training_set": 50}}

    assert evaluation_examples(trial(**digits)) == 5 * 200 + 497 + 50
    assert evaluation_examples(trial(**digits, protocol="paper")) == 5 * 25 * BATCH + 50
    assert evaluation_examples(trial(steps=100)) == 63 + 63  # 160 bits each, 10,000 in all
    sizes = {"train": 9, "validation": 5, "test": 7}
    assert evaluation_examples(trial(task=TREES | sizes)) == 5 + 7


def test_without_data_the_sizes_of_its_sets_are_left_out() -> None:
    text = {"name": "text", "path": "/nowhere", "digest": "0" * 64}
    assert evaluation_examples(trial(task=text)) == 0
    folder = {"name": "mnist", "folder": "/nowhere", "validation": 11}
    assert evaluation_examples(trial(task=folder)) == 11
    assert evaluation_examples(trial(task="mnist")) == 5_000 + 10_000
