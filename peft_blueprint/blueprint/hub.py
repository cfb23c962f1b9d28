"""Read a record from a repository on the Hub, without its tensors.

All requests go through `huggingface_hub`, so that its tokens, mirrors and offline mode apply.
"""

from __future__ import annotations

import json
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from huggingface_hub import (
    HfApi,
    cached_assets_path,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from .._files import write_atomically
from ..errors import BlueprintError, FormatError
from .formats import FILE_NAME, MAX_ARRAYS, blueprint_files, latest_checkpoint, read_record
from .header import FIRST_READ, metadata_of_prefix
from .header_text import JSON_KEY, from_header_text, require_version
from .hub_errors import NETWORK_ERRORS, NO_JSON, translated_hub_errors
from .model_files import ADAPTER_FILE, INDEX_FILE, MODEL_FILE, index_metadata_of_prefix
from .strict_json import MAX_BYTES, loads, read_text


MAX_SECONDS = 120.0  # for reading one blueprint

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NOTHING: dict[str, str] = {}  # cached for a commit without a blueprint in its model


def fetch(repo_id: str, name: str = FILE_NAME, *, revision: str | None = None, **kwargs: Any) -> tuple[Any, str]:
    """Read a record from a repository on the Hub.

    The main blueprint is looked for in the header of `model.safetensors` with one range request of 100 kB; then in the
    index of a sharded model; then in the header of `adapter_model.safetensors`; then in `blueprint.json` and
    `blueprint.safetensors` beside. Without any of these it is the latest checkpoint's, such as `blueprint-80.json`, with
    a warning if that is not of the last step. A header holds numbers to four digits, the files beside hold all. No
    tensor is downloaded, and files that were read once are available offline. Files beyond the limits of `strict_json` are not
    downloaded, and reading ends after `MAX_SECONDS` at the latest.

    Args:
        repo_id: of the repository.
        name: of the blueprint's file; another one than `blueprint.json` is looked for beside the model alone.
        revision: branch, tag or commit. A commit that was read before costs no request.
        **kwargs: for `huggingface_hub.hf_hub_download`: `subfolder`, `token`, `cache_dir`, `local_files_only`,
            `endpoint`, ….

    Returns:
        The record, unchecked, and where it was found.

    Raises:
        FormatError: if the file is not a record.
        BlueprintError: if there is none, with the reason and a fix.

    Example:
        >>> try:
        ...     record, source = fetch("org/model/blueprint.json", local_files_only=True)
        ... except BlueprintError as error:
        ...     print(str(error).partition(",")[0])
        'org/model/blueprint.json' is not a repository id such as 'org/model'
    """
    repository = _Repository.of(repo_id, revision, kwargs)
    with translated_hub_errors(repo_id, revision=revision, file=name, token=kwargs.get("token")):
        return _within(MAX_SECONDS, partial(_fetch, repository, name), repo_id)


def find_blueprints(repo_id: str, *, revision: str | None = None, **kwargs: Any) -> list[str]:
    """Return the names of a repository's blueprints, 50 before 100, with `blueprint.json` for one in the model's header.

    Args:
        repo_id: of the repository.
        revision: branch, tag or commit.
        **kwargs: as for `fetch`.

    Raises:
        BlueprintError: if the repository cannot be read. Offline, files that were read before are there.

    Example:
        >>> find_blueprints("org/model")  # doctest: +SKIP
        ['blueprint-50.json', 'blueprint-80.json']
    """
    repository = _Repository.of(repo_id, revision, kwargs)
    with translated_hub_errors(repo_id, revision=revision, file=FILE_NAME, token=kwargs.get("token")):
        return _within(MAX_SECONDS, partial(_find, repository), repo_id)


def _find(repository: _Repository) -> list[str]:
    found, is_reached = _in_the_model(repository)
    names = _names(repository, repository.is_offline or not is_reached)
    return blueprint_files([*names, FILE_NAME] if found is not None else names)


def _names(repository: _Repository, is_out_of_reach: bool) -> list[str]:
    """Return the names of the files in the repository's folder; out of reach, of those in the client's cache."""
    known = repository.settings
    if is_out_of_reach:
        kept = {key: known[key] for key in ("repo_type", "cache_dir") if key in known}
        root = snapshot_download(repository.id, revision=repository.revision, local_files_only=True, **kept)
        return [path.name for path in Path(root, repository.subfolder or "").glob("*")]
    api = HfApi(endpoint=known.get("endpoint"), token=known.get("token"))
    info = api.repo_info(repository.id, revision=repository.revision, repo_type=known.get("repo_type"))
    paths = [PurePosixPath(sibling.rfilename) for sibling in getattr(info, "siblings", None) or ()]
    return [path.name for path in paths if path.parent == PurePosixPath(repository.subfolder or ".")]


def _fetch(repository: _Repository, name: str) -> tuple[Any, str]:
    found, is_reached = _in_the_model(repository) if name == FILE_NAME else (None, True)
    if found is not None:
        where = f"{found.file} of {repository.id}"
        return from_header_text(found.text, where), where
    is_out_of_reach = repository.is_offline or not is_reached
    missing: EntryNotFoundError | None = None
    for file in (name, Path(name).with_suffix(".safetensors").name):
        try:
            return read_record(_download(repository, file, is_out_of_reach))
        except EntryNotFoundError as error:
            missing = missing or error
    assert missing is not None
    with suppress(LocalEntryNotFoundError):  # nothing of the repository is in the cache
        latest = latest_checkpoint(name, _names(repository, is_out_of_reach), repository.id)
        if latest is not None:
            return read_record(_download(repository, latest, is_out_of_reach))
    raise missing


def _download(repository: _Repository, name: str, is_out_of_reach: bool) -> str:
    """Return the path of a file in the client's cache, where it is downloaded to unless it is too large."""
    settings = {"revision": repository.revision, **repository.settings}
    is_local = is_out_of_reach
    if not is_local and _COMMIT.fullmatch(repository.revision or "") and not settings.get("force_download"):
        try:
            path = hf_hub_download(repository.id, name, **settings | {"local_files_only": True})
            if os.path.getsize(path):
                return path
        except LocalEntryNotFoundError:
            pass
        settings["force_download"] = True  # a cached file would be empty
    if not is_local:
        size = get_hf_file_metadata(repository.url(name), token=settings.get("token")).size
        most = MAX_ARRAYS if name.endswith(".safetensors") else MAX_BYTES
        if size is not None and size > most:
            raise FormatError(
                f"{name} of {repository.id} has {size:,} bytes; at most {most:,} are read. It is larger than any "
                "blueprint should be, and was not downloaded."
            )
    return hf_hub_download(repository.id, name, **settings | ({"local_files_only": True} if is_local else {}))


def _within(seconds: float, function: Callable[[], Any], repo_id: str) -> Any:
    """Return a function's value, or raise BlueprintError if it takes longer; it then goes on in a thread of its own.

    Timeouts of the client are of single reads, so that a server could keep it for ever with a byte now and then.
    """
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((function(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True, name="peft_blueprint.hub").start()
    try:
        value, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise BlueprintError(
            f"The Hub did not deliver the blueprint of {repo_id!r} within {seconds:g} seconds. Try again later."
        ) from None
    if error is not None:
        raise error
    return value


@dataclass(frozen=True)
class _Repository:
    """A repository's id and revision with the settings of the download."""

    id: str
    revision: str | None
    settings: dict[str, Any]

    @classmethod
    def of(cls, repo_id: str, revision: str | None, settings: dict[str, Any]) -> _Repository:
        """Return the repository with its subfolder spelled as in the paths of the Hub, without dots and double slashes."""
        folder = PurePosixPath(settings.get("subfolder") or ".").as_posix()
        return cls(repo_id, revision, {**settings, "subfolder": None if folder == "." else folder})

    @property
    def subfolder(self) -> str | None:
        return self.settings.get("subfolder") or None

    def url(self, file: str) -> str:
        """Return the address of a file."""
        return hf_hub_url(
            self.id,
            file,
            subfolder=self.subfolder,
            repo_type=self.settings.get("repo_type"),
            revision=self.revision,
            endpoint=self.settings.get("endpoint"),
        )

    @property
    def is_offline(self) -> bool:
        return bool(self.settings.get("local_files_only")) or constants.HF_HUB_OFFLINE

    def cache(self, *parts: str) -> Path:
        """Return where headers' texts are cached, in the client's folder of assets or in the `cache_dir` given."""
        chosen = self.settings.get("cache_dir")
        folder = cached_assets_path(
            "peft_blueprint", self.id, parts[0], assets_dir=Path(chosen) / "assets" if chosen else None
        )
        names = [part for part in (self.settings.get("repo_type"), self.subfolder, parts[1]) if part]
        return folder / (re.sub(r"[^\w.-]", "--", "--".join(names)) + ".json")


class _Found(NamedTuple):
    """The text of a blueprint, and the file whose header or index it stands in."""

    file: str
    text: str


def _in_the_model(repository: _Repository) -> tuple[_Found | None, bool]:
    """Look in the model's own header or index; also return whether the Hub, if it was asked, answered.

    Without an answer, look in the cache.
    """
    revision = repository.revision or constants.DEFAULT_REVISION
    is_reached = True
    if _COMMIT.fullmatch(revision) and (cached := _cached(repository, revision)) is not None:
        return cached.found, is_reached
    if not repository.is_offline:
        try:
            return _asked(repository, revision), is_reached
        except HfHubHTTPError:
            raise
        except NETWORK_ERRORS:
            is_reached = False
    commit = _read_cache(repository.cache("revisions", revision))
    cached = _cached(repository, commit if isinstance(commit, str) else revision)
    return (None if cached is None else cached.found), is_reached


def _asked(repository: _Repository, revision: str) -> _Found | None:
    commit, found, has_model = None, None, False
    for file, parse in (
        (MODEL_FILE, metadata_of_prefix),
        (INDEX_FILE, index_metadata_of_prefix),
        (ADAPTER_FILE, metadata_of_prefix),
    ):
        if has_model and file == INDEX_FILE:
            continue
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
        commit, has_model = start.commit, True
        text = (metadata or {}).get(JSON_KEY)
        if isinstance(text, str):
            require_version(metadata or {}, f"{file} of {repository.id}")
            found = _Found(file, text)
            break
    if commit:
        _remember(repository, revision, commit, found)
    return found


class _Start(NamedTuple):
    """The first bytes of a file, its size in bytes where the server gave it, and the commit."""

    data: bytes
    size: int | None
    commit: str | None


def _read_start(repository: _Repository, file: str, count: int) -> _Start:
    """Read at most `count` bytes from a file's beginning, also from a server that ignores ranges."""
    settings = repository.settings
    url = repository.url(file)
    headers = build_hf_headers(token=settings.get("token")) | {
        "Range": f"bytes=0-{count - 1}",
        "Accept-Encoding": "identity",
    }
    with _streaming(url, headers) as response:
        if response.status_code == 416:
            return _Start(b"", 0, None)  # an empty file
        hf_raise_for_status(response)
        _require_file(response, f"{file} of {repository.id}")
        data = bytearray()
        for chunk in _chunks(response):
            data += chunk
            if len(data) >= count:
                break
        commit = _commit_of([*response.history, response])
        ranged = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
        size = int(ranged[1]) if ranged else _length(response) if response.status_code == 200 else None
        return _Start(bytes(data[:count]), size, commit)


def _require_file(response: Any, source: str) -> None:
    """Raise BlueprintError for a page in place of a file, and for compressed bytes, which may expand beyond all limits."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise BlueprintError(
            f"The Hub sent {source} compressed ({encoding[:20]}), which was not asked for. Try again later."
        )
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise BlueprintError(NO_JSON.format(what=source))


def _commit_of(responses: Sequence[Any]) -> str | None:
    """Return the commit that the Hub's answers name; after a redirect only its own do."""
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
            retry_on_status_codes=(),
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
        write_atomically(repository.cache("commits", commit), json.dumps(found._asdict() if found else _NOTHING))
        write_atomically(repository.cache("revisions", revision), json.dumps(commit))
    except (BlueprintError, OSError, ValueError):
        pass  # a cache that cannot be written costs a request next time


class _Cached(NamedTuple):
    """A commit's blueprint, or the fact that it has none."""

    found: _Found | None


def _cached(repository: _Repository, commit: str) -> _Cached | None:
    record = _read_cache(repository.cache("commits", commit))
    if record == _NOTHING:
        return _Cached(None)
    is_found = isinstance(record, dict) and isinstance(record.get("file"), str) and isinstance(record.get("text"), str)
    return _Cached(_Found(record["file"], record["text"])) if is_found else None


def _read_cache(path: Path) -> Any:
    """Return the content of a file of the cache; None without one, or for one that is empty or spoilt."""
    try:
        return loads(read_text(path), str(path))
    except BlueprintError:
        return None
