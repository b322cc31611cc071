"""Which setting each cell of a sweep with `tune:` takes. The only file with Optuna.

A study is a function of the ledger: the settings that a cell has tried are trials like any other,
and what it chooses follows from their rows. So a kill loses nothing, readers and drivers agree
without asking each other, and the order in which trials ended does not matter. Points of a grid, a
quasi-random or a random set are known before anything has trained. Optuna's TPE is asked in
generations: for the next one when all before it have ended, told in the order of asking, with a
seed of its own for each point that follows from the study and the number of the point; points of
its own generation count as running (constant liar). A driver notes a generation in the ledger
before it trains, and what is noted is what counts: another machine, or another release of Optuna,
changes nothing of it.

Optuna's own storage is a copy, for its dashboard and its users: each rate that has ended is told
once. What is lost of it, or contradicts the ledger, is made anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Literal

from fpt.files import cache_folder
from sweep.ledger.errors import in_one_line, without_password
from sweep.ledger.ledger import Ledger
from sweep.sweepfile.document import SweepFileError
from sweep.sweepfile.trials import Point, Study, Sweep, being_tuned
from sweep.sweepfile.tuning_spec import RangeSpec, Setting, TuneSpec, rounded

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

FOLDER = "studies"
"""Where journal files lie, under a ledger that is a folder."""

STORAGE = "FPT_SWEEP_STUDIES"
"""The environment variable that names a database for the studies."""

LOCK_SECONDS = 3
"""After which Optuna takes over a lock that a killed process has left in a journal's folder."""

ASKED = 20
"""Times that TPE is asked for a rate that has not been tried."""


class StudiesError(Exception):
    """Optuna's storage cannot be used; the message is for people. No trial is lost."""


# --- what the ledger decides --------------------------------------------------------------------


@dataclass(frozen=True)
class Try:
    """A point that a cell tries."""

    setting: Setting
    """What each tuned field is set to."""
    trials: tuple[Point, ...]
    """One a seed of `tune:`, those that decide about it so far."""
    state: Literal["open", "done", "diverged", "pruned"]
    """open: not all have ended. diverged: one has. pruned: below the median of its cell's, and not
    trained to its end."""
    values: tuple[float | None, ...]
    """What it is chosen by, of each trial; None of one that has none (yet)."""
    early: tuple[Point, ...] = ()
    """The shorter trials that came before these, under the median rule."""

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
class State:
    """How far a study is."""

    study: Study
    tries: tuple[Try, ...]
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
        for one in self.tries:
            yield from one.early
            yield from one.trials

    @property
    def ended(self) -> int:
        """The points whose trials have ended."""
        return sum(one.state != "open" for one in self.tries)

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
        for name, value in self.setting or ():
            tried = {dict(one.setting)[name] for one in self.tries}
            numbers = all(isinstance(one, float | int) for one in tried)
            if numbers and len(tried) > 1 and value in (min(tried), max(tried)):
                out[name] = "least" if value == min(tried) else "greatest"
        return out

    def expected_best(self) -> list[float]:
        """Return the expected best figure after 1, 2, ... of the points that have one, drawn
        without return in any order (Dodge et al. 2019, there with return); the unit of `tune.by`.
        """
        values = sorted(one.value for one in self.tries if one.value is not None)
        if not self.study.tune.by.endswith("_accuracy"):
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
        2023); nothing of one field, or of fewer than four points.
        """
        whole = [one for one in self.tries if one.value is not None]
        if len(self.study.tune.spaces) < 2 or len({one.value for one in whole}) < 4:
            return {}
        optuna = _optuna()
        with warnings.catch_warnings():  # Optuna calls it experimental.
            warnings.simplefilter("ignore")
            study = optuna.create_study(direction=_direction(self.study))
            for one in whole:
                study.add_trial(_frozen(one.setting, one.value, self.study.tune))
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        return {name: float(found.get(name, 0.0)) for name in self.study.tune.spaces}


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
    """The sweep with trials in place of the points whose learning rate the ledger decides, and with
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


def states(sweep: Sweep, ledger: Ledger) -> tuple[State, ...]:
    """How far each study of a sweep is, in the order of its cells.

    Raises:
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    found: dict[str, float | None] = {}
    read: set[str] = set()
    noted = _noted(sweep, ledger)
    while True:
        out = tuple(_state(study, found, noted.get(_key(study), {})) for study in sweep.studies)
        # What has ended may lead to further trials, and these may have ended too.
        new = {point.trial_id for state in out for point in state.trials} - read
        if not new:
            return out
        for metric in {study.tune.by for study in sweep.studies}:
            found |= _values(ledger, new, metric)
        read |= new


def in_order(tries: Sequence[Try]) -> list[Try]:
    """Return points in the order of their settings: numbers rising, all else as asked for."""
    asked = {one.setting: place for place, one in enumerate(tries)}
    return sorted(tries, key=lambda one: _rank(one.setting, asked[one.setting]))


def _rank(setting: Setting, otherwise: int) -> tuple[float, ...]:
    return tuple(
        float(value) if isinstance(value, float | int) else float(otherwise) for _, value in setting
    )


def note_asked(sweep: Sweep, ledger: Ledger) -> None:
    """Note what an adaptive sampler has asked for, before it trains.

    Raises:
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read or written.
    """
    if sweep.spec.tune is None or sweep.spec.tune.sampler != "tpe":
        return
    known = _noted(sweep, ledger)
    for state in states(sweep, ledger):
        first = len(state.study.first_settings)
        for number, one in enumerate(state.tries[first:], start=first):
            if number not in known.get(_key(state.study), {}):
                name = f"{_key(state.study)}-{number:04d}"
                note = {"study": state.study.label, "number": number, "setting": one.setting}
                ledger.put_note(sweep.name, "generations", name, note)


def _noted(sweep: Sweep, ledger: Ledger) -> dict[str, dict[int, Setting]]:
    # Study -> number of a point -> what was asked for there.
    out: dict[str, dict[int, Setting]] = {}
    if sweep.spec.tune is None or sweep.spec.tune.sampler != "tpe":
        return out
    for name, note in ledger.notes(sweep.name, "generations").items():
        try:
            setting = tuple((str(field), value) for field, value in note["setting"])
            out.setdefault(name.rpartition("-")[0], {})[int(note["number"])] = setting
        except (KeyError, TypeError, ValueError):
            continue
    return out


def _key(study: Study) -> str:
    # A study is of a cell and of what is tuned of it: other ranges ask for other points.
    spec = study.tune.model_dump_json(exclude={"storage"})
    digest = hashlib.sha256(spec.encode()).hexdigest()[:8]
    return f"{study.cell_id}-{digest}"


def curves(sweep: Sweep, ledger: Ledger) -> list[Record]:
    """The trials by which learning rates were chosen: a record a cell, rate and seed.

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
        for one in in_order(state.tries)
        for point, value in zip(one.trials, one.values, strict=True)
    ]


def notes(sweep: Sweep) -> tuple[str, ...]:
    """What a reader of the sweep's figures has to know of its tuning; nothing without `tune:`."""
    tune = sweep.spec.tune
    if tune is None:
        return ()
    seeds = "seed " if len(tune.seeds) == 1 else "seeds "
    by = (
        f"by {tune.by.replace('_', ' ')} with {seeds}{', '.join(map(str, tune.seeds))}, apart from "
        "those of the figures"
    )
    if tune.rate_alone and tune.learning_rate is not None:
        rates = tune.learning_rate
        if rates.values is not None:
            among = ", ".join(f"{rate:g}" for rate in rates.grid())
        else:
            among = f"{tune.budget} between {rates.at(0):g} and {rates.at(1):g}"
        chosen = f"learning rate chosen for each cell, of {among}, {by}"
    else:
        spaces = "; ".join(f"{name} ({space})" for name, space in tune.spaces.items())
        chosen = (
            f"chosen for each cell, of {tune.budget} points of sampler {tune.sampler}: {spaces}; "
            f"{by}"
        )
    said = [chosen]
    if tune.prune is not None:
        said.append(
            f"after {tune.prune:.0%} of the steps, counted up to the next evaluation, "
            f"{'rates' if tune.rate_alone else 'points'} below the median of their own cell's were "
            "given up"
        )
    if tune.sampler == "tpe":
        said.append(
            f"sampler tpe: which {'rates' if tune.rate_alone else 'points'} were tried depends on "
            "the order and the results of those before, so that another machine may try others"
        )
    return tuple(said)


def remarks(sweep: Sweep, ledger: Ledger) -> dict[str, str]:
    """Cell id -> what a reader of its figures has to know of the choice of its learning rate.

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
    """Return cell id -> expected best figure by number of points, of cells that are tuned; greater
    is better.

    Raises:
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    sign = -1 if sweep.spec.tune and not sweep.spec.tune.by.endswith("_accuracy") else 1
    return {
        state.study.decided(state.setting)[0].cell_id: [sign * v for v in state.expected_best()]
        for state in states(sweep, ledger)
        if state.setting is not None
    }


def _values(ledger: Ledger, ids: Collection[str], metric: str) -> dict[str, float | None]:
    # Of trials that have ended, what they are compared by; None of one that diverged.
    rows = ledger.trials(ids, columns=["trial_id", "outcome", metric]).to_pylist()
    return {
        row["trial_id"]: row[metric]
        if row["outcome"] == "done" and row[metric] is not None and math.isfinite(row[metric])
        else None
        for row in rows
    }


def _state(study: Study, found: Mapping[str, float | None], noted: Mapping[int, Setting]) -> State:
    tune, steps = study.tune, study.points[0].config.steps
    tries = [_try(study, one, study.first_steps, found) for one in study.first_settings]
    if tune.prune is not None and all(one.state != "open" for one in tries):
        middle = median(_score(study, one) for one in tries)
        for place, one in enumerate(tries):
            if one.state == "done" and _score(study, one) >= middle:
                tries[place] = _try(study, one.setting, steps, found, early=one.trials)
            elif one.state == "done":
                tries[place] = Try(one.setting, one.trials, "pruned", one.values)
    if tune.sampler == "tpe":
        while len(tries) < tune.budget and all(one.state != "open" for one in tries):
            ended = tuple((one.setting, one.value) for one in tries)
            asked: list[Setting] = []
            for number in range(len(tries), min(len(tries) + tune.generation, tune.budget)):
                now = noted.get(number) or _suggested(study.cell_id, tune, ended, tuple(asked))
                asked.append(now)
            tries += [_try(study, one, steps, found) for one in asked]
    setting = None
    if all(one.state != "open" for one in tries):
        whole = [one for one in tries if one.state == "done"]
        # If all of them diverged, the first one: so will the cell's own trials, and say so.
        best = max(_score(study, one) for one in whole) if whole else None
        equal = [one for one in whole or tries if best is None or _score(study, one) == best]
        setting = in_order(equal)[0].setting
    return State(study, tuple(tries), setting)


def _try(
    study: Study,
    setting: Setting,
    steps: int,
    found: Mapping[str, float | None],
    early: tuple[Point, ...] = (),
) -> Try:
    trials = study.trials(setting, steps)
    values = tuple(found.get(point.trial_id) for point in trials)
    if any(point.trial_id not in found for point in trials):
        return Try(setting, trials, "open", values, early)
    return Try(setting, trials, "diverged" if None in values else "done", values, early)


def _score(study: Study, one: Try) -> float:
    # The greater, the better.
    if one.value is None:
        return -math.inf
    return one.value if study.tune.by.endswith("_accuracy") else -one.value


def _direction(study: Study) -> str:
    return "maximize" if study.tune.by.endswith("_accuracy") else "minimize"


@functools.lru_cache(maxsize=100_000)
def _suggested(
    cell: str,
    tune: TuneSpec,
    ended: tuple[tuple[Setting, float | None], ...],
    asked: tuple[Setting, ...],
) -> Setting:
    # The next point of TPE, after those that have ended and those of its own generation.
    optuna = _optuna()
    tried = {setting for setting, _ in ended} | set(asked)
    setting: Setting = (*asked, *(one for one, _ in ended))[-1]
    direction = "maximize" if tune.by.endswith("_accuracy") else "minimize"
    with warnings.catch_warnings():  # Optuna calls the constant liar experimental.
        warnings.simplefilter("ignore")
        for attempt in range(ASKED):
            text = f"{cell} {len(ended) + len(asked)} {attempt}"
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
            liar = tune.generation > 1
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0, constant_liar=liar)
            study = optuna.create_study(direction=direction, sampler=sampler)
            study.add_trials([_frozen(one, value, tune) for one, value in ended])
            study.add_trials([_frozen(one, None, tune, running=True) for one in asked])
            spaces = {name: _distribution(space) for name, space in tune.spaces.items()}
            params = study.ask(spaces).params
            setting = tuple(
                (name, rounded(params[name]) if isinstance(params[name], float) else params[name])
                for name in tune.spaces
            )
            if setting not in tried:
                break
    return setting


# --- Optuna's storage ---------------------------------------------------------------------------


def _optuna() -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    return optuna


def _distribution(space: RangeSpec, value: Any = None) -> Any:
    # Of a range, widened to hold a value that another file may have tried.
    distributions = _optuna().distributions
    if space.values is not None:
        return distributions.CategoricalDistribution(space.values)
    ends = space.log or space.uniform or space.whole
    assert ends is not None
    low, high = ends if value is None else (min(value, ends[0]), max(value, ends[1]))
    if space.whole is not None:
        return distributions.IntDistribution(low, high)
    return distributions.FloatDistribution(low, high, log=space.log is not None)


def _frozen(
    setting: Setting,
    value: float | None,
    tune: TuneSpec,
    *,
    running: bool = False,
    pruned_at: int | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> FrozenTrial:
    # A point that diverged is pruned without a figure, which TPE takes for worse than all others.
    trial = _optuna().trial
    whole = value is not None and pruned_at is None
    ended = trial.TrialState.COMPLETE if whole else trial.TrialState.PRUNED
    return trial.create_trial(  # type: ignore[no-any-return]
        state=trial.TrialState.RUNNING if running else ended,
        value=value if whole else None,
        params=dict(setting),
        distributions={name: _distribution(tune.spaces[name], at) for name, at in setting},
        intermediate_values={} if pruned_at is None else {pruned_at: value},
        user_attrs=dict(attributes or {}),
    )


def where(sweep: Sweep, ledger: Ledger) -> str:
    """Where the studies of a sweep lie: the URL of a database, or the path of a journal file.

    Raises:
        SweepFileError: If `tune.storage` names an environment variable that is not set.
    """
    written = sweep.spec.tune.storage if sweep.spec.tune else None
    url = written or os.environ.get(STORAGE)
    if written and written.startswith("$"):
        name = written.strip("${}")
        if not (url := os.environ.get(name)):
            what = f"the environment variable {name} is not set; set it to the URL of a database"
            line = sweep.spec.document.line(("tune", "storage"))
            raise SweepFileError([f"{sweep.file}:{line}: tune.storage: {what}"])
    if url:
        return url
    home = ledger.local
    if home is None:  # A journal needs a disk.
        home = cache_folder() / FOLDER / re.sub(r"[^A-Za-z0-9._-]+", "-", ledger.uri)
    else:
        home = home.absolute() / FOLDER
    return str(home / f"{sweep.name}.log")


def record(sweep: Sweep, ledger: Ledger, *, rebuild: bool = False) -> int:
    """Tell Optuna's storage of every rate that has ended and that it does not know; how many.

    A study that contradicts the ledger is made anew. While another process is at it, nothing is
    done.

    Args:
        sweep: The sweep.
        ledger: What is told.
        rebuild: Delete the sweep's studies first.

    Raises:
        StudiesError: If the storage cannot be used.
        SweepFileError: If it cannot be known.
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    if not sweep.studies:
        return 0
    place = where(sweep, ledger)
    lease = ledger.lease(f"studies-{sweep.name}")
    if lease is None:
        return 0
    with lease:
        # Not before: what others told of meanwhile would seem to contradict the ledger.
        known = states(sweep, ledger)
        try:
            return _told(sweep, known, _storage(place), rebuild=rebuild)
        except Exception as error:  # of any kind: Optuna lets through SQLAlchemy's and the system's
            if not _is_journal(place):
                raise StudiesError(f"{without_password(place)}: {in_one_line(error)}") from error
        try:
            # Cut off in the middle of a line by a kill, say: it holds nothing but copies.
            Path(place).unlink(missing_ok=True)
            return _told(sweep, known, _storage(place), rebuild=False)
        except Exception as error:
            raise StudiesError(f"{place}: {in_one_line(error)}") from error


def study_name(sweep: Sweep, study: Study) -> str:
    """The name of a study in Optuna's storage: another range is another study."""
    spec = study.tune.model_dump_json(exclude={"storage"})
    digest = hashlib.sha256(f"{study.cell_id} {spec}".encode()).hexdigest()[:8]
    return f"{sweep.name}/{study.label}/{digest}"


def _told(sweep: Sweep, known: Sequence[State], storage: BaseStorage, *, rebuild: bool) -> int:
    optuna = _optuna()
    names = {study.study_name for study in storage.get_all_studies()}
    count = 0
    for state in known:
        name = study_name(sweep, state.study)
        endings = _endings(state)
        told: dict[str, Any] = {}
        if name in names:
            trials = optuna.load_study(study_name=name, storage=storage).trials
            told = {json.dumps(one.user_attrs.get("trials")): one for one in trials}
            sound = len(told) == len(trials) and all(
                key in endings and _as_told(endings[key]) == _as_told(one)
                for key, one in told.items()
            )
            if rebuild or not sound:
                optuna.delete_study(study_name=name, storage=storage)
                names.discard(name)
                told = {}
        if name not in names:
            study = optuna.create_study(
                study_name=name, storage=storage, direction=_direction(state.study)
            )
            study.set_user_attr("sweep", sweep.name)
            study.set_user_attr("cell", state.study.label)
            study.set_user_attr("by", state.study.tune.by)
        else:
            study = optuna.load_study(study_name=name, storage=storage)
        new = [one for key, one in endings.items() if key not in told]
        study.add_trials(new)
        count += len(new)
    return count


def _endings(state: State) -> dict[str, FrozenTrial]:
    # What Optuna is told of a study, by the ids of the trials behind it.
    steps = state.study.first_steps
    out = {}
    for one in state.tries:
        if one.state != "open":
            ids = [point.trial_id for point in one.trials]
            out[json.dumps(ids)] = _frozen(
                one.setting,
                one.value,
                state.study.tune,
                pruned_at=steps if one.state == "pruned" else None,
                attributes={"trials": ids, "state": one.state, "values": list(one.values)},
            )
    return out


def _as_told(trial: FrozenTrial) -> tuple[Any, ...]:
    # What must not differ between what was told and what the ledger says.
    value = trial.value if trial.state.name == "COMPLETE" else None
    return trial.state.name, trial.params, value, trial.intermediate_values, trial.user_attrs


def _is_journal(place: str) -> bool:
    return "://" not in place


def _storage(place: str) -> BaseStorage:
    optuna = _optuna()
    if not _is_journal(place):
        return optuna.storages.RDBStorage(place)  # type: ignore[no-any-return]
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    Path(place).parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileOpenLock(place, grace_period=LOCK_SECONDS)
    return optuna.storages.JournalStorage(  # type: ignore[no-any-return]
        JournalFileBackend(place, lock_obj=lock)
    )


class Follower:
    """Keeps Optuna's storage up to date during a run; a fault of it is a warning, told once."""

    def __init__(self, sweep: Sweep, ledger: Ledger) -> None:
        self.sweep = sweep
        self.ledger = ledger
        self._said: str | None = None

    def sync(self) -> None:
        """Tell what is new."""
        try:
            record(self.sweep, self.ledger)
            self._said = None
        except Exception as error:
            # Whatever it is, the ledger decides without the studies.
            if str(error) != self._said:
                logging.getLogger(__name__).warning(
                    "Optuna's studies: %s; no result is lost, `sweep studies --rebuild` makes "
                    "them anew",
                    error,
                )
            self._said = str(error)
