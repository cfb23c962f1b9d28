"""How well does the cost model predict? Step time and peak memory of placements beside the predictions.

    python -m benchmarks cost [--examples 8] [--length 128] [--rounds 3] [--arms NAME ...] [--checkpointing]

Time: the ratio to all-linear LoRA is the median over rounds of the ratio within a round; with --cpu-time and
OMP_NUM_THREADS=1 a busy machine does not distort it. Memory: every arm once more in a process of its own, the peak of a
second step above what the loaded model held, beside the predicted bytes without the weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from peft_blueprint.measure import find_submodules
from peft_blueprint.place import FLOPS_PER_BYTE, Cost, CostModel, Structure, Workload

from . import setup


Names = list[str]

REFERENCE = "all-linear"
FLOOR = "floor"  # a forward and backward through everything, of which nothing is trained
RANK = 16
QUICK = {"examples": 2, "length": 16, "rounds": 1, "arms": [REFERENCE, "upper half"]}


def _layers(low: float, high: float) -> Callable[[Any], Names]:
    """Select every linear layer between two shares of the depth."""

    def select(model: Any) -> Names:
        found = [s for s in find_submodules(model) if s.depth is not None]
        depth = 1 + max(s.depth or 0 for s in found)
        return [s.name for s in found if low <= (s.depth or 0) / depth < high]

    return select


def _every(step: int, first: int = 0) -> Callable[[Any], Names]:
    """Select one linear layer in every `step`, over depth and kinds."""
    return lambda model: [s.name for s in find_submodules(model)][first::step]


PLACEMENTS: dict[str, Callable[[Any], Names]] = {
    REFERENCE: _every(1),
    FLOOR: lambda model: [],
    "a fifth, spread": _every(5),
    "ten, spread": _every(21, 10),
    "upper half": _layers(0.5, 1),
    "last six layers": _layers(0.8, 1),
    "middle six layers": _layers(0.4, 0.6),
    "attention only": lambda model: [s.name for s in find_submodules(model) if "self_attn" in s.name],
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--examples", type=int, default=8, help="of a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of an example")
    parser.add_argument("--rounds", type=int, default=3, help="of time; 0 measures memory alone")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--cpu-time", action="store_true", help="count the process's own time")
    parser.add_argument("--arms", nargs="+", choices=[*PLACEMENTS], default=[*PLACEMENTS])
    parser.add_argument("--no-memory", action="store_true", help="measure time alone")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # one arm's memory, in a process of its own


def main(options: argparse.Namespace) -> None:
    """Measure, predict, and print a table."""
    if options.peak_of:
        print(json.dumps(_peak_of(options.peak_of, options)))
        return
    names = [REFERENCE, *(name for name in options.arms if name != REFERENCE)]
    model, _ = setup.one_batch(options)
    workload = Workload(
        batch_size=options.examples,
        length=options.length,
        dtype=options.dtype,
        checkpointing=options.checkpointing,
        rank=RANK,
        padded=False,
        device=setup.device(),
    )
    costs = CostModel(Structure.of(model), workload)
    predicted = {
        name: costs.floor() if name == FLOOR else costs.cost(dict.fromkeys(PLACEMENTS[name](model), RANK))
        for name in names
    }
    counts = {name: len(PLACEMENTS[name](model)) for name in names}
    del model
    ratios: dict[str, float] = {}
    if options.rounds:
        steps = {name: _step_of(name, *setup.one_batch(options), options.checkpointing) for name in names}
        seconds = setup.seconds_per_round(steps, options.rounds, options.cpu_time)
        ratios = {name: statistics.median(setup.ratios(seconds, name, REFERENCE)) for name in names}
        del steps
    peaks = {} if options.no_memory else setup.peaks_in_own_processes(options, names)
    told = "gradient checkpointing, " if options.checkpointing else ""
    print(f"{options.examples} x {options.length} tokens, {options.dtype}, {told}{setup.device_name()}\n")
    columns = [
        "placement",
        "adapters",
        "lowest",
        "time / all-linear",
        "predicted",
        "error",
        "MiB",
        "predicted",
        "error",
    ]
    rows = []
    for name, cost in predicted.items():
        time = _beside(ratios.get(name), costs.time_ratio(cost), ".3f")
        peak = peaks[name] / 2**20 if name in peaks else None
        memory = _beside(peak, (cost.bytes - cost.weights) / 2**20, ".0f")
        rows.append([name, counts[name], "–" if cost.lowest is None else cost.lowest, *time, *memory])
    setup.print_table(columns, rows)
    if ratios:
        print(f"\nFLOPs per byte moved that fit these times best: {best_constant(predicted, ratios):.1f}")
        print(f"(the cost model has {FLOPS_PER_BYTE[workload.device]})")


def _beside(measured: float | None, predicted: float, form: str) -> list[str]:
    """Return three cells: measured, predicted, and the prediction's error."""
    if measured is None:
        return ["–", format(predicted, form), "–"]
    return [format(measured, form), format(predicted, form), f"{predicted / measured - 1:+.1%}" if measured else "–"]


def _step_of(name: str, model: Any, batch: dict[str, Tensor], checkpointing: bool) -> Callable[[], Any]:
    """Return one training step of a placement, or the floor of all of them."""
    model.train()
    model.config.use_cache = False
    model.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable()
    names = PLACEMENTS[name](model)
    if not names:
        model.enable_input_require_grads()
        return lambda: model(**batch).loss.backward()
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-5, fused=True)
    return lambda: setup.train_step(adapted, optimizer, batch)


def _peak_of(name: str, options: argparse.Namespace) -> int:
    """Return the bytes of a second step's peak above what the loaded model held."""
    model, batch = setup.one_batch(options)
    with torch.no_grad():  # the libraries' own memory is there from here on
        model(**{key: value[:1, :8] for key, value in batch.items()})
    held = setup.resident_bytes()
    step = _step_of(name, model, batch, options.checkpointing)
    step()
    return setup.peak_bytes(step, held)


def best_constant(predicted: Mapping[str, Cost], measured: Mapping[str, float]) -> float:
    """Return the FLOPs per byte moved with the smallest sum of squared relative errors of time ratios."""
    reference = predicted[REFERENCE]

    def error(constant: float) -> float:
        whole = reference.flops + constant * reference.moved
        return sum(
            ((cost.flops + constant * cost.moved) / whole / measured[name] - 1) ** 2
            for name, cost in predicted.items()
        )

    return float(min(np.linspace(0.0, 1000.0, 10001), key=error))
