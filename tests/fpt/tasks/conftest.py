"""Small examples of every task, over data that is made up here."""

from __future__ import annotations

import gzip
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from fpt.tasks import TASKS, Task

# A busy machine is slow, and that is no fault.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

Make = Callable[[Path], Task]
"""A folder to make data in -> a task."""


def _write_idx(folder: Path, *, train: int = 240, test: int = 60, zipped: bool = False) -> Path:
    """The four idx files, of noise with a bright row that tells the label."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    for split, size in (("train", train), ("t10k", test)):
        labels = rng.integers(0, 10, size, dtype=np.uint8)
        images = rng.integers(0, 100, (size, 28, 28), dtype=np.uint8)
        images[np.arange(size), 2 * labels.astype(int)] += 30
        files = {
            f"{split}-images-idx3-ubyte": struct.pack(">IIII", 2051, size, 28, 28)
            + images.tobytes(),
            f"{split}-labels-idx1-ubyte": struct.pack(">II", 2049, size) + labels.tobytes(),
        }
        for name, content in files.items():
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
            else:
                (folder / name).write_bytes(content)
    return folder


def _photographs(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Colour images of noise with a bright row that tells the label, and the labels."""
    labels = rng.integers(0, 10, size, dtype=np.uint8)
    images = rng.integers(0, 200, (size, 32, 32, 3), dtype=np.uint8)
    images[np.arange(size), 3 * labels.astype(int)] += 20
    return images, labels


def _write_batches(folder: Path, *, each: int = 48, protocol: int = 2) -> Path:
    """CIFAR-10's python batches, as many images in each of the six."""
    inner = folder / "cifar-10-batches-py"
    inner.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(9)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        images, labels = _photographs(rng, each)
        content = {
            b"batch_label": name.encode(),
            b"labels": labels.tolist(),
            b"data": images.transpose(0, 3, 1, 2).reshape(each, -1),
            b"filenames": [f"{name}_{row}.png".encode() for row in range(each)],
        }
        (inner / name).write_bytes(pickle.dumps(content, protocol=protocol))
    return folder


def _write_npz(folder: Path, *, train: int = 240, test: int = 60) -> Path:
    """An npz of colour images."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(9)
    x_train, y_train = _photographs(rng, train)
    x_test, y_test = _photographs(rng, test)
    np.savez(
        folder / "photographs.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test
    )
    return folder


def _write_text(folder: Path) -> Path:
    """Three files of made-up words, one of which is not text by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(8)
    words = np.array(["frozen ", "weights ", "keep ", "their ", "shape.\n"])
    for name in ("one.txt", "two.md", "three.json"):
        (folder / name).write_text("".join(rng.choice(words, 800)))
    return folder


def _write_proteins(
    folder: Path,
    *,
    sizes: tuple[int, int, int] = (240, 80, 60),
    long: tuple[int, int, int] = (4, 0, 2),
    names: tuple[str, str, str] = ("train.csv", "valid.csv", "test.csv"),
    columns: str = "seq,label",
) -> Path:
    """Three csv files of made-up proteins, some with 30 residues, the others with 3 to 18, many of
    which are that of their fold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(10)
    for name, size, more in zip(names, sizes, long, strict=True):
        lines = [columns]
        for row in range(size):
            fold = int(rng.choice([7, 300, 300, 1194]))
            letters = rng.choice([*"ACDEFGHIKLMNPQRSTVWY", *("WCH"[fold % 3] * 10)], 30)
            length = 30 if row < more else int(rng.integers(3, 19))
            lines.append(f"{''.join(letters[:length])},{fold}")
        (folder / name).write_text("\r\n".join([*lines, ""]))
    return folder


@pytest.fixture(scope="session")
def write_idx() -> Callable[..., Path]:
    """Writes the four idx files into a folder, and gives it back."""
    return _write_idx


@pytest.fixture(scope="session")
def write_batches() -> Callable[..., Path]:
    """Writes CIFAR-10's python batches into a folder, and gives it back."""
    return _write_batches


@pytest.fixture(scope="session")
def write_npz() -> Callable[..., Path]:
    """Writes an npz of colour images into a folder, and gives it back."""
    return _write_npz


@pytest.fixture(scope="session")
def write_proteins() -> Callable[..., Path]:
    """Writes csv files of proteins into a folder, and gives it back."""
    return _write_proteins


@pytest.fixture(scope="session")
def examples() -> dict[str, Make]:
    """What makes a small task, for every task."""
    return {
        "bit-memory": lambda folder: TASKS["bit-memory"](strings=3, bits=20, patch=5),
        "bit-xor": lambda folder: TASKS["bit-xor"](bits=5),
        "listops": lambda folder: TASKS["listops"](
            min_length=3, max_length=24, train=600, validation=80, test=90
        ),
        "mnist": lambda folder: TASKS["mnist"](folder=_write_idx(folder / "mnist"), validation=40),
        "cifar10": lambda folder: TASKS["cifar10"](
            folder=_write_batches(folder / "cifar10"), validation=40
        ),
        "cifar10-lra": lambda folder: TASKS["cifar10-lra"](
            folder=_write_npz(folder / "cifar10"), validation=40
        ),
        "remote-homology": lambda folder: TASKS["remote-homology"](
            folder=_write_proteins(folder / "proteins"), subset=True, tokens=24
        ),
        "digits": lambda folder: TASKS["digits"](),
        "text": lambda folder: TASKS["text"](path=_write_text(folder / "text"), tokens=16),
    }


@pytest.fixture(params=TASKS)
def make(request: pytest.FixtureRequest, examples: dict[str, Make]) -> Make:
    """One task after another: what makes it."""
    return examples[request.param]


@pytest.fixture
def task(make: Make, tmp_path: Path) -> Task:
    """One task after another."""
    return make(tmp_path)
