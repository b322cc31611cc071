"""What a training step costs: trials alone and in packs, against the loop of the paper's code.

    python benchmarks/throughput.py [--quick] [--rounds 3] [--only REGEX] [--quickstart [ROUNDS]]

Times are CPU time of this process, at one thread, per step of one trial: what a worker a core gets.
Rivals take turns in one run; a ratio is the median over the rounds of the two times of one round,
with its range. Weights are random, which changes no time. Both sides are handed the same examples,
drawn beforehand: making them is in no time, nor is evaluation. The paper's loop is written anew
from the paper and the behaviour of its public code, on transformers as they are.

The memory of a further member is the difference of the peaks of two processes that train packs of
different sizes. The last table says where our step spends its time, under PyTorch's profiler, which
slows small operations down: read its shares, not its times; there, making the examples is included.

`--quickstart` takes minutes more: the wall clock of the whole quickstart under Ray Tune, packs off
and on in turn, as the ratio of the two of each round. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import GPT2Config, GPT2Model

from fpt import pack_layers, precision, random_streams, trainer
from fpt.config import TrialConfig
from fpt.tasks import TASKS
from fpt.tasks.base import Batch, ProtocolName, Shape, Splits, Stored, Task
from fpt.training import feeding, stepping

ROOT = Path(__file__).parents[1]

NEVER = 10**9
"""Steps that no benchmark reaches."""

DRAWN = 4
"""Different batches of a member, used in turn."""


class Cifar10Shapes(Task):
    """Noise in the shapes of CIFAR-10: 64 patches of 48, ten classes."""

    name: Literal["benchmark:Cifar10Shapes"] = "benchmark:Cifar10Shapes"

    def shape(self, protocol: ProtocolName) -> Shape:
        """Those of fpt.tasks.images."""
        return Shape(tokens=64, inputs=48, embedded=False, classes=10)

    def splits(self, protocol: ProtocolName) -> Splits:
        """Sixty-four examples, everywhere."""
        rng = np.random.default_rng(0)
        inputs = rng.standard_normal((64, 64, 48), dtype=np.float32)
        noise = Stored(Batch(inputs, rng.integers(0, 10, (64, 1))))
        return Splits(train=noise, validation=noise, test=noise)


@dataclass(frozen=True)
class Row:
    """A kind of trial, and how many of it make a pack."""

    name: str
    task: Task
    batch: int
    pack: int
    backbone: dict[str, Any]
    dropout: float = 0.0
    numerics: precision.Numerics = "fp32"
    steps: int = 1
    """Steps of a rival's turn."""
    draws: bool = False
    """Whether each trial draws a backbone of its own."""

    def trials(self, count: int) -> list[TrialConfig]:
        """Trials that differ in seed."""
        fields = {
            "task": self.task,
            "backbone": self.backbone,
            "pretraining": "random",
            "backbone_seed": None if self.draws else 0,
            "batch_size": self.batch,
            "dropout": self.dropout,
            "numerics": self.numerics,
            "steps": NEVER,
            "evaluation": {"every": NEVER},
        }
        return [TrialConfig.model_validate(fields | {"seed": seed}) for seed in range(count)]

    def batches(self, trial: TrialConfig) -> Iterator[Batch]:
        """A trial's examples, drawn now and handed out for ever."""
        train = self.task.splits("sound").train
        return itertools.cycle(
            [train.batch(trial.seed, random_streams.TRAINING, n, self.batch) for n in range(DRAWN)]
        )


def rows(quick: bool) -> dict[str, Row]:
    """The rows by name; `quick`: the same ones in a size of seconds."""
    base: dict[str, Any] = {"name": "gpt2", "size": "base"}
    tiny: dict[str, Any] = {"name": "gpt2", "size": "tiny"}
    xor = TASKS["bit-xor"](name="bit-xor")
    memory = TASKS["bit-memory"](name="bit-memory")
    if quick:
        base = tiny = {"name": "gpt2", "layers": 2, "width": 32, "heads": 2}
        memory = TASKS["bit-memory"].model_validate({"strings": 2, "bits": 20, "patch": 10})
    cifar = Cifar10Shapes()
    large = [
        Row("bit-xor", xor, 4, 16, base, steps=2),
        Row("bit-memory", memory, 4, 4, base),
        Row("cifar10", cifar, 16, 2, base),
    ]
    all_rows = [
        *large,
        Row("bit-memory, dropout 0.1", memory, 4, 4, base, dropout=0.1),
        *(replace(row, name=f"{row.name}, bf16", numerics="bf16") for row in large),
        Row("tiny, 40 rows", xor, 4, 16, tiny, steps=20),
        Row("tiny, 160 rows", xor, 16, 16, tiny, steps=10),
        Row("tiny, 160 rows, dropout 0.1", xor, 16, 16, tiny, dropout=0.1, steps=10),
        Row("tiny, 40 rows, a draw each", xor, 4, 16, tiny, steps=20, draws=True),
        Row("tiny, 160 rows, a draw each", xor, 16, 4, tiny, steps=10, draws=True),
    ]
    return {row.name: replace(row, steps=1) if quick else row for row in all_rows}


class PaperModel(nn.Module):
    """Input layer, GPT-2 of transformers, output layer (arXiv 2103.05247, section 2)."""

    def __init__(self, trial: TrialConfig) -> None:
        super().__init__()
        self.shape = trial.task.shape("sound")
        width, dropout = trial.backbone.width, trial.dropout
        first = nn.Linear(self.shape.inputs, width)
        nn.init.orthogonal_(first.weight, gain=1.41)
        nn.init.zeros_(first.bias)
        self.input = nn.Sequential(first, nn.Dropout(dropout))
        self.transformer = GPT2Model(
            GPT2Config(
                n_embd=width,
                n_layer=trial.backbone.layers,
                n_head=trial.backbone.heads,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
            )
        )
        self.output = nn.Linear(width, self.shape.outputs * self.shape.classes)
        for name, parameter in self.transformer.named_parameters():
            parameter.requires_grad_("ln_" in name or "wpe" in name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, F) to (B x P, classes)."""
        states = self.transformer(inputs_embeds=self.input(x)).last_hidden_state
        logits: torch.Tensor = self.output(states[:, -self.shape.readout :])
        return logits.reshape(-1, self.shape.classes)


Turn = Callable[[int], None]
"""Trains so many steps."""


def paper(row: Row) -> Turn:
    """One trial in the loop of the paper's code."""
    (trial,) = row.trials(1)
    torch.manual_seed(trial.seed)
    model = PaperModel(trial)
    # All parameters, the frozen ones too, as there: they never get a gradient.
    optimizer = torch.optim.Adam(model.parameters(), lr=trial.learning_rate)
    criterion = nn.CrossEntropyLoss()
    batches = row.batches(trial)
    model.train()

    def turn(steps: int) -> None:
        losses, accuracy = [], 0.0
        for _ in range(steps):
            batch = next(batches)
            x, y = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets).flatten()
            out = model(x)
            loss = criterion(out, y)
            right = out.detach().cpu().numpy().argmax(-1) == y.detach().cpu().numpy()
            accuracy += right.mean()
            loss.backward()
            losses.append(loss.detach().cpu().item())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return turn


def ours(row: Row, count: int, *, draws: bool = False, turn: int | None = None) -> Turn:
    """A pack of `count` trials in our trainer.

    `draws`: it makes its own examples. A turn's steps are fixed beforehand, as the interval of the
    records: `turn`, or the row's.
    """
    trials = row.trials(count)
    steps = turn or row.steps
    training = trainer.train(
        trials,
        batches=None if draws else [row.batches(trial) for trial in trials],
        log_every=steps,
    )

    def take(asked: int) -> None:
        assert asked == steps
        for _ in trials:
            record = next(training)
        assert training.settled
        assert not np.isnan(record.loss)

    return take


def cpu_seconds(turn: Turn, steps: int) -> float:
    """CPU time of a turn."""
    began = time.process_time()
    turn(steps)
    return time.process_time() - began


@dataclass(frozen=True)
class Timing:
    """CPU seconds per trial-step of each rival of a row, a value a round."""

    row: Row
    seconds: dict[str, list[float]]

    def ratio(self, slower: str, faster: str) -> tuple[float, float, float]:
        """Median, least and greatest of the ratio over the rounds."""
        each = [a / b for a, b in zip(self.seconds[slower], self.seconds[faster], strict=True)]
        return statistics.median(each), min(each), max(each)


def measure(row: Row, rounds: int) -> Timing:
    """Let the paper's loop, one trial and a pack take turns."""
    pack = f"pack of {row.pack}"
    rivals = {
        "paper": (paper(row), 1),
        "alone": (ours(row, 1), 1),
        pack: (ours(row, row.pack), row.pack),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(rounds + 1):
        for name, (turn, count) in rivals.items():
            spent = cpu_seconds(turn, row.steps)
            if number:  # the first round warms up
                seconds[name].append(spent / row.steps / count)
    return Timing(row, seconds)


# Memory


def peak_megabytes(row: Row, count: int) -> dict[str, float]:
    """Of this process: the peak of resident memory in a step, and what it holds between steps."""
    turn = ours(row, count) if count else paper(row)
    turn(row.steps)  # the optimizer's moments are there from now on
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of building the model
    turn(row.steps)

    def line(file: str, key: str) -> float:
        found = re.search(rf"^{key}:\s+(\d+) kB", Path(file).read_text(), flags=re.MULTILINE)
        assert found is not None
        return int(found[1]) / 1000

    return {
        "peak": line("/proc/self/status", "VmHWM"),
        "between": line("/proc/self/smaps_rollup", "Pss"),
    }


def memory_of(row: Row, count: int, quick: bool) -> dict[str, float]:
    """`peak_megabytes` in a process of its own; a count of 0 is the paper's loop."""
    command = [sys.executable, __file__, "--memory", row.name, "--members", str(count)]
    done = subprocess.run(command + ["--quick"] * quick, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def quickstart_seconds(pack: str) -> float:
    """Wall clock of `sweep run` on the quickstart, with packs `auto` or `off`."""
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        file = Path(folder) / "quickstart.yaml"
        text = (ROOT / "experiments/quickstart.yaml").read_text(encoding="utf-8")
        file.write_text(f"{text}\npack: {pack}\n", encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "sweep",
            "run",
            str(file),
            "--results",
            f"{folder}/results",
        ]
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        return time.perf_counter() - began


def quickstart(rounds: int) -> str:
    """Run the quickstart with packs off and on in turn; the bar's line, a ratio of each round."""
    print("\nthe quickstart's wall clock, s")
    gains = []
    for number in range(rounds):
        # Each comes first as often, should the machine grow warm or tired.
        order = ("off", "auto") if number % 2 == 0 else ("auto", "off")
        seconds = {pack: quickstart_seconds(pack) for pack in order}
        gains.append(seconds["off"] / seconds["auto"])
        print(f"packs off {seconds['off']:.1f}, on {seconds['auto']:.1f}: {gains[-1]:.3f}x")
    spread = {"range": [round(min(gains), 3), round(max(gains), 3)]}
    name = "quickstart: wall clock, packs off / on"
    return bar(name, statistics.median(gains), 1.1, 1.25, "higher", **spread)


# Where the time goes

KINDS = {
    "matrix products": r"aten::(mm|addmm|bmm|baddbmm|matmul|linear|mkldnn_linear)$",
    "attention": r"aten::.*scaled_dot_product|aten::_?softmax|aten::_softmax_backward",
    "layer norms": r"aten::native_layer_norm",
    "gelu": r"aten::gelu|aten::tanh",
    "copies": r"aten::(copy_|cat|clone|contiguous|_to_copy|constant_pad_nd|fill_|zero_|zeros|pad"
    r"|slice_backward|select_backward|empty|empty_like|empty_strided|split_with_sizes|narrow)",
    "sums and products of elements": r"aten::(add|mul|sub|div|sum|where|masked_fill)",
    "other operations": r"aten::|autograd::|torch::",
}
"""Kind -> regular expression over the names of operations; the first match counts."""

RANGES = {
    "clipping, Adam": (stepping, "_update"),
    "examples": (feeding.Feeding, "batches"),
    "dropout masks": (pack_layers.Dropout, "masks"),
}
"""Kind -> what of ours has its whole time counted as that kind."""

STEP = "Python"
"""What is in no operation and no range."""


def shares(row: Row, count: int) -> Counter[str]:
    """Kind -> microseconds of a trial-step, under the profiler."""

    def named(kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with record_function(kind):
                return method(*args, **kwargs)

        return inside

    steps = max(2, 20 // count)
    turn = ours(row, count, draws=True, turn=steps)
    turn(steps)
    with ExitStack() as stack:
        for kind, (owner, name) in RANGES.items():
            stack.enter_context(mock.patch.object(owner, name, named(kind, getattr(owner, name))))
        seen = stack.enter_context(profile(activities=[ProfilerActivity.CPU]))
        with record_function(STEP):
            turn(steps)
    spent: Counter[str] = Counter()
    for event in seen.events() or ():
        kind = next((k for k, r in KINDS.items() if re.match(r, event.name)), STEP)
        above = event
        while above is not None:
            kind = above.name if above.name in RANGES else kind
            above = above.cpu_parent
        spent[kind] += event.self_cpu_time_total / steps / count
    return spent


# Printing


def show(timing: Timing) -> None:
    """A row's lines of the table."""
    for name, each in timing.seconds.items():
        median, low, high = timing.ratio("paper", name)
        print(
            f"{timing.row.name:28} {name:11} {1000 * statistics.median(each):9.2f} ms "
            f"[{1000 * min(each):8.2f} .. {1000 * max(each):8.2f}]  "
            f"{median:5.2f}x the paper's loop [{low:.2f} .. {high:.2f}]",
            flush=True,
        )


def refused(row: Row) -> str | None:
    """Why a row is not measured on this processor, if it is not."""
    amx = precision.AMX in (precision.cpu_capabilities() or ())
    without = None if row.numerics == "fp32" or amx else "this processor has no AMX"
    return precision.refusal(row.numerics) or without


def device_step(row: Row, count: int) -> tuple[int, int]:
    """Operations of a step on the device path, views left out, and of them those whose result the
    host has to wait for: counted on tensors of the CPU, and so of any machine.
    """
    from gpu import VIEWS, WAITS, Watch  # beside this file; it imports this one

    training = trainer.train(row.trials(count), device_path=True)
    training.step()
    with Watch() as watch:
        training.step()
    computed = sum(n for name, n in watch.count.items() if name not in VIEWS)
    return computed, sum(watch.count[name] for name in WAITS)


def bar(name: str, value: float | None, must: float, aim: float, better: str, **more: Any) -> str:
    """A bar's line of JSON; the value null where it cannot be measured."""
    rounded = None if value is None else round(value, 3)
    return json.dumps(
        {"bar": name, "value": rounded, "must": must, "aim": aim, "better": better} | more
    )


BARS = {
    "bit-xor": ("paper", 2.2, 2.6),
    "bit-memory": ("paper", 1.3, 1.45),
    "cifar10": ("paper", 1.2, 1.3),
    "bit-memory, dropout 0.1": ("paper", 1.2, 1.45),
    "bit-xor, bf16": ("paper", 5.4, 8),
    "bit-memory, bf16": ("paper", 3.0, 4.5),
    "cifar10, bf16": ("paper", 3.3, 4.5),
    "tiny, 40 rows": ("alone", 2.2, 3),
    "tiny, 160 rows": ("alone", 1.3, 1.8),
}
"""Row -> what its pack is compared with, and by what factor it must, and should, be faster."""

MEMORY = {"bit-xor": (4, 16, 30, 15), "bit-memory": (1, 4, 290, 150)}
"""Row -> two sizes of a pack, and the megabytes that a further member may, and should, cost."""

PROFILES = ("bit-xor", "tiny, 40 rows", "tiny, 160 rows", "tiny, 160 rows, dropout 0.1")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes and two rounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="regular expression: rows to measure")
    parser.add_argument(
        "--quickstart", nargs="?", type=int, const=3, default=0, metavar="ROUNDS",
        help="run the quickstart, packs off and on in turn, so many times each (3), too",
    )  # fmt: skip
    parser.add_argument("--memory", help="print the memory of a row and end")
    parser.add_argument("--members", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = rows(options.quick)
    small = "quick, not the bar's shapes: " if options.quick else ""
    if options.memory:
        print(json.dumps(peak_megabytes(table[options.memory], options.members)))
        return
    rounds = 2 if options.quick else options.rounds
    wanted = [row for name, row in table.items() if re.search(options.only, name)]
    bars = []

    print(f"torch {torch.__version__}, one thread; load {os.getloadavg()[0]:.1f} on", end=" ")
    print(f"{os.cpu_count()} cores; CPU time per trial-step, median of {rounds} rounds [range]")
    for row in wanted:
        reason = refused(row)
        if reason is None:
            timing = measure(row, rounds)
            show(timing)
        else:
            print(f"{row.name:28} n/a: {reason}")
        if row.name in BARS:
            rival, must, aim = BARS[row.name]
            name = f"{small}{row.name}: pack of {row.pack} against {rival}, x"
            if reason is None:
                value, low, high = timing.ratio(rival, f"pack of {row.pack}")
                spread = {"range": [round(low, 3), round(high, 3)]}
                bars.append(bar(name, value, must, aim, "higher", **spread))
            else:
                bars.append(bar(name, None, must, aim, "higher", reason=reason))
        gc.collect()

    print("\nresident memory, MB: peak in a step, and between steps")
    for row in wanted:
        if row.name not in MEMORY or (options.quick and row.name != "bit-xor"):
            continue
        few, many, must, aim = MEMORY[row.name]
        sizes = {n: memory_of(row, n, options.quick) for n in (0, few, many)}
        for count, found in sizes.items():
            who = f"pack of {count}" if count else "paper"
            print(f"{row.name:28} {who:11} {found['peak']:8.0f} {found['between']:8.0f}")
        name = f"{small}{row.name}: memory of a further member, MB"
        further = (sizes[many]["peak"] - sizes[few]["peak"]) / (many - few)
        bars.append(bar(name, further, must, aim, "lower"))

    if (row := table["bit-xor"]) in wanted:
        computed, waits = device_step(row, 16)
        name = f"{small}operations a step, 16 members, device path"
        bars.append(bar(name, computed, 500, 400, "lower"))
        bars.append(bar(f"{small}waits for the device in a step", waits, 0, 0, "lower"))

    if options.quickstart:
        bars.append(quickstart(options.quickstart))

    print("\nwhere a step goes: us per trial-step under the profiler, and share")
    for row in wanted:
        if row.name not in PROFILES:
            continue
        for count in (1, row.pack):
            spent = shares(row, count)
            total = sum(spent.values())
            print(f"{row.name}, {count} member{'s' * (count > 1)}: {total:.0f} us")
            for kind, micros in spent.most_common():
                print(f"  {kind:32} {micros:9.0f} {micros / total:6.1%}")

    print()
    for line in bars:
        print(line)


if __name__ == "__main__":
    main()
