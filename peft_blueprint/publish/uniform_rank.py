"""An adapter of many ranks becomes one of a single rank that computes the same, for servers that know no rank patterns.

Knows adapter files and how PEFT scales them; no model is loaded.

A server reads one rank and one alpha. vLLM before 0.33 and llama.cpp pass over `rank_pattern` and `alpha_pattern`
without a word, and take for an adapter of rank r_i a scaling that is not PEFT's. A product B·A does not change when rows
of zeros are added to A and columns of zeros to B, and what the scaling differs by can be multiplied into B.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from .._files import write_atomically
from .._text import format_names
from ..errors import BlueprintError, FormatError


CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>(?:embedding_)?[AB])(?P<suffix>\.weight)?")
_MERGE = "Merge it into the model first: PeftModel.from_pretrained(…).merge_and_unload(), and serve that"
# what servers have no word for, and what to call it
_REFUSED = {
    "use_dora": "DoRA's magnitudes",
    "modules_to_save": "modules that were trained whole",
    "lora_bias": "biases of adapters",
    "use_qalora": "QALoRA's pooled inputs",
    "use_bdlora": "block-diagonal adapters",
    "trainable_token_indices": "tokens that were trained by themselves",
    "layer_replication": "layers that were repeated",
    "monteclora_config": "MonteCLoRA's sampled weights",
    "arrow_config": "Arrow's routing",
    "kasa_config": "KaSA's truncated base model",
}
# ways to begin that change the base model's weights, so that the adapter belongs to weights that no server has
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class _Pair:
    """A and B of one adapter, as they are saved.

    Args:
        a: rank × d_in; of fused experts (experts · rank) × d_in.
        b: d_out × rank; of fused experts d_out × (rank · experts).
        rank: of each expert.
        scaling: by which PEFT multiplies B·A.
    """

    a: Tensor
    b: Tensor
    a_key: str
    b_key: str
    rank: int
    scaling: float

    def widened(self, rank: int, scaling: float) -> dict[str, Tensor]:
        """The same product at another rank and scaling; the new rows and columns are zeros."""
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


def export_uniform_lora(adapter_folder: str | Path, out_folder: str | Path, rank: int | None = None) -> Path:
    """Write a LoRA adapter that computes the same as a saved one, with one rank and one scaling for all.

    Ranks, alphas and rsLoRA's scaling are folded: A and B are filled up with zeros, and where an adapter's scaling is
    not the common one (the commonest, as near as a whole alpha comes to it) B is multiplied by the ratio. The result is
    exact up to rounding in the adapter's own dtype. Plain PEFT loads it too.

    Experts fused into one parameter are kept for vLLM, which wants both `gate_up_proj` and `down_proj` of a layer;
    llama.cpp reads none. DoRA, `modules_to_save` and what else vLLM and llama.cpp refuse is an error, since they would
    do so only when the adapter is loaded.

    Args:
        adapter_folder: with adapter_config.json and adapter_model.safetensors, as `save_pretrained` writes them.
        out_folder: another folder; made if it is not there.
        rank: of all; by default the largest rank in the adapter.

    Returns:
        The folder written.

    Raises:
        FormatError: if there is no LoRA adapter in the folder, or its tensors and its config do not agree.
        BlueprintError: if servers cannot take it, `rank` is below a rank in it, or the folder is the adapter's own or
            cannot be written.
    """
    source, out = Path(adapter_folder), Path(out_folder)
    if out.exists() and source.exists() and out.samefile(source):
        raise BlueprintError(f"{out} is the adapter's own folder, which stays as it is. Choose another.")
    config = _read_config(source)
    _require_servable(config, source)
    tensors, header = _read_tensors(source / TENSORS_NAME)
    pairs = _pairs(tensors, config, source)
    largest = max(pair.rank for pair in pairs)
    rank = largest if rank is None else rank
    if rank < largest:
        raise BlueprintError(
            f"rank={rank} is below the largest rank in {source}, {largest}, and would cut it. Give at least {largest}."
        )
    common = Counter(pair.scaling for pair in pairs).most_common(1)[0][0]
    alpha = max(1, round(common * rank))
    written: dict[str, Tensor] = {}
    for pair in pairs:
        written |= pair.widened(rank, alpha / rank)
    uniform = config | {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
    }
    _write(written, header, uniform, out)
    return out


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(
            f"There is no adapter in {folder}: {CONFIG_NAME} cannot be read ({error.strerror}). Give the folder that "
            "save_pretrained wrote."
        ) from error
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}. Save the adapter again.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise FormatError(f"{path} is of the type {kind}, and only LORA has ranks to make uniform.")
    missing = [key for key in ("r", "lora_alpha") if not isinstance(config.get(key), int | float)]
    if missing:
        raise FormatError(f"{path} has no {' and no '.join(missing)}. Save the adapter again.")
    return config


def _require_servable(config: Mapping[str, Any], folder: Path) -> None:
    found = [f"{what} ({key})" for key, what in _REFUSED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append(f"trained biases (bias={config['bias']!r})")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        found.append(f"a base model that {start!r} has changed (init_lora_weights)")
    if found:
        raise BlueprintError(f"{folder} has {' and '.join(found)}, which vLLM or llama.cpp does not take. {_MERGE}.")


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    except (OSError, SafetensorError) as error:
        raise FormatError(
            f"{path} cannot be read ({error}). Save the adapter with save_pretrained(…, safe_serialization=True)."
        ) from error


def _pairs(tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> list[_Pair]:
    """A and B of every adapter, with the rank and the scaling that PEFT gives it."""
    sides: dict[str, dict[str, str]] = {}
    others = []
    for key in sorted(tensors):
        match = _TENSOR.fullmatch(key)
        if match:
            sides.setdefault(match["module"], {})[match["side"][-1]] = key
        else:
            others.append(key)
    if others:
        raise BlueprintError(
            f"{folder} has {format_names(others)}, which no server takes in an adapter: only A and B of LoRA. {_MERGE}."
        )
    if not sides:
        raise FormatError(
            f"{folder / TENSORS_NAME} has no tensor of LoRA. Give the folder that save_pretrained wrote."
        )
    pairs = []
    for module, keys in sides.items():
        if set(keys) != {"A", "B"}:
            raise FormatError(f"{folder}: {module!r} has only {list(keys.values())}, not A and B. Save it again.")
        a, b = tensors[keys["A"]], tensors[keys["B"]]
        name = module.removeprefix(_PREFIX)
        parameter = _parameter_of(name, config, folder)
        rank = _of_pattern(config, "rank_pattern", parameter or name, config["r"])
        alpha = _of_pattern(config, "alpha_pattern", parameter or name, config["lora_alpha"])
        if rank < 1 or a.shape[0] != b.shape[1] or a.shape[0] % rank or (parameter is None and a.shape[0] != rank):
            raise FormatError(
                f"{folder}: A of {name!r} is {tuple(a.shape)} and B {tuple(b.shape)}, and by {CONFIG_NAME} their rank "
                f"is {rank}. The two files are not of one adapter: save it again."
            )
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        pairs.append(_Pair(a, b, keys["A"], keys["B"], rank, scaling))
    return pairs


def _of_pattern(config: Mapping[str, Any], key: str, name: str, default: Any) -> Any:
    patterns = config.get(key) or {}
    return patterns.get(get_pattern_key(list(patterns), name), default)


def _parameter_of(name: str, config: Mapping[str, Any], folder: Path) -> str | None:
    """The fused experts' parameter whose adapter is saved under this name, or None for a linear layer's.

    PEFT nests the adapters of a module's parameters in the parameters' order; the file says `base_layer` for the inner
    one and names neither. Transformers' experts hold gate_up_proj before down_proj, and vLLM reads them so.
    """
    wanted = config.get("target_parameters") or []
    module = name.removesuffix(".base_layer")
    own = {
        leaf
        for leaf in {target.rpartition(".")[2] for target in wanted}
        if any(f"{module}.{leaf}" == target or f"{module}.{leaf}".endswith("." + target) for target in wanted)
    }
    if not own:
        return None
    if own != {"gate_up_proj", "down_proj"}:
        raise BlueprintError(
            f"{folder} adapts {sorted(own)} of {module!r}; vLLM takes fused experts only with adapters on both "
            f"gate_up_proj and down_proj, and llama.cpp takes none. {_MERGE}."
        )
    return f"{module}.{'gate_up_proj' if name != module else 'down_proj'}"


def _write(tensors: dict[str, Tensor], header: dict[str, str] | None, config: Mapping[str, Any], folder: Path) -> None:
    """Both files, the tensors first beside their place, so that a disk that fills up leaves what was there."""
    path = folder / TENSORS_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch:
            temporary = Path(scratch) / TENSORS_NAME
            save_file(tensors, temporary, metadata=header or {"format": "pt"})
            write_atomically(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True))
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise BlueprintError(f"{path} cannot be written: {error}. Choose a folder you may write to.") from error
