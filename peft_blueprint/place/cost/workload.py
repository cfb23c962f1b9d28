"""A training step as the cost model sees it, and the bytes of quantized weights and optimizer states."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..._options import from_keywords
from ...errors import PlacementError
from ...measure import find_weights, is_quantized, unwrap


Array = NDArray[np.float64]

FLOAT = 4  # bytes of a float32
DTYPES = {"float32": FLOAT, "bfloat16": 2, "float16": 2}
DEVICES = ("cuda", "cpu")
_QUANTIZATIONS = (None, "nf4", "fp4", "int8")
_OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "sgd")
_ATTENTIONS = ("sdpa", "eager")
# names of a weight's bits in the settings of GPTQ, HQQ, AWQ and others
_BITS = ("bits", "nbits", "w_bit", "num_bits", "weight_bits", "wbits")
_BITS_IN_TEXT = re.compile(r"(?:int|fp|float|nf|q)_?([1-8])(?!\d)")  # int4_weight_only, mxfp4, Q4_K_M
_BITS_OF_WEIGHTS = re.compile(_BITS_IN_TEXT.pattern + r"_?weight|\bw([1-8])a\d")  # int8_dynamic_activation_int4_weight
_NOT_WEIGHTS = re.compile(r"activation|input|output|cache|backward|gradient|compute")
# bitsandbytes' sizes
_BLOCK_OF_4BIT, _BLOCK_OF_SCALES, _BLOCK_OF_8BIT_STATE = 64, 256, 256
_CODE_OF_4BIT, _CODE_OF_8BIT = 16 * FLOAT, 256 * FLOAT
_SMALLEST_8BIT_STATE = 4096  # elements; smaller tensors have states in 32 bits


@dataclass(frozen=True)
class Workload:
    """A training step as the cost model sees it.

    Args:
        batch_size: examples in a step.
        length: tokens in an example, with padding.
        dtype: of unquantized base weights and of activations: "bfloat16", "float16" or "float32".
        quantization: of linear layers that are neither trained whole nor the head: "nf4", "fp4", "int8" or None.
        quantized_experts: whether fused experts are held in `quantization` too, as MXFP4 checkpoints and Unsloth do;
            bitsandbytes leaves them in `dtype`.
        double_quant: whether 4-bit scales are held in 8 bits.
        checkpointing: whether activations are recomputed in the backward pass, block by block.
        optimizer: "adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit" or "sgd" (without momentum).
        master_weights: whether the optimizer keeps a float32 copy of trained weights that are held in 2 bytes, and its
            states in float32 beside it (mixed-precision training, Micikevicius et al. 2018, arXiv:1710.03740). With AdamW
            that is 12 bytes a parameter (Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1). Weights in float32
            need no copy.
        rank: of all-linear LoRA, the reference.
        adapter_dtype: of adapters, float32 by PEFT's default.
        attention: "sdpa" or "eager".
        device: "cuda" or "cpu", which have different time constants.
        flops_per_byte: FLOPs that take as long as moving one byte, as `python -m benchmarks cost` measures them on a
            machine; None for `FLOPS_PER_BYTE[device]`.
        padded: whether a batch has padding: attention then gets a mask, and keys and values are repeated for all heads
            of their group.
        input_gradients: whether the embeddings' output requires a gradient, so that the backward pass runs to the bottom
            wherever the lowest adapter is. transformers (with gradient checkpointing) and PEFT set that, and
            `CheckpointAbove` undoes it. None is what they do: the same as `checkpointing`.
        prompt: tokens of an example before the first target, a system prompt or a question with its contexts.
        head_on_targets: whether the head and the loss are computed where there are targets alone.
        answer_only: whether prompts run forward through the frozen base alone, and adapters, the backward pass and the
            head act on the other tokens, as in activated LoRA (arXiv:2504.12397). Their keys and values are held.
        epochs: passes over the data. The first fills a cache that the others read: of the hidden states below
            the lowest trained layer, or with `answer_only` of the prompts' keys and values. 1 is without a cache. The
            cache lies outside the device's memory.

    Raises:
        PlacementError: for an unknown value.

    Example:
        >>> Workload(batch_size=4, length=1024).tokens
        4096
    """

    batch_size: int = 8
    length: int = 512
    dtype: str = "bfloat16"
    quantization: str | None = None
    quantized_experts: bool = False
    double_quant: bool = True
    checkpointing: bool = False
    optimizer: str = "adamw"
    master_weights: bool = False
    rank: int = 16
    adapter_dtype: str = "float32"
    attention: str = "sdpa"
    device: str = "cuda"
    flops_per_byte: float | None = None
    padded: bool = True
    input_gradients: bool | None = None
    prompt: int = 0
    head_on_targets: bool = False
    answer_only: bool = False
    epochs: int = 1

    def __post_init__(self) -> None:
        allowed: dict[str, Collection[object]] = {
            "dtype": DTYPES,
            "quantization": _QUANTIZATIONS,
            "optimizer": _OPTIMIZERS,
            "adapter_dtype": DTYPES,
            "attention": _ATTENTIONS,
            "device": DEVICES,
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise PlacementError(
                    f"Workload's {name} must be {' or '.join(map(repr, choices))}, got {name}={getattr(self, name)!r}."
                )
        constant: object = self.flops_per_byte
        is_number = isinstance(constant, int | float) and not isinstance(constant, bool)
        if constant is not None and not (is_number and 0 < constant < math.inf):  # type: ignore[operator]
            raise PlacementError(f"Workload's flops_per_byte must be a positive number, got {constant!r}.")
        for name in ("quantized_experts", "master_weights", "head_on_targets", "answer_only"):
            if not isinstance(getattr(self, name), bool):
                raise PlacementError(f"Workload's {name} must be true or false, got {getattr(self, name)!r}.")
        for name in ("batch_size", "length", "rank", "epochs"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlacementError(f"Workload's {name} must be a positive integer, got {name}={value!r}.")
        if not isinstance(self.prompt, int) or isinstance(self.prompt, bool) or not 0 <= self.prompt < self.length:
            raise PlacementError(
                f"Workload's prompt must be a number of tokens from 0 to {self.length - 1}, below the length of an example, "
                f"got {self.prompt!r}."
            )
        if self.answer_only and not self.prompt:
            raise PlacementError("Workload's answer_only needs the tokens of the prompt: prompt=…")

    @property
    def trained_share(self) -> float:
        """Share of the tokens that adapters and the backward pass act on."""
        return 1 - self.prompt / self.length if self.answer_only else 1.0

    @property
    def trained_tokens(self) -> int:
        """Tokens of a step that adapters and the backward pass act on."""
        return self.batch_size * (self.length - self.prompt) if self.answer_only else self.tokens

    @property
    def target_share(self) -> float:
        """Share of the trained tokens that the head and the loss are computed for."""
        return 1 - self.prompt / self.length if self.head_on_targets and not self.answer_only else 1.0

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch_size * self.length

    @property
    def number(self) -> int:
        """Bytes of an element of unquantized weights and activations."""
        return DTYPES[self.dtype]

    @property
    def adapter_number(self) -> int:
        """Bytes of an element of adapters."""
        return DTYPES[self.adapter_dtype]

    @property
    def is_mixed(self) -> bool:
        """Whether adapters and activations differ in dtype, so that PEFT casts each adapter's input."""
        return self.adapter_dtype != self.dtype

    @property
    def runs_to_the_bottom(self) -> bool:
        """Whether the backward pass always runs down to the embeddings."""
        return self.checkpointing if self.input_gradients is None else self.input_gradients

    def quantized_bytes(self, numel: Array, d_out: Array) -> Array:
        """Return the bytes of linear layers' weights as bitsandbytes stores them.

        4 bits an element and a float32 scale for each 64, with a table of 16; with `double_quant` scales take 8 bits, with
        a float32 for each 256 of them, a table of 256 and an offset (Dettmers et al. 2023, arXiv:2305.14314, section 3).
        Or 8 bits an element and a float32 for each row (Dettmers et al. 2022, arXiv:2208.07339).

        Args:
            numel: elements of each layer.
            d_out: rows of each layer.
        """
        if self.quantization is None:
            return numel * self.number
        if self.quantization == "int8":
            return numel + d_out * FLOAT
        scales = np.ceil(numel / _BLOCK_OF_4BIT)
        stored = np.ceil(numel / 2) + _CODE_OF_4BIT
        if not self.double_quant:
            return stored + scales * FLOAT
        return stored + scales + np.ceil(scales / _BLOCK_OF_SCALES) * FLOAT + _CODE_OF_8BIT + FLOAT

    def state_bytes(self, numel: Array, number: int) -> float:
        """Return the bytes of the optimizer's states, master weights included.

        torch's AdamW keeps two states in the parameter's dtype, or in that of its master weight; bitsandbytes' keeps two
        in float32 or, for parameters of at least 4096 elements, in 8 bits with a float32 for each 256. Paged states
        count in full, because they leave the accelerator only when it is short of memory.

        Args:
            numel: elements of each parameter.
            number: bytes of an element.
        """
        masters = self.has_master(number) * FLOAT * numel.sum()
        if self.optimizer == "sgd":
            return float(masters)
        if self.optimizer == "adamw":
            return float(masters + 2 * numel.sum() * (FLOAT if masters else number))
        in_32_bits = 2 * numel * FLOAT
        if self.optimizer == "paged_adamw_32bit":
            return float(masters + in_32_bits.sum())
        in_8_bits = 2 * (numel + np.ceil(numel / _BLOCK_OF_8BIT_STATE) * FLOAT)
        return float(masters + np.where(numel < _SMALLEST_8BIT_STATE, in_32_bits, in_8_bits).sum())

    def has_master(self, number: int) -> bool:
        """Whether the optimizer keeps a float32 copy of parameters whose elements take `number` bytes."""
        return self.master_weights and number < FLOAT


def workload_of(model: Any, **settings: Any) -> Workload:
    """Read dtype, quantization, device and gradient checkpointing off a loaded model.

    Args:
        model: as it is to be trained; a model on the meta device, or a config, only tells how its checkpoint is
            quantized, and None nothing.
        **settings: `Workload`'s fields, which override those read from the model.

    Raises:
        PlacementError: for unknown settings or values.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> workload_of(tiny_llama(), length=64).dtype
        'float32'
    """
    tensors = [weight.tensor for weight in find_weights(model)] if isinstance(model, nn.Module) else []
    is_asked = "quantization" not in settings
    if all(tensor.is_meta for tensor in tensors):
        return from_keywords(Workload, None, {**_quantization_of(model, is_asked), **settings}, PlacementError)
    quantized: Any = next((tensor for tensor in tensors if is_quantized(tensor)), None)
    plain = next((tensor for tensor in tensors if not is_quantized(tensor)), None)
    found: dict[str, Any] = {
        "device": "cuda" if any(tensor.is_cuda for tensor in tensors) else "cpu",
        "checkpointing": any(vars(module).get("gradient_checkpointing") is True for module in model.modules()),
    }
    if plain is not None and (dtype := str(plain.dtype).removeprefix("torch.")) in DTYPES:
        found["dtype"] = dtype
    if type(quantized).__name__ == "Params4bit" and quantized.quant_state is not None:
        found |= {"quantization": quantized.quant_state.quant_type, "double_quant": bool(quantized.quant_state.nested)}
    elif quantized is not None:
        is_in_8_bits = type(quantized).__name__ == "Int8Params" or quantized.dtype.itemsize == 1
        found |= _quantization_of(model, is_asked) or {"quantization": "int8" if is_in_8_bits else "nf4"}
    return from_keywords(Workload, None, {**found, **settings}, PlacementError)


def _quantization_of(model: Any, is_asked: bool = True) -> dict[str, Any]:
    """Return the settings that the quantization of a checkpoint, in its config, amounts to; none for an unquantized one.

    Weights of at most 4 bits count as 4-bit ones of bitsandbytes, others as 8-bit ones. A warning says so where the
    checkpoint has fewer bits or does not tell them, if the quantization is asked for.
    """
    config = unwrap(model).__dict__.get("config") if isinstance(model, nn.Module) else model
    settings = getattr(config, "quantization_config", None)
    settings = settings if isinstance(settings, Mapping | None) else settings.to_dict()
    if not settings or settings.get("dequantize") is True or settings.get("linear_class") == "autobitlinear":
        return {}
    if settings.get("load_in_4bit"):
        kind = settings.get("bnb_4bit_quant_type") or "fp4"
        return {"quantization": kind, "double_quant": bool(settings.get("bnb_4bit_use_double_quant"))}
    bits = 8.0 if settings.get("load_in_8bit") else _bits_of(settings)
    kind = "nf4" if bits is not None and bits <= 4 else "int8"
    if is_asked and bits not in (4, 8):
        said = "does not say how many bits a weight takes" if bits is None else f"takes {bits:.2g} bits a weight"
        warnings.warn(
            f"The checkpoint's quantization ({_method_of(settings)}) {said}. Its cost is computed as {kind!r}, with "
            f"{4 if kind == 'nf4' else 8} bits; quantization='nf4', 'fp4' or 'int8' of the workload chooses another.",
            stacklevel=3,
        )
    return {"quantization": kind}


def _method_of(settings: Mapping[str, Any]) -> str:
    method = settings.get("quant_method", "unnamed")
    return str(getattr(method, "value", method))


def _bits_of(settings: Mapping[str, Any]) -> float | None:
    """Return the bits of a weight that a quantization's settings name anywhere, or None.

    Codebooks have log₂(entries) bits for each vector of weights, without the codebooks themselves: AQLM (Egiazarian et
    al. 2024, arXiv:2401.06118) and VPTQ (Liu et al. 2024, arXiv:2409.17066). Packed BitNet weights take 2 bits.
    """
    if _method_of(settings) == "bitnet":
        return 2.0
    with suppress(TypeError, ValueError, LookupError, ArithmeticError):  # of values that no method writes
        if "nbits_per_codebook" in settings:
            bits = settings.get("num_codebooks", 1) * settings["nbits_per_codebook"]
            return float(bits / (settings.get("in_group_size", 8) * settings.get("out_group_size", 1)))
        if "vector_lens" in settings:  # each of outliers and of the rest, the last
            entries = [settings.get(key, [-1])[-1] for key in ("num_centroids", "num_res_centroids")]
            return float(sum(math.log2(max(1, count)) for count in entries) / settings["vector_lens"][-1])
    texts = []
    for key, value in settings.items():
        if key in _BITS and isinstance(value, int | float | str) and re.fullmatch(r"\d+(\.\d+)?", str(value)):
            return float(value)
        if _NOT_WEIGHTS.search(key):
            continue
        inner = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, Mapping)]
        found = next((bits for part in inner if (bits := _bits_of(part)) is not None), None)
        if found is not None:
            return found
        texts += [] if inner else [f"{key} {getattr(value, 'value', value)}".lower()]
    text = " ".join(texts)
    named = _BITS_OF_WEIGHTS.search(text) or _BITS_IN_TEXT.search(text)
    return float(next(filter(None, named.groups()))) if named else None
