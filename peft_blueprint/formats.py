"""The record as JSON and CSV: text becomes a checked `Blueprint`, and back, exactly; files are written whole.

What the JSON holds is `schema`'s to say. Knows nothing of models; torch is not imported.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .blueprint import Blueprint
from .errors import BlueprintError, FormatError
from .files import write_atomically
from .safe_json import loads
from .schema import DIGEST, ENTRY_KEYS, entry_to_dict, from_dict, to_dict


FILE_NAME = "blueprint.json"

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
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # metadata may pass the usual 131,072 characters
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    if not rows or not {"model_id", "id", "gradient_norm"} <= set(rows[0]):
        raise FormatError("this is not a blueprint: its CSV needs the columns model_id, id and gradient_norm.")
    model_id, checkpoint = rows[0]["model_id"], rows[0].get("training_checkpoint")
    record: dict[str, Any] = {"model_id": model_id}
    if checkpoint:
        record["training_checkpoint"] = _cell(checkpoint, "training_checkpoint")
    record |= _cell(rows[0].get("metadata") or "{}", "metadata")
    record["layers"] = []
    for row in rows:
        if row["model_id"] != model_id:
            raise FormatError(
                f"this is a table of several models ({model_id!r}, {row['model_id']!r}); a blueprint is of one. "
                "Keep one model's rows."
            )
        entry: dict[str, Any] = {"id": row["id"]}
        for key in ENTRY_KEYS:
            if cell := row.get(key):
                entry[key] = cell if key in ("kind", "group", "form") else _cell(cell, key)
        record["layers"].append(entry | _cell(row.get("extra") or "{}", "extra"))
    return record


def read_blueprint(path: str | Path) -> Blueprint:
    """Read a `.json` or `.csv` file, or the `blueprint.json` of a folder.

    Raises:
        BlueprintError: if there is no such file, or it cannot be read.
        FormatError: if it is not a blueprint.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        text = path.read_bytes().decode("utf-8-sig")  # line ends as they are: an id may hold one
    except FileNotFoundError:
        raise BlueprintError(f"There is no blueprint at {path}. Make one with `peft-blueprint generate`.") from None
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path} is not text ({error.reason} at byte {error.start}), so it is no blueprint."
        ) from error
    except OSError as error:
        raise BlueprintError(f"{path} cannot be read: {error.strerror}.") from error
    return from_csv(text, str(path)) if path.suffix == ".csv" else from_json(text, str(path))


def write_blueprint(blueprint: Blueprint, path: str | Path) -> Path:
    """Write CSV if `path` ends in `.csv`, else JSON; into `blueprint.json` if `path` is a folder. Returns the file.

    Raises:
        BlueprintError: if it cannot be written; what was there before is untouched.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    write_atomically(path, to_csv(blueprint) if path.suffix == ".csv" else to_json(blueprint))
    return path


def aggregate(sources: Mapping[str, Blueprint] | Iterable[str | Path]) -> list[dict[str, Any]]:
    """Many blueprints as one table (A.2): a row per entry, keyed by model, checkpoint, source and entry.

    The paper's snippet keys by model, checkpoint and entry alone, so that a second lab's or task's file overwrites the
    first (and it returns after the first file). Here the source is part of the key.

    Args:
        sources: blueprints by name of their source, or files to read, named by their paths.

    Returns:
        Rows with `model_id`, `training_checkpoint`, `source`, `id` and the entry's statistics.

    Raises:
        BlueprintError: if a file is not there or is not a blueprint.
    """
    named = sources if isinstance(sources, Mapping) else {str(path): read_blueprint(path) for path in sources}
    return [
        {
            "model_id": blueprint.model_id,
            "training_checkpoint": blueprint.training_checkpoint,
            "source": source,
            **entry_to_dict(entry),
        }
        for source, blueprint in named.items()
        for entry in blueprint.submodules
    ]


def _blank(value: float | None) -> str:
    return "" if value is None else repr(value)


def _cell(cell: str, column: str) -> Any:
    try:
        value = loads(cell, "it")
    except FormatError as error:
        raise FormatError(f"the cell {cell[:40]!r} in column {column} is not a value: {error}") from error
    if column in ("extra", "metadata") and not isinstance(value, dict):
        raise FormatError(f"the cell {cell[:40]!r} in column {column} must be an object.")
    return value
