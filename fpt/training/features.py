"""What a frozen model makes of a finite set, kept where it is the same at every step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fpt.model import Model
from fpt.tasks.base import Stored
from fpt.training.feeding import inputs_of
from fpt.training.member import Member

EVALUATION_TOKENS = 8192
"""Tokens of one forward pass in evaluation. Fixed, so that a pack does not change the sums."""

FEATURES_BYTES = 2**29
"""Features of one set of examples that are kept for one trial, at most."""


def chunk_size(model: Model) -> int:
    """Return the examples of one forward pass in evaluation."""
    return max(1, EVALUATION_TOKENS // model.shape.tokens)


class Features:
    """The features of one set of examples for one member, each computed when first wanted."""

    def __init__(self, model: Model, member: int, examples: Stored) -> None:
        self._model = model
        self._member = member
        self._examples = examples
        self._known = np.zeros(len(examples), dtype=bool)
        self._values: Tensor | None = None

    def take(self, index: np.ndarray) -> Tensor:
        """Return (len(index), read-out tokens, W): what the output layer reads of examples."""
        new, chunk = np.unique(index[~self._known[index]]), chunk_size(self._model)
        for start in range(0, len(new), chunk):
            rows = new[start : start + chunk]
            made = self._compute(rows)
            if self._values is None:
                self._values = made.new_empty(len(self._known), *made.shape[1:])
            self._values[torch.from_numpy(rows)] = made
        self._known[new] = True
        assert self._values is not None
        return self._values[torch.from_numpy(index)]

    @torch.no_grad()
    def _compute(self, rows: np.ndarray) -> Tensor:
        device = next(self._model.parameters()).device
        with self._model.members.batch({self._member: len(rows)}):
            return self._model.features(*inputs_of([self._examples.plain(rows)], device))


class FeatureCache:
    """The features of every set, for every member of a pack."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._known: dict[tuple[int, int], Features] = {}

    def __len__(self) -> int:
        return len(self._known)

    def of(self, member: Member, examples: object) -> Features | None:
        """Return the features of a set, if they are the same at every step: nothing below the
        output layer trains, nothing is dropped, nothing is augmented, and there is room.
        """
        trial, shape = member.trial, self._model.shape
        if (
            trial.train != ("output",)
            or trial.dropout
            or not isinstance(examples, Stored)
            or examples.augments
            or member.own_batches is not None
            or not trial.backbone.row.packs
            or len(examples) * shape.readout * trial.backbone.width * 4 > FEATURES_BYTES
        ):
            return None
        key = (member.index, id(examples))
        if key not in self._known:
            self._known[key] = Features(self._model, member.index, examples)
        return self._known[key]
