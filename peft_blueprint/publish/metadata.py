"""The YAML front matter of a model card, edited as text: what a person wrote stays to the byte, comments and all.

Knows nothing of blueprints or the Hub.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import yaml

from ..errors import BlueprintError


try:
    from yaml import CSafeLoader as _Loader  # ten times as fast
except ImportError:
    from yaml import SafeLoader as _Loader

MOST_ALIASES = 16  # a few stand for exponentially many values
DEEPEST = 40  # lists and mappings within each other; PyYAML's time grows with the square
_OPENING = re.compile(r"\ufeff?\s*---[ \t]*(\r\n|\n|\r)")
_CLOSING = re.compile(r"^---[ \t]*(?=[\r\n]|\Z)", re.MULTILINE)
_LINE_END = re.compile(r"\r\n|\n|\r")
_PLAIN = re.compile(r"[A-Za-z0-9][\w./-]*", re.ASCII)

# PyYAML lets Python's own errors out for values such as 2024-99-99
_YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)

_BEGINS = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_ENDS = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)

Edit = tuple[int, int, str]  # from, to, what to put there


def line_end(text: str) -> str:
    """How the first line of a text ends: `\\n`, `\\r\\n` or `\\r`; `\\n` if it has only one."""
    found = _LINE_END.search(text)
    return found[0] if found else "\n"


def with_metadata(
    card: str,
    *,
    tags: Sequence[str],
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
    library_name: str | None = None,
) -> str:
    """The card with these in its front matter, which is begun if there is none; all that was there stays as it was.

    Tags and data sets that are not there yet are added to their lists, and a single value becomes a list. Of the others a
    single value that a person gave is left alone; a base model is added to a list of base models.

    Args:
        card: text of a `README.md`, its line ends as they are.
        tags: to add.
        base_model: repository that this one is derived from or speaks of; not the repository itself.
        datasets: ids on the Hub, to add.
        license: set if none is given.
        library_name: set if none is given.

    Raises:
        BlueprintError: if the front matter is no YAML mapping or is not closed, or nothing can be added without changing
            what is there; names the line.
    """
    begin, end = _span(card)
    if begin is None:
        newline = line_end(card)
        mark = "\ufeff" if card.startswith("\ufeff") else ""
        rest = card.removeprefix(mark)
        gap = newline if rest.strip() and not rest.startswith(newline) else ""
        inner = _extended("", newline, tags, base_model, datasets, license, library_name)
        return f"{mark}---{newline}{inner}---{newline}{gap}{rest}" if inner else card
    _require_simple(card[begin:end])
    inner = _extended(card[begin:end], line_end(card), tags, base_model, datasets, license, library_name)
    return card[:begin] + inner + card[end:]


def _span(card: str) -> tuple[int | None, int]:
    """Where the YAML between the lines of three hyphens begins and ends; None if the card has none."""
    opening = _OPENING.match(card)
    if opening is None:
        return None, 0
    closing = _CLOSING.search(card.replace("\r", "\n"), opening.end())
    if closing is None:
        raise BlueprintError(
            f"The card's front matter begins in line {_line_of(card, opening.end() - 1)} with --- and no line --- ends "
            "it. Close it, or put a line of text before it if it is only a ruler."
        )
    return opening.end(), closing.start()


def _extended(
    text: str,
    newline: str,
    tags: Sequence[str],
    base_model: str | None,
    datasets: Sequence[str],
    license: str | None,
    library_name: str | None,
) -> str:
    """The YAML with each addition in turn, checked after each."""
    for key, values in (("license", license), ("library_name", library_name)):
        if values is not None:
            text = _with_values(text, newline, key, [values], is_list=False)
    text = _with_values(text, newline, "tags", tags, is_list=True)
    if base_model is not None:
        present = _loaded(text).get("base_model")
        if present is None or isinstance(present, list):
            text = _with_values(text, newline, "base_model", [base_model], is_list=isinstance(present, list))
    return _with_values(text, newline, "datasets", datasets, is_list=True)


def _with_values(text: str, newline: str, key: str, values: Sequence[str], *, is_list: bool) -> str:
    old = _loaded(text)
    present = old.get(key)
    if present is not None and not is_list:
        return text
    existing = present if isinstance(present, list) else [] if present is None else [present]
    missing = [value for value in dict.fromkeys(values) if value not in existing]
    if not missing:
        return text
    wanted: dict[Any, Any] = copy.deepcopy(old)
    wanted[key] = [*existing, *missing] if is_list else missing[0]
    added = [_scalar(value) for value in missing]
    for begin, end, replacement in _edits(text, newline, key, added, is_list):
        changed = text[:begin] + replacement + text[end:]
        try:
            # by their text, in which 1, 1.0 and true differ and a NaN is like a NaN
            if repr(_loaded(changed)) == repr(wanted):
                return changed
        except BlueprintError:
            continue
    raise BlueprintError(
        f"{', '.join(missing)} cannot be added to {key} in the card's front matter without changing what a person wrote "
        f"there. Add it by hand, as {key}: [{', '.join(added)}]."
    )


def _edits(text: str, newline: str, key: str, added: list[str], is_list: bool) -> Iterator[Edit]:
    """Ways to add the values under a key, the one that looks best first; the first that reads right is taken."""
    root = _composed(text)
    if root is None:
        yield len(text), len(text), _block(key, added, newline, "", is_list)
        return
    node = next((value for name, value in reversed(root.value) if name.value == key), None)
    if node is None:
        yield from _new_key(text, root, newline, key, added, is_list)
    elif isinstance(node, yaml.SequenceNode):
        yield from _longer_list(text, node, newline, added)
    elif isinstance(node, yaml.ScalarNode):
        begin, end = node.start_mark.index, node.end_mark.index
        if node.tag == "tag:yaml.org,2002:null":
            flow = f"[{', '.join(added)}]" if is_list else added[0]
            yield begin, end, flow if text[:begin].endswith((" ", "\t")) else f" {flow}"
        else:
            yield begin, end, f"[{text[begin:end]}, {', '.join(added)}]"
            indent = " " * root.start_mark.column
            dashes = "".join(f"{indent}- {value}{newline}" for value in (text[begin:end], *added))
            rest = _end_of_line(text, end)
            yield begin, rest, f"{text[end:rest].strip()}{newline}{dashes}"


def _new_key(
    text: str, root: yaml.MappingNode, newline: str, key: str, added: list[str], is_list: bool
) -> Iterator[Edit]:
    if root.flow_style:
        entry = f"{key}: [{', '.join(added)}]" if is_list else f"{key}: {added[0]}"
        if root.value:
            yield _after(root.value[-1][1], f", {entry}")
        else:
            yield root.start_mark.index + 1, root.start_mark.index + 1, entry
        return
    block = _block(key, added, newline, " " * root.start_mark.column, is_list)
    yield len(text), len(text), block if text.endswith(("\n", "\r")) else newline + block


def _longer_list(text: str, node: yaml.SequenceNode, newline: str, added: list[str]) -> Iterator[Edit]:
    if node.flow_style:
        if node.value:
            yield _after(node.value[-1], f", {', '.join(added)}")
        else:
            yield node.start_mark.index + 1, node.start_mark.index + 1, ", ".join(added)
        return
    last: yaml.Node = node
    while isinstance(last, yaml.CollectionNode) and not last.flow_style and last.value:
        last = last.value[-1][1] if isinstance(last, yaml.MappingNode) else last.value[-1]
    place = last.end_mark.index
    if not text[:place].endswith(("\n", "\r")):
        place = _end_of_line(text, place)
    lines = "".join(f"{' ' * node.start_mark.column}- {value}{newline}" for value in added)
    yield place, place, lines if text[:place].endswith(("\n", "\r")) else newline + lines


def _after(node: yaml.Node, what: str) -> Edit:
    return node.end_mark.index, node.end_mark.index, what


def _block(key: str, added: list[str], newline: str, indent: str, is_list: bool) -> str:
    if not is_list:
        return f"{indent}{key}: {added[0]}{newline}"
    return f"{indent}{key}:{newline}" + "".join(f"{indent}- {value}{newline}" for value in added)


def _end_of_line(text: str, place: int) -> int:
    """Just after the line end that follows."""
    found = _LINE_END.search(text, place)
    return found.end() if found else len(text)


def _scalar(value: str) -> str:
    """A text as YAML: plain where that reads as the same text, else in double quotes."""
    is_plain = _PLAIN.fullmatch(value) and yaml.safe_load(value) == value
    return value if is_plain else json.dumps(value, ensure_ascii=False)


@functools.lru_cache(maxsize=4)
def _loaded(text: str) -> dict[Any, Any]:
    """What the YAML says; not to be changed by the caller."""
    with _in_our_words():
        value = yaml.load(text, Loader=_Loader)
    if value is not None and not isinstance(value, dict):
        raise BlueprintError(
            "The card's front matter, between the first two lines of ---, is not a mapping of keys to values. Correct it, "
            "or put a line of text before it if they are only rulers."
        )
    return value or {}


def _require_simple(text: str) -> None:
    """Raise BlueprintError for YAML that takes unreasonably long to read."""
    depth = aliases = 0
    with _in_our_words():
        for token in yaml.scan(text, Loader=_Loader):
            depth += isinstance(token, _BEGINS) - isinstance(token, _ENDS)
            aliases += isinstance(token, yaml.AliasToken)
            if depth > DEEPEST or aliases > MOST_ALIASES:
                raise BlueprintError(
                    f"The card's front matter has more than {MOST_ALIASES} YAML aliases (*name), or lists within lists "
                    f"deeper than {DEEPEST}, and is not read. Write it plainly."
                )


def _composed(text: str) -> yaml.MappingNode | None:
    with _in_our_words():
        return yaml.compose(text, Loader=_Loader)


@contextmanager
def _in_our_words() -> Iterator[None]:
    try:
        yield
    except BlueprintError:
        raise
    except _YAML_ERRORS as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        where = f", line {mark.line + 1} of it" if mark is not None else ""
        reason = error.problem if isinstance(error, yaml.MarkedYAMLError) else type(error).__name__
        raise BlueprintError(
            f"The card's front matter, between the first two lines of ---, is not YAML ({reason}{where}). Correct it."
        ) from error


def _line_of(text: str, index: int) -> int:
    return len(_LINE_END.findall(text[: index + 1])) or 1
