"""Write a LoRA adapter as a server loads it, with the commands that start the server."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn
from transformers import PretrainedConfig

from .._text import format_names
from ..errors import BlueprintError
from ..measure import empty_model, find_weights, unwrap
from ..place import SERVER_RANKS
from .per_expert import export_per_expert_lora, read_model_type
from .uniform_rank import PairOfFile, Zeros, export_uniform_lora, read_adapter


Server = Literal["vllm", "sglang", "tgi", "lorax", "llama.cpp", "ollama"]

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that servers join to one
_READ_EXPERTS = ("vllm", "sglang")
# model types whose classes in vLLM have is_3d_moe_weight: they read PEFT's form of fused experts
_READ_FUSED = ("gpt_oss", "interns1_pro", "qwen3_5_moe", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_vl_moe")
_SGLANG_MATRICES = ("gate_proj", "up_proj", "down_proj")  # which its --lora-target-modules knows; not w1, w3 and w2
_READS_ACTIVATED = "llama.cpp"
_SMALL_RANK = 16  # that vLLM reserves where no flag is given
_FAST_RANK = 128  # the largest of the kernels in TGI and LoRAX
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter written for a server.

    Args:
        path: folder written, in PEFT's format.
        server: that loads it.
        rank: of every adapter in it.
        added: full names of the modules that got an adapter of zeros, because the server needs one there.
        commands: that start the server with it, or convert it.
        notes: what else to know, one sentence each.
    """

    path: Path
    server: Server
    rank: int
    added: tuple[str, ...]
    commands: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        lists = {name: list(getattr(self, name)) for name in ("added", "commands", "notes")}
        return {"written": str(self.path), "server": self.server, "rank": self.rank, **lists}


def export_for_server(
    adapter_folder: str | Path,
    out_folder: str | Path,
    server: Server,
    *,
    model: nn.Module | PretrainedConfig | str | Path | None = None,
    rank: int | None = None,
) -> ServedAdapter:
    """Write a saved LoRA adapter so that a server loads it and computes the same.

    The adapter gets one rank and one scaling, see `export_uniform_lora`. Where a server needs adapters on more modules,
    it gets zeros there:

    - SGLang joins q, k and v of a layer, and gate and up, and drops or refuses an adapter on a part of them.
    - vLLM and SGLang read adapters of fused experts as one for each expert and matrix, see `export_per_expert_lora`;
      vLLM's classes of GPT-OSS, Qwen3.5-MoE, Qwen3-VL-MoE and Qwen3-Omni-MoE read PEFT's form.
    - TGI and LoRAX ignore a kind of layer, such as `up_proj`, unless it is adapted in every block.
    - vLLM, llama.cpp and Ollama need no zeros.

    Args:
        adapter_folder: with adapter_config.json and adapter_model.safetensors, as `save_pretrained` writes them.
        out_folder: another folder; created if it does not exist.
        server: "vllm", "sglang", "tgi", "lorax", "llama.cpp" or "ollama".
        model: base model for the shapes of zeros and the names of experts; of a folder or repository only the config is
            read; by default the one that the adapter names. Needed for SGLang, TGI, LoRAX and fused experts.
        rank: common rank; by default the largest rank in the adapter.

    Raises:
        BlueprintError: as `export_uniform_lora`, or if the server takes no such adapter (a rank above 512 in vLLM, fused
            experts outside of vLLM and SGLang, adapters that act from an invocation on), or the base model is not found.

    Example:
        >>> import tempfile
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_blueprint.testing import tiny_llama
        >>> config = LoraConfig(r=4, target_modules=["model.layers.1.self_attn.q_proj"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     get_peft_model(tiny_llama(), config).save_pretrained(f"{folder}/adapter")
        ...     served = export_for_server(f"{folder}/adapter", f"{folder}/served", "sglang", model=tiny_llama().config)
        >>> served.added
        ('model.layers.1.self_attn.k_proj', 'model.layers.1.self_attn.v_proj')
    """
    if server not in get_args(Server):
        raise BlueprintError(f"server must be one of {', '.join(get_args(Server))}, got {server!r}.")
    config, pairs, _ = read_adapter(adapter_folder)
    _require_loadable(server, config, pairs, adapter_folder)
    largest = max(pair.rank for pair in pairs) if rank is None else rank
    if server == "vllm" and largest > SERVER_RANKS[-1]:
        raise BlueprintError(
            f"vLLM serves ranks up to {SERVER_RANKS[-1]}, got {largest}. Merge the adapter into the model, or train it with "
            "a lower rank."
        )
    base = config.get("base_model_name_or_path")
    linear = [pair.name for pair in pairs if not pair.is_of_experts]
    zeros: Zeros = {}
    if server in ("sglang", "tgi", "lorax"):
        shapes = _shapes(base if model is None else model, adapter_folder)
        zeros = _missing(server, linear, shapes, adapter_folder)
    kinds = {name.rpartition(".")[2] for name in (*linear, *zeros)}
    if len(linear) < len(pairs) and (listed := _listed_type(server, base if model is None else model)):
        matrices = _SGLANG_MATRICES if server == "sglang" else None
        kinds |= set(matrices or ())
        with tempfile.TemporaryDirectory() as folder:
            export_uniform_lora(adapter_folder, folder, rank, zeros=zeros, full_names=True)
            path = export_per_expert_lora(folder, out_folder, listed, matrices=matrices)
    else:
        _require_both(pairs, adapter_folder)
        path = export_uniform_lora(adapter_folder, out_folder, rank, zeros=zeros, full_names=True)
    return ServedAdapter(
        path=path,
        server=server,
        rank=largest,
        added=tuple(zeros),
        commands=_commands(server, str(base or "BASE_MODEL"), path, largest, sorted(kinds)),
        notes=tuple(_notes(server, path, largest, pairs)),
    )


def _require_loadable(server: Server, config: Mapping[str, Any], pairs: list[PairOfFile], folder: str | Path) -> None:
    experts = [pair.name for pair in pairs if pair.is_of_experts]
    if experts and server not in _READ_EXPERTS:
        raise BlueprintError(
            f"{folder} adapts fused experts ({format_names(experts)}), which {' and '.join(_READ_EXPERTS)} load, not {server}. "
            "Merge it into the model, or place linear layers only."
        )
    if config.get("alora_invocation_tokens") and server != _READS_ACTIVATED:
        raise BlueprintError(
            f"{folder} acts from its invocation tokens on, which only {_READS_ACTIVATED} can do, not {server}. Serve it with "
            f"{_READS_ACTIVATED}, or with Transformers and PEFT."
        )


def _require_both(pairs: list[PairOfFile], folder: str | Path) -> None:
    """Raise for fused experts with an adapter on one parameter only, where a server reads PEFT's form."""
    nested = {pair.name for pair in pairs if pair.name.endswith(".base_layer")}
    experts = [pair for pair in pairs if pair.is_of_experts and pair.name not in nested]
    if alone := [f"{pair.name}.{pair.parameter}" for pair in experts if f"{pair.name}.base_layer" not in nested]:
        raise BlueprintError(
            f"{folder} adapts {format_names(alone)} alone, and vLLM's class of this model needs adapters on both gate_up_proj "
            "and down_proj of a layer. Merge it into the model, or place both."
        )


def _listed_type(server: Server, model: Any) -> str | None:
    """Return the type of a model whose experts the server reads one by one; None where it reads PEFT's form."""
    config = unwrap(model).config if isinstance(model, nn.Module) else model
    kind = str(config.model_type) if isinstance(config, PretrainedConfig) else read_model_type(model)
    return None if server == "vllm" and kind in _READ_FUSED else kind


def _shapes(model: Any, folder: str | Path) -> Zeros:
    """Return (d_out, d_in) of every linear layer of the base model, by name."""
    if model is None:
        raise BlueprintError(f"{folder} names no base model. Give one, on the command line as --model.")
    if isinstance(model, str | Path):
        model = empty_model(str(model))
    elif isinstance(model, PretrainedConfig):
        model = empty_model(model)
    found = (weight for weight in find_weights(unwrap(model)) if weight.form == "linear")
    return {weight.name: (int(weight.shape[-2]), int(weight.shape[-1])) for weight in found}


def _missing(server: Server, names: list[str], shapes: Zeros, folder: str | Path) -> Zeros:
    """Return the modules that a server needs an adapter on beside `names`, in the model's order."""
    if unknown := [name for name in names if name not in shapes]:
        raise BlueprintError(
            f"{folder} adapts {format_names(unknown)}, which the base model does not have: it has "
            f"{format_names(list(shapes))}. Give the adapter's own base model."
        )
    wanted: set[str] = set()
    if server == "sglang":
        for name in names:
            parent, _, kind = name.rpartition(".")
            wanted |= {f"{parent}.{other}" for fused in _FUSED if kind in fused for other in fused}
    else:
        kinds = {_NUMBER.sub("#", name) for name in names}
        wanted = {name for name in shapes if _NUMBER.sub("#", name) in kinds}
    return {name: shape for name, shape in shapes.items() if name in wanted.difference(names)}


def _commands(server: Server, base: str, path: Path, rank: int, kinds: list[str]) -> tuple[str, ...]:
    """Return shell commands; the adapter's name for requests is that of its folder."""
    name, base = re.sub(r"[^\w.-]+", "-", path.name), shlex.quote(base)
    named, gguf = shlex.quote(f"{name}={path}"), str(path / "adapter.gguf")
    if server == "vllm":
        reserved = next(served for served in SERVER_RANKS if served >= rank)
        return (f"vllm serve {base} --enable-lora --max-lora-rank {reserved} --lora-modules {named}",)
    if server == "sglang":
        return (
            f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {named} "
            f"--max-lora-rank {rank} --lora-target-modules {' '.join(kinds)}",
        )
    if server == "tgi":
        return (f"LORA_ADAPTERS={named} text-generation-launcher --model-id {base}",)
    if server == "lorax":
        return (f"lorax-launcher --model-id {base}",)
    convert = f"python convert_lora_to_gguf.py {shlex.quote(str(path))} --outfile {shlex.quote(gguf)}"
    if server == "llama.cpp":
        return convert, f"llama-server --model BASE_MODEL.gguf --lora {shlex.quote(gguf)}"
    modelfile = f"printf '%s\\n' 'FROM BASE_MODEL.gguf' {shlex.quote(f'ADAPTER {gguf}')} > Modelfile"
    return convert, modelfile, f"ollama create {name} -f Modelfile"


def _notes(server: Server, path: Path, rank: int, pairs: list[PairOfFile]) -> list[str]:
    notes = []
    if server == "vllm" and rank > _SMALL_RANK:
        reserved = next(served for served in SERVER_RANKS if served >= rank)
        notes.append(
            f"vLLM reserves rank {reserved} on every layer for each adapter of a batch: {reserved / _SMALL_RANK:g} times the "
            f"memory of rank {_SMALL_RANK}."
        )
    if server in ("tgi", "lorax") and rank > _FAST_RANK:
        notes.append(f"Above rank {_FAST_RANK} no fused kernel is used, which is slower.")
    if server == "lorax":
        request = json.dumps({"adapter_id": str(path), "adapter_source": "local"})
        notes.append(f"Requests name the adapter in their parameters: {request}.")
    if server in ("llama.cpp", "ollama"):
        notes.append(
            "convert_lora_to_gguf.py is a script of llama.cpp's repository; it reads the base model's config."
        )
    if server == "ollama" and (tall := [pair.name for pair in pairs if rank > min(pair.d_out, pair.d_in)]):
        notes.append(
            f"Do not give Ollama the folder itself: it would take B or A of {format_names(tall)}, narrower than rank {rank}, "
            "for transposed."
        )
    return notes
