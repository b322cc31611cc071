"""Jobs: what is sent, and that the same sent twice is one job. With a stand-in for Ray's client."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np
import pytest

from sweep import cli
from sweep.cluster import submission
from sweep.cluster.connection import ClusterError
from sweep.sweepfile.document import SweepFileError

TINY = """\
sweep: tiny
trial:
  backbone: {name: gpt2, layers: 1, width: 16, heads: 2}
  pretraining: random
  batch_size: 4
  steps: 4
  evaluation: {every: 2}
axes:
  task: [TASK]
  seed: [0, 1]
"""
BITS = "{name: bit-xor, bits: 2}"
RESULTS = "/shared/results"
OWN = """
import fpt

class Mine(fpt.Task):
    def shape(self, protocol):
        return fpt.Shape(tokens=4, inputs=1, embedded=False, classes=2)
    def splits(self, protocol):
        raise NotImplementedError
    def baseline(self, protocol):
        return fpt.Baseline(0.5, "guess")
"""


def write(folder: Path, task: str = BITS, name: str = "tiny.yaml") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(TINY.replace("TASK", task))
    return file


class FakeServer:
    """A cluster's job server, as its client sees it."""

    def __init__(self) -> None:
        self.jobs: dict[str, Any] = {}
        self.sent: list[dict[str, bytes]] = []
        self.tails = 0
        """Streams of output that were asked for."""
        self.hidden = False
        """Whether jobs are not listed yet: somebody else's came a moment ago."""

    def submit_job(self, **given: Any) -> str:
        name = given["submission_id"]
        if name in self.jobs:
            raise RuntimeError(f"Job with submission_id {name} already exists. Please use another.")
        folder = Path(given["runtime_env"]["working_dir"])
        files = (path for path in folder.rglob("*") if path.is_file())
        self.sent.append({str(path.relative_to(folder)): path.read_bytes() for path in files})
        self.jobs[name] = SimpleNamespace(
            status="PENDING",
            message=None,
            driver_exit_code=None,
            start_time=1_000_000 + len(self.jobs),
            end_time=None,
            **given,
        )
        return str(name)

    def list_jobs(self) -> list[Any]:
        if self.hidden:
            self.hidden = False
            return []
        return list(self.jobs.values())

    def get_job_logs(self, name: str) -> str:
        return f"output of {name}\nas far as it came\n"

    def stop_job(self, name: str) -> bool:
        self.jobs[name].status = "STOPPED"
        return True

    async def tail_job_logs(self, name: str) -> Any:
        self.tails += 1
        yield "output of "
        if self.tails == 1:
            return  # as Ray does where the head loses the job's node
        yield f"{name}\nas "
        if self.tails == 2:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
        if self.tails == 3:
            raise aiohttp.ClientConnectionError
        self.end("FAILED", 1)

    def end(self, status: str, code: int = 0) -> None:
        job = list(self.jobs.values())[-1]
        job.status, job.driver_exit_code, job.end_time = status, code, 2_000_000


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    server = FakeServer()
    monkeypatch.setattr(submission, "connect", lambda address: server)
    return server


Sweep = Callable[..., Any]


@pytest.fixture
def sweep(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Sweep:
    """The command line: returns exit code, stdout and stderr."""

    def run(*arguments: object) -> Any:
        address = ["--address", "http://head:8265"]
        monkeypatch.setattr("sys.argv", ["sweep", *map(str, arguments), *address])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code or 0, out=out, err=err)

    return run


# ------------------------------------------------------------------------------------- what is sent


def test_the_sweep_file_and_its_lock_are_sent_and_nothing_beside_them(tmp_path: Path) -> None:
    file = write(tmp_path)
    (tmp_path / "tiny.lock").write_text('{"format": 1, "models": {}, "datasets": {}}')
    for name in (".git/config", "results/trials/0.parquet", "checkpoint.pt", "mine.py", ".env"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    sent = submission.parcel(file)

    assert list(sent.files) == ["tiny.lock", "tiny.yaml"]
    assert (sent.name, sent.entry) == ("tiny", "tiny.yaml")


def images(folder: Path) -> Path:
    """A folder of pictures in the public MNIST format."""
    folder.mkdir(parents=True)
    for part, count in (("train", 8), ("t10k", 4)):
        for kind, shape, code in (
            ("images-idx3", (count, 28, 28), 3),
            ("labels-idx1", (count,), 1),
        ):
            header = bytes([0, 0, 8, code]) + b"".join(n.to_bytes(4, "big") for n in shape)
            body = np.zeros(shape, np.uint8).tobytes()
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + body)
    return folder


def test_local_data_goes_along_where_its_path_is_relative(tmp_path: Path) -> None:
    data = images(tmp_path / "data/mnist")
    (data / ".cache").mkdir()
    (data / ".cache/x").write_text("x")
    task = "{name: mnist, folder: PATH}"

    relative = write(tmp_path, task.replace("PATH", "../data/mnist"), "experiments/a.yaml")
    absolute = write(tmp_path, task.replace("PATH", str(data)), "experiments/b.yaml")

    sent = submission.parcel(relative)
    assert sent.entry == "experiments/a.yaml"  # from there ../data/mnist is what it was
    pictures = [f"data/mnist/{path.name}" for path in sorted(data.iterdir()) if path.is_file()]
    assert list(sent.files) == [*pictures, "experiments/a.yaml"]
    assert list(submission.parcel(absolute).files) == ["b.yaml"]


def test_a_path_that_only_the_cluster_has_is_noted(tmp_path: Path) -> None:
    file = write(tmp_path, "{name: mnist, folder: /on/the/cluster}")

    sent = submission.parcel(file)

    assert sent.notes == ("/on/the/cluster: not here; taken to be on the cluster",)
    file.write_text(file.read_text().replace("steps: 4", "steps: -4"))
    with pytest.raises(SweepFileError, match="steps"):
        submission.parcel(file)


def test_a_link_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    data = images(tmp_path / "mnist")
    (tmp_path / "secret").write_text("sesame")
    (data / "more").symlink_to(tmp_path / "secret")

    with pytest.raises(SweepFileError, match=r"mnist/more: a link that leads out"):
        submission.parcel(write(tmp_path, "{name: mnist, folder: mnist}"))


def test_too_much_is_refused_and_the_largest_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images(tmp_path / "mnist")
    monkeypatch.setattr(submission, "LIMIT", 5000)

    with pytest.raises(SweepFileError, match=r"may have 0; the largest: mnist/train-images"):
        submission.parcel(write(tmp_path, "{name: mnist, folder: mnist}"))


def test_code_is_refused_unless_it_is_allowed_and_not_even_imported(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "mine_of_cluster.py").write_text(f"{OWN}\nopen({str(ran)!r}, 'w')\n")
    (tmp_path / "helper.py").write_text("")
    file = write(tmp_path, '"mine_of_cluster:Mine"')

    with pytest.raises(SweepFileError, match="names code: mine_of_cluster:Mine; --allow-code"):
        submission.parcel(file)
    assert not ran.exists()

    # In a process of its own: what it imports stays there.
    code = (
        "from sweep.cluster import submission; "
        f"print(*submission.parcel({str(file)!r}, allow_code=True).files)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["helper.py", "mine_of_cluster.py", "tiny.yaml"], done.stderr
    assert ran.exists()


def test_the_package_goes_along_if_asked(tmp_path: Path) -> None:
    sent = submission.parcel(write(tmp_path), package=True)

    assert {"tiny.yaml", "fpt/config.py", "sweep/cluster/submission.py", "fpt/published.csv"} <= {
        *sent.files
    }
    assert not any("__pycache__" in name for name in sent.files)


# --------------------------------------------------------------------------------------------- jobs


def test_the_same_twice_is_one_job_and_the_next_attempt_follows_its_end(
    server: FakeServer, sweep: Sweep, tmp_path: Path
) -> None:
    file = write(tmp_path)

    first = sweep("submit", file, "--results", RESULTS)
    again = sweep("submit", file, "--results", RESULTS)

    assert (first.code, again.code) == (0, 0)
    assert first.out == again.out
    assert "is running already" in again.err
    assert list(server.sent[0]) == ["tiny.yaml"]
    assert len(server.sent) == 1

    server.end("FAILED", 1)
    third = sweep("submit", file, "--results", RESULTS)
    assert third.out.strip() == first.out.strip().removesuffix("1") + "2"
    elsewhere = sweep("submit", file, "--results", "s3://bucket/results")
    file.write_text(file.read_text() + "# grown\n")
    grown = sweep("submit", file, "--results", RESULTS)
    assert len({first.out, third.out, elsewhere.out, grown.out}) == 4


def test_who_comes_a_moment_later_finds_the_job(server: FakeServer, tmp_path: Path) -> None:
    sent = submission.parcel(write(tmp_path))
    first, new = submission.submit(server, sent, RESULTS)  # type: ignore[arg-type]
    assert new

    server.hidden = True
    second, new = submission.submit(server, sent, RESULTS)  # type: ignore[arg-type]

    assert (second.id, new) == (first.id, False)


def test_what_a_job_is(server: FakeServer, sweep: Sweep, tmp_path: Path) -> None:
    file = write(tmp_path, name="with space/tiny.yaml")
    arguments = ["--no-mirror", "--env", "HF_ENDPOINT=https://hub", "--python", "/opt/python"]

    sweep("submit", file, "--results", RESULTS, *arguments)

    (job,) = server.jobs.values()
    command = job.entrypoint
    assert shlex.split(command) == [
        *("exec", "/opt/python", "-m", "sweep", "run", "tiny.yaml"),
        *("--results", RESULTS, "--no-mirror"),
    ]
    assert job.runtime_env["env_vars"] == {
        "HF_ENDPOINT": "https://hub",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }
    assert all(isinstance(value, str) for value in job.metadata.values())
    assert job.metadata["sweep"] == "tiny"


def test_nothing_of_this_environment_goes_along(
    server: FakeServer, sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "sesame")

    told = sweep("submit", write(tmp_path), "--results", RESULTS)

    assert "sesame" not in f"{server.jobs}{server.sent}{told}"
    refused = sweep("submit", write(tmp_path), "--results", RESULTS, "--env", "HF_TOKEN")
    assert refused.code == 2
    assert "--env HF_TOKEN: may hold a secret" in refused.err
    assert "sesame" not in refused.err
    assert len(server.jobs) == 1


def test_results_have_to_be_the_clusters(server: FakeServer, sweep: Sweep, tmp_path: Path) -> None:
    for arguments in ([], ["--results", "results"]):
        told = sweep("submit", write(tmp_path), *arguments)

        assert told.code == 2
        assert "--results results: a relative path means nothing on the cluster" in told.err
    assert not server.jobs


def test_logs_and_stop_find_the_job_of_a_file(
    server: FakeServer, sweep: Sweep, tmp_path: Path
) -> None:
    file = write(tmp_path)
    name = sweep("submit", file, "--results", RESULTS).out.strip()

    assert sweep("logs", file).out == server.get_job_logs(name)
    assert sweep("logs", name).out == server.get_job_logs(name)
    assert "stopping" in sweep("stop", file).err
    assert server.jobs[name].status == "STOPPED"
    assert "has ended already (stopped)" in sweep("stop", name).err
    unknown = sweep("logs", "nobody")
    assert unknown.code == 2
    assert f"nobody: no such job on this cluster; it has {name}" in unknown.err


def test_who_waits_sees_all_output_once_and_gets_the_jobs_exit_code(
    server: FakeServer, sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    told = sweep("submit", write(tmp_path), "--results", RESULTS, "--wait")

    (name,) = server.jobs
    assert (told.code, told.out) == (1, server.get_job_logs(name))
    assert server.tails == 4
    assert told.err.endswith(": failed\n")


def test_status_shows_the_jobs_too(server: FakeServer, sweep: Sweep, tmp_path: Path) -> None:
    file = write(tmp_path)
    name = sweep("submit", file, "--results", RESULTS).out.strip()

    told = sweep("status", file, "--results", tmp_path / "results")

    assert f"job {name}: pending" in told.out


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("head:8265", "not the address of a dashboard"),
        ("http://127.0.0.1:9", "no Ray answers there"),
        ("http://me:sesame@head:8265", "holds a password"),
    ],
)
def test_an_address_that_leads_nowhere_is_told(address: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message) as told:
        submission.connect(address)
    assert "sesame" not in str(told.value)
