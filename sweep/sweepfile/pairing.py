"""Which trials a cell of the table holds, and which a claim compares: pairs of both its sides, at
each point of the axes it is made for.

The two trials of a pair have one label of the axis `paired_by`, and one of each axis under `per`;
they stand on the two sides of the claim's own axis. What breaks pairs is found here too, so that it
is told before anything trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sweep.sweepfile.document import Report, spell
from sweep.sweepfile.exclude import Rule
from sweep.sweepfile.schema import ClaimSpec, TableSpec
from sweep.sweepfile.trials import Point

SHOWN = 5
"""Places that one warning names."""

Labels = tuple[str, ...]
"""A label of each axis under `per`, in that order."""


@dataclass(frozen=True)
class PairGroup:
    """The trials of a claim at one of its places: of both sides, by the axis that pairs them."""

    left: dict[str, list[Point]] = field(default_factory=dict)
    """Label of the axis that pairs -> trials; more than one is a claim that mixes configs."""
    right: dict[str, list[Point]] = field(default_factory=dict)

    @property
    def pairs(self) -> Iterator[tuple[str, Point, Point]]:
        """Each pair: label, left, right."""
        for label, (point, *_) in self.left.items():
            if label in self.right:
                yield label, point, self.right[label][0]


def group_pairs(claim: ClaimSpec, points: Iterable[Point]) -> dict[Labels, PairGroup]:
    """Return the trials of a claim by its places, in their order; one may be without any pair."""
    left, _ = claim.sides
    found: dict[Labels, PairGroup] = {}
    for point in points:
        at = locate(claim, point.labels)
        if at is not None:
            side, label, labels = at
            place = found.setdefault(labels, PairGroup())
            (place.left if side == left else place.right).setdefault(label, []).append(point)
    return found


def locate(claim: ClaimSpec, labels: Mapping[str, str]) -> tuple[str, str, Labels] | None:
    """Return (side, label of the axis that pairs, place) of a trial; None where it is in none."""
    side, label = labels.get(claim.axis), labels.get(claim.paired_by)
    if side not in claim.sides or label is None:
        return None
    place = tuple(labels[axis] for axis in claim.places if axis in labels)
    return (side, label, place) if len(place) == len(claim.places) else None


def ambiguous_side(claim: ClaimSpec, found: Mapping[Labels, PairGroup]) -> str | None:
    """Return what is wrong with a claim whose side holds several trials at once, if so."""
    for place in found.values():
        for side in (place.left, place.right):
            for points in side.values():
                if len(points) < 2:
                    continue
                varying = [
                    axis
                    for axis in dict.fromkeys(axis for one in points for axis in one.labels)
                    if len({one.labels.get(axis) for one in points}) > 1
                ]
                what = f"each side of a pair is one trial, but {len(points)} are {points[0].label}"
                if not varying:
                    return f"{what} in {' and '.join(sorted({one.where for one in points}))}"
                what = "each side of a pair is one trial, but here there is one for each point of"
                axes = " and ".join(f"axis {axis}" for axis in varying)
                return f"{what} {axes}; make the claim `per: {varying[0]}`"
    return None


def no_pairs(claim: ClaimSpec, found: Mapping[Labels, PairGroup]) -> str | None:
    """Return why a claim can nowhere be tested, if so."""
    if any(True for place in found.values() for _ in place.pairs):
        return None
    sides = [
        any(place.left for place in found.values()),
        any(place.right for place in found.values()),
    ]
    gone = [side for side, there in zip(claim.sides, sides, strict=True) if not there]
    if gone:
        return f"the sweep has no trial with {claim.axis} {' nor '.join(gone)} that could be paired"
    at = f" at any {' and '.join(claim.places)}" if claim.places else ""
    return f"no {claim.paired_by} has a trial of both sides{at}"


def has_pairs_elsewhere(
    claim: ClaimSpec,
    points: Iterable[Point],
    excluded: Iterable[tuple[Mapping[str, str], Rule]],
) -> bool:
    """Return whether a claim has pairs where no pattern with a condition leaves trials out."""
    sides: dict[tuple[str, Labels], set[str]] = {}
    left_out_here = (labels for labels, rule in excluded if rule.reason)
    for labels in (*(point.labels for point in points), *left_out_here):
        if (at := locate(claim, labels)) is not None:
            side, label, place = at
            sides.setdefault((label, place), set()).add(side)
    return any(len(both) == 2 for both in sides.values())


def single_pair(claim: ClaimSpec, found: Mapping[Labels, PairGroup]) -> str | None:
    """Return what of a claim can never be tested for want of a second pair, if anything."""
    where = [" / ".join(at) for at, place in found.items() if len(list(place.pairs)) == 1]
    if not where:
        return None
    at = f" at {_some(where)}" if claim.places else ""
    return f"one pair alone{at}, which shows no spread: no test; add to axis {claim.paired_by}"


def missing_pairs(
    claim: ClaimSpec,
    found: Mapping[Labels, PairGroup],
    excluded: Iterable[tuple[Mapping[str, str], str, bool]],
) -> Iterator[str]:
    """Yield what of a claim cannot be tested, and why: a sentence for each kind of loss.

    Args:
        claim: The claim.
        found: Its places.
        excluded: Trials that patterns leave out: labels, the pattern in words, and whether it does
            so on this machine only.
    """
    gone: dict[Labels, dict[str, dict[str, tuple[str, bool]]]] = {}
    for labels, pattern, here in excluded:
        at = locate(claim, labels)
        if at is not None:
            side, label, place = at
            gone.setdefault(place, {}).setdefault(label, {})[side] = (pattern, here)

    # (why, pairs lost, pairs that there would be) -> places
    losses: dict[tuple[str, int, int], list[str]] = {}
    for spot in dict.fromkeys((*found, *gone)):
        there, out = found.get(spot, PairGroup()), gone.get(spot, {})
        why: dict[str, int] = {}
        whole = 0
        for label in dict.fromkeys((*there.left, *there.right, *out)):
            patterns = out.get(label, {})
            held = zip(claim.sides, (there.left, there.right), strict=True)
            without = [side for side, trials in held if label not in trials]
            if len(without) == 2 and not any(here for _, here in patterns.values()):
                continue  # Left out on purpose, and of both sides alike.
            whole += 1
            if without:
                told = dict.fromkeys(patterns[side][0] for side in without if side in patterns)
                what = without[0] if len(without) == 1 else "both sides"
                cause = f"{' and '.join(told)} leaves out" if told else "there is no trial of"
                reason = f"{cause} {what}"
                why[reason] = why.get(reason, 0) + 1
        for reason, number in why.items():
            losses.setdefault((reason, number, whole), []).append(" / ".join(spot))
    for (reason, number, whole), where in losses.items():
        named = f" at {_some(where)}" if claim.places else ""
        pairs = "all pairs are" if number == whole else f"{number} of {whole} pairs are"
        yield f"{pairs} lost{named}: {reason}"


def mixed_cell(
    place: Labels, points: Sequence[Point], shown: Sequence[str], axes: Sequence[str]
) -> str | None:
    """Return what is wrong with a cell of a table that holds several configs, if it does: a mean
    over different configs is a mean of nothing.

    Args:
        place: The cell's labels.
        points: Its trials.
        shown: The axes that are the table's rows and columns.
        axes: All axes, in order.
    """
    configs: dict[str, list[Point]] = {}
    for point in points:
        configs.setdefault(point.cell_id, []).append(point)
    if len(configs) == 1:
        return None
    varying = [
        axis
        for axis in axes
        if axis not in shown
        and len({tuple(p.labels.get(axis) for p in own) for own in configs.values()}) > 1
    ]
    if varying:
        why = (
            f"axis {' and axis '.join(varying)}; make {varying[0]} the rows or the columns of "
            "the table, or leave it one point"
        )
    else:
        why = f"blocks of the file: {', '.join(sorted({point.where for point in points}))}"
    held = f"{' / '.join(place)} holds {len(configs)} configs, by {why}"
    return f"a cell is one config over its seeds, but {held}"


def check_table(
    table: TableSpec, points: Sequence[Point], axes: Sequence[str], report: Report
) -> None:
    """Report a table whose cells would mix configs, before anything is trained for it."""
    shown = [axis for axis in (table.rows, table.columns) if axis is not None]
    places: dict[Labels, list[Point]] = {}
    for point in points:
        place = tuple([point.labels[axis] for axis in shown if axis in point.labels])
        if len(place) == len(shown):
            places.setdefault(place, []).append(point)
    for place, own in places.items():
        if mixed := mixed_cell(place, own, shown, axes):
            report(("table",), mixed)
            return


def check_claims(
    claims: Sequence[ClaimSpec],
    points: Sequence[Point],
    excluded: Sequence[tuple[Mapping[str, str], Rule]],
    report: Report,
) -> tuple[str, ...]:
    """Return what patterns cost the claims of a file, as warnings with their places in it.

    Args:
        claims: The claims.
        points: The trials.
        excluded: Labels of trials that are left out, and by which pattern.
        report: Takes what is wrong with a claim. If anything is wrong already, only numerics are
            judged: a trial that could not be read would be missed.
    """
    for number, claim in enumerate(claims):
        if numerics := mixed_numerics(claim, points):
            report(("claims", number, "that"), numerics)
    if report.problems or not report.complete:
        return ()
    document = report.document
    words = [
        (labels, f"{spell(rule.at)} (line {document.line(rule.at)})", bool(rule.reason))
        for labels, rule in excluded
    ]
    out = []
    for number, claim in enumerate(claims):
        at = ("claims", number, "that")
        found = group_pairs(claim, points)
        losses = list(missing_pairs(claim, found, words))
        wrong = ambiguous_side(claim, found)
        if wrong is None and (wrong := no_pairs(claim, found)):
            here_only = has_pairs_elsewhere(claim, points, excluded)
            wrong = None if here_only else "; ".join((wrong, *losses))
        if wrong:
            report(at, wrong)
        elif few := single_pair(claim, found):
            losses.append(few)
        where = f"{document.file}:{document.line(at)}: {spell(at)}"
        out += [f"{where}: {claim.that}: {loss}" for loss in losses]
    return tuple(out)


def mixed_numerics(claim: ClaimSpec, points: Sequence[Point]) -> str | None:
    """Return what is wrong with a claim whose trials differ in more than what it is about."""
    if len({point.like.numerics for point in points}) < 2:
        return None
    classes: dict[tuple[str | None, ...], dict[str, str]] = {}
    for point in points:
        if (side := point.labels.get(claim.axis)) in claim.sides:
            place = tuple(point.labels.get(axis) for axis in claim.places)
            classes.setdefault(place, {}).setdefault(point.like.numerics, side)
    for place, found in classes.items():
        if len(found) > 1:
            where = "".join(f", at {one}" for one in place)
            both = " and ".join(f"{name} ({side})" for name, side in found.items())
            what = f"compares trials of two numerics classes{where}: {both}"
            return f"{what}; give both sides one, or make the claim `per` the axis that sets it"
    return None


def _some(where: Sequence[str]) -> str:
    more = f" and {len(where) - SHOWN:,} more" if len(where) > SHOWN else ""
    return f"{', '.join(where[:SHOWN])}{more}"
