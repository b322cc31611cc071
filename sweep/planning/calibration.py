"""What a step takes on a GPU, from what was measured: by the ledger, or by `benchmarks/gpu.py`.

A step is taken to cost fixed seconds for each layer, some for each member in each layer, and its
operations at some speed (`sweep.planning.packing.StepCosts`). The three are fitted to the seconds
of steps of several depths, packs and sizes, with none of them below zero.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from fpt.config import TrialConfig
from fpt.files import cache_folder
from fpt.spec import JSON
from sweep.ledger.ledger import Ledger
from sweep.planning import packing
from sweep.planning.packing import LEAST_SECONDS, StepCosts, Workers

TOLD = 0.1
"""The part of some step that its operations have to take, to tell their speed."""


class Measured(NamedTuple):
    """A step that was measured."""

    layers: int
    members: int
    operations: float
    """Of all members together: see `sweep.planning.packing.step_operations`."""
    seconds: float


def fitted(steps: Sequence[Measured]) -> StepCosts | None:
    """Fit costs to steps, each weighing by its relative error; None where they do not tell all
    three: of one depth alone, say, of no packs, or where operations are next to nothing.
    """
    from scipy.optimize import nnls

    if not steps:
        return None
    columns = np.array([[one.layers, one.layers * one.members, one.operations] for one in steps])
    # Of like size, so that the rank means something.
    scale = columns.max(0)
    relative = columns / scale / np.array([[one.seconds] for one in steps])
    if np.linalg.matrix_rank(columns / scale, tol=1e-3) < len(scale):
        return None
    layer, member, operation = nnls(relative, np.ones(len(steps)))[0] / scale
    if max(operation * one.operations / one.seconds for one in steps) < TOLD:
        return None
    return StepCosts(float(layer), float(member), 1 / float(operation))


def calibrated(workers: Workers, ledger: Ledger) -> Workers:
    """Return the workers with what is known of their model of GPU: from the ledger's trials, else
    from what `benchmarks/gpu.py` kept on this machine, else as they are.

    Raises:
        LedgerError: If the ledger cannot be read.
    """
    if not workers.gpus or workers.gpu_name is None:
        return workers
    costs = fitted(_of_ledger(ledger, workers.gpu_name)) or kept(workers.gpu_name)
    return workers if costs is None else replace(workers, costs=costs)


def keep(model: str, costs: StepCosts) -> Path:
    """Keep costs of a model of GPU on this machine, and return the file."""
    path = _path(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(costs)) + "\n", encoding="utf-8")
    return path


def kept(model: str) -> StepCosts | None:
    """Return what was kept of a model of GPU; None: nothing, or nothing that can be read."""
    try:
        found = StepCosts(**json.loads(_path(model).read_text(encoding="utf-8")))
        valid = min(found.layer, found.member) >= 0 and found.speed > 0
    except (OSError, ValueError, TypeError):
        return None
    return found if valid else None


def _path(model: str) -> Path:
    return cache_folder() / "gpus" / f"{re.sub('[^A-Za-z0-9]+', '-', model)}.json"


def _of_ledger(ledger: Ledger, model: str) -> list[Measured]:
    """Return the steps of trials that trained on such GPUs, one of each kind and size of pack."""
    measures = ("seconds", "steps_trained", "attempts", "extended_from", "device_name", "pack_size")
    table = ledger.trials(columns=["config", *measures], strict=False)
    found: dict[tuple[int, int, float], list[float]] = defaultdict(list)
    configs: dict[str, TrialConfig | None] = {}
    for row in table.to_pylist() if model in table.column("device_name").to_pylist() else ():
        whole = row["attempts"] == 1 and row["extended_from"] is None and row["steps_trained"]
        if row["device_name"] != model or not whole or row["seconds"] < LEAST_SECONDS:
            continue
        text, members = row["config"], row["pack_size"] or 1
        if text not in configs:
            configs[text] = config_of(json.loads(text))
        if (config := configs[text]) is not None:
            key = config.backbone.layers, members, members * packing.step_operations(config)
            # The wall time is shared out among the members.
            found[key].append(members * row["seconds"] / row["steps_trained"])
    return [Measured(*key, median(seconds)) for key, seconds in found.items()]


def config_of(identity: JSON) -> TrialConfig | None:
    """A config of the same cost as the trial of an identity; None if that cannot be had."""
    task = {key: value for key, value in identity["task"].items() if key != "version"}
    backbone = {
        key: value
        for key, value in identity["backbone"].items()
        if key in ("name", "layers", "width", "heads")
    }
    kept = ("batch_size", "steps", "protocol", "seed", "train", "dropout")
    fields = {name: identity[name] for name in kept}
    every = {"every": identity["evaluation"]["every"]}
    try:
        return TrialConfig.model_validate(
            {
                **fields,
                "task": task,
                "backbone": backbone,
                "evaluation": every,
                "pretraining": "random",
            }
        )
    except (ValueError, OSError):
        return None
