"""The record as JSON and CSV text, exactly, and as a file of any kind: a path becomes a checked `Blueprint`, and back.

What the JSON holds is `schema`'s to say. Knows nothing of models; torch is not imported.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._files import write_atomically
from .._text import format_names
from ..errors import BlueprintError, FormatError
from .arrays import from_arrays_bytes, to_arrays_bytes
from .blueprint import Blueprint
from .header import read_metadata
from .header_text import has_arrays
from .model_files import INDEX_FILE, MODEL_FILE, extract
from .schema import DIGEST, ENTRY_KEYS, from_dict, to_dict
from .slots import JSON_KEY
from .strict_json import csv_rows, loads, read_text


FILE_NAME = "blueprint.json"
MAX_ARRAYS = 2**28  # bytes

_LONG_LIST = re.compile(r"\[\n([-+.,eE\d\s]+)\]")


def to_json(blueprint: Blueprint) -> str:
    """The blueprint as indented JSON, lists of numbers on one line; numbers keep every digit.

    Raises:
        FormatError: if what was added to it by hand (provenance, extra, …) is not JSON: NaN, an array.
    """
    text = json.dumps(to_dict(blueprint), indent=2, allow_nan=False)
    # inside a JSON string no line ends, so that this is never a part of one
    return _LONG_LIST.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def from_json(text: str, source: str = "the text") -> Blueprint:
    """Parse JSON into a checked blueprint.

    Raises:
        FormatError: if `text` is not JSON, holds NaN or a key twice, or is not a blueprint; names `source`.
    """
    record = loads(text, source)
    try:
        return from_dict(record)
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from error


def to_csv(blueprint: Blueprint) -> str:
    """One row per entry, for spreadsheets, which may reorder and round: no digest. What belongs to the whole model stands in `metadata`, on the first row."""
    out = io.StringIO()
    writer = csv.DictWriter(out, ("model_id", "training_checkpoint", "id", *ENTRY_KEYS, "extra", "metadata"))
    writer.writeheader()
    record = json.loads(to_json(blueprint))
    metadata = json.dumps({k: v for k, v in record.items() if k not in ("layers", DIGEST)})
    for entry in record["layers"]:
        row = {key: value for key, value in entry.items() if key in ("id", *ENTRY_KEYS)}
        extra = {key: value for key, value in entry.items() if key not in row}
        writer.writerow(
            {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
            | {
                "model_id": blueprint.model_id,
                "training_checkpoint": _blank(blueprint.training_checkpoint),
                "extra": json.dumps(extra) if extra else "",
                "metadata": metadata,
            }
        )
        metadata = ""
    return out.getvalue()


def from_csv(text: str, source: str = "the text") -> Blueprint:
    """A blueprint from the CSV that `to_csv` writes, or from one with just `model_id`, `id` and `gradient_norm`
    columns.

    Raises:
        FormatError: if a column is missing or a cell is not what it should be; names `source`.
    """
    try:
        return from_dict(_csv_record(text))
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from error


def _csv_record(text: str) -> dict[str, Any]:
    """The JSON object that the rows of a CSV stand for."""
    rows = list(csv_rows(text))
    if not rows or not {"model_id", "id", "gradient_norm"} <= set(rows[0]):
        raise FormatError("this is not a blueprint: its CSV needs the columns model_id, id and gradient_norm.")
    model_id, checkpoint = rows[0]["model_id"], rows[0].get("training_checkpoint")
    record: dict[str, Any] = {"model_id": model_id}
    if checkpoint:
        record["training_checkpoint"] = _cell(checkpoint, "training_checkpoint")
    record |= _beside(record, rows[0].get("metadata"), "metadata")
    record["layers"] = []
    for row in rows:
        if row["model_id"] != model_id:
            raise FormatError(
                f"this is a table of several models ({model_id[:80]!r}, {row['model_id'][:80]!r}); a blueprint is of one. "
                "Keep one model's rows."
            )
        entry: dict[str, Any] = {"id": row["id"]}
        for key in ENTRY_KEYS:
            if cell := row.get(key):
                entry[key] = cell if key in ("kind", "group", "form") else _cell(cell, key)
        record["layers"].append(entry | _beside(entry, row.get("extra"), "extra"))
    return record


def read_blueprint(path: str | Path, name: str = FILE_NAME) -> Blueprint:
    """Read a `.json`, `.csv` or `.safetensors` file, the last a blueprint's own or a model's; or what a folder holds.

    Args:
        path: of the file; or of a folder, where `name` is looked for, then the same with `.safetensors`, then, for the
            main blueprint, the header or index of the model there.
        name: of the file in a folder.

    Raises:
        BlueprintError: if there is no such file, or it cannot be read.
        FormatError: if it is not a blueprint.
    """
    path = Path(path)
    if path.is_dir():
        beside = (path / name, path / f"{name.removesuffix('.json')}.safetensors")
        in_model = (path / MODEL_FILE, path / INDEX_FILE) if name == FILE_NAME else ()
        path = next((file for file in (*beside, *in_model) if file.exists()), path / name)
    if path.name.endswith((".safetensors", INDEX_FILE)):
        return from_arrays_bytes(_read_bytes(path), str(path)) if _has_arrays(path) else extract(path)
    text = read_text(path)
    return from_csv(text, str(path)) if path.suffix == ".csv" else from_json(text, str(path))


def write_blueprint(blueprint: Blueprint, path: str | Path) -> Path:
    """Write CSV if `path` ends in `.csv`, tensors if in `.safetensors`, else JSON; into `blueprint.json` if it is a folder.

    Returns the file.

    Raises:
        BlueprintError: if it cannot be written, or is a safetensors file that holds something else, such as a model; what
            was there before is untouched.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if path.suffix == ".safetensors":
        if path.exists() and not _has_arrays(path):
            raise BlueprintError(
                f"{path} holds tensors of its own and is not written over. To put the blueprint into its header, run "
                f"`peft-blueprint embed {path} BLUEPRINT`; else choose another name."
            )
        write_atomically(path, to_arrays_bytes(blueprint))
    else:
        write_atomically(path, to_csv(blueprint) if path.suffix == ".csv" else to_json(blueprint))
    return path


def _has_arrays(path: Path) -> bool:
    """Whether a safetensors file is a blueprint of its own, and not a model that may carry one."""
    text = read_metadata(path).get(JSON_KEY) if path.suffix == ".safetensors" else None
    return text is not None and has_arrays(loads(text, str(path)))


def _read_bytes(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_ARRAYS:
        raise FormatError(f"{path} has {size:,} bytes; a blueprint of its own has at most {MAX_ARRAYS:,}.")
    return path.read_bytes()


def _blank(value: float | None) -> str:
    return "" if value is None else repr(value)


def _beside(known: Mapping[str, Any], cell: str | None, column: str) -> dict[str, Any]:
    """The object in a cell, which may not contradict what the other columns say."""
    more = _cell(cell or "{}", column)
    twice = [key for key in more if key in known and known[key] != more[key]]
    if twice:
        raise FormatError(f"{format_names(twice)} stand both in a column and, otherwise, in {column}; keep one.")
    return more


def _cell(cell: str, column: str) -> Any:
    try:
        value = loads(cell, "it")
    except FormatError as error:
        raise FormatError(f"the cell {cell[:40]!r} in column {column} is not a value: {error}") from error
    if column in ("extra", "metadata") and not isinstance(value, dict):
        raise FormatError(f"the cell {cell[:40]!r} in column {column} must be an object.")
    return value
