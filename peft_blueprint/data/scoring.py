"""Score examples with a model, shared among processes, and count the cost."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from .._processes import of_every_process, process_count, process_rank
from ..errors import MeasurementError
from ..measure import IGNORED, PROJECTION_SIZE, Checks, Influence, LossFunction, collate, measure_influence
from .alignment import find_rows, gradient_points
from .examples import Candidate
from .features import DEPTHS, MODEL_SCALARS, model_features
from .shallow import first_layers


ScoreFunction = Callable[[Sequence[Candidate]], np.ndarray]


@dataclass
class Cost:
    """Cost of a selection.

    Args:
        forward_tokens: positions of forward passes alone, padding included.
        measured_tokens: positions of a measurement's forward and backward passes.
        trained_tokens: positions of training steps between two choices.
        parameters: that multiply each token in a forward pass.
        backward_parameters: those of them that a backward pass runs through, down to the first submodule that counts.
        seconds: wall-clock time.
    """

    forward_tokens: int = 0
    measured_tokens: int = 0
    trained_tokens: int = 0
    parameters: int = 0
    backward_parameters: int = 0
    seconds: float = 0.0

    @property
    def flops(self) -> int:
        """FLOPs of all passes.

        2 for each parameter and token of a forward pass, and 2 more for those that a backward pass runs through. It
        computes the gradients of activations alone; those of all weights would take 2 more. Attention's products,
        sketches and the predictor are left out.
        """
        return 2 * self.parameters * self.forward_tokens + self.backward_flops(
            self.measured_tokens + self.trained_tokens
        )

    def backward_flops(self, tokens: int) -> int:
        """Return the FLOPs of a forward and backward pass over this many positions."""
        return 2 * (self.parameters + self.backward_parameters) * tokens

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-compatible data."""
        return asdict(self) | {"flops": self.flops}


@dataclass
class ExampleScorer:
    """Run a model on candidates and count the cost.

    Args:
        model: as for `measure_influence`.
        submodules: names of those that count; None for all.
        batch_size: examples in a batch.
        pad_token_id: filler of a batch.
        seed: of projections and random scores.
        loss_fn: `loss_fn(model, batch)` → losses (B,).
        cost: spent so far.
        checks: of the model, made on the first batch that is scored.
        layers: score with the model's first layers alone, see `first_layers`; None for the whole model.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> scorer = ExampleScorer(tiny_llama(), None, batch_size=4, pad_token_id=0, seed=0, loss_fn=None)
        >>> candidate = Candidate(0, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, "", {})
        >>> scorer.norms([candidate]).shape, scorer.cost.measured_tokens
        ((1,), 3)
    """

    model: nn.Module
    submodules: tuple[str, ...] | None
    batch_size: int
    pad_token_id: int
    seed: int
    loss_fn: LossFunction | None
    cost: Cost = field(default_factory=Cost)
    checks: Checks = field(default_factory=Checks)
    layers: int | None = None

    def cut_model(self) -> AbstractContextManager[nn.Module]:
        """Return a context in which the model has the layers alone that score."""
        return nullcontext(self.model) if self.layers is None else first_layers(self.model, self.layers)

    def influence(self, candidates: Sequence[Candidate], projections: bool) -> Influence:
        """Measure candidates in this process."""
        with self.cut_model() as model:
            found = measure_influence(
                model,
                self.batches(candidates),
                projection_size=PROJECTION_SIZE if projections else 0,
                submodules=self.submodules,
                loss_fn=self.loss_fn,
                seed=self.seed,
                progress=False,
                reduce=False,
                checks=self.checks,
            )
        self.cost.measured_tokens += found.tokens
        return found

    def features(self, candidates: Sequence[Candidate], depths: Sequence[float] = DEPTHS) -> np.ndarray:
        """Compute features by one forward pass in this process, see `model_features`."""
        batches = self.batches(candidates)
        with self.cut_model() as model:
            found, tokens = model_features(
                model, batches, depths=depths, loss_fn=self.loss_fn, seed=self.seed, checks=self.checks
            )
        self.cost.forward_tokens += tokens
        return found

    def norms(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Return gradient norms J(z) over the submodules that count, (n,)."""
        found = self.influence(candidates, projections=False)
        rows = find_rows(found, self.submodules)
        return found.norms[rows].double().square().sum(dim=0).sqrt().numpy()

    def points(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Return directions of gradients, (n, m)."""
        return gradient_points(self.influence(candidates, projections=True), self.submodules)

    def losses(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Return mean losses over targets, (n,)."""
        return self.features(candidates, depths=())[:, MODEL_SCALARS.index("loss")]

    def distribute(self, score: ScoreFunction, candidates: Sequence[Candidate]) -> np.ndarray:
        """Score candidates. Each process takes a share of them and gets all scores.

        Candidates are sorted by length, so that batches hold little padding. Shares are padded to one size by repetition,
        so that processes stay in step on a sharded model.

        Raises:
            MeasurementError: if another process failed or was given other examples, or a score is not finite.
        """
        order = sorted(range(len(candidates)), key=lambda i: len(candidates[i].row["input_ids"]))
        count = process_count()
        rank = process_rank()
        own = order[rank::count]
        padded = own + order[:1] * (-(-len(order) // count) - len(own))
        try:
            found = score([candidates[i] for i in padded])[: len(own)]
        except Exception as error:
            of_every_process((f"{type(error).__name__}: {error}", "", None))
            raise
        shares = of_every_process((None, _digest(candidates) if count > 1 else "", found))
        _check_shares(shares)
        values = np.empty((len(order), *found.shape[1:]))
        for other, (_, _, theirs) in enumerate(shares):
            values[order[other::count]] = theirs
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if len(bad):
            raise MeasurementError(
                f"Scores must be finite; {len(bad)} of {len(values)} are not, the first of example "
                f"{candidates[bad[0]].index}. Look for NaN in the model's weights, or leave the examples out."
            )
        return values

    def total_cost(self) -> Cost:
        """Return the tokens of all processes, and the wall-clock time of this one."""
        costs = of_every_process(self.cost)
        counts = ("forward_tokens", "measured_tokens", "trained_tokens")
        return replace(self.cost, **{name: sum(getattr(cost, name) for cost in costs) for name in counts})

    def batches(self, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
        """Collate candidates in their order."""
        parts = (candidates[i : i + self.batch_size] for i in range(0, len(candidates), self.batch_size))
        return [collate([one.row for one in part], self.pad_token_id) for part in parts]


def count_targets(candidates: Sequence[Candidate]) -> np.ndarray:
    """Return numbers of target tokens, (n,)."""
    return np.array([sum(label != IGNORED for label in one.row["labels"]) for one in candidates], dtype=float)


def random_scores(candidates: Sequence[Candidate], seed: int) -> np.ndarray:
    """Draw a uniform score for each example from the seed and its position alone, so that a stream is sampled too."""
    return np.array([np.random.default_rng([seed, one.index]).random() for one in candidates])


def _digest(candidates: Sequence[Candidate]) -> str:
    return hashlib.sha256(repr([(one.index, one.row["input_ids"]) for one in candidates]).encode()).hexdigest()


def _check_shares(shares: Sequence[tuple[str | None, str, Any]]) -> None:
    for rank, (error, _, _) in enumerate(shares):
        if error is not None:
            raise MeasurementError(f"Process {rank} of {len(shares)} failed, and the others stop with it: {error}")
    if len({digest for _, digest, _ in shares}) > 1:
        raise MeasurementError(
            "The processes have different examples to choose from. Give each the whole dataset in the same order; "
            "select_examples divides the work itself."
        )
