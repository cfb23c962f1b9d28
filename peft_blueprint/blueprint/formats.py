"""Read and write a record as JSON, CSV or a file of any kind, and name blueprint files.

A record is a blueprint's JSON object, see `schema`. Readers return it unchecked: `from_dict` checks it once.
"""

from __future__ import annotations

import csv
import io
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._files import write_atomically
from .._text import format_names
from ..errors import BlueprintError, FormatError
from .arrays import from_arrays_bytes, to_arrays_bytes
from .header import read_metadata
from .header_text import JSON_KEY, has_arrays
from .model_files import ADAPTER_FILE, INDEX_FILE, MODEL_FILE, read_embedded
from .schema import DIGEST, ENTRY_KEYS
from .strict_json import csv_rows, loads, read_text


FILE_NAME = "blueprint.json"
SUFFIXES = (".json", ".csv", ".safetensors")
MAX_ARRAYS = 2**28  # bytes

_DOMAIN = re.compile(r"[a-z0-9](?:[a-z0-9._]{0,62}[a-z0-9])?")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_FORMULA = re.compile(r"'*[=+\-@\t\r]")  # with the apostrophes that a text has already
_LONG_LIST = re.compile(r"\[\n([-+.,eE\d\s]+)\]")


def file_name(domain: str | None = None, checkpoint: float | None = None, suffix: str = ".json") -> str:
    """Name a blueprint's file: `blueprint[-DOMAIN][-PERCENT].json`.

    Args:
        domain: the kind of data: lower-case letters, digits, dots and underscores, and not a number.
        checkpoint: share of the model's training that was done, (0, 1].
        suffix: of the file.

    Raises:
        BlueprintError: for another domain or checkpoint.

    Example:
        >>> file_name("math", 0.8)
        'blueprint-math-80.json'
    """
    name = "blueprint"
    if domain is not None:
        if not _DOMAIN.fullmatch(domain) or ".." in domain or _NUMBER.fullmatch(domain):
            raise BlueprintError(
                f"domain must be at most 64 lower-case letters, digits, dots and underscores and not a number, such as math "
                f"or source_code; got {domain!r}."
            )
        name += f"-{domain}"
    if checkpoint is not None:
        if not 0 < checkpoint <= 1:
            raise BlueprintError(f"checkpoint must be in (0, 1], got {checkpoint}.")
        name += f"-{checkpoint * 100:.6g}"
    return name + suffix


def blueprint_files(names: Iterable[str]) -> list[str]:
    """Return the blueprints among the names of files, 50 before 100; of several suffixes of one name, JSON first.

    Example:
        >>> blueprint_files(["blueprint-100.json", "blueprint-50.csv", "blueprint-50.json", "config.json"])
        ['blueprint-50.json', 'blueprint-100.json']
    """
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda name: [name.endswith(suffix) for suffix in SUFFIXES], reverse=True):
        stem, suffix = Path(name).stem, Path(name).suffix
        if suffix in SUFFIXES and re.match(r"blueprint(-|$)", stem):
            found.setdefault(stem, name)
    return [found[stem] for stem in sorted(found, key=_by_number)]


def _by_number(stem: str) -> list[tuple[int, float, str]]:
    """Return a sorting key in which numbers follow words and are compared as numbers."""
    parts = stem.split("-")
    return [(1, float(part), "") if _NUMBER.fullmatch(part) else (0, 0.0, part) for part in parts]


def latest_checkpoint(name: str, names: Iterable[str], where: str) -> str | None:
    """Return the file of the latest checkpoint, where a blueprint has no final file; warn unless it is of the last step.

    Args:
        name: file of the finished model's blueprint, such as `blueprint.json`.
        names: files that are there.
        where: repository or folder named in the warning.

    Example:
        >>> latest_checkpoint("blueprint.json", ["blueprint-50.json", "blueprint-100.json"], "org/model")
        'blueprint-100.json'
    """
    percents = {}
    for file in blueprint_files(names):
        stem, _, number = Path(file).stem.rpartition("-")
        if stem == Path(name).stem and _NUMBER.fullmatch(number):
            percents[file] = float(number)
    latest = max(percents, key=lambda file: percents[file], default=None)
    if latest is not None and percents[latest] < 100:
        warnings.warn(
            f"{where} has no {name}. {latest} was read instead, measured at {percents[latest]:g} % of the training.",
            stacklevel=2,
        )
    return latest


def to_json(record: Mapping[str, Any]) -> str:
    """Write a record as indented JSON with lists of numbers on one line.

    Example:
        >>> print(to_json({"layers": [{"id": "attn.0", "norm_interval": [0.04, 0.06]}]}), end="")
        {
          "layers": [
            {
              "id": "attn.0",
              "norm_interval": [0.04, 0.06]
            }
          ]
        }
    """
    text = json.dumps(record, indent=2, allow_nan=False)
    # a JSON string has no line end, so that this never matches within one
    return _LONG_LIST.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def to_csv(record: Mapping[str, Any]) -> str:
    """Write one row per entry, for spreadsheets, which may reorder and round: no digest.

    The keys of the whole model stand in `metadata`, on the first row.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, ("model_id", "training_checkpoint", "id", *ENTRY_KEYS, "extra", "metadata"))
    writer.writeheader()
    metadata = json.dumps({k: v for k, v in record.items() if k not in ("layers", DIGEST)})
    checkpoint = record.get("training_checkpoint")
    for entry in record["layers"]:
        row = {key: value for key, value in entry.items() if key in ("id", *ENTRY_KEYS)}
        extra = {key: value for key, value in entry.items() if key not in row}
        writer.writerow(
            {key: to_cell(value) if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
            | {
                "model_id": to_cell(record["model_id"]),
                "training_checkpoint": "" if checkpoint is None else repr(checkpoint),
                "extra": json.dumps(extra) if extra else "",
                "metadata": metadata,
            }
        )
        metadata = ""
    return out.getvalue()


def from_csv(text: str, source: str = "the text") -> dict[str, Any]:
    """Return the record of the CSV that `to_csv` writes, or of one with just model_id, id and gradient_norm.

    Raises:
        FormatError: if a column is missing or a cell has the wrong type; names `source`.

    Example:
        >>> from_csv("model_id,id,gradient_norm\\norg/model,attn.0,0.052\\n")
        {'model_id': 'org/model', 'layers': [{'id': 'attn.0', 'gradient_norm': 0.052}]}
    """
    try:
        return _csv_record(text)
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from error


def _csv_record(text: str) -> dict[str, Any]:
    """Return the record that the rows of a CSV stand for."""
    rows = [{key: from_cell(value) for key, value in row.items()} for row in csv_rows(text)]
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


def to_cell(text: str) -> str:
    """Return a text as a cell of a CSV that spreadsheets do not take for a formula: with an apostrophe before it.

    Example:
        >>> to_cell("=1+1"), to_cell("attn.0")
        ("'=1+1", 'attn.0')
    """
    return f"'{text}" if _FORMULA.match(text) else text


def from_cell(cell: Any) -> Any:
    """Return what `to_cell` was given."""
    return cell[1:] if isinstance(cell, str) and cell.startswith("'") and _FORMULA.match(cell) else cell


def read_record(path: str | Path, name: str = FILE_NAME) -> tuple[Any, str]:
    """Read the record in a `.json`, `.csv` or `.safetensors` file, a blueprint's own or a model's, or in a folder.

    Args:
        path: of the file; or of a folder, where `name` is looked for, then the same with `.safetensors`, then, for the
            main blueprint, the header or index of the model there; then the latest checkpoint's.
        name: of the file in a folder.

    Returns:
        The record, unchecked, and where it was found.

    Raises:
        BlueprintError: if the file does not exist or cannot be read.
        FormatError: if it is not JSON, CSV or safetensors.
    """
    path = Path(path)
    if path.is_dir():
        beside = (path / name, path / f"{name.removesuffix('.json')}.safetensors")
        in_model = (MODEL_FILE, INDEX_FILE, ADAPTER_FILE) if name == FILE_NAME else ()
        holders = [path / file for file in in_model if (path / file).exists()]
        found = next((file for file in beside if file.exists()), None)
        found = found or next((file for file in holders if _carries_record(file)), None)
        if found is None:
            latest = latest_checkpoint(name, (file.name for file in path.iterdir()), str(path))
            found = None if latest is None else path / latest
        path = found or (holders[0] if holders else path / name)
    if path.name.endswith((".safetensors", INDEX_FILE)) and not _has_arrays(path):
        return read_embedded(path)
    if path.suffix == ".safetensors":
        return from_arrays_bytes(_read_bytes(path), str(path)), str(path)
    text = read_text(path)
    return (from_csv if path.suffix == ".csv" else loads)(text, str(path)), str(path)


def write_record(record: Mapping[str, Any], path: str | Path) -> Path:
    """Write CSV if `path` ends in `.csv`, tensors if in `.safetensors`, otherwise JSON; `blueprint.json` in a folder.

    Returns the file.

    Raises:
        BlueprintError: if it cannot be written, or is a safetensors file that holds something else, such as a model;
            the old file is untouched.
    """
    path = Path(path)
    if path.is_dir():
        path /= FILE_NAME
    if path.suffix == ".safetensors":
        if path.exists() and not _has_arrays(path):
            raise BlueprintError(
                f"{path} holds a model, or another file's tensors, and is not overwritten. To put the blueprint into its "
                f"header, run `peft-blueprint embed {path} BLUEPRINT`; or choose another name."
            )
        write_atomically(path, to_arrays_bytes(record))
    else:
        write_atomically(path, (to_csv if path.suffix == ".csv" else to_json)(record))
    return path


def _carries_record(path: Path) -> bool:
    """Return whether there is a blueprint in a model's file; also for one that cannot be read, whose error counts."""
    try:
        read_embedded(path)
    except FormatError:
        return True
    except BlueprintError:
        return False
    return True


def _has_arrays(path: Path) -> bool:
    """Return whether a safetensors file is a blueprint of its own, not a model that may carry one."""
    text = read_metadata(path).get(JSON_KEY) if path.suffix == ".safetensors" else None
    return text is not None and has_arrays(loads(text, str(path)))


def _read_bytes(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_ARRAYS:
        raise FormatError(f"{path} has {size:,} bytes; a separate blueprint has at most {MAX_ARRAYS:,}.")
    return path.read_bytes()


def _beside(known: Mapping[str, Any], cell: str | None, column: str) -> dict[str, Any]:
    """Return the object in a cell, which may not contradict the other columns."""
    more = _cell(cell or "{}", column)
    twice = [key for key in more if key in known and known[key] != more[key]]
    if twice:
        raise FormatError(
            f"{format_names(twice)} appear both as a column and, with other values, in {column}; keep one."
        )
    return more


def _cell(cell: str, column: str) -> Any:
    try:
        value = loads(cell, "it")
    except FormatError as error:
        raise FormatError(f"the cell {cell[:40]!r} in column {column} is not a value: {error}") from error
    if column in ("extra", "metadata") and not isinstance(value, dict):
        raise FormatError(f"the cell {cell[:40]!r} in column {column} must be an object.")
    return value
