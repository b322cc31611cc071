"""What several tests need: small backbones, and rows of the ledger as a worker would write them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from fpt.backbones import AUTO, BACKBONES
from sweep.execution.job import Job, Reporter
from sweep.ledger.causes import Halt
from sweep.ledger.columns import FAILURES, TRIALS, compact, config_row
from sweep.ledger.ledger import new_attempt
from sweep.sweepfile.identity import IDENTITY_VERSION
from sweep.sweepfile.trials import Point

if TYPE_CHECKING:
    from fpt.trainer import Outcome, Training

TABLE = [name for name in BACKBONES if name != AUTO]
"""The backbones that need no file."""

PACKED = [name for name in TABLE if BACKBONES[name].packs]
"""Those whose trials can train side by side."""

DRAWN = [name for name in PACKED if BACKBONES[name].packs_draws]
"""Those of which each member can have a draw of its own."""

STARTED = dt.datetime(2026, 11, 20, 12, 0, 0, tzinfo=dt.UTC)


class Said(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


Command = Callable[..., Said]
"""The command line, called with its words."""


def end(training: Training) -> dict[int, Outcome]:
    """Train to the end, and return how each member ended."""
    list(training)
    return training.outcomes


def assert_same(one: Outcome, other: Outcome) -> None:
    """Two trials ended alike, to the bit."""
    assert one.state.tensors.keys() == other.state.tensors.keys()
    for name, tensor in one.state.tensors.items():
        assert tensor.equal(other.state.tensors[name]), name
    for figure in (
        "backbone_digest", "outcome", "steps", "test_loss", "test_accuracy", "validation_loss",
        "train_loss", "best_step",
    ):  # fmt: skip
        assert getattr(one, figure) == getattr(other, figure), figure


def small(name: str) -> dict[str, Any]:
    """A backbone of two layers of 32."""
    heads = BACKBONES[name].sizes["tiny"].heads
    return {"name": name, "layers": 2, "width": 32, "heads": min(2, heads)}


def job(*points: Point, **options: Any) -> Job:
    """The first attempt at a pack, on a core."""
    fields = {"resources": {"CPU": 1}, "attempt": new_attempt()}
    return Job(points, attempts={p.trial_id: 1 for p in points}, **fields | options)


def signs(module: str, first: str = "") -> str:
    """A module with a task of a user's own, `MODULE:Signs`; to draw a batch it runs `first`."""
    return f"""
from typing import Literal

import numpy as np

from fpt import Baseline, Batch, Shape, Splits, Stored, Task


class Source:
    def batch(self, seed, stream, step, size):
        {first or "pass"}
        draws = np.random.default_rng([seed, step])
        inputs = draws.standard_normal((size, 4, 2), dtype=np.float32)
        return Batch(inputs, (inputs.sum((1, 2)) > 0).astype(np.int64)[:, None])


class Signs(Task):
    name: Literal["{module}:Signs"] = "{module}:Signs"

    def shape(self, protocol):
        return Shape(tokens=4, inputs=2, embedded=False, classes=2)

    def splits(self, protocol):
        held = [Stored(Source().batch(9, 0, step, 50)) for step in (0, 1)]
        return Splits(train=Source(), validation=held[0], test=held[1])

    def baseline(self, protocol):
        return Baseline(0.5, "guess")
"""


class Watching(Reporter):
    """Calls back with what an attempt reports."""

    def __init__(
        self,
        on_record: Callable[..., object] = lambda point, record: None,
        halted: Callable[[], Halt | None] = lambda: None,
        on_start: Callable[..., object] = lambda point, step: None,
    ) -> None:
        super().__init__()
        self._on_record, self._halted, self._on_start = on_record, halted, on_start

    def start(self, point: Point, step: int) -> None:
        self._on_start(point, step)

    def record(self, point: Point, record: Any) -> None:
        super().record(point, record)
        self._on_record(point, record)

    def halted(self) -> Halt | None:
        return self._halted()


def trial_row(point: Point, **overrides: Any) -> dict[str, Any]:
    """A row of `trials` for a point that is done, but for `overrides`; other columns are null."""
    config = point.config
    values: dict[str, Any] = {
        **config_row(config),
        "trial_id": point.trial_id,
        "cell_id": point.cell_id,
        "identity_version": IDENTITY_VERSION,
        "task_version": config.task.version,
        "outcome": "done",
        "stopped": "steps",
        "steps_trained": config.steps,
        "best_step": config.steps,
        "train_loss": 0.25,
        "train_accuracy": 0.75,
        "validation_loss": 0.5,
        "validation_accuracy": 0.625,
        "test_loss": 0.5,
        "test_accuracy": 0.5,
        "baseline_accuracy": 0.5,
        "baseline_rule": "guess",
        "seconds": 1.5,
        "cpu_seconds": overrides.get("seconds", 1.5),
        "examples": config.steps * config.batch_size,
        "pack_size": 1,
        "accumulation": 1,
        "row_padding": 16,
        "attempts": 1,
        "attempt": "a1",
        "parameters": 1000,
        "parameters_trained": 100,
        "groups": compact({"norm": {"tensors": 2, "parameters": 100, "trained": 100}}),
        "backbone_digest": "0" * 64,
        "version": "0.1.0",
        "versions": compact({"python": "3.11"}),
        "host": "host",
        "device": "cpu",
        "device_name": "a processor",
        "started_at": STARTED,
        "finished_at": STARTED + dt.timedelta(seconds=2),
    }
    return {one.name: values.get(one.name) for one in TRIALS} | overrides


def failure_row(point: Point, **overrides: Any) -> dict[str, Any]:
    """A complete row of `failures` for a point whose code raised an exception."""
    values: dict[str, Any] = {
        "trial_id": point.trial_id,
        "attempt": "a1",
        "cause": "code",
        "exception": "OverflowError",
        "message": "too large",
        "traceback": "Traceback (most recent call last): ...",
        "config": compact(point.config.identity()),
        "step": 10,
        "host": "host",
        "device": "cpu",
        "seconds": 1.0,
        "lost": 0.0,
        "pack_size": 1,
        "accumulation": 1,
        "at": STARTED,
    }
    return {one.name: values.get(one.name) for one in FAILURES} | overrides
