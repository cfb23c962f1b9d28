"""Publish a blueprint on the Hub: its file, a section of the model card and a picture, in one commit or pull request."""

from __future__ import annotations

import dataclasses
import difflib
import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData, constants
from huggingface_hub.errors import HfHubHTTPError

from .._options import from_keywords
from .._text import format_names
from ..blueprint import (
    ADAPTER_CONFIG,
    CARD,
    FILE_NAME,
    Blueprint,
    file_name,
    from_dict,
    loads,
    require_token,
    status_of,
    to_arrays_bytes,
    to_dict,
    to_json,
    translated_hub_errors,
)
from ..errors import BlueprintError, FormatError, MismatchError
from .card import TAG, card_section, datasets_of, new_card, section_name
from .card_sections import with_section
from .metadata import add_metadata, is_hub_id
from .options import PublishOptions
from .plots import plot_blueprint
from .snapshot import Snapshot, base_model_of, file_with_other_header, index_with, take_snapshot


LARGE = 5_000_000  # bytes of JSON from which the arrays are published too
ATTEMPTS = 3
MODEL_FILES = frozenset(
    ("config.json", ADAPTER_CONFIG, "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
)

_LOG = logging.getLogger(__name__)
_LOCAL_PATH = re.compile(r"(?<![\w/:.])(?:~?/[\w.@ -]+(?:/[\w.@-]+)+|[A-Za-z]:\\\\[\w.\\-]+)")


@dataclass(frozen=True)
class Publication:
    """The content of a commit; `print(publication)` shows it with the change to the card.

    Args:
        repo_id: the repository.
        files: content of the changed files by path; empty if the repository has everything already.
        card: the new model card.
        previous_card: the present model card; None without one.
        title: title of the commit.
        description: description of the commit.
        create_pr: whether it is a pull request.
        creates_repository: whether the repository is created first.
        private: whether it is created as a private one.
        revision: branch to commit to; None for the main one.
        parent_commit: commit that the repository was read at; None without a repository.
        notes: remarks for the publisher.
    """

    repo_id: str
    files: Mapping[str, bytes]
    card: str
    previous_card: str | None
    title: str
    description: str
    create_pr: bool = False
    creates_repository: bool = False
    private: bool = False
    revision: str | None = None
    parent_commit: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_unchanged(self) -> bool:
        """Whether the repository has everything already."""
        return not self.files

    def __str__(self) -> str:
        if self.is_unchanged:
            return "\n".join([f"{self.repo_id} has this blueprint already: nothing to send.", *self.notes])
        kind = "pull request" if self.create_pr else "commit"
        created = f", a new {'private ' * self.private}repository" if self.creates_repository else ""
        diff = difflib.unified_diff(
            (self.previous_card or "").splitlines(),
            self.card.splitlines(),
            f"{CARD} now" if self.previous_card is not None else "no card",
            f"{CARD} with this commit",
            lineterm="",
        )
        return "\n".join(
            [
                f"One {kind} to {self.repo_id}{f' at {self.revision}' if self.revision else ''}{created}: {self.title}",
                *(f"  {path}  {len(content):,} bytes" for path, content in self.files.items()),
                *self.notes,
                # a card from elsewhere must not control the terminal
                *("".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in line) for line in diff),
            ]
        )


def publish(
    blueprint: Blueprint,
    repo_id: str,
    options: PublishOptions | None = None,
    *,
    dry_run: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
    **keywords: Any,
) -> str | Publication:
    """Publish a blueprint in one commit. Other text in the card stays, and files that are there already are not sent.

    If somebody commits in between, everything is read and prepared again, up to three times.

    Args:
        blueprint: the record; `model_id` must be the model's id on the Hub.
        repo_id: the model's own repository, or one for blueprints alone, which is created if it does not exist.
        options: what to publish and how.
        dry_run: send nothing.
        token: as for `huggingface_hub`.
        endpoint: URL of another Hub.
        **keywords: fields of `PublishOptions`.

    Returns:
        The URL of the commit or pull request (of the last commit if there was nothing to send); with `dry_run` the
        commit that would be made.

    Raises:
        BlueprintError: if it cannot be published. No commit is made then, except that a broken connection may hide one.

    Example:
        >>> print(publish(blueprint, "org/model", domain="math", dry_run=True))  # doctest: +SKIP
        One commit to org/model: Add gradient blueprint blueprint-math.json
          blueprint-math.json  41,203 bytes
    """
    if not dry_run:
        require_token(repo_id, token)
    for _ in range(ATTEMPTS):
        publication = prepare(blueprint, repo_id, options, token=token, endpoint=endpoint, **keywords)
        if dry_run:
            return publication
        for note in publication.notes:
            _LOG.warning(note)
        if publication.is_unchanged:
            _LOG.warning("%s has this blueprint already: nothing was sent", repo_id)
            return f"{(endpoint or constants.ENDPOINT).rstrip('/')}/{repo_id}/commit/{publication.parent_commit}"
        url = _send(publication, HfApi(endpoint=endpoint, token=token))
        if url is not None:
            return url
    raise BlueprintError(
        f"Somebody else committed to {repo_id!r} during each of {ATTEMPTS} attempts. Nothing was published. Try again "
        "later, or offer it as a pull request with --create-pr (create_pr=True)."
    )


def prepare(
    blueprint: Blueprint,
    repo_id: str,
    options: PublishOptions | None = None,
    *,
    token: str | bool | None = None,
    endpoint: str | None = None,
    **keywords: Any,
) -> Publication:
    """Return the commit that `publish` would make; reads the Hub and writes nothing.

    Args:
        blueprint: the record.
        repo_id: the repository, `org/name`.
        options: what to publish and how.
        token: as for `huggingface_hub`.
        endpoint: URL of another Hub.
        **keywords: fields of `PublishOptions`.

    Raises:
        MismatchError: if a blueprint of another model has this name there, or the repository is another model's.
        BlueprintError: if it cannot be published or the Hub cannot be read.
    """
    options = from_keywords(PublishOptions, options, keywords)
    name = file_name(options.domain, options.checkpoint)
    blueprint = _at_checkpoint(blueprint, options.checkpoint)
    _require_ids(blueprint, repo_id, options.datasets)
    if options.in_index and name != FILE_NAME:
        raise BlueprintError(f"A model's index can hold {FILE_NAME} only, got {name}. Leave in_index out.")
    content = to_json(to_dict(blueprint)).encode()
    notes = _local_paths(blueprint)
    with translated_hub_errors(repo_id, revision=options.revision, token=token):
        api = HfApi(endpoint=endpoint, token=token)
        there = take_snapshot(api, repo_id, options.revision, may_be_created=not options.create_pr)
        is_own = blueprint.model_id.lower() in (repo_id.lower(), there.id.lower())
        _require_suitable(there, blueprint, is_own, options)
        published = there.read(name)
        is_new = published != content
        if published is not None and is_new and not options.replace:
            _require_same_model(blueprint, published, f"{name} of {there.id!r}")
        files = {name: content} if is_new else {}

        arrays = Path(name).with_suffix(".safetensors").name
        is_large = len(content) > LARGE if options.with_arrays is None else options.with_arrays
        if (is_large or arrays in there.files) and (is_new or arrays not in there.files):
            files[arrays] = to_arrays_bytes(to_dict(blueprint))
        picture: str | None = Path(name).with_suffix(".png").name if options.picture else None
        if picture in there.files and published is None:
            notes.append(f"No picture: {there.id} has a {picture} that was not published with a blueprint.")
            picture = None
        elif picture and (is_new or picture not in there.files):
            if (drawn := _draw(blueprint, notes)) is not None:
                files[picture] = drawn
            else:
                picture = None
        if name == FILE_NAME:
            if (index := index_with(blueprint, there, options.in_index)) is not None:
                files[constants.SAFETENSORS_INDEX_FILE] = index
            if (other := file_with_other_header(blueprint, there)) is not None:
                notes.append(
                    f"The header of {other} holds another blueprint, and readers look there "
                    "first: update it with `peft-blueprint embed` and upload the model, or take it out with "
                    "`peft-blueprint remove`."
                )
        previous = there.read_card()
    card = previous if previous is not None else "" if is_own else new_card(blueprint, repo_id)
    datasets = datasets_of(blueprint) if options.datasets is None else list(options.datasets)
    base_model = None if is_own else blueprint.model_id
    card = add_metadata(card, ModelCardData(tags=[TAG], base_model=base_model, datasets=datasets or None))
    section = card_section(blueprint, name, picture=picture, repo_id=there.id)
    card = with_section(card, section, section_name(name))
    if card != previous:
        files[CARD] = card.encode()
    return Publication(
        repo_id=there.id,
        files=files,
        card=card,
        previous_card=previous,
        title=options.message or f"{'Add' if published is None else 'Update'} gradient blueprint {name}",
        description=f"{len(blueprint)} {blueprint.level} entries of {blueprint.model_id}"
        + (f" at {blueprint.model_revision}" if blueprint.model_revision else ""),
        create_pr=options.create_pr,
        creates_repository=there.commit is None,
        private=options.private,
        revision=options.revision,
        parent_commit=there.commit,
        notes=tuple(notes),
    )


def _local_paths(blueprint: Blueprint) -> list[str]:
    """Return a note if the provenance, which becomes public, names files of this machine."""
    found = sorted(set(_LOCAL_PATH.findall(json.dumps(dict(blueprint.provenance), ensure_ascii=False))))
    if not found:
        return []
    return [
        f"The provenance names files of this machine, which become public: {format_names(found)}. Measure from another "
        "folder, or edit it."
    ]


def _at_checkpoint(blueprint: Blueprint, checkpoint: float | None) -> Blueprint:
    if checkpoint is None or blueprint.training_checkpoint == checkpoint:
        return blueprint
    if blueprint.training_checkpoint != 1.0:  # its default, for a finished model
        raise MismatchError(
            f"checkpoint must be the blueprint's training_checkpoint={blueprint.training_checkpoint}, got {checkpoint}."
        )
    return dataclasses.replace(blueprint, training_checkpoint=checkpoint)


def _require_ids(blueprint: Blueprint, repo_id: str, datasets: Sequence[str] | None) -> None:
    if not is_hub_id(repo_id):
        raise BlueprintError(f"repo_id must be 'org/name', got {repo_id!r}.")
    if not is_hub_id(blueprint.model_id):
        raise BlueprintError(
            f"The blueprint's model_id must be an id on the Hub such as 'org/model', got {blueprint.model_id!r}. Give "
            "--model-id org/model when measuring or publishing, or use dataclasses.replace(blueprint, "
            "model_id='org/model')."
        )
    for dataset in datasets or ():
        if not is_hub_id(dataset if "/" in dataset else f"datasets/{dataset}"):
            raise BlueprintError(f"A data set must be 'org/name' as on the Hub, got {dataset!r}.")


def _require_suitable(there: Snapshot, blueprint: Blueprint, is_own: bool, options: PublishOptions) -> None:
    """Raise if the repository is public and must not be, or holds another model."""
    if options.private and there.is_public:
        raise BlueprintError(f"{there.id!r} exists and is public. Leave private out, or choose another repository.")
    model_files = sorted(there.files & MODEL_FILES)
    is_adapter_of_it = model_files == [ADAPTER_CONFIG] and base_model_of(there) == blueprint.model_id
    if model_files and not is_own and not is_adapter_of_it and not options.allow_other_model:
        raise MismatchError(
            f"{there.id!r} holds a model ({', '.join(model_files)}), and the blueprint is of {blueprint.model_id!r}. Publish "
            "to that model's repository, to one of its adapters or to a new one; for a copy of the same model give --allow-other-model "
            "(allow_other_model=True)."
        )


def _require_same_model(blueprint: Blueprint, published: bytes, where: str) -> None:
    """Raise unless the published file is a blueprint of the same model."""
    try:
        old = from_dict(loads(published.decode("utf-8-sig"), where), where)
    except (FormatError, UnicodeDecodeError) as error:
        raise BlueprintError(
            f"{where} is not a valid blueprint ({error}). Publish under another domain, or replace it with --replace "
            "(replace=True)."
        ) from error
    for key in ("model_id", "model_digest"):
        new, published_value = getattr(blueprint, key), getattr(old, key)
        if new != published_value and None not in (new, published_value):
            raise MismatchError(
                f"{where} is a blueprint of another model: its {key} is {published_value!r}, the new one's {new!r}. Publish "
                "under another domain or to another repository, or replace it with --replace (replace=True)."
            )


def _draw(blueprint: Blueprint, notes: list[str]) -> bytes | None:
    """Return a heat map as PNG, or None with a note that gives the reason."""
    if not any(entry.kind is not None and entry.depth is not None for entry in blueprint):
        notes.append("No picture: the entries have no kind and depth.")
        return None
    drawn = io.BytesIO()
    try:
        plot_blueprint(blueprint).savefig(drawn, format="png", metadata={"Software": None})
    except ValueError as error:  # ours without matplotlib; matplotlib's for a kind that it takes for a formula
        notes.append(f"No picture. {error}")
        return None
    return drawn.getvalue()


def _send(publication: Publication, api: HfApi) -> str | None:
    """Make the commit. Return its URL or the pull request's, or None if somebody committed in between."""
    repo_id, parent = publication.repo_id, publication.parent_commit
    if publication.creates_repository:
        with translated_hub_errors(repo_id, revision=publication.revision, sending=True, token=api.token):
            api.create_repo(repo_id, private=publication.private)
    try:
        with translated_hub_errors(repo_id, revision=publication.revision, sending=True, token=api.token):
            try:
                info = api.create_commit(
                    repo_id,
                    [CommitOperationAdd(path, content) for path, content in publication.files.items()],
                    commit_message=publication.title,
                    commit_description=publication.description,
                    revision=publication.revision,
                    create_pr=publication.create_pr,
                    parent_commit=parent or api.model_info(repo_id).sha,
                )
            except HfHubHTTPError as error:
                if status_of(error) == 412:
                    return None
                raise
    except BlueprintError as error:
        if publication.creates_repository:
            raise BlueprintError(
                f"{error} The repository {repo_id!r} was created and stays; publishing again uses it."
            ) from error
        raise
    return info.pr_url or f"{api.endpoint}/{repo_id}/commit/{info.oid}"
