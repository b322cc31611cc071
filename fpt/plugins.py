"""A user's own task or backbone: `module:Class` in a sweep file, or a name that an installed
package registers.

There is one import order, in the driver, in workers and in jobs: the standard library and what is
installed come first, then folders beside sweep files. A folder joins Python's path only once a file
names a module that lies in it, and a file there that would shadow an installed module is refused.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

VARIABLE = "FPT_SWEEP_MODULES"
"""Environment variable that tells workers the driver's `FOLDERS`."""

FOLDERS: list[str] = []
"""Folders beside sweep files, the last one that was loaded first."""

AT_START = ("sitecustomize", "usercustomize")
"""Modules that Python imports by itself when a process starts."""

CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""`module:Class`."""


def look_in(folder: Path) -> None:
    """Let modules be found in a folder too, after everything that is installed."""
    name = str(folder)
    if name in FOLDERS:
        FOLDERS.remove(name)
    FOLDERS.insert(0, name)


def class_path(name: str, group: str) -> str | None:
    """Return the `module:Class` behind a name in a sweep file; None: it is no class of a user's.

    Args:
        name: `module:Class`, or a name that an installed package registers as an entry point.
        group: The group of entry points: `fpt_sweep.tasks` or `fpt_sweep.backbones`.

    Raises:
        ValueError: If several packages register the name.
    """
    if ":" in name:
        return name
    found = {point.value for point in _registered(group) if point.name == name}
    if len(found) > 1:
        raise ValueError(
            f"{name}: several installed packages register this name: {', '.join(sorted(found))}; "
            "name one of these classes"
        )
    return next(iter(found), None)


def registered(group: str) -> tuple[str, ...]:
    """Return the names that installed packages register in a group of entry points, sorted."""
    return tuple(sorted({point.name for point in _registered(group)}))


@functools.cache
def _registered(group: str) -> tuple[metadata.EntryPoint, ...]:
    return tuple(metadata.entry_points(group=group))


def imported(path: str) -> type:
    """Return the class at `module:Class`.

    What its module prints while it is imported goes to stderr.

    Raises:
        ValueError: If there is no such module or class, if the module cannot be imported, or if a
            file beside it would shadow an installed module.
    """
    return _imported(path, tuple(FOLDERS))


@functools.cache
def _imported(path: str, folders: tuple[str, ...]) -> type:
    if not CLASS.fullmatch(path):
        dotted = path.partition(":")[0].rpartition(".")
        meant = f"; {dotted[0]}:{dotted[2]}?" if re.fullmatch(r"[\w.]+\.\w+", path) else ""
        raise ValueError(f"{path!r} is not of the form module:Class{meant}")
    module, _, name = path.partition(":")
    top = module.partition(".")[0]
    folder = next((one for one in folders if _lies_in(top, one)), None)
    if folder is not None:
        check_names(Path(folder))
        _check_loaded(module, Path(folder))
        if folder not in sys.path:
            sys.path.append(folder)
            importlib.invalidate_caches()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = getattr(importlib.import_module(module), name, None)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            what = (
                f"there is no module {module}; put {module.replace('.', '/')}.py beside the sweep "
                "file, or install it"
            )
        elif isinstance(error, SystemExit):
            what = f"its module ends the process when it is imported ({place(error)})"
        else:
            what = describe(error)
        raise ValueError(f"{path}: {what}") from error
    if not isinstance(found, type):
        raise ValueError(f"{path}: module {module} has no class {name}")
    # The evidence is of the code that this process has read, whatever becomes of its files.
    _digests(module)
    return found


def _lies_in(top: str, folder: str) -> bool:
    return (
        Path(folder, f"{top}.py").is_file()
        or Path(folder, top, "__init__.py").is_file()
        or any(Path(folder, top).glob("*.py"))
    )


def check_names(folder: Path) -> None:
    """Refuse modules in a folder that bear the name of an installed one.

    Raises:
        ValueError: Names the first of them.
    """
    own = [file.stem for file in folder.glob("*.py")]
    own += [file.parent.name for file in folder.glob("*/__init__.py")]
    elsewhere = [
        one for one in sys.path if one and one not in FOLDERS and not _same(one, str(folder))
    ]
    for name in sorted(own):
        running = getattr(sys.modules.get(name), "__file__", None)
        if running and Path(running).resolve().is_relative_to(folder.resolve()):
            continue  # this process runs it: a job to which the package itself was sent
        file = folder / (f"{name}.py" if (folder / f"{name}.py").is_file() else name)
        if name in AT_START:
            raise ValueError(f"{file}: Python itself runs a module {name} at its start; rename it")
        if name in sys.stdlib_module_names:
            what = "the standard library has"
        elif origin := _origin(name, elsewhere, folder):
            what = f"{origin} has"
        else:
            continue
        raise ValueError(
            f"{file}: {what} a module {name} too, and one would be taken for the other; rename "
            "yours"
        )


def _origin(name: str, path: list[str], folder: Path) -> Path | None:
    """Return where a path has a module, unless that is the folder itself."""
    found = PathFinder.find_spec(name, path) if name.isidentifier() else None
    where = Path(found.origin).parent if found and found.origin else None
    return None if where is None or _same(str(where), str(folder)) else where


def _check_loaded(module: str, folder: Path) -> None:
    """Refuse a module whose name this process knows from another place, unless it is a copy.

    Raises:
        ValueError: If it does.
    """
    known = getattr(sys.modules.get(module.partition(".")[0]), "__file__", None)
    if known is None or Path(known).resolve().is_relative_to(folder.resolve()):
        return
    if module in sys.modules and all(
        (folder / name).is_file() and _sha256(folder / name) == digest
        for name, digest in _digests(module).items()
    ):
        return
    raise ValueError(
        f"{folder / module.replace('.', '/')}.py: this process has read another module {module} "
        f"from {Path(known).parent} before; start a new process, or rename one of them"
    )


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


# ------------------------------------------------------------------------------------- its mistakes


def describe(error: BaseException) -> str:
    """Return what was raised in a user's code, and where: `KeyError: 'x' (tasks.py:7)`."""
    text = str(error).partition("\n")[0]
    where = place(error)
    if isinstance(error, SyntaxError):
        text, where = error.msg or "", f"{Path(error.filename or '?').name}:{error.lineno}"
    return f"{type(error).__name__}: {text or 'no message'}" + (f" ({where})" if where else "")


def place(error: BaseException) -> str:
    """Return `file:line` of the innermost frame of an exception that is in a user's own code, else
    in a library's; empty: it was raised by us.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if any(one.filename.startswith(f) for f in FOLDERS)]
    others = [one for one in frames if not one.filename.startswith(str(Path(__file__).parent))]
    last = next(iter(own[-1:] or others[-1:]), None)
    return f"{Path(last.filename).name}:{last.lineno}" if last else ""


def line_of(own: type) -> str:
    """Return `file:line` of a class, or its name where its source cannot be found."""
    try:
        file = inspect.getsourcefile(own)
        return f"{Path(file or '?').name}:{inspect.getsourcelines(own)[1]}"
    except (OSError, TypeError):
        return f"{own.__module__}:{own.__qualname__}"


# ------------------------------------------------------------------------------------ its evidence


def digests(paths: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of each source file that takes part in classes, by its path from the root.

    These are the files of the modules as this process read them, and of what they import, with
    `import` statements, from the same root: the folder that the module lies in; of an installed
    package, the package.

    Args:
        paths: `module:Class` of each class.

    Raises:
        ValueError: As `imported`.
    """
    found: dict[str, str] = {}
    for path in paths:
        imported(path)
        found |= _digests(path.partition(":")[0])
    return dict(sorted(found.items()))


@functools.cache
def _digests(module: str) -> dict[str, str]:
    return {name: _sha256(file) for name, file in sources(module).items()}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes().replace(b"\r\n", b"\n")).hexdigest()


def sources(module: str) -> dict[str, Path]:
    """Return the files that take part in an imported module, by their paths from its root."""
    file = getattr(sys.modules[module], "__file__", None)
    if file is None:
        return {}
    levels = module.count(".") + (Path(file).name == "__init__.py")
    root = Path(file).resolve().parents[levels]
    # Beside installed packages lie others', which are told by their versions.
    top = module.partition(".")[0] if _is_installed(root) else None
    found: dict[str, Path] = {}
    todo = list(_and_parents(module))
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen or (top is not None and name.partition(".")[0] != top):
            continue
        seen.add(name)
        plain = root.joinpath(*name.split("."))
        for own in (plain / "__init__.py", plain.with_name(f"{plain.name}.py")):
            if own.is_file():
                found[own.relative_to(root).as_posix()] = own
                todo += _imports(
                    own, name if own.name == "__init__.py" else name.rpartition(".")[0]
                )
                break
    if not found:  # a compiled module
        found[Path(file).name] = Path(file)
    return dict(sorted(found.items()))


def _is_installed(root: Path) -> bool:
    installed = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    return any(_same(str(root), one) for one in installed) or root.name in (
        "site-packages",
        "dist-packages",
    )


def _imports(file: Path, package: str) -> Iterator[str]:
    """Yield the modules that a file's import statements may name."""
    with contextlib.suppress(SyntaxError, ValueError, OSError):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield from _and_parents(alias.name)
            elif isinstance(node, ast.ImportFrom):
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
                name = ".".join(filter(None, [base, node.module]))
                if name:
                    yield from _and_parents(name)
                for alias in node.names:
                    yield ".".join(filter(None, [name, alias.name]))


def _and_parents(module: str) -> Iterator[str]:
    parts = module.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts) + 1))


for _folder in reversed(list(filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)))):
    # A worker unpickles objects of these modules before anything asks for their classes.
    look_in(Path(_folder))
    if _folder not in sys.path:
        sys.path.append(_folder)
