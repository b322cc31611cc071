"""Content on disk: what is missing, what is there, by digest, and where a machine keeps it.

Identity knows no paths.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """Where this machine keeps what can be fetched or made again.

    $FPT_SWEEP_CACHE, else fpt-sweep in $XDG_CACHE_HOME, else ~/.cache/fpt-sweep.
    """
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("FPT_SWEEP_CACHE") or f"{user}/fpt-sweep"
    return Path(folder).expanduser().absolute()


class DataError(Exception):
    """Data or weights are missing, incomplete or not what their digest says; the message says what
    to do.
    """


def content_digest(files: list[Path]) -> str:
    """SHA-256 over names and contents of files, in the order of their names.

    A file's own digest is kept for the life of the process, by path, size and modification time.

    Raises:
        DataError: If a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        try:
            stat = file.stat()
            one = _file_digest(file, stat.st_size, stat.st_mtime_ns)
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error
        digest.update(f"{file.name}\0{one}\0".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=4096)
def _file_digest(file: Path, size: int, mtime_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
