"""How figures look, and how they are saved: as the same bytes each time, for one matplotlib.

A figure is drawn without pyplot, so that nothing is shared between figures or threads. Series are
told apart by colour, dashes and marker together, so that they are in grey print and by colour-blind
readers too: the colours are those of Okabe and Ito, maps are viridis.
"""

from __future__ import annotations

import atexit
import functools
import io
import math
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from fpt.files import cache_folder, ensure_home
from fpt.printable import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
"""What a figure is saved as -> metadata, without what differs from time to time."""

DPI = 200
"""Pixels of an inch: of the PNG, and of maps inside the vectors."""

SMALL, USUAL = 6.5, 9.0
"""Sizes of letters, in points."""

WIDTH = 7.0
"""Of a figure, in inches: both columns of a paper, or a page of A4."""

SERIES = 8
"""Series that one panel shows at most: more could not be told apart."""

WIDE = 8.0
"""Largest over smallest number from which on an axis is logarithmic."""

TICKS = 6
"""Numbers that are ticks themselves, at most."""

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#B58900", "#56B4E9", "#7F7F7F")
_DASHES: tuple[Any, ...] = (
    "-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)),
    (0, (7, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (2, 2)), (0, (6, 1, 2, 1)),
)  # fmt: skip
_MARKERS = "osD^vPX*"

LOOKS: dict[Any, Any] = {
    "font.size": 8.0,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that it is the same everywhere
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.0,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.0,
}
"""What every chart is drawn and saved with."""


class UndrawableError(Exception):
    """A figure cannot be drawn; the message says what the sweep or the ledger lacks for it."""


@dataclass(frozen=True)
class Chart:
    """A figure with its words."""

    title: str
    alt: str
    """What there is to be seen, for those who do not see it."""
    notes: tuple[str, ...]
    """How to read it, and what it leaves out."""
    figure: Figure


def ensure_font_folder() -> None:
    """Name a folder for matplotlib's list of fonts where it cannot write into the home folder.

    It would warn of that. To be called before matplotlib is imported.
    """
    ensure_home()
    own = [
        Path(os.environ.get(name) or Path("~", usual).expanduser())
        for name, usual in (("XDG_CONFIG_HOME", ".config"), ("XDG_CACHE_HOME", ".cache"))
    ]
    if os.environ.get("MPLCONFIGDIR") or all(map(_can_hold_files, own)):
        return
    folder = cache_folder() / "matplotlib"
    if not _can_hold_files(folder):
        folder = Path(tempfile.mkdtemp(prefix="fpt-sweep-fonts-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["MPLCONFIGDIR"] = str(folder)


def _can_hold_files(folder: Path) -> bool:
    """Return whether a folder, or what is there of its path, can be written; leaves nothing."""
    try:
        there = next(one for one in (folder, *folder.parents) if one.exists())
        tempfile.TemporaryFile(dir=there).close()
    except OSError:
        return False
    return True


def look(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of a series, by its place among the series of the figure."""
    at = number % SERIES
    return {"color": _COLOURS[at], "linestyle": _DASHES[at], "marker": _MARKERS[at]}


def panels(
    titles: Sequence[str], *, height: float = 1.9, across: int = 3, share: bool = True
) -> tuple[Figure, list[Axes]]:
    """Return a figure of small multiples, its legend to be set above them by `legend`.

    Args:
        titles: One a panel.
        height: Of a panel, in inches.
        across: Panels in a row, at most.
        share: Whether all have one y axis, told at the left.
    """
    from matplotlib.figure import Figure

    columns = min(across, len(titles)) if len(titles) != 4 or across < 3 else 2
    rows = math.ceil(len(titles) / columns)
    size = (WIDTH if columns > 1 else 0.75 * WIDTH, rows * (height + 0.35) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share)
    flat = [axes for row in grid for axes in row]
    for axes, title in zip(flat, titles, strict=False):
        axes.set_title(clipped(title, 40), loc="left")
        axes.grid(visible=True, color="#dddddd", linewidth=0.5)
        axes.set_axisbelow(True)
    for axes in flat[len(titles) :]:
        axes.set_visible(False)
    return figure, flat[: len(titles)]


def legend(figure: Figure, names: Sequence[str], handles: Sequence[Any]) -> None:
    """Name the series, above all panels."""
    if names:
        shown = [clipped(name, 44) for name in names]
        across = max(1, min(4, int(105 / (max(map(len, shown)) + 8))))
        figure.legend(handles, shown, loc="outside upper left", ncols=across, handlelength=3.2)
        rows = math.ceil(len(shown) / across)
        figure.set_figheight(figure.get_figheight() + 0.16 * (rows - 1))


def number_axis(axes: Axes, name: str, numbers: Sequence[float]) -> None:
    """Make the x axis one of numbers: logarithmic if they are far apart, ticked if they are few."""
    axes.set_xlabel(name)
    shown = sorted(set(numbers))
    if shown[0] > 0 and shown[-1] / shown[0] >= WIDE:
        axes.set_xscale("log")
    if len(shown) <= TICKS:
        axes.set_xticks(shown, [_short(one) for one in shown])
        axes.set_xticks([], minor=True)


def _short(number: float) -> str:
    # 0.0003, 12, 98.3k, 1.2M
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 10 * size or (number >= size and number % size == 0):
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def clipped(text: str, most: int) -> str:
    """Return a text as matplotlib sets it, cut where it is too long for its place.

    Characters that the letters of figures lack are written as escapes, and not drawn as boxes.
    """
    drawn = _characters()
    text = "".join(
        one if ord(one) in drawn else one.encode("unicode_escape").decode("ascii")
        for one in printable(text)
    )
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return cut.replace("$", r"\$")  # A dollar sign would begin mathematics.


@functools.cache
def _characters() -> frozenset[int]:
    """Return the code points that the font of `LOOKS` has a glyph for."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(LOOKS["font.family"])).get_charmap())


def save(figure: Figure, stem: Path, formats: Collection[str] = tuple(FORMATS)) -> list[Path]:
    """Save a figure in every format of `FORMATS`, or in some of them.

    Args:
        figure: The figure.
        stem: The files' path without the suffix; its folder is made.
        formats: Which of `FORMATS`.

    Returns:
        The files.

    Raises:
        OSError: If they cannot be written.
    """
    import matplotlib as mpl

    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{suffix}") for suffix in formats]
    with mpl.rc_context({**LOOKS, "svg.hashsalt": "fpt-sweep"}):
        for file, suffix in zip(files, formats, strict=True):
            figure.savefig(file, dpi=DPI, metadata=FORMATS[suffix])
    return files


def inline_svg(chart: Chart, name: str) -> str:
    """Return a figure as an `svg` element of an HTML page, its letters as text.

    Args:
        chart: The figure, with its words.
        name: Of letters, digits and dashes, and of no other figure of the page: every id in the
            element begins with it.
    """
    import matplotlib as mpl

    sink = io.BytesIO()
    none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({**LOOKS, "svg.hashsalt": name, "svg.fonttype": "none"}):
        chart.figure.savefig(sink, format="svg", metadata=none)
    root = ElementTree.fromstring(sink.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):  # A rule for every element of the page it would be.
            if child.tag.endswith("}defs") and child.find("{*}style") is not None:
                parent.remove(child)
    used = {value[1:] for one in root.iter() for at, value in one.items() if at.endswith("href")}
    for one in root.iter():
        one.tag = one.tag.partition("}")[2]
        one.text, one.tail = (one.text or "").strip(), ""
        kept = {at.partition("}")[2] or at: value for at, value in one.items()}
        if one.tag == "g" or (one.tag == "path" and kept.get("id") not in used):
            kept.pop("id", None)
        one.attrib.clear()
        one.attrib.update({at: _local(at, value, name) for at, value in kept.items()})
    words = {"title": chart.title, "desc": chart.alt}
    width, height = chart.figure.get_size_inches()
    root.attrib.clear()
    root.attrib.update(
        {
            "viewBox": f"0 0 {72 * width:g} {72 * height:g}",
            "width": f"{96 * width:.0f}",
            "height": f"{96 * height:.0f}",
            "role": "img",
            "aria-labelledby": " ".join(f"{name}-{word}" for word in words),
        }
    )
    for place, (word, text) in enumerate(words.items()):
        told = ElementTree.Element(word, {"id": f"{name}-{word}"})
        told.text = printable(text)
        root.insert(place, told)
    return ElementTree.tostring(root, encoding="unicode")


def _local(attribute: str, value: str, name: str) -> str:
    # An attribute as it is in a page with other figures, and no longer than need be.
    if attribute == "id":
        return f"{name}-{value}"
    if attribute == "href":
        return f"#{name}-{value.removeprefix('#')}"
    if attribute in ("d", "x", "y", "transform"):
        value = re.sub(r"(\.\d\d)\d+", r"\1", " ".join(value.split()))
    # Verdana has the same widths, where matplotlib's own letters are not installed.
    value = value.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    return value.replace("url(#", f"url(#{name}-")
