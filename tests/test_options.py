"""Options and records: unknown names, wrong types and nested values are refused with the key named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest

from peft_blueprint import BlueprintError
from peft_blueprint._options import check_fields, from_keywords, from_mapping
from peft_blueprint.errors import PlacementError
from peft_blueprint.measure import GenerateOptions, MeasureOptions
from peft_blueprint.place import PlacementOptions


@dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclass(frozen=True)
class Options:
    name: str
    fraction: float | None = field(default=None, metadata={"help": "Share of all, in (0, 1]."})
    mode: Literal["one", "two"] = "one"
    shape: tuple[int, ...] = ()
    inner: Inner = Inner()
    pairs: Mapping[str, float] = field(default_factory=dict)
    many: tuple[Inner, ...] = ()
    named: Mapping[str, Inner] = field(default_factory=dict)
    maybe: Inner | str | list[int] | None = None
    two: tuple[int, Inner] | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise PlacementError(f"fraction must be in (0, 1], got {self.fraction}.")


def test_a_sound_mapping_becomes_the_record():
    data = {"name": "a", "fraction": 1, "mode": "two", "shape": [1, 2], "inner": {"size": 3}, "pairs": {"x": 0.5}}
    assert from_mapping(Options, data, "f") == Options("a", 1.0, "two", (1, 2), Inner(3), {"x": 0.5})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text", r"f must be a mapping, got 'text' \(text\)"),
        (None, "f must be a mapping, got nothing"),
        ({}, "f: name is missing"),
        ({"name": "a", "fracton": 1}, "f has no option 'fracton'. Did you mean 'fraction'?"),
        ({"name": 3}, r"f: name must be text, got 3 \(a whole number\)"),
        ({"name": "a", "fraction": "0.2"}, r"f: fraction must be a number, got '0.2' \(text\)"),
        ({"name": "a", "fraction": True}, r"f: fraction must be a number, got True"),
        ({"name": "a", "fraction": 2}, r"f: fraction must be in \(0, 1\], got 2"),
        ({"name": "a", "mode": "three"}, "f: mode must be one of 'one', 'two', got 'three'"),
        ({"name": "a", "shape": 3}, r"f: shape must be a list, got 3"),
        ({"name": "a", "shape": [1.5]}, r"f: shape.0 must be a whole number, got 1.5"),
        ({"name": "a", "inner": {"size": "b"}}, r"f: inner.size must be a whole number, got 'b'"),
        ({"name": "a", "inner": {"sise": 3}}, "f: inner has no option 'sise'. Did you mean 'size'. Options: size"),
        ({"name": "a", "many": [{"size": 1}, {"weight": 3}]}, "f: many.1 has no option 'weight'. Options: size"),
        ({"name": "a", "named": {"x": {"sizes": 1}}}, "f: named.x has no option 'sizes'"),
        ({"name": "a", "maybe": {"siz": 1}}, "f: maybe has no option 'siz'"),
        ({"name": "a", "two": [1, {"siz": 1}]}, "f: two.1 has no option 'siz'"),
        ({"name": "a", "inner": [1]}, r"f: inner must be a mapping, got \[1\]"),
        ({"name": "a", "pairs": {"x": None}}, "f: pairs.x must be a number, got nothing"),
        ({"name": object()}, "f must hold text, numbers, lists and mappings alone"),
    ],
)
def test_unsound_data_is_refused_with_its_key(data, message):
    with pytest.raises(BlueprintError, match=message):
        from_mapping(Options, data, "f")


def test_keys_of_a_later_version_are_left_out_at_every_level():
    """On request, for files."""
    data = {"name": "a", "later": 1, "inner": {"size": 3, "later": 1}, "many": [{"later": {"size": 1}}]}
    found = from_mapping(Options, data, "f", ignore_unknown=True)
    assert found == Options("a", inner=Inner(3), many=(Inner(),))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"lr": "fast"}, r"f: lr must be a number, got 'fast' \(text\)"),
        ({"names": [1]}, "f: names.*got"),
        ({"ls": 1}, "f has no option 'ls'. Did you mean 'lr'?"),
        (3, "f must be a mapping, got 3"),
    ],
)
def test_other_libraries_arguments_are_checked_by_their_types(data, message):
    types = {"lr": float, "names": list[str] | str | None}
    check_fields(types, {"lr": 1, "names": ["a"]}, "f")
    with pytest.raises(BlueprintError, match=message):
        check_fields(types, data, "f")


def test_the_error_class_is_the_callers():
    with pytest.raises(PlacementError, match="Inner has no option 'weight'"):
        from_keywords(Inner, None, {"weight": 1}, PlacementError)


def test_keywords_count_before_the_options():
    assert from_keywords(Inner, Inner(2), {}) == Inner(2) and from_keywords(Inner, Inner(2), {"size": 3}) == Inner(3)
    with pytest.raises(BlueprintError, match="options must be Inner, got dict. Pass Inner"):
        from_keywords(Inner, {"size": 3}, {})


@pytest.mark.parametrize(
    ("cls", "field", "wrong", "message"),
    [
        (PlacementOptions, "fraction", "0.2", r"fraction must be a number, got '0.2' \(text\)"),
        (PlacementOptions, "fraction", True, "fraction must be a number, got True"),
        (PlacementOptions, "num_modules", 2.5, "num_modules must be a whole number, got 2.5"),
        (PlacementOptions, "per_cost", "yes", "per_cost must be true or false"),
        (PlacementOptions, "mode", 3, "mode must be text, got 3"),
        (GenerateOptions, "max_examples", "64", "max_examples must be a whole number, got '64'"),
        (GenerateOptions, "training_checkpoint", [1], "training_checkpoint must be a number"),
        (MeasureOptions, "seed", None, "seed must be a whole number, got nothing"),
    ],
)
def test_keywords_of_another_type_are_refused_by_name(cls, field, wrong, message):
    """With the class of errors of the room, in Python as in a file."""
    with pytest.raises(BlueprintError, match=message):
        cls(**{field: wrong})


def test_numpys_numbers_are_numbers():
    """As results of computations."""
    assert PlacementOptions(fraction=np.float32(0.5)).fraction == 0.5 and MeasureOptions(seed=np.int64(3)).seed == 3
