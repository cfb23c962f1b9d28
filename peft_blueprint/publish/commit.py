"""Blueprints onto the Hub: the files, a section of the model card, and a picture, in one commit or pull request.

Everything is read and checked before anything is written. Knows nothing of models or how they are measured.
"""

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

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from .._text import format_names
from ..blueprint import (
    CARD,
    FILE_NAME,
    Blueprint,
    file_name,
    from_json,
    require_token,
    status_of,
    to_arrays_bytes,
    to_json,
    translated_hub_errors,
)
from ..errors import BlueprintError, FormatError, MismatchError
from .card import TAG, card_section, datasets_of, is_hub_id, new_card, with_metadata, with_section
from .snapshot import has_other_header, index_with, look


LARGE = 5_000_000  # bytes of JSON from which the arrays are published beside it
ATTEMPTS = 3
OF_A_MODEL = frozenset(
    ("config.json", "adapter_config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
)

_LOG = logging.getLogger(__name__)
_LOCAL_PATH = re.compile(r"(?<![\w/:.])(?:~?/[\w.@ -]+(?:/[\w.@-]+)+|[A-Za-z]:\\\\[\w.\\-]+)")


@dataclass(frozen=True)
class Publication:
    """What would be sent to a repository; `print(publication)` shows it with the change to the card.

    Args:
        repo_id: the repository.
        files: content by path, of those that change; empty if all is there already.
        card: the model card as it would be.
        previous_card: as it is; None if there is none.
        title: of the commit.
        description: of the commit.
        create_pr: whether it is a pull request.
        creates_repository: whether the repository is made first.
        private: whether it would then be private.
        revision: branch to commit to; None for the main one.
        parent_commit: the commit all this was read at; None if there is no repository.
        notes: what its reader should know.
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
        """Whether the repository holds all of this already."""
        return not self.files

    def __str__(self) -> str:
        if self.is_unchanged:
            return "\n".join([f"{self.repo_id} holds this blueprint already: there is nothing to send.", *self.notes])
        kind = "pull request" if self.create_pr else "commit"
        made = f", which is made{' as a private one' if self.private else ''}" if self.creates_repository else ""
        diff = difflib.unified_diff(
            (self.previous_card or "").splitlines(),
            self.card.splitlines(),
            f"{CARD} as it is" if self.previous_card is not None else "no card",
            f"{CARD} as it would be",
            lineterm="",
        )
        return "\n".join(
            [
                f"One {kind} to {self.repo_id}{f' at {self.revision}' if self.revision else ''}{made}: {self.title}",
                *(f"  {path}  {len(content):,} bytes" for path, content in self.files.items()),
                *self.notes,
                # a stranger's card does not get to steer the terminal
                *("".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in line) for line in diff),
            ]
        )


def publish(
    blueprint: Blueprint,
    repo_id: str,
    *,
    dry_run: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
    **wishes: Any,
) -> str | Publication:
    """Publish a blueprint in one commit. What a person wrote in the card stays, and what is there already is not sent.

    If somebody commits in between, everything is read and made anew, up to three times.

    Args:
        blueprint: the record; `model_id` must be the model's id on the Hub.
        repo_id: the model's own repository, or one of blueprints alone, which is made if there is none.
        dry_run: send nothing.
        token: as for `huggingface_hub`.
        endpoint: of another Hub.
        **wishes: as for `prepare`.

    Returns:
        The commit's or pull request's URL (the last commit's if there was nothing to send); with `dry_run` what would
        be sent.

    Raises:
        BlueprintError: if it cannot be published. No commit is made then, except that a broken connection may hide one.
    """
    if not dry_run:
        require_token(repo_id, token)
    for _ in range(ATTEMPTS):
        publication = prepare(blueprint, repo_id, token=token, endpoint=endpoint, **wishes)
        if dry_run:
            return publication
        for note in publication.notes:
            _LOG.warning(note)
        if publication.is_unchanged:
            _LOG.warning("%s holds this blueprint already: nothing was sent", repo_id)
            return f"{(endpoint or constants.ENDPOINT).rstrip('/')}/{repo_id}/commit/{publication.parent_commit}"
        url = _send(publication, HfApi(endpoint=endpoint, token=token))
        if url is not None:
            return url
    raise BlueprintError(
        f"Somebody else committed to {repo_id!r} each of the {ATTEMPTS} times that this was tried. Nothing was published. "
        "Try again later, or offer it as a pull request with --create-pr (create_pr=True)."
    )


def prepare(
    blueprint: Blueprint,
    repo_id: str,
    *,
    domain: str | None = None,
    checkpoint: float | None = None,
    datasets: Sequence[str] | None = None,
    picture: bool = True,
    with_arrays: bool | None = None,
    in_index: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    private: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
    message: str | None = None,
    replace: bool = False,
    allow_other_model: bool = False,
) -> Publication:
    """What `publish` would send; reads the Hub and writes nothing.

    Args:
        blueprint: the record.
        repo_id: the repository, `org/name`.
        domain: name the file after this kind of data, see `file_name`.
        checkpoint: and after this share of the training; the record's own, or written into a record that has none.
        datasets: ids for the card; by default those that the provenance names; an empty list for none.
        picture: draw one, if matplotlib is there and entries say their kind and depth.
        with_arrays: also publish the exact arrays as safetensors; by default if the JSON is above 5 MB, or they are there.
        in_index: also put it into the index of the repository's sharded model; one that is there is always renewed.
        revision: branch to commit to.
        create_pr: make a pull request.
        private: make the repository private if it is made.
        token: as for `huggingface_hub`.
        endpoint: of another Hub.
        message: title of the commit.
        replace: also replace what has this name and is of another model, or no blueprint.
        allow_other_model: also publish to a model's repository that is not of the model that was measured, such as a
            quantised copy of it.

    Raises:
        MismatchError: if a blueprint of another model has this name there, or the repository is another model's.
        BlueprintError: if it cannot be published or the Hub cannot be read.
    """
    name = file_name(domain, checkpoint)
    blueprint = _at_checkpoint(blueprint, checkpoint)
    _require_ids(blueprint, repo_id, datasets)
    if in_index and name != FILE_NAME:
        raise BlueprintError(f"An index holds one blueprint, {FILE_NAME}, and not {name}. Leave in_index out.")
    content = to_json(blueprint).encode()
    with translated_hub_errors(repo_id, revision=revision):
        there = look(HfApi(endpoint=endpoint, token=token), repo_id, revision, may_be_made=not create_pr)
        if private and there.is_public:
            raise BlueprintError(
                f"{repo_id!r} exists and is public, so that nothing in it can be private. Leave private out, or choose another "
                "repository."
            )
        is_own = blueprint.model_id.lower() in (repo_id.lower(), there.id.lower())
        if not is_own and not allow_other_model and (theirs := sorted(there.files & OF_A_MODEL)):
            raise MismatchError(
                f"{repo_id!r} holds a model ({', '.join(theirs)}), and the blueprint is of {blueprint.model_id!r}. Publish it to "
                "that model's repository or to one of its own; for a copy of the same model say --allow-other-model "
                "(allow_other_model=True)."
            )
        published = there.read(name)
        is_new = published != content
        if published is not None and is_new and not replace:
            _require_same_model(blueprint, published, f"{name} of {repo_id!r}")
        files = {name: content} if is_new else {}
        notes = _local_paths(blueprint)

        arrays = Path(name).with_suffix(".safetensors").name
        wants_arrays = with_arrays if with_arrays is not None else len(content) > LARGE
        if (wants_arrays or arrays in there.files) and (is_new or arrays not in there.files):
            files[arrays] = to_arrays_bytes(blueprint)
        drawing: str | None = Path(name).with_suffix(".png").name if picture else None
        if drawing in there.files and published is None:
            notes.append(f"There is no picture: {there.id} has a {drawing} that no blueprint was published with.")
            drawing = None
        elif drawing and (is_new or drawing not in there.files):
            drawn = _drawn(blueprint, notes)
            files |= {drawing: drawn} if drawn else {}
            drawing = drawing if drawn else None
        if name == FILE_NAME:
            if (index := index_with(blueprint, there, in_index)) is not None:
                files[constants.SAFETENSORS_INDEX_FILE] = index
            if has_other_header(blueprint, there):
                notes.append(
                    f"The header of {constants.SAFETENSORS_SINGLE_FILE} holds another blueprint, and readers ask it first: "
                    "renew it with `peft-blueprint embed` and upload the model, or take it out with `peft-blueprint remove`."
                )

        previous = there.read_card()
        card = previous if previous is not None else "" if is_own else new_card(blueprint, repo_id)
        card = with_metadata(
            card,
            tags=[TAG],
            base_model=None if is_own else blueprint.model_id,
            datasets=datasets_of(blueprint) if datasets is None else datasets,
        )
        card = with_section(card, card_section(blueprint, name, picture=drawing, repo_id=there.id), name)
        if card != previous:
            files[CARD] = card.encode()
    verb = "Add" if published is None else "Update"
    return Publication(
        repo_id=there.id,
        files=files,
        card=card,
        previous_card=previous,
        title=message or f"{verb} gradient blueprint {name}",
        description=f"{len(blueprint)} {blueprint.level} entries of {blueprint.model_id}"
        + (f" at {blueprint.model_revision}" if blueprint.model_revision else ""),
        create_pr=create_pr,
        creates_repository=there.commit is None,
        private=private,
        revision=revision,
        parent_commit=there.commit,
        notes=tuple(notes),
    )


def _local_paths(blueprint: Blueprint) -> list[str]:
    """A note if the provenance, which everybody will read, names files of one's own machine."""
    found = sorted(set(_LOCAL_PATH.findall(json.dumps(dict(blueprint.provenance), ensure_ascii=False))))
    if not found:
        return []
    return [
        f"The provenance names files of this machine, for all to read: {format_names(found)}. Measure from another folder, or edit it."
    ]


def _at_checkpoint(blueprint: Blueprint, checkpoint: float | None) -> Blueprint:
    if checkpoint is None or blueprint.training_checkpoint == checkpoint:
        return blueprint
    if blueprint.training_checkpoint is not None:
        raise MismatchError(
            f"The blueprint is of training_checkpoint={blueprint.training_checkpoint}, and is to be published as one of "
            f"{checkpoint}. Give the same number."
        )
    return dataclasses.replace(blueprint, training_checkpoint=checkpoint)


def _require_ids(blueprint: Blueprint, repo_id: str, datasets: Sequence[str] | None) -> None:
    if not is_hub_id(repo_id):
        raise BlueprintError(f"{repo_id!r} is no repository on the Hub: give 'org/name'.")
    if not is_hub_id(blueprint.model_id):
        raise BlueprintError(
            f"The blueprint is of {blueprint.model_id!r}, which is no id on the Hub such as 'org/model', so that its readers "
            "could not find the model. Say which it is: --model-id org/model when measuring or publishing, or "
            "dataclasses.replace(blueprint, model_id='org/model')."
        )
    for dataset in datasets or ():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", dataset, re.ASCII):
            raise BlueprintError(f"{dataset!r} is no data set on the Hub: give 'org/name'.")


def _require_same_model(blueprint: Blueprint, published: bytes, where: str) -> None:
    """Raise unless what is published under this name is of the same model."""
    try:
        old = from_json(published.decode("utf-8-sig"), where)
    except (FormatError, UnicodeDecodeError) as error:
        raise BlueprintError(
            f"{where} is no blueprint that can be read ({error}). Publish under another domain, or replace it with "
            "--replace (replace=True)."
        ) from error
    for what in ("model_id", "model_digest"):
        mine, theirs = getattr(blueprint, what), getattr(old, what)
        if mine != theirs and None not in (mine, theirs):
            raise MismatchError(
                f"{where} is a blueprint of another model: its {what} is {theirs!r}, that of the new one {mine!r}. Publish "
                "under another domain or to another repository, or replace it with --replace (replace=True)."
            )


def _drawn(blueprint: Blueprint, notes: list[str]) -> bytes | None:
    """A picture as PNG, or None with a note that says why not."""
    if not any(entry.kind is not None and entry.depth is not None for entry in blueprint):
        notes.append("There is no picture: the entries do not say their kind and depth.")
        return None
    from .plots import plot_blueprint

    drawn = io.BytesIO()
    try:
        plot_blueprint(blueprint).savefig(drawn, format="png", metadata={"Software": None})
    except ValueError as error:  # ours without matplotlib; matplotlib's for a kind that it takes for a formula
        notes.append(f"There is no picture. {error}")
        return None
    return drawn.getvalue()


def _send(publication: Publication, api: HfApi) -> str | None:
    """Make the commit. Returns its URL or the pull request's, or None if somebody committed in between."""
    repo_id, parent = publication.repo_id, publication.parent_commit
    if publication.creates_repository:
        with translated_hub_errors(repo_id, revision=publication.revision, sending=True):
            api.create_repo(repo_id, private=publication.private)
    try:
        with translated_hub_errors(repo_id, revision=publication.revision, sending=True):
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
                f"{error} The repository {repo_id!r} was made and stays; publishing again uses it."
            ) from error
        raise
    return info.pr_url or f"{api.endpoint}/{repo_id}/commit/{info.oid}"
