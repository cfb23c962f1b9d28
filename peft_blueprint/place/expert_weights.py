"""Fused experts that train in part: tensor-likes that stand in for a parameter (experts, m, n) during a forward pass.

Frozen experts are multiplied as before; a trained one is multiplied by a matrix of its own. So gradients exist for the
trained experts alone, and no pass makes a copy of all experts, as adding a low-rank matrix to the whole parameter does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn


# what a stand-in tells of itself; anything else that is asked of it is asked of the computed weight
_METADATA = (
    "shape",
    "dtype",
    "device",
    "layout",
    "ndim",
    "is_cuda",
    "size",
    "dim",
    "numel",
    "data_ptr",
    "element_size",
)
_MATMUL = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm)


class LowRank(NamedTuple):
    """The update `scaling · left @ right` of one matrix (m, n): left (m, r), right (r, n)."""

    left: Tensor
    right: Tensor
    scaling: float

    def transposed(self) -> LowRank:
        """Return the update of the transposed matrix."""
        return LowRank(self.right.mT, self.left.mT, self.scaling)


class _StandIn(ABC):
    """Stand in for a tensor in calls of torch: a fast path for products, the computed weight for everything else."""

    base: Tensor

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the weight as a tensor, with its graph."""

    def transpose(self, dim0: int, dim1: int) -> Any:
        """Return the transposed weight."""
        if {dim0 % self.base.dim(), dim1 % self.base.dim()} == {self.base.dim() - 2, self.base.dim() - 1}:
            return self.mT
        return self.dense().transpose(dim0, dim1)

    @property
    @abstractmethod
    def mT(self) -> Any:  # noqa: N802 (the name of torch)
        """The weight with its last two dimensions exchanged."""

    @abstractmethod
    def product(self, function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        """Return the product of a call of torch, or NotImplemented to compute it from the whole weight."""

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        own = next((value for value in (*args, *kwargs.values()) if isinstance(value, _StandIn)), None)
        if own is not None and function is nn.functional.linear and isinstance(args[1], _StandIn):
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            transposed = args[1].mT
            found = transposed.product(torch.matmul, (args[0], transposed))
            if found is not NotImplemented:
                return found if bias is None else found + bias
        elif own is not None and (function in _MATMUL or _is_grouped(function)):
            found = own.product(function, (*args, *(value for value in kwargs.values() if value is not None)))
            if found is not NotImplemented:
                return found
        return function(*_computed(args), **{key: _computed([value])[0] for key, value in kwargs.items()})

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.base if name in _METADATA else self.dense(), name)


def _is_grouped(function: Callable[..., Any]) -> bool:
    """Whether this is torch's product of groups, or what transformers calls where torch has none."""
    return "grouped_mm" in getattr(function, "__name__", "")


def _computed(values: Sequence[Any]) -> list[Any]:
    return [value.dense() if isinstance(value, _StandIn) else value for value in values]


class UpdatedMatrix(_StandIn):
    """A frozen matrix (m, n) with low-rank updates, which products apply one after the other."""

    def __init__(self, base: Tensor, updates: Sequence[LowRank]):
        self.base = base
        self.updates = tuple(updates)

    def dense(self) -> Tensor:
        """Return the updated matrix."""
        return sum((u.scaling * (u.left @ u.right) for u in self.updates), self.base)

    @property
    def mT(self) -> UpdatedMatrix:  # noqa: N802
        """The transposed matrix."""
        return UpdatedMatrix(self.base.mT, [update.transposed() for update in self.updates])

    def product(self, function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        """Multiply: x @ W + Σ s·(x @ left) @ right, or the same from the left."""
        first, second = inputs
        if second is self:
            terms = (u.scaling * (first @ u.left) @ u.right for u in self.updates)
            return sum(terms, first @ self.base)
        return sum((u.left @ (u.scaling * (u.right @ second)) for u in self.updates), self.base @ second)


Matrix = Tensor | UpdatedMatrix


class ExpertStack(_StandIn):
    """A frozen parameter (experts, m, n) in which some experts have a matrix of their own.

    Supports how experts are computed in transformers: expert by expert (`stack[17]`), gathered for each token
    (`stack[ids]`), grouped (`grouped_mm`), and all on as many tokens (`bmm`).

    Args:
        base: (experts, m, n).
        own: matrix (m, n) by number of the expert.

    Example:
        >>> base, own = torch.zeros(4, 2, 3), torch.ones(2, 3, requires_grad=True)
        >>> stack = ExpertStack(base, {1: own})
        >>> torch.bmm(torch.ones(4, 1, 2), stack)[:, 0, 0].tolist()
        [0.0, 2.0, 0.0, 0.0]
    """

    def __init__(self, base: Tensor, own: Mapping[int, Matrix]):
        self.base = base
        self.own = dict(own)

    def dense(self) -> Tensor:
        """Return the parameter with the experts' own matrices in place."""
        if not self.own:
            return self.base
        place = torch.tensor(list(self.own), device=self.base.device)
        return self.base.index_copy(0, place, torch.stack(_computed(list(self.own.values()))))

    @property
    def mT(self) -> ExpertStack:  # noqa: N802
        """The stack of transposed matrices."""
        return ExpertStack(self.base.mT, {expert: matrix.mT for expert, matrix in self.own.items()})

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, Tensor) and index.dim() == 1 and not index.is_floating_point():
            return _Gathered(self, index) if index.dtype != torch.bool else self.dense()[index]
        if isinstance(index, int) or isinstance(index, Tensor) and index.dim() == 0:
            expert = int(index) % len(self.base)
            return self.own[expert] if expert in self.own else self.base[expert]
        return self.dense()[index]

    def product(self, function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        """Multiply tokens by their experts: grouped by expert, or as many tokens for each."""
        first, second, *rest = inputs
        if _is_grouped(function):
            is_known = second is self and first.dim() == 2 and len(rest) == 1
            return self._grouped(function, first, rest[0]) if is_known else NotImplemented
        if not isinstance(second, ExpertStack) or first.dim() != 3:
            return NotImplemented
        if not self.own:
            return torch.matmul(first, self.base)
        place = torch.tensor(list(self.own), device=self.base.device)
        own = torch.stack([torch.matmul(first[expert], cast(Tensor, matrix)) for expert, matrix in self.own.items()])
        return torch.matmul(first, self.base).index_copy(0, place, own)

    def _grouped(self, function: Callable[..., Tensor], tokens: Tensor, ends: Tensor) -> Tensor:
        """Multiply tokens (n, m), sorted by expert; `ends`, (experts,), is where each expert's tokens end."""
        bounds = [0, *ends.tolist()]
        own = {e: (bounds[e], bounds[e + 1]) for e in self.own if bounds[e] < bounds[e + 1]}
        is_own = torch.zeros(len(tokens), dtype=torch.bool)
        sizes = ends.diff(prepend=ends.new_zeros(1))
        for expert, (start, end) in own.items():
            is_own[start:end] = True
            sizes[expert] = 0
        left = (~is_own).nonzero()[:, 0].to(tokens.device)
        frozen = function(tokens[left], self.base, offs=sizes.cumsum(0, dtype=ends.dtype))
        rows = [torch.arange(start, end, device=tokens.device) for start, end in own.values()]
        products = [
            torch.matmul(tokens[start:end], cast(Tensor, self.own[expert])) for expert, (start, end) in own.items()
        ]
        return _in_order([frozen, *products], [left, *rows])


class _Gathered(_StandIn):
    """The matrices `stack[experts]` of (tokens,) experts, to multiply each token by."""

    def __init__(self, stack: ExpertStack, experts: Tensor):
        self.stack = stack
        self.experts = experts

    @property
    def base(self) -> Tensor:  # type: ignore[override]
        """The frozen matrices, (tokens, m, n)."""
        return self.stack.base[self.experts]

    def dense(self) -> Tensor:
        """Return (tokens, m, n)."""
        return self.stack.dense()[self.experts]

    @property
    def mT(self) -> _Gathered:  # noqa: N802
        """The transposed matrices."""
        return _Gathered(self.stack.mT, self.experts)

    def product(self, function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        """Multiply (tokens, k, m) by each token's own matrix, or the matrices by (tokens, n, k)."""
        first, second = inputs
        if first is self:
            transposed = self.mT
            return transposed.product(function, (second.mT, transposed)).mT
        if second is not self or first.dim() != 3:
            return NotImplemented
        rows = {expert: (self.experts == expert).nonzero()[:, 0] for expert in self.stack.own}
        is_left = torch.ones_like(self.experts, dtype=torch.bool)
        for own in rows.values():
            is_left[own] = False
        left = is_left.nonzero()[:, 0]
        frozen = torch.bmm(first[left], self.stack.base[self.experts[left]])
        products = [torch.matmul(first[own], self.stack.own[expert]) for expert, own in rows.items() if len(own)]
        return _in_order([frozen, *products], [left, *(own for own in rows.values() if len(own))])


def _in_order(parts: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """Join results, each with the numbers of its rows, in the order of the rows."""
    return torch.cat([part.to(parts[0].dtype) for part in parts])[torch.cat(list(rows)).argsort()]


@contextmanager
def standing_in(module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Let values stand in for parameters of a module, by name, within the block.

    An entry in the instance's dictionary hides the parameter of that name, which stays registered.
    """
    before = {name: vars(module)[name] for name in values if name in vars(module)}
    vars(module).update(values)
    try:
        yield
    finally:
        for name in values:
            vars(module).pop(name, None)
        vars(module).update(before)
