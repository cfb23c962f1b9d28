"""What a measurement costs: time and peak memory beside ordinary passes of the same batch, in the same run.

    python recipes/benchmark_measure.py [--length 200] [--rounds 5] [--dtype float32] [--data FILE.jsonl]

Time: every round runs all arms in turn; the ratio of two arms is the median over rounds of their ratio within a round,
so that a machine whose speed drifts does not decide. Memory: every arm runs once more, in a process of its own, whose
peak above what it held before the pass is read from the operating system.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import smollm2
import stdlib_docs
from peft_blueprint import measure_influence
from peft_blueprint.ledger import ledger
from peft_blueprint.losses import per_example_losses
from peft_blueprint.recipe import load_model
from peft_blueprint.submodules import find_submodules


Batch = dict[str, Tensor]


def main() -> None:
    """Parse, run, print a table and, with --json, the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=200, help="tokens of an example")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON too")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # measure one arm's memory, in a process of its own
    options = parser.parse_args()

    model, batch = prepare(options.length, options.examples, options.dtype)
    if options.arm:
        print(json.dumps(peak_of(model, batch, options.arm)))
        return
    arms = list(ARMS)
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for arm in arms:
        ARMS[arm](model, batch)  # warm up
    for _ in range(options.rounds):
        for arm in arms:
            start = time.perf_counter()
            ARMS[arm](model, batch)
            seconds[arm].append(time.perf_counter() - start)
    command = [sys.executable, __file__, "--length", str(options.length), "--examples", str(options.examples)]
    peaks = {
        arm: json.loads(
            subprocess.run(
                [*command, "--dtype", options.dtype, "--arm", arm], check=True, stdout=subprocess.PIPE, text=True
            ).stdout
        )
        for arm in arms
    }
    reference = "full backward"
    print(f"{options.examples} x {batch['input_ids'].shape[1]} tokens, {options.dtype}, {options.rounds} rounds")
    print(f"{'arm':<34}{'seconds':>9}{'time ratio':>12}{'peak MiB':>10}{'peak ratio':>12}")
    results: dict[str, Any] = {}
    for arm in arms:
        ratios = [a / b for a, b in zip(seconds[arm], seconds[reference], strict=True)]
        results[arm] = {
            "seconds": statistics.median(seconds[arm]),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "peak_mib": peaks[arm] / 2**20,
            "peak_ratio": peaks[arm] / peaks[reference],
        }
        r = results[arm]
        print(f"{arm:<34}{r['seconds']:>9.2f}{r['ratio']:>12.3f}{r['peak_mib']:>10.0f}{r['peak_ratio']:>12.3f}")
    if options.json:
        print(json.dumps(results))


def prepare(length: int, examples: int, dtype: str) -> tuple[torch.nn.Module, Batch]:
    """SmolLM2-135M and one batch of real text in which every token is a target: the hardest case for the logits."""
    model, tokenizer = load_model(str(smollm2.prepare(Path(smollm2.FOLDER))), dtype)
    text = "\n\n".join(e["prompt"] + e["completion"] for e in stdlib_docs.examples("train"))
    ids = torch.tensor(tokenizer(text)["input_ids"][: length * examples]).view(examples, length)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def forward_only(model: torch.nn.Module, batch: Batch) -> None:
    """The floor of anything that looks at the data."""
    with torch.no_grad():
        model(**batch)


def activation_backward(model: torch.nn.Module, batch: Batch) -> None:
    """A forward and a backward pass through a frozen model: the floor of anything that trains its first layer."""
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()  # type: ignore[operator]
    model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()


def full_backward(model: torch.nn.Module, batch: Batch) -> None:
    """One ordinary forward and full backward pass: the reference."""
    model.requires_grad_(True)
    model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)


def all_norms(model: torch.nn.Module, batch: Batch) -> None:
    """Every example's gradient norm in every submodule, with the mean gradients' sketches."""
    model.requires_grad_(False)
    measure_influence(model, [batch], progress=False)


def one_example_at_a_time(model: torch.nn.Module, batch: Batch) -> None:
    """The same norms by autograd, the way one would without taps."""
    model.requires_grad_(True)
    names = [submodule.name for submodule in find_submodules(model)]
    for i in range(len(batch["labels"])):
        losses, _ = per_example_losses(model, {key: value[i : i + 1] for key, value in batch.items()})
        losses.sum().backward()
        [model.get_submodule(name).weight.grad.norm() for name in names]  # type: ignore[union-attr, operator]
        model.zero_grad(set_to_none=True)


ARMS: dict[str, Callable[[torch.nn.Module, Batch], None]] = {
    "forward": forward_only,
    "activation backward": activation_backward,
    "full backward": full_backward,
    "all norms (measure_influence)": all_norms,
    "all norms, one example at a time": one_example_at_a_time,
}


def peak_of(model: torch.nn.Module, batch: Batch, arm: str) -> int:
    """Bytes above what was held before, at the peak of one pass."""
    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
    with ledger() as spent:
        ARMS[arm](model, batch)
    if spent.peak_bytes is None:
        raise SystemExit("Peak memory cannot be measured on this machine: it needs Linux or CUDA.")
    return spent.peak_bytes - before


if __name__ == "__main__":
    main()
