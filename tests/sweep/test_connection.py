"""Where a driver is while nodes unpack a job's working directory under it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweep import connection
from sweep.connection import ClusterError, stay


@pytest.fixture
def gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder of this process, which has just been removed."""
    folder = tmp_path / "job"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PWD", str(folder))
    shutil.rmtree(folder)
    yield folder
    monkeypatch.chdir(tmp_path)


def test_a_folder_that_is_there_is_stayed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", "/")  # not looked at

    stay()

    assert Path.cwd() == tmp_path


def test_a_folder_that_is_made_anew_is_waited_for(gone: Path) -> None:
    unpacking = threading.Timer(0.3, gone.mkdir)
    unpacking.start()

    stay()

    assert Path.cwd() == gone
    unpacking.join()


def test_a_folder_that_does_not_come_back_is_told(
    gone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "UNPACK_SECONDS", 0.2)

    with pytest.raises(ClusterError, match=f"^{gone}: this process's working folder was removed"):
        stay()
