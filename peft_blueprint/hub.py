"""Blueprints from wherever they are: a file, a folder, or a repository on the Hub.

Uses `huggingface_hub` for everything that touches the network, so that its cache, tokens, mirrors and offline mode
apply.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .blueprint import Blueprint
from .errors import BlueprintError
from .formats import FILE_NAME, read_blueprint


def fetch(source: str | Path, *, revision: str | None = None, **kwargs: Any) -> Blueprint:
    """Read a blueprint from a file, a folder that holds `blueprint.json`, or a repository on the Hub.

    What exists on disk is taken from disk, as is what ends in `.json` or `.csv`; anything else is a repository id.

    Args:
        source: path or repository id.
        revision: branch, tag or commit of a repository.
        **kwargs: for `huggingface_hub.hf_hub_download`.

    Raises:
        FormatError: if what is there is not a blueprint.
        BlueprintError: if there is nothing, with the reason and a way out.
    """
    path = Path(source)
    if path.exists() or path.suffix in (".json", ".csv"):
        return read_blueprint(path)
    repository = str(source)
    try:
        return read_blueprint(hf_hub_download(repository, FILE_NAME, revision=revision, **kwargs))
    except HFValidationError:
        raise BlueprintError(
            f"{repository!r} is neither a file or folder here nor a repository id such as 'org/model'. Check the path."
        ) from None
    except GatedRepoError as error:
        raise BlueprintError(
            f"The repository {repository!r} needs permission: ask for it on its page, then run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise BlueprintError(
            f"There is no repository {repository!r} on the Hub that you may see, and no such file or folder here. "
            "Check the name; if it is private, run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise BlueprintError(f"The repository {repository!r} has no revision {revision!r}. Check the name.") from error
    except LocalEntryNotFoundError as error:
        raise BlueprintError(
            f"The blueprint of {repository!r} is not in the cache and the Hub cannot be reached. Go online once, or "
            "give a file."
        ) from error
    except EntryNotFoundError as error:
        raise BlueprintError(
            f"The repository {repository!r} publishes no {FILE_NAME}. Measure one with `peft-blueprint generate`."
        ) from error
    except HfHubHTTPError as error:
        raise BlueprintError(
            f"The Hub did not give the blueprint of {repository!r}: {error}. Try again later."
        ) from error
