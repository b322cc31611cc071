"""Metrics that a task declares beside its loss: functions of numpy arrays, over a whole split.

A row is a token that is read out and is no padding; K predictions a row, C classes. Of a task of
classes, outputs are (rows, K, C) logits and targets (rows, K) classes; of loss mse, both are
(rows, K) numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fpt.files import DataError

SPLITS = ("validation", "test", "training_set")
"""What is measured whole: `test_r2` is the metric r2 on the split test."""

_TAKEN = ("loss", "accuracy", "rule")
# Every trial has these of its own.


@dataclass(frozen=True)
class Metric:
    """A figure of a task's own.

    Raises:
        ValueError: If a field is not what it says.
    """

    name: str
    """Lower-case letters, digits and underscores: `r2` is stored as `validation_r2`, `test_r2`."""
    function: Callable[[np.ndarray, np.ndarray], float]
    """(outputs, targets) of all rows of a split -> a number. What is not finite counts as none."""
    better: Literal["higher", "lower"] = "higher"
    """Which of two figures is the better one."""
    unit: str = ""
    """What the number is in, for tables and figures: "", "mm", "per cent"."""

    def __post_init__(self) -> None:
        where = f"Metric {self.name!r}"
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"{where}: name is no word of lower-case letters, digits and _")
        if self.name in _TAKEN:
            raise ValueError(f"{where}: every trial has {self.name} already; choose another name")
        if not callable(self.function):
            raise ValueError(f"{where}: function is {self.function!r}, wanted a function")
        if self.better not in ("higher", "lower"):
            raise ValueError(f"{where}: better is {self.better!r}, wanted higher or lower")
        if not isinstance(self.unit, str):
            raise ValueError(f"{where}: unit is {self.unit!r}, wanted text")


def measured(
    metrics: Sequence[Metric], outputs: np.ndarray, targets: np.ndarray
) -> dict[str, float | None]:
    """Return each metric's figure, by its name; None where it is not finite.

    Raises:
        DataError: If a function raises, or gives no number.
    """
    found: dict[str, float | None] = {}
    for metric in metrics:
        try:
            value = float(metric.function(outputs, targets))
        except Exception as error:
            raise DataError(
                f"metric {metric.name}: its function raises {type(error).__name__}: {error}"
            ) from error
        found[metric.name] = value if math.isfinite(value) else None
    return found


def on_split(split: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures by the names that they have in a row: {"test_r2": 0.9}."""
    return {f"{split}_{name}": value for name, value in found.items()}


# ------------------------------------------------------------------------------- of loss mse


def _r2(outputs: np.ndarray, targets: np.ndarray) -> float:
    from sklearn.metrics import r2_score

    if len(targets) < 2:
        return math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(r2_score(targets, outputs, force_finite=False))


def _mae(outputs: np.ndarray, targets: np.ndarray) -> float:
    return float(np.abs(targets.astype(np.float64) - outputs).mean())


def _rmse(outputs: np.ndarray, targets: np.ndarray) -> float:
    return float(np.sqrt(((targets.astype(np.float64) - outputs) ** 2).mean()))


R2 = Metric("r2", _r2)
"""The part of the variance that is explained, a mean over the K predictions; none where targets do
not vary."""

MAE = Metric("mae", _mae, "lower")
"""Mean absolute error, in the unit of the targets."""

RMSE = Metric("rmse", _rmse, "lower")
"""Root of the mean squared error, in the unit of the targets."""


# -------------------------------------------------------------------------------- of classes


def _token_accuracy(outputs: np.ndarray, targets: np.ndarray) -> float:
    return float((outputs.argmax(-1) == targets).mean())


def _f1(outputs: np.ndarray, targets: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    guesses = outputs.argmax(-1).ravel()
    return float(f1_score(targets.ravel(), guesses, average="macro", zero_division=0.0))


def _auroc(outputs: np.ndarray, targets: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    if outputs.shape[-1] != 2:
        raise ValueError(f"it is of two classes, and there are {outputs.shape[-1]}")
    scores = (outputs[..., 1].astype(np.float64) - outputs[..., 0]).ravel()
    positive = targets.ravel() == 1
    if positive.all() or not positive.any():
        return math.nan
    return float(roc_auc_score(positive, scores))


TOKEN_ACCURACY = Metric("token_accuracy", _token_accuracy)
"""The fraction of predictions that are right; of every token that is no padding, where all are read
out."""

F1 = Metric("f1", _f1)
"""The mean over classes (those of which there are targets or guesses) of F1, the harmonic mean of
precision and recall."""

AUROC = Metric("auroc", _auroc)
"""The probability that a random example of class 1 scores above one of class 0, ties half; of two
classes. None where a split has one class only."""
