"""How adapters begin: A along the gradient's leading directions, so that B's first steps are where the loss falls most.

Measured through the adapters themselves, with no memory beyond theirs. Knows PEFT's LoRA layers, and nothing of how they
were chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._text import format_names
from ..errors import MeasurementError, PlacementError
from ..measure import (
    FP16_LOSS_SCALE,
    LossFunction,
    UnknownObjective,
    count_examples,
    device_of,
    examples_of,
    is_sharded,
    own_loss,
    per_example_losses,
    prepared,
    take_examples,
)


EXAMPLES = 64


class _Adapter(NamedTuple):
    """A, (groups · r, d_in), and B, (d_out, groups · r), of one module; groups are its fused experts, or one."""

    name: str
    a: Tensor
    b: Tensor
    groups: int


def initialize_along_gradient(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    adapter_name: str = "default",
    max_examples: int | None = EXAMPLES,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    progress: bool = True,
) -> int:
    """Turn the rows of every fresh LoRA adapter's A into leading right singular vectors of its weight's mean gradient G.

    What a model with B = 0 computes is left as it is, and so is the base, quantised or not; rows keep the length that
    they began with. The directions are those of a random sketch ΨᵀG, (r, d_in), with a Gaussian Ψ (Halko, Martinsson and
    Tropp 2011, doi:10.1137/090771806, §4), which with A = 0 and B = Ψ is what A's own gradient is: one forward and
    backward pass over the examples, in the memory of a training step, wherever training itself runs. LoRA-GA (Wang et al.
    2024, arXiv:2407.05000) begins both A and B along the gradient, and takes their product off the base.

    It made few adapters learn faster in short runs on GSM8K, not on PubMedQA, and not LoRA of rank 16 on all linear layers
    (RESULTS.md).

    Call it once, after `get_peft_model` and before training; on several processes before the model is wrapped, with the
    same batches on each.

    Args:
        model: a `PeftModel` whose adapter has not been trained.
        batches: mappings as for `measure_influence`; examples of what will be trained on.
        adapter_name: of the adapter, which must be active.
        max_examples: stop after so many.
        loss_fn: see `measure_influence`.
        seed: of Ψ; torch's own random numbers go on as if nothing had been drawn.
        progress: show a progress bar.

    Returns:
        How many modules were begun so. Left as they were: embeddings, convolutions, and experts without any token.

    Raises:
        PlacementError: without a fresh, active LoRA adapter of that name on linear layers, or where it is sharded.
        MeasurementError: without data or targets, or if a gradient is nought everywhere, infinite or NaN; the adapter is
            then as it was.
    """
    if max_examples is not None and max_examples < 1:
        raise MeasurementError(f"max_examples={max_examples} leaves nothing to begin along: give at least 1, or None.")
    adapters = _fresh(model, adapter_name)
    generator = torch.Generator().manual_seed(seed)
    before = [(adapter.a.detach().clone(), adapter.b.detach().clone()) for adapter in adapters]
    try:
        with torch.no_grad():
            for adapter in adapters:
                adapter.a.zero_()
                adapter.b.copy_(torch.randn(adapter.b.shape, generator=generator))
        with _only(model, [adapter.a for adapter in adapters]):
            _accumulate(model, batches, max_examples, loss_fn, progress)
            sketches = [adapter.a.grad for adapter in adapters]
    finally:
        with torch.no_grad():
            for adapter, (a, b) in zip(adapters, before, strict=True):
                adapter.a.copy_(a)
                adapter.b.copy_(b)
    broken = [
        adapter.name
        for adapter, sketch in zip(adapters, sketches, strict=True)
        if sketch is not None and not sketch.isfinite().all()
    ]
    if broken:
        raise MeasurementError(
            f"The gradient of {format_names(broken)} is infinite or NaN. Look for NaN in the weights or the data; with float16 "
            "weights, load the model in bfloat16 or float32 instead."
        )
    begun = [
        _turn(adapter, sketch)
        for adapter, sketch in zip(adapters, sketches, strict=True)
        if sketch is not None and sketch.any()
    ]
    if not begun:
        raise MeasurementError(
            "No gradient reaches the adapters, so there is no direction to begin along. Look whether the loss depends on "
            "the model's output."
        )
    return len(begun)


def _fresh(model: nn.Module, adapter_name: str) -> list[_Adapter]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    own = {name: module for name, module in layers.items() if adapter_name in module.lora_A}
    if not own:
        known = sorted({adapter for module in layers.values() for adapter in module.lora_A})
        raise PlacementError(
            f"{type(model).__name__} has no LoRA adapter {adapter_name!r} on linear layers; it has "
            f"{format_names(known) if known else 'none'}. Call this after get_peft_model, with the adapter's name."
        )
    idle = [
        name
        for name, module in own.items()
        if adapter_name not in module.active_adapters or module.merged or module.disable_adapters
    ]
    if idle:
        raise PlacementError(
            f"The adapter {adapter_name!r} is not active in {format_names(idle)}, or merged, so no gradient reaches it. Call "
            f"set_adapter({adapter_name!r}), enable_adapter_layers() or unmerge_adapter() first."
        )
    adapters = []
    for name, module in own.items():
        a, b = module.lora_A[adapter_name], module.lora_B[adapter_name]
        if isinstance(a, nn.Linear) and isinstance(b, nn.Linear):
            adapters.append(_Adapter(name, a.weight, b.weight, getattr(module, "num_experts", 1)))
    if not adapters:
        raise PlacementError(
            f"The adapter {adapter_name!r} is on {format_names(list(own))}, and none of them is a linear layer."
        )
    if sharded := [adapter.name for adapter in adapters if is_sharded(adapter.a)]:
        raise PlacementError(
            f"The adapters of {format_names(sharded)} are sharded. Call this before the model is sharded."
        )
    if trained := [adapter.name for adapter in adapters if adapter.b.any()]:
        raise PlacementError(
            f"B is not zero in {format_names(trained)}: the adapter has been trained, or began otherwise (init_lora_weights), and "
            "another A would change what it computes. Call this once, before training."
        )
    return adapters


@contextmanager
def _only(model: nn.Module, parameters: list[Tensor]) -> Iterator[None]:
    """Nothing else takes a gradient; gradients and flags are put back afterwards."""
    before = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    with prepared(model):
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, (flag, gradient) in zip(parameters, before, strict=True):
                parameter.requires_grad_(flag)
                parameter.grad = gradient


def _accumulate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    max_examples: int | None,
    loss_fn: LossFunction | None,
    progress: bool,
) -> None:
    """Gradients of the summed losses of all examples."""
    scale = FP16_LOSS_SCALE if next(model.parameters()).dtype == torch.float16 else 1.0
    found = 0
    with tqdm(total=max_examples, unit="example", desc="Starting adapters", disable=not progress) as bar:
        for batch in take_examples(batches, max_examples, device_of(model)):
            for loss in _losses(model, batch, loss_fn):
                (scale * loss).backward()
            found += (seen := count_examples(batch))
            bar.update(seen)
    if not found:
        raise MeasurementError("There is nothing to begin along: the batches are empty. Give at least one example.")


def _losses(model: nn.Module, batch: Mapping[str, Any], loss_fn: LossFunction | None) -> Iterator[Tensor]:
    """Of the batch at once, or of one example at a time where only the model itself knows what it minimises."""
    try:
        yield per_example_losses(model, batch, loss_fn)[0].sum()
    except UnknownObjective:
        for example in examples_of(batch):
            yield own_loss(model, example)[0].sum()


@torch.no_grad()
def _turn(adapter: _Adapter, sketch: Tensor) -> str:
    """Put A's rows along the sketch's right singular vectors, as many as it has and as long as rows were on average."""
    length = adapter.a.float().norm(dim=1).mean()
    rows = adapter.a.view(adapter.groups, -1, adapter.a.shape[1])
    for own, part in zip(rows, sketch.float().view_as(rows), strict=True):
        if part.any():
            directions = torch.linalg.svd(part, full_matrices=False).Vh
            own[: len(directions)] = (length * directions).to(own)
    return adapter.name
