"""Read the header of a safetensors file from its first bytes, and write a file anew with other metadata."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from .._files import remove_leftovers, replacing
from .._progress import progress_bar
from ..errors import BlueprintError, FormatError
from .strict_json import loads, unique_keys


if sys.platform != "win32":
    import fcntl

HEADER_LIMIT = 25_000_000  # bytes of JSON; the Hub's client refuses more
FIRST_READ = 100_000  # bytes; the Hub's client starts with as many

_METADATA = "__metadata__"
_MAX_KEYS = 20_000  # in the metadata
_MAX_QUOTES = 2_000_000  # in a header: a tensor has ten
_PREFIX = struct.Struct("<Q")
_OPENING = re.compile(r'\s*\{\s*"__metadata__"\s*:\s*')
_CHUNK = 1 << 20  # bytes copied at once
_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


@dataclass(frozen=True)
class Header:
    """A whole header.

    Args:
        size: bytes before the tensors' own: eight, the JSON and its padding.
        metadata: its `__metadata__`.
        entries: the JSON object of every tensor by name.
    """

    size: int
    metadata: dict[str, str]
    entries: dict[str, Any]

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of every tensor, by name."""
        return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in self.entries.items()}


def metadata_of_prefix(data: bytes, source: str, size: int | None = None) -> tuple[dict[str, str] | None, int]:
    """Read the metadata of a safetensors file from its first bytes, without the tensors that follow.

    Args:
        data: first bytes of the file.
        source: named in error messages.
        size: of the whole file in bytes, where known.

    Returns:
        The metadata, empty if there is none, and the bytes that the header takes; or None and how many of the file's
        first bytes are needed.

    Raises:
        FormatError: for a length beyond the file or `HEADER_LIMIT`, invalid JSON, metadata other than text by text, a
            key twice.

    Example:
        >>> from safetensors.numpy import save
        >>> metadata_of_prefix(save({}, {"format": "pt"}), "model.safetensors")[0]
        {'format': 'pt'}
    """
    if len(data) < 8:
        if size is not None and size < 8:
            raise FormatError(f"{source} has {size} bytes, too few for a safetensors file. Get it again.")
        return None, 8
    (length,) = _PREFIX.unpack_from(data)
    end = 8 + length
    if length > HEADER_LIMIT:
        raise FormatError(
            f"{source} is not a valid safetensors file: its header would have {length:,} bytes, and at most "
            f"{HEADER_LIMIT:,} are read."
        )
    if size is not None and end > size:
        raise FormatError(
            f"{source} is cut short or not a safetensors file: its header would end at byte {end:,}, "
            f"and it has {size:,}."
        )
    if len(data) >= end:
        return parse_header(data, source, size).metadata, end
    text = data[8:end].decode("utf-8", "ignore")
    opening = _OPENING.match(text)
    try:
        return (None if opening is None else _metadata_at(text, opening.end(), source)[0]), end
    except json.JSONDecodeError:  # it ends later
        return None, end


def parse_header(data: bytes, source: str, size: int | None = None) -> Header:
    """Read a whole header from the first bytes of a file.

    Raises:
        FormatError: as `metadata_of_prefix`; also if the bytes end before the header does, or a tensor has no shape.
    """
    end = 8 + _PREFIX.unpack_from(data)[0] if len(data) >= 8 else 8
    if len(data) < end:
        metadata_of_prefix(data, source, size)
        raise FormatError(f"{source} is cut short: its header needs {end:,} bytes, and it has {len(data):,}.")
    try:
        text = data[8:end].decode()
        metadata: Any = {}
        if opening := _OPENING.match(text):
            metadata, position = _metadata_at(text, opening.end(), source)
            rest = text[position:].lstrip()
            text = "{" + rest.removeprefix(",") if rest.startswith((",", "}")) else rest
    except UnicodeDecodeError as error:
        raise FormatError(f"The header of {source} is not text ({error.reason}).") from error
    except json.JSONDecodeError as error:
        raise FormatError(f"The header of {source} is not valid JSON ({error.msg}).") from error
    entries = loads(text, f"the header of {source}")
    if not isinstance(entries, dict):
        raise FormatError(f"The header of {source} is not a JSON object.")
    if _METADATA in entries:
        if opening:
            raise FormatError(f"The header of {source} has the key {_METADATA!r} twice.")
        metadata = _checked(entries.pop(_METADATA), source)
    for name, entry in entries.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        is_shape = isinstance(shape, list) and all(type(n) is int for n in shape)
        if not is_shape or not isinstance(entry.get("dtype"), str):
            raise FormatError(f"The header of {source} gives no dtype and shape of {name[:80]!r}. Get the file again.")
    return Header(end, metadata, entries)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the metadata of a safetensors file, and no tensor.

    Raises:
        BlueprintError: if the file does not exist or cannot be read.
        FormatError: as `metadata_of_prefix`.

    Example:
        >>> import tempfile
        >>> from safetensors.numpy import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({}, f"{folder}/m.safetensors", {"format": "pt"})
        ...     read_metadata(f"{folder}/m.safetensors")
        {'format': 'pt'}
    """
    with _opened(Path(path)) as file:
        size = os.fstat(file.fileno()).st_size
        metadata, needed = None, FIRST_READ
        data = b""
        while metadata is None:
            data += _read(file, min(needed, size) - len(data))
            metadata, needed = metadata_of_prefix(data, str(path), size)
        return metadata


def read_header(path: str | Path) -> Header:
    """Read the whole header of a safetensors file, with the tensors' names and shapes.

    Raises:
        BlueprintError: if the file does not exist or cannot be read.
        FormatError: as `parse_header`.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from safetensors.numpy import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"w": np.zeros((2, 3))}, f"{folder}/m.safetensors")
        ...     read_header(f"{folder}/m.safetensors").tensors
        {'w': ('F64', (2, 3))}
    """
    with _opened(Path(path)) as file:
        return _header_of(file, str(path))


def header_bytes(metadata: Mapping[str, str], entries: Mapping[str, Any], source: str) -> bytes:
    """Write the bytes before the tensors' own: eight of the length, then JSON with the metadata first, padded.

    Raises:
        BlueprintError: if it would pass `HEADER_LIMIT`.
    """
    content = {_METADATA: metadata, **entries} if metadata else entries
    encoded = json.dumps(content, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > HEADER_LIMIT:
        raise BlueprintError(
            f"The header of {source} would have {len(encoded):,} bytes, and the Hub's client reads at most "
            f"{HEADER_LIMIT:,}. Publish the blueprint beside the model."
        )
    return _PREFIX.pack(len(encoded)) + encoded


def replace_metadata(path: str | Path, changes: Mapping[str, str | None], progress: bool = True) -> bool:
    """Set or remove (None) keys of a safetensors file's metadata; its other keys and its tensors stay.

    The file is written anew beside itself, then moved into its place: killed at any moment, it is the old or the new
    one. A file that another program replaces or changes meanwhile is left alone.

    Args:
        path: of the file, no symbolic link.
        changes: new values by key; they come first in the header.
        progress: whether to show a bar.

    Returns:
        Whether the file changed.

    Raises:
        BlueprintError: if it cannot be read or written, another process writes it or replaced it meanwhile, it cannot
            keep its owner, the disk has no room for it twice, or its header would pass `HEADER_LIMIT`; it is unchanged
            then.
        FormatError: as `read_header`.

    Example:
        >>> import tempfile
        >>> from safetensors.numpy import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({}, f"{folder}/m.safetensors", {"format": "pt", "old": "1"})
        ...     changed = replace_metadata(f"{folder}/m.safetensors", {"old": None, "new": "2"}, progress=False)
        ...     changed, sorted(read_metadata(f"{folder}/m.safetensors").items())
        (True, [('format', 'pt'), ('new', '2')])
    """
    path = Path(path)
    with _opened(path) as file:
        _lock(file, path)
        status = os.fstat(file.fileno())
        header = _header_of(file, str(path))
        remove_leftovers(path)
        if all(header.metadata.get(key) == value for key, value in changes.items()):
            return False
        metadata = {
            key: value for key, value in {**changes, **header.metadata, **changes}.items() if value is not None
        }
        if metadata:
            metadata.setdefault("format", "pt")  # transformers before version 5 refuses other metadata without it
        _rewrite(file, status, path, header.size, header_bytes(metadata, header.entries, str(path)), progress)
    return True


def _metadata_at(text: str, position: int, source: str) -> tuple[dict[str, str], int]:
    """Return the metadata that begins at `position` and where it ends."""
    quotes = text.count('"', position) - text.count('\\"', position)
    if quotes > _MAX_QUOTES:  # counted first, since as many strings would take much memory
        raise FormatError(f"The header of {source} has {quotes:,} quotes; at most {_MAX_QUOTES:,} are read.")
    try:
        metadata, end = _DECODER.raw_decode(text, position)
    except RecursionError:
        raise FormatError(f"The metadata of {source} is nested; safetensors allows only text.") from None
    except FormatError as error:
        raise FormatError(f"The metadata of {source}: {error}") from error
    return _checked(metadata, source), end


def _checked(metadata: Any, source: str) -> dict[str, str]:
    if metadata is None:  # null, which safetensors takes for no metadata
        return {}
    if not isinstance(metadata, dict):
        raise FormatError(f"The metadata of {source} must be an object.")
    if len(metadata) > _MAX_KEYS:
        raise FormatError(f"The metadata of {source} has {len(metadata):,} keys; at most {_MAX_KEYS:,} are read.")
    wrong = next((key for key, value in metadata.items() if not isinstance(value, str)), None)
    if wrong is not None:
        raise FormatError(f"The metadata of {source} must hold text alone, and {wrong[:80]!r} does not.")
    return metadata


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise FormatError(f"{path} is a device or a pipe, not a file. Copy its content into a file first.")
        file = open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise BlueprintError(f"The file {path} does not exist. Check the path.") from None
    except OSError as error:
        raise BlueprintError(f"{path} cannot be read: {error.strerror}.") from error
    with file:
        yield file


def _read(file: FileIO, count: int) -> bytes:
    """Read the next `count` bytes, fewer at the file's end."""
    data = b""
    while len(data) < count and (more := file.read(count - len(data))):
        data += more
    return data


def _header_of(file: FileIO, source: str) -> Header:
    size = os.fstat(file.fileno()).st_size
    data = _read(file, 8)
    _, end = metadata_of_prefix(data, source, size)
    return parse_header(data + _read(file, end - 8), source, size)


def _lock(file: FileIO, path: Path) -> None:
    """Keep other processes from taking this lock on the file until it is closed."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlueprintError(f"{path} is being written by another process. Try again when it is done.") from error
    except OSError:  # a file system without locks
        return
    if os.fstat(file.fileno()).st_ino != path.stat().st_ino:
        raise BlueprintError(f"{path} was replaced by another process just now. Try again.")


def _rewrite(file: FileIO, status: os.stat_result, path: Path, skipped: int, head: bytes, progress: bool) -> None:
    """Write `head` and all but the first `skipped` bytes of `file` anew, in place of `path` if that is still `file`."""
    size = len(head) + status.st_size - skipped
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise BlueprintError(
            f"{path} is written anew beside itself, which takes {size:,} bytes; its disk has {free:,} free. "
            "Make room first."
        )
    with replacing(path, status) as target:
        target.write(head)
        file.seek(skipped)
        with progress_bar(show=progress, total=size - len(head), desc=f"Rewriting {path.name}", unit="B") as bar:
            while chunk := file.read(_CHUNK):
                target.write(chunk)
                bar.update(len(chunk))
        target.flush()
        if target.tell() != size:
            raise OSError("it changed its length while it was copied")
        os.fsync(target.fileno())
