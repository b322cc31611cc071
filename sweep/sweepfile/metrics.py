"""What a table, a claim or a tuning can be about: columns of every trial's row, one that is worked
out from its curve, and the metrics that a task declares.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from fpt.config import TrialConfig
from fpt.metrics import SPLITS, Metric
from fpt.tasks import TASKS
from sweep.ledger.columns import FRACTION, TRIALS

CONVERGENCE = "steps_to_convergence"
"""The metric that is no column of a trial's row but is worked out from its curve."""

ACCURACIES = tuple(one.name for one in TRIALS if one.metric and one.unit == FRACTION)
"""Fractions of predictions that are right; tables print them per cent."""

METRICS = (
    *sorted((one.name for one in TRIALS if one.metric), key=lambda name: "test_" not in name),
    CONVERGENCE,
)
"""What every trial has, as messages list it: columns of its row, and CONVERGENCE."""

OWN = rf"^({'|'.join(SPLITS)})_[a-z][a-z0-9_]*$"
"""The name of a metric that a task declares, on a split."""


def _is_metric(name: Any) -> Any:
    if name not in METRICS and not (isinstance(name, str) and re.match(OWN, name)):
        expected = ", ".join(map(repr, METRICS))
        raise PydanticCustomError("literal_error", "no such metric", {"expected": expected})
    return name


_SCHEMA = {"anyOf": [{"enum": list(METRICS)}, {"type": "string", "pattern": OWN}], "type": "string"}

MetricName = Annotated[str, BeforeValidator(_is_metric), Field(json_schema_extra=_SCHEMA)]
"""One of METRICS, or a metric of a task's own on a split: test_r2."""


def is_accuracy(metric: str) -> bool:
    """Whether a metric is a fraction of right predictions, which tables print per cent."""
    return metric in ACCURACIES


def declared(metric: str, config: TrialConfig) -> Metric | None:
    """Return what a trial's task says of a metric, such as test_r2; None: it has no such one."""
    if metric in METRICS:
        return None
    own = {one.name: one for one in config.task.metrics(config.protocol)}
    of = re.match(OWN, metric)
    return own.get(metric.removeprefix(f"{of[1]}_")) if of else None


def higher_is_better(metric: str, config: TrialConfig) -> bool:
    """Whether more of a metric is better, by which a trial may be chosen."""
    if (own := declared(metric, config)) is not None:
        return own.better == "higher"
    return is_accuracy(metric)


def unit(metric: str, config: TrialConfig) -> str:
    """What a table gives a metric in: per cent, nats, or "" for what is a mere number."""
    if (own := declared(metric, config)) is not None:
        return own.unit
    if is_accuracy(metric):
        return "per cent"
    if metric.endswith("_loss"):
        squared = config.task.shape(config.protocol).loss == "mse"
        return "squared error" if squared else "nats"
    return ""


def trivial(metric: str) -> str | None:
    """Return the column with the trivial baseline's figure of a metric: baseline_r2; None: no
    baseline has one.
    """
    if is_accuracy(metric):
        return "baseline_accuracy"
    of = re.match(OWN, metric)
    return f"baseline_{metric.removeprefix(f'{of[1]}_')}" if of else None


def allowed(configs: Iterable[TrialConfig]) -> tuple[str, ...]:
    """Return the metrics that trials of these configs have: at least one of them."""
    tasks = _by_task(configs)
    own = dict.fromkeys(
        f"{split}_{metric.name}"
        for one in tasks
        for metric in one.task.metrics(one.protocol)
        for split in SPLITS
    )
    classes = any(one.task.shape(one.protocol).loss != "mse" for one in tasks)
    return (*(name for name in METRICS if classes or not of_classes(name)), *own)


def of_classes(metric: str) -> bool:
    """Whether a metric is of tasks whose predictions are classes alone."""
    return is_accuracy(metric) or metric == CONVERGENCE


def _by_task(configs: Iterable[TrialConfig]) -> Collection[TrialConfig]:
    # One config of each task: of ours, parameters decide no metric.
    return {
        (one.task.name if one.task.name in TASKS else repr(one.task), one.protocol): one
        for one in configs
    }.values()


def clashes(configs: Iterable[TrialConfig]) -> Iterator[str]:
    """Yield what is wrong where two tasks mean two things by one metric."""
    seen: dict[str, tuple[str, Metric]] = {}
    for config in _by_task(configs):
        for metric in config.task.metrics(config.protocol):
            task, other = seen.setdefault(metric.name, (config.task.name, metric))
            if (other.better, other.unit) != (metric.better, metric.unit):
                yield (
                    f"metric {metric.name}: {task} and {config.task.name} differ in what is better "
                    "or in its unit; give one of them another name"
                )
