"""Initialize LoRA's A along the leading directions of the gradient, in the memory of a training step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .._processes import of_every_process, process_count, process_rank
from .._progress import progress_bar
from .._text import format_names
from ..errors import MeasurementError, PlacementError
from ..measure import (
    FP16_LOSS_SCALE,
    LossFunction,
    Objective,
    count_ahead,
    count_examples,
    is_sharded,
    measurement_mode,
    sum_over_processes,
    take_examples,
)


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Adapter(NamedTuple):
    """A: (groups · r, d_in), and B: (d_out, groups · r), of one module. A group is a fused expert."""

    name: str
    a: Tensor
    b: Tensor
    groups: int


def initialize_along_gradient(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter_name: str = "default",
    max_examples: int | None = 64,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    progress: bool = True,
) -> int:
    """Rotate the rows of every fresh LoRA adapter's A onto leading right singular vectors of its mean gradient G.

    B stays zero, so the model computes the same as before. The base weights, quantized or not, do not change, and A's
    rows keep their mean length. The directions are those of a random sketch ΨᵀG, (r, d_in), with a Gaussian Ψ (Halko,
    Martinsson and Tropp 2011, doi:10.1137/090771806, §4). With A = 0 and B = Ψ this sketch is the gradient of A, so it
    takes one forward and backward pass and the memory of a training step. LoRA-GA (Wang et al. 2024, arXiv:2407.05000)
    initializes both A and B along the gradient and subtracts their product from the base.

    In short runs, adapters on few submodules learned faster on GSM8K, but not on PubMedQA. All-linear LoRA of rank 16
    did not (RESULTS.md).

    Call it once, after `get_peft_model` and before training. With several processes, call it in each before the model is
    wrapped, with that process's own shard of the data: the gradient is that of all of them, and A is afterwards the
    same in each.

    Args:
        model: a `PeftModel` with an untrained adapter.
        batches: training data, as batches or examples, see `measure_influence`.
        tokenizer: the model's, for examples with text.
        adapter_name: name of the adapter, which must be active.
        max_examples: stop after this many examples, of all processes together; None for all.
        loss_fn: see `measure_influence`.
        seed: seed of Ψ. The global random state is left unchanged.
        progress: show a progress bar.

    Returns:
        Number of initialized modules. Embeddings, convolutions and experts that receive no token keep their random A.

    Raises:
        PlacementError: if the model has no fresh, active LoRA adapter of that name on linear layers, or it is sharded.
        MeasurementError: if examples or targets are missing, a gradient is infinite, NaN or zero everywhere, or
            another process failed or has another model or seed. The adapter is then left as it was.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
        >>> initialize_along_gradient(model, toy_batches(), progress=False)
        4
    """
    with _failing_together():
        if max_examples is not None and max_examples < 1:
            raise MeasurementError(f"max_examples must be a positive integer or None, got {max_examples}.")
        adapters = _fresh_adapters(model, adapter_name)
        generator = torch.Generator().manual_seed(seed)
        with measurement_mode(model, [tensor for adapter in adapters for tensor in (adapter.a, adapter.b)]):
            for adapter in adapters:
                adapter.a.data.zero_()
                adapter.b.data.copy_(torch.randn(adapter.b.shape, generator=generator))
                adapter.a.requires_grad_(True)
            share = _share(max_examples)
            taken = take_examples(model, batches, share, tokenizer=tokenizer, loss_fn=loss_fn)
            total = count_ahead(batches, share, are_texts=tokenizer is not None) if progress else None
            found = _accumulate_gradients(model, taken, total, loss_fn, progress)
            own = [adapter.a.grad for adapter in adapters]
    sketches = list(zip(adapters, _united(adapters, own, found, seed), strict=True))
    if broken := [adapter.name for adapter, sketch in sketches if not sketch.isfinite().all()]:
        raise MeasurementError(
            f"The gradient of {format_names(broken)} is infinite or NaN. Look for NaN in the weights or the data; with "
            "float16 weights, load the model in bfloat16 or float32 instead."
        )
    reached = [(adapter, sketch) for adapter, sketch in sketches if sketch.any()]
    if not reached:
        raise MeasurementError(
            "The gradient of every adapter is zero. Check that the loss depends on the model's output."
        )
    before = [(adapter, adapter.a.detach().clone()) for adapter in adapters]
    rotated = {adapter.name: _rotated(adapter, sketch) for adapter, sketch in reached}
    after = [(adapter, _of_first_process(rotated.get(adapter.name, adapter.a))) for adapter in adapters]
    try:
        _assign(after)
        return len(reached)
    except BaseException:  # an interrupt
        _assign(before)
        raise


def _fresh_adapters(model: nn.Module, adapter_name: str) -> list[_Adapter]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    own = {name: module for name, module in layers.items() if adapter_name in module.lora_A}
    if not own:
        known = sorted({adapter for module in layers.values() for adapter in module.lora_A})
        raise PlacementError(
            f"{type(model).__name__} has no LoRA adapter {adapter_name!r} on linear layers; its adapters: "
            f"{format_names(known) if known else 'none'}. Call this after get_peft_model, with the adapter's name."
        )
    inactive = [
        name
        for name, module in own.items()
        if adapter_name not in module.active_adapters or module.merged or module.disable_adapters
    ]
    if inactive:
        raise PlacementError(
            f"The adapter {adapter_name!r} is inactive or merged in {format_names(inactive)}, so no gradient reaches it. "
            f"Call set_adapter({adapter_name!r}), enable_adapter_layers() or unmerge_adapter() first."
        )
    adapters = []
    for name, module in own.items():
        a, b = module.lora_A[adapter_name], module.lora_B[adapter_name]
        if isinstance(a, nn.Linear) and isinstance(b, nn.Linear):
            chosen = getattr(module, "chosen", {}).get(adapter_name)  # experts, of which only these have an adapter
            groups = getattr(module, "num_experts", 1) if chosen is None else len(chosen)
            adapters.append(_Adapter(name, a.weight, b.weight, groups))
    if not adapters:
        raise PlacementError(
            f"The adapter {adapter_name!r} is only on {format_names(list(own))}, which are not linear layers."
        )
    # a DTensor of FSDP2, or a weight that ZeRO's stage 3 partitioned
    if sharded := [adapter.name for adapter in adapters if is_sharded(adapter.a) or hasattr(adapter.a, "ds_shape")]:
        raise PlacementError(
            f"The adapters of {format_names(sharded)} are sharded. Call this before the model is sharded."
        )
    if trained := [adapter.name for adapter in adapters if adapter.b.any()]:
        raise PlacementError(
            f"B must be zero, and is not in {format_names(trained)}: the adapter was trained or initialized otherwise "
            "(init_lora_weights), so another A would change the model's output. Call this once, before training."
        )
    return adapters


def _accumulate_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    total: int | None,
    loss_fn: LossFunction | None,
    progress: bool,
) -> int:
    """Add up the gradients of all examples, and return their number."""
    scale = FP16_LOSS_SCALE if next(model.parameters()).dtype == torch.float16 else 1.0
    found, objective = 0, Objective(model, loss_fn)
    with progress_bar(show=progress, total=total, unit="example", desc="Initializing adapters") as bar:
        for batch in batches:
            objective.map(batch, lambda part: (scale * objective.at_once(part)[0].sum()).backward())
            found += (seen := count_examples(batch))
            bar.update(seen)
    return found


@contextmanager
def _failing_together() -> Iterator[None]:
    """Raise in every process if the block fails in one, so that none waits for another."""
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    messages = of_every_process(None if own is None else f"{type(own).__name__}: {own}")
    if own is not None:
        raise own
    for rank, message in enumerate(messages):
        if message is not None:
            raise MeasurementError(f"Process {rank} of {len(messages)} failed, so the others stop: {message}")


def _share(max_examples: int | None) -> int | None:
    """Return this process's share of a number of examples, as even as possible."""
    count = process_count()
    return None if max_examples is None else max_examples // count + (process_rank() < max_examples % count)


def _united(adapters: list[_Adapter], own: list[Tensor | None], found: int, seed: int) -> list[Tensor]:
    """Return the sum over processes of every adapter's gradient; zeros where no gradient reached it."""
    received = of_every_process((found, seed, [(adapter.name, tuple(adapter.a.shape)) for adapter in adapters]))
    if not any(examples for examples, *_ in received):
        raise MeasurementError("The batches are empty. Give at least one example.")
    for rank, theirs in enumerate(received):
        if theirs[1:] != received[0][1:]:
            raise MeasurementError(
                f"Processes 0 and {rank} have other adapters or seeds: give every process the same model and seed."
            )
    if len(received) == 1:
        return [
            torch.zeros_like(adapter.a) if one is None else one for adapter, one in zip(adapters, own, strict=True)
        ]
    return [
        sum_over_processes(None if one is None else one.float(), tuple(adapter.a.shape)).to(adapter.a.device)
        for adapter, one in zip(adapters, own, strict=True)
    ]


def _of_first_process(a: Tensor) -> Tensor:
    """Return the first process's A, which may have been drawn otherwise in each."""
    if process_count() == 1:
        return a
    return sum_over_processes(a.detach().float() if process_rank() == 0 else None, tuple(a.shape)).to(a)


@torch.no_grad()
def _rotated(adapter: _Adapter, sketch: Tensor) -> Tensor:
    """Return A with each group's rows replaced by the sketch's right singular vectors, of the rows' mean length."""
    length = adapter.a.float().norm(dim=1).mean()
    turned = adapter.a.clone()
    rows = turned.view(adapter.groups, -1, turned.shape[1])
    for own, part in zip(rows, sketch.float().view_as(rows), strict=True):
        if part.any():
            directions = torch.linalg.svd(part, full_matrices=False).Vh
            own[: len(directions)] = (length * directions).to(own)
    return turned


@torch.no_grad()
def _assign(values: Iterable[tuple[_Adapter, Tensor]]) -> None:
    for adapter, a in values:
        adapter.a.copy_(a)
