"""Next-token prediction over the bytes of text: what a language backbone is pretrained on.

A token is a byte. The first part of each file is trained on; of the rest, the first half validates
and the second half tests. Training draws windows at random; the evaluation sets are cut into
windows side by side, so that each byte is predicted once (but for a last one that is not whole).
A loss in nats, divided by ln 2, is in bits per byte.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from fpt import random_streams
from fpt.files import DataError, content_digest
from fpt.spec import JSON, DataPath
from fpt.tasks.base import (
    Baseline,
    Batch,
    ProtocolName,
    Shape,
    Splits,
    Stored,
    Task,
)

BYTES = 256
SUFFIXES = (".md", ".txt")
"""The files of a folder that are text."""


class Text(Task):
    """Predict each next byte of a text. For causal backbones alone: others would see the answer.

    The protocol paper has no validation split, as elsewhere; nothing else differs.
    """

    name: Literal["text"] = "text"
    path: DataPath
    """A text file, or a folder whose *.txt and *.md are read (folders in it are not)."""
    tokens: int = Field(default=128, ge=1)
    """Bytes of a window: the context of its last prediction."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Fraction of each file, at its end, that is not trained on."""
    digest: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """What the text's digest has to be. With it a sweep can be planned where the text is not."""

    def shape(self, protocol: ProtocolName) -> Shape:
        """Every token is read out."""
        return Shape(
            tokens=self.tokens,
            inputs=BYTES,
            embedded=True,
            classes=BYTES,
            readout=self.tokens,
            causal=True,
        )

    def splits(self, protocol: ProtocolName) -> Splits:
        """Random windows to train on, whole sets to evaluate on.

        Raises:
            DataError: If there is no text, too little of it, or another one than `digest` says.
        """
        digest = self._found()
        parts = _parts(self, digest)
        return Splits(
            train=Windows(parts.train, self.tokens),
            validation=self._stored(parts.validation) if protocol == "sound" else None,
            test=self._stored(parts.test),
            digest=digest,
        )

    def baseline(self, protocol: ProtocolName) -> Baseline:
        """Always the byte that is most frequent in the training part."""
        parts = _parts(self, self._found())
        guess = np.bincount(parts.train, minlength=BYTES).argmax()
        targets = self._stored(parts.test).examples.targets
        return Baseline(float((targets == guess).mean()), "always the most frequent byte")

    def unigram_bits(self) -> float:
        """Bits per byte of the test split under the byte frequencies of the training part.

        Each frequency counts one more than was seen, since the test may hold a byte that was not.
        """
        parts = _parts(self, self._found())
        counts = np.bincount(parts.train, minlength=BYTES) + 1
        targets = self._stored(parts.test).examples.targets
        nats = -np.log(counts / counts.sum())[targets]
        return float(nats.mean() / math.log(2))

    def identity(self) -> JSON:
        """The parameters, with the text's digest: as given, else of what is there."""
        digest = self.digest or content_digest(_files(self.path))
        # Not the base's, which reads the path: with a digest the text need not be here.
        return self.model_dump(mode="json") | {"path": f"sha256:{digest}", "digest": None}

    def _found(self) -> str:
        found = content_digest(_files(self.path))
        if self.digest not in (None, found):
            raise DataError(
                f"{self.path}: the text's digest is {found}, but {self.digest} was asked for; give "
                "the path of that text, or take the digest out to use this one"
            )
        return found

    def _stored(self, part: np.ndarray) -> Stored:
        size = self.tokens * ((len(part) - 1) // self.tokens)
        inputs, targets = part[:size], part[1 : size + 1]
        return Stored(Batch(inputs.reshape(-1, self.tokens), targets.reshape(-1, self.tokens)))


@dataclass(frozen=True)
class _Parts:
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


@dataclass(frozen=True, eq=False)
class Windows:
    """Random windows of a text, drawn anew at every step."""

    text: np.ndarray
    """(N,) uint8."""
    tokens: int
    """Of a window, less than N."""

    def starts(self, seed: int, stream: int, step: int, size: int) -> np.ndarray:
        """Return (size,) int64: where in the text the windows of a step begin."""
        rng = random_streams.generator(seed, stream, step)
        starts: np.ndarray = rng.integers(0, len(self.text) - self.tokens, size)
        return starts

    def batch(self, seed: int, stream: int, step: int, size: int) -> Batch:
        """Return the windows of a step, each byte to be told from those before it."""
        starts = self.starts(seed, stream, step, size)
        windows = self.text[starts[:, None] + np.arange(self.tokens + 1)].astype(np.int64)
        return Batch(windows[:, :-1], windows[:, 1:])


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; set path to the text")
    files = sorted(
        file
        for file in path.iterdir()
        if file.suffix in SUFFIXES and file.is_file() and not file.name.startswith(".")
    )
    if not files:
        raise DataError(f"{path}: holds no text (*.txt, *.md); set path to a folder that does")
    return files


# Kept: the trials of a process share the text. The digest is there to notice that it has changed.
@functools.lru_cache(maxsize=4)
def _parts(task: Text, digest: str) -> _Parts:
    parts: list[list[np.ndarray]] = [[], [], []]
    for file in _files(task.path):
        text = np.frombuffer(file.read_bytes(), dtype=np.uint8)
        held_out = round(len(text) * task.held_out)
        start = len(text) - held_out
        pieces = np.split(text, [start, start + held_out // 2])
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    joined = [np.concatenate(part) for part in parts]
    for name, text in zip(("training", "validation", "test"), joined, strict=True):
        if len(text) <= task.tokens:
            raise DataError(
                f"{task.path}: too little text: {len(text):,} bytes for {name}, where a window "
                f"takes {task.tokens + 1:,}; give more text, fewer tokens or another held_out"
            )
    return _Parts(*joined)
