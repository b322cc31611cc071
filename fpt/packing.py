"""Which trials can train as one program: by their configs alone, so that the planner can ask."""

from __future__ import annotations

from fpt.config import TrialConfig

RESIDENT_BYTES = 2**30
"""Of a GPU's memory, what the training set of a pack may take to be there once and for all; a
larger one stays on the host."""


def pack_key(trial: TrialConfig) -> tuple[object, ...]:
    """What trials of one pack have in common: the frozen weights, unless each may draw its own, and
    every tensor shape.
    """
    return (
        trial.task.shape(trial.protocol),
        trial.backbone,
        trial.pretraining,
        "a seed each" if draws_its_own(trial) else trial.drawn_from,
        trial.train,
        trial.numerics,
        # Rows beyond the pretrained position table are drawn from the trial's seed, but are a
        # member's own; the backbone's weights are what must be one.
    )


def packs(trial: TrialConfig) -> bool:
    """Whether a trial can train beside others: its backbone can be shared, and stays frozen."""
    own = {"input", "output", "norm", "position"}
    return trial.backbone.row.packs and set(trial.train) <= own


def draws_its_own(trial: TrialConfig) -> bool:
    """Whether a trial's seed draws its backbone, and a pack can hold several such backbones."""
    drawn = trial.drawn_from is not None and trial.backbone_seed is None
    return drawn and trial.backbone.row.packs_draws
