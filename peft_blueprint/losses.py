"""Each example's own loss: the mean over its target tokens, with examples kept apart.

Covers what transformers' heads compute from `labels`: next-token, token-by-token and sequence-to-sequence prediction,
classification and regression; and, one example at a time, whatever loss a model returns. Knows nothing of gradients.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import MeasurementError
from .gradients import NUMBERS_AT_A_TIME
from .submodules import unwrap


LossFunction = Callable[[nn.Module, Mapping[str, Any]], Tensor]

IGNORED = -100  # transformers' label for "no target here"
_NEXT_TOKEN_HEADS = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")


class UnknownObjective(MeasurementError):
    """Only the model itself knows what it minimises: its own loss of one example at a time is that example's."""


def per_example_losses(
    model: nn.Module, batch: Mapping[str, Any], loss_fn: LossFunction | None = None
) -> tuple[Tensor, Tensor]:
    """Losses (B,) in float32, with their graph, and numbers of target tokens (B,) of a batch.

    Args:
        model: with or without adapters.
        batch: the model's inputs and `labels`, (B, T) or (B,).
        loss_fn: replaces the model's own objective; `loss_fn(model, batch)` → (B,).

    Raises:
        UnknownObjective: without labels, or for labels that fit no objective known here.
        MeasurementError: without targets.
    """
    if loss_fn is not None:
        losses = loss_fn(model, batch)
        if losses.dim() != 1:
            raise MeasurementError(
                f"loss_fn returned shape {tuple(losses.shape)}; it must return one loss an example."
            )
        return losses.float(), _count_targets(batch, len(losses))
    if "labels" not in batch:
        raise UnknownObjective(f"The batch has {sorted(batch)} and no labels, so there is no loss known here.")
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    base: Any = unwrap(model)
    if "decoder_input_ids" not in inputs and _is_encoder_decoder(model):
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
    if labels.dim() == 2:
        targets = labels[:, 1:] if _predicts_next_token(model) else labels
        _require_targets(targets != IGNORED)
        columns = (targets != IGNORED).any(dim=0).nonzero().flatten()
        logits = _logits_at(model, inputs, columns, labels.shape[1])
        if logits.dim() == 3 and logits.shape[1] == len(columns):
            return _token_losses(logits, targets[:, columns.to(targets.device)])
    else:
        logits = model(**inputs).logits
        if labels.dim() == 1 and logits.dim() == 2:
            return _sequence_losses(logits, labels), torch.ones_like(labels, dtype=torch.long)
    raise UnknownObjective(
        f"{type(base).__name__} returned logits of shape {tuple(logits.shape)} for labels of shape "
        f"{tuple(labels.shape)}, which is no objective known here."
    )


def own_loss(model: nn.Module, example: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The loss that a model returns for a batch of one, (1,) float32 with its graph, and its number of targets (1,).

    Raises:
        MeasurementError: if it returns none.
    """
    loss = getattr(model(**example), "loss", None)
    if loss is None:
        raise MeasurementError(
            f"The batch has {sorted(example)}{'' if 'labels' in example else ' and no labels'}, and "
            f"{type(unwrap(model)).__name__} returned no loss for it. Add labels (-100 where there is no target), or "
            "give loss_fn(model, batch) -> losses (B,)."
        )
    return loss.float().reshape(1), _count_targets(example, 1)


def _logits_at(model: nn.Module, inputs: dict[str, Any], columns: Tensor, length: int) -> Tensor:
    """Logits (B, columns, V): the head is a large part of a small model, so it is applied where there is a target.

    Through `logits_to_keep` where the model has it, else by giving the head those positions alone, else cut afterwards.
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
    """Mean cross-entropy of every row over its targets. (B, T, V), (B, T) → (B,), (B,)."""
    targets = targets.to(logits.device)
    counts = _require_targets(targets != IGNORED)
    token_losses: Tensor = _CrossEntropy.apply(logits.flatten(0, 1), targets.flatten())
    return token_losses.view_as(targets).sum(dim=1) / counts, counts


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of every row, 0 where there is no target, holding no more than the logits and their gradient.

    `F.cross_entropy` keeps the logarithms of the softmax as well, and a copy of half-precision logits in float32: with a
    vocabulary of 50,000 those decide the peak memory of a small model. Here rows are taken a few at a time.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """(N, V), (N,) → (N,) float32."""
        normalisers = torch.cat([rows.float().logsumexp(dim=1) for rows in logits.split(_rows_at_a_time(logits))])
        ctx.save_for_backward(logits, targets, normalisers)
        chosen = logits.gather(1, targets.clamp_min(0)[:, None])[:, 0].float()
        return torch.where(targets == IGNORED, 0.0, normalisers - chosen)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """The softmax, less one at the target, times the row's weight."""
        logits, targets, normalisers = ctx.saved_tensors
        weights = torch.where(targets == IGNORED, 0.0, grad_outputs[0])
        gradient = torch.empty_like(logits)
        for i in range(0, len(logits), step := _rows_at_a_time(logits)):
            rows = slice(i, i + step)
            part = (logits[rows].float() - normalisers[rows, None]).exp_()
            part.scatter_add_(1, targets[rows].clamp_min(0)[:, None], part.new_full((len(part), 1), -1.0))
            gradient[rows] = part.mul_(weights[rows, None])
        return gradient, None


def _rows_at_a_time(logits: Tensor) -> int:
    return max(1, NUMBERS_AT_A_TIME // logits.shape[1])


def _sequence_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of (B, C) logits, or squared error where there is one output or the labels are real numbers."""
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
    """Decoders alone, with a language model's head or (text with images) a conditional generator's."""
    name = type(unwrap(model)).__name__
    return name.endswith(_NEXT_TOKEN_HEADS) or (
        name.endswith("ForConditionalGeneration") and not _is_encoder_decoder(model)
    )


def _is_encoder_decoder(model: nn.Module) -> bool:
    config = getattr(unwrap(model), "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))
