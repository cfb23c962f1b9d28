"""What does a measurement cost? Time and peak memory beside ordinary passes of the same batch.

    python -m benchmarks measure [--length 200] [--rounds 5] [--dtype float32] [--arms NAME ...]

Time: every round runs all arms in turn, and arms compare by the median over rounds of their ratio within a round, which
a machine of drifting speed does not distort. Memory: every arm runs once more in a process of its own, whose peak above
what it held before the pass is read from the operating system, or from CUDA's allocator. The arm `opacus` needs
`pip install --no-deps opacus==1.6.0 opt_einsum`, and is left out without them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from importlib import util
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from peft_blueprint import measure_influence
from peft_blueprint.measure import Objective, find_submodules

from . import setup


Batch = dict[str, Tensor]
Arm = Callable[[], Any]

FLOOR = "activation backward"
STEP = "all-linear LoRA step"
SLOW = ("one example at a time",)  # run when named
WEIGHT_GRADIENTS = ("full backward", "opacus")  # which 4-bit weights cannot take
QUICK = {"length": 16, "examples": 2, "rounds": 1, "arms": [STEP, "auto (the default)"]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--length", type=int, default=200, help="tokens of an example")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", help="or bfloat16, nf4")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], help="by default all but the slow and the unavailable")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # measure one arm's memory, in a process of its own


def main(options: argparse.Namespace) -> None:
    """Measure and print a table."""
    if options.peak_of:
        print(json.dumps(setup.peak_bytes(ARMS[options.peak_of](*setup.one_batch(options)))))
        return
    left_out = {*SLOW, *(WEIGHT_GRADIENTS if options.dtype == "nf4" else ())}
    left_out |= set() if util.find_spec("opacus") else {"opacus"}
    names = options.arms or [name for name in ARMS if name not in left_out]
    names = [FLOOR, *(name for name in names if name != FLOOR)]
    arms = {name: ARMS[name](*setup.one_batch(options)) for name in names}
    seconds = setup.seconds_per_round(arms, options.rounds)
    if {"exact", "opacus"} <= arms.keys():
        ours, theirs = arms["exact"]().norms, arms["opacus"]().cpu()
        print(f"exact norms and Opacus' differ by {(theirs / ours - 1).abs().max():.1e} at most")
    arms.clear()
    peaks = setup.peaks_in_own_processes(options, names)
    print(f"{options.examples} x {options.length} tokens, {options.dtype}, {setup.device_name()}\n")
    references = [FLOOR, *([STEP] if STEP in names else [])]
    columns = [column for of in references for column in (f"time / {of}", "memory")]
    setup.print_table(["arm", "s", "MiB", *columns], (_row(name, references, seconds, peaks) for name in names))


def _row(name: str, references: list[str], seconds: dict[str, list[float]], peaks: dict[str, int]) -> list[str]:
    cells = [name, f"{statistics.median(seconds[name]):.3f}", f"{peaks[name] / 2**20:.0f}"]
    for reference in references:
        ratios = setup.ratios(seconds, name, reference)
        cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        cells.append(f"{peaks[name] / peaks[reference]:.3f}" if peaks[reference] else "–")
    return cells


# ---- arms


def _forward(model: Any, batch: Batch) -> Arm:
    """The floor of anything that looks at the data."""
    return torch.no_grad()(lambda: model(**batch))


def _activation_backward(model: Any, batch: Batch) -> Arm:
    """A forward and a backward pass through a frozen model: the floor of anything that trains its first layer."""
    model.requires_grad_(False)

    def arm() -> None:
        embeddings = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()

    return arm


def _full_backward(model: Any, batch: Batch) -> Arm:
    """One ordinary forward and full backward pass."""
    model.requires_grad_(True)

    def arm() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    return arm


def _lora_step(model: Any, batch: Batch) -> Arm:
    """One training step of LoRA, r = 16, on every linear layer, with AdamW."""
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-5)
    return lambda: setup.train_step(adapted, optimizer, batch)


def _measuring(**options: Any) -> Callable[[Any, Batch], Arm]:
    """Every example's gradient norm in every submodule, with the mean gradients' sketches."""

    def prepared(model: Any, batch: Batch) -> Arm:
        model.requires_grad_(False)
        return lambda: measure_influence(model, [batch], progress=False, **options)

    return prepared


def _one_example_at_a_time(model: Any, batch: Batch) -> Arm:
    """The same norms by autograd, without hooks."""
    model.requires_grad_(True)
    names = [submodule.name for submodule in find_submodules(model)]
    objective = Objective(model)

    def arm() -> None:
        for i in range(len(batch["labels"])):
            losses, _ = objective.losses({key: value[i : i + 1] for key, value in batch.items()})
            losses.sum().backward()
            [model.get_submodule(name).weight.grad.norm() for name in names]
            model.zero_grad(set_to_none=True)

    return arm


def _opacus(model: Any, batch: Batch) -> Arm:
    """The same norms by the hooks of Opacus' ghost clipping (its first pass; nothing is clipped)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opacus imports what torch has deprecated
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

    names = [submodule.name for submodule in find_submodules(model)]
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    model.get_input_embeddings().register_forward_hook(lambda *arguments: arguments[2].requires_grad_())
    model.train()
    hooked = GradSampleModuleFastGradientClipping(model, strict=False, loss_reduction="sum", max_grad_norm=1.0)
    objective = Objective(hooked._module)

    def arm() -> Tensor:
        losses, _ = objective.losses(batch)
        losses.sum().backward()
        norms = torch.stack([model.get_submodule(name).weight._norm_sample for name in names])
        model.zero_grad(set_to_none=True)
        return norms

    return arm


ARMS: dict[str, Callable[[Any, Batch], Arm]] = {
    "forward": _forward,
    FLOOR: _activation_backward,
    "full backward": _full_backward,
    STEP: _lora_step,
    "auto (the default)": _measuring(),
    "sketch, s = 16": _measuring(method="sketch", sketch_size=16),
    "sketch, s = 32": _measuring(method="sketch", sketch_size=32),
    "sketch, s = 64": _measuring(method="sketch", sketch_size=64),
    "exact": _measuring(method="exact"),
    "opacus": _opacus,
    "one example at a time": _one_example_at_a_time,
}
