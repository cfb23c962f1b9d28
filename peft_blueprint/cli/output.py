"""Print a verb's answer on stdout as a table, JSON or bare lines, and everything else on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from .. import blueprint as records
from .._secrets import masked
from .._text import printable
from ..errors import BlueprintError


if TYPE_CHECKING:
    from ..blueprint import Blueprint, Submodule


Format = Literal["table", "json", "quiet"]

# Statistics that a table of a blueprint shows where an entry has them, beside the one that it is sorted by.
_SHOWN = ("gradient_norm", "norm_interval", "signal_norm", "adam_gain", "alpha", "gamma", "k_star", "domain_tags")
_MOST_TAGS = 4  # of an entry
_MOST_EXPERTS = 4  # of a layer
TOP = 20  # entries
_UNLIMITED = 10_000  # characters of a line
_TAG = "domain_tags."  # before a domain's name
_HEADINGS = {"norm_interval": "95 %"}
_OPTIONAL = ("signal_norm", "95 %", "kind", "adam_gain")  # left out, in this order, of a terminal that is too narrow


def say(text: str) -> None:
    """Print a line on stderr, without secrets and control characters."""
    print(printable(masked(text)), file=sys.stderr)


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

    def answer(
        self,
        data: Any,
        rows: Sequence[Mapping[str, Any]],
        bare: Sequence[str],
        title: str,
        optional: Sequence[str] = (),
    ) -> None:
        """Print the verb's answer on stdout.

        Args:
            data: what `--format json` prints, as one JSON value.
            rows: of the table, by column.
            bare: lines that `--format quiet` prints.
            title: line above the table.
            optional: columns to leave out, in this order, of a terminal that is too narrow for all.
        """
        if self.format == "json":
            print(json.dumps(data, indent=2, allow_nan=False))
        elif self.format == "quiet":
            print("\n".join("\t".join(map(printable, line.split("\t"))) for line in bare))
        else:
            print(printable(title))
            _print_table(rows, optional)

    def blueprint(self, blueprint: Blueprint, by: str, top: int | None, bare: Sequence[str]) -> None:
        """Answer with a blueprint: its `top` entries by a statistic (0 for all), or the whole record as JSON.

        Without `top` it is 20 entries, or a line for each layer of single experts.
        """
        summary = experts_by_layer(blueprint, by) if top is None and self.format == "table" else []
        entries = ranked(blueprint, by)[: (TOP if top is None else top) or None]
        shown = [name for name in _SHOWN if any(getattr(entry, name) not in (None, {}) for entry in entries)]
        rows = [
            {"id": entry.name, "kind": entry.kind}
            | {_HEADINGS.get(name, name): _statistic(getattr(entry, name)) for name in shown}
            | {by: statistic_of(entry, by)}
            for entry in entries
        ]
        best = records.describe_k_star(blueprint)
        title = (
            f"{blueprint.model_id}: {len(blueprint)} {blueprint.level}s, training_checkpoint "
            f"{blueprint.training_checkpoint:g}{_concentration(blueprint)}{', k* ' if best else ''}{best}"
            f"{_influence(blueprint)}"
        )
        if summary:
            self.answer(None, summary, bare, f"{title}; experts by {by}")
            return
        if len(entries) < len(blueprint):
            title += f"; the {len(entries)} largest by {by}"
        optional = [column for column in _OPTIONAL if column != by]
        self.answer(records.to_dict(blueprint) if self.format == "json" else None, rows, bare, title, optional)

    def hint(self, text: str) -> None:
        """Print the next command for a person, and nothing for programs and pipelines."""
        if self.format == "table":
            say(text)


def experts_by_layer(blueprint: Blueprint, by: str) -> list[dict[str, Any]]:
    """Summarize single experts by layer: how many hold half and nine tenths of a statistic, and the largest.

    Empty without single experts, or for a statistic that does not add up over the weights of an expert.
    """
    try:
        scores = records.expert_scores(blueprint, by)
    except BlueprintError:  # another statistic
        return []
    rows = []
    for layer, of_layer in scores.items():
        total = math.fsum(of_layer.values()) or 1.0
        largest = records.top_p_experts(of_layer, 1.0)[:_MOST_EXPERTS]
        rows.append(
            {
                "layer": layer,
                "experts": len(of_layer),
                **{f"hold {p:.0%}": len(records.top_p_experts(of_layer, p)) for p in (0.5, 0.9)},
                "unused": sum(not score for score in of_layer.values()),
                "largest": ", ".join(f"{expert} ({of_layer[expert] / total:.1%})" for expert in largest),
            }
        )
    return rows


def ranked(blueprint: Blueprint, by: str) -> list[Submodule]:
    """Return a blueprint's entries with the largest statistic first, and those without it last.

    Args:
        blueprint: of any level.
        by: a number that entries have: a statistic, `norm_error`, a ratio as `domain_tags.NAME`, or a key that this
            version does not know.

    Raises:
        BlueprintError: if no entry has it.
    """
    values = {entry.name: statistic_of(entry, by) for entry in blueprint}
    if all(value is None for value in values.values()):
        names = [*records.NUMBERS, "norm_error", *(f"{_TAG}{tag}" for tag in blueprint.submodules[0].domain_tags)]
        known = [name for name in names if any(statistic_of(entry, name) is not None for entry in blueprint)]
        raise BlueprintError(f"by must be one of {', '.join(known)}, which {blueprint.model_id!r} has, got {by!r}.")
    return sorted(blueprint, key=lambda entry: -math.inf if (v := values[entry.name]) is None else v, reverse=True)


def statistic_of(entry: Submodule, by: str) -> float | None:
    """Return one number of an entry, see `ranked`, or None if it has none."""
    if by in (*records.NUMBERS, "norm_error"):
        value = getattr(entry, by)
    elif by.startswith(_TAG):
        value = entry.domain_tags.get(by.removeprefix(_TAG))
    else:
        value = entry.extra.get(by)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _print_table(rows: Sequence[Mapping[str, Any]], optional: Sequence[str]) -> None:
    # A file or a pipe has no width: names stay whole there.
    console = Console(
        soft_wrap=False, width=None if sys.stdout.isatty() else _UNLIMITED, highlight=False, markup=False, emoji=False
    )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    left_out: list[str] = []
    for column in (column for column in optional if column in columns):
        unlimited = console.options.update(width=_UNLIMITED)
        if Measurement.get(console, unlimited, _table(rows, columns)).maximum <= console.width:
            break
        columns.remove(column)
        left_out.append(column)
    console.print(_table(rows, columns))
    if left_out:
        say(f"This terminal is too narrow for {', '.join(left_out)}; --format json has all.")


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Table:
    table = Table()
    for column in columns:
        is_number = any(isinstance(row.get(column), int | float) for row in rows)
        table.add_column(printable(column), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    return table


def _statistic(value: Any) -> Any:
    """Return a cell for a statistic: an interval, or ratios by domain, as one text."""
    if isinstance(value, Mapping):
        tags = ", ".join(f"{tag} {ratio:.3g}" for tag, ratio in list(value.items())[:_MOST_TAGS])
        return tags + (f" and {len(value) - _MOST_TAGS} more" if len(value) > _MOST_TAGS else "")
    return "–".join(f"{end:.3g}" for end in value) if isinstance(value, tuple) else value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def _influence(blueprint: Blueprint) -> str:
    """Describe how the ranking by influence agrees with that by gradient norm, where the file has it."""
    rho = blueprint.influence.get("rank_correlation")
    return f", influence ranks against gradient norms {rho:+.2f}" if isinstance(rho, int | float) else ""


def _concentration(blueprint: Blueprint) -> str:
    """Describe how concentrated the norms are within kinds, where the file has it."""
    known = blueprint.concentration
    try:
        gamma = f", gamma_fit {known['gamma_fit']:.3f}" if "gamma_fit" in known else ""
        tail = known.get("tail_within_kinds") or known.get("tail") or {}
        if "gini" not in tail:
            return gamma
        gini = tail["gini"]
        return f"{gamma}, Gini {gini['value']:.2f} [{gini['low']:.2f}, {gini['high']:.2f}], tail: {tail['verdict']}"
    except (KeyError, TypeError, ValueError):  # a file may hold anything here
        return ""
