"""Room for two texts in a file's header, so that a new one takes the old one's place by four bytes.

Knows where the two stand and what may be written when; nothing of tensors or blueprints.

The header's metadata begins with the keys `blueprint.json`, whose text counts, and `blueprint.room`, in either order,
their texts padded with spaces to one size. An update writes into the room and then swaps the two names. A write to a
file may be cut off between two pages by `kill -9`, and within none. Hence

- a text is written page by page, and holds no escape sequence across the border of two: whatever pages have come,
  what stands there is a JSON string;
- each name's last four letters lie in one page, and are renamed one after the other. In between `blueprint.json` stands
  twice, and readers of JSON (Python's, JavaScript's, Rust's serde into a map, as safetensors uses) take the last.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, replace
from io import FileIO


PAGE = 4096  # bytes; the smallest in use, and a divisor of the others
JSON_KEY = "blueprint.json"
ROOM_KEY = "blueprint.room"

_SECTOR = 512  # bytes; what a disk writes whole
_CLEAN = re.compile(
    rb'[ !#-\[\]-~]*+(?:\\["\\][ !#-\[\]-~]*+)*+'
)  # printable ASCII, a quote or backslash only as a whole escape
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[^"]+')
_STRING = rb'"([^"\\]*+(?:\\.[^"\\]*+)*+)"'
_KEY = rb'\s*"blueprint\.(json|room)"\s*:\s*'
_FIRST = re.compile(rb'\{\s*"__metadata__"\s*:\s*\{\s*"blueprint\.json"\s*:\s*' + _STRING)
_LAYOUT = re.compile(rb'\{\s*"__metadata__"\s*:\s*\{' + _KEY + _STRING + rb"\s*," + _KEY + _STRING + rb"\s*[,}]")


@dataclass(frozen=True)
class Slots:
    """Where two texts stand in a file, in bytes from its beginning.

    Args:
        names: of the four letters in each key that say which it is, `json` or `room`.
        texts: of the first byte of each text.
        size: of either text, in bytes.
        current: 0 or 1, which of them counts.
        is_renamed: whether the other is called `json` already, as an interrupted update leaves it.
    """

    names: tuple[int, int]
    texts: tuple[int, int]
    size: int
    current: int
    is_renamed: bool


def find_slots(head: bytes) -> Slots | None:
    """The two texts in the first bytes of a safetensors file; None where they do not stand as `lay_out` puts them."""
    found = _LAYOUT.match(head, 8)
    if found is None:
        return None
    kinds = (found[1], found[3])
    names = (found.start(1), found.start(3))
    size = len(found[2])
    if len(found[4]) != size or b"json" not in kinds or any(_straddles(name, 4, PAGE) for name in names):
        return None
    current = 1 if kinds[1] == b"json" else 0
    return Slots(names, (found.start(2), found.start(4)), size, current, is_renamed=kinds[0] == kinds[1])


def with_spare(size: int) -> int:
    """Bytes for a text of `size` wherever it stands: `fit` may put a few spaces into every page."""
    return size + 8 * (size // PAGE + 2)


def lay_out(text: str, size: int, start: int) -> bytes:
    """The two keys and texts as JSON without braces, `text` the current one, to be written at byte `start`.

    Args:
        text: JSON.
        size: bytes for each text; more if `text` needs more.
        start: below 400, so that the first key lies in one page.
    """
    before = f'"{JSON_KEY}":"'.encode()
    body = fit(text, start + len(before))
    if body is None:
        body = escaped(text)
    size = max(size, len(body))
    head = before + body.ljust(size) + b'",'
    while _straddles(start + len(head) + len(ROOM_KEY) - 3, 4, _SECTOR):  # a quote, then all but four letters
        head += b" "
    return head + f'"{ROOM_KEY}":"'.encode() + b" " * size + b'"'


def escaped(text: str) -> bytes:
    """A text as it stands between the quotes of a JSON string, in ASCII."""
    return json.dumps(text)[1:-1].encode()


def fit(text: str, offset: int) -> bytes | None:
    """JSON as it stands between quotes at byte `offset` of a file, with no escape across the border of two pages.

    Where one would be, spaces are put before the token of the inner JSON, whose meaning they do not change.

    Returns:
        None if that is not possible: characters beyond printable ASCII, or strings full of escapes.
    """
    if not (text.isascii() and text.isprintable()):
        return None
    tokens = _TOKEN.findall(text)
    if sum(map(len, tokens)) != len(text):  # an odd quote: no JSON
        return None
    pieces, position = [], offset
    for token in tokens:
        piece = token.replace("\\", "\\\\").replace('"', '\\"').encode()
        if _straddles(position, len(piece), PAGE):
            gap = next((gap for gap in range(8) if is_clean(piece, position + gap)), None)
            if gap is None:
                return None
            piece = b" " * gap + piece
        pieces.append(piece)
        position += len(piece)
    return b"".join(pieces)


def is_clean(body: bytes, offset: int) -> bool:
    """Whether every page's part of a text that begins at byte `offset` is a piece of a JSON string by itself."""
    return all(_CLEAN.fullmatch(part) for _, part in _pages(body, offset))


def update(file: FileIO, slots: Slots, text: str) -> bool:
    """Make `text` the current one, in place; a process killed at any moment leaves the old one or the new one.

    So does a power failure, since the disk holds each step before the next begins. In the end it stands in the first
    place, where whoever reads a file's first bytes alone finds it; from there it is brought into the second and back.

    Args:
        file: opened for reading and writing without a buffer.
        slots: what `find_slots` found in it.
        text: JSON.

    Returns:
        False, with nothing written, if it does not fit, or the room holds what cannot be overwritten safely.

    Raises:
        OSError: if the disk does not take it; the old text counts until the names are swapped.
    """
    if not _into_room(file, slots, text):
        return False
    if slots.current == 0:
        _into_room(file, replace(slots, current=1, is_renamed=False), text)
    return True


def first_text(head: bytes) -> str | None:
    """The text in the first place, from a file's first bytes, though the second may lie beyond; None if it is not there.

    Of an update on its way it is the old one or the new one.
    """
    found = _FIRST.match(head, 8)
    return json.loads(b'"' + found[1] + b'"') if found else None


def _into_room(file: FileIO, slots: Slots, text: str) -> bool:
    """Write a text into the room and swap the names; False if it does not fit there."""
    room = 1 - slots.current
    start = slots.texts[room]
    body = fit(text, start)
    if body is None or len(body) > slots.size:
        return False
    file.seek(start)
    if not is_clean(file.read(slots.size) or b"", start):
        return False
    for position, part in _pages(body.ljust(slots.size), start):
        _write_at(file, position, part)
    # From the first to the second, the new name comes last and counts at once. Back, it comes first and counts when the
    # last is gone. Whether the disk has the last of these steps or not, a text counts.
    if room == 1:
        _sync(file)
    if not slots.is_renamed:
        _write_at(file, slots.names[room], b"json")
    _sync(file)
    _write_at(file, slots.names[slots.current], b"room")
    return True


def _write_at(file: FileIO, position: int, part: bytes) -> None:
    """Write a part of one page at `position`."""
    file.seek(position)
    written = file.write(part)
    if written != len(part):
        raise OSError(f"only {written} of {len(part)} bytes were written")


def _sync(file: FileIO) -> None:
    if sys.platform == "linux":
        os.fdatasync(file.fileno())
    else:
        os.fsync(file.fileno())


def _pages(body: bytes, offset: int) -> list[tuple[int, bytes]]:
    """(position, bytes) of every page's part of what begins at byte `offset`."""
    borders = [offset, *range(offset - offset % PAGE + PAGE, offset + len(body), PAGE), offset + len(body)]
    return [(a, body[a - offset : b - offset]) for a, b in zip(borders, borders[1:], strict=False) if a < b]


def _straddles(position: int, count: int, block: int) -> bool:
    return position // block != (position + count - 1) // block
