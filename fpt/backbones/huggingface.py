"""Backbones out of transformers: each a class that is built empty, to be filled with tensors, and
called with embedded tokens.

Dropout is off in transformers' own modules: `fpt.model` puts the members' in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LongformerConfig,
    LongformerModel,
    PreTrainedConfig,
    T5Config,
    ViTConfig,
)
from transformers.activations import ACT2FN
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.t5.modeling_t5 import T5Stack
from transformers.models.vit.modeling_vit import ViTLayer

from fpt.backbones import fields
from fpt.files import DataError

if TYPE_CHECKING:
    from fpt.config import BackboneConfig

ATTENTION = "fpt_members"
"""The name under which `fpt.pack_layers` registers its attention with transformers."""

_NO_DROPOUT = dict.fromkeys(
    (
        "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob",
        "attention_probs_dropout_prob", "dropout_rate",
    ),
    0.0,
)  # fmt: skip
"""A trial has its own dropout, in the same places."""

_NO_TOKENS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"))

_Config = TypeVar("_Config", bound=PreTrainedConfig)


def _built(
    kind: type[_Config],
    backbone: BackboneConfig,
    said: Mapping[str, Any] | None,
    **ours: Any,
) -> _Config:
    """Build transformers' config of a backbone.

    Args:
        kind: Its class.
        backbone: Name, layers, width and heads.
        said: The content of the weights' config.json; None: the plain one.
        ours: Fields that are ours whatever the file says.

    Raises:
        DataError: If transformers refuses a field of the file.
    """
    if said is None:
        said = fields.plain(backbone.name, backbone.sizes)
    known = {
        name: value
        for name, value in fields.values(backbone.name, said, backbone.sizes).items()
        if value is not None
    }
    for name in ("activation_function", "hidden_act", "dense_act_fn"):
        if (activation := known.get(name)) is not None and activation not in ACT2FN:
            raise DataError(
                f"backbone {backbone.name}: weights {backbone.weights}: {name}: {activation!r} is "
                "no activation of transformers"
            )
    sizes = {
        "num_hidden_layers": backbone.layers,
        "hidden_size": backbone.width,
        "num_attention_heads": backbone.heads,
    }
    own = {kind.attribute_map.get(name, name): value for name, value in (sizes | ours).items()}
    try:
        return kind.from_dict(known | _NO_DROPOUT | _NO_TOKENS | own)
    except (StrictDataclassError, TypeError, ValueError) as error:
        what = " ".join(str(error).split())
        raise DataError(
            f"backbone {backbone.name}: weights {backbone.weights}: its config.json: {what}"
        ) from error


ReadOut = Callable[[Tensor], Tensor]
"""(R, T, ...) -> (R, P, ...), the positions that are read out. A backbone with `reads_out` computes
what its last layer does behind the attention at these alone, and returns (R, P, W)."""


def _everything(states: Tensor) -> Tensor:
    return states


def attend(
    module: nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    heads: int,
    mask: Tensor | None,
    **arguments: Any,
) -> Tensor:
    """Return what queries attend to.

    Args:
        module: Whose attention it is; see `fpt.pack_layers.attention`.
        states: (R, Q, W) queries, (R, K, W) keys and (R, K, V) values.
        heads: How many W and V are cut into.
        mask: (R, 1, Q, K), True at a key that is seen; None: all are.
        arguments: As the attention takes them.

    Returns:
        (R, Q, V).
    """
    attention = AttentionInterface()[ATTENTION]
    query, key, value = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in states)
    out: Tensor = attention(module, query, key, value, mask, **arguments)[0]
    return out.flatten(2)


def seen_by(embedded: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return (R, 1, T, T), True at a real key, of a (R, T) mask of real tokens."""
    rows, tokens, _ = embedded.shape
    return None if mask is None else mask[:, None, None].expand(rows, 1, tokens, tokens)


def _relative_bias(attention: Any, tokens: int) -> Tensor:
    """T5's bias on the scores, (1, heads, T, T); where members have tables of their own, (R, ...).

    transformers' `compute_bias`, which knows of one table for all.
    """
    table = attention.relative_attention_bias
    positions = torch.arange(tokens, device=next(table.parameters()).device)
    buckets = attention._relative_position_bucket(
        positions - positions[:, None],
        bidirectional=True,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    bias: Tensor = table(buckets).movedim(-1, -3)
    return bias if bias.ndim == 4 else bias[None]


class Gpt2(GPT2Model):
    """GPT-2 (Radford et al. 2019) without its token table: causal, pre-norm."""

    reads_out = True

    def __init__(
        self, config: BackboneConfig, tokens: int, said: Mapping[str, Any] | None = None
    ) -> None:
        built = _built(GPT2Config, config, said, vocab_size=1, n_positions=tokens, use_cache=False)
        if built.activation_function == "gelu_new":
            # The same function, computed by torch's native kernel.
            built.activation_function = "gelu_pytorch_tanh"
        super().__init__(built)
        self.register_module("wte", nn.Identity())
        self.set_attn_implementation(ATTENTION)

    def forward(
        self, embedded: Tensor, mask: Tensor | None, read_out: ReadOut = _everything
    ) -> Tensor:
        """(R, T, W) embedded inputs and (R, T) mask to (R, P, W), after the final norm."""
        tokens = embedded.shape[1]
        hidden = embedded + self.wpe(torch.arange(tokens, device=embedded.device))
        hidden = self.drop(hidden)
        seen = seen_by(embedded, mask)
        if seen is not None:
            seen = seen & torch.ones(tokens, tokens, dtype=torch.bool, device=seen.device).tril()
        *blocks, last = self.h
        for block in blocks:
            hidden = block(hidden, attention_mask=seen)
        own: Any = last
        attention = own.attn
        states = attention.c_attn(own.ln_1(hidden)).chunk(3, -1)
        heads, scaling = attention.num_heads, attention.scaling
        attended = read_out(attend(attention, states, heads, seen, scaling=scaling))
        hidden = attention.resid_dropout(attention.c_proj(attended)) + read_out(hidden)
        hidden = hidden + own.mlp(own.ln_2(hidden))
        return self.ln_f(hidden)  # type: ignore[no-any-return]


class Bert(BertModel):
    """BERT (Devlin et al., arXiv 1810.04805) without its token table: bidirectional, post-norm."""

    reads_out = True

    def __init__(
        self, config: BackboneConfig, tokens: int, said: Mapping[str, Any] | None = None
    ) -> None:
        built = _built(BertConfig, config, said, vocab_size=1, max_position_embeddings=tokens)
        super().__init__(built, add_pooling_layer=False)
        self.embeddings.register_module("word_embeddings", nn.Identity())
        self.set_attn_implementation(ATTENTION)

    def forward(
        self, embedded: Tensor, mask: Tensor | None, read_out: ReadOut = _everything
    ) -> Tensor:
        """(R, T, W) embedded inputs and (R, T) mask to (R, P, W)."""
        hidden = self.embeddings(inputs_embeds=embedded)
        seen = seen_by(embedded, mask)
        *layers, last = self.encoder.layer
        for layer in layers:
            hidden = layer(hidden, seen)
        own: Any = last
        attended, _ = own.attention.self(hidden, seen)
        hidden = own.attention.output(read_out(attended), read_out(hidden))
        return own.feed_forward_chunk(hidden)  # type: ignore[no-any-return]


class T5(T5Stack):
    """The encoder of T5 (Raffel et al., arXiv 1910.10683): bidirectional, root-mean-square norms,
    relative positions, which act on the attention's scores.
    """

    reads_out = True

    def __init__(
        self, config: BackboneConfig, tokens: int, said: Mapping[str, Any] | None = None
    ) -> None:
        alone = dict.fromkeys(("use_cache", "is_encoder_decoder", "is_decoder"), False)
        super().__init__(_built(T5Config, config, said, vocab_size=1, **alone))
        self.register_module("embed_tokens", nn.Identity())
        self.set_attn_implementation(ATTENTION)

    def forward(
        self, embedded: Tensor, mask: Tensor | None, read_out: ReadOut = _everything
    ) -> Tensor:
        """(R, T, W) embedded inputs and (R, T) mask to (R, P, W), after the final norm."""
        tokens = embedded.shape[1]
        hidden = self.dropout(embedded)
        seen = seen_by(embedded, mask)
        blocks: Any = self.block
        # All layers share the first one's relative bias.
        bias = _relative_bias(blocks[0].layer[0].SelfAttention, tokens)
        for block in blocks[:-1]:
            hidden, *_ = block(hidden, seen, bias)
        outer, feed_forward = blocks[-1].layer
        attention, normed = outer.SelfAttention, outer.layer_norm(hidden)
        states = attention.q(normed), attention.k(normed), attention.v(normed)
        arguments = {"scaling": attention.scaling, "position_bias": bias}
        attended = read_out(attend(attention, states, attention.n_heads, seen, **arguments))
        hidden = read_out(hidden) + outer.dropout(attention.o(attended))
        hidden = feed_forward(hidden)
        return self.dropout(self.final_layer_norm(hidden))  # type: ignore[no-any-return]


class _Sliding(LongformerSelfAttention):
    # transformers' own sliding attention, with the dropout of its weights as a module.

    def __init__(self, config: LongformerConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.weights_dropout = nn.Dropout(0.0)

    def _sliding_chunks_matmul_attn_probs_value(
        self, attn_probs: Tensor, value: Tensor, window_overlap: int
    ) -> Tensor:
        dropped = self.weights_dropout(attn_probs)
        out: Tensor = super()._sliding_chunks_matmul_attn_probs_value(
            dropped, value, window_overlap
        )
        return out


class Longformer(LongformerModel):
    """Longformer (Beltagy et al., arXiv 2004.05150) without its token table: each token attends to
    a window around it, none to all (the public code names no global token either).
    """

    def __init__(
        self, config: BackboneConfig, tokens: int, said: Mapping[str, Any] | None = None
    ) -> None:
        inner = _built(
            LongformerConfig,
            config,
            said,
            vocab_size=1,
            max_position_embeddings=tokens,
            type_vocab_size=1,
            pad_token_id=0,
        )
        windows = inner.attention_window
        windows = [windows] * config.layers if isinstance(windows, int) else windows
        if len(windows) < config.layers:
            raise DataError(
                f"backbone longformer: weights {config.weights}: attention_window: has "
                f"{len(windows)} windows, wanted one for each of {config.layers} layers"
            )
        # In a window of twice the sequence each token sees every other one, as in a wider window,
        # with less padding.
        windows = [min(window, 2 * tokens) for window in windows[: config.layers]]
        inner.attention_window = windows
        super().__init__(inner, add_pooling_layer=False)
        layers: Any = self.encoder.layer
        for number, layer in enumerate(layers):
            layer.attention.self = _Sliding(inner, number)
        self.window = math.lcm(*windows)
        self.embeddings.register_module("word_embeddings", nn.Identity())

    def forward(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """(R, T, W) embedded inputs and (R, T) mask to (R, T, W)."""
        rows, tokens, _ = embedded.shape
        hidden = self.embeddings(inputs_embeds=embedded)
        padding = -tokens % self.window
        hidden = F.pad(hidden, (0, 0, 0, padding))
        real = torch.ones(rows, tokens, device=hidden.device) if mask is None else mask.float()
        real = F.pad(real, (0, padding))
        # 0: attends locally; below: attends to nothing, and nothing to it.
        extended = (1.0 - real) * torch.finfo(hidden.dtype).min
        # Layer by layer: the encoder waits for the device to say that no token is global.
        below, above = extended < 0, extended > 0
        layers: Any = self.encoder.layer
        for layer in layers:
            (hidden,) = layer(
                hidden,
                attention_mask=extended,
                is_index_masked=below,
                is_index_global_attn=above,
                is_global_attn=False,
            )
        out: Tensor = hidden[:, :tokens]
        return out


class Vit(nn.Module):
    """The layers of ViT (Dosovitskiy et al., arXiv 2010.11929) as the public code of arXiv
    2103.05247 runs them: no patches, no class token, positions of its own that begin at zero, and
    dropout wherever timm has it; without weights, norms with timm's epsilon of 1e-6.
    """

    reads_out = True

    def __init__(
        self, config: BackboneConfig, tokens: int, said: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        inner = _built(ViTConfig, config, said)
        inner._attn_implementation = ATTENTION
        self.positions = nn.Embedding(tokens, config.width)
        self.dropout = nn.Dropout(0.0)
        layers: list[Any] = [ViTLayer(inner) for _ in range(config.layers)]
        for layer in layers:
            layer.mlp.activation_fn = nn.Sequential(ACT2FN[inner.hidden_act], nn.Dropout(0.0))
        self.layers = nn.ModuleList(layers)
        self.layernorm = nn.LayerNorm(config.width, eps=inner.layer_norm_eps)

    @staticmethod
    def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray | None:
        """Positions begin at zero."""
        return np.zeros(shape, np.float32) if name.startswith("positions.") else None

    def forward(
        self, embedded: Tensor, mask: Tensor | None, read_out: ReadOut = _everything
    ) -> Tensor:
        """(R, T, W) embedded inputs and (R, T) mask to (R, P, W), after the final norm."""
        hidden = embedded + self.positions(torch.arange(embedded.shape[1], device=embedded.device))
        hidden = self.dropout(hidden)
        seen = seen_by(embedded, mask)
        layers: Any = self.layers
        for layer in layers[:-1]:
            hidden = layer(hidden, seen)
        own = layers[-1]
        attention, normed = own.attention, own.layernorm_before(hidden)
        states = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
        attended = read_out(attend(attention, states, attention.num_attention_heads, seen))
        hidden = own.dropout(attention.o_proj(attended)) + read_out(hidden)
        hidden = own.dropout(own.mlp(own.layernorm_after(hidden))) + hidden
        return self.layernorm(hidden)  # type: ignore[no-any-return]
