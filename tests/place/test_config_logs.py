"""What a `BlueprintConfig` shows of itself in prints and in trackers, and beside other adapters."""

import dataclasses
import json

import pytest
from peft import LoraConfig, get_peft_config, get_peft_model
from transformers import LlamaConfig

from peft_blueprint import BlueprintConfig, plan_placement
from peft_blueprint.blueprint import to_dict
from peft_blueprint.errors import PlacementError
from peft_blueprint.measure import empty_model
from peft_blueprint.place import PlacementOptions
from peft_blueprint.testing import tiny_llama
from tests.planning import BLUEPRINT, measured


LARGE = tiny_llama(layers=24, hidden_size=16, intermediate_size=24)
RECORD = measured(LARGE, alignment=(1.0,) * 16)  # 168 submodules


@pytest.mark.parametrize(
    "options", [{}, {"ranks": "score"}, {"mode": "lora+unfreeze"}, {"budget": "0.9x"}, {"fraction": 1.0}], ids=str
)
@pytest.mark.parametrize("given", ["object", "dict", "placement"])
def test_a_print_is_short(options, given):
    """Of the config, alone or as a model's `peft_config`, of the blueprint and of the placement."""
    record = RECORD if given == "object" else to_dict(RECORD)
    source = {"placement": plan_placement(RECORD, LARGE, **options)} if given == "placement" else {"blueprint": record}
    config = BlueprintConfig(**source, **({} if given == "placement" else options), task_type="CAUSAL_LM")
    assert len(repr(config)) < 1000
    config.resolve(LARGE)
    assert len(repr({"default": config})) < 1000 and "CAUSAL_LM" in repr(config) and "org/m" in repr(config)
    assert len(repr(RECORD)) < 200 and len(repr(config.placement)) < 300


@pytest.mark.parametrize(
    "as_logged", [lambda c: c.to_dict(), dataclasses.asdict, str], ids=["to_dict", "asdict", "str"]
)
@pytest.mark.parametrize("options", [{}, {"budget": "0.9x"}], ids=str)
def test_trackers_get_the_digest_and_the_placement(as_logged, options):
    """By each way in which they read a config: not the blueprint."""
    config = BlueprintConfig(blueprint=RECORD, **options, task_type="CAUSAL_LM").resolve(LARGE)
    logged = as_logged(config)
    text = logged if isinstance(logged, str) else json.dumps(logged, default=list)
    assert RECORD.digest[:20] in text and "alignment" not in text and len(text) < 60_000
    if not isinstance(logged, str):
        assert logged["blueprint"] == RECORD.digest
        assert list(logged["placement"]["lora"]) == list(config.placement.lora)


def test_the_digest_makes_the_same_config_and_the_folder_holds_the_blueprint(tmp_path):
    """The logged object has the placement; the recipe beside a saved adapter has everything."""
    config = BlueprintConfig(blueprint=RECORD, task_type="CAUSAL_LM")
    again = get_peft_config(json.loads(json.dumps(config.to_dict(), default=list)))
    assert again.selection == config.selection and again.record is None and config.record is RECORD
    get_peft_model(LARGE, again)
    config.save_pretrained(tmp_path)
    recipe = json.loads((tmp_path / "blueprint_config.json").read_text())
    assert recipe["blueprint"] == json.loads(json.dumps(to_dict(RECORD)))
    assert BlueprintConfig(blueprint=recipe["blueprint"]).selection == config.selection
    with pytest.raises(PlacementError, match="which is the digest of one"):
        BlueprintConfig(blueprint=RECORD.digest)


FIRST = {"mode": "unfreeze", "rank_by": "last", "coverage": "none"}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (FIRST, {"rank_by": "last", "coverage": "none", "num_modules": 8}, "trains .* whole, and PEFT puts no other"),
        (
            FIRST | {"mode": "lora+unfreeze", "num_modules": 4},
            {"fraction": 1.0},
            "trains .* whole, and PEFT puts no other",
        ),
        ({"fraction": 1.0}, FIRST, "would be trained whole, and another adapter is on"),
    ],
)
def test_a_second_adapter_inside_an_unfrozen_block_is_refused_in_words(first, second, message):
    """With the way out, which works."""
    model = get_peft_model(tiny_llama(layers=6), BlueprintConfig(blueprint=BLUEPRINT, **first))
    with pytest.raises(PlacementError, match=message) as raised:
        model.add_adapter("second", BlueprintConfig(blueprint=BLUEPRINT, **second))
    assert "second" not in model.peft_config
    if "exclude_modules=" in str(raised.value):
        pattern = str(raised.value).split("exclude_modules='")[1].split("'")[0].replace("\\\\", "\\")
        options = second if "fraction" in second else second | {"num_modules": 4}
        model.add_adapter("second", BlueprintConfig(blueprint=BLUEPRINT, exclude_modules=pattern, **options))
        assert model.peft_config["second"].selection


@pytest.mark.parametrize("same", [True, False])
def test_a_second_adapter_with_the_same_blocks_is_added(same):
    """As a reference for preference training, from the same config object or another one."""
    config = BlueprintConfig(blueprint=BLUEPRINT, **FIRST)
    model = get_peft_model(tiny_llama(layers=6), config)
    model.add_adapter("ref", config if same else BlueprintConfig(blueprint=BLUEPRINT, **FIRST))
    assert set(model.peft_config) == {"default", "ref"}


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "sdpa", "flex_attention", "eager"])
def test_an_empty_model_needs_no_kernels(attention):
    """That a config asks for; the config stays as it is."""
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config._attn_implementation = attention
    assert next(empty_model(config).parameters()).is_meta
    assert config._attn_implementation == attention
    assert plan_placement(None, config, PlacementOptions(num_modules=2)).lora


def test_plain_lora_is_left_alone():
    """A `LoraConfig` prints and logs as PEFT has it."""
    assert "target_modules" in repr(LoraConfig(target_modules=["q_proj"]))
