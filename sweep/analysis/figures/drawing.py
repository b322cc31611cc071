"""Which figures a sweep has: each kind drawn, or the reason why it cannot be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from sweep.analysis.figures import curves, effects, scaling, tuned
from sweep.analysis.figures.arms import Material
from sweep.analysis.figures.style import LOOKS, Chart, UndrawableError, ensure_font_folder

KINDS: Mapping[str, Callable[[Material], Chart]] = {
    "curves": curves.learning,
    "convergence": curves.convergence,
    "tuning": tuned.tuning,
    "budget": tuned.budget,
    "learning-rate": scaling.learning_rate,
    "depth": scaling.depth,
    "size": scaling.size,
    "trained": scaling.trained,
    "effects": effects.effects,
}
"""The kinds of figures, in the order of a report."""


@dataclass(frozen=True)
class Drawing:
    """A figure of a sweep, or why there is none."""

    kind: str
    chart: Chart | None
    why: str = ""
    """Why it could not be drawn; empty if it was."""


def draw(material: Material, only: Collection[str] = ()) -> Iterator[Drawing]:
    """Draw the figures of a sweep, one after another.

    Args:
        material: See `gather`.
        only: Kinds, of `KINDS`; none is all.

    Raises:
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    ensure_font_folder()
    import matplotlib as mpl

    for kind, function in KINDS.items():
        if only and kind not in only:
            continue
        with mpl.rc_context(LOOKS):
            try:
                drawing = Drawing(kind, function(material))
            except UndrawableError as error:
                drawing = Drawing(kind, None, str(error))
        yield drawing
