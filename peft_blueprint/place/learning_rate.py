"""Predict a placement's learning rate from one that suits LoRA on every linear layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from ..blueprint import ADAPTABLE
from ..errors import PlacementError
from ..measure import find_submodules, unwrap
from .options import DEFAULT_RANK
from .placement import Placement


Rule = Literal["ranks", "adam_gain"]

_FORMULAS = {
    "ranks": "the root of all-linear LoRA's summed ranks over the placement's",
    "adam_gain": "Adam's gain, measured in the blueprint",
}


@dataclass(frozen=True)
class LearningRate:
    """A predicted learning rate.

    Args:
        value: the rate.
        scale: its ratio to the rate that suits LoRA on every linear layer.
        rule: how the ratio was found, see `learning_rate_for`.
    """

    value: float
    scale: float
    rule: Rule

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.reason})"

    @property
    def reason(self) -> str:
        """The ratio in words, and the rule."""
        return f"{self.scale:.2f} times all-linear LoRA's, by {_FORMULAS[self.rule]}"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {"value": self.value, "scale": self.scale, "rule": self.rule}


def learning_rate_for(
    target: Placement | LoraConfig | nn.Module,
    *,
    base: float,
    model: nn.Module | None = None,
    rank: int = DEFAULT_RANK,
    rule: Rule = "ranks",
) -> LearningRate:
    """Predict the learning rate of a placement, without a sweep.

    Each adapter of a sparse placement has to move further than those of LoRA on every linear layer. By the rule "ranks",
    which needs no blueprint,

        rate = base · sqrt(Σ ranks of all-linear LoRA / Σ ranks of the placement).

    In this project's archive it named the best octave as often as Adam's gain did (SmolLM2-135M, GSM8K and PubMedQA); it
    was not tested at half octaves. "adam_gain" is the ratio of the gains that the blueprint measured, see
    `Placement.learning_rate_scale`.

    Args:
        target: a placement; a `LoraConfig`, which needs `model` unless it is a settled `BlueprintConfig`; or a model
            with its adapters; only active ones count.
        base: learning rate that suits LoRA on every linear layer with `rank`, at the scaling alpha / r that the
            placement's adapters have.
        model: base model, also on the meta device.
        rank: of that LoRA.
        rule: "ranks" or "adam_gain".

    Raises:
        PlacementError: for a base that is not positive, a target without adapters, one with unfrozen blocks, or a rule
            that the placement does not support.

    Example:
        >>> from peft_blueprint.place import plan_placement
        >>> from peft_blueprint.testing import tiny_llama
        >>> placement = plan_placement(None, tiny_llama(layers=4), num_modules=7, r=16, ranks="uniform")
        >>> print(learning_rate_for(placement, base=1e-3))
        0.002 (2.00 times all-linear LoRA's, by the root of all-linear LoRA's summed ranks over the placement's)
    """
    if isinstance(base, bool) or not isinstance(base, int | float) or not (base > 0 and math.isfinite(base)):
        raise PlacementError(f"base must be a positive learning rate, got {base!r}.")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise PlacementError(f"rank must be a positive integer, got {rank!r}.")
    if rule not in get_args(Rule):
        raise PlacementError(f"rule must be {' or '.join(map(repr, get_args(Rule)))}, got {rule!r}.")
    placement = target if isinstance(target, Placement) else vars(target).get("placement")
    if rule == "adam_gain":
        scale = placement.learning_rate_scale if isinstance(placement, Placement) else None
        if scale is None:
            raise PlacementError(
                "rule='adam_gain' needs a placement of adapters by a blueprint with adam_gain. Measure one with "
                "generate_blueprint, or use rule='ranks'."
            )
        return LearningRate(base * scale, scale, rule)
    if isinstance(placement, Placement):
        own, candidates = _of_placement(placement, rank)
    elif isinstance(target, nn.Module):
        own, candidates = _of_model(target)
    elif isinstance(target, LoraConfig):
        own, candidates = _of_config(target, model)
    else:
        raise PlacementError(
            f"target must be a Placement, a LoraConfig or a model with adapters, got {type(target).__name__}."
        )
    if not own:
        raise PlacementError("target has no LoRA adapter, so no learning rate can be predicted for it.")
    scale = math.sqrt(candidates * rank / own)
    return LearningRate(base * scale, scale, rule)


def _of_placement(placement: Placement, rank: int) -> tuple[int, int]:
    """Return the summed ranks, and the number of submodules that all-linear LoRA adapts."""
    if placement.unfreeze:
        raise PlacementError(
            "The placement unfreezes blocks, whose learning rate is not that of adapters. Choose it by a sweep."
        )
    return sum(placement.ranks.get(name, placement.rank or rank) for name in placement.lora), placement.candidates


def _of_model(model: nn.Module) -> tuple[int, int]:
    layers = [module for module in unwrap(model).modules() if isinstance(module, LoraLayer)]
    ranks = [max((layer.r[name] for name in layer.active_adapters if name in layer.r), default=0) for layer in layers]
    return sum(ranks), len(_adaptable(model))


def _of_config(config: LoraConfig, model: nn.Module | None) -> tuple[int, int]:
    if model is None:
        raise PlacementError(
            "A LoraConfig does not say how many modules its targets match: give learning_rate_for the model as well, or "
            "the model with its adapters."
        )
    names = _adaptable(model)
    is_whole = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    pattern: Mapping[str, int] = config.rank_pattern or {}
    ranks = [
        pattern.get(get_pattern_key(list(pattern), name), config.r)
        for name in names
        if is_whole or name in (config.target_parameters or ()) or check_target_module_exists(config, name)
    ]
    return sum(ranks), len(names)


def _adaptable(model: nn.Module) -> list[str]:
    return [entry.name for entry in find_submodules(model) if entry.form in ADAPTABLE]
