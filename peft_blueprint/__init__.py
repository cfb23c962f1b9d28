"""Measure which submodules of a model carry the gradient, publish it, and put LoRA adapters only where they pay."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .errors import BlueprintError, DriftError, FormatError, MeasurementError, MismatchError, PlacementError


if TYPE_CHECKING:
    from .blueprint import Blueprint
    from .influence import Influence, measure_influence

_HOMES = {
    "Blueprint": "blueprint",
    "Influence": "influence",
    "measure_influence": "influence",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
