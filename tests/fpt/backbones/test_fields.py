"""The function of a backbone is that of its weights' config.json: against transformers' own model
of the same directory, or the directory is refused by the field's name.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LongformerConfig,
    LongformerModel,
    MT5EncoderModel,
    PreTrainedConfig,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

from fpt.backbones import BACKBONES, fields
from fpt.config import TrialConfig
from fpt.files import DataError
from fpt.model import build_model
from fpt.trainer import train

ROWS, TOKENS, WIDTH = 3, 10, 32
CLASSES: dict[str, tuple[type[PreTrainedConfig], Any]] = {
    "gpt2": (GPT2Config, GPT2Model),
    "bert": (BertConfig, BertModel),
    "t5": (T5Config, T5EncoderModel),
    "longformer": (LongformerConfig, LongformerModel),
    "vit": (ViTConfig, ViTModel),
}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": WIDTH, "n_head": 2, "n_positions": 64, "vocab_size": 11},
    "t5": {"num_layers": 2, "d_model": WIDTH, "num_heads": 2, "d_kv": 16, "d_ff": 128},
} | {
    name: {
        "num_hidden_layers": 2, "hidden_size": WIDTH, "num_attention_heads": 2,
        "intermediate_size": 128,
    }
    for name in ("bert", "longformer", "vit")
}  # fmt: skip
SIZES["gpt2"] |= {"bos_token_id": 1, "eos_token_id": 1}
SIZES["longformer"] |= {"max_position_embeddings": 600}
for small in ("bert", "longformer", "t5"):
    SIZES[small] |= {"vocab_size": 11}

VARIED: dict[str, list[dict[str, Any]]] = {
    "gpt2": [
        {},
        *({"activation_function": name} for name in ("relu", "gelu", "silu", "gelu_pytorch_tanh")),
        {"layer_norm_epsilon": 1e-2},
        {"n_inner": 48},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
    ],
    "bert": [
        {},
        *({"hidden_act": name} for name in ("relu", "gelu_new", "silu")),
        {"layer_norm_eps": 1e-2},
        {"intermediate_size": 40},
        {"type_vocab_size": 1},
        {"chunk_size_feed_forward": 2},
    ],
    "t5": [
        {},
        *({"feed_forward_proj": f} for f in ("gelu", "gated-gelu", "gated-silu", "gated-relu")),
        {"layer_norm_epsilon": 1e-2},
        {"d_ff": 40},
        {"d_kv": 8},
        {"d_kv": 24},
        {"relative_attention_num_buckets": 8},
        {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 9},
    ],
    "longformer": [
        {},
        {"hidden_act": "relu"},
        {"layer_norm_eps": 1e-2},
        {"intermediate_size": 40},
        {"attention_window": 4},
        {"attention_window": [4, 8]},
        {"attention_window": [8, 4]},
    ],
    "vit": [
        {},
        *({"hidden_act": name} for name in ("relu", "gelu_new", "quick_gelu")),
        {"layer_norm_eps": 1e-2},
        {"intermediate_size": 40},
        {"qkv_bias": False},
        {"head_dim": 8},
    ],
}  # fmt: skip
CASES = [(name, change) for name, changes in VARIED.items() for change in changes]


def saved(name: str, folder: Path, **change: Any) -> Any:
    """A small random model of transformers' own, with norms and biases that are not the first."""
    kind, model = CLASSES[name]
    torch.manual_seed(0)
    made = model(kind(**SIZES[name] | change))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    made.save_pretrained(folder)
    return made


def backbone(name: str, folder: Path) -> dict[str, Any]:
    return {"name": name, "layers": 2, "width": WIDTH, "heads": 2, "weights": str(folder)}


def theirs(name: str, folder: Path, embedded: Tensor, mask: Tensor) -> Tensor:
    """The last hidden states of transformers' own model of a directory."""
    model = CLASSES[name][1].from_pretrained(folder, attn_implementation="eager").eval()
    if name != "vit":
        hidden: Tensor = model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        return hidden
    # Without patches, class token and positions, as the public code runs it.
    hidden = embedded
    hides = torch.zeros(mask.shape).masked_fill(mask == 0, torch.finfo(torch.float32).min)
    for layer in model.layers:
        hidden = layer(hidden, hides[:, None, None].expand(-1, 1, TOKENS, -1))
    normed: Tensor = model.layernorm(hidden)
    return normed


def ours(trial: TrialConfig, embedded: Tensor, mask: Tensor | None) -> Tensor:
    """The last hidden states of our backbone."""
    model = build_model([trial]).eval()
    model.members.rows = [len(embedded)]
    model.members.tokens = embedded.shape[1]
    hidden: Tensor = model.backbone(embedded, mask)
    return hidden


@pytest.mark.parametrize(("name", "change"), CASES)
def test_a_backbone_computes_what_transformers_own_model_of_its_directory_does(
    name: str, change: dict[str, Any], trial: Any, tmp_path: Path
) -> None:
    saved(name, tmp_path, **change)
    one = trial(backbone=backbone(name, tmp_path), pretraining=BACKBONES[name].modality)
    # Numbers as small as in an early layer, where an epsilon shows.
    embedded = torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)) * 0.1
    whole, part = torch.ones(ROWS, TOKENS), torch.ones(ROWS, TOKENS)
    part[1, 6:] = part[2, 3:] = 0

    with torch.no_grad():
        for mask in (whole, part):
            given = None if mask is whole else mask.bool()
            real = mask.bool()
            torch.testing.assert_close(
                ours(one, embedded, given)[real],
                theirs(name, tmp_path, embedded, mask)[real],
                rtol=1e-5,
                atol=1e-5,
            )


@pytest.mark.parametrize(
    ("name", "said", "what"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention: True, and backbone gpt2"),
        ("gpt2", {"model_type": "gpt_neo"}, "model_type: 'gpt_neo'.*`name: auto`"),
        ("bert", {"model_type": "roberta"}, "model_type: 'roberta'"),
        ("bert", {"is_decoder": True}, "is_decoder: True"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type: 'rel"),
        ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads: heads were removed"),
        ("longformer", {"attention_window": [4, 7]}, r"attention_window: \[4, 7\]"),
        ("longformer", {"attention_window": 2}, "attention_window: 2"),
        ("longformer", {"position_embedding_type": "none"}, "position_embedding_type"),
        ("t5", {"model_type": "umt5"}, "model_type: 'umt5'"),
        ("vit", {"model_type": "vit_mae"}, "model_type: 'vit_mae'"),
        ("gpt2", {"quantization_config": {"quant_method": "gptq"}}, r"quant.*quantised \(gptq\)"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_refused_by_its_name(
    name: str, said: dict[str, Any], what: str, trial: Any, tmp_path: Path
) -> None:
    saved(name, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))

    with pytest.raises(ValueError, match=rf"config\.json: {what}"):
        trial(backbone=backbone(name, tmp_path), pretraining=BACKBONES[name].modality)


@pytest.mark.parametrize(
    ("name", "said", "what"),
    [
        ("gpt2", {"activation_function": "glu"}, "activation_function: 'glu' is no activation"),
        ("bert", {"hidden_act": "gellu"}, "hidden_act: 'gellu' is no activation"),
        ("bert", {"layer_norm_eps": "small"}, "layer_norm_eps"),
        ("t5", {"feed_forward_proj": "twice-gelu"}, "feed_forward_proj"),
        ("longformer", {"attention_window": [4]}, "attention_window: has 1 windows"),
        ("vit", {"intermediate_size": 1.5}, "intermediate_size"),
    ],
)
def test_a_field_without_sense_is_named_before_anything_trains(
    name: str, said: dict[str, Any], what: str, trial: Any, tmp_path: Path
) -> None:
    saved(name, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    one = trial(backbone=backbone(name, tmp_path), pretraining=BACKBONES[name].modality)

    with pytest.raises(DataError, match=what):
        build_model([one])


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_of_transformers_config_has_its_place(name: str) -> None:
    kind = CLASSES[name][0]
    common = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    theirs_ = {f.name: f.default for f in dataclasses.fields(kind) if f.name not in common}
    own, refused, free = fields.FIELDS[name], fields.REFUSED[name], set(fields.FREE[name])

    assert not free & (own.keys() | refused.keys())
    assert set(theirs_) <= free | own.keys() | refused.keys()
    for field, rule in own.items():
        assert rule.default == theirs_.get(field), field


@pytest.mark.parametrize("name", CLASSES)
def test_a_field_that_changes_the_function_is_part_of_the_identity_of_drawn_weights(
    name: str, trial: Any, tmp_path: Path
) -> None:
    change: dict[str, dict[str, Any]] = {
        "gpt2": {"scale_attn_weights": False},
        "t5": {"feed_forward_proj": "gated-silu"},
    }
    varied = change.get(name, {"hidden_act": "relu"})
    plain: dict[str, Any] = {
        "longformer": {"layer_norm_eps": 1e-5},
        "vit": {"layer_norm_eps": 1e-6},
    }
    saved(name, tmp_path / "plain", **plain.get(name, {}))
    saved(name, tmp_path / "other", **plain.get(name, {}) | varied)

    def identity(folder: str, pretraining: str) -> dict[str, Any]:
        own = backbone(name, tmp_path / folder)
        found: dict[str, Any] = trial(backbone=own, pretraining=pretraining).identity()["backbone"]
        return found

    without = trial(
        backbone=backbone(name, tmp_path) | {"weights": None}, pretraining="random"
    ).identity()["backbone"]
    assert identity("plain", "random") == without
    function = identity("other", "random")["function"]
    assert varied.items() <= function.items()
    if name != "t5":
        assert function == varied
    for folder in ("plain", "other"):
        # A digest of the directory, config.json included, stands for it.
        assert "function" not in identity(folder, "statistics")


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_the_function_goes_on_with_a_backbone_that_a_trial_trained(
    name: str, trial: Any, tmp_path: Path
) -> None:
    change: dict[str, Any] = (
        {"activation_function": "relu"} if name == "gpt2" else {"layer_norm_epsilon": 1e-2}
    )
    saved(name, tmp_path, **change)
    parent = train([trial(backbone=backbone(name, tmp_path), pretraining="language", steps=1)])
    list(parent)
    file = tmp_path / "0123456789ab.safetensors"
    file.write_bytes(parent.backbone(0))
    child = trial(
        backbone=backbone(name, tmp_path) | {"weights": None}, pretraining="trial:0123456789ab"
    )

    model = build_model([child], backbones={"0123456789ab": file})
    assert model.function == change
    x = torch.rand(2, TOKENS, 1)
    own = model.member(0)
    parent.model.load(0, {n: p for n, p in own.items() if not n.startswith("backbone.")})
    with torch.no_grad():
        assert torch.equal(model.eval()(x), parent.model.eval()(x))


def test_mt5_is_an_encoder_of_t5s(trial: Any, tmp_path: Path) -> None:
    from transformers import MT5Config

    torch.manual_seed(0)
    MT5EncoderModel(MT5Config(**SIZES["t5"])).save_pretrained(tmp_path)
    one = trial(backbone=backbone("t5", tmp_path), pretraining="language")
    embedded = torch.randn(ROWS, TOKENS, WIDTH)
    model = MT5EncoderModel.from_pretrained(tmp_path).eval()

    with torch.no_grad():
        expected = model(inputs_embeds=embedded).last_hidden_state
        torch.testing.assert_close(ours(one, embedded, None), expected, rtol=1e-5, atol=1e-5)
