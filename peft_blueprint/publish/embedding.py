"""Put a blueprint into the header of a model's safetensors and the index of a sharded model; no tensor changes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from .._files import remove_leftovers, require_writable, write_atomically
from ..blueprint import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    FIRST_READ,
    JSON_KEY,
    MAX_STRING,
    VERSION,
    VERSION_KEY,
    Blueprint,
    ModelFiles,
    find_model_files,
    loads,
    metadata_of_prefix,
    parse_index,
    read_header,
    read_metadata,
    read_text,
    replace_metadata,
    to_dict,
    to_header_text,
)
from ..errors import BlueprintError, FormatError, MismatchError
from .stored_tensors import Tensors, check_stored


MAX_TEXT = 8_000_000  # bytes in a header


def embed(
    blueprint: Blueprint, path: str | Path, *, check: bool = True, digits: int = 4, progress: bool = True
) -> list[Path]:
    """Put a blueprint into a model's files, or replace the one that is there.

    Args:
        blueprint: of this model; written with `digits` significant digits, without alignments, medians and keys of
            entries that this version does not know.
        path: a `.safetensors` file, of a model or an adapter; or the folder of a model in one file, or in shards with
            an index. Then it goes into the index and into the first shard.
        check: whether every entry must be among the model's tensors.
        digits: significant digits that are kept.
        progress: whether to show a bar while a file is written anew.

    Returns:
        The files that were changed.

    Raises:
        BlueprintError: if a file is missing, is the Hub's cache's, cannot be written, or the text is longer than 8 MB.
        MismatchError: if the blueprint is not of this model.
        FormatError: if a file is not a safetensors file or index.

    Example:
        >>> import tempfile
        >>> from peft_blueprint import Submodule
        >>> from peft_blueprint.testing import save_tiny_model
        >>> blueprint = Blueprint("org/model", (Submodule("model.layers.0.mlp.up_proj", 1.0),))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in embed(blueprint, save_tiny_model(Path(folder) / "model"), progress=False)]
        ['model.safetensors']
    """
    files = find_model_files(Path(path))
    if check:
        _require_fit(blueprint, files, str(path))
    text = to_header_text(to_dict(blueprint), digits)
    size = len(json.dumps(text))
    limit = MAX_TEXT if files.index is None else min(MAX_TEXT, MAX_STRING)
    if size > limit:
        raise BlueprintError(
            f"The blueprint of {blueprint.model_id!r} would have {size:,} bytes in {files.index or files.tensors}, with "
            f"{len(blueprint):,} entries; at most {limit:,} are allowed. Save it as blueprint.safetensors beside the "
            "model."
        )
    changed = _write(files, {JSON_KEY: text, VERSION_KEY: VERSION}, progress)
    with open(files.tensors, "rb") as file:
        start = file.read(FIRST_READ)
    if metadata_of_prefix(start, str(files.tensors))[0] is None:
        warnings.warn(
            f"The blueprint of {blueprint.model_id!r} has {size:,} bytes in {files.tensors}, and ends beyond the first "
            f"{FIRST_READ:,}, which are read at once: reading it from the Hub takes a second request. Publish it beside "
            "the model too.",
            stacklevel=2,
        )
    return changed


def remove(path: str | Path, *, progress: bool = True) -> list[Path]:
    """Remove the blueprint from a model's files.

    Returns:
        The files that were changed; none if they carry none.

    Raises:
        BlueprintError: if a file is missing, is the Hub's cache's, or cannot be written.
        FormatError: if a file is not a safetensors file or index.

    Example:
        >>> import tempfile
        >>> from peft_blueprint import Submodule
        >>> from peft_blueprint.testing import save_tiny_model
        >>> blueprint = Blueprint("org/model", (Submodule("model.layers.0.mlp.up_proj", 1.0),))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = save_tiny_model(Path(folder) / "model")
        ...     written = embed(blueprint, model, progress=False)
        ...     [path.name for path in remove(model, progress=False)], remove(model, progress=False)
        (['model.safetensors'], [])
    """
    return _write(find_model_files(Path(path)), {JSON_KEY: None, VERSION_KEY: None}, progress)


def _require_fit(blueprint: Blueprint, files: ModelFiles, source: str) -> None:
    """Raise MismatchError unless the blueprint is of the model in these files, or of the adapter's base model."""
    tensors = _tensors_of(files)
    try:
        is_shown = check_stored(blueprint, tensors, source, is_adapter=files.tensors.name == ADAPTER_FILE)
    except MismatchError:
        # some models are stored under other names; only transformers knows them, and it takes seconds to import
        from .loaded_tensors import as_loaded

        try:
            check_stored(*as_loaded(blueprint, tensors, files.tensors.parent), source)
        except BlueprintError:
            pass
        else:
            return
        raise
    config = files.tensors.parent / ADAPTER_CONFIG
    base = base_model_in(read_text(config)) if config.exists() else None
    if is_shown or base == blueprint.model_id:
        return
    if base and Path(base).is_dir():
        _require_fit(blueprint, find_model_files(Path(base)), base)
    else:
        warnings.warn(
            f"The adapter in {source} adapts none of the {len(blueprint)} modules in the blueprint of "
            f"{blueprint.model_id!r}, and the files of its base model ({base or 'not named'}) are not here: whether the "
            "blueprint is of that model was not checked.",
            stacklevel=3,
        )


def base_model_in(config: str) -> str | None:
    """Return the base model that the text of an `adapter_config.json` names; None if it names none.

    Example:
        >>> base_model_in('{"base_model_name_or_path": "org/model"}')
        'org/model'
    """
    try:
        record = loads(config, ADAPTER_CONFIG)
    except FormatError:
        return None
    name = record.get("base_model_name_or_path") if isinstance(record, dict) else None
    return name if isinstance(name, str) else None


def _tensors_of(files: ModelFiles) -> Tensors:
    """Return dtype and shape of every tensor, by name; None for those in missing shards."""
    tensors: dict[str, tuple[str, tuple[int, ...]] | None] = {}
    if files.index is not None:
        tensors = dict.fromkeys(parse_index(read_text(files.index), str(files.index))["weight_map"])
    for shard in files.shards:
        if shard.exists() or files.index is None:
            tensors |= read_header(shard).tensors
    return tensors


def _write(files: ModelFiles, changes: dict[str, str | None], progress: bool) -> list[Path]:
    targets = [path for path in (files.tensors, files.index) if path is not None]
    for target in targets:
        if not target.exists():
            raise BlueprintError(f"The file {target} does not exist. Download the whole model, or check the path.")
        _require_own(target)
        require_writable(target.parent)
    # readers warn if the header holds a blueprint and the index does not, as after a kill in between
    is_removed = None in changes.values()
    changed = []
    for target in reversed(targets) if is_removed else targets:
        replace = _replace_in_index if target == files.index else replace_metadata
        if replace(target, changes, progress):
            changed.append(target)
    if changed and files.index is not None:
        held = (read_metadata(files.tensors), parse_index(read_text(files.index), str(files.index))["metadata"])
        if any(metadata.get(key) != value for metadata in held for key, value in changes.items()):
            raise BlueprintError(
                f"{files.tensors} or {files.index} was replaced by another program meanwhile, so one of them lacks the "
                "change. Try again."
            )
    return sorted(changed, key=targets.index)


def _replace_in_index(path: Path, changes: dict[str, str | None], progress: bool) -> bool:
    """Set or remove (None) keys of an index's metadata. Return whether it changed."""
    remove_leftovers(path)
    status = path.stat()
    text = read_text(path)
    index = parse_index(text, str(path))
    metadata = {key: value for key, value in {**index["metadata"], **changes}.items() if value is not None}
    if metadata == index["metadata"]:
        return False
    content = json.dumps({"metadata": metadata, **index, **{"metadata": metadata}}, indent=2)
    write_atomically(path, content + "\n" * text.endswith("\n"), status)
    return True


def _require_own(path: Path) -> None:
    """Raise BlueprintError for a symbolic link, or a file of the Hub's cache, which others read too."""
    folders = {parent.name for parent in path.resolve().parents}
    in_cache = any(name.startswith("models--") for name in folders) and bool(folders & {"blobs", "snapshots"})
    if in_cache:
        raise BlueprintError(
            f"{path} is in the Hub's cache, which other programs read and whose files are checked by their hash. Copy the "
            "model first: `hf download <model> --local-dir <folder>`, and give that folder."
        )
    if path.is_symlink():
        raise BlueprintError(
            f"{path} is a symbolic link to {path.resolve()}, and is not changed. Give that file if it is yours; copy a "
            "model from the Hub's cache with `hf download <model> --local-dir <folder>`."
        )
