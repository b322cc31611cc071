"""What several tests need: small backbones, and rows of the ledger as a worker would write them."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

from fpt.backbones import AUTO, BACKBONES
from sweep.sweepfile.identity import IDENTITY_VERSION
from sweep.sweepfile.trials import Point

TABLE = [name for name in BACKBONES if name != AUTO]
"""The backbones that need no file."""

PACKED = [name for name in TABLE if BACKBONES[name].packs]
"""Those whose trials can train side by side."""

STARTED = dt.datetime(2026, 11, 20, 12, 0, 0, tzinfo=dt.UTC)


def small(name: str) -> dict[str, Any]:
    """A backbone of two layers of 32."""
    heads = BACKBONES[name].sizes["tiny"].heads
    return {"name": name, "layers": 2, "width": 32, "heads": min(2, heads)}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def trial_row(point: Point, **overrides: Any) -> dict[str, Any]:
    """A complete row of `trials` for a point that is done, but for `overrides`."""
    config, identity = point.config, point.config.identity()
    parameters = {k: v for k, v in identity["task"].items() if k not in ("name", "version")}
    row: dict[str, Any] = {
        "trial_id": point.trial_id,
        "cell_id": point.cell_id,
        "identity_version": IDENTITY_VERSION,
        "task_version": config.task.version,
        "config": _text(identity),
        "task": config.task.name,
        "task_parameters": _text(parameters),
        "backbone": config.backbone.name,
        "layers": config.backbone.layers,
        "width": config.backbone.width,
        "heads": config.backbone.heads,
        "weights": identity["backbone"]["weights"],
        "initialiser": identity["backbone"]["initialiser"],
        "pretraining": config.pretraining,
        "backbone_seed": identity["backbone_seed"],
        "train": "+".join(config.train),
        "optimizer": _text(identity["optimizer"]),
        "learning_rate": config.learning_rate,
        "batch_size": config.batch_size,
        "steps": config.steps,
        "stop": None if config.stop is None else _text(identity["stop"]),
        "dropout": config.dropout,
        "numerics": config.numerics,
        "protocol": config.protocol,
        "evaluate_every": config.evaluation.every,
        "seed": config.seed,
        "outcome": "done",
        "stopped": "steps",
        "steps_trained": config.steps,
        "best_step": config.steps,
        "train_loss": 0.25,
        "train_accuracy": 0.75,
        "training_set_loss": None,
        "training_set_accuracy": None,
        "validation_loss": 0.5,
        "validation_accuracy": 0.625,
        "test_loss": 0.5,
        "test_accuracy": 0.5,
        "baseline_accuracy": 0.5,
        "baseline_rule": "guess",
        "seconds": 1.5,
        "examples": config.steps * config.batch_size,
        "pack_size": 1,
        "accumulation": 1,
        "row_padding": 16,
        "attempts": 1,
        "attempt": "a1",
        "extended_from": None,
        "parameters": 1000,
        "parameters_trained": 100,
        "groups": _text({"norm": {"tensors": 2, "parameters": 100, "trained": 100}}),
        "backbone_digest": "0" * 64,
        "data_digest": None,
        "own_code": None,
        "git_commit": None,
        "git_dirty": None,
        "version": "0.1.0",
        "versions": _text({"python": "3.11"}),
        "host": "host",
        "device": "cpu",
        "device_name": "a processor",
        "started_at": STARTED,
        "finished_at": STARTED + dt.timedelta(seconds=2),
    }
    return row | overrides


def failure_row(point: Point, **overrides: Any) -> dict[str, Any]:
    """A complete row of `failures` for a point whose code raised an exception."""
    row: dict[str, Any] = {
        "trial_id": point.trial_id,
        "attempt": "a1",
        "cause": "code",
        "exception": "OverflowError",
        "message": "too large",
        "traceback": "Traceback (most recent call last): ...",
        "config": _text(point.config.identity()),
        "step": 10,
        "host": "host",
        "node": None,
        "device": "cpu",
        "seconds": 1.0,
        "lost": 0.0,
        "pack_size": 1,
        "accumulation": 1,
        "at": STARTED,
    }
    return row | overrides
