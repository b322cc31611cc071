"""Pickles of data are read, others are refused, and nothing that they name runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpt.tasks import pickles

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=10,
)


@given(
    value=plain | st.binary() | st.sets(st.integers()) | st.frozensets(st.text()),
    protocol=st.integers(2, pickle.HIGHEST_PROTOCOL),
)
def test_plain_values_are_what_pickle_makes_of_them(value: Any, protocol: int) -> None:
    assert pickles.loads(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.uint8).reshape(2, 3),
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([True, False]),
        np.zeros((0, 4), np.float32),
        np.array(7),
    ],
    ids=str,
)
def test_arrays_come_back(array: np.ndarray, protocol: int) -> None:
    read = np.asarray(pickles.loads(pickle.dumps({"here": array}, protocol))["here"])

    assert read.dtype == array.dtype
    assert np.array_equal(read, array)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("number", [np.int64(-3), np.uint16(1194), np.float32(0.5), np.bool_(1)])
def test_numbers_of_numpys_are_numbers(number: Any, protocol: int) -> None:
    read = pickles.loads(pickle.dumps(number, protocol))

    assert type(read) is type(number.item())
    assert read == number


def test_names_of_older_and_newer_numpy_are_known() -> None:
    new = pickle.dumps(np.arange(3), 2)
    old = new.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")

    assert old != new
    assert np.asarray(pickles.loads(old)).tolist() == [0, 1, 2]


class Runs:
    """Is pickled as a call of any function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        function, *arguments = self.call
        return function, tuple(arguments)


def test_nothing_that_is_named_runs(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    for call in (
        (os.system, f"touch {touched}"),
        (open, str(touched), "w"),
        (eval, "1"),
        (bytes, 9),
    ):
        with pytest.raises(ValueError, match="not a pickle of plain values"):
            pickles.loads(pickle.dumps([1, Runs(*call)]))

    assert not touched.exists()


def test_an_array_of_objects_is_refused() -> None:
    # With a crafted state numpy would take its bytes for pointers.
    read = pickles.loads(pickle.dumps(np.array(["a", None], dtype=object)))
    with pytest.raises(ValueError, match="holds more than numbers"):
        np.asarray(read)


@given(cut=st.integers(0, 200))
def test_half_a_pickle_is_none(cut: int) -> None:
    whole = pickle.dumps({"primary": "ACDE" * 50, "profile": np.arange(90)})
    with pytest.raises(ValueError, match="not a pickle of plain values"):
        pickles.loads(whole[:cut])


@given(content=st.binary())
def test_noise_does_no_harm(content: bytes) -> None:
    try:
        pickles.loads(content)
    except ValueError as error:
        assert "not a pickle" in str(error)  # noqa: PT017 (noise may be a pickle, by chance)
