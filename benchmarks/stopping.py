"""Does stopping pay? Held-out loss of SmolLM2-135M along short trainings, and where the marginal-return rule ends them.

    python -m benchmarks stopping --data FOLDER [--curves NAME ...] [--steps N] [--resource flops|seconds|tokens]

Two sets: answers of GSM8K as texts, and docstrings of Python's standard library. Every curve trains a placement
(keep=0.85) on batches of 4 short examples, AdamW without decay, three steps of warm-up and then a constant rate or a
cosine to zero, and is evaluated every few steps on the same 8 held-out examples. On 16 or 32 examples it comes to a
plateau, or overfits; "many" sees every example once, is still falling at the end, and should not be stopped. Finished
curves are appended to --out and not trained again; --print trains nothing.

Then every curve is replayed through MarginalReturn and through transformers' EarlyStoppingCallback(patience=3): the share
of the resource that is saved, and how much higher than at the end of the budget the loss is at the stop. Under a cosine
the rule never stops; the schedule that it last proposed is then trained as a curve of its own, and compared. What
evaluations cost is not counted.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from peft_blueprint.measure import Row, encode, make_batches
from peft_blueprint.place import CostModel, Structure
from peft_blueprint.runs import Decision, MarginalReturn
from peft_blueprint.train import held_out_loss

from . import setup
from .study.ground import Ground
from .study.plan import Study, digest


KEEP = 0.85
BATCH, STEPS, EVERY, HELD_OUT, PATIENCE, WARM_UP = 4, 48, 2, 8, 3, 3
LEARNING_RATE = 2e-3
LENGTHS = {"demo": 40, "gsm8k": 54, "numbers": 16}  # tokens of an example at most: about 5 TFLOP a curve
MANY = 10**6
QUICK = {"curves": ["numbers, 8", "numbers, 8, cosine"], "steps": 12}

Record = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """One training.

    Args:
        data: a set.
        examples: of the training set; MANY for all that the steps have room for, each once.
        schedule: of the learning rate after warm-up, "constant" or "cosine".
        rate: the highest learning rate, over the placement's own.
        steps: None for what --steps says.
    """

    data: str
    examples: int
    schedule: str = "constant"
    rate: float = 1.0
    steps: int | None = None


CURVES = {
    **{f"{name}, many": Curve(data, MANY) for name, data in (("docs", "demo"), ("gsm8k", "gsm8k"))},
    **{
        f"{name}, {examples}{', cosine' if schedule == 'cosine' else ''}": Curve(data, examples, schedule, rate)
        for name, data in (("docs", "demo"), ("gsm8k", "gsm8k"))
        for schedule in ("constant", "cosine")
        for examples, rate in ((16, 1.0), (32, 0.5))
    },
}
QUICK_CURVES = {"numbers, 8": Curve("numbers", 8), "numbers, 8, cosine": Curve("numbers", 8, "cosine")}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--curves", nargs="+", choices=list(CURVES), default=list(CURVES), metavar="NAME")
    parser.add_argument("--steps", type=int, default=STEPS, help="the fixed budget")
    parser.add_argument("--every", type=int, default=EVERY, help="steps from one evaluation to the next")
    parser.add_argument("--seed", type=int, default=0, help="of the draw, the order and the adapters")
    parser.add_argument("--resource", choices=["flops", "seconds", "tokens"], default="flops")
    parser.add_argument("--out", type=Path, default=setup.CACHE / "stopping.jsonl")
    parser.add_argument("--print", action="store_true", dest="prints", help="train nothing")


def main(options: argparse.Namespace) -> None:
    """Train the missing curves, replay, and print the table."""
    if options.quick:
        options.out = setup.CACHE / "quick" / "stopping.jsonl"
        options.out.unlink(missing_ok=True)
    track = Track(options)
    records = setup.Records(options.out)

    def recorded(curve: Curve) -> Record | None:
        make = None if options.prints else functools.partial(track.train, curve)
        return records.get(track.key(curve), make)

    found: list[tuple[str, Record, Record | None]] = []
    for name in options.curves:
        curve = replace((QUICK_CURVES if options.quick else CURVES)[name], steps=options.steps)
        record = recorded(curve)
        if record is not None:
            share = _proposed(_decisions(record, options.resource))
            is_again = curve.schedule == "cosine" and share is not None
            again = recorded(replace(curve, steps=max(1, round((share or 0) * options.steps)))) if is_again else None
            found.append((name, record, again))
    print(f"Batches of {BATCH}, {options.steps} steps, an evaluation every {options.every}, {setup.device_name()}\n")
    _report(found, options.resource)


class Track:
    """The model and the sets' batches, made when first asked for."""

    def __init__(self, options: argparse.Namespace):
        # the placement is by 64 examples of GSM8K, for both sets
        sizes: dict[str, Any] = {"data": "gsm8k", "length": 100}
        if options.quick:
            sizes = {"data": "numbers", "model": "tiny", "length": 16, "rank": 4, "measured": 4}
        self.ground = Ground(Study("stopping", **sizes), options.data, setup.CACHE / "measured")
        self.seed = options.seed
        self.every = options.every

    @functools.cached_property
    def placement(self) -> Any:
        """The same for all curves."""
        return self.ground.plan(keep=KEEP, ranks="equal_parameters")

    @functools.cache  # noqa: B019  one track lives as long as the process
    def rows(self, data: str, split: setup.Split) -> list[Row]:
        """Short rows of a set, shuffled; of GSM8K the answers alone. All seeds are evaluated on the same."""
        seed = self.seed if split == "train" else 0
        folder, tokenizer = self.ground.folder, self.ground.tokenizer
        if data != "gsm8k":
            return setup.read_rows(data, folder, split, tokenizer, LENGTHS[data], seed)
        texts = [{"text": one["completion"]} for one in setup.read_examples(data, folder, split)]
        rows = [row for row in encode(texts, tokenizer, setup.LONGEST) if len(row["input_ids"]) <= LENGTHS[data]]
        return setup.shuffled(rows, seed)

    @functools.cache  # noqa: B019
    def per_token(self, data: str) -> float:
        """FLOPs of a training step per token, padding included, by the cost model."""
        workload = replace(self.ground.workload, batch_size=BATCH, length=LENGTHS[data])
        costs = CostModel(Structure.of(self.ground.shell), workload)
        return float(costs.cost(dict.fromkeys(self.placement.lora, self.placement.rank)).flops)

    @property
    def rate(self) -> float:
        """The learning rate of a curve of rate 1."""
        return LEARNING_RATE * float(self.placement.learning_rate_scale or 1.0)

    def key(self, curve: Curve) -> str:
        """Return a digest of all that bears on a curve."""
        own = [self.seed, self.every, LENGTHS[curve.data], BATCH, HELD_OUT, WARM_UP, self.rate]
        return digest([asdict(curve), *own, list(self.placement.lora), self.placement.rank])

    def train(self, curve: Curve) -> Record:
        """Train a curve; its points are step, held-out loss, learning rate and cost so far."""
        assert curve.steps is not None
        rows = self.rows(curve.data, "train")
        wanted = curve.steps * BATCH if curve.examples == MANY else curve.examples
        if len(rows) < wanted:
            raise SystemExit(
                f"{curve.data} has {len(rows)} examples of at most {LENGTHS[curve.data]} tokens, and {wanted} are "
                "needed. Ask for fewer steps."
            )
        test = make_batches(self.rows(curve.data, "test")[:HELD_OUT], BATCH, self.ground.pad)
        model = self.ground.adapted(self.placement, self.seed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
        tokens, seconds, points = 0, 0.0, []
        batches = setup.random_batches(rows[:wanted], BATCH, self.seed, curve.steps)
        for step, part in enumerate(batches, start=1):
            rate = self.rate * curve.rate * _factor(curve.schedule, step, curve.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = setup.on_device(part, self.ground.pad)
            start = time.perf_counter()
            setup.train_step(model, optimizer, batch)
            seconds += time.perf_counter() - start
            tokens += batch["input_ids"].numel()
            if step % self.every == 0 or step == curve.steps:
                spent = {"seconds": seconds, "tokens": tokens, "flops": tokens * self.per_token(curve.data)}
                loss = held_out_loss(model, test, progress=False)
                points.append({"step": step, "eval_loss": loss, "learning_rate": rate, **spent})
        return {"curve": asdict(curve), "steps": curve.steps, "points": points}


def _factor(schedule: str, step: int, steps: int) -> float:
    """Return the share of the highest learning rate at a step, counted from 1."""
    if step <= WARM_UP or schedule == "constant":
        return min(1.0, step / WARM_UP)
    return (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP + 1))) / 2


def _decisions(record: Record, resource: str) -> list[Decision]:
    """Return MarginalReturn's decision at every evaluation, up to its stop; the budget is the whole curve's."""
    points = record["points"]
    rule = MarginalReturn(budget=points[-1][resource])
    found = []
    for point in points:
        said = rule.check(
            point[resource],
            point["eval_loss"],
            step=point["step"],
            learning_rate=point["learning_rate"],
            progress=point["step"] / record["steps"],
        )
        found.append(said)
        if said.stop:
            break
    return found


def _proposed(said: Sequence[Decision]) -> float | None:
    """Return the share of the schedule that was proposed last."""
    return next((d.proposed_progress for d in reversed(said) if d.proposed_progress is not None), None)


def early_stop(losses: Sequence[float]) -> int:
    """Return the evaluation at which EarlyStoppingCallback stops: the third in a row that is no better than the best."""
    best, waited = math.inf, 0
    for i, loss in enumerate(losses):
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited == PATIENCE:
            return i
    return len(losses) - 1


def _report(found: Sequence[tuple[str, Record, Record | None]], resource: str) -> None:
    """Print the table, and the rule's reason for every curve."""
    rows, reasons = [], []
    for name, record, again in found:
        points = record["points"]
        losses = [point["eval_loss"] for point in points]
        said = _decisions(record, resource)
        best = min(range(len(losses)), key=losses.__getitem__)
        reason, ours = said[-1].reason, _cells(points, points[len(said) - 1], resource)
        if again is not None:
            reason = next((d.proposal for d in reversed(said) if d.proposal), reason)
            ours = _cells(points, again["points"][-1], resource)
            ours[0] = f"a schedule of {again['steps']}"
        theirs = _cells(points, points[early_stop(losses)], resource)
        rows.append([name, f"{losses[-1]:.4f}", f"{losses[best]:.4f} at {points[best]['step']}", *ours, *theirs])
        reasons.append(f"- **{name}**: {reason}")
    outcome = ["saved", "loss against the end"]
    columns = ["curve", "loss at the end", "best", "marginal return: ends at", *outcome]
    setup.print_table([*columns, f"EarlyStopping({PATIENCE}): ends at", *outcome], rows)
    print("\n" + "\n".join(reasons))


def _cells(points: Sequence[Record], reached: Record, resource: str) -> list[str]:
    """Return where a training ended, what that saved, and what it lost."""
    whole = points[-1]
    end = "the end" if reached is whole else f"step {reached['step']}"
    loss = f"{reached['eval_loss'] / whole['eval_loss'] - 1:+.2%}"
    return [end, f"{1 - reached[resource] / whole[resource]:.0%}", loss]
