"""Figures of a sweep, from what the ledger holds, at any time: as vectors and as pixels.

Each kind is drawn where the sweep has what it needs, and says why not where it has not. A series is
a cell, or cells that differ in what the x axis shows; means and intervals are over seeds, as in the
table. What is drawn is bounded, whatever the size of the sweep, and a figure says what it leaves
out.
"""

from sweep.analysis.figures.arms import Material, gather
from sweep.analysis.figures.drawing import KINDS, Drawing, draw
from sweep.analysis.figures.maps import (
    Tokens,
    attention,
    draw_attention,
    file_stem,
    heads_of,
    tokens_of,
    undrawable,
)
from sweep.analysis.figures.style import FORMATS, Chart, inline_svg, save

__all__ = [
    "FORMATS",
    "KINDS",
    "Chart",
    "Drawing",
    "Material",
    "Tokens",
    "attention",
    "draw",
    "draw_attention",
    "file_stem",
    "gather",
    "heads_of",
    "inline_svg",
    "save",
    "tokens_of",
    "undrawable",
]
