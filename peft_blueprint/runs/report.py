"""Compare the gains and costs of runs, as the tables of a report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .._text import data_frame, html_table
from ..errors import BlueprintError, MismatchError
from .quantity import RESOURCES, UNITS, Direction, Quantity
from .record import Point, RunRecord, direction_of


STDERR = "_stderr"  # ends the name of a metric's standard error, as in lm-evaluation-harness
WINDOW = 5  # evaluations, as in MarginalReturn


@dataclass(frozen=True)
class Row:
    """One run in a report. Values that are not known are None.

    Args:
        record: the run; its name is unique in the report.
        metric: Ψ, the metric at the last evaluation.
        spent: Γ, the amount of the resource that the whole run spent.
        first: the metric at the first evaluation.
        first_step: step of the first evaluation; 0 for the untrained model.
        gain: improvement from the first to the last evaluation; positive if the metric improved.
        per_resource: gain divided by the resource spent since the first evaluation.
        relative: `per_resource` as a multiple of the baseline's.
        ratio: ΔΨ/ΔΓ over the last window, the slope of a fitted line; positive if the metric improved.
        window: evaluations in that window; fewer than asked for if there are no more.
        to_baseline: resource spent when it reached the baseline's last metric, interpolated between evaluations.
        at_budget: Ψ when it had spent the baseline's total, or at its end if it spent less.
        on_front: whether it is on the Pareto front of (Γ, Ψ); None for a single run or without Γ or Ψ.
        is_baseline: whether the others are compared with it.
        error: standard error of `metric`, from `METRIC_stderr` of the same evaluation.
    """

    record: RunRecord
    metric: float | None
    spent: Quantity
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
    error: float | None = None

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.record.name

    def to_dict(self) -> dict[str, Any]:
        """Return the values as a JSON object, without the record."""
        values = {name: value for name, value in vars(self).items() if name not in ("record", "spent")}
        totals = {name: self.record.total(name).to_dict() for name in UNITS}
        return {"name": self.name, **values, "spent": self.spent.to_dict(), "totals": totals}


@dataclass(frozen=True)
class Report:
    """A comparison of runs.

    Args:
        metric: name of Ψ.
        direction: whether a lower or a higher Ψ is better.
        resource: name of Γ in `UNITS`.
        rows: one per run, in the order given.
        notes: caveats for the reader.

    Example:
        >>> points = Point(0, {}, {"loss": 3.0}), Point(9, {"seconds": 9.0}, {"loss": 2.1})
        >>> report = make_report([RunRecord("a", "loss", "minimize", "seconds", points=points)])
        >>> report, round(report.rows[0].gain, 6)
        (<Report of 1 run: loss by seconds>, 0.9)
    """

    metric: str
    direction: Direction
    resource: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def baseline(self) -> Row | None:
        """The run that the others are compared with; None if none was named."""
        return next((row for row in self.rows if row.is_baseline), None)

    @property
    def unit(self) -> str:
        """Unit of the resource."""
        return UNITS[self.resource]

    def __repr__(self) -> str:
        """One line: the runs, their metric and their resource; `to_dict` has all of it."""
        count = f"{len(self.rows)} run{'s' * (len(self.rows) != 1)}"
        return f"<Report of {count}: {self.metric} by {self.resource}>"

    def _rows(self) -> list[dict[str, Any]]:
        kept = ("metric", "first", "gain", "per_resource", "relative", "ratio", "to_baseline", "at_budget")
        spent = {row.name: {unit: row.record.total(unit).value for unit in UNITS} for row in self.rows}
        return [
            {"run": row.name, **{name: getattr(row, name) for name in kept}, **spent[row.name]} for row in self.rows
        ]

    def _repr_html_(self) -> str:
        """Show the runs in a notebook."""
        return html_table(repr(self)[1:-1], self._rows())

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with a row for every run: the metric, its gain, and the amounts spent.

        Raises:
            BlueprintError: without pandas.
        """
        return data_frame(self._rows())

    def plot(self, resource: str | None = None) -> Any:
        """Draw the metric against the resource spent, see `publish.plot_report`.

        Returns:
            A matplotlib figure, which a notebook shows.
        """
        from ..publish import plot_report  # a room above, as in Blueprint.plot

        return plot_report(self, resource)

    def to_dict(self) -> dict[str, Any]:
        """Return the values as a JSON object, without the records."""
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
        records: at least one. A second run of the same name becomes "name (2)".
        baseline: name of the run to compare with.
        resource: Γ; by default that of the baseline or first run, or the first resource that all runs have.
        metric: Ψ; by default the runs' own metric, which must be the same. "loss" also finds "eval_loss".
        window: evaluations in the last ratio, at least 2.

    Raises:
        BlueprintError: for no runs, an unknown baseline or resource, or a window below 2.
        MismatchError: if the runs have no such metric in common, or disagree about its direction.

    Example:
        >>> run = RunRecord("a", "loss", "minimize", "seconds", {"seconds": Quantity(9.0, "measured")},
        ...     (Point(0, {}, {"loss": 3.0}), Point(9, {"seconds": 9.0}, {"loss": 2.1})))
        >>> round(make_report([run]).rows[0].per_resource, 6)
        0.1
    """
    if not records:
        raise BlueprintError("records must hold at least one run, got none. Give a run's folder.")
    if window < 2:
        raise BlueprintError(f"window must be at least 2 evaluations, got {window}.")
    records = _named_apart(records)
    names = [record.name for record in records]
    if baseline is not None and baseline not in names:
        raise BlueprintError(f"baseline must be one of the runs {', '.join(names)}, or its folder, got {baseline!r}.")
    chief = records[0 if baseline is None else names.index(baseline)]
    metric, direction = _metric_of(records, metric)
    resource, notes = _resource_of(records, chief, resource)
    rows = [_row(record, metric, direction, resource, window) for record in records]
    notes += _notes(rows, metric)
    if baseline is not None:
        rows, more = _against(rows, rows[names.index(baseline)], metric, direction, resource)
        notes += more
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
    """Return (spent, metric) of each evaluation that has both, finite; (step, metric) if the resource is None.

    Example:
        >>> points = (Point(0, {}, {"loss": 3.0}), Point(9, {"seconds": 6.0}, {"loss": 2.1}))
        >>> series(RunRecord("a", "loss", "minimize", "seconds", points=points), "seconds", "loss")
        ((0.0, 3.0), (6.0, 2.1))
    """
    return tuple((x, y) for x, y, _ in series_with_errors(record, resource, metric))


def series_with_errors(
    record: RunRecord, resource: str | None, metric: str
) -> tuple[tuple[float, float, float | None], ...]:
    """Return what `series` does, and the metric's standard error at each evaluation; None where it has none.

    Example:
        >>> points = (Point(9, {"seconds": 6.0}, {"loss": 2.1, "loss_stderr": 0.1}),)
        >>> series_with_errors(RunRecord("a", "loss", "minimize", "seconds", points=points), "seconds", "loss")
        ((6.0, 2.1, 0.1),)
    """
    if resource is not None and not any(resource in point.spent for point in record.points):
        return ()  # otherwise the untrained model alone would have a point
    found = ((_spent_at(point, resource), point.metrics.get(metric), point) for point in record.points)
    return tuple((x, y, error_at(p, metric)) for x, y, p in found if _is_finite(x) and _is_finite(y))  # type: ignore[misc]


def error_at(point: Point, metric: str) -> float | None:
    """Return the standard error of a metric at an evaluation, under the metric's name with `_stderr`; None without one.

    Example:
        >>> error_at(Point(9, {}, {"loss": 2.1, "loss_stderr": 0.1}), "loss")
        0.1
    """
    error = point.metrics.get(f"{metric}{STDERR}")
    return error if _is_finite(error) else None


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
    row = Row(record, last.metrics[metric], spent, first.metrics[metric], first.step, error=error_at(last, metric))
    curve = series(record, resource, metric)
    if not math.isfinite(last.metrics[metric]) or len(points) < 2:
        return row
    if math.isfinite(first.metrics[metric]):
        gain = _sign(direction) * (last.metrics[metric] - first.metrics[metric])
        before = _spent_at(first, resource)
        since = None if spent.value is None or before is None else spent.value - before
        row = replace(row, gain=gain, per_resource=gain / since if since is not None and since > 0 else None)
    last_points = curve[-window:]
    slope = _slope(last_points)
    if slope is not None:
        row = replace(row, ratio=_sign(direction) * slope, window=len(last_points))
    return row


def _against(
    rows: list[Row], base: Row, metric: str, direction: Direction, resource: str
) -> tuple[list[Row], list[str]]:
    """Add the comparison with the baseline to the rows; returns notes too."""
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
        return compared, [f"Runs are not compared with {base.name}: its gain per resource is unknown."]
    if base.per_resource <= 0:
        return compared, [f"Gains are not relative to {base.name}, which did not improve."]
    return compared, []


def _reached(row: Row, target: float | None, metric: str, direction: Direction, resource: str) -> float | None:
    """Return the resource spent when the metric first reached the target."""
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
    """Return the metric at a budget, interpolated between evaluations; after the last one, its metric."""
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
                    f"The runs must have the same metric, got {records[0].metric} for {records[0].name} and "
                    f"{record.metric} for {record.name}. {_common(records)}"
                )
        wanted = records[0].metric
    elif not any(wanted in point.metrics for record in records for point in record.points):
        wanted = f"eval_{wanted}"
    without = [r for r in records if r.points and all(wanted not in point.metrics for point in r.points)]
    if without:
        have = sorted({name for point in without[0].points for name in point.metrics})
        raise MismatchError(
            f"{without[0].name} has no {wanted}; it has {', '.join(have) or 'no metric'}. {_common(records)}"
        )
    directions = {record.name: record.direction for record in records if record.metric == wanted}
    if len(set(directions.values())) > 1:
        raise MismatchError(
            f"The runs disagree about the direction of {wanted}: "
            f"{', '.join(f'{name} has {direction}' for name, direction in directions.items())}. Correct `direction` in "
            "one of the records."
        )
    return wanted, next(iter(directions.values()), direction_of(wanted))


def _common(records: Sequence[RunRecord]) -> str:
    shared = set.intersection(*({name for point in r.points for name in point.metrics} for r in records))
    if shared:
        return f"Choose one that all have: --metric {' or '.join(sorted(shared))}."
    return "They have no metric in common; report on them one by one."


def _resource_of(records: Sequence[RunRecord], chief: RunRecord, wanted: str | None) -> tuple[str, list[str]]:
    if wanted is not None:
        if wanted not in UNITS:
            raise BlueprintError(f"resource must be one of {', '.join(UNITS)}, got {wanted!r}.")
        return wanted, []
    common = [name for name in RESOURCES if all(record.total(name).value is not None for record in records)]
    if chief.resource in common or not common:
        return chief.resource, []
    return common[0], [
        f"Compared by {common[0]}, the first resource that all runs have. {chief.name} was judged by {chief.resource}, "
        "which not all have."
    ]


def _notes(rows: Sequence[Row], metric: str) -> list[str]:
    notes = []
    models = list(dict.fromkeys(str(model) for row in rows if (model := row.record.about.get("model_id"))))
    if len(models) > 1:
        notes.append(
            f"The runs are of different models ({', '.join(models)}): their costs are comparable, their gains less so."
        )
    for row in rows:
        if row.metric is None:
            has = f" with {metric}" if row.record.points else ""
            notes.append(
                f"{row.name} has no evaluation{has}, only {len(row.record.losses)} entries in its training log, so its "
                "gain is not known. Train with eval_strategy='steps'."
            )
        elif not math.isfinite(row.metric):
            notes.append(f"The last {metric} of {row.name} is not finite: the run diverged.")
        elif row.gain is None and sum(metric in point.metrics for point in row.record.points) > 1:
            notes.append(f"The first {metric} of {row.name} is not finite, so its gain is unknown.")
        elif row.gain is None:
            notes.append(f"{row.name} was evaluated only once, so its gain is unknown. Evaluate before training too.")
    late = [row for row in rows if row.gain is not None and row.first_step]
    if late:
        names = ", ".join(f"{row.name} (step {row.first_step})" for row in late)
        notes.append(
            f"Gains count from the first evaluation, which is not of the untrained model in {names}. Use "
            "eval_on_start=True."
        )
    for key, act in (("probe", "measuring a blueprint"), ("start", "initializing along the gradient")):
        if charged := [row.name for row in rows if row.record.about.get(key)]:
            notes.append(f"The cost of {act} before training is charged to {', '.join(charged)}.")
    trainers = [row.name for row in rows if row.spent.source.startswith("the Trainer's")]
    if 0 < len(trainers) < len(rows):
        notes.append(
            f"The Trainer counted what {', '.join(trainers)} spent, the ledger what the others spent: the comparison is "
            "approximate."
        )
    if len({row.spent.how for row in rows} - {"absent"}) > 1:
        modelled = ", ".join(row.name for row in rows if row.spent.how == "modelled")
        notes.append(f"The resource spent is modelled, not measured, in {modelled}.")
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


def pareto_front(costs: Sequence[float | None], worths: Sequence[float | None]) -> tuple[bool, ...]:
    """Tell which (cost, worth) pairs are on the Pareto front: no other pair is as good in both and better in one.

    Equal pairs are on the front together. A pair with a number that is missing or not finite is on no front.

    Args:
        costs: one per run; lower is better.
        worths: one per run; higher is better.

    Example:
        >>> pareto_front([1.0, 2.0, 3.0], [0.5, 0.4, 0.9])
        (True, False, True)
    """
    known = [
        (cost, -worth, i)
        for i, (cost, worth) in enumerate(zip(costs, worths, strict=True))
        if cost is not None and worth is not None and math.isfinite(cost) and math.isfinite(worth)
    ]
    front = set()
    best = (math.inf, math.inf)  # negated worth and cost of the best pair so far
    for cost, negated, i in sorted(known):
        if negated < best[0] or (negated, cost) == best:
            front.add(i)
            best = negated, cost
    return tuple(i in front for i in range(len(costs)))


def _slope(curve: Sequence[tuple[float, float]]) -> float | None:
    """Return the slope of the least-squares line; None for fewer than two different x, or beyond the range of floats."""
    try:
        slope = statistics.linear_regression([x for x, _ in curve], [y for _, y in curve]).slope
    except (ValueError, OverflowError):  # StatisticsError is the former
        return None
    return slope if math.isfinite(slope) else None


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b is not None and b > 0 else None


def _sign(direction: Direction) -> int:
    return -1 if direction == "minimize" else 1


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
