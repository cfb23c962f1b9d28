"""How every verb answers: as JSON, as bare lines or as a table on stdout, with all else on stderr; and shared options.

Knows no verb, no blueprint and no tensor library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import BlueprintError


Source = Annotated[str, typer.Argument(help="A blueprint: file (JSON or CSV), folder, or repository id on the Hub.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the bare answer, and no progress.")]


def print_answer(
    data: Any, rows: Sequence[Mapping[str, Any]], as_json: bool, quiet: bool, bare: Sequence[str], title: str
) -> None:
    """The answer on stdout: as JSON, as bare lines, or as a table."""
    if as_json:
        print(json.dumps(data, indent=2, allow_nan=False))
    elif quiet:
        print("\n".join(bare))
    else:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        print(title)
        table = Table()
        for column in columns:
            is_number = any(isinstance(row.get(column), int | float) for row in rows)
            table.add_column(escape(column), justify="right" if is_number else "left", overflow="fold")
        for row in rows:
            table.add_row(*(_cell(row.get(column)) for column in columns))
        # a file or a pipe has no width: names stay whole there
        Console(soft_wrap=False, width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


def pairs_of(text: str) -> dict[str, str]:
    """The option `--columns prompt=question,completion=answer` as a mapping.

    Raises:
        BlueprintError: for anything else.
    """
    pairs = [item.split("=", 1) for item in text.split(",") if item]
    if any(len(pair) != 2 for pair in pairs):
        raise BlueprintError(f"--columns {text}: write prompt=question,completion=answer.")
    return {key.strip(): value.strip() for key, value in pairs}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def say(text: str) -> None:
    """A line on stderr, where all goes that is not the answer."""
    print(text, file=sys.stderr)
