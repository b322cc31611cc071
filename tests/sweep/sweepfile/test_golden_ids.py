"""The ids of every file that ships, as they were when their trials were first made."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from fpt import TrialConfig
from sweep.sweepfile.expansion import load

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
FILES = sorted(file.relative_to(EXPERIMENTS).as_posix() for file in EXPERIMENTS.rglob("*.yaml"))
GOLDEN = json.loads(Path(__file__).with_name("golden_ids.json").read_text(encoding="utf-8"))
"""File -> how many trials it has where there is no data, and the SHA-256 of their sorted lines
`trial_id cell_id`. Of a file whose ids moved on purpose, its new line belongs here."""


def depends_on_the_machine(config: TrialConfig) -> bool:
    """Whether the id is a digest of data or weights that may not be installed."""
    of_package = (config.backbone.weights or "").startswith("package:")
    read = config.reads_weights or config.backbone.name == "auto"
    return getattr(config.task, "folder", None) is not None or (read and of_package)


def test_every_file_has_its_line() -> None:
    assert sorted(GOLDEN) == FILES


@pytest.mark.parametrize("name", FILES)
def test_ids_of_a_shipped_file_are_these(name: str, tmp_path: Path) -> None:
    file = tmp_path / "clone" / "experiments" / name  # a clone beside which there is no data
    file.parent.mkdir(parents=True)
    shutil.copy(EXPERIMENTS / name, file)

    points = [one for one in load(file).all if not depends_on_the_machine(one.config)]

    lines = sorted(f"{point.trial_id} {point.cell_id}" for point in points)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert GOLDEN[name] == {"trials": len(lines), "sha256": digest}
