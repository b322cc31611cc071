"""What is kept of a trial: the state that resumes it, and the trained model that is left of it.

A state is one safetensors file: data, never code. It holds the trained tensors and what trains
them, not the frozen backbone, which its recipe gives again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fpt.backbones import weights
from fpt.config import TrialConfig
from fpt.files import DataError
from fpt.model import Model, build_model
from fpt.spec import JSON


@dataclass
class Figures:
    """What a trial's state holds besides tensors."""

    step: int = 0
    seconds: float = 0.0
    """Wall time of training; `cpu_seconds` that of all threads of the process."""
    cpu_seconds: float = 0.0
    window_loss: float = 0.0
    """Sum of the training losses since the last evaluation; `window_accuracy` alike."""
    window_accuracy: float = 0.0
    window_steps: int = 0
    recent_loss: float = 0.0
    """Sum of the training losses since the last training record; `recent_accuracy` alike."""
    recent_accuracy: float = 0.0
    recent_steps: int = 0
    train_loss: float | None = None
    """Mean over the last full window."""
    train_accuracy: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    """At `best_step`, on the split that picks the checkpoint (paper: the test batches)."""
    best_accuracy: float | None = None
    best_metrics: dict[str, float | None] = field(default_factory=dict)
    """The task's own, by name."""
    lowest_loss: float | None = None
    """What the plateau rule compares with."""
    stale: int = 0
    """Evaluations since the plateau rule last saw an improvement."""


@dataclass
class State:
    """What resumes a trial.

    Tensors are named PART/CANONICAL: `now` are the trained tensors, `first` and `second` Adam's
    moments, `best` the picked checkpoint where it is not the current one.
    """

    trial: JSON
    """The trial's config, for `load_model`."""
    figures: Figures
    tensors: dict[str, Tensor] = field(repr=False)
    code: dict[str, str] = field(default_factory=dict)
    """`TrialConfig.own_code` of the process that trained it: the tensors mean nothing to other
    code."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.figures.step

    def to_bytes(self) -> bytes:
        """A safetensors file; config and figures are its metadata."""
        metadata: JSON = {"trial": self.trial, "figures": asdict(self.figures)}
        return weights.to_bytes(self.tensors, metadata | ({"code": self.code} if self.code else {}))

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        """The state that `to_bytes` wrote.

        Raises:
            ValueError: If the bytes are no such file.
        """
        try:
            # A safetensors file begins with the length of its JSON header.
            length = int.from_bytes(data[:8], "little")
            metadata = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["fpt"])
            figures = Figures(**metadata["figures"])
            return cls(metadata["trial"], figures, load(data), metadata.get("code", {}))
        except (KeyError, ValueError, SafetensorError, TypeError) as error:
            raise ValueError(f"not the saved state of a trial ({error})") from error

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, by canonical name."""
        prefix = name + "/"
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def checkpoint(self) -> dict[str, Tensor]:
        """The trained tensors that were tested: the picked ones, else the last."""
        return self.part("best") or self.part("now")


def load_model(trial_id: str, results: str | Path = "results") -> Model:
    """The trained model of a finished trial, in evaluation mode, as it was tested.

    Args:
        trial_id: 12 hex digits.
        results: The ledger's folder. Of a ledger on object storage, copy `states/` and, for a
            pretraining of your own, `backbones/` to a folder.

    Raises:
        DataError: If the trial's tensors, or the backbone that it was trained on, are not there.
    """
    folder = Path(results)
    if not (folder / "trials" / f"{trial_id}.parquet").is_file():
        raise DataError(f"{folder}: no finished trial {trial_id}")
    file = folder / "states" / f"{trial_id}.safetensors"
    try:
        state = State.from_bytes(file.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{file}: missing; the trial's tensors were not kept (`keep` in the sweep file, "
            "`sweep gc`)"
        ) from None
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error
    trial = TrialConfig.model_validate(state.trial)
    kept = (
        {}
        if trial.parent is None
        else {trial.parent: folder / "backbones" / f"{trial.parent}.safetensors"}
    )
    return build_model([trial], weights=state.checkpoint(), backbones=kept).eval()
