"""How near a matrix is to one of low rank: singular values, effective rank, and what chance would give.

Arithmetic on arrays; knows nothing of what the rows and columns are. Equation numbers are the paper's (`theory`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import BlueprintError


_ROOM = 1 + 1e-12  # for rounding, in comparisons


@dataclass(frozen=True)
class LowRank:
    """The low-rank structure of a matrix (eq. 33), from its singular values.

    Args:
        singular_values: in descending order.
        effective_rank: exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007, "The
            effective rank: a measure of effective dimensionality"): from 1 to their number.
        participation_ratio: (Σσ²)²/Σσ⁴, the same idea with squares, which small values hardly enter.
        independent_error: relative Frobenius error of the outer product of row and column sums over the whole sum, what
            the matrix would be if rows and columns were independent. At least `error(1)`.
        interactions: how many leading singular values of what that product leaves are above the 95th percentile of those
            with every row shuffled by itself (parallel analysis: Horn 1965, doi:10.1007/BF02289447): patterns of rows
            with columns that are not chance. None if it was not looked for.
    """

    singular_values: tuple[float, ...]
    effective_rank: float
    participation_ratio: float
    independent_error: float
    interactions: int | None = None

    def captured(self, components: int) -> float:
        """Share of the squared entries' sum that the first components hold.

        Raises:
            BlueprintError: for a number of components that there are not.
        """
        if not 0 <= components <= len(self.singular_values):
            raise BlueprintError(f"components={components}: there are {len(self.singular_values)}. Give 0 to as many.")
        squares = np.square(self.singular_values)
        return float(squares[:components].sum() / squares.sum())

    def error(self, components: int) -> float:
        """Relative Frobenius error of the first components, the least that any matrix of that rank has (Eckart-Young)."""
        squares = np.square(self.singular_values)
        self.captured(components)
        return float(np.sqrt(squares[components:].sum() / squares.sum()))

    def components_for(self, share: float) -> int:
        """The fewest components that hold a share of the squared entries' sum.

        Raises:
            BlueprintError: for a share outside (0, 1].
        """
        if not 0 < share <= 1:
            raise BlueprintError(f"share={share} is not a share: give a number above 0 and at most 1.")
        squares = np.square(self.singular_values)
        reached = np.cumsum(squares) >= share * squares.sum() / _ROOM
        return int(reached.argmax()) + 1 if reached.any() else len(squares)

    def summary(self) -> str:
        """Three lines for people."""
        n = len(self.singular_values)
        held = ", ".join(f"{self.components_for(share)} for {share:.0%}" for share in (0.9, 0.95, 0.99))
        beyond = "" if self.interactions is None else f"; {self.interactions} interactions beyond chance"
        return (
            f"effective rank {self.effective_rank:.1f} of {n}, participation ratio {self.participation_ratio:.2f}\n"
            f"components that hold the squares: {held}\n"
            f"relative error {self.error(1):.3f} with one component, {self.independent_error:.3f} if independent{beyond}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Numbers and lists of them, for a file."""
        return asdict(self)


def low_rank(matrix: np.ndarray, shuffles: int = 20, seed: int = 0) -> LowRank:
    """The low-rank structure of a matrix (n, m), by its singular values; n·m·min(n, m) operations for each shuffle.

    Raises:
        BlueprintError: for a negative number of shuffles, or a matrix of zeros.
    """
    if shuffles < 0:
        raise BlueprintError(f"shuffles={shuffles}: give 0 or more.")
    matrix = np.asarray(matrix, dtype=float)
    values = np.linalg.svd(matrix, compute_uv=False)
    squares, shares = np.square(values), values / (values.sum() or 1.0)
    if not squares.sum():
        raise BlueprintError("A matrix of zeros has no structure. Check the data.")
    total = matrix.sum()
    residual = matrix - np.outer(matrix.sum(axis=1), matrix.sum(axis=0)) / total if total else matrix
    return LowRank(
        singular_values=tuple(values.tolist()),
        effective_rank=float(np.exp(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())),
        participation_ratio=float(squares.sum() ** 2 / np.square(squares).sum()),
        independent_error=float(np.sqrt(np.square(residual).sum() / squares.sum())),
        interactions=_beyond_chance(residual, 1e-9 * values[0], shuffles, seed) if shuffles else None,
    )


def _beyond_chance(matrix: np.ndarray, least: float, shuffles: int, seed: int) -> int:
    """How many leading singular values are above the 95th percentile of those with shuffled rows, and above `least`."""
    rng = np.random.default_rng(seed)
    drawn = [np.linalg.svd(rng.permuted(matrix, axis=1), compute_uv=False) for _ in range(shuffles)]
    values = np.linalg.svd(matrix, compute_uv=False)
    is_above = (values > np.percentile(drawn, 95, axis=0)) & (values > least)
    return int(np.logical_and.accumulate(is_above).sum())
