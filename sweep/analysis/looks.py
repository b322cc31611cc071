"""When a claim may be read, and what each reading costs.

A file without `looks:` is read once, when all of its pairs have ended. With `looks: [3, 5, 10]` it
is read at 3, 5 and 10 pairs, and the error of 0.05 is spent over these by a spending function (Lan
and DeMets 1983): at each look the level is what the function adds from the look before. Nothing is
taken off for what the looks have in common, so that the sum of levels bounds the error by Boole's
inequality for every test, at every number of pairs and whatever the outcomes are like; what that
costs in power against a joint distribution is measured by benchmarks/coverage.py.

`sequential` turns the p values of the looks so far into one p: the least total error at which one
of them would have decided. Holm's correction of such p values bounds the error of the family
(Maurer and Bretz 2013).

A file that is extended after its last planned reading has spent its error. The j-th extension has a
fifth of a hundredth of it, over j (j + 1): all that ever come add 0.01 together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Spending = Literal["obrien-fleming", "pocock"]

EXTENSIONS = 0.2
"""The error of all extensions together, as a part of that of the plan."""

MOST = 0.3
"""The greatest total error for which `sequential` tells a p from 1. Below 0.317 every level rises
with the total, so that there is one answer."""


def spent(total: float, part: float, spending: Spending = "obrien-fleming") -> float:
    """Return the error that may be spent by the time that a part of the pairs is there.

    Args:
        total: The error at the end, between 0 and 1.
        part: Pairs so far of those at the last look, above 0.
        spending: obrien-fleming: little early on, nearly everything at the end; pocock: evenly.
    """
    if part >= 1:
        return total
    if spending == "pocock":
        return total * math.log(1 + (math.e - 1) * part)
    from scipy.special import ndtr, ndtri

    return 2 * float(ndtr(float(ndtri(total / 2)) / math.sqrt(part)))


def levels(
    looks: Sequence[int], total: float, spending: Spending = "obrien-fleming"
) -> tuple[float, ...]:
    """Return the level of the test at each look; together they are `total`."""
    sums = [spent(total, look / looks[-1], spending) for look in looks]
    return tuple(now - before for now, before in zip(sums, [0.0, *sums], strict=False))


def sequential(
    ps: Sequence[float], looks: Sequence[int], spending: Spending = "obrien-fleming"
) -> float:
    """Return the p of a claim that was read at the first looks of a plan.

    Args:
        ps: The p value at each look so far.
        looks: Pairs at every look of the plan, rising.
        spending: See `spent`.

    Returns:
        The p value itself with a single look; 1 for anything above `MOST`.
    """
    if len(looks) == 1:
        return ps[0] if ps else 1.0
    return min((_total(p, at, looks, spending) for at, p in enumerate(ps)), default=1.0)


def _total(p: float, at: int, looks: Sequence[int], spending: Spending) -> float:
    low, high = 0.0, MOST
    if levels(looks, high, spending)[at] < p:
        return 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if levels(looks, middle, spending)[at] < p:
            low = middle
        else:
            high = middle
    return high


def penalty(extension: int) -> float:
    """Return the factor on the p of the j-th extension of a file; 1 for j = 0, the plan itself."""
    return extension * (extension + 1) / EXTENSIONS if extension else 1.0
