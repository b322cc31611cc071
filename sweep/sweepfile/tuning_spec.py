"""The key `tune:` of a sweep file: how fields of each cell are chosen."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from fpt.spec import Spec

Rate = Annotated[float, Field(gt=0)]

CROSS_ARM = ("asha", "bohb", "halving", "hyperband", "median_stopping", "pb2", "pbt")
"""What schedulers are called that stop trials by comparing them with all others."""

DIGITS = 4
"""Significant digits of a rate that is worked out: so that it, and with it the id of a trial, does
not depend on a machine's rounding."""


Setting = tuple[tuple[str, Any], ...]
"""A point of a study: what each tuned field is set to, in the order of the file."""

BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)
"""Of the Halton sequence, a base a field; so many fields can be tuned quasi-randomly."""

VALIDATION = r"^validation_[a-z][a-z0-9_]*$"
"""What trials may be chosen by."""

NEVER = ("seed", "steps", "stop", "protocol", "evaluation", "task")
"""Fields that are not tuned: they are what arms are compared at."""


ADAPTIVE = ("tpe", "gp")
"""Samplers that ask for points by the results of those before."""

PART, RUNGS = "<part>", "<rungs>"
# The places that pydantic gives to what is wrong under `prune`; no place in a file.

Value = float | int | str | bool
"""What a field may be tuned to."""


class RangeSpec(Spec):
    """What a field is tuned among."""

    log: tuple[Rate, Rate] | None = None
    """The least and the greatest; those between are equally far apart in their logarithms."""
    uniform: tuple[float, float] | None = None
    """The least and the greatest; those between are equally far apart."""
    whole: tuple[int, int] | None = Field(default=None, alias="int")
    """The least and the greatest of whole numbers."""
    points: Annotated[int, Field(ge=1, le=1000)] | None = None
    """How many are tried: of a field that is tuned alone, and of each in a grid."""
    values: Annotated[tuple[Value, ...], Field(min_length=1)] | None = None
    """The values themselves, in place of a range and `points`."""
    when: dict[str, Value | tuple[Value, ...]] = Field(default_factory=dict)
    """Another tuned field -> its value, or a list of these: the field is tuned only there, and is
    what the trial says everywhere else."""

    @model_validator(mode="after")
    def _check(self) -> RangeSpec:
        given = [one for one in (self.log, self.uniform, self.whole, self.values) if one]
        if len(given) != 1 or (self.values is not None and self.points is not None):
            raise ValueError(
                "give either `log: [least, greatest]` and `points`, or `values`; `uniform` and "
                "`int` stand in place of `log`"
            )
        for name, ends in (("log", self.log), ("uniform", self.uniform), ("int", self.whole)):
            if ends is not None and ends[0] >= ends[1]:
                raise ValueError(f"{name}: {ends[0]:g} is not below {ends[1]:g}")
        if self.values is not None and len(set(self.values)) < len(self.values):
            raise ValueError("values: names a value twice")
        if self.points is not None and len(set(self.grid())) < self.points:
            raise ValueError(f"points: {self.points} do not fit, to {DIGITS} digits, between these")
        return self

    def at(self, place: float) -> Any:
        """Return the value at a place of the range: 0 is the least, 1 the greatest."""
        if self.values is not None:
            return self.values[min(int(place * len(self.values)), len(self.values) - 1)]
        if self.whole is not None:
            low, high = self.whole
            return low + min(int(place * (high - low + 1)), high - low)
        ends = self.log or self.uniform
        assert ends is not None
        if place in (0, 1):
            return ends[1] if place else ends[0]
        if self.log is not None:
            return rounded(ends[0] * (ends[1] / ends[0]) ** place)
        return rounded(ends[0] + place * (ends[1] - ends[0]))

    def grid(self) -> tuple[Any, ...]:
        """Return the values, or the points of a grid, from the least to the greatest."""
        if self.values is not None:
            numbers = all(isinstance(one, float | int) for one in self.values)
            return tuple(sorted(self.values)) if numbers else self.values
        assert self.points is not None
        last = self.points - 1
        places = [i / last if last else 0.5 for i in range(self.points)]
        if self.whole is None:
            return tuple(map(self.at, places))
        low, high = self.whole
        return tuple(low + round(place * (high - low)) for place in places)

    def quasi_random(self) -> tuple[Any, ...]:
        """Return points of the van der Corput sequence: 1/2, 1/4, 3/4, 1/8, 5/8 ... of the range.
        More points only add to them.
        """
        assert self.points is not None
        return tuple(self.at(_van_der_corput(number)) for number in range(1, self.points + 1))

    def needs(self, name: str) -> tuple[Value, ...]:
        """Return the values of another field, one of `when`, at which this one is tuned."""
        found = self.when[name]
        return found if isinstance(found, tuple) else (found,)

    def applies(self, values: Mapping[str, object]) -> bool:
        """Return whether the field is tuned where others have these values."""
        return all(values.get(name) in self.needs(name) for name in self.when)

    def __str__(self) -> str:
        if self.values is not None:
            among = ", ".join(map(_written, self.values))
        else:
            ends = self.log or self.uniform or self.whole
            assert ends is not None
            scale = ", logarithmic" if self.log else ", whole" if self.whole else ""
            among = f"{ends[0]:g} to {ends[1]:g}{scale}"
        needs = (f"{name} is {' or '.join(map(_written, self.needs(name)))}" for name in self.when)
        return among + (f", where {' and '.join(needs)}" if self.when else "")


class HalvingSpec(Spec):
    """Successive halving inside a cell: after each rung, the best of its points go on."""

    rungs: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1, max_length=10)
    ]
    """Parts of the steps, rising, each counted up to the next evaluation."""
    keep: Annotated[float, Field(gt=0, lt=1)]
    """The part of the points that goes on after each rung, counted up to the next whole point: the
    same number in every cell, but for points that diverged."""

    @field_validator("rungs")
    @classmethod
    def _rise(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(now <= before for before, now in itertools.pairwise(value)):
            raise ValueError(f"{list(value)} does not rise from one to the next")
        return value

    def kept(self, points: int) -> int:
        """Return how many of so many points go on."""
        # To nine digits, so that 0.1 of 30 are 3 and not 4.
        return max(1, math.ceil(round(self.keep * points, 9)))


Prune = Annotated[
    Annotated[float, Field(gt=0, lt=1), Tag(PART)] | Annotated[HalvingSpec, Tag(RUNGS)],
    Discriminator(lambda value: RUNGS if isinstance(value, dict | HalvingSpec) else PART),
]
"""The median rule after a part of the steps, or successive halving."""


def _written(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def written(setting: Setting) -> str:
    """Return a setting for people: `learning_rate 0.001, dropout 0.1`."""
    return ", ".join(f"{name} {_written(value)}" for name, value in setting)


def rounded(rate: float) -> float:
    """Return a rate to DIGITS significant digits."""
    return float(f"{rate:.{DIGITS}g}")


def _drawn(text: str) -> float:
    # A number from 0 to 1 that follows from a text.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _van_der_corput(number: int, base: int = 2) -> float:
    # The digits of a number, mirrored at the point: 6 is 110, and gives 0.011.
    out, part = 0.0, 1 / base
    while number:
        out, part, number = out + part * (number % base), part / base, number // base
    return out


class TuneSpec(Spec):
    """How fields of each cell are chosen before its trials train.

    Any field of a trial is a key: `learning_rate: {log: [1e-5, 1e-2]}`, `dropout: {uniform: [0,
    0.3]}`, `optimizer.warmup: {int: [0, 100]}`, `train: {values: [fpt, all]}`. Every cell has the
    same points, seeds and steps to choose by: the budget is the same for every arm. It is chosen by
    the mean over `seeds`; of equals, the setting that comes first in its order. Its table shows
    none of the trials that it was chosen by.
    """

    learning_rate: RangeSpec | None = None
    """What is tried of the learning rate."""
    fields: SkipJsonSchema[dict[str, RangeSpec]] = Field(default_factory=dict)
    """The other fields that are tuned, which the file names as keys of `tune` itself."""
    points: Annotated[int, Field(ge=1, le=1000)] | None = None
    """How many points every cell tries, of whatever fields; not for a grid, which has as many as
    its fields make. With one field it may stand in its range."""
    defaults: dict[str, dict[str, dict[str, RangeSpec]]] = Field(default_factory=dict)
    """Field or axis -> {value or label: {tuned field: range}}: what is tried instead, in the cells
    that have that value. They tune the same fields by the same number of points as all others."""
    generation: Annotated[int, Field(ge=1)] = 1
    """Points that samplers tpe and gp ask for at a time: they train side by side, and all have to
    end before it asks again."""
    by: Annotated[str, Field(pattern=VALIDATION)] = "validation_accuracy"
    """What is compared, at each trial's best checkpoint: validation_accuracy, validation_loss, or a
    metric that the task declares (validation_r2), which says itself whether more is better."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1)] = (
        100,
    )
    """The seeds to choose by. No trial of the sweep's own may have one of these."""
    replicates: Annotated[int, Field(ge=1, le=1000)] = 1
    """How often the whole choice is made for each cell, each time with other seeds (those under
    `seeds`, moved on past the last one) and, but for a grid, with other points. The cell's own
    seeds are dealt out to the choices in turn, so that the spread between them holds the luck of
    tuning; at most as many as these seeds."""
    sampler: Literal["grid", "qmc", "random", "tpe", "gp"] = "grid"
    """grid: evenly spaced. qmc: quasi-random (Halton's sequence), so that more points later keep
    the earlier ones. random: drawn for each cell anew. These are known before anything has trained.
    tpe, gp: half of them quasi-random, and then in generations, where Optuna's TPE, or a Gaussian
    process, expects most: a generation depends on the results of those before, and is noted before
    it trains."""
    prune: Prune | None = None
    """A part of the steps (counted up to the next evaluation) after which a point that is below the
    median of its own cell's is given up; or successive halving, `{rungs: [0.1, 0.3], keep: 0.33}`.
    What goes on is not trained anew. null: each one trains to its end."""
    storage: str | None = None
    """A database for Optuna's studies, as SQLAlchemy writes it; `$NAME` is the environment's. null:
    that of FPT_SWEEP_STUDIES, else a journal file under the ledger's `studies/`."""
    scheduler: SkipJsonSchema[Any] = None
    """Refused, with the reason, whatever it is."""

    _higher: bool | None = PrivateAttr(default=None)
    # What the tasks of the file say of `by`.

    @model_validator(mode="before")
    @classmethod
    def _fields_are_keys(cls, value: Any) -> Any:
        # What is no key of its own and looks like a range is a field of a trial.
        if not isinstance(value, dict):
            return value
        others = {
            name: one
            for name, one in value.items()
            if name not in cls.model_fields and isinstance(one, dict)
        }
        rest = {name: one for name, one in value.items() if name not in others}
        return rest | {"fields": others} if others else rest

    @field_validator("by", mode="before")
    @classmethod
    def _of_validation(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("test_"):
            raise ValueError(
                f"{value!r} would choose by the test set, which is for what is reported; allowed: "
                "validation_accuracy, validation_loss, or validation_ and a metric of the task"
            )
        if not isinstance(value, str) or not re.match(VALIDATION, value):
            expected = "'validation_accuracy', 'validation_loss'"
            raise PydanticCustomError("literal_error", "no such metric", {"expected": expected})
        return value

    @field_validator("scheduler", "sampler", "prune", mode="before")
    @classmethod
    def _no_races(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, dict | HalvingSpec):
            return value
        name = str(value).lower()
        if (info.field_name == "scheduler" and value is not None) or any(
            one in name for one in CROSS_ARM
        ):
            raise ValueError(
                f"{value!r} would end trials by how they compare with those of other arms; the "
                "stop rule of an ablation is the same for every arm: `stop: {patience: 5}` under "
                "`trial:` (a plateau rule), or none. Inside a cell, `prune: 0.25` gives up the "
                "worse half of its points, and `prune: {rungs: [0.1, 0.3], keep: 0.33}` halves "
                "them step by step"
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
        if not self.spaces:
            raise ValueError(
                "names no field to tune; such as `learning_rate: {log: [1e-5, 1e-2], points: 8}`"
            )
        ranges = [one for one in self.spaces.values() if one.values is None]
        if self.sampler == "grid":
            if self.points is not None and (len(self.spaces) > 1 or not ranges):
                raise ValueError("points: a grid has as many as its fields make; leave it out")
            if any(one.points is None for one in ranges) and self.points is None:
                raise ValueError(
                    "`log` and `points` come together in a grid (as `uniform` and `int` do): each "
                    "field says how many of it are tried"
                )
        elif not ranges and len(self.spaces) == 1:
            name = next(iter(self.spaces))
            raise ValueError(f"sampler {self.sampler} needs a range: {name}: {{log: ...}}")
        elif self.points is None and (len(self.spaces) > 1 or ranges[0].points is None):
            raise ValueError(
                "points: missing; it is the budget of every cell: `points: 12` (`log` and `points` "
                "come together where one field is tuned alone)"
            )
        if self.sampler in ADAPTIVE and self.prune is not None:
            raise ValueError(
                f"prune: sampler {self.sampler} asks for its points one after another; use qmc"
            )
        if len(self.spaces) > len(BASES):
            raise ValueError(f"tunes {len(self.spaces)} fields; at most {len(BASES)}")
        self._check_conditions()
        return self

    def _check_conditions(self) -> None:
        spaces = self.spaces
        for name, space in spaces.items():
            for other in space.when:
                if other not in spaces or other == name:
                    raise ValueError(f"{name}: when: {other} is no other field that is tuned")
                if spaces[other].when:
                    raise ValueError(f"{name}: when: {other} has a condition itself")
                among = spaces[other].values
                if among is None:
                    raise ValueError(f"{name}: when: {other} needs `values` for a condition")
                if gone := [one for one in space.needs(other) if one not in among]:
                    raise ValueError(f"{name}: when: {other} is never {_written(gone[0])}")
        for labels in self.defaults.values():
            for label, own in labels.items():
                if other_fields := [name for name in own if name not in spaces]:
                    raise ValueError(
                        f"defaults: {label}: {other_fields[0]} is tuned there alone; every cell "
                        "tunes the same fields, so name it under `tune` too"
                    )

    def within(self, matches: Callable[[str, str], bool]) -> TuneSpec:
        """Return what is tuned in a cell, with the ranges that `defaults` gives it.

        Args:
            matches: Whether the cell has a value or label of a field or axis.

        Raises:
            pydantic.ValidationError: If these ranges do not fit the rest.
        """
        own: dict[str, RangeSpec] = {}
        for field, labels in self.defaults.items():
            for label, spaces in labels.items():
                if matches(field, label):
                    own |= spaces
        if not own:
            return self.model_copy(update={"defaults": {}}) if self.defaults else self
        changed = dict(self) | {"defaults": {}, "fields": self.fields | own}
        if "learning_rate" in own:
            changed["learning_rate"] = own["learning_rate"]
            del changed["fields"]["learning_rate"]
        out = TuneSpec.model_validate(changed)
        out._higher = self._higher
        return out

    def seeds_of(self, replicate: int) -> tuple[int, ...]:
        """Return the seeds that a choice is made by; of the first one, those of the file."""
        width = max(self.seeds) - min(self.seeds) + 1
        return tuple(seed + replicate * width for seed in self.seeds)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of all choices."""
        return tuple(seed for number in range(self.replicates) for seed in self.seeds_of(number))

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def higher(self) -> bool:
        """Whether more of `by` is better."""
        return self.by == "validation_accuracy" if self._higher is None else self._higher

    @property
    def spaces(self) -> dict[str, RangeSpec]:
        """The fields that are tuned, and among what."""
        rate = {} if self.learning_rate is None else {"learning_rate": self.learning_rate}
        return rate | self.fields

    @property
    def rate_alone(self) -> bool:
        """Whether the learning rate is all that is tuned."""
        return self.learning_rate is not None and not self.fields

    @property
    def rungs(self) -> tuple[float, ...]:
        """The parts of the steps after which points are given up; none without `prune`."""
        if isinstance(self.prune, HalvingSpec):
            return self.prune.rungs
        return () if self.prune is None else (self.prune,)

    @property
    def key(self) -> str:
        """What is tuned, in a few characters: other ranges ask for other points."""
        told = {"storage", "replicates", "defaults"}
        spec = self.model_dump_json(exclude=told, exclude_defaults=True)
        return hashlib.sha256(spec.encode()).hexdigest()[:8]

    def setting(self, values: Mapping[str, Any]) -> Setting:
        """Return a point: the fields that are tuned where they have these values."""
        return tuple(
            (name, values[name]) for name, space in self.spaces.items() if space.applies(values)
        )

    def first(self, cell: str, replicate: int = 0) -> tuple[Setting, ...]:
        """Return the points that are known before anything has trained.

        Args:
            cell: The id of the cell, of which sampler random draws.
            replicate: Which of its choices: all but the first have other points.
        """
        if self.sampler == "grid":
            spaces = [
                one if one.values is not None or one.points is not None
                else one.model_copy(update={"points": self.points})
                for one in self.spaces.values()
            ]  # fmt: skip
            product = itertools.product(*(one.grid() for one in spaces))
            points = (self.setting(dict(zip(self.spaces, at, strict=True))) for at in product)
            return tuple(dict.fromkeys(points))
        number = (self.budget + 1) // 2 if self.sampler in ADAPTIVE else self.budget
        out: dict[Setting, None] = {}
        # A few values may come up again and again: then there are fewer points than were asked for.
        for index in range(1, 20 * number + 1):
            if len(out) == number:
                break
            values = {
                name: space.at(self._place(cell, replicate, index, at))
                for at, (name, space) in enumerate(self.spaces.items())
            }
            out.setdefault(self.setting(values))
        return tuple(out)

    def _place(self, cell: str, replicate: int, index: int, field: int) -> float:
        # Where a field's value lies in its range. A further choice has the sequence moved on by a
        # part of the range that is its own (Cranley and Patterson 1976), so that it is as even.
        own = f"{cell} {replicate}" if replicate else cell
        if self.sampler == "random":
            return _drawn(f"{own} {index} {field}")
        moved = _drawn(f"{own} {field}") if replicate else 0.0
        return (_van_der_corput(index, BASES[field]) + moved) % 1.0

    @property
    def budget(self) -> int:
        """The number of points that are tried in a cell."""
        if self.points is not None and self.sampler != "grid":
            return self.points
        if self.sampler == "grid":
            return len(self.first(""))
        (space,) = self.spaces.values()
        assert space.points is not None
        return space.points
