"""Write an adapter of fused experts as one adapter for each expert and matrix, as models with listed experts have them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from peft.utils import CONFIG_NAME
from safetensors.torch import save
from torch import Tensor
from transformers import AutoConfig

from .._files import replacing
from ..errors import BlueprintError
from .uniform_rank import PairOfFile, export_uniform_lora, read_adapter


# names of gate, up and down, and of the block that holds the experts, where they differ from most models'
_NAMES = {"mixtral": ("block_sparse_moe", ("w1", "w3", "w2"))}
_OTHERS = ("mlp", ("gate_proj", "up_proj", "down_proj"))
_NOT_LISTED = ("gpt_oss", "llama4", "llama4_text")  # which hold gate and up interleaved, or no experts in lists
_PREFIX = "base_model.model."
_TENSORS = "adapter_model.safetensors"


def export_per_expert_lora(adapter_folder: str | Path, out_folder: str | Path, model_type: str | None = None) -> Path:
    """Write an adapter of fused experts under the names of single experts, `…experts.17.gate_proj`.

    For servers that compute with single experts: vLLM's classes without `is_3d_moe_weight`, such as those of Mixtral,
    Qwen3-MoE, OLMoE and DeepSeek. Each expert of an adapted layer gets an adapter, of zeros where it has none, because
    vLLM needs all. The rank is made uniform first, as in `export_uniform_lora`. PEFT loads the result too.

    Args:
        adapter_folder: saved by `save_pretrained`, of all or of chosen experts.
        out_folder: another folder; created if it does not exist.
        model_type: of the base model's config; by default read from the base model that the adapter names.

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
    model_type = model_type or _model_type(config.get("base_model_name_or_path"))
    if model_type in _NOT_LISTED:
        raise BlueprintError(
            f"A {model_type} model has no single experts by name. Serve the adapter in PEFT's own form."
        )
    block, names = _NAMES.get(model_type, _OTHERS)
    tensors: dict[str, Tensor] = {}
    for pair in pairs:
        tensors |= _of_experts(pair, block, names) if pair.is_of_experts else {pair.a_key: pair.a, pair.b_key: pair.b}
    linear = {pair.name for pair in pairs if not pair.is_of_experts}
    config |= {"target_modules": sorted({*linear, *names}), "target_parameters": None}
    with replacing(out / _TENSORS) as tensors_file, replacing(out / CONFIG_NAME) as config_file:
        tensors_file.write(save(tensors, metadata=metadata or {"format": "pt"}))
        tensors_file.flush()
        config_file.write(json.dumps(config, indent=2, sort_keys=True).encode())
    return out


def _of_experts(pair: PairOfFile, block: str, names: tuple[str, str, str]) -> dict[str, Tensor]:
    """Return A and B of every expert; gate and up, which are fused into one output, share A."""
    experts = pair.a.shape[0] // pair.rank
    holder = pair.name.removesuffix(".base_layer")
    outer, _, own = holder.rpartition(".")
    holder = f"{outer.rpartition('.')[0]}.{block}.{own}"
    downs, ups = pair.a.unflatten(0, (experts, -1)), pair.b.unflatten(1, (-1, experts))
    gate, up, down = names
    found = {}
    for expert in range(experts):
        a, b = downs[expert], ups[:, :, expert]
        is_fused = pair.name != pair.name.removesuffix(".base_layer")
        for name, part in zip((gate, up), b.chunk(2), strict=True) if is_fused else ((down, b),):
            key = f"{_PREFIX}{holder}.{expert}.{name}"
            found[f"{key}.lora_A.weight"], found[f"{key}.lora_B.weight"] = a.contiguous(), part.contiguous()
    return {key: tensor.clone() for key, tensor in found.items()}


def _model_type(name: str | None) -> str:
    try:
        return str(AutoConfig.from_pretrained(str(name)).model_type)
    except (OSError, ValueError, TypeError) as error:
        raise BlueprintError(
            f"The config of the base model {name!r} cannot be read ({str(error).splitlines()[0]}). Give model_type, such as "
            "'qwen3_moe'."
        ) from error
