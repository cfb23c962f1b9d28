"""Heat maps of blueprints."""

import warnings
from dataclasses import replace

import matplotlib.figure  # noqa: F401 (its old versions warn when imported, and warnings are errors below)
import pytest

from peft_blueprint import Blueprint, BlueprintError, Placement, Submodule
from peft_blueprint.publish import plot_blueprint, save_plot
from peft_blueprint.runs import Point, RunRecord, make_report


def made(names, norm=1.0):
    """Entries of one row each."""
    return tuple(Submodule(name, norm, kind=name, depth=0) for name in names)


def marked(blueprint, placement):
    """Names of the hatched and of the outlined entries."""
    names = blueprint.names
    found = {True: set(), False: set()}
    for collection in plot_blueprint(blueprint, placement).axes[0].collections:
        rows = [round(path.get_extents().y0 + 0.5) for path in collection.get_paths()]
        found[bool(collection.get_hatch())] |= {names[row] for row in rows}
    return found[True], found[False]


@pytest.mark.parametrize(
    "block, inside",
    [
        ("experts.1", {"experts.1.up", "experts.1.down"}),
        ("experts.1.up", {"experts.1.up"}),
        ("experts", {"experts.1.up", "experts.1.down", "experts.10.up", "experts.10.upper"}),
        ("experts.10.up", {"experts.10.up"}),
        ("expert", set()),
        ("head", set()),
    ],
)
def test_an_unfrozen_block_hatches_only_its_own_cells(block, inside):
    """Not a block whose name begins in the same way."""
    blueprint = Blueprint(
        "org/m", made(["experts.1.up", "experts.1.down", "experts.10.up", "experts.10.upper", "heads"])
    )
    placement = Placement("org/m", lora=("heads",), unfreeze=(block,), rank_by="gradient_norm", coverage="none")
    assert marked(blueprint, placement) == (inside, {"heads"})


@pytest.mark.parametrize("name", ["$x_1$", "a[/b]c", "<b>", "名前", "x" * 300, "%s{}", "_hidden", "a\\bq"])
def test_any_name_is_drawn_as_it_is(tmp_path, name):
    """A formula, markup, other letters, a very long one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # by matplotlib 3.9 beside long names
        figure = plot_blueprint(Blueprint(name, made([name.replace("\\", "/")])))
        assert save_plot(figure, tmp_path / "x.png").stat().st_size > 0
    assert name[-59:] in figure.axes[0].get_title()


@pytest.mark.parametrize("norm, count", [(0.0, 1), (1e-300, 2), (1e150, 1)])
def test_extreme_norms_are_drawn(tmp_path, norm, count):
    """Zeros, and the smallest and largest that a record may hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_plot(plot_blueprint(Blueprint("org/m", made(list("ab")[:count], norm))), tmp_path / "x.png")


@pytest.mark.parametrize("kinds, depths", [(3000, 1), (3, 1000)])
def test_many_entries_are_drawn_in_a_picture_of_bounded_size(tmp_path, kinds, depths):
    """As many as an unfused model of experts has."""
    entries = tuple(
        Submodule(f"layers.{depth}.k{kind}", 1.0 + kind, kind=f"k{kind}", depth=depth)
        for kind in range(kinds)
        for depth in range(depths)
    )
    names = tuple(entry.name for entry in entries)
    placement = Placement(
        "org/m", lora=names, unfreeze=(), rank_by="gradient_norm", coverage="none", ranks=dict.fromkeys(names, 8)
    )
    figure = plot_blueprint(Blueprint("org/m", entries), placement if kinds > 1000 else None)
    assert max(figure.get_size_inches()) <= 20
    save_plot(figure, tmp_path / "x.png")


def test_a_picture_needs_kinds_and_depths():
    """The error has a fix."""
    with pytest.raises(BlueprintError, match="no kinds and depths"):
        plot_blueprint(Blueprint("org/m", tuple(replace(entry, depth=None) for entry in made("ab"))))


@pytest.mark.parametrize("rank_by, deepest", [("cover_gain", 0.018), ("adam_gain per cost", 1.0), ("random", 0.25)])
def test_a_placement_is_shaded_by_its_score(rank_by, deepest):
    """By its coverage, its score, or the gradient norm where the score is unknown."""
    entries = tuple(
        Submodule(f"layers.{i}.q_proj", 4.0 - i, kind="q_proj", depth=i, adam_gain=1.0 + i) for i in range(4)
    )
    placement = Placement("org/m", lora=("layers.1.q_proj",), unfreeze=(), rank_by=rank_by, coverage="kind+depth")
    shades = plot_blueprint(Blueprint("org/m", entries), placement).axes[0].images[0].get_array()
    assert shades[0, 3] == pytest.approx(deepest, abs=1e-3)
    assert shades[0, 1] == pytest.approx({"cover_gain": 1.0, "random": 0.75}.get(rank_by, 0.5))


def test_placements_and_reports_draw_themselves():
    """A placement by its ranks, or beside the rest of the blueprint; a report by the amounts spent."""
    ranks = {"layers.1.q_proj": 8, "layers.0.v_proj": 16}
    details = {name: {"kind": name[-6:], "depth": int(name[7])} for name in ranks}
    placement = Placement("org/m", tuple(ranks), ("head",), "even", "none", rank=8, ranks=ranks, details=details)
    shades = placement.plot().axes[0].images[0].get_array()
    assert shades[0, 1] == 0.5 and shades[1, 0] == 1.0 and shades.mask.sum() == 2
    whole = Blueprint("org/m", tuple(Submodule(f"layers.{i}.q_proj", 1.0, kind="q_proj", depth=i) for i in range(3)))
    assert placement.plot(whole).axes[0].images[0].get_array().shape == (1, 3)
    with pytest.raises(BlueprintError, match="no adapter in a layer. Give the blueprint"):
        replace(placement, details={}).plot()

    points = tuple(Point(i, {"seconds": 60.0 * i}, {"eval_loss": 3.0 - i}) for i in range(3))
    records = [RunRecord(name, "eval_loss", "minimize", "seconds", points=points) for name in ("_hidden", "b")]
    axes = make_report(records).plot().axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0, 3], [1, 2], [2, 1]] and axes.get_xlabel() == "time, min"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [" _hidden", "b"]
    for resource, why in (
        ("energy", "one of seconds, .* got 'energy'"),
        ("flops", "no run of .* Choose another resource"),
    ):
        with pytest.raises(BlueprintError, match=f"(?i){why}"):
            make_report(records).plot(resource)
