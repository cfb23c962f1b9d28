"""Short texts for messages: names, shapes and causes, without control characters; tables for notebooks."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import BlueprintError


def shape_str(shape: Sequence[int]) -> str:
    """Format a shape, `(576, 1536)`, as `576x1536`."""
    return "x".join(map(str, shape))


def format_names(names: Sequence[str], limit: int = 4) -> str:
    """Format the first few of a list of names for an error message."""
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def is_inside(name: str, module: str) -> bool:
    """Return whether `name` is the module of that name, or a submodule or parameter in it.

    Example:
        >>> [is_inside(name, "experts.1") for name in ("experts.1", "experts.1.up_proj", "experts.10.up_proj")]
        [True, True, False]
    """
    return name == module or name.startswith(f"{module}.")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message without its full stop, or else its class.

    The next line too after a colon.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")


def find_unprintable(text: str) -> str | None:
    """Return the first character that a terminal would obey or not show, such as an escape or a change of direction."""
    if text.isprintable():
        return None
    return next((c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")), None)


def printable(text: str) -> str:
    r"""Return a text for the terminal, with escapes in place of characters that it would obey; line ends stay.

    Example:
        >>> printable("a\x1b[2Jb")
        'a\\x1b[2Jb'
    """
    if find_unprintable(text) is None:
        return text
    return "".join(c if c == "\n" or find_unprintable(c) is None else ascii(c)[1:-1] for c in text)


def shortened(value: object, limit: int = 60) -> str:
    r"""Return a value's text for one line of a message: printable, and at most `limit` characters of it.

    Example:
        >>> shortened("a\nb" + "c" * 99, 6)
        'a\\nbc…'
    """
    text = printable(str(value)).replace("\n", r"\n")
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def html_table(title: str, rows: Sequence[Mapping[str, Any]], limit: int = 20) -> str:
    """Return rows as an HTML table for a notebook, with a count of those left out.

    Example:
        >>> html_table("2 rows", [{"id": "a<b", "norm": 0.51234}, {"id": "c"}], limit=1)
        '<p>2 rows</p><table><tr><th>id</th><th>norm</th></tr><tr><td>a&lt;b</td><td>0.5123</td></tr></table><p>1 more</p>'
    """
    columns = list(dict.fromkeys(key for row in rows[:limit] for key in row))
    cells = [[row.get(key) for key in columns] for row in rows[:limit]]
    shown = [
        [f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell) for cell in row]
        for row in cells
    ]
    lines = [("th", columns), *(("td", row) for row in shown)]
    body = "".join(
        "<tr>" + "".join(f"<{tag}>{html.escape(printable(text))}</{tag}>" for text in row) + "</tr>"
        for tag, row in lines
    )
    more = f"<p>{len(rows) - limit} more</p>" if len(rows) > limit else ""
    return f"<p>{html.escape(printable(title))}</p><table>{body}</table>{more}"


def data_frame(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Return rows as a `pandas.DataFrame`.

    Raises:
        BlueprintError: without pandas.
    """
    try:
        import pandas
    except ImportError as error:
        raise BlueprintError("Data frames need pandas: pip install 'peft-blueprint[data]'.") from error
    return pandas.DataFrame(list(rows))
