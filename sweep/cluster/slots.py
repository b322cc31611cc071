"""Packs that a Ray has room for at a time, and the nodes that get none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sweep.cluster.preflight import Group, Node


def count_slots(gpus: float, nodes: Iterable[Node], groups: Iterable[Group]) -> int:
    """Count the packs that fit at a time, now or once the autoscaler has grown the cluster.

    Args:
        gpus: GPUs that a pack takes: a whole number, or a fraction of one. A fraction does not
            reach over two GPUs: of 0.3 there are three to each. Every pack takes a core, too.
        nodes: Those that are there.
        groups: Those that may come.
    """
    now = sum(_room(gpus, node.resources) for node in nodes)
    grown = sum(_room(gpus, group.resources) * group.most for group in groups)
    return max(1, now, grown)


def _room(gpus: float, resources: Mapping[str, float]) -> int:
    cores = int(resources.get("CPU", 0))
    if not gpus:
        return cores
    devices = int(resources.get("GPU", 0))
    # 1e-9: 1 / 0.1 may come out below 10.
    fit = int(devices / gpus + 1e-9) if gpus >= 1 else devices * int(1 / gpus + 1e-9)
    return min(fit, cores)


def left_out(gpus: float, nodes: Sequence[Node]) -> str | None:
    """Say which nodes have cores and get no pack, since each pack takes a GPU; None: there is none.

    Args:
        gpus: GPUs that a pack takes.
        nodes: Those that are there.
    """
    idle = [node for node in nodes if node.resources.get("CPU") and not _room(gpus, node.resources)]
    if not gpus or not idle or len(idle) == len(nodes):
        return None
    shown = ", ".join(node.address for node in idle[:5])
    more = f" and {len(idle) - 5} more" if len(idle) > 5 else ""
    return (
        f"no pack runs on {shown}{more}: each takes {gpus:g} GPU and a core, and there are none to "
        "be had; their cores train in a run of their own, with gpus=0 and another sweep"
    )
