"""Features of examples from one forward pass are correct. Run: pytest tests/data/test_features.py"""

import numpy as np
import pytest
import torch

from peft_blueprint import measure_influence
from peft_blueprint.compare.drift import spearman
from peft_blueprint.data.features import MODEL_SCALARS, model_features, token_features
from peft_blueprint.data.predictor import fit_predictor
from peft_blueprint.errors import MeasurementError
from peft_blueprint.measure.losses import per_example_losses
from peft_blueprint.testing import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, toy_batches


def column(features, name):
    return features[:, MODEL_SCALARS.index(name)]


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_scalars_match_the_whole_logits(build, padding):
    """Loss, entropy, error and lengths, also if the head computes logits at targets alone."""
    model, batches = build(), toy_batches(padding=padding)
    features, tokens = model_features(model, batches)
    done = 0
    for batch in batches:
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1].double()
        for labels, row, mask in zip(batch["labels"][:, 1:], logits, batch["attention_mask"], strict=True):
            at = labels != -100
            shares = row[at].softmax(dim=1)
            truth = torch.nn.functional.one_hot(labels[at], shares.shape[1])
            assert column(features, "loss")[done] == pytest.approx(
                float(-(shares.log() * truth).sum() / at.sum()), rel=1e-4
            )
            assert column(features, "entropy")[done] == pytest.approx(
                float(-(shares.log() * shares).sum() / at.sum()), rel=1e-4
            )
            error = float((shares - truth).square().sum(dim=1).mean().sqrt())
            assert np.exp(column(features, "log error")[done]) == pytest.approx(error, rel=1e-4)
            assert np.exp(column(features, "log tokens")[done]) == pytest.approx(int(mask.sum()))
            assert np.exp(column(features, "log targets")[done]) == pytest.approx(int(at.sum()))
            done += 1
    assert done == len(features) == 8
    assert tokens == 8 * 12


def test_hidden_states_are_means_over_an_examples_own_positions():
    """Padding does not count; projections keep inner products approximately."""
    model = tiny_llama()
    [batch] = toy_batches(batch_size=8)
    features, _ = model_features(model, [batch], depths=(1.0,), size=4096)
    states = []
    hook = model.model.layers[-1].input_layernorm.register_forward_hook(lambda *a: states.append(a[2].detach()))
    model(**batch)
    hook.remove()
    weights = batch["attention_mask"].float()
    means = torch.einsum("bt,btd->bd", weights, states[0]) / weights.sum(dim=1, keepdim=True)
    found = features[:, len(MODEL_SCALARS) :]
    assert np.allclose(
        found @ found.T * 32 / 4096, (means @ means.T).numpy(), atol=0.15 * float(means.square().sum(1).max())
    )


def test_features_of_an_example_do_not_depend_on_its_batch():
    """One at a time or eight together."""
    model = tiny_llama()
    one, other = (model_features(model, toy_batches(batch_size=size))[0] for size in (1, 8))
    assert np.allclose(one, other, atol=1e-4)


def test_the_model_is_left_as_it_was():
    """No hook, flag or gradient remains."""
    model = tiny_llama().train()
    model.model.layers[0].requires_grad_(False)
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    model_features(model, toy_batches())
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags and model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_other_architectures_have_features():
    """Encoder-decoders, with labels at their own position; classifiers, without token predictions; and an own loss, without predictions."""
    [batch] = toy_batches(batch_size=8)
    ids = batch["input_ids"]
    labels = torch.where(ids % 3 > 0, ids, -100)
    t5, _ = model_features(tiny_t5(), [{**batch, "labels": labels}])
    assert (column(t5, "entropy") > 0).all()
    bert, _ = model_features(tiny_bert(), [{"input_ids": ids, "labels": torch.arange(8) % 3}])
    assert np.isfinite(bert).all() and not column(bert, "entropy").any() and (column(bert, "loss") > 0).all()
    own, _ = model_features(
        tiny_llama(), [batch], loss_fn=lambda model, batch: 7 + per_example_losses(model, batch)[0]
    )
    assert not column(own, "entropy").any() and (column(own, "loss") > 7).all()


def test_they_predict_gradient_norms():
    """As Algorithm 2 needs: 64 measured examples predict the order of the others' norms."""
    model, batches = tiny_llama(), toy_batches(examples=112, batch_size=28, length=48)
    values, _ = model_features(model, batches)
    norms = measure_influence(model, batches, progress=False).example_norms.numpy()
    predictor = fit_predictor(values[:64], norms[:64], scalars=range(len(MODEL_SCALARS)), bootstrap=20)
    assert spearman(predictor.predict(values[64:]), norms[64:]) > 0.5


def test_token_ids_alone_give_features():
    """Lengths are right, and word order matters through pairs."""
    rows = [
        {"input_ids": [5, 6, 5], "labels": [-100, 6, 5]},
        {"input_ids": [5, 5, 6], "labels": [-100, 5, 6]},
        {"input_ids": [5, 6, 5], "labels": [-100, 6, 5]},
    ]
    features = token_features(rows)
    assert np.exp(features[0, :4]) == pytest.approx([3, 2, 1, np.exp(2 / 3)])
    assert np.array_equal(features[0], features[2])
    assert not np.allclose(features[0], features[1])


def test_a_loss_that_is_not_finite_is_refused():
    """The error names the examples."""
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[:] = torch.nan
    with pytest.raises(MeasurementError, match=r"not finite for examples \[0, 1, 2, 3, 4\] of 8"):
        model_features(model, toy_batches())
