"""Gradient checkpointing whose backward pass stops below the lowest adapter.

Knows transformers' models and its Trainer, and nothing of what is placed or why.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import PlacementError


# transformers' and PEFT's hooks on embeddings, which do nothing but call requires_grad_ on the output
_INPUT_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")


def checkpoint_above(model: nn.Module, **options: Any) -> int:
    """Turn gradient checkpointing on, and let the backward pass stop below the lowest trained submodule.

    transformers and PEFT make the embeddings' output require a gradient whenever checkpointing is turned on. Then the
    backward pass, and with it the second forward pass of every block, runs to the bottom wherever the adapters are.
    Only reentrant checkpointing needs that; with `use_reentrant=False`, which is set here, losses and gradients are the
    same without. Call it after `get_peft_model`; what turns checkpointing on again later, as `Trainer.train` does, also
    brings the hooks back, so with a Trainer use `CheckpointAbove`.

    Args:
        model: with the adapter on it.
        **options: of `torch.utils.checkpoint.checkpoint`, or `every_n_layers` and `offload`, which transformers 5 knows.

    Returns:
        How many hooks were taken off the embeddings.

    Raises:
        PlacementError: for `use_reentrant=True`.
    """
    if options.pop("use_reentrant", False):
        raise PlacementError(
            "use_reentrant=True sends the backward pass to the bottom whatever is placed. Leave it out, or say False."
        )
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5 on
    of_layers = {key: options.pop(key) for key in ("every_n_layers", "offload") if key in options}
    (enable or model.gradient_checkpointing_enable)({**options, "use_reentrant": False}, **of_layers)  # type: ignore[operator]
    return release_inputs(model)


def release_inputs(model: nn.Module) -> int:
    """Let the embeddings' output require no gradient of its own any more, however often that was asked for.

    `model.disable_input_require_grads()` undoes the last request alone, and several are made on the way to a QLoRA run.

    Returns:
        How many hooks were taken off.
    """
    released = 0
    for module in model.modules():
        for key, hook in tuple(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in _INPUT_HOOKS:
                del module._forward_hooks[key]
                released += 1
    return released


class CheckpointAbove(TrainerCallback):
    """Makes a Trainer's own gradient checkpointing stop below the lowest adapter, also in TRL.

    `SFTTrainer(..., args=SFTConfig(gradient_checkpointing=True), callbacks=[CheckpointAbove()])`. It acts when training
    begins, after everything that turns checkpointing on, and only if the arguments ask for it.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by the Trainer."""
        if args.gradient_checkpointing and model is not None:
            options = args.gradient_checkpointing_kwargs
            checkpoint_above(model, **(options if isinstance(options, dict) else {}))
