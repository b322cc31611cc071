"""What only a GPU can tell: whether it trains there as on a CPU, how fast, what its faults say.

    python benchmarks/gpu.py [--out gpu.json] [--only PART] [--quick] [--cpu] [--budget 600]

Ten minutes on one CUDA card, no network. Each of eleven parts runs in a process of its own with a
limit, so that a card that hangs or a context that breaks costs one part; the JSON is written anew
after each. It ends with 0 if all that was asked for held, with 1 if a part failed, ran out of its
time or was not begun for want of it, and with 3 where there is no CUDA device.

`--cpu` runs the same parts on tensors on the CPU, by the same path of the program: its figures are
worth nothing, and it shows that the script works. `--quick` takes sizes of seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fpt import flops
from fpt.config import TrialConfig
from fpt.precision import refusal

if TYPE_CHECKING:
    from fpt.trainer import Training

NEVER = 10**9
"""Steps that no benchmark reaches."""

SEVEN = ("gpt2", "bert", "t5", "longformer", "vit", "lstm", "transformer")

Figures = dict[str, Any]


class DoesNotHoldError(Exception):
    """Raised where a part measured what it should not have."""

    def __init__(self, what: str, figures: Figures) -> None:
        super().__init__(what)
        self.figures = figures


@dataclass(frozen=True)
class Setting:
    """Where and in what size to measure."""

    cpu: bool
    quick: bool

    @property
    def device(self) -> torch.device:
        """The card, or the CPU in its place."""
        return torch.device("cpu" if self.cpu else "cuda")

    def size(self, full: int, quick: int) -> int:
        """A number by the size that was asked for."""
        return quick if self.quick else full

    def trial(self, seed: int = 0, **fields: Any) -> TrialConfig:
        """A small trial that is never evaluated; fields given replace its own."""
        base: dict[str, Any] = {
            "task": "bit-xor",
            "backbone": {"name": "gpt2", "layers": 2, "width": 64, "heads": 2},
            "pretraining": "random",
            "backbone_seed": 0,
            "batch_size": 4,
            "dropout": 0.1,
            "steps": NEVER,
            "evaluation": {"every": NEVER},
            "seed": seed,
        }
        return TrialConfig.model_validate(base | fields)

    def train(self, trials: Sequence[TrialConfig], **options: Any) -> Training:
        """Train on the card, or as on one."""
        from fpt import train  # transformers takes seconds to import, and half of the processes not

        return train(trials, device=self.device, device_path=True, **options)

    def wait(self) -> None:
        """Wait for the card."""
        if not self.cpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], times: int) -> float:
        """The median time of a call, after two that warm up."""
        spent = []
        for number in range(times + 2):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            if number >= 2:
                spent.append(time.perf_counter() - began)
        return statistics.median(spent)


class Watch(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and do it."""
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


VIEWS = {
    "view", "_unsafe_view", "alias", "unsqueeze", "expand", "detach", "t", "transpose", "split",
    "slice", "select", "squeeze", "permute", "split_with_sizes", "as_strided", "unbind", "empty",
    "empty_like", "new_empty",
    "lift_fresh",
}  # fmt: skip
"""Operations that start no kernel."""

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
"""Operations whose result, or its size, the host has to read."""


# The parts


def device(setting: Setting) -> Figures:
    """1: the device, and what torch is set to."""
    found: Figures = {"torch": torch.__version__, "python": platform.python_version()}
    list(setting.train([setting.trial(steps=1)]))  # sets what the trainer sets
    found["tf32"] = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    variables = ("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "PYTORCH_CUDA_ALLOC_CONF")
    found["environment"] = {name: os.environ.get(name) for name in variables}
    if setting.cpu:
        found |= {"device": platform.processor() or platform.machine(), "bf16": refusal("bf16")}
    else:
        own = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        found |= {
            "device": own.name,
            "capability": [own.major, own.minor],
            "memory": total,
            "free": free,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "bf16": refusal("bf16", (own.major, own.minor)),
        }
    if any(found["tf32"]):
        raise DoesNotHoldError("fp32 is not fp32: TF32 is on", found)
    return found


def correctness(setting: Setting) -> Figures:
    """2: the losses of 50 steps, dropout on, against the CPU's own path."""
    from fpt import train

    found, steps = {}, setting.size(50, 5)
    for name in SEVEN:
        heads = 1 if name == "lstm" else 2
        backbone = {"name": name, "layers": 2, "width": 64, "heads": heads}
        one = setting.trial(backbone=backbone, steps=steps)
        ours, theirs = (
            np.array([r.loss for r in each if r.split == "train"])
            for each in (setting.train([one], log_every=1), train([one], log_every=1))
        )
        found[name] = float(np.max(np.abs(ours / theirs - 1)))
    worst = max(found, key=lambda name: found[name])
    if not found[worst] <= 1e-4:
        raise DoesNotHoldError(f"{worst}: losses differ from a CPU's by {found[worst]:.1e}", found)
    return {"largest relative difference of a loss": found}


def repeat(setting: Setting) -> Figures:
    """3: the same again, and after a resume, to the bit."""
    from fpt.checkpoints import State

    steps = setting.size(60, 8)
    one = setting.trial(steps=steps, evaluation={"every": steps // 2})

    def end(training: Training) -> dict[str, torch.Tensor]:
        list(training)
        return training.outcomes[0].state.tensors

    first, second = (end(setting.train([one])) for _ in range(2))
    begun = setting.train([one])
    for _ in range(steps // 2 + 1):
        begun.step()
    state = State.from_bytes(begun.states()[0].to_bytes())
    third = end(setting.train([one], state=[state]))
    found = {
        name: all(torch.equal(first[n], other[n]) for n in first)
        for name, other in (("repeated", second), ("resumed", third))
    }
    if not all(found.values()):
        raise DoesNotHoldError("a repeat or a resume ends with other bits", found)
    return found


def exactness(setting: Setting) -> Figures:
    """4: members of packs of 1, 3 and 16 against themselves alone, at three widths.

    Bits are noted and not asked for: a GPU's library chooses kernels by the rows of a pack.
    """
    found: Figures = {}
    for width in (128, 768, 1024) if not setting.quick else (32, 64):
        backbone = {"name": "gpt2", "layers": 2, "width": width, "heads": 2}
        for size in (1, 3, 16):
            trials = [setting.trial(s, backbone=backbone, steps=3) for s in range(size)]
            pack, alone = setting.train(trials), setting.train(trials[:1])
            list(pack)
            list(alone)
            ends = [each.outcomes[0].state.part("now") for each in (pack, alone)]
            found[f"width {width}, pack of {size}"] = {
                "same bits": all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]),
                "largest difference": max(
                    float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]
                ),
            }
    worst = max(one["largest difference"] for one in found.values())
    if not worst <= 1e-3:
        raise DoesNotHoldError(f"a pack changes a trial by {worst:.1e}", found)
    return found


def throughput(setting: Setting) -> Figures:
    """5: milliseconds of a trial-step: the paper's loop, alone, packs, classes, torch.compile."""
    import throughput as bench  # beside this file

    found: Figures = {}
    times = setting.size(20, 2)
    peak = _peak(setting)
    found["products, fp32, operations a second"] = peak
    for name, row in bench.rows(setting.quick).items():
        if name not in ("bit-xor", "bit-memory", "cifar10", "tiny, 160 rows, dropout 0.1"):
            continue
        (one,) = row.trials(1)
        operations = flops.training_flops(one) / one.steps
        rows: Figures = {"the paper's loop": {"ms": _paper(setting, bench, row, times) * 1e3}}
        sizes = (1, 4, 16, 64) if not setting.quick else (1, 4)
        for numerics in ("fp32", "bf16"):
            for size in sizes:
                if size > 1 and size * row.batch * one.task.shape("sound").tokens > 16 * 1024:
                    continue
                trials = [t.model_copy(update={"numerics": numerics}) for t in row.trials(size)]
                label = f"{numerics}, pack of {size}"
                rows[label] = _steps(setting, row, trials, times, operations, peak)
                replayed = _steps(setting, row, trials, times, operations, peak, graphs=True)
                rows[f"{label}, graphs"] = replayed
        rows["torch.compile"] = _compiled(setting, row, times)
        found[name] = rows
        gc.collect()
    return found


def _peak(setting: Setting) -> float:
    size = setting.size(8192, 512)
    x = torch.ones(size, size, device=setting.device)
    return 2 * size**3 / setting.seconds(lambda: x @ x, 5)


def _paper(setting: Setting, bench: Any, row: Any, times: int) -> float:
    (trial,) = row.trials(1)
    model = bench.PaperModel(trial).to(setting.device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=trial.learning_rate)
    batches = row.batches(trial)

    def step() -> None:
        batch = next(batches)
        x = torch.from_numpy(batch.inputs).to(setting.device)
        y = torch.from_numpy(batch.targets).to(setting.device).flatten()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return setting.seconds(step, times)


def _steps(
    setting: Setting,
    row: Any,
    trials: Any,
    times: int,
    operations: float,
    peak: float,
    *,
    graphs: bool = False,
) -> Figures:
    try:
        batches = [row.batches(trial) for trial in trials]
        training = setting.train(trials, batches=batches, graphs=graphs)
        spent = setting.seconds(training.step, times) / len(trials)
        with Watch() as watch:
            training.step()
    except Exception as error:  # a class or a size that this device has no room or no products for
        return {"failed": f"{type(error).__name__}: {error}".partition("\n")[0]}
    kernels = sum(n for name, n in watch.count.items() if name not in VIEWS)
    return {
        "ms": spent * 1e3,
        "operations a step": kernels,
        "kernels a step": _kernels(setting, training),
        "share of products": operations / spent / peak,
    }


def _kernels(setting: Setting, training: Training) -> int | None:
    """Kernels that a step starts on the card, by the profiler."""
    if setting.cpu:
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        training.step()
        torch.cuda.synchronize()
    return sum(one.count for one in seen.key_averages())


def _compiled(setting: Setting, row: Any, times: int) -> Figures:
    """A trial alone with its backbone compiled: a rival, tried once."""
    trials = row.trials(1)
    training = setting.train(trials, batches=[row.batches(trials[0])])
    backend = "eager" if setting.cpu else "inductor"  # the CPU's takes a C++ compiler
    try:
        training.model.backbone.compile(backend=backend)
        return {"ms": setting.seconds(training.step, times) * 1e3}
    except Exception as error:  # what another compiler makes of it is a figure, too
        return {"failed": f"{type(error).__name__}: {error}".partition("\n")[0]}


def waits(setting: Setting) -> Figures:
    """6: twenty steps in which the host never waits for the card, graphs off and on; and the same
    bits with graphs as without, also as members leave.
    """
    steps, ends = setting.size(20, 3), []
    found: Figures = {"steps": steps}
    for graphs in (False, True):
        training = setting.train([setting.trial(seed) for seed in range(3)], graphs=graphs)
        for _ in range(4):  # by then a graph is captured
            training.step()
        if not setting.cpu:
            torch.cuda.set_sync_debug_mode("error")  # raises where it would wait
        with Watch() as watch:
            for _ in range(steps):
                training.step()
        if not setting.cpu:
            torch.cuda.set_sync_debug_mode("default")
        waited = {n: c for n, c in watch.count.items() if n in WAITS}
        found |= {f"operations, graphs {graphs}": sum(watch.count.values())}
        if waited:
            raise DoesNotHoldError("a step waits for the device", found | waited)
        # Members leave at other steps: each set of them has a graph.
        lengths = (steps, 2 * steps, 2 * steps)
        trials = [
            setting.trial(seed, steps=n, evaluation={"every": steps})
            for seed, n in enumerate(lengths)
        ]
        ending = setting.train(trials, graphs=graphs)
        list(ending)
        ends.append([ending.outcomes[k].state.part("now") for k in range(len(trials))])
    found["same bits"] = all(
        torch.equal(one[name], other[name])
        for one, other in zip(*ends, strict=True)
        for name in one
    )
    if not found["same bits"]:
        raise DoesNotHoldError("with graphs a trial ends with other bits", found)
    return found


def memory(setting: Setting) -> Figures:
    """7: memory of a trial and of a further member; two jobs in a process, one after the other."""
    size = {"size": "base"} if not setting.quick else {"layers": 2, "width": 64, "heads": 2}
    peaks: dict[int, int] = {}
    models: list[weakref.ref[Any]] = []
    left = []
    for count in (1, 4, 1):
        trials = [setting.trial(s, backbone={"name": "gpt2"} | size) for s in range(count)]
        training = setting.train(trials)
        models.append(weakref.ref(training.model))
        if not setting.cpu:
            torch.cuda.reset_peak_memory_stats()
        training.step()
        training.step()
        peaks[count] = 0 if setting.cpu else torch.cuda.max_memory_allocated()
        del training
        gc.collect()
        left.append(0 if setting.cpu else torch.cuda.memory_allocated())
    found = {"peak, bytes": peaks, "a further member": (peaks[4] - peaks[1]) / 3, "left": left}
    if any(model() is not None for model in models) or left[-1] > left[0]:
        raise DoesNotHoldError("memory of a job stays when it has ended", found)
    return found


def calibration(setting: Setting) -> Figures:
    """8: seconds of a step by layers, members and operations, and the planner's costs from them;
    a card's are kept for `sweep plan` on this machine.
    """
    from sweep.planning import calibration as planning
    from sweep.planning.packing import UNMEASURED_GPU, step_operations

    steps = []
    sizes = [(2, 64), (4, 64), (12, 64), (12, 768)] if not setting.quick else [(1, 64), (2, 64)]
    for layers, width in sizes:
        for members in (1, 4, 16) if not setting.quick else (1, 3):
            backbone = {"name": "gpt2", "layers": layers, "width": width, "heads": 2}
            trials = [setting.trial(s, backbone=backbone, dropout=0) for s in range(members)]
            training = setting.train(trials)
            spent = setting.seconds(training.step, setting.size(30, 3))
            operations = members * step_operations(trials[0])
            steps.append(planning.Measured(layers, members, operations, spent))
            del training
            gc.collect()
    costs = planning.fitted(steps)
    found: Figures = {
        "measured": costs and asdict(costs),
        "the planner's without": asdict(UNMEASURED_GPU),
        "steps": [list(one) for one in steps],
    }
    if costs is not None and not setting.cpu:
        found["kept"] = str(planning.keep(torch.cuda.get_device_name(), costs))
    return found


FULL = """
kept = []
for size in (2**27, 2**22, 2**17):
    try:
        while d == "cuda":
            kept.append(torch.empty(size, dtype=torch.uint8, device=d))
    except torch.OutOfMemoryError:
        pass
x = torch.ones(512, 512, device=d) if d == "cpu" else kept[-1].view(torch.float32)[:64].view(8, 8)
x @ x if d == "cuda" else torch.empty(2**50)
"""

OUTSIDE = """
torch.nn.Embedding(4, 4, device=d)(torch.tensor([9], device=d)).sum().item()
"""

FAULTS = {
    "out of memory": ("torch.empty(2**50, device=d)", "memory"),
    "cuBLAS allocation": (FULL, "memory"),
    "an index outside of its table": (OUTSIDE, "code"),
}
"""Name -> what raises it on device d, and the cause that it has to be given."""


def faults(setting: Setting) -> Figures:
    """9: real faults, and the causes that they are given."""
    found = {}
    for name, (code, wanted) in FAULTS.items():
        script = (
            "import json, torch\nfrom sweep.ledger.causes import cause_of, ends_process\n"
            f"d = {setting.device.type!r}\n"
            "try:\n" + "".join(f"    {line}\n" for line in code.splitlines()) + "except Exception "
            "as error:\n    print(json.dumps({'cause': cause_of(error), 'ends': ends_process(error)"
            ", 'message': str(error)[:300]}))\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        last = (done.stdout.splitlines() or ["{}"])[-1]
        found[name] = json.loads(last) | {"wanted": wanted}
        if not found[name].get("cause"):
            found[name]["stderr"] = done.stderr[-500:]
    wrong = [name for name, one in found.items() if one.get("cause") != one["wanted"]]
    if wrong:
        raise DoesNotHoldError(f"another cause than wanted: {', '.join(wrong)}", found)
    return found


def sharing(setting: Setting) -> Figures:
    """10: two processes on one card, half of its memory each; and whether MPS runs."""
    alone = [_shared(setting, 1)[0]]
    both = _shared(setting, 2)
    gain = sum(both) / alone[0]
    return {
        "steps a second, alone": alone[0],
        "steps a second, each of two": both,
        "both against one": gain,
        "MPS": shutil.which("nvidia-cuda-mps-control") is not None
        and "CUDA_MPS_PIPE_DIRECTORY" in os.environ,
    }


def _shared(setting: Setting, count: int) -> list[float]:
    command = [sys.executable, __file__, "--steps", str(setting.size(200, 10))]
    command += ["--cpu"] * setting.cpu + ["--quick"] * setting.quick
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    return [float(one.communicate()[0].splitlines()[-1]) for one in running]


def steps_a_second(setting: Setting, steps: int) -> float:
    """Of one process that shares its card: half of the memory is its own."""
    if not setting.cpu:
        torch.cuda.set_per_process_memory_fraction(0.5)
    training = setting.train([setting.trial(seed) for seed in range(4)])
    return 1 / setting.seconds(training.step, steps)


SWEEP = """
sweep: gpu
trial:
  task: bit-xor
  backbone: {{name: gpt2, layers: 2, width: 64, heads: 2}}
  pretraining: random
  backbone_seed: 0
  batch_size: 4
  learning_rate: 1e-3
  steps: {steps}
  evaluation: {{every: {steps}}}
axes:
  seed: [0, 1, 2, 3, 4, 5]
"""


def whole(setting: Setting) -> Figures:
    """11: a sweep of six trials under Ray, a card a pack and a quarter of one; then merged."""
    import sweep
    from sweep.ledger.ledger import Ledger

    found: Figures = {}
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        file = Path(folder) / "gpu.yaml"
        file.write_text(SWEEP.format(steps=setting.size(100, 6)), encoding="utf-8")
        ledgers = []
        for gpus in (1.0, 0.25):
            ledger = f"{folder}/{gpus:g}"
            began = time.perf_counter()
            summary = sweep.run(
                file,
                results=ledger,
                gpus=0 if setting.cpu else gpus,
                max_concurrent=1 if setting.cpu else None,
                mirror=False,
            )
            found[f"GPU {gpus:g}, s"] = time.perf_counter() - began
            if summary.exit_code:
                raise DoesNotHoldError(f"{gpus:g} GPUs a pack: not every trial is done", found)
            ledgers.append(ledger)
        command = [sys.executable, "-m", "sweep", "merge", *ledgers, "--into", f"{folder}/both"]
        done = subprocess.run([*command, "--prefer-first"], capture_output=True, text=True)
        found["merge"] = done.stdout[-500:]
        if done.returncode or len(Ledger(f"{folder}/both").done()) != 6:
            raise DoesNotHoldError(f"merge: {done.stderr[-500:]}", found)
    return found


@dataclass(frozen=True)
class Part:
    """One of the eleven."""

    run: Callable[[Setting], Figures]
    limit: float
    """Seconds, at most."""


PARTS = {
    part.run.__name__: part
    for part in (
        Part(device, 30),
        Part(correctness, 60),
        Part(repeat, 30),
        Part(exactness, 60),
        Part(throughput, 150),
        Part(waits, 30),
        Part(memory, 30),
        Part(calibration, 60),
        Part(faults, 45),
        Part(sharing, 45),
        Part(whole, 120),
    )
}


# Running them


def run_part(name: str, setting: Setting) -> dict[str, Any]:
    """What a part found, as its line of JSON."""
    try:
        return {"holds": True, "figures": PARTS[name].run(setting)}
    except DoesNotHoldError as error:
        return {"holds": False, "why": str(error), "figures": error.figures}
    except Exception as error:
        return {"holds": False, "why": f"{type(error).__name__}: {error}"}


def started(name: str, arguments: Sequence[str], limit: float) -> dict[str, Any]:
    """Run a part in a process of its own."""
    began = time.perf_counter()
    command = [sys.executable, __file__, "--part", name, *arguments]
    with tempfile.TemporaryFile("w+") as printed, killed_as_one(command, printed) as process:
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            return {"holds": False, "why": f"not done after {limit:.0f} s", "seconds": limit}
        printed.seek(0)
        lines = printed.read().splitlines()
    found: dict[str, Any]
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError):
        found = {"holds": False, "why": f"ended with {process.returncode}", "printed": lines[-20:]}
    return found | {"seconds": round(time.perf_counter() - began, 1)}


@contextmanager
def killed_as_one(command: Sequence[str], out: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that leaves none of its own behind."""
    process = subprocess.Popen(command, stdout=out, text=True, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()


def main() -> int:
    """Measure, write, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be repeated")
    parser.add_argument("--quick", action="store_true", help="sizes of seconds")
    parser.add_argument("--cpu", action="store_true", help="the same on a CPU: a try of the script")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for all of it")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    setting = Setting(options.cpu, options.quick)
    if setting.cpu:
        torch.set_num_threads(1)
    if options.steps:
        print(steps_a_second(setting, options.steps))
        return 0
    if options.part:
        print(json.dumps(run_part(options.part, setting)))
        return 0
    if not setting.cpu and not torch.cuda.is_available():
        print("no CUDA device; --cpu tries the script", file=sys.stderr)
        return 3
    arguments = ["--cpu"] * setting.cpu + ["--quick"] * setting.quick
    until = time.monotonic() + options.budget
    result: dict[str, Any] = {"quick": setting.quick, "cpu": setting.cpu, "parts": {}}
    for number, (name, part) in enumerate(PARTS.items(), 1):
        if options.only and name not in options.only:
            continue
        left = until - time.monotonic()
        found = (
            started(name, arguments, min(left, 4 * part.limit if setting.cpu else part.limit))
            if left > 1
            else {"holds": False, "why": "not begun: the budget was spent", "seconds": 0.0}
        )
        result["parts"][name] = {"number": number} | found
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        verdict = "holds" if found["holds"] else f"FAILED: {found['why']}"
        print(f"{number:2} {name:12} {found['seconds']:6.1f} s  {verdict}", flush=True)
    print(f"written: {options.out}")
    return 0 if all(part["holds"] for part in result["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
