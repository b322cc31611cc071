from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpt.printable import printable
from sweep.sweepfile import document
from sweep.sweepfile.document import (
    Document,
    Problems,
    SweepFileError,
    label,
    spell,
)


def read(folder: Path, text: str) -> tuple[Any, Document, list[str]]:
    file = folder / "file.yaml"
    file.write_text(text, encoding="utf-8")
    problems = Problems(file)
    found = Document(file)
    value = found.parse(problems)
    told = [one.removeprefix(f"{file}:") for one in problems.error().problems]
    return value, found, told


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    text = (
        "a: 1e-3\nb: no\nc: 1.0e-5\nd: 1E5\ne: on\nf: 0x1f\ng: ~\nh: true\ni: 2026-01-01\n"
        "j: '7'\nk: 1:30\nl: 010\n"
    )
    value, _, told = read(tmp_path, text)
    assert not told
    assert value == {
        "a": 0.001, "b": "no", "c": 1e-5, "d": 1e5, "e": "on", "f": 31, "g": None, "h": True,
        "i": "2026-01-01", "j": "7", "k": "1:30", "l": 10,
    }  # fmt: skip
    assert isinstance(value["a"], float)


def test_every_value_has_a_line(tmp_path: Path) -> None:
    _, found, _ = read(tmp_path, "a:\n  b: 1\n  c:\n  - x\n  - {y: 1,\n     z: 2}\n")
    lines = {spell(place): line for place, line in found.lines.items() if place}
    assert lines == {"a": 1, "a.b": 2, "a.c": 3, "a.c[0]": 4, "a.c[1]": 5,
                     "a.c[1].y": 5, "a.c[1].z": 6}  # fmt: skip
    assert found.line(("a", "c", 1, "not there")) == 5


def test_every_duplicate_key_is_told_with_both_lines(tmp_path: Path) -> None:
    value, _, told = read(tmp_path, "a: 1\nb:\n  c: 1\n  c: 2\na: 3\n1: x\n1.0: y\n'1': z\n")
    assert value == {"a": 1, "b": {"c": 1}, "1": "x", "1.0": "y"}
    assert told == [
        "4: b.c: given twice, first on line 3",
        "5: a: given twice, first on line 1",
        "8: 1: given twice, first on line 6",
    ]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a: [1,\nb: 2\n", "", "not YAML"),
        ("a: 1\n\tb: 2\n", "2: ", "not YAML"),
        ("a: *nope\n", "1: ", "undefined alias 'nope'"),
        ("a: 1\n---\nb: 2\n", "2: ", "another document"),
        ("", "", "empty"),
        ("# nothing but this\n", "", "empty"),
        ("a: \0\n", "", "not YAML"),
        ("a: !!python/object:os.system {}\n", "1: ", "a: the tag"),
        ("a: !!binary aGk=\n", "1: ", "a: the tag"),
        ("a: !!set {x}\n", "1: ", "a: the tag"),
        ("a: !!int twelve\n", "1: ", "a: 'twelve' is not of type int"),
        ("x: &x {a: 1}\ny:\n  <<: *x\n", "3: ", "y: merge keys"),
        ("? [a]\n: 1\n", "1: ", "a key has to be"),
        ("a: 1\nb: " + "[" * 600, "2: ", "nested more than 50 deep"),
        ("a: 1\nb: " + "[" * 51 + "]" * 51, "2: ", "nested more than 50 deep"),
        ("a: " + "{x: " * 400 + "1" + "}" * 400, "1: ", "nested more than 50 deep"),
        ("a:\n" + "".join(f"{' ' * n}- \n" for n in range(1, 90)), "51: ", "nested more than 50"),
        ("a: 1\n" + "b." * 400 + "c: 1\n", "2: ", "nested more than 50 deep"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 99)),
            "1: a49",
            "nested more than 50 deep",
        ),
        ("a: " + "9" * 5000, "1: ", "is too large a number"),
        ("a: " + "9" * 4000, "1: ", "is too large a number"),
        ("a: 0x" + "f" * 10_000, "1: ", "is too large a number"),
        ("a: -0o" + "7" * 10_000, "1: ", "is too large a number"),
        ("? 0x" + "f" * 10_000 + "\n: 1\n", "1: ", "is too large a number"),
        ("a: !!int ''\n", "1: ", "a: '' is not of type int"),
        ("a: !!bool maybe\n", "1: ", "a: 'maybe' is not of type bool"),
        ("a: !!float x\n", "1: ", "a: 'x' is not of type float"),
        ('a: 1\nb: "\n\n \\UFFFFFFFF"\n', "4: ", "not YAML: an escape \\U that is no character"),
        ('a: "\\U00110000"\n', "1: ", "not YAML: an escape \\U that is no character"),
        ("%YAML 1.1\n---\na: 010\n", "2: ", "%YAML 1.1: a sweep file is YAML 1.2"),
        ("%YAML 1.0\n---\na: 1\n", "", "not YAML: version"),
        ("# old\n%YAML 1.1\n---\na: yes\n", "3: ", "%YAML 1.1: a sweep file is YAML 1.2"),
    ],
)
def test_what_is_no_plain_yaml_is_told(tmp_path: Path, text: str, line: str, what: str) -> None:
    try:
        _, _, told = read(tmp_path, text)
    except SweepFileError as error:  # Nothing is read past what is too much.
        told = [one.removeprefix(f"{tmp_path}/file.yaml:") for one in error.problems]
    assert len(told) == 1
    assert what in told[0]
    assert told[0].lstrip().startswith(line)


def test_aliases_are_values_but_neither_loops_nor_bombs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value, _, told = read(tmp_path, "a: &x [1, 2]\nb: *x\n")
    assert (value, told) == ({"a": [1, 2], "b": [1, 2]}, [])
    with pytest.raises(SweepFileError, match=r":2: b\[1\]: an alias to what it stands in"):
        read(tmp_path, "a: 1\nb: &b [1, *b]\n")
    bomb = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
        f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(9)
    )
    monkeypatch.setattr(document, "MOST_VALUES", 5000)
    with pytest.raises(SweepFileError, match="more than 5,000 values"):
        read(tmp_path, bomb)


def test_a_directive_of_this_version_and_an_anchor_given_anew_are_yaml(tmp_path: Path) -> None:
    value, _, told = read(tmp_path, "%YAML 1.2\n---\na: &x 010\nb: *x\nc: &x 1e-3\nd: *x\n")
    assert (value, told) == ({"a": 10, "b": 10, "c": 0.001, "d": 0.001}, [])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: >\n  two\n  words\n", "two words"), ("a: |\n  two\n  lines\n", "two\nlines"),
        ("a: >+\n  word\n\n\n", "word"), ("a: |-\n  word\n", "word"), ('a: "x\\n"\n', "x\n"),
    ],
)  # fmt: skip
def test_a_block_of_text_ends_without_a_line_break(tmp_path: Path, text: str, value: str) -> None:
    assert read(tmp_path, text)[0] == {"a": value}


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_bytes(b"a: [" + b"1, " * 400_000 + b"1]\n")
    with pytest.raises(SweepFileError, match="larger than 1,000,000 bytes"):
        Document(file)
    many = "a: [" + "1, " * document.MOST_VALUES + "1]\n"
    assert read(tmp_path, many)[2] == ["1: the file holds more than 50,000 values"]


PIECES = (
    "a", "bit-xor", "0", "-0.0", ".nan", "1e999", "9" * 400, "0x" + "f" * 5000, "~", "1_0", "1:30",
    ": ", ", ", "- ", "\n", "\n  ", "[", "]", "{", "}", "'", '"', "&a ", "*a", "? ", "<<: ", "#",
    "!!int ", "!!float ", "!!bool ", "!!null ", "!!str ", "!!timestamp ", "!!seq ", "!!map ", "! ",
    "!x ", "!<tag:yaml.org,2002:int> ", "| \n  x\n", ">+\n  x\n\n", "|2-\n", "a." * 60 + "b",
    "\\e", "\\u202e", "\\ud800", "\\UFFFFFFFF", "\\x00", "\u202e", "\ufeff", "\u2028", "\x85",
    "%YAML 1.1\n---\n", "%YAML 1.2\n---\n", "%YAML 9\n", "%TAG ! tag:x,2000:\n", "---\n", "...\n",
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=14),
    inside=st.sampled_from(["%s", "a: %s\n", 'a: "%s"\n']),
)
def test_whatever_text_there_is_it_is_read_or_told(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], inside: str
) -> None:
    folder = tmp_path_factory.mktemp("text")
    try:
        _, _, told = read(folder, inside % "".join(pieces))
    except SweepFileError as error:
        told = list(error.problems)
    assert all(one == printable(one) for one in told)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("sweep: a\n")
    cases = {
        "quikstart.yaml": r"no such file; did you mean '.*quickstart\.yaml'",
        "nowhere/file.yaml": "no such file",
        ".": "is a folder",
        "quickstart.yaml/x": "cannot be read",
        "latin.yaml": r"not UTF-8 text \(byte 3\)",
    }
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    for name, what in cases.items():
        with pytest.raises(SweepFileError, match=what):
            Document(tmp_path / name)


words = st.text("aZ09 :#-?{}[],&*!|>'\"%@`~<=.\\éß日", max_size=8)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | words
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abcxyz", min_size=1, max_size=5), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(value=st.dictionaries(st.text("abcxyz", min_size=1, max_size=5), trees, min_size=1))
def test_json_is_read_as_json_reads_it(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    file = tmp_path_factory.mktemp("json") / "file.yaml"
    file.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    problems = Problems(file)
    assert Document(file).parse(problems) == value
    assert not problems


def test_problems_are_told_once_in_the_order_of_lines() -> None:
    problems = Problems(Path("f.yaml"))
    for line, what in ((3, "b"), (1, "a"), (3, "b"), (0, "c")):
        problems.add(line, "x.y", what)
    problems.add(2, "", "unknown", given="stpes", allowed=["seed", "steps"])
    assert problems.error().problems == (
        "f.yaml: x.y: c",
        "f.yaml:1: x.y: a",
        "f.yaml:2: unknown; did you mean 'steps'; allowed: seed, steps",
        "f.yaml:3: x.y: b",
    )


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (0.001, "0.001"), (1, "1"), (None, "null"), (True, "true"), ("word", "word"),
        (["input", "output"], "input+output"), ({"label": 5, "name": "x"}, "5"),
        ({"name": "bit-xor", "bits": 3}, "bit-xor"), ({"patience": 3}, "patience=3"),
        (" a word ", "a word"), (" ", " "),
    ],
)  # fmt: skip
def test_labels(value: Any, name: str) -> None:
    assert label(value) == name


def test_no_problem_holds_what_commands_a_terminal() -> None:
    assert SweepFileError(["a \x1b[31m\nb"]).problems == (r"a \x1b[31m\nb",)


def test_the_error_survives_pickling() -> None:
    error = SweepFileError(["a", "b"])
    again = pickle.loads(pickle.dumps(error))
    assert again.problems == ("a", "b")
    assert str(again) == "a\nb"
