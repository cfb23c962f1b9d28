"""Each example's own loss: the mean over its target tokens, with examples kept apart.

Covers what transformers' heads compute from `labels`: next-token, token-by-token and sequence-to-sequence prediction,
classification and regression. Knows nothing of gradients.
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


LossFunction = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]

IGNORED = -100  # transformers' label for "no target here"
_NEXT_TOKEN_HEADS = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")


def per_example_losses(
    model: nn.Module, batch: Mapping[str, Tensor], loss_fn: LossFunction | None = None
) -> tuple[Tensor, Tensor]:
    """Losses (B,) in float32, with their graph, and numbers of target tokens (B,) of a batch.

    Args:
        model: with or without adapters.
        batch: the model's inputs and `labels`, (B, T) or (B,).
        loss_fn: replaces the model's own objective; `loss_fn(model, batch)` → (B,).

    Raises:
        MeasurementError: without labels or targets, or for labels that fit no known objective.
    """
    if loss_fn is not None:
        losses = loss_fn(model, batch)
        if losses.dim() != 1:
            raise MeasurementError(
                f"loss_fn returned shape {tuple(losses.shape)}; it must return one loss an example."
            )
        return losses.float(), _count_targets(batch, len(losses))
    if "labels" not in batch:
        raise MeasurementError(
            f"The batch has {sorted(batch)} and no labels, so there is no loss to take the gradient of. "
            "Add labels (-100 where there is no target), or give loss_fn."
        )
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if labels.dim() == 2 and type(unwrap(model)).__name__.endswith(_NEXT_TOKEN_HEADS):
        return _next_token_losses(model, inputs, labels)
    if "decoder_input_ids" not in inputs and _is_encoder_decoder(model):
        base: Any = unwrap(model)
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
    logits = model(**inputs).logits
    if labels.dim() == 2 and logits.dim() == 3:
        return _token_losses(logits, labels)
    if labels.dim() == 1 and logits.dim() == 2:
        return _sequence_losses(logits, labels), torch.ones_like(labels, dtype=torch.long)
    raise MeasurementError(
        f"{type(unwrap(model)).__name__} returned logits of shape {tuple(logits.shape)} for labels of shape "
        f"{tuple(labels.shape)}, which is no objective known here: give loss_fn(model, batch) -> losses (B,)."
    )


def _next_token_losses(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    targets = labels[:, 1:]
    columns = (targets != IGNORED).any(dim=0).nonzero().flatten()
    _require_targets(targets != IGNORED)
    if "logits_to_keep" in inspect.signature(unwrap(model).forward).parameters:
        # the head is a large part of a small model: apply it only where some example has a target
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, columns]
    return _token_losses(logits, targets[:, columns.to(targets.device)])


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


def _count_targets(batch: Mapping[str, Tensor], examples: int) -> Tensor:
    labels = batch.get("labels")
    if labels is not None and labels.dim() == 2 and len(labels) == examples:
        return (labels != IGNORED).sum(dim=1)
    return torch.ones(examples, dtype=torch.long)


def _is_encoder_decoder(model: nn.Module) -> bool:
    config = getattr(unwrap(model), "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))
