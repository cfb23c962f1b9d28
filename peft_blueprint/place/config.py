"""`BlueprintConfig`: a `LoraConfig` whose targets come from a blueprint, registered with PEFT.

BLUEPRINT is what a user writes and what a recipe serialises to; LORA is what the adapter is, live and on disk. So all of
PEFT's operations on LoRA work, and a saved adapter loads where this package is not installed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, LoraModel, PeftType
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.peft_types import register_peft_method
from torch import nn

from .._files import write_atomically
from .._text import format_names
from ..blueprint import ADAPTABLE, Blueprint, from_dict, to_dict
from ..errors import BlueprintError, MismatchError, PlacementError
from ..measure import check_fits, find_submodules, find_weights, is_quantized, unwrap
from .cost import Workload, workload_of
from .options import DEFAULT_RANK, PlacementOptions
from .placement import Placement
from .planner import plan_placement
from .trainer_configs import lora_settings, whole_if_exact


SIDECAR = "blueprint_config.json"
# PEFT's adapters on parameters, which fused experts need, support none of these
_NOT_FOR_PARAMETERS = ("lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out")


def extend_peft_type(name: str) -> PeftType:
    """Add a member to PEFT's enumeration of methods, or return an existing one.

    `register_peft_method` needs a member, and `PeftType` cannot be extended by subclassing. The steps are those of
    CPython's own `enum`, 3.11 to 3.14; a test covers what PEFT and transformers do with members.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    if "_hashable_values_" in vars(PeftType):  # CPython 3.13 on
        PeftType._hashable_values_.append(name)  # type: ignore[attr-defined]
    type.__setattr__(PeftType, name, member)
    return member


BLUEPRINT = extend_peft_type("BLUEPRINT")


@dataclass
class BlueprintConfig(PlacementOptions, LoraConfig):  # type: ignore[misc]  # r may be None until it is settled
    """LoRA adapters and unfrozen blocks where a blueprint says that they pay.

    Has the fields of `PlacementOptions` and of `LoraConfig` (`lora_alpha`, `lora_dropout`, `task_type`, …). The targets
    are settled when the config is made, from the blueprint alone; when PEFT puts the adapter on, they are checked
    against the model. A budget, and a blueprint of groups or layers, are settled on the model. Fused experts become
    `target_parameters`, linear layers `target_modules`.

    **Rank and scaling.** `lora_alpha / r` is the scaling as for LoRA on every linear layer, and each adapter keeps it
    whatever its rank becomes. Once settled, `r` is the rank of the adapters (the largest, where they differ) and
    `lora_alpha` follows. If `r` is left out, it counts as 16, or as the rank of a `placement` that is given; if
    `lora_alpha` is left out as well, the scaling is 1, as in `LoraConfig`'s defaults.

    Args:
        blueprint (`Blueprint | str | dict`, *optional*):
            A blueprint; a file, folder or repository id to read it from; or its JSON object.
        placement (`Placement | dict`, *optional*):
            A placement made before, instead of a blueprint and options.
        workload (`Workload | dict`, *optional*):
            Training step for `budget` and `keep`: `{"batch_size": 4, "length": 1024, "checkpointing": True}`; a dict is
            completed from the model.

    Raises:
        BlueprintError: if the blueprint cannot be read or the options cannot be met, as with dropout on fused experts;
            when the adapter is put on, if the blueprint does not fit the model, or a quantised block would be unfrozen.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_blueprint import BlueprintConfig, generate_blueprint
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> model = tiny_llama(layers=4)
        >>> blueprint = generate_blueprint(model, toy_batches(), progress=False)
        >>> config = BlueprintConfig(blueprint=blueprint, num_modules=4, task_type="CAUSAL_LM")
        >>> len(get_peft_model(model, config).peft_config["default"].selection)
        4
    """

    blueprint: Blueprint | str | dict | None = field(
        default=None, metadata={"help": "A blueprint, where to read one (file, folder, Hub id), or its JSON object."}
    )
    placement: Placement | dict | None = field(
        default=None, metadata={"help": "A placement made before, instead of a blueprint and options."}
    )
    workload: Workload | dict | None = field(
        default=None, metadata={"help": "Training step that costs are predicted for."}
    )

    def __post_init__(self) -> None:
        PlacementOptions.__post_init__(self)
        if isinstance(self.placement, Mapping):
            self.placement = Placement.from_dict(self.placement)
        record = self._read() if self.placement is None else None
        for name in ("target_modules", "target_parameters"):
            if self.placement is None and getattr(self, name) is not None:
                raise PlacementError(
                    f"{name}={getattr(self, name)} and a blueprint both say what to adapt: leave {name} out, or use "
                    "LoraConfig."
                )
        if self.placement is not None and self.target_modules is not None:
            # PEFT copies configs with other targets (add_weighted_adapter), which the placement no longer describes
            modules, parameters = _targets(self.placement)
            if not (_matches(self.target_modules, modules) and _matches(self.target_parameters, parameters)):
                self.placement = None
        elif self.placement is not None:
            self._apply(self.placement, is_given=True)
        elif record is not None and record.level == "submodule" and self.budget is None:
            self._apply(self._plan(record))  # a budget is settled on the model, which tells the workload
        LoraConfig.__post_init__(self)
        self.peft_type = PeftType.LORA

    @property
    def selection(self) -> tuple[str, ...]:
        """Full names of submodules with an adapter and of unfrozen modules; empty until the config is settled."""
        return (*self.placement.lora, *self.placement.unfreeze) if isinstance(self.placement, Placement) else ()

    def resolve(self, model: nn.Module) -> BlueprintConfig:
        """Settle the targets on a model and check that they fit it. PEFT calls this when it puts the adapter on.

        Returns:
            This config.

        Raises:
            MismatchError: if the blueprint belongs to another model.
            PlacementError: if a quantised block would be unfrozen.
        """
        if self.placement is None and self.target_modules is None:
            record = self._read()
            assert record is not None
            self._apply(self._plan(record, model))
        if isinstance(self.placement, Placement):
            if self.blueprint is not None:
                record = self._read()
                assert record is not None
                check_fits(record.expand(find_submodules(model)), model)
            _check_placement(self.placement, model)
        return self

    def to_lora_config(self) -> LoraConfig:
        """Return a plain `LoraConfig` for the same adapter, with full names as targets."""
        values = {f.name: getattr(self, f.name) for f in fields(LoraConfig) if f.init and f.name != "peft_type"}
        if isinstance(self.placement, Placement) and self.placement.lora:
            # PEFT abbreviates the live config's targets to suffixes that are right only for a model of this depth
            values["target_modules"] = sorted(self.placement.target_modules)
            values["target_parameters"] = sorted(self.placement.target_parameters) or None
        return LoraConfig(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe: `peft_type` BLUEPRINT, and the blueprint as it was given or as a JSON object."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in LoraConfig.__dataclass_fields__}
        if isinstance(self.blueprint, Blueprint):
            own["blueprint"] = to_dict(self.blueprint)
        if isinstance(self.placement, Placement):
            own["placement"] = self.placement.to_dict()
        if isinstance(self.workload, Workload):
            own["workload"] = asdict(self.workload)
        return {**self.to_lora_config().to_dict(), **own, "peft_type": BLUEPRINT}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write a plain LORA `adapter_config.json`, and beside it the recipe, `blueprint_config.json`.

        Raises:
            BlueprintError: if the folder cannot be written.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise BlueprintError(f"{folder} is a file, and an adapter needs a folder. Choose another path.")
        try:
            self.to_lora_config().save_pretrained(save_directory, **kwargs)
        except OSError as error:
            raise BlueprintError(f"{folder} cannot be written: {error.strerror}. Choose another folder.") from error
        path = folder / "adapter_config.json"
        saved = json.loads(path.read_text())
        for key in ("target_modules", "target_parameters", "modules_to_save"):
            if isinstance(saved.get(key), list):
                saved[key] = sorted(saved[key])  # PEFT writes sets in the order of their hashes
        write_atomically(path, json.dumps(saved, indent=2, sort_keys=True))
        recipe = {key: sorted(v) if isinstance(v, set) else v for key, v in self.to_dict().items()}
        write_atomically(folder / SIDECAR, json.dumps(recipe, indent=2, sort_keys=True))

    def _read(self) -> Blueprint | None:
        """Return the blueprint, which is read once."""
        if self.blueprint is None:
            if self.placement is None and self.target_modules is None:
                raise PlacementError(
                    "BlueprintConfig needs a blueprint (an object, file, folder or Hub id) or a placement."
                )
            return None
        if isinstance(self.blueprint, Blueprint):
            return self.blueprint
        if "_record" not in vars(self):
            self._record = (
                from_dict(self.blueprint)
                if isinstance(self.blueprint, dict)
                else Blueprint.from_pretrained(self.blueprint)
            )
        return self._record

    def _plan(self, record: Blueprint, model: nn.Module | None = None) -> Placement:
        workload = workload_of(model, **self.workload) if isinstance(self.workload, Mapping) else self.workload
        options = PlacementOptions(**{f.name: getattr(self, f.name) for f in fields(PlacementOptions)})
        return plan_placement(record, model, options, workload=workload)

    def _apply(self, placement: Placement, is_given: bool = False) -> None:
        for name in _NOT_FOR_PARAMETERS:
            default = LoraConfig.__dataclass_fields__[name].default
            if placement.target_parameters and getattr(self, name):
                raise PlacementError(
                    f"{name}={getattr(self, name)} does not work on fused experts, which PEFT adapts as whole parameters, "
                    f"and {len(placement.target_parameters)} are placed: {format_names(placement.target_parameters)}. Set "
                    f"{name}={default}, or place linear layers only."
                )
        self.placement = placement
        self.target_modules, self.target_parameters = _targets(placement)
        self._apply_ranks(placement, is_given)
        if placement.unfreeze:
            already = self.modules_to_save or []
            self.modules_to_save = [*already, *(name for name in placement.unfreeze if name not in already)]

    def _apply_ranks(self, placement: Placement, is_given: bool) -> None:
        """Set ranks and alphas by the rule in the class's docstring.

        An `r` beside a given placement replaces its rank, unless a budget depends on that or `ranks` is
        "equal_parameters", where `r` is what the placement was planned from.
        """
        load = asdict(self.workload) if isinstance(self.workload, Workload) else self.workload or {}
        reference = self.r or load.get("rank") or (placement.rank if is_given else None) or DEFAULT_RANK
        is_unscaled = self.r is None and self.lora_alpha == LoraConfig.__dataclass_fields__["lora_alpha"].default
        rank = placement.rank or reference
        if is_given and self.r not in (None, rank) and self.ranks != "equal_parameters":
            if {"memory", "time", "parameters"} & placement.selector.keys():
                raise PlacementError(
                    f"The placement for {placement.model_id!r} was planned for rank {rank}, got r={self.r}. Plan it again "
                    f"with r={self.r}, or leave r out."
                )
            rank = reference
        alpha = rank if is_unscaled else whole_if_exact(self.lora_alpha * rank / reference)
        self.r, self.lora_alpha = rank, alpha  # type: ignore[assignment]
        if not placement.ranks:
            return
        settings = lora_settings(placement, r=rank, lora_alpha=alpha)
        self.r, self.rank_pattern = settings.r, settings.rank_pattern
        if not self.use_rslora:  # which scales by the root of the rank, with one alpha for all
            self.lora_alpha, self.alpha_pattern = settings.lora_alpha, settings.alpha_pattern  # type: ignore[assignment]


def _targets(placement: Placement) -> tuple[list[str] | str, list[str] | None]:
    """Return PEFT's `target_modules` and `target_parameters`."""
    modules, parameters = list(placement.target_modules), list(placement.target_parameters)
    return (modules if modules or parameters else DUMMY_TARGET_MODULES), parameters or None


def _matches(targets: Collection[str] | str | None, names: Collection[str] | str | None) -> bool:
    """Whether a config's targets are these names, or the suffixes to which PEFT abbreviates many names."""
    if isinstance(targets, str) or isinstance(names, str):
        return targets == names
    targets, names = set(targets or ()), set(names or ())
    if targets == names:
        return True
    ends = {target: {name for name in names if name == target or name.endswith("." + target)} for target in targets}
    return all(ends.values()) and set().union(*ends.values()) == names


def _check_placement(placement: Placement, model: nn.Module) -> None:
    """Raise unless each name is exactly one part of the model that can be adapted or unfrozen."""
    modules = {name: module for name, module in unwrap(model).named_modules() if name}
    weights = {weight.name: weight for weight in find_weights(model)}
    missing = [name for name in (*placement.target_modules, *placement.unfreeze) if name not in modules]
    missing += [name for name in placement.target_parameters if name not in weights]
    if missing:
        known = [name for name, weight in weights.items() if weight.form in ADAPTABLE]
        raise MismatchError(
            f"{format_names(missing)} of the placement for {placement.model_id!r} are not in this "
            f"{type(unwrap(model)).__name__}, which has {format_names(known)}. Plan a placement for this model."
        )
    forms = {name: weights[name].form if name in weights else "tied to another" for name in placement.lora}
    unadaptable = {name: form for name, form in forms.items() if form not in (*ADAPTABLE, "head")}
    if unadaptable:
        raise PlacementError(
            f"No adapter can be put on {format_names([f'{name} ({form})' for name, form in unadaptable.items()])} of the placement "
            f"for {placement.model_id!r}: only on linear layers and fused experts, and not on weights that are shared "
            "with another module. Plan it again with the model: plan_placement(blueprint, model)."
        )
    ambiguous = (
        _also_matched(placement.target_modules, modules, ".")
        + _also_matched(placement.target_parameters, weights, ".")
        + _also_matched(placement.unfreeze, modules, "")
    )
    if ambiguous:
        raise MismatchError(
            f"PEFT matches names by suffix, so the placement would also reach {format_names(ambiguous)}. Add them to "
            "exclude_modules, or adapt the inner model by itself."
        )
    for name in placement.unfreeze:
        quantized = [
            n for n, m in modules[name].named_modules() if isinstance(m, nn.Linear) and is_quantized(m.weight)
        ]
        if quantized:
            raise PlacementError(
                f"{name!r} is held in 4 or 8 bits, which cannot be trained. Load the model with "
                f"BitsAndBytesConfig(..., llm_int8_skip_modules={placement.quantization_skip_modules()}), or use "
                "mode='lora'."
            )


def _also_matched(names: Sequence[str], known: Iterable[str], boundary: str) -> list[str]:
    endings = tuple(boundary + name for name in names)
    return [key for key in known if endings and key.endswith(endings) and key not in names]


def _checked_injection(inject: Any) -> Any:
    """Wrap `LoraModel.inject_adapter`, through which every LoRA adapter is put on, to resolve a `BlueprintConfig` first.

    PEFT ignores target names that a model does not have as long as one matches, so the blueprint of a smaller sibling
    would silently adapt half of a model. Other configs are not affected.
    """

    @functools.wraps(inject)
    def checked(self: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config[adapter_name]
        if isinstance(config, BlueprintConfig):
            config.resolve(model)
        return inject(self, model, adapter_name, *args, **kwargs)

    return checked


def _register() -> None:
    register_peft_method(name="blueprint", config_cls=BlueprintConfig, model_cls=LoraModel, prefix="lora_")
    LoraModel.inject_adapter = _checked_injection(LoraModel.inject_adapter)  # type: ignore[method-assign]


_register()
