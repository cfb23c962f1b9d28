"""Adapters on chosen experts: equal to PEFT's on all experts, saved in its form, chosen by shares and budgets."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from transformers import Trainer, TrainingArguments

from peft_blueprint import Blueprint, BlueprintConfig, plan_placement
from peft_blueprint.errors import MismatchError, PlacementError
from peft_blueprint.measure import find_submodules
from peft_blueprint.place import (
    CostModel,
    Placement,
    Structure,
    Workload,
    choose_experts,
    narrow_experts,
    trainer_config,
)
from peft_blueprint.place.expert_adapters import gather, scatter
from peft_blueprint.place.expert_weights import ExpertStack, LowRank, UpdatedMatrix
from peft_blueprint.testing import randomize_adapters, tiny_mixtral, toy_batches
from tests.fused import needs_fused
from tests.mixtures import MIXTURES, tiny_listed


SHARES = (0.1, 0.5, 0.15, 0.25)  # of the tokens, by expert
LAYERS = 2
BATCH = toy_batches(4, padding="none")[0]


def measured(model, **statistics):
    """A blueprint of single experts with the same shares in every layer."""
    entries = [replace(e, gradient_norm=1.0, **statistics) for e in find_submodules(model, experts=True)]
    number = [next((int(part) for part in e.name.split(".")[4:] if part.isdigit()), None) for e in entries]
    return Blueprint(
        "tiny/mixture",
        tuple(
            e if i is None or "experts" not in e.name else replace(e, token_share=SHARES[i])
            for e, i in zip(entries, number, strict=True)
        ),
    )


def adapted(model, experts=2, **settings):
    settings = {"blueprint": measured(model), "experts": experts, "num_modules": 2, "r": 2, **settings}
    torch.manual_seed(0)
    return get_peft_model(model, BlueprintConfig(**settings, lora_alpha=6, task_type="CAUSAL_LM"))


def wrappers(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "parameter_name")}


def logits(model):
    with torch.no_grad():
        return model.eval()(BATCH["input_ids"]).logits


def backward(model):
    model.train()
    output = model(**BATCH)
    output.loss.backward()
    return output.logits.detach()


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@needs_fused
@pytest.mark.parametrize("family", [name for name in MIXTURES if name != "listed"])
def test_outputs_and_gradients_are_those_of_pefts_adapter_on_all_experts(family, tmp_path):
    """In every implementation of experts; plain PEFT loads the saved adapter, and both merge to the same output."""
    layers = 1 if family != "deepseek_v3" else 2  # of which the first is dense
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        base = MIXTURES[family](layers=layers)
        ours = randomize_adapters(adapted(base))
        ours.save_pretrained(tmp_path)
        theirs = PeftModel.from_pretrained(MIXTURES[family](layers=layers), tmp_path, is_trainable=True)
        assert type(theirs.peft_config["default"]) is LoraConfig
        for model in (ours, theirs):
            model.get_base_model().set_experts_implementation(implementation)
        assert relative(backward(ours), backward(theirs)) < 1e-5
        other = wrappers(theirs)
        for name, wrapper in wrappers(ours).items():
            assert wrapper.chosen["default"] == (1, 3)
            for side, dimension in (("lora_A", 0), ("lora_B", 1)):
                gradient = getattr(other[name], side)["default"].weight.grad
                expected = gather(gradient, (1, 3), 4, dimension)
                assert relative(getattr(wrapper, side)["default"].weight.grad, expected) < 1e-5, (implementation, name)
        expected = logits(theirs)
        for model in (ours, theirs):
            assert relative(logits(model.merge_and_unload()), expected) < 1e-5


@needs_fused
def test_only_the_chosen_experts_have_parameters_gradients_and_optimizer_states():
    """A placement's count of parameters is the model's, and Adam holds two numbers for each."""
    model = adapted(tiny_mixtral(LAYERS), experts=1)
    own = [p for n, p in model.named_parameters() if "experts" in n and "lora_" in n]
    r, layer = 2, (32 + 48) + (24 + 32)
    assert sum(p.numel() for p in own) == LAYERS * r * layer
    placement = model.peft_config["default"].placement
    costs = CostModel(Structure.of(model.get_base_model(), measured(tiny_mixtral(LAYERS))), Workload())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert costs.cost(dict.fromkeys(placement.lora, r)).trainable == trainable
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    backward(model)
    optimizer.step()
    assert sum(p.grad.numel() for p in model.parameters() if p.grad is not None) == trainable
    held = [state[key].numel() for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert sum(held) == 2 * trainable


@needs_fused
def test_experts_that_no_token_reaches_have_gradients_of_zero():
    """As PEFT's have, so that an optimizer and DDP treat them alike."""
    model = adapted(tiny_mixtral(1), experts=4)
    model(**{key: value[:1, -1:] for key, value in BATCH.items()}).logits.sum().backward()
    for wrapper in wrappers(model).values():
        reached = wrapper.lora_B["default"].weight.grad.unflatten(1, (-1, 4)).abs().sum(dim=(0, 1)) > 0
        assert reached.sum() == 2


@needs_fused
def test_training_resumes_from_a_checkpoint_of_the_trainer(tmp_path):
    """Four steps at once, and two steps, a checkpoint in PEFT's form, and two more: equal weights."""

    def trainer(steps, **settings):
        data = [{key: value[0] for key, value in batch.items()} for batch in toy_batches(8, 12, 1)]
        model = adapted(tiny_mixtral(1))
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            save_steps=2,
            lr_scheduler_type="constant",
            learning_rate=0.01,
            per_device_train_batch_size=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        return Trainer(model, arguments, train_dataset=data)

    whole = trainer(4)
    whole.train()
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    loaded = PeftModel.from_pretrained(tiny_mixtral(1), tmp_path / "checkpoint-4", is_trainable=True)
    assert set(narrow_experts(loaded).values()) == {(1, 3)}
    expected = dict(whole.model.named_parameters())
    for model in (resumed.model, loaded):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, expected[name])
            assert parameter.requires_grad == expected[name].requires_grad


@needs_fused
def test_adapters_side_by_side_choose_their_own_experts():
    """A second adapter of other experts, and one on all experts made by plain PEFT first."""
    model = tiny_mixtral(1)
    parameters = [n for n, p in model.named_parameters() if p.dim() == 3]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=parameters))
    settings = {"blueprint": measured(tiny_mixtral(1)), "num_modules": 1, "r": 2}
    model.add_adapter("hot", BlueprintConfig(experts=1, **settings))
    randomize_adapters(model)
    outputs = {}
    for name in ("default", "hot"):
        model.set_adapter(name)
        outputs[name] = logits(model)
    assert [w.chosen for w in wrappers(model).values()] == [{"default": (0, 1, 2, 3), "hot": (1,)}] * 2
    assert not torch.allclose(outputs["default"], outputs["hot"])
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_mixtral(1)))


def test_experts_in_a_list_are_ordinary_targets(tmp_path):
    """Linear layers by full name; plain PEFT loads them."""
    model = randomize_adapters(adapted(tiny_listed(LAYERS), experts="top_p=0.6"))
    placement = model.peft_config["default"].placement
    assert not placement.target_parameters
    experts = {name.split("experts.")[1] for name in placement.lora if "experts" in name}
    assert experts == {"1.0", "1.2", "3.0", "3.2"}
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_listed(LAYERS), tmp_path)), logits(model))


@pytest.mark.parametrize("transposed", [False, True])
def test_products_with_a_stack_are_those_of_the_computed_weight(transposed):
    """For every way to compute experts: one by one, gathered, grouped, all at once, or an unknown one."""
    torch.manual_seed(0)
    base, left, right = torch.randn(4, 8, 12), torch.randn(8, 2, requires_grad=True), torch.randn(2, 12)
    stack = ExpertStack(base, {2: UpdatedMatrix(base[2], [LowRank(left, right, 0.5)]), 0: torch.randn(8, 12)})
    dense = stack.dense()
    stack, dense, width = (stack.mT, dense.mT, 12) if transposed else (stack, dense, 8)
    tokens, ids = torch.randn(5, width), torch.tensor([2, 0, 1, 2, 3])
    ends = torch.tensor([2, 2, 4, 5], dtype=torch.int32)
    for product in (
        lambda w: tokens @ w[2] + torch.nn.functional.linear(tokens, w[torch.tensor(2)].mT),
        lambda w: tokens @ w[1] + tokens @ w[-4] + tokens @ w[-2],
        lambda w: (
            torch.bmm(tokens[:, None], w[ids])[:, 0] + torch.bmm(w[ids].transpose(-2, -1), tokens[..., None])[..., 0]
        ),
        lambda w: torch.nn.functional.grouped_mm(tokens, w, offs=ends),
        lambda w: torch.bmm(tokens[:4, None], w) + tokens[:4, None] @ w,
        lambda w: torch.einsum("tm,emn->etn", tokens, w),
        lambda w: w.sum(dim=1) + w[1:3].sum() + w[torch.tensor([True, False, False, True])].sum(),
    ):
        found, expected = product(stack), product(dense)
        torch.testing.assert_close(found, expected)
        gradients = [
            torch.autograd.grad(value.square().sum(), left, allow_unused=True, retain_graph=True)[0]
            for value in (found, expected)
        ]
        torch.testing.assert_close(
            *[torch.zeros_like(left) if g is None else g for g in gradients], rtol=1e-4, atol=1e-4
        )
    assert (stack.shape, stack.dtype, stack.dim()) == (dense.shape, dense.dtype, 3)


@pytest.mark.parametrize("dimension", [0, 1])
def test_scattered_slices_are_gathered_again(dimension):
    own = torch.randn((6, 5) if dimension == 0 else (5, 6))
    whole = scatter(own, (0, 3), 4, dimension)
    assert torch.equal(gather(whole, (0, 3), 4, dimension), own)
    assert not gather(whole, (1, 2), 4, dimension).any()


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (2, (1, 3)),
        (0.25, (1,)),
        ("0.5", (1, 3)),
        ("top_p=0.5", (1,)),
        ("top_p=0.9", (1, 3, 2)),
        ("top_p = 1", (1, 3, 2, 0)),
    ],
)
def test_experts_by_number_share_or_nucleus(wish, expected):
    """The fewest that reach p, as in ESFT; entries of fused experts and of lists give the same."""
    for model in (tiny_mixtral(LAYERS), tiny_listed(LAYERS)):
        chosen = choose_experts(measured(model), wish)  # transformers 4 calls the block block_sparse_moe
        names = [name.replace("block_sparse_moe", "mlp") for name in chosen]
        assert names == [f"model.layers.{i}.mlp.experts" for i in range(LAYERS)]
        assert all(experts == expected for experts in chosen.values())


@needs_fused
def test_a_budget_takes_as_many_experts_as_fit_and_a_number_leaves_the_rest_to_the_others():
    """The most important first; without experts and budget a tenth of each layer's, at least one."""
    model = tiny_mixtral(LAYERS)
    blueprint = measured(model, adam_gain=1.0)
    plain = plan_placement(blueprint, model)
    assert len(plain.target_parameters) == 2 * LAYERS and all(".1." in name for name in plain.target_parameters)
    some = plan_placement(blueprint, model, budget="12k parameters")
    more = plan_placement(blueprint, model, budget="14k parameters")
    assert some.cost["parameters"] <= 12_000 < more.cost["parameters"] <= 14_000
    numbers = {int(name.split(".")[5]) for name in some.target_parameters}
    assert 1 in numbers and 0 not in numbers and set(some.target_parameters) < set(more.target_parameters)
    assert len(plan_placement(blueprint, model, budget="12k parameters", experts=1).target_parameters) == 2 * LAYERS
    alone = BlueprintConfig(blueprint=blueprint, experts=1, exclude_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert alone.placement.lora == alone.placement.target_parameters == plain.target_parameters
    only = replace(blueprint, submodules=tuple(e for e in blueprint if "experts" in e.name))
    filled = plan_placement(only, budget="3k parameters")
    assert filled.lora == filled.target_parameters and filled.cost["parameters"] <= 3_000
    with pytest.raises(PlacementError, match="experts=4 need more than the budget 3 thousand trainable"):
        plan_placement(only, budget="3k parameters", experts=4)
    assert Placement.from_dict(json.loads(json.dumps(some.to_dict()))) == some


@needs_fused
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 5}, "experts=5: 'model.layers.0.mlp.experts' has only 4. Give at most 4"),
        ({"experts": 1.5}, "experts must be a whole number, or a share below 1, got 1.5"),
        ({"experts": "top_p=2"}, r"top_p of experts must be in \(0, 1\], got 2"),
        ({"experts": "hot"}, "experts must be a number, a share or top_p=…, got 'hot'"),
        ({"experts": 1, "experts_by": "gate_weight"}, "16 of 16 experts' weights have no gate_weight"),
        ({"experts": 1, "experts_by": "loss"}, "experts_by must be token_share, gate_weight,"),
        ({"experts": 1, "mode": "unfreeze"}, "experts=1 is for mode='lora'.*unfreeze_experts"),
        ({"experts": 1, "lora_dropout": 0.1}, "lora_dropout=0.1 does not work on fused experts"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused_in_words(options, message):
    with pytest.raises(PlacementError, match=message):
        BlueprintConfig(blueprint=measured(tiny_mixtral(LAYERS)), **options)


@needs_fused
def test_a_misfit_is_refused_before_an_adapter_is_put_on(tmp_path, monkeypatch):
    """Fewer experts, experts in lists, ranks that differ in a parameter, an adapter of other experts, other trainers."""
    config = BlueprintConfig(blueprint=measured(tiny_mixtral(1)), experts=2, num_modules=1, r=2)
    placement = config.placement
    for model, has in (
        (tiny_mixtral(1, num_local_experts=3), "has 3 there"),
        (tiny_listed(1), "has no such parameter"),
    ):
        with pytest.raises(MismatchError, match=f"adapts expert 3 of 'model.layers.0.mlp.experts.*{has}"):
            get_peft_model(model, BlueprintConfig(placement=placement))
        assert not any("lora_" in name for name, _ in model.named_parameters())
    with pytest.raises(
        PlacementError, match="'pissa' takes the singular vectors of a linear layer's weight, and 4 fused"
    ):
        get_peft_model(tiny_mixtral(1), BlueprintConfig(placement=placement, init_lora_weights="pissa"))
    uneven = replace(placement, ranks={placement.target_parameters[0]: 1})
    with pytest.raises(PlacementError, match="have ranks 1 and 2, and PEFT gives all experts of a parameter one"):
        BlueprintConfig(placement=uneven)
    with pytest.raises(PlacementError, match="a LoraConfig adapts all experts.*Use BlueprintConfig"):
        trainer_config(placement, "peft")
    randomize_adapters(adapted(tiny_mixtral(1), experts=3)).save_pretrained(tmp_path)
    with pytest.raises(PlacementError, match=r"to load has trained experts \[2\] of .*adapts only \[1, 3\]"):
        adapted(tiny_mixtral(1)).load_adapter(tmp_path, "default")
    with pytest.raises(PlacementError, match=r"has 8 rows for the 4 experts of .*rank 4 needs 16"):
        adapted(tiny_mixtral(1), r=4).load_adapter(tmp_path, "default")
    with pytest.raises(PlacementError, match="has no adapter 'default' on fused experts"):
        narrow_experts(tiny_mixtral(1))
    monkeypatch.setattr(
        lora.ParamWrapper, "update_layer", lambda self, adapter_name, r, lora_alpha, lora_dropout: None
    )
    with pytest.raises(PlacementError, match="need PEFT 0.20 or newer, got"):
        adapted(tiny_mixtral(1))
