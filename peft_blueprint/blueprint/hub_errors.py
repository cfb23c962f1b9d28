"""Why the Hub did not take a blueprint, in our words: the repository, what happened, and a way out.

Knows the client's exceptions; knows nothing of what is published.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from ..errors import BlueprintError


CARD = "README.md"
LOG_IN = "Run `hf auth login` with a token that may write, or set HF_TOKEN."
# requests' errors are OSErrors; httpx's are of the class that the client's own errors come from
NETWORK_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)


def require_token(repo_id: str, token: str | bool | None) -> None:
    """Raise BlueprintError unless requests would carry a token.

    Args:
        repo_id: to name in the message.
        token: as for `huggingface_hub`: a token, True or None for the saved one, False for none.
    """
    try:
        headers = build_hf_headers(token=token)
    except LocalTokenNotFoundError:
        headers = {}
    if "authorization" not in headers:
        raise BlueprintError(f"Nothing can be published to {repo_id!r} without a token. {LOG_IN}")


def needs_permission(repo_id: str) -> str:
    """What to say of a gated repository."""
    return f"The repository {repo_id!r} needs permission: ask for it on its page, then run `hf auth login`."


@contextmanager
def in_our_words(repo_id: str, *, revision: str | None = None, sending: bool = False) -> Iterator[None]:
    """The client's exceptions as ours.

    Args:
        repo_id: whom the requests in the `with` are about.
        revision: branch, tag or commit, for the message.
        sending: whether they write, so that after a break it is not known what arrived.

    Raises:
        BlueprintError: for whatever the Hub or the way to it refused.
    """
    if constants.HF_HUB_OFFLINE:
        raise BlueprintError(f"{repo_id!r} is out of reach: offline mode is on. Unset HF_HUB_OFFLINE to publish.")
    try:
        yield
    except BlueprintError:
        raise
    except HFValidationError as error:
        raise BlueprintError(f"{repo_id!r} is no repository id such as 'org/name': {error}.") from error
    except LocalTokenNotFoundError as error:
        raise BlueprintError(f"There is no token for {repo_id!r}. {LOG_IN}") from error
    except RevisionNotFoundError as error:
        raise BlueprintError(
            f"The repository {repo_id!r} has no revision {revision!r}. Make the branch first, or leave revision out."
        ) from error
    except OfflineModeIsEnabled as error:
        raise BlueprintError(f"{repo_id!r} is out of reach: offline mode is on. Unset HF_HUB_OFFLINE.") from error
    except NETWORK_ERRORS as error:
        raise BlueprintError(_sentence(repo_id, error, sending)) from error
    except RuntimeError as error:  # what the client makes of an upload that failed
        if not isinstance(error.__cause__, NETWORK_ERRORS):
            raise
        raise BlueprintError(_sentence(repo_id, error.__cause__, sending)) from error
    except ValueError as error:  # what the client says of a card that the Hub finds invalid
        if CARD not in str(error):
            raise
        raise BlueprintError(
            f"The Hub does not take the card of {repo_id!r}: {_one_line(str(error))}. Nothing was published. Correct the "
            "card's front matter, or the data sets given."
        ) from error


def status_of(error: HfHubHTTPError) -> int:
    """The HTTP status of an answer, or 0 without one."""
    response = error.response
    return 0 if response is None else int(response.status_code)


def _sentence(repo_id: str, error: BaseException, sending: bool) -> str:
    if isinstance(error, HfHubHTTPError):
        return _answered(repo_id, error, sending)
    if not sending:
        after = "Nothing was sent. Try again when it can be reached."
    else:
        after = (
            "Whether the commit was made is not known. Publish again: what has arrived is not sent twice. (A pull request "
            "would be: look on the repository's page first.)"
        )
    return (
        f"The connection to the Hub failed over {repo_id!r} ({_one_line(str(error)) or type(error).__name__}). {after}"
    )


def _answered(repo_id: str, error: HfHubHTTPError, sending: bool) -> str:
    status = status_of(error)
    said = _one_line(error.server_message or str(error))
    done = "Nothing was published. " if sending else ""
    if isinstance(error, GatedRepoError):
        return needs_permission(repo_id)
    if status == 401:
        return f"The Hub does not know your token, or it may not see {repo_id!r} (401). {done}{LOG_IN}"
    if status == 403:
        return (
            f"You may not write to {repo_id!r} (403: {said}). {done}Use a token that may write; offer it as a pull request "
            "with --create-pr (create_pr=True); or publish to a repository of your own."
            if sending
            else f"You may not read {repo_id!r} (403: {said}). Ask its owner, or publish to a repository of your own."
        )
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return (
            f"There is no repository {repo_id!r} on the Hub that you may see (404). {done}Check the name; if it is "
            "private, use a token that may read and write it."
        )
    if status == 409:
        return (
            f"{repo_id!r} is taken or is being changed at this moment (409: {said}). {done}Try again; if it stays so, a "
            "repository of that name exists that you may not see: choose another name."
        )
    if status == 412:
        return f"Somebody committed to {repo_id!r} at this moment (412). {done}Publish again."
    if status == 429:
        wait = error.response.headers.get("Retry-After", "") if error.response is not None else ""
        when = f"in {wait} seconds" if wait.isdigit() else "in a few minutes"
        return f"The Hub takes no more requests about {repo_id!r} for now (429). {done}Try again {when}."
    if status >= 500:
        return f"The Hub has a fault of its own over {repo_id!r} ({status}: {said}). Try again later."
    return f"The Hub refused what was asked of {repo_id!r} ({status}: {said}). {done}Correct it and publish again."


def _one_line(text: str) -> str:
    shown = " ".join(text.split())
    return (shown if len(shown) <= 300 else f"{shown[:300]}…").rstrip(".")
