"""Charts of a sweep: that they show the ledger's numbers, and say why where they show nothing."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from sweep.analysis.figures import KINDS, Chart, draw, gather, inline_svg, save
from sweep.analysis.figures import arms as arms_module
from sweep.analysis.figures.style import LOOKS, SERIES, look
from sweep.analysis.stats import t_interval
from sweep.cli.report import Kind
from sweep.ledger.ledger import Ledger
from sweep.planning.tuning import resolve
from sweep.sweepfile.expansion import load
from sweep.sweepfile.trials import Point, Sweep
from tests.support import trial_row

SIZES = """\
sweep: sizes
trial: {pretraining: random, steps: 40, evaluation: {every: 2}}
axes:
  model:
    - {label: 2x32, backbone: {name: gpt2, layers: 2, width: 32, heads: 2}}
    - {label: 4x32, backbone: {name: gpt2, layers: 4, width: 32, heads: 2}}
    - {label: 2x64, backbone: {name: gpt2, layers: 2, width: 64, heads: 2}}
  task: [bit-xor, bit-memory]
  learning_rate: [1.0e-3, 1.0e-2]
  seed: [0, 1, 2]
claims:
  - {that: 4x32 > 2x32, axis: model, per: [task, learning_rate]}
"""

Made = tuple[Sweep, Ledger]
Fill = Callable[[Point], dict[str, Any] | None]


def make(folder: Path, text: str, fill: Fill, curve: bool = True) -> Made:
    (folder / "sweep.yaml").write_text(text)
    sweep, ledger = load(folder / "sweep.yaml"), Ledger(folder / "results", write=True)
    for point in sweep.tunings:
        commit(ledger, point, fill, curve=False)
    sweep = resolve(sweep, ledger)
    for point in sweep.points:
        commit(ledger, point, fill, curve)
    return sweep, ledger


def commit(ledger: Ledger, point: Point, fill: Fill, curve: bool) -> None:
    values = fill(point)
    if curve:
        ledger.append_curve(point.trial_id, "a1", 0, records(point, 40 if values else 20))
    if values is not None:
        ledger.commit(trial_row(point, **values))


def along(point: Point, step: int) -> float:
    """An accuracy along a curve: it rises to 0.5 and a bit by the seed, and has converged at 10."""
    return (0.5 if step >= 10 else 0.05 * step) + 0.1 * point.config.seed


def records(point: Point, last: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step, "split": split, "loss": 1.0, "accuracy": along(point, step),
            "seconds": 1.0, "examples": step,
        }
        for step in range(0, last + 1, 2)
        for split in ("train", "validation")
    ]  # fmt: skip


def figures(point: Point) -> dict[str, Any]:
    config = point.config
    value = 0.5 + config.backbone.layers / 20 + config.backbone.width / 1000 + config.seed / 100
    value += (config.learning_rate == 1e-3) / 10
    parameters = 12 * config.backbone.layers * config.backbone.width**2
    return {
        "test_accuracy": value,
        "validation_accuracy": value - 0.05,
        "parameters": parameters,
        "parameters_trained": parameters // 10,
    }


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("sizes"), SIZES, figures)


@pytest.fixture(scope="module")
def drawn(sizes: Made) -> dict[str, Chart]:
    return {one.kind: one.chart for one in draw(gather(*sizes)) if one.chart}


def panel(chart: Chart, title: str) -> Axes:
    (axes,) = [axes for axes in chart.figure.axes if axes.get_title(loc="left") == title]
    return axes


def shown(axes: Axes) -> dict[int, tuple[list[float], list[float]]]:
    """The lines with markers of a panel, by the place of their looks."""
    looks = {look(number)["marker"]: number for number in range(SERIES)}
    return {
        looks[str(line.get_marker())]: (
            np.asarray(line.get_xdata(), dtype=float).tolist(),
            np.asarray(line.get_ydata(), dtype=float).tolist(),
        )
        for line in axes.lines
        if line.get_marker() in looks
    }


def test_the_command_knows_every_kind() -> None:
    assert [kind.value for kind in Kind] == list(KINDS)


def test_a_sweep_that_has_everything_but_tuning_is_drawn_in_all_ways(
    drawn: dict[str, Chart],
) -> None:
    assert drawn.keys() == KINDS.keys() - {"tuning", "budget"}


def test_a_learning_curve_is_the_mean_over_seeds_with_its_interval(
    drawn: dict[str, Chart], sizes: Made
) -> None:
    axes = panel(drawn["curves"], "bit-xor")
    points = [p for p in sizes[0].points if p.labels["task"] == "bit-xor"][:3]
    steps, means = shown(axes)[0]
    band = axes.collections[0].get_paths()[0].vertices

    assert steps == list(range(0, 41, 2))
    expected = [t_interval([100 * along(p, step) for p in points]) for step in range(0, 41, 2)]
    assert means == pytest.approx([one.mean for one in expected])
    for step, one in zip(range(0, 41, 2), expected, strict=True):
        assert one.half_width is not None
        ends = band[np.isclose(band[:, 0], step), 1]
        assert ends.min() == pytest.approx(max(0, one.mean - one.half_width))
        assert ends.max() == pytest.approx(min(100, one.mean + one.half_width))


def test_trials_that_are_further_than_others_are_lines_of_their_own(tmp_path: Path) -> None:
    made = make(tmp_path, SIZES, lambda p: figures(p) if p.config.seed else None)
    (drawing,) = draw(gather(*made), ["curves"])
    assert drawing.chart is not None
    axes = panel(drawing.chart, "bit-xor")
    tails = [line for line in axes.lines if line.get_linewidth() == 0.5]

    assert shown(axes)[0][0] == list(range(0, 21, 2))
    assert {tuple(np.asarray(line.get_xdata())) for line in tails} == {tuple(range(20, 41, 2))}
    assert len(tails) == 2 * 6
    assert any("thin lines" in note for note in drawing.chart.notes)


def test_steps_to_convergence_are_those_of_the_definition(drawn: dict[str, Chart]) -> None:
    axes = panel(drawn["convergence"], "bit-xor")
    # The caps of errorbars are such marks too, in another size.
    marks = [line for line in axes.lines if line.get_marker() == "|" and line.get_markersize() == 7]
    ticks = [np.asarray(line.get_xdata()) for line in marks]

    # Level from step 10 on. Of windows of five evaluations, two steps apart, the one around 12 has
    # the 0.4 of step 8 in it, and is off by 0.02; the one around 14 is the first to be level.
    assert [tick.tolist() for tick in ticks] == [[14, 14, 14]] * 6
    assert axes.get_yticklabels()[0].get_text() == "2x32 / 0.001"


def test_each_kind_of_scaling_compares_what_differs_in_nothing_else(
    drawn: dict[str, Chart],
) -> None:
    rates = shown(panel(drawn["learning-rate"], "bit-xor"))
    depths = shown(panel(drawn["depth"], "bit-xor"))
    sized = shown(panel(drawn["size"], "bit-xor"))

    # 2x32: 0.5 + 0.1 + 0.032 + 0.01 (the mean seed) - 0.05 (validation), and 0.1 at 1e-3.
    assert rates[0][0] == [0.001, 0.01]
    assert rates[0][1] == pytest.approx([69.2, 59.2])
    assert len(rates) == 3
    assert depths[0][0] == [2, 4]
    assert depths[0][1] == pytest.approx([74.2, 84.2])
    assert len(depths) == 2
    assert sized[0][0] == [12 * 2 * 32**2, 12 * 4 * 32**2, 12 * 2 * 64**2]
    assert sized[0][1] == pytest.approx([74.2, 84.2, 77.4])


def test_trained_parameters_are_a_point_a_cell(drawn: dict[str, Chart]) -> None:
    points = shown(panel(drawn["trained"], "bit-memory"))

    assert len(points) == 6
    assert points[0] == ([12 * 2 * 32**2 // 10], pytest.approx([74.2]))


def test_effects_are_the_differences_that_the_claims_have(
    drawn: dict[str, Chart], sizes: Made
) -> None:
    chart = drawn["effects"]
    (axes,) = chart.figure.axes
    judged = gather(*sizes).judged
    names = [label.get_text() for label in axes.get_yticklabels()]
    marked = [line for line in axes.lines if line.get_markersize() == 5]
    centres = [float(np.asarray(line.get_xdata())[0]) for line in marked]

    assert len(names) == 4
    assert names[0] == "bit-xor / 0.001: 4x32 > 2x32"
    assert centres == pytest.approx([one.difference for one in judged.contrasts])
    assert all(f"{one.verdict}" in chart.alt for one in judged.contrasts)


def test_several_claims_of_several_places_are_a_panel_a_place(tmp_path: Path) -> None:
    claims = """claims:
  - {that: 4x32 > 2x32, axis: model, per: [task, learning_rate]}
  - {that: 2x64 > 4x32, axis: model, per: [task, learning_rate]}
"""
    made = make(tmp_path, SIZES.split("claims:")[0] + claims, figures, curve=False)
    (drawing,) = draw(gather(*made), ["effects"])
    assert drawing.chart is not None
    seen = {
        (label.get_text(), axes.get_title(loc="left")): float(np.asarray(line.get_xdata())[0])
        for axes in drawing.chart.figure.axes
        for line in axes.lines
        for at, label in enumerate(drawing.chart.figure.axes[0].get_yticklabels())
        if line.get_markersize() == 5 and np.asarray(line.get_ydata())[0] == at
    }

    assert seen == pytest.approx(
        {
            (one.claim, " / ".join(one.place.values())): one.difference
            for one in gather(*made).judged.contrasts
        }
    )
    assert len(seen) == 2 * 4


TUNED = """\
sweep: tuned
trial: {backbone: {name: gpt2, size: tiny}, steps: 40}
axes: {pretraining: [language, random], task: [bit-xor, bit-memory], seed: [0, 1]}
tune: {learning_rate: {values: [1.0e-3, 1.0e-2]}, by: validation_accuracy, seeds: [100, 101]}
"""


def test_tuning_shows_what_was_tried_and_rings_what_was_chosen(tmp_path: Path) -> None:
    made = make(tmp_path, TUNED, figures, curve=False)
    (drawing,) = draw(gather(*made), ["tuning"])
    assert drawing.chart is not None
    axes = panel(drawing.chart, "bit-xor")
    first = next(line for line in axes.lines if len(np.asarray(line.get_xdata())) == 2)
    rings = [line for line in axes.lines if line.get_markersize() == 9]

    assert np.asarray(first.get_xdata()).tolist() == [1e-3, 1e-2]
    high, low = np.asarray(first.get_ydata())
    assert high - low == pytest.approx(10)
    assert [float(np.asarray(line.get_xdata())[0]) for line in rings] == [1e-3, 1e-3]
    assert "bit-xor / language 0.001" in drawing.chart.alt


def test_tuning_shows_no_rate_of_which_a_seed_diverged(tmp_path: Path) -> None:
    def lost(point: Point) -> dict[str, Any] | None:
        if (point.config.seed, point.config.learning_rate) == (101, 1e-2):
            return {"outcome": "diverged"}
        return figures(point)

    (drawing,) = draw(gather(*make(tmp_path, TUNED, lost, curve=False)), ["tuning"])
    assert drawing.chart is not None
    lines = [line for line in panel(drawing.chart, "bit-xor").lines if line.get_markersize() != 9]

    assert [np.asarray(line.get_xdata()).tolist() for line in lines] == [[1e-3], [1e-3]]


def test_the_budget_shows_the_expected_best_of_so_many_points(tmp_path: Path) -> None:
    made = make(tmp_path, TUNED, figures, curve=False)
    (drawing,) = draw(gather(*made), ["budget"])
    assert drawing.chart is not None
    first = panel(drawing.chart, "bit-xor").lines[0]

    # Of two points ten apart, one is on average five below the better one.
    assert np.asarray(first.get_xdata()).tolist() == [1, 2]
    one, both = np.asarray(first.get_ydata())
    assert both - one == pytest.approx(5)
    assert "bit-xor / language" in drawing.chart.alt


def test_what_cannot_be_drawn_says_what_it_lacks(tmp_path: Path) -> None:
    text = "sweep: bare\ntrial: {task: bit-xor, pretraining: random, steps: 5}\naxes: {seed: [0]}\n"
    made = make(tmp_path, text, lambda _: None, curve=False)
    drawings = list(draw(gather(*made)))

    assert [drawing.kind for drawing in drawings] == list(KINDS)
    assert all(drawing.chart is None and len(drawing.why) > 15 for drawing in drawings)
    assert len({drawing.why for drawing in drawings}) == len(drawings)


def test_what_is_left_out_is_told(sizes: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms_module, "SERIES", 2)
    monkeypatch.setattr(arms_module, "SEEDS", 2)
    (drawing,) = draw(gather(*sizes), ["curves"])
    assert drawing.chart is not None

    assert drawing.chart.notes[-2:] == (
        "8 of 12 cells are left out",
        "of each cell the first 2 trials count",
    )
    assert all(len(shown(panel(drawing.chart, name))) == 2 for name in ("bit-xor", "bit-memory"))


def test_series_differ_in_colour_dashes_and_marker() -> None:
    looks = [look(number) for number in range(SERIES)]

    for one, other in itertools.combinations(looks, 2):
        assert all(one[name] != other[name] for name in ("color", "linestyle", "marker"))


def test_nothing_is_cut_off(drawn: dict[str, Chart]) -> None:
    for chart in drawn.values():
        canvas = FigureCanvasAgg(chart.figure)
        canvas.draw()
        whole = chart.figure.get_tightbbox(canvas.get_renderer())
        width, height = chart.figure.get_size_inches()
        assert whole.x0 >= -0.05
        assert whole.y0 >= -0.05
        assert whole.x1 <= width + 0.05
        assert whole.y1 <= height + 0.05


def test_a_chart_is_the_same_bytes_each_time(sizes: Made, tmp_path: Path) -> None:
    for place in ("one", "two"):
        (drawing,) = draw(gather(*sizes), ["depth"])
        assert drawing.chart is not None
        files = save(drawing.chart.figure, tmp_path / place / "depth")
        inline = inline_svg(drawing.chart, "depth")
        (tmp_path / place / "inline").write_text(inline)
        files.append(tmp_path / place / "inline")

    for file in files:
        assert file.read_bytes() == (tmp_path / "one" / file.name).read_bytes()


def test_two_charts_of_a_page_share_no_id_and_lead_nowhere_else(drawn: dict[str, Chart]) -> None:
    ids: list[str] = []
    for name in ("depth", "size"):
        tree = ElementTree.fromstring(inline_svg(drawn[name], f"figure-{name}"))
        own = [one.get("id") for one in tree.iter() if one.get("id")]
        ids += [str(one) for one in own]
        assert all(str(one).startswith(f"figure-{name}-") for one in own)
        assert {str(one.get("href"))[1:] for one in tree.iter() if one.get("href")} <= set(ids)
        assert "http" not in ElementTree.tostring(tree, encoding="unicode")

    assert len(ids) == len(set(ids)) > 4


LETTERS = "\u2212\xb1→←αλΣ≤\xd7…†\xb7\u2013é"
"""What labels, ticks and notes of figures hold beside ASCII."""


def fonts(pdf: Path) -> set[str]:
    """The fonts of a PDF, by name: matplotlib draws a box by one called LastResort."""
    return {
        name.decode().rpartition("+")[2]
        for name in re.findall(rb"/BaseFont ?/([\w+-]+)|/FontName ?/([\w+-]+)", pdf.read_bytes())
        for name in name
        if name
    }


def ink(png: Path) -> bytes:
    """The dark pixels of a picture, cut out."""
    dark = np.asarray(Image.open(png).convert("L")) < 128
    rows, columns = np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))
    inside = dark[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return str(inside.shape).encode() + inside.tobytes()


def test_letters_of_saved_figures_are_no_boxes(sizes: Made, tmp_path: Path) -> None:
    """In the files: of each letter the pixels are its own, and the PDF has no font of boxes."""
    seen = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of the one that is to be a box
        for letter in (*LETTERS, "\N{CJK UNIFIED IDEOGRAPH-4E2D}"):
            figure = Figure(figsize=(0.5, 0.5))
            figure.text(0.3, 0.4, letter, fontsize=12, family=LOOKS["font.family"])
            pdf, _, png = save(figure, tmp_path / f"{ord(letter):x}")
            seen[letter] = (ink(png), fonts(pdf))

    *own, box = seen.values()
    assert len({pixels for pixels, _ in seen.values()}) == len(LETTERS) + 1
    assert [used for _, used in own if used != {"DejaVuSans"}] == []
    assert any("LastResort" in name for name in box[1])  # A box would be seen.
    # A chart of negative numbers: matplotlib's own minus signs.
    chart = next(one.chart for one in draw(gather(*sizes), ["effects"]))
    assert chart is not None
    pdf, *_ = save(chart.figure, tmp_path / "effects")
    assert fonts(pdf) == {"DejaVuSans"}


def test_letters_that_the_font_lacks_are_escapes(tmp_path: Path) -> None:
    """As labels of every place: the series of one chart and the panels and rows of the others."""
    text = SIZES.replace("label: 2x32", "label: 小さい").replace("label: 4x32", "label: 深い😀")
    text = text.replace("4x32 > 2x32", "深い😀 > 小さい")
    sweep, ledger = make(tmp_path, text, figures)

    charts = {one.kind: one.chart for one in draw(gather(sweep, ledger)) if one.chart}

    assert {"curves", "effects", "learning-rate"} <= charts.keys()
    for kind, chart in charts.items():
        pdf, svg, _ = save(chart.figure, tmp_path / kind)  # A warning of a glyph is an error here.
        assert not [name for name in fonts(pdf) if "LastResort" in name]
        assert "小" not in svg.read_text(encoding="utf-8")
    legend = charts["curves"].figure.legends[0].get_texts()
    assert any(r"\u5c0f\u3055\u3044" in one.get_text() for one in legend)
