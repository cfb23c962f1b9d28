"""Scores of examples, a chunk at a time, by each of the ways there are, with an account of what they cost.

Under several processes each scores its share of a chunk, and all know all scores. Knows nothing of how many are chosen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn

from .._processes import process_count
from ..blueprint import PROJECTION_SIZE
from ..errors import MeasurementError
from ..measure import IGNORED, Influence, LossFunction, measure_influence
from .alignment import Similarity, Target, alignment_scores, gradient_points, rows_of
from .examples import Row, collate
from .features import DEPTHS, Features, model_features
from .pool import Candidate


@dataclass(frozen=True)
class Method:
    """A way to score examples.

    Args:
        measure: what a score is: "random", "length", "loss", "norm", "alignment", "points" or "bm25".
        sign: 1 where the highest are chosen, -1 where the lowest.
        is_predicted: whether it is measured on a few and predicted for the others.
        coreset: how points are chosen, "k_centre" or "facility".
    """

    measure: str
    sign: int = 1
    is_predicted: bool = False
    coreset: str | None = None

    @property
    def uses_model(self) -> bool:
        """Whether the model is asked."""
        return self.measure not in ("random", "length", "bm25")

    @property
    def uses_target(self) -> bool:
        """Whether examples of what is wanted are needed."""
        return self.measure in ("alignment", "bm25")

    @property
    def needs_all(self) -> bool:
        """Whether every example must be known before one is scored or chosen."""
        return self.coreset is not None or self.measure == "bm25"


METHODS: Mapping[str, Method] = {
    "random": Method("random"),
    "predicted_norm": Method("norm", is_predicted=True),
    "predicted_alignment": Method("alignment", is_predicted=True),
    "norm": Method("norm"),
    "norm_low": Method("norm", sign=-1),
    "alignment": Method("alignment"),
    "loss": Method("loss"),
    "loss_low": Method("loss", sign=-1),
    "length": Method("length"),
    "length_short": Method("length", sign=-1),
    "bm25": Method("bm25"),
    "coreset_k_centre": Method("points", coreset="k_centre"),
    "coreset_facility": Method("points", coreset="facility"),
}

Scorer = Callable[[Sequence[Candidate]], np.ndarray]


@dataclass
class Cost:
    """What choosing has cost.

    Args:
        forward_tokens: positions that went through forward passes alone, padding included.
        measured_tokens: positions that went through a measurement's forward and backward pass.
        trained_tokens: positions that adapters were trained on, between two choices.
        parameters: that a token is multiplied with.
        backward: those of them that a backward pass goes through, from the first submodule that counts on.
        seconds: wall-clock time.
    """

    forward_tokens: int = 0
    measured_tokens: int = 0
    trained_tokens: int = 0
    parameters: int = 0
    backward: int = 0
    seconds: float = 0.0

    @property
    def flops(self) -> int:
        """2 for each parameter and token of a forward pass, and 2 more for those that a backward pass goes through, of a
        measurement or a step with adapters: they compute the gradients of activations, but not those of weights, for
        which training all weights takes 2 more. Attention's own products, sketches and the predictor are left out.
        """
        return 2 * self.parameters * self.forward_tokens + self.passes_of(self.measured_tokens + self.trained_tokens)

    def passes_of(self, tokens: int) -> int:
        """FLOPs of a forward and backward pass over so many positions."""
        return 2 * (self.parameters + self.backward) * tokens

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "seconds": self.seconds,
            "forward_tokens": self.forward_tokens,
            "measured_tokens": self.measured_tokens,
            "trained_tokens": self.trained_tokens,
            "parameters": self.parameters,
            "backward_parameters": self.backward,
            "flops": self.flops,
        }


@dataclass
class Work:
    """A model at work on examples.

    Args:
        model: as for `measure_influence`.
        submodules: names that count; None for all.
        batch_size: rows of a batch.
        pad_token_id: what fills a batch.
        seed: of sketches, projections and keys.
        loss_fn: `loss_fn(model, batch)` → losses (B,).
        cost: what has been spent.
    """

    model: nn.Module
    submodules: tuple[str, ...] | None
    batch_size: int
    pad_token_id: int
    seed: int
    loss_fn: LossFunction | None
    cost: Cost = field(default_factory=Cost)

    def influence(self, rows: Sequence[Row], projections: bool) -> Influence:
        """One measurement of these rows, by this process."""
        found = measure_influence(
            self.model,
            [collate(part, self.pad_token_id) for part in _parts(rows, self.batch_size)],
            projection_size=PROJECTION_SIZE if projections else 0,
            submodules=self.submodules,
            loss_fn=self.loss_fn,
            seed=self.seed,
            progress=False,
            reduce=False,
        )
        self.cost.measured_tokens += found.tokens
        return found

    def features(self, rows: Sequence[Row], depths: Sequence[float] = DEPTHS) -> Features:
        """One forward pass over these rows, by this process."""
        batches = (collate(part, self.pad_token_id) for part in _parts(rows, self.batch_size))
        found = model_features(self.model, batches, depths=depths, loss_fn=self.loss_fn, seed=self.seed)
        self.cost.forward_tokens += found.tokens
        return found

    def norms(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """(n,) J(z) over the submodules that count."""
        found = self.influence([one.row for one in candidates], projections=False)
        rows = rows_of(found, self.submodules)
        return found.norms[rows].double().square().sum(dim=0).sqrt().numpy()

    def points(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """(n, m) directions of gradients."""
        return gradient_points(self.influence([one.row for one in candidates], projections=True), self.submodules)

    def losses(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """(n,) mean losses of targets."""
        return self.features([one.row for one in candidates], depths=()).losses

    def aligned_with(self, target: Target, similarity: Similarity) -> Scorer:
        """A scorer by alignment."""

        def score(candidates: Sequence[Candidate]) -> np.ndarray:
            influence = self.influence([one.row for one in candidates], projections=True)
            return alignment_scores(influence, target, similarity)

        return score

    def together(self, score: Scorer, candidates: Sequence[Candidate]) -> np.ndarray:
        """Scores of some candidates, of which each process scores its share; the same on all.

        Rows are taken in the order of their lengths, so that batches hold little padding. Shares are of one size, with
        rows repeated where they would not be, so that processes stay in step on a model that is sharded over them.

        Raises:
            MeasurementError: if another process failed, or was given other examples; or for a score that is not finite.
        """
        order = sorted(range(len(candidates)), key=lambda i: len(candidates[i].row["input_ids"]))
        count = process_count()
        rank = dist.get_rank() if count > 1 else 0
        own = order[rank::count]
        size = -(-len(order) // count)
        padded = own + [order[0]] * (size - len(own))
        try:
            found = score([candidates[i] for i in padded])[: len(own)]
        except Exception as error:
            if count > 1:
                _exchange((f"{type(error).__name__}: {error}", "", None))
            raise
        if count == 1:
            said = [(None, "", found)]
        else:
            said = _exchange((None, _digest(candidates), found))
            _check(said)
        values = np.empty((len(order), *found.shape[1:]))
        for other, (_, _, theirs) in enumerate(said):
            values[order[other::count]] = theirs
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if len(bad):
            raise MeasurementError(
                f"The score of example {candidates[bad[0]].index} is not a finite number, and so for {len(bad)} of "
                f"{len(values)} examples. Look for NaN in the model's weights, or leave them out."
            )
        return values

    def total_cost(self) -> Cost:
        """What all processes have spent, in the wall-clock time of this one."""
        said = _exchange(self.cost) if process_count() > 1 else [self.cost]
        return Cost(
            forward_tokens=sum(one.forward_tokens for one in said),
            measured_tokens=sum(one.measured_tokens for one in said),
            trained_tokens=sum(one.trained_tokens for one in said),
            parameters=self.cost.parameters,
            backward=self.cost.backward,
            seconds=self.cost.seconds,
        )


def lengths(candidates: Sequence[Candidate]) -> np.ndarray:
    """(n,) numbers of target tokens."""
    return np.array([sum(label != IGNORED for label in one.row["labels"]) for one in candidates], dtype=float)


def random_keys(seed: int) -> Scorer:
    """A uniform number for each example, that depends on the seed and its position alone: the highest are a random
    sample, of a stream too.
    """
    return lambda candidates: np.array([np.random.default_rng([seed, one.index]).random() for one in candidates])


def _parts(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _digest(candidates: Sequence[Candidate]) -> str:
    return hashlib.sha256(repr([(one.index, one.row["input_ids"]) for one in candidates]).encode()).hexdigest()


def _exchange(value: Any) -> list[Any]:
    said: list[Any] = [None] * process_count()
    dist.all_gather_object(said, value)
    return said


def _check(said: Sequence[tuple[str | None, str, Any]]) -> None:
    failed = [(rank, error) for rank, (error, _, _) in enumerate(said) if error is not None]
    if failed:
        rank, error = failed[0]
        raise MeasurementError(f"Process {rank} of {len(said)} failed, and the others stop with it: {error}")
    if len({digest for _, digest, _ in said}) > 1:
        raise MeasurementError(
            "The processes were given different examples to choose from. Give each the whole data set, in one order; "
            "select_examples divides the work itself."
        )
