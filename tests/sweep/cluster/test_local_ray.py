"""The folder of a Ray of our own, whoever writes into it, limits, and what C++ prints: no Ray."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sweep.cluster import local_ray
from sweep.cluster.local_ray import LimitError, check_limits, scratch_folder

Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder with a short path."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that runs some code and then sleeps, and waits for the code's end."""
    started: list[subprocess.Popen[str]] = []

    def run(code: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-S",
            "-c",
            f"{code}\nprint(flush=True)\nimport time\ntime.sleep(600)",
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def left_over(parent: Path, name: str = "old") -> Path:
    folder = parent / f"fpt-sweep-{name}"
    (folder / "session/logs").mkdir(parents=True)
    (folder / "lock").touch()
    (folder / "session/logs/worker.err").write_text("words\n")
    return folder


WRITES = "file = open({!r}, 'a')"
READS = "file = open({!r})"


def test_what_a_killed_run_left_is_ended_and_removed(temporary: Path, start: Start) -> None:
    old = left_over(temporary)
    worker = start(WRITES.format(str(old / "session/logs/worker.err")))
    reader = start(READS.format(str(old / "session/logs/worker.err")))
    beside = start(WRITES.format(str(temporary / "fpt-sweep-old-but-not-that")))

    with scratch_folder() as folder:
        assert not old.exists()
        assert not psutil.pid_exists(worker.pid)
        assert folder.exists()
    assert (reader.poll(), beside.poll()) == (None, None)
    assert not folder.exists()


def test_what_belongs_to_a_run_is_left_to_it(temporary: Path, start: Start) -> None:
    other = left_over(temporary)
    worker = start(WRITES.format(str(other / "session/logs/worker.err")))
    with (other / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with scratch_folder():
            pass
    assert other.exists()
    assert worker.poll() is None


def test_at_the_end_nobody_writes_into_the_folder_any_more(temporary: Path, start: Start) -> None:
    with scratch_folder() as folder:
        worker = start(WRITES.format(str(folder / "log")))
    assert not psutil.pid_exists(worker.pid)
    assert list(temporary.iterdir()) == []


def test_this_process_is_not_ended(temporary: Path) -> None:
    with scratch_folder() as folder, (folder / "log").open("w"):
        local_ray.end_processes([folder])


def test_without_a_folder_to_write_to_it_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    with pytest.raises(LimitError, match=r"no temporary folder can be made .*; set TMPDIR to one"):
        scratch_folder().__enter__()


LIMITED = """
import os, resource, sys
from sweep.cluster.local_ray import LimitError, check_limits
which = getattr(resource, sys.argv[1])
resource.setrlimit(which, (int(sys.argv[2]), resource.getrlimit(which)[1]))
os.geteuid = lambda: 1  # nothing limits root
try:
    check_limits(int(sys.argv[3]))
except LimitError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        ("RLIMIT_NPROC", 40, "ulimit -u: this user may have 40 processes and threads and has "),
        ("RLIMIT_NPROC", 150, "ulimit -u: this user may have 150 processes and threads and has "),
        ("RLIMIT_NPROC", 50_000, ""),
        ("RLIMIT_AS", 2 * 1024**3, "ulimit -v: 2,048 MiB of address space for a process"),
        ("RLIMIT_AS", 64 * 1024**3, ""),
    ],
)
def test_a_limit_under_which_ray_does_not_start_is_a_sentence(
    limit: str, value: int, said: str
) -> None:
    command = [sys.executable, "-c", LIMITED, limit, f"{value}", "4"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.startswith(said)
    assert len(found.splitlines()) == (1 if said else 0)


def test_without_limits_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY,) * 2)
    check_limits(10_000)


APART = """
import os, sys
from pathlib import Path
from sweep.cluster.local_ray import apart
with apart("a-run") as file:
    os.write(2, b"[C++] task_manager.cc: Failed to push error\\n")
    print("ours", file=sys.stderr)
    assert file == Path(sys.argv[1], "logs/ray-a-run.log"), file
os.write(2, b"after\\n")
with apart("silent") as file:
    pass
"""


def test_what_is_no_python_writes_to_a_file_and_not_between_our_lines(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", APART, f"{tmp_path}"],
        env=os.environ | {"FPT_SWEEP_CACHE": f"{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "ours\nafter\n")
    (file,) = (tmp_path / "logs").iterdir()
    assert file.read_text() == "[C++] task_manager.cc: Failed to push error\n"


def test_old_files_of_it_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPT_SWEEP_CACHE", str(tmp_path))
    (tmp_path / "logs").mkdir()
    for k in range(30):
        file = tmp_path / f"logs/ray-{k:02}.log"
        file.write_text("words")
        os.utime(file, (k, k))
    with local_ray.apart("new"):
        os.write(2, b"words")
    kept = sorted(file.name for file in (tmp_path / "logs").iterdir())
    assert kept == [*(f"ray-{k:02}.log" for k in range(10, 30)), "ray-new.log"]


def test_where_no_file_can_be_written_it_goes_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPT_SWEEP_CACHE", "/proc/none")
    with local_ray.apart("new") as file:
        os.write(2, b"words")
    assert file is None


DRIVER = """
import os, signal, subprocess, sys, time
from sweep.cluster import local_ray

came = []
signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
with local_ray.kept_from_children():
    sleeping = "print(flush=True); import time; time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-S", "-c", sleeping], stdout=subprocess.PIPE)
    child.stdout.readline()
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # as Ray takes SIGTERM
    os.kill(os.getpid(), signal.SIGUSR1)
    assert came == []
assert came == [signal.SIGUSR1]
for number in local_ray.NOT_FOR_RAY:
    child.send_signal(number)
time.sleep(0.2)
assert child.poll() is None
child.kill()
"""


def test_signals_for_the_driver_do_not_end_what_it_has_started() -> None:
    # In a process of its own: a thread of other tests would take the signal, and end them all.
    subprocess.run([sys.executable, "-c", DRIVER], check=True)
