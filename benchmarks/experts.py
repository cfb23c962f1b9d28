"""What does measuring every expert cost? CPU time beside frozen forward and backward passes of the same batches.

    python -m benchmarks experts [--family qwen3_moe] [--hidden 768] [--inner 384] [--experts 32] [--top-k 4]

A random model of the family's structure runs four batches: forward and backward with all weights frozen, then the
same measured. Every round runs all arms in turn, and arms compare by the median over rounds of their ratio within a
round.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_blueprint import measure_influence, testing
from peft_blueprint.measure import Checks

from . import setup


FLOOR = "frozen forward and backward"
FAMILIES = {"qwen3_moe": testing.tiny_qwen3_moe, "mixtral": testing.tiny_mixtral, "olmoe": testing.tiny_olmoe}
COUNTS = {"mixtral": "num_local_experts"}
INNER = {"qwen3_moe": "moe_intermediate_size"}
QUICK = {"hidden": 32, "inner": 24, "experts": 4, "top_k": 2, "length": 16, "examples": 2, "rounds": 1, "batches": 1}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--family", choices=[*FAMILIES], default="qwen3_moe")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=768, help="width of the residual stream")
    parser.add_argument("--inner", type=int, default=384, help="width inside an expert")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4, help="experts that a token visits")
    parser.add_argument("--length", type=int, default=256, help="tokens of an example")
    parser.add_argument("--examples", type=int, default=8, help="of a batch")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)


def main(options: argparse.Namespace) -> None:
    """Measure and print a table."""
    model = _model(options)
    batches = testing.toy_batches(options.examples * options.batches, options.length, options.examples, "none")
    arms = {
        FLOOR: _passes(model, batches),
        "experts": _measuring(model, batches, experts=True),
        "experts, exact norms": _measuring(model, batches, experts=True, method="exact"),
        "attention alone": _measuring(model, batches, submodules=_attention(model), projection_size=0),
    }
    seconds = setup.seconds_per_round(arms, options.rounds, cpu_time=True)
    shape = f"{options.layers} layers, {options.experts} experts of {options.hidden} x {options.inner}, top {options.top_k}"
    print(f"{options.family}: {shape}; {options.batches} batches of {options.examples} x {options.length} tokens\n")
    rows = []
    for name in arms:
        ratios = setup.ratios(seconds, name, FLOOR)
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        rows.append([name, f"{statistics.median(seconds[name]):.2f}", ratio])
    setup.print_table(["arm", "CPU s", f"time / {FLOOR}"], rows)


def _model(options: argparse.Namespace) -> Any:
    sizes = {
        COUNTS.get(options.family, "num_experts"): options.experts,
        INNER.get(options.family, "intermediate_size"): options.inner,
        "num_experts_per_tok": options.top_k,
        "hidden_size": options.hidden,
        "num_attention_heads": max(1, options.hidden // 64),
        "num_key_value_heads": max(1, options.hidden // 256),
    }
    if options.family == "qwen3_moe":
        sizes["head_dim"] = min(64, options.hidden)
    return FAMILIES[options.family](options.layers, **sizes)


def _attention(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "attn" in name]


def _passes(model: Any, batches: list[dict[str, Tensor]]) -> Callable[[], Any]:
    model.requires_grad_(False)

    def arm() -> None:
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "input_ids"}
            embeddings = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
            model(inputs_embeds=embeddings, use_cache=False, **inputs).loss.backward()

    return arm


def _measuring(model: Any, batches: list[dict[str, Tensor]], **options: Any) -> Callable[[], Any]:
    checks = Checks()
    measure_influence(model, batches[:1], checks=checks, progress=False, **options)  # what the first batch shows
    return lambda: measure_influence(model, batches, checks=checks, progress=False, **options)
