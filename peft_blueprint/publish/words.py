"""Describe a report in words: a run in one sentence, a comparison, the decision to stop."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..runs import (
    RESOURCES,
    Quantity,
    Report,
    Row,
    RunRecord,
    format_number,
    format_quantity,
    is_finite_number,
    unit_for,
)
from .metadata import is_hub_id


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

_ONE = {"s": "second", "min": "minute", "h": "hour", "device-h": "device-hour", "tokens": "token"}
_SKIPPED = ("model_id", "eval_strategy", "eval_steps", "logging_steps", "save_steps", "metric_for_best_model") + (
    "greater_is_better",
    "data_seed",
)
_ADAPTER = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "use_rslora", "use_dora", "init_lora_weights", "bias")
_PARTS = {"probe": "measuring", "start": "initialization", "selection": "data selection"}


def format_score(value: float | None, error: float | None = None) -> str:
    """Format a metric with four digits, trailing zeros included so that columns align; `–` for None.

    Args:
        value: the metric.
        error: its standard error.

    Example:
        >>> format_score(1.5), format_score(2.7631, 0.0514), format_score(None)
        ('1.500', '2.763 ± 0.051', '–')
    """
    if error is not None:
        return f"{format_score(value)} ± {error:.2g}"
    if value is not None and math.isfinite(value) and 1e-3 <= abs(value) < 1000:
        return f"{value:#.4g}"
    return format_number(value)


def format_labelled(quantity: Quantity, resource: str) -> str:
    """Format an amount with its label, such as `7 min 3 s (measured)`, or as `absent`."""
    if quantity.value is None:
        return "absent"
    return f"{format_quantity(quantity.value, resource)} ({quantity.how})"


def format_rate(value: float | None, report: Report) -> str:
    """Format an improvement per unit of the report's resource, such as `0.0012 per minute`; `–` for None."""
    return ABSENT if value is None else f"{format_number(rate(value, report))} {per_unit(report)}"


def rate(value: float | None, report: Report) -> float | None:
    """Convert an improvement per base unit of the resource, as in `Row`, to that per `per_unit`.

    Example:
        >>> from peft_blueprint.runs import RunRecord, make_report, measured
        >>> run = RunRecord("lora", "eval_loss", "minimize", "seconds", totals={"seconds": measured(605.0, "clock")})
        >>> rate(0.002, make_report([run]))  # of a second, to that of a minute
        0.12
    """
    return None if value is None else value * _unit(report)[0]


def format_multiple(value: float | None) -> str:
    """Format a ratio, such as `1.80 ×`; `–` for None.

    Example:
        >>> format_multiple(1.8), format_multiple(None)
        ('1.80 ×', '–')
    """
    return ABSENT if value is None else f"{value:.2f} ×" if abs(value) < 100 else f"{value:,.0f} ×"


def per_unit(report: Report) -> str:
    """Return `per` and the unit of the resource that suits the amounts spent.

    Example:
        >>> from peft_blueprint.runs import RunRecord, make_report, measured
        >>> run = RunRecord("lora", "eval_loss", "minimize", "seconds", totals={"seconds": measured(605.0, "clock")})
        >>> per_unit(make_report([run]))
        'per minute'
    """
    name = _unit(report)[1]
    return f"per {_ONE.get(name, name)}"


def _unit(report: Report) -> tuple[float, str]:
    return unit_for(max((row.spent.value or 0.0 for row in report.rows), default=0.0), report.resource)


def parts_of(record: RunRecord, resource: str) -> list[str]:
    """Return the parts of a total beside training: work before it, evaluating, saving.

    Example:
        >>> about = {"probe": {"seconds": {"value": 40.0}}, "seconds_of_which": {"evaluating": 12.0, "saving": 0.0}}
        >>> parts_of(RunRecord("lora", "eval_loss", "minimize", "seconds", about=about), "seconds")
        ['measuring 40 s', 'evaluating 12 s']
    """
    keys = _PARTS if resource in RESOURCES else {}  # peaks do not add up
    parts = {name: record.about.get(key) for key, name in keys.items()}
    amounts = {name: part.get(resource) for name, part in parts.items() if isinstance(part, Mapping)}
    values = {name: part.get("value") for name, part in amounts.items() if isinstance(part, Mapping)}
    during = record.about.get("seconds_of_which")
    if resource == "seconds" and isinstance(during, Mapping):
        values |= {name: during.get(name) for name in ("evaluating", "saving")}
    return [
        f"{name} {format_quantity(value, resource)}"
        for name, value in values.items()
        if is_finite_number(value) and value > 0
    ]


def model_name(record: RunRecord) -> str:
    """Return the model's id, of a local folder only the name; empty if it is not known."""
    name = record.about.get("model_id")
    if not isinstance(name, str) or not name.strip():
        return ""
    return name if is_hub_id(name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def hyperparameters(record: RunRecord) -> dict[str, str]:
    """Return a run's hyperparameters as text by name, as far as its record has them; those that are off are left out.

    Example:
        >>> about = {"train_config": {"learning_rate": 1e-3, "max_steps": -1, "fp16": False}, "peft_config": {"r": 8}}
        >>> hyperparameters(RunRecord("lora", "eval_loss", "minimize", "seconds", about=about))
        {'learning_rate': '0.001', 'r': '8'}
    """
    found: dict[str, Any] = {}
    for part, skipped in (("train_config", _SKIPPED), ("peft_config", None)):
        config = record.about.get(part)
        for name, value in config.items() if isinstance(config, Mapping) else ():
            is_known = name not in skipped if skipped is not None else name in _ADAPTER
            is_default = name == "init_lora_weights" and value is True
            if is_known and not is_default and value not in (None, False, {}, [], "", -1, "none"):
                found[name] = value
    if "max_steps" in found:
        found.pop("num_train_epochs", None)  # max_steps overrides it
    if record.about.get("seed") is not None:
        found["seed"] = record.about["seed"]
    ranks = found.get("rank_pattern")
    if isinstance(ranks, Mapping):
        found["rank_pattern"] = f"{len(ranks)} modules with a rank of their own"
    for count in ("trainable_parameters", "total_parameters"):
        if type(value := record.about.get(count)) is int:
            found[count.replace("_", " ")] = f"{value:,}"
    return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in found.items()}


def headline(report: Report) -> str:
    """Describe the gains and costs of the runs in one or two sentences.

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
    said = f"{best.name} improved {report.metric} {format_multiple(best.relative)} as much {per_unit(report)} as {base.name}."
    if best.to_baseline is not None and base.spent.value:
        said += (
            f" It reached the final {report.metric} of {base.name} after {format_quantity(best.to_baseline, resource)}, "
            f"{100 * best.to_baseline / base.spent.value:.0f} % of that run's {RESOURCE_NAMES[resource]}."
        )
    elif best.metric is not None and base.metric is not None:
        said += (
            f" It ended at {format_score(best.metric, best.error)}, and {base.name} at "
            f"{format_score(base.metric, base.error)}."
        )
    return said


def describe_run(row: Row, report: Report) -> str:
    """Describe a run's final metric and its cost in one sentence."""
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
    """Return the stopping rule's decision, its reason and its proposal as sentences; none for a run without a rule.

    Example:
        >>> from peft_blueprint.runs import RunRecord, make_report
        >>> stopping = {"stopped": True, "step": 600, "reason": "Below the threshold."}
        >>> run = RunRecord("lora", "eval_loss", "minimize", "seconds", stopping=stopping)
        >>> describe_stop(make_report([run]).rows[0])
        ['Stopped at step 600.', 'Below the threshold.']
    """
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
