"""Random streams: every random number of a trial is a pure function of where it is used.

A stream is a Philox generator keyed by (seed, stream, site) with the step in its counter. Nothing
is drawn in sequence across steps, so a resumed trial needs no generator state, and drawing more
from one stream (another evaluation interval, another pack) moves no number of another.
"""

from __future__ import annotations

import numpy as np

(
    INITIALISATION,
    TRAINING,
    EVALUATION,
    DROPOUT,
    BACKBONE,
    AUGMENTATION,
    SPLIT,
    STATISTICS,
    HIDDEN,
) = range(1, 10)
"""The streams: initial values of a trial's own layers; training examples; random evaluation
batches (protocol paper); dropout masks; random backbones; augmentation; fixed splits and generated
data sets, which belong to a task and not to a trial's seed; backbones redrawn from the statistics
of a pretrained one, which may itself have begun as a random one; the hidden states that a recurrent
backbone draws anew at every forward pass."""


def philox(seed: int, stream: int, step: int = 0, site: int = 0) -> np.random.Philox:
    """The counter-based bit generator of one place of use.

    Args:
        seed: A trial's seed (or a task's own constant), 0 <= seed < 2**63.
        stream: One of the constants above.
        step: The optimizer step, or any running number below 2**64.
        site: A number for the place within a step (a layer's dropout, a tensor), below 2**32.
    """
    key = np.array([seed, (stream << 32) | site], dtype=np.uint64)
    # The step sits in the third word: the words below it count blocks, 2**128 of them a step.
    return np.random.Philox(key=key, counter=np.array([0, 0, step, 0], dtype=np.uint64))


def generator(seed: int, stream: int, step: int = 0, site: int = 0) -> np.random.Generator:
    """A numpy generator over `philox(seed, stream, step, site)`."""
    return np.random.Generator(philox(seed, stream, step, site))
