"""Whatever is minimised is what is measured, or an error says why not. Run: pytest tests/measure/test_objectives.py"""

import pytest
import torch
from torch.nn import functional as F

from peft_blueprint import measure_influence
from peft_blueprint.errors import MeasurementError
from peft_blueprint.measure.submodules import find_weights
from peft_blueprint.testing import VOCABULARY, tiny_bert, tiny_llama, tiny_mixtral, toy_batches


def norms_by_autograd(model, rows, losses):
    """(rows, examples): norms of the gradient of each of the losses, one at a time."""
    weights = {weight.name: weight.tensor for weight in find_weights(model)}
    tensors = [weights[submodule.name] for submodule in rows]
    gradients = [torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True) for loss in losses]
    return torch.stack([torch.stack([torch.zeros(()) if g is None else g.norm() for g in of]) for of in gradients]).T


def assert_measures(model, batch, loss_fn, losses, **settings):
    influence = measure_influence(model, [batch], loss_fn=loss_fn, method="exact", progress=False, **settings)
    expected = norms_by_autograd(model, influence.submodules, losses)
    torch.testing.assert_close(influence.norms, expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------ preference and reward


def pairs(examples=4, length=7):
    generator = torch.Generator().manual_seed(0)
    shape = (2, examples, length)
    chosen, rejected = torch.randint(1, VOCABULARY, shape, generator=generator)
    return {"chosen": chosen, "rejected": rejected, "margin": torch.linspace(0, 1, examples)}


def log_likelihoods(model, ids):
    scores = model(ids).logits[:, :-1].float().log_softmax(-1)
    return scores.gather(2, ids[:, 1:, None])[..., 0].sum(1)


def preference_by_two_calls(model, batch):
    margin = log_likelihoods(model, batch["chosen"]) - log_likelihoods(model, batch["rejected"])
    return -F.logsigmoid(0.1 * margin - batch["margin"])


def preference_by_one_call(model, batch):
    chosen, rejected = log_likelihoods(model, torch.cat([batch["chosen"], batch["rejected"]])).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected) - batch["margin"])


@pytest.mark.parametrize("loss_fn", [preference_by_two_calls, preference_by_one_call])
@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral])
@pytest.mark.parametrize("include", ["adaptable", "all"])
def test_a_preference_loss(loss_fn, build, include):
    """DPO's, with a call for each side of the pairs, or one on both together, whose rows are not the examples."""
    model, batch = build(layers=2), pairs()
    assert_measures(model, batch, loss_fn, preference_by_two_calls(model, batch), include=include)


def test_a_policy_gradient():
    """REINFORCE with its advantages beside the tokens."""
    model, batch = tiny_llama(layers=2), pairs() | {"advantages": torch.tensor([1.0, -2.0, 0.5, 0.1])}

    def reinforce(model, batch):
        return -batch["advantages"] * log_likelihoods(model, batch["chosen"])

    assert_measures(model, batch, reinforce, reinforce(model, batch))


# ------------------------------------------------------------------------------------------ losses with other rows in


def embed(model, ids):
    return F.normalize(model(ids, output_hidden_states=True).hidden_states[-1].mean(dim=1), dim=1)


def contrastive(model, batch):
    scores = embed(model, batch["chosen"]) @ embed(model, batch["rejected"]).T / 0.1
    return F.cross_entropy(scores, torch.arange(len(scores)), reduction="none")


def test_a_contrastive_loss_is_measured_for_what_flows_through_an_examples_own_rows():
    """Of all the batch's losses: what the weights' gradient would be if the other examples were constants."""
    model, batch = tiny_llama(layers=2), pairs()
    ones, others = embed(model, batch["chosen"]), embed(model, batch["rejected"])
    through = []
    for i in range(4):
        own = torch.arange(4)[:, None] == i
        scores = torch.where(own, ones, ones.detach()) @ torch.where(own, others, others.detach()).T / 0.1
        through.append(F.cross_entropy(scores, torch.arange(4), reduction="sum"))
    assert_measures(model, batch, contrastive, through)


@pytest.mark.parametrize(("build", "include"), [(tiny_llama, "all"), (tiny_mixtral, "adaptable")])
def test_a_contrastive_loss_cannot_be_measured_one_example_at_a_time(build, include):
    """By itself an example has nothing to contrast with, and the gradient would be nought: that is an error."""
    with pytest.raises(
        MeasurementError, match=r"the loss [\d.]+, and 0 by itself: its losses depend on the other rows"
    ):
        measure_influence(build(), [pairs()], loss_fn=contrastive, include=include, progress=False)


# ------------------------------------------------------------------------------------------ the model's own


def by_own_loss(model, batch):
    one = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["labels"]))]
    return [model(**example).loss for example in one]


def test_a_classifier_with_an_objective_of_its_own():
    """Classes with weights: what the model returns is what counts, not what its shapes look like."""
    model, [batch, *_] = tiny_bert(), toy_batches()
    batch = batch | {"labels": torch.tensor([0, 1, 2, 1])}
    forward, weights = model.forward, torch.tensor([1.0, 5.0, 0.2])

    def weighted(input_ids=None, attention_mask=None, labels=None, **rest):
        output = forward(input_ids=input_ids, attention_mask=attention_mask, **rest)
        if labels is not None:
            output.loss = (F.cross_entropy(output.logits, labels, reduction="none") * weights[labels]).mean()
        return output

    model.forward = weighted
    assert_measures(model, batch, None, by_own_loss(model, batch))


def test_a_decoder_with_another_loss_function():
    """Label smoothing put in through transformers' own door, `loss_function`."""
    model, [batch, *_] = tiny_llama(layers=2), toy_batches()

    def smoothed(logits, labels, **_):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.3)

    model.loss_function = smoothed
    assert_measures(model, batch, None, by_own_loss(model, batch))


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda m, b: log_likelihoods(m, b["chosen"]).mean(), r"one loss for each example, .*got shape \(\)"),
        (lambda m, b: log_likelihoods(m, b["chosen"])[:, None], r"got shape \(4, 1\)"),
        (lambda m, b: log_likelihoods(m, b["chosen"]).tolist(), "got list"),
        (lambda m, b: log_likelihoods(m, b["chosen"])[:3], "got 3 losses for a batch of 4 examples"),
        (lambda m, b: log_likelihoods(m, b["chosen"]).detach(), "losses without a graph: they were detached"),
    ],
)
def test_what_a_loss_may_not_return(loss_fn, message):
    """Each error says what came and what is wanted."""
    with pytest.raises(MeasurementError, match=message):
        measure_influence(tiny_llama(layers=1), [pairs()], loss_fn=loss_fn, progress=False)


def test_an_example_without_a_target_is_named_whatever_the_objective():
    """By the model's own loss it would be NaN."""
    model, [batch, *_] = tiny_mixtral(output_router_logits=True), toy_batches()
    batch = batch | {"labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(MeasurementError, match="have no target token"):
        measure_influence(model, [batch], progress=False)


def test_a_models_own_loss_is_asked_for_without_a_cache():
    """Keys and values that are kept would be added to once more where a checkpointed layer runs again."""
    model, [batch, *_] = tiny_mixtral(output_router_logits=True), toy_batches()
    seen = []
    model.register_forward_pre_hook(lambda m, a, words: seen.append(words.get("use_cache")), with_kwargs=True)
    measure_influence(model, [batch], progress=False)
    assert seen[-4:] == [False] * 4


def test_batches_without_rows_are_named():
    """Nested tensors, and rows that belong to nobody."""
    nested = {"chosen": {"input_ids": torch.ones(2, 3, dtype=torch.long)}}
    with pytest.raises(MeasurementError, match=r"got \['chosen'\]. Give tensors by name, not nested"):
        measure_influence(tiny_llama(), [nested], loss_fn=preference_by_two_calls, progress=False)
    with pytest.raises(MeasurementError, match=r"A batch of 4 examples has {'reference': 3}"):
        odd = pairs() | {"reference": torch.zeros(3)}
        measure_influence(tiny_mixtral(), [odd], loss_fn=preference_by_two_calls, progress=False)
    with pytest.raises(
        MeasurementError, match=r"has \['input_ids'\] and no labels.*LlamaForCausalLM returned no loss"
    ):
        measure_influence(tiny_llama(), [{"input_ids": pairs()["chosen"]}], progress=False)
