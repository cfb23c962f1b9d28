"""How many submodules and how much of the data, chosen for each other."""

import json

import numpy as np
import pytest

from peft_blueprint.blueprint import q_star
from peft_blueprint.errors import BlueprintError, PlacementError
from peft_blueprint.measure import empty_model
from peft_blueprint.place import CostModel, Structure, Workload, plan_jointly, plan_placement
from tests.planning import BLUEPRINT, LLAMA


LOAD = Workload(batch_size=2, length=32, dtype="float32", device="cpu", rank=4)
SCORES = [10, 5, 1, 0.5, 0.2, 0.1, 0.1, 0.1]


@pytest.fixture(scope="module")
def placements():
    """Of some sizes, the whole last."""
    sizes = (1, 3, 7, 14, 28, 42)
    return [plan_placement(BLUEPRINT, LLAMA, num_modules=n, per_cost=True, workload=LOAD) for n in sizes]


@pytest.mark.parametrize(
    ("data", "objective"),
    [(0.2, "gain_per_cost"), (0.5, "gain_per_gb_hour"), (SCORES, "gain_per_cost"), (SCORES, "gain_per_gb_hour")],
    ids=str,
)
def test_no_pair_of_other_sizes_gives_more_per_cost(data, objective, placements):
    """Eq. 35 over eq. 36, against every eighth of the data with some sizes of the placement, unscored data included."""
    scoring = 0.2
    plan = plan_jointly(BLUEPRINT, LLAMA, data=data, scoring_cost=scoring, best=objective, workload=LOAD)
    mass = np.cumsum(SCORES) / sum(SCORES)
    whole = placements[-1].cost

    def ratio(placement, q, of_data):
        time = placement.cost["time"] * q + (scoring if q < 1 else 0) * whole["time"]
        memory = placement.cost["memory"] / whole["memory"] if objective == "gain_per_gb_hour" else 1
        return placement.gain_retained * of_data / (time * memory) * whole["time"]

    shares = [(i + 1) / 8 for i in range(8)]
    gains = mass if data is SCORES else [q**data for q in shares]
    found = [ratio(placement, q, g) for placement in placements for q, g in zip(shares, gains, strict=True)]
    assert plan.gain_per_cost >= max(found) * (1 - 1e-9)
    assert plan.gain_per_cost >= max(plan.placement_alone, plan.data_alone) >= 1
    own = mass[round(8 * plan.q) - 1] if data is SCORES else plan.q**data
    assert ratio(plan.placement, plan.q, own) == pytest.approx(plan.gain_per_cost)
    assert plan.gain == pytest.approx(plan.placement.gain_retained * own)


def test_each_choice_is_the_best_for_the_other():
    """q* by eq. 31 at the placement's own cost; the placement with scoring as its overhead; more epochs, cheaper scores."""
    plan = plan_jointly(BLUEPRINT, LLAMA, data=0.3, scoring_cost=0.1, workload=LOAD)
    time = plan.placement.cost["time"]
    assert plan.q == pytest.approx(q_star(0.3, 0.1, time), rel=1e-6) and 0 < plan.q < 1
    again = plan_placement(BLUEPRINT, LLAMA, best="gain_per_cost", overhead=0.1 / plan.q, workload=LOAD)
    assert again.lora == plan.placement.lora
    assert len(again.lora) > len(plan_placement(BLUEPRINT, LLAMA, best="gain_per_cost", workload=LOAD).lora)
    assert plan.cost == pytest.approx(0.1 + plan.q * time)
    cheaper = plan_jointly(BLUEPRINT, LLAMA, data=0.3, scoring_cost=0.02, workload=LOAD)
    assert cheaper.q < plan.q and cheaper.gain_per_cost > plan.gain_per_cost


def test_all_data_are_taken_where_scoring_costs_more_than_it_saves():
    """As exact norms do for one epoch: a forward and backward pass for each example, three quarters of a step."""
    plan = plan_jointly(BLUEPRINT, LLAMA, data=0.6, workload=LOAD)
    costs = CostModel(Structure.of(LLAMA), LOAD)
    assert plan.scoring_cost == pytest.approx(costs.time_ratio(costs.floor())) and 0.5 < plan.scoring_cost < 1
    alone = plan_placement(BLUEPRINT, LLAMA, best="gain_per_cost", workload=LOAD)
    assert plan.q == 1 and plan.placement == alone and plan.data_alone == 1
    assert plan.gain_per_cost == pytest.approx(alone.gain_per_cost) == plan.placement_alone
    assert "all data: scoring them costs more than it saves" in str(plan)


def test_a_joint_plan_is_printed_and_goes_into_json():
    """With notes on unmeasured parts, and within a budget."""
    plan = plan_jointly(None, empty_model(LLAMA.config), data=0.3, scoring_cost=0.1, budget="9 modules", workload=LOAD)
    assert len(plan.placement.lora) <= 9 and 0 < plan.q < 1
    text = str(plan)
    for part in ("% of parameters", f"{100 * plan.q:.3g} % of the data", "times the gain", "gain is not measured"):
        assert part in text, part
    found = json.loads(json.dumps(plan.to_dict()))
    assert found["q"] == plan.q and found["placement"]["lora"] == list(plan.placement.lora)


@pytest.mark.parametrize(
    ("wish", "error", "message"),
    [
        ({"data": 1.0}, BlueprintError, r"delta must be in \(0, 1\), got 1.0"),
        ({"data": [0.0, 0.0]}, BlueprintError, "values must be finite, not negative and not all zero"),
        ({"data": 0.5, "scoring_cost": 0}, PlacementError, "scoring_cost must be a positive number, got 0"),
        ({"data": 0.5, "fraction": 0.2}, PlacementError, "fraction=0.2 both say how much"),
        ({"data": 0.5, "keep": 0.2}, PlacementError, "both say how much"),
    ],
)
def test_wishes_that_cannot_be_met_are_named(wish, error, message):
    with pytest.raises(error, match=message):
        plan_jointly(BLUEPRINT, LLAMA, workload=LOAD, **wish)
