"""Decide between two arms of a study: intervals, equivalence, looks at a study that grows, several statements at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


LEVEL = 0.05  # probability of a wrong statement, over all looks and statements of a study
MARGIN = 0.003  # relative difference below which two losses count as equal


@dataclass(frozen=True)
class Effect:
    """A relative difference of two arms' losses, paired by seed.

    Args:
        mean: of the differences over the reference's mean loss; negative where the arm is lower.
        error: its standard error.
        seeds: pairs.

    Example:
        >>> effect = Effect(mean=-0.002, error=0.0005, seeds=20)
        >>> [round(end, 4) for end in effect.interval()], effect.p_equal(0.003) < 0.05 < effect.p_equal(0.0025)
        ([-0.003, -0.001], True)
    """

    mean: float
    error: float
    seeds: int

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the ends of the interval that misses with probability `level`; infinite with one seed."""
        reach = float(stats.t.isf(level / 2, self.seeds - 1)) * self.error if self.seeds > 1 else math.inf
        return self.mean - reach, self.mean + reach

    @property
    def p_differs(self) -> float:
        """P-value of a t-test that both are equal."""
        return 2 * self._tail(abs(self.mean))

    def p_equal(self, margin: float = MARGIN) -> float:
        """P-value of two one-sided t-tests that they are `margin` or more apart (Schuirmann 1987)."""
        return self._tail(margin - abs(self.mean))

    def _tail(self, distance: float) -> float:
        return float(stats.t.sf(distance / self.error, self.seeds - 1)) if self.seeds > 1 and self.error else 1.0


def relative_difference(mine: Sequence[float], others: Sequence[float]) -> str:
    """Format the relative difference of two arms' losses, paired by seed, with its 95 % interval.

    Example:
        >>> relative_difference([1.01, 1.02, 1.03], [1.0, 1.0, 1.0])
        '+2.00% [-0.48%, +4.48%]'
    """
    if len(mine) < 2:
        return "–"
    apart = [(a - b) * len(others) / sum(others) for a, b in zip(mine, others, strict=True)]
    effect = Effect(float(np.mean(apart)), float(np.std(apart, ddof=1)) / len(apart) ** 0.5, len(apart))
    low, high = effect.interval()
    return f"{effect.mean:+.2%} [{low:+.2%}, {high:+.2%}]"


def effect_of(
    apart: Sequence[Sequence[float]], weights: Sequence[Sequence[float]], reference: Sequence[float], pool: int
) -> Effect:
    """Estimate a relative difference from the differences of every seed's examples.

    The error over seeds holds what training, training examples and the seeds' own test examples add. Test examples are
    drawn from a pool that all seeds share; the pool's own error is bounded from above by the spread of the differences
    over examples.

    Args:
        apart: differences, (seeds, examples).
        weights: target tokens, (seeds, examples).
        reference: the reference's mean losses, (seeds,).
        pool: examples that tests are drawn from.
    """
    means = [float(np.average(one, weights=w)) for one, w in zip(apart, weights, strict=True)]
    spreads = [np.var(np.multiply(one, w) / np.mean(w)) for one, w in zip(apart, weights, strict=True)]
    over_seeds = np.var(means, ddof=1) / len(means) if len(means) > 1 else 0.0
    scale = float(np.mean(reference))
    return Effect(
        float(np.mean(means)) / scale, math.sqrt(over_seeds + float(np.mean(spreads)) / pool) / scale, len(means)
    )


def spent(fraction: float, level: float = LEVEL) -> float:
    """Return the error probability that may be spent by a look after a fraction of the seeds.

    O'Brien and Fleming's bounds as Lan and DeMets (1983) spend them: 2 − 2Φ(z(level / 2) / √fraction).

    Example:
        >>> [round(spent(part), 5) for part in (0.25, 0.5, 1.0)]
        [9e-05, 0.00557, 0.05]
    """
    return float(2 * stats.norm.sf(stats.norm.isf(level / 2) / math.sqrt(fraction)))


def levels(looks: Sequence[int], level: float = LEVEL) -> dict[int, float]:
    """Return the level at every look, given by its number of seeds; they add up to at most `level`.

    Each look gets the level spent since the one before, which is a little strict because looks overlap.

    Example:
        >>> {seeds: round(one, 5) for seeds, one in levels([8, 16, 32]).items()}
        {8: 9e-05, 16: 0.00549, 32: 0.04443}
    """
    ends = [0.0, *(spent(look / looks[-1], level) for look in looks)]
    return {look: end - start for look, (start, end) in zip(looks, itertools.pairwise(ends), strict=True)}


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of statements made together (Holm 1979).

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, least = [1.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - place) * p_values[i]))
        adjusted[i] = least
    return adjusted
