"""Find the invocation tokens of activated LoRA, and split batches into prompts and answers at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import BlueprintError
from ..measure import IGNORED


Turns = Literal["last", "every"]

_ADVICE = (
    "Every example needs them before its answer: build prompts with the chat template and its generation prompt, raise "
    "max_length if examples are cut, or leave the example out"
)


def find_invocation_tokens(tokenizer: PreTrainedTokenizerBase, text: str | None = None) -> list[int]:
    r"""Find the tokens that open every answer, for `LoraConfig(alora_invocation_tokens=…)`.

    Args:
        tokenizer: the model's.
        text: text that stands right before every answer, such as "\nAnswer:". By default the chat template's
            generation prompt, such as "<|im_start|>assistant\n".

    Returns:
        Token ids. They are the same in every example: tokens that merge with their surroundings are refused.

    Raises:
        BlueprintError: for a tokenizer without a chat template or a template without a generation prompt, if no text
            is given; for a text that has no tokens of its own.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from transformers import AutoTokenizer
        >>> from peft_blueprint.testing import save_tiny_model
        >>> tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(Path(tempfile.mkdtemp())))
        >>> find_invocation_tokens(tokenizer, "7 8")
        [11, 12]
    """
    if text is None:
        text = _generation_prompt(tokenizer)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise BlueprintError(f"The invocation text {text!r} has no tokens. Give the text right before every answer.")
    for answer in (" yes", "\n1."):
        around = (f"{question}{text}{answer}" for question in ("What is it?", "What is it? "))
        whole = [list(tokenizer(one, add_special_tokens=False)["input_ids"]) for one in around]
        if not any(occurrences(torch.tensor(one), ids) for one in whole):
            raise BlueprintError(
                f"The invocation text {text!r} is tokenized differently before {answer!r}. Give a text that begins and "
                "ends at a token of its own, such as one with line ends or special tokens."
            )
    return ids


def _generation_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise BlueprintError(
            "The tokenizer has no chat template to take the invocation tokens from. Give the text that stands right "
            r'before every answer, such as text="\nAnswer:".'
        )
    chat = [{"role": "user", "content": "What is it?"}]
    without = str(tokenizer.apply_chat_template(chat, tokenize=False))
    whole = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    text = whole.removeprefix(without)
    if not whole.startswith(without) or not text:
        raise BlueprintError(
            "The tokenizer's chat template adds nothing for add_generation_prompt=True. Give the text that stands right "
            r'before every answer, such as text="\nAssistant:".'
        )
    return text


@dataclass(frozen=True)
class Answer:
    """One answer of a batch: tokens [first, start) of the row are its prompt, [start, stop) pass through adapters.

    Args:
        row: of the batch.
        first: position of the row's first token that is not padding.
        start: position of the first invocation token.
        stop: end of the positions that predict a target of this answer.
        until: end of the answer's targets, where the next answer's invocation tokens or the end of the row are.
    """

    row: int
    first: int
    start: int
    stop: int
    until: int


def occurrences(ids: Tensor, tokens: Sequence[int]) -> list[int]:
    """Return every position at which a sequence of tokens begins in `ids` (length,).

    Example:
        >>> occurrences(torch.tensor([5, 7, 8, 7, 8]), [7, 8])
        [1, 3]
    """
    if len(ids) < len(tokens):
        return []
    windows = ids.unfold(0, len(tokens), 1)
    found: list[int] = (windows == torch.tensor(tokens)).all(dim=1).nonzero().flatten().tolist()
    return found


def find_answers(
    input_ids: Tensor, mask: Tensor, targets: Tensor, tokens: Sequence[int], turns: Turns = "last"
) -> list[Answer]:
    """Find the answers of a batch.

    Args:
        input_ids: (rows, positions), on the CPU.
        mask: (rows, positions), whether a position is a token rather than padding.
        targets: (rows, positions), the next token where it is a target, otherwise -100.
        tokens: invocation tokens.
        turns: "last", an answer begins at a row's last invocation; "every", one answer a row and invocation, leaving
            out those without a target.

    Raises:
        BlueprintError: for a row without invocation tokens, or with padding between its tokens.

    Example:
        >>> ids = torch.tensor([[0, 5, 7, 8, 6]])
        >>> targets = torch.tensor([[-100, -100, -100, 6, -100]])
        >>> find_answers(ids, ids > 0, targets, [7, 8])
        [Answer(row=0, first=1, start=2, stop=4, until=5)]
    """
    answers = []
    for row, (ids, real, wanted) in enumerate(zip(input_ids, mask, targets, strict=True)):
        places = real.nonzero().flatten()
        first, end = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        if end - first != len(places):
            raise BlueprintError(
                f"Example {row} of the batch has padding between its tokens. Pad on one side only, without packing."
            )
        starts = [first + place for place in occurrences(ids[first:end], tokens)]
        if not starts:
            raise BlueprintError(
                f"Example {row} of the batch (ids {ids[first:end][:8].tolist()}…, {end - first} tokens) has no invocation "
                f"tokens {list(tokens)}. {_ADVICE}."
            )
        starts = starts[-1:] if turns == "last" else starts
        own = []
        for start, until in zip(starts, [*starts[1:], end], strict=True):
            predicting = (wanted[start:until] != IGNORED).nonzero().flatten()
            if len(predicting):
                own.append(Answer(row, first, start, start + int(predicting[-1]) + 1, until))
        # one position keeps a row without targets in the graph
        answers += own or [Answer(row, first, starts[-1], starts[-1] + 1, end)]
    return answers
