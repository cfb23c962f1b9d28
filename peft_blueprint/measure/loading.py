"""Load models, tokenizers and models without weights from a folder or the Hub."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import transformers
from accelerate import PartialState
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .._text import first_line
from ..errors import BlueprintError
from .bnb_cpu import disable_cpu_repack
from .options import LoadOptions


Loaded = TypeVar("Loaded")


def load_model(
    name: str,
    dtype: str = "auto",
    quantization: Mapping[str, Any] | None = None,
    options: LoadOptions | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer; a quantized model is frozen.

    Weights that are not quantized, and activations, keep `dtype`. PEFT's `prepare_model_for_kbit_training` would cast
    them to float32, which is expensive with a large vocabulary.

    Args:
        name: folder or repository of the model.
        dtype: name of a torch dtype, or "auto", see `dtype_of`.
        quantization: fields of `BitsAndBytesConfig`.
        options: revision, attention and device, see `LoadOptions`.

    Raises:
        BlueprintError: if the model cannot be loaded, or the dtype or device is unknown.

    Example:
        >>> import pathlib, tempfile
        >>> from peft_blueprint.testing import save_tiny_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model, tokenizer = load_model(str(save_tiny_model(pathlib.Path(folder))), "float32")
        >>> model.dtype
        torch.float32
    """
    kind = dtype_of(dtype, bool(quantization))
    options = options or LoadOptions()
    settings: dict[str, Any] = {"dtype": "auto" if kind is None else kind, **_source(options)}
    if options.attn_implementation is not None:
        settings["attn_implementation"] = options.attn_implementation
    if (device := _device(options.device)) is not None:
        settings["device_map"] = {"": device}

    def load() -> PreTrainedModel:
        if quantization:
            settings["quantization_config"] = BitsAndBytesConfig(**quantization_of(quantization, kind))
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **settings)
        return model

    model = _loaded(f"model {name!r}", load)
    if quantization:
        model.requires_grad_(False)
        disable_cpu_repack(model)
    return model, load_tokenizer(name, options)


def load_tokenizer(name: str, options: LoadOptions | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model from a folder or the Hub.

    Raises:
        BlueprintError: if it cannot be loaded.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from peft_blueprint.testing import save_tiny_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tokenizer = load_tokenizer(str(save_tiny_model(Path(folder) / "model")))
        >>> tokenizer.vocab_size > 90
        True
    """
    settings = _source(options or LoadOptions())
    tokenizer: PreTrainedTokenizerBase = _loaded(
        f"tokenizer of {name!r}", lambda: AutoTokenizer.from_pretrained(name, **settings)
    )
    return tokenizer


def empty_model(source: str | PretrainedConfig, *, revision: str | None = None) -> nn.Module:
    """Build a model on the meta device: all names and shapes, no weights.

    Args:
        source: a config, or the folder or repository whose `config.json` is read.
        revision: branch, tag or commit of a repository.

    Returns:
        A model of the class that the config names; a causal language model if it names none.

    Raises:
        BlueprintError: if there is no config, or transformers has no model for it.

    Example:
        >>> from transformers import LlamaConfig
        >>> model = empty_model(LlamaConfig(num_hidden_layers=2))
        >>> model.model.layers[1].self_attn.q_proj.weight.is_meta
        True
    """
    config = source if isinstance(source, PretrainedConfig) else _config(source, revision)
    names = [name for name in getattr(config, "architectures", None) or () if hasattr(transformers, name)]
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # names and shapes need none of the kernels that a config may ask for
    try:
        with torch.device("meta"):
            if names:
                model = getattr(transformers, names[0])._from_config(config)
            else:
                model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a model's class may raise anything for a config that does not suit it
        raise BlueprintError(
            f"transformers {transformers.__version__} cannot build a model from this {type(config).__name__} "
            f"({first_line(error)}). Load the model yourself and pass it instead of its config."
        ) from error
    return model


def dtype_of(name: str, is_quantized: bool) -> torch.dtype | None:
    """Return the dtype of weights that are not quantized.

    Args:
        name: name of a torch dtype; "auto" takes the checkpoint's, or for a quantized model the fastest of the device.
        is_quantized: whether the model will be quantized.

    Returns:
        The dtype; None for that of the checkpoint.

    Raises:
        BlueprintError: if the dtype is unknown.

    Example:
        >>> dtype_of("bfloat16", is_quantized=False)
        torch.bfloat16
    """
    if name != "auto":
        found = getattr(torch, name, None)
        if not isinstance(found, torch.dtype):
            raise BlueprintError(f"dtype must be float32, bfloat16, float16 or auto, got {name!r}.")
        return found
    if not is_quantized:
        return None
    if not torch.cuda.is_available():
        return torch.float32  # many CPUs emulate bfloat16, at a tenth of the speed
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def quantization_of(settings: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Complete the fields of `BitsAndBytesConfig`: compute in `dtype` unless they name another one.

    Example:
        >>> quantization_of({"load_in_4bit": True}, torch.bfloat16)
        {'load_in_4bit': True, 'bnb_4bit_compute_dtype': torch.bfloat16}
    """
    completed = dict(settings)
    if completed.get("bnb_4bit_compute_dtype", "auto") == "auto":
        completed["bnb_4bit_compute_dtype"] = dtype
    return completed


def join_processes() -> tuple[int, int]:
    """Initialize torch.distributed under `torchrun` or `accelerate launch`; return the rank and number of processes.

    Example:
        >>> join_processes()  # without torchrun
        (0, 1)
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    state = PartialState(cpu=not torch.cuda.is_available())
    return int(state.process_index), int(state.num_processes)


def _source(options: LoadOptions) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that select the files."""
    given = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    return {key: value for key, value in given.items() if value}


def _device(name: str | None) -> int | str | None:
    """Return the device for a model's weights; None leaves them on the CPU."""
    if name is None:
        if torch.cuda.is_available():
            return torch.cuda.current_device()
        return "xpu" if torch.xpu.is_available() else None  # MPS only where it is asked for: it has no float64
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise BlueprintError(
            f"device={name!r} is not on this machine. Give cpu, or an accelerator that `peft-blueprint env` shows."
        ) from error
    return None if found.type == "cpu" else name


def _loaded(what: str, load: Callable[[], Loaded]) -> Loaded:
    try:
        return load()
    except (OSError, ValueError, ImportError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BlueprintError(f"The {what} cannot be loaded: {reason}") from error


def _config(source: str, revision: str | None) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(source, revision=revision)
    except Exception as error:  # a config's class may raise anything for values that do not suit it
        raise BlueprintError(
            f"No model config found in {source!r}: {first_line(error)}. Give a folder with a sound config.json, or a "
            "repository id such as 'org/model'."
        ) from error
