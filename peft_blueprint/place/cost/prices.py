"""FLOPs, bytes moved and bytes kept for the backward pass, per token, of operations, weights and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...blueprint import ADAPTABLE
from .structure import Operation, Part
from .workload import FLOAT, Array, Workload


Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]


# Tensors of its input's size that an activation function keeps for the backward pass; 1 for a single kernel.
_KEPT_BY_FUNCTION = {"gelu_new": 4, "gelu_fast": 5, "quick_gelu": 2, "gelu_python": 3, "relu2": 2}
_ROUTING = 3 * 8 + 2 * FLOAT  # bytes kept of a visit's expert, weight and positions


class Price(NamedTuple):
    """FLOPs and bytes moved, forward and backward, and bytes kept for the backward pass; all per token."""

    forward: Any = 0.0
    backward: Any = 0.0
    moved_forward: Any = 0.0
    moved_backward: Any = 0.0
    kept: Any = 0.0


def price_of(operation: Operation, workload: Workload) -> Price:
    """Return the price of an operation between weights.

    - torch's norm keeps its input and two float32 (mean and deviation; Ba et al. 2016, arXiv:1607.06450). transformers'
      RMS norms compute step by step in float32 and keep their input in float32, a copy if activations take 2 bytes, and
      the inverse root.
    - SDPA keeps queries, keys, values, its output, and a float32 per head (FlashAttention, Dao et al. 2022,
      arXiv:2205.14135), and with padding its mask. Eager attention keeps queries, keys, values, the T² scores after the
      softmax in float32, and their copy in 2 bytes. Rotary embeddings keep nothing.
    - An activation keeps its input, and more if transformers computes it in Python. The product of a gated unit keeps
      both factors. An expert's output is kept for the gradient of its router's weight.
    - A sum keeps nothing.
    """
    n, w = workload.number, operation.width
    if operation.kind == "residual":
        return Price(moved_forward=3 * w * n, moved_backward=3 * w * n)
    if operation.kind == "norm":
        return Price(8 * w, 12 * w, 2 * w * n, 3 * w * n, w * n + 2 * FLOAT)
    if operation.kind == "rms_norm":
        casts = 0 if n == FLOAT else 2 * w * (n + FLOAT)
        return Price(
            6 * w, 12 * w, 6 * w * FLOAT + 2 * w * n + casts, 10 * w * FLOAT + 2 * w * n + casts, (w + 1) * FLOAT
        )
    if operation.kind == "attention":
        return _price_of_attention(operation, workload)
    kept = _KEPT_BY_FUNCTION.get(operation.function, 1)
    steps = 1 if kept == 1 else 2 * kept
    gated = int(operation.is_gated)
    times = operation.visits
    return Price(
        forward=times * w * (5 * steps + gated),
        backward=times * w * (8 * steps + 2 * gated),
        moved_forward=times * n * (w * (2 * steps + 3 * gated) + 4 * operation.weighted),
        moved_backward=times * n * (w * (3 * steps + 6 * gated) + 6 * operation.weighted),
        kept=times * (n * (w * (kept + 2 * gated) + operation.weighted) + _ROUTING * (operation.weighted > 0)),
    )


def _price_of_attention(operation: Operation, workload: Workload) -> Price:
    n, w, keys, length = workload.number, operation.width, operation.keys, workload.length
    before = workload.prompt if workload.answer_only else 0  # tokens that only keys and values are kept of
    is_triangular = operation.is_causal and not workload.padded and workload.attention == "sdpa"
    seen = before + (length - before) / 2 if is_triangular else length
    products = 4.0 * seen * w
    repeated = w if workload.padded or workload.attention == "eager" else keys
    rotated = 10 * (w + keys) * n + 3 * 2 * (repeated - keys) * n
    if workload.attention == "sdpa":
        mask = length * n if workload.padded else 0
        kept = (2 * w + 2 * repeated) * n + operation.heads * FLOAT + mask
        moved = rotated + kept + w * n
        return Price(products, 2.5 * products, moved, 2 * moved, kept)
    scores = operation.heads * length
    copied = 0 if n == FLOAT else n
    kept = (w + 2 * repeated) * n + scores * (FLOAT + copied)
    moved = rotated + kept + scores * (6 * n + 2 * FLOAT)
    return Price(products, 2 * products, moved, 2 * moved, kept)


def keys_of_prompt(operation: Operation, workload: Workload) -> float:
    """Return the bytes that attention keeps for the backward pass per token of a prompt: keys and values of all heads.

    They are joined with those of the answer, and repeated for all heads of their group where attention repeats them.
    """
    if operation.kind != "attention":
        return 0.0
    is_repeated = workload.padded or workload.attention == "eager"
    return 2.0 * (operation.width if is_repeated else operation.keys) * workload.number


class Columns:
    """A model's weights as columns of shape (parts,), for one workload."""

    def __init__(self, parts: Sequence[Part], workload: Workload) -> None:
        self.stage: Indices = np.array([part.stage for part in parts], dtype=np.int64)
        self.block: Indices = np.array([part.block for part in parts], dtype=np.int64)
        self.source: Indices = np.array([part.source for part in parts], dtype=np.int64)
        self.visits: Array = np.array([part.visits for part in parts])
        self.numel: Array = np.array([part.numel for part in parts], dtype=np.float64)
        self.d_in: Array = np.array([part.shape[-1] if part.shape else 1 for part in parts], dtype=np.float64)
        self.d_out: Array = np.array(
            [part.shape[-2] if len(part.shape) > 1 else 1 for part in parts], dtype=np.float64
        )
        self.is_adaptable: Mask = np.array([part.form in ADAPTABLE for part in parts])
        self.is_fused: Mask = np.array([part.form == "experts" for part in parts])
        self.is_matrix: Mask = np.array([part.is_matrix for part in parts])
        self.reads_attention: Mask = np.array([part.reads_attention for part in parts])
        self.is_norm: Mask = np.array([part.form == "norm" for part in parts])
        held = np.array([part.is_quantizable for part in parts])
        if workload.quantized_experts:
            held |= np.array([part.form in ("experts", "expert") for part in parts])
        self.is_quantized: Mask = held & bool(workload.quantization)
        self.experts: Array = np.where(self.is_fused, [part.shape[0] if part.shape else 1 for part in parts], 1.0)
        # FLOPs of the product with one token, over all visits
        one = np.where(self.is_fused, self.d_in * self.d_out, self.numel)
        self.products: Array = np.where(self.is_matrix, 2 * one * self.visits, 0.0)
        # bytes, quantized or not
        whole = self.numel * workload.number
        self.stored: Array = np.where(self.is_quantized, workload.quantized_bytes(self.numel, self.d_out), whole)
        # bytes per token moved to dequantize once: read in 4 or 8 bits, written and read again in the activations' dtype
        self.dequantized: Array = np.where(self.is_quantized, self.stored + 2 * whole, 0.0) / workload.trained_tokens

    def sizes_of_adapters(self, adapted: Indices, rank: Array) -> Array:
        """Return the elements of each adapter's A, then of each adapter's B, summed over fused experts."""
        ranks = self.experts[adapted] * rank
        return np.concatenate([ranks * self.d_in[adapted], ranks * self.d_out[adapted]])


def prices_of_adapters(columns: Columns, adapted: Indices, rank: Array, needed: Mask, workload: Workload) -> Price:
    """Return the prices of adapters, each of shape (adapters,), as PEFT computes them; `kept` is not among them.

    The products with A and B take 2r(d_in + d_out) FLOPs forward and twice that backward, less the input's gradient if
    nothing before needs it. Bytes moved: the input is read (and cast if dtypes differ), A's result is written and read,
    B's result is written, scaled and added to the layer's; backward the same gradients, and the input's gradient is added
    to the layer's.

    PEFT merges an adapter of fused experts into a new copy of all experts in each pass and takes the gradient of the
    whole copy; both are counted once a step. `needed` says of each adapter whether something before it needs its input's
    gradient.
    """
    n, a = workload.number, workload.adapter_number
    cast = (n + a) * workload.is_mixed
    d_in, d_out, visits = columns.d_in[adapted], columns.d_out[adapted], columns.visits[adapted]
    clone = 2 * n * columns.is_quantized[adapted]  # of a quantized layer's result
    forward = 2 * rank * (d_in + d_out) * visits
    backward = 2 * rank * (d_in * (1 + needed) + 2 * d_out) * visits
    moved_forward = visits * (d_in * (a + cast) + 2 * rank * a + d_out * (4 * a + n + max(n, a) + cast + clone))
    moved_backward = visits * (d_in * (a + needed * (a + 3 * n + cast)) + 4 * rank * a + d_out * (4 * a + cast))
    fused, numel = columns.is_fused[adapted], columns.numel[adapted] / workload.trained_tokens
    return Price(
        forward=np.where(fused, 2 * rank * numel, forward),
        backward=np.where(fused, 4 * rank * numel + columns.products[adapted], backward),
        moved_forward=np.where(fused, 2 * n * numel, moved_forward),
        moved_backward=np.where(fused, 3 * n * numel, moved_backward),
    )
