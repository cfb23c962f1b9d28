"""Options of publishing as one dataclass for Python and the command line; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PublishOptions:
    """Options of `publish`: the files, their names, and the commit.

    Args:
        domain: kind of data that the file is named after, such as "math".
        checkpoint: share of the model's training done, (0, 1], that the file is named after; by default no share is in
            the name. It is written into a record that has none.
        datasets: ids on the Hub for the card; by default those that the provenance names. An empty list for none.
        picture: publish a heat map, if matplotlib is installed and the entries have kinds and depths.
        with_arrays: publish the exact numbers as safetensors too; by default if the JSON is above 5 MB, or if the
            repository has such a file.
        in_index: put the blueprint into the index of the repository's sharded model too; one that is there is always
            updated.
        revision: branch to commit to; by default the main branch.
        create_pr: open a pull request instead of committing.
        private: make the repository private if it is created.
        message: title of the commit.
        replace: replace a file of this name that is the blueprint of another model, or not a blueprint.
        allow_other_model: publish to a repository that holds another model, such as a quantized copy.
    """

    domain: str | None = field(default=None, metadata={"help": "Kind of data in the file's name, such as math."})
    checkpoint: float | None = field(
        default=None, metadata={"help": "Share of the model's training done, (0, 1], in the file's name."}
    )
    datasets: Sequence[str] | None = field(
        default=None, metadata={"help": "Hub id of a data set for the card; may be repeated."}
    )
    picture: bool = field(default=True, metadata={"help": "Publish a heat map too (needs matplotlib)."})
    with_arrays: bool | None = field(
        default=None, metadata={"help": "Publish the exact numbers as safetensors too; by default for large files."}
    )
    in_index: bool = field(
        default=False, metadata={"help": "Put it into the index of the repository's sharded model too."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of committing."})
    private: bool = field(default=False, metadata={"help": "Make the repository private if it is created."})
    message: str | None = field(default=None, metadata={"help": "Title of the commit."})
    replace: bool = field(
        default=False, metadata={"help": "Replace a file of this name that belongs to another model."}
    )
    allow_other_model: bool = field(
        default=False, metadata={"help": "Publish to a repository that holds another model."}
    )
