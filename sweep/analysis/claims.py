"""The claims of a sweep, judged: at any time, with what there is so far.

A claim is made anew at each point of the axes under `per`. There the trials of both sides are
compared, as a rule over seeds, by a test of whether they are equal on average
(`sweep.analysis.stats`), once, when all of its pairs have ended, or at each of its `looks`
(`sweep.analysis.looks`). Until then a verdict is provisional. The family over which Holm corrects
is every contrast that the file declares and that has three pairs or more, those without figures
included, so that a verdict is not undone by what trains later. A contrast is supported, if its
corrected p is below 0.05 and the difference has the claimed sign; contradicted, if it has the other
one; else undecided; untested, with fewer than two pairs. Nothing here knows which metrics are
better high: `A > B` is about the number.

A trial that diverged without a figure counts as the trivial baseline (an accuracy) or as the
greatest loss of its contrast: to leave it out would favour the arm that fails. Both results are
said.

There is no verdict from fewer than three pairs, nor from outcomes without any spread. Where
outcomes fall into groups, the t test gives way to what `stats.compare` says of them. A list of
claims that was changed after results, and a file that was extended after a reading, say so on each
contrast (`sweep.analysis.history`).

For what is undecided the seeds are counted that would decide it, with a chance of 0.8, if
difference and spread are in truth what was seen; since that is itself uncertain, so is the count.
They are told as a plan with looks: to add seeds until it works is no test.

Where a claim is made per task on an accuracy, each arm is also summed up over tasks, by the
interquartile mean of its runs. The bootstrap's interval of that is too narrow with few seeds, so it
is shown only with what it covers in truth (benchmarks/coverage.py), and not with fewer than three.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from fpt.spec import JSON
from sweep.analysis import history, looks, typeset
from sweep.analysis.across import across
from sweep.analysis.cells import (
    BEST_SEEN,
    FACTS,
    Found,
    in_unit,
    is_accuracy,
    is_number,
    test_predictions,
    traits,
    unit,
    words,
)
from sweep.analysis.stats import (
    APART,
    LEVEL,
    MOST_PAIRS,
    Comparison,
    Tests,
    compare,
    holm,
    paired,
    pairs_needed,
    seeds_unseen,
    stratified,
)
from sweep.analysis.typeset import Entry, Footnotes, Line, Sheet
from sweep.ledger.ledger import Ledger
from sweep.planning import tuning
from sweep.sweepfile import pairing
from sweep.sweepfile.expansion import load
from sweep.sweepfile.reading import axis_labels
from sweep.sweepfile.schema import (
    CONVERGENCE,
    ClaimSpec,
    ConvergenceSpec,
    MetricName,
    SweepFileError,
)
from sweep.sweepfile.trials import Point, Sweep

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Group

Verdict = Literal["supported", "contradicted", "undecided", "untested"]

LEAST_PAIRS = 3
"""Pairs of a verdict, at least."""

ACCURACY_STEP = 0.1
"""The step of accuracies of a test set whose size is not known, in points: what a table prints."""

COVERAGE = {3: 72, 5: 81, 10: 85}
"""Runs a task -> per cent of simulated sweeps in which the 95 % bootstrap interval of the
interquartile mean held the true one; the worst of all outcomes in benchmarks/coverage.py."""

MOST_EFFECT = 1e3
"""Deviations that a difference without any spread is taken for, to count pairs by."""

LISTED = 12
"""Seeds that an edit names when it is printed; the record has them all."""

BUDGET = ("learning_rate", "batch_size", "steps", "stop", "optimizer", "dropout", "protocol")
"""Fields in which both sides of a claim should be alike, if the claim is not about them."""


@dataclass(frozen=True)
class Contrast:
    """A claim at one place: a point of the axes under `per`, or everything."""

    claim: str
    """As the file has it: `language > random`."""
    axis: str
    metric: str
    place: Mapping[str, str]
    """Axis under `per` -> label."""
    left: str
    right: str
    """The labels of both sides."""
    pairs: int
    """Pairs of which both trials have a figure."""
    expected: int
    """Pairs that the sweep has."""
    difference: float | None
    """Mean of left minus right over the pairs, in the unit of a table."""
    low: float | None
    high: float | None
    """The 95 % t interval of the difference, for this contrast alone."""
    low_family: float | None
    high_family: float | None
    """The interval at the level that Holm's correction and the plan of looks leave this contrast;
    None where the t test is not what decides."""
    effect: float | None
    """The difference over the deviation of a difference between two seeds, one of each side."""
    p: float | None
    """Of the two-sided test, uncorrected, of the pairs that it counts."""
    p_holm: float | None
    """The same, corrected for looks, extensions and the family."""
    p_first: float | None
    """The same over the list of claims in force before the first row, with what was added to it;
    None if that is the list of today, or none was noted."""
    verdict: Verdict
    provisional: bool
    """Whether it is read before its plan says so: it may still change."""
    more_seeds: int | None
    """Further pairs that would decide it. None: it is decided, or nobody can tell. 0: those that
    are still to be trained would."""
    edit: str | None
    """The line of the sweep file that adds them."""
    plan: str | None
    """The line of the claim that makes them a plan."""
    notes: tuple[str, ...]
    """What is to be known of both sides: what is missing, diverged, untuned ..."""
    trials: tuple[tuple[str, str], ...]
    """(left, right) trial ids, of every pair that the sweep has."""

    def record(self) -> JSON:
        """All of it as JSON values."""
        return asdict(self) | {
            "notes": list(self.notes),
            "trials": [list(pair) for pair in self.trials],
            "unit": "per cent" if is_accuracy(self.metric) else None,
        }


@dataclass(frozen=True)
class Aggregate:
    """An arm of claims, summed up over the places that they are made at."""

    axis: str
    metric: str
    arm: str
    """A label of the axis."""
    over: str
    """The axes of the places: `task`."""
    places: int
    """Places at which every arm has a run; the others are left out for all."""
    of: int
    """Places that there are."""
    runs: int
    mean: float
    """The interquartile mean over all runs, in the unit of a table."""
    low: float | None
    high: float | None
    """Its 95 % bootstrap interval; None with fewer than three runs at a place."""
    coverage: int | None
    """Per cent of simulated sweeps in which such an interval held the true value."""
    trials: tuple[str, ...]
    even: bool = True
    """Whether it has as many runs at each place. If not, a place with more weighs more."""

    def record(self) -> JSON:
        """All of it as JSON values."""
        return asdict(self) | {"trials": list(self.trials)}


@dataclass(frozen=True)
class Overall:
    """A claim on an accuracy over all the places that it is made at."""

    claim: str
    axis: str
    metric: str
    over: str
    """The axes of the places: `task`."""
    places: int
    """Places at which both sides have a run, and somebody is better than chance."""
    of: int
    """Places that there are."""
    difference: float
    """Mean difference of left minus right, where 0 is chance and 1 the best run of a place."""
    improvement: float
    """The probability that a run of the left side beats one of the right at a place."""
    p: float
    """Of the signed-rank test over places; of this claim alone."""

    def record(self) -> JSON:
        """All of it as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Judged:
    """The claims of a sweep, with what there is so far."""

    sweep: str
    """The name of the sweep."""
    contrasts: tuple[Contrast, ...]
    """In the order of the file."""
    aggregates: tuple[Aggregate, ...]
    overall: tuple[Overall, ...] = ()
    noted: str | None = None
    """When the list in force before the first row was noted; None: it was not."""
    late: int | None = None
    """Trials that had a row by then; 0 where the list was there before all results."""
    changed: str | None = None
    """In what the list of today differs from that."""
    unnoted: bool = False
    """Whether there are results, and no list was noted."""
    final: tuple[JSON, ...] = ()
    """What the ledger notes of this reading: the contrasts whose plan has them read by now."""

    def record(self) -> JSON:
        """A JSON object with everything."""
        return {
            "sweep": self.sweep,
            "level": LEVEL,
            "family": {
                "contrasts": sum(one.expected >= LEAST_PAIRS for one in self.contrasts),
                "noted": self.noted,
                "results_when_noted": self.late,
                "changed": self.changed,
            },
            "contrasts": [one.record() for one in self.contrasts],
            "aggregates": [one.record() for one in self.aggregates],
            "overall": [one.record() for one in self.overall],
        }

    def to_frame(self) -> pd.DataFrame:
        """A pandas row for each contrast; `place.<axis>` for each axis under `per`."""
        import pandas as pd

        return pd.DataFrame(self._flat())

    def to_csv(self) -> str:
        """A line for each contrast, in full precision; what it has several of is in one field."""
        rows = self._flat()
        names = list(dict.fromkeys(name for row in rows for name in row))
        joined = [row | {"trials": list(map("/".join, row["trials"]))} for row in rows]
        return typeset.comma_separated(names, joined)

    def to_markdown(self) -> str:
        """The claims in GitHub's Markdown."""
        return "\n".join(map(typeset.markdown, self.sheets))

    def to_latex(self) -> str:
        """A `table` environment, or two (packages booktabs, xcolor)."""
        return "\n".join(map(typeset.latex, self.sheets))

    def to_rich(self) -> Group:
        """What `rich` prints."""
        from rich.console import Group
        from rich.text import Text

        first, *rest = map(typeset.terminal, self.sheets)
        return Group(first, *(part for sheet in rest for part in (Text(), sheet)))

    def _repr_html_(self) -> str:
        return f"<style>{typeset.CSS}</style>" + "".join(map(typeset.fragment, self.sheets))

    @property
    def sheets(self) -> tuple[Sheet, ...]:
        """What is printed, in whatever format: the claims, and the arms over tasks if there are."""
        return tuple(filter(None, (self.sheet, self.summary, self.over_places)))

    @functools.cached_property
    def sheet(self) -> Sheet:
        """The claims, ready to be printed."""
        return _sheet(self)

    @functools.cached_property
    def summary(self) -> Sheet | None:
        """The arms over tasks, ready to be printed; None without."""
        return _summary(self) if self.aggregates else None

    @functools.cached_property
    def over_places(self) -> Sheet | None:
        """The claims over all of their places, ready to be printed; None without."""
        return _over_places(self) if self.overall else None

    def _flat(self) -> list[JSON]:
        return [
            {
                name: value
                for key, own in one.record().items()
                for name, value in (
                    {f"place.{axis}": label for axis, label in own.items()}
                    if key == "place"
                    else {key: own}
                ).items()
            }
            for one in self.contrasts
        ]


def judge(sweep: Sweep, ledger: Ledger) -> Judged:
    """Judge the claims of a sweep by what the ledger holds. Nothing is noted: see `show`.

    Raises:
        SweepFileError: If the sweep file makes no claim.
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    claims = sweep.spec.claims
    if not claims:
        example = "claims: [{that: A > B, axis: pretraining, per: task}]"
        raise SweepFileError(
            [f"{sweep.file}: claims: missing; add some, such as `{example}`, over its axes"]
        )
    sweep = tuning.resolve(sweep, ledger)
    past = history.read(sweep, ledger)
    made = _made(claims, sweep)
    first = past.first
    earlier = _made(first.claims, sweep) if first else []
    spots = [spot for _, own in made for spot in own]
    everything = [*spots, *(spot for _, own in earlier for spot in own)]
    inside = {
        point.trial_id: point
        for spot in everything
        for side in (spot.place.left, spot.place.right)
        for points in side.values()
        for point in points
    }
    metrics = tuple(dict.fromkeys(spot.claim.on for spot in everything))
    rule = sweep.table.convergence if sweep.table else ConvergenceSpec()
    found = Found.read(ledger, tuple(inside.values()), metrics, rule)
    tuned, remarks = tuning.notes(sweep), tuning.remarks(sweep, ledger)
    spaces = sweep.spec.tune.spaces if sweep.spec.tune else {}
    fields = {path.partition(".")[0] for path in spaces}
    family = _Family([_Read(spot, found, past) for spot in spots])
    before = _at_first(family, earlier, found, past)
    axes = axis_labels(sweep.spec)
    contrasts = [
        _contrast(read, family, found, axes[read.claim.paired_by], tuned, fields, remarks)
        for read in family.reads
    ]
    change = history.change(sweep, past)
    best = tuning.budgets(sweep, ledger)
    contrasts = [
        _with_budget(one, read, best) for read, one in zip(family.reads, contrasts, strict=True)
    ]
    marked = [
        _marked(one, read, family, before, change) if change else one
        for read, one in zip(family.reads, contrasts, strict=True)
    ]
    known = bool(found.rows)
    return Judged(
        sweep.name,
        tuple(_torn(iter(marked))),
        tuple(_aggregates(made, found)),
        tuple(_overall(made, found)),
        noted=first.at if first else None,
        late=first.results if first else None,
        changed=change,
        unnoted=known and first is None,
        final=tuple(
            read.note(one) for read, one in zip(family.reads, marked, strict=True) if read.final
        ),
    )


def show(sweep: Sweep, ledger: Ledger) -> Judged:
    """Judge the claims of a sweep to show them to somebody, which the ledger notes.

    Raises:
        SweepFileError: If the sweep file makes no claim.
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    judged = judge(sweep, ledger)
    history.note_reading(sweep, ledger, judged.final)
    return judged


def load_claims(file: str | Path, results: str | Path = "results") -> Judged:
    """The claims of a sweep file, judged by what there is so far.

    Raises:
        SweepFileError: If the file is wrong, or makes no claim.
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    return show(load(file), Ledger(results))


# --- a contrast ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spot:
    # A claim at a place.
    claim: ClaimSpec
    labels: pairing.Labels
    place: pairing.PairGroup

    @property
    def at(self) -> dict[str, str]:
        return dict(zip(self.claim.places, self.labels, strict=True))

    @property
    def key(self) -> history.Key:
        return history.key(self.claim, self.at)


_Made = list[tuple[ClaimSpec, list[_Spot]]]


def _made(claims: Sequence[ClaimSpec], sweep: Sweep) -> _Made:
    return [
        (claim, [_Spot(claim, *one) for one in pairing.group_pairs(claim, sweep.points).items()])
        for claim in claims
    ]


@dataclass(frozen=True)
class _Outcome:
    # A pair, with what its trials came to, in the unit of a table; None: nothing yet, or nothing.
    label: str
    left: float | None
    right: float | None
    ended: bool
    given: bool
    # Whether one of them diverged without a figure, and has been given one.


@dataclass(frozen=True)
class _Test:
    # The test of some of a contrast's pairs.
    pairs: int
    result: Tests
    groups: Comparison | None
    constant: bool

    @property
    def mixed(self) -> bool:
        return self.groups is not None and bool(self.groups.mixed)

    def apart(self, wary: bool) -> bool:
        # Whether a group that was not seen is reckoned with.
        return self.groups is not None and not self.mixed and (bool(self.groups.grouped) or wary)

    def p(self, wary: bool) -> float:
        if self.groups is not None:
            return float(self.groups.p(wary))
        return 1.0 if self.constant else float(self.result.p)

    @property
    def positive(self) -> bool:
        # Whether the left side has more: of seeds in the upper group, or on average.
        if self.mixed:
            assert self.groups is not None
            return bool(self.groups.left_upper > self.groups.right_upper)
        return bool(self.result.mean > 0)


class _Read:
    # A contrast as its plan has it read: which of its pairs count, and what they say.

    def __init__(self, spot: _Spot, found: Found, past: history.History) -> None:
        claim = spot.claim
        self.spot, self.claim, self.found = spot, claim, found
        self.outcomes = tuple(_outcomes(spot, found))
        self.expected = len(self.outcomes)
        ended = [one.ended for one in self.outcomes]
        steady = ended.index(False) if False in ended else len(ended)
        every = tuple(one.label for one in self.outcomes)
        self.step = _step(claim.on, [left for _, left, _ in spot.place.pairs])
        self.bounds = _bounds(spot)
        # The plans that have ended before this one: each spent its error on the pairs it saw.
        self.before = tuple(self.test(labels) for labels in past.spent(spot.key, every[:steady]))
        self.before_pairs = max(
            (len(one) for one in past.spent(spot.key, every[:steady])), default=0
        )
        self.looks = tuple(look for look in claim.looks if look > self.before_pairs)
        reached = [look for look in self.looks if look <= steady]
        self.final = bool(reached) if self.looks else bool(ended) and all(ended)
        self.last = self.final and (not self.looks or reached[-1] == self.looks[-1])
        self.reached = len(reached)
        self.counted = every[: reached[-1]] if reached else every
        self.tests = tuple(self.test(every[:look]) for look in reached) or (
            self.test(self.counted),
        )
        self.now = self.tests[-1]

    def test(self, labels: Collection[str], *, given: bool = True) -> _Test | None:
        pairs = [
            (one.left, one.right)
            for one in self.outcomes
            if one.label in labels and (given or not one.given)
            and one.left is not None and one.right is not None
        ]  # fmt: skip
        if len(pairs) < 2:
            return None
        left, right = np.array(pairs, dtype=np.float64).T
        differences = np.round(left - right, 9)
        if not self.claim.by_arms:
            result = paired(differences, self.step)
            return _Test(len(pairs), result, None, bool(np.ptp(differences) == 0))
        groups = compare(left, right, self.step, self.bounds)
        return _Test(len(pairs), groups.test, groups, bool(groups.constant))

    @property
    def wary(self) -> bool:
        return any(test is not None and test.mixed for test in self.tests)

    @property
    def counts(self) -> bool:
        # Whether it is one of the family.
        return self.expected >= LEAST_PAIRS

    def p(self, wary: bool) -> float:
        # Corrected for looks and extensions, and not for the family yet.
        if self.now is None or self.now.pairs < LEAST_PAIRS:
            return 1.0
        if self.reached:
            ps = [1.0 if test is None else test.p(wary) for test in self.tests]
            own = looks.sequential(ps, self.looks, self.claim.spending)
        else:
            own = self.now.p(wary)
        found = [own * looks.penalty(len(self.before))]
        found += [
            test.p(wary) * looks.penalty(number)
            for number, test in enumerate(self.before)
            if test is not None and test.pairs >= LEAST_PAIRS and test.positive == self.now.positive
        ]
        return min(*found, 1.0)

    def level(self, total: float) -> float:
        # The level of the test that is read now, where the plan may err so often.
        total /= looks.penalty(len(self.before))
        if not self.reached:
            return total
        return looks.levels(self.looks, total, self.claim.spending)[self.reached - 1]

    def note(self, one: Contrast) -> JSON:
        # What is noted of a reading.
        return {
            "axis": self.claim.axis,
            "paired_by": self.claim.paired_by,
            "metric": self.claim.on,
            "place": sorted([axis, label] for axis, label in self.spot.at.items()),
            "sides": sorted(self.claim.sides),
            "pairs": list(self.counted),
            "last": self.last,
            "verdict": one.verdict,
            "p": one.p_holm,
        }


class _Family:
    # Contrasts that are corrected together.

    def __init__(self, reads: Sequence[_Read]) -> None:
        self.reads = tuple(reads)
        # Where one arm has shown groups, others of this metric may do so unseen.
        self._wary = {read.claim.on for read in reads if read.wary}
        members = [read for read in reads if read.counts]
        corrected = holm(np.array([read.p(self.wary(read)) for read in members]))
        self.size = len(members)
        self.p = dict(zip(members, map(float, corrected), strict=True))
        # Holm's level for the largest p that would still be rejected, and so for any that is not.
        self.open = max(sum(p >= 1 - LEVEL for p in self.p.values()), 1)
        ordered = sorted(self.p, key=lambda read: read.p(self.wary(read)))
        self._rank = {read: self.size - number for number, read in enumerate(ordered)}

    def wary(self, read: _Read) -> bool:
        return read.claim.on in self._wary

    def level(self, read: _Read) -> float:
        # What Holm's correction leaves a contrast.
        decided = self.p.get(read, 1.0) < 1 - LEVEL
        return (1 - LEVEL) / (self._rank[read] if decided else self.open)


def _contrast(
    read: _Read,
    family: _Family,
    found: Found,
    labels: Collection[str],
    tuned: Sequence[str],
    fields: Collection[str],
    remarks: Mapping[str, str],
) -> Contrast:
    claim, now, wary = read.claim, read.now, family.wary(read)
    pairs = list(read.spot.place.pairs)
    values = [
        (one.left, one.right)
        for one in read.outcomes
        if one.label in read.counted and one.left is not None and one.right is not None
    ]
    mean = float(np.mean([left - right for left, right in values])) if values else None
    result = now.result if now else None
    decides = now is not None and now.pairs >= LEAST_PAIRS
    p_holm = family.p.get(read) if decides else None
    verdict = _verdict(read, p_holm)
    level = read.level(family.level(read)) if read in family.p else 0.0
    half = float(result.half_width_at(level)) if result is not None and level else None
    # Where groups decide, an interval of the t test would contradict the verdict.
    honest = (
        half is not None
        and mean is not None
        and now is not None
        and not (now.mixed or now.constant)
        and (verdict == "undecided") == (abs(mean) <= half)
    )
    effect = (
        float(result.mean / result.deviation) if result is not None and result.deviation else None
    )
    more = _more_seeds(read, family) if verdict == "undecided" and decides else None
    edit = _edit(claim.paired_by, list(labels), more) if more else None
    left, right = claim.sides
    notes = (
        *_fates(claim, pairs, found),
        *_devices(claim, pairs, found),
        *_withheld(read, wary),
        *_history(read),
        *_unlike(claim, pairs, tuned, fields, remarks),
    )
    return Contrast(
        claim=claim.that,
        axis=claim.axis,
        metric=claim.on,
        place=read.spot.at,
        left=left,
        right=right,
        pairs=len(values),
        expected=read.expected,
        difference=None if mean is None else round(mean, 9),
        low=float(result.mean - result.half_width) if result else None,
        high=float(result.mean + result.half_width) if result else None,
        low_family=mean - half if honest and mean is not None and half is not None else None,
        high_family=mean + half if honest and mean is not None and half is not None else None,
        effect=effect,
        p=now.p(wary) if now else None,
        p_holm=p_holm,
        p_first=None,
        verdict=verdict,
        provisional=verdict != "untested" and not read.final,
        more_seeds=more,
        edit=edit,
        plan=_plan(read, more) if edit else None,
        notes=notes,
        trials=tuple((one.trial_id, other.trial_id) for _, one, other in pairs),
    )


def _verdict(read: _Read, p: float | None) -> Verdict:
    if read.now is None:
        return "untested"
    if p is None or p >= 1 - LEVEL:
        return "undecided"
    return "supported" if read.now.positive == read.claim.more else "contradicted"


def _outcomes(spot: _Spot, found: Found) -> Iterator[_Outcome]:
    claim = spot.claim
    pairs = list(spot.place.pairs)
    measured = [
        in_unit(claim.on, value)
        for _, *both in pairs
        for point in both
        if is_number(value := _value(found, point, claim.on))
    ]
    for label, *both in pairs:
        values: list[float | None] = []
        given = False
        for point in both:
            value = _value(found, point, claim.on)
            if is_number(value):
                values.append(in_unit(claim.on, value))
            else:
                worst = _worst(found, point, claim.on, measured)
                given |= worst is not None
                values.append(worst)
        left, right = values
        yield _Outcome(label, left, right, all(p.trial_id in found.rows for p in both), given)


def _worst(
    found: Found, point: Point, metric: MetricName, measured: Sequence[float]
) -> float | None:
    # What a trial counts as that diverged without a figure.
    if point.trial_id not in found.rows or found.fate(point.trial_id) != "diverged":
        return None
    if is_accuracy(metric):
        chance = found.columns["baseline_accuracy"][found.rows[point.trial_id]]
        if is_number(chance):
            return min(in_unit(metric, chance), *measured)
        return min(measured, default=None)
    return max(measured, default=None) if metric.endswith("_loss") else None


def _bounds(spot: _Spot) -> tuple[float, float] | None:
    # Where outcomes of an accuracy could lie that were not seen: from chance to all right. A
    # trivial baseline may be a whole classifier's, which a seed that fails falls far below.
    configs = [point.like for _, *both in spot.place.pairs for point in both]
    if not is_accuracy(spot.claim.on) or not configs:
        return None
    return 100 / max(one.task.shape(one.protocol).classes for one in configs), 100.0


def _value(found: Found, point: Point, metric: MetricName) -> float | None:
    return found.value(point.trial_id, metric) if point.trial_id in found.rows else None


def _step(metric: MetricName, points: Sequence[Point]) -> float:
    # The resolution of a metric; 0 where it has none to speak of.
    if metric == "test_accuracy":
        return max((_accuracy_step(point) for point in points), default=ACCURACY_STEP)
    if is_accuracy(metric):
        return ACCURACY_STEP
    if metric in (CONVERGENCE, "best_step", "steps_trained"):
        return max((point.config.evaluation.every for point in points), default=0)
    return 0.0


def _accuracy_step(point: Point) -> float:
    # A prediction more or less, in points.
    number = test_predictions(point.like)
    return ACCURACY_STEP if number is None else 100 / number


def _fates(
    claim: ClaimSpec, pairs: Sequence[tuple[str, Point, Point]], found: Found
) -> Iterator[str]:
    # What is to be known of trials that did not simply end, a note for each side and fate.
    out: dict[tuple[str, str], list[str]] = {}
    for label, *points in pairs:
        for side, point in zip(claim.sides, points, strict=True):
            fate = found.fate(point.trial_id)
            why = f" ({found.failed[point.trial_id]})" if fate == "failed" else ""
            if fate not in ("done", "diverged"):
                fate = point.undecided or f"{fate}{why}"
                out.setdefault((side, fate), []).append(label)
            elif not is_number(found.value(point.trial_id, claim.on)):
                unconverged = found.converged.get(point.trial_id)
                reason = unconverged.reason if unconverged else f"{fate}, without a figure"
                out.setdefault((side, f"{reason}, {_counted(claim.on, fate)}"), []).append(label)
            elif fate == "diverged":
                what = "diverged, the last good figures before that count"
                out.setdefault((side, what), []).append(label)
            parts = found.parts(point.trial_id) if point.trial_id in found.rows else 1
            if parts > 1:
                what = f"each batch in {parts} parts, since it did not fit into memory"
                out.setdefault((side, what), []).append(label)
    for (side, fate), labels in out.items():
        yield f"{side}: {fate} ({claim.paired_by} {', '.join(labels)})"


def _devices(
    claim: ClaimSpec, pairs: Sequence[tuple[str, Point, Point]], found: Found
) -> Iterator[str]:
    # Where the trials of a contrast were trained, if on more than one kind of device: what differs
    # may then be the device.
    labels: dict[tuple[str, str], list[str]] = {}
    for label, *points in pairs:
        for side, point in zip(claim.sides, points, strict=True):
            if point.trial_id in found.rows and (device := found.device(point.trial_id)):
                labels.setdefault((side, device), []).append(label)
    if len({device for _, device in labels}) > 1:
        told = (
            f"{side} on {device} ({claim.paired_by} {', '.join(own)})"
            for (side, device), own in labels.items()
        )
        yield f"trained on different devices: {'; '.join(told)}"


def _unlike(
    claim: ClaimSpec,
    pairs: Sequence[tuple[str, Point, Point]],
    tuned: Sequence[str],
    fields: Collection[str],
    remarks: Mapping[str, str],
) -> Iterator[str]:
    # What the reader of a claim should know of its sides, whatever their figures.
    yield from tuned
    if not pairs:
        return
    sides = [[pair[1] for pair in pairs], [pair[2] for pair in pairs]]
    one, other = (points[0].config for points in sides)
    own = claim.axis.partition(".")[0]
    rates = dict.fromkeys((one.learning_rate, other.learning_rate))
    if (
        "learning_rate" not in fields
        and own != "learning_rate"
        and "learning_rate" not in claim.places
    ):
        which = "both arms" if len(rates) == 1 else "each arm"
        told = ", ".join(f"{rate:g}" for rate in rates)
        yield f"{which} at one learning rate ({told}), not tuned"
    unlike = [
        name
        for name in BUDGET
        if getattr(one, name) != getattr(other, name) and name != own and name not in fields
    ]
    if unlike:
        yield f"the arms differ in {', '.join(unlike)} too"
    if one.protocol == "paper" and claim.on == "test_accuracy":
        yield BEST_SEEN
    for side, points in zip(claim.sides, sides, strict=True):
        of_rate = remarks.get(points[0].cell_id)
        for trait in (*traits(points), *([of_rate] if of_rate else [])):
            yield f"{side}: {trait}"


def _counted(metric: MetricName, fate: str) -> str:
    # How a trial without a figure enters.
    if fate == "diverged" and is_accuracy(metric):
        return "counted as the trivial baseline"
    if fate == "diverged" and metric.endswith("_loss"):
        return "counted as the greatest loss"
    return "left out"


def _withheld(read: _Read, wary: bool) -> Iterator[str]:
    # Why there is no verdict, or one by another test than is usual.
    now, claim = read.now, read.claim
    if now is None:
        return
    if now.pairs < LEAST_PAIRS:
        yield f"no verdict from {now.pairs} pairs: {LEAST_PAIRS} at least"
    groups = now.groups
    if groups is not None and now.mixed:
        upper = zip(claim.sides, (groups.left_upper, groups.right_upper), strict=True)
        told = ", ".join(f"{int(number)} of {now.pairs} of {side}" for side, number in upper)
        yield (
            f"outcomes fall into two groups, and {told} are in the upper one: p is of Fisher's "
            "exact test of these shares, and the difference is not what is tested"
        )
    elif groups is not None and now.apart(wary):
        why = (
            f"each arm is a group of its own, more than {APART} times the spread apart"
            if groups.grouped
            else "other arms of this file have outcomes in two groups"
        )
        yield (
            f"{why}: {now.pairs} {claim.paired_by}s each may not show a group that makes up for "
            f"the difference, which stays unseen with probability {float(groups.unseen):.2g}"
        )
    elif now.constant:
        yield "no spread between outcomes: no verdict"
    if any(one.given for one in read.outcomes) and now.pairs >= LEAST_PAIRS:
        other = read.test(read.counted, given=False)
        without = "untested" if other is None else f"p {_p(other.p(other.mixed))}"
        yield f"without those that diverged: {without}, with them {_p(now.p(wary))}, uncorrected"


def _history(read: _Read) -> Iterator[str]:
    # Which reading this is.
    if read.reached and len(read.looks) > 1:
        at = ", ".join(map(str, read.looks))
        yield f"read at {at} pairs; this is look {read.reached}, {len(read.counted)} pairs count"
    elif read.looks and not read.reached:
        yield f"to be read at {', '.join(map(str, read.looks))} pairs"
    if read.before:
        factor = looks.penalty(len(read.before))
        yield (
            f"extended after a final reading of {read.before_pairs} pairs: reading "
            f"{len(read.before) + 1}, its p times {factor:g}"
        )


# --- the family ---------------------------------------------------------------------------------


def _more_seeds(read: _Read, family: _Family) -> int | None:
    # Further pairs that would decide it; None if nobody can tell.
    now, wary = read.now, family.wary(read)
    assert now is not None
    total = (1 - LEVEL) / family.open
    number = len(read.before) + read.last
    level = total / looks.penalty(number)
    if not read.last and read.looks:
        level = looks.levels(read.looks, level, read.claim.spending)[-1]
    effect = _effect(now.result)
    if now.mixed or not effect:
        return None
    needed = pairs_needed(effect, level, float(now.result.freedom) / (now.pairs - 1))
    if needed is None:
        return None
    needed = max(needed, LEAST_PAIRS)
    if now.apart(wary):
        if read.bounds is None:
            return max(_shares_needed(level), needed) - read.expected
        values = [
            (one.left, one.right)
            for one in read.outcomes
            if one.left is not None and one.right is not None
        ]
        left, right = (float(np.mean(side)) for side in zip(*values, strict=True))
        unseen = seeds_unseen(max(left, right), min(left, right), read.bounds, level)
        if unseen is None:
            return None
        needed = max(needed, unseen)
    gone = sum(one.ended and None in (one.left, one.right) for one in read.outcomes)
    return max(needed - (read.expected - gone), 0)


def _shares_needed(level: float) -> int:
    # Pairs of which all are in the one group of the one arm and none of the other's.
    n = LEAST_PAIRS
    while 2 / math.comb(2 * n, n) >= level:
        n += 1
    return n


def _effect(result: Tests) -> float:
    # Without any spread every difference is more than enough.
    if result.deviation:
        return float(result.mean / result.deviation)
    return math.copysign(MOST_EFFECT, float(result.mean)) if result.mean else 0.0


def _plan(read: _Read, more: int | None) -> str | None:
    # The looks that make further pairs a plan: where the plan so far ends, and where the new one.
    if not more:
        return None
    sofar = [*read.claim.looks] if read.claim.looks else [read.expected]
    return f"looks: {[*sofar, read.expected + more]}"


def _at_first(
    family: _Family, earlier: _Made, found: Found, past: history.History
) -> Mapping[history.Key, float]:
    # Contrast -> its corrected p over the first list of claims, with what was added to it since.
    known = {read.spot.key: read for read in family.reads}
    reads = dict(known)
    for _, own in earlier:
        for spot in own:
            reads.setdefault(spot.key, _Read(spot, found, past))
    both = _Family(tuple(reads.values()))
    return {read.spot.key: p for read, p in both.p.items()}


def _marked(
    one: Contrast,
    read: _Read,
    family: _Family,
    before: Mapping[history.Key, float],
    change: str,
) -> Contrast:
    p = before.get(read.spot.key)
    told = f"{change}; corrected p over both lists {_p(p)}, over this one {_p(one.p_holm)}"
    return replace(one, p_first=p, notes=(*one.notes, told if one.p_holm is not None else change))


def _edit(axis: str, labels: Sequence[str], more: int) -> str | None:
    # `seed: [0, 1, 2, 3]`, where the points of the axis are numbers that can be counted on.
    if not all(label.isdecimal() for label in labels):
        return None
    numbers = [int(label) for label in labels]
    first = max(numbers) + 1
    return f"{axis}: {[*numbers, *range(first, first + more)]}"


def _torn(contrasts: Iterator[Contrast]) -> Iterator[Contrast]:
    # Flags claims whose answer depends on the learning rate that they are made at.
    judged = list(contrasts)
    answers: dict[tuple[object, ...], dict[str, list[str]]] = {}
    keys = []
    for one in judged:
        rate = one.place.get("learning_rate")
        rest = tuple(label for axis, label in one.place.items() if axis != "learning_rate")
        keys.append((one.claim, one.axis, one.metric, rest))
        if rate is not None and one.verdict in ("supported", "contradicted"):
            answers.setdefault(keys[-1], {}).setdefault(one.verdict, []).append(rate)
    for one, key in zip(judged, keys, strict=True):
        found = answers.get(key, {})
        if len(found) < 2:
            yield one
            continue
        told = ", ".join(f"{verdict} at {', '.join(rates)}" for verdict, rates in found.items())
        note = f"the answer depends on the learning rate: {told}"
        yield replace(one, notes=(*one.notes, note))


def _with_budget(one: Contrast, read: _Read, best: Mapping[str, Sequence[float]]) -> Contrast:
    # Flags a claim whose arms change places with the points that they are tuned by.
    pairs = next(iter(read.spot.place.pairs), None)
    if pairs is None:
        return one
    left, right = (best.get(point.cell_id, ()) for point in pairs[1:])
    signs = [(a > b) - (a < b) for a, b in zip(left, right, strict=False)]
    if not {1, -1} <= set(signs):
        return one
    ahead = [
        f"{side} with {', '.join(str(k) for k, sign in enumerate(signs, 1) if sign == way)}"
        for side, way in zip(read.claim.sides, (1, -1), strict=True)
    ]
    note = (
        "which arm is ahead depends on the budget of tuning: by expected best of so many points "
        f"{', '.join(ahead)}"
    )
    return replace(one, notes=(*one.notes, note))


# --- over tasks ---------------------------------------------------------------------------------

_Arm = dict[pairing.Labels, list[Point]]
# Place -> its trials.


def _aggregates(made: _Made, found: Found) -> Iterator[Aggregate]:
    # Claims over one axis, one metric and the same places share their arms.
    groups: dict[tuple[str, MetricName, tuple[str, ...]], dict[str, _Arm]] = {}
    for claim, places in made:
        if not is_accuracy(claim.on) or not claim.places:
            continue
        arms = groups.setdefault((claim.axis, claim.on, claim.places), {})
        for spot in places:
            sides = (spot.place.left, spot.place.right)
            for side, trials in zip(claim.sides, sides, strict=True):
                arms.setdefault(side, {})[spot.labels] = [one for (one, *_) in trials.values()]
    for (axis, metric, per), arms in groups.items():
        values = {arm: _figures(found, own, metric) for arm, own in arms.items()}
        of = dict.fromkeys(labels for own in arms.values() for labels in own)
        whole = [labels for labels in of if all(labels in own for own in values.values())]
        if len(whole) < 2:
            continue
        for arm, figures in values.items():
            strata = [list(figures[labels].values()) for labels in whole]
            fewest = min(map(len, strata))
            covers = [per_cent for runs, per_cent in COVERAGE.items() if runs <= fewest]
            mean, low, high = stratified(strata)
            yield Aggregate(
                axis=axis,
                metric=metric,
                arm=arm,
                over=", ".join(per),
                places=len(whole),
                of=len(of),
                runs=sum(map(len, strata)),
                mean=mean,
                low=low if covers else None,
                high=high if covers else None,
                coverage=covers[-1] if covers else None,
                trials=tuple(trial for labels in whole for trial in figures[labels]),
                even=len(set(map(len, strata))) == 1,
            )


def _overall(made: _Made, found: Found) -> Iterator[Overall]:
    for claim, spots in made:
        if not is_accuracy(claim.on) or not claim.places or len(spots) < 2:
            continue
        left, right, chances, bests = [], [], [], []
        for spot in spots:
            sides = [
                [
                    in_unit(claim.on, value)
                    for (point, *_) in trials.values()
                    if is_number(value := _value(found, point, claim.on))
                ]
                for trials in (spot.place.left, spot.place.right)
            ]
            if all(sides) and (bounds := _bounds(spot)):
                left.append(sides[0])
                right.append(sides[1])
                chances.append(bounds[0])
                bests.append(max(map(max, sides)))
        result = across(left, right, chances, bests)
        if result is not None:
            yield Overall(
                claim=claim.that,
                axis=claim.axis,
                metric=claim.on,
                over=", ".join(claim.places),
                places=result.places,
                of=len(spots),
                difference=result.difference,
                improvement=result.improvement,
                p=result.p,
            )


def _figures(found: Found, arm: _Arm, metric: MetricName) -> dict[pairing.Labels, dict[str, float]]:
    # Place -> trial -> its figure; places without any are not in it.
    out: dict[pairing.Labels, dict[str, float]] = {}
    for labels, points in arm.items():
        for point in points:
            if is_number(value := _value(found, point, metric)):
                out.setdefault(labels, {})[point.trial_id] = in_unit(metric, value)
    return out


# --- as it is printed ---------------------------------------------------------------------------


def _sheet(judged: Judged) -> Sheet:
    contrasts, notes = judged.contrasts, Footnotes()
    metrics = dict.fromkeys(_named(one.metric) for one in contrasts)
    axes = dict.fromkeys(axis for one in contrasts for axis in one.place)
    common = [n for n in contrasts[0].notes if all(n in one.notes for one in contrasts)]
    # What is the same for all is said once, so that narrow terminals hold the rest.
    several, uneven = len(metrics) > 1, len({(one.pairs, one.expected) for one in contrasts}) > 1
    heads = [*axes, *(["of"] if several else []), "difference", "p", "d"]
    heads += [*(["pairs"] if uneven else []), "verdict", "more"]
    lines = []
    for one in contrasts:
        marks = tuple(notes.mark(text) for text in one.notes if text not in common)
        edit = (
            (notes.mark(f"as a plan, before more is trained: {_edited(one)}"),) if one.edit else ()
        )
        texts = [one.place.get(axis, "") for axis in axes]
        texts += [words(one.metric)] if several else []
        texts += [_difference(one), _p(one.p_holm)]
        texts += ["" if one.effect is None else f"{round(one.effect, 1) + 0.0:+.1f}"]
        texts += [_pairs(one)] if uneven else []
        verdict = f"{one.verdict} (provisional)" if one.provisional else one.verdict
        entries = (*map(Entry, texts), Entry(verdict), Entry(_more(one), edit))
        lines.append(Line("ours", Entry(one.claim, marks), entries))
    general = _general(judged, metrics, uneven=uneven)
    every = (*(("", text) for text in (*general, *common)), *notes.lettered())
    return Sheet(f"Claims of {judged.sweep}", "claim", tuple(heads), tuple(lines), every)


def _general(judged: Judged, metrics: Collection[str], *, uneven: bool) -> Iterator[str]:
    contrasts = judged.contrasts
    family = sum(one.expected >= LEAST_PAIRS for one in contrasts)
    pairs = "pairs" if uneven else f"{_pairs(contrasts[0])} pairs"
    yield (
        f"difference of {' and '.join(metrics)}: left side minus right side, mean over {pairs} ± "
        "half-width of its t interval at the level that Holm's correction leaves it (none where "
        "another test decides); d: that mean over the deviation of a difference"
    )
    yield (
        "p: of Welch's t test (over seeds) or the paired one, two-sided, corrected by Holm over "
        f"the {family} contrast{'' if family == 1 else 's'} of this file; supported or "
        "contradicted: below 0.05, with the claimed sign or the other one"
    )
    if any(one.provisional for one in contrasts):
        yield "provisional: read before all of its pairs have ended; it may still change"
    if judged.unnoted:
        yield "no list of claims was noted before these results: what was asked first is not known"
    elif judged.late:
        yield f"the list of claims was first noted when {judged.late:,} trials had results"
    undecided = [one for one in contrasts if one.verdict == "undecided"]
    if undecided:
        unknown = any(one.more_seeds is None for one in undecided)
        yield (
            "more: so many more seeds would decide it with a chance of 0.8, if difference and "
            "spread are in truth what was seen"
            + (f"; ?: none up to {MOST_PAIRS:,} would, or nobody can tell" if unknown else "")
        )


def _edited(one: Contrast) -> str:
    assert one.edit is not None
    return f"add {_shortened(one.edit)}" + (f", and to the claim {one.plan}" if one.plan else "")


def _summary(judged: Judged) -> Sheet:
    notes = Footnotes()
    several = len({one.metric for one in judged.aggregates}) > 1
    lines = []
    for one in judged.aggregates:
        partial = f"over the {one.places} of {one.of} places at which every arm has a run"
        uneven = "more runs at some places than at others, which weigh more"
        said = [partial] * (one.places < one.of) + [uneven] * (not one.even)
        marks = tuple(map(notes.mark, said))
        between = "" if one.low is None else f"{one.low:.1f} to {one.high:.1f}"
        texts = [*([words(one.metric)] if several else []), one.over, str(one.runs)]
        entries = [*map(Entry, texts), Entry(f"{one.mean:.1f}", marks), Entry(between)]
        entries.append(Entry(f"{one.coverage} %" if one.coverage else ""))
        lines.append(Line("ours", Entry(one.arm), tuple(entries)))
    of = " and ".join(dict.fromkeys(words(one.metric) for one in judged.aggregates))
    text = (
        f"mean: interquartile mean of {of} over all runs, per cent: that of their middle half. "
        "Interval: 95 % percentile bootstrap, runs drawn anew within each place; covers: how often "
        "at worst such an interval held the true value in simulated sweeps"
    )
    heads = (*(["of"] if several else []), "over", "runs", "mean", "interval", "covers")
    return Sheet(
        f"Arms of {judged.sweep}", "arm", heads, tuple(lines), (("", text), *notes.lettered())
    )


def _over_places(judged: Judged) -> Sheet:
    several = len({one.metric for one in judged.overall}) > 1
    lines = []
    for one in judged.overall:
        places = str(one.places) if one.places == one.of else f"{one.places}/{one.of}"
        texts = [*([words(one.metric)] if several else []), one.over, places]
        texts += [f"{round(one.difference, 2) + 0.0:+.2f}", f"{one.improvement:.2f}", _p(one.p)]
        lines.append(Line("ours", Entry(one.claim), tuple(map(Entry, texts))))
    of = " and ".join(dict.fromkeys(words(one.metric) for one in judged.overall))
    text = (
        f"difference of {of}, where 0 is chance and 1 the best run of a place, mean over places; "
        "improvement: how probably a run of the left side beats one of the right, ties half; p: "
        "signed-rank test over places, of each claim alone, below 0.05 with six places at least"
    )
    heads = (*(["of"] if several else []), "over", "places", "difference", "improvement", "p")
    return Sheet(
        f"Claims of {judged.sweep} over places", "claim", heads, tuple(lines), (("", text),)
    )


def _named(metric: str) -> str:
    # A metric with the unit of its differences: per cents differ by points.
    own = "points" if is_accuracy(metric) else unit(metric)
    return words(metric) + (f" ({own})" if own else "")


def _difference(one: Contrast) -> str:
    if one.difference is None:
        return ""
    half = None if one.high_family is None else one.high_family - one.difference
    if is_accuracy(one.metric):
        decimals = 1
    elif one.metric in FACTS or abs(one.difference) >= 100:
        decimals = 0
    else:
        decimals = max(2 - math.floor(math.log10(abs(one.difference) or 1)), 0)
    # Adding zero turns -0.0, which would print its sign, into 0.0.
    text = f"{round(one.difference, decimals) + 0.0:+,.{decimals}f}"
    return text if half is None else f"{text} ± {half:,.{decimals}f}"


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _pairs(one: Contrast) -> str:
    return str(one.pairs) if one.pairs == one.expected else f"{one.pairs}/{one.expected}"


def _more(one: Contrast) -> str:
    if one.verdict != "undecided":
        return ""
    return "?" if one.more_seeds is None else f"+{one.more_seeds:,}"


def _shortened(edit: str) -> str:
    axis, _, rest = edit.partition(": ")
    points = rest.strip("[]").split(", ")
    if len(points) <= LISTED:
        return edit
    return f"{axis}: [{', '.join(points[:3])}, ... to {points[-1]}]"
