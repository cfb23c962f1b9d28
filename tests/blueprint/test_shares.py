"""Shares of a model: of its parameters, and the one that gives the most per cost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_blueprint import Blueprint, Submodule
from peft_blueprint.blueprint import best_prefix, best_share, k_star, k_star_of, parameter_share
from peft_blueprint.errors import BlueprintError


def blueprint(norms, sizes=None, **fields):
    shapes = [None] * len(norms) if sizes is None else [(size, 2) for size in sizes]
    entries = (Submodule(f"{i}", norm, shape=shape) for i, (norm, shape) in enumerate(zip(norms, shapes, strict=True)))
    return Blueprint("org/m", tuple(entries), **fields)


@given(
    values=st.lists(st.floats(0.001, 1e6), min_size=1, max_size=30),
    fixed=st.floats(0.01, 100),
    variable=st.floats(0.01, 100),
)
def test_no_other_number_of_the_largest_gives_more_per_cost(values, fixed, variable):
    """The ratio is G(k)/G(1), at least 1; k is 1 where gain per cost rises to the end."""
    found = best_prefix(values, fixed, variable)
    ranked, n = sorted(values, reverse=True), len(values)

    def ratio(count):
        return sum(ranked[:count]) / sum(values) * (fixed + variable) / (fixed + variable * count / n)

    assert found.ratio == pytest.approx(max(map(ratio, range(1, n + 1)))) and found.ratio >= 1 - 1e-9
    assert ratio(round(found.items * n)) == pytest.approx(found.ratio)
    assert found.is_interior == (found.share < 1)


def test_a_power_law_has_the_optimum_of_eq_15():
    """Gains k^γ of 10,000 pieces: k* = 0.375 for the paper's fixed 1, variable 4, γ = 0.6, 11 % above a full update."""
    n, gamma = 10_000, 0.6
    gains = [((i + 1) / n) ** gamma - (i / n) ** gamma for i in range(n)]
    found = best_prefix(gains, 1, 4)
    assert found.share == pytest.approx(k_star(gamma, 1, 4), abs=1e-3) and k_star(gamma, 1, 4) == pytest.approx(0.375)
    assert found.gain == pytest.approx(0.5552, abs=1e-3) and found.ratio == pytest.approx(0.2221 / 0.2, abs=1e-3)
    assert not best_prefix(gains, 4, 1).is_interior, "γ is above variable/(fixed + variable), eq. 16"


def test_k_star_of_a_model_counts_parameters():
    """The largest norm on a tenth of the parameters; by submodules where shapes are unknown; by the file's own costs."""
    sized = blueprint([8.0, 1.0, 1.0], [1, 4, 5])
    found = best_share(sized)
    assert (found.share, found.items, found.gain) == pytest.approx((0.1, 1 / 3, 0.8))
    assert found.ratio == pytest.approx(0.8 * 16 / (2 + 14 * 0.1))
    assert best_share(blueprint([8.0, 1.0, 1.0])).share == pytest.approx(1 / 3)
    assert best_share(blueprint([8.0, 1.0, 1.0], [1, 4, 5], costs={"fixed_cost": 100, "variable_cost": 1})).share == 1
    head = Submodule("lm_head", 50.0, shape=(9, 9), form="head")
    assert best_share(Blueprint("org/m", (*sized.submodules, head))) == found


def test_the_files_k_star_comes_before_its_own():
    """A publisher may recommend another share; numbers outside (0, 1] are refused."""
    assert k_star_of(blueprint([8.0, 1.0, 1.0])) == pytest.approx(1 / 3)
    assert k_star_of(blueprint([8.0, 1.0, 1.0], costs={"k_star": 0.15})) == 0.15
    for wrong in (0, 1.5, "a", True):
        with pytest.raises(BlueprintError, match=r"k_star among the costs of 'org/m' must be in \(0, 1\], got"):
            k_star_of(blueprint([1.0], costs={"k_star": wrong}))


def test_shares_of_parameters():
    entries = blueprint([1.0, 1.0, 1.0], [1, 4, 5]).submodules
    assert parameter_share(entries[1:2], entries) == 0.4 and parameter_share((), entries) == 0
    assert parameter_share((), ()) is None and parameter_share(blueprint([1.0]).submodules, entries[:0]) is None
    assert parameter_share(entries, (*entries, Submodule("x", 1.0))) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: best_prefix([], 1, 1), "values must be finite, not negative and not all zero, got 0"),
        (lambda: best_prefix([1, -1], 1, 1), "values must be finite.*got 2 from -1 to 1"),
        (lambda: best_prefix([0, 0], 1, 1), "not all zero"),
        (lambda: best_prefix([1], 0, 1), "must be positive numbers, got 0 and 1"),
        (lambda: best_share(blueprint([0.0])), "k\\* of 'org/m' cannot be found.*not all zero"),
        (
            lambda: best_share(blueprint([1.0], costs={"fixed_cost": "2"})),
            "must be positive numbers, got '2' and 14.0",
        ),
    ],
)
def test_values_without_a_best_share_are_refused(wrong, message):
    with pytest.raises(BlueprintError, match=message):
        wrong()
