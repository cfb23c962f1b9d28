"""What in a model can be adapted: names, kinds, depths, groups, shapes, quantised or not.

Reads a model's structure and, for norms, its weights; never changes it. Knows nothing of gradients.
"""

import hashlib
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from torch import Tensor, nn

from .._text import format_names, shape_str
from ..blueprint import ADAPTABLE, Form, Submodule
from ..errors import MismatchError
from .bnb_cpu import undo_cpu_repack
from .options import Include


if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


# Heads are trained whole or not at all: PEFT adds these to modules_to_save for classification tasks.
_CLASSIFIER_HEADS = {"classifier", "score", "qa_outputs", "classification_head"}
_READ_BY_MAMBA = ("dt_proj", "out_proj")
_ROUTERS = ("gate", "router", "shared_expert_gate")
_QUANTIZED_WEIGHTS = ("Params4bit", "Int8Params")  # bitsandbytes'; 4-bit weights may be stored as any dtype
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
# PEFT's around what it adapts, PyTorch's around what it checkpoints or compiles
_WRAPPERS = ("base_layer", "original_module", "_checkpoint_wrapped_module", "_orig_mod")
_ADAPTER_PART = re.compile(r"(^|\.)(lora_\w+|modules_to_save)(\.|$)")


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a `PeftModel`, and both inside `DistributedDataParallel`; any other as it is."""
    model = without_ddp(model)
    peft = sys.modules.get("peft")  # a PeftModel cannot exist before peft was imported
    return cast(Any, model).get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model


def without_ddp(model: nn.Module) -> nn.Module:
    """The model inside a `DistributedDataParallel` or `DataParallel`; any other as it is."""
    is_wrapped = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    return cast(nn.Module, model.module) if is_wrapped else model


def class_of(module: nn.Module) -> type[nn.Module]:
    """A module's class; the one it had before, where FSDP2 made it one of its own."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # no module can be sharded before that was imported
    classes = type(module).__mro__
    return classes[0] if fsdp is None else next(c for c in classes if not issubclass(c, fsdp.FSDPModule))


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
    def is_transposed(self) -> bool:
        """Whether these are experts stored as (experts, d_in, d_out), which transformers marks so."""
        return self.form == "experts" and vars(self.module).get("is_transposed") is True

    @property
    def shape(self) -> tuple[int, ...]:
        """(d_out, d_in) of a linear module's, (experts, d_out, d_in) of fused experts; the parameter's own otherwise."""
        if self.form in ("linear", "head"):
            return shape_of(cast(nn.Linear, self.module))
        shape = tuple(self.tensor.shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self.is_transposed else shape


def find_weights(model: nn.Module) -> tuple[Weight, ...]:
    """Every weight of a model once, in the model's order: a tied one under its first name, adapters' left out.

    A module's `weight` goes by the name of the module, any other parameter, and fused experts, by its own.
    """
    base = cast(Any, unwrap(model))
    linear = {id(module) for _, module in linear_modules(model)}
    head = base.get_output_embeddings() if _is_transformers(base) else None
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
            if form == "linear" and _is_linear_by_name_alone(base, path, module):
                form = "parameter"
            if key == "weight" and form != "experts":  # PEFT wants those by their parameter's name
                name = name.removesuffix(".weight")
            if form == "linear" and places[id(parameter)] > 1:  # an adapter on one would be missing from the other
                form = "parameter"
            elif form == "linear" and (id(module) in heads or not _CLASSIFIER_HEADS.isdisjoint(name.split("."))):
                form = "head"
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
                quantized=is_quantized(weight.tensor) or _state_of_4bit(weight.module, weight.parameter) is not None,
            )
        )
    return tuple(found)


def parameters_per_token(model: nn.Module, submodules: Sequence[str] | None = None) -> tuple[int, int]:
    """How many weights each token is multiplied with, those of linear layers and the head, a tied one included; and how
    many of them come with or after the first of some submodules, all for None. Experts count as if all were asked.
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
    """Those of these names, in their own order; all for None.

    Raises:
        MismatchError: for a name that is not among them, or for none at all.
    """
    if names is None:
        return tuple(submodules)
    if isinstance(names, str):
        raise MismatchError(f"submodules={names!r} is one name: give a list, [{names!r}].")
    missing = sorted(set(names) - {submodule.name for submodule in submodules})
    if missing or not names:
        raise MismatchError(
            f"{len(missing)} of {len(names)} submodules are not in this model ({format_names(missing) or 'none was named'}), which "
            f"has {format_names([submodule.name for submodule in submodules])}. Give names of its submodules, in full."
        )
    return tuple(submodule for submodule in submodules if submodule.name in set(names))


def shape_of(module: nn.Linear) -> tuple[int, int]:
    """(d_out, d_in) of a linear module, whatever its storage."""
    if is_conv1d(module):
        d_in, d_out = module.weight.shape
        return int(d_out), int(d_in)
    return int(module.out_features), int(module.in_features)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear layer whose weight is stored as (d_in, d_out)."""
    own = class_of(module)
    return own.__name__ == "Conv1D" and own.__module__ == "transformers.pytorch_utils"


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is held in a form that cannot take a gradient (4 or 8 bits)."""
    return type(weight).__name__ in _QUANTIZED_WEIGHTS or not weight.is_floating_point()


def is_sharded(weight: Tensor) -> "TypeGuard[DTensor]":
    """Whether this is a DTensor, of which every process holds a part."""
    tensor = sys.modules.get("torch.distributed.tensor")  # a DTensor cannot exist before that was imported
    return tensor is not None and isinstance(weight, tensor.DTensor)


def dequantized_weight(module: nn.Module, parameter: str = "weight") -> Tensor:
    """The weight in floating point: of shape (d_out, d_in), or as stored for Conv1D and what is not linear.

    One that accelerate keeps elsewhere is fetched. One that is sharded over processes is gathered, so that all of them
    must ask for it.
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
    if is_sharded(weight):  # its processes meet on the mesh's device, from which FSDP may have offloaded it
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
    """How a linear layer's weight is held in 4 bits, as bitsandbytes notes on the layer; None where it is not.

    The weight itself no longer says so once FSDP shards it.
    """
    return vars(module).get("quant_state") if parameter == "weight" else None


def _from_4bit(weight: Tensor, state: Any) -> Tensor:
    if state is None:
        return weight
    from bitsandbytes import functional

    return functional.dequantize_4bit(weight, state)


def structure_digest(submodules: Sequence[Submodule]) -> str:
    """`sha256:…` over the names and shapes of a model's linear submodules, the same however they are quantised."""
    lines = sorted(f"{s.name} {shape_str(s.shape)}\n" for s in submodules if s.shape is not None)
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_transformers(model: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _plain_name(path: str) -> str:
    """A path in an adapted or wrapped model as it is in the plain one."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _places_of_parameters(model: nn.Module) -> Counter[int]:
    """At how many places of a model each parameter (by its id) stands. A block that is called many times is one."""
    holders: Counter[int] = Counter(
        id(child) for module in model.modules() for child in vars(module)["_modules"].values()
    )
    places: Counter[int] = Counter()
    for module in model.modules():
        for parameter in vars(module)["_parameters"].values():
            places[id(parameter)] += max(1, holders[id(module)])
    return places


def _is_linear_by_name_alone(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether an adapter on this linear layer would go unheard, or unsettle which experts are chosen.

    `nn.MultiheadAttention` reads its output projection's weight without calling it, and so do Mamba's kernels. A router
    stands beside its experts.
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
    for i, part in enumerate(parts[:-1]):  # a number at the end is a layer's place in a sequence, not a block
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
        if not ending[0].isdigit() and sum(p == ending or p.endswith("." + ending) for p in paths) == 1:
            return ending
    return path
