"""Tables of examples: read from a file or the Hub, whole or as a stream, and written to a file.

Knows nothing of what their columns mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import BlueprintError
from .files import replacing


FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
WRITTEN = (".jsonl", ".csv", ".parquet")


def read_table(source: str, *, split: str = "train", stream: bool = False) -> Any:
    """A local JSON-lines, CSV or Parquet file, or a data set on the Hub.

    Args:
        source: path or data set id.
        split: of a data set on the Hub.
        stream: read it as it is gone through, in constant memory.

    Returns:
        A `datasets.Dataset`, or a `datasets.IterableDataset`.

    Raises:
        BlueprintError: if there is no such file, or it cannot be read.
    """
    from datasets import load_dataset

    path = Path(source)
    if path.suffix in FORMATS and not path.is_file():
        raise BlueprintError(f"There is no file {path} with examples. Check the path.")
    try:
        if path.suffix in FORMATS:
            return load_dataset(FORMATS[path.suffix], data_files=str(path), split="train", streaming=stream)
        return load_dataset(source, split=split, streaming=stream)
    except Exception as error:  # datasets raises a dozen kinds, of its own and of others
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BlueprintError(f"The data {source!r} cannot be read: {reason}.") from error


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
    from datasets import Dataset

    require_format(path)
    with replacing(path) as file:
        try:
            if path.suffix == ".jsonl":
                for row in rows:
                    file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
                return
            table = rows if isinstance(rows, Dataset) else Dataset.from_list([dict(row) for row in rows])
            if path.suffix == ".csv":
                table.to_csv(file, index=False)
            else:
                table.to_parquet(file)
        except (TypeError, ValueError) as error:
            raise BlueprintError(f"{path} cannot hold these examples: {error}. Choose another format.") from error
