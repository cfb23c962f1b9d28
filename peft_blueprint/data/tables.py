"""Tables of examples: read from a file or the Hub, whole or as a stream, and written to a file.

Knows nothing of what their columns mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from .._files import replacing
from ..errors import BlueprintError


FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
WRITTEN = (".jsonl", ".csv", ".parquet")


class Stream:
    """A table that is read as it is gone through, anew each time.

    Args:
        table: a `datasets.IterableDataset`.
        source: what it is read from, for messages.
    """

    def __init__(self, table: Iterable[Mapping[str, Any]], source: str):
        self._table = table
        self._source = source

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """The rows.

        Raises:
            BlueprintError: at what cannot be read, or if there is none.
        """
        at = 0
        try:
            for row in self._table:
                yield row
                at += 1
        except Exception as error:  # datasets raises a dozen kinds, of its own and of others
            raise _unreadable(self._source, error, f" after {at} examples" if at else "") from error
        if not at:
            raise _empty(self._source)

    @property
    def column_names(self) -> list[str]:
        """Those of the first row."""
        return list(next(iter(self)))


def read_table(source: str, *, split: str = "train", stream: bool = False) -> Any:
    """A local JSON-lines, CSV or Parquet file, or a data set on the Hub.

    Args:
        source: path or data set id.
        split: of a data set on the Hub.
        stream: read it as it is gone through, in constant memory.

    Returns:
        A `datasets.Dataset`, or a `Stream`.

    Raises:
        BlueprintError: if there is no such file, it cannot be read, or holds no examples.
    """
    from datasets import load_dataset

    path = Path(source)
    if path.suffix in FORMATS and not path.is_file():
        raise BlueprintError(f"There is no file {path} with examples. Check the path.")
    if path.suffix in FORMATS and not path.stat().st_size:
        raise _empty(source)
    try:
        if path.suffix in FORMATS:
            table = load_dataset(FORMATS[path.suffix], data_files=str(path), split="train", streaming=stream)
        else:
            table = load_dataset(source, split=split, streaming=stream)
    except Exception as error:  # datasets raises a dozen kinds, of its own and of others
        if "corresponds to no data" in str(error):
            raise _empty(source) from error
        raise _unreadable(source, error) from error
    if stream:
        return Stream(table, source)
    if not len(table):
        raise _empty(source)
    return table


def require_format(path: Path) -> None:
    """Raise BlueprintError for a file of no format that `write_table` writes."""
    if path.suffix not in WRITTEN:
        raise BlueprintError(f"{path} has none of the endings {', '.join(WRITTEN)}: choose one of these formats.")


def write_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, CSV or Parquet, by the ending; the file appears when it is whole.

    Args:
        path: of the file.
        rows: a list of mappings, or a `datasets.Dataset`.

    Raises:
        BlueprintError: for another ending, if it cannot be written, or for values that the format cannot hold.
    """
    require_format(path)
    with replacing(path) as file:
        _write(file, path, rows)


def require_holds(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Raise BlueprintError for rows that `write_table` could not write there, without writing them."""
    require_format(path)
    _write(BytesIO(), path, rows)


def _write(file: BinaryIO, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    from datasets import Dataset
    from pyarrow import ArrowException  # type: ignore[import-untyped]

    try:
        if path.suffix == ".jsonl":
            for row in rows:
                file.write((json.dumps(_plain(row), ensure_ascii=False) + "\n").encode())
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


def _plain(value: Any) -> Any:
    """A value as JSON has it: dates and times by `isoformat`, numbers that are not finite as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _unreadable(source: str, error: Exception, where: str = "") -> BlueprintError:
    """The reason is that of the cause, where there is one: datasets says only that something went wrong."""
    told = error.__cause__ or error
    reason = str(told).strip().splitlines()[0].rstrip(".") if str(told).strip() else type(told).__name__
    return BlueprintError(f"The data {source!r} cannot be read{where}: {reason}. Mend it, or give another.")


def _empty(source: str) -> BlueprintError:
    return BlueprintError(f"The data {source!r} holds no examples. Give one with at least one.")
