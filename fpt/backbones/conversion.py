"""Older formats of weights, made into one safetensors file that can be mapped.

It is made once and kept in this machine's cache under the digest of what it was made of. Whoever
comes second waits for the first; the file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpt.backbones.sources import check_pointer
from fpt.files import DataError, cache_folder, content_digest


def one_safetensors(files: list[Path]) -> Path:
    """Weights as one safetensors file.

    Args:
        files: One safetensors file, or a pickle of PyTorch's; or an index and its shards of
            either kind.

    Raises:
        DataError: If they cannot be read, or the cache cannot be written.
    """
    for file in files:
        check_pointer(file)
    if files[0].suffix == ".safetensors":
        return files[0]
    target = cache_folder() / "weights" / f"{content_digest(files)}.safetensors"
    if target.is_file():
        return target
    with made_once(target):
        if not target.is_file():
            _write(_read(files), target)
    return target


@contextlib.contextmanager
def made_once(target: Path) -> Iterator[None]:
    """Hold the lock under which a file or folder of the cache is made.

    Raises:
        DataError: If the cache cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise DataError(
            f"{target}: cannot be written ({error.strerror or error}); set FPT_SWEEP_CACHE to a "
            "folder with room for it"
        ) from error


def _read(files: list[Path]) -> dict[str, Tensor]:
    shards = files[1:] or files
    tensors: dict[str, Tensor] = {}
    for file in shards:
        try:
            if file.suffix == ".safetensors":
                stored = load_file(file)
            else:
                # Tensors and plain containers alone: a pickle could name any function to be called.
                stored = torch.load(file, map_location="cpu", weights_only=True)
        # A damaged pickle may raise anything.
        except Exception as error:
            said = str(error).splitlines()[0]
            if said.startswith("Weights only load failed"):  # torch goes on with how to run it
                said = "damaged, or it holds more than tensors, which is never run"
            raise DataError(
                f"{file}: cannot be read as weights ({said}); fetch it again"
            ) from error
        tensors |= _tensors(stored, file)
    # Tied weights are one tensor under two names, which a safetensors file cannot hold.
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def _tensors(stored: object, file: Path) -> dict[str, Tensor]:
    """The tensors by name in what a pickle holds: at the top, or in one dict inside it."""
    if found := _by_name(stored):
        return found
    inside = {path: tensors for path, inner in _dicts(stored) if (tensors := _by_name(inner))}
    if not inside:
        raise DataError(f"{file}: holds no tensors by name")
    if len(inside) > 1:
        raise DataError(
            f"{file}: holds tensors by name in {' and in '.join(sorted(inside))}; keep the one "
            "that is meant: torch.save(torch.load(FILE)[...], FILE)"
        )
    return next(iter(inside.values()))


def _by_name(stored: object) -> dict[str, Tensor]:
    if not isinstance(stored, dict):
        return {}
    return {n: t for n, t in stored.items() if isinstance(n, str) and isinstance(t, Tensor)}


def _dicts(stored: object, path: str = "") -> Iterator[tuple[str, object]]:
    """The dicts in a dict, by their path; those of an optimizer have numbers for keys."""
    if isinstance(stored, dict):
        for name, inner in stored.items():
            if isinstance(name, str) and isinstance(inner, dict):
                yield path + name, inner
                yield from _dicts(inner, f"{path}{name}.")


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
