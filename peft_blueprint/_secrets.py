"""Mask tokens and passwords in messages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from urllib.parse import quote, unquote


_SECRETS = re.compile(
    r"(?<=://)[^/?#\s]*@|(?<=://)[^/?#\s:@]*:(?!\d+/)[^\s@]*@"  # user and password in an address, also unescaped
    r"|\b(?:hf|api_org)_\w+|(?<=Basic )[\w+/=]+|(?i:(?<=bearer )[^'\"]+|(?<=n: basic )[\w+/=]+|(?<=api-key: )[^\s'\"]+)"
    r"|(?i:(?<=[?&])[\w-]*(?:token|key|secret|password|signature|credential|auth)[\w-]*=[^&\s'\"#]+)"
)
_SECRET_NAMES = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)$")  # of environment variables
_ADDRESS_NAMES = re.compile(r"(?:ENDPOINT|PROXY|URL)$")  # that may hold a password
_SHORTEST_SECRET = 8  # characters of a variable that is not known to be a secret


def masked(text: str, secrets: Iterable[object] = ()) -> str:
    """Replace tokens and passwords in a text by `***`.

    Args:
        text: message that may quote a request, an address or a header.
        secrets: further tokens, beside those in environment variables, headers and addresses, and of the form `hf_…`.

    Example:
        >>> masked("https://me:secret@hub.example/org/model: Illegal header value b'Bearer my-token\\n'")
        "https://***@hub.example/org/model: Illegal header value b'Bearer ***'"
    """
    tokens = [*secrets, *_secrets_of_environment()]
    # a message may quote a part between line ends, or escapes of these
    parts = {part for token in tokens if isinstance(token, str) for part in (token, *token.split()) if len(part) > 3}
    for part in sorted(parts, key=len, reverse=True):
        for form in (part, repr(part)[1:-1], quote(part, safe="")):
            text = text.replace(form, "***")
    return _SECRETS.sub(lambda found: "***@" if found[0].endswith("@") else "***", text)


def _secrets_of_environment() -> list[str]:
    found = []
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name.upper()) and (name.startswith("HF_") or len(value) >= _SHORTEST_SECRET):
            found.append(value)
        elif _ADDRESS_NAMES.search(name.upper()) and (user := re.search(r"://[^/?#\s:@]*:(.*)@", value)):
            found += [user[1], unquote(user[1])]
    return found
