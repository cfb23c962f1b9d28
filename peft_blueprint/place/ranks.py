"""Ranks of adapters: by score, with all-linear LoRA's parameters, or as k* asks for."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

from ..blueprint import Submodule


_STEPS = 4  # in the mean rank
_LARGEST = 4  # times the mean rank
_LARGEST_RAISED = 8  # times all-linear LoRA's rank


def ranks_by_score(entries: Sequence[Submodule], scores: Mapping[str, float], rank: int) -> dict[str, int]:
    """Distribute ranks in proportion to scores, with a mean of `rank`.

    An entry gets at least one and at most sixteen steps of a quarter of `rank`, and no more than its weight's full rank.
    D'Hondt's method gives each further step to the entry with the largest score over steps held, plus one. Keep alpha
    over rank the same for all entries, so that an optimizer step is as large in each.

    Args:
        entries: submodules that get an adapter.
        scores: by name, comparable with each other.
        rank: mean rank, less only where full ranks do not allow it.

    Example:
        >>> from peft_blueprint import Submodule
        >>> ranks_by_score([Submodule("a", 1.0), Submodule("b", 1.0)], {"a": 3.0, "b": 1.0}, rank=8)
        {'a': 12, 'b': 4}
    """
    step = max(1, rank // _STEPS)
    most = max(1, _LARGEST * rank // step)
    full = {entry.name: full_rank(entry) for entry in entries}
    held = {entry.name: 1 for entry in entries}
    left = len(entries) * rank // step - len(entries)
    queue = [(-scores[name] / 2, name) for name in held if step < full[name]]
    heapq.heapify(queue)
    while left > 0 and queue:
        _, name = heapq.heappop(queue)
        held[name] += 1
        left -= 1
        if held[name] < most and held[name] * step < full[name]:
            heapq.heappush(queue, (-scores[name] / (held[name] + 1), name))
    return {name: int(min(steps * step, full[name])) for name, steps in held.items()}


def ranks_of_equal_parameters(chosen: Sequence[Submodule], entries: Sequence[Submodule], rank: int) -> dict[str, int]:
    """Return the ranks at which adapters on `chosen` have as many parameters as adapters of `rank` on all entries.

    An adapter's time is spent on tensors as wide as the layer, hardly on its rank, so fewer adapters of a higher rank
    take less time. All have one rank, except where a weight's full rank is lower: the others share what that leaves.
    Rounded down, to a multiple of 8 from 16 on; at least `rank` and at most eight times `rank`, but never above a full
    rank.

    Args:
        chosen: entries that get an adapter.
        entries: all entries that could.
        rank: of LoRA on all entries.

    Example:
        >>> from peft_blueprint import Submodule
        >>> entries = [Submodule(f"{i}.q", 1.0, shape=(64, 64)) for i in range(4)]
        >>> ranks_of_equal_parameters(entries[:1], entries, rank=16)
        {'0.q': 64}
    """
    left, width = rank * sum(map(_width, entries)), sum(map(_width, chosen))
    raised = rank
    for entry in sorted(chosen, key=full_rank):  # those with the lowest full rank leave parameters to the others
        raised = left // width
        if raised <= full_rank(entry):
            break
        left -= int(full_rank(entry)) * _width(entry)
        width -= _width(entry)
    raised = min(_LARGEST_RAISED * rank, raised)
    raised = max(rank, raised - raised % 8 if raised >= 16 else raised)
    return {entry.name: int(min(raised, full_rank(entry))) for entry in chosen}


def full_rank(entry: Submodule) -> float:
    """Return the smaller dimension of a weight, of each expert where experts are fused; infinite if it is unknown."""
    return math.inf if entry.shape is None or len(entry.shape) < 2 else min(entry.shape[-2:])


def _width(entry: Submodule) -> int:
    """Return the parameters of an adapter of rank 1; 1 if the shape is unknown."""
    if entry.shape is None or len(entry.shape) < 2:
        return 1
    *experts, d_out, d_in = entry.shape
    return math.prod(experts) * (d_out + d_in)


def k_star_rank(entry: Submodule) -> int | None:
    """Return the rank at which an adapter has about the share k* of the weight's parameters; None if k* is unknown.

    Eq. 15's k* is the share of a submodule's parameters whose update pays best; an adapter of rank r has r(d_in + d_out)
    parameters beside d_in·d_out. Rounded, at least 1 and at most the full rank.
    """
    if entry.k_star is None or entry.shape is None or len(entry.shape) < 2:
        return None
    d_out, d_in = entry.shape[-2:]
    return min(max(1, round(entry.k_star * d_out * d_in / (d_out + d_in))), min(d_out, d_in))
