"""What a sweep has still to do: its trials minus what the ledger holds, in the order to run them.

A plan trains nothing and changes nothing; it is made anew whenever it is wanted, since the ledger
is the only memory. Trials are matched by id alone, so a sweep finds what another one trained.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fpt.precision import refusal
from fpt.spec import JSON
from fpt.tasks import TASKS
from sweep.ledger.causes import WAITS
from sweep.ledger.ledger import Ledger, LedgerError
from sweep.planning import calibration, packing, tuning
from sweep.planning.packing import Workers
from sweep.sweepfile import lock
from sweep.sweepfile.expansion import load
from sweep.sweepfile.identity import IDENTITY_VERSION, hashed
from sweep.sweepfile.trials import Point, Sweep

Status = Literal["done", "diverged", "missing", "blocked", "failed", "stale"]
"""done, diverged: trained. missing: to be trained. blocked: waits for the trial whose backbone it
takes, or for those that tune it. failed: waits for `sweep retry`. stale: trained by an older
version of its task; what that gave is shown and never used."""

STATUSES: tuple[Status, ...] = ("done", "diverged", "missing", "blocked", "failed", "stale")


@dataclass(frozen=True)
class Pack:
    """Trials that train side by side in one program."""

    points: tuple[Point, ...]
    resources: Mapping[str, float]
    """What it takes of a machine, in Ray's words: {"CPU": 1}, or {"CPU": 1, "GPU": 1}."""
    extends: Mapping[str, str] = field(default_factory=dict)
    """Trial id -> id of a shorter training of the same trial, from whose end it goes on."""


@dataclass(frozen=True)
class Plan:
    """What is done, and what is to be done."""

    sweep: Sweep
    status: Mapping[str, Status]
    """Trial id -> status, of every trial of the sweep, in its order."""
    why: Mapping[str, str]
    """Trial id -> a short reason, where the status does not say all."""
    packs: tuple[Pack, ...]
    """What a run would train, in order; a pack comes after those whose backbones it takes."""
    workers: Workers
    """What the packs are formed for."""
    apart: int = 0
    """Trials that are left alone since the ledger measured that packs do not help them."""
    inexact: int = 0
    """Trials that are left alone since they were measured to have other bits in packs."""
    stages: tuple[tuple[Point, ...], ...] = ()
    """What a run would train: the trials of a stage can start together."""

    def counts(self) -> dict[str, int]:
        """Return status -> number of trials, for every status."""
        found = Counter(self.status.values())
        return {status: found[status] for status in STATUSES}

    @property
    def saving(self) -> float:
        """The part of the time in training that packs save, by formula: an estimate."""
        return packing.saving((pack.points for pack in self.packs), self.workers)

    @property
    def seeds_apart(self) -> int:
        """Trials that are alone in their packs for want of a `backbone_seed`."""
        if self.sweep.spec.pack == "off":
            return 0
        return packing.seeds_apart((pack.points for pack in self.packs), self.workers)

    @property
    def alone(self) -> dict[str, int]:
        """Why trials cannot share their backbone's frozen weights -> how many."""
        rows = (point.config.backbone.row for pack in self.packs for point in pack.points)
        return dict(Counter(row.alone for row in rows if row.alone is not None))

    @property
    def unpinned(self) -> tuple[str, ...]:
        """What trials that are not done read from the Hub at no commit in particular."""
        done = ("done", "diverged")
        open_ = [point for point in self.sweep.all if self.status[point.trial_id] not in done]
        return tuple(str(one) for one in lock.unpinned(point.config for point in open_))

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why the processor of this machine cannot train what is to be trained, if it cannot."""
        classes = {point.config.numerics for pack in self.packs for point in pack.points}
        return tuple(filter(None, map(refusal, sorted(classes))))

    def packed_for(self, workers: Workers, ledger: Ledger) -> Plan:
        """Return the same plan with its packs formed for other workers.

        Raises:
            LedgerError: If the ledger cannot be read.
        """
        workers = calibration.calibrated(workers, ledger)
        if workers == self.workers:
            return self
        goes_on = {name: one for pack in self.packs for name, one in pack.extends.items()}
        packs, apart, inexact = _packs(self.stages, self.sweep, ledger, workers, goes_on)
        return replace(self, packs=packs, workers=workers, apart=apart, inexact=inexact)

    def part(self, trials: Collection[str], studies: Collection[str]) -> Plan:
        """Return the plan of some of its trials, by id, and of some of its studies, by key."""

        def of(points: Iterable[Point]) -> tuple[Point, ...]:
            return tuple(point for point in points if point.trial_id in trials)

        sweep = replace(
            self.sweep,
            points=of(self.sweep.points),
            pretrainings=of(self.sweep.pretrainings),
            tunings=of(self.sweep.tunings),
            studies=tuple(one for one in self.sweep.studies if one.key in studies),
        )
        packs = (replace(pack, points=of(pack.points)) for pack in self.packs)
        return replace(
            self,
            sweep=sweep,
            status={name: one for name, one in self.status.items() if name in trials},
            packs=tuple(pack for pack in packs if pack.points),
            stages=tuple(filter(None, map(of, self.stages))),
        )

    def to_json(self) -> JSON:
        """Return the plan as JSON values."""
        return {
            "sweep": self.sweep.name,
            "file": str(self.sweep.file),
            "counts": self.counts(),
            "trials": [
                {
                    "trial_id": point.trial_id,
                    "cell_id": point.cell_id,
                    "label": point.label,
                    "labels": dict(point.labels),
                    "status": self.status[point.trial_id],
                    "why": self.why.get(point.trial_id),
                    "needs": point.parent,
                }
                for point in self.sweep.all
            ],
            "to_run": [[point.trial_id for point in pack.points] for pack in self.packs],
            "packs": {
                "members": packing.sizes(pack.points for pack in self.packs),
                "at_a_time": self.workers.count,
                "resources": dict(self.workers.resources),
                "estimated_saving": round(self.saving, 3),
                "measured_no_quicker": self.apart,
                "measured_not_exact": self.inexact,
                "seeds_apart": self.seeds_apart,
            },
            "unpinned": list(self.unpinned),
            "refusals": list(self.refusals),
            "left_out": [asdict(one) for one in self.sweep.left_out],
            "warnings": list(self.sweep.warnings),
            "tuning": list(tuning.notes(self.sweep)),
        }


def plan(
    sweep: Sweep | str | Path,
    ledger: Ledger | str | Path = "results",
    *,
    stale: bool = False,
    only: Sequence[str] = (),
    workers: Workers | None = None,
) -> Plan:
    """Subtract what the ledger holds from a sweep.

    Args:
        sweep: A sweep, or the path of a sweep file.
        ledger: A ledger, or where it is.
        stale: Whether stale trials are to be trained anew.
        only: Labels, globs over them or trial ids: the plan of no other trials than these and the
            pretrainings that they need. Default: of all.
        workers: What packs are formed for. Default: the cores of this machine.

    Raises:
        SweepFileError: If the sweep file is wrong.
        LedgerError: If the ledger cannot be read.
    """
    ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
    sweep = sweep if isinstance(sweep, Sweep) else load(sweep)
    sweep = tuning.resolve(sweep, ledger).only(only)
    status, why = _judge(sweep, ledger, stale=stale)
    runs: dict[str, int] = {}  # trial id -> pretrainings that have to be trained before it
    for point in sweep.all:  # A pretraining comes after those that it depends on.
        own, parent = status[point.trial_id], point.parent
        if own not in ("missing", "blocked", "stale") or (own == "stale" and not stale):
            continue
        if point.undecided:
            continue
        if parent in runs:
            runs[point.trial_id] = runs[parent] + 1
        elif own != "blocked" and (parent is None or status.get(parent, "done") == "done"):
            runs[point.trial_id] = 0
    workers = calibration.calibrated(workers or Workers.here(), ledger)
    stages = _stages(sweep, runs)
    shorter = _shorter(ledger, [point for stage in stages for point in stage])
    for name, words in _extensions(shorter).items():
        why[name] = f"{why[name]}; {words}" if name in why else words
    goes_on = {name: one.trial_id for name, one in shorter.items() if not one.obstacle}
    packs, apart, inexact = _packs(stages, sweep, ledger, workers, goes_on)
    return Plan(sweep, status, why, packs, workers, apart, inexact, stages)


def in_turn(plans: Iterable[Plan]) -> tuple[Plan, ...]:
    """Return the plans of several files, as if each ran after those before it: a trial that they
    share is left in the first of them alone.

    Trials whose setting is still to be chosen are the same ones where the same study chooses it.
    """
    seen: set[str] = set()
    out = []
    for one in plans:
        studies = {point.trial_id: own.key for own in one.sweep.studies for point in own.points}
        keys = {
            point.trial_id: f"{point.trial_id} {studies[point.trial_id]}"
            if point.undecided
            else point.trial_id
            for point in one.sweep.all
        }
        new = {name for name, key in keys.items() if key not in seen}
        keys_of_studies = {own.key for own in one.sweep.studies} - seen
        seen |= {*keys.values(), *keys_of_studies}
        out.append(one if len(new) == len(keys) else one.part(new, keys_of_studies))
    return tuple(out)


class IncrementalPlanner:
    """Plans what becomes known of a sweep while it runs: a cell's own trials, once it is tuned.

    So that nothing waits for anything but the trials that tune it.
    """

    def __init__(self, planned: Plan, ledger: Ledger, *, stale: bool = False) -> None:
        """Take the plan that is being run.

        Raises:
            LedgerError: If the ledger cannot be read.
        """
        self._sweep = planned.sweep
        self._ledger = ledger
        self._stale = stale
        self._workers = planned.workers
        self._known = {point.trial_id for point in planned.sweep.all}
        self._ended: set[str] = set()
        """What ended before its plan, or was told of. Of a trial that ended since its plan, by
        another driver, it is still told."""
        self._left: dict[str, set[str]] = {}
        """Trial -> what its study waits for; one set a study."""
        self._look(planned)

    def _look(self, planned: Plan) -> None:
        if not self._sweep.studies:
            return
        self._ended |= {n for n, s in planned.status.items() if s in ("done", "diverged")}
        for state in tuning.states(self._sweep, self._ledger):
            left = {point.trial_id for point in state.trials} - self._ended
            self._left.update(dict.fromkeys(left, left))

    def __call__(self, trial_id: str) -> Plan | None:
        """Return the plan of the trials that have become known by the end of another.

        If the ledger cannot be read, there is none, and the next run finds them.
        """
        self._ended.add(trial_id)
        left = self._left.pop(trial_id, None)
        if left is None:
            return None
        left.discard(trial_id)
        if left:
            return None
        try:
            tuning.note_asked(self._sweep, self._ledger)
            self._sweep = tuning.resolve(self._sweep, self._ledger)
            new = [
                point
                for point in (*self._sweep.tunings, *self._sweep.points)
                if not point.undecided and point.trial_id not in self._known
            ]
            if not new:
                return None
            self._known.update(point.trial_id for point in new)
            only = replace(self._sweep, points=tuple(new), tunings=(), studies=())
            planned = plan(only, self._ledger, stale=self._stale, workers=self._workers)
            self._look(planned)
        except LedgerError:
            return None
        names = {point.trial_id for point in new}
        packs = [p for p in planned.packs if names.issuperset(one.trial_id for one in p.points)]
        status = {name: planned.status[name] for name in names}
        return replace(planned, status=status, packs=tuple(packs))


def _stages(sweep: Sweep, runs: Mapping[str, int]) -> tuple[tuple[Point, ...], ...]:
    # Pretrainings first, since others wait for them; then what waits for none; trials of one
    # backbone one after another, so that a worker seldom loads another one. The trials of a stage
    # can start together.
    first = {point.trial_id for point in sweep.pretrainings}
    groups: dict[object, int] = {}
    keys: dict[str, tuple[bool, int, int]] = {}
    points = [point for point in sweep.all if point.trial_id in runs]
    for point in points:
        name, config = point.trial_id, point.config
        if name in first:
            keys[name] = (False, runs[name], 0)
        else:
            group = groups.setdefault((config.backbone, config.pretraining), len(groups))
            keys[name] = (True, runs[name], group)
    ordered = sorted(points, key=lambda point: keys[point.trial_id])
    stages = itertools.groupby(ordered, key=lambda point: keys[point.trial_id][:2])
    return tuple(tuple(stage) for _, stage in stages)


def _packs(
    stages: Collection[Collection[Point]],
    sweep: Sweep,
    ledger: Ledger,
    workers: Workers,
    goes_on: Mapping[str, str],
) -> tuple[tuple[Pack, ...], int, int]:
    # What to train, and how many trials the ledger has measured to be no quicker in packs, and how
    # many not to be exact there.
    points = [point for stage in stages for point in stage]
    rule = sweep.spec.pack
    most = {"auto": None, "off": 1}[rule] if isinstance(rule, str) else rule
    slow: frozenset[tuple[object, ...]] = frozenset()
    inexact: frozenset[tuple[object, ...]] = frozenset()
    if points and rule == "auto":
        slow = packing.no_quicker(ledger, workers.device)
    if points and rule != "off":
        inexact = packing.not_exact(ledger, workers.device)
    formed = packing.form(stages, workers, most, slow | inexact)
    packs = tuple(
        Pack(
            members,
            workers.resources,
            {n: goes_on[n] for n in (point.trial_id for point in members) if n in goes_on},
        )
        for members in formed
    )
    kinds = Counter(packing.kind_of(point.config) for point in points) if slow | inexact else {}
    apart = sum(kinds[kind] for kind in kinds if kind in slow - inexact)
    return packs, apart, sum(kinds[kind] for kind in kinds if kind in inexact)


def _judge(
    sweep: Sweep, ledger: Ledger, *, stale: bool
) -> tuple[dict[str, Status], dict[str, str]]:
    # The status of each trial, and why, in the order of sweep.all.
    points = {point.trial_id: point for point in sweep.all}
    done = ledger.done()
    outcomes = _outcomes(ledger, points.keys() & done)
    changed = trained_by_other_code([points[name] for name in outcomes], ledger)
    for name in changed:
        del outcomes[name]
    open_ = {
        name: point
        for name, point in points.items()
        if name not in outcomes and not point.undecided
    }
    failed, forgotten = _noted(ledger, open_)
    older = changed | trained_under_older_version(
        [p for name, p in open_.items() if name not in failed and name not in changed],
        ledger,
        done,
    )
    backbones = ledger.backbones() if any(p.parent for p in points.values()) else set()

    # A backbone is needed by what will train. From the last to the first, since to train a
    # pretraining again may need another one's.
    needed: set[str] = set()
    again: set[str] = set()  # trained, and their backbones are gone
    for name, point in reversed(points.items()):
        if outcomes.get(name) == "done" and name in needed and name not in backbones:
            again.add(name)
        trains = name not in outcomes and name not in failed and (stale or name not in older)
        if (trains or name in again) and point.parent is not None:
            needed.add(point.parent)

    status: dict[str, Status] = {}
    why: dict[str, str] = {}
    for name, point in points.items():
        if name in outcomes and name not in again:
            status[name] = outcomes[name]
        elif name in failed:
            status[name], why[name] = "failed", failed[name]
        elif name in older:
            status[name], why[name] = "stale", older[name]
        else:
            reason = _blocked_by(point, points, status, done & backbones)
            status[name] = "blocked" if reason else "missing"
            if name in again:
                reason = reason or "trained, but its backbone is gone: to be trained again"
            if reason or name in forgotten:
                why[name] = reason or forgotten[name]
    return status, why


def _blocked_by(
    point: Point,
    points: Mapping[str, Point],
    status: Mapping[str, Status],
    usable: Collection[str],
) -> str:
    # Why a trial cannot start yet; empty if it can.
    if point.undecided:
        return point.undecided
    parent = point.parent
    if parent is None or status.get(parent) == "done":
        return ""
    if parent not in points:
        what = f"takes the backbone of trial {parent}, which this file does not train"
        return "" if parent in usable else what
    name = points[parent].label
    reasons: dict[Status, str] = {
        "diverged": f"{name}, whose backbone it takes, diverged",
        "failed": f"{name}, whose backbone it takes, failed",
        "stale": f"{name}, whose backbone it takes, is stale",
    }
    return reasons.get(status[parent], f"after {name}, whose backbone it takes")


def _outcomes(ledger: Ledger, ids: Collection[str]) -> dict[str, Status]:
    if not ids:
        return {}
    rows = ledger.trials(ids, columns=["trial_id", "outcome"]).to_pydict()
    return {
        name: "diverged" if outcome == "diverged" else "done"
        for name, outcome in zip(rows["trial_id"], rows["outcome"], strict=True)
    }


def _noted(ledger: Ledger, ids: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    # Trials whose last failure has to be mended first, and what it was; and those whose rows were
    # forgotten, and when.
    notes = ledger.last_notes(ids) if ids else {}
    failed = {
        name: f"{row['cause']}: {row['exception']}: {(row['message'] or '').partition(chr(10))[0]}"
        for name, row in notes.items()
        if row["cause"] in WAITS
    }
    forgotten = {
        name: f"forgotten on {row['at']:%Y-%m-%d}; to be trained again"
        for name, row in notes.items()
        if row["cause"] == "forgotten"
    }
    return failed, forgotten


def trained_under_older_version(
    points: Collection[Point], ledger: Ledger, done: Collection[str]
) -> dict[str, str]:
    """Return the trials that were trained under another version of their task, or of the identity.

    Args:
        points: Trials without a row.
        ledger: The ledger.
        done: `Ledger.done`.

    Returns:
        Trial id -> what is to be said of it.

    Raises:
        LedgerError: If the ledger cannot be read.
    """
    ours = {point.trial_id for point in points}
    others = {name for name in done if name not in ours}
    if not points or not others:
        return {}
    versions = {name: task.version for name, task in TASKS.items()}
    versions |= {point.like.task.name: point.like.task.version for point in points}
    columns = ["trial_id", "task", "task_version", "identity_version"]
    # Damage to rows that are none of ours is no reason to stop.
    rows = {
        row["trial_id"]: row
        for row in ledger.trials(others, columns=columns, strict=False).to_pylist()
        if row["identity_version"] != IDENTITY_VERSION
        or row["task_version"] != versions.get(row["task"], row["task_version"])
    }
    if not rows:
        return {}
    configs = ledger.trials(rows, columns=["trial_id", "config"], strict=False).to_pylist()
    found = {_unversioned(json.loads(row["config"])): rows[row["trial_id"]] for row in configs}
    out = {}
    for point in points:
        row = found.get(_unversioned(point.config.identity()))
        if row is not None:
            out[point.trial_id] = (
                f"trained as {row['trial_id']} under version {row['task_version']} of task "
                f"{row['task']}; `sweep run --stale` trains it anew"
            )
    return out


def trained_by_other_code(points: Iterable[Point], ledger: Ledger) -> dict[str, str]:
    """Return the trials whose row was given by other code of the user's than this process has.

    Args:
        points: Trials; those in which no code of a user's takes part are passed over.
        ledger: The ledger.

    Returns:
        Trial id -> what is to be said of it.

    Raises:
        LedgerError: If the ledger cannot be read.
    """
    own = {point.trial_id: point for point in points if point.like.own_classes}
    if not own:
        return {}
    rows = ledger.trials(own, columns=["trial_id", "own_code"]).to_pylist()
    now: dict[object, JSON] = {}
    out = {}
    for row in rows:
        like = own[row["trial_id"]].like
        if row["own_code"] is None:
            continue  # of a release that kept none
        code = now.setdefault(like.own_classes, dict(like.own_code))
        if changed := changed_files(json.loads(row["own_code"]), code):
            out[row["trial_id"]] = (
                f"trained with another {changed}; `sweep run --stale` trains it anew"
            )
    return out


def changed_files(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Return the names of files whose digests differ, in words; empty: none."""
    names = sorted(n for n in one.keys() | other.keys() if one.get(n) != other.get(n))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


@dataclass(frozen=True)
class _Shorter:
    # A finished training of the same trial with fewer steps.
    trial_id: str
    steps: int
    obstacle: str
    """Why a longer one cannot go on from its end; empty: it can."""


def _shorter(ledger: Ledger, points: Collection[Point]) -> dict[str, _Shorter]:
    # Trials that only go on where a finished one with fewer steps has ended, or could if nothing
    # were in the way; of several, the longest that nothing is in the way of.
    done = ledger.done() - {point.trial_id for point in points} if points else set()
    if not done:
        return {}
    rows = ledger.trials(done, columns=["trial_id", "task", "seed", "steps"], strict=False)
    most = max(point.config.steps for point in points)
    alike = {(point.config.task.name, point.config.seed) for point in points}
    ids = [
        row["trial_id"]
        for row in rows.to_pylist()
        if (row["steps"] or 0) < most and (row["task"], row["seed"]) in alike
    ]
    if not ids:
        return {}
    open_: dict[str, list[Point]] = {}
    for point in points:
        open_.setdefault(_stepless(point.config.identity()), []).append(point)
    columns = ["trial_id", "steps", "evaluate_every", "outcome", "identity_version", "config"]
    columns.append("own_code")
    kept = ledger.states()
    found: dict[str, _Shorter] = {}
    for row in ledger.trials(ids, columns=columns, strict=False).to_pylist():
        if row["identity_version"] != IDENTITY_VERSION:
            continue
        for point in open_.get(_stepless(json.loads(row["config"])), ()):
            if row["steps"] < point.config.steps:
                why = _obstacle(point, row, kept=row["trial_id"] in kept)
                own = _Shorter(row["trial_id"], row["steps"], why)
                best = found.setdefault(point.trial_id, own)
                found[point.trial_id] = max(
                    (best, own), key=lambda one: (not one.obstacle, one.steps, one.trial_id)
                )
    return found


def _obstacle(point: Point, row: Mapping[str, Any], *, kept: bool) -> str:
    # The rate must not depend on the number of steps, and the last evaluation of the shorter one
    # must be one that the longer one has too: else the two would not end as one run.
    config = point.config
    if config.optimizer.schedule != "constant":
        return f"its rate followed a {config.optimizer.schedule} over all of its steps"
    if config.stop is not None:
        return "a stop rule ended it, or could have"
    if row["outcome"] != "done":
        return "it diverged"
    if row["steps"] % row["evaluate_every"]:
        return (
            f"its last evaluation, at step {row['steps']:,}, is none of this one's, which come "
            f"every {row['evaluate_every']:,}"
        )
    if json.loads(row["own_code"] or "{}") != config.own_code:
        return "it was trained with other code"
    return "" if kept else "its tensors were not kept (`keep` in the sweep file, `sweep gc`)"


def _extensions(shorter: Mapping[str, _Shorter]) -> dict[str, str]:
    # What is to be said of trials that were trained before, for fewer steps.
    return {
        name: f"begins anew, and not from step {one.steps:,} of {one.trial_id}: {one.obstacle}"
        if one.obstacle
        else f"goes on from step {one.steps:,} of {one.trial_id}"
        for name, one in shorter.items()
    }


def _stepless(identity: JSON) -> str:
    return json.dumps({**hashed(identity), "steps": None}, sort_keys=True)


def _unversioned(identity: JSON) -> str:
    identity = hashed(identity)
    task = {name: value for name, value in identity["task"].items() if name != "version"}
    return json.dumps({**identity, "task": task}, sort_keys=True)
