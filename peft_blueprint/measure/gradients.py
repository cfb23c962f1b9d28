"""Compute per-example gradient statistics of a linear layer from its input and its output's gradient.

For an example with inputs X (T × d_in) and output gradients dY (T × d_out) the weight's gradient is G = dYᵀX. Its norm
needs no G: ‖G‖² = Σ (XXᵀ)∘(dY dYᵀ), the Gram form (Goodfellow 2015, arXiv:1510.01799; for sequences Li et al. 2021,
arXiv:2110.05679), costs T²(d_in + d_out) multiply-adds where forming G costs T·d_in·d_out. It loses digits
if the tokens' contributions nearly cancel (measured in docs/results/measuring.md). G·Ω = dYᵀ(XΩ) for a thin Ω keeps the mean
gradient's row norms at a few per cent of G's cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache

import torch
from torch import Tensor


# matrix-product operations in the time of moving one number to memory and back
_OPERATIONS_PER_NUMBER = 16
_NEARLY_FREE = 0.05  # share of a layer's own two passes that method="auto" spends on exact norms
NUMBERS_AT_A_TIME = 1 << 24  # maximum size of an intermediate result
_FOLDS = 1 << 12  # rows of the table of signs

Fold = Callable[[Tensor], Tensor]  # (B, n) → (B, m), see `fold`


def by_example(tensor: Tensor, examples: int, lengths: Collection[int] = ()) -> Tensor | None:
    """Reshape a layer's input or output gradient to (examples, tokens, features); None if rows do not show examples.

    Accepts (B, ..., d), and (B·T, d) from layers that flatten the batch, for T among the batch's `lengths`. A single
    example may have any shape.
    """
    rows = tensor.shape[0]
    if (
        tensor.dim() < 2
        or examples > 1
        and rows != examples
        and not (tensor.dim() == 2 and rows // examples in lengths)
    ):
        return None
    return tensor.reshape(examples, -1, tensor.shape[-1]) if rows % examples == 0 else None


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of statistics: bfloat16 if the tensor is and the hardware multiplies it, otherwise float32."""
    if tensor.dtype != torch.bfloat16:
        return torch.float32
    if tensor.device.type == "cpu":
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    return torch.bfloat16


def prefers_gram(tokens: int, d_in: int, d_out: int, gram_is_known: bool = False) -> bool:
    """Return whether the Gram form is cheaper than forming the gradient, by operations and by numbers written.

    Without memory traffic the crossover is at T* = d_in·d_out/(d_in + d_out) tokens.

    Args:
        tokens: T, per example.
        d_in: features of the input.
        d_out: features of the output.
        gram_is_known: XXᵀ was already computed for another layer with the same input.
    """
    gram = tokens**2 * ((0 if gram_is_known else d_in) + d_out + 2 * _OPERATIONS_PER_NUMBER)
    return gram < tokens * d_in * d_out + d_in * d_out * _OPERATIONS_PER_NUMBER


def gram_is_nearly_free(tokens: int, d_in: int, d_out: int, size: int) -> bool:
    """Return whether the Gram form costs no more than a sketch of this size, or little beside the layer itself.

    The Gram form takes T²(d_in + d_out) multiply-adds; a sketch takes s instead of one T, the layer's own two passes
    2·T·d_in·d_out.
    """
    return tokens <= max(size, _NEARLY_FREE * 2 * d_in * d_out / (d_in + d_out))


def gram(x: Tensor) -> Tensor:
    """Return XXᵀ of every example: (B, T, d) → (B, T, T)."""
    return torch.bmm(x, x.transpose(1, 2))


def gram_norms(x_gram: Tensor, dy: Tensor) -> Tensor:
    """Return norms of the per-example gradients by the Gram form. (B, T, T), (B, T, d_out) → (B,) float32."""
    step = max(1, NUMBERS_AT_A_TIME // (dy.shape[1] ** 2 or 1))
    squares = [
        (x_gram[i : i + step] * gram(dy[i : i + step])).sum(dim=(1, 2), dtype=torch.float32)
        for i in range(0, len(dy), step)
    ]
    return torch.cat(squares).clamp_min(0).sqrt()


def per_example_gradients(x: Tensor, dy: Tensor) -> Tensor:
    """Return the gradients dYᵀX. (B, T, d_in), (B, T, d_out) → (B, d_out, d_in)."""
    return torch.bmm(x.transpose(1, 2), dy).transpose(1, 2)  # this order is faster if x is a narrow sketch


def materialized(
    kept: Tensor, dy: Tensor, d_in: int, fold: Fold | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Form every example's product dYᵀK, a few examples at a time, and return its statistics.

    Args:
        kept: K, (B, T, d_in) the inputs X, or (B, T, s) their sketch XΩ.
        dy: (B, T, d_out).
        d_in: features of the input, which distinguishes X from a sketch.
        fold: projects a product, or None.

    Returns:
        Norms and errors as `norms_of`; the sum over examples (d_out, d_in or s), float32; and with `fold` the examples'
        projections (B, m).
    """
    norms: list[Tensor] = []
    errors: list[Tensor] = []
    projections: list[Tensor] = []
    total = dy.new_zeros(())
    for products in _products(kept, dy):
        total = total + products.sum(dim=0, dtype=torch.float32)
        some_norms, some_errors = norms_of(products, d_in)
        norms.append(some_norms)
        errors.append(some_errors)
        projections += [] if fold is None else [folded(products, fold)]
    return torch.cat(norms), torch.cat(errors), total, torch.cat(projections) if projections else None


def summed(kept: Tensor, dy: Tensor, fold: Fold | None) -> tuple[Tensor, Tensor | None]:
    """Return the sum and the projections of `materialized`, without the norms."""
    if fold is None:
        return sketched_gradient(kept, dy), None
    projections: list[Tensor] = []
    total = dy.new_zeros(())
    for products in _products(kept, dy):
        total = total + products.sum(dim=0, dtype=torch.float32)
        projections.append(folded(products, fold))
    return total, torch.cat(projections)


def folded(products: Tensor, fold: Fold) -> Tensor:
    """Project per-example gradients or their sketches, (B, d_out, columns) → (B, m)."""
    return fold(products.mT.flatten(1))  # the memory layout of `per_example_gradients`


def fold(vectors: Tensor, size: int, seed: int) -> Tensor:
    """Project vectors of n numbers on m = `size`, (B, n) → (B, m) float32; vectors of at most m numbers stay.

    Number p is added to place p mod m with a random sign (count sketch: Charikar, Chen and Farach-Colton 2002,
    doi:10.1016/S0304-3975(03)00400-6; as a projection Weinberger et al. 2009, arXiv:0902.2206). ⟨fold(a), fold(a′)⟩
    estimates ⟨a, a′⟩ without bias over the signs. Its standard error is √((‖a‖²‖a′‖² + ⟨a, a′⟩²)/m) if the vectors'
    squares are spread evenly over the places. For this m should be a prime, so that the numbers of a row, and of a
    column, of a flattened matrix go to different places. The signs come from a table of 4096·m; each further stretch of
    that length has one more sign. It takes one pass over the numbers, where a dense projection takes m.
    """
    if vectors.shape[1] <= size or not size:
        short = vectors[:, :size].float()
        return torch.nn.functional.pad(short, (0, size - short.shape[1]))
    signs, of_stretches = _signs(size, seed, vectors.device, vectors.dtype)
    total = vectors.new_zeros(len(vectors), size, dtype=torch.float32)
    for sign, stretch in zip(of_stretches, vectors.split(_FOLDS * size, dim=1), strict=False):
        rows, left = divmod(stretch.shape[1], size)
        whole = stretch[:, : rows * size].unflatten(1, (rows, size))
        total += sign * (whole * signs[:rows]).sum(dim=1, dtype=torch.float32)
        if left:
            total[:, :left] += sign * stretch[:, rows * size :] * signs[rows % _FOLDS, :left]
    return total


@lru_cache(maxsize=4)
def _signs(size: int, seed: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (_FOLDS, size), generator=generator) * 2 - 1
    of_stretches = torch.randint(0, 2, (_FOLDS,), generator=generator) * 2 - 1
    return signs.to(device, dtype), tuple(of_stretches.tolist())


def _products(kept: Tensor, dy: Tensor) -> Iterator[Tensor]:
    step = max(1, NUMBERS_AT_A_TIME // (kept.shape[2] * dy.shape[2]))
    for i in range(0, len(kept), step):
        yield per_example_gradients(kept[i : i + step], dy[i : i + step])


def norms_of(products: Tensor, d_in: int) -> tuple[Tensor, Tensor]:
    """Return norms of per-example gradients G or sketches GΩ, and their predicted relative standard errors.

    Args:
        products: (B, d_out, d_in) or (B, d_out, s).
        d_in: features of the input, which distinguishes G from GΩ.

    Returns:
        Norms (B,) float32, exact or with unbiased squares; errors (B,) float32, 0 if exact.
    """
    if products.shape[2] == d_in:
        norms = torch.linalg.vector_norm(products, dim=(1, 2), dtype=torch.float32)
        return norms, torch.zeros_like(norms)
    squares = gram(products.transpose(1, 2).float())
    return squares.diagonal(dim1=1, dim2=2).sum(dim=1).clamp_min(0).sqrt(), sketch_errors(squares, d_in)


def sketch_matrix(d_in: int, size: int | None, seed: int) -> Tensor | None:
    """Return Ω, (d_in, size) float32 with orthogonal columns and E[ΩΩᵀ] = I, or None if d_in ≤ 2·size.

    ‖GΩ‖² estimates ‖G‖² without bias, also for every row of G. Orthogonal columns (of uniformly random direction,
    scaled by √(d_in/size)) have a smaller variance than Gaussian ones, by the factor 1 − size/d_in. Up to twice the
    sketch's size, exact statistics cost about the same. A fixed seed gives every layer of the same d_in the same Ω, so
    that layers with the same input share XΩ and sketches add over batches and workers.
    """
    if size is None or d_in <= 2 * size:
        return None
    gaussian = torch.randn(d_in, size, generator=torch.Generator().manual_seed(seed + d_in))
    return torch.linalg.qr(gaussian).Q * math.sqrt(d_in / size)


def sketched_gradient(x_sketch: Tensor, dy: Tensor) -> Tensor:
    """Return (Σ_b G_b)Ω in float32. XΩ (B, T, s), dY (B, T, d_out) → (d_out, s)."""
    return (dy.flatten(0, 1).T @ x_sketch.flatten(0, 1)).float()


def sketch_errors(squares: Tensor, d_in: int) -> Tensor:
    """Predict the relative standard error of ‖GΩ‖ as an estimate of ‖G‖ from the sketch. (B, s, s) → (B,).

    With A = GᵀG and Ω = √(d/s)·P for a uniformly random P with orthonormal columns, the relative variance of the
    squared norm tr(ΩᵀAΩ) is 2d(d − s)/(s(d − 1)(d + 2))·(1/ρ − 1/d), where ρ = (tr A)²/tr A² is A's effective rank: at
    most about 2/s, for a gradient of rank 1, and smaller the more directions it has. Both traces are estimated from W =
    ΩᵀAΩ by the method of moments (second moments of Haar projections). The norm's relative error is half of the
    square's.

    Args:
        squares: (B, s, s), W = (GΩ)ᵀGΩ of every example.
        d_in: features of the input, d.
    """
    d, s = float(d_in), float(squares.shape[1])
    spread = 2 * d * (d - s) / (s * (d - 1) * (d + 2))  # variance of tr(W) at A = uuᵀ, but for the factor (1 − 1/d)
    mixing = d * (d - s) / (s * (d - 1) * (d + 2))  # E tr W² = keeping·tr A² + mixing·(tr A)²
    keeping = d * (s + 2) / (s * (d + 2)) - mixing
    trace_squared = squares.diagonal(dim1=1, dim2=2).sum(dim=1).square()  # E = spread·tr A² + (1 − spread/d)·(tr A)²
    of_square = squares.square().sum(dim=(1, 2))
    inverse_rank = (of_square * (1 - spread / d) - trace_squared * mixing) / (
        (trace_squared * keeping - of_square * spread).clamp_min(torch.finfo(squares.dtype).tiny)
    )
    return (spread * (inverse_rank.clamp(1 / d, 1) - 1 / d)).sqrt() / 2
