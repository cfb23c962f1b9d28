"""Read and check limits on memory, step time, trainable parameters and number of modules."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import PlacementError
from ..runs import format_quantity


_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_NUMBER = r"(\d+(?:[._]\d+)*(?:e\d+)?)"
_EXAMPLES = (
    "examples: '12GiB', '0.7x' or '70%' of all-linear LoRA's step time, '2M parameters', '42 modules', '12GiB, 0.7x'"
)


@dataclass(frozen=True)
class Budget:
    """Upper limits; None means unlimited.

    Args:
        memory: bytes at the peak of a training step.
        time: of a step, as a share of the same step with LoRA on every linear layer.
        parameters: number of trainable parameters.
        modules: number of modules with an adapter or trained whole.

    Raises:
        PlacementError: for a limit that is not positive, or none at all.

    Example:
        >>> print(Budget.of("12GiB, 0.7x"))
        12 GiB, 0.700 of all-linear LoRA's step time
    """

    memory: int | None = None
    time: float | None = None
    parameters: int | None = None
    modules: int | None = None

    def __post_init__(self) -> None:
        if not self.limits:
            raise PlacementError(f"The budget is empty; {_EXAMPLES}.")
        for name, value in self.limits.items():
            if not (value > 0 and math.isfinite(value)):
                raise PlacementError(f"The budget's {name} must be positive, got {value}; {_EXAMPLES}.")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in given.items() if value is not None}

    @classmethod
    def of(cls, budget: Budget | str | Mapping[str, Any]) -> Budget:
        """Read a text such as "12GiB, 0.7x", or a mapping such as `{"memory": "12GiB", "time": 0.7}`.

        Raises:
            PlacementError: if it cannot be read.
        """
        if isinstance(budget, Budget):
            return budget
        if isinstance(budget, Mapping):
            known = [f.name for f in fields(cls)]
            if unknown := [key for key in budget if key not in known]:
                raise PlacementError(f"A budget has no limit {unknown}; it has {', '.join(known)}.")
            limits: dict[str, Any] = {name: _limit(name, value) for name, value in budget.items() if value is not None}
            return cls(**limits)
        if not isinstance(budget, str):
            raise PlacementError(f"budget={budget!r} has no unit; {_EXAMPLES}.")
        limits = {}
        for part in budget.split(","):
            name, value = _read(part.strip(), budget)
            if name in limits:
                raise PlacementError(f"The budget {budget!r} limits {name} twice: give one limit of a kind.")
            limits[name] = value
        return cls(**limits)

    def exceeded(self, costs: Mapping[str, float]) -> list[str]:
        """Return the names of the limits that costs of the same names exceed."""
        return [name for name, limit in self.limits.items() if costs[name] > limit]

    def __str__(self) -> str:
        return ", ".join(format_cost(name, value) for name, value in self.limits.items())


def format_cost(name: str, value: float) -> str:
    """Format a limit, or a cost of the same name, with its unit.

    Example:
        >>> format_cost("memory", 12 * 2**30), format_cost("time", 0.7)
        ('12 GiB', "0.700 of all-linear LoRA's step time")
    """
    if name == "memory":
        return format_quantity(value, "B")
    if name == "time":
        return f"{value:.3f} of all-linear LoRA's step time"
    return format_quantity(value, "trainable parameters") if name == "parameters" else f"{value:.0f} modules"


def _read(part: str, whole: str) -> tuple[str, float]:
    text = part.lower().replace("_", "")
    if found := re.fullmatch(_NUMBER + r"\s*(x|%)", text):
        return "time", float(found[1]) / (100 if found[2] == "%" else 1)
    if found := re.fullmatch(_NUMBER + r"\s*([kmgt]i?)?b(?:ytes?)?", text):
        return "memory", int(float(found[1]) * _BYTES[found[2] or ""])
    if found := re.fullmatch(_NUMBER + r"\s*([kmb])?\s*(?:trainable )?param(?:eter)?s?", text):
        return "parameters", int(float(found[1]) * _COUNTS[found[2] or ""])
    if found := re.fullmatch(r"(\d+)\s*modules?", text):
        return "modules", int(found[1])
    raise PlacementError(f"Cannot read {part!r} in the budget {whole!r}; {_EXAMPLES}.")


def _limit(name: str, value: Any) -> float:
    if isinstance(value, str):
        found, number = _read(value if name != "parameters" or "param" in value else f"{value} parameters", value)
        if found != name:
            raise PlacementError(f"The budget's {name} is {value!r}, which limits {found}; {_EXAMPLES}.")
        return number
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlacementError(f"The budget's {name} must be a number or text, got {value!r}; {_EXAMPLES}.")
    return value if name == "time" else int(value)
