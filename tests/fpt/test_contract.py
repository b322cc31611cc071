"""A class a mistake: each ends in one sentence that names the class, its line and the fault."""

import dataclasses
import functools
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor, nn

import fpt
from fpt import metrics
from fpt.config import BackboneConfig
from fpt.files import ContractError

RNG = np.random.default_rng(0)
X = RNG.standard_normal((90, 8, 2)).astype(np.float32)
Y = RNG.integers(0, 3, (90, 1))
N = RNG.integers(2, 9, 90)


class Good(fpt.Task):
    """Three splits of stored vectors; a mistake changes one of these methods."""

    name: str = "mine"

    def shape(self, protocol: str) -> Any:
        return fpt.Shape(tokens=8, inputs=2, embedded=False, classes=3)

    def data(self) -> Any:
        return X, Y, None

    def source(self, x: Any, y: Any, n: Any) -> Any:
        return fpt.Stored(fpt.Batch(x, y, n))

    def splits(self, protocol: str) -> Any:
        parts = []
        for rows in (slice(0, 40), slice(40, 60), slice(60, 90)):
            taken = [None if part is None else part[rows] for part in self.data()]
            parts.append(self.source(*taken))
        return fpt.Splits(train=parts[0], validation=parts[1], test=parts[2])

    def baseline(self, protocol: str) -> Any:
        return fpt.Baseline(1 / 3, "guess")


def changed(**methods: Any) -> type[Good]:
    return type("Mistake", (Good,), methods)


def data(change: Callable[[Any, Any], tuple[Any, ...]]) -> type[Good]:
    def own(self: Good) -> Any:
        given = change(X.copy(), Y.copy())
        return given if len(given) == 3 else (*given, None)

    return changed(data=own)


def put(array: Any, index: Any, value: Any) -> Any:
    array[index] = value
    return array


def draws(draw: Callable[..., Any]) -> type[Good]:
    def splits(self: Good, protocol: str) -> Any:
        kept = Good.splits(self, protocol)
        return fpt.Splits(train=fpt.Generated(draw), validation=kept.validation, test=kept.test)

    return changed(splits=splits)


def transforms(transform: Callable[..., Any]) -> type[Good]:
    return changed(
        source=lambda self, x, y, n: fpt.Stored(fpt.Batch(x, y, n), transform, augments=True)
    )


def ids(change: Callable[[Any], Any]) -> type[Good]:
    return changed(
        shape=lambda self, protocol: fpt.Shape(tokens=8, inputs=10, embedded=True, classes=3),
        data=lambda self: (change((X[..., 0] > 0).astype(np.int64)), Y, None),
    )


def raising(error: Exception) -> Callable[..., Any]:
    def method(*_: object) -> Any:
        raise error

    return method


def numbers(change: Callable[[Any], Any] = lambda y: y, **methods: Any) -> type[Good]:
    """A task of numbers that keeps its contract, but for `change` and `methods`."""
    given = {
        "shape": lambda self, protocol: fpt.Shape(tokens=8, inputs=2, embedded=False, loss="mse"),
        "data": lambda self: (X, change(X[:, :1, 0].copy()), None),
        "metrics": lambda self, protocol: (metrics.R2, metrics.MAE),
        "baseline": lambda self, protocol: fpt.Baseline(None, "the mean", {"r2": 0.0}),
    }
    return changed(**given | methods)


def measures(function: Any) -> type[Good]:
    return numbers(metrics=lambda self, protocol: (fpt.Metric("own", function),))


def baseline(*fields: Any) -> type[Good]:
    return numbers(baseline=lambda self, protocol: fpt.Baseline(*fields))


def same(one: str, other: str) -> type[Good]:
    def splits(self: Good, protocol: str) -> Any:
        kept = Good.splits(self, protocol)
        flipped = [
            part[::-1]
            for part in (getattr(kept, one).examples.inputs, getattr(kept, one).examples.targets)
        ]
        return dataclasses.replace(kept, **{other: fpt.Stored(fpt.Batch(*flipped))})

    return changed(splits=splits)


class Forgets(Good):
    """Keeps what it was given outside of its fields."""

    def __reduce__(self) -> Any:
        return Forgets, (), {}

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None  # type: ignore[assignment]


def shaped(**fields: Any) -> type[Good]:
    fields = {"tokens": 8, "inputs": 2, "embedded": False, "classes": 3} | fields
    return changed(shape=lambda self, protocol: fpt.Shape(**fields))


TASKS: dict[str, tuple[type[Good], str]] = {
    "labels from 1": (data(lambda x, y: (x, y + 1)), "split train: targets have the value 3"),
    "label -100": (data(lambda x, y: (x, put(y, 70, -100))), "split test: targets have the value"),
    "labels of floats": (data(lambda x, y: (x, y + 0.5)), "targets are float64, wanted integers"),
    "labels of bools": (data(lambda x, y: (x, y > 0)), "targets are bool, wanted integers"),
    "labels in a flat array": (data(lambda x, y: (x, y[:, 0])), "targets have the shape (40,)"),
    "labels one-hot": (data(lambda x, y: (x, np.eye(3)[y[:, 0]])), "wanted (40, 1)"),
    "labels as text": (data(lambda x, y: (x, y.astype(str))), "targets are <U21"),
    "NaN in the test split": (
        data(lambda x, y: (put(x, (75, 2, 1), np.nan), y)),
        "split test: inputs have the value nan (example 15)",
    ),
    "infinity": (data(lambda x, y: (put(x, 3, np.inf), y)), "inputs have the value inf (example 3"),
    "too large for float32": (
        data(lambda x, y: (x.astype(float) * 1e60, y)),
        "inputs are too large for float32",
    ),
    "integers as vectors": (
        data(lambda x, y: (x.astype(int), y)),
        "inputs are int64, wanted float",
    ),
    "complex inputs": (data(lambda x, y: (x + 1j, y)), "inputs are complex64"),
    "objects": (data(lambda x, y: (x.astype(object), y)), "inputs are object"),
    "too few tokens": (data(lambda x, y: (x[:, :5], y)), "inputs have the shape (40, 5, 2)"),
    "no axis of features": (data(lambda x, y: (x[..., 0], y)), "inputs have the shape (40, 8)"),
    "axes swapped": (data(lambda x, y: (x.transpose(0, 2, 1), y)), "the shape (40, 2, 8)"),
    "more inputs than targets": (
        changed(source=lambda self, x, y, n: fpt.Stored(fpt.Batch(x, y[1:]))),
        "inputs are of 40 examples, targets of 39",
    ),
    "tensors": (
        changed(source=lambda self, x, y, n: fpt.Stored(fpt.Batch(torch.tensor(x), y))),
        "inputs are a Tensor, wanted a numpy array",
    ),
    "lists": (
        changed(source=lambda self, x, y, n: fpt.Stored(fpt.Batch(x, y.tolist()))),
        "targets are a list, wanted a numpy array",
    ),
    "no examples": (data(lambda x, y: (x[:60], y[:60])), "split test: has no examples"),
    "a length of 0": (data(lambda x, y: (x, y, put(N.copy(), 50, 0))), "split validation: lengths"),
    "a length beyond the tokens": (data(lambda x, y: (x, y, N + 4)), "wanted 1 to 8"),
    "lengths of floats": (data(lambda x, y: (x, y, N / 2)), "lengths are float64"),
    "lengths in a column": (
        data(lambda x, y: (x, y, N[:, None])),
        "lengths have the shape (40, 1)",
    ),
    "ids beyond the vocabulary": (ids(lambda x: x + 9), "inputs have the value 10"),
    "negative ids": (ids(lambda x: x - 1), "inputs have the value -1"),
    "ids of floats": (ids(lambda x: x / 2), "inputs are float64, wanted integers"),
    "ids one-hot": (ids(lambda x: np.eye(10)[x]), "inputs have the shape (40, 8, 10)"),
    "other data each time": (
        data(lambda x, y: (x + np.random.normal(size=x.shape).astype("f"), y)),
        "differ from one call of splits() to the next",
    ),
    "python's generator": (
        data(lambda x, y: (x * random.random(), y)),
        "differ from one call of splits()",
    ),
    "torch's generator": (
        data(lambda x, y: (x + torch.rand(x.shape).numpy(), y)),
        "differ from one call of splits()",
    ),
    "the clock": (
        data(lambda x, y: (x + np.float32(time.perf_counter()), y)),
        "differ from one call of splits()",
    ),
    "a draw of its own": (
        draws(lambda rng, n: fpt.Batch(X[i := np.random.randint(0, 90, n)], Y[i])),
        "split train: the same draw gives other examples a second time",
    ),
    "a draw of another size": (
        draws(lambda rng, n: fpt.Batch(X[:5], Y[:5])),
        "the shape (5, 8, 2)",
    ),
    "a draw that gives a pair": (draws(lambda rng, n: (X[:n], Y[:n])), "a batch is a tuple"),
    "a draw without size": (draws(lambda rng: fpt.Batch(X, Y)), "raises TypeError"),
    "a draw of labels beyond": (
        draws(lambda rng, n: fpt.Batch(X[np.arange(n) % 90], np.full((n, 1), 3))),
        "split train: targets have the value 3",
    ),
    "a transform that raises": (transforms(lambda rng, b: b.nothing), "transform raises Attribute"),
    "a transform that needs its generator": (
        transforms(lambda rng, b: fpt.Batch(b.inputs * rng.random(), b.targets)),
        "transform raises",
    ),
    "a transform that makes NaN": (
        transforms(lambda rng, b: fpt.Batch(b.inputs * np.nan, b.targets)),
        "inputs have the value nan",
    ),
    "a transform that gives nothing": (transforms(lambda rng, b: None), "a batch is None"),
    "no baseline": (changed(baseline=fpt.Task.baseline), "baseline(protocol) is not implemented"),
    "no splits": (changed(splits=fpt.Task.splits), "splits(protocol) is not implemented"),
    "a baseline in per cent": (
        changed(baseline=lambda self, protocol: fpt.Baseline(33.3, "guess")),
        "accuracy is 33.3, wanted a fraction",
    ),
    "a baseline that is a number": (
        changed(baseline=lambda self, protocol: 0.3),
        "baseline(protocol) is a float, wanted fpt.Baseline",
    ),
    "a baseline of NaN": (
        changed(baseline=lambda self, protocol: fpt.Baseline(float("nan"), "guess")),
        "accuracy is nan",
    ),
    "splits that raise": (
        changed(splits=raising(KeyError("x"))),
        "raises KeyError: 'x' (test_cont",
    ),
    "splits without protocol": (changed(splits=lambda self: None), "raises TypeError"),
    "splits in a tuple": (
        changed(splits=lambda self, protocol: (1, 2, 3)),
        "splits(protocol) is a tuple, wanted fpt.Splits",
    ),
    "no validation split": (
        changed(
            splits=lambda self, protocol: fpt.Splits(
                train=Good.splits(self, protocol).train, test=Good.splits(self, protocol).test
            )
        ),
        "split validation: is None, wanted fpt.Stored",
    ),
    "a drawn test split": (
        changed(
            splits=lambda self, protocol: fpt.Splits(
                train=(s := Good.splits(self, protocol)).train,
                validation=s.validation,
                test=fpt.Generated(lambda rng, n: fpt.Batch(X[:n], Y[:n])),
            )
        ),
        "split test: is a Generated, wanted fpt.Stored",
    ),
    "a train split of arrays": (
        changed(
            splits=lambda self, protocol: fpt.Splits(
                train=X,  # type: ignore[arg-type]
                validation=(s := Good.splits(self, protocol)).validation,
                test=s.test,
            )
        ),
        "split train: is a ndarray",
    ),
    "a shape that is a tuple": (
        changed(shape=lambda self, protocol: (8, 2)),
        "shape(protocol) is a tuple, wanted fpt.Shape",
    ),
    "no classes": (shaped(classes=0), "Shape: classes is 0"),
    "tokens of floats": (shaped(tokens=8.0), "Shape: tokens is 8.0"),
    "more read out than there is": (shaped(readout=9), "readout is 9, of 8 tokens"),
    "more predictions than targets": (shaped(outputs=2), "targets have the shape (40, 1), wanted"),
    "an identity that changes": (
        changed(identity=lambda self: {"name": "mine", "at": time.perf_counter()}),
        "identity() differs",
    ),
    "an identity that is not JSON": (
        changed(identity=lambda self: {"name": "mine", "at": {1}}),
        "identity() raises TypeError",
    ),
    "numbers of NaN": (
        numbers(lambda y: put(y, 70, np.nan)),
        "split test: targets have the value nan (example 10)",
    ),
    "numbers that are infinite": (numbers(lambda y: put(y, 3, -np.inf)), "the value -inf"),
    "numbers too large": (
        numbers(lambda y: y.astype(float) * 1e60),
        "targets are too large for float32",
    ),
    "numbers as text": (numbers(lambda y: y.astype(str)), "targets are <U"),
    "numbers as bools": (numbers(lambda y: y > 0), "targets are bool, wanted"),
    "complex numbers": (numbers(lambda y: y + 1j), "targets are complex64"),
    "numbers in a flat array": (numbers(lambda y: y[:, 0]), "targets have the shape (40,)"),
    "more numbers than outputs": (
        numbers(lambda y: np.repeat(y, 2, 1)),
        "targets have the shape (40, 2), wanted (40, 1)",
    ),
    "classes and numbers": (shaped(loss="mse"), "classes is 3, and loss mse predicts numbers"),
    "an unknown loss": (shaped(loss="huber"), "loss is 'huber', wanted cross-entropy or mse"),
    "numbers without a loss": (shaped(classes=0), "classes is 0, wanted an integer from 1"),
    "metrics that are one": (
        numbers(metrics=lambda self, protocol: metrics.R2),
        "metrics(protocol) is a Metric, wanted a tuple of fpt.Metric",
    ),
    "metrics by name": (
        numbers(metrics=lambda self, protocol: ("r2",)),
        "a metric is a str, wanted fpt.Metric",
    ),
    "two metrics of one name": (
        numbers(metrics=lambda self, protocol: (metrics.R2, metrics.R2)),
        "metrics(protocol) has two of the name 'r2'",
    ),
    "a metric of a name that is taken": (
        numbers(metrics=lambda self, protocol: (fpt.Metric("loss", max),)),
        "every trial has loss already",
    ),
    "metrics that raise": (
        numbers(metrics=raising(KeyError("x"))),
        "metrics(protocol) raises KeyError: 'x'",
    ),
    "a metric that raises": (
        measures(lambda outputs, targets: outputs[:, 5]),
        "metric own: function(outputs, targets) raises IndexError",
    ),
    "a metric of outputs alone": (measures(lambda outputs: 0.0), "(outputs, targets) raises Type"),
    "a metric of text": (measures(lambda o, t: "0.3"), "gives a str, wanted a number"),
    "a metric an example": (measures(lambda o, t: o - t), "gives a ndarray, wanted a number"),
    "a metric that is a verdict": (measures(lambda o, t: True), "gives a bool, wanted a number"),
    "a metric by luck": (
        measures(lambda o, t: np.random.rand()),
        "gives another number a second time",
    ),
    "a metric that writes": (
        measures(lambda o, t: float(put(o, 0, 1.0).sum())),
        "writes into what it is given",
    ),
    "a metric of two classes": (
        changed(metrics=lambda self, protocol: (metrics.AUROC,)),
        "metric auroc: function(outputs, targets) raises ValueError: it is of two classes",
    ),
    "the accuracy of numbers": (
        baseline(0.5, "guess"),
        "accuracy is 0.5, wanted None: of numbers there is none",
    ),
    "a baseline of an unknown metric": (
        baseline(None, "mean", {"rmse": 1.0}),
        "metrics has 'rmse', and the task has loss, mae, r2",
    ),
    "a metric of the baseline of NaN": (baseline(None, "mean", {"r2": np.nan}), "its r2 is nan"),
    "a baseline's metrics in a list": (baseline(None, "mean", [0.0]), "metrics is a list"),
    "no accuracy of classes": (
        changed(baseline=lambda self, protocol: fpt.Baseline(None, "guess")),
        "accuracy is None, wanted a fraction",
    ),
    "train and test are one": (same("train", "test"), "splits train and test are the same"),
    "validation and test are one": (
        same("validation", "test"),
        "splits validation and test are the same examples",
    ),
    "a length of 0 where every token is read out": (
        changed(
            shape=lambda self, protocol: fpt.Shape(
                tokens=8, inputs=2, embedded=False, classes=3, readout=8
            ),
            data=lambda self: (X, np.repeat(Y, 8, 1), put(N.copy(), 50, 0)),
        ),
        "split validation: lengths have the value 0 (example 10), wanted 1 to 8",
    ),
    "a task that forgets": (Forgets, "not equal to itself after pickling"),
}


@pytest.mark.parametrize("mistake", TASKS)
def test_a_mistake_in_a_task_is_told_in_a_sentence(mistake: str) -> None:
    own, message = TASKS[mistake]
    if own is not Forgets:
        own.__reduce_ex__ = lambda self, _: (functools.partial(made, mistake), ())  # type: ignore

    with pytest.raises(ContractError) as told:
        fpt.check_task(own())

    text = str(told.value)
    assert message in text
    assert text.count("\n") == 0
    assert "task mine: " in text


def made(mistake: str) -> Good:
    return TASKS[mistake][0]()


def test_tasks_that_keep_the_contract_pass() -> None:
    fpt.check_task(Good())
    fpt.check_task(fpt.TrialConfig(task="bit-xor", steps=1, seed=0).task)


def test_tasks_of_numbers_and_of_every_token_pass() -> None:
    every = changed(
        shape=lambda self, protocol: fpt.Shape(
            tokens=8, inputs=2, embedded=False, classes=3, readout=8
        ),
        data=lambda self: (X, np.repeat(Y, 8, 1), np.maximum(N - 2, 1)),
        metrics=lambda self, protocol: (metrics.F1, metrics.TOKEN_ACCURACY),
    )
    for number, own in enumerate((numbers(), numbers(lambda y: y.round().astype(int)), every)):
        PASSING[number] = own
        own.__reduce_ex__ = lambda self, _, n=number: (passing, (n,))  # type: ignore

        assert fpt.check_task(own()) == ()


PASSING: dict[int, type[Good]] = {}


def passing(number: int) -> Good:
    return PASSING[number]()


DOUBTS: dict[str, tuple[type[Good], str]] = {
    "one class": (data(lambda x, y: (x, y * 0)), "split train: all targets are the class 0"),
    "one class in the test split": (
        data(lambda x, y: (x, put(y, slice(60, 90), 1))),
        "split test: all targets are the class 1; nothing is to be learned",
    ),
    "one number": (numbers(lambda y: y * 0 + 2), "all targets are the number 2.0"),
    "a leak": (
        data(lambda x, y: (put(x, slice(60, 63), x[:3]), put(y, slice(60, 63), y[:3]))),
        "3 of 30 examples of split test stand in split train as well",
    ),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_what_is_doubtful_is_said_and_goes_on(doubt: str) -> None:
    own, message = DOUBTS[doubt]
    own.__reduce_ex__ = lambda self, _: (doubtful, (doubt,))  # type: ignore

    said = fpt.check_task(own())

    assert any(message in one for one in said)
    assert all(one.startswith("test_contract.py:") or "task mine: " in one for one in said)


def doubtful(doubt: str) -> Good:
    return DOUBTS[doubt][0]()


def test_the_message_names_the_line_of_the_class(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"^test_contract.py:\d+: task mine: ") as told:
        fpt.check_task(Forgets())

    line = int(str(told.value).split(":")[1])
    assert Path(__file__).read_text().splitlines()[line - 1] == "class Forgets(Good):"


# ---------------------------------------------------------------------------------------- backbones


class Mixer(nn.Module):
    """A backbone that keeps its contract; a mistake changes one of its methods."""

    groups: ClassVar[Any] = (("norm", "norm"), ("", "feedforward"))

    def __init__(self, config: BackboneConfig, tokens: int) -> None:
        super().__init__()
        self.mix = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.add()

    def add(self) -> None:
        pass

    def before(self, embedded: Tensor) -> Tensor:
        return embedded

    def after(self, given: Tensor) -> Any:
        return given

    def forward(self, embedded: Tensor, mask: Tensor | None) -> Any:
        return self.after(self.norm(embedded + torch.relu(self.mix(self.before(embedded)))))


class Tuple(Mixer):
    def after(self, given: Tensor) -> Any:
        return given, None


class LastToken(Mixer):
    def after(self, given: Tensor) -> Any:
        return given[:, -1]


class Transposed(Mixer):
    def after(self, given: Tensor) -> Any:
        return given.mT


class Double(Mixer):
    def after(self, given: Tensor) -> Any:
        return given.double()


class Nan(Mixer):
    def after(self, given: Tensor) -> Any:
        return given.log()


class Numpy(Mixer):
    def after(self, given: Tensor) -> Any:
        return given.detach().numpy()


class OverRows(Mixer):
    def before(self, embedded: Tensor) -> Tensor:
        return embedded - embedded.mean(0)


class Noise(Mixer):
    def before(self, embedded: Tensor) -> Tensor:
        return embedded + torch.rand_like(embedded)


class TrainingNoise(Mixer):
    def before(self, embedded: Tensor) -> Tensor:
        return embedded + torch.rand_like(embedded) if self.training else embedded


class Counts(Mixer):
    def add(self) -> None:
        self.register_buffer("seen", torch.zeros(1))

    def before(self, embedded: Tensor) -> Tensor:
        self.seen += 1
        return embedded


class Remembers(Mixer):
    last: Any = None

    def before(self, embedded: Tensor) -> Tensor:
        last, self.last = self.last, embedded.detach().mean()
        return embedded if last is None else embedded + last


class TrainingMemory(Mixer):
    steps = 0

    def before(self, embedded: Tensor) -> Tensor:
        self.steps += self.training
        return embedded * (1 + self.steps / 10) if self.training else embedded


class WritesWeights(Mixer):
    def before(self, embedded: Tensor) -> Tensor:
        self.norm.bias.data += 0.1
        return embedded


class Detached(Mixer):
    def after(self, given: Tensor) -> Any:
        return given.detach()


class NoGradientBelow(Mixer):
    def forward(self, embedded: Tensor, mask: Tensor | None) -> Any:
        return self.norm(self.mix(embedded.detach()))


class Raises(Mixer):
    def before(self, embedded: Tensor) -> Tensor:
        return embedded @ torch.ones(3)


class NoMask(Mixer):
    def forward(self, embedded: Tensor) -> Any:  # type: ignore[override]
        return embedded


class NoTokens(Mixer):
    def __init__(self, config: BackboneConfig) -> None:
        nn.Module.__init__(self)


class Ungrouped(Mixer):
    groups: ClassVar[Any] = (("norm", "norm"),)


class UnknownGroup(Mixer):
    groups: ClassVar[Any] = (("norm", "norms"), ("", "feedforward"))


class GroupsOfText(Mixer):
    groups: ClassVar[Any] = ("norm", "feedforward")


class BadRule(Mixer):
    groups: ClassVar[Any] = (("(norm", "norm"), ("", "feedforward"))


class NoGroups(nn.Module):
    pass


class Causal(Mixer):
    causal = True

    def before(self, embedded: Tensor) -> Tensor:
        return embedded.flip(1)


class IgnoresPadding(Mixer):
    def before(self, embedded: Tensor) -> Tensor:
        return embedded.roll(-1, 1)


class ConfigOfNothing(Mixer):
    Config: ClassVar[Any] = {}


class ConfigTaken(Mixer):
    @dataclasses.dataclass
    class Config:
        weights: str = ""


class ConfigUnread(Mixer):
    @dataclasses.dataclass
    class Config:
        kernel: "Kernel" = 3  # type: ignore  # noqa: F821


class ConfigRaises(Mixer):
    @dataclasses.dataclass
    class Config:
        kernel: int = 3

        def __post_init__(self) -> None:
            raise ValueError(f"kernel {self.kernel} is odd")


class ConfigModelRaises(Mixer):
    class Config(BaseModel):
        kernel: int = 3

        @field_validator("kernel")
        @classmethod
        def _even(cls, value: int) -> int:
            raise ValueError(f"kernel {value} is odd")

        model_config = ConfigDict(validate_default=True)


class ConfigMissing(Mixer):
    @dataclasses.dataclass
    class Config:
        kernel: int


class ConfigMutable(Mixer):
    @dataclasses.dataclass
    class Config:
        kernels: list[int] = dataclasses.field(default_factory=lambda: [3])


class InitRaises(Mixer):
    def add(self) -> None:
        raise KeyError("kernel")


class InitForgetsSuper(Mixer):
    def __init__(self, config: BackboneConfig, tokens: int) -> None:
        self.mix = nn.Linear(3, 3)


class Conv(Mixer):
    """Its `Config` gives it a field of its own."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        kernel: int = 3
        kinds: tuple[str, ...] = ("same",)

    def __init__(self, config: Any, tokens: int) -> None:
        super().__init__(config, tokens)
        self.convolution = nn.Conv1d(
            config.width, config.width, config.kernel, padding=config.kernel // 2
        )

    def before(self, embedded: Tensor) -> Tensor:
        return self.convolution(embedded.mT).mT


class Pydantic(Conv):
    """The same by a model of pydantic."""

    class Config(BaseModel):  # type: ignore[assignment]
        kernel: int = Field(default=3, ge=1)


BACKBONES: dict[type, str] = {
    Tuple: "forward() gives a tuple, wanted one tensor",
    LastToken: "forward() gives the shape (3, 16), wanted (3, 6, 16)",
    Transposed: "forward() gives the shape (3, 16, 6)",
    Double: "forward() gives float64, wanted float32",
    Nan: "forward() gives NaN or infinity",
    Numpy: "forward() gives a ndarray",
    OverRows: "depends on the other rows of its batch",
    Noise: "gives other numbers a second time",
    TrainingNoise: "four training steps give other bits a second time",
    Counts: "evaluation changes seen",
    Remembers: "gives other numbers a second time",
    TrainingMemory: "four training steps give other bits a second time (stopped after 2 steps)",
    WritesWeights: "gives other numbers a second time",
    Detached: "no gradient passes through it",
    NoGradientBelow: "no gradient reaches its input",
    Raises: "forward(embedded, mask) raises RuntimeError",
    NoMask: "forward(embedded, mask) raises TypeError",
    NoTokens: "building it raises TypeError",
    Ungrouped: "no group for backbone.mix.bias, backbone.mix.weight",
    UnknownGroup: "'norm' is in group 'norms'; the groups are norm, position",
    GroupsOfText: "groups has 'norm', wanted pairs of text",
    BadRule: "'(norm' is not a regular expression",
    NoGroups: "has no `groups`",
    ConfigOfNothing: "ConfigOfNothing.Config is {}, wanted a dataclass or a pydantic model",
    ConfigTaken: "every backbone has a field weights; choose another name",
    ConfigUnread: "NameError: name 'Kernel' is not defined",
    ConfigRaises: "ConfigRaises.Config: raises ValueError: kernel 3 is odd",
    ConfigModelRaises: "ConfigModelRaises.Config: kernel 3 is odd",
    ConfigMutable: "kernels can be changed in place; make it a tuple",
    InitRaises: "building it raises KeyError: 'kernel'",
    InitForgetsSuper: "building it raises AttributeError",
    Causal: "says causal = True, and a token's output depends on a later token",
    IgnoresPadding: "padding changes what is read out",
}


def config(own: type) -> dict[str, Any]:
    return {"name": f"{__name__}:{own.__name__}", "layers": 1, "width": 16, "heads": 1}


@pytest.mark.parametrize("mistake", BACKBONES, ids=lambda own: own.__name__)
def test_a_mistake_in_a_backbone_is_told_in_a_sentence(mistake: type) -> None:
    with pytest.raises((ContractError, ValueError)) as told:
        fpt.check_backbone(config(mistake), tokens=6, padded=mistake is IgnoresPadding)

    assert BACKBONES[mistake] in str(told.value)
    assert mistake.__name__ in str(told.value)


@pytest.mark.parametrize(
    "own", [Mixer, IgnoresPadding, Conv, Pydantic], ids=lambda own: own.__name__
)
def test_backbones_that_keep_the_contract_pass(own: type) -> None:
    fpt.check_backbone(config(own), tokens=6)


def trial(**backbone: Any) -> fpt.TrialConfig:
    own = config(backbone.pop("own", Conv)) | backbone
    return fpt.TrialConfig(task="bit-xor", backbone=own, pretraining="random", steps=1, seed=0)


def test_the_fields_of_a_backbones_own_are_those_of_any_other() -> None:
    five = trial(kernel=5)

    assert five.backbone.kernel == 5  # type: ignore[attr-defined]
    assert trial() == trial(kernel=3) != five
    assert five.identity()["backbone"]["kernel"] == 5
    assert "kernel" not in trial(own=Mixer).identity()["backbone"]
    for again in (
        pickle.loads(pickle.dumps(five)),
        fpt.TrialConfig.model_validate(five.model_dump(mode="json")),
    ):
        assert again == five
        assert hash(again.backbone) == hash(five.backbone)
    built = fpt.build_model([five])
    assert dict(built.backbone.named_parameters())["convolution.weight"].shape == (16, 16, 5)


@pytest.mark.parametrize(
    ("fields", "place", "message"),
    [
        ({"kernel": "five"}, ("backbone", "kernel"), "valid integer"),
        ({"kernel": True}, ("backbone", "kernel"), "valid integer"),
        ({"kernel": 5.5}, ("backbone", "kernel"), "valid integer"),
        ({"kernle": 5}, ("backbone", "kernle"), "Extra inputs"),
        ({"own": Pydantic, "kernel": 0}, ("backbone", "kernel"), "greater than or equal to 1"),
        ({"own": Mixer, "kernel": 5}, ("backbone", "kernel"), "Extra inputs"),
        ({"own": ConfigMissing}, ("backbone", "kernel"), "Field required"),
    ],
)
def test_a_field_of_a_backbones_own_is_judged_where_it_stands(
    fields: dict[str, Any], place: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValidationError) as told:
        trial(**fields)

    (error,) = told.value.errors()
    assert error["loc"] == place
    assert message in error["msg"]


class OwnInit(Good):
    """A constructor that takes no fields."""

    def __init__(self) -> None:
        super().__init__(name="mine")


class AfterInit(Good):
    """A mistake once its fields are known."""

    def model_post_init(self, context: Any) -> None:
        self.nothing.append(1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("own", [OwnInit, AfterInit], ids=lambda own: own.__name__)
def test_a_mistake_in_making_a_task_is_told_in_a_sentence(own: type) -> None:
    with pytest.raises(ValueError, match="making one raises") as told:
        fpt.TrialConfig(task={"name": f"{__name__}:{own.__name__}"}, steps=1, seed=0)

    assert "test_contract.py:" in str(told.value)
