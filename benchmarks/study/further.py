"""What the studies of transfer and of combination say, as `verdict` does for a contest: from a summary alone.

Knows the summary's JSON.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from .paired import ENOUGH, Difference, Row, difference, done, paired_loss, reference_of
from .study import TASK
from .verdict import at_share


PAPER = (0.72, 0.06)  # §4.4: share of the gain at share of the cost


def own_of(summary: Mapping[str, Any], row: Row) -> Row | None:
    """The row of the same arm, placed by the study's own blueprint."""
    wanted = {**row["entry"], "blueprint": TASK}, row["budget"]
    return next((one for one in done(summary) if (one["entry"], one["budget"]) == wanted), None)


def transferred(summary: Mapping[str, Any]) -> str:
    """Whether blueprints of something else choose as well as the study's own, arm by arm."""
    by_arm: dict[str, list[tuple[Row, Difference]]] = {}
    for row in done(summary):
        own = None if row["entry"]["blueprint"] == TASK else own_of(summary, row)
        apart = own and difference(summary, row, [own])
        if apart:
            by_arm.setdefault(row["arm"] + at_share(row), []).append((row, apart))
    if not by_arm:
        return "No arm has run yet both by the study's own blueprint and by another."
    return " ".join(_of_arm(arm, found) for arm, found in by_arm.items())


def _of_arm(arm: str, found: list[tuple[Row, Difference]]) -> str:
    worse = [row["entry"]["blueprint"] for row, apart in found if apart.mean > ENOUGH * apart.error]
    last, apart = max(found, key=lambda one: one[1].mean)
    seeds = min(one.seeds for _, one in found)
    return (
        f"{arm}: of {len(found)} other blueprints {', '.join(worse) or 'none'} chose worse than the study's own by two "
        f"standard errors ({seeds} seed{'s' if seeds > 1 else ''}); the worst is {last['entry']['blueprint']} with {apart}."
    )


def combined(summary: Mapping[str, Any]) -> str:
    """What placement, choice of data and stopping keep of the reference's gain together, beside the paper's."""
    reference, before = reference_of(summary), summary["untrained"]
    if reference is None or before is None:
        return (
            f"{summary['reference']} or the untrained model has not run yet, so that there is nothing to compare with."
        )
    all_three = [row for row in done(summary) if row["entry"]["select"] and row["entry"]["stop"]]
    rows = [row for row in all_three if row["arm"] != reference["arm"]]
    short = [row for row in all_three if row["arm"] == reference["arm"] and row["entry"]["select"] == "random"]
    paper = f"{PAPER[0]:.0%} of the gain at {PAPER[1]:.0%} of the cost"
    if not rows:
        return f"No arm that combines placement, choice of data and stopping has run yet. The paper's: {paper}."

    def told(row: Row) -> str:
        kept, spent = kept_of(summary, row, reference), flops_of(row) / flops_of(reference)
        return f"{kept:.0%} of {reference['label']}'s gain at {spent:.0%} of its FLOPs"

    best = min(rows, key=lambda row: paired_loss(summary, row))
    one = len(best["seeds"]) < 2 or len(reference["seeds"]) < 2
    beside = "".join(
        f" {row['label']}, which measures and chooses nothing and is as short: {told(row)}." for row in short
    )
    return (
        f"Placement, choice of data and stopping together, of {len(rows)} such arms the one with the lowest loss "
        f"({best['label']}{at_share(best)}{', with one seed' if one else ''}): {told(best)}, or "
        f"{(flops_of(best) + flops_of(reference)) / flops_of(reference):.0%} with the run that told when to stop."
        f"{beside} The paper's: {paper}."
    )


def kept_of(summary: Mapping[str, Any], row: Row, reference: Row) -> float:
    """Share of the reference's gain over the untrained model, over the seeds that both have."""
    shared = [seed for seed in row["seeds"] if seed in reference["seeds"]]
    lost = statistics.mean(row["seeds"][seed]["loss"] - reference["seeds"][seed]["loss"] for seed in shared)
    whole = summary["untrained"]["loss"] - statistics.mean(reference["seeds"][seed]["loss"] for seed in shared)
    return float(1 - lost / whole)


def flops_of(row: Row) -> float:
    """Of training, and of what came before it."""
    return float(row["flops"] + row["charged_flops"])
