"""What docs/own-code.md shows is so: its example of a CSV is checked as `validate --code` does."""

import subprocess
import sys
from pathlib import Path

import numpy as np

PAGE = (Path(__file__).parents[1] / "docs/own-code.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    (found,) = (part for part in PAGE.split("```") if part.partition("\n")[2].startswith(name))
    return found.partition("\n")[2]


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sweep", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_task_of_a_series_keeps_its_contract(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    series = np.sin(np.arange(400) / 5) + rng.normal(0, 0.1, 400)
    np.savetxt(tmp_path / "series.txt", series)
    for name in ("ahead.py", "ahead.yaml"):
        (tmp_path / name).write_text(block(f"# {name}"))

    checked = sweep(tmp_path, "validate", "ahead.yaml", "--code")
    (tmp_path / "ahead.yaml").write_text(block("# ahead.yaml").replace("test_r2, ", "test_r, "))
    wrong = sweep(tmp_path, "validate", "ahead.yaml")

    assert len((block("# ahead.py") + block("# ahead.yaml")).splitlines()) < 40
    assert (checked.returncode, checked.stderr) == (0, "")
    assert wrong.returncode == 2
    assert "ahead.yaml:5: table.value[0]: 'test_r' is not known" in wrong.stderr
    assert "did you mean 'test_r2'" in wrong.stderr


def test_the_config_of_a_backbones_own_is_judged_at_its_line(tmp_path: Path) -> None:
    for name in ("conv.py", "conv.yaml"):
        (tmp_path / name).write_text(block(f"# {name}"))

    checked = sweep(tmp_path, "validate", "conv.yaml", "--code")
    (tmp_path / "conv.yaml").write_text(block("# conv.yaml").replace("[3, 5]", "[3, four, 6]"))
    wrong = sweep(tmp_path, "validate", "conv.yaml")

    assert (checked.returncode, checked.stderr) == (0, "")
    assert "conv.yaml:4: axes.backbone.kernel[1]: 'four' should be a valid integer" in wrong.stderr
    assert "conv.py:9: Conv.Config: raises ValueError: kernel 6 is even" in wrong.stderr


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
