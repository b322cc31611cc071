"""Backbones out of transformers, against transformers' own forward and against plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import ValidationError
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LongformerConfig,
    LongformerForMaskedLM,
    LongformerModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from fpt.backbones import BACKBONES
from fpt.model import Model, build_model
from fpt.trainer import train
from tests.support import small

LISTOPS = {
    "name": "listops", "max_length": 12, "min_length": 3, "train": 8, "test": 4, "validation": 4,
    "max_depth": 2,
}  # fmt: skip

TEXT = ("gpt2", "bert", "t5", "longformer")


def config_of(name: str, layers: int) -> Any:
    """transformers' own config of a model of width 32."""
    sizes: Any = {
        "num_hidden_layers": layers, "hidden_size": 32, "num_attention_heads": 2,
        "intermediate_size": 128,
    }  # fmt: skip
    match name:
        case "gpt2":
            return GPT2Config(
                vocab_size=7, n_layer=layers, n_embd=32, n_head=2, bos_token_id=None,
                eos_token_id=None,
            )  # fmt: skip
        case "bert":
            return BertConfig(vocab_size=7, **sizes)
        case "t5":
            return T5Config(
                vocab_size=7, d_model=32, d_kv=16, d_ff=128, num_layers=layers, num_heads=2
            )
        case "longformer":
            return LongformerConfig(
                vocab_size=7, **sizes, attention_window=[64] * layers, layer_norm_eps=1e-5,
                bos_token_id=0, eos_token_id=2, sep_token_id=2, pad_token_id=1,
            )  # fmt: skip
        case _:
            return ViTConfig(**sizes, layer_norm_eps=1e-6)


def own_model(name: str) -> torch.nn.Module:
    """transformers' model of two layers, as transformers would run it."""
    config = config_of(name, 2)
    config._attn_implementation = "eager"
    classes: dict[str, Any] = {
        "gpt2": GPT2Model, "bert": BertModel, "t5": T5EncoderModel, "longformer": LongformerModel
    }  # fmt: skip
    return classes[name](config).eval()  # type: ignore[no-any-return]


def named(name: str, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """transformers' parameters by our names."""
    prefix = "encoder." if name == "t5" else ""
    return {n.removeprefix(prefix): p for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", TEXT)
def test_padded_rows_equal_transformers_own_forward(name: str, trial: Any) -> None:
    model = build_model([trial(task=LISTOPS, backbone=small(name))]).eval()
    own = own_model(name)
    tokens = model.shape.tokens
    theirs = named(name, own)
    p = model.member(0)
    first = BACKBONES[name].first_position
    starts = {n: first if "position_embeddings" in n else 0 for n in theirs}
    values = {f"backbone.{n}": v.detach()[starts[n] :] for n, v in theirs.items()}
    # Tables are cut to the rows in use.
    model.load(0, {n: v[: len(p[n])] for n, v in values.items() if n in p})
    ids = torch.randint(0, model.shape.inputs, (5, tokens))
    lengths = torch.tensor([tokens, 3, 5, tokens - 1, 4])
    mask = torch.arange(tokens) < lengths[:, None]

    with torch.no_grad():
        hidden = own(
            inputs_embeds=F.embedding(ids, p["input.weight"]), attention_mask=mask.long()
        ).last_hidden_state
        read = hidden[torch.arange(5), lengths - 1]
        expected = read @ p["output.weight"].T + p["output.bias"]

        torch.testing.assert_close(model(ids, lengths)[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_longformers_window_is_one_where_the_sequence_is_longer(trial: Any) -> None:
    """In one layer, what the last token reads."""
    long = {"name": "bit-xor", "bits": 600}
    backbone = small("longformer") | {"layers": 1}
    model = build_model([trial(task=long, backbone=backbone)]).eval()
    x = torch.rand(1, 1200, 1)
    seen, unseen = x.clone(), x.clone()
    seen[0, -200] += 1
    unseen[0, -900] += 1  # 512 tokens wide, half of them before

    with torch.no_grad():
        last = model(x)[0, -1]
        assert not torch.equal(model(seen)[0, -1], last)
        torch.testing.assert_close(model(unseen)[0, -1], last, rtol=0, atol=1e-6)


def vit_by_hand(model: Model, x: Tensor, heads: int) -> Tensor:
    """ViT's layers in plain torch: positions, pre-norm blocks with exact GELU, a final norm."""
    p = {name: parameter.detach() for name, parameter in model.member(0).items()}

    def norm(h: Tensor, name: str) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * p[f"backbone.{name}.weight"] + p[f"backbone.{name}.bias"]

    def linear(h: Tensor, name: str) -> Tensor:
        return h @ p[f"backbone.{name}.weight"].T + p[f"backbone.{name}.bias"]

    batch, tokens, _ = x.shape
    h = x @ p["input.weight"].T + p["input.bias"] + p["backbone.positions.weight"]
    width = h.shape[-1]
    for layer in range(model.trials[0].backbone.layers):
        at = f"layers.{layer}"
        normed = norm(h, f"{at}.layernorm_before")
        q, k, v = (
            linear(normed, f"{at}.attention.{part}_proj")
            .reshape(batch, tokens, heads, width // heads)
            .transpose(1, 2)
            for part in "qkv"
        )
        weights = (q @ k.transpose(2, 3) / (width // heads) ** 0.5).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, tokens, width)
        h = h + linear(mixed, f"{at}.attention.o_proj")
        inner = linear(norm(h, f"{at}.layernorm_after"), f"{at}.mlp.fc1")
        gelu = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
        h = h + linear(gelu, f"{at}.mlp.fc2")
    read = norm(h, "layernorm")[:, -model.shape.readout :]
    logits = read @ p["output.weight"].T + p["output.bias"]
    return logits.reshape(batch, model.shape.positions, model.shape.classes)


def test_vit_equals_a_forward_written_by_hand(trial: Any) -> None:
    model = build_model([trial(backbone=small("vit"))]).eval()
    positions = {"backbone.positions.weight": torch.randn(10, 32)}
    model.load(0, positions)
    x = torch.randn(4, model.shape.tokens, model.shape.inputs)

    with torch.no_grad():
        torch.testing.assert_close(model(x), vit_by_hand(model, x, heads=2), rtol=1e-5, atol=1e-5)


def test_vit_sees_both_ways_and_masks_padding(trial: Any) -> None:
    model = build_model([trial(task=LISTOPS, backbone=small("vit"))]).eval()
    ids = torch.randint(0, model.shape.inputs, (2, model.shape.tokens))
    padded, earlier = ids.clone(), ids.clone()
    padded[:, 6:] = 0
    earlier[:, 0] = (ids[:, 0] + 1) % model.shape.inputs
    lengths = torch.tensor([6, 6])

    with torch.no_grad():
        out = model(ids, lengths)
        torch.testing.assert_close(model(padded, lengths), out)
        assert not torch.equal(model(earlier, lengths), out)


SAVED: dict[str, tuple[Any, Any]] = {
    "gpt2": (GPT2Model, GPT2LMHeadModel),
    "bert": (BertModel, BertForMaskedLM),
    "t5": (T5EncoderModel, T5ForConditionalGeneration),
    "longformer": (LongformerModel, LongformerForMaskedLM),
    "vit": (ViTModel, ViTForImageClassification),
}


@pytest.mark.parametrize("whole", [False, True], ids=["backbone", "with its head"])
@pytest.mark.parametrize("name", SAVED)
def test_a_directory_that_transformers_saved_is_read(
    name: str, whole: bool, trial: Any, tmp_path: Path
) -> None:
    """transformers 5 saves under the names that files on the Hub have."""
    saved = SAVED[name][whole](config_of(name, 3))
    saved.save_pretrained(tmp_path)
    backbone = small(name) | {"weights": str(tmp_path)}
    pretraining = BACKBONES[name].modality

    model = build_model([trial(backbone=backbone, pretraining=pretraining)])

    base = saved if name == "t5" else saved.base_model
    theirs = named(name, base)
    first = BACKBONES[name].first_position
    compared = 0
    for own, parameter in model.member(0).items():
        if not own.startswith("backbone."):
            continue
        if own == "backbone.positions.weight":
            assert parameter.eq(0).all()  # ViT's own positions are not taken
            continue
        tensor = theirs[own.removeprefix("backbone.")]
        start = first if "position_embeddings" in own else 0
        assert torch.equal(parameter, tensor[start : start + len(parameter)]), own
        compared += 1
    assert compared > 10


def test_a_file_with_fewer_heads_is_refused(trial: Any, tmp_path: Path) -> None:
    T5EncoderModel(config_of("t5", 2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 2 heads, not 4"):
        trial(backbone=small("t5") | {"heads": 4, "weights": str(tmp_path)}, pretraining="language")


def test_weights_of_two_uses_of_one_dropout_differ(trial: Any) -> None:
    """T5 drops its inputs and its outputs with one and the same module."""
    model = build_model([trial(backbone=small("t5"), dropout=0.5)]).train()
    drops: list[Tensor] = []
    layer = model.backbone.get_submodule("dropout")
    layer.register_forward_hook(lambda _, given, out: drops.append(out == 0))

    model(torch.rand(4, 10, 1))

    assert len(drops) == 2
    assert not torch.equal(drops[0], drops[1])


DISTILBERT_GROUPS = {
    r"LayerNorm|_layer_norm": "norm",
    r"\.attention\.": "attention",
    r"\.ffn\.": "feedforward",
    "position_embeddings": "position",
    "word_embeddings": "token",
}


@pytest.fixture
def distilbert(tmp_path: Path) -> Path:
    """An architecture that is not in the table."""
    config = DistilBertConfig(
        vocab_size=9, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=40
    )
    DistilBertModel(config).save_pretrained(tmp_path)
    return tmp_path


def test_any_architecture_works_if_its_groups_are_named(distilbert: Path, trial: Any) -> None:
    backbone = {
        "name": "auto", "weights": str(distilbert), "groups": DISTILBERT_GROUPS,
        "layers": 2, "width": 32, "heads": 2,
    }  # fmt: skip
    one = trial(backbone=backbone, pretraining="language", task=LISTOPS, steps=3)
    model = build_model([one]).eval()
    own = DistilBertModel.from_pretrained(distilbert).eval()
    ids = torch.randint(0, model.shape.inputs, (3, model.shape.tokens))
    lengths = torch.tensor([model.shape.tokens, 4, 6])
    mask = torch.arange(model.shape.tokens) < lengths[:, None]
    p = model.member(0)

    with torch.no_grad():
        hidden = own(
            inputs_embeds=F.embedding(ids, p["input.weight"]), attention_mask=mask.long()
        ).last_hidden_state
        expected = hidden[torch.arange(3), lengths - 1] @ p["output.weight"].T + p["output.bias"]
        torch.testing.assert_close(model(ids, lengths)[:, 0], expected, rtol=1e-5, atol=1e-5)
    training = train([one])
    list(training)
    assert training.outcomes[0].outcome == "done"
    moved = training.model.member(0)
    assert not torch.equal(moved["backbone.embeddings.LayerNorm.weight"], torch.ones(32))


def test_a_parameter_without_a_group_is_named_with_what_to_do(distilbert: Path, trial: Any) -> None:
    rules = {k: v for k, v in DISTILBERT_GROUPS.items() if v != "feedforward"}
    backbone = {
        "name": "auto", "weights": str(distilbert), "groups": rules,
        "layers": 2, "width": 32, "heads": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"no group for .*ffn\.lin1\.bias.*add rules to backbone"):
        build_model([trial(backbone=backbone, train=["output", "norm"], pretraining="language")])
    with pytest.raises(ValueError, match="train: auto has no group feedforward; it has attention"):
        trial(backbone=backbone, train=["feedforward"], pretraining="language")


def test_a_sequence_longer_than_the_positions_of_auto_is_refused(
    distilbert: Path, trial: Any
) -> None:
    backbone = {
        "name": "auto", "weights": str(distilbert), "groups": DISTILBERT_GROUPS,
        "layers": 2, "width": 32, "heads": 2,
    }  # fmt: skip
    long = trial(backbone=backbone, task={"name": "bit-xor", "bits": 30}, pretraining="language")
    with pytest.raises(ValueError, match="has 40 positions, and the task 60 tokens"):
        build_model([long])


def test_a_directory_without_weights_is_told(trial: Any, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"config\.json: missing"):
        trial(backbone={"name": "auto", "weights": str(tmp_path), "groups": {".": "norm"}})
