"""Access to a model's inner gradients for the length of a `with`: taps on its layers, and a model fit to be tapped.

Whatever is changed is put back, also after an error. Knows nothing of what is computed from the gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


# called in the forward pass with the tap's index and the layer's input (..., d_in): what the backward pass will need,
# and a word on what that is
Keep = Callable[[int, Tensor], tuple[str, tuple[Tensor, ...]]]
# called in the backward pass with the tap's index, that word, those tensors and the output's gradient (..., d_out)
Record = Callable[[int, str, tuple[Tensor, ...], Tensor], None]


class _Tap(torch.autograd.Function):
    """The identity on a layer's output, which in the backward pass shows the output's gradient to `record`.

    What was kept of the input is kept with `save_for_backward`, so gradient checkpointing and offloading of saved
    tensors apply to it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, index: int, record: Record, word: str, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        ctx.index, ctx.record, ctx.word = index, record, word
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # once: checkpointing recomputes them and gives them out a single time
        ctx.record(ctx.index, ctx.word, kept, grad_outputs[0])
        return grad_outputs[0], *[None] * (3 + len(kept))


@contextmanager
def tapped(module: nn.Module, index: int, keep: Keep, record: Record) -> Iterator[None]:
    """Tap a module for a while. Whatever stood as its forward, an offloading wrapper say, is called and put back."""
    forward = module.forward
    replaced = "forward" in vars(module)

    def with_tap(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = forward(inputs, *args, **kwargs)
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad:  # the first layers of the graph, when nothing before them takes a gradient
            output.requires_grad_()
        word, kept = keep(index, inputs.detach())
        return _Tap.apply(output, index, record, word, *kept)

    module.forward = with_tap
    try:
        yield
    finally:
        if replaced:
            module.forward = forward
        else:
            del module.forward


@contextmanager
def streamed(parameters: Sequence[nn.Parameter], record: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Show every parameter's gradient to `record` as soon as it is whole, and free it; gradients held before are kept.

    The parameters take a gradient for as long.
    """
    held = [parameter.grad for parameter in parameters]
    handles = []

    def take(index: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            record(index, parameter.grad)
            parameter.grad = None

        return hook

    for index, parameter in enumerate(parameters):
        parameter.grad = None
        parameter.requires_grad_(True)
        handles.append(parameter.register_post_accumulate_grad_hook(take(index)))
    try:
        yield
    finally:
        for handle, parameter, gradient in zip(handles, parameters, held, strict=True):
            handle.remove()
            parameter.requires_grad_(False)
            parameter.grad = gradient


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Weights frozen, dropout off, embeddings' outputs taking a gradient; all put back afterwards."""
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dropouts: list[tuple[nn.Module, str, float]] = []
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    for module in model.modules():
        # transformers checkpoints only in training mode: keep the flag there, and set dropout's probability to nought
        if vars(module).get("gradient_checkpointing") is True and training[module]:
            module.training = True
            rates = [(k, v) for k, v in vars(module).items() if "dropout" in k and isinstance(v, float) and v]
            dropouts += [(module, key, rate) for key, rate in rates]
            for key, _ in rates:
                setattr(module, key, 0.0)
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    hooks = [module.register_forward_hook(_require_grad) for module in embeddings]
    try:
        with torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, key, rate in dropouts:
            setattr(module, key, rate)
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, was in training.items():
            module.training = was


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    """Re-entrant checkpointing passes gradients on only if its input takes one."""
    if torch.is_grad_enabled() and output.is_leaf:
        output.requires_grad_()
