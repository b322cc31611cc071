"""What a user's own task or backbone owes the trainer, checked on a sample before anything trains.

Most mistakes in such a class do not raise: they give a figure that is wrong. Each is told in one
sentence: the line of the class, the split and the field, what was found and what was wanted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fpt import plugins, random_streams
from fpt.config import BackboneConfig, TrialConfig, backbone_of
from fpt.files import ContractError, DataError
from fpt.metrics import Metric
from fpt.spec import JSON
from fpt.tasks.base import Baseline, Batch, Generated, ProtocolName, Shape, Splits, Stored, Task

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

SAMPLE = 128
"""Examples that are drawn, transformed or hashed; labels are checked all."""

MOST_BYTES = 2**28
"""Bytes of one array of inputs that are read; of a larger one, its beginning."""

MOST_COMPARED = 100_000
"""Examples of a split that are looked for in another one."""


# -------------------------------------------------------------------------------------------- tasks


def check_task(
    task: Task, protocol: ProtocolName = "sound", *, other_process: bool = True
) -> tuple[str, ...]:
    """Check that a task keeps its contract: shapes, types, ranges, and the same data every time.

    Labels and lengths are checked of every example, inputs as far as `MOST_BYTES` go, what is drawn
    or transformed on `SAMPLE` examples.

    Args:
        task: The task.
        protocol: The protocol that it is to be trained under.
        other_process: Whether the data is also made in another process and compared, which takes a
            second or two. A class that no other process can import is left out.

    Returns:
        What is allowed and doubtful, a sentence each: labels of one class, examples that stand in
        two splits.

    Raises:
        ContractError: Says what is wrong, and where.
        DataError: If data is missing.
    """
    check = _Check(f"task {task.name}", type(task))
    check.that(
        check.call("pickling it", lambda: pickle.loads(pickle.dumps(task))) == task,
        "it is not equal to itself after pickling; keep its parameters in fields",
    )
    dumped = check.call("model_dump()", lambda: json.loads(task.model_dump_json()))
    check.that(
        check.call("model_validate()", lambda: type(task).model_validate(dumped)) == task,
        "it is not equal to itself after JSON; a field's type must be read as it is written",
    )
    identity = check.call("identity()", task.identity)
    check.call("identity()", lambda: json.dumps(identity, allow_nan=False))
    check.that(identity == task.identity(), "identity() differs from one call to the next")
    shape = check.call("shape(protocol)", lambda: task.shape(protocol))
    check.is_a("shape(protocol)", shape, Shape)
    made = [_made(check, task, shape, protocol, n) for n in range(2)]
    for split, one, other in zip(made[0], *(m.values() for m in made), strict=False):
        check.that(
            one == other,
            f"split {split}: its examples differ from one call of splits() to the next; draw with "
            "np.random.default_rng(SEED), or with the generator that draw(rng, size) gets",
        )
    if other_process and type(task).__module__ != "__main__" and ":" in task.name:
        theirs = _elsewhere(check, dumped, protocol)
        differ = [split for split, digest in made[0].items() if theirs.get(split) != digest]
        check.that(
            not differ,
            f"split {', '.join(differ)}: its examples differ in another process; the order of a "
            "set, of a directory or of threads decides something",
        )
    metrics = check.call("metrics(protocol)", lambda: task.metrics(protocol))
    splits = task.splits(protocol)
    _metrics(check, metrics, shape, splits)
    _baseline(check, task, shape, protocol, {metric.name for metric in metrics})
    return tuple(_doubts(check, shape, splits))


def _baseline(
    check: _Check, task: Task, shape: Shape, protocol: ProtocolName, metrics: set[str]
) -> None:
    baseline = check.call("baseline(protocol)", lambda: task.baseline(protocol))
    check.is_a("baseline(protocol)", baseline, Baseline)
    accuracy, own = baseline.accuracy, baseline.metrics
    if shape.loss == "mse":
        check.that(
            accuracy is None,
            f"baseline(protocol): accuracy is {accuracy!r}, wanted None: of numbers there is none; "
            "say `metrics={...}` of it",
        )
    else:
        check.that(
            isinstance(accuracy, int | float) and 0 <= accuracy <= 1,
            f"baseline(protocol): accuracy is {accuracy!r}, wanted a fraction from 0 to 1",
        )
    check.that(
        isinstance(baseline.rule, str),
        f"baseline(protocol): rule is {baseline.rule!r}, wanted a few words",
    )
    check.that(
        isinstance(own, Mapping), f"baseline(protocol): metrics is {_kind(own)}, wanted a dict"
    )
    known = sorted(metrics | {"loss"})
    for name, value in own.items():
        check.that(
            name in known,
            f"baseline(protocol): metrics has {name!r}, and the task has {', '.join(known)}",
        )
        check.that(
            isinstance(value, int | float | np.number) and math.isfinite(value),
            f"baseline(protocol): its {name} is {value!r}, wanted a number",
        )


def _metrics(check: _Check, metrics: Any, shape: Shape, splits: Splits) -> None:
    check.that(
        isinstance(metrics, tuple | list),
        f"metrics(protocol) is {_kind(metrics)}, wanted a tuple of fpt.Metric",
    )
    for metric in metrics:
        check.is_a("a metric", metric, Metric)
    names = [metric.name for metric in metrics]
    twice = next((name for name in names if names.count(name) > 1), "")
    check.that(not twice, f"metrics(protocol) has two of the name {twice!r}")
    if not metrics or not isinstance(splits.test, Stored):
        return
    examples = min(SAMPLE, len(splits.test))
    targets = splits.test.plain(np.arange(examples)).targets.reshape(-1, shape.outputs)
    rng = np.random.default_rng(5)
    last = () if shape.loss == "mse" else (shape.classes,)
    outputs = rng.standard_normal((*targets.shape, *last), dtype=np.float32)
    for metric in metrics:
        what = f"metric {metric.name}: function(outputs, targets)"
        kept = outputs.copy(), targets.copy()
        with _other_luck(0):
            value = check.call(what, functools.partial(metric.function, outputs, targets))
        check.that(
            isinstance(value, int | float | np.number) and not isinstance(value, bool),
            f"{what} gives {_kind(value)}, wanted a number",
        )
        check.that(
            np.array_equal(outputs, kept[0]) and np.array_equal(targets, kept[1]),
            f"{what} writes into what it is given; work on a copy",
        )
        with _other_luck(1):
            again = check.call(what, functools.partial(metric.function, outputs, targets))
        check.that(
            bool(np.float64(again) == np.float64(value)) or (again != again and value != value),
            f"{what} gives another number a second time",
        )


def _doubts(check: _Check, shape: Shape, splits: Splits) -> Iterator[str]:
    """Yield what is doubtful about data that keeps the contract.

    Raises:
        ContractError: If two splits are the same examples.
    """
    parts: dict[str, Stored] = {
        name: part
        for name in ("train", "validation", "test")
        if isinstance(part := getattr(splits, name), Stored)
    }
    for name, part in parts.items():
        targets = part.examples.targets
        if len(targets) > 1 and bool((targets == targets.flat[0]).all()):
            what = "number" if shape.loss == "mse" else "class"
            yield check.within(f"split {name}").say(
                f"all targets are the {what} {targets.flat[0]}; nothing is to be learned of them"
            )
    known = {name: _examples(part) for name, part in parts.items()}
    for one, other in itertools.combinations(known, 2):
        shared = sum(example in known[one] for example in known[other].elements())
        check.that(
            known[one] != known[other],
            f"splits {one} and {other} are the same examples; a figure on {other} would say "
            "nothing of what is new",
        )
        if shared:
            yield check.say(
                f"{shared} of {known[other].total()} examples of split {other} stand in split "
                f"{one} as well"
            )


def _examples(part: Stored) -> Counter[bytes]:
    """Count each different example among the first ones, `MOST_COMPARED` at most."""
    raw = part.examples
    rows = min(MOST_COMPARED, max(1, MOST_BYTES // max(1, raw.inputs[:1].nbytes)))
    arrays = [raw.inputs, raw.targets, *([] if raw.lengths is None else [raw.lengths])]
    whole = [np.ascontiguousarray(array[:rows]) for array in arrays]
    return Counter(
        hashlib.blake2b(b"".join(array[n].tobytes() for array in whole), digest_size=16).digest()
        for n in range(len(whole[0]))
    )


def _made(
    check: _Check, task: Task, shape: Shape, protocol: ProtocolName, n: int
) -> dict[str, str]:
    """Make a task's data, check it, and return a digest of each split."""
    with _other_luck(n):
        splits = check.call("splits(protocol)", lambda: task.splits(protocol))
        check.is_a("splits(protocol)", splits, Splits)
        check.that(
            splits.digest is None or isinstance(splits.digest, str),
            f"splits(protocol): digest is {splits.digest!r}, wanted text or None",
        )
        if protocol == "sound":
            for name in ("validation", "test"):
                found = getattr(splits, name)
                check.that(
                    isinstance(found, Stored),
                    f"split {name}: is {_kind(found)}, wanted fpt.Stored: under the protocol sound "
                    "it is read whole",
                )
        parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
        return {
            name: _Part(check, name, shape).digest(part)
            for name, part in parts.items()
            if part is not None
        }


class _Part:
    """A split of a task."""

    def __init__(self, check: _Check, name: str, shape: Shape) -> None:
        self.check = check.within(f"split {name}")
        self.shape = shape
        self.trains = name == "train"

    def digest(self, source: Any) -> str:
        """Check the split, and return a digest of what it gives."""
        check, total = self.check, hashlib.sha256()
        if isinstance(source, Stored):
            self.stored(source, total)
        else:
            check.that(
                callable(getattr(source, "batch", None)),
                f"is {_kind(source)}, wanted fpt.Stored or fpt.Generated",
            )
        if self.trains or not isinstance(source, Stored):
            draw = functools.partial(source.batch, 1, random_streams.TRAINING, 0, SAMPLE)
            drawn = [self.drawn(draw, n, source) for n in (1, 2)]
            check.that(
                drawn[0] == drawn[1],
                "the same draw gives other examples a second time; use the generator that is "
                "handed in, not np.random, random or torch's own",
            )
            total.update(drawn[0].encode())
        return total.hexdigest()

    def drawn(self, draw: Callable[[], Batch], n: int, source: Any) -> str:
        with _other_luck(n):
            what = "transform" if isinstance(source, Stored) else "draw(rng, size)"
            batch = self.check.call(what, draw)
        total = hashlib.sha256()
        # Stored examples were cast on their way out.
        self.batch(batch, SAMPLE, cast=isinstance(source, Stored))
        _update(total, batch, MOST_BYTES)
        return total.hexdigest()

    def stored(self, source: Stored, total: Any) -> None:
        check, raw = self.check, source.examples
        check.is_a("examples", raw, Batch)
        for name in ("inputs", "targets", "lengths", "hidden"):
            value = getattr(raw, name)
            check.that(
                (value is None and name in ("lengths", "hidden")) or isinstance(value, np.ndarray),
                f"{name} are {_kind(value)}, wanted a numpy array",
            )
            check.that(
                value is None or value.ndim > 0,
                f"{name} are a single number, wanted an array with a row an example",
            )
            check.that(
                value is None or len(value) == len(raw.targets),
                f"{name} are of {0 if value is None else len(value)} examples, targets of "
                f"{len(raw.targets)}",
            )
        check.that(len(raw) > 0, "has no examples")
        _update(total, raw, MOST_BYTES)
        if source.transform is None:
            self.batch(raw, len(raw))
            return
        self.labels_within(raw)
        with _other_luck(0):
            rows = min(SAMPLE, len(raw))
            index = np.linspace(0, len(raw) - 1, rows).astype(np.int64)
            given = check.call("transform", lambda: source.transform(None, raw.take(index)))  # type: ignore[misc]
        self.batch(given, rows)
        _update(total, given, MOST_BYTES)

    def labels_within(self, raw: Batch) -> None:
        # What a transform leaves as it is can be checked of all examples.
        if raw.targets.shape == (len(raw), self.shape.positions):
            self.targets(raw.targets)
        if raw.inputs.dtype.kind == "f":
            self.finite("inputs", raw.inputs)

    def batch(self, batch: Any, rows: int, *, cast: bool = False) -> None:
        """Check the arrays of a batch of so many rows."""
        check, shape = self.check, self.shape
        check.is_a("a batch", batch, Batch)
        wanted: dict[str, tuple[tuple[int | str, ...], str]] = {
            "inputs": (
                ((rows, shape.tokens), "iu")
                if shape.embedded
                else ((rows, shape.tokens, shape.inputs), "f")
            ),
            "targets": ((rows, shape.positions), "iuf" if shape.loss == "mse" else "iu"),
            "lengths": ((rows,), "iu"),
        }
        for name, (size, kinds) in wanted.items():
            value = getattr(batch, name)
            if value is None and name == "lengths":
                continue
            check.that(
                isinstance(value, np.ndarray), f"{name} are {_kind(value)}, wanted a numpy array"
            )
            check.that(
                value.shape == size,
                f"{name} have the shape {value.shape}, wanted {size}"
                + (
                    ": a column a prediction, as y[:, None]"
                    if name == "targets" and value.ndim == 1
                    else f" (shape() says {shape.tokens} tokens)"
                    if name == "inputs"
                    else ""
                ),
            )
            check.that(
                value.dtype.kind in kinds or (name == "targets" and cast),
                f"{name} are {value.dtype}, wanted "
                f"{'integers' if 'i' in kinds else 'floats, as x.astype(np.float32)'}"
                + ('; of numbers shape() says loss="mse"' if name == "targets" else ""),
            )
        self.targets(batch.targets)
        if shape.embedded:
            self.range("inputs", batch.inputs, 0, shape.inputs - 1, f"inputs={shape.inputs} ids")
        else:
            self.finite("inputs", batch.inputs)
        if batch.lengths is not None:
            what = f"tokens={shape.tokens}, readout={shape.readout}"
            least = 1 if shape.readout == shape.tokens else shape.readout
            self.range("lengths", batch.lengths, least, shape.tokens, what)

    def targets(self, targets: np.ndarray) -> None:
        shape = self.shape
        if shape.loss == "mse":
            self.check.that(
                targets.dtype.kind in "fiu",
                f"targets are {targets.dtype}, wanted numbers, as y.astype(np.float32)",
            )
            self.finite("targets", targets)
            return
        self.check.that(
            targets.dtype.kind in "iu",
            f"targets are {targets.dtype}, wanted integers: the class of each prediction",
        )
        self.range("targets", targets, 0, shape.classes - 1, f"classes={shape.classes}")

    def range(self, name: str, values: np.ndarray, low: int, high: int, what: str) -> None:
        least, most = int(values.min()), int(values.max())
        bad = least if least < low else most
        self.check.that(
            low <= least and most <= high,
            f"{name} have the value {bad} (example {_row(values == bad)}), wanted {low} to {high} "
            f"(shape() says {what})",
        )

    def finite(self, name: str, values: np.ndarray) -> None:
        rows = max(1, MOST_BYTES // max(1, values[:1].nbytes))
        wrong = ~np.isfinite(values[:rows])
        if wrong.any():
            found = values[:rows][wrong][0]
            self.check.that(False, f"{name} have the value {found} (example {_row(wrong)})")
        limit = float(np.finfo(np.float32).max)
        self.check.that(
            float(np.abs(values[:rows]).max()) <= limit, f"{name} are too large for float32"
        )


def _row(wrong: np.ndarray) -> int:
    return int(np.flatnonzero(wrong.reshape(len(wrong), -1).any(1))[0])


def _update(total: Any, batch: Batch, most: int) -> None:
    for name in ("inputs", "targets", "lengths", "hidden"):
        value = getattr(batch, name)
        if value is None:
            continue
        rows = value[: max(1, most // max(1, value[:1].nbytes))]
        total.update(f"{name} {value.shape} {value.dtype}".encode())
        total.update(np.ascontiguousarray(rows).tobytes())


def _elsewhere(check: _Check, dumped: JSON, protocol: str) -> dict[str, str]:
    """Return the digests of a task's splits, made in a process whose sets have another order."""
    home = str(Path(__file__).resolve().parents[1])
    variables = {
        plugins.VARIABLE: os.pathsep.join(f for f in plugins.FOLDERS if f in sys.path),
        "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2",
        "PYTHONSAFEPATH": "1",
        # The package that runs here: a job may have been sent one of its own.
        "PYTHONPATH": os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from fpt.contract import _answer; _answer()"],
        input=json.dumps([dumped, protocol]),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | variables,
    )
    lines = done.stdout.splitlines()
    check.that(
        done.returncode == 0 and bool(lines),
        "its data cannot be made in another process: "
        f"{(done.stderr.strip().splitlines() or ['it ended without a word'])[-1]}",
    )
    return dict(json.loads(lines[-1]))


def _answer() -> None:
    dumped, protocol = json.load(sys.stdin)
    path = plugins.class_path(dumped["name"], "fpt_sweep.tasks")
    with contextlib.redirect_stdout(sys.stderr):
        task: Any = plugins.imported(str(path)).model_validate(dumped)  # type: ignore[attr-defined]
        check = _Check(f"task {task.name}", type(task))
        made = _made(check, task, task.shape(protocol), protocol, 0)
    sys.stdout.write(json.dumps(made) + "\n")


# ---------------------------------------------------------------------------------------- backbones


def check_backbone(
    backbone: BackboneConfig | Mapping[str, Any] | str,
    *,
    tokens: int = 8,
    train: tuple[str, ...] | str = "fpt",
    padded: bool = False,
) -> None:
    """Check that a backbone keeps its contract, on random inputs of its own size.

    It gives (rows, tokens, width) for the same; each parameter has a group; a row's output depends
    on nothing but the row; evaluation changes no parameter and no buffer and gives the same twice;
    a causal one sees nothing that comes later; a training that was stopped and went on ends with
    the bits of one that was not.

    Args:
        backbone: The config, or what stands under `backbone:` in a sweep file.
        tokens: Tokens of a sequence.
        train: The groups that train, as in a sweep file.
        padded: Whether sequences have padding, which then must not change what is read out.

    Raises:
        ContractError: Says what is wrong, and where.
        ValueError: If the config is wrong.
    """
    config = backbone_of(backbone)
    check = _Check(f"backbone {config.name}", plugins.imported(config.row.module))
    trial = TrialConfig(
        task=_Probe(tokens=tokens, name="fpt.contract:_Probe"),
        backbone=config,
        pretraining="random",
        train=train,
        batch_size=2,
        steps=4,
        evaluation={"every": 2},
        dropout=0.1,
        seed=1,
    )
    _forward(check, trial, padded=padded)
    _resumes(check, trial)


def _forward(check: _Check, trial: TrialConfig, *, padded: bool) -> None:
    import torch

    from fpt.model import build_model

    with _other_luck(0):
        module = check.call("building it", lambda: build_model([trial])).backbone
    tokens, width = trial.task.tokens, trial.backbone.width  # type: ignore[attr-defined]
    rng = np.random.default_rng(7)
    rows = torch.from_numpy(rng.standard_normal((3, tokens, width), dtype=np.float32))
    before = {name: value.clone() for name, value in module.state_dict().items()}

    def run(inputs: torch.Tensor, mask: torch.Tensor | None = None, luck: int = 0) -> torch.Tensor:
        with _other_luck(luck), torch.no_grad():
            given = check.call("forward(embedded, mask)", lambda: module(inputs.clone(), mask))
        check.that(
            isinstance(given, torch.Tensor),
            f"forward() gives {_kind(given)}, wanted one tensor (rows, tokens, width)",
        )
        check.that(
            given.shape == inputs.shape,
            f"forward() gives the shape {tuple(given.shape)}, wanted {tuple(inputs.shape)}: (rows, "
            "tokens, width) as it gets them",
        )
        check.that(
            given.dtype == torch.float32,
            f"forward() gives {str(given.dtype).removeprefix('torch.')}, wanted float32",
        )
        check.that(bool(torch.isfinite(given).all()), "forward() gives NaN or infinity")
        out: torch.Tensor = given
        return out

    module.eval()
    whole = run(rows)
    check.that(
        torch.equal(whole, run(rows, luck=1)),
        "in evaluation, forward() gives other numbers a second time; it draws random numbers, or "
        "remembers what it has seen",
    )
    moved = [n for n, value in module.state_dict().items() if not torch.equal(value, before[n])]
    check.that(not moved, f"evaluation changes {', '.join(moved)}; only training may")
    close = functools.partial(torch.allclose, rtol=1e-3, atol=1e-4)
    check.that(
        close(run(rows[1:2]), whole[1:2]),
        "a row's output depends on the other rows of its batch, in evaluation too; in "
        "(rows, tokens, width), mix tokens and width only",
    )
    other = torch.cat([rows[:, :-1], -rows[:, -1:]], 1)
    if trial.backbone.row.causal and tokens > 1:
        check.that(
            close(run(other)[:, :-1], whole[:, :-1]),
            "it says causal = True, and a token's output depends on a later token",
        )
    if padded and tokens > 1:
        mask = torch.ones(3, tokens, dtype=torch.bool)
        mask[:, -1] = False
        check.that(
            close(run(other, mask)[:, -2], run(rows, mask)[:, -2]),
            "padding changes what is read out; forward(embedded, mask) gets a mask (rows, tokens), "
            "False where a token is padding",
        )
    module.train()
    inputs = rows.clone().requires_grad_()
    with _other_luck(0):
        output = check.call("forward(embedded, mask)", lambda: module(inputs, None))
        grown = isinstance(output, torch.Tensor) and output.requires_grad
        check.that(grown, "no gradient passes through it: its output is detached from its input")
        check.call("its backward pass", lambda: output.square().mean().backward())
    check.that(
        inputs.grad is not None and bool(torch.isfinite(inputs.grad).all()),
        "no gradient reaches its input, or one that is not finite",
    )


def _resumes(check: _Check, trial: TrialConfig) -> None:
    import torch

    from fpt.checkpoints import State
    from fpt.trainer import train

    def end(luck: int, *, at: int | None) -> State:
        with _other_luck(luck):
            training = train([trial], log_every=1)
            for record in training:
                if at is not None and record.step == at and training.settled:
                    state = State.from_bytes(training.states()[0].to_bytes())
                    training = train([trial], state=[state], log_every=1)
                    for _ in training:
                        pass
                    break
            return training.outcomes[0].state

    ends = [check.call("training it", lambda n=n, at=at: end(n, at=at)) for n, at in ENDS]  # type: ignore[misc]
    for stop, other in zip(("at its end", "after 2 steps"), ends[1:], strict=True):
        differ = [
            name
            for name, tensor in ends[0].tensors.items()
            if name not in other.tensors
            or not torch.equal(tensor.nan_to_num(), other.tensors[name].nan_to_num())
        ]
        check.that(
            not differ,
            f"four training steps give other bits a second time (stopped {stop}): "
            f"{', '.join(differ[:3])}; forward() draws random numbers of its own (use nn.Dropout), "
            "or keeps something that is in no parameter and in no buffer",
        )


ENDS = ((0, None), (1, None), (2, 2))
"""Of each training of the probe: the state of the global generators, and the step of a resume."""


class _Probe(Task):
    """Random vectors in two classes, for a backbone to be tried on."""

    name: str
    tokens: int

    def shape(self, protocol: ProtocolName) -> Shape:
        return Shape(tokens=self.tokens, inputs=3, embedded=False, classes=2)

    def splits(self, protocol: ProtocolName) -> Splits:
        def draw(rng: np.random.Generator, size: int) -> Batch:
            inputs = rng.standard_normal((size, self.tokens, 3), dtype=np.float32)
            return Batch(inputs, (inputs[:, :1, 0] > 0).astype(np.int64))

        held = Stored(draw(np.random.default_rng(0), 4))
        return Splits(train=Generated(draw), validation=held, test=held)

    def baseline(self, protocol: ProtocolName) -> Baseline:
        return Baseline(0.5, "guess")


# ------------------------------------------------------------------------------------------- trials


def is_own(trial: TrialConfig) -> bool:
    """Tell whether code of a user's takes part in a trial."""
    return bool(trial.own_classes)


def check_trial(trial: TrialConfig, *, other_process: bool = False) -> tuple[str, ...]:
    """Check a trial's task and backbone where they are a user's own, once in a process.

    Returns:
        What is doubtful about the task, the first time: see `check_task`.

    Raises:
        ContractError: As `check_task` and `check_backbone`.
        DataError: If data is missing.
    """
    if not is_own(trial):
        return ()
    dumped = trial.model_dump(mode="json")
    own = json.dumps([dumped["task"], dumped["backbone"], trial.train, trial.protocol])
    return _check_once(own, trial, other_process)


@functools.lru_cache(maxsize=256)
def _remember(own: str, other_process: bool) -> list[bool]:
    return []


def _check_once(own: str, trial: TrialConfig, other_process: bool) -> tuple[str, ...]:
    done = _remember(own, other_process)
    if done:
        return ()
    names = {name for name, _ in trial.own_classes}
    doubts: tuple[str, ...] = ()
    if "task" in names:
        doubts = check_task(trial.task, trial.protocol, other_process=other_process)
    if "backbone" in names:
        splits = trial.task.splits(trial.protocol)
        parts = [splits.train.batch(1, random_streams.TRAINING, 0, 2)]
        parts += [s.plain(np.arange(1)) for s in (splits.test,) if isinstance(s, Stored)]
        check_backbone(
            trial.backbone,
            tokens=trial.task.shape(trial.protocol).tokens,
            train=trial.train,
            padded=any(part.lengths is not None for part in parts),
        )
    done.append(True)
    return doubts


# --------------------------------------------------------------------------------------- how to say


class _Check:
    """Raises what is wrong with a class, with the place of its source."""

    def __init__(self, what: str, own: type, part: str = "") -> None:
        self.what = what
        self.own = own
        self.part = part

    def within(self, part: str) -> _Check:
        return _Check(self.what, self.own, f"{part}: ")

    def say(self, what: str) -> str:
        return f"{plugins.line_of(self.own)}: {self.what}: {self.part}{what}"

    def that(self, holds: bool, problem: str) -> None:
        if not holds:
            raise ContractError(self.say(problem))

    def is_a(self, what: str, value: object, wanted: type) -> None:
        name = f"fpt.{wanted.__name__}"
        self.that(isinstance(value, wanted), f"{what} is {_kind(value)}, wanted {name}")

    def call(self, what: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except ContractError:
            raise
        except DataError:
            raise
        except NotImplementedError as error:
            raise ContractError(self.say(f"{what} is not implemented")) from error
        except Exception as error:
            raise ContractError(self.say(f"{what} raises {plugins.describe(error)}")) from error


def _kind(value: object) -> str:
    if value is None:
        return "None"
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    own = type(value)
    article = "an" if own.__name__[:1].lower() in "aeiou" else "a"
    return f"{article} {own.__name__}"


@contextlib.contextmanager
def _other_luck(n: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch for a block, and put them back."""
    mine, numpys = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    torchs = torch.get_rng_state() if torch is not None else None
    random.seed(n)
    np.random.seed(n)
    if torch is not None:
        torch.manual_seed(n)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        random.setstate(mine)
        np.random.set_state(numpys)
        if torch is not None and torchs is not None:
            torch.set_rng_state(torchs)
