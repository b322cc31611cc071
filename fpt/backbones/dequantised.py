"""GGUF files of Llama's kin, read by transformers' own reader and kept as plain float32.

What the reader passes over, a file must not hold: a scaled rotary position or an expert that is
left out would make another model of the same name. So every tensor and every field of the
architecture is known here, or the file is refused by what is not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from fpt.backbones.conversion import made_once
from fpt.backbones.sources import FORMATS, GGUF_TYPES
from fpt.files import DataError

KIN = ("llama", "qwen2", "qwen3")
"""Values of general.architecture; Mistral and SmolLM are of the first."""

PLAIN = ("F32", "F16", "BF16", "F64")
"""Types of tensors that are numbers as they stand."""

_TENSORS = re.compile(
    r"(token_embd|output_norm|output)\.weight"
    r"|blk\.\d+\.(attn_norm|ffn_norm|attn_[qk]_norm|attn_(q|k|v|output)|ffn_(gate|up|down))"
    r"\.(weight|bias)"
)
_FREE = ("rope.scaling.finetuned", "tensor_data_layout", "attention.causal")
"""Fields that change nothing of what is computed."""


def convert(file: Path, target: Path) -> None:
    """Write config.json and model.safetensors of a GGUF file, once for all processes.

    Args:
        file: The GGUF file.
        target: The folder to make; it appears whole or not at all.

    Raises:
        DataError: If the package gguf is not installed, if the file cannot be read, or holds what
            would be passed over; or if the folder cannot be written.
    """
    with made_once(target):
        if not target.is_dir():
            head, kinds = _check(file)
            draft = Path(tempfile.mkdtemp(dir=target.parent, suffix=".part"))
            try:
                _write(file, draft, head, kinds)
                draft.chmod(0o755)
                os.rename(draft, target)
            finally:
                shutil.rmtree(draft, ignore_errors=True)


def _check(file: Path) -> tuple[int, list[str]]:
    """Return the width of a head, and the types of quantised matrices, the most frequent first."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise DataError(
            f"{file}: a GGUF file needs the package gguf; pip install 'fpt-sweep[gguf]'"
        ) from None
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise DataError(f"{file}: not a GGUF file; fetch it again")
    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        types = [(t.name, t.tensor_type.name, int(t.n_elements)) for t in reader.tensors]
    # A damaged file may raise anything.
    except Exception as error:
        raise _damaged(file, error) from error
    kind = fields.get("general.architecture")
    if kind not in KIN:
        raise DataError(
            f"{file}: general.architecture: {kind!r}; of GGUF files those of Llama's kin can be "
            f"read ({', '.join(KIN)}), of others wanted are config.json and model.safetensors"
        )
    head = _check_fields(file, kind, fields)
    for name, _, _ in types:
        if not _TENSORS.fullmatch(name):
            raise DataError(
                f"{file}: {name}: transformers' reader of GGUF passes this tensor over, so that "
                "another model would be run; wanted are config.json and model.safetensors"
            )
    numbers: dict[str, int] = {}
    for name, of, elements in types:
        if name.startswith("blk.") and of not in PLAIN:
            numbers[of] = numbers.get(of, 0) + elements
    return head, sorted(numbers, key=lambda of: -numbers[of])


def _check_fields(file: Path, kind: str, fields: dict[str, Any]) -> int:
    """Return the width of a head; refuse what would be passed over."""
    mapped: Any = GGUF_CONFIG_MAPPING
    read = {f"{kind}.{name}" for name in (*mapped[kind], *_FREE)}
    width, heads = (
        fields.get(f"{kind}.{name}") for name in ("embedding_length", "attention.head_count")
    )
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1:
        raise DataError(f"{file}: does not say {kind}.embedding_length and attention.head_count")
    head = int(fields.get(f"{kind}.attention.key_length", width // heads))
    harmless = {
        f"{kind}.rope.dimension_count": head,
        f"{kind}.attention.value_length": head,
        f"{kind}.attention.key_length": head,
        f"{kind}.rope.scaling.type": "none",
        f"{kind}.rope.scaling.factor": 1.0,
        f"{kind}.expert_count": 0,
    }
    for name, value in fields.items():
        if name in harmless and value != harmless[name]:
            raise DataError(f"{file}: {name}: {value!r}, and only {harmless[name]!r} can be run")
        if name.startswith(f"{kind}.") and name not in read and name not in harmless:
            raise DataError(
                f"{file}: {name}: transformers' reader of GGUF passes this field over, so that "
                "another model might be run; wanted are config.json and model.safetensors"
            )
    return head


def _write(file: Path, folder: Path, head: int, kinds: Iterable[str]) -> None:
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        if hasattr(config, "head_dim"):
            config.head_dim = head  # The reader leaves Qwen 3's at its default.
        with torch.device("meta"):
            model = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
        read = load_gguf_checkpoint(  # type: ignore[no-untyped-call]
            file, return_tensors=True, model_to_load=model
        )
    except Exception as error:
        raise _damaged(file, error) from error
    tensors = read["tensors"]
    if lacking := sorted(model.state_dict().keys() - tensors.keys()):
        raise DataError(f"{file}: holds no {lacking[0]}; fetch it again")
    save_file(
        {name: tensor.float().contiguous() for name, tensor in tensors.items()},
        folder / FORMATS[0],
        metadata={"format": "pt"},
    )
    config.save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    said |= {GGUF_TYPES: list(kinds)}
    (folder / "config.json").write_text(json.dumps(said, indent=2), encoding="utf-8")


def _damaged(file: Path, error: Exception) -> DataError:
    what = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{file}: cannot be read as GGUF ({what}); fetch it again")
