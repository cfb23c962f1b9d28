"""Hook a model's gradients inside a `with` block, after which everything is restored, also after an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .bnb_cpu import cpu_repack_disabled
from .submodules import is_sharded


# called in the forward pass with the hook's index and the layer's input (..., d_in); returns a label and tensors to save
Keep = Callable[[int, Tensor], tuple[str, tuple[Tensor, ...]]]
# called in the backward pass with the index, the label, the saved tensors and the output's gradient (..., d_out)
Record = Callable[[int, str, tuple[Tensor, ...], Tensor], None]


class _OutputHook(torch.autograd.Function):
    """The identity on a layer's output, whose backward passes the output's gradient to `record`.

    Tensors are saved with `save_for_backward`, so that gradient checkpointing and offloading of saved tensors apply.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, index: int, record: Record, label: str, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        ctx.index, ctx.record, ctx.label = index, record, label
        return output.detach()  # in-place operations such as `x += residual` would fail on a view

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # read once: checkpointing recomputes them and returns them a single time
        ctx.record(ctx.index, ctx.label, kept, grad_outputs[0])
        return grad_outputs[0], *[None] * (3 + len(kept))


@contextmanager
def hook_output(module: nn.Module, index: int, keep: Keep, record: Record) -> Iterator[None]:
    """Call `keep` and `record` on every pass of a module. A replaced forward, such as an offloading wrapper, still runs."""
    forward = module.forward
    replaced = "forward" in vars(module)

    def hooked(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = forward(inputs, *args, **kwargs)
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad:  # the first layers of the graph, if nothing before them requires a gradient
            output.requires_grad_()
        label, kept = keep(index, inputs.detach())
        return _OutputHook.apply(output, index, record, label, *kept)

    module.forward = hooked
    try:
        yield
    finally:
        if replaced:
            module.forward = forward
        else:
            del module.forward


@contextmanager
def hook_gradients(places: Sequence[tuple[nn.Module, str]], record: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `record` with every parameter's gradient once it is accumulated, and free it; restore earlier gradients.

    The parameters, given as (module, name), require a gradient inside the block. A parameter that is offloaded or
    sharded between calls is hooked in its module's forward, where it is whole.
    """
    parameters = [_parameter(*place) for place in places]
    held = [parameter.grad for parameter in parameters]
    hooked = WeakTensorKeyDictionary()  # from parameters to the handles of their hooks
    with ExitStack() as stack:

        def hook(index: int, parameter: nn.Parameter) -> None:
            def take(parameter: Tensor) -> None:
                assert parameter.grad is not None
                record(index, parameter.grad)
                parameter.grad = None

            if parameter not in hooked:
                parameter.requires_grad_(True)
                hooked[parameter] = parameter.register_post_accumulate_grad_hook(take)

        stack.callback(lambda: [handle.remove() for handle in hooked.values()])
        for index, ((module, name), parameter) in enumerate(zip(places, parameters, strict=True)):
            parameter.grad = None
            parameter.requires_grad_(True)
            if parameter.is_meta or is_sharded(parameter):
                stack.enter_context(_called_in_forward(module, name, partial(hook, index)))
            else:
                hook(index, parameter)
        try:
            yield
        finally:
            for place, gradient in zip(places, held, strict=True):
                _parameter(*place).requires_grad_(False)
                _parameter(*place).grad = gradient


@contextmanager
def _called_in_forward(module: nn.Module, name: str, call: Callable[[nn.Parameter], None]) -> Iterator[None]:
    """Call a function with a parameter at the start of its module's forward, inside accelerate's fetching wrapper."""
    attribute = "_old_forward" if "_old_forward" in vars(module) else "forward"
    forward = getattr(module, attribute)
    replaced = attribute in vars(module)

    def hooked(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            call(_parameter(module, name))
        return forward(*args, **kwargs)

    setattr(module, attribute, hooked)
    try:
        yield
    finally:
        if replaced:
            setattr(module, attribute, forward)
        else:
            delattr(module, attribute)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    return cast(nn.Parameter, getattr(module, name))


@contextmanager
def measurement_mode(model: nn.Module) -> Iterator[None]:
    """Freeze the weights and disable dropout; under gradient checkpointing let embeddings' outputs require a gradient."""
    training = {module: module.training for module in model.modules()}
    # by module and name, because offloading replaces the parameters in every pass
    trainable = [(m, k) for m in model.modules() for k, p in m.named_parameters(recurse=False) if p.requires_grad]
    dropouts: list[tuple[nn.Module, str, float]] = []
    model.eval()
    for place in trainable:
        _parameter(*place).requires_grad_(False)
    for module in model.modules():
        # transformers checkpoints only in training mode: keep the flag there and set dropout's probability to zero
        if vars(module).get("gradient_checkpointing") is True and training[module]:
            module.training = True
            rates = [(k, v) for k, v in vars(module).items() if "dropout" in k and isinstance(v, float) and v]
            dropouts += [(module, key, rate) for key, rate in rates]
            for key, _ in rates:
                setattr(module, key, 0.0)
    is_checkpointed = any(vars(m).get("gradient_checkpointing") is True and m.training for m in model.modules())
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)] if is_checkpointed else []
    hooks = [module.register_forward_hook(_require_grad) for module in embeddings]
    try:
        with torch.enable_grad(), cpu_repack_disabled(model):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, key, rate in dropouts:
            setattr(module, key, rate)
        for place in trainable:
            _parameter(*place).requires_grad_(True)
        for module, was in training.items():
            module.training = was


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    """Require a gradient of an output, without which reentrant checkpointing passes no gradients on."""
    if torch.is_grad_enabled() and output.is_leaf:
        output.requires_grad_()
