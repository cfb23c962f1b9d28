"""Names and shapes of a model's weights in the order of computation, and the operations between them.

Reads names, shapes and the config, but no weights: a model may be on the meta device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import nn

from ...blueprint import ADAPTABLE, Blueprint, Form, Submodule
from ...errors import MismatchError
from ...measure import class_of, find_submodules, find_weights, unwrap


# Stages of a unit (the attention or a feed-forward part of a block) in the order of computation.
_NORM, _IN, _CORE, _OUT, _STAGES = 0, 1, 2, 3, 4
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_EXPERT = re.compile(r"experts\.(\d+)(\.|$)")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads")
_VISITED = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts", "top_k")
_FUNCTIONS = ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "feed_forward_proj")
_VISITED_BY_DEFAULT = 2

OperationKind = Literal["norm", "rms_norm", "attention", "activation", "residual"]


@dataclass(frozen=True)
class Part:
    """One weight of a model.

    Args:
        name: as in a blueprint.
        form: as in a blueprint.
        shape: (d_out, d_in) of a linear layer, (experts, d_out, d_in) of fused experts, otherwise the parameter's own.
        depth: index of its block in its stack, if it is in one.
        block: index of its block over all stacks, or -1.
        stage: position in the order of computation: a gradient that starts at one stage passes all later ones.
        source: index of the input it reads; q, k and v share one, and so do gate and up.
        visits: passes of a token through it; below 1 for an expert in a list.
        is_matrix: whether tokens are multiplied with it.
        is_quantizable: whether a quantised model holds it in 4 or 8 bits.
        reads_attention: whether its input is the output of attention.
    """

    name: str
    form: Form
    shape: tuple[int, ...]
    depth: int | None
    block: int = -1
    stage: int = 0
    source: int = -1
    visits: float = 1.0
    is_matrix: bool = False
    is_quantizable: bool = False
    reads_attention: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Operation:
    """An operation on a token between weights.

    Args:
        kind: a norm as one kernel or step by step in float32 (`rms_norm`), attention, an activation function with the
            product of a gated unit, or the sum with the residual stream.
        block: as in `Part`.
        stage: as in `Part`.
        width: numbers per token: of a norm's input, of attention's queries, of one input of an activation.
        keys: numbers per token of attention's keys, and of its values.
        heads: number of attention heads.
        is_causal: whether a token attends only to earlier ones.
        function: transformers' name of the activation function.
        is_gated: whether the activation is multiplied with a second input.
        weighted: width of an expert's output, which its router's weight multiplies; otherwise 0.
        visits: as in `Part`.
    """

    kind: OperationKind
    block: int
    stage: int
    width: int
    keys: int = 0
    heads: int = 0
    is_causal: bool = True
    function: str = "silu"
    is_gated: bool = False
    weighted: int = 0
    visits: float = 1.0


@dataclass(frozen=True)
class Structure:
    """A model's weights and operations in the order of computation.

    Args:
        parts: each weight once, in the model's order.
        operations: between the weights.
        stages: number of stages; the head is at the last.
        blocks: input width of each block.
        vocabulary: width of the logits; 0 without a head.
        head: input width of a tied head; 0 without a head, or if it is among the parts because it is not tied.
        is_whole: whether all weights are included, which predictions of memory need.
    """

    parts: tuple[Part, ...]
    operations: tuple[Operation, ...]
    stages: int
    blocks: tuple[int, ...]
    vocabulary: int
    head: int
    is_whole: bool

    @classmethod
    def of(cls, model: nn.Module) -> Structure:
        """Read the structure of a model, with or without adapters, on any device, also meta.

        The number of heads, the experts that a token visits and the activation function come from the config of a
        transformers model.

        Example:
            >>> from peft_blueprint.testing import tiny_llama
            >>> structure = Structure.of(tiny_llama(layers=2))
            >>> len(structure.adaptable), structure.stages, structure.is_whole
            (14, 19, True)
        """
        weights, entries = find_weights(model), find_submodules(model, include="all")
        settings = _settings(model)
        linear = {
            weight.name
            for weight in weights
            if weight.form != "head" and weight.parameter == "weight" and _is_linear(weight.module)
        }
        norms = {w.name: class_of(w.module) is not nn.LayerNorm for w in weights if w.form == "norm"}
        head = _head_of(model)
        built = _Builder(entries, linear, norms, settings, _causality(model)).build()
        is_tied = head is not None and not any(part.form == "head" for part in built.parts)
        d_out, d_in = (0, 0) if head is None else head
        return replace(built, vocabulary=d_out or built.vocabulary, head=d_in if is_tied else 0, is_whole=True)

    @classmethod
    def of_blueprint(cls, blueprint: Blueprint) -> Structure:
        """Read from a blueprint as much of the structure as predicts ratios of time, but not bytes.

        Assumes a norm before each attention and feed-forward part, and that a token visits two of the fused experts.
        Counts the head if the blueprint has an entry for it (`include="all"`).

        Raises:
            MismatchError: if entries have no shapes, like those of groups and layers.
        """
        entries = tuple(entry for entry in blueprint if entry.form in ADAPTABLE or entry.form == "head")
        without = [entry.name for entry in entries if entry.shape is None]
        if without or not entries:
            raise MismatchError(
                f"The blueprint of {blueprint.model_id!r} (level {blueprint.level}) has no shape for "
                f"{without[0] if without else 'any linear layer'!r}, which costs need. Expand it with "
                "blueprint.expand(find_submodules(model)), or use Structure.of(model)."
            )
        linear = {entry.name for entry in entries if entry.form == "linear"}
        return _Builder(entries, linear, {}, {}, {}).build()

    @property
    def adaptable(self) -> tuple[str, ...]:
        """Names of the parts that can have an adapter."""
        return tuple(part.name for part in self.parts if part.form in ADAPTABLE)


class _Builder:
    """Order the parts of a model: a block is a sequence of units, and a unit has the stages norm, in, core and out."""

    def __init__(
        self,
        entries: Sequence[Submodule],
        linear: set[str],
        norms: Mapping[str, bool],
        settings: Mapping[str, Any],
        causality: Mapping[str, bool],
    ) -> None:
        self.entries = entries
        self.linear = linear
        self.norms = norms
        self.settings = settings
        self.causality = causality
        self.sources: dict[tuple[str, bool, int], int] = {}
        self.operations: list[Operation] = []

    def build(self) -> Structure:
        blocks: dict[str, list[Submodule]] = {}
        for entry in self.entries:
            blocks.setdefault(_block_of(entry.name), []).append(entry)
        outside = blocks.pop("", [])
        parts: dict[str, Part] = {}
        stage, widths = 1, []
        for number, members in enumerate(blocks.values()):
            found, stage, width = self._block(members, number, stage)
            parts |= found
            widths.append(width)
        first = next((i for i, entry in enumerate(self.entries) if _block_of(entry.name)), len(self.entries))
        place = {entry.name: i for i, entry in enumerate(self.entries)}
        vocabulary = 0
        for entry in outside:
            is_first = entry.form == "embedding" or (place[entry.name] < first and entry.form != "head")
            at = 0 if is_first else stage + (entry.form != "norm")
            is_matrix = entry.form in ("linear", "head", "convolution") or entry.name in self.linear
            parts[entry.name] = self._part(entry, -1, at, entry.name, False, 1.0, is_matrix)
            if entry.form == "norm" and not is_first and entry.name in self.norms:
                self._norm(entry, -1, at, _width(entry))
            if entry.form == "head":
                vocabulary = max(vocabulary, _shape(entry)[0])
        ordered = tuple(parts[entry.name] for entry in self.entries)
        return Structure(ordered, tuple(self.operations), stage + 2, tuple(widths), vocabulary, 0, False)

    def _block(self, members: list[Submodule], block: int, stage: int) -> tuple[dict[str, Part], int, int]:
        units: dict[str, list[Submodule]] = {}
        for entry in members:
            if entry.form in ADAPTABLE or (entry.form == "parameter" and entry.name in self.linear):
                units.setdefault(_unit_of(entry.name), []).append(entry)
        experts = sum(1 for unit in units if _EXPERT.search(unit))
        steps = [unit for unit in units if not _EXPERT.search(unit)] + (["experts"] if experts else [])
        start = {unit: stage + _STAGES * i for i, unit in enumerate(steps)}
        start |= {unit: start["experts"] for unit in units if _EXPERT.search(unit)}
        parts: dict[str, Part] = {}
        width = 0
        for unit, linears in units.items():
            visits = self._visited() / experts if _EXPERT.search(unit) else 1.0
            parts |= self._unit(unit, linears, block, start[unit], visits)
            width = width or parts[linears[0].name].shape[-1]
        rest = [entry for entry in members if entry.name not in parts]
        self._rest(rest, parts, block, [start[unit] for unit in steps] or [stage], width)
        for unit in steps:
            self.operations.append(Operation("residual", block, start[unit] + _OUT, width))
        return parts, stage + _STAGES * max(1, len(steps)), width

    def _unit(self, unit: str, linears: list[Submodule], block: int, start: int, visits: float) -> dict[str, Part]:
        is_attention = bool(_ATTENTION.search(unit)) and len(linears) > 1
        *ins, out = linears
        parts = {}
        for entry in linears:
            is_out = entry is out and bool(ins)
            times = visits
            if entry.form == "experts":
                times = min(self._visited(), _shape(entry)[0])
            at = start + (_OUT if is_out else _IN)
            part = self._part(entry, block, at, unit, is_out, times, True)
            parts[entry.name] = replace(part, reads_attention=is_attention and is_out)
        if not ins:
            return parts
        width = _shape(out)[-1]
        made = sum(_shape(entry)[-2] for entry in ins if _shape(entry)[-2] > 1)
        core = start + _CORE
        if is_attention:
            keys = max(0, (made - width) // 2)
            heads = next((self.settings[key] for key in _HEADS if self.settings.get(key)), 0)
            if not isinstance(heads, int) or not heads or width % heads:
                heads = max(1, width // 64)
            is_causal = self.causality.get(unit, True)
            self.operations.append(Operation("attention", block, core, width, keys, heads, is_causal))
        else:
            times = parts[out.name].visits
            is_routed = out.form == "experts" or bool(_EXPERT.search(unit))
            function = next((str(self.settings[key]) for key in _FUNCTIONS if self.settings.get(key)), "silu")
            self.operations.append(
                Operation(
                    "activation",
                    block,
                    core,
                    width,
                    function=function,
                    is_gated=made >= 2 * width,
                    weighted=_shape(out)[-2] if is_routed else 0,
                    visits=times,
                )
            )
        return parts

    def _rest(self, rest: list[Submodule], parts: dict[str, Part], block: int, starts: list[int], width: int) -> None:
        """Add a block's norms, biases and other parameters; assume one norm a unit if the model has none at all."""
        norms = [entry for entry in rest if entry.form == "norm" and entry.name in self.norms]
        wide = [entry for entry in norms if _width(entry) == width]
        for entry in rest:
            owner = parts.get(entry.name.removesuffix(".bias"))
            at = starts[0] if owner is None else owner.stage
            if entry in norms:
                if entry in wide:
                    at = starts[wide.index(entry) * len(starts) // len(wide)]
                    count = width
                else:  # inside the attention: a norm of each head, or of all heads at once
                    at = starts[0] + _IN
                    count = self._heads_width(entry, block)
                self._norm(entry, block, at, count)
            parts[entry.name] = self._part(entry, block, at, entry.name, False, 1.0, False)
        if not self.norms:
            self.operations.extend(Operation("rms_norm", block, at, width) for at in starts)

    def _heads_width(self, norm: Submodule, block: int) -> int:
        attention = next((o for o in self.operations if o.block == block and o.kind == "attention"), None)
        if attention is None:
            return _width(norm)
        is_key = re.search(r"(^|[._])k", norm.name.rsplit(".", 1)[-1]) is not None
        return attention.keys if is_key else attention.width

    def _norm(self, entry: Submodule, block: int, stage: int, width: int) -> None:
        self.operations.append(Operation("rms_norm" if self.norms[entry.name] else "norm", block, stage, width))

    def _part(
        self, entry: Submodule, block: int, stage: int, unit: str, is_out: bool, visits: float, is_matrix: bool
    ) -> Part:
        shape = _shape(entry)
        source = -1
        if is_matrix:
            source = self.sources.setdefault((f"{block}.{unit}", is_out, shape[-1]), len(self.sources))
        return Part(
            name=entry.name,
            form=entry.form,
            shape=shape,
            depth=entry.depth,
            block=block,
            stage=stage,
            source=source,
            visits=visits,
            is_matrix=is_matrix,
            is_quantizable=entry.name in self.linear,
        )

    def _visited(self) -> int:
        found = next((self.settings[key] for key in _VISITED if isinstance(self.settings.get(key), int)), None)
        return found or _VISITED_BY_DEFAULT


def _shape(entry: Submodule) -> tuple[int, ...]:
    assert entry.shape is not None
    return entry.shape


def _width(entry: Submodule) -> int:
    return _shape(entry)[-1] if _shape(entry) else 1


def _block_of(name: str) -> str:
    """Return `model.layers.3` for `model.layers.3.mlp.up_proj`, and "" outside of blocks."""
    parts = name.split(".")
    found = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    return "" if found is None else ".".join(parts[: found + 1])


def _unit_of(name: str) -> str:
    """Return the attention or feed-forward part of a weight's block; each expert of a list is its own."""
    block = _block_of(name)
    path = name[len(block) + 1 :].split(".")
    for i, part in enumerate(path[:-1]):
        if _ATTENTION.search(part):
            return ".".join([block, *path[: i + 1]])
    expert = _EXPERT.search(name)
    if expert is not None:
        return f"{block}.experts.{expert[1]}"
    if any("shared_expert" in part for part in path):
        return f"{block}.shared_expert"
    is_router = len(path) > 1 and path[-1] in ("gate", "router", "shared_expert_gate")
    return f"{block}.router" if is_router else f"{block}.feed_forward"


def _settings(model: nn.Module) -> dict[str, Any]:
    """Return the config as a dictionary, overridden by its text part; empty for a model without one."""
    config = vars(unwrap(model)).get("config")
    if config is None:
        return {}
    settings = cast(dict[str, Any], config.to_dict())
    text = settings.get("text_config")
    return settings | text if isinstance(text, dict) else settings


def _head_of(model: nn.Module) -> tuple[int, int] | None:
    """Return (d_out, d_in) of a transformers model's output embedding, tied or not."""
    base = unwrap(model)
    if "config" not in vars(base):
        return None
    head = cast(Any, base).get_output_embeddings()
    weights = [] if head is None else [p for p in head.parameters() if p.dim() == 2]
    return (int(weights[0].shape[0]), int(weights[0].shape[1])) if weights else None


def _causality(model: nn.Module) -> dict[str, bool]:
    """Return by unit's name whether attention is causal, which transformers marks on its modules."""
    found: dict[str, bool] = {}
    for name, module in unwrap(model).named_modules():
        if "is_causal" in vars(module):
            found.setdefault(_unit_of(f"{name}.weight"), bool(vars(module)["is_causal"]))
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or class_of(module).__name__ == "Conv1D"
