"""The layers that a pack needs: a layer a member where a trial's own parameters act, and the shared
products in a form whose result for a row does not depend on the other rows.

K members stand one after another along the batch: member k owns `rows[k]` sequences. A member's
layer sees its own rows alone, in shapes that do not depend on the pack, so that on a CPU at one
thread a member's numbers are the same bits whoever its neighbours are. A pack of one is the plain
case. On the device path, which has no such contract, a layer is one operation for all members that
have as many rows each. Shapes: R = sum of rows, T tokens, W width.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from fpt import device_draws, random_streams
from fpt.backbones.huggingface import ATTENTION
from fpt.precision import Numerics

ROW_MULTIPLE = 16
"""Rows of a product are padded to a multiple of this, or of what `fpt.exactness` measures that this
processor needs. Below 16 rows MKL's sgemm sums in an order that depends on the number of rows."""

_Rows = TypeVar("_Rows", Tensor, np.ndarray)

Own = Mapping[str, Sequence[Tensor]]
"""Name of a module's parameter -> its value for each member."""


@dataclass
class Members:
    """What the layers of a pack share while it runs."""

    seeds: list[int]
    """Seed of each member's dropout masks."""
    dropout: list[float]
    """Dropout probability of each member."""
    rows: list[int]
    """Sequences of each member in the batch at hand; 0 for a member that has left."""
    steps: list[int] = field(default_factory=list)
    """Step of each member, counted from 0."""
    counter: Tensor | None = None
    """(K,) int64, the steps of the members present, where they are on the device already."""
    chunk: int = 0
    """Number of the batch at hand within an evaluation."""
    part: Sequence[tuple[int, int]] | None = None
    """While a batch is trained on in parts: of each member, the first row of the part at hand, and
    the rows of the whole batch. None: batches are whole."""
    read_out: Callable[[Tensor], Tensor] | None = None
    """Set while a backbone's last layer computes the positions alone that are read out: picks them,
    (R, tokens, ...) -> (R, P, ...). Masks are drawn for all positions, and then picked."""
    tokens: int = 0
    """Of the forward pass at hand."""
    uses: Counter[int] = field(default_factory=Counter)
    """Site -> times that its dropout was used in the forward pass at hand."""
    maps: list[Tensor] | None = None
    """While this is a list, attention is computed eagerly and each layer's weights, (R, heads, T,
    T), are added to it."""

    device_path: bool = False
    """Whether random numbers are drawn where the tensors are, as they always are on a GPU."""
    _masks: device_draws.Masks | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.steps = self.steps or [0] * len(self.seeds)

    def masks_on(self, device: torch.device) -> device_draws.Masks:
        """Return what draws masks on a device."""
        if self._masks is None or self._masks.device != device:
            self._masks = device_draws.Masks(self.seeds, self.dropout, device)
        return self._masks

    @contextlib.contextmanager
    def batch(
        self,
        rows: Mapping[int, int],
        *,
        steps: Mapping[int, int] | None = None,
        counter: Tensor | None = None,
        part: Mapping[int, tuple[int, int]] | None = None,
        chunk: int = 0,
    ) -> Iterator[None]:
        """Describe the batch of the forward pass within the block.

        Args:
            rows: Member -> its sequences; of the others there are none.
            steps: Member -> its step, where one is trained.
            counter: (K,) int64, the same of those present, if it is on the device.
            part: Member -> (first row of the part at hand, rows of the whole batch), where a batch
                is trained on in parts.
            chunk: Number of the batch within an evaluation.
        """
        before = self.rows, self.steps, self.counter, self.part, self.chunk
        everyone = range(len(self.seeds))
        self.rows = [rows.get(k, 0) for k in everyone]
        if steps is not None:
            self.steps = [steps.get(k, 0) for k in everyone]
        self.counter = counter
        self.part = None if part is None else [part.get(k, (0, 0)) for k in everyone]
        self.chunk = chunk
        try:
            yield
        finally:
            self.rows, self.steps, self.counter, self.part, self.chunk = before

    @property
    def present(self) -> list[int]:
        """The members that have rows in the batch at hand."""
        return [k for k, rows in enumerate(self.rows) if rows]

    def drawn(self, k: int, rows: int, draw: Callable[[int], _Rows]) -> _Rows:
        """`draw(rows)` for member k: of a part, what the whole batch would draw for its rows."""
        if self.part is None:
            return draw(rows)
        first, whole = self.part[k]
        return draw(whole)[first : first + rows]

    @property
    def stacked(self) -> int:
        """The number of members whose layers are computed by one operation for all, as a device
        wants it: those present, if they have as many rows each. 0: layers go from one to the next.
        """
        rows = {n for n in self.rows if n}
        return len(self.present) if self.device_path and len(rows) == 1 else 0

    def pieces(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(member, its rows of x) for every member present."""
        present = self.present
        yield from zip(present, _split(x, [self.rows[k] for k in present]), strict=True)

    def apply(self, x: Tensor, layer: Callable[[int, Tensor], Tensor]) -> Tensor:
        """`layer(member, its rows)` over all members, put together again along the rows."""
        done = [layer(k, piece) for k, piece in self.pieces(x)]
        return done[0] if len(done) == 1 else torch.cat(done)


def _split(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    # One split, and not a slice a piece: the gradient of a slice is as large as x.
    return [x] if len(sizes) == 1 else torch.split(x, list(sizes))


class MemberLayer(nn.Module):
    """A layer with parameters of each member's own: parameter `p` of member k is named `p.k`."""

    def __init__(self, members: Members, **parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.members = members
        for name, values in parameters.items():
            setattr(self, name, _Own([nn.Parameter(v) for v in values]))

    def of_present(self, name: str) -> Tensor:
        """A parameter of all members present, one after another: (K, ...)."""
        values = getattr(self, name)
        return torch.stack([values[k] for k in self.members.present])


class _Own(nn.ParameterList):
    # Mamba asks a norm's gain for its type.

    @property
    def dtype(self) -> torch.dtype:
        return self[0].dtype  # type: ignore[no-any-return]


class MemberLinear(MemberLayer):
    """A linear layer a member: (R, T, in) -> (R, T, out)."""

    weight: nn.ParameterList
    bias: nn.ParameterList

    def forward(self, x: Tensor) -> Tensor:
        """Apply each member's layer to its rows."""
        if members := self.members.stacked:
            weight, bias = self.of_present("weight"), self.of_present("bias")
            rows = x.reshape(members, -1, x.shape[-1]).transpose(1, 2)
            # This way round the gradient of the weights lies as they do, and is not copied.
            out = torch.baddbmm(bias[..., None], weight, rows).transpose(1, 2)
            return out.reshape(*x.shape[:-1], -1)
        return self.members.apply(x, lambda k, rows: F.linear(rows, self.weight[k], self.bias[k]))


class MemberEmbedding(MemberLayer):
    """An embedding a member: (R, T) ids -> (R, T, W)."""

    weight: nn.ParameterList

    def forward(self, ids: Tensor) -> Tensor:
        """Look up each member's rows in its own table."""
        if members := self.members.stacked:
            table = self.of_present("weight")
            first = torch.arange(members, device=ids.device) * table.shape[1]
            rows = ids.reshape(members, -1) + first[:, None]
            return F.embedding(rows, table.flatten(0, 1)).view(*ids.shape, -1)
        return self.members.apply(ids, lambda k, rows: F.embedding(rows, self.weight[k]))


class MemberTable(MemberLayer):
    """A table a member that all rows of it are looked up in alike, as of relative positions:
    (T, T) ids -> (R, T, T, heads).
    """

    weight: nn.ParameterList

    def forward(self, ids: Tensor) -> Tensor:
        """Look the ids up for each row."""
        members = self.members
        if present := members.stacked:
            each = self.of_present("weight")[:, ids]
            rows = sum(members.rows) // present
            return each[:, None].expand(-1, rows, *each.shape[1:]).flatten(0, 1)
        found = [
            F.embedding(ids, self.weight[k]).expand(members.rows[k], *ids.shape, -1)
            for k in members.present
        ]
        return found[0] if len(found) == 1 else torch.cat(found)


class MemberNorm(MemberLayer):
    """A layer norm with gain and bias of each member's own: (R, T, W) -> (R, T, W)."""

    weight: nn.ParameterList
    bias: nn.ParameterList

    def __init__(self, members: Members, norm: nn.LayerNorm, own: Own) -> None:
        super().__init__(members, **{name: [v.clone() for v in own[name]] for name in own})
        self.eps = norm.eps
        self.biased = "bias" in own  # some have none

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each row and apply its member's gain and bias."""
        present = self.members.present
        if self.members.stacked:
            own = [
                *(self.weight[k] for k in present),
                *(self.bias[k] for k in present if self.biased),
            ]
            together: Tensor = _StackedNorms.apply(x, len(present), self.eps, *own)  # type: ignore[no-untyped-call]
            return together
        if not self.biased:
            shape = x.shape[-1:]
            return self.members.apply(
                x, lambda k, rows: F.layer_norm(rows, shape, self.weight[k], None, self.eps)
            )
        gains, biases = [self.weight[k] for k in present], [self.bias[k] for k in present]
        if len(present) == 1:
            return F.layer_norm(x, x.shape[-1:], gains[0], biases[0], self.eps)
        # OPT lays the tokens of all rows one after another.
        tokens = len(x) // sum(self.members.rows)
        sizes = [tokens * self.members.rows[k] for k in present]
        out: Tensor = _Norms.apply(x, sizes, self.eps, *gains, *biases)  # type: ignore[no-untyped-call]
        return out


class _Norms(torch.autograd.Function):
    """A layer norm a member as one node of the graph: torch's own kernels on each member's rows,
    without what autograd does for each of them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], eps: float, *own: Tensor) -> Tensor:
        """Gains of all members, then their biases, are in `own`."""
        members = len(sizes)
        done = [
            torch.native_layer_norm(rows, x.shape[-1:], gain, bias, eps)
            for rows, gain, bias in zip(
                torch.split(x, sizes), own[:members], own[members:], strict=True
            )
        ]
        outs, means, scales = zip(*done, strict=True)
        ctx.save_for_backward(x, *own, *means, *scales)
        ctx.sizes = sizes
        return torch.cat(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Gradients of x, and of each member's gain and bias."""
        x, *rest = ctx.saved_tensors
        sizes, members = ctx.sizes, len(ctx.sizes)
        gains, biases, means, scales = (rest[n * members : (n + 1) * members] for n in range(4))
        backward = torch.ops.aten.native_layer_norm_backward
        rows = torch.split(x, sizes)
        gradients = torch.split(gradient.contiguous(), sizes)
        trains = ctx.needs_input_grad[3]
        done = [
            backward(gradients[k], rows[k], x.shape[-1:], *own, [True, trains, trains])
            for k, own in enumerate(zip(means, scales, gains, biases, strict=True))
        ]
        inputs, of_gains, of_biases = zip(*done, strict=True)
        return (torch.cat(inputs), None, None, *of_gains, *of_biases)


class _StackedNorms(torch.autograd.Function):
    """`_Norms` of members with as many rows each: one norm and one affine map for all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, members: int, eps: float, *own: Tensor) -> Tensor:
        """Gains of all members, then their biases where they have any, are in `own`."""
        shape = x.shape[-1:]
        normed, mean, scale = torch.native_layer_norm(x, shape, None, None, eps)
        gains, *biases = torch.stack(own).view(-1, members, 1, *shape)
        ctx.save_for_backward(x, normed, mean, scale, gains)
        ctx.members, ctx.biased = members, bool(biases)
        rows = normed.view(members, -1, *shape)
        out = torch.addcmul(biases[0], rows, gains) if biases else rows * gains
        return out.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Gradients of x, and of each member's gain and bias."""
        x, normed, mean, scale, gains = ctx.saved_tensors
        shape = x.shape[-1:]
        rows = gradient.reshape(ctx.members, -1, *shape)
        own: list[Tensor | None] = [None] * (ctx.members * (2 if ctx.biased else 1))
        if ctx.needs_input_grad[3]:
            own = [*(rows * normed.view_as(rows)).sum(1).unbind()]
            own += [*rows.sum(1).unbind()] if ctx.biased else []
        inputs = torch.ops.aten.native_layer_norm_backward(
            (rows * gains).reshape(x.shape), x, shape, mean, scale, None, None, [True, False, False]
        )[0]
        return (inputs, None, None, *own)


class MemberScale(MemberLayer):
    """A root-mean-square norm with a gain of each member's own: (R, T, W) -> (R, T, W)."""

    weight: nn.ParameterList

    def __init__(self, members: Members, norm: nn.Module, own: Own) -> None:
        super().__init__(members, weight=[v.clone() for v in own["weight"]])
        self.eps: Any = getattr(norm, "variance_epsilon", None) or norm.eps
        self.above_one = type(norm).__name__.startswith("Gemma")
        """Whether the gain is what a row is multiplied by, less 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale each row to a root mean square of 1 and apply its member's gain."""
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        if members := self.members.stacked:
            gains = self.of_present("weight")[:, None]
            rows = (x * scale).reshape(members, -1, x.shape[-1])
            return (rows * (1.0 + gains if self.above_one else gains)).reshape(x.shape)
        if self.above_one:
            return self.members.apply(x * scale, lambda k, rows: rows * (1.0 + self.weight[k]))
        return self.members.apply(x * scale, lambda k, rows: self.weight[k] * rows)


def is_scale(module: nn.Module) -> bool:
    """Return whether a module is a root-mean-square norm of transformers' with one gain."""
    # transformers has a class of its own in each family.
    name = type(module).__name__
    known = isinstance(module, T5LayerNorm) or name.endswith(("RMSNorm", "T5LayerNorm"))
    return known and [name for name, _ in module.named_parameters()] == ["weight"]


class MemberPosition(MemberLayer):
    """A position table a member, in place of a backbone's embedding of positions 0 … T-1."""

    weight: nn.ParameterList

    def forward(self, positions: Tensor, *_: Any, **__: Any) -> Tensor:
        """(R, T, W) rows of each member's table. Of `positions`, which the backbone passes, only
        their number counts, since a trial's sequences all begin at position 0.
        """
        tokens = positions.shape[-1]
        if present := self.members.stacked:
            each = self.of_present("weight")[:, None, :tokens]
            rows = sum(self.members.rows) // present
            return each.expand(-1, rows, -1, -1).flatten(0, 1)
        tables = [
            (table if len(table) == tokens else table[:tokens]).expand(rows, -1, -1)
            for table, rows in zip(self.weight, self.members.rows, strict=True)
            if rows
        ]
        return tables[0] if len(tables) == 1 else torch.cat(tables)


class Dropout(nn.Module):
    """Dropout whose mask is a pure function of (member's seed, step, site, use, element); the use
    tells apart the calls of one module in one forward pass.

    A mask comes from Philox, 16 bits an element: on a CPU from numpy's, on a device from the same
    counters there, with the same bits.
    """

    def __init__(self, members: Members, site: int) -> None:
        super().__init__()
        self.members = members
        self.site = site

    def active(self, k: int) -> bool:
        """Whether member k drops anything now."""
        return self.training and self.members.dropout[k] > 0

    def forward(self, x: Tensor) -> Tensor:
        """Drop each member's elements with its own probability, and scale the rest up."""
        present = [(k, rows) for k, rows in enumerate(self.members.rows) if rows]
        if not any(self.active(k) for k, _ in present):
            return x
        use, read_out = self.use(), self.members.read_out
        inside = x.shape[1:] if read_out is None else (self.members.tokens, *x.shape[2:])
        # One product for all: times 1 a number stays what it is.
        mask = self.masks([k for k, _ in present], inside, x.device, use)
        return x * (mask if read_out is None else read_out(mask))

    def use(self) -> int:
        """The number of this use in the forward pass at hand, counted from 0."""
        self.members.uses[self.site] += 1
        return self.members.uses[self.site] - 1

    def masks(
        self, members: Sequence[int], inside: Sequence[int], device: torch.device, use: int
    ) -> Tensor:
        """(rows of the members, *inside): 0 where dropped, 1 / (1 - p) elsewhere, 1 of a member
        that drops nothing; p is rounded to a multiple of 2**-16.
        """
        if self.members.device_path or device.type != "cpu":
            return self._on_device(members, inside, device, use)
        rows = [self.members.rows[k] for k in members]
        out = np.empty((sum(rows), *inside), np.float32)
        ends = itertools.accumulate(rows)
        for k, own, end in zip(members, rows, ends, strict=True):
            piece = out[end - own : end]
            if self.active(k):
                threshold, scale = device_draws.kept_from(self.members.dropout[k])
                kept = self._words(k, own, piece[0].size, use) >= threshold
                np.multiply(kept.reshape(piece.shape), np.float32(scale), out=piece)
            else:
                piece.fill(1)
        return torch.from_numpy(out)

    def _stream(self, k: int, use: int) -> np.random.Philox:
        seed, step = self.members.seeds[k], self.members.steps[k]
        return random_streams.philox(seed, random_streams.DROPOUT, step, self.site + (use << 16))

    def _words(self, k: int, rows: int, size: int, use: int) -> np.ndarray:
        """(rows, size) random words of 16 bits."""

        def draw(rows: int) -> np.ndarray:
            words = self._stream(k, use).random_raw(-(-rows * size // 4)).view(np.uint16)
            return words[: rows * size].reshape(rows, size)

        return self.members.drawn(k, rows, draw)

    def _on_device(
        self, members: Sequence[int], inside: Sequence[int], device: torch.device, use: int
    ) -> Tensor:
        # For all who are there, whoever asks: one draw serves every site of a step.
        pack, present = self.members, self.members.present
        whole = [pack.rows[k] if pack.part is None else pack.part[k][1] for k in present]
        rows = [pack.rows[k] for k in members]
        drawn = pack.masks_on(device).draw(
            present,
            [pack.steps[k] for k in present],
            max(whole),
            math.prod(inside),
            self.site + (use << 16),
            pack.counter,
        )
        if [*members] != present or rows != [max(whole)] * len(rows):
            first = [0 if pack.part is None else pack.part[k][0] for k in members]
            pieces = zip([drawn[present.index(k)] for k in members], first, rows, strict=True)
            drawn = torch.cat([own[begin : begin + n] for own, begin, n in pieces])
        return drawn.view(sum(rows), *inside)


class _Rounded:
    """Weights in bfloat16: made when first wanted, and anew should they be others by then."""

    def __init__(self) -> None:
        self._made: tuple[Tensor, int, Tensor] | None = None

    def of(self, weight: Tensor) -> Tensor:
        """Return these weights, rounded."""
        weight = weight.detach()
        if self._made is not None:
            source, version, rounded = self._made
            if (source.data_ptr(), version) == (weight.data_ptr(), weight._version):
                return rounded
        # What they were made of is held on to, so that its address stays its own; it is mapped from
        # a file as a rule.
        self._made = weight, weight._version, weight.bfloat16()
        return self._made[2]


def _padded(flat: Tensor, multiple: int) -> Tensor:
    padding = -len(flat) % multiple
    return F.pad(flat, (0, 0, 0, padding)) if padding else flat


def _affine(flat: Tensor, weight: Tensor, bias: Tensor | None, multiple: int) -> Tensor:
    """(N, in) @ (in, out) + bias, in the form whose bits do not depend on the other rows.

    Weights in bfloat16 make it a product of the class bf16, whose bias is added in fp32.
    """
    rows = _padded(flat.to(weight.dtype), multiple)
    if weight.dtype == torch.bfloat16:
        out = (rows @ weight).float()
        out = out if bias is None else out.add_(bias)
    else:
        out = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    return out if len(out) == len(flat) else out[: len(flat)]


class SharedLinear(nn.Module):
    """A product with weights that the pack shares: (…, in) -> (…, out), rows padded.

    Takes the place of transformers' Conv1D and of torch's Linear; the parameters stay as they are.

    In the class bf16, which is for frozen weights, both operands are rounded to bfloat16, forward
    and for the gradient of x; the sums are in fp32, rounded once to bfloat16 and widened again; the
    bias is added in fp32. The bits of a row may then depend on the number of rows. One copy of the
    weights in bfloat16 serves both directions: measured on AMX, a prepacked one makes the step's
    products 0 to 20 % faster, a transposed one none on balance; oneDNN's products of fp32 operands
    by way of bfloat16, which would not round the sums, take 1.3 to 2 times as long as all of this.
    """

    def __init__(self, layer: nn.Linear | Conv1D, numerics: Numerics = "fp32") -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.transposed = isinstance(layer, Conv1D)  # Conv1D holds (in, out)
        self.numerics = numerics
        self.row_multiple = ROW_MULTIPLE
        self._rounded = _Rounded()

    @property
    def kind(self) -> tuple[int, int, bool, bool]:
        """The shape of the weights as they are held, whether that is (in, out), and of a bias."""
        first, second = self.weight.shape
        return first, second, self.transposed, self.bias is not None

    def forward(self, x: Tensor) -> Tensor:
        """The affine map of the last dimension."""
        weight = self.weight if self.numerics == "fp32" else self._rounded.of(self.weight)
        weight = weight if self.transposed else weight.t()
        out = _affine(x.reshape(-1, x.shape[-1]), weight, self.bias, self.row_multiple)
        return out.view(*x.shape[:-1], -1)


class MemberProduct(MemberLayer):
    """A product with frozen weights of each member's own, as members have that draw a backbone
    each: (…, in) -> (…, out); a member's bits are those of `SharedLinear`.
    """

    weight: nn.ParameterList
    bias: nn.ParameterList

    def __init__(
        self,
        members: Members,
        layer: nn.Linear | Conv1D,
        own: Own,
        numerics: Numerics = "fp32",
    ) -> None:
        super().__init__(members, **own)
        self.transposed = isinstance(layer, Conv1D)
        self.numerics = numerics
        self.row_multiple = ROW_MULTIPLE
        self._biased = "bias" in own
        self._rounded = [_Rounded() for _ in members.seeds]
        self._row, self._rounded_row = _Row(), _Rounded()

    @property
    def kind(self) -> tuple[int, int, bool, bool]:
        """As `SharedLinear.kind`."""
        first, second = self.weight[0].shape
        return first, second, self.transposed, self._biased

    def forward(self, x: Tensor) -> Tensor:
        """The affine map of the last dimension, each member's rows by its own weights."""
        present = self.members.present
        if self.members.device_path:
            row, places = self._row.of(list(self.weight))
            row = row if self.numerics == "fp32" else self._rounded_row.of(row)
            if self.members.stacked:
                return self._stacked(x, row, [places[k] for k in present])
            weights = [row[places[k]] for k in present]
        else:
            weights = [
                self.weight[k] if self.numerics == "fp32" else self._rounded[k].of(self.weight[k])
                for k in present
            ]
        weights = [weight if self.transposed else weight.t() for weight in weights]
        biases = [self.bias[k] for k in present] if self._biased else []
        flat = x.reshape(-1, x.shape[-1])
        # Rows of tokens are those of sequences, as many for each.
        tokens = len(flat) // sum(self.members.rows)
        sizes = [tokens * self.members.rows[k] for k in present]
        out: Tensor = _Products.apply(flat, sizes, self.row_multiple, *weights, *biases)  # type: ignore[no-untyped-call]
        return out.view(*x.shape[:-1], -1)

    def _stacked(self, x: Tensor, row: Tensor, places: Sequence[int]) -> Tensor:
        """Likewise for members with as many rows each, whose weights are at these places of a row:
        one batched product for members whose places follow one another, without copies.
        """
        row = row if self.transposed else row.transpose(1, 2)
        runs = [
            [place for _, place in run]
            for _, run in itertools.groupby(enumerate(places), lambda at: at[1] - at[0])
        ]
        sizes = [len(run) for run in runs]
        rows = _split(x.reshape(len(places), -1, x.shape[-1]), sizes)
        biases: Sequence[Tensor | None] = [None] * len(runs)
        if self._biased:
            biases = _split(self.of_present("bias")[:, None], sizes)
        done = [
            _batched_affine(own, row[run[0] : run[-1] + 1], bias)
            for own, run, bias in zip(rows, runs, biases, strict=True)
        ]
        out = done[0] if len(done) == 1 else torch.cat(done)
        return out.view(*x.shape[:-1], -1)


def _batched_affine(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`_affine` of each of K members: (K, N, in) @ (K, in, out) + (K, 1, out)."""
    if weight.dtype == torch.bfloat16:
        out = torch.bmm(rows.to(weight.dtype), weight).float()
        return out if bias is None else out.add_(bias)
    return torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias, rows, weight)


class _Row:
    """Frozen weights of all members in one tensor, one after another: made when first wanted, and
    anew should they be others by then.

    The members' own become parts of it, and those that are one tensor share a place, so that there
    is one copy of each; none moves as members come and go.
    """

    def __init__(self) -> None:
        self._made: tuple[list[tuple[int, int]], Tensor, list[int]] | None = None

    def of(self, own: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Return the row, (D, ...), and the place of each member's weights in it."""
        if self._made is None or self._made[0] != self._seen(own):
            different = {one.data_ptr(): one.data for one in own}
            order = list(different)
            places = [order.index(one.data_ptr()) for one in own]
            row = torch.stack(list(different.values()))
            for one, place in zip(own, places, strict=True):
                one.data = row[place]
            # The row is held on to, so that its addresses stay its own.
            self._made = self._seen(own), row, places
        return self._made[1:]

    @staticmethod
    def _seen(own: Sequence[Tensor]) -> list[tuple[int, int]]:
        return [(one.data_ptr(), one._version) for one in own]


Product = SharedLinear | MemberProduct
"""A product with frozen weights, whose rows are padded."""


class _Products(torch.autograd.Function):
    """A product a member as one node of the graph: each in the shapes that it has alone, without
    what autograd does for each of them. The weights and biases are frozen.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, sizes: list[int], multiple: int, *own: Tensor) -> Tensor:
        """Weights (in, out) of all members, then their biases, are in `own`."""
        members = len(sizes)
        weights = own[:members]
        biases: Sequence[Tensor | None] = own[members:] or [None] * members
        ctx.save_for_backward(*weights)
        ctx.sizes, ctx.multiple = sizes, multiple
        out = flat.new_empty(len(flat), weights[0].shape[1])
        parts = zip(*(torch.split(x, sizes) for x in (flat, out)), weights, biases, strict=True)
        for rows, place, weight, bias in parts:
            _put_affine(place, rows, weight, bias, multiple)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """The gradient of the rows alone."""
        weights = ctx.saved_tensors
        out = gradient.new_empty(len(gradient), weights[0].shape[0])
        both = (torch.split(x, ctx.sizes) for x in (gradient.contiguous(), out))
        for rows, place, weight in zip(*both, weights, strict=True):
            # As autograd does for `_affine`: rows that are added have a gradient of zero.
            _put_affine(place, rows, weight.t(), None, ctx.multiple)
        return (out, *[None] * (len(ctx.needs_input_grad) - 1))


def _put_affine(
    place: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, multiple: int
) -> None:
    """Write `_affine` of rows where it belongs, at once if they are as many as they have to be."""
    if len(rows) % multiple or weight.dtype != rows.dtype:
        place.copy_(_affine(rows, weight, bias, multiple))
    elif bias is None:
        torch.mm(rows, weight, out=place)
    else:
        torch.addmm(bias, rows, weight, out=place)


def _alike(x: Tensor) -> Tensor:
    """Return an operand of a batched product, (R, heads, …), in the layout that it has for any R.

    torch copies heads that lie apart in memory into one piece, but for a single sequence, which it
    hands to BLAS as it lies. BLAS may then sum in another order (seen on AMD's Zen 4).
    """
    return x.contiguous() if len(x) == 1 and x.shape[1] > 1 else x


class _Attention(torch.autograd.Function):
    """Attention with its weights in the open, to be dropped or looked at, as one node of the graph:
    what autograd would do, with fewer passes over (R, heads, T, T) numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        kept: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """What is attended to, and the weights before any is dropped."""
        query, key, value = map(_alike, (query, key, value))
        scores = (query @ _alike(key.transpose(2, 3))).mul_(scale)
        if bias is not None:
            scores += bias
        if mask is not None:
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        used = weights if kept is None else torch.mul(weights, kept, out=scores)
        ctx.save_for_backward(query, key, value, weights, used, kept)
        ctx.scale = scale
        ctx.mark_non_differentiable(weights)
        return used @ value, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Any, ...]:
        """Gradients of queries, keys, values and the bias."""
        query, key, value, weights, used, kept = ctx.saved_tensors
        gradient = _alike(gradient)
        of_value = used.transpose(2, 3) @ gradient
        of_weights = gradient @ _alike(value.transpose(2, 3))
        if kept is not None:
            of_weights.mul_(kept)
        # A masked score has a weight of zero, and so no gradient.
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_bias = of_scores.sum(0, keepdim=True) if ctx.needs_input_grad[4] else None
        of_scores.mul_(ctx.scale)
        of_query = of_scores @ key
        of_key = (_alike(query.transpose(2, 3)) @ of_scores).transpose(2, 3)
        return of_query, of_key, of_value, None, of_bias, None, None


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kept: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """`_Attention` of scores that are bent; autograd's own backward pass."""
    scores = torch.tanh((query @ key.transpose(2, 3)) * scale / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    return (weights if kept is None else weights * kept) @ value, weights.detach()


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' attention interface, with each member's own dropout masks.

    Args:
        module: The attention module; `fpt.model` has hung a `Dropout` on it as `member_dropout`.
        query: (R, heads, Q, width of a head); Q is T but where tokens and latents attend to each
            other.
        key: (R, heads, T, width of a head); of fewer heads where several queries share one.
        value: As key; its heads may be of another width.
        attention_mask: (R, 1, Q, T), True where a key may be attended to, or None.
        scaling: Factor on the scores.
        position_bias: (1, heads, T, T), or of each row, (R, heads, T, T), added to the scores; or
            None.
        softcap: Scores are bent to stay below it in size (Gemma 2), or None.

    Returns:
        (R, Q, heads, width of a value's head), and no weights.
    """
    dropout: Dropout = module.member_dropout  # type: ignore[assignment]
    causal = bool(getattr(module, "is_causal", False)) and attention_mask is None
    members = dropout.members
    use = dropout.use()
    if (shared := query.shape[1] // key.shape[1]) > 1:
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))

    # Neighbours that both drop, or both do not, are computed together: the form of a member's sums
    # must not depend on what the others do.
    runs = [(drops, list(ks)) for drops, ks in itertools.groupby(members.present, dropout.active)]
    sizes = [sum(members.rows[k] for k in ks) for _, ks in runs]

    def of_runs(x: Tensor | None) -> Sequence[Tensor | None]:
        return [x] * len(runs) if x is None or len(x) == 1 else _split(x, sizes)

    done = []
    for (drops, ks), mask, its_bias, queries, keys, values in zip(
        runs, *map(of_runs, (attention_mask, position_bias, query, key, value)), strict=True
    ):
        # Of values of another width torch takes the plain products, whose form `_alike` tells of.
        alike = values.shape[-1] == queries.shape[-1]
        if not drops and members.maps is None and softcap is None and alike:
            bias = mask
            if its_bias is not None:
                lowest = torch.finfo(its_bias.dtype).min
                bias = its_bias if mask is None else its_bias.masked_fill(~mask, lowest)
            done.append(
                F.scaled_dot_product_attention(
                    queries, keys, values, attn_mask=bias, is_causal=causal, scale=scaling
                )
            )
            continue
        scale = queries.shape[-1] ** -0.5 if scaling is None else scaling
        if causal:
            tokens = queries.shape[2]
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
        shape = (*queries.shape[1:3], keys.shape[2])
        kept = dropout.masks(ks, shape, query.device, use) if drops else None
        attended: Tensor
        weights: Tensor
        if softcap is None:
            attended, weights = _Attention.apply(  # type: ignore[no-untyped-call]
                queries, keys, values, mask, its_bias, kept, scale
            )
        else:
            attended, weights = _capped(queries, keys, values, mask, kept, scale, softcap)
        if members.maps is not None:
            members.maps.append(weights)
        done.append(attended)
    out = done[0] if len(done) == 1 else torch.cat(done)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention)
# Without a mask function of its own an attention is handed no mask at all, silently.
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
