"""Text from strangers: read, and parsed as JSON or CSV, within limits and without what it cannot mean.

What is there is counted before it is parsed, so that a file made to hurt costs little. Knows nothing of what a
blueprint holds; torch is not imported.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import BlueprintError, FormatError


# Room for 20,000 submodules with every statistic: 25 MB, 820,000 commas, 500,000 colons, 100,000 lists and objects.
MAX_BYTES = 32 * 2**20
MAX_COMMAS = 1_250_000
MAX_COLONS = 600_000
MAX_OPENINGS = 300_000  # lists and objects
MAX_DEPTH = 32  # of them in each other
MAX_STRING = 8 * 2**20  # characters; a blueprint may be a string in a model's index
MAX_COLUMNS = 200  # of a CSV
MAX_LINES = 100_001
MAX_CELLS = 4_000_000

_MAX_DIGITS = 308  # of a whole number that a double has room for
_HOPELESS = 4300  # digits beyond which Python reads no whole number
_PIECE = 2**20  # characters looked at together
_AS_ZEROS = bytes.maketrans(b"123456789E", b"000000000e")
# Without one of these, its digits as zeros and no plus in it, a text holds no number beyond a double's range.
_LARGE_EXPONENT = b"0e000"
_MANY_DIGITS = b"0" * 200  # enough with an exponent of two digits
_EXPONENT = re.compile(r"[eE]\+?\d{3,}")
_MANTISSA = 512  # characters: two runs of fewer digits than that, and a point
_LOOKED_AT = 10_000  # exponents
_LONG = re.compile(rf"-?\d{{{_MAX_DIGITS + 1}}}")
_NO_CHARACTER = re.compile("[\ud800-\udfff]")  # half of one, which no file can hold
_TOO_DEEP = "is nested too deeply to be a blueprint."


def read_text(path: str | Path, limit: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file of at most `limit` bytes; line ends stay as they are, a byte order mark goes.

    With characters beyond ASCII, which take up to four times the memory, it is a quarter of the limit.

    Raises:
        BlueprintError: if there is no such file, or it cannot be read.
        FormatError: if it is too large, a device or a pipe, or no text.
    """
    path = Path(path)
    try:
        content = _read_bytes(path, limit)
        if len(content) > limit // 4 and not content.isascii():
            raise FormatError(
                f"{path} has {len(content):,} bytes with characters beyond ASCII among them, of which at most "
                f"{limit // 4:,} are read. Write them as \\u escapes, as json.dumps does."
            )
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise BlueprintError(f"There is no blueprint at {path}. Make one with `peft-blueprint generate`.") from None
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path} is not text ({error.reason} at byte {error.start}), so it is no blueprint."
        ) from None
    except OSError as error:
        raise BlueprintError(f"{path} cannot be read: {error.strerror}.") from error
    except BlueprintError:
        raise
    except ValueError as error:  # a zero character in it
        raise BlueprintError(f"{str(path)!r} is no path: {error}. Check the name.") from error


def loads(text: str, source: str = "the text") -> Any:
    """Parse JSON, refusing NaN, numbers beyond a double's range, a key twice in one object, and what is too much.

    Raises:
        FormatError: if it is not such JSON; names `source`.
    """
    try:
        return _parse(text)
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{source} is not valid JSON ({error.msg}, line {error.lineno} of {text.count(chr(10)) + 1}): "
            "it may be cut short or not a blueprint at all."
        ) from error
    except RecursionError:
        raise FormatError(f"{source} {_TOO_DEEP}") from None
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from error


def csv_rows(text: str) -> Iterator[dict[str | None, Any]]:
    """The rows of a CSV one by one, as `csv.DictReader` gives them.

    Raises:
        FormatError: if it is no CSV, names a column twice, or is too much; some of it while the rows are taken.
    """
    _refuse_beyond(len(text), MAX_BYTES, "characters")
    _refuse_beyond(text.count(","), MAX_COMMAS, "commas")
    lines = max(text.count("\n"), text.count("\r"))
    _refuse_beyond(lines, MAX_LINES, "lines")
    csv.field_size_limit(max(csv.field_size_limit(), MAX_BYTES))  # one cell may pass the usual 131,072 characters
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns = reader.fieldnames or ()
        _refuse_beyond(len(columns), MAX_COLUMNS, "columns")
        _refuse_beyond(len(columns) * lines, MAX_CELLS, "cells")
        twice = _twice(column for column in columns if column)
        if twice is not None:
            raise FormatError(f"the column {_quoted(twice)} stands twice; keep one.")
        yield from reader
    except csv.Error as error:
        raise FormatError(f"this is no CSV: {error}, line {reader.line_num}.") from error


def _read_bytes(path: Path, limit: int) -> bytes:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise FormatError(f"{path} is a device or a pipe, not a file. Copy what it gives into a file first.")
    with path.open("rb") as file:
        content = file.read(limit + 1) if found.st_size <= limit else b""  # it may grow while it is read
    size = max(found.st_size, len(content))
    if size > limit:
        raise FormatError(
            f"{path} has {size:,} bytes{' or more' if content else ''}; at most {limit:,} are read. It is larger than "
            "any blueprint should be: check what it is."
        )
    return content


def _parse(text: str) -> Any:
    _refuse_beyond(len(text), MAX_BYTES, "characters")
    if len(text) <= _MAX_DIGITS:
        value = _DECODER.decode(text)
        if value is None or isinstance(value, int) or isinstance(value, float) and math.isfinite(value):
            return value  # most cells of a CSV
        has_large = True
    else:
        _refuse_beyond(text.count(","), MAX_COMMAS, "commas")
        _refuse_beyond(text.count(":"), MAX_COLONS, "colons")
        _refuse_beyond(text.count("[") + text.count("{"), MAX_OPENINGS, "lists and objects")
        has_large = _may_have_large_numbers(text)
        value = _DECODER.decode(text)
    _check_values(value, text, has_large)
    return value


def _refuse_beyond(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise FormatError(
            f"it has {count:,} {what}, and at most {limit:,} are read: more than any blueprint should have. Check what it "
            "is."
        )


def _may_have_large_numbers(text: str) -> bool:
    """Whether a number in it may be beyond a double's range, looked for without a step of Python for each.

    Raises:
        FormatError: for so many digits that only reading them would take long.
    """
    found = False
    for start in range(0, len(text), _PIECE):
        piece = text[start : start + _PIECE + _HOPELESS]
        digits = piece.encode("utf-8", "surrogatepass").translate(_AS_ZEROS, b"+")
        if not found and _LARGE_EXPONENT in digits:
            found = _infinite_number(piece) is not None
        found = found or _MANY_DIGITS in digits
        if b"0" * (_HOPELESS + 1) in digits:
            _refuse_number(_shown_number(piece))
    return found


def _check_values(value: Any, text: str, has_large: bool) -> None:
    """Raise FormatError for numbers and strings beyond bounds, RecursionError for what is nested too deeply.

    Goes level by level, each level's values in one list, and looks only for what there may be.
    """
    may_be_long = len(text) > MAX_STRING
    may_be_halved = not text.isascii() or "\\" in text and ("\\ud" in text or "\\uD" in text)
    containers: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        values = list(chain.from_iterable(c.values() if type(c) is dict else c for c in containers))
        if has_large and (math.inf in values or -math.inf in values or any(map(_is_too_long, values))):
            _refuse_number(_shown_number(text))
        if may_be_long or may_be_halved:
            strings = [v for v in values if type(v) is str]
            strings.extend(chain.from_iterable(c for c in containers if type(c) is dict))
            _refuse_beyond(max(map(len, strings), default=0), MAX_STRING, "characters in one string")
            half = next(filter(_NO_CHARACTER.search, strings), None) if may_be_halved else None
            if half is not None:
                raise FormatError(f"the text {_quoted(half)} holds half a character, which cannot be written.")
        containers = [v for v in values if type(v) is dict or type(v) is list]
        if not containers:
            return
    raise RecursionError


def _is_too_long(value: Any) -> bool:
    return type(value) is int and not -(10**_MAX_DIGITS) < value < 10**_MAX_DIGITS


def _shown_number(text: str) -> str:
    """The first number of a text that no double has room for, cut short; for an error."""
    if (number := _infinite_number(text)) is not None:
        return _cut(number)
    digits = _LONG.search(text)
    return _cut(digits[0]) if digits else "a number beyond a double's range"


def _infinite_number(text: str) -> str | None:
    """The first thing that reads as a number beyond a double's range; it may be part of a string.

    After many that are within it, the next one, whatever it is.
    """
    for count, found in enumerate(_EXPONENT.finditer(text)):
        head = text[max(0, found.start() - _MANTISSA) : found.start()]
        before = head.rstrip("0123456789.")
        mantissa = head[len(before) :]
        if before[-1:] not in "-,:[ \t\r\n" or not mantissa.strip(".") or mantissa.count(".") > 1:
            continue
        if count > _LOOKED_AT or math.isinf(float(mantissa + found[0])):
            return ("-" if before[-1:] == "-" else "") + mantissa + found[0]
    return None


def _cut(digits: str) -> str:
    return digits if len(digits) <= 20 else digits[:20] + "…"


def _refuse_number(digits: str) -> Any:
    raise FormatError(f"it holds {digits}, which is no measurement. Measure the blueprint again.")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = _twice(key for key, _ in pairs)
        raise FormatError(f"the key {_quoted(str(twice))} stands twice in one object.")
    return result


def _quoted(text: str) -> str:
    """The beginning of a text, for an error that can be printed."""
    return repr(text[:60].encode("utf-8", "replace").decode())


def _twice(names: Iterable[str]) -> str | None:
    """The first that is there more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_number)
