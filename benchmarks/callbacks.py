"""What do the callbacks cost? Their own time, as a share of a training step and of a validation.

    python -m benchmarks callbacks [--callback blueprint|ledger|validation] [--length 200] [--examples 8] [--steps 12]

LoRA on all linear layers is trained by the Trainer. The callback's hooks are timed from inside, and a step from its
beginning to the beginning of the next, because what is sought is far below the noise between two runs. On a GPU the
device is waited for before and after each hook. The first two steps are left out: one warms up, in the other FLOPs are
counted, once. Steps after which the Trainer logs are shown apart. `blueprint` logs training norms. `ledger` also times
one call of the ledger's parts in a long loop.

`validation` compares the CPU time of measuring a blueprint with that of the Trainer's evaluation, which runs the forward
pass alone, and with a forward and backward pass over the same examples. Every round runs all of them in turn, and the
ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from peft_blueprint.runs import Ledger, modelled
from peft_blueprint.train import BlueprintCallback, LedgerCallback

from . import setup


LEFT_OUT = 2  # steps at the beginning
LOG_EVERY = 4  # steps
QUICK = {"length": 16, "examples": 2, "steps": 8, "calls": 200, "held_out": 10, "rounds": 2}
CALLBACKS = ["blueprint", "ledger", "validation"]
EVENTS = ("step_begin", "substep_end", "pre_optimizer_step", "optimizer_step", "step_end", "log")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--callback", choices=CALLBACKS, nargs="+", default=CALLBACKS)
    parser.add_argument("--length", type=int, default=200, help="tokens of an example")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12, help=f"of which {LEFT_OUT} are left out")
    parser.add_argument("--every", type=int, default=1, help="BlueprintCallback's")
    parser.add_argument("--detail", default="submodule", choices=["submodule", "kind"], help="BlueprintCallback's")
    parser.add_argument("--held-out", type=int, default=20, help="validation examples")
    parser.add_argument("--rounds", type=int, default=5, help="of the comparison with a validation")
    parser.add_argument("--calls", type=int, default=20_000, help="of each part of the ledger in its loop")
    parser.add_argument("--dtype", default="float32")


def main(options: argparse.Namespace) -> None:
    """Train with each callback and print a table."""
    if options.steps < 2 * LOG_EVERY:
        raise SystemExit(f"--steps must be at least {2 * LOG_EVERY}, got {options.steps}.")
    rows = []
    for name in (name for name in options.callback if name != "validation"):
        clock = _train(name, options)
        steps = list(zip(clock.steps, clock.inside, clock.logged, strict=True))[LEFT_OUT:]
        whole = statistics.median(step for step, _, _ in steps)
        row = [name, f"{1e3 * whole:.1f}"]
        for is_log in (False, True):
            inside = [inside for _, inside, logged in steps if logged == is_log]
            typical, most = (statistics.median(inside), max(inside)) if inside else (0.0, 0.0)
            row += [f"{1e3 * typical:.3f}", f"{typical / whole:.3%}", f"{most / whole:.3%}"]
        rows.append(row)
    print(f"{options.examples} x {options.length} tokens, {options.dtype}, {setup.device_name()}\n")
    columns = ["callback", "step, ms", "inside, ms", "share", "largest", "when it logs, ms", "share", "largest"]
    if rows:
        setup.print_table(columns, rows)
    if "ledger" in options.callback:
        with Ledger(flops_per_token=modelled(1e9, "CostModel")) as ledger:
            add = _each(lambda: ledger.add(tokens=512), options.calls)
            quantities = _each(ledger.quantities, max(1, options.calls // 20))
        print(f"\nLedger.add {1e6 * add:.2f} µs, Ledger.quantities {1e6 * quantities:.0f} µs")
    if "validation" in options.callback:
        print(f"\n{options.held_out} validation examples, CPU time, {options.rounds} rounds\n")
        _compare_with_validation(options)


@dataclass
class Clock:
    """Seconds of every step, seconds of the callback's hooks in it, and whether it ended with a log."""

    steps: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    logged: list[bool] = field(default_factory=list)
    began: float = 0.0
    is_inside: bool = False

    def timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same hook, its time counted as the callback's."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.is_inside or not self.inside:  # sending figures logs, which is an event again
                return hook(*args, **kwargs)
            self.is_inside = True
            start = _now()
            found = hook(*args, **kwargs)
            self.inside[-1] += _now() - start
            self.is_inside = False
            return found

        return run


class _Timed(TrainerCallback):
    """Passes every event on to a callback, with the clock running."""

    def __init__(self, callback: TrainerCallback, clock: Clock) -> None:
        self.on_train_begin = callback.on_train_begin  # type: ignore[method-assign]
        self.on_train_end = callback.on_train_end  # type: ignore[method-assign]
        for event in EVENTS:
            setattr(self, f"on_{event}", clock.timed(getattr(callback, f"on_{event}")))


class _Steps(TrainerCallback):
    """Tells the clock where steps begin; to be added before all others."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        now = _now()
        if self.clock.inside:
            self.clock.steps.append(now - self.clock.began)
        self.clock.began = now
        self.clock.inside.append(0.0)
        self.clock.logged.append(False)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        if self.clock.logged:
            self.clock.logged[-1] = True

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.steps.append(_now() - self.clock.began)


def _train(name: str, options: argparse.Namespace) -> Clock:
    """Train on the same batch for some steps; what the Trainer prints is thrown away."""
    set_seed(0)
    base, batch = setup.one_batch(options)
    base.requires_grad_(False)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    rows = [{key: value[i] for key, value in batch.items()} for i in range(options.examples)]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.examples,
            learning_rate=1e-4,
            logging_steps=LOG_EVERY,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
        callback: TrainerCallback = LedgerCallback(trainer)
        if name == "blueprint":
            callback = BlueprintCallback(trainer, every=options.every, detail=options.detail, milestones=())
        trainer.add_callback(_Steps(clock))
        trainer.add_callback(_Timed(callback, clock))
        trainer.train()
    return clock


def _compare_with_validation(options: argparse.Namespace) -> None:
    """Print what measuring all and a tenth of the validation examples costs beside evaluating them."""
    examples, options.examples = options.examples, options.held_out
    model, batch = setup.one_batch(options)
    options.examples = examples
    rows = [{key: value[i] for key, value in batch.items()} for i in range(options.held_out)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        size = min(options.examples, max(1, options.held_out // 10))
        arguments = TrainingArguments(
            folder,
            max_steps=10**4,
            per_device_train_batch_size=size,
            per_device_eval_batch_size=size,
            report_to="none",
            disable_tqdm=True,
            eval_strategy="steps",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(model, arguments, eval_dataset=rows)  # type: ignore[arg-type]
        trainer.state.max_steps = arguments.max_steps
        model.train().requires_grad_(True)

        def measuring(count: int) -> Callable[[], None]:
            callback = BlueprintCallback(trainer, max_examples=count)
            callback.on_train_begin(arguments, trainer.state, trainer.control)

            def measure() -> None:
                trainer.state.global_step += 1
                callback.on_evaluate(arguments, trainer.state, trainer.control)

            return measure

        def train() -> None:
            for i in range(0, options.held_out, size):
                model(**{key: value[i : i + size] for key, value in batch.items()}).loss.backward()
            model.zero_grad(set_to_none=True)

        tenth = max(1, options.held_out // 10)
        arms: dict[str, Callable[[], object]] = {
            "validation (forward)": trainer.evaluate,
            "forward + backward": train,
            "blueprint of all": measuring(options.held_out),
            "blueprint of a tenth": measuring(tenth),
        }
        seconds = setup.seconds_per_round(arms, options.rounds, cpu_time=True)
        written = len(list(Path(folder).glob("blueprint-*.json")))
    if written != 2 * (options.rounds + 1):
        raise SystemExit(f"Only {written} of {2 * (options.rounds + 1)} blueprints were measured; see the warnings.")
    table = []
    for name in arms:
        row = [name, f"{statistics.median(seconds[name]):.2f}"]
        for reference in ("validation (forward)", "forward + backward"):
            found = setup.ratios(seconds, name, reference)
            row.append(f"{statistics.median(found):.1%} ({min(found):.1%} to {max(found):.1%})")
        table.append(row)
    setup.print_table(["arm", "CPU s", "of the validation", "of forward + backward"], table)
    each, fixed = [], []
    whole, part, forward = (
        seconds[name] for name in ("blueprint of all", "blueprint of a tenth", "validation (forward)")
    )
    for all_of_it, a_tenth, evaluated in zip(whole, part, forward, strict=True):
        of_one = (all_of_it - a_tenth) / (options.held_out - tenth)
        each.append(of_one / (evaluated / options.held_out))
        fixed.append(a_tenth - tenth * of_one)
    print(
        f"\nA blueprint costs {statistics.median(fixed):.2f} CPU s ({min(fixed):.2f} to {max(fixed):.2f}), and each example "
        f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f}) evaluations of it."
    )


def _each(call: Callable[[], Any], calls: int) -> float:
    """Return the seconds of one call; the quickest of five loops, since other processes only make it slower."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        seconds.append((time.perf_counter() - start) / calls)
    return min(seconds)


def _now() -> float:
    """Return seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
