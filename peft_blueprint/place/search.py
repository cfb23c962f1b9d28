"""Search for the placement with the largest gain within a budget, or the fastest one that retains a share of the gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..blueprint import Submodule
from ..errors import PlacementError
from .budget import Budget, format_cost
from .coverage import Picker


_MAX_DEPTHS = 16  # tried as the lowest depth
_MAX_SINGLES = 400  # single units priced to find the smallest placement


@dataclass(frozen=True)
class Choice:
    """Chosen units with their costs and predicted gain.

    Args:
        units: entries that get an adapter, or blocks that are unfrozen, in the model's order.
        costs: `time`, `parameters`, `modules`, `memory` and so on, as far as they are known.
        gain: share of the gain of all units together.
    """

    units: tuple[Submodule, ...]
    costs: Mapping[str, float]
    gain: float


class Search:
    """Every number of units from every depth upwards, priced on demand.

    Args:
        units: entries or blocks to choose from, in the model's order.
        make_picker: pool → function that picks any number of its units.
        price: units → costs by name.
        gain: units → predicted gain, in any unit.
    """

    def __init__(
        self,
        units: Sequence[Submodule],
        make_picker: Callable[[Sequence[Submodule]], Picker],
        price: Callable[[Sequence[Submodule]], Mapping[str, float]],
        gain: Callable[[Sequence[Submodule]], float],
    ):
        self.units = tuple(units)
        self.make_picker = make_picker
        self.price = price
        self.gain = gain
        self.whole_gain = gain(self.units) or 1.0

    def choice(self, units: Sequence[Submodule]) -> Choice:
        """Price these units."""
        names = {unit.name for unit in units}
        ordered = tuple(unit for unit in self.units if unit.name in names)
        return Choice(ordered, self.price(ordered), self.gain(ordered) / self.whole_gain)

    def within(self, budget: Budget) -> Choice:
        """Return the choice with the largest gain within a budget; among equal gains the fastest.

        Raises:
            PlacementError: if nothing fits, with the smallest budget that works.
        """

        def fits(choice: Choice) -> bool:
            return not budget.exceeded(choice.costs)

        found = [choice for pool in self._pools() if (choice := self._largest(pool, fits)) is not None]
        if not found:
            found = [choice for choice in self._singles() if fits(choice)]
        if not found:
            raise PlacementError(self._too_small(budget))
        return max(found, key=lambda choice: (choice.gain, -choice.costs["time"]))

    def retaining(self, share: float, budget: Budget | None = None) -> Choice:
        """Return the fastest choice that retains a share of the gain, within a budget if one is given.

        Raises:
            PlacementError: if there is none, with the largest share that the budget allows.
        """
        found = []
        for pool in self._pools():
            choice = self._smallest(pool, lambda choice: choice.gain >= share)
            if choice is not None and (budget is None or not budget.exceeded(choice.costs)):
                found.append(choice)
        if not found:
            most = self.within(budget).gain if budget else 1.0
            raise PlacementError(
                f"keep={share:g} cannot be met within {budget}, which allows {most:.2f} of the predicted gain. Lower "
                "keep or raise the budget."
            )
        return min(found, key=lambda choice: (choice.costs["time"], choice.costs["parameters"]))

    def neighbours(self, choice: Choice) -> list[Choice]:
        """Price half and twice as many units from the same depth upwards."""
        lowest = min(map(_depth, choice.units), default=0)
        pool = [unit for unit in self.units if _depth(unit) >= lowest]
        pick = self.make_picker(pool)
        counts = sorted({max(1, len(choice.units) // 2), min(len(pool), 2 * len(choice.units))})
        return [self.choice(pick(count)) for count in counts if count != len(choice.units)]

    def _pools(self) -> Iterator[list[Submodule]]:
        """Yield the units from each depth upwards."""
        depths = sorted(set(map(_depth, self.units)))
        for depth in depths[:: math.ceil(len(depths) / _MAX_DEPTHS)]:
            yield [unit for unit in self.units if _depth(unit) >= depth]

    def _largest(self, pool: Sequence[Submodule], fits: Callable[[Choice], bool]) -> Choice | None:
        """Find the most units of a pool that fit, by bisection: more units cost more."""
        best, low, high = None, 0, len(pool)
        pick = self.make_picker(pool)
        while low < high:
            middle = (low + high + 1) // 2
            choice = self.choice(pick(middle))
            if fits(choice):
                best, low = choice, middle
            else:
                high = middle - 1
        return best

    def _smallest(self, pool: Sequence[Submodule], is_enough: Callable[[Choice], bool]) -> Choice | None:
        """Find the fewest units of a pool that are enough, by bisection: more units gain more."""
        best, low, high = None, 1, len(pool) + 1
        pick = self.make_picker(pool)
        while low < high:
            middle = (low + high) // 2
            choice = self.choice(pick(middle)) if middle <= len(pool) else None
            if choice is not None and is_enough(choice):
                best, high = choice, middle
            else:
                low = middle + 1
        return best

    def _singles(self) -> list[Choice]:
        """Price single units: all of them, or the deepest and the smallest of very many."""
        units: Sequence[Submodule] = self.units
        if len(units) > _MAX_SINGLES:
            deepest_first = sorted(units, key=_depth, reverse=True)
            smallest_first = sorted(units, key=lambda unit: math.prod(unit.shape or (1,)))
            units = [*deepest_first[: _MAX_SINGLES // 2], *smallest_first[: _MAX_SINGLES // 2]]
        return [self.choice([unit]) for unit in units]

    def _too_small(self, budget: Budget) -> str:
        singles, limits = self._singles(), budget.limits
        least = {name: min(choice.costs[name] for choice in singles) for name in limits}
        impossible = [name for name in limits if least[name] > limits[name]]
        if not impossible:
            fastest = min(singles, key=lambda choice: choice.costs["time"]).costs
            return (
                f"No placement meets all limits of {budget} at once. The fastest single module takes "
                f"{', '.join(format_cost(name, fastest[name]) for name in limits)}. Raise a limit."
            )
        compared = "; ".join(
            f"the smallest placement takes {format_cost(name, least[name])}, the limit is {format_cost(name, limits[name])}"
            for name in impossible
        )
        written = {
            "memory": lambda value: f"'{math.ceil(value / 2**20)}MiB'",
            "time": lambda value: f"'{math.ceil(value * 1000) / 1000:.3f}x'",
            "parameters": lambda value: f"'{value:.0f} parameters'",
            "modules": lambda value: f"'{value:.0f} modules'",
        }
        enough = " and ".join(written[name](least[name]) for name in impossible)
        return f"The budget is too small for any placement: {compared}. Give at least {enough}."


def _depth(unit: Submodule) -> float:
    """Depth of a unit; those outside of blocks count as deepest."""
    return math.inf if unit.depth is None else unit.depth
