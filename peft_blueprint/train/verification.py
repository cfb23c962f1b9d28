"""Verify after placing that training reaches every adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .._text import format_names
from ..errors import PlacementError
from ..measure import (
    FP16_LOSS_SCALE,
    LossFunction,
    Objective,
    borrowed,
    disable_dropout,
    split_examples,
    take_examples,
)


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_adapters(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    loss_fn: LossFunction | None = None,
) -> None:
    """Require that every trainable adapter receives a gradient, in one pass over the first example.

    An adapter stays as it is if the model uses the weight below it without calling the layer, as fused kernels do. The
    pass is in training mode, because models may take another way there, and without dropout. Adapters on a list of
    experts are left out, because an example does not reach all of them.

    Args:
        model: a model with adapters.
        batches: batches or examples, see `measure_influence`; only the first is used.
        tokenizer: the model's, for examples with text.
        loss_fn: see `measure_influence`.

    Raises:
        PlacementError: if no gradient reaches some adapters.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
        >>> check_adapters(model, toy_batches())
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and "experts." not in name
    }
    own = {name: [p for p in _own_parameters(module) if p.requires_grad] for name, module in layers.items()}
    scale = FP16_LOSS_SCALE if next(model.parameters()).dtype == torch.float16 else 1.0
    with borrowed(model), torch.enable_grad():
        model.train()
        for module in model.modules():
            disable_dropout(module)
        taken = take_examples(model, batches, 1, tokenizer=tokenizer, loss_fn=loss_fn)
        objective = Objective(model, loss_fn)
        for batch in islice(taken, 1):
            (scale * objective.losses(next(split_examples(batch)))[0].sum()).backward()
        dead = [
            name.split(".model.", 1)[-1]
            for name, parameters in own.items()
            if parameters and not any(p.grad is not None and p.grad.any() for p in parameters)
        ]
    if dead:
        raise PlacementError(
            f"No gradient reaches {len(dead)} of {len(own)} adapters ({format_names(dead)}), so training would not change "
            "them: the model uses the weights below without calling their layers, or the loss does not depend on them. "
            "Leave these submodules out."
        )


def _own_parameters(layer: BaseTunerLayer) -> list[nn.Parameter]:
    """Return the parameters of an adapter's layer without those of the layer that it replaced."""
    base = {id(parameter) for parameter in layer.get_base_layer().parameters()}
    return [parameter for parameter in cast(nn.Module, layer).parameters() if id(parameter) not in base]
