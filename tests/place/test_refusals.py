"""Modules that PEFT itself refuses are not placed. Run: pytest tests/place/test_refusals.py"""

from dataclasses import replace

import pytest
import torch
import transformers
from peft import LoraConfig, LoraModel, get_peft_model

from peft_blueprint import Blueprint, BlueprintConfig, Placement, generate_blueprint, plan_placement
from peft_blueprint.errors import PlacementError
from peft_blueprint.measure import find_submodules
from peft_blueprint.place.planner import refused_by_peft
from peft_blueprint.testing import tiny_llama, toy_batches


@pytest.fixture
def without_down(monkeypatch):
    """A release of PEFT that refuses `down_proj`."""

    def refuse(self, config, model, target_name):
        if target_name == "down_proj":
            raise ValueError("Module 'down_proj' is incompatible")

    monkeypatch.setattr(LoraModel, "_check_target_module_compatiblity", refuse)


def test_a_module_that_peft_refuses_is_not_placed(without_down):
    """Whichever it is; the plan counts it as left out, and the adapter goes on."""
    model = tiny_llama(layers=4)
    blueprint = generate_blueprint(model, toy_batches(4), progress=False)
    for options in ({"fraction": 1.0}, {"fraction": 1.0, "rank_by": "gradient_norm", "coverage": "none"}):
        placement = plan_placement(blueprint, model, **options)
        assert placement.left_out == 4 and placement.candidates == 24 and len(placement.lora) == 24
        adapted = get_peft_model(tiny_llama(layers=4), BlueprintConfig(placement=placement))
        assert len(adapted.targeted_module_names) == 24


def test_a_placement_on_a_refused_module_is_refused_by_name(without_down):
    """One that was planned elsewhere, or from a blueprint alone."""
    placement = Placement("m", ("model.layers.0.mlp.down_proj",), (), "gradient_norm", "none")
    with pytest.raises(PlacementError, match=r"down_proj \(refused by PEFT\).*Plan it again with the model"):
        get_peft_model(tiny_llama(), BlueprintConfig(placement=placement))


def test_a_pattern_that_is_none_is_named():
    """As text, `exclude_modules` is a regular expression."""
    entries = tuple(replace(entry, gradient_norm=1.0) for entry in find_submodules(tiny_llama(layers=1)))
    with pytest.raises(PlacementError, match=r"exclude_modules='\(' is not a regular expression: missing \)"):
        BlueprintConfig(blueprint=Blueprint("m", entries), exclude_modules="(")


@pytest.mark.parametrize("name", ["Mamba", "FalconMamba", "Mamba2", "FalconH1", "NemotronH"])
def test_the_models_on_pefts_list(name):
    """Placed adapters can be put on; PEFT's own check finds refused modules."""
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip("the installed transformers is older")
    config = getattr(transformers, f"{name}Config")(num_hidden_layers=2)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert refused_by_peft(model, ["layers.0.mixer.out_proj", "in_proj"]) == ["layers.0.mixer.out_proj"]
    found = find_submodules(model)
    claimed = next(n for n, m in model.named_modules() if n.endswith("out_proj") and isinstance(m, torch.nn.Linear))
    entries = tuple(replace(entry, gradient_norm=1.0) for entry in found)
    placement = plan_placement(Blueprint("m", entries), model, fraction=1.0, ranks="uniform")
    assert set(placement.lora) == {entry.name for entry in found} and claimed not in placement.lora
    linear = list(placement.target_modules)
    assert set(get_peft_model(model, LoraConfig(target_modules=linear)).targeted_module_names) == set(linear)
