"""The science: configs, tasks, backbones and the one trainer.

`import fpt` costs nothing: a name's module is imported when the name is first used, so that configs
can be read where torch is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fpt import metrics
    from fpt.checkpoints import load_model
    from fpt.config import TrialConfig
    from fpt.contract import check_backbone, check_task
    from fpt.metrics import Metric
    from fpt.model import build_model
    from fpt.tasks.base import Baseline, Batch, Generated, Shape, Splits, Stored, Task
    from fpt.trainer import train

__all__ = [
    "Baseline",
    "Batch",
    "Generated",
    "Metric",
    "Shape",
    "Splits",
    "Stored",
    "Task",
    "TrialConfig",
    "build_model",
    "check_backbone",
    "check_task",
    "load_model",
    "metrics",
    "train",
]

_HOME = {
    "Baseline": "fpt.tasks.base",
    "Batch": "fpt.tasks.base",
    "Generated": "fpt.tasks.base",
    "Metric": "fpt.metrics",
    "Shape": "fpt.tasks.base",
    "Splits": "fpt.tasks.base",
    "Stored": "fpt.tasks.base",
    "Task": "fpt.tasks.base",
    "TrialConfig": "fpt.config",
    "build_model": "fpt.model",
    "check_backbone": "fpt.contract",
    "check_task": "fpt.contract",
    "load_model": "fpt.checkpoints",
    "train": "fpt.trainer",
}


def __getattr__(name: str) -> object:
    if name == "metrics":
        return import_module("fpt.metrics")
    if name not in _HOME:
        raise AttributeError(f"module 'fpt' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
