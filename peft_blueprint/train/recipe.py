"""`Recipe`, a run as a YAML file says it, with every key checked that can be before a model is there.

Knows the names of settings, and nothing of models or of how a run goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..errors import BlueprintError
from ..runs import MarginalReturn, carbon_factor


ALL_LINEAR = "all-linear"
# what `placement:` may say and plan_placement is asked
WISHES = (
    *("mode", "fraction", "num_modules", "top_p", "threshold", "budget", "keep", "rank_by", "per_cost", "coverage"),
    *("unfreeze_blocks", "ranks"),
)


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
        start_examples: training examples along whose gradient the adapters begin, see `initialize_along_gradient`; 0 for
            LoRA's own start, at random, which suits all-linear.
        blend_weight: of the published blueprint.
        drift_policy: "warn", "error", "refresh" or "coarsen".
        placement: `plan_placement`'s wishes: a selector (`fraction`, `num_modules`, `top_p`, `threshold`), or `budget`
            and `keep`, with `mode`, `rank_by`, `per_cost`, `coverage`, `ranks` and `unfreeze_blocks`; and `memory`, a
            limit such as "12GiB" for the budget, or "auto" for what the card has. Or "all-linear" for LoRA on every
            linear layer.
        workload: `Workload`'s fields, where a step is another than the other keys say.
        lora: `LoraConfig`'s fields.
        training: `TrainingArguments`' fields.
        stop: the rule that may end the training early: `MarginalReturn`'s settings, with `metric` and `resource` as for
            `LedgerCallback`; `{}` for its defaults. The held-out examples are then evaluated twenty times, unless
            `training` says how often.
        carbon: grams of CO2e per kWh, or a country's three letters, for the books in `run.json`.
        base_learning_rate: what suits LoRA on every linear layer; a placement's learning rate is predicted from it.
        share_base: whether the originals of unfrozen blocks are released, see `share_base`.
        dtype: of base weights that are not quantised, such as "float32" or "bfloat16". "auto" is what the checkpoint
            says; on a quantised base, and for its computations, bfloat16 on a card and float32 on a CPU.
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
    start_examples: int = 0
    blend_weight: float = 0.5
    drift_policy: str = "warn"
    placement: Mapping[str, Any] | str = field(default_factory=dict)
    workload: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    stop: Mapping[str, Any] | None = None
    carbon: str | float | None = None
    base_learning_rate: float | None = None
    share_base: bool = False
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

    @property
    def mode(self) -> str:
        """The placement's: "lora", "unfreeze" or "lora+unfreeze"."""
        return "lora" if isinstance(self.placement, str) else self.placement.get("mode", "lora")

    @property
    def is_planned_on_the_empty_model(self) -> bool:
        """Whether what is unfrozen must be known before the model is loaded, so as not to be quantised."""
        return bool(self.quantization) and "unfreeze" in self.mode

    def check(self) -> None:
        """Find what contradicts itself.

        Raises:
            BlueprintError: for keys that are unknown inside of `placement`, or that do not go together.
        """
        placement = self.placement
        if isinstance(placement, str) and placement != ALL_LINEAR:
            raise BlueprintError(f"placement: {placement} is not known; give {ALL_LINEAR} or a mapping of selectors.")
        if not isinstance(placement, str):
            if unknown := [key for key in placement if key not in (*WISHES, "memory")]:
                raise BlueprintError(
                    f"placement: has unknown keys {unknown}; it may have {', '.join((*WISHES, 'memory'))}."
                )
            sizes = [
                key for key in ("fraction", "num_modules", "top_p", "threshold") if placement.get(key) is not None
            ]
            if placement.get("memory") is not None and sizes:
                raise BlueprintError(
                    f"placement: memory and {' and '.join(sizes)} both say how much: give one, or a budget or keep "
                    "beside memory."
                )
        if self.stop is not None and self.held_out is None and self.stop.get("metric") != "loss":
            raise BlueprintError(
                "stop: wants held_out, examples on which the return is measured; or metric: loss, the training loss."
            )
        if (
            isinstance(self.start_examples, bool)
            or not isinstance(self.start_examples, int)
            or self.start_examples < 0
        ):
            raise BlueprintError(
                f"start_examples: {self.start_examples!r} is no number of examples: give 32, or 0 for none."
            )
        if self.start_examples and (self.mode == "unfreeze" or "init_lora_weights" in self.lora):
            other = (
                "mode: unfreeze has no adapters"
                if self.mode == "unfreeze"
                else "lora's init_lora_weights says another"
            )
            raise BlueprintError(
                f"start_examples: {self.start_examples} is for adapters that begin along the gradient, and {other}. Give "
                "one of them, or start_examples: 0."
            )
        rule_of(self.stop)
        carbon_factor(self.carbon)
        if self.base_learning_rate is not None:
            self._check_learning_rate()
        if self.share_base and "unfreeze" not in self.mode:
            raise BlueprintError(
                f"share_base: true releases the originals of unfrozen blocks, and placement's mode is {self.mode!r}. "
                "Choose mode: lora+unfreeze or unfreeze, or leave share_base out."
            )
        if not self.is_planned_on_the_empty_model:
            return
        if self.blueprint is None:
            raise BlueprintError(
                f"mode: {self.mode} on a quantised model: the blocks to unfreeze must be known before it is loaded, and a "
                "probe comes after. Give a blueprint, such as one made with peft-blueprint generate, or leave "
                "quantization out."
            )
        if self.probe_examples and self.drift_policy not in ("warn", "error"):
            raise BlueprintError(
                f"drift_policy: {self.drift_policy} with mode: {self.mode} on a quantised model: the placement is made "
                "before the probe and cannot follow it. Choose warn or error, or probe_examples: 0."
            )

    def _check_learning_rate(self) -> None:
        rate = self.base_learning_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or rate <= 0:
            raise BlueprintError(
                f"base_learning_rate: {rate!r} is no positive number. In YAML write 1.0e-4, with the point: 1e-4 is a text."
            )
        if "learning_rate" in self.training:
            raise BlueprintError(
                f"base_learning_rate: {rate} and training's learning_rate: {self.training['learning_rate']} both say how "
                "fast: give one of them."
            )
        if "unfreeze" in self.mode:
            raise BlueprintError(
                f"base_learning_rate: {rate} with mode: {self.mode}: nothing predicts what unfrozen blocks want. Give "
                "training's learning_rate."
            )


def rule_of(stop: Mapping[str, Any] | None) -> tuple[MarginalReturn | None, dict[str, Any]]:
    """The rule that `stop:` asks for, and `LedgerCallback`'s settings among what it says.

    Raises:
        BlueprintError: for settings that there are not, or that are out of range.
    """
    if stop is None:
        return None, {}
    options = {key: stop[key] for key in ("metric", "resource") if key in stop}
    settings = {key: value for key, value in stop.items() if key not in options}
    known = MarginalReturn().settings()
    if unknown := sorted(settings.keys() - known.keys()):
        raise BlueprintError(f"stop: has unknown keys {unknown}; it may have metric, resource, {', '.join(known)}.")
    return MarginalReturn(**settings), options
