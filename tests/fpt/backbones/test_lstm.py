"""The LSTMs against cells written out by hand, one sequence and one token at a time, in numpy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fpt.backbones.lstm import Lstm, LstmPaper, LstmResidual, UnbiasedNorm

ALL = (Lstm, LstmPaper, LstmResidual)
ROWS, TOKENS, WIDTH = 3, 7, 8

Parameters = dict[str, np.ndarray]


def make(kind: type[nn.Module], layers: int = 2, width: int = WIDTH) -> nn.Module:
    """A float64 backbone, every parameter drawn so that none of them can hide."""
    config: Any = SimpleNamespace(layers=layers, width=width, heads=1)
    module = kind(config, TOKENS).double()
    rng = np.random.default_rng(1)
    for parameter in module.parameters():
        parameter.data = torch.from_numpy(rng.normal(0, 0.5, tuple(parameter.shape)))
    return module


def inputs(layers: int = 2, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Embedded tokens, and initial states."""
    rng = np.random.default_rng(2)
    tokens = rng.normal(size=(ROWS, TOKENS, width))
    return torch.from_numpy(tokens), torch.from_numpy(rng.normal(size=(ROWS, layers, 2, width)))


def run(module: nn.Module, x: Tensor, hidden: Tensor) -> Tensor:
    states = (hidden,) if getattr(module, "draws_hidden", False) else ()
    out: Tensor = module(x, None, *states)
    return out


def values(module: nn.Module) -> Parameters:
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def norm(v: np.ndarray, p: Parameters, name: str, ddof: int, eps: float) -> np.ndarray:
    scaled = (v - v.mean()) / np.sqrt(v.var(ddof=ddof) + eps)
    return p[f"{name}.weight"] * scaled + p[f"{name}.bias"]


def paper_by_hand(
    p: Parameters, x: np.ndarray, hidden: np.ndarray, masks: list[np.ndarray]
) -> np.ndarray:
    """The public code's LSTM for one sequence, all layers of a token before the next token."""
    layers = len(hidden)
    states = [(hidden[layer, 0], hidden[layer, 1]) for layer in range(layers)]
    out = []
    for t, token in enumerate(x):
        below = token
        for layer in range(layers):
            at = f"layers.{layer}"
            h, c = states[layer]
            from_input = p[f"{at}.i2h.weight"] @ below + p[f"{at}.i2h.bias"]
            from_state = p[f"{at}.h2h.weight"] @ h + p[f"{at}.h2h.bias"]
            z = norm(from_input, p, f"{at}.norm_i2h", 1, 1e-6)
            z = z + norm(from_state, p, f"{at}.norm_h2h", 1, 1e-6)
            enters, stays, shows, new = np.split(z, 4)
            c = sigmoid(stays) * c + sigmoid(enters) * np.tanh(new)
            c = norm(c, p, f"{at}.norm_cell", 1, 1e-6)
            h = sigmoid(shows) * np.tanh(c) * masks[layer][t]
            states[layer] = (h, c)
            below = h
        out.append(below)
    return np.stack(out)


def torch_lstm_by_hand(p: Parameters, at: str, x: np.ndarray) -> np.ndarray:
    """torch's LSTM for one sequence; its gates are input, forget, candidate, output."""
    h = c = np.zeros(x.shape[-1])
    out = []
    for token in x:
        z = p[f"{at}.weight_ih_l0"] @ token + p[f"{at}.bias_ih_l0"]
        z = z + p[f"{at}.weight_hh_l0"] @ h + p[f"{at}.bias_hh_l0"]
        enters, stays, new, shows = np.split(z, 4)
        c = sigmoid(stays) * c + sigmoid(enters) * np.tanh(new)
        h = sigmoid(shows) * np.tanh(c)
        out.append(h)
    return np.stack(out)


def test_paper_is_the_cell_by_hand() -> None:
    module, (x, hidden) = make(LstmPaper), inputs()
    found = run(module, x, hidden).detach().numpy()
    kept = [np.ones((TOKENS, WIDTH))] * 2

    for row in range(ROWS):
        wanted = paper_by_hand(values(module), x[row].numpy(), hidden[row].numpy(), kept)
        np.testing.assert_allclose(found[row], wanted, rtol=1e-10, atol=1e-12)


def test_paper_drops_from_what_goes_up_and_from_the_state() -> None:
    class Fixed(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            rng = np.random.default_rng(seed)
            self.mask = torch.from_numpy(2.0 * (rng.random((ROWS, TOKENS, WIDTH)) < 0.5))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.mask

    module, (x, hidden) = make(LstmPaper), inputs()
    for layer, cell in enumerate(module.layers):
        cell.dropout = Fixed(layer)
    found = run(module, x, hidden).detach().numpy()

    for row in range(ROWS):
        masks = [cell.dropout.mask[row].numpy() for cell in module.layers]
        wanted = paper_by_hand(values(module), x[row].numpy(), hidden[row].numpy(), masks)
        np.testing.assert_allclose(found[row], wanted, rtol=1e-10, atol=1e-12)


def test_paper_draws_a_mask_for_every_token() -> None:
    module, (x, hidden) = make(LstmPaper, layers=1), inputs(layers=1)
    module.layers[0].dropout.p = 0.5
    dropped = run(module, x, hidden) == 0

    assert 0.3 < dropped.double().mean() < 0.7
    assert len(torch.unique(dropped[0], dim=0)) > 1


@pytest.mark.parametrize("kind", [Lstm, LstmResidual])
def test_sound_ones_are_torch_cells_by_hand(kind: type[nn.Module]) -> None:
    module, (x, hidden) = make(kind), inputs()
    p, found = values(module), run(module, x, hidden).detach().numpy()

    def every(h: np.ndarray, name: str) -> np.ndarray:
        return np.stack([norm(v, p, name, 0, 1e-5) for v in h])

    for row in range(ROWS):
        h = x[row].numpy()
        if kind is Lstm:
            for layer in range(2):
                h = torch_lstm_by_hand(p, f"layers.{layer}.lstm", h)
                h = every(h, f"layers.{layer}.norm")
        else:
            h = h + p["positions.weight"]
            for layer in range(2):
                normed = every(h, f"layers.{layer}.norm")
                h = h + torch_lstm_by_hand(p, f"layers.{layer}.lstm", normed)
            h = every(h, "norm")
        np.testing.assert_allclose(found[row], h, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ALL)
def test_what_comes_later_is_not_seen(kind: type[nn.Module]) -> None:
    # Why a padding mask need not be looked at.
    module, (x, hidden) = make(kind), inputs()
    padded = x.clone()
    padded[:, 4:] = 9.0

    before, after = run(module, x, hidden), run(module, padded, hidden)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("kind", ALL)
def test_a_sequence_does_not_see_its_neighbours(kind: type[nn.Module]) -> None:
    module, (x, hidden) = make(kind), inputs()

    torch.testing.assert_close(run(module, x, hidden)[1:2], run(module, x[1:2], hidden[1:2]))


@pytest.mark.parametrize("kind", ALL)
def test_gradients_are_those_of_finite_differences_and_reach_every_parameter(
    kind: type[nn.Module],
) -> None:
    module, (x, hidden) = make(kind, width=4), inputs(width=4)
    names = [name for name, _ in module.named_parameters()]

    def last(embedded: Tensor, *parameters: Tensor) -> Tensor:
        states = (hidden,) if kind is LstmPaper else ()
        swapped = dict(zip(names, parameters, strict=True))
        out: Tensor = torch.func.functional_call(module, swapped, (embedded, None, *states))
        return out[:, -1]

    own = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(last, (x.requires_grad_(), *own), fast_mode=True)
    gradients = torch.autograd.grad((last(x, *own) ** 2).sum(), own)
    assert [n for n, g in zip(names, gradients, strict=True) if not g.abs().max() > 0] == []


@pytest.mark.parametrize("width", [2, 5, 64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_the_unbiased_norm_is_its_formula(width: int, scale: float) -> None:
    module = UnbiasedNorm(width).double()
    rng = np.random.default_rng(0)
    for parameter in module.parameters():
        parameter.data = torch.from_numpy(rng.normal(size=width))
    x = torch.from_numpy(rng.normal(scale, scale, (4, width)))

    centred = x - x.mean(1, keepdim=True)
    formula = module.weight * centred / (x.var(1, keepdim=True) + 1e-6).sqrt() + module.bias
    torch.testing.assert_close(module(x), formula, rtol=1e-9, atol=1e-12)


def test_paper_needs_its_states() -> None:
    module, (x, hidden) = make(LstmPaper), inputs()

    assert LstmPaper.draws_hidden
    with pytest.raises(ValueError, match=r"hidden: None; .* \(3, 2, 2, 8\)"):
        module(x, None)
    with pytest.raises(ValueError, match=r"hidden: \(3, 1, 2, 8\); .* \(3, 2, 2, 8\)"):
        module(x, None, hidden[:, :1])


def test_paper_states_have_glorots_deviation() -> None:
    assert LstmPaper.hidden_deviation(768) == pytest.approx((2 / (768 + 768)) ** 0.5)


def drawn(kind: type[nn.Module], width: int = 64) -> Parameters:
    config: Any = SimpleNamespace(layers=2, width=width, heads=1)
    rng = np.random.default_rng(0)
    draws = {
        name: kind.draw(name, tuple(p.shape), rng)
        for name, p in kind(config, TOKENS).named_parameters()
    }
    found = {name: value for name, value in draws.items() if value is not None}
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}
    return found


def uniform(value: np.ndarray, bound: float) -> bool:
    """Whether numbers fill -bound … bound, as far as their number tells."""
    within = np.abs(value).max() <= bound
    spread = value.std() * 3**0.5 / bound
    return bool(within and abs(spread - 1) < 2.5 / value.size**0.5)


def test_paper_is_drawn_with_gains_near_zero() -> None:
    found = drawn(LstmPaper)

    assert len(found) == 2 * 10
    for name, value in found.items():
        own_width = 256 if "norm_i2h" in name or "norm_h2h" in name else 64
        assert uniform(value, own_width**-0.5), name


@pytest.mark.parametrize("kind", [Lstm, LstmResidual])
def test_sound_ones_are_drawn_as_by_torch_with_open_forget_gates(kind: type[nn.Module]) -> None:
    found = drawn(kind)
    positions = found.pop("positions.weight", None)

    assert (positions is not None) == (kind is LstmResidual)
    assert positions is None or not positions.any()
    assert all(".lstm." in name for name in found)  # the norms are left to the default
    for layer in range(2):
        at = f"layers.{layer}.lstm"
        ih, hh = found[f"{at}.bias_ih_l0"], found[f"{at}.bias_hh_l0"]
        assert ((ih + hh)[64:128] == 1).all()
        others = np.r_[0:64, 128:256]
        drawn_values = [found[f"{at}.weight_ih_l0"], found[f"{at}.weight_hh_l0"]]
        for value in [*drawn_values, ih[others], hh[others]]:
            assert uniform(value, 64**-0.5)


def test_paper_has_the_public_codes_parameters() -> None:
    module = make(LstmPaper, layers=1, width=16)

    # Two linear maps 16 -> 64, two norms of 64 and one of 16.
    assert sum(p.numel() for p in module.parameters()) == 2 * (16 * 64 + 64) + 2 * 128 + 32
