"""Per-example gradients of a linear layer, as free functions on its input and its output's gradient.

For an example with inputs X (T × d_in) and output gradients dY (T × d_out) the weight's gradient is G = dYᵀX. Its norm
needs no G: ‖G‖² = Σ (XXᵀ)∘(dY dYᵀ), the Gram form (Goodfellow 2015, arXiv:1510.01799; for sequences Li et al. 2021,
arXiv:2110.05679), costs T²(d_in + d_out) multiply-adds where forming G costs T·d_in·d_out. Where the tokens'
contributions nearly cancel it loses digits, its terms being squares (RESULTS.md has what that came to). And G·Ω =
dYᵀ(XΩ) for a thin Ω keeps the mean gradient's row norms at a few per cent of G's cost. Knows nothing of modules or
models.
"""

import math
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache

import torch
from torch import Tensor


# Operations that take as long as moving one number to memory and back: large matrix products run some ten times nearer
# to a machine's peak than elementwise passes do.
_OPERATIONS_PER_NUMBER = 16
# The share of a layer's own two passes up to which exact norms are taken without being asked for.
_NEARLY_FREE = 0.05
# Products are formed for as many examples at a time as keep the intermediate result below this many numbers.
NUMBERS_AT_A_TIME = 1 << 24
_FOLDS = 1 << 12  # rows of the table of signs

# (B, n) → (B, m), as `fold` does
Fold = Callable[[Tensor], Tensor]


def by_example(tensor: Tensor, examples: int, lengths: Collection[int] = ()) -> Tensor | None:
    """A layer's input or output gradient as (examples, tokens, features), or None if its rows do not say whose they
    are.

    Accepts (B, ..., d), and (B·T, d) from layers that flatten the batch, for T among the batch's `lengths`. The rows
    of a single example are its own, whatever their shape.
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
    """The precision to compute statistics in: bfloat16 stays where the hardware multiplies it, all else is float32."""
    if tensor.dtype != torch.bfloat16:
        return torch.float32
    if tensor.device.type == "cpu":
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    return torch.bfloat16


def prefers_gram(tokens: int, d_in: int, d_out: int, gram_is_known: bool = False) -> bool:
    """Whether the Gram form is cheaper than forming the gradient, by operations and by numbers written.

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
    """Whether exact norms by the Gram form cost no more than a sketch of this size, or little beside the layer itself.

    The Gram form takes T²(d_in + d_out) multiply-adds; a sketch takes s instead of one T, the layer's own two passes
    2·T·d_in·d_out.
    """
    return tokens <= max(size, _NEARLY_FREE * 2 * d_in * d_out / (d_in + d_out))


def gram(x: Tensor) -> Tensor:
    """XXᵀ of every example: (B, T, d) → (B, T, T)."""
    return torch.bmm(x, x.transpose(1, 2))


def gram_norms(x_gram: Tensor, dy: Tensor) -> Tensor:
    """Norms of the per-example gradients, by the Gram form. (B, T, T), (B, T, d_out) → (B,) float32."""
    step = max(1, NUMBERS_AT_A_TIME // (dy.shape[1] ** 2 or 1))
    squares = [
        (x_gram[i : i + step] * gram(dy[i : i + step])).sum(dim=(1, 2), dtype=torch.float32)
        for i in range(0, len(dy), step)
    ]
    return torch.cat(squares).clamp_min(0).sqrt()


def per_example_gradients(x: Tensor, dy: Tensor) -> Tensor:
    """The gradients dYᵀX themselves. (B, T, d_in), (B, T, d_out) → (B, d_out, d_in)."""
    return torch.bmm(x.transpose(1, 2), dy).transpose(1, 2)  # faster this way round where x is a narrow sketch


def materialized(
    kept: Tensor, dy: Tensor, d_in: int, fold: Fold | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What forming every example's dYᵀK says, a few examples at a time.

    Args:
        kept: K, (B, T, d_in) the inputs X, or (B, T, s) their sketch XΩ.
        dy: (B, T, d_out).
        d_in: features of the input, to tell the one from the other.
        fold: what projects a product, or None.

    Returns:
        Norms and errors as `norms_of` gives them; the sum over examples (d_out, d_in or s), float32; and the examples'
        projections (B, m), if asked for.
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
    """The sum and the projections that `materialized` gives, without the norms."""
    if fold is None:
        return sketched_gradient(kept, dy), None
    projections: list[Tensor] = []
    total = dy.new_zeros(())
    for products in _products(kept, dy):
        total = total + products.sum(dim=0, dtype=torch.float32)
        projections.append(folded(products, fold))
    return total, torch.cat(projections)


def folded(products: Tensor, fold: Fold) -> Tensor:
    """Projections of per-example gradients or their sketches, (B, d_out, columns) → (B, m)."""
    return fold(products.mT.flatten(1))  # as `per_example_gradients` lays them out in memory


def fold(vectors: Tensor, size: int, seed: int) -> Tensor:
    """Vectors a of n numbers projected on m = `size`, (B, n) → (B, m) float32; n numbers or fewer stay as they are.

    Number p goes to place p mod m with a random sign, and each place adds up what comes to it (count sketch: Charikar,
    Chen and Farach-Colton 2002, doi:10.1016/S0304-3975(03)00400-6; as a projection Weinberger et al. 2009,
    arXiv:0902.2206). So ⟨fold(a), fold(a′)⟩ estimates ⟨a, a′⟩ without bias over the signs, with a standard error of
    √((‖a‖²‖a′‖² + ⟨a, a′⟩²)/m) where the vectors' squares are spread evenly over the places. For that m should be a
    prime: the numbers of one row, and of one column, of a flattened matrix then come to different places. The signs
    are those of a table of 4096·m, and of every further such stretch of the vector once more a sign. One pass over the
    numbers, where a dense projection would take m.
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
    """Norms of per-example gradients G, or of their sketches GΩ, and their predicted relative standard errors.

    Args:
        products: (B, d_out, d_in) or (B, d_out, s).
        d_in: features of the input, to tell the one from the other.

    Returns:
        (B,) and (B,) float32: norms, exact, or unbiased in their squares; errors, 0 where exact.
    """
    if products.shape[2] == d_in:
        norms = torch.linalg.vector_norm(products, dim=(1, 2), dtype=torch.float32)
        return norms, torch.zeros_like(norms)
    squares = gram(products.transpose(1, 2).float())
    return squares.diagonal(dim1=1, dim2=2).sum(dim=1).clamp_min(0).sqrt(), sketch_errors(squares, d_in)


def sketch_matrix(d_in: int, size: int | None, seed: int) -> Tensor | None:
    """Ω, (d_in, size) float32 with orthogonal columns and E[ΩΩᵀ] = I, or None where the sketch would be no smaller.

    ‖GΩ‖² estimates ‖G‖² without bias, for every row of G too. Orthogonal columns (of uniformly random direction,
    scaled by √(d_in/size)) have a smaller variance than Gaussian ones, by the factor 1 − size/d_in. Up to twice the
    sketch's size the identity stands in for Ω: the result is then exact at a like cost. A fixed seed gives the same Ω
    for every layer of the same d_in, so that layers with the same input share XΩ and that sketches add over batches
    and workers.
    """
    if size is None or d_in <= 2 * size:
        return None
    gaussian = torch.randn(d_in, size, generator=torch.Generator().manual_seed(seed + d_in))
    return torch.linalg.qr(gaussian).Q * math.sqrt(d_in / size)


def sketched_gradient(x_sketch: Tensor, dy: Tensor) -> Tensor:
    """(Σ_b G_b)Ω in float32. XΩ as (B, T, s), dY as (B, T, d_out) → (d_out, s)."""
    return (dy.flatten(0, 1).T @ x_sketch.flatten(0, 1)).float()


def sketch_errors(squares: Tensor, d_in: int) -> Tensor:
    """Relative standard error of ‖GΩ‖ as an estimate of ‖G‖, predicted from the sketch alone. (B, s, s) → (B,).

    With A = GᵀG and Ω = √(d/s)·P for a uniformly random P with orthonormal columns, the relative variance of the
    squared norm tr(ΩᵀAΩ) is 2d(d − s)/(s(d − 1)(d + 2))·(1/ρ − 1/d), where ρ = (tr A)²/tr A² is A's effective rank: at
    most about 2/s, for a gradient of rank 1, and less the more directions it has. Both traces are estimated from W =
    ΩᵀAΩ by the method of moments (second moments of Haar projections). The norm's relative error is half of the
    square's.

    Args:
        squares: W = (GΩ)ᵀGΩ of every example.
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
