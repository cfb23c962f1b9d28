"""`BlueprintConfig`, what `get_peft_model` is given: a `LoraConfig` whose targets come from a blueprint.

BLUEPRINT is what the user writes and what a recipe serialises to; LORA is what the adapter is, live and on disk. So
everything PEFT does with LoRA works, and a saved adapter loads where this package was never installed.
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
from ..blueprint import ADAPTABLE, Blueprint, fetch, from_dict, to_dict
from ..errors import BlueprintError, MismatchError, PlacementError
from ..measure import check_fits, find_submodules, find_weights, is_quantized, unwrap
from .cost import Workload
from .options import Coverage, Mode, RankBy, Ranks
from .placement import Placement
from .planner import plan_placement, workload_of
from .trainer_configs import lora_settings


SIDECAR = "blueprint_config.json"
# what is handed to plan_placement as it is
_PLANNED = (
    *("mode", "fraction", "num_modules", "top_p", "threshold", "budget", "keep", "rank_by", "per_cost", "coverage"),
    *("unfreeze_blocks", "ranks"),
)
# PEFT's adapter of a whole parameter, which fused experts need, has none of these
_NOT_FOR_PARAMETERS = ("lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out")


def extend_peft_type(name: str) -> PeftType:
    """Add a member to PEFT's enumeration of methods, or return the one that is there.

    `PeftType` is closed, and `register_peft_method` wants a member. The steps are those of `enum` itself on CPython
    3.11 to 3.14; a test covers what PEFT and transformers do with members.
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
class BlueprintConfig(LoraConfig):
    """LoRA adapters and unfrozen blocks where a blueprint says that they pay.

    The targets are settled when the config is made, from the blueprint alone; when PEFT puts the adapter on, they are
    checked against the model. Every other field is `LoraConfig`'s: `r`, `lora_alpha`, `lora_dropout`, `task_type`, ….
    Experts that are fused into one parameter become `target_parameters`, linear layers `target_modules`.

    Args:
        blueprint (`Blueprint | str | dict`, *optional*):
            A blueprint; a file, folder or repository id to read it from; or its JSON object. One that speaks of groups
            or layers is expanded when the model is known.
        placement (`Placement | dict`, *optional*):
            A placement made before, instead of a blueprint and a selector.
        mode (`str`, defaults to `"lora"`):
            `"lora"` (on a quantised base that is QLoRA), `"unfreeze"` for whole attention and feed-forward blocks, or
            `"lora+unfreeze"`.
        fraction (`float`, *optional*):
            Share of the submodules, in (0, 1]. Without any selector it is a seventh for adapters with
            `ranks="equal_parameters"`, `keep=0.95` for others, and `fraction=0.2` for blocks, with another coverage, and
            where the blueprint has no shapes.
        num_modules (`int`, *optional*): How many submodules, instead.
        top_p (`float`, *optional*): The fewest that hold this share of the score, instead.
        threshold (`float`, *optional*): All whose score reaches this, instead.
        budget (`str | dict`, *optional*):
            What may be spent, instead: `"12GiB"`, `"0.7x"` of all-linear LoRA's step time, `"2M parameters"`, `"42
            modules"`, several with commas. Settled when the model is known; `r` is the rank that is planned with.
        keep (`float`, *optional*): Share of all-linear LoRA's predicted gain to keep at the least cost, instead.
        workload (`Workload | dict`, *optional*):
            What a step is, for `budget` and `keep`: `{"batch_size": 4, "length": 1024, "checkpointing": True}`; what is
            left out is read off the model.
        rank_by (`str`, *optional*):
            A score of `scores.SCORES`, such as `"gradient_norm"`, or `"cover_gain"`, the default for adapters where
            `"adam_gain"` was measured: each goes where it adds most to what those before it cover.
        per_cost (`bool`, defaults to `False`): Rank by the score over an adapter's step time.
        ranks (`str`, defaults to `"uniform"`):
            `"equal_parameters"`: `r` is the rank that LoRA on every linear layer would have, and the adapters' is raised
            to as many parameters; or `"influence"`: higher ranks where the score is higher, `r` on average.
        coverage (`str`, defaults to `"kind+depth"`): What to spread the choice over: `"none"` (the paper's rule),
            `"kind"` or `"kind+depth"`.
        unfreeze_blocks (`int`, *optional*): How many blocks, in mode `"lora+unfreeze"`.

    Raises:
        BlueprintError: if the blueprint cannot be read or the wish cannot be met, as with dropout on fused experts;
            when the adapter is put on, if the blueprint does not fit the model, or a quantised block would be unfrozen.
    """

    blueprint: Blueprint | str | dict | None = field(
        default=None, metadata={"help": "A blueprint, where to read one (file, folder, Hub id), or its JSON object."}
    )
    placement: Placement | dict | None = field(
        default=None, metadata={"help": "A placement made before, instead of a blueprint and a selector."}
    )
    mode: Mode = field(default="lora", metadata={"help": "Put LoRA adapters, unfreeze full blocks, or both."})
    fraction: float | None = field(default=None, metadata={"help": "Share of the submodules (or blocks), in (0, 1]."})
    num_modules: int | None = field(default=None, metadata={"help": "How many submodules (or blocks)."})
    top_p: float | None = field(default=None, metadata={"help": "The fewest that hold this share of the score."})
    threshold: float | None = field(default=None, metadata={"help": "All whose score is at least this."})
    budget: str | dict | None = field(
        default=None, metadata={"help": "What may be spent: '12GiB', '0.7x', '2M parameters', '42 modules'."}
    )
    keep: float | None = field(default=None, metadata={"help": "Share of the predicted gain to keep at least cost."})
    workload: Workload | dict | None = field(
        default=None, metadata={"help": "What a training step is, for budget and keep."}
    )
    rank_by: RankBy | None = field(
        default=None, metadata={"help": "The statistic to rank by; by default cover_gain where it can be told."}
    )
    per_cost: bool = field(default=False, metadata={"help": "Rank by the score over an adapter's step time."})
    ranks: Ranks = field(default="uniform", metadata={"help": "uniform, equal_parameters or influence."})
    coverage: Coverage = field(
        default="kind+depth", metadata={"help": "What the choice is spread over before the strongest are taken."}
    )
    unfreeze_blocks: int | None = field(default=None, metadata={"help": "How many blocks to unfreeze besides LoRA."})

    def __post_init__(self) -> None:
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
            # PEFT copies configs with other targets (add_weighted_adapter): what was placed no longer describes them
            modules, parameters = _targets(self.placement)
            if not (_is_said_by(self.target_modules, modules) and _is_said_by(self.target_parameters, parameters)):
                self.placement = None
        elif self.placement is not None:
            self._apply(self.placement)
        elif record is not None and record.level == "submodule" and self.budget is None:
            self._apply(self._plan(record))  # whether a budget is kept is known with the model
        super().__post_init__()
        self.peft_type = PeftType.LORA

    @property
    def selection(self) -> tuple[str, ...]:
        """Full names of what is adapted, adapters and unfrozen modules, once that is settled."""
        return (*self.placement.lora, *self.placement.unfreeze) if isinstance(self.placement, Placement) else ()

    def resolve(self, model: nn.Module) -> BlueprintConfig:
        """Settle the targets on a model and check that they fit it. PEFT's functions do this by themselves.

        Returns:
            The config itself.

        Raises:
            MismatchError: if the blueprint is of another model.
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
        """A plain `LoraConfig` with the same adapter, every target by its full name."""
        values = {f.name: getattr(self, f.name) for f in fields(LoraConfig) if f.init and f.name != "peft_type"}
        if isinstance(self.placement, Placement) and self.placement.lora:
            # PEFT abbreviates the live config's targets to endings that fit this model's depth and no other's
            values["target_modules"] = sorted(self.placement.target_modules)
            values["target_parameters"] = sorted(self.placement.target_parameters) or None
        return LoraConfig(**values)

    def to_dict(self) -> dict[str, Any]:
        """The recipe: `peft_type` BLUEPRINT, and the blueprint as it was given or as its JSON object."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in LoraConfig.__dataclass_fields__}
        if isinstance(self.blueprint, Blueprint):
            own["blueprint"] = to_dict(self.blueprint)
        if isinstance(self.placement, Placement):
            own["placement"] = self.placement.to_dict()
        if isinstance(self.workload, Workload):
            own["workload"] = asdict(self.workload)
        return {**self.to_lora_config().to_dict(), **own, "peft_type": BLUEPRINT}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write a plain LORA `adapter_config.json`, and beside it `blueprint_config.json`: the recipe and its reasons.

        Raises:
            BlueprintError: if the folder cannot be written.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise BlueprintError(f"{folder} is a file, and an adapter needs a folder. Choose another.")
        try:
            self.to_lora_config().save_pretrained(save_directory, **kwargs)
        except OSError as error:
            raise BlueprintError(f"{folder} cannot be written: {error.strerror}. Choose another folder.") from error
        path = folder / "adapter_config.json"
        saved = json.loads(path.read_text())
        # a set comes out in the order of its hashes
        for key in ("target_modules", "target_parameters", "modules_to_save"):
            if isinstance(saved.get(key), list):
                saved[key] = sorted(saved[key])
        write_atomically(path, json.dumps(saved, indent=2, sort_keys=True))
        recipe = {key: sorted(v) if isinstance(v, set) else v for key, v in self.to_dict().items()}
        write_atomically(folder / SIDECAR, json.dumps(recipe, indent=2, sort_keys=True))

    def _read(self) -> Blueprint | None:
        """The blueprint as a record, read once."""
        if self.blueprint is None:
            if self.placement is None and self.target_modules is None:
                raise PlacementError(
                    "BlueprintConfig needs a blueprint (or a placement): a Blueprint, a file, a folder or a Hub id."
                )
            return None
        if isinstance(self.blueprint, Blueprint):
            return self.blueprint
        if "_record" not in vars(self):
            self._record = from_dict(self.blueprint) if isinstance(self.blueprint, dict) else fetch(self.blueprint)
        return self._record

    def _plan(self, record: Blueprint, model: nn.Module | None = None) -> Placement:
        workload = workload_of(model, **self.workload) if isinstance(self.workload, Mapping) else self.workload
        return plan_placement(
            record,
            model,
            workload=workload,
            rank=self.r if self.budget is not None or self.keep is not None or self.ranks != "uniform" else None,
            **{name: getattr(self, name) for name in _PLANNED},
        )

    def _apply(self, placement: Placement) -> None:
        for name in _NOT_FOR_PARAMETERS:
            default = LoraConfig.__dataclass_fields__[name].default
            if placement.target_parameters and getattr(self, name):
                raise PlacementError(
                    f"{name}={getattr(self, name)} does not work on fused experts, which PEFT adapts as whole parameters, "
                    f"and {len(placement.target_parameters)} are placed: {format_names(placement.target_parameters)}. Leave "
                    f"{name} at {default}, or give a placement of linear layers alone."
                )
        self.placement = placement
        self.target_modules, self.target_parameters = _targets(placement)
        self._apply_ranks(placement)
        if placement.unfreeze:
            already = self.modules_to_save or []
            self.modules_to_save = [*already, *(name for name in placement.unfreeze if name not in already)]

    def _apply_ranks(self, placement: Placement) -> None:
        """The ranks that were planned, every adapter with the scaling that `r` and `lora_alpha` say.

        An `r` that is given counts before a plan's, unless a budget holds for that.
        """
        defaults = {name: LoraConfig.__dataclass_fields__[name].default for name in ("r", "lora_alpha")}
        is_own = self.ranks == "equal_parameters"  # then r says what to plan from
        if placement.rank is not None and placement.rank != self.r and (is_own or self.r == defaults["r"]):
            if is_own or self.lora_alpha == defaults["lora_alpha"]:
                self.lora_alpha = self.lora_alpha * placement.rank // self.r
            self.r = placement.rank
        if placement.rank not in (None, self.r) and {"memory", "time", "parameters"} & placement.selector.keys():
            raise PlacementError(
                f"The placement for {placement.model_id!r} was planned for rank {placement.rank}, and r={self.r}. Plan it "
                f"again with rank={self.r}, or leave r out."
            )
        if not placement.ranks:
            return
        settings = lora_settings(placement, r=self.r, lora_alpha=self.lora_alpha)
        self.r, self.rank_pattern = settings.r, settings.rank_pattern
        if not self.use_rslora:  # which scales by the root of the rank, with one alpha for all
            self.lora_alpha, self.alpha_pattern = settings.lora_alpha, settings.alpha_pattern  # type: ignore[assignment]


def _targets(placement: Placement) -> tuple[list[str] | str, list[str] | None]:
    """PEFT's target_modules and target_parameters."""
    modules, parameters = list(placement.target_modules), list(placement.target_parameters)
    return (modules if modules or parameters else DUMMY_TARGET_MODULES), parameters or None


def _is_said_by(targets: Collection[str] | str | None, names: Collection[str] | str | None) -> bool:
    """Whether a config's targets are these names, or the endings to which PEFT abbreviates many."""
    if isinstance(targets, str) or isinstance(names, str):
        return targets == names
    targets, names = set(targets or ()), set(names or ())
    if targets == names:
        return True
    ends = {target: {name for name in names if name == target or name.endswith("." + target)} for target in targets}
    return all(ends.values()) and set().union(*ends.values()) == names


def _check_placement(placement: Placement, model: nn.Module) -> None:
    """Raise unless every name is one part of the model that can be adapted so, and what is unfrozen can be."""
    modules = {name: module for name, module in unwrap(model).named_modules() if name}
    weights = {weight.name: weight for weight in find_weights(model)}
    missing = [name for name in (*placement.target_modules, *placement.unfreeze) if name not in modules]
    missing += [name for name in placement.target_parameters if name not in weights]
    if missing:
        known = [name for name, weight in weights.items() if weight.form in ADAPTABLE]
        raise MismatchError(
            f"{format_names(missing)} of the placement for {placement.model_id!r} are not in this "
            f"{type(unwrap(model)).__name__}, which has {format_names(known)}. Plan it for this model."
        )
    forms = {name: weights[name].form if name in weights else "tied to another" for name in placement.lora}
    spoiled = {name: form for name, form in forms.items() if form not in (*ADAPTABLE, "head")}
    if spoiled:
        raise PlacementError(
            f"No adapter can be put on {format_names([f'{name} ({form})' for name, form in spoiled.items()])} of the placement "
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
            f"PEFT matches names by their endings, so that the placement would also reach {format_names(ambiguous)}. "
            "Add exclude_modules for those, or adapt the inner model by itself."
        )
    for name in placement.unfreeze:
        quantized = [
            n for n, m in modules[name].named_modules() if isinstance(m, nn.Linear) and is_quantized(m.weight)
        ]
        if quantized:
            raise PlacementError(
                f"{name!r} is held in 4 or 8 bits, which cannot be trained. Load the model with "
                f"BitsAndBytesConfig(..., llm_int8_skip_modules={placement.quantization_skip_modules()}) to keep what "
                "is unfrozen in floating point, or use mode='lora'."
            )


def _also_matched(names: Sequence[str], known: Iterable[str], boundary: str) -> list[str]:
    endings = tuple(boundary + name for name in names)
    return [key for key in known if endings and key.endswith(endings) and key not in names]


def _checked_injection(inject: Any) -> Any:
    """PEFT's one funnel for putting a LoRA adapter on a model, with a blueprint's check before it.

    PEFT passes over target names that a model does not have, as long as one matches; a blueprint of a smaller sibling
    would place its adapters on half a model without a word. Other configs go through untouched.
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
