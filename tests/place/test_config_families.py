"""BlueprintConfig on mixtures of experts, shared weights and classifiers."""

import copy
import json
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from peft_blueprint import Blueprint, BlueprintConfig, Placement
from peft_blueprint.errors import PlacementError
from peft_blueprint.measure.submodules import find_submodules
from peft_blueprint.testing import (
    VOCABULARY,
    random_model,
    randomize_adapters,
    tiny_bert,
    tiny_llama,
    tiny_mixtral,
    tiny_t5,
    tiny_vit,
)
from tests.fused import needs_fused


TOKENS = torch.arange(1, 11)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


# ------------------------------------------------------------------------------------------ mixtures of experts


def tiny_qwen3_moe():
    settings = {"hidden_size": 32, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3}
    config = transformers.Qwen3MoeConfig(vocab_size=VOCABULARY, pad_token_id=0, **settings, **heads)
    return random_model(transformers.Qwen3MoeForCausalLM, config)


def measured(build, **norms):
    """A blueprint of a model, each entry's norm by the ending of its name."""
    entries = find_submodules(build())
    return Blueprint(
        "org/moe",
        tuple(
            replace(e, gradient_norm=next((n for k, n in norms.items() if e.name.endswith(k)), 1.0)) for e in entries
        ),
    )


def has_fused_experts(build):
    return any(entry.form == "experts" for entry in find_submodules(build()))


def on_modules_and_parameters(model):
    """The names that carry adapters: of modules, and of parameters."""
    found = set()
    for path, _ in model.named_modules():
        if path.endswith("lora_A"):
            wrapper = model.get_submodule(path.removesuffix(".lora_A"))
            parameter = getattr(wrapper, "parameter_name", "")
            name = path.removeprefix("base_model.model.").replace(".base_layer", "").removesuffix(".lora_A")
            found.add(f"{name}.{parameter}" if parameter else name)
    return found


@pytest.mark.parametrize("build", [tiny_mixtral, tiny_qwen3_moe])
@pytest.mark.parametrize(
    "wish",
    [{"fraction": 0.5}, {"threshold": 5.0}, {"mode": "unfreeze", "num_modules": 2}, {"mode": "lora+unfreeze"}],
    ids=["some", "experts alone", "unfreeze", "both"],
)
def test_experts_are_adapted_where_the_blueprint_says_and_reload_as_plain_lora(build, wish, tmp_path):
    """Adapters stand at the placed names, exactly; plain PEFT loads the same logits; the recipe's copies agree."""
    entries = [e.name for e in find_submodules(build()) if "experts." in e.name]
    blueprint = measured(build, **({entries[0]: 9.0, entries[-1]: 7.0} if "threshold" in wish else {"v_proj": 2.0}))
    config = BlueprintConfig(blueprint=blueprint, r=2, task_type="CAUSAL_LM", **wish)
    model = randomize_adapters(get_peft_model(build(), config))
    placement = config.placement
    assert on_modules_and_parameters(model) == set(placement.lora)
    assert config.selection == (*placement.lora, *placement.unfreeze)
    if "threshold" in wish:
        assert set(placement.lora) == {entries[0], entries[-1]}
    assert bool(placement.target_parameters) == (has_fused_experts(build) and wish.get("mode") != "unfreeze")
    expected = logits(model)
    assert not torch.allclose(expected, logits(build()))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and (saved["target_parameters"] or []) == sorted(placement.target_parameters)
    if placement.lora:
        assert saved["target_modules"] == sorted(placement.target_modules)
    reloaded = PeftModel.from_pretrained(build(), tmp_path)
    assert type(reloaded.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(reloaded), expected)
    recipe = json.loads((tmp_path / "blueprint_config.json").read_text())
    for copied in (peft.get_peft_config(recipe), copy.deepcopy(config), replace(config, r=3)):
        assert copied.selection == config.selection and copied.placement == placement


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"lora_dropout": 0.1},
            r"lora_dropout=0.1 does not work on fused experts.* 6 are placed.* Set lora_dropout=0.0",
        ),
        ({"use_dora": True}, "use_dora=True does not work.*Set use_dora=False"),
        ({"lora_bias": True}, "lora_bias=True does not work"),
    ],
)
@needs_fused
def test_limits_of_peft_on_whole_parameters_are_errors_when_the_config_is_made(extra, message):
    """The error names the field, its value and the fix; placements without fused experts take the same fields."""
    with pytest.raises(PlacementError, match=message):
        BlueprintConfig(blueprint=measured(tiny_mixtral), fraction=1.0, **extra)
    BlueprintConfig(blueprint=measured(tiny_mixtral, q_proj=9.0), threshold=9.0, **extra)


def test_targets_beside_a_blueprint_are_refused(blueprint):
    """target_parameters as well as target_modules."""
    with pytest.raises(PlacementError, match=r"target_parameters=\['experts'\] and a blueprint both say"):
        BlueprintConfig(blueprint=blueprint, target_parameters=["experts"])


# ------------------------------------------------------------------------------------------ shared and tied weights


def test_a_module_that_is_called_in_every_layer_is_placed_once():
    """ALBERT has one layer for all its depth: one row, one adapter, and gradients from every call."""
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=3,
    )
    model = random_model(transformers.AlbertForSequenceClassification, config)
    names = [e.name for e in find_submodules(model)]
    assert len(names) == len(set(names)) == 8
    record = measured(lambda: model)
    assert on_modules_and_parameters(get_peft_model(model, BlueprintConfig(blueprint=record, fraction=1.0))) == set(
        names
    )


def test_two_modules_with_one_weight_take_no_adapter():
    """On one of them it would be missing from the other; a placement made by hand that has it is refused."""
    model = tiny_llama(layers=2)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    names = [e.name for e in find_submodules(model)]
    assert not [name for name in names if "up_proj" in name] and len(names) == 12
    tied = tiny_llama(layers=2, tie_word_embeddings=True)
    for base, name, form in ((model, "model.layers.0.mlp.up_proj", "parameter"), (tied, "lm_head", "tied to another")):
        placement = Placement("m", (name,), (), "gradient_norm", "none")
        with pytest.raises(PlacementError, match=rf"No adapter can be put on '{name} \({form}\)'.*shared"):
            get_peft_model(base, BlueprintConfig(placement=placement))


@pytest.mark.parametrize(("build", "task"), [(tiny_bert, "SEQ_CLS"), (tiny_vit, None), (tiny_t5, "SEQ_2_SEQ_LM")])
def test_adapters_stay_below_the_heads(build, task):
    """All that is adaptable carries an adapter; the head is none of it, and PEFT trains it whole for its task."""
    names = {e.name for e in find_submodules(build())}
    model = get_peft_model(build(), BlueprintConfig(blueprint=measured(build), fraction=1.0, task_type=task))
    assert on_modules_and_parameters(model) == names and not [n for n in names if "classifier" in n or "lm_head" in n]
