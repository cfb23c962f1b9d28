"""One job: an arm trained once, and all that is measured of it, as a record that JSON can say.

Knows training and evaluation. Knows nothing of which jobs there are, or where records go.
"""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from peft_blueprint.data import Row, collate
from peft_blueprint.measure import per_example_losses, versions
from peft_blueprint.runs import Ledger

from .arms import Choice, charge_of, cost_of
from .data import in_batches, steps_of, tokens_of
from .ground import Ground
from .starts import Ready, ready
from .study import Job


def run(ground: Ground, job: Job, choice: Choice) -> dict[str, Any]:
    """Train and measure; what a result file holds beside the job and the study."""
    study, data = ground.study, ground.data
    kept, spent = tuple(range(len(data.train))), charge_of(ground, choice, job.entry.blueprint)
    if job.entry.select:
        kept, of_choosing = ground.selected(job.entry.select, job.entry.share)
        spent += of_choosing
    batches = steps_of([data.train[i] for i in kept], study.batch, job.steps, job.seed)
    rate = study.rate * 2.0**job.octave
    with Ledger() as ledger:
        before = resident()
        begun = ready(ground, choice, job.steps, job.seed)
        start = time.perf_counter()
        losses, curve = train(ground, begun, batches, rate)
        seconds = time.perf_counter() - start
    spent += begun.charge
    found, counts = losses_of(ground, begun.model, data.test)
    is_sound = all(map(math.isfinite, found))
    of_curve = losses_of(ground, begun.model, data.spare) if data.spare else (found[: study.few], counts[: study.few])
    curve.append((job.steps, mean_of(*of_curve)))
    cost = cost_of(ground, choice)
    ratio = ground.costs.time_ratio(cost) if job.steps else 0.0
    tokens = tokens_of(batches)
    return {
        "status": "done" if is_sound else "diverged",
        "rate": rate,
        "loss": mean_of(found, counts) if is_sound else None,
        "losses": [round(loss, 5) for loss in found] if is_sound else [],
        "counts": counts,
        "curve": [[step, loss] for step, loss in curve if math.isfinite(loss)],
        "training": [round(loss, 5) if math.isfinite(loss) else None for loss in losses],
        "unrelated": {name: mean_of(*losses_of(ground, begun.model, rows)) for name, rows in data.unrelated.items()}
        if is_sound
        else {},
        "accuracy": accuracy(begun.model, data.questions, data.options, ground.device) if data.questions else None,
        "parameters": sum(p.numel() for p in begun.model.parameters() if p.requires_grad),
        "modules": len(choice.ranks) or len(choice.whole),
        "ranks": dict(choice.ranks),
        "whole": list(choice.whole),
        "lowest": cost.lowest,
        "kept": predicted(ground, choice),
        "examples": len(kept),
        "tokens": tokens,
        "flops": cost.flops * tokens if job.steps else 0.0,
        "charged_flops": spent.flops,
        "step_time": ratio,
        "time": ratio * job.steps + spent.steps,
        "charged_time": spent.steps,
        "memory": cost.bytes,
        "peak_bytes": _above(ledger.peak_bytes, before),
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if ground.device == "cuda" else platform.processor() or "cpu",
        "versions": versions(),
    }


def predicted(ground: Ground, choice: Choice) -> float | None:
    """Share of all-linear's gain that the planner predicts of plain adapters; None of what trains otherwise."""
    is_plain = choice.start == "lora" and choice.ahead == 1.0 and not choice.factors
    return ground.cover.of(list(choice.ranks)) if choice.ranks and is_plain else None


def train(
    ground: Ground, begun: Ready, batches: Sequence[Sequence[Row]], rate: float
) -> tuple[list[float], list[tuple[int, float]]]:
    """AdamW without decay, a few steps of rising learning rate and then a linear fall to nought. Where there are fewer
    steps than the study's, those of rising learning rate are fewer too.

    Returns:
        The training loss of every step, and (step, held-out loss of the few) every few steps but the last.
    """
    study, model = ground.study, begun.model
    losses: list[float] = []
    curve: list[tuple[int, float]] = []
    if not batches:
        return losses, curve
    optimizer = torch.optim.AdamW(begun.groups, lr=rate, weight_decay=0.0)
    few = ground.data.spare or ground.data.test[: study.few]
    warm_up = max(1, round(study.warm_up * len(batches) / study.steps))
    for step, rows in enumerate(batches, start=1):
        share = min(step / warm_up, (len(batches) - step + 1) / max(1, len(batches) - warm_up + 1))
        for group in optimizer.param_groups:
            group["lr"] = rate * share * group["factor"]
        losses.append(one_step(ground, begun, optimizer, rows, step))
        if not math.isfinite(losses[-1]):
            break
        if step % study.every == 0 and step < len(batches):
            curve.append((step, mean_of(*losses_of(ground, model, few))))
    return losses, curve


def one_step(
    ground: Ground, begun: Ready, optimizer: torch.optim.Optimizer, rows: Sequence[Row], step: int = 1
) -> float:
    """Forward, backward, update; the batch's loss."""
    batch = {key: value.to(ground.device) for key, value in collate(rows, ground.data.pad).items()}
    with _mixed(ground, begun):
        loss: Tensor = begun.model(**batch).loss
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    if type(begun.model.base_model).__name__ == "AdaLoraModel":
        begun.model.base_model.update_and_allocate(step)  # type: ignore[operator,union-attr]
    optimizer.zero_grad()
    return float(loss.detach())


def losses_of(ground: Ground, model: nn.Module, rows: Sequence[Row]) -> tuple[list[float], list[int]]:
    """Every example's mean loss per target token, and how many it has."""
    model.eval()
    losses: list[float] = []
    counts: list[int] = []
    with torch.no_grad():
        for some in in_batches(rows, ground.study.batch):
            batch = {key: value.to(ground.device) for key, value in collate(some, ground.data.pad).items()}
            loss, count = per_example_losses(model, batch)
            losses += loss.tolist()
            counts += count.tolist()
    model.train()
    return losses, counts


def mean_of(losses: Sequence[float], counts: Sequence[int]) -> float:
    """Per target token."""
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def accuracy(
    model: nn.Module, questions: Sequence[tuple[Sequence[int], int]], options: Sequence[int], device: str
) -> float:
    """Share of the questions whose right decision is the likeliest of the options."""
    right = 0
    model.eval()
    with torch.no_grad():
        for prompt, answer in questions:
            ids = torch.tensor([list(prompt)], device=device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1).logits[0, -1]
            right += int(logits[list(options)].argmax()) == answer
    return right / len(questions)


def step_seconds(ground: Ground, choice: Choice, base: nn.Module) -> float:
    """Of the second of two steps, on a model that is given back as it was but for its gradients' flags.

    The learning rate is 0, so that nothing is learnt.
    """
    begun = ready(
        ground, Choice(choice.ranks, choice.whole, "adalora" if choice.start == "adalora" else "lora"), 6, 0, base
    )
    optimizer = torch.optim.AdamW(begun.groups, lr=0.0, weight_decay=0.0)
    longest = sorted(ground.data.train, key=lambda row: len(row["input_ids"]))[-ground.study.batch :]
    one_step(ground, begun, optimizer, longest)
    with Ledger() as ledger:
        one_step(ground, begun, optimizer, longest)
    if begun.model is not base:
        begun.model.unload()  # type: ignore[operator]
    base.requires_grad_(False)
    return ledger.seconds


def stop_share(points: Sequence[Sequence[float]], steps: int) -> tuple[float, str]:
    """At which share of its steps a run might have ended, by its curve, and what said so.

    `peft_blueprint.stopping`'s rule, told the learning rates of a linear fall: where it stops, or the shorter schedule it
    proposes. Where it does neither, the first point that has nine tenths of the curve's whole decrease.

    Args:
        points: (step, held-out loss), from step 0.
        steps: of the run.
    """
    from peft_blueprint.runs import MarginalReturn

    rule = MarginalReturn(budget=float(steps))
    for step, loss in points:
        falling = max(0.0, 1 - step / steps)
        decision = rule.check(float(step), loss, step=int(step), learning_rate=falling, progress=step / steps)
        if decision.stop and step:
            return step / steps, "marginal return"
        if decision.proposed_progress is not None:
            return decision.proposed_progress, "marginal return"
    first, best = points[0][1], min(loss for _, loss in points)
    enough = first - 0.9 * (first - best)
    return next(step for step, loss in points if loss <= enough) / steps, "nine tenths of the decrease"


def _mixed(ground: Ground, begun: Ready) -> contextlib.AbstractContextManager[object]:
    if not begun.is_whole or ground.study.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(ground.device, dtype=getattr(torch, ground.study.dtype))


def resident() -> int:
    """Bytes that the process, or on a GPU its allocator, holds."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else int(psutil.Process().memory_info().rss)


def _above(peak: int | None, before: int) -> int | None:
    return None if peak is None else max(0, peak - before)
