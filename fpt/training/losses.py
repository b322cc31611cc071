"""What a model's outputs are compared with their targets by: cross entropy, or mean squared error.

R rows (examples), P predictions a row, C numbers a prediction: its logits, or one. A task whose
every token is read out may have padding, whose predictions count for nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor

from fpt.tasks.base import Shape


def has_padding(shape: Shape) -> bool:
    """Return whether predictions may be those of padding: where every token is read out."""
    return shape.readout == shape.tokens


def counted(shape: Shape, lengths: Tensor | None) -> Tensor | None:
    """Return which predictions count, (R, P) bool; None: all of them."""
    if lengths is None or not has_padding(shape):
        return None
    token = torch.arange(shape.tokens, device=lengths.device)
    return (token < lengths[:, None]).repeat_interleave(shape.outputs, 1)


def of_each(shape: Shape, outputs: Tensor, targets: Tensor, counts: Tensor | None) -> Tensor:
    """Return the loss of each prediction that counts, flat: in nats, or the squared error.

    Args:
        shape: The task's.
        outputs: (R, P, C).
        targets: (R, P): classes, or numbers.
        counts: See `counted`.
    """
    if shape.loss == "mse":
        found = F.mse_loss(outputs.flatten(), targets.flatten().float(), reduction="none")
    else:
        found = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
    return found if counts is None else found[counts.flatten()]


def mean_loss(shape: Shape, outputs: Tensor, targets: Tensor, counts: Tensor | None) -> Tensor:
    """Return the mean loss over the predictions that count; arguments as `of_each`."""
    if counts is not None:
        return of_each(shape, outputs, targets, counts).mean()
    if shape.loss == "mse":
        return F.mse_loss(outputs.flatten(), targets.flatten().float())
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def right(shape: Shape, outputs: Tensor, targets: Tensor, counts: Tensor | None) -> Tensor:
    """Return which of the predictions that count are right, 1.0 or 0.0 in float64, flat; of numbers
    none is.
    """
    if shape.loss == "mse":
        found = torch.zeros_like(targets, dtype=torch.float64)
    else:
        found = (outputs.argmax(-1) == targets).double()
    return found.flatten() if counts is None else found[counts]


def per_token(
    shape: Shape, outputs: Tensor, targets: Tensor, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return outputs and targets as `fpt.metrics` has them: a row a token that is read out and
    counts.
    """
    targets = targets.reshape(-1, shape.outputs)
    last = () if shape.loss == "mse" else (shape.numbers,)
    outputs = outputs.reshape(-1, shape.outputs, *last)
    if counts is None:
        return outputs, targets
    kept = counts.reshape(-1, shape.outputs)[:, 0]
    return outputs[kept], targets[kept]
