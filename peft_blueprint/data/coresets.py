"""Choose a few points that represent many: k-centre and facility location."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..errors import BlueprintError
from .options import MAX_FACILITY_POINTS


_HELD_POINTS = 10_000  # up to which all similarities stay in memory
_ELEMENTS = 2**19  # similarities computed at once
_AT_ONCE = 32  # candidates re-evaluated at once


def k_centre(points: ArrayLike, count: int, seed: int = 0, start: int | None = None) -> np.ndarray:
    """Choose points so that every other is near one of them: always the one farthest from those chosen so far.

    The largest distance of a point to the nearest chosen one is at most twice the smallest possible (Gonzalez 1985,
    doi:10.1016/0304-3975(85)90224-5); for choosing data, Sener and Savarese 2018 (arXiv:1708.00489). Distances are
    Euclidean. The first choices are outliers, among them noise and wrong labels. Ties go to the earlier point. Takes n·d
    operations a choice, and memory for the points twice.

    Args:
        points: (n, d).
        count: how many to choose, 1 to n.
        seed: of the first choice.
        start: first choice, instead of a random one.

    Returns:
        (count,) distinct positions in the order of choice; a smaller count gives the first few of them.

    Raises:
        BlueprintError: if the points are not a finite matrix, or a count or start is out of range.

    Example:
        >>> k_centre([[0.0], [1.0], [10.0], [4.0]], 3, start=0).tolist()
        [0, 2, 3]
    """
    matrix = _check_points(points, count)
    matrix = matrix - matrix.mean(axis=0)  # distances far smaller than the points stay distinct
    n = len(matrix)
    first = int(np.random.default_rng(seed).integers(n)) if start is None else int(start)
    if not 0 <= first < n:
        raise BlueprintError(f"start must be a position from 0 to {n - 1}, got {start}.")
    squares = np.square(matrix).sum(axis=1)
    rounding = 1e-13 * float(squares.max(initial=0.0))
    nearest = np.full(n, np.inf)
    chosen = np.empty(count, dtype=np.int64)
    for step in range(count):
        one = first if step == 0 else int(nearest.argmax())
        chosen[step] = one
        distances = squares + squares[one] - 2 * (matrix @ matrix[one])
        distances[distances < rounding] = 0.0
        np.minimum(nearest, distances, out=nearest)
        nearest[one] = -1.0
    return chosen


def facility_location(points: ArrayLike, count: int) -> np.ndarray:
    """Choose points so that all are near one of them on average: always the one that adds most coverage.

    Maximizes F(S) = Σ_i max_{j∈S} (1 + cos(x_i, x_j)), greedily. F is submodular and monotone, so the greedy choice
    reaches at least 1 − 1/e of the maximum (Nemhauser, Wolsey and Fisher 1978, doi:10.1007/BF01588971). On gradients it
    is a coreset as in CRAIG (Mirzasoleiman et al. 2020, arXiv:1906.01827), with cosines instead of distances. Unlike
    k-centre it prefers dense regions. Points are re-evaluated lazily (Minoux 1978, doi:10.1007/BFb0006528); up to
    rounding in single precision the choice is that of plain greedy.

    Up to 10,000 points all similarities are held (4·n² bytes, at most 400 MB), which takes seconds. Beyond, they are
    recomputed as needed: minutes for 2,000 of 20,000 points of 251 numbers, growing faster than n²·d.

    Args:
        points: (n, d), at most 50,000.
        count: how many to choose, 1 to n.

    Returns:
        (count,) distinct positions in the order of choice; a smaller count gives the first few of them.

    Raises:
        BlueprintError: if the points are not a finite matrix or too many, or the count is out of range.

    Example:
        >>> facility_location([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [-1.0, 0.0]], 2).tolist()
        [1, 3]
    """
    matrix = _check_points(points, count)
    n = len(matrix)
    if n > MAX_FACILITY_POINTS:
        raise BlueprintError(
            f"Facility location takes at most {MAX_FACILITY_POINTS:,} points, got {n:,}. Sample candidates first, or use "
            "k_centre."
        )
    sizes = np.linalg.norm(matrix, axis=1, keepdims=True)
    unit = (matrix / np.where(sizes > 0, sizes, 1.0)).astype(np.float32)
    held: np.ndarray | None = None
    covered = np.zeros(n, dtype=np.float32)

    def similarities(candidates: np.ndarray) -> np.ndarray:  # (candidates, n): 1 + cos(x_i, x_j), 1 for a zero point
        if held is not None:
            return held[candidates]
        found = unit[candidates] @ unit.T
        found += 1
        return np.maximum(found, 0, out=found)

    def gains(candidates: np.ndarray) -> np.ndarray:  # (candidates,): how much coverage each would add
        size = max(8, _ELEMENTS // n)
        parts = (similarities(candidates[i : i + size]) - covered for i in range(0, len(candidates), size))
        return np.concatenate([part.clip(min=0).sum(axis=1, dtype=float) for part in parts])

    if n <= _HELD_POINTS:
        held = similarities(np.arange(n))
    bounds = gains(np.arange(n))
    is_stale = np.zeros(n, dtype=bool)
    chosen = np.empty(count, dtype=np.int64)
    for step in range(count):
        while is_stale[best := int(bounds.argmax())]:
            again = np.argpartition(np.where(is_stale, -bounds, np.inf), min(_AT_ONCE, n) - 1)[:_AT_ONCE]
            again = again[is_stale[again]]
            bounds[again] = gains(again)
            is_stale[again] = False
        chosen[step] = best
        np.maximum(covered, similarities(np.array([best]))[0], out=covered)
        bounds[best] = -np.inf
        is_stale = np.isfinite(bounds)
    return chosen


def _check_points(points: ArrayLike, count: int) -> np.ndarray:
    matrix = np.asarray(points, dtype=float)
    if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
        raise BlueprintError(
            f"Points must be finite numbers of shape (points, numbers), got shape {matrix.shape} with "
            f"{int((~np.isfinite(matrix)).sum())} not finite."
        )
    if not 1 <= count <= len(matrix):
        raise BlueprintError(f"count must be from 1 to {len(matrix)}, the number of points, got {count}.")
    return matrix
