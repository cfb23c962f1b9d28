"""Replace marked sections of a model card, and escape text from records for Markdown."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from ..errors import BlueprintError


MAX_CHARACTERS = 400  # of one value of a record

_MARK = re.compile(r"<!--[ \t]*(gradient-blueprint[ \t]+\S+|peft-blueprint[ \t]+cost)[ \t]+(begin|end)[ \t]*-->")
_LINE_END = re.compile(r"\r\n|\n|\r")
_CODE = re.compile(r"[A-Za-z0-9 .:/,=+@%'\"()\[\]{}#?!;*&~^$_-]+")
# everything that could begin a tag, a link, an emphasis or a cell of Markdown; an underscore within a word does not
_SPECIAL = re.compile(r"[^\w\s,;%()/'=+.:×–±₂⁻-]|(?<![^\W_])_|_(?![^\W_])|:(?=\S)|(?<=www)\.", re.IGNORECASE)


def line_end(text: str) -> str:
    """Return how the first line of a text ends: `\\n`, `\\r\\n` or `\\r`; `\\n` if it has only one line."""
    found = _LINE_END.search(text)
    return found[0] if found else "\n"


def marked(section: str, name: str) -> str:
    """Put a section between its two marks, HTML comments with its name."""
    return f"<!-- {name} begin -->\n{section.strip()}\n<!-- {name} end -->"


def with_section(card: str, section: str, name: str) -> str:
    """Put a marked section into a card, in place of its former version or at the end. The rest stays, byte for byte.

    Args:
        card: text of a `README.md`.
        section: as `marked` returns it.
        name: `gradient-blueprint FILE` or `peft-blueprint cost`.

    Raises:
        BlueprintError: if marks in the card do not pair up; names the line.
    """
    newline = line_end(card)
    section = section.replace("\n", newline)
    span = _find_section(card, name)
    if span is not None:
        return card[: span[0]] + section + card[span[1] :]
    if not card.strip("\ufeff"):
        return f"{card}{section}{newline}"
    gap = newline if card.endswith(("\n", "\r")) else newline * 2
    return f"{card}{gap}{section}{newline}"


def _find_section(card: str, name: str) -> tuple[int, int] | None:
    """Return start and end of a section, or None; raise unless every mark in the card is one of a pair."""
    found, opened = None, None
    seen: set[str] = set()
    for mark in _MARK.finditer(card):
        own, kind, line = " ".join(mark[1].split()), mark[2], _line_of(card, mark.start())
        if kind == "begin":
            if opened is not None:
                raise _unpaired(own, f"begins in line {line} inside the section of line {_line_of(card, opened[1])}")
            if own in seen:
                raise _unpaired(own, f"begins a second time in line {line}")
            seen.add(own)
            opened = own, mark.start()
        else:
            if opened is None or opened[0] != own:
                raise _unpaired(own, f"ends in line {line} without a beginning")
            if own == name:
                found = opened[1], mark.end()
            opened = None
    if opened is not None:
        raise _unpaired(opened[0], f"begins in line {_line_of(card, opened[1])} and does not end")
    return found


def _unpaired(name: str, problem: str) -> BlueprintError:
    return BlueprintError(
        f"The model card's section '{name}' {problem}. Restore or delete the marks <!-- {name} begin --> and "
        f"<!-- {name} end --> so that there is one pair."
    )


def _line_of(text: str, index: int) -> int:
    return len(_LINE_END.findall(text[:index])) + 1


def as_text(value: Any, longest: int = MAX_CHARACTERS) -> str:
    """Return a record's value as one line of Markdown text, with nothing in it that has a meaning in Markdown or HTML."""
    return _escaped(one_line(value, longest))


def as_code(value: Any) -> str:
    """Return a record's value as inline code: between backticks where that shows it unchanged, otherwise in HTML."""
    text = one_line(value)
    return f"`{text}`" if _CODE.fullmatch(text) else f"<code>{_escaped(text)}</code>"


def one_line(value: Any, longest: int = MAX_CHARACTERS) -> str:
    """Return a value as text without line ends, control characters and direction marks, cut at `longest` characters."""
    kinds = ((char, unicodedata.category(char)) for char in str(value)[: 4 * longest])
    shown = "".join(
        "\ufffd" if kind in ("Cf", "Cs", "Co") else " " if kind[0] in "CZ" else char for char, kind in kinds
    )
    shown = " ".join(shown.split()) or "(empty)"
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def _escaped(text: str) -> str:
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", text)
