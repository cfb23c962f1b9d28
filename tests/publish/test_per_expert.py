"""Adapters of fused experts under the names of single experts."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_blueprint import BlueprintConfig
from peft_blueprint.errors import BlueprintError
from peft_blueprint.place import Placement
from peft_blueprint.publish import export_for_server, export_per_expert_lora
from peft_blueprint.testing import randomize_adapters, tiny_gpt_oss, tiny_llama, tiny_mixtral, tiny_qwen3_moe
from tests.fused import needs_fused


ignores_patterns = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
)
TOKENS = torch.arange(1, 11)[None]


@needs_fused
@ignores_patterns
@pytest.mark.parametrize(
    ("build", "kind", "down"), [(tiny_mixtral, "mixtral", "w2"), (tiny_qwen3_moe, "qwen3_moe", "down_proj")]
)
def test_plain_peft_loads_the_same_adapter_under_other_names(build, kind, down, tmp_path):
    """Every expert has one, of zeros where none was chosen; the rank is uniform."""
    experts = [
        f"model.layers.0.mlp.experts.{number}.{weight}"
        for number in (1, 2)
        for weight in ("gate_up_proj", "down_proj")
    ]
    lora = ("model.layers.0.self_attn.q_proj", *experts)
    placement = Placement("m", lora, (), "x", "none", target_parameters=tuple(experts), rank=2, ranks={lora[0]: 4})
    model = randomize_adapters(get_peft_model(build(1), BlueprintConfig(placement=placement)))
    model.save_pretrained(tmp_path / "adapter")
    out = export_per_expert_lora(tmp_path / "adapter", tmp_path / "served", kind)
    tensors = load_file(out / "adapter_model.safetensors")
    assert len(tensors) == 2 * (1 + 3 * 4)
    own = {name.split("experts.")[1][0] for name, tensor in tensors.items() if "experts" in name and tensor.any()}
    assert own == {"1", "2"} and {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {4}
    assert any(name.endswith(f"experts.3.{down}.lora_B.weight") for name in tensors)
    assert json.loads((out / "adapter_config.json").read_text())["target_parameters"] is None
    with torch.no_grad():
        found = PeftModel.from_pretrained(build(1), out).eval()(TOKENS).logits
        torch.testing.assert_close(found, model.eval()(TOKENS).logits)


@needs_fused
@ignores_patterns
@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_an_adapter_on_one_parameter_gets_zeros_on_the_other(parameter, tmp_path):
    """A placement by score may have one alone; vLLM wants all matrices of an expert. Its fused form needs both."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=["experts." + parameter])
    model = randomize_adapters(get_peft_model(tiny_qwen3_moe(1), config))
    model.save_pretrained(tmp_path / "adapter")
    out = export_per_expert_lora(tmp_path / "adapter", tmp_path / "served", "qwen3_moe")
    tensors = load_file(out / "adapter_model.safetensors")
    own = {"down_proj"} if parameter == "down_proj" else {"gate_proj", "up_proj"}
    assert len(tensors) == 2 * 3 * 4 and {name.split(".")[-3] for name, t in tensors.items() if t.any()} == own
    with torch.no_grad():
        found = PeftModel.from_pretrained(tiny_qwen3_moe(1), out).eval()(TOKENS).logits
        torch.testing.assert_close(found, model.eval()(TOKENS).logits)
    with pytest.raises(BlueprintError, match=f"experts.{parameter}' alone, and vLLM's class of this model needs"):
        export_for_server(tmp_path / "adapter", tmp_path / "out", "vllm", model=tiny_gpt_oss(1).config)


@needs_fused
def test_adapters_and_models_without_such_names_are_refused(tmp_path):
    get_peft_model(tiny_llama(1), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "dense")
    with pytest.raises(BlueprintError, match="adapts no fused experts. Use export_uniform_lora"):
        export_per_expert_lora(tmp_path / "dense", tmp_path / "out", "llama")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(tiny_mixtral(1), LoraConfig(r=2, target_modules=[], target_parameters=parameters))
    model.save_pretrained(tmp_path / "fused")
    with pytest.raises(BlueprintError, match="gpt_oss models have no single experts by name"):
        export_per_expert_lora(tmp_path / "fused", tmp_path / "out", "gpt_oss")
    with pytest.raises(BlueprintError, match="names no base model.*or a model_type"):
        export_per_expert_lora(tmp_path / "fused", tmp_path / "out")
    with pytest.raises(BlueprintError, match="must not be the adapter's own folder"):
        export_per_expert_lora(tmp_path / "fused", tmp_path / "fused", "mixtral")
    assert not (tmp_path / "out").exists()
