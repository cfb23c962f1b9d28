"""Borrow a model for the length of a `with` block, and give it back bit for bit."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MeasurementError


_Hooks = dict[int, Any]
_PACKED_BYTES = 2**20  # larger buffers that are not floating-point hold quantized weights, which no pass changes
_LOANS: list[_Loan] = []


@contextmanager
def restored(model: nn.Module, values: Iterable[Tensor] = ()) -> Iterator[None]:
    """Restore what `borrowed` does, inside its block."""
    state = _State(model, tuple(values))
    # A second `finally`, because an interrupt may end the first one.
    try:
        try:
            yield
        finally:
            state.restore()
    finally:
        state.restore()


@contextmanager
def borrowed(model: nn.Module, values: Iterable[Tensor] = (), *, is_exclusive: bool = False) -> Iterator[None]:
    """Restore a model when the `with` ends: normally, by an error or by an interrupt at any line.

    Restores every module's attributes (submodules, parameters, buffers, hooks, training and checkpointing flags,
    replaced forwards), every parameter's `requires_grad`, gradient and hooks, buffers' values, autograd's mode, and the
    random states of Python, NumPy and torch. Inside the block gradients start as None, so that none is added to.

    Args:
        model: with or without adapters.
        values: tensors whose values are restored too. Each is copied to the CPU.
        is_exclusive: whether nobody else may borrow the model inside the block, not even the same thread.

    Raises:
        MeasurementError: if the model is borrowed exclusively, or by another thread.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> model = tiny_llama()
        >>> with borrowed(model):
        ...     _ = model.train().requires_grad_(False)
        >>> model.training, model.lm_head.weight.requires_grad
        (False, True)
    """
    loan = _Loan(model, is_exclusive)
    try:
        try:
            _LOANS.append(loan)
            loan.check()
            with restored(model, values):
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad = None
                yield
        finally:
            loan.end()
    finally:
        loan.end()


@contextmanager
def restored_attributes(modules: Iterable[nn.Module], *names: str, after_errors_only: bool = False) -> Iterator[None]:
    """Restore attributes of modules, and the content of dictionaries and lists such as hooks, as `borrowed` does.

    It may surround a training step: gradients, buffers and random states stay as the step leaves them.

    Args:
        modules: whose attributes are restored.
        names: of the attributes. One that a module lacks is removed again.
        after_errors_only: whether the attributes stay as they are if the block ends normally.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> model = tiny_llama()
        >>> with restored_attributes([model], "loss_scale", "_forward_hooks"):
        ...     model.loss_scale = 2.0
        ...     _ = model.register_forward_hook(print)
        >>> hasattr(model, "loss_scale"), len(model._forward_hooks)
        (False, 0)
    """
    known = [
        (vars(module), {name: vars(module)[name] for name in names if name in vars(module)}) for module in modules
    ]
    contents = [
        (value, value.copy()) for _, held in known for value in held.values() if isinstance(value, dict | list)
    ]
    stays = False

    def restore() -> None:
        for now, held in known:
            for name in names:
                if name in held:
                    now[name] = held[name]
                else:
                    now.pop(name, None)
        for collection, content in contents:
            _restore(collection, content)

    # A second `finally`, because an interrupt may end the first one.
    try:
        try:
            yield
            stays = after_errors_only
        finally:
            if not stays:
                restore()
    finally:
        if not stays:
            restore()


class _Loan:
    """Modules that one thread has borrowed."""

    def __init__(self, model: nn.Module, is_exclusive: bool):
        self.model = model
        self.modules = frozenset(map(id, model.modules()))
        self.thread = threading.get_ident()
        self.is_exclusive = is_exclusive

    def check(self) -> None:
        """Raise unless the earlier loans of these modules allow another one. Appending to a list needs no lock."""
        for other in tuple(_LOANS):
            if other is self:
                break
            if self.modules.isdisjoint(other.modules):
                continue
            if other.thread != self.thread:
                raise MeasurementError(
                    f"This {type(self.model).__name__} is being measured in another thread. Wait until that has ended, or "
                    "give every thread a model of its own."
                )
            if other.is_exclusive:
                raise MeasurementError(
                    f"This {type(self.model).__name__} is being measured already, by the code that called loss_fn or "
                    "iterates over the batches. Measure it before or afterwards, or measure a copy."
                )

    def end(self) -> None:
        """End the loan; can be repeated."""
        if self in _LOANS:
            _LOANS.remove(self)


class _State:
    """State of a model and of the process that measuring or training may change."""

    is_restored = False

    def __init__(self, model: nn.Module, values: tuple[Tensor, ...]):
        attributes = [(module, dict(vars(module))) for module in model.modules()]
        self.attributes = attributes
        self.contents = [
            (value, kind(value))
            for _, known in attributes
            for value in known.values()
            for kind in (dict, list, set)
            if isinstance(value, kind)
        ]
        self.parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        self.hooks = [(p, [_copy(hooks) for hooks in _hooks_of(p)]) for p in model.parameters()]
        self.values = [(value, value.detach().to("cpu", copy=True)) for value in values]
        self.buffers = [(b, b.detach().clone()) for b in model.buffers() if _may_change(b)]
        self.is_grad_enabled = torch.is_grad_enabled()
        self.random = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        """Restore everything; a second call goes on where an interrupt ended the first."""
        if self.is_restored:
            return
        for module, known in self.attributes:
            _restore(vars(module), known)
        for collection, content in self.contents:
            _restore(collection, content)
        with torch.no_grad():
            for tensor, copy in self.values:
                tensor.copy_(copy)
            for buffer, copy in self.buffers:
                if not torch.equal(buffer, copy):  # batch norm changes its statistics without a new version
                    buffer.copy_(copy)
        for parameter, requires_grad, gradient in self.parameters:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not gradient:
                parameter.grad = gradient
        for parameter, hooks in self.hooks:
            for now, before in zip(_hooks_of(parameter), hooks, strict=True):
                if now is not None:
                    _restore(now, before or {})
        torch.set_grad_enabled(self.is_grad_enabled)
        python, numpy, cpu = self.random
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        self.is_restored = True


def _hooks_of(parameter: Tensor) -> tuple[_Hooks | None, _Hooks | None]:
    return parameter._backward_hooks, parameter._post_accumulate_grad_hooks


def _copy(hooks: _Hooks | None) -> _Hooks | None:
    return None if hooks is None else dict(hooks)


def _may_change(buffer: Tensor) -> bool:
    is_small = buffer.is_floating_point() or buffer.nbytes <= _PACKED_BYTES
    return is_small and not buffer.is_meta and not buffer.is_inference()


def _restore(now: Any, before: Any) -> None:
    """Give a dictionary, list or set its earlier content, in place and in order, unless it still has it."""
    is_dict = isinstance(now, dict)
    content, wanted = (list(chain.from_iterable(v.items()) if is_dict else v) for v in (now, before))
    if len(content) == len(wanted) and all(map(is_, content, wanted)):
        return
    now.clear()
    now.extend(before) if isinstance(now, list) else now.update(before)
