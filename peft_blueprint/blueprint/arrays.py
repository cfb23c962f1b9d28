"""The record as a safetensors file of its own, `blueprint.safetensors`: every digit, with statistics as arrays.

For what is too much for a model's header or for JSON: many submodules, alignments. Knows nothing of paths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..errors import FormatError
from .blueprint import Blueprint
from .columns import from_columns, to_columns
from .entry import NUMBERS
from .header import parse_header, with_metadata
from .header_text import VERSION, VERSION_KEY, has_arrays, require_version
from .schema import from_dict, to_dict
from .slots import JSON_KEY
from .strict_json import loads


_VECTORS = (*NUMBERS, "alpha_error", "gamma")
_ROWS = ("norm_interval", "alignment")
_TAG = "domain_tags."


def to_arrays_bytes(blueprint: Blueprint) -> bytes:
    """The blueprint as the bytes of a safetensors file.

    Its tensors are float64, for n entries in the record's order and NaN where one is unknown: (n,) for each statistic
    and for each domain tag as `domain_tags.<tag>`; (n, 2) for `norm_interval`; (n, k) for `alignment`, of which a row may
    be shorter. All else stands as JSON in the metadata under `blueprint.json`, as in `columns`, with the names of the
    tensors in `layers.arrays`.

    Raises:
        FormatError: if what was added to it by hand is not JSON, or names no tensor could have.
    """
    record = to_dict(blueprint)
    layers: list[dict[str, Any]] = [dict(entry) for entry in record["layers"]]
    arrays: dict[str, np.ndarray] = {}
    for key in (*_VECTORS, *_ROWS):
        values = [entry.get(key) for entry in layers]
        array = _array(values if key in _ROWS else [None if value is None else [value] for value in values])
        if array is not None:
            arrays[key] = array if key in _ROWS else array[:, 0]
            for entry in layers:
                entry.pop(key, None)
    for tag in sorted({tag for entry in layers for tag in entry.get("domain_tags", ())}):
        tags = [entry.get("domain_tags", {}) for entry in layers]
        array = _array([[known[tag]] if tag in known else None for known in tags])
        if array is not None and not any("\ud800" <= character <= "\udfff" for character in tag):
            arrays[_TAG + tag] = array[:, 0]
            for entry in layers:
                entry["domain_tags"] = {k: v for k, v in entry.get("domain_tags", {}).items() if k != tag}
    for entry in layers:
        if entry.get("domain_tags") == {}:
            del entry["domain_tags"]
    rest = to_columns({**record, "layers": layers})
    rest["layers"] = {"arrays": list(arrays), **rest["layers"]}
    text = json.dumps(rest, separators=(",", ":"), allow_nan=False)
    return with_metadata(save(arrays), {VERSION_KEY: VERSION, JSON_KEY: text}, "blueprint.safetensors")


def from_arrays_bytes(data: bytes, source: str = "the bytes") -> Blueprint:
    """The blueprint that `to_arrays_bytes` wrote, checked as one that is read from JSON.

    Raises:
        FormatError: if it is no safetensors file, holds no blueprint, or was changed (by its digest); names `source`.
    """
    header = parse_header(data, source, len(data))
    text = header.metadata.get(JSON_KEY)
    if text is None:
        raise FormatError(f"{source} is a safetensors file without {JSON_KEY} in its metadata, so it is no blueprint.")
    require_version(header.metadata, source)
    packed = loads(text, source)
    try:
        listed = packed["layers"].pop("arrays") if has_arrays(packed) else None
        if not isinstance(listed, list) or sorted(map(str, listed)) != sorted(header.tensors):
            raise FormatError("its JSON does not list its arrays; it is no blueprint.safetensors.")
        record = from_columns(packed)
        _fill(record["layers"], listed, header.tensors, data)
        return from_dict(record)
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from error
    except SafetensorError as error:
        raise FormatError(f"{source} is no sound safetensors file: {error}.") from error


def _fill(
    layers: list[dict[str, Any]],
    listed: Sequence[str],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    data: bytes,
) -> None:
    """Put the arrays' numbers into the entries."""
    for key in listed:
        dtype, shape = tensors[key]
        is_known = key in _VECTORS or key in _ROWS or key.startswith(_TAG)
        wanted = (len(layers), *(shape[1:2] or (2,))) if key in _ROWS else (len(layers),)
        if not is_known or dtype != "F64" or shape != wanted:
            raise FormatError(
                f"the array {key[:80]!r} is {dtype} of shape {shape}; for {len(layers)} entries it should be a statistic, "
                f"F64 of shape {wanted}."
            )
    arrays = load(data)
    for key in listed:
        rows = arrays[key].tolist()
        for entry, value in zip(layers, rows, strict=True):
            if key in _ROWS:
                known = [number for number in value if number == number]
                if known:
                    entry[key] = known
            elif value == value:  # not NaN
                if key.startswith(_TAG):
                    entry.setdefault("domain_tags", {})[key.removeprefix(_TAG)] = value
                else:
                    entry[key] = value


def _array(rows: Sequence[Sequence[Any] | None]) -> np.ndarray | None:
    """Rows of numbers as float64 (n, k), NaN where there is none; None if there are none at all, or not exactly so."""
    width = max((len(row) for row in rows if row), default=0)
    numbers = [number for row in rows for number in row or ()]
    if not width or not all(isinstance(n, float) or type(n) is int and abs(n) <= 2**53 for n in numbers):
        return None
    array = np.full((len(rows), width), np.nan)
    for index, row in enumerate(rows):
        array[index, : len(row or ())] = row or ()
    return array
