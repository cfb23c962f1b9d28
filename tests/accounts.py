"""Tiny trainers with evaluations, and callbacks that act at one step."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_blueprint.testing import tiny_llama, toy_batches
from peft_blueprint.train.ledger_callback import LedgerCallback


LENGTH = 12
EXAMPLES = 8


def lora(layers=2, **settings):
    """A tiny Llama with LoRA."""
    torch.manual_seed(0)
    return get_peft_model(
        tiny_llama(layers), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], r=4, **settings)
    )


def rows(examples=EXAMPLES):
    """Examples of `LENGTH` tokens."""
    return [{k: v[0] for k, v in b.items()} for b in toy_batches(examples, LENGTH, 1, padding="none")]


def make_trainer(folder, model=None, cls=Trainer, callbacks=(), **arguments):
    """Make a Trainer for ten steps of 48 tokens, logged every five steps and evaluated every two."""
    settings = {
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    evaluated = arguments.pop("eval_dataset", rows(4))
    arguments = TrainingArguments(str(folder), **settings | arguments)
    data = {"train_dataset": rows(), "eval_dataset": evaluated}
    return cls(model or lora(), arguments, **data, callbacks=list(callbacks))


def train(folder, model=None, *others, arguments=None, resume=None, **settings):
    """Train with `LedgerCallback` after other callbacks; return the trainer and the callback."""
    trainer = make_trainer(folder, model, **arguments or {})
    for other in others:
        trainer.add_callback(other)
    callback = LedgerCallback(trainer, **settings)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def logged(trainer, prefix="ledger/"):
    """Return step → name → value from the log history, the last record of a step winning."""
    found = {}
    for record in trainer.state.log_history:
        ours = {k.removeprefix(prefix): v for k, v in record.items() if k.startswith(prefix)}
        if ours:
            found.setdefault(record["step"], {}).update(ours)
    return found


class At(TrainerCallback):
    """Act at one step: at its end, or before its optimizer step."""

    def __init__(self, step, end=None, before=None):
        self.step, self.end, self.before = step, end, before

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.before and state.global_step + 1 == self.step:
            self.before(model)

    def on_step_end(self, args, state, control, **kwargs):
        if self.end and state.global_step == self.step:
            self.end(state, control)


def end(state, control):
    """End the training with a checkpoint."""
    control.should_training_stop = control.should_save = True
