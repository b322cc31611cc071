"""A class a mistake: each ends in one sentence that names the class, its line and the fault."""

import functools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fpt
from fpt.config import BackboneConfig
from fpt.contract import ContractError

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


@pytest.mark.parametrize("own", [Mixer, IgnoresPadding], ids=lambda own: own.__name__)
def test_backbones_that_keep_the_contract_pass(own: type) -> None:
    fpt.check_backbone(config(own), tokens=6)
