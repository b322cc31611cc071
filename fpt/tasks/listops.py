"""ListOps: nested lists of digits under MIN, MAX, MED and SM, to be evaluated to one digit.

Trees are grown by the Long Range Arena's rules: a node is a digit with probability 0.75 or at the
depth limit, else an operator with 2 to `max_arguments` arguments; the root is an operator. A tree
of a length (operators, closing brackets and digits) strictly between two bounds is kept, once. Here
they are grown a level at a time, thousands side by side, and a tree that has outgrown the upper
bound is dropped at once, which changes nothing of what is kept.

A sequence is held as `bytes`, one token id a byte: 0 padding, 1 to 10 the digits, 11 to 14 the
operators, 15 the closing bracket. The round brackets of the arena's files say nothing that the
square ones do not, and go. The paper's tokenizer splits at everything but letters and digits, so it
loses the closing brackets too: its 15 ids are 0 to 14, and an operator's arguments have no end.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import statistics
import uuid
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from fpt import random_streams
from fpt.files import DataError, cache_folder, content_digest
from fpt.spec import JSON, DataPath
from fpt.tasks.base import (
    FIXED_SET_SEED,
    Baseline,
    Batch,
    ProtocolName,
    Shape,
    Splits,
    Stored,
    Task,
    majority_class,
)

PADDING, DIGIT, MIN, MAX, MED, SM, CLOSE = 0, 1, 11, 12, 13, 14, 15
"""Token ids; the digit d has the id DIGIT + d."""

PAPER_TOKENS = 512
"""Where the paper's code cuts a sequence."""

ROUNDS = 50
"""Of boosting, a tree a class each."""

FITTED = 20_000
"""Sequences that the stronger baseline is fitted to, at most: each process fits it once."""

Example = tuple[bytes, int]
"""A sequence of token ids, with brackets, and the digit that it evaluates to."""

_OPERATORS: dict[int, Callable[[list[int]], int]] = {
    MIN: min,
    MAX: max,
    MED: lambda arguments: int(statistics.median(arguments)),
    SM: lambda arguments: sum(arguments) % 10,
}
_SPELLINGS = {b"[MIN": MIN, b"[MAX": MAX, b"[MED": MED, b"[SM": SM}

# Spelled operators become bytes 128 and up, which no text has, before all is translated at once.
_STRANGE = 255
_IDS = bytearray([_STRANGE] * 256)
_IDS[ord("]")] = CLOSE
for _digit in range(10):
    _IDS[ord("0") + _digit] = DIGIT + _digit
for _operator in _SPELLINGS.values():
    _IDS[128 + _operator] = _operator


def parse(expression: bytes) -> bytes:
    """Token ids of an expression like `( ( ( [MAX 2 ) 9 ) ] )`; round brackets may be missing.

    Raises:
        ValueError: If it holds anything but MIN, MAX, MED, SM, digits and brackets.
    """
    text = expression
    for spelling, operator in _SPELLINGS.items():
        text = text.replace(spelling, bytes([128 + operator]))
    tokens = text.translate(bytes(_IDS), b"() \t\r\n")
    if _STRANGE in tokens:
        known = ", ".join(spelling.decode() for spelling in _SPELLINGS)
        raise ValueError(f"not an expression of {known}, ], digits and round brackets")
    return tokens


def evaluate(tokens: Iterable[int]) -> int:
    """The digit that a sequence of token ids (with brackets, without padding) evaluates to.

    Raises:
        ValueError: If the sequence is not one well-formed tree.
    """
    open_operators: list[tuple[int, list[int]]] = []
    result: int | None = None
    for place, token in enumerate(tokens):
        if result is not None:
            raise ValueError(f"token {place}: more after the end of the tree")
        if token in _OPERATORS:
            open_operators.append((token, []))
            continue
        if DIGIT <= token < DIGIT + 10:
            value = token - DIGIT
        elif token == CLOSE and open_operators and open_operators[-1][1]:
            operator, arguments = open_operators.pop()
            value = _OPERATORS[operator](arguments)
        else:
            raise ValueError(f"token {place}: id {token} cannot stand here")
        if open_operators:
            open_operators[-1][1].append(value)
        else:
            result = value
    if result is None:
        raise ValueError("the tree does not end")
    return result


def best_guess(train: Batch, test: Batch) -> Baseline:
    """The better of two rules, learnt from `train`: the value that is most frequent, or the one
    that goes most often with the outermost operator.
    """
    counts = np.zeros((CLOSE + 1, 10), dtype=np.int64)
    np.add.at(counts, (train.inputs[:, 0], train.targets[:, 0]), 1)
    right = counts.argmax(axis=1)[test.inputs[:, 0]] == test.targets[:, 0]
    guess = Baseline(float(right.mean()), "best guess from the outermost operator alone")
    rules = (guess, majority_class(train.targets, test.targets))
    return max(rules, key=lambda rule: rule.accuracy or 0.0)


class ListOps(Task):
    """ListOps of the Long Range Arena, generated or read from the arena's files; 10 classes.

    Protocol sound: brackets kept (16 ids), padding masked, read out at the last real token, test
    split. Protocol paper: brackets lost (15 ids), cut at 512 tokens, padding not masked, read out
    at the last position whatever stands there, and the validation split is the one reported.
    """

    name: Literal["listops"] = "listops"
    max_depth: int = Field(default=10, ge=2)
    """Depth of the deepest digits; the root has depth 1."""
    max_arguments: int = Field(default=10, ge=2, le=100)
    """Most arguments of an operator; the fewest are 2."""
    min_length: int = Field(default=500, ge=0)
    """A tree has more tokens than this, closing brackets included."""
    max_length: int = Field(default=2000, ge=5)
    """A tree has fewer tokens than this, closing brackets included."""
    train: int = Field(default=96_000, ge=1)
    """Trees to train on."""
    validation: int = Field(default=2_000, ge=1)
    """Trees of the validation split."""
    test: int = Field(default=2_000, ge=1)
    """Trees of the test split."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens of a sequence: longer ones are cut, shorter ones padded. null: `max_length` (sound);
    512, or `max_length` if that is less (paper)."""
    folder: DataPath | None = None
    """A folder with the arena's basic_train.tsv, basic_val.tsv and basic_test.tsv. null: generate.
    Of the other parameters only `max_length` and `tokens` matter then."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_length + 2 > self.max_length and self.folder is None:
            raise ValueError(
                f"no length lies strictly between min_length {self.min_length} and max_length "
                f"{self.max_length}; set both"
            )
        return self

    def shape(self, protocol: ProtocolName) -> Shape:
        """The paper's defaults: 512 tokens of 15 ids; sound: 2,000 tokens of 16."""
        if protocol == "paper":
            tokens, ids = min(PAPER_TOKENS, self.max_length), CLOSE
        else:
            tokens, ids = self.max_length, CLOSE + 1
        return Shape(tokens=self.tokens or tokens, inputs=ids, embedded=True, classes=10)

    def splits(self, protocol: ProtocolName) -> Splits:
        """Read the folder, or grow the trees (some 10 s for the arena's 100,000, once: they are
        kept in the cache folder).

        Raises:
            DataError: If the folder is not whole, or there are not that many distinct trees.
        """
        return _splits(self, protocol, self._digest())

    def baseline(self, protocol: ProtocolName) -> Baseline:
        """The better of the most frequent value and the outermost operator's."""
        splits = self.splits(protocol)
        assert isinstance(splits.train, Stored)
        assert isinstance(splits.test, Stored)
        return best_guess(splits.train.examples, splits.test.examples)

    def stronger_baseline(self, protocol: ProtocolName) -> Baseline | None:
        """Boosted trees on the outermost operator and the number of each token, of which a
        sequence's order is no part; fitted to the first FITTED trees of the training split. None
        where that is no better than the trivial baseline, as of the arena's long sequences.
        """
        found = _boosted(self, protocol, self._digest())
        trivial = self.baseline(protocol)
        assert found.accuracy is not None
        assert trivial.accuracy is not None
        return found if found.accuracy > trivial.accuracy else None

    def test_examples(self) -> int | None:
        """Return the trees of the test split; None of a folder's."""
        return self.test if self.folder is None else None

    def identity(self) -> JSON:
        """The parameters; of a folder its content's digest, and what applies to it."""
        out = super().identity()
        if self.folder is not None:
            applies = ("name", "max_length", "tokens")
            out = {field: out[field] if field in applies else None for field in out}
            out["folder"] = f"sha256:{self._digest()}"
        return out

    def _digest(self) -> str | None:
        return None if self.folder is None else content_digest(_files(self.folder), text=True)


@functools.lru_cache(maxsize=16)
def _boosted(task: ListOps, protocol: ProtocolName, digest: str | None) -> Baseline:
    from sklearn.ensemble import HistGradientBoostingClassifier

    splits = task.splits(protocol)
    assert isinstance(splits.train, Stored)
    assert isinstance(splits.test, Stored)
    train, test = splits.train.examples, splits.test.examples
    # Rounds are fixed beforehand, as no split is left to stop by under the protocol paper.
    trees = HistGradientBoostingClassifier(
        max_iter=ROUNDS, early_stopping=False, categorical_features=[0], random_state=0
    )
    trees.fit(_tokens_counted(train.inputs[:FITTED]), train.targets[:FITTED, 0])
    right = trees.predict(_tokens_counted(test.inputs)) == test.targets[:, 0]
    rule = "boosted trees on the outermost operator and the number of each token"
    return Baseline(float(right.mean()), rule)


def _tokens_counted(inputs: np.ndarray) -> np.ndarray:
    # (B, T) to the first token and how often each id occurs, but for the padding's.
    counts = [(inputs == token).sum(axis=1) for token in range(PADDING + 1, CLOSE + 1)]
    return np.stack([inputs[:, 0], *counts], axis=1).astype(np.float32)


# Kept: the trials of a process share the sets. The digest is there to notice a changed folder.
@functools.lru_cache(maxsize=2)
def _splits(task: ListOps, protocol: ProtocolName, digest: str | None) -> Splits:
    if task.folder is None:
        sets = generated_sets(task)
    else:
        sets = [_read(file, task) for file in _files(task.folder)]
    width = task.shape(protocol).tokens
    if protocol == "paper":
        bare = [
            [(tokens.replace(bytes([CLOSE]), b""), value) for tokens, value in examples]
            for examples in sets[:2]
        ]
        train, validation = (_stored(examples, width, masked=False) for examples in bare)
        return Splits(train=train, test=validation, digest=digest)
    train, validation, test = (_stored(examples, width, masked=True) for examples in sets)
    return Splits(train=train, validation=validation, test=test, digest=digest)


def _stored(examples: list[Example], width: int, *, masked: bool) -> Stored:
    inputs = np.full((len(examples), width), PADDING, dtype=np.uint8)
    lengths = np.empty(len(examples), dtype=np.int32)
    for row, (tokens, _) in enumerate(examples):
        lengths[row] = min(len(tokens), width)
        inputs[row, : lengths[row]] = np.frombuffer(tokens[:width], dtype=np.uint8)
    targets = np.array([[value] for _, value in examples], dtype=np.uint8)
    return Stored(Batch(inputs, targets, lengths if masked else None))


# --- Generation

# Sets of more tokens than this take seconds to grow, and are kept on disk.
WORTH_KEEPING = 20_000_000


def generated_sets(task: ListOps, *, keep_above: int = WORTH_KEEPING) -> list[list[Example]]:
    """Return the training, the validation and the test set of trees that grow here.

    Args:
        task: Its sizes and the trees' parameters.
        keep_above: Tokens above which the trees are kept in the cache folder, and read from there.
    """
    sizes = (task.train, task.validation, task.test)
    worth = sum(sizes) * task.max_length > keep_above
    examples = iter(_kept_on_disk(task) if worth else _grown(task))
    return [list(itertools.islice(examples, size)) for size in sizes]


def _kept_on_disk(task: ListOps) -> list[Example]:
    """What `_grown` gives, from the file in the cache folder if an earlier process left one."""
    parameters = json.dumps([task.version, task.identity() | {"tokens": None}], sort_keys=True)
    key = hashlib.sha256(parameters.encode()).hexdigest()[:16]
    file = cache_folder() / f"listops-{key}.npz"
    # A file that is no longer whole fails its checksum, and is written anew.
    broken = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile)
    with contextlib.suppress(*broken), np.load(file) as stored:
        return _cut(stored["tokens"], stored["lengths"], stored["values"])
    examples = _grown(task)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    # Without a place to keep it, it grows again the next time.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                np.savez(
                    stream,
                    tokens=np.frombuffer(b"".join(tokens for tokens, _ in examples), np.uint8),
                    lengths=np.array([len(tokens) for tokens, _ in examples], np.int32),
                    values=np.array([value for _, value in examples], np.uint8),
                )
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    return examples


def _cut(tokens: np.ndarray, lengths: np.ndarray, values: np.ndarray) -> list[Example]:
    # The sequences that stand one after another in `tokens`.
    text, ends = tokens.tobytes(), np.cumsum(lengths, dtype=np.int64)
    return [
        (text[start:end], int(value))
        for start, end, value in zip(ends - lengths, ends, values, strict=True)
    ]


def _grown(task: ListOps) -> list[Example]:
    """As many distinct trees as the splits have together, in the splits' order.

    Raises:
        DataError: If there are not that many.
    """
    asked = task.train + task.validation + task.test
    roots, patience = 4096, 20
    found: dict[bytes, int] = {}
    counts: list[int] = []
    while len(found) < asked:
        rng = random_streams.generator(FIXED_SET_SEED, random_streams.SPLIT, step=len(counts))
        found.update(_written(_grow(rng, task, roots)))
        counts.append(len(found))
        if len(counts) > patience and counts[-1] - counts[-1 - patience] < patience * roots / 1000:
            raise DataError(
                f"listops: {asked:,} trees were asked for, but among {roots * len(counts):,} drawn "
                f"there are {len(found):,} distinct ones with more than {task.min_length:,} and "
                f"fewer than {task.max_length:,} tokens, and hardly any new ones come; ask for "
                "fewer, or set the lengths further apart"
            )
    examples = list(found.items())[:asked]
    # Short trees repeat, so that those found first are rather the short ones: hence another order.
    order = random_streams.generator(FIXED_SET_SEED, random_streams.SPLIT, site=1).permutation(
        asked
    )
    return [examples[i] for i in order]


@dataclass(frozen=True)
class _Level:
    """The operators of many trees at one depth, and all their arguments, both in order."""

    tree: np.ndarray
    """(operators,) the tree that each is in."""
    operator: np.ndarray
    """(operators,) uint8 token id."""
    arguments: np.ndarray
    """(operators,) uint8 how many arguments it has."""
    digit: np.ndarray
    """(arguments,) uint8."""
    nested: np.ndarray
    """(arguments,) bool: it is no digit, but the next one of the operators a level below."""

    def of(self, trees: np.ndarray) -> _Level:
        """What belongs to some trees: a mask over all of them."""
        operators = trees[self.tree]
        arguments = np.repeat(operators, self.arguments)
        return _Level(
            self.tree[operators],
            self.operator[operators],
            self.arguments[operators],
            self.digit[arguments],
            self.nested[arguments],
        )


def _grow(rng: np.random.Generator, task: ListOps, roots: int) -> list[_Level]:
    """Grow `roots` trees from the root downwards; the levels of those of a fitting length."""
    levels = []
    tree, length = np.arange(roots), np.ones(roots, dtype=np.int64)
    for depth in range(1, task.max_depth):
        operator = rng.integers(MIN, SM + 1, len(tree), dtype=np.uint8)
        arguments = rng.integers(2, task.max_arguments + 1, len(tree), dtype=np.uint8)
        total = int(arguments.sum(dtype=np.int64))
        digit = rng.integers(0, 10, total, dtype=np.uint8)
        nested = rng.integers(0, 4, total, dtype=np.uint8) == 0
        if depth + 1 == task.max_depth:
            nested[:] = False
        levels.append(_Level(tree, operator, arguments, digit, nested))
        # An operator was counted as one token; in truth it has arguments and a bracket besides.
        length += np.bincount(tree, weights=arguments + 1.0, minlength=roots).astype(np.int64)
        tree = np.repeat(tree, arguments)[nested]
        tree = tree[length[tree] < task.max_length]
    fits = (length > task.min_length) & (length < task.max_length)
    return [level.of(fits) for level in levels]


def _written(levels: list[_Level]) -> list[Example]:
    """Trees as sequences, with their values."""
    # Upwards: the value and the length of each operator's list, from those a level below.
    value, size = np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.int64)
    sizes: list[tuple[np.ndarray, np.ndarray]] = []
    for level in reversed(levels):
        values, argument_size = level.digit.copy(), np.ones(len(level.digit), dtype=np.int64)
        values[level.nested], argument_size[level.nested] = value, size
        value, size = _apply(level, values), 2 + _sums(argument_size, level.arguments)
        sizes.append((size, argument_size))
    lengths = size
    # Downwards: where each list begins, and with that where its tokens stand.
    start = np.cumsum(lengths) - lengths
    tokens = np.empty(int(lengths.sum()), dtype=np.uint8)
    for level, (size, argument_size) in zip(levels, reversed(sizes), strict=True):
        tokens[start] = level.operator
        tokens[start + size - 1] = CLOSE
        before = np.cumsum(argument_size) - argument_size  # counted from the level's first one
        begin = before + np.repeat(start + 1 - before[_starts(level.arguments)], level.arguments)
        tokens[begin[~level.nested]] = DIGIT + level.digit[~level.nested]
        start = begin[level.nested]
    return _cut(tokens, lengths, value)


def _starts(counts: np.ndarray) -> np.ndarray:
    # Where runs of so many values begin, in an array of runs.
    starts: np.ndarray = np.cumsum(counts, dtype=np.int64) - counts
    return starts


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    # The sum of each run of so many values.
    if not len(counts):
        return np.empty(0, dtype=np.int64)
    sums: np.ndarray = np.add.reduceat(values, _starts(counts), dtype=np.int64)
    return sums


def _apply(level: _Level, values: np.ndarray) -> np.ndarray:
    """(operators,) what each makes of the values of its arguments."""
    if not len(level.operator):
        return np.empty(0, dtype=np.uint8)
    # A row an operator, sorted, with a ten for each argument that it has not.
    count, rows = level.arguments, np.arange(len(level.operator))
    place = np.arange(len(values)) - np.repeat(_starts(count), count)
    table = np.full((len(rows), int(count.max())), 10, dtype=np.uint8)
    table[np.repeat(rows, count), place] = values
    table.sort(axis=1)
    median = (table[rows, (count - 1) // 2] + table[rows, count // 2]) // 2
    value: np.ndarray = np.select(
        [level.operator == MIN, level.operator == MAX, level.operator == MED],
        [table[:, 0], table[rows, count - 1], median],
        _sums(values, count) % 10,
    )
    return value.astype(np.uint8)


# --- The arena's files

_DIGITS = {str(digit).encode() for digit in range(10)}
_EVALUATED = 200
"""Lines of a file that are checked against their targets: all would take a minute."""


def _files(folder: Path) -> list[Path]:
    files = [folder / f"basic_{split}.tsv" for split in ("train", "val", "test")]
    for file in files:
        if not file.is_file():
            raise DataError(
                f"{file}: missing; the folder of listops holds the Long Range Arena's files "
                "basic_train.tsv, basic_val.tsv and basic_test.tsv (leave folder out, and such "
                "trees are generated)"
            )
    return files


def _read(file: Path, task: ListOps) -> list[Example]:
    """The examples of one of the arena's files.

    Raises:
        DataError: If it is not what the arena writes.
    """
    examples = []
    with file.open("rb") as stream:
        if stream.readline().rstrip() != b"Source\tTarget":
            raise DataError(
                f"{file}:1: not a file of listops: its first line has to be Source, a tab, Target"
            )
        for number, line in enumerate(stream, start=2):
            source, _, target = line.rstrip(b"\r\n").partition(b"\t")
            try:
                tokens = parse(source)
                if target not in _DIGITS:
                    raise ValueError("no tab and digit (its value) after the tree; is it cut off?")
                value = int(target)
                if number < 2 + _EVALUATED and evaluate(tokens) != value:
                    raise ValueError(f"evaluates to {evaluate(tokens)}, but its target is {value}")
                if task.tokens is None and len(tokens) > task.max_length:
                    raise ValueError(
                        f"{len(tokens):,} tokens are more than max_length {task.max_length:,}; "
                        "set max_length, or tokens to have sequences cut"
                    )
            except ValueError as error:
                raise DataError(f"{file}:{number}: {error}") from error
            examples.append((tokens, value))
    if not examples:
        raise DataError(f"{file}: holds no examples")
    return examples
