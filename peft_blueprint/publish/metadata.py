"""Edit the YAML front matter of a model card, keeping other values, comments and the order of keys."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ruamel.yaml
import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import BlueprintError
from .card_sections import line_end


MAX_CHARACTERS = 200_000
MAX_ALIASES = 16  # a few stand for exponentially many values
MAX_DEPTH = 40  # nested lists and mappings
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_OPENING = re.compile(r"\ufeff?\s*---[ \t]*(?:\r\n|\n|\r)")
_CLOSING = re.compile(r"^---[ \t]*(?=[\r\n]|\Z)", re.MULTILINE)
_DATA_FILE = re.compile(r".*\.(?:jsonl?|csv|tsv|txt|md|parquet|arrow|gz|zst|zip|py|ya?ml)", re.IGNORECASE)
_COMMENT = re.compile(r"(?:^|(?<=\s))#.*$", re.MULTILINE)
_INDENTED = re.compile(r"^ +- ", re.MULTILINE)

# YAML readers raise Python's own errors for values such as 2024-99-99
_YAML_ERRORS = (yaml.YAMLError, ruamel.yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) + (
    OverflowError,
    RecursionError,
)
_SCALARS = ("bool", "int", "float", "timestamp")

Metadata = dict[str, Any]


class _Scalar:
    """A YAML scalar other than text that is written back as it was read: ruamel rounds some floats."""

    def __init__(self, tag: str, text: str) -> None:
        self.tag, self.text = tag, text


class _Constructor(ruamel.yaml.RoundTripConstructor):
    pass


class _Representer(ruamel.yaml.RoundTripRepresenter):
    pass


for _name in _SCALARS:
    _Constructor.add_constructor(f"tag:yaml.org,2002:{_name}", lambda _, node: _Scalar(node.tag, node.value))
_Representer.add_representer(_Scalar, lambda self, scalar: self.represent_scalar(scalar.tag, scalar.text))


def is_hub_id(text: str) -> bool:
    """Return whether a text has the form `org/name` of a repository on the Hub.

    Example:
        >>> is_hub_id("openai/gsm8k"), is_hub_id("../model")
        (True, False)
    """
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.isascii() and text.count("/") == 1 and text == text.strip() and text[0].isalnum()


def is_dataset_id(text: str) -> bool:
    """Return whether a text has the form of a data set's id on the Hub, and not of a file's path.

    Example:
        >>> is_dataset_id("openai/gsm8k"), is_dataset_id("data/train.jsonl")
        (True, False)
    """
    return is_hub_id(text) and not _DATA_FILE.fullmatch(text)


def add_metadata(card: str, data: ModelCardData) -> str:
    """Add values to a card's front matter, which is created if there is none.

    A list such as `tags` gets the values that it lacks, and a single value becomes a list where a list is added. A
    single value that is already there stays.

    Args:
        card: text of a `README.md`.
        data: the values to add.

    Raises:
        BlueprintError: if the front matter is not a closed YAML mapping, or cannot be changed safely.

    Example:
        >>> print(add_metadata("---\\ntags: [lora] # mine\\n---\\n", ModelCardData(tags=["peft"], license="mit")))
        ---
        tags: [lora, peft] # mine
        license: mit
        ---
        <BLANKLINE>
    """
    return edit_metadata(card, _add, data.to_dict())


def read_metadata(card: str) -> Metadata:
    """Return a card's front matter as plain values; empty if there is none.

    Raises:
        BlueprintError: if it is not a closed YAML mapping; names the line.
    """
    head, text, _ = _split(card)
    return _load(text, head)


def edit_metadata(card: str, edit: Callable[[Metadata, Mapping[str, Any]], None], additions: Mapping[str, Any]) -> str:
    """Return the card with its front matter edited.

    Args:
        card: text of a `README.md`; its line ends are kept.
        edit: called as `edit(metadata, additions)`, changes `metadata` in place. It runs twice: on the values that carry
            the comments, and on plain values, which the result is checked against.
        additions: JSON values for `edit`.

    Raises:
        BlueprintError: if the front matter is not a closed YAML mapping, or the edit would change something else.
    """
    head, text, tail = _split(card)
    expected, before = _load(text, head), _comparable(_load(text, head))
    edit(expected, additions)
    if _comparable(expected) == before:
        return card
    with _translated_errors(head):
        editor = _editor(is_indented=_INDENTED.search(text) is not None)
        current = editor.load(text)
        comments = text if current is None else ""
        current = ruamel.yaml.comments.CommentedMap() if current is None else current
        # dumped by PyYAML and read back, values such as "no" and 1e-05 are written so that every reader gets them right
        edit(current, editor.load(yaml.safe_dump(dict(additions), sort_keys=False)))
        changed = io.StringIO()
        if current:
            editor.dump(current, changed)
    result = comments + changed.getvalue()
    lost = [found for found in _COMMENT.findall(text) if result.count(found) < text.count(found)]
    result += "".join(f"{comment}\n" for comment in lost)
    if _comparable(_load(result, head)) != _comparable(expected):
        raise BlueprintError(
            f"The card's front matter cannot be changed without changing other values. Add by hand: {dict(additions)}."
        )
    newline = line_end(card)
    if head:
        return head + result.replace("\n", newline) + tail
    mark = "\ufeff" if card.startswith("\ufeff") else ""
    body = card.removeprefix(mark)
    gap = newline if body.strip() and not body.startswith(newline) else ""
    return mark + f"---\n{result}---\n".replace("\n", newline) + gap + body


def _editor(is_indented: bool) -> ruamel.yaml.YAML:
    editor = ruamel.yaml.YAML()
    editor.Constructor, editor.Representer = _Constructor, _Representer
    editor.preserve_quotes = True
    editor.width = 4096
    if is_indented:
        editor.indent(mapping=2, sequence=4, offset=2)
    return editor


def _add(metadata: Metadata, additions: Mapping[str, Any]) -> None:
    for key, value in additions.items():
        present = metadata.get(key)
        if present is None:
            metadata[key] = value
        elif isinstance(present, list) or isinstance(value, list):
            if isinstance(present, dict):
                raise BlueprintError(f"{key} in the card's front matter must be a list, got a mapping. Correct it.")
            values: Any = present if isinstance(present, list) else [present]
            missing = [item for item in (value if isinstance(value, list) else [value]) if item not in values]
            if missing and not hasattr(values, "ca"):  # a plain list, which an anchor may share with another key
                metadata[key] = [*values, *missing]
                continue
            for item in missing:
                # not after a last item with a comment, to which lines about the next key may belong
                values.insert(len(values) - (len(values) - 1 in values.ca.items), item)


def _comparable(metadata: Metadata) -> str:
    """Return values as text, in which 1, 1.0 and true differ and a NaN equals itself; lists in any order."""
    return repr(
        {key: sorted(map(repr, value)) if isinstance(value, list) else value for key, value in metadata.items()}
    )


def _split(card: str) -> tuple[str, str, str]:
    """Split a card before and after its YAML, whose lines then end in \\n; `head` is empty without front matter."""
    opening = _OPENING.match(card)
    if opening is None:
        return "", "", card
    head = opening[0]
    closing = _CLOSING.search(card.replace("\r", "\n"), opening.end())
    if closing is None:
        raise BlueprintError(
            f"The card's front matter begins in line {_lines(head)} with --- and no line --- ends it. Close it, or put a "
            "line of text before it if it is only a ruler."
        )
    text = card[opening.end() : closing.start()].replace("\r\n", "\n").replace("\r", "\n")
    if len(text) > MAX_CHARACTERS:
        raise BlueprintError(f"The card's front matter has {len(text):,} characters, more than {MAX_CHARACTERS:,}.")
    return head, text, card[closing.start() :]


def _load(text: str, head: str) -> Metadata:
    """Read YAML as `huggingface_hub` does, within limits on its depth and aliases."""
    depth = aliases = 0
    with _translated_errors(head):
        for event in yaml.parse(text, Loader=_LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            aliases += isinstance(event, yaml.AliasEvent)
            if depth > MAX_DEPTH or aliases > MAX_ALIASES:
                raise BlueprintError(
                    f"The card's front matter has more than {MAX_ALIASES} YAML aliases (*name), or is nested deeper than "
                    f"{MAX_DEPTH}. Write it plainly."
                )
        value = yaml.load(text, Loader=_LOADER)
    if value is not None and not isinstance(value, dict):
        raise BlueprintError(
            "The card's front matter, between the first two lines of ---, is not a mapping of keys to values. Correct it, "
            "or put a line of text before it if they are only rulers."
        )
    return value or {}


@contextmanager
def _translated_errors(head: str) -> Iterator[None]:
    try:
        yield
    except BlueprintError:
        raise
    except _YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {_lines(head) + mark.line + 1} of the card" if mark is not None else ""
        reason = getattr(error, "problem", None) or type(error).__name__
        raise BlueprintError(
            f"The card's front matter, between the first two lines of ---, is not YAML ({reason}{where}). Correct it."
        ) from error


def _lines(text: str) -> int:
    return len(re.findall(r"\r\n|\n|\r", text))
