"""What a summary says: paired differences with standard errors, the time to reach a loss, and a paragraph in plain words.

Pure functions of the summary's JSON, so that no sentence can disagree with it. Knows nothing of how it came about.
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
WITHIN, OF_TIME = 0.005, 0.7  # the aim: this near to the reference's loss, in this share of its time


@dataclass(frozen=True)
class Difference:
    """Of two losses, paired by seed and held-out example.

    Args:
        mean: negative where the first is lower.
        over_seeds: standard error; None with one seed.
        over_examples: standard error.
        seeds: that both have.
    """

    mean: float
    over_seeds: float | None
    over_examples: float
    seeds: int

    @property
    def error(self) -> float:
        """The larger of the two standard errors."""
        return max(self.over_seeds or 0.0, self.over_examples)

    @property
    def is_clear(self) -> bool:
        """Whether it is at least so many standard errors from nought."""
        return self.mean != 0 and abs(self.mean) >= ENOUGH * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f}"


def difference(summary: Mapping[str, Any], row: Row, others: Sequence[Row]) -> Difference | None:
    """A row's loss less the mean of others', over the seeds that it and at least one of them have."""
    counts = np.array(summary["counts"], dtype=float)
    found = []
    for seed, own in row["seeds"].items():
        theirs = [other["seeds"][seed]["losses"] for other in others if seed in other["seeds"]]
        if theirs:
            found.append(np.array(own["losses"]) - np.mean(theirs, axis=0))
    if not found:
        return None
    weights = counts / counts.mean()
    means = [float((weights * one).mean()) for one in found]
    of_examples = weights * np.mean(found, axis=0)
    return Difference(
        statistics.mean(means),
        statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
        float(of_examples.std(ddof=1) / math.sqrt(len(of_examples))) if len(of_examples) > 1 else 0.0,
        len(means),
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


def is_random(row: Row) -> bool:
    """Whether a row is a random placement of the study's rank, or of all-linear's parameters, any draw."""
    return bool(row["arm"].startswith("random") and "raised" not in row["arm"] and "as many" not in row["arm"])


def random_rows(summary: Mapping[str, Any], budget: float | None) -> list[Row]:
    """Random placements at a budget; where there are none, at the largest."""
    found = [row for row in done(summary) if is_random(row)]
    if any(row["budget"] == budget for row in found):
        return [row for row in found if row["budget"] == budget]
    largest = max((row["budget"] for row in found if row["budget"] is not None), default=None)
    return [row for row in found if row["budget"] == largest]


def time_to_reach(summary: Mapping[str, Any], row: Row, loss: float) -> float | None:
    """Share of the reference's whole time in which a row's curve falls to a loss, what it was charged with counted; None
    if it does not. Between points of the curve in a straight line; both curves are of the few examples, first seed.
    """
    reference, steps = reference_of(summary), summary["facts"]["steps"]
    before = summary["untrained"]
    own = row["seeds"].get("0")
    if reference is None or own is None:
        return None
    points = [*([before["curve"][-1]] if before else []), *own["curve"]]
    for (a, high), (b, low) in zip(points, points[1:], strict=False):
        if low <= loss:
            at = a + (b - a) * ((high - loss) / (high - low) if high > low else 1.0)
            return float((row["charged_time"] + at * row["step_time"]) / (steps * reference["step_time"]))
    return None


def final_of_few(row: Row) -> float | None:
    """The last point of a row's curve, of the first seed."""
    own = row["seeds"].get("0")
    return own["curve"][-1][1] if own and own["curve"] else None


def paragraph(summary: Mapping[str, Any]) -> str:
    """What to use when, as far as the summary says."""
    reference = reference_of(summary)
    if reference is None:
        return f"{summary['reference']} has not run yet, so that there is nothing to compare with."
    said = [_of_budget(summary, budget, reference) for budget in _budgets(summary)]
    said += [_of_default(summary, reference), _advice(summary, reference), _caveats(summary)]
    return " ".join(filter(None, said))


def _budgets(summary: Mapping[str, Any]) -> list[float]:
    return sorted({row["budget"] for row in done(summary) if row["budget"] is not None}, reverse=True)


def _of_budget(summary: Mapping[str, Any], budget: float, reference: Row) -> str:
    """Which arm wins at a budget, and by how much."""
    rows = [row for row in done(summary) if row["budget"] == budget]
    against = {row["label"]: difference(summary, row, [reference]) for row in rows}
    rows = [row for row in rows if against[row["label"]] is not None]
    if not rows:
        return ""
    best = min(rows, key=lambda row: against[row["label"]].mean)  # type: ignore[union-attr]
    own = against[best["label"]]
    assert own is not None
    text = (
        f"At {budget:.0%} of all-linear's parameters, of {len(rows)} arms {best['label']} came out lowest: a held-out loss "
        f"of {loss_of(best):.4f}, {own} against {reference['label']}, {_clearly(own)}"
    )
    others = [row for row in random_rows(summary, budget) if row is not best]
    of_random = difference(summary, best, others) if others else None
    if of_random is not None:
        text += f", and {of_random} against the mean of {len(others)} random placements, {_clearly(of_random)}"
    return text + "."


def _of_default(summary: Mapping[str, Any], reference: Row) -> str:
    """Whether the library's default beats random placements, and reaches the aim."""
    row = next((row for row in done(summary) if row["label"] == summary["default"]), None)
    if row is None:
        return f"The default ({summary['default']}) has not run yet."
    text = f"The default ({row['label']})"
    others = random_rows(summary, row["budget"])
    of_random = difference(summary, row, others) if others else None
    if of_random is None:
        text += " has no random placement to be compared with"
    else:
        beats = of_random.mean < 0 and of_random.is_clear
        text += f" {'beats' if beats else 'does not beat'} random placements by two standard errors: {of_random}"
        text += (
            ""
            if row["budget"] == others[0]["budget"]
            else f" (theirs have {others[0]['budget']:.0%} of the parameters)"
        )
    own = difference(summary, row, [reference])
    if own is None:
        return text + "."
    above = own.mean / loss_of(reference)
    time = row["time"] / reference["time"]
    near, fast = above <= WITHIN, time <= OF_TIME
    text += (
        f". Its loss is {_percent(above)} {reference['label']}'s, in {time:.2f} of its predicted time with the measurement "
        f"counted ({row['step_time'] / reference['step_time']:.2f} where a blueprint is published with the model)"
    )
    if near and fast:
        return text + f": the aim, within {WITHIN:.1%} in {OF_TIME:g} of the time, is met."
    missed = [] if near else [f"the loss by {above - WITHIN:.1%}"]
    missed += [] if fast else [f"the time by {time - OF_TIME:.2f}"]
    return text + f": the aim, within {WITHIN:.1%} in {OF_TIME:g} of the time, is missed, {' and '.join(missed)}."


def _advice(summary: Mapping[str, Any], reference: Row) -> str:
    """The cheapest of those that cannot be told from the lowest."""
    rows = done(summary)
    against = {id(row): difference(summary, row, [reference]) for row in rows}
    rows = [row for row in rows if against[id(row)] is not None]
    lowest = min(rows, key=lambda row: against[id(row)].mean)  # type: ignore[union-attr]
    level = []
    for row in rows:
        apart = difference(summary, row, [lowest])
        if apart is not None and not (apart.is_clear and apart.mean > 0):
            level.append(row)
    fastest = min(level, key=lambda row: row["time"])
    smallest = min(level, key=lambda row: row["memory"])
    text = (
        f"What to use: {lowest['label']}{_at(lowest)} has the lowest loss of all; {len(level)} of {len(rows)} arms are not "
        f"clearly above it, of which {fastest['label']}{_at(fastest)} takes the least time "
        f"({fastest['time'] / reference['time']:.2f} of {reference['label']}'s)"
    )
    if smallest is fastest:
        return text + " and the least memory."
    return (
        text
        + f" and {smallest['label']}{_at(smallest)} the least memory ({smallest['memory'] / reference['memory']:.2f})."
    )


def _caveats(summary: Mapping[str, Any]) -> str:
    facts, rows = summary["facts"], done(summary)
    edges = [f"{row['label']}{_at(row)}" for row in rows if not row["is_inside"] and " #" not in row["label"]]
    text = (
        f"All of it on {facts['data']}, {facts['steps']} steps of {facts['batch']} examples of at most {facts['length']} "
        f"tokens, {facts['held_out']} held-out examples, by {max(len(row['seeds']) for row in rows)} seeds at most"
    )
    if edges:
        text += f"; {len(edges)} of {len(rows)} arms have not had a learning rate on both sides of their best"
    return text + "."


def _clearly(one: Difference) -> str:
    if one.is_clear:
        return f"{'better' if one.mean < 0 else 'worse'} by two standard errors"
    return "within two standard errors"


def _percent(above: float) -> str:
    return f"{abs(above):.1%} {'above' if above > 0 else 'below'}"


def _at(row: Row) -> str:
    return "" if row["budget"] is None else f" at {row['budget']:.0%}"
