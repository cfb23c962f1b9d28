"""Run one job: prepare the model as its arm says, train it, evaluate it, and return a record for the archive."""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from peft import AdaLoraConfig, EvaConfig, LoraConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers import set_seed

from peft_blueprint.measure import Objective, Row, versions
from peft_blueprint.runs import Ledger
from peft_blueprint.train import initialize_along_gradient

from ..setup import in_batches, linear_schedule, on_device, random_batches, resident_bytes, tokens_of
from .arms import GRADIENT, Choice, charge_of
from .ground import Charge, Ground
from .plan import Job, digest


SCALING = 2  # alpha over rank, of every adapter
LOOKS = 20  # at the measured examples, before EVA is given up


@dataclass(frozen=True)
class Ready:
    """A model about to be trained.

    Args:
        ground: where it comes from.
        model: with gradients where it is trained.
        ahead: factor on the learning rate of every B.
        is_mixed: whether half precision is left to autocast, because weights of the model itself are trained.
        charge: what the start took, where that is only known by doing it.
    """

    ground: Ground
    model: Any
    ahead: float = 1.0
    is_mixed: bool = False
    charge: Charge = Charge()

    def optimizer(self, rate: float) -> torch.optim.Optimizer:
        """AdamW without decay; its groups carry a `factor` on the learning rate."""
        by_factor: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                by_factor.setdefault(self.ahead if ".lora_B." in name else 1.0, []).append(parameter)
        groups = [{"params": members, "factor": factor} for factor, members in by_factor.items()]
        return torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)

    def step(self, optimizer: torch.optim.Optimizer, rows: Sequence[Row], number: int = 1) -> float:
        """Run forward, backward and update; return the batch's loss."""
        half = getattr(torch, self.ground.study.dtype)
        with torch.autocast(self.ground.device, half) if self.is_mixed else contextlib.nullcontext():
            loss: Tensor = self.model(**on_device(rows, self.ground.pad)).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if type(self.model.base_model).__name__ == "AdaLoraModel":
            self.model.base_model.update_and_allocate(number)
        optimizer.zero_grad()
        return float(loss.detach())


def run(ground: Ground, job: Job, choice: Choice) -> dict[str, Any]:
    """Train and evaluate a job; return its record without the job and the study."""
    study, data = ground.study, ground.data_of(job.seed)
    kept, spent = tuple(range(len(data.train))), charge_of(ground, choice, job.entry.blueprint)
    if job.entry.select:
        kept, of_choosing = ground.selected(job.entry.select, job.entry.share, job.seed if study.resample else 0)
        spent += of_choosing
    batches = random_batches([data.train[i] for i in kept], study.batch, job.seed, job.steps)
    rate = study.rate * 2.0**job.octave
    curve_rows = data.spare or data.test[: study.few]
    with Ledger() as ledger:
        before = resident_bytes()
        ready = prepare(ground, choice, job.steps, job.seed)
        start = time.perf_counter()
        losses, curve = train(ready, batches, rate, curve_rows)
        seconds = time.perf_counter() - start
    spent += ready.charge
    found, counts = losses_of(ready, data.test)
    is_sound = all(map(math.isfinite, found))
    last = losses_of(ready, data.spare) if data.spare else (found[: study.few], counts[: study.few])
    curve.append((job.steps, mean_of(*last)))
    unrelated = {name: mean_of(*losses_of(ready, rows)) for name, rows in data.unrelated.items()} if is_sound else {}
    cost = ground.costs.cost(dict(choice.ranks), choice.whole)
    ratio = ground.costs.time_ratio(cost) if job.steps else 0.0
    tokens = tokens_of(batches)
    return {
        "status": "done" if is_sound else "diverged",
        "rate": rate,
        "loss": mean_of(found, counts) if is_sound else None,
        "losses": [round(loss, 5) for loss in found] if is_sound else [],
        "counts": counts,
        "tested": list(data.tested) if study.resample else None,
        "curve": [[step, loss] for step, loss in curve if math.isfinite(loss)],
        "training": [round(loss, 5) if math.isfinite(loss) else None for loss in losses],
        "unrelated": unrelated,
        "accuracy": accuracy(ready, data.questions, data.options) if data.questions else None,
        "parameters": sum(p.numel() for p in ready.model.parameters() if p.requires_grad),
        "modules": len(choice.ranks) or len(choice.whole),
        "ranks": dict(choice.ranks),
        "whole": list(choice.whole),
        "lowest": cost.lowest,
        "kept": predicted_gain(ground, choice),
        "examples": len(kept),
        "tokens": tokens,
        "flops": cost.flops * tokens if job.steps else 0.0,
        "charged_flops": spent.flops,
        "step_time": ratio,
        "time": ratio * job.steps + spent.steps,
        "charged_time": spent.steps,
        "memory": cost.bytes,
        "peak_bytes": None if ledger.peak_bytes is None else max(0, ledger.peak_bytes - before),
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if ground.device == "cuda" else platform.processor() or "cpu",
        "versions": versions(),
    }


def predicted_gain(ground: Ground, choice: Choice) -> float | None:
    """Return the share of all-linear's gain that the planner predicts of plain adapters."""
    is_plain = choice.start == "lora" and choice.ahead == 1.0
    return ground.cover.of(list(choice.ranks)) if choice.ranks and is_plain else None


# ---- the start


def prepare(ground: Ground, choice: Choice, steps: int, seed: int, base: Any = None) -> Ready:
    """Put a choice's adapters on a fresh model, or make the chosen modules trainable.

    Args:
        ground: where models come from.
        choice: the trained weights.
        steps: of training, which AdaLoRA must know.
        seed: of the adapters' first weights.
        base: a model to use instead of a fresh one; adapters change it.
    """
    is_mixed = bool(choice.whole) and ground.study.dtype != "float32"  # weights in half precision miss small steps
    model = base if base is not None else ground.model("float32" if is_mixed else None)
    set_seed(seed)
    charge = Charge()
    if choice.whole:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(name == w or name.startswith(w + ".") for w in choice.whole))
    elif choice.ranks:
        model, charge = _adapted(ground, choice, model, steps, seed)
    return Ready(ground, model.train(), choice.ahead, is_mixed, charge)


def _adapted(ground: Ground, choice: Choice, model: Any, steps: int, seed: int) -> tuple[Any, Charge]:
    measured = ground.data_of(0).measured
    if choice.start == "adalora":
        return get_peft_model(model, _adalora(choice, steps)), Charge()
    if choice.start == "eva":
        config = lora(choice, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))  # every rank stays as it is
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
        batches = ground.batches(measured)
        passes = count(1)

        def forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
            if next(passes) > LOOKS * len(batches):
                raise RuntimeError(f"EVA has not converged after {LOOKS} passes over the measured examples.")
            return model(**inputs)

        initialize_lora_eva_weights(adapted, batches, forward_fn=forward, show_progress_bar=False)
        further = (next(passes) - 1) / len(batches) - 1  # one pass is charged already
        once = ground.passes(measured, forward=1)
        return adapted, Charge(once.flops * further, once.steps * further)
    if choice.start == "lora_ga":
        config = lora(choice, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

        def look() -> None:
            for batch in ground.batches(measured):
                model(**batch).loss.backward()

        model.enable_input_require_grads()  # PEFT counts passes with hooks that need a gradient to go through
        preprocess_loraga(model, config, look)
        model.disable_input_require_grads()
        return get_peft_model(model, config), Charge()
    adapted = get_peft_model(model, lora(choice))
    if ground.study.resample:
        _draw_by_name(adapted, seed)
    if choice.start.startswith(GRADIENT):
        number = int(choice.start.removeprefix(GRADIENT))
        initialize_along_gradient(adapted, ground.batches(measured), max_examples=number, progress=False)
    return adapted, Charge()


def _draw_by_name(model: nn.Module, seed: int) -> None:
    """Draw every A again as PEFT does, from the seed and the module's name, so that arms share what they have in common."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(int(digest([seed, name]), 16) % 2**63)
            values = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=math.sqrt(5), generator=generator)
            parameter.data.copy_(values)


def lora(choice: Choice, **settings: Any) -> LoraConfig:
    """Return PEFT's config, every adapter with the same scaling."""
    usual = max(set(choice.ranks.values()), key=list(choice.ranks.values()).count)
    others = {name: rank for name, rank in choice.ranks.items() if rank != usual}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=usual,
        lora_alpha=SCALING * usual,
        target_modules=list(choice.ranks),
        rank_pattern=others,
        alpha_pattern={name: SCALING * rank for name, rank in others.items()},
        **settings,
    )


def _adalora(choice: Choice, steps: int) -> AdaLoraConfig:
    """Begin at the choice's rank and prune to two thirds of it, between a sixth and two thirds of the steps."""
    rank = max(choice.ranks.values())
    return AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=rank,
        target_r=max(1, round(2 * rank / 3)),
        tinit=steps // 6,
        tfinal=steps // 3,
        total_step=max(2, steps),
        lora_alpha=SCALING * rank,
        target_modules=list(choice.ranks),
    )


# ---- training and evaluation


def train(
    ready: Ready, batches: Sequence[Sequence[Row]], rate: float, curve_rows: Sequence[Row]
) -> tuple[list[float], list[tuple[int, float]]]:
    """Train with a linear warm-up, which takes the same share of fewer steps, and a linear fall to zero.

    Returns:
        The loss of every step, and (step, loss of `curve_rows`) every few steps except the last.
    """
    study, steps = ready.ground.study, len(batches)
    losses: list[float] = []
    curve: list[tuple[int, float]] = []
    if not batches:
        return losses, curve
    optimizer = ready.optimizer(rate)
    warm_up = max(1, round(study.warm_up * steps / study.steps))
    for step, rows in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate * linear_schedule(step, steps, warm_up) * group["factor"]
        losses.append(ready.step(optimizer, rows, step))
        if not math.isfinite(losses[-1]):
            break
        if step % study.every == 0 and step < steps:
            curve.append((step, mean_of(*losses_of(ready, curve_rows))))
    return losses, curve


@torch.no_grad()
def losses_of(ready: Ready, rows: Sequence[Row]) -> tuple[list[float], list[int]]:
    """Return every example's mean loss per target token, and its number of targets."""
    model = ready.model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))  # so that little is padded
    losses, counts = [0.0] * len(rows), [0] * len(rows)
    objective = Objective(model)
    for part in in_batches(order, ready.ground.study.batch):
        loss, number = objective.losses(on_device([rows[i] for i in part], ready.ground.pad))
        for i, one, targets in zip(part, loss.tolist(), number.tolist(), strict=True):
            losses[i], counts[i] = one, targets
    model.train()
    return losses, counts


def mean_of(losses: Sequence[float], counts: Sequence[int]) -> float:
    """Return the mean per target token."""
    return sum(loss * number for loss, number in zip(losses, counts, strict=True)) / sum(counts)


@torch.no_grad()
def accuracy(ready: Ready, questions: Sequence[tuple[Sequence[int], int]], options: Sequence[int]) -> float:
    """Return the share of questions whose right decision is the likeliest of the options."""
    right = 0
    model = ready.model.eval()
    for prompt, answer in questions:
        ids = torch.tensor([list(prompt)], device=ready.ground.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1).logits[0, -1]
        right += int(logits[list(options)].argmax()) == answer
    model.train()
    return right / len(questions)


def step_seconds(ground: Ground, choice: Choice, base: Any) -> float:
    """Time the second of two steps at learning rate 0, on a model that is returned without its adapters."""
    start = "adalora" if choice.start == "adalora" else "lora"
    ready = prepare(ground, Choice(choice.ranks, choice.whole, start), 6, 0, base)
    optimizer = ready.optimizer(0.0)
    longest = sorted(ground.data_of(0).train, key=lambda row: len(row["input_ids"]))[-ground.study.batch :]
    ready.step(optimizer, longest)
    with Ledger() as ledger:
        ready.step(optimizer, longest)
    if ready.model is not base:
        ready.model.unload()
    base.requires_grad_(False)
    return ledger.seconds
