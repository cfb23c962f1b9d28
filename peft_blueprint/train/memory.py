"""Save memory: checkpoint activations only above the lowest adapter, and release the originals of unfrozen blocks."""

from __future__ import annotations

from itertools import chain
from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._text import format_names
from ..errors import PlacementError


# Forward hooks of transformers and PEFT on embeddings. They only call requires_grad_ on the output.
_INPUT_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")


def checkpoint_above(model: nn.Module, **options: Any) -> int:
    """Turn on gradient checkpointing, and let the backward pass stop below the lowest trained submodule.

    When checkpointing is turned on, transformers and PEFT make the embeddings' output require a gradient. The backward
    pass, and with it the second forward pass of every block, then runs to the bottom wherever the adapters are. Only
    reentrant checkpointing needs that. With `use_reentrant=False`, set here, losses and gradients are the same without.

    Activated LoRA keeps the hooks, because PEFT hands its offsets to a block's second pass only if the block's input
    takes a gradient.

    Call it after `get_peft_model`. Turning checkpointing on again restores the hooks, which is what `Trainer.train`
    does: with a Trainer, use `CheckpointAbove`.

    Args:
        model: a model with its adapter.
        **options: options of `torch.utils.checkpoint.checkpoint`, or transformers 5's `every_n_layers` and `offload`.

    Returns:
        Number of hooks removed from the embeddings.

    Raises:
        PlacementError: for `use_reentrant=True`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_blueprint.testing import tiny_llama
        >>> model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["layers.3.mlp.up_proj"]))
        >>> checkpoint_above(model) >= 1
        True
    """
    if options.pop("use_reentrant", False):
        raise PlacementError(
            "use_reentrant=True sends the backward pass to the bottom wherever the adapters are. Leave it out."
        )
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5 on
    of_layers = {key: options.pop(key) for key in ("every_n_layers", "offload") if key in options}
    (enable or model.gradient_checkpointing_enable)({**options, "use_reentrant": False}, **of_layers)  # type: ignore[operator]
    if any(getattr(config, "alora_invocation_tokens", None) for config in getattr(model, "peft_config", {}).values()):
        model.enable_input_require_grads()  # type: ignore[operator]
        return 0
    return release_inputs(model)


def release_inputs(model: nn.Module) -> int:
    """Remove every hook that makes the embeddings' output require a gradient.

    `model.disable_input_require_grads()` removes only the last one, and a QLoRA run registers several.

    Returns:
        Number of hooks removed.
    """
    released = 0
    for module in model.modules():
        for key, hook in tuple(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in _INPUT_HOOKS:
                del module._forward_hooks[key]
                released += 1
    return released


class CheckpointAbove(TrainerCallback):
    """Make a Trainer's own gradient checkpointing stop below the lowest adapter, also in TRL.

    It acts when training begins, after checkpointing was turned on, and only if the arguments ask for checkpointing.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import Trainer, TrainingArguments
        >>> from peft_blueprint.testing import tiny_llama
        >>> model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["layers.3.mlp.up_proj"]))
        >>> trainer = Trainer(model, TrainingArguments("run"), callbacks=[CheckpointAbove()])
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call `checkpoint_above` with the arguments' checkpointing options."""
        if args.gradient_checkpointing and kwargs.get("model") is not None:
            options = args.gradient_checkpointing_kwargs
            checkpoint_above(kwargs["model"], **(options if isinstance(options, dict) else {}))


def share_base(model: nn.Module, adapter_name: str = "default") -> int:
    """Release the frozen original of every unfrozen block, and use the trained copy in its place.

    PEFT unfreezes blocks with `modules_to_save`, which trains a copy and keeps the original. Call this once, after
    `get_peft_model` or `PeftModel.from_pretrained`. The trained parameters stay the same objects, so an existing
    optimizer remains valid. Training, saving, loading, resuming and merging work as before.

    In these blocks, `disable_adapter()` and `unload()` then give the trained weights rather than the base model's. Do
    not use it where the model without its adapter is the reference, as in DPO or GRPO without a reference model. An
    adapter added later starts from the blocks' current weights, and as trainable: call
    `model.set_requires_grad("ref", False)` to keep a reference adapter out of optimizers.

    Args:
        model: a model with the adapter, possibly wrapped further.
        adapter_name: adapter whose blocks are shared.

    Returns:
        Bytes of parameters and buffers released. Storage still in use, such as a head tied to the embedding, does not
        count. 0 on a second call.

    Raises:
        PlacementError: if the model or this adapter has no unfrozen blocks, or the blocks are shared with another
            adapter already.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_blueprint.testing import tiny_llama
        >>> model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["layers.3.mlp"]))
        >>> share_base(model) > 0
        True
    """
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    if not wrappers:
        raise PlacementError(
            f"This {type(model).__name__} has no unfrozen blocks. Unfreeze some with "
            'BlueprintConfig(mode="lora+unfreeze") or PEFT\'s modules_to_save.'
        )
    own = {name: module for name, module in wrappers.items() if adapter_name in module.modules_to_save}
    if not own:
        known = sorted({adapter for module in wrappers.values() for adapter in module.modules_to_save})
        raise PlacementError(
            f"The adapter {adapter_name!r} has no unfrozen blocks in this {type(model).__name__}. Adapters with "
            f"unfrozen blocks: {format_names(known)}."
        )
    taken = {
        name: adapter
        for name, module in own.items()
        for adapter, copy in module.modules_to_save.items()
        if adapter != adapter_name and copy is module.original_module
    }
    if taken:
        raise PlacementError(
            f"The adapter {next(iter(taken.values()))!r} already replaces the originals of {format_names(list(taken))}, "
            f"so {adapter_name!r} cannot. Keep both copies."
        )
    before = _storage_bytes(model)
    for module in own.values():
        module.original_module = module.modules_to_save[adapter_name]
    return before - _storage_bytes(model)


def _storage_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, counting shared storage once."""
    storages = {}
    for tensor in chain(model.parameters(), model.buffers()):
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
