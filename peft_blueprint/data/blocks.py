"""Cut documents into blocks of tokens, as a dataset to choose from or as a stream."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BlueprintError
from ..measure import Row
from .examples import Example, Pool
from .options import require_integer


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK_COLUMNS = ("input_ids", "labels", "document", "start")
_DOCUMENTS_HELD = 8  # encoded ones, since neighbouring blocks are read together


def cut_blocks(
    dataset: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    size: int = 512,
    pack: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Blocks | BlockStream:
    """Cut documents into blocks of at most `size` tokens, each a row to score and to train on.

    A block is a mapping with `input_ids` and `labels` (both of at most `size` numbers), the position `document` of the
    document it begins in, and its `start`, in tokens of that document. It is scored and trained on without the text
    before it, and its first token is no target. Documents end in the tokenizer's end-of-text token.

    Args:
        dataset: documents in any form that `select_examples` takes; texts and token ids may be of any length.
        tokenizer: the model's, needed for texts.
        size: tokens of a block. Give `select_examples` the same `max_length`, or more.
        pack: join documents before they are cut, so that every block but the last is full; otherwise each document is
            cut alone, and its last block may be short.
        columns: the data's own names of prompt, completion, messages or text.

    Returns:
        A map-style dataset for data with positions, which is encoded once more to count its tokens; otherwise a stream,
        which can be read as often as the data.

    Raises:
        BlueprintError: for data that `select_examples` refuses, or a size below 2.

    Example:
        >>> blocks = cut_blocks([{"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9]}], size=3)
        >>> [(block["input_ids"], block["start"]) for block in blocks]
        [([5, 6, 7], 0), ([8, 9], 3)]
    """
    size = require_integer("size", size, 2)
    pool = Pool(dataset, tokenizer, columns, max_length=sys.maxsize, requires_columns=True)
    return BlockStream(pool, size, pack) if pool.is_stream else Blocks(pool, size, pack)


class BlockStream:
    """Blocks of a stream of documents; memory holds one document and one block.

    Args:
        pool: documents.
        size: tokens of a block.
        pack: whether a block may hold several documents.

    Example:
        >>> stream = cut_blocks(iter([{"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9]}]), size=3)
        >>> [block["input_ids"] for block in stream]
        [[5, 6, 7], [8, 9]]
    """

    column_names = list(BLOCK_COLUMNS)

    def __init__(self, pool: Pool, size: int, pack: bool):
        self._pool = pool
        self._size = size
        self._pack = pack

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the blocks."""
        held: dict[str, Any] = {}
        for document, example in self._pool:
            row = _encoded(self._pool, document, example)
            length, at = len(row["input_ids"]), 0
            while at < length:
                if not held:
                    held = {"input_ids": [], "labels": [], "document": document, "start": at}
                end = at + self._size - len(held["input_ids"])
                for key in ("input_ids", "labels"):
                    held[key] += row[key][at:end]
                at = min(end, length)
                if len(held["input_ids"]) == self._size:
                    yield held
                    held = {}
            if held and not self._pack:
                yield held
                held = {}
        if held:
            yield held


class Blocks:
    """Blocks of documents that can be read by position, encoded when they are read; memory holds 8 bytes a document.

    Args:
        pool: documents, not a stream.
        size: tokens of a block.
        pack: whether a block may hold several documents.

    Example:
        >>> blocks = cut_blocks([{"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9]}], size=3)
        >>> len(blocks), blocks[1]["input_ids"]
        (2, [8, 9])
    """

    column_names = list(BLOCK_COLUMNS)

    def __init__(self, pool: Pool, size: int, pack: bool):
        self._size = size
        self._pack = pack
        self._document = lru_cache(_DOCUMENTS_HELD)(lambda index: _encoded(pool, index, pool[index]))
        lengths = [len(_encoded(pool, index, example)["input_ids"]) for index, example in pool]
        self._ends = np.cumsum(lengths if pack else [-(-length // size) for length in lengths])  # in tokens, or blocks
        if not self._ends[-1]:
            raise BlueprintError(f"None of {len(lengths)} documents has a target. Check the columns.")

    def __len__(self) -> int:
        return -(-int(self._ends[-1]) // self._size) if self._pack else int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a block.

        Raises:
            IndexError: beyond the last block.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        place = (index % len(self)) * (self._size if self._pack else 1)
        document = int(np.searchsorted(self._ends, place, side="right"))
        before = int(self._ends[document - 1]) if document else 0
        start = place - before if self._pack else (place - before) * self._size
        block: dict[str, Any] = {"input_ids": [], "labels": [], "document": document, "start": start}
        end = start + self._size
        while True:
            row = self._document(document)
            for key in ("input_ids", "labels"):
                block[key] += row[key][start:end]
            document += 1
            start, end = 0, self._size - len(block["input_ids"])
            if not self._pack or not end or document == len(self._ends):
                return block

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the blocks."""
        return (self[index] for index in range(len(self)))


def _encoded(pool: Pool, index: int, example: Example) -> Row:
    """Encode a whole document; one without a target has no tokens."""
    found = pool.encode(index, example)
    return {"input_ids": [], "labels": []} if found is None else found.row
