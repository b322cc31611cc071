"""Axes and zips: the choices that a block's trials are the product of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fpt.config import TrialConfig
from sweep.sweepfile.document import Location, Report, label
from sweep.sweepfile.fields import FieldNames, FieldReader, FieldTree, nested, overlap
from sweep.sweepfile.schema import OBJECTS, Block, SweepFile


@dataclass(frozen=True, eq=False, slots=True)
class Choice:
    """A point of an axis, or the points of axes that go in step."""

    labels: dict[str, str]
    """Axis -> label."""
    fields: FieldTree
    """What it sets."""


def product(
    dimensions: Sequence[Sequence[Choice]], labels: dict[str, str], fields: FieldTree
) -> Iterator[Choice]:
    """Yield each way to choose from every dimension, the last one changing fastest.

    Args:
        dimensions: What is chosen from.
        labels: Chosen already.
        fields: What they set.
    """
    if not dimensions:
        yield Choice(labels, fields)
        return
    for choice in dimensions[0]:
        under = {**labels, **choice.labels}
        yield from product(dimensions[1:], under, fields.merge(choice.fields))


def size(spec: SweepFile, block: Block) -> int:
    """Return how many trials a block makes, before `exclude`, by what is written alone."""
    axes = {**spec.axes, **block.axes}
    zipped = (max(map(len, group.values()), default=1) for group in block.zip or spec.zip)
    return math.prod((*map(len, axes.values()), *zipped))


class AxisReader:
    """The axes of a file, each read once."""

    def __init__(
        self, spec: SweepFile, names: FieldNames, fields: FieldReader, report: Report
    ) -> None:
        """Read the axes of a file.

        Args:
            spec: What it says.
            names: The names of its fields.
            fields: Reads what a point sets.
            report: Takes problems.
        """
        self._spec = spec
        self._names = names
        self._fields = fields
        self._report = report
        self._read: dict[Location, list[Choice]] = {}

    @property
    def choices(self) -> Iterator[Choice]:
        """Every point that was read."""
        return itertools.chain.from_iterable(self._read.values())

    def dimensions(self, at: Location, block: Block, block_place: Location) -> list[list[Choice]]:
        """Return the axes of a block, each with its choices; those that go in step are one.

        Args:
            at: The block's place; () is the file itself.
            block: The block.
            block_place: What a problem with the block as a whole points at.
        """
        axes = {name: self._axis(name, one, ("axes",)) for name, one in self._spec.axes.items()}
        if at:
            own = block.axes.items()
            axes |= {name: self._axis(name, points, (*at, "axes")) for name, points in own}
        # An axis of which no point can be used has its problem; the others are still to be judged.
        out = [choices for choices in axes.values() if choices]

        steps = (*at, "zip") if block.zip else ("zip",)
        for number, group in enumerate(block.zip or self._spec.zip):
            here = (*steps, number)
            lengths = {name: len(points) for name, points in group.items()}
            if len(set(lengths.values())) > 1:
                counts = ", ".join(f"{name} has {count}" for name, count in lengths.items())
                what = f"axes that go in step have to be of one length; {counts}"
                self._report.left_out(here, what)
                continue
            for name in group.keys() & axes.keys():
                self._report((*here, name), "is an axis of this block already")
            zipped = {name: self._axis(name, points, here) for name, points in group.items()}
            axes |= zipped
            if all(zipped.values()):
                out.append([_together(row) for row in zip(*zipped.values(), strict=False)])

        self._check_overlap(axes, block_place)
        if at:
            self._check_dead(at, block, axes)
        return out

    def _check_overlap(self, axes: Mapping[str, list[Choice]], block_place: Location) -> None:
        paths = {
            name: {path for choice in choices for path, _ in choice.fields.leaves()}
            for name, choices in axes.items()
        }
        for (one, ours), (other, theirs) in itertools.combinations(paths.items(), 2):
            both = {path for path in ours if any(overlap(path, their) for their in theirs)}
            for path in sorted(both):
                self._report(block_place, f"the axes {one} and {other} both set {'.'.join(path)}")

    def _check_dead(self, at: Location, block: Block, axes: Mapping[str, list[Choice]]) -> None:
        # What a block fixes under `trial` must not be set by an axis that it took over.
        for path, leaf in self._fields.tree(block.trial, (*at, "trial")).leaves():
            for name, choices in axes.items():
                if choices and all(path in dict(one.fields.leaves()) for one in choices):
                    what = f"never used, since every point of axis {name} sets it; give that axis"
                    self._report(leaf.at, f"{what} in this block too, with one point")

    def _axis(self, name: str, points: Sequence[Any], inside: Location) -> list[Choice]:
        at = (*inside, name)
        if at in self._read:
            return self._read[at]
        out: dict[str, Choice] = {}
        for number, point in enumerate(points):
            here = (*at, number)
            own = label(point)
            fields = self._point(name, point, at, here)
            if fields is None:
                self._report.complete = False
            elif own in out:
                first = self._report.document.line((*at, list(out).index(own)))
                hint = "; give each point a label" if isinstance(point, Mapping) else ""
                self._report(here, f"{own!r} is given twice, first on line {first}{hint}")
            else:
                out[own] = Choice({name: own}, fields)
        self._read[at] = list(out.values())
        return self._read[at]

    def _point(self, name: str, point: Any, at: Location, here: Location) -> FieldTree | None:
        # What a point of an axis sets; None: it cannot be used.
        path = tuple(name.split("."))
        own = point
        if isinstance(point, Mapping):
            own = {key: value for key, value in point.items() if key != "label"}
            heads = {key.split(".")[0] for key in own}
            if name not in OBJECTS or (
                "name" not in own and (not own or heads & TrialConfig.model_fields.keys())
            ):
                if "label" in point:
                    return self._fields.tree(own, here)
                self._report(here, "a point that sets several fields needs a label")
                return None
        if not self._names.is_field(name):
            allowed = self._names.under(path[:-1]) or self._names.under(())
            what = "no such field (an axis of another name has points {label: ..., field: ...})"
            self._report(at, what, given=path[-1], allowed=allowed)
            return None
        return FieldTree({path[0]: nested(path[1:], self._fields.node(own, here, path))})


def _together(choices: Sequence[Choice]) -> Choice:
    labels: dict[str, str] = {}
    fields = FieldTree()
    for choice in choices:
        labels |= choice.labels
        fields = fields.merge(choice.fields)
    return Choice(labels, fields)
