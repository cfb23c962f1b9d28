"""Which of several (cost, worth) pairs no other one beats: the Pareto front.

Knows nothing of runs, units or pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto_front(costs: Sequence[float | None], worths: Sequence[float | None]) -> tuple[bool, ...]:
    """Of each whether it is on the front: no other is at least as good in both and better in one.

    Of equal pairs all are on it or none. One that lacks a number, or whose number is not finite, is on no front and
    keeps no other from it.

    Args:
        costs: what each spent; less is better.
        worths: what each has; more is better.

    Raises:
        ValueError: if there are not as many of the one as of the other.
    """
    known = [
        (cost, -worth, i)
        for i, (cost, worth) in enumerate(zip(costs, worths, strict=True))
        if cost is not None and worth is not None and math.isfinite(cost) and math.isfinite(worth)
    ]
    chosen = set()
    best = (math.inf, math.inf)  # of those that cost less or the same: the least negated worth, and what it cost
    for cost, negated, i in sorted(known):
        if negated < best[0] or (negated, cost) == best:
            chosen.add(i)
            best = negated, cost
    return tuple(i in chosen for i in range(len(costs)))
