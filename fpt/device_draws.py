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

MOST_BLOCKS = 2**22
"""Blocks of masks that are drawn ahead, at most: 16 elements and 32 bytes each."""

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


@torch.library.custom_op("fpt::words", mutates_args=())
def _words(step: Tensor, seed: Tensor, key: Tensor, block: Tensor) -> Tensor:
    draw = _philox_on(step.device)
    return torch.stack(draw(block, step[:, None], seed[:, None], key), -1).flatten(1)


def words(step: Tensor, seed: Tensor, key: Tensor, block: Tensor) -> Tensor:
    """Return (K, 4 B) int64: the words of B blocks of each of K seeds. One operation to torch, as
    it is one kernel on a GPU.

    Args:
        step: (K,) int64, on the device, as all of these.
        seed: (K,) int64.
        key: (B,) int64: see `stream_key`.
        block: (B,) int64: which block of its stream.
    """
    drawn: Tensor = _words(step, seed, key, block)
    return drawn


class Stream:
    """What numpy's generator gives of one stream at a step, for K members at once.

    Only what tasks draw: bits, and numbers below a bound. As numpy does, each takes whole numbers
    of 32 bits, one after another.
    """

    def __init__(self, seed: Tensor, step: Tensor, places: tuple[Tensor, Tensor]) -> None:
        """Draw.

        Args:
            seed: (K,) int64, on the device, as `step`.
            step: (K,) int64.
            places: Of as many numbers as are taken at most, as `places_of` gives them.
        """
        self._words = words(step, seed, *places)
        self._taken: int | Tensor = 0
        """Numbers of 32 bits: as many of all members, or (K, 1) of each."""

    def bits(self, count: int) -> Tensor:
        """Return (K, count) bool, as `Generator.integers(0, 2, count, dtype=np.int8)` has them: of
        each byte the upper bit.
        """
        taken, self._taken = self._taken, self._taken + -(-count // 4)
        drawn = self._words.view(torch.int8)
        if isinstance(taken, int):
            return drawn[:, 4 * taken : 4 * taken + count] < 0
        place = 4 * taken + torch.arange(count, device=drawn.device)
        return drawn.gather(1, place) < 0

    def below(self, bound: int, count: int) -> Tensor:
        """Return (K, count) int64 in [0, bound), as `Generator.integers(0, bound, count)` has them,
        of a bound up to 2**31: by Lemire's method (2019, "Fast random integer generation in an
        interval"), which draws again where a number would be more likely than others.

        Of `numbers`, it takes up to `most_below(bound, count)`.
        """
        if bound == 1:
            return self._words.new_zeros(len(self._words), count)
        most = most_below(bound, count)
        drawn = self._words.view(torch.int32)
        if isinstance(self._taken, int):
            numbers = drawn[:, self._taken : self._taken + most]
        else:
            place = self._taken + torch.arange(most, device=drawn.device)
            numbers = drawn.gather(1, place)
        product = (numbers.long() & _HALF) * bound
        accepted = (product & _HALF) >= _refused(bound)
        wanted = torch.arange(1, count + 1, device=drawn.device).expand(len(drawn), -1)
        place = torch.searchsorted(accepted.cumsum(1), wanted.contiguous())
        self._taken = self._taken + place[:, -1:] + 1
        return product.gather(1, place) >> 32


def places_of(stream: int, numbers: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return keys and numbers of the blocks of a stream that hold so many numbers of 32 bits."""
    block = torch.arange(-(-numbers // 8), device=device)
    return torch.full_like(block, stream_key(stream)), block


def _refused(bound: int) -> int:
    """Return how many of 2**32 numbers are drawn again."""
    return (1 << 32) % bound


def most_below(bound: int, count: int) -> int:
    """Return the numbers of 32 bits that `Stream.below` looks at: more than it has ever to refuse,
    but once in 1e12 times (a draw of which is then an error).
    """
    return 0 if bound == 1 else count + 64 + -(-4 * count * _refused(bound) // (1 << 32))


def kept_from(p: float) -> tuple[int, float]:
    """Return, of 16 random bits, what dropout keeps from on; and by what it scales that up."""
    threshold = round(p * 65536)
    return threshold, 65536 / (65536 - threshold)


class Masks:
    """The dropout masks of a pack's members, drawn on a device.

    A step asks for the same masks as the one before it, at other counters: they are drawn all at
    once, when it asks for the first of them, unless they are large.
    """

    def __init__(
        self, seeds: Sequence[int], dropout: Sequence[float], device: torch.device
    ) -> None:
        rules = [kept_from(p) for p in dropout]
        self.device = device
        self._seeds = torch.tensor(list(seeds), device=device)
        # Compared as signed numbers of 16 bits, of which the upper half is counted first.
        self._thresholds = torch.tensor(
            [threshold - 32768 for threshold, _ in rules], dtype=torch.int16, device=device
        )
        self._scales = torch.tensor([scale for _, scale in rules], device=device)
        self._now: tuple[tuple[int, ...], tuple[int, ...]] = (), ()
        self._step = self._seeds
        self._chosen = self._seeds, self._thresholds, self._scales
        self._asked: dict[int, int] = {}
        """Site -> blocks that the step at hand has asked for."""
        self._drawn: dict[int, Tensor] = {}
        """Site -> words that are drawn already."""
        self._places: tuple[dict[int, int], Tensor, Tensor] = {}, self._seeds, self._seeds
        """Blocks of each site that were drawn at once; and for each block its key and number."""

    def draw(
        self,
        members: Sequence[int],
        steps: Sequence[int],
        rows: int,
        size: int,
        site: int,
        counter: Tensor | None = None,
    ) -> Tensor:
        """Return (K, rows, size) float32: 0 where dropped, the scale elsewhere.

        Args:
            members: The K members to draw for.
            steps: Step of each of them.
            rows: Sequences of each.
            size: Elements of a sequence.
            site: Of the dropout, with its use.
            counter: (K,) int64, the steps, where they are on the device already.
        """
        if self._now != (tuple(members), tuple(steps)):
            self._begin(tuple(members), tuple(steps), counter)
        blocks = -(-rows * size // 16)
        self._asked[site] = blocks
        drawn = self._drawn.get(site)
        if drawn is None or drawn.shape[1] != 4 * blocks:
            drawn = self._words(*self._blocks({site: blocks}))
        lanes = drawn.view(torch.int16)[:, : rows * size].view(len(members), rows, size)
        _, thresholds, scales = self._chosen
        return ((lanes ^ -32768) >= thresholds) * scales

    def _begin(
        self, members: tuple[int, ...], steps: tuple[int, ...], counter: Tensor | None
    ) -> None:
        """Begin a step: send what is its own, and draw what the last one asked for."""
        if members != self._now[0]:
            index = sent(members, self.device)
            self._chosen = (
                self._seeds[index],
                self._thresholds[index][:, None, None],
                self._scales[index][:, None, None],
            )
        self._now = members, steps
        self._step = sent(steps, self.device) if counter is None else counter
        places, self._asked, self._drawn = self._asked, {}, {}
        if not places or sum(places.values()) * len(members) > MOST_BLOCKS:
            return
        if places != self._places[0]:
            self._places = places, *self._blocks(places)
        drawn = self._words(*self._places[1:])
        found = torch.split(drawn, [4 * n for n in places.values()], 1)
        self._drawn = {site: own.contiguous() for site, own in zip(places, found, strict=True)}

    def _words(self, key: Tensor, block: Tensor) -> Tensor:
        return words(self._step, self._chosen[0], key, block)

    def _blocks(self, places: dict[int, int]) -> tuple[Tensor, Tensor]:
        """Return for each block of these sites its key, and its number at the site."""
        numbers = [torch.arange(n, device=self.device) for n in places.values()]
        keys = [
            torch.full_like(own, stream_key(random_streams.DROPOUT, site))
            for site, own in zip(places, numbers, strict=True)
        ]
        return torch.cat(keys), torch.cat(numbers)


def sent(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of numbers on the device, without waiting for it."""
    tensor = torch.tensor(numbers, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
