"""Which entries a selector takes: cover kinds and depths first, take the strongest within each.

Functions on entries and their scores. Knows nothing of what a score means, of costs or of models.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from ..blueprint import Submodule
from ..errors import PlacementError
from .options import Coverage


Score = Callable[[Submodule], float]

_SIXTHS = 6


def one_selector(**wishes: float | None) -> dict[str, float]:
    """The one selector that is given, checked; nothing if none is.

    Raises:
        PlacementError: for two of them, or a value out of range.
    """
    given = {name: value for name, value in wishes.items() if value is not None}
    if len(given) > 1:
        raise PlacementError(f"{' and '.join(f'{k}={v}' for k, v in given.items())} are two selectors: give one.")
    if not given:
        return {}
    [(name, value)] = given.items()
    if name in ("fraction", "top_p") and not 0 < value <= 1:
        raise PlacementError(f"{name}={value} is not a share: give a number above 0 and at most 1.")
    if name == "num_modules" and (value != int(value) or value < 1):
        raise PlacementError(f"num_modules={value}: give a whole number of at least 1.")
    if name == "threshold" and not (value >= 0 and math.isfinite(value)):
        raise PlacementError(f"threshold={value}: give a number of at least 0.")
    return {name: value}


def select(
    entries: Sequence[Submodule],
    selector: Mapping[str, float],
    scores: Mapping[str, float] | None,
    coverage: Coverage,
    *,
    is_comparable: bool,
    rank_by: str,
) -> list[Submodule]:
    """The entries that a selector takes, in their order.

    Args:
        entries: to choose from.
        selector: `{"fraction": 0.2}`, `{"num_modules": 42}`, `{"top_p": 0.5}` or `{"threshold": 1.0}`.
        scores: by name; None to take the middle of each stratum, whatever is measured there.
        coverage: what to spread over.
        is_comparable: whether scores of different kinds compare as they stand.
        rank_by: what the scores are, for an error.

    Raises:
        PlacementError: for a choice that is empty or larger than what there is.
    """

    def score(entry: Submodule) -> float:
        assert scores is not None
        return scores[entry.name]

    [(name, value)] = selector.items()
    if scores is None and name in ("threshold", "top_p"):
        raise PlacementError(
            f"{name}={value} needs scores, and rank_by={rank_by!r} has none: give fraction or num_modules."
        )
    if name == "threshold":
        assert scores is not None
        chosen = [entry for entry in entries if score(entry) >= value]
        if not chosen:
            raise PlacementError(f"No {rank_by} reaches threshold={value}; the largest is {max(scores.values()):.4g}.")
    elif name == "top_p":
        chosen = [e for stratum in _strata(entries, coverage) for e in _nucleus(stratum, value, score)]
    else:
        count = count_of(selector, len(entries))
        assert count is not None
        chosen = spreading(entries, score if scores is not None else None, coverage, is_comparable)(count)
    names = {entry.name for entry in chosen}
    return [entry for entry in entries if entry.name in names]


def count_of(selector: Mapping[str, float], available: int) -> int | None:
    """How many a selector asks for, where it says a number or a share; else None.

    Raises:
        PlacementError: if there are not so many.
    """
    if "fraction" in selector:
        return max(1, round(selector["fraction"] * available))
    if "num_modules" not in selector:
        return None
    count = int(selector["num_modules"])
    if count > available:
        raise PlacementError(f"num_modules={count}: the blueprint has only {available} to choose from.")
    return count


def spreading(
    entries: Sequence[Submodule], score: Score | None, coverage: Coverage, is_comparable: bool
) -> Callable[[int], list[Submodule]]:
    """How to take any number of entries: strata first, the strongest within each; without a score the middle one.

    With fewer than two per kind only depth is covered; scores that do not compare across kinds are then taken over
    their kind's median.
    """
    deepest_last = sorted(entries, key=lambda e: math.inf if e.depth is None else e.depth)
    kinds = list(by_kind(deepest_last).values())
    in_order = {kind: i for i, kind in enumerate(by_kind(entries))}  # decides ties of seats
    kinds.sort(key=lambda members: in_order[members[0].kind])
    sizes = [len(members) for members in kinds]

    def chosen(pools: Sequence[Sequence[Submodule]], count: int, score: Score | None) -> list[Submodule]:
        seats = _apportion(count, [len(pool) for pool in pools])
        runs = [run for pool, share in zip(pools, seats, strict=True) for run in _runs(pool, share)]
        return [run[len(run) // 2] if score is None else max(run, key=score) for run in runs]

    def evenly(count: int) -> list[Submodule]:
        is_pooled = coverage == "none" or count < 2 * len(kinds)
        return chosen([deepest_last] if is_pooled else kinds, count, None)

    if score is None:
        return evenly
    if coverage == "none":
        ranked = sorted(entries, key=score, reverse=True)
        return lambda count: ranked[:count]
    if coverage == "kind":
        strongest = [sorted(members, key=score, reverse=True) for members in kinds]
        return lambda count: [
            e for members, share in zip(strongest, _apportion(count, sizes), strict=True) for e in members[:share]
        ]
    medians = {
        members[0].kind: 1.0 if is_comparable else statistics.median(map(score, members)) or 1.0 for members in kinds
    }

    def over_kinds_and_depth(count: int) -> list[Submodule]:
        if count < 2 * len(kinds):
            return chosen([deepest_last], count, lambda e: score(e) / medians[e.kind])
        return chosen(kinds, count, score)

    return over_kinds_and_depth


def by_kind(entries: Sequence[Submodule]) -> dict[str | None, list[Submodule]]:
    """Entries of each kind, in their order."""
    kinds: dict[str | None, list[Submodule]] = {}
    for entry in entries:
        kinds.setdefault(entry.kind, []).append(entry)
    return kinds


def _nucleus(entries: Sequence[Submodule], share: float, score: Score) -> list[Submodule]:
    """The fewest entries that hold `share` of the summed score."""
    chosen: list[Submodule] = []
    held = 0.0
    wanted = share * math.fsum(map(score, entries)) * (1 - 1e-12)
    for entry in sorted(entries, key=score, reverse=True):
        if chosen and held >= wanted:
            break
        chosen.append(entry)
        held += score(entry)
    return chosen


def _strata(entries: Sequence[Submodule], coverage: Coverage) -> list[Sequence[Submodule]]:
    if coverage == "none":
        return [entries]
    kinds = by_kind(entries).values()
    if coverage == "kind":
        return list(kinds)
    by_depth = [sorted(members, key=lambda e: math.inf if e.depth is None else e.depth) for members in kinds]
    return [run for members in by_depth for run in _runs(members, min(_SIXTHS, len(members)))]


def _runs(ordered: Sequence[Submodule], count: int) -> list[Sequence[Submodule]]:
    """`count` runs of neighbours, as equal in number as can be."""
    bounds = [round(i * len(ordered) / count) for i in range(count + 1)] if count else []
    return [ordered[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def _apportion(count: int, sizes: Sequence[int]) -> list[int]:
    """`count` seats in proportion to sizes, by largest remainder, never more than a size."""
    total = sum(sizes)
    seats = [count * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(count * sizes[i] % total), i))
    for i in by_remainder[: count - sum(seats)]:
        seats[i] += 1
    return seats
