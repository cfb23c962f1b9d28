"""The search for a placement under a budget, or for the cheapest that keeps a share of the gain.

A family of choices, from every depth at which the backward pass may stop upwards and of every number, is priced; the best
that is allowed wins. Knows nothing of models or blueprints: units, prices and gains are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..blueprint import Submodule
from ..errors import PlacementError
from .budget import Budget, shown


Taking = Callable[[int], Sequence[Submodule]]  # a number → so many units

# At most so many depths are tried as the lowest, and single units priced to say what is the least.
_DEPTHS = 16
_SINGLES = 400


@dataclass(frozen=True)
class Choice:
    """Some units with what they cost and are predicted to gain.

    Args:
        units: entries that get an adapter, or blocks that are unfrozen, in the model's order.
        costs: `time`, `parameters`, `modules`, `memory` and what else is known, by name.
        gain: as a share of what all units together gain.
    """

    units: tuple[Submodule, ...]
    costs: Mapping[str, float]
    gain: float


class Search:
    """All placements of one family.

    Args:
        units: entries or blocks to choose from, in the model's order.
        spreading: pool → how to take any number of its units.
        price: units → costs by name.
        gain: units → predicted gain, in any unit.
    """

    def __init__(
        self,
        units: Sequence[Submodule],
        spreading: Callable[[Sequence[Submodule]], Taking],
        price: Callable[[Sequence[Submodule]], Mapping[str, float]],
        gain: Callable[[Sequence[Submodule]], float],
    ):
        self.units = tuple(units)
        self.spreading = spreading
        self.price = price
        self.gain = gain
        self.whole_gain = gain(self.units) or 1.0

    def choice(self, units: Sequence[Submodule]) -> Choice:
        """These units, priced."""
        names = {unit.name for unit in units}
        ordered = tuple(unit for unit in self.units if unit.name in names)
        return Choice(ordered, self.price(ordered), self.gain(ordered) / self.whole_gain)

    def within(self, budget: Budget) -> Choice:
        """The choice of the largest gain that a budget allows; of equal gains the fastest.

        Raises:
            PlacementError: if it allows none, with the least that works.
        """

        def allowed(choice: Choice) -> bool:
            return not budget.exceeded(choice.costs)

        found = [choice for pool in self._pools() if (choice := self._largest(pool, allowed)) is not None]
        if not found:
            found = [choice for choice in self._singles() if allowed(choice)]
        if not found:
            raise PlacementError(self._too_small(budget))
        return max(found, key=lambda choice: (choice.gain, -choice.costs["time"]))

    def keeping(self, share: float, budget: Budget | None = None) -> Choice:
        """The fastest choice that keeps a share of the gain, and that a budget, if there is one, allows.

        Raises:
            PlacementError: if there is none, with the most that can be kept.
        """
        found = []
        for pool in self._pools():
            choice = self._smallest(pool, lambda choice: choice.gain >= share)
            if choice is not None and (budget is None or not budget.exceeded(choice.costs)):
                found.append(choice)
        if not found:
            most = self.within(budget).gain if budget else 1.0
            raise PlacementError(
                f"keep={share:g} cannot be met within {budget}: the most that this allows keeps {most:.2f} of the "
                "predicted gain. Ask for less, or allow more."
            )
        return min(found, key=lambda choice: (choice.costs["time"], choice.costs["parameters"]))

    def neighbours(self, choice: Choice) -> list[Choice]:
        """What half and twice as many units, from the same depth up, would cost and gain."""
        lowest = min((_depth(unit) for unit in choice.units), default=0)
        pool = [unit for unit in self.units if _depth(unit) >= lowest]
        take = self.spreading(pool)
        counts = sorted({max(1, len(choice.units) // 2), min(len(pool), 2 * len(choice.units))})
        return [self.choice(take(count)) for count in counts if count != len(choice.units)]

    def _pools(self) -> Iterator[list[Submodule]]:
        """The units from each depth up."""
        depths = sorted({_depth(unit) for unit in self.units})
        step = math.ceil(len(depths) / _DEPTHS)
        for depth in depths[::step]:
            yield [unit for unit in self.units if _depth(unit) >= depth]

    def _largest(self, pool: Sequence[Submodule], allowed: Callable[[Choice], bool]) -> Choice | None:
        """The most units of a pool that are allowed, by bisection: more of them cost more."""
        best, low, high = None, 0, len(pool)
        take = self.spreading(pool)
        while low < high:
            middle = (low + high + 1) // 2
            choice = self.choice(take(middle))
            if allowed(choice):
                best, low = choice, middle
            else:
                high = middle - 1
        return best

    def _smallest(self, pool: Sequence[Submodule], enough: Callable[[Choice], bool]) -> Choice | None:
        """The fewest units of a pool that are enough, by bisection: more of them gain more."""
        best, low, high = None, 1, len(pool) + 1
        take = self.spreading(pool)
        while low < high:
            middle = (low + high) // 2
            choice = self.choice(take(middle)) if middle <= len(pool) else None
            if choice is not None and enough(choice):
                best, high = choice, middle
            else:
                low = middle + 1
        return best

    def _singles(self) -> list[Choice]:
        """Single units: all of them, or where there are very many the deepest and the smallest."""
        units: Sequence[Submodule] = self.units
        if len(units) > _SINGLES:
            by_depth = sorted(units, key=_depth, reverse=True)
            by_size = sorted(units, key=lambda unit: math.prod(unit.shape or (1,)))
            units = [*by_depth[: _SINGLES // 2], *by_size[: _SINGLES // 2]]
        return [self.choice([unit]) for unit in units]

    def _too_small(self, budget: Budget) -> str:
        singles = self._singles()
        limits = budget.limits
        least = {name: min(choice.costs[name] for choice in singles) for name in limits}
        impossible = [name for name in limits if least[name] > limits[name]]
        if not impossible:
            return (
                f"No placement meets all of {budget} at once. Of those with a single module the fastest takes "
                f"{', '.join(shown(n, min(singles, key=lambda c: c.costs['time']).costs[n]) for n in limits)}. Raise one."
            )
        said = "; ".join(
            f"the smallest placement takes {shown(n, least[n])}, and the budget is {shown(n, limits[n])}"
            for n in impossible
        )
        return f"The budget is too small for any placement: {said}. Give at least {_given(least, impossible)}."


def _given(least: Mapping[str, float], names: Sequence[str]) -> str:
    """The least budget that works, as one would write it."""
    written = {
        "memory": lambda value: f"'{math.ceil(value / 2**20)}MiB'",
        "time": lambda value: f"'{math.ceil(value * 1000) / 1000:.3f}x'",
        "parameters": lambda value: f"'{value:.0f} parameters'",
        "modules": lambda value: f"'{value:.0f} modules'",
    }
    return " and ".join(written[name](least[name]) for name in names)


def _depth(unit: Submodule) -> float:
    """Of a unit; what is in no block counts as above them all."""
    return math.inf if unit.depth is None else unit.depth
