"""A training step of a pack: one forward and one backward pass for all, and the update."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fpt import random_streams
from fpt.model import Model
from fpt.tasks.base import Batch, Shape, Source, Stored
from fpt.training import losses as losses_
from fpt.training.features import FeatureCache
from fpt.training.feeding import inputs_of, send
from fpt.training.member import Member


class Stepper:
    """Trains the members of a pack one step at a time."""

    def __init__(
        self,
        model: Model,
        source: Source,
        features: FeatureCache,
        device: torch.device,
        accumulation: int,
    ) -> None:
        self._model = model
        self._source = source
        self._features = features
        self._device = device
        self._accumulation = accumulation

    def step(self, live: Sequence[Member], batches: Sequence[Batch]) -> None:
        """Train one step of these members on a batch each."""
        self._model.train()
        parts = min(self._accumulation, *map(len, batches)) if self._accumulation > 1 else 1
        losses = torch.zeros(len(live), device=self._device)
        for part in range(parts):
            cuts = [slice(part * len(b) // parts, (part + 1) * len(b) // parts) for b in batches]
            losses += self._backward(live, batches, cuts)
        for member, loss in zip(live, losses.unbind(), strict=True):
            _update(member, loss)
        for member in live:
            member.count_step()

    def _backward(
        self, live: Sequence[Member], batches: Sequence[Batch], cuts: Sequence[slice]
    ) -> Tensor:
        """Add the gradients of these rows of the batches, each row weighing the same in its batch;
        returns the rows' part of each member's loss, (live,).
        """
        pack = self._model.members
        with pack.batch(
            {m.index: cut.stop - cut.start for m, cut in zip(live, cuts, strict=True)},
            steps={m.index: m.figures.step for m in live},
            part={
                m.index: (cut.start, len(b)) for m, b, cut in zip(live, batches, cuts, strict=True)
            },
        ):
            logits = self._logits(live, batches, cuts)
            pieces = [piece for _, piece in pack.pieces(logits)]
        shape = self._model.shape
        targets = [batch.targets[cut] for batch, cut in zip(batches, cuts, strict=True)]
        counts = [self._counted(batch, cut) for batch, cut in zip(batches, cuts, strict=True)]
        shares = [_share(shape, batch, cut) for batch, cut in zip(batches, cuts, strict=True)]
        losses = []
        for member, own, target, counted, share in zip(
            live, pieces, targets, counts, shares, strict=True
        ):
            wanted = send(target, self._device)
            loss = losses_.mean_loss(shape, own, wanted, counted) * share
            with torch.no_grad():
                right = losses_.right(shape, own, wanted, counted).mean() * share
                figures = torch.stack([loss.double(), right])
                member.window += figures
                member.recent += figures
            losses.append(loss)
        torch.autograd.backward(losses)
        return torch.stack([loss.detach() for loss in losses])

    def _counted(self, batch: Batch, cut: slice) -> Tensor | None:
        """Return which predictions of rows of a batch count; None: all of them."""
        if batch.lengths is None or not losses_.has_padding(self._model.shape):
            return None
        return losses_.counted(self._model.shape, send(batch.lengths[cut], self._device))

    def _logits(
        self, live: Sequence[Member], batches: Sequence[Batch], cuts: Sequence[slice]
    ) -> Tensor:
        """Return the logits of these rows of the batches of the step at hand."""
        sets = [self._features.of(member, self._source) for member in live]
        if not all(sets):
            rows = [batch.take(cut) for batch, cut in zip(batches, cuts, strict=True)]
            logits: Tensor = self._model(*inputs_of(rows, self._device))
            return logits
        read = []
        for member, features, cut in zip(live, sets, cuts, strict=True):
            assert features is not None
            assert isinstance(self._source, Stored)
            trial = member.trial
            index = self._source.index(
                trial.seed, random_streams.TRAINING, member.figures.step, trial.batch_size
            )
            read.append(features.take(index[cut]))
        return self._model.head(torch.cat(read))


def _share(shape: Shape, batch: Batch, cut: slice) -> float:
    """Return the part of a batch's predictions that these rows make, as far as they count."""
    rows = batch.lengths if losses_.has_padding(shape) else None
    if rows is None:
        rows = np.ones(len(batch))
    part: float = rows[cut].sum() / rows.sum()
    return part


def _update(member: Member, loss: Tensor) -> None:
    """Clip and apply one member's gradient, without waiting for the device."""
    trained = {n: p for n, p in member.trained.items() if p.grad is not None}
    gradients = [p.grad for p in trained.values() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if member.trial.optimizer.clip is not None:
        clip = member.trial.optimizer.clip
        torch.nn.utils.clip_grads_with_norm_(trained.values(), clip, norm)
    finite = torch.isfinite(loss) & torch.isfinite(norm)
    member.non_finite = torch.maximum(member.non_finite, (~finite).float())
    member.optimizer.step(trained, member.rate(), member.non_finite)
    for parameter in trained.values():
        parameter.grad = None
