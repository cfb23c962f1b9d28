"""What a run's record says of its model and its arguments, and the FLOPs per token that its model is reckoned to take.

Reads a live model, with or without PEFT's adapters, and TrainingArguments. Knows nothing of what was spent.
"""

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
from ..place import BlueprintConfig, Cost, CostModel, Structure, Workload, workload_of
from ..runs import Figure, absent, modelled
from .blueprint_callback import trained_parameters


# Of transformers' and TRL's arguments, those that say what a run was.
_ARGUMENTS = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_steps"),
    *("num_train_epochs", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    *("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16"),
    *("gradient_checkpointing", "activation_checkpointing", "torch_compile", "use_liger_kernel", "seed", "data_seed"),
    *("eval_strategy", "eval_steps", "logging_steps", "save_steps", "metric_for_best_model", "greater_is_better"),
    *("max_length", "packing", "padding_free", "completion_only_loss", "assistant_only_loss", "loss_type"),
)


def facts_of(model: nn.Module, arguments: TrainingArguments | None = None) -> dict[str, Any]:
    """What is known of a run before it begins, as JSON can hold it.

    Args:
        model: as it is trained, without wrappers such as DDP.
        arguments: how it is trained, if by a Trainer.

    Returns:
        `model_id`, `created`, `train_config`, `peft_config`, `placement`, `blueprint`, `versions`, `system`, `seed`,
        `trainable_parameters`, `total_parameters` and `adapter_bytes`; what does not apply is left out.
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
        facts["peft_config"] = _sorted_sets(adapter.to_dict())
    return facts


def ranks_of(model: nn.Module) -> dict[str, int]:
    """The ranks of a model's active LoRA adapters, by their submodules' names in the unwrapped model."""
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


def modelled_flops(model: nn.Module, batch_size: int, length: int, **workload: Any) -> Figure:
    """FLOPs per token of a training step, from the cost model.

    Of LoRA adapters and of what is trained whole; where something else is trained, of a pass through the whole model
    that leaves the adapters' own operations out.

    Args:
        model: as it is trained, without wrappers.
        batch_size: examples of a micro-batch.
        length: its tokens per example, padding included.
        **workload: `Workload`'s other fields, where they are not what the model says.

    Returns:
        The figure, absent if the structure cannot be read.
    """
    step = workload_of(model, batch_size=max(1, batch_size), length=max(1, length), padded=batch_size > 1, **workload)
    ranks = ranks_of(model)
    try:
        cost, note = _cost(CostModel(Structure.of(unwrap(model)), _with_rank(step, ranks)), model, ranks)
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
    return costs.floor(), f", without what is trained at {format_names(sorted(other))}"


def _with_rank(step: Workload, ranks: Mapping[str, int]) -> Workload:
    return replace(step, rank=max(ranks.values())) if ranks else step


def _unfrozen(model: nn.Module) -> list[str]:
    """Modules trained whole: as PEFT's config names them, and none where all of a model is trained."""
    if not isinstance(model, PeftModel):
        return []
    return sorted({name for name, part, _ in trained_parameters(model) if part == "weight"})


def _total_parameters(model: nn.Module) -> int:
    """Weights of the base model and of adapters; those held in 4 bits count one by one."""
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


def _sorted_sets(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: sorted(v) if isinstance(v, set) else v for key, v in values.items()}
