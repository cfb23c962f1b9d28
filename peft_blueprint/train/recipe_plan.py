"""What a recipe asks of the planner, of transformers and of bitsandbytes, in their words.

Knows recipes, and the planner as a whole; loads no weights and trains nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import psutil
import torch
from peft import LoraConfig
from torch import nn
from transformers import TrainingArguments

from ..blueprint import Blueprint
from ..errors import BlueprintError
from ..place import Budget, CostModel, Placement, Structure, Workload, plan_placement
from .recipe import WISHES, Recipe


RESERVE = 2**30  # bytes of a card for the CUDA context and what the allocator cannot use
_LOG = logging.getLogger(__name__)

_TRAINING = {
    "report_to": "none",
    "save_strategy": "no",
    "remove_unused_columns": False,
    "logging_steps": 5,
    "dataloader_pin_memory": torch.cuda.is_available(),  # without a device to copy to, torch warns
}
_OPTIMIZERS = {  # the cost model's names for transformers'
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_apex_fused"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw_8bit"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "paged_adamw_32bit"),
    "paged_adamw_8bit": "paged_adamw_8bit",
    "sgd": "sgd",
}


@dataclass(frozen=True)
class Plan:
    """What is adapted, and what that is predicted to cost.

    Args:
        placement: None for LoRA on every linear layer.
        time: of a step, over that of LoRA on every linear layer.
        memory: bytes at its peak; None where that is not known.
        kept: share of the predicted gain; None where nothing predicts it.
        lowest: depth at which the backward pass stops.
        learning_rate_scale: factor on what suits LoRA on every linear layer; None where nothing predicts it.
    """

    placement: Placement | None
    time: float | None = None
    memory: int | None = None
    kept: float | None = None
    lowest: int | None = None
    learning_rate_scale: float | None = None


def plan(recipe: Recipe, blueprint: Blueprint | None, model: nn.Module, workload: Workload) -> Plan:
    """The placement that a recipe wishes for, on a model with weights or without.

    Raises:
        PlacementError, MismatchError: as `plan_placement`.
    """
    if isinstance(recipe.placement, str):
        costs = CostModel(Structure.of(model), workload)
        whole = costs.all_linear()
        return Plan(None, 1.0, whole.bytes, 1.0, whole.lowest, 1.0)
    wishes = {name: recipe.placement[name] for name in WISHES if recipe.placement.get(name) is not None}
    placement = plan_placement(
        blueprint,
        model,
        rank=workload.rank,
        workload=workload,
        seed=recipe.seed,
        **wishes | {"budget": budget_of(recipe.placement)},
    )
    cost = placement.cost
    return Plan(
        placement,
        cost.get("time"),
        None if cost.get("memory") is None else int(cost["memory"]),
        placement.kept,
        None if cost.get("lowest") is None else int(cost["lowest"]),
        placement.learning_rate_scale,
    )


def budget_of(placement: Mapping[str, Any]) -> Budget | None:
    """The budget of a recipe's placement, with its memory as the budget's limit.

    Raises:
        PlacementError: if one of the two cannot be read.
        BlueprintError: if both limit the memory.
    """
    wish, memory = placement.get("budget"), placement.get("memory")
    budget = None if wish is None else Budget.of(wish)
    if memory is None:
        return budget
    if budget is not None and budget.memory is not None:
        raise BlueprintError(
            f"placement: memory: {memory} and budget: {budget} both limit the memory: give one of them."
        )
    limit = Budget.of({"memory": available_memory() if memory == "auto" else memory}).memory
    return replace(budget, memory=limit) if budget is not None else Budget(memory=limit)


def available_memory() -> int:
    """Bytes that a run may take: all of the card's but for `RESERVE`; without a card, what the machine has free."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory) - RESERVE
    return int(psutil.virtual_memory().available)


def step_of(
    recipe: Recipe, arguments: TrainingArguments, length: int, *, dtype: torch.dtype, attention: str | None = None
) -> Workload:
    """A training step of a recipe, for the cost model.

    Args:
        recipe: the run.
        arguments: how it is trained.
        length: of its longest example, in tokens.
        dtype: of base weights that are not quantised.
        attention: transformers' name of the model's attention.

    Raises:
        BlueprintError: if the recipe's `workload` is not one.
    """
    quantization = recipe.quantization or {}
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    if optimizer not in _OPTIMIZERS and "optimizer" not in recipe.workload:
        _LOG.warning(
            "The plan counts optim: %s as AdamW; if it holds other states, say workload: optimizer", optimizer
        )
    derived: dict[str, Any] = {
        "batch_size": arguments.per_device_train_batch_size,
        "length": length,
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": _quantization(quantization),
        "double_quant": bool(quantization.get("bnb_4bit_use_double_quant", False)),
        "checkpointing": bool(arguments.gradient_checkpointing),
        "optimizer": _OPTIMIZERS.get(optimizer, "adamw"),
        "rank": rank_of(recipe),
        "attention": "eager" if attention == "eager" else "sdpa",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "padded": arguments.per_device_train_batch_size > 1,
        "input_gradients": False,
    }
    known = [f.name for f in fields(Workload)]
    if unknown := [key for key in recipe.workload if key not in known]:
        raise BlueprintError(f"workload: has unknown keys {unknown}; it may have {', '.join(known)}.")
    if "rank" in recipe.workload:
        raise BlueprintError(
            f"workload: rank: {recipe.workload['rank']} is what lora: r says, {rank_of(recipe)} here: leave it out."
        )
    return Workload(**{**derived, **recipe.workload})


def rank_of(recipe: Recipe) -> int:
    """LoRA's rank."""
    return int(recipe.lora.get("r", LoraConfig.__dataclass_fields__["r"].default))


def unquantized(settings: Mapping[str, Any], placement: Placement) -> dict[str, Any]:
    """The same, with what a placement unfreezes left as it is."""
    skipped = placement.quantization_skip_modules()
    own = settings.get("llm_int8_skip_modules") or []
    return {**settings, "llm_int8_skip_modules": [*skipped, *(name for name in own if name not in skipped)]}


def learning_rate_of(recipe: Recipe, plan: Plan) -> float | None:
    """What the plan wants, where the recipe gives a base to predict it from.

    Raises:
        BlueprintError: if nothing predicts it.
    """
    if recipe.base_learning_rate is None:
        return None
    if plan.learning_rate_scale is None:
        raise BlueprintError(
            f"base_learning_rate: {recipe.base_learning_rate} cannot be scaled to this placement: the blueprint has no "
            "adam_gain for every submodule. Measure one with peft-blueprint generate, or give training's learning_rate."
        )
    return recipe.base_learning_rate * plan.learning_rate_scale


def training_settings(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """`TrainingArguments`' fields: the recipe's, with defaults, under the names of the transformers at hand, and with
    an optimizer that the device has.

    Raises:
        BlueprintError: for reentrant checkpointing, which cannot stop below the lowest adapter.
    """
    settings: dict[str, Any] = {"output_dir": recipe.output, "seed": recipe.seed, "disable_tqdm": not progress}
    settings |= {**_TRAINING, **recipe.training}
    if recipe.stop is not None and recipe.stop.get("metric") != "loss" and "eval_strategy" not in settings:
        settings |= {"eval_strategy": "steps", "eval_steps": 0.05}
    if settings.get("eval_strategy", "no") != "no":
        settings.setdefault("eval_on_start", True)  # what is gained counts from there
    known = {f.name for f in fields(TrainingArguments)}
    new = "activation_checkpointing" in known  # transformers 5's name
    for ending in ("", "_kwargs"):
        names = f"activation_checkpointing{ending}", f"gradient_checkpointing{ending}"
        given = [settings.pop(name) for name in names if name in settings]
        settings[names[0 if new else 1]] = given[0] if given else ({} if ending else False)
    options = settings["activation_checkpointing_kwargs" if new else "gradient_checkpointing_kwargs"]
    if (options or {}).get("use_reentrant"):
        raise BlueprintError(
            "training: use_reentrant: true sends the backward pass to the bottom whatever is placed. Leave it out."
        )
    if "optim" in settings and not torch.cuda.is_available():
        settings["optim"] = _on_cpu(str(settings["optim"]))
    return settings


def _on_cpu(optimizer: str) -> str:
    """An optimizer that a CPU has: bitsandbytes pages on cards only, and its old releases have no 8-bit AdamW here."""
    kind = _OPTIMIZERS.get(optimizer, "")
    if kind not in ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"):
        return optimizer
    taken = "adamw_bnb_8bit" if kind.endswith("8bit") and _has_8bit_adamw_on_cpu() else "adamw_torch"
    if taken != optimizer and kind != "adamw_8bit" or taken == "adamw_torch":
        _LOG.warning("optim: %s does not exist on a CPU: %s is taken instead", optimizer, taken)
    return taken


@cache
def _has_8bit_adamw_on_cpu() -> bool:
    """Whether bitsandbytes takes a step with it: releases differ, and do not say."""
    try:
        from bitsandbytes.optim import AdamW8bit

        weight = nn.Parameter(torch.ones(4096))
        weight.grad = torch.ones(4096)
        AdamW8bit([weight], lr=0.5).step()
        return math.isclose(weight.detach()[0].item(), 0.5, abs_tol=0.1)
    except Exception:  # a release without it raises whatever its loader or its kernels do
        return False


def _quantization(settings: Mapping[str, Any]) -> str | None:
    if settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if settings.get("load_in_8bit") else None
