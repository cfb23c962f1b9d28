"""What in a model can be adapted: names, kinds, depths, groups, shapes, quantised or not.

Reads a model's structure and, for norms, its weights; never changes it. Knows nothing of gradients.
"""

import hashlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import Tensor, nn

from .blueprint import Blueprint
from .entry import Submodule, some
from .errors import MismatchError


# Heads are trained whole or not at all: PEFT adds these to modules_to_save for classification tasks.
_CLASSIFIER_HEADS = ("classifier", "score", "qa_outputs")
_QUANTIZED_WEIGHTS = ("Params4bit", "Int8Params")  # bitsandbytes'; 4-bit weights may be stored as any dtype
_ADAPTER_PART = re.compile(r"(^|\.)(lora_\w+|modules_to_save)(\.|$)")


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
            parts = name.split(".")
            name = ".".join(part for part in parts if part not in ("base_layer", "original_module"))
            yield name, cast(nn.Linear, module)  # Conv1D has a weight too, the other way round


def find_submodules(model: nn.Module) -> tuple[Submodule, ...]:
    """The linear submodules that an adapter may be put on, in the model's order, without statistics.

    Output heads (tied to the embeddings or not) and classification heads are left out.
    """
    base = cast(Any, unwrap(model))
    head = base.get_output_embeddings() if _is_transformers(base) else None
    found = [
        (name, module)
        for name, module in linear_modules(model)
        if module is not head and name.rpartition(".")[2] not in _CLASSIFIER_HEADS
    ]
    places = _places([name for name, _ in found])
    return tuple(
        Submodule(
            name=name,
            kind=places[name][0],
            depth=places[name][1],
            group=places[name][2],
            shape=shape_of(module),
            quantized=is_quantized(module),
        )
        for name, module in found
    )


def shape_of(module: nn.Linear) -> tuple[int, int]:
    """(d_out, d_in) of a linear module, whatever its storage."""
    if is_conv1d(module):
        d_in, d_out = module.weight.shape
        return int(d_out), int(d_in)
    return int(module.out_features), int(module.in_features)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear layer whose weight is stored as (d_in, d_out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_quantized(module: nn.Linear) -> bool:
    """Whether the weight is held in a form that cannot take a gradient (4 or 8 bits)."""
    return type(module.weight).__name__ in _QUANTIZED_WEIGHTS or not module.weight.is_floating_point()


def weight_norm(module: nn.Linear) -> float:
    """Frobenius norm of the weight, of the dequantised weight for 4- and 8-bit layers."""
    return dequantized_weight(module).float().norm().item()


def dequantized_weight(module: nn.Linear) -> Tensor:
    """The weight in floating point: of shape (d_out, d_in), or as stored for Conv1D."""
    if not is_quantized(module):
        return module.weight.data
    from bitsandbytes import functional

    weight: Any = module.weight
    if type(weight).__name__ == "Params4bit":
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    state: Any = module.state  # an 8-bit layer moves its scale there in its first pass
    return functional.int8_vectorwise_dequant(weight.data, state.SCB if weight.SCB is None else weight.SCB)


def structure_digest(submodules: Sequence[Submodule]) -> str:
    """`sha256:…` over the names and shapes of a model's linear submodules, the same however they are quantised."""
    lines = sorted(f"{s.name} {s.shape[0]}x{s.shape[1]}\n" for s in submodules if s.shape is not None)
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def check_fits(blueprint: Blueprint, model: nn.Module) -> None:
    """Raise MismatchError unless every entry of a blueprint is a submodule of the model, of the same shape."""
    shapes = {name: shape_of(module) for name, module in linear_modules(model)}
    missing = [entry.name for entry in blueprint if entry.name not in shapes]
    if missing:
        raise MismatchError(
            f"The blueprint of {blueprint.model_id!r} does not fit this {type(unwrap(model)).__name__}: "
            f"{len(missing)} of its {len(blueprint)} entries are not in the model ({some(missing)}), which has "
            f"{some(list(shapes)) or 'no linear submodules'}. Use a blueprint of this model, or measure one with "
            "generate_blueprint(model, batches)."
        )
    for entry in blueprint:
        if entry.shape is not None and entry.shape != shapes[entry.name]:
            raise MismatchError(
                f"{entry.name!r} is {entry.shape[0]}x{entry.shape[1]} in the blueprint of {blueprint.model_id!r} and "
                f"{shapes[entry.name][0]}x{shapes[entry.name][1]} in this model: it is a blueprint of another size of "
                "it. Use this model's own, or measure one with generate_blueprint(model, batches)."
            )


def _is_transformers(model: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


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
