"""Collect many blueprints in one table, a row per entry, and write it as CSV, JSON or Parquet."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from .. import blueprint as records
from .._files import replacing
from .._progress import progress_bar
from .._text import shape_str
from ..blueprint import NUMBERS, SUFFIXES, Blueprint, Submodule, from_dict, to_cell
from ..errors import BlueprintError
from .merging import has_privacy, parts_of, reference_of


try:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet
except ImportError as error:
    raise BlueprintError("Tables of blueprints need pyarrow: pip install 'peft-blueprint[data]'.") from error

OnError = Literal["raise", "skip"]
Sources = Mapping[str, Blueprint | str | Path] | Iterable[str | Path]

FORMATS = (".csv", ".json", ".jsonl", ".parquet")
TAG = "domain_tags."  # before the domain's name, a column

_STATISTICS = tuple(name for name in NUMBERS if name != "gradient_norm")
_OF_BLUEPRINT: dict[str, type] = {
    "level": str,
    "model_revision": str,
    "model_digest": str,
    "data": str,
    "data_digest": str,
    "method": str,
    "dtype": str,
    "command": str,
    "created": str,
    "private": bool,
    "privacy_epsilon": float,
    "privacy_delta": float,
}
_OF_ENTRY: dict[str, type] = {
    "kind": str,
    "depth": int,
    "group": str,
    "form": str,
    "shape": str,
    "parameters": int,
    "quantized": bool,
    "examples": int,
    "gradient_norm": float,
    "interval_low": float,
    "interval_high": float,
    **dict.fromkeys(_STATISTICS, float),
    "extra": str,
}
_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
COLUMNS: dict[str, type] = {
    "model_id": str,
    "training_checkpoint": float,
    "source": str,
    "domain": str,
    "id": str,
    **_OF_ENTRY,
    **_OF_BLUEPRINT,
}


def aggregate(sources: Sources, *, on_error: OnError = "raise") -> list[dict[str, Any]]:
    """Collect many blueprints in one flat table: a row per entry, keyed by model, checkpoint, source, domain and entry.

    The paper's snippet in A.2 keys by model, checkpoint and entry alone, so that a second lab's or task's file
    overwrites the first. Rows are plain dictionaries, because a pandas column of whole numbers with unknown values
    becomes float.

    Args:
        sources: see `read_sources`.
        on_error: see `read_sources`; one warning names the skipped sources.

    Returns:
        Rows with the same keys in the same order: those of `COLUMNS` and a `domain_tags.NAME` for every domain of any
        blueprint. A column has one type, or None. `shape` is text, "48x32", and `parameters` its product;
        `interval_low` and `interval_high` are those of `norm_interval`; `extra` is JSON. A merged blueprint has the
        domains, data, digests and commands of its parts, joined by "; ", and the largest epsilon and delta. Alignments
        are left out: their numbers mean nothing outside of their own blueprint.

    Raises:
        BlueprintError: see `read_sources`.

    Example:
        >>> law = Blueprint("org/model", (Submodule("attn.0", 0.052),), level="group")
        >>> code = Blueprint("org/model", (Submodule("attn.0", 0.041),), level="group")
        >>> [(row["source"], row["id"], row["gradient_norm"]) for row in aggregate({"law": law, "code": code})]
        [('law', 'attn.0', 0.052), ('code', 'attn.0', 0.041)]
    """
    skipped: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    tags: list[Mapping[str, float]] = []
    for source, blueprint in _each(sources, on_error, skipped):
        rows += _rows(source, blueprint)
        tags += [entry.domain_tags for entry in blueprint]
    if skipped:
        warnings.warn(describe_skipped(skipped), stacklevel=2)
    names = sorted({name for of_entry in tags for name in of_entry})
    for row, of_entry in zip(rows, tags, strict=True):
        row |= {TAG + name: None if name not in of_entry else float(of_entry[name]) for name in names}
    return rows


def read_sources(
    sources: Sources, *, on_error: OnError = "raise", progress: bool = False
) -> tuple[dict[str, Blueprint], dict[str, str]]:
    """Read the blueprints of many sources.

    Args:
        sources: files, folders and repository ids, as for `Blueprint.from_pretrained`, but a folder or repository stands
            for every blueprint in it: `blueprint.json`, `blueprint-50.json`, `blueprint-math-80.safetensors` and so on,
            and for the JSON among several suffixes of one name. Or a mapping from names to sources or to blueprints. A
            source is named as given, a file in a folder by its path, and one in a repository by `org/name/file` unless
            it is `blueprint.json`. A source that is given twice counts once.
        on_error: "raise", or "skip" to go on with the others.
        progress: show a progress bar.

    Returns:
        Blueprints by name; and the reason for every skipped source by name.

    Raises:
        BlueprintError: naming the source that is missing or not a blueprint; if there are no sources, or none is a
            blueprint; for an unknown `on_error`.

    Example:
        >>> import tempfile
        >>> from peft_blueprint import Submodule
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Blueprint("org/m", (Submodule("layers.0.q_proj", 1.0),)).save(folder)
        ...     blueprints, skipped = read_sources(str(path))
        >>> len(blueprints), skipped
        (1, {})
    """
    skipped: dict[str, str] = {}
    return dict(_each(sources, on_error, skipped, progress)), skipped


def describe_skipped(skipped: Mapping[str, str]) -> str:
    """Return a text that names the skipped sources and the reasons.

    Example:
        >>> describe_skipped({"broken.json": "it is not valid JSON"})
        'Sources skipped: 1. it is not valid JSON'
    """
    return f"Sources skipped: {len(skipped)}. " + " ".join(skipped.values())


def write_table(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Write rows as .csv, .json (a list of objects, one a line), .jsonl or .parquet.

    The columns are all keys of the rows, in the order in which they first appear. An empty column has the type that
    `aggregate` gives it in Parquet, or text. (JSON is written without pandas, whose writer keeps 15 decimals alone.)
    In CSV a text that begins with =, +, - or @ gets an apostrophe, so that spreadsheets do not take it for a formula.

    Args:
        rows: flat: text, numbers, true and false, or None for an unknown value.
        path: its suffix says which format.

    Returns:
        The file.

    Raises:
        BlueprintError: for another suffix, no rows, a column of several types or of nested values, or if the file
            cannot be written; the old file is untouched.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_table([{"id": "a", "gradient_norm": 1.5}], f"{folder}/table.csv").read_text().split()
        ['"id","gradient_norm"', '"a",1.5']
    """
    path = Path(path)
    require_table_format(path)
    table = _table_of(rows)
    with replacing(path) as file:
        if path.suffix == ".csv":
            texts = {
                name: pa.array([None if text is None else to_cell(text) for text in column.to_pylist()], pa.string())
                for name, column in zip(table.column_names, table.columns, strict=True)
                if column.type == pa.string()
            }
            columns = {to_cell(name): texts.get(name, table[name]) for name in table.column_names}
            pyarrow.csv.write_csv(pa.table(columns), file)
        elif path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, file)
        else:
            opening, between, end = ("[\n", ",\n", "\n]\n") if path.suffix == ".json" else ("", "\n", "\n")
            try:
                lines = [
                    json.dumps({name: row.get(name) for name in table.column_names}, allow_nan=False) for row in rows
                ]
            except ValueError as error:
                raise BlueprintError(
                    f"The table cannot be written to {path}: {error}. Give finite numbers."
                ) from error
            file.write((opening + between.join(lines) + end).encode())
    return path


def require_table_format(path: Path) -> None:
    """Raise BlueprintError, with a list of the formats, unless a path's suffix names one.

    Example:
        >>> require_table_format(Path("table.parquet"))
    """
    if path.suffix not in FORMATS:
        raise BlueprintError(f"A table's file name must end in {', '.join(FORMATS)}, got {str(path)!r}.")


def _each(
    sources: Sources, on_error: OnError, skipped: dict[str, str], progress: bool = False
) -> Iterator[tuple[str, Blueprint]]:
    """Yield each blueprint with its name, and write the reason for each skipped source into `skipped`."""
    if on_error not in get_args(OnError):
        raise BlueprintError(f"on_error must be one of {', '.join(get_args(OnError))}, got {on_error!r}.")
    named = _named([sources] if isinstance(sources, str | Path) else sources)
    if not named:
        raise BlueprintError("Aggregating needs at least one file, folder or repository id.")
    for name, source in progress_bar(named.items(), show=progress, desc="reading", unit=" blueprints", leave=False):
        try:
            yield name, source if isinstance(source, Blueprint) else _read(name, source)
        except BlueprintError as error:
            if on_error == "raise":
                raise
            skipped[name] = str(error)
    if len(skipped) == len(named):
        raise BlueprintError(f"None of the sources is a blueprint. {describe_skipped(skipped)}")


def _read(name: str, source: str | Path | _Published) -> Blueprint:
    try:
        if isinstance(source, _Published):
            return from_dict(*records.fetch(source.repo_id, source.file))
        return Blueprint.from_pretrained(source)
    except BlueprintError as error:
        if name in str(error):
            raise
        raise type(error)(f"{name}: {error}") from error


class _Published(NamedTuple):
    """A file of a repository."""

    repo_id: str
    file: str


def _named(sources: Sources) -> dict[str, Blueprint | str | Path | _Published]:
    named: dict[str, Blueprint | str | Path | _Published] = {}
    for name, source in sources.items() if isinstance(sources, Mapping) else ((None, s) for s in sources):
        if not isinstance(source, str | Path | Blueprint) or (name is None and isinstance(source, Blueprint)):
            raise BlueprintError(
                f"{'A source' if name is None else name} must be a path or repository id, or a blueprint in a mapping from "
                f"names, got {type(source).__name__}."
            )
        own = str(source) if name is None else name
        files = [] if isinstance(source, Blueprint) else _files_of(source)
        for file in files:
            is_main = isinstance(file, _Published) and file.file == records.FILE_NAME
            within = file.file if isinstance(file, _Published) else file.name
            named[own if is_main else str(Path(own, within)) if name is None else f"{name}/{within}"] = file
        if not files:
            named[own] = source
    return named


def _files_of(source: str | Path) -> Sequence[Path | _Published]:
    """Return the blueprint files in a folder or repository, 50 before 100; nothing for any other source."""
    path = Path(source)
    if path.is_dir():
        return [
            path / name for name in records.blueprint_files(file.name for file in path.iterdir() if file.is_file())
        ]
    if path.exists() or path.suffix in SUFFIXES:
        return []
    try:
        return [_Published(str(source), file) for file in records.find_blueprints(str(source))]
    except BlueprintError:  # reading it says why
        return []


def _rows(source: str, blueprint: Blueprint) -> list[dict[str, Any]]:
    parts = parts_of(blueprint.provenance)
    references = [reference_of(part) for part in parts]
    privacy = [part["privacy"] for part in (blueprint.provenance, *parts) if part.get("privacy")]
    key = {
        "model_id": blueprint.model_id,
        "training_checkpoint": _number(blueprint.training_checkpoint),
        "source": source,
        "domain": join_unique(name for name, _ in references),
    }
    about = {
        "level": blueprint.level,
        "model_revision": blueprint.model_revision,
        "model_digest": blueprint.model_digest,
        "data": join_unique(part.get("data") for part in parts),
        "data_digest": join_unique(digest for _, digest in references),
        "method": join_unique(part.get("method") for part in parts),
        "dtype": join_unique(part.get("dtype") for part in parts),
        "command": join_unique(part.get("command") for part in parts),
        "created": join_unique(part.get("created") for part in parts),
        "private": has_privacy(blueprint),
        "privacy_epsilon": _largest(privacy, "epsilon"),
        "privacy_delta": _largest(privacy, "delta"),
    }
    return [{**key, "id": entry.name, **_of_entry(entry), **about} for entry in blueprint]


def _of_entry(entry: Submodule) -> dict[str, Any]:
    low, high = entry.norm_interval or (None, None)
    row = {
        "kind": entry.kind,
        "depth": entry.depth,
        "group": entry.group,
        "form": entry.form,
        "shape": None if entry.shape is None else shape_str(entry.shape),
        "parameters": None if entry.shape is None else math.prod(entry.shape),
        "quantized": entry.quantized,
        "examples": entry.examples,
        "gradient_norm": _number(entry.gradient_norm),
        "interval_low": _number(low),
        "interval_high": _number(high),
    }
    row |= {name: _number(getattr(entry, name)) for name in _STATISTICS}
    row["extra"] = json.dumps(entry.extra) if entry.extra else None
    return row


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _largest(privacy: Iterable[Any], key: str) -> float | None:
    known = [_number(one.get(key)) for one in privacy if isinstance(one, Mapping)]
    return max((value for value in known if value is not None), default=None)


def join_unique(values: Iterable[Any]) -> str | None:
    """Join values as text, each once.

    Example:
        >>> join_unique(["math", "law", "math", None])
        'math; law'
    """
    texts = [value if isinstance(value, str) else json.dumps(value, default=str) for value in values if value]
    return "; ".join(dict.fromkeys(texts)) or None


def _table_of(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return rows as an Arrow table, each column of one flat type."""
    if not rows:
        raise BlueprintError("The table has no rows: aggregate at least one blueprint.")
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            column = pa.array([row.get(name) for row in rows])
        except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as error:
            raise BlueprintError(f"Column {name!r} must hold text, numbers, or true and false: {error}.") from error
        if pa.types.is_null(column.type):
            column = column.cast(_ARROW[float if name.startswith(TAG) else COLUMNS.get(name, str)])
        if column.type not in _ARROW.values():
            raise BlueprintError(
                f"Column {name!r} must hold text, numbers, or true and false, got {column.type}. Flatten it as "
                "aggregate() does."
            )
        columns[name] = column
    return pa.table(columns)
