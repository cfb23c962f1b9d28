"""The paper's formulas give their own values, not the numbers that the paper prints."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_blueprint import BlueprintError
from peft_blueprint.blueprint.theory import (
    JointCost,
    combined_gain,
    gain_per_cost,
    gamma_from_alpha,
    joint_update,
    k_star,
    optimizer_bytes_saved,
    partial_update,
    q_star,
    retained_mass,
    retained_mass_exact,
)
from peft_blueprint.measure.concentration import FRACTIONS, fit_gamma, fit_rank_exponent, retained_mass_curve


def power_law(n, alpha, seed=None):
    """Norms with rank-size exponent alpha: exact without a seed, else drawn from the Pareto law of index 1/alpha."""
    ranks = np.arange(1, n + 1)
    return (ranks if seed is None else np.random.default_rng(seed).uniform(size=n)) ** -float(alpha)


def test_the_toy_of_section_4_1_retains_98_percent():
    """N = 10,000, alpha = 1.5, top 10 %: 97.8 % by eq. 7 and 98.3 % by the sum, not the paper's "nearly 50 %"."""
    assert retained_mass(0.1, 10_000, 1.5) == pytest.approx(0.978, abs=5e-4)
    assert retained_mass_exact(0.1, 10_000, 1.5) == pytest.approx(0.983, abs=5e-4)
    assert retained_mass(0.1, 10**6, 1.5) == pytest.approx(0.998, abs=5e-4)


def test_the_retained_mass_of_everything_is_one():
    """Both forms end at 1, and the exact sum is the measured curve of an exact power law."""
    assert retained_mass(1, 50, 2.0) == retained_mass_exact(1, 50, 0.7) == 1
    curve = retained_mass_curve(power_law(200, 1.3), [0.05, 0.5, 1])
    assert curve == pytest.approx([retained_mass_exact(k, 200, 1.3) for k in (0.05, 0.5, 1)])


def test_the_example_of_b_2():
    """Fixed 1, variable 4, gamma 0.6: k* = 0.375 with G = 0.2221 against 0.2, not 0.228."""
    assert 0.375**0.6 == pytest.approx(0.5552, abs=5e-5)
    assert k_star(0.6, 1, 4) == pytest.approx(0.375)
    assert gain_per_cost(0.375, 0.6, 1, 4) == pytest.approx(0.2221, abs=5e-5)
    best = partial_update(0.6, fixed_cost=1, variable_cost=4)
    assert (best.k, best.gain_per_cost, best.full_gain_per_cost) == pytest.approx((0.375, 0.2221, 0.2), abs=5e-5)
    assert best.beats_full


def test_k_star_never_exceeds_one():
    """From gamma = variable/(fixed + variable) on the best fraction is all of it, and nothing partial beats that."""
    assert k_star(0.8, 1, 4) == 1 == k_star(0.99, 1, 4)
    assert k_star(0.79, 1, 4) < 1
    assert not partial_update(0.9, 1, 4).beats_full and not partial_update(0.8, 1, 4).beats_full


@given(gamma=st.floats(0.01, 0.99), fixed=st.floats(0.01, 100), variable=st.floats(0.01, 100), k=st.floats(0.001, 1))
def test_no_fraction_beats_k_star(gamma, fixed, variable, k):
    """Proposition B.1: G(k*) is the maximum over (0, 1], and k* < 1 exactly where gamma < variable/(fixed + variable)."""
    best = partial_update(gamma, fixed, variable)
    assert gain_per_cost(k, gamma, fixed, variable) <= best.gain_per_cost * (1 + 1e-9)
    if abs(gamma - variable / (fixed + variable)) > 1e-9:
        assert (best.k < 1) == (gamma < variable / (fixed + variable))


def test_the_example_of_b_5():
    """gamma 0.6, delta 0.7, k 0.2, q 0.3: 0.3807 · 0.4305 = 0.1639 at ratio 2.732, not 0.19 and 3.17."""
    together = combined_gain(k=0.2, gamma=0.6, q=0.3, delta=0.7)
    assert combined_gain(0.2, 0.6, 1, 0.7).gain == pytest.approx(0.3807, abs=5e-5)
    assert combined_gain(1, 0.6, 0.3, 0.7).gain == pytest.approx(0.4305, abs=5e-5)
    assert together.gain == pytest.approx(0.1639, abs=5e-5) and together.cost == pytest.approx(0.06)
    assert together.ratio == pytest.approx(2.732, abs=5e-4)


@pytest.mark.parametrize(("alpha", "gamma"), [(1.47, 0.405), (1.12, 0.472), (1.5, 0.4)])
def test_gamma_is_that_of_the_papers_text(alpha, gamma):
    """1 − α/(1 + α), for the three entries of the A.1 example: a heavier concentration has a smaller γ."""
    assert gamma_from_alpha(alpha) == pytest.approx(gamma, abs=5e-4)
    assert gamma_from_alpha(alpha + 1) < gamma_from_alpha(alpha)


def test_freezing_four_fifths_of_7b_saves_67_gb():
    """§5: 5.6 B parameters at 12 bytes are 67.2 GB."""
    assert optimizer_bytes_saved(7e9, 0.8) == pytest.approx(67.2e9)
    assert optimizer_bytes_saved(7e9, 0) == 0


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (lambda: retained_mass(0, 100, 1.5), r"k must be in \(0, 1\], got 0"),
        (lambda: retained_mass(1.1, 100, 1.5), r"k must be .* got 1.1"),
        (lambda: retained_mass(0.5, 100, 1.0), "alpha must be above 1 .*got 1.0.*retained_mass_exact"),
        (lambda: retained_mass(0.001, 100, 1.5), "must be at least 1"),
        (lambda: retained_mass_exact(0.5, 0, 1.5), "n=0"),
        (lambda: retained_mass_exact(0.5, 9, -1), "alpha positive"),
        (lambda: gamma_from_alpha(0), "alpha, a power-law exponent, must be positive, got 0"),
        (lambda: k_star(1.0, 1, 4), r"gamma must be in \(0, 1\), got 1.0"),
        (lambda: k_star(0.5, 0, 4), "fixed_cost and variable_cost must be positive, got 0"),
        (lambda: gain_per_cost(2, 0.5, 1, 4), "k must be .* got 2"),
        (lambda: combined_gain(0.5, 0.6, 0, 0.7), "q must be .* got 0"),
        (lambda: q_star(1.0, 1, 4), r"delta must be in \(0, 1\), got 1.0"),
        (lambda: joint_update(0.5, 1, JointCost(1)), r"delta must be in \(0, 1\), got 1"),
        (lambda: JointCost(0, 1, 1), "fixed above 0, got JointCost.fixed=0"),
        (lambda: JointCost(1, -1), "finite and not negative.*parameters=-1"),
        (lambda: optimizer_bytes_saved(7e9, 1.5), "frozen_fraction must be .* got 1.5"),
        (lambda: retained_mass_curve([0.0, 0.0]), "All gradient norms are zero"),
        (lambda: fit_gamma([1.0], [1.0]), "fraction below 1"),
    ],
)
def test_arguments_out_of_range_are_named(formula, message):
    """Every formula refuses arguments outside its domain."""
    with pytest.raises(BlueprintError, match=message):
        formula()


def test_the_retained_mass_curve_is_measured():
    """By hand: the top share of the summed norm, in any order of the values, linear between whole numbers of them."""
    assert retained_mass_curve([1, 4, 3, 2], [0.25, 0.5, 0.625, 1]) == pytest.approx([0.4, 0.7, 0.8, 1])
    assert retained_mass_curve(np.ones(100)) == pytest.approx(FRACTIONS)


def test_fit_gamma_recovers_a_known_exponent():
    """The curve k^γ gives γ back with no residual; another curve leaves the residual that its shape has."""
    for gamma in (0.1, 0.4, 0.9):
        fitted, residual = fit_gamma(FRACTIONS, np.array(FRACTIONS) ** gamma)
        assert fitted == pytest.approx(gamma) and residual == pytest.approx(0, abs=1e-12)
    _, residual = fit_gamma([0.1, 0.5, 1], [0.5 * 1.1, 0.8, 1])
    assert residual > 0.01


def test_q_star_is_k_star_of_the_data():
    """Eq. 30 and 31: interior below δ = β'/(α' + β'), otherwise all of the data."""
    assert q_star(0.6, 1, 4) == pytest.approx(0.375) and q_star(0.8, 1, 4) == 1 == q_star(0.7, 1, 1)


def test_the_joint_optimum_without_pairs_has_a_closed_form():
    """Eq. 37: β''k = γC and γ''q = δC at C = α''/(1 − γ − δ), where both fractions are below 1; else one is 1."""
    best = joint_update(0.3, 0.4, JointCost(1, 4, 3))
    assert (best.k, best.q) == pytest.approx((0.3 / 0.3 / 4, 0.4 / 0.3 / 3))
    bound = joint_update(0.6, 0.2, JointCost(1, 1, 4))
    assert bound.k == 1 and bound.q == pytest.approx(q_star(0.2, 2, 4))
    free = joint_update(0.6, 0.7, JointCost(1))
    assert (free.k, free.q, free.ratio) == (1, 1, 1), "what costs nothing is taken whole"


def test_the_pair_of_b_5_has_its_own_formulas_gain():
    """B.5's k = 0.2 and q = 0.3: 16.4 % of the gain; at 6 % of the cost, 2.73 times the gain per cost (not 3.17)."""
    pairs = JointCost(fixed=1e-9, pairs=1.0)
    gain = 0.2**0.6 * 0.3**0.7
    assert gain == pytest.approx(0.1639, abs=5e-5) and pairs.of(0.2, 0.3) == pytest.approx(0.06)
    assert gain / pairs.of(0.2, 0.3) == pytest.approx(2.732, abs=5e-4)


@given(
    exponents=st.tuples(st.floats(0.05, 0.95), st.floats(0.05, 0.95)),
    costs=st.tuples(st.floats(0.01, 10), *[st.one_of(st.just(0.0), st.floats(0.01, 10))] * 3),
)
def test_no_pair_of_a_grid_beats_the_joint_optimum(exponents, costs):
    """Eq. 36 with any of its terms: alternation ends at the one maximum."""
    gamma, delta = exponents
    cost = JointCost(*costs)
    best = joint_update(gamma, delta, cost)
    assert 0 < best.k <= 1 and 0 < best.q <= 1 and best.ratio >= 1 - 1e-9
    grid = np.geomspace(1e-4, 1, 60)
    k, q = np.meshgrid(np.append(grid, best.k * 1.01), np.append(grid, best.q * 1.01))
    inside = (k <= 1) & (q <= 1)
    assert best.gain_per_cost >= (k**gamma * q**delta / cost.of(k, q))[inside].max() * (1 - 1e-6)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.5])
def test_the_rank_exponent_is_recovered_within_its_standard_error(alpha):
    """Over 200 simulated power laws the estimate is unbiased and its standard error is the spread it has."""
    fits = [fit_rank_exponent(power_law(400, alpha, seed), tail_share=1.0) for seed in range(200)]
    z = np.array([(fit.exponent - alpha) / fit.error for fit in fits])
    assert abs(z.mean()) < 0.35 and 0.8 < z.std() < 1.2
    assert fits[0].n == 400 and fit_rank_exponent(power_law(400, alpha, 0)).n == 200


@given(st.floats(0.2, 4), st.floats(1e-6, 1e6))
def test_the_rank_exponent_does_not_depend_on_the_scale(alpha, scale):
    """Norms in other units have the same exponent."""
    norms = power_law(40, alpha, seed=1)
    assert math.isclose(fit_rank_exponent(norms).exponent, fit_rank_exponent(norms * scale).exponent, rel_tol=1e-6)


@pytest.mark.parametrize("norms", [[], [1.0] * 7, [2.0] * 50, [0.0] * 50 + [1.0, 2.0]])
def test_the_rank_exponent_of_degenerate_values_is_unknown(norms):
    """Too few values, values that are all equal, or all zero but a few: None and no number."""
    assert fit_rank_exponent(norms) is None
