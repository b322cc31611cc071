"""What the columns of the ledger mean: an entry each, from which all else about them follows.

Schemas, the lists of figures and of provenance, MLflow's names, pandas' categories, `sweep columns`
and the metadata of Parquet files are all read off these tables, so that a new column is one line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

TIME = pa.timestamp("us", tz="UTC")

Role = Literal["key", "config", "outcome", "cost", "provenance"]
"""key: names the row. config: the trial's, flat. outcome: what its id fixes, and may never differ.
cost: what it took. provenance: where it was made, and with what."""

MLflow = Literal["", "param", "tag", "metric", "param tag", "json"]
"""As what MLflow has a column. json: its fields are params."""


@dataclass(frozen=True)
class Column:
    """A column of a table of the ledger."""

    name: str
    type: pa.DataType
    role: Role
    description: str
    unit: str = ""
    mlflow: MLflow = ""
    category: bool = False
    """Whether it has few values, so that pandas keeps it as a category."""
    origin: bool = False
    """Whether it says where a trial's figures come from."""
    required: bool = False
    """Whether every row has a value."""

    @property
    def field(self) -> pa.Field:
        """The field of a schema, with description and unit as its metadata."""
        metadata = {"description": self.description} | ({"unit": self.unit} if self.unit else {})
        return pa.field(self.name, self.type, nullable=not self.required, metadata=metadata)


_STRING, _BOOL = pa.string(), pa.bool_()
_INT, _LONG, _FLOAT = pa.int32(), pa.int64(), pa.float64()
FRACTION = "fraction, 0 to 1"
NATS = "nats"

TRIALS = (
    Column("trial_id", _STRING, "key", "Hash of the config that the trial trains", required=True),
    Column(
        "cell_id",
        _STRING,
        "key",
        "Hash of the config without its seed: trials of one cell differ in the seed alone",
        mlflow="tag",
        required=True,
    ),
    Column("identity_version", _INT, "key", "Version of the rules by which the ids are made"),
    Column("task_version", _INT, "key", "Version of the task's numbers"),
    Column(
        "config",
        _STRING,
        "config",
        "The whole config as canonical JSON: what trial_id is a hash of",
    ),
    Column("task", _STRING, "config", "Name of the task", mlflow="param tag", category=True),
    Column(
        "task_parameters", _STRING, "config", "Parameters of the task, a JSON object", mlflow="json"
    ),
    Column(
        "backbone", _STRING, "config", "Name of the backbone", mlflow="param tag", category=True
    ),
    Column("layers", _INT, "config", "Layers of the backbone", mlflow="param"),
    Column("width", _INT, "config", "Width of the backbone's hidden state", mlflow="param"),
    Column("heads", _INT, "config", "Attention heads of a layer", mlflow="param"),
    Column(
        "weights",
        _STRING,
        "config",
        "Where pretrained weights come from; of a GGUF file, how they are quantised too",
        mlflow="param",
        category=True,
    ),
    Column(
        "initialiser",
        _STRING,
        "config",
        "How weights that are not pretrained are drawn",
        mlflow="param",
        category=True,
    ),
    Column(
        "pretraining",
        _STRING,
        "config",
        "What the backbone was pretrained on; trial:ID is a pretraining of the sweep's own",
        mlflow="param tag",
        category=True,
    ),
    Column("backbone_seed", _LONG, "config", "Seed of the backbone's draw", mlflow="param"),
    Column(
        "train",
        _STRING,
        "config",
        "Groups of parameters that train, joined by +",
        mlflow="param tag",
        category=True,
    ),
    Column(
        "optimizer", _STRING, "config", "Optimizer and its settings, a JSON object", mlflow="json"
    ),
    Column("learning_rate", _FLOAT, "config", "Learning rate", mlflow="param"),
    Column(
        "batch_size", _INT, "config", "Examples of an optimizer step", "examples", mlflow="param"
    ),
    Column(
        "steps", _LONG, "config", "Optimizer steps that the trial may take", "steps", mlflow="param"
    ),
    Column(
        "stop", _STRING, "config", "Rule by which training ends early, a JSON object", mlflow="json"
    ),
    Column("dropout", _FLOAT, "config", "Probability of dropout", FRACTION, mlflow="param"),
    Column(
        "numerics",
        _STRING,
        "config",
        "Class of arithmetic: fp32 or bf16",
        mlflow="param tag",
        category=True,
        origin=True,
    ),
    Column(
        "protocol",
        _STRING,
        "config",
        "Protocol of data and evaluation",
        mlflow="param tag",
        category=True,
    ),
    Column("evaluate_every", _INT, "config", "Steps between evaluations", "steps", mlflow="param"),
    Column("seed", _LONG, "config", "Seed of data, new parameters and dropout", mlflow="param tag"),
    Column(
        "outcome",
        _STRING,
        "outcome",
        "How the trial ended: done or diverged",
        mlflow="tag",
        category=True,
    ),
    Column(
        "stopped",
        _STRING,
        "outcome",
        "What ended it: steps, plateau or diverged",
        mlflow="tag",
        category=True,
    ),
    Column(
        "steps_trained", _LONG, "outcome", "Optimizer steps that it took", "steps", mlflow="metric"
    ),
    Column(
        "best_step",
        _LONG,
        "outcome",
        "Step whose parameters the figures are of",
        "steps",
        mlflow="metric",
    ),
    Column(
        "train_loss", _FLOAT, "outcome", "Loss on the last training batches", NATS, mlflow="metric"
    ),
    Column(
        "train_accuracy",
        _FLOAT,
        "outcome",
        "Accuracy on the last training batches",
        FRACTION,
        mlflow="metric",
    ),
    Column(
        "training_set_loss",
        _FLOAT,
        "outcome",
        "Loss on training examples without dropout and augmentation",
        NATS,
        mlflow="metric",
    ),
    Column(
        "training_set_accuracy",
        _FLOAT,
        "outcome",
        "Accuracy on training examples without dropout and augmentation",
        FRACTION,
        mlflow="metric",
    ),
    Column(
        "validation_loss",
        _FLOAT,
        "outcome",
        "Loss on the validation split at best_step",
        NATS,
        mlflow="metric",
    ),
    Column(
        "validation_accuracy",
        _FLOAT,
        "outcome",
        "Accuracy on the validation split at best_step",
        FRACTION,
        mlflow="metric",
    ),
    Column(
        "test_loss", _FLOAT, "outcome", "Loss on the test split at best_step", NATS, mlflow="metric"
    ),
    Column(
        "test_accuracy",
        _FLOAT,
        "outcome",
        "Accuracy on the test split at best_step; tables and `cells` print it in per cent",
        FRACTION,
        mlflow="metric",
    ),
    Column(
        "baseline_accuracy",
        _FLOAT,
        "outcome",
        "Accuracy of the task's trivial baseline",
        FRACTION,
        mlflow="metric",
    ),
    Column(
        "metrics",
        _STRING,
        "outcome",
        "Figures of the metrics that the task declares, a JSON object such as "
        '{"test_r2": 0.9, "baseline_r2": 0}; null: it declares none. What reads the ledger has '
        "each as a column of its name",
    ),
    Column("baseline_rule", _STRING, "provenance", "What the trivial baseline does", category=True),
    Column(
        "stronger_baseline_accuracy",
        _FLOAT,
        "provenance",  # of the task, not of the trial: rows from before it was computed have none
        "Accuracy of a learner that reads no order, of tasks that have one",
        FRACTION,
        mlflow="metric",
    ),
    Column(
        "stronger_baseline_rule",
        _STRING,
        "provenance",
        "What the stronger baseline is",
        category=True,
    ),
    Column(
        "seconds",
        _FLOAT,
        "cost",
        "Training time of this trial: its part of its pack's",
        "seconds",
        mlflow="metric",
    ),
    Column("examples", _LONG, "cost", "Training examples that it saw", "examples", mlflow="metric"),
    Column(
        "pack_size",
        _INT,
        "provenance",
        "Trials that trained side by side with it, itself among them",
        origin=True,
    ),
    Column(
        "accumulation",
        _INT,
        "provenance",
        "Parts of a batch whose gradients were summed; 1: the batch was whole",
        origin=True,
    ),
    Column(
        "row_padding",
        _INT,
        "provenance",
        "What rows of shared products were padded to a multiple of, for the same bits in packs of "
        "any size on this processor, as measured there; 0: nothing does; null: not measured",
        origin=True,
    ),
    Column("attempts", _INT, "cost", "Attempts that it took", mlflow="tag"),
    Column(
        "attempt",
        _STRING,
        "provenance",
        "Name of the attempt that finished it: joins with curves and failures",
    ),
    Column("extended_from", _STRING, "provenance", "Trial whose end it went on from", origin=True),
    Column("parameters", _LONG, "outcome", "Parameters of the model", mlflow="metric"),
    Column("parameters_trained", _LONG, "outcome", "Parameters that trained", mlflow="metric"),
    Column("groups", _STRING, "provenance", "Group -> tensors, parameters, trained; a JSON object"),
    Column(
        "backbone_digest",
        _STRING,
        "outcome",
        "SHA-256 of the backbone before training",
        origin=True,
    ),
    Column("data_digest", _STRING, "outcome", "SHA-256 of the data set's files", origin=True),
    Column(
        "own_code",
        _STRING,
        "provenance",
        "Files of code of the user's own -> SHA-256, a JSON object; null: none",
        origin=True,
    ),
    Column(
        "git_commit",
        _STRING,
        "provenance",
        "Commit of the code",
        mlflow="tag",
        category=True,
        origin=True,
    ),
    Column(
        "git_dirty",
        _BOOL,
        "provenance",
        "Whether the code had changes that the commit lacks",
        mlflow="tag",
        origin=True,
    ),
    Column(
        "version",
        _STRING,
        "provenance",
        "Release of fpt-sweep",
        mlflow="tag",
        category=True,
        origin=True,
    ),
    Column(
        "versions",
        _STRING,
        "provenance",
        "Releases of Python and of libraries, a JSON object",
        origin=True,
    ),
    Column(
        "host",
        _STRING,
        "provenance",
        "Machine that trained it",
        mlflow="tag",
        category=True,
        origin=True,
    ),
    Column(
        "device", _STRING, "provenance", "Kind of device: cpu or cuda", category=True, origin=True
    ),
    Column(
        "device_name",
        _STRING,
        "provenance",
        "Model of the processor or accelerator",
        mlflow="tag",
        category=True,
        origin=True,
    ),
    Column("started_at", TIME, "cost", "When its first attempt began", "UTC"),
    Column("finished_at", TIME, "cost", "When its row was made", "UTC"),
)

FAILURES = (
    Column("trial_id", _STRING, "key", "The trial", required=True),
    Column(
        "attempt",
        _STRING,
        "key",
        "Name of the attempt that failed; names sort by time",
        required=True,
    ),
    Column(
        "cause",
        _STRING,
        "outcome",
        "Why it failed; doubled, retried and forgotten are marks and no failures",
        category=True,
        required=True,
    ),
    Column("exception", _STRING, "outcome", "Class of the exception", category=True),
    Column("message", _STRING, "outcome", "What the exception said"),
    Column("traceback", _STRING, "outcome", "Where it was raised"),
    Column("config", _STRING, "config", "The trial's config as canonical JSON"),
    Column("step", _LONG, "outcome", "Optimizer step that it had reached", "steps"),
    Column("host", _STRING, "provenance", "Machine that it ran on", category=True),
    Column("node", _STRING, "provenance", "Id of the Ray node that it ran on", category=True),
    Column("device", _STRING, "provenance", "Kind of device: cpu or cuda", category=True),
    Column("seconds", _FLOAT, "cost", "Training time of the attempt", "seconds"),
    Column("lost", _FLOAT, "cost", "Training time that no saved state holds", "seconds"),
    Column(
        "pack_size",
        _INT,
        "provenance",
        "Trials that trained side by side with it, itself among them",
    ),
    Column(
        "accumulation",
        _INT,
        "provenance",
        "Parts of a batch whose gradients were summed; 1: the batch was whole",
    ),
    Column("at", TIME, "cost", "When it failed", "UTC", required=True),
)

CURVES = (
    Column("trial_id", _STRING, "key", "The trial", required=True),
    Column(
        "attempt",
        _STRING,
        "key",
        "Attempt that wrote the point. The files of several attempts may overlap: "
        "load_curves and `sweep query` keep the last value of a (trial, split, step), and so "
        "has whoever reads the files",
        required=True,
    ),
    Column(
        "segment",
        _INT,
        "key",
        "Number of the piece of the curve in its attempt, from 0",
        required=True,
    ),
    Column("step", _LONG, "key", "Optimizer step", "steps", required=True),
    Column(
        "split",
        _STRING,
        "key",
        "Examples that the figures are of: train, validation or test",
        category=True,
        required=True,
    ),
    Column("loss", _FLOAT, "outcome", "Loss", NATS),
    Column("accuracy", _FLOAT, "outcome", "Accuracy", FRACTION),
    Column("seconds", _FLOAT, "cost", "Training time up to the point", "seconds"),
    Column("examples", _LONG, "cost", "Training examples up to the point", "examples"),
    Column(
        "metrics",
        _STRING,
        "outcome",
        'Figures of the metrics that the task declares, a JSON object such as {"r2": 0.9}',
    ),
)

TABLES: Mapping[str, tuple[Column, ...]] = {
    "trials": TRIALS,
    "curves": CURVES,
    "failures": FAILURES,
}

CATEGORIES = frozenset(one.name for table in TABLES.values() for one in table if one.category)
"""Columns with few values."""

FIGURES = tuple(one.name for one in TRIALS if one.role == "outcome")
"""Columns of a trial that its id fixes. All others say where and when, and may differ."""

ORIGIN = tuple(one.name for one in TRIALS if one.origin)
"""Columns of a trial that say where its figures come from."""


METRICS = "metrics"
"""The column of trials and of curves that holds the figures of a task's own metrics."""


def own_metrics(table: pa.Table) -> tuple[str, ...]:
    """Return the names of the metrics in a table of trials or curves, sorted."""
    return tuple(sorted({name for one in _figures(table) if one for name in one}))


def unfolded(table: pa.Table, names: Sequence[str] | None = None) -> pa.Table:
    """Return columns of a table, and of its metrics each as one in float64; null: it has none.

    Args:
        table: It has `METRICS`, where `names` has a metric.
        names: Columns and metrics, in their order; None: all columns and then all metrics.
    """
    if names is None:
        names = [*table.column_names, *own_metrics(table)]
    folded = [name for name in names if name not in table.column_names]
    figures = _figures(table) if folded else []
    columns = [
        table.column(name)
        if name not in folded
        else pa.chunked_array([[(one or {}).get(name) for one in figures]], pa.float64())
        for name in names
    ]
    return pa.table(columns, names=list(names))


def _figures(table: pa.Table) -> list[dict[str, float | None] | None]:
    column = table.column(METRICS)
    if column.null_count == len(column):
        return [None] * len(column)
    return [None if one is None else json.loads(one) for one in column.to_pylist()]


def schema_of(name: str) -> pa.Schema:
    """Return the schema of a table; its fields have description and unit as metadata."""
    return pa.schema([one.field for one in TABLES[name]])


def in_mlflow(*kinds: MLflow) -> tuple[str, ...]:
    """Return the columns of a trial that MLflow has as one of these."""
    wanted = {word for kind in kinds for word in kind.split()}
    return tuple(one.name for one in TRIALS if wanted & set(one.mlflow.split()))


def described(table: pa.Table) -> pa.Table:
    """Return a table with description and unit in the metadata of columns named as the ledger's.

    Of a name that several tables of the ledger have, what they all say alike.
    """
    known: dict[str, set[tuple[str, str]]] = {}
    for one in (*TRIALS, *CURVES, *FAILURES):
        known.setdefault(one.name, set()).add((one.description, one.unit))
    fields = []
    for field in table.schema:
        told = known.get(field.name, set())
        if len(told) == 1:
            ((description, unit),) = told
            field = field.with_metadata({"description": description, "unit": unit})
        fields.append(field)
    return table.cast(pa.schema(fields))
