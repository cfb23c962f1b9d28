"""Read examples from files and the Hub, and encode those of a pool to choose from one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from .._text import format_names
from ..errors import BlueprintError
from ..measure import Row, encode_one, with_known_columns
from .tables import COLUMN_SETS, read_table, require_columns


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = Mapping[str, Any]


def read_examples(
    source: str, columns: Mapping[str, str] | None = None, *, split: str = "train", limit: int | None = None
) -> list[dict[str, Any]]:
    """Read examples from a local file or a dataset on the Hub.

    Args:
        source: path or dataset id, see `read_table`.
        columns: the file's own names of `prompt`, `completion`, `messages` or `text`, as `{"prompt": "question"}`.
            Those of Alpaca and ShareGPT need none, see `measure.with_known_columns`.
        split: of a dataset on the Hub.
        limit: read only the first `limit` examples.

    Returns:
        Mappings with `prompt` and `completion`, or `messages`, or `text`.

    Raises:
        BlueprintError: if the file does not exist, cannot be read, or lacks these columns.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "train.jsonl"
        ...     _ = path.write_text(json.dumps({"prompt": "1 + 1 =", "completion": " 2"}))
        ...     read_examples(str(path))
        [{'prompt': '1 + 1 =', 'completion': ' 2'}]
    """
    table = read_table(source, split=split)
    names = {name: (columns or {}).get(name, name) for wanted in COLUMN_SETS for name in wanted}
    chosen = table.select(range(min(limit or len(table), len(table))))
    if not columns and with_known_columns(first := chosen[0]) is not first:
        return [dict(with_known_columns(row, index)) for index, row in enumerate(chosen)]
    for wanted in COLUMN_SETS:
        if all(names[name] in table.column_names for name in wanted):
            return [{name: row[names[name]] for name in wanted} for row in chosen]
    raise BlueprintError(
        f"{source!r} must have the columns prompt and completion, messages, or text; it has "
        f"{format_names(table.column_names)}. Name them, for example with columns prompt=question,completion=answer."
    )


@dataclass(frozen=True)
class Candidate:
    """One example of a pool.

    Args:
        index: position in the dataset, from 0.
        row: `input_ids` and `labels`, cut at the maximum length, with at least one target.
        text: its text; or its token ids if it came encoded.
        example: as it was given.
    """

    index: int
    row: Row
    text: str | Sequence[int]
    example: Example


class Pool:
    """A dataset to choose from, read and encoded one example at a time.

    Args:
        dataset: a `datasets.Dataset`, a list or another sequence; or a stream: a `datasets.IterableDataset` or any
            iterable, also one that can be read only once. Its examples are mappings with `prompt` and `completion`,
            `messages` or `text`; or with `input_ids` and `labels`.
        tokenizer: needed for texts.
        columns: the data's own names of these, as `{"prompt": "question"}`.
        max_length: tokens after which an example is cut.
        requires_columns: refuse data without the columns named; a target may have other names than the data.

    Raises:
        BlueprintError: if it is not a dataset, or `columns` names anything else.

    Example:
        >>> pool = Pool([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
        >>> pool.is_stream, pool.encode(0, pool[0]).row["labels"]
        (False, [-100, 6, 7])
    """

    def __init__(
        self,
        dataset: Iterable[Example],
        tokenizer: PreTrainedTokenizerBase | None = None,
        columns: Mapping[str, str] | None = None,
        max_length: int = 512,
        requires_columns: bool = False,
    ):
        if isinstance(dataset, str | bytes | Mapping) or not isinstance(dataset, Iterable):
            keys = f" with keys {format_names(list(map(str, dataset)))}" if isinstance(dataset, Mapping) else ""
            raise BlueprintError(
                f"dataset must be a list of examples, a datasets.Dataset (one split) or a stream, got "
                f"{type(dataset).__name__}{keys}. Read files with data.read_examples."
            )
        if isinstance(dataset, Sized) and not hasattr(dataset, "__getitem__"):
            raise BlueprintError(
                f"dataset has a length and no positions ({type(dataset).__name__}). Pass list(…), or iter(…) as a stream."
            )
        self._dataset = dataset
        self._tokenizer = tokenizer
        self._columns = dict(columns or {})
        require_columns(self._columns)
        self._requires_columns = requires_columns
        self._max_length = max_length
        self._names: tuple[str, ...] | None = None
        self.length = len(dataset) if isinstance(dataset, Sized) else None
        if self.length == 0:
            raise BlueprintError("The dataset is empty. Give at least one example.")

    @property
    def is_stream(self) -> bool:
        """Whether its length is unknown; it may be readable only once."""
        return self.length is None

    def __iter__(self) -> Iterator[tuple[int, Example]]:
        """Iterate over positions and examples."""
        return enumerate(self._dataset)

    def __getitem__(self, index: int) -> Example:
        """Return an example of a dataset that is not a stream."""
        return cast(Sequence[Example], self._dataset)[index]

    def encode(self, index: int, example: Example) -> Candidate | None:
        """Encode an example; None if it has no target.

        Raises:
            BlueprintError: if the example is not a mapping, lacks a column, or holds neither text nor token ids.
        """
        is_encoded = not isinstance(example, Mapping) or {"input_ids", "labels"} <= example.keys()
        if not is_encoded and not self._columns:
            example = with_known_columns(example, index)
        texts = example if is_encoded else self._texts(index, example)
        row = None if texts is None else encode_one(texts, self._tokenizer, self._max_length, index)
        if row is None or texts is None:
            return None
        return Candidate(index, row, row["input_ids"] if is_encoded else _plain_text(texts), example)

    def _texts(self, index: int, example: Example) -> dict[str, Any] | None:
        """Prompt and completion, messages or text under these names; None where one is missing or empty."""
        there = list(map(str, example))
        if self._names is None:
            self._names = self._find_names(index, there)
        found = {}
        for name in self._names:
            column = self._columns.get(name, name)
            if column not in example:
                raise BlueprintError(
                    f"Example {index} lacks the column {column!r} of the examples before it; it has "
                    f"{format_names(there)}. Leave it out, or give every example the same columns."
                )
            value = example[column]
            if value is None or (name != "prompt" and not value):
                return None
            if not isinstance(value, list if name == "messages" else str):
                kind = "a list of messages" if name == "messages" else "text"
                raise BlueprintError(f"{column!r} of example {index} must be {kind}, got {type(value).__name__}.")
            found[name] = value
        return found

    def _find_names(self, index: int, there: Sequence[str]) -> tuple[str, ...]:
        if self._requires_columns:
            require_columns(self._columns, there)
        if not set(self._columns.values()) & set(there):  # a target may have other names than the data
            self._columns = {}
        for names in COLUMN_SETS:
            if all(self._columns.get(name, name) in there for name in names):
                return names
        raise BlueprintError(
            f"Example {index} must have prompt and completion, messages, text, or input_ids and labels; it has "
            f"{format_names(there)}. Name its columns, for example columns={{'prompt': 'question'}}."
        )


def _plain_text(texts: Mapping[str, Any]) -> str:
    if "messages" in texts:
        return "\n".join(str(message.get("content", "")) for message in texts["messages"])
    return "\n".join(texts.values())
