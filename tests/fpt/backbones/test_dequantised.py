"""GGUF files: what they hold, as a trial's backbone, against the models that they were made of."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from fpt.backbones.headers import inventory
from fpt.backbones.sources import (
    given_files,
    quantisation,
    weight_files,
    weights_identity,
)
from fpt.backbones.weights import read_tensors
from fpt.config import TrialConfig
from fpt.files import DataError
from fpt.model import build_model
from fpt.trainer import train
from tests.fpt.backbones import tiny
from tests.fpt.backbones.test_families import ours

NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""transformers' names -> GGUF's, from its specification."""

Changes = Callable[[gguf.GGUFWriter], None]


def gguf_name(name: str) -> str:
    stem, _, last = name.rpartition(".")
    if stem.startswith("layers."):
        _, layer, inner = stem.split(".", 2)
        return f"blk.{layer}.{NAMES[inner]}.{last}"
    return f"{NAMES[stem]}.{last}"


def interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head's two halves in turn, as llama.cpp's rotary positions want them."""
    rows = matrix.shape[0] // heads // 2
    halves = matrix.reshape(heads, 2, rows, -1)
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(matrix.shape)


@functools.cache
def saved(kind: str, folder: Path) -> Any:
    # Quantised blocks are of 32 numbers.
    return tiny.save(kind, folder, intermediate_size=64, head_dim=8, rms_norm_eps=2.0**-20)


def write(
    kind: str,
    folder: Path,
    file: Path,
    *,
    matrices: Type = Type.F32,
    changes: Changes | None = None,
    left_out: str = "",
) -> tuple[Path, Any]:
    """Write a model's GGUF file by gguf itself; return it and the model."""
    own = saved(kind, folder)
    config = own.config
    writer = gguf.GGUFWriter(file, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([f"t{n}" for n in range(config.vocab_size)])
    if changes is not None:
        changes(writer)
    for name, tensor in own.state_dict().items():
        if name == left_out:
            continue
        value = tensor.numpy()
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            value = interleaved(value, heads)
        of = matrices if value.ndim == 2 and name.startswith("layers.") else Type.F32
        quantised = value if of is Type.F32 else gguf.quantize(value, of)
        writer.add_tensor(gguf_name(name), quantised, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, own


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    return lambda kind: root / kind


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FPT_SWEEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def trial_of(trial: Any, weights: Path, **changes: Any) -> TrialConfig:
    given = {"backbone": {"name": "auto", "weights": str(weights)}, "pretraining": "language"}
    made: TrialConfig = trial(**given | changes)
    return made


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_plain_file_is_the_model_that_it_was_made_of(
    kind: str, folders: Any, trial: Any, tmp_path: Path
) -> None:
    file, own = write(kind, folders(kind), tmp_path / "model.gguf")

    made = read_tensors(weight_files(str(file))[1])

    assert made.keys() == own.state_dict().keys()
    for name, tensor in own.state_dict().items():
        assert torch.equal(made[name], tensor), name
    config = trial_of(trial, file, task={"name": "bit-xor", "examples": 8})
    model = build_model([config]).eval()
    embedded = torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = own(inputs_embeds=embedded).last_hidden_state
        torch.testing.assert_close(ours(model, embedded, None), wanted, rtol=0, atol=1e-5)
    assert quantisation(str(file)) is None
    assert weights_identity(str(file)).startswith("gguf:plain:sha256:")


@pytest.mark.parametrize("of", [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q8_0, Type.F16, Type.BF16])
def test_a_quantised_file_is_dequantised_as_gguf_itself_does(
    of: Type, folders: Any, tmp_path: Path
) -> None:
    file, own = write("llama", folders("llama"), tmp_path / "model.gguf", matrices=of)

    made = read_tensors(weight_files(str(file))[1])

    for name, tensor in own.state_dict().items():
        value = tensor.numpy()
        if value.ndim == 2 and name.startswith("layers."):  # Blocks lie along rows.
            value = gguf.dequantize(gguf.quantize(value, of), of)
        np.testing.assert_array_equal(made[name].numpy(), value, err_msg=name)
    plain = of in (Type.F16, Type.BF16)
    assert quantisation(str(file)) == (None if plain else of.name)
    assert weights_identity(str(file)).split(":")[1] == ("plain" if plain else of.name)


def test_a_trial_of_it_trains_and_its_row_says_what_it_is(
    folders: Any, trial: Any, tmp_path: Path
) -> None:
    file, _ = write("llama", folders("llama"), tmp_path / "m.Q8_0.gguf", matrices=Type.Q8_0)
    config = trial_of(trial, file, steps=2, task={"name": "bit-xor", "examples": 8})

    training = train([config])
    for _ in training:
        pass

    groups = training.outcomes[0].groups
    counted = {group: count.parameters for group, count in inventory(str(file)).groups.items()}
    for group in ("attention", "feedforward", "norm"):
        assert groups[group]["parameters"] == counted[group]
    assert config.identity()["backbone"]["weights"].startswith("gguf:Q8_0:sha256:")
    assert given_files(str(file)) == [file]


def test_it_is_made_once_and_by_its_content(folders: Any, tmp_path: Path, cache: Path) -> None:
    file, _ = write("llama", folders("llama"), tmp_path / "a.gguf")
    first = weight_files(str(file))
    before = first[1].stat().st_mtime_ns
    again = file.with_name("b.gguf")
    again.write_bytes(file.read_bytes())

    assert weight_files(str(again)) == first
    assert first[1].stat().st_mtime_ns == before
    assert weights_identity(str(again)) == weights_identity(str(file))
    assert {one.suffix for one in (cache / "weights").iterdir()} == {".gguf", ".lock"}


def _rope(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))


def _scaled(writer: gguf.GGUFWriter) -> None:
    writer.add_float32("llama.rope.scaling.factor", 8.0)


def _experts(writer: gguf.GGUFWriter) -> None:
    writer.add_uint32("llama.expert_count", 4)


def _unknown(writer: gguf.GGUFWriter) -> None:
    writer.add_float32("llama.logit_scale", 2.0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (_rope, "rope_freqs.weight: transformers' reader of GGUF passes this tensor over"),
        (_scaled, "llama.rope.scaling.factor: 8.0, and only 1.0 can be run"),
        (_experts, "llama.expert_count: 4, and only 0 can be run"),
        (_unknown, "llama.logit_scale: transformers' reader of GGUF passes this field over"),
    ],
)
def test_what_the_reader_would_pass_over_is_refused(
    changes: Changes, told: str, folders: Any, tmp_path: Path, cache: Path
) -> None:
    file, _ = write("llama", folders("llama"), tmp_path / "model.gguf", changes=changes)

    with pytest.raises(DataError, match=rf"^{file}: ") as raised:
        weight_files(str(file))

    assert told in str(raised.value)
    assert not list((cache / "weights").glob("*.gguf"))


def test_a_file_that_is_no_such_file_is_refused(folders: Any, trial: Any, tmp_path: Path) -> None:
    whole, _ = write("llama", folders("llama"), tmp_path / "whole.gguf")
    bad = tmp_path / "bad.gguf"
    lacking, _ = write(
        "llama", folders("llama"), tmp_path / "lacking.gguf", left_out="layers.1.mlp.up_proj.weight"
    )

    for content, told in (
        (b"", "not a GGUF file"),
        (b"PK\3\4 and so on", "not a GGUF file"),
        (whole.read_bytes()[:300], "cannot be read as GGUF"),
        (whole.read_bytes()[:-4000], "cannot be read as GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\nsize 12345\n", "Git LFS pointer"),
        (whole.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1),
         "general.architecture: 'mamba'; of GGUF files those of Llama's kin"),
    ):  # fmt: skip
        bad.write_bytes(content)
        with pytest.raises(DataError, match=rf"^{bad}: .*{told}"):
            weight_files(str(bad))
        with pytest.raises(ValueError, match=told):
            trial_of(trial, bad)
    with pytest.raises(DataError, match=r"holds no layers\.1\.mlp\.up_proj\.weight"):
        weight_files(str(lacking))
    with pytest.raises(DataError, match=r"none\.gguf: missing"):
        weight_files(str(tmp_path / "none.gguf"))


def test_without_the_package_it_is_said_how_to_get_it(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = write("llama", folders("llama"), tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)

    with pytest.raises(DataError, match=r"pip install 'fpt-sweep\[gguf\]'"):
        weight_files(str(file))


def test_the_config_that_is_made_says_how_it_was_quantised(folders: Any, tmp_path: Path) -> None:
    file, own = write("qwen2", folders("qwen2"), tmp_path / "m.gguf", matrices=Type.Q8_0)

    said = json.loads(weight_files(str(file))[0].read_text())

    assert said["gguf_types"] == ["Q8_0"]
    for name in ("num_key_value_heads", "hidden_size", "intermediate_size", "rms_norm_eps"):
        assert said[name] == getattr(own.config, name)
