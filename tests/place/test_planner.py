"""Placements under budgets: never exceeded, with a clear error for too small ones, quick on large models."""

import json
import re
import time
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import LlamaConfig, Qwen3MoeConfig

from peft_blueprint import Blueprint, BlueprintConfig, Placement, Submodule, plan_placement
from peft_blueprint.blueprint import best_share
from peft_blueprint.errors import BlueprintError, MismatchError, PlacementError
from peft_blueprint.measure import empty_model
from peft_blueprint.measure.submodules import find_submodules
from peft_blueprint.place.budget import Budget
from peft_blueprint.place.cost import CostModel, Structure, Workload, workload_of
from peft_blueprint.place.coverage import FUSED
from peft_blueprint.place.gains import CoverGain
from peft_blueprint.place.options import RankBy
from peft_blueprint.place.scores import SCORES
from peft_blueprint.place.trainer_configs import trainer_config
from peft_blueprint.testing import quantize, tiny_gpt2, tiny_llama, tiny_mixtral
from tests.fused import needs_fused
from tests.planning import BLUEPRINT, LLAMA, measured


LOAD = Workload(batch_size=2, length=32, dtype="float32", device="cpu", rank=4)


BUDGETS = st.one_of(
    st.builds(lambda share: {"time": share}, st.floats(0.3, 1.2)),
    st.builds(lambda size: {"memory": size}, st.integers(300_000, 3_000_000)),
    st.builds(lambda count: {"parameters": count}, st.integers(100, 40_000)),
    st.builds(lambda count: {"modules": count}, st.integers(1, 60)),
    st.builds(lambda a, b: {"time": a, "modules": b}, st.floats(0.3, 1.2), st.integers(1, 60)),
)


@settings(deadline=None, max_examples=60)
@given(
    budget=BUDGETS,
    gains=st.lists(st.floats(0.01, 100), min_size=42, max_size=42),
    coverage=st.sampled_from(["none", "kind", "kind+depth"]),
    ranks=st.sampled_from(["uniform", "score"]),
    mode=st.sampled_from(["lora", "unfreeze"]),
)
def test_a_budget_that_is_accepted_is_never_exceeded(budget, gains, coverage, ranks, mode):
    """For any blueprint, limit and rule; a refusal names a limit that is then accepted."""
    blueprint = measured(LLAMA, gains)
    wish = {"coverage": coverage, "ranks": ranks, "mode": mode, "workload": LOAD}
    try:
        placement = plan_placement(blueprint, LLAMA, budget=budget, **wish)
    except PlacementError as error:
        if len(budget) > 1:
            return
        [least] = re.findall(r"Give at least '(.+)'\.$", str(error))
        placement = plan_placement(blueprint, LLAMA, budget=least, **wish)
        budget = Budget.of(least).limits
    real = CostModel(Structure.of(LLAMA), LOAD)
    cost = real.cost({name: placement.ranks.get(name, 4) for name in placement.lora}, placement.unfreeze)
    modules = len(placement.lora) + len(placement.unfreeze)
    spent = {
        "time": real.time_ratio(cost),
        "memory": cost.bytes,
        "parameters": cost.trainable,
        "modules": modules,
    }
    assert modules and all(spent[name] <= limit for name, limit in budget.items())
    assert {name: placement.cost[name] for name in spent} == pytest.approx(spent)


@pytest.mark.parametrize(
    ("smaller", "larger"), [("0.5x", "0.9x"), ("1k params", "9k params"), ("3 modules", "30 modules")]
)
def test_a_larger_budget_keeps_more(smaller, larger):
    """Of the predicted gain."""
    plans = [plan_placement(BLUEPRINT, LLAMA, budget=budget, workload=LOAD) for budget in (smaller, larger)]
    assert plans[0].gain_retained < plans[1].gain_retained <= 1


def test_a_budget_of_time_raises_the_lowest_layer():
    """Time below that of a whole backward pass is only there if the pass stops early."""
    everything = plan_placement(BLUEPRINT, LLAMA, fraction=1.0, workload=LOAD)
    assert everything.cost["lowest"] == 0 and everything.cost["time"] == pytest.approx(1.0)
    assert everything.learning_rate_scale == pytest.approx(1.0) and everything.gain_retained == pytest.approx(1.0)
    half = plan_placement(BLUEPRINT, LLAMA, budget="0.6x", workload=LOAD)
    assert half.cost["lowest"] == min(int(name.split(".")[2]) for name in half.lora) > 0
    assert half.gain_retained < 1 and half.rank > 4


def test_keep_is_the_cheapest_that_keeps_so_much():
    """No faster choice of the family keeps as much; a budget that forbids it is named with its largest gain."""
    placement = plan_placement(BLUEPRINT, LLAMA, keep=0.8, workload=LOAD)
    assert placement.gain_retained >= 0.8 and placement.cost["time"] < 1
    assert placement.selector == {"keep": 0.8}
    faster = plan_placement(BLUEPRINT, LLAMA, budget={"time": placement.cost["time"] - 1e-6}, workload=LOAD)
    assert faster.gain_retained < 0.8
    with pytest.raises(PlacementError, match=r"keep=0.8 cannot be met within 3 modules, which allows \d\d\.\d% of"):
        plan_placement(BLUEPRINT, LLAMA, keep=0.8, budget="3 modules", workload=LOAD)


@pytest.mark.parametrize("mode", ["lora", "unfreeze"])
@pytest.mark.parametrize("objective", ["gain_per_cost", "gain_per_gb_hour"])
def test_the_best_has_the_most_gain_per_cost_of_its_family(objective, mode):
    """Eq. 8: no size from the bottom gives more for its step time, or for that times its memory."""
    gains = [1.0 + 5 * (i % 7 == 3) + (i > 20) for i in range(42)]
    wish = {"mode": mode, "workload": LOAD}
    found = plan_placement(measured(LLAMA, gains), LLAMA, best=objective, **wish)

    def value(placement):
        memory = placement.cost["memory"] if objective == "gain_per_gb_hour" else 1
        return placement.gain_retained / (placement.cost["time"] * memory)

    sizes = (1, 2, 4, 7, found.candidates // 2, found.candidates)
    others = [plan_placement(measured(LLAMA, gains), LLAMA, num_modules=n, per_cost=True, **wish) for n in sizes]
    assert value(found) >= max(map(value, others)) * (1 - 1e-9)
    assert found.gain_per_cost == pytest.approx(value(found) / value(others[-1])) and found.gain_per_cost > 1
    assert found.selector == {"best": objective}
    assert f"Gain per cost: {found.gain_per_cost:.2f} times that of all {found.candidates} candidates" in str(found)


def test_an_optimum_outside_the_interior_is_noted():
    """All where a fixed cost outweighs every step (eq. 16); one where the gain is in one; what a budget keeps from."""
    wish = {"best": "gain_per_cost", "workload": LOAD}
    few = plan_placement(BLUEPRINT, LLAMA, **wish)
    more = plan_placement(BLUEPRINT, LLAMA, overhead=5.0, **wish)
    assert len(few.lora) < len(more.lora) < 42 and not more.notes
    everything = plan_placement(BLUEPRINT, LLAMA, overhead=1e6, **wish)
    assert len(everything.lora) == 42 and everything.gain_per_cost == pytest.approx(1)
    assert everything.notes == (
        "Gain per cost rises up to all 42: it has no interior optimum (eq. 16), so all are chosen.",
    )
    within = plan_placement(BLUEPRINT, LLAMA, overhead=1e6, budget="9 modules", **wish)
    assert len(within.lora) == 9 and within.notes[0].endswith("so the most per cost within the budget is chosen.")
    one = plan_placement(measured(LLAMA, [1e-9] * 41 + [1.0]), LLAMA, **wish)
    assert one.lora == ("model.layers.5.mlp.down_proj",) and "falls from the first on" in one.notes[0]
    bound = plan_placement(BLUEPRINT, LLAMA, budget="3 modules", **wish)
    assert f"Without the budget, {len(few.lora)} would give the most gain per cost" in bound.notes[0]
    less = 1 - bound.gain_per_cost / few.gain_per_cost
    assert f"this choice gives {100 * less:.2g} % less" in str(bound)
    assert Placement.from_dict(json.loads(json.dumps(bound.to_dict()))) == bound


def test_an_unmeasured_time_constant_is_marked_as_an_estimate():
    """On cuda, where time decides; not with an own constant, on a CPU, or for a number of modules."""
    cuda = replace(LOAD, device="cuda")
    decided = {"best": "gain_per_cost"}, {"keep": 0.5}, {"budget": "0.9x"}
    for wish in decided:
        assert "time constant of cuda is an estimate" in str(plan_placement(BLUEPRINT, LLAMA, workload=cuda, **wish))
        own = plan_placement(BLUEPRINT, LLAMA, workload=replace(cuda, flops_per_byte=12.0), **wish)
        assert not own.notes and own.cost == plan_placement(BLUEPRINT, LLAMA, workload=LOAD, **wish).cost
    assert not plan_placement(BLUEPRINT, LLAMA, workload=cuda, num_modules=3).notes
    with pytest.raises(PlacementError, match="flops_per_byte must be a positive number, got 0"):
        Workload(flops_per_byte=0)


@pytest.mark.parametrize("mode", ["lora", "unfreeze"])
def test_k_star_is_a_share_of_the_parameters(mode):
    """The number of submodules or blocks that comes nearest to it, by any ranking; the file's number, or its own."""
    for k in (0.05, 0.3, 0.62, 1.0):
        blueprint = replace(BLUEPRINT, costs={"k_star": k})
        found = plan_placement(blueprint, LLAMA, mode=mode, fraction="k_star", workload=LOAD)
        taken = len(found.lora) + len(found.unfreeze)
        sizes = [n for n in (taken - 1, taken + 1) if 0 < n <= found.candidates]
        for other in (plan_placement(blueprint, LLAMA, mode=mode, num_modules=n, workload=LOAD) for n in sizes):
            assert abs(found.shares["parameters"] - k) <= abs(other.shares["parameters"] - k) + 1e-9
        assert found.selector == {"k_star": k}
        assert found.notes == (
            (f"k* is 100 % of the parameters, so all {found.candidates} are chosen.",) if k == 1 else ()
        )
    measured_k = plan_placement(BLUEPRINT, mode=mode, fraction="k_star").selector["k_star"]
    assert measured_k == best_share(BLUEPRINT).share < 1
    shapeless = Blueprint(
        "m", tuple(replace(entry, shape=None) for entry in replace(BLUEPRINT, costs={"k_star": 0.5}))
    )
    assert (
        len(plan_placement(replace(shapeless, costs={"k_star": 0.5}), fraction="k_star", coverage="none").lora) == 21
    )
    with pytest.raises(PlacementError, match="fraction='k_star' needs a blueprint"):
        plan_placement(None, LLAMA, fraction="k_star")


def test_half_and_twice_as_much_are_listed():
    """The neighbours stand in the placement and in its table."""
    placement = plan_placement(BLUEPRINT, LLAMA, num_modules=12, workload=LOAD)
    smaller, larger = placement.alternatives
    assert (smaller["modules"], larger["modules"]) == (6, 24)
    assert (
        smaller["gain_retained"] < placement.gain_retained < larger["gain_retained"]
        and smaller["time"] < larger["time"]
    )
    text = str(placement)
    for part in (
        "org/m: 12 adapters of rank 8 of 42 candidates by cover_gain",
        "down_proj",
        "next smaller",
        "next larger",
        "Learning rate: ",
    ):
        assert part in text


def test_by_default_a_seventh_of_the_submodules_covers_the_model_within_all_linears_parameters():
    """About one to a block, as wide as servers' ranks allow; each adds most to the coverage, for any order of entries."""
    placement = plan_placement(BLUEPRINT, LLAMA, workload=LOAD)
    assert placement.rank_by == "cover_gain" and placement.selector == {"fraction": pytest.approx(1 / 7)}
    assert len(placement.lora) == 6 and len({name.split(".")[2] for name in placement.lora}) >= 5
    everything = plan_placement(BLUEPRINT, LLAMA, fraction=1.0, r=LOAD.rank, workload=LOAD)
    assert placement.rank == 16 and 0.5 < placement.cost["parameters"] / everything.cost["parameters"] <= 1
    gains = [entry.adam_gain for entry in BLUEPRINT]
    order = CoverGain(BLUEPRINT.submodules, gains).greedy(count=6)
    assert set(placement.lora) == {BLUEPRINT.submodules[i].name for i in order}


def test_the_default_where_a_seventh_would_not_do():
    """At one rank most of the gain is kept; blocks, other selectors and coverages, and norms alone have scores."""
    uniform = plan_placement(BLUEPRINT, LLAMA, ranks="uniform", workload=LOAD)
    assert uniform.selector == {"keep": 0.95} and uniform.rank_by == "cover_gain" and uniform.gain_retained >= 0.95
    for wish in ({"mode": "unfreeze"}, {"coverage": "none"}, {"top_p": 0.5}, {"threshold": 0.0}):
        assert plan_placement(BLUEPRINT, LLAMA, workload=LOAD, **wish).rank_by == "adam_gain"
    norms = replace(BLUEPRINT, submodules=tuple(replace(entry, adam_gain=None) for entry in BLUEPRINT))
    plain = plan_placement(norms, LLAMA, workload=LOAD)
    assert plain.rank_by == "gradient_norm" and plain.selector == {"keep": 0.95}
    with pytest.raises(PlacementError, match="num_modules=43: the blueprint has only 42 to choose from"):
        plan_placement(BLUEPRINT, LLAMA, num_modules=43)


def test_scores_per_cost_prefer_the_cheaper_of_equals():
    """With equal gains the narrow layers come first; without costs there is nothing to divide by."""
    blueprint = measured(LLAMA, [1.0] * len(BLUEPRINT))
    placement = plan_placement(blueprint, LLAMA, num_modules=6, per_cost=True, coverage="none", workload=LOAD)
    costs = CostModel(Structure.of(LLAMA), LOAD)
    dearest = max(costs.adapter_cost(name, 4) for name in placement.lora)
    assert dearest <= min(costs.adapter_cost(e.name, 4) for e in blueprint if e.name not in placement.lora)
    assert placement.rank_by == "adam_gain per cost"
    shapeless = Blueprint("org/m", tuple(replace(entry, shape=None) for entry in blueprint))
    with pytest.raises(PlacementError, match="has no shapes"):
        plan_placement(shapeless, per_cost=True)


@pytest.mark.parametrize(
    "rank_by",
    [by for by in SCORES if by not in ("weight_gradient", "singular_energy", "signal_to_noise", "influence")],
)
def test_every_score_places(rank_by):
    """As many as asked for; scores that differ place differently in the end."""
    placement = plan_placement(BLUEPRINT, num_modules=14, rank_by=rank_by)
    assert len(placement.lora) == 14 and placement.rank_by == rank_by


def test_the_list_of_scores_is_the_one_that_is_offered():
    """`rank_by` takes every score and the set's; the error for a typo lists them."""
    assert set(RankBy.__args__) == {*SCORES, "cover_gain", "set_gain"}
    with pytest.raises(PlacementError, match="rank_by must be gradient_norm,.* or last, got 'adamgain'"):
        plan_placement(BLUEPRINT, rank_by="adamgain")


def test_controls_place_as_their_names_say():
    """First and last take the ends of the depth, even the middles, random a draw by its seed."""
    depth = {entry.name: entry.depth for entry in BLUEPRINT}

    def depths(rank_by, **wish):
        return [depth[n] for n in plan_placement(BLUEPRINT, rank_by=rank_by, **wish).lora]

    assert set(depths("first", num_modules=14, coverage="none")) == {0, 1}
    assert set(depths("last", num_modules=14, coverage="none")) == {4, 5}
    assert set(depths("even", num_modules=14)) == {1, 4}
    one, two, again = (plan_placement(BLUEPRINT, num_modules=9, rank_by="random", seed=s).lora for s in (0, 1, 0))
    assert one == again != two


def test_without_a_blueprint_adapters_are_spread_evenly():
    """From a config alone, before any download, and marked as even."""
    placement = plan_placement(None, LLAMA.config, fraction=0.2, workload=LOAD)
    assert placement.rank_by == "even" and len(placement.lora) == round(0.2 * len(BLUEPRINT))
    assert placement.learning_rate_scale is None and 0 < placement.gain_retained < 1 and placement.cost["memory"] > 0
    with pytest.raises(PlacementError, match="needs a blueprint, or a model"):
        plan_placement(None)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_mixtral])
def test_an_empty_model_has_the_names_and_shapes_of_the_real_one(build):
    """Planning on it is planning on the model."""
    model = build()
    empty = empty_model(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert find_submodules(empty, "all") == find_submodules(model, "all")


def test_a_source_without_a_config_is_named(tmp_path):
    """A folder without one, and a config that transformers builds nothing from."""
    with pytest.raises(BlueprintError, match="No model config found in .*Give a folder"):
        empty_model(str(tmp_path))
    config = tiny_llama(layers=1).config.to_dict()
    for odd in ({"hidden_size": "many"}, {"hidden_act": "?"}, {"head_dim": -1}, {"model_type": ["a"]}):
        (tmp_path / "config.json").write_text(json.dumps(config | odd))
        with pytest.raises(BlueprintError, match="No model config found in .*Give a folder|cannot build a model"):
            empty_model(str(tmp_path))


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"budget": 0.7}, "budget=0.7 has no unit; examples: '12GiB'"),
        ({"budget": "12"}, "Cannot read '12'"),
        ({"budget": "a lot"}, "Cannot read 'a lot'"),
        ({"budget": "1GiB, 2GiB"}, "limits memory twice"),
        ({"budget": {"vram": 3}}, r"no limit \['vram'\]; it has memory, time, parameters, modules"),
        ({"budget": {"time": "3 modules"}}, "which limits modules"),
        ({"budget": {}}, "The budget is empty"),
        ({"budget": "0x"}, "time must be positive, got 0.0"),
        ({"budget": "0.7x", "fraction": 0.2}, "budget='0.7x' and fraction=0.2 both say how much"),
        ({"keep": 1.5}, r"keep must be in \(0, 1\], got 1.5"),
        ({"keep": 0.5, "num_modules": 3}, "keep=0.5 and num_modules=3 both"),
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"ranks": "some"}, "ranks must be uniform, equal_parameters or score, got 'some'"),
        ({"budget": "1GiB"}, "needs the model, or its config"),
    ],
)
def test_wishes_that_cannot_be_read_are_named(wish, message):
    """Each error names working values."""
    with pytest.raises(PlacementError, match=message):
        plan_placement(BLUEPRINT, **wish)


def test_a_model_of_another_shape_is_refused():
    """As when an adapter is put on."""
    with pytest.raises(MismatchError, match="another size"):
        plan_placement(BLUEPRINT, tiny_llama(layers=6, hidden_size=64), budget="0.7x")


@pytest.mark.parametrize(
    "options", [{}, {"rank_by": "adam_gain"}, {"rank_by": "even"}, {"mode": "lora+unfreeze"}], ids=str
)
def test_fused_layers_are_placed_together(options):
    """All of q, k, v or gate, up, down of a layer, or none; as many adapters as were asked for, or up to two fewer."""
    for wish in ({"num_modules": 11}, {"fraction": 1.0}, {"budget": "0.8x"}, {"keep": 0.9}, {"num_modules": 1}):
        placement = plan_placement(BLUEPRINT, LLAMA, fused=True, workload=LOAD, **options, **wish)
        for kinds in FUSED:
            of_layer = Counter(n.split(".")[2] for n in placement.lora if n.rpartition(".")[2] in kinds)
            assert set(of_layer.values()) <= {3}
        if "num_modules" in wish and options.get("rank_by") != "even":
            assert max(1, wish["num_modules"] - 2) <= len(placement.lora) <= max(3, wish["num_modules"])
        assert list(placement.lora) == [entry.name for entry in BLUEPRINT if entry.name in placement.lora]
        cost = placement.cost["parameters"]
        assert (
            cost
            == CostModel(Structure.of(LLAMA), LOAD)
            .cost({name: placement.ranks.get(name, placement.rank) for name in placement.lora}, placement.unfreeze)
            .trainable
        )
    with pytest.raises(PlacementError, match="fused=True is for adapters, and mode='unfreeze' places none"):
        plan_placement(BLUEPRINT, fused=True, mode="unfreeze")


class TestConfig:
    def test_a_budget_is_settled_on_the_model(self, tmp_path):
        """Until then nothing is placed; then within the budget, at the rank that `r` says, and saved as plain LoRA."""
        config = BlueprintConfig(
            blueprint=BLUEPRINT, budget="0.6x", workload={"length": 32, "device": "cpu"}, r=4, task_type="CAUSAL_LM"
        )
        assert config.placement is None and config.target_modules is None
        adapted = get_peft_model(tiny_llama(layers=6), config)
        assert 0 < config.placement.cost["time"] <= 0.6 and config.placement.rank == 4
        trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert trainable == config.placement.cost["parameters"]
        adapted.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        assert saved["peft_type"] == "LORA" and set(saved["target_modules"]) == set(config.placement.lora)
        recipe = json.loads((tmp_path / "blueprint_config.json").read_text())
        assert Placement.from_dict(recipe["placement"]) == config.placement and recipe["budget"] == "0.6x"

    def test_a_placement_brings_its_rank(self):
        """Left out, r becomes the plan's with the scaling as it was; another r is an error that shows both."""
        placement = plan_placement(BLUEPRINT, LLAMA, budget="0.8x", r=16, workload=LOAD)
        config = BlueprintConfig(placement=placement)
        assert config.r == 16 and config.lora_alpha == 32
        assert BlueprintConfig(placement=placement, r=16, lora_alpha=16).lora_alpha == 16
        raised = plan_placement(BLUEPRINT, num_modules=10)
        assert BlueprintConfig(placement=raised).r == raised.rank > 16
        for planned in (placement, raised):
            for use in (lambda p: BlueprintConfig(placement=p, r=24), lambda p: trainer_config(p, "peft", r=24)):
                with pytest.raises(PlacementError, match=rf"'org/m' has rank {planned.rank}, got r=24. Leave r out"):
                    use(planned)
        config = BlueprintConfig(placement=raised, ranks="equal_parameters", r=16, lora_alpha=16)
        assert (config.r, config.lora_alpha) == (raised.rank, raised.rank)


class TestWorkload:
    @pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
    def test_it_is_read_off_a_loaded_model(self, kind):
        """Quantization, dtype, device and checkpointing; given values count first; an empty model has none."""
        model = quantize(tiny_llama(), kind)
        model.gradient_checkpointing_enable()
        found = workload_of(model, length=64, optimizer="paged_adamw_8bit")
        assert (found.quantization, found.dtype, found.device, found.checkpointing) == (kind, "float32", "cpu", True)
        assert (found.length, found.optimizer, found.batch_size) == (64, "paged_adamw_8bit", 8)
        assert workload_of(model, quantization=None).quantization is None
        assert workload_of(empty_model(model.config)) == workload_of(model.config) == Workload()
        with pytest.raises(PlacementError, match="no option 'vram'.*batch_size"):
            workload_of(model, vram=3)

    def test_a_loaded_model_is_planned_as_it_is(self):
        """So that a budget of memory counts 4-bit weights as such without being told."""
        plain, quantised = tiny_llama(), quantize(tiny_llama(), "nf4")
        blueprint = measured(plain)
        costs = [plan_placement(blueprint, m, num_modules=4).cost["memory"] for m in (plain, quantised)]
        assert costs[1] < costs[0]


def _timed(*args, **options):
    start = time.process_time()
    placement = plan_placement(*args, **options)
    return placement, time.process_time() - start


def test_a_70b_model_is_planned_in_seconds():
    """Llama-3.1-70B's shape on the meta device: 560 linear submodules, a card of 80 GB, 4 bits."""
    shape = {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "vocab_size": 128_256}
    config = LlamaConfig(**shape, num_attention_heads=64, num_key_value_heads=8)
    model = empty_model(config)
    blueprint = measured(model)
    assert len(blueprint) == 560
    load = Workload(batch_size=1, length=4096, quantization="nf4", checkpointing=True, input_gradients=False)
    placement, seconds = _timed(blueprint, model, budget="44GiB", workload=load)
    assert 35 * 2**30 < placement.cost["memory"] <= 44 * 2**30 and placement.lora
    assert seconds < 10


def mixture(experts):
    """A list of separate experts, as older models have them."""
    entries = []
    for depth in range(24):
        prefix = f"model.layers.{depth}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            entries.append(Submodule(f"{prefix}.self_attn.{name}", 1.0, name, depth, f"attn.{depth}", (2048, 2048)))
        for expert in range(experts):
            for name, shape in (("gate_proj", (768, 2048)), ("up_proj", (768, 2048)), ("down_proj", (2048, 768))):
                path = f"experts.{expert}.{name}"
                entries.append(Submodule(f"{prefix}.mlp.{path}", 1.0, path, depth, f"ffn.{depth}", shape))
    return Blueprint("org/moe", tuple(replace(e, adam_gain=1.0 + (i * 7919) % 13) for i, e in enumerate(entries)))


def test_planning_time_is_linear_in_submodules():
    """Linear time, not quadratic; as a ratio, because machines differ."""
    few, many = mixture(8), mixture(34)
    assert len(many) > 2_500 and len(few) < len(many) / 3.7
    for wish in ({"budget": "0.8x"}, {"keep": 0.5}):
        _, reference = _timed(few, **wish)
        placement, seconds = _timed(many, **wish)
        assert seconds < 10 * reference, f"{seconds:.1f} s for {len(many)}, {reference:.1f} s for {len(few)}"
        assert placement.cost["time"] <= 0.8 if "budget" in wish else placement.gain_retained >= 0.5


@needs_fused
def test_fused_experts_are_planned_by_their_real_size():
    """An adapter there has a rank for every expert, and costs so."""
    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = empty_model(config)
    placement = plan_placement(measured(model), model, budget="6k parameters", r=4, workload=LOAD)
    assert placement.cost["parameters"] <= 6000
    everything = plan_placement(measured(model), model, fraction=1.0, r=4)
    experts = 8 * 4 * ((64 + 64) + (32 + 64))  # rank 4 on eight experts' gate_up_proj and down_proj
    attention = sum(4 * sum(entry.shape) for entry in measured(model) if entry.form == "linear")
    assert everything.target_parameters and everything.cost["parameters"] == 4 * experts + attention
