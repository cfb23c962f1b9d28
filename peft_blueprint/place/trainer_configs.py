"""Write a placement as the configuration of PEFT, TRL, axolotl, LLaMA-Factory, Unsloth or ms-swift.

All of them end in PEFT's `LoraConfig`, which matches a listed name exactly or as an ending after a dot, so the full name of
layer 1 does not reach layer 11. Checked against the sources of TRL 1.16, axolotl 0.19, LLaMA-Factory 0.9.5, Unsloth
2026.10 and ms-swift 4.6.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import yaml

from .._text import format_names
from ..errors import PlacementError
from .experts import experts_of
from .options import DEFAULT_RANK
from .placement import Placement
from .ranks import DEFAULT_ALPHA, alpha_of, scaling_of


Trainer = Literal["peft", "trl", "axolotl", "llamafactory", "unsloth", "swift"]

NO_TARGETS = "dummy-target-modules"  # PEFT's target_modules where only blocks are unfrozen
_MAX_SINGLE_PATTERNS = 200  # PEFT matches each against every module, and Python's cache of compiled patterns holds 512


@dataclass(frozen=True)
class LoraSettings:
    """Arguments of PEFT's `LoraConfig`: lists are sorted, names are full."""

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: list[str] | str
    target_parameters: list[str]
    modules_to_save: list[str]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the keyword arguments of `LoraConfig` that are not empty."""
        optional = ("target_parameters", "modules_to_save", "rank_pattern", "alpha_pattern")
        return {key: value for key, value in vars(self).items() if value or key not in optional}


def trainer_config(
    placement: Placement,
    trainer: Trainer,
    *,
    r: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    task_type: str = "CAUSAL_LM",
) -> str:
    """Write a placement as a trainer's own configuration: Python for PEFT and Unsloth, otherwise YAML.

    Every adapter has the scaling lora_alpha / r, whatever its rank is: alpha_i = r_i · lora_alpha / r.

    Args:
        placement: what to adapt.
        trainer: "peft", "trl", "axolotl", "llamafactory", "unsloth" or "swift".
        r: rank, of a placement that has none; by default 16.
        lora_alpha: alpha at the placement's `rank`; by default 2 · r.
        lora_dropout: LoRA's dropout.
        task_type: PEFT's task type, for PEFT and TRL.

    Raises:
        PlacementError: if the trainer cannot express the placement (ranks, fused experts, unfrozen blocks), or a number
            is out of range.

    Example:
        >>> from peft_blueprint import plan_placement
        >>> from peft_blueprint.testing import tiny_llama
        >>> placement = plan_placement(None, tiny_llama(), num_modules=2, r=8)
        >>> print(trainer_config(placement, "llamafactory").splitlines()[-1])
        lora_target: model.layers.1.self_attn.q_proj,model.layers.3.self_attn.q_proj
    """
    writers = {
        "peft": _peft,
        "trl": _trl,
        "axolotl": _axolotl,
        "llamafactory": _llamafactory,
        "unsloth": _unsloth,
        "swift": _swift,
    }
    if trainer not in writers:
        raise PlacementError(f"trainer={trainer!r}: choose {', '.join(get_args(Trainer))}.")
    settings = lora_settings(placement, r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout)
    body, notes = writers[trainer](placement, settings, task_type)
    return "".join(f"# {line}\n" for line in [*_notes(placement), *notes]) + body


def lora_settings(
    placement: Placement,
    *,
    r: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
) -> LoraSettings:
    """Return the arguments of PEFT's `LoraConfig` for a placement.

    Where ranks differ, `r` is the largest, because servers size their memory by it; patterns hold the others.

    Args:
        placement: what to adapt.
        r: rank, of a placement that has none; by default 16.
        lora_alpha: alpha at the placement's `rank`; by default 2 · r.
        lora_dropout: LoRA's dropout.
        use_rslora: whether alpha is over the root of the rank.

    Raises:
        PlacementError: if the placement is empty or has another rank, or a number is out of range.
    """
    if not (placement.lora or placement.unfreeze):
        raise PlacementError(f"The placement for {placement.model_id!r} is empty: it names no module to train.")
    if single := list(experts_of(placement.target_parameters)):
        raise PlacementError(
            f"The placement adapts single experts of {format_names(single)}, and a LoraConfig adapts all experts of a "
            "parameter. Use BlueprintConfig(placement=…), or plan without experts."
        )
    if placement.rank is not None and r not in (None, placement.rank):
        raise PlacementError(
            f"The placement for {placement.model_id!r} has rank {placement.rank}, got r={r}. Leave r out, or plan it again "
            f"with r={r}."
        )
    r = (placement.rank or DEFAULT_RANK) if r is None else r
    lora_alpha = DEFAULT_ALPHA * r if lora_alpha is None else lora_alpha
    if r != int(r) or r < 1 or not (lora_alpha > 0 and math.isfinite(lora_alpha)) or not 0 <= lora_dropout < 1:
        raise PlacementError(
            f"r must be a positive integer, lora_alpha positive and lora_dropout in [0, 1), got r={r}, "
            f"lora_alpha={lora_alpha}, lora_dropout={lora_dropout}."
        )
    if lora_dropout and placement.target_parameters:
        raise PlacementError(
            f"lora_dropout={lora_dropout} does not work on fused experts, which PEFT adapts as whole parameters, and "
            f"{len(placement.target_parameters)} are placed: {format_names(placement.target_parameters)}. Leave it at 0."
        )
    ranks = {name: placement.ranks.get(name, r) for name in placement.lora}
    largest = max(ranks.values(), default=r)
    scaling = scaling_of(r, lora_alpha, use_rslora)
    by_rank: dict[int, list[str]] = {}
    for name in sorted(ranks):
        if ranks[name] != largest:
            by_rank.setdefault(ranks[name], []).append(name)
    patterns = _patterns(by_rank)
    return LoraSettings(
        r=largest,
        lora_alpha=alpha_of(largest, scaling, use_rslora),
        lora_dropout=lora_dropout,
        target_modules=sorted(placement.target_modules) if placement.lora else NO_TARGETS,
        target_parameters=sorted(placement.target_parameters),
        modules_to_save=sorted(placement.unfreeze),
        rank_pattern=patterns,
        alpha_pattern={pattern: alpha_of(rank, scaling, use_rslora) for pattern, rank in patterns.items()},
    )


def _patterns(by_rank: Mapping[int, Sequence[str]]) -> dict[str, int]:
    """Return ranks by regular expression: one for each name, or one for each rank where there are many names.

    PEFT matches a pattern up to the end of a name; `^` makes it match the whole name.
    """
    if sum(map(len, by_rank.values())) <= _MAX_SINGLE_PATTERNS:
        return {"^" + re.escape(name): rank for rank, names in by_rank.items() for name in names}
    return {"^(?:" + "|".join(map(re.escape, names)) + ")": rank for rank, names in by_rank.items()}


def _notes(placement: Placement) -> list[str]:
    lines = [f"peft_blueprint for {placement.model_id!r}: {placement.summary()}"]
    if placement.learning_rate_scale is not None:
        scale = placement.learning_rate_scale
        lines.append(
            f"learning rate: start with about {scale:.3g} times that of LoRA on every linear layer at the same scaling, "
            "alpha / r"
        )
    return lines


def _peft(placement: Placement, settings: LoraSettings, task_type: str) -> tuple[str, list[str]]:
    config = _call("LoraConfig", settings.to_dict() | {"task_type": task_type})
    body = f"from peft import LoraConfig, get_peft_model\n\nconfig = {config}\nmodel = get_peft_model(model, config)\n"
    return body, _skip_note(placement)


def _trl(placement: Placement, settings: LoraSettings, task_type: str) -> tuple[str, list[str]]:
    _require_one_rank("TRL's command line", settings, "peft, axolotl or unsloth")
    _require_integer_alphas("TRL's command line", settings)
    values = settings.to_dict()
    written: dict[str, Any] = {"model_name_or_path": placement.model_id, "use_peft": True}
    written |= {key if key.startswith("lora_") else f"lora_{key}": value for key, value in values.items()}
    if len(written.get("lora_target_modules") or ()) == 1:  # TRL would make one name a regular expression
        written["lora_target_modules"] = 2 * settings.target_modules
    notes = ["for trl sft --config FILE, with dataset_name; in Python, --for peft prints the peft_config of a trainer"]
    return _yaml(written | {"lora_task_type": task_type}), notes + _skip_note(placement)


def _swift(placement: Placement, settings: LoraSettings, _: str) -> tuple[str, list[str]]:
    _require_one_rank("ms-swift", settings, "peft, axolotl or unsloth")
    written: dict[str, Any] = {
        "model": placement.model_id,
        "tuner_type": "lora",
        "lora_rank": settings.r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
    }
    if isinstance(settings.target_modules, list) and settings.target_modules:
        written["target_modules"] = settings.target_modules
    else:  # a list would be every linear layer by default, or names that PEFT misses
        written["target_regex"] = NO_TARGETS
    for key in ("target_parameters", "modules_to_save"):
        if values := getattr(settings, key):
            written[key] = values
    return _yaml(written), ["for swift sft FILE; ms-swift 3 calls tuner_type train_type", *_skip_note(placement)]


def _unsloth(placement: Placement, settings: LoraSettings, _: str) -> tuple[str, list[str]]:
    # a list, because older versions of FastLanguageModel split a regular expression into letters; an empty
    # target_parameters, because Unsloth adds the experts without it
    values = settings.to_dict() | {"target_parameters": settings.target_parameters}
    body = f"from unsloth import FastModel\n\nmodel = {_call('FastModel.get_peft_model', values, first='model')}\n"
    notes = [
        "load the model with FastModel.from_pretrained; FastLanguageModel allows only embeddings, head and norms in "
        "modules_to_save, and for some models only last parts of names in target_modules"
    ]
    if placement.unfreeze:
        notes.append("FastModel.from_pretrained quantizes unless load_in_4bit=False")
    return body, notes + _skip_note(placement)


def _axolotl(placement: Placement, settings: LoraSettings, _: str) -> tuple[str, list[str]]:
    _require_integer_alphas("axolotl", settings)
    values = settings.to_dict()
    names = {
        **{"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"},
        **{key: f"lora_{key}" for key in values if key not in ("r", "lora_alpha", "lora_dropout")},
    }
    written = {"base_model": placement.model_id, "adapter": "lora"} | {names[key]: values[key] for key in values}
    notes = ["for QLoRA: adapter: qlora and load_in_4bit: true; lora_target_linear would add every linear layer"]
    if settings.rank_pattern:
        notes.append("lora_rank_pattern and lora_alpha_pattern need axolotl 0.18 or newer")
    if placement.unfreeze:
        written |= {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}
        skip = json.dumps(placement.quantization_skip_modules(), ensure_ascii=False)
        notes.append(f"on a 4-bit base also: bnb_config_kwargs: {{llm_int8_skip_modules: {skip}}}")
    return _yaml(written), notes


def _llamafactory(placement: Placement, settings: LoraSettings, _: str) -> tuple[str, list[str]]:
    _require_one_rank("LLaMA-Factory", settings, "peft, axolotl or unsloth")
    _require_integer_alphas("LLaMA-Factory", settings)
    if settings.target_parameters:
        raise PlacementError(
            f"LLaMA-Factory has no adapters on parameters, and {format_names(settings.target_parameters)} are fused "
            "experts. Use peft, trl, axolotl, unsloth or swift, or place linear layers only."
        )
    if not placement.lora:
        raise PlacementError(
            f"LLaMA-Factory unfreezes blocks only beside LoRA, and this placement unfreezes "
            f"{format_names(placement.unfreeze)} without an adapter. Plan it with mode='lora+unfreeze', or use peft, trl, "
            "axolotl, unsloth or swift."
        )
    if unusable := [name for name in (*placement.lora, *placement.unfreeze) if "," in name or name != name.strip()]:
        raise PlacementError(f"LLaMA-Factory separates names by commas and cannot read {format_names(unusable)}.")
    written = {
        "model_name_or_path": placement.model_id,
        "stage": "sft",
        "finetuning_type": "lora",
        "lora_rank": settings.r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "lora_target": ",".join(settings.target_modules),
    }
    notes = [
        "in models with images or sound LLaMA-Factory matches every name that contains one of these: check its log"
    ]
    if placement.unfreeze:
        written["additional_target"] = ",".join(settings.modules_to_save)
        notes.append(
            "additional_target is trained whole: leave quantization_bit out, because 4-bit weights cannot be trained"
        )
    return _yaml(written), notes


def _skip_note(placement: Placement) -> list[str]:
    if not placement.unfreeze:
        return []
    skip = json.dumps(placement.quantization_skip_modules(), ensure_ascii=False)
    return [f"on a 4-bit base, load it with BitsAndBytesConfig(..., llm_int8_skip_modules={skip})"]


def _require_one_rank(trainer: str, settings: LoraSettings, others: str) -> None:
    if settings.rank_pattern:
        found = sorted({settings.r, *settings.rank_pattern.values()})
        raise PlacementError(
            f"{trainer} has a single rank, and this placement has ranks {found}. Plan it with ranks='uniform' and "
            f"r={found[0]} (--ranks uniform --rank {found[0]}), or use {others}."
        )


def _require_integer_alphas(trainer: str, settings: LoraSettings) -> None:
    alphas = {settings.r: settings.lora_alpha} | {
        rank: settings.alpha_pattern[pattern] for pattern, rank in settings.rank_pattern.items()
    }
    for rank, alpha in alphas.items():
        if alpha != int(alpha):
            raise PlacementError(
                f"{trainer} needs an integer alpha, and rank {rank} gets {alpha:.6g} so that all adapters have one scaling. "
                "Choose lora_alpha as a multiple of r."
            )


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=math.inf)


def _call(function: str, values: Mapping[str, Any], first: str | None = None) -> str:
    """Write a call in Python, one argument a line."""
    lines = [first] if first else []
    lines += [f"{key}={_python(value, 1)}" for key, value in values.items()]
    return f"{function}(\n" + "".join(f"    {line},\n" for line in lines) + ")"


def _python(value: Any, depth: int = 0) -> str:
    """Write a string, number, list of strings or dict in Python."""
    inner, outer = "    " * (depth + 1), "    " * depth
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list) and value:
        return "[\n" + "".join(f"{inner}{_python(item)},\n" for item in value) + outer + "]"
    if isinstance(value, dict):
        rows = "".join(f"{inner}{_python(key)}: {_python(item)},\n" for key, item in value.items())
        return "{\n" + rows + outer + "}"
    return repr(value)
