"""Claims over all of their places: arms summed up, and whether one is better across tasks."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from sweep.analysis.across import across, ranked
from sweep.analysis.cells import TrialResults, display_value, is_number
from sweep.analysis.contrasts import Aggregate, Overall
from sweep.analysis.readings import Made, bounds_of, value_of
from sweep.analysis.stats import stratified
from sweep.sweepfile import pairing
from sweep.sweepfile.metrics import is_accuracy
from sweep.sweepfile.schema import MetricName
from sweep.sweepfile.trials import Point

COVERAGE = {3: 72, 5: 81, 10: 85}
"""Runs a task -> per cent of simulated sweeps in which the 95 % bootstrap interval of the
interquartile mean held the true one; the worst of all outcomes in benchmarks/coverage.py."""

DIFFERENCE_COVERAGE = {3: 87, 5: 91, 10: 92}
"""The same of the difference of two arms' interquartile means, where 0 is chance and 1 the best."""

_Arm = dict[pairing.Labels, list[Point]]
# Place -> its trials.


def aggregates(made: Made, found: TrialResults) -> Iterator[Aggregate]:
    """Yield each arm of claims on an accuracy, summed up over places.

    Claims over one axis, one metric and the same places share their arms.
    """
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
        ranks = None
        if len(values) > 2:
            means = [
                [fmean(figures[labels].values()) for figures in values.values()] for labels in whole
            ]
            ranks = ranked(means)
        for number, (arm, figures) in enumerate(values.items()):
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
                rank=ranks.mean[number] if ranks else None,
                friedman=ranks.p if ranks else None,
                critical=ranks.critical if ranks else None,
            )


def overall(made: Made, found: TrialResults) -> Iterator[Overall]:
    """Yield each claim on an accuracy over all of its places."""
    for claim, spots in made:
        if not is_accuracy(claim.on) or not claim.places or len(spots) < 2:
            continue
        left, right, chances, bests = [], [], [], []
        for spot in spots:
            sides = [
                [
                    display_value(claim.on, value)
                    for (point, *_) in trials.values()
                    if is_number(value := value_of(found, point, claim.on))
                ]
                for trials in (spot.place.left, spot.place.right)
            ]
            if all(sides) and (bounds := bounds_of(spot)):
                left.append(sides[0])
                right.append(sides[1])
                chances.append(bounds[0])
                bests.append(max(map(max, sides)))
        result = across(left, right, chances, bests)
        if result is not None:
            fewest = min(map(len, (*left, *right)))
            covers = [of for runs, of in DIFFERENCE_COVERAGE.items() if runs <= fewest]
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
                middle=result.middle,
                low=result.low if covers else None,
                high=result.high if covers else None,
                coverage=covers[-1] if covers else None,
            )


def _figures(
    found: TrialResults, arm: _Arm, metric: MetricName
) -> dict[pairing.Labels, dict[str, float]]:
    # Place -> trial -> its figure; places without any are not in it.
    out: dict[pairing.Labels, dict[str, float]] = {}
    for labels, points in arm.items():
        for point in points:
            if is_number(value := value_of(found, point, metric)):
                out.setdefault(labels, {})[point.trial_id] = display_value(metric, value)
    return out
