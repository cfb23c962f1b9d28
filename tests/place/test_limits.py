"""Limits that cannot be met: the error's advice works, and an existing plan is found."""

import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_blueprint import Blueprint, plan_placement
from peft_blueprint.errors import PlacementError
from peft_blueprint.place.budget import Budget
from peft_blueprint.place.cost import Workload
from peft_blueprint.testing import tiny_llama
from tests.planning import measured


MODEL = tiny_llama(layers=3)
LOAD = Workload(batch_size=1, length=32)
SOME = st.one_of(st.none(), st.floats(0.01, 1.2))
# costs of LoRA of rank 16 everywhere, of which limits are shares
WHOLE = plan_placement(measured(MODEL), MODEL, fraction=1.0, r=16, workload=LOAD).cost


def limits_of(shares):
    """A budget of these shares of all-linear LoRA's costs."""
    limits = {
        name: share * (1.0 if name == "time" else WHOLE[name]) for name, share in shares.items() if share is not None
    }
    return {name: value if name == "time" else max(1, int(value)) for name, value in limits.items()}


def followed(message, limits, keep):
    """The limits and `keep` of each advice in an error."""
    text = re.search(r"at least (.*)\.$", message)[1]
    raised = {}
    for part in re.findall(r"'([^']*)'", text):
        raised |= Budget.of(part).limits
    advice = [({**limits, **raised}, keep)]
    if lower := re.search(r"Lower keep to ([\d.e-]+),", message):
        advice.append((limits, float(lower[1])))
    return advice


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    shares=st.fixed_dictionaries(dict.fromkeys(("memory", "time", "parameters", "modules"), SOME)),
    keep=st.one_of(st.none(), st.floats(0.05, 1.0)),
    options=st.sampled_from(
        [
            {},
            {"r": 16},
            {"r": 16, "ranks": "equal_parameters"},
            {"r": 16, "ranks": "score"},
            {"mode": "unfreeze"},
            {"mode": "lora+unfreeze"},
            {"rank_by": "gradient_norm"},
            {"rank_by": "random", "coverage": "none", "ranks": "equal_parameters", "r": 4},
        ]
    ),
    gains=st.lists(st.floats(0.0, 10.0), min_size=21, max_size=21).filter(any),
)
def test_the_advice_of_an_error_works(shares, keep, options, gains):
    """Each advice by itself, word by word; a plan keeps the other options."""
    limits = limits_of(shares)
    if not limits:
        return
    blueprint = measured(MODEL, gains)

    def plan(limits, keep):
        return plan_placement(blueprint, MODEL, budget=limits, keep=keep, workload=LOAD, **options)

    asked = [(limits, keep)]
    try:
        plan(limits, keep)
    except PlacementError as error:
        asked = followed(str(error), limits, keep)
    for limits, keep in asked:
        found = plan(limits, keep)
        assert not Budget.of(limits).exceeded(found.cost)
        assert keep is None or found.gain_retained >= keep


@pytest.mark.parametrize("ranks", ["uniform", "equal_parameters", "score"])
def test_a_plan_that_exists_is_found(ranks):
    """The costs of any planned size, as limits, are met; with its share of the gain too."""
    blueprint = measured(MODEL)
    for count in (1, 2, 5, 9, 14, 21):
        known = plan_placement(blueprint, MODEL, num_modules=count, ranks=ranks, r=8, workload=LOAD)
        limits = {name: known.cost[name] for name in ("memory", "time", "parameters", "modules")}
        for keep in (None, known.gain_retained):
            found = plan_placement(blueprint, MODEL, budget=limits, keep=keep, ranks=ranks, r=8, workload=LOAD)
            assert not Budget.of(limits).exceeded(found.cost)
            assert found.gain_retained >= (keep or 0.0)


@pytest.mark.parametrize("rank_by", ["cover_gain", "adam_gain", "gradient_norm", "random", "last"])
@pytest.mark.parametrize("mode", ["unfreeze", "lora+unfreeze"])
@pytest.mark.parametrize(
    "wish", [{}, {"keep": 0.6}, {"budget": "0.9x"}, {"num_modules": 2}, {"top_p": 0.4}, {"per_cost": True}], ids=str
)
def test_blocks_are_planned_by_every_score(rank_by, mode, wish):
    """Also by gains of sets, which give blocks the sum of their members'."""
    found = plan_placement(measured(MODEL), MODEL, mode=mode, rank_by=rank_by, workload=LOAD, **wish)
    assert found.unfreeze and bool(found.lora) == (mode == "lora+unfreeze")


@pytest.mark.parametrize("largest", [1e150, 1e-150, 5e-324])
@pytest.mark.parametrize(
    "options", [{}, {"mode": "unfreeze", "rank_by": "gradient_norm"}, {"ranks": "score"}], ids=str
)
def test_sizes_at_the_ends_of_the_range_overflow_nothing(largest, options):
    """Scores, gains and the learning rate's scale are finite, or None where nothing predicts it."""
    entries = measured(MODEL).submodules
    odd = tuple(
        replace(e, gradient_norm=largest, adam_gain=largest if i else 1e-300, weight_norm=1e-200)
        for i, e in enumerate(entries)
    )
    for rank_by in (None, "relative_gradient_norm", "first"):
        wish = {"rank_by": rank_by, **options, "num_modules": 1}
        found = plan_placement(Blueprint("org/m", odd), MODEL, workload=LOAD, **wish)
        numbers = [d["score"] for d in found.details.values()] + [
            found.learning_rate_scale or 1.0,
            found.gain_retained,
        ]
        assert all(0 <= number < float("inf") for number in numbers)
