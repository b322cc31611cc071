"""Representations: what a model holds between its layers, and how alike two of them are."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fpt import random_streams
from fpt.config import TrialConfig
from fpt.model import Model
from fpt.tasks.base import Batch, Stored

FEWEST = 4
"""Examples below which the debiased estimate is not defined."""


def evaluation_examples(trial: TrialConfig, size: int) -> Batch:
    """Return examples of a trial's test set, the same for every seed and every arm.

    Args:
        trial: Its task and protocol say which set.
        size: How many, at most.

    Raises:
        DataError: If the data is missing.
    """
    test = trial.task.splits(trial.protocol).test
    if isinstance(test, Stored):
        return next(test.first(size).chunks(size))
    return test.batch(0, random_streams.EVALUATION, 0, size)


def hidden_states(model: Model, batch: Batch) -> np.ndarray:
    """Return what each layer reads, and what the backbone returns, with dropout off.

    State 0 is what the first layer reads, state i what layer i + 1 reads, and the last one is the
    output behind the final norm: transformers' `output_hidden_states` counts alike.

    Args:
        model: A model of one trial, such as `fpt.load_model` gives.
        batch: B examples of T tokens.

    Returns:
        (layers + 1, B, T, W) float32; zero where a token is padding.

    Raises:
        ValueError: If the model is a pack, or its backbone has no layers that can be told apart.
    """
    if len(model.trials) != 1:
        raise ValueError(f"representations are of one trial, not of a pack of {len(model.trials)}")
    row = model.trials[0].backbone.row
    if row.latents:
        raise ValueError(
            f"backbone {model.trials[0].backbone.name} holds latents between its layers, not tokens"
        )
    device = next(model.parameters()).device
    inputs = torch.from_numpy(batch.inputs).to(device)
    lengths = None if batch.lengths is None else torch.from_numpy(batch.lengths).long().to(device)
    read: dict[int, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(_keep_first(read, number), with_kwargs=True)
        for number, layer in _layers(model.backbone, row.layer).items()
        # The last layer of some is called part by part: the first part reads what the layer reads.
        for module in layer.modules()
    ]
    output: list[Tensor] = []
    handles += [
        # Without its third argument a backbone computes every token, not what is read out alone.
        model.backbone.register_forward_pre_hook(lambda _, args: args[:2]),
        model.backbone.register_forward_hook(lambda _, args, out: output.append(out)),
    ]
    trains = model.training
    model.eval()
    try:
        with torch.no_grad():
            model.features(inputs.float() if inputs.is_floating_point() else inputs.long(), lengths)
    finally:
        model.train(trains)
        for handle in handles:
            handle.remove()
    if len(read) != model.trials[0].backbone.layers:
        name = model.trials[0].backbone.name
        raise ValueError(f"backbone {name} has no layers that can be told apart")
    tokens = inputs.shape[1]  # some pad them to a multiple of their window
    layers = [read[number][:, :tokens] for number in sorted(read)]
    states = torch.stack([*layers, *output])
    if lengths is not None:
        real = torch.arange(states.shape[2], device=device) < lengths[:, None]
        states = states * real[None, ..., None]
    found: np.ndarray = states.cpu().numpy()
    return found


def _layers(backbone: nn.Module, rule: str) -> dict[int, nn.Module]:
    """Number of a layer -> its module, by the rule for the names of a layer's parameters."""
    found: dict[int, nn.Module] = {}
    for name, _ in backbone.named_parameters():
        if match := re.search(rule, name):
            found.setdefault(int(match[1]), backbone.get_submodule(name[: match.end(1)]))
    return found


def _keep_first(
    read: dict[int, Tensor], number: int
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        if number not in read and (first := next(states, None)) is not None and first.ndim == 3:
            read[number] = first

    return hook


def gram(states: np.ndarray) -> np.ndarray:
    """Return the (N, N) float64 inner products of N examples, each flattened.

    Args:
        states: (N, ...) one representation.
    """
    flat = states.reshape(len(states), -1).astype(np.float64)
    flat -= flat.mean(axis=0)
    return flat @ flat.T


def cka(one: np.ndarray, other: np.ndarray) -> float:
    """Return the debiased linear CKA of two representations of the same examples.

    1 where they are equal but for rotation and scale; about 0 where they have nothing to do with
    each other, whatever their widths; it may fall below 0. Linear centred kernel alignment is of
    Kornblith et al. 2019 (arXiv 1905.00414), the unbiased estimate in it of Song et al. 2012.

    Args:
        one: (N, N) inner products, see `gram`; N is 4 or more.
        other: Likewise.

    Raises:
        ValueError: If there are fewer than 4 examples, or a representation is the same for all.
    """
    if len(one) < FEWEST:
        raise ValueError(f"{len(one)} examples; CKA needs {FEWEST} or more")
    own = _hsic(one, one) * _hsic(other, other)
    if own <= 0:
        raise ValueError("a representation is the same for all examples")
    return float(_hsic(one, other) / np.sqrt(own))


def _hsic(one: np.ndarray, other: np.ndarray) -> float:
    # The unbiased estimate, equation 5 of Song et al. 2012: diagonals do not count.
    n = len(one)
    k, m = (x - np.diag(np.diag(x)) for x in (one, other))
    across = k.sum() * m.sum() / ((n - 1) * (n - 2))
    mixed = 2 * (k.sum(axis=0) @ m.sum(axis=0)) / (n - 2)
    return float(((k * m).sum() + across - mixed) / (n * (n - 3)))
