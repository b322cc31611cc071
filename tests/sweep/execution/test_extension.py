"""A longer training of a trial that was trained: only the steps that are new are trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweep.execution import worker
from sweep.ledger.columns import FIGURES
from sweep.ledger.ledger import Ledger
from sweep.planning.plan import plan
from sweep.sweepfile.expansion import load
from tests.support import job

FILE = """\
sweep: longer
trial:
  task: {{name: bit-xor, bits: 3, examples: 50}}
  backbone: {{name: gpt2, layers: 1, width: 8, heads: 1}}
  pretraining: random
  batch_size: 4
  evaluation: {{every: 10}}
  steps: {steps}
axes:
  seed: [0, 1]
pack: off
"""


def train_all(file: Path, ledger: Ledger) -> None:
    for pack in plan(file, ledger).packs:
        attempt = job(*pack.points, extends=pack.extends)
        assert [r.status for r in worker.run_pack(attempt, ledger)] == ["done"]


@pytest.mark.parametrize("protocol", ["sound", "paper"])
def test_it_ends_as_one_run_and_has_the_whole_curve(tmp_path: Path, protocol: str) -> None:
    ledgers = [Ledger(tmp_path / name, write=True) for name in ("grown", "whole")]
    file = tmp_path / "longer.yaml"
    text = FILE.replace("batch_size", f"protocol: {protocol}\n  batch_size")
    file.write_text(text.format(steps=20))
    train_all(file, ledgers[0])
    short = {point.config.seed: point.trial_id for point in load(file).points}
    file.write_text(text.format(steps=50))
    for ledger in ledgers:
        train_all(file, ledger)

    for point in load(file).points:
        grown, whole = (ledger.trials([point.trial_id]).to_pylist()[0] for ledger in ledgers)
        assert grown["extended_from"] == short[point.config.seed]
        assert whole["extended_from"] is None
        assert {f: grown[f] for f in FIGURES} == {f: whole[f] for f in FIGURES}
        curves = [
            {
                (row["split"], row["step"]): (row["loss"], row["accuracy"])
                for row in ledger.curves([point.trial_id]).to_pylist()
            }
            for ledger in ledgers
        ]
        assert curves[0] == curves[1]
