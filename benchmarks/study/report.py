"""The tables and the picture of a study, from its summary alone.

Knows the summary's JSON and Markdown. Knows nothing of result files.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .further import combined, flops_of, kept_of, own_of, transferred
from .paired import Row, difference, done, paired_loss, reference_of
from .verdict import (
    WITHIN,
    Rule,
    control_of,
    final_of_few,
    less_in_same_time,
    paragraph,
    recommendation,
    rules_of,
    time_of,
    time_to_reach,
)


T = TypeVar("T")

FILLED = 0.9  # of a budget, below which a row says so


def markdown(summary: Mapping[str, Any]) -> str:
    """All of a study's tables, with its paragraph first."""
    facts = summary["facts"]
    said = [
        f"{summary['study']}: {facts['data']}, {facts['steps']} steps of {facts['batch']} x at most {facts['length']} tokens, "
        f"{facts['dtype']}, {facts['held_out']} held-out examples, {summary['jobs']} jobs on {summary['device']}"
    ]
    kinds = {"contest": (paragraph, in_use, contest), "transfer": (transferred, transfer)}
    kinds["multiplication"] = (combined, multiplication)
    said += filter(None, (tell(summary) for tell in kinds[summary["kind"]]))
    if failed := [row for row in summary["rows"] if not row["seeds"]]:
        said.append(
            "\n".join(
                f"- {row['label']}{_share(row)}: {row['status']}, {row['error'] or 'at every rate tried'}"
                for row in failed
            )
        )
    if summary["not_run"]:
        said.append(f"Not run: {'; '.join(summary['not_run'])}.")
    return "\n\n".join(said)


def in_short(summary: Mapping[str, Any]) -> str:
    """What bears on what to use, for those who read nothing else."""
    return "\n\n".join(filter(None, (recommendation(summary), in_use(summary))))


def in_use(summary: Mapping[str, Any]) -> str:
    """Rules with several seeds, the lowest first; empty where there are less than two."""
    rules, reference = rules_of(summary), summary["reference"]
    columns: dict[str, Callable[[Rule], str]] = {
        "rule": lambda rule: rule.title,
        "seeds": lambda rule: str(rule.seeds),
        "loss less the lowest": lambda rule: _shown(rule.of_lowest),
        f"less {reference}'s": lambda rule: "–" if rule.title == reference else str(rule.of_reference),
        f"step time, of {reference}'s": lambda rule: f"{rule.step_time:.2f}",
        "memory": lambda rule: f"{rule.memory:.2f}",
    }
    return table(columns, rules) if len(rules) > 1 else ""


def contest(summary: Mapping[str, Any]) -> str:
    """Every arm at its own best learning rate, by budget."""
    reference = reference_of(summary)
    before = summary["untrained"]
    names = list(before["unrelated"]) if before else []
    has_accuracy = any(one["accuracy"] is not None for row in done(summary) for one in row["seeds"].values())
    columns: dict[str, Callable[[Row], str]] = {
        "arm": lambda row: row["label"],
        "modules": lambda row: str(row["modules"]),
        "rank": lambda row: "–".join(map(str, sorted({*row["ranks"][:1], *row["ranks"][-1:]}))) or "whole",
        "parameters": lambda row: _parameters(row, reference),
        "from layer": lambda row: "–" if row["lowest"] is None else str(row["lowest"]),
        "predicted gain": lambda row: "–" if row.get("kept") is None else f"{row['kept']:.2f}",
        "learning rate": lambda row: _rate(row),
        "seeds": lambda row: str(len(row["seeds"])),
        "loss": lambda row: f"{paired_loss(summary, row):.4f}",
        "less all-linear's": lambda row: _shown(reference and difference(summary, row, [reference])),
        "less random's": lambda row: _less_random(summary, row),
        "less all-linear's in the same time": lambda row: _signed(less_in_same_time(summary, row)),
        "step time": lambda row: f"{row['step_time']:.2f}{_measured(summary, row)}",
        f"time to all-linear's loss + {100 * WITHIN:g} %": lambda row: _reach(summary, row, reference),
        "MiB": lambda row: f"{row['memory'] / 2**20:.0f}",
        "TFLOP": lambda row: f"{(row['flops'] + row['charged_flops']) / 1e12:.1f}",
    }
    for name in names:
        columns[f"{name} text"] = functools.partial(_forgotten, name=name, before=before["unrelated"][name])
    if all(row.get("kept") is None for row in done(summary)):  # results of before it was recorded
        del columns["predicted gain"]
    if has_accuracy:
        columns["accuracy, given the long answer"] = lambda row: f"{_accuracy(row):.2f}"
    parts = []
    for budget in dict.fromkeys(row["budget"] for row in done(summary)):
        rows = [row for row in done(summary) if row["budget"] == budget]
        title = "Arms with a size of their own" if budget is None else f"At {budget:.0%} of all-linear's parameters"
        parts.append(f"{title}\n\n{table(columns, sorted(rows, key=lambda row: paired_loss(summary, row)))}")
    if any(control_of(summary, row) for row in done(summary)):
        parts.append(
            "Random's is the mean over draws of one random rule: of those at the same budget the one whose number of "
            "modules is nearest."
        )
    if before:
        accuracy = "" if before["accuracy"] is None else f", accuracy, given the long answer, {before['accuracy']:.2f}"
        parts.append(f"Untrained: loss {before['loss']:.4f}{accuracy}.")
    return "\n\n".join(parts)


def transfer(summary: Mapping[str, Any]) -> str:
    """Blueprints of other data, of few examples, of the 4-bit model, and later in training."""
    reference = reference_of(summary)

    def agreement(row: Row, key: str) -> str:
        found = (row.get("agreement") or {}).get(key)
        return "–" if found is None else f"{found:.2f}"

    columns: dict[str, Callable[[Row], str]] = {
        "arm [blueprint]": lambda row: row["label"] + _share(row),
        "same adapters (Jaccard)": lambda row: agreement(row, "jaccard"),
        "rank correlation": lambda row: agreement(row, "correlation"),
        "learning rate": lambda row: _rate(row),
        "loss": lambda row: f"{paired_loss(summary, row):.4f}",
        "less its own blueprint's": lambda row: _shown(
            (mine := own_of(summary, row)) and difference(summary, row, [mine])
        ),
        "less all-linear's": lambda row: _shown(reference and difference(summary, row, [reference])),
        "measuring, in steps": lambda row: f"{row['charged_time']:.1f}",
    }
    return table(columns, done(summary))


def multiplication(summary: Mapping[str, Any]) -> str:
    """What remains of all-linear's gain, at what share of its cost."""
    reference, before = reference_of(summary), summary["untrained"]
    if reference is None or before is None:
        return f"{summary['reference']} or the untrained model has not run yet."
    rows, cost = done(summary), flops_of(reference)

    def seen(row: Row) -> int:
        return int(min(row["examples"], row["steps"] * summary["facts"]["batch"]))

    columns: dict[str, Callable[[Row], str]] = {"arm": lambda row: row["label"]}
    columns["examples"] = lambda row: str(row["examples"])
    if any(seen(row) < row["examples"] for row in rows):
        columns["of them seen"] = lambda row: str(seen(row))
    columns |= {
        "steps": lambda row: str(row["steps"]),
        "learning rate": lambda row: _rate(row),
        "seeds": lambda row: str(len(row["seeds"])),
        "loss": lambda row: f"{paired_loss(summary, row):.4f}",
        "less all-linear's": lambda row: _shown(difference(summary, row, [reference])),
        "gain kept": lambda row: f"{kept_of(summary, row, reference):.0%}",
        "FLOPs": lambda row: f"{flops_of(row) / cost:.0%}",
        "of them measuring and choosing": lambda row: f"{row['charged_flops'] / cost:.0%}",
        "FLOPs, that run counted": lambda row: f"{(flops_of(row) + cost * row['entry']['stop']) / cost:.0%}",
        "time": lambda row: f"{time_of(summary, row) / time_of(summary, reference):.2f}",
    }
    stopped = next((row["stopped_by"] for row in rows if row.get("stopped_by")), None)
    told = f"Stopping is at {stopped[0]:.0%} of the steps, by {stopped[1]}. " if stopped else ""
    return (
        f"{table(columns, rows)}\n\n{told}Shares are of {reference['label']} on everything. When to stop is told by a "
        f"whole run of it, which is not in the cost of the arms that stop, but for the FLOPs with that run counted."
    )


def table(columns: Mapping[str, Callable[[T], str]], rows: Sequence[T]) -> str:
    """Rows in Markdown."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in rows)])


def picture(summary: Mapping[str, Any], path: Path) -> None:
    """Loss against time (measured where it was) and predicted memory, with the front of those that nothing beats in both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, reference = done(summary), reference_of(summary)
    if reference is None:
        return
    losses = {id(row): paired_loss(summary, row) for row in rows}
    whole = time_of(summary, reference)
    costs = {
        "time, measuring counted": {id(row): time_of(summary, row) / whole for row in rows},
        "predicted peak memory": {id(row): row["memory"] / reference["memory"] for row in rows},
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6), sharey=True)
    for axis, (title, cost) in zip(axes, costs.items(), strict=True):
        budgets = list(dict.fromkeys(row["budget"] for row in rows))
        for i, budget in enumerate(budgets):
            some = [id(row) for row in rows if row["budget"] == budget]
            label = "own size" if budget is None else f"{budget:.0%} of the parameters"
            axis.scatter([cost[one] for one in some], [losses[one] for one in some], 18, f"C{i}", label=label)
        front = [
            r for r in rows if not any(cost[id(o)] <= cost[id(r)] and losses[id(o)] < losses[id(r)] for o in rows)
        ]
        front.sort(key=lambda row: cost[id(row)])
        axis.plot([cost[id(row)] for row in front], [losses[id(row)] for row in front], color="0.6", lw=1)
        for row in front:
            axis.annotate(row["label"] + _share(row), (cost[id(row)], losses[id(row)]), fontsize=7)
        axis.set_xlabel(f"{title} / {reference['label']}'s")
    axes[0].set_ylabel("held-out loss per token")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _rate(row: Row) -> str:
    """The best, of how many, and whether it is at the edge of them."""
    is_at_edge = len(row["tried"]) > 2 and not row["is_inside"]
    return f"{row['rate']:.2g} of {len(row['tried'])}{' (edge)' if is_at_edge else ''}"


def _share(row: Row) -> str:
    return "" if row["budget"] is None else f" at {row['budget']:.0%}"


def _shown(one: object) -> str:
    return "–" if one is None else str(one)


def _parameters(row: Row, reference: Row | None) -> str:
    """And how much of the budget that is, where it is much less."""
    text = f"{row['parameters'] / 1e6:.2f} M"
    if reference is None or row["budget"] is None:
        return text
    share = row["parameters"] / (row["budget"] * reference["parameters"])
    return text if share >= FILLED else f"{text} ({share:.2f} of the budget)"


def _signed(one: float | None) -> str:
    return "–" if one is None else f"{one:+.4f}"


def _less_random(summary: Mapping[str, Any], row: Row) -> str:
    return _shown(difference(summary, row, control_of(summary, row)))


def _reach(summary: Mapping[str, Any], row: Row, reference: Row | None) -> str:
    loss = None if reference is None else final_of_few(reference)
    found = None if loss is None else time_to_reach(summary, row, loss * (1 + WITHIN))
    return "–" if found is None else f"{found:.2f}"


def _measured(summary: Mapping[str, Any], row: Row) -> str:
    ratios = summary["times"].get(row["label"] + _share(row))
    return f" ({statistics.median(ratios):.2f} measured)" if ratios else ""


def _forgotten(row: Row, name: str, before: float) -> str:
    """How far the loss on an unrelated text has risen."""
    found = [one["unrelated"][name] for one in row["seeds"].values()]
    return f"{sum(found) / len(found) - before:+.3f}"


def _accuracy(row: Row) -> float:
    found = [one["accuracy"] for one in row["seeds"].values()]
    return float(sum(found) / len(found))
