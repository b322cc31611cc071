"""Trials: from the axes of a sweep file to configs with identities.

A trial is a fact and belongs to no sweep: its id is a hash of everything that can change its
numbers. A `Point` is a trial as one sweep sees it, with the labels of that sweep's axes. Fields
come in three layers, of which the later one wins: `trial`, the `defaults` that apply, points.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from fpt.backbones import BACKBONE_GROUP, BACKBONES
from fpt.backbones.sources import PACKAGE, RANDOM, TRIAL, package_folders
from fpt.config import AnyTask, BackboneConfig, Seed, TrialConfig
from fpt.files import DataError
from fpt.plugins import look_in, registered
from fpt.spec import JSON
from fpt.tasks import TASKS
from sweep.sweepfile import lock, pairing, reading, schema
from sweep.sweepfile.document import Location, Problems, SweepFileError, label, spell
from sweep.sweepfile.schema import Block, ClaimSpec, KeepSpec, SweepFile, TableSpec
from sweep.sweepfile.tuning_spec import TuneSpec

IDENTITY_VERSION = 2
"""Raised when ids change their meaning; it is part of every id."""

ADDED_FIELDS: dict[str, object] = {"backbone.groups": [], "evaluation.training_set": 0}
"""Fields that trials got after the first release (dotted paths), with the value at which a trial
does what it did before: there the field is left out of the hash, so that the ids of old trials
stay."""

MOST_TRIALS = 100_000
"""Trials that a file may make, those that `exclude` leaves out counted: to expand so many takes
some seconds."""

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)

_HERE = "\0seed\0"
# Stands for a seed in the canonical text of a trial. No field can hold it: a NUL is in no name and
# in no path.


def hashed(identity: JSON) -> JSON:
    """What of a trial's identity is hashed: all but fields that were added, where they do nothing.

    Args:
        identity: As `TrialConfig.identity` gives it.
    """
    for path, old in ADDED_FIELDS.items():
        identity = _without(identity, path, old)
    return identity


def _without(identity: JSON, path: str, old: object) -> JSON:
    name, _, inner = path.partition(".")
    if inner and isinstance(identity.get(name), dict):
        return {**identity, name: _without(identity[name], inner, old)}
    same = not inner and name in identity and identity[name] == old
    return {key: value for key, value in identity.items() if key != name} if same else identity


def _canonical(identity: JSON) -> str:
    return _CANONICAL.encode({"identity_version": IDENTITY_VERSION, **hashed(identity)})


def _hash(canonical: str) -> str:
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _digest(identity: JSON) -> str:
    return _hash(_canonical(identity))


def _of_cell(config: TrialConfig, identity: JSON) -> JSON:
    # A backbone_seed that follows the seed is a draw that the cell's interval includes; a fixed one
    # is the same for the whole cell and belongs to it.
    fixed = None if config.drawn_from is None else config.backbone_seed
    kept = {name: value for name, value in identity.items() if name != "seed"}
    return kept | {"backbone_seed": fixed}


def trial_id(config: TrialConfig) -> str:
    """The first 12 hex digits of the SHA-256 of everything that can change the trial's numbers.

    Raises:
        DataError: If the content behind a path of the config has to be read and is not there.
    """
    return _digest(config.identity())


def cell_id(config: TrialConfig) -> str:
    """The id of a trial's cell: the trial without its seed, nor a backbone_seed that follows it.

    Raises:
        DataError: As `trial_id`.
    """
    return _digest(_of_cell(config, config.identity()))


@dataclass(frozen=True)
class Point:
    """A trial as one sweep sees it."""

    trial_id: str
    cell_id: str
    like: TrialConfig = field(compare=False)
    """The config of a trial of its cell, which all of them share: right but for the seed."""
    labels: Mapping[str, str]
    """Axis -> label, in the order of the axes; of a pretraining, {"backbone": name}."""
    where: str
    """`file:line` of the block that it came from."""
    undecided: str = ""
    """Why its learning rate is not known yet, where `tune:` is to choose it: the config holds only
    the default then, and the ids stand for those to come; no trial has them."""
    seed: int | None = field(default=None, compare=False)
    """Its own seed; None: that of `like`."""

    @functools.cached_property
    def config(self) -> TrialConfig:
        """All that can change its numbers; made when asked for, since few of many points are."""
        if self.seed in (None, self.like.seed):
            return self.like
        return self.like.model_copy(update={"seed": self.seed})

    @property
    def identity(self) -> JSON:
        """The config as its id is made of it; `tuned` where the learning rate is not known yet."""
        whole = self.config.identity()
        return whole | {"learning_rate": "tuned"} if self.undecided else whole

    @property
    def parent(self) -> str | None:
        """The id of the trial whose backbone this one takes, or None."""
        return self.like.parent

    @property
    def label(self) -> str:
        """All labels in one, such as image/bit-xor/0: for people, never parsed."""
        return "/".join(self.labels.values())


@dataclass(frozen=True)
class Study:
    """A cell of a sweep with `tune:`: its learning rate is chosen by trials of their own.

    Those are ordinary trials, of the cell's config with a rate and a seed of `tune:`.
    """

    points: tuple[Point, ...]
    """The cell's own trials, undecided."""
    tune: TuneSpec
    cell_of: str
    """The id of the cell at the default learning rate, by which it was found."""
    _tried: dict[tuple[float, int], tuple[Point, ...]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def cell_id(self) -> str:
        """The id of the cell, its learning rate left open."""
        return self.points[0].cell_id

    @functools.cached_property
    def labels(self) -> dict[str, str]:
        """The labels that all of the cell's trials share, but for the seed's."""
        first, *rest = (point.labels for point in self.points)
        return {
            axis: name
            for axis, name in first.items()
            if axis != "seed" and all(other.get(axis) == name for other in rest)
        }

    @property
    def label(self) -> str:
        """The cell for people."""
        return "/".join(self.labels.values()) or "the cell"

    @property
    def first_steps(self) -> int:
        """The steps after which the median rule is asked; without it, all."""
        config = self.points[0].config
        if self.tune.prune is None:
            return config.steps
        every = config.evaluation.every
        return math.ceil(self.tune.prune * config.steps / every) * every

    def trials(self, rate: float, steps: int) -> tuple[Point, ...]:
        """The trials that try a rate, one a seed of `tune:`."""
        if (rate, steps) in self._tried:
            return self._tried[rate, steps]
        like = self.points[0]
        said = f"rate {rate:.15g}"
        if steps < like.config.steps:
            said += f", {steps} steps"
        cell = _at_rate(like.config, rate, steps)
        self._tried[rate, steps] = tuple(
            cell.point(seed, {**self.labels, "seed": str(seed), "tuning": said}, like.where)
            for seed in self.tune.seeds
        )
        return self._tried[rate, steps]

    @property
    def first(self) -> tuple[Point, ...]:
        """The trials that are known before any has ended."""
        return tuple(
            point for rate in self.tune.rates for point in self.trials(rate, self.first_steps)
        )

    def decided(self, rate: float) -> tuple[Point, ...]:
        """The cell's own trials, as they are once the rate is chosen."""
        like = self.points[0].config
        cell = _at_rate(like, rate, like.steps)
        return tuple(cell.point(p.config.seed, p.labels, p.where) for p in self.points)


def _opened(points: Sequence[Point], studies: Sequence[Study]) -> tuple[Point, ...]:
    # The points of a sweep, undecided where they are tuned.
    if not studies:
        return tuple(points)
    cells = {study.cell_of: iter(study.points) for study in studies}
    return tuple(next(cells[point.cell_id]) for point in points)


def _at_rate(config: TrialConfig, rate: float, steps: int) -> _Cell:
    config = config.model_copy(update={"learning_rate": rate, "steps": steps})
    return _Cell.of({}, config, config.identity())


def _undecided(points: Sequence[Point], tune: TuneSpec) -> tuple[Point, ...]:
    # The trials of a cell, without their learning rate.
    like, why = points[0].config, being_tuned(0, tune)
    cell = _Cell.of({}, like, like.identity() | {"learning_rate": "tuned"})
    return tuple(
        replace(cell.point(p.config.seed, p.labels, p.where), undecided=why) for p in points
    )


def being_tuned(ended: int, tune: TuneSpec) -> str:
    """What is said of a trial whose learning rate is still to be chosen."""
    return f"being tuned ({ended} of {tune.budget} points)"


@dataclass(frozen=True)
class LeftOut:
    """Trials that a pattern with a condition leaves out on this machine."""

    trials: int
    """How many."""
    pattern: str
    """Which: `task mnist`; empty where the pattern has nothing but its condition."""
    why: str
    """`../data/mnist is not there`, with the path as it was written."""

    def __str__(self) -> str:
        of = f" of {self.pattern}" if self.pattern else ""
        return f"{self.trials:,} trial{'' if self.trials == 1 else 's'}{of}: {self.why}"


@dataclass(frozen=True)
class Sweep:
    """A sweep file, expanded."""

    name: str
    file: Path
    text: str
    """The file's text, kept as provenance."""
    points: tuple[Point, ...]
    """The trials of the axes, in order; no id occurs twice."""
    pretrainings: tuple[Point, ...]
    """The trials of `backbones:`, run first, each after those that it depends on."""
    axes: tuple[str, ...]
    """The names of the axes, in order."""
    spec: SweepFile
    """What the file says."""
    left_out: tuple[LeftOut, ...] = ()
    """What `missing` and `present` leave out here, and would not leave out everywhere."""
    warnings: tuple[str, ...] = ()
    """What is allowed and hardly meant: claims that lose pairs to `exclude`, each with its place in
    the file."""
    studies: tuple[Study, ...] = ()
    """The cells that are tuned; empty without `tune:`. `sweep.planning.tuning.resolve` puts trials
    in place of the points of a cell whose learning rate the ledger decides."""
    tunings: tuple[Point, ...] = ()
    """The trials by which learning rates are chosen, as far as they are known. No table shows
    them."""

    @property
    def undecided(self) -> tuple[Point, ...]:
        """The points whose learning rate is still to be chosen."""
        return tuple(point for point in self.points if point.undecided)

    @property
    def table(self) -> TableSpec | None:
        """The table that the sweep fills."""
        return self.spec.table

    @property
    def keep(self) -> KeepSpec:
        """What is kept of finished trials."""
        return self.spec.keep

    @property
    def keeps_backbones(self) -> frozenset[str]:
        """The ids of the trials whose backbone is kept once they are done."""
        if self.keep.backbones:
            return frozenset(point.trial_id for point in self.all)
        parents = (point.parent for point in self.points if point.parent is not None)
        return frozenset((*parents, *(point.trial_id for point in self.pretrainings)))

    @property
    def all(self) -> tuple[Point, ...]:
        """Pretrainings, trials of tuning and points, each id once."""
        ids = {point.trial_id for point in self.pretrainings}
        others = (*self.tunings, *self.points) if self.tunings else self.points
        return (*self.pretrainings, *(one for one in others if one.trial_id not in ids))

    def matching(self, pattern: str) -> tuple[Point, ...]:
        """The trials whose label fits a glob, or whose id begins so (with four digits at least).

        Raises:
            SweepFileError: If there is none.
        """
        found = tuple(
            point
            for point in self.all
            if pattern == point.label
            or fnmatch.fnmatchcase(point.label, pattern)
            or (len(pattern) >= 4 and point.trial_id.startswith(pattern))
        )
        if not found:
            like = ", ".join(repr(point.label) for point in self.all[:3])
            problem = f"{self.file}: no trial matches {pattern!r}; labels look like {like}"
            raise SweepFileError([problem])
        return found

    def only(self, patterns: Sequence[str]) -> Sweep:
        """The sweep with no other trials than those that match, and what trains before them:
        the pretrainings they need, the trials that tune them.

        Args:
            patterns: As for `matching`; none leaves the sweep as it is.

        Raises:
            SweepFileError: If a pattern matches nothing.
        """
        if not patterns:
            return self
        parents = {point.trial_id: point.parent for point in self.all}
        studies: list[Study] = []
        kept: set[str] = set()
        for point in itertools.chain.from_iterable(map(self.matching, patterns)):
            name: str | None = point.trial_id
            while name is not None and name in parents and name not in kept:
                kept.add(name)
                name = parents[name]
        points = tuple(point for point in self.points if point.trial_id in kept)
        labels = {point.label for point in points}
        for study in self.studies:
            if own := tuple(point for point in study.points if point.label in labels):
                studies.append(replace(study, points=own))
                kept.update(point.trial_id for point in study.first)
        return replace(
            self,
            points=points,
            pretrainings=tuple(point for point in self.pretrainings if point.trial_id in kept),
            studies=tuple(studies),
            tunings=tuple(point for point in self.tunings if point.trial_id in kept),
        )


def load(path: str | Path, *, locked: bool = True) -> Sweep:
    """Read and expand a sweep file, with the lock beside it, if there is one (`sweepfile.lock`).

    Args:
        path: The sweep file.
        locked: False leaves the lock aside, as those have to who are about to make it.

    Raises:
        SweepFileError: With all problems, if there are any.
    """
    spec, problems = reading.read(path)
    if spec is None:
        raise problems.error()
    look_in(spec.document.file.resolve().parent)
    expansion = _Expansion(spec, problems)
    if locked:
        try:
            expansion.lock = lock.read(spec.document.file)
        except lock.LockError as error:
            problems.add(0, "", str(error))
    pretrainings, points = expansion.pretrainings(), expansion.points()
    warnings = expansion.check_claims(points)
    studies = expansion.studies(points)
    if problems:
        raise problems.error()
    return Sweep(
        name=spec.sweep,
        file=spec.document.file,
        text=spec.document.text,
        points=_opened(points, studies),
        pretrainings=pretrainings,
        axes=tuple(reading.axis_labels(spec)),
        spec=spec,
        left_out=expansion.left_out(),
        warnings=warnings,
        studies=studies,
        tunings=tuple(point for study in studies for point in study.first),
    )


# --- fields as trees ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class _Leaf:
    # A value of a field as it was written, and where.
    value: Any
    at: Location


_Tree = dict[str, "_Leaf | _Tree"]
# Fields as nested mappings of leaves. No tree is changed once it is made, and a merge of the same
# two gives the same object, so that a task which 1,000 seeds share is validated once.

_Path = tuple[str, ...]


def _leaves(tree: _Tree, under: _Path = ()) -> Iterator[tuple[_Path, _Leaf]]:
    for name, node in tree.items():
        if isinstance(node, _Leaf):
            yield (*under, name), node
        else:
            yield from _leaves(node, (*under, name))


def _descend(tree: _Tree, path: Sequence[Any]) -> tuple[_Leaf | _Tree, int]:
    # The deepest node on a path, and how many steps lead to it.
    node: _Leaf | _Tree = tree
    for depth, part in enumerate(path):
        if not isinstance(node, dict) or part not in node:
            return node, depth
        node = node[part]
    return node, len(path)


def _nested(path: Sequence[str], node: _Leaf | _Tree) -> _Leaf | _Tree:
    for part in reversed(path):
        node = {part: node}
    return node


def _plain(node: _Leaf | _Tree) -> Any:
    if isinstance(node, _Leaf):
        return node.value
    return {name: _plain(inner) for name, inner in node.items()}


def _place(node: _Leaf | _Tree) -> Location:
    # Where a node stands; of fields that were written in several places, the last one's.
    if isinstance(node, _Leaf):
        return node.at
    at: Location = ()
    for path, leaf in _leaves(node):
        at = leaf.at
        for part in reversed(path):
            key = str(at[-1])
            if key != part and not key.endswith(f".{part}"):
                break
            at = at[:-1] if key == part else (*at[:-1], key.removesuffix(f".{part}"))
    return at


def _overlap(one: _Path, other: _Path) -> bool:
    return all(a == b for a, b in zip(one, other, strict=False))


@dataclass(frozen=True, eq=False, slots=True)
class _Choice:
    # A point of an axis, or the points of axes that go in step.
    labels: dict[str, str]
    fields: _Tree


@dataclass(frozen=True, slots=True)
class _Pattern:
    # An entry of `exclude`, read.
    fields: Mapping[str, Any]
    # Axis or field -> what fits; a pattern without any fits every trial.
    why: str | None
    # Of one with a condition: why it applies on this machine.
    applies: bool


# --- expansion ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cell:
    # A trial, but for its seed.
    fields: _Tree
    # Kept, since the ids of its nodes are what it is found by.
    cell_id: str
    config: TrialConfig
    canonical: tuple[str, ...]
    # What the id is a hash of, cut where the seed belongs.

    @classmethod
    def of(cls, fields: _Tree, config: TrialConfig, identity: JSON) -> _Cell:
        open_ = {"seed": _HERE}
        if config.drawn_from is not None and config.backbone_seed is None:
            open_["backbone_seed"] = _HERE
        canonical = _canonical(identity | open_).split(_CANONICAL.encode(_HERE))
        return cls(fields, _digest(_of_cell(config, identity)), config, tuple(canonical))

    def point(self, seed: int, labels: Mapping[str, str], where: str) -> Point:
        trial = _hash(str(seed).join(self.canonical))
        return Point(trial, self.cell_id, self.config, labels, where, seed=seed)


class _Expansion:
    # From the blocks of a file to points. Goes on past problems, so that all are told.

    def __init__(self, spec: SweepFile, problems: Problems) -> None:
        self.spec = spec
        self.document = spec.document
        self.problems = problems
        # Once a part of the file was left out, something may seem missing or unused that is not.
        self.whole = not problems
        self.adapters = {
            name: TypeAdapter[Any](AnyTask if name == "task" else specs[0])
            for name, specs in schema.OBJECTS.items()
        }
        # Memos by the identity of trees; the trees are kept, or their ids could be used again.
        self.merged: dict[tuple[int, int], tuple[_Tree, _Tree, _Tree]] = {}
        self.objects: dict[int, tuple[_Tree, Any]] = {}
        self.layers: dict[tuple[Any, ...], tuple[_Tree, _Tree]] = {}
        self.cells: dict[tuple[int, ...], _Cell] = {}

        self.trial = self.tree(spec.trial, ("trial",))
        self.axes = set(reading.axis_labels(spec))
        self.defaults = {
            (field, value): self.tree(fields, ("defaults", field, value))
            for field, by_value in spec.defaults.items()
            for value, fields in by_value.items()
            if self.known_field(field, ("defaults", field))
        }
        self.used_defaults: set[tuple[str, str]] = set()
        self.patterns_read: dict[Location, _Pattern | None] = {}
        self.used_patterns: set[Location] = set()
        self.left_out_by: Counter[Location] = Counter()
        # All that patterns leave out, by the first pattern that does.
        self.excluded: Counter[Location] = Counter()
        # What patterns leave out of the arms of claims: its labels, and the pattern.
        self.unpaired: list[tuple[dict[str, str], Location]] = []
        self.choices: dict[Location, list[_Choice]] = {}
        self.kept: dict[str, Point | None] = {}
        self.open: list[str] = []
        self.lock = lock.Lock()
        # Problems with a trial as a whole: (place, message) -> the labels of the trials.
        self.of_trials: dict[tuple[Location, str], list[str]] = {}

    def tell(self, at: Location, what: str, **more: Any) -> None:
        self.problems.add(self.document.line(at), spell(at), what, **more)

    def known_field(self, name: str, at: Location) -> bool:
        if reading.is_field(name) or name in self.axes:
            return True
        *parents, last = name.split(".")
        allowed = reading.field_names(tuple(parents)) or (*reading.field_names(()), *self.axes)
        self.tell(at, "neither a field of the trial nor an axis", given=last, allowed=allowed)
        self.whole = False
        return False

    # What the file makes.

    def pretrainings(self) -> tuple[Point, ...]:
        ids: dict[str, str] = {}
        for name in self.spec.backbones:
            at = ("backbones", name)
            if name in schema.BUILT_IN or name.startswith(TRIAL):
                self.tell(at, "is the name of a pretraining already; choose another one")
            point = self.pretraining(name)
            if point is not None and ids.setdefault(point.trial_id, name) != name:
                self.tell(at, f"is one and the same trial as backbones.{ids[point.trial_id]}")
        return tuple(point for point in self.kept.values() if point is not None)

    def points(self) -> tuple[Point, ...]:
        out: dict[str, Point] = {}
        if self.too_many():
            return ()
        same: dict[tuple[Location, str], list[tuple[Point, Point]]] = {}
        for at, block in self.spec.blocks():
            for point in self.block(at, block):
                first = out.setdefault(point.trial_id, point)
                if first is not point:
                    differing = [
                        f"points {first.labels.get(axis)!r} and {name!r} of axis {axis}"
                        for axis, name in point.labels.items()
                        if first.labels.get(axis) != name
                    ]
                    what = " with ".join(differing) or f"this block and the one at {first.where}"
                    same.setdefault((at, what), []).append((first, point))
        for (at, what), pairs in same.items():
            first, point = pairs[0]
            more = f", and {len(pairs) - 1:,} more pairs" if pairs[1:] else ""
            which = f"{first.label} and {point.label} ({point.trial_id}){more}"
            self.tell(self.block_place(at), f"{what} make one and the same trial: {which}")
        for (at, what), labels in self.of_trials.items():
            more = f" (and {len(labels) - 1:,} more trials)" if labels[1:] else ""
            self.tell(at, f"{labels[0]}: {what}{more}")
        if self.whole:
            for field, value in self.defaults.keys() - self.used_defaults:
                self.tell(("defaults", field, value), f"no trial's {field} is {value!r}")
            for place in self.patterns_read.keys() - self.used_patterns:
                self.tell(place, "leaves out nothing")
        if not out and self.excluded:
            self.tell_nothing_left()
        return tuple(out.values())

    def too_many(self) -> bool:
        # Counted before any is made, and by what was written: an axis has a point for each entry.
        def count(group: Mapping[str, Sequence[Any]], steps: Iterable[Mapping[str, Any]]) -> int:
            zipped = (max(map(len, one.values()), default=1) for one in steps)
            return math.prod((*map(len, group.values()), *zipped))

        sizes = {
            at: count({**self.spec.axes, **block.axes}, block.zip or self.spec.zip)
            for at, block in self.spec.blocks()
        }
        total = sum(sizes.values())
        if total <= MOST_TRIALS:
            return False
        largest = max(sizes, key=sizes.__getitem__)
        most = f"the most is {MOST_TRIALS:,}, before `exclude` is asked"
        whole = "" if len(sizes) == 1 else f", the file {total:,}"
        self.tell(self.block_place(largest), f"makes {sizes[largest]:,} trials{whole}; {most}")
        return True

    def tell_nothing_left(self) -> None:
        # A sweep without any trial would be done before it began.
        places = sorted(self.excluded)
        whys = dict.fromkeys(
            pattern.why for one in places if (pattern := self.patterns_read[one]) and pattern.why
        )
        gone = sum(self.excluded.values())
        all_ = "the only trial" if gone == 1 else f"all {gone:,} trials"
        here = f" on this machine ({', '.join(whys)})" if whys else ""
        if len(places) == 1:
            self.tell(places[0], f"leaves out {all_}{here}; a sweep has at least one")
            return
        named = " and ".join(f"{spell(one)} (line {self.document.line(one)})" for one in places)
        self.tell(("exclude",), f"{named} leave out {all_}{here}; a sweep has at least one")

    def studies(self, points: Sequence[Point]) -> tuple[Study, ...]:
        # The cells of a sweep with `tune:`. A rate that is given has no say there, and is an error.
        tune = self.spec.tune
        if tune is None:
            return ()
        for fields in self.written():
            if "learning_rate" in fields:
                what = "never used, since `tune:` chooses the learning rate; leave it out"
                self.tell(_place(fields["learning_rate"]), what)
        cells: dict[str, list[Point]] = {}
        for point in points:
            cells.setdefault(point.cell_id, []).append(point)
        studies = tuple(Study(tuple(own), tune, cell) for cell, own in cells.items())
        refused: dict[str, list[Study]] = {}
        for study in studies:
            if what := self.untunable(study):
                refused.setdefault(what, []).append(study)
        for what, own in refused.items():
            more = f" (and {len(own) - 1:,} more cells)" if own[1:] else ""
            self.tell(("tune",), f"{own[0].label}: {what}{more}")
        for seed in {point.config.seed for point in points} & set(tune.seeds):
            what = f"{seed} is a seed of the sweep's own; choose by others"
            self.tell(("tune", "seeds"), what)
        if self.problems:
            return ()
        return tuple(replace(study, points=_undecided(study.points, tune)) for study in studies)

    def written(self) -> Iterator[_Tree]:
        # The fields of the file, but for those of its pretrainings.
        yield self.trial
        yield from self.defaults.values()
        for at, block in self.spec.blocks():
            if at:
                yield self.tree(block.trial, (*at, "trial"))
        for choices in self.choices.values():
            yield from (choice.fields for choice in choices)

    @staticmethod
    def untunable(study: Study) -> str:
        # Why the learning rate of a cell cannot be chosen; empty if it can.
        config, prune = study.points[0].config, study.tune.prune
        if config.protocol == "paper":
            return (
                "the protocol paper has no validation split to tune by, and a rate chosen by the "
                "test set would flatter it; use `protocol: sound`, or make the rates an axis"
            )
        if prune is None:
            return ""
        if config.stop is not None or config.optimizer.schedule != "constant":
            return "prune: needs a constant schedule and no stop rule, so that a rate can go on"
        if study.first_steps >= config.steps:
            return (
                f"prune: {prune:g} of {config.steps} steps, up to the next evaluation (every "
                f"{config.evaluation.every}), is all of them"
            )
        return ""

    def block_place(self, at: Location) -> Location:
        # What to point at for a block as a whole.
        said = self.spec.model_fields_set
        return at or next(((key,) for key in ("axes", "zip", "trial") if key in said), ())

    def block(self, at: Location, block: Block) -> Iterator[Point]:
        trial = self.trial
        if at:
            trial = self.merge(trial, self.tree(block.trial, (*at, "trial")))
        dimensions = self.dimensions(at, block)
        patterns = self.patterns(at, block)
        where = f"{self.document.file}:{self.document.line(self.block_place(at))}"
        # Without defaults, which lie between them, what is chosen goes straight onto the trial.
        under = {} if self.defaults else trial
        for labels, chosen in self.product(dimensions, {}, under):
            fields = self.layered(trial, labels, chosen) if self.defaults else chosen
            fitting = [place for place, one in patterns.items() if self.fits(one, labels, fields)]
            self.used_patterns.update(fitting)
            if out := [place for place in fitting if patterns[place].applies]:
                self.excluded[out[0]] += 1
                if all(patterns[place].why for place in out):
                    self.left_out_by[out[0]] += 1
                if any(labels.get(claim.axis) in claim.sides for claim in self.spec.claims):
                    self.unpaired.append((labels, out[0]))
                continue
            point = self.point(fields, labels, where, at)
            if point is not None:
                yield point

    def product(
        self, dimensions: Sequence[Sequence[_Choice]], labels: dict[str, str], fields: _Tree
    ) -> Iterator[tuple[dict[str, str], _Tree]]:
        if not dimensions:
            yield labels, fields
            return
        for choice in dimensions[0]:
            yield from self.product(
                dimensions[1:], {**labels, **choice.labels}, self.merge(fields, choice.fields)
            )

    def pretraining(self, name: str) -> Point | None:
        # The trial behind an entry of `backbones:`; None if it has a problem, which is told.
        if name in self.open:
            loop = " -> ".join((*self.open[self.open.index(name) :], name))
            self.tell(("backbones", name), f"takes the backbone that it trains itself: {loop}")
            return None
        if name not in self.kept:
            at = ("backbones", name)
            own: _Tree = {"pretraining": _Leaf(RANDOM, at), "train": _Leaf("all", at)}
            own = self.merge(own, self.tree(self.spec.backbones[name], at))
            self.open.append(name)
            where = f"{self.document.file}:{self.document.line(at)}"
            point = self.point(self.layered(self.trial, {}, own), {"backbone": name}, where, at)
            self.open.pop()
            self.kept[name] = point  # After those that it depends on.
        return self.kept[name]

    # Fields to trees, trees to one tree.

    def tree(self, fields: Mapping[str, Any], at: Location, under: _Path = ()) -> _Tree:
        out: _Tree = {}
        for key, value in fields.items():
            head, *inner = key.split(".")
            here = (*at, key)
            node = _nested(inner, self.node(value, here, (*under, head, *inner)))
            before = out.get(head)
            if before is not None and self.twice(before, node):
                self.tell(here, "given twice in one place")
                node = before
            elif isinstance(before, dict) and isinstance(node, dict):
                node = self.merge(before, node)
            out[head] = node
        return out

    @staticmethod
    def twice(one: _Leaf | _Tree, other: _Leaf | _Tree) -> bool:
        if isinstance(one, _Leaf) or isinstance(other, _Leaf):
            return True
        theirs = [path for path, _ in _leaves(other)]
        return any(_overlap(path, their) for path, _ in _leaves(one) for their in theirs)

    def node(self, value: Any, at: Location, path: _Path) -> _Leaf | _Tree:
        if isinstance(value, Mapping) and value:
            return self.tree(value, at, path)
        if isinstance(value, str) and len(path) == 1 and path[0] in schema.NAMED:
            return {"name": _Leaf(value, at)}
        is_path = isinstance(value, str) and ".".join(path) in schema.PATHS
        if is_path and not value.startswith(schema.NO_PATH):
            # Absolute, since workers run elsewhere.
            whole = os.path.join(self.document.file.parent, os.path.expanduser(value))
            value = os.path.abspath(whole)
        return _Leaf(value, at)

    def merge(self, under: _Tree, over: _Tree) -> _Tree:
        out = dict(under)
        for name, node in over.items():
            before = out.get(name)
            if isinstance(node, dict) and isinstance(before, dict):
                key = (id(before), id(node))
                if key not in self.merged:
                    self.merged[key] = (before, node, self.merge(before, node))
                node = self.merged[key][2]
            out[name] = node
        return out

    def layered(self, trial: _Tree, labels: Mapping[str, str], chosen: _Tree) -> _Tree:
        # `trial`, the defaults that apply, what was chosen.
        if not self.defaults:
            return self.merge(trial, chosen)
        written = self.merge(trial, chosen)
        apply = [
            (field, name)
            for field, name in self.defaults
            if name in (label(self.value(written, field)), labels.get(field))
        ]
        key = (id(trial), *apply)
        if key not in self.layers:
            under = trial
            for one in apply:
                under = self.merge(under, self.defaults[one])
                self.used_defaults.add(one)
            self.layers[key] = (trial, under)
        return self.merge(self.layers[key][1], chosen)

    def value(self, fields: _Tree, field: str) -> Any:
        # The value of a field: of a task or backbone its name; one that was not written, as the
        # trial will have it. None where there is no such field.
        path = field.split(".")
        node, depth = _descend(fields, path)
        if depth == len(path) and isinstance(node, _Leaf):
            return node.value
        if depth and isinstance(own := fields[path[0]], dict):
            value = self.object(path[0], own)
        elif path[0] in TrialConfig.model_fields:
            value = TrialConfig.model_fields[path[0]].get_default()
        else:
            return None
        if len(path) == 1:
            return getattr(value, "name", value)
        return getattr(value, path[1], None)

    def object(self, name: str, fields: _Tree) -> Any:
        # A task, backbone ... as a validated spec; if it has problems, as plain values, so that the
        # trial around it tells them.
        if id(fields) not in self.objects:
            plain = _plain(fields)
            made = plain
            if name in self.adapters:
                with contextlib.suppress(ValidationError):
                    made = self.adapters[name].validate_python(plain)
            self.objects[id(fields)] = (fields, made)
        return self.objects[id(fields)][1]

    # Axes and patterns.

    def dimensions(self, at: Location, block: Block) -> list[list[_Choice]]:
        # The axes of a block, each with its choices; those that go in step are one.
        axes = {name: self.axis(name, points, ("axes",)) for name, points in self.spec.axes.items()}
        if at:
            own = block.axes.items()
            axes |= {name: self.axis(name, points, (*at, "axes")) for name, points in own}
        # An axis of which no point can be used was told of; the others are still to be judged.
        out = [choices for choices in axes.values() if choices]

        steps = (*at, "zip") if block.zip else ("zip",)
        for number, group in enumerate(block.zip or self.spec.zip):
            here = (*steps, number)
            lengths = {name: len(points) for name, points in group.items()}
            if len(set(lengths.values())) > 1:
                counts = ", ".join(f"{name} has {count}" for name, count in lengths.items())
                self.tell(here, f"axes that go in step have to be of one length; {counts}")
                self.whole = False
                continue
            for name in group.keys() & axes.keys():
                self.tell((*here, name), "is an axis of this block already")
            zipped = {name: self.axis(name, points, here) for name, points in group.items()}
            axes |= zipped
            if all(zipped.values()):
                out.append([self.together(row) for row in zip(*zipped.values(), strict=False)])

        self.check_overlap(at, axes)
        self.check_dead(at, block, axes)
        return out

    def together(self, choices: Sequence[_Choice]) -> _Choice:
        labels: dict[str, str] = {}
        fields: _Tree = {}
        for choice in choices:
            labels |= choice.labels
            fields = self.merge(fields, choice.fields)
        return _Choice(labels, fields)

    def check_overlap(self, at: Location, axes: Mapping[str, list[_Choice]]) -> None:
        paths = {
            name: {path for choice in choices for path, _ in _leaves(choice.fields)}
            for name, choices in axes.items()
        }
        for (one, ours), (other, theirs) in itertools.combinations(paths.items(), 2):
            both = {path for path in ours if any(_overlap(path, their) for their in theirs)}
            for path in sorted(both):
                what = f"the axes {one} and {other} both set {'.'.join(path)}"
                self.tell(self.block_place(at), what)

    def check_dead(self, at: Location, block: Block, axes: Mapping[str, list[_Choice]]) -> None:
        # What a block fixes under `trial` must not be set by an axis that it took over.
        if not at:
            return
        for path, leaf in _leaves(self.tree(block.trial, (*at, "trial"))):
            for name, choices in axes.items():
                if choices and all(path in dict(_leaves(one.fields)) for one in choices):
                    what = f"never used, since every point of axis {name} sets it; give that axis"
                    self.tell(leaf.at, f"{what} in this block too, with one point")

    def axis(self, name: str, points: Sequence[Any], inside: Location) -> list[_Choice]:
        at = (*inside, name)
        if at in self.choices:
            return self.choices[at]
        out: dict[str, _Choice] = {}
        for number, point in enumerate(points):
            here = (*at, number)
            own = label(point)
            fields = self.fields_of(name, point, at, here)
            if fields is None:
                self.whole = False
            elif own in out:
                first = self.document.line((*at, list(out).index(own)))
                hint = "; give each point a label" if isinstance(point, Mapping) else ""
                self.tell(here, f"{own!r} is given twice, first on line {first}{hint}")
            else:
                out[own] = _Choice({name: own}, fields)
        self.choices[at] = list(out.values())
        return self.choices[at]

    def fields_of(self, name: str, point: Any, at: Location, here: Location) -> _Tree | None:
        # What a point of an axis sets.
        path = tuple(name.split("."))
        own = point
        if isinstance(point, Mapping):
            own = {key: value for key, value in point.items() if key != "label"}
            heads = {key.split(".")[0] for key in own}
            if name not in schema.OBJECTS or (
                "name" not in own and (not own or heads & TrialConfig.model_fields.keys())
            ):
                if "label" in point:
                    return self.tree(own, here)
                self.tell(here, "a point that sets several fields needs a label")
                return None
        if not reading.is_field(name):
            allowed = reading.field_names(path[:-1]) or reading.field_names(())
            what = "no such field (an axis of another name has points {label: ..., field: ...})"
            self.tell(at, what, given=path[-1], allowed=allowed)
            return None
        node = _nested(path[1:], self.node(own, here, path))
        return {path[0]: node}

    def patterns(self, at: Location, block: Block) -> dict[Location, _Pattern]:
        out: dict[Location, dict[str, Any]]
        out = {("exclude", number): one for number, one in enumerate(self.spec.exclude)}
        if at:
            out |= {(*at, "exclude", number): one for number, one in enumerate(block.exclude)}
        for place, pattern in out.items():
            if place not in self.patterns_read:
                self.patterns_read[place] = self.pattern(pattern, place)
        read = {place: self.patterns_read[place] for place in out}
        return {place: one for place, one in read.items() if one is not None}

    def pattern(self, written: Mapping[str, Any], at: Location) -> _Pattern | None:
        # None: it cannot be used, and why is told here or, of an empty one, by `points`.
        fields = {key: one for key, one in written.items() if key not in schema.CONDITIONS}
        known = [self.known_field(key, (*at, key)) for key in fields]
        conditions = [key for key in written if key in schema.CONDITIONS]
        if len(conditions) > 1:
            self.tell(at, "missing and present in one pattern; give each a pattern of its own")
            self.whole = False
            return None
        if not all(known) or not written:
            return None
        if not conditions:
            return _Pattern(fields, why=None, applies=True)
        (condition,) = conditions
        path = written[condition]
        if not isinstance(path, str) or not path:
            what = "has to be a path, from the sweep file's folder, or package:MODULE/FOLDER"
            self.tell((*at, condition), what)
            self.whole = False
            return None
        there = _is_there(path, self.document.file.parent)
        why = f"{path} is {'there' if there else 'not there'}"
        return _Pattern(fields, why, applies=there == (condition == "present"))

    def left_out(self) -> tuple[LeftOut, ...]:
        # In the order of the file.
        out = []
        for place, count in sorted(self.left_out_by.items()):
            pattern = self.patterns_read[place]
            assert pattern is not None
            assert pattern.why is not None
            which = ", ".join(f"{key} {_wanted(one)}" for key, one in pattern.fields.items())
            out.append(LeftOut(count, which, pattern.why))
        return tuple(out)

    def fits(self, pattern: _Pattern, labels: Mapping[str, str], fields: _Tree) -> bool:
        return all(
            (key in labels and _fits(wanted, labels[key]))
            or (reading.is_field(key) and _fits(wanted, self.value(fields, key)))
            for key, wanted in pattern.fields.items()
        )

    # Trees to trials.

    def point(
        self, fields: _Tree, labels: dict[str, str], where: str, at: Location
    ) -> Point | None:
        # The seeds of a cell share all nodes but their own, so that the rest is judged, and made
        # into an identity, once.
        key = tuple([id(node) for name, node in fields.items() if name != "seed"])
        cell, seed = self.cells.get(key), fields.get("seed")
        if cell is not None and isinstance(seed, _Leaf) and _is_seed(seed.value):
            return cell.point(seed.value, labels, where)
        config = self.config(fields, labels, at)
        if config is None:
            return None
        try:
            identity = config.identity()
        except (DataError, OSError, ValueError) as error:  # A path may be no possible path.
            self.tell_trial(at, str(error), labels)
            return None
        cell = self.cells[key] = _Cell.of(fields, config, identity)
        return cell.point(config.seed, labels, where)

    def config(self, fields: _Tree, labels: dict[str, str], at: Location) -> TrialConfig | None:
        values: dict[str, Any] = {
            name: self.object(name, node) if isinstance(node, dict) else node.value
            for name, node in fields.items()
        }
        sound, parent = self.parent(fields, values)
        try:
            config = TrialConfig.model_validate(values)
        except ValidationError as error:
            for one in error.errors(include_url=False):
                self.explain(one, fields, labels, at)
            return None
        except DataError as error:
            self.tell_trial(at, str(error), labels)
            return None
        if parent is not None:
            self.check_shape(config, parent, _place(fields["pretraining"]))
        return self.lock.pinned(config) if sound else None

    def parent(self, fields: _Tree, values: dict[str, Any]) -> tuple[bool, Point | None]:
        # Puts the id of a trial in place of a name under `backbones:`. False: it cannot be used.
        name = values.get("pretraining")
        if not isinstance(name, str) or name in schema.BUILT_IN:
            return True, None
        if re.fullmatch(TRIAL + "[0-9a-f]{12}", name):
            return True, None
        parent = None
        if name in self.spec.backbones:
            parent = self.pretraining(name)
        else:
            what = f"no pretraining is called {name!r}"
            allowed = (*schema.BUILT_IN, *self.spec.backbones)
            self.tell(_place(fields["pretraining"]), what, given=name, allowed=allowed)
        # The rest of the trial is judged as if nothing were wrong with this field.
        values["pretraining"] = RANDOM if parent is None else TRIAL + parent.trial_id
        return parent is not None, parent

    def check_shape(self, config: TrialConfig, parent: Point, at: Location) -> None:
        ours, theirs = config.backbone, parent.config.backbone
        same = (ours.name, ours.width, ours.heads) == (theirs.name, theirs.width, theirs.heads)
        if not same or ours.layers > theirs.layers:
            self.tell(
                at,
                f"{parent.label} trains {_shape(theirs)}, which is not the {_shape(ours)} of a "
                "trial that takes it over; layers may be fewer, the rest has to be the same",
            )

    def check_claims(self, points: Sequence[Point]) -> tuple[str, ...]:
        # What patterns cost the claims, as warnings.
        for number, claim in enumerate(self.spec.claims):
            if mixed := _mixed_numerics(claim, points):
                self.tell(("claims", number, "that"), mixed)
        if self.problems:
            return ()  # A trial that could not be read would be missed by its claim.
        words = [
            (labels, f"{spell(place)} (line {self.document.line(place)})", bool(pattern.why))
            for labels, place in self.unpaired
            if (pattern := self.patterns_read[place])
        ]
        out = []
        for number, claim in enumerate(self.spec.claims):
            at = ("claims", number, "that")
            found = pairing.places(claim, points)
            losses = list(pairing.lost(claim, found, words))
            wrong = pairing.mixed(claim, found)
            if wrong is None and (wrong := pairing.absent(claim, found)):
                wrong = "; ".join((wrong, *losses))
            if wrong:
                self.tell(at, wrong)
            elif few := pairing.lonely(claim, found):
                losses.append(few)
            where = f"{self.document.file}:{self.document.line(at)}: {spell(at)}"
            out += [f"{where}: {claim.that}: {loss}" for loss in losses]
        return tuple(out)

    def tell_trial(self, at: Location, what: str, labels: Mapping[str, str]) -> None:
        place = self.block_place(at)
        self.of_trials.setdefault((place, what), []).append("/".join(labels.values()))

    def explain(
        self, error: ErrorDetails, fields: _Tree, labels: Mapping[str, str], at: Location
    ) -> None:
        loc = list(error["loc"])
        siblings = reading.field_names(tuple(str(part) for part in loc[:-1]))
        if loc[:1] == ["task"] and loc[1:] and loc[1] in TASKS:
            # Pydantic names the member of a union as if it were a field.
            siblings = tuple(TASKS[str(loc.pop(1))].model_fields)
        if not loc:
            self.tell_trial(at, reading.explain(error)[0], labels)
            return
        node, depth = _descend(fields, loc)
        if depth == 0:  # Not in the file at all.
            if self.whole:
                place = at if at[:1] == ("backbones",) else (*at, "trial")
                what = "missing; give it under `trial:`, or as an axis"
                self.tell((*place, *loc), what)
            return
        what, given, allowed = reading.explain(error, siblings)
        place = (*_place(node), *loc[depth:])
        if loc == ["backbone"] and isinstance(node, dict):
            # Its size is resolved before its fields are judged one by one.
            name, size = (_plain(node.get(key, _Leaf(None, ()))) for key in ("name", "size"))
            known = [*BACKBONES, *registered(BACKBONE_GROUP)]
            if name not in known and ":" not in str(name):
                what, given, allowed = f"no backbone is called {name!r}", name, known
                place = _place(node.get("name", node))
            elif name in list(BACKBONES) and size not in (None, *BACKBONES[name].sizes):
                what, given, allowed = f"{name} has no size {size!r}", size, BACKBONES[name].sizes
                place = _place(node["size"])
        self.tell(place, what, given=given, allowed=allowed)


def _mixed_numerics(claim: ClaimSpec, points: Sequence[Point]) -> str | None:
    # Trials of two numerics classes differ in more than what a claim is about.
    if len({point.like.numerics for point in points}) < 2:
        return None
    classes: dict[tuple[str | None, ...], dict[str, str]] = {}
    for point in points:
        if (side := point.labels.get(claim.axis)) in claim.sides:
            place = tuple(point.labels.get(axis) for axis in claim.places)
            classes.setdefault(place, {}).setdefault(point.like.numerics, side)
    for place, found in classes.items():
        if len(found) > 1:
            where = "".join(f", at {one}" for one in place)
            mixed = " and ".join(f"{name} ({side})" for name, side in found.items())
            what = f"compares trials of two numerics classes{where}: {mixed}"
            return f"{what}; give both sides one, or make the claim `per` the axis that sets it"
    return None


def _fits(pattern: Any, value: Any) -> bool:
    if isinstance(pattern, list):
        return any(_fits(one, value) for one in pattern)
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(label(value), pattern)
    same_kind = isinstance(pattern, bool) == isinstance(value, bool)
    return (same_kind and bool(pattern == value)) or label(pattern) == label(value)


def _wanted(pattern: Any) -> str:
    # What a pattern wants of a field, in words.
    return " or ".join(label(one) for one in (pattern if isinstance(pattern, list) else [pattern]))


def _is_there(path: str, folder: Path) -> bool:
    # Whether a path, from a folder, or a folder of an installed package, is on this machine.
    if not path.startswith(PACKAGE):
        return (folder / os.path.expandvars(os.path.expanduser(path))).exists()
    return any(place.exists() for place in package_folders(path))


_SEED = TypeAdapter[int](Seed)


def _is_seed(value: Any) -> bool:
    # Whether it can stand as it was written.
    try:
        _SEED.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _shape(backbone: BackboneConfig) -> str:
    sizes = f"{backbone.layers} layers of {backbone.width}, {backbone.heads} heads"
    return f"{backbone.name} ({sizes})"
