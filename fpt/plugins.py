"""A user's own task or backbone, named in a sweep file as `module:Class`."""

from __future__ import annotations

import functools
import importlib
import re
import sys
import traceback
from pathlib import Path

FOLDERS: list[str] = []
"""Where classes are looked for beside Python's own path; worker processes look there too."""


def look_in(folder: Path) -> None:
    """Look for classes in a folder too, after everything that is installed."""
    if str(folder) not in FOLDERS:
        FOLDERS.append(str(folder))
        sys.path.append(str(folder))


@functools.cache
def imported(path: str) -> type:
    """The class at `module:Class`, found as Python finds modules, or in one of `FOLDERS`.

    Raises:
        ValueError: If there is no such module or class, or the module cannot be imported.
    """
    module, _, name = path.partition(":")
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", path):
        raise ValueError(f"{path!r} is not of the form module:Class")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            what = (
                f"there is no module {module}; put {module.replace('.', '/')}.py beside the sweep "
                "file, or install it"
            )
        else:
            last = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        raise ValueError(f"{path}: {what}") from error
    if not isinstance(found, type):
        raise ValueError(f"{path}: module {module} has no class {name}")
    return found
