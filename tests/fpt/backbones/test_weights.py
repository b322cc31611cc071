"""What people have on disk is read where it is unambiguous, else refused with file and reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from fpt.files import DataError
from fpt.model import build_model

Tensors = dict[str, Tensor]
NAME = "transformer.h.1.mlp.c_fc.weight"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small GPT-2 with its head, as transformers saves it."""
    monkeypatch.setenv("FPT_SWEEP_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=11, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1,
        eos_token_id=1,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


def backbone(folder: Path) -> dict[str, Any]:
    return {"name": "gpt2", "layers": 2, "width": 32, "heads": 2, "weights": str(folder)}


def read(trial: Any, folder: Path) -> dict[str, Tensor]:
    model = build_model([trial(backbone=backbone(folder), pretraining="language")])
    return {n: p.detach() for n, p in model.member(0).items() if n.startswith("backbone.")}


def stored(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def store(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def as_pickle(folder: Path, content: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def in_shards(folder: Path, suffix: str) -> None:
    tensors = stored(folder)
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    places = {}
    for part in (0, 1):
        name = f"{stem}-{part + 1:05d}-of-00002.{suffix}"
        own = {n: t for k, (n, t) in enumerate(tensors.items()) if k % 2 == part}
        if suffix == "bin":
            torch.save(own, folder / name)
        else:
            save_file(own, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(own, name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))


def prefixed(before: str, instead: str = "") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        store(folder, {before + n.removeprefix(instead): t for n, t in stored(folder).items()})

    return change


def inside(*path: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content: Any = stored(folder)
        for name in reversed(path):
            content = {name: content, "epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}}
        as_pickle(folder, content)

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(
            pytest.param(prefixed(before), id=before)
            for before in (
                "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.",
                "base_model.model.", "model.", "module.model.",
                "student.", "_forward_module.", "net.module.trunk.",
            )
        ),
        pytest.param(prefixed("", "transformer."), id="no prefix"),
        pytest.param(prefixed("backbone.", "transformer."), id="our own"),
        pytest.param(lambda folder: in_shards(folder, "bin"), id="shards of pickles"),
        pytest.param(lambda folder: in_shards(folder, "safetensors"), id="shards"),
        pytest.param(lambda folder: as_pickle(folder, stored(folder)), id="a pickle"),
        pytest.param(inside("state_dict"), id="state_dict"),
        pytest.param(inside("model"), id="model"),
        pytest.param(inside("checkpoint", "model_state_dict"), id="two deep"),
    ],
)  # fmt: skip
def test_what_is_unambiguous_is_read(change: Any, trial: Any, folder: Path) -> None:
    plain = {n: t.clone() for n, t in read(trial, folder).items()}
    change(folder)

    found = read(trial, folder)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[n], plain[n]) for n in plain)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_read_as_float32(kind: torch.dtype, trial: Any, folder: Path) -> None:
    tensors = {n: t.to(kind) for n, t in stored(folder).items()}
    store(folder, tensors)

    for name, tensor in read(trial, folder).items():
        own = tensors[name.replace("backbone.", "transformer.")].float()
        assert torch.equal(tensor, own[: len(tensor)]), name


def changed(name: str, value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = stored(folder)
        tensors[name].view(-1)[3] = value
        store(folder, tensors)

    return change


def as_type(kind: torch.dtype) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = stored(folder)
        store(folder, tensors | {NAME: (tensors[NAME] * 100).to(kind)})

    return change


def too_large(folder: Path) -> None:
    tensors = {n: t.double() for n, t in stored(folder).items()}
    tensors[NAME][0, 0] = 1e300
    store(folder, tensors)


def gptq(folder: Path) -> None:
    tensors = stored(folder)
    packed = tensors.pop(NAME).to(torch.int32)
    store(folder, tensors | {NAME.replace("weight", "qweight"): packed})


def twice(folder: Path) -> None:
    tensors = stored(folder)
    store(folder, tensors | {f"module.{n}": t + 1 for n, t in tensors.items()})


def adapter(folder: Path) -> None:
    store(folder, stored(folder) | {"transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(2, 2)})


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171\n"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (changed(NAME, float("nan")), r"h\.1\.mlp\.c_fc\.weight holds nan, at \[0, 3\]"),
        (changed("transformer.ln_f.bias", float("inf")), r"ln_f\.bias holds inf, at \[3\]"),
        (changed("transformer.h.0.ln_1.weight", float("-inf")), r"ln_1\.weight holds -inf"),
        (too_large, "holds inf once it is read as float32"),
        (as_type(torch.int8), "c_fc.weight is of type int8: quantised"),
        (as_type(torch.uint8), "c_fc.weight is of type uint8: quantised"),
        (as_type(torch.float8_e4m3fn), "is of type float8_e4m3fn: quantised"),
        (gptq, "c_fc.qweight is of type int32: quantised"),
        (twice, "tensors of these names behind 'module.transformer.' and behind 'transformer.'"),
        (adapter, "lora_A.weight is of an adapter that was not merged"),
        (
            lambda folder: as_pickle(folder, {"model": stored(folder), "ema": stored(folder)}),
            "holds tensors by name in ema and in model; keep the one",
        ),
        (lambda folder: as_pickle(folder, {"epoch": 1}), "holds no tensors by name"),
        (lambda folder: as_pickle(folder, [torch.ones(2)]), "holds no tensors by name"),
        (
            lambda folder: (folder / "model.safetensors").write_text(POINTER),
            "Git LFS pointer of a file of 548,105,171 bytes, not the file itself; fetch it with",
        ),
    ],
)
def test_what_is_no_plain_weights_is_refused(
    change: Any, what: str, trial: Any, folder: Path
) -> None:
    change(folder)
    with pytest.raises(DataError, match=what) as caught:
        read(trial, folder)
    assert str(folder) in str(caught.value) or "cache" in str(caught.value)


class Runs:
    """A pickle of it calls a function as it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_a_pickle_that_runs_code_is_refused_without_advice_on_how_to_run_it(
    trial: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    as_pickle(folder, {"weights": Runs()})

    with pytest.raises(DataError, match="holds more than tensors, which is never run") as caught:
        read(trial, folder)
    assert "weights_only" not in str(caught.value)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "name", ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "config.json"]
)
def test_a_pointer_in_place_of_any_file_is_told_as_one(name: str, trial: Any, folder: Path) -> None:
    in_shards(folder, "safetensors")
    (folder / name).write_text(POINTER)
    with pytest.raises(DataError, match=rf"{re.escape(name)}: is the Git LFS pointer"):
        read(trial, folder)


def test_a_decoder_alone_is_no_encoder(trial: Any, tmp_path: Path) -> None:
    from transformers import BartConfig, BartModel

    torch.manual_seed(0)
    BartModel(
        BartConfig(
            vocab_size=11, d_model=32, max_position_embeddings=64,
            encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48,
            decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=48,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    store(tmp_path, {n: t for n, t in stored(tmp_path).items() if n.startswith("decoder.")})

    with pytest.raises((DataError, ValueError), match="missing"):
        build_model(
            [trial(backbone={"name": "auto", "weights": str(tmp_path)}, pretraining="language")]
        )


def test_of_an_encoder_and_a_decoder_the_encoder_is_read(trial: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=11, d_model=32, d_kv=16, d_ff=128, num_layers=2, num_heads=2)
    whole = T5ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path)
    own = {"name": "t5", "layers": 2, "width": 32, "heads": 2, "weights": str(tmp_path)}

    found = build_model([trial(backbone=own, pretraining="language")]).member(0)
    for name, parameter in whole.encoder.named_parameters():
        if name != "embed_tokens.weight":
            assert torch.equal(found[f"backbone.{name}"], parameter), name
