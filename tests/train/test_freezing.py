"""Freezing from below: schedules, marginal return, optimizer states, resumption and the cache that moves up."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_blueprint import BlueprintError
from peft_blueprint.testing import tiny_llama, toy_batches
from peft_blueprint.train import CacheFrozenPrefix, FreezeFromBelow, freeze_below, read_schedule
from tests.processes import error_of


LAYERS, EXAMPLES, STEPS = 4, 8, 2  # steps of an epoch


def adapted(**settings):
    """A tiny Llama with LoRA on two kinds of all layers."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **settings)
    return get_peft_model(tiny_llama(LAYERS), config).train()


def make_trainer(folder, model=None, **settings):
    data = [{key: value[0] for key, value in batch.items()} for batch in toy_batches(EXAMPLES, 12, 1)]
    settings = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        **settings,
    }
    model = adapted() if model is None else model
    return Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=data)


class Watch(TrainerCallback):
    """After every step: which layers are trained, which moved, and which the optimizer holds states of."""

    def __init__(self, trainer):
        self.trainer, self.trained, self.moved, self.held = trainer, [], [], []
        self.before = self.weights()

    def weights(self):
        return {
            name: parameter.detach().clone()
            for name, parameter in self.trainer.model.named_parameters()
            if "lora_" in name
        }

    def on_step_end(self, args, state, control, **kwargs):
        def layers(names):
            return sorted({int(name.split(".layers.")[1].split(".")[0]) for name in names})

        parameters = dict(self.trainer.model.named_parameters())
        now, states = self.weights(), self.trainer.optimizer.state
        self.moved.append(layers(name for name in now if not torch.equal(now[name], self.before[name])))
        self.trained.append(layers(name for name in now if parameters[name].requires_grad))
        self.held.append(layers(name for name in now if states.get(parameters[name])))
        self.before = now


def test_a_schedule_freezes_from_below(tmp_path):
    """After epoch 1 below layer 1, after epoch 2 below 3: their adapters rest, and their states are gone."""
    trainer = make_trainer(tmp_path)
    trainer.add_callback(FreezeFromBelow("1:1, 2:3"))
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    every, upper, top = [0, 1, 2, 3], [1, 2, 3], [3]
    assert watch.moved == [every, every, upper, upper, top, top]
    assert watch.held == watch.trained == [every, upper, upper, top, top, top]


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_bnb_8bit", "sgd"])
def test_states_of_any_optimizer_are_released(optimizer, tmp_path):
    if "bnb" in optimizer:
        pytest.importorskip("bitsandbytes")
    trainer = make_trainer(tmp_path, optim=optimizer, max_steps=3)
    trainer.add_callback(FreezeFromBelow({1: 2}))
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.moved[-1] == [2, 3]
    assert watch.held[-1] == ([] if optimizer == "sgd" else [2, 3])
    if "bnb" in optimizer:
        paged = torch.zeros(3)
        trainer.optimizer.optimizer.page_mng.paged_tensors.append(paged)
        last = next(p for p in trainer.model.parameters() if p.requires_grad)
        trainer.optimizer.state[last]["state1"] = paged
        freeze_below(trainer.model, 3, trainer.optimizer)
        assert not any(tensor is paged for tensor in trainer.optimizer.optimizer.page_mng.paged_tensors)


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("rule", ["schedule", "marginal"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(rule, is_cached, tmp_path):
    """From a checkpoint after the first freezing: equal losses, by either rule, with and without the cache."""

    def run(folder, checkpoint=None):
        trainer = make_trainer(folder, save_strategy="steps", save_steps=2 * STEPS, num_train_epochs=4)
        freezing = (
            FreezeFromBelow("1:1, 3:3")
            if rule == "schedule"
            else FreezeFromBelow(trainer=trainer, threshold=50.0, every=1, strata=4)
        )
        trainer.add_callback(freezing)
        if is_cached:
            trainer.add_callback(CacheFrozenPrefix("1MiB"))
        trainer.train(resume_from_checkpoint=checkpoint)
        return freezing.depth, [record["loss"] for record in trainer.state.log_history if "loss" in record]

    depth, whole = run(tmp_path / "whole")
    again, resumed = run(tmp_path / "whole", str(tmp_path / "whole" / f"checkpoint-{2 * STEPS}"))
    assert depth == again > 0 and resumed == pytest.approx(whole, rel=1e-5)


def test_the_cache_moves_up_and_losses_stay(tmp_path):
    """Layers freeze from epoch to epoch: equal losses with the cache, whose rows are read from the second epoch on."""
    found, statistics = [], None
    for callbacks in ([], [CacheFrozenPrefix("1MiB")]):
        trainer = make_trainer(tmp_path, num_train_epochs=4)
        for callback in (FreezeFromBelow("1:1, 2:3"), *callbacks):
            trainer.add_callback(callback)
        trainer.train()
        found.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
        statistics = callbacks[0].statistics if callbacks else None
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert statistics.lowest == 3 and statistics.examples == statistics.rows_read == EXAMPLES
    assert statistics.rows_computed == 2 * EXAMPLES, "once below layer 1, once from there below layer 3"


class Scale(TrainerCallback):
    """Scale the gradients of some layers before they are measured."""

    def __init__(self, model, factors):
        self.model, self.factors = model, factors

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(self.factors[int(name.split(".layers.")[1].split(".")[0])])


@pytest.mark.parametrize(
    ("factors", "threshold", "expected"),
    [
        ([0.0, 0.0, 1.0, 1.0], 1.0, 2),  # what brings nothing is frozen
        ([9.0, 1.0, 1.0, 1.0], 1.0, 0),  # what brings most is not, and nothing above it
        ([0.0, 9.0, 1.0, 1.0], 1.0, 1),
        ([1.0, 1.0, 1.0, 1.0], 1e-3, 0),
        ([1.0, 1.0, 1.0, 1.0], 1e3, 3),  # the last stratum stays
    ],
)
def test_by_marginal_return(factors, threshold, expected, tmp_path):
    """A stratum is frozen if its gain for the time it takes is below the rest's."""
    trainer = make_trainer(tmp_path, num_train_epochs=1, max_grad_norm=0.0)
    trainer.add_callback(Scale(trainer.model, factors))
    callback = FreezeFromBelow(trainer=trainer, threshold=threshold, strata=LAYERS, every=1)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.depth == expected
    trained = {name.split(".layers.")[1][0] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == {str(layer) for layer in range(expected, LAYERS)}


def test_frozen_adapters_do_not_drop_out():
    """So that their outputs are the same in every epoch; dropout above stays."""
    model = adapted(lora_dropout=0.5)
    freeze_below(model, 2)
    rates = {
        int(name.split(".layers.")[1][0]): module.p
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Dropout) and ".layers." in name
    }
    assert rates == {0: 0.0, 1: 0.0, 2: 0.5, 3: 0.5}


def test_blocks_trained_whole_are_frozen_too():
    model = get_peft_model(
        tiny_llama(LAYERS), LoraConfig(target_modules=["layers.3.mlp.up_proj"], modules_to_save=["layers.1.mlp"])
    )
    names = freeze_below(model, 2)
    assert names and all(name.startswith("model.layers.1.mlp") for name in names)
    assert freeze_below(model, 2) == ()


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("1-10", "cannot be read"),
        ("1:2, 2:1", "layers must rise"),
        ("0:2", "positive epochs"),
        ({}, "positive epochs"),
        ("1:4", "leave nothing trained"),
    ],
)
def test_schedules_it_refuses(schedule, message, tmp_path):
    with pytest.raises(BlueprintError, match=message):
        FreezeFromBelow(schedule, trainer=make_trainer(tmp_path))


def test_options_it_refuses(tmp_path):
    trainer = make_trainer(tmp_path)
    for wrong in ({"every": 0}, {"strata": True}, {"threshold": 0.0}):
        with pytest.raises(BlueprintError, match=f"{next(iter(wrong))} must be"):
            FreezeFromBelow(trainer=trainer, **wrong)
    with pytest.raises(BlueprintError, match="trainer must be a Trainer"):
        FreezeFromBelow(trainer=trainer.model)
    with pytest.raises(BlueprintError, match="leave nothing trained"):
        freeze_below(adapted(), LAYERS)
    assert read_schedule({1: 2, 2: 3}) == {1.0: 2, 2.0: 3}


def in_processes(folder):
    """Under DDP with unused parameters found, both freeze alike and hold equal weights; without, it is refused."""
    for is_allowed in (False, True):
        trainer = make_trainer(
            folder, ddp_find_unused_parameters=is_allowed, gradient_accumulation_steps=1, ddp_backend="gloo"
        )
        callbacks = (
            FreezeFromBelow(trainer=trainer, every=1, threshold=10.0, strata=4),
            CacheFrozenPrefix("1MiB"),
        )
        for callback in callbacks:
            trainer.add_callback(callback)
        if not is_allowed:
            assert "ddp_find_unused_parameters" in error_of(trainer.train)
            continue
        trainer.train()
        assert callbacks[0].depth == 3, callbacks[0].depth
        assert callbacks[1].statistics.rows_computed >= callbacks[1].statistics.examples > 0
        own = torch.cat([p.detach().flatten() for n, p in trainer.model.named_parameters() if "lora_" in n])
        both = [torch.zeros_like(own) for _ in range(2)]
        torch.distributed.all_gather(both, own)
        assert torch.equal(*both)
