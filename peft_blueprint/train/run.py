"""One YAML, one run: measure a probe, settle a blueprint, plan, place, train, and report what was gained for what was
spent.

Every step is a function of its own, for those who want to take them singly. Knows everything below it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from .._files import require_writable, write_atomically
from ..blueprint import Blueprint, fetch
from ..compare import check_drift, reconcile
from ..data import Row, encode, make_batches, pad_token_of, read_examples
from ..errors import BlueprintError
from ..measure import (
    dtype_of,
    empty_model,
    find_submodules,
    generate_blueprint,
    load_model,
    load_tokenizer,
    per_example_losses,
)
from ..place import BlueprintConfig, Workload
from ..runs import Figure, Ledger, carbon_factor
from .recipe import ALL_LINEAR, WISHES, Recipe
from .recipe_plan import (
    Plan,
    budget_of,
    learning_rate_of,
    plan,
    step_of,
    training_settings,
    unquantized,
)
from .recipe_training import start, train, with_ends, with_probe
from .unfreezing import share_base


@dataclass(frozen=True)
class Prepared:
    """A run up to its training: what every trainer needs.

    Args:
        model: the base, without an adapter.
        tokenizer: its own.
        examples: of the training data.
        rows: the same as tokens and labels.
        config: of the adapter.
        plan: what is adapted, with what that is predicted to cost.
        learning_rate: None where the training's own counts.
        drift: rank correlation of probe and published blueprint, None without both.
        probe: what the probe spent; empty without one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Mapping[str, Any]]
    rows: Sequence[Row]
    config: LoraConfig
    plan: Plan
    learning_rate: float | None
    drift: float | None
    probe: Mapping[str, Figure]


@dataclass(frozen=True)
class Report:
    """What a run gained and spent. Losses are nats per target token on the held-out examples.

    Args:
        placed: how many submodules got an adapter.
        unfrozen: how many blocks are trained whole.
        trainable_parameters: of adapters and unfrozen blocks.
        steps: optimizer steps.
        loss_before: None without held-out examples.
        loss_after: the same, after training.
        measure_seconds: of the probe, and of beginning along the gradient.
        train_seconds: of training alone.
        peak_bytes: while training, None where it cannot be measured.
        drift: rank correlation of probe and published blueprint, None without both.
        output: where the adapter is.
        learning_rate: of the run, at its highest.
        learning_rate_scale: what the plan says of it, over what suits LoRA on every linear layer; None where nothing
            predicts it.
        predicted_time: of a step, over that of LoRA on every linear layer.
        predicted_bytes: at a step's peak, without what the process or CUDA's context take; None where not known.
        kept: predicted share of all-linear LoRA's gain, None where nothing predicts it.
        lowest: depth at which the backward pass stops.
    """

    placed: int
    unfrozen: int
    trainable_parameters: int
    steps: int
    loss_before: float | None
    loss_after: float | None
    measure_seconds: float
    train_seconds: float
    peak_bytes: int | None
    drift: float | None
    output: str
    learning_rate: float
    learning_rate_scale: float | None
    predicted_time: float | None
    predicted_bytes: int | None
    kept: float | None
    lowest: int | None


def run_recipe(recipe: Recipe, *, progress: bool = True) -> Report:
    """Carry out a recipe: the adapter goes to `recipe.output`, with `report.json` and the books, `run.json`, beside it.

    Raises:
        BlueprintError: for data, blueprint or wishes that cannot be used; nothing is written then.
    """
    recipe.check()  # what is wrong should not wait for the model
    arguments = _training_arguments(recipe, progress)
    require_writable(Path(recipe.output))
    kept_out = (
        read_examples(recipe.held_out, recipe.columns, split="test", limit=recipe.held_out_examples)
        if recipe.held_out
        else []
    )
    prepared = prepare(recipe, arguments, progress=progress)
    pad = pad_token_of(prepared.tokenizer)
    evaluation = encode(kept_out, prepared.tokenizer, recipe.max_length) if kept_out else []
    held_out = make_batches(evaluation, arguments.per_device_eval_batch_size, pad)
    loss_before = held_out_loss(prepared.model, held_out, progress=progress) if held_out else None

    adapted = get_peft_model(prepared.model, prepared.config)
    if recipe.share_base:
        share_base(adapted)
    if prepared.learning_rate is not None:
        arguments.learning_rate = prepared.learning_rate
    started = start(adapted, recipe, prepared.rows, pad, progress=progress)
    with Ledger() as spent:
        trained = train(
            adapted,
            prepared.rows,
            arguments,
            pad,
            held_out=evaluation,
            stop=recipe.stop,
            carbon=recipe.carbon,
        )
    loss_after = held_out_loss(adapted, held_out, progress=progress) if held_out else None
    adapted.save_pretrained(recipe.output)
    prepared.tokenizer.save_pretrained(recipe.output)
    planned = prepared.plan
    unfrozen = len(planned.placement.unfreeze) if planned.placement is not None else 0
    placed = sum(name.endswith("lora_A") for name, _ in adapted.named_modules())
    before = [figures["seconds"].value or 0.0 for figures in (prepared.probe, started) if figures]
    report = Report(
        placed=placed,
        unfrozen=unfrozen,
        trainable_parameters=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        steps=trained.steps,
        loss_before=loss_before,
        loss_after=loss_after,
        measure_seconds=sum(before),
        train_seconds=spent.seconds,
        peak_bytes=spent.peak_bytes,
        drift=prepared.drift,
        output=recipe.output,
        learning_rate=arguments.learning_rate,
        learning_rate_scale=planned.learning_rate_scale,
        predicted_time=planned.time,
        predicted_bytes=planned.memory,
        kept=planned.kept,
        lowest=planned.lowest,
    )
    write_atomically(Path(recipe.output) / "report.json", json.dumps(asdict(report), indent=2) + "\n")
    books = with_ends(trained, loss_before, loss_after)
    books = with_probe(books, started, {}, "start")
    with_probe(books, prepared.probe, {"train": recipe.train, "held_out": recipe.held_out}).save(recipe.output)
    return report


def prepare(recipe: Recipe, arguments: TrainingArguments, *, progress: bool = True) -> Prepared:
    """Everything before the training: data, model, probe, drift check, blend, plan.

    Blocks that are to be unfrozen in a quantised model are chosen before it is loaded, by the published blueprint; a
    probe then only checks that it fits the data.

    Args:
        recipe: the run.
        arguments: transformers' or TRL's, made from `training_settings(recipe)`.
        progress: show bars.

    Raises:
        BlueprintError: for data, blueprint or wishes that cannot be used.
    """
    recipe.check()
    examples = read_examples(recipe.train, recipe.columns)
    set_seed(recipe.seed)
    tokenizer = load_tokenizer(recipe.model)
    rows = encode(examples, tokenizer, recipe.max_length)
    published = fetch(recipe.blueprint) if recipe.blueprint and recipe.placement != ALL_LINEAR else None
    step = partial(step_of, recipe, arguments, max(len(row["input_ids"]) for row in rows))

    planned, quantization = None, recipe.quantization
    if recipe.is_planned_on_the_empty_model:
        empty = empty_model(recipe.model)
        load = step(dtype=dtype_of(recipe.dtype, True) or torch.float32)
        planned = plan(recipe, published, empty, load)
        assert planned.placement is not None and quantization is not None
        quantization = unquantized(quantization, planned.placement)
    model, _ = load_model(recipe.model, recipe.dtype, quantization)
    load = step(dtype=model.dtype, attention=model.config._attn_implementation)
    blueprint, drift, spent = settle(
        recipe, model, make_batches(rows, 8, pad_token_of(tokenizer)), published, progress=progress
    )
    if planned is None:
        planned = plan(recipe, blueprint, model, load)
    else:
        blueprint = published
    return Prepared(
        model=model,
        tokenizer=tokenizer,
        examples=examples,
        rows=rows,
        config=adapter_config(recipe, planned, blueprint, load),
        plan=planned,
        learning_rate=learning_rate_of(recipe, planned),
        drift=drift,
        probe=spent,
    )


def settle(
    recipe: Recipe,
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    published: Blueprint | None,
    *,
    progress: bool = True,
) -> tuple[Blueprint | None, float | None, Mapping[str, Figure]]:
    """The blueprint to plan by: probe, drift check, blend.

    Returns:
        The blueprint (None to place everywhere, or evenly), the rank correlation of probe and published blueprint (None
        without both), and what the probe spent, if there was one.
    """
    if isinstance(recipe.placement, str):
        return None, None, {}
    published = published.expand(find_submodules(model)) if published is not None else None
    drift, probe = None, None
    with Ledger(carbon=carbon_factor(recipe.carbon)) as ledger:
        if recipe.probe_examples:
            probe = generate_blueprint(
                model,
                batches,
                max_examples=recipe.probe_examples,
                seed=recipe.seed,
                data=recipe.train,
                reduce=False,  # every process of a distributed run measures the same few examples
                progress=progress,
            )
    if probe is not None:
        measured = {name: Figure.from_dict(figure) for name, figure in probe.provenance["spent"].items()}
        ledger.add(int(measured["tokens"].value or 0), measured["flops"])
    spent = ledger.figures() if probe is not None else {}
    if published is None and probe is None and recipe.placement.get("rank_by") != "even":
        raise BlueprintError(
            "The recipe gives no blueprint and probe_examples is 0: give one of them, or rank_by: even in placement."
        )
    if published is None or probe is None:
        return published or probe, None, spent
    blueprint = reconcile(published, probe, weight=recipe.blend_weight, policy=recipe.drift_policy)  # type: ignore[arg-type]
    drift = check_drift(probe, published).correlation
    return blueprint, drift, spent


def adapter_config(recipe: Recipe, planned: Plan, blueprint: Blueprint | None, workload: Workload) -> LoraConfig:
    """PEFT's config of a plan; what was wished for goes with it into the adapter's folder."""
    lora = {"task_type": "CAUSAL_LM", **recipe.lora}
    if planned.placement is None or isinstance(recipe.placement, str):
        return LoraConfig(target_modules=ALL_LINEAR, **lora)
    budget = budget_of(recipe.placement)
    wishes: dict[str, Any] = {name: recipe.placement[name] for name in WISHES if name in recipe.placement}
    if budget is not None:
        wishes["budget"] = budget.limits
    return BlueprintConfig(blueprint=blueprint, placement=planned.placement, workload=workload, **wishes, **lora)


def held_out_loss(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], *, progress: bool = True) -> float:
    """Mean negative log-likelihood per target token, in nats."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses, counts = [], []
    with torch.no_grad():
        for batch in tqdm(batches, desc="Evaluating", unit="batch", disable=not progress):
            loss, count = per_example_losses(model, {key: value.to(device) for key, value in batch.items()})
            losses.append(loss * count)
            counts.append(count)
    model.train(was_training)
    mean = float(torch.cat(losses).sum() / torch.cat(counts).sum())
    if not math.isfinite(mean):
        raise BlueprintError(f"The held-out loss is {mean}: training diverged. Lower the learning rate.")
    return mean


def _training_arguments(recipe: Recipe, progress: bool) -> TrainingArguments:
    settings = training_settings(recipe, progress=progress)
    try:
        return TrainingArguments(**settings)
    except (TypeError, ValueError) as error:
        raise BlueprintError(f"The recipe's training settings are not TrainingArguments': {error}.") from error
