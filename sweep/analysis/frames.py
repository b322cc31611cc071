"""Frames: the ledger's rows as pandas DataFrames, for people and notebooks.

Columns are those of `sweep.ledger.ledger`, with one type each, whatever the rows hold: integers
that may be missing are pandas' Int64, times bear their zone, names of which there are few are
categories.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sweep.ledger.ledger import Ledger
from sweep.planning.tuning import resolve

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from sweep.sweepfile.trials import Sweep

CATEGORIES = (
    "task",
    "backbone",
    "weights",
    "initialiser",
    "pretraining",
    "train",
    "numerics",
    "protocol",
    "outcome",
    "stopped",
    "baseline_rule",
    "split",
    "git_commit",
    "version",
    "host",
    "device",
    "device_name",
)
"""Columns with few values."""


def load_trials(
    results: str | Path = "results", sweep: str | Path | Sweep | None = None
) -> pd.DataFrame:
    """The trials that have ended: a row each.

    Args:
        results: The ledger: a folder, s3://, gs:// or az://.
        sweep: A sweep file: only its trials, in its order, with their labels as columns
            `axis.<name>` (missing for the trials of `backbones:` and those that tune others). Else
            all, by id.

    Raises:
        LedgerError: If the ledger cannot be read.
        SweepFileError: If the sweep file is wrong.
    """
    if sweep is None:
        return _frame(Ledger(results).trials())
    expanded = _expanded(sweep, results)
    place = {point.trial_id: number for number, point in enumerate(expanded.all)}
    frame = _frame(Ledger(results).trials(place))
    order = frame["trial_id"].map(place).argsort(kind="stable")
    return _labelled(frame.iloc[order].reset_index(drop=True), expanded)


def load_curves(
    results: str | Path = "results", sweep: str | Path | Sweep | None = None
) -> pd.DataFrame:
    """The curves of trials, also of those that are still training: a row a trial, split and step.

    Args:
        results: The ledger: a folder, s3://, gs:// or az://.
        sweep: As for `load_trials`; the rows stay sorted by trial id.

    Raises:
        LedgerError: If the ledger cannot be read.
        SweepFileError: If the sweep file is wrong.
    """
    if sweep is None:
        return _frame(Ledger(results).curves())
    expanded = _expanded(sweep, results)
    ids = {point.trial_id for point in expanded.all}
    return _labelled(_frame(Ledger(results).curves(ids)), expanded)


def _expanded(sweep: str | Path | Sweep, results: str | Path) -> Sweep:
    from sweep.sweepfile.expansion import load

    expanded = load(sweep) if isinstance(sweep, str | Path) else sweep
    return resolve(expanded, Ledger(results))


def _frame(table: pa.Table) -> pd.DataFrame:
    import pandas as pd
    import pyarrow as pa

    nullable = {
        pa.int32(): pd.Int32Dtype(),
        pa.int64(): pd.Int64Dtype(),
        pa.bool_(): pd.BooleanDtype(),
        pa.string(): pd.StringDtype(na_value=float("nan")),
    }
    for number, field in enumerate(table.schema):
        if field.name in CATEGORIES:
            column = table.column(number).dictionary_encode()
            table = table.set_column(number, field.name, column)
    frame: pd.DataFrame = table.to_pandas(types_mapper=nullable.get)
    return frame


def _labelled(frame: pd.DataFrame, sweep: Sweep) -> pd.DataFrame:
    """The frame with a column of labels for each axis, categories in the order of the file."""
    import pandas as pd

    labels = {point.trial_id: point.labels for point in sweep.points}
    for axis in sweep.axes:
        of = {trial: names[axis] for trial, names in labels.items() if axis in names}
        categories = list(dict.fromkeys(of.values()))
        column = pd.Categorical(frame["trial_id"].map(of), categories=categories)
        frame[f"axis.{axis}"] = column
    return frame
