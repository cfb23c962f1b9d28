"""Short texts for error messages: names, shapes and causes."""

from __future__ import annotations

from collections.abc import Sequence


def shape_str(shape: Sequence[int]) -> str:
    """Format a shape, `(576, 1536)`, as `576x1536`."""
    return "x".join(map(str, shape))


def format_names(names: Sequence[str], limit: int = 4) -> str:
    """Format the first few of a list of names for an error message."""
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message without its full stop, or else its class."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
