"""Scores rank submodules by a measurement, controls without one."""

import math

import numpy as np
import pytest

from peft_blueprint import BlueprintError, Submodule, generate_blueprint
from peft_blueprint.place.scores import SCORES, comparable_across_kinds, even, score
from peft_blueprint.testing import tiny_llama, toy_batches


@pytest.fixture(scope="module")
def blueprint():
    return generate_blueprint(tiny_llama(), toy_batches(examples=8), progress=False)


def test_every_score_gives_one_finite_number_an_entry(blueprint):
    """Of a blueprint as generate_blueprint makes it, all of them, none negative."""
    for by in SCORES:
        values = score(blueprint.submodules, by)
        assert values.shape == (len(blueprint),) and np.isfinite(values).all() and (values >= 0).all(), by


def test_scores_are_their_formulas():
    """Two kinds, of different norms, weights and shapes."""
    numbers = {
        "signal_norm": 0.5,
        "noise_scale": 4.0,
        "influence": 6.0,
        "singular_energy": 0.25,
        "adam_gain": 3.0,
        "weight_gradient": 7.0,
    }
    entries = [
        Submodule("a", 1.0, kind="q", depth=0, shape=(2, 8), weight_norm=2.0, **numbers),
        Submodule("b", 3.0, kind="q", depth=1, shape=(2, 8), weight_norm=0.0, **numbers),
        Submodule("c", 8.0, kind="v", depth=1, shape=(2, 2, 1), weight_norm=4.0, **numbers),
    ]
    expected = {
        "gradient_norm": [1, 3, 8],
        "within_kind": [0.5, 1.5, 1],
        "per_root_parameter": [0.25, 0.75, 4],
        "relative_gradient_norm": [0.5, 0, 2],
        "signal_norm": [0.5] * 3,
        "signal_to_noise": [0.25] * 3,
        "influence": [6] * 3,
        "weight_gradient": [7] * 3,
        "singular_energy": [0.25] * 3,
        "adam_gain": [3] * 3,
        "first": [1, 0.5, 0.5],
        "last": [1, 2, 2],
    }
    assert set(expected) | {"random", "even"} == set(SCORES)
    for by, values in expected.items():
        np.testing.assert_allclose(score(entries, by), values, err_msg=by)


def test_without_a_signal_the_ratio_is_zero():
    """An infinite noise scale, which a blueprint leaves out, is a signal-to-noise ratio of 0."""
    entries = [Submodule("a", 1.0, signal_norm=0.0), Submodule("b", 1.0, signal_norm=1.0, noise_scale=2.0)]
    assert score(entries, "signal_to_noise").tolist() == [0, 0.5]


def test_random_is_the_same_for_the_same_seed(blueprint):
    one, same, other = (score(blueprint.submodules, "random", seed=seed) for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).all()


@pytest.mark.parametrize("n, middle", [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2)])
def test_even_prefers_the_middle_of_a_stratum(n, middle):
    """By depth, for any order of entries."""
    depths = np.random.default_rng(0).permutation(n)
    values = even([Submodule(str(depth), 1.0, depth=10 + int(depth)) for depth in depths])
    assert depths[values.argmax()] == middle and values.max() == 1 and values.min() >= 0


def test_a_score_per_cost(blueprint):
    """Divided by each entry's cost."""
    costs = [math.prod(entry.shape) for entry in blueprint]
    np.testing.assert_allclose(
        score(blueprint.submodules, "adam_gain", costs=costs), score(blueprint.submodules, "adam_gain") / costs
    )


def test_gradient_norms_compare_within_a_kind_only():
    """Scores that divide by the kind's mean or noise, or count nats of the loss, compare across kinds."""
    within_only = {by for by in SCORES if not comparable_across_kinds(by)}
    assert within_only == {
        "gradient_norm",
        "per_root_parameter",
        "relative_gradient_norm",
        "signal_norm",
        "influence",
        "singular_energy",
    }


bare = Submodule("bare", 1.0)


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: score([bare], "beauty"), "rank_by must be one of gradient_norm, within_kind"),
        (lambda: comparable_across_kinds("beauty"), "got 'beauty'"),
        (lambda: score([bare], "adam_gain"), "1 of 1 entries have no adam_gain .'bare'.*generate_blueprint"),
        (lambda: score([bare], "signal_to_noise"), "no noise_scale .'bare'.*two examples"),
        (lambda: score([bare], "influence"), "no influence .'bare'.*two examples and a projection_size"),
        (lambda: score([bare], "per_root_parameter"), "'bare' have no shape"),
        (lambda: score([bare], "even", costs=[1, 2]), "got 2 for 1 entries"),
        (lambda: score([bare], "even", costs=[0]), "costs must be positive and finite, and those of 'bare' are not"),
    ],
)
def test_missing_statistics_are_named(act, message):
    with pytest.raises(BlueprintError, match=message):
        act()
