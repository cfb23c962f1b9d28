"""Short texts for error messages: lists of names and shapes."""

from __future__ import annotations

from collections.abc import Sequence


def shape_str(shape: Sequence[int]) -> str:
    """Format a shape, `(576, 1536)`, as `576x1536`."""
    return "x".join(map(str, shape))


def format_names(names: Sequence[str], limit: int = 4) -> str:
    """Format the first few of a list of names for an error message."""
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
