"""Whether an attempt is alive: its heartbeats, and what they mean by the driver's own clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sweep.sweepfile.schema import LimitsSpec

if TYPE_CHECKING:
    from ray.actor import ActorHandle

PREPARE_SECONDS = 3600.0
"""What an attempt may take before its first step, where nothing else is said: imports, data,
weights that are fetched, an evaluation's examples that are made."""

STEP_SECONDS = 600.0
"""What a step may take at least, where nothing else is said."""

SLOWEST = 50
"""Times the slowest step so far that a step may take, where that is more."""

SILENCE = (30.0, 300.0)
"""Seconds without a word after which a worker counts as hung: at least, and where nothing is said.
A library that is being loaded may keep a process's threads from running."""

MISSED = 3
"""Heartbeats that may be late or lost before anything is made of it."""


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life of an attempt."""

    attempt: str
    number: int
    """Counts the heartbeats of the attempt: those that wait for the reporting actor to start reach
    it in any order."""
    node: str
    """Ray's id of the node."""
    phase: str
    beats: int
    """Rises with each step, see `sweep.execution.job.Reporter`."""
    steps: Mapping[str, int]
    """Trial id -> the last step that was recorded."""
    unsaved: Mapping[str, float]
    """Trial id -> seconds of training that no saved state holds."""
    where: str | None = None
    """The line of code that it has been at for a while."""
    actor: ActorHandle[Any] | None = None
    """The worker, in the first heartbeat and in some of the later ones."""


@dataclass
class AttemptHealth:
    """What the driver has heard of an attempt, and when by its own clock."""

    beat: Heartbeat
    at: float
    """When the last word came."""
    moved: float
    """When the last step was made, or the phase changed."""
    slowest: float = 0.0
    """Seconds of the slowest step so far."""
    actor: ActorHandle[Any] | None = None

    @classmethod
    def first(cls, beat: Heartbeat, now: float) -> AttemptHealth:
        """Begin with the first heartbeat."""
        return cls(beat, now, now, actor=beat.actor)

    def take(self, beat: Heartbeat, now: float) -> None:
        """Take in another heartbeat; one that was overtaken is late news."""
        self.actor = self.actor or beat.actor
        if beat.number < self.beat.number:
            return
        made = beat.beats - self.beat.beats
        if beat.phase != self.beat.phase or made:
            if beat.phase == self.beat.phase == "training" and made > 0:
                self.slowest = max(self.slowest, (now - self.moved) / made)
            self.moved = now
        self.beat, self.at = beat, now

    def wait(self, seconds: float) -> None:
        """Leave out a time in which the driver itself did not listen."""
        self.at += seconds
        self.moved += seconds

    def hung(self, limits: LimitsSpec, now: float, interval: float = 1.0) -> str | None:
        """Return why it counts as hung; None: it does not.

        Args:
            limits: Of the sweep file.
            now: By the driver's clock.
            interval: Seconds between two heartbeats.
        """
        own = limits.hang_seconds
        silence = max(SILENCE[0], own or SILENCE[1], MISSED * interval)
        if now - self.at > silence:
            return f"its worker said nothing for {now - self.at:.0f} s"
        least = {
            "preparing": PREPARE_SECONDS,
            "writing": limits.storage_seconds + (own or STEP_SECONDS),
        }
        allowed = least.get(self.beat.phase, own or max(STEP_SECONDS, SLOWEST * self.slowest))
        # A step is heard of with the next heartbeat, and not before.
        if now - self.moved <= max(allowed, own or 0.0) + MISSED * interval:
            return None
        where = f", at {self.beat.where}" if self.beat.where else ""
        return f"no step for {now - self.moved:.0f} s while {self.beat.phase}{where}"
