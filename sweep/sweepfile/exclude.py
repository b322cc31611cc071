"""The key `exclude` of a sweep file: patterns, and the trials that they leave out."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpt.backbones.sources import PACKAGE, package_folders
from sweep.sweepfile.document import Location, Report, label
from sweep.sweepfile.schema import CONDITIONS


@dataclass(frozen=True, eq=False, slots=True)
class Rule:
    """A pattern, read."""

    at: Location
    """Where it stands in the file."""
    fields: Mapping[str, Any]
    """Axis or field -> what fits; a pattern without any fits every trial."""
    reason: str = ""
    """Of one with a condition, why it does or does not apply on this machine: `../data/mnist is not
    there`, with the path as it was written."""
    applies: bool = True
    """Whether a trial that fits is left out."""

    @property
    def words(self) -> str:
        """The pattern for people: `task mnist`; empty where it has nothing but its condition."""
        return ", ".join(f"{key} {_wanted(one)}" for key, one in self.fields.items())

    def fits(
        self, labels: Mapping[str, str], value: Callable[[str], Any], known: Callable[[str], bool]
    ) -> bool:
        """Return whether a trial fits.

        Args:
            labels: Of its axes.
            value: Gives the value of one of its fields.
            known: Says whether a name is a field.
        """
        return all(
            (key in labels and _fits(wanted, labels[key]))
            or (known(key) and _fits(wanted, value(key)))
            for key, wanted in self.fields.items()
        )


class ExcludeRules:
    """The patterns of a file, each read once."""

    def __init__(
        self, known: Callable[[str, Location], bool], folder: Path, report: Report
    ) -> None:
        """Read patterns.

        Args:
            known: Says whether a name is a field or an axis; if not, it reports so.
            folder: Where the paths of conditions start: the file's own folder.
            report: Takes problems.
        """
        self._known = known
        self._folder = folder
        self._report = report
        self._read: dict[Location, Rule | None] = {}

    @property
    def places(self) -> tuple[Location, ...]:
        """Where patterns stand that were read."""
        return tuple(self._read)

    def read(self, patterns: Iterable[tuple[Location, Mapping[str, Any]]]) -> tuple[Rule, ...]:
        """Return those patterns that can be used; what is wrong with the others is reported."""
        out = []
        for at, written in patterns:
            if at not in self._read:
                self._read[at] = self._rule(written, at)
            out.append(self._read[at])
        return tuple(rule for rule in out if rule is not None)

    def _rule(self, written: Mapping[str, Any], at: Location) -> Rule | None:
        fields = {key: one for key, one in written.items() if key not in CONDITIONS}
        known = [self._known(key, (*at, key)) for key in fields]
        conditions = [key for key in written if key in CONDITIONS]
        if len(conditions) > 1:
            what = "missing and present in one pattern; give each a pattern of its own"
            self._report.left_out(at, what)
            return None
        if not all(known) or not written:  # One that says nothing leaves out nothing.
            return None
        if not conditions:
            return Rule(at, fields)
        (condition,) = conditions
        path = written[condition]
        if not isinstance(path, str) or not path:
            what = "has to be a path, from the sweep file's folder, or package:MODULE/FOLDER"
            self._report.left_out((*at, condition), what)
            return None
        there = _is_there(path, self._folder)
        reason = f"{path} is {'there' if there else 'not there'}"
        return Rule(at, fields, reason, applies=there == (condition == "present"))


def _fits(pattern: Any, value: Any) -> bool:
    if isinstance(pattern, list):
        return any(_fits(one, value) for one in pattern)
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(label(value), pattern)
    same_kind = isinstance(pattern, bool) == isinstance(value, bool)
    return (same_kind and bool(pattern == value)) or label(pattern) == label(value)


def _wanted(pattern: Any) -> str:
    return " or ".join(label(one) for one in (pattern if isinstance(pattern, list) else [pattern]))


def _is_there(path: str, folder: Path) -> bool:
    # Whether a path, from a folder, or a folder of an installed package, is on this machine.
    if not path.startswith(PACKAGE):
        return (folder / os.path.expandvars(os.path.expanduser(path))).exists()
    return any(place.exists() for place in package_folders(path))
