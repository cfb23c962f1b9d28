"""The record as a safetensors file of its own."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import load, save

from peft_blueprint import Blueprint, Submodule
from peft_blueprint.blueprint.header import metadata_of_prefix, parse_header
from peft_blueprint.errors import FormatError
from tests.random_blueprints import blueprints
from tests.records import from_arrays_bytes, to_arrays_bytes


@settings(max_examples=30)
@given(blueprints)
def test_arrays_round_trip_exactly(blueprint):
    """Every field of any blueprint comes back equal, and the same blueprint gives the same bytes."""
    data = to_arrays_bytes(blueprint)
    assert from_arrays_bytes(data) == blueprint
    assert to_arrays_bytes(blueprint) == data


def test_statistics_are_tensors(blueprint):
    """Any safetensors reader finds float64 arrays in the order of the entries, NaN where one is not known."""
    arrays = load(to_arrays_bytes(blueprint))
    assert arrays["gradient_norm"].dtype == np.float64
    assert arrays["gradient_norm"].tolist() == [entry.gradient_norm for entry in blueprint]
    assert arrays["norm_interval"].shape == (84, 2) and arrays["alignment"].shape[0] == 84
    tagged = Blueprint("m", (Submodule("a", 1.0, domain_tags={"law": 0.5}), Submodule("b", 2.0, alignment=(1.0,))))
    arrays = load(to_arrays_bytes(tagged))
    assert str(arrays["domain_tags.law"].tolist()) == "[0.5, nan]" and str(arrays["alignment"][0]) == "[nan]"


def test_it_needs_a_third_of_the_bytes_of_json(blueprint):
    """The reason to have it; the metadata comes first, so that the names can be read alone."""
    data = to_arrays_bytes(blueprint)
    assert len(data) < 0.6 * len(json.dumps([[*e.alignment] for e in blueprint])) + 30_000
    metadata, _ = metadata_of_prefix(data[:20_000], "x")
    assert json.loads(metadata["blueprint.json"])["layers"]["id"]


def test_changed_content_is_refused(blueprint):
    """A flipped bit of a number is seen by the digest."""
    data = bytearray(to_arrays_bytes(blueprint))
    data[-3] ^= 1
    with pytest.raises(FormatError, match="x.safetensors.*changed after it was written"):
        from_arrays_bytes(bytes(data), "x.safetensors")


def with_text(tensors, **changes):
    return save(tensors, metadata={"blueprint.json": json.dumps(changes)})


ONE = {"gradient_norm": np.ones(1)}
LAYERS = {"id": ["a"]}
BAD = {
    "empty": (b"", "0 bytes, too few"),
    "no header": (b"hello world, hello", "header would have"),
    "cut": (to_arrays_bytes(Blueprint("m", (Submodule("a", 1.0),)))[:-3], "not a valid safetensors"),
    "a model": (save(ONE), "without blueprint.json"),
    "a later layout": (save(ONE, metadata={"blueprint.json": "{}", "blueprint.version": "2"}), "'2'.*upgrade"),
    "no list": (with_text(ONE, layers=LAYERS), "does not list its arrays"),
    "another array": (with_text(ONE, layers=LAYERS | {"arrays": ["alpha"]}), "does not list its arrays"),
    "too long": (with_text({"alpha": np.ones(2)}, layers=LAYERS | {"arrays": ["alpha"]}), r"F64 of shape \(2,\)"),
    "too short": (
        with_text({"alpha": np.ones(1, "f4")}, layers=LAYERS | {"arrays": ["alpha"]}),
        r"F32 of shape \(1,\)",
    ),
    "a stranger": (with_text({"weird": np.ones(1)}, layers=LAYERS | {"arrays": ["weird"]}), "array 'weird'"),
    "flat rows": (with_text({"alignment": np.ones(1)}, layers=LAYERS | {"arrays": ["alignment"]}), "'alignment'"),
    "infinite": (
        with_text({"gradient_norm": np.full(1, np.inf)}, model_id="m", layers=LAYERS | {"arrays": ["gradient_norm"]}),
        "gradient_norm=inf",
    ),
}


@pytest.mark.parametrize("data, message", BAD.values(), ids=BAD)
def test_bad_files_are_refused_by_name(data, message):
    """Each is a FormatError that names the file."""
    with pytest.raises(FormatError, match=f"(?s)bad.safetensors.*{message}"):
        from_arrays_bytes(data, "bad.safetensors")


def test_any_damage_to_the_header_is_a_format_error(blueprint):
    """One byte after another of the header set to something else: a blueprint or a FormatError."""
    data = to_arrays_bytes(Blueprint("m", (Submodule("a", 1.0, alpha=2.0, domain_tags={"b": 1.0}),)))
    end = 8 + struct.unpack("<Q", data[:8])[0]
    assert parse_header(data, "x").size == end
    for position in range(end):
        for value in b'\x00"{1':
            damaged = bytearray(data)
            damaged[position] = value
            try:
                from_arrays_bytes(bytes(damaged))
            except FormatError:
                continue
