"""Figures: that they show the numbers they were given, under names that can be read."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fpt.config import TrialConfig
from fpt.tasks.base import Batch
from fpt.tasks.bits import BitMemory, BitXor
from sweep.analysis.figures import (
    FORMATS,
    Tokens,
    attention,
    file_stem,
    save,
    tokens_of,
    undrawable,
)
from sweep.sweepfile.trials import Point


def maps_of(layers: int, heads: int, tokens: int) -> np.ndarray:
    draws = np.random.default_rng(0).random((layers, heads, tokens, tokens)).astype(np.float32)
    causal: np.ndarray = np.tril(draws) / np.tril(draws).sum(-1, keepdims=True)
    return causal


MEMORY = Tokens((("1", 20), ("2", 20), ("3", 20), ("4", 20), ("5", 20), ("?", 20)), note="note")
XOR = Tokens((("first", 5), ("second", 5)), tuple("0110001101"), note="note")


def images(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(axes.get_images()[0].get_array()) for axes in figure.axes if axes.images]


def test_each_layer_is_a_row_of_the_mean_and_of_each_head() -> None:
    maps = maps_of(2, 3, 10)

    figure = attention(maps, XOR, "A title")

    expected = [one for layer in maps for one in (layer.mean(axis=0), *layer)]
    assert len(images(figure)) == len(expected) == 8
    for shown, given in zip(images(figure), expected, strict=True):
        np.testing.assert_array_equal(shown, given)
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels[:4]] == ["mean", "head 1", "head 2", "head 3"]
    assert [axes.get_ylabel() for axes in panels[::4]] == ["layer 1", "layer 2"]
    # One scale for all, and zero is its darkest colour.
    norms = {id(axes.get_images()[0].norm) for axes in panels}
    assert len(norms) == 1
    assert panels[0].get_images()[0].norm.vmin == 0
    assert panels[0].get_images()[0].get_cmap().name == "viridis"


def test_one_head_needs_no_mean() -> None:
    figure = attention(maps_of(1, 1, 10), XOR, "A title")

    assert [axes.get_title() for axes in figure.axes if axes.images] == ["head 1"]


def test_outer_axes_bear_the_names_of_tokens_and_inner_ones_none() -> None:
    figure = attention(maps_of(2, 2, 10), XOR, "A title")
    panels = [axes for axes in figure.axes if axes.images]
    corner, inner = panels[3], panels[1]

    for axis in (corner.xaxis, corner.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == list("0110001101")
        assert [label.get_text() for label in axis.get_ticklabels(minor=True)] == [
            "first", "second"
        ]  # fmt: skip
        assert list(axis.get_minorticklocs()) == [2, 7]
    assert not inner.xaxis.get_ticklabels()
    assert not inner.yaxis.get_ticklabels(minor=True)
    assert [line.get_xdata()[0] for line in inner.lines if line.get_xdata()[0]] == [4.5]


@pytest.mark.parametrize(
    ("layers", "heads", "tokens"), [(1, 1, XOR), (4, 4, XOR), (4, 4, MEMORY), (3, 12, MEMORY)]
)
def test_nothing_is_cut_off_and_no_two_names_overlap(
    layers: int, heads: int, tokens: Tokens
) -> None:
    size = sum(number for _, number in tokens.groups)
    figure = attention(maps_of(layers, heads, size), tokens, "A title of a trial/bit-memory/0")
    renderer = FigureCanvasAgg(figure).get_renderer()

    whole = figure.get_tightbbox(renderer)
    width, height = figure.get_size_inches()
    assert whole.x0 >= 0
    assert whole.y0 >= 0
    assert whole.x1 <= width
    assert whole.y1 <= height
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            for minor in (False, True):
                boxes = [
                    label.get_window_extent(renderer)
                    for label in axis.get_ticklabels(minor=minor)
                    if label.get_text()
                ]
                for one, other in itertools.pairwise(boxes):
                    assert not one.overlaps(other)


def test_the_same_figure_is_the_same_bytes(tmp_path: Path) -> None:
    for place in ("one", "two"):
        files = save(attention(maps_of(1, 2, 10), XOR, "A title"), tmp_path / place / "figure")
        assert [file.name for file in files] == ["figure.pdf", "figure.svg", "figure.png"]

    begins = {"pdf": b"%PDF", "svg": b"<?xml", "png": b"\x89PNG"}
    for suffix in FORMATS:
        one, two = (tmp_path / place / f"figure.{suffix}" for place in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
        assert one.read_bytes().startswith(begins[suffix])


@pytest.mark.parametrize("asked", [0, 2])
def test_tokens_of_bit_memory_are_the_patches_of_its_strings(asked: int) -> None:
    task = BitMemory(strings=3, bits=6, patch=2)
    strings = np.array([[1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 1]])
    shown = (2 * strings[asked] - 1) * [1, 0, 1, 0, 0, 1]
    inputs = np.concatenate([2 * strings - 1, shown[None]]).reshape(1, 12, 2).astype(np.float32)

    tokens = tokens_of(task, Batch(inputs, strings[asked][None]))

    assert tokens.groups == (("1", 3), ("2", 3), ("3", 3), ("?", 3))
    assert tokens.each == ()
    assert f"string {asked + 1} again" in tokens.note
    assert tokens.bounds == [2.5, 5.5, 8.5]
    assert tokens.centres == [1, 4, 7, 10]


def test_tokens_of_bit_xor_are_the_bits_of_two_strings() -> None:
    inputs = np.array([0, 1, 1, 1, 0, 0], dtype=np.float32).reshape(1, 6, 1)

    tokens = tokens_of(BitXor(bits=3), Batch(inputs, np.array([[1, 1, 1]])))

    assert tokens.groups == (("first", 3), ("second", 3))
    assert tokens.each == ("0", "1", "1", "1", "0", "0")
    assert tokens.bounds == [2.5]
    assert tokens.centres == [1, 4]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, ""),
        ({"task": "bit-memory", "backbone": {"name": "bert", "size": "tiny"}}, ""),
        ({"task": "digits"}, "task digits: maps are drawn for bit-memory and bit-xor"),
        ({"backbone": {"name": "lstm", "size": "tiny"}}, "backbone lstm has no attention"),
    ],
)
def test_what_cannot_be_drawn_says_why(fields: dict[str, object], why: str) -> None:
    base = {"task": "bit-xor", "pretraining": "random", "steps": 1, "seed": 0}
    config = TrialConfig.model_validate(base | fields)

    assert undrawable(config) == why


def test_a_file_is_named_after_its_trial() -> None:
    config = TrialConfig.model_validate({"task": "bit-xor", "steps": 1, "seed": 0})
    labels = {"train": "output+norm", "task": "a b/c", "seed": "0"}

    stem = file_stem(Point("0123456789ab", "0" * 12, config, labels, "x.yaml:1"))

    assert stem == "output+norm-a-b-c-0-0123456789ab"
    assert re.fullmatch(r"[\w.+-]+", stem)
    assert file_stem(Point("0123456789ab", "0" * 12, config, {}, "x")) == "0123456789ab"


@pytest.mark.parametrize("cached", [True, False])
def test_where_the_home_folder_cannot_be_written_matplotlib_is_silent(
    cached: bool, tmp_path: Path
) -> None:
    home = tmp_path / "file"
    home.touch()
    own = {"FPT_SWEEP_CACHE": str(tmp_path / "cache")} if cached else {}
    left_out = ("MPLCONFIGDIR", "FPT_SWEEP_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    program = (
        "from sweep.analysis.figures.style import ensure_font_folder\n"
        "ensure_font_folder()\n"
        "import matplotlib\nprint(matplotlib.get_cachedir())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | own | {"HOME": str(home / "none"), "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stderr == ""
    folder = Path(ran.stdout.strip())
    if cached:
        assert folder == tmp_path / "cache/matplotlib"
    else:
        assert folder.parent == tmp_path
        assert not folder.exists()  # nothing is left


def test_what_the_home_folder_says_of_matplotlib_counts(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MPLCONFIGDIR"}
    program = (
        "import os\nfrom sweep.analysis.figures.style import ensure_font_folder\n"
        "ensure_font_folder()\nprint(os.environ.get('MPLCONFIGDIR'))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"HOME": str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout == "None\n"
    assert not list(tmp_path.iterdir())
