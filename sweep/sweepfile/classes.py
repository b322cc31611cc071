"""The tasks and backbones that a sweep file names: ours, and a user's own classes."""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fpt.backbones import BACKBONE_GROUP, BACKBONES
from fpt.config import BackboneConfig, own_config
from fpt.plugins import CLASS, class_path, imported, registered
from fpt.tasks import TASK_GROUP, TASKS
from sweep.sweepfile.schema import SweepFile

_GROUPS = {"task": TASK_GROUP, "backbone": BACKBONE_GROUP}
# Field -> where installed packages register classes for it.

_OURS: dict[str, Mapping[str, type[BaseModel]]] = {
    "task": TASKS,
    "backbone": dict.fromkeys(BACKBONES, BackboneConfig),
}

Names = dict[str, dict[str, None]]
"""Field -> names: {"task": {"bit-xor": None, "tasks:Wave": None}, "backbone": {"gpt2": None}}."""


def names_of(spec: SweepFile) -> Names:
    """Return the tasks and backbones that a file names."""
    out: Names = {field: {} for field in _GROUPS}
    for _, block in spec.blocks():
        for fields in (spec.trial, block.trial, spec.axes, block.axes, *spec.zip, *block.zip):
            _collect(fields, None, out)
    for fields in (*spec.backbones.values(), *_inner(spec.defaults)):
        _collect(fields, None, out)
    return out


def name_modules(names: Names) -> bool:
    """Return whether a class is named by its module: `tasks:Wave`."""
    return any(":" in name for of_field in names.values() for name in of_field)


def _inner(defaults: Mapping[str, Mapping[str, Any]]) -> Iterator[Any]:
    for by_value in defaults.values():
        yield from by_value.values()


def _collect(value: Any, field: str | None, out: Names) -> None:
    # `field` is that of which a word at this place would be the name.
    if isinstance(value, str):
        if field is not None and (
            CLASS.fullmatch(value) or value in _OURS[field] or value in registered(_GROUPS[field])
        ):
            out[field][value] = None
    elif isinstance(value, list | tuple):
        for one in value:
            _collect(one, field, out)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            head, _, rest = str(key).partition(".")
            if head in out:
                _collect(one, head if rest in ("", "name") else None, out)
            else:
                _collect(one, field if key == "name" else None, out)


def models(names: Names) -> dict[str, dict[str, type[BaseModel]]]:
    """Return the classes that hold the fields of what is named, as far as they can be imported:
    {"task": {"bit-xor": BitXor, "tasks:Wave": Wave}}.

    Why one cannot be is for the trials that name it to say.
    """
    out: dict[str, dict[str, type[BaseModel]]] = {}
    for field, of_field in names.items():
        for name in of_field:
            model: type | None = _OURS[field].get(name)
            if model is None:
                with contextlib.suppress(ValueError):
                    path = class_path(name, _GROUPS[field])
                    model = imported(path) if path is not None else None
                    if model is not None and field == "backbone":
                        model = own_config(model)
            if model is not None and issubclass(model, BaseModel):
                out.setdefault(field, {})[name] = model
    return out


def meant(name: str, folder: Path) -> str | None:
    """Return the class that was meant by a name that is none, as `module:Class`; None: who knows.

    Args:
        name: As it was written: `tasks.Wave`, `Wave`, `tasks:Wav`.
        folder: The sweep file's, whose modules are looked through and not run.
    """
    near = _classes_in(folder)
    with_colon = ":".join(name.rpartition(".")[::2])
    if with_colon in near:
        return with_colon
    same = [one for one in near if one.partition(":")[2].lower() == name.lower()]
    close = same or difflib.get_close_matches(name, near, n=1)
    if close:
        return close[0]
    return with_colon if re.fullmatch(r"(?:[a-z_]\w*\.)+[A-Z]\w*", name) else None


@functools.lru_cache(maxsize=1)
def _classes_in(folder: Path) -> tuple[str, ...]:
    return tuple(_each_class(folder))


def _each_class(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("*.py")):
        with contextlib.suppress(OSError, SyntaxError, ValueError):
            for node in ast.parse(file.read_bytes()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    yield f"{file.stem}:{node.name}"
