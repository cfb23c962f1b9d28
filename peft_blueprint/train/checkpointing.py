"""Gradient checkpointing whose backward pass stops below the lowest adapter."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import PlacementError


# Forward hooks of transformers and PEFT on embeddings. They only call requires_grad_ on the output.
_INPUT_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")


def checkpoint_above(model: nn.Module, **options: Any) -> int:
    """Turn on gradient checkpointing, and let the backward pass stop below the lowest trained submodule.

    When checkpointing is turned on, transformers and PEFT make the embeddings' output require a gradient. The backward
    pass, and with it the second forward pass of every block, then runs to the bottom wherever the adapters are. Only
    reentrant checkpointing needs that. With `use_reentrant=False`, set here, losses and gradients are the same without.

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

    Add it as in `SFTTrainer(..., args=SFTConfig(gradient_checkpointing=True), callbacks=[CheckpointAbove()])`. It acts
    when training begins, after checkpointing was turned on, and only if the arguments ask for checkpointing.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call `checkpoint_above` with the arguments' checkpointing options."""
        if args.gradient_checkpointing and kwargs.get("model") is not None:
            options = args.gradient_checkpointing_kwargs
            checkpoint_above(kwargs["model"], **(options if isinstance(options, dict) else {}))
