"""One trial of a pack while it trains: parameters, optimizer, running figures; and its state."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fpt.checkpoints import Figures, State
from fpt.config import OptimizerConfig, TrialConfig
from fpt.model import Model


class Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980) on one member's tensors, by torch's fused kernel.

    What torch.optim.Adam computes, to the bit; but its Python, called for every member at every
    step, takes a tenth of a small member's step.
    """

    def __init__(self, rule: OptimizerConfig, device: torch.device) -> None:
        self._rule = rule
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        """Name -> first and second moment, of tensors that ever had a gradient."""
        self.steps = torch.zeros((), device=device)
        """Updates made."""

    @torch.no_grad()
    def step(self, parameters: Mapping[str, Tensor], rate: float, skip: Tensor) -> None:
        """Update parameters by their gradients; none of it where `skip` is 1, on the device."""
        for name, parameter in parameters.items():
            if name not in self.moments:
                self.moments[name] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        first, second = zip(*(self.moments[name] for name in parameters), strict=True)
        self.steps += 1
        torch._fused_adam_(
            list(parameters.values()),
            [p.grad for p in parameters.values() if p.grad is not None],
            first,
            second,
            [],
            [self.steps] * len(parameters),
            lr=rate,
            beta1=self._rule.beta1,
            beta2=self._rule.beta2,
            weight_decay=0.0,
            eps=self._rule.epsilon,
            amsgrad=False,
            maximize=False,
            found_inf=skip,
        )
        self.steps -= skip


@dataclass
class Member:
    """One trial of the pack while it trains."""

    index: int
    """In the list given to `train`, and in the model."""
    trial: TrialConfig
    parameters: dict[str, torch.nn.Parameter]
    """By canonical name, shared ones included."""
    optimizer: Adam
    own_batches: Iterator[Any] | None
    """A caller's own training data."""
    figures: Figures = field(default_factory=Figures)
    best: dict[str, Tensor] = field(default_factory=dict)
    """Copy of the picked checkpoint; empty while the current tensors are it."""
    non_finite: Tensor = field(default_factory=lambda: torch.zeros(()))
    """1 from the first loss or gradient on that is not finite: Adam then skips the update."""
    window: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    """Sums of training loss and accuracy since the last evaluation; written in place, as all these
    are, since they may be parts of larger tensors."""
    recent: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    """The same since the last training record."""

    @classmethod
    def of(cls, model: Model, k: int, batches: Iterator[Any] | None) -> Member:
        """Return member k of a model, as it begins."""
        device = next(model.parameters()).device
        trial = model.trials[k]
        member = cls(k, trial, model.member(k), Adam(trial.optimizer, device), batches)
        for name in ("non_finite", "window", "recent"):
            setattr(member, name, getattr(member, name).to(device))
        return member

    @functools.cached_property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that train, by canonical name."""
        return {n: p for n, p in self.parameters.items() if p.requires_grad}

    @functools.cached_property
    def _classifies(self) -> bool:
        return self.trial.task.shape(self.trial.protocol).loss != "mse"

    def kept(self, model: Model) -> dict[str, Tensor]:
        """Return what of it changes in training, by canonical name."""
        return {**self.trained, **model.own_buffers()}

    @property
    def stop_reason(self) -> Literal["steps", "plateau"] | None:
        """Why its training has ended, by its figures; None: it goes on."""
        stop = self.trial.stop
        if self.figures.step >= self.trial.steps:
            return "steps"
        return "plateau" if stop is not None and self.figures.stale >= stop.patience else None

    def rate(self) -> float:
        """Return the learning rate of the step to come."""
        done, total = self.figures.step, self.trial.steps
        rule = self.trial.optimizer
        rate = self.trial.learning_rate
        if done < rule.warmup:
            return rate * (done + 1) / rule.warmup
        if rule.schedule == "cosine":
            part = (done - rule.warmup) / max(1, total - rule.warmup)
            return rate * (0.1 + 0.45 * (1 + math.cos(math.pi * part)))
        return rate

    def count_step(self) -> None:
        """Count a step that was trained, in all and in both windows."""
        self.figures.step += 1
        self.figures.window_steps += 1
        self.figures.recent_steps += 1

    def take_recent(self, loss: float, accuracy: float) -> tuple[float, float | None]:
        """Return mean training loss and accuracy since the last call, of these sums; of numbers no
        accuracy.
        """
        steps = self.figures.recent_steps
        self.recent.zero_()
        self.figures.recent_steps = 0
        return loss / steps, accuracy / steps if self._classifies else None

    def close_window(self, loss: float, accuracy: float) -> None:
        """Note mean training loss and accuracy since the last evaluation, of these sums."""
        figures = self.figures
        figures.train_loss = loss / figures.window_steps
        figures.train_accuracy = accuracy / figures.window_steps if self._classifies else None
        self.window.zero_()
        figures.window_steps = 0

    def state(self, model: Model) -> State:
        """Return what resumes it, on the host."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.kept(model).items():
            tensors[f"now/{name}"] = parameter.detach().cpu().clone()
            if name in self.optimizer.moments:
                first, second = self.optimizer.moments[name]
                tensors[f"first/{name}"] = first.cpu().clone()
                tensors[f"second/{name}"] = second.cpu().clone()
            if self.best and self.figures.best_step != self.figures.step:
                tensors[f"best/{name}"] = self.best[name].cpu().clone()
        figures = Figures(**asdict(self.figures))
        figures.window_loss, figures.window_accuracy = self.window.tolist()
        figures.recent_loss, figures.recent_accuracy = self.recent.tolist()
        return State(self.trial.model_dump(mode="json"), figures, tensors, self.trial.own_code)

    def restore(self, model: Model, state: State) -> None:
        """Go on from a state.

        Raises:
            ValueError: If it is of a trial that trains other parameters.
        """
        now, first, second = (state.part(name) for name in ("now", "first", "second"))
        if set(now) != set(self.kept(model)):
            raise ValueError("state: it is of a trial that trains other parameters")
        model.load(self.index, now)
        device = self.window.device
        for name in self.trained:
            if name in first:
                given = first[name].to(device), second[name].to(device)
                own = self.optimizer.moments.setdefault(name, tuple(map(torch.zeros_like, given)))  # type: ignore[arg-type]
                for tensor, value in zip(own, given, strict=True):
                    tensor.copy_(value)
        self.optimizer.steps.fill_(state.step)
        self.figures = Figures(**asdict(state.figures))
        # A state whose current tensors are the picked ones holds them once.
        picked = now if state.figures.best_step == state.step else state.part("best")
        self.best = {name: tensor.clone() for name, tensor in picked.items()}
        for name in ("window", "recent"):
            sums = [getattr(state.figures, f"{name}_{figure}") for figure in ("loss", "accuracy")]
            getattr(self, name).copy_(torch.tensor(sums, dtype=torch.float64))
