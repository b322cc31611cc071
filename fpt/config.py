"""Every config of a trial: frozen, validated, documented field by field.

A `TrialConfig` is complete: named sizes are resolved, sets are sorted, defaults are written out.
Two spellings of one trial are equal. What cannot change a number (device, pack, logging) is not
here. Nothing in this module, nor in what it imports, imports torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import sys
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    Union,
    cast,
    get_type_hints,
)

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
    field_validator,
    model_validator,
)

from fpt.backbones import (
    AUTO,
    BACKBONE_GROUP,
    BACKBONES,
    NOTHING,
    Backbone,
    Group,
    row,
    row_of_weights,
)
from fpt.backbones.headers import inventory
from fpt.backbones.sources import (
    HUB,
    LANGUAGE,
    LAYER_STATISTICS,
    MODALITIES,
    PRETRAININGS,
    RANDOM,
    STATISTICS,
    TRIAL,
    check_weights,
    deviations,
    positions_of,
    sizes_of,
    weights_identity,
)
from fpt.files import DataError
from fpt.metrics import Metric
from fpt.plugins import class_path, describe, digests, imported, line_of, registered
from fpt.precision import Numerics
from fpt.spec import JSON, Spec
from fpt.tasks import TASK_GROUP, TASKS, Task
from fpt.tasks.base import ProtocolName, Shape

TRAINABLE = ("attention", "feedforward", "input", "norm", "output", "position")
"""The groups that a transformer may train, sorted."""

FPT = ("input", "norm", "output", "position")
"""What a frozen pretrained transformer trains, as far as the backbone has it."""

TrainSet = Literal[
    "attention",
    "attention:last",
    "feedforward",
    "input",
    "norm",
    "output",
    "position",
    "recurrent",
    "scale",
]


_PUBLISHED = {
    size.weights: one.modality
    for one in BACKBONES.values()
    for size in one.sizes.values()
    if size.weights is not None
}
"""Weights of the named sizes -> what they were trained on."""


def _task_name(value: Any) -> str:
    name = value if isinstance(value, str) else getattr(value, "name", None)
    return str(value.get("name", "") if isinstance(value, dict) else name)


def _own_task(value: Any, ours: ValidatorFunctionWrapHandler) -> Any:
    """A task of the table, or of a user's own class."""
    name = _task_name(value)
    path = None if name in TASKS else class_path(name, TASK_GROUP)
    if path is None:
        return ours(value)
    if isinstance(value, Task):
        return value
    own = imported(path)
    if not issubclass(own, Task):
        raise ValueError(f"{name} is not a subclass of fpt.Task")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return own.model_validate(value)
    except (ValidationError, DataError):
        raise
    except Exception as error:
        raise ValueError(
            f"{line_of(own)}: task {name}: making one raises {describe(error)}"
        ) from error


def shape_of(task: Task, protocol: ProtocolName) -> Shape:
    """Return a task's shape.

    Raises:
        ValueError: If a user's own class cannot say it.
    """
    if task.name in TASKS:
        return task.shape(protocol)
    shape = _said(task, "shape", protocol)
    if not isinstance(shape, Shape):
        where = f"{line_of(type(task))}: task {task.name}: shape(protocol)"
        raise ValueError(f"{where} gives a {type(shape).__name__}, wanted fpt.Shape")
    return shape


def check_metrics(task: Task, protocol: ProtocolName) -> None:
    """Check that a task can say what its metrics are.

    Raises:
        ValueError: If a user's own class cannot.
    """
    if task.name in TASKS:
        return
    found = _said(task, "metrics", protocol)
    if not isinstance(found, tuple | list) or not all(isinstance(one, Metric) for one in found):
        where = f"{line_of(type(task))}: task {task.name}: metrics(protocol)"
        raise ValueError(f"{where} gives {found!r:.60}, wanted a tuple of fpt.Metric")


def _said(task: Task, what: str, protocol: ProtocolName) -> Any:
    """Return what a method of a user's own class gives."""
    where = f"{line_of(type(task))}: task {task.name}: {what}(protocol)"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return getattr(task, what)(protocol)
    except NotImplementedError:
        raise ValueError(f"{where} is not implemented") from None
    except Exception as error:
        raise ValueError(f"{where} raises {describe(error)}") from error


if TYPE_CHECKING:
    AnyTask = Task
else:
    AnyTask = Annotated[
        Union[tuple(Annotated[task, Tag(name)] for name, task in TASKS.items())],  # noqa: UP007
        Discriminator(
            _task_name,
            custom_error_type="unknown_task",
            custom_error_message="unknown task; tasks: "
            f"{', '.join([*TASKS, *registered(TASK_GROUP)])}, or module:Class",
        ),
        WrapValidator(_own_task),
        # A user's own class has fields of its own.
        SerializeAsAny(),
    ]

Seed = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class BackboneConfig(Spec):
    """The model between input layer and output layer."""

    name: str
    """A row of `fpt.backbones.BACKBONES`; `auto`, for the architecture that the config.json of
    `weights` says; or `module:Class`, for a class of your own."""
    layers: int = Field(ge=1)
    """Layers. Fewer than the pretrained weights have: the first ones."""
    width: int = Field(ge=1)
    """Width of the residual stream; the feed-forward layer is four times as wide, unless the
    config.json of `weights` says otherwise."""
    heads: int = Field(ge=1)
    """Attention heads; they divide the width."""
    weights: str | None = None
    """Pretrained weights, whose own config.json says what the backbone computes: `hub:ID` or
    `hub:ID@REVISION` (Hugging Face Hub), `shipped:NAME` (comes with this package),
    `package:MODULE/FOLDER` (comes with an installed one), or a directory holding config.json and
    model.safetensors; for the last two also FILE.gguf in it. Default: those of the named size."""
    initialiser: Literal["plain", "scaled"] = "plain"
    """How random weights are drawn. plain: every matrix N(0, 0.02). scaled: projections into the
    residual stream N(0, 0.02 / sqrt(2 layers)), as GPT-2's authors and some releases of
    transformers do."""
    init: Literal["theirs", "gpt2"] = "theirs"
    """How random weights of a class of your own are drawn. theirs: as its constructor does, seeded.
    gpt2: as ours are, by `initialiser`."""
    groups: tuple[tuple[str, Group], ...] = ()
    """Rules that come before the backbone's own: regular expression over a parameter's name ->
    group; the first match wins. `auto` has no others then, and without any those of its family."""

    @model_validator(mode="before")
    @classmethod
    def _resolve_size(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if not isinstance(value, dict):
            return value
        fields = dict(value)
        size = fields.pop("size", None)
        name = fields.get("name")
        if not isinstance(name, str):
            raise ValueError(f"unknown backbone {name!r}; known: {', '.join(BACKBONES)}")
        sizes = row(name).sizes if ":" not in name else {}
        sizeless = {"layers", "width", "heads"} - fields.keys()
        if name == AUTO and sizeless and isinstance(fields.get("weights"), str):
            try:
                fields = sizes_of(fields["weights"]) | fields
            except DataError as error:
                raise ValueError(str(error)) from error
        if size is None and "base" in sizes and not {"layers", "width", "heads"} & fields.keys():
            size = "base"
        if size is not None:
            if not isinstance(size, str) or size not in sizes:
                raise ValueError(
                    f"size: {name} has no size {size!r}; its sizes are "
                    f"{', '.join(sizes) or 'none'} (or give layers, width and heads)"
                )
            named = sizes[size]
            for field in ("layers", "width", "heads"):
                if fields.get(field) is None:
                    fields[field] = getattr(named, field)
            same = (fields["width"], fields["heads"]) == (named.width, named.heads)
            fewer = fields["layers"] in range(1, named.layers + 1)
            if same and fewer and fields.get("weights") is None:
                fields["weights"] = named.weights
        return fields

    @field_validator("groups", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        return tuple(value.items()) if isinstance(value, dict) else value

    @field_validator("groups")
    @classmethod
    def _are_expressions(cls, value: tuple[tuple[str, Group], ...]) -> Any:
        for rule, _ in value:
            try:
                re.compile(rule)
            except re.error as error:
                raise ValueError(f"{rule!r} is not a regular expression: {error}") from None
        return value

    @property
    def row(self) -> Backbone:
        """The row of the table of backbones, with the rules that the config gives; of `auto`
        without any, the row of the family that the weights are of.

        Raises:
            ValueError: If there is no such row.
        """
        if self.name == AUTO and not self.groups and self.weights is not None:
            try:
                return row_of_weights(self.weights)
            except DataError as error:
                raise ValueError(str(error)) from error
        return row(self.name, self.groups)

    @property
    def pretrained_on(self) -> str | None:
        """What published weights of it were trained on; None: there are none, or it is not known.

        Where a user's own weights have the architecture of a language model, it is the user who
        knows: of proteins, music and pixels there are such models too.
        """
        modality = self.row.modality
        if self.weights is None or self.weights in _PUBLISHED:
            return _PUBLISHED.get(self.weights or "", modality)
        return None if modality == LANGUAGE else modality

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name == AUTO and (self.weights is None or self.weights.startswith(HUB)):
            raise ValueError(
                "auto: set backbone.weights to a directory with a config.json, or to package:"
                "MODULE/FOLDER"
            )
        if self.name != AUTO and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if not self.row.groups:
            raise ValueError(
                f"{self.name}: backbone.groups is missing; it names the group of each parameter, "
                "as {regular expression: group}"
            )
        own = self.row.version is not None
        if self.init == "gpt2" and not own:
            raise ValueError(f"init: {self.name} is not a class of your own; leave it out")
        if self.initialiser == "scaled" and own and self.init == "theirs":
            raise ValueError(
                "initialiser scaled: a class of your own draws its weights, unless "
                "`init: gpt2` says otherwise"
            )
        if self.initialiser == "scaled" and self.row.residual_outputs == NOTHING:
            raise ValueError(f"initialiser scaled: {self.name} has its own way to draw weights")
        if self.name == AUTO and not self.groups:
            self._check_rules()
        if self.weights is not None:
            check_weights(self.weights, self.name, **self.sizes)
        return self

    def _check_rules(self) -> None:
        # Those of a pickle, whose names are not known without reading it, are judged once they are.
        with contextlib.suppress(DataError):
            if unknown := inventory(self.weights or "").unknown:
                more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
                raise ValueError(
                    f"weights: {self.weights}: no rule for {', '.join(unknown[:3])}{more}; write "
                    "backbone.groups, as {regular expression: group}, for all parameters"
                )

    @property
    def sizes(self) -> dict[str, int]:
        """Layers, width and heads."""
        return {"layers": self.layers, "width": self.width, "heads": self.heads}

    @property
    def has_own_config(self) -> bool:
        """Whether a drawn backbone too is built by the config.json of `weights`: a directory's."""
        if self.row.version is not None:
            return False  # its class says what it computes
        published = {size.weights for size in self.row.sizes.values()}
        return self.weights not in (None, *published) and not str(self.weights).startswith(HUB)

    def deviations(self) -> dict[str, Any]:
        """Return the fields of a directory's config.json by which the backbone computes another
        function than one without weights.

        Raises:
            DataError: If the directory lacks config.json or weights.
        """
        return (
            deviations(self.weights or "", self.name, **self.sizes) if self.has_own_config else {}
        )


class OwnBackbone(BackboneConfig):
    """A class of a user's own, whose `Config` has given it fields: see `backbone_of`."""

    own: ClassVar[type]
    """The class of the user's own."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Its type is made anew in every process.
        return backbone_of, (self.model_dump(mode="json"),)

    @model_validator(mode="after")
    def _check_own(self) -> Self:
        config = self.own.Config  # type: ignore[attr-defined]
        fields = {name: getattr(self, name) for name in own_fields(self.own)}
        where = f"{line_of(config)}: {config.__qualname__}"
        if unhashable := [name for name, value in fields.items() if not _is_hashable(value)]:
            raise ValueError(f"{where}: {unhashable[0]} can be changed in place; make it a tuple")
        try:
            with contextlib.redirect_stdout(sys.stderr):
                config(**fields)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]["msg"]
            raise ValueError(f"{where}: {first.removeprefix('Value error, ')}") from None
        except Exception as error:
            raise ValueError(f"{where}: raises {describe(error)}") from error
        return self


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


@functools.cache
def own_fields(own: type) -> dict[str, tuple[Any, Any]]:
    """Return the fields that a class's `Config`, a dataclass or a pydantic model, adds to those of
    every backbone: name -> type, and default or pydantic's FieldInfo.

    Raises:
        ValueError: If it is neither, if a type cannot be read, or if every backbone has the field.
    """
    config = getattr(own, "Config", None)
    if config is None:
        return {}
    where = f"{line_of(own)}: {own.__qualname__}.Config"
    found: dict[str, tuple[Any, Any]]
    if isinstance(config, type) and issubclass(config, BaseModel):
        found = {name: (field.annotation, field) for name, field in config.model_fields.items()}
    elif isinstance(config, type) and dataclasses.is_dataclass(config):
        try:
            types = get_type_hints(config)
        except Exception as error:
            raise ValueError(f"{where}: {describe(error)}") from error
        found = {
            one.name: (types[one.name], _default(one))
            for one in dataclasses.fields(config)
            if one.init
        }
    else:
        raise ValueError(f"{where} is {config!r:.60}, wanted a dataclass or a pydantic model")
    if twice := sorted(found.keys() & {*BackboneConfig.model_fields, "size", "own", "row"}):
        raise ValueError(f"{where}: every backbone has a field {twice[0]}; choose another name")
    return found


def _default(one: dataclasses.Field[Any]) -> Any:
    if one.default is not dataclasses.MISSING:
        return one.default
    if one.default_factory is not dataclasses.MISSING:
        return Field(default_factory=one.default_factory)
    return ...


@functools.cache
def own_config(own: type) -> type[BackboneConfig]:
    """Return what stands under `backbone:` for a class of a user's own.

    Raises:
        ValueError: As `own_fields`.
    """
    fields = own_fields(own)
    if not fields:
        return BackboneConfig
    try:
        made = create_model("OwnBackbone", __base__=OwnBackbone, **fields)  # type: ignore[call-overload]
    except Exception as error:
        raise ValueError(f"{line_of(own)}: {own.__qualname__}.Config: {describe(error)}") from error
    made.own = own
    return cast("type[BackboneConfig]", made)


def backbone_of(value: Any) -> BackboneConfig:
    """Return the config of a backbone from what stands under `backbone:` in a sweep file.

    Raises:
        ValueError: If it is wrong.
    """
    if isinstance(value, BackboneConfig):
        return value
    name = _task_name(value)
    path = None if name in BACKBONES else class_path(name, BACKBONE_GROUP)
    made = BackboneConfig if path is None else own_config(imported(path))
    return made.model_validate(value)


def _own_backbone(value: Any, ours: ValidatorFunctionWrapHandler) -> Any:
    """A backbone of the table, or of a user's own class."""
    if isinstance(value, BackboneConfig) or _task_name(value) in BACKBONES:
        return ours(value)
    return backbone_of(value)


if TYPE_CHECKING:
    AnyBackbone = BackboneConfig
else:
    # A user's own class may have fields of its own.
    AnyBackbone = Annotated[BackboneConfig, WrapValidator(_own_backbone), SerializeAsAny()]


class OptimizerConfig(Spec):
    """Adam, as the paper uses it (PyTorch's defaults, constant rate, gradient norm clipped)."""

    name: Literal["adam"] = "adam"
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: float = Field(default=1e-8, gt=0)
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient of all trained parameters together; null: not clipped."""
    schedule: Literal["constant", "cosine"] = "constant"
    """constant, or a half cosine from the learning rate to a tenth of it over `steps`."""
    warmup: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly from zero."""


class PlateauConfig(Spec):
    """A stop rule that is the same for every arm: stop once validation has ceased to improve."""

    patience: int = Field(ge=1)
    """Evaluations in a row without an improvement."""
    tolerance: float = Field(default=0.0, ge=0)
    """What the validation loss must fall by to count as an improvement, in nats."""


class EvaluationConfig(Spec):
    """When and on what a trial is evaluated."""

    every: int = Field(default=100, ge=1, lt=2**31)
    """Optimizer steps between evaluations; one more comes at the last step."""
    batches: int = Field(default=25, ge=1)
    """Protocol paper: random batches of the test set in an evaluation. The protocol sound reads
    whole sets, and this is not part of its identity."""
    training_set: int = Field(default=0, ge=0)
    """Training examples (the first ones of a fixed order) that are measured at the end with the
    picked checkpoint, without dropout and augmentation; 0: none."""


ADDED_FIELDS: dict[str, object] = {"backbone.groups": [], "evaluation.training_set": 0}
"""Fields that trials got after the first release (dotted paths), with the value at which a trial
does what it did before: there the field is left out of the hash, so that the ids of old trials
stay."""


class TrialConfig(Spec):
    """One training: everything that can change a number, and nothing else."""

    task: AnyTask
    """What is learned: a task's name, or its name and parameters."""
    backbone: AnyBackbone = BackboneConfig.model_validate("gpt2")
    """The transformer between the layers; a name, or name and size (or layers, width, heads)."""
    pretraining: str = LANGUAGE
    """Where the backbone's weights come from. language, image, speech, protein: weights that were
    pretrained on it; they are read from where `backbone.weights` says.
    statistics: each tensor redrawn from a normal distribution with the mean and deviation of the
    pretrained one. layer-statistics: with those of all matrices (gains, biases) of its layer.
    random: our own initialiser. trial:ID: the backbone that another trial trained."""
    backbone_seed: Seed | None = None
    """Seed of drawn weights (random, statistics, layer-statistics). null: the trial's own seed, so
    that a table's interval includes the draw."""
    train: tuple[TrainSet, ...] = Field("fpt", min_length=1)  # type: ignore[arg-type]
    """The groups that train; `fpt`: input, norm, output and position as far as the backbone has
    them; `all`: every one it has. `attention:last` is the last layer's."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer without its learning rate."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Adam's step size."""
    batch_size: int = Field(default=16, ge=1, lt=2**31)
    """Examples an optimizer step sees, whatever the micro-batch."""
    steps: int = Field(ge=1)
    """Optimizer steps, not epochs."""
    stop: PlateauConfig | None = None
    """null: train for `steps`. Else a plateau rule, with `steps` as the most."""
    dropout: Fraction = 0.1
    """Dropout after the input layer, and in embedding, attention and residual of the backbone."""
    embedding_deviation: float = Field(default=1.0, gt=0)
    """Standard deviation of an embedding input layer's initial values. 1, PyTorch's default, is
    what the public code has; GPT-2 itself began with 0.02, which suits pretraining from scratch."""
    numerics: Numerics = "fp32"
    """The numerics class. fp32: all of it, with TF32 off. bf16: products with frozen weights take
    their operands in bfloat16, forward and backward, which is faster (it needs AMX, AVX-512 BF16
    or a recent GPU) and another trajectory; what trains, norms, attention and losses stay in fp32.
    A trial's bits may then depend on the pack that it trained in."""
    protocol: ProtocolName = "sound"
    """sound, or the public code's defects: see `fpt.tasks.base.ProtocolName`."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """When the trial is evaluated."""
    seed: Seed
    """Seed of initialisation, training data, evaluation data and dropout, in streams apart."""

    @field_validator("pretraining")
    @classmethod
    def _known_pretraining(cls, value: str, info: ValidationInfo) -> str:
        if value in PRETRAININGS or re.fullmatch(TRIAL + "[0-9a-f]{12}", value):
            return value
        backbone = info.data.get("backbone")
        if (
            backbone is not None
            and backbone.row.version is not None
            and backbone.weights is not None
            and re.fullmatch(r"\w[\w. -]*", value)
        ):
            return value  # the user's own word for their own weights
        raise ValueError(
            f"unknown pretraining {value!r}; known: {', '.join(PRETRAININGS)}, "
            f"{TRIAL}ID, or a name under `backbones:` of the sweep file"
        )

    @field_validator("train", mode="before")
    @classmethod
    def _resolve_words(cls, value: Any, info: ValidationInfo) -> Any:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple):
            return value
        backbone = info.data.get("backbone")  # not there if it has a problem itself
        has = backbone.row.trainable if backbone is not None else FPT
        if list(names) == ["all"]:
            return has
        return tuple(set(has) & set(FPT)) if list(names) == ["fpt"] else tuple(names)

    @field_validator("train")
    @classmethod
    def _sorted_set(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names a group twice")
        if {"attention", "attention:last"} <= set(value):
            raise ValueError("attention includes attention:last; name one of them")
        return tuple(sorted(value))

    @model_validator(mode="after")
    def _check(self) -> Self:
        shape = shape_of(self.task, self.protocol)
        check_metrics(self.task, self.protocol)
        if shape.causal and not self.backbone.row.causal:
            raise ValueError(
                f"task {self.task.name} predicts each next token, which {self.backbone.name} can "
                "see; use a causal backbone (gpt2)"
            )
        if self.backbone.name == AUTO and not self.backbone.groups:
            most = positions_of(self.backbone.weights or "")
            if most is not None and shape.tokens > most:
                raise ValueError(
                    f"task {self.task.name} has {shape.tokens} tokens, and {self.backbone.weights} "
                    f"positions for {most}"
                )
        has = self.backbone.row.trainable
        lacking = [part for part in self.train if part.partition(":")[0] not in has]
        if lacking:
            raise ValueError(
                f"train: {self.backbone.name} has no group {', '.join(lacking)}; it has "
                f"{', '.join(has)}"
            )
        if self.reads_weights and self.backbone.weights is None:
            raise ValueError(
                f"pretraining {self.pretraining}: no pretrained {self.backbone.name} of this size "
                "is known; set backbone.weights (hub:ID or a directory), or choose a named size"
            )
        if self.pretraining in MODALITIES:
            modality = self.backbone.pretrained_on
            if modality not in (None, self.pretraining):
                raise ValueError(
                    f"pretraining {self.pretraining}: {self.backbone.name} was pretrained on "
                    f"{modality}"
                )
        if self.numerics == "bf16":
            shared = self.backbone.row.packs
            if not shared or {"attention", "feedforward"} <= set(self.train):
                raise ValueError(
                    f"numerics: bf16 is for products with frozen weights, and {self.backbone.name} "
                    f"{'trains all of its own' if shared else 'has none in that form'}; use fp32"
                )
        if self.stop is not None and self.protocol == "paper":
            raise ValueError("stop: the protocol paper has no validation split to stop by")
        return self

    @property
    def own_classes(self) -> tuple[tuple[Literal["task", "backbone"], str], ...]:
        """(`task` or `backbone`, `module:Class`) of each class of a user's own."""
        task = None if self.task.name in TASKS else class_path(self.task.name, TASK_GROUP)
        row = self.backbone.row
        return (
            *((("task", task),) if task is not None else ()),
            *((("backbone", row.module),) if row.version is not None else ()),
        )

    @property
    def own_code(self) -> dict[str, str]:
        """SHA-256 of each source file of a user's own that takes part, by its path from its root.

        It enters no identity, since a comment changes it: it is kept with what the code gave.
        """
        return digests(path for _, path in self.own_classes)

    @property
    def parent(self) -> str | None:
        """The id of the trial whose backbone this one takes, or None."""
        is_trial = self.pretraining.startswith(TRIAL)
        return self.pretraining.removeprefix(TRIAL) if is_trial else None

    @property
    def drawn_from(self) -> int | None:
        """The seed of the backbone's draw; None where nothing is drawn."""
        if self.pretraining not in (RANDOM, STATISTICS, LAYER_STATISTICS):
            return None
        return self.seed if self.backbone_seed is None else self.backbone_seed

    @property
    def reads_weights(self) -> bool:
        """Whether published weights are read."""
        return self.pretraining != RANDOM and self.parent is None

    def identity(self) -> JSON:
        """The canonical JSON of the trial: all that can change a number, without paths or labels.

        A field that cannot matter to this trial is null (the initialiser of a pretrained backbone),
        so that spellings which differ only there are one trial.

        Raises:
            DataError: If the content behind a path has to be read and is not there.
        """
        drawn = self.pretraining == RANDOM
        out = self.model_dump(mode="json")
        out["task"] = self.task.identity() | {"version": self.task.version}
        out["train"] = list(self.train)
        out["backbone"]["weights"] = (
            weights_identity(self.backbone.weights, own=self.backbone.row.version is not None)
            if self.backbone.weights is not None
            and (self.reads_weights or self.backbone.name == AUTO)
            else None
        )
        if drawn and out["backbone"]["weights"] is None and (own := self.backbone.deviations()):
            # Elsewhere it is part of what the digest of weights, or the parent's id, stands for.
            out["backbone"]["function"] = own
        out["backbone"]["initialiser"] = self.backbone.initialiser if drawn else None
        init = out["backbone"].pop("init")
        if self.backbone.row.version is not None and drawn and init == "theirs":
            out["backbone"]["init"] = init
        if self.backbone.row.version is not None:
            out["backbone"]["version"] = self.backbone.row.version
        out["backbone_seed"] = self.drawn_from
        if self.protocol == "sound":
            out["evaluation"]["batches"] = None
        if not self.task.shape(self.protocol).embedded:
            out["embedding_deviation"] = None
        return out
