"""Scores are predicted from cheap features, with an honest estimate of how well. Run: pytest tests/data/test_predictor.py"""

import numpy as np
import pytest
from scipy.stats import spearmanr

from peft_blueprint.compare.drift import spearman
from peft_blueprint.data.predictor import fit_predictor
from peft_blueprint.errors import BlueprintError


def make_data(n, width=6, noise=0.1, seed=0, shape=lambda x: x):
    """Features, and positive scores that depend on the first of them."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(n, width)) * 10 ** np.arange(width)  # of very different scales
    return features, np.exp(shape(features[:, 0]) + noise * generator.normal(size=n))


@pytest.mark.parametrize("n", [16, 64, 256])
def test_a_simple_relation_is_learned_and_generalises(n):
    """From 16 examples, at any scale of features; predictions of positive scores are positive."""
    predictor = fit_predictor(*make_data(n), bootstrap=50)
    others, truth = make_data(300, seed=1)
    predicted = predictor.predict(others)
    assert (predicted > 0).all()
    assert spearman(predicted, truth) > (0.7 if n == 16 else 0.9)
    assert predictor.examples == n and predictor.interval[0] <= predictor.rank_correlation <= predictor.interval[1]


def test_a_nonlinear_relation_is_left_to_trees_or_a_network():
    """Ridge regression cannot fit a bump."""
    predictor = fit_predictor(*make_data(200, shape=lambda x: 3 * np.cos(2 * x)), bootstrap=20)
    assert "ridge" not in predictor.name
    assert predictor.candidates[predictor.name] > predictor.candidates["ridge on all features"] + 0.3


def test_scalars_alone_are_tried_where_projections_are_noise():
    """24 examples cannot support 300 columns of noise."""
    features, scores = make_data(24, width=1)
    wide = np.concatenate([features, np.random.default_rng(5).normal(size=(24, 300))], axis=1)
    predictor = fit_predictor(wide, scores, scalars=[0], bootstrap=20)
    assert predictor.name.endswith("on scalars")
    assert len(predictor.candidates) == 5


def test_the_held_out_correlation_is_zero_for_noise():
    """Choosing the best of several candidates on the same folds would find order in noise; the mean over draws here is
    about zero.
    """
    found = []
    for seed in range(4):
        features, scores = np.random.default_rng(seed).normal(size=(2, 40, 3))
        found.append(fit_predictor(features, np.exp(scores[:, 0]), bootstrap=2, seed=seed).rank_correlation)
    assert abs(np.mean(found)) < 0.2


def test_signed_scores_are_fitted_as_they_are():
    """Alignments have no logarithm."""
    features, scores = make_data(64)
    predictor = fit_predictor(features, np.log(scores), logarithmic=False, bootstrap=20)
    assert (predictor.predict(features) < 0).any() and predictor.rank_correlation > 0.9


def test_the_same_seed_gives_the_same_predictor():
    """It fixes folds, trees and network."""
    features, scores = make_data(32, noise=1.0)
    one, other = (fit_predictor(features, scores, bootstrap=20, seed=3) for _ in range(2))
    assert one.to_dict() == other.to_dict()
    assert np.array_equal(one.predict(features), other.predict(features))


def test_constant_scores_give_correlation_zero():
    """And not NaN."""
    predictor = fit_predictor(make_data(16)[0], np.ones(16), bootstrap=5)
    assert predictor.rank_correlation == 0 and predictor.interval == (0, 0)


def test_the_rank_correlation_is_spearmans():
    """With ties."""
    a, b = np.random.default_rng(0).integers(5, size=(2, 50))
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)


@pytest.mark.parametrize(
    ("features", "scores", "message"),
    [
        (np.ones((8, 2)), np.ones(8), "needs at least 16 measured examples, got 8"),
        (np.ones((20, 2)), np.ones(19), r"must have shape \(20,\)"),
        (np.ones((20, 2)), np.zeros(20), "must be positive, 20 of 20 are not"),
        (np.ones((20, 2)), np.full(20, np.nan), "must be finite; 20 of 20 are not"),
        (np.full((20, 2), np.inf), np.ones(20), "Features must be finite"),
        (np.ones(20), np.ones(20), "Features must be finite numbers of shape"),
    ],
)
def test_bad_features_and_scores_are_refused(features, scores, message):
    """Too few, of different lengths, not finite, or without a logarithm."""
    with pytest.raises(BlueprintError, match=message):
        fit_predictor(features, scores)


def test_features_of_another_width_are_refused():
    """The error names both widths."""
    predictor = fit_predictor(*make_data(16), bootstrap=2)
    with pytest.raises(BlueprintError, match="6 features, got 2"):
        predictor.predict(np.ones((3, 2)))
    with pytest.raises(BlueprintError, match="folds must be from 2"):
        fit_predictor(*make_data(16), folds=1)
