"""Fisher-preconditioned influence agrees with dense matrices. Run: pytest tests/measure/test_fisher.py"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from peft_blueprint import generate_blueprint, measure_influence
from peft_blueprint.errors import MeasurementError
from peft_blueprint.measure import FisherInfluence, fisher_influence
from peft_blueprint.measure.fisher import natural_gradient, within_kinds
from peft_blueprint.testing import tiny_llama, toy_batches
from tests.measure.test_influence import autograd_gradients


WHOLE = 1543  # numbers, more than any submodule of the tiny model has
DAMPING = 0.3


@pytest.fixture(scope="module")
def dense():
    """Influence by explicit Fisher matrices of autograd's gradients, one submodule at a time."""
    gradients = autograd_gradients(tiny_llama(layers=1), toy_batches(examples=6))
    vectors = {}
    for name, each in gradients.items():
        rows = each.flatten(1).double()
        fisher = rows.T @ rows / len(rows)
        shift = DAMPING * fisher.trace() / min(len(rows), rows.shape[1])
        mean = rows.mean(dim=0)
        vectors[name] = mean, torch.linalg.solve(fisher + shift * torch.eye(len(fisher)), mean)
    return vectors


def test_influence_is_that_of_dense_fisher_matrices(dense):
    """Sizes, mismatches and their common scale, where gradients are kept whole."""
    options = {"projection_size": WHOLE, "method": "exact", "progress": False}
    influence = measure_influence(tiny_llama(layers=1), toy_batches(examples=6), **options)
    found = fisher_influence(influence, DAMPING)
    vectors = [dense[submodule.name] for submodule in influence.submodules]
    products = sum(float(mean @ natural) for mean, natural in vectors)
    scale = products / sum(float(natural @ natural) for _, natural in vectors)
    assert found.scale == pytest.approx(scale, rel=1e-4)
    for values, expected in (
        (found.influences, [natural.norm() for _, natural in vectors]),
        (found.mean_gradient_norms, [mean.norm() for mean, _ in vectors]),
        (found.mismatches, [(mean - scale * natural).norm() for mean, natural in vectors]),
    ):
        torch.testing.assert_close(values, torch.stack(expected), rtol=1e-4, atol=0)
    assert found.rank_correlation == pytest.approx(spearmanr(found.influences, found.mean_gradient_norms).statistic)


def test_a_blueprint_holds_both_rankings(dense):
    """Entries have the sizes, the whole has their agreement, and estimates are named only where there are some."""
    options = {"projection_size": WHOLE, "method": "exact", "progress": False, "bootstrap": 20, "damping": DAMPING}
    blueprint = generate_blueprint(tiny_llama(layers=1), toy_batches(examples=6), **options)
    for entry in blueprint:
        mean, natural = dense[entry.name]
        assert entry.influence == pytest.approx(float(natural.norm()), rel=1e-4)
        scaled = blueprint.influence["scale"] * natural
        assert entry.influence_mismatch == pytest.approx(float((mean - scaled).norm()), rel=1e-3)
    assert blueprint.influence["damping"] == DAMPING and "estimates" not in blueprint.provenance
    norms, influences = ([getattr(e, key) for e in blueprint] for key in ("gradient_norm", "influence"))
    assert blueprint.influence["rank_correlation"] == pytest.approx(spearmanr(norms, influences).statistic)
    short = generate_blueprint(tiny_llama(layers=1), toy_batches(examples=6), **options | {"projection_size": 251})
    assert short.provenance["estimates"] == ["influence", "influence_mismatch"]
    none = generate_blueprint(tiny_llama(layers=1), toy_batches(examples=6), **options | {"projection_size": 0})
    assert not none.influence and none.submodules[0].influence is None and "estimates" not in none.provenance
    one = generate_blueprint(tiny_llama(layers=1), toy_batches(examples=1), **options)
    assert not one.influence and one.submodules[0].influence is None


def test_larger_gradients_have_less_influence():
    """In submodules whose gradients differ in size alone, influence is as the inverse of the gradient norm."""
    rows = torch.randn(8, 20, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    one, ten = natural_gradient(rows, 0.1).norm(), natural_gradient(10 * rows, 0.1).norm()
    assert ten == pytest.approx(float(one) / 10)


@pytest.mark.parametrize("examples", [3, 12])
def test_both_systems_give_the_natural_gradient(examples):
    """Of the examples where they are few, of the numbers where these are; zeros have none."""
    rows = torch.randn(examples, 6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    fisher = rows.T @ rows / examples
    shift = 0.5 * fisher.trace() / min(examples, 6)
    expected = torch.linalg.inv(fisher + shift * torch.eye(6)) @ rows.mean(dim=0)
    torch.testing.assert_close(natural_gradient(rows, 0.5), expected)
    assert not natural_gradient(torch.zeros(examples, 6), 0.5).any()


@given(st.lists(st.tuples(st.floats(0.01, 9), st.floats(0.01, 9), st.floats(-1, 1)), min_size=2, max_size=9))
def test_the_bound_holds(rows):
    """Ranking by gradient norm never loses more than eq. 26 allows, for any vectors and any fraction."""
    angles = torch.tensor([cosine for _, _, cosine in rows], dtype=torch.double)
    norms = torch.tensor([norm for norm, _, _ in rows], dtype=torch.double)
    influences = torch.tensor([influence for _, influence, _ in rows], dtype=torch.double)
    scale = 0.7
    squares = norms**2 + (scale * influences) ** 2 - 2 * scale * norms * influences * angles
    found = FisherInfluence(influences, norms, squares.clamp_min(0).sqrt(), scale, 0.1)
    for k in (0.2, 0.5, 1.0):
        most, lost = found.bound(k)
        assert -1e-9 <= lost <= most + 1e-9


def test_correlations_within_kinds_ignore_differences_between_them():
    """Two kinds of the same order inside, in opposite order to each other; a kind of one entry ranks nothing."""
    a, b = torch.tensor([1.0, 2, 3, 11, 12, 13, 5]), torch.tensor([11.0, 12, 13, 1, 2, 3, 5])
    assert within_kinds(a, b, ["q", "q", "q", "k", "k", "k", "o"]) == pytest.approx(1.0)
    assert within_kinds(a[:2], b[:2], ["q", "k"]) == 0


def test_bootstrap_draws_repeat_examples():
    """Every example twice is the same Fisher matrix and the same mean; damping counts twice as many eigenvalues."""
    influence = measure_influence(tiny_llama(layers=1), toy_batches(examples=4), progress=False)
    once = fisher_influence(influence, 0.1)
    twice = fisher_influence(influence, 0.2, examples=torch.arange(4).repeat(2))
    torch.testing.assert_close(once.influences, twice.influences)


def test_measurements_without_a_fisher_matrix_are_refused():
    """Without projections, of one example, or undamped."""
    batches = toy_batches(examples=2)
    bare = measure_influence(tiny_llama(layers=1), batches, projection_size=0, progress=False)
    with pytest.raises(MeasurementError, match="needs projections.*projection_size=251"):
        fisher_influence(bare)
    influence = measure_influence(tiny_llama(layers=1), batches, progress=False)
    with pytest.raises(MeasurementError, match="damping must be positive, got 0"):
        fisher_influence(influence, 0)
    with pytest.raises(MeasurementError, match="damping must be positive, got -1"):
        generate_blueprint(tiny_llama(layers=1), batches, damping=-1.0)
    with pytest.raises(MeasurementError, match="at least two examples, got 1"):
        fisher_influence(influence, examples=torch.tensor([0]))
    with pytest.raises(MeasurementError, match=r"k must be in \(0, 1\], got 2"):
        fisher_influence(influence).bound(2)
