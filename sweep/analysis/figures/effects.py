"""The effects of a sweep's claims: differences with their intervals, and the verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sweep.analysis.figures.arms import Material
from sweep.analysis.figures.style import Chart, UndrawableError, clipped, legend, panels
from sweep.sweepfile.metrics import is_accuracy

if TYPE_CHECKING:
    from sweep.analysis.claims import Contrast

SHOWN = 40
"""Contrasts of a figure, at most."""

VERDICTS: dict[str, dict[str, Any]] = {
    "supported": {"color": "#0072B2", "marker": "o", "mfc": "#0072B2"},
    "contradicted": {"color": "#D55E00", "marker": "s", "mfc": "#D55E00"},
    "undecided": {"color": "#555555", "marker": "D", "mfc": "white"},
    "untested": {"color": "#555555", "marker": "x", "mfc": "white"},
}
"""Verdict -> how its effect is drawn."""


def effects(material: Material) -> Chart:
    """Return a forest plot of the claims: a panel for each metric, a line for each contrast.

    Raises:
        UndrawableError: If the sweep file makes no claim, or none has two pairs yet.
    """
    if not material.sweep.spec.claims:
        raise UndrawableError("the sweep file makes no claims; add some under `claims:`")
    contrasts = [one for one in material.judged.contrasts if one.difference is not None]
    if not contrasts:
        raise UndrawableError("no claim has a pair of trials that are done yet")
    shown = contrasts[:SHOWN]
    metrics = list(dict.fromkeys(one.metric for one in shown))
    most = max(sum(one.metric == metric for one in shown) for metric in metrics)
    titles = [metric.replace("_", " ") for metric in metrics]
    figure, every_axes = panels(titles, height=0.5 + 0.22 * most, across=1, share=False)
    handles = {}
    for axes, metric in zip(every_axes, metrics, strict=True):
        own = [one for one in shown if one.metric == metric]
        for at, one in enumerate(own):
            assert one.difference is not None
            style = VERDICTS[one.verdict]
            if one.low_family is not None and one.high_family is not None:
                axes.plot(
                    [one.low_family, one.high_family], [at, at], color=style["color"], linewidth=1.4
                )
            (handles[one.verdict],) = axes.plot(
                one.difference, at, linestyle="none", markersize=5, **style
            )
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(own)), [clipped(named(one), 60) for one in own])
        axes.set_ylim(len(own) - 0.4, -0.6)
        own_unit = f", {own[0].unit}" if own[0].unit else ""
        unit = ", percentage points" if is_accuracy(metric) else own_unit
        axes.set_xlabel(f"difference, left minus right{unit}")
    order = [verdict for verdict in VERDICTS if verdict in handles]
    legend(figure, order, [handles[verdict] for verdict in order])
    open_ = any(one.provisional for one in shown)
    notes = [
        "mean differences with their t intervals at the level of the family, verdicts after Holm"
    ]
    if open_:
        notes.append("some are provisional: not all of their pairs have ended")
    if len(contrasts) > len(shown):
        notes.append(f"{len(contrasts) - len(shown):,} of {len(contrasts):,} are left out")
    return Chart("Effects of the claims", _words(shown), tuple(notes), figure)


def named(contrast: Contrast) -> str:
    """Return a claim with its place."""
    return ": ".join(filter(None, (" / ".join(contrast.place.values()), contrast.claim)))


def _words(contrasts: Sequence[Contrast]) -> str:
    told = [
        f"{named(one)}: {one.difference:+.3g}, {one.verdict}{' (provisional)' * one.provisional}"
        for one in contrasts
    ]
    return f"Differences with intervals. {'; '.join(told)}."
