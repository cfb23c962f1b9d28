"""Examples from files or the Hub, as the batches that measuring and training take.

An example is a prompt with a completion, a list of chat messages, or a text; targets are the completion's tokens, the
last message's, or all. Knows nothing of models beyond their tokenizer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .entry import some
from .errors import BlueprintError
from .losses import IGNORED
from .tables import read_table


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, list[int]]

_LOG = logging.getLogger(__name__)


def read_examples(
    source: str, columns: Mapping[str, str] | None = None, *, split: str = "train", limit: int | None = None
) -> list[dict[str, Any]]:
    """Examples of a local JSON-lines, CSV or Parquet file, or of a data set on the Hub.

    Args:
        source: path or data set id.
        columns: what the file calls `prompt`, `completion`, `messages` or `text`, as `{"prompt": "question"}`.
        split: of a data set on the Hub.
        limit: read only the first so many.

    Returns:
        Mappings with `prompt` and `completion`, or `messages`, or `text`.

    Raises:
        BlueprintError: if there is no such file, it cannot be read, or has none of these columns.
    """
    table = read_table(source, split=split)
    names = {name: (columns or {}).get(name, name) for name in ("prompt", "completion", "messages", "text")}
    for wanted in (("prompt", "completion"), ("messages",), ("text",)):
        if all(names[name] in table.column_names for name in wanted):
            chosen = table.select(range(min(limit or len(table), len(table))))
            return [{name: row[names[name]] for name in wanted} for row in chosen]
    raise BlueprintError(
        f"The data {source!r} has the columns {some(table.column_names)}; it needs prompt and completion, messages, or "
        "text. Say what it calls them, as in columns prompt=question,completion=answer."
    )


def encode(
    examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int = 512
) -> list[Row]:
    """Token ids and labels of every example, -100 where there is no target, cut at `max_length` tokens.

    Examples whose prompt leaves no room for a target are left out, and counted in the log.

    Raises:
        BlueprintError: if none is left.
    """
    rows = [row for example in examples if (row := _encode(example, tokenizer, max_length)) is not None]
    if not rows:
        raise BlueprintError(
            f"None of {len(examples)} examples has a target within {max_length} tokens. Raise the maximum length."
        )
    if len(rows) < len(examples):
        _LOG.warning(
            "%d of %d examples have no target within %d tokens and are left out",
            len(examples) - len(rows),
            len(examples),
            max_length,
        )
    return rows


def collate(rows: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Rows as one batch padded on the right: `input_ids`, `attention_mask` and `labels`, each (B, T)."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, filler: int) -> Tensor:
        return torch.tensor([row[key] + [filler] * (length - len(row[key])) for row in rows])

    return {
        "input_ids": padded("input_ids", pad_token_id),
        "attention_mask": torch.tensor(
            [[1] * len(r["input_ids"]) + [0] * (length - len(r["input_ids"])) for r in rows]
        ),
        "labels": padded("labels", IGNORED),
    }


def make_batches(rows: Sequence[Row], batch_size: int, pad_token_id: int) -> list[dict[str, Tensor]]:
    """Rows in their order, `batch_size` at a time."""
    return [collate(rows[i : i + batch_size], pad_token_id) for i in range(0, len(rows), batch_size)]


def pad_token_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token's id, or the end-of-text token's where there is none, or 0; masked out in any case."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0


def _encode(example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Row | None:
    if "messages" in example:
        messages = example["messages"]
        prompt = str(tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False))
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = prompt_ids + tokenizer(whole.removeprefix(prompt), add_special_tokens=False)["input_ids"]
    elif "completion" in example:
        prompt_ids = tokenizer(example["prompt"])["input_ids"]
        ids = prompt_ids + tokenizer(example["completion"], add_special_tokens=False)["input_ids"]
    else:
        prompt_ids, ids = [], tokenizer(example["text"])["input_ids"]
    if "messages" not in example and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    labels = [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :]
    ids, labels = ids[:max_length], labels[:max_length]
    # the first token has nothing before it to be predicted from
    return {"input_ids": ids, "labels": labels} if any(label != IGNORED for label in labels[1:]) else None
