"""The rows that a worker writes: of a trial that has ended, and of an attempt that failed."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Literal

from fpt.config import TrialConfig
from fpt.spec import JSON
from fpt.tasks.base import Baseline
from sweep.execution import output
from sweep.execution.job import Job
from sweep.ledger import columns, provenance
from sweep.ledger.causes import Cause
from sweep.ledger.columns import Ended, Failed, compact
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
    return columns.failure_row(
        Failed(
            trial_id=trial.point.trial_id,
            attempt=job.attempt,
            cause=cause,
            error=error,
            printed=output.tail(),
            config=trial.point.config,
            step=trial.step,
            node=job.node,
            device=job.device,
            seconds=trial.seconds,
            lost=max(0.0, trial.seconds - trial.saved),
            pack_size=len(job.points),
            accumulation=job.accumulation,
        )
    )


def trial_row(trial: Progress, outcome: Outcome, job: Job) -> JSON:
    """Return the row of a trial that has ended: a value for each column of `trials`."""
    point = trial.point
    baseline, stronger = _baselines(point.config)
    return columns.trial_row(
        Ended(
            trial_id=point.trial_id,
            cell_id=point.cell_id,
            identity_version=IDENTITY_VERSION,
            config=point.config,
            outcome=outcome,
            baseline=baseline,
            stronger=stronger,
            attempt=job.attempt,
            attempts=job.attempts[point.trial_id],
            pack_size=len(job.points),
            accumulation=job.accumulation,
            row_padding=trial.row_padding,
            extended_from=trial.extended_from,
            device=job.device,
            device_name=_model_of(job.device),
            started_at=trial.started_at,
            finished_at=trial.now(),
        )
    )


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
    key = compact([config.protocol, config.task.model_dump(mode="json")])
    if key not in _BASELINES:
        task = config.task
        _BASELINES[key] = task.baseline(config.protocol), task.stronger_baseline(config.protocol)
    return _BASELINES[key]
