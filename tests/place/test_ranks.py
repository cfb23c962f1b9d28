"""Ranks of a placement's adapters, and the learning rate that suits them."""

import re
from dataclasses import replace

import pytest
from peft import get_peft_model

from peft_blueprint import BlueprintConfig, Submodule, plan_placement
from peft_blueprint.errors import PlacementError
from peft_blueprint.place.ranks import SERVER_RANKS, k_star_rank, ranks_by_score
from peft_blueprint.testing import tiny_llama
from tests.planning import BLUEPRINT, LLAMA, measured


def test_ranks_by_score_follow_the_scores_and_keep_the_sum():
    """In quarters of the uniform rank, between one and sixteen of them."""
    entries = [Submodule(f"m.{i}", 1.0) for i in range(6)]
    scores = {"m.0": 100.0, "m.1": 4.0, "m.2": 4.0, "m.3": 2.0, "m.4": 2.0, "m.5": 0.0}
    ranks = ranks_by_score(entries, scores, 16)
    assert sum(ranks.values()) == 6 * 16 and all(rank % 4 == 0 for rank in ranks.values())
    assert ranks["m.0"] == 64 > ranks["m.1"] >= ranks["m.2"] > ranks["m.3"] == ranks["m.5"] == 4
    assert ranks_by_score(entries, scores, 1) == dict.fromkeys(scores, 1)


SIZES = {"hidden_size": 256, "intermediate_size": 384}
WIDE = tiny_llama(layers=6, **SIZES)  # k_proj and v_proj have rank 128 at most


def test_fewer_adapters_have_a_higher_rank_at_equal_parameters():
    """As near below all-linear LoRA's as servers' ranks allow, at most eight times the rank; a given rank is kept."""
    blueprint = measured(WIDE)
    whole = plan_placement(blueprint, WIDE, fraction=1.0, r=16).cost["parameters"]
    for count in (4, 12, 30):
        placement = plan_placement(blueprint, WIDE, num_modules=count)
        each = placement.cost["parameters"] / placement.rank
        assert placement.cost["parameters"] <= whole and placement.rank in SERVER_RANKS and not placement.ranks
        assert placement.rank == 128 or whole < next(r for r in SERVER_RANKS if r > placement.rank) * each
        assert not placement.notes and f" of rank {placement.rank} of 42" in placement.summary()
    assert plan_placement(blueprint, WIDE, num_modules=4, r=16).rank == 16
    one = measured(tiny_llama(layers=1, hidden_size=640, intermediate_size=640))
    for r, said in (
        (24, "none of the ranks .* needs --max-lora-rank 32"),
        (600, "above 512, the largest that vLLM serves"),
    ):
        [note] = plan_placement(one, fraction=1.0, r=r).notes
        assert re.match(f"Rank {r} is {said}", note)


@pytest.mark.parametrize("ranks", ["uniform", "equal_parameters", "score"])
@pytest.mark.parametrize("r", [1, 16, 48, 200])
@pytest.mark.parametrize("count", [1, 8, 42])
def test_no_rank_exceeds_the_full_rank_of_its_weight(ranks, r, count):
    """The remainder goes to the other adapters, and the sum stays within all-linear LoRA's."""
    blueprint = measured(WIDE)
    placement = plan_placement(blueprint, WIDE, num_modules=count, ranks=ranks, r=r)
    shapes = {entry.name: entry.shape for entry in blueprint}
    given = {name: placement.ranks.get(name, placement.rank) for name in placement.lora}
    assert all(1 <= rank <= min(shapes[name]) for name, rank in given.items())
    total = sum(rank * sum(shapes[name]) for name, rank in given.items())
    assert total == placement.cost["parameters"]
    if ranks != "equal_parameters":
        assert sum(given.values()) <= r * count
        return
    assert total <= r * sum(map(sum, shapes.values()))
    free = {name: rank for name, rank in given.items() if rank < min(shapes[name])}
    level = max(free.values(), default=None)
    if level is not None and r < level < 8 * r:  # the parameters of one more step would be too many
        more = next(rank for rank in SERVER_RANKS if rank > level)
        raised = sum(min(more, min(shapes[name])) * sum(shapes[name]) for name in given)
        assert more > 8 * r or raised > r * sum(map(sum, shapes.values()))


def test_adapters_get_the_capped_ranks_on_the_model():
    """Raised where it is possible, each with the scaling of all-linear LoRA."""
    config = BlueprintConfig(blueprint=measured(WIDE), num_modules=8, r=64, ranks="equal_parameters", lora_alpha=128)
    assert set(config.placement.ranks.values()) == {128} and config.placement.rank == 256
    assert "8 adapters of rank 128 to 256 of 42" in str(config.placement)
    layers = {
        n: m for n, m in get_peft_model(tiny_llama(layers=6, **SIZES), config).named_modules() if hasattr(m, "lora_A")
    }
    found = {n.removeprefix("base_model.model."): m.r["default"] for n, m in layers.items()}
    assert found == {name: config.placement.ranks.get(name, config.r) for name in config.placement.lora}
    assert {m.scaling["default"] for m in layers.values()} == {2.0}


def test_a_budget_of_parameters_lowers_the_rank_before_the_number_of_adapters():
    """As far as it takes to keep enough of the gain; not where a rank or a rule of ranks is given."""
    few, more, most = (plan_placement(BLUEPRINT, LLAMA, budget=f"{n}k params") for n in (2, 6, 20))
    assert [p.rank for p in (few, more, most)] == [1, 2, 8]
    assert few.cost["parameters"] <= 2000 and more.cost["parameters"] <= 6000 and most.cost["parameters"] <= 20000
    assert (
        few.gain_retained > 0.9
        and more.gain_retained == pytest.approx(1)
        and most.gain_retained >= 0.95
        and len(more.lora) == 42
    )
    assert more.learning_rate_scale == pytest.approx(8**0.5)  # beside all-linear LoRA of rank 16
    for wish in ({"r": 16}, {"ranks": "uniform"}):
        fixed = plan_placement(BLUEPRINT, LLAMA, budget="6k params", **wish)
        assert fixed.rank == 16 and fixed.gain_retained < 0.7 and len(fixed.lora) == 4
    with pytest.raises(PlacementError, match="parameters"):
        plan_placement(BLUEPRINT, LLAMA, budget="20 params")


def test_the_learning_rate_goes_by_the_root_of_the_first_steps_gain():
    """Half the gain wants √2 times the rate, and at twice the rank the same."""
    blueprint = measured(LLAMA, [1.0] * len(BLUEPRINT))
    half = {"num_modules": len(BLUEPRINT) // 2, "rank_by": "last", "coverage": "none"}
    assert plan_placement(blueprint, r=8, **half).learning_rate_scale == pytest.approx(2**0.5)
    raised = plan_placement(blueprint, ranks="equal_parameters", r=8, **half)
    assert raised.rank == 16 and raised.learning_rate_scale == pytest.approx(1)


def test_a_config_takes_r_as_that_of_all_linear_if_asked():
    """The adapters' r is then raised, with the scaling as it was."""
    config = BlueprintConfig(blueprint=BLUEPRINT, num_modules=12, ranks="equal_parameters", r=4, lora_alpha=8)
    assert config.r == config.placement.rank > 4 and config.lora_alpha == 2 * config.r


def test_k_star_becomes_the_rank_with_as_many_parameters():
    """Of 64 x 32 the share 0.25 is 512 parameters, rank 5.3; it is reported beside the adapter."""
    entry = replace(BLUEPRINT.submodules[0], shape=(64, 32), k_star=0.25)
    assert k_star_rank(entry) == 5
    assert k_star_rank(replace(entry, k_star=1.0)) == 21 and k_star_rank(replace(entry, k_star=1e-9)) == 1
    assert k_star_rank(replace(entry, k_star=None)) is None
    placement = plan_placement(measured(LLAMA, k_star=0.25), fraction=1.0)
    assert all(details["k_star_rank"] >= 1 for details in placement.details.values())


def test_a_config_gives_every_adapter_its_rank_and_the_same_scaling():
    """On the model, r and alpha over r are as planned, and the adapter's parameters as predicted."""
    model = tiny_llama(layers=6)
    config = BlueprintConfig(
        blueprint=BLUEPRINT, num_modules=8, ranks="score", r=4, lora_alpha=8, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    layers = {n: m for n, m in adapted.named_modules() if hasattr(m, "lora_A") and "default" in m.r}
    ranks = {n.removeprefix("base_model.model."): m.r["default"] for n, m in layers.items()}
    assert ranks == dict(config.placement.ranks) and len(set(ranks.values())) > 1
    assert sum(ranks.values()) == 8 * 4
    assert {m.scaling["default"] for m in layers.values()} == {2.0}
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trainable == config.placement.cost["parameters"]
