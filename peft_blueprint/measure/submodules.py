"""Find a model's weights and adaptable submodules: names, kinds, depths, groups, shapes and storage."""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .._text import format_names, shape_str
from ..blueprint import ADAPTABLE, Form, Submodule
from ..errors import MismatchError
from .bnb_cpu import undo_cpu_repack
from .options import Include


# Heads are trained whole or not at all: PEFT adds these to modules_to_save for classification tasks.
_CLASSIFIER_HEADS = {"classifier", "score", "qa_outputs", "classification_head"}
_READ_BY_MAMBA = ("dt_proj", "out_proj")
_ROUTERS = ("gate", "router", "shared_expert_gate")
_QUANTIZED_WEIGHTS = ("Params4bit", "Int8Params")  # bitsandbytes'; 4-bit weights may be stored as any dtype
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
# path components that PEFT, activation checkpointing and torch.compile insert
_WRAPPERS = ("base_layer", "original_module", "_checkpoint_wrapped_module", "_orig_mod")
_ADAPTER_PART = re.compile(r"(^|\.)(lora_\w+|modules_to_save)(\.|$)")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside a `DistributedDataParallel` and a `PeftModel`; any other unchanged."""
    model = without_ddp(model)
    peft = sys.modules.get("peft")  # a PeftModel cannot exist before peft was imported
    return cast(Any, model).get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model


def without_ddp(model: nn.Module) -> nn.Module:
    """Return the model inside a `DistributedDataParallel` or `DataParallel`; any other unchanged."""
    is_wrapped = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    return cast(nn.Module, model.module) if is_wrapped else model


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return a module's class, before FSDP2 replaced it by a subclass."""
    return cast(type[nn.Module], next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule)))


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield every linear module with its name in the unwrapped model, without adapters' own matrices.

    These are `nn.Linear`, its 4- and 8-bit subclasses of bitsandbytes, and GPT-2's `Conv1D`.
    """
    for name, module in unwrap(model).named_modules():
        if _ADAPTER_PART.search(name):
            continue
        if isinstance(module, nn.Linear) or is_conv1d(module):
            yield _plain_name(name), cast(nn.Linear, module)  # Conv1D has a transposed weight


@dataclass(frozen=True)
class Weight:
    """One weight of a model: `parameter` of `module`, called `name` in the unwrapped model."""

    name: str
    module: nn.Module
    parameter: str
    form: Form

    @property
    def tensor(self) -> nn.Parameter:
        """The parameter itself, also if it is quantized or sharded."""
        return cast(nn.Parameter, getattr(self.module, self.parameter))

    @property
    def is_transposed(self) -> bool:
        """Whether these are experts stored as (experts, d_in, d_out)."""
        return self.form == "experts" and vars(self.module).get("is_transposed") is True

    @property
    def shape(self) -> tuple[int, ...]:
        """(d_out, d_in) of linear modules, (experts, d_out, d_in) of fused experts, otherwise the parameter's own."""
        if self.form in ("linear", "head"):
            return shape_of(cast(nn.Linear, self.module))
        shape = tuple(self.tensor.shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self.is_transposed else shape


def find_weights(model: nn.Module) -> tuple[Weight, ...]:
    """Return every weight of a model once, in the model's order, without adapters; a tied one under its first name.

    A `weight` has the name of its module. Other parameters, and fused experts, have their own.
    """
    base = cast(Any, unwrap(model))
    linear = {id(module) for _, module in linear_modules(model)}
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    heads = set() if head is None else {id(module) for module in head.modules()}  # PEFT may have wrapped it
    places = _places_of_parameters(base)
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
            form = _form_of(module, key, id(module) in linear)
            if form == "linear" and _must_not_be_adapted(base, path, module):
                form = "parameter"
            if key == "weight" and form != "experts":  # PEFT addresses those by their parameter's name
                name = name.removesuffix(".weight")
            if form == "linear" and places[id(parameter)] > 1:  # an adapter on one place would be missing at the other
                form = "parameter"
            elif form == "linear" and (id(module) in heads or not _CLASSIFIER_HEADS.isdisjoint(name.split("."))):
                form = "head"
            weights.append(Weight(name, module, key, form))
    return tuple(weights)


def find_submodules(model: nn.Module, include: Include = "adaptable") -> tuple[Submodule, ...]:
    """Return the weights of a model in its order, without statistics.

    Args:
        model: with or without adapters.
        include: "adaptable" for weights that an adapter can be put on, which are linear layers and fused experts; "all"
            for embeddings, norms, biases, convolutions and heads too.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> [submodule.kind for submodule in find_submodules(tiny_llama())][:4]
        ['q_proj', 'k_proj', 'v_proj', 'o_proj']
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
                quantized=is_quantized(weight.tensor) or _state_of_4bit(weight.module, weight.parameter) is not None,
            )
        )
    return tuple(found)


def parameters_per_token(model: nn.Module, submodules: Sequence[str] | None = None) -> tuple[int, int]:
    """Count the weights of linear layers and of the head, a tied one included, that each token is multiplied with.

    Experts count as if every token used all of them.

    Returns:
        The number of all of them, and of those from the first of `submodules` on (of all by default).
    """
    weights = [w for w in find_weights(model) if w.form in ("linear", "head", "experts")]
    counts = [math.prod(weight.shape) for weight in weights]
    base: Any = unwrap(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    known = {id(weight.module) for weight in weights if weight.form == "head"}
    tied = 0 if head is None or id(head) in known else int(head.weight.numel())
    first = next((i for i, w in enumerate(weights) if submodules is not None and w.name in set(submodules)), 0)
    return sum(counts) + tied, sum(counts[first:]) + tied


def select_submodules(submodules: Sequence[Submodule], names: Collection[str] | None) -> tuple[Submodule, ...]:
    """Select submodules by name, in the model's order; all for None.

    Raises:
        MismatchError: for an unknown name, or no names.
    """
    if names is None:
        return tuple(submodules)
    if isinstance(names, str):
        raise MismatchError(f"submodules must be a list of names, got {names!r}. Give [{names!r}].")
    missing = sorted(set(names) - {submodule.name for submodule in submodules})
    if missing or not names:
        raise MismatchError(
            f"{len(missing)} of {len(names)} submodules are not in this model ({format_names(missing) or 'none was named'}), which "
            f"has {format_names([submodule.name for submodule in submodules])}. Give names of its submodules, in full."
        )
    return tuple(submodule for submodule in submodules if submodule.name in set(names))


def shape_of(module: nn.Linear) -> tuple[int, int]:
    """Return (d_out, d_in) of a linear module, also if it is quantized or a `Conv1D`."""
    if is_conv1d(module):
        d_in, d_out = module.weight.shape
        return int(d_out), int(d_in)
    return int(module.out_features), int(module.in_features)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether this is transformers' Conv1D, a linear layer whose weight is stored as (d_in, d_out)."""
    own = class_of(module)
    return own.__name__ == "Conv1D" and own.__module__ == "transformers.pytorch_utils"


def is_quantized(weight: Tensor) -> bool:
    """Return whether a weight is stored in 4 or 8 bits, which cannot take a gradient."""
    return type(weight).__name__ in _QUANTIZED_WEIGHTS or not weight.is_floating_point()


def is_sharded(weight: Tensor) -> TypeGuard[DTensor]:
    """Return whether this is a DTensor, of which every process holds a part."""
    return isinstance(weight, DTensor)


def dequantized_weight(module: nn.Module, parameter: str = "weight") -> Tensor:
    """Return a weight in floating point, (d_out, d_in); as stored if it is a `Conv1D`'s or not linear.

    A weight that accelerate offloads is fetched. A sharded weight is gathered, so every process must call this.
    """
    weight: Any = getattr(module, parameter)
    hook = vars(module).get("_hf_hook") if weight.is_meta else None
    if hook is not None:
        hook.pre_forward(module)
        try:
            fetched = getattr(module, parameter)
            return cast(Tensor, fetched.data) if fetched.is_meta else dequantized_weight(module, parameter)
        finally:
            hook.post_forward(module, None)
    if is_sharded(weight):  # gathered on the mesh's device, from which FSDP may have offloaded it
        gathered: Any = weight.detach().to(weight.device_mesh.device_type)
        return _from_4bit(gathered.full_tensor(), _state_of_4bit(module, parameter))
    if not is_quantized(weight):
        return cast(Tensor, weight.data)
    if type(weight).__name__ == "Params4bit":
        undo_cpu_repack(weight)
        return _from_4bit(weight.data, weight.quant_state)
    from bitsandbytes import functional

    state = cast(Any, module).state  # an 8-bit layer moves its scale there in its first pass
    return functional.int8_vectorwise_dequant(weight.data, state.SCB if weight.SCB is None else weight.SCB)


def _state_of_4bit(module: nn.Module, parameter: str) -> Any:
    """Return bitsandbytes' quantization state of a layer's 4-bit weight, or None.

    It is read from the layer, because the weight loses it when FSDP shards it.
    """
    return vars(module).get("quant_state") if parameter == "weight" else None


def _from_4bit(weight: Tensor, state: Any) -> Tensor:
    if state is None:
        return weight
    from bitsandbytes import functional

    return functional.dequantize_4bit(weight, state)


def structure_digest(submodules: Sequence[Submodule]) -> str:
    """Return `sha256:…` over the names and shapes of a model's submodules, independent of quantization."""
    lines = sorted(f"{s.name} {shape_str(s.shape)}\n" for s in submodules if s.shape is not None)
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def _plain_name(path: str) -> str:
    """Return a path of an adapted or wrapped model as it is in the plain one."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _places_of_parameters(model: nn.Module) -> Counter[int]:
    """Count the places of a model that hold each parameter (by id). A block that is called repeatedly is one place."""
    holders: Counter[int] = Counter(
        id(child) for module in model.modules() for child in vars(module)["_modules"].values()
    )
    places: Counter[int] = Counter()
    for module in model.modules():
        for parameter in vars(module)["_parameters"].values():
            places[id(parameter)] += max(1, holders[id(module)])
    return places


def _must_not_be_adapted(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Return whether an adapter on this linear layer would have no effect, or would change the routing of experts.

    `nn.MultiheadAttention` and Mamba's kernels read weights without calling the layer. Routers stand beside experts.
    """
    *parents, own = (part for part in path.split(".") if part not in _WRAPPERS[:2])
    parent = model.get_submodule(".".join(parents))
    return (
        class_of(module).__name__ == "NonDynamicallyQuantizableLinear"
        or ("mamba" in class_of(parent).__name__.lower() and own in _READ_BY_MAMBA)
        or ("experts" in vars(parent)["_modules"] and own in _ROUTERS)
    )


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
    """Return kind, depth and group of every name.

    A name is split at its first number: `model.layers` is the stack, 3 the depth, `self_attn.q_proj` the path in the
    block. The kind is the shortest suffix of that path that is unique in the stack (`q_proj`; GPT-2 has `attn.c_proj`
    and `mlp.c_proj`). If a model has several stacks, their names precede it (T5: `encoder.…`).
    """
    split = {name: _split(name) for name in names}
    stacks = {stack for stack, depth, _ in split.values() if depth is not None}
    paths: dict[str, set[str]] = defaultdict(set)
    for stack, _, path in split.values():
        paths[stack].add(path)
    places = {}
    for name, (stack, depth, path) in split.items():
        prefix = f"{_short_stack(stack, stacks)}." if len(stacks) > 1 and depth is not None else ""
        kind = prefix + _shortest_unique_suffix(path, paths[stack])
        role = "attn" if re.search(r"attn|attention", path, re.IGNORECASE) else "ffn"
        places[name] = (kind, depth, None if depth is None else f"{prefix}{role}.{depth}")
    return places


def _split(name: str) -> tuple[str, int | None, str]:
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):  # a number at the end is a layer's place in a sequence, not a block
        if part.isdigit():
            return ".".join(parts[:i]), int(part), ".".join(p for p in parts[i + 1 :] if not p.isdigit())
    return "", None, name


def _short_stack(stack: str, stacks: set[str]) -> str:
    """Return the first component of a stack's name in which the stacks differ."""
    columns = zip(*(s.split(".") for s in sorted(stacks)), strict=False)
    for i, column in enumerate(columns):
        if len(set(column)) > 1:
            return stack.split(".")[i]
    return stack.replace(".", "_")


def _shortest_unique_suffix(path: str, paths: set[str]) -> str:
    parts = path.split(".")
    for length in range(1, len(parts)):
        ending = ".".join(parts[-length:])
        if not ending[0].isdigit() and sum(p == ending or p.endswith("." + ending) for p in paths) == 1:
            return ending
    return path
