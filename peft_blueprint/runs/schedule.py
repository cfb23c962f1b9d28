"""What a learning rate is doing, told from the rates themselves, and how much of a decaying schedule would have done.

Plain numbers in, plain numbers out; knows nothing of training loops, or of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from .trend import Array


Phase = Literal["rising", "steady", "falling", "unknown"]

_SAME = 1e-6  # relative: constant schedules give the same number at every step
_MOST = 0.9  # a share beyond which a shorter schedule is not worth proposing
_CLEAR = 2.0  # standard deviations by which a mean of three is past its best
_NEARLY = 2.7  # by how much, in variances of an evaluation, a fit may be worse than the best: 90 % of one parameter


class Shorter(NamedTuple):
    """A shorter schedule of the same shape that would do.

    Args:
        share: of the whole schedule.
        lowest: the least that fits what was seen.
        highest: the most.
    """

    share: float
    lowest: float
    highest: float


def phase(rates: Sequence[float | None]) -> Phase:
    """What the learning rate did over these evaluations: rose to the last, stayed, or has fallen from its highest."""
    known = [rate for rate in rates if rate is not None]
    if not known or rates[-1] is None:
        return "unknown"
    if known[-1] < max(known) * (1 - _SAME):
        return "falling"
    return "rising" if known[-1] > min(known) * (1 + _SAME) else "steady"


def spent_rate(progress: Array, rates: Array) -> tuple[Array, float]:
    """The learning rate spent so far, the area under its curve, at every evaluation, and what is still to come.

    Before the first evaluation the first rate is taken. What is to come is read off the shape since the highest rate:
    half a cosine or a straight line to nought at the end, whichever fits; where neither does, the straight line from
    the present rate.

    Args:
        progress: (n,), shares of the planned steps, rising.
        rates: (n,), none negative.

    Returns:
        The areas (n,), and the area from the last evaluation to the end.
    """
    pieces = np.diff(progress) * (rates[1:] + rates[:-1]) / 2
    areas = np.concatenate([[0.0], np.cumsum(pieces)]) + progress[0] * rates[0]
    left = max(0.0, 1 - float(progress[-1]))
    top = len(rates) - 1 - int(np.argmax(rates[::-1]))
    since = (progress[top:] - progress[top]) / max(1 - progress[top], 1e-12)
    share = rates[top:] / max(float(rates[top]), 1e-300)
    off_cosine = float(np.abs(share - (1 + np.cos(np.pi * since)) / 2).max())
    off_line = float(np.abs(share - (1 - since)).max())
    if off_cosine < min(off_line, 0.05):
        end = float(since[-1])
        rest = (1 - end) / 2 - np.sin(np.pi * end) / (2 * np.pi)
        return areas, float(max(0.0, rest) * rates[top] * (1 - progress[top]))
    return areas, float(rates[-1]) * left / 2


def shorter(
    progress: Sequence[float],
    rates: Sequence[float],
    gains: Sequence[float],
    *,
    judged_by: int,
    tolerance: float,
    noise: float,
) -> Shorter | None:
    """How much of a decaying schedule would have brought the metric to within a tolerance of where it is going.

    Two things raise a metric: what is learnt, which follows the sum of the learning rates, the area A under their curve
    up to here, and the fall of the rate itself, which quiets the weights (Tissue, Wang and Wang, 2024, whose law has a
    term for each). So `gain = a - b f(A) - c rate` is fitted to what was seen since the highest rate, for each of many
    falling shapes f, powers and exponentials. A schedule of the same shape and a share s of the steps ends at the same
    rate with an area s times the whole, and so loses b (f(s A) - f(A)); the share is the least at which that is the
    tolerance. Shapes that fit nearly as well as the best make the interval, and the most cautious of them the answer: the
    part of a curve that is still to come is not seen, and a plateau at a high rate hides slow learning. Where the metric
    is already past its best, the area at its best is what would do.

    Args:
        progress: (n,), shares of the planned steps, rising.
        rates: (n,), learning rates.
        gains: (n,), the metric, higher is better.
        judged_by: evaluations since the highest rate that a flat curve takes to be told; no share below theirs is given,
            since the curve says nothing of schedules over which it was not seen to be flat.
        tolerance: how much less would do.
        noise: standard deviation of one evaluation.

    Returns:
        None for fewer than six evaluations since the highest rate, or if more than 90 % of the schedule is needed.
    """
    at, values, rate = np.array(progress), np.array(gains), np.array(rates)
    areas, rest = spent_rate(at, rate)
    whole = float(areas[-1]) + rest
    top = len(rate) - 1 - int(np.argmax(rate[::-1]))
    if len(values) - top < 6 or whole <= 0:
        return None
    least = float(at[min(top + judged_by, len(at)) - 1])
    area, height, y = areas[top:] / whole, rate[top:] / rate[top], values[top:]
    smooth = np.convolve(y, np.ones(3) / 3, "valid")  # of points 1 to n - 2
    best = int(np.argmax(smooth))
    if smooth[best] - smooth[-1] > max(tolerance, noise * _CLEAR):
        reached = np.flatnonzero(smooth >= smooth[best] - min(tolerance, noise))
        low, high = float(area[1 + reached[0]]), float(area[1 + reached[-1]])
        return _worth_while(least, float(area[1 + best]), low, high)
    fits = [_share(area, height, y, shape, tolerance) for shape in _SHAPES]
    smallest = min(off for off, _ in fits)
    allowed = smallest + max(noise**2 * _NEARLY, smallest * _NEARLY / (len(y) - 3))
    shares = [share for off, share in fits if off <= allowed]
    return _worth_while(least, max(shares), min(shares), max(shares))


def _worth_while(least: float, share: float, lowest: float, highest: float) -> Shorter | None:
    return Shorter(*(max(least, value) for value in (share, lowest, highest))) if max(least, share) <= _MOST else None


def _power(area: Array, exponent: float, offset: float) -> Array:
    return (area + offset) ** -exponent


def _exponential(area: Array, length: float) -> Array:
    return np.exp(-area / length)


_SHAPES = (
    *(partial(_power, exponent=e, offset=o) for e in (0.1, 0.3, 0.6, 1.0, 2.0) for o in (0.003, 0.03)),
    *(partial(_exponential, length=length) for length in (0.02, 0.04, 0.08, 0.15, 0.3, 0.6)),
)


def _share(
    area: Array, height: Array, y: Array, shape: Callable[[Array], Array], tolerance: float
) -> tuple[float, float]:
    """Squared residuals of a shape's fit, neither term of which may lower the metric, and the share it says would do."""
    falls = shape(area)
    best = None
    for columns in ((falls, height), (falls,), (height,), ()):
        design = np.stack([np.ones_like(y), *columns], axis=1)
        weights = np.linalg.lstsq(design, y, rcond=None)[0]
        off = float(((y - design @ weights) ** 2).sum())
        if (weights[1:] <= 0).all() and (best is None or off < best[0]):
            best = off, -float(weights[1]) if columns and columns[0] is falls else 0.0
    assert best is not None  # the last has no term to be refused
    shares = np.linspace(0.02, 1, 99)
    lost = best[1] * (shape(shares) - shape(np.ones(1)))
    return best[0], float(shares[int(np.argmax(lost <= tolerance))])
