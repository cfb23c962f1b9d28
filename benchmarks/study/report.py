"""Print a study's records as tables: every arm at its best learning rate, compared with others seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .plan import UNTRAINED, Entry, Job, Study, best_octave, row_label
from .store import outcome


ROUNDS = 3  # of measured step times, from which on they stand for predicted ones
SHOWN = 4.0  # times the median's distance from the best loss, up to which a picture shows
FILLED = 0.9  # of a budget, below which a row says so

Record = Mapping[str, Any]
Run = tuple[Job, Record]


@dataclass(frozen=True)
class Row:
    """One arm at one budget, at its best learning rate.

    Args:
        entry: the arm.
        budget: share of all-linear's parameters, or None.
        tried: octaves that ran with the first seed.
        octave: the best; None where none ended well.
        runs: records at the best octave by seed.
        error: status and reason where there are none.
    """

    entry: Entry
    budget: float | None
    tried: frozenset[int] = frozenset()
    octave: int | None = None
    runs: Mapping[int, Record] | None = None
    error: str = ""

    @property
    def label(self) -> str:
        """The name in tables."""
        return row_label(self.entry.label, self.budget)

    @property
    def first(self) -> Record:
        """The record of the first seed that ran."""
        assert self.runs is not None
        return self.runs[min(self.runs)]

    @property
    def loss(self) -> float:
        """Mean over seeds."""
        assert self.runs is not None
        return statistics.mean(run["loss"] for run in self.runs.values())

    @property
    def is_inside(self) -> bool:
        """Whether learning rates on both sides of the best were tried."""
        return self.octave is not None and {self.octave - 1, self.octave + 1} <= self.tried

    @classmethod
    def of(cls, entry: Entry, budget: float | None, runs: Sequence[Run]) -> Row:
        """Collect an arm's runs."""
        runs = _alike(runs)
        losses: dict[int, dict[int, float]] = {}
        for job, record in runs:
            loss = outcome(record)
            losses.setdefault(job.octave, {})[job.seed] = math.nan if loss is None else loss
        tried = frozenset(job.octave for job, _ in runs if job.seed == 0)
        sound = {k: of for k, of in losses.items() if math.isfinite(of.get(0, math.nan))}
        best = best_octave(sound)
        if best is None and entry.family != entry:  # at the family's octave, which that family's first seed chose
            best = max((k for k, of in losses.items() if any(map(math.isfinite, of.values()))), default=None)
        if best is None:
            _, record = runs[0]
            reason = "not yet with the first seed" if record["status"] == "done" else record.get("error", "diverged")
            return cls(entry, budget, tried, error=f"{record['status']}, {reason}")
        at_best = {job.seed: r for job, r in runs if job.octave == best and r["status"] == "done"}
        return cls(entry, budget, tried, best, dict(sorted(at_best.items())))


def _alike(runs: Sequence[Run]) -> Sequence[Run]:
    """Keep the runs that train what the newest trains, for as long: older rules and blueprints leave records behind."""

    def trained(job: Job, record: Record) -> tuple[Any, Any, int]:
        return record.get("ranks"), record.get("whole"), job.steps

    known = [(job, record) for job, record in runs if record["status"] != "failed" or "ranks" in record]
    newest = max(known or runs, key=lambda run: run[1]["created"])
    return [run for run in runs if trained(*run) == trained(*newest)]


@dataclass(frozen=True)
class Difference:
    """Of two arms' losses, paired by seed and held-out example.

    Args:
        mean: negative where the first is lower.
        error: standard error over seeds, over examples where all seeds share them, and over random draws.
        seeds: that both have; with one seed nothing is decided.
    """

    mean: float
    error: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f}{' (1 seed)' if self.seeds == 1 else ''}"


def difference(row: Row, others: Sequence[Row]) -> Difference | None:
    """Return a row's loss minus the mean of another arm's draws, over the seeds they share; None where there are none.

    Args:
        row: of one arm.
        others: the draws of one arm, or its only row.
    """
    by_draw: list[dict[int, np.ndarray]] = []
    counts = []
    for other in others:
        draw = {}
        for seed, run in (row.runs or {}).items():
            if seed in (other.runs or {}):
                weights = np.array(run["counts"], dtype=float)
                apart = np.array(run["losses"]) - np.array(other.runs[seed]["losses"])  # type: ignore[index]
                draw[seed] = apart * weights / weights.mean()
                counts.append(run["counts"])
        by_draw += [draw] if draw else []
    if not by_draw:
        return None
    seeds = sorted({seed for draw in by_draw for seed in draw})
    of_seeds = [statistics.mean(float(draw[seed].mean()) for draw in by_draw if seed in draw) for seed in seeds]
    of_draws = [statistics.mean(float(one.mean()) for one in draw.values()) for draw in by_draw]
    errors = [_error(of_seeds), _error(of_draws)]
    if all(one == counts[0] for one in counts):  # the same held-out examples
        of_examples = np.mean([np.mean(list(draw.values()), axis=0) for draw in by_draw], axis=0)
        errors.append(_error(of_examples.tolist()))
    return Difference(statistics.mean(of_draws), math.hypot(*errors), len(seeds))


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


class Report:
    """A study's rows, with what their tables need.

    Args:
        study: whose they are.
        runs: every job with its record.
        times: measured step times over the reference's by row, one ratio a round.
    """

    def __init__(self, study: Study, runs: Sequence[Run], times: Mapping[str, Sequence[float]]):
        self.study = study
        self.runs = runs
        self.times = times
        self.untrained = next((r for job, r in runs if job.entry.arm == UNTRAINED and r["status"] == "done"), None)
        by_row: dict[tuple[Entry, float | None], list[Run]] = {}
        for job, record in runs:
            if job.entry.arm != UNTRAINED:
                by_row.setdefault((job.entry, job.budget), []).append((job, record))
        rows = [Row.of(entry, budget, of) for (entry, budget), of in by_row.items()]
        self.rows = [row for row in rows if row.runs]
        self.failed = [row for row in rows if not row.runs]
        self.reference = self.named(study.reference)
        self.rows.sort(key=lambda row: (row.budget is not None, -(row.budget or 0), self.paired_loss(row)))

    def named(self, label: str, budget: float | None = None) -> list[Row]:
        """Return an arm's row, or those of its draws: at the budget, or of its own size."""
        rows = [row for row in self.rows if row.entry.label.partition(" #")[0] == label]
        return [row for row in rows if row.budget == budget] or [row for row in rows if row.budget is None]

    def paired_loss(self, row: Row) -> float:
        """Return the reference's mean loss plus the row's difference from it, so that few and many seeds compare."""
        apart = difference(row, self.reference)
        return row.loss if apart is None else self.reference[0].loss + apart.mean

    def step_time(self, row: Row) -> tuple[float, bool]:
        """Return the step time over the reference's, and whether it was measured."""
        measured = self.times.get(row.label, [])
        is_measured = len(measured) >= ROUNDS and row not in self.reference
        return (statistics.median(measured) if is_measured else float(row.first["step_time"])), is_measured

    def markdown(self) -> str:
        """Return the tables, by budget, then failed jobs and those that have not run."""
        study = self.study
        text = [
            f"{study.name}: {study.data}, {study.steps} steps of {study.batch} x at most {study.length} tokens, "
            f"{study.dtype}, {study.held_out} held-out examples, {len(self.runs)} jobs. Losses per token; differences "
            "are paired by seed, ± one standard error; those of one seed decide nothing."
        ]
        columns = self.columns()
        for budget in dict.fromkeys(row.budget for row in self.rows):
            title = (
                "Arms with a size of their own" if budget is None else f"At {budget:.0%} of all-linear's parameters"
            )
            lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            for row in (row for row in self.rows if row.budget == budget):
                lines.append(f"| {' | '.join(cell(row) for cell in columns.values())} |")
            text.append("\n".join([title, "", *lines]))
        if self.untrained:
            text.append(f"Untrained: loss {self.untrained['loss']:.4f}.")
        text += ["\n".join(f"- {row.label}: {row.error}" for row in self.failed)] if self.failed else []
        missing = self.not_run()
        text += [f"Not run: {'; '.join(missing)}."] if missing else []
        return "\n\n".join(text)

    def columns(self) -> dict[str, Callable[[Row], str]]:
        """Return the columns; those that no row has anything for are left out."""

        def minus(label: str) -> Callable[[Row], str]:
            return lambda row: _shown(difference(row, [o for o in self.named(label, row.budget) if o is not row]))

        found: dict[str, Callable[[Row], str]] = {
            "arm": lambda row: row.entry.label,
            "modules": lambda row: str(row.first["modules"]),
            "rank": lambda row: _span(row.first["ranks"].values()) or "whole",
            "parameters": self._parameters,
            "from layer": lambda row: _shown(row.first["lowest"]),
            "predicted gain": lambda row: _number(row.first.get("kept")),
            "learning rate": lambda row: (
                f"{row.first['rate']:.2g} of {len(row.tried)}{'' if row.is_inside else ' (edge)'}"
            ),
            "seeds": lambda row: str(len(row.runs or {})),
            "loss": lambda row: f"{self.paired_loss(row):.4f}",
            **{f"minus {label}": minus(label) for label in self.study.compare},
            "step time": lambda row: "{:.2f}{}".format(*self._told_time(row)),
            "MiB, predicted": lambda row: f"{row.first['memory'] / 2**20:.0f}",
            "TFLOP": lambda row: f"{(row.first['flops'] + row.first['charged_flops']) / 1e12:.1f}",
            "before training": lambda row: f"{row.first['charged_flops'] / 1e12:.1f}",
            "same adapters (Jaccard)": lambda row: _number((row.first.get("agreement") or {}).get("jaccard")),
        }
        for name in (self.untrained or {}).get("unrelated", {}):
            found[f"{name} text"] = lambda row, name=name: self._forgotten(row, name)  # type: ignore[misc]
        if any(row.first.get("accuracy") is not None for row in self.rows):
            found["accuracy"] = lambda row: _number(_mean(row, "accuracy"))
        return {k: cell for k, cell in found.items() if any(cell(row) != "–" for row in self.rows)}

    def not_run(self) -> list[str]:
        """Return the rows that the study names and that have no record."""
        ran = {row.label for row in (*self.rows, *self.failed)}
        wanted: dict[str, None] = {}
        for phase in self.study.order:
            for entry in (entry for entry in phase.arms if entry.label not in ran):
                wanted |= dict.fromkeys(row_label(entry.label, budget) for budget in phase.budgets or (None,))
        return [label for label in wanted if label not in ran]

    def picture(self, path: Path) -> None:
        """Draw loss against step time and predicted memory; number the arms that none beats in both, with a list below."""
        from matplotlib.figure import Figure

        if not self.reference:
            raise SystemExit(f"{self.study.reference} has not run yet, and the picture is drawn relative to it.")
        losses = {row.label: self.paired_loss(row) for row in self.rows}
        costs = {
            "step time": {row.label: self.step_time(row)[0] for row in self.rows},
            "predicted peak memory": {
                row.label: row.first["memory"] / self.reference[0].first["memory"] for row in self.rows
            },
        }
        top = min(losses.values()) + SHOWN * (statistics.median(losses.values()) - min(losses.values()))
        shown = {name: loss for name, loss in losses.items() if loss <= top}
        fronts = {title: _front(cost, shown) for title, cost in costs.items()}
        numbers = {name: i for i, name in enumerate(dict.fromkeys(n for front in fronts.values() for n in front), 1)}
        figure = Figure(figsize=(11, 6.5 + 0.11 * len(numbers)), layout="constrained")
        for axis, (title, cost) in zip(figure.subplots(1, 2, sharey=True), costs.items(), strict=True):
            for i, budget in enumerate(dict.fromkeys(row.budget for row in self.rows)):
                names = [row.label for row in self.rows if row.budget == budget and row.label in shown]
                label = "own size" if budget is None else f"{budget:.0%} of the parameters"
                axis.scatter([cost[n] for n in names], [losses[n] for n in names], 30, f"C{i}", label=label)
            front = fronts[title]
            axis.plot([cost[n] for n in front], [losses[n] for n in front], color="0.6", lw=1, zorder=0)
            for place, name in enumerate(front):
                offset = (0, -15) if place % 2 else (0, 7)
                at = (cost[name], losses[name])
                axis.annotate(str(numbers[name]), at, offset, textcoords="offset points", ha="center", fontsize=10)
            axis.set_xlabel(f"{title}, all-linear LoRA = 1" if self.study.reference == "all-linear" else title)
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(0.06)
        figure.axes[0].set_ylabel("held-out loss per token")
        figure.axes[1].legend(frameon=False)
        hidden = len(losses) - len(shown)
        note = f"\n({hidden} arms with a loss above {top:.3g} are not shown)" if hidden else ""
        named = [f"{number} {name}" for name, number in numbers.items()]
        for i in range(2):
            figure.text(0.03 + 0.5 * i, -0.01, "\n".join(named[i::2]), va="top", fontsize=9.5)
        figure.suptitle(f"No other arm is both cheaper and better than the numbered ones{note}", fontsize=11)
        figure.savefig(path, dpi=120, bbox_inches="tight")

    def _told_time(self, row: Row) -> tuple[float, str]:
        time, is_measured = self.step_time(row)
        return time, " (measured)" if is_measured else ""

    def _parameters(self, row: Row) -> str:
        """Return the parameters, and how much of the budget they are where it is much less."""
        text = f"{row.first['parameters'] / 1e6:.2f} M"
        if not self.reference or row.budget is None:
            return text
        share = row.first["parameters"] / (row.budget * self.reference[0].first["parameters"])
        return text if share >= FILLED else f"{text} ({share:.2f} of the budget)"

    def _forgotten(self, row: Row, name: str) -> str:
        """Return how far the loss on an unrelated text has risen."""
        assert self.untrained is not None and row.runs is not None
        return f"{statistics.mean(r['unrelated'][name] for r in row.runs.values()) - self.untrained['unrelated'][name]:+.3f}"


def _front(cost: Mapping[str, float], losses: Mapping[str, float]) -> list[str]:
    """Return the arms for which no other costs as little and ends better, cheapest first."""
    front = [a for a in losses if not any(cost[b] <= cost[a] and losses[b] < losses[a] for b in losses)]
    return sorted(front, key=cost.__getitem__)


def _mean(row: Row, key: str) -> float | None:
    found = [run[key] for run in (row.runs or {}).values() if run.get(key) is not None]
    return statistics.mean(found) if found else None


def _span(values: Any) -> str:
    ends = sorted({min(values, default=0), max(values, default=0)})
    return "–".join(map(str, ends)) if ends[-1] else ""


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _shown(value: object) -> str:
    return "–" if value is None else str(value)
