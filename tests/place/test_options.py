"""One dataclass of options, and the same placement from Python, a config, the command line and a recipe."""

import json
from dataclasses import fields, replace

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from typer.testing import CliRunner

from peft_blueprint import BlueprintConfig, plan_placement
from peft_blueprint._options import from_mapping
from peft_blueprint.cli import app
from peft_blueprint.compare import ProbeOptions
from peft_blueprint.errors import BlueprintError, PlacementError
from peft_blueprint.place import PlacementOptions, Workload
from peft_blueprint.testing import tiny_llama
from peft_blueprint.train import run
from peft_blueprint.train.recipe import Recipe, RecipePlacement
from tests.planning import BLUEPRINT, LLAMA


def test_every_option_explains_itself_and_is_a_field_of_the_config():
    """With the same default and help; all others are LoraConfig's or of the config itself."""
    own = {f.name: f for cls in (PlacementOptions, ProbeOptions) for f in fields(cls)}
    of_config = {f.name: f for f in fields(BlueprintConfig)}
    for name, option in own.items():
        assert option.metadata["help"].endswith(".")
        assert of_config[name].default == option.default and of_config[name].metadata == option.metadata
    assert set(of_config) - set(own) - {f.name for f in fields(LoraConfig)} == {"blueprint", "placement", "workload"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fraction": 0.3},
        {"fraction": "k_star"},
        {"best": "gain_per_cost"},
        {"best": "gain_per_cost", "overhead": 0.5},
        {"keep": 0.8},
        {"r": 8},
        {"ranks": "score", "num_modules": 9},
        {"budget": "0.8x"},
        {"budget": "6k parameters"},
        {"coverage": "none", "rank_by": "gradient_norm"},
        {"mode": "unfreeze"},
    ],
    ids=str,
)
def test_planner_config_command_line_and_recipe_choose_the_same_placement(options, tmp_path):
    """For the same input, with nothing else said."""
    planned = plan_placement(BLUEPRINT, **options)
    assert plan_placement(BLUEPRINT, options=PlacementOptions(**options)) == planned
    if not {"budget", "best"} & options.keys():  # which a config leaves until the model is known
        assert BlueprintConfig(blueprint=BLUEPRINT, **options).placement == planned
    BLUEPRINT.save(tmp_path / "blueprint.json")
    flags = {"--rank" if name == "r" else f"--{name.replace('_', '-')}": str(value) for name, value in options.items()}
    words = [word for flag in flags.items() for word in flag]
    answer = CliRunner().invoke(app, ["targets", str(tmp_path / "blueprint.json"), "--format", "json", *words])
    assert json.loads(answer.stdout) == json.loads(json.dumps(planned.to_dict()))

    load = Workload()
    on_model = plan_placement(BLUEPRINT, LLAMA, workload=load, **options)
    config = BlueprintConfig(blueprint=BLUEPRINT, workload=load, **options).resolve(LLAMA)
    lora = {"r": options["r"]} if "r" in options else {}
    placement = {name: value for name, value in options.items() if name != "r"}
    recipe = Recipe("org/m", "train.jsonl", "out", placement=placement, lora=lora)
    from_recipe, _ = run._plan(recipe, BLUEPRINT, LLAMA, replace(load, rank=recipe.rank))
    rests_on_memory_or_time = "x" in str(options.get("budget")) or "best" in options
    for other in (config.placement, from_recipe, *([] if rests_on_memory_or_time else [planned])):
        assert (other.lora, other.unfreeze, other.rank) == (on_model.lora, on_model.unfreeze, on_model.rank)
        assert other.ranks == on_model.ranks
    ranks = [on_model.ranks.get(name, on_model.rank or 16) for name in on_model.lora]
    assert config.r == max(ranks, default=on_model.rank or 16)


def test_a_recipe_takes_k_star_and_the_best():
    """As YAML has them: a word in place of a number is checked as in Python."""
    found = from_mapping(RecipePlacement, {"fraction": "k_star"}, "recipe.yaml", BlueprintError)
    assert found.fraction == "k_star" and found.selector == {"fraction": "k_star"}
    assert from_mapping(RecipePlacement, {"best": "gain_per_cost", "memory": "1GiB"}, "f").best == "gain_per_cost"
    for wrong in ("0.2", "kstar"):
        with pytest.raises(BlueprintError, match="recipe.yaml: fraction must be"):
            from_mapping(RecipePlacement, {"fraction": wrong}, "recipe.yaml", BlueprintError)


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({}, 2),
        ({"lora_alpha": 16}, 1),
        ({"r": 4}, 2),
        ({"r": 4, "lora_alpha": 4}, 1),
        ({"ranks": "equal_parameters", "r": 4, "lora_alpha": 12}, 3),
        ({"budget": "6k parameters", "lora_alpha": 16}, 1),
        ({"ranks": "equal_parameters", "r": 4, "lora_alpha": 4, "use_rslora": True}, 2),
        ({"ranks": "score", "r": 4, "lora_alpha": 4, "use_rslora": True}, 2),
    ],
    ids=str,
)
def test_every_adapter_keeps_the_scaling_of_all_linear_lora(settings, scaling):
    """lora_alpha / r, with rsLoRA over the root; r is 16 where it is left out and lora_alpha 2 · r; for every rank."""
    config = BlueprintConfig(blueprint=BLUEPRINT, num_modules=None if "budget" in settings else 12, **settings)
    model = get_peft_model(tiny_llama(layers=6), config)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    planned = config.placement
    assert {layer.r["default"] for layer in layers} == {planned.ranks.get(n, planned.rank) for n in planned.lora}
    assert [layer.scaling["default"] for layer in layers] == pytest.approx([scaling] * len(layers))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_by": "even", "top_p": 0.5}, "top_p=0.5 needs scores, and rank_by='even' has none"),
        ({"num_modules": 3, "fraction": 0.5}, "both say how many"),
        ({"keep": 0.5, "threshold": 1.0}, "keep=0.5 and threshold=1.0 both say how much"),
        ({"best": "gain_per_cost", "fraction": 0.5}, "best='gain_per_cost' and fraction=0.5 both say how much"),
        ({"best": "gain_per_cost", "keep": 0.5}, "keep=0.5 and best='gain_per_cost' both say how much"),
        ({"best": "gain"}, "best must be gain_per_cost or gain_per_gb_hour, got 'gain'"),
        ({"best": "gain_per_cost", "overhead": -1}, "overhead must be a finite number of at least 0, got -1"),
        ({"overhead": 1.0}, "overhead=1.0 counts only with best"),
        ({"fraction": "kstar"}, r"fraction must be a number, got 'kstar' \(text\). Give a share .* or 'k_star'"),
        ({"fraction": "k_star", "top_p": 0.5}, "fraction=k_star and top_p=0.5 both say how many"),
        ({"ranks": "some"}, "ranks must be uniform, equal_parameters or score, got 'some'"),
        ({"unfreeze_blocks": 1}, "needs mode='lora.unfreeze', got mode='lora'"),
        ({"fractoin": 0.5}, "no option 'fractoin'. Did you mean 'fraction'"),
    ],
)
def test_contradictions_are_found_before_anything_is_read(options, message):
    """By the planner without a blueprint, and by the config with a missing one."""
    with pytest.raises(PlacementError, match=message):
        plan_placement(None, **options)
    if "fractoin" not in options:
        with pytest.raises(PlacementError, match=message):
            BlueprintConfig(blueprint="/nowhere", **options)
