"""Write an adapter of fused experts as one adapter for each expert and matrix, as models with listed experts have them."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

from peft.utils import CONFIG_NAME
from safetensors.torch import save
from torch import Tensor
from transformers import AutoConfig

from .._files import replacing
from ..errors import BlueprintError
from .uniform_rank import PairOfFile, export_uniform_lora, read_adapter


Matrices = tuple[str, str, str]  # names of an expert's gate, up and down

_PREFIX = "base_model.model."
_TENSORS = "adapter_model.safetensors"
_LISTED = re.compile(r"experts\.\*\.(\w+)\.weight$")  # the matrix of one expert in a list
_MODULE = re.compile(r"\.\w+\.")  # a module in the middle of a name


def export_per_expert_lora(
    adapter_folder: str | Path,
    out_folder: str | Path,
    model_type: str | None = None,
    *,
    matrices: Matrices | None = None,
) -> Path:
    """Write an adapter of fused experts under the names of single experts, `…experts.17.gate_proj`.

    For servers that compute with single experts: SGLang, and vLLM's classes without `is_3d_moe_weight`, such as those of
    Mixtral, Qwen3-MoE, OLMoE and DeepSeek. The names are those of the model's checkpoint, as transformers converts it.
    Each expert of an adapted layer gets an adapter on each matrix, of zeros where it has none, because vLLM needs all. The
    rank is made
    uniform first, as in `export_uniform_lora`. PEFT loads the result too. `export_for_server` calls this where a server
    needs it.

    Args:
        adapter_folder: saved by `save_pretrained`, of all or of chosen experts.
        out_folder: another folder; created if it does not exist.
        model_type: of the base model's config; by default read from the base model that the adapter names.
        matrices: names of gate, up and down; by default those of the checkpoint.

    Returns:
        The folder written.

    Raises:
        FormatError: if there is no LoRA adapter in the folder.
        BlueprintError: if it has none on fused experts, the model has no such names, or a folder cannot be written.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_blueprint.testing import tiny_qwen3_moe
        >>> names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        >>> config = LoraConfig(r=2, target_modules=[], target_parameters=names)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     get_peft_model(tiny_qwen3_moe(layers=1), config).save_pretrained(f"{folder}/adapter")
        ...     out = export_per_expert_lora(f"{folder}/adapter", f"{folder}/served", "qwen3_moe")
        ...     len(read_adapter(out)[1])
        12
    """
    out = Path(out_folder)
    if out.exists() and Path(adapter_folder).exists() and out.samefile(adapter_folder):
        raise BlueprintError(f"out_folder must not be the adapter's own folder, got {out}.")
    with tempfile.TemporaryDirectory() as folder:
        config, pairs, metadata = read_adapter(export_uniform_lora(adapter_folder, folder, full_names=True))
    if not any(pair.is_of_experts for pair in pairs):
        raise BlueprintError(f"{adapter_folder} adapts no fused experts. Use export_uniform_lora.")
    renamed, found = _names_in_checkpoints(model_type or read_model_type(config.get("base_model_name_or_path")))
    names = matrices or found
    tensors: dict[str, Tensor] = {}
    for pair in pairs:
        if not pair.is_of_experts:
            tensors |= {pair.a_key: pair.a, pair.b_key: pair.b}
            continue
        holder = f"{pair.name.removesuffix('.base_layer')}."
        for stored, loaded in renamed:
            holder = holder.replace(loaded, stored)
        tensors = _zeros_for_others(pair, holder, names) | tensors | _of_experts(pair, holder, names)
    linear = {pair.name for pair in pairs if not pair.is_of_experts}
    config |= {"target_modules": sorted({*linear, *names}), "target_parameters": None}
    with replacing(out / _TENSORS) as tensors_file, replacing(out / CONFIG_NAME) as config_file:
        tensors_file.write(save(tensors, metadata=metadata or {"format": "pt"}))
        tensors_file.flush()
        config_file.write(json.dumps(config, indent=2, sort_keys=True).encode())
    return out


def _of_experts(pair: PairOfFile, holder: str, names: Matrices) -> dict[str, Tensor]:
    """Return A and B of every expert; gate and up, which are fused into one output, share A."""
    experts = pair.a.shape[0] // pair.rank
    downs, ups = pair.a.unflatten(0, (experts, -1)), pair.b.unflatten(1, (-1, experts))
    gate, up, down = names
    found = {}
    for expert in range(experts):
        a, b = downs[expert], ups[:, :, expert]
        parts = ((down, b),) if pair.parameter == "down_proj" else zip((gate, up), b.chunk(2), strict=True)
        for name, part in parts:
            key = f"{_PREFIX}{holder}{expert}.{name}"
            found[f"{key}.lora_A.weight"], found[f"{key}.lora_B.weight"] = a.contiguous(), part.contiguous()
    return {key: tensor.clone() for key, tensor in found.items()}


def _zeros_for_others(pair: PairOfFile, holder: str, names: Matrices) -> dict[str, Tensor]:
    """Return adapters of zeros on the other matrices of the same experts."""
    hidden, inner = (pair.d_out, pair.d_in) if pair.parameter == "down_proj" else (pair.d_in, pair.d_out // 2)
    gate, up, down = names
    shapes = {down: (hidden, inner)} if pair.parameter != "down_proj" else dict.fromkeys((gate, up), (inner, hidden))
    found = {}
    for expert in range(pair.a.shape[0] // pair.rank):
        for name, (d_out, d_in) in shapes.items():
            key = f"{_PREFIX}{holder}{expert}.{name}"
            found[f"{key}.lora_A.weight"] = pair.a.new_zeros(pair.rank, d_in)
            found[f"{key}.lora_B.weight"] = pair.b.new_zeros(d_out, pair.rank)
    return found


def _names_in_checkpoints(model_type: str) -> tuple[list[tuple[str, str]], Matrices]:
    """Return the (stored, loaded) names of modules that transformers renames, and the names of gate, up and down.

    Read from the conversion of checkpoints that transformers registers for the model.
    """
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError as error:
        raise BlueprintError(
            "The names of single experts are known to transformers 5 and newer. Upgrade it."
        ) from error
    renamed, names = [], {}
    for conversion in get_checkpoint_conversion_mapping(model_type) or ():
        stored, loaded = conversion.source_patterns, conversion.target_patterns
        parts = [match[1] for pattern in stored if (match := _LISTED.search(pattern))]
        if parts and len(parts) == len(stored):
            names[loaded[0].rpartition(".")[2]] = parts
        elif len(stored) == len(loaded) == 1 and _MODULE.fullmatch(stored[0]) and _MODULE.fullmatch(loaded[0]):
            renamed.append((stored[0], loaded[0]))
    if len(names.get("gate_up_proj", ())) != 2 or len(names.get("down_proj", ())) != 1:
        raise BlueprintError(
            f"Checkpoints of {model_type} models have no single experts by name. Serve the adapter in PEFT's own form, or "
            "merge it into the model."
        )
    gate, up, down = *names["gate_up_proj"], *names["down_proj"]
    return renamed, (gate, up, down)


def read_model_type(model: str | Path | None) -> str:
    """Return the `model_type` of a base model's config.

    Raises:
        BlueprintError: if the config cannot be read.
    """
    advice = "Give the model, on the command line as --model, or a model_type such as 'qwen3_moe'."
    if not model:
        raise BlueprintError(f"The adapter names no base model, whose config says how its experts are named. {advice}")
    try:
        return str(AutoConfig.from_pretrained(str(model)).model_type)
    except (OSError, ValueError, TypeError) as error:
        raise BlueprintError(
            f"The config of the base model {str(model)!r} cannot be read ({str(error).splitlines()[0]}). {advice}"
        ) from error
