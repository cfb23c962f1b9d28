"""The share of the data with the most gain per cost, q*. Run: pytest tests/data/test_share.py"""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_blueprint.blueprint import q_star
from peft_blueprint.data import SelectionOptions, best_data_share
from peft_blueprint.errors import BlueprintError
from peft_blueprint.measure import parameters_per_token
from tests.choosing import choose, make_rows, model


@given(
    scores=st.lists(st.floats(0.01, 100), min_size=1, max_size=30),
    scoring=st.floats(0.01, 3),
    epochs=st.integers(1, 5),
)
def test_no_other_number_of_examples_gives_more_per_cost(scores, scoring, epochs):
    """Of scoring all and training on the highest."""
    found = best_data_share(scores, scoring, epochs)
    ranked, n = sorted(scores, reverse=True), len(scores)
    values = [sum(ranked[:m]) / sum(scores) / (scoring + epochs * m / n) for m in range(1, n + 1)]
    assert values[found.count - 1] == pytest.approx(max(values)) and found.q == pytest.approx(found.count / n)
    assert found.ratio == pytest.approx(values[found.count - 1] * epochs)


def test_scores_of_a_power_law_have_the_q_of_eq_31():
    """J such that the top q hold q^δ: q* = δα'/(β'(1 − δ)), and δ is found again."""
    n, delta = 4000, 0.4
    scores = [((i + 1) / n) ** delta - (i / n) ** delta for i in range(n)]
    found = best_data_share(scores, scoring_cost=0.3, epochs=2)
    assert found.q == pytest.approx(q_star(delta, 0.3, 2), abs=1e-3) and found.delta == pytest.approx(delta, abs=0.01)
    assert not found.notes() and found.ratio > 1
    dear = best_data_share(scores, scoring_cost=2.0, epochs=1)
    assert dear.q == 1 and dear.delta > 1 / 3, "δ is above epochs / (scoring + epochs)"
    assert ["no interior optimum" in dear.notes()[0], "scoring cost more than it saves" in dear.notes()[1]] == [
        True
    ] * 2
    assert dear.ratio == pytest.approx(1 / 3) and "0.33 times" in dear.notes()[1]


def test_examples_that_point_away_count_as_zero():
    """Alignments may be negative."""
    found = best_data_share([5.0, 4.0, -3.0, -9.0], scoring_cost=0.5)
    assert (found.count, found.gain) == (2, 1.0)
    assert best_data_share([2.0], 0.1).delta is None


@pytest.fixture(scope="module")
def rows():
    return make_rows(40)


def test_q_star_of_a_selection_weighs_scoring_against_training(rows):
    """In FLOPs of both: exact norms cost about a pass; with more epochs their share of the cost falls, and so does q*."""
    chosen = {epochs: choose(rows, fraction="q_star", method="norm", epochs=epochs) for epochs in (1, 40)}
    for epochs, selection in chosen.items():
        found = selection.report["q_star"]
        assert found["epochs"] == selection.settings["epochs"] == epochs and selection.settings["fraction"] == "q_star"
        assert len(selection) == found["count"] == round(found["q"] * 40)
        training = 2 * sum(parameters_per_token(model())) * selection.report["tokens"]
        assert found["scoring_cost"] == selection.report["cost"]["flops"] / training and found["scoring_cost"] >= 1
        best = best_data_share(selection.all_scores, found["scoring_cost"], epochs)
        assert best.to_dict() == found and json.loads(json.dumps(selection.to_dict()))["report"]["q_star"] == found
        assert set(selection.fallbacks) == set(best.notes())
    assert len(chosen[40]) < len(chosen[1]) and "scoring cost more" in " ".join(chosen[1].fallbacks)
    highest = np.argsort(-chosen[40].all_scores)[: len(chosen[40])]
    assert set(chosen[40].indices) == set(highest.tolist())


def test_predicted_scores_are_cheaper(rows):
    """A few measured, the others predicted from a forward pass."""
    costs = [
        choose(rows, fraction="q_star", method=name, small=16, epochs=3).report["q_star"]["scoring_cost"]
        for name in ("predicted_norm", "norm", "loss")
    ]
    assert costs[2] < costs[0] < costs[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "random"},
            "'q_star' needs scores that add up and cost something: method predicted_norm, .*'random'",
        ),
        ({"method": "norm_low"}, "got method='norm_low'"),
        ({"method": "iterative"}, "got method='iterative'"),
        ({"method": "coreset_k_centre"}, "got method='coreset_k_centre'"),
        ({"method": "norm", "count": 3}, "Give either fraction or count, got fraction=q_star, count=3"),
        ({"method": "norm", "epochs": 0}, "epochs must be at least 1, got 0"),
    ],
)
def test_scores_without_a_q_star_are_refused(options, message, rows):
    with pytest.raises(BlueprintError, match=message):
        choose(rows, fraction="q_star", **options)
    with pytest.raises(BlueprintError, match="no known length"):
        choose(iter(rows), fraction="q_star", method="norm")
    with pytest.raises(BlueprintError, match=r"fraction must be a number in \(0, 1\], got 'half'; or 'q_star'"):
        SelectionOptions(fraction="half")
