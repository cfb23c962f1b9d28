"""The pictures of a report's page, as SVG to stand in HTML: curves, the Pareto front, a blueprint's heat map.

Colours are the page's own variables, text stays text, and names of runs stand in the page's legend, not here. matplotlib
is an extra. Knows nothing of the page.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..blueprint import Blueprint
from ..errors import BlueprintError
from ..place import Placement
from ..runs import Report, RunRecord, series
from .plots import plot_blueprint
from .words import NAMES


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

SERIES = 8  # colours; runs beyond that have the first ones again, in other dashes
MARKERS = "osD^vPX*"
DASHES = ("", "5 2.5", "1.5 2", "6 2 1.5 2")

# Colours that stand for the page's variables until the picture is written.
_INK, _MUTED, _GRID = "#010203", "#040506", "#070809"
_COLOURS = tuple(f"#0a0b{i:02x}" for i in range(16, 16 + SERIES))
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid"} | {c: f"--run-{i}" for i, c in enumerate(_COLOURS)}

_SECONDS = ((3 * 3600, 3600.0, "hours"), (300, 60.0, "minutes"), (0, 1.0, "seconds"))
_BYTES = ((2.0**30, "GiB"), (2.0**20, "MiB"), (1.0, "bytes"))
_PREFIXES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (0, ""))
_WORDS = {"G": "billion ", "M": "million ", "k": "thousand ", "": ""}


def curve(report: Report, resource: str | None) -> str | None:
    """The metric of every run against what it had spent; against steps if the resource is None.

    Where no run was evaluated, the training loss; of one run that was, its training loss besides, thin.

    Returns:
        SVG; None if no run has a point to draw.

    Raises:
        BlueprintError: without matplotlib.
    """
    is_trained = all(row.metric is None for row in report.rows)
    lines = [
        _losses(row.record, resource) if is_trained else series(row.record, resource, report.metric)
        for row in report.rows
    ]
    if not any(x > 0 for line in lines for x, _ in line):
        return None
    picture, axes = _axes()
    largest = max(x for line in lines for x, _ in line)
    unit, label = _scale(resource, largest)
    only = len(lines) == 1 and not is_trained and "loss" in report.metric
    if only:
        losses = _losses(report.rows[0].record, resource)
        axes.plot([x / unit for x, _ in losses], [y for _, y in losses], color=_MUTED, linewidth=0.7, alpha=0.7)
    for i, line in enumerate(lines):
        marker = _marker(i) if len(line) <= 60 else ""
        axes.plot(
            [x / unit for x, _ in line],
            [y for _, y in line],
            color=_COLOURS[i % SERIES],
            linewidth=1.6,
            linestyle=_dash(i),
            marker=marker,
            markersize=3.2,
            markeredgewidth=0,
        )
    what = "training loss" if is_trained else report.metric
    best = "lower" if is_trained or report.direction == "minimize" else "higher"
    axes.set_xlabel(label)
    axes.set_ylabel(f"{what} ({best} is better)")
    axes.set_xlim(left=0)
    return _svg(picture, f"curve-{resource or 'step'}", f"{what} against {label}")


def front(report: Report) -> str | None:
    """Ψ against Γ, a mark for each run, and the Pareto front as a line; None if fewer than two runs have both.

    Raises:
        BlueprintError: without matplotlib.
    """
    placed = [(i, row) for i, row in enumerate(report.rows) if row.on_front is not None]
    if len(placed) < 2:
        return None
    picture, axes = _axes()
    spent = {i: row.spent.value or 0.0 for i, row in placed}
    unit, label = _scale(report.resource, max(spent.values()))
    values = {i: row.metric or 0.0 for i, row in placed}
    best = sorted((spent[i] / unit, values[i]) for i, row in placed if row.on_front)
    axes.step([x for x, _ in best], [y for _, y in best], where="post", color=_MUTED, linewidth=1.1, zorder=1)
    for i, row in placed:
        colour = _COLOURS[i % SERIES]
        axes.plot(
            [spent[i] / unit],
            [values[i]],
            marker=_marker(i),
            markersize=7.5,
            color=colour,
            markerfacecolor=colour if row.on_front else "none",
            markeredgewidth=1.5,
            linestyle="none",
        )
    axes.margins(0.12)
    axes.set_xlabel(label)
    axes.set_ylabel(f"{report.metric} ({'lower' if report.direction == 'minimize' else 'higher'} is better)")
    if min(spent.values()) > 0 and max(spent.values()) / min(spent.values()) > 30:
        axes.set_xscale("log")
    return _svg(picture, "front", f"{report.metric} against {label} of {len(placed)} runs, with the Pareto front")


def heat_map(blueprint: Blueprint, placement: Placement | None, prefix: str) -> str | None:
    """A blueprint's heat map with the placement outlined; None if the blueprint says no kinds and depths.

    Raises:
        BlueprintError: without matplotlib.
    """
    _require_matplotlib()
    try:
        with _quietly():
            picture = plot_blueprint(blueprint, placement)
    except BlueprintError:
        return None
    picture.axes[0].set_title("")
    return _svg(picture, prefix, f"Gradient norms of {blueprint.model_id} by kind and layer, placement outlined")


def sample(index: int) -> str:
    """A run's line and mark as they are in the pictures, for a legend."""
    from matplotlib.markers import MarkerStyle
    from matplotlib.transforms import Affine2D

    style = MarkerStyle(_marker(index))
    shape = style.get_path().transformed(style.get_transform() + Affine2D().scale(7, -7).translate(14, 6))
    outline = np.concatenate([np.asarray(polygon) for polygon in shape.to_polygons()]).tolist()
    path = "M" + " L".join(f"{x:.2f},{y:.2f}" for x, y in outline) + " Z"
    dash = DASHES[index // SERIES % len(DASHES)]
    return (
        f'<svg class="sample" viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">'
        f'<path d="M0,6 H28" fill="none" stroke="var(--run-{index % SERIES})" stroke-width="2" '
        f'stroke-dasharray="{dash}"/><path d="{path}" fill="var(--run-{index % SERIES})"/></svg>'
    )


def resources_drawn(report: Report, names: Sequence[str]) -> list[str]:
    """Those of the resources that at least one run can be drawn against."""
    return [
        name
        for name in names
        if any(
            x > 0
            for row in report.rows
            for x, _ in (*series(row.record, name, report.metric), *_losses(row.record, name))
        )
    ]


def _losses(record: RunRecord, resource: str | None) -> tuple[tuple[float, float], ...]:
    pairs = [
        (float(p.step) if resource is None else p.spent.get(resource), p.metrics.get("loss")) for p in record.losses
    ]
    return tuple((x, y) for x, y in pairs if x is not None and y is not None and math.isfinite(x + y))


def _axes() -> tuple[Picture, Axes]:
    _require_matplotlib()
    from matplotlib.figure import Figure

    picture = Figure(figsize=(5.4, 3.1), layout="constrained")
    picture.patch.set_alpha(0)
    axes = picture.add_subplot()
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelcolor=_INK, labelsize=8, length=3, width=0.7)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.label.set(color=_INK, size=8.5)
    axes.yaxis.label.set(color=_INK, size=8.5)
    axes.locator_params(nbins=6)
    return picture, axes


def _scale(resource: str | None, largest: float) -> tuple[float, str]:
    """What to divide by, and the axis's label."""
    if resource is None:
        return 1.0, "optimizer steps"
    if resource == "seconds":
        divisor, unit = next((f, u) for least, f, u in _SECONDS if largest >= least)
        return divisor, f"time, {unit}"
    if resource.endswith("_bytes"):
        size, unit = next(((s, u) for s, u in _BYTES if largest >= s), (1.0, "bytes"))
        return size, f"{NAMES[resource]}, {unit}"
    if resource in ("flops", "energy_joules", "tokens"):
        factor, prefix = next((s, p) for s, p in _PREFIXES if largest >= s and (resource != "tokens" or p in _WORDS))
        if resource == "tokens":
            return factor or 1.0, f"{_WORDS[prefix]}tokens"
        return factor or 1.0, f"{NAMES[resource]}, {prefix}{'FLOP' if resource == 'flops' else 'J'}"
    units = {"device_hours": "device-hours", "memory_gb_hours": "memory × time, GB h", "carbon_grams": "CO₂e, g"}
    return 1.0, units.get(resource, resource)


def _marker(index: int) -> str:
    return MARKERS[(index + index // SERIES) % len(MARKERS)]


def _dash(index: int) -> Any:
    dash = DASHES[index // SERIES % len(DASHES)]
    return (0, tuple(map(float, dash.split()))) if dash else "-"


def _svg(picture: Picture, prefix: str, label: str) -> str:
    """A figure as an `<svg>` element: its ids begin with the prefix, colours and fonts are the page's."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    for text in picture.findobj(Text):
        text.set_parse_math(False)
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}), _quietly():
        picture.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', lambda found: f"{found[1]}{prefix}-", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    sizes = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert sizes is not None
    head = f'<svg class="picture" viewBox="{sizes[0][9:-1]}" role="img" aria-label="{html.escape(label)}">'
    return re.sub(r"<svg\b[^>]*>", lambda _: head, svg, count=1)


class _quietly(warnings.catch_warnings):
    """Without matplotlib's warnings of characters that its own font lacks: the reader's browser has others."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        return entered


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BlueprintError("A page's pictures need matplotlib: pip install 'peft-blueprint[plots]'.") from error
