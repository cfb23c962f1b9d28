"""Unfrozen blocks: releasing their originals, saving and loading, reference adapters, and QLoRA."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_blueprint import BlueprintConfig, generate_blueprint, plan_placement
from peft_blueprint.errors import PlacementError
from peft_blueprint.measure.submodules import is_quantized
from peft_blueprint.place.placement import Placement
from peft_blueprint.testing import randomize_adapters, tiny_llama, toy_batches
from peft_blueprint.train.memory import share_base
from tests.unfrozen import needs_peft_020


pytestmark = needs_peft_020


TOKENS = torch.arange(1, 11)[None]
BLOCKS = ("model.layers.1.mlp", "model.layers.2.self_attn")
PLACEMENT = Placement("tiny/llama", ("model.layers.3.mlp.up_proj",), BLOCKS, "adam_gain", "kind+depth")
FLOAT = 4  # bytes


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def unfrozen(**base):
    """A tiny Llama with one adapter and two unfrozen blocks, and how many parameters it had and its blocks have."""
    torch.manual_seed(0)
    model = tiny_llama(**base)
    sizes = model.num_parameters(), sum(p.numel() for name in BLOCKS for p in model.get_submodule(name).parameters())
    return get_peft_model(model, BlueprintConfig(placement=PLACEMENT, r=2)), *sizes


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def train(model, steps=3, optimizer=None):
    """Losses of a few steps, and the optimizer."""
    model.train()
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(steps):
        losses.append(0.0)
        for batch in toy_batches():
            loss = model(**batch).loss
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return losses, optimizer


def trainable(model):
    return {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_the_copies_memory_is_given_back():
    """PEFT holds each block twice; released, the model has its own parameters and LoRA's, and a second call finds 0."""
    model, whole, blocks = unfrozen()
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert count(model) == whole + lora + blocks
    before = trainable(model)
    assert share_base(model) == FLOAT * blocks
    assert count(model) == whole + lora
    assert trainable(model) == before and len(before) == 2 + sum(
        1 for name in BLOCKS for _ in tiny_llama().get_submodule(name).parameters()
    )
    assert share_base(model) == 0


def test_shared_memory_is_not_counted():
    """A head tied to the embedding keeps the embedding's memory, so that releasing the head's original saves nothing."""
    model = tiny_llama(tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="tie"):
        model = get_peft_model(model, config)
    held = count(model)
    assert share_base(model) == 0 and count(model) == held


def test_training_continues_with_the_same_optimizer():
    """Losses of a run in which the originals are released half way are those of one in which they are not."""
    (plain, *_), (shared, *_) = unfrozen(), unfrozen()
    expected, optimizer = train(plain)
    expected += train(plain, optimizer=optimizer)[0]
    found, optimizer = train(shared)
    share_base(shared)
    found += train(shared, optimizer=optimizer)[0]
    assert found == expected and found[-1] < found[0]


def test_it_is_saved_as_before_and_loads_with_plain_peft(tmp_path):
    """The same tensors and config as without sharing; reloaded, also to resume, the logits and trainables are equal."""
    for name, is_shared in (("plain", False), ("shared", True)):
        model, *_ = unfrozen()
        if is_shared:
            share_base(model)
        randomize_adapters(model)
        expected = logits(model)
        model.save_pretrained(tmp_path / name)
    plain, shared = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "shared"))
    assert plain.keys() == shared.keys()
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in ("plain", "shared")]
    assert configs[0] == configs[1]
    reloaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "shared", is_trainable=True)
    torch.testing.assert_close(logits(reloaded), expected)
    share_base(reloaded)
    reloaded.load_adapter(tmp_path / "shared", "default", is_trainable=True)  # as Trainer resumes
    torch.testing.assert_close(logits(reloaded), expected)
    losses, _ = train(reloaded)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(logits(reloaded.merge_and_unload()), logits(reloaded))


def test_disable_adapter_gives_the_base_model_back_unless_shared():
    """Plain: the base model's logits, bit by bit. Shared: the trained blocks' without LoRA; and training goes on after."""
    model, *_ = unfrozen()
    randomize_adapters(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))
    share_base(model)
    trained = tiny_llama()
    for name in BLOCKS:
        state = model.get_submodule(f"base_model.model.{name}").modules_to_save["default"].state_dict()
        trained.get_submodule(name).load_state_dict(state)
    before = trainable(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(trained))
        assert not torch.allclose(logits(model), logits(tiny_llama()), atol=1e-3)
    assert trainable(model) == before


def test_a_reference_adapter_added_later_is_a_copy_of_its_own():
    """TRL's `ref`: it starts from the blocks as they are, does not move with training, and `default` stays trainable."""
    model, *_ = unfrozen()
    share_base(model)
    randomize_adapters(model)
    before = trainable(model)
    model.add_adapter("ref", model.peft_config["default"])
    assert before <= trainable(model)  # from PEFT 0.21 on `ref` is trained too, until it is told not to be
    model.set_requires_grad("ref", False)
    assert trainable(model) == before
    at_start = {}
    for name in BLOCKS:
        wrapper = model.get_submodule(f"base_model.model.{name}")
        assert wrapper.modules_to_save["ref"] is not wrapper.modules_to_save["default"]
        at_start[name] = [p.clone() for p in wrapper.modules_to_save["ref"].parameters()]
        assert all(map(torch.equal, at_start[name], wrapper.modules_to_save["default"].parameters()))
    train(model)
    for name in BLOCKS:
        wrapper = model.get_submodule(f"base_model.model.{name}")
        assert all(map(torch.equal, at_start[name], wrapper.modules_to_save["ref"].parameters()))
        assert not any(map(torch.equal, at_start[name], wrapper.modules_to_save["default"].parameters()))
    with pytest.raises(
        PlacementError, match="adapter 'default' already replaces the originals of .*, so 'ref' cannot"
    ):
        share_base(model, "ref")


def test_missing_blocks_are_named():
    """No unfrozen block, or none of that adapter."""
    with pytest.raises(PlacementError, match="LlamaForCausalLM has no unfrozen blocks"):
        share_base(tiny_llama())
    model, *_ = unfrozen()
    with pytest.raises(PlacementError, match="'other' has no unfrozen blocks in this .*unfrozen blocks: 'default'"):
        share_base(model, "other")


def in_4_bits(folder: Path, skip: list[str] | None):
    """The saved model in NF4, except for the skipped modules."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=skip
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )


@pytest.mark.parametrize("is_shared", [False, True], ids=["copied", "shared"])
def test_whole_blocks_beside_qlora(tmp_path, is_shared):
    """Loaded with the placement's skip list, blocks train in floating point beside LoRA on 4 bits, and reload so."""
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    skip = PLACEMENT.quantization_skip_modules()
    model = get_peft_model(in_4_bits(tmp_path / "base", skip), BlueprintConfig(placement=PLACEMENT, r=2))
    assert is_quantized(model.get_submodule("base_model.model.model.layers.3.mlp.up_proj.base_layer").weight)
    if is_shared:
        assert share_base(model) > 0
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    losses, _ = train(model, steps=4)
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    moved = {name for name, parameter in before.items() if not torch.equal(parameter, after[name])}
    assert moved == before.keys() and {parameter.dtype for parameter in before.values()} == {torch.float32}
    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(in_4_bits(tmp_path / "base", skip), tmp_path / "adapter", is_trainable=True)
    torch.testing.assert_close(logits(reloaded), logits(model))


def test_a_skip_list_that_was_forgotten_is_an_error_that_gives_it(tmp_path):
    """Before anything is trained; and such an adapter does not load onto a base that is quantised throughout."""
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    with pytest.raises(PlacementError, match=r"'model.layers.1.mlp' is held in 4 or 8 bits.*llm_int8_skip_modules=\["):
        get_peft_model(in_4_bits(tmp_path / "base", None), BlueprintConfig(placement=PLACEMENT, r=2))
    skip = PLACEMENT.quantization_skip_modules()
    model = get_peft_model(in_4_bits(tmp_path / "base", skip), BlueprintConfig(placement=PLACEMENT, r=2))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises((KeyError, RuntimeError)):
        PeftModel.from_pretrained(in_4_bits(tmp_path / "base", None), tmp_path / "adapter", is_trainable=True)


def test_the_last_blocks_are_those_of_the_last_layers():
    """Not all attention parts before the first feed-forward part, which has fewer submodules."""
    blueprint = generate_blueprint(
        tiny_llama(layers=8), toy_batches(), model_id="tiny/llama", data="toy", progress=False
    )
    wish = {"mode": "unfreeze", "rank_by": "last", "coverage": "none", "num_modules": 4}
    last = {f"model.layers.{i}.{part}" for i in (6, 7) for part in ("self_attn", "mlp")}
    assert set(plan_placement(blueprint, **wish).unfreeze) == last
