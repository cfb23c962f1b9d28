"""What a verb prints: one answer on stdout as a table, JSON or bare lines, and everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import blueprint as records


if TYPE_CHECKING:
    from ..blueprint import Blueprint


Format = Literal["table", "json", "quiet"]


def say(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr)


@dataclass(frozen=True)
class Output:
    """The form in which a verb answers.

    Args:
        format: `"table"` for people, `"json"` for programs, `"quiet"` for shell pipelines: bare lines and no progress.
    """

    format: Format = "table"

    @property
    def progress(self) -> bool:
        """Whether progress bars are shown, on stderr."""
        return self.format != "quiet"

    def answer(self, data: Any, rows: Sequence[Mapping[str, Any]], bare: Sequence[str], title: str) -> None:
        """Print the verb's answer on stdout.

        Args:
            data: what `--format json` prints, as one JSON value.
            rows: of the table, by column.
            bare: lines that `--format quiet` prints.
            title: line above the table.
        """
        if self.format == "json":
            print(json.dumps(data, indent=2, allow_nan=False))
        elif self.format == "quiet":
            print("\n".join(bare))
        else:
            print(title)
            _print_table(rows)

    def blueprint(self, blueprint: Blueprint, by: str, top: int, bare: Sequence[str]) -> None:
        """Answer with a blueprint: its `top` entries by a statistic (0 for all), or the whole record as JSON."""
        ranked = sorted(blueprint, key=lambda entry: -records.score_of(entry, by))[: top or None]
        rows = [
            {
                "id": entry.name,
                "kind": entry.kind,
                "gradient_norm": entry.gradient_norm,
                "95 %": "–".join(f"{x:.3g}" for x in entry.norm_interval) if entry.norm_interval else None,
                "signal_norm": entry.signal_norm,
                "adam_gain": entry.adam_gain,
            }
            for entry in ranked
        ]
        title = f"{blueprint.model_id}: {len(blueprint)} {blueprint.level}s{_concentration(blueprint)}"
        if len(ranked) < len(blueprint):
            title += f"; the {len(ranked)} largest by {by}"
        self.answer(records.to_dict(blueprint) if self.format == "json" else None, rows, bare, title)

    def hint(self, text: str) -> None:
        """Tell a person what to do next; programs and pipelines are not told."""
        if self.format == "table":
            say(text)


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table()
    for column in columns:
        is_number = any(isinstance(row.get(column), int | float) for row in rows)
        table.add_column(escape(column), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    # A file or a pipe has no width: names stay whole there.
    Console(soft_wrap=False, width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def _concentration(blueprint: Blueprint) -> str:
    """Describe how concentrated the norms are within kinds, where the file has it."""
    known = blueprint.concentration
    gamma = f", gamma_fit {known['gamma_fit']:.3f}" if "gamma_fit" in known else ""
    tail = known.get("tail_within_kinds") or known.get("tail")
    if not isinstance(tail, Mapping) or "gini" not in tail:
        return gamma
    gini = tail["gini"]
    return f"{gamma}, Gini {gini['value']:.2f} [{gini['low']:.2f}, {gini['high']:.2f}], tail: {tail['verdict']}"
