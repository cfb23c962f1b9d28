"""Predict scores from cheap features with the regression that ranks best in cross-validation.

The paper's gradient prediction network f_φ (Algorithm 2, line 3). Needs scikit-learn, an extra.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..compare import spearman
from ..errors import BlueprintError
from .options import MIN_MEASURED


FOLDS = 5

Estimator = Any  # of scikit-learn


@dataclass(frozen=True)
class Predictor:
    """A fitted regression, and how well it ranks examples that it has not seen.

    Args:
        name: of the candidate chosen, as "ridge on scalars".
        rank_correlation: Spearman's, between measured scores and held-out predictions. For each fold the candidate is
            chosen by the other folds alone, so that the choice among candidates hardly flatters it.
        interval: 95 % percentile bootstrap interval of `rank_correlation`, over examples.
        candidates: out-of-fold rank correlation of each candidate.
        examples: number of examples learned from.
        is_logarithmic: whether the logarithm of the scores was fitted.
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
        """Predict scores from features. (n, f) → (n,)

        Raises:
            BlueprintError: for features of another width than the predictor learned from, or not finite.
        """
        matrix = _check_features(features)
        if matrix.shape[1] != self._width:
            raise BlueprintError(f"The predictor learned from {self._width} features, got {matrix.shape[1]}.")
        if not len(matrix):
            return np.empty(0)
        found = np.asarray(self._estimator.predict(matrix[:, self._columns]), dtype=float)
        return np.exp(found) if self.is_logarithmic else found

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-compatible data for a report."""
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
    """Fit the regression whose out-of-fold predictions rank the scores best.

    Candidates are ridge regression, boosted trees and a small network on all features, and the first two also on the
    `scalars` alone, which a few dozen examples can support. Features are standardised.

    Args:
        features: (n, f), cheap features of n measured examples.
        scores: (n,), such as gradient norms J(z).
        scalars: columns with a meaning of their own, as opposed to projections; all by default.
        logarithmic: fit the logarithm, as suits positive scores with a heavy tail.
        folds: of the cross-validation.
        bootstrap: resamples behind the interval.
        seed: of folds, trees, network and bootstrap.

    Raises:
        BlueprintError: without scikit-learn, for fewer than 16 examples, for shapes that differ, or for scores that are
            not finite, or not positive with `logarithmic`.

    Example:
        >>> features = np.random.default_rng(0).normal(size=(40, 3))
        >>> fit_predictor(features, np.exp(features[:, 0])).rank_correlation > 0.9
        True
    """
    matrix, measured = _check_features(features), np.asarray(scores, dtype=float)
    _check_scores(matrix, measured, logarithmic, folds)
    targets = np.log(measured) if logarithmic else measured
    every = tuple(range(matrix.shape[1]))
    meaningful = every if scalars is None else tuple(scalars)
    estimators = _candidates(seed)
    choices = {f"{name} on all features": (one, every) for name, one in estimators.items()}
    if meaningful != every:
        choices |= {f"{name} on scalars": (estimators[name], meaningful) for name in ("ridge", "boosted trees")}

    groups = np.random.default_rng(seed).permutation(len(targets)) % folds
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lbfgs failed to converge")  # the network takes 100 steps on purpose
        held_out = {
            name: _cross_predict(one, matrix[:, columns], targets, groups) for name, (one, columns) in choices.items()
        }
        correlations = {name: float(spearman(found, targets)) for name, found in held_out.items()}
        best = max(correlations, key=correlations.__getitem__)
        estimator, columns = choices[best]
        estimator.fit(matrix[:, columns], targets)
    honest = np.empty_like(targets)
    for fold in range(folds):
        others, own = groups != fold, groups == fold
        by_others = {name: spearman(found[others], targets[others]) for name, found in held_out.items()}
        honest[own] = held_out[max(by_others, key=by_others.__getitem__)][own]
    draws = np.random.default_rng(seed).integers(len(targets), size=(bootstrap, len(targets)))
    low, high = np.percentile(spearman(honest[draws], targets[draws]), [2.5, 97.5])
    return Predictor(
        name=best,
        rank_correlation=float(spearman(honest, targets)),
        interval=(float(low), float(high)),
        candidates=correlations,
        examples=len(targets),
        is_logarithmic=logarithmic,
        _estimator=estimator,
        _columns=columns,
        _width=matrix.shape[1],
    )


def _candidates(seed: int) -> dict[str, Estimator]:
    try:
        from sklearn.ensemble import GradientBoostingRegressor
        from sklearn.linear_model import RidgeCV
        from sklearn.neural_network import MLPRegressor
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise BlueprintError("Predicting scores needs scikit-learn: pip install 'peft-blueprint[data]'.") from error

    return {
        "ridge": make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(-2, 4, 13))),
        "boosted trees": GradientBoostingRegressor(
            n_estimators=80, max_depth=2, learning_rate=0.1, subsample=0.7, max_features="sqrt", random_state=seed
        ),
        "network": make_pipeline(
            StandardScaler(),
            MLPRegressor(hidden_layer_sizes=(16,), alpha=3.0, solver="lbfgs", max_iter=100, random_state=seed),
        ),
    }


def _cross_predict(estimator: Estimator, features: np.ndarray, targets: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Predict each fold by a fit to the others, (n,)."""
    from sklearn.model_selection import PredefinedSplit, cross_val_predict

    return cross_val_predict(estimator, features, targets, cv=PredefinedSplit(groups))


def _check_features(features: ArrayLike) -> np.ndarray:
    matrix = np.asarray(features, dtype=float)
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise BlueprintError(
            f"Features must be finite numbers of shape (examples, features), got shape {matrix.shape} with "
            f"{int((~np.isfinite(matrix)).sum())} not finite. Look for NaN in the model's weights or the data."
        )
    return matrix


def _check_scores(matrix: np.ndarray, scores: np.ndarray, logarithmic: bool, folds: int) -> None:
    n, infinite, low = len(scores), int((~np.isfinite(scores)).sum()), int((scores <= 0).sum())
    refusals = (
        (scores.shape != (len(matrix),), f"scores must have shape ({len(matrix)},), got {scores.shape}."),
        (n < MIN_MEASURED, f"A predictor needs at least {MIN_MEASURED} measured examples, got {n}."),
        (infinite, f"scores must be finite; {infinite} of {n} are not."),
        (logarithmic and low, f"scores must be positive, {low} of {n} are not. Use logarithmic=False."),
        (not 2 <= folds <= n, f"folds must be from 2 to the number of examples, {n}, got {folds}."),
    )
    for is_wrong, message in refusals:
        if is_wrong:
            raise BlueprintError(message)
