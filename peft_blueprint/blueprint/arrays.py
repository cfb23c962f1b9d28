"""Write a record as a safetensors file of its own, `blueprint.safetensors`, with all digits, and read it back."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import SafetensorError, deserialize

from ..errors import FormatError
from .entry import NUMBERS
from .header import header_bytes, parse_header
from .header_text import JSON_KEY, VERSION, VERSION_KEY, from_columns, has_arrays, require_version, to_columns
from .strict_json import loads


_VECTORS = NUMBERS
_ROWS = ("norm_interval", "alignment")
_TAG = "domain_tags."
_NAN = float("nan")


def to_arrays_bytes(record: Mapping[str, Any]) -> bytes:
    """Write a record as the bytes of a safetensors file.

    Its tensors are float64, for n entries in the record's order, NaN where a value is unknown: (n,) for each statistic
    and for each domain tag as `domain_tags.<tag>`; (n, 2) for `norm_interval`; (n, k) for `alignment`, whose rows may
    be shorter. The rest is JSON in the metadata under `blueprint.json`, with `layers` as in a model's header and the
    names of the tensors in `layers.arrays`.

    Example:
        >>> record = {"model_id": "org/model", "layers": [{"id": "attn.0", "gradient_norm": 0.052}]}
        >>> from_arrays_bytes(to_arrays_bytes(record)) == record
        True
    """
    columns = to_columns(record)["layers"]
    arrays: dict[str, dict[str, Any]] = {}
    data = bytearray()
    for key in (*_VECTORS, *_ROWS):
        if _store(key, columns.get(key, ()), arrays, data):
            del columns[key]
    tags = columns.get("domain_tags", {})
    for tag in list(tags):
        if tag.isprintable() and _store(_TAG + tag, tags[tag], arrays, data):
            del tags[tag]
    if not tags:
        columns.pop("domain_tags", None)
    rest = {**record, "layers": {"arrays": list(arrays), **columns}}
    text = json.dumps(rest, separators=(",", ":"), allow_nan=False)
    return header_bytes({JSON_KEY: text, VERSION_KEY: VERSION}, arrays, "blueprint.safetensors") + data


def from_arrays_bytes(data: bytes, source: str = "the bytes") -> Any:
    """Return the record that `to_arrays_bytes` wrote.

    Raises:
        FormatError: if it is not a safetensors file or holds no blueprint; names `source`.
    """
    header = parse_header(data, source, len(data))
    text = header.metadata.get(JSON_KEY)
    if text is None:
        raise FormatError(f"{source} is a safetensors file without {JSON_KEY} in its metadata, not a blueprint.")
    require_version(header.metadata, source)
    record = loads(text, source)
    columns = record["layers"] if has_arrays(record) else {}
    listed = columns.pop("arrays", None)
    if not isinstance(listed, list) or sorted(map(str, listed)) != sorted(header.tensors):
        raise FormatError(f"{source}: its JSON does not list its arrays, so it is not a blueprint.safetensors.")
    try:
        _require_shapes(listed, header.tensors, columns.get("id"))
        for name, tensor in deserialize(data):
            values = _values(name, tensor)
            if name.startswith(_TAG):
                columns.setdefault("domain_tags", {})[name.removeprefix(_TAG)] = values
            else:
                columns[name] = values
        return from_columns(record)
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from error
    except (SafetensorError, AttributeError, TypeError) as error:
        raise FormatError(f"{source} is not a valid safetensors file of a blueprint: {error}.") from error


def _require_shapes(listed: Sequence[str], tensors: Mapping[str, tuple[str, tuple[int, ...]]], ids: Any) -> None:
    count = len(ids) if isinstance(ids, list) else 0
    for key in listed:
        dtype, shape = tensors[key]
        is_known = key in _VECTORS or key in _ROWS or key.startswith(_TAG)
        wanted = (count, *(shape[1:2] or (2,))) if key in _ROWS else (count,)
        if not is_known or dtype != "F64" or shape != wanted:
            raise FormatError(
                f"the array {key[:80]!r} is {dtype} of shape {shape}; for {count} entries it should be a statistic, "
                f"F64 of shape {wanted}."
            )


def _store(name: str, column: Sequence[Any], arrays: dict[str, dict[str, Any]], data: bytearray) -> bool:
    """Append a column to the data as a float64 tensor; not if it is empty or holds a value that no double equals."""
    rows = [() if value is None else value if name in _ROWS else (value,) for value in column]
    width = max(map(len, rows), default=0)
    if not width or not all(isinstance(n, float) or type(n) is int and abs(n) <= 2**53 for row in rows for n in row):
        return False
    numbers = [number for row in rows for number in (*row, *[_NAN] * (width - len(row)))]
    start = len(data)
    data += struct.pack(f"<{len(numbers)}d", *numbers)
    shape = [len(rows), width] if name in _ROWS else [len(rows)]
    arrays[name] = {"dtype": "F64", "shape": shape, "data_offsets": [start, len(data)]}
    return True


def _values(name: str, tensor: Mapping[str, Any]) -> list[Any]:
    """Return a tensor's numbers as a column, without NaN."""
    numbers = struct.unpack(f"<{len(tensor['data']) // 8}d", tensor["data"])
    if name not in _ROWS:
        return [None if number != number else number for number in numbers]
    width = tensor["shape"][1]
    rows = (numbers[start : start + width] for start in range(0, len(numbers), width or 1))
    return [[number for number in row if number == number] or None for row in rows]
