"""What placements cost beside what the cost model predicts: step time and peak memory of SmolLM2-135M.

    python -m benchmarks cost [--batch-size 8] [--length 128] [--rounds 3] [--arms NAME ...] [--checkpointing]

Time: every round takes one step of every arm in turn; the ratio to all-linear LoRA is the median over rounds of the
ratio within a round, so that a machine whose speed drifts does not decide; with --cpu-time and OMP_NUM_THREADS=1 a busy
machine does not either. Memory: every arm once more in a process of its own: the peak of a second step above what the
loaded model held, beside the predicted bytes without the weights. On a CPU that is resident memory, and glibc is told
(by MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_) to give back at once what is freed, so that what is resident is
what is alive; on a GPU it is CUDA's allocator's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_blueprint.measure import find_submodules
from peft_blueprint.place import FLOPS_PER_BYTE, Cost, CostModel, Structure, Workload
from peft_blueprint.runs import Ledger

from .measure import device_name, prepare


Names = list[str]

REFERENCE = "all-linear"
FLOOR = "floor"  # a forward and backward through everything, of which nothing is trained
RANK = 16
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def layers(low: int, high: int) -> Callable[[nn.Module], Names]:
    """Every linear layer of the blocks from `low` to before `high`."""
    return lambda model: [s.name for s in find_submodules(model) if s.depth is not None and low <= s.depth < high]


def every(step: int, first: int = 0) -> Callable[[nn.Module], Names]:
    """One linear layer in so many, over depth and kinds."""
    return lambda model: [s.name for s in find_submodules(model)][first::step]


PLACEMENTS: dict[str, Callable[[nn.Module], Names]] = {
    REFERENCE: every(1),
    FLOOR: lambda model: [],
    "a fifth, spread": every(5),
    "ten, spread": every(21, 10),
    "upper half": layers(15, 30),
    "last six layers": layers(24, 30),
    "middle six layers": layers(12, 18),
    "attention only": lambda model: [s.name for s in find_submodules(model) if "self_attn" in s.name],
}


def main() -> None:
    """Parse, run, print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of an example")
    parser.add_argument("--rounds", type=int, default=3, help="of time; 0 measures memory alone")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the process's own time, where a machine is shared"
    )
    parser.add_argument("--arms", nargs="+", choices=[*PLACEMENTS], default=[*PLACEMENTS])
    parser.add_argument("--no-memory", action="store_true", help="measure time alone")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # one arm's memory, in a process of its own
    options = parser.parse_args()

    if options.peak_of:
        print(json.dumps(peak_of(options.peak_of, options)))
        return
    names = [REFERENCE, *(name for name in options.arms if name != REFERENCE)]
    model, _ = prepare(options.length, options.batch_size, options.dtype)
    load = workload(options)
    costs = CostModel(Structure.of(model), load)
    predicted = {
        name: costs.floor() if name == FLOOR else costs.cost(dict.fromkeys(PLACEMENTS[name](model), RANK))
        for name in names
    }
    del model
    ratios = measure_times(names, options) if options.rounds else {}
    peaks = {} if options.no_memory else {name: measured_peak(name) for name in names}

    print(
        f"{options.batch_size} x {options.length} tokens, {options.dtype}, {options.rounds} rounds, "
        f"{'gradient checkpointing, ' if options.checkpointing else ''}{device_name()}\n"
    )
    print("| placement | adapters | lowest | time / all-linear | predicted | error | MiB | predicted | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        cost = predicted[name]
        adapters = cost.trainable // max(1, predicted[REFERENCE].trainable // 210)
        line = f"| {name} | {adapters} | {'–' if cost.lowest is None else cost.lowest} | "
        line += beside(statistics.median(ratios[name]) if ratios else None, costs.time_ratio(cost), "{:.3f}")
        line += beside(peaks.get(name), (cost.bytes - cost.weights) / 2**20, "{:.0f}")
        print(line)
    if ratios:
        print(f"\nFLOPs per byte moved that fit these times best: {best_constant(predicted, ratios):.1f}")
        print(f"(the cost model has {FLOPS_PER_BYTE[load.device]})")


def beside(measured: float | None, predicted: float, form: str) -> str:
    """Three cells: measured, predicted, and how far the prediction is off."""
    if measured is None:
        return f"– | {form.format(predicted)} | – | "
    return f"{form.format(measured)} | {form.format(predicted)} | {predicted / measured - 1:+.1%} | "


def workload(options: argparse.Namespace) -> Workload:
    """The step that is run here: no padding, and input gradients where transformers asks for them."""
    return Workload(
        batch_size=options.batch_size,
        length=options.length,
        dtype=options.dtype,
        checkpointing=options.checkpointing,
        rank=RANK,
        padded=False,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def step_of(name: str, model: nn.Module, batch: dict[str, Tensor], checkpointing: bool) -> Callable[[], None]:
    """One training step of a placement, or the floor of all of them."""
    model.train()
    model.config.use_cache = False  # type: ignore[union-attr]
    model.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    names = PLACEMENTS[name](model)
    if not names:
        model.enable_input_require_grads()  # type: ignore[operator]
        return lambda: model(**batch).loss.backward()
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> None:
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_times(names: Names, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a step of every arm over those of all-linear's, in every round."""
    steps = {}
    for name in names:
        model, batch = prepare(options.length, options.batch_size, options.dtype)
        steps[name] = step_of(name, model, batch, options.checkpointing)
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for i in range(options.rounds + 1):
        seconds = {}
        for name, step in steps.items():
            before = time.process_time()
            with Ledger() as spent:
                step()
            seconds[name] = time.process_time() - before if options.cpu_time else spent.seconds
        for name in names:
            if i:  # the first round warms up
                ratios[name].append(seconds[name] / seconds[REFERENCE])
        print(f"round {i} of {options.rounds}: {seconds[REFERENCE]:.2f} s all-linear", file=sys.stderr)
    return ratios


def measured_peak(name: str) -> float:
    """MiB at the peak of an arm's steps above the loaded model, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | MALLOC)
    print(f"memory of {name}", file=sys.stderr)
    return float(json.loads(run.stdout))


def peak_of(name: str, options: argparse.Namespace) -> float:
    """MiB, as `measured_peak`, in this process."""
    model, batch = prepare(options.length, options.batch_size, options.dtype)
    with torch.no_grad():
        model(
            **{key: value[:1, :8] for key, value in batch.items()}
        )  # the libraries' own memory is there from here on
    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else resident()
    step = step_of(name, model, batch, options.checkpointing)
    step()
    with Ledger() as spent:
        step()
    if spent.peak_bytes is None:
        raise SystemExit("Peak memory cannot be measured on this machine: it needs Linux or CUDA.")
    return (spent.peak_bytes - held) / 2**20


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def best_constant(predicted: dict[str, Cost], ratios: dict[str, list[float]]) -> float:
    """The FLOPs per byte moved with the smallest sum of squared relative errors of time ratios."""
    measured = {name: statistics.median(values) for name, values in ratios.items()}
    reference = predicted[REFERENCE]

    def error(constant: float) -> float:
        whole = reference.flops + constant * reference.moved
        return sum(
            ((cost.flops + constant * cost.moved) / whole / measured[name] - 1) ** 2
            for name, cost in predicted.items()
        )

    return float(min(np.linspace(0.0, 200.0, 2001), key=error))


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    main()
