"""Run a recipe: measure a probe, plan, train, and report gains and costs."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .._files import require_writable, write_atomically
from .._processes import process_count, process_rank
from .._progress import progress_bar
from ..blueprint import Blueprint
from ..compare import probe_options, read_for_domain
from ..data import read_examples
from ..errors import BlueprintError
from ..measure import (
    Objective,
    Row,
    collate,
    dtype_of,
    empty_model,
    encode,
    get_pad_token_id,
    load_model,
    load_tokenizer,
    make_batches,
    measurement_mode,
    parameters_per_token,
    take_examples,
)
from ..place import (
    DEFAULT_ALPHA,
    BlueprintConfig,
    Budget,
    CostModel,
    LearningRate,
    Placement,
    PlacementOptions,
    Structure,
    Workload,
    learning_rate_for,
    plan_placement,
    probe_blueprint,
)
from ..runs import RESOURCES, STDERR, Ledger, Point, Quantity, RunRecord, carbon_factor, largest, modelled, total
from .initialization import initialize_along_gradient
from .ledger_callback import LedgerCallback
from .memory import CheckpointAbove, share_base
from .recipe import ALL_LINEAR, OPTIMIZERS, Recipe, stopping_rule, training_settings
from .skipping import activation_of, callbacks_of, skip_prompts, workload_of
from .verification import check_adapters


HELD_OUT = "held_out_loss"
RESERVE = 2**30  # bytes of a GPU for the CUDA context and the allocator's fragmentation
BATCH_SIZE = 8  # examples of the probe and of the initialization

Spent = Mapping[str, Quantity]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A run just before training, for any trainer.

    Args:
        model: base model without an adapter.
        tokenizer: its tokenizer.
        examples: training data as it was read.
        rows: the same examples as tokens and labels.
        config: config of the adapter.
        placement: where adapters go; None for LoRA on every linear layer.
        predicted: predicted costs and gain, by the names of `Report`'s fields.
        learning_rate: predicted learning rate; None for that of the training arguments.
        drift: rank correlation of probe and published blueprint; None without both.
        probe: resources that the probe spent; empty without one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Mapping[str, Any]]
    rows: Sequence[Row]
    config: LoraConfig
    placement: Placement | None
    predicted: Mapping[str, Any]
    learning_rate: float | None
    drift: float | None
    probe: Spent


@dataclass(frozen=True)
class Report:
    """Gains and costs of a run.

    Args:
        placed: number of submodules with an adapter.
        unfrozen: number of blocks trained whole.
        trainable_parameters: parameters of adapters and unfrozen blocks.
        steps: optimizer steps.
        loss_before: held-out loss before training, in nats per target token; None without held-out examples.
        loss_after: held-out loss after training.
        measure_seconds: time of the probe and of the initialization along the gradient.
        train_seconds: time of training.
        peak_bytes: peak memory of training; None if it cannot be measured.
        drift: rank correlation of probe and published blueprint; None without both.
        output: folder of the adapter.
        learning_rate: peak learning rate.
        learning_rate_scale: predicted learning rate relative to all-linear LoRA's; None if unknown.
        learning_rate_rule: how the rate was predicted from `base_learning_rate`, "adam_gain" or "ranks", see
            `learning_rate_for`; None if it was given.
        predicted_time: predicted step time relative to all-linear LoRA's; None if unknown.
        predicted_bytes: predicted peak memory of a step, without the process and the CUDA context; None if unknown.
        gain_retained: predicted share of all-linear LoRA's gain; None if unknown.
        lowest: depth at which the backward pass stops; None if unknown.
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
    gain_retained: float | None
    lowest: int | None
    learning_rate_rule: str | None = None


def run_recipe(recipe: Recipe, *, progress: bool = True) -> Report:
    """Run a recipe, and write the adapter, `report.json` and `run.json` to its `output`.

    Args:
        recipe: the run.
        progress: show progress bars and a line a logging step, on stderr.

    Raises:
        BlueprintError: for data, a blueprint or options that cannot be used. Nothing is written then.

    Example:
        >>> import json, tempfile
        >>> from peft_blueprint.testing import save_tiny_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     data = Path(folder) / "train.jsonl"
        ...     _ = data.write_text(json.dumps({"prompt": "1 2", "completion": " 3"}))
        ...     model = save_tiny_model(Path(folder) / "model")
        ...     recipe = Recipe(str(model), str(data), f"{folder}/out", probe_examples=1, training={"max_steps": 1})
        ...     report = run_recipe(recipe, progress=False)
        >>> report.steps, report.placed > 0
        (1, True)
    """
    recipe.check()  # before anything is loaded
    try:
        arguments = TrainingArguments(**training_settings(recipe, progress=progress))
    except (TypeError, ValueError) as error:
        raise BlueprintError(f"training: TrainingArguments refuses these settings: {error}.") from error
    require_writable(Path(recipe.output))
    examples = (
        read_examples(recipe.held_out, recipe.columns, split="test", limit=recipe.held_out_examples)
        if recipe.held_out
        else []
    )
    prepared = prepare(recipe, arguments, progress=progress)
    pad = get_pad_token_id(prepared.tokenizer)
    held_out = encode(examples, prepared.tokenizer, recipe.max_length) if examples else []
    batches = make_batches(held_out, arguments.per_device_eval_batch_size, pad)
    before = held_out_losses(prepared.model, batches, progress=progress) if held_out else None

    model = get_peft_model(prepared.model, prepared.config)
    if recipe.share_base:
        share_base(model)
    if prepared.learning_rate is not None:
        arguments.learning_rate = prepared.learning_rate
    skip_prompts(model, recipe)
    check_adapters(model, make_batches(prepared.rows[:1], 1, pad))
    initialization = initialize_adapters(model, recipe, prepared.rows, pad, progress=progress)
    with Ledger() as spent:
        steps, record = _train(model, recipe, arguments, prepared.rows, held_out, pad)
    after = held_out_losses(model, batches, progress=progress) if held_out else None
    model.save_pretrained(recipe.output)
    prepared.tokenizer.save_pretrained(recipe.output)

    report = Report(
        placed=sum(name.endswith("lora_A") for name, _ in model.named_modules()),
        unfrozen=len(prepared.placement.unfreeze) if prepared.placement is not None else 0,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        steps=steps,
        loss_before=None if before is None else before.mean,
        loss_after=None if after is None else after.mean,
        measure_seconds=sum(part["seconds"].value or 0.0 for part in (prepared.probe, initialization) if part),
        train_seconds=spent.seconds,
        peak_bytes=spent.peak_bytes,
        drift=prepared.drift,
        output=recipe.output,
        learning_rate=arguments.learning_rate,
        **prepared.predicted,
    )
    write_atomically(Path(recipe.output) / "report.json", json.dumps(asdict(report), indent=2) + "\n")
    if before is not None and after is not None:
        record = _with_evaluations(record, steps, before, after)
    record = charge(charge(record, initialization, "start"), prepared.probe, "probe")
    data = {"train": recipe.train, "held_out": recipe.held_out}
    replace(record, about={**record.about, **data}).save(recipe.output)
    return report


def prepare(recipe: Recipe, arguments: TrainingArguments, *, progress: bool = True) -> Prepared:
    """Do everything that comes before training: data, model, probe, drift check, blend, plan.

    Blocks to unfreeze in a quantized model are chosen from the published blueprint before the model is loaded. A probe
    then only checks drift.

    Args:
        recipe: the run.
        arguments: `TrainingArguments`, or TRL's `SFTConfig`, made from `training_settings(recipe)`.
        progress: show progress bars.

    Raises:
        BlueprintError: for data, a blueprint or options that cannot be used.

    Example:
        >>> import json, tempfile
        >>> from peft_blueprint.testing import save_tiny_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     data = Path(folder) / "train.jsonl"
        ...     _ = data.write_text(json.dumps({"prompt": "1 2", "completion": " 3"}))
        ...     model = save_tiny_model(Path(folder) / "model")
        ...     recipe = Recipe(str(model), str(data), f"{folder}/out", placement="all-linear", start_examples=0)
        ...     arguments = TrainingArguments(f"{folder}/out", report_to="none")
        ...     prepared = prepare(recipe, arguments, progress=False)
        >>> prepared.placement is None, len(prepared.rows)
        (True, 1)
    """
    recipe.check(type(arguments))
    examples = read_examples(recipe.train, recipe.columns)
    set_seed(recipe.seed)
    tokenizer = load_tokenizer(recipe.model)
    rows = encode(examples, tokenizer, recipe.max_length)
    is_read = recipe.blueprint is not None and recipe.placement != ALL_LINEAR
    published = read_for_domain(str(recipe.blueprint), recipe.domain) if is_read else None
    workload_of_step = partial(_workload, recipe, arguments, rows)

    plan, quantization = None, recipe.quantization
    if recipe.is_planned_before_loading:
        workload = workload_of_step(dtype_of(recipe.dtype, True) or torch.float32)
        plan = _plan(recipe, published, empty_model(recipe.model), workload)
        assert plan[0] is not None and quantization is not None
        skip = [*plan[0].quantization_skip_modules(), *(quantization.get("llm_int8_skip_modules") or [])]
        quantization = {**quantization, "llm_int8_skip_modules": list(dict.fromkeys(skip))}
    model, _ = load_model(recipe.model, recipe.dtype, quantization)
    workload = workload_of_step(model.dtype, model.config._attn_implementation)
    batches = make_batches(rows, BATCH_SIZE, get_pad_token_id(tokenizer))
    blueprint, drift, spent = _measure(recipe, model, batches, published, progress)
    blueprint = blueprint if plan is None else published
    placement, predicted = plan or _plan(recipe, blueprint, model, workload)
    rate = _learning_rate(recipe, placement)
    if rate is not None:
        predicted = {**predicted, "learning_rate_scale": rate.scale, "learning_rate_rule": rate.rule}
    return Prepared(
        model=model,
        tokenizer=tokenizer,
        examples=examples,
        rows=rows,
        config=_adapter_config(recipe, placement, blueprint, workload, activation_of(recipe, tokenizer)),
        placement=placement,
        predicted=predicted,
        learning_rate=None if rate is None else rate.value,
        drift=drift,
        probe=spent,
    )


def initialize_adapters(
    model: PeftModel, recipe: Recipe, rows: Sequence[Row], pad_token_id: int, *, progress: bool = True
) -> Spent:
    """Initialize the adapters along the gradient of the first `start_examples` rows, if the recipe asks for it.

    Returns:
        Resources spent; empty if there was nothing to do.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
        >>> recipe = Recipe(model="org/model", train="train.jsonl", output="out", start_examples=0)
        >>> initialize_adapters(model, recipe, [], pad_token_id=0)  # the recipe asks for none
        {}
    """
    count = min(len(rows), recipe.start_examples)
    chosen = rows[process_rank() : count : process_count()]
    if not count:
        return {}
    flops = modelled(4.0 * parameters_per_token(model)[0], "2 FLOP a weight forward, 2 backward")
    batches = make_batches(chosen, BATCH_SIZE, pad_token_id)
    with Ledger(flops_per_token=flops, carbon=carbon_factor(recipe.carbon)) as ledger:
        initialize_along_gradient(model, batches, max_examples=count, seed=recipe.seed, progress=progress)
        ledger.add(sum(batch["input_ids"].numel() for batch in batches))
    return ledger.quantities()


class HeldOut(NamedTuple):
    """Negative log-likelihoods of held-out examples, in nats; or differences of two models' on the same examples.

    Args:
        losses: (examples,), mean over the example's target tokens.
        targets: (examples,), number of target tokens.

    Example:
        >>> HeldOut(torch.tensor([2.0, 3.0]), torch.tensor([10.0, 30.0])).mean
        2.75
    """

    losses: Tensor
    targets: Tensor

    @property
    def mean(self) -> float:
        """Mean per target token."""
        return float((self.losses * self.targets).sum() / self.targets.sum())

    @property
    def error(self) -> float:
        """Standard error of `mean` over examples, as of a ratio estimate; NaN for one example."""
        off, count = (self.losses - self.mean) * self.targets, len(self.losses)
        if count < 2:
            return math.nan
        return float(off.norm() / self.targets.sum()) * math.sqrt(count / (count - 1))

    def minus(self, other: HeldOut) -> HeldOut:
        """Return the differences to another model's losses on the same examples, whose error is that of pairs."""
        return HeldOut(self.losses - other.losses, self.targets)

    def metrics(self) -> dict[str, float]:
        """Return mean and standard error under the names that reports read."""
        return {HELD_OUT: self.mean, f"{HELD_OUT}{STDERR}": self.error}


def held_out_loss(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = True,
) -> float:
    """Compute the mean negative log-likelihood per target token, in nats.

    Args:
        model: in any mode.
        batches: batches or examples, see `measure_influence`.
        tokenizer: the model's, for examples with text.
        progress: show a progress bar.

    Raises:
        BlueprintError: if it is not finite.

    Example:
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> 4 < held_out_loss(tiny_llama(), toy_batches(), progress=False) < 6
        True
    """
    return held_out_losses(model, batches, tokenizer=tokenizer, progress=progress).mean


def held_out_losses(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = True,
) -> HeldOut:
    """Compute the loss of each example; arguments and errors as in `held_out_loss`.

    Example:
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> held_out_losses(tiny_llama(), toy_batches(examples=4), progress=False).losses.shape
        torch.Size([4])
    """
    losses, counts, objective = [], [], Objective(model)
    with measurement_mode(model), torch.no_grad():
        taken = take_examples(model, batches, tokenizer=tokenizer)
        for batch in progress_bar(taken, show=progress, desc="Evaluating", unit="batch"):
            loss, count = objective.losses(batch)
            losses.append(loss)
            counts.append(count)
    found = HeldOut(torch.cat(losses).cpu(), torch.cat(counts).cpu())
    if not math.isfinite(found.mean):
        raise BlueprintError(f"The held-out loss is {found.mean}: training diverged. Lower the learning rate.")
    return found


def available_memory() -> int:
    """Return the bytes a run may use: the GPU's less `RESERVE`, or without a GPU the machine's free memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory) - RESERVE
    return int(psutil.virtual_memory().available)


class StderrProgress(ProgressCallback):
    """The Trainer's progress bar, with a short line a logging step on stderr instead of dictionaries on stdout."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Write the losses and the learning rate."""
        logs = logs or {}
        shown = [f"{name} {float(logs[name]):.4g}" for name in ("loss", "eval_loss", "learning_rate") if name in logs]
        if shown and state.is_world_process_zero:
            tqdm.write(f"step {state.global_step}: {', '.join(shown)}", file=sys.stderr)


def keep_stdout_clean(trainer: Trainer) -> None:
    """Let a Trainer log to stderr, so that stdout holds the result alone.

    Example:
        >>> import tempfile
        >>> from peft_blueprint.testing import tiny_llama
        >>> trainer = Trainer(tiny_llama(), TrainingArguments(tempfile.mkdtemp(), report_to="none"))
        >>> keep_stdout_clean(trainer)
        >>> any(type(callback) is PrinterCallback for callback in trainer.callback_handler.callbacks)
        False
    """
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(StderrProgress)


def _train(
    model: PeftModel,
    recipe: Recipe,
    arguments: TrainingArguments,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    pad_token_id: int,
) -> tuple[int, RunRecord]:
    """Train with transformers' Trainer; return the number of steps and the run's record."""
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(rows),
        eval_dataset=list(held_out) or None,
        data_collator=partial(collate, pad_token_id=pad_token_id),
        callbacks=[CheckpointAbove(), *callbacks_of(recipe)],
    )
    keep_stdout_clean(trainer)
    rule, options = stopping_rule(recipe.stop)
    callback = LedgerCallback(trainer, stop=rule, carbon=recipe.carbon, **options)
    trainer.add_callback(callback)
    trainer.train()
    return trainer.state.global_step, callback.log.record()


def _measure(
    recipe: Recipe,
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    published: Blueprint | None,
    progress: bool,
) -> tuple[Blueprint | None, float | None, Spent]:
    """Measure the probe, check drift, and blend.

    Returns:
        The blueprint to plan by (None to place everywhere, or evenly), the rank correlation of probe and published
        blueprint (None without both), and the resources that the probe spent.
    """
    if isinstance(recipe.placement, str):
        return None, None, {}
    if not recipe.probe_examples:
        if published is None and recipe.placement.rank_by != "even":
            raise BlueprintError("probe_examples: 0 needs a blueprint, or placement: rank_by: even.")
        return published, None, {}
    with Ledger(carbon=carbon_factor(recipe.carbon)) as ledger:
        probed = probe_blueprint(
            model,
            batches,
            published,
            probe_options(recipe, domain=None),  # the published one is of that domain
            seed=recipe.seed,
            data=recipe.train,
            reduce=False,  # every process of a distributed run measures the same few examples
            progress=progress,
        )
        measured = {name: Quantity.from_dict(content) for name, content in probed.probe.provenance["spent"].items()}
        ledger.add(int(measured["tokens"].value or 0), measured["flops"])
    return probed.blueprint, None if probed.drift is None else probed.drift.correlation, ledger.quantities()


def _plan(
    recipe: Recipe, blueprint: Blueprint | None, model: nn.Module, workload: Workload
) -> tuple[Placement | None, dict[str, Any]]:
    """Place adapters; return the placement, and predictions by the names of `Report`'s fields."""
    cost: Mapping[str, float | None]
    if isinstance(recipe.placement, str):
        costs = CostModel(Structure.of(model), workload)
        whole = costs.all_linear()
        placement, cost = None, {"time": costs.time_ratio(whole), "memory": whole.bytes, "lowest": whole.lowest}
    else:
        placement = plan_placement(blueprint, model, _placement_options(recipe), workload=workload)
        cost = placement.cost
    return placement, {
        "predicted_time": cost.get("time"),
        "predicted_bytes": cost.get("memory"),
        "lowest": cost.get("lowest"),
        "gain_retained": 1.0 if placement is None else placement.gain_retained,
        "learning_rate_scale": 1.0 if placement is None else placement.learning_rate_scale,
    }


def _placement_options(recipe: Recipe) -> PlacementOptions:
    wanted = recipe.placement
    assert not isinstance(wanted, str)
    limits = {} if wanted.budget is None else Budget.of(wanted.budget).limits
    if wanted.memory is not None:
        memory = available_memory() if wanted.memory == "auto" else wanted.memory
        limits |= Budget.of({"memory": memory}).limits
    options = {f.name: getattr(wanted, f.name) for f in fields(PlacementOptions)}
    return PlacementOptions(**options | {"budget": limits or None, "r": recipe.lora.get("r"), "seed": recipe.seed})


def _adapter_config(
    recipe: Recipe,
    placement: Placement | None,
    blueprint: Blueprint | None,
    workload: Workload,
    activation: Mapping[str, Any],
) -> LoraConfig:
    lora = {"task_type": "CAUSAL_LM", **activation, **recipe.lora}
    if placement is None:
        return LoraConfig(target_modules=ALL_LINEAR, **{"lora_alpha": DEFAULT_ALPHA * recipe.rank} | lora)
    options = vars(_placement_options(recipe))  # they are saved with the adapter
    return BlueprintConfig(blueprint=blueprint, placement=placement, workload=workload, **options | lora)


def _workload(
    recipe: Recipe,
    arguments: TrainingArguments,
    rows: Sequence[Row],
    dtype: torch.dtype,
    attention: str | None = None,
) -> Workload:
    """Describe a training step to the cost model, by the longest example."""
    length = max(len(row["input_ids"]) for row in rows)
    steps = -(-len(rows) // (arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps))
    epochs = arguments.num_train_epochs if arguments.max_steps <= 0 else arguments.max_steps / steps
    quantization = recipe.quantization or {}
    kind = "int8" if quantization.get("load_in_8bit") else None
    if quantization.get("load_in_4bit"):
        kind = quantization.get("bnb_4bit_quant_type", "fp4")
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    if optimizer not in OPTIMIZERS and "optimizer" not in recipe.workload:
        _LOG.warning("The cost model counts optim: %s as AdamW; set workload: optimizer to correct it", optimizer)
    derived: dict[str, Any] = {
        "batch_size": arguments.per_device_train_batch_size,
        "length": length,
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": kind,
        "double_quant": bool(quantization.get("bnb_4bit_use_double_quant", False)),
        "checkpointing": bool(arguments.gradient_checkpointing),
        "optimizer": OPTIMIZERS.get(optimizer, "adamw"),
        "rank": recipe.rank,
        "attention": "eager" if attention == "eager" else "sdpa",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "padded": arguments.per_device_train_batch_size > 1,
        "input_gradients": False,
        **workload_of(recipe, rows, length, epochs),
    }
    return Workload(**{**derived, **recipe.workload})


def _learning_rate(recipe: Recipe, placement: Placement | None) -> LearningRate | None:
    """Scale `base_learning_rate` by Adam's gain where the blueprint has it, otherwise by the summed ranks."""
    base = recipe.base_learning_rate
    if base is None:
        return None
    if placement is None:
        return LearningRate(base, 1.0, "ranks")
    is_measured = placement.learning_rate_scale is not None
    return learning_rate_for(placement, base=base, rank=recipe.rank, rule="adam_gain" if is_measured else "ranks")


def _with_evaluations(record: RunRecord, steps: int, before: HeldOut, after: HeldOut) -> RunRecord:
    """Add the held-out losses before and after training as evaluations, if the Trainer made none."""
    if record.metric != "loss" or record.stopping is not None:
        return record
    spent = {name: quantity.value for name, quantity in record.totals.items() if quantity.value is not None}
    points = (Point(0, {}, before.metrics()), Point(steps, spent, after.metrics()))
    return replace(record, metric=HELD_OUT, direction="minimize", points=points)


def charge(record: RunRecord, spent: Mapping[str, Quantity], name: str) -> RunRecord:
    """Charge resources spent before training to the run: to its totals and to every point after step 0.

    Args:
        record: the run's.
        spent: by resource, as from `Ledger.quantities`; empty for nothing.
        name: purpose of the resources, a key of the record's `about`.

    Example:
        >>> from peft_blueprint.runs import UNITS, measured
        >>> minute = {unit: measured(60.0, "clock") for unit in UNITS}
        >>> record = RunRecord("run", "loss", "minimize", "seconds", minute, (Point(9, {"seconds": 60.0}, {}),))
        >>> charge(record, minute, "probe").points[0].spent
        {'seconds': 120.0}
    """
    if not spent:
        return record
    added = set(RESOURCES) & spent.keys()

    def charged(point: Point) -> Point:
        more = {key: value + (spent[key].value or 0.0) for key, value in point.spent.items() if key in added}
        return replace(point, spent={**point.spent, **more}) if point.step > 0 else point

    totals = {key: total((own, spent[key])) if key in added else own for key, own in record.totals.items()}
    totals["peak_bytes"] = largest((record.totals["peak_bytes"], spent["peak_bytes"]))
    return replace(
        record,
        totals=totals,
        points=tuple(map(charged, record.points)),
        losses=tuple(map(charged, record.losses)),
        about={**record.about, name: {key: quantity.to_dict() for key, quantity in spent.items()}},
    )
