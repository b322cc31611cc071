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
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from fpt.spec import JSON
from sweep.analysis import history, looks, typeset
from sweep.analysis.caveats import caveats
from sweep.analysis.cells import TrialResults
from sweep.analysis.claim_sheets import arms_sheet, claims_sheet, overall_sheet
from sweep.analysis.contrasts import LEAST_PAIRS, Aggregate, Contrast, Overall, Verdict, p_text
from sweep.analysis.pooled import COVERAGE, DIFFERENCE_COVERAGE, aggregates, overall
from sweep.analysis.readings import ACCURACY_STEP, Family, Made, Reading, at_places
from sweep.analysis.stats import LEVEL, Tests, pairs_needed, seeds_unseen
from sweep.analysis.typeset import Sheet
from sweep.ledger.ledger import Ledger
from sweep.planning import tuning
from sweep.sweepfile.expansion import load
from sweep.sweepfile.metrics import unit
from sweep.sweepfile.reading import axis_labels
from sweep.sweepfile.schema import ConvergenceSpec, SweepFileError
from sweep.sweepfile.trials import Sweep

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Group

__all__ = [
    "ACCURACY_STEP",
    "COVERAGE",
    "DIFFERENCE_COVERAGE",
    "Aggregate",
    "Contrast",
    "Judged",
    "Overall",
    "judge",
    "load_claims",
    "show",
]

MOST_EFFECT = 1e3
"""Deviations that a difference without any spread is taken for, to count pairs by."""


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
        """Return a JSON object with everything."""
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
        """Return a pandas row for each contrast; `place.<axis>` for each axis under `per`."""
        import pandas as pd

        return pd.DataFrame(self._flat())

    def to_csv(self) -> str:
        """Return a line for each contrast, in full precision; several values are in one field."""
        rows = self._flat()
        names = list(dict.fromkeys(name for row in rows for name in row))
        joined = [row | {"trials": list(map("/".join, row["trials"]))} for row in rows]
        return typeset.comma_separated(names, joined)

    def to_markdown(self) -> str:
        """Return the claims in GitHub's Markdown."""
        return "\n".join(map(typeset.markdown, self.sheets))

    def to_latex(self) -> str:
        """Return a `table` environment, or two (packages booktabs, xcolor)."""
        return "\n".join(map(typeset.latex, self.sheets))

    def to_rich(self) -> Group:
        """Return what `rich` prints."""
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
        return claims_sheet(self.sweep, self.contrasts, late=self.late, unnoted=self.unnoted)

    @functools.cached_property
    def summary(self) -> Sheet | None:
        """The arms over tasks, ready to be printed; None without."""
        return arms_sheet(self.sweep, self.aggregates) if self.aggregates else None

    @functools.cached_property
    def over_places(self) -> Sheet | None:
        """The claims over all of their places, ready to be printed; None without."""
        return overall_sheet(self.sweep, self.overall) if self.overall else None

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
    made = at_places(claims, sweep)
    first = past.first
    earlier = at_places(first.claims, sweep) if first else []
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
    found = TrialResults.read(ledger, tuple(inside.values()), metrics, rule)
    tuned, remarks = tuning.notes(sweep), tuning.remarks(sweep, ledger)
    spaces = sweep.spec.tune.spaces if sweep.spec.tune else {}
    fields = {path.partition(".")[0] for path in spaces}
    family = Family([Reading(spot, found, past) for spot in spots])
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
        tuple(aggregates(made, found)),
        tuple(overall(made, found)),
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
    """Load the claims of a sweep file, judged by what there is so far.

    Raises:
        SweepFileError: If the file is wrong, or makes no claim.
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    return show(load(file), Ledger(results))


def _contrast(
    read: Reading,
    family: Family,
    found: TrialResults,
    labels: Collection[str],
    tuned: Sequence[str],
    fields: Collection[str],
    remarks: Mapping[str, str],
) -> Contrast:
    claim, now, wary = read.claim, read.now, family.wary(read)
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
    notes = caveats(read, found, wary=wary, tuned=tuned, fields=fields, remarks=remarks)
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
        trials=tuple((one.trial_id, other.trial_id) for _, one, other in read.spot.place.pairs),
        unit=next((unit(claim.on, one.like) for _, one, _ in read.spot.place.pairs), ""),
    )


def _verdict(read: Reading, p: float | None) -> Verdict:
    if read.now is None:
        return "untested"
    if p is None or p >= 1 - LEVEL:
        return "undecided"
    return "supported" if read.now.positive == read.claim.more else "contradicted"


def _more_seeds(read: Reading, family: Family) -> int | None:
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


def _plan(read: Reading, more: int | None) -> str | None:
    # The looks that make further pairs a plan: where the plan so far ends, and where the new one.
    if not more:
        return None
    sofar = [*read.claim.looks] if read.claim.looks else [read.expected]
    total = read.expected + more
    return f"looks: {[*sofar, total]}" if total > sofar[-1] else None


def _at_first(
    family: Family, earlier: Made, found: TrialResults, past: history.History
) -> Mapping[history.Key, float]:
    # Contrast -> its corrected p over the first list of claims, with what was added to it since.
    known = {read.spot.key: read for read in family.reads}
    reads = dict(known)
    for _, own in earlier:
        for spot in own:
            reads.setdefault(spot.key, Reading(spot, found, past))
    both = Family(tuple(reads.values()))
    return {read.spot.key: p for read, p in both.p.items()}


def _marked(
    one: Contrast,
    read: Reading,
    family: Family,
    before: Mapping[history.Key, float],
    change: str,
) -> Contrast:
    p = before.get(read.spot.key)
    told = f"{change}; corrected p over both lists {p_text(p)}, over this one {p_text(one.p_holm)}"
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


def _with_budget(one: Contrast, read: Reading, best: Mapping[str, Sequence[float]]) -> Contrast:
    # Flags a claim whose arms change places with the points that they are tuned by.
    pairs = list(read.spot.place.pairs)
    # Over the choices of tuning, as the figures of the arm are.
    sides = ([left for _, left, _ in pairs], [right for *_, right in pairs])
    curves = ([best[point.trial_id] for point in own if point.trial_id in best] for own in sides)
    left, right = ([fmean(of) for of in zip(*each, strict=False)] for each in curves)
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
