"""Adapters of many ranks with one rank for all, for servers that know no patterns."""

import json
import math
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_blueprint import BlueprintError
from peft_blueprint.errors import FormatError
from peft_blueprint.publish.uniform_rank import CONFIG_NAME, TENSORS_NAME, export_uniform_lora
from peft_blueprint.testing import randomize_adapters, tiny_gpt2, tiny_llama, tiny_mixtral
from tests.fused import needs_fused


TOKENS = torch.arange(1, 11)[None]
NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]
SETTINGS = {
    "one rank": {},
    "ranks": {"rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 7, "up_proj": 2}},
    "ranks and alphas": {
        "rank_pattern": {"q_proj": 7, r"1\.mlp\.up_proj": 2},
        "alpha_pattern": {"down_proj": 3, "up_proj": 40},
    },
    "rsLoRA": {"use_rslora": True, "rank_pattern": {"q_proj": 7}},
}


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def saved(folder, base=tiny_llama, dtype=None, **settings):
    """A random adapter in a folder, and the logits it gives."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": NAMES} | settings)
    model = randomize_adapters(get_peft_model(base(), config, autocast_adapter_dtype=dtype is None))
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder)
    return model


def config_of(folder):
    return json.loads((folder / CONFIG_NAME).read_text())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("rank", [None, 9])
def test_the_export_computes_the_same_with_one_rank(tmp_path, settings, rank):
    """In float64 logits agree to 1e-12 of their size; the config has one rank, one alpha, no pattern and no rsLoRA."""
    expected = logits(saved(tmp_path / "many", dtype=torch.float64, **settings))
    out = export_uniform_lora(tmp_path / "many", tmp_path / "one", rank=rank)
    config = config_of(out)
    largest = max([4, *settings.get("rank_pattern", {}).values()])
    assert config["r"] == (rank or largest) and isinstance(config["lora_alpha"], int)
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    found = logits(PeftModel.from_pretrained(tiny_llama().double(), out))
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert not torch.allclose(found, logits(tiny_llama().double()), atol=0.1)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_servers_that_read_one_rank_and_one_alpha_get_the_same_weights(tmp_path, settings):
    """vLLM's scaling is the config's alpha / r, llama.cpp's alpha / rows of A: both give PEFT's change of each weight."""
    model = saved(tmp_path / "many", **settings)
    out = export_uniform_lora(tmp_path / "many", tmp_path / "one")
    config, tensors = config_of(out), load_file(out / TENSORS_NAME)
    assert {key.split(".lora_")[0].removeprefix("base_model.model.") for key in tensors} == set(NAMES)
    for name in NAMES:
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        expected = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        for scaling in (config["lora_alpha"] / config["r"], config["lora_alpha"] / a.shape[0]):
            torch.testing.assert_close(scaling * b @ a, expected, rtol=1e-5, atol=1e-6)


def test_a_common_scaling_is_kept_exactly(tmp_path):
    """With alpha_i / r_i constant, every number of A and B is the source's, beside zeros."""
    saved(tmp_path / "many", r=8, lora_alpha=16, rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 4})
    out = export_uniform_lora(tmp_path / "many", tmp_path / "one")
    before, after = (load_file(folder / TENSORS_NAME) for folder in (tmp_path / "many", out))
    for key, tensor in before.items():
        assert torch.equal(after[key][: tensor.shape[0], : tensor.shape[1]], tensor)
        assert after[key].count_nonzero() == tensor.count_nonzero()


def test_bfloat16_stays_bfloat16(tmp_path):
    """The dtype is the adapter's own; a ratio that is a power of two rounds nothing."""
    saved(tmp_path / "many", dtype=torch.bfloat16, r=8, lora_alpha=8, alpha_pattern={"up_proj": 16})
    out = export_uniform_lora(tmp_path / "many", tmp_path / "one", rank=16)
    before, after = (load_file(folder / TENSORS_NAME) for folder in (tmp_path / "many", out))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for key, tensor in before.items():
        factor = 2 if "up_proj.lora_B" in key else 1
        assert torch.equal(after[key][: tensor.shape[0], : tensor.shape[1]], factor * tensor)


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module")  # PEFT looks for them among modules only
@pytest.mark.filterwarnings("ignore:.*rank_pattern|.*alpha_pattern")
@pytest.mark.parametrize("ranks", [{}, {"gate_up_proj": 3}, {"down_proj": 5, "q_proj": 2}], ids=str)
@needs_fused
def test_fused_experts_are_widened_expert_by_expert(tmp_path, ranks):
    """Both parameters of a layer's experts, at ranks of their own, give the same logits at one rank."""
    experts = "model.layers.1.mlp.experts"
    targets = {
        "target_modules": ["model.layers.0.self_attn.q_proj"],
        "target_parameters": [f"{experts}.gate_up_proj", f"{experts}.down_proj"],
        "rank_pattern": ranks,
    }
    expected = logits(saved(tmp_path / "many", base=tiny_mixtral, **targets))
    out = export_uniform_lora(tmp_path / "many", tmp_path / "one", rank=6)
    found = logits(PeftModel.from_pretrained(tiny_mixtral(), out))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()  # no float64 in torch's product of experts
    assert (logits(tiny_mixtral()) - expected).abs().max() >= 1e-2 * expected.abs().max()
    tensors = load_file(out / TENSORS_NAME)
    assert tensors[f"base_model.model.{experts}.lora_A.weight"].shape[0] == 4 * 6


def test_embeddings_and_transposed_layers_are_widened_too(tmp_path):
    """GPT-2's Conv1D and its embedding, whose A and B have no `.weight`."""
    settings = {"target_modules": ["wte", "c_attn"], "rank_pattern": {"wte": 3}, "fan_in_fan_out": True}
    model = saved(
        tmp_path / "many", base=lambda: tiny_gpt2(tie_word_embeddings=False), dtype=torch.float64, **settings
    )
    for name, parameter in model.named_parameters():
        if "lora_embedding" in name:
            parameter.data.normal_(std=0.5)
    model.save_pretrained(tmp_path / "many", save_embedding_layers=False)
    expected = logits(model)
    out = export_uniform_lora(tmp_path / "many", tmp_path / "one")
    found = logits(PeftModel.from_pretrained(tiny_gpt2(tie_word_embeddings=False).double(), out))
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"DoRA's magnitudes .*Merge it into the model first"),
        ({"modules_to_save": ["model.layers.2.mlp"]}, r"fully trained modules .*Merge it"),
        ({"bias": "lora_only"}, r"trained biases \(bias='lora_only'\).*Merge it"),
        ({"init_lora_weights": "pissa"}, r"a base model changed by init_lora_weights='pissa'"),
    ],
)
def test_adapters_that_servers_refuse_are_refused(tmp_path, settings, message):
    """An error that names it and says to merge, instead of one when the server starts; nothing is written."""
    saved(tmp_path / "many", **settings)
    with pytest.raises(BlueprintError, match=message):
        export_uniform_lora(tmp_path / "many", tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_a_rank_that_would_cut_and_the_source_itself_are_refused(tmp_path):
    """Both sides are shown; the adapter stays as it is, also when it is named another way."""
    saved(tmp_path / "many", rank_pattern={"q_proj": 7})
    before = {path.name: path.read_bytes() for path in (tmp_path / "many").iterdir()}
    with pytest.raises(BlueprintError, match=r"rank must be at least 7, .* got 6"):
        export_uniform_lora(tmp_path / "many", tmp_path / "one", rank=6)
    with pytest.raises(BlueprintError, match="adapter's own folder"):
        export_uniform_lora(tmp_path / "many", tmp_path / "many" / ".." / "many")
    assert {path.name: path.read_bytes() for path in (tmp_path / "many").iterdir()} == before


def test_a_folder_without_an_adapter_is_named(tmp_path):
    """No config, not JSON, another method, no tensors, a tensor of something else, ranks that do not agree."""
    folder, out = tmp_path / "many", tmp_path / "one"
    with pytest.raises(FormatError, match="holds no adapter"):
        export_uniform_lora(folder, out)
    saved(folder)
    good, tensors = config_of(folder), load_file(folder / TENSORS_NAME)
    for config, message in [
        ("{", "cannot be read"),
        ("[]", "must be LORA, got None"),
        (json.dumps(good | {"peft_type": "IA3"}), "must be LORA, got IA3"),
        (json.dumps(good | {"r": None}), "has no number r"),
        (json.dumps(good | {"r": 3}), r"A of .* is \(4, 32\).*says rank 3"),
    ]:
        (folder / CONFIG_NAME).write_text(config)
        with pytest.raises(FormatError, match=message):
            export_uniform_lora(folder, out)
    (folder / CONFIG_NAME).write_text(json.dumps(good))
    for change, error, message in [
        (
            {"base_model.model.lm_head.weight": torch.ones(2)},
            BlueprintError,
            r"has 'base_model.model.lm_head.weight', and servers load only",
        ),
        ({"base_model.model.x.lora_A.weight": torch.ones(4, 2)}, FormatError, "x' has only .*not A and B"),
    ]:
        save_file(tensors | change, folder / TENSORS_NAME)
        with pytest.raises(error, match=message):
            export_uniform_lora(folder, out)
    save_file({}, folder / TENSORS_NAME)
    with pytest.raises(FormatError, match="no tensor of LoRA"):
        export_uniform_lora(folder, out)
    (folder / TENSORS_NAME).write_bytes(b"\x00" * 7)
    with pytest.raises(FormatError, match="cannot be read"):
        export_uniform_lora(folder, out)
    assert not out.exists()


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    """The tensors fail: the older export in the folder is whole, and nothing lies beside it."""
    saved(tmp_path / "many", rank_pattern={"q_proj": 7})
    out = export_uniform_lora(tmp_path / "many", tmp_path / "one")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(handle, mode):
        os.close(handle)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft_blueprint._files.os.fdopen", full)
    with pytest.raises(BlueprintError, match="cannot be written: .*No space left"):
        export_uniform_lora(tmp_path / "many", out, rank=20)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert math.isclose(config_of(out)["r"], 7)
