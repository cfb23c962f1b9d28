"""Does stopping pay? Held-out loss of SmolLM2-135M along short trainings, and where the marginal-return rule ends them.

    python -m benchmarks stopping --data FOLDER [--curves NAME ...] [--steps N] [--resource flops|seconds|tokens] [--print]

FOLDER holds `gsm8k_train.jsonl` and `gsm8k_test.jsonl`, whose answers alone are trained on, as texts; the other set is the
demo's, docstrings of Python's standard library. Every curve trains a placement (keep=0.85) on batches of 4 short examples,
AdamW without decay, three steps of warm-up and then a constant rate or a cosine to nought, and is evaluated every few
steps on the same 8 held-out examples. On 16 or 32 examples it comes to a plateau, or overfits; "many" sees every example
once, is still falling at the end, and should not be stopped. Finished curves go to --out and are not trained again.

Then every curve is replayed through MarginalReturn and through what transformers' EarlyStoppingCallback(patience=3) does:
the share of the resource that is saved, and how much higher than at the end of the budget the loss is at the stop. Under a
cosine the rule never stops; the schedule that it last proposed is then trained as a curve of its own, and compared. What
evaluations cost is counted to nobody. --print trains nothing.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from peft_blueprint.data import Row, collate, encode, make_batches, pad_token_of
from peft_blueprint.measure import empty_model
from peft_blueprint.place import CostModel, Structure, Workload
from peft_blueprint.runs import Decision, MarginalReturn
from peft_blueprint.train import held_out_loss
from recipes import smollm2, stdlib_docs

from .measure import device_name
from .placement import BASE_LEARNING_RATE, RANK, WARM_UP, Bench, one_step


PLACEMENT = "keep 0.85"
BATCH, STEPS, EVERY, HELD_OUT, PATIENCE = 4, 48, 2, 8, 3
LENGTHS = {"docs": 40, "gsm8k": 54}  # tokens of an example at most: so short that a curve's training is about 5 TFLOP
MANY = 10**6

Record = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """One training.

    Args:
        data: "docs" or "gsm8k".
        examples: of the training set; MANY for all that the steps have room for, each once.
        schedule: of the learning rate after warm-up.
        rate: the highest learning rate, over the placement's own.
        steps: None for what --steps says.
    """

    data: str
    examples: int
    schedule: Literal["constant", "cosine"]
    rate: float = 1.0
    steps: int | None = None


CURVES = {
    "docs, 16": Curve("docs", 16, "constant"),
    "docs, 32": Curve("docs", 32, "constant", 0.5),
    "docs, many": Curve("docs", MANY, "constant"),
    "docs, 16, cosine": Curve("docs", 16, "cosine"),
    "docs, 32, cosine": Curve("docs", 32, "cosine", 0.5),
    "gsm8k, 16": Curve("gsm8k", 16, "constant"),
    "gsm8k, 32": Curve("gsm8k", 32, "constant", 0.5),
    "gsm8k, many": Curve("gsm8k", MANY, "constant"),
    "gsm8k, 16, cosine": Curve("gsm8k", 16, "cosine"),
    "gsm8k, 32, cosine": Curve("gsm8k", 32, "cosine", 0.5),
}


def main() -> None:
    """Parse, train what is missing, replay, and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with GSM8K")
    parser.add_argument("--curves", nargs="+", choices=list(CURVES), default=list(CURVES), metavar="NAME")
    parser.add_argument("--steps", type=int, default=STEPS, help="the fixed budget")
    parser.add_argument("--every", type=int, default=EVERY, help="steps from one evaluation to the next")
    parser.add_argument("--seed", type=int, default=0, help="of the draw, the order and the adapters")
    parser.add_argument("--resource", choices=["flops", "seconds", "tokens"], default="flops")
    parser.add_argument("--out", type=Path, default=Path(".cache/benchmark_stopping.jsonl"))
    parser.add_argument("--print", action="store_true", dest="prints", help="train nothing")
    options = parser.parse_args()

    torch.set_num_threads(2)
    track = Track(Bench(options.data), options.seed, options.every)
    pairs: list[tuple[str, Record, Record | None]] = []
    for name in options.curves:
        curve = replace(CURVES[name], steps=options.steps)
        record = recorded(track, name, curve, options.out, options.prints)
        if record is None:
            continue
        again = None
        share = proposed(decisions(record, options.resource))
        if curve.schedule == "cosine" and share is not None:
            less = replace(curve, steps=max(1, round(share * options.steps)))
            again = recorded(track, f"{name}, shorter", less, options.out, options.prints)
        pairs.append((name, record, again))
    print(
        f"Batches of {BATCH}, {options.steps} steps, an evaluation every {options.every}, float32, {device_name()}\n"
    )
    report(pairs, options.resource)


class Track:
    """The model and both sets' batches, made when first asked for."""

    def __init__(self, bench: Bench, seed: int, every: int):
        self.bench = bench
        self.seed = seed
        self.every = every

    @functools.cache  # noqa: B019  one track lives as long as the process
    def rows(self, data: str, split: Literal["train", "held_out"]) -> list[Row]:
        """Of a set, those of at most so many tokens, shuffled."""
        if data == "docs":
            examples = stdlib_docs.examples(split)
        else:
            path = self.bench.data / f"gsm8k_{'train' if split == 'train' else 'test'}.jsonl"
            examples = [{"text": json.loads(line)["answer"]} for line in path.read_text().splitlines()]
        rows = [row for row in encode(examples, self.bench.tokenizer, 4096) if len(row["input_ids"]) <= LENGTHS[data]]
        random.Random(self.seed if split == "train" else 0).shuffle(rows)  # all seeds are evaluated on the same
        return rows

    def batches(self, curve: Curve) -> list[list[Row]]:
        """One for every step; the curve's examples in a new order at every pass."""
        assert curve.steps is not None
        rows = self.rows(curve.data, "train")
        wanted = curve.steps * BATCH if curve.examples == MANY else curve.examples
        if len(rows) < wanted:
            raise SystemExit(
                f"{curve.data} has {len(rows)} examples of at most {LENGTHS[curve.data]} tokens, and {wanted} are "
                "needed: ask for fewer steps."
            )
        order: list[Row] = []
        generator = random.Random(self.seed)
        while len(order) < curve.steps * BATCH:
            order += generator.sample(rows[:wanted], wanted)
        return [order[i * BATCH : (i + 1) * BATCH] for i in range(curve.steps)]

    @functools.cache  # noqa: B019
    def per_token(self, data: str) -> float:
        """FLOPs of a training step per token, padding included, by the cost model."""
        placement = self.bench.placement(PLACEMENT)
        load = Workload(batch_size=BATCH, length=LENGTHS[data], dtype="float32", rank=RANK)
        model = CostModel(Structure.of(empty_model(str(smollm2.FOLDER))), load)
        return model.cost(dict.fromkeys(placement.lora, placement.rank or RANK)).flops

    def key(self, curve: Curve) -> str:
        """Of all that bears on a curve."""
        placement = self.bench.placement(PLACEMENT)
        rate = BASE_LEARNING_RATE * placement.learning_rate_scale
        matters = [asdict(curve), self.seed, self.every, LENGTHS[curve.data], BATCH, HELD_OUT, WARM_UP, rate]
        text = json.dumps([*matters, list(placement.lora), placement.rank])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def train(self, curve: Curve) -> list[dict[str, float]]:
        """A curve's evaluations: step, what was spent by then, the loss and the learning rate."""
        assert curve.steps is not None
        pad = pad_token_of(self.bench.tokenizer)
        batches = self.batches(curve)
        test = make_batches(self.rows(curve.data, "held_out")[:HELD_OUT], BATCH, pad)
        model = self.bench.adapted(PLACEMENT, self.seed)
        peak = BASE_LEARNING_RATE * self.bench.placement(PLACEMENT).learning_rate_scale * curve.rate
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=0.0)
        tokens, seconds, points = 0, 0.0, []
        for step, rows in enumerate(batches, start=1):
            rate = peak * factor(curve.schedule, step, curve.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = collate(rows, pad)
            start = time.perf_counter()
            one_step(model, optimizer, batch)
            seconds += time.perf_counter() - start
            tokens += batch["input_ids"].numel()
            if step % self.every == 0 or step == curve.steps:
                flops = tokens * self.per_token(curve.data)
                spent = {"seconds": seconds, "tokens": tokens, "flops": flops, "learning_rate": rate}
                loss = held_out_loss(model, test, progress=False)
                points.append({"step": step, "eval_loss": loss, **spent})
                print(points[-1], file=sys.stderr, flush=True)
        return points


def factor(schedule: str, step: int, steps: int) -> float:
    """Of the highest learning rate, at a step from 1."""
    if step <= WARM_UP or schedule == "constant":
        return min(1.0, step / WARM_UP)
    return (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP + 1))) / 2


def recorded(track: Track, name: str, curve: Curve, out: Path, prints: bool) -> Record | None:
    """A curve that is in the file, or is trained now and added; None if it is not there and may not be trained."""
    key = track.key(curve)
    known = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    found: Record | None = next((record for record in known if record["key"] == key), None)
    if found is None and not prints:
        print(f"{name}: {curve}", file=sys.stderr, flush=True)
        found = {"key": key, "name": name, "steps": curve.steps, "curve": asdict(curve), "points": track.train(curve)}
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(json.dumps(found) + "\n")
    return found


def decisions(record: Record, resource: str) -> list[Decision]:
    """What MarginalReturn says at every evaluation, up to its stop; the budget is the whole curve's."""
    points = record["points"]
    rule = MarginalReturn(budget=points[-1][resource])
    found = []
    for point in points:
        done = point["step"] / record["steps"]
        said = rule.check(
            point[resource],
            point["eval_loss"],
            step=point["step"],
            learning_rate=point["learning_rate"],
            progress=done,
        )
        found.append(said)
        if said.stop:
            break
    return found


def proposed(said: Sequence[Decision]) -> float | None:
    """The share of the schedule that was proposed last."""
    return next((d.proposed_progress for d in reversed(said) if d.proposed_progress is not None), None)


def early_stop(losses: Sequence[float]) -> int:
    """The evaluation at which EarlyStoppingCallback stops: the third in a row that is no better than the best."""
    best, waited = math.inf, 0
    for i, loss in enumerate(losses):
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited == PATIENCE:
            return i
    return len(losses) - 1


def report(pairs: Sequence[tuple[str, Record, Record | None]], resource: str) -> None:
    """The table, and what the rule said of every curve."""
    if not pairs:
        print("There are no curves yet: run without --print.")
        return
    print(
        "| curve | loss at the end | best | marginal return: ends at | saved | loss against the end | "
        f"EarlyStopping({PATIENCE}): ends at | saved | loss against the end |"
    )
    print("|---" * 9 + "|")
    said = {}
    for name, record, again in pairs:
        points = record["points"]
        losses = [point["eval_loss"] for point in points]
        found = decisions(record, resource)
        said[name] = found[-1].reason
        best = min(range(len(losses)), key=losses.__getitem__)
        ours = outcome(points, len(found) - 1, resource)
        if again is not None:
            last = again["points"][-1]
            ours = cells(f"a schedule of {again['steps']}", last, points[-1], resource)
            said[name] = next(d.proposal for d in reversed(found) if d.proposal) or ""
        theirs = outcome(points, early_stop(losses), resource)
        print(f"| {name} | {losses[-1]:.4f} | {losses[best]:.4f} at {points[best]['step']} | {ours} | {theirs} |")
    print()
    for name, words in said.items():
        print(f"- **{name}**: {words}")


def outcome(points: Sequence[dict[str, float]], at: int, resource: str) -> str:
    """Three cells of the table: an end at one of a curve's own evaluations."""
    end = "the end" if at == len(points) - 1 else f"step {points[at]['step']}"
    return cells(end, points[at], points[-1], resource)


def cells(end: str, reached: dict[str, float], whole: dict[str, float], resource: str) -> str:
    """Where a training ended, what that saved, and what it lost."""
    saved = 1 - reached[resource] / whole[resource]
    return f"{end} | {saved:.0%} | {reached['eval_loss'] / whole['eval_loss'] - 1:+.2%}"


if __name__ == "__main__":
    main()
