"""Compute cheap features of examples: from one forward pass of a model, or from token ids alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MeasurementError
from ..measure import (
    IGNORED,
    Batch,
    Checks,
    LossFunction,
    Objective,
    count_examples,
    find_submodules,
    find_weights,
    measurement_mode,
    take_examples,
    unwrap,
)


SIZE = 32  # projected numbers of a hidden state, and of a text's n-grams
DEPTHS = (0.25, 0.5, 0.75, 1.0)

MODEL_SCALARS = ("log tokens", "log targets", "log loss", "log error", "loss", "entropy")
TOKEN_SCALARS = ("log tokens", "log targets", "log others", "different")
_BUCKETS = 4096
_ROWS = 64  # of logits at a time


def model_features(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    depths: Sequence[float] = DEPTHS,
    size: int = SIZE,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    checks: Checks | None = None,
) -> tuple[np.ndarray, int]:
    """Compute features of examples in one forward pass without gradients.

    Scalars are the logarithms of the number of tokens, of targets, of the mean loss and of the error ‖p − y‖ of the
    predicted distribution (the EL2N score of Paul et al. 2021, arXiv:2107.07075, here the root mean square over targets);
    the loss; and the mean entropy of the predictions. The hidden states at some depths, averaged over positions, are
    projected on random directions. Entropy and error are 0 if the model's logits cannot be matched with targets.

    Args:
        model: as for `measure_influence`; weights and flags stay as they are.
        batches: mappings with `labels`.
        depths: fractions of the model's blocks; the input of each block's first linear layer is read.
        size: projected numbers of each depth.
        loss_fn: `loss_fn(model, batch)` → losses (B,), for an objective other than the model's own.
        seed: of the projection; the same for features that are compared.
        checks: of an earlier measurement of the model, see `measure_influence`.

    Returns:
        Features, (examples, features) float64, beginning with `MODEL_SCALARS`; and the number of positions read, with
        padding.

    Raises:
        MeasurementError: for an example without targets, or a loss or hidden state that is not finite.
    """
    reader = _Reader(model, depths, size, seed)
    rows = [np.empty((0, len(MODEL_SCALARS) + size * len(reader.modules)))]
    tokens, objective = 0, Objective(model, loss_fn, checks)
    with measurement_mode(model), torch.no_grad():
        reader.hook()
        for batch in take_examples(model, batches, loss_fn=loss_fn):
            rows += objective.map(batch, lambda part: reader.read(part, objective))
            tokens += batch["input_ids"].numel() if "input_ids" in batch else 0
    values = np.concatenate(rows)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist()
    if bad:
        raise MeasurementError(
            f"The loss or a hidden state is not finite for examples {bad[:5]} of {len(values)}. Look for NaN in the "
            "weights or the data; load float16 weights in bfloat16 or float32 instead."
        )
    return values, tokens


def token_features(rows: Sequence[Mapping[str, Sequence[int]]], *, size: int = SIZE, seed: int = 0) -> np.ndarray:
    """Compute features of examples from their token ids, without a model.

    Scalars are the logarithms of the number of tokens, of targets and of other tokens, and the share of distinct tokens.
    Single tokens and pairs are hashed and projected on random directions.

    Args:
        rows: with `input_ids` and `labels`.
        size: projected numbers of the n-grams.
        seed: of the projection.

    Returns:
        (examples, features) float64, beginning with `TOKEN_SCALARS`.

    Example:
        >>> token_features([{"input_ids": [5, 6, 5], "labels": [-100, 6, 5]}], size=2).shape
        (1, 6)
    """
    table = np.random.default_rng(seed).normal(size=(_BUCKETS, size)) / np.sqrt(size)
    values = np.empty((len(rows), len(TOKEN_SCALARS) + size))
    for i, row in enumerate(rows):
        ids = np.asarray(row["input_ids"], dtype=np.int64)
        targets = int((np.asarray(row["labels"]) != IGNORED).sum())
        grams = np.concatenate([ids, (ids[:-1] * 1_000_003 + ids[1:]) * 2_654_435_761 >> 7]) % _BUCKETS
        counts = np.log(np.maximum([len(ids), targets, len(ids) - targets], 1))
        n_grams = table[grams].mean(axis=0) if len(grams) else np.zeros(size)
        values[i] = [*counts, len(np.unique(ids)) / max(len(ids), 1), *n_grams]
    return values


class _Reader:
    """Read hidden states at some depths and the head's logits as they pass through a model."""

    def __init__(self, model: nn.Module, depths: Sequence[float], size: int, seed: int):
        self.model = model
        self.size = size
        self.seed = seed
        self.modules = _modules_at(model, depths)
        self.states: dict[int, Tensor] = {}
        self.logits: Tensor | None = None
        self._projections: dict[int, Tensor] = {}  # by width

    def hook(self) -> None:
        """Hook the model until the `measurement_mode` around it ends."""
        for place, module in enumerate(self.modules):
            module.register_forward_pre_hook(self._state_hook(place))
        base = cast(Any, unwrap(self.model))
        head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        if head is not None:
            head.register_forward_hook(self._logits_hook)

    def read(self, batch: Batch, objective: Objective) -> np.ndarray:
        """Return features (B, f) of a batch."""
        self.states, self.logits = {}, None
        losses, targets = objective.at_once(batch)
        examples = count_examples(batch)
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            tokens = mask.sum(dim=1).double().cpu()
        else:
            tokens = torch.full((examples,), batch["input_ids"].shape[1] if "input_ids" in batch else 1).double()
        loss, count = losses.double().cpu(), targets.double().cpu()
        entropy, error = self._predictions(batch, loss)
        logs = [v.clamp_min(least).log() for v, least in ((tokens, 1), (count, 1), (loss, 1e-6), (error, 1e-6))]
        scalars = torch.stack([*logs, loss, entropy], dim=1)
        states = [self._project(self.states.get(place), mask, examples) for place in range(len(self.modules))]
        return torch.cat([scalars, *states], dim=1).numpy()

    def _predictions(self, batch: Batch, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Mean entropy and root mean square error (B,) of the predictions at targets.

        Labels belong to the next position or to their own, whichever gives the known losses; zeros if neither does.
        """
        logits, labels = self.logits, batch.get("labels")
        self.logits = None
        zeros = torch.zeros(len(losses), dtype=torch.double)
        if logits is None or not isinstance(labels, Tensor) or labels.dim() != 2 or logits.dim() != 3:
            return zeros, zeros
        for targets in (labels[:, 1:], labels):
            columns = (targets != IGNORED).any(dim=0)
            is_cut = logits.shape[1] == int(columns.sum())
            if not is_cut and logits.shape[1] != labels.shape[1] or len(logits) != len(labels) or not columns.any():
                continue
            targets = (targets[:, columns] if is_cut else targets).to(logits.device)
            loss, entropy, error = _prediction_means(logits, targets)
            if torch.allclose(loss, losses, rtol=0.02, atol=1e-3):
                return entropy, error.clamp_min(0).sqrt()
        return zeros, zeros

    def _project(self, state: Tensor | None, mask: Any, examples: int) -> Tensor:
        """Project a hidden state's mean over positions, (B, size); zeros if its rows cannot be told apart by example."""
        if state is not None and state.dim() == 2 and len(state) != examples and len(state) % examples == 0:
            state = state.view(examples, -1, state.shape[1])
        if state is None or len(state) != examples:
            return torch.zeros(examples, self.size, dtype=torch.double)
        if state.dim() == 3 and isinstance(mask, Tensor) and mask.shape == state.shape[:2]:
            weights = mask.to(state.device).float()
            mean = torch.einsum("bt,btd->bd", weights, state.float()) / weights.sum(dim=1, keepdim=True).clamp_min(1)
        else:
            mean = state.float().flatten(1, -2).mean(dim=1) if state.dim() > 2 else state.float()
        width = mean.shape[1]
        if width not in self._projections:
            generator = torch.Generator().manual_seed(self.seed)
            self._projections[width] = torch.randn(width, self.size, generator=generator) / width**0.5
        return (mean.cpu() @ self._projections[width]).double()

    def _state_hook(self, place: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                self.states[place] = args[0].detach()

        return take

    def _logits_hook(self, _: nn.Module, args: Any, output: Any) -> None:
        self.logits = output.detach() if isinstance(output, Tensor) else None


def _prediction_means(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means over an example's targets of the loss, the entropy and ‖p − y‖². (B, C, V), (B, ≤ C) → (B,) each."""
    place, column = (targets != IGNORED).nonzero(as_tuple=True)
    found = []
    for rows, columns in zip(place.split(_ROWS), column.split(_ROWS), strict=True):
        logs = logits[rows, columns].float().log_softmax(dim=1)
        shares = logs.exp()
        at_target = logs.gather(1, targets[rows, columns][:, None])[:, 0]
        entropies = -(shares * logs.clamp_min(-1e4)).sum(dim=1)
        errors = shares.square().sum(dim=1) - 2 * at_target.exp() + 1
        found.append(torch.stack([-at_target, entropies, errors]).double().cpu())
    sums = torch.zeros(3, len(targets), dtype=torch.double).index_add_(1, place.cpu(), torch.cat(found, dim=1))
    loss, entropy, error = sums / torch.bincount(place.cpu(), minlength=len(targets)).clamp_min(1)
    return loss, entropy, error


def _modules_at(model: nn.Module, depths: Sequence[float]) -> list[nn.Module]:
    """Return the first linear layer of the block at each fraction of the model's depth."""
    modules = {weight.name: weight.module for weight in find_weights(model)}
    first: dict[int, str] = {}
    for submodule in find_submodules(model):
        if submodule.depth is not None and submodule.form == "linear":
            first.setdefault(submodule.depth, submodule.name)
    blocks = sorted(first)
    return [modules[first[blocks[round(depth * (len(blocks) - 1))]]] for depth in depths] if blocks else []
