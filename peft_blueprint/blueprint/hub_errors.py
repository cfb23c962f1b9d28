"""Translate the Hub client's exceptions into errors that name the repository, the cause and a fix."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from .._secrets import masked
from ..errors import BlueprintError


CARD = "README.md"
LOG_IN = "Run `hf auth login` with a token that may write, or set HF_TOKEN."
# requests' errors are OSErrors; httpx's are of the class that the client's own errors come from
NETWORK_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
NO_JSON = (
    "The Hub's address answered with a page, not with {what}: a proxy or a login page may be in between. Log in there, or "
    "check HF_ENDPOINT."
)
_OF_ODD_ANSWERS = (LookupError, TypeError, AttributeError)  # the client trusts the form of an answer
_TRANSLATED: tuple[type[Exception], ...] = (
    *(*NETWORK_ERRORS, EntryNotFoundError, RuntimeError, ValueError),
    *_OF_ODD_ANSWERS,
)

_BY_CLASS: tuple[tuple[type[BaseException], str], ...] = (  # subclasses first
    (HFValidationError, "{repo!r} is not a repository id such as 'org/model'{here}. Check the name."),
    (
        UnicodeError,
        "The token or address for {repo!r} has characters that HTTP does not take. Copy it again, in ASCII.",
    ),
    (LocalTokenNotFoundError, f"No token found for {{repo!r}}. {LOG_IN}"),
    (GatedRepoError, "The repository {repo!r} needs permission: ask for it on its page, then run `hf auth login`."),
    (
        RevisionNotFoundError,
        "The repository {repo!r} has no revision {revision!r}. Check the name, or make the branch first.",
    ),
    (OfflineModeIsEnabled, "{repo!r} is out of reach: offline mode is on. Unset HF_HUB_OFFLINE."),
    (
        LocalEntryNotFoundError,
        "The blueprint of {repo!r} is not in the cache and the Hub cannot be reached. Go online once, or give a file.",
    ),
    (
        EntryNotFoundError,
        "The repository {repo!r} has no {file} and no blueprint in its model's header or index. Measure one with "
        "`peft-blueprint generate`.",
    ),
)
_BY_STATUS = {
    401: f"The Hub does not know your token, or it may not see {{repo!r}} (401). {{done}}{LOG_IN}",
    403: "You may not read {repo!r} (403: {said}). Ask its owner for access.",
    404: "The Hub has no repository {repo!r} that you may see (404){here}. {done}Check the name; if it is "
    "private, log in with a token that may use it: `hf auth login`.",
    409: "{repo!r} is taken or is being changed at this moment (409: {said}). {done}Try again; if it stays so, a "
    "repository of that name exists that you may not see: choose another name.",
    412: "Somebody committed to {repo!r} at this moment (412). {done}Publish again.",
    429: "The Hub limits requests about {repo!r} for now (429). {done}Try again {wait}.",
    500: "The Hub failed on a request about {repo!r} ({status}: {said}). Try again later.",
}
_OTHER_STATUS = "The Hub refused a request about {repo!r} ({status}: {said}). {done}Correct it and try again."
_MAY_NOT_WRITE = (
    "You may not write to {repo!r} (403: {said}). {done}Use a token that may write; offer it as a pull request with "
    "--create-pr (create_pr=True); or publish to a repository of your own."
)
_ODD_ANSWER = "The Hub's address answered about {repo!r} in an unknown form ({said}). {done}Check HF_ENDPOINT."
_OTHER = "The client of the Hub failed on {repo!r} ({said}). {done}Check the token and the address."
_NO_CONNECTION = "The connection to the Hub failed on {repo!r} ({said}). {done}Try again later."
_CUT_CONNECTION = (
    "The connection to the Hub failed on {repo!r} ({said}). Whether the commit was made is not known. Publish again: "
    "files that arrived are not sent twice. (A pull request would be: look on the repository's page first.)"
)
_BAD_CARD = (
    "The Hub does not take the card of {repo!r}: {said}. Nothing was published. Correct the card's front matter, or the "
    "data sets given."
)


def require_token(repo_id: str, token: str | bool | None) -> None:
    """Raise BlueprintError unless requests would carry a token.

    Args:
        repo_id: repository named in the message.
        token: as for `huggingface_hub`: a token, True or None for the saved one, False for none.

    Example:
        >>> require_token("org/model", "hf_example")
    """
    try:
        headers = build_hf_headers(token=token)
    except LocalTokenNotFoundError:
        headers = {}
    if "authorization" not in headers:
        raise BlueprintError(f"Nothing can be published to {repo_id!r} without a token. {LOG_IN}")


@contextmanager
def translated_hub_errors(
    repo_id: str,
    *,
    revision: str | None = None,
    file: str | None = None,
    sending: bool = False,
    token: str | bool | None = None,
) -> Iterator[None]:
    """Raise exceptions of `huggingface_hub` in the `with` block as BlueprintError.

    Args:
        repo_id: repository named in error messages.
        revision: branch, tag or commit named in error messages.
        file: blueprint file that is read, which works offline from the cache; None for publishing, which does not.
        sending: whether the requests write, so that a broken connection leaves open what arrived.
        token: given to the client, masked in messages as all tokens and passwords are.

    Raises:
        BlueprintError: for an exception of the client or of the network; its cause is the original, unless that quotes
            a secret.

    Example:
        >>> from huggingface_hub.errors import OfflineModeIsEnabled
        >>> with translated_hub_errors("org/model", file="blueprint.json"):
        ...     raise OfflineModeIsEnabled
        Traceback (most recent call last):
        peft_blueprint.errors.BlueprintError: 'org/model' is out of reach: offline mode is on. Unset HF_HUB_OFFLINE.
    """
    if file is None and constants.HF_HUB_OFFLINE:
        raise BlueprintError(f"{repo_id!r} is out of reach: offline mode is on. Unset HF_HUB_OFFLINE to publish.")
    try:
        yield
    except BlueprintError:
        raise
    except _TRANSLATED as error:
        # the client raises a RuntimeError from the cause of an upload that failed
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        template = _template_of(cause, file is not None, sending)
        is_safe = all(masked(text, [token]) == text for text in _texts_of(error))
        if template is None and is_safe:
            raise
        status = status_of(cause) if isinstance(cause, HfHubHTTPError) else 0
        said = (cause.server_message if isinstance(cause, HfHubHTTPError) else None) or str(cause)
        message = (template or _OTHER).format(
            what="JSON",
            repo=repo_id,
            revision=revision,
            file=file,
            status=status,
            said=_one_line(masked(said, [token])) or type(cause).__name__,
            here="" if file is None else ", and no such file or folder exists here",
            done="" if file is not None else "Nothing was published. " if sending else "Nothing was sent. ",
            wait=_wait_of(cause),
        )
        raise BlueprintError(masked(message, [token])) from (error if is_safe else None)


def _texts_of(error: BaseException | None) -> Iterator[str]:
    """Yield the texts of an exception and of those behind it, which a traceback shows."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


def status_of(error: HfHubHTTPError) -> int:
    """Return the HTTP status of an answer, or 0 without one.

    Example:
        >>> from types import SimpleNamespace
        >>> status_of(SimpleNamespace(response=SimpleNamespace(status_code=404)))
        404
    """
    response = error.response
    return 0 if response is None else int(response.status_code)


def _template_of(error: BaseException, reading: bool, sending: bool) -> str | None:
    """Return the message for an exception; None for one that does not come from the client or the network."""
    for kind, template in _BY_CLASS:
        if isinstance(error, kind):
            return template
    if isinstance(error, HfHubHTTPError):
        status = status_of(error)
        if isinstance(error, RepositoryNotFoundError) and (reading or status != 401):
            status = 404  # without a token the Hub answers 401 for a repository that does not exist
        if status == 403 and sending:
            return _MAY_NOT_WRITE
        return _BY_STATUS.get(500 if status >= 500 else status, _OTHER_STATUS)
    if isinstance(error, json.JSONDecodeError):
        return NO_JSON
    if isinstance(error, _OF_ODD_ANSWERS):
        return _ODD_ANSWER if _is_of_client(error) else None
    if isinstance(error, NETWORK_ERRORS):
        return _CUT_CONNECTION if sending else _NO_CONNECTION
    return _BAD_CARD if isinstance(error, ValueError) and CARD in str(error) else None


def _is_of_client(error: BaseException) -> bool:
    """Return whether an exception was raised by the client's own code."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith("huggingface_hub")


def _wait_of(error: BaseException) -> str:
    response = error.response if isinstance(error, HfHubHTTPError) else None
    seconds = "" if response is None else response.headers.get("Retry-After", "")
    return f"in {seconds} seconds" if seconds.isdigit() else "in a few minutes"


def _one_line(text: str) -> str:
    shown = " ".join(text.split())
    return (shown if len(shown) <= 300 else f"{shown[:300]}…").rstrip(".")
