"""Ranks of a placement's adapters: uniform, raised to all-linear LoRA's parameters, or higher where the score is; and
the rank that the paper's k* asks for.

Functions on entries. Knows nothing of models or costs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

from ..blueprint import Submodule


_STEPS = 4  # a rank changes by a quarter of the uniform one
_LARGEST = 4  # times the uniform one
_MOST = 8  # times all-linear LoRA's


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


def rank_of_equal_parameters(chosen: Sequence[Submodule], entries: Sequence[Submodule], rank: int) -> int:
    """The rank at which adapters on some entries have as many parameters as adapters of `rank` on all of them.

    An adapter's time goes into reading and writing what is as wide as the layer, hardly into its rank, so that a
    placement with fewer adapters has the same parameters for less. Rounded down, to a multiple of 8 from 16 on; at least
    `rank` and at most eight times that.

    Args:
        chosen: that get an adapter.
        entries: all that could.
        rank: of LoRA on all of them.
    """
    whole, part = (sum(map(_width, group)) for group in (entries, chosen))
    raised = min(_MOST * rank, rank * whole // part) if part else rank
    return max(rank, raised - raised % 8 if raised >= 16 else raised)


def _width(entry: Submodule) -> int:
    """Parameters of an adapter of rank 1; entries whose shape is unknown count alike."""
    if entry.shape is None or len(entry.shape) < 2:
        return 1
    *experts, d_out, d_in = entry.shape
    return math.prod(experts) * (d_out + d_in)


def k_star_rank(entry: Submodule) -> int | None:
    """The rank at which an adapter has about the share k* of the weight's parameters, or None where that is not known.

    Eq. 15's k* is the share of a submodule's parameters whose update pays best; an adapter of rank r has r(d_in + d_out)
    of the d_in·d_out. The nearest whole rank of at least 1, at most the full rank.
    """
    if entry.k_star is None or entry.shape is None or len(entry.shape) < 2:
        return None
    d_out, d_in = entry.shape[-2:]
    return min(max(1, round(entry.k_star * d_out * d_in / (d_out + d_in))), min(d_out, d_in))
