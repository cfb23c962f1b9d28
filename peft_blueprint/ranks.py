"""Ranks of a placement's adapters: uniform, or higher where the score is; and the rank that the paper's k* asks for.

Functions on entries. Knows nothing of models or costs.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Literal

from .entry import Submodule


Ranks = Literal["uniform", "influence"]

_STEPS = 4  # a rank changes by a quarter of the uniform one
_LARGEST = 4  # times the uniform one


def ranks_by_influence(entries: Sequence[Submodule], scores: Mapping[str, float], rank: int) -> dict[str, int]:
    """Ranks in proportion to scores, as many in all as if every entry had `rank`.

    Shared out in steps of a quarter of `rank`, at least one and at most sixteen to an entry (D'Hondt's method, which
    gives every next step to the entry with the largest score over steps held). The alpha over rank is to stay the same
    for all, so that a step of the optimizer is as large in each.

    Args:
        entries: that get an adapter.
        scores: by name, comparable with each other.
        rank: what they have on average.
    """
    step = max(1, rank // _STEPS)
    most = max(1, _LARGEST * rank // step)
    held = {entry.name: 1 for entry in entries}
    left = len(entries) * rank // step - len(entries)
    queue = [(-scores[name] / 2, name) for name in held]
    heapq.heapify(queue)
    while left > 0 and queue:
        _, name = heapq.heappop(queue)
        held[name] += 1
        left -= 1
        if held[name] < most:
            heapq.heappush(queue, (-scores[name] / (held[name] + 1), name))
    return {name: steps * step for name, steps in held.items()}


def k_star_rank(entry: Submodule) -> int | None:
    """The rank at which an adapter has about the share k* of the weight's parameters, or None where that is not known.

    Eq. 15's k* is the share of a submodule's parameters whose update pays best; an adapter of rank r has r(d_in + d_out)
    of the d_in·d_out. The nearest whole rank of at least 1, at most the full rank.
    """
    if entry.k_star is None or entry.shape is None or len(entry.shape) < 2:
        return None
    d_out, d_in = entry.shape[-2:]
    return min(max(1, round(entry.k_star * d_out * d_in / (d_out + d_in))), min(d_out, d_in))
