"""Compare ways to compute a training step: all positions, targets alone, answers alone, and with caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .cost import Cost, CostModel, Structure, Workload
from .placement import Placement


@dataclass(frozen=True)
class Variant:
    """A way to compute a step, with its predicted cost.

    Args:
        adapters: "all-linear" or "placement".
        name: the computation.
        time: of a step, as a share of the same step with LoRA on every linear layer at all positions; with caches the
            mean over the epochs.
        memory: bytes at the peak of a step; None if the model's weights are not all known.
        cache: bytes that a cache takes for an example, outside the device's memory.
    """

    adapters: str
    name: str
    time: float
    memory: int | None
    cache: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return dict(vars(self))


def step_variants(
    structure: Structure, workload: Workload, placement: Placement | Mapping[str, int] | None = None
) -> tuple[Variant, ...]:
    """Predict time and memory of a step for all-linear LoRA and a placement, by computation.

    Answer-only adapters are priced if the workload has a prompt, and caches if it has more than one epoch. The frozen
    prefix ends below the lowest trained layer, so that all-linear LoRA has none. All figures are predicted.

    Args:
        structure: of the model.
        workload: training step; its `head_on_targets`, `answer_only` and `epochs` are varied.
        placement: a placement of adapters, or their ranks by full name; None for all-linear LoRA alone.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> load = Workload(length=100, prompt=80, epochs=3)
        >>> [variant.name for variant in step_variants(Structure.of(tiny_llama()), load)]
        ['all positions', 'head on targets', 'answer only', 'answer only, prompts cached']
    """
    plain = replace(workload, head_on_targets=False, answer_only=False, epochs=1)
    loads = {"all positions": plain}
    if workload.prompt:
        loads["head on targets"] = replace(plain, head_on_targets=True)
    if workload.epochs > 1:
        loads["frozen prefix cached"] = replace(plain, epochs=workload.epochs)
    if workload.prompt:
        loads["answer only"] = replace(plain, answer_only=True)
        if workload.epochs > 1:
            loads["answer only, prompts cached"] = replace(plain, answer_only=True, epochs=workload.epochs)
    ranks, unfrozen = _trained(placement, workload.rank)
    found = []
    for name, load in loads.items():
        costs = CostModel(structure, load)
        priced: dict[str, Cost] = {"all-linear": costs.all_linear()}
        if ranks or unfrozen:
            priced["placement"] = costs.cost(ranks, unfrozen)
        for adapters, cost in priced.items():
            if name == "frozen prefix cached" and not cost.prefix:
                continue
            tokens = load.prompt if load.answer_only else load.length
            found.append(
                Variant(
                    adapters=adapters,
                    name=name,
                    time=costs.time_ratio(cost),
                    memory=cost.bytes if structure.is_whole else None,
                    cache=cost.cache * tokens if load.epochs > 1 else 0,
                )
            )
    return tuple(sorted(found, key=lambda variant: variant.adapters == "placement"))


def _trained(placement: Placement | Mapping[str, int] | None, rank: int) -> tuple[dict[str, int], Sequence[str]]:
    if isinstance(placement, Placement):
        own = {name: placement.ranks.get(name, placement.rank or rank) for name in placement.lora}
        return own, placement.unfreeze
    return dict(placement or {}), ()
