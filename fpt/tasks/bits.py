"""The two bit tasks of the paper (section 3.1): Bit Memory and Bit XOR."""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from fpt import random_streams
from fpt.spec import JSON
from fpt.tasks.base import (
    FIXED_SET_SEED,
    Baseline,
    Batch,
    Generated,
    ProtocolName,
    Shape,
    Splits,
    Stored,
    Task,
)


class BitTask(Task):
    """What the two have in common: unlimited generated examples and fixed evaluation sets."""

    examples: int = Field(default=0, ge=0)
    """Examples in the fixed validation set and in the fixed test set (protocol sound). 0: as many
    as make 10,000 bits."""

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """`size` fresh examples."""
        raise NotImplementedError

    def splits(self, protocol: ProtocolName) -> Splits:
        """Fresh examples to train on; under `sound`, fixed and seeded sets to evaluate on."""
        source = Generated(self.draw)
        if protocol == "paper":
            return Splits(train=source, test=source)
        return Splits(train=source, validation=self._fixed(0), test=self._fixed(1))

    def identity(self) -> JSON:
        """The parameters, with the size of the fixed sets written out."""
        return super().identity() | {"examples": self._size}

    def test_examples(self) -> int:
        """Return the examples of the fixed test set."""
        return self._size

    @property
    def _size(self) -> int:
        return self.examples or -(-10_000 // self.shape("sound").positions)

    def _fixed(self, number: int) -> Stored:
        # 0: the validation set, 1: the test set.
        rng = random_streams.generator(FIXED_SET_SEED, random_streams.SPLIT, number)
        return Stored(self.draw(rng, self._size))


class BitMemory(BitTask):
    """Bit Memory: recall a string of bits of which half is masked.

    `strings` random strings of `bits` bits (+1 or -1) are shown, then one of them again with each
    bit masked to 0 with probability one half; its bits are to be told. A string is cut into patches
    of `patch` bits, a token each. Read out at the last string's tokens, two logits a bit.
    Accuracy: fraction of bits right. Copying what is visible and guessing the rest gives 75 %.
    """

    name: Literal["bit-memory"] = "bit-memory"
    strings: int = Field(default=5, ge=1)
    """Strings to remember."""
    bits: int = Field(default=1000, ge=1)
    """Bits of a string."""
    patch: int = Field(default=50, ge=1)
    """Bits of a token; divides `bits`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.bits % self.patch:
            raise ValueError(f"bits {self.bits} is not a multiple of patch {self.patch}")
        return self

    def shape(self, protocol: ProtocolName) -> Shape:
        """The paper's defaults: 120 tokens of 50, the last 20 of them read."""
        patches = self.bits // self.patch
        return Shape(
            tokens=(self.strings + 1) * patches,
            inputs=self.patch,
            embedded=False,
            classes=2,
            readout=patches,
            outputs=self.patch,
        )

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """`size` fresh examples."""
        strings = rng.integers(0, 2, (size, self.strings, self.bits), dtype=np.int8)
        asked = strings[np.arange(size), rng.integers(0, self.strings, size)]
        visible = rng.integers(0, 2, asked.shape, dtype=np.int8)
        signs = np.concatenate([2 * strings - 1, ((2 * asked - 1) * visible)[:, None]], axis=1)
        inputs = signs.reshape(size, -1, self.patch).astype(np.float32)
        return Batch(inputs, asked.astype(np.int64))

    def baseline(self, protocol: ProtocolName) -> Baseline:
        """Copy the visible half and guess +1 elsewhere, on the fixed test set."""
        batch = self._fixed(1).examples
        shown = batch.inputs.reshape(len(batch), self.strings + 1, self.bits)[:, -1]
        guess = np.where(shown == 0, 1, shown) > 0
        return Baseline(
            float((guess == batch.targets).mean()), "copy what is visible, guess the rest"
        )


class BitXor(BitTask):
    """Bit XOR: two random strings of bits (0 or 1), one bit a token; tell their elementwise XOR.

    Read out at the second string's tokens, two logits each. Accuracy: fraction of bits right;
    guessing gives 50 %.
    """

    name: Literal["bit-xor"] = "bit-xor"
    bits: int = Field(default=5, ge=1)
    """Bits of a string."""

    def shape(self, protocol: ProtocolName) -> Shape:
        """The paper's defaults: 10 tokens of 1, the last 5 of them read."""
        return Shape(tokens=2 * self.bits, inputs=1, embedded=False, classes=2, readout=self.bits)

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """`size` fresh examples."""
        strings = rng.integers(0, 2, (size, 2, self.bits), dtype=np.int8)
        inputs = strings.reshape(size, 2 * self.bits, 1).astype(np.float32)
        return Batch(inputs, (strings[:, 0] ^ strings[:, 1]).astype(np.int64))

    def baseline(self, protocol: ProtocolName) -> Baseline:
        """The more frequent answer, on the fixed test set."""
        batch = self._fixed(1).examples
        ones = float(batch.targets.mean())
        return Baseline(max(ones, 1 - ones), "the more frequent bit")
