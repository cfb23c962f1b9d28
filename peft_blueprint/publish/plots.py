"""Pictures of a blueprint. matplotlib is an extra: `pip install peft-blueprint[plots]`.

Draws records; knows nothing of models.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..blueprint import NUMBERS, Blueprint, score_of
from ..errors import BlueprintError
from ..place import Placement


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_blueprint(blueprint: Blueprint, placement: Placement | None = None, by: str | None = None) -> Figure:
    """A statistic by layer and kind, shaded within each kind, with what was placed outlined.

    Every row is shaded relative to its own largest value, because kinds do not compare; the value is written at its end.

    Args:
        blueprint: at submodule level, with kinds and depths.
        placement: its LoRA submodules are outlined, with their ranks where those differ; the submodules of unfrozen
            blocks are filled with hatching.
        by: the statistic, such as "gradient_norm" or "adam_gain"; by default the one that the placement went by, or the
            gradient norm.

    Returns:
        A figure; `figure.savefig(path)` writes it.

    Raises:
        BlueprintError: without matplotlib, or if no entry says its kind and depth.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise BlueprintError("Pictures need matplotlib: pip install 'peft-blueprint[plots]'.") from error

    by = by or (placement.rank_by if placement is not None and placement.rank_by in NUMBERS else "gradient_norm")
    placed = [entry for entry in blueprint if entry.kind is not None and entry.depth is not None]
    if not placed:
        raise BlueprintError(f"The blueprint of {blueprint.model_id!r} says no kinds and depths; expand it first.")
    kinds = list(dict.fromkeys(entry.kind for entry in placed))
    depths = max(entry.depth or 0 for entry in placed) + 1
    values = np.full((len(kinds), depths), np.nan)
    for entry in placed:
        values[kinds.index(entry.kind), entry.depth] = score_of(entry, by)
    largest = np.nanmax(values, axis=1, keepdims=True)

    figure = Figure(figsize=(max(6.0, 2.5 + 0.3 * depths), 1.6 + 0.36 * len(kinds)), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    image = axes.imshow(values / np.where(largest > 0, largest, 1), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for entry in placed:
        corner = ((entry.depth or 0) - 0.5, kinds.index(entry.kind) - 0.5)
        if placement is not None and entry.name in placement.lora:
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#d9480f", linewidth=2))
            if entry.name in placement.ranks:
                place = (entry.depth or 0, kinds.index(entry.kind))
                axes.annotate(str(placement.ranks[entry.name]), place, ha="center", va="center", fontsize=6)
        elif placement is not None and any(entry.name.startswith(block) for block in placement.unfreeze):
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#d9480f", hatch="///", linewidth=0))
    axes.set_yticks(range(len(kinds)), [str(kind) for kind in kinds])
    axes.set_xlabel("layer")
    axes.set_xticks(range(0, depths, max(1, depths // 15)))
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(kinds)), [f"{value:.3g}" for value in largest[:, 0]])
    right.set_ylabel("largest of its kind")
    right.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="share of the largest", pad=0.02)
    chosen = "" if placement is None else f"; outlined: {len(placement.lora)} adapters by {placement.rank_by}"
    hatched = f"; hatched: {len(placement.unfreeze)} unfrozen" if placement is not None and placement.unfreeze else ""
    axes.set_title(f"{blueprint.model_id}: {by.replace('_', ' ')}{chosen}{hatched}", fontsize=10)
    return figure


def save_plot(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, SVG or PDF, by the ending of `path`. Returns the file.

    Raises:
        BlueprintError: if it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise BlueprintError(f"The picture {path} cannot be written: {error}. Choose another file.") from error
    return path
