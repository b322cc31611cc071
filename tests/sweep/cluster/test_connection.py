"""What may happen under a driver: its folder is made anew, its parent ends."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweep.cluster import connection
from sweep.cluster.connection import ClusterError, restore_cwd


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

    restore_cwd()

    assert Path.cwd() == tmp_path


def test_a_folder_that_is_made_anew_is_waited_for(gone: Path) -> None:
    unpacking = threading.Timer(0.3, gone.mkdir)
    unpacking.start()

    restore_cwd()

    assert Path.cwd() == gone
    unpacking.join()


def test_a_folder_that_does_not_come_back_is_told(
    gone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "UNPACK_SECONDS", 0.2)

    with pytest.raises(ClusterError, match=f"^{gone}: this process's working folder was removed"):
        restore_cwd()


ORPHAN = """
import os, socket, sys, time
from sweep.cluster.connection import connected

while os.getppid() == int(sys.argv[1]):
    time.sleep(0.05)
with connected(None, 1):
    import ray

    ray.get(ray.remote(lambda: None).remote())
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            with socket.socket(fileno=os.dup(number)) as one:
                if one.family == socket.AF_UNIX and str(one.getpeername()).endswith("/raylet"):
                    one.shutdown(socket.SHUT_RDWR)
                    print("cut", flush=True)
        except OSError:
            pass  # no socket, or one that has no other end
print("parent", os.getppid(), flush=True)
"""


@pytest.mark.ray
def test_a_driver_whose_parent_has_ended_ends_by_itself(tmp_path: Path) -> None:
    code, said = tmp_path / "orphan.py", tmp_path / "said"
    code.write_text(ORPHAN)
    said.touch()
    scratch = Path(tempfile.mkdtemp(prefix="fpt-"))  # a socket's path has to be short
    # What a shell does for `nohup ... &` before it is closed.
    start = f'TMPDIR="{scratch}" "{sys.executable}" "{code}" $$ >"{said}" 2>&1 &'
    subprocess.run(["sh", "-c", start], check=True)
    until = time.monotonic() + 120
    while "parent" not in said.read_text() and time.monotonic() < until:
        time.sleep(0.2)
    shutil.rmtree(scratch, ignore_errors=True)

    *_, cut, last = said.read_text().splitlines()

    if last.split()[1] != "1":
        pytest.skip("another process than the first one takes in orphans here")
    assert (cut, last) == ("cut", "parent 1")
