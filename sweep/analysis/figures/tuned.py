"""The learning rates that `tune:` tried, and the ones that it chose."""

from __future__ import annotations

from statistics import fmean

from sweep.analysis.figures.arms import PANELS, Material
from sweep.analysis.figures.style import (
    SERIES,
    Chart,
    UndrawableError,
    legend,
    look,
    number_axis,
    panels,
)
from sweep.planning.tuning import Record, curves, states
from sweep.sweepfile.metrics import is_accuracy
from sweep.sweepfile.tuning_spec import ADAPTIVE

TOLD = 12
"""Cells whose rates stand in the figure's description, at most."""


def tuning(material: Material) -> Chart:
    """Return what each cell was tuned by, against the learning rate; the chosen rates are ringed.

    Raises:
        UndrawableError: If the sweep is not tuned, or nothing of it has ended.
    """
    if material.sweep.spec.tune is None:
        raise UndrawableError("the sweep file tunes nothing; `tune:` would, cell by cell")
    cells: dict[tuple[str, str], list[Record]] = {}
    for record in curves(material.sweep, material.ledger):
        # Where a seed diverged, the mean of the others is not what the rate was judged by.
        rated = record.rate is not None
        if rated and record.value is not None and record.state != "diverged":
            cells.setdefault(material.place(record.labels), []).append(record)
    if not cells:
        raise UndrawableError("no trial by which a learning rate is chosen has a figure yet")
    titles = list(dict.fromkeys(panel for panel, _ in cells))[:PANELS]
    series = list(dict.fromkeys(name for _, name in cells))[:SERIES]
    figure, every_axes = panels(titles, share=False)
    metric = material.sweep.spec.tune.by
    scale = 100 if is_accuracy(metric) else 1
    handles = {}
    told = []
    for (panel, name), records in cells.items():
        if panel not in titles or name not in series:
            continue
        axes = every_axes[titles.index(panel)]
        values: dict[float, list[float]] = {}
        for record in records:
            assert record.value is not None
            assert record.rate is not None
            values.setdefault(record.rate, []).append(scale * record.value)
        rates = sorted(values)
        means = [fmean(values[rate]) for rate in rates]
        style = look(series.index(name))
        (handles[name],) = axes.plot(rates, means, **style)
        for rate in {record.rate for record in records if record.chosen and record.rate}:
            (handles["chosen"],) = axes.plot(
                rate, fmean(values[rate]), "o", markersize=9, mfc="none", mec="black", mew=0.9
            )
            told.append(f"{' / '.join(filter(None, (panel, name)))} {rate:g}")
    words = metric.replace("_", " ")
    for axes in every_axes:
        number_axis(
            axes,
            "learning rate",
            [record.rate for own in cells.values() for record in own if record.rate],
        )
    figure.supylabel(f"{words}, %" if scale == 100 else words, fontsize=8)
    # The ring last, after all that are ringed.
    names = sorted(handles, key=lambda name: name == "chosen")
    legend(figure, names, [handles[name] for name in names])
    left = sum(panel not in titles or name not in series for panel, name in cells)
    notes = [f"{words} by which the learning rate of each cell is chosen, mean over its seeds"]
    shown = [record for own in cells.values() for record in own]
    if any(record.state == "pruned" for record in shown):
        notes.append("a rate that was given up early is shown with its figure of then")
    notes += [f"{left:,} of {len(cells):,} cells are left out"] * bool(left)
    chosen = "; ".join([*told[:TOLD], *["…"] * (len(told) > TOLD)]) or "none yet"
    alt = f"{words} against learning rate, {len(titles)} panels. Chosen: {chosen}."
    return Chart("Tuning of the learning rate", alt, tuple(notes), figure)


def budget(material: Material) -> Chart:
    """Draw the expected best of so many of each cell's points.

    It shows whether another budget would have turned a comparison of arms round.

    Raises:
        UndrawableError: If the sweep is not tuned, or no cell has two points with a figure.
    """
    tune = material.sweep.spec.tune
    if tune is None:
        raise UndrawableError("the sweep file tunes nothing, so that there is no budget to vary")
    found: dict[tuple[str, str], list[list[float]]] = {}
    for state in states(material.sweep, material.ledger):
        found.setdefault(material.place(state.study.labels), []).append(state.expected_best())
    # Of several choices of a cell, the mean.
    means = {at: [fmean(of) for of in zip(*each, strict=False)] for at, each in found.items()}
    cells = {at: best for at, best in means.items() if len(best) > 1}
    if not cells:
        raise UndrawableError("no cell has two points with a figure yet")
    from matplotlib.ticker import MaxNLocator

    titles = list(dict.fromkeys(panel for panel, _ in cells))[:PANELS]
    series = list(dict.fromkeys(name for _, name in cells))[:SERIES]
    figure, every_axes = panels(titles, share=False)
    scale = 100 if is_accuracy(tune.by) else 1
    handles = {}
    told = []
    for (panel, name), best in cells.items():
        if panel not in titles or name not in series:
            continue
        axes = every_axes[titles.index(panel)]
        drawn = range(1, len(best) + 1)
        style = look(series.index(name))
        (handles[name],) = axes.plot(drawn, [scale * one for one in best], **style)
        ends = f"{scale * best[0]:.3g} of 1, {scale * best[-1]:.3g} of {len(best)}"
        told.append(f"{' / '.join(filter(None, (panel, name)))} {ends}")
    words = tune.by.replace("_", " ")
    for axes in every_axes:
        axes.set_xlabel("points tried")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supylabel(f"expected best {words}, %" if scale == 100 else words, fontsize=8)
    legend(figure, list(handles), list(handles.values()))
    notes = [f"expected best {words} of so many of each cell's points, drawn in any order"]
    if tune.sampler in ADAPTIVE:
        notes.append(
            f"points of sampler {tune.sampler} are no independent draws: a description, no estimate"
        )
    if tune.replicates > 1:
        notes.append(f"mean over the {tune.replicates} choices of each cell")
    left = sum(panel not in titles or name not in series for panel, name in cells)
    notes += [f"{left:,} of {len(cells):,} cells are left out"] * bool(left)
    described = "; ".join([*told[:TOLD], *["…"] * (len(told) > TOLD)])
    alt = f"Expected best {words} against points tried, {len(titles)} panels. {described}."
    return Chart("Tuning by budget", alt, tuple(notes), figure)
