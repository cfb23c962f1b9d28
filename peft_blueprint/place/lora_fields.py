"""Check the fields of `LoraConfig` that a `BlueprintConfig` passes on, and word PEFT's own refusals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from .._text import first_line, format_names
from ..errors import BlueprintError, MismatchError, PlacementError


_BIASES = ("none", "all", "lora_only")
# which PEFT adds for tasks of classification, whatever the model calls its own
_HEADS = ("classifier", "score", "qa_outputs")
_NOT_OF_THE_USER = (
    *("target_modules", "target_parameters", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "peft_type"),
    *("peft_version", "auto_mapping", "base_model_name_or_path", "inference_mode"),
)


def check_lora_fields(config: LoraConfig) -> None:
    """Raise PlacementError for values of `LoraConfig`'s fields that PEFT takes silently, or refuses without their name.

    Args:
        config: before or after it is settled.
    """
    for name, (expected, is_right) in _EXPECTED.items():
        value = getattr(config, name)
        if not is_right(value):
            raise PlacementError(f"{name} must be {expected}, got {value!r}.")
    if config.layers_pattern and config.layers_to_transform is None:
        raise PlacementError(
            f"layers_pattern={config.layers_pattern!r} says where a name holds a layer's number, and needs "
            "layers_to_transform=[…]. Give it, or leave layers_pattern out."
        )


def check_modules_to_save(config: LoraConfig, model: nn.Module) -> None:
    """Raise MismatchError for a name in `modules_to_save` that no module of the model has, which PEFT would ignore."""
    known = [name for name, _ in model.named_modules()]
    unknown = [n for n in config.modules_to_save or () if n not in _HEADS and not any(k.endswith(n) for k in known)]
    if unknown:
        raise MismatchError(
            f"modules_to_save names {format_names(unknown)}, and the model has no such module. Take it out, or give a "
            "name or ending of model.named_modules()."
        )


@contextmanager
def peft_errors(config: LoraConfig) -> Iterator[None]:
    """Turn errors of PEFT about a config into one PlacementError that names the fields which the user set."""
    try:
        yield
    except (BlueprintError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # PEFT and torch raise their own types for each field
        given = []
        for f in fields(LoraConfig):
            default = f.default_factory() if callable(f.default_factory) else f.default
            value = getattr(config, f.name)
            if f.name not in _NOT_OF_THE_USER and value != default:
                given.append(f"{f.name}={value if len(repr(value)) < 80 else '…'!r}")
        raise PlacementError(
            f"PEFT refuses the adapter: {first_line(error)}. Correct {' or '.join(given) or 'the targets'}."
        ) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _are_names(value: Any) -> bool:
    is_many = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
    return is_many and all(isinstance(name, str) for name in value)


def _is_pattern(value: Any, is_right: Callable[[Any], bool]) -> bool:
    if not isinstance(value, Mapping):
        return False
    try:
        [re.compile(key) for key in value]
    except (TypeError, re.error):
        return False
    return all(is_right(one) and one > 0 for one in value.values())


_EXPECTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lora_alpha": ("a positive number", lambda v: v is None or _is_number(v) and v > 0),
    "lora_dropout": ("a number from 0 up to, but not including, 1", lambda v: _is_number(v) and 0 <= v < 1),
    "bias": (f"one of {', '.join(_BIASES)}", lambda v: v in _BIASES),
    "init_lora_weights": ("true, false or a name", lambda v: isinstance(v, bool | str)),
    "rank_pattern": (
        "a mapping of names or regular expressions to positive whole numbers",
        lambda v: v is None or _is_pattern(v, _is_whole),
    ),
    "alpha_pattern": (
        "a mapping of names or regular expressions to positive numbers",
        lambda v: v is None or _is_pattern(v, _is_number),
    ),
    "exclude_modules": (
        "a regular expression or a list of names",
        lambda v: v is None or isinstance(v, str) or _are_names(v),
    ),
    "modules_to_save": ("a list of names", lambda v: v is None or _are_names(v)),
    "layers_to_transform": (
        "a layer's number or a list of numbers",
        lambda v: v is None or _is_whole(v) or isinstance(v, list | tuple | set) and all(map(_is_whole, v)),
    ),
    "layers_pattern": (
        "a name or a list of names",
        lambda v: v is None or isinstance(v, str) or _are_names(v),
    ),
}
