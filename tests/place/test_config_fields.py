"""Every field of PEFT's `LoraConfig` in a `BlueprintConfig`: passed on, obeyed or refused."""

import dataclasses
import re

import pytest
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from peft_blueprint import BlueprintConfig, plan_placement
from peft_blueprint.errors import BlueprintError, PlacementError
from peft_blueprint.testing import tiny_llama, toy_batches
from tests.planning import BLUEPRINT


# passed on to the plain LoraConfig as they are, each with a value other than the default
PASSED_ON = {
    "task_type": "CAUSAL_LM",
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    "base_model_name_or_path": "org/m",
    "revision": "main",
    "inference_mode": True,
    "lora_dropout": 0.1,
    "fan_in_fan_out": True,
    "bias": "lora_only",
    "use_rslora": True,
    "init_lora_weights": "gaussian",
    "megatron_config": {"hidden_size": 32},
    "megatron_core": "other.core",
    "trainable_token_indices": [1, 2],
    "loftq_config": None,
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "use_dora": True,
    "velora_config": None,
    "alora_invocation_tokens": [3, 4],
    "use_qalora": True,
    "qalora_group_size": 8,
    "monteclora_config": None,
    "lora_bias": True,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "ensure_weight_tying": True,
    "runtime_config": None,
}
OBEYED = {"exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
REFUSED = {"layer_replication": [[0, 2], [1, 4]], "target_modules": ["q_proj"], "target_parameters": ["experts"]}
SETTLED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "peft_type", "peft_version"}


def test_every_field_of_lora_config_is_classified():
    """A field that a later PEFT adds has to be looked at: does it work where targets are full names?"""
    classified = {*PASSED_ON, *OBEYED, *REFUSED, *SETTLED}
    assert {f.name for f in dataclasses.fields(LoraConfig)} <= classified


@pytest.mark.parametrize("name", [name for name, value in PASSED_ON.items() if value is not None])
def test_a_field_is_passed_on(name):
    """To the plain LoraConfig that is saved."""
    if name not in LoraConfig.__dataclass_fields__:
        pytest.skip("this PEFT does not have it")
    config = BlueprintConfig(blueprint=BLUEPRINT, num_modules=4, **{"task_type": "CAUSAL_LM", name: PASSED_ON[name]})
    assert getattr(config.to_lora_config(), name) == PASSED_ON[name] == getattr(config, name)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("given", ["blueprint", "placement"])
def test_a_field_that_contradicts_full_names_is_refused(name, given):
    """By its name, beside a blueprint and beside a placement."""
    source = BLUEPRINT if given == "blueprint" else plan_placement(BLUEPRINT, num_modules=4)
    with pytest.raises(PlacementError, match=f"^{name}="):
        BlueprintConfig(**{given: source, name: REFUSED[name]})


@pytest.mark.parametrize(
    ("fields", "allows"),
    [
        ({"layers_to_transform": 0}, r"layers\.0\."),
        ({"layers_to_transform": [1, 3]}, r"layers\.[13]\."),
        ({"layers_to_transform": [1, 3], "layers_pattern": "layers"}, r"layers\.[13]\."),
        ({"exclude_modules": ["q_proj", "model.layers.1.mlp.up_proj"]}, r"(?!.*q_proj|.*\.1\.mlp\.up_proj)"),
        ({"exclude_modules": r".*\.mlp\..*"}, r".*self_attn"),
        ({"modules_to_save": ["model.layers.5.mlp"]}, r"(?!.*layers\.5\.mlp)"),
        ({"exclude_modules": ["q_proj"], "layers_to_transform": [2]}, r".*layers\.2\.(?!.*q_proj)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"fraction": 1.0}, {"budget": "0.9x"}, {"keep": 0.5}], ids=str)
def test_fields_that_leave_modules_out_are_obeyed(fields, allows, options):
    """The planner chooses among the rest, PEFT puts an adapter on each choice, and the saved config has full names."""
    config = BlueprintConfig(blueprint=BLUEPRINT, **options, **fields, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(layers=6), config)
    adapted = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert adapted == set(config.placement.lora) == set(config.to_lora_config().target_modules) != set()
    assert all(re.search(allows, name) if allows.startswith("layers") else re.match(allows, name) for name in adapted)
    plain = get_peft_model(tiny_llama(layers=6), config.to_lora_config())
    assert get_peft_model_state_dict(plain).keys() == get_peft_model_state_dict(model).keys()


def test_blocks_are_unfrozen_where_the_fields_allow():
    """Whole: a block of which a module is left out stays frozen."""
    config = BlueprintConfig(blueprint=BLUEPRINT, mode="unfreeze", layers_to_transform=[2])
    assert config.placement.unfreeze and all(".2." in name for name in config.placement.unfreeze)
    config = BlueprintConfig(blueprint=BLUEPRINT, mode="unfreeze", fraction=1.0, exclude_modules=["up_proj"])
    assert {name.rpartition(".")[2] for name in config.placement.unfreeze} == {"self_attn"}
    with pytest.raises(PlacementError, match="leave none of the 42 entries"):
        BlueprintConfig(blueprint=BLUEPRINT, exclude_modules=".*")


def test_a_placement_that_a_field_contradicts_is_refused():
    """With the names that the field leaves out."""
    placement = plan_placement(BLUEPRINT, num_modules=4, rank_by="last", coverage="none")
    for fields in ({"layers_to_transform": [0]}, {"exclude_modules": r".*layers\.5.*"}):
        with pytest.raises(PlacementError, match=rf"^{next(iter(fields))}=.* leave out 'model.layers.5"):
            BlueprintConfig(placement=placement, **fields)
    assert BlueprintConfig(placement=placement, layers_to_transform=[4, 5]).selection == placement.lora


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("options", "is_obeyed"),
    [
        ({"ranks": "score"}, False),
        ({}, False),
        ({"ranks": "equal_parameters", "r": 4}, False),
        ({"budget": "20k parameters"}, False),
        ({"r": 8}, True),
        ({"ranks": "uniform"}, True),
    ],
    ids=str,
)
def test_ranks_of_the_user_are_obeyed_or_refused(pattern, options, is_obeyed):
    """Obeyed where adapters have the rank r and no budget counts it."""
    given = {"blueprint": BLUEPRINT, "task_type": "CAUSAL_LM", "num_modules": 12, **options, pattern: {"v_proj": 2}}
    if "budget" in options:
        del given["num_modules"]
    if not is_obeyed:
        with pytest.raises(PlacementError, match=pattern):
            get_peft_model(tiny_llama(layers=6), BlueprintConfig(**given))
        return
    model = get_peft_model(tiny_llama(layers=6), BlueprintConfig(**given))
    r = model.peft_config["default"].r
    layers = {name.rpartition(".")[2]: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert {m.r["default"] for m in layers.values()} == ({2, r} if pattern == "rank_pattern" else {r})
    assert layers["v_proj"].lora_alpha["default"] == (2 * r if pattern == "rank_pattern" else 2)


@pytest.mark.filterwarnings("ignore:.*_config. is not specified")
@pytest.mark.parametrize(
    ("how", "options", "message"),
    [
        ("orthogonal", {"r": 5, "ranks": "score"}, "even ranks"),
        ("orthogonal", {"r": 3}, "even ranks"),
        ("eva", {"r": 5, "ranks": "score"}, "distributes ranks itself"),
        *((how, {"r": 40}, "singular vectors") for how in ("pissa", "pissa_niter_4", "olora", "mica", "corda", "eva")),
    ],
)
@pytest.mark.filterwarnings("ignore:lora with eva initialization:UserWarning")
def test_initialisations_that_cannot_start_the_ranks_are_refused(how, options, message):
    """In words, instead of an error of torch or weights of another shape; a plan has no rank above the full one."""
    placement = plan_placement(BLUEPRINT, num_modules=6, **options)
    if message == "singular vectors":
        assert max([placement.rank, *placement.ranks.values()]) <= 32
        placement = dataclasses.replace(placement, rank=options["r"], ranks={})
    config = BlueprintConfig(placement=placement, init_lora_weights=how)
    with pytest.raises(PlacementError, match=f"init_lora_weights='{how}'.*{message}"):
        get_peft_model(tiny_llama(layers=6), config)


@pytest.mark.parametrize(
    "how",
    ["orthogonal", "pissa", "olora", "gaussian", *(["mica"] if hasattr(LoraLayer, "mica_init") else [])],
)
@pytest.mark.parametrize("options", [{}, {"r": 16, "ranks": "score"}], ids=str)
def test_initialisations_start_planned_ranks(how, options):
    """Also where ranks differ: raised ones end at a weight's full rank."""
    config = BlueprintConfig(blueprint=BLUEPRINT, init_lora_weights=how, **{"num_modules": 6, **options})
    model = get_peft_model(tiny_llama(layers=6), config)
    for module in (m for m in model.modules() if isinstance(m, LoraLayer)):
        assert module.lora_A["default"].weight.shape == (module.r["default"], module.in_features)
    assert model(**toy_batches()[0]).loss.isfinite()


WRONG = {
    "workload": [3],
    "lora_alpha": ["x", True, 0, -1.0, float("nan"), float("inf")],
    "lora_dropout": [2, -0.1, 1.0, "x", None, float("nan")],
    "bias": ["nope", None],
    "init_lora_weights": [3, None],
    "exclude_modules": [3, [3], {"q_proj": 1}],
    "modules_to_save": ["lm_head", 3, [3]],
    "layers_to_transform": ["0", True, [1.5], {0: 1}],
    "rank_pattern": [{"q_proj": 0}, {"q_proj": 2.5}, {"(": 4}, [1], "q_proj"],
    "alpha_pattern": [{"q_proj": 0}, {"q_proj": "x"}, {3: 4}],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, of in WRONG.items() for value in of], ids=str)
def test_values_of_another_type_or_range_are_refused(field, value):
    """By the field's name, before anything is computed from them; PEFT takes some silently."""
    with pytest.raises(PlacementError, match=rf"^{field} must be .*, got {re.escape(repr(value))}\.$"):
        BlueprintConfig(blueprint=BLUEPRINT, num_modules=3, r=8, **{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task_type": "nope"}, r"PEFT refuses the adapter: Invalid task type: 'nope'.* Correct task_type='nope'\.$"),
        ({"init_lora_weights": "nope"}, r"Unknown initialization .* Correct init_lora_weights='nope'\.$"),
        ({"trainable_token_indices": [1000]}, r"out of bounds .* Correct trainable_token_indices=\[1000\]\.$"),
        ({"kasa_config": 3}, r"KasaConfig.* Correct kasa_config=3\.$"),
        ({"layers_pattern": "layers"}, "^layers_pattern='layers' .* needs layers_to_transform"),
        ({"modules_to_save": ["lm_head", "nope"]}, "modules_to_save names 'nope', and the model has no such module"),
    ],
    ids=str,
)
def test_peft_refusals_are_one_error_that_names_the_fields(fields, message):
    """When the config is made, or when the adapter is put on."""
    if not fields.keys() <= LoraConfig.__dataclass_fields__.keys():
        pytest.skip("this PEFT does not have it")
    with pytest.raises(BlueprintError, match=message):
        get_peft_model(tiny_llama(layers=6), BlueprintConfig(blueprint=BLUEPRINT, num_modules=3, **fields))
