"""Costs of adapters on single experts: in proportion to the tokens that visit them; three published shapes."""

from dataclasses import replace

import pytest
import torch
import transformers

from peft_blueprint import Blueprint, plan_placement
from peft_blueprint.blueprint import split_expert
from peft_blueprint.measure import find_submodules
from peft_blueprint.place import CostModel, Structure, Workload
from peft_blueprint.testing import tiny_mixtral
from tests.fused import needs_fused
from tests.mixtures import tiny_listed


pytestmark = needs_fused
LOAD = Workload(batch_size=2, length=16, dtype="float32", rank=2, device="cpu")
SHARES = (0.5, 0.3, 0.15, 0.05)
PUBLISHED = {
    "Qwen3-30B-A3B": transformers.Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
    ),
    "gpt-oss-20b": transformers.GptOssConfig(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
    ),
    "Mixtral-8x7B": transformers.MixtralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
}


def of_experts(model, shares=None):
    """A blueprint of single experts with these token shares in every layer."""
    entries = []
    for row in find_submodules(model, experts=True):
        expert = split_expert(row.name)
        share = None if shares is None or expert is None else shares[expert.number]
        entries.append(replace(row, gradient_norm=1.0, adam_gain=1.0, token_share=share))
    return Blueprint("org/mixture", tuple(entries))


@pytest.mark.parametrize("build", [tiny_mixtral, tiny_listed])
def test_an_adapter_costs_in_proportion_to_the_tokens_its_expert_sees(build):
    model = build(1)
    last = "down_proj" if build is tiny_mixtral else "2"
    names = [f"model.layers.0.mlp.experts.{expert}.{last}" for expert in range(4)]
    even = CostModel(Structure.of(model, of_experts(model)), LOAD)
    routed = CostModel(Structure.of(model, of_experts(model, SHARES)), LOAD)
    for name, share in zip(names, SHARES, strict=True):
        uniform, measured = even.cost({name: 2}), routed.cost({name: 2})
        assert measured.adapters == pytest.approx(4 * share * uniform.adapters)
        # r = 2, two of four experts: A and B forward, and backward without the gradient of the lowest input
        assert uniform.adapters == pytest.approx(2 * 2 * (2 / 4) * (24 + 32 + 24 + 2 * 32))
        assert measured.trainable == uniform.trainable == 2 * (24 + 32)
        assert measured.forward == pytest.approx(uniform.forward) and measured.weights == uniform.weights
    alone, both = (routed.cost(dict.fromkeys(names[:n], 2)) for n in (1, 2))
    kept = (
        2 * 16 * 2 * SHARES[1] * 4 * (24 + 2)
    )  # input and A's result of the tokens that visit the second, in float32
    assert both.activations - alone.activations == pytest.approx(kept, abs=1)


def test_frozen_experts_cost_the_same_whether_they_are_split_or_not():
    model = tiny_mixtral(2)
    whole, split = (CostModel(Structure.of(model, b), LOAD).floor() for b in (None, of_experts(model, SHARES)))
    for part in ("forward", "backward", "weights", "activations"):
        assert getattr(split, part) == pytest.approx(getattr(whole, part), rel=1e-6)


def test_an_expert_trained_whole_keeps_states_for_itself_alone():
    model = tiny_mixtral(2)
    costs = CostModel(Structure.of(model, of_experts(model, SHARES)), LOAD)
    found = costs.cost({}, ["model.layers.1.mlp.experts.2"])
    numel = 3 * 24 * 32
    assert found.trainable == numel and found.states == 8 * numel
    assert found.weight_gradients == pytest.approx(2 * numel * 2 * SHARES[2])


def test_a_blueprint_alone_knows_how_many_experts_a_token_visits():
    blueprint = of_experts(tiny_mixtral(1), SHARES)
    name = "model.layers.0.mlp.experts.1.down_proj"

    def adapters(**provenance):
        return (
            CostModel(Structure.of_blueprint(replace(blueprint, provenance=provenance)), LOAD).cost({name: 2}).adapters
        )

    assert adapters(experts_per_token=4) == pytest.approx(2 * adapters(experts_per_token=2))
    assert adapters() == pytest.approx(adapters(experts_per_token=2))


# GB of memory with a batch of 1 x 2048 tokens, checkpointing, r = 16 on attention and on this share of each layer's experts
FITS = {  # (in 16 bits, in 4 bits): the cards of 24 and 48 GB that hold it
    "Qwen3-30B-A3B": ((), (24, 48)),
    "gpt-oss-20b": ((48,), (24, 48)),
    "Mixtral-8x7B": ((), (48,)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_predicts_which_cards_hold_published_mixtures(name):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(PUBLISHED[name], dtype=torch.bfloat16)
    blueprint = of_experts(model)
    load = Workload(1, 2048, checkpointing=True, rank=16, adapter_dtype="bfloat16", quantized_experts=True)
    costs = {
        bits: CostModel(Structure.of(model, blueprint), replace(load, quantization=bits)) for bits in (None, "nf4")
    }
    placement = plan_placement(blueprint, model, workload=load, experts=0.2, r=16)
    chosen = {split_expert(target)[1] for target in placement.lora if ".layers.7.mlp.experts." in target}
    experts = len({split_expert(row.name)[1] for row in blueprint if ".layers.7.mlp.experts." in row.name})
    assert len(chosen) == max(1, round(0.2 * experts))
    for model_costs, cards in zip(costs.values(), FITS[name], strict=True):
        found = model_costs.cost(dict.fromkeys(placement.lora, 16))
        assert tuple(card for card in (24, 48) if found.bytes <= card * 2**30) == cards
