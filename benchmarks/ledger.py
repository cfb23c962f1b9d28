"""What keeping a ledger costs, as a share of a training step.

    python -m benchmarks ledger [--model smollm2] [--length 128] [--examples 4] [--steps 12]

LoRA on all linear layers is trained by the Trainer with `LedgerCallback`. What it does takes microseconds, far below the
noise between two runs. So the callback's hooks are timed from inside, beside the whole step; and its parts, `add`, the
hook that sees a pass's tokens, and `figures` with all the meters that there are, each by itself in a long loop. When the
Trainer logs, memory and meters are read and the figures sent on, the Trainer's own part in it included; that has its own
column, as a share of a step too: divide it by `logging_steps`. The first two steps are left out: one warms up, and in
the other FLOPs are counted, once. With --model tiny the step is that of a random model
of four small layers, as short as a step gets.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from peft_blueprint.runs import Ledger, modelled
from peft_blueprint.testing import tiny_llama
from peft_blueprint.train import LedgerCallback, Passes

from . import measure


LEFT_OUT = 2  # steps at the beginning
LOG_EVERY = 4  # steps


def main() -> None:
    """Parse, time, print a row of a table and, with --json, the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=["smollm2", "tiny"])
    parser.add_argument("--length", type=int, default=128, help="tokens of an example")
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12, help="of which the first two are left out")
    parser.add_argument("--calls", type=int, default=20_000, help="of each part in its loop")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON too")
    options = parser.parse_args()
    if options.steps < 2 * LOG_EVERY:
        raise SystemExit(f"--steps {options.steps} leaves too few after the first two; give {2 * LOG_EVERY} or more.")

    set_seed(0)
    if options.model == "tiny":
        base: Any = tiny_llama()
        ids = torch.randint(1, base.config.vocab_size, (options.examples, options.length))
        batch = {"input_ids": ids, "labels": ids}
    else:
        base, batch = measure.prepare(options.length, options.examples, options.dtype)
    base.requires_grad_(False)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    rows = [{key: value[i] for key, value in batch.items()} for i in range(options.examples)]
    with tempfile.TemporaryDirectory() as folder:
        clock = train(model, rows, folder, options)

    result = shares(clock) | parts(batch["input_ids"].cpu(), options.calls)
    print("| model | tokens | step | callback, a step | share | callback, a log | share | add | figures |")
    print("|---|---|---|---|---|---|---|---|---|")
    print(
        f"| {options.model} | {batch['input_ids'].numel()} | {1e3 * result['step']:.1f} ms "
        f"| {1e6 * result['plain']:.0f} µs | {result['plain_share']:.4%} "
        f"| {1e6 * result['logging']:.0f} µs | {result['logging_share']:.4%} "
        f"| {1e6 * result['add']:.2f} µs | {1e6 * result['figures']:.0f} µs |"
    )
    if options.json:
        print(json.dumps(result | {"threads": torch.get_num_threads()}))


class Clock:
    """Seconds of every step, seconds of the callback's hooks within it, and whether it logged."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.inside: list[float] = []
        self.logged: list[bool] = []
        self._is_inside = False

    def hook(self, hook: Callable[..., Any]) -> Callable[..., None]:
        """The same hook, its time counted as the callback's."""

        def timed(*args: Any, **kwargs: Any) -> None:
            if self._is_inside or not self.inside:  # sending figures logs, which is an event again
                return hook(*args, **kwargs)
            self._is_inside = True
            start = time.perf_counter()
            hook(*args, **kwargs)
            self.inside[-1] += time.perf_counter() - start
            self._is_inside = False

        return timed


class Timed(TrainerCallback):
    """Passes every event on to a LedgerCallback, with the clock running."""

    def __init__(self, callback: LedgerCallback, clock: Clock) -> None:
        self.on_train_begin = callback.on_train_begin
        self.on_train_end = callback.on_train_end
        for event in ("step_begin", "substep_end", "pre_optimizer_step", "step_end", "log"):
            setattr(self, f"on_{event}", clock.hook(getattr(callback, f"on_{event}")))


class Steps(TrainerCallback):
    """Tells the clock where steps begin; to be added before all others."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self.clock.inside:
            self.clock.steps.append(now - self._began)
        self._began = now
        self.clock.inside.append(0.0)
        self.clock.logged.append(False)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        if self.clock.logged:
            self.clock.logged[-1] = True


def train(model: Any, rows: list[dict[str, Any]], folder: str, options: argparse.Namespace) -> Clock:
    """Some steps on the same batch; what the Trainer prints is thrown away."""
    arguments = TrainingArguments(
        folder,
        max_steps=options.steps + 1,  # a step is timed to the beginning of the next
        per_device_train_batch_size=options.examples,
        learning_rate=1e-4,
        logging_steps=LOG_EVERY,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    clock = Clock()
    trainer.add_callback(Steps(clock))
    trainer.add_callback(Timed(LedgerCallback(trainer), clock))
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return clock


def shares(clock: Clock) -> dict[str, float]:
    """Medians over the steps, in seconds, and as shares of the median step."""
    steps = clock.steps[LEFT_OUT:]
    step = statistics.median(steps)
    found = {"step": step, "steps": float(len(steps))}
    counted = list(zip(clock.inside, clock.logged, strict=True))[LEFT_OUT : LEFT_OUT + len(steps)]
    found["plain"] = statistics.median(seconds for seconds, logged in counted if not logged)
    # the figures of a log are sent when the next step begins, so that two steps have their share of it
    of_logs = [seconds for seconds, logged in counted if logged]
    found["logging"] = statistics.median(map(sum, zip(of_logs[::2], of_logs[1::2], strict=False)))
    return found | {f"{name}_share": found[name] / step for name in ("plain", "logging")}


def parts(ids: torch.Tensor, calls: int) -> dict[str, float]:
    """Seconds of one call: counting a step, seeing a pass's tokens, and all figures."""
    passes, module = Passes(), torch.nn.Identity()
    with Ledger(flops_per_token=modelled(1e9, "CostModel")) as ledger:
        add = each(lambda: ledger.add(tokens=512), calls)
        figures = each(ledger.figures, calls // 20)
        without = each(lambda: module(ids), calls)
        passes.attach(module)
        seeing = each(lambda: module(ids), calls) - without
    return {"add": add, "seeing": seeing, "figures": figures}


def each(call: Callable[[], Any], calls: int) -> float:
    """Seconds of one of so many calls; the quickest of five loops, since other processes only make it slower."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        seconds.append((time.perf_counter() - start) / calls)
    return min(seconds)


if __name__ == "__main__":
    main()
