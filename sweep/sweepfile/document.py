"""A file of people's as data: its values, the line on which each stands, and what is wrong with it.

YAML 1.2 as plain values: `1e-3` is a number, `no` a word, a key given twice a problem. Nothing in a
file is evaluated. Reading goes on past a problem, so that all of them are told together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

Location = tuple[str | int, ...]
"""Where a value stands in a file: ("axes", "task", 2, "bits")."""

MOST_VALUES = 1_000_000
"""Values that a file may hold once its aliases are written out: a small file of aliases to aliases
could fill any memory."""


class SweepFileError(ValueError):
    """A sweep file that cannot be used. Nothing of it was started."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        """Each is `file:line: path: what; did you mean 'x'; allowed: ...`."""
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[SweepFileError], tuple[tuple[str, ...]]]:
        return (type(self), (self.problems,))


class Problems:
    """The problems of one file, each told once, in the order of their lines."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._seen: dict[tuple[int, str], None] = {}

    def add(
        self,
        line: int,
        path: str,
        what: str,
        *,
        given: object = None,
        allowed: Iterable[object] = (),
    ) -> None:
        """Note a problem.

        Args:
            line: Line of the file, from 1; 0 for the file as a whole.
            path: Where in the file's structure: `axes.task[2].bits`.
            what: What is wrong.
            given: What was written, where it may be a misspelling of one of `allowed`.
            allowed: All that may stand there.
        """
        names = [str(name) for name in allowed]
        close = difflib.get_close_matches(str(given), names, n=1) if given is not None else []
        parts = [f"{path}: {what}" if path else what]
        parts += [f"did you mean {close[0]!r}"] if close else []
        parts += [f"allowed: {', '.join(names)}"] if names else []
        self._seen[line, "; ".join(parts)] = None

    def __bool__(self) -> bool:
        return bool(self._seen)

    def error(self) -> SweepFileError:
        """The error that tells them all."""
        return SweepFileError(
            f"{self.file}:{line}: {text}" if line else f"{self.file}: {text}"
            for line, text in sorted(self._seen)
        )


def spell(location: Location) -> str:
    """A location as people write it: `axes.task[2].bits`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".")


def label(value: Any) -> str:
    """A short name for a value, as an axis shows it: `0.001`, `input+output`, `null`.

    A mapping is called by its `label`, else its `name`, else all that it says.
    """
    if isinstance(value, Mapping):
        if "label" in value or "name" in value:
            return label(value.get("label", value.get("name")))
        return ",".join(f"{key}={label(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return "+".join(label(one) for one in value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


class Document:
    """A file as plain values, and the line on which each stands."""

    def __init__(self, file: Path) -> None:
        """Read a file.

        Raises:
            SweepFileError: If there is no text.
        """
        self.file = file
        """The path as it was given."""
        self.text = _text(file)
        self.lines: dict[Location, int] = {}

    def line(self, location: Location) -> int:
        """The line of a value, or of the nearest value around it."""
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, 1)

    def parse(self, problems: Problems) -> Any:
        """The file's content: dicts with str keys, lists and scalars."""
        yaml = YAML(typ="safe", pure=True)
        try:
            root = yaml.compose(self.text)
        except RecursionError:
            problems.add(0, "", "not a sweep file: nested too deeply")
            return None
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = " ".join(filter(None, (error.context, error.problem)))
            problems.add(mark.line + 1 if mark else 0, "", f"not YAML: {what}")
            return None
        except YAMLError as error:
            problems.add(0, "", f"not YAML: {str(error).splitlines()[0]}")
            return None
        if root is None:
            problems.add(0, "", "empty; a sweep file has at least `sweep: NAME`")
            return None
        return _Values(self, yaml, problems).value(root, ())


class _Values:
    # Nodes to values. ruamel's own constructors stop at the first problem and know no lines.

    def __init__(self, document: Document, yaml: YAML, problems: Problems) -> None:
        self.document = document
        self.problems = problems
        self.scalar = yaml.constructor.construct_object
        self.around: set[int] = set()
        self.count = 0

    def value(self, node: Node, location: Location) -> Any:
        line = node.start_mark.line + 1
        self.document.lines.setdefault(location, line)
        self.count += 1
        if self.count > MOST_VALUES or id(node) in self.around:
            many = f"the file holds more than {MOST_VALUES:,} values"
            what = many if self.count > MOST_VALUES else "an alias to what it stands in"
            self.problems.add(line, spell(location), what)
            raise self.problems.error()
        self.around.add(id(node))
        out = self._of_kind(node, location, line)
        self.around.remove(id(node))
        return out

    def _of_kind(self, node: Node, location: Location, line: int) -> Any:
        kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
        if isinstance(node, ScalarNode) and kind in ("str", "int", "float", "bool", "null"):
            try:
                return self.scalar(node)
            except (YAMLError, ValueError):
                self.problems.add(line, spell(location), f"{node.value!r} is not of type {kind}")
                return None
        if isinstance(node, ScalarNode) and kind == "timestamp":
            return node.value  # A date means nothing in a sweep file: the text that was written.
        if isinstance(node, SequenceNode) and kind == "seq":
            return [self.value(one, (*location, i)) for i, one in enumerate(node.value)]
        if isinstance(node, MappingNode) and kind == "map":
            return self._mapping(node, location)
        self.problems.add(line, spell(location), f"the tag {node.tag} is not used in sweep files")
        return None

    def _mapping(self, node: MappingNode, location: Location) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                self.problems.add(line, spell(location), "a key has to be a word or a number")
                continue
            if str(key_node.tag).endswith(":merge"):
                what = "merge keys are not YAML 1.2; share fields under `trial:` or `defaults:`"
                self.problems.add(line, spell(location), what)
                continue
            key = label(self._of_kind(key_node, (*location, key_node.value), line))
            here = (*location, key)
            if key in out:
                first = self.document.lines[here]
                self.problems.add(line, spell(here), f"given twice, first on line {first}")
                continue
            self.document.lines[here] = line
            out[key] = self.value(value_node, here)
        return out


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent if path.parent.is_dir() else Path()
        found = {str(near): None for near in (*folder.glob("*.yaml"), *folder.glob("*.yml"))}
        close = difflib.get_close_matches(str(path), found, n=1)
        meant = f"; did you mean {close[0]!r}" if close else ""
        raise SweepFileError([f"{path}: no such file{meant}"]) from None
    except IsADirectoryError:
        raise SweepFileError([f"{path}: is a folder, not a sweep file"]) from None
    except OSError as error:
        raise SweepFileError([f"{path}: cannot be read ({error.strerror})"]) from None
    except UnicodeDecodeError as error:
        raise SweepFileError([f"{path}: not UTF-8 text (byte {error.start})"]) from None
