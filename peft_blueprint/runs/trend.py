"""How fast a noisy curve rises over its last evaluations, and how sure that is: robust noise, slope, standard error.

Plain numbers in, plain numbers out; knows nothing of training, of what the numbers mean, or of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


Array = npt.NDArray[np.float64]

RECENT = 10  # evaluations that noise is estimated from, where a window has fewer: early ones are steep, and mislead
# Quantiles of Student's t at 90 % for 1, 2, ... degrees of freedom (its table in any textbook); 1.2816 without end.
_T90 = (3.0777, 1.8856, 1.6377, 1.5332, 1.4759, 1.4398, 1.4149, 1.3968, 1.3830, 1.3722)
_NORMAL90 = 1.2816


class Trend(NamedTuple):
    """A curve's rise over a window.

    Args:
        points: how many evaluations the window has.
        slope: rise per unit of x, by least squares: the mean of the ratios dy/dx of all pairs in the window, weighted
            by dx squared.
        error: its standard error.
        margin: half of its two-sided 80 % interval; nine times in ten the slope is below `slope + margin`.
        noise: standard deviation of one evaluation.
    """

    points: int
    slope: float
    error: float
    margin: float
    noise: float


def noise(x: Array, y: Array) -> tuple[float, float]:
    """The standard deviation of a curve's noise, with the degrees of freedom it is known by.

    From how far every point is off the line between its neighbours, so that a trend does not count as noise; 1.4826
    times the median of that, so that a jump does not either (Hampel, 1974). Where the curve bends between neighbours it
    is too large.

    Args:
        x: (n,), rising.
        y: (n,).

    Returns:
        (0, 1) for fewer than three points.
    """
    if len(x) < 3:
        return 0.0, 1.0
    share = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    off = y[1:-1] - ((1 - share) * y[:-2] + share * y[2:])
    scaled = np.abs(off) / np.sqrt(1 + (1 - share) ** 2 + share**2)
    # a median knows about a third as much as a standard deviation would, and neighbours share points
    return float(1.4826 * np.median(scaled)), max(1.0, len(scaled) / 3)


def trend(x: Sequence[float], y: Sequence[float], points: int) -> Trend:
    """The rise over the last so many points.

    The noise is the larger of two estimates: `noise` of the last `RECENT` points or more, and the scatter around the
    window's own line, which also sees slow wandering, and lines that do not fit.

    Args:
        x: rising, at least three.
        y: as many.
        points: of the window, from 3.
    """
    recent = max(points, RECENT)
    sigma, freedom = noise(np.array(x[-recent:]), np.array(y[-recent:]))
    xs, ys = np.array(x[-points:]), np.array(y[-points:])
    dx = xs - xs.mean()
    spread = float(dx @ dx)
    slope = float(dx @ (ys - ys.mean())) / spread
    off = ys - ys.mean() - slope * dx
    sigma = max(sigma, float(off @ off / (points - 2)) ** 0.5)
    error = sigma / spread**0.5
    return Trend(points, slope, error, error * _t90(max(freedom, points - 2)), sigma)


def windows(shortest: int, available: int) -> list[int]:
    """Window lengths to try: from the shortest, each half as long again, to all there are."""
    lengths, length = [], shortest
    while length < available:
        lengths.append(length)
        length += max(1, length // 2)
    return [*lengths, available]


def _t90(freedom: float) -> float:
    return float(np.interp(freedom, [*range(1, len(_T90) + 1), 60.0], [*_T90, _NORMAL90]))
