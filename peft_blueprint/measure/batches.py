"""Turn examples into token ids and batches, and check every batch before a model sees it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils.chat_template_utils import render_jinja_template

from .._processes import process_count
from .._text import first_line, format_names, shape_str
from ..errors import BlueprintError, MeasurementError
from .losses import IGNORED, LossFunction, count_examples
from .submodules import class_of, is_sharded, unwrap


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = Mapping[str, Any]
Example = Mapping[str, Any]
Row = dict[str, list[int]]

MAX_LENGTH = 512
BATCH_SIZE = 8  # rows that are put together where no batches are given
_KEYS = {"completion", "messages", "text", "input_ids"}  # one of them is in every example
_OTHER_KEYS = {"conversations", "output"}  # of ShareGPT and Alpaca
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_LOG = logging.getLogger(__name__)
_OTHER = "\N{OBJECT REPLACEMENT CHARACTER}"  # another message in place of a chat's
_MARKS_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def take_examples(
    model: nn.Module,
    batches: Iterable[Batch | Example],
    max_examples: int | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    loss_fn: LossFunction | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield batches as `as_batches` does, on the model's device, until `max_examples` were taken.

    Example:
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> taken = take_examples(tiny_llama(), toy_batches(examples=8), max_examples=4)
        >>> sum(len(batch["input_ids"]) for batch in taken)
        4
    """
    device, left = input_device(model), max_examples
    if left == 0:  # another process has them all
        return
    for batch in as_batches(model, batches, tokenizer=tokenizer, loss_fn=loss_fn):
        examples = count_examples(batch)
        taken = examples if left is None else min(left, examples)
        yield {key: _usable(_first(value, taken, examples), device) for key, value in batch.items()}
        if left is not None:
            left -= taken
            if left == 0:
                return


def count_ahead(
    batches: Iterable[Batch | Example], max_examples: int | None, *, are_texts: bool = False
) -> int | None:
    """Return how many examples will be taken, for a progress bar; None where that shows only when they are read.

    Example:
        >>> count_ahead([{"input_ids": torch.zeros(4, 2)}] * 4, 64)
        16
    """
    known: int | None = None
    if isinstance(sampler := getattr(batches, "sampler", None), Sized):  # a DataLoader
        known = len(sampler)
    elif isinstance(batches, list | tuple):
        with suppress(MeasurementError):
            known = sum(1 if _is_example(one, are_texts) else count_examples(one) for one in batches)
    elif isinstance(batches, Sized) and hasattr(batches, "column_names"):
        known = len(batches)
    if known is None or max_examples is None:
        return max_examples if known is None else known
    return min(known, max_examples)


def _usable(value: Any, device: torch.device | None) -> Any:
    """Return a value on a device; a tensor of `torch.inference_mode()` as one that the backward pass may read."""
    if not isinstance(value, Tensor):
        return value
    return (value.clone() if value.is_inference() else value).to(device)


def as_batches(
    model: nn.Module,
    batches: Iterable[Batch | Example],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    loss_fn: LossFunction | None = None,
) -> Iterator[Batch]:
    """Yield checked batches, made from examples if these are given.

    Args:
        model: that will run them.
        batches: mappings of tensors with a row for each example, such as a `DataLoader`; or examples, such as a
            `datasets.Dataset` or a list, which are encoded as by `encode` and collated 8 at a time as they are read.
        tokenizer: needed for examples that are texts.
        loss_fn: objective other than the model's own, for which labels are not checked.

    Raises:
        MeasurementError: for a batch that the model cannot run, or labels out of range; in a single process also for an
            iterator that yields nothing.
        BlueprintError: for an example that cannot be encoded.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> [batch] = as_batches(tiny_llama(), [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
        >>> batch["labels"]
        tensor([[-100,    6,    7]])
    """
    if not isinstance(batches, Iterable):
        raise MeasurementError(f"batches must be a list or another iterable, got {type(batches).__name__}.")
    iterator = iter(batches)
    start = list(islice(iterator, 1))
    if not start and iterator is batches and process_count() == 1:
        raise MeasurementError(
            f"batches is an iterator ({type(batches).__name__}) that yields nothing. It can be read only once, so an "
            "earlier call may have used it up. Give a list, a Dataset or a DataLoader instead."
        )
    given: Iterable[Any] = chain(start, iterator)
    if start and _is_example(start[0], tokenizer is not None or hasattr(batches, "column_names")):
        given = _collated(given, tokenizer)
    is_fitting = False  # whether the model was asked about odd shapes and accepts them
    for batch in given:
        _require_batch(batch)
        if loss_fn is None and "labels" in batch:
            is_fitting = is_fitting or _require_fit(model, batch)
            _require_range(model, batch["labels"])
        yield batch


def input_device(model: nn.Module) -> torch.device | None:
    """Return the device of a model's inputs; None if its own hooks move them, because its weights are offloaded.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> input_device(tiny_llama())
        device(type='cpu')
    """
    is_elsewhere = any(
        p.is_meta or is_sharded(p) and p.device.type != p.device_mesh.device_type for p in model.parameters()
    )
    return None if is_elsewhere else next(model.parameters()).device


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int = MAX_LENGTH) -> list[Row]:
    """Tokenize examples, see `encode_one`.

    Examples whose prompt leaves no room for a target are left out and counted in the log.

    Raises:
        BlueprintError: if no example is left, or one cannot be encoded.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from transformers import AutoTokenizer
        >>> from peft_blueprint.testing import save_tiny_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(Path(folder) / "model"))
        >>> encode([{"prompt": "1 2", "completion": " 3"}], tokenizer)[0]["labels"][:2]
        [-100, -100]
    """
    return list(_encoded(examples, tokenizer, max_length))


def encode_one(
    example: Example, tokenizer: PreTrainedTokenizerBase | None, max_length: int = MAX_LENGTH, index: int = 0
) -> Row | None:
    """Tokenize one example, with label -100 where there is no target; None if its prompt leaves no room for one.

    Targets are the tokens of the completion, of the whole text, or of the text that a chat's template marks with
    `{% generation %}`, otherwise of the last message, unless the user wrote that. A prompt and its completion, and a text,
    end in the tokenizer's end-of-text token.

    Args:
        example: mapping with prompt and completion, messages, or text; or `input_ids` and `labels`; or the columns of
            Alpaca, ShareGPT or TRL's chats, see `with_known_columns`.
        tokenizer: the model's, needed for texts.
        max_length: tokens after which it is cut.
        index: position in the data, for error messages.

    Raises:
        BlueprintError: naming the example and its key, for a missing, null, nested or otherwise wrong value, and for
            messages that the chat template refuses or changes so that it is unknown where the answer starts.

    Example:
        >>> encode_one({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, None, max_length=2)
        {'input_ids': [5, 6], 'labels': [-100, 6]}
    """
    if not isinstance(example, Mapping):
        raise BlueprintError(
            f"Example {index} must be a mapping such as {{'prompt': …, 'completion': …}}, got {type(example).__name__}."
        )
    if "input_ids" in example and "labels" in example:
        ids, labels = (_token_ids(example, key, index) for key in ("input_ids", "labels"))
        if len(ids) != len(labels):
            raise BlueprintError(
                f"input_ids and labels of example {index} must be of one length, got {len(ids)} and {len(labels)}. "
                f"Label tokens without a target {IGNORED}."
            )
        return _cut(ids, labels, max_length)
    example = with_known_columns(example, index)
    if (_KEYS - {"input_ids"}).isdisjoint(example):
        raise BlueprintError(
            f"Example {index} must have prompt and completion, messages, text, or input_ids and labels; it has "
            f"{format_names(list(map(str, example)))}. Rename its columns."
        )
    if tokenizer is None:
        raise BlueprintError("The examples are texts. Pass the model's tokenizer=….")
    if "messages" in example:
        return _cut(*_encode_chat(example["messages"], tokenizer, index), max_length)
    keys = ("prompt", "completion") if "completion" in example else ("text",)
    *prompts, text = [_text(example, key, index) for key in keys]
    ids, start = _tokenize("".join(prompts), text, " and ".join(keys), tokenizer, index)
    before, after = _special_tokens("".join([*prompts, text]), tokenizer)
    prompt = len(before) + start if prompts else 0
    ids = [*before, *ids, *after]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return _cut(ids, [IGNORED] * prompt + ids[prompt:], max_length)


def with_known_columns(example: Example, index: int = 0) -> Example:
    """Return an example in the columns of Alpaca, ShareGPT or TRL as prompt and completion, or messages; others unchanged.

    Alpaca's prompt is the instruction and the input, if it has one, each with a line break at its end. TRL's prompt and
    completion may be lists of messages, which are joined.

    Raises:
        BlueprintError: for a turn of a conversation that is not of a user, an assistant or the system.

    Example:
        >>> with_known_columns({"instruction": "Add.", "input": "1 + 1", "output": "2"})
        {'prompt': 'Add.\\n1 + 1\\n', 'completion': '2'}
        >>> with_known_columns({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
        {'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]}
    """
    parts = [example.get(key) for key in ("prompt", "completion")]
    if all(isinstance(part, list) for part in parts):
        return {"messages": [message for part in parts for message in part or ()]}
    if not {"completion", "messages", "input_ids"}.isdisjoint(example):
        return example
    if {"instruction", "output"} <= example.keys():  # also where a text holds both in a template
        texts = [_text(example, key, index) for key in ("instruction", "input") if example.get(key) is not None]
        return {"prompt": "".join(f"{text}\n" for text in texts if text), "completion": example["output"]}
    if isinstance(turns := example.get("conversations"), list):
        messages = []
        for turn in turns:
            role = _ROLES.get(str(turn.get("from", turn.get("role")))) if isinstance(turn, Mapping) else None
            if role is None:
                raise BlueprintError(
                    f"conversations of example {index} must have turns from {', '.join(_ROLES)}, got {turn!r}. Give "
                    "messages instead."
                )
            messages.append({"role": role, "content": turn.get("value", turn.get("content"))})
        return {"messages": messages}
    return example


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
    """Return the padding token's id, otherwise the end-of-text token's, otherwise 0; padding is always masked.

    Example:
        >>> from types import SimpleNamespace
        >>> get_pad_token_id(SimpleNamespace(pad_token_id=None, eos_token_id=2))
        2
    """
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0


def _is_example(first: Any, is_expected: bool) -> bool:
    """Return whether the data's first element is an example. A batch holds tensors with a dimension for rows."""
    if not isinstance(first, Mapping):
        return False
    tensors = [value for value in first.values() if isinstance(value, Tensor)]
    if is_expected:
        return all(tensor.dim() < 2 for tensor in tensors)
    return not tensors and not (_KEYS | _OTHER_KEYS).isdisjoint(first)


def _collated(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Batch]:
    rows = _encoded(examples, tokenizer, MAX_LENGTH)
    while part := list(islice(rows, BATCH_SIZE)):
        yield collate(part, 0 if tokenizer is None else get_pad_token_id(tokenizer))


def _encoded(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase | None, max_length: int) -> Iterator[Row]:
    """Encode examples; leave out those without a target, and refuse data in which all lack one."""
    found = count = 0
    for count, example in enumerate(examples, start=1):
        row = encode_one(example, tokenizer, max_length, count - 1)
        if row is not None:
            found += 1
            yield row
    if not found:
        raise BlueprintError(
            f"None of {count} examples has a target within {max_length} tokens. Increase max_length, or add the answers."
        )
    if found < count:
        _LOG.warning("Left out %d of %d examples without a target in %d tokens", count - found, count, max_length)


def _first(value: Any, taken: int, examples: int) -> Any:
    """Return the first rows of a value that has a row for every example."""
    has_rows = isinstance(value, Tensor | list | tuple) and len(value) == examples
    return value[:taken] if has_rows and taken < examples else value


def _require_batch(batch: Any) -> None:
    """Raise MeasurementError if this is not a mapping, or a single example without a dimension for rows."""
    if not isinstance(batch, Mapping):
        raise MeasurementError(
            f"A batch must be a mapping with labels, got {type(batch).__name__}. For a single batch, give [batch]."
        )
    for key, dimensions in (("input_ids", 2), ("inputs_embeds", 3), ("labels", 1)):
        value = batch.get(key)
        if isinstance(value, Tensor) and value.dim() < dimensions:
            raise MeasurementError(
                f"{key} must have a row for each example, {dimensions} dimensions or more, got shape "
                f"{tuple(value.shape)}. Give {key}[None] for a single example, or tokenizer=… to collate examples."
            )
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or "past_key_values" in batch:
        return
    if ids.dim() == mask.dim() == 2 and ids.shape != mask.shape:
        raise MeasurementError(
            f"The attention_mask, {shape_str(mask.shape)}, does not fit the input_ids, {shape_str(ids.shape)}. Give one "
            "number for each token: 1, or 0 for padding."
        )


def _require_fit(model: nn.Module, batch: Batch) -> bool:
    """Raise MeasurementError if labels lack the shape of the inputs and the model itself refuses them.

    Returns:
        Whether the model was asked and accepts them.
    """
    labels, ids = batch["labels"], batch.get("input_ids")
    if not isinstance(labels, Tensor):
        if isinstance(labels, list | tuple) and all(isinstance(one, Mapping) for one in labels):
            return False  # boxes and classes of images
        raise MeasurementError(f"labels must be a tensor, got {type(labels).__name__}.")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return False
    base: Any = unwrap(model)
    is_odd = len(labels) != len(ids)
    if not getattr(getattr(base, "config", None), "is_encoder_decoder", False) and not labels.is_floating_point():
        is_odd |= labels.shape != ids.shape and (labels.dim() == 2 or _vocabulary_size(base) is not None)
    if not is_odd:
        return False
    reason = "the weights are sharded, so the model cannot be asked alone"
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        device = input_device(model)
        try:
            with torch.no_grad():
                output = model(
                    **{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
                )
            loss = getattr(output, "loss", None)
            if not isinstance(loss, Tensor) or loss.isfinite().all():
                return True
            reason = f"its loss for them is {float(loss.sum())}"
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            reason = first_line(error)
    raise MeasurementError(
        f"The labels, {shape_str(labels.shape)}, do not fit {type(base).__name__} and its input_ids, "
        f"{shape_str(ids.shape)}: {reason}. Give one label for each token, {IGNORED} where there is no target."
    )


def _require_range(model: nn.Module, labels: Any) -> None:
    """Raise MeasurementError for a label that is neither -100 nor the number of a class or token."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex() or labels.dim() > 2:
        return
    base: Any = unwrap(model)
    count = _vocabulary_size(base)
    if count is None and "Classification" in class_of(base).__name__:
        classes = getattr(getattr(base, "config", None), "num_labels", 1)
        count = classes if classes > 1 else None  # one output is a regression
    is_wrong = (labels < 0) & (labels != IGNORED)
    if count is not None:
        is_wrong |= labels >= count
    if is_wrong.any():
        row = int(is_wrong.nonzero()[0, 0])
        upper = "" if count is None else f" and below {count}"
        raise MeasurementError(
            f"labels must be at least 0{upper}, or {IGNORED} where there is no target; got {labels[is_wrong][0].item()} in "
            f"row {row} of a batch."
        )


def _vocabulary_size(base: Any) -> int | None:
    """Return the number of outputs of a language model's head; None without one."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    size = getattr(head, "out_features", None)
    return size if isinstance(size, int) else None


def _token_ids(example: Example, key: str, index: int) -> list[int]:
    """Token ids or labels from a list, an array or a tensor; only labels may hold -100."""
    value = example[key]
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


def _cut(ids: list[int], labels: list[int], max_length: int) -> Row | None:
    """A row of at most `max_length` tokens; None without a target after the first token, which is not predicted."""
    ids, labels = ids[:max_length], labels[:max_length]
    return {"input_ids": ids, "labels": labels} if any(label != IGNORED for label in labels[1:]) else None


def _text(example: Example, key: str, index: int) -> str:
    value = example.get(key)
    if not isinstance(value, str):
        raise BlueprintError(
            f"{key!r} of example {index} must be text, got {type(value).__name__}. Convert or remove it."
        )
    return value


def _tokenize(
    prompt: str, target: str, key: str, tokenizer: PreTrainedTokenizerBase, index: int
) -> tuple[list[int], int]:
    """Return the tokens of two texts in a row without special ones, and the place of the first of the second.

    Many tokenizers put a space before a text, so that the second would have other tokens by itself. The two are taken
    apart only where a token would have letters of both, and for tokenizers that do not tell tokens' places.
    """
    try:
        if getattr(tokenizer, "is_fast", False):
            found = tokenizer(prompt + target, add_special_tokens=False, return_offsets_mapping=True)
            ids, places = cast(list[int], found["input_ids"]), found["offset_mapping"]
            first = next((i for i, (_, end) in enumerate(places) if end > len(prompt)), len(ids))
            if first == len(ids) or not prompt[places[first][0] :].strip():
                return ids, first
        before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, target))
        return [*before, *after], len(before)
    except Exception as error:  # a TypeError for surrogates; tokenizers in Rust raise bare Exceptions
        raise BlueprintError(
            f"{key!r} of example {index} cannot be tokenized: {first_line(error)}. Change or remove it."
        ) from error


def _special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer adds before and after a text."""
    word = next(iter(text.split(maxsplit=1)), text)
    plain, whole = (tokenizer(word, add_special_tokens=added)["input_ids"] for added in (False, True))
    for i in range(len(whole) - len(plain) + 1 if plain else 0):
        if whole[i : i + len(plain)] == plain:
            return whole[:i], whole[i + len(plain) :]
    return [], []


def _encode_chat(messages: Any, tokenizer: PreTrainedTokenizerBase, index: int) -> tuple[list[int], list[int]]:
    """Return the token ids and labels of a chat."""
    _require_chat(messages, index)
    chat: list[Any] = list(messages)
    try:
        whole = str(tokenizer.apply_chat_template(chat, tokenize=False))
        if getattr(tokenizer, "is_fast", False) and _MARKS_GENERATION.search(tokenizer.get_chat_template()):
            marked = _marked_targets(chat, tokenizer)
        else:
            marked = None
        start = _find_answer(chat, whole, tokenizer) if marked is None else 0
    except Exception as error:  # a template is the model author's program and may raise anything
        if getattr(tokenizer, "chat_template", None) is None:
            raise BlueprintError(
                f"Example {index} has messages, but the tokenizer has no chat template. Set tokenizer.chat_template, "
                "or give prompt and completion."
            ) from error
        roles = format_names([str(message.get("role")) for message in messages])
        raise BlueprintError(
            f"The chat template refuses example {index} with the roles {roles}: {first_line(error)}. Change or remove the "
            "example."
        ) from error
    for at, message in enumerate(chat):
        if isinstance(message.get("content"), list) and str(message["content"]) in whole:
            raise BlueprintError(
                f"'content' of message {at} of example {index} must be text, got a list, which the chat template prints "
                "with its brackets. Join the parts' texts."
            )
    if marked is not None:
        return marked
    if start < 0:
        raise BlueprintError(
            f"The chat template changes the messages of example {index}, so it is unknown where the last one starts. Mark "
            "what the assistant says with {% generation %} in the template, or give prompt and completion."
        )
    ids, first = _tokenize(whole[:start], whole[start:], "messages", tokenizer, index)
    if chat[-1].get("role") in ("user", "system"):
        first = len(ids)  # no answer
    return ids, [IGNORED] * first + ids[first:]


def _marked_targets(chat: list[Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the token ids of a chat, and labels of the tokens that share a character with what its template marks.

    `apply_chat_template(return_assistant_tokens_mask=True)` looks for the tokens of the first and last character, and
    takes all that follows for the answer if the last is a space or a line break that belongs to no token.
    """
    [text], [spans] = cast(Any, render_jinja_template)(
        conversations=[chat],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    tokens: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # a space or line break whose offsets were trimmed starts where it stops
    labels = [
        token if any(min(start, stop - 1) < end and first < stop for first, end in spans) else IGNORED
        for token, (start, stop) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    ]
    return tokens["input_ids"], labels


def _find_answer(chat: list[Any], whole: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return where the last message starts in a chat's text; -1 if the template does not show it.

    It starts behind the generation prompt, or otherwise where the text changes with the message, if all that follows
    stays the same when the messages before change.
    """

    def render(messages: list[Any], generates: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=generates, tokenize=False))

    before, prompt = (render(chat[:-1], generates) for generates in (False, True))
    if prompt != before and whole.startswith(prompt):
        return len(prompt)
    others = [{**m, "content": _OTHER} if isinstance(m.get("content"), str) else m for m in chat]
    text, content = render([*chat[:-1], others[-1]]), str(chat[-1].get("content")).strip()
    start = text.find(_OTHER)
    if start >= 0 and whole[:start] == text[:start] and whole.startswith(content, start):
        return start if render([*others[:-1], chat[-1]]).endswith(whole[start:]) else -1
    return len(before) if prompt == before and whole.startswith(before) else -1


def _require_chat(messages: Any, index: int) -> None:
    """Raise BlueprintError if these are not at least two messages, each with a role and content."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise BlueprintError(f"The messages of example {index} must be a list, got {type(messages).__name__}.")
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise BlueprintError(
                f"Message {at} of example {index} must be a mapping such as {{'role': 'user', 'content': …}}, got "
                f"{type(message).__name__}."
            )
        content = message.get("content")
        is_parts = isinstance(content, list) and all(isinstance(part, Mapping) for part in content)
        is_call = content is None and any(v for k, v in message.items() if k != "role")  # of tools
        if not (isinstance(content, str) or is_call or is_parts):
            raise BlueprintError(
                f"'content' of message {at} of example {index} must be text, got {type(content).__name__}. Change or "
                "remove the example."
            )
    if len(messages) < 2:
        raise BlueprintError(
            f"Example {index} must have at least two messages, a question and an answer, got {len(messages)}."
        )
