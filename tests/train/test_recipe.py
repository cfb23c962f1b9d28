"""A recipe is checked key by key before anything is loaded, and every error names the file and the key."""

import copy
import json
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from transformers import TrainingArguments

from peft_blueprint import BlueprintError
from peft_blueprint.train.recipe import Recipe, RecipePlacement, training_settings
from tests import ROOT


SOUND = {
    "model": "org/model",
    "train": "train.jsonl",
    "held_out": "held_out.jsonl",
    "output": "adapter",
    "columns": {"prompt": "question"},
    "max_length": 128,
    "blueprint": "org/model",
    "placement": {"budget": "0.7x", "memory": "12GiB", "ranks": "equal_parameters"},
    "workload": {"adapter_dtype": "bfloat16"},
    "lora": {"r": 16, "lora_alpha": 32, "init_lora_weights": "pissa_niter_16"},
    "training": {"max_steps": 6, "optim": "adamw_torch", "gradient_checkpointing": True},
    "stop": {"worth": 0.01, "metric": "eval_loss"},
    "carbon": "DEU",
    "quantization": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"},
    "base_learning_rate": 1e-3,
}


def write(path, content):
    """A recipe file: JSON is YAML 1.2."""
    (path / "r.yaml").write_text(content if isinstance(content, str) else json.dumps(content))
    return path / "r.yaml"


def test_a_sound_recipe_is_read_as_it_stands(tmp_path):
    recipe = Recipe.from_yaml(write(tmp_path, SOUND))
    assert recipe.placement == RecipePlacement(budget="0.7x", memory="12GiB", ranks="equal_parameters")
    assert all(getattr(recipe, name) == value for name, value in SOUND.items() if name != "placement")
    assert recipe.rank == 16 and recipe.mode == "lora"
    assert replace(recipe, placement={"mode": "unfreeze"}).placement.mode == "unfreeze"


@pytest.mark.parametrize("name", ["qlora.yaml", "stdlib_docs.yaml"])
def test_the_recipes_that_come_along_are_sound(name):
    assert Recipe.from_yaml(ROOT / "recipes" / name).base_learning_rate == 1e-3


def test_overrides_are_keys_of_the_file(tmp_path):
    """Nested ones by dots, values in YAML; one that cannot be set is named."""
    path = write(tmp_path, SOUND)
    read = Recipe.from_yaml(path, overrides=["training.max_steps=3", "lora={r: 4}", "domain=a=1"])
    assert (read.training["max_steps"], read.lora, read.domain) == (3, {"r": 4}, "a=1")
    for override, message in (
        ("training", "--override must be KEY=VALUE such as training.max_steps=2, got 'training'"),
        ("model.name=x", "--override model.name=x: model is not a mapping"),
        ("training.max_stepz=2", "training has no option 'max_stepz'"),
        ("lora={", "--override lora={ is not valid YAML"),
    ):
        with pytest.raises(BlueprintError, match=message):
            Recipe.from_yaml(path, overrides=[override])


def test_numbers_follow_yaml_1_2(tmp_path):
    """Unlike in YAML 1.1, 1e-4 is a number, and yes is a text."""
    required = "model: m\ntrain: t\noutput: o\n"
    assert Recipe.from_yaml(write(tmp_path, required + "base_learning_rate: 1e-4")).base_learning_rate == 1e-4
    with pytest.raises(BlueprintError, match=r"share_base must be true or false, got 'yes' \(text\)"):
        Recipe.from_yaml(write(tmp_path, required + "share_base: yes"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "x"}, "has no option 'modle'. Did you mean 'model'"),
        ({"model": 3}, r": model must be text, got 3 \(a whole number\)"),
        ({"max_length": "512"}, r": max_length must be a whole number, got '512' \(text\)"),
        ({"max_length": 0}, ": max_length must be at least 1, got 0"),
        ({"start_examples": -1}, ": start_examples must be at least 0, got -1"),
        ({"blend_weight": 2}, r": blend_weight must be in \[0, 1\], got 2"),
        (
            {"drift_policy": "ignore"},
            ": drift_policy must be one of 'warn', 'error', 'refresh', 'coarsen', got 'ignore'",
        ),
        ({"by_uncertainty": "no"}, r": by_uncertainty must be true or false, got 'no' \(text\)"),
        ({"drift_threshold": 3}, r": drift_threshold must be in \[-1, 1\], got 3"),
        ({"domain": {"bio": 0}}, ": The weight of domain 'bio' must be a positive number, got 0"),
        ({"domain": "bio=1,law"}, ": domain must be a tag, or weights of different tags"),
        ({"domain": "bio", "blueprint": None, "quantization": None}, ": domain: bio chooses among the domains"),
        ({"columns": {"prompt": 1}}, ": columns.prompt must be text"),
        ({"dtype": "float33"}, ": dtype must be float32, bfloat16, float16 or auto, got 'float33'"),
        ({"carbon": "Atlantis"}, "ATLANTIS"),
        ({"placement": "everywhere"}, ": placement must be all-linear or a mapping of options, got 'everywhere'"),
        ({"placement": 3}, ": placement must be a mapping, got 3"),
        ({"placement": {"fraction": "0.2"}}, r": placement: fraction must be a number, got '0.2' \(text\)"),
        ({"placement": {"fraction": 2}}, r": placement: fraction must be in \(0, 1\], got 2"),
        ({"placement": {"budgte": "1GiB"}}, ": placement has no option 'budgte'. Did you mean 'budget'"),
        ({"placement": {"r": 8}}, ": placement: r belongs to lora"),
        ({"placement": {"memory": "much"}}, ": placement: .*'much'"),
        ({"placement": {"memory": "1GiB", "fraction": 0.2}}, ": placement: memory and fraction both say how much"),
        ({"placement": {"memory": "1GiB", "budget": "2GiB"}}, "memory=1GiB and budget=2GiB both limit the memory"),
        ({"workload": {"lenght": 9}}, ": workload has no option 'lenght'. Did you mean 'length'"),
        ({"workload": {"batch_size": "9"}}, ": workload: batch_size must be a whole number, got '9'"),
        ({"workload": {"rank": 9}}, ": workload: rank is that of lora: r, 16 here"),
        ({"lora": {"rr": 1}}, ": lora has no option 'rr'"),
        ({"lora": {"r": "16"}}, ": lora: r must be a whole number, got '16'"),
        (
            {"training": {"learning_speed": 1}},
            ": training has no option 'learning_speed'. Did you mean 'learning_rate'",
        ),
        ({"training": {"warmup_steps": "2"}}, ": training: warmup_steps must be .* number, got '2'"),
        ({"training": {"packing": True}}, ": training has no option 'packing'"),
        ({"quantization": {"load_in_5bit": True}}, ": quantization has no option 'load_in_5bit'"),
        ({"quantization": {"load_in_4bit": "yes"}}, ": quantization: load_in_4bit must be true or false, got 'yes'"),
        ({"quantization": {"bnb_4bit_compute_dtype": "float33"}}, "got 'float33'"),
        ({"stop": {"patients": 3}}, ": stop has no option 'patients'. Did you mean 'patience'"),
        ({"stop": {"window": "5"}}, ": stop: window must be a whole number, got '5'"),
        ({"stop": {"window": 1}}, ": stop: window"),
        ({"stop": {}, "held_out": None}, ": stop needs held_out"),
        ({"answer_only": {"token": "x"}}, ": answer_only has no option 'token'"),
        ({"answer_only": {"cache": "much"}}, ": answer_only: cache: .*'much'"),
        ({"answer_only": {"turns": "all"}}, ": answer_only: turns must be last or every, got 'all'"),
        ({"answer_only": {"folder": "x"}}, ": answer_only: folder is where prompts are kept: give cache too"),
        ({"answer_only": {}, "cache_frozen_prefix": {}}, "answer_only and cache_frozen_prefix both keep states"),
        ({"answer_only": {}, "lora": {"alora_invocation_tokens": [1]}}, "leave lora: alora_invocation_tokens out"),
        (
            {"answer_only": {}, "placement": {"mode": "unfreeze"}, "base_learning_rate": None},
            ": answer_only trains adapters that leave prompts alone, and mode: unfreeze",
        ),
        ({"freeze_from_below": {"trainer": 1}}, ": freeze_from_below has no option 'trainer'"),
        ({"freeze_from_below": {"schedule": "soon"}}, ": freeze_from_below: schedule='soon' cannot be read"),
        ({"cache_frozen_prefix": {"budget": "much"}}, ": cache_frozen_prefix: .*'much'"),
        ({"start_examples": 4}, "start_examples: 4 .* lora: init_lora_weights rules out"),
        (
            {"start_examples": 4, "lora": {}, "placement": {"mode": "unfreeze"}},
            "start_examples: 4 .* mode: unfreeze rules out",
        ),
        ({"base_learning_rate": "1e-4"}, r": base_learning_rate must be a number, got '1e-4' \(text\)"),
        ({"base_learning_rate": -1}, ": base_learning_rate must be a positive number, got -1"),
        ({"training": {"learning_rate": 1e-3}}, "0.001 and training: learning_rate: 0.001 both set the learning rate"),
        ({"placement": {"mode": "unfreeze"}}, r"cannot be scaled to unfrozen blocks \(mode: unfreeze\)"),
        ({"share_base": True}, "placement's mode is 'lora'"),
        (
            {"placement": {"mode": "unfreeze"}, "base_learning_rate": None, "blueprint": None},
            "mode: unfreeze with quantization needs a blueprint",
        ),
        (
            {"placement": {"mode": "unfreeze"}, "base_learning_rate": None, "drift_policy": "refresh"},
            "drift_policy: refresh cannot change a placement",
        ),
    ],
)
def test_an_unsound_recipe_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(BlueprintError, match=message) as caught:
        Recipe.from_yaml(write(tmp_path, SOUND | changes))
    assert str(caught.value).startswith(str(tmp_path / "r.yaml")) and "\n" not in str(caught.value)


def test_an_invalid_recipe_is_refused(tmp_path):
    with pytest.raises(BlueprintError, match="cannot be read"):
        Recipe.from_yaml(tmp_path / "none.yaml")
    texts = {"a: [": "not valid YAML", "a: 1\na: 2": "not valid YAML", "- 1": "must be a mapping", "": "got nothing"}
    for text, message in {**texts, "model: x": "train is missing", "a: 2024-99-99": "not valid YAML"}.items():
        with pytest.raises(BlueprintError, match=message) as caught:
            Recipe.from_yaml(write(tmp_path, text))
        assert "\n" not in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["auto", "lora"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
SECTIONS = [None, *(name for name, value in SOUND.items() if isinstance(value, dict))]
KEYS = {None: [f.name for f in fields(Recipe)], "placement": [f.name for f in fields(RecipePlacement)]}


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_mutated_recipe_is_a_recipe_or_a_blueprint_error(tmp_path_factory, data):
    """Replaced, removed and added values, at the top and within sections, never raise anything else."""
    recipe = copy.deepcopy(SOUND)
    for _ in range(data.draw(st.integers(1, 3))):
        section = data.draw(st.sampled_from(SECTIONS))
        target = recipe if section is None else recipe.get(section)
        if isinstance(target, dict):
            keys = KEYS.get(section) or list(SOUND[section])
            key = data.draw(st.sampled_from(keys) | st.text(max_size=5))
            target[key] = data.draw(VALUES)
            if data.draw(st.integers(0, 4)) == 0:
                del target[key]
    path = tmp_path_factory.getbasetemp() / "mutated.yaml"
    with path.open("w") as file:
        YAML(typ="safe").dump(recipe, file)
    try:
        read = Recipe.from_yaml(path)
    except BlueprintError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert isinstance(read, Recipe)


def test_settings_suit_the_installed_transformers(tmp_path):
    """Checkpointing goes by its old or its new name; a stopping rule evaluates twenty times."""
    recipe = Recipe("m", "t", str(tmp_path), held_out="h")
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        arguments = training_settings(replace(recipe, training={name: True}), progress=False)
        assert TrainingArguments(**arguments).gradient_checkpointing is True
    assert training_settings(replace(recipe, stop={}))["eval_steps"] == 0.05
    with pytest.raises(BlueprintError, match="use_reentrant: true sends"):
        training_settings(replace(recipe, training={"gradient_checkpointing_kwargs": {"use_reentrant": True}}))


def test_trls_arguments_are_known_to_a_recipe_for_trl(tmp_path):
    trl = pytest.importorskip("trl")
    path = write(tmp_path, SOUND | {"training": {"packing": True}})
    assert Recipe.from_yaml(path, trl.SFTConfig).training == {"packing": True}
