"""Metrics of tasks: against counts by hand."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpt.files import DataError
from fpt.metrics import AUROC, F1, MAE, R2, RMSE, TOKEN_ACCURACY, Metric, measured, on_split

RNG = np.random.default_rng(4)


def logits(rows: int, classes: int) -> np.ndarray:
    return RNG.integers(-2, 3, (rows, 1, classes)).astype(np.float32)


def test_of_numbers_the_metrics_are_what_they_say() -> None:
    outputs = RNG.standard_normal((40, 3), dtype=np.float32)
    targets = RNG.standard_normal((40, 3), dtype=np.float32) * 2 + 1

    found = measured((R2, MAE, RMSE), outputs, targets)

    errors = [
        [float(t) - float(o) for o, t in zip(*pair, strict=True)]
        for pair in zip(outputs, targets, strict=True)
    ]
    columns = list(zip(*errors, strict=True))
    parts = []
    for column, own in zip(columns, targets.T.astype(float), strict=True):
        mean = sum(own) / len(own)
        parts.append(1 - sum(e * e for e in column) / sum((y - mean) ** 2 for y in own))
    flat = [e for row in errors for e in row]
    assert found["r2"] == pytest.approx(sum(parts) / 3, rel=1e-6)
    assert found["mae"] == pytest.approx(sum(map(abs, flat)) / 120, rel=1e-6)
    assert found["rmse"] == pytest.approx(math.sqrt(sum(e * e for e in flat) / 120), rel=1e-6)


@given(st.integers(0, 2**31), st.integers(2, 30))
def test_auroc_counts_pairs(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    outputs = rng.integers(-2, 3, (rows, 1, 2)).astype(np.float32)
    targets = rng.integers(0, 2, (rows, 1))
    score = (outputs[..., 1] - outputs[..., 0]).ravel()
    first, second = score[targets.ravel() == 1], score[targets.ravel() == 0]
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(first, second)]

    (value,) = measured((AUROC,), outputs, targets).values()

    assert value == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)


@given(st.integers(0, 2**31), st.integers(2, 5))
def test_f1_is_the_mean_over_classes_that_are_there(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    outputs = rng.standard_normal((12, 1, classes)).astype(np.float32)
    targets = rng.integers(0, classes, (12, 1))
    guesses, truth = outputs.argmax(-1).ravel().tolist(), targets.ravel().tolist()
    each = []
    for one in sorted({*guesses, *truth}):
        right = sum(g == t == one for g, t in zip(guesses, truth, strict=True))
        each.append(2 * right / (guesses.count(one) + truth.count(one)))

    assert measured((F1,), outputs, targets)["f1"] == pytest.approx(sum(each) / len(each))


def test_what_is_not_finite_is_none() -> None:
    outputs, constant = np.ones((5, 1), np.float32), np.full((5, 1), 2, np.float32)
    one_class = np.ones((5, 1), np.int64)

    assert measured((R2,), outputs, constant) == {"r2": None}
    assert measured((R2,), outputs[:1], constant[:1]) == {"r2": None}
    assert measured((AUROC,), logits(5, 2), one_class) == {"auroc": None}


def test_token_accuracy_counts_every_prediction() -> None:
    outputs = np.eye(3, dtype=np.float32)[[[0, 1], [2, 2], [1, 0]]]

    assert measured((TOKEN_ACCURACY,), outputs, np.array([[0, 1], [2, 0], [0, 0]])) == {
        "token_accuracy": pytest.approx(4 / 6)
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "R2"}, "name is no word of lower-case letters"),
        ({"name": "r-2"}, "name is no word of lower-case letters"),
        ({"name": ""}, "name is no word"),
        ({"name": 3}, "name is no word"),
        ({"name": "accuracy"}, "every trial has accuracy already"),
        ({"name": "loss"}, "every trial has loss already"),
        ({"function": 0.3}, "function is 0.3, wanted a function"),
        ({"better": "more"}, "better is 'more', wanted higher or lower"),
        ({"unit": None}, "unit is None, wanted text"),
    ],
)
def test_a_metric_that_is_none_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Metric(**{"name": "own", "function": lambda outputs, targets: 0.0} | fields)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda outputs, targets: 1 / 0, "metric own: its function raises ZeroDivisionError"),
        (lambda outputs, targets: "much", "metric own: its function raises ValueError"),
        (lambda outputs: 0.0, "metric own: its function raises TypeError"),
    ],
)
def test_a_function_that_fails_is_named(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        measured((Metric("own", function),), np.ones((2, 1)), np.ones((2, 1)))


def test_figures_bear_the_name_of_their_split() -> None:
    assert on_split("test", {"r2": 0.5}) == {"test_r2": 0.5}
