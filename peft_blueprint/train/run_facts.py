"""Describe a run's model and training arguments for its record, and model its FLOPs per token."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainingArguments

from .._processes import process_count
from .._text import format_names
from ..blueprint import Blueprint, to_dict
from ..errors import BlueprintError
from ..measure import unwrap, versions
from ..place import BlueprintConfig, Cost, CostModel, Structure, workload_of
from ..runs import Quantity, absent, modelled
from .blueprint_callback import trained_parameters


# Arguments of transformers and TRL that are recorded.
_ARGUMENTS = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_steps"),
    *("num_train_epochs", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    *("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16"),
    *("gradient_checkpointing", "activation_checkpointing", "torch_compile", "use_liger_kernel", "seed", "data_seed"),
    *("eval_strategy", "eval_steps", "logging_steps", "save_steps", "metric_for_best_model", "greater_is_better"),
    *("max_length", "packing", "padding_free", "completion_only_loss", "assistant_only_loss", "loss_type"),
)


def facts_of(model: nn.Module, arguments: TrainingArguments | None = None) -> dict[str, Any]:
    """Describe a run before it begins, as a JSON object.

    Args:
        model: the model to train, without wrappers such as DDP.
        arguments: training arguments, if a Trainer trains it.

    Returns:
        `model_id`, `created`, `train_config`, `peft_config`, `placement`, `blueprint`, `versions`, `system`, `seed`,
        `trainable_parameters`, `total_parameters` and `adapter_bytes`, as far as they apply.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> facts_of(tiny_llama())["trainable_parameters"] > 0
        True
    """
    inner = unwrap(model)
    config = getattr(inner, "config", None)
    trained = [p for p in model.parameters() if p.requires_grad]
    facts: dict[str, Any] = {
        "model_id": getattr(config, "_name_or_path", None) or type(inner).__name__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "system": _system(),
        "trainable_parameters": sum(p.numel() for p in trained),
        "total_parameters": _total_parameters(model),
        "adapter_bytes": sum(p.numel() * p.element_size() for p in trained),
        "placement": {"lora": ranks_of(model), "unfreeze": _unfrozen(model)},
    }
    if revision := getattr(config, "_commit_hash", None):
        facts["model_revision"] = revision
    if arguments is not None:
        known = arguments.to_dict()
        facts["train_config"] = {name: known[name] for name in _ARGUMENTS if known.get(name) is not None}
        facts["train_config"]["processes"] = arguments.world_size
        facts["seed"] = arguments.seed
    if isinstance(model, PeftModel):
        adapter = model.peft_config[model.active_adapter]
        if isinstance(adapter, BlueprintConfig):
            given = adapter.blueprint
            if given is not None:
                facts["blueprint"] = to_dict(given) if isinstance(given, Blueprint) else given
            adapter = adapter.to_lora_config()
        facts["peft_config"] = {k: sorted(v) if isinstance(v, set) else v for k, v in adapter.to_dict().items()}
    return facts


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Return the ranks of the active LoRA adapters, by their submodules' names in the unwrapped model."""
    inner = unwrap(model)
    found: dict[str, int] = {}
    for path, module in inner.named_modules():
        if not isinstance(module, LoraLayer) or not isinstance(module, BaseTunerLayer):
            continue
        names = [part for part in path.split(".") if part != "base_layer"]
        name = ".".join([*names, module.parameter_name] if isinstance(module, ParamWrapper) else names)
        rank = sum(int(module.r[adapter]) for adapter in module.active_adapters if adapter in module.r)
        if rank:
            found[name] = rank
    return found


def modelled_flops(model: nn.Module, batch_size: int, length: int) -> Quantity:
    """Model the FLOPs per token of a training step.

    Covers LoRA adapters and submodules that are trained whole. If anything else is trained, the result is that of a
    pass through the whole model, without the adapters' own operations.

    Args:
        model: the model to train, without wrappers.
        batch_size: examples of a micro-batch.
        length: tokens of an example, padding included.

    Returns:
        The quantity; absent if the cost model cannot read the model.
    """
    step = workload_of(model, batch_size=max(1, batch_size), length=max(1, length), padded=batch_size > 1)
    if ranks := ranks_of(model):
        step = replace(step, rank=max(ranks.values()))
    try:
        cost, note = _cost(CostModel(Structure.of(unwrap(model)), step), model, ranks)
    except BlueprintError as error:
        return absent(f"the cost model cannot read this {type(unwrap(model)).__name__}: {error}")
    return modelled(cost.flops, f"CostModel for {batch_size} × {length} tokens{note}")


def _cost(costs: CostModel, model: nn.Module, ranks: Mapping[str, int]) -> tuple[Cost, str]:
    known = {part.name for part in costs.structure.parts}
    whole, other = set(), set()
    for name, part, _ in trained_parameters(model):
        if part == "adapter":
            other |= set() if name in ranks else {name}
        else:
            own = {name} & known or {n for n in known if n.startswith(f"{name}.")}
            whole |= own
            other |= set() if own else {name}
    if not other:
        adapters = {name: rank for name, rank in ranks.items() if name not in whole}
        return costs.cost(adapters, whole), ""
    return costs.floor(), f", leaving out the training of {format_names(sorted(other))}"


def _unfrozen(model: nn.Module) -> list[str]:
    """Return the modules that PEFT trains whole; none for a model without PEFT."""
    if not isinstance(model, PeftModel):
        return []
    return sorted({name for name, part, _ in trained_parameters(model) if part == "weight"})


def _total_parameters(model: nn.Module) -> int:
    """Count the weights of base model and adapters, unpacking those held in 4 bits."""
    if isinstance(model, PeftModel):
        return int(model.get_nb_trainable_parameters()[1])
    return sum(p.numel() for p in model.parameters())


def _system() -> dict[str, Any]:
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "processes": process_count(),
        "devices": [platform.processor() or platform.machine()],
    }
    if torch.cuda.is_available():
        found["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found
