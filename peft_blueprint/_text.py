"""Short texts for messages: names, shapes and causes, without secrets and control characters."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence


_SECRETS = re.compile(
    r"(?<=://)[^/?#\s'\"]*@"  # user and password in an address
    r"|\bhf_\w+|(?<=Bearer )[^'\"]+|(?<=Basic )[\w+/=]+"
)
_ENVIRONMENT = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")


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
    """Return the first line of an exception's message without its full stop, or else its class."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def masked(text: str, secrets: Iterable[object] = ()) -> str:
    """Replace tokens and passwords in a text by `***`.

    Args:
        text: message that may quote a request, an address or a header.
        secrets: further tokens, beside those of the environment, in headers, in addresses and of the form `hf_…`.

    Example:
        >>> masked("https://me:secret@hub.example/org/model: Illegal header value b'Bearer my-token\\n'")
        "https://***@hub.example/org/model: Illegal header value b'Bearer ***'"
    """
    tokens = [*secrets, *(os.environ.get(name) for name in _ENVIRONMENT)]
    # a message may quote a part between line ends, or escapes of these
    parts = {part for token in tokens if isinstance(token, str) for part in (token, *token.split()) if len(part) > 3}
    for part in sorted(parts, key=len, reverse=True):
        text = text.replace(part, "***").replace(repr(part)[1:-1], "***")
    return _SECRETS.sub(lambda found: "***@" if found[0].endswith("@") else "***", text)


def find_unprintable(text: str) -> str | None:
    """Return the first character that a terminal would obey or not show, such as an escape or a change of direction."""
    if text.isprintable():
        return None
    return next((c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")), None)


def printable(text: str) -> str:
    """Return a text for the terminal, with escapes in place of characters that it would obey; line ends stay.

    Example:
        >>> printable("a\x1b[2Jb")
        'a\\x1b[2Jb'
    """
    if find_unprintable(text) is None:
        return text
    return "".join(c if c == "\n" or find_unprintable(c) is None else ascii(c)[1:-1] for c in text)
