"""Describe a report in words: a run in one sentence, a comparison, the decision to stop."""

from __future__ import annotations

import math

from ..runs import UNITS, Quantity, Report, Row, format_number, format_quantity


RESOURCE_NAMES = {
    "seconds": "time",
    "device_hours": "device-hours",
    "tokens": "tokens",
    "flops": "FLOPs",
    "memory_gb_hours": "memory × time",
    "energy_joules": "energy",
    "carbon_grams": "CO₂ equivalent",
    "peak_bytes": "peak memory",
    "optimizer_bytes": "optimizer states",
}
ABSENT = "–"

_ONE = {"tokens": "token", "s": "second", "device-h": "device-hour", "J": "joule", "g CO2e": "g CO₂e"}


def format_score(value: float | None) -> str:
    """Format a metric with four digits, trailing zeros included so that columns align; `–` for None.

    Example:
        >>> format_score(1.5), format_score(None)
        ('1.500', '–')
    """
    if value is not None and math.isfinite(value) and 1e-3 <= abs(value) < 1000:
        return f"{value:#.4g}"
    return format_number(value)


def format_labelled(quantity: Quantity, resource: str) -> str:
    """Format an amount with its label, such as `7 min 3 s (measured)`, or as `absent`."""
    if quantity.value is None:
        return "absent"
    return f"{format_quantity(quantity.value, resource)} ({quantity.how})"


def format_rate(value: float | None, resource: str) -> str:
    """Format an improvement per unit of a resource, such as `0.0012 per second`; `–` for None."""
    return ABSENT if value is None else f"{format_number(value)} {per_unit(resource)}"


def format_multiple(value: float | None) -> str:
    """Format a ratio, such as `1.80 ×`; `–` for None."""
    return ABSENT if value is None else f"{value:.2f} ×" if abs(value) < 100 else f"{value:,.0f} ×"


def per_unit(resource: str) -> str:
    """Return `per` and the resource's unit.

    Example:
        >>> per_unit("seconds")
        'per second'
    """
    unit = UNITS[resource]
    return f"per {_ONE.get(unit, unit)}"


def headline(report: Report) -> str:
    """Say in one or two sentences what the runs gained for what they spent.

    Example:
        >>> from peft_blueprint.runs import RunRecord, make_report, measured
        >>> run = RunRecord("lora", "eval_loss", "minimize", "seconds", totals={"seconds": measured(60.0, "clock")})
        >>> headline(make_report([run]))
        'lora was not evaluated, so its gain is unknown. It spent 60 s (measured).'
    """
    base = report.baseline
    others = [row for row in report.rows if not row.is_baseline]
    if base is None or not others:
        improved = [row for row in report.rows if row.gain is not None]
        if len(report.rows) == 1 or not improved:
            return describe_run(report.rows[0], report)
        best = max(improved, key=lambda row: row.gain or 0.0)
        return f"The largest gain of {len(report.rows)} runs: {describe_run(best, report)}"
    compared = [row for row in others if row.relative is not None]
    if not compared:
        return describe_run(others[0], report)
    best = max(compared, key=lambda row: row.relative or 0.0)
    resource = report.resource
    said = (
        f"{best.name} improved {report.metric} {format_multiple(best.relative)} as much {per_unit(resource)} as "
        f"{base.name}."
    )
    if best.to_baseline is not None and base.spent.value:
        said += (
            f" It reached the final {report.metric} of {base.name} after {format_quantity(best.to_baseline, resource)}, "
            f"{100 * best.to_baseline / base.spent.value:.0f} % of that run's {RESOURCE_NAMES[resource]}."
        )
    elif best.metric is not None and base.metric is not None:
        said += f" It ended at {format_score(best.metric)}, and {base.name} at {format_score(base.metric)}."
    return said


def describe_run(row: Row, report: Report) -> str:
    """Say in one sentence what a run reached and what it spent."""
    if row.spent.value is None:
        spent, cost = "", f" Its {RESOURCE_NAMES[report.resource]} is unknown."
    else:
        amount = format_labelled(row.spent, report.resource)
        spent, cost = f" for {amount}", f" It spent {amount}."
    if row.metric is None:
        return f"{row.name} was not evaluated, so its gain is unknown.{cost}"
    if not math.isfinite(row.metric):
        return f"{row.name} diverged: its last {report.metric} is not a finite number.{cost}"
    unknown = "" if spent else cost
    if row.gain is None or row.first is None:
        return f"{row.name} reached {report.metric} {format_score(row.metric)}{spent}.{unknown}"
    change = "rose" if row.metric > row.first else "fell" if row.metric < row.first else "stayed"
    start = "before training" if row.first_step == 0 else f"at step {row.first_step:,}"
    verdict = "" if row.gain > 0 else ": no gain" if row.gain == 0 else ": it got worse"
    return (
        f"{row.name}: {report.metric} {change} from {format_score(row.first)} {start} to {format_score(row.metric)}{spent}"
        f"{verdict}.{unknown}"
    )


def describe_stop(row: Row) -> list[str]:
    """Return the stopping rule's decision, its reason and its proposal as sentences; none for a run without a rule."""
    stopping = row.record.stopping
    if not stopping:
        return []
    step = stopping.get("step")
    if not stopping.get("stopped"):
        decision = "Not stopped by the rule."
    else:
        decision = f"Stopped at step {step:,}." if isinstance(step, int) else "Stopped."
    texts = (stopping.get(key) for key in ("reason", "proposal"))
    return [decision, *(text.strip() for text in texts if isinstance(text, str) and text.strip())]
