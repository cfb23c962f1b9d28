"""Rewrite a LoRA adapter of several ranks as one of a single rank that computes the same."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as TENSORS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import pad

from .._files import replacing
from .._text import format_names
from ..errors import BlueprintError, FormatError


Zeros = dict[str, tuple[int, int]]  # (d_out, d_in) of modules by full name

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.weight)?")
_MERGE = "Merge it into the model first: PeftModel.from_pretrained(…).merge_and_unload(), and serve that"
_UNSERVABLE = {  # keys of the config that vLLM or llama.cpp does not support
    "use_dora": "DoRA's magnitudes",
    "modules_to_save": "fully trained modules",
    "lora_bias": "biases of adapters",
    "use_qalora": "QALoRA's pooled inputs",
    "use_bdlora": "block-diagonal adapters",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "repeated layers",
    "monteclora_config": "MonteCLoRA's sampled weights",
    "arrow_config": "Arrow's routing",
    "kasa_config": "KaSA's truncated base model",
}
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")  # init_lora_weights that change the base model's weights


@dataclass(frozen=True)
class PairOfFile:
    """A and B of one adapter.

    Args:
        name: full name of the module in the base model.
        a: (rank, d_in); for fused experts (experts · rank, d_in).
        b: (d_out, rank); for fused experts (d_out, rank · experts).
        a_key: name of A in the file.
        b_key: name of B in the file.
        rank: rank of each expert.
        scaling: factor of B·A in PEFT.
        parameter: of fused experts, "gate_up_proj" or "down_proj"; None for a linear layer.
    """

    name: str
    a: Tensor
    b: Tensor
    a_key: str
    b_key: str
    rank: int
    scaling: float
    parameter: str | None = None

    @property
    def is_of_experts(self) -> bool:
        """Whether it is of fused experts."""
        return self.parameter is not None

    @property
    def d_in(self) -> int:
        """Width of the layer's input."""
        return self.a.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the layer's output."""
        return self.b.shape[0]

    def widened(self, rank: int, scaling: float) -> dict[str, Tensor]:
        """Return the same product at another rank and scaling; new rows and columns are zeros."""
        experts = self.a.shape[0] // self.rank
        a = self.a.reshape(experts, self.rank, *self.a.shape[1:])
        b = self.b.reshape(self.b.shape[0], self.rank, experts, *self.b.shape[2:])
        if self.scaling != scaling:
            b = (b.double() * (self.scaling / scaling)).to(b.dtype)
        extra = rank - self.rank
        a = pad(a, [0, 0] * (a.dim() - 2) + [0, extra])
        b = pad(b, [0, 0] * (b.dim() - 2) + [0, extra])
        return {
            self.a_key: a.reshape(experts * rank, *self.a.shape[1:]).contiguous(),
            self.b_key: b.reshape(self.b.shape[0], rank * experts, *self.b.shape[2:]).contiguous(),
        }


def export_uniform_lora(
    adapter_folder: str | Path,
    out_folder: str | Path,
    rank: int | None = None,
    *,
    zeros: Zeros | None = None,
    full_names: bool = False,
) -> Path:
    """Write a LoRA adapter with one rank and one scaling that computes the same as a saved one.

    Servers read one rank and one alpha: vLLM before 0.33 and llama.cpp ignore `rank_pattern` and `alpha_pattern`, and
    would scale such an adapter wrongly. Here A gets rows of zeros and B columns of zeros up to the common rank, which
    leaves B·A unchanged, and B is multiplied by the ratio of its scaling to the common one (the most frequent, as near
    as an integer alpha comes to it). The result is exact up to rounding in the adapter's dtype, and PEFT loads it too.

    Adapters of fused experts are kept in PEFT's form. DoRA, `modules_to_save` and other features that vLLM or llama.cpp
    rejects are an error. To serve it, `export_for_server` also adds the tensors that a server needs, and writes experts
    as the server reads them.

    Args:
        adapter_folder: with adapter_config.json and adapter_model.safetensors, as `save_pretrained` writes them.
        out_folder: another folder; created if it does not exist.
        rank: common rank; by default the largest rank in the adapter.
        zeros: (d_out, d_in) by full name of further modules, which get an adapter of zeros.
        full_names: write the adapted modules' full names as `target_modules`, instead of endings or a pattern.

    Returns:
        The folder written.

    Raises:
        FormatError: if there is no LoRA adapter in the folder, or its tensors and its config do not agree.
        BlueprintError: if servers cannot load it, `rank` is below a rank in it, or the folder is the adapter's own or
            cannot be written.

    Example:
        >>> import tempfile
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_blueprint.testing import tiny_llama
        >>> config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     get_peft_model(tiny_llama(), config).save_pretrained(f"{folder}/adapter")
        ...     served = export_uniform_lora(f"{folder}/adapter", f"{folder}/served")
        ...     uniform = json.loads((served / CONFIG_NAME).read_text())
        >>> uniform["r"], uniform["rank_pattern"]
        (4, {})
    """
    source, out = Path(adapter_folder), Path(out_folder)
    if out.exists() and source.exists() and out.samefile(source):
        raise BlueprintError(f"out_folder must not be the adapter's own folder, got {out}.")
    config, pairs, metadata = read_adapter(source)
    largest = max(pair.rank for pair in pairs)
    rank = largest if rank is None else rank
    if rank < largest:
        raise BlueprintError(f"rank must be at least {largest}, the largest rank in {source}, got {rank}.")
    common = Counter(pair.scaling for pair in pairs).most_common(1)[0][0]
    alpha = max(1, round(common * rank))
    widened: dict[str, Tensor] = {}
    for pair in pairs:
        widened |= pair.widened(rank, alpha / rank)
    for name, (d_out, d_in) in (zeros or {}).items():
        for side, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            widened[f"{_PREFIX}{name}.lora_{side}.weight"] = torch.zeros(shape, dtype=pairs[0].a.dtype)
    if zeros or full_names:
        names = {*(zeros or ()), *(pair.name for pair in pairs if not pair.is_of_experts)}
        config |= {"target_modules": sorted(names), "exclude_modules": None}
    config |= {"r": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    # both are written before either replaces an older file, so that a full disk leaves the older export whole
    with replacing(out / TENSORS_NAME) as tensors_file, replacing(out / CONFIG_NAME) as config_file:
        tensors_file.write(save(widened, metadata=metadata or {"format": "pt"}))
        tensors_file.flush()
        config_file.write(json.dumps(config, indent=2, sort_keys=True).encode())
    return out


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], list[PairOfFile], dict[str, str] | None]:
    """Return a servable adapter's config, its A and B, and its file's metadata.

    Raises:
        FormatError, BlueprintError: as `export_uniform_lora`.
    """
    folder = Path(folder)
    config = _read_config(folder)
    _require_servable(config, folder)
    tensors, metadata = _read_tensors(folder / TENSORS_NAME)
    return config, _pairs(tensors, config, folder), metadata


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(
            f"{folder} holds no adapter: {CONFIG_NAME} cannot be read ({error}). Give a folder of save_pretrained."
        ) from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise FormatError(f"peft_type in {path} must be LORA, got {kind}.")
    missing = [key for key in ("r", "lora_alpha") if not isinstance(config.get(key), int | float)]
    if missing:
        raise FormatError(f"{path} has no number {' and '.join(missing)}. Save the adapter again.")
    return config


def _require_servable(config: Mapping[str, Any], folder: Path) -> None:
    found = [f"{feature} ({key})" for key, feature in _UNSERVABLE.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append(f"trained biases (bias={config['bias']!r})")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        found.append(f"a base model changed by init_lora_weights={start!r}")
    if found:
        raise BlueprintError(
            f"{folder} has {' and '.join(found)}, which vLLM or llama.cpp does not support. {_MERGE}."
        )


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    except (OSError, SafetensorError) as error:
        raise FormatError(
            f"{path} cannot be read ({error}). Save the adapter with save_pretrained(…, safe_serialization=True)."
        ) from error


def _pairs(tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> list[PairOfFile]:
    """Return A and B of every adapter, with the rank and the scaling that PEFT gives it."""
    keys: dict[str, dict[str, str]] = {}
    others = []
    for key in sorted(tensors):
        match = _TENSOR.fullmatch(key)
        if match:
            keys.setdefault(match["module"], {})[match["side"]] = key
        else:
            others.append(key)
    if others:
        raise BlueprintError(f"{folder} has {format_names(others)}, and servers load only LoRA's A and B. {_MERGE}.")
    if not keys:
        raise FormatError(f"{folder / TENSORS_NAME} has no tensor of LoRA. Give a folder of save_pretrained.")
    pairs = []
    for module, sides in keys.items():
        if set(sides) != {"A", "B"}:
            raise FormatError(f"{folder}: {module!r} has only {list(sides.values())}, not A and B. Save it again.")
        a, b = tensors[sides["A"]], tensors[sides["B"]]
        name = module.removeprefix(_PREFIX)
        parameter = _fused_parameter(name, config, folder)
        full_name = name if parameter is None else f"{name.removesuffix('.base_layer')}.{parameter}"
        rank, alpha = (
            (patterns := config.get(f"{pattern}_pattern") or {}).get(
                get_pattern_key(list(patterns), full_name), config[default]
            )
            for pattern, default in (("rank", "r"), ("alpha", "lora_alpha"))
        )
        if rank < 1 or a.shape[0] != b.shape[1] or a.shape[0] % rank or (parameter is None and a.shape[0] != rank):
            raise FormatError(
                f"{folder}: A of {name!r} is {tuple(a.shape)} and B {tuple(b.shape)}, but {CONFIG_NAME} says rank {rank}. "
                "Save the adapter again."
            )
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        pairs.append(PairOfFile(name, a, b, sides["A"], sides["B"], rank, scaling, parameter))
    return pairs


def _fused_parameter(name: str, config: Mapping[str, Any], folder: Path) -> str | None:
    """Return "gate_up_proj" or "down_proj" if the adapter saved under this name is of fused experts; otherwise None.

    PEFT nests the adapters of a module's parameters in the order of the parameters. The file has `base_layer` for the
    inner one and names neither. The experts of Transformers have gate_up_proj before down_proj, and vLLM reads them so.
    """
    module = name.removesuffix(".base_layer")
    targets = config.get("target_parameters") or []
    parameters = {
        leaf
        for leaf in (target.rpartition(".")[2] for target in targets)
        if any(f".{module}.{leaf}".endswith(f".{target}") for target in targets)
    }
    if not parameters:
        return None
    if not parameters <= {"gate_up_proj", "down_proj"}:
        raise BlueprintError(
            f"{folder} adapts {sorted(parameters)} of {module!r}. Of fused experts servers load only gate_up_proj and "
            f"down_proj. {_MERGE}."
        )
    if len(parameters) == 1:
        return parameters.pop()
    return "down_proj" if name == module else "gate_up_proj"
