"""What the columns of the ledger mean and what their values are made of, an entry each.

Schemas, rows, the lists of metrics, figures and provenance, MLflow's names, pandas' categories,
`sweep columns` and the metadata of Parquet files all follow from these tables: a new column is one
entry here. Reading them needs no pyarrow.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from sweep.ledger import provenance

if TYPE_CHECKING:
    import pyarrow as pa

    from fpt.config import TrialConfig
    from fpt.spec import JSON
    from fpt.tasks.base import Baseline
    from fpt.trainer import Outcome, Record

S = TypeVar("S")

Type = Literal["string", "bool", "int32", "int64", "float64", "time"]
"""Arrow's name of a type; time: in microseconds, UTC."""

Role = Literal["key", "config", "outcome", "cost", "provenance"]
"""key: names the row. config: the trial's, flat. outcome: what its id fixes, and may never differ.
cost: what it took. provenance: where it was made, and with what."""

MLflow = Literal["", "param", "tag", "metric", "param tag", "json"]
"""As what MLflow has a column. json: its fields are params."""

FRACTION = "fraction, 0 to 1"
NATS = "nats"


@dataclass(frozen=True)
class Column(Generic[S]):
    """A column of a table of the ledger, whose values are made of an S each."""

    name: str
    type: Type
    role: Role
    description: str
    unit: str = ""
    of: Callable[[S], Any] | None = None
    """Makes the value; None: it is the attribute of the column's name."""
    mlflow: MLflow = ""
    metric: bool = False
    """Whether a table, a claim or a tuning can be about it."""
    category: bool = False
    """Whether it has few values, so that pandas keeps it as a category."""
    origin: bool = False
    """Whether it says where a trial's figures come from."""
    workload: bool = False
    """Whether the seconds of a training step depend on it."""
    required: bool = False
    """Whether every row has a value."""

    @property
    def field(self) -> pa.Field:
        """The field of a schema, with description and unit as its metadata."""
        import pyarrow as pa

        arrow = (
            pa.timestamp("us", tz="UTC") if self.type == "time" else pa.type_for_alias(self.type)
        )
        metadata = {"description": self.description} | ({"unit": self.unit} if self.unit else {})
        return pa.field(self.name, arrow, nullable=not self.required, metadata=metadata)

    def value(self, source: S) -> Any:
        """Return the value of the column in the row that is made of `source`."""
        return getattr(source, self.name) if self.of is None else self.of(source)


@dataclass(frozen=True)
class Ended:
    """A trial that has ended: what a row of `trials` is made of."""

    trial_id: str
    cell_id: str
    identity_version: int
    config: TrialConfig
    outcome: Outcome
    baseline: Baseline
    stronger: Baseline | None
    """The task's stronger baseline; None: it has none."""
    attempt: str
    attempts: int
    pack_size: int
    accumulation: int
    row_padding: int | None
    extended_from: str | None
    device: str
    device_name: str
    started_at: datetime
    finished_at: datetime


@dataclass(frozen=True)
class Failed:
    """An attempt at a trial that failed: what a row of `failures` is made of."""

    trial_id: str
    attempt: str
    cause: str
    error: BaseException
    printed: str
    """What it printed last."""
    config: TrialConfig
    step: int | None
    node: str | None
    device: str
    seconds: float
    lost: float
    pack_size: int
    accumulation: int


def compact(value: Any) -> str:
    """Return canonical JSON: sorted, without spaces, and without what is not finite."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _task_parameters(config: TrialConfig) -> str:
    parameters = dict(config.task.identity())
    del parameters["name"]
    return compact(parameters)


def _own_metrics(trial: Ended) -> str | None:
    from fpt.metrics import on_split

    baseline = on_split("baseline", trial.baseline.metrics)
    metrics = trial.outcome.metrics | {name: float(value) for name, value in baseline.items()}
    return compact(metrics) if metrics else None


def _traceback(failed: Failed) -> str:
    printed = f"\nprinted last:\n{failed.printed}\n" if failed.printed else ""
    return "".join(traceback.format_exception(failed.error)) + printed


# fmt: off
_KEYS: tuple[Column[Ended], ...] = (
    Column("trial_id", "string", "key", "Hash of the config that the trial trains", required=True),
    Column("cell_id", "string", "key",
           "Hash of the config without its seed: trials of one cell differ in the seed alone",
           mlflow="tag", required=True),
    Column("identity_version", "int32", "key", "Version of the rules by which the ids are made"),
    Column("task_version", "int32", "key", "Version of the task's numbers",
           of=lambda trial: trial.config.task.version),
)

_CONFIG: tuple[Column[TrialConfig], ...] = (
    Column("config", "string", "config",
           "The whole config as canonical JSON: what trial_id is a hash of",
           of=lambda config: compact(config.identity())),
    Column("task", "string", "config", "Name of the task", mlflow="param tag", category=True,
           of=lambda config: config.task.name, workload=True),
    Column("task_parameters", "string", "config", "Parameters of the task, a JSON object",
           mlflow="json", of=_task_parameters, workload=True),
    Column("backbone", "string", "config", "Name of the backbone", mlflow="param tag",
           category=True, of=lambda config: config.backbone.name, workload=True),
    Column("layers", "int32", "config", "Layers of the backbone", mlflow="param",
           of=lambda config: config.backbone.layers, workload=True, metric=True),
    Column("width", "int32", "config", "Width of the backbone's hidden state", mlflow="param",
           of=lambda config: config.backbone.width, workload=True),
    Column("heads", "int32", "config", "Attention heads of a layer", mlflow="param",
           of=lambda config: config.backbone.heads, workload=True),
    Column("weights", "string", "config",
           "Where pretrained weights come from; of a GGUF file, how they are quantised too",
           mlflow="param", category=True,
           of=lambda config: config.identity()["backbone"]["weights"]),
    Column("initialiser", "string", "config", "How weights that are not pretrained are drawn",
           mlflow="param", category=True,
           of=lambda config: config.identity()["backbone"]["initialiser"]),
    Column("pretraining", "string", "config",
           "What the backbone was pretrained on; trial:ID is a pretraining of the sweep's own",
           mlflow="param tag", category=True),
    Column("backbone_seed", "int64", "config", "Seed of the backbone's draw", mlflow="param",
           of=lambda config: config.drawn_from),
    Column("train", "string", "config", "Groups of parameters that train, joined by +",
           mlflow="param tag", category=True, of=lambda config: "+".join(config.train),
           workload=True),
    Column("optimizer", "string", "config", "Optimizer and its settings, a JSON object",
           mlflow="json", of=lambda config: compact(config.identity()["optimizer"])),
    Column("learning_rate", "float64", "config", "Learning rate", mlflow="param"),
    Column("batch_size", "int32", "config", "Examples of an optimizer step", "examples",
           mlflow="param", workload=True),
    Column("steps", "int64", "config", "Optimizer steps that the trial may take", "steps",
           mlflow="param"),
    Column("stop", "string", "config", "Rule by which training ends early, a JSON object",
           mlflow="json",
           of=lambda config: compact(config.identity()["stop"]) if config.stop else None),
    Column("dropout", "float64", "config", "Probability of dropout", FRACTION, mlflow="param",
           workload=True),
    Column("numerics", "string", "config", "Class of arithmetic: fp32 or bf16", mlflow="param tag",
           category=True, origin=True, workload=True),
    Column("protocol", "string", "config", "Protocol of data and evaluation", mlflow="param tag",
           category=True, workload=True),
    Column("evaluate_every", "int32", "config", "Steps between evaluations", "steps",
           mlflow="param", of=lambda config: config.evaluation.every, workload=True),
    Column("seed", "int64", "config", "Seed of data, new parameters and dropout",
           mlflow="param tag"),
)

_OUTCOME: tuple[Column[Outcome], ...] = (
    Column("outcome", "string", "outcome", "How the trial ended: done or diverged", mlflow="tag",
           category=True),
    Column("stopped", "string", "outcome", "What ended it: steps, plateau or diverged",
           mlflow="tag", category=True),
    Column("steps_trained", "int64", "outcome", "Optimizer steps that it took", "steps",
           mlflow="metric", of=lambda outcome: outcome.steps, metric=True),
    Column("best_step", "int64", "outcome", "Step whose parameters the figures are of", "steps",
           mlflow="metric", metric=True),
    Column("train_loss", "float64", "outcome", "Loss on the last training batches", NATS,
           mlflow="metric", metric=True),
    Column("train_accuracy", "float64", "outcome", "Accuracy on the last training batches",
           FRACTION, mlflow="metric", metric=True),
    Column("training_set_loss", "float64", "outcome",
           "Loss on training examples without dropout and augmentation", NATS, mlflow="metric",
           metric=True),
    Column("training_set_accuracy", "float64", "outcome",
           "Accuracy on training examples without dropout and augmentation", FRACTION,
           mlflow="metric", metric=True),
    Column("validation_loss", "float64", "outcome", "Loss on the validation split at best_step",
           NATS, mlflow="metric", metric=True),
    Column("validation_accuracy", "float64", "outcome",
           "Accuracy on the validation split at best_step", FRACTION, mlflow="metric", metric=True),
    Column("test_loss", "float64", "outcome", "Loss on the test split at best_step", NATS,
           mlflow="metric", metric=True),
    Column("test_accuracy", "float64", "outcome",
           "Accuracy on the test split at best_step; tables and `cells` print it in per cent",
           FRACTION, mlflow="metric", metric=True),
)

_TRAINED: tuple[Column[Ended], ...] = (
    Column("baseline_accuracy", "float64", "outcome", "Accuracy of the task's trivial baseline",
           FRACTION, mlflow="metric", of=lambda trial: trial.baseline.accuracy),
    Column("metrics", "string", "outcome",
           'Figures of the metrics that the task declares, a JSON object such as {"test_r2": '
           '0.9, "baseline_r2": 0}; null: it declares none. What reads the ledger has each as a '
           'column of its name', of=_own_metrics),
    Column("baseline_rule", "string", "provenance", "What the trivial baseline does", category=True,
           of=lambda trial: trial.baseline.rule),
    Column("stronger_baseline_accuracy", "float64", "provenance",
           "Accuracy of a learner that reads no order, of tasks that have one", FRACTION,
           mlflow="metric", of=lambda trial: trial.stronger and trial.stronger.accuracy),
    Column("stronger_baseline_rule", "string", "provenance", "What the stronger baseline is",
           category=True, of=lambda trial: trial.stronger and trial.stronger.rule),
    Column("seconds", "float64", "cost", "Training time of this trial: its part of its pack's",
           "seconds", mlflow="metric", of=lambda trial: trial.outcome.seconds, metric=True),
    Column("cpu_seconds", "float64", "cost",
           "The same in CPU time of all threads, which other work on the machine does not stretch",
           "seconds", mlflow="metric", of=lambda trial: trial.outcome.cpu_seconds, metric=True),
    Column("examples", "int64", "cost", "Training examples that it saw", "examples",
           mlflow="metric", of=lambda trial: trial.outcome.examples, metric=True),
    Column("pack_size", "int32", "provenance",
           "Trials that trained side by side with it, itself among them", origin=True),
    Column("accumulation", "int32", "provenance",
           "Parts of a batch whose gradients were summed; 1: the batch was whole", origin=True),
    Column("row_padding", "int32", "provenance",
           "What rows of shared products were padded to a multiple of, for the same bits in "
           "packs of any size on this processor, as measured there; 0: nothing does; null: not "
           "measured", origin=True),
    Column("attempts", "int32", "cost", "Attempts that it took", mlflow="tag"),
    Column("attempt", "string", "provenance",
           "Name of the attempt that finished it: joins with curves and failures"),
    Column("extended_from", "string", "provenance", "Trial whose end it went on from", origin=True),
    Column("parameters", "int64", "outcome", "Parameters of the model", mlflow="metric",
           of=lambda trial: sum(group["parameters"] for group in trial.outcome.groups.values()),
           metric=True),
    Column("parameters_trained", "int64", "outcome", "Parameters that trained", mlflow="metric",
           of=lambda trial: sum(group["trained"] for group in trial.outcome.groups.values()),
           metric=True),
    Column("groups", "string", "provenance", "Group -> tensors, parameters, trained; a JSON object",
           of=lambda trial: compact(trial.outcome.groups)),
    Column("backbone_digest", "string", "outcome", "SHA-256 of the backbone before training",
           origin=True, of=lambda trial: trial.outcome.backbone_digest),
    Column("data_digest", "string", "outcome", "SHA-256 of the data set's files", origin=True,
           of=lambda trial: trial.outcome.data_digest),
    Column("own_code", "string", "provenance",
           "Files of code of the user's own -> SHA-256, a JSON object; null: none", origin=True,
           of=lambda trial: compact(trial.config.own_code) if trial.config.own_classes else None),
    Column("git_commit", "string", "provenance", "Commit of the code", mlflow="tag", category=True,
           origin=True, of=lambda _: provenance.code()["git_commit"]),
    Column("git_dirty", "bool", "provenance", "Whether the code had changes that the commit lacks",
           mlflow="tag", origin=True, of=lambda _: provenance.code()["git_dirty"]),
    Column("version", "string", "provenance", "Release of fpt-sweep", mlflow="tag", category=True,
           origin=True, of=lambda _: provenance.code()["version"]),
    Column("versions", "string", "provenance", "Releases of Python and of libraries, a JSON object",
           origin=True, of=lambda _: provenance.versions()),
    Column("host", "string", "provenance", "Machine that trained it", mlflow="tag", category=True,
           origin=True, of=lambda _: provenance.host()),
    Column("device", "string", "provenance", "Kind of device: cpu or cuda", category=True,
           origin=True),
    Column("device_name", "string", "provenance", "Model of the processor or accelerator",
           mlflow="tag", category=True, origin=True),
    Column("started_at", "time", "cost", "When its first attempt began", "UTC"),
    Column("finished_at", "time", "cost", "When its row was made", "UTC"),
)

# fmt: on
TRIALS: tuple[Column[Any], ...] = (*_KEYS, *_CONFIG, *_OUTCOME, *_TRAINED)

# fmt: off
FAILURES: tuple[Column[Failed], ...] = (
    Column("trial_id", "string", "key", "The trial", required=True),
    Column("attempt", "string", "key", "Name of the attempt that failed; names sort by time",
           required=True),
    Column("cause", "string", "outcome",
           "Why it failed; doubled, retried and forgotten are marks and no failures", category=True,
           required=True),
    Column("exception", "string", "outcome", "Class of the exception", category=True,
           of=lambda failed: type(failed.error).__name__),
    Column("message", "string", "outcome", "What the exception said",
           of=lambda failed: str(failed.error) or repr(failed.error)),
    Column("traceback", "string", "outcome", "Where it was raised", of=_traceback),
    Column("config", "string", "config", "The trial's config as canonical JSON",
           of=lambda failed: compact(failed.config.model_dump(mode="json"))),
    Column("step", "int64", "outcome", "Optimizer step that it had reached", "steps"),
    Column("host", "string", "provenance", "Machine that it ran on", category=True,
           of=lambda _: provenance.host()),
    Column("node", "string", "provenance", "Id of the Ray node that it ran on", category=True),
    Column("device", "string", "provenance", "Kind of device: cpu or cuda", category=True),
    Column("seconds", "float64", "cost", "Training time of the attempt", "seconds"),
    Column("lost", "float64", "cost", "Training time that no saved state holds", "seconds"),
    Column("pack_size", "int32", "provenance",
           "Trials that trained side by side with it, itself among them"),
    Column("accumulation", "int32", "provenance",
           "Parts of a batch whose gradients were summed; 1: the batch was whole"),
    Column("at", "time", "cost", "When it failed", "UTC", required=True,
           of=lambda _: datetime.now(UTC)),
)

_SEGMENT: tuple[Column[Any], ...] = (
    Column("trial_id", "string", "key", "The trial", required=True),
    Column("attempt", "string", "key",
           "Attempt that wrote the point. The files of several attempts may overlap: load_curves"
           " and `sweep query` keep the last value of a (trial, split, step), and so has whoever"
           " reads the files", required=True),
    Column("segment", "int32", "key", "Number of the piece of the curve in its attempt, from 0",
           required=True),
)

_RECORD: tuple[Column[Record], ...] = (
    Column("step", "int64", "key", "Optimizer step", "steps", required=True),
    Column("split", "string", "key", "Examples that the figures are of: train, validation or test",
           category=True, required=True),
    Column("loss", "float64", "outcome", "Loss", NATS),
    Column("accuracy", "float64", "outcome", "Accuracy", FRACTION),
    Column("seconds", "float64", "cost", "Training time up to the point", "seconds"),
    Column("examples", "int64", "cost", "Training examples up to the point", "examples"),
    Column("metrics", "string", "outcome",
           'Figures of the metrics that the task declares, a JSON object such as {"r2": 0.9}',
           of=lambda record: (
               json.dumps(record.metrics, sort_keys=True) if record.metrics else None)),
)

# fmt: on
CURVES: tuple[Column[Any], ...] = (*_SEGMENT, *_RECORD)

TABLES: Mapping[str, tuple[Column[Any], ...]] = {
    "trials": TRIALS,
    "curves": CURVES,
    "failures": FAILURES,
}

CATEGORIES = frozenset(one.name for table in TABLES.values() for one in table if one.category)
"""Columns with few values."""

FIGURES = tuple(one.name for one in TRIALS if one.role == "outcome")
"""Columns of a trial that its id fixes. All others say where and when, and may differ."""

WORKLOAD = tuple(one.name for one in _CONFIG if one.workload)
"""Columns of a trial on which the seconds of a training step depend, beside the machine."""

ORIGIN = tuple(one.name for one in TRIALS if one.origin)
"""Columns of a trial that say where its figures come from."""

POINT = tuple(one.name for one in _RECORD)
"""Columns of `curves` that say what a point is; the others name its file."""

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
    import pyarrow as pa

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


def _row(columns: Iterable[Column[S]], source: S) -> JSON:
    return {one.name: one.value(source) for one in columns}


def trial_row(trial: Ended) -> JSON:
    """Return the row of a trial that has ended: a value for each column of `trials`."""
    return {
        **_row(_KEYS, trial),
        **_row(_CONFIG, trial.config),
        **_row(_OUTCOME, trial.outcome),
        **_row(_TRAINED, trial),
    }


def failure_row(failed: Failed) -> JSON:
    """Return the row of an attempt that failed: a value for each column of `failures`."""
    return _row(FAILURES, failed)


def curve_row(record: Record) -> JSON:
    """Return what a curve keeps of a record: the columns of `POINT`."""
    return _row(_RECORD, record)


def config_row(config: TrialConfig) -> JSON:
    """Return what a row of `trials` says of a trial's config."""
    return _row(_CONFIG, config)


def workload_key(config: TrialConfig) -> tuple[object, ...]:
    """Return the values of `WORKLOAD`: trials that have these alike take as long a step."""
    return tuple(one.value(config) for one in _CONFIG if one.workload)


def schema_of(name: str) -> pa.Schema:
    """Return the schema of a table; its fields have description and unit as metadata."""
    import pyarrow as pa

    return pa.schema([one.field for one in TABLES[name]])


def in_mlflow(*kinds: MLflow) -> tuple[str, ...]:
    """Return the columns of a trial that MLflow has as one of these."""
    wanted = {word for kind in kinds for word in kind.split()}
    return tuple(one.name for one in TRIALS if wanted & set(one.mlflow.split()))


def described(table: pa.Table) -> pa.Table:
    """Return a table with description and unit in the metadata of columns named as the ledger's.

    Of a name that several tables of the ledger have, what they all say alike.
    """
    import pyarrow as pa

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
