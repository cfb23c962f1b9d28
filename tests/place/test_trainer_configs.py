"""Placements as other trainers' configurations, put to work the way each trainer does."""

import inspect
import sys
import types

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import ModulesToSaveWrapper
from transformers import HfArgumentParser

from peft_blueprint.errors import PlacementError
from peft_blueprint.place import trainer_configs as export
from peft_blueprint.place.placement import Placement
from peft_blueprint.place.trainer_configs import lora_settings, trainer_config
from peft_blueprint.testing import tiny_llama, tiny_mixtral
from tests.fused import needs_fused


# depth 1, in a model that has a depth 11 as well
LORA = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.10.mlp.down_proj")
BLOCKS = ("model.layers.1.self_attn", "model.layers.2.mlp")
EXPERTS = ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj")
TRAINERS = ("peft", "trl", "axolotl", "llamafactory", "unsloth", "swift")
ONE_RANK = ("trl", "llamafactory", "swift")


def placement(lora=LORA, unfreeze=(), **fields):
    return Placement("org/model", tuple(lora), tuple(unfreeze), "adam_gain", "kind+depth", **fields)


def adapted(model):
    """Return full names of adapted modules with rank and scaling, and of modules trained whole."""
    lora = {}
    for name, _ in model.named_modules():
        if name.endswith(".lora_A"):
            layer = model.get_submodule(name.removesuffix(".lora_A"))
            own = name.removeprefix("base_model.model.").removesuffix(".lora_A")
            if "parameter_name" in vars(layer):
                own = f"{own.removesuffix('.base_layer')}.{layer.parameter_name}"
            lora[own] = (layer.r["default"], layer.scaling["default"])
    whole = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    return lora, whole


def by_peft(text, model, monkeypatch):
    """The Python as it stands."""
    namespace = {"model": model}
    exec(text, namespace)
    return namespace["model"]


def by_trl(text, model, monkeypatch):
    """The YAML, read and made a LoraConfig by TRL's own command line."""
    trl = pytest.importorskip("trl")
    config = yaml.safe_load(text)
    [arguments] = HfArgumentParser(trl.ModelConfig).parse_dict(config)
    assert arguments.model_name_or_path == "org/model"
    return get_peft_model(model, trl.get_peft_config(arguments))


def by_swift(text, model, monkeypatch):
    """The YAML, handed to LoraConfig as ms-swift's pipelines/train/tuner.py does; its lists are lists there."""
    config = yaml.safe_load(text)
    assert config["tuner_type"] == "lora" and config["model"] == "org/model"
    assert all(config[key] for key in ("target_modules", "target_parameters", "modules_to_save") if key in config)
    settings = LoraConfig(
        r=config["lora_rank"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config["lora_dropout"],
        target_modules=config.get("target_regex") or config["target_modules"],
        target_parameters=config.get("target_parameters"),
        modules_to_save=config.get("modules_to_save", []),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)


def by_axolotl(text, model, monkeypatch):
    """The YAML, handed to LoraConfig as axolotl's loaders/adapter.py does; alphas must be whole there."""
    config = yaml.safe_load(text)
    assert config["adapter"] == "lora" and config["base_model"] == "org/model"
    patterns = {key: config[f"lora_{key}"] for key in ("rank_pattern", "alpha_pattern") if f"lora_{key}" in config}
    assert all(isinstance(value, int) for pattern in patterns.values() for value in pattern.values())
    settings = LoraConfig(
        r=config["lora_r"],
        lora_alpha=config["lora_alpha"],
        target_modules=config["lora_target_modules"],
        target_parameters=config.get("lora_target_parameters", []),
        lora_dropout=config["lora_dropout"],
        modules_to_save=config.get("lora_modules_to_save"),
        bias="none",
        task_type="CAUSAL_LM",
        **patterns,
    )
    return get_peft_model(model, settings)


def by_llamafactory(text, model, monkeypatch):
    """The YAML, split at commas and handed to LoraConfig as LLaMA-Factory's hparams and model/adapter.py do."""
    config = yaml.safe_load(text)
    assert config["finetuning_type"] == "lora" and isinstance(config["lora_alpha"], int)
    extra = config.get("additional_target")
    settings = LoraConfig(
        r=config["lora_rank"],
        target_modules=[item.strip() for item in config["lora_target"].split(",")],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config["lora_dropout"],
        modules_to_save=extra and [item.strip() for item in extra.split(",")],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)


def by_unsloth(text, model, monkeypatch):
    """Run the Python with a FastModel that passes LoraConfig's arguments on, as Unsloth's models/vision.py does."""

    def wrap(model, **settings):
        assert settings["target_parameters"] is not None, "Unsloth would add the experts of its own accord"
        assert set(settings) <= set(inspect.signature(LoraConfig).parameters)
        return get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))

    unsloth = types.SimpleNamespace(FastModel=types.SimpleNamespace(get_peft_model=wrap))
    monkeypatch.setitem(sys.modules, "unsloth", unsloth)
    return by_peft(text, model, monkeypatch)


LOADERS = {
    "peft": by_peft,
    "trl": by_trl,
    "axolotl": by_axolotl,
    "llamafactory": by_llamafactory,
    "unsloth": by_unsloth,
    "swift": by_swift,
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_each_trainer_adapts_exactly_the_placed_modules(trainer, monkeypatch):
    """Names of layer 1 reach no other layer, and every adapter has the rank and the scaling asked for."""
    text = trainer_config(placement(), trainer, r=4, lora_alpha=6)
    model = LOADERS[trainer](text, tiny_llama(layers=12), monkeypatch)
    assert adapted(model) == (dict.fromkeys(LORA, (4, 1.5)), set())


@pytest.mark.parametrize("trainer", TRAINERS)
def test_each_trainer_unfreezes_exactly_the_placed_blocks(trainer, monkeypatch):
    """Blocks beside adapters; the text says how to load a quantized base."""
    placed = placement(LORA[2:], BLOCKS)
    text = trainer_config(placed, trainer)
    model = LOADERS[trainer](text, tiny_llama(layers=12), monkeypatch)
    assert adapted(model) == ({LORA[2]: (16, 2.0)}, set(BLOCKS))
    assert "quantization_bit" in text if trainer == "llamafactory" else '"lm_head", "model.layers.1.self_attn"' in text


@pytest.mark.parametrize("trainer", TRAINERS)
def test_blocks_alone_are_unfrozen_or_refused(trainer, monkeypatch):
    """Without any adapter; for LLaMA-Factory the error names other trainers."""
    placed = placement((), BLOCKS)
    if trainer == "llamafactory":
        with pytest.raises(PlacementError, match="unfreezes blocks only beside LoRA.*lora.unfreeze.*use peft"):
            trainer_config(placed, trainer)
    else:
        model = LOADERS[trainer](trainer_config(placed, trainer), tiny_llama(layers=12), monkeypatch)
        assert adapted(model) == ({}, set(BLOCKS))
    assert export.NO_TARGETS == DUMMY_TARGET_MODULES


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module")  # PEFT looks for them among modules only
@needs_fused
@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("lora", [EXPERTS, (*LORA[:1], *EXPERTS)], ids=["experts", "both"])
def test_fused_experts_are_parameters_or_refused(trainer, lora, monkeypatch):
    """Where a trainer knows target_parameters they are in it; LLaMA-Factory does not, and dropout is an error."""
    placed = placement(lora, target_parameters=EXPERTS)
    if trainer == "llamafactory":
        with pytest.raises(PlacementError, match="no adapters on parameters.*experts.down_proj"):
            trainer_config(placed, trainer)
    else:
        model = LOADERS[trainer](trainer_config(placed, trainer, r=2, lora_alpha=2), tiny_mixtral(), monkeypatch)
        assert adapted(model) == (dict.fromkeys(lora, (2, 1.0)), set())
    with pytest.raises(PlacementError, match="lora_dropout=0.1 does not work on fused experts"):
        trainer_config(placed, trainer, lora_dropout=0.1)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_ranks_that_differ_keep_one_scaling(trainer, monkeypatch):
    """alpha_i / r_i is the same for all, r is the largest; trainers with one rank refuse with an error."""
    placed = placement(ranks=dict(zip(LORA, (2, 8, 4), strict=True)))
    if trainer in ONE_RANK:
        with pytest.raises(
            PlacementError, match=r"a single rank, and this placement has ranks \[2, 4, 8\].*--rank 2\), or use peft"
        ):
            trainer_config(placed, trainer)
    else:
        text = trainer_config(placed, trainer, r=16, lora_alpha=24)
        model = LOADERS[trainer](text, tiny_llama(layers=12), monkeypatch)
        assert adapted(model) == ({LORA[0]: (2, 1.5), LORA[1]: (8, 1.5), LORA[2]: (4, 1.5)}, set())
        assert (model.peft_config["default"].r, model.peft_config["default"].lora_alpha) == (8, 12)


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module")
@needs_fused
def test_ranks_of_fused_experts(monkeypatch):
    """A parameter's rank stands under its own name, beside a linear layer's."""
    placed = placement((LORA[0], *EXPERTS), target_parameters=EXPERTS, ranks={EXPERTS[0]: 3, EXPERTS[1]: 5})
    model = by_peft(trainer_config(placed, "peft", r=4), tiny_mixtral(), monkeypatch)
    assert adapted(model) == ({LORA[0]: (4, 2.0), EXPERTS[0]: (3, 2.0), EXPERTS[1]: (5, 2.0)}, set())


@pytest.mark.parametrize("trainer", ["peft", "axolotl"])
def test_many_ranks_become_one_pattern_for_each(trainer, monkeypatch):
    """PEFT tries each pattern on every module: 251 names of three ranks below the largest are three patterns."""
    names = [
        f"model.layers.{depth}.{kind}"
        for depth in range(36)
        for kind in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
        + ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    ranks = {name: 2 + i % 3 for i, name in enumerate(names)}
    placed = placement(names, ranks=ranks | dict.fromkeys(names[:60], 4))
    assert len(lora_settings(placed).rank_pattern) > 100, "few stand each for itself"
    placed = placement(names, ranks=ranks | {names[-1]: 5})
    assert len(lora_settings(placed).rank_pattern) == 3
    text = trainer_config(placed, trainer)
    model = LOADERS[trainer](text, tiny_llama(layers=36), monkeypatch)
    assert adapted(model) == ({name: (rank, 2.0) for name, rank in placed.ranks.items()}, set())


def test_the_placements_rank_is_the_default():
    """Its rank, twice that as alpha; its factor on the learning rate stands in a comment, and nothing where unknown."""
    text = trainer_config(placement(rank=8, learning_rate_scale=2.236), "llamafactory")
    assert yaml.safe_load(text)["lora_rank"] == 8 and yaml.safe_load(text)["lora_alpha"] == 16
    assert "# learning rate: start with about 2.24 times that of LoRA on every linear layer" in text
    plain = trainer_config(placement(), "llamafactory")
    assert yaml.safe_load(plain)["lora_rank"] == 16 and "learning rate" not in plain
    assert yaml.safe_load(trainer_config(placement(), "axolotl", r=4))["lora_alpha"] == 8


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_name_is_written_so_that_it_comes_back(trainer):
    """Quotes, line ends and YAML's signs in a model's name are escaped, in comments and in values."""
    odd = 'a "quoted"\n#: name — ünïcode'
    placed = Placement(odd, LORA, (), "adam_gain", "none")
    text = trainer_config(placed, trainer)
    if trainer not in ("peft", "unsloth"):
        assert odd in yaml.safe_load(text).values()
    else:
        compile(text, trainer, "exec")


@pytest.mark.parametrize(
    ("placed", "trainer", "settings", "message"),
    [
        (placement(()), "peft", {}, "'org/model' is empty"),
        (placement(), "fairseq", {}, "trainer='fairseq': choose peft, trl, axolotl, llamafactory, unsloth"),
        (placement(), "peft", {"r": 0}, "got r=0, lora_alpha=0,"),
        (placement(), "peft", {"lora_alpha": -1}, "lora_alpha=-1"),
        (placement(), "peft", {"lora_dropout": 1.0}, "lora_dropout=1.0"),
        (
            placement(ranks={LORA[0]: 5}),
            "axolotl",
            {"r": 16, "lora_alpha": 24},
            "axolotl needs an integer alpha, and rank 5 gets 7.5",
        ),
        (placement(("a,b",)), "llamafactory", {}, "by commas and cannot read 'a,b'"),
    ],
)
def test_settings_that_a_trainer_cannot_express_are_errors(placed, trainer, settings, message):
    """The error names it and a fix."""
    with pytest.raises(PlacementError, match=message):
        trainer_config(placed, trainer, **settings)
