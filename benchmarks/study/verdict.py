"""What a summary says: what is compared with what, the time to reach a loss, and a paragraph in plain words.

Pure functions of the summary's JSON, so that no sentence can disagree with it. Knows nothing of how it came about.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from scipy.stats import spearmanr

from .paired import Difference, Row, difference, done, loss_of, paired_loss, reference_of


WITHIN, OF_TIME = 0.005, 0.7  # the aim: this near to the reference's loss, in this share of its time
ENOUGH_ARMS = 8  # for a correlation
ROUNDS = 3  # of measured step times, from which on they are believed instead of predicted ones
FIRST = "0"  # the seed by which learning rates and winners are chosen


class Rule(NamedTuple):
    """What a rule with several seeds came to, over its draws.

    Args:
        title: its label, with its budget and draws.
        seeds: that it shares with the reference.
        of_reference: its loss less the reference's.
        of_lowest: its loss less the lowest rule's; None for that one, and where they share no seed.
        step_time: over the reference's.
        memory: over the reference's.
    """

    title: str
    seeds: int
    of_reference: Difference
    of_lowest: Difference | None
    step_time: float
    memory: float

    @property
    def is_above(self) -> bool:
        """Whether it is above the lowest by two standard errors."""
        return self.of_lowest is not None and self.of_lowest.is_clear and self.of_lowest.mean > 0


def control_of(summary: Mapping[str, Any], row: Row) -> list[Row]:
    """The draws that a row is compared with: of the random rule at its budget whose number of modules is nearest to its
    own, and which begins as it does; of two as near the one with more draws.
    """
    rules: dict[str, list[Row]] = {}
    for other in done(summary):
        is_plain = other["label"] == other["arm"]  # nothing else is varied
        is_other = other["budget"] == row["budget"] and other["label"] != row["label"]
        if is_plain and is_other and other["arm"].startswith("random"):
            rules.setdefault(_rule(other), []).append(other)

    def distance(draws: Sequence[Row]) -> tuple[bool, float, int]:
        apart = abs(statistics.mean(one["modules"] for one in draws) - row["modules"])
        return _start(draws[0]) != _start(row), apart, -len(draws)

    return min(rules.values(), key=distance, default=[])


def time_to_reach(summary: Mapping[str, Any], row: Row, loss: float) -> float | None:
    """Share of the reference's whole time in which a row's curve falls to a loss, what it was charged with counted; None
    if it does not. Between points of the curve in a straight line; both curves are of the few examples, first seed.
    """
    reference, steps = reference_of(summary), summary["facts"]["steps"]
    before = summary["untrained"]
    own = row["seeds"].get(FIRST)
    if reference is None or own is None:
        return None
    points = [*([before["curve"][-1]] if before else []), *own["curve"]]
    for (a, high), (b, low) in zip(points, points[1:], strict=False):
        if low <= loss:
            at = a + (b - a) * ((high - loss) / (high - low) if high > low else 1.0)
            return float((row["charged_time"] + at * step_time(summary, row)) / steps)
    return None


def less_in_same_time(summary: Mapping[str, Any], row: Row) -> float | None:
    """A row's loss less that of the reference in the same time, measuring not counted: between the reference's runs
    of all its steps and of fewer in a straight line. None where there are none so short or so long.
    """
    reference = reference_of(summary)
    if reference is None:
        return None
    plain = {**reference["entry"], "select": None, "share": None}
    runs = sorted(
        (time_of(summary, one, is_charged=False), paired_loss(summary, one))
        for one in done(summary)
        if {**one["entry"], "select": None, "share": None} == plain and one["entry"]["select"] in (None, "random")
    )
    time = time_of(summary, row, is_charged=False)
    for (short, high), (long, low) in zip(runs, runs[1:], strict=False):
        if short <= time <= long:
            return float(paired_loss(summary, row) - high - (low - high) * (time - short) / (long - short))
    return None


def is_measured(summary: Mapping[str, Any], row: Row) -> bool:
    """Whether a row's step time has been measured often enough."""
    return len(summary["times"].get(row["label"] + at_share(row), [])) >= ROUNDS


def step_time(summary: Mapping[str, Any], row: Row) -> float:
    """Of a row over the reference's: the median of what was measured, or else as predicted."""
    if row["arm"] != summary["reference"] and is_measured(summary, row):
        return statistics.median(summary["times"][row["label"] + at_share(row)])
    return float(row["step_time"])


def time_of(summary: Mapping[str, Any], row: Row, is_charged: bool = True) -> float:
    """Of a whole run, in steps of the reference, with what came before it or without."""
    return float(row["steps"] * step_time(summary, row) + (row["charged_time"] if is_charged else 0.0))


def final_of_few(row: Row) -> float | None:
    """The last point of a row's curve, of the first seed."""
    own = row["seeds"].get(FIRST)
    return own["curve"][-1][1] if own and own["curve"] else None


def paragraph(summary: Mapping[str, Any]) -> str:
    """What to use when, as far as the summary says."""
    reference = reference_of(summary)
    if reference is None:
        return f"{summary['reference']} has not run yet, so that there is nothing to compare with."
    said = [_of_budget(summary, budget, reference) for budget in _budgets(summary)]
    said += [_of_default(summary, reference), _advice(summary, reference), _of_prediction(summary)]
    return " ".join(filter(None, [*said, _caveats(summary)]))


def recommendation(summary: Mapping[str, Any]) -> str:
    """Of the paragraph what bears on what to use: the default, and which arms cannot be told from the lowest."""
    reference = reference_of(summary)
    if reference is None:
        return f"{summary['reference']} has not run yet, so that there is nothing to compare with."
    return " ".join([_of_default(summary, reference), _advice(summary, reference), _caveats(summary)])


def _budgets(summary: Mapping[str, Any]) -> list[float]:
    return sorted({row["budget"] for row in done(summary) if row["budget"] is not None}, reverse=True)


def _of_budget(summary: Mapping[str, Any], budget: float, reference: Row) -> str:
    """Which arm wins at a budget with the first seed, and by how much with others: the seed that chose flatters."""
    rows = [row for row in done(summary) if row["budget"] == budget]
    against = {row["label"]: difference(summary, _on(row, is_first=True), [reference]) for row in rows}
    rows = [row for row in rows if against[row["label"]] is not None]
    if not rows:
        return ""
    best = min(rows, key=lambda row: against[row["label"]].mean)  # type: ignore[union-attr]
    guessed = sum(len(_family(summary, row)["tried"]) < 2 for row in rows)
    text = (
        f"At {budget:.0%} of all-linear's parameters, of {len(rows)} arms ({guessed} of which have had only one "
        f"learning rate) {best['label']} came out lowest with the first seed, at a held-out loss of "
        f"{best['seeds'][FIRST]['loss']:.4f}"
    )
    control = control_of(summary, best)
    further = _on(best, is_first=False)
    own, of_random = difference(summary, further, [reference]), difference(summary, further, control)
    if own is None:
        own, of_random = against[best["label"]], difference(summary, _on(best, is_first=True), control)
        text += f". It has one seed in common with {reference['label']}, the one that it was chosen by: "
    else:
        text += f". On {own.seeds} other seed{'s' if own.seeds > 1 else ''} it is "
    assert own is not None
    text += f"{own} against {reference['label']}, {_clearly(own)}"
    if of_random is not None:
        text += f", and {of_random} against {_named(control, of_random)}, {_clearly(of_random)}"
    elif control:
        text += f"; {_rule(control[0])} has none of them"
    return text + "."


def _of_default(summary: Mapping[str, Any], reference: Row) -> str:
    """Whether the library's default beats random placements, and reaches the aim."""
    row = next((row for row in done(summary) if row["label"] == summary["default"]), None)
    if row is None:
        return f"The default ({summary['default']}) has not run yet."
    text = f"The default ({row['label']})"
    control = control_of(summary, row)
    of_random = difference(summary, row, control)
    if of_random is None:
        text += " has no random placement to be compared with"
    elif of_random.seeds < 2:
        text += f" is {of_random} against {_named(control, of_random)}, with one seed"
    else:
        beats = of_random.mean < 0 and of_random.is_clear
        text += f" {'beats' if beats else 'does not beat'} random placements by two standard errors: {of_random}"
        text += f" against {_named(control, of_random)}"
    own = difference(summary, row, [reference])
    if own is None:
        return text + "."
    above = own.mean / loss_of(reference)
    time = time_of(summary, row) / time_of(summary, reference)
    how = "measured" if is_measured(summary, row) else "predicted"
    equal = less_in_same_time(summary, row)
    if equal is not None:
        text += f", {equal:+.4f} against {reference['label']} trained for fewer steps in that time"
    near, fast = above <= WITHIN, time <= OF_TIME
    text += (
        f". Its loss is {_percent(above)} {reference['label']}'s{', with one seed,' if own.seeds < 2 else ','} in "
        f"{time:.2f} of its {how} time with the measurement counted "
        f"({step_time(summary, row):.2f} where a blueprint is published with the model): the aim, within "
        f"{WITHIN:.1%} in {OF_TIME:g} of the time, is "
    )
    if near and fast:
        return text + "met."
    missed = [] if near else [f"the loss by {above - WITHIN:.1%}"]
    missed += [] if fast else [f"the time by {time - OF_TIME:.2f}"]
    return text + f"missed, {' and '.join(missed)}."


def between(summary: Mapping[str, Any], ones: Sequence[Row], others: Sequence[Row]) -> Difference | None:
    """One rule's loss less another's, each of one row or several draws; None where no seed is shared."""
    if len(ones) == 1:
        return difference(summary, ones[0], others)
    found = difference(summary, others[0], ones)
    return found and replace(found, mean=-found.mean)


def rules_of(summary: Mapping[str, Any]) -> list[Rule]:
    """Those with several seeds, the lowest first; draws of one random rule are taken together."""
    reference = reference_of(summary)
    if reference is None:
        return []
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in done(summary):
        groups.setdefault((row["label"].replace(row["arm"], _rule(row), 1), row["budget"]), []).append(row)
    against = [(draws, between(summary, draws, [reference])) for draws in groups.values()]
    several = sorted(((d, found) for d, found in against if found and found.seeds > 1), key=lambda one: one[1].mean)
    return [
        Rule(
            title=_title(draws),
            seeds=found.seeds,
            of_reference=found,
            of_lowest=None if draws is several[0][0] else between(summary, draws, several[0][0]),
            step_time=statistics.mean(step_time(summary, row) for row in draws),
            memory=_mean(draws, "memory") / reference["memory"],
        )
        for draws, found in several
    ]


def _advice(summary: Mapping[str, Any], reference: Row) -> str:
    """Which rules cannot be told from the lowest, among those with more than one seed, and what that costs."""
    rules = rules_of(summary)
    if len(rules) < 2:
        return "What to use cannot be said yet: it takes several seeds of several arms."
    lowest, *others = rules
    level = [rule.title for rule in others if not rule.is_above]
    text = (
        f"What to use, of the {len(rules)} rules with several seeds: {lowest.title} has the lowest loss, in "
        f"{lowest.step_time:.2f} of {reference['label']}'s step time and {lowest.memory:.2f} of its memory. "
    )
    if not level:
        return text + "All others are above it by two standard errors."
    text += f"Not clearly above it: {'; '.join(level)}."
    return text + (" All others are, by two standard errors." if len(level) < len(others) else "")


def _of_prediction(summary: Mapping[str, Any]) -> str:
    """Whether placements that the planner predicts to gain more end lower, those of one size compared."""
    found = []
    for budget in dict.fromkeys(row["budget"] for row in done(summary)):
        rows = [
            row
            for row in done(summary)
            if row["budget"] == budget and row.get("kept") is not None and row["label"] == row["arm"]
        ]
        if len(rows) >= ENOUGH_ARMS:
            kept, losses = [row["kept"] for row in rows], [paired_loss(summary, row) for row in rows]
            correlation, p = spearmanr(kept, losses)
            size = "all-linear's parameters or their own size" if budget is None else f"{budget:.0%} of them"
            found.append(f"{correlation:+.2f} (p = {p:.1g}) over {len(rows)} arms with {size}")
    if not found:
        return ""
    return f"The gain that the planner predicts ranks losses with a Spearman correlation of {', '.join(found)}."


def _caveats(summary: Mapping[str, Any]) -> str:
    facts, rows = summary["facts"], done(summary)
    edges = [f"{row['label']}{at_share(row)}" for row in rows if not row["is_inside"] and " #" not in row["label"]]
    text = (
        f"All of it on {facts['data']}, {facts['steps']} steps of {facts['batch']} examples of at most {facts['length']} "
        f"tokens, {facts['held_out']} held-out examples, by {max(len(row['seeds']) for row in rows)} seeds at most"
    )
    if edges:
        text += f"; {len(edges)} of {len(rows)} arms have not had a learning rate on both sides of their best"
    return text + "."


def _on(row: Row, is_first: bool) -> Row:
    """A row with its first seed alone, or with all others."""
    return {**row, "seeds": {seed: one for seed, one in row["seeds"].items() if (seed == FIRST) == is_first}}


def _mean(rows: Sequence[Row], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def _title(draws: Sequence[Row]) -> str:
    """A rule, with the number of its draws where there are several."""
    label = draws[0]["label"].replace(draws[0]["arm"], _rule(draws[0]), 1) + at_share(draws[0])
    return label if len(draws) == 1 else f"{label} ({len(draws)} draws)"


def _start(row: Row) -> str:
    """How its adapters begin; empty for LoRA's own way."""
    found = re.search("along the gradient|A from gradients|LoRA-GA|EVA", row["arm"])
    return found[0] if found else ""


def _rule(row: Row) -> str:
    """Its arm's name without the number of a draw."""
    return str(row["arm"]).partition(" #")[0]


def _family(summary: Mapping[str, Any], row: Row) -> Row:
    """The row whose learning rate a row took: of several draws the first."""
    label = row["label"].replace(row["arm"], _rule(row), 1)
    return next((r for r in done(summary) if r["label"] == label and r["budget"] == row["budget"]), row)


def _named(control: Sequence[Row], of_random: Difference) -> str:
    """The rule of these draws, and how many were compared with."""
    return f"{_rule(control[0])} ({of_random.draws} draw{'s' if of_random.draws > 1 else ''})"


def _clearly(one: Difference) -> str:
    if one.seeds < 2:
        return "with one seed"
    if one.is_clear:
        return f"{'better' if one.mean < 0 else 'worse'} by two standard errors"
    return "within two standard errors"


def _percent(above: float) -> str:
    return f"{abs(above):.1%} {'above' if above > 0 else 'below'}"


def at_share(row: Row) -> str:
    return "" if row["budget"] is None else f" at {row['budget']:.0%}"
