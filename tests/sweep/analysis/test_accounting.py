"""Where the time went, by rows and notes that are written by hand."""

from __future__ import annotations

from pathlib import Path

from sweep.analysis.accounting import spent, spent_on
from sweep.ledger.ledger import Ledger
from sweep.sweepfile.expansion import load
from tests.support import failure_row, trial_row

FILE = """
sweep: small
trial:
  pretraining: random
  steps: 20
  task: {name: bit-xor, bits: 3}
  backbone: {name: gpt2, layers: 1, width: 8, heads: 1}
axes: {seed: [0, 1, 2, 3]}
"""


def test_time_is_in_rows_in_vain_or_done_twice(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(FILE)
    sweep = load(tmp_path / "small.yaml")
    ledger = Ledger(tmp_path / "results")
    a, b, c, _ = sweep.points
    ledger.commit(trial_row(a, seconds=10.0, device="cpu"))
    ledger.commit(trial_row(b, seconds=20.0, device="cuda"))
    notes = [
        (a, "a1", "worker", 3.0),
        (a, "a2", "worker", 4.0),
        (b, "a1", "doubled", 20.0),
        (b, "a2", "doubled", 5.0),
        (c, "a1", "code", 1.0),
        (c, "a2", "retried", None),
        (c, "a3", "interrupted", 0.0),
    ]
    for point, attempt, cause, lost in notes:
        ledger.fail(failure_row(point, attempt=attempt, cause=cause, lost=lost))

    found = spent(sweep, ledger)

    assert (found.trials, found.attempts) == (2, 8)
    assert (found.failed_attempts, found.stopped_attempts) == (3, 1)
    assert found.seconds == 30.0
    assert found.by_device == {"cpu": 10.0, "cuda": 20.0}
    assert found.lost == {"worker": 7.0, "doubled": 25.0, "code": 1.0}
    assert found.doubled == 1
    assert spent_on(None, ledger) == found
    assert spent_on([a.trial_id], ledger).lost == {"worker": 7.0}
