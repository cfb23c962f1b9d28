"""Compute a causal model's head on the positions that have a target, in place of all positions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from peft import PeftModel
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import BlueprintError
from ..measure import IGNORED, restored_attributes


Model = TypeVar("Model", bound=nn.Module)


def head_on_targets(model: Model) -> Model:
    """Make a causal model's loss compute the head on target positions only, in place.

    The logits of a batch are the largest tensor of a step: 8 examples of 1,000 tokens take 1.6 GB in float32 with a
    vocabulary of 49,152. Only positions whose next token is a target need them. The loss and its gradients stay equal.
    The Trainer of transformers and own loops work unchanged. With TRL's SFTTrainer use TRL's own, which is built in.

    It acts in training mode when labels are given. `outputs.logits` then has the shape (1, targets, vocabulary).
    Evaluation and generation stay as they are.

    Args:
        model: a transformers causal model, or a `PeftModel` around one. Its class becomes a subclass of itself.

    Returns:
        The same model.

    Raises:
        BlueprintError: for a model without output embeddings, or an encoder-decoder model. When the model runs: for a
            loss that is not computed by the model's `loss_function`, or takes no `shift_labels`.

    Example:
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> model = head_on_targets(tiny_llama()).train()
        >>> outputs = model(**toy_batches()[0])
        >>> outputs.logits.shape
        torch.Size([1, 26, 97])
    """
    base = causal_model_of(model)
    if not isinstance(base, _TargetHead):
        change_class(base, _TargetHead)
    return model


def causal_model_of(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model with a head inside a model or `PeftModel`.

    Raises:
        BlueprintError: if it is not a decoder with output embeddings.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    name = type(base).__name__
    if not isinstance(base, PreTrainedModel) or base.get_output_embeddings() is None:
        raise BlueprintError(f"model must be a transformers causal language model, got {name}.")
    if base.config.is_encoder_decoder:
        raise BlueprintError(
            f"model must be a decoder-only causal language model, got {name}, which has an encoder. Train it as usual."
        )
    return base


def change_class(model: nn.Module, mixin: Any) -> None:
    """Put a mixin in front of a model's class, which keeps its name."""
    cls = type(model)

    @functools.wraps(cls.forward)  # Trainer and `generate` read the arguments' names
    def forward(self: nn.Module, *args: Any, **keywords: Any) -> Any:
        return mixin.forward(self, *args, **keywords)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "forward": forward}
    model.__class__ = type(cls.__name__, (mixin, cls), names)


@contextmanager
def selected_targets(model: PreTrainedModel, targets: Tensor) -> Iterator[None]:
    """Let the model compute logits and loss where `targets` has one; inside, its `labels` only switch the loss on.

    Args:
        model: with output embeddings.
        targets: (rows, positions), the next token of every position, -100 where it is not a target.

    Raises:
        BlueprintError: if the model computes its loss in another way.
    """
    base_loss = model.loss_function
    name = type(model).__name__
    if "shift_labels" not in inspect.signature(base_loss).parameters:
        raise BlueprintError(
            f"The loss function of {name} takes no shift_labels, so its head cannot be computed on targets only. "
            "Add the argument as in transformers' ForCausalLMLoss, or train without head_on_targets."
        )
    head = model.get_output_embeddings()
    if any(type(variant) is ALoraLinearVariant for variant in getattr(head, "lora_variant", {}).values()):
        raise BlueprintError(
            f"The head of {name} has activated LoRA, which counts positions. Use answer_only, or leave the head out."
        )
    chosen = targets != IGNORED
    calls: list[str] = []

    def select(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        calls.append("head")
        hidden = inputs[0]
        if hidden.shape[:-1] != chosen.shape:
            raise BlueprintError(
                f"The head of {name} gets hidden states of shape {tuple(hidden.shape)}, expected "
                f"{(*chosen.shape, 'hidden size')}. Leave out logits_to_keep, or train without head_on_targets."
            )
        return hidden[chosen.to(hidden.device)].unsqueeze(0), *inputs[1:]

    def loss(logits: Tensor, labels: Any = None, vocab_size: Any = None, **keywords: Any) -> Any:
        calls.append("loss")
        keywords["shift_labels"] = targets[chosen].unsqueeze(0).to(logits.device)
        return base_loss(logits=logits, labels=None, vocab_size=vocab_size, **keywords)

    with head.register_forward_pre_hook(select), restored_attributes([model], "_loss_function"):
        model.loss_function = loss
        yield
    if calls != ["head", "loss"]:
        raise BlueprintError(
            f"{name} does not compute its loss from its head's output with its loss_function, so the head cannot be "
            "computed on targets only. Train it without head_on_targets."
        )


def shifted(labels: Tensor) -> Tensor:
    """Return the target of every position: the next label, and none for the last."""
    return nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED)


class _TargetHead:
    """Mixin of a causal model."""

    def forward(self, *args: Any, **keywords: Any) -> Any:
        labels = keywords.get("labels")
        # `fused_lm_head`: TRL's trainers compute log probabilities of targets themselves
        if not self.training or labels is None or keywords.get("fused_lm_head"):  # type: ignore[attr-defined]
            return super().forward(*args, **keywords)  # type: ignore[misc]
        targets = keywords.pop("shift_labels", None)
        with selected_targets(self, shifted(labels) if targets is None else targets):  # type: ignore[arg-type]
            return super().forward(*args, **keywords)  # type: ignore[misc]
