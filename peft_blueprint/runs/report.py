"""What runs gained for what they spent, beside each other: the figures of a report.

Pure: records in, a record out. Knows nothing of how it is shown, and reads no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import BlueprintError, MismatchError
from .figures import RESOURCES, UNITS, Figure
from .pareto import pareto_front
from .record import Direction, Point, RunRecord, direction_of


WINDOW = 5  # evaluations, as in MarginalReturn


@dataclass(frozen=True)
class Row:
    """One run in a report. What cannot be said is None.

    Args:
        record: the run; its name is unique in the report.
        metric: Ψ, of the last evaluation.
        spent: Γ, of the whole run, with its label.
        first: the metric of the first evaluation.
        first_step: its step; 0 if it was of the untrained model.
        gain: improvement from the first evaluation to the last; positive if better.
        per_resource: capability per resource: gain over what was spent since the first evaluation.
        relative: the same as a multiple of the baseline's.
        ratio: ΔΨ/ΔΓ of the last window, the slope of a line through its evaluations; positive if the metric improved.
        window: evaluations in that window; fewer than asked for if there are no more.
        to_baseline: what it had spent when it was as good as the baseline in the end, between evaluations by a line.
        at_budget: Ψ when it had spent what the baseline spent in all, or at its end if it spent less.
        on_front: whether it is on the Pareto front of (Γ, Ψ); None of a single run, or without either.
        is_baseline: whether the others are compared with it.
    """

    record: RunRecord
    metric: float | None
    spent: Figure
    first: float | None = None
    first_step: int | None = None
    gain: float | None = None
    per_resource: float | None = None
    relative: float | None = None
    ratio: float | None = None
    window: int = 0
    to_baseline: float | None = None
    at_budget: float | None = None
    on_front: bool | None = None
    is_baseline: bool = False

    @property
    def name(self) -> str:
        """Of the run."""
        return self.record.name

    def to_dict(self) -> dict[str, Any]:
        """The figures, as JSON holds them; without the record."""
        values = {name: value for name, value in vars(self).items() if name not in ("record", "spent")}
        totals = {name: self.record.total(name).to_dict() for name in UNITS}
        return {"name": self.name, **values, "spent": self.spent.to_dict(), "totals": totals}


@dataclass(frozen=True)
class Report:
    """Runs beside each other.

    Args:
        metric: Ψ's name.
        direction: whether a smaller or a larger Ψ is better.
        resource: Γ's name, of `figures.UNITS`.
        rows: one for each run, in the order given.
        notes: what a reader has to know to read the figures right.
    """

    metric: str
    direction: Direction
    resource: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def baseline(self) -> Row | None:
        """The run that the others are compared with, if one was named."""
        return next((row for row in self.rows if row.is_baseline), None)

    @property
    def unit(self) -> str:
        """Of the resource."""
        return UNITS[self.resource]

    def to_dict(self) -> dict[str, Any]:
        """The figures, as JSON holds them; without the records."""
        baseline = self.baseline
        return {
            "metric": self.metric,
            "direction": self.direction,
            "resource": self.resource,
            "unit": self.unit,
            "baseline": None if baseline is None else baseline.name,
            "notes": list(self.notes),
            "runs": [row.to_dict() for row in self.rows],
        }


def make_report(
    records: Sequence[RunRecord],
    *,
    baseline: str | None = None,
    resource: str | None = None,
    metric: str | None = None,
    window: int = WINDOW,
) -> Report:
    """Compare runs.

    Args:
        records: at least one. Of those with the same name the second gets " (2)", and so on.
        baseline: name of the run to compare with.
        resource: Γ; by default the baseline's or first run's, or the first that all runs have if they lack that.
        metric: Ψ; by default the runs' own, which must be the same. "loss" finds "eval_loss".
        window: evaluations that the last ratio is taken over, from 2.

    Raises:
        BlueprintError: for no runs, an unknown baseline or resource, or no window.
        MismatchError: if the runs have no such metric in common, or disagree about what is better.
    """
    if not records:
        raise BlueprintError("There is no run to report on. Give one or more folders of runs.")
    if window < 2:
        raise BlueprintError(f"window={window} is no number of evaluations for a ratio: give a whole number from 2.")
    records = _named_apart(records)
    names = [record.name for record in records]
    if baseline is not None and baseline not in names:
        raise BlueprintError(
            f"The baseline {baseline!r} is not among the runs: {', '.join(names)}. Give one of these names, or the "
            "baseline's folder."
        )
    chief = records[0 if baseline is None else names.index(baseline)]
    metric, direction = _metric_of(records, metric)
    resource, notes = _resource_of(records, chief, resource)
    rows = [_row(record, metric, direction, resource, window) for record in records]
    notes += _notes(rows, metric)
    if baseline is not None:
        rows, said = _against(rows, rows[names.index(baseline)], metric, direction, resource)
        notes += said
    if len(rows) > 1:
        front = pareto_front(
            [row.spent.value for row in rows],
            [None if row.metric is None else _sign(direction) * row.metric for row in rows],
        )
        rows = [
            replace(row, on_front=is_on if _is_finite(row.metric) and row.spent.value is not None else None)
            for row, is_on in zip(rows, front, strict=True)
        ]
    return Report(metric, direction, resource, tuple(rows), tuple(notes))


def series(record: RunRecord, resource: str | None, metric: str) -> tuple[tuple[float, float], ...]:
    """(spent, metric) at each evaluation that has both, finite; by step if the resource is None."""
    if resource is not None and not any(resource in point.spent for point in record.points):
        return ()  # only the untrained model would have a place
    pairs = ((_spent_at(point, resource), point.metrics.get(metric)) for point in record.points)
    return tuple((x, y) for x, y in pairs if _is_finite(x) and _is_finite(y))  # type: ignore[misc]


def _spent_at(point: Point, resource: str | None) -> float | None:
    if resource is None:
        return float(point.step)
    return point.spent.get(resource, 0.0 if point.step == 0 else None)


def _row(record: RunRecord, metric: str, direction: Direction, resource: str, window: int) -> Row:
    spent = record.total(resource)
    points = [point for point in record.points if metric in point.metrics]
    if not points:
        return Row(record, None, spent)
    first, last = points[0], points[-1]
    row = Row(record, last.metrics[metric], spent, first.metrics[metric], first.step)
    curve = series(record, resource, metric)
    if not math.isfinite(last.metrics[metric]) or len(points) < 2:
        return row
    if math.isfinite(first.metrics[metric]):
        gain = _sign(direction) * (last.metrics[metric] - first.metrics[metric])
        before = _spent_at(first, resource)
        since = None if spent.value is None or before is None else spent.value - before
        row = replace(row, gain=gain, per_resource=gain / since if since is not None and since > 0 else None)
    last_ones = curve[-window:]
    slope = _slope(last_ones)
    if slope is not None:
        row = replace(row, ratio=_sign(direction) * slope, window=len(last_ones))
    return row


def _against(
    rows: list[Row], base: Row, metric: str, direction: Direction, resource: str
) -> tuple[list[Row], list[str]]:
    """The rows with what compares them to the baseline."""
    compared = [
        replace(
            row,
            is_baseline=row.name == base.name,
            relative=_over(row.per_resource, base.per_resource),
            to_baseline=_reached(row, base.metric, metric, direction, resource),
            at_budget=_at(row, base.spent.value, metric, resource),
        )
        for row in rows
    ]
    if base.per_resource is None:
        return compared, [f"No run is set against {base.name}: what it gained per resource is not known."]
    if base.per_resource <= 0:
        return compared, [f"No multiple of what {base.name} gained can be given: it did not improve."]
    return compared, []


def _reached(row: Row, target: float | None, metric: str, direction: Direction, resource: str) -> float | None:
    """What the run had spent when its metric first was at least as good as the target."""
    if not _is_finite(target):
        return None
    assert target is not None
    curve = series(row.record, resource, metric)
    sign = _sign(direction)
    for i, (x, y) in enumerate(curve):
        if sign * (y - target) >= 0:
            if i == 0:
                return x
            x0, y0 = curve[i - 1]
            return x0 + (x - x0) * (target - y0) / (y - y0)
    return None


def _at(row: Row, budget: float | None, metric: str, resource: str) -> float | None:
    """The metric when so much was spent: between evaluations by a line, after the last one the last one's."""
    curve = series(row.record, resource, metric)
    if budget is None or not curve or budget < curve[0][0]:
        return None
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if x0 <= budget < x1:
            return y0 + (y1 - y0) * (budget - x0) / (x1 - x0)
    return curve[-1][1]


def _metric_of(records: Sequence[RunRecord], wanted: str | None) -> tuple[str, Direction]:
    if wanted is None:
        for record in records[1:]:
            if record.metric != records[0].metric:
                raise MismatchError(
                    f"{records[0].name} was judged by {records[0].metric} and {record.name} by {record.metric}, which "
                    f"do not compare. {_common(records)}"
                )
        wanted = records[0].metric
    elif not any(wanted in point.metrics for record in records for point in record.points):
        wanted = f"eval_{wanted}"
    lacking = [r for r in records if r.points and all(wanted not in point.metrics for point in r.points)]
    if lacking:
        have = sorted({name for point in lacking[0].points for name in point.metrics})
        raise MismatchError(
            f"{lacking[0].name} has no {wanted}; it has {', '.join(have) or 'no metric'}. {_common(records)}"
        )
    said = {record.name: record.direction for record in records if record.metric == wanted}
    if len(set(said.values())) > 1:
        raise MismatchError(
            f"The runs disagree about which {wanted} is better: "
            f"{', '.join(f'{name} says {direction}' for name, direction in said.items())}. Correct `direction` in one "
            "of the records."
        )
    return wanted, next(iter(said.values()), direction_of(wanted))


def _common(records: Sequence[RunRecord]) -> str:
    shared = set.intersection(*({name for point in r.points for name in point.metrics} for r in records))
    if shared:
        return f"Give one that all have: --metric {' or '.join(sorted(shared))}."
    return "They have no metric in common: report on them one by one."


def _resource_of(records: Sequence[RunRecord], chief: RunRecord, wanted: str | None) -> tuple[str, list[str]]:
    if wanted is not None:
        if wanted not in UNITS:
            raise BlueprintError(f"The resource {wanted!r} is not known: give one of {', '.join(UNITS)}.")
        return wanted, []
    common = [name for name in RESOURCES if all(record.total(name).value is not None for record in records)]
    if chief.resource in common or not common:
        return chief.resource, []
    return common[0], [
        f"Compared by {common[0]}, the first resource that all runs have: not all have {chief.resource}, by which "
        f"{chief.name} was judged."
    ]


def _notes(rows: Sequence[Row], metric: str) -> list[str]:
    notes = []
    models = list(dict.fromkeys(str(model) for row in rows if (model := row.record.about.get("model_id"))))
    if len(models) > 1:
        notes.append(
            f"The runs are of different models ({', '.join(models)}): what they spent compares, their gains less so."
        )
    for row in rows:
        if row.metric is None:
            has = f" with {metric}" if row.record.points else ""
            notes.append(
                f"{row.name} has no evaluation{has}: its training log has {len(row.record.losses)} entries, and what it "
                "gained is not known. Train with eval_strategy='steps'."
            )
        elif not math.isfinite(row.metric):
            notes.append(f"The last {metric} of {row.name} is not a finite number: it diverged.")
        elif row.gain is None and sum(metric in point.metrics for point in row.record.points) > 1:
            notes.append(
                f"The first {metric} of {row.name} is not a finite number: from where it improved is not known."
            )
        elif row.gain is None:
            notes.append(
                f"{row.name} was evaluated only once: from where it improved is not known. Evaluate before training too."
            )
    late = [row for row in rows if row.gain is not None and row.first_step]
    if late:
        named = ", ".join(f"{row.name} (step {row.first_step})" for row in late)
        notes.append(
            f"Gains count from the first evaluation, which is not of the untrained model in {named}. "
            "eval_on_start=True makes it so."
        )
    for key, act in (("probe", "measuring a blueprint"), ("start", "beginning along the gradient")):
        if charged := [row.name for row in rows if row.record.about.get(key)]:
            notes.append(f"What {act} spent before training is charged to {', '.join(charged)}.")
    theirs = [row.name for row in rows if row.spent.source.startswith("the Trainer's")]
    if 0 < len(theirs) < len(rows):
        notes.append(
            f"What {', '.join(theirs)} spent is the Trainer's own count, and that of the others the ledger's: they compare "
            "roughly."
        )
    labels = {row.spent.how for row in rows} - {"absent"}
    if len(labels) > 1:
        modelled = ", ".join(row.name for row in rows if row.spent.how == "modelled")
        notes.append(f"What was spent is modelled, not measured, in {modelled}.")
    return notes


def _named_apart(records: Sequence[RunRecord]) -> list[RunRecord]:
    taken: set[str] = set()
    result = []
    for record in records:
        name, count = record.name, 1
        while name in taken:
            count += 1
            name = f"{record.name} ({count})"
        taken.add(name)
        result.append(record if name == record.name else replace(record, name=name))
    return result


def _slope(curve: Sequence[tuple[float, float]]) -> float | None:
    """Of the line of least squares; None if all is at one place."""
    if len(curve) < 2:
        return None
    x0, y0 = (math.fsum(values) / len(curve) for values in zip(*curve, strict=True))
    spread = math.fsum((x - x0) ** 2 for x, _ in curve)
    return math.fsum((x - x0) * (y - y0) for x, y in curve) / spread if spread > 0 else None


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b is not None and b > 0 else None


def _sign(direction: Direction) -> int:
    return -1 if direction == "minimize" else 1


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
