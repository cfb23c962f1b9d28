"""A report as one page of HTML that asks for nothing from anywhere: styles and pictures are in it.

Needs matplotlib, the `plots` extra. Knows nothing of how runs are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .._files import write_atomically
from .._text import format_names
from ..blueprint import Blueprint, from_dict
from ..errors import BlueprintError
from ..place import Placement
from ..runs import RESOURCES, UNITS, Report, Row, RunRecord, series
from . import report_pictures as pictures
from .words import ABSENT, NAMES, headline, number, per, quantity, rate, score, sentence, stopping_words, times


TEMPLATE = "report.html.jinja"
MOST_ROWS = 60  # of a table of a placement

_TOGETHER = re.compile(r"(?<=\d) (?=[×%]|[^\W\d]{1,5}\b)")  # a number and its unit stay on one line
_DEPTH = re.compile(r"\.(\d+)\.")


def render_page(report: Report) -> str:
    """The page: what was gained for what was spent, the runs, the curves, the Pareto front, placements and notes.

    Starts with the curve against the report's resource. Whatever comes from a record is escaped.

    Raises:
        BlueprintError: without matplotlib.
    """
    drawn = pictures.resources_drawn(report, RESOURCES)
    panels = [
        {"id": name or "step", "name": "steps" if name is None else NAMES[name], "svg": Markup(svg)}
        for name in (*drawn, None)
        if (svg := pictures.curve(report, name)) is not None
    ]
    shown = report.resource if report.resource in drawn else "step"
    front = pictures.front(report)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["number"] = number
    template = environment.from_string(resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        report=report,
        title=" and ".join(row.name for row in report.rows[:2])
        if len(report.rows) < 3
        else f"{len(report.rows)} runs",
        headline=_TOGETHER.sub("\u00a0", headline(report)),
        facts=_facts(report.rows[0], report) if len(report.rows) == 1 else [],
        rows=[_row(i, row, report) for i, row in enumerate(report.rows)],
        has_baseline=report.baseline is not None,
        models=list(dict.fromkeys(str(model) for row in report.rows if (model := row.record.about.get("model_id")))),
        per=per(report.resource),
        spent=NAMES[report.resource],
        samples=[Markup(pictures.sample(i)) for i in range(len(report.rows))],
        panels=panels,
        shown=shown if any(panel["id"] == shown for panel in panels) else panels[0]["id"] if panels else "",
        is_of_losses=all(row.metric is None for row in report.rows),
        front=Markup(front) if front else "",
        totals=[_totals(name, report) for name in UNITS],
        sources=[_sources(row) for row in report.rows],
        stopping=[(row.name, words) for row in report.rows if (words := stopping_words(row))],
        placements=[found for i, row in enumerate(report.rows) if (found := _placement(i, row.record))],
    )


def save_page(report: Report, path: str | Path) -> Path:
    """Write the page. Returns the file.

    Raises:
        BlueprintError: without matplotlib, or if it cannot be written.
    """
    path = Path(path)
    write_atomically(path, render_page(report).encode("utf-8", "replace"))
    return path


def _facts(row: Row, report: Report) -> list[dict[str, str]]:
    """The few figures that a single run comes down to."""
    facts = [
        {"name": report.metric, "value": score(row.metric), "how": "at the last evaluation"},
        {"name": NAMES[report.resource], "value": quantity(row.spent.value, report.resource), "how": row.spent.how},
    ]
    if row.gain is not None:
        start = "the untrained model" if row.first_step == 0 else f"step {row.first_step}"
        facts.insert(1, {"name": "gain", "value": score(row.gain), "how": f"since {start}"})
    if row.ratio is not None:
        facts.append(
            {
                "name": "last window",
                "value": rate(row.ratio, report.unit),
                "how": f"gain over the last {row.window} evaluations",
            }
        )
    return facts


def _row(index: int, row: Row, report: Report) -> dict[str, Any]:
    return {
        "name": row.name,
        "sentence": sentence(row, report),
        "metric": score(row.metric),
        "spent": quantity(row.spent.value, report.resource),
        "how": row.spent.how,
        "gain": score(row.gain),
        "per_resource": number(row.per_resource),
        "relative": times(row.relative),
        "ratio": number(row.ratio),
        "to_baseline": ABSENT if row.is_baseline else _to_baseline(row, report),
        "at_budget": score(row.at_budget),
        "front": {True: "front", False: "beaten", None: ABSENT}[row.on_front],
        "is_baseline": row.is_baseline,
        "model": str(row.record.about.get("model_id") or ""),
    }


def _to_baseline(row: Row, report: Report) -> str:
    base = report.baseline
    if row.to_baseline is None:
        is_known = base is not None and base.metric is not None and series(row.record, report.resource, report.metric)
        return "not reached" if is_known else ABSENT
    return quantity(row.to_baseline, report.resource)


def _totals(name: str, report: Report) -> dict[str, Any]:
    figures = [row.record.total(name) for row in report.rows]
    return {
        "name": NAMES[name],
        "cells": [
            {"value": quantity(figure.value, name), "how": figure.how, "source": figure.source} for figure in figures
        ],
    }


def _sources(row: Row) -> dict[str, Any]:
    """From what each figure of a run is, those of the same origin together."""
    by_source: dict[str, list[str]] = {}
    for name in UNITS:
        figure = row.record.total(name)
        if figure.source:
            by_source.setdefault(f"{figure.how}: {figure.source}", []).append(NAMES[name])
    return {"name": row.name, "lines": [(", ".join(names), source) for source, names in by_source.items()]}


def _placement(index: int, record: RunRecord) -> dict[str, Any] | None:
    """What was adapted in a run: a line, a table by kind, and the blueprint's heat map where there is one."""
    about = record.about
    blueprint, note = _blueprint(about.get("blueprint"))
    found = about.get("placement")
    found = found if isinstance(found, Mapping) else {}
    lora = found.get("lora") or {}
    names = [name for name in lora if isinstance(name, str)] if isinstance(lora, Mapping | list) else []
    ranks = {name: lora[name] if isinstance(lora, Mapping) else None for name in names}
    blocks = found.get("unfreeze")
    unfreeze = tuple(map(str, blocks)) if isinstance(blocks, list | tuple) else ()
    if not ranks and not unfreeze and blueprint is None:
        return None
    svg = None
    if blueprint is not None:
        differ = len(set(ranks.values())) > 1
        placement = Placement(
            model_id=blueprint.model_id,
            lora=tuple(ranks),
            unfreeze=unfreeze,
            rank_by="gradient_norm",
            coverage="none",
            ranks={name: rank for name, rank in ranks.items() if isinstance(rank, int)} if differ else {},
        )
        svg = pictures.heat_map(blueprint, placement if ranks or unfreeze else None, f"map-{index}")
    parts = [f"{len(ranks)} adapters"] if ranks else []
    parts += [f"{format_names(list(unfreeze))} trained whole"] if unfreeze else []
    return {
        "name": record.name,
        "line": " and ".join(parts),
        "trainable": _count(about.get("trainable_parameters")),
        "total": _count(about.get("total_parameters")),
        "kinds": _kinds(ranks),
        "svg": Markup(svg) if svg else "",
        "note": note,
    }


def _blueprint(source: Any) -> tuple[Blueprint | None, str]:
    """From an object or a file that is here; the network is never asked."""
    try:
        if isinstance(source, Mapping):
            return from_dict(source), ""
        if isinstance(source, str) and source:
            if Path(source).exists():
                return Blueprint.from_pretrained(source), ""
            return None, f"The blueprint {source} is not here, so that its heat map is not drawn."
    except (BlueprintError, OSError) as error:
        return None, f"The blueprint cannot be drawn: {error}"
    return None, ""


def _kinds(ranks: Mapping[str, Any]) -> list[dict[str, str]]:
    """By kind: in how many and which layers, with what ranks."""
    by_kind: dict[str, list[tuple[int | None, Any]]] = {}
    for name, rank in ranks.items():
        depth = _DEPTH.search(name)
        by_kind.setdefault(name.rpartition(".")[2], []).append((int(depth[1]) if depth else None, rank))
    rows = []
    for kind, members in list(by_kind.items())[:MOST_ROWS]:
        known = sorted({rank for _, rank in members if isinstance(rank, int)})
        of_rank = "" if not known else str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"
        layers = _runs(sorted({depth for depth, _ in members if depth is not None}))
        rows.append({"kind": kind, "count": str(len(members)), "layers": layers, "ranks": of_rank})
    return rows


def _runs(numbers: Sequence[int]) -> str:
    """Numbers as stretches: `0–3, 7, 9–11`."""
    stretches: list[list[int]] = []
    for n in numbers:
        if stretches and n == stretches[-1][-1] + 1:
            stretches[-1].append(n)
        else:
            stretches.append([n])
    return ", ".join(str(s[0]) if len(s) == 1 else f"{s[0]}–{s[-1]}" for s in stretches)


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else ""
