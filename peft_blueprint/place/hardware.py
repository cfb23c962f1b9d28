"""Plan a placement for each combination of quantization and gradient checkpointing, and recommend one for a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from .._options import from_keywords
from ..blueprint import Blueprint
from ..errors import PlacementError
from .budget import Budget
from .cost import CostModel, Structure, Workload, workload_of
from .options import PlacementOptions
from .placement import Placement
from .planner import as_module, plan_placement
from .solver import DEFAULT_SPARSE_FRACTION


@dataclass(frozen=True)
class Setting:
    """One way to hold the base model, and the placement that then fits.

    Args:
        quantization: of the base weights, such as "nf4", or None.
        checkpointing: whether activations are recomputed in the backward pass.
        all_linear: bytes that LoRA on every linear layer takes.
        placement: the best that fits; None if nothing does.
        time: of its step, over that of LoRA on every linear layer in the first setting, whether that fits or not.
        reason: why nothing fits.
    """

    quantization: str | None
    checkpointing: bool
    all_linear: int
    placement: Placement | None
    time: float | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object with the placement's costs."""
        placement = self.placement
        costs = {} if placement is None else {**placement.cost, "gain_retained": placement.gain_retained}
        return {
            "quantization": self.quantization or "none",
            "checkpointing": self.checkpointing,
            "all_linear_memory": self.all_linear,
            "fits": placement is not None,
            **costs,
            **({} if placement is None else {"gain_measured": placement.is_gain_measured}),
            **({} if self.time is None else {"time": self.time}),
        }


def plan_settings(
    blueprint: Blueprint | None,
    model: Any,
    options: PlacementOptions | None = None,
    *,
    workload: Workload | None = None,
    quantizations: Sequence[str | None] | None = None,
    checkpointings: Sequence[bool] = (False, True),
    **keywords: Any,
) -> tuple[Setting, ...]:
    """Plan a placement for every setting in which one fits.

    Without `keep`, `best` or a size, a budget gets `best="gain_per_cost"`: the most gain per step time that it allows.
    Without a blueprint no gain is known, and the placement is the default's size, spread evenly, if that fits the budget.

    With checkpointing the backward pass is assumed to stop below the lowest adapter, as `CheckpointAbove` makes it do.

    Args:
        blueprint: None to place evenly.
        model: a model, also on the meta device, or a config.
        options: as for `plan_placement`, usually with a budget of memory.
        workload: a training step; its quantization and checkpointing are replaced by each setting's.
        quantizations: to try; by default that of a quantized checkpoint, otherwise none and "nf4".
        checkpointings: to try.
        **keywords: fields of `PlacementOptions`, on top of `options`.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> settings = plan_settings(None, tiny_llama(), budget="1GiB")
        >>> recommend_setting(settings).quantization is None
        True
    """
    options = from_keywords(PlacementOptions, options, keywords, PlacementError)
    model = as_module(model)
    structure = Structure.of(model)
    if quantizations is None:
        stored = workload_of(model).quantization
        quantizations = (None, "nf4") if stored is None else (stored,)
    settings = []
    reference: float | None = None
    for quantization, checkpointing in product(quantizations, checkpointings):
        load = replace(
            workload or Workload(), quantization=quantization, checkpointing=checkpointing, input_gradients=False
        )
        costs = CostModel(structure, load)
        whole = costs.all_linear()
        reference = reference or costs.step_time(whole)
        try:
            placement = _plan(blueprint, model, options, load)
        except PlacementError as error:
            settings.append(Setting(quantization, checkpointing, whole.bytes, None, reason=str(error)))
            continue
        time = placement.cost["time"] * costs.step_time(whole) / reference
        settings.append(Setting(quantization, checkpointing, whole.bytes, placement, time))
    return tuple(settings)


def recommend_setting(settings: Sequence[Setting]) -> Setting:
    """Return the setting with the most gain per step time; without a blueprint, the fastest that holds the default's size.

    The coverage stands in for a gain that was not measured.

    Raises:
        PlacementError: if nothing fits in any setting, with the reason of the last, which takes the least memory.

    Example: see `plan_settings`.
    """
    fitting = [(setting, setting.placement) for setting in settings if setting.placement is not None]
    if not fitting:
        raise PlacementError(f"Nothing fits in any setting. In the last one: {settings[-1].reason}")

    def value(setting: Setting, placement: Placement) -> tuple[bool, float]:
        return "fraction" in placement.selector, (placement.gain_retained or 0.0) / (setting.time or 1.0)

    return max(fitting, key=lambda pair: value(*pair))[0]


def _plan(blueprint: Blueprint | None, model: Any, options: PlacementOptions, load: Workload) -> Placement:
    """Plan for one setting, by the rule in `plan_settings`."""
    if options.keep is None and options.best is None and not options.selector and options.mode == "lora":
        if blueprint is None:
            raised = options.ranks or ("uniform" if options.r else "equal_parameters")
            sparse = replace(options, budget=None, fraction=DEFAULT_SPARSE_FRACTION, ranks=raised)
            placement = plan_placement(None, model, sparse, workload=load)
            if options.budget is None or not Budget.of(options.budget).exceeded(placement.cost):
                return placement
        if blueprint is not None and options.budget is not None:
            options = replace(options, best="gain_per_cost")
    return plan_placement(blueprint, model, options, workload=load)
