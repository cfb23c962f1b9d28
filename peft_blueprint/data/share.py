"""Find the share of the data whose training gives the most gain per cost: q* of eq. 30 and 31."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..blueprint import best_prefix
from ..errors import BlueprintError
from .cross_influence import fit_exponent


@dataclass(frozen=True)
class DataShare:
    """The best share of scored data.

    Args:
        q: share of the examples, (0, 1].
        count: number of them.
        gain: share of the summed scores that they hold, Δ_q/Δ_full.
        ratio: gain per cost over that of training on all of them without scoring; below 1 scoring cost more than it saves.
        delta: exponent δ of q^δ, fitted to the curve of retained scores (eq. 29); None for a single example.
        scoring_cost: of an example, over that of training on it for one epoch.
        epochs: passes of training over the chosen data.

    Example:
        >>> DataShare(q=1.0, count=4, gain=1.0, ratio=1.0, delta=0.5, scoring_cost=0.3, epochs=1).notes()
        ['gain per cost rises up to all of the data: it has no interior optimum (eq. 31), so all are chosen']
    """

    q: float
    count: int
    gain: float
    ratio: float
    delta: float | None
    scoring_cost: float
    epochs: int

    def notes(self) -> list[str]:
        """Say in words where the optimum is not in the interior, or does not pay for the scores."""
        found = []
        if self.q == 1:
            found.append(
                "gain per cost rises up to all of the data: it has no interior optimum (eq. 31), so all are chosen"
            )
        if self.ratio < 1:
            found.append(
                f"scoring cost more than it saves: the choice has {self.ratio:.2f} times the gain per cost of training on "
                "all of the data without scores"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-compatible data."""
        return asdict(self)


def best_data_share(scores: ArrayLike, scoring_cost: float, epochs: int = 1) -> DataShare:
    """Find q* on the measured curve of retained scores: the most gain per cost of scoring all and training on some.

    Maximizes (share of the summed scores) / (scoring + epochs·q). Negative scores, of examples that a target's gradient
    points away from, count as zero.

    Args:
        scores: (examples,) such as gradient norms J(z) (eq. 27).
        scoring_cost: of an example, over that of training on it for one epoch.
        epochs: of training.

    Raises:
        BlueprintError: for scores that are not finite or not positive anywhere, a cost that is not positive, or no epoch.

    Example:
        >>> best = best_data_share([8.0, 4.0, 1.0, 1.0, 1.0, 1.0], scoring_cost=0.3)
        >>> best.count, best.gain, round(best.ratio, 2)
        (2, 0.75, 1.18)
    """
    if epochs < 1:
        raise BlueprintError(f"epochs must be at least 1, got {epochs}.")
    values = np.asarray(scores, dtype=float).clip(min=0)
    best = best_prefix(values, scoring_cost, float(epochs))
    return DataShare(
        q=best.items,
        count=round(best.items * values.size),
        gain=best.gain,
        ratio=best.gain * epochs / (scoring_cost + epochs * best.items),
        delta=fit_exponent(values) if values.size > 1 else None,
        scoring_cost=scoring_cost,
        epochs=epochs,
    )
