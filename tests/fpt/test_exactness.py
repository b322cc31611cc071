"""The contract of packs, at length: a trial ends with the same bits whoever its neighbours are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fpt import exactness
from fpt.checkpoints import State
from fpt.config import TrialConfig
from fpt.model import build_model
from fpt.trainer import Outcome, train
from tests.support import PACKED, assert_same, end, small

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


# --- what a processor does is measured


class Kernels(TorchDispatchMode):
    """Kernels that add in another order, by the numbers of rows (or of matrices) of a product."""

    def __init__(
        self,
        by_rows: Callable[[int], int] = lambda rows: 0,
        by_matrices: Callable[[int], int] = lambda matrices: 0,
    ) -> None:
        super().__init__()
        self.orders = {
            torch.ops.aten.mm.default: by_rows,
            torch.ops.aten.addmm.default: by_rows,
            torch.ops.aten.bmm.default: by_matrices,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if func in self.orders:
            for _ in range(self.orders[func](len(out))):
                out = torch.nextafter(out, torch.tensor(torch.inf))
        return out


@pytest.fixture
def measured_anew() -> Iterator[None]:
    """Nothing is known of the kernels before, and nothing of made ones after."""
    exactness.forget()
    yield
    exactness.forget()


@pytest.mark.usefixtures("measured_anew")
@pytest.mark.parametrize(
    ("odd", "padding"),
    [
        (lambda rows: rows < 16, 16),
        (lambda rows: rows == 16, 32),
        (lambda rows: rows == 80, 32),
        (lambda rows: rows % 32, 32),
        (lambda rows: rows in (16, 32), 64),
        (lambda rows: rows % 64, 64),
        (lambda rows: rows > 300, 0),
        (lambda rows: rows // 64, 0),
    ],
)
def test_the_least_padding_that_is_exact_is_found(
    odd: Callable[[int], int], padding: int, trial: Any
) -> None:
    model = build_model([trial(), trial(seed=1)])

    with Kernels(odd):
        assert exactness.row_multiple(model) == padding


@pytest.mark.usefixtures("measured_anew")
def test_a_trial_is_padded_alone_as_in_a_pack(trial: Any) -> None:
    trials = [trial(seed=seed, batch_size=1 + seed, dropout=0.1) for seed in range(3)]
    with Kernels(lambda rows: rows in (16, 48)):
        pack = train(trials)
        assert pack.row_padding == 32
        ends = end(pack)
        for k, one in enumerate(trials):
            alone = train([one])
            assert alone.row_padding == 32
            assert_same(end(alone)[0], ends[k])


@pytest.mark.usefixtures("measured_anew")
def test_a_pack_is_refused_where_its_members_would_have_other_bits(trial: Any) -> None:
    trials = [trial(seed=seed, dropout=0.1) for seed in range(3)]
    # Attention: a matrix for each sequence and head, 8 alone and 24 together.
    with Kernels(by_matrices=lambda matrices: matrices > 8):
        assert train(trials).row_padding == 0
        assert train(trials[:1]).row_padding == 16
        # Where nothing is dropped, it is no batched product.
        assert train([one.model_copy(update={"dropout": 0.0}) for one in trials]).row_padding == 16
    exactness.forget()
    assert train(trials).row_padding == 16


@pytest.mark.usefixtures("measured_anew")
def test_what_cannot_be_exact_is_not_measured(trial: Any) -> None:
    with Kernels(lambda rows: rows // 64):
        assert train([trial(train="all")]).row_padding is None
        assert train([trial(backbone=small("lstm"))]).row_padding is None
        assert train([trial()]).row_padding == 0


@pytest.mark.usefixtures("measured_anew")
def test_measuring_moves_nothing(trial: Any) -> None:
    trials = [trial(seed=seed, dropout=0.1) for seed in range(2)]
    measured, plain = train(trials), train(trials)
    assert measured.row_padding == 16
    assert measured.row_padding is not None
    ends = end(plain)
    for k, outcome in end(measured).items():
        assert_same(outcome, ends[k])


DISPATCH = {
    "ATEN_CPU_CAPABILITY": ("default", "avx2"),
    "ONEDNN_MAX_CPU_ISA": ("SSE41", "AVX2"),
    "MKL_ENABLE_INSTRUCTIONS": ("SSE4_2", "AVX2"),
    "MKL_CBWR": ("COMPATIBLE", "AUTO,STRICT"),
}
"""What makes the libraries choose other kernels than this processor's own."""


@pytest.mark.parametrize(
    ("variable", "value", "backbones"),
    [
        ("ATEN_CPU_CAPABILITY", "default", ["gpt2", "t5"]),
        *(
            pytest.param(variable, value, PACKED, marks=pytest.mark.slow)
            for variable, values in DISPATCH.items()
            for value in values
        ),
    ],
)
def test_packs_are_exact_or_refused_on_other_kernels(
    variable: str, value: str, backbones: list[str]
) -> None:
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.fpt.dispatch", *backbones],
        capture_output=True, text=True, check=True, cwd=root,
        env={**os.environ, variable: value},
    )  # fmt: skip
    found = json.loads(ran.stdout)
    assert list(found) == backbones
    for name, (padding, same, one_column) in found.items():
        assert same or padding == 0, name
        assert one_column or padding == 0, name
