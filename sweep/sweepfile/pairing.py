"""Which trials a claim compares: pairs of both its sides, at each point of the axes it is made for.

The two trials of a pair have one label of the axis `paired_by`, and one of each axis under `per`;
they stand on the two sides of the claim's own axis. What breaks pairs is found here too, so that it
is told before anything trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sweep.sweepfile.schema import ClaimSpec
    from sweep.sweepfile.trials import Point

SHOWN = 5
"""Places that one warning names."""

Labels = tuple[str, ...]
"""A label of each axis under `per`, in that order."""


@dataclass(frozen=True)
class Place:
    """Where a claim is made: the trials of both its sides, by the axis that pairs them."""

    left: dict[str, list[Point]] = field(default_factory=dict)
    """Label of the axis that pairs -> trials; more than one is a claim that mixes configs."""
    right: dict[str, list[Point]] = field(default_factory=dict)

    @property
    def pairs(self) -> Iterator[tuple[str, Point, Point]]:
        """(label, left, right) of each pair."""
        for label, (point, *_) in self.left.items():
            if label in self.right:
                yield label, point, self.right[label][0]


def places(claim: ClaimSpec, points: Iterable[Point]) -> dict[Labels, Place]:
    """The places of a claim, in the order of the trials; one may be without any pair."""
    left, _ = claim.sides
    found: dict[Labels, Place] = {}
    for point in points:
        at = locate(claim, point.labels)
        if at is not None:
            side, label, labels = at
            place = found.setdefault(labels, Place())
            (place.left if side == left else place.right).setdefault(label, []).append(point)
    return found


def locate(claim: ClaimSpec, labels: Mapping[str, str]) -> tuple[str, str, Labels] | None:
    """(side, label of the axis that pairs, place) of a trial; None if the claim is not about it."""
    side, label = labels.get(claim.axis), labels.get(claim.paired_by)
    if side not in claim.sides or label is None:
        return None
    place = tuple(labels[axis] for axis in claim.places if axis in labels)
    return (side, label, place) if len(place) == len(claim.places) else None


def mixed(claim: ClaimSpec, found: Mapping[Labels, Place]) -> str | None:
    """What is wrong with a claim of which a side holds several trials at once, if one does."""
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


def absent(claim: ClaimSpec, found: Mapping[Labels, Place]) -> str | None:
    """Why a claim can nowhere be tested, if so."""
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


def lonely(claim: ClaimSpec, found: Mapping[Labels, Place]) -> str | None:
    """What of a claim can never be tested for want of a second pair, if anything."""
    where = [" / ".join(at) for at, place in found.items() if len(list(place.pairs)) == 1]
    if not where:
        return None
    at = f" at {_some(where)}" if claim.places else ""
    return f"one pair alone{at}, which shows no spread: no test; add to axis {claim.paired_by}"


def lost(
    claim: ClaimSpec,
    found: Mapping[Labels, Place],
    excluded: Iterable[tuple[Mapping[str, str], str, bool]],
) -> Iterator[str]:
    """What of a claim cannot be tested, and why: a sentence for each kind of loss.

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
        there, out = found.get(spot, Place()), gone.get(spot, {})
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


def _some(where: Sequence[str]) -> str:
    more = f" and {len(where) - SHOWN:,} more" if len(where) > SHOWN else ""
    return f"{', '.join(where[:SHOWN])}{more}"
