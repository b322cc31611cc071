"""The figures of a sweep where nothing happens: each trial alone, in this process, without Ray.

python quiet.py FILE OUTPUT
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

import fpt
from sweep.execution.worker import LOG_EVERY
from sweep.sweepfile.expansion import load

FIGURES = (
    "outcome", "stopped", "steps_trained", "best_step", "train_loss", "train_accuracy",
    "validation_loss", "validation_accuracy", "test_loss", "test_accuracy", "examples",
    "backbone_digest",
)  # fmt: skip
"""Columns of a trial's row that no accident may change in a bit."""


def main(file: str, output: str) -> None:
    """Train all, and write trial id -> figures, and then the curve."""
    torch.set_num_threads(1)
    sweep = load(file)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for point in (*sweep.pretrainings, *sweep.points):
            parent = {point.parent: Path(folder, point.parent)} if point.parent else {}
            training = fpt.train([point.config], backbones=parent, log_every=LOG_EVERY)
            curve = sorted([r.split, r.step, r.loss, r.accuracy] for r in training)
            outcome = training.outcomes[0]
            if point in sweep.pretrainings:
                Path(folder, point.trial_id).write_bytes(training.backbone(0))
            figures = vars(outcome) | {"steps_trained": outcome.steps}
            found[point.trial_id] = [*(figures[name] for name in FIGURES), curve]
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
