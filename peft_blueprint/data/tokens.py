"""Score single target tokens: exactly, one backward pass a token, or from one forward pass for all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import BlueprintError, MeasurementError
from ..measure import IGNORED, Batch, Objective, measurement_mode, split_examples, take_examples, unwrap
from .examples import Candidate
from .features import SIZE


HEAD_SCALARS = ("loss", "log loss", "entropy", "log error", "log state", "log head gradient", "log position")
_LOGITS = 2**25  # computed at once


def target_positions(candidate: Candidate) -> list[int]:
    """Return the positions of labels that are targets; the first token is not predicted."""
    labels = candidate.row["labels"]
    return [position for position in range(1, len(labels)) if labels[position] != IGNORED]


def only_target(candidate: Candidate, position: int) -> Candidate:
    """Return an example with one token as the only target, without the tokens after it."""
    ids = candidate.row["input_ids"][: position + 1]
    return replace(candidate, row={"input_ids": ids, "labels": [IGNORED] * position + ids[position:]})


def head_features(
    model: nn.Module, batches: Iterable[Batch], *, size: int = SIZE, seed: int = 0
) -> tuple[list[np.ndarray], int]:
    """Compute features of every target token in one forward pass, and a backward pass through the operations after the head.

    Scalars are the loss and its logarithm; the entropy of the prediction; the logarithms of the error ‖∂ℓ/∂z‖, for z the
    head's output (‖p − y‖ if nothing follows the head, the EL2N score of Paul et al. 2021, arXiv:2107.07075), of the norm
    of the hidden state h that the head reads, and of their product; and the logarithm of the position. The product is the
    norm of the gradient of the token's loss in the head's weight, since that gradient is the outer product of ∂ℓ/∂z and
    h. It bounds the gradients further down up to a factor of the layers (Katharopoulos and Fleuret 2018,
    arXiv:1803.00942). The hidden state follows, projected on random directions.

    Args:
        model: a causal language model.
        batches: mappings with `input_ids` and `labels` (B, T).
        size: projected numbers of the hidden state.
        seed: of the projection.

    Returns:
        For every batch (B, T, features) float64, beginning with `HEAD_SCALARS`, at the positions of the labels and 0 where
        there is no target; and the number of positions read, with padding.

    Raises:
        BlueprintError: for a model whose objective is not the loss of the next token, or that has no head.

    Example:
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> features, positions = head_features(tiny_llama(), toy_batches(examples=2), size=4)
        >>> len(features), features[0].shape[1], positions > 0
        (1, 12, True)
    """
    base = cast(Any, unwrap(model))
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None or getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise BlueprintError(f"Tokens are scored for causal language models, got {type(base).__name__}.")
    reader, found, tokens = _HeadReader(model, size, seed), [], 0
    with measurement_mode(model):
        head.register_forward_hook(reader.take)
        for batch in take_examples(model, batches):
            labels = batch["labels"]
            at_once = max(1, _LOGITS // (labels.shape[1] * base.config.get_text_config().vocab_size))
            parts = [batch] if at_once >= len(labels) else split_examples(batch)
            found.append(np.concatenate([reader.read(part) for part in parts]))
            tokens += batch["input_ids"].numel()
    return found, tokens


class _HeadReader:
    """Read the head's input and the gradient at its output as a batch passes through a model."""

    def __init__(self, model: nn.Module, size: int, seed: int):
        self._model = model
        self._size = size
        self._seed = seed
        self._state: Tensor | None = None
        self._output: Tensor | None = None
        self._projection: Tensor | None = None
        self._is_checked = False

    def take(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Keep the head's input, and let the graph begin at its output."""
        self._state = args[0].detach()
        self._output = output.detach().requires_grad_()
        return self._output

    def read(self, batch: Batch) -> np.ndarray:
        """Return features (B, T, f)."""
        labels = batch["labels"]
        logits = self._model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
        state, output = self._state, self._output
        if state is None or output is None or state.dim() != 3 or logits.shape[:2] != labels.shape:
            raise BlueprintError(f"The head of {type(unwrap(self._model)).__name__} is not called with all positions.")
        targets = labels[:, 1:].to(logits.device)
        is_target = targets != IGNORED
        flat = logits[:, :-1].float()
        losses = F.cross_entropy(flat.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        losses = losses.view_as(targets)
        (slopes,) = torch.autograd.grad(losses.sum(), output)
        self._require_next_token(batch, losses.detach(), is_target)
        with torch.no_grad():
            logs = flat.log_softmax(dim=2)
            entropies = -(logs.exp() * logs.clamp_min(-1e4)).sum(dim=2)
            error = torch.linalg.vector_norm(slopes[:, :-1].float(), dim=2)
            size = torch.linalg.vector_norm(state[:, :-1].float(), dim=2)
            positions = torch.arange(1, labels.shape[1], device=logits.device).expand_as(targets)
            values = [losses, _log(losses), entropies, _log(error), _log(size), _log(error * size), _log(positions)]
            scalars = torch.stack([value.double().to(logits.device) for value in values], dim=2)
            projected = (state[:, :-1].float() @ self._directions(state)).double().to(logits.device)
            features = torch.cat([scalars, projected], dim=2) * is_target[:, :, None]
        self._state = self._output = None
        return F.pad(features, (0, 0, 1, 0)).cpu().numpy()

    def _directions(self, state: Tensor) -> Tensor:
        if self._projection is None:
            generator = torch.Generator().manual_seed(self._seed)
            self._projection = torch.randn(state.shape[2], self._size, generator=generator) / state.shape[2] ** 0.5
        return self._projection.to(state.device)

    def _require_next_token(self, batch: Batch, losses: Tensor, is_target: Tensor) -> None:
        """Compare the first batch's losses with the model's own."""
        if self._is_checked:
            return
        self._is_checked = True
        with torch.no_grad():
            own, _ = Objective(self._model).losses(batch)
        mean = losses.sum(dim=1) / is_target.sum(dim=1).clamp_min(1)
        if not torch.allclose(own.to(mean.device), mean, rtol=0.02, atol=1e-3):
            raise MeasurementError(
                f"Tokens are scored by the loss of the next token, which is not the objective of "
                f"{type(unwrap(self._model)).__name__}. Choose examples instead."
            )


def spread(candidates: Sequence[Candidate], values: Sequence[float], width: int) -> np.ndarray:
    """Put values of all targets, candidate by candidate, at their positions. (targets,) → (candidates, width)"""
    found, left = np.zeros((len(candidates), width)), iter(values)
    for row, candidate in zip(found, candidates, strict=True):
        for position in target_positions(candidate):
            row[position] = next(left)
    return found


def _log(values: Tensor) -> Tensor:
    return values.double().clamp_min(1e-12).log()
