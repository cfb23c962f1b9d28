"""A model is trained briefly and restored. Run: pytest tests/data/test_brief_training.py"""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_blueprint.data.brief_training import restore_afterwards, temporary_adapters, train_briefly
from peft_blueprint.errors import BlueprintError, MeasurementError
from peft_blueprint.testing import tiny_llama


ROWS = [{"input_ids": [5 + i, 6, 7, 8 + i], "labels": [-100, 6, 7, 8 + i]} for i in range(6)]
OPTIONS = {"batch_size": 3, "pad_token_id": 0}


def loss_of(model):
    ids = torch.tensor([row["input_ids"] for row in ROWS])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_new_adapters_learn_and_are_removed_afterwards():
    """They sit on the named submodules; the loss falls inside the `with` and is restored after it."""
    model = tiny_llama(layers=2)
    before = loss_of(model)
    with temporary_adapters(model, ["model.layers.1.mlp.up_proj"], seed=0) as wrapped:
        assert {n.split(".lora_")[0][-23:] for n, p in wrapped.named_parameters() if p.requires_grad} == {
            "model.layers.1.mlp.up_proj"[-23:]
        }
        tokens = train_briefly(wrapped, ROWS, steps=12, learning_rate=0.02, **OPTIONS)
        assert tokens == 12 * 3 * 4 and loss_of(wrapped) < before - 0.05
    assert loss_of(model) == before and not any("lora" in name for name, _ in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_existing_adapters_are_trained_and_restored():
    """A PeftModel keeps its adapters and their weights."""
    model = get_peft_model(tiny_llama(layers=2), LoraConfig(r=2, target_modules=["up_proj"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with temporary_adapters(model, None, seed=0) as same:
        train_briefly(same, ROWS, steps=2, **OPTIONS)
        assert same is model and any(not torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_seed_gives_the_same_training():
    """It fixes the order of rows and the adapters' initial weights."""
    losses = []
    for _ in range(2):
        torch.rand(3)
        with temporary_adapters(tiny_llama(layers=2), None, seed=4) as wrapped:
            train_briefly(wrapped, ROWS, steps=2, seed=4, **OPTIONS)
            losses.append(loss_of(wrapped))
    assert losses[0] == losses[1]


def test_models_that_cannot_be_restored_or_trained_are_refused():
    """Offloaded or frozen models, and no linear layer to adapt; a module that was added is taken away again."""
    model = tiny_llama(layers=2)
    with restore_afterwards(model):
        model.extra = torch.nn.Linear(2, 2)
    assert not hasattr(model, "extra")
    with (
        pytest.raises(BlueprintError, match="are offloaded"),
        restore_afterwards(torch.nn.Linear(2, 2, device="meta")),
    ):
        pass
    with pytest.raises(MeasurementError, match="requires a gradient"):
        train_briefly(tiny_llama().requires_grad_(False), ROWS, steps=1, **OPTIONS)
    with pytest.raises(MeasurementError, match="None of the submodules is a linear layer"):
        with temporary_adapters(tiny_llama(), ["nowhere"], seed=0):
            pass
