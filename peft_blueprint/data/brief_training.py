"""Train a model for a few steps and restore it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ..errors import BlueprintError, MeasurementError
from ..measure import LossFunction, Objective, Row, borrowed, collate, find_submodules, input_device, linear_modules


Train = Callable[[nn.Module, Sequence[Row]], None]

RANK = 8


@contextmanager
def restore_afterwards(model: nn.Module) -> Iterator[None]:
    """Restore a model when the `with` ends, with its weights and without additions to it.

    Takes a second copy of the weights, on the CPU.

    Raises:
        BlueprintError: if some weights are offloaded, which cannot be copied.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> model = tiny_llama()
        >>> with restore_afterwards(model), torch.no_grad():
        ...     _ = model.lm_head.weight.zero_()
        >>> bool(model.lm_head.weight.any())
        True
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(value.is_meta for value in tensors):
        raise BlueprintError("Some of the model's weights are offloaded and cannot be restored. Load the model whole.")
    with borrowed(model, tensors):
        yield


@contextmanager
def temporary_adapters(model: nn.Module, submodules: Sequence[str] | None, seed: int) -> Iterator[nn.Module]:
    """Yield a trainable model: itself if it has adapters, otherwise with new LoRA adapters. Restore it afterwards.

    Args:
        model: with or without adapters.
        submodules: names of linear layers to adapt; all by default.
        seed: of the adapters' initial weights.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> with temporary_adapters(tiny_llama(), None, seed=0) as adapted:
        ...     tokens = train_briefly(adapted, [{"input_ids": [5, 6], "labels": [5, 6]}], 2, batch_size=1, pad_token_id=0)
        >>> tokens
        4
    """
    if isinstance(model, PeftModel) and any(parameter.requires_grad for parameter in model.parameters()):
        with restore_afterwards(model):
            yield model
        return
    linear = {name for name, _ in linear_modules(model)}
    names = [s.name for s in find_submodules(model) if submodules is None or s.name in submodules]
    targets = [name for name in names if name in linear]
    if not targets:
        raise MeasurementError("None of the submodules is a linear layer to adapt. Pass your own train(model, rows).")
    with borrowed(model):
        torch.manual_seed(seed)
        yield get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets))


def train_briefly(
    model: nn.Module,
    rows: Sequence[Row],
    steps: int,
    *,
    batch_size: int,
    pad_token_id: int,
    learning_rate: float = 1e-3,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
) -> int:
    """Train the trainable parameters with AdamW, without dropout, on rows in random order, repeatedly.

    Returns:
        The number of input positions trained on.

    Raises:
        MeasurementError: if no parameter requires a gradient.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
        >>> train_briefly(tiny_llama(), rows, 2, batch_size=1, pad_token_id=0)  # tokens
        6
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise MeasurementError("No parameter of the model requires a gradient, so it cannot be trained.")
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    device, tokens = input_device(model), 0
    model.eval()
    objective = Objective(model, loss_fn)
    for _ in range(steps):
        while len(order) < min(batch_size, len(rows)):
            order += torch.randperm(len(rows), generator=generator).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        batch = collate([rows[i] for i in chosen], pad_token_id)
        tokens += batch["input_ids"].numel()
        if device is not None:
            batch = {key: value.to(device) for key, value in batch.items()}
        with torch.enable_grad():
            objective.losses(batch)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return tokens
