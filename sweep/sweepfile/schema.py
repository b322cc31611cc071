"""The sweep file: what may be said in it.

A file is read in three steps. YAML becomes plain values with a line for each
(`sweep.sweepfile.document`); these become a `SweepFile` (`sweep.sweepfile.reading`); then
`sweep.sweepfile.trials` puts the fields of each trial together and lets `fpt.TrialConfig` judge
them. No step stops at a problem: what cannot be used is left out, the rest goes on, and all
problems are told together.
"""

from __future__ import annotations

import functools
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    field_validator,
    model_validator,
)

from fpt.backbones.sources import HUB, PACKAGE, PRETRAININGS
from fpt.config import BackboneConfig, EvaluationConfig, OptimizerConfig, PlateauConfig
from fpt.spec import Spec
from fpt.tasks import TASKS
from sweep.sweepfile.document import Document, Location, SweepFileError
from sweep.sweepfile.metrics import CONVERGENCE, METRICS, MetricName
from sweep.sweepfile.tuning_spec import TuneSpec

__all__ = [
    "CONVERGENCE",
    "METRICS",
    "ClaimSpec",
    "KeepSpec",
    "MetricName",
    "SweepFile",
    "SweepFileError",
    "TableSpec",
    "TuneSpec",
]

OBJECTS: dict[str, tuple[type[Spec], ...]] = {
    "task": tuple(TASKS.values()),
    "backbone": (BackboneConfig,),
    "optimizer": (OptimizerConfig,),
    "stop": (PlateauConfig,),
    "evaluation": (EvaluationConfig,),
}
"""The fields of a trial that have fields of their own, and what may stand there."""

NAMED = ("task", "backbone")
"""The fields of which a mere word is the name: `task: bit-xor` is `task: {name: bit-xor}`."""

PATHS = ("task.path", "task.folder", "backbone.weights")
"""The fields that may hold a path; a relative one starts at the sweep file's folder."""

NO_PATH = (HUB, PACKAGE, "shipped:", "$")
"""Beginnings of what may stand there and is no relative path."""

NAME = r"^[a-z0-9][a-z0-9._-]*$"
"""The name of a sweep."""

BUILT_IN = PRETRAININGS
"""The pretrainings that need no entry under `backbones:`."""

CONDITIONS = ("missing", "present")
"""Keys of a pattern under `exclude` that are no fields: each holds a path, and the pattern leaves
trials out only where that path is not there, or is."""

# --- the models ---------------------------------------------------------------------------------


Fields = dict[str, Any]
"""Fields of a trial: names, or dotted paths such as `backbone.size`, with their values."""

Axis = Annotated[list[Any], Field(min_length=1)]
"""The points of an axis. A word, number, list or null is the value of the field that the axis is
named after; so is a mapping of that field's own fields. A mapping with `label` and fields of the
trial sets several at once."""

ONE, SEVERAL = "<one>", "<several>"
# The places that pydantic gives to what is wrong in a `OneOrMore`; no place in a file.

_T = TypeVar("_T")
OneOrMore = Annotated[
    Annotated[_T, Tag(ONE)] | Annotated[tuple[_T, ...], Tag(SEVERAL)],
    Discriminator(lambda value: SEVERAL if isinstance(value, list | tuple) else ONE),
]
"""A value, or a list of them."""


class ConvergenceSpec(Spec):
    """When a trial counts as converged; `sweep.analysis.convergence` defines it."""

    tolerance: float = Field(default=0.01, gt=0, lt=1)
    """How far the smoothed validation accuracy may lie from its plateau, as a fraction."""
    smoothing: int = Field(default=5, ge=1)
    """Evaluations over which the curve is averaged."""


class TableSpec(Spec):
    """The table that the sweep fills."""

    rows: str
    """The axis whose points are the rows."""
    columns: str | None = None
    """The axis whose points are the columns. May be left out where `value` is a list: its metrics
    are the columns then."""
    value: OneOrMore[MetricName] = "test_accuracy"
    """What the cells show: a numeric column of the trials, or several; or a metric that the task
    declares, on a split (test_r2). steps_to_convergence is worked out from the curves;
    training_set_accuracy needs `evaluation.training_set`."""
    convergence: ConvergenceSpec = ConvergenceSpec()
    """When a trial counts as converged, for steps_to_convergence."""
    reference: str | None = None
    """A table of published figures to print beside ours: T1 to T22 of the paper, or R1."""
    tolerance: float = Field(default=1.0, gt=0, le=100)
    """How far from the published figure still counts as reproduced: points of an accuracy, per cent
    of the figure of any other metric. The interval over our seeds comes on top
    (`sweep.analysis.cells`)."""
    labels: dict[str, dict[str, str]] = Field(default_factory=dict)
    """axis -> {label of a point: name of its row or column in the reference}, where they differ."""
    title: str | None = None
    """Printed above the table."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the metrics of `value`, one or several."""
        return (self.value,) if isinstance(self.value, str) else tuple(self.value)

    @model_validator(mode="after")
    def _check(self) -> TableSpec:
        if self.columns is None and isinstance(self.value, str):
            raise ValueError("columns: missing; name an axis, or give `value` as a list of metrics")
        if self.columns == self.rows:
            raise ValueError(f"rows and columns are both {self.rows!r}")
        return self


class ClaimSpec(Spec):
    """A contrast between two points of an axis, to be tested with its uncertainty."""

    that: str
    """`A > B` or `A < B`: two labels of the axis. It is about the number, whatever is better."""
    axis: str
    """The axis that holds both."""
    on: MetricName = "test_accuracy"
    """The metric that is compared."""
    per: OneOrMore[str] | None = None
    """The claim is made anew for each point of this axis (or of each of these)."""
    paired_by: str = "seed"
    """The axis whose points are paired."""
    looks: tuple[Annotated[int, Field(ge=3)], ...] = ()
    """Numbers of pairs, rising, at which the claim is read; the error is spent over these. Without,
    it is read once, when all of its pairs have ended. They are the first pairs of the axis."""
    spending: Literal["obrien-fleming", "pocock"] = "obrien-fleming"
    """How the error is spent over `looks`: nearly all at the last, or evenly."""
    test: Literal["welch", "paired"] | None = None
    """The t test: of two arms, or of the differences of pairs. null: welch where seeds are paired,
    which pair little but the order of data; else paired."""

    @model_validator(mode="after")
    def _check(self) -> ClaimSpec:
        left, right = self.sides
        if left == right:
            raise ValueError(f"{left!r} is compared with itself")
        named = (self.axis, *self.places, self.paired_by)
        if any(now <= before for before, now in zip(self.looks, self.looks[1:], strict=False)):
            raise ValueError(f"looks: {list(self.looks)} does not rise from one to the next")
        if twice := [name for name in named if named.count(name) > 1]:
            raise ValueError(
                f"{twice[0]!r} is named twice; axis, per and paired_by are different axes"
            )
        return self

    @field_validator("that")
    @classmethod
    def _two_sides(cls, value: str) -> str:
        if not re.fullmatch(r"\s*\S.*\s[<>]\s.*\S\s*", value):
            raise ValueError(f"{value!r} is not of the form 'A > B' or 'A < B'")
        return " ".join(_split(value))

    @property
    def sides(self) -> tuple[str, str]:
        """The labels of both sides, left one first."""
        left, _, right = _split(self.that)
        return left, right

    @property
    def more(self) -> bool:
        """Whether the left side is claimed to have more of the metric, and not less."""
        return _split(self.that)[1] == ">"

    @property
    def by_arms(self) -> bool:
        """Whether two arms are compared, and not the differences of pairs."""
        return (self.test or ("welch" if self.paired_by == "seed" else "paired")) == "welch"

    @property
    def places(self) -> tuple[str, ...]:
        """The axes under `per`."""
        return (self.per,) if isinstance(self.per, str) else self.per or ()


@functools.cache
def _split(that: str) -> tuple[str, str, str]:
    # A claim: its left side, < or >, its right side. It is asked for once a trial.
    left, sign, right = re.split(r"\s([<>])\s", that, maxsplit=1)
    return left.strip(), sign, right.strip()


class KeepSpec(Spec):
    """What is kept of a finished trial beside its figures."""

    trained: bool | None = None
    """The trained tensors, which `fpt.load_model` needs. null: kept, unless attention or
    feed-forward weights were trained, since these are large; true: kept; false: not kept."""
    backbones: bool = False
    """The backbone of every trial. Those of trials under `backbones:` are kept in any case."""


class RetrySpec(Spec):
    """How many more times a run tries a trial, by the cause of its failure; null: without end.

    What `code` or `data` failed is never tried again before `sweep retry`. A trial that another
    driver trains, or that was stopped, has not failed.
    """

    memory: Annotated[int, Field(ge=0)] | None = 4
    """It was alone in its pack and out of memory: tried at the end, with nothing beside it, each
    batch in twice as many parts (`accumulation` in its row) as before. Larger packs are split."""
    device: Annotated[int, Field(ge=0)] | None = 3
    """Its GPU failed, or was taken: tried on another node, where there is one."""
    worker: Annotated[int, Field(ge=0)] | None = 3
    """Its worker's process ended without a word."""
    node: Annotated[int, Field(ge=0)] | None = 10
    """The machine that it ran on was lost, or could not do what it promised: no CUDA where it has a
    GPU, a library that does not load, no room for another thread or open file."""
    storage: Annotated[int, Field(ge=0)] | None = 5
    """Nothing could be written, for longer than `limits.storage_seconds`."""
    hung: Annotated[int, Field(ge=0)] | None = 2
    """It made no step for `limits.hang_seconds`, and its worker was ended."""
    preempted: Annotated[int, Field(ge=0)] | None = None
    """The machine that it ran on was taken away with a notice."""


class LimitsSpec(Spec):
    """What a run may take."""

    hours: Annotated[float, Field(gt=0)] | None = None
    """Then a run stops: running trials save their states, and the same command goes on."""
    save_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Between two saved states of a running trial: the most work that an accident costs it."""
    hang_seconds: Annotated[float, Field(gt=0)] | None = None
    """A trial that makes no step for so long is ended. null: 10 minutes or 50 times the slowest
    step so far, whichever is more; an hour for data, weights and everything else before the first
    step."""
    storage_seconds: Annotated[float, Field(ge=0)] = 600.0
    """How long a trial that has ended, or a driver, waits for storage that fails."""


class Block(Spec):
    """A product of axes over shared fields."""

    trial: Fields = Field(default_factory=dict)
    """Fields that all trials share, as a mapping or with dotted paths."""
    axes: dict[str, Axis] = Field(default_factory=dict)
    """Name -> points; the trials are their product, the last axis changing fastest. The name is a
    field of the trial (`seed`, `task.bits`), or any word if all its points are labelled mappings
    of fields."""
    zip: tuple[dict[str, Axis], ...] = ()
    """Axes that go in step: the points of those in one entry are taken together, first with first,
    second with second. An entry counts as one further axis."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Patterns: a trial that fits one is left out. A pattern is a mapping from axes (or fields) to
    a value, a word with wildcards (`bit-*`), or a list of these; all of its keys have to fit. With
    `missing: PATH` it leaves trials out only on a machine where that path (from the sweep file's
    folder, or `package:MODULE/FOLDER`) is not there, with `present: PATH` only where it is."""


class SweepFile(Block):
    """A sweep: which trials, and what is shown of them."""

    sweep: Annotated[str, Field(json_schema_extra={"pattern": NAME}, max_length=100)]
    """The name of the sweep: lower-case letters, digits, hyphens."""
    description: str = ""
    """What the sweep is for, in a sentence."""
    defaults: dict[str, dict[str, Fields]] = Field(default_factory=dict)
    """Field or axis -> {value or label: fields}: fields of the trials that have that value. They
    win over `trial`, and lose to what a point of an axis says itself."""
    backbones: dict[str, Fields] = Field(default_factory=dict)
    """Name -> fields of a trial that is run first and whose backbone is kept. The name can be used
    as a `pretraining`. It shares `trial` and `defaults` with all others, but for pretraining
    (random) and train (all), unless it says otherwise itself."""
    include: tuple[Block, ...] = ()
    """Further blocks. Each takes over the file's `trial` and `axes`, of which it replaces those it
    names itself, and the file's `exclude`; `zip`, if given, replaces the file's."""
    tune: TuneSpec | None = None
    """How the learning rate of each cell is chosen. null: it is what the fields say."""
    table: TableSpec | None = None
    """The table that the sweep fills."""
    claims: tuple[ClaimSpec, ...] = ()
    """Contrasts to be tested."""
    keep: KeepSpec = KeepSpec()
    """What is kept of finished trials."""
    pack: Annotated[int, Field(ge=1)] | Literal["auto", "off"] = "auto"
    """Whether trials that share a frozen backbone train side by side, which changes no figure in
    fp32. auto: as many as pay. off: each alone. A number: at most so many, whether they pay or not.
    In any case no worker idles for it."""
    retry: RetrySpec = RetrySpec()
    """How often what the environment failed is tried again."""
    limits: LimitsSpec = LimitsSpec()
    """What a run may take."""

    _document: Document = PrivateAttr()

    @field_validator("sweep")
    @classmethod
    def _slug(cls, value: str) -> str:
        if not re.fullmatch(NAME, value):
            raise ValueError(f"{value!r} has to be lower-case letters, digits, dots and hyphens")
        return value

    @field_validator("pack", mode="before")
    @classmethod
    def _auto_off_or_number(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not number and value not in ("auto", "off"):
            raise ValueError(f"{value!r} is neither auto, off nor a number of trials from 1 on")
        return value

    @property
    def document(self) -> Document:
        """The file that this was read from."""
        return self._document

    def blocks(self) -> list[tuple[Location, Block]]:
        """Return the blocks that make trials, with their places in the file: its own, then included
        ones.

        The file's own block makes trials if it has axes, or if nothing else in the file makes any.
        """
        out: list[tuple[Location, Block]] = []
        if self.axes or self.zip or not (self.include or self.backbones):
            out.append(((), self))
        out.extend((("include", number), block) for number, block in enumerate(self.include))
        return out
