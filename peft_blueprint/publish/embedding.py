"""A blueprint in the model's own files: in the header of its safetensors, and in the index of a sharded one.

No tensor changes. Knows which files a model has; what is in a header is `header`'s to say, what in the text `compact`'s.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from .._files import require_writable, write_atomically
from ..blueprint import (
    FIRST_READ,
    JSON_KEY,
    MAX_STRING,
    VERSION,
    VERSION_KEY,
    Blueprint,
    ModelFiles,
    escaped,
    find_model_files,
    first_text,
    metadata_of_prefix,
    read_header,
    read_index,
    read_metadata,
    read_text,
    replace_metadata,
    to_header_text,
)
from ..errors import BlueprintError
from .stored_tensors import Tensors, check_stored


MAX_TEXT = 8_000_000  # bytes in a header


def embed(
    blueprint: Blueprint,
    path: str | Path,
    *,
    reserve: int = 0,
    check: bool = True,
    digits: int = 4,
    progress: bool = True,
) -> list[Path]:
    """Put a blueprint into a model's files, in place of one that is there.

    Args:
        blueprint: of this model; kept to `digits` significant digits, without alignments, medians and keys of entries
            that this version does not know, see `compact.rounded`.
        path: a `.safetensors` file, of a model or an adapter; or the folder of a model in one file, or in shards with an
            index. Then it goes into the index and into the first shard.
        reserve: bytes of room for later blueprints, so that an update that fits takes milliseconds and not a copy of the
            file, which grows by twice that.
        check: whether every entry must be among the model's tensors.
        digits: significant digits that are kept.
        progress: whether to show a bar while a file is written anew.

    Returns:
        The files that were changed.

    Raises:
        BlueprintError: if a file is not there, is the Hub's cache's, cannot be written, or the text is longer than 8 MB
            (1 MB for an index).
        MismatchError: if the blueprint is not of this model.
        FormatError: if a file is not what its name says.
    """
    files = find_model_files(Path(path))
    if check:
        check_stored(blueprint, _tensors_of(files), str(path))
    text = to_header_text(blueprint, digits)
    _require_short(text, blueprint, files)
    changes: dict[str, str | None] = {JSON_KEY: text, VERSION_KEY: VERSION}
    changed = _write(files, changes, reserve, progress)
    with open(files.tensors, "rb") as file:
        start = file.read(FIRST_READ)
    if first_text(start) is None and metadata_of_prefix(start, str(files.tensors))[0] is None:
        warnings.warn(
            f"The blueprint of {blueprint.model_id!r} has {len(escaped(text)):,} bytes in {files.tensors}, and ends beyond "
            f"the first {FIRST_READ:,}, which are read at once: reading it from the Hub takes a second request. Publish it "
            "beside the model too.",
            stacklevel=2,
        )
    return changed


def remove(path: str | Path, *, progress: bool = True) -> list[Path]:
    """Take a blueprint out of a model's files again, with the room that was reserved.

    Returns:
        The files that were changed; none if they carry none.

    Raises:
        BlueprintError: if a file is not there, is the Hub's cache's, or cannot be written.
        FormatError: if a file is not what its name says.
    """
    return _write(find_model_files(Path(path)), {JSON_KEY: None, VERSION_KEY: None}, 0, progress)


# ------------------------------------------------------------------------------------------ files


def _tensors_of(files: ModelFiles) -> Tensors:
    """Dtype and shape of every tensor, by name; None for those of shards that are not here."""
    tensors: dict[str, Any] = {}
    if files.index is not None:
        tensors = dict.fromkeys(read_index(files.index)["weight_map"])
    for shard in files.shards:
        if shard.exists() or files.index is None:
            tensors |= read_header(shard).tensors
    return tensors


def _require_short(text: str, blueprint: Blueprint, files: ModelFiles) -> None:
    size = len(escaped(text))
    limit = MAX_TEXT if files.index is None else MAX_STRING
    if size > limit:
        raise BlueprintError(
            f"The blueprint of {blueprint.model_id!r} would have {size:,} bytes in {files.index or files.tensors}, with "
            f"{len(blueprint):,} entries; at most {limit:,} are put there. Save it as blueprint.safetensors beside the model."
        )


def _write(files: ModelFiles, changes: dict[str, str | None], reserve: int, progress: bool) -> list[Path]:
    targets = [path for path in (files.tensors, files.index) if path is not None]
    for target in targets:
        if not target.exists():
            raise BlueprintError(f"There is no file {target}. Get the whole model, or check the path.")
        _require_own(target)
        require_writable(target.parent)
    changed = []
    metadata = read_metadata(files.tensors)
    if any(metadata.get(key) != value for key, value in changes.items()) or reserve:
        replace_metadata(files.tensors, changes, reserve, progress)
        changed.append(files.tensors)
    if files.index is not None:
        index = read_index(files.index)
        old = dict(index.get("metadata") or {})
        new = {key: value for key, value in {**old, **changes}.items() if value is not None}
        if new != old:
            text = read_text(files.index)
            content = json.dumps({"metadata": new, **index, **{"metadata": new}}, indent=2)
            write_atomically(files.index, content + "\n" * text.endswith("\n"))
            changed.append(files.index)
    return changed


def _require_own(path: Path) -> None:
    """Raise BlueprintError for a symbolic link, or a file of the Hub's cache, which others read too."""
    folders = {parent.name for parent in path.resolve().parents}
    in_cache = any(name.startswith("models--") for name in folders) and bool(folders & {"blobs", "snapshots"})
    if in_cache:
        raise BlueprintError(
            f"{path} is in the Hub's cache, which other programs read and which is checked by its hash; it is not changed. "
            "Copy the model first: `hf download <model> --local-dir <folder>`, and give that folder."
        )
    if path.is_symlink():
        raise BlueprintError(
            f"{path} is a symbolic link to {path.resolve()}, which is not changed through it. Give that file itself if it is "
            "yours; a model from the Hub's cache is copied with `hf download <model> --local-dir <folder>`."
        )
