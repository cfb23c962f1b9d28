"""BlueprintConfig through everything PEFT does with LoRA."""

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import peft
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.utils import ModulesToSaveWrapper
from peft.utils.hotswap import hotswap_adapter

from peft_blueprint import Blueprint, BlueprintConfig, BlueprintError, plan_placement
from peft_blueprint.errors import MismatchError, PlacementError
from peft_blueprint.measure.submodules import linear_modules
from peft_blueprint.place import Placement
from peft_blueprint.place.config import extend_peft_type
from peft_blueprint.testing import randomize_adapters, tiny_gpt2, tiny_llama, toy_batches
from tests.unfrozen import needs_peft_020


TOKENS = torch.arange(1, 11)[None]


def adapted(blueprint, seed=1, **wish):
    """A twelve-layer model with random adapters that change its logits."""
    config = BlueprintConfig(blueprint=blueprint, r=2, **wish)
    return randomize_adapters(get_peft_model(tiny_llama(layers=12), config), seed)


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def adapters_on(model):
    return {
        n.removeprefix("base_model.model.").removesuffix(".lora_A")
        for n, _ in model.named_modules()
        if n.endswith("lora_A")
    }


@pytest.fixture
def base(tmp_path):
    """The base model on disk, where AutoPeft looks for it."""
    tiny_llama(layers=12).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_adapters_go_where_the_blueprint_says_and_nowhere_else(blueprint):
    """The placed names, exactly, carry adapters; the live type is LORA; only adapters are trainable."""
    config = BlueprintConfig(blueprint=blueprint, fraction=0.25, r=2)
    model = get_peft_model(tiny_llama(layers=12), config)
    assert adapters_on(model) == set(config.selection) == set(plan_placement(blueprint, fraction=0.25).lora)
    assert len(config.selection) == 21
    assert model.peft_config["default"].peft_type is PeftType.LORA
    assert isinstance(model.peft_config["default"], BlueprintConfig)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_a_saved_adapter_is_plain_lora_with_explicit_sorted_names(blueprint, tmp_path):
    """adapter_config.json has LoraConfig's keys only; names are whole although PEFT abbreviates the live ones."""
    wish = {"num_modules": 24, "coverage": "none"}
    model = adapted(blueprint, **wish)
    expected = plan_placement(blueprint, **wish).lora
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    LoraConfig().save_pretrained(tmp_path / "plain")
    plain = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and set(saved) == set(plain)
    assert saved["target_modules"] == sorted(expected)
    recipe = json.loads((tmp_path / "blueprint_config.json").read_text())
    assert recipe["peft_type"] == "BLUEPRINT" and recipe["blueprint"]["model_id"] == "tiny/llama"


@needs_peft_020
@pytest.mark.parametrize(
    "wish",
    [{"fraction": 0.2}, {"mode": "unfreeze", "num_modules": 3}, {"mode": "lora+unfreeze", "unfreeze_blocks": 2}],
    ids=["lora", "unfreeze", "both"],
)
def test_a_saved_adapter_loads_where_this_package_cannot_be_imported(blueprint, base, tmp_path, wish):
    """Vanilla PEFT in a process where importing peft_blueprint fails gives the same logits."""
    model = adapted(blueprint, **wish)
    model.save_pretrained(tmp_path / "adapter")
    assert not torch.allclose(logits(model), logits(tiny_llama(layers=12)))
    script = (
        "import sys; sys.modules['peft_blueprint'] = None\n"
        "import torch; from peft import AutoPeftModelForCausalLM\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / 'adapter')!r}).eval()\n"
        f"torch.save(model(torch.arange(1, 11)[None]).logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base, "task_type": "CAUSAL_LM"})
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model))


def test_reload_resume_merge_and_disable(blueprint, base, tmp_path):
    """from_pretrained, Auto classes, resuming training, merging and disabling agree with LoRA."""
    model = adapted(blueprint)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_llama(layers=12), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(reloaded), expected)
    assert {n for n, p in reloaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    reloaded.load_adapter(tmp_path, "default", is_trainable=True)  # as Trainer resumes
    torch.testing.assert_close(logits(reloaded), expected)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(tiny_llama(layers=12)))
    torch.testing.assert_close(
        logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4
    )  # another order of sums
    model = AutoPeftModelForCausalLM.from_pretrained(_with_base(tmp_path, base))
    torch.testing.assert_close(logits(model), expected)


def _with_base(folder, base):
    path = folder / "adapter_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base, "task_type": "CAUSAL_LM"})
    )
    return folder


def test_second_adapters_of_either_kind_and_hotswap(blueprint, tmp_path):
    """A live blueprint adapter takes a plain LoRA, a saved one, itself again (TRL's reference), and a hotswap."""
    model, other = adapted(blueprint), adapted(blueprint, seed=2)
    other.save_pretrained(tmp_path)
    model.add_adapter("ref", model.peft_config["default"])
    model.add_adapter("plain", LoraConfig(target_modules=["q_proj"]))
    model.load_adapter(tmp_path, "saved")
    model.set_adapter("saved")
    torch.testing.assert_close(logits(model), logits(other))
    model.set_adapter("default")
    hotswap_adapter(model, str(tmp_path), adapter_name="default")
    torch.testing.assert_close(logits(model), logits(other))
    onto_plain = get_peft_model(tiny_llama(layers=12), LoraConfig(target_modules=["q_proj"]))
    onto_plain.add_adapter("second", BlueprintConfig(blueprint=blueprint, num_modules=5))
    assert "second" in onto_plain.peft_config


def test_weighted_combination_saves_the_adapted_modules(blueprint, tmp_path):
    """add_weighted_adapter copies the config with other targets; saving it does not write the old selection."""
    model = adapted(blueprint, num_modules=5)
    model.add_adapter("other", BlueprintConfig(blueprint=blueprint, num_modules=9, r=2, coverage="none"))
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    reloaded = PeftModel.from_pretrained(tiny_llama(layers=12), tmp_path / "both")
    torch.testing.assert_close(logits(reloaded), expected)


def test_transformers_add_adapter_and_injection(blueprint, tmp_path):
    """transformers' model.add_adapter and peft's inject_adapter_in_model take the config, and save plain LORA."""
    expected = set(plan_placement(blueprint, num_modules=6).lora)
    model = tiny_llama(layers=12)
    model.add_adapter(BlueprintConfig(blueprint=blueprint, num_modules=6))
    assert adapters_on(model) == expected
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(expected)
    injected = inject_adapter_in_model(BlueprintConfig(blueprint=blueprint, num_modules=6), tiny_llama(layers=12))
    assert adapters_on(injected) == expected


def test_dora_rslora_and_mixed_models(blueprint):
    """LoRA's variants stay LoRA's."""
    for extra in ({"use_dora": True}, {"use_rslora": True}):
        model = get_peft_model(tiny_llama(layers=12), BlueprintConfig(blueprint=blueprint, num_modules=3, **extra))
        model(TOKENS).logits.sum().backward()
    mixed = get_peft_model(tiny_llama(layers=12), BlueprintConfig(blueprint=blueprint, num_modules=3), mixed=True)
    assert adapters_on(mixed)


def test_the_recipe_round_trips_through_pefts_own_loader(blueprint, tmp_path):
    """A JSON with peft_type BLUEPRINT becomes a BlueprintConfig, and back, with the same targets."""
    blueprint.save(tmp_path / "blueprint.json")
    recipe = {"peft_type": "BLUEPRINT", "blueprint": str(tmp_path / "blueprint.json"), "fraction": 0.1, "r": 4}
    config = peft.get_peft_config(dict(recipe))
    assert isinstance(config, BlueprintConfig) and config.r == 4
    assert set(config.target_modules) == set(plan_placement(blueprint, fraction=0.1).lora)
    again = peft.get_peft_config(json.loads(json.dumps(config.to_dict(), default=sorted)))
    assert again.selection == config.selection and again.to_dict() == config.to_dict()
    (tmp_path / "adapter_config.json").write_text(json.dumps(recipe))
    assert PeftConfig.from_pretrained(tmp_path).selection == config.selection


def test_configs_copy_and_pickle(blueprint):
    """deepcopy, pickle and dataclasses.replace keep the selection."""
    config = BlueprintConfig(blueprint=blueprint, num_modules=7)
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config, r=3)):
        assert copied.selection == config.selection and copied.peft_type is PeftType.LORA


@needs_peft_020
@pytest.mark.parametrize("wish", [{"fraction": 1.0}, {"mode": "unfreeze"}])
def test_a_config_in_use_is_copied_with_its_selection(blueprint, wish):
    """Also where PEFT has abbreviated its targets, or has none to look for."""
    config = BlueprintConfig(blueprint=blueprint, **wish)
    get_peft_model(tiny_llama(layers=12), config)
    assert config.target_modules == "dummy-target-modules" or len(config.target_modules) < len(config.selection)
    again = replace(config, r=3)
    assert again.selection == config.selection and again.to_dict() == config.to_dict() | {"r": 3}
    assert not replace(config, target_modules=["q_proj", "gate"]).selection


def test_the_new_type_behaves_as_a_member_of_pefts_enumeration():
    """BLUEPRINT is looked up, compared, hashed, pickled and listed as the other types are."""
    member = PeftType.BLUEPRINT
    assert member is PeftType("BLUEPRINT") is PeftType["BLUEPRINT"] is extend_peft_type("BLUEPRINT")
    assert member == "BLUEPRINT" and member.value == "BLUEPRINT" and hash(member) == hash("BLUEPRINT")
    assert member in list(PeftType) and "BLUEPRINT" in [m.value for m in PeftType]
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member


@needs_peft_020
def test_unfreezing_trains_whole_blocks_and_only_them(blueprint):
    """Mode unfreeze makes the chosen blocks' copies trainable, and nothing else."""
    model = adapted(blueprint, mode="unfreeze", num_modules=4)
    blocks = model.peft_config["default"].placement.unfreeze
    assert len(blocks) == 4 and all(b.endswith((".self_attn", ".mlp")) for b in blocks)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(
        any(n.startswith(f"base_model.model.{b}.modules_to_save.default.") for b in blocks) for n in trainable
    )


def test_both_modes_at_once_do_not_overlap(blueprint):
    """With unfrozen blocks besides LoRA, no adapter is placed inside one."""
    placement = plan_placement(blueprint, mode="lora+unfreeze", unfreeze_blocks=3, fraction=0.3)
    assert len(placement.unfreeze) == 3 and placement.lora
    assert not any(name.startswith(block + ".") for name in placement.lora for block in placement.unfreeze)


def test_a_group_level_blueprint_is_expanded_on_the_model():
    """The paper's ids place adapters on a real model's submodules, through get_peft_model alone."""
    record = {
        "model_id": "foundation",
        "layers": [{"id": "attn.0", "gradient_norm": 3}, {"id": "ffn.2", "gradient_norm": 2}],
    }
    model = get_peft_model(tiny_llama(), BlueprintConfig(blueprint=record, fraction=1.0))
    expected = {f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"}
    assert adapters_on(model) == expected | {f"model.layers.2.mlp.{p}_proj" for p in ("gate", "up", "down")}


def test_gpt2_conv1d_takes_adapters():
    """Conv1D layers are measured, placed and adapted."""
    from peft_blueprint import generate_blueprint

    record = generate_blueprint(tiny_gpt2(), toy_batches(), progress=False)
    assert {e.kind for e in record} == {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"}
    model = get_peft_model(tiny_gpt2(), BlueprintConfig(blueprint=record, num_modules=4, fan_in_fan_out=True))
    assert adapters_on(model) == set(model.peft_config["default"].selection)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_llama(layers=11), "7 of its 84 entries are not in the model"),
        (lambda: tiny_gpt2(), "does not fit this GPT2LMHeadModel"),
        (lambda: tiny_llama(layers=12, intermediate_size=64), "is 48x32 in the blueprint.*and 64x32 in this model"),
    ],
    ids=["fewer layers", "another architecture", "another width"],
)
@pytest.mark.parametrize("put_on", [get_peft_model, lambda m, c: inject_adapter_in_model(c, m)], ids=["get", "inject"])
def test_a_blueprint_of_another_model_is_refused_and_the_model_left_alone(blueprint, model, message, put_on):
    """PEFT would adapt matching names and ignore the others; here it is an error that shows both sides."""
    model = model()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(MismatchError, match=message):
        put_on(model, BlueprintConfig(blueprint=blueprint, num_modules=2))
    assert names == [name for name, _ in model.named_modules()]


def test_a_name_that_pefts_endings_would_match_elsewhere_is_refused(blueprint):
    """A wrapper whose inner names end alike would get adapters on both; it is an error instead."""
    model = tiny_llama(layers=12)
    model.vision = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": tiny_llama(layers=12).model.layers})})
    with (
        pytest.raises(MismatchError, match="would also reach 'vision.model.layers"),
        pytest.warns(UserWarning, match="other submodules than this one, which also has 'vision.model.layers"),
    ):
        get_peft_model(model, BlueprintConfig(blueprint=blueprint))


@needs_peft_020
def test_a_quantised_block_is_not_unfrozen(blueprint):
    """The error names the block and gives the skip list that loads it unquantised."""
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_llama(layers=12)
    for name, module in list(linear_modules(model)):
        if name != "lm_head":
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(
                parent,
                name.rpartition(".")[2],
                bnb.nn.Linear4bit(*reversed(module.weight.shape), bias=False).to("cpu"),
            )
    config = BlueprintConfig(blueprint=blueprint, mode="unfreeze", num_modules=1)
    [block] = config.placement.unfreeze
    with pytest.raises(
        PlacementError, match=f"{block}.* 4 or 8 bits.*llm_int8_skip_modules=\\['lm_head', '{block}'\\]"
    ):
        get_peft_model(model, config)
    get_peft_model(model, BlueprintConfig(blueprint=blueprint, num_modules=3))  # LoRA on it is QLoRA


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"fraction": 0}, r"fraction must be in \(0, 1\], got 0"),
        ({"fraction": 1.2}, r"fraction must be in \(0, 1\], got 1.2"),
        ({"fraction": 0.2, "num_modules": 3}, "fraction=0.2 and num_modules=3 both say how many"),
        ({"num_modules": 1000}, "num_modules=1000: the blueprint has only 84"),
        ({"threshold": 1e9}, "No adam_gain reaches threshold"),
        ({"mode": "full"}, "mode must be .*, got 'full'"),
        ({"coverage": "depth"}, "coverage must be .*, got 'depth'"),
        ({"rank_by": "luck"}, "rank_by must be .*, got 'luck'"),
        ({"unfreeze_blocks": 2}, "unfreeze_blocks=2 needs mode='lora.unfreeze', got mode='lora'"),
        ({"target_modules": ["q_proj"]}, "both say what to adapt"),
    ],
)
def test_wishes_that_cannot_be_met_are_errors_when_the_config_is_made(blueprint, wish, message):
    """Each error names the given and the allowed values."""
    with pytest.raises(PlacementError, match=message):
        BlueprintConfig(blueprint=blueprint, **wish)


def test_a_config_without_a_blueprint_is_an_error():
    """A config without blueprint and placement is an error, not all-linear LoRA."""
    with pytest.raises(BlueprintError, match="needs a blueprint"):
        BlueprintConfig(r=8)


def test_a_folder_that_cannot_be_written_is_an_error_and_leaves_nothing(blueprint, tmp_path):
    """Saving onto a file names it."""
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(BlueprintError, match="is a file, and an adapter needs a folder"):
        BlueprintConfig(blueprint=blueprint).save_pretrained(str(tmp_path / "taken"))
    with pytest.raises(BlueprintError, match="cannot be written"):
        blueprint.save(tmp_path / "taken" / "blueprint.json")
    assert (tmp_path / "taken").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_blueprint_object_and_its_file_give_the_same_config(blueprint, tmp_path):
    """Object, file, folder and JSON object are interchangeable."""
    blueprint.save(tmp_path)
    selections = {
        BlueprintConfig(blueprint=source, fraction=0.15).selection
        for source in (
            blueprint,
            str(tmp_path),
            str(tmp_path / "blueprint.json"),
            json.loads((tmp_path / "blueprint.json").read_text()),
        )
    }
    assert len(selections) == 1
    assert Blueprint.from_pretrained(tmp_path) == blueprint


def test_an_attention_block_is_not_unfrozen_by_a_peft_that_cannot_call_its_copy(monkeypatch):
    """As before PEFT 0.20; feed-forward blocks are, and adapters anywhere."""
    monkeypatch.setattr(ModulesToSaveWrapper, "forward", lambda self, x, *args, **kwargs: self.original_module(x))

    def config(**kind):
        return BlueprintConfig(
            placement=Placement("m", kind.get("lora", ()), kind.get("unfreeze", ()), "even", "none")
        )

    block = "model.layers.1.self_attn"
    with pytest.raises(PlacementError, match=f"Unfreezing '{block}' needs PEFT 0.20 or newer"):
        get_peft_model(tiny_llama(), config(unfreeze=(block,)))
    get_peft_model(tiny_llama(), config(unfreeze=("model.layers.1.mlp",), lora=(f"{block}.q_proj",)))
