"""Fisher-preconditioned influence of every submodule, and how well gradient norms stand for it (appendix B.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compare import spearman
from ..errors import MeasurementError
from .concentration import FRACTIONS
from .influence import Influence
from .options import DAMPING


_TINY = torch.finfo(torch.double).tiny


@dataclass(frozen=True, eq=False)
class FisherInfluence:
    """Influence of submodules under a block-diagonal empirical Fisher matrix, beside the norms of their mean gradients.

    For submodule i with examples' gradients g_b, mean ḡ and Fisher matrix F = Σ_b g_b g_bᵀ/B, the influence is the
    size of Π_θi[D*] = (F + λI)⁻¹ḡ, the natural gradient (eq. 23 and 24). Its unit is that of the weights over nats, so
    one common factor c brings it to that of a gradient before the two are compared.

    Args:
        influences: (submodules,) float64, ‖(F + λI)⁻¹ḡ‖.
        mean_gradient_norms: (submodules,) float64, ‖ḡ‖ from the same numbers.
        mismatches: (submodules,) float64, ε_i = ‖ḡ − c·(F + λI)⁻¹ḡ‖ (eq. 25).
        scale: c, the same in every submodule, with the smallest sum of squared mismatches.
        damping: λ over the mean of the eigenvalues of F that B examples can make positive.

    Example:
        >>> ones = torch.ones(2)
        >>> FisherInfluence(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0]), ones, 1.0, 0.1).rank_correlation
        -1.0
    """

    influences: Tensor
    mean_gradient_norms: Tensor
    mismatches: Tensor
    scale: float
    damping: float

    @property
    def rank_correlation(self) -> float:
        """Spearman's correlation between the two rankings, by influence and by the norm of the mean gradient."""
        return float(spearman(self.influences, self.mean_gradient_norms))

    def bound(self, k: float) -> tuple[float, float]:
        """Return the most that ranking by gradient norm can lose (eq. 26) and its loss, as shares of all influence.

        With the gain of a set taken as its summed influence, eq. 26 holds with C = 1: each ε_i bounds the difference
        between c·influence and the gradient norm (triangle inequality), and the set with the largest norms has at least
        the norms of any other of its size.

        Args:
            k: fraction of the submodules in each of the two sets, (0, 1].

        Raises:
            MeasurementError: for k outside (0, 1].

        Example:
            >>> ones = torch.ones(2, dtype=torch.float64)
            >>> found = FisherInfluence(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0]), 2 * ones, 1.0, 0.1)
            >>> found.bound(0.5)
            (1.0, 0.5)
        """
        if not 0 < k <= 1:
            raise MeasurementError(f"k must be in (0, 1], got {k}.")
        count = max(1, round(k * len(self.influences)))
        by_norm, by_influence = (
            torch.zeros(len(values), dtype=torch.bool).index_fill_(0, values.topk(count).indices, True)
            for values in (self.mean_gradient_norms, self.influences)
        )
        scaled = self.scale * self.influences
        total = float(scaled.sum()) or 1.0
        most = float(self.mismatches[by_norm ^ by_influence].sum()) / total
        return most, float(scaled[by_influence].sum() - scaled[by_norm].sum()) / total

    def of_units(self, units: Sequence[Sequence[int]]) -> FisherInfluence:
        """Return the influence of groups of submodules, each the root of its members' summed squares.

        Args:
            units: indices of submodules, for every group.
        """
        influences, norms, mismatches = (
            torch.stack([torch.linalg.vector_norm(values[list(rows)]) for rows in units])
            for values in (self.influences, self.mean_gradient_norms, self.mismatches)
        )
        return FisherInfluence(influences, norms, mismatches, self.scale, self.damping)

    def to_dict(self, norms: Tensor, kinds: Sequence[str | None]) -> dict[str, Any]:
        """Return the statistics of the whole model for a file.

        Args:
            norms: (submodules,), the published gradient norms, which are means over examples.
            kinds: of the submodules.
        """
        n = len(self.influences)
        fractions = [k for k in FRACTIONS if 1 <= round(k * n) < n]
        bounds = [self.bound(k) for k in fractions]
        return {
            "damping": self.damping,
            "scale": self.scale,
            "rank_correlation": float(spearman(self.influences, norms)),
            "rank_correlation_within_kinds": within_kinds(self.influences, norms, kinds),
            "rank_correlation_mean_gradient": self.rank_correlation,
            "relative_mismatch": float(self.mismatches.sum() / (self.scale * self.influences.sum()).clamp_min(_TINY)),
            "fractions": fractions,
            "bound": [most for most, _ in bounds],
            "lost": [lost for _, lost in bounds],
        }


def fisher_influence(
    influence: Influence, damping: float = DAMPING, examples: Tensor | None = None
) -> FisherInfluence:
    """Compute the Fisher-preconditioned influence of every submodule from a measurement (appendix B.3).

    The gradients are those that the measurement's projections stand for, scaled to the measured norms; they are exact
    where a gradient has at most `projection_size` numbers. The Fisher matrix is the empirical one, of the targets in
    the data, and block-diagonal over submodules. λ is `damping` times tr(F)/min(B, parameters): B examples leave all
    other eigenvalues at 0, where F alone has no inverse.

    The influence of a submodule falls as its gradients grow: with gradients twice as large, ḡ doubles and F grows
    fourfold. Across submodules whose gradients differ in size more than in direction, the ranking is about the reverse
    of that by gradient norm.

    Args:
        influence: with projections.
        damping: λ in mean eigenvalues, positive.
        examples: (n,) int64, indices of examples to use, with repetitions in a bootstrap; all by default.

    Raises:
        MeasurementError: without projections, for one example, or for a damping that is not positive.

    Example:
        >>> from peft_blueprint import measure_influence
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> influence = measure_influence(tiny_llama(), toy_batches(), progress=False)
        >>> found = fisher_influence(influence)
        >>> found.influences.shape, found.rank_correlation < -0.9
        (torch.Size([28]), True)
    """
    if not damping > 0:
        raise MeasurementError(f"damping must be positive, got {damping}.")
    if not influence.projections.shape[2]:
        raise MeasurementError(
            "The Fisher matrix needs projections, and none were measured. Measure with projection_size=251."
        )
    chosen = torch.arange(influence.examples) if examples is None else examples
    if len(chosen) < 2:
        raise MeasurementError(f"The Fisher matrix needs at least two examples, got {len(chosen)}.")
    sizes = torch.zeros(3, len(influence.submodules), dtype=torch.double)
    for i, submodule in enumerate(influence.submodules):
        gradients = influence.projections[i, chosen].double()
        norms = influence.norms[i, chosen].double()
        gradients *= (norms / torch.linalg.vector_norm(gradients, dim=1).clamp_min(_TINY))[:, None]
        mean = gradients.mean(dim=0)
        natural = natural_gradient(gradients, damping, submodule.parameters)
        sizes[:, i] = torch.stack([mean @ mean, natural @ natural, mean @ natural])
    squares, natural_squares, products = sizes
    scale = float(products.sum() / natural_squares.sum().clamp_min(_TINY))
    mismatches = (squares - 2 * scale * products + scale**2 * natural_squares).clamp_min(0).sqrt()
    return FisherInfluence(natural_squares.sqrt(), squares.sqrt(), mismatches, scale, damping)


def natural_gradient(gradients: Tensor, damping: float, parameters: int | None = None) -> Tensor:
    """Return (F + λI)⁻¹ḡ for F = Σ_b g_b g_bᵀ/B, by the smaller of the B × B and the m × m system.

    Args:
        gradients: (B, m), examples' gradients g_b, or projections that keep their inner products.
        damping: λ over tr(F)/min(B, parameters).
        parameters: number of the gradient's own entries, m by default.

    Returns:
        (m,); zeros if all gradients are.

    Example:
        >>> natural_gradient(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), damping=1.0)
        tensor([0.2857, 0.3077])
    """
    examples, width = gradients.shape
    trace = gradients.square().sum() / examples
    if not trace > 0:
        return torch.zeros_like(gradients[0])
    shift = damping * trace / min(examples, parameters or width)
    if examples <= width:  # (GᵀG/B + λ)⁻¹Gᵀ1/B = Gᵀ(GGᵀ/B + λ)⁻¹1/B
        system = gradients @ gradients.T / examples
        system.diagonal().add_(shift)
        return gradients.T @ torch.linalg.solve(system, torch.full_like(system[0], 1 / examples))
    system = gradients.T @ gradients / examples
    system.diagonal().add_(shift)
    return torch.linalg.solve(system, gradients.mean(dim=0))


def within_kinds(a: Tensor, b: Tensor, kinds: Sequence[str | None]) -> float:
    """Return Spearman's correlation within kinds, each weighted by its number of entries less one; 0 if all have one."""
    rows: dict[str | None, list[int]] = {}
    for i, kind in enumerate(kinds):
        rows.setdefault(kind, []).append(i)
    weighted = [(len(own) - 1) * float(spearman(a[own], b[own])) for own in rows.values()]
    return sum(weighted) / max(1, len(kinds) - len(rows))
