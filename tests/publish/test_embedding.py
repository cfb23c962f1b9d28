"""A blueprint in the model's own files."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from peft_blueprint import Blueprint, BlueprintError, Submodule
from peft_blueprint.blueprint import extract
from peft_blueprint.blueprint.header import read_metadata
from peft_blueprint.errors import FormatError, MismatchError
from peft_blueprint.measure.submodules import find_submodules
from peft_blueprint.publish.embedding import embed, remove
from peft_blueprint.publish.loaded_tensors import as_loaded
from peft_blueprint.publish.stored_tensors import check_stored
from peft_blueprint.testing import tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5
from tests import ROOT
from tests.records import rounded, to_header_text


def of(model, include="adaptable"):
    """A blueprint of a model, unmeasured."""
    entries = tuple(replace(s, gradient_norm=1.0 + i) for i, s in enumerate(find_submodules(model, include)))
    return Blueprint("tiny/model", entries)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The twelve-layer Llama of the fixture `blueprint` in one file, and in shards with an index."""
    model = tiny_llama(layers=12)
    folder = tmp_path_factory.mktemp("models")
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "sharded", max_shard_size="100kB")
    return folder


@pytest.fixture(params=["single", "sharded"])
def folder(request, saved, tmp_path):
    """A copy of either."""
    (tmp_path / "copy").mkdir()
    for path in (saved / request.param).iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "copy"


def state_of(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_embed_extract_remove(blueprint, folder):
    """The embedded blueprint comes out rounded; transformers loads the model as before; removing leaves the tensors."""
    before, model = state_of(folder), LlamaForCausalLM.from_pretrained(folder)
    changed = embed(blueprint, folder, progress=False)
    assert extract(folder) == rounded(blueprint)
    after, again = state_of(folder), LlamaForCausalLM.from_pretrained(folder)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert remove(folder, progress=False) == changed and remove(folder) == []
    with pytest.raises(BlueprintError, match="carries no blueprint.*peft-blueprint embed"):
        extract(folder)


def test_a_sharded_model_has_it_in_the_index_and_the_first_shard(blueprint, saved, tmp_path):
    """Under the same keys; all else in the index stays as it was, and either place alone is enough."""
    folder = copied(saved / "sharded", tmp_path / "sharded")
    index = folder / "model.safetensors.index.json"
    before, text = json.loads(index.read_text()), index.read_text()
    shards = sorted(folder.glob("model-*.safetensors"))
    assert embed(blueprint, folder, progress=False) == [shards[0], index]
    after = json.loads(index.read_text())
    added = {"blueprint.json": to_header_text(blueprint), "blueprint.version": "1"}
    assert after == before | {"metadata": before["metadata"] | added}
    assert added.items() <= read_metadata(shards[0]).items() and read_metadata(shards[1]) == {"format": "pt"}
    assert embed(blueprint, folder, progress=False) == []
    assert extract(shards[0]) == extract(index) == rounded(blueprint)
    for shard in shards:
        shard.unlink()
    assert extract(folder) == rounded(blueprint)
    index.write_text(text)
    with pytest.raises(BlueprintError, match="The file .*00001.* does not exist"):
        embed(blueprint, folder)
    assert index.read_text() == text


def copied(folder, to):
    """A copy of a model's files."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("act", ["embed", "embed another", "remove"])
def test_an_interruption_between_header_and_index_is_noticed(blueprint, saved, tmp_path, monkeypatch, act):
    """Readers warn until the same act is repeated."""
    folder = copied(saved / "sharded", tmp_path / "copy")
    if act != "embed":
        embed(blueprint, folder, progress=False)
    other = replace(blueprint, model_id="tiny/other")
    acts = {
        "embed": lambda: embed(blueprint, folder, progress=False),
        "embed another": lambda: embed(other, folder, progress=False),
        "remove": lambda: remove(folder, progress=False),
    }
    changes = iter([os.replace])

    def interrupted(*paths):
        next(changes)(*paths)  # the second is not made

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises((StopIteration, RuntimeError)):
        acts[act]()
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="another blueprint than.*index.json.*peft-blueprint embed.*remove"):
        assert extract(folder) == rounded(other if act == "embed another" else blueprint)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        acts[act]()
        if act != "remove":
            assert extract(folder) == rounded(other if act == "embed another" else blueprint)
    assert not list(folder.glob(".*"))


def test_an_index_that_is_replaced_meanwhile_stays(blueprint, saved, tmp_path, monkeypatch):
    """Another program saved the model again while its first shard was written."""
    folder = copied(saved / "sharded", tmp_path / "copy")
    index = folder / "model.safetensors.index.json"
    original = shutil.copystat

    def then(old, new):
        if old == index:
            index.write_text(index.read_text() + "\n\n")
        return original(old, new)

    monkeypatch.setattr(shutil, "copystat", then)
    with pytest.raises(BlueprintError, match="index.json was replaced or changed by another program"):
        embed(blueprint, folder, progress=False)
    assert index.read_text().endswith("\n\n") and "blueprint.json" not in index.read_text()


def test_a_shard_that_is_replaced_before_the_index_is_written_is_noticed(blueprint, saved, tmp_path, monkeypatch):
    """Another program saved the model again between the two, so that only the index has the blueprint."""
    folder = copied(saved / "sharded", tmp_path / "copy")
    move = os.replace

    def then(source, target):
        move(source, target)
        if target.suffix == ".safetensors":
            target.write_bytes((saved / "sharded" / target.name).read_bytes())

    monkeypatch.setattr(os, "replace", then)
    with pytest.raises(BlueprintError, match="was replaced by another program meanwhile.*Try again"):
        embed(blueprint, folder, progress=False)
    monkeypatch.undo()
    embed(blueprint, folder, progress=False)
    assert extract(folder) == rounded(blueprint)


def test_removing_gives_back_the_index(blueprint, saved, tmp_path):
    """Byte for byte, as transformers writes it."""
    for path in (saved / "sharded").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    before = index.read_bytes()
    embed(blueprint, tmp_path, progress=False)
    remove(tmp_path, progress=False)
    assert index.read_bytes() == before


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_mixtral, tiny_t5], ids=lambda make: make.__name__)
def test_blueprints_of_every_architecture_fit_their_own_files(make, tmp_path):
    """Under other stored names: per expert, transposed, without a prefix."""
    model = make()
    model.save_pretrained(tmp_path)
    embed(of(model), tmp_path, progress=False)
    assert extract(tmp_path).names == of(model).names
    other = tiny_gpt2() if make is tiny_llama else tiny_llama()
    with pytest.raises(MismatchError, match="of its .* entries are not there.*'.*'.*stores '"):
        embed(of(other), tmp_path, progress=False)


SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "projection_dim", "out_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **{"num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    **{"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "image_size": 16, "patch_size": 8},
}


def shrunk(config):
    """A config of this class, and of its parts, with the sizes that it knows made small."""
    inner = {name: type(getattr(config(), name)) for name in config.sub_configs}
    small = {name: value for name, value in SMALL.items() if name in vars(config())}
    return config(**small, **{name: shrunk(part).to_dict() for name, part in inner.items()})


RENAMED = [  # stored otherwise than in memory: renamed, of more parts, stacked, without a tied or computed weight
    *["LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration", "Qwen2VLForConditionalGeneration"],
    *["Qwen2_5_VLForConditionalGeneration", "Gemma3ForConditionalGeneration", "PaliGemmaForConditionalGeneration"],
    *["Mistral3ForConditionalGeneration", "InternVLForConditionalGeneration", "AriaForConditionalGeneration"],
    *["GraniteMoeForCausalLM", "MixtralForCausalLM", "PhimoeForCausalLM", "NemotronHForCausalLM", "FuyuForCausalLM"],
    *["GPTNeoXForCausalLM", "XLMRobertaForCausalLM", "MarianMTModel", "CLIPModel", "PixioBackbone", "Step3p7Model"],
]


@pytest.mark.parametrize("name", RENAMED)
def test_a_model_stored_under_other_names_takes_its_own_blueprint(name, tmp_path):
    """Of adaptable and of all weights; one of another size is refused."""
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip("the installed transformers is older")
    config = shrunk(cls.config_class)
    model = cls(config)
    model.save_pretrained(tmp_path)
    for include in ("adaptable", "all"):
        blueprint = of(model, include)
        embed(blueprint, tmp_path, progress=False)
        assert extract(tmp_path).names == blueprint.names
    entries = list(blueprint)
    i = next(
        i for i, entry in enumerate(entries) if len(entry.shape or ()) > 1
    )  # a bias may be of a resized vocabulary
    entries[i] = replace(entries[i], shape=(*entries[i].shape[:-1], 7))
    wrong = replace(blueprint, submodules=tuple(entries))
    with pytest.raises(MismatchError):
        embed(wrong, tmp_path, progress=False)


def test_names_of_another_version_of_transformers_fit(tmp_path):
    """A model in memory had other names, or its files were written under older ones."""
    model = transformers.LlavaForConditionalGeneration(shrunk(transformers.LlavaConfig))
    model.save_pretrained(tmp_path)
    new = of(model)
    old = {name: name.replace("model.language_model.", "language_model.model.") for name in new.names}
    old = {
        name: other.replace("model.multi", "multi").replace("model.vision", "vision") for name, other in old.items()
    }
    assert not set(old.values()) & set(new.names)
    for names in (old, {name: name for name in old}):
        blueprint = replace(new, submodules=tuple(replace(entry, name=names[entry.name]) for entry in new))
        for file_names in (old, {name: name for name in old}):
            tensors = {f"{file_names[entry.name]}.weight": ("F32", entry.shape) for entry in new}
            check_stored(*as_loaded(blueprint, tensors, tmp_path), "x")


def test_conversions_of_older_versions_are_known_too(tmp_path, monkeypatch):
    """Version 4 of transformers keeps patterns with the class."""
    model = transformers.LlavaForConditionalGeneration(shrunk(transformers.LlavaConfig))
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    patterns = {"^language_model.model": "model.language_model", "^vision_tower": "model.vision_tower"}
    patterns |= {"^multi_modal_projector": "model.multi_modal_projector"}
    monkeypatch.setattr(type(model), "_checkpoint_conversion_mapping", patterns, raising=False)
    embed(of(model), tmp_path, progress=False)
    assert extract(tmp_path).names == of(model).names


@pytest.mark.parametrize("config", [None, "{", "{}", '{"model_type": "llama", "vocab_size": "many"}'])
def test_a_folder_without_a_usable_config_is_judged_by_its_names(config, blueprint, tmp_path):
    """The error is the same as for a model that transformers knows."""
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(MismatchError, match="stores 'a'"):
        embed(blueprint, tmp_path, progress=False)


NAMES = ("model.layers.0.q_proj", "model.layers.1.q_proj")
BLUEPRINT = Blueprint("org/m", tuple(Submodule(name, 1.0, shape=(4, 8)) for name in NAMES))
GOOD = {
    "plain": {f"{name}.weight": ("F32", (4, 8)) for name in NAMES},
    "other way round": {f"{name}.weight": ("BF16", (8, 4)) for name in NAMES},
    "in four bits": {f"{name}.weight": ("U8", (16, 1)) for name in NAMES},
    "GPTQ": {f"{name}.qweight": ("I32", (1, 4)) for name in NAMES},
    "without its prefix": {f"{name.removeprefix('model.')}.weight": ("F32", (4, 8)) for name in NAMES},
    "with another": {f"language_model.{name}.weight": ("F32", (4, 8)) for name in NAMES},
    "shapes not known": {f"{name}.weight": None for name in NAMES},
    "an adapter": {f"base_model.model.{NAMES[1]}.lora_A.weight": ("F32", (2, 8))},
}
BAD = {
    "another size": ({f"{name}.weight": ("F32", (4, 16)) for name in NAMES}, "'model.layers.0.q_proj' is 4x8.*4x16"),
    "one is missing": ({f"{NAMES[0]}.weight": ("F32", (4, 8))}, r"1 of its 2 .*\('model.layers.1.q_proj'\)"),
    "two prefixes": (
        {f"a.{NAMES[0]}.weight": ("F32", (4, 8)), f"b.{NAMES[1]}.weight": ("F32", (4, 8))},
        "1 of its 2",
    ),
    "another's adapter": ({"base_model.model.h.0.c_attn.lora_A.weight": ("F32", (2, 8))}, "adapts 'h.0.c_attn'"),
    "nothing": ({}, "stores nothing"),
}


@pytest.mark.parametrize("tensors", GOOD.values(), ids=GOOD)
def test_fitting_models(tensors):
    """Stored names with and without a prefix, shapes either way round, quantised weights by name."""
    check_stored(BLUEPRINT, tensors, "x")


@pytest.mark.parametrize("tensors, message", BAD.values(), ids=BAD)
def test_misfits(tensors, message):
    """A MismatchError with both sides and the way out."""
    with pytest.raises(MismatchError, match=f"(?s){message}.*check=False"):
        check_stored(BLUEPRINT, tensors, "x")


def test_coarser_levels_are_checked_by_their_blocks(blueprint, saved):
    """Group- and layer-level blueprints fit a model with as many blocks."""
    tensors = load_file(saved / "single" / "model.safetensors")
    stored = {name: ("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    for level in ("group", "layer"):
        check_stored(blueprint.coarsen(level), stored, "x")
    with pytest.raises(MismatchError, match="has block 11, and the last in x is 0"):
        check_stored(blueprint.coarsen("layer"), {"model.layers.0.q.weight": None}, "x")


def test_an_adapter_on_experts_fits():
    """It has the name of their module, and the blueprint those of its parameters."""
    entry = Submodule("model.layers.0.mlp.experts.gate_up_proj", 1.0, shape=(4, 48, 32), form="experts")
    tensors = {"base_model.model.model.layers.0.mlp.experts.lora_A.weight": ("F32", (32, 32))}
    check_stored(Blueprint("org/m", (entry,)), tensors, "x")
    with pytest.raises(MismatchError, match="adapts"):
        check_stored(Blueprint("org/m", (replace(entry, name="model.layers.1.mlp.experts.up"),)), tensors, "x")


def test_check_false_embeds_anyway(blueprint, tmp_path):
    """For a file whose names this package does not know."""
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(MismatchError):
        embed(blueprint, tmp_path, progress=False)
    embed(blueprint, tmp_path, check=False, progress=False)
    assert extract(tmp_path) == rounded(blueprint)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"]),
        LoraConfig(target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"]),
        IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"]),
        VeraConfig(r=2, target_modules=["q_proj"]),
        LoHaConfig(r=2, target_modules=["q_proj"]),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_an_adapter_of_any_method_carries_it_too(config, blueprint, tmp_path):
    """An adapter_model.safetensors as PEFT writes it, given by its path; another model's is refused."""
    get_peft_model(tiny_llama(layers=12), config).save_pretrained(tmp_path)
    embed(blueprint, tmp_path / "adapter_model.safetensors", progress=False)
    assert extract(tmp_path / "adapter_model.safetensors") == rounded(blueprint)
    with pytest.raises(MismatchError, match="adapts"):
        embed(of(tiny_gpt2()), tmp_path, progress=False)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        LNTuningConfig(task_type="CAUSAL_LM"),
        TrainableTokensConfig(token_indices=[1], target_modules=["embed_tokens"]),
        LoraConfig(target_modules=["lm_head"]),
    ],
    ids=lambda config: str(config.peft_type.value),
)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # of PEFT, for norms
@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.")
def test_an_adapter_of_other_weights_carries_the_blueprint_of_its_base_model(config, saved, tmp_path):
    """Its own tensors cannot be checked: the base model's files or name are, otherwise a warning is given."""
    blueprint, path = of(tiny_llama(layers=12)), tmp_path / "adapter_config.json"
    get_peft_model(tiny_llama(layers=12), config).save_pretrained(tmp_path)

    def embed_on(base, blueprint):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
        embed(blueprint, tmp_path, progress=False)
        assert extract(tmp_path) == rounded(blueprint)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed_on(str(saved / "sharded"), blueprint)
        embed_on(blueprint.model_id, replace(blueprint, provenance={"note": "another"}))
    with pytest.warns(UserWarning, match="adapts none of the 84 modules.*tiny/base.*was not checked"):
        embed_on("tiny/base", blueprint)
    with pytest.raises(MismatchError, match=f"does not fit {saved / 'single'}|adapts"):
        embed_on(str(saved / "single"), of(tiny_gpt2()))


@pytest.mark.parametrize("how", ["a link", "a link out of the cache", "a copy in the cache"])
def test_the_cache_is_left_alone(blueprint, saved, tmp_path, how):
    """Link and target stay unchanged; the error says how to get a copy."""
    blob = tmp_path / "models--tiny--llama" / "blobs" / "abc" if "cache" in how else tmp_path / "elsewhere" / "abc"
    blob.parent.mkdir(parents=True)
    blob.write_bytes((saved / "single" / "model.safetensors").read_bytes())
    before = blob.read_bytes()
    snapshot = blob.parent.parent / "snapshots" / "main" if "cache" in how else tmp_path / "mine"
    snapshot.mkdir(parents=True)
    path = snapshot / "model.safetensors"
    if how == "a copy in the cache":
        path.write_bytes(before)
    else:
        path.symlink_to(blob)
    for act in (lambda: embed(blueprint, snapshot, progress=False), lambda: remove(path)):
        with pytest.raises(BlueprintError, match=r"(cache|symbolic link).*hf download .* --local-dir"):
            act()
    assert blob.read_bytes() == before and path.read_bytes() == before


def test_a_long_text_is_warned_of_and_a_longer_one_refused(blueprint, saved, tmp_path, monkeypatch):
    """Beyond the first 100 kB a reader asks twice; beyond the limit it does not belong there."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((saved / "single" / "model.safetensors").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed(blueprint, path, progress=False)
    long = replace(blueprint, provenance={"note": "x" * 100_000})
    with pytest.warns(UserWarning, match="second request.*beside the model"):
        embed(long, path, progress=False)
    before = path.read_bytes()
    monkeypatch.setattr("peft_blueprint.publish.embedding.MAX_TEXT", 1000)
    with pytest.raises(BlueprintError, match=r"with 84 entries; at most 1,000.*blueprint.safetensors"):
        embed(blueprint, path, progress=False)
    assert path.read_bytes() == before


def test_bad_places(tmp_path):
    """Folders without a model, files of another kind, an index that points elsewhere, a later layout."""
    with pytest.raises(BlueprintError, match="neither model.safetensors nor model.safetensors.index.json"):
        extract(tmp_path)
    with pytest.raises(BlueprintError, match="neither a .safetensors file"):
        embed(BLUEPRINT, tmp_path / "model.bin")
    index = tmp_path / "model.safetensors.index.json"
    for weights in ({}, {"a": "../../x.safetensors"}, {"a": 1}, {"a": "/x.safetensors"}):
        index.write_text(json.dumps({"weight_map": weights}))
        with pytest.raises(FormatError, match="not the index of a sharded model"):
            extract(tmp_path)
    index.unlink()
    tensors, path = {"a": torch.ones(1)}, tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"blueprint.json": "{}", "blueprint.version": "2"})
    with pytest.raises(FormatError, match="'2'.*upgrade"):
        extract(tmp_path)
    save_file(tensors, path, metadata={"blueprint.json": "{"})
    with pytest.raises(FormatError, match="blueprint.json in .*model.safetensors is not valid JSON"):
        extract(tmp_path)


def test_it_needs_no_tensor_library(blueprint, saved, tmp_path):
    """Embedding, extracting and removing import neither torch nor transformers."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((saved / "single" / "model.safetensors").read_bytes())
    blueprint.save(tmp_path)
    script = f"""
import sys
from pathlib import Path
from peft_blueprint import Blueprint
from peft_blueprint.publish import embed, remove
from peft_blueprint.blueprint import extract
embed(Blueprint.from_pretrained({str(tmp_path / "blueprint.json")!r}), {str(path)!r}, progress=False)
assert len(extract({str(path)!r})) == 84 and remove({str(path)!r}, progress=False)
print(sorted({{"torch", "transformers"}} & sys.modules.keys()))
"""
    root = ROOT
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, env=os.environ)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
