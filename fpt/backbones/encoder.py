"""The small transformers that are trained from scratch beside FPT (table T7): an encoder of three
layers, with full attention or with Linformer's (arXiv 2006.04768).

As in the code of Long Range Arena (LRA, arXiv 2011.04006): a norm before each part and one at the
end, learned positions, projections in attention without biases, GELU in its tanh form,
bidirectional. Shapes: R sequences, T tokens, W width.

LRA: reads out a class token. Ours: the last token, as with every backbone.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fpt.config import BackboneConfig

EPSILON = 1e-6
"""Of layer norms, as in Flax."""

RANK = 16
"""Keys that Linformer's attention sees, at most: as in LRA's code, where no config changes it.
Linformer's own paper has 128 or 256 for 512 tokens."""


class Transformer(nn.Module):
    """A pre-norm encoder."""

    def __init__(self, config: BackboneConfig, tokens: int) -> None:
        super().__init__()
        self.positions = nn.Embedding(tokens, config.width)
        self.dropout = nn.Dropout(0.0)
        self.layers = nn.ModuleList(
            _Layer(config.width, self._attention(config, tokens)) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width, eps=EPSILON)

    @staticmethod
    def _attention(config: BackboneConfig, tokens: int) -> Attention:
        del tokens
        return Attention(config.width, config.heads)

    def forward(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """Last hidden states.

        Args:
            embedded: (R, T, W).
            mask: (R, T) bool, False where a token is padding, which no token then sees; None: none.

        Returns:
            (R, T, W).
        """
        rows = torch.arange(embedded.shape[1], device=embedded.device)
        hidden = self.dropout(embedded + self.positions(rows))
        for layer in self.layers:
            hidden = layer(hidden, mask)
        last: Tensor = self.norm(hidden)
        return last

    @staticmethod
    def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray | None:
        """Glorot's uniform numbers for the products, as in LRA; None: the default (the rest)."""
        if len(shape) == 1 or name.startswith("positions."):
            return None
        bound = (6 / sum(shape)) ** 0.5
        return rng.uniform(-bound, bound, shape).astype(np.float32)


class Linformer(Transformer):
    """The same encoder with attention to `RANK` mixtures of the tokens."""

    @staticmethod
    def _attention(config: BackboneConfig, tokens: int) -> Attention:
        return LowRankAttention(config.width, config.heads, tokens)


class _Layer(nn.Module):
    def __init__(self, width: int, attention: Attention) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, eps=EPSILON)
        self.attention = attention
        self.norm_feedforward = nn.LayerNorm(width, eps=EPSILON)
        self.feedforward = nn.Sequential(
            OrderedDict(
                up=nn.Linear(width, 4 * width),
                gelu=nn.GELU(approximate="tanh"),
                dropout=nn.Dropout(0.0),
                down=nn.Linear(4 * width, width),
            )
        )
        self.dropout_attention = nn.Dropout(0.0)
        self.dropout_feedforward = nn.Dropout(0.0)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        attended = self.attention(self.norm_attention(hidden), mask)
        hidden = hidden + self.dropout_attention(attended)
        fed = self.feedforward(self.norm_feedforward(hidden))
        out: Tensor = hidden + self.dropout_feedforward(fed)
        return out


class Attention(nn.Module):
    """Scaled dot-product attention, written out, so that `dropout` sees the probabilities."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(R, T, W) -> (R, T, W); mask (R, T) as in `Transformer.forward`."""
        return self.attend(x, self.key(x), self.value(x), mask)

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of the tokens of x to any number of keys, of which `mask` tells the real."""
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.query(x), keys, values)
        )
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
        mixed = self.dropout(scores.softmax(-1)) @ v
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class LowRankAttention(Attention):
    """Linformer's attention: a linear map along the sequence turns T keys into at most `RANK`, and
    T values likewise. As in LRA one map a layer, shared by its heads and by keys and values.

    LRA: padding goes into the mixtures. Ours: it is zeroed before, so that no token sees it.
    """

    def __init__(self, width: int, heads: int, tokens: int) -> None:
        super().__init__(width, heads)
        self.mixture = nn.Linear(tokens, min(RANK, tokens), bias=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """See `Attention.forward`; T is the number of tokens that the map was made for."""
        real = x if mask is None else x.masked_fill(~mask[..., None], 0.0)
        # Keys and values are linear in x, without biases: zeros stay zeros.
        mixed = self.mixture(real.transpose(1, 2)).transpose(1, 2)
        return self.attend(x, self.key(mixed), self.value(mixed), None)
