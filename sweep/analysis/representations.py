"""How alike the representations of a sweep's trials are: between layers, arms, before and after.

Compared are trials of one task with one seed, on the same examples of its test set: each with
itself, before training and after it, and each arm with every other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING

from sweep.sweepfile.trials import Point

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

COLUMNS = (
    "task", "seed", "arm", "when", "layer", "other_arm", "other_when", "other_layer", "cka",
    "trial_id", "other_trial_id", "examples",
)  # fmt: skip
"""A row for each pair of representations. Layer 0 is what the first layer reads; the last one is
the backbone's output. `when` is before or after training. `cka` is debiased linear CKA."""

WHEN = ("before", "after")


def groups(points: Sequence[Point]) -> list[list[tuple[str, Point]]]:
    """Return the trials that can be compared with one another, each with the name of its arm.

    An arm is named by the labels of the axes in which the trials of a group differ.
    """
    found: dict[str, list[Point]] = {}
    for point in points:
        config = point.config
        key = f"{config.task.model_dump_json()} {config.protocol} {config.seed}"
        found.setdefault(key, []).append(point)
    named = []
    for own in found.values():
        axes = [axis for axis in own[0].labels if len({one.labels.get(axis) for one in own}) > 1]
        named.append([("/".join(one.labels.get(axis, "") for axis in axes), one) for one in own])
    return named


def compare(
    group: Sequence[tuple[str, Point]], folder: Path, examples: int
) -> Iterator[pd.DataFrame]:
    """Compare the trials of one group, and yield a frame for each pair of arms.

    Args:
        group: One of `groups`; all are finished, and their tensors were kept.
        folder: The ledger's folder.
        examples: Of the test set, at most.

    Yields:
        Frames with `COLUMNS`: within an arm all pairs of layers before training, after it, and
        before against after; between two arms all pairs of layers before, and after.

    Raises:
        fpt.files.DataError: If a trial's tensors, its backbone or the data are not there.
        ValueError: If a backbone has no layers that can be told apart, or there are too few
            examples.
    """
    import pandas as pd

    from fpt.representations import cka

    grams = {point.trial_id: _grams(point, folder, examples) for _, point in group}
    for (arm, one), (other_arm, other) in combinations_with_replacement(group, 2):
        same = one.trial_id == other.trial_id
        pairs = [(when, when) for when in WHEN] + ([WHEN] if same else [])
        yield pd.DataFrame(
            [
                (
                    one.config.task.name, one.config.seed, arm, when, layer,
                    other_arm, other_when, other_layer, cka(mine, theirs),
                    one.trial_id, other.trial_id, len(mine),
                )
                for when, other_when in pairs
                for layer, mine in enumerate(grams[one.trial_id][when])
                for other_layer, theirs in enumerate(grams[other.trial_id][other_when])
            ],
            columns=list(COLUMNS),
        )  # fmt: skip


def _grams(point: Point, folder: Path, examples: int) -> dict[str, list[np.ndarray]]:
    """Return the inner products of each layer's states, before training and after it."""
    from fpt.checkpoints import load_model
    from fpt.model import build_model
    from fpt.representations import evaluation_examples, gram, hidden_states

    config, parent = point.config, point.parent
    files = {} if parent is None else {parent: folder / "backbones" / f"{parent}.safetensors"}
    batch = evaluation_examples(config, examples)
    models = (build_model([config], backbones=files), load_model(point.trial_id, folder))
    return {
        when: [gram(states) for states in hidden_states(model, batch)]
        for when, model in zip(WHEN, models, strict=True)
    }
