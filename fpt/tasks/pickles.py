"""Pickles that hold data, read as data: nothing that they name is imported or called.

A pickle can name any function, to be called when it is read. What data sets need is plain values,
and numpy's arrays and numbers; for the few names that those are written with there are stand-ins
here, which do no more than keep what they are given, and any other name is refused.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, Literal

import numpy as np


def loads(content: bytes, encoding: Literal["ASCII", "bytes"] = "ASCII") -> Any:
    """None, numbers, text, bytes, and lists, tuples, sets and dicts of these; an array comes as an
    object that `np.asarray` makes an array of numbers from.

    Args:
        content: The pickle.
        encoding: What the strings of Python 2 are: text, or bytes (arrays are among them).

    Raises:
        ValueError: If it is no whole pickle, or holds anything else.
    """
    try:
        return _Unpickler(io.BytesIO(content), encoding=encoding).load()
    except Exception as error:  # what is cut off or damaged may raise nearly anything
        raise ValueError(f"not a pickle of plain values ({error})") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        # Newer numpy and older Python say the same by other names.
        known = module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins")
        stand_in = _STAND_INS.get((known, name))
        if stand_in is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no data")
        return stand_in


class _Kind:
    """Stands for a data type: not one of numpy's, whose state would tell it to follow pointers."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else code
        self.order: Any = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]

    def read(self, content: bytes | bytearray) -> np.ndarray:
        """All numbers of a run of bytes.

        Raises:
            ValueError: If this is no kind of number.
        """
        if self.code[:1] not in tuple("biuf"):
            raise ValueError(f"an array of {self.code!r} holds more than numbers")
        return np.frombuffer(content, np.dtype(self.code).newbyteorder(self.order))


class _Array:
    """Stands for an array, or for the class of arrays."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        _, shape, kind, by_column, content = self.state
        array = kind.read(content).reshape(shape, order="F" if by_column else "C")
        return np.array(array, dtype=dtype)


def _array(content: bytes, kind: _Kind, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", content))
    return array


def _number(kind: _Kind, content: bytes) -> Any:
    (value,) = kind.read(content).tolist()
    return value


def _latin(text: str, encoding: str) -> bytes:
    return text.encode("latin-1")


def _no_bytes() -> bytes:
    return b""


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _number,
    ("numpy.core.numeric", "_frombuffer"): _array,
    ("_codecs", "encode"): _latin,
    ("builtins", "bytes"): _no_bytes,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}
