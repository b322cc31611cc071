"""The script for those who have a GPU works: tried on a CPU, in its small sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.slow
def test_all_eleven_parts_hold_on_a_cpu(tmp_path: Path) -> None:
    done = run("--cpu", "--quick", "--out", str(tmp_path / "gpu.json"))

    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: part.get("why") for name, part in parts.items() if not part["holds"]} == {}
    assert [part["number"] for part in parts.values()] == list(range(1, 12))
    assert done.returncode == 0
    speeds = parts["throughput"]["figures"]["bit-xor"]
    assert "failed" not in str(speeds)


def test_a_part_that_is_not_done_in_time_has_failed(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"

    done = run("--cpu", "--quick", "--only", "faults", "--budget", "2", "--out", str(out))

    part = json.loads(out.read_text())["parts"]["faults"]
    assert done.returncode == 1
    assert part["why"].startswith("not done after")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_3() -> None:
    done = run()

    assert done.returncode == 3
    assert "no CUDA device" in done.stderr
