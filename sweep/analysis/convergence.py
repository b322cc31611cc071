"""When a trial had converged: the step from which its accuracy stayed where it was to end.

The curve is the accuracy at each evaluation. It is smoothed by a moving average over `smoothing`
evaluations: those around each one, and at both ends the outermost. Its plateau is the mean of the
last `smoothing` evaluations, which is the last smoothed value. A trial converged at the first
evaluated step from which on every smoothed value lies within `tolerance` of the plateau, above or
below, if from there to the end there are at least twice `smoothing` evaluations. If there are fewer
(the curve still rises, or falls, or jumps about by more than the tolerance), or if the curve has
fewer in all, it did not converge in the steps that it had.

Why so. A centred average tells a rise half a window late at most, a trailing one a whole window.
The mean of the last values is as likely too high as too low, whatever the length of the curve; the
highest smoothed value is too high by more the longer one looks, and would call a trial late that
merely had one lucky evaluation at the end. The plateau's own evaluations lie near it by
construction, hence the second window, which is independent of them. A larger tolerance never gives
a later step, nor makes a trial that had converged one that had not.

A step is known no better than to the interval between evaluations, and a tolerance below the noise
of a smoothed value (for an accuracy over N examples about 0.5 / sqrt(N smoothing)) finds no
plateau. Under the protocol paper, which has no validation split, the curve is that of its random
test batches, 100 examples each time by default: there the noise is two points, not a tenth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fpt.tasks.base import ProtocolName

ROUNDING = 1e-9
"""What a difference may be beyond the tolerance: accuracies are rounded, and often equal it."""


@dataclass(frozen=True)
class Convergence:
    """When a trial had converged."""

    step: int | None
    """The step; None: not in the steps that it had."""
    reason: str = ""
    """Why there is none, in a few words that can be counted over trials."""


def judged_split(protocol: ProtocolName) -> str:
    """Return the split whose accuracy is a trial's curve: the protocol paper has no validation
    split.
    """
    return "test" if protocol == "paper" else "validation"


def convergence(
    steps: Sequence[int], accuracies: Sequence[float], *, tolerance: float, smoothing: int
) -> Convergence:
    """When a trial had converged; the module's docstring defines it.

    Args:
        steps: The evaluated steps, rising.
        accuracies: The accuracy at each of them, a fraction.
        tolerance: How far from its plateau a smoothed value may lie, as a fraction.
        smoothing: Evaluations in a window, at least 1.
    """
    least = 2 * smoothing
    if len(steps) < least:
        return Convergence(None, f"with fewer than {least} evaluations")
    values = np.asarray(accuracies, dtype=np.float64)
    means = np.lib.stride_tricks.sliding_window_view(values, smoothing).mean(axis=-1)
    first = np.arange(len(values)) - (smoothing - 1) // 2  # of the window around each evaluation
    smoothed = means[first.clip(0, len(means) - 1)]
    away = np.flatnonzero(np.abs(smoothed - smoothed[-1]) > tolerance + ROUNDING)
    stays = int(away[-1]) + 1 if len(away) else 0
    if len(values) - stays < least:
        return Convergence(None, f"not converged in {steps[-1]:,} steps")
    return Convergence(int(steps[stays]))
