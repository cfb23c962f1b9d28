"""Solve for a placement: score submodules or blocks, price them, and choose those that meet a selector."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from os.path import commonprefix
from typing import Any

from .._text import format_names, is_inside
from ..blueprint import Blueprint, Submodule, k_star_of, parameter_share, split_expert
from ..errors import PlacementError
from .budget import Budget
from .cost import CostModel
from .coverage import Picker, by_kind, count_of, fused_groups, make_picker, nucleus
from .gains import REACH, CoverGain, SetGain
from .options import DEFAULT_RANK, K_STAR, Best, PlacementOptions
from .ranks import k_star_rank, ranks_by_score, ranks_of_equal_parameters, uniform_ranks
from .scores import CONTROLS, comparable_across_kinds, score
from .search import Choice, Search


DEFAULT_FRACTION = 0.2
DEFAULT_SPARSE_FRACTION = 1 / 7  # about one submodule to a block
DEFAULT_KEEP = 0.95
_LARGEST_SCALE = 1000.0  # of the learning rate; beyond it the adapters hold nothing of the gain


@dataclass(frozen=True)
class Selector:
    """How much to place: a size, or limits on cost and gain.

    Args:
        size: one of `fraction`, `k_star`, `num_modules`, `top_p` and `threshold` with its value; empty if limits decide.
        budget: upper limits on costs.
        keep: share of the predicted gain to retain.
        best: ratio to maximize within the budget.
        overhead: cost beside the training steps, as a share of training all.
    """

    size: Mapping[str, float] = field(default_factory=dict)
    budget: Budget | None = None
    keep: float | None = None
    best: Best | None = None
    overhead: float = 0.0

    @classmethod
    def of(cls, options: PlacementOptions, blueprint: Blueprint | None) -> Selector:
        """Return the selector that options ask for; empty if they leave it to the default.

        Raises:
            PlacementError: if they ask for the k* of a blueprint that is not given.
        """
        size = options.selector
        if size.get("fraction") == K_STAR:
            if blueprint is None:
                raise PlacementError(
                    "fraction='k_star' needs a blueprint, which has k*. Give one, or a number in (0, 1]."
                )
            size = {K_STAR: k_star_of(blueprint)}
        budget = None if options.budget is None else Budget.of(options.budget)
        return cls(size, budget, options.keep, options.best, options.overhead)

    @property
    def needs_costs(self) -> bool:
        """Whether costs decide."""
        return self.budget is not None or self.keep is not None or self.best is not None

    @property
    def needs_memory(self) -> bool:
        """Whether the memory at the peak of a step decides."""
        return self.best == "gain_per_gb_hour" or self.budget is not None and self.budget.memory is not None

    def cost(self, choice: Choice, whole: Choice) -> float:
        """Return the cost of training a choice, with the overhead, in the unit of its step time or of that times memory."""
        time = choice.costs["time"] + self.overhead * whole.costs["time"]
        return time * choice.costs["memory"] if self.best == "gain_per_gb_hour" else time

    def or_default(self, *, has_costs: bool, is_sparse: bool = False) -> Selector:
        """Fill in the default size where nothing was asked for.

        Args:
            has_costs: whether step times are known, so that a share of the gain can be kept at the lowest cost.
            is_sparse: whether few adapters cover the model with as many parameters as all-linear LoRA.
        """
        if self.size or self.needs_costs:
            return self
        if is_sparse:
            return Selector({"fraction": DEFAULT_SPARSE_FRACTION})
        return Selector(keep=DEFAULT_KEEP) if has_costs else Selector({"fraction": DEFAULT_FRACTION})

    def to_dict(self) -> dict[str, float | str]:
        """Return size, `keep`, `best` and limits by name."""
        given = {"keep": self.keep, "best": self.best, "overhead": self.overhead or None}
        wishes = {name: value for name, value in given.items() if value is not None}
        return {**self.size, **wishes, **({} if self.budget is None else self.budget.limits)}


class PlacementSolver:
    """Choose adapters and blocks among the entries of a blueprint.

    Args:
        entries: submodules that can be adapted, in the model's order.
        options: their selector is ignored; `rank_by` must be given, `ranks` defaults to "uniform" and `r` to 16.
        costs: None where they are not known.
        reach: of `CoverGain`.

    Example:
        >>> from peft_blueprint import Submodule
        >>> entries = [Submodule(f"{i}.q", 1.0, kind="q", depth=i, adam_gain=1.0 + i) for i in range(4)]
        >>> solver = PlacementSolver(entries, PlacementOptions(rank_by="adam_gain", coverage="none"))
        >>> [unit.name for unit in solver.adapters(Selector({"num_modules": 2})).units]
        ['2.q', '3.q']
    """

    def __init__(
        self,
        entries: Sequence[Submodule],
        options: PlacementOptions,
        costs: CostModel | None = None,
        reach: float = REACH,
    ):
        if options.rank_by is None:
            raise PlacementError("rank_by must be given to a PlacementSolver; plan_placement has a default.")
        self.entries = entries
        self.rank_by = options.rank_by
        self.coverage = options.coverage
        self.is_fused = options.fused
        self.ranks = options.ranks or "uniform"
        self.reference_rank = options.r or DEFAULT_RANK  # of the all-linear LoRA that adapters are compared with
        self.rank = self.reference_rank  # of adapters, before ranks are raised
        self.costs = costs
        self.is_gain_known = all(entry.adam_gain is not None for entry in entries)
        self.gains = [entry.adam_gain or 0.0 for entry in entries] if self.is_gain_known else [1.0] * len(entries)
        self.reach = reach
        self.cover = CoverGain(entries, self.gains if any(self.gains) else [1.0] * len(entries), reach)
        self.experts: tuple[Submodule, ...] = ()  # weights of single experts, adapted beside the entries
        self.alternatives: list[Choice] = []  # to the adapters that were chosen last
        self.notes: list[str] = []  # on how they were chosen, in words
        self.ratio: float | None = None  # their gain per cost over that of all units
        self.members: dict[str, list[Submodule]] = _members_by_block(entries)
        self._groups: dict[str, list[Submodule]] = {}  # entries placed together, by the name of the first
        self.is_greedy = self.rank_by in ("cover_gain", "set_gain")
        self.is_comparable = self.is_greedy or comparable_across_kinds(self.rank_by)
        self._times: list[float] | None = None  # step time of an adapter on each entry, to divide scores by
        if (options.per_cost or options.best is not None) and costs is not None:
            self._times = [costs.adapter_cost(entry.name, self.reference_rank) for entry in entries]
        if self.is_greedy:
            gain = self._gain_over(entries)
            values: Sequence[float] = [gain.of([i]) for i in range(len(entries))]
        else:
            values = score(entries, self.rank_by, seed=options.seed, costs=self._times).tolist()
        self.scores = dict(zip((entry.name for entry in entries), values, strict=True))

    def adapters(self, selector: Selector, unfrozen: Sequence[str] = (), is_quick: bool = False) -> Choice:
        """Choose entries to put an adapter on, outside of unfrozen modules; `is_quick` as in `Search`.

        Raises:
            PlacementError: if there is none, or the selector cannot be met.
        """
        free = [e for e in self.entries if not any(is_inside(e.name, u) for u in unfrozen)]
        if not free:
            raise PlacementError(
                f"Unfreezing {format_names(unfrozen)} leaves no submodule for LoRA. Unfreeze fewer blocks."
            )
        units, scores = self._united(free)
        search = Search(
            units,
            self._greedy_picker if self.is_greedy else self._covering_picker(scores),
            lambda units: self.price(self._entries_of(units), unfrozen),
            lambda units: self.gain_of(self._entries_of(units)),
            is_quick,
        )
        choice = self._choose(search, selector, scores, [len(self._entries_of([unit])) for unit in units])
        if self.costs is not None:
            self.alternatives = search.neighbours(choice)
            self._compare(search, selector, choice)
        return replace(choice, units=tuple(self._entries_of(choice.units)))

    def _united(self, free: Sequence[Submodule]) -> tuple[Sequence[Submodule], Mapping[str, float]]:
        """Return the units of choice with scores, each named as its first entry: entries, or groups of fused ones."""
        if not self.is_fused:
            return free, self.scores
        self._groups = {group[0].name: group for group in fused_groups(free)}
        scores = {
            name: self._combined([self.scores[entry.name] for entry in group]) for name, group in self._groups.items()
        }
        return [group[0] for group in self._groups.values()], scores

    def _combined(self, scores: Sequence[float]) -> float:
        """Return the score of entries together: the root of summed squares for norms, the first for controls."""
        if self.rank_by in CONTROLS:
            return scores[0]
        return math.hypot(*scores) if self.rank_by.endswith("norm") or self.rank_by == "influence" else sum(scores)

    def blocks(self, selector: Selector) -> Choice:
        """Choose blocks to unfreeze.

        Raises:
            PlacementError: if the selector cannot be met.
        """
        scores = {
            block: self._combined([self.scores[entry.name] for entry in members])
            for block, members in self.members.items()
        }
        units = [
            replace(members[0], name=block, kind=block.rpartition(".")[0] or members[0].kind, shape=None)
            for block, members in self.members.items()
        ]
        search = Search(
            units,
            self._covering_picker(scores),
            lambda units: self.price((), self.modules_of(units)),
            lambda units: self.gain_of(self._entries_of(units)),
        )
        choice = self._choose(search, selector, scores)
        if self.costs is not None:
            self._compare(search, selector, choice)
        return choice

    def modules_of(self, blocks: Sequence[Submodule]) -> tuple[str, ...]:
        """Return the full names of the modules to unfreeze for blocks."""
        modules = _modules_of_blocks(self.members)
        return tuple(name for block in blocks for name in modules[block.name])

    def ranks_of(self, units: Sequence[Submodule]) -> dict[str, int]:
        """Return the rank of each adapter by name."""
        if self.ranks == "equal_parameters":
            return ranks_of_equal_parameters(units, self.entries, self.reference_rank)
        if self.ranks == "uniform":
            return uniform_ranks(units, self.rank)
        scale = dict.fromkeys((unit.kind for unit in units), 1.0)
        if not self.is_comparable:
            scale |= {
                kind: sum(self.scores[e.name] for e in members) / len(members) or 1.0
                for kind, members in by_kind(self.entries).items()
            }
        scores = {unit.name: self.scores[unit.name] / scale[unit.kind] for unit in units}
        return ranks_by_score(units, scores, self.reference_rank)

    def rank_of(self, units: Sequence[Submodule]) -> int:
        """Return the rank of all adapters: the largest, where full ranks are lower; their mean with ranks="score"."""
        return self.rank if self.ranks == "score" else max(self.ranks_of(units).values(), default=self.rank)

    def lower_rank(self, selector: Selector) -> None:
        """Take the highest of r, r / 2, … 1 at which a budget retains enough of the gain, or as much as at rank 1.

        Many adapters of a low rank end with a lower loss than few of a high one (RESULTS.md, the study of placements).

        Raises:
            PlacementError: if nothing meets the budget.
        """
        retained: dict[int, float] = {}
        self.rank = 2 * self.reference_rank
        while self.rank > 1:
            self.rank //= 2
            try:
                retained[self.rank] = self.adapters(selector, is_quick=self.rank > 1).gain
            except PlacementError:
                if self.rank == 1:
                    raise
        enough = min(retained[1], max(DEFAULT_KEEP, selector.keep or 0.0)) - 1e-9
        self.rank = next(rank for rank, gain in retained.items() if gain >= enough)

    def price(self, adapters: Sequence[Submodule], unfrozen: Sequence[str]) -> dict[str, float]:
        """Return the costs of such a placement by name, as far as they are known."""
        modules = len(adapters) + len(self.experts) + len(unfrozen)
        if self.costs is None:
            return {"modules": modules}
        cost = self.costs.cost(self.ranks_of(adapters) | self.expert_ranks(), unfrozen)
        return {
            "modules": modules,
            "time": self.costs.time_ratio(cost),
            "parameters": cost.trainable,
            "optimizer_state": cost.states,
            **({} if cost.lowest is None else {"lowest": cost.lowest}),
            **({"memory": cost.bytes} if self.costs.structure.is_whole else {}),
        }

    def expert_ranks(self) -> dict[str, int]:
        """Return the rank of each adapter on a single expert by name."""
        return uniform_ranks(self.experts, self.rank)

    def add_experts(self, adapters: Choice, selector: Selector, ranked: Sequence[Sequence[Submodule]]) -> Choice:
        """Add as many experts to adapters as a budget allows; choose fewer adapters if it does not allow even these.

        Raises:
            PlacementError: if nothing meets the budget.
        """
        assert selector.budget is not None
        low, high = 0, len(ranked)
        if adapters.units and selector.budget.exceeded(adapters.costs):
            return self.adapters(selector)
        while low < high:
            middle = (low + high + 1) // 2
            self.experts = tuple(entry for weights in ranked[:middle] for entry in weights)
            low, high = (
                (low, middle - 1) if selector.budget.exceeded(self.price(adapters.units, ())) else (middle, high)
            )
        self.experts = tuple(entry for weights in ranked[:low] for entry in weights)
        self.alternatives = []
        costs = self.price(adapters.units, ())
        if not (adapters.units or self.experts):
            raise PlacementError(f"The budget {selector.budget} is too small for an adapter on one expert. Raise it.")
        return Choice(adapters.units, costs, adapters.gain or self.gain_of(self.experts))

    def shares(
        self, adapters: Sequence[Submodule], unfrozen: Sequence[str], entries: Sequence[Submodule]
    ) -> dict[str, float]:
        """Return the shares of all entries that a placement reaches and trains, as in `Placement.shares`."""
        names = {entry.name for entry in (*adapters, *self.experts)}
        reached = [e for e in entries if e.name in names or any(is_inside(e.name, u) for u in unfrozen)]
        found = {"submodules": len(reached) / len(entries)}
        if (parameters := parameter_share(reached, entries)) is not None:
            found["parameters"] = parameters
        if self.costs is not None and self.costs.structure.is_whole:
            trainable = self.costs.cost(self.ranks_of(adapters) | self.expert_ranks(), unfrozen).trainable
            found["trainable"] = trainable / self.costs.full().trainable
        return found

    def gain_of(self, units: Sequence[Submodule]) -> float:
        """Return the predicted gain of adapters on these, as a share of that of all entries."""
        return self.cover.of([unit.name for unit in units])

    def learning_rate_scale(self, units: Sequence[Submodule]) -> float | None:
        """Return the factor on the learning rate that suits LoRA on every entry; None where nothing predicts it.

        The factor that keeps the first step's predicted decrease of the loss is the ratio of summed gains, where Adam's
        gain in an adapter is its rank times `adam_gain` times the scaling alpha / r, which all adapters share. Sweeps
        (RESULTS.md) found the square root of that ratio best; the whole ratio, 40 for 2 % of the parameters, is far too
        high.
        """
        ranks = self.ranks_of(units)
        largest = max(self.gains, default=0.0)
        if not self.is_gain_known or not largest:
            return None
        first_step = math.fsum(ranks[unit.name] * ((unit.adam_gain or 0.0) / largest) for unit in units)
        whole = self.reference_rank * math.fsum(gain / largest for gain in self.gains)
        scale = math.sqrt(whole / first_step) if first_step else math.inf
        return scale if scale <= _LARGEST_SCALE else None

    def details_of(self, entry: Submodule) -> dict[str, Any]:
        """Return kind, depth, score and, if the blueprint has k*, the rank that it asks for."""
        k_star = k_star_rank(entry)
        own = {"kind": entry.kind, "depth": entry.depth, "score": self.scores.get(entry.name)}
        return own if k_star is None else {**own, "k_star_rank": k_star}

    def _choose(
        self, search: Search, selector: Selector, scores: Mapping[str, float], sizes: Sequence[int] | None = None
    ) -> Choice:
        """Choose units by a selector; `sizes` says how many submodules each counts as, 1 by default."""
        if selector.keep is not None:
            return search.retaining(selector.keep, selector.budget)
        if selector.best is not None:
            return self._most_per_cost(search, selector)
        if selector.budget is not None:
            return search.within(selector.budget)
        if K_STAR in selector.size:
            return search.choice(self._nearest_share(search, selector.size[K_STAR]))
        count = count_of(selector.size, len(search.units) if sizes is None else sum(sizes))
        if count is not None:
            pick = search.make_picker(search.units)
            if sizes is None or sum(sizes) == len(sizes):
                return search.choice(pick(count))
            size_of = {unit.name: size for unit, size in zip(search.units, sizes, strict=True)}
            picks = [pick(number) for number in range(1, len(sizes) + 1)]
            fitting = [picked for picked in picks if sum(size_of[unit.name] for unit in picked) <= count]
            return search.choice(max(fitting or picks[:1], key=lambda picked: sum(size_of[u.name] for u in picked)))
        [(name, value)] = selector.size.items()
        if name == "top_p":
            return search.choice(nucleus(search.units, value, lambda unit: scores[unit.name], self.coverage))
        units = [unit for unit in search.units if scores[unit.name] >= value]
        if not units:
            largest = max(scores.values())
            raise PlacementError(f"No {self.rank_by} reaches threshold={value}; the largest is {largest:.4g}.")
        return search.choice(units)

    def _most_per_cost(self, search: Search, selector: Selector) -> Choice:
        """Maximize eq. 8, and say where its maximum is not in the interior, or the budget keeps from it."""
        whole = search.choice(search.units)
        cost = partial(selector.cost, whole=whole)
        choice, free = search.most_per_cost(cost, selector.budget)
        if len(free.units) == len(search.units):
            self.notes.append(
                f"Gain per cost rises up to all {len(search.units)}: it has no interior optimum (eq. 16)"
                + (", so all are chosen." if choice is free else ", so the most per cost within the budget is chosen.")
            )
        elif len(free.units) == 1:
            self.notes.append("Gain per cost falls from the first on: it has no interior optimum, so one is chosen.")
        elif choice is not free:
            lost = 1 - choice.gain / cost(choice) / (free.gain / cost(free))
            self.notes.append(
                f"Without the budget, {len(free.units)} would give the most gain per cost; this choice gives "
                f"{100 * lost:.2g} % less."
            )
        return choice

    def _compare(self, search: Search, selector: Selector, choice: Choice) -> None:
        """Compare a choice's gain per cost with that of all units."""
        whole = search.choice(search.units)
        self.ratio = choice.gain / selector.cost(choice, whole) * selector.cost(whole, whole) / whole.gain

    def _nearest_share(self, search: Search, share: float) -> Sequence[Submodule]:
        """Return as many units as come nearest to a share of the parameters; of the units where shapes are unknown."""
        pick, most = search.make_picker(search.units), len(search.units)
        has_sizes = parameter_share((), self.entries) is not None

        def held(count: int) -> float:
            part = self._entries_of(pick(count)) if has_sizes else ()
            return parameter_share(part, self._entries_of(search.units)) or 0.0 if has_sizes else count / most

        enough = (
            bisect_left(range(1, most), share, key=held) + 1
        )  # picks need not be nested, so this is one of several
        count = min((max(1, enough - 1), enough), key=lambda count: abs(held(count) - share))
        if count == most:
            self.notes.append(f"k* is {100 * share:.3g} % of the parameters, so all {most} are chosen.")
        return pick(count)

    def _entries_of(self, units: Sequence[Submodule]) -> list[Submodule]:
        """Return the entries of units: themselves, or the members of groups and blocks."""
        return [
            entry for unit in units for entry in self._groups.get(unit.name) or self.members.get(unit.name, [unit])
        ]

    def _covering_picker(self, scores: Mapping[str, float]) -> Callable[[Sequence[Submodule]], Picker]:
        score_of = None if self.rank_by == "even" else lambda unit: scores[unit.name]
        return lambda pool: make_picker(pool, score_of, self.coverage, self.is_comparable)

    def _greedy_picker(self, pool: Sequence[Submodule]) -> Picker:
        """Pick the unit that adds the most gain at every step, which covers the model by itself."""
        if self._groups:
            return self._greedy_groups(pool)
        times = None
        if self._times is not None:
            of_name = dict(zip((entry.name for entry in self.entries), self._times, strict=True))
            times = [of_name[unit.name] for unit in pool]
        order = [pool[i] for i in self._gain_over(pool).greedy(costs=times)]
        return lambda count: order[:count]

    def _greedy_groups(self, pool: Sequence[Submodule]) -> Picker:
        """Pick the group that adds the most gain for each adapter, or for its step time, at every step.

        A gain that was computed for fewer groups is an upper bound (Minoux 1978, doi:10.1007/BFb0006528), so few are
        computed again at a step; for `SetGain`, which is not submodular, the order is approximate.
        """
        gain = self._gain_over(self._entries_of(pool))
        time_of = dict(zip((e.name for e in self.entries), self._times or [1.0] * len(self.entries), strict=True))
        names = [[entry.name for entry in self._entries_of([unit])] for unit in pool]
        costs = [math.fsum(time_of[name] for name in group) for group in names]
        bounds = [(-gain.of(group) / cost, i) for i, (group, cost) in enumerate(zip(names, costs, strict=True))]
        heapq.heapify(bounds)
        order: list[Submodule] = []
        taken: list[str] = []
        held = 0.0
        while bounds:
            _, i = heapq.heappop(bounds)
            added = gain.of([*taken, *names[i]]) - held
            if bounds and added / costs[i] < -bounds[0][0] * (1 - 1e-9):
                heapq.heappush(bounds, (-added / costs[i], i))
                continue
            order.append(pool[i])
            taken += names[i]
            held += added
        return lambda count: order[:count]

    def _gain_over(self, pool: Sequence[Submodule]) -> CoverGain | SetGain:
        if self.rank_by == "set_gain":
            return SetGain(pool)
        of_name = {entry.name: gain for entry, gain in zip(self.entries, self.gains, strict=True)}
        return CoverGain(pool, [of_name[unit.name] for unit in pool], self.reach)


def _members_by_block(entries: Sequence[Submodule]) -> dict[str, list[Submodule]]:
    """Group entries by their attention or feed-forward block; an entry in none is a block of its own."""
    members: defaultdict[str, list[Submodule]] = defaultdict(list)
    for entry in entries:
        members[entry.group or entry.name].append(entry)
    return dict(members)


def _modules_of_blocks(members: Mapping[str, Sequence[Submodule]]) -> dict[str, tuple[str, ...]]:
    """Return the modules to unfreeze for each block: the one that holds just its members, otherwise the members."""
    owner = {_module_of(entry): block for block, entries in members.items() for entry in entries}
    holders = {
        block: _innermost_holder([_module_of(entry) for entry in entries]) for block, entries in members.items()
    }
    blocks_under: defaultdict[str, set[str]] = defaultdict(set)
    wanted = set(holders.values())
    for module, block in owner.items():
        parts = module.split(".")
        for end in range(1, len(parts)):
            if (prefix := ".".join(parts[:end])) in wanted:
                blocks_under[prefix].add(block)
    modules = {}
    for block, entries in members.items():
        own = tuple(dict.fromkeys(_module_of(entry) for entry in entries))
        holder = holders[block]
        modules[block] = (holder,) if len(own) > 1 and holder and blocks_under[holder] == {block} else own
    return modules


def _innermost_holder(modules: Sequence[str]) -> str:
    """Return the innermost module that holds these and can be unfrozen; "" if there is none."""
    holder = commonprefix([name + "." for name in modules]).rpartition(".")[0]
    if any(name[len(holder) + 1 :].split(".")[0].isdigit() for name in modules):  # a ModuleList cannot be unfrozen
        holder = holder.rpartition(".")[0]
    return holder


def _module_of(entry: Submodule) -> str:
    """Return the module that is unfrozen for an entry; fused experts are a parameter of theirs."""
    expert = split_expert(entry.name) if entry.form == "expert" else None
    if expert is not None:
        return expert.container
    return entry.name.rpartition(".")[0] if entry.form == "experts" else entry.name
