"""Read an arm's name as a rule: adapted modules, ranks and start, within a number of parameters.

    NAME[ x COUNT][, MODIFIER ...][ #DRAW]

NAME: `all-linear`, `attention only`, `MLP only`, `planner` or `cover` (the library's default), a score of
`plan_placement(rank_by=…)` such as `gradient_norm`, `random`, `even`, `KappaTune`, `Spectrum`, `AdaLoRA`,
`full fine-tuning`, or whole blocks: `unfreeze top`, `unfreeze by gain`, `by norm`, `by Spectrum`, `cover` or `random`. COUNT: adapters. Modifiers:

- `as shipped`: with all-linear LoRA's parameters instead of a budget's; `as many`: as many adapters as the planner's
- `within kind`, `pooled`: coverage
- `keep 0.9`, `0.7x`: what `plan_placement` keeps or may spend
- `along the gradient[ x EXAMPLES]`, `EVA`, `LoRA-GA`: the start of the adapters
- `LoRA+`: B learns eight times as fast as A
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft_blueprint import Placement
from peft_blueprint.blueprint import Submodule
from peft_blueprint.place import CONTROLS, SCORES

from .ground import Charge, Ground
from .plan import UNTRAINED, Entry


Taking = Callable[[int], Sequence[Submodule]]

NEARLY = 0.95  # of a budget, below which ranks are raised
ONE_RANK = ("eva", "adalora")  # starts that give all adapters the same rank
GRADIENT = "gradient x "  # start along the gradient, of this many examples
AHEAD = 8.0  # LoRA+: B's learning rate over A's (Hayou et al. 2024, arXiv:2402.12354)
GROUPS = {"all-linear": "", "attention only": "attn", "MLP only": "ffn"}
PLANNERS = ("planner", "cover")
WEIGHTS = ("KappaTune", "Spectrum")
# score and coverage of whole blocks
UNFREEZE = {
    "unfreeze top": ("last", "none"),
    "unfreeze by gain": ("adam_gain", "none"),
    "unfreeze by norm": ("gradient_norm", "none"),
    "unfreeze by Spectrum": ("Spectrum", "kind"),
    "unfreeze cover": ("adam_gain", "kind+depth"),
    "unfreeze random": ("random", "none"),
}
STARTS = {"EVA": "eva", "LoRA-GA": "lora_ga"}
WHOLE = (UNTRAINED, "full fine-tuning")
# octaves added to where a ladder of learning rates begins
OCTAVES = {"MLP only": 1, "full fine-tuning": -4, **dict.fromkeys(UNFREEZE, -2)}


class Infeasible(Exception):
    """An arm that does not fit a budget."""


@dataclass(frozen=True)
class Rule:
    """A parsed name.

    Args:
        base: the name without modifiers.
        is_shipped: whether it has all-linear's parameters instead of a budget's.
        count: of adapters; None for as many as fit or as the planner chooses; 0 for as many as the planner.
        coverage: "kind+depth", "kind" or "none".
        wish: `keep` or `budget` of the planner.
        start: "lora", "eva", "lora_ga", "adalora" or "gradient x 64".
        ahead: factor on the learning rate of every B.
        draw: seed of a random choice.
    """

    base: str
    is_shipped: bool = False
    count: int | None = None
    coverage: str = "kind+depth"
    wish: tuple[tuple[str, Any], ...] = ()
    start: str = "lora"
    ahead: float = 1.0
    draw: int = 0

    @property
    def is_budgeted(self) -> bool:
        """Whether it fills a budget; other rules have a size of their own."""
        return not (self.is_shipped or self.base in WHOLE)

    @property
    def octaves(self) -> int:
        """Octaves added to where its ladder of learning rates begins."""
        return (OCTAVES.get(self.base, 0) if self.is_budgeted or self.base in WHOLE else 0) - 2 * (self.ahead > 1)


@dataclass(frozen=True)
class Choice:
    """What is trained, and how it begins.

    Args:
        ranks: of adapters, by submodule.
        whole: names of modules that are trained whole.
        start: as `Rule.start`.
        ahead: as `Rule.ahead`.
        charges: what had to be measured: "blueprint", "weights", or a start.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    start: str = "lora"
    ahead: float = 1.0
    charges: tuple[str, ...] = ()


@functools.cache
def rule_of(name: str) -> Rule:
    """Parse an arm's name.

    Raises:
        SystemExit: for a name that no rule has.

    Example:
        >>> rule_of("random x 50, within kind, as shipped #2")
        Rule(base='random', is_shipped=True, count=50, coverage='kind', wish=(), start='lora', ahead=1.0, draw=2)
    """
    text, _, draw = name.partition(" #")
    found: dict[str, Any] = {"draw": int(draw or 0)}
    bases: list[str] = []
    for part in text.split(", "):
        word, _, number = part.rpartition(" x ")
        if part == "as shipped":
            found["is_shipped"] = True
        elif part == "as many":
            found["count"] = 0
        elif part.startswith("along the gradient"):
            found["start"] = f"{GRADIENT}{number or 64}"
        elif part in ("within kind", "pooled") or word == "within kind":
            found["coverage"] = "none" if part == "pooled" else "kind"
            found |= {"count": int(number)} if number and word else {}
        elif part in STARTS:
            found["start"] = STARTS[part]
        elif part == "LoRA+":
            found["ahead"] = AHEAD
        elif re.fullmatch(r"keep [\d.]+", part):
            found["wish"] = (("keep", float(part[5:])),)
        elif re.fullmatch(r"[\d.]+x", part):
            found["wish"] = (("budget", part),)
        elif part != "low rank":  # all-linear at a budget, as archived runs call it
            bases.append(word or part)
            found |= {"count": int(number)} if word else {}
    known = (*GROUPS, *PLANNERS, *WEIGHTS, *UNFREEZE, *WHOLE, *SCORES, *CONTROLS, "cover_gain", "set_gain", "AdaLoRA")
    if len(bases) != 1 or bases[0] not in known:
        raise SystemExit(f"Unknown arm {name!r}: its rule must be one of {', '.join(dict.fromkeys(known))}.")
    if text == "all-linear" or (bases == ["all-linear"] and "ahead" in found):
        found["is_shipped"] = True
    if bases[0] == "even" or (bases[0] == "random" and found.get("is_shipped")):
        found.setdefault("coverage", "kind")
    if bases[0] == "AdaLoRA":
        found["start"] = "adalora"
    return Rule(bases[0], **found)


def choice_of(ground: Ground, entry: Entry, budget: float | None) -> Choice:
    """Choose what an entry trains within a share of all-linear's parameters.

    Raises:
        Infeasible: if nothing fits, with the reason.
    """
    rule = rule_of(entry.arm)
    limit = ground.whole if budget is None else math.floor(budget * ground.budgeted)
    choice = _chosen(ground, rule, limit, entry.blueprint)
    if rule.start in ONE_RANK:
        choice = replace(choice, ranks=dict.fromkeys(choice.ranks, min(choice.ranks.values())))
    charges = (*choice.charges, *([rule.start] if rule.start not in ("lora", "adalora") else []))
    return replace(choice, start=rule.start, ahead=rule.ahead, charges=charges)


def guess_of(ground: Ground, entry: Entry, choice: Choice) -> int:
    """Return the octave at which to begin with learning rates: the root of all-linear's summed ranks over the choice's."""
    summed = sum(choice.ranks.values())
    scale = ground.study.rank * len(ground.entries) / summed if summed else 1.0
    return max(-3, min(3, round(math.log2(scale) / 2))) + rule_of(entry.arm).octaves


def charge_of(ground: Ground, choice: Choice, blueprint: str) -> Charge:
    """Sum the costs before training; EVA's and LoRA-GA's starts count as one pass over the measured examples."""
    rows, spent = ground.data_of(0).measured, Charge()
    for what in choice.charges:
        if what.startswith(GRADIENT):
            spent += ground.passes(rows[: int(what.removeprefix(GRADIENT))], forward=1, backward=1)
        elif what == "blueprint":
            spent += ground.charge(blueprint)
        elif what == "weights":
            spent += ground.of_weights
        else:
            once = 1.0 if what == "lora_ga" else 0.0
            spent += ground.passes(rows, forward=1, backward=once, weights=once)
    return spent


# ---- rules


def _chosen(ground: Ground, rule: Rule, limit: int, blueprint: str) -> Choice:
    if rule.base == UNTRAINED:
        return Choice()
    if rule.base == "full fine-tuning":
        return Choice(whole=tuple(sorted({name.partition(".")[0] for name, _ in ground.shell.named_parameters()})))
    if rule.base in UNFREEZE:
        return _unfrozen(ground, rule, limit, blueprint)
    if rule.base in GROUPS or rule.base == "AdaLoRA":
        part = GROUPS.get(rule.base, "")
        chosen = [entry for entry in ground.entries if (entry.group or "").startswith(part)]
        if rule.base == "all-linear" and rule.is_shipped:
            return Choice(dict.fromkeys((entry.name for entry in chosen), ground.study.rank))
        return Choice(filled(chosen, limit))
    if rule.base in WEIGHTS:
        scores = ground.weight_scores(rule.base)
        order = sorted(ground.entries, key=lambda entry: -scores[entry.name])
        if rule.base == "Spectrum":  # in turn from every kind
            kinds = [entry.kind for entry in order]
            places = {entry.name: kinds[:i].count(entry.kind) for i, entry in enumerate(order)}
            order.sort(key=lambda entry: places[entry.name])
        return Choice(_fitting(ground, lambda count: order[:count], limit), charges=("weights",))
    charges = () if rule.base in CONTROLS else ("blueprint",)
    options: dict[str, Any] = {**dict(rule.wish), **({"rank_by": "cover_gain"} if rule.wish else {})}
    if rule.base not in PLANNERS:
        options |= {"rank_by": rule.base, "coverage": rule.coverage, "seed": rule.draw}
        if rule.count is None and not rule.is_shipped:

            @functools.cache
            def take(count: int) -> Sequence[Submodule]:
                return _adapted(ground, ground.plan(blueprint, num_modules=count, ranks="uniform", **options))

            return Choice(_fitting(ground, take, limit), charges=charges)
        count = rule.count or len(ground.plan(ranks="equal_parameters").lora)
        options["num_modules"] = min(count, len(ground.entries))
    placement = ground.plan(blueprint, ranks="equal_parameters", **options)
    if not rule.is_shipped:
        return Choice(filled(_adapted(ground, placement), limit), charges=charges)
    return Choice(equal_in_parameters(_adapted(ground, placement), ground.entries, ground.study.rank), charges=charges)


def _adapted(ground: Ground, placement: Placement) -> list[Submodule]:
    """Return the submodules that a placement puts adapters on."""
    names = set(placement.lora)
    return [entry for entry in ground.entries if entry.name in names]


def _unfrozen(ground: Ground, rule: Rule, limit: int, blueprint: str) -> Choice:
    """Take attention and feed-forward blocks in the order of their score, except those that do not fit."""
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in ground.shell.named_modules()}
    score, coverage = UNFREEZE[rule.base]
    if score in WEIGHTS:
        ordered = _blocks_by_weights(ground, score)
    else:
        ordered, count = [], 0
        options: dict[str, Any] = {"mode": "unfreeze", "rank_by": score, "coverage": coverage, "seed": rule.draw}
        blocks = {block for entry in ground.entries if (block := _block_of(entry))}
        while len(ordered) < len(blocks):
            count += 1
            names = ground.plan(blueprint, num_modules=count, **options).unfreeze
            ordered += [name for name in names if name not in ordered]
    units: list[str] = []
    for name in ordered:
        if sum(sizes[unit] for unit in [*units, name]) <= limit:
            units.append(name)
    if not units:
        raise Infeasible(f"the smallest block has more than the {limit:,} parameters that are allowed")
    charge = () if score in CONTROLS else ("weights",) if score in WEIGHTS else ("blueprint",)
    return Choice(whole=tuple(units), charges=charge)


def _block_of(entry: Submodule) -> str:
    return entry.name.rpartition(".")[0]


def _blocks_by_weights(ground: Ground, score: str) -> list[str]:
    """Order blocks by the mean score of their weights, attention and feed-forward in turn."""
    scores = ground.weight_scores(score)
    blocks: dict[tuple[str, str], list[float]] = {}
    for entry in ground.entries:
        blocks.setdefault(((entry.group or "").partition(".")[0], _block_of(entry)), []).append(scores[entry.name])
    order = sorted(blocks, key=lambda block: -sum(blocks[block]) / len(blocks[block]))
    groups = [group for group, _ in order]
    places = {block: groups[:i].count(block[0]) for i, block in enumerate(order)}
    return [name for _, name in sorted(order, key=places.__getitem__)]


# ---- sizes


def width(entry: Submodule) -> int:
    """Return the parameters of an adapter of rank 1."""
    assert entry.shape is not None
    *experts, d_out, d_in = entry.shape
    return math.prod(experts) * (d_out + d_in)


def _fitting(ground: Ground, take: Taking, limit: int) -> dict[str, int]:
    """Take as many adapters of the study's rank as fit; raise ranks where the next one would leave much of a budget."""
    rank = ground.study.rank

    def size(count: int) -> int:
        return rank * sum(map(width, take(count)))

    low, high = 0, len(ground.entries)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= limit else (low, middle - 1)
    # sizes differ, so that a few more may fit where one more does not
    best = max((n for n in range(max(1, low), min(len(ground.entries), low + 8) + 1) if size(n) <= limit), default=0)
    if not best:
        raise Infeasible(f"the smallest choice has {size(1):,} parameters, and {limit:,} are allowed")
    if size(best) < NEARLY * limit:
        return filled(take(best), limit)
    return dict.fromkeys((entry.name for entry in take(best)), rank)


def equal_in_parameters(chosen: Sequence[Submodule], entries: Sequence[Submodule], rank: int) -> dict[str, int]:
    """Return the rank at which adapters on `chosen` have the parameters of adapters of `rank` on all entries.

    A multiple of 8, up to eight times `rank` and up to a weight's full rank. The library's own ranks are those that
    servers reserve; this one keeps the study's runs comparable.
    """
    raised = min(8 * rank, rank * sum(map(width, entries)) // sum(map(width, chosen)))
    raised = raised // 8 * 8 or raised
    return {entry.name: min(raised, *entry.shape[-2:]) for entry in chosen if entry.shape}


def filled(chosen: Sequence[Submodule], limit: float) -> dict[str, int]:
    """Return the largest rank that fits for all, and one more on as many adapters as fit.

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
