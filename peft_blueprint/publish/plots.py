"""Draw a blueprint as a heat map with matplotlib, the `plots` extra."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .._text import is_inside
from ..blueprint import Blueprint, Submodule, expert_scores, score_of
from ..compare import compare_experts
from ..errors import BlueprintError
from ..place import CONTROLS, SCORES, CoverGain


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..place import Placement


MAX_INCHES = 20.0  # of a picture's sides
MAX_LABELS = 50  # of rows
_OUTLINE = "#d9480f"


@contextmanager
def drawing_style() -> Iterator[None]:
    """Set matplotlib up for pictures that are the same each time and show text literally, not as formulas.

    Letters that matplotlib's own font lacks cause no warning, because an SVG's reader has other fonts.

    Raises:
        BlueprintError: without matplotlib.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise BlueprintError("Pictures need matplotlib: pip install 'peft-blueprint[plots]'.") from error
    with (
        rc_context({"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "peft-blueprint"}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def plot_blueprint(blueprint: Blueprint, placement: Placement | None = None, by: str | None = None) -> Figure:
    """Draw a statistic by layer and kind, with the placed submodules outlined.

    A statistic is shaded relative to the largest value of its kind, because kinds do not compare. That value is written
    at the row's end. A placement that covers the model (`cover_gain`, `even`) is shaded by its coverage instead: 1
    where an adapter is, less the farther the next one is (`CoverGain.covered`).

    Args:
        blueprint: at submodule level, with kinds and depths.
        placement: its LoRA submodules are outlined, with their ranks if those differ; the submodules of unfrozen blocks
            are hatched.
        by: statistic, such as "gradient_norm" or "adam_gain"; by default the placement's score, or the
            gradient norm.

    Returns:
        A figure; `save_plot(figure, path)` writes it.

    Raises:
        BlueprintError: without matplotlib, or if no entry has a kind and a depth.

    Example:
        >>> from peft_blueprint.blueprint import Submodule
        >>> entries = [Submodule(f"layers.{i}.q_proj", 1.0 + i, kind="q_proj", depth=i) for i in range(4)]
        >>> figure = plot_blueprint(Blueprint("org/model", tuple(entries)))
        >>> figure.axes[0].get_title()
        'org/model: gradient norm'
    """
    entries = [entry for entry in blueprint if entry.kind is not None and entry.depth is not None]
    if not entries:
        raise BlueprintError(f"The blueprint of {blueprint.model_id!r} has no kinds and depths; expand it first.")
    scores, what, is_coverage = _scores(entries, placement, by)
    if is_coverage:
        return _heat_map(blueprint.model_id, entries, scores, what, "share covered", placement)
    of_kind: dict[str, float] = {}
    for entry, score in zip(entries, scores, strict=True):
        of_kind[str(entry.kind)] = max(score, of_kind.get(str(entry.kind), 0.0))
    shares = [score / (of_kind[str(entry.kind)] or 1) for entry, score in zip(entries, scores, strict=True)]
    return _heat_map(blueprint.model_id, entries, shares, what, "share of the largest", placement, of_kind)


def plot_placement(placement: Placement, blueprint: Blueprint | None = None) -> Figure:
    """Draw where a placement has adapters, by layer and kind, shaded by rank.

    Args:
        placement: with the details that `plan_placement` writes.
        blueprint: that it was planned with: draw all its submodules as `plot_blueprint` does.

    Returns:
        A figure; `save_plot(figure, path)` writes it.

    Raises:
        BlueprintError: without matplotlib, or if the placement has no adapter with a kind and a layer.

    Example:
        >>> from peft_blueprint.place import plan_placement
        >>> from peft_blueprint.testing import tiny_llama
        >>> figure = plot_placement(plan_placement(None, tiny_llama(), num_modules=3))
        >>> figure.axes[0].get_title().partition(": ")[2]
        'rank; outlined: 3 adapters'
    """
    if blueprint is not None:
        return plot_blueprint(blueprint, placement)
    entries, ranks = [], []
    for name in placement.lora:
        known = placement.details.get(name, {})
        if known.get("kind") is not None and known.get("depth") is not None:
            entries.append(Submodule(name, 0.0, kind=known["kind"], depth=known["depth"]))
            ranks.append(placement.ranks.get(name) or placement.rank or 1)
    if not entries:
        raise BlueprintError("The placement has no adapter in a layer. Give the blueprint: plot(blueprint).")
    shares = [rank / max(ranks) for rank in ranks]
    return _heat_map(placement.model_id, entries, shares, "rank", f"share of rank {max(ranks)}", placement)


def plot_experts(
    blueprint: Blueprint, other: Blueprint | None = None, by: str = "token_share", top_p: float = 0.9
) -> Figure:
    """Draw the experts of every layer, shaded by their share of the layer's scores.

    Args:
        blueprint: of single experts, as `generate_blueprint(experts=True)` measures it.
        other: on another kind of data: drawn beside it. The experts that are in both top-p sets are outlined.
        by: statistic that scores an expert, see `expert_scores`.
        top_p: share of a layer's scores that the outlined experts hold; of one blueprint its own top-p set.

    Raises:
        BlueprintError: without matplotlib, single experts or this statistic.
        MismatchError: if the two name different experts.

    Example:
        >>> from peft_blueprint.blueprint import Submodule
        >>> names = [f"layers.{i}.mlp.experts.{e}.up_proj" for i in range(2) for e in range(4)]
        >>> entries = [Submodule(name, 1.0, token_share=0.25) for name in names]
        >>> plot_experts(Blueprint("org/model", tuple(entries))).axes[0].get_xlabel()
        'expert'
    """
    overlap = compare_experts(blueprint, blueprint if other is None else other, by, top_p)
    shown = [blueprint] if other is None else [blueprint, other]
    width = max(layer.experts for layer in overlap.layers)
    outlined = [(expert, row) for row, layer in enumerate(overlap.layers) for expert in layer.shared]
    with drawing_style():
        from matplotlib.collections import PatchCollection
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        size = len(shown) * max(4.0, 1.5 + 0.09 * width), max(2.5, 1.2 + 0.14 * len(overlap.layers))
        figure = Figure(figsize=(min(size[0], MAX_INCHES), min(size[1], MAX_INCHES)), layout="constrained", dpi=150)
        pictures = [_shares_of_experts(one, by, width) for one in shown]
        largest = max(float(np.nanmax(picture)) for picture in pictures)
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, one, picture in zip(panels, shown, pictures, strict=True):
            image = axes.imshow(picture, cmap="Blues", vmin=0, vmax=largest or 1, aspect="auto", interpolation="none")
            boxes = [Rectangle((x - 0.5, y - 0.5), 1, 1) for x, y in outlined]
            axes.add_collection(PatchCollection(boxes, facecolor="none", edgecolor=_OUTLINE, linewidth=0.6))
            axes.set_xlabel("expert")
            axes.set_title(_cut(one.model_id), fontsize=9)
        panels[0].set_ylabel("layer with experts")
        figure.colorbar(image, ax=list(panels), label=f"share of the layer's {by.replace('_', ' ')}", pad=0.02)
        of_what = "of both" if other is not None else "that hold"
        figure.suptitle(f"outlined: experts {of_what} top {100 * top_p:g} %", fontsize=9)
    return figure


def _shares_of_experts(blueprint: Blueprint, by: str, width: int) -> np.ndarray:
    """Return every expert's share of its layer's scores, (layers, experts); NaN where a layer has fewer."""
    scores = expert_scores(blueprint, by)
    shares = np.full((len(scores), width), np.nan)
    for row, of_layer in enumerate(scores.values()):
        total = sum(of_layer.values()) or 1.0
        for expert, score in of_layer.items():
            if expert < width:
                shares[row, expert] = score / total
    return shares


def _heat_map(
    model_id: str,
    entries: Sequence[Submodule],
    values: Sequence[float] | np.ndarray,
    what: str,
    label: str,
    placement: Placement | None,
    largest: Mapping[str, float] | None = None,
) -> Figure:
    """Draw values in [0, 1] by layer and kind, with the placement outlined, and the largest score of each kind."""
    kinds = list(dict.fromkeys(str(entry.kind) for entry in entries))
    rows = {kind: row for row, kind in enumerate(kinds)}
    depths = max(entry.depth or 0 for entry in entries) + 1
    shares = np.full((len(kinds), depths), np.nan)
    for entry, value in zip(entries, values, strict=True):
        shares[rows[str(entry.kind)], entry.depth] = value

    with drawing_style():
        from matplotlib.collections import PatchCollection
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        width, height = max(6.0, 2.5 + 0.3 * depths), 1.6 + 0.36 * len(kinds)
        figure = Figure(figsize=(min(width, MAX_INCHES), min(height, MAX_INCHES)), layout="constrained", dpi=150)
        axes = figure.add_subplot()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        lora = set(placement.lora) if placement is not None else set()
        unfreeze = placement.unfreeze if placement is not None else ()
        ranks = placement.ranks if placement is not None else {}
        outlined, hatched = [], []
        for entry in entries:
            x, y = entry.depth or 0, rows[str(entry.kind)]
            if entry.name in lora:
                outlined.append(Rectangle((x - 0.5, y - 0.5), 1, 1))
            elif any(is_inside(entry.name, block) for block in unfreeze):
                hatched.append(Rectangle((x - 0.5, y - 0.5), 1, 1))
            if entry.name in lora and entry.name in ranks and height <= MAX_INCHES:  # otherwise rows are too low
                colour = "white" if shares[y, x] > 0.6 else "black"
                axes.annotate(str(ranks[entry.name]), (x, y), ha="center", va="center", fontsize=7, color=colour)
        axes.add_collection(PatchCollection(outlined, facecolor="none", edgecolor=_OUTLINE, linewidth=2))
        axes.add_collection(PatchCollection(hatched, facecolor="none", edgecolor=_OUTLINE, hatch="///", linewidth=0))
        labelled = range(0, len(kinds), -(-len(kinds) // MAX_LABELS))
        axes.set_yticks(labelled, [_cut(kinds[row]) for row in labelled])
        axes.set_xlabel("layer")
        axes.set_xticks(range(0, depths, max(1, depths // 15)))
        if largest is not None:
            right = axes.secondary_yaxis("right")
            right.set_yticks(labelled, [f"{largest[kinds[row]]:.3g}" for row in labelled])
            right.set_ylabel("largest of its kind")
            right.tick_params(length=0)
        figure.colorbar(image, ax=axes, label=label, pad=0.02)
        placed = "" if placement is None else f"; outlined: {len(lora)} adapters"
        placed += f"; hatched: {len(unfreeze)} unfrozen" if unfreeze else ""
        axes.set_title(f"{_cut(model_id)}: {what}{placed}", fontsize=10)
    return figure


def _scores(
    entries: Sequence[Submodule], placement: Placement | None, by: str | None
) -> tuple[Sequence[float] | np.ndarray, str, bool]:
    """Return what to shade entries by, its name, and whether it is the share that the placement covers."""
    chosen_by = placement.rank_by.removesuffix(" per cost") if placement is not None else "gradient_norm"
    if by is None and placement is not None and chosen_by in ("cover_gain", "even"):
        names = {entry.name for entry in entries}
        lora = [name for name in placement.lora if name in names]
        return CoverGain(entries, [1.0] * len(entries)).covered(lora), "coverage by kind and layer", True
    if by is None:
        by = chosen_by if chosen_by in SCORES and chosen_by not in CONTROLS else "gradient_norm"
        return SCORES[by](entries), by.replace("_", " "), False
    return [score_of(entry, by) for entry in entries], by.replace("_", " "), False


def _cut(name: str, longest: int = 60) -> str:
    """Leave out the beginning of a long name."""
    return name if len(name) <= longest else f"…{name[1 - longest :]}"


def save_plot(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, SVG or PDF, by the ending of `path`. Returns the file.

    Raises:
        BlueprintError: if it cannot be written.

    Example:
        >>> import tempfile
        >>> from matplotlib.figure import Figure
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_plot(Figure(), f"{folder}/empty.png").name
        'empty.png'
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with drawing_style():
            figure.savefig(path)
    except (OSError, ValueError) as error:
        raise BlueprintError(f"The picture {path} cannot be written: {error}. Choose another file.") from error
    return path
