"""LSTMs as backbones: a sound one, that of the public code, and a deep one with residuals.

None has attention, so a padding mask is never looked at: padding comes after the real tokens, the
nets run forward, and what is read out is the last real token, which has seen no padding.
Shapes: R sequences, T tokens, W width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor, nn

if TYPE_CHECKING:
    from fpt.config import BackboneConfig


class Lstm(nn.Module):
    """The sound LSTM: layers of torch's own, each followed by dropout and a layer norm.

    Paper: the norms sit inside the cell. Ours: between the layers, because torch's fused kernels
    know no norms, and they are what makes an LSTM quick.
    """

    def __init__(self, config: BackboneConfig, tokens: int) -> None:
        super().__init__()
        del tokens  # any number
        self.layers = nn.ModuleList(_Recurrence(config.width) for _ in range(config.layers))

    def forward(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """(R, T, W) embedded tokens -> (R, T, W) last hidden states; the first state is zero."""
        del mask
        hidden = embedded
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    @staticmethod
    def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray | None:
        """The initial value of a parameter; None: the default (gain 1, bias 0)."""
        return _drawn_as_by_torch(shape, name, rng) if ".lstm." in name else None


class LstmResidual(nn.Module):
    """A deep LSTM in the manner of a transformer (section 3.3): positions are added to the input,
    every layer adds what it computes to what it read.

    Paper: 12 layers, residual connections, positional embeddings; where the norms are, what a
    residual spans and how positions begin it leaves open. Ours: as in GPT-2, a norm before each
    layer and one at the end, a residual around each layer; positions begin at zero, as they would
    in the lines for this that the public code has commented out.
    """

    def __init__(self, config: BackboneConfig, tokens: int) -> None:
        super().__init__()
        self.positions = nn.Embedding(tokens, config.width)
        self.dropout = nn.Dropout(0.0)
        self.layers = nn.ModuleList(_Residual(config.width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """(R, T, W) embedded tokens -> (R, T, W) last hidden states; the first state is zero."""
        del mask
        rows = torch.arange(embedded.shape[1], device=embedded.device)
        hidden = self.dropout(embedded + self.positions(rows))
        for layer in self.layers:
            hidden = layer(hidden)
        last: Tensor = self.norm(hidden)
        return last

    @staticmethod
    def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray | None:
        """The initial value of a parameter; None: the default (gain 1, bias 0)."""
        if name.startswith("positions."):
            return np.zeros(shape, np.float32)
        return _drawn_as_by_torch(shape, name, rng) if ".lstm." in name else None


class _Recurrence(nn.Module):
    """A layer of `Lstm`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        # A module a layer: torch's own stack has no norms between its layers.
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        # The norm comes last, so that whatever was dropped, what reads this reads unit scale. None
        # stands before the first layer: of a token with one feature (a grey level) it would leave
        # little but the sign.
        out: Tensor = self.norm(self.dropout(self.lstm(x)[0]))
        return out


class _Residual(_Recurrence):
    """A layer of `LstmResidual`: the same modules around a residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.dropout(self.lstm(self.norm(x))[0])
        return out


def _drawn_as_by_torch(shape: tuple[int, ...], name: str, rng: np.random.Generator) -> np.ndarray:
    """U(-1/sqrt(W), 1/sqrt(W)) for a parameter of torch's LSTM, and 1 for its forget gates' biases.

    A forget gate that begins near one half forgets within a few tokens; opened by a bias of 1 it
    passes gradients over long lags (Gers et al. 2000; Jozefowicz et al. 2015).
    """
    drawn = _uniform(shape, shape[0] // 4, rng)
    if len(shape) == 1:
        forget = slice(shape[0] // 4, shape[0] // 2)  # gates: input, forget, candidate, output
        # torch adds two biases.
        drawn[forget] = 1.0 if "bias_ih" in name else 0.0
    return drawn


def _uniform(shape: tuple[int, ...], width: int, rng: np.random.Generator) -> np.ndarray:
    bound = width**-0.5
    return rng.uniform(-bound, bound, shape).astype(np.float32)


class LstmPaper(nn.Module):
    """The LSTM of the public code, with what handicaps it: norm gains that begin near zero, the
    normed cell state carried on, dropout on the recurrence, a new initial state at every forward.
    """

    draws_hidden = True
    """The model hands `forward` an initial state."""

    def __init__(self, config: BackboneConfig, tokens: int) -> None:
        super().__init__()
        del tokens  # any number
        self.layers = nn.ModuleList(_NormedCell(config.width) for _ in range(config.layers))

    def forward(
        self, embedded: Tensor, mask: Tensor | None, hidden: Tensor | None = None
    ) -> Tensor:
        """Last hidden states.

        Args:
            embedded: (R, T, W).
            mask: Not looked at.
            hidden: (R, layers, 2, W) initial states: h, then c.

        Returns:
            (R, T, W).

        Raises:
            ValueError: If `hidden` is None or of another shape.
        """
        del mask
        wanted = (len(embedded), len(self.layers), 2, embedded.shape[-1])
        if hidden is None or hidden.shape != wanted:
            given = "None" if hidden is None else str(tuple(hidden.shape))
            raise ValueError(f"hidden: {given}; lstm-paper wants initial states {wanted}")
        out = embedded
        for layer, (h, c) in zip(self.layers, (s.unbind(1) for s in hidden.unbind(1)), strict=True):
            out = layer(out, h, c)
        return out

    @staticmethod
    def hidden_deviation(width: int) -> float:
        """Standard deviation of the initial states: sqrt(2 / (fan in + fan out)), both W."""
        return float((2 / (width + width)) ** 0.5)

    @staticmethod
    def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """The initial value of a parameter: U(-1/sqrt(n), 1/sqrt(n)), gains and biases included.

        n is W for the linear maps, and a norm's own width for the norms.
        """
        return _uniform(shape, shape[0] if ".norm_" in name else shape[0] // 4, rng)


class _NormedCell(nn.Module):
    """One layer. Gates in the order input, forget, output, candidate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.i2h = nn.Linear(width, 4 * width)
        self.h2h = nn.Linear(width, 4 * width)
        self.norm_i2h = UnbiasedNorm(4 * width)
        self.norm_h2h = UnbiasedNorm(4 * width)
        self.norm_cell = UnbiasedNorm(width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        """(R, T, W) inputs and (R, W) states -> (R, T, W) outputs."""
        width = x.shape[-1]
        # What does not depend on the state: all tokens in one product.
        fed = self.norm_i2h(self.i2h(x))
        # The masks of all tokens at once, where a call a token would cost more than what it draws.
        ones = torch.ones_like(x)
        kept = self.dropout(ones)
        drops = kept is not ones
        outputs = []
        for token, keep in zip(fed.unbind(1), kept.unbind(1), strict=True):
            preactivation = token + self.norm_h2h(self.h2h(h))
            i, f, o = preactivation[:, : 3 * width].sigmoid().chunk(3, -1)
            g = preactivation[:, 3 * width :].tanh()
            c = self.norm_cell(c * f + i * g)
            h = o * c.tanh()
            if drops:
                h = h * keep  # what is dropped is dropped from the state too
            outputs.append(h)
        return torch.stack(outputs, 1)


class UnbiasedNorm(nn.Module):
    """The public code's layer norm: the variance is the unbiased one, with 1e-6 added to it.

    With s² the biased variance, s² n/(n-1) + 1e-6 = (s² + eps) / factor²: torch's own kernel with
    another epsilon, and a factor on the gain.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = 1e-6 * (width - 1) / width
        self.factor = ((width - 1) / width) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) -> (…, width)."""
        return F.layer_norm(x, x.shape[-1:], self.weight * self.factor, self.bias, self.eps)
