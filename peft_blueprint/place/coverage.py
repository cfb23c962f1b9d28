"""Pick entries that cover kinds of submodule and depths of the model first, and have the largest scores second."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from ..blueprint import Submodule
from ..errors import PlacementError
from .options import Coverage


Score = Callable[[Submodule], float]
Picker = Callable[[int], Sequence[Submodule]]  # number of entries to pick → those entries

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj"))  # of kernels in Unsloth and axolotl

_DEPTH_STRATA = 6


def count_of(selector: Mapping[str, float], available: int) -> int | None:
    """Return the number of entries that `fraction` or `num_modules` asks for; None for other selectors.

    Raises:
        PlacementError: if fewer are available.
    """
    if "fraction" in selector:
        return max(1, round(selector["fraction"] * available))
    if "num_modules" not in selector:
        return None
    count = int(selector["num_modules"])
    if count > available:
        raise PlacementError(f"num_modules={count}: the blueprint has only {available} to choose from.")
    return count


def make_picker(entries: Sequence[Submodule], score: Score | None, coverage: Coverage, is_comparable: bool) -> Picker:
    """Return a function that picks any number of entries: strata first, the largest score within each.

    With fewer than two picks per kind, only depth is covered.

    Args:
        entries: to pick from.
        score: of an entry; None to pick the middle of each stratum.
        coverage: what to spread over.
        is_comparable: whether scores compare across kinds; otherwise they are divided by their kind's median where
            kinds are mixed.

    Example:
        >>> from peft_blueprint import Submodule
        >>> entries = [Submodule(f"{i}.{kind}", 1.0 + i, kind=kind, depth=i) for i in range(4) for kind in "qv"]
        >>> pick = make_picker(entries, lambda entry: entry.gradient_norm, "kind+depth", is_comparable=False)
        >>> [entry.name for entry in pick(4)]
        ['1.q', '3.q', '1.v', '3.v']
    """
    shallow_first = sorted(entries, key=_depth)
    kinds = list(by_kind(shallow_first).values())
    position = {kind: i for i, kind in enumerate(by_kind(entries))}  # breaks ties between kinds
    kinds.sort(key=lambda members: position[members[0].kind])

    def from_strata(pools: Sequence[Sequence[Submodule]], count: int, score: Score | None) -> list[Submodule]:
        seats = _apportion(count, [len(pool) for pool in pools])
        strata = [part for pool, share in zip(pools, seats, strict=True) for part in _split(pool, share)]
        return [part[len(part) // 2] if score is None else max(part, key=score) for part in strata]

    if score is None:

        def evenly(count: int) -> list[Submodule]:
            is_pooled = coverage == "none" or count < 2 * len(kinds)
            return from_strata([shallow_first] if is_pooled else kinds, count, None)

        return evenly
    if coverage == "none":
        ranked = sorted(entries, key=score, reverse=True)
        return lambda count: ranked[:count]
    if coverage == "kind":
        strongest = [sorted(members, key=score, reverse=True) for members in kinds]
        sizes = [len(members) for members in kinds]
        return lambda count: [
            e for members, share in zip(strongest, _apportion(count, sizes), strict=True) for e in members[:share]
        ]
    medians = {
        members[0].kind: 1.0 if is_comparable else statistics.median(map(score, members)) or 1.0 for members in kinds
    }

    def over_kind_and_depth(count: int) -> list[Submodule]:
        if count < 2 * len(kinds):
            return from_strata([shallow_first], count, lambda e: score(e) / medians[e.kind])
        return from_strata(kinds, count, score)

    return over_kind_and_depth


def nucleus(entries: Sequence[Submodule], share: float, score: Score, coverage: Coverage) -> list[Submodule]:
    """Return the fewest entries of each stratum that hold `share` of its summed score."""
    chosen: list[Submodule] = []
    for stratum in _strata(entries, coverage):
        held, wanted = 0.0, share * math.fsum(map(score, stratum)) * (1 - 1e-12)
        for i, entry in enumerate(sorted(stratum, key=score, reverse=True)):
            if i and held >= wanted:
                break
            chosen.append(entry)
            held += score(entry)
    return chosen


def by_kind(entries: Sequence[Submodule]) -> dict[str | None, list[Submodule]]:
    """Group entries by kind, in their order.

    Example:
        >>> from peft_blueprint import Submodule
        >>> list(by_kind([Submodule("0.q", 1.0, kind="q"), Submodule("0.v", 1.0, kind="v")]))
        ['q', 'v']
    """
    kinds: dict[str | None, list[Submodule]] = {}
    for entry in entries:
        kinds.setdefault(entry.kind, []).append(entry)
    return kinds


def fused_groups(entries: Sequence[Submodule]) -> list[list[Submodule]]:
    """Group the entries of a layer that fused kernels adapt together; any other entry is by itself.

    Example:
        >>> from peft_blueprint import Submodule
        >>> names = [f"layers.0.{name}" for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj")]
        >>> [len(group) for group in fused_groups([Submodule(name, 1.0) for name in names])]
        [3, 1]
    """
    number = {kind: i for i, kinds in enumerate(FUSED) for kind in kinds}
    groups: dict[object, list[Submodule]] = {}
    for entry in entries:
        parent, _, kind = entry.name.rpartition(".")
        groups.setdefault((parent, number[kind]) if kind in number else entry.name, []).append(entry)
    return list(groups.values())


def _strata(entries: Sequence[Submodule], coverage: Coverage) -> list[Sequence[Submodule]]:
    if coverage == "none":
        return [entries]
    kinds = by_kind(entries).values()
    if coverage == "kind":
        return list(kinds)
    return [part for kind in kinds for part in _split(sorted(kind, key=_depth), min(_DEPTH_STRATA, len(kind)))]


def _depth(entry: Submodule) -> float:
    """Depth of an entry; those outside of blocks come last."""
    return math.inf if entry.depth is None else entry.depth


def _split(ordered: Sequence[Submodule], count: int) -> list[Sequence[Submodule]]:
    """Split a sequence into `count` parts of neighbours of nearly equal length."""
    bounds = [round(i * len(ordered) / count) for i in range(count + 1)] if count else []
    return [ordered[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def _apportion(count: int, sizes: Sequence[int]) -> list[int]:
    """Distribute `count` seats in proportion to sizes by largest remainder, at most `size` seats to each."""
    total = sum(sizes)
    seats = [count * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(count * sizes[i] % total), i))
    for i in by_remainder[: count - sum(seats)]:
        seats[i] += 1
    return seats
