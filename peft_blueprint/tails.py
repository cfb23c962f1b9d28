"""How concentrated a set of gradient norms is: the retained-mass curve and exponents fitted to it, with their errors.

Works on plain arrays of norms; knows nothing of where they come from.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .errors import BlueprintError


FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

_SMALLEST_TAIL = 8


@dataclass(frozen=True)
class Fit:
    """An estimated exponent, its standard error, and how many values it rests on."""

    exponent: float
    error: float
    n: int


def fit_rank_exponent(norms: ArrayLike, tail_share: float = 0.5) -> Fit | None:
    """The exponent α of the rank-size law norm_(r) ≈ C·r^−α (eq. 1), over the largest values.

    By regression of log(rank − ½) on log(norm), whose slope is −1/α, with the relative standard error √(2/n) (Gabaix
    and Ibragimov 2011, doi:10.1198/jbes.2009.06157). A good fit is no evidence of a power law: a lognormal looks
    alike.

    Args:
        norms: (n,) values; those that are not positive are left out.
        tail_share: share of the values, from the largest, that the fit is over.

    Returns:
        The fit, or None where fewer than 8 values remain or all are equal.
    """
    values = np.sort(np.asarray(norms, dtype=float))[::-1]
    values = values[values > 0]
    values = values[: max(_SMALLEST_TAIL, round(tail_share * len(values)))]
    if len(values) < _SMALLEST_TAIL or values[0] == values[-1]:
        return None
    slope = np.polyfit(np.log(values), np.log(np.arange(1, len(values) + 1) - 0.5), 1)[0]
    exponent = float(-1 / slope)
    return Fit(exponent, exponent * (2 / len(values)) ** 0.5, len(values))


def retained_mass_curve(norms: ArrayLike, fractions: ArrayLike = FRACTIONS) -> list[float]:
    """Share of the summed norm that the top fraction of the values holds, for each fraction; measured, not modelled.

    Between whole numbers of values the curve is linear.

    Raises:
        BlueprintError: if all norms are zero.
    """
    values = np.sort(np.asarray(norms, dtype=float))[::-1]
    total = values.sum()
    if not total > 0:
        raise BlueprintError("All gradient norms are zero, so that no share of them can be retained. Check the data.")
    mass = np.concatenate([[0.0], np.cumsum(values)]) / total
    points = np.asarray(fractions, dtype=float) * len(values)
    return [float(share) for share in np.interp(points, np.arange(len(values) + 1), mass)]


def fit_gamma(fractions: ArrayLike, mass: ArrayLike) -> tuple[float, float]:
    """The exponent γ of mass ≈ k^γ, by least squares in logarithms through (1, 1), and the root mean square residual.

    The residual is in natural logarithms of the mass: 0.1 means that k^γ is off by about 10 %.

    Raises:
        BlueprintError: without a fraction below 1, which any exponent fits.
    """
    log_k, log_mass = (np.log(np.asarray(values, dtype=float)) for values in (fractions, mass))
    if not log_k.any():
        raise BlueprintError("gamma cannot be fitted without a fraction below 1. Measure more than one submodule.")
    gamma = float((log_k * log_mass).sum() / (log_k**2).sum())
    return gamma, float(np.sqrt(np.mean((log_mass - gamma * log_k) ** 2)))
