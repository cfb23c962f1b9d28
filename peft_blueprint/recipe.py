"""One YAML, one run: measure a probe, settle a blueprint, place, train, and report what was gained for what was spent.

Every step is a function of its own, for those who want to take them singly. Knows everything below it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from .blueprint import Blueprint
from .config import BlueprintConfig
from .data import Row, collate, encode, make_batches, pad_token_of, read_examples
from .drift import check_drift, reconcile
from .errors import BlueprintError
from .formats import require_writable, write_atomically
from .generate import generate_blueprint
from .hub import fetch
from .ledger import ledger
from .losses import per_example_losses
from .placement import Placement


ALL_LINEAR = "all-linear"

_TRAINING = {
    "report_to": "none",
    "save_strategy": "no",
    "remove_unused_columns": False,
    "logging_steps": 5,
    "dataloader_pin_memory": torch.cuda.is_available(),  # without a device to copy to, torch warns
}


@dataclass(frozen=True)
class Recipe:
    """A run, as a YAML file says it.

    Args:
        model: folder or Hub id.
        train: training examples, see `data.read_examples`.
        output: folder for the adapter and `report.json`.
        held_out: examples to evaluate on, before and after.
        columns: what the data calls `prompt` and `completion`.
        max_length: of an example, in tokens.
        held_out_examples: how many of them.
        blueprint: a published one, by file, folder or Hub id; without one, the probe is the blueprint.
        probe_examples: training examples of the local probe; 0 to do without, given a blueprint.
        blend_weight: of the published blueprint.
        drift_policy: "warn", "error", "refresh" or "coarsen".
        placement: `BlueprintConfig`'s selectors and coverage, or "all-linear" for LoRA on every linear layer.
        lora: `LoraConfig`'s fields.
        training: `TrainingArguments`' fields.
        dtype: of the base weights, such as "float32" or "bfloat16".
        quantization: `BitsAndBytesConfig`'s fields.
        seed: of everything that is random.
    """

    model: str
    train: str
    output: str
    held_out: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    max_length: int = 512
    held_out_examples: int = 64
    blueprint: str | None = None
    probe_examples: int = 32
    blend_weight: float = 0.5
    drift_policy: str = "warn"
    placement: Mapping[str, Any] | str = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    quantization: Mapping[str, Any] | None = None
    seed: int = 0

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read and check a recipe.

        Raises:
            BlueprintError: if it cannot be read, is not YAML, or has keys that are missing or unknown.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise BlueprintError(f"The recipe {path} cannot be read: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise BlueprintError(f"{path} is not YAML: {str(error).splitlines()[0]}.") from error
        known = [f.name for f in fields(cls)]
        if not isinstance(data, dict) or not {"model", "train", "output"} <= data.keys():
            raise BlueprintError(f"The recipe {path} needs the keys model, train and output.")
        if unknown := [key for key in data if key not in known]:
            raise BlueprintError(f"The recipe {path} has unknown keys {unknown}; a recipe's keys are {known}.")
        return cls(**data)


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
        measure_seconds: of the probe.
        train_seconds: of training alone.
        peak_bytes: while training, None where it cannot be measured.
        drift: rank correlation of probe and published blueprint, None without both.
        output: where the adapter is.
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


def run(recipe: Recipe, *, progress: bool = True) -> Report:
    """Carry out a recipe: the adapter goes to `recipe.output`, with `report.json` beside it.

    Raises:
        BlueprintError: for data, blueprint or wishes that cannot be used; nothing is written then.
    """
    arguments = _training_arguments(recipe, progress)  # what is wrong should not wait for the model
    require_writable(Path(recipe.output))
    examples = read_examples(recipe.train, recipe.columns)
    kept_out = (
        read_examples(recipe.held_out, recipe.columns, split="test", limit=recipe.held_out_examples)
        if recipe.held_out
        else []
    )
    set_seed(recipe.seed)
    model, tokenizer = load_model(recipe.model, recipe.dtype, recipe.quantization)
    pad = pad_token_of(tokenizer)
    rows = encode(examples, tokenizer, recipe.max_length)
    evaluation = encode(kept_out, tokenizer, recipe.max_length) if kept_out else []
    held_out = make_batches(evaluation, arguments.per_device_eval_batch_size, pad)
    loss_before = held_out_loss(model, held_out, progress=progress) if held_out else None

    config, drift, measure_seconds = settle(recipe, model, make_batches(rows, 8, pad), progress=progress)
    adapted = get_peft_model(model, config)
    with ledger() as spent:
        steps = train(adapted, rows, arguments, pad)
    loss_after = held_out_loss(adapted, held_out, progress=progress) if held_out else None
    adapted.save_pretrained(recipe.output)
    tokenizer.save_pretrained(recipe.output)
    placement = config.placement if isinstance(config, BlueprintConfig) else None
    unfrozen = len(placement.unfreeze) if isinstance(placement, Placement) else 0
    placed = sum(name.endswith("lora_A") for name, _ in adapted.named_modules())
    report = Report(
        placed=placed,
        unfrozen=unfrozen,
        trainable_parameters=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        steps=steps,
        loss_before=loss_before,
        loss_after=loss_after,
        measure_seconds=measure_seconds,
        train_seconds=spent.seconds,
        peak_bytes=spent.peak_bytes,
        drift=drift,
        output=recipe.output,
    )
    write_atomically(Path(recipe.output) / "report.json", json.dumps(asdict(report), indent=2) + "\n")
    return report


def join_processes() -> tuple[int, int]:
    """This process's rank and the number of processes, which meet if `torchrun` or `accelerate launch` started them."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    state = PartialState(cpu=not torch.cuda.is_available())
    return int(state.process_index), int(state.num_processes)


def load_model(
    name: str, dtype: str = "auto", quantization: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer from a folder or the Hub, quantised if asked.

    Raises:
        BlueprintError: if there is no such model, or an unknown dtype.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise BlueprintError(f"dtype={dtype!r} is no torch dtype; give float32, bfloat16, float16 or auto.")
    settings: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    try:
        if quantization:
            settings["quantization_config"] = BitsAndBytesConfig(**quantization)
        if torch.cuda.is_available():
            settings["device_map"] = {"": torch.cuda.current_device()}
        model = AutoModelForCausalLM.from_pretrained(name, **settings)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BlueprintError(f"The model {name!r} cannot be loaded: {reason}") from error
    if quantization:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model, tokenizer


def settle(
    recipe: Recipe, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, progress: bool = True
) -> tuple[LoraConfig, float | None, float]:
    """The adapter's config from a recipe: probe, drift check, blend.

    Returns:
        The config, the rank correlation of probe and published blueprint (None without both), and the probe's seconds.
    """
    lora = {"task_type": "CAUSAL_LM", **recipe.lora}
    if recipe.placement == ALL_LINEAR:
        return LoraConfig(target_modules=ALL_LINEAR, **lora), None, 0.0
    if isinstance(recipe.placement, str):
        raise BlueprintError(
            f"placement: {recipe.placement} is not known; give {ALL_LINEAR} or a mapping of selectors."
        )
    published = fetch(recipe.blueprint).expand(model) if recipe.blueprint else None
    drift, probe = None, None
    with ledger() as spent:
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
    blueprint = _settled(recipe, published, probe)
    if published is not None and probe is not None:
        drift = check_drift(probe, published).correlation
    return BlueprintConfig(blueprint=blueprint, **recipe.placement, **lora), drift, spent.seconds


def _settled(recipe: Recipe, published: Blueprint | None, probe: Blueprint | None) -> Blueprint:
    if published is None and probe is None:
        raise BlueprintError("The recipe gives no blueprint and probe_examples is 0: give one of them.")
    if published is None or probe is None:
        return published or probe  # type: ignore[return-value]  # one of them is there
    return reconcile(published, probe, weight=recipe.blend_weight, policy=recipe.drift_policy)  # type: ignore[arg-type]


def train(model: PeftModel, rows: Sequence[Row], arguments: TrainingArguments, pad_token_id: int) -> int:
    """Train with transformers' Trainer. Returns the number of optimizer steps."""
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(rows),
        data_collator=partial(collate, pad_token_id=pad_token_id),
    )
    trainer.train()
    return trainer.state.global_step


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
    settings = {"output_dir": recipe.output, "seed": recipe.seed, "disable_tqdm": not progress, **_TRAINING}
    try:
        return TrainingArguments(**{**settings, **recipe.training})
    except (TypeError, ValueError) as error:
        raise BlueprintError(f"The recipe's training settings are not TrainingArguments': {error}.") from error
