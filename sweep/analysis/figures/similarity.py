"""Representations and heads: how alike layers are, and what the heads of attention come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sweep.analysis.figures.style import LOOKS, TICKS, Chart, clipped, legend, panels

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ARMS = 6
"""Arms of one figure, at most."""

KINDS: dict[str, dict[str, Any]] = {
    "global average": {"color": "#0072B2", "marker": "o"},
    "metastable": {"color": "#D55E00", "marker": "s"},
    "one pattern": {"color": "#009E73", "marker": "^"},
}
"""Kind of fixed point -> how its heads are drawn."""


def within(rows: pd.DataFrame) -> Chart:
    """Draw how alike the layers of each arm are: before training, after it, and the one against
    the other; means over seeds.

    Args:
        rows: Of one task, with the columns of `sweep.analysis.representations.COLUMNS`.
    """
    arms = list(dict.fromkeys(rows["arm"]))
    spots = [
        _Panel(f"{arm} {name}".strip(), _mean(rows, arm, arm, when, other), y, x)
        for arm in arms[:ARMS]
        for name, when, other, y, x in (
            ("before", "before", "before", "layer", "layer"),
            ("after", "after", "after", "layer", "layer"),
            ("trained", "before", "after", "layer, before", "layer, after"),
        )
    ]
    figure = _heat(spots)
    notes = ["debiased linear CKA of what each layer reads; the last is the backbone's output"]
    if len(arms) > ARMS:
        notes.append(f"the first {ARMS} of {len(arms)} arms")
    task = rows["task"].iloc[0]
    return Chart(
        f"Layers of each arm: {task}",
        f"Similarity of layers within {len(arms)} arms on {task}, before and after training.",
        tuple(notes),
        figure,
    )


def between(rows: pd.DataFrame) -> Chart | None:
    """Draw how alike the arms' layers are after training, a panel for each pair; None: one arm.

    Args:
        rows: As for `within`.
    """
    pairs = [
        (one, other)
        for one, other in dict.fromkeys(zip(rows["arm"], rows["other_arm"], strict=True))
        if one != other
    ]
    if not pairs:
        return None
    shown = pairs[: 2 * ARMS]
    spots = [
        _Panel(f"{one} and {other}", _mean(rows, one, other, "after", "after"), one, other)
        for one, other in shown
    ]
    notes = ["debiased linear CKA after training; means over seeds, which arms share in pairs"]
    if len(pairs) > len(shown):
        notes.append(f"the first {len(shown)} of {len(pairs)} pairs")
    task = rows["task"].iloc[0]
    return Chart(
        f"Arms beside one another: {task}",
        f"Similarity of layers between {len(pairs)} pairs of arms on {task}, after training.",
        tuple(notes),
        _heat(spots),
    )


def heads(rows: pd.DataFrame) -> Chart:
    """Draw the share of tokens that hold 90 % of each head's attention, by layer, a trial a panel.

    Args:
        rows: label, layer, head, share, kind of each head.
    """
    import matplotlib as mpl

    arms = list(dict.fromkeys(rows["label"]))
    shown = arms[: 2 * ARMS]
    handles = {}
    with mpl.rc_context(LOOKS):
        figure, every_axes = panels(shown)
        for axes, arm in zip(every_axes, shown, strict=True):
            own = rows[rows["label"] == arm]
            for kind, style in KINDS.items():
                part = own[own["kind"] == kind]
                if len(part):
                    # Heads of one layer stand beside one another.
                    place = part["layer"] + 1 + (part["head"] - own["head"].mean()) * 0.08
                    (handles[kind],) = axes.plot(place, part["share"], linestyle="none", **style)
            axes.axhline(0.5, color="black", linewidth=0.6, linestyle=":")
            axes.set_xticks(sorted(set(own["layer"] + 1)))
            axes.set_xlabel("layer")
            axes.set_ylim(-0.03, 1.05)
        every_axes[0].set_ylabel("share of tokens")
        order = [kind for kind in KINDS if kind in handles]
        legend(figure, order, [handles[kind] for kind in order])
    notes = ["a mark is a head: the median over queries, of the tokens that a query sees"]
    if len(arms) > len(shown):
        notes.append(f"the first {len(shown)} of {len(arms)} trials")
    return Chart(
        "Fixed points of attention",
        f"Tokens that hold 90 % of each head's attention, by layer, of {len(arms)} trials.",
        tuple(notes),
        figure,
    )


def _mean(rows: pd.DataFrame, arm: str, other_arm: str, when: str, other: str) -> np.ndarray:
    own = rows[
        (rows["arm"] == arm)
        & (rows["other_arm"] == other_arm)
        & (rows["when"] == when)
        & (rows["other_when"] == other)
    ]
    found: np.ndarray = own.pivot_table(
        index="layer", columns="other_layer", values="cka"
    ).to_numpy()
    return found


@dataclass(frozen=True)
class _Panel:
    title: str
    drawn: np.ndarray
    y: str
    x: str


def _heat(spots: Sequence[_Panel]) -> Figure:
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    with mpl.rc_context(LOOKS):
        figure, every_axes = panels([clipped(one.title, 32) for one in spots], share=False)
        norm = Normalize(0, 1)
        for axes, one in zip(every_axes, spots, strict=True):
            axes.grid(visible=False)
            axes.imshow(one.drawn, norm=norm, cmap="viridis", origin="lower", aspect="auto")
            axes.set_xlabel(clipped(one.x, 32))
            axes.set_ylabel(clipped(one.y, 24))
            for axis, size in ((axes.yaxis, len(one.drawn)), (axes.xaxis, one.drawn.shape[1])):
                axis.set_ticks(range(0, size, max(1, size // TICKS)))
        bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=every_axes, aspect=30)
        bar.set_label("CKA")
    return figure
