"""The encoders against torch's own, and Linformer's attention against one head by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fpt.backbones.encoder import RANK, Linformer, LowRankAttention, Transformer

BOTH = (Transformer, Linformer)
ROWS, TOKENS, WIDTH, HEADS = 3, 24, 16, 4
LENGTHS = torch.tensor([24, 17, 5])


def make(kind: type[Transformer], tokens: int = TOKENS) -> Transformer:
    """A float64 encoder, every parameter drawn so that none of them can hide."""
    config: Any = SimpleNamespace(layers=2, width=WIDTH, heads=HEADS)
    module = kind(config, tokens).double()
    rng = np.random.default_rng(1)
    for parameter in module.parameters():
        parameter.data = torch.from_numpy(rng.normal(0, 0.5, tuple(parameter.shape)))
    return module


def embedded(tokens: int = TOKENS) -> Tensor:
    return torch.from_numpy(np.random.default_rng(2).normal(size=(ROWS, tokens, WIDTH)))


def mask() -> Tensor:
    return torch.arange(TOKENS) < LENGTHS[:, None]


def torch_layer(layer: Any) -> nn.TransformerEncoderLayer:
    """torch's own encoder layer with a layer's weights."""
    theirs = nn.TransformerEncoderLayer(
        WIDTH,
        HEADS,
        4 * WIDTH,
        dropout=0.0,
        activation=lambda z: F.gelu(z, approximate="tanh"),
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
    ).double()
    own, state = dict(layer.named_parameters()), theirs.state_dict()
    products = [own[f"attention.{n}.weight"] for n in ("query", "key", "value")]
    state["self_attn.in_proj_weight"] = torch.cat(products)
    state["self_attn.in_proj_bias"] = torch.zeros(3 * WIDTH)
    state["self_attn.out_proj.weight"] = own["attention.out.weight"]
    state["self_attn.out_proj.bias"] = torch.zeros(WIDTH)
    for end in ("weight", "bias"):
        state[f"linear1.{end}"] = own[f"feedforward.up.{end}"]
        state[f"linear2.{end}"] = own[f"feedforward.down.{end}"]
        state[f"norm1.{end}"] = own[f"norm_attention.{end}"]
        state[f"norm2.{end}"] = own[f"norm_feedforward.{end}"]
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("padded", [False, True])
def test_transformer_is_torchs_encoder(padded: bool) -> None:
    module, x = make(Transformer), embedded()
    real = mask() if padded else torch.ones(ROWS, TOKENS, dtype=torch.bool)

    h = x + module.positions.weight
    for layer in module.layers:
        h = torch_layer(layer)(h, src_key_padding_mask=~real if padded else None)
    wanted = F.layer_norm(h, (WIDTH,), module.norm.weight, module.norm.bias, 1e-6)

    found = module(x, mask() if padded else None)
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [24, 5])
def test_linformers_attention_is_one_head_by_hand(length: int) -> None:
    attention = LowRankAttention(WIDTH, 1, TOKENS).double()
    x = embedded()[:1]
    p = {name: t.detach().numpy() for name, t in attention.named_parameters()}
    tokens = x[0].numpy()
    real = np.arange(TOKENS) < length

    assert p["mixture.weight"].shape == (RANK, TOKENS)
    queries, keys, values = (tokens @ p[f"{name}.weight"].T for name in ("query", "key", "value"))
    # E K and E V of the paper, over real tokens alone.
    keys, values = (p["mixture.weight"][:, real] @ t[real] for t in (keys, values))
    out = []
    for query in queries:
        weights = np.exp(keys @ query / WIDTH**0.5)
        out.append(p["out.weight"] @ (weights @ values / weights.sum()))

    found = attention(x, torch.from_numpy(real)[None])[0].detach().numpy()
    np.testing.assert_allclose(found, np.stack(out), rtol=1e-9, atol=1e-11)


def test_linformers_heads_share_the_map_and_layers_do_not() -> None:
    shapes = {n: tuple(p.shape) for n, p in make(Linformer).named_parameters() if "mixture" in n}

    name = "layers.{}.attention.mixture.weight"
    assert shapes == {name.format(0): (RANK, TOKENS), name.format(1): (RANK, TOKENS)}
    short = make(Linformer, tokens=10)
    assert short.layers[0].attention.mixture.weight.shape == (10, 10)


def test_linformer_with_the_identity_for_its_map_is_the_transformer() -> None:
    full, low = make(Transformer, tokens=10), make(Linformer, tokens=10)
    low.load_state_dict(full.state_dict(), strict=False)
    for layer in low.layers:
        layer.attention.mixture.weight.data = torch.eye(10, dtype=torch.double)

    torch.testing.assert_close(low(embedded(10), None), full(embedded(10), None))


@pytest.mark.parametrize("kind", BOTH)
def test_padding_does_not_change_real_tokens(kind: type[Transformer]) -> None:
    module, x, real = make(kind), embedded(), mask()
    other = torch.where(real[..., None], x, 1e3)

    assert torch.equal(module(x, real)[real], module(other, real)[real])
    assert not torch.allclose(module(x, None)[real], module(other, None)[real])


@pytest.mark.parametrize("kind", BOTH)
def test_a_mask_without_padding_changes_nothing(kind: type[Transformer]) -> None:
    module, x = make(kind), embedded()

    torch.testing.assert_close(module(x, torch.ones(ROWS, TOKENS, dtype=bool)), module(x, None))


def test_without_positions_the_order_does_not_matter_to_the_transformer() -> None:
    module, x = make(Transformer), embedded()
    order = torch.from_numpy(np.random.default_rng(3).permutation(TOKENS))
    assert not torch.allclose(module(x[:, order], None), module(x, None)[:, order])

    module.positions.weight.data.zero_()
    torch.testing.assert_close(module(x[:, order], None), module(x, None)[:, order])


@pytest.mark.parametrize("kind", BOTH)
def test_every_token_sees_every_token(kind: type[Transformer]) -> None:
    module, x = make(kind), embedded()
    other = x.clone()
    other[:, -1, 0] += 1  # a norm would not see them all move alike

    assert ((module(x, None) - module(other, None)).abs().amax((0, 2)) > 1e-9).all()


@pytest.mark.parametrize("kind", BOTH)
def test_gradients_reach_every_parameter(kind: type[Transformer]) -> None:
    module = make(kind)
    (module(embedded(), mask())[:, 0] ** 2).sum().backward()

    assert [n for n, p in module.named_parameters() if not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize("kind", BOTH)
def test_every_dropout_acts_that_of_the_attention_on_probabilities(
    kind: type[Transformer],
) -> None:
    module, x = make(kind), embedded()
    plain = module(x, None)
    dropouts = {n: m for n, m in module.named_modules() if isinstance(m, nn.Dropout)}

    assert len(dropouts) == 1 + 2 * 4  # after the positions; four a layer
    for name, dropout in dropouts.items():
        dropout.p = 0.5
        assert not torch.allclose(module(x, None), plain), name
        dropout.p = 0.0
    seen: list[Tensor] = []
    module.layers[1].attention.dropout.register_forward_hook(lambda _, args, __: seen.append(*args))
    module(x, None)
    assert seen[0].shape == (ROWS, HEADS, TOKENS, RANK if kind is Linformer else TOKENS)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(ROWS, HEADS, TOKENS).double())


@pytest.mark.parametrize("kind", BOTH)
def test_products_are_drawn_as_by_glorot(kind: type[Transformer]) -> None:
    rng = np.random.default_rng(0)
    config: Any = SimpleNamespace(layers=1, width=64, heads=4)
    for name, parameter in kind(config, 100).named_parameters():
        value = kind.draw(name, tuple(parameter.shape), rng)
        if parameter.ndim == 1 or name == "positions.weight":
            assert value is None  # the default: gain 1, bias 0, N(0, 0.02)
        else:
            deviation = (2 / (parameter.shape[0] + parameter.shape[1])) ** 0.5
            assert value.dtype == np.float32
            assert np.abs(value).max() <= deviation * 3**0.5
            assert value.std() == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize(("kind", "map_a_layer"), [(Transformer, 0), (Linformer, 16 * 1024)])
def test_sizes_at_the_papers_length(kind: type[Transformer], map_a_layer: int) -> None:
    config: Any = SimpleNamespace(layers=3, width=256, heads=8)
    count = sum(p.numel() for p in kind(config, 1024).parameters())

    layer = 4 * 256**2 + 2 * 4 * 256**2 + 5 * 256 + 2 * 2 * 256 + map_a_layer
    assert count == 1024 * 256 + 3 * layer + 2 * 256
