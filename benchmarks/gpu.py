"""What does a training step take on this device? Measured beside predicted, on a random model of a real shape.

    python -m benchmarks gpu [--shape 1b] [--dtype bfloat16 | nf4] [--examples 4] [--length 2048] [--prompt-share 0.84]

Arms: LoRA on all linear layers, the default placement, the upper half, the upper half with its frozen prefix cached, and
activated LoRA with answer-only steps, plain and with cached prompts. Every arm has the device to itself; a step's time is
the median over rounds (on a CPU of the process's own time), and its peak memory counts weights. Prints the time constant
that fits these times best, and the energy of all steps as the meter reads it. Written for `benchmarks/on_gpu.sh`; weights
are random, so nothing is downloaded, and losses mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_blueprint.place import (
    FLOPS_PER_BYTE,
    BlueprintConfig,
    Cost,
    CostModel,
    Placement,
    Structure,
    Workload,
    plan_placement,
)
from peft_blueprint.runs import Ledger
from peft_blueprint.testing import quantize
from peft_blueprint.train import PromptCache, answer_only, cache_frozen_prefix, checkpoint_above

from . import setup
from .cost import best_constant


RANK = 16
REFERENCE = "all-linear"
ARMS = (REFERENCE, "default placement", "upper half", "upper half, cached", "answer only", "answer only, cached")
INVOCATION = (7, 8)  # any two tokens
SHAPES = {  # hidden size, feed-forward size, layers, heads, heads with keys and values, tokens
    "tiny": (64, 96, 4, 4, 2, 97),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1b": (2048, 8192, 16, 32, 8, 32000),
    "7b": (4096, 14336, 32, 32, 8, 32000),
}
QUICK = {"shape": "tiny", "dtype": "float32", "examples": 2, "length": 24, "rounds": 1}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--shape", choices=[*SHAPES], default="1b")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float32 or nf4")
    parser.add_argument("--examples", type=int, default=4, help="of a batch")
    parser.add_argument("--length", type=int, default=2048, help="tokens of an example")
    parser.add_argument("--prompt-share", type=float, default=0.84, help="of the tokens")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of every arm")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--optimizer", choices=["adamw", "paged_adamw_8bit"], default="adamw")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))


def main(options: argparse.Namespace) -> None:
    """Measure, predict, and print a table."""
    torch.manual_seed(0)
    structure = Structure.of(make_model(options, "meta"))
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int | None] = {}
    with Ledger() as ledger:
        for name in options.arms:
            seconds[name], peaks[name] = measure_arm(name, options)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            setup.say(f"{name}: {statistics.median(seconds[name]):.4f} s")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    predicted = {name: predict_arm(name, options, structure) for name in options.arms}
    costs = CostModel(structure, _workload(options))
    reference = medians.get(REFERENCE)
    checkpointing = ", gradient checkpointing" * options.checkpointing
    print(
        f"{options.shape} shape, {options.examples} x {options.length} tokens, {options.dtype}{checkpointing}, "
        f"{options.optimizer}, {setup.device_name()}\n"
    )
    rows = [
        [
            name,
            f"{medians[name]:.4f}",
            "–" if reference is None else f"{medians[name] / reference:.2f}",
            f"{costs.time_ratio(cost):.2f}",
            "–" if peaks[name] is None else f"{(peaks[name] or 0) / 2**20:.0f}",
            f"{cost.bytes / 2**20:.0f}",
        ]
        for name, cost in predicted.items()
    ]
    setup.print_table(["arm", "seconds", "time / all-linear", "predicted", "peak MiB", "predicted MiB"], rows)
    if reference is not None and len(medians) > 1:
        constant = best_constant(predicted, {name: value / reference for name, value in medians.items()})
        print(f"\nFLOPs per byte moved that fit these times best: {constant:.1f}")
        print(f"(the cost model has {FLOPS_PER_BYTE[setup.device()]:g})")
    energy = ledger.quantities()["energy_joules"]
    told = "not measured" if energy.value is None else f"{energy.value:.0f} J"
    print(f"Energy of all arms, building the models included: {told} ({energy.source})")


def make_model(options: argparse.Namespace, device: str) -> Any:
    """Make a random Llama of the shape on a device; with dtype nf4, quantized unless that is meta."""
    hidden, feed_forward, layers, heads, grouped, words = SHAPES[options.shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=grouped,
        vocab_size=words,
    )
    dtype = torch.float32 if options.dtype == "float32" else torch.bfloat16
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    model.config.use_cache = False
    return quantize(model, "nf4", device=device) if options.dtype == "nf4" and device != "meta" else model


def measure_arm(name: str, options: argparse.Namespace) -> tuple[list[float], int | None]:
    """Return the seconds of an arm's steps after a first one, and the peak memory of a step in bytes."""
    base = make_model(options, setup.device())
    held = 0 if torch.cuda.is_available() else setup.resident_bytes()
    model = get_peft_model(base, _config(name, options, base)).train()
    if options.checkpointing:
        checkpoint_above(model)
    if name.startswith("answer only"):
        answer_only(model, cache=PromptCache("8GiB") if "cached" in name else None)
    optimizer = _optimizer(model, options)
    batch = _batch(options)
    seconds = []
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time  # a busy machine distorts the former

    def step() -> None:
        setup.train_step(model, optimizer, batch)  # reads the loss, and so waits for the device

    cache = cache_frozen_prefix(model, budget="4GiB") if name.endswith("half, cached") else None
    for i in range(options.rounds + 2):  # the first step checks and fills caches, the second warms up
        before = clock()
        step()
        if i > 1:
            seconds.append(clock() - before)
    peak = setup.peak_bytes(step, held)
    if cache is not None:
        cache.close()
    # of a process that has loaded other models, the peak means little
    return seconds, peak if torch.cuda.is_available() else None


def predict_arm(name: str, options: argparse.Namespace, structure: Structure) -> Cost:
    """Predict the cost of an arm's step; with a cache of a step after the first epoch."""
    load = replace(
        _workload(options),
        answer_only=name.startswith("answer only"),
        epochs=10**6 if "cached" in name else 1,
    )
    costs = CostModel(structure, load)
    if name == "default placement":
        placement = _placement(options)
        return costs.cost({one: placement.ranks.get(one, placement.rank or RANK) for one in placement.lora})
    if name.startswith("upper half"):
        return costs.cost(dict.fromkeys(_upper_half(structure), RANK))
    return costs.all_linear()


def _workload(options: argparse.Namespace) -> Workload:
    return Workload(
        batch_size=options.examples,
        length=options.length,
        prompt=_prompt(options),
        dtype="float32" if options.dtype == "float32" else "bfloat16",
        quantization="nf4" if options.dtype == "nf4" else None,
        checkpointing=options.checkpointing,
        optimizer=options.optimizer,
        rank=RANK,
        device=setup.device(),
        padded=False,
        input_gradients=False,
    )


def _prompt(options: argparse.Namespace) -> int:
    """Return the tokens before the invocation tokens."""
    return max(1, round(options.prompt_share * options.length) - len(INVOCATION))


def _batch(options: argparse.Namespace) -> dict[str, Tensor]:
    """Make rows of random tokens that differ, each a prompt, the invocation tokens and an answer."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, SHAPES[options.shape][-1], (options.examples, options.length), generator=generator)
    start = _prompt(options)
    ids[:, start : start + len(INVOCATION)] = torch.tensor(INVOCATION)
    labels = ids.clone()
    labels[:, : start + len(INVOCATION)] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {key: value.to(setup.device()) for key, value in batch.items()}


def _placement(options: argparse.Namespace) -> Placement:
    return plan_placement(None, make_model(options, "meta"), workload=_workload(options), fraction=1 / 7)


def _upper_half(structure: Structure) -> list[str]:
    depths = {part.name: part.depth for part in structure.parts}
    half = (max(depth for depth in depths.values() if depth is not None) + 1) // 2
    return [name for name in structure.adaptable if (depths[name] or 0) >= half]


def _config(name: str, options: argparse.Namespace, base: nn.Module) -> LoraConfig:
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "lora_alpha": 2 * RANK}
    if name == "default placement":
        return BlueprintConfig(placement=_placement(options), **common)
    targets: Any = _upper_half(Structure.of(base)) if name.startswith("upper half") else "all-linear"
    invocation = list(INVOCATION) if name.startswith("answer only") else None
    return LoraConfig(r=RANK, target_modules=targets, alora_invocation_tokens=invocation, **common)


def _optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(trained, 1e-4, fused=True)
    from bitsandbytes.optim import PagedAdamW8bit

    return PagedAdamW8bit(trained, 1e-4)
