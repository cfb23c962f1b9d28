"""Documents quote what a study says, between two marks, so that neither can disagree with the other.

    <!-- contest_gsm8k: whole -->
    ...
    <!-- contest_gsm8k: end -->

Pure functions of texts and of a study's summary. Knows nothing of files.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from typing import Any

from .report import in_short, markdown


WIDTH = 120
_QUOTE = re.compile(r"(<!-- (\w+): (whole|short) -->\n).*?(<!-- \2: end -->)", re.DOTALL)


def requoted(text: str, summary: Mapping[str, Any]) -> str:
    """A document whose quotes of a study are those of this summary; the whole report, or what it says in short."""

    def fresh(found: re.Match[str]) -> str:
        begin, study, extent, end = found.groups()
        if study != summary["study"]:
            return found.group()
        return f"{begin}{wrapped(markdown(summary) if extent == 'whole' else in_short(summary))}\n{end}"

    return _QUOTE.sub(fresh, text)


def quotes_of(text: str) -> set[str]:
    """The studies that a document quotes."""
    return {found.group(2) for found in _QUOTE.finditer(text)}


def wrapped(text: str) -> str:
    """Prose in lines of a document's width; tables as they are."""
    return "\n".join(
        line if line.startswith("|") else textwrap.fill(line, WIDTH, break_long_words=False, break_on_hyphens=False)
        for line in text.split("\n")
    )
