"""Figures along the steps of training: learning curves, and the steps to convergence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sweep.analysis.cells import words
from sweep.analysis.convergence import convergence as judged
from sweep.analysis.convergence import judged_split
from sweep.analysis.figures.arms import Arm, Material, Measure
from sweep.analysis.figures.style import Chart, UndrawableError, clipped, legend, look, panels
from sweep.analysis.stats import t_interval
from sweep.sweepfile.schema import ConvergenceSpec

FINE = 4
"""Evaluations from which on a curve of them is worth drawing."""

DRAWN = 80
"""Points of a curve that are drawn, at most."""

TOLD = 12
"""Series whose last values stand in a figure's description, at most."""


@dataclass(frozen=True)
class _Bundle:
    """The curves of an arm's trials."""

    arm: Arm
    steps: np.ndarray
    """(S,): every step that one of them has."""
    values: np.ndarray
    """(trials, S): in the unit of the measure; NaN where a trial has no value. Who has no curve is
    left out."""

    def band(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Steps, mean and half-width over the trials, at the steps that all of them have."""
        shared = np.flatnonzero(np.isfinite(self.values).all(axis=0))
        if len(shared) > DRAWN:
            shared = shared[np.linspace(0, len(shared) - 1, DRAWN).round().astype(int)]
        found = [t_interval(column.tolist()) for column in self.values[:, shared].T]
        mean = np.array([one.mean for one in found])
        half = None
        if len(self.values) > 1:
            half = np.array([one.half_width for one in found], dtype=float)
        return self.steps[shared], mean, half

    def tails(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each trial that went further than another: its steps and values from there on."""
        present = np.isfinite(self.values)
        shared = np.flatnonzero(present.all(axis=0))
        begin = shared[-1] if len(shared) else 0
        for own, here in zip(self.values, present, strict=True):
            at = np.flatnonzero(here)
            at = at[at >= begin]
            if len(at) > 1:
                if len(at) > DRAWN:
                    at = at[np.linspace(0, len(at) - 1, DRAWN).round().astype(int)]
                yield self.steps[at], own[at]


def _bundle(material: Material, arm: Arm, split: str) -> _Bundle:
    runs = [material.curves.of(point.trial_id, split) for point in arm.points]
    runs = [run for run in runs if len(run[0])]
    steps = np.unique(np.concatenate([run[0] for run in runs])) if runs else np.empty(0)
    values = np.full((len(runs), len(steps)), np.nan)
    for own, (at, accuracies) in zip(values, runs, strict=True):
        own[np.searchsorted(steps, at)] = material.measure.scale * accuracies
    return _Bundle(arm, steps, values)


def learning(material: Material) -> Chart:
    """The measure against steps: mean and band over seeds, a panel for each point of the columns.

    Raises:
        UndrawableError: If no trial has a curve.
    """
    bundles = [_bundle(material, arm, judged_split(arm.config.protocol)) for arm in material.shown]
    fine = [len(bundle.steps) for bundle in bundles if len(bundle.steps)]
    measure = material.measure
    training = not fine or float(np.median(fine)) < FINE
    # A metric of the task's own is measured in evaluations alone.
    training &= measure.name in ("accuracy", "loss")
    if training:  # Its records are many where evaluations are few.
        bundles = [_bundle(material, arm, "train") for arm in material.shown]
    bundles = [bundle for bundle in bundles if len(bundle.steps) > 1]
    if not bundles:
        raise UndrawableError("no trial has a curve of two or more records yet")

    titles = list(dict.fromkeys(bundle.arm.panel for bundle in bundles))
    series = list(dict.fromkeys(bundle.arm.series for bundle in bundles))
    figure, every_axes = panels(titles, share=False)
    handles = {}
    apart = False
    for bundle in bundles:
        axes = every_axes[titles.index(bundle.arm.panel)]
        style = look(series.index(bundle.arm.series))
        steps, mean, half = bundle.band()
        often = max(1, len(steps) // 6)
        (line,) = axes.plot(steps, mean, **style, markevery=(often // 2, often))
        handles[bundle.arm.series] = line
        if half is not None:
            low, high = (np.clip(end, *measure.bounds) for end in (mean - half, mean + half))
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.16, linewidth=0)
        for tail in bundle.tails():
            axes.plot(*tail, color=style["color"], linewidth=0.5, alpha=0.8)
            apart = True
    what = f"{'training' if training else _splits(bundles)} {words(measure.name)}"
    for axes, title in zip(every_axes, titles, strict=True):
        baseline = material.baseline(title)
        if baseline is not None:
            handles["trivial baseline"] = axes.axhline(
                baseline, color="#555555", linewidth=0.9, linestyle=(0, (1, 2)), zorder=1
            )
        axes.margins(x=0.02)
        axes.set_xlabel("step")
    figure.supylabel(measure.axis(what), fontsize=8)
    legend(figure, list(handles), list(handles.values()))
    notes = [f"{what}: mean over seeds; band: 95 % t interval at each step"]
    if training:
        dropped = any(bundle.arm.config.dropout for bundle in bundles)
        notes.append(
            "evaluations are too few to draw: a point is the mean over the steps since the one "
            "before it" + (", with dropout" if dropped else "")
        )
    if apart:
        notes.append("thin lines: trials that are further than others of their cell")
    return Chart(
        "Learning curves",
        f"{what}{' in per cent' if measure.scale == 100 else ''} against steps, {len(titles)} "
        f"panels. Last values: {_lasts(bundles, measure)}.",
        (*notes, *material.left_out),
        figure,
    )


def _splits(bundles: Sequence[_Bundle]) -> str:
    splits = dict.fromkeys(judged_split(bundle.arm.config.protocol) for bundle in bundles)
    return " or ".join(splits)


def _lasts(bundles: Sequence[_Bundle], measure: Measure) -> str:
    told = []
    for bundle in bundles[:TOLD]:
        mean = bundle.band()[1]
        if len(mean):
            told.append(f"{bundle.arm.name} {measure.told(mean[-1])}")
    return "; ".join([*told, *["…"] * (len(bundles) > TOLD)])


def _points(rule: ConvergenceSpec) -> str:
    number = 100 * rule.tolerance
    return f"{number:g} point{'s' * (number != 1)}"


@dataclass(frozen=True)
class _Times:
    """When an arm's trials had converged."""

    arm: Arm
    steps: tuple[int, ...]
    """Of those that had."""
    ended: int
    """Trials that are done."""


def convergence(material: Material) -> Chart:
    """Steps to convergence, by the rule of the sweep's table: mean, interval and each trial.

    Raises:
        UndrawableError: If no trial that is done had converged.
    """
    if material.measure.name != "accuracy":
        raise UndrawableError(
            "convergence is judged by accuracy, and these figures show another metric"
        )
    table = material.sweep.table
    rule = ConvergenceSpec() if table is None else table.convergence
    found = [_times(material, arm, rule) for arm in material.shown]
    found = [times for times in found if times.ended]
    if not found:
        raise UndrawableError("no trial is done yet")
    if not any(times.steps for times in found):
        raise UndrawableError(
            f"no trial had converged: within {_points(rule)} of its plateau, for "
            f"at least {2 * rule.smoothing} evaluations; `evaluation.every` may be too large for "
            "that"
        )
    titles = list(dict.fromkeys(times.arm.panel for times in found))
    series = list(dict.fromkeys(times.arm.series for times in found))
    figure, every_axes = panels(titles, height=0.4 + 0.24 * len(series))
    missed = False
    for times in found:
        axes = every_axes[titles.index(times.arm.panel)]
        at = series.index(times.arm.series)
        style = look(at) | {"linestyle": "none"}
        if times.steps:
            interval = t_interval(times.steps)
            axes.plot(times.steps, [at] * len(times.steps), "|", color="#888888", markersize=7)
            axes.errorbar(interval.mean, at, xerr=interval.half_width, capsize=2, **style)
        if len(times.steps) < times.ended:
            missed = True
            text = f"{len(times.steps)}/{times.ended}"
            place = ("axes fraction", "data")
            axes.annotate(text, (1, at), xycoords=place, ha="right", va="bottom", fontsize=6.5)
    for axes, title in zip(every_axes, titles, strict=True):
        axes.set_yticks(range(len(series)), [clipped(name, 30) for name in series])
        axes.set_ylim(len(series) - 0.4, -0.6)
        axes.set_xlim(0, max(one.arm.config.steps for one in found if one.arm.panel == title))
        axes.set_xlabel("steps to convergence")
    definition = (
        f"first evaluated step from which the accuracy, averaged over {rule.smoothing} evaluations,"
        f" stays within {_points(rule)} of its plateau; mean over seeds with a 95 % t interval, and"
        " a tick for each trial"
    )
    notes = [definition]
    if missed:
        notes.append("k/n: only k of the n trials that are done had converged")
    told = [
        f"{times.arm.name} {t_interval(times.steps).mean:,.0f}" for times in found if times.steps
    ]
    alt = f"Steps to convergence, {len(titles)} panels. Means: {'; '.join(told[:TOLD])}."
    return Chart("Steps to convergence", alt, (*notes, *material.left_out), figure)


def _times(material: Material, arm: Arm, rule: ConvergenceSpec) -> _Times:
    steps = []
    ended = 0
    for point in arm.points:
        if material.rows.get(point.trial_id, {}).get("outcome") != "done":
            continue
        ended += 1
        at, accuracies = material.curves.of(point.trial_id, judged_split(point.config.protocol))
        when = judged(
            at.tolist(), accuracies.tolist(), tolerance=rule.tolerance, smoothing=rule.smoothing
        )
        if when.step is not None:
            steps.append(when.step)
    return _Times(arm, tuple(steps), ended)
