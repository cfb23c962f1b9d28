"""Find a model's safetensors files, and read their index and the record that they carry."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BlueprintError, FormatError
from .header import HEADER_LIMIT, read_metadata
from .header_text import JSON_KEY, from_header_text, require_version
from .strict_json import loads, read_text


MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model that may hold a blueprint.

    Args:
        tensors: the first or only file with tensors.
        index: of a sharded model.
        shards: all files with tensors.
    """

    tensors: Path
    index: Path | None
    shards: tuple[Path, ...]


def find_model_files(path: Path) -> ModelFiles:
    """Find the files of the model in a folder, or of a `.safetensors` file or index given by its path.

    Raises:
        BlueprintError: if there is no model in safetensors.
        FormatError: if the index is not one.

    Example:
        >>> import tempfile
        >>> from peft_blueprint.testing import save_tiny_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     find_model_files(save_tiny_model(Path(folder) / "model")).tensors.name
        'model.safetensors'
    """
    if path.is_dir():
        if (path / MODEL_FILE).exists():
            return ModelFiles(path / MODEL_FILE, None, (path / MODEL_FILE,))
        if not (path / INDEX_FILE).exists():
            if (path / ADAPTER_FILE).exists():
                return ModelFiles(path / ADAPTER_FILE, None, (path / ADAPTER_FILE,))
            raise BlueprintError(
                f"{path} holds neither {MODEL_FILE} nor {INDEX_FILE} nor {ADAPTER_FILE}. Give the folder of a model or "
                "adapter in safetensors, or one .safetensors file."
            )
        path = path / INDEX_FILE
    if not path.name.endswith(".safetensors.index.json"):
        if path.suffix != ".safetensors":
            raise BlueprintError(f"{path} is neither a .safetensors file nor the folder of a model in that format.")
        return ModelFiles(path, None, (path,))
    weights = parse_index(read_text(path), str(path))["weight_map"]
    shards = tuple(path.parent / name for name in sorted(set(weights.values())))
    return ModelFiles(shards[0], path, shards)


def read_embedded(path: str | Path) -> tuple[Any, str]:
    """Read the record in a model's files, from the header or otherwise from the index, and no tensor.

    Warns if the header holds another one than the index.

    Returns:
        The record, unchecked, and where it was found.

    Raises:
        BlueprintError: if there is none, or a file is missing.
        FormatError: if it is not a record.
    """
    path = Path(path)
    files = find_model_files(path)
    places: list[tuple[Path, Any]] = []
    if files.tensors.exists() or files.index is None:
        places.append((files.tensors, read_metadata(files.tensors)))
    if files.index is not None:
        places.append((files.index, parse_index(read_text(files.index), str(files.index))["metadata"]))
    texts = [metadata.get(JSON_KEY) for _, metadata in places]
    if len(texts) == 2 and texts[0] not in (None, texts[1]):
        warnings.warn(
            f"{files.tensors} holds another blueprint than {files.index}, as after an interruption. The former's is read; "
            f"embed or remove it again with `peft-blueprint embed {path} blueprint.json` or `peft-blueprint remove {path}`.",
            stacklevel=2,
        )
    for (place, metadata), text in zip(places, texts, strict=True):
        if text is not None:
            require_version(metadata, str(place))
            if not isinstance(text, str):
                raise FormatError(f"{JSON_KEY} in the metadata of {place} must be text.")
            where = f"{JSON_KEY} in {place}"
            return from_header_text(text, where), where
    raise BlueprintError(
        f"{path} carries no blueprint. Put one there with `peft-blueprint embed {path} blueprint.json`."
    )


def parse_index(text: str, source: str) -> dict[str, Any]:
    """Parse the index of a sharded model; its `metadata` is an object, empty if there is none.

    Raises:
        FormatError: if it has no `weight_map` from tensors to files beside it.

    Example:
        >>> parse_index('{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}', "the index")
        {'metadata': {}, 'weight_map': {'lm_head.weight': 'model-00001-of-00002.safetensors'}}
    """
    index = loads(text, source)
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights or not all(_is_plain_name(name) for name in weights.values()):
        raise FormatError(
            f"{source} is not the index of a sharded model: it needs weight_map, from tensors to files beside it."
        )
    metadata = index.get("metadata")
    if not isinstance(metadata, dict | None):
        raise FormatError(f"metadata in {source} must be an object.")
    return {**index, "metadata": metadata or {}} if "metadata" in index else {"metadata": {}, **index}


def index_metadata_of_prefix(data: bytes, source: str, size: int | None) -> tuple[dict[str, Any] | None, int]:
    """Read the `metadata` of an index from its first bytes, where transformers writes it first.

    Returns:
        The metadata and 0; or None and how many of the file's first bytes are needed.

    Raises:
        FormatError: if it is not an index.
    """
    is_whole = size is not None and len(data) >= size
    try:
        text = data.decode("utf-8", errors="strict" if is_whole else "ignore")
    except UnicodeDecodeError as error:
        raise FormatError(f"{source} is not text ({error.reason}).") from error
    if is_whole:
        return parse_index(text, source)["metadata"], 0
    if opening := re.match(r'\s*\{\s*"metadata"\s*:\s*', text):
        try:
            _, end = json.JSONDecoder().raw_decode(text, opening.end())
        except (ValueError, RecursionError):
            pass
        else:
            metadata = loads(text[opening.end() : end], source)
            return metadata if isinstance(metadata, dict) else {}, 0
    if len(data) >= HEADER_LIMIT:
        raise FormatError(f"{source} is longer than {HEADER_LIMIT:,} bytes, so it is not an index.")
    return None, HEADER_LIMIT if size is None else min(size, HEADER_LIMIT)


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name and "\\" not in name
