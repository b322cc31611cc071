"""From a file's text to a `SweepFile`, past every problem with its structure.

Whether fields of trials are right is for `sweep.sweepfile.expansion`, which puts them together.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fpt.plugins import registered
from fpt.printable import UNPRINTABLE
from fpt.published import references
from fpt.spec import JSON, Spec
from fpt.tasks import TASK_GROUP, TASKS
from sweep.sweepfile.document import (
    Document,
    Location,
    Problems,
    label,
    shown,
    spell,
)
from sweep.sweepfile.schema import (
    ONE,
    SEVERAL,
    Block,
    ClaimSpec,
    ConvergenceSpec,
    KeepSpec,
    LimitsSpec,
    RetrySpec,
    SweepFile,
    TableSpec,
)
from sweep.sweepfile.tuning_spec import PART, RUNGS, HalvingSpec, RangeSpec, TuneSpec


def load(path: str | Path) -> SweepFile:
    """Read a sweep file, as far as its structure goes; `sweep.load` reads its trials too.

    Raises:
        SweepFileError: With all problems, if there are any.
    """
    file, problems = read(path)
    if problems or file is None:
        raise problems.error()
    return file


def read(path: str | Path) -> tuple[SweepFile | None, Problems]:
    """Read a sweep file, leaving out what cannot be used.

    Returns:
        What could be read (None: nothing), and the problems.

    Raises:
        SweepFileError: If there is no text to speak of.
    """
    path = Path(path)
    document = Document(path)
    problems = Problems(path)
    content = document.parse(problems)
    if content is not None and not isinstance(content, dict):
        problems.add(1, "", "a sweep file is a mapping; it begins with `sweep: NAME`")
    if not isinstance(content, dict):
        return None, problems
    file = _validated(document, content, problems)
    if file is not None:
        file._document = document
        _check_text(file, problems)
        _check_names(file, problems)
    return file, problems


def _validated(document: Document, content: JSON, problems: Problems) -> SweepFile | None:
    try:
        return SweepFile.model_validate(content)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    kept = dict(content)
    for one in errors:
        location = tuple(part for part in one["loc"] if part not in (ONE, SEVERAL, PART, RUNGS))
        if location[:2] == ("tune", "fields"):
            location = ("tune", *location[2:])  # The file has them as keys of `tune` itself.
        what, given, allowed = explain(one, _siblings(location))
        problems.add(document.line(location), spell(location), what, given=given, allowed=allowed)
        # The rest is still to be judged: leave out an entry of axes or backbones, else the key.
        top = str(location[0]) if location else ""
        inner = kept.get(top)
        if top in ("axes", "backbones", "defaults") and isinstance(inner, dict) and location[1:]:
            kept[top] = {key: value for key, value in inner.items() if key != location[1]}
        elif top == "sweep":
            kept[top] = "unnamed"
        else:
            kept.pop(top, None)
    try:
        return SweepFile.model_validate(kept)
    except ValidationError:
        return None


def _siblings(location: Location) -> Iterable[str]:
    # What may stand at a place in the file beside a key that may not.
    parents: dict[str, type[Spec]] = {
        "table": TableSpec, "claims": ClaimSpec, "keep": KeepSpec, "include": Block,
        "retry": RetrySpec, "limits": LimitsSpec, "tune": TuneSpec,
    }  # fmt: skip
    if location[:2] == ("table", "convergence"):
        return ConvergenceSpec.model_fields
    if location[:2] == ("tune", "prune"):
        return HalvingSpec.model_fields
    if location[:1] == ("tune",) and location[2:]:
        return (field.alias or name for name, field in RangeSpec.model_fields.items())
    inside = location[:-1] and parents.get(str(location[0]))
    return (inside or SweepFile).model_fields


def _check_text(file: SweepFile, problems: Problems) -> None:
    # That nothing which is printed as it stands holds a command to a terminal.
    def check(what: str, text: str, *at: str | int) -> None:
        if found := UNPRINTABLE.search(text):
            code = f"U+{ord(found[0]):04X} {unicodedata.name(found[0], '')}".rstrip()
            problem = f"{what} {shown(text)} holds a control character ({code}); leave it out"
            problems.add(file.document.line(at), spell(at), problem)

    for at, block in file.blocks():
        for inside, axes in (
            ((*at, "axes"), block.axes),
            *(((*at, "zip", number), group) for number, group in enumerate(block.zip)),
        ):
            for axis, points in axes.items():
                check("the name", axis, *inside, axis)
                for number, point in enumerate(points):
                    check("the label", label(point), *inside, axis, number)
    for name in file.backbones:
        check("the name", name, "backbones", name)
    check("the description", file.description.replace("\n", " "), "description")
    for number, claim in enumerate(file.claims):
        check("the claim", claim.that, "claims", number, "that")
    if file.table is not None:
        check("the title", file.table.title or "", "table", "title")
        for axis, names in file.table.labels.items():
            for ours, theirs in names.items():
                check("the name", theirs, "table", "labels", axis, ours)


def _check_names(file: SweepFile, problems: Problems) -> None:
    # That what a table or a claim names is there. Whether axes are fields is for
    # sweep.sweepfile.expansion.
    axes = axis_labels(file)

    def known(what: str, name: str, allowed: Iterable[str], *at: str | int) -> bool:
        allowed = list(allowed)
        if name not in allowed:
            line = file.document.line(at)
            problems.add(line, spell(at), f"{what} {name!r}", given=name, allowed=allowed)
        return name in allowed

    no_axis = "no axis is called"
    for number, claim in enumerate(file.claims):
        at = ("claims", number)
        if known(no_axis, claim.axis, axes, *at, "axis"):
            for side in claim.sides:
                known(f"axis {claim.axis} has no point", side, axes[claim.axis], *at, "that")
        for name in claim.places:
            known(no_axis, name, axes, *at, "per")
        known(no_axis, claim.paired_by, axes, *at, "paired_by")

    table = file.table
    if table is None:
        return
    known(no_axis, table.rows, axes, "table", "rows")
    if table.columns is not None:
        known(no_axis, table.columns, axes, "table", "columns")
    published = None
    if table.reference is not None and known(
        "no published table is called", table.reference, references(), "table", "reference"
    ):
        published = references()[table.reference]
    used = [axis for axis in (table.rows, table.columns) if axis is not None]
    for axis, names in table.labels.items():
        if not known("neither rows nor columns are", axis, used, "table", "labels", axis):
            continue
        for ours, theirs in names.items():
            here = ("table", "labels", axis, ours)
            known(f"axis {axis} has no point", ours, axes.get(axis, [ours]), *here)
            if published is not None:
                names_there = published.rows if axis == table.rows else published.columns
                known(f"{table.reference} has no", theirs, names_there, *here)


def axis_labels(file: SweepFile) -> dict[str, dict[str, None]]:
    """Every axis of every block, in order, with the labels of its points."""
    out: dict[str, dict[str, None]] = {}
    for _, block in file.blocks():
        for group in (file.axes, *file.zip, block.axes, *block.zip):
            for name, points in group.items():
                out.setdefault(name, {}).update((label(point), None) for point in points)
    return out


# --- problems with fields -----------------------------------------------------------------------


def explain(
    error: ErrorDetails, siblings: Iterable[str] = ()
) -> tuple[str, object, Iterable[object]]:
    """One of pydantic's errors in plain words.

    Args:
        error: As `ValidationError.errors()` gives it.
        siblings: The names that may stand beside a field that may not be there.

    Returns:
        What is wrong, what was given if it may be a misspelling, and what is allowed.
    """
    kind, given = error["type"], error["input"]
    message = error["msg"].removeprefix("Value error, ")
    if kind == "missing":
        return "missing", None, ()
    if kind == "extra_forbidden":
        return "no such field", error["loc"][-1], siblings
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", str(error["ctx"]["expected"]))
        return f"{shown(given)} is not known", given, allowed
    if kind == "unknown_task":
        name = given.get("name") if isinstance(given, dict) else given
        if name is None:
            return "name: missing", None, TASKS
        return f"no task is called {shown(name)}", name, (*TASKS, *registered(TASK_GROUP))
    if kind == "too_short":
        return "has no points", None, ()
    subject, should, rest = message.partition(" should ")
    if should and " " not in subject:  # "Input should be a valid integer"
        plain = not isinstance(given, dict | list | tuple)
        subject = shown(given) if plain else "this"
        return f"{subject} should {rest}", None, ()
    return message[:1].lower() + message[1:], None, ()
