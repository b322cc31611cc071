"""Content on disk: what is missing, what is there, by digest, and where a machine keeps it.

Identity knows no paths.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import hashlib
import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Where this machine keeps what can be fetched or made again.

    $FPT_SWEEP_CACHE, else fpt-sweep in $XDG_CACHE_HOME, else ~/.cache/fpt-sweep.
    """
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("FPT_SWEEP_CACHE") or f"{user}/fpt-sweep"
    return Path(folder).expanduser().absolute()


def ensure_home() -> None:
    """Name a home folder and a user where the system knows none: a container's bare number.

    Ray, MLflow and torch ask for them, and fail where there is no answer. Both are kept in the
    environment, for processes that are started from here too.
    """
    try:
        Path.home()
    except RuntimeError:
        home = Path(tempfile.gettempdir(), f"fpt-sweep-home-{os.getuid()}")
        with contextlib.suppress(OSError):
            home.mkdir(mode=0o700, exist_ok=True)
        # Somebody else may have made a folder of this name.
        ours = home.is_dir() and home.stat().st_uid == os.getuid()
        os.environ["HOME"] = str(home if ours else tempfile.mkdtemp(prefix="fpt-sweep-home-"))
    try:
        getpass.getuser()
    except (OSError, KeyError):
        os.environ["USER"] = f"user-{os.getuid()}"


class DataError(Exception):
    """Data or weights are missing, incomplete or not what their digest says; the message says what
    to do.
    """


class ContractError(DataError):
    """A class of a user's own does not keep its contract; the message says how."""


def content_digest(files: list[Path], *, text: bool = False) -> str:
    """SHA-256 over names and contents of files, in the order of their names.

    A file's own digest is kept for the life of the process, by path, size and modification time.

    Args:
        files: The files.
        text: Whether lines may end in CR LF as well as in LF, which is then no difference.

    Raises:
        DataError: If a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        digest.update(f"{file.name}\0{_read_digest(file, text=text)}\0".encode())
    return digest.hexdigest()


def _read_digest(file: Path, *, text: bool = False) -> str:
    try:
        stat = file.stat()
        return _file_digest(file, stat.st_size, stat.st_mtime_ns, text=text)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def tree_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, or of names and contents of all files in a folder.

    Neither the name nor the place of the path itself takes part, nor do files whose name begins
    with a dot.

    Raises:
        DataError: If it is not there, or cannot be read.
    """
    if path.is_file():
        return _read_digest(path)
    if not path.is_dir():
        raise DataError(f"{path}: is not there; put the data there, or give another path")
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
        own = _read_digest(file)
        digest.update(f"{file.relative_to(path).as_posix()}\0{own}\0".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=4096)
def _file_digest(file: Path, size: int, mtime_ns: int, *, text: bool) -> str:
    with file.open("rb") as stream:
        if not text:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256()
        for line in stream:
            digest.update(line[:-2] + b"\n" if line.endswith(b"\r\n") else line)
        return digest.hexdigest()
