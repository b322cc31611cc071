"""What the driver and a worker hand each other: a pack as a job, signs of life, results."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from sweep.ledger.causes import Cause, Halt
from sweep.planning.plan import Pack
from sweep.sweepfile.schema import LimitsSpec
from sweep.sweepfile.trials import Point

if TYPE_CHECKING:
    from torch.nn import Module

    from fpt.trainer import Record, Training


@dataclass(frozen=True)
class Job(Pack):
    """A pack in a run: what earlier attempts have shown of it, and the attempt at hand."""

    deaths: int = 0
    """Workers that died of it, or of the larger pack that it is a part of."""
    died_at: Mapping[str, int] = field(default_factory=dict)
    """Trial id -> the step last heard of when the worker died."""
    accumulation: int = 1
    """Parts of a batch, for want of memory; of packs of one."""
    alone: bool = False
    """To be tried when nothing else is left to hand out, with a device to itself."""
    avoid: frozenset[str] = frozenset()
    """Ray's ids of nodes where not to run it, as long as there are others: they, or their device,
    failed it."""
    attempt: str = ""
    """The attempt's own name; segments of curves and failures bear it. Empty: none was begun."""
    attempts: Mapping[str, int] = field(default_factory=dict)
    """Trial id -> attempts at it so far, this one included."""
    keep_backbones: Collection[str] = ()
    """Ids of the trials whose backbones others take."""
    keep_states: bool | None = None
    """`keep.trained` of the sweep file."""
    code: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Trial id -> digests of the user's own code, as the driver has read it."""
    limits: LimitsSpec = field(default_factory=LimitsSpec)
    node: str | None = None
    """Of the Ray cluster, where it runs; the worker knows it."""

    def __str__(self) -> str:
        return self.attempt  # Tune makes a tag of the text of whatever a trial gets

    @property
    def device(self) -> str:
        """Where it trains."""
        return "cuda" if self.resources.get("GPU") else "cpu"


@dataclass(frozen=True)
class Result:
    """What came of one trial of a pack."""

    trial_id: str
    status: Literal["done", "diverged", "failed"]
    cause: Cause | None = None
    """Of a failure."""
    exception: str | None = None
    message: str | None = None
    loss: float | None = None
    """Of the test split."""
    accuracy: float | None = None
    step: int | None = None
    """Of a failure: the last step heard of."""
    undecided: bool = False
    """Of a failure by `code`: the pack failed as a whole, and which of its trials is to blame is
    not known. It is not in the ledger, where this cause waits for a person."""


class EndWorkerError(Exception):
    """Raised when everything is written, for Ray to end this process (see `ENDS_PROCESS`)."""

    def __init__(self, results: tuple[Result, ...]) -> None:
        super().__init__(results)
        self.results = results


class Reporter:
    """Where an attempt leaves signs of life; by itself it counts them, and nobody hears of it."""

    def __init__(self) -> None:
        self.phase: Literal["preparing", "training", "writing"] = "preparing"
        """writing: all that is left to do is to write."""
        self.beats = 0
        """Rises with each step, and with each batch of an evaluation."""
        self.steps: dict[str, int] = {}
        """Trial id -> the last step recorded."""
        self.saved: dict[str, float] = {}
        """Trial id -> seconds of training that its last saved state holds."""
        self._seconds: dict[str, float] = {}

    @property
    def unsaved(self) -> dict[str, float]:
        """Trial id -> seconds of training that no saved state holds."""
        seconds = dict(self._seconds)
        return {name: max(0.0, all_ - self.saved.get(name, 0.0)) for name, all_ in seconds.items()}

    def start(self, point: Point, step: int) -> None:
        """Take in that a trial starts, or goes on from a step."""

    def record(self, point: Point, record: Record) -> None:
        """Take in a record of a trial."""
        self.steps[point.trial_id] = record.step
        self._seconds[point.trial_id] = record.seconds

    def halted(self) -> Halt | None:
        """Return why the attempt is to end now, if it is."""
        return None

    def follow(self, training: Training) -> None:
        """Beat with the batches of evaluations; what stands in for a trainer may have none."""
        if (model := getattr(training, "model", None)) is not None:
            model.backbone.register_forward_pre_hook(self._beat)

    def _beat(self, backbone: Module, inputs: object) -> None:
        self.beats += not backbone.training
