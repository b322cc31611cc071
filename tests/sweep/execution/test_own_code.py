"""Code of a user's own, from the first run to one after it was mended; a process a command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fpt.checkpoints import State
from fpt.config import TrialConfig
from fpt.files import DataError
from fpt.trainer import train
from sweep.ledger.ledger import Ledger

TASK = """
import numpy as np
import fpt
from waves.noise import SCALE

class Sign(fpt.Task):
    rows: int = 64

    def shape(self, protocol):
        return fpt.Shape(tokens=4, inputs=1, embedded=False, classes=2)

    def splits(self, protocol):
        def draw(rng, size):
            x = rng.standard_normal((size, 4, 1)).astype(np.float32)
            return fpt.Batch(x * SCALE, (x[:, -1] > 0).astype(np.int64))
        held = [fpt.Stored(draw(np.random.default_rng(n), self.rows)) for n in (1, 2)]
        return fpt.Splits(train=fpt.Generated(draw), validation=held[0], test=held[1])

    def baseline(self, protocol):
        return fpt.Baseline(0.5, "guess")
"""

SWEEP = """
sweep: own
trial:
  backbone: {name: transformer, layers: 1, width: 8, heads: 1}
  pretraining: random
  steps: 4
  evaluation: {every: 2}
axes: {task: [{name: "waves.sign:Sign", label: sign}, {name: bit-xor, label: xor}], seed: [0]}
table: {rows: seed, columns: task}
"""


def sweep(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "sweep", *words],
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def planned() -> dict[str, tuple[str, str | None]]:
    trials = json.loads(sweep("plan", "own.yaml", "--json"))["trials"]
    return {one["labels"]["task"]: (one["status"], one["why"]) for one in trials}


@pytest.mark.ray
@pytest.mark.slow
def test_what_other_code_gave_is_stale_and_trained_anew_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("waves").mkdir()
    Path("own.yaml").write_text(SWEEP)
    Path("waves/sign.py").write_text(TASK)
    Path("waves/noise.py").write_text("SCALE = 1\n")
    sweep("run", "own.yaml")
    assert {status for status, _ in planned().values()} == {"done"}
    before = {row["task"]: row for row in Ledger("results").trials().to_pylist()}

    Path("waves/noise.py").write_text("SCALE = 0.1\n")

    plan, table = planned(), sweep("table", "own.yaml", "--format", "csv")
    why = "trained with another waves/noise.py; `sweep run --stale` trains it anew"
    assert plan == {"sign": ("stale", why), "xor": ("done", None)}
    assert str(before["waves.sign:Sign"]["test_accuracy"])[:4] not in table
    sweep("run", "own.yaml", "--stale")
    assert {status for status, _ in planned().values()} == {"done"}
    after = {row["task"]: row for row in Ledger("results").trials().to_pylist()}
    one, other = before["waves.sign:Sign"], after["waves.sign:Sign"]
    assert one["trial_id"] == other["trial_id"]
    assert one["test_loss"] != other["test_loss"]
    codes = [json.loads(row["own_code"]) for row in (one, other)]
    assert codes[0].keys() == codes[1].keys() == {"waves/sign.py", "waves/noise.py"}
    assert codes[0]["waves/sign.py"] == codes[1]["waves/sign.py"]
    assert codes[0]["waves/noise.py"] != codes[1]["waves/noise.py"]
    assert before["bit-xor"] == after["bit-xor"]
    assert before["bit-xor"]["own_code"] is None


def test_a_state_keeps_the_code_that_trained_it() -> None:
    trial = TrialConfig.model_validate(
        {
            "task": "bit-xor",
            "backbone": {"name": "transformer", "layers": 1, "width": 8, "heads": 1},
            "pretraining": "random",
            "steps": 1,
            "seed": 0,
        }
    )
    training = train([trial])
    list(training)
    state = training.outcomes[0].state
    plain = state.to_bytes()

    state.code = {"tasks.py": "0" * 64}

    assert State.from_bytes(plain).code == {}
    assert State.from_bytes(state.to_bytes()).code == state.code
    assert len(repr(training.outcomes[0]).splitlines()) < 10
    assert len(repr(training.outcomes[0])) < 3000


def test_the_content_of_a_path_is_in_the_identity(tmp_path: Path) -> None:
    import fpt

    class Table(fpt.Task):
        name: str = "table"
        path: Path
        more: tuple[Path, ...] = ()

    for name, text in {"a/rows.csv": "1", "b.csv": "1", "c.csv": "2", "a/.hidden": "3"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def identity(path: str, *more: str) -> object:
        return Table(path=tmp_path / path, more=tuple(tmp_path / one for one in more)).identity()

    assert identity("a/rows.csv") == identity("b.csv") != identity("c.csv")
    assert identity("b.csv", "c.csv") != identity("b.csv", "b.csv")
    folder = identity("a")
    (tmp_path / "a/.hidden").write_text("4")
    assert identity("a") == folder
    (tmp_path / "a/rows.csv").rename(tmp_path / "a/others.csv")
    assert identity("a") != folder
    (tmp_path / "c.csv").write_text("1")
    assert identity("c.csv") == identity("b.csv")
    with pytest.raises(DataError, match=r"task table: path: .*/nothing.csv: is not there"):
        identity("nothing.csv")
