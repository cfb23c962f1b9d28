"""Compute each example's own loss: the mean over its target tokens.

Covers the objectives of transformers' heads: next-token, per-token and sequence-to-sequence prediction, classification
and regression. One example at a time, it covers any loss that a model returns.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import MeasurementError
from .gradients import NUMBERS_AT_A_TIME
from .submodules import class_of, unwrap


LossFunction = Callable[[nn.Module, Mapping[str, Any]], Tensor]

IGNORED = -100  # transformers' label of positions without a target
_NEXT_TOKEN_HEADS = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")


class UnknownObjective(MeasurementError):
    """Only the model itself can compute its objective; measure its own loss, one example at a time."""


def per_example_losses(
    model: nn.Module, batch: Mapping[str, Any], loss_fn: LossFunction | None = None
) -> tuple[Tensor, Tensor]:
    """Return losses (B,) in float32, with their graph, and numbers of target tokens (B,) of a batch.

    Args:
        model: with or without adapters.
        batch: the model's inputs and `labels`, (B, T) or (B,).
        loss_fn: replaces the model's own objective; `loss_fn(model, batch)` → (B,).

    Raises:
        UnknownObjective: without labels, or if logits and labels fit no known objective.
        MeasurementError: without targets.
    """
    if loss_fn is not None:
        losses = loss_fn(model, batch)
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise MeasurementError(f"loss_fn must return a tensor with one loss for each example, (B,), got {found}.")
        if torch.is_grad_enabled() and not losses.requires_grad:
            raise MeasurementError(
                "loss_fn returned losses without a graph: they were detached, or computed under no_grad. Return them with "
                "their graph."
            )
        return losses.float(), _count_targets(batch, len(losses))
    if "labels" not in batch:
        raise UnknownObjective(f"The batch has {sorted(batch)} and no labels.")
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if labels.dim() != 2:
        logits = model(**inputs).logits
        known = _losses_of(model, logits, labels)
    elif _is_encoder_decoder(model) and "decoder_input_ids" not in inputs:
        prepare = getattr(unwrap(model), "prepare_decoder_input_ids_from_labels", None)
        if prepare is None:  # the model makes them itself when it computes a loss
            logits = model(**batch).logits
            known = _losses_of(model, logits, labels)
        else:
            logits, known = _losses_at_targets(model, inputs | {"decoder_input_ids": prepare(labels=labels)}, labels)
    else:
        logits, known = _losses_at_targets(model, inputs, labels)
    if known is None:
        raise UnknownObjective(
            f"{type(unwrap(model)).__name__} returned logits of shape {tuple(logits.shape)} for labels of shape "
            f"{tuple(labels.shape)}, which fit no known objective."
        )
    return known


def matches_model_loss(model: nn.Module, batch: Mapping[str, Any], may_run: bool = True) -> bool:
    """Return whether `per_example_losses` equals the loss that the model returns.

    A model may weight classes, smooth labels or add a load-balancing loss. So it is run and compared: on the batch's
    first example if its code is transformers' own, otherwise on all. The plain decoders of transformers need no run.

    Args:
        model: with or without adapters.
        batch: the model's inputs and labels.
        may_run: False for a model that a single process cannot run; it is then taken to have its own objective.
    """
    base: Any = unwrap(model)
    labels = batch.get("labels")
    if labels is None or "labels" not in inspect.signature(base.forward).parameters:
        return True
    is_known = _is_transformers_own(base)
    if is_known and _is_plain_decoder(base):
        return True
    if not may_run:
        return False
    odd = {len(v) for v in batch.values() if isinstance(v, Tensor | list | tuple)} - {len(labels)}
    if odd and len(labels) > 1:
        return True  # it is unknown which rows belong to which example
    return all(_agrees(model, example) for example in islice(split_examples(batch), 1 if is_known else None))


def _agrees(model: nn.Module, example: Mapping[str, Any]) -> bool:
    with torch.no_grad():
        output = model(**example)
        theirs = getattr(output, "loss", None)
        if theirs is None or getattr(output, "aux_loss", None) is not None:
            return theirs is None
        mine = _losses_of(model, output.logits, example["labels"])
        tolerance = 1e-4 if output.logits.dtype == torch.float32 else 2e-2
        return mine is not None and torch.allclose(mine[0].cpu(), theirs.float().reshape(1).cpu(), rtol=tolerance)


def check_examples_are_apart(model: nn.Module, batch: Mapping[str, Any], loss_fn: LossFunction) -> None:
    """Raise MeasurementError if the first example's loss changes when it is alone.

    Args:
        model: with or without adapters.
        batch: every value has a row for each example.
        loss_fn: as for `per_example_losses`.
    """
    alone = {key: value[:1] if isinstance(value, Tensor | list | tuple) else value for key, value in batch.items()}
    with torch.no_grad():
        [first, *others], [only] = (per_example_losses(model, rows, loss_fn)[0].tolist() for rows in (batch, alone))
    if others and abs(first - only) > 0.02 * abs(first) + 1e-3:  # room for half precision
        raise MeasurementError(
            f"loss_fn gives the first example of a batch of {1 + len(others)} the loss {first:.4g}, and {only + 0:.4g} "
            "by itself: its losses depend on the other rows, as a contrastive loss does. That can only be measured for "
            "a whole batch at once, which experts, include='all' and layers whose rows are not the examples rule out. "
            "Use include='adaptable' where it is not in use, or a loss in which examples stand alone."
        )


def model_loss(model: nn.Module, example: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the model's own loss of a batch of one, (1,) float32 with its graph, and its number of targets (1,).

    Raises:
        MeasurementError: if the model returns no loss, or the example has no target.
    """
    cacheless = {"use_cache": False} if "use_cache" in inspect.signature(unwrap(model).forward).parameters else {}
    loss = getattr(model(**cacheless | dict(example)), "loss", None)
    if loss is None:
        raise MeasurementError(
            f"The batch has {sorted(example)}{'' if 'labels' in example else ' and no labels'}, and "
            f"{type(unwrap(model)).__name__} returned no loss for it. Add labels (-100 where there is no target), or "
            "give loss_fn(model, batch) -> losses (B,)."
        )
    counts = _count_targets(example, 1)
    _require_targets(counts[:, None] > 0)
    return loss.float().reshape(1), counts


def count_examples(batch: Mapping[str, Any]) -> int:
    """Return the number of examples of a batch: rows of its labels, its tokens or its first tensor."""
    for key in ("labels", "input_ids"):
        if isinstance(batch.get(key), Tensor):
            return len(batch[key])
    rows = [len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    if not rows:
        raise MeasurementError(
            f"A batch needs a tensor with a row for each example, got {sorted(map(str, batch)) or 'nothing'}. Give "
            "tensors by name, not nested."
        )
    return rows[0]


def is_interleaved(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Return whether images or sounds stand among a text's tokens, so that rows do not show whose they are."""
    values = [v for k, v in batch.items() if isinstance(v, Tensor) and k not in ("labels", "attention_mask")]
    extra = [value for value in values if value.is_floating_point() and value.dim() > 1]
    settings = vars(getattr(unwrap(model), "config", None) or model)
    has_places = any(re.match(r"(image|video|audio|vision)\w*_token", key) for key in settings)
    return "input_ids" in batch and any(has_places or len(value) != count_examples(batch) for value in extra)


def split_examples(batch: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Split a batch into batches of one example.

    Raises:
        MeasurementError: if a value does not have one row for each example.
    """
    examples = count_examples(batch)
    if examples == 1:
        yield batch
        return
    sizes = {key: len(value) for key, value in batch.items() if isinstance(value, Tensor | list | tuple)}
    odd = {key: size for key, size in sizes.items() if size != examples}
    if odd:
        raise MeasurementError(
            f"A batch of {examples} examples has {odd} rows, so it is unknown which belong to which example. Give batches "
            "of one example."
        )
    for i in range(examples):
        yield {key: value[i : i + 1] if key in sizes else value for key, value in batch.items()}


def _losses_of(model: nn.Module, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return losses (B,) and numbers of targets (B,) from all logits, or None if the shapes fit no known objective."""
    if labels.dim() == 1 and logits.dim() == 2:
        return _sequence_losses(logits, labels), torch.ones_like(labels, dtype=torch.long)
    if labels.dim() == 2 and logits.dim() == 3 and logits.shape[:2] == labels.shape:
        is_shifted = _predicts_next_token(model)
        return _token_losses(*((logits[:, :-1], labels[:, 1:]) if is_shifted else (logits, labels)))
    return None


def _losses_at_targets(
    model: nn.Module, inputs: dict[str, Any], labels: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Return the logits at positions where a row has a target, and losses as `_losses_of`. Labels are (B, T)."""
    targets = labels[:, 1:] if _predicts_next_token(model) else labels
    _require_targets(targets != IGNORED)
    columns = (targets != IGNORED).any(dim=0).nonzero().flatten()
    logits = _logits_at(model, inputs, columns, labels.shape[1])
    if logits.dim() == 3 and logits.shape[1] == len(columns):
        return logits, _token_losses(logits, targets[:, columns.to(targets.device)])
    return logits, None


def _logits_at(model: nn.Module, inputs: dict[str, Any], columns: Tensor, length: int) -> Tensor:
    """Return logits (B, columns, V). The head is a large part of a small model, so it runs on these positions only.

    Uses `logits_to_keep` if the model has it, otherwise a hook on the head. Without a known head, cut afterwards.
    """
    base: Any = unwrap(model)
    known = inspect.signature(base.forward).parameters
    inputs = inputs | ({"use_cache": False} if "use_cache" in known else {})
    if "logits_to_keep" in known:
        logits: Tensor = model(**inputs, logits_to_keep=columns).logits
        return logits

    def cut(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        return (hidden[:, columns], *args[1:]) if hidden.dim() == 3 and hidden.shape[1] == length else None

    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    hook = head.register_forward_pre_hook(cut) if head is not None else None
    try:
        logits = model(**inputs).logits
    finally:
        if hook is not None:
            hook.remove()
    is_whole = logits.dim() == 3 and logits.shape[1] == length
    return logits[:, columns.to(logits.device)] if is_whole else logits


def _token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of every row over its targets. (B, T, V), (B, T) → (B,), (B,)."""
    targets = targets.to(logits.device)
    counts = _require_targets(targets != IGNORED)
    token_losses: Tensor = _CrossEntropy.apply(logits.flatten(0, 1), targets.flatten())
    return token_losses.view_as(targets).sum(dim=1) / counts, counts


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of every row, 0 without a target, in the memory of the logits and their gradient.

    `F.cross_entropy` also keeps the log-softmax, and a float32 copy of half-precision logits. With a vocabulary of
    50,000 these dominate the peak memory of a small model. Here a few rows are computed at a time.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """(N, V), (N,) → (N,) float32."""
        normalizers = torch.cat([rows.float().logsumexp(dim=1) for rows in logits.split(_rows_at_a_time(logits))])
        ctx.save_for_backward(logits, targets, normalizers)
        chosen = logits.gather(1, targets.clamp_min(0)[:, None])[:, 0].float()
        return torch.where(targets == IGNORED, 0.0, normalizers - chosen)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """Return the softmax, minus one at the target, times the row's weight."""
        logits, targets, normalizers = ctx.saved_tensors
        weights = torch.where(targets == IGNORED, 0.0, grad_outputs[0])
        gradient = torch.empty_like(logits)
        for i in range(0, len(logits), step := _rows_at_a_time(logits)):
            rows = slice(i, i + step)
            part = (logits[rows].float() - normalizers[rows, None]).exp_()
            part.scatter_add_(1, targets[rows].clamp_min(0)[:, None], part.new_full((len(part), 1), -1.0))
            gradient[rows] = part.mul_(weights[rows, None])
        return gradient, None


def _rows_at_a_time(logits: Tensor) -> int:
    return max(1, NUMBERS_AT_A_TIME // logits.shape[1])


def _sequence_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of (B, C) logits, or squared errors for one output or floating-point labels."""
    labels = labels.to(logits.device)
    if logits.shape[1] == 1 or labels.is_floating_point():
        return F.mse_loss(logits.squeeze(1).float(), labels.float(), reduction="none")
    return F.cross_entropy(logits.float(), labels, reduction="none")


def _require_targets(is_target: Tensor) -> Tensor:
    counts = is_target.sum(dim=1)
    without = (counts == 0).nonzero().flatten().tolist()
    if without:
        raise MeasurementError(
            f"Examples {without} of a batch of {len(counts)} have no target token: all their labels are -100, perhaps "
            "because the prompt fills the maximum length. Drop them, or raise the length."
        )
    return counts


def _count_targets(batch: Mapping[str, Any], examples: int) -> Tensor:
    labels = batch.get("labels")
    if labels is not None and labels.dim() == 2 and len(labels) == examples:
        return (labels != IGNORED).sum(dim=1)
    return torch.ones(examples, dtype=torch.long)


def _predicts_next_token(model: nn.Module) -> bool:
    """Return whether this is a decoder with a language model's head, or a decoder-only conditional generator."""
    name = type(unwrap(model)).__name__
    return name.endswith(_NEXT_TOKEN_HEADS) or (
        name.endswith("ForConditionalGeneration") and not _is_encoder_decoder(model)
    )


def _is_transformers_own(base: nn.Module) -> bool:
    """Return whether a model's forward is transformers' own, apart from accelerate's wrapper that fetches weights."""
    is_replaced = "forward" in vars(base) and "_hf_hook" not in vars(base)
    return class_of(base).__module__.startswith("transformers.") and not is_replaced


def _is_plain_decoder(base: Any) -> bool:
    """Return whether the loss of a transformers model is the cross-entropy of the next token and nothing more."""
    return (
        class_of(base).__name__.endswith(_NEXT_TOKEN_HEADS[:2])
        and getattr(base.loss_function, "__name__", "") == "ForCausalLMLoss"
        and not getattr(base.config, "output_router_logits", False)
    )


def _is_encoder_decoder(model: nn.Module) -> bool:
    config = getattr(unwrap(model), "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))
