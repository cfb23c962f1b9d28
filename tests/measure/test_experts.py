"""Single experts: exact gradients and routing in five families and in lists, in batches and by the parameter's gradient."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_blueprint import Blueprint, generate_blueprint, measure_influence
from peft_blueprint.blueprint import name_expert, split_expert
from peft_blueprint.errors import MismatchError
from peft_blueprint.measure import GenerateOptions, Influence, check_fits, experts, find_submodules
from peft_blueprint.measure.summary import adam_gain, summarize
from peft_blueprint.testing import tiny_llama, tiny_mixtral, toy_batches
from tests.fused import HAS_FUSED, needs_fused
from tests.mixtures import MIXTURES, tiny_listed


EXACT = {"experts": True, "method": "exact", "sketch_size": None, "progress": False}
LAYERS = 2


def whole(batches):
    """Return every example of some batches alone, without padding."""
    for batch in batches:
        for i, mask in enumerate(batch["attention_mask"].bool()):
            yield {key: value[i : i + 1, mask] for key, value in batch.items()}


def gradients(model, submodules, batches):
    """Return every example's gradient in every row by autograd, (examples, d_out, d_in) by name."""
    found = {row.name: [] for row in submodules}
    model.requires_grad_(True)
    parameters = dict(model.named_parameters())
    for example in whole(batches):
        model.zero_grad()
        model(**example).loss.backward()
        for row in submodules:
            expert = split_expert(row.name) if row.form == "expert" else None
            parameter = parameters[expert.parameter if expert else f"{row.name}.weight"]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            gradient = gradient[expert.number] if expert else gradient
            found[row.name].append(gradient if gradient.shape == row.shape else gradient.mT)
    model.zero_grad()
    model.requires_grad_(False)
    return {name: torch.stack(of_examples) for name, of_examples in found.items()}


def routing(model, batches):
    """Return share of tokens and mean weight of every expert by its container, from the routers' outputs."""
    routers = {
        f"{name}.experts": router
        for name, block in model.named_modules()
        for key, router in block.named_children()
        if key in ("gate", "router") and hasattr(block, "experts")
    }
    seen = {}
    handles = [
        router.register_forward_hook(lambda _, __, output, name=name: seen.__setitem__(name, output))
        for name, router in routers.items()
    ]
    found = {name: [] for name in routers}
    for example in whole(batches):
        with torch.no_grad():
            model(**example)
        for name, output in seen.items():
            if isinstance(output, torch.Tensor):
                weights, index = output.softmax(dim=-1).topk(2)
                weights, count = weights / weights.sum(dim=-1, keepdim=True), output.shape[-1]
            else:
                logits, weights, index = output
                count = logits.shape[-1]
            chosen = nn.functional.one_hot(index, count).float()
            found[name].append(
                torch.stack([chosen.mean(dim=(0, 1)), (chosen * weights[..., None]).sum(dim=1).mean(dim=0)], 1)
            )
    for handle in handles:
        handle.remove()
    return {name: torch.stack(of_examples).mean(dim=0) for name, of_examples in found.items()}


def assert_exact(model, batches, found):
    expected = gradients(model, found.submodules, batches)
    for i, row in enumerate(found.submodules):
        of_examples = expected[row.name]
        torch.testing.assert_close(found.norms[i], of_examples.flatten(1).norm(dim=1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.sketches[i], of_examples.mean(dim=0), rtol=1e-3, atol=1e-6)
    return expected


@needs_fused
@pytest.mark.parametrize("family", MIXTURES)
def test_measures_every_expert_exactly(family):
    model, batches = (
        MIXTURES[family](LAYERS),
        toy_batches(6, batch_size=3, padding="left" if family == "olmoe" else "right"),
    )
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = measure_influence(model, batches, **EXACT)
    expected = assert_exact(model, batches, found)
    shares = routing(model, batches)
    containers = dict.fromkeys(shares, 0)
    for entry in summarize(found, GenerateOptions(bootstrap=10)):
        mean = expected[entry.name].mean(dim=0)
        noise = (expected[entry.name] - mean).square().sum() / (5 * 6)
        signal = (mean.square().sum() - noise).clamp_min(0).sqrt().item()
        assert entry.signal_norm == pytest.approx(signal, rel=1e-3, abs=1e-4 * mean.norm().item())
        assert entry.adam_gain == pytest.approx(adam_gain(mean.norm(dim=1).numpy(), entry.d_in), rel=1e-4)
        expert = split_expert(entry.name)
        if expert is None:
            assert entry.token_share is entry.gate_weight is None
            continue
        share, weight = shares[expert.container][expert.number].tolist()
        assert entry.token_share == pytest.approx(share, abs=1e-6)
        assert entry.gate_weight == pytest.approx(weight, abs=1e-6)
        assert entry.alignment is None and (entry.form == "linear" or entry.singular_energy is None)
        containers[expert.container] += entry.token_share / 2  # of two weights
    assert all(total == pytest.approx(1) for total in containers.values()) and len(containers) >= 1
    after = dict(model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert "forward" not in {key for module in model.modules() for key in vars(module)}


@needs_fused
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_every_experts_implementation_gives_the_same_measurement(implementation):
    batches = toy_batches(4)
    expected = measure_influence(tiny_mixtral(1), batches, **EXACT)
    model = tiny_mixtral(1)
    model.set_experts_implementation(implementation)
    found = measure_influence(model, batches, **EXACT)
    torch.testing.assert_close(found.norms, expected.norms)
    torch.testing.assert_close(found.routing, expected.routing, equal_nan=True)


@needs_fused
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_falls_back_to_the_gradient_of_a_parameter(family, monkeypatch):
    batches, model = toy_batches(4), MIXTURES[family](1)
    expected = measure_influence(model, batches, **EXACT | {"sketch_size": 4})
    monkeypatch.setattr(experts, "can_group", lambda module: False)
    found = measure_influence(model, batches, **EXACT | {"sketch_size": 4})
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sketches, expected.sketches, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.routing, expected.routing, equal_nan=True)


@needs_fused
def test_refuses_to_group_experts_that_compute_something_else(monkeypatch):
    model, batches = tiny_mixtral(1), toy_batches(4)
    own = type(model.model.layers[0].mlp.experts)
    forward = own.forward
    monkeypatch.setattr(own, "forward", lambda self, *args: 2 * forward(self, *args))
    assert_exact(model, batches, measure_influence(model, batches, **EXACT))


@needs_fused
def test_recomputes_experts_under_gradient_checkpointing():
    model, batches = tiny_mixtral(1), toy_batches(4)
    expected = measure_influence(model, batches, **EXACT)
    model.train().gradient_checkpointing_enable()
    found = measure_influence(model, batches, **EXACT)
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.routing, expected.routing, equal_nan=True)


@needs_fused
def test_estimates_norms_from_sketches_with_their_error():
    model, batches = tiny_mixtral(LAYERS, hidden_size=64), toy_batches(8)
    exact = measure_influence(model, batches, experts=True, method="exact", sketch_size=8, progress=False)
    found = measure_influence(model, batches, experts=True, method="sketch", sketch_size=8, progress=False)
    rows = [i for i, row in enumerate(found.submodules) if row.form == "expert"]
    reached = exact.norms[rows] > 0
    ratio = (found.norms[rows] / exact.norms[rows])[reached]
    assert not exact.norm_errors[rows].any() and (found.norm_errors[rows][reached] > 0).all()
    assert abs(ratio.square().mean() - 1) < 0.1 and ratio.std() < 0.35
    torch.testing.assert_close(found.sketches, exact.sketches)


@needs_fused
def test_experts_add_up_to_their_fused_parameter():
    model, batches = tiny_mixtral(1), toy_batches(4)
    apart = measure_influence(model, batches, **EXACT)
    together = measure_influence(model, batches, **EXACT | {"experts": False})
    names = [row.name for row in together.submodules]
    squares = torch.zeros_like(together.norms)
    for i, row in enumerate(apart.submodules):
        name = split_expert(row.name).parameter if row.form == "expert" else row.name
        squares[names.index(name)] += apart.norms[i].square()
    torch.testing.assert_close(squares.sqrt(), together.norms, rtol=1e-4, atol=1e-6)


@needs_fused
def test_measures_experts_under_adapters_and_merges_parts():
    """Adapters that do not act change nothing; measurements of different batches merge without loss."""
    batches = toy_batches(4, batch_size=2)
    expected = measure_influence(tiny_mixtral(1), batches, **EXACT)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(tiny_mixtral(1), LoraConfig(target_modules=["q_proj"], target_parameters=targets, r=2))
    found = Influence.merge([measure_influence(adapted, [batch], **EXACT) for batch in batches])
    assert found.submodules == expected.submodules
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sketches, expected.sketches, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.routing, expected.routing, equal_nan=True)


@needs_fused
def test_measures_chosen_experts_alone():
    model, batches = tiny_mixtral(LAYERS), toy_batches(4)
    names = ["model.layers.1.mlp.experts.2.down_proj", "model.layers.1.mlp.experts.0.gate_up_proj"]
    found = measure_influence(model, batches, submodules=names, **EXACT)
    whole = measure_influence(model, batches, **EXACT)
    rows = [i for i, row in enumerate(whole.submodules) if row.name in names]
    assert {row.name for row in found.submodules} == set(names)
    torch.testing.assert_close(found.norms, whole.norms[rows])


def test_an_expert_that_no_token_visits_is_an_entry_of_zero():
    model = tiny_listed(1, experts=6)
    with torch.no_grad():
        gate = model.model.layers[0].mlp.gate.weight
        gate[:6] = gate[:1] * torch.tensor(
            [[1.0], [-1.0], [2.0], [-2.0], [3.0], [0.0]]
        )  # 5 is never among the highest two
    blueprint = generate_blueprint(model, toy_batches(2, length=6), **EXACT)
    shares = {split_expert(entry.name).number: entry for entry in blueprint if ".experts." in entry.name}
    assert len(shares) == 6 and shares[5].token_share == shares[5].gate_weight == shares[5].gradient_norm == 0


def test_leaves_models_without_experts_as_they_are():
    found = measure_influence(tiny_llama(1), toy_batches(2), **EXACT)
    assert {row.form for row in found.submodules} == {"linear"} and found.routing.isnan().all()


@needs_fused
def test_a_blueprint_of_experts_fits_its_model():
    model = tiny_mixtral(1)
    blueprint = generate_blueprint(model, toy_batches(4), experts=True, progress=False)
    check_fits(blueprint, model)
    own = model.model.layers[0].mlp.experts.down_proj[2]
    entry = blueprint["model.layers.0.mlp.experts.2.down_proj"]
    assert entry.weight_norm == pytest.approx(own.norm().item(), rel=1e-5) and entry.weight_gradient > 0
    assert blueprint.provenance["experts_per_token"] == 2
    with pytest.raises(MismatchError, match=r"experts\.3\.gate_up_proj"):
        check_fits(blueprint, tiny_mixtral(1, num_local_experts=3))
    assert not blueprint.influence and blueprint.provenance["projection_size"] == 0


def test_splits_names_of_experts():
    name = "model.layers.3.mlp.experts.17.gate_up_proj"
    assert split_expert(name) == ("model.layers.3.mlp.experts.gate_up_proj", 17)
    assert name_expert(*split_expert(name)) == name and split_expert(name).container == "model.layers.3.mlp.experts"
    assert split_expert("layers.0.moe.experts.2.mlp.w1") == ("layers.0.moe.experts.mlp.w1", 2)
    for other in (
        "model.layers.3.mlp.experts.gate_up_proj",
        "layers.1.mlp.shared_experts.0.up_proj",
        "layers.1.q_proj",
    ):
        assert split_expert(other) is None
    assert name_expert("layers.0.moe.input_linear.weight", 2) is None
    assert HAS_FUSED == any(row.form == "expert" for row in find_submodules(tiny_mixtral(1), experts=True))
    assert Blueprint("m", find_with_norms(tiny_mixtral(1))).coarsen("layer").names == ("layer.0",)


def find_with_norms(model):
    return tuple(replace(row, gradient_norm=1.0) for row in find_submodules(model, experts=True))
