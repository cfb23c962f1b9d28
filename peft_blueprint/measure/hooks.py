"""Access to a model's inner gradients for the length of a `with`: taps on its layers, and a model fit to be tapped.

Whatever is changed is put back, also after an error. Knows nothing of what is computed from the gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .bnb_cpu import unpacked
from .submodules import is_sharded


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
        return output.detach()  # a view could not be written to, as `x += residual` does

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
def streamed(places: Sequence[tuple[nn.Module, str]], record: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Show every parameter's gradient to `record` as soon as it is whole, and free it; gradients held before are kept.

    The parameters, given as (module, name), take a gradient for as long. One that is elsewhere between calls, offloaded
    or sharded over processes, is met in its module's forward, whole and with this process's own gradient.
    """
    parameters = [_parameter(*place) for place in places]
    held = [parameter.grad for parameter in parameters]
    met = WeakTensorKeyDictionary()  # parameters whose gradient is awaited, with the handle of the hook
    with ExitStack() as stack:

        def await_gradient(index: int, parameter: nn.Parameter) -> None:
            def take(parameter: Tensor) -> None:
                assert parameter.grad is not None
                record(index, parameter.grad)
                parameter.grad = None

            if parameter not in met:
                parameter.requires_grad_(True)
                met[parameter] = parameter.register_post_accumulate_grad_hook(take)

        stack.callback(lambda: [handle.remove() for handle in met.values()])
        for index, ((module, name), parameter) in enumerate(zip(places, parameters, strict=True)):
            parameter.grad = None
            parameter.requires_grad_(True)
            if parameter.is_meta or is_sharded(parameter):
                stack.enter_context(_met_in_forward(module, name, partial(await_gradient, index)))
            else:
                await_gradient(index, parameter)
        try:
            yield
        finally:
            for place, gradient in zip(places, held, strict=True):
                _parameter(*place).requires_grad_(False)
                _parameter(*place).grad = gradient


@contextmanager
def _met_in_forward(module: nn.Module, name: str, meet: Callable[[nn.Parameter], None]) -> Iterator[None]:
    """Call `meet` with a module's parameter at the start of its forward, inside the wrapper that accelerate puts there
    to fetch it.
    """
    attribute = "_old_forward" if "_old_forward" in vars(module) else "forward"
    forward = getattr(module, attribute)
    replaced = attribute in vars(module)

    def with_meeting(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            meet(_parameter(module, name))
        return forward(*args, **kwargs)

    setattr(module, attribute, with_meeting)
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
def prepared(model: nn.Module) -> Iterator[None]:
    """Weights frozen, dropout off, under gradient checkpointing embeddings' outputs taking a gradient; all put back
    afterwards.
    """
    training = {module: module.training for module in model.modules()}
    # by their places, because offloading puts new parameters there in every pass
    trainable = [(m, k) for m in model.modules() for k, p in m.named_parameters(recurse=False) if p.requires_grad]
    dropouts: list[tuple[nn.Module, str, float]] = []
    model.eval()
    for place in trainable:
        _parameter(*place).requires_grad_(False)
    for module in model.modules():
        # transformers checkpoints only in training mode: keep the flag there, and set dropout's probability to nought
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
        with torch.enable_grad(), unpacked(model):
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
    """Re-entrant checkpointing passes gradients on only if its input takes one."""
    if torch.is_grad_enabled() and output.is_leaf:
        output.requires_grad_()
