"""What docs/own-code.md shows is so: its example of a CSV is checked as `validate --code` does."""

import subprocess
import sys
from pathlib import Path

import numpy as np

PAGE = (Path(__file__).parents[1] / "docs/own-code.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    (found,) = (part for part in PAGE.split("```") if part.partition("\n")[2].startswith(name))
    return found.partition("\n")[2]


def test_the_task_of_a_csv_keeps_its_contract(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.integers(0, 3, (60, 1)), rng.standard_normal((60, 16))], 1)
    np.savetxt(tmp_path / "waves.csv", rows, delimiter=",")
    for name in ("waves.py", "waves.yaml"):
        (tmp_path / name).write_text(block(f"# {name}"))

    def validate() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sweep", "validate", "waves.yaml", "--code"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    done = validate()
    rows[7, 0] = 3
    np.savetxt(tmp_path / "waves.csv", rows, delimiter=",")
    wrong = validate()

    assert len((block("# waves.py") + block("# waves.yaml")).splitlines()) < 40
    assert (done.returncode, done.stderr) == (0, "")
    assert wrong.returncode == 2
    assert "waves.py:7: task waves:Waves: split" in wrong.stderr
    assert "targets have the value 3" in wrong.stderr
