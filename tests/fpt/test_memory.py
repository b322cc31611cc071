"""Workers of one machine share a backbone's weights: they map one file, whose pages are common."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from fpt.config import TrialConfig
from fpt.model import build_model

WORKERS = 4

CODE = """
import json, re, sys
import torch
torch.set_num_threads(1)
from fpt import TrialConfig, train

def memory(of):
    total, inside = 0, False
    for line in open("/proc/self/smaps"):
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = of in line if of else len(line.split()) < 6 or "[heap]" in line
        elif inside and line.startswith("Pss:"):
            total += int(line.split()[1])
    return total * 1024

before = memory("")
trial = TrialConfig.model_validate(json.loads(sys.argv[1]))
training = train([trial], log_every=1)
next(training)
print("ready", flush=True)
sys.stdin.readline()
print(memory("model.safetensors"), memory("") - before, flush=True)
"""


@pytest.mark.slow
def test_four_workers_hold_the_weights_of_gpt2_base_once(tmp_path: Path) -> None:
    sound = {"task": "bit-xor", "steps": 1, "seed": 0, "pretraining": "random"}
    whole = build_model([TrialConfig.model_validate(sound | {"backbone": "gpt2"})]).member(0)
    tensors = {
        name.removeprefix("backbone."): parameter.detach()
        for name, parameter in whole.items()
        if name.startswith("backbone.")
    }
    save_file(tensors, tmp_path / "model.safetensors")
    sizes = {"n_layer": 12, "n_embd": 768, "n_head": 12}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    frozen = sum(p.numel() * 4 for n, p in tensors.items() if "ln_" not in n and "wpe" not in n)
    trial = {
        "task": "bit-xor", "steps": 100, "batch_size": 4, "seed": 0, "dropout": 0,
        "pretraining": "language",
        "backbone": {"name": "gpt2", "size": "base", "weights": str(tmp_path)},
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, json.dumps(trial)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(WORKERS)
    ]
    figures = []
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:  # all of them have touched every page by now
            output, _ = worker.communicate("go\n", timeout=600)
            figures.append([int(part) for part in output.split()])
    finally:
        for worker in workers:
            worker.kill()

    # A worker that has left no longer counts in the shares of the others: the first is the fairest.
    assert figures[0][0] * WORKERS <= 0.30 * WORKERS * frozen
    assert max(own for _, own in figures) < 0.30 * frozen
