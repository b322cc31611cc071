"""Optuna's storage of the studies of a sweep: a copy, for its dashboard and its users.

Each point that has ended is told once. What is lost of it, or contradicts the ledger, is made anew;
nothing is ever read back.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpt.files import cache_folder
from sweep.ledger.errors import in_one_line, without_password
from sweep.ledger.ledger import Ledger
from sweep.planning.samplers import direction, frozen, optuna_module
from sweep.planning.tuning import StudyState, states
from sweep.sweepfile.document import SweepFileError
from sweep.sweepfile.trials import Study, Sweep

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

FOLDER = "studies"
"""Where journal files lie, under a ledger that is a folder."""

STORAGE = "FPT_SWEEP_STUDIES"
"""The environment variable that names a database for the studies."""

LOCK_SECONDS = 3
"""After which Optuna takes over a lock that a killed process has left in a journal's folder."""


class StudiesError(Exception):
    """Optuna's storage cannot be used; the message is for people. No trial is lost."""


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
    digest = hashlib.sha256(study.key.encode()).hexdigest()[:8]
    return f"{sweep.name}/{study.label}/{digest}"


def _told(sweep: Sweep, known: Sequence[StudyState], storage: BaseStorage, *, rebuild: bool) -> int:
    optuna = optuna_module()
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
                study_name=name, storage=storage, direction=direction(state.study.tune)
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


def _endings(state: StudyState) -> dict[str, FrozenTrial]:
    # What Optuna is told of a study, by the ids of the trials behind it.
    out = {}
    for one in state.candidates:
        if one.state != "open":
            ids = [point.trial_id for point in one.trials]
            out[json.dumps(ids)] = frozen(
                one.setting,
                one.value,
                state.study.tune,
                pruned_at=one.trials[0].config.steps if one.state == "pruned" else None,
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
    optuna = optuna_module()
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
