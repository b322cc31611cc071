"""A user's own classes, as a sweep file names them: `task: tasks:Wave`."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from fpt.backbones import BACKBONE_GROUP, BACKBONES
from fpt.plugins import CLASS, class_path, imported, registered
from fpt.tasks import TASK_GROUP, TASKS
from sweep.sweepfile.schema import SweepFile

_GROUPS: dict[str, tuple[str, Container[str]]] = {
    "task": (TASK_GROUP, TASKS),
    "backbone": (BACKBONE_GROUP, BACKBONES),
}
# Field -> where installed packages register classes for it, and the names that are ours.

ClassNames = dict[str, dict[str, None]]
"""Field -> names of classes: {"task": {"tasks:Wave": None}, "backbone": {}}."""


def class_names(spec: SweepFile) -> ClassNames:
    """Return the classes that a file names, `module:Class` or by a registered name."""
    out: ClassNames = {field: {} for field in _GROUPS}
    for _, block in spec.blocks():
        for fields in (spec.trial, block.trial, spec.axes, block.axes, *spec.zip, *block.zip):
            _collect(fields, None, out)
    for fields in (*spec.backbones.values(), *_inner(spec.defaults)):
        _collect(fields, None, out)
    return out


def name_modules(names: ClassNames) -> bool:
    """Return whether any of the classes is named by its module."""
    return any(":" in name for classes in names.values() for name in classes)


def _inner(defaults: Mapping[str, Mapping[str, Any]]) -> Iterator[Any]:
    for by_value in defaults.values():
        yield from by_value.values()


def _collect(value: Any, field: str | None, out: ClassNames) -> None:
    # `field` is that of which a word at this place would be the name.
    if isinstance(value, str):
        if field is not None and (CLASS.fullmatch(value) or _is_registered(value, field)):
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


def _is_registered(name: str, field: str) -> bool:
    group, ours = _GROUPS[field]
    return name not in ours and name in registered(group)


def field_models(names: ClassNames) -> dict[str, list[type[BaseModel]]]:
    """Return the classes whose fields may stand in a file, as far as they can be imported.

    Why one cannot be is told by the trials that name it.
    """
    out: dict[str, list[type[BaseModel]]] = {}
    for field, classes in names.items():
        group, _ = _GROUPS[field]
        for name in classes:
            with contextlib.suppress(ValueError):
                path = class_path(name, group)
                model = imported(path) if path is not None else None
                if model is not None and issubclass(model, BaseModel):
                    out.setdefault(field, []).append(model)
    return out
