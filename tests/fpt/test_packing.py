"""What may train side by side, and what a member that fails leaves behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fpt import random_streams
from fpt.config import TrialConfig
from fpt.packing import pack_key, packs
from fpt.tasks.base import Batch
from fpt.trainer import train
from tests.support import small


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"seed": 1}, True),
        ({"learning_rate": 1e-2}, True),
        ({"dropout": 0.5}, True),
        ({"batch_size": 7}, True),
        ({"steps": 99}, True),
        ({"optimizer": {"clip": None}}, True),
        ({"evaluation": {"every": 3}}, True),
        ({"task": {"name": "bit-xor", "bits": 3}}, False),
        ({"backbone": {"name": "gpt2", "layers": 1, "width": 32, "heads": 2}}, False),
        ({"train": ["input", "output"]}, False),
        ({"backbone_seed": 1}, False),
        ({"backbone_seed": None, "seed": 1}, False),
    ],
)
def test_members_share_weights_and_shapes_and_nothing_else(
    fields: dict[str, Any], same: bool, trial: Any
) -> None:
    assert (pack_key(trial(**fields)) == pack_key(trial())) == same


@pytest.mark.parametrize(
    ("name", "train", "expected"),
    [
        ("gpt2", "fpt", True),
        ("gpt2", ["input", "output"], True),
        ("gpt2", "all", False),
        ("gpt2", ["input", "attention:last"], False),
        ("bert", "fpt", True),
        ("lstm", "fpt", False),
    ],
)
def test_only_frozen_backbones_are_shared(
    name: str, train: Any, expected: bool, trial: Any
) -> None:
    assert packs(trial(backbone=small(name), train=train)) == expected


def test_the_question_needs_no_torch() -> None:
    code = "import sys, fpt.packing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class BrokenDataError(Exception):
    pass


def examples(trial: TrialConfig, steps: int) -> Iterator[Batch]:
    """The batches that a trial would draw by itself, and after so many an error."""
    source = trial.task.splits(trial.protocol).train
    for step in range(steps):
        yield source.batch(trial.seed, random_streams.TRAINING, step, trial.batch_size)
    raise BrokenDataError(f"after step {steps}")


@pytest.mark.parametrize("broken", [[0], [1], [2], [0, 2]])
def test_a_member_whose_data_raises_leaves_and_the_others_go_on_to_the_bit(
    broken: list[int], trial: Any
) -> None:
    trials = [trial(seed=seed, dropout=0.1) for seed in range(3)]
    whole = train(trials)
    list(whole)

    given = [examples(one, 7 if k in broken else one.steps) for k, one in enumerate(trials)]
    training = train(trials, batches=given)
    with pytest.raises(BrokenDataError, match="after step 7"):
        list(training)

    assert list(training.failures) == broken
    assert training.outcomes.keys() == {0, 1, 2} - set(broken)
    for k, outcome in training.outcomes.items():
        expected = whole.outcomes[k]
        assert (outcome.test_loss, outcome.steps) == (expected.test_loss, expected.steps)
        tensors = expected.state.tensors
        assert all(torch.equal(outcome.state.tensors[name], tensors[name]) for name in tensors)
