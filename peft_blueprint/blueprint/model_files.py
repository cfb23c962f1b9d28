"""Find a model's safetensors files and read the blueprint that they carry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BlueprintError, FormatError
from .blueprint import Blueprint
from .header import read_metadata
from .header_text import from_header_text, require_version
from .slots import JSON_KEY
from .strict_json import loads, read_text


MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model that may hold a blueprint: the first (or only) one with tensors, and the index."""

    tensors: Path
    index: Path | None
    shards: tuple[Path, ...]


def extract(path: str | Path) -> Blueprint:
    """The blueprint in a model's files: of the header, or else of the index. Reads no tensor.

    Raises:
        BlueprintError: if there is none, or a file is not there.
        FormatError: if what is there is not a blueprint, or was changed.
    """
    path = Path(path)
    files = find_model_files(path)
    places: list[tuple[Path, Any]] = []
    if files.tensors.exists() or files.index is None:
        places.append((files.tensors, read_metadata(files.tensors)))
    if files.index is not None:
        places.append((files.index, read_index(files.index).get("metadata") or {}))
    for place, metadata in places:
        text = metadata.get(JSON_KEY)
        if text is not None:
            require_version(metadata, str(place))
            if not isinstance(text, str):
                raise FormatError(f"{JSON_KEY} in the metadata of {place} must be text.")
            return from_header_text(text, f"{JSON_KEY} in {place}")
    raise BlueprintError(
        f"{path} carries no blueprint. Put one there with `peft-blueprint embed {path} blueprint.json`."
    )


def find_model_files(path: Path) -> ModelFiles:
    if path.is_dir():
        if (path / MODEL_FILE).exists():
            return ModelFiles(path / MODEL_FILE, None, (path / MODEL_FILE,))
        if not (path / INDEX_FILE).exists():
            raise BlueprintError(
                f"{path} holds neither {MODEL_FILE} nor {INDEX_FILE}. Give the folder of a model in safetensors, or one "
                ".safetensors file."
            )
        path = path / INDEX_FILE
    if not path.name.endswith(".safetensors.index.json"):
        if path.suffix != ".safetensors":
            raise BlueprintError(f"{path} is no .safetensors file and no folder with a model in that format.")
        return ModelFiles(path, None, (path,))
    weights = read_index(path)["weight_map"]
    shards = tuple(path.parent / name for name in sorted(set(weights.values())))
    return ModelFiles(shards[0], path, shards)


def read_index(path: Path) -> dict[str, Any]:
    index = loads(read_text(path), str(path))
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights or not all(_is_plain_name(name) for name in weights.values()):
        raise FormatError(
            f"{path} is no index of a sharded model: it needs weight_map, from tensors to files beside it."
        )
    if not isinstance(index.get("metadata"), dict | None):
        raise FormatError(f"metadata in {path} must be an object.")
    return index


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name and "\\" not in name
