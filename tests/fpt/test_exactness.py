"""The contract of packs, at length: a trial ends with the same bits whoever its neighbours are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fpt.checkpoints import State
from fpt.config import TrialConfig
from fpt.trainer import Outcome, Training, train

STEPS = 200


@pytest.fixture(scope="module")
def trials() -> list[TrialConfig]:
    """Sixteen trials that differ in all that members may differ in."""
    return [
        TrialConfig.model_validate(
            {
                "task": "bit-xor",
                "backbone": {"name": "gpt2", "layers": 2, "width": 64, "heads": 2},
                "pretraining": "random",
                "backbone_seed": 0,
                "steps": STEPS if seed % 4 else 120,
                "batch_size": (4, 2, 1, 8)[seed % 4],
                "dropout": (0.1, 0.3, 0.0)[seed % 3],
                "learning_rate": (1e-3, 3e-3)[seed % 2],
                "optimizer": {"clip": (1.0, None)[seed // 8]},
                "evaluation": {"every": 40},
                "seed": seed,
            }
        )
        for seed in range(16)
    ]


@pytest.fixture(scope="module")
def alone(trials: list[TrialConfig]) -> list[Outcome]:
    """How each of them ends by itself."""
    torch.set_num_threads(1)
    return [end(train([trial]))[0] for trial in trials]


def end(training: Training) -> dict[int, Outcome]:
    list(training)
    return training.outcomes


def assert_same(one: Outcome, other: Outcome) -> None:
    assert one.state.tensors.keys() == other.state.tensors.keys()
    for name, tensor in one.state.tensors.items():
        assert torch.equal(tensor, other.state.tensors[name]), name
    figures: Any = ("test_loss", "test_accuracy", "validation_loss", "train_loss", "best_step")
    assert [getattr(one, f) for f in figures] == [getattr(other, f) for f in figures]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 5, 16])
def test_packs_of_any_size_end_as_their_members_do_alone(
    size: int, trials: list[TrialConfig], alone: list[Outcome]
) -> None:
    # Trials of fewer steps leave on the way.
    for first in range(0, len(trials), size):
        for k, outcome in end(train(trials[first : first + size])).items():
            assert_same(outcome, alone[first + k])


@pytest.mark.slow
def test_members_that_leave_and_join_end_as_they_do_alone(
    trials: list[TrialConfig], alone: list[Outcome]
) -> None:
    # Five begin. Two of them leave, and go on beside eleven that begin then, in other places; the
    # three that stay end by themselves.
    training = train(trials[:5])
    left: dict[int, State] = {}
    for record in training:
        if record.step == 80 and training.settled and not left:
            left = {k: training.states()[k] for k in (1, 3)}
            for k in left:
                training.stop(k)
    for k in (0, 2, 4):
        assert_same(training.outcomes[k], alone[k])

    order = [5, 6, 3, 7, 8, 9, 10, 11, 12, 13, 1, 14, 15]
    joined = train([trials[k] for k in order], state=[left.get(k) for k in order])
    for place, outcome in end(joined).items():
        assert_same(outcome, alone[order[place]])
