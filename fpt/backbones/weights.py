"""Where a backbone's weights come from: read, drawn, or trained by another trial.

Names are the backbone's own (`h.0.ln_1.weight`), without the prefixes that a checkpoint of a larger
model puts before them. Read tensors are mapped from their safetensors file: the page cache shares
them between processes, and a write in place stays private.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from fpt import random_streams
from fpt.backbones import families, fields
from fpt.backbones.conversion import one_safetensors
from fpt.backbones.sources import (
    HUB,
    LAYER_STATISTICS,
    RANDOM,
    STATISTICS,
    check_config,
    config_file,
    hub_files,
    read_config,
    weight_files,
)
from fpt.backbones.statistics import kind_of
from fpt.files import DataError
from fpt.plugins import imported

if TYPE_CHECKING:
    from fpt.backbones import Backbone
    from fpt.config import TrialConfig

FUNCTION = "function"
"""In the metadata of a trained backbone, where it is not the plain one: the fields of its config
that change what it computes."""

DEVIATION = 0.02
"""Standard deviation of random matrices, as in GPT-2 and BERT."""

_OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of weights that are numbers as they stand; others are quantised, and want their scales."""


def site(name: str) -> int:
    """The site of a tensor's draw in its stream: tensors are drawn apart, in no order."""
    return zlib.crc32(name.encode())


def normal(seed: int, stream: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers in float32, a function of (seed, stream, name)."""
    draws = random_streams.generator(seed, stream, site=site(name))
    return torch.from_numpy(draws.standard_normal(shape, dtype=np.float32))


def initial(
    trial: TrialConfig,
    shapes: Mapping[str, tuple[int, ...]],
    backbones: Mapping[str, Path],
    theirs: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The initial tensors of a trial's backbone.

    Args:
        trial: The trial; its `pretraining` says where they come from.
        shapes: Name -> shape of every tensor that the model asks for. A position table may be
            longer than the pretrained one; the rows beyond it are left out of the answer.
        backbones: Id of a trial -> the file of the backbone that it trained.
        theirs: The parameters that a class of a user's own has drawn itself.
        buffers: Its buffers, as it has drawn them; a file may have others.

    Raises:
        DataError: If weights are missing, or their shapes are others.
    """
    row = trial.backbone.row
    if trial.pretraining == RANDOM:
        return _random(trial, shapes, theirs or {}) | dict(buffers or {})
    if trial.parent is not None:
        file = _trained(trial.parent, backbones)
        stored = read_tensors(file)
        return _select(stored, shapes, file) | _buffers(stored, buffers or {})
    file = weights_file(trial.backbone.weights or "", own=row.version is not None)
    stored = _own_names(read_tensors(file), shapes, row, file)
    first = row.first_position
    if first:
        stored |= {
            name: tensor[first:] for name, tensor in stored.items() if row.group(name) == "position"
        }
    published = {name: shape for name, shape in shapes.items() if not re.search(row.own, name)}
    read = _select(stored, published, file)
    if trial.pretraining in (STATISTICS, LAYER_STATISTICS):
        read = _redrawn(trial, read)
    own = {name: shape for name, shape in shapes.items() if name not in published}
    return read | _random(trial, own, theirs or {}) | _buffers(stored, buffers or {})


def _buffers(stored: Mapping[str, Tensor], drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return buffers as a file has them, and as they were drawn where it has none."""
    return {
        name: stored[name] if name in stored and stored[name].shape == own.shape else own
        for name, own in drawn.items()
    }


def _redrawn(trial: TrialConfig, read: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor from a normal distribution with the mean and deviation of the pretrained one, or
    of all tensors of its kind in its layer.
    """
    seed = trial.drawn_from or 0
    pools: dict[object, list[str]] = {}
    for name, tensor in read.items():
        pool: object = name
        if trial.pretraining == LAYER_STATISTICS:
            layer = re.search(trial.backbone.row.layer, name)
            pool = (layer and layer.group(1), kind_of(name, tensor))
        pools.setdefault(pool, []).append(name)
    drawn = {}
    for names in pools.values():
        values = torch.cat([read[name].flatten().double() for name in names])
        mean, deviation = float(values.mean()), float(values.std(correction=0))
        for name in names:
            shape = tuple(read[name].shape)
            drawn[name] = normal(seed, random_streams.STATISTICS, name, shape) * deviation + mean
    return drawn


def module_class(row: Backbone) -> Any:
    """The torch class of a row."""
    return imported(row.module)


def config_of(trial: TrialConfig, backbones: Mapping[str, Path]) -> dict[str, Any]:
    """Return the config that a trial's backbone takes its function from, as config.json has it.

    That of the weights, also where the trial draws its own; of the trial that trained the backbone;
    else the plain one. Drawn weights want nothing of the Hub, nor of a size of the table.

    Args:
        trial: The trial.
        backbones: Id of a trial -> the file of the backbone that it trained.

    Raises:
        DataError: If the file is missing, or cannot be honoured.
    """
    own = trial.backbone
    plain = fields.plain(own.name, own.sizes)
    if trial.parent is not None:
        return plain | function_of(_trained(trial.parent, backbones))
    if own.weights is None or not (trial.reads_weights or own.has_own_config):
        return plain
    if own.row.version is not None:
        return plain  # its class says what it computes
    file = config_file(own.weights)
    if file is None:
        return plain
    try:
        check_config(file, own.weights, own.name, **own.sizes)
    except ValueError as error:
        raise DataError(str(error)) from error
    return read_config(file)


def _trained(parent: str, backbones: Mapping[str, Path]) -> Path:
    if parent not in backbones:
        raise DataError(
            f"backbone of trial {parent}: not there; run the trial that trains it first"
        )
    return backbones[parent]


def function_of(file: Path) -> dict[str, Any]:
    """Return what the file of a trained backbone says of its function: see `FUNCTION`.

    Raises:
        DataError: If the file is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            own = json.loads((stored.metadata() or {}).get("fpt", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{file}: not a readable safetensors file ({error})") from error
    return dict(own.get(FUNCTION, {}))


def skeleton(trial: TrialConfig, tokens: int, config: Mapping[str, Any]) -> nn.Module:
    """Build the module of a trial's backbone, without values.

    Args:
        trial: The trial.
        tokens: Tokens of its sequences.
        config: See `config_of`.

    Raises:
        DataError: If the config cannot be honoured.
        ValueError: If the module cannot have so many tokens.
    """
    own = trial.backbone
    build = functools.partial(module_class(own.row), own, tokens)
    module: nn.Module
    if own.row.version is not None:
        with _seeded(trial.seed if trial.drawn_from is None else trial.drawn_from):
            return cast("nn.Module", build())
    with no_init_weights():  # every value comes from `initial`
        module = build(config) if own.name in fields.FIELDS else build()
    return module


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generators that a constructor of a user's may draw from, and put them back."""
    own = random_streams.generator(seed, random_streams.BACKBONE, site=site("its constructor"))
    pythons, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(own.integers(2**63)))
        np.random.seed(int(own.integers(2**32)))
        random.seed(int(own.integers(2**63)))
        try:
            yield
        finally:
            random.setstate(pythons)
            np.random.set_state(numpys)


def _random(
    trial: TrialConfig,
    shapes: Mapping[str, tuple[int, ...]],
    theirs: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """As the backbone's class draws a parameter; else norm gains 1, biases 0, every matrix N(0,
    0.02), or scaled towards the residual stream.
    """
    row = trial.backbone.row
    seed = trial.seed if trial.drawn_from is None else trial.drawn_from
    scaled = trial.backbone.initialiser == "scaled"
    draw = getattr(module_class(row), "draw", None)
    drawn: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if draw is not None:
            own = draw(
                name,
                shape,
                random_streams.generator(seed, random_streams.BACKBONE, site=site(name)),
            )
            if own is not None:
                drawn[name] = torch.from_numpy(np.asarray(own, dtype=np.float32))
                continue
        constant = next((rule for rule in row.initial if re.search(rule[0], name)), None)
        if name in theirs:
            drawn[name] = theirs[name]
        elif constant is not None:
            drawn[name] = _constant(constant[1], shape)
        elif len(shape) == 1:
            drawn[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        else:
            deviation = DEVIATION
            if scaled and re.search(row.residual_outputs, name):
                deviation /= (2 * trial.backbone.layers) ** 0.5
            drawn[name] = normal(seed, random_streams.BACKBONE, name, shape) * deviation
    return drawn


def _constant(value: float | None, shape: tuple[int, ...]) -> Tensor:
    """What a parameter begins with that is not drawn; None: see `Backbone.initial`."""
    if value is not None:
        return torch.full(shape, value)
    return torch.arange(1, shape[-1] + 1).float().log().expand(shape).clone()


def _own_names(
    stored: Mapping[str, Tensor], wanted: Collection[str], row: Backbone, file: Path
) -> dict[str, Tensor]:
    """Published tensors by the backbone's own names: without what a checkpoint of a larger model
    puts before them, and renamed.

    Raises:
        DataError: If the file holds the backbone twice, or beside adapters.
    """
    # A name may begin with a word that elsewhere is a wrapper's ("transformer." in DistilBERT), so
    # each name is tried behind every wrapper that it could have.
    by_prefix: dict[str, dict[str, Tensor]] = {}
    wrapper = families.wrapper_of(stored)
    for name, tensor in stored.items():
        prefix, own = "", name
        while True:
            renamed = own
            for old, new in row.renames:
                renamed = re.sub(old, new, renamed)
            by_prefix.setdefault(prefix, {})[renamed] = tensor
            if not (before := wrapper.match(own)):
                break
            prefix, own = prefix + before[0], own[before.end() :]
    adapters = next(
        (name for name in stored if re.search(r"\.lora_[AB]\b|\.base_layer\.", name)), None
    )
    if adapters is not None:
        raise DataError(
            f"{file}: {adapters} is of an adapter that was not merged into the weights; merge it "
            "(PEFT: merge_and_unload) and save the result"
        )
    found = {prefix: len(own.keys() & wanted) for prefix, own in by_prefix.items()}
    most = max(found.values(), default=0)
    best = [prefix for prefix, number in found.items() if number == most]
    if len(best) > 1 and most:
        places = " and behind ".join(repr(prefix) for prefix in sorted(best))
        raise DataError(
            f"{file}: holds tensors of these names behind {places}; keep the ones that are meant"
        )
    return by_prefix[best[0]] if best else {}


def weights_file(weights: str, *, own: bool = False) -> Path:
    """The safetensors file of `hub:ID[@REVISION]`, `package:MODULE`, `shipped:NAME` or a directory.

    Raises:
        DataError: If it is not there, or the Hub cannot be reached.
    """
    if weights.startswith(HUB):
        return one_safetensors(hub_files(weights))
    files = [file for file in weight_files(weights, own=own) if file.name != "config.json"]
    return one_safetensors(files)


@functools.lru_cache(maxsize=4)
def _mapped(file: Path, size: int, mtime_ns: int) -> dict[str, Tensor]:
    tensors = {}
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118  (not a mapping)
            own = name
            for old, new in _OLD_NAMES:
                own = own.replace(old, new)
            tensors[own] = stored.get_tensor(name)
    return tensors


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped, by their names.

    Raises:
        DataError: If the file is missing or damaged.
    """
    try:
        stat = file.stat()
        return _mapped(file, stat.st_size, stat.st_mtime_ns)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: not a readable safetensors file ({error})") from error


def _select(
    stored: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], file: Path
) -> dict[str, Tensor]:
    """The tensors that the model asks for, in float32, tables cut to what is used."""
    chosen, problems = {}, []
    for name, shape in shapes.items():
        tensor = stored.get(name)
        if tensor is None:
            packed = re.sub(r"weight$", "qweight", name)
            if packed != name and packed in stored:
                raise DataError(_quantised(file, packed, stored[packed]))
            problems.append(f"{name} is missing")
            continue
        if tensor.dtype not in _FLOATS:
            raise DataError(_quantised(file, name, tensor))
        if tuple(tensor.shape) == shape:
            chosen[name] = _finite(tensor, name, file)
        elif "position" in name or name.startswith("wpe") or "token_type" in name:
            if tensor.shape[1:] != shape[1:]:
                problems.append(f"{name} is {tuple(tensor.shape)}, wanted (any, {shape[1]})")
            chosen[name] = _finite(tensor, name, file)[: shape[0]]
        else:
            problems.append(f"{name} is {tuple(tensor.shape)}, wanted {shape}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DataError(
            f"{file}: not the weights of this backbone: {'; '.join(problems[:3])}{more}; "
            "check backbone.layers, width and heads against the file's config.json"
        )
    return chosen


def _quantised(file: Path, name: str, tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return (
        f"{file}: {name} is of type {kind}: quantised weights mean nothing without their scales; "
        "wanted are float16, bfloat16, float32 or float64"
    )


def _finite(tensor: Tensor, name: str, file: Path) -> Tensor:
    """A tensor in float32.

    Raises:
        DataError: If a number in it is none.
    """
    plain = tensor.float()
    # The sum is the quick look; it may be infinite where no number is.
    if not bool(plain.sum().isfinite()) and not bool((good := plain.isfinite()).all()):
        at = [int(i) for i in (~good).nonzero()[0]]
        value = float(plain[tuple(at)])
        of = " once it is read as float32" if bool(tensor[tuple(at)].isfinite()) else ""
        raise DataError(
            f"{file}: {name} holds {value}{of}, at {at}; weights have to be finite numbers: fetch "
            "them again, or take an earlier checkpoint"
        )
    return plain


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes of tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        total.update(f"{name}\0{tuple(tensor.shape)}\0".encode())
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """A safetensors file of tensors, with JSON metadata under the key `fpt`."""
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    return save(plain, metadata={"fpt": json.dumps(dict(metadata), sort_keys=True)})
