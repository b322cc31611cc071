"""What is looked at before anything trains on another Ray: all that would fail every trial there.

A probe on each node that can train says which versions it runs, writes to the ledger's storage and
removes what it wrote, and reads the data and weights that the trials name. What is wrong is told
all at once, and nothing was trained. A node that joins later is not asked: what is wrong with it
fails its trials, by cause, one after another.

Clocks are compared for people only: no lease and no commit depends on two of them.
"""

from __future__ import annotations

import math
import os
import platform
import secrets
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpt import contract, hub
from fpt.config import TrialConfig
from fpt.files import DataError
from fpt.precision import Numerics, refusal
from fpt.spec import JSON
from sweep.cluster.connection import ClusterError, forwarded_secrets, restore_cwd
from sweep.ledger import provenance
from sweep.ledger.ledger import Ledger, LedgerError
from sweep.ledger.retrying import retry
from sweep.ledger.storage import Storage, open_storage
from sweep.planning.estimates import quote
from sweep.planning.packing import Device
from sweep.sweepfile import lock
from sweep.sweepfile.identity import trial_id
from sweep.sweepfile.trials import Point

if TYPE_CHECKING:
    from sweep.planning.plan import Plan

SECONDS = 90.0
"""What a node has to start a worker and to answer, on a busy machine too."""

DEATH_SECONDS = 15.0
"""What Ray has to see that a node which does not answer is dead."""

SKEW = 1.0
"""Seconds between two clocks from which on it is told."""

PACKAGES = ("fpt-sweep", "ray", "torch")
"""Packages whose releases have to be the same on all nodes, besides Python itself."""

Shape = Mapping[str, float]
"""Resources that a pack asks for: {"CPU": 1, "GPU": 1}."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster."""

    id: str
    address: str
    resources: Shape = field(hash=False)


@dataclass(frozen=True)
class Group:
    """Nodes that the autoscaler may start."""

    name: str
    resources: Shape
    most: int
    """How many, at most."""


def check(
    planned: Plan,
    ledger: Ledger,
    *,
    tell: Callable[[str], None],
    halted: Callable[[], bool] = lambda: False,
    seconds: float = SECONDS,
) -> tuple[Device, ...]:
    """Look at a cluster that this process is connected to, and raise if a plan cannot run there.

    Args:
        planned: What is to run.
        ledger: Where its results go.
        tell: Takes what a person may want to know, and what stops nothing.
        halted: Asked now and then; True gives up, without a verdict.
        seconds: What the nodes have to answer.

    Returns:
        The GPUs of the nodes that packs can train on; none, if packs get no GPU.

    Raises:
        ClusterError: With all problems, each with what to do.
        LedgerError: If this process cannot write to the ledger.
    """
    shapes = [dict(pack.resources) for pack in planned.packs]
    alive, groups = nodes(), autoscaled()
    problems = infeasible(shapes, alive, groups)
    fit = [node for node in alive if any(_fits(shape, node.resources) for shape in shapes)]
    if not fit and not problems:
        tell("no node that can train is up yet; the autoscaler starts them, and they are not asked")
    storage = open_storage(ledger.uri)
    problems += too_full(storage, planned, ledger)
    probe = f".staging/probe-{secrets.token_hex(8)}"
    storage.put(probe, b"here")
    try:
        request = {
            "uri": ledger.uri,
            "probe": probe,
            "trials": [
                (point.trial_id, point.label, point.config.model_dump(mode="json"))
                for point in representatives(planned)
            ],
            "gpu": any(shape.get("GPU") for shape in shapes),
        }
        found, devices = _asked(fit, request, tell=tell, halted=halted, seconds=seconds)
        problems += found
    finally:
        storage.delete([probe])
    if not problems:  # a node may have ended meanwhile
        problems += infeasible(shapes, nodes(), groups)
    restore_cwd()
    if problems:
        raise ClusterError("\n".join([*problems, f"{planned.sweep.file}: nothing was trained"]))
    return devices


# ------------------------------------------------------------------------------------- the cluster


def nodes() -> list[Node]:
    """Return the nodes of this Ray that are alive."""
    import ray

    return [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"])
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]


def autoscaled() -> list[Group]:
    """Return the kinds of nodes that the autoscaler may start, as far as it says."""
    from ray._private.state import state

    config = state.get_cluster_config()
    if config is None:
        return []
    return [
        Group(group.name, dict(group.resources), 2**31 if group.max_count < 0 else group.max_count)
        for group in config.node_group_configs
        if group.max_count
    ]


def capacity(alive: Iterable[Node], groups: Iterable[Group]) -> dict[str, float]:
    """Resource -> how much of it there is, or can be once the autoscaler has grown the cluster."""
    now: dict[str, float] = defaultdict(float)
    grown: dict[str, float] = defaultdict(float)
    for node in alive:
        for name, amount in node.resources.items():
            now[name] += amount
    for group in groups:
        for name, amount in group.resources.items():
            grown[name] += amount * group.most
    return {name: max(now[name], grown[name]) for name in now.keys() | grown.keys()}


def infeasible(
    shapes: Iterable[Shape], alive: Sequence[Node], groups: Sequence[Group]
) -> list[str]:
    """Return the shapes that no node has room for, now or after scaling."""
    problems: dict[str, None] = {}
    for shape in shapes:
        places = [node.resources for node in alive] + [group.resources for group in groups]
        if not any(_fits(shape, place) for place in places):
            most = {name: max((p.get(name, 0) for p in places), default=0) for name in shape}
            kinds = ", or ".join(group.name for group in groups)
            limit = f", nor can the autoscaler start one ({kinds})" if groups else ""
            problems[
                f"no node of this cluster has {_spelled(shape)} for a pack{limit}; the most of "
                f"one node is {_spelled(most)}: add such a node, or ask for less"
            ] = None
    return list(problems)


def whole_device(shape: Shape, alive: Sequence[Node], groups: Sequence[Group]) -> Shape:
    """Return what a pack has to ask for to be alone on its device: whole GPUs, or, of a pack that
    trains on a core, all cores of the largest node.
    """
    if gpus := shape.get("GPU"):
        return {**shape, "GPU": float(math.ceil(gpus))}
    now = [node.resources for node in alive if _fits(shape, node.resources)]
    places = now or [group.resources for group in groups if _fits(shape, group.resources)]
    return {**shape, "CPU": max((place["CPU"] for place in places), default=shape["CPU"])}


def elsewhere(shape: Shape, avoid: Collection[str]) -> dict[str, str]:
    """Return the label selector that keeps a pack from nodes that failed it; empty where no other
    node has room for it.
    """
    others = (node for node in nodes() if node.id not in avoid)
    if not avoid or not any(_fits(shape, node.resources) for node in others):
        return {}
    return {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}


def _fits(shape: Shape, resources: Shape) -> bool:
    return all(resources.get(name, 0) >= amount for name, amount in shape.items())


def _spelled(shape: Shape) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in shape.items())


# --------------------------------------------------------------------------------------- the probe


def _asked(
    fit: Sequence[Node],
    request: JSON,
    *,
    tell: Callable[[str], None],
    halted: Callable[[], bool],
    seconds: float,
) -> tuple[list[str], tuple[Device, ...]]:
    """Return what the nodes have to say, the same of several only once; and their GPUs."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = versions()
    variables = forwarded_secrets()
    probe: Any = ray.remote(_probe())
    actors: dict[Node, Any] = {}
    for node in fit:
        only = NodeAffinitySchedulingStrategy(node.id, soft=False)
        actors[node] = probe.options(num_cpus=0, scheduling_strategy=only).remote()
    answers = {actor.look.remote(variables, request): node for node, actor in actors.items()}
    told: dict[str, list[str]] = defaultdict(list)
    devices: list[Device] = []
    mute: dict[Node, str] = {}
    waiting = list(answers)
    deadline = time.monotonic() + seconds
    while waiting and time.monotonic() < deadline and not halted():
        ready, waiting = ray.wait(waiting, timeout=0.5)
        for answer in ready:
            node = answers[answer]
            try:
                found = ray.get(answer)
            except Exception as error:  # whatever keeps a worker from starting
                lines = [line for line in str(error).splitlines() if line.strip()]
                mute[node] = f"no worker starts there: {lines[-1] if lines else error!r}"
                continue
            for problem in [*disagreements(found["versions"], here), *found["problems"]]:
                told[problem].append(f"{node.address} ({found['host']})")
            devices += found["devices"]
            if ahead := _ahead(actors[node]):
                tell(
                    f"node {node.address}: its clock is {abs(ahead):.1f} s "
                    f"{'ahead of' if ahead > 0 else 'behind'} this one; times in the ledger are "
                    "each node's own, nothing else depends on it"
                )
    if halted():
        return [], ()
    for answer in waiting:
        mute[answers[answer]] = (
            f"did not answer in {seconds:.0f} s: is it up (`ray status`), and can it start a "
            "worker? end it, or wait for it, and run again"
        )
    for actor in actors.values():
        ray.kill(actor)
    for node, what in _still_there(mute, tell).items():
        told[what].append(node.address)
    problems = [
        f"node{'s' if places[1:] else ''} {', '.join(places)}: {what}"
        for what, places in told.items()
    ]
    return problems, tuple(devices)


def _still_there(mute: Mapping[Node, str], tell: Callable[[str], None]) -> Mapping[Node, str]:
    """Those who said nothing and are alive; a node that has died meanwhile is no problem."""
    deadline = time.monotonic() + DEATH_SECONDS
    while mute:
        alive = {node.id for node in nodes()}
        if not any(node.id in alive for node in mute) or time.monotonic() > deadline:
            for node in mute:
                if node.id not in alive:
                    tell(f"node {node.address}: ended meanwhile; the others go on without it")
            return {node: what for node, what in mute.items() if node.id in alive}
        time.sleep(0.5)
    return {}


def _probe() -> type:
    """Return the actor's class. Made in a function, it travels by value, to where no fpt-sweep is
    too.
    """

    class Probe:
        def look(self, variables: Mapping[str, str], request: JSON) -> JSON:
            import os
            import platform
            import socket
            from importlib import metadata

            def version(package: str) -> str | None:
                try:
                    return metadata.version(package)
                except metadata.PackageNotFoundError:
                    return None

            for name, value in variables.items():
                os.environ.setdefault(name, value)
            found = {name: version(name) for name in ("fpt-sweep", "ray", "torch")}
            found["python"] = platform.python_version()
            try:
                from sweep.cluster.preflight import look

                problems, devices = look(**request)
            except ImportError as error:
                problems, devices = [f"fpt-sweep cannot be imported ({error}); install it"], []
            host = socket.gethostname()
            return {"host": host, "versions": found, "problems": problems, "devices": devices}

        def now(self) -> float:
            import time

            return time.time()

    return Probe


def _ahead(actor: Any) -> float | None:
    """Seconds that a node's clock is ahead of ours, if that is more than a call can tell apart."""
    import ray

    asked = time.time()
    try:
        there = ray.get(actor.now.remote(), timeout=5)
    except ray.exceptions.RayError:
        return None
    answered = time.time()
    ahead = there - (asked + answered) / 2
    return ahead if abs(ahead) > SKEW + (answered - asked) / 2 else None


def versions() -> dict[str, str | None]:
    """Return the releases that matter, in this process."""
    own = {name: provenance.version(name) for name in PACKAGES}
    return own | {"python": platform.python_version()}


def disagreements(there: Mapping[str, str | None], here: Mapping[str, str | None]) -> list[str]:
    """Return where a node's releases are not the driver's."""
    problems = []
    for name, ours in here.items():
        theirs = there.get(name)
        # A build for another device is the same release; a driver needs no torch.
        same = (ours or "").partition("+")[0] == (theirs or "").partition("+")[0]
        if not same and not (name == "torch" and ours is None):
            problems.append(
                f"has {name} {theirs or '(none)'}, and the driver {ours or '(none)'}; install the "
                "same release on both"
            )
    return problems


# -------------------------------------------------------------------------------------- on a node


def look(
    uri: str, probe: str, trials: Sequence[tuple[str, str, JSON]], gpu: bool
) -> tuple[list[str], list[Device]]:
    """Return what keeps this machine from training: the probe's work, in a worker.

    Args:
        uri: The ledger.
        probe: An object that the driver wrote there.
        trials: Id, label and config of trials that between them read all data and weights.
        gpu: Whether packs get GPUs.

    Returns:
        Problems, and the GPUs of this machine if packs get one.
    """
    problems = _storage_problems(uri, probe)
    classes: set[Numerics] = set()
    for name, label, dumped in trials:
        try:
            config = TrialConfig.model_validate(dumped)
            found = trial_id(config)
            contract.check_trial(config)
        except (DataError, OSError, ValueError) as error:
            problems.append(f"{label}: {str(error).splitlines()[0]}")
            continue
        if found != name:
            problems.append(
                f"{label}: is trial {name} to the driver and {found} there: data or weights "
                "differ; copy the same files"
            )
        problems += _of_the_hub(config)
        classes.add(config.numerics)
    devices = gpus() if gpu else []
    if gpu and not devices:
        problems.append(
            "has GPUs by its own account, and torch finds no CUDA device there: look at its driver "
            "(nvidia-smi) and at torch's build, or start its Ray with --num-gpus=0"
        )
    for numerics in sorted(classes):
        capabilities = sorted({one.capability for one in devices}) if gpu else [None]
        problems += filter(None, (refusal(numerics, one) for one in capabilities))
    return list(dict.fromkeys(problems)), devices


def gpus() -> list[Device]:
    """Return the CUDA devices of this machine, none where torch finds none."""
    # Ray hides them from a worker that has none reserved, by an empty list.
    if not os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip():
        del os.environ["CUDA_VISIBLE_DEVICES"]
    import torch

    if not torch.cuda.is_available():
        return []
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [Device(one.name, one.total_memory, (one.major, one.minor)) for one in found]


def _storage_problems(uri: str, probe: str) -> list[str]:
    try:
        storage = open_storage(uri)

        def read() -> None:
            if storage.get(probe) is None:
                raise FileNotFoundError

        try:
            # NFS may show a new name late.
            retry(read, FileNotFoundError, within=3.5, pauses=(0.5, 2.0))
        except FileNotFoundError:
            shared = "give a place that all nodes share, by NFS or as s3://, gs://, az://"
            return [f"{uri}: is not the folder that the driver sees; {shared}"]
        own = f"{probe}-{secrets.token_hex(8)}"
        try:
            made = storage.create(own, b"first")
            if not made or storage.create(own, b"second"):
                return [f"{uri}: lets two writers create one object, so that it can hold no ledger"]
        finally:
            storage.delete([own])
    except LedgerError as error:
        return [str(error)]
    return []


def _of_the_hub(config: TrialConfig) -> list[str]:
    """Return what the machine has not of the Hub and cannot get there."""
    problems = []
    for source, files in lock.sources(config).items():
        wanted = hub.HubData(source.repository, source.revision, files)
        folder = hub.snapshot(source.repository, kind=source.kind, revision=source.revision)
        if folder is not None and wanted.among(hub.names_in(folder)):
            continue
        try:
            _ask_hub(source)
        except DataError as error:
            problems.append(f"{error} (`sweep fetch FILE` there, or a shared HF_HOME)")
    return problems


def _ask_hub(source: lock.Source) -> None:
    from huggingface_hub import HfApi

    what = f"{'model' if source.kind == 'model' else 'data set'} {source.repository}"
    with hub.told(what, source.revision):
        if hub.offline():
            raise OSError("HF_HUB_OFFLINE is set")
        HfApi().repo_info(
            source.repository, revision=source.revision, repo_type=source.kind, timeout=10
        )


# --------------------------------------------------------------------------------------- the driver


def representatives(planned: Plan) -> list[Point]:
    """Return a trial for each thing that is read: task and its data, weights, numerics class."""
    found: dict[tuple[str, str | None, str], Point] = {}
    for pack in planned.packs:
        for point in pack.points:
            config = point.config
            weights = config.backbone.weights if config.reads_weights else None
            found.setdefault((config.task.model_dump_json(), weights, config.numerics), point)
    return list(found.values())


def too_full(storage: Storage, planned: Plan, ledger: Ledger) -> list[str]:
    """Return whether a folder lacks the space for what the plan will write; of buckets nobody
    knows.
    """
    if "://" in storage.uri:
        return []
    need = quote(planned, ledger).disk
    there = Path(storage.uri)
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free >= need:
        return []
    have, want = f"{free / 2**20:,.0f} MiB are free", f"{need / 2**20:,.0f}"
    more = "free some space, or choose another place with --results"
    return [f"{storage.uri}: {have}, and states and results may take {want}; {more}"]
