"""Tiny trainers with evaluations, for the tests of the books. Knows nothing of what the tests ask."""

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


def make_trainer(folder, model=None, cls=Trainer, **arguments):
    """Ten steps of four examples, logged every five and evaluated every two; tokens of a step: 48."""
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
    return cls(model or lora(), arguments, train_dataset=rows(), eval_dataset=evaluated)


def train(folder, model=None, *others, arguments=None, resume=None, **settings):
    """Train with the callback, and with others before it. Returns the trainer and the callback."""
    trainer = make_trainer(folder, model, **arguments or {})
    for other in others:
        trainer.add_callback(other)
    callback = LedgerCallback(trainer, **settings)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def logged(trainer, prefix="ledger/"):
    """Step → name → figure, from the log history; the last where there are several of a step."""
    found = {}
    for record in trainer.state.log_history:
        ours = {k.removeprefix(prefix): v for k, v in record.items() if k.startswith(prefix)}
        if ours:
            found.setdefault(record["step"], {}).update(ours)
    return found


class At(TrainerCallback):
    """Does something at the end of one step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        """The step's."""
        if state.global_step == self.step:
            self.act(state, control)


def end(state, control):
    """End the training here, with a checkpoint."""
    control.should_training_stop = control.should_save = True
