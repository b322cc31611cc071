"""The rows that a worker writes: of a trial that has ended, and of an attempt that failed."""

from __future__ import annotations

import functools
import json
import time
import traceback
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from fpt.config import TrialConfig
from fpt.metrics import on_split
from fpt.spec import JSON
from fpt.tasks.base import Baseline
from sweep.execution import output
from sweep.execution.job import Job
from sweep.ledger import provenance
from sweep.ledger.columns import TRIALS
from sweep.ledger.ledger import Cause
from sweep.sweepfile.identity import IDENTITY_VERSION
from sweep.sweepfile.trials import Point

if TYPE_CHECKING:
    from fpt.trainer import Outcome


@dataclass
class Progress:
    """What is known here of a trial that is training."""

    point: Point
    started_at: datetime
    clock: float = field(default_factory=time.monotonic)
    """The monotonic clock at that time: the wall clock may be set while it trains."""
    step: int | None = None
    """The last step heard of; None before the first record."""
    seconds: float = 0.0
    """Of training, over all attempts, up to that step."""
    began: float = 0.0
    """What those seconds were when this attempt began."""
    saved: float = 0.0
    """What they were in the last saved state."""
    segment: int = 0
    extended_from: str | None = None
    row_padding: int | None = None
    """See `fpt.trainer.Training.row_padding`."""
    rows: list[JSON] = field(default_factory=list)
    """Of the curve, since the last segment."""
    logged: int = 0
    """Characters of the log that are written."""

    def now(self) -> datetime:
        """Return the time: when this attempt started, and what has passed since."""
        return self.started_at + timedelta(seconds=time.monotonic() - self.clock)

    def piece(self) -> tuple[int, list[JSON]]:
        """Return the next piece of the curve, and its number, and begin another one."""
        piece = self.segment, self.rows
        self.segment, self.rows = self.segment + 1, []
        return piece


def failure_row(
    job: Job, trial: Progress, cause: Cause | Literal["doubled"], error: BaseException
) -> JSON:
    """Return the row of an attempt that failed: a value for each column of `failures`."""
    last = output.tail()
    printed = f"\nprinted last:\n{last}\n" if last else ""
    return {
        "trial_id": trial.point.trial_id,
        "attempt": job.attempt,
        "cause": cause,
        "exception": type(error).__name__,
        "message": str(error) or repr(error),
        "traceback": "".join(traceback.format_exception(error)) + printed,
        "config": _json(trial.point.config.model_dump(mode="json")),
        "step": trial.step,
        "host": provenance.host(),
        "node": job.node,
        "device": job.device,
        "seconds": trial.seconds,
        "lost": max(0.0, trial.seconds - trial.saved),
        "pack_size": len(job.points),
        "accumulation": job.accumulation,
        "at": datetime.now(UTC),
    }


def trial_row(trial: Progress, outcome: Outcome, job: Job) -> JSON:
    """Return the row of a trial that has ended: a value for each column of `trials`."""
    point, config = trial.point, trial.point.config
    baseline, stronger = _baselines(config)
    metrics = outcome.metrics | {
        name: float(value) for name, value in on_split("baseline", baseline.metrics).items()
    }
    values = {
        **vars(outcome),  # named as columns are, but for these
        "steps_trained": outcome.steps,
        "groups": _json(outcome.groups),
        "parameters": sum(group["parameters"] for group in outcome.groups.values()),
        "parameters_trained": sum(group["trained"] for group in outcome.groups.values()),
        **config_columns(point),
        "metrics": _json(metrics) if metrics else None,
        "baseline_accuracy": baseline.accuracy,
        "baseline_rule": baseline.rule,
        "stronger_baseline_accuracy": stronger.accuracy if stronger else None,
        "stronger_baseline_rule": stronger.rule if stronger else None,
        "pack_size": len(job.points),
        "accumulation": job.accumulation,
        "row_padding": trial.row_padding,
        "attempts": job.attempts[point.trial_id],
        "attempt": job.attempt,
        "extended_from": trial.extended_from,
        "own_code": _json(config.own_code) if config.own_classes else None,
        **provenance.code(),
        "versions": provenance.versions(),
        "host": provenance.host(),
        "device": job.device,
        "device_name": _model_of(job.device),
        "started_at": trial.started_at,
        "finished_at": trial.now(),
    }
    return {column.name: values[column.name] for column in TRIALS}


def config_columns(point: Point) -> JSON:
    """Return what a row says of a trial's config: columns of the roles key and config."""
    config, identity = point.config, point.config.identity()
    task, backbone = dict(identity["task"]), identity["backbone"]
    same = ("pretraining", "learning_rate", "batch_size", "steps", "dropout", "numerics")
    return {
        "trial_id": point.trial_id,
        "cell_id": point.cell_id,
        "identity_version": IDENTITY_VERSION,
        "config": _json(identity),
        "task": task.pop("name"),
        "task_version": task.pop("version"),
        "task_parameters": _json(task),
        "backbone": config.backbone.name,
        **{name: getattr(config.backbone, name) for name in ("layers", "width", "heads")},
        "weights": backbone["weights"],
        "initialiser": backbone["initialiser"],
        "backbone_seed": identity["backbone_seed"],
        "train": "+".join(config.train),
        "optimizer": _json(identity["optimizer"]),
        "stop": None if identity["stop"] is None else _json(identity["stop"]),
        "evaluate_every": config.evaluation.every,
        **{name: getattr(config, name) for name in (*same, "protocol", "seed")},
    }


@functools.cache
def _model_of(device: str) -> str:
    """Return the model of this machine's processor, or of the GPU that this process got."""
    if device == "cpu":
        return provenance.processor()
    import torch

    return torch.cuda.get_device_name(device)


_BASELINES: dict[str, tuple[Baseline, Baseline | None]] = {}


def _baselines(config: TrialConfig) -> tuple[Baseline, Baseline | None]:
    """Return the task's trivial baseline and the stronger one, once a process: some are computed
    over whole sets.
    """
    key = _json([config.protocol, config.task.model_dump(mode="json")])
    if key not in _BASELINES:
        task = config.task
        _BASELINES[key] = task.baseline(config.protocol), task.stronger_baseline(config.protocol)
    return _BASELINES[key]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
