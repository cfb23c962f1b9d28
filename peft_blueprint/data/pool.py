"""Examples of any data set, in order and one at a time, as rows of token ids: what is chosen from.

Knows nothing of models or of scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from .._text import format_names
from ..errors import BlueprintError
from ..measure import IGNORED
from .examples import Row, encode_one


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = Mapping[str, Any]

_WANTED = (("prompt", "completion"), ("messages",), ("text",))


def require_columns(columns: Mapping[str, str], there: Sequence[str] | None = None) -> None:
    """Raise BlueprintError for what no column is called after, or for one that is not there.

    Args:
        columns: what the data calls things, as `{"prompt": "question"}`.
        there: the data's columns, where they are known.
    """
    known = [name for wanted in _WANTED for name in wanted]
    unknown = [str(key) for key in columns if key not in known]
    if unknown:
        raise BlueprintError(
            f"The columns name {format_names(unknown)}; what may be named is {format_names(known)}. Write prompt=question."
        )
    if there is not None and (missing := [column for column in columns.values() if column not in there]):
        raise BlueprintError(
            f"The data has no column {format_names(missing)}; it has {format_names(list(map(str, there)))}. Correct the columns."
        )


@dataclass(frozen=True)
class Candidate:
    """One example.

    Args:
        index: its position in the data set, from 0.
        row: `input_ids` and `labels`, cut at the greatest length, with a target among them.
        text: its words, or its token ids where it came as such.
        example: as it was given.
    """

    index: int
    row: Row
    text: str | Sequence[int]
    example: Example


class Pool:
    """A data set to choose from.

    Args:
        dataset: a `datasets.Dataset`, a list or other sequence; or a stream: a `datasets.IterableDataset` or any
            iterable, also one that can be read only once. Of mappings with `prompt` and `completion`, `messages` or
            `text`; or with `input_ids` and `labels`.
        tokenizer: needed for texts.
        columns: what the data calls these, as `{"prompt": "question"}`.
        max_length: tokens of an example; what is beyond is cut off.
        requires_columns: whether all that `columns` names must be there; a target may have other names than the data.

    Raises:
        BlueprintError: if it is no data set, or `columns` names what is none of these.
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
            keys = f" with {format_names(list(map(str, dataset)))}" if isinstance(dataset, Mapping) else ""
            raise BlueprintError(
                f"A {type(dataset).__name__}{keys} is no data set to choose from: give a list of examples, a "
                "datasets.Dataset (one split of it), or a stream. data.read_examples reads files."
            )
        if isinstance(dataset, Sized) and not hasattr(dataset, "__getitem__"):
            raise BlueprintError(
                f"A {type(dataset).__name__} of {len(dataset)} examples has no positions to choose: give a list of "
                "them, list(…), or a stream, iter(…)."
            )
        if max_length < 2:
            raise BlueprintError(f"max_length={max_length} leaves no room for a target: give at least 2.")
        self._dataset = dataset
        self._tokenizer = tokenizer
        self._columns = dict(columns or {})
        require_columns(self._columns)
        self._requires_columns = requires_columns
        self._max_length = max_length
        self._names: tuple[str, ...] | None = None
        self.length = len(dataset) if isinstance(dataset, Sized) else None
        if self.length == 0:
            raise BlueprintError("There is nothing to choose from: the data set is empty. Give at least one example.")

    @property
    def is_stream(self) -> bool:
        """Whether its length is unknown, and it may be read only once."""
        return self.length is None

    def __iter__(self) -> Iterator[tuple[int, Example]]:
        """Positions and examples, from the first; of a stream that cannot be read again, only once."""
        return enumerate(self._dataset)

    def at(self, index: int) -> Example:
        """An example of what is no stream."""
        return cast(Sequence[Example], self._dataset)[index]

    def candidate(self, index: int, example: Example) -> Candidate | None:
        """An example as a row of token ids; None where nothing is to be learnt from it, for want of a target.

        Raises:
            BlueprintError: for an example that is no mapping, lacks a column, or holds no text or token ids.
        """
        if not isinstance(example, Mapping):
            raise BlueprintError(
                f"Example {index} is a {type(example).__name__}: give mappings, as {{'prompt': …, 'completion': …}}."
            )
        if "input_ids" in example and "labels" in example:
            ids, labels = (_numbers(index, key, example[key]) for key in ("input_ids", "labels"))
            if len(ids) != len(labels):
                raise BlueprintError(
                    f"Example {index} has input_ids of shape ({len(ids)},) and labels of shape ({len(labels)},): give "
                    f"as many of both, with {IGNORED} where there is no target."
                )
            row = {"input_ids": ids[: self._max_length], "labels": labels[: self._max_length]}
            has_target = any(label != IGNORED for label in row["labels"][1:])
            return Candidate(index, row, row["input_ids"], example) if has_target else None
        texts = self._texts(index, example)
        if texts is None:
            return None
        if self._tokenizer is None:
            raise BlueprintError("The examples are texts: give the model's tokenizer, tokenizer=….")
        encoded = encode_one(texts, self._tokenizer, self._max_length, index)
        return None if encoded is None else Candidate(index, encoded, _words(texts), example)

    def _texts(self, index: int, example: Example) -> dict[str, Any] | None:
        """Prompt and completion, messages or text under those names; None where one is missing or empty."""
        if self._names is None:
            if self._requires_columns:
                require_columns(self._columns, list(map(str, example)))
            given = {key for key in self._columns.values() if key in example}
            self._columns = self._columns if given else {}  # a target may have other names than the data
            called = {name: self._columns.get(name, name) for wanted in _WANTED for name in wanted}
            self._names = next((w for w in _WANTED if all(called[name] in example for name in w)), None)
            if self._names is None:
                raise BlueprintError(
                    f"Example {index} has {format_names(list(map(str, example)))}; it needs prompt and completion, messages or "
                    "text, or input_ids and labels. Say what it calls them, as columns={'prompt': 'question'}."
                )
        found = {}
        for name in self._names:
            called_ = self._columns.get(name, name)
            if called_ not in example:
                raise BlueprintError(
                    f"Example {index} has no {called_!r}, which examples before it have; it has "
                    f"{format_names(list(map(str, example)))}. Leave it out, or give every example the same columns."
                )
            value = example[called_]
            if value is None or (name != "prompt" and not value):
                return None
            if not isinstance(value, list if name == "messages" else str):
                raise BlueprintError(
                    f"{called_!r} of example {index} is a {type(value).__name__}, not a "
                    f"{'list of messages' if name == 'messages' else 'text'}. Convert it first."
                )
            found[name] = value
        return found


def _numbers(index: int, key: str, value: Any) -> list[int]:
    """Token ids or labels, of a list, an array or a tensor.

    Raises:
        BlueprintError: for anything but one sequence of whole numbers of which none is negative, but for labels' -100.
    """
    wanted = f"give one sequence of whole numbers, from 0 on{f' or {IGNORED}' if key == 'labels' else ''}"
    try:
        found = np.asarray(value.tolist() if hasattr(value, "tolist") else value)
    except (TypeError, ValueError) as error:
        raise BlueprintError(f"{key!r} of example {index} is ragged: {wanted}.") from error
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        held = f"shape {found.shape}" if found.ndim != 1 else f"{type(found.tolist()[0]).__name__}"
        raise BlueprintError(f"{key!r} of example {index} is a {type(value).__name__} of {held}: {wanted}.")
    wrong = found[(found < 0) & ((found != IGNORED) | (key != "labels"))]
    if wrong.size:
        raise BlueprintError(f"{key!r} of example {index} has {wrong[0]}: {wanted}.")
    return cast(list[int], found.tolist())


def _words(texts: Mapping[str, Any]) -> str:
    if "messages" in texts:
        return "\n".join(str(message.get("content", "")) for message in texts["messages"])
    return "\n".join(texts.values())
