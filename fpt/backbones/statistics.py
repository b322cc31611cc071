"""What a backbone's weights look like before training, in numbers: layer by layer, by what they do.

The pretraining `statistics` keeps mean and deviation of each tensor of a pretrained backbone and
nothing else; these are the numbers that tell how far those are from a random initialisation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fpt.backbones import Group


@dataclass(frozen=True)
class Statistics:
    """The numbers in all tensors of one layer, group and kind."""

    layer: int | None
    """From 0; None: outside the layers (positions, the last norm)."""
    group: Group
    kind: str
    """See `kind_of`."""
    tensors: int
    number: int
    """Numbers in these tensors together."""
    mean: float
    deviation: float
    """Of the numbers themselves, not estimated from a sample."""
    minimum: float
    maximum: float


def kind_of(name: str, tensor: Tensor) -> str:
    """matrix, or what a vector is called: weight (a gain), bias."""
    return "matrix" if tensor.ndim > 1 else name.rpartition(".")[2]


def statistics(
    tensors: Mapping[str, Tensor], groups: Mapping[str, Group], layer: str
) -> list[Statistics]:
    """The statistics of a backbone's tensors.

    Args:
        tensors: The backbone's own name -> tensor.
        groups: The same names -> group.
        layer: A regular expression whose first group is the layer's number, as in a backbone's row.

    Returns:
        In the order of the layers, what lies outside them first; then by group and kind.
    """
    pools: dict[tuple[int, Group, str], list[np.ndarray]] = {}
    for name, tensor in tensors.items():
        found = re.search(layer, name)
        key = (int(found.group(1)) if found else -1, groups[name], kind_of(name, tensor))
        pools.setdefault(key, []).append(tensor.detach().cpu().double().numpy().ravel())
    out = []
    for (number, group, kind), parts in sorted(pools.items()):
        values = np.concatenate(parts)
        out.append(
            Statistics(
                layer=None if number < 0 else number,
                group=group,
                kind=kind,
                tensors=len(parts),
                number=len(values),
                mean=float(values.mean()),
                deviation=float(values.std()),
                minimum=float(values.min()),
                maximum=float(values.max()),
            )
        )
    return out
