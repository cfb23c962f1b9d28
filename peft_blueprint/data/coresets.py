"""A few points that stand for many: k-centre, and facility location.

Pure numpy on arrays of points, such as the sketches of examples' gradients. Knows nothing of what they are of.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ..errors import BlueprintError


MOST_POINTS = 50_000  # of facility location, which looks at every pair
HELD_POINTS = 10_000  # of which all similarities are held

Metric = Literal["euclidean", "cosine", "precomputed"]

_ELEMENTS = 2**19  # similarities in memory at once
_AT_ONCE = 32  # candidates that are looked at again together


def k_centre(points: ArrayLike, count: int, seed: int = 0, start: int | None = None) -> np.ndarray:
    """Points so chosen that every other is near to one of them: always the one farthest from those taken so far.

    The largest distance of a point to the nearest chosen one is at most twice the smallest possible for as many
    (Gonzalez 1985, doi:10.1016/0304-3975(85)90224-5); as a choice of data, Sener and Savarese 2018 (arXiv:1708.00489).
    Distances are Euclidean: for directions alone, bring the points to one length. The first choices are the outliers,
    noise and wrong labels among them. Ties go to the earlier point. Takes n·d operations a choice, and memory for the
    points twice.

    Args:
        points: (n, d).
        count: how many to choose, 1 to n.
        seed: of the first choice.
        start: the first choice, instead of a random one.

    Returns:
        (count,) different positions, in the order of choice; the first few of them are what a smaller count gives.

    Raises:
        BlueprintError: if the points are no such matrix of finite numbers, or for a count or start out of range.
    """
    matrix = _centred(_checked(points, count))
    n = len(matrix)
    first = int(np.random.default_rng(seed).integers(n)) if start is None else int(start)
    if not 0 <= first < n:
        raise BlueprintError(f"start={start}: there are {n} points. Give a position from 0 to {n - 1}.")
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


def cover_radius(points: ArrayLike, chosen: ArrayLike) -> float:
    """The largest Euclidean distance of a point to the nearest chosen one: what k-centre keeps small.

    Args:
        points: (n, d).
        chosen: positions, at least one.

    Raises:
        BlueprintError: as `k_centre`.
    """
    positions = np.unique(np.asarray(chosen, dtype=np.int64))
    matrix = _checked(points, len(positions))
    if positions[0] < 0 or positions[-1] >= len(matrix):
        raise BlueprintError(f"Positions {positions[0]} to {positions[-1]} are not all among {len(matrix)} points.")
    nearest = np.full(len(matrix), np.inf)
    for position in positions:
        np.minimum(nearest, np.linalg.norm(matrix - matrix[position], axis=1), out=nearest)
    return float(nearest.max())


def facility_location(points: ArrayLike, count: int, *, metric: Metric = "euclidean") -> np.ndarray:
    """Points so chosen that all together are near to them: always the one that adds most to what is covered.

    Maximises F(S) = Σ_i max_{j∈S} s(i, j) over sets of `count` points. F is submodular and never falls, so that the
    greedy choice has at least 1 − 1/e of the most possible (Nemhauser, Wolsey and Fisher 1978,
    doi:10.1007/BF01588971). With s a constant less the distance of gradients it is the coreset of CRAIG (Mirzasoleiman
    et al. 2020, arXiv:1906.01827). Unlike k-centre it goes for where points are dense. A point is looked at again only
    if what it added before would still make it the best (Minoux 1978, doi:10.1007/BFb0006528); but for
    rounding in single precision, which decides among what adds alike, the choice is that of plain greedy.

    Of up to 10,000 points all similarities are held, 4·n² bytes and 400 MB at most: seconds. Of more they are computed
    again when they are needed, a few MB at a time: some minutes for 2,000 of 20,000 points of 251 numbers, as n²·d and
    more. Over 50,000 are refused: choose candidates first, by chance or by score.

    Args:
        points: (n, d); or similarities (n, n), not negative, column j those of every point to candidate j.
        count: how many to choose, 1 to n.
        metric: "euclidean" for s = D − ‖x − y‖, whose constant D does not bear on the choice; "cosine" for
            s = 1 + cos(x, y), 1 where a point is zero; "precomputed" for similarities.

    Returns:
        (count,) different positions, in the order of choice; the first few of them are what a smaller count gives.

    Raises:
        BlueprintError: if the points are no such matrix of finite numbers, there are too many, similarities are not
            square or negative, or for a count out of range or an unknown metric.
    """
    matrix = _checked(points, count)
    n = len(matrix)
    if n > MOST_POINTS:
        raise BlueprintError(
            f"Facility location looks at every pair, and takes at most {MOST_POINTS:,} points, not {n:,}. Choose "
            "candidates first, by chance or by score, or use k_centre."
        )
    similarities = _Similarities(matrix, metric)
    covered = np.zeros(n, dtype=np.float32)
    bounds = similarities.gains(covered, np.arange(n))
    is_stale = np.zeros(n, dtype=bool)
    chosen = np.empty(count, dtype=np.int64)
    for step in range(count):
        while is_stale[best := int(bounds.argmax())]:
            again = np.argpartition(np.where(is_stale, -bounds, np.inf), min(_AT_ONCE, n) - 1)[:_AT_ONCE]
            again = again[is_stale[again]]
            bounds[again] = similarities.gains(covered, again)
            is_stale[again] = False
        chosen[step] = best
        np.maximum(covered, similarities.rows(np.array([best]))[0], out=covered)
        bounds[best] = -np.inf
        is_stale = np.isfinite(bounds)
    return chosen


class _Similarities:
    """Rows of the matrix of similarities, computed when asked for; in single precision."""

    def __init__(self, matrix: np.ndarray, metric: str):
        self._is_euclidean = metric == "euclidean"
        self._squares = np.zeros(0, dtype=np.float32)
        self._most = np.float32(0)
        self._points: np.ndarray | None = None
        if metric == "precomputed":
            if matrix.shape[0] != matrix.shape[1] or (matrix < 0).any():
                raise BlueprintError(
                    f"Similarities of shape {matrix.shape}, the lowest {matrix.min():.3g}: give a square matrix of numbers "
                    "that are not negative, or points with metric='euclidean' or 'cosine'."
                )
            self._similarities = matrix
        elif metric == "euclidean":
            self._points = _centred(matrix).astype(np.float32)
            self._squares = np.square(self._points).sum(axis=1)
            self._most = 2 * np.sqrt(self._squares.max(initial=0))
        elif metric == "cosine":
            sizes = np.linalg.norm(matrix, axis=1, keepdims=True)
            self._points = (matrix / np.where(sizes > 0, sizes, 1.0)).astype(np.float32)
        else:
            raise BlueprintError(f"There is no metric {metric!r}: choose euclidean, cosine or precomputed.")
        if self._points is not None and len(matrix) <= HELD_POINTS:
            held = np.empty((len(matrix), len(matrix)), dtype=np.float32)
            for i in range(0, len(matrix), _AT_ONCE):
                held[i : i + _AT_ONCE] = self.rows(np.arange(i, min(i + _AT_ONCE, len(matrix))))
            self._points, self._similarities = None, held.T

    def rows(self, candidates: np.ndarray) -> np.ndarray:
        """(candidates, n) similarities of every point to each of some candidates; a new array."""
        if self._points is None:
            return self._similarities.T[candidates]
        found = self._points[candidates] @ self._points.T
        if self._is_euclidean:
            found *= -2
            found += self._squares
            found += self._squares[candidates, None]
            np.maximum(found, 0, out=found)
            np.sqrt(found, out=found)
            np.subtract(self._most, found, out=found)
        else:
            found += 1
        return np.maximum(found, 0, out=found)

    def gains(self, covered: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """(candidates,) what each would add to what is covered."""
        size = max(8, _ELEMENTS // len(covered))
        return np.concatenate(
            [self._gains(covered, candidates[i : i + size]) for i in range(0, len(candidates), size)]
        )

    def _gains(self, covered: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        rows = self.rows(candidates)
        rows -= covered
        np.maximum(rows, 0, out=rows)
        return rows.sum(axis=1, dtype=float)


def _checked(points: ArrayLike, count: int) -> np.ndarray:
    matrix = np.asarray(points, dtype=float)
    if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
        raise BlueprintError(
            f"Points are a matrix (points, numbers) of finite numbers, not of shape {matrix.shape} with "
            f"{int((~np.isfinite(matrix)).sum())} that are not finite. Leave out what was not measured."
        )
    if not 1 <= count <= len(matrix):
        raise BlueprintError(f"count={count}: there are {len(matrix)} points. Give a number from 1 to {len(matrix)}.")
    return matrix


def _centred(matrix: np.ndarray) -> np.ndarray:
    """As differences from their mean, so that distances far smaller than the points are still told apart."""
    return matrix - matrix.mean(axis=0)
