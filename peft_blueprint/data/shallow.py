"""Cut a model down to its first layers, as a cheaper scorer of data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .._text import format_names
from ..errors import BlueprintError
from ..measure import is_sharded


@contextmanager
def first_layers(model: nn.Module, layers: int) -> Iterator[nn.Module]:
    """Run a model with its first layers, its final norm and its head alone, and restore it afterwards.

    A forward and backward pass then costs about `layers` of all layers. The head reads the hidden states of the last
    layer that is left, as in early exit, so that losses are higher than the whole model's.

    Args:
        model: a decoder or an encoder with one stack of layers, with or without adapters.
        layers: how many to keep, from 1 to all.

    Yields:
        The model itself.

    Raises:
        BlueprintError: for a number out of range, a model with several stacks or none, or sharded weights.

    Example:
        >>> from peft_blueprint import measure_influence
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> with first_layers(tiny_llama(layers=4), 1) as scorer:
        ...     influence = measure_influence(scorer, toy_batches(), progress=False)
        >>> len(influence.submodules)
        7
    """
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise BlueprintError("The model's weights are sharded. Score with its first layers before sharding it.")
    parent, name = _find_stack(model)
    stack = parent._modules[name]
    assert isinstance(stack, nn.ModuleList)
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= len(stack):
        raise BlueprintError(f"layers must be an integer from 1 to {len(stack)}, the model's layers, got {layers!r}.")
    try:
        parent._modules[name] = nn.ModuleList(stack[i] for i in range(layers))
        yield model
    finally:
        parent._modules[name] = stack


def _find_stack(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the module that holds the model's only stack of layers, and the stack's name in it.

    A stack is a list of modules with children of their own. A list inside of another, as of experts, is none.
    """
    found: list[tuple[str, nn.Module, str]] = []
    inside: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{other}.") for other in inside):
            continue
        if isinstance(module, nn.ModuleList):
            inside.append(path)
            if len(module) and any(True for _ in module[0].children()):
                above, _, name = path.rpartition(".")
                found.append((path, model.get_submodule(above), name))
    if len(found) != 1:
        stacks = f": {format_names([path for path, _, _ in found])}" if found else ""
        raise BlueprintError(
            f"The model must have one stack of layers to cut, got {len(found)}{stacks}. Score with a smaller model instead."
        )
    return found[0][1:]
