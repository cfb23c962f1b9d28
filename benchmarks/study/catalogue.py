"""The arms by name: which rule each is, and where its ladder of learning rates begins.

Knows the rules' functions. Knows nothing of how they choose.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft_blueprint.place import CONTROLS, SCORES

from .arms import (
    GRADIENT,
    Choice,
    all_linear,
    begun,
    by_weights,
    by_wish,
    control,
    full,
    group,
    planner,
    rates_by_gain,
    stepped,
    strata_bottom,
    unfrozen,
)
from .ground import Ground
from .study import UNTRAINED, Entry


@dataclass(frozen=True)
class Arm:
    """A rule.

    Args:
        choose: ground, trainable parameters and a blueprint's name → what is trained.
        is_budgeted: whether it fills a budget; others have a size of their own.
        octaves: added to where its ladder of learning rates begins.
    """

    choose: Callable[[Ground, int, str], Choice]
    is_budgeted: bool = True
    octaves: int = 0


def arm_of(name: str) -> Arm:
    """An arm by its name.

    Raises:
        SystemExit: if there is none.
    """
    if name not in ARMS:
        raise SystemExit(f"There is no arm {name!r}; choose from {', '.join(sorted(ARMS))}.")
    return ARMS[name]


def choice_of(ground: Ground, entry: Entry, budget: float | None) -> Choice:
    """What an entry trains within a share of all-linear's parameters.

    Raises:
        Infeasible: if nothing fits, with the reason.
    """
    limit = ground.whole if budget is None else math.floor(budget * ground.whole)
    return arm_of(entry.arm).choose(ground, limit, entry.blueprint)


def guess_of(ground: Ground, arm: str, choice: Choice) -> int:
    """Where to begin with learning rates, in octaves over the study's: half the octaves that the first step's gain asks
    for, as the best of the first contests rose about with its root.
    """
    return max(-3, min(3, round(math.log2(choice.scale) / 2))) + arm_of(arm).octaves


def _arms() -> dict[str, Arm]:
    arms = {
        UNTRAINED: Arm(lambda g, n, b: Choice(), is_budgeted=False),
        "all-linear": Arm(all_linear, is_budgeted=False),
        "all-linear, low rank": Arm(lambda g, n, b: group(g, n, "")),
        "attention only": Arm(lambda g, n, b: group(g, n, "attn")),
        "MLP only": Arm(lambda g, n, b: group(g, n, "ffn"), octaves=1),
        "MLP only, as shipped": Arm(lambda g, n, b: group(g, n, "ffn"), is_budgeted=False),
        "MLP only, above": Arm(lambda g, n, b: group(g, n, "ffn", b), octaves=1),
        "MLP only, above, as shipped": Arm(lambda g, n, b: group(g, n, "ffn", b), is_budgeted=False),
        "norm, bottom of strata": Arm(strata_bottom),
        "planner": Arm(planner),
        "planner, as shipped": Arm(functools.partial(planner, is_shipped=True), is_budgeted=False),
        "KappaTune": Arm(lambda g, n, b: by_weights(g, n, lambda g: g.kappa, "none")),
        "Spectrum": Arm(lambda g, n, b: by_weights(g, n, lambda g: g.spectrum, "kind")),
        "AdaLoRA": Arm(begun(lambda g, n, b: group(g, n, ""), "adalora")),
        "full fine-tuning": Arm(full, is_budgeted=False, octaves=-4),
        "unfreeze top": Arm(lambda g, n, b: unfrozen(g, n, b, "last"), octaves=-2),
        "unfreeze top blocks": Arm(lambda g, n, b: unfrozen(g, None, b, "last"), is_budgeted=False, octaves=-2),
        "unfreeze by gain": Arm(lambda g, n, b: unfrozen(g, n, b, "adam_gain"), octaves=-2),
        "planner, rates by gain": Arm(functools.partial(rates_by_gain, power=0.5)),
        "planner, rates against gain": Arm(functools.partial(rates_by_gain, power=-0.5)),
        "gain per second": Arm(functools.partial(by_wish, per_cost=True)),
        "gain per second, pooled": Arm(functools.partial(by_wish, per_cost=True, coverage="none")),
        "ranks by gain": Arm(functools.partial(by_wish, ranks="influence")),
        "ranks by energy": Arm(functools.partial(by_wish, rank_by="singular_energy", ranks="influence")),
    }
    wishes: dict[str, dict[str, Any]] = {
        "planner, 0.7x": {"budget": "0.7x"},
        "cover, keep 0.95": {"keep": 0.95},
        "cover, keep 0.9": {"keep": 0.9},
        "cover, keep 0.8": {"keep": 0.8},
        "narrow cover, keep 0.85": {**NARROW, "keep": 0.85},
        "narrow cover, keep 0.75": {**NARROW, "keep": 0.75},
        "strata": {**STRATA, "keep": 0.95},  # the library's default before
        "strata, keep 0.85": {**STRATA, "keep": 0.85},
        "strata, keep 0.7": {**STRATA, "keep": 0.7},
        "strata, 0.7x": {**STRATA, "budget": "0.7x"},
    }
    for name, wish in wishes.items():
        arms[name] = Arm(functools.partial(planner, **wish))
        arms[f"{name}, as shipped"] = Arm(functools.partial(planner, is_shipped=True, **wish), is_budgeted=False)
    controls = [("even", "even", 0), *(("random, within kind", "random", draw) for draw in range(DRAWS))]
    measured = [("adam_gain", "adam_gain", 0), ("cover_gain", "cover_gain", 0), ("narrow cover_gain", "cover_gain", 0)]
    for title, score, draw in [*controls, *measured]:
        wish = {"rank_by": score, "seed": draw, "coverage": "kind" if score in CONTROLS else "kind+depth"}
        wish |= NARROW if title.startswith("narrow") else {}
        number = f" #{draw}" if draw else ""
        arms[f"{title}, as many{number}"] = Arm(functools.partial(control, **wish))
        for of, count in {"": None, **{f" x {count}": count for count in COUNTS}}.items():
            shipped = functools.partial(control, is_shipped=True, number=count, **wish)
            arms[f"{title}{of}, as shipped{number}"] = Arm(shipped, is_budgeted=False)
            arms[f"{title}{of}, LoRA+, as shipped{number}"] = Arm(stepped(shipped), False, STEPPED)
    arms["all-linear, LoRA+"] = Arm(stepped(all_linear), False, STEPPED)
    arms["planner, LoRA+, as shipped"] = Arm(stepped(arms["planner, as shipped"].choose), False, STEPPED)
    arms["strata, LoRA+, as shipped"] = Arm(stepped(arms["strata, as shipped"].choose), False, STEPPED)
    arms["all-linear, A from gradients and LoRA+"] = Arm(stepped(all_linear, "directions"), False, STEPPED)
    starts = {"EVA": "eva", "LoRA-GA": "lora_ga", "A from gradients": "directions"}
    starts["along the gradient"] = f"{GRADIENT}64"
    starts |= {f"along the gradient x {count}": f"{GRADIENT}{count}" for count in (8, 16)}
    for title, start in starts.items():
        arms[f"all-linear, {title}"] = Arm(begun(arms["all-linear, low rank"].choose, start))
        arms[f"all-linear, {title}, as shipped"] = Arm(begun(all_linear, start), False)
        for name in ("planner", *COVERS, "MLP only", "random, within kind, as many"):
            arms[f"{name}, {title}"] = Arm(begun(arms[name].choose, start), octaves=arms[name].octaves)
        for name in (
            "planner",
            *COVERS,
            "planner, 0.7x",
            "strata, keep 0.85",
            "cover_gain x 60",
            "random, within kind",
        ):
            for number in ["", *(f" #{i}" for i in range(1, DRAWS))] if name.startswith("random") else [""]:
                choose = arms[f"{name}, as shipped{number}"].choose
                arms[f"{name}, {title}, as shipped{number}"] = Arm(begun(choose, start), is_budgeted=False)
    for title, coverage in (("", "kind+depth"), (", within kind", "kind"), (", pooled", "none")):
        for score in (*SCORES, "cover_gain", "set_gain"):
            wish = {"rank_by": score, "coverage": coverage}
            arms[f"{score}{title}"] = Arm(functools.partial(by_wish, **wish))
            arms[f"{score}{title}, raised"] = Arm(functools.partial(by_wish, raised=True, **wish))
            for draw in range(1, DRAWS) if score == "random" else ():
                again = functools.partial(by_wish, seed=draw, **wish)
                arms[f"{score}{title} #{draw}"] = Arm(again)
                arms[f"{score}{title}, raised #{draw}"] = Arm(functools.partial(again, raised=True))
    return arms


COVERS = ("cover, keep 0.95", "cover, keep 0.9", "cover, keep 0.8")
DRAWS = 3  # of random choices, the first without a number
COUNTS = (15, 50, 60)  # adapters, in arms that have other than the planner's number
STRATA = {"rank_by": "adam_gain"}
NARROW = {"reach": 0.1}  # of an adapter's cover, as a share of the depth
STEPPED = -2  # octaves from where a ladder begins, where B is ahead of A
ARMS = _arms()
