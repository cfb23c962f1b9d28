"""What each method of choosing examples does: the scorer it takes, rounds of choosing and training, words in common.

Knows nothing of data sets' forms, of files, or of what is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from .alignment import Precondition, Similarity, Target, target_of
from .brief_training import Train, given_back, train_briefly, with_adapters
from .features import token_features
from .pool import Candidate
from .resume import Progress
from .scan import Picked, Scan, Scored
from .scoring import Method, Scorer, lengths, random_keys
from .text_similarity import bm25


ITERATIVE = "iterative"

FeatureKind = Literal["model", "tokens"]

_SCALARS = {"model": 6, "tokens": 4}


@dataclass
class Maker:
    """Makes the scorer of a method, as often as it is asked, for the model as it then is."""

    scan: Scan
    method: Method
    aims: list[Candidate]
    similarity: Similarity
    precondition: Precondition
    features: FeatureKind
    small: int

    def scorer(self) -> Scorer:
        """Of the model as it is now."""
        work = self.scan.work
        measure = self.method.measure
        if measure == "random":
            return random_keys(work.seed)
        if measure == "alignment":
            score = work.aligned_with(self._target(), self.similarity)
        else:
            score = {"length": lengths, "loss": work.losses, "norm": work.norms, "points": work.points}[measure]
        if not self.method.is_predicted:
            return score
        is_norm = measure == "norm"
        featurize, scalars = self._features()
        return self.scan.predicting(score, featurize, scalars, self.small, is_norm, work.seed)

    def _features(self) -> tuple[Callable[[Sequence[Candidate]], np.ndarray], int]:
        work = self.scan.work
        if self.features == "tokens":
            return lambda cs: token_features([one.row for one in cs], seed=work.seed).values, _SCALARS["tokens"]
        return lambda cs: work.features([one.row for one in cs]).values, _SCALARS["model"]

    def _target(self) -> Target:
        """Measured once, also over several runs."""
        arrays, work = self.scan.progress.arrays, self.scan.work
        if "target" not in arrays:
            influence = work.influence([one.row for one in self.aims], projections=True)
            found = target_of(influence, work.submodules, self.precondition)
            arrays["target"], arrays["target_weights"] = found.directions.numpy(), found.weights.numpy()
            arrays["target_norm"] = np.array(found.norm)
            arrays["target_rows"] = np.array(found.submodules)
        return Target(
            submodules=tuple(arrays["target_rows"].tolist()),
            directions=torch.from_numpy(arrays["target"]),
            weights=torch.from_numpy(arrays["target_weights"]),
            norm=float(arrays["target_norm"]),
            seed=work.seed,
            examples=len(self.aims),
        )


def iterate(
    maker: Maker,
    model: nn.Module,
    count: int,
    deduplicate: bool,
    iterations: int,
    train: Train | None,
    steps: int,
) -> tuple[Scored, Picked]:
    """Choose, train on the choice, choose again in the state so reached; the model is given back as it was.

    Args:
        maker: of the scorer of every round.
        model: to train.
        count: how many to choose.
        deduplicate: whether to pass over near-duplicates.
        iterations: rounds of choosing; between them is training.
        train: `train(model, rows)`; None for a few steps of LoRA.
        steps: of those.

    Returns:
        The last round's scores and choice.
    """
    scan, work = maker.scan, maker.scan.work
    state = given_back(model) if train is not None else with_adapters(model, work.submodules, work.seed)
    with state as trained:
        work.model = model if trained is None else trained
        try:
            for step in range(iterations):
                scan.progress, scan.known = Progress(None, {}), {}
                scored = scan.every_score(maker.scorer())
                picked = scan.pick(scored, maker.method, count, deduplicate, work.seed)
                if step == iterations - 1:
                    break
                rows = [scan.candidate(index).row for index in sorted(picked.indices)]
                if train is not None:
                    train(work.model, rows)
                    if not any("not counted" in said for said in scan.fallbacks):
                        scan.fallbacks.append("what train(model, rows) cost is not counted")
                    continue
                work.cost.trained_tokens += train_briefly(
                    work.model,
                    rows,
                    steps=steps,
                    batch_size=work.batch_size,
                    pad_token_id=work.pad_token_id,
                    loss_fn=work.loss_fn,
                    seed=work.seed + step,
                )
        finally:
            work.model = model
    scan.fallbacks[:] = list(dict.fromkeys(scan.fallbacks))
    return scored, picked


def lexical_scores(scan: Scan, aims: Sequence[Candidate]) -> Scored:
    """BM25 of every example against the target's: of their words, or of token ids where either came as such.

    Raises:
        BlueprintError: if no example has a target.
    """
    progress, found = scan.progress, []
    progress.notes |= {"without_targets": 0, "tokens": 0}
    for index, example in scan.pool:
        one = scan.pool.candidate(index, example)
        progress.position = index + 1
        if one is None:
            progress.notes["without_targets"] += 1
        else:
            found.append(one)
            progress.notes["tokens"] += len(one.row["input_ids"])
    scan.require(bool(found))
    are_words = all(isinstance(one.text, str) for one in (*found, *aims))
    queries, documents = ([one.text if are_words else one.row["input_ids"] for one in of] for of in (aims, found))
    scores = bm25(queries, documents)
    if not scores.any():
        scan.note("no example has a word in common with the target: all are alike to bm25, and the first were chosen")
    return Scored(np.array([one.index for one in found]), scores)
