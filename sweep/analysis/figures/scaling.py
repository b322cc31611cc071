"""Figures of a measure against a number: learning rate, depth, size, what trains.

The cells of one line differ in that number and in nothing else (but for the seeds, which the
intervals are over), so that a line is an experiment of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fpt.config import TrialConfig
from sweep.analysis.cells import words
from sweep.analysis.figures.arms import PANELS, Arm, Material
from sweep.analysis.figures.style import (
    SERIES,
    Chart,
    UndrawableError,
    legend,
    look,
    number_axis,
    panels,
)

TOLD = 12
"""Lines whose best values stand in a figure's description, at most."""

X = Callable[[Arm], float | None]
"""The number of an arm; None while it is not known."""


@dataclass(frozen=True)
class _Line:
    panel: str
    series: str
    arms: tuple[tuple[float, Arm], ...]
    """By the number."""


def learning_rate(material: Material) -> Chart:
    """The measure against learning rate, on the split by which one would choose it.

    Raises:
        UndrawableError: If no two cells differ in the learning rate alone.
    """
    lines = _lines(material, lambda arm: arm.config.learning_rate, "learning_rate")
    metric, validation, _ = material.measure.columns
    if any(material.values(arm, validation) for _, arm in _arms(lines)):
        metric = validation
    return _lined(material, lines, "learning rate", metric)


def depth(material: Material) -> Chart:
    """The measure on the test split against the number of layers.

    Raises:
        UndrawableError: If no two cells differ in the number of layers alone.
    """
    lines = _lines(material, lambda arm: arm.config.backbone.layers, "backbone.layers")
    return _lined(material, lines, "layers", material.measure.columns[0])


def size(material: Material) -> Chart:
    """The measure on the test split against the parameters of backbones of several widths.

    Raises:
        UndrawableError: If no two cells differ in the size of the backbone alone.
    """
    if len({arm.config.backbone.width for arm in material.arms}) < 2:
        raise UndrawableError("all backbones are of one width")
    names = ("backbone.layers", "backbone.width", "backbone.heads")
    lines = _lines(material, lambda arm: _fact(material, arm, "parameters"), *names)
    return _lined(material, lines, "parameters", material.measure.columns[0])


def trained(material: Material) -> Chart:
    """The measure on the test split against the parameters that train; a point for each cell.

    Raises:
        UndrawableError: If all cells train the same number of parameters.
    """
    metric = material.measure.columns[0]
    found = [
        (count, arm)
        for arm in material.shown
        if (count := _fact(material, arm, "parameters_trained")) is not None
        and material.values(arm, metric)
    ]
    if not found:
        raise UndrawableError(f"no trial has a {words(metric)} yet")
    by_panel: dict[str, set[float]] = {}
    for count, arm in found:
        by_panel.setdefault(arm.panel, set()).add(count)
    if all(len(counts) < 2 for counts in by_panel.values()):
        raise UndrawableError("all cells of a panel train the same number of parameters")
    lines = [_Line(arm.panel, arm.series, ((count, arm),)) for count, arm in found]
    return _chart(material, lines, "trained parameters", metric, material.left_out)


def _fact(material: Material, arm: Arm, name: str) -> float | None:
    # What a trial's config fixes, and only a row tells.
    found = material.values(arm, name)
    return found[0] if found else None


def _arms(lines: Sequence[_Line]) -> list[tuple[float, Arm]]:
    return [one for line in lines for one in line.arms]


def _lines(material: Material, number: X, *fields: str) -> list[_Line]:
    # The cells that differ in these fields alone, where there are two or more numbers.
    groups: dict[object, dict[float, Arm]] = {}
    for arm in material.arms:
        if (at := number(arm)) is not None:
            groups.setdefault(_rest(arm.config, fields), {}).setdefault(at, arm)
    lines = []
    for own in groups.values():
        if len(own) > 1:
            arms = tuple(sorted(own.items(), key=lambda item: item[0]))
            panel = _common([arm.panel for arm in own.values()])
            series = _common([arm.series for arm in own.values()])
            lines.append(_Line(panel, series or material.sweep.name, arms))
    # Where that leaves two of one name, each is named after its ends.
    named = Counter((line.panel, line.series) for line in lines)
    twice = {series for (_, series), count in named.items() if count > 1}
    return [
        replace(line, series=f"{line.arms[0][1].series} to {line.arms[-1][1].series}")
        if line.series in twice
        else line
        for line in lines
    ]


def _rest(config: TrialConfig, fields: Collection[str]) -> object:
    # All of a config that has to be the same along a line, but for the seeds.
    out: list[Any] = []
    for name in TrialConfig.model_fields:
        value = getattr(config, name)
        inner = [field.partition(".")[2] for field in fields if field.startswith(f"{name}.")]
        if inner:
            value = tuple(
                (n, getattr(value, n)) for n in type(value).model_fields if n not in inner
            )
        if name == "backbone_seed" and config.drawn_from is not None and value == config.seed:
            value = None
        if name not in ("seed", *fields):
            out.append(value)
    return repr(out)


def _common(labels: Sequence[str]) -> str:
    # What labels have in common: their parts, or else how they begin.
    parts = [label.split(" / ") for label in dict.fromkeys(labels)]
    if len({len(own) for own in parts}) == 1:
        shared = []
        for column in zip(*parts, strict=True):
            begin = column[0] if len(set(column)) == 1 else _begin(column)
            shared += [begin] if begin else []
        return " / ".join(shared)
    return _begin(labels)


def _begin(labels: Sequence[str]) -> str:
    # `frozen` of `frozen 1e-2` and `frozen 1e-3`; nothing of `0.01` and `0.001`.
    shared = []
    for parts in zip(*(label.split() for label in labels), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return " ".join(shared)


def _lined(material: Material, lines: Sequence[_Line], what: str, metric: str) -> Chart:
    if not lines:
        raise UndrawableError(f"no two cells differ in {what} alone")
    panels_ = list(dict.fromkeys(line.panel for line in lines))[:PANELS]
    series = list(dict.fromkeys(line.series for line in lines))[:SERIES]
    shown = [line for line in lines if line.panel in panels_ and line.series in series]
    shown = [line for line in shown if any(material.values(arm, metric) for _, arm in line.arms)]
    if not shown:
        raise UndrawableError(f"no trial has a {metric.replace('_', ' ')} yet")
    left = len(lines) - len(shown)
    notes = [f"{left:,} of {len(lines):,} lines are left out, or have no figure yet"] * bool(left)
    return _chart(material, shown, what, metric, notes)


def _chart(
    material: Material, lines: Sequence[_Line], what: str, metric: str, notes: Sequence[str]
) -> Chart:
    measure = material.measure
    titles = list(dict.fromkeys(line.panel for line in lines))
    series = list(dict.fromkeys(line.series for line in lines))
    figure, every_axes = panels(titles, share=False)
    handles: dict[str, Any] = {}
    told = []
    for line in lines:
        axes = every_axes[titles.index(line.panel)]
        found = [
            (at, interval)
            for at, arm in line.arms
            if (interval := material.interval(arm, metric)) is not None
        ]
        numbers, means = [at for at, _ in found], [interval.mean for _, interval in found]
        half = [interval.half_width or 0.0 for _, interval in found]
        least, most = measure.bounds  # There is no accuracy below 0 or above 100 %.
        bars = (
            [min(h, m - least) for h, m in zip(half, means, strict=True)],
            [min(h, most - m) for h, m in zip(half, means, strict=True)],
        )
        style = look(series.index(line.series))
        if len(line.arms) == 1:
            style["linestyle"] = "none"
        handles[line.series] = axes.errorbar(
            numbers, means, yerr=bars, capsize=2, elinewidth=0.8, **style
        )
        best, at = (max if measure.higher else min)(zip(means, numbers, strict=True))
        told.append(f"{_named(line)} {measure.told(best)} at {at:g}")
    numbers = [at for at, _ in _arms(lines)]
    for axes, title in zip(every_axes, titles, strict=True):
        if (baseline := material.baseline(title)) is not None:
            handles["trivial baseline"] = axes.axhline(
                baseline, color="#555555", linewidth=0.9, linestyle=(0, (1, 2)), zorder=1
            )
        number_axis(axes, what, numbers)
    said = words(metric)
    figure.supylabel(measure.axis(said), fontsize=8)
    legend(figure, list(handles), list(handles.values()))
    which = "Highest" if measure.higher else "Lowest"
    scaled = " in per cent" if measure.scale == 100 else ""
    alt = f"{said}{scaled} against {what}, {len(titles)} panels. {which}: " + "; ".join(
        [*told[:TOLD], *["…"] * (len(told) > TOLD)]
    )
    kept = (f"{said}: mean over seeds with a 95 % t interval", *notes)
    named = words(measure.name)
    title = f"{named[0].upper()}{named[1:]} against {what}"
    return Chart(title, f"{alt}.", kept, figure)


def _named(line: _Line) -> str:
    return " / ".join(filter(None, (line.panel, line.series)))
