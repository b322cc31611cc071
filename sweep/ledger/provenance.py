"""Where a number comes from: the code, the versions and the machine, as they are in this process.

Everything here is provenance only: it is written beside a result and enters no identity.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import platform
import socket
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import fpt

PACKAGES = ("torch", "transformers", "numpy", "ray")
"""The packages whose versions may move a number, besides Python itself."""


@functools.cache
def code() -> dict[str, str | bool | None]:
    """Return the version of fpt-sweep and, in a clone, the commit and the dirty flag.

    Dirty is what would make the commit a lie: a changed or an untracked file in the packages.
    """
    # Both packages lie in one folder, in a clone as in an installation.
    root = Path(fpt.__file__).parent.parent
    packages = ("fpt", "sweep")
    commit = dirty = None
    # Only where git tracks the package itself: an environment installed inside somebody else's
    # repository would otherwise report that repository's commit.
    if _git(root, "ls-files", "--error-unmatch", "fpt/__init__.py") is not None:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", *packages)
        dirty = changed is None or bool(changed)
    return {"git_commit": commit, "git_dirty": dirty, "version": version("fpt-sweep")}


def _git(folder: Path, *arguments: str) -> str | None:
    return _output("git", "-C", str(folder), *arguments)


def _output(*command: str) -> str | None:
    """Return what a command prints; None if there is none of that name, or if it fails."""
    try:
        ran = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip()


def version(package: str) -> str | None:
    """Return the release of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


TRAINING = ("torch", "transformers", "safetensors", "ray", "mlflow", "datasets")
"""What the extra `train` brings: an installation that plans and reads does without."""


def lacks(package: str) -> str:
    """Return what to tell somebody who needs a package of `TRAINING` that is not installed."""
    return (
        f"{package}: is not installed here, and this needs it; pip install 'fpt-sweep[train]', "
        "in the environment that this command runs in"
    )


def lacking(needed: Sequence[str] = TRAINING) -> str | None:
    """Return the first package of these that is not installed; None if all are."""
    return next((name for name in needed if importlib.util.find_spec(name) is None), None)


@functools.cache
def versions() -> str:
    """Return the versions of Python and of `PACKAGES`, as a JSON object."""
    found = {name: version(name) for name in PACKAGES}
    return json.dumps({"python": platform.python_version(), **found}, sort_keys=True)


@functools.cache
def host() -> str:
    """Return the name of this machine."""
    return socket.gethostname()


@functools.cache
def processor() -> str:
    """Return the model of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()  # Linux
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    if (name := next(names, None)) is None:
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")  # macOS
    return name or platform.processor() or platform.machine()
