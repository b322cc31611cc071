"""What the reader of a contrast has to know beside its figures, as notes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from sweep.analysis import looks
from sweep.analysis.cells import BEST_SEEN, TrialResults, is_number, traits
from sweep.analysis.contrasts import LEAST_PAIRS, p_text
from sweep.analysis.readings import Reading
from sweep.analysis.stats import APART
from sweep.sweepfile.metrics import declared, is_accuracy
from sweep.sweepfile.schema import ClaimSpec, MetricName
from sweep.sweepfile.trials import Point

BUDGET = ("learning_rate", "batch_size", "steps", "stop", "optimizer", "dropout", "protocol")
"""Fields in which both sides of a claim should be alike, if the claim is not about them."""


def caveats(
    read: Reading,
    found: TrialResults,
    *,
    wary: bool,
    tuned: Sequence[str],
    fields: Collection[str],
    remarks: Mapping[str, str],
) -> tuple[str, ...]:
    """Return the notes of a contrast.

    Args:
        read: The contrast.
        found: What the ledger knows of its trials.
        wary: Whether arms of its metric have shown groups.
        tuned: What is to be known of the sweep's tuning.
        fields: The fields that are tuned.
        remarks: Cell id -> what is to be known of the choice of its setting.
    """
    claim, pairs = read.claim, list(read.spot.place.pairs)
    return (
        *_fates(claim, pairs, found),
        *_devices(claim, pairs, found),
        *_withheld(read, wary),
        *_history(read),
        *_unlike(claim, pairs, tuned, fields, remarks),
    )


def _fates(
    claim: ClaimSpec, pairs: Sequence[tuple[str, Point, Point]], found: TrialResults
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
                what = f"{reason}, {_counted(claim.on, fate, point)}"
                out.setdefault((side, what), []).append(label)
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
    claim: ClaimSpec, pairs: Sequence[tuple[str, Point, Point]], found: TrialResults
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
        # Several cells: those of several choices of tuning.
        cells = dict.fromkeys(point.cell_id for point in points)
        of_choices = dict.fromkeys(remarks[cell] for cell in cells if cell in remarks)
        for trait in (*traits(points), *of_choices):
            yield f"{side}: {trait}"


def _counted(metric: MetricName, fate: str, point: Point) -> str:
    # How a trial without a figure enters.
    if fate == "diverged" and declared(metric, point.like) is not None:
        return "counted as the worst figure"
    if fate == "diverged" and is_accuracy(metric):
        return "counted as the trivial baseline"
    if fate == "diverged" and metric.endswith("_loss"):
        return "counted as the greatest loss"
    return "left out"


def _withheld(read: Reading, wary: bool) -> Iterator[str]:
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
        without = "untested" if other is None else f"p {p_text(other.p(other.mixed))}"
        all_of_them = p_text(now.p(wary))
        yield f"without those that diverged: {without}, with them {all_of_them}, uncorrected"


def _history(read: Reading) -> Iterator[str]:
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
