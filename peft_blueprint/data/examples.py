"""Turn examples into token ids: from files and the Hub as batches, or one at a time from a pool to choose from."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from .._text import format_names
from ..errors import BlueprintError
from ..measure import IGNORED
from .tables import COLUMN_SETS, read_table, require_columns


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, list[int]]
Example = Mapping[str, Any]

_LOG = logging.getLogger(__name__)


def read_examples(
    source: str, columns: Mapping[str, str] | None = None, *, split: str = "train", limit: int | None = None
) -> list[dict[str, Any]]:
    """Read examples from a local JSON-lines, CSV or Parquet file, or from a dataset on the Hub.

    Args:
        source: path or dataset id.
        columns: the file's own names of `prompt`, `completion`, `messages` or `text`, as `{"prompt": "question"}`.
        split: of a dataset on the Hub.
        limit: read only the first `limit` examples.

    Returns:
        Mappings with `prompt` and `completion`, or `messages`, or `text`.

    Raises:
        BlueprintError: if the file does not exist, cannot be read, or lacks these columns.
    """
    table = read_table(source, split=split)
    names = {name: (columns or {}).get(name, name) for wanted in COLUMN_SETS for name in wanted}
    for wanted in COLUMN_SETS:
        if all(names[name] in table.column_names for name in wanted):
            chosen = table.select(range(min(limit or len(table), len(table))))
            return [{name: row[names[name]] for name in wanted} for row in chosen]
    raise BlueprintError(
        f"{source!r} must have the columns prompt and completion, messages, or text; it has "
        f"{format_names(table.column_names)}. Name them, for example with columns prompt=question,completion=answer."
    )


def encode(
    examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int = 512
) -> list[Row]:
    """Tokenize examples, with label -100 where there is no target, cut at `max_length` tokens.

    Targets are the tokens of the completion, of the last message, or of the whole text. Examples whose prompt leaves
    no room for a target are left out and counted in the log.

    Raises:
        BlueprintError: if no example is left, or the chat template refuses the messages.
    """
    encoded = (encode_one(example, tokenizer, max_length, index) for index, example in enumerate(examples))
    rows = [row for row in encoded if row is not None]
    if not rows:
        raise BlueprintError(
            f"None of {len(examples)} examples has a target within {max_length} tokens. Increase max_length."
        )
    if len(rows) < len(examples):
        missing = len(examples) - len(rows)
        _LOG.warning("Left out %d of %d examples without a target in %d tokens", missing, len(examples), max_length)
    return rows


def encode_one(
    example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int, index: int = 0
) -> Row | None:
    """Tokenize one example as `encode` does; None if its prompt leaves no room for a target.

    Args:
        example: mapping with prompt and completion, messages, or text.
        tokenizer: the model's.
        max_length: tokens after which it is cut.
        index: position in the data, for error messages.

    Raises:
        BlueprintError: if the chat template refuses the messages.
    """
    if "messages" in example:
        prompt, whole = _render_chat(example["messages"], tokenizer, index)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = prompt_ids + tokenizer(whole.removeprefix(prompt), add_special_tokens=False)["input_ids"]
    elif "completion" in example:
        prompt_ids = tokenizer(example["prompt"])["input_ids"]
        ids = prompt_ids + tokenizer(example["completion"], add_special_tokens=False)["input_ids"]
    else:
        prompt_ids, ids = [], tokenizer(example["text"])["input_ids"]
    if "messages" not in example and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return _cut(ids, [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :], max_length)


def collate(rows: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Pad rows on the right to one batch of `input_ids`, `attention_mask` and `labels`, each (B, T).

    Example:
        >>> batch = collate([{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}], 0)
        >>> batch["input_ids"].tolist()
        [[5, 6], [7, 0]]
    """
    length = max(len(row["input_ids"]) for row in rows)

    def pad(values: Iterable[list[int]], filler: int) -> Tensor:
        return torch.tensor([one + [filler] * (length - len(one)) for one in values])

    return {
        "input_ids": pad((row["input_ids"] for row in rows), pad_token_id),
        "attention_mask": pad(([1] * len(row["input_ids"]) for row in rows), 0),
        "labels": pad((row["labels"] for row in rows), IGNORED),
    }


def make_batches(rows: Sequence[Row], batch_size: int, pad_token_id: int) -> list[dict[str, Tensor]]:
    """Collate rows in order, `batch_size` at a time.

    Example:
        >>> len(make_batches([{"input_ids": [5], "labels": [5]}] * 5, 2, 0))
        3
    """
    return [collate(rows[i : i + batch_size], pad_token_id) for i in range(0, len(rows), batch_size)]


def get_pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding token's id, else the end-of-text token's, else 0; padding is masked in any case."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0


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
        if not isinstance(example, Mapping):
            raise BlueprintError(
                f"Example {index} must be a mapping such as {{'prompt': …, 'completion': …}}, got "
                f"{type(example).__name__}."
            )
        if "input_ids" in example and "labels" in example:
            ids, labels = (_token_ids(index, key, example[key]) for key in ("input_ids", "labels"))
            if len(ids) != len(labels):
                raise BlueprintError(
                    f"input_ids and labels of example {index} must be of one length, got {len(ids)} and {len(labels)}. "
                    f"Label tokens without a target {IGNORED}."
                )
            row = _cut(ids, labels, self._max_length)
            return None if row is None else Candidate(index, row, row["input_ids"], example)
        texts = self._texts(index, example)
        if texts is None:
            return None
        if self._tokenizer is None:
            raise BlueprintError("The examples are texts. Pass the model's tokenizer=….")
        row = encode_one(texts, self._tokenizer, self._max_length, index)
        return None if row is None else Candidate(index, row, _plain_text(texts), example)

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


def _cut(ids: list[int], labels: list[int], max_length: int) -> Row | None:
    """A row of at most `max_length` tokens; None without a target after the first token, which is not predicted."""
    ids, labels = ids[:max_length], labels[:max_length]
    return {"input_ids": ids, "labels": labels} if any(label != IGNORED for label in labels[1:]) else None


def _render_chat(messages: Any, tokenizer: PreTrainedTokenizerBase, index: int) -> tuple[str, str]:
    """The chat up to where the last message starts, and the whole chat, as text."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise BlueprintError(f"The messages of example {index} must be a list, got {type(messages).__name__}.")
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise BlueprintError(
                f"Message {at} of example {index} must be a mapping such as {{'role': 'user', 'content': …}}, got "
                f"{type(message).__name__}."
            )
    if len(messages) < 2:
        raise BlueprintError(
            f"Example {index} must have at least two messages, a question and an answer, got {len(messages)}."
        )
    chat: list[Any] = list(messages)
    try:
        prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, tokenize=False)
        return str(prompt), str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception as error:  # a template is the model author's program and may raise anything
        if getattr(tokenizer, "chat_template", None) is None:
            raise BlueprintError(
                f"Example {index} has messages, but the tokenizer has no chat template. Set tokenizer.chat_template, "
                "or give prompt and completion."
            ) from error
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        roles = format_names([str(message.get("role")) for message in messages])
        raise BlueprintError(
            f"The chat template refuses example {index} with the roles {roles}: {reason}. Change or remove the example."
        ) from error


def _token_ids(index: int, key: str, value: Any) -> list[int]:
    """Token ids or labels from a list, an array or a tensor; only labels may hold -100."""
    expected = f"must be one sequence of integers from 0{f' or {IGNORED}' if key == 'labels' else ''}"
    try:
        found = np.asarray(value.tolist() if hasattr(value, "tolist") else value)
    except (TypeError, ValueError) as error:
        raise BlueprintError(f"{key!r} of example {index} {expected}, got ragged values.") from error
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        entries = f"shape {found.shape}" if found.ndim != 1 else type(found.tolist()[0]).__name__
        raise BlueprintError(f"{key!r} of example {index} {expected}, got {type(value).__name__} of {entries}.")
    wrong = found[(found < 0) & ((found != IGNORED) | (key != "labels"))]
    if wrong.size:
        raise BlueprintError(f"{key!r} of example {index} {expected}, got {wrong[0]}.")
    return cast(list[int], found.tolist())


def _plain_text(texts: Mapping[str, Any]) -> str:
    if "messages" in texts:
        return "\n".join(str(message.get("content", "")) for message in texts["messages"])
    return "\n".join(texts.values())
