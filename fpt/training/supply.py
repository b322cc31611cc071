"""What a step's batches are made of on a device: few numbers from the host, the rest there.

The host gives the counters of bits, or which examples of a set come next; the device draws the bits
(`fpt.device_draws`), or takes the examples from a set that was sent once. A batch has the same bits
as the host's own, so that nobody sees from a figure where it was made. What is in no table here, or
too large, is made on the host and sent.

Shapes: K members with `sizes` examples each, B = sum of sizes, T tokens, F features, P predictions.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fpt import random_streams
from fpt.device_draws import Stream, most_below, places_of
from fpt.packing import RESIDENT_BYTES
from fpt.tasks.base import Batch, Generated, Source, Stored
from fpt.tasks.bits import BitMemory, BitXor
from fpt.tasks.images import PADDING, Cifar10, Cifar10Lra, ImageTask, moves
from fpt.tasks.text import Windows

Given = dict[str, np.ndarray]
"""Name -> what the host gives of a member's batch: (1, ...), or a row an example."""

CHUNK = 1000
"""Examples of a set that are made ready and sent at a time."""


class Made(NamedTuple):
    """The batches of all members, one after another, on the device."""

    inputs: Tensor
    """(B, T, F) float32, or (B, T) int64."""
    targets: Tensor
    """(B, P) int64 or float32."""
    lengths: Tensor | None
    """(B,) int64."""


class Supply(Protocol):
    """Where the training batches of a pack come from."""

    def given(self, seed: int, step: int, size: int) -> Given:
        """Return what the host gives for a member's batch: a pure function of its arguments."""
        ...

    def make(self, held: Mapping[str, Tensor], sizes: Sequence[int]) -> Made:
        """Make the batches of what the host gave, of all members one after another, on the device;
        without a wait, and without anything sent.
        """
        ...


def supply_of(source: Source, device: torch.device, most: int = RESIDENT_BYTES) -> Supply:
    """Return the supply of a training set: as much of it on the device as is known how.

    Args:
        source: The training set.
        device: Where to.
        most: Bytes of a set that may be kept there.
    """
    draw = getattr(source.draw, "__func__", None) if isinstance(source, Generated) else None
    if draw in DRAWN:
        return DrawnBits(source.draw.__self__, DRAWN[draw])  # type: ignore[attr-defined]
    if isinstance(source, Windows) and source.text.nbytes <= most:
        return TextWindows(source, device)
    if isinstance(source, Stored) and source.examples.hidden is None:
        if not source.augments and _size(source) <= most:
            kept = StoredSet(source, device)
            return kept if kept.is_the_hosts() else HostBatches(source)
        task = _moves_pixels(source)
        if task is not None and 4 * source.examples.inputs[..., 0].size * task.channels <= most:
            return MovedImages(source, task, device)
    return HostBatches(source)


class HostBatches:
    """Batches that the host makes."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def given(self, seed: int, step: int, size: int) -> Given:
        """Return the batch."""
        return given_of(self._source.batch(seed, random_streams.TRAINING, step, size))

    def make(self, held: Mapping[str, Tensor], sizes: Sequence[int]) -> Made:
        """Return it."""
        return Made(held["inputs"], held["targets"], held.get("lengths"))


def given_of(batch: Batch) -> Given:
    """Return what a batch holds, as wide as a model wants it."""
    names = ("inputs", "targets", "lengths", "hidden")
    parts = {name: getattr(batch, name) for name in names}
    return {
        name: part.astype(np.float32 if part.dtype.kind == "f" else np.int64, copy=False)
        for name, part in parts.items()
        if part is not None
    }


Drawing = Callable[[Any, Callable[[int], Stream], int], tuple[Tensor, Tensor]]
"""(task, what begins a stream of so many numbers of 32 bits, examples of each) -> inputs and
targets of K members."""


class DrawnBits:
    """Bits, drawn on the device by the counters."""

    def __init__(self, task: Any, draw: Drawing) -> None:
        self._task, self._draw = task, draw
        self._places: dict[int, tuple[Tensor, Tensor]] = {}

    def given(self, seed: int, step: int, size: int) -> Given:
        """Return the counters: the step is there for the masks too."""
        return {"seed": np.array([seed])}

    def make(self, held: Mapping[str, Tensor], sizes: Sequence[int]) -> Made:
        """Draw: all members with as many examples at once."""
        made, first = [], 0
        for size, run in itertools.groupby(sizes):
            last = first + len(list(run))
            own = slice(first, last)
            begin = functools.partial(self._begin, held["seed"][own], held["step"][own])
            made.append(self._draw(self._task, begin, size))
            first = last
        inputs, targets = made[0] if len(made) == 1 else map(torch.cat, zip(*made, strict=True))
        return Made(inputs, targets, None)

    def _begin(self, seed: Tensor, step: Tensor, numbers: int) -> Stream:
        if numbers not in self._places:
            self._places[numbers] = places_of(random_streams.TRAINING, numbers, seed.device)
        return Stream(seed, step, self._places[numbers])


def _xor(task: BitXor, begin: Callable[[int], Stream], size: int) -> tuple[Tensor, Tensor]:
    """As `BitXor.draw`."""
    count = size * 2 * task.bits
    strings = begin(-(-count // 4)).bits(count).reshape(-1, 2, task.bits)
    inputs = strings.reshape(-1, 2 * task.bits, 1).float()
    return inputs, (strings[:, 0] ^ strings[:, 1]).long()


def _memory(task: BitMemory, begin: Callable[[int], Stream], size: int) -> tuple[Tensor, Tensor]:
    """As `BitMemory.draw`."""
    shown, hidden = size * task.strings * task.bits, size * task.bits
    draws = begin(-(-shown // 4) + most_below(task.strings, size) + -(-hidden // 4))
    strings = draws.bits(shown).reshape(-1, task.strings, task.bits)
    which = draws.below(task.strings, size).reshape(-1, 1, 1)
    asked = strings.gather(1, which.expand(-1, 1, task.bits))[:, 0]
    visible = draws.bits(hidden).reshape(-1, task.bits)
    # In whole numbers, which know no zero with a sign.
    bits, own = strings.to(torch.int8), asked.to(torch.int8)
    signs = torch.cat([2 * bits - 1, ((2 * own - 1) * visible)[:, None]], 1)
    return signs.reshape(len(signs), -1, task.patch).float(), asked.long()


DRAWN: Mapping[Any, Drawing] = {BitXor.draw: _xor, BitMemory.draw: _memory}
"""What draws examples on the host -> what draws the same on a device."""


class TextWindows:
    """Windows of a text that is on the device."""

    def __init__(self, source: Windows, device: torch.device) -> None:
        self._source = source
        self._text = _kept(source.text, device)
        self._offsets = torch.arange(source.tokens + 1, device=device)

    def given(self, seed: int, step: int, size: int) -> Given:
        """Return where the windows begin."""
        return {"start": self._source.starts(seed, random_streams.TRAINING, step, size)}

    def make(self, held: Mapping[str, Tensor], sizes: Sequence[int]) -> Made:
        """Cut them out."""
        windows = self._text[held["start"][:, None] + self._offsets].long()
        return Made(windows[:, :-1], windows[:, 1:], None)


class StoredSet:
    """A finite set that is on the device as it is handed out, and is taken from by number."""

    def __init__(self, source: Stored, device: torch.device) -> None:
        self._source = source
        chunks = [source.examples] if source.transform is None else list(source.chunks(CHUNK))
        self._inputs = _kept(np.concatenate([chunk.inputs for chunk in chunks]), device)
        self._targets = _kept(np.concatenate([chunk.targets for chunk in chunks]), device)
        lengths = [chunk.lengths for chunk in chunks if chunk.lengths is not None]
        self._lengths = np.concatenate(lengths).astype(np.int64) if lengths else None

    def is_the_hosts(self) -> bool:
        """Return whether a batch is what the host makes of it: a transformation of a user's own may
        look at more than one example, or draw although it says that it does not.
        """
        device = self._inputs.device
        for size in (1, 8):
            batch = self._source.batch(0, random_streams.TRAINING, 0, size)
            given = {name: torch.from_numpy(one) for name, one in self.given(0, 0, size).items()}
            made = self.make({name: one.to(device) for name, one in given.items()}, (size,))
            ours = {n: one.cpu().numpy() for n, one in made._asdict().items() if one is not None}
            theirs = given_of(batch)
            if ours.keys() != theirs.keys() or any(
                one.tobytes() != theirs[name].tobytes() for name, one in ours.items()
            ):
                return False
        return True

    def given(self, seed: int, step: int, size: int) -> Given:
        """Return which examples; and their lengths, which the host counts."""
        index = self._source.index(seed, random_streams.TRAINING, step, size)
        return {"index": index} | (
            {} if self._lengths is None else {"lengths": self._lengths[index]}
        )

    def make(self, held: Mapping[str, Tensor], sizes: Sequence[int]) -> Made:
        """Take them."""
        index = held["index"]
        inputs, targets = _widened(self._inputs[index]), _widened(self._targets[index])
        return Made(inputs, targets, held.get("lengths"))


class MovedImages:
    """Images that are on the device as numbers, and are cut, mirrored and turned there.

    The host draws by how much, and takes sine and cosine: a device's are others in the last digit.
    All else picks pixels.
    """

    def __init__(self, source: Stored, task: Cifar10 | Cifar10Lra, device: torch.device) -> None:
        self._source, self._tokens = source, (task.height * task.width) // task.patch**2
        self._sides = task.height, task.width
        pixels = source.examples.inputs
        black = np.zeros_like(pixels[:1, :1, :1])
        rows = [
            _kept(task.values(None, pixels[start : start + CHUNK]), device).flatten(0, 2)
            for start in range(0, len(pixels), CHUNK)
        ]
        # (pixels of all images, and a black one; channels).
        self._pixels = torch.cat([*rows, _kept(task.values(None, black), device).flatten(0, 2)])
        self._targets = _kept(source.examples.targets, device)
        p = task.patch
        order = np.arange(task.height * task.width).reshape(task.height // p, p, task.width // p, p)
        self._order = _kept(order.transpose(0, 2, 1, 3).reshape(-1), device)

    def given(self, seed: int, step: int, size: int) -> Given:
        """Return which images, and how each is moved."""
        drawn = moves(random_streams.generator(seed, random_streams.AUGMENTATION, step), size)
        angle = np.radians(drawn.degrees)
        return {
            "index": self._source.index(seed, random_streams.TRAINING, step, size),
            "top": drawn.top,
            "left": drawn.left,
            "mirrored": drawn.mirrored,
            "turned": np.stack([np.sin(angle), np.cos(angle)], 1),
        }

    def make(self, held: Mapping[str, Tensor], sizes: Sequence[int]) -> Made:
        """Look their pixels up, as `fpt.tasks.images.moved` does."""
        (height, width), index = self._sides, held["index"]
        line, place = self._order // width, self._order % width
        y, x = line.double() - (height - 1) / 2, place.double() - (width - 1) / 2
        sine, cosine = held["turned"][..., None].unbind(1)
        row = torch.round(sine * x + cosine * y + (height - 1) / 2).long()
        column = torch.round(cosine * x - sine * y + (width - 1) / 2).long()
        seen = _within(row, height) & _within(column, width)
        column = torch.where(held["mirrored"][:, None], width - 1 - column, column)
        row = row + held["top"][:, None] - PADDING
        column = column + held["left"][:, None] - PADDING
        seen = seen & _within(row, height) & _within(column, width)
        pixel = (index[:, None] * height + row) * width + column
        # The last row of the table is the black one.
        pixel = torch.where(seen, pixel, len(self._pixels) - 1)
        inputs = self._pixels[pixel].view(len(index), self._tokens, -1)
        return Made(inputs, _widened(self._targets[index]), None)


def _within(place: Tensor, size: int) -> Tensor:
    return (place >= 0) & (place < size)


def _moves_pixels(source: Stored) -> Cifar10 | Cifar10Lra | None:
    """Return the task whose images are augmented as `moved` does it, pixel by pixel."""
    task: Any = getattr(source.transform, "__self__", None)
    own = isinstance(task, Cifar10 | Cifar10Lra) and source.augments
    if not own or getattr(source.transform, "__func__", None) is not ImageTask.tokens:
        return None
    return task if type(task).values in (Cifar10.values, Cifar10Lra.values) else None


def _size(source: Stored) -> int:
    """Return the bytes of a set as it would be kept."""
    plain = source.examples if source.transform is None else source.plain(np.arange(1))
    each = len(source) / len(plain)
    parts = (plain.inputs, plain.targets, plain.lengths)
    return round(each * sum(part.nbytes for part in parts if part is not None))


def _kept(array: np.ndarray, device: torch.device) -> Tensor:
    """Send what stays: as narrow as it is, as far as torch has such numbers and `_widened` makes of
    them what the host would.
    """
    if array.dtype.kind == "f":
        array = array.astype(np.float32, copy=False)
    elif array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    tensor = torch.from_numpy(np.array(array))
    return tensor.to(device)


def _widened(values: Tensor) -> Tensor:
    return values if values.is_floating_point() else values.long()
