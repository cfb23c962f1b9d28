"""A model that accelerate keeps in memory or on a disk is measured as one at hand. Run: pytest tests/measure/test_offload.py"""

import accelerate
import pytest
import torch

from peft_blueprint import generate_blueprint, measure_influence
from peft_blueprint.testing import tiny_llama, tiny_mixtral, toy_batches


def measured(model, batches, include):
    return measure_influence(model, batches, include=include, sketch_size=8, progress=False)


def on_cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu")


def on_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device="cpu")


def on_both(model, folder):
    """As `device_map` leaves a model: some blocks at hand, some on a disk."""
    places = {"": "cpu", "model.layers.1": "disk", "model.layers.2": "disk", "model.norm": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral])
@pytest.mark.parametrize("include", ["adaptable", "all"])
@pytest.mark.parametrize("offload", [on_cpu, on_disk, on_both])
def test_offloaded_weights_are_measured_where_they_are(build, include, offload, tmp_path):
    """As on the plain model, to the last bit; weights go back to where they were, trainable and fit to run."""
    plain, batches = build(layers=3), toy_batches()
    plain.model.layers[0].requires_grad_(False)
    expected = measured(plain, batches, include)
    model = build(layers=3)
    model.model.layers[0].requires_grad_(False)
    model = offload(model, tmp_path)
    places = {name: (p.device.type, p.requires_grad) for name, p in model.named_parameters()}
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    assert "meta" in {device for device, _ in places.values()} and {True, False} == {t for _, t in places.values()}
    for _ in range(2):
        influence = measured(model, batches, include)
        assert influence.submodules == expected.submodules and influence.unmeasured == expected.unmeasured
        assert torch.equal(influence.norms, expected.norms)
        assert places == {name: (p.device.type, p.requires_grad) for name, p in model.named_parameters()}
        assert forwards == {name: vars(module).get("forward") for name, module in model.named_modules()}
        assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, plain(**batches[0]).logits)


def test_an_offloaded_model_has_the_plain_ones_blueprint(tmp_path):
    """Norms of offloaded weights included, and with gradient checkpointing, which fetches weights a second time."""
    expected = generate_blueprint(tiny_llama(), toy_batches(), progress=False, bootstrap=20)
    model = on_both(tiny_llama().train(), tmp_path)
    model.gradient_checkpointing_enable()
    blueprint = generate_blueprint(model, toy_batches(), progress=False, bootstrap=20)
    assert blueprint.submodules == expected.submodules and blueprint.model_digest == expected.model_digest
