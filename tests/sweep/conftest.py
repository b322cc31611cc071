"""The command line, and places for a ledger: buckets of a local S3 server, and a small disk."""

from __future__ import annotations

import itertools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.servers import Ceph, Moto, S3Server
from tests.support import Command, Said

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A stand-in for an S3 server."""
    yield from _served(Moto(tmp_path_factory.mktemp("s3") / "moto"))


@pytest.fixture(scope="session")
def ceph() -> Iterator[S3Server]:
    """A real one."""
    # Its path is short, since sockets are in it.
    with tempfile.TemporaryDirectory(prefix="fptc-", dir="/tmp") as folder:
        yield from _served(Ceph(Path(folder, "ceph")))


def _served(server: S3Server) -> Iterator[S3Server]:
    try:
        server.start()
        yield server
    finally:
        server.stop()


BUCKETS = ("moto", pytest.param("ceph", marks=pytest.mark.slow))


@pytest.fixture(params=BUCKETS)
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty place in a bucket, which this process and its children can open."""
    return _place(request.getfixturevalue(request.param), monkeypatch)


@pytest.fixture(params=["folder", *BUCKETS])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a ledger may lie, of each kind."""
    if request.param == "folder":
        return str(tmp_path / "results")
    return _place(request.getfixturevalue(request.param), monkeypatch)


def _place(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{os.getpid()}-{next(_NUMBERS)}"
    server.make_bucket(name)
    return f"s3://{name}/some/prefix"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount (again) a disk of 64 KiB, with options such as `ro`."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this process may not mount a disk")
        return disk

    yield mount
    subprocess.run(["umount", str(disk)], capture_output=True)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process, as the shell would."""
    from sweep import cli

    def run(*argv: object) -> Said:
        monkeypatch.setattr("sys.argv", ["sweep", *map(str, argv)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        assert isinstance(code, int)
        return Said(code, *capfd.readouterr())

    return run
