"""The learning rate of a placement by its ranks, without a blueprint."""

import math

import pytest
from peft import LoraConfig, get_peft_model

from peft_blueprint import BlueprintConfig, generate_blueprint, plan_placement
from peft_blueprint.errors import PlacementError
from peft_blueprint.place import learning_rate_for
from peft_blueprint.testing import tiny_llama, toy_batches


LAYERS, KINDS, BASE = 4, 7, 1e-3


@pytest.fixture(scope="module")
def blueprint():
    return generate_blueprint(tiny_llama(LAYERS), toy_batches(), progress=False)


def test_the_root_of_summed_ranks():
    """A quarter of the modules at the same rank doubles the rate; four times the rank on a quarter leaves it."""
    model = tiny_llama(LAYERS)
    placement = plan_placement(None, model, num_modules=KINDS, r=16, ranks="uniform")
    assert float(learning_rate_for(placement, base=BASE)) == pytest.approx(2 * BASE)
    assert learning_rate_for(placement, base=BASE, rank=64).scale == 4.0
    config = LoraConfig(r=64, target_modules=["down_proj", "o_proj"], rank_pattern={"o_proj": 4})
    expected = math.sqrt(KINDS * LAYERS * 16 / (LAYERS * (64 + 4)))
    assert learning_rate_for(config, base=BASE, model=model).scale == pytest.approx(expected)
    assert learning_rate_for(LoraConfig(r=16, target_modules="all-linear"), base=BASE, model=model).scale == 1


def test_config_placement_and_model_agree(blueprint):
    """Also with raised ranks; and the rule is named."""
    model = tiny_llama(LAYERS)
    config = BlueprintConfig(blueprint=blueprint, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    found = [
        learning_rate_for(config.placement, base=BASE),
        learning_rate_for(config, base=BASE),
        learning_rate_for(adapted, base=BASE),
        learning_rate_for(
            LoraConfig(**{k: getattr(config, k) for k in ("r", "target_modules", "rank_pattern")}),
            base=BASE,
            model=tiny_llama(LAYERS),
        ),
    ]
    assert len({rate.value for rate in found}) == 1 and {rate.rule for rate in found} == {"ranks"}
    assert found[0].to_dict() == {"value": found[0].value, "scale": found[0].scale, "rule": "ranks"}


def test_adams_gain_on_request(blueprint):
    placement = plan_placement(blueprint, tiny_llama(LAYERS), num_modules=5)
    rate = learning_rate_for(placement, base=BASE, rule="adam_gain")
    assert rate.scale == placement.learning_rate_scale and rate.rule == "adam_gain"
    assert "Adam's gain" in str(rate)


def test_errors_have_a_fix(blueprint):
    placement = plan_placement(None, tiny_llama(LAYERS), num_modules=5)
    for keywords, message in (
        ({"base": 0.0}, "base must be a positive learning rate"),
        ({"base": True}, "base must be"),
        ({"base": BASE, "rank": 0}, "rank must be"),
        ({"base": BASE, "rule": "half"}, "'ranks' or 'adam_gain', got 'half'"),
        ({"base": BASE, "rule": "adam_gain"}, "needs a placement of adapters by a blueprint"),
    ):
        with pytest.raises(PlacementError, match=message):
            learning_rate_for(placement, **keywords)
    with pytest.raises(PlacementError, match="give learning_rate_for the model"):
        learning_rate_for(LoraConfig(target_modules=["q_proj"]), base=BASE)
    with pytest.raises(PlacementError, match="no LoRA adapter"):
        learning_rate_for(tiny_llama(LAYERS), base=BASE)
    unfrozen = plan_placement(blueprint, tiny_llama(LAYERS), mode="unfreeze", num_modules=1)
    with pytest.raises(PlacementError, match="unfreezes blocks"):
        learning_rate_for(unfrozen, base=BASE)
