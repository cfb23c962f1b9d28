"""Sketched norms estimate exact ones, and say how well. Run: pytest tests/measure/test_sketch.py"""

import math

import pytest
import torch

from peft_blueprint import Influence, generate_blueprint, measure_influence
from peft_blueprint.errors import MeasurementError
from peft_blueprint.measure.gradients import (
    by_example,
    gram,
    gram_is_nearly_free,
    norms_of,
    sketch_errors,
    sketch_matrix,
)
from peft_blueprint.testing import tiny_bert, tiny_gpt2, tiny_llama, toy_batches


def measured(model, batches, **options):
    return measure_influence(model, batches, progress=False, **options)


@pytest.fixture(scope="module")
def long_batches():
    """Long beside the sketch, so that no exact norm is nearly free."""
    return toy_batches(examples=8, length=40)


@pytest.mark.parametrize("rank", [1, 3, 20, 64])
def test_the_predicted_error_is_the_real_one(rank):
    """Over draws of Ω the spread of ‖GΩ‖ equals each sketch's own prediction, for gradients of any rank; squares are unbiased."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(40, rank, generator=generator) @ torch.randn(rank, 64, generator=generator)
    draws = torch.stack([gradient @ sketch_matrix(64, 16, seed) for seed in range(1500)])
    norms, predicted = norms_of(draws, 64)
    relative = norms / gradient.norm()
    assert relative.square().mean().item() == pytest.approx(1, abs=4 * 2 * predicted.mean().item() / math.sqrt(1500))
    assert predicted.square().mean().sqrt().item() == pytest.approx(relative.std().item(), rel=0.1)
    assert predicted.max() <= 1 / math.sqrt(2 * 16)


def test_no_gradient_has_no_error():
    """A gradient of zero is sketched as zero, not as NaN."""
    norms, errors = norms_of(torch.zeros(2, 5, 4), 64)
    assert norms.tolist() == [0, 0] and torch.isfinite(errors).all()
    assert torch.isfinite(sketch_errors(torch.full((1, 4, 4), 1e-30), 64)).all()


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_sketched_norms_stay_within_their_errors_of_the_exact_ones(build, long_batches):
    """Squares over many Ω average to the exact ones; single norms are off by about as much as they say."""
    model = build(layers=2)
    exact = measured(model, long_batches, method="exact")
    assert not exact.norm_errors.any()
    drawn = [measured(model, long_batches, method="sketch", sketch_size=8, seed=seed) for seed in range(40)]
    squares = torch.stack([(one.norms / exact.norms).square() for one in drawn])
    assert squares.mean().item() == pytest.approx(1, abs=0.02)
    off = (torch.stack([one.norms for one in drawn]) / exact.norms - 1).square().mean().sqrt()
    said = torch.stack([one.norm_errors for one in drawn]).square().mean().sqrt()
    assert said.item() == pytest.approx(off.item(), rel=0.15) and 0.03 < said < 0.25
    assert torch.equal(exact.losses, drawn[0].losses) and exact.data_digest == drawn[0].data_digest


def test_a_sketch_is_reproducible_and_adds_over_batches_and_workers(long_batches):
    """The same seed gives the same numbers; two halves merged are the whole; another seed is another sketch."""
    model = tiny_llama(layers=2)
    options = {"method": "sketch", "sketch_size": 8, "seed": 5}
    whole = measured(model, long_batches, **options)
    halves = [measured(model, [batch], **options) for batch in long_batches]
    merged = Influence.merge(halves)
    torch.testing.assert_close(merged.norms, whole.norms)
    torch.testing.assert_close(merged.norm_errors, whole.norm_errors)
    for mine, other in zip(merged.sketches, whole.sketches, strict=True):
        torch.testing.assert_close(mine, other)
    again = measured(model, long_batches, **options)
    assert torch.equal(again.norms, whole.norms) and all(map(torch.equal, again.sketches, whole.sketches))
    assert not torch.equal(measured(model, long_batches, **options | {"seed": 6}).norms, whole.norms)


def test_auto_is_exact_where_that_is_nearly_free(long_batches):
    """Short inputs and wide layers get exact norms, long inputs sketched ones; without a sketch all are exact."""
    model = tiny_llama(layers=2)
    exact = measured(model, toy_batches(length=8), method="exact")
    auto = measured(model, toy_batches(length=8), sketch_size=8)
    torch.testing.assert_close(auto.norms, exact.norms)
    assert not auto.norm_errors.any() and auto.method == "auto"
    assert measured(model, long_batches, sketch_size=8).norm_errors.all()
    assert not measured(model, long_batches).norm_errors.any(), "32 features need no sketch of 32"
    assert not measured(model, long_batches, sketch_size=None).norm_errors.any()
    assert gram_is_nearly_free(200, 4096, 14336, 32) and not gram_is_nearly_free(200, 576, 1536, 32)


def test_modules_called_twice_are_sketched_rightly(long_batches):
    """Gradients of several calls add before the norm is taken, in a sketch too."""
    model = tiny_llama(layers=2)
    model.model.layers[1] = model.model.layers[0]
    exact = measured(model, long_batches, method="exact")
    squares = [
        (measured(model, long_batches, method="sketch", sketch_size=8, seed=seed).norms / exact.norms).square()
        for seed in range(20)
    ]
    assert torch.stack(squares).mean().item() == pytest.approx(1, abs=0.03)
    auto = measured(model, toy_batches(length=6), sketch_size=12)
    assert auto.norm_errors.any(), "a Gram matrix knows one call only"


def test_leading_directions_hold_the_stated_energy():
    """Of a gradient of rank 3 three directions hold all, by the sketch and whole; of noise a sketch claims too little
    rather than too much.
    """
    generator = torch.Generator().manual_seed(1)
    low = torch.randn(50, 3, generator=generator) @ torch.randn(3, 200, generator=generator)
    noise = torch.randn(50, 200, generator=generator)
    found = record(low, noise, sketch_matrix(200, 16, 0))
    energy = found.singular_energy(3)
    assert energy[0].item() == pytest.approx(1, abs=1e-5)
    true = torch.linalg.svdvals(noise).square()
    assert 0.5 * true[:3].sum() / true.sum() < energy[1] <= true[:3].sum() / true.sum()
    whole = record(low, noise, None)
    torch.testing.assert_close(whole.singular_energy(3)[1], true[:3].sum() / true.sum())
    for influence in (found, whole):
        directions = influence.left_directions(3)[0]
        torch.testing.assert_close(directions.T @ directions, torch.eye(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(directions @ (directions.T @ low), low, atol=1e-3, rtol=1e-3)
    assert not record(low * 0, noise, None).singular_energy(3)[0]


@pytest.mark.parametrize("rank", [0, 16])
def test_a_rank_that_a_sketch_cannot_show_is_refused(rank):
    """It names the submodule and the size to measure with."""
    found = record(torch.ones(50, 200), torch.ones(50, 200), sketch_matrix(200, 16, 0))
    for method in (found.singular_energy, found.left_directions):
        with pytest.raises(MeasurementError, match=f"has 16 columns, got {rank}. Measure with sketch_size"):
            method(rank)


def record(first, second, omega):
    """A measurement whose mean gradients are these, sketched or whole."""
    model = tiny_llama(layers=1, hidden_size=200, head_dim=8)
    influence = measured(model, toy_batches(), sketch_size=None)
    rows = tuple(row for row in influence.submodules if row.shape[1] == 200)[:2]
    sketches = tuple(g if omega is None else g @ omega for g in (first, second))
    return type(influence)(**vars(influence) | {"submodules": rows, "sketches": sketches})


def test_the_head_is_given_target_positions_alone_where_the_model_has_no_word_for_it():
    """A masked language model, whose forward knows no logits_to_keep, applies its decoder to the targets only."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    settings = BertConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2, vocab_size=97
    )
    model = BertForMaskedLM(settings).eval()
    [batch, *_] = toy_batches(padding="none")
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, 3:] = -100
    batch["labels"][:, :3] = batch["input_ids"][:, :3]
    positions = []
    model.get_output_embeddings().register_forward_hook(lambda m, inputs, output: positions.append(output.shape[1]))
    influence = measured(model, [batch])
    assert positions[-1] == 3, "in the pass; before it, one example is asked for the model's own loss"
    alone = [model(**{k: v[i : i + 1] for k, v in batch.items()}).loss for i in range(4)]
    torch.testing.assert_close(influence.losses, torch.stack(alone).detach())


def test_rows_that_do_not_say_whose_they_are_are_not_guessed():
    """(B, …, d) and flattened (B·T, d) are told apart by the batch's lengths; anything else only for a single one."""
    assert by_example(torch.ones(4, 3, 2, 5), 4).shape == (4, 6, 5)
    assert by_example(torch.ones(12, 5), 4, {3}).shape == (4, 3, 5)
    assert by_example(torch.ones(4, 5), 4).shape == (4, 1, 5)
    assert by_example(torch.ones(8, 3, 5), 4, {3}) is None, "twice as many rows as examples"
    assert by_example(torch.ones(12, 5), 4, {4}) is None
    assert by_example(torch.ones(7, 5), 1).shape == (1, 7, 5)
    assert by_example(torch.ones(4), 4) is None


def test_gram_and_product_agree():
    """‖dYᵀX‖ by either form."""
    x, dy = torch.randn(3, 5, 7), torch.randn(3, 5, 4)
    products = torch.bmm(dy.transpose(1, 2), x)
    norms, errors = norms_of(products, 7)
    torch.testing.assert_close((gram(x) * gram(dy)).sum(dim=(1, 2)).sqrt(), norms)
    assert not errors.any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "fast"}, "method must be auto, sketch or exact, got 'fast'"),
        ({"method": "sketch", "sketch_size": None}, "needs a sketch_size"),
        ({"sketch_size": 1}, "sketch_size must be at least 2.*got 1"),
        ({"include": "heads"}, "include must be adaptable or all, got 'heads'"),
        ({"max_examples": 0}, "max_examples must be a positive integer or None, got 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    """Before any pass is made."""
    with pytest.raises(MeasurementError, match=message):
        measured(tiny_bert(), [], **options)


def test_a_blueprint_says_how_its_norms_were_measured(long_batches):
    """Method, size of the sketch and the norms' mean relative error are in the provenance."""
    made = generate_blueprint(
        tiny_llama(), long_batches, method="sketch", sketch_size=8, bootstrap=10, progress=False
    ).provenance
    assert (made["method"], made["sketch_size"]) == ("sketch", 8)
    assert 0.02 < made["domains"]["data"]["norm_error"] < 0.25
