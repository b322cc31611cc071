"""A machine with nothing of earlier tests on it, and a way to say how it went."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.chaos import machine


@pytest.fixture(autouse=True, scope="module")
def machine_is_clean() -> Iterator[None]:
    with machine.clean():
        yield


@pytest.fixture
def tell(capfd: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Say something at once, whatever pytest keeps to itself."""
    began = time.monotonic()

    def say(text: str) -> None:
        with capfd.disabled():
            sys.stdout.write(f"{time.monotonic() - began:6.0f} s: {text}\n")
            sys.stdout.flush()

    return say
