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
from peft_blueprint.testing import randomize_adapters, save_tiny_model, tiny_gpt_oss, tiny_llama, tiny_mixtral
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


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Adapters on the fused experts of one layer of Mixtral, and on q of another, as vLLM and SGLang get them."""
    folder = tmp_path_factory.mktemp("mixture")
    targets = [f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    config = LoraConfig(r=4, target_modules=["model.layers.0.self_attn.q_proj"], target_parameters=targets)
    model = randomize_adapters(get_peft_model(tiny_mixtral(layers=2), config))
    model.base_model.model.config.save_pretrained(folder / "base")
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    served = {s: export_for_server(folder / "adapter", folder / s, s) for s in ("vllm", "sglang")}
    return folder, served


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


def test_sglang_finds_the_modules_it_joins(exports):
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
    """alpha over the tensor's rank is PEFT's scaling for every module; a note on Ollama names matrices it would transpose."""
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
def test_fused_experts_are_written_as_the_server_names_them(mixture, tmp_path):
    """One adapter for each expert and matrix; PEFT's form for a class of vLLM that reads it."""
    folder, served = mixture
    linear = {"model.layers.0.self_attn.q_proj"}
    for server, block, matrices in (
        ("vllm", "block_sparse_moe", ("w1", "w2", "w3")),
        ("sglang", "block_sparse_moe", ("gate_proj", "up_proj", "down_proj")),
    ):
        of_experts = {f"model.layers.1.{block}.experts.{n}.{matrix}" for n in range(4) for matrix in matrices}
        assert set(pairs_in(served[server].path)) == linear | of_experts | set(served[server].added)
    assert "--lora-target-modules down_proj gate_proj k_proj q_proj up_proj v_proj" in served["sglang"].commands[0]
    whole = export_for_server(folder / "adapter", tmp_path / "whole", "vllm", model=tiny_gpt_oss(1).config)
    assert set(pairs_in(whole.path)) == linear | {f"model.layers.1.mlp.experts{end}" for end in ("", ".base_layer")}
    with pytest.raises(BlueprintError, match="gpt_oss models have no single experts by name. Serve .* or merge it"):
        export_for_server(folder / "adapter", tmp_path / "out", "sglang", model=tiny_gpt_oss(2).config)
    with pytest.raises(BlueprintError, match=r"adapts fused experts \(.*\), which vllm and sglang load, not tgi"):
        export_for_server(folder / "adapter", tmp_path / "out", "tgi")
    assert not (tmp_path / "out").exists()


def test_adapters_that_a_server_cannot_load_are_refused(adapter, tmp_path):
    """Another server, an adapter that acts from an invocation on, and another base model."""
    folder, out = adapter[0] / "adapter", tmp_path / "out"
    with pytest.raises(BlueprintError, match="server must be one of vllm, .* got 'triton'"):
        export_for_server(folder, out, "triton")
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
def test_vllm_loads_it(exports, mixture, monkeypatch):
    """PEFTHelper accepts the config within the printed rank, LoRAModel reads the tensors, and experts are packed."""
    helpers = pytest.importorskip("vllm.lora.peft_helper")
    from vllm.config.lora import LoRAConfig
    from vllm.lora import lora_model
    from vllm.lora.lora_weights import PackedLoRALayerWeights

    monkeypatch.setattr(lora_model, "PIN_MEMORY", False)  # which vLLM's build for GPUs takes for granted

    def loaded(path, expected):
        helper = helpers.PEFTHelper.from_local_dir(str(path), 128)
        helper.validate_legal(LoRAConfig(max_lora_rank=32))
        read = lora_model.LoRAModel.from_local_checkpoint
        return helper, read(str(path), expected, helper, lora_model_id=1, device="cpu", dtype=torch.float32).loras

    helper, loras = loaded(exports["vllm"].path, {name.rpartition(".")[2] for name in PLACED})
    assert helper.vllm_lora_scaling_factor == 2.0 and set(loras) == set(PLACED)
    with pytest.raises(ValueError, match="greater than max_lora_rank"):
        helper.validate_legal(LoRAConfig(max_lora_rank=16))
    names = [
        f"experts.{expert}.{matrix}" for expert in range(4) for matrix in ("w1", "w2", "w3")
    ]  # as vLLM orders them
    _, loras = loaded(mixture[1]["vllm"].path, {"q_proj", *names})
    holder = "model.layers.1.block_sparse_moe."
    packed = PackedLoRALayerWeights.pack_moe([loras[holder + name] for name in names], f"{holder}experts")
    assert [tuple(a.shape) for a in packed.lora_a] == [(4, 4, 32), (4, 4, 24), (4, 4, 32)]


@pytest.mark.servers
def test_sglang_loads_it(exports, adapter, mixture):
    """LoRAAdapter joins q, k and v, and gate and up, and drops nothing; it fails on the adapter as it was."""
    lora = pytest.importorskip("sglang.srt.lora.lora")
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.runtime_context import get_context

    def joined(path, base):
        backend = types.SimpleNamespace(name="triton")
        config = AutoConfig.from_pretrained(base)
        with get_context().override_server_args():
            loaded = lora.LoRAAdapter("tiny", lora.LoRAConfig(str(path)), config, LoadConfig(), backend)
            loaded.initialize_weights()
        kinds = [{re.search(r"[\w.]*?(\w+)(?=\.lora_)", key)[1] for key in layer.weights} for layer in loaded.layers]
        return loaded.scaling, kinds

    expected = [{"qkv_proj"}, {"qkv_proj"}, {"gate_up_proj"}, {"down_proj"}]
    assert joined(exports["sglang"].path, adapter[0] / "base") == (2.0, expected)
    with pytest.raises(KeyError, match="v_proj"):
        joined(adapter[0] / "adapter", adapter[0] / "base")
    assert joined(mixture[1]["sglang"].path, mixture[0] / "base")[1] == [{"qkv_proj"}, {"gate_up_proj", "down_proj"}]


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
