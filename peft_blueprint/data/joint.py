"""Joint selection: rows and columns of a matrix, submodules and examples, that together hold most of its sum.

Arithmetic on arrays; knows nothing of where they are from. Equation numbers are the paper's (`theory`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import BlueprintError
from ..measure import FRACTIONS, fit_gamma


LEADING = 4  # singular vectors that a search starts from, either way round

_ROOM = 1 + 1e-12  # for rounding, in comparisons with a budget
_BLOCK = 256  # rows that are sorted together


@dataclass(frozen=True)
class JointSelection:
    """Submodules and examples chosen for each other, and what other ways to choose as many capture.

    Args:
        submodules: names, in the order of the matrix.
        examples: ids, in the order of the matrix.
        share: captured of the whole matrix (eq. 34).
        separate: captured by as many submodules and examples, each chosen by its own sums.
        product: what these submodules hold over all examples, times what these examples hold over all submodules: what
            `separate` would be if the two were independent (the 80 % × 90 % of §4.4).
        independent: k^γ·q^δ (eq. 35) with the exponents fitted to the two curves of retained mass.
        bound: no pair that keeps to these shares captures more.
        gamma: γ.
        delta: δ.
        k: the share of submodules that was asked for, of their number or cost.
        q: that of examples.
        iterations: steps that raised the share from the best start, its first pair included.
        starts: the share reached from each start, by its name.
    """

    submodules: tuple[str, ...]
    examples: tuple[int, ...]
    share: float
    separate: float
    product: float
    independent: float
    bound: float
    gamma: float
    delta: float
    k: float
    q: float
    iterations: int
    starts: tuple[tuple[str, float], ...]

    def summary(self) -> str:
        """Three lines for people."""
        reached = sum(share >= self.share * (1 - 1e-9) for _, share in self.starts)
        return (
            f"{len(self.submodules)} submodules and {len(self.examples)} examples (k = {self.k:g}, q = {self.q:g}) capture "
            f"{self.share:.2%}; at most {self.bound:.2%} could be\n"
            f"chosen separately {self.separate:.2%}, product of the two shares {self.product:.2%}, k^{self.gamma:.3f} · "
            f"q^{self.delta:.3f} = {self.independent:.2%}\n"
            f"settled after {self.iterations} steps; {reached} of {len(self.starts)} starts reach it"
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested mappings of numbers and text, for a file; the chosen examples' ids are among them."""
        return asdict(self) | {"starts": dict(self.starts)}


class Side:
    """What may be taken of the rows, or of the columns: a share of their number, or of their summed cost.

    Args:
        n: how many there are.
        share: in (0, 1]. Of the number it is rounded, to at least one; of the cost it is not passed.
        costs: (n,) positive; or None, for the number.
        what: for messages, "submodules".

    Raises:
        BlueprintError: for a share outside (0, 1], costs that do not pair or are not positive, or if nothing is cheap
            enough.
    """

    def __init__(self, n: int, share: float, costs: ArrayLike | None = None, what: str = "elements"):
        require_share(f"the share of {what}", share)
        self.count = None if costs is not None else max(1, round(share * n))
        self.costs = np.ones(n) if costs is None else np.asarray(costs, dtype=float)
        if self.costs.shape != (n,) or not (np.isfinite(self.costs).all() and (self.costs > 0).all()):
            raise BlueprintError(f"{self.costs.size} costs for {n} {what}: give each one positive number.")
        self.budget = float(self.count if self.count is not None else share * self.costs.sum()) * _ROOM
        if self.costs.min() > self.budget:
            raise BlueprintError(
                f"A share of {share} of the cost of {n} {what} is {self.budget:.4g}, and the cheapest costs "
                f"{self.costs.min():.4g}. Give a larger share."
            )

    def take(self, scores: np.ndarray) -> np.ndarray:
        """Sorted positions of the largest scores: of a number exactly so many, whatever their sign.

        Of a budget, the largest scores per cost that still fit, or the one largest alone if that is more: at least half
        of the most possible. What does not add is left out then, unless nothing adds. Ties go to the earlier position.
        """
        if self.count is not None:
            return np.sort(np.argsort(-scores, kind="stable")[: self.count])
        fits = np.flatnonzero(self.costs <= self.budget)
        alone = fits[scores[fits].argmax()]
        taken, left = [], self.budget
        for one in np.argsort(-scores / self.costs, kind="stable"):
            if scores[one] > 0 and self.costs[one] <= left:
                taken.append(one)
                left -= self.costs[one]
        if not taken or scores[taken].sum() < scores[alone]:
            return np.array([alone])
        return np.sort(np.array(taken))

    def most(self, scores: np.ndarray) -> np.ndarray:
        """(rows,) at least the most that could be taken of each row of (rows, n) scores, a part of an element if need be."""
        return np.concatenate([self._most(scores[i : i + _BLOCK]) for i in range(0, len(scores), _BLOCK)])

    def _most(self, scores: np.ndarray) -> np.ndarray:
        if self.count is not None:
            return -np.partition(-scores, self.count - 1, axis=1)[:, : self.count].sum(axis=1)
        order = np.argsort(-scores / self.costs, axis=1)
        costs = self.costs[order]
        parts = (self.budget - (np.cumsum(costs, axis=1) - costs)).clip(0, costs) / costs
        return (np.take_along_axis(scores, order, axis=1).clip(min=0) * parts).sum(axis=1)


@dataclass(frozen=True, eq=False)
class Pair:
    """Rows and columns that were found together.

    Args:
        rows: sorted positions.
        columns: sorted positions.
        total: the sum of the entries in which they meet.
        history: the total after the first step and after each that raised it; it only rises.
    """

    rows: np.ndarray
    columns: np.ndarray
    total: float
    history: tuple[float, ...]


def settle(
    matrix: np.ndarray, rows: Side, columns: Side, chosen_columns: np.ndarray, chosen_rows: np.ndarray | None = None
) -> Pair:
    """Alternate between the rows that matter for the chosen columns and the columns that matter for the chosen rows.

    With f(S, D) = Σ_{i∈S, j∈D} T_ij, for a fixed D the rows' sums over D are the scores of rows, and f is the sum of the
    chosen rows' scores: where a number of rows is taken, those of the largest scores are the best S there is. Where a
    budget is kept, the greedy choice may be worse than the present one, and the present one then stays. So a step never
    lowers f, one that does not raise it by more than rounding is not taken, and there are finitely many pairs: it ends,
    at a pair that no step of this kind betters. Other pairs may be better: start from several.

    Args:
        matrix: T, (n, m).
        rows: what may be taken of n.
        columns: what may be taken of m.
        chosen_columns: positions to start from.
        chosen_rows: if given, rows to start from as well.
    """
    pick = rows.take(matrix[:, chosen_columns].sum(axis=1))
    if chosen_rows is None or _sum(matrix, pick, chosen_columns) > _sum(matrix, chosen_rows, chosen_columns):
        chosen_rows = pick
    total = _sum(matrix, chosen_rows, chosen_columns)
    history = [total]
    least = 1e-12 * float(np.abs(matrix).sum())
    while True:
        before = total
        pick = columns.take(matrix[chosen_rows].sum(axis=0))
        if _sum(matrix, chosen_rows, pick) > total + least:
            chosen_columns, total = pick, _sum(matrix, chosen_rows, pick)
            history.append(total)
        pick = rows.take(matrix[:, chosen_columns].sum(axis=1))
        if _sum(matrix, pick, chosen_columns) > total + least:
            chosen_rows, total = pick, _sum(matrix, pick, chosen_columns)
            history.append(total)
        if total == before:
            return Pair(np.sort(chosen_rows), np.sort(chosen_columns), total, tuple(history))


def best_pairs(matrix: np.ndarray, rows: Side, columns: Side, starts: int = 8, seed: int = 0) -> dict[str, Pair]:
    """Where the alternation settles from each start, by its name; the first of the largest total is the best found.

    The starts are the separate choice, of the rows and of the columns that hold most by themselves (so that no result is
    worse than that), the columns in which the leading singular vectors are largest or smallest, and random columns.

    Raises:
        BlueprintError: for a negative number of random starts.
    """
    if starts < 0:
        raise BlueprintError(f"starts={starts}: give 0 or more random starts.")
    found = {"separate": settle(matrix, rows, columns, *separately(matrix, rows, columns)[::-1])}
    for number, vector in enumerate(_leading_columns(matrix), start=1):
        for sign, values in (("+", vector), ("-", -vector)):
            found[f"component {sign}{number}"] = settle(matrix, rows, columns, columns.take(values))
    rng = np.random.default_rng(seed)
    for number in range(1, starts + 1):
        found[f"random {number}"] = settle(
            matrix, rows, columns, columns.take(rng.permutation(matrix.shape[1]).astype(float))
        )
    return found


def separately(matrix: np.ndarray, rows: Side, columns: Side) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the largest sums, and the columns of the largest sums, each chosen without regard to the other."""
    return rows.take(matrix.sum(axis=1)), columns.take(matrix.sum(axis=0))


def upper_bound(matrix: np.ndarray, rows: Side, columns: Side) -> float:
    """A total that no pair passes: the best rows if each could have columns of its own, or the other way round."""
    by_rows = rows.most(columns.most(matrix)[None])
    by_columns = columns.most(rows.most(matrix.T)[None])
    return min(float(by_rows[0]), float(by_columns[0]))


def exponent(scores: np.ndarray, costs: ArrayLike | None = None) -> float:
    """The exponent γ of the share that the top k of some scores hold, ≈ k^γ (eq. 35), fitted to the measured curve.

    The top are the largest per cost, and k is then the share of the cost. Without costs the curve is that of
    `tails.retained_mass_curve`. Fractions below one element are left out. Where scores are negative the curve rises
    above 1, and the exponent says less.

    Raises:
        BlueprintError: if the scores do not have a positive sum.
    """
    prices = np.ones(len(scores)) if costs is None else np.asarray(costs, dtype=float)
    total = scores.sum()
    if not total > 0:
        raise BlueprintError(
            f"The scores sum to {total:.3g}, so that no share of them can be retained. Check the data."
        )
    order = np.argsort(-scores / prices, kind="stable")
    mass = np.concatenate([[0.0], np.cumsum(scores[order])]) / total
    spent = np.concatenate([[0.0], np.cumsum(prices[order])]) / prices.sum()
    fractions = [k for k in FRACTIONS if k * len(scores) >= 1]
    return fit_gamma(fractions, np.interp(fractions, spent, mass))[0]


def require_share(name: str, value: float) -> None:
    """Raise BlueprintError for what is no share in (0, 1]."""
    if not 0 < value <= 1:
        raise BlueprintError(f"{name}={value} is not a share: give a number above 0 and at most 1.")


def _sum(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    return float(matrix[np.ix_(rows, columns)].sum())


def _leading_columns(matrix: np.ndarray) -> list[np.ndarray]:
    """The leading right singular vectors (m,), from the smaller of the two matrices of inner products."""
    if matrix.shape[0] <= matrix.shape[1]:
        vectors = matrix.T @ np.linalg.eigh(matrix @ matrix.T).eigenvectors[:, ::-1][:, :LEADING]
    else:
        vectors = np.linalg.eigh(matrix.T @ matrix).eigenvectors[:, ::-1][:, :LEADING]
    return list(vectors.T)
