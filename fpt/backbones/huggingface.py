"""Backbones out of transformers: each a class that is built empty, to be filled with tensors, and
called with embedded tokens.

Dropout is off in transformers' own modules: `fpt.model` puts the members' in their place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LongformerConfig,
    LongformerModel,
    T5Config,
    ViTConfig,
)
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.t5.modeling_t5 import T5Stack
from transformers.models.vit.modeling_vit import ViTLayer

from fpt.backbones.sources import weight_files

if TYPE_CHECKING:
    from fpt.config import BackboneConfig

ATTENTION = "fpt_members"
"""The name under which `fpt.members` registers its attention with transformers."""


class Gpt2(GPT2Model):
    """GPT-2 (Radford et al. 2019) without its token table: causal, pre-norm."""

    def __init__(self, config: BackboneConfig, tokens: int) -> None:
        super().__init__(
            GPT2Config(
                vocab_size=1,
                n_positions=tokens,
                n_embd=config.width,
                n_layer=config.layers,
                n_head=config.heads,
                # The same function as gelu_new, computed by torch's native kernel.
                activation_function="gelu_pytorch_tanh",
                bos_token_id=None,
                eos_token_id=None,
                use_cache=False,
            )
        )
        self.register_module("wte", nn.Identity())
        self.set_attn_implementation(ATTENTION)

    def forward(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """(R, T, W) embedded inputs and (R, T) mask to (R, T, W), after the final norm."""
        out: Any = super().forward(inputs_embeds=embedded, attention_mask=mask)
        return out.last_hidden_state  # type: ignore[no-any-return]


class Bert(BertModel):
    """BERT (Devlin et al., arXiv 1810.04805) without its token table: bidirectional, post-norm."""

    def __init__(self, config: BackboneConfig, tokens: int) -> None:
        super().__init__(
            BertConfig(
                vocab_size=1,
                max_position_embeddings=tokens,
                hidden_size=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=4 * config.width,
                pad_token_id=None,
            ),
            add_pooling_layer=False,
        )
        self.embeddings.register_module("word_embeddings", nn.Identity())
        self.set_attn_implementation(ATTENTION)

    def forward(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """(R, T, W) embedded inputs and (R, T) mask to (R, T, W)."""
        out: Any = super().forward(inputs_embeds=embedded, attention_mask=mask)
        return out.last_hidden_state  # type: ignore[no-any-return]


class T5(T5Stack):
    """The encoder of T5 (Raffel et al., arXiv 1910.10683): bidirectional, root-mean-square norms,
    relative positions, which act on the attention's scores.
    """

    def __init__(self, config: BackboneConfig, tokens: int) -> None:
        super().__init__(
            T5Config(
                vocab_size=1,
                d_model=config.width,
                d_kv=config.width // config.heads,
                d_ff=4 * config.width,
                num_layers=config.layers,
                num_heads=config.heads,
                dropout_rate=0.0,
                use_cache=False,
                is_encoder_decoder=False,
                is_decoder=False,
                pad_token_id=None,
                eos_token_id=None,
            )
        )
        self.register_module("embed_tokens", nn.Identity())
        self.set_attn_implementation(ATTENTION)

    def forward(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """(R, T, W) embedded inputs and (R, T) mask to (R, T, W), after the final norm."""
        out: Any = super().forward(inputs_embeds=embedded, attention_mask=mask)
        return out.last_hidden_state  # type: ignore[no-any-return]


WINDOW = 512
"""Tokens that a token of Longformer attends to: half of them before it, half after."""


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

    def __init__(self, config: BackboneConfig, tokens: int) -> None:
        # In a window of twice the sequence each token sees every other one, as in a wider window,
        # with less padding.
        window = min(WINDOW, 2 * tokens)
        inner = LongformerConfig(
            vocab_size=1,
            max_position_embeddings=tokens,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            attention_window=[window] * config.layers,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            attention_probs_dropout_prob=0.0,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
            sep_token_id=None,
        )
        super().__init__(inner, add_pooling_layer=False)
        layers: Any = self.encoder.layer
        for number, layer in enumerate(layers):
            layer.attention.self = _Sliding(inner, number)
        self.window = window
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
        out: Any = self.encoder(hidden, attention_mask=extended, padding_len=padding)
        return out.last_hidden_state  # type: ignore[no-any-return]


class Vit(nn.Module):
    """The layers of ViT (Dosovitskiy et al., arXiv 2010.11929) as the public code of arXiv
    2103.05247 runs them: no patches, no class token, positions of its own that begin at zero, norms
    with epsilon 1e-6, and dropout wherever timm has it.
    """

    def __init__(self, config: BackboneConfig, tokens: int) -> None:
        super().__init__()
        inner = ViTConfig(
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            layer_norm_eps=1e-6,
        )
        inner._attn_implementation = ATTENTION
        self.positions = nn.Embedding(tokens, config.width)
        self.dropout = nn.Dropout(0.0)
        layers: list[Any] = [ViTLayer(inner) for _ in range(config.layers)]
        for layer in layers:
            layer.mlp.activation_fn = nn.Sequential(nn.GELU(), nn.Dropout(0.0))
        self.layers = nn.ModuleList(layers)
        self.layernorm = nn.LayerNorm(config.width, eps=inner.layer_norm_eps)

    @staticmethod
    def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray | None:
        """Positions begin at zero."""
        return np.zeros(shape, np.float32) if name.startswith("positions.") else None

    def forward(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """(R, T, W) embedded inputs and (R, T) mask to (R, T, W), after the final norm."""
        rows, tokens, _ = embedded.shape
        hidden = embedded + self.positions(torch.arange(tokens, device=embedded.device))
        hidden = self.dropout(hidden)
        seen = None if mask is None else mask[:, None, None].expand(rows, 1, tokens, tokens)
        for layer in self.layers:
            hidden = layer(hidden, seen)
        return self.layernorm(hidden)  # type: ignore[no-any-return]


class Auto(nn.Module):
    """Any model of transformers that takes embedded inputs, by the config.json of a directory.

    Raises:
        ValueError: If transformers has no such model, or its positions are fewer than `tokens`.
    """

    def __init__(self, config: BackboneConfig, tokens: int) -> None:
        super().__init__()
        folder = weight_files(config.weights or "")[0].parent
        read = AutoConfig.from_pretrained(folder, local_files_only=True)
        read.num_hidden_layers = config.layers
        known = getattr(read, "max_position_embeddings", tokens)
        if known < tokens:
            raise ValueError(
                f"backbone auto: {folder} has {known} positions, and the task {tokens} tokens"
            )
        for name in ("attention_dropout", "attention_probs_dropout_prob"):
            if hasattr(read, name):
                setattr(read, name, 0.0)
        try:
            model = AutoModel.from_config(read)
        except (KeyError, ValueError) as error:
            raise ValueError(f"backbone auto: {folder}: {error}") from error
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        model.set_input_embeddings(nn.Identity())
        try:
            model.set_attn_implementation(ATTENTION)
        except ValueError:  # its own attention, then, without dropout
            model.set_attn_implementation("eager")
        # The parts are shared and the model is not one of them, so that names are those of the
        # files, and a part that is swapped here is swapped there.
        self.__dict__.update(whole=model, _modules=model._modules, _parameters=model._parameters)

    def forward(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """(R, T, W) embedded inputs and (R, T) mask to (R, T, W)."""
        whole: Any = self.whole
        hidden: Tensor = whole(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        return hidden
