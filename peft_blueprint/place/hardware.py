"""What fits a card: a placement for every setting of quantisation and checkpointing, under one limit of memory.

Asks the planner once a setting. Knows nothing of cards themselves, or of PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ..blueprint import Blueprint
from ..errors import PlacementError
from .cost import CostModel, Structure, Workload
from .placement import Placement
from .planner import as_module, plan_placement
from .solver import DEFAULT_KEEP


@dataclass(frozen=True)
class Setting:
    """One way to hold the base model, and what then fits.

    Args:
        quantization: of the base weights, "nf4" say, or None.
        checkpointing: whether activations are computed again in the backward pass.
        all_linear: bytes that LoRA on every linear layer takes.
        placement: the best that fits; None where nothing does.
        time: of its step, over that of LoRA on every linear layer of the first setting, whether that fits or not.
        reason: why nothing fits.
    """

    quantization: str | None
    checkpointing: bool
    all_linear: int
    placement: Placement | None
    time: float | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A JSON object; of the placement its costs alone."""
        costs = (
            {} if self.placement is None else {**self.placement.cost, "gain_retained": self.placement.gain_retained}
        )
        return {
            "quantization": self.quantization or "none",
            "checkpointing": self.checkpointing,
            "all_linear_memory": self.all_linear,
            "fits": self.placement is not None,
            **costs,
            **({} if self.time is None else {"time": self.time}),
        }


def what_fits(
    blueprint: Blueprint | None,
    model: Any,
    budget: Mapping[str, Any],
    workload: Workload | None = None,
    *,
    quantizations: Sequence[str | None] = (None, "nf4"),
    checkpointings: Sequence[bool] = (False, True),
    **options: Any,
) -> tuple[Setting, ...]:
    """A placement for every setting, as far as one fits.

    With checkpointing the backward pass is taken to stop below the lowest adapter, as without; it does with
    `checkpointing.CheckpointAbove`.

    Args:
        blueprint: None to place evenly.
        model: a model, also on the meta device, or a config.
        budget: see `Budget.of`; with a limit of memory, as a rule.
        workload: what a step is; its quantisation and checkpointing are replaced by each setting's.
        quantizations: to try.
        checkpointings: to try.
        **options: for `plan_placement`.
    """
    model = as_module(model)
    structure = Structure.of(model)
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
            placement = plan_placement(blueprint, model, budget=budget, workload=load, **options)
        except PlacementError as error:
            settings.append(Setting(quantization, checkpointing, whole.bytes, None, reason=str(error)))
            continue
        time = placement.cost["time"] * costs.step_time(whole) / reference
        settings.append(Setting(quantization, checkpointing, whole.bytes, placement, time))
    return tuple(settings)


def recommended(settings: Sequence[Setting]) -> Setting:
    """Of those that keep enough of the gain the fastest; if none does, the one that keeps most.

    Raises:
        PlacementError: if nothing fits in any setting, with the last one's reason, which asks for least.
    """
    fitting = [setting for setting in settings if setting.placement is not None]
    if not fitting:
        raise PlacementError(f"Nothing fits in any setting. In the last one: {settings[-1].reason}")

    def gain_retained(setting: Setting) -> float:
        assert setting.placement is not None and setting.placement.gain_retained is not None
        return setting.placement.gain_retained

    enough = [setting for setting in fitting if gain_retained(setting) >= DEFAULT_KEEP - 1e-9]
    return min(enough, key=lambda setting: setting.time or 0.0) if enough else max(fitting, key=gain_retained)
