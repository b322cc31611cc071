"""A file of people's as data: its values, the line on which each stands, and what is wrong with it.

YAML 1.2 as plain values: `1e-3` is a number, `no` a word, a key given twice a problem. Nothing in a
file is evaluated. Reading goes on past a problem, so that all of them are told together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from fpt.printable import printable

Location = tuple[str | int, ...]
"""Where a value stands in a file: ("axes", "task", 2, "bits")."""

MOST_BYTES = 1_000_000
"""Size of a file. To read one takes some seconds a megabyte."""

MOST_VALUES = 50_000
"""Values that a file may hold once its aliases are written out: a small file of aliases to aliases
could fill any memory."""

MOST_DEPTH = 50
"""Mappings and lists that a value may lie in; a sweep file needs no more than eight."""

SHOWN = 120
"""Characters of a value that a message quotes."""


class SweepFileError(ValueError):
    """A sweep file that cannot be used. Nothing of it was started."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems: tuple[str, ...] = tuple(map(printable, problems))
        """Each is `file:line: path: what; did you mean 'x'; allowed: ...`, on one line."""
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[SweepFileError], tuple[tuple[str, ...]]]:
        return (type(self), (self.problems,))


class Problems:
    """The problems of one file, each told once, in the order of their lines."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._seen: dict[tuple[int, str], str] = {}  # (line, text) -> path
        self._unread: set[tuple[int, str]] = set()

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
        if (line, path) in self._unread:
            return
        names = [str(name) for name in allowed]
        close = difflib.get_close_matches(str(given), names, n=1) if given is not None else []
        parts = [f"{path}: {what}" if path else what]
        parts += [f"did you mean {close[0]!r}"] if close else []
        parts += [f"allowed: {', '.join(names)}"] if names else []
        self._seen[line, "; ".join(parts)] = path

    def add_unread(self, line: int, path: str, what: str) -> None:
        """Note that a value could not be read; what else seems wrong with it is not noted."""
        self.add(line, path, what)
        self._unread.add((line, path))

    def update(self, others: Problems) -> None:
        """Add the problems of others."""
        for (line, text), path in others._seen.items():
            if (line, path) not in self._unread:
                self._seen[line, text] = path

    def __bool__(self) -> bool:
        return bool(self._seen)

    def error(self) -> SweepFileError:
        """Return the error that tells them all."""
        return SweepFileError(
            f"{self.file}:{line}: {text}" if line else f"{self.file}: {text}"
            for line, text in sorted(self._seen)
        )


def spell(location: Location) -> str:
    """Return a location as people write it: `axes.task[2].bits`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".")


def shown(value: Any) -> str:
    """Return a value as a message quotes it: on one line, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]}...{text[-1]}"


MILLION = 1e6
"""Numbers from which on a label is written with an exponent."""


def label(value: Any) -> str:
    """Return a short name for a value, as an axis shows it: `0.001`, `input+output`, `null`.

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
    if isinstance(value, float) and MILLION <= abs(value) < float("inf"):
        return str(Decimal(repr(value)).normalize()).replace("E+", "e")  # 1e12, not 1000000000000.0
    text = str(value)
    return text.strip() or text


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
        """Return the line of a value, or of the nearest value around it."""
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, 1)

    def parse(self, problems: Problems) -> Any:
        """Return the file's content: dicts with str keys, lists and scalars."""
        yaml = YAML(typ="safe", pure=True)
        yaml.Composer = _Composer
        try:
            root = yaml.compose(self.text)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = " ".join(filter(None, (error.context, error.problem)))
            refused = "" if isinstance(error, _RefusedError) else "not YAML: "
            problems.add(mark.line + 1 if mark else 0, "", f"{refused}{what}")
            return None
        except YAMLError as error:
            problems.add(0, "", f"not YAML: {str(error).splitlines()[0]}")
            return None
        if root is None:
            problems.add(0, "", "empty; a sweep file has at least `sweep: NAME`")
            return None
        return _Values(self, yaml, problems).value(root, ())


class Report:
    """Takes problems of a document by where their values stand in it."""

    def __init__(self, document: Document, *, complete: bool = True) -> None:
        """Begin without any problem.

        Args:
            document: The file.
            complete: Whether all of the file could be read so far.
        """
        self.document = document
        self.problems = Problems(document.file)
        self.complete = complete
        """Whether no part of the file was left out. After that, something may seem missing or
        unused that is not, and nothing should be said of it."""

    def __call__(
        self, at: Location, what: str, *, given: object = None, allowed: Iterable[object] = ()
    ) -> None:
        """Note a problem; arguments as of `Problems.add`."""
        self.problems.add(self.document.line(at), spell(at), what, given=given, allowed=allowed)

    def left_out(
        self, at: Location, what: str, *, given: object = None, allowed: Iterable[object] = ()
    ) -> None:
        """Note a problem for which a part of the file is left out."""
        self(at, what, given=given, allowed=allowed)
        self.complete = False


class _RefusedError(ComposerError):
    # YAML, but more than a sweep file may hold.
    pass


class _Composer(Composer):
    # Refuses what is too much before it is read: composing a node takes a call inside another.

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self.warn_double_anchors = False  # YAML lets an anchor be given anew.
        self.nodes = self.nested = 0

    def get_single_node(self) -> Any:
        try:
            return super().get_single_node()
        # What ruamel raises itself: "\UFFFFFFFF" is no character, and there is no YAML 1.0.
        except (ValueError, OverflowError, AssertionError) as error:
            no_character = isinstance(error, OverflowError) or "chr()" in str(error)
            what = r"an escape \U that is no character" if no_character else str(error)
            raise ComposerError(None, None, what, self.loader.reader.get_mark()) from None

    def compose_document(self) -> Any:
        start = self.parser.peek_event()
        if start.version not in (None, (1, 2)):
            version = ".".join(map(str, start.version))
            what = f"%YAML {version}: a sweep file is YAML 1.2; leave this line out"
            raise _RefusedError(None, None, what, start.start_mark)
        return super().compose_document()

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.nodes += 1
        self.nested += 1
        if what := _excess(self.nodes, self.nested):
            raise _RefusedError(None, None, what, self.parser.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.nested -= 1
        return node


def _excess(values: int, depth: int) -> str:
    if values > MOST_VALUES:
        return f"the file holds more than {MOST_VALUES:,} values"
    return f"nested more than {MOST_DEPTH} deep" if depth > MOST_DEPTH else ""


def _depth(location: Location) -> int:
    # A dotted key stands for as many mappings.
    dots = sum(part.count(".") for part in location if isinstance(part, str))
    return len(location) + dots


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
        looped = "an alias to what it stands in" if id(node) in self.around else ""
        # Aliases to aliases may make more of what was composed.
        if what := looped or _excess(self.count, _depth(location)):
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
                return self._scalar(node)
            except OverflowError:
                what = f"{shown(node.value)} is too large a number"
            # What ruamel's constructors raise where a tag says what the text is not.
            except (YAMLError, ValueError, LookupError):
                # Python refuses to read thousands of digits as a number.
                large = kind == "int" and node.value.lstrip("+-").isdecimal()
                why = "too large a number" if large else f"not of type {kind}"
                what = f"{shown(node.value)} is {why}"
            self.problems.add_unread(line, spell(location), what)
            return None
        if isinstance(node, ScalarNode) and kind == "timestamp":
            return node.value  # A date means nothing in a sweep file: the text that was written.
        if isinstance(node, SequenceNode) and kind == "seq":
            return [self.value(one, (*location, i)) for i, one in enumerate(node.value)]
        if isinstance(node, MappingNode) and kind == "map":
            return self._mapping(node, location)
        what = f"the tag {node.tag} is not used in sweep files"
        self.problems.add_unread(line, spell(location), what)
        return None

    def _scalar(self, node: ScalarNode) -> Any:
        value = self.scalar(node)
        if isinstance(value, int):
            float(value)  # More than any number of a trial can be; to print it may be an error.
        if isinstance(value, str) and node.style in ("|", ">"):
            return value.rstrip("\n")  # The line break that a block of text ends in.
        return value

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
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise SweepFileError([f"{path}: larger than {MOST_BYTES:,} bytes; no sweep file is"])
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
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
