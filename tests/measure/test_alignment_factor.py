"""Projections of examples' gradients, how examples and submodules agree, and what a set of submodules gains together.
Run: pytest tests/measure/test_alignment_factor.py
"""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from peft_blueprint import Blueprint, BlueprintError, Influence, Submodule, generate_blueprint, measure_influence
from peft_blueprint.errors import MeasurementError, MismatchError
from peft_blueprint.measure import find_submodules
from peft_blueprint.measure.gradients import fold
from peft_blueprint.measure.summary import alignment_factor
from peft_blueprint.place.gains import CoverGain, SetGain
from peft_blueprint.testing import tiny_gpt2, tiny_llama, tiny_mixtral, toy_batches
from tests.fused import needs_fused


def measured(model, batches, **options):
    return measure_influence(model, batches, progress=False, **options)


def gradients_of(model, batches):
    """Every example's gradient by autograd, {name: (examples, numbers)}."""
    model.requires_grad_(True)
    found = {}
    for batch in batches:
        for i in range(len(batch["input_ids"])):
            model.zero_grad()
            one = {key: value[i : i + 1] for key, value in batch.items()}
            model(**one).loss.backward()
            for name, parameter in model.named_parameters():
                found.setdefault(name.removesuffix(".weight"), []).append(parameter.grad.flatten().clone())
    model.zero_grad()
    model.requires_grad_(False)
    return {name: torch.stack(rows) for name, rows in found.items()}


def entries_of(rows):
    return [Submodule(f"m{i}", 1.0, alignment=tuple(map(float, row))) for i, row in enumerate(rows)]


@pytest.mark.parametrize("length", [200, 1000, 70_000])
def test_projections_keep_inner_products_within_the_stated_error(length):
    """Over draws of the signs they are unbiased, with a standard error of √((‖a‖²‖b‖² + ⟨a, b⟩²)/m)."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, length, generator=generator)
    b += 0.5 * a
    draws = torch.stack([fold(torch.stack([a, b]), 251, seed) for seed in range(400 if length < 70_000 else 60)])
    products = (draws[:, 0] * draws[:, 1]).sum(dim=1)
    if length <= 251:
        torch.testing.assert_close(products, (a @ b).expand_as(products))
        return
    error = ((a.norm() * b.norm()).square() + (a @ b).square()).div(251).sqrt().item()
    assert abs(products.mean() - a @ b) < 4 * error / len(draws) ** 0.5
    assert products.std().item() == pytest.approx(error, rel=0.3)


def test_a_hot_row_or_column_spreads_over_all_places():
    """One feature with most of the gradient is projected as well as any other: m is a prime."""
    for matrix in (torch.zeros(400, 32).index_fill(0, torch.tensor([3]), 1.0), torch.zeros(502, 300)):
        matrix[:, 7] = 1.0
        projected = fold(matrix.flatten()[None], 251, 0)
        assert projected.count_nonzero() > 25
        assert projected.square().sum().item() == pytest.approx(matrix.square().sum().item(), rel=0.6)


def test_vectors_beyond_the_table_of_signs_are_unbiased_too():
    """The table is used again with another sign, so that numbers one table apart do not always agree."""
    stretch = 4096 * 7
    vector = torch.zeros(1, 2 * stretch)
    vector[0, 5] = vector[0, stretch + 5] = 1.0
    squares = {fold(vector, 7, seed).square().sum().item() for seed in range(20)}
    assert squares == {0.0, 4.0}


@pytest.mark.parametrize("options", [{}, {"method": "exact"}, {"method": "sketch"}, {"sketch_size": None}])
@pytest.mark.parametrize("build", [tiny_llama, pytest.param(tiny_mixtral, marks=needs_fused)])
def test_alignments_are_inner_products_with_the_other_examples_mean(build, options):
    """By every way to measure: with layers this small and as many numbers as they have, exactly."""
    model, batches = build(layers=2), toy_batches(examples=6)
    influence = measured(model, batches, projection_size=30_011, **options)
    gradients = gradients_of(build(layers=2), batches)
    for row, submodule in zip(influence.alignments, influence.submodules, strict=True):
        of_all = gradients[submodule.name]
        others = torch.stack([of_all[torch.arange(len(of_all)) != b].mean(dim=0) for b in range(len(of_all))])
        torch.testing.assert_close(row, (of_all * others).sum(dim=1), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("method", ["auto", "exact", "sketch"])
def test_alignments_are_estimated_from_few_numbers(method):
    """Sketched and projected on 251 numbers, whichever way the norms are taken: as near as `Influence` says."""
    settings = {"layers": 2, "hidden_size": 128, "head_dim": 32, "intermediate_size": 160}
    batches = [toy_batches(examples=4, length=n, seed=n)[0] for n in (6, 40)]  # by the Gram form, and formed
    influence = measured(tiny_llama(**settings), batches, method=method)
    gradients = gradients_of(tiny_llama(**settings), batches)
    true = torch.stack([gradients[s.name] @ gradients[s.name].T for s in influence.submodules])
    norms = true.diagonal(dim1=1, dim2=2).sqrt()
    estimated = influence.projections @ influence.projections.mT
    errors = (estimated - true) / (norms[:, :, None] * norms[:, None, :])
    assert errors.square().mean().sqrt() < (2 / 32 + 2 / 251) ** 0.5


def test_the_mean_alignment_is_the_squared_signal():
    """Two estimates of ‖E g‖², the same where both are exact."""
    influence = measured(tiny_llama(), toy_batches(examples=8), projection_size=30_011)
    positive = influence.signal_norms > 0
    torch.testing.assert_close(
        influence.alignments.mean(dim=1)[positive], influence.signal_norms.square()[positive], rtol=1e-3, atol=1e-7
    )


def test_a_layer_called_twice_is_projected_as_one():
    """Its calls' gradients add up before they are compared."""
    model = tiny_llama(layers=2)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    batches = toy_batches(examples=4)
    influence = measured(model, batches, projection_size=30_011)
    gradients = gradients_of(model, batches)
    for row, submodule in zip(influence.projections, influence.submodules, strict=True):
        of_all = gradients[submodule.name]
        torch.testing.assert_close(row @ row.T, of_all @ of_all.T, rtol=1e-3, atol=1e-6)


def test_projections_merge_and_can_be_left_out():
    """Shards' projections stand side by side; without them, functions that need them say how to get them."""
    batches = toy_batches(examples=8)
    whole = measured(tiny_llama(), batches)
    shards = [measured(tiny_llama(), [batch]) for batch in batches]
    torch.testing.assert_close(Influence.merge(shards).projections, whole.projections)
    without = measured(tiny_llama(), batches, projection_size=0)
    assert without.projections.shape == (len(without.submodules), 8, 0)
    torch.testing.assert_close(without.norms, whole.norms)
    with pytest.raises(MeasurementError, match="need projections.*projection_size=251"):
        without.alignments  # noqa: B018 - a property that raises
    with pytest.raises(MismatchError, match="projection size 251.*projection size 0"):
        Influence.merge([shards[0], without])


def test_the_factor_holds_the_mean_exactly_and_the_moments_nearly():
    """UUᵀ is CCᵀ/B; exactly, where there are columns enough."""
    rng = np.random.default_rng(0)
    alignments = rng.normal(size=(30, 5)) @ rng.normal(size=(5, 40)) + 1.0
    alignments[::2] *= 1e-5
    factor = alignment_factor(alignments)
    assert factor.shape == (30, 6)
    np.testing.assert_allclose(factor[:, 0], alignments.mean(axis=1))
    moments = alignments @ alignments.T / 40
    np.testing.assert_allclose(factor @ factor.T, moments, atol=1e-9 * moments.max(), rtol=1e-6)
    assert alignment_factor(rng.normal(size=(30, 64))).shape == (30, 16)
    with pytest.raises(BlueprintError, match="finite"):
        alignment_factor(np.full((3, 1), np.nan))


def test_a_blueprint_holds_alignments():
    """At most 16 numbers an entry, of which the first is its mean alignment; none of a single example."""
    blueprint = generate_blueprint(tiny_llama(), toy_batches(examples=20), progress=False, projection_size=30_011)
    assert {len(entry.alignment) for entry in blueprint} == {16}
    for entry in blueprint:
        assert max(entry.alignment[0], 0) == pytest.approx(entry.signal_norm**2, rel=1e-3)
        assert all(value == float(f"{value:.6g}") for value in entry.alignment)
    for options in ({"max_examples": 1}, {"projection_size": 0}):
        less = generate_blueprint(tiny_llama(), toy_batches(examples=20), progress=False, **options)
        assert {entry.alignment for entry in less} == {None}


def test_alignments_add_up_in_groups():
    """Inner products of concatenated gradients are sums; an even share of the sum goes back."""
    model = tiny_llama()
    blueprint = generate_blueprint(model, toy_batches(examples=20), progress=False)
    groups = blueprint.coarsen("group")
    members = [entry for entry in blueprint if entry.group == "attn.1"]
    np.testing.assert_allclose(groups["attn.1"].alignment, np.sum([e.alignment for e in members], axis=0), rtol=1e-9)
    assert groups["attn.1"].weight_gradient == pytest.approx(sum(e.weight_gradient for e in members))
    back = groups.expand(find_submodules(model)).coarsen("group")
    np.testing.assert_allclose(back["ffn.2"].alignment, groups["ffn.2"].alignment, rtol=1e-9)
    partly = replace(blueprint, submodules=tuple(replace(e, alignment=None) for e in blueprint if e.depth == 0))
    assert partly.coarsen("layer").submodules[0].alignment is None


def test_alignments_of_several_files_do_not_combine():
    """Their bases differ, so a blend or merge leaves them out; the saliency blends as the Adam gain does."""
    blueprint = generate_blueprint(tiny_llama(), toy_batches(examples=8), progress=False)
    blend = blueprint.blend(blueprint, 0.3)
    for entry, old in zip(blend, blueprint, strict=True):
        assert entry.alignment is None and entry.singular_energy is None
        assert entry.weight_gradient == pytest.approx(old.weight_gradient)
    merged = Blueprint.merge([blueprint, blueprint])
    assert all(e.alignment is e.weight_gradient is e.singular_energy is None for e in merged)


factors = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).normal(size=(7, 4)) + [1, 0, 0, 0])


@settings(max_examples=40, deadline=None)
@given(rows=factors, damping=st.sampled_from([0.01, 0.3, 5.0]), order=st.permutations(range(7)))
def test_the_gain_is_the_direct_solve_and_never_falls(rows, damping, order):
    """sᵀ(Q + λD)⁻¹s of the chosen, from 0 to below 1."""
    gain = SetGain(entries_of(rows), damping)
    rows = np.concatenate([rows[:, :1].clip(min=0), rows[:, 1:]], axis=1)
    gains = [gain.of(order[:k]) for k in range(8)]
    assert gains[0] == 0 and gains[-1] < 1
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(gains))
    chosen = rows[order[:4]]
    moments = chosen @ chosen.T
    damped = moments + damping * np.diag(np.diag(moments))
    assert gains[4] == pytest.approx(chosen[:, 0] @ np.linalg.solve(damped, chosen[:, 0]), rel=1e-6)
    assert gain.of([f"m{i}" for i in order[:4]]) == pytest.approx(gains[4])


@settings(max_examples=20, deadline=None)
@given(rows=factors, costs=st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=7, max_size=7))
def test_greedy_takes_the_most_gain_per_cost_in_every_step(rows, costs):
    """The incremental inverse makes the same choice as evaluating every set, within the budget."""
    gain = SetGain(entries_of(rows), 0.1)
    taken = []
    budget = 9.0
    for found in gain.greedy(costs, budget):
        left = budget - sum(costs[i] for i in taken)
        per_cost = {i: (gain.of([*taken, i]) - gain.of(taken)) / costs[i] for i in range(7) if i not in taken}
        per_cost = {i: value for i, value in per_cost.items() if costs[i] <= left}
        assert per_cost[found] == pytest.approx(max(per_cost.values()), abs=1e-9)
        taken.append(found)
    assert all(costs[i] > budget - sum(costs[t] for t in taken) for i in range(7) if i not in taken)
    assert len(gain.greedy(count=3)) == 3


def test_a_pair_that_complements_beats_the_two_strongest():
    """Two submodules of the same noise repeat each other; a weaker one of other noise adds more."""
    rows = [[1.0, 1.0, 0.0], [1.0, 1.01, 0.0], [0.6, 0.0, 0.9]]
    gain = SetGain(entries_of(rows), 0.05)
    singles = [gain.of([i]) for i in range(3)]
    assert singles[2] < min(singles[:2])
    assert gain.of([0, 2]) > gain.of([0, 1])
    assert set(gain.greedy(count=2)) == {0, 2}


places = st.tuples(st.sampled_from("qv"), st.none() | st.integers(0, 5), st.sampled_from([0.0, 1.0, 2.5]))


def cover_of(drawn):
    entries = [Submodule(f"m{i}", 1.0, kind=kind, depth=depth) for i, (kind, depth, _) in enumerate(drawn)]
    return CoverGain(entries, [value + 1e-3 for _, _, value in drawn])


@settings(max_examples=60, deadline=None)
@given(drawn=st.lists(places, min_size=4, max_size=8), order=st.permutations(range(4)))
def test_covering_never_falls_and_adds_ever_less(drawn, order):
    """From 0 for the empty set to 1 for all; an entry adds at least as much to a subset."""
    gain = cover_of(drawn)
    assert gain.of([]) == 0 and gain.of(range(len(drawn))) == pytest.approx(1)
    small, large, one = order[:1], order[:3], order[3]
    to_small = gain.of([*small, one]) - gain.of(small)
    to_large = gain.of([*large, one]) - gain.of(large)
    assert to_small + 1e-12 >= to_large >= -1e-12


@settings(max_examples=40, deadline=None)
@given(
    drawn=st.lists(places, min_size=4, max_size=8), costs=st.lists(st.sampled_from([1.0, 3.0]), min_size=8, max_size=8)
)
def test_greedy_covering_takes_the_most_gain_per_cost_in_every_step(drawn, costs):
    """Recomputing few gains gives the same choice as evaluating every set."""
    gain, costs, budget, taken = cover_of(drawn), costs[: len(drawn)], 7.0, []
    for found in gain.greedy(costs, budget):
        left = budget - sum(costs[i] for i in taken)
        rest = [i for i in range(len(drawn)) if i not in taken and costs[i] <= left]
        added = {i: (gain.of([*taken, i]) - gain.of(taken)) / costs[i] for i in rest}
        assert added[found] == pytest.approx(max(added.values()), abs=1e-9)
        taken.append(found)
    assert not [i for i in range(len(drawn)) if i not in taken and costs[i] <= budget - sum(costs[i] for i in taken)]


def test_covering_prefers_a_spread_to_the_strongest():
    """Two neighbours of large scores repeat each other; one far away, or of another kind, adds more."""
    entries = [Submodule(f"{kind}{depth}", 1.0, kind=kind, depth=depth) for kind in "qv" for depth in range(8)]
    values = [5, 6, 1, 1, 1, 1, 1, 1] + [2] * 8
    gain = CoverGain(entries, values)
    assert gain.of(["q0", "q6"]) > gain.of(["q0", "q1"]) < gain.of(["q1", "v5"])
    assert gain.of([f"q{d}" for d in range(0, 8, 2)]) > gain.of([f"q{d}" for d in range(4)])
    assert len({entries[i].kind for i in gain.greedy(count=2)}) == 2
    assert gain.greedy() != sorted(gain.greedy()) and len(gain.greedy()) == 16


def test_greedy_is_fast_for_very_many_entries():
    """2,000 of 10,000 in seconds, by each gain; of experts, each of its own kind, and of as many places as entries."""
    rng = np.random.default_rng(0)
    entries = [
        replace(entry, kind=f"experts.{i % 200}.up_proj", depth=i // 200)
        for i, entry in enumerate(entries_of(rng.normal(size=(10_000, 16))))
    ]
    for gain in (SetGain(entries), CoverGain(entries, rng.random(10_000))):
        start = time.process_time()
        assert len(set(gain.greedy(count=2000))) == 2000
        assert time.process_time() - start < 20, "a few on one idle core"


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: SetGain([Submodule("a", 1.0)]), "1 of 1 entries have no alignment .'a'.*projections"),
        (lambda: SetGain(entries_of([[1, 2]]) + entries_of([[1, 2, 3]])), "2 and 3 numbers"),
        (lambda: SetGain(entries_of([[1, 2]]), damping=0), "damping=0"),
        (lambda: SetGain(entries_of([[1, 2]])).of(["b"]), "'b' is not among the 1 entries .'m0'"),
        (lambda: SetGain(entries_of([[1, 2]])).of([1]), "1 is not among"),
        (lambda: SetGain(entries_of([[1, 2]])).greedy([1, 2]), "2 costs for 1 entries"),
        (lambda: SetGain(entries_of([[1, 2]])).greedy([0]), "positive"),
        (lambda: SetGain(entries_of([[1, 2]])).greedy(count=-1), "count=-1"),
        (lambda: CoverGain(entries_of([[1]]), [1, 2]), "1 entries and 2 values"),
        (lambda: CoverGain(entries_of([[1]]), [-1]), "not negative"),
        (lambda: CoverGain(entries_of([[1]]), [0]), "not all zero"),
        (lambda: CoverGain(entries_of([[1]]), [1], reach=0), "reach=0"),
        (lambda: CoverGain(entries_of([[1]]), [1], across_kinds=2), "across_kinds=2"),
        (lambda: CoverGain(entries_of([[1]]), [1]).of(["b"]), "'b' is not among the 1 entries"),
    ],
)
def test_wrong_use_is_named(act, message):
    with pytest.raises(BlueprintError, match=message):
        act()


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, pytest.param(tiny_mixtral, marks=needs_fused)])
def test_the_weights_and_their_gradients_product_is_estimated_from_rows(build):
    """Near the true sum of |w·ḡ| for every layer of a random model, Conv1D's stored the other way round included."""
    batches = toy_batches(examples=4)
    blueprint = generate_blueprint(build(), batches, progress=False, method="exact", sketch_size=None)
    model = build()
    gradients = gradients_of(model, batches)
    weights = {name.removesuffix(".weight"): p.detach().flatten() for name, p in model.named_parameters()}
    for entry in blueprint:
        true = (weights[entry.name] * gradients[entry.name].mean(dim=0)).abs().sum().item()
        assert entry.weight_gradient == pytest.approx(true, rel=0.35), entry.name
        assert entry.weight_norm == pytest.approx(weights[entry.name].norm().item(), rel=1e-5)


def test_the_share_of_energy_in_16_directions():
    """Of the mean gradient where it is kept whole; nothing where a sketch is too small to show 16 directions."""
    settings = {"layers": 1, "hidden_size": 128, "head_dim": 32}
    batches = toy_batches(examples=4)
    blueprint = generate_blueprint(tiny_llama(**settings), batches, progress=False, sketch_size=None)
    gradients = gradients_of(tiny_llama(**settings), batches)
    for entry in blueprint:
        squares = torch.linalg.svdvals(gradients[entry.name].mean(dim=0).unflatten(0, entry.shape)).square()
        assert entry.singular_energy == pytest.approx((squares[:16].sum() / squares.sum()).item(), rel=1e-3)
    small = generate_blueprint(tiny_llama(**settings), batches, progress=False, sketch_size=16)
    assert {e.name.rpartition(".")[2] for e in small if e.singular_energy is None} >= {"q_proj", "up_proj"}


def test_a_projection_of_nothing_is_nothing():
    """m = 0, and a vector shorter than m, which is padded."""
    assert fold(torch.ones(2, 3), 0, 0).shape == (2, 0)
    assert torch.equal(fold(torch.ones(2, 3), 5, 0), F.pad(torch.ones(2, 3), (0, 2)))
