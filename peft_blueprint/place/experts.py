"""Choose experts of a mixture: a number, a share, or the fewest that hold a share of the routing or of the gain."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, get_args

from .._text import format_names
from ..blueprint import Blueprint, Submodule, expert_scores, split_expert, top_p_experts
from ..errors import PlacementError
from .placement import Placement


ExpertsBy = Literal["token_share", "gate_weight", "adam_gain", "gradient_norm"]

DEFAULT_EXPERTS = 0.1  # of each layer's
_EXAMPLES = "examples: 4 for each layer, 0.1 of each layer's, 'top_p=0.9'"


@dataclass(frozen=True)
class ExpertCount:
    """How many experts of each layer: a number, a share of them, or the fewest that hold a share of the score.

    Example:
        >>> ExpertCount.of("top_p=0.9"), ExpertCount.of(4)
        (ExpertCount(number=None, share=None, top_p=0.9), ExpertCount(number=4, share=None, top_p=None))
    """

    number: int | None = None
    share: float | None = None
    top_p: float | None = None

    @classmethod
    def of(cls, value: Any) -> ExpertCount:
        """Read a number from 1, a share in (0, 1), or "top_p=0.9"; numbers also as text.

        Raises:
            PlacementError: if it is none of these.
        """
        if isinstance(value, str):
            found = re.fullmatch(r"\s*(top_p\s*=)?\s*(\d*\.?\d+(?:[eE][+-]?\d+)?)\s*", value)
            if found is None:
                raise PlacementError(f"experts must be a number, a share or top_p=…, got {value!r}; {_EXAMPLES}.")
            number = float(found[2])
            if found[1]:
                if not 0 < number <= 1:
                    raise PlacementError(f"top_p of experts must be in (0, 1], got {number:g}; {_EXAMPLES}.")
                return cls(top_p=number)
            value = number
        count = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
        if not 0 < count < math.inf:
            raise PlacementError(f"experts must be a number, a share or top_p=…, got {value!r}; {_EXAMPLES}.")
        if count >= 1 and count != int(count):
            raise PlacementError(f"experts must be a whole number, or a share below 1, got {value}; {_EXAMPLES}.")
        return cls(share=count) if count < 1 else cls(number=int(count))


def choose_experts(
    blueprint: Blueprint | Sequence[Submodule], experts: float | str, by: ExpertsBy | None = None
) -> dict[str, tuple[int, ...]]:
    """Choose experts of every layer by a blueprint of single experts.

    With `top_p` these are the fewest experts whose share of the layer's summed score reaches p, as in ESFT (Wang et al.
    2024, arXiv:2407.01906), where the score is the share of tokens or the mean gate weight.

    Args:
        blueprint: measured with `experts=True`, or its entries; of fused experts or of experts in lists.
        experts: number for each layer, share of each layer's experts below 1, or "top_p=0.9".
        by: "token_share" or "gate_weight" of the routing; "adam_gain", summed over an expert's weights;
            "gradient_norm", the root of their summed squares. By default the first of these that was measured.

    Returns:
        Numbers of the chosen experts, most important first, by the name of the module that holds them.

    Raises:
        PlacementError: if `experts` cannot be read, a layer has fewer, no entry is of a single expert, or one lacks `by`.

    Example:
        >>> shares = [0.5, 0.1, 0.4]
        >>> names = [f"layers.0.mlp.experts.{i}.up_proj" for i in range(3)]
        >>> entries = [Submodule(n, 1.0, form="expert", token_share=s) for n, s in zip(names, shares)]
        >>> choose_experts(entries, "top_p=0.9")
        {'layers.0.mlp.experts': (0, 2)}
    """
    count = ExpertCount.of(experts)
    return {holder: _chosen(holder, shares, count) for holder, shares in expert_shares(blueprint, by).items()}


def expert_shares(
    blueprint: Blueprint | Sequence[Submodule], by: ExpertsBy | None = None
) -> dict[str, dict[int, float]]:
    """Return each expert's share of its layer's summed score, by the holding module's name and the expert's number.

    Arguments and errors as in `choose_experts`.

    Example:
        >>> names = [f"layers.0.mlp.experts.{i}.up_proj" for i in range(2)]
        >>> expert_shares([Submodule(n, 1.0, form="expert", adam_gain=g) for n, g in zip(names, [3.0, 1.0])])
        {'layers.0.mlp.experts': {0: 0.75, 1: 0.25}}
    """
    entries = expert_entries(blueprint)
    if not entries:
        raise PlacementError(
            "The blueprint has no entry of a single expert. Measure it with generate_blueprint(…, experts=True) on a "
            "mixture of experts."
        )
    order = get_args(ExpertsBy)
    measured = [name for name in order if all(getattr(entry, name) is not None for entry in entries)]
    score = str(by or next(iter(measured), order[-1]))
    if score not in order:
        raise PlacementError(f"experts_by must be one of {', '.join(order)}, got {by!r}.")
    if missing := [entry.name for entry in entries if getattr(entry, score) is None]:
        raise PlacementError(
            f"{len(missing)} of {len(entries)} experts' weights have no {score} ({format_names(missing)}). Measure the blueprint "
            "with generate_blueprint(…, experts=True), or choose another of experts_by."
        )
    shares = {}
    for holder, scores in expert_scores(entries, score).items():
        total = math.fsum(scores.values())
        shares[holder] = {number: own / total if total else 1 / len(scores) for number, own in scores.items()}
    return shares


def expert_entries(entries: Iterable[Submodule], *, is_fused: bool = False) -> list[Submodule]:
    """Return the entries that are weights of one expert; with `is_fused` those of fused parameters alone."""
    return [e for e in entries if (e.form == "expert" or e.form == "linear" and not is_fused) and split_expert(e.name)]


def _chosen(holder: str, shares: dict[int, float], count: ExpertCount) -> tuple[int, ...]:
    ranked = sorted(shares, key=lambda number: (-shares[number], number))
    if count.top_p is None:
        wanted = count.number or max(1, round((count.share or 0) * len(ranked)))
        if wanted > len(ranked):
            raise PlacementError(f"experts={wanted}: {holder!r} has only {len(ranked)}. Give at most {len(ranked)}.")
        return tuple(ranked[:wanted])
    return top_p_experts(shares, count.top_p)


def experts_of(names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the experts' numbers by fused parameter, from names such as `model.layers.3.mlp.experts.17.gate_up_proj`.

    Names of whole parameters are left out.

    Example:
        >>> experts_of(["mlp.experts.3.up_proj", "mlp.experts.1.up_proj", "mlp.experts.down_proj"])
        {'mlp.experts.up_proj': (1, 3)}
    """
    found: dict[str, set[int]] = {}
    for name in names:
        if (expert := split_expert(name)) is not None:
            found.setdefault(expert.parameter, set()).add(expert.number)
    return {parameter: tuple(sorted(numbers)) for parameter, numbers in found.items()}


def with_whole_parameters(placement: Placement) -> Placement:
    """Return a placement with fused parameters instead of their chosen experts, as PEFT names targets.

    Raises:
        PlacementError: if experts of one parameter have different ranks, or the parameter is placed as a whole too.
    """
    parameters = {name: e.parameter for name in placement.target_parameters if (e := split_expert(name)) is not None}
    if not parameters:
        return placement
    fused = set(parameters.values())
    if twice := sorted(fused & set(placement.target_parameters)):
        raise PlacementError(f"{format_names(twice)} are placed whole and by single experts: leave one of them out.")
    ranks: dict[str, int] = {}
    for name in placement.lora:
        rank, own = placement.ranks.get(name), parameters.get(name, name)
        rank = placement.rank if rank is None else rank
        if own in fused and ranks.setdefault(own, rank or 0) != (rank or 0):
            raise PlacementError(
                f"Experts of {own!r} have ranks {ranks[own]} and {rank}, and PEFT gives all experts of a parameter one. "
                "Set ranks='uniform'."
            )
    kept = {name: rank for name, rank in placement.ranks.items() if name not in parameters}
    kept |= {name: rank for name, rank in ranks.items() if rank not in (0, placement.rank)}
    return replace(
        placement,
        lora=tuple(dict.fromkeys(parameters.get(name, name) for name in placement.lora)),
        target_parameters=tuple(dict.fromkeys(parameters.get(name, name) for name in placement.target_parameters)),
        ranks=kept,
    )
