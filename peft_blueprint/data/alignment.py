"""How far examples' gradients point where a target's mean gradient points, from one measurement of each; and examples'
gradients as short vectors.

After LESS (Xia et al. 2024, arXiv:2402.04333), without its warm-up and its store of projected gradients: a batch is
measured, compared and forgotten. Knows nothing of what is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .._text import format_names
from ..errors import MeasurementError, MismatchError
from ..measure import Influence


Precondition = Literal["none", "adam", "blocks"]
Similarity = Literal["cosine", "dot"]


@dataclass(frozen=True, eq=False)
class Target:
    """Where examples are wanted to point: the mean gradient of a small set, submodule by submodule.

    Args:
        submodules: names of those that count.
        directions: (submodules, m) float32, the mean projection.
        weights: (submodules,) float32, what each submodule's inner product counts.
        norm: of the whole direction under these weights; the noise of few examples makes it too large.
        seed: of the sketches and projections, which only compare under the same.
        examples: of the set.
    """

    submodules: tuple[str, ...]
    directions: Tensor
    weights: Tensor
    norm: float
    seed: int
    examples: int


def target_of(
    influence: Influence, submodules: Sequence[str] | None = None, precondition: Precondition = "none"
) -> Target:
    """The target that a measured set gives.

    Preconditioning is by submodule, not by entry, with the root mean square over the set's examples of the gradient's
    norm, v_i, in the place of Adam's second moment. "adam" divides a submodule's inner product by v_i/√n_i, for n_i
    entries: the change of the target's loss in an Adam step on the example, to first order. "blocks" divides it by v_i²,
    so that each submodule counts alike, whatever its gradient's size.

    Args:
        influence: with projections.
        submodules: names of those to compare; all that were measured by default.
        precondition: "none", "adam" or "blocks".

    Raises:
        MeasurementError: if no projections were kept, or the gradient is zero everywhere.
        MismatchError: for a name that was not measured.
    """
    if precondition not in get_args(Precondition):
        raise MeasurementError(f"precondition={precondition!r}: choose from {', '.join(get_args(Precondition))}.")
    _require_projections(influence)
    rows = rows_of(influence, submodules)
    directions = influence.projections[rows].mean(dim=1)
    sizes = influence.norms[rows].square().mean(dim=1).sqrt()
    weights = torch.ones_like(sizes)
    if precondition != "none":
        counts = torch.tensor([_entries(influence, row) for row in rows])
        floor = 1e-6 * float(sizes.max()) or 1.0  # where no gradient arrives, nothing is to be magnified
        weights = counts.sqrt() / sizes.clamp_min(floor) if precondition == "adam" else sizes.clamp_min(floor) ** -2
        weights = weights / weights.mean()
    norm = float((weights * directions.square().sum(dim=1)).sum().sqrt())
    if not norm > 0:
        raise MeasurementError(
            "The target's mean gradient is zero: nothing can be aligned with it. Give other target examples."
        )
    names = tuple(influence.submodules[row].name for row in rows)
    return Target(names, directions, weights, norm, influence.seed, influence.examples)


def alignment_scores(influence: Influence, target: Target, similarity: Similarity = "cosine") -> np.ndarray:
    """How much each example's gradient agrees with a target's.

    ⟨g_b, t⟩ = Σ_i w_i·⟨g_ib, t_i⟩, estimated from projections; divided by the norms of both for "cosine". Gradients are
    those of mean losses, so that a long example counts no more than a short one; a dot product still grows with how large
    an example's gradient is.

    Args:
        influence: of the examples, measured with the target's seed and sizes.
        target: see `target_of`.
        similarity: "cosine" or "dot".

    Returns:
        (examples,) float64; 0 for an example without a gradient. The noise of a small target makes cosines smaller than
        with what it stands for, by one factor for all.

    Raises:
        MismatchError: if the two were not measured alike.
    """
    if similarity not in get_args(Similarity):
        raise MeasurementError(f"similarity={similarity!r}: choose from {', '.join(get_args(Similarity))}.")
    rows = rows_of(influence, target.submodules)
    projections = influence.projections[rows]
    if influence.seed != target.seed or projections.shape[2] != target.directions.shape[1]:
        raise MismatchError(
            f"The target was measured with seed {target.seed} and {target.directions.shape[1]} numbers an example, these "
            f"examples with seed {influence.seed} and {projections.shape[2]}: measure both alike."
        )
    products = torch.einsum("i,ibm,im->b", target.weights, projections, target.directions).double()
    if similarity == "cosine":
        sizes = (target.weights[:, None] * influence.norms[rows].square()).sum(dim=0).double().sqrt()
        products = torch.where(sizes > 0, products / (sizes * target.norm).clamp_min(1e-300), 0.0)
    return products.numpy()


def gradient_points(influence: Influence, submodules: Sequence[str] | None = None) -> np.ndarray:
    """Every example's gradient over all these submodules as one vector of m numbers and unit length.

    Projections of the submodules are added up under random signs of their own, so that inner products are, in
    expectation, those of whole gradients: what is between submodules cancels (as in Weinberger et al. 2009,
    arXiv:0902.2206, there of hashed features).

    Args:
        influence: with projections.
        submodules: names; all that were measured by default.

    Returns:
        (examples, m) float32; zeros for an example without a gradient.

    Raises:
        MeasurementError: if no projections were kept.
        MismatchError: for a name that was not measured.
    """
    _require_projections(influence)
    rows = rows_of(influence, submodules)
    shape = (len(rows), influence.projections.shape[2])
    signs = torch.randint(2, shape, generator=torch.Generator().manual_seed(influence.seed)) * 2.0 - 1.0
    points = torch.einsum("im,ibm->bm", signs, influence.projections[rows])
    sizes = torch.linalg.vector_norm(points, dim=1, keepdim=True)
    return torch.where(sizes > 0, points / sizes.clamp_min(1e-30), 0.0).numpy()


def rows_of(influence: Influence, submodules: Sequence[str] | None) -> list[int]:
    """The rows of a measurement that these names are, in the measurement's order; all for None.

    Raises:
        MismatchError: for a name that was not measured.
    """
    if submodules is None:
        return list(range(len(influence.submodules)))
    wanted = set(submodules)
    rows = [i for i, submodule in enumerate(influence.submodules) if submodule.name in wanted]
    if len(rows) < len(wanted) or not rows:
        missing = sorted(wanted - {influence.submodules[row].name for row in rows})
        raise MismatchError(
            f"{len(missing)} of {len(wanted)} submodules were not measured ({format_names(missing) or 'none was named'}); "
            f"measured were {len(influence.submodules)} ({format_names([s.name for s in influence.submodules])}). Give names of "
            "this model's submodules, on which a gradient arrives."
        )
    return rows


def _entries(influence: Influence, row: int) -> float:
    return float(np.prod(influence.submodules[row].shape or (1,)))


def _require_projections(influence: Influence) -> None:
    if not influence.projections.shape[2]:
        raise MeasurementError("There are no projections to align. Measure with projection_size=251.")
