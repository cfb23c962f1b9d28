"""The plugin for axolotl plans, initializes and keeps the ledger through axolotl's hooks.

axolotl is not installed: a class with the hooks of its BasePlugin (0.19) stands in for it.

Run: pytest tests/train/test_axolotl.py
"""

import importlib
import sys
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import BaseModel
from transformers import AutoModelForCausalLM

from peft_blueprint import BlueprintError
from peft_blueprint.runs import RunRecord
from peft_blueprint.testing import save_tiny_model
from tests.accounts import make_trainer


class BasePlugin:
    """The hooks that the plugin uses, with the signatures of axolotl 0.19."""

    def register(self, cfg):
        """Called before the configuration is validated."""

    def get_input_args(self):
        """Return the dotted name of a pydantic class."""

    def post_trainer_create(self, cfg, trainer):
        """Called once the trainer is made."""

    def add_callbacks_post_trainer(self, cfg, trainer):
        """Return callbacks."""
        return []


class Config(dict):
    """As axolotl's: None for missing keys, keys as attributes."""

    def __missing__(self, key):
        return None

    __getattr__ = dict.__getitem__


@pytest.fixture(scope="module")
def plugin():
    """The plugin, found by its name as axolotl finds it."""
    names = ("axolotl", "axolotl.integrations", "axolotl.integrations.base")
    modules = {name: ModuleType(name) for name in names}
    modules[names[-1]].BasePlugin = BasePlugin
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module("peft_blueprint.axolotl").BlueprintPlugin()
    sys.modules.pop("peft_blueprint.axolotl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model's folder."""
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


def test_a_run_is_planned_started_and_recorded_from_the_configuration(plugin, folder, tmp_path):
    """The adapter is where the plan has it, A has turned, B is zero, and the rule judges the run."""
    cfg = Config(base_model=folder, lora_r=4, lora_alpha=8, plugins=["peft_blueprint.axolotl.BlueprintPlugin"])
    cfg["peft_blueprint"] = {"num_modules": 3, "start_examples": 4, "stop": {"resource": "tokens"}, "carbon": "FRA"}
    plugin.register(cfg)
    assert len(cfg["lora_target_modules"]) == 3 and (cfg["lora_r"], cfg["lora_alpha"]) == (4, 8)
    assert cfg["adapter"] == "lora"
    module, _, name = plugin.get_input_args().rpartition(".")
    validated = getattr(importlib.import_module(module), name)(**cfg)
    assert isinstance(validated, BaseModel) and validated.peft_blueprint == cfg["peft_blueprint"]
    settings = LoraConfig(r=cfg["lora_r"], lora_alpha=cfg["lora_alpha"], target_modules=cfg["lora_target_modules"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings)
    assert {n for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")} == set(
        cfg["lora_target_modules"]
    )
    before = {n: p.clone() for n, p in model.named_parameters() if "lora_" in n}
    trainer = make_trainer(tmp_path, model, max_steps=2, eval_steps=1)
    plugin.post_trainer_create(cfg, trainer)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, before[name]) == ("lora_B" in name)
    for callback in plugin.add_callbacks_post_trainer(cfg, trainer):
        trainer.add_callback(callback)
    trainer.train()
    record = RunRecord.load(tmp_path)
    assert record.resource == "tokens" and record.stopping is not None and record.total("tokens").value > 0
    assert set(record.about["placement"]["lora"]) == set(cfg["lora_target_modules"])


@pytest.mark.parametrize("changes", [{"lora_model_dir": "adapter"}, {"resume_from_checkpoint": "checkpoint-2"}])
def test_an_adapter_that_was_trained_is_not_initialized(plugin, changes):
    """Not even looked at: the trainer is none."""
    plugin.post_trainer_create(Config(peft_blueprint={"start_examples": 4}, **changes), None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"adapter": "mora"}, "adapter must be lora or qlora with peft_blueprint, got mora"),
        ({"lora_target_linear": True}, "peft_blueprint sets lora_target_linear: leave it out"),
        ({"peft_blueprint": {"start_examples": 4}, "deepspeed": "zero3.json"}, "start_examples needs whole weights"),
        ({"peft_blueprint": {"start_examples": -1}}, "start_examples must be an integer of at least 0, got -1"),
        ({"peft_blueprint": {"fractoin": 0.2}}, "peft_blueprint has no option 'fractoin'"),
        ({"peft_blueprint": {"stop": {"patiense": 2}}}, "stop has no option 'patiense'"),
        ({"peft_blueprint": [0.2]}, "peft_blueprint must be a mapping"),
    ],
)
def test_configurations_that_cannot_be_meant_are_refused(plugin, folder, changes, says):
    """Before any model is loaded, in one line."""
    with pytest.raises(BlueprintError, match=says):
        plugin.register(Config(base_model=folder, **changes))
