"""`BlueprintConfig`: a `LoraConfig` whose targets come from a blueprint, registered with PEFT.

BLUEPRINT is what a user writes and what a recipe serializes to; LORA is what the adapter is, live and on disk. So all of
PEFT's operations on LoRA work, and a saved adapter loads where this package is not installed.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, LoraModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.peft_types import register_peft_method
from torch import nn

from .._files import write_atomically
from .._text import format_names
from ..blueprint import ADAPTABLE, Blueprint, from_dict, split_expert, to_dict
from ..compare import ProbeOptions, probe_options, read_for_domain
from ..errors import BlueprintError, MismatchError, PlacementError
from ..measure import check_fits, find_submodules, find_weights, is_quantized, unwrap
from .cost import Workload, workload_of
from .expert_adapters import prepare_injection
from .experts import experts_of, with_whole_parameters
from .lora_fields import check_lora_fields, check_modules_to_save, peft_errors
from .options import DEFAULT_RANK, PlacementOptions
from .placement import Placement
from .planner import plan_placement, refused_by_peft
from .probe import probe_blueprint
from .ranks import DEFAULT_ALPHA, alpha_of, scaling_of
from .trainer_configs import lora_settings


SIDECAR = "blueprint_config.json"
# PEFT's adapters on parameters, which fused experts need, support none of these
_NOT_FOR_PARAMETERS = ("lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out")
# fields by which PEFT leaves modules out; it ignores some of them where targets are full names
_NARROWING = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
# fields that a settled config's placement tells, or that PEFT fills in
_SETTLED = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern", "modules_to_save", "peft_version")
_DECOMPOSING = ("pissa", "olora", "corda", "mica", "eva", "loftq")  # initializations by a weight's singular vectors
_FALSE_ALARM = "The following (rank|alpha)_pattern keys did not match any targeted module"
_DIGEST = "sha256:"
_LONGEST_SHOWN = 300  # characters of a field in a representation


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
class BlueprintConfig(PlacementOptions, ProbeOptions, LoraConfig):  # type: ignore[misc]  # r may be None until settled
    """LoRA adapters and unfrozen blocks where a blueprint says that they pay.

    Has the fields of `PlacementOptions`, `ProbeOptions` and `LoraConfig` (`lora_alpha`, `lora_dropout`, `task_type`,
    …). The targets are settled when the config is made, from the blueprint alone; when PEFT puts the adapter on, they
    are checked against the model. A probe, a budget, `best`, and a blueprint of groups or layers are settled on the
    model.
    Fused experts become `target_parameters`, linear layers `target_modules`. The planner is not offered what
    `exclude_modules`, `layers_to_transform` or `modules_to_save` leave out. Once the config is settled, `blueprint` is
    the digest of an object that was given, so that a log of the config stays short; `record` is the blueprint.

    **Probe.** With a `probe` the config runs Algorithm 1 of the paper: it measures the probe when PEFT puts the adapter
    on, checks the blueprint for drift, blends the two and places by the blend. The probe is neither saved nor logged; the
    blend is saved in `blueprint_config.json`. To resume a run, load the saved adapter (`PeftModel.from_pretrained`), or
    give the same examples in the same order.

    **Rank and scaling.** `lora_alpha / r` is the scaling as for LoRA on every linear layer, with `use_rslora`
    `lora_alpha / √r`, and each adapter keeps it whatever its rank becomes. If `r` is left out, it counts as 16, and if
    `lora_alpha` is left out, as 2 · r: not as the 8 of `LoraConfig`. Once settled, `r` is the rank of the adapters (the
    largest, where they differ) and `lora_alpha` follows. A `placement` that is given brings its rank: another `r` is an
    error, but for the rank that `ranks="equal_parameters"` raised it from. `rank_pattern` and `alpha_pattern` work with
    `ranks="uniform"`, where no budget depends on the ranks.

    Args:
        blueprint: a blueprint; a file, folder or repository id to read it from; or its JSON object.
        placement: a placement made before, instead of a blueprint and options.
        workload: training step for `budget` and `keep`: `{"batch_size": 4, "length": 1024, "checkpointing": True}`; a
            dict is completed from the model.
        probe: local data: batches or examples, see `measure_influence`, of which `probe_examples` are measured; or a
            blueprint that was measured on them. None again once the config is settled.

    Raises:
        BlueprintError: if the blueprint cannot be read or the options cannot be met, as with dropout on fused experts;
            when the adapter is put on, if the blueprint does not fit the model, or a quantized block would be unfrozen.

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
    lora_alpha: float | None = field(  # type: ignore[assignment]  # None until settled, as r
        default=None, metadata={"help": "Alpha at rank r; every adapter has its scaling. Default: 2 · r."}
    )
    probe: InitVar[Any] = None  # no field, so that nothing that walks the fields logs or copies it

    def __post_init__(self, probe: Any) -> None:
        PlacementOptions.__post_init__(self)
        ProbeOptions.__post_init__(self)
        vars(self)["probe"] = probe if self.probe_examples else None  # from where `dataclasses.replace` takes it
        is_copy = self.peft_type == PeftType.LORA  # of a settled config, by `dataclasses.replace`
        if isinstance(self.placement, Mapping):
            self.placement = Placement.from_dict(self.placement)
        check_lora_fields(self)
        if not isinstance(self.workload, Workload | Mapping | None):
            raise PlacementError(f"workload must be a Workload or a dict of its fields, got {self.workload!r}.")
        if self.layer_replication is not None:
            raise PlacementError(
                f"layer_replication={self.layer_replication} renumbers the layers that a placement names. Replicate the "
                "model's layers first and measure that model, or use LoraConfig."
            )
        if self._probe is not None and self.placement is not None:
            raise PlacementError("probe and placement both say where adapters go: give one of them.")
        if self.domain is not None and self.blueprint is None:
            raise PlacementError(
                f"domain={self.domain!r} chooses among the domains of a blueprint: give one, or leave domain out."
            )
        record = self._read() if self.placement is None else None
        if self.placement is None:
            for name in ("target_modules", "target_parameters"):
                if getattr(self, name) is not None:
                    self._refuse_targets(name, "a blueprint")
            on_model = (self._probe, self.budget, self.best)  # which tells the workload
            is_of_model = any(wish is not None for wish in on_model)
            if record is not None and record.level == "submodule" and not is_of_model:
                self._apply(self._plan(record))
        elif self.target_modules is None and self.target_parameters is None:
            self._apply(self.placement, is_given=True)
        elif not self._is_as_placed(self.placement):
            if not is_copy:
                name = "target_parameters" if self.target_modules is None else "target_modules"
                self._refuse_targets(name, "a placement")
            self.placement = None  # PEFT copies configs with other targets (add_weighted_adapter)
        with peft_errors(self):
            LoraConfig.__post_init__(self)
        self.peft_type = PeftType.LORA

    def __repr__(self) -> str:
        """Show what differs from the defaults, and of the targets only the placement's summary."""
        shown = {}
        for f in fields(self):
            value = getattr(self, f.name)
            default = f.default_factory() if callable(f.default_factory) else f.default
            if value is not None and value != default and not (self.placement is not None and f.name in _SETTLED):
                shown[f.name] = value
        return f"{type(self).__name__}({', '.join(f'{name}={_short(value)}' for name, value in shown.items())})"

    @property
    def _probe(self) -> Any:
        return vars(self)["probe"]

    @property
    def record(self) -> Blueprint | None:
        """The blueprint as an object; None if only a placement is known."""
        return self._read()

    @property
    def selection(self) -> tuple[str, ...]:
        """Full names of submodules with an adapter and of unfrozen modules; empty until the config is settled."""
        return (*self.placement.lora, *self.placement.unfreeze) if isinstance(self.placement, Placement) else ()

    @property
    def chosen_experts(self) -> dict[str, tuple[int, ...]]:
        """Numbers of the experts with an adapter, by fused parameter; parameters that are adapted whole are left out."""
        return experts_of(self.placement.target_parameters) if isinstance(self.placement, Placement) else {}

    def resolve(self, model: nn.Module) -> BlueprintConfig:
        """Settle the targets on a model and check that they fit it. PEFT calls this when it puts the adapter on.

        Returns:
            This config.

        Raises:
            MismatchError: if the blueprint belongs to another model.
            PlacementError: if a quantized block would be unfrozen.
        """
        if self.placement is None and self.target_modules is None:
            record = self._read() if self._probe is None else self._probed(model)
            assert record is not None
            placement = self._plan(record, model)
            if self._probe is not None:
                self.blueprint, self._record, self.domain, vars(self)["probe"] = record, record, None, None
            self._apply(placement)
        if isinstance(self.placement, Placement):
            if (record := self._read()) is not None:
                check_fits(record.expand(find_submodules(model)), model)
            _check_experts(self.placement, self.chosen_experts, model)
            _check_placement(with_whole_parameters(self.placement), model, self)
            check_modules_to_save(self, unwrap(model))
            self._check_initialization(self.placement, model)
        return self

    def to_lora_config(self) -> LoraConfig:
        """Return a plain `LoraConfig` for the same adapter, with full names as targets."""
        values = {f.name: getattr(self, f.name) for f in fields(LoraConfig) if f.init and f.name != "peft_type"}
        if isinstance(self.placement, Placement) and self.placement.lora and self._is_as_placed(self.placement):
            # PEFT abbreviates the live config's targets to suffixes that are right only for a model of this depth
            whole = with_whole_parameters(self.placement)
            values["target_modules"] = sorted(whole.target_modules)
            values["target_parameters"] = sorted(whole.target_parameters) or None
        return LoraConfig(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object that makes the same config: `peft_type` BLUEPRINT, the placement, the blueprint's digest.

        A blueprint that was given by its file or repository keeps that name; before the config is settled the blueprint
        is included whole.
        """
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
        if (record := self._read()) is not None and record.digest == self.blueprint:
            recipe["blueprint"] = to_dict(record)
        write_atomically(folder / SIDECAR, json.dumps(recipe, indent=2, sort_keys=True))

    def _read(self) -> Blueprint | None:
        """Return the blueprint of the domain, which is read once; None where the targets are known without it."""
        given = self.blueprint
        if isinstance(given, Blueprint) and self.domain is None:
            return given
        if "_record" in vars(self):
            return cast(Blueprint, vars(self)["_record"])
        is_digest = isinstance(given, str) and given.startswith(_DIGEST)
        if given is None or is_digest:
            if self.placement is None and self.target_modules is None and (is_digest or self._probe is None):
                got = f", got {given!r}, which is the digest of one" if is_digest else ""
                raise PlacementError(
                    f"BlueprintConfig needs a blueprint (an object, file, folder or Hub id), a probe or a placement{got}."
                )
            return None
        if isinstance(given, str | Path):
            self._record = read_for_domain(given, self.domain)
        else:
            record = given if isinstance(given, Blueprint) else from_dict(given)
            self._record = record if self.domain is None else record.for_domain(self.domain)
        return self._record

    def _probed(self, model: nn.Module) -> Blueprint:
        """Measure the probe on a model, and return the blueprint to place by."""
        published = self._read()
        if published is not None:
            check_fits(published.expand(find_submodules(model)), model)
        options = probe_options(self, domain=None)
        return probe_blueprint(model, self._probe, published, options, seed=self.seed).blueprint

    def _refuse_targets(self, name: str, other: str) -> None:
        raise PlacementError(
            f"{name}={getattr(self, name)} and {other} both say what to adapt: leave {name} out, or use LoraConfig."
        )

    def _is_as_placed(self, placement: Placement) -> bool:
        """Whether the targets are the placement's; PEFT's EVA takes some away."""
        modules, parameters = _targets(placement)
        return _matches(self.target_modules, modules) and _matches(self.target_parameters, parameters)

    def _plan(self, record: Blueprint, model: nn.Module | None = None) -> Placement:
        workload = workload_of(model, **self.workload) if isinstance(self.workload, Mapping) else self.workload
        options = PlacementOptions(**{f.name: getattr(self, f.name) for f in fields(PlacementOptions)})
        if model is not None:
            record = record.expand(find_submodules(model))
        left = set(self._left_by_fields(record.names))
        if self.mode == "unfreeze":  # a block is trained whole or not at all
            broken = {entry.group for entry in record if entry.group and entry.name not in left}
            left -= {entry.name for entry in record if entry.group in broken}
        if len(left) == len(record):
            return plan_placement(record, model, options, workload=workload)
        if not left:
            raise PlacementError(
                f"{self._narrowing()} leave none of the {len(record)} entries of the blueprint of {record.model_id!r} "
                f"({format_names(record.names)}). Leave out less."
            )
        record = replace(record, submodules=tuple(entry for entry in record if entry.name in left), model_digest=None)
        return plan_placement(record, model, options, workload=workload)

    def _narrowing(self) -> str:
        return " and ".join(f"{name}={value}" for name in _NARROWING if (value := getattr(self, name)) is not None)

    def _left_by_fields(self, names: Sequence[str]) -> list[str]:
        """Return the names that `exclude_modules`, `layers_to_transform` and `modules_to_save` leave, by PEFT's rules."""
        rules = {name: value for name in _NARROWING if (value := getattr(self, name)) is not None}
        if not rules:
            return list(names)
        try:
            re.compile(rules["exclude_modules"] if isinstance(rules.get("exclude_modules"), str) else "")
        except re.error as error:
            raise PlacementError(
                f"exclude_modules={rules['exclude_modules']!r} is not a regular expression: {error}. Give one, or a list of names."
            ) from error
        endings = LoraConfig(target_modules=sorted({name.rpartition(".")[2] for name in names}), **rules)
        # the layer's number in a name has to be the only one
        fused = {name: expert.parameter for name in names if (expert := split_expert(name)) is not None}
        return [name for name in names if check_target_module_exists(endings, fused.get(name, name))]

    def _check_initialization(self, placement: Placement, model: nn.Module) -> None:
        """Raise unless `init_lora_weights` can start adapters of these ranks on these weights."""
        assert self.r is not None
        how = str(self.init_lora_weights)
        ranks = {name: placement.ranks.get(name, self.r) for name in placement.target_modules}
        if how == "orthogonal" and (odd := [name for name, rank in ranks.items() if rank % 2]):
            raise PlacementError(
                f"init_lora_weights='orthogonal' needs even ranks, got {sorted({ranks[name] for name in odd})} for "
                f"{format_names(odd)}. Choose an even r and ranks='uniform'."
            )
        if how == "eva" and len(set(ranks.values())) > 1:
            raise PlacementError(
                f"init_lora_weights='eva' distributes ranks itself and starts from one, got "
                f"{sorted(set(ranks.values()))}. Set ranks='uniform'."
            )
        if how.startswith(_DECOMPOSING):
            if placement.target_parameters:
                raise PlacementError(
                    f"init_lora_weights={how!r} takes the singular vectors of a linear layer's weight, and "
                    f"{len(placement.target_parameters)} fused experts are placed: "
                    f"{format_names(placement.target_parameters)}. Leave init_lora_weights out, or place linear layers only."
                )
            full = {weight.name: min(weight.shape[-2:]) for weight in find_weights(model) if weight.name in ranks}
            if above := [name for name, most in full.items() if ranks[name] > most]:
                raise PlacementError(
                    f"init_lora_weights={how!r} takes a weight's singular vectors, of which {format_names(above)} have "
                    f"{min(full[name] for name in above)} or more, got rank {max(ranks[name] for name in above)}. Lower r."
                )

    def _apply(self, placement: Placement, is_given: bool = False) -> None:
        for name in _NOT_FOR_PARAMETERS:
            default = LoraConfig.__dataclass_fields__[name].default
            if placement.target_parameters and getattr(self, name):
                raise PlacementError(
                    f"{name}={getattr(self, name)} does not work on fused experts, which PEFT adapts as whole parameters, "
                    f"and {len(placement.target_parameters)} are placed: {format_names(placement.target_parameters)}. Set "
                    f"{name}={default}, or place linear layers only."
                )
        names = (*placement.lora, *(name for name in placement.unfreeze if name not in (self.modules_to_save or ())))
        if is_given and (out := set(names) - set(self._left_by_fields(names))):
            raise PlacementError(
                f"{self._narrowing()} leave out {format_names(sorted(out))} of the placement for "
                f"{placement.model_id!r}. Plan it again with BlueprintConfig(blueprint=…), or leave that field out."
            )
        self.placement = placement
        self.target_modules, self.target_parameters = _targets(placement)
        self.layers_to_transform = self.layers_pattern = None  # the full names meet them
        self._apply_ranks(with_whole_parameters(placement), is_given)
        if isinstance(self.blueprint, Blueprint | dict):
            record = self._read()
            assert record is not None
            self._record, self.blueprint, self.domain = record, record.digest, None
        if placement.unfreeze:
            already = self.modules_to_save or []
            self.modules_to_save = [*already, *(name for name in placement.unfreeze if name not in already)]

    def _apply_ranks(self, placement: Placement, is_given: bool) -> None:
        """Set ranks and alphas by the rule in the class's docstring."""
        load = asdict(self.workload) if isinstance(self.workload, Workload) else self.workload or {}
        reference = self.r or (placement.rank if is_given else None) or load.get("rank") or DEFAULT_RANK
        rank = placement.rank or reference
        if is_given and reference != rank and self.ranks != "equal_parameters":
            raise PlacementError(
                f"The placement for {placement.model_id!r} has rank {rank}, got r={self.r}. Leave r out, or plan it again "
                f"with r={self.r}."
            )
        limits = sorted({"memory", "time", "parameters"} & placement.selector.keys())
        patterns = [name for name in ("rank_pattern", "alpha_pattern") if getattr(self, name)]
        if patterns and (placement.ranks or rank != reference or limits):
            reason = f"a limit on {' and '.join(limits)}" if limits else f"ranks of its own, up to {rank}"
            raise PlacementError(
                f"{' and '.join(patterns)} would change adapters that the placement for {placement.model_id!r} plans with "
                f"{reason}. Leave the patterns out, or set ranks='uniform' and no such limit."
            )
        given = DEFAULT_ALPHA * reference if self.lora_alpha is None else self.lora_alpha
        scaling = scaling_of(reference, given, self.use_rslora)
        self.r, self.lora_alpha = rank, alpha_of(rank, scaling, self.use_rslora)
        if placement.ranks:
            settings = lora_settings(placement, r=rank, lora_alpha=self.lora_alpha, use_rslora=self.use_rslora)
            self.r, self.rank_pattern = settings.r, settings.rank_pattern
            self.lora_alpha, self.alpha_pattern = settings.lora_alpha, settings.alpha_pattern


def _targets(placement: Placement) -> tuple[list[str] | str, list[str] | None]:
    """Return PEFT's `target_modules` and `target_parameters`."""
    placement = with_whole_parameters(placement)
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


def _check_placement(placement: Placement, model: nn.Module, config: BlueprintConfig) -> None:
    """Raise unless each name is exactly one part of the model that can be adapted or unfrozen."""
    modules = {name: module for name, module in unwrap(model).named_modules() if name}
    _check_beside_other_adapters(placement, modules)
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
    forms |= dict.fromkeys(refused_by_peft(model, placement.target_modules), "refused by PEFT")
    unadaptable = {name: form for name, form in forms.items() if form not in (*ADAPTABLE, "head")}
    if unadaptable:
        raise PlacementError(
            f"No adapter can be put on {format_names([f'{name} ({form})' for name, form in unadaptable.items()])} of the placement "
            f"for {placement.model_id!r}: only on linear layers and fused experts, and not on weights that are shared "
            "with another module. Plan it again with the model: plan_placement(blueprint, model)."
        )
    also = _also_matched(placement.target_modules, modules, ".")
    ambiguous = (
        [name for name in also if not _is_excluded(name, config.exclude_modules)]
        + _also_matched(placement.target_parameters, weights, ".")
        + _also_matched(placement.unfreeze, modules, "")
    )
    if ambiguous:
        raise MismatchError(
            f"PEFT matches names by suffix, so the placement would also reach {format_names(ambiguous)}. Add them to "
            "exclude_modules, or adapt the inner model by itself."
        )
    others = [name for name in config.modules_to_save or () if name not in placement.unfreeze]
    for name in placement.unfreeze:
        if "x" in inspect.signature(ModulesToSaveWrapper.forward).parameters and "att" in name.rpartition(".")[2]:
            raise PlacementError(
                f"Unfreezing {name!r} needs PEFT 0.20 or newer: the copy that older ones train cannot be called with keywords "
                "alone, as attention blocks are. Update PEFT, or place adapters only (mode='lora')."
            )
        inside = [n for n in modules if n.startswith(name + ".")]
        saved = [n for n in inside if n.endswith(tuple(others))]
        kept = [n for n in inside if _is_excluded(n, config.exclude_modules)]
        if saved or kept:
            raise PlacementError(
                f"{name!r} would be trained whole, with {format_names(saved or kept)}, which "
                f"{'modules_to_save names too' if saved else 'exclude_modules leaves out'}. Take them out of "
                f"{'modules_to_save' if saved else 'exclude_modules'}, or unfreeze other blocks."
            )
        quantized = [w for w in weights.values() if w.name.startswith(f"{name}.") and is_quantized(w.tensor)]
        if quantized:
            raise PlacementError(
                f"{name!r} is held in 4 or 8 bits, which cannot be trained. Load the model with "
                f"BitsAndBytesConfig(..., llm_int8_skip_modules={placement.quantization_skip_modules()}), which other "
                "quantizations call modules_to_not_convert, or use mode='lora'."
            )


def _check_experts(placement: Placement, chosen: Mapping[str, Sequence[int]], model: nn.Module) -> None:
    """Raise unless the model has the chosen experts, fused into parameters in floating point."""
    weights = {weight.name: weight for weight in find_weights(model) if weight.form == "experts"} if chosen else {}
    for name, experts in chosen.items():
        has = weights[name].shape[0] if name in weights else 0
        if has <= max(experts):
            raise MismatchError(
                f"The placement for {placement.model_id!r} adapts expert {max(experts)} of {name!r}, and this "
                f"{type(unwrap(model)).__name__} has {f'{has} there' if has else 'no such parameter'}. Plan a placement for "
                "this model."
            )
        if is_quantized(weights[name].tensor):
            raise PlacementError(
                f"{name!r} is held in 8 bits or fewer, where single experts cannot be adapted. Load the model in bfloat16."
            )


def _check_beside_other_adapters(placement: Placement, modules: Mapping[str, nn.Module]) -> None:
    """Raise if another adapter trains a module whole in which this one has targets, or the other way round.

    PEFT copies a module that is trained whole, and renames everything inside.
    """
    copies = {name: module for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)}
    inside = [
        name for name in (*placement.lora, *placement.unfreeze) if name.startswith(tuple(n + "." for n in copies))
    ]
    if inside:
        adapters = sorted({adapter for module in copies.values() for adapter in module.modules_to_save})
        pattern = rf"(?:{'|'.join(map(re.escape, copies))})\..*"
        raise PlacementError(
            f"The adapter {format_names(adapters)} trains {format_names(list(copies))} whole, and PEFT puts no other adapter "
            f"inside them, got {format_names(inside)}. Plan this adapter with exclude_modules={pattern!r}, or put it on "
            "another copy of the model."
        )
    for name in placement.unfreeze:
        adapted = [n for n, m in modules.items() if n.startswith(name + ".") and isinstance(m, BaseTunerLayer)]
        if adapted and name not in copies:
            raise PlacementError(
                f"{name!r} would be trained whole, and another adapter is on {format_names(adapted)} inside it, which PEFT "
                "would copy with it. Unfreeze other blocks, or put this adapter on another copy of the model."
            )


def _is_excluded(name: str, exclude: Collection[str] | str | None) -> bool:
    """Whether PEFT leaves a module out: by a regular expression, or by full names and endings."""
    if isinstance(exclude, str):
        return bool(exclude) and re.fullmatch(exclude, name) is not None
    return any(name == key or name.endswith("." + key) for key in exclude or ())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"


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
        if not isinstance(config, BlueprintConfig):
            return inject(self, model, adapter_name, *args, **kwargs)
        config.resolve(model)
        if config.chosen_experts:
            prepare_injection(model, config, config.chosen_experts)
        with peft_errors(config), warnings.catch_warnings():
            if config.target_parameters:  # PEFT looks for patterns among modules alone, and applies them to parameters
                warnings.filterwarnings("ignore", message=_FALSE_ALARM)
            return inject(self, model, adapter_name, *args, **kwargs)

    return checked


def _register() -> None:
    register_peft_method(name="blueprint", config_cls=BlueprintConfig, model_cls=LoraModel, prefix="lora_")
    LoraModel.inject_adapter = _checked_injection(LoraModel.inject_adapter)  # type: ignore[method-assign]


_register()
