"""Read untrusted JSON and CSV within limits on size, depth and numbers.

The text's commas, colons and brackets are counted before it is parsed, so that a hostile file costs little.
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

_MAX_DIGITS = 308  # of a whole number that a double holds
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which no file can hold


def read_text(path: str | Path, limit: int = MAX_BYTES, what: str = "blueprint") -> str:
    """Return the text of a UTF-8 file of at most `limit` bytes without its byte order mark.

    With characters beyond ASCII, which take up to four times the memory, the limit is a quarter. Errors call it `what`.

    Raises:
        BlueprintError: if the file does not exist or cannot be read.
        FormatError: if it is too large, a device or a pipe, or no text.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        ...     file.write("{}") and file.flush()
        ...     read_text(file.name)
        '{}'
    """
    path = Path(path)
    try:
        content = _read_bytes(path, limit, what)
        if len(content) > limit // 4 and not content.isascii():
            raise FormatError(
                f"{path} has {len(content):,} bytes with characters beyond ASCII among them, of which at most "
                f"{limit // 4:,} are read. Write them as \\u escapes, as json.dumps does."
            )
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise BlueprintError(f"No blueprint found at {path}. Measure one with `peft-blueprint generate`.") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not text ({error.reason} at byte {error.start}). Give a {what}.") from None
    except OSError as error:
        raise BlueprintError(f"{path} cannot be read: {error.strerror}.") from error
    except BlueprintError:
        raise
    except ValueError as error:  # a zero character in it
        raise BlueprintError(f"{str(path)!r} is not a path: {error}. Check the name.") from error


def loads(text: str, source: str = "the text") -> Any:
    """Parse JSON, refusing NaN, numbers beyond a double's range, a key twice in one object, and texts beyond the limits.

    Raises:
        FormatError: if it is not such JSON; names `source`.

    Example:
        >>> loads('{"gradient_norm": 1.5}')
        {'gradient_norm': 1.5}
    """
    try:
        return _parse(text)
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{source} is not valid JSON ({error.msg}, line {error.lineno} of {text.count(chr(10)) + 1}): "
            "it may be cut short or not a blueprint at all."
        ) from error
    except RecursionError:
        raise FormatError(f"{source} is nested too deeply to be a blueprint.") from None
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from error


def csv_rows(text: str) -> Iterator[dict[str | None, Any]]:
    """Yield the rows of a CSV, as `csv.DictReader` does.

    Raises:
        FormatError: if it is not a CSV, names a column twice, or passes a limit; possibly between two rows.
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
            raise FormatError(f"the column {_quoted(twice)} appears twice; keep one.")
        yield from reader
    except csv.Error as error:
        raise FormatError(f"this is not valid CSV: {error}, line {reader.line_num}.") from error


def _read_bytes(path: Path, limit: int, what: str) -> bytes:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise FormatError(f"{path} is a device or a pipe, not a file. Copy what it gives into a file first.")
    with path.open("rb") as file:
        content = file.read(limit + 1) if found.st_size <= limit else b""  # it may grow while it is read
    size = max(found.st_size, len(content))
    if size > limit:
        raise FormatError(
            f"{path} has {size:,} bytes{' or more' if content else ''}; at most {limit:,} are read. It is larger than "
            f"any {what} should be. Check what it is."
        )
    return content


def _parse(text: str) -> Any:
    _refuse_beyond(len(text), MAX_BYTES, "characters")
    if len(text) > MAX_DEPTH:  # most cells of a CSV are shorter
        _refuse_beyond(text.count(","), MAX_COMMAS, "commas")
        _refuse_beyond(text.count(":"), MAX_COLONS, "colons")
        _refuse_beyond(text.count("[") + text.count("{"), MAX_OPENINGS, "lists and objects")
    value = _DECODER.decode(text)
    _check_values(value, text)
    return value


def _refuse_beyond(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise FormatError(f"it has {count:,} {what}, and at most {limit:,} are read. Check what it is.")


def _check_values(value: Any, text: str) -> None:
    """Raise FormatError for numbers and strings beyond bounds, RecursionError for too deep nesting.

    Goes level by level with each level's values in one list, which takes no Python step per value.
    """
    may_be_halved = not text.isascii() or "\\ud" in text or "\\uD" in text
    containers: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        values = list(chain.from_iterable(c.values() if type(c) is dict else c for c in containers))
        if math.inf in values or -math.inf in values:
            _refuse_number("a number beyond a double's range")
        if len(text) > MAX_STRING or may_be_halved:
            strings = [v for v in values if type(v) is str]
            strings.extend(chain.from_iterable(c for c in containers if type(c) is dict))
            _refuse_beyond(max(map(len, strings), default=0), MAX_STRING, "characters in one string")
            half = next(filter(_SURROGATE.search, strings), None) if may_be_halved else None
            if half is not None:
                raise FormatError(f"the text {_quoted(half)} holds half a character, which cannot be written.")
        containers = [v for v in values if type(v) is dict or type(v) is list]
        if not containers:
            return
    raise RecursionError


def _refuse_number(digits: str) -> Any:
    raise FormatError(f"it holds {digits}; numbers must be finite. Measure the blueprint again.")


def _whole_number(digits: str) -> int:
    if len(digits.lstrip("-")) > _MAX_DIGITS:  # before Python converts them, which takes the square of their number
        _refuse_number(f"{digits[:20]}…")
    return int(digits)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object for `json.JSONDecoder(object_pairs_hook=…)`; raise FormatError if a key appears twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = _twice(key for key, _ in pairs)
        raise FormatError(f"the key {_quoted(str(twice))} appears twice in one object.")
    return result


def _quoted(text: str) -> str:
    """Return the beginning of a text, printable in an error."""
    return repr(text[:60].encode("utf-8", "replace").decode())


def _twice(names: Iterable[str]) -> str | None:
    """Return the first name that occurs more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=_refuse_number, parse_int=_whole_number)
