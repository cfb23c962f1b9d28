"""A cross-influence matrix as a safetensors file: written whole or not at all, and read with its shapes checked first.

Knows the arrays and the record beside them, and nothing of what is computed from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from .._files import write_atomically
from ..blueprint import loads
from ..errors import BlueprintError, FormatError


VERSION = "1"
Of = Literal["norms", "alignments"]
By = Literal["kind", "example"]

_VERSION_KEY = "cross_influence.version"
_JSON_KEY = "cross_influence.json"
_TYPES = {"values": "F32", "examples": "I64", "losses": "F32", "target_tokens": "I64", "parameters": "I64"}
_NEEDED = {"values", "examples"}
_LISTS: dict[str, tuple[type, ...]] = {
    "names": (str,),
    "kinds": (str, type(None)),
    "depths": (int, type(None)),
    "normalised": (str,),
}


def write_matrix(path: Path, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
    """Write arrays and the record beside them, which goes into the header.

    Raises:
        BlueprintError: if it cannot be written; what was there before is untouched.
    """
    from safetensors.numpy import save

    metadata = {_VERSION_KEY: VERSION, _JSON_KEY: json.dumps(record, separators=(",", ":"))}
    write_atomically(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata))


def read_matrix(path: Path) -> dict[str, Any]:
    """The arrays, which pair in their lengths, and with them what the record says, its lists as tuples.

    Raises:
        BlueprintError: if there is no such file, or it cannot be read.
        FormatError: if it is no such file, of another version, or cut short.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise BlueprintError(f"There is no file {path}. Write one with CrossInfluence.save.")
    try:
        with safe_open(path, framework="numpy") as file:
            record = _record(file.metadata() or {}, str(path))
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            for name, tensor in slices.items():
                if tensor.get_dtype() != _TYPES.get(name):
                    raise FormatError(f"{path} holds {name[:80]!r} in {tensor.get_dtype()}, which has no place in it.")
            shapes = {name: list(tensor.get_shape()) for name, tensor in slices.items()}
            if not _NEEDED <= shapes.keys() or len(shapes["values"]) != 2:
                raise FormatError(
                    f"{path} holds no matrix with the ids of its examples, but {shapes}. Write it again."
                )
            rows, columns = shapes["values"]
            expected = {"values": [rows, columns], "parameters": [rows]}
            if any(shape != expected.get(name, [columns]) for name, shape in shapes.items()):
                raise FormatError(f"{path} holds arrays that do not pair: {shapes}. Write it again.")
            return record | {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise BlueprintError(f"{path} cannot be read: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise FormatError(f"{path} is cut short or no safetensors file ({error}). Write it again.") from error


def _record(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
    version = metadata.get(_VERSION_KEY)
    if version != VERSION or _JSON_KEY not in metadata:
        said = "says no version" if version is None else f"is of version {version[:20]!r}"
        raise FormatError(
            f"{source} {said}, and a cross-influence of version {VERSION} is what is read. Write it again."
        )
    record = loads(metadata[_JSON_KEY], source)
    if (
        not isinstance(record, dict)
        or record.get("of") not in get_args(Of)
        or type(record.get("data_digest")) is not str
    ):
        raise FormatError(f"{source} does not say what it is of. Write it again.")
    for name, allowed in _LISTS.items():
        if not isinstance(record.get(name), list) or not all(type(one) in allowed for one in record[name]):
            raise FormatError(f"{source} has no list of {name}. Write it again.")
    if not set(record["normalised"]) <= set(get_args(By)):
        raise FormatError(f"{source} is normalised by {record['normalised']}; this version knows {get_args(By)}.")
    return {name: tuple(record[name]) for name in _LISTS} | {name: record[name] for name in ("of", "data_digest")}
