"""Adapters as servers load them: by each server's rules, and by the real loaders where these are installed."""

import json
import os
import re
import shlex
import subprocess
import sys
import types

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig

from peft_blueprint import BlueprintError
from peft_blueprint.place import SERVER_RANKS
from peft_blueprint.publish import export_for_server
from peft_blueprint.publish.uniform_rank import CONFIG_NAME, TENSORS_NAME
from peft_blueprint.testing import randomize_adapters, save_tiny_model, tiny_llama, tiny_mixtral
from tests.fused import needs_fused


TOKENS = torch.arange(1, 11)[None]
LAYER = "model.layers.{}."
PLACED = {  # of one layer each, as a sparse placement leaves them
    LAYER.format(0) + "self_attn.q_proj": 24,
    LAYER.format(1) + "self_attn.v_proj": 8,
    LAYER.format(2) + "mlp.up_proj": 8,
    LAYER.format(3) + "mlp.down_proj": 8,
}
SERVERS = ("vllm", "sglang", "tgi", "lorax", "llama.cpp", "ollama")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A base model in a folder, a random adapter with two ranks, and the logits with and without it."""
    folder = tmp_path_factory.mktemp("served")
    save_tiny_model(folder / "base", layers=4)
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=list(PLACED),
        rank_pattern={"q_proj": 24},
        alpha_pattern={"q_proj": 48},
        task_type="CAUSAL_LM",
    )
    model = randomize_adapters(get_peft_model(tiny_llama(layers=4), config)).eval()
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return folder, logits(model)


@pytest.fixture(scope="module")
def exports(adapter, tmp_path_factory):
    """The adapter as each server gets it."""
    out = tmp_path_factory.mktemp("exports")
    return {server: export_for_server(adapter[0] / "adapter", out / server, server) for server in SERVERS}


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def pairs_in(path):
    """A and B of every module in a folder, by the module's name."""
    found = {}
    for key, tensor in load_file(path / TENSORS_NAME).items():
        module, side = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key).groups()
        found.setdefault(module, {})[side] = tensor
    return found


def of_layer(pairs, layer):
    """Last parts of the names that are adapted in a layer."""
    return {name.rpartition(".")[2] for name in pairs if name.startswith(LAYER.format(layer))}


@pytest.mark.parametrize("server", SERVERS)
def test_an_export_computes_the_same_with_one_rank(server, exports, adapter):
    """PEFT loads it with all its zeros, and the logits agree."""
    export = exports[server]
    loaded = PeftModel.from_pretrained(tiny_llama(layers=4), export.path)
    assert (logits(loaded) - adapter[1]).abs().max() <= 1e-5 * adapter[1].abs().max()
    config, pairs = json.loads((export.path / CONFIG_NAME).read_text()), pairs_in(export.path)
    assert config["r"] == export.rank == 24 and not config["rank_pattern"] and not config["alpha_pattern"]
    assert config["target_modules"] == sorted(pairs) == sorted({*PLACED, *export.added})
    assert all(pair["A"].shape[0] == pair["B"].shape[1] == 24 for pair in pairs.values())
    for name in export.added:
        assert not pairs[name]["A"].any() and not pairs[name]["B"].any()
    adapters = [module.lora_A["default"].weight for module in loaded.modules() if hasattr(module, "lora_A")]
    assert len(adapters) == len(pairs) and sum(bool(a.any()) for a in adapters) == len(PLACED)


def test_sglang_finds_what_it_joins(exports):
    """q, k and v of a layer together, gate and up together; nothing else."""
    pairs = pairs_in(exports["sglang"].path)
    attention, mlp = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
    assert [of_layer(pairs, layer) for layer in range(4)] == [attention, attention, mlp, {"down_proj"}]
    [command] = exports["sglang"].commands
    kinds = command.partition("--lora-target-modules ")[2].split()
    assert kinds == sorted({*attention, *mlp, "down_proj"}) and "--max-lora-rank 24 " in command


@pytest.mark.parametrize("server", ["tgi", "lorax"])
def test_tgi_and_lorax_find_a_kind_in_every_layer(server, exports):
    """Each kind that is adapted anywhere, in all four layers."""
    pairs = pairs_in(exports[server].path)
    assert all(of_layer(pairs, layer) == {"q_proj", "v_proj", "up_proj", "down_proj"} for layer in range(4))


def test_vllm_reserves_a_rank_that_it_knows(exports, adapter, tmp_path):
    """The next one up in its list; no zeros; a rank above the list is refused."""
    export = exports["vllm"]
    words = shlex.split(export.commands[0])
    reserved = int(words[words.index("--max-lora-rank") + 1])
    assert reserved in SERVER_RANKS and reserved == 32 and not export.added
    assert words[words.index("--lora-modules") + 1] == f"vllm={export.path}"
    assert export.notes == (
        "vLLM reserves rank 32 on every layer for each adapter of a batch: 2 times the memory of rank 16.",
    )
    with pytest.raises(BlueprintError, match="vLLM serves ranks up to 512, got 513"):
        export_for_server(adapter[0] / "adapter", tmp_path / "out", "vllm", rank=513)


def test_llama_cpp_scales_by_the_rows_of_a(exports, adapter):
    """alpha over the rank in the tensor is PEFT's scaling for every module, and Ollama is told what it would transpose."""
    for server in ("llama.cpp", "ollama"):
        export = exports[server]
        config, pairs = json.loads((export.path / CONFIG_NAME).read_text()), pairs_in(export.path)
        assert {config["lora_alpha"] / pair["A"].shape[0] for pair in pairs.values()} == {2.0}
        assert export.commands[0].startswith("python convert_lora_to_gguf.py ") and not export.added
        tall = [name for name, p in pairs.items() if 24 > min(p["A"].shape[1], p["B"].shape[0])]
        assert tall == [LAYER.format(1) + "self_attn.v_proj"]  # 16 x 32
        told = [note for note in export.notes if "Do not give Ollama the folder itself" in note]
        assert len(told) == (server == "ollama") and all(repr(tall[0]) in note for note in told)


@needs_fused
def test_what_a_server_cannot_load_is_refused(adapter, tmp_path):
    """Another server, fused experts, an adapter that acts from an invocation on, and another base model."""
    folder, out = adapter[0] / "adapter", tmp_path / "out"
    with pytest.raises(BlueprintError, match="server must be one of vllm, .* got 'triton'"):
        export_for_server(folder, out, "triton")
    experts = ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]
    fused = get_peft_model(tiny_mixtral(), LoraConfig(r=2, target_modules=[], target_parameters=experts))
    fused.save_pretrained(tmp_path / "fused")
    assert export_for_server(tmp_path / "fused", tmp_path / "experts", "vllm").path.exists()
    with pytest.raises(BlueprintError, match=r"adapts fused experts \(.*\), which only vLLM loads, not sglang"):
        export_for_server(tmp_path / "fused", out, "sglang")
    with pytest.raises(BlueprintError, match="names no base model. Give one, on the command line as --model"):
        export_for_server(saved_with(folder, tmp_path / "a", base_model_name_or_path=None), out, "tgi")
    activated = saved_with(folder, tmp_path / "b", alora_invocation_tokens=[1])
    with pytest.raises(
        BlueprintError, match="acts from its invocation tokens on, which only llama.cpp can do, not vllm"
    ):
        export_for_server(activated, out, "vllm")
    with pytest.raises(BlueprintError, match="'model.layers.2.mlp.up_proj', .* which the base model does not have"):
        export_for_server(folder, out, "lorax", model=tiny_llama(layers=2).config)
    assert not out.exists()


def saved_with(folder, out, **changes):
    """A copy of an adapter with another config."""
    out.mkdir()
    (out / TENSORS_NAME).write_bytes((folder / TENSORS_NAME).read_bytes())
    (out / CONFIG_NAME).write_text(json.dumps(json.loads((folder / CONFIG_NAME).read_text()) | changes))
    return out


# ---- the servers' own loaders: pytest -m servers, in an environment with the group of that server


@pytest.mark.servers
def test_vllm_loads_it(exports):
    """PEFTHelper accepts the config within the printed rank, and LoRAModel reads the tensors."""
    helpers = pytest.importorskip("vllm.lora.peft_helper")
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel

    path = str(exports["vllm"].path)
    helper = helpers.PEFTHelper.from_local_dir(path, 128)
    helper.validate_legal(LoRAConfig(max_lora_rank=32))
    assert helper.vllm_lora_scaling_factor == 2.0
    with pytest.raises(ValueError, match="greater than max_lora_rank"):
        helper.validate_legal(LoRAConfig(max_lora_rank=16))
    kinds = {name.rpartition(".")[2] for name in PLACED}
    model = LoRAModel.from_local_checkpoint(path, kinds, helper, lora_model_id=1, device="cpu", dtype=torch.float32)
    assert set(model.loras) == set(PLACED)


@pytest.mark.servers
def test_sglang_loads_it(exports, adapter):
    """LoRAAdapter joins q, k and v, and gate and up, and drops nothing; it fails on the adapter as it was."""
    lora = pytest.importorskip("sglang.srt.lora.lora")
    from sglang.srt.configs.load_config import LoadConfig

    def joined(path):
        base = AutoConfig.from_pretrained(adapter[0] / "base")
        backend = types.SimpleNamespace(name="triton")
        loaded = lora.LoRAAdapter("tiny", lora.LoRAConfig(str(path)), base, LoadConfig(), backend)
        loaded.initialize_weights()
        kinds = [{re.search(r"\w+(?=\.lora_)", key)[0] for key in layer.weights} for layer in loaded.layers]
        return loaded.scaling, kinds

    assert joined(exports["sglang"].path) == (2.0, [{"qkv_proj"}, {"qkv_proj"}, {"gate_up_proj"}, {"down_proj"}])
    with pytest.raises(KeyError, match="v_proj"):
        joined(adapter[0] / "adapter")


@pytest.mark.servers
def test_llama_cpp_converts_it(exports, adapter):
    """Its script, from the checkout that LLAMA_CPP names, writes both matrices of each module."""
    gguf = pytest.importorskip("gguf")
    checkout = os.environ.get("LLAMA_CPP") or pytest.skip("LLAMA_CPP names no checkout of llama.cpp")
    path = exports["llama.cpp"].path
    script, base, file = f"{checkout}/convert_lora_to_gguf.py", adapter[0] / "base", path / "adapter.gguf"
    subprocess.run([sys.executable, script, path, "--base", base, "--outfile", file], check=True)
    read = gguf.GGUFReader(file)
    assert len(read.tensors) == 2 * len(PLACED) and read.fields["adapter.lora.alpha"].contents() == 48
