"""4-bit weights that bitsandbytes rearranges for CPUs that multiply bfloat16, which would cut gradients off.

Any CPU can rearrange a weight, so that these tests need none that does it by itself. Run alone: pytest tests/test_packing.py
"""

import pytest
import torch

from peft_blueprint import measure_influence
from peft_blueprint.measure.bnb_cpu import disable_cpu_repack, undo_cpu_repack
from peft_blueprint.measure.loading import load_model
from peft_blueprint.measure.submodules import dequantized_weight, linear_modules, shape_of
from peft_blueprint.testing import quantize, save_tiny_model, tiny_llama, toy_batches


pytest.importorskip("bitsandbytes")

SWITCH = "support_avx512bf16_for_cpu"
WIDE = {"layers": 2, "hidden_size": 128, "intermediate_size": 192}


def layers_of(model):
    """Its 4-bit layers."""
    return [module for module in model.modules() if type(module).__name__ == "Linear4bit"]


def packed(model):
    """A model whose every 4-bit weight is as bitsandbytes leaves it after a pass without gradients on such a CPU."""
    functional = pytest.importorskip("bitsandbytes.functional")
    if not hasattr(functional, "_convert_weight_packed_for_cpu"):
        pytest.skip("the installed bitsandbytes packs no weight")
    for layer in layers_of(model):
        weight = layer.weight
        weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
        setattr(layer, SWITCH, True)
    return model


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_rearranged_weight_is_put_back(kind, nested):
    """With its values, but for scales in bfloat16; with one level of scales or two; a second time changes nothing."""
    model = quantize(tiny_llama(**WIDE), kind, nested)
    before = [dequantized_weight(layer).clone() for layer in layers_of(model)]
    assert layers_of(model)[0].weight.quant_state.nested is nested
    for layer, values in zip(layers_of(packed(model)), before, strict=True):
        assert layer.weight.quant_state.packing_format_for_cpu
        torch.testing.assert_close(dequantized_weight(layer), values, rtol=1e-2, atol=1e-6)
        data = layer.weight.data
        undo_cpu_repack(layer.weight)
        assert layer.weight.data is data or torch.equal(layer.weight.data, data)


def test_a_model_that_was_evaluated_is_measured_by_its_weights():
    """Its norms are those of its dequantised values, and its layers may rearrange them again afterwards."""
    model, reference = packed(quantize(tiny_llama(**WIDE), "nf4")), tiny_llama(**WIDE)
    measured = measure_influence(model, toy_batches(), method="exact", progress=False)
    assert all(getattr(layer, SWITCH) for layer in layers_of(model))
    others = dict(linear_modules(reference))
    for name, layer in linear_modules(model):
        others[name].weight.data = dequantized_weight(layer).float().reshape(shape_of(others[name]))
    expected = measure_influence(reference, toy_batches(), method="exact", progress=False)
    torch.testing.assert_close(measured.norms, expected.norms, rtol=1e-4, atol=1e-6)


def test_a_model_that_is_loaded_to_be_trained_passes_gradients_after_an_evaluation(tmp_path):
    """A pass without gradients in evaluation mode leaves its 4-bit weights as they are, on any CPU."""
    save_tiny_model(tmp_path)
    model, _ = load_model(str(tmp_path), "float32", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    batch = toy_batches()[0]
    with torch.no_grad():
        model.eval()(**batch)
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    model.train()(
        inputs_embeds=embedded, attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss.backward()
    assert embedded.grad.abs().sum() > 0
    assert layers_of(model) and not any(getattr(layer, SWITCH, False) for layer in layers_of(model))


def test_weights_not_in_four_bits_are_left_alone():
    """An ordinary model has nothing to switch or to put back."""
    model = tiny_llama()
    assert disable_cpu_repack(model) == []
    undo_cpu_repack(model.lm_head.weight)
