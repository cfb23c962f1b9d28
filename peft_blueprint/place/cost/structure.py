"""Names and shapes of a model's weights in the order of computation, and the operations between them.

Reads names, shapes and the config, but no weights: a model may be on the meta device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Literal, TypeVar, cast

from torch import nn

from ...blueprint import ADAPTABLE, Blueprint, Form, Submodule
from ...errors import MismatchError
from ...measure import EXPERTS_PER_TOKEN, class_of, find_submodules, find_weights, linear_modules, unwrap


# Stages of a unit (the attention or a feed-forward part of a block) in the order of computation.
_NORM, _IN, _CORE, _OUT, _STAGES = 0, 1, 2, 3, 4
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_EXPERT = re.compile(r"experts\.(\d+)(\.|$)")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads")
_FUNCTIONS = ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "feed_forward_proj")
_VISITED_BY_DEFAULT = 2

OperationKind = Literal["norm", "rms_norm", "attention", "activation", "residual"]
_Setting = TypeVar("_Setting", int, str)


@dataclass(frozen=True)
class Part:
    """One weight of a model, with the name and form that it has in a blueprint.

    Args:
        shape: (d_out, d_in) of a linear layer, (experts, d_out, d_in) of fused experts, otherwise the parameter's own.
        depth: index of its block in its stack, if it is in one.
        block: index of its block over all stacks, from 1; 0 outside of blocks.
        stage: position in the order of computation: a gradient that starts at one stage passes all later ones.
        source: index of the input it reads; q, k and v share one, and so do gate and up.
        visits: passes of a token through it; below 1 for an expert in a list.
        is_matrix: whether tokens are multiplied with it.
        is_quantizable: whether a quantized model holds it in 4 or 8 bits.
        reads_attention: whether its input is the output of attention.
    """

    name: str
    form: Form
    shape: tuple[int, ...]
    depth: int | None
    block: int = 0
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
        blocks: input width of each block, after a 0 for modules outside of blocks.
        vocabulary: width of the logits; 0 without a head.
        head: input width of a tied head; 0 without a head, or if it is among the parts because it is not tied.
        is_whole: whether all weights are included, which predictions of memory need.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> structure = Structure.of(tiny_llama(layers=2))
        >>> structure.parts[0].name, structure.blocks
        ('model.embed_tokens', (0, 32, 32))
    """

    parts: tuple[Part, ...]
    operations: tuple[Operation, ...]
    stages: int
    blocks: tuple[int, ...]
    vocabulary: int
    head: int
    is_whole: bool

    @classmethod
    def of(cls, model: nn.Module, blueprint: Blueprint | None = None) -> Structure:
        """Read the structure of a model, with or without adapters, on any device, also meta.

        The number of heads, the experts that a token visits and the activation function come from the config of a
        transformers model. A blueprint of single experts splits fused experts, and its token shares say how many tokens
        visit each; without them tokens spread evenly.

        Example:
            >>> from peft_blueprint.testing import tiny_llama
            >>> structure = Structure.of(tiny_llama(layers=2))
            >>> len(structure.adaptable), structure.stages, structure.is_whole
            (14, 19, True)
        """
        is_split = blueprint is not None and any(entry.form == "expert" for entry in blueprint)
        weights, entries = find_weights(model), find_submodules(model, include="all", experts=is_split)
        settings = _settings(model)
        linear = {name for name, _ in linear_modules(model)} - {w.name for w in weights if w.form == "head"}
        norms = {w.name: class_of(w.module) is not nn.LayerNorm for w in weights if w.form == "norm"}
        head = _head_of(model)
        shares = {} if blueprint is None else _token_shares(blueprint)
        built = _Builder(entries, linear, norms, settings, _causality(model), shares).build()
        is_tied = head is not None and not any(part.form == "head" for part in built.parts)
        d_out, d_in = (0, 0) if head is None else head
        return replace(built, vocabulary=d_out or built.vocabulary, head=d_in if is_tied else 0, is_whole=True)

    @classmethod
    def of_blueprint(cls, blueprint: Blueprint) -> Structure:
        """Read from a blueprint as much of the structure as predicts ratios of time, but not bytes.

        Assumes a norm before each attention and feed-forward part. A token visits as many experts as the provenance
        says, otherwise two. Counts the head if the blueprint has an entry for it (`include="all"`).

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
        settings = {EXPERTS_PER_TOKEN[0]: blueprint.provenance.get("experts_per_token")}
        return _Builder(entries, linear, settings=settings, shares=_token_shares(blueprint)).build()

    @property
    def adaptable(self) -> tuple[str, ...]:
        """Names of the parts that can have an adapter."""
        return tuple(part.name for part in self.parts if part.form in ADAPTABLE)


@dataclass
class _Builder:
    """Order the parts of a model: a block is a sequence of units, and a unit has the stages norm, in, core and out."""

    entries: Sequence[Submodule]
    linear: set[str]
    norms: Mapping[str, bool] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    causality: Mapping[str, bool] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)  # of tokens, by the expert's unit
    parts: dict[str, Part] = field(default_factory=dict)
    sources: dict[tuple[int, str, bool, int], int] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)

    def build(self) -> Structure:
        blocks: dict[str, list[Submodule]] = {"": []}
        for entry in self.entries:
            blocks.setdefault(_block_of(entry.name), []).append(entry)
        outside = blocks.pop("")
        stage, widths = 1, [0]
        for block, members in enumerate(blocks.values(), start=1):
            stage, width = self._block(members, block, stage)
            widths.append(width)
        before = set(takewhile(lambda name: not _block_of(name), (entry.name for entry in self.entries)))
        for entry in outside:
            is_first = entry.form == "embedding" or (entry.name in before and entry.form != "head")
            at = 0 if is_first else stage + (entry.form != "norm")
            is_matrix = entry.form in ("linear", "head", "convolution") or entry.name in self.linear
            self._add(entry, 0, at, entry.name if is_matrix else None)
            if entry.name in self.norms and not is_first:
                self._add_norm(entry, 0, at, _width(entry))
        return Structure(
            parts=tuple(self.parts[entry.name] for entry in self.entries),
            operations=tuple(self.operations),
            stages=stage + 2,
            blocks=tuple(widths),
            vocabulary=max((_shape(entry)[0] for entry in outside if entry.form == "head"), default=0),
            head=0,
            is_whole=False,
        )

    def _block(self, members: list[Submodule], block: int, stage: int) -> tuple[int, int]:
        """Add a block; return the stage after it, and its width."""
        units: dict[str, list[Submodule]] = {}
        for entry in members:
            if entry.form in ADAPTABLE or (entry.form == "parameter" and entry.name in self.linear):
                units.setdefault(_unit_of(entry.name), []).append(entry)
        experts = [unit for unit in units if _EXPERT.search(unit)]  # all at one stage, after the others
        steps = [unit for unit in units if not _EXPERT.search(unit)] + experts[:1]
        start = {unit: stage + _STAGES * i for i, unit in enumerate(steps)}
        start |= dict.fromkeys(experts, stage + _STAGES * (len(steps) - 1))
        for unit, linears in units.items():
            is_expert = _EXPERT.search(unit) is not None
            share = self.shares.get(unit, 1 / len(experts)) if is_expert else 1.0
            self._add_unit(unit, linears, block, start[unit], share * self._visited if is_expert else 1.0)
        width = next((_shape(linears[0])[-1] for linears in units.values()), 0)
        self._add_rest(members, block, [start[unit] for unit in steps] or [stage], width)
        self.operations += [Operation("residual", block, start[unit] + _OUT, width) for unit in steps]
        return stage + _STAGES * max(1, len(steps)), width

    def _add_unit(self, unit: str, linears: list[Submodule], block: int, start: int, visits: float) -> None:
        is_attention = bool(_ATTENTION.search(unit)) and len(linears) > 1
        *ins, out = linears
        for entry in linears:
            is_out = entry is out and bool(ins)
            times = min(self._visited, _shape(entry)[0]) if entry.form == "experts" else visits
            part = self._add(entry, block, start + (_OUT if is_out else _IN), unit, is_out, times)
            self.parts[entry.name] = replace(part, reads_attention=is_attention and is_out)
        if not ins:
            return
        width = _shape(out)[-1]
        made = sum(_shape(entry)[-2] for entry in ins if _shape(entry)[-2] > 1)
        if is_attention:
            heads = self._setting(_HEADS, int, 0)
            operation = Operation(
                "attention",
                block,
                start + _CORE,
                width,
                keys=max(0, (made - width) // 2),
                heads=heads if heads and width % heads == 0 else max(1, width // 64),
                is_causal=self.causality.get(unit, True),
            )
        else:
            is_routed = out.form == "experts" or bool(_EXPERT.search(unit))
            operation = Operation(
                "activation",
                block,
                start + _CORE,
                width,
                function=self._setting(_FUNCTIONS, str, "silu"),
                is_gated=made >= 2 * width,
                weighted=_shape(out)[-2] if is_routed else 0,
                visits=self.parts[out.name].visits,
            )
        self.operations.append(operation)

    def _add_rest(self, members: list[Submodule], block: int, starts: list[int], width: int) -> None:
        """Add a block's norms, biases and other parameters; assume one norm a unit if the model has none at all."""
        rest = [entry for entry in members if entry.name not in self.parts]
        wide = [entry for entry in rest if entry.name in self.norms and _width(entry) == width]
        for entry in rest:
            owner = self.parts.get(entry.name.removesuffix(".bias"))
            at = starts[0] if owner is None else owner.stage
            if entry in wide:
                at = starts[wide.index(entry) * len(starts) // len(wide)]
                self._add_norm(entry, block, at, width)
            elif entry.name in self.norms:  # inside the attention: a norm of each head, or of all heads at once
                at = starts[0] + _IN
                self._add_norm(entry, block, at, self._heads_width(entry, block))
            self._add(entry, block, at)
        if not self.norms:
            self.operations += [Operation("rms_norm", block, at, width) for at in starts]

    def _heads_width(self, norm: Submodule, block: int) -> int:
        attention = next((o for o in self.operations if o.block == block and o.kind == "attention"), None)
        if attention is None:
            return _width(norm)
        is_key = re.search(r"(^|[._])k", norm.name.rsplit(".", 1)[-1]) is not None
        return attention.keys if is_key else attention.width

    def _add_norm(self, entry: Submodule, block: int, stage: int, width: int) -> None:
        self.operations.append(Operation("rms_norm" if self.norms[entry.name] else "norm", block, stage, width))

    def _add(
        self,
        entry: Submodule,
        block: int,
        stage: int,
        unit: str | None = None,
        is_out: bool = False,
        visits: float = 1.0,
    ) -> Part:
        """Add a weight; `unit` is that of a matrix."""
        shape, source = _shape(entry), -1
        if unit is not None:
            source = self.sources.setdefault((block, unit, is_out, shape[-1]), len(self.sources))
        self.parts[entry.name] = Part(
            name=entry.name,
            form=entry.form,
            shape=shape,
            depth=entry.depth,
            block=block,
            stage=stage,
            source=source,
            visits=visits,
            is_matrix=unit is not None,
            is_quantizable=entry.name in self.linear,
        )
        return self.parts[entry.name]

    @property
    def _visited(self) -> int:
        return self._setting(EXPERTS_PER_TOKEN, int, _VISITED_BY_DEFAULT)

    def _setting(self, names: Sequence[str], kind: type[_Setting], default: _Setting) -> _Setting:
        """Return the first of the config's settings that is given."""
        return next((found for name in names if isinstance(found := self.settings.get(name), kind) and found), default)


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


def _token_shares(blueprint: Blueprint) -> dict[str, float]:
    """Return the share of tokens that visit each expert by its unit, where the blueprint has it."""
    return {
        _unit_of(entry.name): entry.token_share
        for entry in blueprint
        if entry.token_share is not None and _EXPERT.search(entry.name)
    }


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
