"""Expansion: from the blocks of a sweep file to trials with identities.

Fields come in three layers, of which the later one wins: `trial`, the `defaults` that apply, the
points of axes. No step stops at a problem: all of a file's are found together.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from fpt.backbones import AUTO, BACKBONE_GROUP, BACKBONES
from fpt.backbones.sources import RANDOM, TRIAL
from fpt.config import BackboneConfig, Seed, TrialConfig
from fpt.files import DataError
from fpt.plugins import look_in, registered
from fpt.tasks import TASKS
from sweep.sweepfile import axes, lock, metrics, pairing, reading
from sweep.sweepfile.axes import AxisReader
from sweep.sweepfile.classes import meant, models, name_modules, names_of
from sweep.sweepfile.document import Location, Problems, Report, label, shown, spell
from sweep.sweepfile.exclude import ExcludeRules, Rule
from sweep.sweepfile.fields import FieldNames, FieldReader, FieldTree, FieldValues, Leaf
from sweep.sweepfile.identity import CellIdentity
from sweep.sweepfile.lock import Lock
from sweep.sweepfile.schema import BUILT_IN, Block, SweepFile
from sweep.sweepfile.trials import Cell, LeftOut, Point, Study, Sweep, leave_open, with_setting
from sweep.sweepfile.tuning_spec import NEVER, TuneSpec

MOST_TRIALS = 100_000
"""Trials that a file may make, those that `exclude` leaves out counted: to expand so many takes
some seconds."""


@dataclass(frozen=True)
class Expansion:
    """What a sweep file makes."""

    points: tuple[Point, ...]
    """The trials of the axes, in order; no id occurs twice."""
    pretrainings: tuple[Point, ...]
    """The trials of `backbones:`, each after those that it depends on."""
    studies: tuple[Study, ...]
    """The cells that are tuned."""
    left_out: tuple[LeftOut, ...]
    """What conditions of `exclude` leave out on this machine."""
    warnings: tuple[str, ...]
    """What is allowed and hardly meant."""
    problems: Problems
    """What is wrong. If anything is, the rest is not all there."""


def load(path: str | Path, *, locked: bool = True) -> Sweep:
    """Read and expand a sweep file, with the lock beside it, if there is one (`sweepfile.lock`).

    The file's folder is where modules of `module:Class` are looked for, if it names any.

    Args:
        path: The sweep file.
        locked: False leaves the lock aside, as those have to who are about to make it.

    Raises:
        SweepFileError: With all problems, if there are any.
    """
    spec, problems = reading.read(path)
    if spec is None:
        raise problems.error()
    file = spec.document.file
    own = Lock()
    complete = not problems
    if locked:
        try:
            own = lock.read(file)
        except lock.LockError as error:
            problems.add(0, "", str(error))
    find_modules(spec)
    expansion = expand(spec, own, complete=complete)
    problems.update(expansion.problems)
    if problems:
        raise problems.error()
    studies = expansion.studies
    return Sweep(
        name=spec.sweep,
        file=file,
        text=spec.document.text,
        points=_opened(expansion.points, studies),
        pretrainings=expansion.pretrainings,
        axes=tuple(reading.axis_labels(spec)),
        spec=spec,
        left_out=expansion.left_out,
        warnings=expansion.warnings,
        studies=studies,
        tunings=tuple(point for study in studies for point in study.first),
    )


def find_modules(spec: SweepFile) -> None:
    """Let the modules of the classes that a file names be found beside it, if it names any."""
    if name_modules(names_of(spec)):
        look_in(spec.document.file.resolve().parent)


def _opened(points: Sequence[Point], studies: Sequence[Study]) -> tuple[Point, ...]:
    # The points of a sweep, undecided where they are tuned.
    if not studies:
        return tuple(points)
    opened = {
        (study.cell_of, point.config.seed): point for study in studies for point in study.points
    }
    return tuple(opened[point.cell_id, point.config.seed] for point in points)


def expand(spec: SweepFile, own: Lock | None = None, *, complete: bool = True) -> Expansion:
    """Return the trials that a file makes, and what is wrong with it.

    Args:
        spec: What the file says.
        own: Its lock; None: sources stay as they are written.
        complete: Whether `spec` is all of the file. If not, nothing is called missing or unused.
    """
    report = Report(spec.document, complete=complete)
    names = FieldNames(models(names_of(spec)))
    fields = FieldReader(names, spec.document.file.parent, report)
    axis_reader = AxisReader(spec, names, fields, report)
    all_axes = frozenset(reading.axis_labels(spec))

    def known(name: str, at: Location) -> bool:
        if names.is_field(name) or name in all_axes:
            return True
        *parents, last = name.split(".")
        allowed = names.under(tuple(parents)) or (*names.under(()), *all_axes)
        report.left_out(at, "neither a field of the trial nor an axis", given=last, allowed=allowed)
        return False

    values = FieldValues()
    layers = _Layers(spec, fields, values, known)
    trials = _TrialMaker(spec, names, layers, fields, values, own or Lock(), report)
    rules = ExcludeRules(known, spec.document.file.parent, report)
    pretrainings = trials.pretrainings()
    excluded = _Excluded()
    points: tuple[Point, ...] = ()
    if not _are_too_many(spec, report):
        made = _Blocks(spec, trials, layers, fields, axis_reader, rules, excluded, report)
        points = made.points()
    sound = report.complete and not report.problems
    warnings = pairing.check_claims(spec.claims, points, excluded.pairs, report)
    warnings += _double_batches(points)
    if points:
        _check_metrics(spec, points, report)
    if sound and spec.table is not None:
        pairing.check_table(spec.table, points, tuple(reading.axis_labels(spec)), report)
    written = [layers.trial, *layers.defaults.values()]
    written += [choice.fields for choice in axis_reader.choices]
    written += [fields.tree(one.trial, (*at, "trial")) for at, one in spec.blocks() if at]
    studies = _studies(spec, points, written, names, report)
    return Expansion(points, pretrainings, studies, excluded.left_out(), warnings, report.problems)


def _check_metrics(spec: SweepFile, points: Sequence[Point], report: Report) -> None:
    # That what is shown, compared or chosen by is something that a trial of the file has.
    configs = [point.like for point in points]
    known = metrics.allowed(configs)
    wanted: list[tuple[Location, str]] = []
    if spec.table is not None:
        value = spec.table.value
        several = [] if isinstance(value, str) else list(enumerate(value))
        wanted += [(("table", "value", number), name) for number, name in several]
        wanted += [(("table", "value"), value)] if isinstance(value, str) else []
    wanted += [(("claims", number, "on"), one.on) for number, one in enumerate(spec.claims)]
    wanted += [(("tune", "by"), spec.tune.by)] if spec.tune is not None else []
    for at, name in wanted:
        if name in known:
            continue
        given: str | None = name
        what = f"{shown(name)} is not known"
        if metrics.of_classes(name):
            given = None
            what = f"{name} is of classes, and the task's predictions are numbers (loss mse)"
        choosing = at[0] == "tune"
        allowed = [one for one in known if one.startswith("validation_") or not choosing]
        report(at, what, given=given, allowed=allowed)
    if spec.tune is not None:
        spec.tune._higher = metrics.higher_is_better(spec.tune.by, configs[0])
    for clash in metrics.clashes(configs):
        report((), clash)


def _are_too_many(spec: SweepFile, report: Report) -> bool:
    # Counted before any is made: to say so takes no time.
    sizes = {at: axes.size(spec, block) for at, block in spec.blocks()}
    total = sum(sizes.values())
    if total <= MOST_TRIALS:
        return False
    largest = max(sizes, key=sizes.__getitem__)
    most = f"the most is {MOST_TRIALS:,}, before `exclude` is asked"
    whole = "" if len(sizes) == 1 else f", the file {total:,}"
    report(_block_place(spec, largest), f"makes {sizes[largest]:,} trials{whole}; {most}")
    return True


def _block_place(spec: SweepFile, at: Location) -> Location:
    # What to point at for a block as a whole.
    said = spec.model_fields_set
    return at or next(((key,) for key in ("axes", "zip", "trial") if key in said), ())


class _Layers:
    # `trial` and the `defaults` that apply, under what was chosen.

    def __init__(
        self, spec: SweepFile, fields: FieldReader, values: FieldValues, known: Any
    ) -> None:
        self.trial = fields.tree(spec.trial, ("trial",))
        self.defaults = {
            (field, value): fields.tree(tree, ("defaults", field, value))
            for field, by_value in spec.defaults.items()
            for value, tree in by_value.items()
            if known(field, ("defaults", field))
        }
        self.used: set[tuple[str, str]] = set()
        self._values = values
        self._under: dict[tuple[Any, ...], FieldTree] = {}

    def over(self, trial: FieldTree, labels: Mapping[str, str], chosen: FieldTree) -> FieldTree:
        if not self.defaults:
            return trial.merge(chosen)
        written = trial.merge(chosen)
        apply = [
            (field, name)
            for field, name in self.defaults
            if name in (label(self._values.value(written, field)), labels.get(field))
        ]
        key = (trial, *apply)
        if key not in self._under:
            under = trial
            for one in apply:
                under = under.merge(self.defaults[one])
                self.used.add(one)
            self._under[key] = under
        return self._under[key].merge(chosen)

    @property
    def unused(self) -> Iterator[tuple[str, str]]:
        yield from self.defaults.keys() - self.used


@dataclass
class _Excluded:
    # What patterns left out: by the first pattern that fits, where several do.
    used: set[Location] = field(default_factory=set)
    trials: Counter[Rule] = field(default_factory=Counter)
    here: Counter[Rule] = field(default_factory=Counter)
    # Those that would not be left out on every machine.
    pairs: list[tuple[dict[str, str], Rule]] = field(default_factory=list)
    # Labels of those that stand on a side of a claim.

    def left_out(self) -> tuple[LeftOut, ...]:
        # In the order of the file.
        return tuple(
            LeftOut(count, rule.words, rule.reason)
            for rule, count in sorted(self.here.items(), key=lambda one: one[0].at)
        )

    def check_something_is_left(self, report: Report) -> None:
        # A sweep without any trial would be done before it began.
        rules = sorted(self.trials, key=lambda rule: rule.at)
        gone = sum(self.trials.values())
        every = "the only trial" if gone == 1 else f"all {gone:,} trials"
        reasons = ", ".join(dict.fromkeys(rule.reason for rule in rules if rule.reason))
        what = f"{every}{f' on this machine ({reasons})' if reasons else ''}"
        if len(rules) == 1:
            report(rules[0].at, f"leaves out {what}; a sweep has at least one")
        else:
            lines = (f"{spell(one.at)} (line {report.document.line(one.at)})" for one in rules)
            report(
                ("exclude",), f"{' and '.join(lines)} leave out {what}; a sweep has at least one"
            )


class _Blocks:
    # The trials of a file's blocks, each id once.

    def __init__(
        self,
        spec: SweepFile,
        trials: _TrialMaker,
        layers: _Layers,
        fields: FieldReader,
        axis_reader: AxisReader,
        rules: ExcludeRules,
        excluded: _Excluded,
        report: Report,
    ) -> None:
        self.spec = spec
        self.trials = trials
        self.layers = layers
        self.fields = fields
        self.axes = axis_reader
        self.rules = rules
        self.excluded = excluded
        self.report = report

    def points(self) -> tuple[Point, ...]:
        out: dict[str, Point] = {}
        same: dict[tuple[Location, str], list[tuple[Point, Point]]] = {}
        for at, block in self.spec.blocks():
            for point in self._block(at, block):
                first = out.setdefault(point.trial_id, point)
                if first is not point:
                    same.setdefault((at, _difference(first, point)), []).append((first, point))
        for (at, what), pairs in same.items():
            first, point = pairs[0]
            more = f", and {len(pairs) - 1:,} more pairs" if pairs[1:] else ""
            which = f"{first.label} and {point.label} ({point.trial_id}){more}"
            text = f"{what} make one and the same trial: {which}"
            self.report(_block_place(self.spec, at), text)
        self.trials.report_shared()
        if self.report.complete:
            for field_name, value in self.layers.unused:
                at = ("defaults", field_name, value)
                self.report(at, f"no trial's {field_name} is {value!r}")
            for place in set(self.rules.places) - self.excluded.used:
                self.report(place, "leaves out nothing")
        if not out and self.excluded.trials:
            self.excluded.check_something_is_left(self.report)
        return tuple(out.values())

    def _block(self, at: Location, block: Block) -> Iterator[Point]:
        trial = self.layers.trial
        if at:
            trial = trial.merge(self.fields.tree(block.trial, (*at, "trial")))
        place = _block_place(self.spec, at)
        dimensions = self.axes.dimensions(at, block, place)
        rules = self.rules.read(self._patterns(at, block))
        where = f"{self.spec.document.file}:{self.spec.document.line(place)}"
        # Without defaults, which lie between them, what is chosen goes straight onto the trial.
        between = bool(self.layers.defaults)
        for choice in axes.product(dimensions, {}, FieldTree() if between else trial):
            labels, fields = choice.labels, choice.fields
            if between:
                fields = self.layers.over(trial, labels, fields)
            if self._is_left_out(rules, labels, fields):
                continue
            point = self.trials.point(fields, labels, where, at)
            if point is not None:
                yield point

    def _patterns(self, at: Location, block: Block) -> Iterator[tuple[Location, Mapping[str, Any]]]:
        for number, one in enumerate(self.spec.exclude):
            yield ("exclude", number), one
        if at:
            for number, one in enumerate(block.exclude):
                yield (*at, "exclude", number), one

    def _is_left_out(
        self, rules: Sequence[Rule], labels: dict[str, str], fields: FieldTree
    ) -> bool:
        fitting = [one for one in rules if self.trials.fits(one, labels, fields)]
        self.excluded.used.update(one.at for one in fitting)
        applying = [one for one in fitting if one.applies]
        if not applying:
            return False
        first = applying[0]
        self.excluded.trials[first] += 1
        if all(one.reason for one in applying):
            self.excluded.here[first] += 1
        if any(labels.get(claim.axis) in claim.sides for claim in self.spec.claims):
            self.excluded.pairs.append((labels, first))
        return True


def _difference(first: Point, point: Point) -> str:
    # What two points of one id differ in.
    differing = [
        f"points {first.labels.get(axis)!r} and {name!r} of axis {axis}"
        for axis, name in point.labels.items()
        if first.labels.get(axis) != name
    ]
    return " with ".join(differing) or f"this block and the one at {first.where}"


class _TrialMaker:
    # Trees to trials. The seeds of a cell share all nodes but their own, so that the rest is
    # judged, and made into an identity, once.

    def __init__(
        self,
        spec: SweepFile,
        names: FieldNames,
        layers: _Layers,
        fields: FieldReader,
        values: FieldValues,
        own: Lock,
        report: Report,
    ) -> None:
        self.spec = spec
        self.names = names
        self.layers = layers
        self.fields = fields
        self.values = values
        self.lock = own
        self.report = report
        self.cells: dict[tuple[Leaf | FieldTree, ...], Cell] = {}
        self.kept: dict[str, Point | None] = {}
        self.open: list[str] = []
        # Problems with a trial as a whole: (place, message) -> the labels of the trials.
        self.shared: dict[tuple[Location, str], list[str]] = {}

    def fits(self, rule: Rule, labels: Mapping[str, str], fields: FieldTree) -> bool:
        return rule.fits(labels, lambda key: self.values.value(fields, key), self.names.is_field)

    def report_shared(self) -> None:
        # A problem that many trials have is one.
        for (at, what), labels in self.shared.items():
            more = f" (and {len(labels) - 1:,} more trials)" if labels[1:] else ""
            self.report(at, f"{labels[0]}: {what}{more}")

    def pretrainings(self) -> tuple[Point, ...]:
        ids: dict[str, str] = {}
        for name in self.spec.backbones:
            at = ("backbones", name)
            if name in BUILT_IN or name.startswith(TRIAL):
                self.report(at, "is the name of a pretraining already; choose another one")
            point = self.pretraining(name)
            if point is not None and ids.setdefault(point.trial_id, name) != name:
                self.report(at, f"is one and the same trial as backbones.{ids[point.trial_id]}")
        return tuple(point for point in self.kept.values() if point is not None)

    def pretraining(self, name: str) -> Point | None:
        # The trial behind an entry of `backbones:`; None if it has a problem.
        if name in self.open:
            loop = " -> ".join((*self.open[self.open.index(name) :], name))
            self.report(("backbones", name), f"takes the backbone that it trains itself: {loop}")
            return None
        if name not in self.kept:
            at = ("backbones", name)
            own = FieldTree({"pretraining": Leaf(RANDOM, at), "train": Leaf("all", at)})
            own = own.merge(self.fields.tree(self.spec.backbones[name], at))
            self.open.append(name)
            where = f"{self.spec.document.file}:{self.spec.document.line(at)}"
            fields = self.layers.over(self.layers.trial, {}, own)
            point = self.point(fields, {"backbone": name}, where, at)
            self.open.pop()
            self.kept[name] = point  # After those that it depends on.
        return self.kept[name]

    def point(
        self, fields: FieldTree, labels: dict[str, str], where: str, at: Location
    ) -> Point | None:
        key = tuple([node for name, node in fields.items() if name != "seed"])
        cell, seed = self.cells.get(key), fields.get("seed")
        if cell is not None and isinstance(seed, Leaf) and _is_seed(seed.value):
            return cell.point(seed.value, labels, where)
        config = self._config(fields, labels, at)
        if config is None:
            return None
        try:
            identity = CellIdentity.of(config, config.identity())
        except (DataError, OSError, ValueError) as error:  # A path may be no possible path.
            self._share(at, str(error), labels)
            return None
        cell = self.cells[key] = Cell(identity, config)
        return cell.point(config.seed, labels, where)

    def _config(
        self, fields: FieldTree, labels: dict[str, str], at: Location
    ) -> TrialConfig | None:
        values: dict[str, Any] = {
            name: self.values.spec(name, node) if isinstance(node, FieldTree) else node.value
            for name, node in fields.items()
        }
        sound, parent = self._parent(fields, values)
        try:
            config = TrialConfig.model_validate(values)
        except ValidationError as error:
            for one in error.errors(include_url=False):
                self._explain(one, fields, labels, at)
            return None
        except DataError as error:
            self._share(at, str(error), labels)
            return None
        if parent is not None:
            self._check_shape(config, parent, fields["pretraining"].at)
        return self.lock.pinned(config) if sound else None

    def _parent(self, fields: FieldTree, values: dict[str, Any]) -> tuple[bool, Point | None]:
        # Puts the id of a trial in place of a name under `backbones:`. False: it cannot be used.
        name = values.get("pretraining")
        if not isinstance(name, str) or name in BUILT_IN:
            return True, None
        if re.fullmatch(TRIAL + "[0-9a-f]{12}", name):
            return True, None
        if name not in self.spec.backbones and _has_own_weights(values.get("backbone")):
            return True, None  # the user's own word for their own weights
        parent = None
        if name in self.spec.backbones:
            parent = self.pretraining(name)
        else:
            what = f"no pretraining is called {shown(name)}"
            allowed = (*BUILT_IN, *self.spec.backbones)
            self.report(fields["pretraining"].at, what, given=name, allowed=allowed)
        # The rest of the trial is judged as if nothing were wrong with this field.
        values["pretraining"] = RANDOM if parent is None else TRIAL + parent.trial_id
        return parent is not None, parent

    def _check_shape(self, config: TrialConfig, parent: Point, at: Location) -> None:
        ours, theirs = config.backbone, parent.config.backbone
        same = (ours.name, ours.width, ours.heads) == (theirs.name, theirs.width, theirs.heads)
        if not same or ours.layers > theirs.layers:
            self.report(
                at,
                f"{parent.label} trains {_shape(theirs)}, which is not the {_shape(ours)} of a "
                "trial that takes it over; layers may be fewer, the rest has to be the same",
            )

    def _share(self, at: Location, what: str, labels: Mapping[str, str]) -> None:
        place = _block_place(self.spec, at)
        self.shared.setdefault((place, what), []).append("/".join(labels.values()))

    def _explain(
        self, error: ErrorDetails, fields: FieldTree, labels: Mapping[str, str], at: Location
    ) -> None:
        loc = list(error["loc"])
        siblings = self.names.under(tuple(str(part) for part in loc[:-1]))
        if loc[:1] == ["task"] and loc[1:] and loc[1] in TASKS:
            # Pydantic names the member of a union as if it were a field.
            siblings = tuple(TASKS[str(loc.pop(1))].model_fields)
        if not loc:
            self._share(at, reading.explain(error)[0], labels)
            return
        node, depth = fields.descend(loc)
        if depth == 0:  # Not in the file at all.
            if self.report.complete:
                place = at if at[:1] == ("backbones",) else (*at, "trial")
                what = "missing; give it under `trial:`, or as an axis"
                self.report((*place, *loc), what)
            return
        what, given, allowed = reading.explain(error, siblings)
        place = (*node.at, *loc[depth:])
        if loc in (["task"], ["backbone"]) and isinstance(node, FieldTree):
            name, size = (node.get(key, Leaf(None, ())).plain for key in ("name", "size"))
            ours = [*BACKBONES, *registered(BACKBONE_GROUP)]
            unknown = error["type"] == "unknown_task" or (
                loc == ["backbone"] and name not in ours and ":" not in str(name)
            )
            if unknown or what.startswith(f"{name}: "):  # The name itself, or its class.
                place = node.get("name", node).at
                if loc == ["backbone"] and unknown:
                    what, given, allowed = f"no backbone is called {shown(name)}", name, ours
                folder = self.spec.document.file.resolve().parent
                if isinstance(name, str) and (own := meant(name, folder)) not in (None, name):
                    what, given = f"{what}; did you mean {own!r}", None
            # Its size is resolved before its fields are judged one by one.
            elif name in list(BACKBONES) and size not in (None, *BACKBONES[name].sizes):
                what, given, allowed = f"{name} has no size {size!r}", size, BACKBONES[name].sizes
                place = node["size"].at
        self.report(place, what, given=given, allowed=allowed)


_SEED = TypeAdapter[int](Seed)


def _has_own_weights(backbone: object) -> bool:
    # As a file writes them: of a class of the user's own, from a place of the user's own.
    fields = backbone if isinstance(backbone, Mapping) else {}
    name = fields.get("name")
    ours = name == AUTO or name in BACKBONES
    return isinstance(name, str) and not ours and fields.get("weights") is not None


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


def _studies(
    spec: SweepFile,
    points: Sequence[Point],
    written: Sequence[FieldTree],
    names: FieldNames,
    report: Report,
) -> tuple[Study, ...]:
    # The cells of a sweep with `tune:`. A tuned field that is given has no say there: an error.
    tune = spec.tune
    if tune is None:
        return ()
    for path in tune.spaces:
        top = path.partition(".")[0]
        if not names.is_field(path):
            allowed = [name for name in names.under(()) if name not in NEVER]
            report(("tune", path), "no such field of a trial", given=path, allowed=allowed)
        elif top in NEVER or path in ("backbone", "optimizer"):
            what = f"{path} cannot be tuned: it is what arms are compared at, or no single value"
            report(("tune", path), what)
        for fields in written:
            node, depth = fields.descend(path.split("."))
            if depth == len(path.split(".")):
                said = "the learning rate" if path == "learning_rate" else path
                report(node.at, f"never used, since `tune:` chooses {said}; leave it out")
    if report.problems or not report.complete:
        return ()
    cells: dict[str, list[Point]] = {}
    for point in points:
        cells.setdefault(point.cell_id, []).append(point)
    _check_defaults(tune, cells.values(), report)
    if report.problems or not report.complete:
        return ()
    studies = []
    refused: dict[str, list[Study]] = {}
    for cell, own in cells.items():
        within = tune.within(functools.partial(_has, own[0]))
        for replicate in range(tune.replicates):
            dealt = tuple(own[replicate :: tune.replicates])
            study = Study(dealt or tuple(own), within, cell, replicate)
            studies.append(study)
            what = _untunable(study) if dealt else _too_many_choices(tune, own)
            if what:
                refused.setdefault(what, []).append(study)
                break
    for what, of in refused.items():
        more = f" (and {len(of) - 1:,} more cells)" if of[1:] else ""
        report(("tune",), f"{'/'.join(of[0].labels.values()) or 'the cell'}: {what}{more}")
    _check_budgets(studies, report)
    for seed in sorted({point.config.seed for point in points}.intersection(tune.all_seeds)):
        what = f"{seed} is a seed of the sweep's own; choose by others"
        if seed not in tune.seeds:
            what = f"moved on for each of {tune.replicates} replicates, {what}"
        report(("tune", "seeds"), what)
    if report.problems or not report.complete:
        return ()
    return tuple(replace(study, points=leave_open(study.points, study.tune)) for study in studies)


def _has(point: Point, name: str, wanted: str) -> bool:
    # Whether a cell has a label of an axis, or a value of a field.
    if name in point.labels:
        return point.labels[name] == wanted
    value: Any = point.like.model_dump()
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return str(value.get("name") if isinstance(value, dict) else value) == wanted


def _check_defaults(tune: TuneSpec, cells: Iterable[Sequence[Point]], report: Report) -> None:
    # That each of `tune.defaults` is of some cell, and fits it.
    firsts = [own[0] for own in cells]
    for name, own in tune.defaults.items():
        for value in own:
            at = ("tune", "defaults", name, value)
            if name == "seed":
                report(at, "a cell is a config over its seeds, and has one choice for all of them")
            elif not any(_has(point, name, value) for point in firsts):
                allowed = dict.fromkeys(p.labels[name] for p in firsts if name in p.labels)
                report(at, f"no cell has {name} {value!r}", given=value, allowed=allowed)
    for point in firsts:
        try:
            tune.within(functools.partial(_has, point))
        except ValidationError as error:
            what = reading.explain(error.errors(include_url=False)[0])[0]
            report(("tune", "defaults"), what)
            return


def _too_many_choices(tune: TuneSpec, own: Sequence[Point]) -> str:
    return (
        f"replicates: {tune.replicates} choices for {len(own)} seeds; each choice needs a seed of "
        "the cell's own"
    )


def _check_budgets(studies: Sequence[Study], report: Report) -> None:
    # That every cell tries as many points.
    budgets: dict[int, Study] = {}
    for study in studies:
        budgets.setdefault(study.tune.budget, study)
    if len(budgets) > 1:
        told = ", ".join(f"{budget} of {study.label}" for budget, study in budgets.items())
        report(("tune", "defaults"), f"every cell tries as many points, but here are {told}")


def _untunable(study: Study) -> str:
    # Why the fields of a cell cannot be chosen; empty if they can.
    if not study.tune.rate_alone:
        for name, space in study.tune.spaces.items():
            conditions = [[(other, one) for one in space.needs(other)] for other in space.when]
            ends = space.values or (space.at(0), space.at(1))
            for value, *where in itertools.product(ends, *conditions):
                try:
                    with_setting(study.points[0].config, (*where, (name, value)))
                except ValidationError as error:
                    return (
                        f"{name} {value}: {reading.explain(error.errors(include_url=False)[0])[0]}"
                    )
    config, rungs = study.points[0].config, study.tune.rungs
    if config.protocol == "paper":
        return (
            "the protocol paper has no validation split to tune by, and a rate chosen by the "
            "test set would flatter it; use `protocol: sound`, or make the rates an axis"
        )
    if not rungs:
        return ""
    if config.stop is not None or config.optimizer.schedule != "constant":
        return "prune: needs a constant schedule and no stop rule, so that a rate can go on"
    for part, (steps, following) in zip(rungs, itertools.pairwise(study.stages), strict=True):
        counted = f"of {config.steps} steps, up to the next evaluation (every "
        counted += f"{config.evaluation.every})"
        if steps >= config.steps:
            return f"prune: {part:g} {counted}, is all of them"
        if steps >= following:
            return f"prune: {part:g} {counted}, is no earlier than the next rung"
    return ""


PAPER_BATCH = 16
"""Examples of a step above which the public code's loader gives its batch twice."""


def _double_batches(points: Sequence[Point]) -> tuple[str, ...]:
    """Return a warning where the public code of the protocol paper would train on other batches."""
    sizes = {
        point.config.batch_size
        for point in points
        if point.config.protocol == "paper"
        and point.config.batch_size > PAPER_BATCH
        and not point.config.task.name.startswith("bit-")
    }
    if not sizes:
        return ()
    given = ", ".join(map(str, sorted(sizes)))
    told = (
        f"protocol paper: batch_size {given}: on tasks other than the bit ones the public code "
        f"gives a batch above {PAPER_BATCH} twice a step; here a step sees it once"
    )
    return (told,)
