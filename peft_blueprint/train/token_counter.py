"""What a model is given while it is trained: tokens by the shapes of its inputs, and the FLOPs of one pass.

Sees a module's calls from outside and waits for no device. Knows nothing of who trains it or what is done with the count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..runs import Figure, counted_flops, measured, modelled


_LEAST_SEEN = 0.5  # of the modelled FLOPs; below it the counter has missed kernels


class Counted(NamedTuple):
    """What one stretch of training did: floating-point operations, and the tokens they were for."""

    flops: float
    tokens: int


class Passes:
    """Counts the input positions of every training pass of a model.

    A call counts if the model is in training mode and gradients are on, so that evaluations and a reference's pass
    without gradients do not. Positions are those of `input_ids`, else of `inputs_embeds`, else of a first argument of
    whole numbers, padding included; what is given none of these counts nothing.
    """

    def __init__(self) -> None:
        self.shape: tuple[int, int] | None = None  # (batch, length) of the last pass
        self.calls = 0
        self._tokens = 0
        self._taken = 0
        self._handle: RemovableHandle | None = None
        self._stack: ExitStack | None = None
        self._flops: Any = None
        self._from = 0

    @property
    def is_counting(self) -> bool:
        """Whether FLOPs are being counted."""
        return self._stack is not None

    def attach(self, model: nn.Module) -> None:
        """Watch the calls of a module: the one that the loop calls, a DDP or compiled wrapper say."""
        self.detach()
        self._handle = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def detach(self) -> None:
        """Watch no more, and count no FLOPs; the model is as it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._stack is not None:
            self._stack.close()
            self._stack = None

    def take(self) -> int:
        """Tokens since this was last asked."""
        new, self._taken = self._tokens - self._taken, self._tokens
        return new

    def start_counting(self) -> None:
        """Count the FLOPs of what this process runs from here on, with torch.utils.flop_counter."""
        self._stack, self._from = ExitStack(), self._tokens
        self._flops = self._stack.enter_context(counted_flops())

    def stop_counting(self) -> Counted | None:
        """The FLOPs and tokens since `start_counting`; None if there were none of either."""
        if self._stack is None:
            return None
        self._stack.close()
        self._stack = None
        flops, tokens = float(self._flops.total), self._tokens - self._from
        return Counted(flops, tokens) if flops > 0 and tokens > 0 else None

    def _see(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        self.calls += 1
        shape = _shape_of(args, kwargs)
        if shape is not None:
            self.shape = shape
            self._tokens += shape[0] * shape[1]


def per_token(counted: Counted, model: Figure, step: int) -> Figure:
    """FLOPs per token as they were counted, or as they were modelled where the counter saw less than half of these.

    The counter sees matrix products, convolutions and attention among torch's own operations, and no other kernel; the
    model reckons with everything. The source says both.

    Args:
        counted: of one step.
        model: FLOPs per token, or absent.
        step: in which it was counted; for the source.
    """
    seen = counted.flops / counted.tokens
    if model.value is None:
        return measured(seen, f"torch.utils.flop_counter, measured once in step {step} ({seen:.4g} per token)")
    if seen < _LEAST_SEEN * model.value:
        note = f"{model.source} ({model.value:.4g} per token)"
        return modelled(model.value, f"{note}; torch.utils.flop_counter saw only {seen:.4g}, so not all kernels")
    said = f"{seen:.4g} per token; {model.source} says {model.value:.4g}"
    return measured(seen, f"torch.utils.flop_counter, measured once in step {step} ({said})")


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile runs this module or one inside, where operations cannot be seen one by one."""
    optimized = torch._dynamo.OptimizedModule
    return any(isinstance(m, optimized) or m._compiled_call_impl is not None for m in model.modules())


def _shape_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """(batch, length) of what a model is given."""
    given = kwargs.get("input_ids")
    if isinstance(given, Tensor) and given.dim():
        return given.shape[0], given.numel() // max(1, given.shape[0])
    given = kwargs.get("inputs_embeds")
    if isinstance(given, Tensor) and given.dim() > 2:
        return given.shape[0], given.shape[1]
    given = args[0] if args else None
    if isinstance(given, Tensor) and given.dim() and not (given.is_floating_point() or given.is_complex()):
        return given.shape[0], given.numel() // max(1, given.shape[0])
    return None
