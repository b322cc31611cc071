"""What people are told of errors that are not ours."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sweep.ledger.errors import in_one_line, unwritable, without_password


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:sesame@db:5432/x", "postgresql://db:5432/x"),
        (
            "no answer from http://me:ses@me@host/a@b, twice",
            "no answer from http://host/a@b, twice",
        ),
        ("http://host said: ask me@host", "http://host said: ask me@host"),
        ("/a/path@b", "/a/path@b"),
    ],
)
def test_addresses_lose_their_passwords(text: str, shown: str) -> None:
    assert without_password(text) == shown


def test_an_error_is_its_kind_and_its_first_line() -> None:
    assert in_one_line(ValueError("\nfirst\nsecond")) == "ValueError: first"
    assert in_one_line(OSError("//me:sesame@host")) == "OSError: //host"
    assert in_one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(in_one_line(ValueError("x" * 1000))) == 300


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("no/x.md", errno.ENOENT, "(No such file or directory); there is no folder no: make it"),
        ("file/x.md", errno.ENOTDIR, "(Not a directory); there is no folder file: make it"),
        (".", errno.EISDIR, "(Is a directory); it is a folder: name a file in it"),
        ("x.md", errno.ENOSPC, "(No space left on device); make room there, or name another"),
        ("x.md", errno.EACCES, "(Permission denied); name a place that can be written to"),
    ],
)
def test_what_cannot_be_written_is_told_with_what_would_do(
    name: str, error: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()

    told = unwritable(Path(name), OSError(error, os.strerror(error)))

    assert told.startswith(f"{name}: cannot be written {said}")
    assert told.endswith("with --output")
