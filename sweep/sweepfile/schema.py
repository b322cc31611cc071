"""The sweep file: what may be said in it, and how a mistake is told.

A file is read in three steps. YAML becomes plain values with a line for each
(`sweep.sweepfile.document`); these become a `SweepFile`; then `sweep.sweepfile.trials` puts the
fields of each trial together and lets `fpt.TrialConfig` judge them. No step stops at a problem:
what cannot be used is left out, the rest goes on, and all problems are told together.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import ErrorDetails

from fpt.backbones import BACKBONES
from fpt.backbones.sources import HUB, PACKAGE, PRETRAININGS
from fpt.config import (
    BackboneConfig,
    EvaluationConfig,
    OptimizerConfig,
    PlateauConfig,
    TrainSet,
    TrialConfig,
)
from fpt.published import references
from fpt.spec import JSON, Spec
from fpt.tasks import TASKS
from sweep.sweepfile.document import (
    Document,
    Location,
    Problems,
    SweepFileError,
    label,
    shown,
    spell,
    unprintable,
)

__all__ = [
    "ClaimSpec",
    "KeepSpec",
    "SweepFile",
    "SweepFileError",
    "TableSpec",
    "TuneSpec",
    "json_schema",
    "load",
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

CONVERGENCE = "steps_to_convergence"
"""The metric that is no column of a trial's row but is worked out from its curve."""

METRICS = (
    "test_accuracy",
    "test_loss",
    "validation_accuracy",
    "validation_loss",
    "training_set_accuracy",
    "training_set_loss",
    "train_accuracy",
    "train_loss",
    CONVERGENCE,
    "steps_trained",
    "best_step",
    "seconds",
    "examples",
    "layers",
    "parameters",
    "parameters_trained",
)
"""What a table or a claim can be about: columns of a trial's row, and CONVERGENCE."""

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

MetricName = Literal[METRICS]  # type: ignore[valid-type]

_ONE, _SEVERAL = "<one>", "<several>"
# The places that pydantic gives to what is wrong in a `OneOrMore`; no place in a file.

_T = TypeVar("_T")
OneOrMore = Annotated[
    Annotated[_T, Tag(_ONE)] | Annotated[tuple[_T, ...], Tag(_SEVERAL)],
    Discriminator(lambda value: _SEVERAL if isinstance(value, list | tuple) else _ONE),
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
    """What the cells show: a numeric column of the trials, or several. steps_to_convergence is
    worked out from the curves; training_set_accuracy needs `evaluation.training_set`."""
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

    @model_validator(mode="after")
    def _check(self) -> ClaimSpec:
        left, right = self.sides
        if left == right:
            raise ValueError(f"{left!r} is compared with itself")
        named = (self.axis, *self.places, self.paired_by)
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


Rate = Annotated[float, Field(gt=0)]

CROSS_ARM = ("asha", "bohb", "halving", "hyperband", "median_stopping", "pb2", "pbt")
"""What schedulers are called that stop trials by comparing them with all others."""

DIGITS = 4
"""Significant digits of a rate that is worked out: so that it, and with it the id of a trial, does
not depend on a machine's rounding."""


class RangeSpec(Spec):
    """The learning rates among which a study chooses."""

    log: tuple[Rate, Rate] | None = None
    """The least and the greatest; those between are equally far apart in their logarithms."""
    points: Annotated[int, Field(ge=1, le=1000)] | None = None
    """How many of them are tried, in every cell."""
    values: Annotated[tuple[Rate, ...], Field(min_length=1)] | None = None
    """The rates themselves, in place of `log` and `points`."""

    @model_validator(mode="after")
    def _check(self) -> RangeSpec:
        if (self.values is None) == (self.log is None):
            raise ValueError("give either `log: [least, greatest]` and `points`, or `values`")
        if (self.log is None) != (self.points is None):
            raise ValueError("`log` and `points` come together, and never with `values`")
        if self.log is not None and self.log[0] >= self.log[1]:
            raise ValueError(f"log: {self.log[0]:g} is not below {self.log[1]:g}")
        if self.values is not None and len(set(self.values)) < len(self.values):
            raise ValueError("values: names a rate twice")
        if self.points is not None and len(set(self.even())) < self.points:
            raise ValueError(f"points: {self.points} do not fit, to {DIGITS} digits, between these")
        return self

    def at(self, place: float) -> float:
        """The rate at a place of the range: 0 is the least, 1 the greatest."""
        assert self.log is not None
        low, high = self.log
        if place in (0, 1):
            return high if place else low
        return rounded(low * (high / low) ** place)

    def even(self) -> tuple[float, ...]:
        """The values, or the points of a grid, from the least to the greatest."""
        if self.values is not None:
            return tuple(sorted(self.values))
        assert self.points is not None
        last = self.points - 1
        return tuple(self.at(i / last if last else 0.5) for i in range(self.points))

    def scattered(self) -> tuple[float, ...]:
        """Points of the van der Corput sequence: 1/2, 1/4, 3/4, 1/8, 5/8 ... of the range. More
        points only add to them.
        """
        assert self.points is not None
        return tuple(self.at(_mirrored(number)) for number in range(1, self.points + 1))


def rounded(rate: float) -> float:
    """A rate to DIGITS significant digits."""
    return float(f"{rate:.{DIGITS}g}")


def _mirrored(number: int) -> float:
    # The binary digits of a number, mirrored at the point: 6 is 110, and gives 0.011.
    out, part = 0.0, 0.5
    while number:
        out, part, number = out + part * (number % 2), part / 2, number // 2
    return out


class TuneSpec(Spec):
    """How the learning rate of each cell is chosen before its trials train.

    Every cell has the same rates, seeds and steps to choose by: the budget is the same for every
    arm. It is chosen by the mean over `seeds`; of equals, the smaller rate. Its table shows none of
    the trials that it was chosen by.
    """

    learning_rate: RangeSpec
    """What is tried."""
    by: Literal["validation_accuracy", "validation_loss"] = "validation_accuracy"
    """What is compared, at each trial's best checkpoint."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1)] = (
        100,
    )
    """The seeds to choose by. No trial of the sweep's own may have one of these."""
    sampler: Literal["grid", "qmc", "tpe"] = "grid"
    """grid: evenly spaced. qmc: quasi-random, so that more points later keep the earlier ones. Both
    are known before anything has trained. tpe: half of them so, and then one after another, where
    Optuna's TPE expects most: these depend on the order and the results of those before."""
    prune: Annotated[float, Field(gt=0, lt=1)] | None = None
    """A part of the steps (counted up to the next evaluation) after which a rate that is below the
    median of its own cell's is given up. null: each one trains to its end."""
    storage: str | None = None
    """A database for Optuna's studies, as SQLAlchemy writes it; `$NAME` is the environment's. null:
    that of FPT_SWEEP_STUDIES, else a journal file under the ledger's `studies/`."""
    scheduler: SkipJsonSchema[Any] = None
    """Refused, with the reason, whatever it is."""

    @field_validator("by", mode="before")
    @classmethod
    def _no_test(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("test_"):
            raise ValueError(
                f"{value!r} would choose by the test set, which is for what is reported; allowed: "
                "validation_accuracy, validation_loss"
            )
        return value

    @field_validator("scheduler", "sampler", "prune", mode="before")
    @classmethod
    def _no_races(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(value).lower()
        if (info.field_name == "scheduler" and value is not None) or any(
            one in name for one in CROSS_ARM
        ):
            raise ValueError(
                f"{value!r} would end trials by how they compare with those of other arms; the "
                "stop rule of an ablation is the same for every arm: `stop: {patience: 5}` under "
                "`trial:` (a plateau rule), or none. Inside a cell, `prune: 0.25` gives up the "
                "worse half of its rates"
            )
        return value

    @field_validator("seeds")
    @classmethod
    def _different(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names a seed twice")
        return value

    @field_validator("storage")
    @classmethod
    def _a_database(cls, value: str | None) -> str | None:
        if value is None or value.startswith("$"):
            return value
        if value.startswith("sqlite"):
            raise ValueError(
                "an SQLite file is not for several processes at once; leave `storage` out for a "
                "journal file, or name a PostgreSQL or MySQL database"
            )
        if "://" not in value:
            raise ValueError(f"{value!r} is no URL of a database, such as postgresql://host/name")
        if re.search(r"://[^/@:]*:[^/@$]+@", value):
            raise ValueError(
                "holds a password, and the file is copied to MLflow: write it as $NAME, for a "
                "variable of the environment"
            )
        return value

    @model_validator(mode="after")
    def _fit(self) -> TuneSpec:
        if self.sampler != "grid" and self.learning_rate.log is None:
            raise ValueError(f"sampler {self.sampler} needs a range: learning_rate: {{log: ...}}")
        if self.sampler == "tpe" and self.prune is not None:
            raise ValueError("prune: sampler tpe asks for its points one after another; use qmc")
        return self

    @property
    def rates(self) -> tuple[float, ...]:
        """The rates that are known before anything has trained."""
        if self.sampler == "grid":
            return self.learning_rate.even()
        scattered = self.learning_rate.scattered()
        return scattered[: (len(scattered) + 1) // 2] if self.sampler == "tpe" else scattered

    @property
    def budget(self) -> int:
        """The number of rates that are tried in a cell."""
        return self.learning_rate.points or len(self.learning_rate.values or ())


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
        """The blocks that make trials, with their places in the file: its own, then included ones.

        The file's own block makes trials if it has axes, or if nothing else in the file makes any.
        """
        out: list[tuple[Location, Block]] = []
        if self.axes or self.zip or not (self.include or self.backbones):
            out.append(((), self))
        out.extend((("include", number), block) for number, block in enumerate(self.include))
        return out


# --- reading ------------------------------------------------------------------------------------


def load(path: str | Path) -> SweepFile:
    """Read a sweep file, as far as its structure goes; `sweep.sweepfile.trials.load` reads its
    trials too.

    Raises:
        SweepFileError: With all problems, if there are any.
    """
    file, problems = read(path)
    if problems or file is None:
        raise problems.error()
    return file


def read(path: str | Path) -> tuple[SweepFile | None, Problems]:
    """Read a sweep file, leaving out what cannot be used.

    Returns:
        What could be read (None: nothing), and the problems.

    Raises:
        SweepFileError: If there is no text to speak of.
    """
    path = Path(path)
    document = Document(path)
    problems = Problems(path)
    content = document.parse(problems)
    if content is not None and not isinstance(content, dict):
        problems.add(1, "", "a sweep file is a mapping; it begins with `sweep: NAME`")
    if not isinstance(content, dict):
        return None, problems
    file = _validated(document, content, problems)
    if file is not None:
        file._document = document
        _check_text(file, problems)
        _check_names(file, problems)
    return file, problems


def _validated(document: Document, content: JSON, problems: Problems) -> SweepFile | None:
    try:
        return SweepFile.model_validate(content)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    kept = dict(content)
    for one in errors:
        location = tuple(part for part in one["loc"] if part not in (_ONE, _SEVERAL))
        what, given, allowed = explain(one, _siblings(location))
        problems.add(document.line(location), spell(location), what, given=given, allowed=allowed)
        # The rest is still to be judged: leave out an entry of axes or backbones, else the key.
        top = str(location[0]) if location else ""
        inner = kept.get(top)
        if top in ("axes", "backbones", "defaults") and isinstance(inner, dict) and location[1:]:
            kept[top] = {key: value for key, value in inner.items() if key != location[1]}
        elif top == "sweep":
            kept[top] = "unnamed"
        else:
            kept.pop(top, None)
    try:
        return SweepFile.model_validate(kept)
    except ValidationError:
        return None


def _siblings(location: Location) -> Iterable[str]:
    # What may stand at a place in the file beside a key that may not.
    parents: dict[str, type[Spec]] = {
        "table": TableSpec, "claims": ClaimSpec, "keep": KeepSpec, "include": Block,
        "retry": RetrySpec, "limits": LimitsSpec, "tune": TuneSpec,
    }  # fmt: skip
    if location[:2] == ("table", "convergence"):
        return ConvergenceSpec.model_fields
    if location[:2] == ("tune", "learning_rate") and location[2:]:
        return RangeSpec.model_fields
    inside = location[:-1] and parents.get(str(location[0]))
    return (inside or SweepFile).model_fields


def _check_text(file: SweepFile, problems: Problems) -> None:
    # That nothing which is printed as it stands holds a command to a terminal.
    def check(what: str, text: str, *at: str | int) -> None:
        if one := unprintable(text):
            code = f"U+{ord(one):04X} {unicodedata.name(one, '')}".rstrip()
            problem = f"{what} {shown(text)} holds a control character ({code}); leave it out"
            problems.add(file.document.line(at), spell(at), problem)

    for at, block in file.blocks():
        for inside, axes in (
            ((*at, "axes"), block.axes),
            *(((*at, "zip", number), group) for number, group in enumerate(block.zip)),
        ):
            for axis, points in axes.items():
                check("the name", axis, *inside, axis)
                for number, point in enumerate(points):
                    check("the label", label(point), *inside, axis, number)
    for name in file.backbones:
        check("the name", name, "backbones", name)
    check("the description", file.description.replace("\n", " "), "description")
    for number, claim in enumerate(file.claims):
        check("the claim", claim.that, "claims", number, "that")
    if file.table is not None:
        check("the title", file.table.title or "", "table", "title")
        for axis, names in file.table.labels.items():
            for ours, theirs in names.items():
                check("the name", theirs, "table", "labels", axis, ours)


def _check_names(file: SweepFile, problems: Problems) -> None:
    # That what a table or a claim names is there. Whether axes are fields is for
    # sweep.sweepfile.trials.
    axes = axis_labels(file)

    def known(what: str, name: str, allowed: Iterable[str], *at: str | int) -> bool:
        allowed = list(allowed)
        if name not in allowed:
            line = file.document.line(at)
            problems.add(line, spell(at), f"{what} {name!r}", given=name, allowed=allowed)
        return name in allowed

    no_axis = "no axis is called"
    for number, claim in enumerate(file.claims):
        at = ("claims", number)
        if known(no_axis, claim.axis, axes, *at, "axis"):
            for side in claim.sides:
                known(f"axis {claim.axis} has no point", side, axes[claim.axis], *at, "that")
        for name in claim.places:
            known(no_axis, name, axes, *at, "per")
        known(no_axis, claim.paired_by, axes, *at, "paired_by")

    table = file.table
    if table is None:
        return
    known(no_axis, table.rows, axes, "table", "rows")
    if table.columns is not None:
        known(no_axis, table.columns, axes, "table", "columns")
    published = None
    if table.reference is not None and known(
        "no published table is called", table.reference, references(), "table", "reference"
    ):
        published = references()[table.reference]
    used = [axis for axis in (table.rows, table.columns) if axis is not None]
    for axis, names in table.labels.items():
        if not known("neither rows nor columns are", axis, used, "table", "labels", axis):
            continue
        for ours, theirs in names.items():
            here = ("table", "labels", axis, ours)
            known(f"axis {axis} has no point", ours, axes.get(axis, [ours]), *here)
            if published is not None:
                names_there = published.rows if axis == table.rows else published.columns
                known(f"{table.reference} has no", theirs, names_there, *here)


def axis_labels(file: SweepFile) -> dict[str, dict[str, None]]:
    """Every axis of every block, in order, with the labels of its points."""
    out: dict[str, dict[str, None]] = {}
    for _, block in file.blocks():
        for group in (file.axes, *file.zip, block.axes, *block.zip):
            for name, points in group.items():
                out.setdefault(name, {}).update((label(point), None) for point in points)
    return out


# --- problems with fields -----------------------------------------------------------------------


def field_names(path: tuple[str, ...]) -> tuple[str, ...]:
    """The names that may stand under a path into a trial: () is the trial itself."""
    if not path:
        return tuple(TrialConfig.model_fields)
    if len(path) > 1 or path[0] not in OBJECTS:
        return ()
    names = dict.fromkeys(name for spec in OBJECTS[path[0]] for name in spec.model_fields)
    return (*names, "size") if path[0] == "backbone" else tuple(names)


@functools.cache
def is_field(path: str) -> bool:
    """Whether a dotted path leads to a field of a trial."""
    parts = path.split(".")
    return all(
        part in field_names(tuple(parts[:depth])) for depth, part in enumerate(parts[:2])
    ) and (len(parts) <= 2 or parts[0] in OBJECTS)


def explain(
    error: ErrorDetails, siblings: Iterable[str] = ()
) -> tuple[str, object, Iterable[object]]:
    """One of pydantic's errors in plain words.

    Args:
        error: As `ValidationError.errors()` gives it.
        siblings: The names that may stand beside a field that may not be there.

    Returns:
        What is wrong, what was given if it may be a misspelling, and what is allowed.
    """
    kind, given = error["type"], error["input"]
    message = error["msg"].removeprefix("Value error, ")
    if kind == "missing":
        return "missing", None, ()
    if kind == "extra_forbidden":
        return "no such field", error["loc"][-1], siblings
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", str(error["ctx"]["expected"]))
        return f"{shown(given)} is not known", given, allowed
    if kind == "unknown_task":
        name = given.get("name") if isinstance(given, dict) else given
        if name is None:
            return "name: missing", None, TASKS
        return f"no task is called {shown(name)}", name, TASKS
    if kind == "too_short":
        return "has no points", None, ()
    subject, should, rest = message.partition(" should ")
    if should and " " not in subject:  # "Input should be a valid integer"
        plain = not isinstance(given, dict | list | tuple)
        subject = shown(given) if plain else "this"
        return f"{subject} should {rest}", None, ()
    return message[:1].lower() + message[1:], None, ()


# --- for editors --------------------------------------------------------------------------------


def json_schema() -> JSON:
    """The JSON Schema of sweep files, by which editors complete and check them.

    It is made of the models that also judge a file. What it cannot say (that an axis exists, that
    two points differ) it leaves open.
    """
    schema = SweepFile.model_json_schema()
    trial = TrialConfig.model_json_schema()
    definitions: JSON = schema["$defs"] | trial.pop("$defs")
    for definition in (*definitions.values(), trial):
        if definition.get("title") not in {"TableSpec", "ClaimSpec", "TuneSpec"}:
            definition.pop("required", None)  # A trial's fields are given piece by piece.
    definitions["BackboneConfig"]["properties"]["size"] = {
        "enum": list(dict.fromkeys(size for row in BACKBONES.values() for size in row.sizes)),
        "description": "A named size, in place of layers, width and heads.",
    }
    definitions["BackboneConfig"]["properties"]["name"]["enum"] = list(BACKBONES)

    fields: dict[str, JSON] = trial["properties"]
    for name, words in (("task", TASKS), ("backbone", BACKBONES)):
        fields[name] = {
            "description": fields[name].get("description", ""),
            "anyOf": [
                {"enum": list(words)},
                *({"$ref": f"#/$defs/{spec.__name__}"} for spec in OBJECTS[name]),
            ],
        }
    fields["pretraining"]["anyOf"] = [{"enum": list(BUILT_IN)}, {"type": "string"}]
    groups = {"enum": [*get_args(TrainSet), "fpt", "all"]}
    fields["train"]["anyOf"] = [groups, {"type": "array", "items": groups}]
    for name in ("pretraining", "train"):
        fields[name].pop("type", None)

    dotted: dict[str, JSON] = {
        f"{name}.{inner}": {} for name in OBJECTS for inner in field_names((name,))
    }
    definitions["Fields"] = {
        "type": "object",
        "description": "Fields of a trial, by name or by dotted path.",
        "properties": fields | dotted,
        "additionalProperties": False,
    }
    labelled = {
        "type": "object",
        "description": "Several fields under one label.",
        "properties": {"label": {"type": ["string", "number"]}} | fields | dotted,
        "required": ["label"],
        "additionalProperties": False,
    }
    definitions["LabelledPoint"] = labelled
    either = {"$ref": "#/$defs/LabelledPoint"}

    def axis(point: JSON) -> JSON:
        return {"type": "array", "minItems": 1, "items": {"anyOf": [point, either]}}

    definitions["Axes"] = {
        "type": "object",
        "properties": {name: axis(field) for name, field in fields.items()}
        | {name: axis({}) for name in dotted},
        "additionalProperties": {"type": "array", "minItems": 1, "items": either},
    }
    # A task or backbone as a point of its own axis may carry a label.
    for name in NAMED:
        for spec in OBJECTS[name]:
            definitions[spec.__name__]["properties"]["label"] = {"type": ["string", "number"]}

    ref = "#/$defs/"
    place = {"type": "string", "minLength": 1}
    conditions = {
        "missing": place | {"description": "Only where this path is not there."},
        "present": place | {"description": "Only where this path is there."},
    }
    pattern = {"type": "object", "minProperties": 1, "properties": conditions}
    patterns = {"type": "array", "items": pattern}
    for block in (schema["properties"], definitions["Block"]["properties"]):
        block["trial"] = _described(block["trial"], {"$ref": ref + "Fields"})
        block["axes"] = _described(block["axes"], {"$ref": ref + "Axes"})
        zipped = {"type": "array", "items": {"$ref": ref + "Axes"}}
        block["zip"] = _described(block["zip"], zipped)
        block["exclude"] = _described(block["exclude"], patterns)
    named = {"type": "object", "additionalProperties": {"$ref": ref + "Fields"}}
    properties = schema["properties"]
    properties["backbones"] = _described(properties["backbones"], named)
    properties["defaults"] = _described(
        properties["defaults"], {"type": "object", "additionalProperties": named}
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "$defs": definitions,
        "title": "fpt-sweep: a sweep file",
    }


def _described(was: JSON, now: JSON) -> JSON:
    return {"description": was.get("description", ""), **now}
