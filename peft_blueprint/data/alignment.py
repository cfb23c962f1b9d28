"""Compare examples' gradients with a target's mean gradient, and turn gradients into short vectors.

After LESS (Xia et al. 2024, arXiv:2402.04333), without its warm-up and its store of projected gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from .._text import format_names
from ..errors import MeasurementError, MismatchError
from ..measure import Influence
from .options import Precondition, Similarity, require_choice


@dataclass(frozen=True, eq=False)
class Target:
    """Mean gradient of a small set of examples, submodule by submodule.

    Args:
        submodules: names of those compared.
        directions: (submodules, m) float32, mean projections.
        weights: (submodules,) float32, weights of the submodules' inner products.
        norm: of the whole direction under these weights; the noise of few examples makes it too large.
        seed: of the projections, which compare only under the same seed.
    """

    submodules: tuple[str, ...]
    directions: Tensor
    weights: Tensor
    norm: float
    seed: int


def make_target(
    influence: Influence, submodules: Sequence[str] | None = None, precondition: Precondition = "none"
) -> Target:
    """Average the gradients of a measured set into a target.

    Preconditioning is by submodule, not by entry; the root mean square v_i over examples of the gradient's norm stands
    in for Adam's second moment. "adam" divides a submodule's inner product by v_i/√n_i, for n_i entries: to first order
    the change of the target's loss in an Adam step on the example. "blocks" divides it by v_i², so that each submodule
    counts alike.

    Args:
        influence: a measurement with projections.
        submodules: names of those to compare; all by default.
        precondition: "none", "adam" or "blocks".

    Raises:
        MeasurementError: if the measurement has no projections, or the mean gradient is zero.
        MismatchError: for a name that was not measured.

    Example:
        >>> from peft_blueprint import measure_influence
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> influence = measure_influence(tiny_llama(), toy_batches(), progress=False)
        >>> alignment_scores(influence, make_target(influence)).shape
        (8,)
    """
    require_choice("precondition", precondition, get_args(Precondition))
    _require_projections(influence)
    rows = find_rows(influence, submodules)
    directions = influence.projections[rows].mean(dim=1)
    sizes = influence.norms[rows].square().mean(dim=1).sqrt()
    weights = torch.ones_like(sizes)
    if precondition != "none":
        entries = torch.tensor([float(np.prod(influence.submodules[row].shape or (1,))) for row in rows])
        floor = 1e-6 * float(sizes.max()) or 1.0  # do not magnify submodules that no gradient reaches
        weights = entries.sqrt() / sizes.clamp_min(floor) if precondition == "adam" else sizes.clamp_min(floor) ** -2
        weights = weights / weights.mean()
    norm = float((weights * directions.square().sum(dim=1)).sum().sqrt())
    if not norm > 0:
        raise MeasurementError("The target's mean gradient is zero, so nothing aligns with it. Give other examples.")
    names = tuple(influence.submodules[row].name for row in rows)
    return Target(names, directions, weights, norm, influence.seed)


def alignment_scores(influence: Influence, target: Target, similarity: Similarity = "cosine") -> np.ndarray:
    """Estimate how much each example's gradient agrees with a target's.

    ⟨g_b, t⟩ = Σ_i w_i·⟨g_ib, t_i⟩, estimated from projections; "cosine" divides it by both norms. Gradients are of mean
    losses, so a long example counts no more than a short one. A dot product still grows with the gradient's norm.

    Args:
        influence: of the examples, measured with the target's seed and projection size.
        target: see `make_target`.
        similarity: "cosine" or "dot".

    Returns:
        (examples,) float64; 0 for an example without a gradient. The noise of a small target shrinks all cosines by one
        common factor.

    Raises:
        MismatchError: if the two were not measured alike.

    Example:
        >>> from peft_blueprint.measure import measure_influence
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> batches = toy_batches(examples=4)
        >>> influence = measure_influence(tiny_llama(layers=1), batches, projection_size=64, progress=False)
        >>> alignment_scores(influence, make_target(influence)).shape
        (4,)
    """
    require_choice("similarity", similarity, get_args(Similarity))
    rows = find_rows(influence, target.submodules)
    projections = influence.projections[rows]
    if influence.seed != target.seed or projections.shape[2] != target.directions.shape[1]:
        raise MismatchError(
            f"The target was measured with seed {target.seed} and projection size {target.directions.shape[1]}, the "
            f"examples with seed {influence.seed} and projection size {projections.shape[2]}. Measure both alike."
        )
    products = torch.einsum("i,ibm,im->b", target.weights, projections, target.directions).double()
    if similarity == "cosine":
        sizes = (target.weights[:, None] * influence.norms[rows].square()).sum(dim=0).double().sqrt()
        products = torch.where(sizes > 0, products / (sizes * target.norm).clamp_min(1e-300), 0.0)
    return products.numpy()


def gradient_points(influence: Influence, submodules: Sequence[str] | None = None) -> np.ndarray:
    """Project each example's gradient over all these submodules onto one unit vector.

    The submodules' projections are summed under random signs, so that inner products are in expectation those of whole
    gradients: cross terms between submodules cancel (for hashed features, Weinberger et al. 2009, arXiv:0902.2206).

    Args:
        influence: a measurement with projections.
        submodules: names; all by default.

    Returns:
        (examples, m) float32; zeros for an example without a gradient.

    Raises:
        MeasurementError: if the measurement has no projections.
        MismatchError: for a name that was not measured.
    """
    _require_projections(influence)
    rows = find_rows(influence, submodules)
    shape = (len(rows), influence.projections.shape[2])
    signs = torch.randint(2, shape, generator=torch.Generator().manual_seed(influence.seed)) * 2.0 - 1.0
    points = torch.einsum("im,ibm->bm", signs, influence.projections[rows])
    return torch.nn.functional.normalize(points, dim=1, eps=1e-30).numpy()


def find_rows(influence: Influence, submodules: Sequence[str] | None) -> list[int]:
    """Return the rows of these submodules in the measurement's order; all rows for None.

    Raises:
        MismatchError: for a name that was not measured.

    Example:
        >>> from peft_blueprint.measure import measure_influence
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> influence = measure_influence(tiny_llama(layers=1), toy_batches(examples=2), progress=False)
        >>> find_rows(influence, ["model.layers.0.self_attn.v_proj"])
        [2]
    """
    if submodules is None:
        return list(range(len(influence.submodules)))
    wanted = set(submodules)
    rows = [i for i, submodule in enumerate(influence.submodules) if submodule.name in wanted]
    if len(rows) < len(wanted) or not rows:
        missing = sorted(wanted - {influence.submodules[row].name for row in rows})
        raise MismatchError(
            f"{len(missing)} of {len(wanted)} submodules were not measured ({format_names(missing) or 'no names given'}). "
            f"Give names of submodules that a gradient reaches: {format_names([s.name for s in influence.submodules])}."
        )
    return rows


def _require_projections(influence: Influence) -> None:
    if not influence.projections.shape[2]:
        raise MeasurementError("The measurement has no projections. Measure with projection_size=251.")
