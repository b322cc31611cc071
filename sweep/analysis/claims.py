"""The claims of a sweep, judged: at any time, with the pairs that there are so far.

A claim is made anew at each point of the axes under `per`. There the trials of both sides are
paired, as a rule by seed, and a paired t test asks whether their difference is zero on average
(`sweep.analysis.stats`). The family over which Holm corrects is every contrast that the file
declares and that has two pairs or more, those without figures included, so that a verdict is not
undone by what trains later. A contrast is supported, if its corrected p is below 0.05 and the
difference has the claimed sign; contradicted, if it has the other one; else undecided; untested,
with fewer than two pairs. Nothing here knows which metrics are better high: `A > B` is about the
number.

For what is undecided the seeds are counted that would decide it, with a chance of 0.8, if
difference and spread are in truth what was seen; since that is itself uncertain, so is the count.

Where a claim is made per task on an accuracy, each arm is also summed up over tasks, by the
interquartile mean of its runs. The bootstrap's interval of that is too narrow with few seeds, so it
is shown only with what it covers in truth (benchmarks/coverage.py), and not with fewer than three.
"""

from __future__ import annotations

import csv
import functools
import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from fpt.spec import JSON
from sweep.analysis import typeset
from sweep.analysis.cells import FACTS, Found, in_unit, is_accuracy, is_number, traits, unit, words
from sweep.analysis.stats import LEVEL, MOST_PAIRS, holm, paired, pairs_needed, stratified
from sweep.analysis.typeset import Entry, Footnotes, Line, Sheet
from sweep.ledger.ledger import Ledger
from sweep.planning import tuning
from sweep.sweepfile import pairing
from sweep.sweepfile.reading import axis_labels
from sweep.sweepfile.schema import (
    CONVERGENCE,
    ClaimSpec,
    ConvergenceSpec,
    MetricName,
    SweepFileError,
)
from sweep.sweepfile.trials import Point, Sweep, load

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Group

Verdict = Literal["supported", "contradicted", "undecided", "untested"]

ACCURACY_STEP = 0.1
"""The resolution of accuracies, in points: what a table prints."""

COVERAGE = {3: 72, 5: 81, 10: 85}
"""Runs a task -> per cent of simulated sweeps in which the 95 % bootstrap interval of the
interquartile mean held the true one; the worst of all outcomes in benchmarks/coverage.py."""

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
    effect: float | None
    """Cohen's d of the paired differences: their mean over their deviation."""
    p: float | None
    """Of the two-sided paired t test."""
    p_holm: float | None
    """The same, corrected over the family."""
    verdict: Verdict
    more_seeds: int | None
    """Further pairs that would decide it. None: it is decided, or nobody can tell. 0: those that
    are still to be trained would."""
    edit: str | None
    """The line of the sweep file that adds them."""
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
class Judged:
    """The claims of a sweep, with what there is so far."""

    sweep: str
    """The name of the sweep."""
    contrasts: tuple[Contrast, ...]
    """In the order of the file."""
    aggregates: tuple[Aggregate, ...]

    def record(self) -> JSON:
        """A JSON object with everything."""
        return {
            "sweep": self.sweep,
            "level": LEVEL,
            "contrasts": [one.record() for one in self.contrasts],
            "aggregates": [one.record() for one in self.aggregates],
        }

    def to_frame(self) -> pd.DataFrame:
        """A pandas row for each contrast; `place.<axis>` for each axis under `per`."""
        import pandas as pd

        return pd.DataFrame(self._flat())

    def to_csv(self) -> str:
        """A line for each contrast, in full precision; what it has several of is in one field."""
        rows = self._flat()
        out = io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            notes, trials = row["notes"], row["trials"]
            joined = {"notes": "; ".join(notes), "trials": "; ".join(map("/".join, trials))}
            writer.writerow(row | joined)
        return out.getvalue()

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
        return (self.sheet, self.summary) if self.summary else (self.sheet,)

    @functools.cached_property
    def sheet(self) -> Sheet:
        """The claims, ready to be printed."""
        return _sheet(self)

    @functools.cached_property
    def summary(self) -> Sheet | None:
        """The arms over tasks, ready to be printed; None without."""
        return _summary(self) if self.aggregates else None

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
    """Judge the claims of a sweep by what the ledger holds.

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
    made = [(claim, pairing.places(claim, sweep.points)) for claim in claims]
    inside = {
        point.trial_id: point
        for _, places in made
        for place in places.values()
        for side in (place.left, place.right)
        for points in side.values()
        for point in points
    }
    metrics = tuple(dict.fromkeys(claim.on for claim in claims))
    rule = sweep.table.convergence if sweep.table else ConvergenceSpec()
    found = Found.read(ledger, tuple(inside.values()), metrics, rule)
    tuned, remarks = tuning.notes(sweep), tuning.remarks(sweep, ledger)
    contrasts = [
        _contrast(claim, labels, place, found, tuned, remarks)
        for claim, places in made
        for labels, place in places.items()
    ]
    return Judged(
        sweep.name,
        tuple(_torn(_decided(contrasts, made, found, sweep))),
        tuple(_aggregates(made, found)),
    )


def load_claims(file: str | Path, results: str | Path = "results") -> Judged:
    """The claims of a sweep file, judged by what there is so far.

    Raises:
        SweepFileError: If the file is wrong, or makes no claim.
        sweep.ledger.ledger.LedgerError: If the ledger cannot be read.
    """
    return judge(load(file), Ledger(results))


# --- a contrast ---------------------------------------------------------------------------------


def _contrast(
    claim: ClaimSpec,
    labels: pairing.Labels,
    place: pairing.Place,
    found: Found,
    tuned: Sequence[str],
    remarks: Mapping[str, str],
) -> Contrast:
    # All but what the rest of the family decides.
    pairs = list(place.pairs)
    differences = [
        round(in_unit(claim.on, one) - in_unit(claim.on, other), 9)
        for _, left, right in pairs
        if is_number(one := _value(found, left, claim.on))
        and is_number(other := _value(found, right, claim.on))
    ]
    test = None
    if len(differences) > 1:
        step = _step(claim.on, [left for _, left, _ in pairs])
        test = paired(np.array(differences), step)
    mean = float(np.mean(differences)) if differences else None
    left, right = claim.sides
    return Contrast(
        claim=claim.that,
        axis=claim.axis,
        metric=claim.on,
        place=dict(zip(claim.places, labels, strict=True)),
        left=left,
        right=right,
        pairs=len(differences),
        expected=len(pairs),
        difference=mean,
        low=float(test.mean - test.half_width) if test else None,
        high=float(test.mean + test.half_width) if test else None,
        effect=float(test.mean / test.deviation) if test and test.deviation else None,
        p=float(test.p) if test else None,
        p_holm=None,
        verdict="untested",
        more_seeds=None,
        edit=None,
        notes=(*_fates(claim, pairs, found), *_unlike(claim, pairs, tuned, remarks)),
        trials=tuple((one.trial_id, other.trial_id) for _, one, other in pairs),
    )


def _value(found: Found, point: Point, metric: MetricName) -> float | None:
    return found.value(point.trial_id, metric) if point.trial_id in found.rows else None


def _step(metric: MetricName, points: Sequence[Point]) -> float:
    # The resolution of a metric; 0 where it has none to speak of.
    if is_accuracy(metric):
        return ACCURACY_STEP
    if metric in (CONVERGENCE, "best_step", "steps_trained"):
        return max(point.config.evaluation.every for point in points)
    return 0.0


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
                out.setdefault((side, f"{reason}, left out"), []).append(label)
            elif fate == "diverged":
                what = "diverged, the last good figures before that count"
                out.setdefault((side, what), []).append(label)
            parts = found.parts(point.trial_id) if point.trial_id in found.rows else 1
            if parts > 1:
                what = f"each batch in {parts} parts, since it did not fit into memory"
                out.setdefault((side, what), []).append(label)
    for (side, fate), labels in out.items():
        yield f"{side}: {fate} ({claim.paired_by} {', '.join(labels)})"


def _unlike(
    claim: ClaimSpec,
    pairs: Sequence[tuple[str, Point, Point]],
    tuned: Sequence[str],
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
    if not tuned and own != "learning_rate" and "learning_rate" not in claim.places:
        which = "both arms" if len(rates) == 1 else "each arm"
        told = ", ".join(f"{rate:g}" for rate in rates)
        yield f"{which} at one learning rate ({told}), not tuned"
    unlike = [
        name
        for name in BUDGET
        if getattr(one, name) != getattr(other, name)
        and name != own
        and not (name == "learning_rate" and tuned)
    ]
    if unlike:
        yield f"the arms differ in {', '.join(unlike)} too"
    for side, points in zip(claim.sides, sides, strict=True):
        of_rate = remarks.get(points[0].cell_id)
        for trait in (*traits(points), *([of_rate] if of_rate else [])):
            yield f"{side}: {trait}"


# --- the family ---------------------------------------------------------------------------------


def _decided(
    contrasts: Sequence[Contrast],
    made: Sequence[tuple[ClaimSpec, Mapping[pairing.Labels, pairing.Place]]],
    found: Found,
    sweep: Sweep,
) -> Iterator[Contrast]:
    # Each contrast with what the others make of it.
    family = [one for one in contrasts if one.expected > 1]
    ps = np.array([1.0 if one.p is None else one.p for one in family])
    corrected = dict(zip(map(id, family), holm(ps), strict=True))
    # Holm's level for the largest p that would still be rejected, and so for any that is not yet.
    still = sum(p >= 1 - LEVEL for p in corrected.values())
    spots = [(claim, place) for claim, places in made for place in places.values()]
    axes = axis_labels(sweep.spec)
    for (claim, place), one in zip(spots, contrasts, strict=True):
        if one.p is None or one.difference is None:
            yield one
            continue
        p_holm = float(corrected[id(one)])
        if p_holm < 1 - LEVEL:
            agrees = (one.difference > 0) == claim.more
            yield replace(one, p_holm=p_holm, verdict="supported" if agrees else "contradicted")
            continue
        needed = pairs_needed(one.effect, (1 - LEVEL) / still) if one.effect else None
        gone = _lost(claim, place, found)
        more = None if needed is None else max(needed - (one.expected - gone), 0)
        edit = _edit(claim.paired_by, list(axes[claim.paired_by]), more) if more else None
        yield replace(one, p_holm=p_holm, verdict="undecided", more_seeds=more, edit=edit)


def _lost(claim: ClaimSpec, place: pairing.Place, found: Found) -> int:
    # The pairs that stay without a figure: one of their trials has ended, and has none.
    return sum(
        any(
            point.trial_id in found.rows and not is_number(_value(found, point, claim.on))
            for point in pair
        )
        for _, *pair in place.pairs
    )


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


# --- over tasks ---------------------------------------------------------------------------------

_Arm = dict[pairing.Labels, list[Point]]
# Place -> its trials.


def _aggregates(
    made: Sequence[tuple[ClaimSpec, Mapping[pairing.Labels, pairing.Place]]], found: Found
) -> Iterator[Aggregate]:
    # Claims over one axis, one metric and the same places share their arms.
    groups: dict[tuple[str, MetricName, tuple[str, ...]], dict[str, _Arm]] = {}
    for claim, places in made:
        if not is_accuracy(claim.on) or not claim.places:
            continue
        arms = groups.setdefault((claim.axis, claim.on, claim.places), {})
        for labels, place in places.items():
            for side, trials in zip(claim.sides, (place.left, place.right), strict=True):
                arms.setdefault(side, {})[labels] = [one for (one, *_) in trials.values()]
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
        edit = (notes.mark(f"add: {_shortened(one.edit)}"),) if one.edit else ()
        texts = [one.place.get(axis, "") for axis in axes]
        texts += [words(one.metric)] if several else []
        texts += [_difference(one), _p(one.p_holm)]
        texts += ["" if one.effect is None else f"{round(one.effect, 1) + 0.0:+.1f}"]
        texts += [_pairs(one)] if uneven else []
        entries = (*map(Entry, texts), Entry(one.verdict), Entry(_more(one), edit))
        lines.append(Line("ours", Entry(one.claim, marks), entries))
    general = _general(contrasts, metrics, uneven=uneven)
    every = (*(("", text) for text in (*general, *common)), *notes.lettered())
    return Sheet(f"Claims of {judged.sweep}", "claim", tuple(heads), tuple(lines), every)


def _general(
    contrasts: Sequence[Contrast], metrics: Collection[str], *, uneven: bool
) -> Iterator[str]:
    family = sum(one.expected > 1 for one in contrasts)
    pairs = "pairs" if uneven else f"{_pairs(contrasts[0])} pairs"
    yield (
        f"difference of {' and '.join(metrics)}: left side minus right side, mean over {pairs} ± "
        "half-width of its 95 % Student-t interval; d: that mean over the deviation of the "
        "differences"
    )
    yield (
        f"p: of the paired t test, two-sided, corrected by Holm over the {family} contrasts of "
        "this file; supported or contradicted: below 0.05, with the claimed sign or the other one"
    )
    undecided = [one for one in contrasts if one.verdict == "undecided"]
    if undecided:
        unknown = any(one.more_seeds is None for one in undecided)
        yield (
            "more: so many more seeds would decide it with a chance of 0.8, if difference and "
            "spread are in truth what was seen"
            + (f"; ?: none up to {MOST_PAIRS:,} would" if unknown else "")
        )


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


def _named(metric: str) -> str:
    # A metric with the unit of its differences: per cents differ by points.
    own = "points" if is_accuracy(metric) else unit(metric)
    return words(metric) + (f" ({own})" if own else "")


def _difference(one: Contrast) -> str:
    if one.difference is None:
        return ""
    half = None if one.high is None else one.high - one.difference
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
