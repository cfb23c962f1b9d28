"""Many blueprints become one table: a row per entry, by model, checkpoint, source and domain; as CSV, JSON or Parquet.

Knows nothing of tensors, and does no arithmetic on what it gathers; that is `merging`'s and `movement`'s.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from .._files import replacing
from .._text import format_names, shape_str
from ..blueprint import NUMBERS, SUFFIXES, Blueprint, Submodule
from ..errors import BlueprintError


OnError = Literal["raise", "skip"]
Sources = Mapping[str, Blueprint | str | Path] | Iterable[str | Path]

TAG = "domain_tags."  # before the domain's name, a column

_STATISTICS = (*(name for name in NUMBERS if name != "gradient_norm"), "alpha_error", "gamma")
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
_PART = 10_000  # rows that datasets takes at a time: it needs several times a part's size
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
    """Many blueprints as one flat table (A.2): a row per entry, keyed by model, checkpoint, source, domain and entry.

    The paper's snippet keys by model, checkpoint and entry alone, so that a second lab's or task's file overwrites the
    first (and it returns after the first file). Here source and domain are part of the key. Files are read one after
    the other, and only the rows are kept.

    Args:
        sources: see `read_sources`.
        on_error: see `read_sources`; what is skipped is said in one warning.

    Returns:
        Rows of the same keys in the same order, those of `COLUMNS` and a `domain_tags.NAME` for every domain that any
        blueprint has; a column has one type, or None. `shape` is text, "48x32"; `parameters` its product;
        `interval_low` and `interval_high` are those of `norm_interval`; `extra` is JSON. A blueprint that is itself
        merged has the domains, data, digests and commands of its parts, each once, joined by "; ", and the largest
        epsilon and delta. Alignments are left out: their numbers say nothing outside of their own blueprint.

    Raises:
        BlueprintError: see `read_sources`.
    """
    skipped: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    tags: list[Mapping[str, float]] = []
    for source, blueprint in _each(sources, on_error, skipped):
        rows += _rows(source, blueprint)
        tags += [entry.domain_tags for entry in blueprint]
    if skipped:
        warnings.warn(skipped_in_words(skipped), stacklevel=2)
    names = sorted({name for of_entry in tags for name in of_entry})
    for row, of_entry in zip(rows, tags, strict=True):
        row |= {TAG + name: None if name not in of_entry else float(of_entry[name]) for name in names}
    return rows


def read_sources(
    sources: Sources, *, on_error: OnError = "raise", progress: bool = False
) -> tuple[dict[str, Blueprint], dict[str, str]]:
    """The blueprints of many sources by name, and what was skipped.

    Args:
        sources: files, folders and repository ids, as `Blueprint.from_pretrained` takes them, but a folder stands for
            every blueprint in it: `blueprint.json`, `blueprint-50.json`, `blueprint-math-80.safetensors` and so on, and
            of the same name with several suffixes the JSON. Or a mapping from names to those or to blueprints. The name
            of a source is what was given, of a file in a folder its path. One that is given twice counts once.
        on_error: "raise", or "skip" to go on with the others.
        progress: show a progress bar.

    Returns:
        Blueprints by name; and for every source that was skipped, why.

    Raises:
        BlueprintError: naming the source that is not there or is no blueprint; if there are no sources, or none of
            them is a blueprint; for an unknown `on_error`.
    """
    skipped: dict[str, str] = {}
    return dict(_each(sources, on_error, skipped, progress)), skipped


def skipped_in_words(skipped: Mapping[str, str]) -> str:
    """What was skipped and why, as one text."""
    return f"{len(skipped)} of the sources skipped. " + " ".join(skipped.values())


def write_table(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Write rows as .csv, .json (a list of objects, one a line), .jsonl or .parquet. Returns the file.

    The columns are all keys of the rows, in the order in which they are first met. In Parquet a column in which nothing
    is known has the type that `aggregate` gives it, or text.

    Args:
        rows: flat: text, numbers, true and false, or None for what is not known.
        path: its suffix says which format.

    Raises:
        BlueprintError: for another suffix, no rows, a column of several types or of what is not flat; or if the file
            cannot be written. What was there before is untouched.
    """
    path = Path(path)
    write = writer_of(path)
    types = _types(rows)
    with replacing(path) as file:
        try:
            write(rows, types, file)
        except (TypeError, ValueError, OverflowError) as error:
            raise BlueprintError(
                f"The table cannot be written to {path}: {error}. Give text that is Unicode and finite numbers."
            ) from error
    return path


def writer_of(path: Path) -> Callable[[Sequence[Mapping[str, Any]], Mapping[str, type], BinaryIO], None]:
    """The function that writes the format that a path's suffix names.

    Raises:
        BlueprintError: if there is none; lists those there are.
    """
    if path.suffix not in _WRITERS:
        raise BlueprintError(
            f"{path}: no table is written as {path.suffix or 'a file without suffix'}. Choose a name that ends in "
            f"{', '.join(_WRITERS)}."
        )
    return _WRITERS[path.suffix]


def parts_of(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The provenances of the measurements behind a blueprint: of a merged one its parts', else its own."""
    merged = provenance.get("merged")
    if not isinstance(merged, Sequence) or not merged or not all(isinstance(part, Mapping) for part in merged):
        return [provenance]
    return [leaf for part in merged for leaf in parts_of(part)]


def has_privacy(blueprint: Blueprint) -> bool:
    """Whether a blueprint, or a part of a merged one, was published with privacy noise."""
    return any(part.get("privacy") for part in (blueprint.provenance, *parts_of(blueprint.provenance)))


def reference_of(part: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Name and data digest of the domain that a measurement's norms are over, its first, as far as it says so."""
    domains = part.get("domains")
    if not isinstance(domains, Mapping) or not domains:
        return None, None
    name = next(iter(domains))
    of_domain = domains[name]
    digest = of_domain.get("data_digest") if isinstance(of_domain, Mapping) else None
    return name, digest if isinstance(digest, str) else None


def _each(
    sources: Sources, on_error: OnError, skipped: dict[str, str], progress: bool = False
) -> Iterator[tuple[str, Blueprint]]:
    """Blueprints with their names, read as they are asked for; what is skipped is written into `skipped`."""
    if on_error not in get_args(OnError):
        raise BlueprintError(f"on_error={on_error!r}: choose one of {', '.join(get_args(OnError))}.")
    named = _named([sources] if isinstance(sources, str | Path) else sources)
    if not named:
        raise BlueprintError("There is nothing to aggregate: give at least one file, folder or repository id.")
    if progress:
        from tqdm import tqdm

    for name, source in tqdm(named.items(), "reading", unit=" blueprints", leave=False) if progress else named.items():
        try:
            yield name, source if isinstance(source, Blueprint) else _read(name, source)
        except BlueprintError as error:
            if on_error == "raise":
                raise
            skipped[name] = str(error)
    if len(skipped) == len(named):
        raise BlueprintError(f"None of the sources is a blueprint. {skipped_in_words(skipped)}")


def _read(name: str, source: str | Path) -> Blueprint:
    try:
        return Blueprint.from_pretrained(source)
    except BlueprintError as error:
        if name in str(error):
            raise
        raise type(error)(f"{name}: {error}") from error


def _named(sources: Sources) -> dict[str, Blueprint | str | Path]:
    named: dict[str, Blueprint | str | Path] = {}
    for name, source in sources.items() if isinstance(sources, Mapping) else ((None, s) for s in sources):
        if not isinstance(source, str | Path | Blueprint) or (name is None and isinstance(source, Blueprint)):
            raise BlueprintError(
                f"{'A source' if name is None else name} is a {type(source).__name__}: give paths and repository ids, or "
                "a mapping from names to those or to blueprints."
            )
        files = [] if isinstance(source, Blueprint) else _files_of(source)
        named |= {str(file) if name is None else f"{name}/{file.name}": file for file in files}
        if not files:
            named[str(source) if name is None else name] = source
    return named


def _files_of(source: str | Path) -> list[Path]:
    """The blueprints that stand side by side in a folder, 50 before 100; nothing for any other source."""
    folder = Path(source)
    if not folder.is_dir():
        return []
    files: dict[str, Path] = {}
    for suffix in SUFFIXES:
        for path in folder.glob(f"blueprint*{suffix}"):
            if path.is_file() and re.match(r"blueprint(-|$)", path.stem):
                files.setdefault(path.stem, path)
    return [files[stem] for stem in sorted(files, key=_by_number)]


def _by_number(stem: str) -> list[tuple[int, float, str]]:
    """A key to sort by in which numbers count as such, after what is no number."""
    parts = stem.split("-")
    return [(1, float(part), "") if re.fullmatch(r"\d+(\.\d+)?", part) else (0, 0.0, part) for part in parts]


def _rows(source: str, blueprint: Blueprint) -> list[dict[str, Any]]:
    parts = parts_of(blueprint.provenance)
    references = [reference_of(part) for part in parts]
    privacy = [part["privacy"] for part in (blueprint.provenance, *parts) if part.get("privacy")]
    key = {
        "model_id": blueprint.model_id,
        "training_checkpoint": _number(blueprint.training_checkpoint),
        "source": source,
        "domain": joined(name for name, _ in references),
    }
    about = {
        "level": blueprint.level,
        "model_revision": blueprint.model_revision,
        "model_digest": blueprint.model_digest,
        "data": joined(part.get("data") for part in parts),
        "data_digest": joined(digest for _, digest in references),
        "method": joined(part.get("method") for part in parts),
        "dtype": joined(part.get("dtype") for part in parts),
        "command": joined(part.get("command") for part in parts),
        "created": joined(part.get("created") for part in parts),
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


def joined(values: Iterable[Any]) -> str | None:
    """Each of the values once, as text."""
    texts = [value if isinstance(value, str) else json.dumps(value, default=str) for value in values if value]
    return "; ".join(dict.fromkeys(texts)) or None


def _types(rows: Sequence[Mapping[str, Any]]) -> dict[str, type]:
    """The one type of every column: bool, int, float or str."""
    if not rows:
        raise BlueprintError("There are no rows to write: aggregate at least one blueprint.")
    found: dict[str, set[type]] = {}
    for row in rows:
        for column, value in row.items():
            found.setdefault(column, set()).add(type(value))
    types = {}
    for column, of_column in found.items():
        known = of_column - {type(None)}
        if not known <= {bool, int, float, str} or len(known) > 1 and known != {int, float}:
            raise BlueprintError(
                f"Column {column!r} holds {format_names(sorted(t.__name__ for t in known))}; a column of a table holds text, "
                "numbers, or true and false. Flatten it as aggregate() does."
            )
        expected = float if column.startswith(TAG) else COLUMNS.get(column, str)
        types[column] = (float if len(known) > 1 else known.pop()) if known else expected
    return types


def _write_csv(rows: Sequence[Mapping[str, Any]], types: Mapping[str, type], file: BinaryIO) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.DictWriter(text, list(types))
    writer.writeheader()
    writer.writerows(rows)
    text.detach()  # which flushes, and leaves the file open


def _write_json(rows: Sequence[Mapping[str, Any]], types: Mapping[str, type], file: BinaryIO) -> None:
    for i, row in enumerate(rows):
        file.write(b",\n" if i else b"[\n")
        file.write(_line(row, types))
    file.write(b"\n]\n")


def _write_jsonl(rows: Sequence[Mapping[str, Any]], types: Mapping[str, type], file: BinaryIO) -> None:
    for row in rows:
        file.write(_line(row, types) + b"\n")


def _line(row: Mapping[str, Any], types: Mapping[str, type]) -> bytes:
    return json.dumps({column: row.get(column) for column in types}, allow_nan=False).encode()


def _write_parquet(rows: Sequence[Mapping[str, Any]], types: Mapping[str, type], file: BinaryIO) -> None:
    import datasets

    names = {str: "string", int: "int64", float: "float64", bool: "bool"}
    features = datasets.Features({column: datasets.Value(names[kind]) for column, kind in types.items()})
    parts = [rows[start : start + _PART] for start in range(0, len(rows), _PART)]
    table = datasets.concatenate_datasets(
        [
            datasets.Dataset.from_dict({c: [row.get(c) for row in part] for c in types}, features=features)
            for part in parts
        ]
    )
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        table.to_parquet(file)
    finally:
        if had_bars:
            datasets.enable_progress_bars()


_WRITERS = {".csv": _write_csv, ".json": _write_json, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
