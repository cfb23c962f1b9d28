"""Initialize adapters along the gradient: A's directions, and that nothing else changes."""

from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_blueprint import BlueprintConfig, initialize_along_gradient, measure_influence
from peft_blueprint.errors import MeasurementError, PlacementError
from peft_blueprint.measure import make_batches
from peft_blueprint.measure.losses import per_example_losses
from peft_blueprint.testing import (
    quantize,
    randomize_adapters,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_t5,
    tiny_vit,
    toy_batches,
)
from tests.processes import error_of


BASE = "base_model.model."


def adapted(model, rank=4, targets="all-linear", **settings):
    """A model with fresh adapters."""
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=rank, target_modules=targets, **settings))


def begin(model, batches=None, **settings):
    """Initialize without a progress bar; returns the number of modules."""
    return initialize_along_gradient(model, batches or toy_batches(), progress=False, **settings)


def rows_of(model):
    """Every A, (r, d_in), by the name of its submodule."""
    return {
        name.removeprefix(BASE).partition(".lora_A")[0]: p.detach().clone()
        for name, p in model.named_parameters()
        if "lora_A" in name
    }


def energy(gradient, rows):
    """Share of a gradient's energy, its squared Frobenius norm, along some rows."""
    basis = torch.linalg.qr(rows.float().mT).Q
    return float((gradient @ basis).square().sum() / gradient.square().sum())


@pytest.fixture(scope="module")
def gradients():
    """Mean gradients of the tiny Llama's submodules, exactly."""
    found = measure_influence(tiny_llama(), toy_batches(), sketch_size=None, projection_size=0, progress=False)
    return {s.name: gradient for s, gradient in zip(found.submodules, found.sketches, strict=True)}


def test_a_points_along_the_gradient_and_nothing_else_changes(gradients):
    """Near the optimum, far from chance; outputs, B, flags, gradients and the random state stay as they were."""
    model = adapted(tiny_llama(), lora_dropout=0.5).train()
    inputs = {key: value for key, value in toy_batches()[0].items() if key != "labels"}
    with torch.no_grad():
        before = model.eval()(**inputs).logits
    model.train()
    own, state = rows_of(model), torch.random.get_rng_state()
    assert begin(model) == len(gradients) == 28
    assert torch.equal(state, torch.random.get_rng_state()) and model.training
    assert all(p.requires_grad == ("lora_" in name) and p.grad is None for name, p in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(before, model.eval()(**inputs).logits)
    shares = {"best": 0.0, "begun": 0.0, "chance": 0.0}
    for name, rows in rows_of(model).items():
        values = torch.linalg.svdvals(gradients[name]).square()
        shares["best"] += float(values[:4].sum() / values.sum()) / 28
        shares["begun"] += energy(gradients[name], rows) / 28
        shares["chance"] += energy(gradients[name], own[name]) / 28
        assert rows.norm(dim=1) == pytest.approx(own[name].norm(dim=1).mean().expand(4), rel=1e-5)
        products = (rows @ rows.mT) / rows.norm(dim=1).square().mean()
        assert torch.allclose(products, torch.eye(4), atol=1e-4), "orthogonal"
    assert shares["begun"] > 0.6 * shares["best"] > 2.5 * shares["chance"]


def test_with_as_many_rows_as_the_gradient_has_directions_nothing_is_missed(gradients):
    """The sketch is of the mean gradient, however the examples are batched; the seed is that of the sketch."""
    name = next(name for name in gradients if name.endswith("layers.1.self_attn.k_proj"))
    rank = min(gradients[name].shape)
    model = adapted(tiny_llama(), rank, [name])
    begin(model)
    assert energy(gradients[name], rows_of(model)[name]) == pytest.approx(1, abs=1e-5)
    few = [adapted(tiny_llama(), 2, [name]) for _ in range(3)]
    batches = [{key: value[:1] for key, value in toy_batches()[0].items()}]
    begin(few[0], batches)
    begin(few[1], toy_batches(), max_examples=1)
    begin(few[2], batches, seed=1)
    found = [rows_of(one)[name] for one in few]
    assert torch.allclose(found[0].abs(), found[1].abs(), atol=1e-4) and not torch.allclose(*found[1:], atol=1e-2)


def test_it_learns_faster_than_from_a_random_start():
    """Five steps of Adam on the same examples, the rest being equal."""

    def losses(is_along: bool) -> list[float]:
        model = adapted(tiny_llama(), 2, lora_alpha=4)
        if is_along:
            begin(model)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for _ in range(6):
            mean = torch.cat([per_example_losses(model, batch)[0] for batch in toy_batches()]).mean()
            mean.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(mean.detach()))
        return found

    along, random = losses(True), losses(False)
    assert along[0] == pytest.approx(random[0]) and all(a > b for a, b in pairwise(along))
    assert along[0] - along[-1] > 1.2 * (random[0] - random[-1])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_on_a_quantised_base_that_stays_as_it_is(kind):
    """QLoRA: A follows the quantised model's gradient, and the weights stay equal bit by bit."""
    pytest.importorskip("bitsandbytes")
    base = quantize(tiny_llama(), kind)
    found = measure_influence(base, toy_batches(), sketch_size=None, projection_size=0, progress=False)
    model = adapted(base)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    old = rows_of(model)
    assert begin(model) == len(old)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    rows = rows_of(model)
    gradients = {s.name: gradient for s, gradient in zip(found.submodules, found.sketches, strict=True)}
    shares = [sum(energy(gradients[name], some[name]) for name in gradients) for some in (rows, old)]
    assert shares[0] > 3 * shares[1]


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_under_gradient_checkpointing(is_reentrant):
    """The directions are those without checkpointing."""
    plain, checkpointed = adapted(tiny_llama()), adapted(tiny_llama())
    checkpointed.base_model.model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
    begin(plain)
    begin(checkpointed.train())
    for name, rows in rows_of(plain).items():
        assert torch.allclose(rows, rows_of(checkpointed)[name], atol=1e-4), name


def test_each_fused_expert_is_initialized_along_its_own_gradient():
    """An expert's rows follow its own gradient; an expert without tokens keeps its random rows."""
    model = tiny_mixtral()
    name = next(n for n, p in model.named_parameters() if n.endswith("experts.gate_up_proj"))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_parameters=[name]))
    [before] = rows_of(wrapped).values()
    assert begin(wrapped) == 1
    [rows] = rows_of(wrapped).values()
    own, parameter = tiny_mixtral(), name
    losses = [per_example_losses(own, batch)[0].sum() for batch in toy_batches()]
    torch.stack(losses).sum().backward()
    experts = own.get_parameter(parameter).grad
    parts, old = rows.view(len(experts), 2, -1), before.view(len(experts), 2, -1)
    for gradient, part, was in zip(experts, parts, old, strict=True):
        if gradient.any():
            facing = gradient if gradient.shape[1] == part.shape[1] else gradient.mT
            assert energy(facing, part) > 1.5 * energy(facing, was)
        else:
            assert torch.equal(part, was)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_t5, tiny_vit])
def test_on_other_models(make):
    """Weights that are stored transposed, encoder-decoders, and images."""
    model = make()
    targets = [name for name, m in model.named_modules() if name.split(".")[-1] in ("c_attn", "q", "query", "q_proj")]
    batches = toy_batches()
    if make is tiny_vit:
        images = torch.randn(2, 3, model.config.image_size, model.config.image_size)
        batches = [{"pixel_values": images, "labels": torch.tensor([0, 1])}]
    assert targets and begin(adapted(model, 2, targets, fan_in_fan_out=make is tiny_gpt2), batches) == len(targets)


def test_with_a_blueprints_placement(blueprint):
    """Placed by a blueprint, then initialized along the gradient, as in the README."""
    config = BlueprintConfig(blueprint=blueprint, ranks="equal_parameters", r=2, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(layers=12), config)
    assert begin(model, max_examples=2) == len(config.target_modules) == 12


def begun_alone():
    """Every A after one process has seen all examples."""
    torch.manual_seed(3)
    model = get_peft_model(tiny_llama(layers=2), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    begin(model, max_examples=None)
    return rows_of(model)


def in_processes(rank):
    """Begin on every second batch with an own A; then nothing in one process, an error in one, and two seeds."""
    torch.manual_seed(3 + rank)
    model = get_peft_model(tiny_llama(layers=2), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    begin(model, toy_batches()[rank::2], max_examples=None)
    without_targets = make_batches([{"input_ids": [1, 2], "labels": [-100, -100]}], 1, 0)
    errors = [
        error_of(lambda: begin(model, toy_batches() if rank else iter(()))),
        error_of(lambda: begin(model, toy_batches() if rank else without_targets)),
        error_of(lambda: begin(model, seed=rank)),
    ]
    return rows_of(model), errors


def test_refused_adapters_are_left_as_they_were():
    """Another name, a trained, inactive or merged adapter, no data, NaN; the adapter stays as it was."""
    with pytest.raises(PlacementError, match=r"has no LoRA adapter 'default' on linear layers; its adapters: none"):
        begin(tiny_llama())
    model = adapted(tiny_llama())
    before = rows_of(model)
    with pytest.raises(PlacementError, match=r"no LoRA adapter 'other'.*its adapters: 'default'"):
        begin(model, adapter_name="other")
    with pytest.raises(MeasurementError, match="max_examples must be a positive integer or None, got 0"):
        begin(model, max_examples=0)
    with pytest.raises(MeasurementError, match="yields nothing|are empty"):
        begin(model, iter(()))
    with pytest.raises(MeasurementError, match="no target"):
        begin(model, make_batches([{"input_ids": [1, 2], "labels": [-100, -100]}], 1, 0))
    with pytest.raises(MeasurementError, match="The gradient of every adapter is zero"):
        begin(model, loss_fn=lambda m, batch: 0 * m(batch["input_ids"]).logits.mean((1, 2)))
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(PlacementError, match=r"'second' is inactive or merged in .*set_adapter\('second'\)"):
        begin(model, adapter_name="second")
    model.delete_adapter("second")
    with model.disable_adapter(), pytest.raises(PlacementError, match="is inactive or merged in"):
        begin(model)
    images = adapted(tiny_vit(), 2, ["projection"])
    with pytest.raises(PlacementError, match=r"is only on .*projection.*, which are not linear layers"):
        begin(images)
    broken = model.get_submodule(BASE + "model.layers.2.mlp.down_proj").base_layer.weight
    kept = broken.detach().clone()
    with torch.no_grad():
        broken[0, 0] = float("nan")
    with pytest.raises(MeasurementError, match="infinite or NaN"):
        begin(model)
    with torch.no_grad():
        broken.copy_(kept)
    assert all(torch.equal(rows, before[name]) for name, rows in rows_of(model).items())
    assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
    with pytest.raises(PlacementError, match="B must be zero, and is not in .* was trained"):
        begin(randomize_adapters(model))


def test_weights_that_zero_3_partitioned_are_refused():
    """DeepSpeed gives each parameter its whole shape as `ds_shape`."""
    model = get_peft_model(tiny_llama(2), LoraConfig(r=2, target_modules=["q_proj"]))
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
    with pytest.raises(PlacementError, match="are sharded. Call this before the model is sharded"):
        initialize_along_gradient(model, toy_batches(), progress=False)
