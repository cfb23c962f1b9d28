"""Blueprints from wherever they are: a file, a folder, or a repository on the Hub, without its tensors.

Everything that touches the network goes through `huggingface_hub`, so that its tokens, mirrors and offline mode apply.
Knows nothing of what a blueprint says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import cached_assets_path, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from .._files import write_atomically
from ..errors import BlueprintError, FormatError
from .blueprint import Blueprint
from .formats import read_blueprint
from .header import FIRST_READ, HEADER_LIMIT, metadata_of_prefix
from .header_text import from_header_text
from .hub_errors import NETWORK_ERRORS, translated_hub_errors
from .naming import SUFFIXES, file_name
from .slots import JSON_KEY, first_text
from .strict_json import loads, read_text


_COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch(
    source: str | Path,
    *,
    revision: str | None = None,
    domain: str | None = None,
    checkpoint: float | None = None,
    **kwargs: Any,
) -> Blueprint:
    """Read a blueprint from a file, a folder, or a repository on the Hub.

    What exists on disk is taken from disk, as is what ends in `.json`, `.csv` or `.safetensors`; anything else is a
    repository id. There the header of `model.safetensors` is asked first, with one range request of 100 kB; then the
    index of a sharded model; then `blueprint.json` and `blueprint.safetensors` beside. A header holds numbers to four
    digits, the files beside all of them. No tensor is downloaded, and what was read once is there offline.

    Args:
        source: path or repository id.
        revision: branch, tag or commit of a repository. A commit that was read before is not asked for again.
        domain: read the blueprint of this domain among several side by side, see `naming.file_name`.
        checkpoint: likewise, the share of the training that was done, (0, 1].
        **kwargs: for `huggingface_hub.hf_hub_download`: `token`, `cache_dir`, `local_files_only`, `endpoint`, ….

    Raises:
        FormatError: if what is there is not a blueprint.
        BlueprintError: if there is nothing, with the reason and a way out.
    """
    name = file_name(domain, checkpoint)
    path = Path(source)
    if path.exists() or path.suffix in SUFFIXES:
        return read_blueprint(path, name)
    repository = _Repository(str(source), revision, name, kwargs)
    with translated_hub_errors(str(source), revision=revision, file=name):
        found, is_reached = (None, True) if domain or checkpoint else _in_the_model(repository)
        if found is not None:
            return from_header_text(found.text, f"{found.file} of {source}")
        is_out_of_reach = repository.is_offline or not is_reached
        settings = {"revision": revision, **kwargs} | ({"local_files_only": True} if is_out_of_reach else {})
        try:
            return read_blueprint(hf_hub_download(str(source), name, **settings))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            arrays = Path(name).with_suffix(".safetensors").name
            return read_blueprint(hf_hub_download(str(source), arrays, **settings))


@dataclass(frozen=True)
class _Repository:
    """What is asked for: a repository's id, revision and file, with the settings of the download."""

    id: str
    revision: str | None
    file: str
    settings: dict[str, Any]

    @property
    def is_offline(self) -> bool:
        return bool(self.settings.get("local_files_only")) or constants.HF_HUB_OFFLINE

    def cache(self, *parts: str) -> Path:
        """Where we keep what headers say, in the client's folder for such things or in the `cache_dir` given."""
        chosen = self.settings.get("cache_dir")
        folder = cached_assets_path(
            "peft_blueprint", self.id, parts[0], assets_dir=Path(chosen) / "assets" if chosen else None
        )
        return folder / (re.sub(r"[^\w.-]", "--", parts[1]) + ".json")


class _Found(NamedTuple):
    """The text of a blueprint, and the file whose header or index it stands in."""

    file: str
    text: str


def _in_the_model(repository: _Repository) -> tuple[_Found | None, bool]:
    """What the model's own header or index holds, and whether the Hub, if it was asked, gave an answer.

    Where it gave none, the cache is asked.
    """
    revision = repository.revision or constants.DEFAULT_REVISION
    is_reached = True
    if _COMMIT.fullmatch(revision) and (cached := repository.cache("commits", revision)).exists():
        return _cached(cached), is_reached
    if not repository.is_offline:
        try:
            return _asked(repository, revision), is_reached
        except HfHubHTTPError:
            raise
        except NETWORK_ERRORS:
            is_reached = False
    reference = repository.cache("revisions", revision)
    commit = loads(read_text(reference), str(reference)) if reference.exists() else revision
    cached = repository.cache("commits", str(commit))
    return (_cached(cached) if cached.exists() else None), is_reached


def _asked(repository: _Repository, revision: str) -> _Found | None:
    commit, found = None, None
    for file, parse in (
        (constants.SAFETENSORS_SINGLE_FILE, _of_header),
        (constants.SAFETENSORS_INDEX_FILE, _of_index),
    ):
        try:
            start = _read_start(repository, file, FIRST_READ)
            metadata, needed = parse(start.data, f"{file} of {repository.id}", start.size)
            if metadata is None:
                start = _read_start(repository, file, needed)
                metadata, _ = parse(start.data, f"{file} of {repository.id}", start.size)
        except EntryNotFoundError as error:
            if isinstance(error, HfHubHTTPError) and error.response is not None:
                commit = _commit_of([error.response])
            continue
        commit = start.commit
        text = (metadata or {}).get(JSON_KEY)
        found = _Found(file, text) if isinstance(text, str) else None
        break
    if commit:
        _remember(repository, revision, commit, found)
    return found


def _of_header(data: bytes, source: str, size: int | None) -> tuple[dict[str, str] | None, int]:
    metadata, needed = metadata_of_prefix(data, source, size)
    if metadata is None and (text := first_text(data)) is not None:
        return {JSON_KEY: text}, needed
    return metadata, needed


def _of_index(data: bytes, source: str, size: int | None) -> tuple[dict[str, Any] | None, int]:
    """The `metadata` of an index from its first bytes, where transformers writes it first; else how many are needed."""
    is_whole = size is not None and len(data) >= size
    text = data.decode("utf-8", errors="strict" if is_whole else "ignore")
    if is_whole:
        index = loads(text, source)
        metadata = index.get("metadata") if isinstance(index, dict) else None
        return metadata if isinstance(metadata, dict) else {}, 0
    if opening := re.match(r'\s*\{\s*"metadata"\s*:\s*', text):
        try:
            _, end = json.JSONDecoder().raw_decode(text, opening.end())
        except (json.JSONDecodeError, RecursionError):
            pass
        else:
            metadata = loads(text[opening.end() : end], source)
            return metadata if isinstance(metadata, dict) else {}, 0
    if len(data) >= HEADER_LIMIT:
        raise FormatError(f"{source} is longer than {HEADER_LIMIT:,} bytes, which no index is.")
    return None, HEADER_LIMIT if size is None else min(size, HEADER_LIMIT)


class _Start(NamedTuple):
    """The first bytes of a file, its size in bytes where that was said, and the commit."""

    data: bytes
    size: int | None
    commit: str | None


def _read_start(repository: _Repository, file: str, count: int) -> _Start:
    """At most `count` bytes from a file's beginning, whatever the server is ready to send."""
    settings = repository.settings
    url = hf_hub_url(repository.id, file, revision=repository.revision, endpoint=settings.get("endpoint"))
    headers = build_hf_headers(token=settings.get("token")) | {
        "Range": f"bytes=0-{count - 1}",
        "Accept-Encoding": "identity",
    }
    with _streaming(url, headers) as response:
        if response.status_code == 416:
            return _Start(b"", 0, None)  # an empty file
        hf_raise_for_status(response)
        data = bytearray()
        for chunk in _chunks(response):
            data += chunk
            if len(data) >= count:
                break
        commit = _commit_of([*response.history, response])
        ranged = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
        size = int(ranged[1]) if ranged else _length(response) if response.status_code == 200 else None
        return _Start(bytes(data[:count]), size, commit)


def _commit_of(responses: Sequence[Any]) -> str | None:
    """The commit that the Hub's answers name; where it redirects, only its own do."""
    name = constants.HUGGINGFACE_HEADER_X_REPO_COMMIT
    return next((response.headers[name] for response in responses if name in response.headers), None)


def _length(response: Any) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


try:
    from huggingface_hub.utils import http_stream_backoff

    def _streaming(url: str, headers: dict[str, str]) -> Any:
        return http_stream_backoff(
            "GET",
            url,
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=(),
            retry_on_status_codes=(429,),
        )

    def _chunks(response: Any) -> Iterator[bytes]:
        return response.iter_bytes(1 << 14)

except ImportError:  # before its version 1.0 the client spoke through requests

    def _streaming(url: str, headers: dict[str, str]) -> Any:
        session: Any = get_session()
        return session.get(url, headers=headers, stream=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)

    def _chunks(response: Any) -> Iterator[bytes]:
        return response.iter_content(1 << 14)


def _remember(repository: _Repository, revision: str, commit: str, found: _Found | None) -> None:
    try:
        write_atomically(repository.cache("commits", commit), json.dumps(found and found._asdict()))
        write_atomically(repository.cache("revisions", revision), json.dumps(commit))
    except (BlueprintError, OSError, ValueError):
        pass  # a cache that cannot be written costs a request next time


def _cached(path: Path) -> _Found | None:
    record = loads(read_text(path), str(path))
    return _Found(str(record["file"]), str(record["text"])) if isinstance(record, dict) else None
