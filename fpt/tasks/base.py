"""What a task is: a frozen config and the numpy code that makes its examples, in one class.

Shapes: B examples in a batch, T tokens, F input features a token, P = read-out tokens x predictions
a token. Tasks import numpy and never torch, so that a sweep can be planned where torch is not
installed; the trainer makes tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from pydantic import BaseModel, model_validator

from fpt import random_streams
from fpt.files import DataError, tree_digest
from fpt.hub import HubData
from fpt.metrics import Metric
from fpt.spec import JSON, Spec

ProtocolName = Literal["paper", "sound"]
"""paper: what the public code of arXiv 2103.05247 does, defects included. sound: validation split,
whole test set, masks, brackets kept. README lists the differences."""


FIXED_SET_SEED = 20210309
"""Seed of what belongs to a task and not to a trial: generated sets and the carving of splits, the
same for every trial, so that arms are compared on the same examples."""


@dataclass(frozen=True)
class Shape:
    """The shapes that a task asks of a model.

    Raises:
        ValueError: If a number is no integer from 1, if more tokens are read out than there are, or
            if `classes` and `loss` do not fit.
    """

    tokens: int
    """T: tokens of a sequence, padding included."""
    inputs: int
    """Features of a token (linear input layer), or number of token ids (embedding)."""
    embedded: bool
    """True: inputs are token ids. False: inputs are vectors."""
    classes: int = 0
    """Classes of one prediction; left out where predictions are numbers (loss mse)."""
    readout: int = 1
    """Tokens that are read out: the last (real) one, or the last `readout` ones. As many as there
    are tokens: every one, and the predictions of padding count for nothing."""
    outputs: int = 1
    """K: predictions a read-out token makes (bit-memory: the 50 bits of its patch)."""
    causal: bool = False
    """True: the targets lie in the sequence itself, so that only a causal backbone may be used."""
    loss: Literal["cross-entropy", "mse"] = "cross-entropy"
    """cross-entropy: of classes, in nats. mse: the mean squared error of numbers (regression)."""

    def __post_init__(self) -> None:
        if self.loss not in ("cross-entropy", "mse"):
            raise ValueError(f"Shape: loss is {self.loss!r}, wanted cross-entropy or mse")
        if self.loss == "mse" and self.classes:
            raise ValueError(
                f"Shape: classes is {self.classes!r}, and loss mse predicts numbers; leave one of "
                "them out"
            )
        counts = ["tokens", "inputs", "readout", "outputs"]
        for name in counts if self.loss == "mse" else ["classes", *counts]:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"Shape: {name} is {value!r}, wanted an integer from 1")
        if self.readout > self.tokens:
            raise ValueError(f"Shape: readout is {self.readout}, of {self.tokens} tokens")

    @property
    def positions(self) -> int:
        """P: predictions an example makes."""
        return self.readout * self.outputs

    @property
    def numbers(self) -> int:
        """C: numbers that a prediction is made of: a logit a class, or one."""
        return self.classes or 1


@dataclass(frozen=True)
class Batch:
    """Examples, on the host: B of them, T tokens of F features, P predictions an example.

    Of stored examples, integers may be narrower and floats wider than is said here; what a
    `Stored` or the trainer hands on is not. `fpt.check_task` raises where one of these is another.
    """

    inputs: np.ndarray
    """(B, T, F) float32, finite; or (B, T) int64 token ids, 0 to `Shape.inputs` - 1."""
    targets: np.ndarray
    """(B, P) int64, the class of each prediction, 0 to `Shape.classes` - 1; or of loss mse float32,
    finite. Where every token is read out, those of padding may be any such value."""
    lengths: np.ndarray | None = None
    """(B,) int64 real tokens of each sequence, `Shape.readout` to T (where every token is read out,
    1 to T): the rest is masked, and the read-out is at the last real token. None: every token is
    real (or the protocol says that padding is not masked)."""
    hidden: np.ndarray | None = None
    """(B, layers, 2, W) float32 initial hidden and cell states of a backbone that has such (the
    LSTM of the paper's code). None: drawn."""

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: np.ndarray | slice) -> Batch:
        """The examples at `index`."""
        lengths = None if self.lengths is None else self.lengths[index]
        hidden = None if self.hidden is None else self.hidden[index]
        return Batch(self.inputs[index], self.targets[index], lengths, hidden)


class Source(Protocol):
    """Where the batches of a split come from: a pure function of (seed, step)."""

    def batch(self, seed: int, stream: int, step: int, size: int) -> Batch:
        """The batch of `size` examples of one step of one stream (see `fpt.random_streams`)."""
        ...


@dataclass(frozen=True)
class Generated:
    """Unlimited examples, drawn anew at every step."""

    draw: Callable[[np.random.Generator, int], Batch]
    """(generator, size) -> batch."""

    def batch(self, seed: int, stream: int, step: int, size: int) -> Batch:
        """A fresh batch, the same for the same arguments."""
        return self.draw(random_streams.generator(seed, stream, step), size)


@dataclass(frozen=True)
class Stored:
    """A finite set of examples, visited in a new order each epoch."""

    examples: Batch
    """As they are stored: integers may be as narrow as they fit (bytes of text, pixels), and what
    is handed out is as wide as `Batch` says."""
    transform: Callable[[np.random.Generator | None, Batch], Batch] | None = None
    """Applied to each batch taken: (generator, batch) -> batch; the generator is None in evaluation
    (normalise only) and given in training (augment too)."""
    augments: bool = False
    """Whether `transform` draws anything from the generator."""

    def __len__(self) -> int:
        return len(self.examples)

    def index(self, seed: int, stream: int, step: int, size: int) -> np.ndarray:
        """(size,) int64: which examples are in a batch."""
        n = len(self.examples)
        rows = np.arange(step * size, (step + 1) * size)
        index = np.empty(size, dtype=np.int64)
        for epoch in range(int(rows[0]) // n, int(rows[-1]) // n + 1):
            here = rows // n == epoch
            index[here] = epoch_order(seed, stream, epoch, n)[rows[here] % n]
        return index

    def batch(self, seed: int, stream: int, step: int, size: int) -> Batch:
        """Examples [step * size, (step + 1) * size) of an endless run of shuffled epochs."""
        index = self.index(seed, stream, step, size)
        # Random batches of a test set (protocol paper) are not augmented.
        training = stream == random_streams.TRAINING
        rng = (
            random_streams.generator(seed, random_streams.AUGMENTATION, step) if training else None
        )
        return self._handed_out(rng, self.examples.take(index))

    def plain(self, index: np.ndarray) -> Batch:
        """The examples at `index`, without augmentation."""
        return self._handed_out(None, self.examples.take(index))

    def first(self, size: int) -> Stored:
        """At most `size` of the examples, those that a fixed shuffle puts first."""
        order = epoch_order(FIXED_SET_SEED, random_streams.SPLIT, 0, len(self.examples))
        return Stored(self.examples.take(np.sort(order[:size])), self.transform, self.augments)

    def chunks(self, size: int) -> Iterator[Batch]:
        """All examples once, in order, without augmentation, in batches of at most `size`."""
        for start in range(0, len(self.examples), size):
            yield self._handed_out(None, self.examples.take(slice(start, start + size)))

    def _handed_out(self, rng: np.random.Generator | None, batch: Batch) -> Batch:
        if self.transform is not None:
            batch = self.transform(rng, batch)
        return Batch(
            _widened(batch.inputs),
            _widened(batch.targets),
            None if batch.lengths is None else batch.lengths.astype(np.int64, copy=False),
            batch.hidden,
        )


def _widened(values: np.ndarray) -> np.ndarray:
    real = np.issubdtype(values.dtype, np.floating)
    return values.astype(np.float32 if real else np.int64, copy=False)


# A permutation of 96,000 costs milliseconds, and a step needs at most two: those of an epoch are
# kept, for as many seeds as train side by side.
@functools.lru_cache(maxsize=64)
def epoch_order(seed: int, stream: int, epoch: int, n: int) -> np.ndarray:
    """(n,) int32: the order in which an epoch visits n examples. Not to be written into."""
    # Site 1 keeps an epoch's order apart from what the stream draws in a step (site 0).
    return random_streams.generator(seed, stream, epoch, site=1).permutation(n).astype(np.int32)


@dataclass(frozen=True)
class Splits:
    """The data of a task under a protocol: the same at every call, in every process.

    `fpt.check_task` raises where it is not, and where two splits are the same examples.
    """

    train: Source
    """A `Stored` or `Generated` set, or whatever gives a `Batch` as `Source` says."""
    test: Source
    """Under the protocol sound a `Stored` set, read whole."""
    validation: Stored | None = None
    """Picks the checkpoint (protocol sound): by accuracy and then loss; of loss mse, by loss. None
    under the protocol paper, which has none."""
    digest: str | None = None
    """SHA-256 of the content that the data was read from; None where it is generated."""
    factor: float = 1.0
    """What a measured test accuracy is multiplied by (protocol paper: remote homology)."""


@dataclass(frozen=True)
class Baseline:
    """The figures of a rule that learns nothing of what the task is about, on the test split."""

    accuracy: float | None
    """A fraction; None of loss mse."""
    rule: str
    """The rule, in a few words."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Figures of the task's own metrics, by name, and its `loss`; as far as they are known."""


def majority_class(train: np.ndarray, test: np.ndarray) -> Baseline:
    """Always the class that is most frequent among the targets of the training split."""
    guess = np.bincount(train.ravel()).argmax()
    return Baseline(float((test == guess).mean()), "always the most frequent class")


class Task(Spec):
    """The base of all tasks: fields are its parameters; a subclass says what its examples are.

    A subclass gives `shape`, `splits` and `baseline`, and `metrics` if it has any. Each is a pure
    function of the fields and the protocol. `fpt.check_task` tries them out, and names what is
    wrong; whatever else these methods raise ends the trial as a fault of its code, DataError as one
    of its data.
    """

    version: ClassVar[int] = 1
    """Bumped whenever the numbers of this task may change; it enters the identity of a trial."""

    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        # `task: bit-xor` is short for `task: {name: bit-xor}`.
        return {"name": value} if isinstance(value, str) else value

    def shape(self, protocol: ProtocolName) -> Shape:
        """Return the shapes of inputs and outputs. It is asked for while a file is read, and so has
        to be quick, and to need no data.
        """
        raise NotImplementedError

    def splits(self, protocol: ProtocolName) -> Splits:
        """Load or generate the data: arrays as `Batch` says, (B, T, F) float32 vectors or (B, T)
        ids, with (B, P) targets.

        Raises:
            DataError: If the data is missing or not what it should be.
        """
        raise NotImplementedError

    def baseline(self, protocol: ProtocolName) -> Baseline:
        """Compute the trivial baseline, on the test split, where there is one.

        Raises:
            DataError: As `splits`.
        """
        raise NotImplementedError

    def metrics(self, protocol: ProtocolName) -> tuple[Metric, ...]:
        """Return what is measured beside loss and accuracy; see `fpt.metrics`."""
        return ()

    def stronger_baseline(self, protocol: ProtocolName) -> Baseline | None:
        """Return what a learner that reads no order gets, where that is more than the trivial
        baseline tells; None: nobody has asked.

        Raises:
            DataError: As `splits`.
        """
        return None

    def test_examples(self) -> int | None:
        """Return the examples of the whole test split; None where only the data tells."""
        return None

    def hub(self) -> HubData | None:
        """What is read from the Hub, for those who want it ahead of time; None: nothing.

        A task that gives something has a field `revision`, of which this says the value. If that is
        no commit, `sweep fetch` finds the commit that it stands for, and fills it in.
        """
        return None

    def identity(self) -> JSON:
        """What enters a trial's identity: every parameter, and a content digest for every path.

        Raises:
            DataError: If a path's content has to be read and is not there.
        """
        dumped = self.model_dump(mode="json")
        for name in type(self).model_fields:
            dumped[name] = _by_content(
                getattr(self, name), dumped[name], f"task {self.name}: {name}"
            )
        return dumped


def _by_content(value: Any, dumped: Any, where: str) -> Any:
    """Return what a field is dumped as, each path in it replaced by a digest of its content."""
    if isinstance(value, Path):
        try:
            return f"sha256:{tree_digest(value)}"
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    if isinstance(value, list | tuple):
        return [_by_content(*pair, where) for pair in zip(value, dumped, strict=True)]
    if isinstance(value, dict):
        pairs = zip(value.values(), dumped.items(), strict=True)
        return {name: _by_content(own, plain, where) for own, (name, plain) in pairs}
    if isinstance(value, BaseModel):
        fields = {name: getattr(value, name) for name in type(value).model_fields}
        return _by_content({name: fields[name] for name in dumped}, dumped, where)
    return dumped
