"""Single experts: their names, `model.layers.3.mlp.experts.17.gate_up_proj`, scores, and the fewest that hold a share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import NamedTuple

from ..errors import BlueprintError
from .entry import Submodule, score_of


ROUTING = ("token_share", "gate_weight")  # the same for all weights of an expert
_SUMS = ("adam_gain", "weight_gradient")  # L1 norms
_NORMS = ("gradient_norm", "signal_norm", "weight_norm")
_EXPERT = re.compile(
    r"(?P<container>(?:.+\.)?(?!shared)\w*experts?)\.(?P<number>\d+)\.(?P<weight>[^.].*)", re.IGNORECASE
)
_CONTAINER = re.compile(r"(?P<container>(?:.+\.)?(?!shared)\w*experts?)\.(?P<weight>[^.]+)", re.IGNORECASE)


class ExpertName(NamedTuple):
    """The parts of an expert's name: the weight's name without the number, as of a fused parameter, and the number."""

    parameter: str
    number: int

    @property
    def container(self) -> str:
        """Name of the module that holds all experts, `model.layers.3.mlp.experts`."""
        match = _CONTAINER.match(self.parameter)
        assert match is not None
        return match["container"]


def split_expert(name: str) -> ExpertName | None:
    """Split the name of one expert's weight, fused or in a list of modules; None for any other name.

    Example:
        >>> split_expert("model.layers.3.mlp.experts.17.gate_up_proj")
        ExpertName(parameter='model.layers.3.mlp.experts.gate_up_proj', number=17)
        >>> split_expert("model.layers.3.mlp.experts.gate_up_proj") is None
        True
    """
    match = _EXPERT.fullmatch(name)
    return None if match is None else ExpertName(f"{match['container']}.{match['weight']}", int(match["number"]))


def name_expert(parameter: str, number: int) -> str | None:
    """Return the name of one expert of a fused parameter; None if the parameter is not held by a module of experts.

    Example:
        >>> name_expert("model.layers.3.mlp.experts.gate_up_proj", 17)
        'model.layers.3.mlp.experts.17.gate_up_proj'
    """
    match = _CONTAINER.fullmatch(parameter)
    return None if match is None else f"{match['container']}.{number}.{match['weight']}"


def expert_scores(entries: Iterable[Submodule], by: str = "token_share") -> dict[str, dict[int, float]]:
    """Return every expert's score by the module that holds the experts, in the order of the entries.

    An expert's score covers all of its weights: norms add in squares, and gains, which are L1 norms, add.

    Args:
        entries: of a blueprint; those of no expert are passed over.
        by: "token_share", "gate_weight", "adam_gain", "weight_gradient", "gradient_norm" or "signal_norm".

    Raises:
        BlueprintError: for another statistic, or one that an expert lacks.

    Example:
        >>> names = ("mlp.experts.0.up_proj", "mlp.experts.0.down_proj", "mlp.experts.1.up_proj")
        >>> expert_scores([Submodule(name, adam_gain=2.0) for name in names], "adam_gain")
        {'mlp.experts': {0: 4.0, 1: 2.0}}
    """
    if by not in (*ROUTING, *_SUMS, *_NORMS):
        raise BlueprintError(f"Experts are scored by one of {', '.join((*ROUTING, *_SUMS, *_NORMS))}, got {by!r}.")
    found: dict[str, dict[int, float]] = {}
    for entry in entries:
        name = split_expert(entry.name)
        if name is None:
            continue
        scores, value = found.setdefault(name.container, {}), score_of(entry, by)
        before = scores.get(name.number, 0.0)
        if by in ROUTING:
            scores[name.number] = value
        else:
            scores[name.number] = before + value if by in _SUMS else math.hypot(before, value)
    return found


def top_p_experts(scores: Mapping[int, float], p: float) -> tuple[int, ...]:
    """Return the fewest experts whose share of all scores reaches p, the largest first; ESFT's rule (arXiv:2407.01906).

    Experts without a score are never among them.

    Raises:
        BlueprintError: for p outside (0, 1].

    Example:
        >>> top_p_experts({0: 0.1, 1: 0.5, 2: 0.3, 3: 0.1}, 0.8)
        (1, 2)
    """
    if not 0 < p <= 1:
        raise BlueprintError(f"top_p must be in (0, 1], got {p}.")
    ordered = sorted((expert for expert, score in scores.items() if score > 0), key=lambda e: (-scores[e], e))
    wanted = p * math.fsum(scores.values()) * (1 - 1e-9)  # room for rounding
    sums = accumulate(scores[expert] for expert in ordered)
    count = next((i for i, total in enumerate(sums, start=1) if total >= wanted), len(ordered))
    return tuple(ordered[:count])
