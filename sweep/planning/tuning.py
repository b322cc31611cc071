"""Which setting each cell of a sweep with `tune:` takes.

A study is a function of the ledger: the settings that a cell has tried are trials like any other,
and what it chooses follows from their rows. So a kill loses nothing, readers and drivers agree
without asking each other, and the order in which trials ended does not matter. Points of a grid, a
quasi-random or a random set are known before anything has trained. Optuna's TPE is asked in
generations: for the next one when all before it have ended, told in the order of asking, with a
seed of its own for each point that follows from the study and the number of the point; points of
its own generation count as running (constant liar). A driver notes a generation in the ledger
before it trains, and what is noted is what counts: another machine, or another release of Optuna,
changes nothing of it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Literal

from sweep.ledger.ledger import Ledger
from sweep.planning.samplers import direction, frozen, optuna_module, suggested
from sweep.sweepfile.trials import Point, Study, Sweep, being_tuned
from sweep.sweepfile.tuning_spec import ADAPTIVE, HalvingSpec, Setting


@dataclass(frozen=True)
class Candidate:
    """A setting that a cell tries."""

    setting: Setting
    """What each tuned field is set to."""
    trials: tuple[Point, ...]
    """One a seed of `tune:`, those that decide about it so far."""
    state: Literal["open", "done", "diverged", "pruned"]
    """open: not all have ended. diverged: one has. pruned: given up before its end, being among the
    worse ones of its cell."""
    values: tuple[float | None, ...]
    """What it is chosen by, of each trial; None of one that has none (yet)."""
    early: tuple[Point, ...] = ()
    """The shorter trials from whose ends these went on, under `prune`."""

    @property
    def rate(self) -> float | None:
        """Its learning rate, if that is tuned."""
        return dict(self.setting).get("learning_rate")

    @property
    def value(self) -> float | None:
        """The mean over its trials; None before all of them have one."""
        values = [value for value in self.values if value is not None]
        return fmean(values) if len(values) == len(self.values) else None


@dataclass(frozen=True)
class StudyState:
    """How far a study is."""

    study: Study
    candidates: tuple[Candidate, ...]
    """Those whose trials are known, in the order of their asking."""
    setting: Setting | None
    """The setting that the cell takes; None while it is being tuned."""

    @property
    def chosen(self) -> float | None:
        """The learning rate that the cell takes; None while it is being tuned, or is not tuned."""
        return None if self.setting is None else dict(self.setting).get("learning_rate")

    @property
    def trials(self) -> Iterator[Point]:
        """All of its trials that are known."""
        for one in self.candidates:
            yield from one.early
            yield from one.trials

    @property
    def ended(self) -> int:
        """The points whose trials have ended."""
        return sum(one.state != "open" for one in self.candidates)

    @property
    def why(self) -> str:
        """Why the trials of the cell cannot start yet; empty once they can."""
        return "" if self.setting is not None else being_tuned(self.ended, self.study.tune)

    @property
    def at_edge(self) -> bool:
        """Whether the best setting is at an edge: see `edges`."""
        return bool(self.edges)

    @property
    def edges(self) -> dict[str, str]:
        """Field -> least or greatest, where the best setting has the least or the greatest number
        that was tried, so that a better one may lie outside.
        """
        out = {}
        settings = [dict(one.setting) for one in self.candidates]
        for name, value in self.setting or ():
            tried = {setting[name] for setting in settings if name in setting}
            numbers = all(isinstance(one, float | int) for one in tried)
            if numbers and len(tried) > 1 and value in (min(tried), max(tried)):
                out[name] = "least" if value == min(tried) else "greatest"
        return out

    def expected_best(self) -> list[float]:
        """Return the expected best figure after 1, 2, ... of the points that have one, drawn
        without return in any order (Dodge et al. 2019, there with return); the unit of `tune.by`.
        """
        values = sorted(one.value for one in self.candidates if one.value is not None)
        if not self.study.tune.higher:
            values.reverse()
        count = len(values)
        return [
            math.fsum(
                value * math.comb(place, drawn - 1) / math.comb(count, drawn)
                for place, value in enumerate(values)
            )
            for drawn in range(1, count + 1)
        ]

    def importance(self) -> dict[str, float]:
        """Return the share of each field in what makes points good, by PED-ANOVA (Watanabe et al.
        2023), of those fields that every point has; nothing of fewer than two of these, or of fewer
        than four points.
        """
        whole = [one for one in self.candidates if one.value is not None]
        fields = [name for name, space in self.study.tune.spaces.items() if not space.when]
        if len(fields) < 2 or len({one.value for one in whole}) < 4:
            return {}
        optuna = optuna_module()
        with warnings.catch_warnings():  # Optuna calls it experimental.
            warnings.simplefilter("ignore")
            study = optuna.create_study(direction=direction(self.study.tune))
            for one in whole:
                study.add_trial(frozen(one.setting, one.value, self.study.tune))
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            found = optuna.importance.get_param_importances(
                study, evaluator=evaluator, params=fields
            )
        return {name: float(found.get(name, 0.0)) for name in fields}


@dataclass(frozen=True)
class Record:
    """A trial of a study, as a figure or a table of rates needs it."""

    cell: str
    """The labels of the cell, in one."""
    labels: Mapping[str, str]
    """Axis -> label of the cell."""
    setting: Setting
    """What each tuned field is set to."""
    seed: int
    metric: str
    """What is compared."""
    value: float | None
    """A fraction for an accuracy, nats for a loss; None before the trial has ended."""
    state: str
    """Of the point: open, done, diverged, pruned."""
    chosen: bool
    """Whether the cell takes it."""
    trial_id: str

    @property
    def rate(self) -> float | None:
        """Its learning rate, if that is tuned."""
        return dict(self.setting).get("learning_rate")


def resolve(sweep: Sweep, ledger: Ledger) -> Sweep:
    """Return the sweep with trials in place of points whose learning rate the ledger decides, with
    all trials of tuning that are known by now. Without `tune:`, the sweep itself.

    Raises:
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    if not sweep.studies:
        return sweep
    decided: dict[str, Point] = {}
    tunings = {point.trial_id: point for point in sweep.tunings}
    for state in states(sweep, ledger):
        tunings |= {point.trial_id: point for point in state.trials}
        own, setting = state.study.points, state.setting
        now = (
            [replace(point, undecided=state.why) for point in own]
            if setting is None
            else state.study.decided(setting)
        )
        decided |= {point.trial_id: new for point, new in zip(own, now, strict=True)}
    points = tuple(decided.get(point.trial_id, point) for point in sweep.points)
    return replace(sweep, points=points, tunings=tuple(tunings.values()))


def states(sweep: Sweep, ledger: Ledger) -> tuple[StudyState, ...]:
    """Return how far each study of a sweep is, in the order of its cells.

    Raises:
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    found: dict[str, float | None] = {}
    read: set[str] = set()
    noted = _noted(sweep, ledger)
    while True:
        out = tuple(_state(study, found, noted.get(study.key, {})) for study in sweep.studies)
        # What has ended may lead to further trials, and these may have ended too.
        new = {point.trial_id for state in out for point in state.trials} - read
        if not new:
            return out
        for metric in {study.tune.by for study in sweep.studies}:
            found |= _values(ledger, new, metric)
        read |= new


def in_order(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return points in the order of their settings: numbers rising, all else as asked for."""
    asked = {one.setting: place for place, one in enumerate(candidates)}
    # A field that a point has not comes before all of its values.
    names = list(dict.fromkeys(name for one in candidates for name, _ in one.setting))

    def rank(one: Candidate) -> list[float]:
        values = [dict(one.setting).get(name, -math.inf) for name in names]
        return [float(v) if isinstance(v, float | int) else asked[one.setting] for v in values]

    return sorted(candidates, key=rank)


def note_asked(sweep: Sweep, ledger: Ledger) -> None:
    """Note what an adaptive sampler has asked for, before it trains.

    Raises:
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read or written.
    """
    if sweep.spec.tune is None or sweep.spec.tune.sampler not in ADAPTIVE:
        return
    known = _noted(sweep, ledger)
    for state in states(sweep, ledger):
        first = len(state.study.first_settings)
        for number, one in enumerate(state.candidates[first:], start=first):
            if number not in known.get(state.study.key, {}):
                name = f"{state.study.key}-{number:04d}"
                note = {"study": state.study.label, "number": number, "setting": one.setting}
                ledger.notes.put(sweep.name, "generations", name, note)


def _noted(sweep: Sweep, ledger: Ledger) -> dict[str, dict[int, Setting]]:
    # Study -> number of a point -> what was asked for there.
    out: dict[str, dict[int, Setting]] = {}
    if sweep.spec.tune is None or sweep.spec.tune.sampler not in ADAPTIVE:
        return out
    for name, note in ledger.notes.on_claims(sweep.name, "generations").items():
        try:
            setting = tuple((str(field), value) for field, value in note["setting"])
            out.setdefault(name.rpartition("-")[0], {})[int(note["number"])] = setting
        except (KeyError, TypeError, ValueError):
            continue
    return out


def curves(sweep: Sweep, ledger: Ledger) -> list[Record]:
    """Return the trials by which rates were chosen: a record for each cell, rate and seed.

    Raises:
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    return [
        Record(
            cell=state.study.label,
            labels=state.study.labels,
            setting=one.setting,
            seed=point.config.seed,
            metric=state.study.tune.by,
            value=value,
            state=one.state,
            chosen=one.setting == state.setting,
            trial_id=point.trial_id,
        )
        for state in states(sweep, ledger)
        for one in in_order(state.candidates)
        for point, value in zip(one.trials, one.values, strict=True)
    ]


def notes(sweep: Sweep) -> tuple[str, ...]:
    """Return what a reader of the sweep's figures has to know of its tuning: every tuned field, its
    space, sampler and budget; nothing without `tune:`.
    """
    tune = sweep.spec.tune
    if tune is None:
        return ()
    seeds = [str(seed) for seed in tune.all_seeds]
    by = (
        f"by {tune.by.replace('_', ' ')} with {'seed' if len(seeds) == 1 else 'seeds'} "
        f"{', '.join(seeds)}, apart from those of the figures"
    )
    if tune.rate_alone and tune.learning_rate is not None and not tune.defaults:
        rates = tune.learning_rate
        if rates.values is not None:
            among = ", ".join(f"{rate:g}" for rate in rates.grid())
        else:
            among = f"{tune.budget} between {rates.at(0):g} and {rates.at(1):g}"
        chosen = f"learning rate chosen for each cell, of {among}, {by}"
    else:
        spaces = [f"{name} ({space})" for name, space in tune.spaces.items()]
        spaces += [
            f"for {field} {label}: " + ", ".join(f"{name} ({space})" for name, space in own.items())
            for field, labels in tune.defaults.items()
            for label, own in labels.items()
        ]
        chosen = (
            f"chosen for each cell, of {tune.budget} points of sampler {tune.sampler}: "
            f"{'; '.join(spaces)}; {by}"
        )
    said = [chosen]
    what = "rates" if tune.rate_alone else "points"
    if isinstance(tune.prune, HalvingSpec):
        rungs = ", ".join(f"{part:.0%}" for part in tune.prune.rungs)
        said.append(
            f"after {rungs} of the steps, counted up to the next evaluation, the best "
            f"{tune.prune.keep:.0%} of the {what} of each cell went on, from where they were"
        )
    elif tune.prune is not None:
        said.append(
            f"after {tune.prune:.0%} of the steps, counted up to the next evaluation, {what} below "
            "the median of their own cell's were given up"
        )
    if tune.sampler in ADAPTIVE:
        said.append(
            f"sampler {tune.sampler}: which {what} were tried depends on the order and the results "
            "of those before, so that another machine may try others"
        )
    if tune.replicates > 1:
        most = max(
            (len(study.points) for study in sweep.studies if study.tune.replicates > 1), default=1
        )
        said.append(
            f"the whole choice made {tune.replicates} times, each with seeds of its own: "
            + (
                "the spread between seeds holds the luck of tuning"
                if most == 1
                else f"up to {most} seeds share one, so that the spread between seeds holds the "
                "luck of tuning in part"
            )
        )
    return tuple(said)


def remarks(sweep: Sweep, ledger: Ledger) -> dict[str, str]:
    """Return cell id -> what a reader of its figures has to know of how its rate was chosen.

    Raises:
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    out = {}
    for state in states(sweep, ledger):
        if state.setting is None or not state.at_edge:
            continue
        values = dict(state.setting)
        told = [
            f"its {name.replace('learning_rate', 'learning rate')}, {values[name]:g}, is the "
            f"{which} that was tried"
            for name, which in state.edges.items()
        ]
        cell = state.study.decided(state.setting)[0].cell_id
        out[cell] = f"{'; '.join(told)}: a better one may lie beyond"
    return out


def budgets(sweep: Sweep, ledger: Ledger) -> dict[str, list[float]]:
    """Return trial id -> expected best figure by number of points, of the trials of cells that are
    tuned; greater is better.

    Raises:
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    sign = -1 if sweep.spec.tune and not sweep.spec.tune.higher else 1
    out: dict[str, list[float]] = {}
    for state in states(sweep, ledger):
        if state.setting is not None:
            best = [sign * value for value in state.expected_best()]
            out |= {point.trial_id: best for point in state.study.decided(state.setting)}
    return out


def _values(ledger: Ledger, ids: Collection[str], metric: str) -> dict[str, float | None]:
    # Of trials that have ended, what they are compared by; None of one that diverged.
    rows = ledger.trials(ids, columns=["trial_id", "outcome", metric]).to_pylist()
    return {
        row["trial_id"]: row[metric]
        if row["outcome"] == "done" and row[metric] is not None and math.isfinite(row[metric])
        else None
        for row in rows
    }


def _state(
    study: Study, found: Mapping[str, float | None], noted: Mapping[int, Setting]
) -> StudyState:
    tune, stages = study.tune, study.stages
    candidates = [_candidate(study, one, stages[0], found) for one in study.first_settings]
    number = len(candidates)
    for steps in stages[1:]:
        racing = [one for one in candidates if one.state in ("open", "done")]
        if any(one.state == "open" for one in racing):
            break
        if isinstance(tune.prune, HalvingSpec):
            number = tune.prune.kept(number)
        going = _going_on(study, candidates, number)
        for place, one in enumerate(candidates):
            if one.setting in going:
                early = (*one.early, *one.trials)
                candidates[place] = _candidate(study, one.setting, steps, found, early=early)
            elif one.state == "done":
                candidates[place] = replace(one, state="pruned")
    asking = tune.sampler in ADAPTIVE
    while (
        asking and len(candidates) < tune.budget and all(one.state != "open" for one in candidates)
    ):
        ended = tuple((one.setting, one.value) for one in candidates)
        asked: list[Setting] = []
        for number in range(len(candidates), min(len(candidates) + tune.generation, tune.budget)):
            now = noted.get(number) or suggested(study.drawn_by, tune, ended, tuple(asked))
            if now is None:  # Whoever can ask will note it.
                return StudyState(study, tuple(candidates), None)
            asked.append(now)
        candidates += [_candidate(study, one, stages[-1], found) for one in asked]
    setting = None
    if all(one.state != "open" for one in candidates):
        whole = [one for one in candidates if one.state == "done"]
        # If all of them diverged, the first one: so will the cell's own trials, and say so.
        best = max(_score(study, one) for one in whole) if whole else None
        equal = [one for one in whole or candidates if best is None or _score(study, one) == best]
        setting = in_order(equal)[0].setting
    return StudyState(study, tuple(candidates), setting)


def _going_on(study: Study, candidates: Sequence[Candidate], number: int) -> set[Setting]:
    # The points that train longer, of those that have reached a rung. How many follows from the
    # number of points alone, so that each cell keeps as many; what diverged cannot go on.
    racing = [one for one in candidates if one.state == "done"]
    if isinstance(study.tune.prune, HalvingSpec):
        best = sorted(in_order(racing), key=lambda one: -_score(study, one))
        return {one.setting for one in best[:number]}
    reached = [one for one in candidates if one.state != "pruned"]
    middle = median(_score(study, one) for one in reached)
    return {one.setting for one in racing if _score(study, one) >= middle}


def _candidate(
    study: Study,
    setting: Setting,
    steps: int,
    found: Mapping[str, float | None],
    early: tuple[Point, ...] = (),
) -> Candidate:
    trials = study.trials(setting, steps)
    values = tuple(found.get(point.trial_id) for point in trials)
    if any(point.trial_id not in found for point in trials):
        return Candidate(setting, trials, "open", values, early)
    return Candidate(setting, trials, "diverged" if None in values else "done", values, early)


def _score(study: Study, one: Candidate) -> float:
    # The greater, the better.
    if one.value is None:
        return -math.inf
    return one.value if study.tune.higher else -one.value
