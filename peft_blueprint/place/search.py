"""Search for the placement with the largest gain within a budget, with the most gain per cost, or the fastest that retains a
share of the gain.
"""

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
_MAX_EVERYTHING = 4000  # choices priced where the quick searches find none
_GRID = 2**0.25  # between the numbers of units that are tried for the most gain per cost
_MOST_AROUND = 32  # numbers tried around the best of the grid


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
        is_quick: whether to give up where the bisections find nothing, without a search of everything.
    """

    def __init__(
        self,
        units: Sequence[Submodule],
        make_picker: Callable[[Sequence[Submodule]], Picker],
        price: Callable[[Sequence[Submodule]], Mapping[str, float]],
        gain: Callable[[Sequence[Submodule]], float],
        is_quick: bool = False,
    ):
        self.units = tuple(units)
        self.make_picker = make_picker
        self.price = price
        self.gain = gain
        self.whole_gain = gain(self.units) or 1.0
        self.is_quick = is_quick
        self._all: list[Choice] | None = None

    def choice(self, units: Sequence[Submodule]) -> Choice:
        """Price these units."""
        names = {unit.name for unit in units}
        ordered = tuple(unit for unit in self.units if unit.name in names)
        return Choice(ordered, self.price(ordered), self.gain(ordered) / self.whole_gain)

    def within(self, budget: Budget) -> Choice:
        """Return the choice with the largest gain within a budget, among equal gains the fastest.

        Raises:
            PlacementError: if nothing fits, with the smallest budget that works.
        """
        found = self._fitting(lambda choice: not budget.exceeded(choice.costs)) or self._all_within(budget)
        return max(found, key=lambda choice: (choice.gain, -choice.costs["time"]))

    def most_per_cost(self, cost: Callable[[Choice], float], budget: Budget | None = None) -> tuple[Choice, Choice]:
        """Return the choice with the most gain per cost (eq. 8) within a budget, and the one without it.

        Numbers of units are tried on a grid from every depth upwards, then one by one around the best.

        Args:
            cost: of a choice, positive.
            budget: upper limits.

        Raises:
            PlacementError: if nothing fits, with the smallest budget that works.
        """

        def value(choice: Choice) -> float:
            return choice.gain / cost(choice)

        tried = [(pool, choice) for pool in self._pools() for choice in self._grid(pool)]

        def best(fits: Callable[[Choice], bool]) -> Choice | None:
            found = [(pool, choice) for pool, choice in tried if fits(choice)]
            if not found:
                return None
            pool, choice = max(found, key=lambda pair: value(pair[1]))
            near = [near for near in self._around(pool, len(choice.units)) if fits(near)]
            return max((choice, *near), key=value)

        free = best(lambda choice: True)
        assert free is not None
        if budget is None:
            return free, free
        within = best(lambda choice: not budget.exceeded(choice.costs))
        return within or max(self._all_within(budget), key=value), free

    def _all_within(self, budget: Budget) -> list[Choice]:
        """Return every choice that fits.

        Raises:
            PlacementError: if there is none, with the smallest budget that works.
        """
        found = [choice for choice in self._everything() if not budget.exceeded(choice.costs)]
        if not found:
            nearest = _nearest(self._everything(), budget)
            exceeded = budget.exceeded(nearest.costs)
            compared = "; ".join(
                f"the smallest placement takes {format_cost(name, nearest.costs[name])}, the limit is "
                f"{format_cost(name, budget.limits[name])}"
                for name in exceeded
            )
            raise PlacementError(
                f"The budget is too small for any placement: {compared}. Give at least {_written(nearest, exceeded)}."
            )
        return found

    def retaining(self, share: float, budget: Budget | None = None) -> Choice:
        """Return the fastest choice that retains a share of the gain, within a budget if one is given.

        Raises:
            PlacementError: if there is none, with the largest share that the budget allows.
        """

        def is_enough(choice: Choice) -> bool:
            return choice.gain >= share

        def fits(choice: Choice) -> bool:
            return budget is None or not budget.exceeded(choice.costs)

        smallest = [self._smallest(pool, is_enough) for pool in self._pools()]
        found = [choice for choice in smallest if choice is not None and fits(choice)]
        if not found:
            fitting = [choice for choice in (*self._fitting(fits), *self._everything()) if fits(choice)]
            found = [choice for choice in fitting if is_enough(choice)]
        if not found:
            assert budget is not None  # all units together retain everything
            nearest = _nearest([choice for choice in self._everything() if is_enough(choice)], budget)
            most = max((choice.gain for choice in fitting), default=0.0)
            advice = f"Lower keep to {_rounded_down(most)}, or raise the budget" if most else "Raise the budget"
            raise PlacementError(
                f"keep={share:g} cannot be met within {budget}, which allows {most:.1%} of the predicted gain. {advice} to "
                f"at least {_written(nearest, budget.exceeded(nearest.costs))}."
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

    def _fitting(self, fits: Callable[[Choice], bool]) -> list[Choice]:
        """Return the most units that fit for each pool that has any that do."""
        return [choice for pool in self._pools() if (choice := self._largest(pool, fits)) is not None]

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

    def _grid(self, pool: Sequence[Submodule]) -> Iterator[Choice]:
        """Price numbers of units of a pool that grow by a constant factor."""
        pick = self.make_picker(pool)
        steps = math.ceil(math.log(len(pool), _GRID)) + 1
        for count in sorted({min(len(pool), round(_GRID**step)) for step in range(steps)}):
            yield self.choice(pick(count))

    def _around(self, pool: Sequence[Submodule], count: int) -> Iterator[Choice]:
        """Price numbers of units of a pool between the grid's neighbours of one."""
        pick = self.make_picker(pool)
        low, high = max(1, math.floor(count / _GRID)), min(len(pool), math.ceil(count * _GRID))
        for other in range(low, high + 1, math.ceil((high - low + 1) / _MOST_AROUND)):
            if other != count:
                yield self.choice(pick(other))

    def _everything(self) -> list[Choice]:
        """Price every number of units of every pool, and single units.

        Raised ranks and mixed strata break the rule of the bisections that more units cost more and gain more, so what
        they do not find is looked for here.
        """
        if self._all is None:
            if self.is_quick:
                raise PlacementError("Nothing was found by bisection.")
            pools = list(self._pools())
            step = math.ceil(sum(map(len, pools)) / _MAX_EVERYTHING)
            self._all = self._singles()
            for pool in pools:
                pick = self.make_picker(pool)
                self._all += [self.choice(pick(count)) for count in (*range(1, len(pool), step), len(pool))]
        return self._all

    def _singles(self) -> list[Choice]:
        """Price single units: all of them, or the deepest and the smallest of very many."""
        units: Sequence[Submodule] = self.units
        if len(units) > _MAX_SINGLES:
            deepest_first = sorted(units, key=_depth, reverse=True)
            smallest_first = sorted(units, key=lambda unit: math.prod(unit.shape or (1,)))
            units = [*deepest_first[: _MAX_SINGLES // 2], *smallest_first[: _MAX_SINGLES // 2]]
        return [self.choice([unit]) for unit in units]


def _nearest(choices: Sequence[Choice], budget: Budget) -> Choice:
    """Return the choice for which a budget has to be raised least."""
    limits = budget.limits
    return min(choices, key=lambda choice: max(choice.costs[name] / limit for name, limit in limits.items()))


def _written(choice: Choice, limits: Sequence[str]) -> str:
    """Write limits that a choice meets as `Budget` reads them."""
    written = {
        "memory": lambda value: f"'{math.ceil(value / 2**20)}MiB'",
        "time": lambda value: f"'{math.ceil(value * 1000) / 1000:.3f}x'",
        "parameters": lambda value: f"'{value:.0f} parameters'",
        "modules": lambda value: f"'{value:.0f} modules'",
    }
    return " and ".join(written[name](choice.costs[name]) for name in limits)


def _rounded_down(share: float) -> float:
    """Round a share in (0, 1] down to three digits, so that it can be met."""
    scale = 10.0 ** (2 - math.floor(math.log10(share)))
    return math.floor(share * scale) / scale


def _depth(unit: Submodule) -> float:
    """Depth of a unit; those outside of blocks count as deepest."""
    return math.inf if unit.depth is None else unit.depth
