"""Fields of trials as they were written: nested, each value with its place in the file.

Trees are immutable, and equal only to themselves: a merge of the same two gives the same tree, so
that a task which 1,000 seeds share is validated once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from fpt.config import AnyBackbone, AnyTask, TrialConfig
from sweep.sweepfile.document import Location, Report
from sweep.sweepfile.schema import NAMED, NO_PATH, OBJECTS, PATHS

FieldPath = tuple[str, ...]
"""The names that lead to a field: ("task", "bits")."""


@dataclass(frozen=True, eq=False, slots=True)
class Leaf:
    """A value of a field as it was written."""

    value: Any
    at: Location
    """Where it stands in the file."""

    @property
    def plain(self) -> Any:
        """The value."""
        return self.value


class FieldTree(Mapping[str, "Leaf | FieldTree"]):
    """Fields by their names, those with fields of their own as trees."""

    __slots__ = ("_merged", "_nodes")

    def __init__(self, nodes: Mapping[str, Leaf | FieldTree] | None = None) -> None:
        self._nodes = dict(nodes or {})
        self._merged: dict[FieldTree, FieldTree] = {}

    def __getitem__(self, name: str) -> Leaf | FieldTree:
        return self._nodes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    @property
    def plain(self) -> dict[str, Any]:
        """The values alone, nested."""
        return {name: node.plain for name, node in self._nodes.items()}

    @property
    def at(self) -> Location:
        """Where the fields stand; of those that were written in several places, the last one's."""
        at: Location = ()
        for path, leaf in self.leaves():
            at = leaf.at
            for part in reversed(path):
                key = str(at[-1])
                if key != part and not key.endswith(f".{part}"):
                    break
                at = at[:-1] if key == part else (*at[:-1], key.removesuffix(f".{part}"))
        return at

    def leaves(self, under: FieldPath = ()) -> Iterator[tuple[FieldPath, Leaf]]:
        """Yield each value with its path."""
        for name, node in self._nodes.items():
            if isinstance(node, Leaf):
                yield (*under, name), node
            else:
                yield from node.leaves((*under, name))

    def descend(self, path: Sequence[Any]) -> tuple[Leaf | FieldTree, int]:
        """Return the deepest node on a path, and how many steps lead to it."""
        node: Leaf | FieldTree = self
        for depth, part in enumerate(path):
            if not isinstance(node, FieldTree) or part not in node._nodes:
                return node, depth
            node = node._nodes[part]
        return node, len(path)

    def merge(self, over: FieldTree) -> FieldTree:
        """Return these fields with others on top of them."""
        nodes = dict(self._nodes)
        for name, node in over._nodes.items():
            before = nodes.get(name)
            if isinstance(node, FieldTree) and isinstance(before, FieldTree):
                merged = before._merged.get(node)
                if merged is None:
                    merged = before._merged[node] = before.merge(node)
                node = merged
            nodes[name] = node
        return FieldTree(nodes)


def overlap(one: FieldPath, other: FieldPath) -> bool:
    """Return whether two paths are one, or one leads through the other."""
    return all(a == b for a, b in zip(one, other, strict=False))


def nested(path: Sequence[str], node: Leaf | FieldTree) -> Leaf | FieldTree:
    """Return a node under the names of a path."""
    for part in reversed(path):
        node = FieldTree({part: node})
    return node


class FieldNames:
    """The names that fields may have in one file: those of every trial, and of its own classes."""

    def __init__(self, named: Mapping[str, Mapping[str, type[BaseModel]]] | None = None) -> None:
        """Know the names.

        Args:
            named: Field -> the classes that the file names there, by their names.
        """
        self._named = {field: tuple(of_field.values()) for field, of_field in (named or {}).items()}
        self._models: dict[str, tuple[type[BaseModel], ...]] = {
            name: (*models, *self._named.get(name, ())) for name, models in OBJECTS.items()
        }
        self._are_fields: dict[str, bool] = {}

    def under(self, path: FieldPath) -> tuple[str, ...]:
        """Return the names that may stand under a path into a trial: () is the trial itself.

        Under a task or backbone they are those of what the file names, if it names any.
        """
        return self._of(path, self._named.get(path[0]) if path else None)

    def all_under(self, name: str) -> tuple[str, ...]:
        """Return the names that may stand under a field in any file, and in this one."""
        return self._of((name,))

    def _of(
        self, path: FieldPath, models: Sequence[type[BaseModel]] | None = None
    ) -> tuple[str, ...]:
        if not path:
            return tuple(TrialConfig.model_fields)
        if len(path) > 1 or path[0] not in self._models:
            return ()
        models = models or self._models[path[0]]
        names = dict.fromkeys(name for one in models for name in one.model_fields)
        return (*names, "size") if path[0] == "backbone" else tuple(names)

    def is_field(self, path: str) -> bool:
        """Return whether a dotted path leads to a field of a trial."""
        if path not in self._are_fields:
            parts = path.split(".")
            self._are_fields[path] = all(
                part in self._of(tuple(parts[:depth])) for depth, part in enumerate(parts[:2])
            ) and (len(parts) <= 2 or parts[0] in self._models)
        return self._are_fields[path]

    def holds_path(self, path: FieldPath) -> bool:
        """Return whether a field holds the path of a file or folder."""
        if ".".join(path) in PATHS:
            return True
        if len(path) != 2 or path[0] not in self._models:
            return False
        found = (one.model_fields.get(path[1]) for one in self._models[path[0]])
        return any(field is not None and _is_path(field.annotation) for field in found)


def _is_path(annotation: Any) -> bool:
    return annotation is Path or any(map(_is_path, get_args(annotation)))


class FieldReader:
    """Makes trees of what is written."""

    def __init__(self, names: FieldNames, folder: Path, report: Report) -> None:
        """Read fields of a file.

        Args:
            names: The names of its fields.
            folder: Where relative paths start: the file's own folder.
            report: Takes problems.
        """
        self._names = names
        self._folder = folder
        self._report = report

    def tree(self, fields: Mapping[str, Any], at: Location, under: FieldPath = ()) -> FieldTree:
        """Return fields by name or dotted path as a tree.

        Args:
            fields: As they were written.
            at: Where they stand.
            under: The path of the field that they belong to.
        """
        out: dict[str, Leaf | FieldTree] = {}
        for key, value in fields.items():
            head, *inner = key.split(".")
            here = (*at, key)
            node = nested(inner, self.node(value, here, (*under, head, *inner)))
            before = out.get(head)
            if before is not None and _are_twice(before, node):
                self._report(here, "given twice in one place")
                node = before
            elif isinstance(before, FieldTree) and isinstance(node, FieldTree):
                node = before.merge(node)
            out[head] = node
        return FieldTree(out)

    def node(self, value: Any, at: Location, path: FieldPath) -> Leaf | FieldTree:
        """Return the value of a field as a node; a relative path is made absolute."""
        if isinstance(value, Mapping) and value:
            return self.tree(value, at, path)
        if isinstance(value, str) and len(path) == 1 and path[0] in NAMED:
            return FieldTree({"name": Leaf(value, at)})
        if (
            isinstance(value, str)
            and not value.startswith(NO_PATH)
            and self._names.holds_path(path)
        ):
            # Absolute, since workers run elsewhere.
            whole = os.path.join(self._folder, os.path.expanduser(value))
            value = os.path.abspath(whole)
        return Leaf(value, at)


def _are_twice(one: Leaf | FieldTree, other: Leaf | FieldTree) -> bool:
    if isinstance(one, Leaf) or isinstance(other, Leaf):
        return True
    theirs = [path for path, _ in other.leaves()]
    return any(overlap(path, their) for path, _ in one.leaves() for their in theirs)


class FieldValues:
    """The values of fields as a trial will have them; what trees share is validated once."""

    def __init__(self) -> None:
        self._adapters = {
            name: TypeAdapter[Any]({"task": AnyTask, "backbone": AnyBackbone}.get(name, specs[0]))
            for name, specs in OBJECTS.items()
        }
        self._specs: dict[FieldTree, Any] = {}

    def spec(self, name: str, tree: FieldTree) -> Any:
        """Return a task, backbone ... as a validated spec.

        If it has problems, it is returned as plain values, so that the trial around it has them.
        """
        if tree not in self._specs:
            made: Any = tree.plain
            if name in self._adapters:
                with contextlib.suppress(ValidationError):
                    made = self._adapters[name].validate_python(made)
            self._specs[tree] = made
        return self._specs[tree]

    def value(self, fields: FieldTree, field: str) -> Any:
        """Return the value of a field, the default where none was written.

        Of a task or backbone it is the name; None where there is no such field.
        """
        path = field.split(".")
        node, depth = fields.descend(path)
        if depth == len(path) and isinstance(node, Leaf):
            return node.value
        if depth and isinstance(own := fields[path[0]], FieldTree):
            value = self.spec(path[0], own)
        elif path[0] in TrialConfig.model_fields:
            value = TrialConfig.model_fields[path[0]].get_default()
        else:
            return None
        if len(path) == 1:
            return getattr(value, "name", value)
        return getattr(value, path[1], None)
