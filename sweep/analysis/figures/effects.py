"""The effects of a sweep's claims: differences with their intervals, and the verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sweep.analysis.cells import words
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
    """Return a forest plot of the claims: a line for each contrast.

    Several claims that are asked of several places have a panel for each place; others one for
    each metric.

    Raises:
        UndrawableError: If the sweep file makes no claim, or none has two pairs yet.
    """
    if not material.sweep.spec.claims:
        raise UndrawableError("the sweep file makes no claims; add some under `claims:`")
    contrasts = [one for one in material.judged.contrasts if one.difference is not None]
    if not contrasts:
        raise UndrawableError("no claim has a pair of trials that are done yet")
    shown = contrasts[:SHOWN]
    claims, places = _unlike(one.claim for one in shown), _unlike(placed(one) for one in shown)
    # Several claims of several places are a panel a place, which all have the same lines.
    grid = min(len(claims), len(places)) > 1 and len(_unlike(one.metric for one in shown)) == 1
    title, line = (
        (placed, lambda one: one.claim) if grid else (lambda one: words(one.metric), named)
    )
    titles = _unlike(map(title, shown))
    lines = {one: _unlike(line(c) for c in shown if grid or title(c) == one) for one in titles}
    height = 0.5 + 0.22 * max(map(len, lines.values()))
    figure, every_axes = panels(titles, height=height, across=5 if grid else 1, share=grid)
    handles = {}
    for axes, panel in zip(every_axes, titles, strict=True):
        own = [one for one in shown if title(one) == panel]
        for one in own:
            assert one.difference is not None
            at, style = lines[panel].index(line(one)), VERDICTS[one.verdict]
            if one.low_family is not None and one.high_family is not None:
                axes.plot(
                    [one.low_family, one.high_family], [at, at], color=style["color"], linewidth=1.4
                )
            (handles[one.verdict],) = axes.plot(
                one.difference, at, linestyle="none", markersize=5, **style
            )
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(lines[panel])), [clipped(one, 60) for one in lines[panel]])
        axes.set_ylim(len(lines[panel]) - 0.4, -0.6)
        if grid:
            axes.set_title(clipped(panel, 40), loc="left", fontsize="medium")
        else:
            axes.set_xlabel(_measure(own[0]))
    if grid:
        figure.supxlabel(_measure(shown[0]), fontsize="medium")
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


def placed(contrast: Contrast) -> str:
    """Return the place of a claim."""
    return " / ".join(contrast.place.values())


def named(contrast: Contrast) -> str:
    """Return a claim with its place."""
    return ": ".join(filter(None, (placed(contrast), contrast.claim)))


def _measure(contrast: Contrast) -> str:
    unit = "percentage points" if is_accuracy(contrast.metric) else contrast.unit
    return f"difference, left minus right{f', {unit}' if unit else ''}"


def _unlike(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def _words(contrasts: Sequence[Contrast]) -> str:
    told = [
        f"{named(one)}: {one.difference:+.3g}, {one.verdict}{' (provisional)' * one.provisional}"
        for one in contrasts
    ]
    return f"Differences with intervals. {'; '.join(told)}."
