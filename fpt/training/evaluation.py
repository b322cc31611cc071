"""Figures of members on whole sets and on random batches, and which checkpoint they pick."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)

from fpt import random_streams
from fpt.checkpoints import Figures
from fpt.config import PlateauConfig
from fpt.model import Model
from fpt.tasks.base import FIXED_SET_SEED, Batch, Splits, Stored
from fpt.training.features import FeatureCache, Features, chunk_size
from fpt.training.feeding import inputs_of, send
from fpt.training.member import Member


class Metrics(NamedTuple):
    """Of one member on one set of examples, dropout off."""

    loss: float
    """Mean cross entropy, in nats."""
    accuracy: float
    """Fraction of predictions that are right."""


def is_better(metrics: Metrics, figures: Figures) -> bool:
    """Return whether a checkpoint is to be picked before the best so far: for its accuracy, and
    among equals for its loss.
    """
    if figures.best_loss is None or figures.best_accuracy is None:
        return True
    return (metrics.accuracy, -metrics.loss) > (figures.best_accuracy, -figures.best_loss)


def note(metrics: Metrics, figures: Figures, stop: PlateauConfig | None) -> None:
    """Enter an evaluation at the step of `figures` into them."""
    if is_better(metrics, figures):
        figures.best_step = figures.step
        figures.best_loss, figures.best_accuracy = metrics
    tolerance = 0.0 if stop is None else stop.tolerance
    if figures.lowest_loss is None or metrics.loss < figures.lowest_loss - tolerance:
        figures.lowest_loss, figures.stale = metrics.loss, 0
    else:
        figures.stale += 1


class Evaluator:
    """Measures members of a pack."""

    def __init__(
        self, model: Model, splits: Splits, features: FeatureCache, device: torch.device
    ) -> None:
        self._model = model
        self._splits = splits
        self._features = features
        self._device = device
        self.split: Literal["validation", "test"] = (
            "test" if splits.validation is None else "validation"
        )
        """The split that picks checkpoints."""

    def measure(self, member: Member) -> Metrics:
        """Return a member's metrics on the split that picks checkpoints, at its step."""
        if self._splits.validation is not None:
            return self._on_set(member, self._splits.validation)
        trial = member.trial
        every, batches = trial.evaluation.every, trial.evaluation.batches
        first = -(-member.figures.step // every) * batches
        loss, accuracy = self._on(
            member,
            (
                self._splits.test.batch(trial.seed, random_streams.EVALUATION, n, trial.batch_size)
                for n in range(first, first + batches)
            ),
        )
        return Metrics(loss, accuracy * self._splits.factor)

    def measure_test(self, member: Member) -> Metrics:
        """Return a member's metrics on the whole test set (protocol sound)."""
        assert isinstance(self._splits.test, Stored)
        return self._on_set(member, self._splits.test)

    def measure_training(self, member: Member, size: int) -> Metrics:
        """Return a member's metrics on `size` training examples (or all, if they are fewer) as they
        are evaluated; of a task that is drawn anew at every step, on a fixed draw.
        """
        train, chunk = self._splits.train, chunk_size(self._model)
        if isinstance(train, Stored):
            return self._on(member, train.first(size).chunks(chunk))
        sizes = [min(chunk, size - start) for start in range(0, size, chunk)]
        return self._on(
            member,
            (
                train.batch(FIXED_SET_SEED, random_streams.TRAINING, n, rows)
                for n, rows in enumerate(sizes)
            ),
        )

    def _on_set(self, member: Member, examples: Stored) -> Metrics:
        features = self._features.of(member, examples)
        return self._on(member, examples.chunks(chunk_size(self._model)), features)

    @torch.no_grad()
    def _on(
        self, member: Member, batches: Iterable[Batch], features: Features | None = None
    ) -> Metrics:
        """Return the metrics on batches, of which `features` may be known."""
        self._model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        count = start = 0
        for number, batch in enumerate(batches):
            with self._model.members.batch({member.index: len(batch)}, chunk=number):
                if features is None:
                    logits = self._model(*inputs_of([batch], self._device))
                else:
                    read = features.take(np.arange(start, start + len(batch)))
                    logits = self._model.head(read)
                    start += len(batch)
            logits = logits.flatten(0, 1)
            target = send(batch.targets, self._device).flatten()
            loss = F.cross_entropy(logits, target, reduction="none").double().sum()
            sums += torch.stack([loss, (logits.argmax(-1) == target).double().sum()])
            count += len(target)
        return Metrics(*(sums / count).tolist())
