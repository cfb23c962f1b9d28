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

from .._text import format_names
from ..errors import BlueprintError
from ..measure import IGNORED
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
        f"The data {source!r} has the columns {format_names(table.column_names)}; it needs prompt and completion, messages, or "
        "text. Say what it calls them, as in columns prompt=question,completion=answer."
    )


def encode(
    examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int = 512
) -> list[Row]:
    """Token ids and labels of every example, -100 where there is no target, cut at `max_length` tokens.

    Examples whose prompt leaves no room for a target are left out, and counted in the log.

    Raises:
        BlueprintError: if none is left, or for messages that no prompt and answer can be made of.
    """
    encoded = (encode_one(example, tokenizer, max_length, index) for index, example in enumerate(examples))
    rows = [row for row in encoded if row is not None]
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


def encode_one(
    example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int, index: int = 0
) -> Row | None:
    """One example as `encode` has it, None where its prompt leaves no room for a target.

    Args:
        example: with a prompt and a completion, messages, or a text.
        tokenizer: the model's.
        max_length: tokens, beyond which it is cut.
        index: its position in the data, for messages.

    Raises:
        BlueprintError: for messages that no prompt and answer can be made of.
    """
    if "messages" in example:
        prompt, whole = _chat(example["messages"], tokenizer, index)
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


def _chat(messages: Any, tokenizer: PreTrainedTokenizerBase, index: int) -> tuple[str, str]:
    """The text of all messages but the last, up to where the answer starts, and that of all."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise BlueprintError(f"The messages of example {index} are a {type(messages).__name__}: give a list of them.")
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise BlueprintError(
                f"Message {at} of example {index} is a {type(message).__name__}: give mappings, as "
                "{'role': 'user', 'content': …}."
            )
    if len(messages) < 2:
        raise BlueprintError(
            f"Example {index} is a chat of {len(messages)}, and there must be a question and an answer: give at least "
            "2 messages, or leave it out."
        )
    chat: list[Any] = list(messages)
    try:
        prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, tokenize=False)
        return str(prompt), str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception as error:  # a template is a program of the model's author, and may raise anything
        if getattr(tokenizer, "chat_template", None) is None:
            raise BlueprintError(
                f"Example {index} has messages, and this tokenizer has no chat template. Set tokenizer.chat_template, "
                "or give prompt and completion."
            ) from error
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        roles = format_names([str(message.get("role")) for message in messages])
        raise BlueprintError(
            f"The tokenizer's chat template refuses example {index}, with messages of {roles}: {reason}. Change or "
            "leave out this example."
        ) from error
