"""What BlueprintCallback costs: its own time in a measured step, as a share of the step.

    python -m benchmarks callback [--length 200] [--examples 8] [--steps 6] [--every 1] [--milestone]

SmolLM2-135M with LoRA on all linear layers is trained by the Trainer. The callback's hooks are timed from inside, and a
step from its beginning to its end with all callbacks, because what is sought is far below the noise between two runs.
Where there is a GPU, it is waited for before and after each hook, so that a step's own work is not counted as the
callback's. The first step warms up and counts for nothing. With --milestone a blueprint is written in the last step,
whose share is then the largest; without it, none is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from peft_blueprint.train import BlueprintCallback

from . import measure


def main() -> None:
    """Parse, train, print a table and, with --json, the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=200, help="tokens of an example")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="of which the first is left out")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--detail", default="submodule", choices=["submodule", "kind"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--milestone", action="store_true", help="write a blueprint at the end")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON too")
    options = parser.parse_args()
    if options.steps < 2:
        raise SystemExit(f"--steps {options.steps} leaves nothing after the first; give 2 or more.")

    set_seed(0)
    base, batch = measure.prepare(options.length, options.examples, options.dtype)
    base.requires_grad_(False)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    rows = [{key: value[i] for key, value in batch.items()} for i in range(options.examples)]
    with tempfile.TemporaryDirectory() as folder:
        clock = train(model, rows, folder, options)

    steps, inside = clock.steps[1:], clock.inside[1:]
    shares = [spent / step for spent, step in zip(inside, steps, strict=True)]
    result = {
        "step_seconds": statistics.median(steps),
        "callback_milliseconds": 1e3 * statistics.median(inside),
        "callback_milliseconds_range": [1e3 * min(inside), 1e3 * max(inside)],
        "share": statistics.median(shares),
        "share_range": [min(shares), max(shares)],
        "share_of_all": sum(inside) / sum(steps),
        "steps": len(steps),
        "parameters": sum(p.requires_grad for p in model.parameters()),
    }
    print(
        f"{options.examples} x {options.length} tokens, {options.dtype}, {torch.get_num_threads()} threads, "
        f"every={options.every}, detail={options.detail}, {result['parameters']} parameters, {len(steps)} steps"
    )
    print(f"step, median                {result['step_seconds']:>10.3f} s")
    print(f"inside the callback, median {result['callback_milliseconds']:>10.3f} ms")
    print(f"share of a step, median     {result['share']:>10.4%}   largest {max(shares):.4%}")
    print(f"share of all steps          {result['share_of_all']:>10.4%}")
    if options.json:
        print(json.dumps(result))


class Clock:
    """Seconds of every step, and of the callback's hooks within it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.inside: list[float] = []
        self._began = 0.0

    @contextlib.contextmanager
    def hook(self) -> Iterator[None]:
        """Count what happens inside the `with` as the callback's."""
        start = now()
        try:
            yield
        finally:
            self.inside[-1] += now() - start

    def begin(self) -> None:
        """A step begins."""
        self._began = now()
        self.inside.append(0.0)

    def end(self) -> None:
        """It has ended."""
        self.steps.append(now() - self._began)


class Timed(BlueprintCallback):
    """The callback with a clock around what it does in a step."""

    def __init__(self, trainer: Trainer, clock: Clock, **settings: Any) -> None:
        super().__init__(trainer, **settings)
        self.clock = clock

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with self.clock.hook():
            super().on_pre_optimizer_step(*args, **kwargs)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        with self.clock.hook():
            super().on_step_end(*args, **kwargs)


class Steps(TrainerCallback):
    """Tells the clock where steps begin and end; to be added last."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.end()


def train(model: Any, rows: list[dict[str, Any]], folder: str, options: argparse.Namespace) -> Clock:
    """Some steps on the same batch, with the callback and the clock; what the Trainer prints is thrown away."""
    arguments = TrainingArguments(
        folder,
        max_steps=options.steps,
        per_device_train_batch_size=options.examples,
        learning_rate=1e-4,
        logging_steps=options.steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    clock = Clock()
    milestones = (1.0,) if options.milestone else ()
    trainer.add_callback(Timed(trainer, clock, every=options.every, detail=options.detail, milestones=milestones))
    trainer.add_callback(Steps(clock))
    print(f"Training {options.steps} steps", file=sys.stderr)
    with contextlib.redirect_stdout(io.StringIO()):  # printing the figures is timed, showing them is not
        trainer.train()
    return clock


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
