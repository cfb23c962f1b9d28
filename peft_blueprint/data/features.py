"""Cheap numbers that say something of an example before it is measured: from one forward pass, or from its tokens alone.

Knows nothing of scores, or of what is predicted from these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MeasurementError
from ..measure import (
    IGNORED,
    Batch,
    LossFunction,
    UnknownObjective,
    count_examples,
    device_of,
    examples_of,
    find_submodules,
    find_weights,
    is_models_own,
    own_loss,
    per_example_losses,
    prepared,
    unwrap,
)


SIZE = 32  # numbers kept of a hidden state, and of a text's n-grams
DEPTHS = (0.25, 0.5, 0.75, 1.0)
_BUCKETS = 4096
_ROWS = 64  # of logits at a time

Row = Mapping[str, Sequence[int]]


@dataclass(frozen=True, eq=False)
class Features:
    """Numbers of some examples.

    Args:
        values: (examples, features) float64.
        names: (features,)
        scalars: how many of the first columns stand for something by themselves; the others are of projections.
        losses: (examples,) mean loss over an example's own target tokens, in nats; NaN where no model was asked.
        tokens: input positions that the model read, padding included.
    """

    values: np.ndarray
    names: tuple[str, ...]
    scalars: int
    losses: np.ndarray
    tokens: int


def model_features(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    depths: Sequence[float] = DEPTHS,
    size: int = SIZE,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
) -> Features:
    """What one forward pass without gradients says of every example.

    The logarithms of its length, number of targets, mean loss and mean error ‖p − y‖ of the predicted distribution (the
    EL2N score of Paul et al. 2021, arXiv:2107.07075, here the root mean square over target tokens); the loss; the mean
    entropy of the predictions; and of the hidden states at some depths the mean over positions, projected on a few random
    directions. Entropy and error are 0 where a model's logits cannot be matched with targets.

    Args:
        model: as for `measure_influence`; weights and flags stay as they are.
        batches: mappings with `labels`.
        depths: shares of the model's blocks, whose first linear layer's input is read.
        size: numbers kept of each depth.
        loss_fn: `loss_fn(model, batch)` → losses (B,), for an objective other than the model's own.
        seed: of the projection; the same for features that are to be compared.

    Raises:
        MeasurementError: for an example without targets or with a loss that is not finite.
    """
    reader = _Reader(model, depths, size, seed)
    rows: list[np.ndarray] = []
    losses: list[np.ndarray] = []
    tokens, is_own = 0, None
    device = device_of(model)
    with prepared(model), torch.no_grad(), reader.reading():
        for given in batches:
            batch = {k: v.to(device) if isinstance(v, Tensor) and device else v for k, v in given.items()}
            if is_own is None:
                is_own = loss_fn is None and not is_models_own(model, batch)
            found, of_batch = reader.read(batch, loss_fn, is_own)
            rows.append(of_batch)
            losses.append(found)
            tokens += batch["input_ids"].numel() if "input_ids" in batch else 0
    names = (*_SCALARS, *(f"depth {depth:g}, {i}" for depth in depths for i in range(size)))
    values = np.concatenate(rows) if rows else np.empty((0, len(names)))
    every = np.concatenate(losses) if losses else np.empty(0)
    if not np.isfinite(every).all() or not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(every) | ~np.isfinite(values).all(axis=1)).tolist()
        raise MeasurementError(
            f"The loss or a hidden state of examples {bad[:5]} of {len(every)} is infinite or NaN. Look for NaN in the "
            "weights or the data; with float16 weights, load the model in bfloat16 or float32 instead."
        )
    return Features(values, names, len(_SCALARS), every, tokens)


def token_features(rows: Sequence[Row], *, size: int = SIZE, seed: int = 0) -> Features:
    """What token ids alone say of every example, without a model.

    The logarithms of its numbers of tokens, targets and other tokens, the share of different tokens among all, and its
    single tokens and pairs, hashed and projected on a few random directions.

    Args:
        rows: with `input_ids` and `labels`.
        size: numbers kept of the n-grams.
        seed: of the projection.
    """
    table = np.random.default_rng(seed).normal(size=(_BUCKETS, size)) / np.sqrt(size)
    values = np.empty((len(rows), 4 + size))
    for i, row in enumerate(rows):
        ids = np.asarray(row["input_ids"], dtype=np.int64)
        targets = int((np.asarray(row["labels"]) != IGNORED).sum())
        grams = np.concatenate([ids, (ids[:-1] * 1_000_003 + ids[1:]) * 2_654_435_761 >> 7]) % _BUCKETS
        values[i, :4] = (
            np.log(max(len(ids), 1)),
            np.log(max(targets, 1)),
            np.log(max(len(ids) - targets, 1)),
            len(np.unique(ids)) / max(len(ids), 1),
        )
        values[i, 4:] = table[grams].mean(axis=0) if len(grams) else 0.0
    names = ("log tokens", "log targets", "log others", "different", *(f"n-grams, {i}" for i in range(size)))
    return Features(values, names, 4, np.full(len(rows), np.nan), 0)


_SCALARS = ("log tokens", "log targets", "log loss", "log error", "loss", "entropy")


class _Reader:
    """Reads what passes through a model: hidden states at some depths, and the head's logits."""

    def __init__(self, model: nn.Module, depths: Sequence[float], size: int, seed: int):
        self.model = model
        self.size = size
        self.seed = seed
        self.places = _modules_at(model, depths)
        self.states: dict[int, Tensor] = {}
        self.logits: Tensor | None = None
        self._matrices: dict[int, Tensor] = {}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """With hooks on the model."""
        with ExitStack() as stack:
            for place, module in enumerate(self.places):
                stack.callback(module.register_forward_pre_hook(self._state_hook(place)).remove)
            base = cast(Any, unwrap(self.model))
            head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
            if head is not None:
                stack.callback(head.register_forward_hook(self._take_logits).remove)
            yield

    def read(self, batch: Batch, loss_fn: LossFunction | None, is_own: bool) -> tuple[np.ndarray, np.ndarray]:
        """Losses (B,) and features (B, f) of a batch."""
        self.states, self.logits = {}, None
        if not is_own:
            try:
                losses, targets = per_example_losses(self.model, batch, loss_fn)
                return self._features(batch, losses, targets)
            except UnknownObjective:
                pass
        parts = [self._alone(example) for example in examples_of(batch)]
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]

    def _alone(self, example: Batch) -> tuple[np.ndarray, np.ndarray]:
        self.states, self.logits = {}, None
        return self._features(example, *own_loss(self.model, example))

    def _features(self, batch: Batch, losses: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
        examples = count_examples(batch)
        mask = batch.get("attention_mask")
        tokens = (
            mask.sum(dim=1).double().cpu()
            if isinstance(mask, Tensor) and mask.dim() == 2
            else torch.full((examples,), float(batch["input_ids"].shape[1] if "input_ids" in batch else 1)).double()
        )
        loss, count = losses.double().cpu(), targets.double().cpu()
        entropy, error = self._predictions(batch, loss)
        scalars = torch.stack(
            [
                tokens.clamp_min(1).log(),
                count.clamp_min(1).log(),
                loss.clamp_min(1e-6).log(),
                error.clamp_min(1e-6).log(),
                loss,
                entropy,
            ],
            dim=1,
        )
        states = [self._projected(self.states.get(place), mask, examples) for place in range(len(self.places))]
        return loss.numpy(), torch.cat([scalars, *states], dim=1).numpy()

    def _predictions(self, batch: Batch, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Mean entropy and root mean square error (B,) of the predictions at target tokens.

        Labels belong to the next position or to their own, whichever gives the known losses; zeros where neither does.
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
            loss, entropy, error = _of_predictions(logits, targets)
            if torch.allclose(loss, losses, rtol=0.02, atol=1e-3):
                return entropy, error.clamp_min(0).sqrt()
        return zeros, zeros

    def _projected(self, state: Tensor | None, mask: Any, examples: int) -> Tensor:
        """(B, size) of a hidden state's mean over positions; zeros where rows do not say whose they are."""
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
        if width not in self._matrices:
            generator = torch.Generator().manual_seed(self.seed)
            self._matrices[width] = torch.randn(width, self.size, generator=generator) / width**0.5
        return (mean.cpu() @ self._matrices[width]).double()

    def _state_hook(self, place: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                self.states[place] = args[0].detach()

        return take

    def _take_logits(self, _: nn.Module, args: Any, output: Any) -> None:
        self.logits = output.detach() if isinstance(output, Tensor) else None


def _of_predictions(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means over an example's targets of the loss, the entropy and ‖p − y‖². (B, C, V), (B, ≤ C) → (B,) each."""
    place, column = (targets != IGNORED).nonzero(as_tuple=True)
    found = []
    for rows, columns in zip(place.split(_ROWS), column.split(_ROWS), strict=True):
        logs = logits[rows, columns].float().log_softmax(dim=1)
        shares = logs.exp()
        at_target = logs.gather(1, targets[rows, columns][:, None])[:, 0]
        entropies = -(shares * logs.clamp_min(-1e4)).sum(dim=1)
        found.append(
            torch.stack([-at_target, entropies, shares.square().sum(dim=1) - 2 * at_target.exp() + 1]).double().cpu()
        )
    sums = torch.zeros(3, len(targets), dtype=torch.double).index_add_(1, place.cpu(), torch.cat(found, dim=1))
    loss, entropy, error = sums / torch.bincount(place.cpu(), minlength=len(targets)).clamp_min(1)
    return loss, entropy, error


def _modules_at(model: nn.Module, depths: Sequence[float]) -> list[nn.Module]:
    """At each share of the model's blocks the first linear layer of the block."""
    modules = {weight.name: weight.module for weight in find_weights(model)}
    first: dict[int, str] = {}
    for submodule in find_submodules(model):
        if submodule.depth is not None and submodule.form == "linear":
            first.setdefault(submodule.depth, submodule.name)
    places = sorted(first)
    if not places:
        return []
    return [modules[first[places[round(depth * (len(places) - 1))]]] for depth in depths]
