"""What is inside weights, by group, read from the headers of their safetensors files: without
torch, and without reading a number.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fpt.backbones import families
from fpt.backbones.sources import read_config, unknown_family, weight_files
from fpt.files import DataError

LONGEST = 100_000_000
"""Bytes that a header has at most, as in safetensors' own reader."""


@dataclass
class Count:
    """Tensors, and the numbers in them."""

    tensors: int = 0
    parameters: int = 0

    def add(self, shape: tuple[int, ...]) -> None:
        """Count one more tensor."""
        self.tensors += 1
        self.parameters += math.prod(shape)


@dataclass
class Inventory:
    """The parameters of weights, sorted."""

    family: str
    """As people call it."""
    sees: str
    """causal or bidirectional."""
    groups: dict[str, Count] = field(default_factory=dict)
    """Group -> its parameters."""
    left_out: dict[str, Count] = field(default_factory=dict)
    """What it is -> its parameters, which a trial's tokens do not pass."""
    unknown: list[str] = field(default_factory=list)
    """Parameters without a rule."""


def tensors(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor of a safetensors file.

    Raises:
        DataError: If it is none.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= LONGEST:
                raise ValueError("no header")
            header = json.loads(stream.read(length))
        for name, what in header.items():
            if name != "__metadata__":
                yield name, tuple(int(n) for n in what["shape"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not a readable safetensors file ({error})") from error


@functools.lru_cache(maxsize=64)
def inventory(weights: str) -> Inventory:
    """Return the parameters of weights by group, by the rules of their family.

    Args:
        weights: A directory, `package:MODULE[/FOLDER]` or `shipped:NAME`.

    Raises:
        DataError: If they are not there, of a family without rules, or not safetensors.
    """
    config, *files = weight_files(weights)
    said = read_config(config)
    family = families.family_of(said)
    if family is None:
        raise DataError(unknown_family(config, said))
    found = Inventory(family.title, family.words)
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for file in files:
        if file.suffix == ".json":
            continue
        if file.suffix != ".safetensors":
            raise DataError(
                f"{file}: a pickle has no header that can be read by itself; save the weights as "
                "safetensors (transformers: save_pretrained)"
            )
        shapes += tensors(file)
    wrapper = families.wrapper_of([name for name, _ in shapes])
    for name, shape in shapes:
        group, what = families.sort(family, families.bare(family, name, wrapper))
        if group is not None:
            found.groups.setdefault(group, Count()).add(shape)
        elif what is not None:
            found.left_out.setdefault(what, Count()).add(shape)
        else:
            found.unknown.append(name)
    return found
