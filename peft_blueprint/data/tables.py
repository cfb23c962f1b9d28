"""Read tables of examples from files or the Hub, whole or as a stream, and write them to files; no torch."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, time
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from .._files import replacing
from .._text import first_line, format_names
from ..errors import BlueprintError


COLUMN_SETS = (("prompt", "completion"), ("messages",), ("text",))  # an example has one of these
READABLE: dict[str, tuple[str, dict[str, str]]] = {  # the module of datasets and its options
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".txt": ("text", {}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
WRITABLE = (".jsonl", ".csv", ".parquet")


class TableStream:
    """A table that is read anew, row by row, on each iteration.

    Args:
        table: a `datasets.IterableDataset`.
        source: for error messages.
    """

    def __init__(self, table: Iterable[Mapping[str, Any]], source: str):
        self._table = table
        self._source = source

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """Iterate over the rows.

        Raises:
            BlueprintError: at the first row that cannot be read, or if there is none.
        """
        count = 0
        try:
            for row in self._table:
                yield row
                count += 1
        except Exception as error:  # datasets raises a dozen types
            raise _unreadable(self._source, error, f" after {count} examples" if count else "") from error
        if not count:
            raise _empty(self._source)

    @property
    def column_names(self) -> list[str]:
        """Column names of the first row."""
        return list(next(iter(self)))


def read_table(source: str, *, split: str = "train", stream: bool = False) -> Any:
    """Read a local file or a dataset on the Hub.

    Args:
        source: path of a JSON Lines, JSON, CSV, TSV, text (an example a line), Parquet or Arrow file, which may be
            compressed (`train.jsonl.gz`); or a dataset's id or local folder, with its configuration after a colon if it
            has several (`openai/gsm8k:main`).
        split: of a dataset on the Hub.
        stream: read row by row in constant memory.

    Returns:
        A `datasets.Dataset`, or a `TableStream`.

    Raises:
        BlueprintError: if the source does not exist, cannot be read, is empty, or has several configurations and none is
            named.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "rows.tsv")
        >>> _ = path.write_text("prompt\\tcompletion\\n1 + 1\\ttwo\\n")
        >>> read_table(str(path))[0]
        {'prompt': '1 + 1', 'completion': 'two'}
    """
    datasets = _datasets()
    path = Path(source)
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in COMPRESSED:
        endings.pop()
    kind = READABLE.get(endings[-1]) if endings else None
    if kind and not path.is_file():
        raise BlueprintError(f"The file {path} does not exist.")
    if path.is_file() and not kind:
        raise BlueprintError(f"{path} must end in one of {', '.join(READABLE)}, or be such a file compressed.")
    if kind and not path.stat().st_size:
        raise _empty(source)
    name, _, config = (source, "", "") if path.exists() or ":" not in source else source.rpartition(":")
    try:
        if kind:
            module, options = kind
            table = datasets.load_dataset(module, data_files=str(path), split="train", streaming=stream, **options)
        else:
            table = datasets.load_dataset(name, config or None, split=split, streaming=stream)
    except Exception as error:  # datasets raises a dozen types
        if "corresponds to no data" in str(error) or isinstance(error, StopIteration):
            raise _empty(source) from error
        if "Config name is missing" in str(error):
            configs = datasets.get_dataset_config_names(name)
            raise BlueprintError(
                f"The data {source!r} has several configurations: {format_names(configs, 8)}. Name one, as in "
                f"'{source}:{configs[0]}'."
            ) from error
        raise _unreadable(source, error) from error
    if stream:
        return TableStream(table, source)
    if not len(table):
        raise _empty(source)
    return table


def write_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, CSV or Parquet by the file's ending, atomically.

    Args:
        path: file to write.
        rows: a list of mappings, or a `datasets.Dataset`.

    Raises:
        BlueprintError: for another ending, a path that cannot be written, or values that the format cannot hold.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "rows.jsonl")
        >>> write_table(path, [{"text": "one"}])
        >>> path.read_text()
        '{"text": "one"}\\n'
    """
    require_format(path)
    with replacing(path) as file:
        _write(file, path, rows)


def continue_table(path: Path, rows: Iterable[Mapping[str, Any]], done: int = 0) -> None:
    """Write rows as JSON lines as they come, so that a killed process can go on after the rows of an earlier one.

    They are written to `path` with `.part` at its end, which takes the place of `path` when all are there.

    Args:
        path: file to write, ending in .jsonl.
        rows: that follow the first `done`.
        done: rows that an earlier process wrote; later ones that it wrote are dropped.

    Raises:
        BlueprintError: for another ending, a path that cannot be written, values that JSON cannot hold, or if fewer than
            `done` rows are there.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "rows.jsonl")
        >>> continue_table(path, [{"text": "one"}])
        >>> continue_table(path, [{"text": "two"}], done=1)
        >>> path.read_text().splitlines()
        ['{"text": "one"}', '{"text": "two"}']
    """
    if path.suffix != ".jsonl":
        raise BlueprintError(f"{path} must end in .jsonl, to which rows can be added.")
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if done and not part.exists() and path.exists():
            shutil.copyfile(path, part)
        with part.open("r+b" if part.exists() and done else "w+b") as file:
            found = sum(file.readline().endswith(b"\n") for _ in range(done))
            if found < done:
                raise BlueprintError(
                    f"The kept state counts {done} rows written, but {part} has {found}. Start anew with another "
                    "keep_state."
                )
            file.truncate(file.tell())
            for row in rows:
                _write(file, path, [row])
                file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise BlueprintError(f"{path} cannot be written: {error.strerror or error}. Choose another folder.") from error


def require_format(path: Path) -> None:
    """Raise BlueprintError if `write_table` does not know the file's ending.

    Example:
        >>> require_format(Path("chosen.jsonl"))
    """
    if path.suffix not in WRITABLE:
        raise BlueprintError(f"{path} must end in one of {', '.join(WRITABLE)}.")


def require_storable(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Raise BlueprintError if `write_table` could not write these rows there; writes nothing.

    Example:
        >>> require_storable(Path("chosen.csv"), [{"text": "one"}])
    """
    require_format(path)
    _write(BytesIO(), path, rows)


def require_columns(columns: Mapping[str, str], there: Sequence[str] | None = None) -> None:
    """Raise BlueprintError if `columns` has an unknown key, or names a column that is not there.

    Args:
        columns: the data's own names, as `{"prompt": "question"}`.
        there: the data's columns, where they are known.

    Example:
        >>> require_columns({"prompt": "question"}, there=["question", "answer"])
    """
    known = [name for names in COLUMN_SETS for name in names]
    unknown = [str(key) for key in columns if key not in known]
    if unknown:
        raise BlueprintError(
            f"columns has unknown keys {format_names(unknown)}. Keys are {format_names(known)}, as in prompt=question."
        )
    if there is not None and (missing := [column for column in columns.values() if column not in there]):
        raise BlueprintError(
            f"The data has no column {format_names(missing)}; it has {format_names(list(map(str, there)))}."
        )


def _datasets() -> Any:
    """Import datasets, an extra that placing adapters does not need."""
    try:
        import datasets
    except ImportError as error:
        raise BlueprintError("Data is read with datasets: pip install 'peft-blueprint[data]'.") from error
    return datasets


def _write(file: BinaryIO, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    Dataset = _datasets().Dataset
    from pyarrow import ArrowException

    try:
        if path.suffix == ".jsonl":  # Dataset.to_json would write dates as milliseconds and fill in missing keys
            for row in rows:
                file.write((json.dumps(_to_json(row), ensure_ascii=False) + "\n").encode())
            return
        table = rows if isinstance(rows, Dataset) else Dataset.from_list([dict(row) for row in rows])
        if path.suffix == ".csv":
            table.to_csv(file, index=False)
        else:
            table.to_parquet(file)
    except BlueprintError:
        raise
    except UnicodeDecodeError as error:
        raise BlueprintError(f"The examples for {path} cannot be read: {error}. Save the data as UTF-8.") from error
    except (TypeError, ValueError, OverflowError, ArrowException) as error:
        reason = str(error).strip().rstrip(".")
        raise BlueprintError(f"{path} cannot hold these examples: {reason}. Choose another format.") from error


def _to_json(value: Any) -> Any:
    """Convert dates and times to ISO text, and numbers that are not finite to None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {key: _to_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(inner) for inner in value]
    return value


def _unreadable(source: str, error: Exception, where: str = "") -> BlueprintError:
    """Describe the cause of an error, which the message of datasets leaves out."""
    return BlueprintError(f"The data {source!r} cannot be read{where}: {first_line(error.__cause__ or error)}.")


def _empty(source: str) -> BlueprintError:
    return BlueprintError(f"The data {source!r} has no examples.")
