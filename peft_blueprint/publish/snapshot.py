"""Read a repository on the Hub at one commit: its files, its card, and the blueprint in its model's index or header."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, SafetensorsParsingError

from ..blueprint import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    CARD,
    JSON_KEY,
    VERSION,
    VERSION_KEY,
    Blueprint,
    from_header_text,
    parse_index,
    rounded,
    to_dict,
    to_header_text,
)
from ..errors import BlueprintError, FormatError
from .embedding import base_model_in


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit.

    Args:
        api: client of the Hub.
        id: repository, spelled as on the Hub.
        commit: None if there is no repository.
        files: paths of its files.
        is_public: whether anybody can see it.
    """

    api: HfApi
    id: str
    commit: str | None = None
    files: frozenset[str] = frozenset()
    is_public: bool = False

    def read(self, path: str) -> bytes | None:
        """Return a file's content; None if there is no such file."""
        if path not in self.files:
            return None
        with tempfile.TemporaryDirectory() as folder:
            local = hf_hub_download(
                self.id,
                path,
                revision=self.commit,
                local_dir=folder,
                token=self.api.token,
                endpoint=self.api.endpoint,
            )
            return Path(local).read_bytes()

    def read_card(self) -> str | None:
        """Return the card's text with its line ends; None if there is none.

        Raises:
            BlueprintError: if it is not UTF-8.
        """
        content = self.read(CARD)
        try:
            return None if content is None else content.decode()
        except UnicodeDecodeError as error:
            raise BlueprintError(
                f"The card of {self.id!r} is not UTF-8 text ({error.reason} at byte {error.start}). Correct {CARD} there."
            ) from error


def take_snapshot(api: HfApi, repo_id: str, revision: str | None, may_be_created: bool) -> Snapshot:
    """Return the last commit of a revision.

    Args:
        api: client of the Hub.
        repo_id: repository.
        revision: branch, tag or commit; None for the main branch.
        may_be_created: return a snapshot without a commit for a repository that is missing or hidden.

    Raises:
        Exception: of the client, as for `HfApi.model_info`.
    """
    try:
        info = api.model_info(repo_id, revision=revision)
    except RepositoryNotFoundError as error:
        # a gated repository has another type of error, so this one is missing or hidden
        if not may_be_created or revision is not None or type(error) is not RepositoryNotFoundError:
            raise
        return Snapshot(api, repo_id)
    names = [sibling.rfilename for sibling in info.siblings or ()]
    if not all(isinstance(text, str) for text in (info.id or repo_id, info.sha, *names)):
        raise BlueprintError(
            f"The Hub's address answered about {repo_id!r} in an unknown form: its id, commit and names of files must be "
            "text. Check HF_ENDPOINT."
        )
    return Snapshot(api, info.id or repo_id, info.sha, frozenset(names), is_public=info.private is False)


def index_with(blueprint: Blueprint, there: Snapshot, is_wanted: bool) -> bytes | None:
    """Return the index of a sharded model with the blueprint in it; None if it need not change.

    An index that holds a blueprint is always updated, another one only if `is_wanted`.

    Raises:
        BlueprintError: if it is wanted and there is no index.
        FormatError: if the file is not an index.
    """
    path = constants.SAFETENSORS_INDEX_FILE
    content = there.read(path)
    if content is None:
        if is_wanted:
            raise BlueprintError(
                f"{there.id!r} has no {path} that could hold the blueprint. For a model in a single file use "
                "`peft-blueprint embed` before the model is uploaded, or publish without in_index."
            )
        return None
    index = parse_index(content.decode(errors="replace"), f"{path} of {there.id!r}")
    metadata = index.get("metadata") or {}
    if not is_wanted and JSON_KEY not in metadata:
        return None
    entries = {VERSION_KEY: VERSION, JSON_KEY: to_header_text(to_dict(blueprint))}
    if metadata == {**metadata, **entries}:
        return None
    index["metadata"] = {**metadata, **entries}
    return (json.dumps(index, indent=2) + "\n").encode()


def base_model_of(there: Snapshot) -> str | None:
    """Return the model that the repository's adapter was trained on; None without an adapter, or if it names none."""
    return base_model_in((there.read(ADAPTER_CONFIG) or b"").decode(errors="replace"))


def file_with_other_header(blueprint: Blueprint, there: Snapshot) -> str | None:
    """Return the file of a model or adapter, where readers look first, whose header holds another blueprint."""
    path = next((name for name in (constants.SAFETENSORS_SINGLE_FILE, ADAPTER_FILE) if name in there.files), None)
    if path is None:
        return None
    try:
        metadata = there.api.parse_safetensors_file_metadata(there.id, path, revision=there.commit).metadata
    except SafetensorsParsingError:
        return None
    if JSON_KEY not in metadata:
        return None
    try:
        record = from_header_text(metadata[JSON_KEY])
    except FormatError:
        return path
    is_same = isinstance(record, dict) and record.get("digest") == rounded(to_dict(blueprint))["digest"]
    return None if is_same else path
