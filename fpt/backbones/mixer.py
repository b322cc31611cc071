"""MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601): tokens are mixed by a feed-forward layer
along the sequence, in place of attention.

A layer is a norm and a feed-forward layer over the tokens of each channel, then a norm and one over
the channels of each token, both with GELU and added to the residual stream; a norm stands at the
end. There are no positions: the first of the two knows each token by its place. As in the paper's
models the layer over tokens is half as wide as the hidden state, the one over channels four times.
Shapes: R sequences, T tokens, W width.

Paper: images, all of as many tokens. Ours: padding is zeroed before tokens are mixed, so that no
token sees it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

if TYPE_CHECKING:
    from fpt.config import BackboneConfig

EPSILON = 1e-6
"""Of layer norms, as in Flax."""


class Mixer(nn.Module):
    """The layers of a mixer, for one number of tokens."""

    def __init__(self, config: BackboneConfig, tokens: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.0)
        self.layers = nn.ModuleList(_Layer(config.width, tokens) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=EPSILON)

    def forward(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """Return the last hidden states.

        Args:
            embedded: (R, T, W), of the number of tokens that the layers were made for.
            mask: (R, T) bool, False where a token is padding, which no token then sees; None: none.

        Returns:
            (R, T, W).
        """
        hidden = self.dropout(embedded)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        last: Tensor = self.norm(hidden)
        return last

    @staticmethod
    def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray | None:
        """LeCun's normal numbers for the products, as in Flax; None: the default (the rest)."""
        if len(shape) == 1:
            return None
        return rng.normal(0.0, shape[1] ** -0.5, shape).astype(np.float32)


class _Layer(nn.Module):
    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm_tokens = nn.LayerNorm(width, eps=EPSILON)
        self.tokens = _feedforward(tokens, inner_width(width))
        self.norm_channels = nn.LayerNorm(width, eps=EPSILON)
        self.channels = _feedforward(width, 4 * width)
        self.dropout_tokens = nn.Dropout(0.0)
        self.dropout_channels = nn.Dropout(0.0)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.norm_tokens(hidden)
        if mask is not None:
            normed = normed.masked_fill(~mask[..., None], 0.0)
        mixed = self.tokens(normed.transpose(1, 2)).transpose(1, 2)
        hidden = hidden + self.dropout_tokens(mixed)
        out: Tensor = hidden + self.dropout_channels(self.channels(self.norm_channels(hidden)))
        return out


def inner_width(width: int) -> int:
    """Return the width inside the layer over tokens."""
    return max(1, width // 2)


def _feedforward(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(up=nn.Linear(width, inner), gelu=nn.GELU(), down=nn.Linear(inner, width))
    )
