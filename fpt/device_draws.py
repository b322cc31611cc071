"""Random numbers of `fpt.random_streams`, made on a device: the same bits as on the host.

numpy's Philox4x64-10 is integer arithmetic on a counter (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), so that every block of a stream can be computed where it is needed,
all at once. torch has no product of 64-bit numbers that keeps the upper half; it is put together
from halves of 32 bits.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fpt import random_streams

_ROUNDS = 10
_HALF = 0xFFFFFFFF


def _signed(number: int) -> int:
    """Return 64 bits as torch's int64 holds them."""
    return number - (1 << 64) if number >> 63 else number


_FACTORS = tuple((_signed(n), n & _HALF, n >> 32) for n in (0xD2E7470EE14C6C93, 0xCA5A826395121157))
_WEYL = tuple(map(_signed, (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)))

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _upper(x: Tensor, low: int, high: int) -> Tensor:
    """Return the upper 64 bits of x times a constant of these halves; int64 as bits."""
    own_low, own_high = x & _HALF, (x >> 32) & _HALF
    first = own_low * low
    second = own_high * low + ((first >> 32) & _HALF)
    third = own_low * high + (second & _HALF)
    return own_high * high + ((second >> 32) & _HALF) + ((third >> 32) & _HALF)


def philox(block: Tensor, step: Tensor, seed: Tensor, key: Tensor) -> Words:
    """Return the four words of 64 bits of each block of `random_streams.philox`, as int64.

    Args:
        block: Number of the block within the step, counted from 0.
        step: The step; these broadcast against each other.
        seed: The seed.
        key: Stream and site, as `stream_key` puts them together.
    """
    # numpy counts before it draws.
    c0, c2, k0, k1 = torch.broadcast_tensors(block + 1, step, seed, key)  # type: ignore[no-untyped-call]
    c1 = c3 = torch.zeros_like(c0)
    for _ in range(_ROUNDS):
        (m0, *halves0), (m1, *halves1) = _FACTORS
        upper0, upper1 = _upper(c0, *halves0), _upper(c2, *halves1)
        c0, c1, c2, c3 = upper1 ^ c1 ^ k0, c2 * m1, upper0 ^ c3 ^ k1, c0 * m0
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return c0, c1, c2, c3


def stream_key(stream: int, site: int = 0) -> int:
    """Return a stream and a site as the second word of a key."""
    return _signed((stream << 32) | site)


@functools.cache
def _philox_on(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Words]:
    """Return what draws on a device: on a GPU the same arithmetic as one kernel, if torch.compile
    makes one there that gives the same bits.
    """
    if device.type != "cuda":
        return philox
    fused = torch.compile(philox, dynamic=True)
    numbers = [
        torch.tensor(n, device=device) for n in (list(range(4096)), 7, 2**62 + 1, stream_key(4, 9))
    ]
    try:
        same = all(map(torch.equal, fused(*numbers), philox(*numbers)))
        why = "gave other bits"
    except Exception as error:
        same, why = False, f"failed: {error}"
    if not same:
        warnings.warn(
            f"torch.compile of the generator of random numbers {why}; it is slower without",
            RuntimeWarning,
            stacklevel=2,
        )
    return fused if same else philox


def words(step: Tensor, seed: Tensor, key: int, blocks: int, *, first: int = 0) -> Tensor:
    """Return (K, 4 blocks) int64: the words of a stream of each of K seeds.

    Args:
        step: (K,) int64, on the device.
        seed: (K,) int64.
        key: See `stream_key`.
        blocks: Of four words, a stream.
        first: The block to begin with.
    """
    block = torch.arange(first, first + blocks, device=step.device)
    draw = _philox_on(step.device)
    keys = torch.full((1, 1), key, device=step.device)
    drawn = draw(block[None], step[:, None], seed[:, None], keys)
    return torch.stack(drawn, -1).flatten(1)


class Masks:
    """The dropout masks of a pack's members, drawn on a device."""

    def __init__(
        self, seeds: Sequence[int], dropout: Sequence[float], device: torch.device
    ) -> None:
        thresholds = [round(p * 65536) for p in dropout]
        self.device = device
        self._seeds = torch.tensor(list(seeds), device=device)
        # Compared as signed numbers of 16 bits, of which the upper half is counted first.
        self._thresholds = torch.tensor(
            [t - 32768 for t in thresholds], dtype=torch.int16, device=device
        )
        self._scales = torch.tensor([65536 / (65536 - t) for t in thresholds], device=device)
        self._steps: tuple[tuple[int, ...], Tensor] = ((), self._seeds)
        self._chosen: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def draw(
        self, members: Sequence[int], steps: Sequence[int], rows: int, size: int, site: int
    ) -> Tensor:
        """Return (K, rows, size) float32: 0 where dropped, the scale elsewhere.

        Args:
            members: The K members to draw for.
            steps: Step of each of them.
            rows: Sequences of each.
            size: Elements of a sequence.
            site: Of the dropout, with its use.
        """
        seeds, thresholds, scales = self._of(tuple(members))
        step = self._on_device(tuple(steps))
        key = stream_key(random_streams.DROPOUT, site)
        lanes = words(step, seeds, key, -(-rows * size // 16)).view(torch.int16)
        lanes = lanes[:, : rows * size].view(len(members), rows, size)
        return ((lanes ^ -32768) >= thresholds) * scales

    def _of(self, members: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        if members not in self._chosen:
            index = sent(members, self.device)
            self._chosen = {
                members: (
                    self._seeds[index],
                    self._thresholds[index][:, None, None],
                    self._scales[index][:, None, None],
                )
            }
        return self._chosen[members]

    def _on_device(self, steps: tuple[int, ...]) -> Tensor:
        # One copy a step, for all of its masks.
        if self._steps[0] != steps:
            self._steps = steps, sent(steps, self.device)
        return self._steps[1]


def sent(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of numbers on the device, without waiting for it."""
    tensor = torch.tensor(numbers, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
