"""One number with how it came about: measured, modelled or absent.

Names what a run spends and in which unit. Knows nothing of who counts it; torch is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import BlueprintError, FormatError


How = Literal["measured", "modelled", "absent"]

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
RESOURCES = tuple(UNITS)[:7]  # what adds up while a run goes on

_HOWS: tuple[str, ...] = get_args(How)  # from the strongest label to the weakest


@dataclass(frozen=True)
class Figure:
    """A number, how it came about, and from what.

    Args:
        value: in the unit that `UNITS` has for its name, finite; None if and only if it is absent.
        how: "measured" by a clock, counter or meter; "modelled" if a model or an assumption has part in it; "absent".
        source: from what, or why there is none, in a few words.

    Raises:
        BlueprintError: for another label, an absent figure with a value, another without, or no finite number.
    """

    value: float | None
    how: How
    source: str = ""

    def __post_init__(self) -> None:
        if self.how not in _HOWS:
            raise BlueprintError(f"how={self.how!r} is not known: give one of {', '.join(_HOWS)}.")
        if (self.value is None) != (self.how == "absent"):
            raise BlueprintError(
                f"A figure is absent if and only if it has no value, and this is {self.how} with the value "
                f"{self.value!r}. Use absent(why) for what is not there."
            )
        if self.value is not None and not _is_number(self.value):
            raise BlueprintError(f"A figure's value is a finite number, not {self.value!r}. Use absent(why) for none.")

    def to_dict(self) -> dict[str, Any]:
        """A JSON object with `value`, `how` and `source`."""
        return {"value": self.value, "how": self.how, "source": self.source}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Figure:
        """The figure that `to_dict` wrote; keys it does not know are left out.

        Raises:
            FormatError: if it is no such object.
        """
        if not isinstance(content, Mapping) or not {"value", "how"} <= content.keys():
            raise FormatError(
                f"A figure is an object with `value` and `how`, not {content!r}. Write it with Figure.to_dict."
            )
        source = content.get("source", "")
        if not isinstance(source, str):
            raise FormatError(f"A figure's source is text, not {source!r}. Write it with Figure.to_dict.")
        try:
            return cls(content["value"], content["how"], source)
        except FormatError:
            raise
        except BlueprintError as error:
            raise FormatError(str(error)) from error


def measured(value: float, source: str) -> Figure:
    """A figure read off a clock, a counter or a meter."""
    return Figure(value, "measured", source)


def modelled(value: float, source: str) -> Figure:
    """A figure in which a model or an assumption has part."""
    return Figure(value, "modelled", source)


def absent(why: str) -> Figure:
    """A figure that is not there, and why."""
    return Figure(None, "absent", why)


def weakest(hows: Iterable[How]) -> How:
    """The label of what is made of several figures: absent before modelled before measured; measured for none."""
    return max(hows, key=_HOWS.index, default="measured")


def total(figures: Iterable[Figure]) -> Figure:
    """The sum over stretches or processes, with the weakest of their labels: absent if one of them is.

    Sources that differ are joined by "; ".

    Raises:
        BlueprintError: for no figure at all.
    """
    return _together(figures, math.fsum)


def largest(figures: Iterable[Figure]) -> Figure:
    """The largest of several, as of peaks, with labels and sources as in `total`.

    Raises:
        BlueprintError: for no figure at all.
    """
    return _together(figures, max)


def across_processes(parts: Sequence[Mapping[str, Figure]]) -> dict[str, Figure]:
    """What several processes spent together in one run: the longest clock, the highest peak, and the sum of all else.

    Args:
        parts: of each process the figures, all with the same names.

    Raises:
        BlueprintError: for no process, or names that differ.
    """
    if not parts or any(part.keys() != parts[0].keys() for part in parts):
        names = "; ".join(", ".join(part) for part in parts) or "none"
        raise BlueprintError(
            f"Processes give figures of the same names, and these are {names}. Give a ledger's of each."
        )
    return {
        name: (largest if name in ("seconds", "peak_bytes") else total)(part[name] for part in parts)
        for name in parts[0]
    }


def _together(figures: Iterable[Figure], combine: Callable[[Iterable[float]], float]) -> Figure:
    parts = tuple(figures)
    if not parts:
        raise BlueprintError("There are no figures to put together. Give at least one.")
    how = weakest(part.how for part in parts)
    deciding = parts if how != "absent" else [part for part in parts if part.how == "absent"]
    source = "; ".join(dict.fromkeys(piece for part in deciding for piece in part.source.split("; ") if piece))
    if how == "absent":
        return Figure(None, how, source)
    return Figure(combine([part.value for part in parts if part.value is not None]), how, source)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
