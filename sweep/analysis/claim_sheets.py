"""Claims as they are printed, in whatever format."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

from sweep.analysis.cells import FACTS, words
from sweep.analysis.contrasts import LEAST_PAIRS, Aggregate, Contrast, Overall, p_text
from sweep.analysis.stats import LEVEL, MOST_PAIRS
from sweep.analysis.typeset import Entry, Footnotes, Line, Sheet
from sweep.sweepfile.metrics import is_accuracy

LISTED = 12
"""Seeds that an edit names when it is printed; the record has them all."""


def claims_sheet(
    sweep: str, contrasts: Sequence[Contrast], *, late: int | None, unnoted: bool
) -> Sheet:
    """Return the claims of a sweep, ready to be printed.

    Args:
        sweep: The name of the sweep.
        contrasts: At least one.
        late: Trials that had a row when the list of claims was first noted; None if it was not.
        unnoted: Whether there are results, and no list was noted.
    """
    notes = Footnotes()
    metrics = dict.fromkeys(map(_named, contrasts))
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
        texts += [_difference(one), p_text(one.p_holm)]
        texts += ["" if one.effect is None else f"{round(one.effect, 1) + 0.0:+.1f}"]
        texts += [_pairs(one)] if uneven else []
        verdict = f"{one.verdict} (provisional)" if one.provisional else one.verdict
        entries = (*map(Entry, texts), Entry(verdict), Entry(_more(one), edit))
        lines.append(Line("ours", Entry(one.claim, marks), entries))
    general = _general(contrasts, metrics, late=late, unnoted=unnoted, uneven=uneven)
    every = (*(("", text) for text in (*general, *common)), *notes.lettered())
    return Sheet(f"Claims of {sweep}", "claim", tuple(heads), tuple(lines), every)


def _general(
    contrasts: Sequence[Contrast],
    metrics: Collection[str],
    *,
    late: int | None,
    unnoted: bool,
    uneven: bool,
) -> Iterator[str]:
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
    if unnoted:
        yield "no list of claims was noted before these results: what was asked first is not known"
    elif late:
        yield f"the list of claims was first noted when {late:,} trials had results"
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


def arms_sheet(sweep: str, aggregates: Sequence[Aggregate]) -> Sheet:
    """Return the arms of a sweep over tasks, ready to be printed."""
    notes = Footnotes()
    several = len({one.metric for one in aggregates}) > 1
    ranks = any(one.rank is not None for one in aggregates)
    lines = []
    for one in aggregates:
        partial = f"over the {one.places} of {one.of} places at which every arm has a run"
        uneven = "more runs at some places than at others, which weigh more"
        said = [partial] * (one.places < one.of) + [uneven] * (not one.even)
        marks = tuple(map(notes.mark, said))
        between = "" if one.low is None else f"{one.low:.1f} to {one.high:.1f}"
        texts = [*([words(one.metric)] if several else []), one.over, str(one.runs)]
        entries = [*map(Entry, texts), Entry(f"{one.mean:.1f}", marks), Entry(between)]
        entries.append(Entry(f"{one.coverage} %" if one.coverage else ""))
        if ranks:
            entries.append(Entry("" if one.rank is None else f"{one.rank:.2f}"))
        lines.append(Line("ours", Entry(one.arm), tuple(entries)))
    of = " and ".join(dict.fromkeys(words(one.metric) for one in aggregates))
    text = (
        f"mean: interquartile mean of {of} over all runs, per cent: that of their middle half. "
        "Interval: 95 % percentile bootstrap, runs drawn anew within each place; covers: how often "
        "at worst such an interval held the true value in simulated sweeps"
    )
    heads = (*(["of"] if several else []), "over", "runs", "mean", "interval", "covers")
    if ranks:
        heads += ("rank",)
    tests = dict.fromkeys(
        f"rank: mean rank of an arm over {one.places} places, 1 the best; p {p_text(one.friedman)} "
        "that all arms rank alike (Friedman's test, by permutation); "
        + (
            f"two mean ranks differ by {one.critical:.2f} at least (Nemenyi)"
            if one.friedman is not None and one.friedman < 1 - LEVEL and one.critical is not None
            else "no two of them are told apart then"
        )
        for one in aggregates
        if one.rank is not None
    )
    return Sheet(
        f"Arms of {sweep}",
        "arm",
        heads,
        tuple(lines),
        (("", text), *(("", test) for test in tests), *notes.lettered()),
    )


def overall_sheet(sweep: str, overall: Sequence[Overall]) -> Sheet:
    """Return the claims of a sweep over places, ready to be printed."""
    several = len({one.metric for one in overall}) > 1
    lines = []
    for one in overall:
        places = str(one.places) if one.places == one.of else f"{one.places}/{one.of}"
        texts = [*([words(one.metric)] if several else []), one.over, places]
        texts += [f"{round(one.difference, 2) + 0.0:+.2f}", f"{one.improvement:.2f}", p_text(one.p)]
        between = "" if one.low is None else f"{one.low:+.2f} to {one.high:+.2f}"
        texts += [f"{round(one.middle, 2) + 0.0:+.2f}", between]
        texts += [f"{one.coverage} %" if one.coverage else ""]
        lines.append(Line("ours", Entry(one.claim), tuple(map(Entry, texts))))
    of = " and ".join(dict.fromkeys(words(one.metric) for one in overall))
    text = (
        f"difference of {of}, where 0 is chance and 1 the best run of a place, mean over places; "
        "improvement: how probably a run of the left side beats one of the right, ties half; p: "
        "signed-rank test over places, of each claim alone, below 0.05 with six places at least; "
        "middle: difference of the interquartile means over all runs, on the same scale, with its "
        "95 % percentile bootstrap, runs drawn anew within each place; covers: how often at worst "
        "such an interval held the true value in simulated sweeps"
    )
    heads = (*(["of"] if several else []), "over", "places", "difference", "improvement", "p")
    heads += ("middle", "interval", "covers")
    return Sheet(f"Claims of {sweep} over places", "claim", heads, tuple(lines), (("", text),))


def _named(one: Contrast) -> str:
    # A metric with the unit of its differences: per cents differ by points.
    own = "points" if is_accuracy(one.metric) else one.unit
    return words(one.metric) + (f" ({own})" if own else "")


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
