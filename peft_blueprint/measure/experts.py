"""Measure every expert of a mixture in the model's own pass: gradient norms, mean gradients, and how tokens are routed.

A fused parameter holds the weights of all experts. Its module is computed here with the visits of tokens sorted by
expert, so that the rows of one expert and one example lie together. For n such rows X (n × d_in) and their output
gradients dY (n × d_out) the gradient of that expert is dYᵀX, as of a linear layer. A module that cannot be computed so is
measured by the gradient of its parameter, one example at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blueprint import Submodule, split_expert
from . import gradients
from .hooks import OutputHook
from .options import MeasureOptions
from .submodules import Weight, is_sharded


_FORWARD_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")  # of transformers' fused experts
_TRIED = 8  # tokens on which a module is compared with the computation here
_SHARE, _WEIGHT = 0, 1  # of routing statistics


@dataclass(frozen=True)
class Stack:
    """One weight of all experts of a module, with its rows in the measurement.

    Args:
        weight: the fused parameter, (experts, d_out, d_in).
        rows: index of the row of each expert that is measured, by the expert's number.
    """

    weight: Weight
    rows: Mapping[int, int]

    @property
    def container(self) -> str:
        """Name of the module that holds the experts."""
        return self.weight.name.rpartition(".")[0]


def stacks_of(submodules: Sequence[Submodule], weights: Mapping[str, Weight]) -> tuple[Stack, ...]:
    """Collect the rows of single experts by the fused parameter that holds them."""
    rows: dict[str, dict[int, int]] = defaultdict(dict)
    for i, submodule in enumerate(submodules):
        is_measured = submodule.form == "expert" and not submodule.quantized
        name = split_expert(submodule.name) if is_measured else None
        if name is not None:
            rows[name.parameter][name.number] = i
    return tuple(Stack(weights[parameter], of_experts) for parameter, of_experts in rows.items())


class Visits(NamedTuple):
    """The visits of tokens to experts, sorted by expert and, for one expert, by example.

    Args:
        token: (S,) index of the token.
        expert: (S,) number of the expert.
        order: (S,) index of the visit before sorting, in (tokens, k).
        of_experts: visits of every expert.
        segments: visits of every pair of an expert and an example, the experts outermost.
        examples: number of examples.
    """

    token: Tensor
    expert: Tensor
    order: Tensor
    of_experts: list[int]
    segments: Tensor
    examples: int

    @property
    def offsets(self) -> Tensor:
        """End of every expert's visits, (experts,) int32."""
        ends = torch.tensor(self.of_experts).cumsum(0).to(torch.int32)
        return ends.to(self.token.device)

    @classmethod
    def of(cls, index: Tensor, experts: int, examples: int) -> Visits:
        """Sort the experts that the tokens of some examples choose, (examples · tokens, k)."""
        tokens, k = index.shape
        chosen = index.reshape(-1)
        expert, order = torch.sort(chosen, stable=True)
        token = order.div(k, rounding_mode="floor")
        example = token.div(tokens // examples, rounding_mode="floor")
        segments = torch.bincount(expert * examples + example, minlength=experts * examples).cpu()
        of_experts = segments.view(experts, examples).sum(dim=1).tolist()
        return cls(token, expert, order, of_experts, segments, examples)


class ExpertRecorder:
    """Collect norms and mean gradients of experts, and routing shares of the current batch.

    Args:
        submodules: all rows of the measurement.
        options: method, sketch size and seed.
        stacks: the fused parameters whose experts are rows.
        matrix: returns the sketch's Ω for (d_in, like, size).
    """

    def __init__(
        self,
        submodules: Sequence[Submodule],
        options: MeasureOptions,
        stacks: Sequence[Stack],
        matrix: Callable[[int, Tensor, int | None], Tensor | None],
    ) -> None:
        self.options = options
        self.stacks = stacks
        self.is_mixed = False  # the rows of a module do not say which example they belong to
        self.repeated: set[int] = set()  # stacks that are called several times in a pass
        self.submodules = submodules
        self._matrix = matrix
        self._sums: dict[int, Tensor] = {}  # by stack: (experts, d_out, s), over all examples
        self._places: dict[str, tuple[list[int], list[int]]] = {}  # rows and numbers of a container's experts
        if options.experts:
            for i, submodule in enumerate(submodules):
                name = split_expert(submodule.name)
                if name is not None:
                    rows, numbers = self._places.setdefault(name.container, ([], []))
                    rows.append(i)
                    numbers.append(name.number)
        self.begin(0)

    @property
    def containers(self) -> Collection[str]:
        """Names of the modules whose experts are rows."""
        return self._places.keys()

    def begin(
        self, examples: int, lengths: Collection[int] = (), loss_scale: float = 1.0, mask: Tensor | None = None
    ) -> None:
        """Discard the current batch, if any, and start one; `mask` (examples, tokens) marks tokens that are not padding."""
        self.examples, self.lengths, self.loss_scale, self.mask = examples, lengths, loss_scale, mask
        self._norms: dict[int, Tensor] = {}
        self._errors: dict[int, Tensor] = {}
        self._batch: dict[int, Tensor] = {}
        self._routed: dict[str, Tensor] = {}

    def visits(self, index: Tensor, experts: int) -> Visits | None:
        """Sort a batch's choices (examples · tokens, k); None if they do not show whose they are."""
        examples = self.examples
        if examples > 1 and (len(index) % examples or len(index) // examples not in self.lengths):
            self.is_mixed = True
            return None
        return Visits.of(index, experts, examples)

    def route(self, container: str, index: Tensor, weights: Tensor, experts: int) -> None:
        """Record which experts every token chooses, and with what weights, both (examples · tokens, k)."""
        tokens, k = index.shape
        examples = max(self.examples, 1)
        if tokens % examples:
            return
        counted = torch.ones(tokens, device=index.device)
        if self.mask is not None and self.mask.numel() == tokens:
            counted = self.mask.reshape(-1).to(counted)
        example = torch.arange(tokens, device=index.device).div(tokens // examples, rounding_mode="floor")
        place = (example[:, None] * experts + index).reshape(-1)
        values = torch.stack([counted[:, None].expand(-1, k) / k, weights.float() * counted[:, None]])
        sums = torch.zeros(2, examples * experts, device=index.device).index_add_(1, place, values.flatten(1))
        of_tokens = torch.zeros(examples, device=index.device).index_add_(0, example, counted)
        self._routed[container] = sums.view(2, examples, experts) / of_tokens.clamp_min(1)[:, None]

    def record(self, stack: int, visits: Visits, inputs: Tensor, output_gradient: Tensor) -> None:
        """Record the gradient of one weight of all experts from its inputs and dY (S, d_out).

        The inputs are those of all visits, (S, d_in), or of all tokens, which the visits then choose from.
        """
        if stack in self._norms:
            self.repeated.add(stack)
            return
        d_in, is_by_token = inputs.shape[1], len(inputs) != len(visits.token)
        inputs = inputs.to(gradients.statistics_dtype(inputs))
        matrix = self._matrix(d_in, inputs, self.options.sketch_size)
        narrow = inputs if matrix is None else inputs @ matrix
        rows = visits.token if is_by_token else torch.arange(len(inputs), device=inputs.device)
        dy = output_gradient if self.loss_scale == 1 else output_gradient.float() / self.loss_scale
        dy = dy.to(inputs.dtype)
        self._norms[stack], self._errors[stack] = self._norms_of(inputs, narrow, rows, dy, visits)
        self._batch[stack] = _products(dy, narrow.index_select(0, rows) if is_by_token else narrow, visits.of_experts)

    def record_gradient(self, stack: int, gradient: Tensor) -> None:
        """Record the gradient of a fused parameter (experts, d_out, d_in) for a single example."""
        gradient = gradient.float() / self.loss_scale
        matrix = self._matrix(gradient.shape[2], gradient, self.options.sketch_size)
        sums = self._batch.get(stack, 0)
        self._norms[stack] = torch.linalg.vector_norm(gradient, dim=(1, 2))[:, None]
        self._errors[stack] = torch.zeros_like(self._norms[stack])
        self._batch[stack] = sums + (gradient if matrix is None else gradient @ matrix)

    def fill(self, norms: Tensor, errors: Tensor) -> Tensor:
        """Write the batch's norms and errors into (rows, examples); return routing (rows, examples, 2), NaN if unknown."""
        for index, of_experts in self._norms.items():
            numbers, rows = zip(*self.stacks[index].rows.items(), strict=True)
            norms[list(rows)] = of_experts.cpu()[list(numbers)]
            errors[list(rows)] = self._errors[index].cpu()[list(numbers)]
        routing = torch.full((len(self.submodules), self.examples, 2 if self.options.experts else 0), torch.nan)
        for container, found in self._routed.items():
            of_container, experts = self._places[container]
            routing[of_container] = found.cpu().permute(2, 1, 0)[experts]
        return routing

    def commit(self) -> None:
        """Accept the batch: add its mean gradients to those of earlier batches."""
        for index, total in self._batch.items():
            if index in self._sums:
                self._sums[index] += total
            else:
                self._sums[index] = total

    def sketches(self) -> dict[int, Tensor]:
        """Return the sketched gradients, summed over all examples, by row."""
        found: dict[int, Tensor] = {}
        for index, sums in self._sums.items():
            slices = sums.cpu().unbind()
            found |= {row: slices[number] for number, row in self.stacks[index].rows.items()}
        return found

    def unvisited(self, reached: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return zeros for rows of experts in lists that no token visits, where rows of the same list are reached."""
        found: dict[int, Tensor] = {}
        for rows, _ in self._places.values():
            if any(row in reached for row in rows):
                for row in set(rows) - reached.keys():
                    d_out, d_in = self.submodules[row].shape or (1, 1)
                    size = self.options.sketch_size
                    columns = d_in if size is None or d_in <= 2 * size else size
                    found[row] = torch.zeros(d_out, columns)
        return found

    def _norms_of(self, x: Tensor, narrow: Tensor, rows: Tensor, dy: Tensor, visits: Visits) -> tuple[Tensor, Tensor]:
        """Return norms and errors (experts, examples), of segments of about the same length together.

        The inputs of visit i are row `rows[i]` of x and of its sketch.
        """
        segments = visits.segments
        starts = (segments.cumsum(0) - segments).to(x.device)
        lengths = segments.to(x.device)
        norms = torch.zeros(len(segments), device=x.device)
        errors = torch.zeros_like(norms)
        for length, members in _buckets(segments.tolist()):
            how, ids = self._how(length, x.shape[1], dy.shape[1]), torch.tensor(members, device=x.device)
            step = max(1, gradients.NUMBERS_AT_A_TIME // (length * (x.shape[1] + dy.shape[1])))
            for some in ids.split(step):
                within = torch.arange(length, device=x.device)
                at = (starts[some][:, None] + within).clamp_max(len(dy) - 1).flatten()
                is_padding = (within >= lengths[some][:, None])[..., None]
                # index_select copies whole rows, several times as fast as x[…]
                own = dy.index_select(0, at).view(len(some), length, -1)
                kept = (narrow if how == "sketch" else x).index_select(0, rows[at]).view(len(some), length, -1)
                if how == "gram":
                    gram = gradients.gram(kept).masked_fill_(is_padding | is_padding.mT, 0)
                    norms[some] = gradients.gram_norms(gram, own)
                else:
                    kept.masked_fill_(is_padding, 0)
                    norms[some], errors[some], _, _ = gradients.materialized(kept, own, x.shape[1], None)
        shape = (len(visits.of_experts), visits.examples)
        return norms.view(shape), errors.view(shape)

    def _how(self, tokens: int, d_in: int, d_out: int) -> str:
        size = self.options.sketch_size
        if self.options.method == "exact" or size is None or d_in <= 2 * size:
            return "gram" if gradients.prefers_gram(tokens, d_in, d_out) else "whole"
        is_free = self.options.method == "auto" and gradients.gram_is_nearly_free(tokens, d_in, d_out, size)
        return "gram" if is_free else "sketch"


def _buckets(lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Yield (length, indices) of segments that are padded to one length, at most 1.5 times their own."""
    found: dict[int, list[int]] = defaultdict(list)
    for i, length in enumerate(lengths):
        if length:
            power = 1 << (length - 1).bit_length()  # 2ⁿ from above; 3·2ⁿ⁻² lies between it and the one before
            found[power * 3 // 4 if 4 * length <= 3 * power and power > 2 else power].append(i)
    yield from sorted(found.items())


def _products(dy: Tensor, narrow: Tensor, of_experts: Sequence[int]) -> Tensor:
    """Return dYᵀX of every expert, or its sketch. (S, d_out), (S, s) → (experts, d_out, s) float32."""
    total = torch.zeros(len(of_experts), dy.shape[1], narrow.shape[1], device=dy.device)
    for expert, (a, b) in enumerate(zip(dy.split(list(of_experts)), narrow.split(list(of_experts)), strict=True)):
        if len(a):
            total[expert] = a.T @ b
    return total


def can_group(module: nn.Module) -> bool:
    """Return whether these fused experts say how they are computed, as those of transformers 5 do."""
    own = {name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3}
    flags = [getattr(module, name, None) for name in _FORWARD_FLAGS]
    if not all(isinstance(flag, bool) for flag in flags) or getattr(module, "_is_expert_parallel", False):
        return False
    return own <= {_up(module), "down_proj"} and hasattr(module, "_apply_gate")


def _up(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


Hook = Callable[[str, Tensor, Tensor], Tensor]  # (parameter, output, input) → output


def grouped_forward(module: Any, hidden: Tensor, weights: Tensor, visits: Visits, hook: Hook) -> Tensor:
    """Compute fused experts with the visits sorted, and each product passed through `hook`.

    Args:
        module: fused experts for which `can_group` holds.
        hidden: (tokens, d).
        weights: (tokens, k) of the router.
        visits: of these tokens.
        hook: sees a parameter's name, its product and its input: of all visits, or of all tokens.

    Returns:
        (tokens, d).
    """

    def product(name: str, inputs: Tensor, seen: Tensor) -> Tensor:
        weight = getattr(module, name)
        output = hook(
            name, _grouped_linear(inputs, weight if module.is_transposed else weight.mT, visits, module), seen
        )
        return output + getattr(module, f"{name}_bias")[visits.expert] if module.has_bias else output

    up = product(_up(module), hidden.index_select(0, visits.token), hidden.detach())
    inner = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    output = product("down_proj", inner, inner.detach())
    if module.has_post_expert_norm:
        output = module.post_expert_norm(output)
    output = output * weights.reshape(-1)[visits.order, None]
    total = output.new_zeros(len(hidden), output.shape[1]).index_add(0, visits.token, output)
    return total.to(hidden.dtype)


def _grouped_linear(inputs: Tensor, weight: Tensor, visits: Visits, module: Any) -> Tensor:
    """Multiply each expert's rows with its weight: (S, d_in), (experts, d_in, d_out) → (S, d_out)."""
    inputs = inputs.to(weight.dtype)
    is_grouped = getattr(getattr(module, "config", None), "_experts_implementation", "eager") == "grouped_mm"
    if is_grouped and hasattr(F, "grouped_mm"):
        return F.grouped_mm(inputs, weight, offs=visits.offsets)
    pieces = inputs.split(visits.of_experts)
    return torch.cat([piece @ weight[expert] for expert, piece in enumerate(pieces) if len(piece)])


@torch.no_grad()
def _agrees(module: nn.Module) -> bool:
    """Return whether a module of experts computes what `grouped_forward` does, on random tokens."""
    parameter = cast(Tensor, module.down_proj)
    if parameter.is_meta or is_sharded(parameter):
        return True  # its flags are trusted where its values are elsewhere
    experts, generator = len(parameter), torch.Generator().manual_seed(0)
    width = parameter.shape[-1] if module.is_transposed else parameter.shape[-2]
    hidden = torch.randn(_TRIED, int(width), generator=generator).to(parameter)
    scores = torch.rand(_TRIED, experts, generator=generator).to(parameter)
    weights, index = scores.topk(min(2, experts))
    try:
        expected = module(hidden, index, weights)
        found = grouped_forward(module, hidden, weights, Visits.of(index, experts, 1), lambda _, output, __: output)
    except Exception:  # another signature, or weights that are not multiplied as they are
        return False
    tolerance = 1e-3 if parameter.dtype == torch.float32 else 3e-2
    return (
        isinstance(expected, Tensor)
        and expected.shape == found.shape
        and bool((expected - found).float().norm() <= tolerance * expected.float().norm())
    )


def groupable(stacks: Sequence[Stack], known: dict[str, bool]) -> set[int]:
    """Return the indices of the stacks whose modules `grouped_forward` computes.

    `known` says so of containers that were tried before, and is completed.
    """
    for stack in stacks:
        if stack.container not in known:
            known[stack.container] = can_group(stack.weight.module) and _agrees(stack.weight.module)
    return {i for i, stack in enumerate(stacks) if known[stack.container]}


@contextmanager
def hook_experts(
    modules: Mapping[str, nn.Module], grouped: Collection[int], recorder: ExpertRecorder, top_k: int | None
) -> Iterator[None]:
    """Record experts in every pass, inside a `measurement_mode`.

    Args:
        modules: all modules by their names in the unwrapped model.
        grouped: indices of the stacks that are measured by `grouped_forward`; the others show routing alone.
        recorder: of the measurement.
        top_k: number of experts a token chooses, of a model whose routers return scores of all.
    """
    with ExitStack() as stack:
        for container in recorder.containers:
            module = modules[container]
            own = {i: s for i, s in enumerate(recorder.stacks) if s.container == container and i in grouped}
            if isinstance(module, nn.ModuleList):
                stack.enter_context(_hook_list(container, modules, recorder, top_k))
            else:
                _hook_fused(container, module, own, recorder)
        yield


def _hook_fused(container: str, module: nn.Module, stacks: Mapping[int, Stack], recorder: ExpertRecorder) -> None:
    attribute = "_old_forward" if "_old_forward" in vars(module) else "forward"  # inside accelerate's fetching wrapper
    forward = getattr(module, attribute)
    of_parameters = {stack.weight.parameter: i for i, stack in stacks.items()}

    def hooked(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        experts = next(len(parameter) for parameter in module.parameters() if parameter.dim() == 3)
        routed = _choices_of(tensors[1:], experts)
        if routed is None or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        index, weights = routed
        recorder.route(container, index, weights.detach(), experts)
        visits = recorder.visits(index, experts) if of_parameters else None
        if visits is None:
            return forward(*args, **kwargs)

        def record(index: int, _: str, kept: tuple[Tensor, ...], gradient: Tensor) -> None:
            recorder.record(index, visits, kept[0], gradient)

        def hook(parameter: str, output: Tensor, inputs: Tensor) -> Tensor:
            if parameter not in of_parameters:
                return output
            if not output.requires_grad:
                output.requires_grad_()
            return OutputHook.apply(output, of_parameters[parameter], record, "", inputs)

        hidden = tensors[0]
        return grouped_forward(module, hidden.reshape(-1, hidden.shape[-1]), weights, visits, hook).view_as(hidden)

    setattr(module, attribute, hooked)


@contextmanager
def _hook_list(
    container: str, modules: Mapping[str, nn.Module], recorder: ExpertRecorder, top_k: int | None
) -> Iterator[None]:
    """Record the routing of experts in a list, from the output of the router beside them.

    It is dropped where the experts do not receive as many tokens as the router's output says.
    """
    experts = cast(nn.ModuleList, modules[container])
    block = modules[container.rpartition(".")[0]]
    routers = [module for name, module in block.named_children() if name in ("gate", "router")]
    received: dict[int, int] = {}
    chosen: list[tuple[Tensor, Tensor]] = []

    def start(*_: Any) -> None:
        received.clear()
        chosen.clear()

    def see(number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if inputs is not None:
            received[number] = received.get(number, 0) + inputs.numel() // inputs.shape[-1]

    def read(_: nn.Module, __: Any, output: Any) -> None:
        outputs = [
            value for value in (output if isinstance(output, tuple | list) else [output]) if isinstance(value, Tensor)
        ]
        config = getattr(block, "config", None)
        routed = _choices_of(outputs, len(experts)) or _top_k_of_scores(outputs, len(experts), top_k, block, config)
        if routed is not None:
            chosen.append(routed)

    def finish(*_: Any) -> None:
        if not torch.is_grad_enabled() or len(chosen) != 1:
            return
        [(index, weights)] = chosen
        counts = torch.bincount(index.reshape(-1), minlength=len(experts)).tolist()
        if all(counts[number] == received.get(number, 0) for number in range(len(experts))):
            recorder.route(container, index, weights.detach(), len(experts))

    with ExitStack() as stack:
        handles = [block.register_forward_pre_hook(start), block.register_forward_hook(finish)]
        handles += [router.register_forward_hook(read) for router in routers]
        handles += [
            expert.register_forward_pre_hook(partial(see, number), with_kwargs=True)
            for number, expert in enumerate(experts)
        ]
        for handle in handles:
            stack.callback(handle.remove)
        yield


def _choices_of(tensors: Sequence[Tensor], experts: int) -> tuple[Tensor, Tensor] | None:
    """Find the chosen experts and their weights, both (tokens, k), among tensors; None without them."""
    index = next((t for t in tensors if t.dim() > 1 and not t.is_floating_point() and t.dtype != torch.bool), None)
    if index is None:
        return None
    index = index.reshape(-1, index.shape[-1])
    floating = [t.reshape(-1, t.shape[-1]) for t in tensors if t.dim() > 1 and t.is_floating_point()]
    for weights in floating:
        if weights.shape == index.shape and weights.shape[1] != experts:
            return index, weights
    for weights in floating:
        if weights.shape == (len(index), experts):  # of all experts, zero where they are not chosen
            return index, weights if weights.shape == index.shape else weights.gather(1, index)
    return None


def _top_k_of_scores(
    tensors: Sequence[Tensor], experts: int, top_k: int | None, block: nn.Module, config: Any
) -> tuple[Tensor, Tensor] | None:
    """Choose the top-k experts by the softmax of a router's scores, as Mixtral's block does."""
    scores = next((t.reshape(-1, experts) for t in tensors if t.is_floating_point() and t.shape[-1] == experts), None)
    k = next(
        (value for name in ("top_k", "num_experts_per_tok") if isinstance(value := getattr(block, name, None), int)),
        top_k,
    )
    if scores is None or k is None or not 1 <= k <= experts:
        return None
    weights, index = scores.float().softmax(dim=-1).topk(k, dim=-1)
    normalizes = next(
        (v for v in (getattr(o, "norm_topk_prob", None) for o in (block, config)) if v is not None), True
    )
    return index, weights / weights.sum(dim=-1, keepdim=True) if normalizes else weights
