"""Scores estimate the alignment of examples' gradients with a target's. Run: pytest tests/data/test_alignment.py"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from peft_blueprint import Influence, measure_influence
from peft_blueprint.data.alignment import alignment_scores, find_rows, gradient_points, make_target
from peft_blueprint.errors import BlueprintError, MeasurementError, MismatchError
from peft_blueprint.testing import tiny_llama, toy_batches


def measured(batches, **options):
    return measure_influence(tiny_llama(layers=2), batches, progress=False, **options)


def make_influence(gradients, seed=0):
    """An Influence whose projections are whole gradients, (submodules, examples, m)."""
    model = measured(toy_batches(examples=2))
    projections = torch.as_tensor(gradients, dtype=torch.float32)
    count = projections.shape[0]
    return replace(
        model,
        submodules=model.submodules[:count],
        norms=projections.norm(dim=2),
        norm_errors=torch.zeros(projections.shape[:2]),
        projections=projections,
        sketches=model.sketches[:count],
        seed=seed,
    )


def gradients_of(model, batches):
    """(examples, parameters) of every adaptable weight, by autograd."""
    names = {s.name for s in measured(batches).submodules}
    weights = [m.weight for n, m in model.named_modules() if n in names]
    rows = []
    for batch in batches:
        for i in range(len(batch["labels"])):
            loss = model(**{k: v[i : i + 1] for k, v in batch.items()}).loss
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    return torch.stack(rows)


def test_scores_estimate_the_cosines_of_whole_gradients():
    """Compared with autograd by correlation and scale, because projections are noisy."""
    pool, aims = toy_batches(examples=24), toy_batches(examples=8, seed=3)
    model = tiny_llama(layers=2)
    whole, aim = gradients_of(model, pool), gradients_of(model, aims).mean(dim=0)
    truth = (whole @ aim / whole.norm(dim=1) / aim.norm()).numpy()
    target = make_target(measured(aims, method="exact"))
    found = alignment_scores(measured(pool, method="exact"), target)
    assert np.corrcoef(found, truth)[0, 1] > 0.7 and abs(np.abs(found).mean() / np.abs(truth).mean() - 1) < 0.5
    dots = alignment_scores(measured(pool, method="exact"), target, "dot")
    assert np.corrcoef(dots, (whole @ aim).numpy())[0, 1] > 0.7


def test_an_example_has_cosine_1_with_itself_and_minus_1_with_its_opposite():
    """And a zero gradient has cosine 0."""
    one = np.random.default_rng(0).normal(size=(3, 1, 5))
    target = make_target(make_influence(one))
    found = alignment_scores(make_influence(np.concatenate([one, 7 * one, -one, 0 * one], axis=1)), target)
    assert found == pytest.approx([1, 1, -1, 0], abs=1e-6)


def test_gradients_of_other_submodules_do_not_change_the_score():
    """Only those named enter."""
    pool = np.random.default_rng(0).normal(size=(3, 4, 5))
    influence = make_influence(pool)
    names = [influence.submodules[2].name]
    target = make_target(make_influence(pool[:, :1]), names)
    other = make_influence(np.concatenate([9 * pool[:2, ::-1], pool[2:]]))
    assert np.array_equal(alignment_scores(influence, target), alignment_scores(other, target))
    assert target.submodules == tuple(names)


def test_preconditioning_weights_submodules_by_gradient_norm():
    """ "blocks" makes the score the same whatever a submodule's gradients are multiplied by; "adam" leaves it the first
    power, and "none" the second.
    """
    generator = np.random.default_rng(0)
    pool, aims = generator.normal(size=(2, 2, 6, 5))
    scale = np.array([1.0, 100.0])[:, None, None]

    def scores(precondition, factor):
        return alignment_scores(
            make_influence(pool * factor), make_target(make_influence(aims * factor), None, precondition), "dot"
        )

    plain, large = scores("blocks", 1.0), scores("blocks", scale)
    assert np.corrcoef(plain, large)[0, 1] == pytest.approx(1, abs=1e-5)
    first, second = (np.einsum("bm,m->b", pool[i], aims[i].mean(axis=0)) for i in range(2))
    sizes = np.sqrt(np.square(aims).sum(axis=2).mean(axis=1))
    entries = [np.prod(s.shape) for s in make_influence(pool).submodules]
    expected = first * np.sqrt(entries[0]) / sizes[0] + 100 * second * np.sqrt(entries[1]) / sizes[1]
    assert np.corrcoef(scores("adam", scale), expected)[0, 1] == pytest.approx(1, abs=1e-5)


def test_a_long_example_counts_no_more_than_a_short_one():
    """Gradients are of mean losses."""
    pool = toy_batches(examples=16, length=10, padding="none")
    target = make_target(measured(toy_batches(examples=4, seed=2)))
    lengths = np.array([int((b["labels"][i] != -100).sum()) for b in pool for i in range(4)])
    found = alignment_scores(measured(pool), target)
    assert len(set(lengths)) == 1 and np.isfinite(found).all() and np.abs(found).max() <= 1.5


def test_inner_products_of_points_estimate_cosines_of_whole_gradients():
    """Points have unit length."""
    pool = toy_batches(examples=16)
    whole = gradients_of(tiny_llama(layers=2), pool)
    whole = whole / whole.norm(dim=1, keepdim=True)
    points = gradient_points(measured(pool, method="exact"))
    assert points.shape == (16, 251) and np.allclose(np.linalg.norm(points, axis=1), 1, atol=1e-5)
    assert np.abs(points @ points.T - (whole @ whole.T).numpy()).mean() < 0.1


def test_measurements_that_do_not_compare_are_refused():
    """Another seed, other sizes, no projections, unknown names and options, no gradient."""
    influence = make_influence(np.ones((2, 3, 5)))
    target = make_target(influence)
    with pytest.raises(MismatchError, match="seed 0 and projection size 5, the examples with seed 1"):
        alignment_scores(make_influence(np.ones((2, 3, 5)), seed=1), target)
    with pytest.raises(MismatchError, match="projection size 4. Measure both alike"):
        alignment_scores(make_influence(np.ones((2, 3, 4))), target)
    with pytest.raises(MeasurementError, match="projections"):
        make_target(measured(toy_batches(), projection_size=0))
    with pytest.raises(MismatchError, match=r"1 of 1 submodules were not measured \('elsewhere'\)"):
        find_rows(influence, ["elsewhere"])
    with pytest.raises(MismatchError, match="no names given"):
        find_rows(influence, [])
    with pytest.raises(MeasurementError, match="mean gradient is zero"):
        make_target(make_influence(np.zeros((2, 3, 5))))
    with pytest.raises(BlueprintError, match="must be one of none, adam, blocks"):
        make_target(influence, None, "sgd")
    with pytest.raises(BlueprintError, match="must be one of cosine, dot"):
        alignment_scores(influence, target, "angle")
    assert isinstance(influence, Influence)
