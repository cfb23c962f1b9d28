"""Training chosen experts whole: equal to full training with the others frozen, saved as slices, merged, resumed."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_blueprint.errors import BlueprintError, FormatError, MismatchError, PlacementError
from peft_blueprint.place import Placement
from peft_blueprint.place.config import BlueprintConfig
from peft_blueprint.testing import save_tiny_model, tiny_gpt_oss, tiny_llama, tiny_mixtral, toy_batches
from peft_blueprint.train import (
    ExpertCheckpoints,
    initialize_along_gradient,
    load_experts,
    merge_experts,
    save_experts,
    unfreeze_experts,
)
from tests.fused import needs_fused
from tests.mixtures import MIXTURES, tiny_listed


LAYERS = 2
BATCH = toy_batches(4, padding="none")[0]
HOLDERS = [f"model.layers.{i}.mlp.experts" for i in range(LAYERS)]
CHOSEN = {HOLDERS[0]: (1, 3), HOLDERS[1]: (0,)}
OF_ONE = {HOLDERS[0]: (1, 3)}


def train(model, steps=2, frozen=None):
    """Take steps of Adam; `frozen` expert's gradients are zeroed by the holder's name."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(steps):
        model.train()(**BATCH).loss.backward()
        for holder, chosen in (frozen or {}).items():
            for parameter in model.get_submodule(holder).parameters():
                others = [i for i in range(4) if i not in chosen]
                parameter.grad[others] = 0
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor - expected[name]).abs().max() <= tolerance * expected[name].abs().max(), name


@needs_fused
@pytest.mark.parametrize("family", [name for name in MIXTURES if name not in ("listed", "deepseek_v3")])
def test_the_weights_are_those_of_training_all_with_the_others_frozen(family):
    """In every implementation of experts; optimizer states exist for the chosen alone; the base's names are kept."""
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        ours, theirs = (MIXTURES[family](layers=LAYERS) for _ in range(2))
        for model in (ours, theirs):
            model.set_experts_implementation(implementation)
        count = unfreeze_experts(ours, CHOSEN)
        theirs.requires_grad_(False)
        for holder in HOLDERS:
            theirs.get_submodule(holder).requires_grad_(True)
        optimizer = train(ours)
        train(theirs, frozen=CHOSEN)
        assert_equal(state(ours), state(theirs))
        own = sum(p.numel() for h, c in CHOSEN.items() for p in theirs.get_submodule(h).parameters() for _ in c) // 4
        assert count == own == sum(held["momentum_buffer"].numel() for held in optimizer.state.values())
    batch = {"input_ids": BATCH["input_ids"]}
    torch.testing.assert_close(ours.eval()(**batch).logits, copy.deepcopy(ours).eval()(**batch).logits)


@needs_fused
def test_trained_experts_are_saved_alone_and_merged_into_a_checkpoint(tmp_path):
    """A file of slices; loaded elsewhere, merged on disk and saved whole, the model is the same."""
    save_tiny_model(tmp_path / "base")
    tiny_gpt_oss(LAYERS).save_pretrained(tmp_path / "base")
    model = tiny_gpt_oss(LAYERS)
    unfreeze_experts(model, [f"{holder}.{number}" for holder, numbers in CHOSEN.items() for number in numbers])
    train(model)
    expected = state(model)
    path = save_experts(model, tmp_path / "slices")
    tensors = load_file(path)
    assert len(tensors) == 3 * 4 and f"{HOLDERS[0]}.3.down_proj_bias" in tensors
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    fresh = tiny_gpt_oss(LAYERS)
    assert load_experts(fresh, path.parent) == CHOSEN
    assert_equal(state(fresh), expected, 0)
    unfreeze_experts(fresh, CHOSEN)
    train(fresh, 1)
    assert load_experts(fresh, path) == CHOSEN
    assert_equal(state(fresh), expected, 0)
    model.save_pretrained(tmp_path / "whole")
    for folder in (tmp_path / "whole", merge_experts(path, str(tmp_path / "base"), tmp_path / "merged")):
        assert_equal(state(AutoModelForCausalLM.from_pretrained(folder)), expected, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "merged", "slices", "whole"]
    assert (tmp_path / "merged" / "tokenizer.json").exists()


@needs_fused
def test_a_state_dict_resumes_and_a_moved_model_keeps_trained_experts():
    """Into unfrozen experts, with the optimizer's state; where a move separates slices and whole, the slices count."""
    whole, part = tiny_mixtral(LAYERS), tiny_mixtral(LAYERS)
    for model in (whole, part):
        unfreeze_experts(model, CHOSEN)
    train(whole, 2)
    optimizer = train(part, 1)
    resumed = tiny_mixtral(LAYERS)
    unfreeze_experts(resumed, CHOSEN)
    resumed.load_state_dict(part.state_dict())
    other = torch.optim.SGD([p for p in resumed.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    resumed.train()(**BATCH).loss.backward()
    other.step()
    assert_equal(state(resumed), state(whole))
    own = resumed.get_submodule(f"{HOLDERS[0]}.trained_experts.3")["down_proj"]
    own.data = own.data + 1  # in memory of its own, as after a move to another device
    assert torch.equal(state(resumed)[f"{HOLDERS[0]}.down_proj"][3], own)
    resumed(**BATCH)
    assert own.data_ptr() == resumed.get_submodule(HOLDERS[0]).down_proj[3].data_ptr()
    assert torch.equal(state(resumed)[f"{HOLDERS[0]}.down_proj"][3], own)


@needs_fused
def test_a_trainer_resumes_with_the_experts_of_its_checkpoint(tmp_path):
    """Transformers' own checkpoint does not bring fused experts back; without the callback's file it is an error."""

    def trainer(steps):
        model = tiny_mixtral(1)
        unfreeze_experts(model, OF_ONE)
        data = [{key: value[0] for key, value in batch.items()} for batch in toy_batches(4, 12, 1)]
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            save_steps=1,
            lr_scheduler_type="constant",
            learning_rate=0.01,
            per_device_train_batch_size=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        return Trainer(model, arguments, train_dataset=data, callbacks=[ExpertCheckpoints()])

    whole, resumed = trainer(2), trainer(2)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_equal(state(resumed.model), state(whole.model))
    (tmp_path / "checkpoint-1" / "experts.safetensors").unlink()
    with pytest.raises(FormatError, match="No such file"):
        trainer(2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@needs_fused
def test_they_train_beside_lora_on_the_attention():
    """With freeze=False, adapters go on training; without, they are frozen."""
    for freeze in (False, True):
        model = get_peft_model(tiny_mixtral(1), LoraConfig(r=2, target_modules=["q_proj"]))
        unfreeze_experts(model, OF_ONE, freeze=freeze)
        trained = {
            name.split(".")[-1] if "lora" not in name else "lora"
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        assert trained == {"gate_up_proj", "down_proj"} | (set() if freeze else {"lora"})


def test_experts_in_a_list_are_unfrozen_as_they_are(tmp_path):
    model = tiny_listed(LAYERS)
    count = unfreeze_experts(model, CHOSEN)
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 2 * 32 * 24
    train(model, 1)
    fresh = tiny_listed(LAYERS)
    assert load_experts(fresh, save_experts(model, tmp_path / "experts.safetensors")) == CHOSEN
    assert_equal(state(fresh), state(model), 0)


@needs_fused
def test_refused_calls_change_nothing(tmp_path):
    """Experts that the model lacks, adapted or trained ones, files of something else, other shapes, full folders."""
    model = tiny_mixtral(1)
    for experts, message in (
        ({HOLDERS[0]: [4]}, "has no expert 4 in .*which has 4"),
        (
            {"model.experts": [0]},
            "has no expert 0 in 'model.experts', which has 0; modules of experts: 'model.layers.0",
        ),
        (
            ["model.layers.0.mlp"],
            "experts must be names such as 'model.layers.3.mlp.experts.17', got 'model.layers.0.mlp'",
        ),
        ({}, "No expert was named"),
        ([1], "experts must be names such as .* got 1"),
        ({HOLDERS[0]: "all"}, "must be whole numbers, .* got 'all' for 'model.layers.0"),
        ({HOLDERS[0]: [True]}, r"must be whole numbers, .* got \[True\]"),
        ({HOLDERS[0]: []}, "No expert of 'model.layers.0.mlp.experts' was named"),
    ):
        with pytest.raises(BlueprintError, match=message):
            unfreeze_experts(model, experts)
    with pytest.raises(PlacementError, match="MixtralForCausalLM has no trained experts"):
        save_experts(model, tmp_path)
    assert all(p.requires_grad for p in model.parameters()) and not list(tmp_path.iterdir())
    name = f"{HOLDERS[0]}.1.gate_up_proj"
    adapted = get_peft_model(
        tiny_mixtral(1), BlueprintConfig(placement=Placement("m", (name,), (), "x", "none", target_parameters=(name,)))
    )
    with pytest.raises(PlacementError, match="have an adapter"):
        unfreeze_experts(adapted, OF_ONE)
    unfreeze_experts(model, OF_ONE)
    with pytest.raises(PlacementError, match="were unfrozen before"):
        unfreeze_experts(model, OF_ONE)
    path, before = save_experts(model, tmp_path), state(model)
    with pytest.raises(MismatchError, match="is 32x24, and the model's is 32x16"):
        load_experts(tiny_mixtral(1, intermediate_size=16), path)
    with pytest.raises(MismatchError, match="has no expert"):
        load_experts(tiny_llama(1), path)
    save_file({f"{HOLDERS[0]}.1.gate_up_proj": torch.zeros(48, 32), "lm_head.weight": torch.zeros(1)}, path)
    with pytest.raises(FormatError, match="'lm_head.weight' in .* is not an expert's parameter"):
        load_experts(model, path)
    path.write_bytes(b"{}")
    with pytest.raises(FormatError, match="is not a file of experts"):
        load_experts(model, path)
    assert_equal(state(model), before, 0)
    save_experts(model, path)
    with pytest.raises(BlueprintError, match="exists and is not an empty folder"):
        merge_experts(path, "org/model", tmp_path)


@needs_fused
def test_adapters_on_chosen_experts_start_along_the_gradient():
    """Each expert's A gets its own leading directions, which are orthogonal; B stays zero."""
    name = [f"{HOLDERS[0]}.{number}.gate_up_proj" for number in (0, 1, 3)]
    placement = Placement("tiny", tuple(name), (), "token_share", "none", target_parameters=tuple(name), rank=2)
    model = get_peft_model(tiny_mixtral(1), BlueprintConfig(placement=placement))
    assert initialize_along_gradient(model, toy_batches(), progress=False) == 1
    [(a, b)] = [
        (m.lora_A["default"].weight, m.lora_B["default"].weight) for m in model.modules() if hasattr(m, "chosen")
    ]
    rows = a.detach().unflatten(0, (3, 2))
    products = rows @ rows.mT
    assert (products[:, 0, 1].abs() < 1e-5 * products[:, 0, 0]).all() and not b.any()


def in_processes():
    """In each of two processes: DDP where only one process's tokens reach a trained expert, of adapters and whole ones."""
    rank = torch.distributed.get_rank()
    name = [f"{HOLDERS[0]}.{number}.{weight}" for number in (1, 3) for weight in ("gate_up_proj", "down_proj")]
    placement = Placement("tiny", tuple(name), (), "token_share", "none", target_parameters=tuple(name), rank=2)
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_mixtral(1), BlueprintConfig(placement=placement, init_lora_weights=False))
    whole = tiny_mixtral(1)
    unfreeze_experts(whole, OF_ONE)
    tokens = torch.arange(1, 13)[None] if rank == 0 else torch.tensor([[5]])
    for model in (adapted, whole):
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        router = model.get_submodule("base_model.model" if model is adapted else "").model.layers[0].mlp.gate
        if rank == 1:  # experts 0 and 2 alone
            router.register_forward_hook(lambda _, __, output: (*output[:2], output[2].copy_(torch.tensor([0, 2]))))
        for _ in range(2):
            parallel(input_ids=tokens).logits.square().mean().backward()
        own = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        both = [torch.zeros_like(own) for _ in range(2)]
        torch.distributed.all_gather(both, own)
        assert torch.equal(*both) and own.abs().sum() > 0
