"""Which learning rate each cell of a sweep with `tune:` takes. The only file with Optuna.

A study is a function of the ledger: the rates that a cell has tried are trials like any other, and
what it chooses follows from their rows. So a kill loses nothing, readers and drivers agree without
asking each other, and the order in which trials ended does not matter. Rates of a grid or a
quasi-random set are known before anything has trained; Optuna's TPE is asked for one when all
before it have ended, with a seed of its own for each, and so gives the same ones again.

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
from sweep.sweepfile.tuning_spec import rounded

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

_RATE = "learning_rate"


class StudiesError(Exception):
    """Optuna's storage cannot be used; the message is for people. No trial is lost."""


# --- what the ledger decides --------------------------------------------------------------------


@dataclass(frozen=True)
class Try:
    """A rate that a cell tries."""

    rate: float
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
    chosen: float | None
    """The rate that the cell takes; None while it is being tuned."""

    @property
    def trials(self) -> Iterator[Point]:
        """All of its trials that are known."""
        for one in self.tries:
            yield from one.early
            yield from one.trials

    @property
    def ended(self) -> int:
        """The rates whose trials have ended."""
        return sum(one.state != "open" for one in self.tries)

    @property
    def why(self) -> str:
        """Why the trials of the cell cannot start yet; empty once they can."""
        return "" if self.chosen is not None else being_tuned(self.ended, self.study.tune)

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the least or the greatest that was tried, so that a better one
        may lie outside.
        """
        rates = [one.rate for one in self.tries]
        return len(rates) > 1 and self.chosen in (min(rates), max(rates))


@dataclass(frozen=True)
class Record:
    """A trial of a study, as a figure or a table of rates needs it."""

    cell: str
    """The labels of the cell, in one."""
    labels: Mapping[str, str]
    """Axis -> label of the cell."""
    rate: float
    seed: int
    metric: str
    """What is compared."""
    value: float | None
    """A fraction for an accuracy, nats for a loss; None before the trial has ended."""
    state: str
    """Of the rate: open, done, diverged, pruned."""
    chosen: bool
    """Whether the cell takes this rate."""
    trial_id: str


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
        own, rate = state.study.points, state.chosen
        now = (
            [replace(point, undecided=state.why) for point in own]
            if rate is None
            else state.study.decided(rate)
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
    while True:
        out = tuple(_state(study, found) for study in sweep.studies)
        # What has ended may lead to further trials, and these may have ended too.
        new = {point.trial_id for state in out for point in state.trials} - read
        if not new:
            return out
        for metric in {study.tune.by for study in sweep.studies}:
            found |= _values(ledger, new, metric)
        read |= new


def curves(sweep: Sweep, ledger: Ledger) -> list[Record]:
    """The trials by which learning rates were chosen: a record a cell, rate and seed.

    Raises:
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    return [
        Record(
            cell=state.study.label,
            labels=state.study.labels,
            rate=one.rate,
            seed=point.config.seed,
            metric=state.study.tune.by,
            value=value,
            state=one.state,
            chosen=one.rate == state.chosen,
            trial_id=point.trial_id,
        )
        for state in states(sweep, ledger)
        for one in sorted(state.tries, key=lambda one: one.rate)
        for point, value in zip(one.trials, one.values, strict=True)
    ]


def notes(sweep: Sweep) -> tuple[str, ...]:
    """What a reader of the sweep's figures has to know of its tuning; nothing without `tune:`."""
    tune = sweep.spec.tune
    if tune is None:
        return ()
    rates = tune.learning_rate
    span = f"{rates.log[0]:g} and {rates.log[1]:g}" if rates.log else ""
    among = f"{tune.budget} between {span}" if span else ", ".join(f"{r:g}" for r in rates.grid())
    seeds = "seed " if len(tune.seeds) == 1 else "seeds "
    chosen = (
        f"learning rate chosen for each cell, of {among}, by {tune.by.replace('_', ' ')} with "
        f"{seeds}{', '.join(map(str, tune.seeds))}, apart from those of the figures"
    )
    said = [chosen]
    if tune.prune is not None:
        said.append(
            f"after {tune.prune:.0%} of the steps, counted up to the next evaluation, rates below "
            "the median of their own cell's were given up"
        )
    if tune.sampler == "tpe":
        said.append(
            "sampler tpe: which rates were tried depends on the order and the results of those "
            "before, so that another machine may try others"
        )
    return tuple(said)


def remarks(sweep: Sweep, ledger: Ledger) -> dict[str, str]:
    """Cell id -> what a reader of its figures has to know of the choice of its learning rate.

    Raises:
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    out = {}
    for state in states(sweep, ledger):
        if state.chosen is not None and state.at_edge:
            which = "least" if state.chosen == min(one.rate for one in state.tries) else "greatest"
            out[state.study.decided(state.chosen)[0].cell_id] = (
                f"its learning rate, {state.chosen:g}, is the {which} that was tried: a better one "
                "may lie beyond"
            )
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


def _state(study: Study, found: Mapping[str, float | None]) -> State:
    tune, steps = study.tune, study.points[0].config.steps
    tries = [_try(study, rate, study.first_steps, found) for rate in tune.rates]
    if tune.prune is not None and all(one.state != "open" for one in tries):
        middle = median(_score(study, one) for one in tries)
        for place, one in enumerate(tries):
            if one.state == "done" and _score(study, one) >= middle:
                tries[place] = _try(study, one.rate, steps, found, early=one.trials)
            elif one.state == "done":
                tries[place] = Try(one.rate, one.trials, "pruned", one.values)
    while len(tries) < tune.budget and all(one.state != "open" for one in tries):
        tries.append(_try(study, _ask(study, tries), steps, found))
    chosen = None
    if all(one.state != "open" for one in tries):
        whole = [one for one in tries if one.state == "done"]
        # If all of them diverged, the least one: so will the cell's own trials, and say so.
        best = min(whole or tries, key=lambda one: (-_score(study, one), one.rate))
        chosen = best.rate
    return State(study, tuple(tries), chosen)


def _try(
    study: Study,
    rate: float,
    steps: int,
    found: Mapping[str, float | None],
    early: tuple[Point, ...] = (),
) -> Try:
    trials = study.trials(rate, steps)
    values = tuple(found.get(point.trial_id) for point in trials)
    if any(point.trial_id not in found for point in trials):
        return Try(rate, trials, "open", values, early)
    return Try(rate, trials, "diverged" if None in values else "done", values, early)


def _score(study: Study, one: Try) -> float:
    # The greater, the better.
    if one.value is None:
        return -math.inf
    return one.value if study.tune.by.endswith("_accuracy") else -one.value


def _ask(study: Study, tries: Sequence[Try]) -> float:
    # The next rate of TPE, after those that have ended.
    history = tuple((one.rate, one.value) for one in tries)
    log = study.tune.learning_rate.log
    assert log is not None
    return _suggested(study.cell_id, log, _direction(study), history)


def _direction(study: Study) -> str:
    return "maximize" if study.tune.by.endswith("_accuracy") else "minimize"


@functools.lru_cache(maxsize=100_000)
def _suggested(
    cell: str,
    log: tuple[float, float],
    direction: str,
    history: tuple[tuple[float, float | None], ...],
) -> float:
    optuna = _optuna()
    tried = {rate for rate, _ in history}
    rate = history[-1][0]
    for attempt in range(ASKED):
        text = f"{cell} {len(history)} {attempt}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0)
        study = optuna.create_study(direction=direction, sampler=sampler)
        study.add_trials([_frozen(rate, value, log) for rate, value in history])
        rate = rounded(study.ask({_RATE: _range(log)}).params[_RATE])
        if rate not in tried:
            break
    return rate


# --- Optuna's storage ---------------------------------------------------------------------------


def _optuna() -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    return optuna


def _range(log: tuple[float, float]) -> Any:
    return _optuna().distributions.FloatDistribution(*log, log=True)


def _frozen(
    rate: float,
    value: float | None,
    log: tuple[float, float],
    *,
    pruned_at: int | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> FrozenTrial:
    # A rate that diverged is pruned without a figure, which TPE takes for worse than all others.
    trial = _optuna().trial
    whole = value is not None and pruned_at is None
    return trial.create_trial(  # type: ignore[no-any-return]
        state=trial.TrialState.COMPLETE if whole else trial.TrialState.PRUNED,
        value=value if whole else None,
        params={_RATE: rate},
        distributions={_RATE: _range((min(rate, log[0]), max(rate, log[1])))},
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
    log = state.study.tune.learning_rate.log
    if log is None:
        values = state.study.tune.learning_rate.grid()
        log = (values[0], values[-1])
    steps = state.study.first_steps
    out = {}
    for one in state.tries:
        if one.state != "open":
            ids = [point.trial_id for point in one.trials]
            out[json.dumps(ids)] = _frozen(
                one.rate,
                one.value,
                log,
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
