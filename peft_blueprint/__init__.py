"""Measure which submodules of a model carry the gradient, publish it, and put LoRA adapters only where they pay.

Names are imported when first used, so that reading a blueprint does not wait for torch. `BlueprintConfig` registers
the method BLUEPRINT with PEFT; if PEFT is imported already, so it does at once.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .errors import BlueprintError


if TYPE_CHECKING:
    from .accounting import LedgerCallback
    from .blueprint import Blueprint
    from .config import BlueprintConfig
    from .drift import check_drift, reconcile
    from .entry import Submodule
    from .generate import generate_blueprint
    from .influence import Influence
    from .measure import measure_influence
    from .placement import Placement
    from .planner import plan_placement
    from .privacy import Privacy
    from .selection import Selection, select_examples
    from .starting import initialize_along_gradient
    from .stopping import MarginalReturn
    from .unfreezing import share_base
    from .uniform import export_uniform_lora
    from .workload import Workload


__all__ = [
    "Blueprint",
    "BlueprintConfig",
    "BlueprintError",
    "Influence",
    "LedgerCallback",
    "MarginalReturn",
    "Placement",
    "Privacy",
    "Selection",
    "Submodule",
    "Workload",
    "check_drift",
    "export_uniform_lora",
    "generate_blueprint",
    "initialize_along_gradient",
    "measure_influence",
    "plan_placement",
    "reconcile",
    "select_examples",
    "share_base",
]

__version__ = "0.1.0"

_HOMES = {
    "Blueprint": "blueprint",
    "BlueprintConfig": "config",
    "Influence": "influence",
    "LedgerCallback": "accounting",
    "MarginalReturn": "stopping",
    "Placement": "placement",
    "Privacy": "privacy",
    "Selection": "selection",
    "Submodule": "entry",
    "Workload": "workload",
    "check_drift": "drift",
    "export_uniform_lora": "uniform",
    "generate_blueprint": "generate",
    "initialize_along_gradient": "starting",
    "measure_influence": "measure",
    "plan_placement": "planner",
    "reconcile": "drift",
    "select_examples": "selection",
    "share_base": "unfreezing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "peft" in sys.modules:
    importlib.import_module(".config", __name__)
