"""What is known of a machine and its processes, with what Linux tells and without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sweep.ledger import machine, provenance
from sweep.ledger.ledger import Ledger

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="not Linux")

SITECUSTOMIZE = """
import builtins, io, os, sys
import psutil

del os.sched_getaffinity, os.sched_setaffinity, psutil.Process.cpu_affinity

OURS = tuple(os.path.join(sys.argv_root, name) + os.sep for name in ("fpt", "sweep"))

def ours():
    frame = sys._getframe(2)
    while frame is not None and "pathlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(OURS)

def hide(module, name):
    real = getattr(module, name)
    def hidden(path, *arguments, **options):
        if str(path).startswith("/proc") and ours():
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path, *arguments, **options)
    setattr(module, name, hidden)

for module, name in ((builtins, "open"), (io, "open"), (os, "readlink"), (os, "listdir"),
                     (os, "stat")):
    hide(module, name)
"""

FILE = """
sweep: anywhere
trial:
  task: bit-xor
  backbone: {name: gpt2, layers: 1, width: 16, heads: 2}
  pretraining: random
  steps: 3
axes:
  seed: [0, 1]
"""


@pytest.fixture
def not_linux(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python where no process has what only Linux has."""
    root = str(Path(machine.__file__).parents[2])
    folder = tmp_path / "site"
    folder.mkdir()
    text = SITECUSTOMIZE.replace("sys.argv_root", repr(root))
    (folder / "sitecustomize.py").write_text(text)
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


PROBE = """
import json, os
from sweep.ledger import machine, provenance
assert not hasattr(os, "sched_getaffinity")
print(json.dumps([machine.cores(), machine.pid_space(), provenance.processor()]))
"""


def test_what_only_linux_has_is_hidden_and_not_missed(not_linux: Any) -> None:
    ran = not_linux("-c", PROBE)
    assert ran.returncode == 0, ran.stderr
    cores, space, processor = json.loads(ran.stdout)
    assert cores == os.cpu_count()
    assert space == {
        "host": provenance.host(),
        "boot": str(int(psutil.boot_time())),
        "pids": "",
    }
    assert processor


def test_a_plan_without_what_only_linux_has(not_linux: Any, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(FILE)
    ran = not_linux("-m", "sweep", "plan", "sweep.yaml", "--json")
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert len(said["to_run"]) >= 1
    assert said["packs"]["at_a_time"] == os.cpu_count()


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_without_what_only_linux_has(not_linux: Any, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(FILE)
    ran = not_linux("-m", "sweep", "run", "sweep.yaml", "--no-mirror")
    assert ran.returncode == 0, ran.stderr
    rows = Ledger(tmp_path / "results").trials().to_pylist()
    assert [row["outcome"] for row in rows] == ["done", "done"]


@needs_proc
def test_a_start_is_what_linux_counts() -> None:
    for pid in (os.getpid(), os.getppid(), 1):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        assert machine.started(pid) == fields[19]


def test_a_start_does_not_move_with_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine.started(os.getpid())
    boot, calls = psutil.boot_time(), 0

    def set_once() -> float:
        """The clock is set between the first two looks."""
        nonlocal calls
        calls += 1
        return boot + (3600 if calls > 1 else 0)

    monkeypatch.setattr(psutil, "boot_time", set_once)
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot + (3600 if calls else 0))
    assert machine.started(os.getpid()) == before


def test_a_start_by_a_clock_that_may_be_set_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "LINUX", False)
    assert machine.started(os.getpid()) is None
    process = subprocess.Popen([sys.executable, "-c", ""])
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert machine.started(process.pid) == machine.ENDED
    process.wait()
    assert machine.started(process.pid) is None


def test_a_mac_names_its_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "sysctl"
    tool.write_text('#!/bin/sh\n[ "$*" = "-n machdep.cpu.brand_string" ] && echo Apple M2\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(Path, "read_text", _nothing)
    assert provenance.processor.__wrapped__() == "Apple M2"
    tool.unlink()
    assert provenance.processor.__wrapped__() not in ("", "Apple M2")


def _nothing(path: Path, *arguments: object) -> str:
    raise FileNotFoundError(path)
