"""The published figures that our tables print beside ours, and the setting each was measured in.

`published.csv` holds them as they were printed: per cent, steps, layers, parameters. A figure is
`reported` or `unverified` (one weak source: shown greyed, never compared). Whether ours may be
compared with one is decided here, from a trial's config: `differences` names everything in which
the config departs from the setting that the figure was measured in.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fpt.config import TRAINABLE, EvaluationConfig, TrialConfig
from fpt.tasks import TASKS, Task

ACCURACY = "accuracy_percent"
"""The unit of most figures; the others are layers, parameters and gradient_steps."""


@dataclass(frozen=True)
class Figure:
    """One published number."""

    table: str
    section: str
    title: str
    row: str
    column: str
    value: str
    """As it was printed: its digits tell how precise it is."""
    unit: str
    trust: str
    """reported, or unverified."""
    note: str

    @property
    def number(self) -> float:
        """The value, in `unit`."""
        return float(self.value)

    @property
    def rounding(self) -> float:
        """Half a unit of the last digit that was printed: by so much the value may be off."""
        return 0.5 * 10.0 ** -len(self.value.partition(".")[2])

    @property
    def verified(self) -> bool:
        """Whether a difference may be drawn to it at all."""
        return self.trust == "reported"


@dataclass(frozen=True)
class Reference:
    """A published table."""

    name: str
    figures: Mapping[tuple[str, str], Figure]
    """(row, column) -> figure; a combination that was not published is not in it."""

    @property
    def rows(self) -> tuple[str, ...]:
        """The names of its rows, in the order of publication."""
        return tuple(dict.fromkeys(row for row, _ in self.figures))

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of its columns, in the order of publication."""
        return tuple(dict.fromkeys(column for _, column in self.figures))

    @property
    def title(self) -> str:
        """What it is about."""
        return next(iter(self.figures.values())).title

    @property
    def source(self) -> str:
        """Who published it, in a word or two."""
        return "paper" if self.name.startswith("T") else self.title.partition(" (")[0]


@functools.cache
def references() -> Mapping[str, Reference]:
    """Return every published table, by name (T1, T2 ..., R1)."""
    with Path(__file__).with_name("published.csv").open(encoding="utf-8", newline="") as file:
        figures = [Figure(**row) for row in csv.DictReader(file)]
    tables: dict[str, dict[tuple[str, str], Figure]] = {}
    for figure in figures:
        tables.setdefault(figure.table, {})[figure.row, figure.column] = figure
    return {name: Reference(name, own) for name, own in tables.items()}


_FPT = frozenset({"input", "norm", "output", "position"})


@dataclass(frozen=True)
class Setting:
    """What a figure was measured with. None: not told, or not one value."""

    task: str | None = None
    backbone: str = "gpt2"
    layers: int | None = 12
    width: int | None = 768
    pretraining: str | None = "language"
    train: frozenset[str] = _FPT
    """As far as the backbone has these groups."""
    learning_rate: float | None = 1e-3
    protocol: str = "paper"


_ALL = frozenset({*TRAINABLE, "recurrent"})
_LSTM: dict[str, Any] = {
    "backbone": "lstm-paper", "layers": 3, "pretraining": "random", "learning_rate": 3e-4
}  # fmt: skip
_RESIDUAL_LSTM = _LSTM | {"backbone": "lstm-residual", "layers": 12}

# (table, row, column), "" for any -> what was not as usual. Every line that fits holds; of two that
# set one field, the later one. Rows and columns named after a pretraining, a depth or a set of
# groups are read by `setting`. T4, T5, T18, T20 and T22 are not here, since no figure of theirs was
# found; T19 is T15 task by task.
_EXCEPTIONS: dict[tuple[str, str, str], dict[str, Any]] = {
    ("", "", "remote-homology"): {"learning_rate": 1e-4},
    ("T1", "fpt", "cifar10"): {"layers": 36, "width": 1280},
    ("T1", "full", ""): {"train": _ALL, "pretraining": "random"},
    ("T1", "full", "cifar10"): {"layers": 3},
    ("T1", "lstm", ""): {**_LSTM, "train": _ALL},
    ("T2", "image", ""): {"backbone": "vit", "pretraining": "image"},
    ("T2", "bit-memory", ""): {"pretraining": "trial"},
    ("T3", "", ""): {"pretraining": "random"},
    ("T3", "lstm", ""): _LSTM,
    ("T3", "lstm-12-residual-positions", ""): _RESIDUAL_LSTM,
    ("T7", "", ""): {"task": "cifar10-lra"},
    ("T8", "", ""): {"task": "cifar10"},
    ("T8", "medium", ""): {"layers": 24, "width": 1024},
    ("T8", "large", ""): {"layers": 36, "width": 1280},
    # Depths up to 24 occur, of which the width is not told.
    ("T11", "", ""): {"task": "listops", "width": None, "train": frozenset({"norm", "output"})},
    ("T12", "", ""): {"task": "listops", "width": None, "train": frozenset({"output"})},
    ("T10", "output-only", ""): {"train": frozenset({"output"})},
    ("T16", "", ""): {"task": "cifar10"},
    ("T16", "", "norm-frozen"): {"train": _FPT - {"norm"}},
    ("T17", "bert", ""): {"backbone": "bert"},
    ("T17", "t5-encoder", ""): {"backbone": "t5"},
    ("T17", "longformer", ""): {"backbone": "longformer"},
    ("T21", "", ""): {"pretraining": "random"},
    ("R1", "", ""): {"protocol": "sound", "learning_rate": None},
    ("R1", "full-random", ""): {"train": _ALL},
    ("R1", "full-language", ""): {"train": _ALL},
}
_PRETRAININGS = {name: name for name in ("language", "random", "statistics")} | {
    "pretrained": "language"
}
_GROUPS = {group: {group} for group in TRAINABLE} | {
    "fpt": set(_FPT), "last-attention": {"attention:last"}
}  # fmt: skip
_OTHER_MODELS = ("vanilla-transformer", "linformer")
"""Rows of models that are not a frozen transformer with the paper's layers around it."""
_COUNTED = {
    "total_parameters": "counted otherwise there (with the token table, which is not loaded here)",
    "trained_parameters": (
        "counted otherwise there (another token width, without output bias and final norm)"
    ),
}
"""Columns of parameters -> why their counts are not ours."""


def setting(figure: Figure) -> Setting:
    """Return what a figure was measured with, by its table, row and column."""
    fields: dict[str, Any] = {}
    if figure.column in TASKS:
        fields["task"] = figure.column
    for name in (figure.row.rpartition("-")[2], figure.row, figure.column):
        if name in _PRETRAININGS:
            fields["pretraining"] = _PRETRAININGS[name]
    if depth := re.fullmatch(r"(\d+)-layers", figure.row):
        fields["layers"] = int(depth[1])
    groups = figure.row.split("+")
    if set(groups) <= _GROUPS.keys():
        fields["train"] = frozenset[str]().union(*(_GROUPS[group] for group in groups))
    for key, values in _EXCEPTIONS.items():
        own = (figure.table, figure.row, figure.column)
        if all(want in ("", have) for want, have in zip(key, own, strict=True)):
            fields.update(values)
    return Setting(**fields)


def differences(figure: Figure, config: TrialConfig, *, rate_known: bool = True) -> tuple[str, ...]:
    """Return all that keeps a trial from being a re-run of what a figure was measured on.

    A few words each, so that a table can name a difference once for all cells that have it; empty
    where the two may be compared.

    Args:
        figure: The published figure.
        config: A trial's config.
        rate_known: Whether its learning rate is the trial's; else it is still to be chosen.
    """
    if figure.note.startswith("quoted") or figure.row in _OTHER_MODELS:
        return ("figure of another model and code",)
    theirs = setting(figure)
    if not rate_known:
        theirs = replace(theirs, learning_rate=None)
    of_model = figure.unit in ("layers", "parameters")
    out = []
    # How a model is trained does not change what it is.
    for what, found in _OF_MODEL if of_model else (*_OF_MODEL, *_OF_TRAINING):
        if (detail := found(theirs, config)) is not None:
            out.append(f"{what} ({detail})" if detail else what)
    if of_model and figure.column in _COUNTED:
        out.append(_COUNTED[figure.column])
    if figure.unit == ACCURACY and config.stop is None and config.steps < _converged(config):
        out.append("fewer steps than the paper's trials took to converge (T6)")
    return tuple(out)


def _other(ours: object, theirs: object) -> str | None:
    """Return what is to be said of two values that differ; None: they do not, or one is unknown."""
    return None if theirs in (None, ours) else f"{ours}, not {theirs}"


def _size(theirs: Setting, config: TrialConfig) -> str | None:
    ours = config.backbone
    if ours.name != theirs.backbone:
        return None
    if theirs.layers in (None, ours.layers) and theirs.width in (None, ours.width):
        return None
    size = f"{theirs.layers}" + (f" of width {theirs.width}" if theirs.width else "")
    return f"{ours.layers} layers of width {ours.width}, not {size}"


def _heads(theirs: Setting, config: TrialConfig) -> str | None:
    ours = config.backbone
    if ours.name != theirs.backbone or _size(theirs, config) is not None:
        return None
    usual = {
        size.heads
        for size in ours.row.sizes.values()
        if (size.layers, size.width) == (ours.layers, ours.width)
    }
    return _other(ours.heads, usual.pop()) if usual - {ours.heads} else None


def _weights(theirs: Setting, config: TrialConfig) -> str | None:
    ours = config.backbone.weights or ""
    known = {size.weights for size in config.backbone.row.sizes.values()}
    # The published figures are of no revision in particular.
    return ours if config.reads_weights and ours.partition("@")[0] not in known else None


def _trained(theirs: Setting, config: TrialConfig) -> str | None:
    has = config.backbone.row.trainable
    wanted = {group for group in theirs.train if group.partition(":")[0] in has}
    return " + ".join(config.train) if wanted != set(config.train) else None


def _usual(name: str) -> Any:
    return TrialConfig.model_fields[name].default


_Found = Callable[[Setting, TrialConfig], str | None]
"""Gives what is to be said of a difference, in parentheses; None: there is none."""

_OF_MODEL: tuple[tuple[str, _Found], ...] = (
    ("another task", lambda theirs, c: _other(c.task.name, theirs.task)),
    (
        "another task size",
        lambda theirs, c: (
            _changed_parameters(c.task) or None if theirs.task in (None, c.task.name) else None
        ),
    ),
    ("another backbone", lambda theirs, c: _other(c.backbone.name, theirs.backbone)),
    ("another backbone size", _size),
    ("another number of heads", _heads),
    ("other pretrained weights", _weights),
    ("other parameters trained", _trained),
)

_OF_TRAINING: tuple[tuple[str, _Found], ...] = (
    (
        "another pretraining",
        lambda theirs, c: _other("trial" if c.parent else c.pretraining, theirs.pretraining),
    ),
    ("another protocol", lambda theirs, c: _other(c.protocol, theirs.protocol)),
    (
        "another learning rate",
        lambda theirs, c: (
            f"{c.learning_rate:g}, not {theirs.learning_rate:g}"
            if theirs.learning_rate not in (None, c.learning_rate)
            else None
        ),
    ),
    (
        "another optimizer or dropout",
        lambda _, c: (
            ""
            if any(getattr(c, name) != _usual(name) for name in ("optimizer", "dropout"))
            else None
        ),
    ),
    ("another numerics class", lambda _, c: _other(c.numerics, _usual("numerics"))),
    (
        "another batch size",
        lambda _, c: None if 2 <= c.batch_size <= 16 else f"{c.batch_size}, not 2 to 16",
    ),
    (
        "another evaluation",
        lambda _, c: (
            f"{c.evaluation.batches} batches"
            if c.protocol == "paper" and c.evaluation.batches != EvaluationConfig().batches
            else None
        ),
    ),
    (
        "another embedding deviation",
        lambda _, c: (
            f"{c.embedding_deviation:g}"
            if c.embedding_deviation != _usual("embedding_deviation")
            and c.task.shape(c.protocol).embedded
            else None
        ),
    ),
)


def _changed_parameters(task: Task) -> str:
    # Numbers only: where data lies (a path, a hub id) is not what a task is.
    changed = [
        f"{name} {value}"
        for name, field in type(task).model_fields.items()
        if isinstance(value := getattr(task, name), int | float) and value != field.default
    ]
    return ", ".join(changed[:3]) + (" ..." if len(changed) > 3 else "")


def _converged(config: TrialConfig) -> float:
    # The steps that the paper needed on this task, with the nearer of the two backbones it tells.
    backbone = "random" if config.pretraining == "random" else "language"
    figure = references()["T6"].figures.get((backbone, config.task.name))
    return figure.number if figure else 0
