"""Packs against their members alone, on whatever kernels the environment chooses: a script.

Prints, as JSON, for each backbone the row padding that was measured and whether the members of a
pack ended with the bits that they have alone.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Literal

import torch

from fpt import exactness
from fpt.config import TrialConfig
from fpt.model import build_model
from fpt.tasks.base import ProtocolName, Shape
from fpt.tasks.bits import BitXor
from fpt.trainer import train
from tests.support import small

BATCHES = (1, 2, 3, 5)


class OneColumn(BitXor):
    """Bits, each told by one number."""

    name: Literal["tests.fpt.dispatch:OneColumn"]  # type: ignore[assignment]

    def shape(self, protocol: ProtocolName) -> Shape:
        """One number a prediction."""
        return dataclasses.replace(super().shape(protocol), classes=1)


def trials(name: str, **fields: object) -> list[TrialConfig]:
    """Four trials of different batch sizes, one of which drops nothing."""
    return [
        TrialConfig.model_validate(
            {
                "task": "bit-xor",
                "backbone": small(name),
                "pretraining": "random",
                "backbone_seed": 0,
                "steps": 4,
                "batch_size": batch,
                "dropout": 0.0 if batch == 3 else 0.1,
                "evaluation": {"every": 4},
                "seed": batch,
            }
            | fields
        )
        for batch in BATCHES
    ]


def pack_is_exact(name: str) -> tuple[int | None, bool]:
    """The padding that a pack is given, and whether it ends as its members do alone."""
    pack = train(trials(name))
    padding = pack.row_padding
    list(pack)
    same = True
    for k, trial in enumerate(trials(name)):
        alone = train([trial])
        list(alone)
        tensors, others = (end.state.tensors for end in (alone.outcomes[0], pack.outcomes[k]))
        same = same and all(torch.equal(tensors[name], others[name]) for name in tensors)
        same = same and alone.outcomes[0].test_loss == pack.outcomes[k].test_loss
    return padding, same


def one_column_is_exact(name: str) -> bool:
    """Whether predictions of one number, and what they pass back, are the same bits as alone."""
    model = build_model(trials(name, task="tests.fpt.dispatch:OneColumn"))
    tokens = model.shape.tokens
    inputs = [torch.randn(batch, tokens, model.shape.inputs) for batch in BATCHES]
    return exactness.members_are_exact(
        name, model, BATCHES, lambda members: model(torch.cat([inputs[k] for k in members]))
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {name: (*pack_is_exact(name), one_column_is_exact(name)) for name in sys.argv[1:]}
    sys.stdout.write(json.dumps(found) + "\n")
