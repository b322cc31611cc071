"""The base of every config.

A spec is frozen, refuses unknown fields and non-finite numbers, and documents each field by the
docstring under it. Whatever a user writes in a sweep file is parsed into specs and nothing else.
"""

from __future__ import annotations

import functools
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

JSON = dict[str, Any]
"""A JSON object, as `json.loads` gives it."""


@functools.cache
def _kinds(annotation: Any) -> frozenset[Any]:
    """The types at the leaves of an annotation."""
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        parts = parts[:1]  # the rest is metadata
    inner = [_kinds(part) for part in parts]
    return frozenset().union(*inner) if inner else frozenset([annotation])


def _reads_as_number(value: bool | str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


class Spec(BaseModel):
    """A frozen pydantic model: a typo in a field is an error, never a default."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any) -> Any:
        # pydantic would read `true` and "2" as numbers, and -0.0 has another text than the 0.0 that
        # it equals. One look at all fields: a validator on each doubles what it takes to plan a
        # large sweep.
        if isinstance(value, dict):
            changed: dict[Any, Any] = {}
            for name, given in value.items():
                if isinstance(given, bool | str):
                    if name in _numeric(cls) and _reads_as_number(given):
                        changed[name] = _NoNumber(given)
                elif isinstance(given, float | list | tuple | dict) and _holds_minus_zero(given):
                    changed[name] = _without_minus_zero(given)
            return value | changed if changed else value
        return value


def _holds_minus_zero(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        return any(map(_holds_minus_zero, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and value == 0 and math.copysign(1, value) < 0


def _without_minus_zero(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_without_minus_zero(one) for one in value]
    if isinstance(value, dict):
        return {key: _without_minus_zero(one) for key, one in value.items()}
    return 0.0 if _holds_minus_zero(value) else value


class _NoNumber:
    # Stands for a bool or a word where a number belongs: no field takes it, so that it is told
    # together with whatever else is wrong.
    def __init__(self, given: bool | str) -> None:
        self.given = given

    def __repr__(self) -> str:
        return repr(self.given)


@functools.cache
def _numeric(spec: type[Spec]) -> frozenset[str]:
    """The fields that are numbers and nothing that a bool or a word could be."""
    kinds = {name: _kinds(cast("Any", f.annotation)) for name, f in spec.model_fields.items()}
    return frozenset(name for name, k in kinds.items() if k & {int, float} and not k & {bool, str})


def _expanded(value: Any) -> Any:
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    for plain, braced in re.findall(r"\$(?:(\w+)|\{([^}]*)\})", text):
        name = plain or braced
        if name not in os.environ:
            raise ValueError(
                f"{text}: the environment variable {name} is not set; set it, or write the path out"
            )
    return os.path.expanduser(os.path.expandvars(text))


DataPath = Annotated[Path, BeforeValidator(_expanded)]
"""A path to data, as a user writes it: `~`, `$VAR` and `${VAR}` are expanded, and a variable that
is not set is an error. What is relative stays so."""
