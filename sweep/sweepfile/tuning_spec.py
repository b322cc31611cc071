"""The key `tune:` of a sweep file: how the learning rate of each cell is chosen."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator
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
    values: Annotated[tuple[float | int | str | bool, ...], Field(min_length=1)] | None = None
    """The values themselves, in place of a range and `points`."""

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

    def __str__(self) -> str:
        if self.values is not None:
            return ", ".join(map(_written, self.values))
        ends = self.log or self.uniform or self.whole
        assert ends is not None
        scale = ", logarithmic" if self.log else ", whole" if self.whole else ""
        return f"{ends[0]:g} to {ends[1]:g}{scale}"


def _written(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def written(setting: Setting) -> str:
    """Return a setting for people: `learning_rate 0.001, dropout 0.1`."""
    return ", ".join(f"{name} {_written(value)}" for name, value in setting)


def rounded(rate: float) -> float:
    """Return a rate to DIGITS significant digits."""
    return float(f"{rate:.{DIGITS}g}")


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
    generation: Annotated[int, Field(ge=1)] = 1
    """Points that sampler tpe asks for at a time: they train side by side, and all have to end
    before it asks again."""
    by: Annotated[str, Field(pattern=VALIDATION)] = "validation_accuracy"
    """What is compared, at each trial's best checkpoint: validation_accuracy, validation_loss, or a
    metric that the task declares (validation_r2), which says itself whether more is better."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1)] = (
        100,
    )
    """The seeds to choose by. No trial of the sweep's own may have one of these."""
    sampler: Literal["grid", "qmc", "random", "tpe"] = "grid"
    """grid: evenly spaced. qmc: quasi-random (Halton's sequence), so that more points later keep
    the earlier ones. random: drawn for each cell anew. These are known before anything has trained.
    tpe: half of them quasi-random, and then in generations, where Optuna's TPE expects most: a
    generation depends on the results of those before, and is noted before it trains."""
    prune: Annotated[float, Field(gt=0, lt=1)] | None = None
    """A part of the steps (counted up to the next evaluation) after which a rate that is below the
    median of its own cell's is given up. null: each one trains to its end."""
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
        if self.sampler == "tpe" and self.prune is not None:
            raise ValueError("prune: sampler tpe asks for its points one after another; use qmc")
        if len(self.spaces) > len(BASES):
            raise ValueError(f"tunes {len(self.spaces)} fields; at most {len(BASES)}")
        return self

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

    def first(self, cell: str) -> tuple[Setting, ...]:
        """Return the points that are known before anything has trained.

        Args:
            cell: The id of the cell, of which sampler random draws.
        """
        if self.sampler == "grid":
            spaces = [
                one if one.values is not None or one.points is not None
                else one.model_copy(update={"points": self.points})
                for one in self.spaces.values()
            ]  # fmt: skip
            grids = (one.grid() for one in spaces)
            return tuple(
                tuple(zip(self.spaces, at, strict=True)) for at in itertools.product(*grids)
            )
        number = (self.budget + 1) // 2 if self.sampler == "tpe" else self.budget
        out: dict[Setting, None] = {}
        # A few values may come up again and again: then there are fewer points than were asked for.
        for index in range(1, 20 * number + 1):
            if len(out) == number:
                break
            out.setdefault(
                tuple(
                    (name, space.at(self._place(cell, index, at)))
                    for at, (name, space) in enumerate(self.spaces.items())
                )
            )
        return tuple(out)

    def _place(self, cell: str, index: int, field: int) -> float:
        # Where a field's value lies in its range.
        if self.sampler != "random":
            return _van_der_corput(index, BASES[field])
        digest = hashlib.sha256(f"{cell} {index} {field}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

    @property
    def budget(self) -> int:
        """The number of points that are tried in a cell."""
        if self.points is not None:
            return self.points
        if self.sampler == "grid":
            return math.prod(one.points or len(one.values or ()) for one in self.spaces.values())
        (space,) = self.spaces.values()
        assert space.points is not None
        return space.points
