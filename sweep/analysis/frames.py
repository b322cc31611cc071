"""Frames: the ledger's rows as pandas DataFrames, for people and notebooks.

Columns are those of `sweep.ledger.columns` (`sweep columns` prints what each means, and its unit:
accuracies are fractions), with one type each, whatever the rows hold: integers that may be missing
are pandas' Int64, times bear their zone, names of which there are few are categories. Metrics that
a task declares are columns of their own, behind these.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sweep.ledger.causes import MARKS
from sweep.ledger.columns import CATEGORIES, METRICS, unfolded
from sweep.ledger.ledger import Ledger
from sweep.planning.tuning import resolve

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from sweep.sweepfile.trials import Sweep


def load_trials(
    results: str | Path = "results", sweep: str | Path | Sweep | None = None
) -> pd.DataFrame:
    """Return the trials that have ended: a row each.

    Args:
        results: The ledger: a folder, s3://, gs:// or az://.
        sweep: A sweep file: only its trials, in its order, with their labels as columns
            `axis.<name>` (missing for the trials of `backbones:` and those that tune others). Else
            all, by id.

    Raises:
        LedgerError: If there is no ledger, or it cannot be read.
        SweepFileError: If the sweep file is wrong.
    """
    ledger = Ledger.existing(results)
    if sweep is None:
        return _frame(ledger.trials())
    expanded = _expanded(sweep, ledger)
    place = {point.trial_id: number for number, point in enumerate(expanded.all)}
    frame = _frame(ledger.trials(place))
    order = frame["trial_id"].map(place).argsort(kind="stable")
    return _labelled(frame.iloc[order].reset_index(drop=True), expanded)


def load_curves(
    results: str | Path = "results", sweep: str | Path | Sweep | None = None
) -> pd.DataFrame:
    """Return the curves of trials, also of those that are still training: a row a trial, split and
    step.

    Args:
        results: The ledger: a folder, s3://, gs:// or az://.
        sweep: As for `load_trials`; the rows stay sorted by trial id.

    Raises:
        LedgerError: If there is no ledger, or it cannot be read.
        SweepFileError: If the sweep file is wrong.
    """
    ledger = Ledger.existing(results)
    if sweep is None:
        return _frame(ledger.curves())
    expanded = _expanded(sweep, ledger)
    ids = {point.trial_id for point in expanded.all}
    return _labelled(_frame(ledger.curves(ids)), expanded)


def load_failures(
    results: str | Path = "results", sweep: str | Path | Sweep | None = None
) -> pd.DataFrame:
    """Return the failed attempts, by trial and time: a row each.

    `trial_id` joins them with `load_trials`, once the trial has ended; `cause` is why an attempt
    failed. Marks, such as that of `sweep retry`, are left out.

    Args:
        results: The ledger: a folder, s3://, gs:// or az://.
        sweep: As for `load_trials`.

    Raises:
        LedgerError: If there is no ledger, or it cannot be read.
        SweepFileError: If the sweep file is wrong.
    """
    ledger = Ledger.existing(results)
    expanded = None if sweep is None else _expanded(sweep, ledger)
    ids = None if expanded is None else {point.trial_id for point in expanded.all}
    frame = _frame(ledger.failures(ids))
    frame = frame[~frame["cause"].isin(MARKS)].reset_index(drop=True)
    return frame if expanded is None else _labelled(frame, expanded)


def _expanded(sweep: str | Path | Sweep, ledger: Ledger) -> Sweep:
    from sweep.sweepfile.expansion import load

    expanded = load(sweep) if isinstance(sweep, str | Path) else sweep
    return resolve(expanded, ledger)


def _frame(table: pa.Table) -> pd.DataFrame:
    import pandas as pd
    import pyarrow as pa

    nullable = {
        pa.int32(): pd.Int32Dtype(),
        pa.int64(): pd.Int64Dtype(),
        pa.bool_(): pd.BooleanDtype(),
        pa.string(): pd.StringDtype(na_value=float("nan")),
    }
    if METRICS in table.column_names:
        table = unfolded(table)
    for number, field in enumerate(table.schema):
        if field.name in CATEGORIES:
            column = table.column(number).dictionary_encode()
            table = table.set_column(number, field.name, column)
    frame: pd.DataFrame = table.to_pandas(types_mapper=nullable.get)
    return frame


def _labelled(frame: pd.DataFrame, sweep: Sweep) -> pd.DataFrame:
    """Return the frame with a column of labels for each axis, as categories in file order."""
    import pandas as pd

    labels = {point.trial_id: point.labels for point in sweep.points}
    for axis in sweep.axes:
        of = {trial: names[axis] for trial, names in labels.items() if axis in names}
        categories = list(dict.fromkeys(of.values()))
        column = pd.Categorical(frame["trial_id"].map(of), categories=categories)
        frame[f"axis.{axis}"] = column
    return frame
