"""Hook a model's gradients inside a `measurement_mode`, which restores everything."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PretrainedConfig

from ..errors import MeasurementError
from .bnb_cpu import disable_cpu_repack
from .borrowing import borrowed
from .submodules import difference_from_linear, is_sharded, may_differ_from_linear


# called in the forward pass with the hook's index and the layer's input (..., d_in); returns a label and tensors to save
Keep = Callable[[int, Tensor], tuple[str, tuple[Tensor, ...]]]
# called in the backward pass with the index, the label, the saved tensors and the output's gradient (..., d_out)
Record = Callable[[int, str, tuple[Tensor, ...], Tensor], None]


class OutputHook(torch.autograd.Function):
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


def hook_output(
    module: nn.Module, index: int, keep: Keep, record: Record, called: set[int], refused: dict[int, str]
) -> None:
    """Call `keep` and `record` on every pass of a module, until the `measurement_mode` around it ends.

    A replaced forward, such as an offloading wrapper, still runs.

    Args:
        module: a linear layer.
        index: of its row.
        keep: see `Keep`.
        record: see `Record`.
        called: gets the index in every call.
        refused: reasons by index for layers that are not to be measured; gets this one's if it turns out not to compute
            input · Wᵀ (+ b).
    """
    forward = module.forward
    is_known = not may_differ_from_linear(module)

    def hooked(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal is_known
        output = forward(*args, **kwargs)
        called.add(index)
        if not torch.is_grad_enabled() or index in refused:
            return output
        inputs = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if not is_known:
            is_known = True
            reason = difference_from_linear(cast(nn.Linear, module), inputs, output)
            if reason is not None:
                refused[index] = reason
                return output
        if not output.requires_grad:  # the first layers of the graph, if nothing before them requires a gradient
            output.requires_grad_()
        label, kept = keep(index, inputs.detach())
        return OutputHook.apply(output, index, record, label, *kept)

    module.forward = hooked


@contextmanager
def hook_gradients(places: Sequence[tuple[nn.Module, str]], record: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `record` with every parameter's gradient once it is accumulated, and free it, inside a `measurement_mode`.

    The parameters, given as (module, name), require a gradient inside the block. A parameter that is offloaded or
    sharded between calls is hooked in its module's forward, where it is whole.
    """
    parameters = [_parameter(*place) for place in places]
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
            parameter.requires_grad_(True)
            if parameter.is_meta or is_sharded(parameter):
                _call_in_forward(module, name, partial(hook, index))
            else:
                hook(index, parameter)
        try:
            yield
        finally:
            for place in places:
                _parameter(*place).requires_grad_(False)


def _call_in_forward(module: nn.Module, name: str, call: Callable[[nn.Parameter], None]) -> None:
    """Call a function with a parameter at the start of its module's forward, inside accelerate's fetching wrapper."""
    attribute = "_old_forward" if "_old_forward" in vars(module) else "forward"
    forward = getattr(module, attribute)

    def hooked(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            call(_parameter(module, name))
        return forward(*args, **kwargs)

    setattr(module, attribute, hooked)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    return cast(nn.Parameter, getattr(module, name))


@contextmanager
def measurement_mode(model: nn.Module, values: Iterable[Tensor] = ()) -> Iterator[None]:
    """Freeze the weights, disable dropout and compilation, and enable gradients, also in `torch.inference_mode()`.

    Reentrant checkpointing passes no gradient on if the first layer's input does not require one. The other kind, which
    does not depend on the input, replaces it.

    Args:
        model: with or without adapters; given back as by `borrowed`.
        values: tensors whose values are restored too.

    Raises:
        MeasurementError: if the model is being measured already, or its weights are on the meta device or were made in
            inference mode.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> model = tiny_llama()
        >>> with measurement_mode(model):
        ...     any(parameter.requires_grad for parameter in model.parameters())
        False
    """
    _require_weights(model)
    with borrowed(model, values, is_exclusive=True):
        training = {module: module.training for module in model.modules()}
        model.eval().requires_grad_(False)
        for module in model.modules():
            # transformers checkpoints only in training mode: keep the flag there and set dropout's probability to zero
            if vars(module).get("gradient_checkpointing") is True and training[module]:
                module.training = True
                disable_dropout(module)
            function = vars(module).get("_gradient_checkpointing_func")
            if isinstance(function, partial) and function.keywords.get("use_reentrant") is True:
                vars(module)["_gradient_checkpointing_func"] = partial(
                    function.func, *function.args, use_reentrant=False
                )
        disable_cpu_repack(model)
        with torch.inference_mode(False), torch.enable_grad(), _uncompiled():
            yield


def disable_dropout(module: nn.Module) -> None:
    """Set a module's rates of dropped values and layers to zero, and those of its configuration.

    Example:
        >>> dropout = nn.Dropout(0.1)
        >>> disable_dropout(dropout)
        >>> dropout.p
        0.0
    """
    holders: list[Any] = [module]
    if isinstance(getattr(module, "config", None), PretrainedConfig):  # a copy, because modules share it
        module.config = copy.copy(module.config)
        holders.append(module.config)
    if isinstance(module, nn.modules.dropout._DropoutNd):
        module.p = 0.0
    for holder in holders:
        for key in [key for key, value in vars(holder).items() if "drop" in key and isinstance(value, float)]:
            setattr(holder, key, 0.0)


def _uncompiled() -> AbstractContextManager[Any]:
    """Run what `torch.compile` compiled without compiling it anew for the hooks."""
    is_used = "torch._dynamo" in sys.modules  # otherwise nothing is compiled, and its import takes seconds
    return cast(Any, torch.compiler).set_stance("force_eager") if is_used else nullcontext()


def _require_weights(model: nn.Module) -> None:
    """Raise MeasurementError if weights have no values, or none that the backward pass may read."""
    fetching = {child for module in model.modules() if "_hf_hook" in vars(module) for child in module.modules()}
    parameters = [(m, p) for m in model.modules() for p in m.parameters(recurse=False)]
    if any(p.is_meta and m not in fetching for m, p in parameters):
        raise MeasurementError(
            "The model's weights are on the meta device, so they have no values. Load them, for example with "
            "from_pretrained."
        )
    if any(p.is_inference() for _, p in parameters):
        raise MeasurementError(
            "The model's weights were made in torch.inference_mode(), so no gradient can pass them. Load the model "
            "outside of it."
        )
