"""Older formats of weights, made into one safetensors file that can be mapped.

It is made once and kept in this machine's cache under the digest of what it was made of. Whoever
comes second waits for the first; the file appears whole or not at all.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpt.files import DataError, cache_folder, content_digest


def one_safetensors(files: list[Path]) -> Path:
    """Weights as one safetensors file.

    Args:
        files: One safetensors file; or an index and its shards; or a pickle of PyTorch's.

    Raises:
        DataError: If they cannot be read, or the cache cannot be written.
    """
    if files[0].suffix == ".safetensors":
        return files[0]
    target = cache_folder() / "weights" / f"{content_digest(files)}.safetensors"
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_file():
                _write(_read(files), target)
    except OSError as error:
        raise DataError(
            f"{target}: cannot be written ({error.strerror or error}); set FPT_SWEEP_CACHE to a "
            "folder with room for it"
        ) from error
    return target


def _read(files: list[Path]) -> dict[str, Tensor]:
    try:
        if files[1:]:
            return {name: one for file in files[1:] for name, one in load_file(file).items()}
        # Tensors and plain containers alone: a pickle could name any function to be called.
        stored = torch.load(files[0], map_location="cpu", weights_only=True)
    # A damaged pickle may raise anything.
    except Exception as error:
        raise DataError(
            f"{files[0]}: cannot be read as weights ({str(error).splitlines()[0]}); fetch it again"
        ) from error
    found = stored if isinstance(stored, dict) else {}
    # Tied weights are one tensor under two names, which a safetensors file cannot hold.
    tensors = {name: t.clone().contiguous() for name, t in found.items() if isinstance(t, Tensor)}
    if not tensors:
        raise DataError(f"{files[0]}: holds no tensors by name")
    return tensors


def _write(tensors: dict[str, Tensor], target: Path) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".part")
    os.close(handle)
    try:
        save_file(tensors, name, metadata={"format": "pt"})
        os.chmod(name, 0o644)
        os.replace(name, target)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        Path(name).unlink(missing_ok=True)
