"""Statistics of a noisy learning curve: its slope and noise, and how much of its schedule would have been enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit


Array = npt.NDArray[np.float64]
Phase = Literal["rising", "steady", "falling", "unknown"]

RECENT = 10  # evaluations that noise is estimated from if the window has fewer: early ones are too steep

_SAME = 1e-6  # relative difference below which learning rates are equal
_LARGEST_SHARE = 0.9  # of a schedule; a longer one is not worth proposing
_CLEAR = 2.0  # standard deviations by which a mean of three evaluations is past its best
_NEARLY = 2.7  # variances of an evaluation by which a fit may be worse than the best: 90 % for one parameter


class Trend(NamedTuple):
    """Rise of a curve over a window.

    Args:
        points: number of evaluations in the window.
        slope: rise per unit of x, by least squares.
        error: standard error of the slope.
        margin: half of the slope's two-sided 80 % interval; the slope is below `slope + margin` with 90 % confidence.
        noise: standard deviation of one evaluation.
    """

    points: int
    slope: float
    error: float
    margin: float
    noise: float


class Shorter(NamedTuple):
    """A shorter schedule of the same shape that would have been enough.

    Args:
        share: of the whole schedule.
        lowest: smallest share that fits the curve.
        highest: largest share that fits the curve.
    """

    share: float
    lowest: float
    highest: float


def noise(x: Array, y: Array) -> tuple[float, float]:
    """Estimate the standard deviation of a curve's noise.

    The estimate is 1.4826 times the median distance of each point from the line between its neighbours (Hampel, 1974),
    so neither a trend nor a jump counts as noise. It is too large where the curve bends between neighbours.

    Args:
        x: (n,), rising.
        y: (n,).

    Returns:
        The standard deviation and its degrees of freedom; (0, 1) for fewer than three points.
    """
    if len(x) < 3:
        return 0.0, 1.0
    share = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    off = y[1:-1] - ((1 - share) * y[:-2] + share * y[2:])
    scaled = np.abs(off) / np.sqrt(1 + (1 - share) ** 2 + share**2)
    # a median is worth about a third of the observations, and neighbours share points
    return float(1.4826 * np.median(scaled)), max(1.0, len(scaled) / 3)


def trend(x: Sequence[float], y: Sequence[float], points: int) -> Trend:
    """Estimate the rise over the last `points` evaluations.

    The noise is the larger of two estimates: `noise` of the last `RECENT` points or more, and the scatter around the
    line through the window, which also sees slow wandering and curvature.

    Args:
        x: (n,), rising, n ≥ 3.
        y: (n,).
        points: length of the window, at least 3.

    Example:
        >>> found = trend([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0], 4)
        >>> round(found.slope, 6), round(found.error, 6)
        (2.0, 0.0)
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
    return Trend(points, slope, error, error * float(stdtrit(max(freedom, points - 2), 0.9)), sigma)


def windows(shortest: int, available: int) -> list[int]:
    """Return window lengths to try: from the shortest, each half as long again, up to all evaluations."""
    lengths, length = [], shortest
    while length < available:
        lengths.append(length)
        length += max(1, length // 2)
    return [*lengths, available]


def phase(rates: Sequence[float | None]) -> Phase:
    """Classify the learning rate over these evaluations: rising to the last, steady, or past its highest."""
    known = [rate for rate in rates if rate is not None]
    if not known or rates[-1] is None:
        return "unknown"
    if known[-1] < max(known) * (1 - _SAME):
        return "falling"
    return "rising" if known[-1] > min(known) * (1 + _SAME) else "steady"


def spent_rate(progress: Array, rates: Array) -> tuple[Array, float]:
    """Integrate the learning rate up to each evaluation, and from the last one to the end of the schedule.

    The rest is extrapolated from the shape since the highest rate: half a cosine or a straight line to zero, whichever
    fits; otherwise a straight line from the present rate. Before the first evaluation the first rate is assumed.

    Args:
        progress: (n,), shares of the planned steps, rising.
        rates: (n,), at least 0.

    Returns:
        The areas, (n,), and the remaining area.
    """
    pieces = np.diff(progress) * (rates[1:] + rates[:-1]) / 2
    areas = np.concatenate([[0.0], np.cumsum(pieces)]) + progress[0] * rates[0]
    top = _last_highest(rates)
    since = (progress[top:] - progress[top]) / max(1 - progress[top], 1e-12)
    share = rates[top:] / max(float(rates[top]), 1e-300)
    off_cosine = float(np.abs(share - (1 + np.cos(np.pi * since)) / 2).max())
    off_line = float(np.abs(share - (1 - since)).max())
    if off_cosine < min(off_line, 0.05):
        end = float(since[-1])
        rest = (1 - end) / 2 - np.sin(np.pi * end) / (2 * np.pi)
        return areas, float(max(0.0, rest) * rates[top] * (1 - progress[top]))
    return areas, float(rates[-1]) * max(0.0, 1 - float(progress[-1])) / 2


def shorter(
    progress: Sequence[float],
    rates: Sequence[float],
    gains: Sequence[float],
    *,
    judged_by: int,
    tolerance: float,
    noise: float,
) -> Shorter | None:
    """Estimate how much of a decaying schedule brings the metric within a tolerance of its final value.

    Two terms raise a metric (Tissue, Wang and Wang, 2024, arXiv:2408.11029): learning, which follows the area A under
    the learning rate, and the decay of the rate itself. `gain = a - b f(A) - c rate` is fitted to the evaluations since
    the highest rate, for many falling shapes f (powers and exponentials). A schedule of the same shape with a share s
    of the steps ends at the same rate with an area s A, and so loses b (f(s A) - f(A)). The share is the smallest for
    which that is within the tolerance. Shapes that fit nearly as well as the best give the interval, and the most
    cautious one the answer, because a plateau at a high rate hides slow learning. If the metric is already past its
    best, the area at its best is taken.

    Args:
        progress: (n,), shares of the planned steps, rising.
        rates: (n,), learning rates.
        gains: (n,), the metric, higher is better.
        judged_by: number of evaluations since the highest rate needed to recognize a flat curve; no smaller share than
            theirs is returned.
        tolerance: acceptable loss of the metric.
        noise: standard deviation of one evaluation.

    Returns:
        None for fewer than six evaluations since the highest rate, or if more than 90 % of the schedule is needed.
    """
    at, values, rate = np.array(progress), np.array(gains), np.array(rates)
    areas, rest = spent_rate(at, rate)
    whole = float(areas[-1]) + rest
    top = _last_highest(rate)
    if len(values) - top < 6 or whole <= 0:
        return None
    least = float(at[min(top + judged_by, len(at)) - 1])
    area, height, y = areas[top:] / whole, rate[top:] / rate[top], values[top:]
    smooth = np.convolve(y, np.ones(3) / 3, "valid")  # of points 1 to n - 2
    best = int(np.argmax(smooth))
    if smooth[best] - smooth[-1] > max(tolerance, noise * _CLEAR):
        reached = np.flatnonzero(smooth >= smooth[best] - min(tolerance, noise))
        found = (float(area[1 + i]) for i in (best, reached[0], reached[-1]))
    else:
        fits = [_fitted_share(area, height, y, shape, tolerance) for shape in _SHAPES]
        smallest = min(off for off, _ in fits)
        allowed = smallest + max(noise**2 * _NEARLY, smallest * _NEARLY / (len(y) - 3))
        shares = [share for off, share in fits if off <= allowed]
        found = (share for share in (max(shares), min(shares), max(shares)))
    result = Shorter(*(max(least, share) for share in found))
    return result if result.share <= _LARGEST_SHARE else None


def _last_highest(rates: Array) -> int:
    return len(rates) - 1 - int(np.argmax(rates[::-1]))


def _power(area: Array, exponent: float, offset: float) -> Array:
    return (area + offset) ** -exponent


def _exponential(area: Array, length: float) -> Array:
    return np.exp(-area / length)


_SHAPES = (
    *(partial(_power, exponent=e, offset=o) for e in (0.1, 0.3, 0.6, 1.0, 2.0) for o in (0.003, 0.03)),
    *(partial(_exponential, length=length) for length in (0.02, 0.04, 0.08, 0.15, 0.3, 0.6)),
)


def _fitted_share(
    area: Array, height: Array, y: Array, shape: Callable[[Array], Array], tolerance: float
) -> tuple[float, float]:
    """Return the squared residuals of a fit whose terms only lower the metric, and the share of the schedule."""
    falls = shape(area)
    best = None
    for columns in ((falls, height), (falls,), (height,), ()):
        design = np.stack([np.ones_like(y), *columns], axis=1)
        weights = np.linalg.lstsq(design, y, rcond=None)[0]
        off = float(((y - design @ weights) ** 2).sum())
        if (weights[1:] <= 0).all() and (best is None or off < best[0]):
            best = off, -float(weights[1]) if columns and columns[0] is falls else 0.0
    assert best is not None  # the last fit has no term to reject
    shares = np.linspace(0.02, 1, 99)
    lost = best[1] * (shape(shares) - shape(np.ones(1)))
    return best[0], float(shares[int(np.argmax(lost <= tolerance))])
