"""Attention maps: what each token of one example attends to, by layer and by head."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fpt.config import TrialConfig
from fpt.tasks.base import Batch
from fpt.tasks.bits import BitMemory, BitTask, BitXor
from sweep.analysis.figures.style import SMALL, USUAL, clipped, ensure_font_folder, save
from sweep.sweepfile.trials import Point

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from fpt.model import Model

EXAMPLES = 32
"""Over which the kind of a head's fixed point is found."""


def file_stem(point: Point) -> str:
    """Return a file name for a trial: its labels, for people, and its id."""
    return "-".join(filter(None, (re.sub(r"[^\w.+]+", "-", point.label), point.trial_id)))


@dataclass(frozen=True)
class Tokens:
    """The tokens of an example, as the axes of a map name them."""

    groups: tuple[tuple[str, int], ...]
    """(name, number of tokens), in order."""
    each: tuple[str, ...] = ()
    """A word for each token, where there are few."""
    note: str = ""
    """What the example is, in a sentence."""

    @property
    def bounds(self) -> list[float]:
        """Where one group ends and the next begins, in tokens."""
        ends = np.cumsum([size for _, size in self.groups])
        return [float(end) - 0.5 for end in ends[:-1]]

    @property
    def centres(self) -> list[float]:
        """The middle of each group, in tokens."""
        ends = np.cumsum([size for _, size in self.groups])
        return [
            float(end) - size / 2 - 0.5 for end, (_, size) in zip(ends, self.groups, strict=True)
        ]


def undrawable(config: TrialConfig) -> str:
    """Return why a trial's attention maps cannot be drawn, whatever was kept of it; empty if they
    can.
    """
    if not isinstance(config.task, BitMemory | BitXor):
        return f"task {config.task.name}: maps are drawn for bit-memory and bit-xor"
    if "attention" not in config.backbone.row.trainable:
        return f"backbone {config.backbone.name} has no attention"
    return ""


def tokens_of(task: BitTask, batch: Batch) -> Tokens:
    """Return what the tokens of one example of a bit task are.

    Args:
        task: BitMemory or BitXor.
        batch: One example.
    """
    if isinstance(task, BitMemory):
        patches = task.bits // task.patch
        strings = batch.inputs.reshape(task.strings + 1, task.bits)[:-1] > 0
        asked = int(np.flatnonzero((strings == (batch.targets[0] > 0)).all(axis=1))[0])
        return Tokens(
            (*((str(number + 1), patches) for number in range(task.strings)), ("?", patches)),
            note=(
                f"{task.strings} strings of {task.bits} bits, {patches} tokens each; at the end "
                f"(?) string {asked + 1} again, with half of its bits masked"
            ),
        )
    bits = batch.inputs.shape[1] // 2
    words = tuple(str(int(bit)) for bit in batch.inputs.ravel())
    return Tokens(
        (("first", bits), ("second", bits)),
        words,
        note=f"two strings of {bits} bits, a token each; asked for is their XOR",
    )


def attention(maps: np.ndarray, tokens: Tokens, title: str) -> Figure:
    """Attention maps: a row for each layer, a column for the mean over the heads and one for each.

    Args:
        maps: (layers, heads, T, T): row i of the last two axes is what token i attends to.
        tokens: What the T tokens are.
        title: Printed above.
    """
    ensure_font_folder()
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    layers, heads = maps.shape[:2]
    columns = [(f"head {head + 1}", maps[:, head]) for head in range(heads)]
    if heads > 1:
        columns.insert(0, ("mean", maps.mean(axis=1)))
    side, gap = (1.5 if len(columns) <= 6 else 1.1), 0.08
    left, right, below, above = 0.95, 1.05, 0.65, 0.9
    width = left + len(columns) * (side + gap) + right
    height = below + layers * (side + gap) + above
    with mpl.rc_context({"font.size": SMALL, "axes.linewidth": 0.5}):
        figure = Figure(figsize=(width, height))
        # The first tokens of a causal model attend to few, with weights near 1, beside which all
        # else would be dark: the highest half per cent share a colour, on a square-root scale.
        norm = PowerNorm(0.5, vmin=0, vmax=float(np.quantile(maps, 0.995)))
        for row in range(layers):
            for column, (name, drawn) in enumerate(columns):
                place = (
                    (left + column * (side + gap)) / width,
                    (below + (layers - 1 - row) * (side + gap)) / height,
                    side / width,
                    side / height,
                )
                axes = figure.add_axes(place)
                axes.imshow(drawn[row], norm=norm, cmap="viridis", interpolation="nearest")
                for bound in tokens.bounds:
                    axes.axhline(bound, color="white", linewidth=0.4, alpha=0.7)
                    axes.axvline(bound, color="white", linewidth=0.4, alpha=0.7)
                _name(axes.xaxis, tokens if row == layers - 1 else None)
                _name(axes.yaxis, tokens if column == 0 else None)
                for label in axes.get_yticklabels(minor=True):
                    label.set(rotation=90, va="center")
                if row == 0:
                    axes.set_title(name, fontsize=USUAL)
                if column == 0:
                    axes.set_ylabel(f"layer {row + 1}", fontsize=USUAL)
        tall = min(2.5, layers * (side + gap))
        over = (height - above - tall) / height
        bar = figure.add_axes((1 - (right - 0.15) / width, over, 0.12 / width, tall / height))
        scale = figure.colorbar(ScalarMappable(norm, "viridis"), cax=bar, extend="max")
        ticks = [float(norm.vmax or 1) * (part / 4) ** 2 for part in range(5)]
        scale.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
        bar.set_ylabel("attention weight", fontsize=USUAL)
        across = (left + len(columns) * (side + gap) / 2) / width
        upwards = (below + layers * (side + gap) / 2) / height
        figure.text(across, 0.12 / height, "token attended to", ha="center", fontsize=USUAL)
        figure.text(
            0.1 / width, upwards, "token that attends", va="center", rotation=90, fontsize=USUAL
        )
        figure.text(
            0.1 / width, 1 - 0.3 / height, clipped(title, 200), fontsize=USUAL + 1, weight="bold"
        )
        figure.text(0.1 / width, 1 - 0.52 / height, tokens.note, fontsize=USUAL - 1)
    return figure


def _name(axis: Axis, tokens: Tokens | None) -> None:
    # None: an inner axis, whose names stand at the edge of the figure.
    axis.set_tick_params(which="both", length=0)
    if tokens is None:
        axis.set_ticks([])
        return
    names = [name for name, _ in tokens.groups]
    axis.remove_overlapping_locs = False  # a group's middle may be a token
    axis.set_ticks(tokens.centres, names, minor=True)
    if tokens.each:
        axis.set_ticks(range(len(tokens.each)), tokens.each)
        axis.set_tick_params(which="minor", pad=11)
    else:
        axis.set_ticks([])


def draw_attention(point: Point, model: Model, folder: Path) -> list[Path]:
    """Draw the attention maps of a finished trial on a bit task, for one example, always the same.

    Args:
        point: The trial; `undrawable` says nothing against it.
        model: Its model, as `fpt.load_model` gives it.
        folder: Where the files go.

    Returns:
        The files, one in each format.

    Raises:
        ValueError: If the backbone gives no maps.
        OSError: If the files cannot be written.
    """
    from fpt.attention_maps import attention_maps, examples

    task = point.config.task
    assert isinstance(task, BitTask)
    batch = examples(task, 1)
    maps = attention_maps(model, batch)[:, 0]
    title = f"Attention of {point.label or point.trial_id}"
    return save(attention(maps, tokens_of(task, batch), title), folder / file_stem(point))


def heads_of(point: Point, model: Model) -> pd.DataFrame:
    """Return what kind of fixed point each head of a finished trial on a bit task finds.

    Args:
        point: As for `draw_attention`.
        model: Likewise.

    Returns:
        A row a head: trial_id, label, layer and head from 0, tokens of a sequence, examples,
        share (median over queries of the visible tokens that hold 90 % of the attention), kind.
    """
    import pandas as pd

    from fpt.attention_maps import attention_maps, examples, fixed_points

    task = point.config.task
    assert isinstance(task, BitTask)
    maps = attention_maps(model, examples(task, EXAMPLES))
    shares, kinds = fixed_points(maps, point.config.backbone.row.causal)
    layers, heads = shares.shape
    return pd.DataFrame(
        {
            "trial_id": point.trial_id,
            "label": point.label or point.trial_id,
            "layer": np.repeat(np.arange(layers), heads),
            "head": np.tile(np.arange(heads), layers),
            "tokens": maps.shape[-1],
            "examples": maps.shape[1],
            "share": shares.ravel(),
            "kind": kinds.ravel(),
        }
    )
