"""What a measurement costs: time and peak memory beside ordinary passes of the same batch, in the same run.

    python recipes/measure.py [--length 200] [--rounds 5] [--dtype float32] [--arms NAME ...]

Time: every round runs all arms in turn; the ratio of two arms is the median over rounds of their ratio within a round,
so that a machine whose speed drifts does not decide. Memory: every arm runs once more, in a process of its own, whose
peak above what it held before the pass is read from the operating system (from CUDA's allocator on a GPU). The arm
`opacus` needs `pip install --no-deps opacus==1.6.0 opt_einsum`, and is left out without.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_blueprint import measure_influence
from peft_blueprint.measure import find_submodules, load_model, per_example_losses
from peft_blueprint.runs import Ledger
from recipes import smollm2, stdlib_docs


Batch = dict[str, Tensor]
Arm = Callable[[], object]

FLOOR = "activation backward"
STEP = "all-linear LoRA step"
SLOW = ("one example at a time",)  # run when named
WEIGHT_GRADIENTS = ("full backward", "opacus")  # which 4-bit weights cannot take


def main() -> None:
    """Parse, run, print a table and, with --json, the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=200, help="tokens of an example")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], help="by default all but the slow and the unavailable")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON too")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # measure one arm's memory, in a process of its own
    options = parser.parse_args()
    shape = ["--length", str(options.length), "--examples", str(options.examples), "--dtype", options.dtype]

    if options.peak_of:
        print(json.dumps(peak_of(ARMS[options.peak_of](*prepare(options.length, options.examples, options.dtype)))))
        return
    left_out = {*SLOW, *(WEIGHT_GRADIENTS if options.dtype == "nf4" else ())}
    left_out |= set() if util.find_spec("opacus") else {"opacus"}
    names = options.arms or [name for name in ARMS if name not in left_out]
    names = [FLOOR, *(name for name in names if name != FLOOR)]
    arms = {name: ARMS[name](*prepare(options.length, options.examples, options.dtype)) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(options.rounds + 1):
        for name, arm in arms.items():
            with Ledger() as spent:
                arm()
            if i:  # the first round warms up
                seconds[name].append(spent.seconds)
        print(f"round {i} of {options.rounds}", file=sys.stderr)
    agreement = ""
    if {"exact", "opacus"} <= arms.keys():
        ours, theirs = arms["exact"]().norms, arms["opacus"]().cpu()  # type: ignore[attr-defined]
        agreement = f"\nexact norms and Opacus' differ by {(theirs / ours - 1).abs().max():.1e} at most"
    arms.clear()
    run = functools.partial(subprocess.run, check=True, stdout=subprocess.PIPE, text=True)
    peaks = {n: json.loads(run([sys.executable, __file__, *shape, "--peak-of", n]).stdout) for n in names}

    print(f"{options.examples} x {options.length} tokens, {options.dtype}, {options.rounds} rounds, {device_name()}")
    references = [FLOOR, *([STEP] if STEP in names else [])]
    print(f"{'arm':<26}{'seconds':>9}{'MiB':>8}" + "".join(f"{'time / ' + r:>34}{'memory':>8}" for r in references))
    results: dict[str, Any] = {}
    for name in names:
        results[name] = {"seconds": statistics.median(seconds[name]), "peak_mib": peaks[name] / 2**20}
        line = f"{name:<26}{results[name]['seconds']:>9.3f}{results[name]['peak_mib']:>8.0f}"
        for reference in references:
            ratios = [a / b for a, b in zip(seconds[name], seconds[reference], strict=True)]
            time_ratio, memory = statistics.median(ratios), peaks[name] / peaks[reference]
            results[name][reference] = {"time": time_ratio, "range": [min(ratios), max(ratios)], "memory": memory}
            line += f"{f'{time_ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f})':>34}{memory:>8.3f}"
        print(line)
    print(agreement)
    if options.json:
        print(json.dumps(results))


def prepare(length: int, examples: int, dtype: str) -> tuple[nn.Module, Batch]:
    """SmolLM2-135M and one batch of real text in which every token is a target: the hardest case for the logits."""
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    folder = str(smollm2.prepare(Path(smollm2.FOLDER)))
    model, tokenizer = load_model(folder, "bfloat16", nf4) if dtype == "nf4" else load_model(folder, dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = "\n\n".join(e["prompt"] + e["completion"] for e in stdlib_docs.examples("train"))
    ids = torch.tensor(tokenizer(text)["input_ids"][: length * examples]).view(examples, length).to(device)
    return model.to(device), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def forward_only(model: nn.Module, batch: Batch) -> Arm:
    """The floor of anything that looks at the data."""

    def arm() -> None:
        with torch.no_grad():
            model(**batch)

    return arm


def activation_backward(model: nn.Module, batch: Batch) -> Arm:
    """A forward and a backward pass through a frozen model: the floor of anything that trains its first layer."""
    model.requires_grad_(False)

    def arm() -> None:
        embeddings = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()  # type: ignore[operator]
        model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()

    return arm


def full_backward(model: nn.Module, batch: Batch) -> Arm:
    """One ordinary forward and full backward pass."""
    model.requires_grad_(True)

    def arm() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    return arm


def lora_step(model: nn.Module, batch: Batch) -> Arm:
    """One training step of LoRA, r = 16, on every linear layer, with AdamW."""
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-5)

    def arm() -> None:
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return arm


def measuring(**options: Any) -> Callable[[nn.Module, Batch], Arm]:
    """Every example's gradient norm in every submodule, with the mean gradients' sketches."""

    def prepared(model: nn.Module, batch: Batch) -> Arm:
        model.requires_grad_(False)
        return lambda: measure_influence(model, [batch], progress=False, **options)

    return prepared


def one_example_at_a_time(model: nn.Module, batch: Batch) -> Arm:
    """The same norms by autograd, the way one would without taps."""
    model.requires_grad_(True)
    names = [submodule.name for submodule in find_submodules(model)]

    def arm() -> None:
        for i in range(len(batch["labels"])):
            losses, _ = per_example_losses(model, {key: value[i : i + 1] for key, value in batch.items()})
            losses.sum().backward()
            [model.get_submodule(name).weight.grad.norm() for name in names]  # type: ignore[union-attr, operator]
            model.zero_grad(set_to_none=True)

    return arm


def opacus_ghost_norms(model: nn.Module, batch: Batch) -> Arm:
    """The same norms by the hooks of Opacus' ghost clipping (its first pass; nothing is clipped)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opacus imports what torch has deprecated
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

    names = [submodule.name for submodule in find_submodules(model)]
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    model.get_input_embeddings().register_forward_hook(lambda *arguments: arguments[2].requires_grad_())  # type: ignore[operator]
    model.train()
    hooked = GradSampleModuleFastGradientClipping(model, strict=False, loss_reduction="sum", max_grad_norm=1.0)

    def arm() -> Tensor:
        losses, _ = per_example_losses(hooked._module, batch)
        losses.sum().backward()
        norms = torch.stack([model.get_submodule(name).weight._norm_sample for name in names])  # type: ignore[union-attr]
        model.zero_grad(set_to_none=True)
        return norms

    return arm


ARMS: dict[str, Callable[[nn.Module, Batch], Arm]] = {
    "forward": forward_only,
    FLOOR: activation_backward,
    "full backward": full_backward,
    STEP: lora_step,
    "auto (the default)": measuring(),
    "sketch, s = 16": measuring(method="sketch", sketch_size=16),
    "sketch, s = 32": measuring(method="sketch", sketch_size=32),
    "sketch, s = 64": measuring(method="sketch", sketch_size=64),
    "exact": measuring(method="exact"),
    "opacus": opacus_ghost_norms,
    "one example at a time": one_example_at_a_time,
}


def peak_of(arm: Arm) -> int:
    """Bytes above what was held before, at the peak of one pass."""
    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
    with Ledger() as spent:
        arm()
    if spent.peak_bytes is None:
        raise SystemExit("Peak memory cannot be measured on this machine: it needs Linux or CUDA.")
    return spent.peak_bytes - before


def device_name() -> str:
    """What it ran on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"


if __name__ == "__main__":
    main()
