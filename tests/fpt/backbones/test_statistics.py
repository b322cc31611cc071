"""Initialisation statistics: of tensors known by hand, and of backbones whose draw is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fpt.backbones import BACKBONES
from fpt.backbones.statistics import Statistics, statistics
from fpt.config import TrialConfig
from fpt.groups import PREFIX
from fpt.model import build_model

TENSORS = {
    "wpe.weight": torch.tensor([[1.0, 2.0], [3.0, 6.0]]),
    "h.1.ln_1.weight": torch.tensor([1.0, 3.0]),
    "h.1.ln_2.weight": torch.tensor([5.0]),
    "h.1.ln_1.bias": torch.tensor([-1.0, 1.0]),
    "h.0.attn.c_attn.weight": torch.tensor([[2.0, 4.0]]),
    "h.10.ln_1.weight": torch.tensor([0.0]),
}


def test_tensors_of_a_layer_a_group_and_a_kind_are_pooled() -> None:
    groups = dict.fromkeys(TENSORS, "norm") | {
        "wpe.weight": "position", "h.0.attn.c_attn.weight": "attention"
    }  # fmt: skip

    found = statistics(TENSORS, groups, r"^h\.(\d+)\.")  # type: ignore[arg-type]

    assert found == [
        Statistics(None, "position", "matrix", 1, 4, 3.0, 3.5**0.5, 1.0, 6.0),
        Statistics(0, "attention", "matrix", 1, 2, 3.0, 1.0, 2.0, 4.0),
        Statistics(1, "norm", "bias", 1, 2, 0.0, 1.0, -1.0, 1.0),
        Statistics(1, "norm", "weight", 2, 3, 3.0, pytest.approx((8 / 3) ** 0.5), 1.0, 5.0),
        Statistics(10, "norm", "weight", 1, 1, 0.0, 0.0, 0.0, 0.0),
    ]


@pytest.mark.parametrize("initialiser", ["plain", "scaled"])
def test_a_random_backbone_is_what_its_initialiser_says(initialiser: str) -> None:
    trial = TrialConfig.model_validate(
        {
            "task": "bit-xor", "pretraining": "random", "steps": 1, "seed": 0,
            "backbone": {"name": "gpt2", "layers": 2, "width": 64, "heads": 2,
                         "initialiser": initialiser},
        }
    )  # fmt: skip
    model = build_model([trial])
    own = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in model.member(0).items()
        if name.startswith(PREFIX)
    }
    groups = {name: model.groups[PREFIX + name] for name in own}

    found = statistics(own, groups, BACKBONES["gpt2"].layer)

    assert sum(one.number for one in found) == sum(tensor.numel() for tensor in own.values())
    assert {(one.layer, one.group) for one in found} >= {
        (None, "position"), (None, "norm"), (0, "attention"), (1, "feedforward")
    }  # fmt: skip
    for one in found:
        if one.kind == "matrix":
            assert abs(one.mean) < 5 * 0.02 / np.sqrt(one.number)
        else:
            gain = (one.group, one.kind) == ("norm", "weight")
            assert (one.mean, one.deviation) == (float(gain), 0.0)
    # Per layer and group a mix of matrices of 0.02 and of projections of 0.02 / sqrt(2 layers):
    # attention has 3 W W of the one and W W of the other, feed-forward 4 W W of each.
    by = {(one.layer, one.group): one.deviation for one in found if one.kind == "matrix"}
    quarter = 0.25 if initialiser == "scaled" else 1.0
    expected = {"attention": (3 + quarter) / 4, "feedforward": (1 + quarter) / 2}
    for layer in (0, 1):
        for group, share in expected.items():
            assert by[layer, group] == pytest.approx(0.02 * share**0.5, rel=0.03)  # type: ignore[index]
