"""Train a model for a few steps and restore it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from ..errors import BlueprintError, MeasurementError
from ..measure import LossFunction, Row, collate, find_submodules, input_device, linear_modules, per_example_losses


Train = Callable[[nn.Module, Sequence[Row]], None]

RANK = 8


@contextmanager
def restore_afterwards(model: nn.Module) -> Iterator[None]:
    """Restore a model's weights, buffers, flags and gradients, and torch's random state, when the `with` ends.

    Takes a second copy of the weights, on the CPU.

    Raises:
        BlueprintError: if weights were added or removed, which is not undone; or if some are offloaded, which cannot be
            copied.
    """
    if any(value.is_meta for _, value in _tensors(model)):
        raise BlueprintError("Some of the model's weights are offloaded and cannot be restored. Load the model whole.")
    state = {name: value.detach().to("cpu", copy=True) for name, value in _tensors(model)}
    flags = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    training = {name: module.training for name, module in model.named_modules()}
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for name, value in _tensors(model):
                if name in state:
                    value.copy_(state[name])
        for name, parameter in model.named_parameters():
            if name in flags:
                parameter.requires_grad_(flags[name][0])
                parameter.grad = flags[name][1]
        for name, module in model.named_modules():
            module.training = training.get(name, module.training)
    if dict(_tensors(model)).keys() != state.keys():
        raise BlueprintError(
            "The training added or removed weights, which cannot be undone. Train existing weights, or remove what you add."
        )


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
    training = {module: module.training for module in model.modules()}
    flags = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    before = set(vars(model))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets))
    try:
        yield wrapped
    finally:
        wrapped.unload()
        for added in set(vars(model)) - before:
            delattr(model, added)
        for parameter in model.parameters():
            parameter.requires_grad_(flags[id(parameter)])
        for module in model.modules():
            module.training = training[module]


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
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise MeasurementError("No parameter of the model requires a gradient, so it cannot be trained.")
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    device, tokens = input_device(model), 0
    model.eval()
    for _ in range(steps):
        while len(order) < min(batch_size, len(rows)):
            order += torch.randperm(len(rows), generator=generator).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        batch = collate([rows[i] for i in chosen], pad_token_id)
        tokens += batch["input_ids"].numel()
        if device is not None:
            batch = {key: value.to(device) for key, value in batch.items()}
        with torch.enable_grad():
            per_example_losses(model, batch, loss_fn)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return tokens


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())
