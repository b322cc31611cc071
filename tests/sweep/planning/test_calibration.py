"""What a step takes on a GPU, from steps that were measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpt.config import TrialConfig
from sweep.ledger.ledger import Ledger
from sweep.planning.calibration import Measured, calibrated, fitted, keep, kept
from sweep.planning.packing import UNMEASURED_GPU, StepCosts, Workers, step_operations
from sweep.sweepfile.identity import cell_id, trial_id
from sweep.sweepfile.trials import Point
from tests.support import trial_row

MODEL = "NVIDIA H100 80GB HBM3"
GPU = Workers(1, gpus=1, gpu_name=MODEL)

SIZES = [(2, 1, 1e6), (2, 16, 16e6), (12, 1, 6e6), (12, 4, 24e6), (12, 4, 2.4e11), (12, 1, 6e10)]
"""Layers, members, operations."""


def steps(costs: StepCosts, noise: float = 0.0) -> list[Measured]:
    return [
        Measured(
            layers, members, operations,
            (layers * (costs.layer + members * costs.member) + operations / costs.speed)
            * (1 + noise * (-1) ** n),
        )
        for n, (layers, members, operations) in enumerate(SIZES)
    ]  # fmt: skip


@settings(deadline=None)
@given(st.floats(1e-5, 1e-3), st.floats(1e-6, 1e-4), st.floats(1e11, 1e13))
def test_costs_are_found_again(layer: float, member: float, speed: float) -> None:
    own = StepCosts(layer, member, speed)
    found = fitted(steps(own))
    assert found is not None
    for one in steps(own):
        again = one.layers * (found.layer + one.members * found.member)
        assert again + one.operations / found.speed == pytest.approx(one.seconds, rel=1e-6)


def test_noise_moves_costs_a_little_and_makes_none_negative() -> None:
    found = fitted(steps(UNMEASURED_GPU, 0.02))
    assert found is not None
    assert found.layer == pytest.approx(UNMEASURED_GPU.layer, rel=0.1)
    assert found.member == pytest.approx(UNMEASURED_GPU.member, rel=0.1)
    assert found.speed == pytest.approx(UNMEASURED_GPU.speed, rel=0.3)
    # Operations that take no time beside the noise tell no speed.
    assert fitted(steps(StepCosts(1e-5, 0.0078125, 4.4e14), 0.02)) is None


def test_what_does_not_tell_all_three_is_not_used() -> None:
    all_ = steps(UNMEASURED_GPU)
    assert fitted([]) is None
    assert fitted(all_[:2]) is None
    assert fitted([one for one in all_ if one.members == 1]) is None
    assert fitted([one._replace(layers=2, members=1) for one in all_]) is None


def point(seed: int, **fields: Any) -> Point:
    base = {"task": "bit-xor", "pretraining": "random", "backbone_seed": 0, "seed": seed}
    config = TrialConfig.model_validate(base | fields)
    return Point(trial_id(config), cell_id(config), config, {"seed": str(seed)}, "file.yaml:1")


def test_a_model_s_costs_are_kept_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FPT_SWEEP_CACHE", str(tmp_path))
    ledger, own = Ledger(tmp_path / "results"), StepCosts(1e-3, 2e-5, 4e13)
    assert kept(MODEL) is None
    path = keep(MODEL, own)
    assert kept(MODEL) == own
    assert kept("another") is None
    assert calibrated(GPU, ledger) == replace(GPU, costs=own)
    for workers in (Workers(2), replace(GPU, gpu_name=None), replace(GPU, gpu_name="another")):
        assert calibrated(workers, ledger) == workers
    for text in ("", "[]", "{}", '{"layer": -1, "member": 0, "speed": 1}', '{"layer": 1}'):
        path.write_text(text)
        assert kept(MODEL) is None


def test_the_ledger_has_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPT_SWEEP_CACHE", str(tmp_path))
    ledger, own = Ledger(tmp_path / "results"), StepCosts(2e-3, 1e-4, 5e13)
    keep(MODEL, StepCosts(1.0, 1.0, 1.0))
    flat = {"name": "gpt2", "layers": 2, "width": 32, "heads": 2}
    wide = {"name": "gpt2", "layers": 12, "width": 768, "heads": 12}
    deep = {"name": "gpt2", "layers": 12, "width": 64, "heads": 2}
    seed = 0
    for backbone, members in ((flat, 1), (flat, 8), (deep, 1), (deep, 8), (wide, 4), (wide, 1)):
        for _ in range(members):
            one = point(seed, batch_size=64, steps=1000, backbone=backbone)
            layers, operations = one.config.backbone.layers, step_operations(one.config)
            step = layers * (own.layer + members * own.member) + members * operations / own.speed
            row = trial_row(
                one, device="cuda", device_name=MODEL, pack_size=members,
                seconds=1000 * step / members,
            )  # fmt: skip
            ledger.commit(row)
            seed += 1
    found = calibrated(GPU, ledger).costs
    assert found.layer == pytest.approx(own.layer, rel=1e-3)
    assert found.member == pytest.approx(own.member, rel=1e-3)
    assert found.speed == pytest.approx(own.speed, rel=1e-3)
    assert calibrated(replace(GPU, gpu_name="another"), ledger).costs == UNMEASURED_GPU
