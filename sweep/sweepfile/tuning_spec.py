"""The key `tune:` of a sweep file: how the learning rate of each cell is chosen."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from fpt.spec import Spec

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
        if self.points is not None and len(set(self.grid())) < self.points:
            raise ValueError(f"points: {self.points} do not fit, to {DIGITS} digits, between these")
        return self

    def at(self, place: float) -> float:
        """The rate at a place of the range: 0 is the least, 1 the greatest."""
        assert self.log is not None
        low, high = self.log
        if place in (0, 1):
            return high if place else low
        return rounded(low * (high / low) ** place)

    def grid(self) -> tuple[float, ...]:
        """The values, or the points of a grid, from the least to the greatest."""
        if self.values is not None:
            return tuple(sorted(self.values))
        assert self.points is not None
        last = self.points - 1
        return tuple(self.at(i / last if last else 0.5) for i in range(self.points))

    def quasi_random(self) -> tuple[float, ...]:
        """Points of the van der Corput sequence: 1/2, 1/4, 3/4, 1/8, 5/8 ... of the range. More
        points only add to them.
        """
        assert self.points is not None
        return tuple(self.at(_van_der_corput(number)) for number in range(1, self.points + 1))


def rounded(rate: float) -> float:
    """A rate to DIGITS significant digits."""
    return float(f"{rate:.{DIGITS}g}")


def _van_der_corput(number: int) -> float:
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
            return self.learning_rate.grid()
        rates = self.learning_rate.quasi_random()
        return rates[: (len(rates) + 1) // 2] if self.sampler == "tpe" else rates

    @property
    def budget(self) -> int:
        """The number of rates that are tried in a cell."""
        return self.learning_rate.points or len(self.learning_rate.values or ())
