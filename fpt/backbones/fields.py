"""The fields of a config.json that change what a backbone computes: honoured, or refused by name.

Every field of transformers' own config class is in exactly one of `FIELDS`, `REFUSED` and `FREE`; a
test holds this against the installed release. No torch here: the planner reads a trial's identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Sizes = Mapping[str, int]
"""layers, width and heads."""


@dataclass(frozen=True)
class Field:
    """A field of config.json that a backbone takes its function from."""

    default: Any
    """Its value where the file is silent: transformers' own default."""
    plain: Callable[[Sizes], tuple[Any, ...]] | None = None
    """The values that compute what a backbone without weights computes; the last is the one that it
    has. None: the default."""
    aliases: tuple[str, ...] = ()
    """Other names that transformers takes for it."""
    shapes: bool = False
    """Whether tensors have their shapes from it. Where the file is silent it is then the plain one:
    weights of another shape are refused, and nothing can go wrong unseen."""

    def of(self, sizes: Sizes) -> tuple[Any, ...]:
        """Return the plain values."""
        return (self.default,) if self.plain is None else self.plain(sizes)


def _four_widths(sizes: Sizes) -> tuple[Any, ...]:
    return (4 * sizes["width"],)


def _one_of(*values: Any) -> Callable[[Sizes], tuple[Any, ...]]:
    return lambda _: values


FIELDS: dict[str, dict[str, Field]] = {
    "gpt2": {
        "activation_function": Field("gelu_new", _one_of("gelu_new", "gelu_pytorch_tanh")),
        "layer_norm_epsilon": Field(1e-5),
        "n_inner": Field(None, lambda sizes: (None, 4 * sizes["width"])),
        "scale_attn_weights": Field(True),
        "scale_attn_by_inverse_layer_idx": Field(False),
    },
    "bert": {
        "hidden_act": Field("gelu"),
        "layer_norm_eps": Field(1e-12),
        "intermediate_size": Field(3072, _four_widths, shapes=True),
    },
    "t5": {
        "feed_forward_proj": Field("relu"),
        # The two are written beside feed_forward_proj, and transformers lets them win.
        "dense_act_fn": Field(None, _one_of(None, "relu")),
        "is_gated_act": Field(None, _one_of(None, False)),
        "d_kv": Field(
            64, lambda sizes: (sizes["width"] // sizes["heads"],), ("head_dim",), shapes=True
        ),
        "d_ff": Field(2048, _four_widths, shapes=True),
        "relative_attention_num_buckets": Field(32),
        "relative_attention_max_distance": Field(128),
        "layer_norm_epsilon": Field(1e-6),
    },
    "longformer": {
        "hidden_act": Field("gelu"),
        # What the published weights have; transformers' own default is BERT's.
        "layer_norm_eps": Field(1e-12, _one_of(1e-5)),
        "intermediate_size": Field(3072, _four_widths, shapes=True),
        "attention_window": Field(512, lambda sizes: ([512] * sizes["layers"], 512)),
    },
    "vit": {
        "hidden_act": Field("gelu"),
        # timm's, which the public code of arXiv 2103.05247 runs.
        "layer_norm_eps": Field(1e-12, _one_of(1e-6)),
        "intermediate_size": Field(3072, _four_widths, shapes=True),
        "qkv_bias": Field(True),
        "head_dim": Field(None, lambda sizes: (None, sizes["width"] // sizes["heads"])),
    },
}

_NO_DECODER = {"is_decoder": (False,), "add_cross_attention": (False,)}
_ABSOLUTE = {"position_embedding_type": ("absolute",)}

REFUSED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {"model_type": ("gpt2",), "add_cross_attention": (False,)},
    "bert": {"model_type": ("bert",), **_NO_DECODER, **_ABSOLUTE},
    "t5": {"model_type": ("t5", "mt5")},
    "longformer": {"model_type": ("longformer",), **_NO_DECODER, **_ABSOLUTE},
    "vit": {"model_type": ("vit",), **_ABSOLUTE},
}
"""Field -> the values that can be honoured; whatever else the file says is refused by its name.

Old releases of transformers honoured `position_embedding_type`; the present one reads past it, and
so would compute another model than was trained."""

_TOKENS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id")
_CACHE = ("use_cache", "tie_word_embeddings", "initializer_range")

FREE: dict[str, tuple[str, ...]] = {
    "gpt2": (
        *_TOKENS, *_CACHE, "n_positions", "n_embd", "n_layer", "n_head", "resid_pdrop",
        "embd_pdrop", "attn_pdrop", "reorder_and_upcast_attn", "summary_type", "summary_use_proj",
        "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    ),
    "bert": (
        *_TOKENS, *_CACHE, "hidden_size", "num_hidden_layers", "num_attention_heads",
        "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings",
        "type_vocab_size", "classifier_dropout",
    ),
    "t5": (
        *_TOKENS, *_CACHE, "d_model", "num_layers", "num_decoder_layers", "num_heads",
        "dropout_rate", "initializer_factor", "is_encoder_decoder", "classifier_dropout",
        "is_decoder", "scale_decoder_outputs",
    ),
    "longformer": (
        *_TOKENS, *_CACHE, "hidden_size", "num_hidden_layers", "num_attention_heads",
        "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings",
        "type_vocab_size", "onnx_export",
    ),
    "vit": (
        *_CACHE, "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_dropout_prob",
        "attention_probs_dropout_prob", "image_size", "patch_size", "num_channels",
        "encoder_stride", "pooler_output_size", "pooler_act",
    ),
}  # fmt: skip
"""Fields that change nothing of what is computed here: vocabularies, heads, dropout (a trial has
its own), initial values, tables that are cut to what is used, and sizes, which are compared."""


def values(backbone: str, config: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Return what a config.json says, or leaves to a default: field -> value."""
    found = {}
    for name, field in FIELDS.get(backbone, {}).items():
        said = [config[n] for n in (name, *field.aliases) if n in config]
        silent = field.of(sizes)[-1] if field.shapes else field.default
        found[name] = said[0] if said else silent
    return found


def plain(backbone: str, sizes: Sizes) -> dict[str, Any]:
    """Return the fields of a backbone without weights: field -> value."""
    return {name: field.of(sizes)[-1] for name, field in FIELDS.get(backbone, {}).items()}


def refused(backbone: str, config: Mapping[str, Any]) -> str | None:
    """Return what of a config.json a backbone cannot honour, in words; None: nothing.

    Args:
        backbone: A row of the table of backbones, or another: then only what holds for all.
        config: The file's content.
    """
    if config.get("quantization_config"):
        kind = config["quantization_config"]
        method = kind.get("quant_method") if isinstance(kind, Mapping) else None
        return (
            f"quantization_config: the weights are quantised{f' ({method})' if method else ''}, "
            "and are read as they stand; wanted are the weights in float16, bfloat16, float32 or "
            "float64"
        )
    if config.get("pruned_heads"):
        return "pruned_heads: heads were removed from single layers, which no backbone here does"
    for name, allowed in REFUSED.get(backbone, {}).items():
        if name in config and config[name] not in (*allowed, None):
            hint = (
                "; for another architecture write `name: auto`"
                if name == "model_type"
                else "; the function of these weights is another"
            )
            words = " or ".join(map(repr, allowed))
            return f"{name}: {config[name]!r}, and backbone {backbone} can only be {words}{hint}"
    window = config.get("attention_window")
    if backbone == "longformer" and window is not None:
        windows = window if isinstance(window, list) else [window]
        if not windows or not all(type(w) is int and w >= 4 and w % 2 == 0 for w in windows):
            return f"attention_window: {window!r}; allowed are even numbers from 4 on"
    return None


def deviations(backbone: str, config: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Return the fields by which weights compute another function than the backbone without any.

    Args:
        backbone: A row of the table of backbones.
        config: The content of the weights' config.json.
        sizes: layers, width and heads of the trial's backbone.

    Returns:
        Field -> value, sorted; empty if the config is a plain one.
    """
    found = {}
    for name, value in sorted(values(backbone, config, sizes).items()):
        used = value[: sizes["layers"]] if isinstance(value, list) else value
        if used not in FIELDS[backbone][name].of(sizes):
            found[name] = used
    return found
