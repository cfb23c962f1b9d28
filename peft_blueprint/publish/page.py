"""Render a report as one self-contained HTML page with its pictures; needs matplotlib, the `plots` extra."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from .._files import write_atomically
from .._text import format_names
from ..blueprint import ADAPTABLE, Blueprint, from_dict, parameter_share
from ..errors import BlueprintError
from ..place import Placement
from ..runs import (
    RESOURCES,
    UNITS,
    Report,
    Row,
    RunRecord,
    format_number,
    format_quantity,
    series,
    series_with_errors,
    unit_for,
)
from .plots import drawing_style, plot_blueprint
from .words import (
    ABSENT,
    RESOURCE_NAMES,
    describe_stop,
    format_multiple,
    format_score,
    headline,
    hyperparameters,
    model_name,
    parts_of,
    per_unit,
    rate,
)


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPLATE = "report.html.jinja"
MAX_ROWS = 60  # of a table of a placement
MANY = 40  # points of a training loss, from which its running mean is drawn
WIDE, NARROW = (10.4, 4.0), (3.7, 3.3)  # inches of a chart
_WINDOW = (7.0, 4.0)  # in a notebook

COLOURS = ("#2f6690", "#c8553d", "#4f8a5b", "#8a5fa8", "#b8860b", "#3c8d93", "#a84a78", "#5b6770")
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2.5)), (0, (1.5, 2)), (0, (6, 2, 1.5, 2)))  # of further runs
INK, MUTED, GRID = "#1d2326", "#667076", "#d8dcda"

_UNBREAKABLE = re.compile(r"(?<=\d) (?=[×%]|[^\W\d]{1,5}\b)")  # between a number and its unit
_DEPTH = re.compile(r"\.(\d+)\.")


class Picture(NamedTuple):
    """An SVG as a `data:` address, its description for readers who do not see it, and its form for a phone."""

    address: str
    description: str
    narrow: str = ""


def render_page(report: Report) -> str:
    """Render the headline, the runs, curves, the Pareto front, totals, placements and notes as HTML.

    The page starts with the curve against the report's resource. Whatever comes from a record is escaped.

    Raises:
        BlueprintError: without matplotlib.
    """
    with drawing_style():
        panels = []
        for resource in (*RESOURCES, None):
            curves = [draw_curve(report, resource), draw_curve(report, resource, of_losses=True)]
            if pictures := [picture for picture in curves if picture is not None]:
                name = "steps" if resource is None else RESOURCE_NAMES[resource]
                panels.append({"id": resource or "step", "name": name, "pictures": pictures})
        samples = [draw_sample(i) for i in range(len(report.rows))]
        front = draw_front(report)
        placements = [found for row in report.rows if (found := _placement(row.record))]
    ids = [str(panel["id"]) for panel in panels]
    shown = report.resource if report.resource in ids else ids[0] if ids else ""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "number": format_number,
        "quantity": format_quantity,
        "multiple": format_multiple,
    }
    template = environment.from_string(resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    names = [row.name for row in report.rows]
    return template.render(
        report=report,
        title=" and ".join(names) if len(names) < 3 else f"{len(names)} runs",
        headline=_UNBREAKABLE.sub("\u00a0", headline(report)),
        facts=_facts(report.rows[0], report) if len(names) == 1 else [],
        to_baseline=[_to_baseline(row, report) for row in report.rows],
        absent=ABSENT,
        models=[model_name(row.record) for row in report.rows],
        per=per_unit(report),
        spent=RESOURCE_NAMES[report.resource],
        score=format_score,
        rate=lambda value: format_number(rate(value, report)),
        parts_of=parts_of,
        resource_names=RESOURCE_NAMES,
        samples=samples,
        panels=panels,
        shown=shown,
        has_errors=any(row.error is not None for row in report.rows),
        has_losses=any(row.record.losses for row in report.rows),
        front=front,
        settings=_settings(report),
        sources=[_sources(row) for row in report.rows],
        stopping=[(row.name, words) for row in report.rows if (words := describe_stop(row))],
        placements=placements,
    )


def save_page(report: Report, path: str | Path) -> Path:
    """Write the page. Returns the file.

    Raises:
        BlueprintError: without matplotlib, or if it cannot be written.

    Example:
        >>> import tempfile
        >>> from peft_blueprint.runs import RunRecord, make_report, measured
        >>> run = RunRecord("lora", "eval_loss", "minimize", "seconds", totals={"seconds": measured(60.0, "clock")})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_page(make_report([run]), f"{folder}/report.html").name
        'report.html'
    """
    path = Path(path)
    write_atomically(path, render_page(report).encode("utf-8", "replace"))
    return path


# ------------------------------------------------------------------------------------------ pictures


def draw_curve(report: Report, resource: str | None, of_losses: bool = False) -> Picture | None:
    """Draw the metric of every run against the resource spent, or against steps if the resource is None.

    Evaluations with a standard error have a bar of ± 1 of it. A training loss of many steps is drawn thin, and its
    running mean over a twentieth of them on top.

    Args:
        report: the runs.
        resource: for the x axis.
        of_losses: draw the training loss instead of the metric.

    Returns:
        None if no run has a point to draw.

    Raises:
        BlueprintError: without matplotlib.
    """
    found = _curve(report, resource, of_losses)
    return None if found is None else _picture(*found)


def plot_report(report: Report, resource: str | None = None) -> Figure:
    """Draw the metric of every run against the resource spent, as on the page.

    Args:
        report: the runs.
        resource: for the x axis, one of `RESOURCES`; by default the report's.

    Returns:
        A figure; `save_plot(figure, path)` writes it.

    Raises:
        BlueprintError: without matplotlib, for an unknown resource, or if no run has an evaluation at an amount spent.

    Example:
        >>> from peft_blueprint.runs import Point, make_report
        >>> points = (Point(0, {"seconds": 0.0}, {"loss": 3.0}), Point(9, {"seconds": 9.0}, {"loss": 2.1}))
        >>> figure = plot_report(make_report([RunRecord("a", "loss", "minimize", "seconds", points=points)]))
        >>> figure.axes[0].get_xlabel()
        'time, s'
    """
    resource = resource or report.resource
    if resource not in RESOURCES:
        raise BlueprintError(f"resource must be one of {', '.join(RESOURCES)}, got {resource!r}.")
    found = _curve(report, resource)
    if found is None:
        raise BlueprintError(
            f"No run of the report has {report.metric} at an amount of {resource} spent. Choose another resource, or "
            "evaluate during training."
        )
    draw, ylabel, _ = found
    figure = _figure(draw, ylabel, _WINDOW)
    if len(report.rows) > 1:
        names = [
            f" {row.name}" if row.name.startswith("_") else row.name for row in report.rows
        ]  # which it leaves out
        with drawing_style():
            from matplotlib.lines import Line2D

            figure.axes[0].legend([Line2D([], [], **_style(i)) for i in range(len(names))], names, frameon=False)
    return figure


def _curve(
    report: Report, resource: str | None, of_losses: bool = False
) -> tuple[Callable[[Axes], None], str, str] | None:
    """Return what draws the curve, the label of its y axis and its description; None without a point to draw."""
    lines = [
        _losses(row.record, resource) if of_losses else series(row.record, resource, report.metric)
        for row in report.rows
    ]
    largest = max((x for line in lines for x, _ in line), default=0.0)
    if largest <= 0:
        return None
    metric = "training loss" if of_losses else report.metric
    better = "lower" if of_losses or report.direction == "minimize" else "higher"
    unit, label = _label(resource, largest)

    def draw(axes: Axes) -> None:
        axes.set_xlabel(label, color=INK)
        for i, (row, line) in enumerate(zip(report.rows, lines, strict=True)):
            xs, ys = [x / unit for x, _ in line], [y for _, y in line]
            bars = [] if of_losses else series_with_errors(row.record, resource, report.metric)
            if any(error is not None for *_, error in bars):
                errors = [error or 0.0 for *_, error in bars]
                axes.errorbar(xs, ys, errors, **_style(i), elinewidth=1, capsize=2.5)
            elif len(line) > MANY:
                axes.plot(xs, ys, **_style(i, has_markers=False) | {"linewidth": 0.7, "alpha": 0.35})
                axes.plot(xs, _running_mean(ys), **_style(i, has_markers=False))
            else:
                axes.plot(xs, ys, **_style(i))
        axes.set_xlim(left=0)

    return draw, f"{metric} ({better} is better)", f"{metric} against {label}"


def draw_front(report: Report) -> Picture | None:
    """Draw where each run ended, and the Pareto front as a line; None if fewer than two runs have both figures.

    Raises:
        BlueprintError: without matplotlib.
    """
    ends = {
        i: (row.spent.value or 0.0, row.metric or 0.0) for i, row in enumerate(report.rows) if row.on_front is not None
    }
    if len(ends) < 2:
        return None
    least, most = min(x for x, _ in ends.values()), max(x for x, _ in ends.values())
    unit, label = _label(report.resource, most)

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import NullFormatter

        if least > 0 and most / least > 30:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label, color=INK)
        best = sorted((x / unit, y) for i, (x, y) in ends.items() if report.rows[i].on_front)
        axes.step([x for x, _ in best], [y for _, y in best], where="post", color=MUTED, linewidth=1.1, zorder=1)
        for i, (x, y) in ends.items():
            row, style = report.rows[i], _style(i) | {"linestyle": "none", "markersize": 8, "markeredgewidth": 1.5}
            face = style["color"] if row.on_front else "none"
            axes.errorbar([x / unit], [y], row.error, markerfacecolor=face, elinewidth=1, capsize=2.5, **style)
        axes.margins(0.12)

    better = "lower" if report.direction == "minimize" else "higher"
    text = f"{report.metric} against {label} of {len(ends)} runs, with the Pareto front"
    return _picture(draw, f"{report.metric} ({better} is better)", text)


def draw_sample(index: int) -> Picture:
    """Draw the line and marker of a run, for legends.

    Raises:
        BlueprintError: without matplotlib.
    """
    with drawing_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(28 / 72, 12 / 72))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 28), ylim=(0, 12))
        axes.axis("off")
        axes.plot([1, 27], [6, 6], **_style(index, has_markers=False))
        axes.plot([14], [6], **_style(index) | {"markersize": 6})
        return Picture(_address(figure), "")


def _heat_map(blueprint: Blueprint, placement: Placement | None) -> Picture | None:
    """Draw a blueprint with the placement outlined; None if it has no kinds and depths."""
    try:
        figure = plot_blueprint(blueprint, placement)
    except BlueprintError:
        return None
    what = figure.axes[0].get_title().rpartition(": ")[2].partition(";")[0]
    figure.axes[0].set_title("")
    return Picture(_address(figure), f"{what} of {blueprint.model_id} by kind and layer, placement outlined")


def _losses(record: RunRecord, resource: str | None) -> tuple[tuple[float, float], ...]:
    pairs = [
        (float(p.step) if resource is None else p.spent.get(resource), p.metrics.get("loss")) for p in record.losses
    ]
    return tuple((x, y) for x, y in pairs if x is not None and y is not None and math.isfinite(x + y))


def _running_mean(values: Sequence[float]) -> list[float]:
    half = max(1, len(values) // 40)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [math.fsum(window) / len(window) for window in windows]


def _label(resource: str | None, largest: float) -> tuple[float, str]:
    """Return the unit to divide the x axis by, and its label."""
    if resource is None:
        return 1.0, "optimizer steps"
    unit, name = unit_for(largest, resource)
    return unit, f"{RESOURCE_NAMES[resource]}, {name.removesuffix(' CO₂e')}"


def _style(index: int, has_markers: bool = True) -> dict[str, Any]:
    """Return the line and marker of a run; beyond eight runs colours repeat with other dashes and markers."""
    turn = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[turn % len(DASHES)],
        "linewidth": 1.6,
        "marker": MARKERS[(index + turn) % len(MARKERS)] if has_markers else "",
        "markersize": 3.2,
        "markeredgewidth": 0,
    }


def _picture(draw: Callable[[Axes], None], ylabel: str, description: str) -> Picture:
    """Draw twice, for a wide screen and for a phone, with the same size of letters on both."""
    wide, narrow = (_address(_figure(draw, ylabel, size)) for size in (WIDE, NARROW))
    return Picture(wide, description, narrow)


def _figure(draw: Callable[[Axes], None], ylabel: str, size: tuple[float, float]) -> Figure:
    with drawing_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(MUTED)
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(colors=MUTED, labelcolor=INK, length=3, width=0.7)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(nbins=6)
        axes.set_ylabel(ylabel, color=INK)
        draw(axes)
        return figure


def _address(figure: Figure) -> str:
    svg = io.BytesIO()
    with drawing_style():
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}"


# ------------------------------------------------------------------------------------------ texts


def _facts(row: Row, report: Report) -> list[dict[str, str]]:
    """Return the main figures of a single run."""
    score = format_score(row.metric, row.error)
    facts = [{"name": report.metric, "value": score, "how": "at the last evaluation"}]
    if row.gain is not None:
        start = "training began" if row.first_step == 0 else f"step {row.first_step}"
        facts.append({"name": "gain", "value": format_score(row.gain), "how": f"since {start}"})
    amount = format_quantity(row.spent.value, report.resource)
    facts.append({"name": RESOURCE_NAMES[report.resource], "value": amount, "how": row.spent.how})
    if row.ratio is not None:
        name, how = f"recent gain {per_unit(report)}", f"over the last {row.window} evaluations"
        facts.append({"name": name, "value": format_number(rate(row.ratio, report)), "how": how})
    return facts


def _to_baseline(row: Row, report: Report) -> str:
    base = report.baseline
    if row.is_baseline or base is None:
        return ABSENT
    if row.to_baseline is None:
        is_known = base.metric is not None and series(row.record, report.resource, report.metric)
        return "not reached" if is_known else ABSENT
    return format_quantity(row.to_baseline, report.resource)


def _settings(report: Report) -> list[dict[str, Any]]:
    """Return the hyperparameters that a run's record has: name, value of each run, and whether these differ."""
    found = [hyperparameters(row.record) for row in report.rows]
    names = dict.fromkeys(name for settings in found for name in settings)
    rows = [(name, [settings.get(name, ABSENT) for settings in found]) for name in names]
    return [{"name": name, "values": values, "differs": len(set(values)) > 1} for name, values in rows]


def _sources(row: Row) -> list[tuple[str, str]]:
    """Return resources and the source of their figures, grouped by source."""
    by_source: dict[str, list[str]] = {}
    for name in UNITS:
        total = row.record.total(name)
        if total.source:
            by_source.setdefault(f"{total.how}: {total.source}", []).append(RESOURCE_NAMES[name])
    return [(", ".join(names), source) for source, names in by_source.items()]


def _placement(record: RunRecord) -> dict[str, Any] | None:
    """Return the adapted submodules of a run as a line and a table by kind, and the blueprint's heat map."""
    about = record.about
    blueprint, note = _blueprint(about.get("blueprint"))
    placement = about.get("placement")
    placement = placement if isinstance(placement, Mapping) else {}
    lora = placement.get("lora")
    names = [name for name in lora if isinstance(name, str)] if isinstance(lora, Mapping | list) else []
    ranks = {name: lora[name] if isinstance(lora, Mapping) else None for name in names}
    blocks = placement.get("unfreeze")
    unfreeze = tuple(map(str, blocks)) if isinstance(blocks, list | tuple) else ()
    if not ranks and not unfreeze and blueprint is None:
        return None
    picture = None
    if blueprint is not None:
        differ = len(set(ranks.values())) > 1
        placed = Placement(
            model_id=blueprint.model_id,
            lora=tuple(ranks),
            unfreeze=unfreeze,
            rank_by=str(placement.get("rank_by", "gradient_norm")),
            coverage="none",
            ranks={name: rank for name, rank in ranks.items() if isinstance(rank, int)} if differ else {},
        )
        picture = _heat_map(blueprint, placed if ranks or unfreeze else None)
    parts = [f"{len(ranks)} adapters"] if ranks else []
    parts += [f"{format_names(unfreeze)} trained as a whole"] if unfreeze else []
    if (ranks or unfreeze) and blueprint is not None:
        parts.append(_shares(blueprint, (*ranks, *unfreeze)))
    numbers: list[Any] = [about.get(f"{name}_parameters") for name in ("trainable", "total")]
    trainable, total = map(_count, numbers)
    if trainable:
        share = f" of {total} ({100 * numbers[0] / numbers[1]:.3g} %)" if total and numbers[1] else ""
        parts.append(f"{trainable} trainable parameters{share}")
    return {"name": record.name, "line": ", ".join(parts), "kinds": _kinds(ranks), "picture": picture, "note": note}


def _blueprint(source: Any) -> tuple[Blueprint | None, str]:
    """Read a blueprint from an object or a local file, never from the network. Returns a note if there is none."""
    try:
        if isinstance(source, Mapping):
            return from_dict(source), ""
        if isinstance(source, str) and source:
            if Path(source).exists():
                return Blueprint.from_pretrained(source), ""
            return None, f"The file {Path(source).name} of the blueprint was not found, so its heat map is missing."
    except (BlueprintError, OSError) as error:
        text = str(error)
        if isinstance(source, str):
            text = text.replace(source, Path(source).name)
        return None, f"The blueprint cannot be drawn: {text}"
    return None, ""


def _shares(blueprint: Blueprint, placed: Sequence[str]) -> str:
    """Return which share of a blueprint's submodules is trained, and of their parameters where shapes are known."""
    entries = [entry for entry in blueprint if entry.form in ADAPTABLE]
    names = set(placed)
    reached = [e for e in entries if not names.isdisjoint(accumulate(e.name.split("."), "{}.{}".format))]
    text = f"{100 * len(reached) / max(len(entries), 1):.3g} % of submodules"
    share = parameter_share(reached, entries)
    return text if share is None else f"{text}, {100 * share:.3g} % of parameters"


def _kinds(ranks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for each kind how many adapters it has, in which layers, and their ranks."""
    by_kind: dict[str, list[str]] = {}
    for name in ranks:
        by_kind.setdefault(name.rpartition(".")[2], []).append(name)
    rows = []
    for kind, members in list(by_kind.items())[:MAX_ROWS]:
        depths = sorted({int(depth[1]) for name in members if (depth := _DEPTH.search(name))})
        known = sorted({rank for name in members if isinstance(rank := ranks[name], int)})
        shown = "" if not known else str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"
        rows.append({"kind": kind, "count": len(members), "layers": _ranges(depths), "ranks": shown})
    return rows


def _ranges(numbers: Sequence[int]) -> str:
    """Format sorted numbers as ranges, `0–3, 7, 9–11`."""
    ranges: list[list[int]] = []
    for n in numbers:
        if ranges and n == ranges[-1][-1] + 1:
            ranges[-1].append(n)
        else:
            ranges.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in ranges)


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else ""
