"""What a preflight says of a cluster, piece by piece; the slow test asks two real nodes."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from fpt.config import TrialConfig
from sweep.cluster import preflight
from sweep.cluster.preflight import Group, Node
from sweep.ledger.ledger import Ledger
from sweep.ledger.storage import open_storage
from sweep.planning.packing import Workers
from sweep.planning.plan import plan
from sweep.sweepfile.expansion import load
from sweep.sweepfile.identity import trial_id
from tests.servers import free_port
from tests.support import signs

TINY = """\
sweep: tiny
trial:
  backbone: {name: gpt2, layers: 1, width: 16, heads: 2}
  pretraining: random
  batch_size: 4
  steps: STEPS
  evaluation: {every: 20}
axes:
  task: [{name: bit-xor, bits: 2}, {label: longer, name: bit-xor, bits: 3}]
  seed: [0, 1, 2]
"""


def tiny(folder: Path, steps: int = 40) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(TINY.replace("STEPS", str(steps)))
    return file


def node(name: str = "one", **resources: float) -> Node:
    return Node(name, "10.0.0.1", resources)


# ----------------------------------------------------------------------------------------- shapes


def test_a_shape_is_feasible_where_one_node_has_room_for_all_of_it() -> None:
    shape = {"CPU": 1.0, "GPU": 0.5}

    assert preflight.infeasible([shape], [node(CPU=4, GPU=1)], []) == []
    # Room that is spread over nodes is no room.
    (problem,) = preflight.infeasible([shape, shape], [node(CPU=4), node("two", GPU=1)], [])
    assert "no node of this cluster has 1 CPU, 0.5 GPU" in problem
    assert "the most of one node is 4 CPU, 1 GPU" in problem


def test_the_autoscalers_limits_count() -> None:
    shape = {"CPU": 1.0, "GPU": 1.0}
    head, large = node(CPU=0), Group("gpu-spot", {"CPU": 8, "GPU": 1}, 16)

    assert preflight.infeasible([shape], [head], [large]) == []
    assert preflight.capacity([head, node("two", CPU=4)], [large]) == {"CPU": 128, "GPU": 16}
    (problem,) = preflight.infeasible([{"GPU": 2.0}], [head], [large])
    assert "nor can the autoscaler start one (gpu-spot)" in problem


@pytest.mark.parametrize(
    ("shape", "alive", "whole"),
    [
        ({"CPU": 1, "GPU": 0.25}, [{"CPU": 8, "GPU": 2}], {"CPU": 1, "GPU": 1}),
        ({"CPU": 1, "GPU": 2}, [{"CPU": 8, "GPU": 2}], {"CPU": 1, "GPU": 2}),
        ({"CPU": 1}, [{"CPU": 8}, {"CPU": 16}, {"CPU": 0}], {"CPU": 16}),
        ({"CPU": 1}, [{"CPU": 0}], {"CPU": 32}),  # what the autoscaler can start
    ],
)
def test_alone_means_a_whole_gpu_or_a_whole_node(shape: Any, alive: Any, whole: Any) -> None:
    nodes = [node(str(number), **one) for number, one in enumerate(alive)]
    groups = [Group("spot", {"CPU": 32}, 4)]

    assert preflight.whole_device(shape, nodes, groups) == whole


def test_elsewhere_is_another_node_with_room_or_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [node("bad", CPU=4, GPU=1), node("small", CPU=4), node("good", CPU=4, GPU=1)]
    monkeypatch.setattr(preflight, "nodes", lambda: there)
    shape = {"CPU": 1.0, "GPU": 1.0}

    assert preflight.elsewhere(shape, ["bad"]) == {"ray.io/node-id": "!in(bad)"}
    assert preflight.elsewhere(shape, ["good", "bad"]) == {}
    assert preflight.elsewhere(shape, []) == {}


# --------------------------------------------------------------------------------------- releases


def test_other_releases_are_told_and_other_builds_are_not() -> None:
    here = {"fpt-sweep": "0.1.0", "ray": "2.60.0", "torch": "2.13.0+cpu", "python": "3.11.7"}

    assert preflight.disagreements(here | {"torch": "2.13.0+cu130"}, here) == []
    assert preflight.disagreements(here, here | {"torch": None}) == []
    assert preflight.disagreements(here | {"torch": None, "ray": "2.59.0"}, here) == [
        "has ray 2.59.0, and the driver 2.60.0; install the same release on both",
        "has torch (none), and the driver 2.13.0+cpu; install the same release on both",
    ]


# ---------------------------------------------------------------------------------------- a node


@pytest.fixture
def request_of(tmp_path: Path) -> Callable[[], dict[str, Any]]:
    """What a node is asked, of a ledger and a sweep in this folder."""

    def make() -> dict[str, Any]:
        ledger = Ledger(tmp_path / "results", write=True)
        planned = plan(load(tiny(tmp_path)), ledger, workers=Workers(2, 0))
        open_storage(ledger.uri).put(".staging/probe-1", b"here")
        points = preflight.representatives(planned)
        return {
            "uri": ledger.uri,
            "probe": ".staging/probe-1",
            "trials": [(p.trial_id, p.label, p.config.model_dump(mode="json")) for p in points],
            "gpu": False,
        }

    return make


def test_a_sound_node_has_nothing_to_say_and_leaves_nothing(
    request_of: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    asked = request_of()

    assert len(asked["trials"]) == 2  # one a task, not one a seed
    assert preflight.look(**asked) == ([], [])
    assert os.listdir(tmp_path / "results/.staging") == ["probe-1"]


V100, H100 = (
    SimpleNamespace(name="Tesla V100", total_memory=16 * 2**30, major=7, minor=0),
    SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0),
)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The GPUs that torch finds on this machine."""
    there: list[Any] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(there))
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(there))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: there[index])
    return there


def numerics(asked: dict[str, Any], which: str) -> dict[str, Any]:
    """The same request, of trials in a numerics class."""
    trials = []
    for _, label, config in asked["trials"]:
        config = TrialConfig.model_validate(config | {"numerics": which})
        trials.append((trial_id(config), label, config.model_dump(mode="json")))
    return asked | {"trials": trials, "gpu": True}


@pytest.mark.parametrize(
    ("there", "which", "refused"),
    [
        ([V100], "bf16", "this GPU's is 7.0"),
        ([H100, V100], "bf16", "this GPU's is 7.0"),  # a pack may get either
        ([V100], "fp32", None),
        ([H100], "bf16", None),
        ([], "fp32", "torch finds no CUDA device there"),
    ],
)
def test_what_a_gpu_cannot_do_is_told_before_anything_trains(
    there: list[Any],
    which: str,
    refused: str | None,
    gpus: list[Any],
    request_of: Callable[[], dict[str, Any]],
) -> None:
    gpus += there

    problems, devices = preflight.look(**numerics(request_of(), which))

    assert [one.memory for one in devices] == [one.total_memory for one in there]
    assert len(problems) == (refused is not None)
    assert all((refused or "") in one for one in problems)


def test_gpus_that_ray_hides_from_a_probe_are_looked_at(
    gpus: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus.append(H100)
    seen: list[str | None] = []
    monkeypatch.setattr(
        "torch.cuda.is_available",
        lambda: bool(seen.append(os.environ.get("CUDA_VISIBLE_DEVICES")) or True),
    )

    for visible in ("", "1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [one.name for one in preflight.gpus()] == ["NVIDIA H100"]

    assert seen == [None, "1"]


def test_another_folder_of_the_same_name_is_found_out(
    request_of: Callable[[], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    asked = request_of()
    shutil.rmtree(tmp_path / "results")

    (problem,), _ = preflight.look(**asked)

    assert "is not the folder that the driver sees; give a place that all nodes share" in problem


def test_other_data_under_the_same_path_are_found_out(
    request_of: Callable[[], dict[str, Any]],
) -> None:
    asked = request_of()
    name, label, config = asked["trials"][0]
    asked["trials"] = [("0" * 12, label, config)]

    (problem,), _ = preflight.look(**asked)

    assert f"is trial {'0' * 12} to the driver and {name} there" in problem


def test_a_model_that_is_nowhere_is_told(
    request_of: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    asked = request_of()
    name, label, config = asked["trials"][0]
    weights = f"hub:somebody/model@{'0' * 40}"
    config["pretraining"] = "language"
    config["backbone"] |= {"weights": weights}

    problems, _ = preflight.look(**asked | {"trials": [(name, label, config)]})

    assert any("model somebody/model" in one and "sweep fetch" in one for one in problems)


def test_a_disk_without_room_is_told(small_disk: Callable[[str], Path], tmp_path: Path) -> None:
    disk = small_disk("size=64k")
    ledger = Ledger(disk / "results")
    planned = plan(load(tiny(tmp_path, steps=10**6)), ledger)

    (problem,) = preflight.too_full(open_storage(ledger.uri), planned, ledger)

    assert "free some space, or choose another place with --results" in problem
    assert preflight.too_full(open_storage(tmp_path), planned, ledger) == []


def test_a_node_that_dies_meanwhile_is_left_out_and_one_that_is_mute_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(preflight, "DEATH_SECONDS", 0.0)
    dead, mute = node("dead", CPU=1), node("mute", CPU=1)
    monkeypatch.setattr(preflight, "nodes", lambda: [mute])
    told: list[str] = []

    left = preflight._still_there({dead: "no worker", mute: "no answer"}, told.append)

    assert left == {mute: "no answer"}
    assert told == ["node 10.0.0.1: ended meanwhile; the others go on without it"]


# ------------------------------------------------------------------------------- two real nodes


def end(process: subprocess.Popen[Any]) -> None:
    """End a process of ours and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs([psutil.Process(process.pid), *family], timeout=15)
        for one in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


class Nodes:
    """Real nodes of one Ray on this machine, which ask for a token; addresses 127.0.0.71 and on."""

    def __init__(self) -> None:
        # Short, since Ray puts sockets there.
        self.folder = Path(tempfile.mkdtemp(prefix="fptc-", dir="/tmp"))
        (self.folder / "token").write_text(secrets.token_hex(32))
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_AUTH", "HF_TOKEN"))}
        self.environment = ours | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        self.address = f"127.0.0.71:{free_port()}"
        self.dashboard = f"http://127.0.0.1:{free_port()}"
        self.running: list[subprocess.Popen[Any]] = []

    @property
    def token(self) -> str:
        return (self.folder / "token").read_text()

    def start(self, *options: str, before: tuple[str, ...] = ()) -> None:
        host = f"127.0.0.{71 + len(self.running)}"
        if self.running:
            where = [f"--address={self.address}"]
        else:
            port = self.dashboard.rpartition(":")[2]
            where = ["--head", f"--port={self.address.rpartition(':')[2]}"]
            where += ["--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
            where += [f"--temp-dir={self.folder}", f"--ray-client-server-port={free_port()}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *where]
        command += ["--disable-usage-stats", f"--node-ip-address={host}", "--num-gpus=0"]
        command += ["--memory=2000000000", "--object-store-memory=80000000", *options]
        # Another Ray on this machine may have the usual one.
        command += [f"--dashboard-agent-listen-port={free_port()}"]
        with (self.folder / f"{host}.log").open("w") as log:
            process = subprocess.Popen(
                [*before, *command], env=self.environment, stdout=log, stderr=log
            )
        self.running.append(process)
        text = "Ray runtime started"
        for _ in range(900):
            if text in (self.folder / f"{host}.log").read_text():
                return
            assert process.poll() is None, (self.folder / f"{host}.log").read_text()
            time.sleep(0.1)
        pytest.fail("a node did not start")

    def sweep(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sweep", *map(str, arguments)]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=600, **options
        )
        # Whatever is asked of it, and whatever it answers.
        assert self.token not in done.stdout + done.stderr
        return done

    def end(self) -> None:
        for process in reversed(self.running):
            end(process)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.end()


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_cannot_write_stops_a_run_and_one_that_can_makes_it_a_job(
    nodes: Nodes, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    # One trial, long enough to say how far it is wherever this runs.
    file = tiny(tmp_path, steps=12_000)
    text = file.read_text().replace("seed: [0, 1, 2]", "seed: [0]")
    file.write_text(text.replace(", {label: longer, name: bit-xor, bits: 3}", ""))
    script = f'mount --bind {results} {results} && mount -o remount,ro,bind {results} && exec "$@"'
    apart = ("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh")
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("this process may not have mounts of its own")
    nodes.start("--num-cpus=0")
    nodes.start("--num-cpus=1")
    # A third one, to which the results are read-only.
    nodes.start("--num-cpus=1", before=apart)

    refused = nodes.sweep("run", file, "--address", nodes.address, "--results", results, cwd="/")

    assert refused.returncode == 2, refused.stderr
    assert f"node 127.0.0.73 ({socket.gethostname()}): {results}" in refused.stderr
    assert "Read-only file system" in refused.stderr
    assert "127.0.0.72" not in refused.stderr
    assert "nothing was trained" in refused.stderr
    assert not list(results.glob("trials/*"))

    # Without that node: a job, sent twice, looked at, stopped, and sent again.
    end(nodes.running.pop())
    job = ("--address", nodes.dashboard, "--results", results)
    first = nodes.sweep("submit", file, *job, "--no-mirror")
    again = nodes.sweep("submit", file, *job, "--no-mirror")
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert first.stdout == again.stdout
    assert "is running already" in again.stderr
    seen = nodes.sweep("status", file, *job).stdout
    assert f"job {first.stdout.strip()}: " in seen

    command = [sys.executable, "-m", "sweep", "logs", str(file), "--follow"]
    with subprocess.Popen(
        [*command, "--address", nodes.dashboard],
        env=nodes.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as follower:
        assert follower.stdout is not None
        told = []
        for line in follower.stdout:
            told.append(line)
            if "step " in line:
                break
        else:
            pytest.fail("".join([*told, follower.communicate()[1]]))
        assert nodes.sweep("stop", file, "--address", nodes.dashboard).returncode == 0
        rest, ended = follower.communicate(timeout=600)
    assert ended.endswith(": stopped\n"), rest + ended
    states = list(results.glob("states/*"))
    assert states, rest

    last = nodes.sweep("submit", file, *job, "--no-mirror", "--wait")
    assert last.returncode == 0, last.stdout + last.stderr
    assert "-2: sent" in last.stderr
    assert Ledger(results).trials().column("attempts").to_pylist() == [2]


MINE = "import sweep\n" + signs("mine") + 'print("a sweep of", sweep.__file__)\n'


@pytest.mark.ray
@pytest.mark.slow
def test_code_of_ones_own_and_the_package_as_it_is_here_run_on_a_cluster(
    nodes: Nodes, tmp_path: Path
) -> None:
    own, results = tmp_path / "own", tmp_path / "results"
    own.mkdir()
    (own / "mine.py").write_text(MINE)
    text = TINY.replace("STEPS", "20").replace("seed: [0, 1, 2]", "seed: [0]")
    kept, _, _ = text.partition("  task: ")
    (own / "own.yaml").write_text(f'{kept}  task: ["mine:Signs"]\n  seed: [0]\n')
    nodes.start("--num-cpus=1")
    job = ("submit", own / "own.yaml", "--address", nodes.dashboard, "--results", results)

    refused = nodes.sweep(*job, "--wait", "--no-mirror")
    done = nodes.sweep(*job, "--wait", "--no-mirror", "--allow-code", "--with-package")

    assert refused.returncode == 2
    assert "names code: mine:Signs" in refused.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    # Not the one that is installed there.
    assert re.search(r"a sweep of /\S+/_ray_pkg_\w+/sweep/__init__.py", done.stdout), done.stdout
    (row,) = Ledger(results).trials().to_pylist()
    assert (row["task"], row["outcome"]) == ("mine:Signs", "done")
