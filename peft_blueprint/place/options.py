"""Options of a placement as one dataclass for Python, `BlueprintConfig`, the command line and YAML; needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, get_args

from .._options import require_types
from ..errors import PlacementError
from .budget import Budget
from .experts import ExpertCount, ExpertsBy


Mode = Literal["lora", "unfreeze", "lora+unfreeze"]
Coverage = Literal["none", "kind", "kind+depth"]
Ranks = Literal["uniform", "equal_parameters", "score"]
RankBy = Literal[
    "gradient_norm",
    "within_kind",
    "per_root_parameter",
    "relative_gradient_norm",
    "signal_norm",
    "signal_to_noise",
    "influence",
    "weight_gradient",
    "singular_energy",
    "adam_gain",
    "cover_gain",
    "set_gain",
    "random",
    "even",
    "first",
    "last",
]

Best = Literal["gain_per_cost", "gain_per_gb_hour"]

DEFAULT_RANK = 16
K_STAR = "k_star"


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class PlacementOptions:
    """How many submodules to choose, by which score, and with which ranks.

    Give at most one of the selectors `fraction`, `num_modules`, `top_p` and `threshold`; or `budget` with `keep` or
    `best`, or one of these. Without any, adapters go on a seventh of the submodules, about one to a block, with at most the parameters of LoRA on
    every linear layer. That default needs Adam's gain in the blueprint, shapes, `coverage="kind+depth"`, and neither
    `r` nor `ranks`; otherwise it is `keep=0.95`, and `fraction=0.2` for blocks, for another coverage and for blueprints
    without shapes.

    Not frozen, because `BlueprintConfig` inherits the fields and PEFT's `LoraConfig` is not frozen either. Each field's
    help is in its metadata.

    Raises:
        PlacementError: for two selectors, a value out of range, or a budget that cannot be read.

    Example:
        >>> from peft_blueprint.place import PlacementOptions
        >>> PlacementOptions(fraction=0.2, num_modules=3)
        Traceback (most recent call last):
        peft_blueprint.errors.PlacementError: fraction=0.2 and num_modules=3 both say how many submodules: give one.
    """

    mode: Mode = _option("lora", "Place LoRA adapters, unfreeze whole attention and feed-forward blocks, or both.")
    fraction: float | Literal["k_star"] | None = _option(
        None,
        "Share of the submodules (of the blocks in mode unfreeze), in (0, 1]; or k_star, as many as have the blueprint's k* "
        "of the parameters. Default without another size, budget, keep or best: 1/7 with the defaults of rank_by and ranks, otherwise keep=0.95; 0.2 for blocks, for another coverage and "
        "without shapes.",
    )
    num_modules: int | None = _option(None, "Number of submodules (of blocks in mode unfreeze).")
    top_p: float | None = _option(
        None, "Fewest submodules that hold this share of the summed score in each stratum of the coverage, in (0, 1]."
    )
    threshold: float | None = _option(
        None, "Every submodule whose score is at least this; the coverage then has no effect."
    )
    budget: Budget | str | Mapping[str, Any] | None = _option(
        None,
        "Upper limits: '12GiB' at the peak of a step, '0.7x' of all-linear LoRA's step time, '2M parameters', '42 modules', "
        "or several with commas.",
    )
    keep: float | None = _option(
        None, "Share of all-linear LoRA's predicted gain to retain at the lowest step time, in (0, 1]."
    )
    best: Best | None = _option(
        None,
        "As many as give the most predicted gain per cost (eq. 8), within the budget if one is given: gain_per_cost, by the "
        "step time; gain_per_gb_hour, by the step time times the memory at its peak.",
    )
    overhead: float = _option(
        0.0,
        "With best: cost beside the training steps, such as of measuring and choosing, as a share of training all "
        "submodules.",
    )
    rank_by: RankBy | None = _option(
        None,
        "Score to rank by. Default: cover_gain for adapters, adam_gain for other choices, and gradient_norm (the paper's) "
        "if the blueprint lacks Adam's gain.",
    )
    per_cost: bool = _option(False, "Divide the score by the step time that an adapter takes; best does so too.")
    coverage: Coverage = _option("kind+depth", "What to spread the choice over; none is the paper's rule.")
    fused: bool = _option(
        False,
        "Place q, k and v of a layer together, and gate, up and down, as the fused LoRA kernels of Unsloth and axolotl need; "
        "num_modules and fraction still count adapters.",
    )
    experts: str | float | None = _option(
        None,
        "Experts to adapt in each layer of a mixture, beside the other adapters: a number, a share below 1, or top_p=0.9, the "
        "fewest that hold this share. Default, for a blueprint of single fused experts: as many as the budget allows, or 0.1.",
    )
    experts_by: ExpertsBy | None = _option(
        None,
        "Score of experts: token_share or gate_weight of the routing (ESFT), adam_gain or gradient_norm. Default: the first that "
        "was measured.",
    )
    unfreeze_blocks: int | None = _option(None, "Number of blocks to unfreeze in mode lora+unfreeze. Default: 1.")
    r: int | None = _option(
        None,
        "Rank of the adapters, or of the all-linear LoRA they are compared with. Default: 16, or 8, 4, 2, 1 if a budget of "
        "parameters would otherwise leave few adapters.",
    )
    ranks: Ranks | None = _option(
        None,
        "uniform; equal_parameters, the highest rank of vLLM's list within the parameters of all-linear LoRA of rank r; or score, higher where the "
        "score is, r on average. Default: equal_parameters in mode lora if shapes are known and neither r nor a budget of "
        "parameters is given, otherwise uniform.",
    )
    seed: int = _option(0, "Seed of rank_by=random.")

    def __post_init__(self) -> None:
        self._check_fraction()
        require_types(self, PlacementOptions, PlacementError)
        choices = {"mode": Mode, "coverage": Coverage, "ranks": Ranks, "rank_by": RankBy, "best": Best}
        choices["experts_by"] = ExpertsBy
        for name, literal in choices.items():
            value = getattr(self, name)
            is_optional = name in ("ranks", "rank_by", "best", "experts_by")
            if value not in get_args(literal) and not (value is None and is_optional):
                *others, last = get_args(literal)
                raise PlacementError(f"{name} must be {', '.join(others)} or {last}, got {value!r}.")
        sizes = [f"{name}={value}" for name, value in self.selector.items()]
        if len(sizes) > 1:
            raise PlacementError(f"{' and '.join(sizes)} both say how many submodules: give one.")
        wishes = ("budget", "keep", "best")
        limits = [f"{name}={getattr(self, name)!r}" for name in wishes if getattr(self, name) is not None]
        if limits and sizes:
            raise PlacementError(f"{limits[0]} and {sizes[0]} both say how much to place: give one.")
        if self.keep is not None and self.best is not None:
            raise PlacementError(f"keep={self.keep} and best={self.best!r} both say how much to place: give one.")
        if not 0 <= self.overhead < math.inf:
            raise PlacementError(f"overhead must be a finite number of at least 0, got {self.overhead}.")
        if self.overhead and self.best is None:
            raise PlacementError(f"overhead={self.overhead} counts only with best: give best='gain_per_cost'.")
        for name in ("top_p", "keep"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise PlacementError(f"{name} must be in (0, 1], got {value}.")
        for name in ("num_modules", "r", "unfreeze_blocks"):
            value = getattr(self, name)
            if value is not None and (value != int(value) or value < 1):
                raise PlacementError(f"{name} must be a positive integer, got {value}.")
        if self.threshold is not None and not (self.threshold >= 0 and math.isfinite(self.threshold)):
            raise PlacementError(f"threshold must be a finite number of at least 0, got {self.threshold}.")
        if self.rank_by == "even" and (self.top_p is not None or self.threshold is not None):
            raise PlacementError(
                f"{sizes[0]} needs scores, and rank_by='even' has none: give fraction or num_modules."
            )
        if self.unfreeze_blocks is not None and self.mode != "lora+unfreeze":
            raise PlacementError(
                f"unfreeze_blocks={self.unfreeze_blocks} needs mode='lora+unfreeze', got mode={self.mode!r}."
            )
        if self.fused and self.mode == "unfreeze":
            raise PlacementError("fused=True is for adapters, and mode='unfreeze' places none: leave fused out.")
        if self.experts is not None:
            ExpertCount.of(self.experts)
            if self.mode != "lora":
                raise PlacementError(
                    f"experts={self.experts} is for mode='lora', got mode={self.mode!r}. Train experts whole with "
                    "peft_blueprint.train.unfreeze_experts."
                )
        if self.budget is not None:
            Budget.of(self.budget)

    def _check_fraction(self) -> None:
        value = self.fraction
        if value is None or isinstance(value, str) and value == K_STAR:
            return
        if isinstance(value, bool) or not isinstance(value, Real):
            kind = "text" if isinstance(value, str) else type(value).__name__
            raise PlacementError(
                f"fraction must be a number, got {value!r} ({kind}). Give a share in (0, 1], or 'k_star' for the "
                "blueprint's own."
            )
        if not 0 < value <= 1:
            raise PlacementError(f"fraction must be in (0, 1], got {value}.")

    @property
    def selector(self) -> dict[str, Any]:
        """The selector that is given, by name; empty if there is none."""
        values = {name: getattr(self, name) for name in ("fraction", "num_modules", "top_p", "threshold")}
        return {name: value for name, value in values.items() if value is not None}
