"""Find a model's weights and adaptable submodules: names, kinds, depths, groups, shapes and storage."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from operator import index
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .._text import format_names, shape_str
from ..blueprint import ADAPTABLE, Form, Submodule, name_expert
from ..errors import BlueprintError, MismatchError
from .bnb_cpu import undo_cpu_repack
from .options import Include


# Heads are trained whole or not at all: PEFT adds these to modules_to_save for classification tasks.
_CLASSIFIER_HEADS = {"classifier", "score", "qa_outputs", "classification_head"}
_COMPARED = 64  # positions of a layer's input and output
# settings of the number of experts that a token visits
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "top_k_experts",
    "top_k",
)
_ROUTERS = ("gate", "router", "shared_expert_gate")
_STORED_AS_ANY_DTYPE = ("Params4bit", "Int8Params")  # quantized weights of bitsandbytes
_SIZES = (
    ("out_features", "in_features"),
    ("outfeatures", "infeatures"),
    ("output_size", "input_size"),
)  # of linear layers; the last two are AutoGPTQ's and Megatron's
# a layer's whole weight given to a function: fused kernels read weights without calling their layers
_READ = re.compile(r"self\.(\w+)\.weight[ \t]*[,)@\n]")
_NOT_COMPUTED_WITH = re.compile(r"isinstance\(|getattr\(|hasattr\(|\binit\.")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
# children in which PEFT's modules hold the module that they replaced; their other children are adapters
_REPLACED = ("base_layer", "original_module", "token_adapter", "model")
# crossattention of BERT and GPT-2, cross_attn of Mllama, encoder_attn of BART and Whisper, EncDecAttention of T5
_CROSS_ATTENTION = re.compile(r"(cross|encoder|enc_?dec)_?att", re.IGNORECASE)
_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")  # children of activation checkpointing and torch.compile


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside a `DistributedDataParallel`, `torch.compile` and a `PeftModel`; any other unchanged.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> unwrap(torch.compile(model)) is model
        True
    """
    model = without_ddp(model)
    peft = sys.modules.get("peft")  # a PeftModel cannot exist before peft was imported
    if peft is None:
        return model
    if isinstance(model, peft.PeftModel):
        return unwrap(cast(Any, model).get_base_model())
    if isinstance(model, peft.PeftMixedModel):
        return unwrap(cast(Any, model).base_model)
    return unwrap(cast(Any, model).model) if isinstance(model, peft.tuners.tuners_utils.BaseTuner) else model


def without_ddp(model: nn.Module) -> nn.Module:
    """Return the model inside a wrapper of DDP, `DataParallel`, DeepSpeed or `torch.compile`; any other unchanged."""
    is_engine = any(cls.__name__ == "DeepSpeedEngine" for cls in type(model).__mro__)
    if is_engine or isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return without_ddp(cast(nn.Module, model.module))
    inner = vars(model).get("_modules", {}).get("_orig_mod")  # an OptimizedModule, without importing torch._dynamo
    return model if inner is None else without_ddp(inner)


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return a module's class, before FSDP2 replaced it by a subclass.

    Example:
        >>> class_of(nn.Linear(2, 3)).__name__
        'Linear'
    """
    return cast(type[nn.Module], next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule)))


def require_model(model: Any) -> None:
    """Raise BlueprintError unless this is a torch module."""
    if not isinstance(model, nn.Module):
        shown = repr(model) if isinstance(model, str) else type(model).__name__
        raise BlueprintError(
            f"model must be a torch.nn.Module, got {shown}. Load it first, for example with "
            "AutoModelForCausalLM.from_pretrained(…)."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise BlueprintError("model is compiled by torch.jit, which hides its layers. Give the module itself.")
    if lazy := next((name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)), None):
        raise BlueprintError(f"{lazy!r} of the model has no shape before its first pass. Call the model once.")


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield every linear module with its name in the unwrapped model, without adapters' own matrices.

    These are `nn.Linear` and its subclasses, GPT-2's `Conv1D`, and quantized layers of any class.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> next(name for name, _ in linear_modules(tiny_llama()))
        'model.layers.0.self_attn.q_proj'
    """
    for own in _modules_of(unwrap(model)):
        if _is_linear(own.module):
            yield own.name, cast(nn.Linear, own.module)  # Conv1D has a transposed weight


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
        shape = _size(self.tensor)
        return (*shape[:-2], shape[-1], shape[-2]) if self.is_transposed else shape


def find_weights(model: nn.Module) -> tuple[Weight, ...]:
    """Return every weight of a model once, in the model's order, without adapters; a tied one under its first name.

    Parameters without an element, as some configurations leave them, are left out. A `weight` has the name of its
    module. Other parameters, and fused experts, have their own.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> weight = find_weights(tiny_llama())[1]
        >>> weight.name, weight.form
        ('model.layers.0.self_attn.q_proj', 'linear')
    """
    require_model(model)
    base = cast(Any, unwrap(model))
    linear = {id(module) for _, module in linear_modules(model)}
    heads = {id(part) for part in _heads(base)}
    places = _places_of_parameters(base)
    seen: set[int] = set()
    weights = []
    for own in _modules_of(base):
        module = own.module
        packed = _packed_weight(module)
        parameters = {k: v for k, v in module.named_parameters(recurse=False) if packed is None or not is_quantized(v)}
        parameters |= {} if packed is None else {packed: getattr(module, packed)}
        for key, parameter in parameters.items():
            if id(parameter) in seen or 0 in _size(parameter):
                continue
            seen.add(id(parameter))
            name = f"{own.name}.{key}" if own.name else key
            form = _form_of(module, key, id(module) in linear and key == (packed or "weight"))
            if form == "linear" and _must_not_be_adapted(own):
                form = "parameter"
            if key == (packed or "weight") and form != "experts":  # PEFT addresses those by their parameter's name
                name = own.name or key
            if form == "linear" and places[id(parameter)] > 1:  # an adapter on one place would be missing at the other
                form = "parameter"
            elif form == "linear" and (id(module) in heads or not _CLASSIFIER_HEADS.isdisjoint(name.split("."))):
                form = "head"
            weights.append(Weight(name, module, key, form))
    return tuple(weights)


def find_submodules(model: nn.Module, include: Include = "adaptable", experts: bool = False) -> tuple[Submodule, ...]:
    """Return the weights of a model in its order, without statistics.

    Args:
        model: with or without adapters.
        include: "adaptable" for weights that an adapter can be put on, which are linear layers and fused experts; "all"
            for embeddings, norms, biases, convolutions and heads too.
        experts: list every expert of a fused parameter instead of the parameter, `…experts.17.gate_up_proj`.

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
    return tuple(chain.from_iterable(map(_experts_of, found))) if experts else tuple(found)


def _experts_of(submodule: Submodule) -> list[Submodule]:
    """Return the rows of a fused parameter's experts; any other submodule itself."""
    experts, *shape = submodule.shape or (0,)
    names = [name_expert(submodule.name, i) for i in range(experts)] if submodule.form == "experts" else [None]
    return [
        submodule if name is None else replace(submodule, name=name, shape=tuple(shape), form="expert")
        for name in names
    ]


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the unwrapped model by name, without adapters."""
    return {own.name: own.module for own in _modules_of(unwrap(model))}


def top_k_of(model: nn.Module) -> int | None:
    """Return how many experts a token visits by the model's config, or None."""
    config = getattr(unwrap(model), "config", None)
    text = getattr(config, "text_config", None)
    found = (getattr(holder, name, None) for holder in (text, config) for name in EXPERTS_PER_TOKEN)
    return next((value for value in found if isinstance(value, int) and value), None)


def parameters_per_token(model: nn.Module, submodules: Sequence[str] | None = None) -> tuple[int, int]:
    """Count the weights of linear layers and of the head, a tied one included, that each token is multiplied with.

    Experts count as if every token used all of them.

    Returns:
        The number of all of them, and of those from the first of `submodules` on (of all by default).

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> parameters_per_token(tiny_llama(layers=1), ["model.layers.0.self_attn.q_proj"])
        (10784, 10784)
    """
    weights = [w for w in find_weights(model) if w.form in ("linear", "head", "experts")]
    counts = [math.prod(weight.shape) for weight in weights]
    known = {id(weight.module) for weight in weights}
    tied = sum(math.prod(_size(part.weight)) for part in _heads(unwrap(model)) if id(part) not in known)
    first = next((i for i, w in enumerate(weights) if submodules is not None and w.name in set(submodules)), 0)
    return sum(counts) + tied, sum(counts[first:]) + tied


def _heads(base: nn.Module) -> list[Any]:
    """Return the output layers of a model's language models, without adapters; several if it predicts several tokens."""
    inner = (module for module in base.modules() if isinstance(module, PreTrainedModel))
    heads = {id(head): head for model in inner if (head := model.get_output_embeddings()) is not None}
    inside = {id(part) for head in heads.values() for part in head.modules()}
    own = (part.module for part in _modules_of(base))
    return [module for module in own if id(module) in inside and "weight" in vars(module)["_parameters"]]


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
    """Return (d_out, d_in) of a linear module, also if it is quantized or a `Conv1D`.

    Example:
        >>> shape_of(nn.Linear(2, 3))
        (3, 2)
    """
    if is_conv1d(module):
        d_in, d_out = _size(module.weight)
        return d_out, d_in
    return _sizes_of(module) or cast(tuple[int, int], _size(module.weight))


def is_conv1d(module: nn.Module) -> bool:
    """Return whether this is transformers' Conv1D, a linear layer whose weight is stored as (d_in, d_out)."""
    own = class_of(module)
    return own.__name__ == "Conv1D" and own.__module__ == "transformers.pytorch_utils"


def is_quantized(weight: Tensor) -> bool:
    """Return whether a weight is stored in at most 8 bits a number, which cannot take a gradient.

    Its dtype shows it, or for torchao's subclasses of Tensor the dtypes of the tensors inside.

    Example:
        >>> is_quantized(torch.zeros(2, 2)), is_quantized(torch.zeros(2, 2, dtype=torch.uint8))
        (False, True)
    """
    if type(weight).__name__ in _STORED_AS_ANY_DTYPE or not weight.is_floating_point() or weight.dtype.itemsize == 1:
        return True
    flatten = getattr(weight, "__tensor_flatten__", None)
    parts = vars(weight).values() if flatten is None else [getattr(weight, name) for name in flatten()[0]]
    is_wrapper = type(weight) not in (Tensor, nn.Parameter)
    return is_wrapper and any(is_quantized(part) for part in parts if isinstance(part, Tensor))


def is_sharded(weight: Tensor) -> TypeGuard[DTensor]:
    """Return whether this is a DTensor, with a part on every process.

    Example:
        >>> is_sharded(torch.zeros(2, 2))
        False
    """
    return isinstance(weight, DTensor)


def dequantized_weight(module: nn.Module, parameter: str = "weight") -> Tensor | None:
    """Return a weight in floating point, (d_out, d_in); as stored if it is a `Conv1D`'s or not linear.

    None if it is quantized and neither it nor its layer says how to dequantize it.

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
    if type(weight).__name__ != "Int8Params":
        holders = (weight,) if hasattr(weight, "__tensor_flatten__") else (module,)
        found = [getattr(h, k, None) for h in holders for k in ("dequantize_weight", "dequantize")]
        dequantize = next((method for method in found if callable(method)), None)
        return None if dequantize is None else cast(Tensor, dequantize()).detach()
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


def may_differ_from_linear(module: nn.Module) -> bool:
    """Return whether a linear layer has a forward of its own, so that it may compute something else."""
    is_own = class_of(module).forward is not nn.Linear.forward or "forward" in vars(module)
    return is_own and not is_conv1d(module)


@torch.no_grad()
def difference_from_linear(module: nn.Linear, inputs: Tensor, output: Any) -> str | None:
    """Return how a layer's output differs from input · Wᵀ (+ b), or None: some positions are compared.

    The values of quantized layers are not, because these round their inputs, too.
    """
    d_out, d_in = shape_of(module)
    expected = (*inputs.shape[:-1], d_out)
    if not isinstance(output, Tensor):
        return f"its forward returns a {type(output).__name__}, not a tensor"
    if inputs.shape[-1] != d_in or tuple(output.shape) != expected:
        return (
            f"its forward makes {shape_str(tuple(output.shape))} of {shape_str(tuple(inputs.shape))}, so it is not the "
            f"product with a weight of {shape_str((d_out, d_in))}"
        )
    if (
        _packed_weight(module) is not None
        or is_quantized(module.weight)
        or _state_of_4bit(module, "weight") is not None
    ):
        return None
    weight = cast(Tensor, dequantized_weight(module))
    rows, found = inputs.reshape(-1, d_in)[:_COMPARED].to(weight), output.reshape(-1, d_out)[:_COMPARED].float()
    bias = getattr(module, "bias", None)
    product = nn.functional.linear(rows, weight, None if bias is None or bias.is_meta else bias.to(weight)).float()
    tolerance = 2e-3 if inputs.dtype == torch.float32 == weight.dtype else 3e-2
    if (found - product.to(found.device)).norm() <= tolerance * product.norm() + torch.finfo(torch.float32).tiny:
        return None
    return "its forward gives other values than input · Wᵀ (+ b)"


def structure_digest(submodules: Sequence[Submodule]) -> str:
    """Return `sha256:…` over the names and shapes of a model's submodules, independent of quantization.

    Example:
        >>> structure_digest([Submodule("a", shape=(2, 3))])[:7]
        'sha256:'
    """
    lines = sorted(f"{s.name} {shape_str(s.shape)}\n" for s in submodules if s.shape is not None)
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


class _Own(NamedTuple):
    """A module of the model itself: its name in the plain model, and its parent there."""

    name: str
    module: nn.Module
    parent: nn.Module | None


def _modules_of(model: nn.Module) -> Iterator[_Own]:
    """Yield each module of an adapted or wrapped model that the plain one has too, once, parents first."""
    seen: set[int] = set()

    def walk(module: nn.Module, name: str, parent: nn.Module | None) -> Iterator[_Own]:
        if id(module) in seen:
            return
        seen.add(id(module))
        is_peft = any(cls.__module__.startswith("peft.") for cls in type(module).__mro__)
        if not is_peft:
            yield _Own(name, module, parent)
        for key, child in vars(module)["_modules"].items():
            if child is None or (is_peft and key not in _REPLACED):
                continue
            if is_peft or key in _WRAPPERS:
                yield from walk(child, name, parent)
            else:
                yield from walk(child, f"{name}.{key}" if name else key, module)

    return walk(model, "", None)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module) or _packed_weight(module) is not None


def _packed_weight(module: nn.Module) -> str | None:
    """Return the name of a quantized layer's weight, a parameter or buffer, as those of GPTQ, AWQ, HQQ and EETQ hold it.

    It is the largest of the layer's own quantized tensors. The layer has numbers of features, and if it is an `nn.Linear`
    it lost its weight, as those of compressed-tensors.
    """
    if isinstance(module, nn.Linear) and "weight" in vars(module)["_parameters"] or _sizes_of(module) is None:
        return None
    own = (vars(module)["_parameters"] | vars(module)["_buffers"]).items()
    packed = {
        key: tensor.nbytes for key, tensor in own if tensor is not None and tensor.dim() and is_quantized(tensor)
    }
    return max(packed, key=packed.__getitem__, default=None)


def _sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """Return (d_out, d_in) of a layer that has them as attributes, also as tensors of one number."""
    for names in _SIZES:
        found: list[Any] = [getattr(module, name, None) for name in names]
        if not any(isinstance(value, Tensor) and value.is_meta for value in found):
            with suppress(TypeError):
                return index(found[0]), index(found[1])
    return None


def _size(weight: Tensor) -> tuple[int, ...]:
    """Return a weight's shape, also if DeepSpeed partitioned it."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


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


def _must_not_be_adapted(own: _Own) -> bool:
    """Return whether an adapter on this linear layer would have no effect, or would change the routing of experts.

    `nn.MultiheadAttention` and Mamba's kernels read weights without calling the layer. Routers stand beside experts.
    """
    if own.parent is None:
        return False
    key = own.name.rsplit(".", 1)[-1]
    is_router = "experts" in vars(own.parent)["_modules"] and key in _ROUTERS
    return is_router or key in _read_without_call(class_of(own.parent))  # type: ignore[arg-type]  # mypy reads the hash of instances


@cache
def _read_without_call(cls: type[nn.Module]) -> frozenset[str]:
    """Return the submodules whose weights the code of a class gives to functions."""
    lines = []
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, function in vars(base).items():
            if inspect.isfunction(function) and not name.lstrip("_").startswith(("init", "reset")):
                with suppress(OSError, TypeError):  # made without a file
                    lines += inspect.getsource(function).splitlines(keepends=True)
    return frozenset(
        match[1] for line in lines if not _NOT_COMPUTED_WITH.search(line) for match in _READ.finditer(line)
    )


def _form_of(module: nn.Module, parameter: str, is_linear: bool) -> Form:
    if parameter.endswith("bias"):
        return "bias"
    if is_linear:
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, _CONVOLUTIONS):
        return "convolution"
    if len(_size(getattr(module, parameter))) == 3 and "expert" in type(module).__name__.lower():
        return "experts"
    return "norm" if "norm" in type(module).__name__.lower() else "parameter"


def _places(names: Sequence[str]) -> dict[str, tuple[str, int | None, str | None]]:
    """Return kind, depth and group of every name.

    A name is split at its first number: `model.layers` is the stack, 3 the depth, `self_attn.q_proj` the path in the
    block. The kind is the shortest suffix of that path that is unique in the stack (`q_proj`; GPT-2 has `attn.c_proj`
    and `mlp.c_proj`). If a model has several stacks, their names precede it (T5: `encoder.…`). The group tells
    self-attention, cross-attention and the rest apart.
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
        role = "cross_attn" if _CROSS_ATTENTION.search(path) else role
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
