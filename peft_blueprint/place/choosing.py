"""The choice of a placement: entries and blocks with their scores, prices and gains, and a wish to meet.

Brings scores, strata, ranks, costs and the search together. Knows nothing of models or blueprints as wholes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .._text import format_names
from ..blueprint import Submodule
from ..errors import PlacementError
from .blocks import members_by_block, modules_of_blocks
from .budget import Budget
from .cost import CostModel
from .coverage import by_kind, count_of, one_selector, select, spreading
from .gains import REACH, CoverGain, SetGain
from .options import Coverage, RankBy, Ranks
from .ranks import k_star_rank, rank_of_equal_parameters, ranks_by_influence
from .scores import comparable_across_kinds, score
from .search import Choice, Search, Taking


CONTROLS = ("random", "even", "first", "last")  # scores that look at no measurement
FRACTION = 0.2  # of the submodules,
KEEP = 0.95  # of the gain, and
SPARSE = 1 / 7  # of the submodules, about one to a block, where nothing is said


@dataclass(frozen=True)
class Wish:
    """One of: a selector; a budget, a share of the gain to keep, or both; or nothing."""

    selector: Mapping[str, float]
    budget: Budget | None = None
    keep: float | None = None

    @property
    def is_priced(self) -> bool:
        """Whether costs decide."""
        return self.budget is not None or self.keep is not None

    @classmethod
    def of(
        cls, budget: Budget | str | Mapping[str, Any] | None, keep: float | None, selectors: Mapping[str, float | None]
    ) -> Wish:
        """The one wish that these arguments of `plan_placement` express.

        Raises:
            PlacementError: if they express two, or a value is out of range.
        """
        if budget is None and keep is None:
            return cls(one_selector(**selectors))
        if given := [f"{name}={value}" for name, value in selectors.items() if value is not None]:
            wish = f"budget={budget!r}" if budget is not None else f"keep={keep}"
            raise PlacementError(f"{wish} and {' and '.join(given)} both say how much: give one of them.")
        if keep is not None and not 0 < keep <= 1:
            raise PlacementError(f"keep={keep} is not a share: give a number above 0 and at most 1.")
        return cls({}, None if budget is None else Budget.of(budget), keep)

    def or_default(self, knows_costs: bool, is_sparse: bool = False) -> Wish:
        """What is done where nothing was wished for: a seventh of the submodules, if they cover the model with
        all-linear's parameters; else as much as keeps most of the gain at the least cost, or a fifth.
        """
        if self.selector or self.is_priced:
            return self
        if is_sparse:
            return Wish({"fraction": SPARSE})
        return Wish({}, keep=KEEP) if knows_costs else Wish({"fraction": FRACTION})

    def to_dict(self) -> dict[str, float]:
        """What was wished for, by name."""
        keep = {} if self.keep is None else {"keep": self.keep}
        return {**self.selector, **keep, **({} if self.budget is None else self.budget.limits)}


class Choosing:
    """Chooses adapters and blocks among entries.

    Args:
        entries: that can be adapted, in the model's order.
        rank_by: a score; or "cover_gain" or "set_gain", which choose greedily and cover by themselves.
        per_cost: whether it is taken over an adapter's step time.
        coverage: what to spread over.
        ranks: uniform, raised to the parameters of adapters on all entries, or by influence.
        rank: uniform, or of adapters on all entries, or the mean.
        costs: None where nothing is known of them.
        seed: of random scores.
        reach: of `CoverGain`.
    """

    def __init__(
        self,
        entries: Sequence[Submodule],
        rank_by: RankBy,
        per_cost: bool,
        coverage: Coverage,
        ranks: Ranks,
        rank: int,
        costs: CostModel | None,
        seed: int,
        reach: float = REACH,
    ):
        self.entries = entries
        self.rank_by = rank_by
        self.coverage = coverage
        self.ranks = ranks
        self.rank = rank
        self.own_rank = rank  # of adapters, where it is lower than that of the all-linear LoRA they are compared with
        self.costs = costs
        self.is_gain_known = all(entry.adam_gain is not None for entry in entries)
        self.gains = [entry.adam_gain or 0.0 for entry in entries] if self.is_gain_known else [1.0] * len(entries)
        self.reach = reach
        self.cover = CoverGain(entries, self.gains if any(self.gains) else [1.0] * len(entries), reach)
        self.alternatives: list[Choice] = []  # to the adapters that were chosen last
        self.members = members_by_block(entries)
        self.prices = [costs.adapter_cost(e.name, rank) for e in entries] if per_cost and costs is not None else None
        self.is_greedy = rank_by in ("cover_gain", "set_gain")
        self.is_comparable = self.is_greedy or comparable_across_kinds(rank_by)
        if self.is_greedy:
            gain = self._set_of(entries)
            values: Sequence[float] = [gain.of([i]) for i in range(len(entries))]
        else:
            values = score(entries, rank_by, seed=seed, costs=self.prices).tolist()
        self.scores = dict(zip((entry.name for entry in entries), values, strict=True))

    def adapters(self, wish: Wish, unfrozen: Sequence[str]) -> Choice:
        """Entries to put an adapter on, outside the modules that are unfrozen.

        Raises:
            PlacementError: if there is none, or the wish cannot be met.
        """
        free = [e for e in self.entries if not any(e.name == u or e.name.startswith(u + ".") for u in unfrozen)]
        if not free:
            raise PlacementError(
                f"Unfreezing {format_names(unfrozen)} leaves no submodule for LoRA. Unfreeze fewer blocks."
            )
        spread = self._greedily if self.is_greedy else self._spreading(self.scores)
        search = Search(free, spread, lambda units: self.price(units, unfrozen), self.gain_of)
        choice = self._chosen(search, wish, self.scores)
        if self.costs is not None:
            self.alternatives = search.neighbours(choice)
        return choice

    def blocks(self, wish: Wish) -> Choice:
        """Blocks to unfreeze; a block's score is its members' together: norms add in squares, gains as they are. Controls
        do not add up: a block has its first member's.

        Raises:
            PlacementError: if the wish cannot be met.
        """
        power = 2 if self.rank_by.endswith("norm") else 1
        counted = 1 if self.rank_by in CONTROLS else None
        scores = {
            block: sum(self.scores[entry.name] ** power for entry in members[:counted]) ** (1 / power)
            for block, members in self.members.items()
        }
        units = [
            replace(members[0], name=block, kind=block.rpartition(".")[0] or members[0].kind, shape=None)
            for block, members in self.members.items()
        ]
        search = Search(
            units,
            self._spreading(scores),
            lambda units: self.price((), self.modules_of(units)),
            lambda units: self.gain_of([entry for unit in units for entry in self.members[unit.name]]),
        )
        return self._chosen(search, wish, scores)

    def modules_of(self, blocks: Sequence[Submodule]) -> tuple[str, ...]:
        """What is trained whole for blocks."""
        modules = modules_of_blocks(self.members)
        return tuple(name for block in blocks for name in modules[block.name])

    def ranks_of(self, units: Sequence[Submodule]) -> dict[str, int]:
        """Every adapter's rank."""
        if self.ranks != "influence" or not units:
            return dict.fromkeys((unit.name for unit in units), self.rank_of(units))
        scale = dict.fromkeys((unit.kind for unit in units), 1.0)
        if not self.is_comparable:
            scale |= {
                kind: sum(self.scores[e.name] for e in members) / len(members) or 1.0
                for kind, members in by_kind(self.entries).items()
            }
        return ranks_by_influence(units, {u.name: self.scores[u.name] / scale[u.kind] for u in units}, self.rank)

    def rank_of(self, units: Sequence[Submodule]) -> int:
        """The rank of all adapters, or their mean."""
        is_raised = self.ranks == "equal_parameters"
        return rank_of_equal_parameters(units, self.entries, self.rank) if is_raised else self.own_rank

    def lower_ranks(self, wish: Wish) -> None:
        """Take the highest of rank, rank / 2, … 1 at which a budget still keeps enough of the gain, or as much as at 1.

        Many adapters of a low rank end lower than few of a high one (RESULTS.md, the contest of placements).

        Raises:
            PlacementError: if nothing meets the budget.
        """
        kept: dict[int, float] = {}
        self.own_rank = 2 * self.rank
        while self.own_rank > 1:
            self.own_rank //= 2
            try:
                kept[self.own_rank] = self.adapters(wish, ()).gain or 0.0
            except PlacementError:
                if self.own_rank == 1:
                    raise
        enough = min(kept[1], max(KEEP, wish.keep or 0.0)) - 1e-9
        self.own_rank = next(rank for rank, gain in kept.items() if gain >= enough)

    def price(self, adapters: Sequence[Submodule], unfrozen: Sequence[str]) -> dict[str, float]:
        """What such a placement costs, by name, as far as it is known."""
        modules = len(adapters) + len(unfrozen)
        if self.costs is None:
            return {"modules": modules}
        cost = self.costs.cost(self.ranks_of(adapters), unfrozen)
        return {
            "modules": modules,
            "time": self.costs.time_ratio(cost),
            "parameters": cost.trainable,
            **({} if cost.lowest is None else {"lowest": cost.lowest}),
            **({"memory": cost.bytes} if self.costs.structure.is_whole else {}),
        }

    def gain_of(self, units: Sequence[Submodule]) -> float:
        """Predicted gain of adapters on these, as a share of that of all entries."""
        return self.cover.of([unit.name for unit in units])

    def learning_rate_scale(self, units: Sequence[Submodule]) -> float | None:
        """Factor on the learning rate that suits LoRA on every entry; None where nothing predicts it.

        The root of the factor that would keep the first step's predicted decrease of the loss, where Adam's gain in an
        adapter is its rank times `adam_gain` times the scaling alpha / r, which is the same for all. The root is what
        sweeps say (RESULTS.md): the whole factor, 40 for 2 % of the parameters, is far too high.
        """
        ranks = self.ranks_of(units)
        first_step = math.fsum(ranks[unit.name] * (unit.adam_gain or 0.0) for unit in units)
        if not self.is_gain_known or not first_step:
            return None
        return math.sqrt(self.rank * math.fsum(self.gains) / first_step)

    def facts(self, entry: Submodule) -> dict[str, Any]:
        """Of an entry that gets an adapter: why, and the rank that the paper's k* asks for."""
        k_star = k_star_rank(entry)
        own = {"kind": entry.kind, "depth": entry.depth, "score": self.scores[entry.name]}
        return own if k_star is None else {**own, "k_star_rank": k_star}

    def _chosen(self, search: Search, wish: Wish, scores: Mapping[str, float]) -> Choice:
        if wish.keep is not None:
            return search.keeping(wish.keep, wish.budget)
        if wish.budget is not None:
            return search.within(wish.budget)
        if self.is_greedy and (count := count_of(wish.selector, len(search.units))) is not None:
            return search.choice(self._greedily(search.units)(count))
        return search.choice(
            select(
                search.units,
                wish.selector,
                None if self.rank_by == "even" else scores,
                self.coverage,
                is_comparable=self.is_comparable,
                rank_by=self.rank_by,
            )
        )

    def _spreading(self, scores: Mapping[str, float]) -> Callable[[Sequence[Submodule]], Taking]:
        score_of = None if self.rank_by == "even" else lambda unit: scores[unit.name]
        return lambda pool: spreading(pool, score_of, self.coverage, self.is_comparable)

    def _greedily(self, pool: Sequence[Submodule]) -> Taking:
        """The choice that adds most at every step, which covers by itself."""
        places = {entry.name: i for i, entry in enumerate(self.entries)}
        prices = None if self.prices is None else [self.prices[places[unit.name]] for unit in pool]
        order = [pool[i] for i in self._set_of(pool).greedy(costs=prices)]
        return lambda count: order[:count]

    def _set_of(self, pool: Sequence[Submodule]) -> CoverGain | SetGain:
        if self.rank_by == "set_gain":
            return SetGain(pool)
        names = {entry.name: gain for entry, gain in zip(self.entries, self.gains, strict=True)}
        return CoverGain(pool, [names[unit.name] for unit in pool], self.reach)
