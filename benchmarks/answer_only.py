"""What do answer-only adapters save, and what do they cost in loss?

    python -m benchmarks answer_only --data FOLDER [--datasets …] [--rounds 3] [--shares 30 50 …]
    python -m benchmarks answer_only --data FOLDER --seeds 5 --steps 40 [--records FILE | --print]

The first form times training steps of SmolLM2-135M-Instruct in turn, arm by arm, in CPU time of one thread, on real
examples, and measures each arm's peak memory in a process of its own. Then it cuts real text into prompt and answer at
given shares, and times them too. Arms: LoRA on all linear layers at all positions, the same with its head on targets,
PEFT's activated LoRA, the same with `answer_only`, and with its prompts' states cached (from the second epoch on), and the
library's default placement with `answer_only`, by the published blueprint of PubMedQA.

The second form trains: for every seed fresh training and held-out examples, the same for all arms, with controls of
equal time (all positions for fewer steps, answers only for more). Seed 0 chooses each arm's learning rate and is not
reported. Every run is appended to the records as one line of JSON and found there again, so that an interrupted study
goes on.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import set_seed

from peft_blueprint import BlueprintConfig, generate_blueprint
from peft_blueprint.measure import Row, collate
from peft_blueprint.testing import toy_batches
from peft_blueprint.train import PromptCache, answer_only, find_invocation_tokens, head_on_targets

from . import setup
from .study.inference import relative_difference


RANK = 16
ARMS = (
    *("all-linear", "head on targets", "PEFT's aLoRA", "answer only", "answer only, cached"),
    "default, answer only",
)
REFERENCE = ARMS[0]
TRAINED = ("all-linear", "answer only", "default, answer only")
BLUEPRINT = Path("blueprints/HuggingFaceTB--SmolLM2-135M-Instruct/blueprint-pubmedqa.json")
# text before every answer, which must not occur in one: PubMedQA's end in "Answer: yes"
ANSWERS = {"numbers": "89", "pubmedqa with contexts": "\nConclusion:"}
DATASETS = ("pubmedqa with contexts", "gsm8k")
QUICK = {"datasets": ["numbers"], "examples": 2, "rounds": 1, "shares": [50], "longest": 24, "length": 16}
EQUAL_TIME = {"all-linear": 0.45, "answer only": 2.2}  # of the other's steps


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--examples", type=int, default=4, help="of a batch")
    parser.add_argument("--longest", type=int, default=400, help="tokens of an example")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of every arm")
    parser.add_argument("--shares", type=int, nargs="*", default=[30, 50, 70, 80, 90, 95], help="per cent of prompt")
    parser.add_argument("--curve-alone", action="store_true", help="leave out the data sets' own examples")
    parser.add_argument("--length", type=int, default=384, help="tokens of an example of the curve")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--no-memory", action="store_true", help="measure time alone")
    parser.add_argument("--seeds", type=int, default=0, help="train with this many seeds instead of timing steps")
    parser.add_argument("--steps", type=int, default=40, help="of training")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0005, 0.001, 0.002, 0.004])
    parser.add_argument("--held-out", type=int, default=64, help="examples of the loss")
    parser.add_argument("--records", type=Path, default=setup.RESULTS / "answer_only.jsonl")
    parser.add_argument("--print", action="store_true", dest="prints", help="train nothing")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # "arm|data set", in a process of its own


def main(options: argparse.Namespace) -> None:
    """Time steps and print tables, or train."""
    torch.set_num_threads(1)
    if options.peak_of:
        print(json.dumps(_peak_of(options)))
    elif options.seeds:
        _study(options)
    else:
        for name in options.datasets if not options.curve_alone else ():
            _print_costs(name, options)
        if options.shares:
            _print_curve(options)


def read_rows(name: str, options: argparse.Namespace, split: setup.Split, seed: int, tokenizer: Any) -> list[Row]:
    """Return examples of at most `longest` tokens as prompt, invocation tokens and answer, in random order."""
    invocation = find_invocation_tokens(tokenizer, ANSWERS.get(name, "\nAnswer:"))
    rows: list[Row] = []
    for example in setup.shuffled(setup.read_examples(name, options.data, split), seed):
        prompt = tokenizer(example["prompt"].rstrip(), add_special_tokens=False)["input_ids"]
        answer = tokenizer(" " + example["completion"].lstrip(), add_special_tokens=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        ids = [*prompt, *invocation, *answer]
        if len(ids) <= options.longest:
            rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - len(answer)) + answer})
    return rows


def make_arm(name: str, options: argparse.Namespace, invocation: Sequence[int], seed: int = 0) -> nn.Module:
    """Load the model with an arm's adapters, in training mode."""
    model, _ = setup.load(options.quick, options.dtype)
    set_seed(seed)
    activated: dict[str, Any] = {} if name in ARMS[:2] else {"alora_invocation_tokens": list(invocation)}
    config: LoraConfig
    if name.startswith("default"):
        blueprint = generate_blueprint(model, toy_batches(), progress=False) if options.quick else BLUEPRINT
        config = BlueprintConfig(blueprint=blueprint, task_type="CAUSAL_LM", **activated)
    else:
        every = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
        config = LoraConfig(task_type="CAUSAL_LM", **every, **activated)
    adapted: nn.Module = get_peft_model(model, config)
    if name == "head on targets":
        head_on_targets(adapted)
    if "answer only" in name:
        answer_only(adapted, cache=PromptCache("4GiB") if "cached" in name else None)
    return adapted.train()


def optimizer_of(model: nn.Module, rate: float = 1e-3) -> torch.optim.Optimizer:
    """Return AdamW on the trainable parameters."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)


def steps_of(
    name: str, options: argparse.Namespace, invocation: Sequence[int], batches: Sequence[dict[str, Tensor]]
) -> Callable[[], float]:
    """Return a training step over the batches in turn; a cache is filled before."""
    model = make_arm(name, options, invocation)
    optimizer = optimizer_of(model)
    if "cached" in name:
        for batch in batches:
            model(**batch)
    turn = iter(batches * 2)
    return lambda: setup.train_step(model, optimizer, next(turn))


def prompt_share(rows: Sequence[Row]) -> float:
    """Return the share of tokens that come before the targets."""
    targets = sum(sum(label != -100 for label in row["labels"]) for row in rows)
    return 1 - targets / sum(len(row["input_ids"]) for row in rows)


def _batches(rows: Sequence[Row], options: argparse.Namespace, pad: int) -> list[dict[str, Tensor]]:
    chosen = setup.in_batches(rows[: options.examples * (options.rounds + 1)], options.examples)
    return [setup.on_device(batch, pad) for batch in chosen]


def _data(name: str, options: argparse.Namespace) -> tuple[list[Row], list[int], int]:
    """Return a data set's training examples, the invocation tokens and the padding token."""
    _, tokenizer = setup.load(options.quick, options.dtype)
    invocation = find_invocation_tokens(tokenizer, ANSWERS.get(name, "\nAnswer:"))
    return read_rows(name, options, "train", 0, tokenizer), invocation, tokenizer.pad_token_id or 0


def _print_costs(name: str, options: argparse.Namespace) -> None:
    rows, invocation, pad = _data(name, options)
    batches = _batches(rows, options, pad)
    steps = {arm: steps_of(arm, options, invocation, batches) for arm in options.arms}
    seconds = setup.seconds_per_round(steps, options.rounds, cpu_time=True)
    del steps
    used = rows[: options.examples * (options.rounds + 1)]
    print(f"\n{name}: {options.examples} examples a step of at most {options.longest} tokens, prompt share ", end="")
    print(f"{prompt_share(used):.0%}, {options.rounds} rounds, {options.dtype}, one thread of a CPU\n")
    columns = ["arm", "CPU s a step", "time / all-linear (smallest to largest)"]
    setup.print_table(
        columns, [[arm, f"{statistics.median(seconds[arm]):.2f}", _spread(arm, seconds)] for arm in seconds]
    )
    if options.no_memory:
        return
    peaks = setup.peaks_in_own_processes(options, [f"{arm}|{name}" for arm in options.arms])
    reference = peaks.get(f"{REFERENCE}|{name}")
    print()
    setup.print_table(
        ["arm", "peak of a step above the memory held before, MiB", "ratio"],
        [
            [
                arm,
                f"{peaks[f'{arm}|{name}'] / 2**20:.0f}",
                f"{peaks[f'{arm}|{name}'] / reference:.2f}" if reference else "–",
            ]
            for arm in options.arms
        ],
    )


def _spread(arm: str, seconds: dict[str, list[float]]) -> str:
    ratio = setup.ratios(seconds, arm, REFERENCE if REFERENCE in seconds else arm)
    return f"{statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})"


def _peak_of(options: argparse.Namespace) -> int:
    arm, _, name = options.peak_of.partition("|")
    rows, invocation, pad = _data(name, options)
    batches = _batches(rows, argparse.Namespace(**{**vars(options), "rounds": 1}), pad)
    step = steps_of(arm, options, invocation, batches[:1])
    step()  # Adam's moments are there from the second step on
    return setup.peak_bytes(step)


def _print_curve(options: argparse.Namespace) -> None:
    """Print step times of real text that is cut into prompt and answer at given shares."""
    name = options.datasets[0]
    wide = argparse.Namespace(**{**vars(options), "longest": 10**6})
    rows, invocation, pad = _data(name, wide)
    text = [token for row in rows for token in row["input_ids"] if token not in invocation]
    arms = [REFERENCE, *(arm for arm in options.arms if arm in ARMS[3:])]
    print(f"\nText of {name} cut by share: {options.examples} x {options.length} tokens\n")

    def rows_of_the_table() -> Iterator[list[str]]:
        for share in options.shares:
            drawn = random.Random(share)
            cut: list[Row] = []
            for _ in range(options.examples * (options.rounds + 1)):
                start = drawn.randrange(len(text) - options.length)
                ids = text[start : start + options.length]
                prompt = max(len(invocation) + 1, round(share / 100 * options.length))
                ids[prompt - len(invocation) : prompt] = invocation
                cut.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
            batches = _batches(cut, options, pad)
            steps = {arm: steps_of(arm, options, invocation, batches) for arm in arms}
            seconds = setup.seconds_per_round(steps, options.rounds, cpu_time=True)
            spread = (_spread(arm, seconds) for arm in arms[1:])
            yield [f"{share} %", f"{statistics.median(seconds[arms[0]]):.2f}", *spread]

    columns = ["prompt share", f"{arms[0]}, CPU s", *(f"{arm} / {arms[0]}" for arm in arms[1:])]
    setup.print_table(columns, rows_of_the_table())


# ---- losses


def _study(options: argparse.Namespace) -> None:
    """Train the missing runs, and print held-out losses beside the reference's, paired by seed."""
    records = setup.Records(options.records)
    arms = [arm for arm in TRAINED if arm in options.arms]
    plan = [(arm, options.steps) for arm in arms]
    plan += [(arm, round(factor * options.steps)) for arm, factor in EQUAL_TIME.items() if arm in arms]
    for name in options.datasets:

        def record(arm: str, steps: int, rate: float, seed: int, name: str = name) -> dict[str, Any] | None:
            key = "|".join(map(str, (name, arm, steps, rate, seed, options.examples, options.longest)))
            run = functools.partial(_train, name, arm, steps, rate, seed, options)
            return records.get(key, None if options.prints else run)

        rates = {}
        for arm in arms:
            tried = {rate: one["loss"] for rate in options.rates if (one := record(arm, options.steps, rate, 0))}
            rates[arm] = min(tried, key=tried.__getitem__, default=options.rates[0])
        found: dict[tuple[str, int], dict[int, dict[str, Any]]] = {one: {} for one in plan}
        for seed, (arm, steps) in itertools.product(range(1, options.seeds + 1), plan):
            if one := record(arm, steps, rates[arm], seed):
                found[arm, steps][seed] = one
        print(f"\n{name}: {options.held_out} held-out examples a seed\n")
        lines = []
        for (arm, steps), runs in found.items():
            loss = setup.mean_and_error([run["loss"] for run in runs.values()])
            spent = setup.mean_and_error([run["seconds"] for run in runs.values()], ".0f")
            lines.append(
                [
                    *(arm, steps, f"{rates[arm]:g}", len(runs), loss, spent),
                    *(_apart(runs, found[other]) for other in (plan[0], (REFERENCE, plan[len(arms)][1]))),
                ]
            )
        columns = ["arm", "steps", "rate", "seeds", "loss", "CPU s", f"against {REFERENCE}", "against its equal time"]
        setup.print_table(columns, lines)


def _apart(mine: dict[int, dict[str, Any]], others: dict[int, dict[str, Any]]) -> str:
    seeds = sorted(mine.keys() & others.keys())
    if mine is others:
        return "–"
    return relative_difference([mine[s]["loss"] for s in seeds], [others[s]["loss"] for s in seeds])


def _train(name: str, arm: str, steps: int, rate: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm; return its held-out loss per target, the examples' losses and the CPU seconds of training."""
    _, tokenizer = setup.load(options.quick, options.dtype)
    invocation = find_invocation_tokens(tokenizer, ANSWERS.get(name, "\nAnswer:"))
    pad = tokenizer.pad_token_id or 0
    rows = read_rows(name, options, "train", seed, tokenizer)
    held_out = read_rows(name, options, "test", seed, tokenizer)[: options.held_out]
    model = make_arm(arm, options, invocation, seed)
    optimizer = optimizer_of(model, rate)
    before, losses = time.process_time(), []
    for step, batch in enumerate(setup.random_batches(rows, options.examples, seed, steps), 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * setup.linear_schedule(step, steps, max(1, steps // 10))
        losses.append(setup.train_step(model, optimizer, setup.on_device(batch, pad)))
    seconds = time.process_time() - before
    model.eval()
    sums, counts = [], []
    with torch.no_grad():
        for row in held_out:
            batch = {key: value.to(setup.device()) for key, value in collate([row], pad).items()}
            counts.append(int((batch["labels"][:, 1:] != -100).sum()))
            sums.append(float(model(**batch).loss) * counts[-1])
    loss = sum(sums) / sum(counts)
    return {"loss": loss, "losses": sums, "targets": counts, "training_losses": losses, "seconds": seconds}
