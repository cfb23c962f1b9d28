"""From cheap features of examples to their scores: regressions that learn from a few measured ones, the best chosen by
cross-validation, with an honest estimate of how well its order holds on others.

The paper's gradient prediction network f_φ (Algorithm 2, line 3). Knows nothing of models, of texts or of what a score is.
scikit-learn is an extra: `pip install peft-blueprint[data]`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import BlueprintError


MEASURED = 16  # the fewest examples to learn from
FOLDS = 5

Estimator = Any  # of scikit-learn, which is imported only where it is needed


@dataclass(frozen=True)
class Predictor:
    """A regression, and how well it did on examples that it had not seen.

    Args:
        name: of the candidate that was chosen, as "ridge on scalars".
        rank_correlation: Spearman's, between measured scores and predictions of folds that were held out, where for each
            fold the candidate was chosen by the other folds alone: so the choice among candidates flatters it hardly.
        interval: 95 % percentile bootstrap interval of that, over the examples.
        candidates: out-of-fold rank correlation of each candidate.
        examples: how many were learnt from.
        is_logarithmic: whether it was the logarithm of scores that was fitted.
    """

    name: str
    rank_correlation: float
    interval: tuple[float, float]
    candidates: Mapping[str, float]
    examples: int
    is_logarithmic: bool
    _estimator: Estimator = field(repr=False, compare=False)
    _columns: tuple[int, ...] = field(repr=False, compare=False)
    _width: int = field(repr=False, compare=False)

    def predict(self, features: ArrayLike) -> np.ndarray:
        """Scores of examples from their features. (n, f) → (n,)

        Raises:
            BlueprintError: for features of another width than it learnt from, or not finite.
        """
        matrix = _matrix(features)
        if matrix.shape[1] != self._width:
            raise BlueprintError(
                f"The predictor learnt from {self._width} features and is given {matrix.shape[1]}: compute them alike."
            )
        if not len(matrix):
            return np.empty(0)
        found = np.asarray(self._estimator.predict(matrix[:, self._columns]), dtype=float)
        return np.exp(found) if self.is_logarithmic else found

    def to_dict(self) -> dict[str, Any]:
        """What a report says of it, as a JSON object."""
        return {
            "name": self.name,
            "rank_correlation": self.rank_correlation,
            "interval": list(self.interval),
            "candidates": dict(self.candidates),
            "measured": self.examples,
        }


def fit_predictor(
    features: ArrayLike,
    scores: ArrayLike,
    *,
    scalars: Sequence[int] | None = None,
    logarithmic: bool = True,
    folds: int = FOLDS,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Predictor:
    """Learn to predict scores, with the regression whose out-of-fold predictions rank them best.

    Candidates are a ridge regression, boosted trees and a small network on all features, and the first two also on the
    `scalars` alone, which a few dozen examples can support. Features are brought to mean 0 and variance 1.

    Args:
        features: (n, f), cheap numbers of n measured examples.
        scores: (n,), as J(z).
        scalars: columns that stand for something by themselves, beside those of a projection; all by default.
        logarithmic: fit the logarithm, as suits positive scores with a heavy tail.
        folds: of the cross-validation.
        bootstrap: resamples behind the interval.
        seed: of folds, trees, network and bootstrap; the same seed gives the same predictor.

    Raises:
        BlueprintError: without scikit-learn, for fewer than 16 examples, for shapes that do not pair, for numbers that
            are not finite, or for scores that are not positive and have no logarithm.
    """
    matrix, measured = _matrix(features), np.asarray(scores, dtype=float)
    _check(matrix, measured, logarithmic, folds)
    targets = np.log(measured) if logarithmic else measured
    every = tuple(range(matrix.shape[1]))
    some = every if scalars is None else tuple(scalars)
    candidates = _candidates(seed)
    choices = {f"{name} on all features": (build, every) for name, build in candidates.items()}
    if some != every:
        choices |= {f"{name} on scalars": (candidates[name], some) for name in ("ridge", "boosted trees")}

    groups = np.random.default_rng(seed).permutation(len(targets)) % folds
    outside = {
        name: _out_of_fold(build, matrix[:, columns], targets, groups) for name, (build, columns) in choices.items()
    }
    honest = np.empty_like(targets)
    for fold in range(folds):
        others, own = groups != fold, groups == fold
        best = _best({name: spearman(found[others], targets[others]) for name, found in outside.items()})
        honest[own] = outside[best][own]
    correlations = {name: spearman(found, targets) for name, found in outside.items()}
    best = _best(correlations)
    build, columns = choices[best]
    return Predictor(
        name=best,
        rank_correlation=spearman(honest, targets),
        interval=_interval(honest, targets, bootstrap, seed),
        candidates=correlations,
        examples=len(targets),
        is_logarithmic=logarithmic,
        _estimator=_fitted(build, matrix[:, columns], targets),
        _columns=columns,
        _width=matrix.shape[1],
    )


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation, with mean ranks for ties; 0 where either is constant, and so says nothing."""
    return float(_spearman(np.asarray(first, dtype=float)[None], np.asarray(second, dtype=float)[None])[0])


def _spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Row by row. (k, n), (k, n) → (k,)"""
    from scipy.stats import rankdata

    a, b = (rankdata(values, axis=1) - (values.shape[1] + 1) / 2 for values in (first, second))
    sizes = np.sqrt(np.square(a).sum(axis=1) * np.square(b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), sizes, out=np.zeros(len(a)), where=sizes > 0)


def _candidates(seed: int) -> dict[str, Callable[[], Estimator]]:
    try:
        from sklearn.ensemble import GradientBoostingRegressor
        from sklearn.linear_model import RidgeCV
        from sklearn.neural_network import MLPRegressor
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise BlueprintError("Predicting scores needs scikit-learn: pip install 'peft-blueprint[data]'.") from error

    return {
        "ridge": lambda: make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(-2, 4, 13))),
        "boosted trees": lambda: GradientBoostingRegressor(
            n_estimators=80, max_depth=2, learning_rate=0.1, subsample=0.7, max_features="sqrt", random_state=seed
        ),
        "network": lambda: make_pipeline(
            StandardScaler(),
            MLPRegressor(hidden_layer_sizes=(16,), alpha=3.0, solver="lbfgs", max_iter=100, random_state=seed),
        ),
    }


def _fitted(build: Callable[[], Estimator], features: np.ndarray, targets: np.ndarray) -> Estimator:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 100 steps are what the network is given
        return build().fit(features, targets)


def _out_of_fold(
    build: Callable[[], Estimator], features: np.ndarray, targets: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """(n,) predictions, each by a fit to the other folds."""
    found = np.empty_like(targets)
    for fold in np.unique(groups):
        own = groups == fold
        found[own] = _fitted(build, features[~own], targets[~own]).predict(features[own])
    return found


def _best(correlations: Mapping[str, float]) -> str:
    """The name of the largest; of equals the first."""
    return max(correlations, key=lambda name: correlations[name])


def _interval(found: np.ndarray, targets: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    draws = np.random.default_rng(seed).integers(len(targets), size=(resamples, len(targets)))
    low, high = np.percentile(_spearman(found[draws], targets[draws]), [2.5, 97.5])
    return float(low), float(high)


def _matrix(features: ArrayLike) -> np.ndarray:
    matrix = np.asarray(features, dtype=float)
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise BlueprintError(
            f"Features are a matrix (examples, features) of finite numbers, not of shape {matrix.shape} with "
            f"{int((~np.isfinite(matrix)).sum())} that are not finite. Look for NaN in the model's weights or in the data."
        )
    return matrix


def _check(matrix: np.ndarray, scores: np.ndarray, logarithmic: bool, folds: int) -> None:
    if scores.shape != (len(matrix),):
        raise BlueprintError(
            f"{len(matrix)} rows of features and scores of shape {scores.shape} do not pair: one each."
        )
    if len(scores) < MEASURED:
        raise BlueprintError(
            f"{len(scores)} measured examples are too few to learn from: measure at least {MEASURED}."
        )
    if not np.isfinite(scores).all() or (logarithmic and (scores <= 0).any()):
        raise BlueprintError(
            f"Of {len(scores)} scores {int((~np.isfinite(scores)).sum())} are not finite and "
            f"{int((scores <= 0).sum())} not positive: "
            + (
                "measure them again, or fit them as they are with logarithmic=False."
                if logarithmic
                else "leave them out."
            )
        )
    if not 2 <= folds <= len(scores):
        raise BlueprintError(f"folds={folds}: give from 2 to the number of examples, {len(scores)}.")
