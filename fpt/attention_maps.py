"""Attention maps: how much each token of a trained model attends to each other token.

Trained models compute attention in a fused form that never holds the weights; here it is computed
in the plain one, for as long as a forward pass takes.
"""

from __future__ import annotations

import numpy as np
import torch

from fpt import random_streams
from fpt.model import Model
from fpt.tasks.base import Batch
from fpt.tasks.bits import BitTask


def example(task: BitTask) -> Batch:
    """One example of a bit task, the same on every machine, for figures to be drawn of."""
    return task.draw(random_streams.generator(0, random_streams.EVALUATION), 1)


def attention_maps(model: Model, batch: Batch) -> np.ndarray:
    """The attention weights of every layer, with dropout off.

    Args:
        model: A model of one trial, such as `fpt.load_model` gives.
        batch: B examples of T tokens.

    Returns:
        (layers, B, heads, T, T) float32: row i of the last two axes is what token i attends to, and
        sums to 1. A causal backbone has zeros above the diagonal.

    Raises:
        ValueError: If the model is a pack, or its backbone has no such maps.
    """
    if len(model.trials) != 1:
        raise ValueError(f"attention maps are of one trial, not of a pack of {len(model.trials)}")
    device = next(model.parameters()).device
    inputs = torch.from_numpy(batch.inputs).to(device)
    lengths = None if batch.lengths is None else torch.from_numpy(batch.lengths).long().to(device)
    members, trains = model.members, model.training
    maps: list[torch.Tensor] = []
    members.maps = maps
    model.eval()
    try:
        with torch.no_grad():
            model(inputs.float() if inputs.is_floating_point() else inputs.long(), lengths)
    finally:
        members.maps = None
        model.train(trains)
    if not maps:
        name = model.trials[0].backbone.name
        own = "attention" in model.groups.values()
        why = "computes its attention in a form that gives no maps" if own else "has no attention"
        raise ValueError(f"backbone {name} {why}")
    return torch.stack(maps).cpu().numpy()
