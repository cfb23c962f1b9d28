"""The arms: what each rule adapts, at which ranks and with what start, within so many trainable parameters.

Knows what can be chosen from. Knows nothing of training.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from peft_blueprint.blueprint import Submodule, norm_of
from peft_blueprint.place import CONTROLS, Choosing, Cost, Wish, rank_of_equal_parameters, spreading

from .ground import Charge, Ground


Taking = Callable[[int], Sequence[Submodule]]

RAISED = 4  # times fewer adapters, in arms whose ranks are raised
NEARLY = 0.95  # of a budget, below which ranks are raised
TOP_BLOCKS = 2
ONE_RANK = ("eva", "adalora")  # starts that give all adapters the same
STEEPEST = 4.0  # most that a submodule's learning rate is raised or lowered
GRADIENT = "gradient x "  # start along the gradient, of so many examples
AHEAD = 8.0  # LoRA+: B's learning rate over A's (Hayou et al. 2024, arXiv:2402.12354)


class Infeasible(Exception):
    """An arm that cannot be had within a budget."""


@dataclass(frozen=True)
class Choice:
    """What is trained, and how it begins.

    Args:
        ranks: of adapters, by submodule.
        whole: names of modules that are trained whole.
        start: "lora", "eva", "lora_ga", "directions", "gradient x 64" or "adalora".
        factors: on the learning rate, by submodule; 1 for others.
        ahead: further factor on that of every B.
        scale: of the learning rate that suits all-linear LoRA, as far as Adam's gain predicts it.
        charges: what had to be measured: "blueprint", "weights", "eva", "lora_ga", "directions", "gradient x 64".
    """

    ranks: Mapping[str, int] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    start: str = "lora"
    factors: Mapping[str, float] = field(default_factory=dict)
    ahead: float = 1.0
    scale: float = 1.0
    charges: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def cost_of(ground: Ground, choice: Choice) -> Cost:
    """Of a training step."""
    return ground.costs.cost(dict(choice.ranks), choice.whole)


def charge_of(ground: Ground, choice: Choice, blueprint: str) -> Charge:
    """What was spent before training. EVA's and LoRA-GA's starts are counted as one look at the measured examples."""
    rows, spent = ground.data.measured, Charge()
    for what in choice.charges:
        if what.startswith(GRADIENT):
            spent += ground.passes(rows[: int(what.removeprefix(GRADIENT))], forward=1, backward=1)
            continue
        spent += {
            "blueprint": lambda: ground.charge(blueprint),
            "weights": lambda: ground.of_weights,
            "eva": lambda: ground.passes(rows, forward=1),
            "lora_ga": lambda: ground.passes(rows, forward=1, backward=1, weights=1),
            "directions": lambda: ground.passes(rows, forward=1, backward=1, weights=1),
        }[what]()
    return spent


# ---- how much


def width(entry: Submodule) -> int:
    """Parameters of an adapter of rank 1."""
    assert entry.shape is not None
    *experts, d_out, d_in = entry.shape
    return math.prod(experts) * (d_out + d_in)


def largest(take: Taking, count: int, limit: float, size: Callable[[Sequence[Submodule]], float]) -> list[Submodule]:
    """The most that a rule takes within a limit: by bisection, and one by one from there, since sizes differ.

    Raises:
        Infeasible: if already one is too large.
    """
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(take(middle)) <= limit else (low, middle - 1)
    best = max((n for n in range(max(1, low), min(count, low + 8) + 1) if size(take(n)) <= limit), default=0)
    if not best:
        raise Infeasible(f"the smallest choice has {size(take(1)):,.0f} parameters, and {limit:,.0f} are allowed")
    return list(take(best))


def filled(chosen: Sequence[Submodule], limit: float) -> dict[str, int]:
    """As nearly one rank for all of these as fills a limit: the largest that fits, and one more on as many as fit.

    Raises:
        Infeasible: if rank 1 is too much.
    """
    whole = sum(map(width, chosen))
    rank = math.floor(limit / whole) if whole else 0
    if rank < 1:
        raise Infeasible(f"rank 1 on {len(chosen)} submodules has {whole:,} parameters, and {limit:,.0f} are allowed")
    ranks = dict.fromkeys((entry.name for entry in chosen), rank)
    left = limit - rank * whole
    for entry in random.Random(0).sample(list(chosen), len(chosen)):
        if width(entry) <= left:
            ranks[entry.name] += 1
            left -= width(entry)
    return ranks


def with_scale(ground: Ground, choice: Choice) -> Choice:
    """With the learning rate that the same first step as all-linear LoRA's asks for."""
    gains = {entry.name: entry.adam_gain or 0.0 for entry in ground.entries()}
    first = math.fsum(rank * gains[name] for name, rank in choice.ranks.items())
    whole = ground.study.rank * math.fsum(gains.values())
    return replace(choice, scale=whole / first if first and whole else 1.0)


def taking(
    ground: Ground, take: Taking, limit: float, charges: tuple[str, ...] = (), raised: bool = False, **options: Any
) -> Choice:
    """A rule that takes any number: as many adapters of the study's rank as fit, or fewer of a higher rank; higher ones too
    where the last adapter that does not fit leaves much of a small budget.
    """
    rank, count = ground.study.rank, len(ground.entries())
    chosen = largest(take, count, limit / (RAISED if raised else 1), lambda some: rank * sum(map(width, some)))
    is_short = rank * sum(map(width, chosen)) < NEARLY * limit  # so few adapters that one more is too many
    ranks = filled(chosen, limit) if raised or is_short else dict.fromkeys((e.name for e in chosen), rank)
    return with_scale(ground, Choice(ranks, charges=charges, **options))


# ---- rules


def choosing(ground: Ground, blueprint: str, **wishes: Any) -> Choosing:
    """The library's own chooser."""
    settings: dict[str, Any] = {
        "rank_by": "adam_gain",
        "per_cost": False,
        "coverage": "kind+depth",
        "ranks": "uniform",
        "rank": ground.study.rank,
        "seed": 0,
        **wishes,
    }
    return Choosing(ground.entries(blueprint), costs=ground.costs, **settings)


def by_wish(ground: Ground, limit: int, blueprint: str, raised: bool = False, **wishes: Any) -> Choice:
    """What `plan_placement` chooses for these wishes, as many as fit."""
    found = choosing(ground, blueprint, **wishes)

    @functools.cache
    def take(count: int) -> tuple[Submodule, ...]:
        return found.adapters(Wish({"num_modules": count}), ()).units

    charges = () if found.rank_by in CONTROLS else ("blueprint",)
    if found.ranks == "influence":
        chosen = largest(take, len(found.entries), limit, lambda some: found.price(some, ())["parameters"])
        return with_scale(ground, Choice(found.ranks_of(chosen), charges=charges))
    return taking(ground, take, limit, charges, raised)


def planner(
    ground: Ground,
    limit: int,
    blueprint: str,
    is_shipped: bool = False,
    budget: str | None = None,
    keep: float | None = None,
    **wishes: Any,
) -> Choice:
    """What `plan_placement` does without a selector; as shipped with all-linear's parameters, else within the limit."""
    found = choosing(ground, blueprint, **{"ranks": "equal_parameters", "rank_by": "cover_gain", **wishes})
    wish = Wish.of(budget, keep, {}).or_default(knows_costs=True, is_sparse=found.rank_by == "cover_gain")
    chosen = found.adapters(wish, ()).units
    if is_shipped:
        rank = rank_of_equal_parameters(chosen, found.entries, ground.study.rank)
        ranks = dict.fromkeys((entry.name for entry in chosen), rank)
    else:
        ranks = filled(chosen, limit)
    return with_scale(ground, Choice(ranks, charges=("blueprint",)))


def control(
    ground: Ground, limit: int, blueprint: str, is_shipped: bool = False, number: int | None = None, **wishes: Any
) -> Choice:
    """As many adapters as the planner's default has, or as said, and as many parameters, chosen by another rule."""
    found = choosing(ground, blueprint, **wishes)
    number = min(number or len(planner(ground, ground.whole, blueprint).ranks), len(found.entries))
    chosen = found.adapters(Wish({"num_modules": number}), ()).units
    if is_shipped:
        rank = rank_of_equal_parameters(chosen, found.entries, ground.study.rank)
        ranks = dict.fromkeys((entry.name for entry in chosen), rank)
    else:
        ranks = filled(chosen, limit)
    return with_scale(ground, Choice(ranks, charges=() if found.rank_by in CONTROLS else ("blueprint",)))


def group(ground: Ground, limit: int, part: str, above: str = "", **options: Any) -> Choice:
    """LoRA of one rank on all linear layers, or on those of attention or the feed-forward part alone; above a blueprint's
    name, only in layers no lower than the planner's default has adapters in by it.
    """
    chosen = [e for e in ground.entries() if (e.group or "").startswith(part)]
    if above:
        reached = planner(ground, ground.whole, above).ranks
        lowest = min(e.depth for e in ground.entries() if e.name in reached and e.depth is not None)
        chosen = [e for e in chosen if e.depth is not None and e.depth >= lowest]
        options["charges"] = ("blueprint",)
    return with_scale(ground, Choice(filled(chosen, limit), **options))


def all_linear(ground: Ground, limit: int, blueprint: str) -> Choice:
    """The reference."""
    return Choice(dict.fromkeys((entry.name for entry in ground.entries()), ground.study.rank))


def strata_bottom(ground: Ground, limit: int, blueprint: str) -> Choice:
    """The smallest norm of each kind and stratum of depth."""
    take = spreading(ground.entries(blueprint), lambda e: 1 / max(norm_of(e), 1e-30), "kind+depth", False)
    return taking(ground, take, limit, ("blueprint",))


def by_weights(ground: Ground, limit: int, of: Callable[[Ground], Mapping[str, float]], coverage: Any) -> Choice:
    """A score of weights alone."""
    scores, entries = of(ground), ground.entries()
    return taking(ground, spreading(entries, lambda e: scores[e.name], coverage, True), limit, ("weights",))


def unfrozen(ground: Ground, limit: int | None, blueprint: str, rank_by: str) -> Choice:
    """Attention and feed-forward parts trained whole: the best, less those that do not fit, or the top blocks."""
    found = choosing(ground, blueprint, rank_by=rank_by, coverage="none")
    blocks = len(found.members)
    taken = [found.blocks(Wish({"num_modules": count})).units for count in range(1, blocks + 1)]
    if limit is None:
        units = list(taken[min(blocks, 2 * TOP_BLOCKS) - 1])
    else:
        units = []
        for best, before in zip(taken, [(), *taken], strict=False):
            new = next(unit for unit in best if unit not in before)
            if found.price((), found.modules_of([*units, new]))["parameters"] <= limit:
                units.append(new)
    if not units:
        raise Infeasible(f"the smallest block has more than the {limit:,} parameters that are allowed")
    return Choice(whole=found.modules_of(units), charges=() if rank_by in CONTROLS else ("blueprint",))


def full(ground: Ground, limit: int, blueprint: str) -> Choice:
    """Everything is trained, embeddings and norms too."""
    roots = {part.name.partition(".")[0] for part in ground.structure.parts}
    return Choice(whole=tuple(sorted(roots)))


def begun(arm: Callable[[Ground, int, str], Choice], start: str) -> Callable[[Ground, int, str], Choice]:
    """The same adapters with another start, which has its own charge."""

    def choose(ground: Ground, limit: int, blueprint: str) -> Choice:
        choice = arm(ground, limit, blueprint)
        if start in ONE_RANK:
            choice = replace(choice, ranks=dict.fromkeys(choice.ranks, min(choice.ranks.values())))
        return replace(choice, start=start, charges=(*choice.charges, *([start] if start != "adalora" else [])))

    return choose


def stepped(arm: Callable[[Ground, int, str], Choice], start: str = "lora") -> Callable[[Ground, int, str], Choice]:
    """The same adapters, from a start, every B with a higher learning rate than its A."""

    def choose(ground: Ground, limit: int, blueprint: str) -> Choice:
        return replace((arm if start == "lora" else begun(arm, start))(ground, limit, blueprint), ahead=AHEAD)

    return choose


def rates_by_gain(ground: Ground, limit: int, blueprint: str, power: float) -> Choice:
    """The planner's placement, each adapter's learning rate by a power of its gain over the mean."""
    choice = planner(ground, limit, blueprint)
    gains = {e.name: e.adam_gain or 0.0 for e in ground.entries(blueprint) if e.name in choice.ranks}
    mean = math.fsum(gains.values()) / len(gains) or 1.0
    factors = {n: min(STEEPEST, max(1 / STEEPEST, (max(g, 1e-30) / mean) ** power)) for n, g in gains.items()}
    return replace(choice, factors=factors)
