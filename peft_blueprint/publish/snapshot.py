"""A repository on the Hub as it is at one commit: its files, its card, and the blueprint in its model's index or header.

Reads only. Knows nothing of commits to come.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, SafetensorsParsingError

from ..blueprint import (
    CARD,
    JSON_KEY,
    VERSION,
    VERSION_KEY,
    Blueprint,
    from_header_text,
    loads,
    rounded,
    to_header_text,
)
from ..errors import BlueprintError, FormatError


@dataclass(frozen=True)
class Snapshot:
    """A repository as it is at one commit.

    Args:
        api: the Hub's client.
        id: the repository's, as the Hub writes it.
        commit: None if there is no repository.
        files: their paths.
        is_public: whether anybody can see it.
    """

    api: HfApi
    id: str
    commit: str | None = None
    files: frozenset[str] = frozenset()
    is_public: bool = False

    def read(self, path: str) -> bytes | None:
        """A file's content at that commit; None if it has none."""
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
        """The card's text, line ends as they are; None if there is none.

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


def look(api: HfApi, repo_id: str, revision: str | None, may_be_made: bool) -> Snapshot:
    """The last commit of a revision.

    Args:
        api: the Hub's client.
        repo_id: the repository.
        revision: branch, tag or commit; None for the main branch.
        may_be_made: whether a repository that is missing, or hidden, is answered with one without a commit.

    Raises:
        Exception: the client's own, as of `HfApi.model_info`.
    """
    try:
        info = api.model_info(repo_id, revision=revision)
    except RepositoryNotFoundError as error:
        # of a gated repository there is information, so that this one is missing or hidden
        if not may_be_made or revision is not None or type(error) is not RepositoryNotFoundError:
            raise
        return Snapshot(api, repo_id)
    names = frozenset(sibling.rfilename for sibling in info.siblings or ())
    return Snapshot(api, info.id or repo_id, info.sha, names, is_public=info.private is False)


def index_with(blueprint: Blueprint, there: Snapshot, wanted: bool) -> bytes | None:
    """The index of a sharded model with the blueprint in it; None if it holds this one, or none and none is wanted.

    Raises:
        BlueprintError: if it is wanted and there is no index.
        FormatError: if what is there is none.
    """
    path = constants.SAFETENSORS_INDEX_FILE
    content = there.read(path)
    if content is None:
        if wanted:
            raise BlueprintError(
                f"{there.id!r} has no {path} that could hold the blueprint. For a model in a single file use "
                "`peft-blueprint embed` before the model is uploaded, or publish without in_index."
            )
        return None
    text = content.decode(errors="replace")
    index = loads(text, f"{path} of {there.id}")
    metadata = index.get("metadata", {}) if isinstance(index, dict) else None
    if not isinstance(metadata, dict) or "weight_map" not in index:
        raise FormatError(f"{path} of {there.id!r} is not the index of a model. Publish without in_index.")
    if not wanted and JSON_KEY not in metadata:
        return None
    entries = {VERSION_KEY: VERSION, JSON_KEY: to_header_text(blueprint)}
    if all(metadata.get(key) == value for key, value in entries.items()):
        return None
    rest = {key: value for key, value in index.items() if key != "metadata"}
    return _in_style_of(text, index, {"metadata": {**metadata, **entries}, **rest}).encode()


def has_other_header(blueprint: Blueprint, there: Snapshot) -> bool:
    """Whether the header of the model's own file, which readers ask first, holds another blueprint than this."""
    path = constants.SAFETENSORS_SINGLE_FILE
    if path not in there.files:
        return False
    try:
        metadata = there.api.parse_safetensors_file_metadata(there.id, path, revision=there.commit).metadata
    except SafetensorsParsingError:
        return False
    if JSON_KEY not in metadata:
        return False
    try:
        return from_header_text(metadata[JSON_KEY]).digest != rounded(blueprint).digest
    except FormatError:
        return True


def _in_style_of(text: str, index: Any, changed: Any) -> str:
    """An index as JSON, indented and ended as the text was."""
    body = text.rstrip()
    for indent in (2, 4, None):
        for is_ascii in (True, False):
            if json.dumps(index, indent=indent, ensure_ascii=is_ascii) == body:
                return json.dumps(changed, indent=indent, ensure_ascii=is_ascii) + text[len(body) :]
    return json.dumps(changed, indent=2) + "\n"
