"""Figures of members on whole sets and on random batches, and which checkpoint they pick."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from fpt import random_streams
from fpt.checkpoints import Figures
from fpt.config import PlateauConfig
from fpt.metrics import measured
from fpt.model import Model
from fpt.tasks.base import FIXED_SET_SEED, Batch, Splits, Stored
from fpt.training import losses
from fpt.training.features import FeatureCache, Features, chunk_size
from fpt.training.feeding import inputs_of, send
from fpt.training.member import Member

DEVICE_TOKENS = 65536
"""Tokens of one forward pass for members that are measured together, as far as one batch of each
leaves a choice."""


class Measured(NamedTuple):
    """Of one member on one set of examples, dropout off."""

    loss: float
    """Mean cross entropy, in nats, or mean squared error."""
    accuracy: float | None
    """Fraction of predictions that are right; None of numbers."""
    metrics: dict[str, float | None]
    """The task's own, by name."""


def is_better(found: Measured, figures: Figures) -> bool:
    """Return whether a checkpoint is to be picked before the best so far: for its accuracy, and
    among equals for its loss; of numbers for its loss.
    """
    if figures.best_loss is None:
        return True
    if found.accuracy is None or figures.best_accuracy is None:
        return found.loss < figures.best_loss
    return (found.accuracy, -found.loss) > (figures.best_accuracy, -figures.best_loss)


def note(found: Measured, figures: Figures, stop: PlateauConfig | None) -> None:
    """Enter an evaluation at the step of `figures` into them."""
    if is_better(found, figures):
        figures.best_step = figures.step
        figures.best_loss, figures.best_accuracy, figures.best_metrics = found
    tolerance = 0.0 if stop is None else stop.tolerance
    if figures.lowest_loss is None or found.loss < figures.lowest_loss - tolerance:
        figures.lowest_loss, figures.stale = found.loss, 0
    else:
        figures.stale += 1


class Evaluator:
    """Measures members of a pack: each by itself, or all in one forward pass, as a device wants."""

    def __init__(
        self,
        model: Model,
        splits: Splits,
        features: FeatureCache,
        device: torch.device,
        *,
        together: bool,
    ) -> None:
        self._model = model
        self._splits = splits
        self._features = features
        self._device = device
        self._together = together
        # Hidden states are drawn by the number of a batch.
        self._merges = together and not getattr(model.backbone, "draws_hidden", False)
        self.split: Literal["validation", "test"] = (
            "test" if splits.validation is None else "validation"
        )
        """The split that picks checkpoints."""
        first = model.trials[0]
        self._metrics = first.task.metrics(first.protocol)

    def measure(self, members: Sequence[Member]) -> list[Measured]:
        """Return figures on the split that picks checkpoints, each member's at its step."""
        if self._splits.validation is not None:
            return self._on_set(members, self._splits.validation)
        factor = self._splits.factor
        return [
            one if one.accuracy is None else one._replace(accuracy=one.accuracy * factor)
            for one in self._on(members, self._random_batches)
        ]

    def measure_test(self, members: Sequence[Member]) -> list[Measured]:
        """Return figures on the whole test set (protocol sound)."""
        assert isinstance(self._splits.test, Stored)
        return self._on_set(members, self._splits.test)

    def measure_training(self, member: Member, size: int) -> Measured:
        """Return a member's figures on `size` training examples (or all, if they are fewer) as they
        are evaluated; of a task that is drawn anew at every step, on a fixed draw.
        """
        train, chunk = self._splits.train, chunk_size(self._model)
        batches: Iterable[Batch]
        if isinstance(train, Stored):
            batches = train.first(size).chunks(chunk)
        else:
            sizes = [min(chunk, size - start) for start in range(0, size, chunk)]
            batches = (
                train.batch(FIXED_SET_SEED, random_streams.TRAINING, n, rows)
                for n, rows in enumerate(sizes)
            )
        return self._on([member], lambda member: batches)[0]

    def _random_batches(self, member: Member) -> Iterator[Batch]:
        """Yield the random batches of an evaluation under the protocol paper."""
        trial = member.trial
        every, batches = trial.evaluation.every, trial.evaluation.batches
        first = -(-member.figures.step // every) * batches
        for n in range(first, first + batches):
            yield self._splits.test.batch(
                trial.seed, random_streams.EVALUATION, n, trial.batch_size
            )

    def _on_set(self, members: Sequence[Member], examples: Stored) -> list[Measured]:
        chunk = chunk_size(self._model)
        known = {m.index: self._features.of(m, examples) for m in members}
        return self._on(members, lambda member: examples.chunks(chunk), known)

    def _on(
        self,
        members: Sequence[Member],
        batches: Callable[[Member], Iterable[Batch]],
        features: Mapping[int, Features | None] | None = None,
    ) -> list[Measured]:
        """Return each member's figures on its batches, of which `features` may be known."""
        groups = [members] if self._together else [[member] for member in members]
        return [one for group in groups for one in self._of_group(group, batches, features or {})]

    @torch.no_grad()
    def _of_group(
        self,
        group: Sequence[Member],
        batches: Callable[[Member], Iterable[Batch]],
        features: Mapping[int, Features | None],
    ) -> list[Measured]:
        self._model.eval()
        pack, shape = self._model.members, self._model.shape
        outputs: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in group]
        sums = torch.zeros(len(group), 2, dtype=torch.float64, device=self._device)
        counts, starts = [0] * len(group), [0] * len(group)
        rounds = itertools.zip_longest(*map(batches, group))
        for number, held in enumerate(self._merged(rounds)):
            present = [n for n, own in enumerate(held) if own]
            rows = {group[n].index: sum(map(len, held[n])) for n in present}
            with pack.batch(rows, chunk=number):
                if any(features.get(group[n].index) is None for n in present):
                    every = [batch for n in present for batch in held[n]]
                    logits = self._model(*inputs_of(every, self._device))
                else:
                    read = []
                    for n in present:
                        known = features[group[n].index]
                        assert known is not None
                        end = starts[n] + rows[group[n].index]
                        read.append(known.take(np.arange(starts[n], end)))
                        starts[n] = end
                    logits = self._model.head(read[0] if len(read) == 1 else torch.cat(read))
                pieces = [piece for _, piece in pack.pieces(logits)]
            for n, own in zip(present, pieces, strict=True):
                target = send(np.concatenate([b.targets for b in held[n]]), self._device)
                padded = losses.has_padding(shape)
                lengths = [b.lengths for b in held[n] if padded and b.lengths is not None]
                real = send(np.concatenate(lengths), self._device) if lengths else None
                counted = losses.counted(shape, real)
                right = losses.right(shape, own, target, counted)
                loss = losses.of_each(shape, own, target, counted).double().sum()
                sums[n] += torch.stack([loss, right.sum()])
                counts[n] += len(right)
                if self._metrics:
                    kept = losses.per_token(shape, own, target, counted)
                    outputs[n].append((kept[0].cpu().numpy(), kept[1].cpu().numpy()))
        return [
            Measured(loss / n, None if shape.loss == "mse" else right / n, self._measured(rows))
            for (loss, right), n, rows in zip(sums.tolist(), counts, outputs, strict=True)
        ]

    def _measured(self, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float | None]:
        """Return the task's own metrics of outputs and targets."""
        if not rows:
            return {}
        return measured(self._metrics, *map(np.concatenate, zip(*rows, strict=True)))

    def _merged(
        self, rounds: Iterable[tuple[Batch | None, ...]]
    ) -> Iterator[tuple[list[Batch], ...]]:
        """Yield the batches of each member for a forward pass: of one round, or of as many as fill
        one.
        """
        room = 0
        held: tuple[list[Batch], ...] = ()
        for given in rounds:
            own = tuple([] if batch is None else [batch] for batch in given)
            tokens = sum(len(batch) for batch in given if batch) * self._model.shape.tokens
            if held and self._merges and tokens <= room:
                held = tuple(before + more for before, more in zip(held, own, strict=True))
                room -= tokens
                continue
            if held:
                yield held
            held, room = own, DEVICE_TOKENS - tokens
        if held:
            yield held
