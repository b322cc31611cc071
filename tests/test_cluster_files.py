"""The files under cluster/: judged by public schemas as far as that goes without a cluster."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line and not line.startswith("#")
)


def read(name: str) -> Any:
    return YAML(typ="safe", pure=True).load(CLUSTER / name)


def test_every_file_is_in_the_readme() -> None:
    told = set(re.findall(r"^\| \[(.+?)\]", (CLUSTER / "README.md").read_text(), re.MULTILINE))
    files = {path.name for path in CLUSTER.iterdir()}

    assert told == files - {"README.md", "Dockerfile.dockerignore"}


# --------------------------------------------------------------------------------- the autoscaler


def test_the_autoscalers_file_fits_rays_own_schema() -> None:
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = Path(spec.origin).parent / "autoscaler" / "ray-schema.json"

    jsonschema.validate(read("autoscaler.yaml"), json.loads(schema.read_text()))


def test_the_autoscaler_starts_spot_gpus_and_a_head_that_trains_nothing() -> None:
    config = read("autoscaler.yaml")
    types = config["available_node_types"]
    workers = {name: one for name, one in types.items() if name != config["head_node_type"]}

    assert types[config["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    assert "InstanceMarketOptions" not in types[config["head_node_type"]]["node_config"]
    assert any(one["resources"].get("GPU") for one in workers.values())
    for one in workers.values():
        assert one["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert 0 <= one["min_workers"] <= one["max_workers"] <= config["max_workers"]
    starts = config["head_start_ray_commands"]
    assert "--dashboard-host=127.0.0.1" in starts[-1]


# ----------------------------------------------------------------------------------------- KubeRay

TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
NUMBER = {"type": "integer", "minimum": 0}
QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^\d+(m|Ki|Mi|Gi|Ti)?$"},
}


def known(required: tuple[str, ...] = (), **properties: Any) -> Any:
    return {
        "type": "object",
        "required": list(required),
        "properties": properties,
        "additionalProperties": False,
    }


def several(one: Any) -> Any:
    return {"type": "array", "minItems": 1, "items": one}


POD = known(
    ("spec",),
    spec=known(
        ("containers",),
        containers=several(
            known(
                ("name", "image", "resources"),
                name={"type": "string"},
                image={"type": "string"},
                resources=known(("limits",), requests=QUANTITIES, limits=QUANTITIES),
                envFrom=several(
                    known(secretRef=known(name={"type": "string"}, optional={"type": "boolean"}))
                ),
                volumeMounts=several(
                    known(
                        ("name", "mountPath"),
                        name={"type": "string"},
                        mountPath={"type": "string", "pattern": "^/"},
                        readOnly={"type": "boolean"},
                    )
                ),
            )
        ),
        volumes=several(
            known(("name",), name={"type": "string"}, configMap=known(name={"type": "string"}))
        ),
        nodeSelector=TEXTS,
        terminationGracePeriodSeconds=NUMBER,
        tolerations=several(
            known(
                key={"type": "string"},
                operator={"enum": ["Equal", "Exists"]},
                value={"type": "string"},
                effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
            )
        ),
    ),
)
RAYJOB = known(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=known(
        ("name",), name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
    ),
    spec=known(
        ("entrypoint", "rayClusterSpec"),
        entrypoint={"type": "string"},
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
        backoffLimit=NUMBER,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=NUMBER,
        rayClusterSpec=known(
            ("headGroupSpec", "rayVersion"),
            rayVersion={"type": "string"},
            enableInTreeAutoscaling={"type": "boolean"},
            authOptions=known(mode={"enum": ["disabled", "token"]}),
            autoscalerOptions=known(
                upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
                idleTimeoutSeconds=NUMBER,
            ),
            headGroupSpec=known(("template",), rayStartParams=TEXTS, template=POD),
            workerGroupSpecs=several(
                known(
                    ("groupName", "minReplicas", "maxReplicas", "template"),
                    groupName={"type": "string"},
                    replicas=NUMBER,
                    minReplicas=NUMBER,
                    maxReplicas=NUMBER,
                    rayStartParams=TEXTS,
                    template=POD,
                )
            ),
        ),
    ),
)
"""The fields that our manifest uses, as KubeRay's v1 API has them (ray-operator/apis/ray/v1 of
github.com/ray-project/kuberay) and Kubernetes' pods; an API server would know more."""


def test_the_manifest_fits_kuberays_api() -> None:
    jsonschema.validate(read("rayjob.yaml"), RAYJOB)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda job: job["spec"].update(entryPoint="x"),
        lambda job: job["spec"]["rayClusterSpec"].pop("headGroupSpec"),
        lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update(n=0),
    ],
)
def test_the_schema_can_say_no(wrong: Any) -> None:
    job = read("rayjob.yaml")
    wrong(job)

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, RAYJOB)


def test_the_manifest_mounts_what_it_reads_and_runs_the_ray_that_is_pinned() -> None:
    spec = read("rayjob.yaml")["spec"]
    cluster = spec["rayClusterSpec"]

    assert cluster["rayVersion"] == PINS["ray"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        names = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= names
            assert any(
                spec["entrypoint"].split()[4].startswith(mount["mountPath"])
                for mount in container["volumeMounts"]
            )


# -------------------------------------------------------------------------------------- Dockerfile


def instructions() -> list[tuple[str, str]]:
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_is_built_of_files_that_are_there_on_the_pinned_ray() -> None:
    known_words = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "VOLUME", "CMD", "USER", "LABEL"}
    words = [word for word, _ in instructions()]
    copied: set[str] = set()
    for word, rest in instructions():
        if word == "COPY":
            *sources, _ = (one for one in shlex.split(rest) if not one.startswith("--"))
            copied |= set(sources)

    assert set(words) <= known_words
    assert words[:2] == ["ARG", "FROM"]
    assert dict(instructions())["ARG"].startswith(f"RAY={PINS['ray']}-py311")
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
    kept = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in kept if line.startswith("!")} == copied


# ------------------------------------------------------------------------------------------- Slurm

SRUN = """\
#!/usr/bin/env bash
# A stand-in: runs the command here, as if on the node.
while [[ ${1-} == --* ]]; do
  [[ $1 == --nodelist=* ]] && export NODE=${1#*=}
  shift
done
exec "$@"
"""

PYTHON = f"""\
#!/usr/bin/env bash
# A stand-in for the cluster's Python: notes what it is asked for.
if [[ $1 == -c ]]; then exec {sys.executable} "$@"; fi
# Before it says that it is there.
case $2 in
  ray.scripts.scripts) trap 'echo "${{NODE}} ended" >>"$NOTES"; exit 0' TERM ;;
  sweep) trap 'echo "driver stopped" >>"$NOTES"; exit 1' TERM ;;
esac
echo "${{NODE:-here}} $RAY_AUTH_MODE $*" >>"$NOTES"
if [[ $1 == - ]]; then
  cat >/dev/null
  if [[ $2 == *:* ]]; then
    until [[ $(grep -c -- "start --block" "$NOTES") == "$3" ]]; do sleep 0.05; done
  fi
  exit 0
fi
if [[ $2 == ray.scripts.scripts ]]; then while :; do sleep 0.05; done; fi
[[ $(<"$RAY_AUTH_TOKEN_PATH") =~ ^[0-9a-f]{{64}}$ ]] || exit 5
if [[ $* == *wait.yaml* ]]; then while :; do sleep 0.05; done; fi
exit 3
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of an allocation of two nodes."""
    commands = {
        "srun": SRUN,
        "scontrol": "#!/bin/sh\n[ \"$1 $2\" = 'show hostnames' ] && printf 'n1\\nn2\\n'\n",
        "hostname": "#!/bin/sh\necho 127.0.0.1 10.0.0.1\n",
        "python": PYTHON,
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "NOTES": str(tmp_path / "notes"),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_GPUS_ON_NODE": "2",
        "FPT_SWEEP_SCRATCH": str(tmp_path),
    }


def test_the_slurm_script_raises_a_cluster_runs_the_sweep_and_takes_it_down(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    command = ["bash", str(CLUSTER / "slurm.sh"), "a b.yaml", "--results", "/shared"]

    done = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=600)

    assert done.returncode == 3, done.stderr
    notes = (tmp_path / "notes").read_text().splitlines()
    assert all(" token " in note for note in notes if not note.endswith("ended"))
    starts = [note for note in notes if "start --block" in note]
    assert sorted(note.split()[0] for note in starts) == ["n1", "n2"]
    for note in starts:
        assert ("--head" in note) == note.startswith("n1 ")
        assert "--num-cpus=4 --num-gpus=2" in note
        assert ("--address=127.0.0.1:6379" in note) == note.startswith("n2 ")
    (run,) = (note for note in notes if "-m sweep" in note)
    assert run.endswith("-m sweep run --address 127.0.0.1:6379 a b.yaml --results /shared")
    assert sorted(note for note in notes if note.endswith("ended")) == ["n1 ended", "n2 ended"]
    assert not list(tmp_path.glob(".fpt-sweep-*"))  # the token


def test_the_slurm_script_passes_the_end_of_its_time_on_to_the_driver(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    command = ["bash", str(CLUSTER / "slurm.sh"), "wait.yaml"]
    with subprocess.Popen(command, env=slurm, stderr=subprocess.PIPE) as script:
        notes = tmp_path / "notes"
        for _ in range(6000):
            if notes.exists() and "-m sweep" in notes.read_text():
                break
            time.sleep(0.05)
        script.send_signal(signal.SIGTERM)
        script.communicate(timeout=600)

    assert script.returncode == 143
    assert "driver stopped" in notes.read_text()
    assert notes.read_text().index("driver stopped") < notes.read_text().index("ended")
    assert not list(tmp_path.glob(".fpt-sweep-*"))


def test_the_slurm_script_outside_slurm_says_so(tmp_path: Path) -> None:
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    for arguments, code, message in (([], 2, "usage: sbatch"), (["a.yaml"], 1, "with sbatch")):
        command = ["bash", str(CLUSTER / "slurm.sh"), *arguments]
        done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)

        assert done.returncode == code
        assert message in done.stderr
