"""What this processor does, measured and not assumed: whether a row of a product has the same bits
whoever its neighbours are, and whether products in bfloat16 are faster.

BLAS chooses a kernel by the shapes of a product, and kernels add in different orders. Which shapes
take which kernel depends on the processor and the library. So a process measures the products that
its program makes, once for each of their shapes, with what it makes them with.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fpt.model import Model
from fpt.pack_layers import ROW_MULTIPLE, MemberProduct, Product, SharedLinear

ROW_MULTIPLES = (ROW_MULTIPLE, 2 * ROW_MULTIPLE, 4 * ROW_MULTIPLE)
"""What the rows of a product may be padded to a multiple of, tried in this order. A trial alone is
padded as one in a pack is, so that the choice depends on the products alone, never on the pack."""

COUNTS = (1, 2, 3, 4, 5, 7, 10)
"""Numbers of rows to try, in row multiples; and `MOST_ROWS`."""

MOST_ROWS = 640
"""Of a step of a pack, as the planner forms them for a CPU."""

TRIES = 7
"""At a product's time."""

_conv: Callable[[int, int], Conv1D] = Conv1D

SEED = 20210309
"""Of the numbers that are multiplied."""


def row_multiple(model: Model) -> int:
    """Return what the rows of all products of `model` with frozen weights have to be padded to a
    multiple of, for a row's bits not to depend on how many there are; 0 if nothing tried does.
    """
    layers = {one.kind for one in model.modules() if isinstance(one, Product)}
    threads = torch.get_num_threads()
    return next((n for n in ROW_MULTIPLES if all(_exact(n, threads, *s) for s in layers)), 0)


@functools.cache
def _exact(multiple: int, threads: int, first: int, second: int, conv: bool, bias: bool) -> bool:
    """Whether a layer of these shapes is exact, at so many threads."""
    draws = torch.Generator().manual_seed(SEED)
    with torch.device("meta"):  # where initial values cost nothing, and no random number
        plain = _conv(second, first) if conv else nn.Linear(second, first, bias=bias)
    plain.to_empty(device="cpu")
    plain.requires_grad_(requires_grad=False)
    for parameter in plain.parameters():
        parameter.normal_(generator=draws)
    layer = SharedLinear(plain)
    layer.row_multiple = multiple
    inner, outer = (first, second) if conv else (second, first)
    x = torch.randn(MOST_ROWS, inner, generator=draws)
    upstream = torch.randn(MOST_ROWS, outer, generator=draws)

    def bits(rows: int) -> tuple[Tensor, Tensor]:
        given = x[:rows].clone().requires_grad_()
        with torch.enable_grad():
            out = layer(given)
        (gradient,) = torch.autograd.grad(out, given, upstream[:rows].clone())
        return out.detach(), gradient

    whole = bits(MOST_ROWS)
    return all(
        torch.equal(part, most[: len(part)])
        for count in COUNTS
        for part, most in zip(bits(multiple * count), whole, strict=True)
    )


_known: dict[Hashable, bool] = {}


def members_are_exact(
    kind: Hashable, model: Model, rows: Sequence[int], forward: Callable[[Sequence[int]], Tensor]
) -> bool:
    """Return whether each member's logits and gradients are the same bits beside the others as by
    itself.

    Args:
        kind: What the shapes of the program depend on: measured once for each.
        model: A model of several members, none of whose shared weights train.
        rows: Sequences of each member.
        forward: (members) -> their logits, (rows of these, P, classes), one after another; what it
            reads has to be the same at every call.
    """
    own = any(isinstance(one, MemberProduct) for one in model.modules())
    key = kind, own, tuple(rows), torch.get_num_threads()
    if key not in _known:
        everyone = [k for k, n in enumerate(rows) if n]
        together = _bits(model, rows, everyone, forward)
        alone = [_bits(model, rows, [k], forward)[0] for k in everyone]
        _known[key] = all(
            all(map(torch.equal, *both)) for both in zip(together, alone, strict=True)
        )
    return _known[key]


def _bits(
    model: Model,
    rows: Sequence[int],
    chosen: Sequence[int],
    forward: Callable[[Sequence[int]], Tensor],
) -> list[list[Tensor]]:
    """Logits of each of the members, and the gradients that they pass on to what it trains."""
    model.train()
    with model.members.batch({k: rows[k] for k in chosen}):
        logits = forward(chosen)
    parts = torch.split(logits.detach(), [rows[k] for k in chosen])
    # Any gradient of a member's own will do: its logits are one.
    torch.autograd.backward(logits, logits.detach())
    found = [
        [part, *(p.grad for p in model.member(k).values() if p.grad is not None)]
        for k, part in zip(chosen, parts, strict=True)
    ]
    model.zero_grad(set_to_none=True)
    return found


@functools.cache
def bfloat16_is_faster(clock: Callable[[], float] = time.perf_counter) -> bool:
    """Return whether a product in the class bf16 takes less time than in fp32 on this processor.

    Measured with 256 rows and GPT-2 base's width: the least of some tries, in turn.
    """
    plain = nn.Linear(768, 768, device="meta").to_empty(device="cpu").requires_grad_(False)
    for parameter in plain.parameters():
        parameter.fill_(0.5)
    x = torch.ones(256, 768)
    least = {}
    for numerics in ("fp32", "bf16"):
        layer = SharedLinear(plain, numerics)
        layer(x)
        least[numerics] = (layer, math.inf)
    for _ in range(TRIES):
        for numerics, (layer, before) in least.items():
            began = clock()
            layer(x)
            least[numerics] = layer, min(before, clock() - began)
    return least["bf16"][1] < least["fp32"][1]


def forget() -> None:
    """Forget what was measured: for a process whose kernels are others from now on."""
    _exact.cache_clear()
    bfloat16_is_faster.cache_clear()
    _known.clear()
