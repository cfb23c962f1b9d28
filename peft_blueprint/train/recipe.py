"""Read a run from a YAML file and check every key before anything is loaded."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import torch
from peft import LoraConfig
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from torch import nn
from transformers import BitsAndBytesConfig, TrainingArguments

from .._options import check_fields, from_mapping
from ..blueprint import read_text
from ..compare import ProbeOptions
from ..errors import BlueprintError
from ..measure import dtype_of
from ..place import DEFAULT_RANK, Budget, PlacementOptions, Workload
from ..runs import MarginalReturn, carbon_factor
from .skipping import check_skipping


ALL_LINEAR = "all-linear"
MAX_BYTES = 2**18
MAX_VALUES = 20_000

_LOG = logging.getLogger(__name__)

_TRAINING = {
    "report_to": "none",
    "save_strategy": "no",
    "remove_unused_columns": False,
    "logging_steps": 5,
    "dataloader_pin_memory": torch.cuda.is_available(),  # without a device to copy to, torch warns
}
OPTIMIZERS = {  # transformers' names → the cost model's
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_apex_fused"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw_8bit"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "paged_adamw_32bit"),
    "paged_adamw_8bit": "paged_adamw_8bit",
    "sgd": "sgd",
}
_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # transformers 5's name and the one before


@dataclass
class RecipePlacement(PlacementOptions):
    """`PlacementOptions`, with the memory limit as a key of its own.

    Raises:
        PlacementError: as `PlacementOptions`, or for a memory limit beside another option that it contradicts.
    """

    memory: str | int | float | None = field(
        default=None,
        metadata={"help": "Memory limit of the budget, such as 12GiB, or auto for the device's memory less 1 GiB."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None or self.seed:
            raise BlueprintError("r belongs to lora, and seed to the recipe itself: move them there.")
        if self.memory is None:
            return
        if self.memory != "auto":
            Budget.of({"memory": self.memory})
        if self.selector:
            raise BlueprintError(
                f"memory and {' and '.join(self.selector)} both say how much to place: give one of them, or memory with "
                "budget or keep."
            )
        if self.budget is not None and Budget.of(self.budget).memory is not None:
            raise BlueprintError(f"memory={self.memory} and budget={self.budget} both limit the memory: give one.")


def _key(default: Any, help: str) -> Any:
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Recipe(ProbeOptions):
    """A run of `run_recipe`: model, data, placement and training. Every field explains itself in its metadata.

    Has the fields of `ProbeOptions`: the domain of the blueprint, the size of the local probe, and what becomes of both.

    Raises:
        BlueprintError: for a value that `ProbeOptions` refuses, or a `placement` that `RecipePlacement` refuses.

    Example:
        >>> recipe = Recipe("org/model", "train.jsonl", "adapter", placement={"fraction": 0.2})
        >>> recipe.placement.fraction
        0.2
    """

    model: str = field(metadata={"help": "Folder or Hub id of the base model."})
    train: str = field(metadata={"help": "Training examples: a file or a Hub data set, see read_examples."})
    output: str = field(metadata={"help": "Folder for the adapter, report.json and run.json."})
    held_out: str | None = _key(None, "Examples for the loss before and after training.")
    columns: Mapping[str, str] = _key({}, "The data's names for prompt and completion.")
    max_length: int = _key(512, "Tokens at which an example is cut.")
    held_out_examples: int = _key(64, "Number of held-out examples.")
    blueprint: str | None = _key(
        None, "File, folder or Hub id of a published blueprint; by default the probe is the blueprint."
    )
    start_examples: int = _key(
        0, "Training examples whose gradient initializes the adapters; 0 for LoRA's random initialization."
    )
    placement: RecipePlacement | str = field(
        default_factory=RecipePlacement,
        metadata={"help": "PlacementOptions and memory; or all-linear for LoRA on every linear layer."},
    )
    workload: Mapping[str, Any] = _key({}, "Fields of Workload that override those derived from the other keys.")
    lora: Mapping[str, Any] = _key({}, "Fields of LoraConfig.")
    training: Mapping[str, Any] = _key({}, "Fields of TrainingArguments.")
    stop: Mapping[str, Any] | None = _key(
        None,
        "Settings of MarginalReturn, with LedgerCallback's metric and resource, to stop early; {} for the defaults. The "
        "held-out examples are then evaluated twenty times, unless training says otherwise.",
    )
    answer_only: Mapping[str, Any] | None = _key(
        None,
        "Train activated LoRA at the cost of the answers, see the function of that name. {} for the defaults, or: invocation, "
        "the text right before every answer (by default the chat template's generation prompt); turns, last or every; cache, "
        "the bytes in which later epochs find prompts again, such as 4GiB; folder, for files in place of memory.",
    )
    freeze_from_below: Mapping[str, Any] | None = _key(
        None, "Settings of FreezeFromBelow, such as a schedule of 1:10, 2:20; {} decides by marginal return."
    )
    cache_frozen_prefix: Mapping[str, Any] | None = _key(
        None,
        "Settings of CacheFrozenPrefix, such as a budget of 8GiB; {} for the defaults. Saves from the second epoch on.",
    )
    carbon: str | float | None = _key(None, "Grams of CO2e per kWh, or a country's three-letter code.")
    base_learning_rate: float | None = _key(
        None,
        "Learning rate that suits LoRA on every linear layer; the placement's is predicted from it, by Adam's gain where the "
        "blueprint has it, otherwise by the summed ranks.",
    )
    share_base: bool = _key(False, "Release the originals of unfrozen blocks, see share_base.")
    dtype: str = _key(
        "auto",
        "Dtype of weights that are not quantized. auto is the checkpoint's; for a quantized model bfloat16 on a GPU and "
        "float32 on a CPU.",
    )
    quantization: Mapping[str, Any] | None = _key(None, "Fields of BitsAndBytesConfig.")
    seed: int = _key(0, "Seed of everything random.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.placement, Mapping):
            self.placement = from_mapping(RecipePlacement, self.placement, "placement")

    @classmethod
    def from_yaml(
        cls,
        path: str | Path,
        arguments: type[TrainingArguments] = TrainingArguments,
        overrides: Sequence[str] = (),
    ) -> Recipe:
        """Read and check a recipe.

        Args:
            path: YAML 1.2 file whose keys are the fields of this class.
            arguments: class that `training` belongs to, such as TRL's `SFTConfig`.
            overrides: `key=value` to set in the file's content, the value in YAML: `training.max_steps=2`.

        Raises:
            BlueprintError: naming the file and the key, for a file that cannot be read, a key that is missing, unknown
                or of the wrong type, or keys that contradict each other.
        """
        data = _read_yaml(path)
        for override in overrides:
            _override(data, override)
        placement = data.pop("placement", {}) if isinstance(data, dict) else {}
        nested = isinstance(placement, Mapping)
        recipe = from_mapping(cls, data if nested else {**data, "placement": placement}, str(path))
        if nested:
            recipe.placement = from_mapping(RecipePlacement, placement, f"{path}: placement")
        try:
            recipe.check(arguments)
        except BlueprintError as error:
            raise type(error)(f"{path}: {error}") from error
        return recipe

    @property
    def mode(self) -> str:
        """Mode of the placement: "lora", "unfreeze" or "lora+unfreeze"."""
        return "lora" if isinstance(self.placement, str) else self.placement.mode

    @property
    def rank(self) -> int:
        """Rank of LoRA, or of the all-linear LoRA that the placement is compared with."""
        is_all_linear = isinstance(self.placement, str)
        default = LoraConfig.__dataclass_fields__["r"].default if is_all_linear else DEFAULT_RANK
        return int(self.lora.get("r", default))

    @property
    def is_planned_before_loading(self) -> bool:
        """Whether the blocks to unfreeze must be known before the model is loaded, to leave them unquantized."""
        return bool(self.quantization) and "unfreeze" in self.mode

    def check(self, arguments: type[TrainingArguments] = TrainingArguments) -> None:
        """Check types within the sections, and whether keys contradict each other.

        Args:
            arguments: class that `training` belongs to.

        Raises:
            BlueprintError: naming the key.
        """
        self._check_sections(arguments)
        self._check_ranges()
        if self.stop is not None and self.held_out is None and self.stop.get("metric") != "loss":
            raise BlueprintError(
                "stop needs held_out, whose loss it watches; or metric: loss, to watch the training loss."
            )
        stopping_rule(self.stop)
        check_skipping(self)
        carbon_factor(self.carbon)
        if self.start_examples and (self.mode == "unfreeze" or "init_lora_weights" in self.lora):
            other = "lora: init_lora_weights" if "init_lora_weights" in self.lora else "mode: unfreeze"
            raise BlueprintError(
                f"start_examples: {self.start_examples} initializes adapters along the gradient, which {other} rules out. "
                "Give one of them, or start_examples: 0."
            )
        if self.base_learning_rate is not None:
            self._check_learning_rate(self.base_learning_rate)
        if self.share_base and "unfreeze" not in self.mode:
            raise BlueprintError(
                f"share_base: true releases the originals of unfrozen blocks, and placement's mode is {self.mode!r}. "
                "Choose mode: lora+unfreeze or unfreeze, or leave share_base out."
            )
        if not self.is_planned_before_loading:
            return
        if self.blueprint is None:
            raise BlueprintError(
                f"mode: {self.mode} with quantization needs a blueprint, because the blocks to unfreeze are chosen before "
                "the model is loaded. Make one with peft-blueprint generate, or leave quantization out."
            )
        if self.probe_examples and self.drift_policy not in ("warn", "error"):
            raise BlueprintError(
                f"drift_policy: {self.drift_policy} cannot change a placement that is made before the probe, as with "
                f"mode: {self.mode} and quantization. Choose warn or error, or probe_examples: 0."
            )

    def _check_sections(self, arguments: type[TrainingArguments]) -> None:
        lora = get_type_hints(LoraConfig)
        if str(self.lora.get("init_lora_weights", "")).startswith("pissa_niter_"):
            lora["init_lora_weights"] = str  # its annotation does not list these
        training = get_type_hints(arguments)
        for ending in ("", "_kwargs"):
            hints = [training[name + ending] for name in _CHECKPOINTING if name + ending in training]
            training |= dict.fromkeys((name + ending for name in _CHECKPOINTING), hints[0])
        check_fields(lora, self.lora, "lora")
        check_fields(training, self.training, "training")
        if "rank" in self.workload:
            raise BlueprintError(f"workload: rank is that of lora: r, {self.rank} here. Leave it out.")
        from_mapping(Workload, self.workload, "workload")
        dtype_of(self.dtype, False)
        if self.quantization is not None:
            defaults = {p.name: p.default for p in inspect.signature(BitsAndBytesConfig).parameters.values()}
            kinds = {name: Any if default is None else type(default) for name, default in defaults.items()}
            del kinds["kwargs"]
            check_fields(kinds, self.quantization, "quantization")
            for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
                dtype_of(str(self.quantization.get(name) or "auto"), False)

    def _check_ranges(self) -> None:
        for name, least in (("max_length", 1), ("held_out_examples", 1), ("start_examples", 0)):
            if getattr(self, name) < least:
                raise BlueprintError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.domain is not None and self.blueprint is None:
            raise BlueprintError(
                f"domain: {self.domain} chooses among the domains of a blueprint: give blueprint, or leave domain out."
            )
        if isinstance(self.placement, str) and self.placement != ALL_LINEAR:
            raise BlueprintError(f"placement must be {ALL_LINEAR} or a mapping of options, got {self.placement!r}.")

    def _check_learning_rate(self, rate: float) -> None:
        if not (rate > 0 and math.isfinite(rate)):
            raise BlueprintError(f"base_learning_rate must be a positive number, got {rate}.")
        if "learning_rate" in self.training:
            raise BlueprintError(
                f"base_learning_rate: {rate} and training: learning_rate: {self.training['learning_rate']} both set the "
                "learning rate: give one."
            )
        if "unfreeze" in self.mode:
            raise BlueprintError(
                f"base_learning_rate: {rate} cannot be scaled to unfrozen blocks (mode: {self.mode}). Give training: "
                "learning_rate."
            )


def stopping_rule(stop: Mapping[str, Any] | None) -> tuple[MarginalReturn | None, dict[str, Any]]:
    """Make the rule of a recipe's `stop`, and the arguments for `LedgerCallback` among its keys.

    Raises:
        BlueprintError: for a key that is unknown, of the wrong type or out of range.

    Example:
        >>> rule, options = stopping_rule({"resource": "tokens", "worth": 0.01})
        >>> rule.worth, options
        (0.01, {'resource': 'tokens'})
    """
    if stop is None:
        return None, {}
    hints = {key: hint for key, hint in get_type_hints(MarginalReturn.__init__).items() if key != "return"}
    check_fields({**hints, "metric": str, "resource": str}, stop, "stop")
    options = {key: stop[key] for key in ("metric", "resource") if key in stop}
    try:
        return MarginalReturn(**{key: value for key, value in stop.items() if key not in options}), options
    except BlueprintError as error:
        raise BlueprintError(f"stop: {error}") from error


def training_settings(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Return the fields of `TrainingArguments`: the recipe's and defaults, for the installed transformers and device.

    Raises:
        BlueprintError: for reentrant checkpointing, which cannot stop below the lowest adapter.

    Example:
        >>> training_settings(Recipe("org/model", "train.jsonl", "adapter"))["save_strategy"]
        'no'
    """
    settings: dict[str, Any] = {"output_dir": recipe.output, "seed": recipe.seed, "disable_tqdm": not progress}
    settings |= {**_TRAINING, **recipe.training}
    if recipe.stop is not None and recipe.stop.get("metric") != "loss" and "eval_strategy" not in settings:
        settings |= {"eval_strategy": "steps", "eval_steps": 0.05}
    if settings.get("eval_strategy", "no") != "no":
        settings.setdefault("eval_on_start", True)  # gains are counted from there
    known = {f.name for f in fields(TrainingArguments)}
    name = next(name for name in _CHECKPOINTING if name in known)
    for ending, default in (("", False), ("_kwargs", {})):
        given = [settings.pop(other + ending) for other in _CHECKPOINTING if other + ending in settings]
        settings[name + ending] = given[0] if given else default
    if isinstance(options := settings[f"{name}_kwargs"], dict) and options.get("use_reentrant"):
        raise BlueprintError(
            "training: use_reentrant: true sends the backward pass to the bottom wherever the adapters are. Leave it out."
        )
    if "optim" in settings and not torch.cuda.is_available():
        settings["optim"] = _on_cpu(str(settings["optim"]))
    return settings


def _on_cpu(optimizer: str) -> str:
    """Replace an optimizer that needs a GPU: bitsandbytes cannot page on a CPU, and older releases lack 8-bit AdamW."""
    kind = OPTIMIZERS.get(optimizer, "")
    if kind not in ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"):
        return optimizer
    taken = "adamw_bnb_8bit" if kind.endswith("8bit") and _has_8bit_adamw_on_cpu() else "adamw_torch"
    if taken != optimizer and kind != "adamw_8bit" or taken == "adamw_torch":
        _LOG.warning("optim: %s is not available on a CPU; using %s", optimizer, taken)
    return taken


@cache
def _has_8bit_adamw_on_cpu() -> bool:
    """Take a step to see whether bitsandbytes supports it: releases differ, and do not tell."""
    try:
        from bitsandbytes.optim import AdamW8bit

        weight = nn.Parameter(torch.ones(4096))
        weight.grad = torch.ones(4096)
        AdamW8bit([weight], lr=0.5).step()
        return math.isclose(weight.detach()[0].item(), 0.5, abs_tol=0.1)
    except Exception:  # a release without it raises any error of its loader or kernels
        return False


def _override(data: Any, override: str) -> None:
    """Set one key of a recipe's content from `key=value`, or of a mapping in it from `key.key=value`."""
    names, is_set, text = override.partition("=")
    *outer, last = names.split(".")
    if not is_set or not all((*outer, last)):
        raise BlueprintError(f"--override must be KEY=VALUE such as training.max_steps=2, got {override!r}.")
    for name in outer:
        data = data.setdefault(name, {}) if isinstance(data, dict) else None
    if not isinstance(data, dict):
        raise BlueprintError(f"--override {override}: {'.'.join(outer) or 'the recipe'} is not a mapping.")
    data[last] = _parse_yaml(text, f"--override {override}")


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise BlueprintError(f"{where} is not valid YAML: {why}.") from error


def _read_yaml(path: str | Path) -> Any:
    path = Path(path)
    if not path.is_file():
        why = "it is not a file" if path.exists() else "No such file or directory"
        raise BlueprintError(f"The recipe {path} cannot be read: {why}.")
    data = _parse_yaml(read_text(path, MAX_BYTES, "recipe"), str(path))
    values = [data]
    for value in values:  # grows while it is read; aliases stand for whole values, and may for exponentially many
        if isinstance(value, Mapping | list):
            values += [*value, *value.values()] if isinstance(value, Mapping) else value
        if len(values) > MAX_VALUES:
            raise BlueprintError(f"{path} has more than {MAX_VALUES:,} values, counting aliases. Write it plainly.")
    return data
