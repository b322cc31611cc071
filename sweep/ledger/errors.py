"""How errors of the system and of other libraries are told to people: in a line, no password in it.

Their messages have lines for programmers, and addresses of databases as they were opened.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

LONGEST = 300
"""Letters that are shown of an error's kind and message."""


def without_password(text: str) -> str:
    """Remove users and passwords from a text's addresses: http://me:sesame@host is http://host."""
    # To the last @ before the path: a password may have one too.
    return re.sub(r"//[^/\s]*@", "//", text)


def in_one_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message, without a password."""
    said = str(error).strip().partition("\n")[0].rstrip()
    kind = type(error).__name__
    return without_password(f"{kind}: {said}" if said else kind)[:LONGEST]


def unwritable(path: Path, error: OSError) -> str:
    """Return the message that a file of --output cannot be written: why, and what to do."""
    folder = path.parent
    if isinstance(error, (FileNotFoundError, NotADirectoryError)) and not folder.is_dir():
        meant = f"there is no folder {folder}: make it, or name another place with --output"
    elif isinstance(error, IsADirectoryError):
        meant = "it is a folder: name a file in it with --output"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        meant = "make room there, or name another place with --output"
    else:
        meant = "name a place that can be written to with --output"
    why = os.strerror(error.errno) if error.errno else in_one_line(error)
    return f"{path}: cannot be written ({why}); {meant}"
