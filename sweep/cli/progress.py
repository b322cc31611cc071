"""The live view of a run: an overall bar with time to go, and a line for each running trial.

Where the output is no terminal the same events become plain lines: one for each trial that starts
or ends, and now and then one that says how far a running trial is. The view only listens: what it
shows is never where a number is kept.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

if TYPE_CHECKING:
    from sweep.execution.scheduler import Event

RECORD_SECONDS = 10.0
"""Between two plain lines about running trials: a log is to be read, not to be scrolled."""


@dataclass
class Running:
    """What is known of a trial that is training."""

    label: str
    steps: int
    step: int = 0
    loss: float | None = None
    accuracy: float | None = None
    validation: float | None = None


class View:
    """Shows the events of one run; use as a context manager, and call it with each event."""

    def __init__(self, console: Console, steps: Mapping[str, int], *, quiet: bool = False) -> None:
        """Take a console, and the optimizer steps of each trial that is to run.

        With `quiet` only messages and failures are shown.
        """
        self.console = console
        self.steps = dict(steps)
        self.running: dict[str, Running] = {}
        self.ended = 0
        self.failed = 0
        self.waiting = "starting workers" if self.steps else ""
        self._ended_steps = 0
        # Steps that an earlier attempt had trained: progress, but no measure of this run's speed.
        self._resumed_steps = 0
        self._began = time.monotonic()
        self._last_line = float("-inf")
        self.quiet = quiet
        self._live = (
            Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=True)
            if console.is_terminal and not quiet
            else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            with suppress(OSError):
                self._live.stop()

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        if event.kind == "message":
            self._line(event.message or "", always=True)
        elif event.kind == "waiting":
            if event.message != self.waiting and self._live is None:
                self._line(f"waiting: {event.message}")
            self.waiting = event.message or ""
        elif event.trial_id is not None:
            self.waiting = ""
            self._trial(event, event.trial_id)

    def _trial(self, event: Event, trial_id: str) -> None:
        label = event.label or trial_id
        if event.kind == "trial_started":
            steps = event.steps or self.steps.get(trial_id, 0)
            self.running[trial_id] = Running(label, steps, step=event.step or 0)
            self._resumed_steps += event.step or 0
            if self._live is None:
                self._line(f"started {label}")
        elif event.kind == "record":
            self._record(event, trial_id, label)
        else:
            trial = self.running.pop(trial_id, None)
            self.ended += 1
            self._ended_steps += self.steps.get(trial_id, trial.steps if trial else 0)
            if event.kind == "trial_failed":
                self.failed += 1
                reason = event.message or "no reason given"
                self._line(f"{self._count()} failed  {label}: {reason}", always=True)
            else:
                figures = _figures(event.split, event.loss, event.accuracy)
                said = " ".join(x for x in (event.message, figures) if x)
                self._line(f"{self._count()} done    {label}  {said}".rstrip())

    def _record(self, event: Event, trial_id: str, label: str) -> None:
        steps = event.steps or self.steps.get(trial_id, 0)
        trial = self.running.setdefault(trial_id, Running(label, steps))
        if event.step is not None:
            trial.step = max(trial.step, event.step)
        if event.split == "train":
            trial.loss, trial.accuracy = event.loss, event.accuracy
        else:
            trial.validation = event.accuracy
        now = time.monotonic()
        if self._live is None and now - self._last_line >= RECORD_SECONDS:
            figures = _figures(event.split, event.loss, event.accuracy)
            self._line(f"{self._count()} step {trial.step}/{trial.steps}  {label}  {figures}")

    def _line(self, text: str, *, always: bool = False) -> None:
        if self.quiet and not always:
            return
        self._last_line = time.monotonic()
        with suppress(OSError):  # a terminal that was closed costs no trial
            self.console.print(escape(text), highlight=False, soft_wrap=True)

    def _count(self) -> str:
        return f"[{self.ended}/{len(self.steps)}]"

    def seconds_to_go(self) -> float | None:
        """Seconds to the end at this run's speed so far, in steps; None before it can be told."""
        trained = self._ended_steps + sum(trial.step for trial in self.running.values())
        here = trained - self._resumed_steps
        if here <= 0:
            return None
        return (time.monotonic() - self._began) / here * max(sum(self.steps.values()) - trained, 0)

    def render(self) -> RenderableType:
        """Draw the view."""
        total = sum(self.steps.values())
        trained = self._ended_steps + sum(trial.step for trial in self.running.values())
        to_go = self.seconds_to_go()
        head = Table.grid(padding=(0, 1))
        head.add_row(
            ProgressBar(total=max(total, 1), completed=trained, width=40),
            f"{self.ended}/{len(self.steps)} trials",
            f"[red]{self.failed} failed[/red]" if self.failed else "",
            f"{span(to_go)} to go" if to_go else "",
            "ending" if self.ended == len(self.steps) else escape(self.waiting),
        )
        body = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        body.add_column("trial")
        for name in ("step", "loss", "accuracy", "validation"):
            body.add_column(name, justify="right")
        for trial in self.running.values():
            body.add_row(
                escape(trial.label),
                f"{trial.step}/{trial.steps}",
                _figure(trial.loss),
                _figure(trial.accuracy),
                _figure(trial.validation),
            )
        return Group(head, body) if self.running else head


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _figures(split: str | None, loss: float | None, accuracy: float | None) -> str:
    if loss is None and accuracy is None:
        return ""
    right = "" if accuracy is None else f" accuracy {_figure(accuracy)}"
    return f"{split or ''} loss {_figure(loss)}{right}".strip()


def span(seconds: float) -> str:
    """Return a span of time for people: 42 s, 3 min 10 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
