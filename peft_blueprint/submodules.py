"""What in a model can be adapted: names, kinds, depths, groups, shapes, quantised or not.

Reads a model's structure and, for norms, its weights; never changes it. Knows nothing of gradients.
"""

import hashlib
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from .blueprint import Blueprint
from .entry import ADAPTABLE, Form, Submodule, some
from .errors import MismatchError


# Heads are trained whole or not at all: PEFT adds these to modules_to_save for classification tasks.
_CLASSIFIER_HEADS = ("classifier", "score", "qa_outputs")
_QUANTIZED_WEIGHTS = ("Params4bit", "Int8Params")  # bitsandbytes'; 4-bit weights may be stored as any dtype
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_ADAPTER_PART = re.compile(r"(^|\.)(lora_\w+|modules_to_save)(\.|$)")

Include = Literal["adaptable", "all"]


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a `PeftModel`; any other model as it is."""
    peft = sys.modules.get("peft")  # a PeftModel cannot exist before peft was imported
    return cast(Any, model).get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear module with its name in the unwrapped model, adapters' own matrices left out.

    Linear here means `nn.Linear` (bitsandbytes' 4- and 8-bit layers are subclasses of it) and GPT-2's `Conv1D`.
    """
    for name, module in unwrap(model).named_modules():
        if _ADAPTER_PART.search(name):
            continue
        if isinstance(module, nn.Linear) or is_conv1d(module):
            yield _plain_name(name), cast(nn.Linear, module)  # Conv1D has a weight too, the other way round


@dataclass(frozen=True)
class Weight:
    """Where one weight of a model is: `parameter` of `module`, called `name` in the unwrapped model."""

    name: str
    module: nn.Module
    parameter: str
    form: Form

    @property
    def tensor(self) -> nn.Parameter:
        """The parameter itself, in whatever storage."""
        return cast(nn.Parameter, getattr(self.module, self.parameter))

    @property
    def shape(self) -> tuple[int, ...]:
        """(d_out, d_in) of a linear module's; the parameter's own otherwise."""
        is_linear = self.form in ("linear", "head")
        return shape_of(cast(nn.Linear, self.module)) if is_linear else tuple(self.tensor.shape)


def find_weights(model: nn.Module) -> tuple[Weight, ...]:
    """Every weight of a model once, in the model's order: a tied one under its first name, adapters' left out.

    A module's `weight` goes by the name of the module, any other parameter by its own.
    """
    base = cast(Any, unwrap(model))
    linear = {id(module) for _, module in linear_modules(model)}
    head = base.get_output_embeddings() if _is_transformers(base) else None
    owners = Counter(id(parameter) for _, parameter in base.named_parameters(remove_duplicate=False))
    seen: set[int] = set()
    weights = []
    for path, module in base.named_modules():
        if _ADAPTER_PART.search(path):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = _plain_name(f"{path}.{key}" if path else key)
            name = name.removesuffix(".weight") if key == "weight" else name
            form = _form_of(module, key, id(module) in linear)
            if form == "linear" and (module is head or name.rpartition(".")[2] in _CLASSIFIER_HEADS):
                form = "head"
            if form == "linear" and owners[id(parameter)] > 1:  # an adapter on one would be missing from the other
                form = "parameter"
            weights.append(Weight(name, module, key, form))
    return tuple(weights)


def find_submodules(model: nn.Module, include: Include = "adaptable") -> tuple[Submodule, ...]:
    """The weights of a model in its order, without statistics.

    Args:
        model: with or without adapters.
        include: "adaptable", those that an adapter may be put on: linear layers, and experts that are fused into one
            parameter. "all": embeddings, norms, biases, convolutions and heads too.
    """
    weights = find_weights(model)
    places = _places([weight.name for weight in weights])
    places |= _places([weight.name for weight in weights if weight.form in ("linear", "experts")])
    found = []
    for weight in weights:
        if include == "adaptable" and weight.form not in ADAPTABLE:
            continue
        kind, depth, group = places[weight.name]
        found.append(
            Submodule(
                name=weight.name,
                kind=".".join(weight.name.split(".")[-2:]) if weight.form == "experts" else kind,
                depth=depth,
                group=group if weight.form in ADAPTABLE else None,
                shape=weight.shape,
                form=weight.form,
                quantized=is_quantized(weight.tensor),
            )
        )
    return tuple(found)


def shape_of(module: nn.Linear) -> tuple[int, int]:
    """(d_out, d_in) of a linear module, whatever its storage."""
    if is_conv1d(module):
        d_in, d_out = module.weight.shape
        return int(d_out), int(d_in)
    return int(module.out_features), int(module.in_features)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear layer whose weight is stored as (d_in, d_out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is held in a form that cannot take a gradient (4 or 8 bits)."""
    return type(weight).__name__ in _QUANTIZED_WEIGHTS or not weight.is_floating_point()


def weight_norm(module: nn.Module, parameter: str = "weight") -> float:
    """Frobenius norm of a module's weight, of the dequantised weight for 4- and 8-bit layers."""
    return dequantized_weight(module, parameter).float().norm().item()


def dequantized_weight(module: nn.Module, parameter: str = "weight") -> Tensor:
    """The weight in floating point: of shape (d_out, d_in), or as stored for Conv1D and what is not linear."""
    weight: Any = getattr(module, parameter)
    if not is_quantized(weight):
        return cast(Tensor, weight.data)
    from bitsandbytes import functional

    if type(weight).__name__ == "Params4bit":
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    state = cast(Any, module).state  # an 8-bit layer moves its scale there in its first pass
    return functional.int8_vectorwise_dequant(weight.data, state.SCB if weight.SCB is None else weight.SCB)


def structure_digest(submodules: Sequence[Submodule]) -> str:
    """`sha256:…` over the names and shapes of a model's linear submodules, the same however they are quantised."""
    lines = sorted(f"{s.name} {by(s.shape)}\n" for s in submodules if s.shape is not None)
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def by(shape: Sequence[int]) -> str:
    """A shape as one says it: 576x1536."""
    return "x".join(map(str, shape))


def check_fits(blueprint: Blueprint, model: nn.Module) -> None:
    """Raise MismatchError unless every entry of a blueprint is a submodule of the model, of the same shape."""
    shapes = {weight.name: weight.shape for weight in find_weights(model)}
    missing = [entry.name for entry in blueprint if entry.name not in shapes]
    if missing:
        raise MismatchError(
            f"The blueprint of {blueprint.model_id!r} does not fit this {type(unwrap(model)).__name__}: "
            f"{len(missing)} of its {len(blueprint)} entries are not in the model ({some(missing)}), which has "
            f"{some(list(shapes)) or 'no weights'}. Use a blueprint of this model, or measure one with "
            "generate_blueprint(model, batches)."
        )
    for entry in blueprint:
        if entry.shape is not None and entry.shape != shapes[entry.name]:
            raise MismatchError(
                f"{entry.name!r} is {by(entry.shape)} in the blueprint of {blueprint.model_id!r} and "
                f"{by(shapes[entry.name])} in this model: it is a blueprint of another size of it. Use this model's own, or "
                "measure one with generate_blueprint(model, batches)."
            )


def _is_transformers(model: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _plain_name(path: str) -> str:
    """A path in an adapted model as it is in the unwrapped one."""
    return ".".join(part for part in path.split(".") if part not in ("base_layer", "original_module"))


def _form_of(module: nn.Module, parameter: str, is_linear: bool) -> Form:
    if parameter.endswith("bias"):
        return "bias"
    if is_linear and parameter == "weight":
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, _CONVOLUTIONS):
        return "convolution"
    if getattr(module, parameter).dim() == 3 and "expert" in type(module).__name__.lower():
        return "experts"
    return "norm" if "norm" in type(module).__name__.lower() else "parameter"


def _places(names: Sequence[str]) -> dict[str, tuple[str, int | None, str | None]]:
    """Kind, depth and group of every name.

    A name is split at its first number: `model.layers` is the stack, 3 the depth, `self_attn.q_proj` the path in the
    block. The kind is the shortest ending of that path that no other path of the stack shares (`q_proj`; GPT-2 has
    `attn.c_proj` and `mlp.c_proj`), with the stack's name before it where a model has several (T5: `encoder.…`).
    """
    split = {name: _split(name) for name in names}
    stacks = {stack for stack, depth, _ in split.values() if depth is not None}
    paths: dict[str, set[str]] = defaultdict(set)
    for stack, _, path in split.values():
        paths[stack].add(path)
    places = {}
    for name, (stack, depth, path) in split.items():
        prefix = f"{_short_stack(stack, stacks)}." if len(stacks) > 1 and depth is not None else ""
        kind = prefix + _shortest_unique_ending(path, paths[stack])
        role = "attn" if re.search(r"attn|attention", path, re.IGNORECASE) else "ffn"
        places[name] = (kind, depth, None if depth is None else f"{prefix}{role}.{depth}")
    return places


def _split(name: str) -> tuple[str, int | None, str]:
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:i]), int(part), ".".join(p for p in parts[i + 1 :] if not p.isdigit())
    return "", None, name


def _short_stack(stack: str, stacks: set[str]) -> str:
    """The first component of a stack's name in which the stacks differ."""
    columns = zip(*(s.split(".") for s in sorted(stacks)), strict=False)
    for i, column in enumerate(columns):
        if len(set(column)) > 1:
            return stack.split(".")[i]
    return stack.replace(".", "_")


def _shortest_unique_ending(path: str, paths: set[str]) -> str:
    parts = path.split(".")
    for length in range(1, len(parts)):
        ending = ".".join(parts[-length:])
        if sum(p == ending or p.endswith("." + ending) for p in paths) == 1:
            return ending
    return path
