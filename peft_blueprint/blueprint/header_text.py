"""Write a record as the short text in a model file's header, one plain JSON list per statistic, and read it back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from .._text import format_names
from ..errors import BlueprintError, FormatError
from .entry import MAX_TAGS
from .schema import DIGEST, ENTRY_KEYS, MAX_ENTRIES, TOP_KEYS, content_digest
from .strict_json import loads


JSON_KEY = "blueprint.json"  # of the text in the header's metadata
VERSION_KEY = "blueprint.version"  # beside the text, in the same metadata
VERSION = "1"  # of the text's layout

_TAGS = "domain_tags"
_OTHERS = "others"  # keys of single entries other than statistics
_MAX_VALUES = 200_000  # of tags, for 20,000 submodules and 10 domains
_LEFT_OUT = ("alignment", "median_norm")  # long, and of little use for placing
_ROUNDED = ("concentration", "influence")  # keys of the whole model with many digits


def to_header_text(record: Mapping[str, Any], digits: int = 4) -> str:
    """Write a record, `rounded`, as JSON in printable ASCII; about 250 bytes for a submodule with all statistics.

    Raises:
        BlueprintError: for digits outside 1 to 17.

    Example:
        >>> layers = [{"id": "attn.0", "gradient_norm": 0.052471}, {"id": "ffn.0", "gradient_norm": 0.033}]
        >>> json.loads(to_header_text({"model_id": "org/model", "layers": layers}))["layers"]
        {'id': ['attn.0', 'ffn.0'], 'gradient_norm': [0.05247, 0.033]}
    """
    return json.dumps(to_columns(rounded(record, digits)), separators=(",", ":"))


def from_header_text(text: str, source: str = "the header") -> Any:
    """Return the record that `to_header_text` wrote, or that `blueprint.json` holds.

    Raises:
        FormatError: if it is not JSON or its lists do not fit together; names `source`.

    Example:
        >>> from_header_text('{"model_id": "org/model", "layers": []}')["model_id"]
        'org/model'
    """
    record = loads(text, source)
    if has_arrays(record):
        raise FormatError(
            f"{source} belongs to a blueprint.safetensors, whose numbers are its tensors: read that file."
        )
    try:
        return from_columns(record)
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from error


def to_columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """Turn `layers`, a list of entries, into an object with one list per key, null where an entry has no such key.

    `domain_tags` becomes an object with one list per tag. Keys that this version does not know stand in `others`, by
    the entry's index.
    """
    layers = record["layers"]
    columns: dict[str, Any] = {"id": [entry["id"] for entry in layers]}
    for key in ENTRY_KEYS:
        values = [entry.get(key) for entry in layers]
        if key == _TAGS:
            names = sorted({tag for tags in values for tag in tags or ()})
            if names:
                columns[key] = {name: [(tags or {}).get(name) for tags in values] for name in names}
        elif any(value is not None for value in values):
            columns[key] = values
    others = {
        str(index): other
        for index, entry in enumerate(layers)
        if (other := {key: value for key, value in entry.items() if key != "id" and key not in ENTRY_KEYS})
    }
    return {**record, "layers": {**columns, **({_OTHERS: others} if others else {})}}


def from_columns(record: Any) -> Any:
    """Return the record whose `layers` became columns; any other value unchanged.

    Raises:
        FormatError: if its lists are not as long as the list of ids.
    """
    if not isinstance(record, Mapping) or not isinstance(record.get("layers"), Mapping):
        return record
    columns = record["layers"]
    unknown = columns.keys() - {"id", *ENTRY_KEYS, _OTHERS}
    if unknown:
        raise FormatError(f"layers has lists that this package does not know: {format_names(sorted(unknown))}.")
    names = _require(columns.get("id"), list, "id")
    if len(names) > MAX_ENTRIES:
        raise FormatError(f"layers has {len(names):,} ids; at most {MAX_ENTRIES:,} are read. Coarsen the blueprint.")
    layers: list[dict[str, Any]] = [{"id": name} for name in names]
    for key in columns.keys() - {"id", _OTHERS}:
        lists = _require(columns[key], Mapping, key) if key == _TAGS else {None: columns[key]}
        if len(lists) > MAX_TAGS or len(lists) * len(layers) > _MAX_VALUES:  # each takes much memory in its entry
            raise FormatError(
                f"layers has {len(lists):,} lists of tags for {len(layers):,} ids; at most {MAX_TAGS} lists and "
                f"{_MAX_VALUES:,} values of tags are read. Leave the others out."
            )
        for tag, values in lists.items():
            if len(_require(values, list, tag or key)) != len(layers):
                raise FormatError(
                    f"the list {(tag or key)[:40]!r} has {len(values):,} values, and there are {len(layers):,} ids."
                )
            for entry, value in zip(layers, values, strict=True):
                if value is not None:
                    if tag is None:
                        entry[key] = value
                    else:
                        entry.setdefault(key, {})[tag] = value
    for index, other in _require(columns.get(_OTHERS, {}), Mapping, _OTHERS).items():
        if not index.isdecimal() or len(index) > 9 or int(index) >= len(layers):
            raise FormatError(f"others of layers names entry {index[:20]!r} of {len(layers)}.")
        layers[int(index)].update(_require(other, Mapping, _OTHERS))
    return {**record, "layers": layers}


def has_arrays(record: Any) -> bool:
    """Return whether the JSON in a safetensors file is a blueprint whose numbers are that file's tensors."""
    return isinstance(record, dict) and isinstance(record.get("layers"), dict) and "arrays" in record["layers"]


def require_version(metadata: Mapping[str, Any], source: str) -> None:
    """Raise FormatError if the text beside these keys has the layout of a later version."""
    version = metadata.get(VERSION_KEY, VERSION)
    if version != VERSION:
        raise FormatError(
            f"{source} has {VERSION_KEY} {str(version)[:20]!r}, and this package reads {VERSION}: "
            "pip install --upgrade peft-blueprint."
        )


def rounded(record: Mapping[str, Any], digits: int = 4) -> dict[str, Any]:
    """Round a record's statistics to `digits` significant digits.

    Leaves out the entries' alignments, medians and keys that this version does not know. `provenance["rounded"]` gives
    the digits and the digest of the full record. A record that is rounded already is returned unchanged.

    Raises:
        BlueprintError: for digits outside 1 to 17.

    Example:
        >>> rounded({"layers": [{"id": "a", "gradient_norm": 1.23456789}]}, digits=3)["layers"]
        [{'id': 'a', 'gradient_norm': 1.23}]
    """
    if not 1 <= digits <= 17:
        raise BlueprintError(f"digits must be from 1 to 17, got {digits}. A double has at most 17 significant digits.")
    short = {key: value for key, value in record.items() if key != DIGEST}
    short["layers"] = [
        {
            key: _rounded(value, digits)
            for key, value in entry.items()
            if key not in _LEFT_OUT and key in ("id", *ENTRY_KEYS)
        }
        for entry in record["layers"]
    ]
    short |= {key: _rounded(record[key], digits) for key in _ROUNDED if key in record}
    provenance = record.get("provenance", {})
    if "rounded" not in provenance or any(short[key] != record[key] for key in ("layers", *_ROUNDED) if key in record):
        note = {"digits": digits, "digest": record.get(DIGEST) or content_digest(record)}
        short["provenance"] = {**provenance, "rounded": note}
    known = {key: short[key] for key in ("schema_version", *TOP_KEYS) if key in short}
    return {**known, **short, DIGEST: content_digest(short)}


def _rounded(value: Any, digits: int) -> Any:
    """Round every float in a JSON value, except one that would become infinite."""
    if isinstance(value, float):
        short = float(f"{value:.{digits - 1}e}")
        return short if math.isfinite(short) else value
    if isinstance(value, list | tuple):
        return [_rounded(item, digits) for item in value]
    return {key: _rounded(item, digits) for key, item in value.items()} if isinstance(value, Mapping) else value


def _require(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise FormatError(f"{what[:40]} of layers must be {'a list' if kind is list else 'an object'}.")
    return value
