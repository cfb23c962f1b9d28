"""Does a placement pay? Held-out loss of SmolLM2-135M on GSM8K by placement, at equal time.

    python -m benchmarks placement --data FOLDER [--arms ARM[@LEARNING_RATE][#SEED] ...] [--times N] [--memory]

FOLDER holds `gsm8k_train.jsonl` and `gsm8k_test.jsonl`. A blueprint is measured once on 64 training examples that are not
trained on, and kept beside the model. Every arm then trains on the same batches of 8 examples of at most 100 tokens,
answers as targets, AdamW without decay, three steps of warm-up and then a linear fall to nought: all-linear LoRA of rank
16 for 30 steps, every other arm for as many as its step time allows in --share of all-linear's time. The learning rate is
all-linear's best times the placement's `learning_rate_scale`, or one that is given. Losses do not depend on how busy the
machine is, and go to --out as they come, so that arms may be added in later runs; step times do, and --times measures
them apart, all arms in turn in one process, as ratios within a round; --memory each arm's peak in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import set_seed

from peft_blueprint import Blueprint, BlueprintConfig, Placement, generate_blueprint, plan_placement
from peft_blueprint.data import encode, make_batches, pad_token_of
from peft_blueprint.measure import empty_model, load_model
from peft_blueprint.place import CostModel, Structure, Workload
from peft_blueprint.runs import Ledger
from peft_blueprint.train import held_out_loss
from recipes import smollm2

from .cost import MALLOC
from .measure import device_name


BASE_LEARNING_RATE = 2e-3  # of 1e-3, 2e-3 and 4e-3 the best for all-linear
LENGTH, BATCH, STEPS, WARM_UP, RANK = 100, 8, 30, 3, 16
MEASURED, HELD_OUT = 64, 40
REFERENCE = "all-linear"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}

# every arm is a wish; "QLoRA" is the default on weights of 4 bits
WISHES: dict[str, dict[str, Any]] = {
    REFERENCE: {"fraction": 1.0, "rank": RANK},
    "all-linear, less time": {"fraction": 1.0, "rank": RANK},  # as much as the other arms have
    "default": {},
    "0.7x": {"budget": "0.7x"},
    "0.6x": {"budget": "0.6x"},
    "QLoRA": {},
    "default, rank 16": {"rank": RANK},
    "keep 0.9": {"keep": 0.9},
    "keep 0.85": {"keep": 0.85},  # the default until the contest of placements
    "keep 0.7": {"keep": 0.7},
    "0.5x": {"budget": "0.5x"},  # too little on most machines, which is then said
    "a fifth": {"fraction": 0.2},
    "a fifth, even": {"fraction": 0.2, "rank_by": "even"},
    "a fifth, random within kind": {"fraction": 0.2, "rank_by": "random", "coverage": "kind"},
    "a fifth, random": {"fraction": 0.2, "rank_by": "random", "coverage": "none"},
    "a fifth by norm": {"fraction": 0.2, "rank_by": "gradient_norm"},
    "a fifth by norm, pooled": {"fraction": 0.2, "rank_by": "gradient_norm", "coverage": "none"},
    "a fifth by cover_gain": {"fraction": 0.2, "rank_by": "cover_gain"},
    "a fifth by set_gain": {"fraction": 0.2, "rank_by": "set_gain"},
    "first fifth": {"fraction": 0.2, "rank_by": "first", "coverage": "none"},
    "last fifth": {"fraction": 0.2, "rank_by": "last", "coverage": "none"},
    "ten": {"num_modules": 10},
    "default, ranks by influence": {"rank": 3 * RANK, "ranks": "influence"},
}


@dataclass(frozen=True)
class Arm:
    """A placement's name, with a learning rate and a seed if they are given."""

    name: str
    learning_rate: float | None = None
    seed: int = 0

    @classmethod
    def of(cls, text: str) -> Arm:
        """From `name`, `name@3e-3` or `name@3e-3#1`."""
        rest, _, seed = text.partition("#")
        name, _, rate = rest.partition("@")
        if name not in WISHES:
            raise SystemExit(f"There is no arm {name!r}; choose from {', '.join(WISHES)}.")
        return cls(name, float(rate) if rate else None, int(seed or 0))


def main() -> None:
    """Parse, train what is missing, measure, and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with GSM8K")
    parser.add_argument("--arms", nargs="+", default=[REFERENCE, "default", "0.7x", "0.6x", "QLoRA"])
    parser.add_argument("--times", type=int, default=0, metavar="ROUNDS", help="measure step times in so many rounds")
    parser.add_argument("--memory", action="store_true", help="measure peak memory")
    parser.add_argument("--share", type=float, default=0.8, help="of all-linear's time that the other arms have")
    parser.add_argument("--no-losses", action="store_true", help="do not train")
    parser.add_argument("--out", type=Path, default=Path(".cache/benchmark_placement.jsonl"))
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()

    bench = Bench(options.data)
    if options.peak_of:
        print(json.dumps(bench.peak(options.peak_of)))
        return
    arms = [Arm.of(text) for text in options.arms]
    known = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    records = []
    for arm in [] if options.no_losses else arms:
        rate = arm.learning_rate or BASE_LEARNING_RATE * (bench.placement(arm.name).learning_rate_scale or 1.0)
        steps = STEPS if arm.name == REFERENCE else int(options.share * STEPS / bench.predicted_time(arm.name))
        wanted = [arm.name, arm.seed, steps, list(bench.placement(arm.name).lora)]
        same = [r for r in known if r["what"] == wanted and abs(r["lr"] / rate - 1) < 1e-6]
        if not same:
            same = [{"what": wanted, **bench.train(arm.name, rate, arm.seed, steps)}]
            with options.out.open("a") as file:
                file.write(json.dumps(same[0]) + "\n")
            print(same[0], file=sys.stderr, flush=True)
        records.append(same[0])
    names = list(dict.fromkeys(arm.name for arm in arms))
    ratios = bench.times([n for n in names if n != REFERENCE], options.times) if options.times else {}
    peaks = {name: peak_elsewhere(name, options.data) for name in names} if options.memory else {}
    print(f"8 x {LENGTH} tokens at most, float32, {device_name()}\n")
    if ratios or peaks:
        report_costs(bench, names, ratios, peaks)
    if records:
        report_losses(records)


class Bench:
    """The data, the blueprint and the placements, each made when first asked for."""

    def __init__(self, data: Path):
        self.data = data

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Of SmolLM2."""
        return load_model(str(smollm2.prepare()), "float32")[1]

    def rows(self, split: str, seed: int, longest: int) -> list[Any]:
        """GSM8K's examples in random order, those of at most so many tokens."""
        lines = map(json.loads, (self.data / f"gsm8k_{split}.jsonl").read_text().splitlines())
        examples = [{"prompt": f"{row['question']}\n", "completion": row["answer"]} for row in lines]
        random.Random(seed).shuffle(examples)
        return [r for r in encode(examples, self.tokenizer, 4096) if len(r["input_ids"]) <= longest]

    @functools.cached_property
    def batches(self) -> tuple[list[Any], list[Any]]:
        """To train on and to evaluate on."""
        pad = pad_token_of(self.tokenizer)
        train, test = self.rows("train", 0, LENGTH), self.rows("test", 1, LENGTH)
        return (
            make_batches(train[MEASURED : MEASURED + BATCH * 2 * STEPS], BATCH, pad),
            make_batches(test[:HELD_OUT], BATCH, pad),
        )

    @functools.cached_property
    def blueprint(self) -> Blueprint:
        """Measured on the first examples of the training set."""
        path = Path(".cache/gsm8k_blueprint.json")
        if not path.exists():
            model, _ = load_model(str(smollm2.prepare()), "float32")
            batches = make_batches(self.rows("train", 0, LENGTH)[:MEASURED], BATCH, pad_token_of(self.tokenizer))
            generate_blueprint(model, batches, model_id="HuggingFaceTB/SmolLM2-135M-Instruct", data="GSM8K").save(path)
        return Blueprint.from_pretrained(path)

    @functools.cache  # noqa: B019  one bench lives as long as the process
    def placement(self, name: str) -> Placement:
        """Planned on the empty model, for the steps that are run here."""
        return plan_placement(
            self.blueprint, empty_model(str(smollm2.FOLDER)), workload=self.workload(name), **WISHES[name]
        )

    def workload(self, name: str) -> Workload:
        """The step that is run here."""
        return Workload(
            batch_size=BATCH,
            length=LENGTH,
            dtype="float32",
            quantization="nf4" if name == "QLoRA" else None,
            rank=RANK,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )

    def predicted_time(self, name: str) -> float:
        """Of an arm's step, over all-linear LoRA's on weights that are not quantised."""
        structure = Structure.of(empty_model(str(smollm2.FOLDER)))
        own, reference = (CostModel(structure, self.workload(n)) for n in (name, REFERENCE))
        of_all = own.step_time(own.all_linear()) / reference.step_time(reference.all_linear())
        return self.placement(name).cost["time"] * of_all

    def adapted(self, name: str, seed: int = 0) -> nn.Module:
        """The model with its adapters."""
        nf4 = {**NF4, "bnb_4bit_compute_dtype": torch.float32}
        model, _ = load_model(str(smollm2.prepare()), "float32", nf4 if name == "QLoRA" else None)
        placement = self.placement(name)
        set_seed(seed)
        rank = placement.rank or RANK
        config = BlueprintConfig(placement=placement, r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM")
        return get_peft_model(model, config).train()  # type: ignore[arg-type]

    def train(self, name: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
        """One arm: its loss on held-out examples after so many steps."""
        train, test = self.batches
        model = self.adapted(name, seed)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        order = list(range(len(train)))
        random.Random(seed).shuffle(order)
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(step / WARM_UP, (steps - step + 1) / (steps - WARM_UP + 1))
            one_step(model, optimizer, train[order[(step - 1) % len(order)]])
        placement = self.placement(name)
        return {
            "arm": name,
            "lr": rate,
            "seed": seed,
            "steps": steps,
            "time": steps / STEPS * self.predicted_time(name),
            "modules": len(placement.lora),
            "rank": placement.rank,
            "kept": placement.gain_retained,
            "parameters": sum(p.numel() for p in trained),
            "loss": held_out_loss(model, test, progress=False),
        }

    def step(self, name: str) -> Callable[[], None]:
        """A training step of an arm on one full batch."""
        model = self.adapted(name)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
        batch = max(self.batches[0], key=lambda batch: batch["input_ids"].numel())
        return lambda: one_step(model, optimizer, batch)

    def times(self, names: Sequence[str], rounds: int) -> dict[str, list[float]]:
        """Step times over all-linear's, by arm, one ratio a round; the first round warms up."""
        steps = {name: self.step(name) for name in (REFERENCE, *names)}
        ratios: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(rounds + 1):
            seconds = {}
            for name, step in steps.items():
                with Ledger() as spent:
                    step()
                seconds[name] = spent.seconds
            print(f"round {i} of {rounds}: {seconds}", file=sys.stderr, flush=True)
            if i:
                for name in steps:
                    ratios[name].append(seconds[name] / seconds[REFERENCE])
        return ratios

    def peak(self, name: str) -> int:
        """Bytes of the process at the peak of a second step, less what it held before the model was there."""
        before = resident()
        step = self.step(name)
        step()
        with Ledger() as spent:
            step()
        if spent.peak_bytes is None:
            raise SystemExit("Peak memory cannot be measured on this machine: it needs Linux or CUDA.")
        return spent.peak_bytes - before


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """Forward, backward, update."""
    device = next(model.parameters()).device
    model(**{key: value.to(device) for key, value in batch.items()}).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def resident() -> int:
    """Bytes that the process, or on a GPU its allocator, holds."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_elsewhere(name: str, data: Path) -> int:
    """An arm's peak, in a process of its own that gives back at once what it frees."""
    command = [sys.executable, __file__, "--data", str(data), "--peak-of", name]
    environment = {**os.environ, **MALLOC}
    return int(
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)
    )


def report_costs(bench: Bench, names: Sequence[str], ratios: dict[str, list[float]], peaks: dict[str, int]) -> None:
    """Measured beside predicted."""
    print(
        "| arm | adapters | lowest | time / all-linear | predicted | MiB | predicted | gain kept | rank | learning rate × |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in names:
        placement = bench.placement(name)
        cost = placement.cost
        measured = ratios.get(name)
        time = f"{statistics.median(measured):.2f} [{min(measured):.2f}, {max(measured):.2f}]" if measured else "–"
        memory = f"{peaks[name] / 2**20:.0f}" if name in peaks else "–"
        print(
            f"| {name} | {len(placement.lora)} | {cost['lowest']:.0f} | {time} | {bench.predicted_time(name):.2f} | {memory} | "
            f"{cost['memory'] / 2**20:.0f} | {placement.gain_retained:.2f} | {placement.rank} | {placement.learning_rate_scale:.2f} |"
        )
    print()


def report_losses(records: Sequence[dict[str, Any]]) -> None:
    """Every arm's loss at the end of its time."""
    print("| arm | adapters | rank | parameters | gain kept | learning rate | seed | steps | time | loss |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for r in records:
        print(
            f"| {r['arm']} | {r['modules']} | {r['rank']} | {r['parameters'] / 1e6:.2f} M | {r['kept']:.2f} | "
            f"{r['lr']:.2g} | {r['seed']} | {r['steps']} | {r['time']:.2f} | {r['loss']:.4f} |"
        )


if __name__ == "__main__":
    main()
