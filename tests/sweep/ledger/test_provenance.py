from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweep.ledger import provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository with the two packages in it, from which `fpt` seems to be imported."""
    for package in ("fpt", "sweep"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "README.md").touch()
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    monkeypatch.setattr(provenance.fpt, "__file__", str(tmp_path / "fpt" / "__init__.py"))
    provenance.code.cache_clear()
    yield tmp_path
    provenance.code.cache_clear()


def test_a_clean_clone_tells_its_commit(clone: Path) -> None:
    found = provenance.code()

    assert found["git_commit"] == git(clone, "rev-parse", "HEAD")
    assert found["git_dirty"] is False


@pytest.mark.parametrize("file", ["fpt/__init__.py", "sweep/new.py"])
def test_a_changed_or_new_file_of_the_packages_makes_it_dirty(clone: Path, file: str) -> None:
    (clone / file).write_text("x = 1\n")

    assert provenance.code()["git_dirty"] is True


def test_what_is_no_code_does_not_make_it_dirty(clone: Path) -> None:
    (clone / "README.md").write_text("words")
    (clone / "my-sweep.yaml").touch()

    assert provenance.code()["git_dirty"] is False


def test_an_environment_inside_somebody_elses_repository_tells_no_commit(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = clone / ".venv" / "fpt" / "__init__.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr(provenance.fpt, "__file__", str(installed))

    assert provenance.code()["git_commit"] is None
    assert provenance.code()["git_dirty"] is None


def test_versions_are_json_and_name_what_moves_numbers() -> None:
    versions = json.loads(provenance.versions())

    assert versions.keys() == {"python", "torch", "transformers", "numpy", "ray"}
    assert all(versions.values())


def test_the_processor_has_a_name() -> None:
    assert provenance.processor()
