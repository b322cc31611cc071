"""Trials as one sweep sees them, and the sweep that they make.

A `Point` is a trial with the labels of the sweep's axes; a `Study` is a cell whose learning rate is
chosen; a `Sweep` is a file, expanded (`sweep.sweepfile.expansion` makes it).
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fpt.config import TrialConfig
from fpt.spec import JSON
from sweep.sweepfile.document import SweepFileError
from sweep.sweepfile.identity import CellIdentity
from sweep.sweepfile.schema import KeepSpec, SweepFile, TableSpec
from sweep.sweepfile.tuning_spec import Setting, TuneSpec, written


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
    goes_on: bool = field(default=False, compare=False)
    """Whether a longer training may go on from its end, so that its state has to be kept."""

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
class Cell:
    """A trial, but for its seed."""

    identity: CellIdentity
    config: TrialConfig
    """That of any of its trials."""

    def point(self, seed: int, labels: Mapping[str, str], where: str) -> Point:
        """Return the trial with a seed; arguments as of `Point`."""
        trial = self.identity.trial_id(seed)
        return Point(trial, self.identity.cell_id, self.config, labels, where, seed=seed)


@dataclass(frozen=True)
class Study:
    """A cell of a sweep with `tune:`: its tuned fields are chosen by trials of their own.

    Those are ordinary trials, of the cell's config with a setting and a seed of `tune:`.
    """

    points: tuple[Point, ...]
    """The cell's own trials, undecided."""
    tune: TuneSpec
    cell_of: str
    """The id of the cell at the default learning rate, by which it was found."""
    replicate: int = 0
    """Which of the cell's choices it is: the points are those of the seeds dealt out to it."""
    _tried: dict[tuple[Setting, int], tuple[Point, ...]] = field(
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
        """The cell for people, with the number of its choice if there are several."""
        name = "/".join(self.labels.values()) or "the cell"
        return name if self.tune.replicates == 1 else f"{name}, choice {self.replicate + 1}"

    @property
    def key(self) -> str:
        """What the study is known by: its cell, what is tuned there, and which choice it is."""
        name = f"{self.cell_id}-{self.tune.key}"
        return f"{name}-{self.replicate}" if self.replicate else name

    @property
    def drawn_by(self) -> str:
        """What a sampler's draws follow from: the cell, and which of its choices it is."""
        return f"{self.cell_id} {self.replicate}" if self.replicate else self.cell_id

    @property
    def stages(self) -> tuple[int, ...]:
        """The steps after which points are given up, and last all of them."""
        config = self.points[0].config
        every = config.evaluation.every
        rungs = (math.ceil(part * config.steps / every) * every for part in self.tune.rungs)
        return (*rungs, config.steps)

    def trials(self, setting: Setting, steps: int) -> tuple[Point, ...]:
        """Return the trials that try a setting, one a seed of `tune:`."""
        if (setting, steps) in self._tried:
            return self._tried[setting, steps]
        like = self.points[0]
        said = f"rate {setting[0][1]:.15g}" if self.tune.rate_alone else written(setting)
        shorter = steps < like.config.steps
        if shorter:
            said += f", {steps} steps"
        cell = _at(like.config, setting, steps)
        self._tried[setting, steps] = tuple(
            replace(
                cell.point(seed, {**self.labels, "seed": str(seed), "tuning": said}, like.where),
                goes_on=shorter,
            )
            for seed in self.tune.seeds_of(self.replicate)
        )
        return self._tried[setting, steps]

    @functools.cached_property
    def first_settings(self) -> tuple[Setting, ...]:
        """The points that are known before any has ended."""
        return self.tune.first(self.cell_id, self.replicate)

    @property
    def first(self) -> tuple[Point, ...]:
        """The trials that are known before any has ended."""
        return tuple(
            point
            for setting in self.first_settings
            for point in self.trials(setting, self.stages[0])
        )

    def decided(self, setting: Setting) -> tuple[Point, ...]:
        """Return the cell's own trials, as they are once the setting is chosen."""
        like = self.points[0].config
        cell = _at(like, setting, like.steps)
        return tuple(cell.point(p.config.seed, p.labels, p.where) for p in self.points)


def with_setting(config: TrialConfig, setting: Setting) -> TrialConfig:
    """Return a trial's config with some of its fields set.

    Raises:
        pydantic.ValidationError: If a field cannot be so.
    """
    fields = config.model_dump()
    for path, value in setting:
        *outer, last = path.split(".")
        inside = fields
        for name in outer:
            inside = inside[name]
        inside[last] = value
    return TrialConfig.model_validate(fields)


def _at(config: TrialConfig, setting: Setting, steps: int) -> Cell:
    if [name for name, _ in setting] == ["learning_rate"]:
        changed = config.model_copy(update={"learning_rate": setting[0][1], "steps": steps})
    else:
        changed = with_setting(config, setting).model_copy(update={"steps": steps})
    return Cell(CellIdentity.of(changed, changed.identity()), changed)


def leave_open(points: Sequence[Point], tune: TuneSpec) -> tuple[Point, ...]:
    """Return the trials of a cell, undecided: their ids stand for those to come."""
    like, why = points[0].config, being_tuned(0, tune)
    open_ = copy.deepcopy(like.identity())
    for path in tune.spaces:
        *outer, last = path.split(".")
        inside = open_
        for name in outer:
            inside = inside[name]
        inside[last] = "tuned"
    cell = Cell(CellIdentity.of(like, open_), like)
    return tuple(
        replace(cell.point(p.config.seed, p.labels, p.where), undecided=why) for p in points
    )


def being_tuned(ended: int, tune: TuneSpec) -> str:
    """Return what is said of a trial whose tuned fields are still to be chosen."""
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
        """Return the trials whose label fits a glob, or whose id begins so (with four digits at
        least).

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
        """Return the sweep with no other trials than those that match, and what trains before them:
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
