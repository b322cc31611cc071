"""Perceiver IO's language model (Jaegle et al. 2021, arXiv 2103.03206 and 2107.14795), with
transformers' modules: latents read the tokens by attention, layers act on the latents, and a
decoder reads the latents back, with a query for each token.

Shapes: R sequences, T tokens of width W, L latents of width V.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.perceiver.modeling_perceiver import PerceiverSelfAttention

from fpt.backbones.huggingface import attend


def prepare(model: Any, queries: str, tokens: int) -> None:
    """Make transformers' model ready for `forward`.

    Args:
        model: The language model.
        queries: The path of the table of its decoder's queries, which is cut to the tokens.
        tokens: T.
    """
    owner, _, leaf = queries.rpartition(".")
    width = model.get_submodule(queries).output_size()
    setattr(model.get_submodule(owner), leaf, nn.Embedding(tokens, width))
    for module in model.modules():
        if isinstance(module, PerceiverSelfAttention):
            marked: Any = module
            marked.is_causal = False  # by which `fpt.model` knows an attention


def forward(model: Any, embedded: Tensor, mask: Tensor | None) -> Tensor:
    """Return a hidden state for each token, of its decoder's query.

    Padding is no key of the first attention, so that no latent sees it.

    Args:
        model: transformers' PerceiverModel with a text preprocessor and a decoder.
        embedded: (R, T, W) tokens without their positions.
        mask: (R, T) bool, False where a token is padding; None: none is.

    Returns:
        (R, T, W).
    """
    rows, tokens, _ = embedded.shape
    places = torch.arange(tokens, device=embedded.device)
    inputs = embedded + model.input_preprocessor.position_embeddings(places)
    latents: Tensor = model.embeddings(rows)
    seen = None
    if mask is not None:
        seen = mask[:, None, None].expand(rows, 1, latents.shape[1], tokens)
    hidden = _layer(model.encoder.cross_attention, latents, inputs, seen)
    for _ in range(model.config.num_blocks):
        for layer in model.encoder.self_attends:
            hidden = _layer(layer, hidden)
    queries = model.decoder.output_position_encodings(places).expand(rows, -1, -1)
    return _layer(model.decoder.decoding_cross_attention, queries, hidden)


def _layer(
    layer: Any, hidden: Tensor, inputs: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """Attend to inputs, or to the hidden states themselves; then the feed-forward layer."""
    outer = layer.attention
    inner = outer.self
    normed = inner.layernorm1(hidden)
    source = normed if inputs is None else inner.layernorm2(inputs)
    states = inner.query(normed), inner.key(source), inner.value(source)
    attended: Tensor = outer.output(attend(inner, states, inner.num_heads, seen))
    if outer.use_query_residual:
        attended = attended + hidden
    out: Tensor = attended + layer.feed_forward_chunk(attended)
    return out
