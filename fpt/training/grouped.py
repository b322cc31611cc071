"""The update of all members at once: a number of operations that does not grow with the pack.

What Adam keeps of a member is a row of a few tensors, (K, N): of its parameters, of their moments.
The members' own tensors are parts of these rows, and none of them changes its address.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fpt.device_draws import sent
from fpt.model import Model
from fpt.training.member import Member


def can_group(model: Model) -> bool:
    """Return whether a model's parameters may be parts of a larger tensor: cuDNN wants those of a
    recurrent layer in a piece of their own.
    """
    return not any(
        isinstance(module, nn.RNNBase) and any(p.requires_grad for p in module.parameters())
        for module in model.modules()
    )


class GroupedUpdate:
    """Clipping and Adam (arXiv 1412.6980) for all members of a pack."""

    def __init__(self, members: Sequence[Member], device: torch.device) -> None:
        """Move what the members train into rows of common tensors."""
        names = list(members[0].trained)
        sizes = [members[0].trained[name].numel() for name in names]
        count, total = len(members), sum(sizes)
        self._device = device
        self._values, self._first, self._second = torch.zeros(3, count, total, device=device)
        self._steps = torch.zeros(count, device=device)
        self._non_finite = torch.zeros(count, device=device)
        self._sums = torch.zeros(2, count, 2, dtype=torch.float64, device=device)
        self._rules = sent([self._rule_of(m) for m in members], device, torch.float64)
        self._chosen: tuple[list[int], Tensor, Tensor] = [], self._steps, self._steps
        self._none = torch.zeros(total, device=device)
        for row, member in enumerate(members):
            begin = 0
            for name, size in zip(names, sizes, strict=True):
                own = member.trained[name]
                values, first, second = (
                    kept[row, begin : begin + size].view(own.shape)
                    for kept in (self._values, self._first, self._second)
                )
                values.copy_(own.detach())
                own.data = values
                member.optimizer.moments[name] = first, second
                begin += size
            member.optimizer.steps = self._steps[row]
            member.non_finite = self._non_finite[row]
            member.window, member.recent = self._sums[0, row], self._sums[1, row]

    @torch.no_grad()
    def note(self, live: Sequence[Member], losses: Tensor, accuracies: Tensor) -> None:
        """Add to the sums of members what a part of their batches gave: (live,) each."""
        figures = torch.stack([losses.double(), accuracies.double()], -1)
        if len(live) == len(self._steps):
            self._sums += figures
        else:
            index, _ = self._of(live)
            self._sums.index_add_(1, index, figures.expand(2, -1, -1))

    def rates(self, live: Sequence[Member]) -> np.ndarray:
        """Return the rates of the step to come, (K,) float64; 0 of members that have left."""
        rates = np.zeros(len(self._steps))
        for member in live:
            rates[member.index] = member.rate()
        return rates

    @torch.no_grad()
    def step(self, live: Sequence[Member], losses: Tensor, rates: Tensor) -> None:
        """Clip and apply the gradients of members by their losses, (live,), without waiting.

        Args:
            live: Those that train.
            losses: (live,).
            rates: (K,) float64, as `rates` gives them, on the device.
        """
        here = {member.index: member for member in live}
        gradients = torch.cat(
            [part for row in range(len(self._steps)) for part in self._gradient(here.get(row))]
        ).view_as(self._values)
        index, left = self._of(live)
        if len(live) < len(self._steps):
            losses = torch.zeros_like(self._steps).index_copy_(0, index, losses)
        norms = torch.linalg.vector_norm(gradients, dim=1)
        bad = ~(torch.isfinite(losses) & torch.isfinite(norms))
        torch.maximum(self._non_finite, bad.float(), out=self._non_finite)
        skip = torch.maximum(self._non_finite, left)
        beta1, beta2, epsilon, clip = self._rules.unbind(1)
        gradients *= (clip / (norms + 1e-6)).clamp(max=1.0)[:, None].float()
        gradients.masked_fill_(skip[:, None] > 0, 0.0)
        goes = 1.0 - skip
        self._steps += goes
        done = self._steps.double().clamp(min=1.0)
        self._first.lerp_(gradients, ((1 - beta1) * goes).float()[:, None])
        kept = ((1 - beta2) * goes).float()[:, None]
        self._second.mul_(1 - kept).addcmul_(gradients * kept, gradients)
        size = rates / (1 - beta1**done) * goes
        scale = (1 - beta2**done).sqrt()
        spread = (self._second.sqrt() / scale.float()[:, None]).add_(epsilon.float()[:, None])
        self._values.addcdiv_(self._first * -size.float()[:, None], spread)

    def _gradient(self, member: Member | None) -> list[Tensor]:
        """Return a row of gradients in its parts, taken from the member; zeros of one that has
        left, or that a tensor did not get.
        """
        if member is None:
            return [self._none]
        parts = [
            self._none[: p.numel()] if p.grad is None else p.grad.reshape(-1)
            for p in member.trained.values()
        ]
        for parameter in member.trained.values():
            parameter.grad = None
        return parts

    def _of(self, live: Sequence[Member]) -> tuple[Tensor, Tensor]:
        """Return the numbers of these members, (live,), and (K,) 1.0 for all others: sent to the
        device when they change.
        """
        members = [member.index for member in live]
        if members != self._chosen[0] or not members:
            left = [float(k not in members) for k in range(len(self._steps))]
            self._chosen = members, sent(members, self._device), sent(left, self._device)
        return self._chosen[1:]

    @staticmethod
    def _rule_of(member: Member) -> list[float]:
        rule = member.trial.optimizer
        clip = float("inf") if rule.clip is None else rule.clip
        return [rule.beta1, rule.beta2, rule.epsilon, clip]
