"""What a ledger is made of: folders, three datasets of rows, and the names of objects."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pyarrow as pa

from sweep.ledger.columns import schema_of

Kind = Literal["trials", "curves", "failures", "states", "backbones", "logs", "cache", "leases"]
"""The folders of a ledger."""

KINDS: tuple[Kind, ...] = get_args(Kind)

Name = Literal["trials", "failures", "curves"]
"""The folders of rows."""

Kept = Literal["trials", "curves", "failures", "states", "backbones"]
"""The folders of what belongs to single trials, and cannot be made again but by training."""

KEPT: tuple[Kept, ...] = get_args(Kept)


@dataclass(frozen=True)
class Dataset:
    """A folder of Parquet files of one schema."""

    name: Name
    version: int
    """Raised when a column goes or changes its meaning; written into each file. A column that comes
    needs no new version: rows of files that lack it have null there."""
    key: tuple[str, ...]
    """The columns that name a row's file."""
    pattern: str
    """The name of the file of a row, with the key's columns in it."""
    lost: str
    """What is lost with a file that has to be deleted."""
    schema: pa.Schema
    one: tuple[str, ...]
    """The columns by which rows are put in order, and of which readers get one row each."""
    later: tuple[str, ...] = ()
    """Of rows alike in these, the columns by the last of which that one is chosen."""

    def unit(self, trial_id: str) -> str:
        """Return what holds the rows of a trial: a file; of curves, a folder."""
        return f"curves/{trial_id}" if self.name == "curves" else self.path({"trial_id": trial_id})

    def path(self, row: Mapping[str, Any]) -> str:
        """Return the object that a row belongs in."""
        return self.pattern.format(**{name: row[name] for name in self.key})


TRIALS = Dataset(
    name="trials",
    version=5,
    key=("trial_id",),
    pattern="trials/{trial_id}.parquet",
    lost="a row that is not whole cannot be trusted: delete the file and run the sweep again, "
    "which trains this trial anew and no other",
    schema=schema_of("trials"),
    one=("trial_id",),
)

FAILURES = Dataset(
    name="failures",
    version=2,
    key=("trial_id", "attempt"),
    pattern="failures/{trial_id}-{attempt}.parquet",
    lost="delete the file: only this note of a failed attempt is lost",
    schema=schema_of("failures"),
    one=("trial_id", "attempt"),
)

CURVES = Dataset(
    name="curves",
    version=1,
    key=("trial_id", "attempt", "segment"),
    pattern="curves/{trial_id}/{attempt}-{segment:06d}.parquet",
    lost="delete the file: only this piece of a curve is lost",
    schema=schema_of("curves"),
    one=("trial_id", "split", "step"),
    later=("attempt", "segment"),
)

DATASETS: Mapping[str, Dataset] = {dataset.name: dataset for dataset in (TRIALS, FAILURES, CURVES)}

SEGMENT = "segment-"
"""What the names of files of many trials begin with. No trial id does."""

TRIAL_ID = re.compile(r"[0-9a-f]{12}")
_ROWS = re.compile(
    r"trials/[0-9a-f]{12}\.parquet"
    r"|failures/[0-9a-f]{12}-[\w.]+\.parquet"
    r"|curves/[0-9a-f]{12}/[\w.]+-\d{6}\.parquet",
    re.ASCII,
)
_SEGMENT = re.compile(r"(?:trials|failures|curves)/segment-\d{6}\.parquet", re.ASCII)
_FOLDER = re.compile("curves/[0-9a-f]{12}", re.ASCII)
_BLOB = re.compile(
    r"(?:states|backbones)/[0-9a-f]{12}\.safetensors"
    r"|states/[0-9a-f]{12}/\d{12}-[\w.]+\.safetensors",
    re.ASCII,
)
_NOTE = re.compile(
    r"notes/[a-z0-9][a-z0-9._-]*/(?:families|readings|generations)/[\w.-]+\.json", re.ASCII
)


def is_rows(name: str) -> bool:
    """Return whether it is the name of a file of rows of one trial."""
    return _ROWS.fullmatch(name) is not None


def is_segment(name: str) -> bool:
    """Return whether it is the name of a file of rows of many trials."""
    return _SEGMENT.fullmatch(name) is not None


def segment(dataset: Dataset, number: int) -> str:
    """Return the name of a file of rows of many trials; they are numbered from 1."""
    return f"{dataset.name}/{SEGMENT}{number:06d}.parquet"


def is_unit(dataset: Dataset, name: str) -> bool:
    """Return whether it is the name of what holds rows of one trial: see `Dataset.unit`."""
    return (_FOLDER if dataset is CURVES else _ROWS).fullmatch(name) is not None


def is_object(name: str) -> bool:
    """Return whether it is the name of an object that belongs to a trial or to claims."""
    own = (_ROWS, _SEGMENT, _BLOB, _NOTE)
    return any(pattern.fullmatch(name) for pattern in own)


def owner(name: str) -> str:
    """Return the id of the trial that an object belongs to."""
    return name.split("/")[1][:12]


def blob(kind: Literal["states", "backbones"], trial_id: str) -> str:
    """Return the name of what is kept of a trial.

    Raises:
        ValueError: If it is no trial id.
    """
    return f"{kind}/{checked(trial_id)}.safetensors"


def checked(trial_id: str) -> str:
    """Return a trial id.

    Raises:
        ValueError: If it is none.
    """
    if not TRIAL_ID.fullmatch(trial_id):
        raise ValueError(f"{trial_id!r} is no trial id (12 hex digits)")
    return trial_id
