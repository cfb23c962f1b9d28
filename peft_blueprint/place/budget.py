"""What a placement may cost: bytes of memory, step time, trainable parameters, number of modules.

Reads what people write, such as "12GiB" or "0.7x"; knows nothing of how a cost is predicted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import PlacementError


_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_NUMBER = r"(\d+(?:[._]\d+)*(?:e\d+)?)"
_HOW = (
    "write bytes ('12GiB'), a step time as a share of all-linear LoRA's ('0.7x' or '70%'), trainable parameters "
    "('2M parameters'), modules ('42 modules'), or several with commas between"
)


@dataclass(frozen=True)
class Budget:
    """Upper limits; None is no limit.

    Args:
        memory: bytes at the peak of a training step.
        time: of a step, as a share of the same step with LoRA on every linear layer.
        parameters: trainable ones.
        modules: with an adapter, or trained whole.

    Raises:
        PlacementError: for a limit that is not positive, or none at all.
    """

    memory: int | None = None
    time: float | None = None
    parameters: int | None = None
    modules: int | None = None

    def __post_init__(self) -> None:
        if not self.limits:
            raise PlacementError(f"The budget is empty: {_HOW}.")
        for name, value in self.limits.items():
            if not (value > 0 and math.isfinite(value)):
                raise PlacementError(f"A budget of {name}={value} leaves nothing to place: {_HOW}.")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that there are, by name."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in given.items() if value is not None}

    @classmethod
    def of(cls, wish: Budget | str | Mapping[str, Any]) -> Budget:
        """A budget from a text such as "12GiB, 0.7x", or from a mapping such as `{"memory": "12GiB", "time": 0.7}`.

        Raises:
            PlacementError: if it cannot be read.
        """
        if isinstance(wish, Budget):
            return wish
        if isinstance(wish, Mapping):
            known = {f.name for f in fields(cls)}
            if unknown := [key for key in wish if key not in known]:
                raise PlacementError(f"A budget has no {unknown}; it has {', '.join(sorted(known))}.")
            limits: dict[str, Any] = {name: _limit(name, value) for name, value in wish.items() if value is not None}
            return cls(**limits)
        if not isinstance(wish, str):
            raise PlacementError(f"budget={wish!r} does not say of what: {_HOW}.")
        limits = {}
        for part in wish.split(","):
            name, value = _read(part.strip(), wish)
            if name in limits:
                raise PlacementError(f"The budget {wish!r} limits {name} twice: give one limit of a kind.")
            limits[name] = value
        return cls(**limits)

    def exceeded(self, costs: Mapping[str, float]) -> list[str]:
        """The names of the limits that these costs pass, of the same names."""
        return [name for name, limit in self.limits.items() if costs[name] > limit]

    def __str__(self) -> str:
        return ", ".join(shown(name, value) for name, value in self.limits.items())


def shown(name: str, value: float) -> str:
    """A limit or a cost as one says it: 11.3 GiB, 0.70 of all-linear's step time, 4.88 M parameters."""
    if name == "memory":
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    if name == "time":
        return f"{value:.3f} of all-linear LoRA's step time"
    if name == "parameters":
        return f"{value / 1e6:.2f} M trainable parameters" if value >= 1e6 else f"{value:.0f} trainable parameters"
    return f"{value:.0f} modules"


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
    raise PlacementError(f"The budget {whole!r} cannot be read at {part!r}: {_HOW}.")


def _limit(name: str, value: Any) -> float:
    if isinstance(value, str):
        found, number = _read(value if name != "parameters" or "param" in value else f"{value} parameters", value)
        if found != name:
            raise PlacementError(f"The budget's {name} is given as {value!r}, which is a limit of {found}: {_HOW}.")
        return number
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlacementError(f"The budget's {name} is {value!r}: give a number, or {_HOW}.")
    return value if name == "time" else int(value)
