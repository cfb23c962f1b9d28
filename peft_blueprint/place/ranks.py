"""Ranks of adapters: by score, with all-linear LoRA's parameters, or as k* asks for; and the alpha that goes with them.

One rule gives every adapter its alpha. LoRA on every linear layer, with rank r and `lora_alpha`, has the scaling
alpha / r, or alpha / √r with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732). Each adapter of a placement keeps that
scaling, whatever its own rank is. `lora_alpha` is 2 · r where it is left out. Learning rates are compared with those of
all-linear LoRA at the same scaling.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping, Sequence

from ..blueprint import Submodule


SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # max_lora_rank of vLLM 0.33; other servers pad to any rank
DEFAULT_ALPHA = 2  # times the rank

_SERVED_BY_DEFAULT = 16  # max_lora_rank of vLLM where no flag is given
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
    """Return the ranks at which adapters on `chosen` have about the parameters of adapters of `rank` on all entries.

    An adapter's time is spent on tensors as wide as the layer, hardly on its rank, so fewer adapters of a higher rank
    take less time. All have one rank, except where a weight's full rank is lower: the others share what that leaves.
    Rounded down to one of `SERVER_RANKS`; at least `rank` and at most eight times `rank`, but never above a full rank.

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
    raised = max(rank, _servable(min(_LARGEST_RAISED * rank, raised)))
    return {
        entry.name: raised if raised <= (full := full_rank(entry)) else max(min(rank, int(full)), _servable(full))
        for entry in chosen
    }


def uniform_ranks(chosen: Sequence[Submodule], rank: int) -> dict[str, int]:
    """Return `rank` for every entry, or its weight's full rank where that is lower.

    Example:
        >>> from peft_blueprint import Submodule
        >>> uniform_ranks([Submodule("q", 1.0, shape=(64, 64)), Submodule("k", 1.0, shape=(8, 64))], 16)
        {'q': 16, 'k': 8}
    """
    return {entry.name: int(min(rank, full_rank(entry))) for entry in chosen}


def scaling_of(rank: int, alpha: float, use_rslora: bool = False) -> float:
    """Return the factor on B·A: alpha / rank, or alpha / √rank with rsLoRA.

    Example:
        >>> scaling_of(16, 32), scaling_of(16, 16, use_rslora=True)
        (2.0, 4.0)
    """
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def alpha_of(rank: int, scaling: float, use_rslora: bool = False) -> float:
    """Return the alpha that gives an adapter of this rank a scaling; an int if it is whole.

    Example:
        >>> alpha_of(64, 2.0), alpha_of(64, 4.0, use_rslora=True), alpha_of(5, 0.5)
        (128, 32, 2.5)
    """
    alpha = scaling * (math.sqrt(rank) if use_rslora else rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def serving_note(ranks: Collection[int]) -> str | None:
    """Say which rank a server has to reserve for adapters, where that is above their largest rank; None otherwise.

    Example:
        >>> serving_note([104, 64])
        'Rank 104 is none of the ranks 1, 8, 16, 32, 64, 128, 256, 320, 512 that vLLM reserves: it needs --max-lora-rank 128.'
        >>> serving_note([64]) is None
        True
    """
    largest = max(ranks, default=0)
    if largest > SERVER_RANKS[-1]:
        return (
            f"Rank {largest} is above {SERVER_RANKS[-1]}, the largest that vLLM serves: choose a lower r, or merge the "
            "adapter into the model to serve it."
        )
    reserved = next(rank for rank in SERVER_RANKS if rank >= largest)
    if largest <= _SERVED_BY_DEFAULT or reserved == largest:
        return None
    return (
        f"Rank {largest} is none of the ranks {', '.join(map(str, SERVER_RANKS))} that vLLM reserves: it needs "
        f"--max-lora-rank {reserved}."
    )


def _servable(rank: float) -> int:
    """Return the largest of `SERVER_RANKS` up to this rank."""
    return max(served for served in SERVER_RANKS if served <= rank)


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
