"""Amounts of a resource, each with its unit and with how it was obtained: measured, modelled or absent."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, get_args

from .._options import from_mapping
from ..errors import BlueprintError, FormatError


How = Literal["measured", "modelled", "absent"]
Direction = Literal["minimize", "maximize"]

UNITS = {
    "seconds": "s",
    "device_hours": "device-h",
    "tokens": "tokens",
    "flops": "FLOP",
    "memory_gb_hours": "GB h",
    "energy_joules": "J",
    "carbon_grams": "g CO2e",
    "peak_bytes": "B",
    "optimizer_bytes": "B",
}
RESOURCES = tuple(UNITS)[:7]  # those that accumulate during a run

_HOWS: tuple[str, ...] = get_args(How)  # from the strongest label to the weakest
_ABSENT = "–"
_SI = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BINARY = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))
_TIMES = ((3600.0, "h"), (60.0, "min"))
_COUNTS = ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "))
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Quantity:
    """An amount and how it was obtained.

    Args:
        value: finite, in the unit that `UNITS` lists for its name; None if and only if the quantity is absent.
        how: "measured" by a clock, counter or meter; "modelled" if a model or an assumption is involved; "absent".
        source: the clock, counter or model; for an absent quantity, the reason.

    Raises:
        BlueprintError: for an unknown label, a value that is not finite, an absent quantity with a value, or another
            quantity without one.

    Example:
        >>> Quantity(3.2, "measured", "clock")
        Quantity(value=3.2, how='measured', source='clock')
    """

    value: float | None
    how: How
    source: str = ""

    def __post_init__(self) -> None:
        if self.how not in _HOWS:
            raise BlueprintError(f"how must be one of {', '.join(_HOWS)}, got {self.how!r}.")
        if (self.value is None) != (self.how == "absent"):
            raise BlueprintError(
                f"value must be None if and only if how is 'absent', got {self.value!r} and {self.how!r}."
            )
        if self.value is not None and not is_finite_number(self.value):
            raise BlueprintError(f"value must be a finite number, got {self.value!r}. Use absent(why) for no value.")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object with `value`, `how` and `source`."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, content: Any) -> Quantity:
        """Read what `to_dict` returned; unknown keys are ignored.

        Raises:
            FormatError: for anything else.
        """
        return from_mapping(cls, content, "A quantity", FormatError, ignore_unknown=True)


def measured(value: float, source: str) -> Quantity:
    """Return a quantity read from a clock, a counter or a meter.

    Example:
        >>> measured(3.2, "clock").how
        'measured'
    """
    return Quantity(value, "measured", source)


def modelled(value: float, source: str) -> Quantity:
    """Return a quantity that a model or an assumption is involved in.

    Example:
        >>> modelled(4e12, "CostModel").how
        'modelled'
    """
    return Quantity(value, "modelled", source)


def absent(why: str) -> Quantity:
    """Return a quantity without a value, and the reason.

    Example:
        >>> absent("no energy meter").value is None
        True
    """
    return Quantity(None, "absent", why)


def weakest(hows: Iterable[How]) -> How:
    """Return the label of a combination: absent if one part is, otherwise modelled if one part is; measured for none."""
    return max(hows, key=_HOWS.index, default="measured")


def total(quantities: Iterable[Quantity]) -> Quantity:
    """Add quantities; the sum has the weakest of their labels and is absent if one of them is.

    Different sources are joined by "; ".

    Raises:
        BlueprintError: if there are none.

    Example:
        >>> total([measured(2.0, "clock"), modelled(1.0, "estimate")])
        Quantity(value=3.0, how='modelled', source='clock; estimate')
    """
    return _combine(quantities, math.fsum)


def largest(quantities: Iterable[Quantity]) -> Quantity:
    """Return the largest of several peaks, with labels and sources as in `total`.

    Raises:
        BlueprintError: if there are none.

    Example:
        >>> largest([measured(2.0, "first process"), measured(3.0, "second process")]).value
        3.0
    """
    return _combine(quantities, max)


def across_processes(parts: Sequence[Mapping[str, Quantity]]) -> dict[str, Quantity]:
    """Combine the quantities of several processes: the longest time, the highest peak, and the sum of the others.

    Args:
        parts: one mapping per process, all with the same names.

    Raises:
        BlueprintError: if there is no process or the names differ.
    """
    if not parts or any(part.keys() != parts[0].keys() for part in parts):
        names = "; ".join(", ".join(part) for part in parts) or "none"
        raise BlueprintError(f"All processes must have quantities of the same names, got {names}.")
    return {
        name: (largest if name in ("seconds", "peak_bytes") else total)(part[name] for part in parts)
        for name in parts[0]
    }


def format_quantity(value: float | None, unit: str, digits: int = 3) -> str:
    """Format an amount with the prefix that suits its size.

    Args:
        value: the amount; None gives `–`.
        unit: a unit, or a name in `UNITS`.
        digits: significant digits.

    Example:
        >>> format_quantity(605, "seconds"), format_quantity(9.4e9, "B"), format_quantity(4_915_200, "tokens")
        ('10 min 5 s', '8.75 GiB', '4.92 million tokens')
    """
    if value is None:
        return _ABSENT
    unit = UNITS.get(unit, unit)
    if unit == "s":
        return _format_duration(value, digits)
    factor, name = unit_for(value, unit)
    return f"{_format_amount(value / factor, digits)} {name}"


def unit_for(value: float, unit: str) -> tuple[float, str]:
    """Return the unit with the prefix that suits an amount: its size in `unit`, and its name.

    Args:
        value: the amount, or the largest of several.
        unit: a unit, or a name in `UNITS`.

    Example:
        >>> unit_for(9.4e15, "flops"), unit_for(605, "seconds"), unit_for(4_915_200, "tokens")
        ((1000000000000000.0, 'PFLOP'), (60.0, 'min'), (1000000.0, 'million tokens'))
    """
    unit = UNITS.get(unit, unit)
    if unit == "s":
        return next(((size, name) for size, name in _TIMES if abs(value) >= 2 * size), (1.0, "s"))
    if unit == "g CO2e":
        return (1000.0, "kg CO₂e") if abs(value) >= 1000 else (1.0, "g CO₂e")
    if unit == "B":
        return next((pair for pair in _BINARY if abs(value) >= pair[0]), (1.0, "B"))
    if unit in ("FLOP", "J") or unit.split()[-1] in ("tokens", "parameters"):
        prefixes = _SI if unit in ("FLOP", "J") else _COUNTS
        factor, prefix = next((pair for pair in prefixes if abs(value) >= pair[0]), (1.0, ""))
        return factor, prefix + unit
    return 1.0, unit


def format_number(value: float | None) -> str:
    """Format a number with three or four significant digits, as a power of ten where that is shorter; `–` for None.

    Example:
        >>> format_number(12345.6), format_number(2.5e-5)
        ('12,346', '2.50 × 10⁻⁵')
    """
    if value is None:
        return _ABSENT
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
    return f"{mantissa} × 10{str(int(exponent)).translate(_RAISED)}"


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite int or float, and not a bool.

    Example:
        >>> is_finite_number(1.5), is_finite_number(True), is_finite_number(float("nan"))
        (True, False, False)
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # math.isfinite fails for integers beyond it


def _combine(quantities: Iterable[Quantity], combine: Callable[[Iterable[float]], float]) -> Quantity:
    parts = tuple(quantities)
    if not parts:
        raise BlueprintError("Combining needs at least one quantity.")
    how = weakest(part.how for part in parts)
    deciding = parts if how != "absent" else [part for part in parts if part.how == "absent"]
    source = "; ".join(dict.fromkeys(piece for part in deciding for piece in part.source.split("; ") if piece))
    if how == "absent":
        return absent(source)
    return Quantity(combine([part.value for part in parts if part.value is not None]), how, source)


def _format_duration(seconds: float, digits: int) -> str:
    if abs(seconds) < 120:
        return f"{_format_amount(seconds, digits)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _format_amount(value: float, digits: int) -> str:
    if 1e-3 <= abs(value) < 10**digits - 0.5:
        return f"{value:.{digits}g}"
    return format_number(round(value) if abs(value) >= 1 else value)
