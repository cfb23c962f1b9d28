"""What a report says in words: quantities for people, a run in a sentence, the decision to stop.

Knows nothing of pages, cards or terminals.
"""

from __future__ import annotations

import math

from ..runs import UNITS, Figure, Report, Row


NAMES = {
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

_PREFIXES = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BINARY = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_SPELLED = {"device_hours": "device-hours", "tokens": "tokens", "memory_gb_hours": "GB h"}


def quantity(value: float | None, name: str) -> str:
    """An amount of something of `UNITS`, as a person reads it: `12 min 5 s`, `3.2 PFLOP`, `1.4 GiB`."""
    if value is None:
        return ABSENT
    if name == "seconds":
        return _duration(value)
    if name.endswith("_bytes"):
        size, unit = next(((s, u) for s, u in _BINARY if abs(value) >= s), (1, "B"))
        return f"{_amount(value / size)} {unit}"
    if name in ("flops", "energy_joules", "tokens"):
        unit = {"flops": "FLOP", "energy_joules": "J", "tokens": ""}[name]
        prefixes = _PREFIXES[-3:] if name == "tokens" else _PREFIXES
        factor, prefix = next(((s, p) for s, p in prefixes if abs(value) >= s), (1.0, ""))
        spelled = {"": "", "k": "thousand", "M": "million", "G": "billion"}
        unit = f"{spelled[prefix]} tokens".strip() if name == "tokens" else prefix + unit
        return f"{_amount(value / factor)} {unit}"
    if name == "carbon_grams":
        return f"{_amount(value / 1000)} kg CO₂e" if value >= 1000 else f"{_amount(value)} g CO₂e"
    return f"{_amount(value)} {_SPELLED.get(name, UNITS.get(name, ''))}".strip()


def number(value: float | None) -> str:
    """Three or four digits that count, without exponents where it reads better; `–` for none."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        text = f"{value:.4g}"
        return text if "e" not in text else f"{value:.0f}"
    if 1e4 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa} × 10{_raised(int(exponent))}"


def score(value: float | None) -> str:
    """A metric: four digits, its last zeros too, so that a column reads well; `–` for none."""
    if value is not None and math.isfinite(value) and 1e-3 <= abs(value) < 1000:
        return f"{value:#.4g}"
    return number(value)


def labelled(figure: Figure, name: str) -> str:
    """A total with its label, such as `412 s (measured)`, or `absent`."""
    return "absent" if figure.value is None else f"{quantity(figure.value, name)} ({figure.how})"


def per(resource: str) -> str:
    """`per second`, of the resource's unit."""
    return f"per {_one(UNITS[resource])}"


def rate(value: float | None, unit: str) -> str:
    """An improvement per unit of a resource."""
    return ABSENT if value is None else f"{number(value)} per {_one(unit)}"


def times(value: float | None) -> str:
    """A multiple, such as `1.8 ×`."""
    return ABSENT if value is None else f"{value:.2f} ×" if abs(value) < 100 else f"{value:,.0f} ×"


def headline(report: Report) -> str:
    """What was gained for what was spent, in one or two sentences."""
    base = report.baseline
    others = [row for row in report.rows if not row.is_baseline]
    if base is None or not others:
        known = [row for row in report.rows if row.gain is not None]
        if len(report.rows) == 1 or not known:
            return sentence(report.rows[0], report)
        best = max(known, key=lambda row: row.gain or 0.0)
        return f"The largest gain of {len(report.rows)} runs: {sentence(best, report)}"
    known = [row for row in others if row.relative is not None]
    if not known:
        return sentence(others[0], report)
    best = max(known, key=lambda row: row.relative or 0.0)
    what = NAMES[report.resource]
    compared = f"In {report.metric}, {best.name} gained {times(best.relative)} as much per {_one(report.unit)} as {base.name}."
    if best.to_baseline is not None and base.spent.value:
        share = best.to_baseline / base.spent.value
        compared += (
            f" It was as good as {base.name} in the end after {quantity(best.to_baseline, report.resource)}, "
            f"{100 * share:.0f} % of that run's {what}."
        )
    elif best.metric is not None and base.metric is not None:
        compared += f" It ended at {score(best.metric)}, and {base.name} at {score(base.metric)}."
    return compared


def sentence(row: Row, report: Report) -> str:
    """One run: from where to where, for how much."""
    spent = _for(row, report)
    if row.metric is None:
        return f"{row.name} has no evaluation to say what was gained{spent}."
    if not math.isfinite(row.metric):
        return f"{row.name} diverged: its last {report.metric} is not a finite number{spent}."
    if row.gain is None or row.first is None:
        return f"{row.name} reached {report.metric} {score(row.metric)}{spent}."
    went = "rose" if row.metric > row.first else "fell" if row.metric < row.first else "stayed"
    since = "of the untrained model" if row.first_step == 0 else f"at step {row.first_step:,}"
    verdict = "" if row.gain > 0 else ": no gain" if row.gain == 0 else ": it got worse"
    return (
        f"{row.name}: {report.metric} {went} from {score(row.first)} {since} to {score(row.metric)}{spent}{verdict}."
    )


def stopping_words(row: Row) -> list[str]:
    """The decision to stop, or not to, and why; empty for a run without a rule."""
    found = row.record.stopping
    if not found:
        return []
    step = found.get("step")
    if found.get("stopped"):
        said = [f"Stopped at step {step:,}." if isinstance(step, int) else "Stopped."]
    else:
        said = ["Not stopped by the rule."]
    for key in ("reason", "proposal"):
        text = found.get(key)
        if isinstance(text, str) and text.strip():
            said.append(text.strip())
    return said


def _for(row: Row, report: Report) -> str:
    if row.spent.value is None:
        return f"; what it spent in {NAMES[report.resource]} is absent"
    return f" for {labelled(row.spent, report.resource)}"


def _duration(seconds: float) -> str:
    if abs(seconds) < 120:
        return f"{_amount(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _amount(value: float) -> str:
    """Three digits that count."""
    return f"{value:.3g}" if 1e-3 <= abs(value) < 999.5 else number(round(value) if abs(value) >= 1 else value)


def _one(unit: str) -> str:
    return {"tokens": "token", "s": "second", "device-h": "device-hour", "J": "joule", "g CO2e": "g CO₂e"}.get(
        unit, unit
    )


def _raised(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
