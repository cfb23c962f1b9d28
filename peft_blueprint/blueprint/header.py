"""The header of a safetensors file: its metadata read from the first bytes alone, and replaced, whatever the size.

Knows the bytes (eight of the header's length, JSON, tensors) and nothing of blueprints, but for the two keys whose texts
`slots` can swap in place. The standard library alone; what comes from strangers is read within limits.
"""

from __future__ import annotations

import json
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from ..errors import BlueprintError, FormatError
from .rewriting import lock, rewrite
from .slots import JSON_KEY, ROOM_KEY, Slots, escaped, find_slots, lay_out, update, with_spare
from .strict_json import loads


HEADER_LIMIT = 25_000_000  # bytes of JSON; the Hub's client refuses more
FIRST_READ = 100_000  # bytes, which the Hub's client asks for at first

_METADATA = "__metadata__"
_MOST_KEYS = 20_000  # in the metadata
_MOST_OBJECTS = 300_000  # in a header: a tensor has one
_PREFIX = struct.Struct("<Q")
_BLANK = re.compile(r"[ \t\n\r]*+")
_FLAT_ENTRY = re.compile(  # a name, its object if that holds no other, and a comma
    r'[ \t\n\r]*+"([^"\\]*+(?:\\.[^"\\]*+)*+)"[ \t\n\r]*+:[ \t\n\r]*+'
    r'(?:(\{[^{}"]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^{}"]*+)*+\})(?:[ \t\n\r]*+(,))?)?',
    re.DOTALL,
)
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Header:
    """A whole header.

    Args:
        size: bytes before the tensors' own: eight, the JSON and its padding.
        metadata: its `__metadata__`.
        tensors: dtype and shape of every tensor, by name, as `(dtype, shape)`.
        rest: the JSON text of the tensors, without braces.
        slots: where two texts stand that can be swapped in place.
    """

    size: int
    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    rest: str
    slots: Slots | None


class _Cut(Exception):
    """The text ends before what is read does."""


def metadata_of_prefix(data: bytes, source: str, size: int | None = None) -> tuple[dict[str, str] | None, int]:
    """The metadata of a safetensors file from its first bytes, without the tensors' names that follow.

    Args:
        data: from the beginning of the file.
        source: for messages.
        size: of the whole file in bytes, where known.

    Returns:
        The metadata, empty if there is none, and the bytes that the header takes; or None and how many of the file's
        first bytes are needed.

    Raises:
        FormatError: if it is not such a file: a length beyond the file or `HEADER_LIMIT`, no JSON, metadata that is not
            text by text, a key twice (but for `blueprint.json` between the two steps of an update, whose last text
            counts).
    """
    if len(data) < 8:
        if size is not None and size < 8:
            raise FormatError(f"{source} has {size} bytes, too few for a safetensors file. Get it again.")
        return None, 8
    (length,) = _PREFIX.unpack_from(data)
    end = 8 + length
    if length > HEADER_LIMIT:
        raise FormatError(
            f"{source} is no safetensors file, or no sound one: its header would have {length:,} bytes, and "
            f"{HEADER_LIMIT:,} is the most that is read."
        )
    if size is not None and end > size:
        raise FormatError(
            f"{source} is cut short or no safetensors file: its header would end at byte {end:,}, and it has {size:,}."
        )
    is_whole = len(data) >= end
    try:
        text = data[8:end].decode("utf-8", "strict" if is_whole else "ignore")
        _, pairs, _ = _find_metadata(text, source)
    except UnicodeDecodeError as error:
        raise FormatError(f"The header of {source} is not text ({error.reason}).") from error
    except (_Cut, json.JSONDecodeError) as error:
        if not is_whole:
            return None, end
        raise FormatError(f"The header of {source} is not valid JSON: it is no sound safetensors file.") from error
    return _unique(pairs, source), end


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; reads no tensor.

    Raises:
        BlueprintError: if there is no such file, or it cannot be read.
        FormatError: as `metadata_of_prefix`.
    """
    with _reading(Path(path)) as file:
        size = os.fstat(file.fileno()).st_size
        data, needed = b"", FIRST_READ
        while True:
            data += _read(file, min(needed, size) - len(data))
            metadata, needed = metadata_of_prefix(data, str(path), size)
            if metadata is not None:
                return metadata


def read_header(path: str | Path) -> Header:
    """The whole header of a safetensors file, the tensors' names and shapes with it.

    Raises:
        BlueprintError: if there is no such file, or it cannot be read.
        FormatError: as `metadata_of_prefix`, or if a tensor is listed twice or without a shape.
    """
    with _reading(Path(path)) as file:
        return _header_of(file, str(path))


def parse_header(data: bytes, source: str, size: int | None = None) -> Header:
    """As `read_header`, from the first bytes of a file, which must hold it whole."""
    metadata, end = metadata_of_prefix(data, source, size)
    if metadata is None or len(data) < end:
        raise FormatError(f"{source} is cut short: its header needs {end:,} bytes, and it has {len(data):,}.")
    try:
        text = data[8:end].decode()
        start, _, stop = _find_metadata(text, source)
    except UnicodeDecodeError as error:
        raise FormatError(f"The header of {source} is not text ({error.reason}).") from error
    without = text[:start] + ("{}" if start < stop else "") + text[stop:]
    if without.count("{") > _MOST_OBJECTS:
        raise FormatError(f"The header of {source} lists more than {_MOST_OBJECTS:,} tensors.")
    entries = loads(without, f"the header of {source}")
    entries.pop(_METADATA, None)
    rest = json.dumps(entries, separators=(",", ":"))[1:-1]
    tensors = {name: _tensor(name, entry, source) for name, entry in entries.items()}
    return Header(end, metadata, tensors, rest, find_slots(data[:end]))


def replace_metadata(
    path: str | Path, changes: Mapping[str, str | None], reserve: int = 0, progress: bool = True
) -> bool:
    """Set, change or remove (None) keys of a safetensors file's metadata; its other keys and its tensors stay.

    Where room was reserved and the new `blueprint.json` fits, and nothing else changes, the file is updated in place, in
    milliseconds. Otherwise it is written anew beside itself, with the same room, and moved into its place. Killed at any
    moment, the file is the old or the new one; what a killed run left beside it is removed by the next.

    Args:
        path: of the file, no symbolic link.
        changes: new values by key. `blueprint.json` must be JSON for an update in place: spaces are put between its
            tokens.
        reserve: size in bytes of the largest `blueprint.json` to come, as it stands in the header (with `\\"` for every
            quote). The file grows by twice that.
        progress: whether to show a bar while the file is written anew.

    Returns:
        Whether it was updated in place.

    Raises:
        BlueprintError: if it cannot be read or written, another process writes it, the disk has no room for it twice, or
            its header would pass `HEADER_LIMIT`; it is unchanged then.
        FormatError: as `read_header`.
    """
    path = Path(path)
    with _reading(path) as file:
        lock(file, path)
        header = _header_of(file, str(path))
        part = path.with_name(f".{path.name}.part")
        try:
            part.unlink(missing_ok=True)  # an earlier run's, killed: none other has the lock
            has_room = not reserve or header.slots is not None and with_spare(reserve) <= header.slots.size
            if has_room and all(header.metadata.get(key) == value for key, value in changes.items()):
                return True
            if has_room and _update_in_place(path, header, changes):
                return True
            head = _new_head(header, changes, reserve, str(path))
            rewrite(file, part, path, header.size, head, progress)
        except OSError as error:
            raise BlueprintError(
                f"{path} cannot be written: {error.strerror or error}. Its tensors are unchanged; make it and its folder writable, "
                "or copy it elsewhere."
            ) from error
    return False


def with_metadata(data: bytes, changes: Mapping[str, str | None], source: str) -> bytes:
    """As `replace_metadata`, of a whole file in memory.

    Raises:
        BlueprintError: if the header would pass `HEADER_LIMIT`.
        FormatError: as `read_header`.
    """
    header = parse_header(data, source, len(data))
    return _new_head(header, changes, 0, source) + data[header.size :]


# ------------------------------------------------------------------------------------------ parsing


def _find_metadata(text: str, source: str) -> tuple[int, list[tuple[str, str]], int]:
    """(start, pairs, end) of the `__metadata__` object in a header's text; an empty range if there is none."""
    if text[:1] != "{":
        raise _Cut if not text else FormatError(f"The header of {source} is no JSON object.")
    position = 1
    if _peek(text, position) == "}":
        return len(text), [], len(text)
    for _ in range(_MOST_OBJECTS):
        entry = _FLAT_ENTRY.match(text, position)
        if entry is None:
            raise _Cut
        if entry[1] == _METADATA:
            start = _skip(text, entry.end(1) + 1)
            start = _skip(text, _expect(text, start, ":", source))
            pairs, end = _texts(text, start, source)
            return start, pairs, end
        position = entry.end()
        if entry[3]:
            continue
        if entry[2] is None:
            if _peek(text, position) == "{":
                raise _Cut  # the object does not end, or holds another
            raise FormatError(
                f"The header of {source} says of {entry[1][:80]!r} no object; no sound safetensors file."
            )
        if _peek(text, position) == "}":
            return len(text), [], len(text)
        _expect(text, position, ",", source)
    raise FormatError(f"The header of {source} lists more than {_MOST_OBJECTS:,} tensors.")


def _texts(text: str, position: int, source: str) -> tuple[list[tuple[str, str]], int]:
    """The pairs of an object of texts that begins at `position`, and where it ends."""
    position = _expect(text, position, "{", source)
    pairs: list[tuple[str, str]] = []
    if _peek(text, position) == "}":
        return pairs, _skip(text, position) + 1
    while len(pairs) < _MOST_KEYS:
        key, position = _text(text, position, "a key", source)
        value, position = _text(text, _expect(text, position, ":", source), repr(key[:80]), source)
        pairs.append((key, value))
        if _peek(text, position) == "}":
            return pairs, _skip(text, position) + 1
        position = _expect(text, position, ",", source)
    raise FormatError(f"The metadata of {source} has more than {_MOST_KEYS:,} keys.")


def _text(text: str, position: int, what: str, source: str) -> tuple[str, int]:
    position = _skip(text, position)
    if _peek(text, position) != '"':
        raise FormatError(
            f"The metadata of {source} has something other than text for {what}; safetensors allows only text."
        )
    value, end = _DECODER.raw_decode(text, position)
    return value, end


def _expect(text: str, position: int, character: str, source: str) -> int:
    found = _peek(text, position)
    if found != character:
        raise FormatError(f"The header of {source} is not valid JSON: {found!r} stands where {character!r} should.")
    return _skip(text, position) + 1


def _peek(text: str, position: int) -> str:
    position = _skip(text, position)
    if position >= len(text):
        raise _Cut
    return text[position]


def _skip(text: str, position: int) -> int:
    blank = _BLANK.match(text, position)
    assert blank is not None
    return blank.end()


def _unique(pairs: list[tuple[str, str]], source: str) -> dict[str, str]:
    """The pairs as a dict, where only an update between its two steps may hold a key twice."""
    metadata = dict(pairs)
    keys = [key for key, _ in pairs]
    is_between = keys.count(JSON_KEY) == 2 and ROOM_KEY not in metadata
    if len(keys) - len(metadata) != is_between:
        seen: set[str] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise FormatError(f"The metadata of {source} has the key {twice[:80]!r} twice; one of them must go.")
    return metadata


def _tensor(name: str, entry: Any, source: str) -> tuple[str, tuple[int, ...]]:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if (
        not isinstance(shape, list)
        or not all(type(n) is int for n in shape)
        or not isinstance(entry.get("dtype"), str)
    ):
        raise FormatError(
            f"The header of {source} says no dtype and shape of {name[:80]!r}; no sound safetensors file."
        )
    return entry["dtype"], tuple(shape)


# ------------------------------------------------------------------------------------------ writing


def _update_in_place(path: Path, header: Header, changes: Mapping[str, str | None]) -> bool:
    text, slots = changes.get(JSON_KEY), header.slots
    others = {key: value for key, value in changes.items() if key != JSON_KEY}
    if slots is None or text is None:
        return False
    if any(header.metadata.get(key) != value for key, value in others.items()) or path.stat().st_nlink > 1:
        return False
    try:
        file = open(path, "r+b", buffering=0)
    except PermissionError:
        return False
    with file:
        return update(file, slots, text)


def _new_head(header: Header, changes: Mapping[str, str | None], reserve: int, source: str) -> bytes:
    """The bytes before the tensors': the metadata first, at its beginning the current text and the room."""
    metadata = {key: value for key, value in {**header.metadata, **changes}.items() if value is not None}
    text = metadata.pop(JSON_KEY, None)
    metadata.pop(ROOM_KEY, None)
    parts = []
    if text is not None:
        text = text.rstrip(" ")  # the padding, if it is the old one
        opening = f'{{"{_METADATA}":{{'
        old = 0 if header.slots is None else header.slots.size
        size = len(escaped(text))
        if reserve or old:
            size = max(old, with_spare(reserve), 0 if with_spare(size) <= old else with_spare(size))
            parts.append(lay_out(text, size, 8 + len(opening)).decode())
        else:
            parts.append(f'"{JSON_KEY}":"{escaped(text).decode()}"')
    if metadata:
        parts.append(json.dumps(metadata, separators=(",", ":"))[1:-1])
    objects = [f'"{_METADATA}":{{{",".join(parts)}}}'] if parts else []
    body = "{" + ",".join([*objects, *([header.rest] if header.rest else [])]) + "}"
    encoded = body.encode() + b" " * (-len(body) % 8)
    if len(encoded) > HEADER_LIMIT:
        raise BlueprintError(
            f"The header of {source} would have {len(encoded):,} bytes, and the Hub's client reads at most "
            f"{HEADER_LIMIT:,}. Reserve less, or publish the blueprint beside the model."
        )
    return _PREFIX.pack(len(encoded)) + encoded


@contextmanager
def _reading(path: Path) -> Iterator[FileIO]:
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise FormatError(f"{path} is a device or a pipe, not a file. Copy what it gives into a file first.")
        file = open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise BlueprintError(f"There is no file {path}. Check the path.") from None
    except OSError as error:
        raise BlueprintError(f"{path} cannot be read: {error.strerror}.") from error
    with file:
        yield file


def _read(file: FileIO, count: int) -> bytes:
    """The next `count` bytes, fewer at the file's end."""
    data = b""
    while len(data) < count and (more := file.read(count - len(data))):
        data += more
    return data


def _header_of(file: FileIO, source: str) -> Header:
    size = os.fstat(file.fileno()).st_size
    data = _read(file, 8)
    _, end = metadata_of_prefix(data, source, size)
    return parse_header(data + _read(file, end - 8), source, size)
