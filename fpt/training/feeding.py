"""Training batches: made for each member by its step, or taken from the caller and checked."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpt import random_streams
from fpt.model import Model
from fpt.tasks.base import Batch, Shape, Source
from fpt.training.member import Member
from fpt.training.supply import Given, Supply, given_of

Fed = Batch | Given | Exception


class Feeding:
    """The training batches of a pack, or of each what a device makes it of."""

    def __init__(
        self, model: Model, source: Source, device: torch.device, supply: Supply | None
    ) -> None:
        """See `batches`; `supply`: who makes them on the device, if the host does not."""
        self._shape: Shape = model.shape
        self._draws_hidden = model.draws_hidden
        self._supply = supply
        self._source = source
        # On a GPU the next batch is made and copied while the device computes; on a CPU it would
        # only compete for the core.
        self._pool = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self._next: Future[list[Fed]] | None = None

    def batches(self, live: Sequence[Member]) -> list[Fed]:
        """Return the members' batches of the step at hand, or what making one of them raised. On a
        GPU, the batches of the next step are begun.
        """
        steps = [member.figures.step for member in live]

        def make(ahead: int) -> list[Fed]:
            return [self.try_batch(m, s + ahead) for m, s in zip(live, steps, strict=True)]

        if self._pool is None or any(member.own_batches is not None for member in live):
            return make(0)
        ready, self._next = self._next, None
        made = ready.result() if ready is not None else make(0)
        if len(made) != len(live):
            made = make(0)  # a member left in between
        self._next = self._pool.submit(make, 1)
        return made

    def try_batch(self, member: Member, step: int) -> Fed:
        """Return a batch, or what making it raised: made ahead, that must wait for its step."""
        trial, supply = member.trial, self._supply
        try:
            if supply is None:
                return self._batch(member, step)
            if member.own_batches is not None:
                return given_of(self._batch(member, step))
            return supply.given(trial.seed, step, trial.batch_size)
        except Exception as error:
            return error

    def close(self) -> None:
        """Make no more batches."""
        if self._pool is not None:
            self._pool.shutdown()

    def _batch(self, member: Member, step: int) -> Batch:
        trial = member.trial
        if member.own_batches is None:
            return self._source.batch(trial.seed, random_streams.TRAINING, step, trial.batch_size)
        try:
            given = next(member.own_batches)
        except StopIteration:
            raise ValueError(
                f"batches: those of trial {member.index} end before step {step + 1} of "
                f"{trial.steps}"
            ) from None
        if not isinstance(given, Batch):
            parts: list[Any] = [None if part is None else np.asarray(part) for part in given]
            given = Batch(*parts)
        batch: Batch = given
        self._check(member, batch)
        return batch

    def _check(self, member: Member, batch: Batch) -> None:
        """Refuse a caller's batch that would train something else than the trial says.

        Raises:
            ValueError: If a shape is another one, or a class or an id is none.
        """
        shape, size = self._shape, member.trial.batch_size
        backbone = member.trial.backbone
        wanted = {
            "inputs": (size, shape.tokens)
            if shape.embedded
            else (size, shape.tokens, shape.inputs),
            "targets": (size, shape.positions),
            "lengths": (size,),
            "hidden": (size, backbone.layers, 2, backbone.width) if self._draws_hidden else None,
        }
        for name, its in wanted.items():
            given = getattr(batch, name)
            if given is not None and given.shape != its:
                raise ValueError(
                    f"batches: {name} of trial {member.index} are {given.shape}; wanted "
                    f"{its or f'none, {backbone.name} begins with no hidden states of its own'}"
                )
        limits = {"lengths": (1, shape.tokens + 1)}
        limits |= {"targets": (0, shape.classes)} if shape.classes else {}
        limits |= {"inputs": (0, shape.inputs)} if shape.embedded else {}
        for name, (low, high) in limits.items():
            given = getattr(batch, name)
            if given is not None and not (low <= given.min() and given.max() < high):
                raise ValueError(
                    f"batches: {name} of trial {member.index} go from {given.min()} to "
                    f"{given.max()}; wanted {low} to {high - 1}"
                )


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array on the device: vectors and numbers in float32, ids and classes (stored as
    they may be) in int64.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.float() if tensor.is_floating_point() else tensor.long()


def inputs_of(
    batches: Sequence[Batch], device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return what `Model.forward` takes: inputs, lengths and hidden states of all batches, one
    after another.
    """
    lengths = [b.lengths for b in batches if b.lengths is not None]
    hidden = [b.hidden for b in batches if b.hidden is not None]
    return (
        send(np.concatenate([b.inputs for b in batches]), device),
        send(np.concatenate(lengths), device) if lengths else None,
        send(np.concatenate(hidden), device) if hidden else None,
    )
