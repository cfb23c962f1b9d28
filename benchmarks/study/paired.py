"""Losses of a summary compared as pairs, by seed and held-out example, with what varies kept apart.

Knows the summary's rows. Says nothing about them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


Row = Mapping[str, Any]

ENOUGH = 2.0  # standard errors


@dataclass(frozen=True)
class Difference:
    """Of two losses, paired by seed and held-out example.

    Args:
        mean: negative where the first is lower.
        over_draws: standard error over what it is compared with; None with one draw.
        over_seeds: standard error; None with one seed.
        over_examples: standard error; None with one example.
        seeds: that both have.
        draws: of a random rule, or 1.
    """

    mean: float
    over_draws: float | None
    over_seeds: float | None
    over_examples: float | None
    seeds: int
    draws: int

    @property
    def error(self) -> float:
        """Of all that varies."""
        return math.hypot(*(part or 0.0 for part in (self.over_draws, self.over_seeds, self.over_examples)))

    @property
    def is_clear(self) -> bool:
        """Whether it is at least so many standard errors from nought; with one seed nothing is."""
        return self.seeds > 1 and self.mean != 0 and abs(self.mean) >= ENOUGH * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f}"


def difference(summary: Mapping[str, Any], row: Row, others: Sequence[Row]) -> Difference | None:
    """A row's loss less another's, or less the mean of several draws of a random rule, each over the seeds that it
    shares with the row; None where no seed is shared.
    """
    counts = np.array(summary["counts"], dtype=float)
    weights = counts / counts.mean()
    by_draw = [
        {
            seed: weights * (np.array(own["losses"]) - np.array(other["seeds"][seed]["losses"]))
            for seed, own in row["seeds"].items()
            if seed in other["seeds"]
        }
        for other in others
    ]
    by_draw = [draw for draw in by_draw if draw]
    if not by_draw:
        return None
    of_draws = [np.mean(list(draw.values()), axis=0) for draw in by_draw]
    seeds = sorted({seed for draw in by_draw for seed in draw})
    of_seeds = [statistics.mean(float(draw[seed].mean()) for draw in by_draw if seed in draw) for seed in seeds]
    means = [float(draw.mean()) for draw in of_draws]
    of_examples = [float(one) for one in np.mean(of_draws, axis=0)]
    return Difference(
        mean=statistics.mean(means),
        over_draws=_error(means),
        over_seeds=_error(of_seeds),
        over_examples=_error(of_examples),
        seeds=len(seeds),
        draws=len(by_draw),
    )


def loss_of(row: Row) -> float:
    """Mean over seeds."""
    return statistics.mean(one["loss"] for one in row["seeds"].values())


def done(summary: Mapping[str, Any]) -> list[Row]:
    """Rows with a loss."""
    return [row for row in summary["rows"] if row["seeds"]]


def reference_of(summary: Mapping[str, Any]) -> Row | None:
    """The row that others are compared with."""
    return next((row for row in done(summary) if row["label"] == summary["reference"]), None)


def paired_loss(summary: Mapping[str, Any], row: Row) -> float:
    """The reference's mean loss and a row's difference from it, so that rows of one seed and of several compare."""
    reference = reference_of(summary)
    apart = reference and difference(summary, row, [reference])
    return loss_of(reference) + apart.mean if reference and apart else loss_of(row)


def _error(values: Sequence[float]) -> float | None:
    """The mean's."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
