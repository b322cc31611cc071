"""A batch that the public code would give twice is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweep.sweepfile.expansion import load


@pytest.mark.parametrize(
    ("protocol", "task", "batch", "told"),
    [
        ("paper", "digits", 32, True),
        ("paper", "digits", 16, False),
        ("paper", "bit-xor", 32, False),
        ("sound", "digits", 32, False),
    ],
)
def test_a_batch_above_16_under_paper_is_told(
    protocol: str, task: str, batch: int, told: bool, tmp_path: Path
) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "sweep: s\n"
        "trial:\n"
        "  backbone: {name: gpt2, layers: 1, width: 16, heads: 2}\n"
        f"  pretraining: random\n  steps: 2\n  protocol: {protocol}\n  batch_size: {batch}\n"
        f"axes: {{task: [{task}], seed: [0]}}\n"
    )

    warnings = load(file).warnings
    assert any("twice a step" in one for one in warnings) == told
