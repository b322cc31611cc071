"""A training step on a device: the same operations on the same tensors from step to step.

What differs from one step to the next (batches, counters, rates) is copied into tensors that stay
where they are, and everything after that is a function of them: it sends nothing, waits for
nothing, and moves no parameter. So a GPU can replay it as one CUDA graph, for as long as the same
members train on batches of the same shapes; as members leave, another step takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fpt import random_streams
from fpt.model import Model
from fpt.tasks.base import Source, Stored
from fpt.training import losses as losses_
from fpt.training.features import FeatureCache
from fpt.training.grouped import GroupedUpdate
from fpt.training.member import Member
from fpt.training.supply import Given, Made, Supply

WARM = 2
"""Runs of a function before it is captured: the first makes what is made once, and learns which
masks a step asks for; the second draws them all at once, as every one after it does."""

FEW = 256
"""Numbers that are looked at before they are copied: rates and seeds seldom change."""


class Graphs:
    """The CUDA graphs of a pack: they share a stream and a pool of memory.

    None is let go of before all are: with it would go the workspace that cuBLAS has on the stream,
    which those captured after it use too.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._kept: list[torch.cuda.CUDAGraph] = []

    def warm(self, function: Callable[[], None]) -> None:
        """Run a function where it will be captured."""
        here = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            function()
        here.wait_stream(self._stream)

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture a function, which does not run it, and return what replays it."""
        graph = torch.cuda.CUDAGraph()
        pool = self._kept[0].pool() if self._kept else None
        # Other threads make batches ahead and write files.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode=mode):
            function()
        self._kept.append(graph)
        return graph.replay


class StaticStep:
    """A function of tensors that keep their addresses, run again and again."""

    def __init__(
        self,
        function: Callable[[Mapping[str, Tensor]], None],
        like: Mapping[str, Tensor],
        device: torch.device,
        graphs: Graphs | None,
    ) -> None:
        """See `run`.

        Args:
            function: Of the tensors held.
            like: Tensors of the names, shapes and types of those.
            device: Where they are held.
            graphs: What captures it; None: nothing does.
        """
        self.held = {name: torch.empty_like(one, device=device) for name, one in like.items()}
        """Name -> tensor, written into before each run."""
        self._written: Mapping[str, Tensor] = {}
        self._function = function
        self._graphs = graphs
        self._runs = 0
        self._replay: Callable[[], None] | None = None

    def fits(self, given: Mapping[str, Tensor]) -> bool:
        """Return whether tensors can be written into those held."""
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in self.held.items()}
        return shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in given.items()}

    def run(self, given: Mapping[str, Tensor]) -> None:
        """Write these into the tensors held, and run the function of them."""
        for name, tensor in given.items():
            if not _same(tensor, self._written.get(name)):
                self.held[name].copy_(tensor, non_blocking=True)
        self._written = given
        if self._graphs is None:
            self.compute()
        elif self._runs < WARM:
            self._graphs.warm(self.compute)
        else:
            self._replay = self._replay or self._graphs.capture(self.compute)
            self._replay()
        self._runs += 1

    def compute(self) -> None:
        """Run the function as it is."""
        self._function(self.held)


class DeviceStepper:
    """Trains the members of a pack one step at a time, as a device wants it."""

    def __init__(
        self,
        model: Model,
        source: Source,
        features: FeatureCache,
        device: torch.device,
        accumulation: int,
        update: GroupedUpdate,
        supply: Supply,
        *,
        graphs: bool,
    ) -> None:
        """See `step`; `graphs`: whether a GPU replays it as a graph."""
        self._model = model
        self._source = source
        self._features = features
        self._device = device
        self._accumulation = accumulation
        self._update = update
        self._supply = supply
        captures = graphs and device.type == "cuda" and accumulation == 1
        self._graphs = Graphs(device) if captures else None
        self._live: list[Member] = []
        self.static: StaticStep | None = None
        """The step of the members that trained last."""

    def step(self, live: Sequence[Member], given: Sequence[Given]) -> None:
        """Train one step of these members, of what the host gives of a batch each.

        Raises:
            ValueError: If a caller's own batches have lengths or hidden states of some members
                alone.
        """
        self._model.train()
        wanted = self._wanted(live, given)
        others = [member.index for member in live] != [member.index for member in self._live]
        if self.static is None or others or not self.static.fits(wanted):
            self._live = list(live)
            self.static = StaticStep(self._compute, wanted, self._device, self._graphs)
        self.static.run(wanted)
        for member in live:
            member.count_step()

    def _wanted(self, live: Sequence[Member], given: Sequence[Given]) -> dict[str, Tensor]:
        """Return all that this step does not share with the one before it."""
        shape = self._model.shape
        own = [self._completed(member, one) for member, one in zip(live, given, strict=True)]
        if any(one.keys() != own[0].keys() for one in own):
            raise ValueError(
                "batches: some trials of a pack give lengths or hidden states, and others do not"
            )
        arrays = {name: np.concatenate([one[name] for one in own]) for name in own[0]}
        arrays["step"] = np.array([member.figures.step for member in live])
        arrays["rate"] = self._update.rates(live)
        padded = "lengths" in arrays and losses_.has_padding(shape)
        counted = [
            one["lengths"].sum() * shape.outputs if padded else m.trial.batch_size * shape.positions
            for m, one in zip(live, own, strict=True)
        ]
        arrays["counted"] = np.array(counted, np.float32)
        found = {name: self._to_copy(array) for name, array in arrays.items()}
        sets = [self._features.of(member, self._source) for member in live]
        if not all(sets):
            return found
        read = []
        for member, features in zip(live, sets, strict=True):
            assert features is not None
            assert isinstance(self._source, Stored)
            trial, step = member.trial, member.figures.step
            read.append(
                features.take(
                    self._source.index(trial.seed, random_streams.TRAINING, step, trial.batch_size)
                )
            )
        return found | {"read": torch.cat(read)}

    def _to_copy(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory() if self._device.type == "cuda" else tensor

    def _completed(self, member: Member, given: Given) -> Given:
        if not self._model.draws_hidden or "hidden" in given:
            return given
        size, step = member.trial.batch_size, member.figures.step
        return given | {"hidden": self._model.drawn_hidden(member.index, size, step, training=True)}

    def _compute(self, held: Mapping[str, Tensor]) -> None:
        """Do the step, by nothing but these tensors, the model's and the optimizer's."""
        live = self._live
        sizes = [member.trial.batch_size for member in live]
        made = self._supply.make(held, sizes)
        parts = min(self._accumulation, *sizes) if self._accumulation > 1 else 1
        cuts = [
            [slice(part * n // parts, (part + 1) * n // parts) for n in sizes]
            for part in range(parts)
        ]
        first, *others = [self._backward(live, made, held, sizes, part) for part in cuts]
        self._update.step(live, sum(others, first), held["rate"])

    def _backward(
        self,
        live: Sequence[Member],
        made: Made,
        held: Mapping[str, Tensor],
        sizes: Sequence[int],
        cuts: Sequence[slice],
    ) -> Tensor:
        """Add the gradients of these rows of the batches, each row weighing the same in its batch;
        returns the rows' part of each member's loss, (live,).
        """
        shape, pack = self._model.shape, self._model.members

        whole = list(cuts) == [slice(0, size) for size in sizes]

        def cut(rows: Tensor) -> Tensor:
            """These rows, of a tensor with a row an example."""
            if whole:
                return rows
            pieces = torch.split(rows, list(sizes))
            return torch.cat([own[place] for own, place in zip(pieces, cuts, strict=True)])

        targets = cut(made.targets)
        lengths = None if made.lengths is None else cut(made.lengths)
        hidden = cut(held["hidden"]) if "hidden" in held else None
        with pack.batch(
            {m.index: place.stop - place.start for m, place in zip(live, cuts, strict=True)},
            steps={m.index: m.figures.step for m in live},
            counter=held["step"],
            part={m.index: (place.start, n) for m, n, place in zip(live, sizes, cuts, strict=True)},
        ):
            if "read" in held:
                logits: Tensor = self._model.head(cut(held["read"]))
            else:
                logits = self._model(cut(made.inputs), lengths, hidden)
        counts = losses_.counted(shape, lengths)
        if counts is not None:
            # What padding gives is taken out on both ways: it may be no number.
            logits = torch.where(counts[..., None], logits, 0.0)
        each = losses_.of_each(shape, logits, targets, None)
        right = losses_.right(shape, logits, targets, None)
        if counts is not None:
            each = torch.where(counts.flatten(), each, 0.0)
            right = torch.where(counts.flatten(), right, 0.0)
        rows = [(place.stop - place.start) * shape.positions for place in cuts]
        if whole and counts is None and len({*rows}) == 1:
            losses, accuracies = (x.view(len(rows), -1).mean(1) for x in (each, right))
        else:
            losses, accuracies = (_sums(x, rows) / held["counted"] for x in (each, right))
        torch.autograd.backward(losses, torch.ones_like(losses))
        self._update.note(live, losses.detach(), accuracies)
        return losses.detach()


def _sums(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the sum of each member's predictions, (live,)."""
    if len({*sizes}) == 1:
        return values.view(len(sizes), -1).sum(1)
    return torch.stack([own.sum() for own in torch.split(values, list(sizes))])


def _same(one: Tensor, other: Tensor | None) -> bool:
    """Return whether a few numbers of the host's are the ones of before."""
    few = other is not None and one.device.type == "cpu" and one.numel() <= FEW
    return few and np.array_equal(one.numpy(), other.numpy())  # type: ignore[union-attr]
