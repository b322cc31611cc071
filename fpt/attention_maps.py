"""Attention maps: how much each token of a trained model attends to each other token.

Trained models compute attention in a fused form that never holds the weights; here it is computed
in the plain one, for as long as a forward pass takes.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch

from fpt import random_streams
from fpt.model import Model
from fpt.tasks.base import Batch
from fpt.tasks.bits import BitTask

FixedPoint = Literal["global average", "metastable", "one pattern"]
"""What a head's softmax comes to rest at (Ramsauer et al. 2020, arXiv 2008.02217): an average over
nearly all tokens, over some of them, or a single one."""

MASS = 0.9
"""Of a query's attention: the fewest tokens that hold it are counted."""

HALF = 0.5
"""Share of the visible tokens above which a head averages globally, as in their first class."""


def examples(task: BitTask, size: int) -> Batch:
    """Return examples of a bit task, the same on every machine, for figures to be drawn of."""
    return task.draw(random_streams.generator(0, random_streams.EVALUATION), size)


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
    if model.trials[0].backbone.row.latents:
        raise ValueError(
            f"backbone {model.trials[0].backbone.name} attends by way of latents, not from token "
            "to token"
        )
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


def tokens_held(maps: np.ndarray) -> np.ndarray:
    """Return how many tokens hold 90 % of each query's attention, at least.

    Args:
        maps: (..., T, T): row i of the last two axes is what token i attends to.

    Returns:
        (..., T) int64, from 1 to T.
    """
    largest = np.sort(maps, axis=-1)[..., ::-1].cumsum(axis=-1)
    # Rounding must not add a token where one of them holds exactly that much.
    held: np.ndarray = (largest < MASS - 1e-6).sum(axis=-1) + 1
    return held


def fixed_points(maps: np.ndarray, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return what kind of fixed point each head finds, by the median over its queries.

    A head is `global average` where the median query needs more than half of the tokens that it
    sees, `one pattern` where it needs one, and `metastable` between them. Queries that see a single
    token do not count.

    Args:
        maps: (layers, B, heads, T, T), as `attention_maps` returns them, without padding.
        causal: Whether a token sees only itself and the tokens before it.

    Returns:
        (layers, heads) shares of the visible tokens, and (layers, heads) names of `FixedPoint`.

    Raises:
        ValueError: If there is a single token.
    """
    tokens = maps.shape[-1]
    if tokens < 2:
        raise ValueError("a sequence of one token has nothing to attend to but itself")
    seen = np.arange(1, tokens + 1) if causal else np.full(tokens, tokens)
    counted = seen > 1
    held = tokens_held(maps)[..., counted]
    shares = np.median(held / seen[counted], axis=(1, 3))
    counts = np.median(held, axis=(1, 3))
    average, metastable, one = get_args(FixedPoint)
    kinds = np.where(shares > HALF, average, np.where(counts <= 1, one, metastable))
    return shares, kinds
