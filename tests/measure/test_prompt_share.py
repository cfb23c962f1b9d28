"""The share of the gradient that arrives through prompt positions, against gradients that leave the prompt out."""

import pytest
import torch
from torch.nn import functional as F

from peft_blueprint import generate_blueprint, measure_influence
from peft_blueprint.measure import Influence
from peft_blueprint.measure.summary import adam_gain
from peft_blueprint.testing import tiny_bert, tiny_llama, tiny_mixtral, toy_batches


BATCHES = toy_batches(8, prompt=4)


@pytest.fixture(scope="module")
def model():
    """A tiny Llama whose MLP is wide enough to be sketched with 8 columns."""
    return tiny_llama(3)


def mean_gradients(model, answers_only):
    """Mean over examples of each weight's gradient, as that of an additive weight that acts on all or answer positions."""
    found = {}
    for batch in BATCHES:
        for i in range(len(batch["labels"])):
            row = {key: value[i : i + 1] for key, value in batch.items()}
            first = int((row["labels"][0] != -100).nonzero()[0]) - 1
            acts = torch.ones(1, row["labels"].shape[1], 1)
            acts[:, : first if answers_only else 0] = 0
            added, hooks = {}, []
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and name != "lm_head":
                    added[name] = torch.zeros_like(module.weight, requires_grad=True)
                    hooks.append(
                        module.register_forward_hook(
                            lambda module, x, y, delta=added[name], acts=acts: y + acts * F.linear(x[0], delta)
                        )
                    )
            model(**row).loss.backward()
            for hook in hooks:
                hook.remove()
            for name, delta in added.items():
                found[name] = found.get(name, 0) + delta.grad / 8
    model.zero_grad()
    return found


def test_shares_are_exact_where_gradients_are_whole(model):
    """For every submodule, for Adam's gain too, and for all together; padding on the right, prompts of 4 tokens."""
    influence = measure_influence(model, BATCHES, sketch_size=None, progress=False)
    whole, answers = mean_gradients(model, False), mean_gradients(model, True)
    inner = squares = 0.0
    for row, submodule in enumerate(influence.submodules):
        g, a = whole[submodule.name], answers[submodule.name]
        assert torch.allclose(influence.answer_sketches[row], a, atol=1e-5 * float(g.abs().max()))
        share = 1 - float((a * g).sum() / g.square().sum())
        assert influence.prompt_shares[row] == pytest.approx(share, abs=1e-4)
        gains = [adam_gain(x.norm(dim=1).double().numpy(), x.shape[1]) for x in (a, g)]
        assert influence.prompt_adam_shares[row] == pytest.approx(1 - gains[0] / gains[1], abs=1e-4)
        inner, squares = inner + float((a * g).sum()), squares + float(g.square().sum())
    assert influence.prompt_share()[0] == pytest.approx(1 - inner / squares, abs=1e-4)
    assert influence.prompt_shares.min() < 0.2 < 0.5 < influence.prompt_shares.max()


def test_sketches_estimate_them_and_measurements_merge(model):
    """Eight columns of 32; parts by batch together are the measurement of both."""
    whole = measure_influence(model, BATCHES, sketch_size=None, progress=False)
    sketched = measure_influence(model, BATCHES, sketch_size=8, method="sketch", progress=False)
    assert (sketched.prompt_shares - whole.prompt_shares).abs().median() < 0.1
    parts = [measure_influence(model, [batch], sketch_size=None, progress=False) for batch in BATCHES]
    assert torch.allclose(Influence.merge(parts).prompt_shares, whole.prompt_shares, atol=1e-4)


def test_a_blueprint_publishes_them_where_they_are_known(model, tmp_path):
    """Missing for models without next-token prediction and for fused experts, whose tokens are unordered."""
    blueprint = generate_blueprint(model, BATCHES, progress=False)
    shares = [entry.prompt_share for entry in blueprint.submodules]
    assert all(0 <= share <= 1 for share in shares) and max(shares) > 0.5
    assert all(0 <= entry.prompt_adam_share <= 1 for entry in blueprint.submodules)
    last = [
        entry for entry in blueprint.submodules if entry.depth == 2 and entry.kind in ("q_proj", "o_proj", "up_proj")
    ]
    assert len(last) == 3 and all(entry.prompt_share < 1e-5 for entry in last)  # the loss reads only answers there
    path = blueprint.save(tmp_path)
    assert type(blueprint).from_pretrained(path).submodules == blueprint.submodules
    experts = measure_influence(tiny_mixtral(2), toy_batches(2), include="all", progress=False)
    by_form = {s.form: share for s, share in zip(experts.submodules, experts.prompt_shares.tolist(), strict=True)}
    assert by_form["linear"] == by_form["linear"] and by_form["experts"] != by_form["experts"]
    labels = torch.tensor([0, 1, 2, 1])
    batches = [{"input_ids": BATCHES[0]["input_ids"], "labels": labels}]
    assert measure_influence(tiny_bert(), batches, progress=False).prompt_shares.isnan().all()
