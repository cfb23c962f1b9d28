"""The record as JSON and CSV: bytes become a checked `Blueprint`, and back, exactly.

The JSON is that of the paper's appendix A.1 (`model_id`, `training_checkpoint`, `layers` with `id`, `gradient_norm`,
`alpha`, `gamma`, `k_star`, `domain_tags`) with further keys beside. Knows nothing of models; torch is not imported.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .blueprint import Blueprint
from .entry import Submodule, level_of_ids, some
from .errors import BlueprintError, FormatError
from .theory import gamma_from_alpha


SCHEMA_VERSION = 1
FILE_NAME = "blueprint.json"

_PAPER_KEYS = ("gradient_norm", "alpha", "gamma", "k_star", "domain_tags")
_NAMED_KEYS = ("name", "extra")  # fields of an entry that a file spells otherwise
_ENTRY_KEYS = tuple(f.name for f in fields(Submodule) if f.name not in _NAMED_KEYS)
_TOP_KEYS = tuple(f.name for f in fields(Blueprint) if f.name not in ("submodules", "extra"))
_GAMMA_TOLERANCE = 0.006  # the paper's example prints two digits


def to_dict(blueprint: Blueprint) -> dict[str, Any]:
    """The JSON object of a blueprint; statistics that are not known are left out."""
    top = {key: _plain(getattr(blueprint, key)) for key in _TOP_KEYS}
    return {
        "schema_version": SCHEMA_VERSION,
        **{key: value for key, value in top.items() if _is_known(value)},
        **blueprint.extra,
        "layers": [_entry_to_dict(entry) for entry in blueprint.submodules],
    }


def from_dict(data: Any) -> Blueprint:
    """A checked blueprint from a JSON object.

    Raises:
        FormatError: naming the key or entry that is wrong.
    """
    if not isinstance(data, Mapping):
        raise FormatError(f"A blueprint is a JSON object with model_id and layers, not {_type(data)}.")
    version = data.get("schema_version", SCHEMA_VERSION)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise FormatError(f"schema_version is {version!r}; it must be a whole number from 1.")
    if version > SCHEMA_VERSION:
        raise FormatError(
            f"This blueprint has schema_version {version}, and this package reads up to {SCHEMA_VERSION}: "
            "pip install --upgrade peft-blueprint."
        )
    layers = _take(data, "layers", list, "the blueprint")
    if layers is None or data.get("model_id") is None:
        raise FormatError(
            f"A blueprint needs the keys model_id and layers; this object has {some(list(data)) or 'none'}."
        )
    entries = tuple(_entry_from_dict(entry, index) for index, entry in enumerate(layers))
    level = _take(data, "level", str, "the blueprint") or level_of_ids(entry.name for entry in entries)
    if level not in ("submodule", "group", "layer"):
        raise FormatError(f"level is {level!r}; it must be submodule, group or layer.")
    return Blueprint(
        model_id=_take(data, "model_id", str, "the blueprint"),
        submodules=_in_the_papers_gamma(entries),
        training_checkpoint=_take(data, "training_checkpoint", float, "the blueprint"),
        level=level,
        model_revision=_take(data, "model_revision", str, "the blueprint"),
        model_digest=_take(data, "model_digest", str, "the blueprint"),
        **{key: _take(data, key, dict, "the blueprint") or {} for key in ("concentration", "costs", "provenance")},
        extra={k: v for k, v in data.items() if k not in (*_TOP_KEYS, "layers", "schema_version")},
    )


def to_json(blueprint: Blueprint) -> str:
    """The blueprint as indented JSON; numbers keep every digit."""
    return json.dumps(to_dict(blueprint), indent=2, allow_nan=False) + "\n"


def from_json(text: str, source: str = "the text") -> Blueprint:
    """Parse JSON into a checked blueprint.

    Raises:
        FormatError: if `text` is not JSON, holds NaN or a key twice, or is not a blueprint; names `source`.
    """
    try:
        return from_dict(json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys))
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{source} is not valid JSON ({error.msg}, line {error.lineno} of {text.count(chr(10)) + 1}): "
            "it may be cut short or not a blueprint at all."
        ) from error
    except RecursionError as error:
        raise FormatError(f"{source} is nested too deeply to be a blueprint.") from error
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from error


def to_csv(blueprint: Blueprint) -> str:
    """One row per entry, for spreadsheets. What belongs to the whole model stands in `metadata`, on the first row."""
    out = io.StringIO()
    writer = csv.DictWriter(out, ("model_id", "training_checkpoint", "id", *_entry_columns(), "metadata"))
    writer.writeheader()
    record = to_dict(blueprint)
    metadata = json.dumps({k: v for k, v in record.items() if k != "layers"}, allow_nan=False)
    for entry in record["layers"]:
        extra = {key: value for key, value in entry.items() if key not in ("id", *_entry_columns())}
        row = {key: value for key, value in entry.items() if key not in extra} | ({"extra": extra} if extra else {})
        writer.writerow(
            {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
            | {
                "model_id": blueprint.model_id,
                "training_checkpoint": _blank(blueprint.training_checkpoint),
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
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows or not {"model_id", "id", "gradient_norm"} <= set(rows[0]):
        raise FormatError(f"{source} is not a blueprint: its CSV needs the columns model_id, id and gradient_norm.")
    record: dict[str, Any] = {"model_id": rows[0]["model_id"]}
    if rows[0].get("training_checkpoint"):
        record["training_checkpoint"] = _cell(rows[0]["training_checkpoint"], "training_checkpoint", source)
    if rows[0].get("metadata"):
        record |= _cell(rows[0]["metadata"], "metadata", source)
    layers = []
    for row in rows:
        if row["model_id"] != rows[0]["model_id"]:
            raise FormatError(
                f"{source} is a table of several models ({rows[0]['model_id']!r}, {row['model_id']!r}); "
                "a blueprint is of one. Keep one model's rows."
            )
        entry: dict[str, Any] = {"id": row["id"]}
        for key in _entry_columns():
            if cell := row.get(key):
                entry[key] = cell if key in ("kind", "group") else _cell(cell, key, source)
        layers.append(entry | entry.pop("extra", {}))
    try:
        return from_dict(record | {"layers": layers})
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from error


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
        text = path.read_text(encoding="utf-8-sig")
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


def write_atomically(path: Path, text: str) -> None:
    """Write a text file beside `path`, then move it there, so that a reader sees the old one or the new one.

    Raises:
        BlueprintError: if the folder cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
                file.write(text)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise BlueprintError(
            f"{path} cannot be written: {error.strerror}. Choose a folder you may write to."
        ) from error


def aggregate(sources: Mapping[str, Blueprint] | Iterable[str | Path]) -> list[dict[str, Any]]:
    """Many blueprints as one table (A.2): a row per entry, keyed by model, checkpoint, source and entry.

    The paper's snippet keys by model, checkpoint and entry alone, so that a second lab's or task's file overwrites the
    first (and it returns after the first file). Here the source is part of the key.

    Args:
        sources: blueprints by name of their source, or files to read, named by their paths.

    Returns:
        Rows with `model_id`, `training_checkpoint`, `source`, `id` and the entry's statistics.

    Raises:
        BlueprintError: if two sources give the same key, or a file is not a blueprint.
    """
    named = sources if isinstance(sources, Mapping) else {str(path): read_blueprint(path) for path in sources}
    return [
        {
            "model_id": blueprint.model_id,
            "training_checkpoint": blueprint.training_checkpoint,
            "source": source,
            **_entry_to_dict(entry),
        }
        for source, blueprint in named.items()
        for entry in blueprint.submodules
    ]


def _entry_columns() -> tuple[str, ...]:
    return (*_PAPER_KEYS, *(key for key in _ENTRY_KEYS if key not in _PAPER_KEYS), "extra")


def _entry_to_dict(entry: Submodule) -> dict[str, Any]:
    values = {key: _plain(getattr(entry, key)) for key in _entry_columns() if key != "extra"}
    return {"id": entry.name, **{k: v for k, v in values.items() if _is_known(v)}, **entry.extra}


def _entry_from_dict(data: Any, index: int) -> Submodule:
    if not isinstance(data, Mapping) or not isinstance(data.get("id"), str):
        raise FormatError(f"Entry {index} of layers must be an object with a text id, not {json.dumps(data)[:80]}.")
    where = repr(data["id"])
    numbers = {
        key: _take(data, key, float, where)
        for key in _ENTRY_KEYS
        if key.endswith(("_norm", "_gain", "_scale", "_error", "_star")) or key in ("alpha", "gamma")
    }
    tags = _take(data, "domain_tags", dict, where) or {}
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in tags.values()):
        raise FormatError(f"domain_tags of {where} must be numbers, not {json.dumps(tags)[:80]}.")
    return Submodule(
        name=data["id"],
        **numbers,
        kind=_take(data, "kind", str, where),
        group=_take(data, "group", str, where),
        depth=_take(data, "depth", int, where),
        examples=_take(data, "examples", int, where),
        quantized=_take(data, "quantized", bool, where) or False,
        shape=_pair(data, "shape", int, where),
        norm_interval=_pair(data, "norm_interval", float, where),
        domain_tags=dict(tags),
        extra={k: v for k, v in data.items() if k != "id" and k not in _ENTRY_KEYS},
    )


def _in_the_papers_gamma(entries: tuple[Submodule, ...]) -> tuple[Submodule, ...]:
    """A.1's example computes γ as α/(1 + α), its text as 1 − α/(1 + α): read both, keep the text's."""
    converted, names = [], []
    for entry in entries:
        if entry.alpha and entry.gamma is not None:
            text = gamma_from_alpha(entry.alpha)
            fits_text, fits_example = (abs(entry.gamma - g) <= _GAMMA_TOLERANCE for g in (text, 1 - text))
            if fits_example and not fits_text:
                names.append(entry.name)
                entry = replace(entry, gamma=text)
        converted.append(entry)
    if names:
        warnings.warn(
            f"gamma of {some(names)} follows alpha/(1 + alpha), as the example in the paper's appendix A.1 does; "
            "its text says 1 - alpha/(1 + alpha), which is what is kept.",
            stacklevel=2,
        )
    return tuple(converted)


def _take(data: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = data.get(key)
    if value is None:
        return None
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError(f"{key} of {where} must be {_NAMES[kind]}, not {_type(value)} {json.dumps(value)[:80]}.")
    return value


def _pair(data: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = _take(data, key, list, where)
    if value is None:
        return None
    if len(value) != 2:
        raise FormatError(f"{key} of {where} must be two numbers, not {json.dumps(value)[:80]}.")
    first, second = (_take({key: item}, key, kind, where) for item in value)
    if first is None or second is None:
        raise FormatError(f"{key} of {where} must be two numbers, not {json.dumps(value)[:80]}.")
    return first, second


_NAMES = {
    str: "text",
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def _type(value: Any) -> str:
    return _NAMES.get(type(value), type(value).__name__)


def _is_known(value: Any) -> bool:
    """What is left out of a file is what a reader takes to be None, false or empty; a zero is written."""
    return not (value is None or value is False or value == {})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _blank(value: float | None) -> str:
    return "" if value is None else repr(value)


def _cell(cell: str, column: str, source: str) -> Any:
    try:
        return json.loads(cell, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise FormatError(f"{source}: the cell {cell[:40]!r} in column {column} is not a value.") from error


def _refuse_constant(name: str) -> Any:
    raise FormatError(f"it holds {name}, which is no measurement. Measure the blueprint again.")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise FormatError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in one object.")
    return result


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
