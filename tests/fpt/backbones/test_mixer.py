"""MLP-Mixer against its equations, written out, and what holds for every backbone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fpt.backbones.mixer import Mixer
from fpt.model import build_model
from fpt.trainer import train

ROWS, TOKENS, WIDTH = 3, 7, 8
BACKBONE = {"name": "mixer", "layers": 2, "width": 16, "heads": 1}


@pytest.fixture
def mixer() -> Mixer:
    """Return a float64 mixer, every parameter drawn so that none of them can hide."""
    config: Any = SimpleNamespace(layers=2, width=WIDTH, heads=1)
    module = Mixer(config, TOKENS).double()
    rng = np.random.default_rng(1)
    for parameter in module.parameters():
        parameter.data = torch.from_numpy(rng.normal(0, 0.5, tuple(parameter.shape)))
    return module


@pytest.fixture
def embedded() -> Tensor:
    return torch.from_numpy(np.random.default_rng(2).normal(size=(ROWS, TOKENS, WIDTH)))


def normed(x: np.ndarray, gain: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled: np.ndarray = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * gain + bias


def gelu(x: np.ndarray) -> np.ndarray:
    cumulative = np.vectorize(lambda z: 0.5 * (1 + float(torch.erf(torch.tensor(z / 2**0.5)))))
    product: np.ndarray = x * cumulative(x)
    return product


def by_hand(module: Mixer, x: np.ndarray) -> np.ndarray:
    """Equation 1 of arXiv 2105.01601: U = X + W2 g(W1 norm(X)), Y = U + W4 g(W3 norm(U))."""
    own = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    for n in range(2):
        at = f"layers.{n}"

        def part(name: str, end: str, at: str = at) -> np.ndarray:
            return own[f"{at}.{name}.{end}"]

        tokens = normed(x, part("norm_tokens", "weight"), part("norm_tokens", "bias"))
        inside = gelu(part("tokens.up", "weight") @ tokens + part("tokens.up", "bias")[:, None])
        x = x + part("tokens.down", "weight") @ inside + part("tokens.down", "bias")[:, None]
        channels = normed(x, part("norm_channels", "weight"), part("norm_channels", "bias"))
        inside = gelu(channels @ part("channels.up", "weight").T + part("channels.up", "bias"))
        x = x + inside @ part("channels.down", "weight").T + part("channels.down", "bias")
    return normed(x, own["norm.weight"], own["norm.bias"])


def test_it_computes_the_equations_of_its_paper(mixer: Mixer, embedded: Tensor) -> None:
    with torch.no_grad():
        found = mixer(embedded, None)

    for row in range(ROWS):
        wanted = by_hand(mixer, embedded[row].numpy())
        np.testing.assert_allclose(found[row].numpy(), wanted, rtol=0, atol=1e-6)


def test_padding_changes_nothing(mixer: Mixer, embedded: Tensor) -> None:
    real = torch.arange(TOKENS) < torch.tensor([7, 4, 1])[:, None]
    other = torch.where(real[..., None], embedded, torch.full_like(embedded, 3.0))

    with torch.no_grad():
        torch.testing.assert_close(mixer(other, real)[real], mixer(embedded, real)[real])
        # Tokens see one another, those behind them too.
        moved = embedded.clone()
        moved[0, -1] += 1.0
        assert not torch.equal(mixer(moved, None)[0, 0], mixer(embedded, None)[0, 0])


def test_every_parameter_has_its_group_and_the_frozen_ones_stay(trial: Any) -> None:
    one = trial(backbone=BACKBONE, steps=3, batch_size=2)
    model = build_model([one])
    before = {name: tensor.detach().clone() for name, tensor in model.member(0).items()}
    width, tokens = 16, 10
    mixing = 2 * tokens * width // 2 + width // 2 + tokens
    channels = 2 * 4 * width**2 + 4 * width + width

    counts = model.counts()
    assert counts["feedforward"]["parameters"] == 2 * (mixing + channels)
    assert counts["norm"]["parameters"] == (2 * 2 + 1) * 2 * width
    assert counts.keys() == {"input", "output", "norm", "feedforward"}

    training = train([one])
    list(training)
    after = training.model.member(0)
    for name, tensor in before.items():
        frozen = model.groups[name] == "feedforward"
        assert torch.equal(after[name], tensor) == frozen, name


def test_it_resumes_to_the_bit(trial: Any) -> None:
    one = trial(backbone=BACKBONE, steps=4, evaluation={"every": 2}, batch_size=2)
    whole = train([one])
    halfway = None
    for _ in whole:
        if whole.settled and (states := whole.states()) and states[0].step == 2:
            halfway = halfway or states[0].to_bytes()

    assert halfway is not None
    resumed = train([one], state=[type(whole.outcomes[0].state).from_bytes(halfway)])
    list(resumed)
    after = whole.model.member(0)
    for name, parameter in resumed.model.member(0).items():
        assert torch.equal(parameter, after[name]), name
    assert resumed.outcomes[0].test_loss == whole.outcomes[0].test_loss
